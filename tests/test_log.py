"""The log: few lines, retry warnings once a minute; streams that are closed, full or not read; the end."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Manager, Running, eventually

CLOSED = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]


def lines(running: Running, *without: str) -> list[str]:
    """What it logged, without stamps and without the lines that have one of these words."""
    said = [re.sub(r"^\S+ \S+ ", "", line) for line in running.log().splitlines()]
    return [line for line in said if not any(word in line for word in without)]


# --- how much is logged ----------------------------------------------------------------------


def test_an_order_that_ends_well_is_two_lines(home: Home) -> None:
    """And two at the start, and one at the stop."""
    home.wait_for("no-such-task")
    daemon = home.start(before=QUICK)
    daemon.says("no-such-task rejected")
    eventually(lambda: home.read().get("failing"))  # so it is not being written
    few = [home.grafx.add(after=1) for _ in range(5)]
    home.wait_for("no-such-task", *few, projectID="p-1")
    for task_id in few:
        daemon.says(f"{task_id} delivered")
    eventually(lambda: list(home.waiting()) == ["no-such-task"])
    many = [home.grafx.add() for _ in range(6)]
    home.wait_for("no-such-task", *many)
    eventually(lambda: list(home.waiting()) == ["no-such-task"])
    home.wait_for()
    daemon.says("removed from the file")
    assert daemon.stop() == 0
    first, counts, rejected, *between, gone, last = lines(daemon)
    place = f"{home.database}, {home.grafx.base_url}, environment {home.grafx.environment}"
    assert re.fullmatch(rf"INFO +GraFx order poller [\d-]+: {place}, files to {home.orders}", first)
    assert re.fullmatch("INFO +1 pending, 0 rejected, 0 failed, 0 delivered", counts)
    until = r"retrying until \d\d:\d\d:\d\d or later"
    assert re.search(rf"no-such-task rejected by GraFx: Not Found: .* was not found; {until}$", rejected)
    for task_id in few:
        added, delivered = (line for line in between if task_id in line)
        assert added.endswith(f"{task_id} added (project p-1)")
        assert re.search(
            rf"{task_id} delivered to orders/{task_id}\.png \([\d.]+ kB, [\d.]+ s after it was added\)$",
            delivered,
        )
    assert [line.split("  ")[-1].strip() for line in between if "orders" in line.split()] == [
        "6 orders added"
    ]
    assert len(between) == 2 * 5 + 1 + 6
    assert gone.endswith("no-such-task removed from the file by somebody")
    assert last.endswith("stopped, 0 pending")


def test_a_rejected_order_is_said_to_fail_after_give_up_after(home: Home) -> None:
    home.wait_for(task_id := home.grafx.add("failed"))
    began = time.time()
    daemon = home.start(before=QUICK, GIVE_UP_AFTER="7200")
    until = daemon.says(rf"{task_id} rejected .*; retrying until (\d\d:\d\d:\d\d), then it fails\n")[1]
    assert until in {time.strftime("%H:%M:%S", time.localtime(began + 7200 + more)) for more in range(120)}


def test_once_ends_with_one_line(home: Home) -> None:
    """What ends has a line each; of the three that are rejected one stands for all."""
    add = home.grafx.add
    tasks = [add() for _ in range(5)] + [add("never") for _ in range(90)] + [add("expired"), add("expired")]
    home.wait_for(*tasks, *(f"no-such-task-{n}" for n in range(3)))
    ended = home.run("--once")
    assert ended.process.returncode == 1
    logged = lines(ended)
    assert logged[-1].endswith("polled 100 orders: 5 delivered, 90 rendering, 3 rejected, 2 failed")
    assert len(logged) == 2 + 5 + 1 + 2 + 1


@pytest.mark.parametrize("name", ["BASEURL", "TOKEN_URL"])
def test_once_in_an_outage_counts_what_was_polled_and_what_was_not(home: Home, name: str) -> None:
    home.wait_for(*(home.grafx.add() for _ in range(20)))
    ended = home.run("--once", CONCURRENCY="4", **{name: "http://127.0.0.1:1"})
    assert ended.process.returncode == 1
    polled = re.search(r"polled (\d+) orders?(: \1 retrying)?\n", ended.log())
    rest = re.search(r"(\d+) orders not polled; the next run polls them\n", ended.log())
    assert polled and rest and int(polled[1]) + int(rest[1]) == 20, ended.log()
    assert len(home.waiting()) == 20


def test_a_warning_of_one_kind_is_logged_once_a_minute_and_told_to_everybody(home: Home) -> None:
    """Here downloads are on a host that is unreachable; others go on, and it is no error."""
    stuck = [home.grafx.add(link="http://127.0.0.1:1/file") for _ in range(30)]
    home.wait_for(*stuck, other := home.grafx.add())
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 2; poller.ALARM = 0.5")
    reason = r"the download server is unreachable \(Connection refused, 127.0.0.1\)"
    warning = rf"WARNING \S+ cannot be polled: {reason}; retrying in [\d.]+ s"
    daemon.says(rf"{warning} \(and \d+ more like it since the last one\)\n")
    eventually(lambda: re.search(f"the poller says: 30 orders: {reason}\n", home.db("list").stdout))
    daemon.says(f"{other} delivered")
    daemon.stop()
    assert len(re.findall(rf"{warning}\n", daemon.log())) == 1
    assert "ERROR" not in daemon.log()


def test_an_outage_has_its_begin_and_its_end_in_the_log_and_becomes_an_error(home: Home) -> None:
    """People alert on `journalctl -p err`."""
    home.wait_for(task_id := home.grafx.add())
    home.grafx.fault("token", "status-503", times=None)
    (log := home.folder / "log-0").touch()
    journal = f"{log.stat().st_dev}:{log.stat().st_ino}"
    daemon = home.start(before=f"{QUICK}; poller.ALARM = 1", JOURNAL_STREAM=journal)
    reason = r"no token: \S+ answered 503 Service Unavailable"
    daemon.says(rf"<3>paused for [\d.]+ s: {reason}\n")
    home.grafx.clear_faults()
    daemon.says(f"{task_id} delivered")
    daemon.stop()
    begin, error, end, delivered, _ = daemon.log().splitlines()[2:]
    assert re.fullmatch(rf"<4>paused: {reason}; retrying in [\d.]+ s", begin)
    assert error.startswith("<3>")
    assert re.fullmatch(r"<6>resumed after [\d.]+ s", end)
    assert delivered.startswith(f"<6>{task_id} delivered")


# --- streams ---------------------------------------------------------------------------------


def test_a_pipe_that_nobody_reads_holds_up_neither_deliveries_nor_the_stop(home: Home) -> None:
    """What does not fit into the queue is dropped; what is logged once somebody reads again is there."""
    tasks = [home.grafx.add() for _ in range(60)]  # with -v several lines each
    home.wait_for(*tasks)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    short = "queue = poller.queue.Queue; poller.queue.Queue = lambda size: queue(min(size, 20))"
    command = home.command("-v", before=f"{QUICK}; {short}")
    process = subprocess.Popen(command, env=home.environment(), stderr=write)
    try:
        eventually(lambda: not home.waiting(), patience=90)
        text, last = b"", ""

        def logged(what: bytes) -> bool:
            nonlocal text
            while select.select([read], [], [], 0.1)[0]:
                text += os.read(read, 65536)
            return what in text

        eventually(lambda: logged(b" delivered to "))
        assert text.count(b" delivered to ") < len(tasks)  # it was really full
        home.wait_for(last := home.grafx.add())
        eventually(lambda: logged(f"{last} delivered to ".encode()))
        home.wait_for(*(home.grafx.add() for _ in range(60)))
        eventually(lambda: not home.waiting(), patience=90)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert not logged(b"Traceback")
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)


def test_closed_streams_are_no_reason_to_fail_and_nobody_takes_their_place(home: Home) -> None:
    home.wait_for(task_id := home.grafx.add())
    process = subprocess.Popen([*CLOSED, *home.command(before=QUICK)], env=home.environment())
    try:
        eventually(lambda: home.files() == [f"{task_id}.png"] and not home.waiting())
        for fd in range(3):
            assert Path(f"/proc/{process.pid}/fd/{fd}").readlink() == Path(os.devnull)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    added = subprocess.run([*CLOSED, sys.executable, ROOT / "db.py", "add", "new"], env=home.environment())
    assert added.returncode == 0
    assert list(home.waiting()) == ["new"]


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("poller.py --check", ""), ("db.py list", ""), ("db.py list", "1"), ("db.py list | true", "")],
)
def test_output_that_nobody_takes_is_no_traceback(home: Home, command: str, unbuffered: str) -> None:
    home.wait_for(home.grafx.add())
    said = subprocess.run(
        ["sh", "-c", f"{sys.executable} {ROOT}/{command}" + " >/dev/full" * ("|" not in command)],
        env=home.environment(PYTHONUNBUFFERED=unbuffered), stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert "|" in command or said.returncode == 1
    assert len(said.stderr.splitlines()) == ("|" not in command)
    assert "|" in command or said.stderr.endswith("No space left on device\n")


def socket_pair() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@pytest.mark.parametrize("pair", [os.pipe, socket_pair])
def test_where_nobody_can_read_the_log_any_more_it_stops_in_order(
    home: Home, manager: Manager, pair: Callable[[], tuple[int, int]]
) -> None:
    """As after a stop of journald: a service manager starts it anew. Nothing has to be logged for that."""
    home.wait_for(home.grafx.add("never"))
    read, write = pair()
    env = home.environment(POLL_INTERVAL="3600", NOTIFY_SOCKET=manager.address)
    process = subprocess.Popen(home.command(before="poller.SHORTEST_PAUSE = 3600"), env=env, stderr=write)
    os.close(write)
    try:
        manager.hears("^STATUS=1 rendering")
        os.close(read)
        assert process.wait(PATIENCE) == 1
        assert manager.lines()[-1] == "STOPPING=1"
        assert [request.what for request in home.grafx.requests] == ["token", "task"]
    finally:
        process.kill()
        process.wait()


# --- the first moments, and the last ---------------------------------------------------------


def test_a_stop_while_it_still_imports_is_quiet(app: Path) -> None:
    """The signal itself ends it: before `main`, there is nothing that could handle it."""
    # Many short pauses: a signal just before a long one would be noticed after it.
    slow = "import time; print('slow', flush=True); [time.sleep(0.01) for _ in range(6000)]"
    (app / "argparse.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, app / "poller.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout and process.stdout.readline() == b"slow\n"
        process.terminate()
        assert process.communicate(timeout=PATIENCE) == (b"", b"")
        assert process.returncode == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_it_reads_its_settings_ends_with_0(home: Home, how: int) -> None:
    """In the first second: the secret's file is a pipe, and nobody writes to it."""
    secret = home.folder / "secret"
    os.mkfifo(secret)
    daemon = home.start(SERVER_SECRET="", SERVER_SECRET_FILE=str(secret))

    def opened() -> int:
        with suppress(OSError):  # as long as the poller has not opened it
            return os.open(secret, os.O_WRONLY | os.O_NONBLOCK)
        return 0

    pipe = eventually(opened)
    try:
        assert daemon.stop(how) == 0
    finally:
        os.close(pipe)
    assert daemon.log() == ""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_before_there_is_a_token_ends_with_0(home: Home, how: int) -> None:
    home.wait_for(task_id := home.grafx.add())
    home.grafx.fault("token", "hang", times=None)
    daemon = home.start()
    eventually(lambda: home.grafx.requests)
    assert daemon.stop(how) == 0
    assert lines(daemon)[-1].endswith("stopped, 1 pending")
    assert list(home.waiting()) == [task_id]


