"""The log: few lines, retry warnings once a minute; streams that are closed, full or not read; the end."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Manager, Running, eventually

import poller


def lines(running: Running) -> list[str]:
    """What it logged, without stamps."""
    return [re.sub(r"^\S+ \S+ ", "", line) for line in running.log().splitlines()]


def test_an_order_that_ends_well_is_two_lines(home: Home) -> None:
    """And one where it is rejected; two lines are of the start, and one of the stop."""
    dead = ["no-such-task", home.grafx.add("failed")]
    home.wait_for(*dead)
    daemon = home.start(before=QUICK)
    eventually(lambda: len(home.read().get("failing", {})) == 2)
    few, many = ([home.grafx.add(questions=1) for _ in range(number)] for number in (5, 6))
    for task_ids in (few, many):
        home.wait_for(*dead, *task_ids, projectID="p-1")
        eventually(lambda: list(home.waiting()) == dead)
    home.wait_for()
    daemon.says(f"{dead[1]} removed from the file")
    assert daemon.stop() == 0
    place = f"{home.database}, {home.grafx.base_url}, environment {home.grafx.environment}"
    until = r"retrying until \d\d:\d\d:\d\d"
    delivered = r"INFO +\S+ delivered to orders/\S+\.png \([\d.]+ kB, [\d.]+ s after it was added\)"
    patterns = [
        rf"INFO +GraFx order poller [\d-]+: {place}, files to {home.orders}",
        "INFO +2 pending, 0 rejected, 0 failed, 0 delivered",
        rf"WARNING +no-such-task rejected by GraFx: Not Found: .* was not found; {until} or later",
        rf"WARNING +{dead[1]} rejected by GraFx: Invalid list .* 'XXL'; {until}, then it fails",
        *(rf"INFO +{task_id} added \(project p-1\)" for task_id in few),
        *[delivered] * 5,
        "INFO +6 orders added",
        *[delivered] * 6,
        *(rf"INFO +{task_id} removed from the file" for task_id in dead),
        "INFO +stopped, 0 pending",
    ]
    said = lines(daemon)
    for pattern in patterns:
        (found, *_) = [line for line in said if re.fullmatch(pattern, line)] or [pattern]
        said.remove(found)
    assert said == []


def test_once_ends_with_one_line(home: Home) -> None:
    """What ends has a line each; of the three that are rejected one stands for all."""
    add = home.grafx.add
    tasks = [add() for _ in range(5)] + [add("never") for _ in range(90)] + [add("expired"), add("expired")]
    home.wait_for(*tasks, *(f"no-such-task-{n}" for n in range(3)))
    ended = home.run("--once")
    assert ended.process.returncode == 1
    assert lines(ended)[-1].endswith("polled 100 orders: 5 delivered, 90 rendering, 3 rejected, 2 failed")
    assert len(lines(ended)) == 2 + 5 + 1 + 2 + 1
    for name in ("BASEURL", "TOKEN_URL"):  # in an outage
        ended = home.run("--once", **{name: "http://127.0.0.1:1"})
        assert ended.process.returncode == 1
        polled = re.search(r"polled (\d+) orders?(: \1 retrying)?\n", ended.log())
        rest = re.search(r"(\d+) orders not polled, left for the next run\n", ended.log())
        assert polled and rest and int(polled[1]) + int(rest[1]) == 93, ended.log()
    assert len(home.waiting()) == 93


def test_a_warning_of_one_kind_is_logged_once_a_minute_and_told_to_everybody(home: Home) -> None:
    """Here downloads are on a host that is unreachable; others go on. After ALARM it is an error."""
    stuck = [home.grafx.add(link="http://127.0.0.1:1/file") for _ in range(30)]
    home.wait_for(*stuck, other := home.grafx.add())
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 1; poller.ALARM = 0.5")
    reason = r"the download server is unreachable \(Connection refused, 127.0.0.1\)"
    warning = rf"WARNING \S+ cannot be polled: {reason}; retrying in [\d.]+ s"
    daemon.says(rf"{warning} \(and \d+ more like it since the last one\)\n")
    eventually(lambda: re.search(f"the poller says: 30 orders: {reason}\n", home.db("list").stdout))
    daemon.says(f"{other} delivered")
    daemon.says(warning.replace("WARNING", "ERROR +"))
    daemon.stop()
    held_back = re.findall(rf"{warning}(?: \(and (\d+) more .*)?\n", daemon.log())
    assert sum(int(number or 0) for number in held_back) > len(held_back)


def test_the_filter_forgets_a_warning_after_its_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "MINUTE", 0.0)
    once = poller.OnceAMinute()
    for number in range(5000):
        text = str(number).translate(str.maketrans("0123456789", "abcdefghij"))
        assert once.filter(logging.makeLogRecord({"msg": text, "levelname": "INFO"}))
    assert len(once.passed) < 1100


def test_an_outage_has_its_begin_and_its_end_in_the_log_and_becomes_an_error(home: Home) -> None:
    """People alert on `journalctl -p err`."""
    home.wait_for(task_id := home.grafx.add())
    home.grafx.fault("token", "status-503", times=None)
    daemon = home.start(before=f"{QUICK}; poller.ALARM = 0.5")
    reason = r"no token: \S+ answered 503 Service Unavailable"
    daemon.says(rf"ERROR +paused for [\d.]+ s: {reason}\n")
    home.grafx.clear_faults()
    daemon.says(f"{task_id} delivered")
    daemon.stop()
    begin, _, end = lines(daemon)[2:5]
    assert re.fullmatch(rf"WARNING paused: {reason}; retrying in [\d.]+ s", begin)
    assert re.fullmatch(r"INFO +resumed after [\d.]+ s", end)


def test_a_pipe_that_nobody_reads_holds_up_neither_deliveries_nor_the_stop(home: Home) -> None:
    """What does not fit into the queue is dropped; what is logged once somebody reads again is there."""
    tasks = [home.grafx.add() for _ in range(60)]  # with -v several lines each
    home.wait_for(*tasks)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    short = "queue = poller.queue.Queue; poller.queue.Queue = lambda size: queue(min(size, 20))"
    command = home.command("-v", before=f"{QUICK}; {short}")
    process = subprocess.Popen(command, env=home.environment(), cwd=home.folder, stderr=write)
    text = b""

    def logged(what: str) -> bool:
        nonlocal text
        while select.select([read], [], [], 0.1)[0]:
            text += os.read(read, 65536)
        return what.encode() in text

    eventually(lambda: not home.waiting())
    eventually(lambda: logged(" delivered to "))
    assert text.count(b" delivered to ") < len(tasks)  # it was really full
    home.wait_for(last := home.grafx.add())
    eventually(lambda: logged(f"{last} delivered to "))
    home.wait_for(*(home.grafx.add() for _ in range(60)))
    eventually(lambda: not home.waiting())
    process.terminate()
    assert process.wait(PATIENCE) == 0
    os.close(read)
    os.close(write)


def test_closed_streams_are_no_reason_to_fail_and_nobody_takes_their_place(home: Home) -> None:
    home.wait_for(task_id := home.grafx.add())
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *home.command(before=QUICK)]
    process = subprocess.Popen(command, env=home.environment(), cwd=home.folder)
    eventually(lambda: home.files() == [f"{task_id}.png"] and not home.waiting())
    for fd in range(3):
        assert Path(f"/proc/{process.pid}/fd/{fd}").readlink() == Path(os.devnull)
    process.terminate()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("command", ["poller.py --check >/dev/full", "db.py list >/dev/full"])
def test_output_that_nobody_takes_is_one_line_and_no_traceback(home: Home, command: str) -> None:
    said = subprocess.run(
        ["sh", "-c", f"{sys.executable} {ROOT}/{command}"],
        env=home.environment(), stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert said.returncode == 1
    assert re.fullmatch(r".*No space left on device\n", said.stderr)


@pytest.mark.parametrize("pair", [os.pipe, lambda: [end.detach() for end in socket.socketpair()]])
def test_where_nobody_can_read_the_log_any_more_it_stops_in_order(
    home: Home, manager: Manager, pair: Callable[[], Any]
) -> None:
    """As after a stop of journald: a service manager starts it anew. Nothing has to be logged for that."""
    home.wait_for(home.grafx.add("never"))
    read, write = pair()
    env = home.environment(POLL_INTERVAL="3600", NOTIFY_SOCKET=manager.address)
    command = home.command(before=f"{QUICK}; poller.SHORTEST_PAUSE = 3600")
    process = subprocess.Popen(command, env=env, cwd=home.folder, stderr=write)
    os.close(write)
    manager.hears("^STATUS=1 rendering")
    os.read(read, 65536)  # a socket with something unread in it is closed in another way
    os.close(read)
    assert process.wait(PATIENCE) == 1
    assert manager.lines()[-1] == "STOPPING=1"
    assert [request.what for request in home.grafx.requests] == ["token", "task"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_before_there_is_a_token_ends_with_0(home: Home, how: int) -> None:
    home.wait_for(task_id := home.grafx.add())
    home.grafx.fault("token", "hang", times=None)
    daemon = home.start()
    eventually(lambda: home.grafx.requests)
    assert daemon.stop(how) == 0
    assert lines(daemon)[-1].endswith("stopped, 1 pending")
    assert list(home.waiting()) == [task_id]


def test_a_loop_that_breaks_ends_at_once_while_threads_hang_and_a_command_runs(home: Home) -> None:
    grafx = home.grafx
    grafx.fault("task", "hang", task_id="hangs", times=None)
    home.wait_for(grafx.add(), grafx.add(task_id="hangs"))
    report = "report(*given), 1 / (not poller.os.path.exists('break'))"
    breaks = f"report = poller.Status.report; poller.Status.report = lambda *given: ({report})"
    command = f"sh -c 'touch {home.folder}/runs; exec sleep 987'"
    daemon = home.start(before=f"{QUICK}; {breaks}", ON_DONE=command)
    eventually(lambda: (home.folder / "runs").exists() and grafx.asked("task", "hangs"))
    (runs,) = psutil.Process(daemon.process.pid).children()
    (home.folder / "break").touch()
    assert daemon.process.wait(PATIENCE) == 70  # not after the 987 s of the command
    assert "CRITICAL the poller crashed, please report it\nTraceback" in daemon.log()
    assert "ZeroDivisionError: division by zero\n" in daemon.log()
    runs.wait(PATIENCE)
