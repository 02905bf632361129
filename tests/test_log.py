"""The log: few lines, each trouble once for all; streams that are closed, full or not read; the end."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Running, eventually
from test_settings import run

CLOSED = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]


def lines(running: Running, *without: str) -> list[str]:
    """What it said, without stamps and without the lines that have one of these words."""
    said = [re.sub(r"^\S+ \S+ ", "", line) for line in running.log().splitlines()]
    return [line for line in said if not any(word in line for word in without)]


# --- how much is said ------------------------------------------------------------------------


def test_a_day_of_an_order_that_ends_well_is_two_lines(home: Home) -> None:
    """And one at the start, and one at the stop."""
    home.wait_for("no-such-task")
    daemon = home.start(before=QUICK)
    daemon.says("no-such-task refused")
    few = [home.grafx.add(after=1) for _ in range(5)]
    home.wait_for("no-such-task", *few, projectID="p-1")
    for task_id in few:
        daemon.says(f"{task_id} delivered")
    many = [home.grafx.add() for _ in range(6)]
    home.wait_for("no-such-task", *many)
    eventually(lambda: list(home.waiting()) == ["no-such-task"])
    home.wait_for()
    daemon.says("taken out")
    assert daemon.stop() == 0
    first, refused, *between, gone, last = lines(daemon)
    assert re.fullmatch(
        rf"INFO +GraFx order poller [\d-]+: {home.database}, {home.grafx.base_url}:"
        " 1 waiting, 0 failing, 0 failed, 0 delivered",
        first,
    )
    until = r"asked until \d\d:\d\d:\d\d, then it has failed"
    assert re.search(rf"refused: Not Found: .* \(project not given; {until}\)$", refused)
    for task_id in few:
        came, delivered = (line for line in between if task_id in line)
        assert came.endswith(f"{task_id} came in, project p-1")
        assert re.search(rf"{task_id} delivered: png, [\d.]+ kB, [\d.]+ s after it was ordered$", delivered)
    assert [line.split("  ")[-1].strip() for line in between if "orders" in line] == ["6 orders came in"]
    assert len(between) == 2 * 5 + 1 + 6
    assert "no-such-task taken out of the file by somebody" in gone
    assert re.search("stopped, 0 waiting", last)


def test_once_ends_with_one_line(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(5)] + [grafx.add("never") for _ in range(790)]
    home.wait_for(
        *tasks, *(f"no-such-task-{n}" for n in range(3)), grafx.add("expired"), grafx.add("expired")
    )
    ended = home.run("--once")
    assert ended.process.returncode == 1
    said = lines(ended)
    assert said[-1].endswith("asked about 800: 5 delivered, 790 rendering, 3 failing, 2 failed")
    assert len(said) == 1 + 5 + 1 + 2 + 1  # of the three that are refused one speaks for all


def test_once_counts_those_that_met_what_all_wait_for(home: Home) -> None:
    home.wait_for(*(home.grafx.add() for _ in range(20)))
    ended = home.run("--once", BASEURL="http://127.0.0.1:1", CONCURRENCY="4")
    asked, rest = (
        re.search(what, ended.log()) for what in (r"asked about (\d+): \1 stuck", r"(\d+) orders were")
    )
    assert asked and rest and int(asked[1]) + int(rest[1]) == 20, ended.log()


def test_refused_by_the_hundred(home: Home) -> None:
    home.wait_for(*(f"no-such-task-{n}" for n in range(200)))
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 2")
    daemon.says(r"still after [\d.]+ s \(199 more met it\): .* and 197 more refused: Not Found")
    home.wait_for()
    daemon.says(r"\d+ orders taken out")
    daemon.stop()
    assert len(lines(daemon)) <= 6


def test_hundreds_that_meet_three_troubles_by_turns(home: Home) -> None:
    tasks = [home.grafx.add(task_id=f"task-{n}") for n in range(500)]
    for n, task_id in enumerate(tasks):
        for turn in range(3):
            home.grafx.fault("task", f"status-{(502, 503, 504)[(n + turn) % 3]}", task_id=task_id)
    home.wait_for(*tasks)
    # The pause that a 503 asks for is not what this is about.
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 3; chili.Pace.LONGEST = 0.001")
    eventually(lambda: not home.waiting(), patience=90)
    daemon.stop()
    said = lines(daemon, " delivered: ")
    assert len(said) <= 25, said
    for status in (502, 503, 504):
        assert len(re.findall(rf"WARNING task-\d+ waits: GraFx answered {status}", daemon.log())) >= 1


def test_an_on_done_that_fails_for_a_hundred_files(home: Home) -> None:
    home.wait_for(*(home.grafx.add() for _ in range(100)))
    failing = "sh -c '[ -e go ] || { echo out of paper; exit 3; }'"
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 2", ON_DONE=failing)
    daemon.says(
        r"still after .* \(99 more met it\): .* and 97 more waits: ON_DONE ended with 3, it said: out of p"
    )
    (home.folder / "go").touch()
    eventually(lambda: not home.waiting(), patience=60)
    daemon.stop()
    assert len(lines(daemon, " delivered: ", "ON_DONE says")) <= 10
    assert len(lines(daemon)) - len(lines(daemon, "ON_DONE says")) <= 8  # those that began together


def test_what_has_failed_is_over_for_nobody_and_no_id_is_anothers(home: Home) -> None:
    home.wait_for(*(f"no-such-task-{n}" for n in range(3)))
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 0.5", GIVE_UP_AFTER="2")
    eventually(lambda: len(home.failed()) == 3)
    daemon.stop()
    assert "over: " not in daemon.log()
    assert re.search(r"still after .* no-such-task-2 refused: Not Found: Task # was not found", daemon.log())


def test_an_order_that_is_stuck_is_told_again_and_to_everybody(home: Home) -> None:
    """Here its download is on a host that is unreachable; others go on."""
    stuck = home.grafx.add(link="http://127.0.0.1:1/file")
    home.wait_for(stuck, home.grafx.add())
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 1")
    reason = "the download's server is unreachable: 127.0.0.1: Connection refused"
    daemon.says(rf"still after 4\.\d s: {stuck} waits: {reason}")
    assert f"the poller said last: 1 stuck: {reason}\n" in home.db("list").stdout
    daemon.stop()
    times = [float(text) for text in re.findall(r"still after ([\d.]+) s", daemon.log())]
    assert len(times) == 2  # after 1 and 4; the next would be after 16
    assert times[1] >= 4 * times[0] - 0.25  # as far as both can be rounded


def test_when_all_have_waited_for_ten_minutes_it_is_an_error(home: Home) -> None:
    home.wait_for(home.grafx.add())
    log = home.folder / "log-0"
    log.touch()
    stat = log.stat()  # as if it were the journal
    daemon = home.start(
        before=f"{QUICK}; poller.ALARM = 1", BASEURL="http://127.0.0.1:1",
        JOURNAL_STREAM=f"{stat.st_dev}:{stat.st_ino}",
    )  # fmt: skip
    daemon.says(
        "(?m)^<3>all orders have waited for 1.0 s: GraFx is unreachable: 127.0.0.1: Connection refused$"
    )
    time.sleep(2)
    daemon.stop()
    assert daemon.log().count("<3>") == 1
    assert daemon.log().count("<4>") == 1


# --- streams ---------------------------------------------------------------------------------


def test_a_pipe_that_nobody_reads_holds_up_neither_deliveries_nor_the_stop(home: Home) -> None:
    tasks = [home.grafx.add() for _ in range(600)]  # with -v several lines each
    home.wait_for(*tasks)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(home.command("-v", before=QUICK), env=home.environment(), stderr=write)
    try:
        eventually(lambda: not home.waiting(), patience=60)
        home.wait_for(last := home.grafx.add())
        eventually(lambda: not home.waiting())
        said = b""
        while last.encode() + b" delivered" not in said and b" were dropped" not in said:
            said += os.read(read, 65536)
        assert re.search(rb"WARNING (\d+) lines of the log were dropped, since nobody read them", said)
        home.wait_for(*(home.grafx.add() for _ in range(300)))
        eventually(lambda: not home.waiting(), patience=60)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 10
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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_it_still_imports_is_quiet(app: Path, how: int) -> None:
    # Many short pauses: a signal just before a long one would be heard after it.
    slow = "import time; print('slow', flush=True); [time.sleep(0.01) for _ in range(6000)]"
    (app / "argparse.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, app / "poller.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"slow\n"
    process.send_signal(how)
    assert process.communicate(timeout=PATIENCE) == (b"", b"")
    assert process.returncode == 0


def test_a_fault_of_its_own_is_told_once_and_the_order_waits(home: Home) -> None:
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
    assert daemon.log().count("unexpected error, please report it") == 1
    assert list(home.waiting()) == [broken]


def test_a_loop_that_breaks_ends_at_once_while_threads_hang_and_a_command_runs(home: Home, app: Path) -> None:
    done = home.grafx.add()
    home.grafx.fault("task", "hang", task_id="hangs", times=None)
    home.wait_for(done, home.grafx.add(task_id="hangs"))
    code = (app / "poller.py").read_text()
    turn = "            self.telling.tell(self)\n"
    assert code.count(turn) == 1
    (app / "poller.py").write_text(
        code.replace(turn, turn + "            1 / (not os.path.exists('break'))\n")
    )
    env = home.environment(ON_DONE="sh -c 'echo it runs; exec sleep 987'")
    daemon = Running(home, [sys.executable, str(app / "poller.py")], env)
    home.pollers.append(daemon)
    daemon.says("ON_DONE says: it runs")
    eventually(lambda: [request for request in home.grafx.requests if request.task_id == "hangs"])
    command = psutil.Process(daemon.process.pid).children()
    assert len(command) == 1
    (home.folder / "break").touch()
    assert daemon.process.wait(10) == 70
    assert "CRITICAL the poller is broken and ends, please report it\nTraceback" in daemon.log()
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
    assert run(app, "db.py", "add", "new", DATABASE="").stdout == f"new waits now, in {app}/mine.json\n"
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