def test_a_loop_that_breaks_ends_at_once_while_threads_hang_and_a_command_runs(home: Home, app: Path) -> None:
    done = home.grafx.add()
    home.grafx.fault("task", "hang", task_id="hangs", times=None)
    home.wait_for(done, home.grafx.add(task_id="hangs"))
    code = (app / "poller.py").read_text()
    turn = "            self.status.report(self)\n"
    assert code.count(turn) == 1
    (app / "poller.py").write_text(
        code.replace(turn, turn + "            1 / (not os.path.exists('break'))\n")
    )
    env = home.environment(ON_DONE="sh -c 'touch runs; exec sleep 987'")
    daemon = Running(home, [sys.executable, str(app / "poller.py")], env)
    home.pollers.append(daemon)
    eventually((home.folder / "runs").exists)
    eventually(lambda: [request for request in home.grafx.requests if request.task_id == "hangs"])
    command = psutil.Process(daemon.process.pid).children()
    assert len(command) == 1
    try:
        (home.folder / "break").touch()
        assert daemon.process.wait(PATIENCE) == 70  # not after the 987 s of the command
        assert "CRITICAL the poller crashed, please report it\nTraceback" in daemon.log()
        assert daemon.log().rstrip().endswith("ZeroDivisionError: division by zero")
        psutil.wait_procs(command, PATIENCE)
        assert not command[0].is_running()
    finally:
        for process in command:
            with suppress(psutil.NoSuchProcess):
                process.kill()
