"""The log: few lines, retry warnings once a minute; streams that are closed, full or not read; the end."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Running, eventually
from test_settings import run

CLOSED = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]


def lines(running: Running, *without: str) -> list[str]:
    """What it logged, without stamps and without the lines that have one of these words."""
    said = [re.sub(r"^\S+ \S+ ", "", line) for line in running.log().splitlines()]
    return [line for line in said if not any(word in line for word in without)]


# --- how much is logged ----------------------------------------------------------------------


def test_an_order_that_ends_well_is_two_lines(home: Home) -> None:
    """And one at the start, and one at the stop."""
    home.wait_for("no-such-task")
    daemon = home.start(before=QUICK)
    daemon.says("no-such-task rejected")
    few = [home.grafx.add(after=1) for _ in range(5)]
    home.wait_for("no-such-task", *few, projectID="p-1")
    for task_id in few:
        daemon.says(f"{task_id} delivered")
    many = [home.grafx.add() for _ in range(6)]
    home.wait_for("no-such-task", *many)
    eventually(lambda: list(home.waiting()) == ["no-such-task"])
    home.wait_for()
    daemon.says("removed from the file")
    assert daemon.stop() == 0
    first, rejected, *between, gone, last = lines(daemon)
    assert re.fullmatch(
        rf"INFO +GraFx order poller [\d-]+: {home.database}, {home.grafx.base_url}:"
        " 1 pending, 0 failing, 0 failed, 0 delivered",
        first,
    )
    until = r"retrying until \d\d:\d\d:\d\d, then it fails"
    assert re.search(
        rf"no-such-task rejected by GraFx: Not Found: .* \(project not given\); {until}$", rejected
    )
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
    home.wait_for("no-such-task")
    began = time.time()
    daemon = home.start(before=QUICK, GIVE_UP_AFTER="7200")
    until = daemon.says(r"no-such-task rejected .*; retrying until (\d\d:\d\d:\d\d), then it fails\n")[1]
    times = {time.strftime("%H:%M:%S", time.localtime(began + 7200 + more)) for more in range(120)}
    assert until in times


def test_once_ends_with_one_line(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(5)] + [grafx.add("never") for _ in range(790)]
    home.wait_for(
        *tasks, *(f"no-such-task-{n}" for n in range(3)), grafx.add("expired"), grafx.add("expired")
    )
    ended = home.run("--once")
    assert ended.process.returncode == 1
    logged = lines(ended)
    assert logged[-1].endswith("polled 800 orders: 5 delivered, 790 rendering, 3 rejected, 2 failed")
    assert len(logged) == 1 + 5 + 1 + 2 + 1  # of the three that are rejected one stands for all


def test_once_in_an_outage_counts_what_was_polled_and_what_was_not(home: Home) -> None:
    home.wait_for(*(home.grafx.add() for _ in range(20)))
    ended = home.run("--once", BASEURL="http://127.0.0.1:1", CONCURRENCY="4")
    polled = re.search(r"polled (\d+) orders?: \1 retrying\n", ended.log())
    rest = re.search(r"(\d+) orders not polled; the next run polls them\n", ended.log())
    assert polled and rest and int(polled[1]) + int(rest[1]) == 20, ended.log()


def test_rejections_by_the_hundred_are_one_line_and_a_count(home: Home) -> None:
    home.wait_for(*(f"no-such-task-{n}" for n in range(200)))
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 2")
    eventually(lambda: len(home.read().get("failing", {})) == 200)
    time.sleep(2)  # the next one of this kind is logged again
    home.wait_for(*home.waiting(), "no-such-task-200")
    daemon.says(r"no-such-task-200 rejected .* \(and \d+ more like it since the last one\)\n")
    home.wait_for()
    daemon.says(r"\d+ orders removed from the file by somebody")
    daemon.stop()
    rejected = re.findall(r" rejected by GraFx: (?:.*\(and (\d+) more like it)?", daemon.log())
    assert len(rejected) + sum(int(more or 0) for more in rejected) == 201
    assert len(rejected) < 20
    assert len(lines(daemon, "rejected")) == 4  # first, added, removed, stopped


def test_hundreds_of_orders_that_meet_three_errors_by_turns(home: Home) -> None:
    tasks = [home.grafx.add(task_id=f"task-{n}") for n in range(500)]
    for n, task_id in enumerate(tasks):
        for turn in range(3):
            home.grafx.fault("task", f"status-{(502, 503, 504)[(n + turn) % 3]}", task_id=task_id)
    home.wait_for(*tasks)
    # The rate limit that follows a 503 is not what this is about.
    daemon = home.start(before=f"{QUICK}; chili.Pace.LONGEST = 0.001")
    eventually(lambda: not home.waiting(), patience=120)
    daemon.stop()
    logged = lines(daemon, " delivered to ")
    for status in (502, 503, 504):
        assert re.search(
            rf"WARNING task-\d+ cannot be polled: GraFx answered {status} .*; retrying in ", daemon.log()
        )
    warnings = [line for line in logged if "cannot be polled" in line]
    minutes = 1 + 120 / 60
    assert len(warnings) <= 3 * minutes, logged
    assert len(logged) - len(warnings) == 2  # first, stopped


def test_an_on_done_that_fails_for_a_hundred_files(home: Home) -> None:
    home.wait_for(*(home.grafx.add() for _ in range(100)))
    failing = "sh -c '[ -e go ] || { echo jammed; echo out of paper; exit 3; }'"
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 5", ON_DONE=failing)
    daemon.says(
        r" ON_DONE ended with 3: out of paper; retrying in .* \(and \d\d+ more like it since the last one\)\n"
    )
    (home.folder / "go").touch()
    eventually(lambda: not home.waiting(), patience=60)
    daemon.stop()
    failures = re.findall(r" ON_DONE ended with 3: (?:.*\(and (\d+) more like it)?", daemon.log())
    assert sum(int(more or 0) for more in failures) > 5 * len(failures)
    assert len(re.findall(" ON_DONE: jammed", daemon.log())) <= len(failures) + 1
    assert daemon.log().count(" delivered to ") == 100  # what ends is always logged


def test_what_fails_has_a_line_each(home: Home) -> None:
    """These are the lines that somebody looks for, so nothing holds them back."""
    tasks = [f"no-such-task-{n}" for n in range(20)]
    home.wait_for(*tasks, projectID="p-1")
    daemon = home.start(before=QUICK, GIVE_UP_AFTER="0.5")
    eventually(lambda: len(home.failed()) == 20)
    daemon.stop()
    failed = re.findall(
        r"ERROR +(\S+) failed \(project p-1\): Not Found: Task (\S+) was not found", daemon.log()
    )
    assert sorted(failed) == sorted((task_id, task_id) for task_id in tasks)
    assert daemon.log().count("rejected by GraFx") == 1


def test_an_order_that_cannot_be_polled_is_logged_once_a_minute_and_told_to_everybody(home: Home) -> None:
    """Here its download is on a host that is unreachable; others go on."""
    stuck = home.grafx.add(link="http://127.0.0.1:1/file")
    home.wait_for(stuck, other := home.grafx.add())
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 2")
    reason = "the download server is unreachable: 127.0.0.1: Connection refused"
    warning = rf"{stuck} cannot be polled: {reason}; retrying in \d\.\d s"
    more = int(daemon.says(rf"{warning} \(and (\d+) more like it since the last one\)\n")[1])
    assert more >= 1
    assert f"the poller says: 1 order: {reason}\n" in home.db("list").stdout
    assert f"{other} delivered" in daemon.log()
    daemon.stop()
    assert len(re.findall(rf"{warning}\n", daemon.log())) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_when_all_have_been_paused_for_ten_minutes_it_is_an_error(home: Home, shared: bool) -> None:
    """People alert on `journalctl -p err`. One order that cannot be polled is none."""
    home.wait_for(home.grafx.add() if shared else home.grafx.add(link="http://127.0.0.1:1/file"))
    log = home.folder / "log-0"
    log.touch()
    stat = log.stat()  # as if it were the journal
    env = {"BASEURL": "http://127.0.0.1:1"} if shared else {}
    daemon = home.start(
        before=f"{QUICK}; poller.ALARM = 1", JOURNAL_STREAM=f"{stat.st_dev}:{stat.st_ino}", **env
    )
    reason = "GraFx is unreachable: 127.0.0.1: Connection refused"
    if shared:
        daemon.says(rf"(?m)^<4>paused: {reason}; retrying in \d\.\d s\n")
        daemon.says(rf"(?m)^<3>paused for \d+\.\d s: {reason}\n")
    else:
        daemon.says("(?m)^<4>.* cannot be polled: ")
    time.sleep(2)
    daemon.stop()
    assert daemon.log().count("<3>") == shared
    assert daemon.log().count("<4>") == 1


def test_an_outage_has_its_begin_and_its_end_in_the_log(home: Home) -> None:
    home.wait_for(task_id := home.grafx.add())
    home.grafx.fault("token", "status-503", times=None)
    daemon = home.start(before=QUICK)
    daemon.says(r"WARNING paused: no token: .* answered 503 .*; retrying in \d\.\d s\n")
    time.sleep(1)
    home.grafx.clear_faults()
    daemon.says(f"{task_id} delivered")
    daemon.stop()
    begin, end, delivered, _ = lines(daemon)[1:]
    assert "paused: " in begin
    assert re.search(r"INFO +resumed after \d+\.\d s$", end)
    assert f"{task_id} delivered" in delivered


# --- streams ---------------------------------------------------------------------------------


def test_a_pipe_that_nobody_reads_holds_up_neither_deliveries_nor_the_stop(home: Home) -> None:
    """What does not fit into the queue is dropped; what is logged once somebody reads again is there."""
    tasks = [home.grafx.add() for _ in range(300)]  # with -v several lines each
    home.wait_for(*tasks)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    short = "queue = poller.queue.Queue; poller.queue.Queue = lambda size: queue(min(size, 200))"
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
        home.wait_for(*(home.grafx.add() for _ in range(300)))
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


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["poller.py --check", "db.py list", "db.py list | true"])
def test_output_that_nobody_takes_is_no_traceback(home: Home, command: str, unbuffered: str) -> None:
    home.wait_for(home.grafx.add())
    said = subprocess.run(
        ["sh", "-c", f"{sys.executable} {ROOT}/{command}" + " >/dev/full" * ("|" not in command)],
        env=home.environment(PYTHONUNBUFFERED=unbuffered), stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert "|" in command or said.returncode == 1
    assert len(said.stderr.splitlines()) == ("|" not in command)
    assert "|" in command or said.stderr.endswith("No space left on device\n")


# --- the first moments, and the last ---------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_it_still_imports_is_quiet(app: Path, how: int) -> None:
    """The signal itself ends it: before `main`, there is nothing that could handle it."""
    # Many short pauses: a signal just before a long one would be noticed after it.
    slow = "import time; print('slow', flush=True); [time.sleep(0.01) for _ in range(6000)]"
    (app / "argparse.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, app / "poller.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"slow\n"
    process.send_signal(how)
    assert process.communicate(timeout=PATIENCE) == (b"", b"")
    assert process.returncode == -how


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
    assert daemon.stop(how) == 0
    os.close(pipe)
    assert daemon.log() == ""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_before_there_is_a_token_ends_with_0(home: Home, how: int) -> None:
    home.wait_for(task_id := home.grafx.add())
    home.grafx.fault("token", "hang", times=None)
    daemon = home.start()
    eventually(lambda: home.grafx.requests)
    assert daemon.stop(how) == 0
    assert lines(daemon)[-1].endswith("stopped, 1 pending")
    assert list(home.waiting()) == [task_id]


def test_a_fault_of_its_own_is_logged_once_and_the_order_stays_pending(home: Home) -> None:
    broken, fine = home.grafx.add(), home.grafx.add()
    home.wait_for(broken, fine)
    odd = (
        "Odd2 = type('Odd2', (Exception,), {}); real = chili.order_done; "
        "chili.order_done = lambda task, *more: "
        f"(_ for _ in ()).throw(Odd2()) if task == '{broken}' else real(task, *more)"
    )
    daemon = home.start(before=f"{QUICK}; {odd}")
    eventually(lambda: list(home.waiting()) == [broken])
    time.sleep(1)
    daemon.stop()
    assert daemon.log().count(f"{broken} unexpected error, please report it\nTraceback") == 1
    assert daemon.log().count(f"{broken} cannot be polled: unexpected Odd2; retrying in") == 1
    assert list(home.waiting()) == [broken]


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
    (home.folder / "break").touch()
    assert daemon.process.wait(PATIENCE) == 70  # not after the 987 s of the command
    assert "CRITICAL the poller crashed, please report it\nTraceback" in daemon.log()
    assert daemon.log().rstrip().endswith("ZeroDivisionError: division by zero")
    psutil.wait_procs(command, PATIENCE)
    assert not command[0].is_running()


# --- settings --------------------------------------------------------------------------------


def test_where_nothing_is_set_one_line_says_how_to_begin(app: Path) -> None:
    said = run(app, "poller.py")
    assert said.returncode == 78
    assert said.stderr.count("\n") == 1
    assert said.stderr.endswith(f"in {app}, cp .env.example .env, and fill in its four lines\n")
    (app / ".env").write_text("SERVER_ID=a\nSERVER_SECRET=b\nENVIRONMENT=c\n")
    said = run(app, "poller.py")
    assert (
        f"BASEURL is missing: put https://ENVIRONMENT.chili-publish.online into {app}/.env or the"
        in said.stderr
    )


def test_an_empty_variable_counts_as_none_also_over_env(app: Path) -> None:
    (app / ".env").write_text("DATABASE=mine.json\nPOLL_INTERVAL=often\nSERVER_ID=a\n")
    assert run(app, "db.py", "add", "new", DATABASE="").stdout == f"new is pending now, in {app}/mine.json\n"
    said = run(app, "poller.py", "--check", SERVER_ID="", POLL_INTERVAL="")
    assert "SERVER_ID" not in said.stderr
    assert "POLL_INTERVAL is 'often'" in said.stderr


@pytest.mark.parametrize(
    ("name", "command"), [("ORDERS_DIR", ["--check"]), ("ORDERS_DIR", []), ("DATABASE", [])]
)
def test_a_missing_folder_is_to_be_made(home: Home, name: str, command: Iterable[str]) -> None:
    ended = home.run(*command, **{name: str(home.folder / "none" / "here")})
    assert ended.process.returncode == 1
    assert "No such file or directory. Make the folder.\n" in ended.log()
