"""What surrounds the poller: environment, locks, watchers, hung and odd disks, limits, other servers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest
from conftest import QUICK, ROOT, Home, Loopback, Running, eventually, find_program
from sandbox import Sandbox
from test_crash import refuse

import db


def downloads(home: Home) -> Counter[str | None]:
    return Counter(request.task_id for request in home.grafx.requests if request.what == "download")


def start(home: Home, *before: str, **env: str) -> Running:
    """The poller, started by another command."""
    running = Running(home, [*before, *home.command(before=QUICK)], home.environment(**env))
    home.pollers.append(running)
    return running


def hook(home: Home, code: str) -> str:
    """A command for ON_DONE: it notes its process, then does this."""
    place = home.folder / "hook"
    place.write_text(f"#!/bin/sh\necho $$ >>{home.folder}/runs\n{code}\n")
    place.chmod(0o755)
    return str(place)


def noted(home: Home, name: str = "runs") -> list[int]:
    file = home.folder / name
    return list(map(int, file.read_text().split())) if file.exists() else []


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- settings from the environment -----------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("SERVER_SECRET", '"s3cr3t-word"'), ("ENVIRONMENT", "cp-\tabc")])
def test_quotes_around_a_value_and_control_characters_are_an_error(home: Home, name: str, value: str) -> None:
    done = home.run("--once", **{name: value})
    assert done.process.returncode == 78
    assert f"{name} has quotes around it, or a control character in it. Remove them" in done.log()
    assert "s3cr3t-word" not in done.log()


def test_blanks_around_a_value_and_quotes_in_a_command_are_fine(home: Home) -> None:
    home.wait_for(task := home.grafx.add())
    done = home.run("--once", ORDERS_DIR=f" {home.orders}\r", ON_DONE='"/bin/sh" -c "exit 0"')
    assert done.process.returncode == 0, done.log()
    assert home.files() == [f"{task}.png"]
    for value in (home.database, home.env["BASEURL"], home.env["ENVIRONMENT"], home.orders):
        assert str(value) in done.log().splitlines()[0]


def test_db_py_refuses_a_database_in_quotes(home: Home) -> None:
    home.env["DATABASE"] = f"'{home.database}'"
    done = home.db("add", "a")
    assert done.returncode == 1
    assert "DATABASE has quotes around it" in done.stderr


def test_check_says_where_each_setting_is_from(app: Path, home: Home) -> None:
    lines = {**home.env, "ENVIRONMENT": "cp-file", "SERVER_SECRET": "of-the-file"}
    (app / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    env = {"PATH": os.environ["PATH"], "ENVIRONMENT": "production", "SERVER_SECRET": "of-the-environment"}
    command = [sys.executable, str(app / "poller.py"), "--check"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout
    assert (
        "from the environment: SERVER_SECRET (.env has another one), ENVIRONMENT (production, not cp-file);"
        in said
    )
    assert "from .env: SERVER_ID, BASEURL" in said
    assert "of-the" not in said


# --- signals, a watcher, the hook ------------------------------------------------------------


def test_signals_that_a_parent_ignores_stay_ignored(home: Home) -> None:
    """As nohup has it. SIGCHLD is none of them, or each command would seem to end with 0."""
    ignore = "import os, signal, sys\nfor name in ('HUP', 'INT', 'CHLD'):\n    "
    ignore += (
        "signal.signal(getattr(signal, f'SIG{name}'), signal.SIG_IGN)\nos.execv(sys.argv[1], sys.argv[1:])"
    )
    first, second = home.grafx.add(), home.grafx.add()
    home.wait_for(first)
    command = hook(home, f"[ $TASK_ID = {second} ]")
    poller = start(home, sys.executable, "-c", ignore, ON_DONE=command)
    poller.says(f"{first} ON_DONE ended with 1; retrying in")
    for number in (signal.SIGHUP, signal.SIGINT):
        poller.process.send_signal(number)
    db.add_order(second, path=home.database)
    poller.says(f"{second} delivered")
    assert poller.stop() == 0
    assert list(home.waiting()) == [first]


def test_a_file_that_is_taken_before_its_hook_fails_its_order_at_once(home: Home) -> None:
    """By a watcher, which would otherwise take each new download as well."""
    tasks = [home.grafx.add() for _ in range(3)]
    home.wait_for(*tasks)
    # The folder's fsync takes a while, so there is time between the rename and the hook.
    start(home, *refuse("fsync", "delay_exit=2000000", home.orders), ON_DONE="true")
    taken = home.folder / "taken"
    taken.mkdir()

    def watch() -> bool:
        for file in home.orders.glob("*.png"):
            file.rename(taken / file.name)
        return len(home.failed()) == 3

    eventually(watch)
    assert downloads(home) == Counter(tasks)
    for task in tasks:
        assert home.failed()[task]["error"] == "its file was taken out of orders before ON_DONE could run"
    assert len(list(taken.iterdir())) == 3


def test_neither_timeout_nor_stop_leaves_a_process_group_of_the_hooks_own(home: Home) -> None:
    home.wait_for(home.grafx.add())
    code = f"timeout 600 sleep 600 & echo $! >>{home.folder}/parts; wait"  # timeout(1) makes a group
    poller = home.start(before=QUICK, ON_DONE=hook(home, code), ON_DONE_TIMEOUT="1")
    eventually(lambda: noted(home, "parts"), "a part runs")
    poller.says("took longer than 1 s")
    eventually(lambda: ended(noted(home, "parts")[0]))
    eventually(lambda: any(not ended(pid) for pid in noted(home, "parts")), "it is retried")
    assert poller.stop() == 0
    eventually(lambda: all(map(ended, noted(home, "parts") + noted(home))))


def test_a_hook_whose_output_never_ends_fills_neither_disk_nor_log(home: Home) -> None:
    home.wait_for(task := home.grafx.add())
    words = "\n".join(f"word {letter}" for letter in "abcdefghijklmnop")
    code = f"exec yes '{words}'"
    poller = home.start(
        before=f"{QUICK}; poller.OUTPUT = 100_000", ON_DONE=hook(home, code), ON_DONE_TIMEOUT="2"
    )
    largest = Counter[int]()

    def truncated() -> bool:
        for pid in noted(home):
            with contextlib.suppress(OSError):
                size = Path(f"/proc/{pid}/fd/1").stat().st_size
                if size < largest[pid]:
                    return True
                largest[pid] = size
        return False

    eventually(truncated)  # and it goes on
    poller.says(f"{task} ON_DONE took longer than 2 s(: .+)?; retrying in")
    poller.stop()
    assert poller.log().split("took longer")[0].count("ON_DONE: ") < 10
    eventually(lambda: all(map(ended, noted(home))))


def test_hundreds_of_inherited_files_are_no_trouble_for_a_hook(home: Home) -> None:
    """select() cannot bear a number above 1,023; and what has begun to run may not be forgotten."""
    home.wait_for(task := home.grafx.add())
    many = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (4096,) * 2); "
        "[os.set_inheritable(os.open('/dev/null', 0), True) for _ in range(1100)]; "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    poller = start(home, sys.executable, "-c", many, ON_DONE=hook(home, ""))
    poller.says(f"{task} delivered")
    assert len(noted(home)) == 1


def test_a_hook_of_which_nobody_can_say_whether_it_has_ended_may_have_run(home: Home) -> None:
    """So it is ended, and retried with a pause."""
    home.wait_for(task := home.grafx.add())
    env = {"ON_DONE": hook(home, f"[ -e {home.folder}/go ] || sleep 600"), "ON_DONE_TIMEOUT": "1"}
    poller = start(home, *refuse("waitid", "error=EIO:when=9"), CONCURRENCY="1", **env)
    poller.says(f"{task} ON_DONE was not seen to end well: .*Input/output error; retrying in")
    (home.folder / "go").touch()
    poller.says(f"{task} delivered")
    assert all(map(ended, noted(home)))


def test_names_that_the_locale_cannot_encode_reach_the_hook(home: Home) -> None:
    home.wait_for(task := home.grafx.add(), projectID="订单")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = hook(home, f'printf "%s %s" "$PROJECT_ID" "$1" >{home.folder}/out')
    done = home.run("--once", ON_DONE=command, ORDERS_DIR=str(home.folder / "渲染"), **plain)
    assert done.process.returncode == 0, done.log()
    assert (home.folder / "out").read_text("utf-8") == f"订单 {home.folder}/渲染/{task}.png"


# --- locks -----------------------------------------------------------------------------------


def test_a_lock_file_that_was_removed_is_made_anew(home: Home) -> None:
    home.wait_for(home.grafx.add("never"))
    first = home.start(before=QUICK)
    first.says("1 pending")
    places = [db.beside(home.database, "pid"), home.orders / ".poller.pid"]
    for place in places:
        place.unlink()
    eventually(lambda: all(place.exists() for place in places))
    second = home.run()
    assert second.process.returncode == 1
    assert f"already running, as process {first.process.pid}" in second.log()
    assert first.stop() == 0


def test_where_somebody_else_has_taken_the_lock_meanwhile_it_stops(home: Home) -> None:
    home.wait_for(home.grafx.add("never"))
    place = db.beside(home.database, "pid")
    first = home.start(before="db.LOOK = 1.0")
    first.says("1 pending")
    with (home.folder / "other").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        (home.folder / "other").rename(place)
        assert first.process.wait(30) == 1
    first.says("already running")
    assert "stopped, 1 pending" in first.log()


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path: Path) -> None:
    path, order = tmp_path / "database.json", list[str]()
    first = db.hold(path, "lock", 0)

    def wait() -> None:
        with db.hold(path, "lock", 30):
            order.append("the one that waited")

    waits = threading.Thread(target=wait)
    waits.start()
    # It has the file open, and waits for its lock.
    opened = db.beside(path, "lock").stat().st_ino
    eventually(lambda: sum(os.fstat(int(fd.name)).st_ino == opened for fd in open_files()) == 2)
    db.beside(path, "lock").unlink()
    second = db.hold(path, "lock", 0)
    first.close()
    eventually(lambda: sum(os.fstat(int(fd.name)).st_ino == opened for fd in open_files()) == 0)
    order.append("the second")
    second.close()
    waits.join(30)
    assert order == ["the second", "the one that waited"]


def open_files() -> Iterator[Path]:
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            os.fstat(int(fd.name))
            yield fd


# --- disks -----------------------------------------------------------------------------------


def test_a_poll_that_moves_nothing_is_said_and_is_an_error_in_the_end(home: Home) -> None:
    task, fine = home.grafx.add(), home.grafx.add(after=1)
    home.grafx.fault("task", "hang", task_id=task, times=None)
    home.wait_for(task, fine)
    poller = home.start(before=f"{QUICK}; poller.STALLED, poller.ALARM = 0.5, 1.5")
    poller.says(f"WARNING {task} has been waiting for its disk or network since \\d\\d:\\d\\d")
    eventually(lambda: "has been waiting for its disk" in home.db("list").stdout)
    poller.says(f"ERROR   {task} has been waiting for its disk or network since \\d\\d:\\d\\d")
    eventually(lambda: home.files() == [f"{fine}.png"])


def test_a_disk_that_hangs_is_said(home: Home) -> None:
    home.wait_for(task := home.grafx.add())
    slow = refuse("fsync", "delay_enter=20000000", home.orders / f".{task}.part")
    poller = Running(home, [*slow, *home.command(before=f"{QUICK}; poller.STALLED = 1")], home.environment())
    home.pollers.append(poller)
    poller.says(f"WARNING {task} has been waiting for its disk or network")
    tracer = Path(f"/proc/{poller.process.pid}/status").read_text().partition("TracerPid:")[2].split()[0]
    os.kill(int(tracer), signal.SIGKILL)  # until then nobody can end the poller


def test_a_hook_that_takes_long_is_no_hung_disk(home: Home) -> None:
    task, stuck = home.grafx.add(), home.grafx.add()
    home.wait_for(task)
    command = hook(home, f"while ! test -e {home.folder}/go; do sleep 0.1; done")
    poller = home.start(before=f"{QUICK}; poller.STALLED = 0.5", ON_DONE=command)
    eventually(lambda: noted(home))
    before = len(poller.log())
    home.grafx.fault("task", "hang", task_id=stuck, times=None)
    home.wait_for(task, stuck)
    poller.says(f"{stuck} has been waiting")  # and so has the hook, for longer
    (home.folder / "go").touch()
    poller.says(f"{task} delivered")
    assert f"{task} has been waiting" not in poller.log()[before:]


def test_a_name_that_cannot_be_written_holds_up_its_own_order_alone(home: Home) -> None:
    stuck, fine = home.grafx.add(), home.grafx.add(questions=2)
    (home.orders / f".{stuck}.part").mkdir()
    home.wait_for(stuck, fine)
    poller = home.start(before=QUICK)
    poller.says(f"{fine} delivered")
    poller.says(f"{stuck} cannot be polled: cannot write to .*: Is a directory")
    (home.orders / f".{stuck}.part").rmdir()
    poller.says(f"{stuck} delivered")
    assert "paused" not in poller.log()


@pytest.mark.parametrize("error", ["EIO", "EDQUOT"])
def test_an_error_of_the_disk_makes_all_wait_though_a_small_file_can_be_written(
    home: Home, error: str
) -> None:
    home.wait_for(task := home.grafx.add())
    broken = refuse("fsync", f"error={error}:when=1", home.orders / f".{task}.part")
    poller = start(home, *broken)
    poller.says(f"paused: cannot write to {home.orders}: ")
    poller.says(f"{task} delivered")


# --- time, connections -----------------------------------------------------------------------


def test_what_was_noted_before_a_night_off_is_not_enough_to_fail(home: Home) -> None:
    """GraFx may be ill just at the start: this process has to see it for a while, too."""
    task = home.grafx.add("failed")
    since = datetime.now(timezone.utc) - timedelta(hours=9)
    record = {"status": 500, "error": "no", "since": db.stamp(since), "times": 50}
    home.write({"orders": {task: {}}, "failing": {task: record}, "failed": {}})
    home.start(before=QUICK)
    eventually(lambda: sum(request.what == "task" for request in home.grafx.requests) > 8)
    assert (list(home.waiting()), home.failed()) == ([task], {})
    assert home.read()["failing"][task]["since"] == record["since"]


def test_a_connection_is_not_used_for_ever(home: Home) -> None:
    """Or a server would go on answering after GraFx has moved to another address."""
    home.wait_for(home.grafx.add("never"))
    home.start(before=f"{QUICK}; chili.FRESH = 0.5", POLL_INTERVAL="0.1")
    eventually(lambda: len({request.peer for request in home.grafx.requests if request.what == "task"}) > 3)


# --- words -----------------------------------------------------------------------------------


def test_a_certificate_of_a_private_authority_is_told_how_to_trust(home: Home, tls: Sandbox) -> None:
    home.wait_for(tls.add())
    home.env.update(tls.settings(home.folder))
    poller = home.start(before=QUICK)
    poller.says("paused: .*certificate.* set REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt")


def test_a_proxy_that_wants_a_password_says_so(home: Home, wire: Callable[..., Loopback]) -> None:
    proxy = wire(lambda line, _: b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
    home.wait_for(home.grafx.add())
    secret = proxy.url.replace("//", "//me:pa55word@")
    poller = home.start(before=QUICK, BASEURL="https://grafx.example", TOKEN_URL="https://login.example/t",
                        HTTPS_PROXY=secret)  # fmt: skip
    poller.says("paused: .*the proxy 127.0.0.1:\\d+ wants a user and a password")
    assert "pa55word" not in poller.log()


def test_too_few_threads_at_the_start_are_one_line(home: Home) -> None:
    """Each would have a stack that is larger than all memory that the process may have."""
    home.wait_for()
    limit = ["sh", "-c", 'ulimit -v 40000000; ulimit -s 80000000; exec "$0" "$@"']
    done = subprocess.run(
        [*limit, *home.command()], env=home.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "can't start new thread. Raise the limit" in done.stderr
    assert "Traceback" not in done.stderr


# --- git -------------------------------------------------------------------------------------


def test_skip_worktree_keeps_the_orders_from_git(tmp_path: Path) -> None:
    """The README's command, in a clone in which database.json is tracked."""
    program = find_program("git", "git", "what keeps orders from git")
    (command,) = [
        line.split("#")[0].split()
        for line in (ROOT / "README.md").read_text().splitlines()
        if "--skip-worktree" in line and line.startswith("    git")
    ]

    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run(
            [program, *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    shutil.copy(ROOT / "database.json", tmp_path)
    (tmp_path / "code").write_text("1")
    git("add", ".")
    git("commit", "-qm", "code")
    git(*command[1:])
    db.add_order("a", path=tmp_path / "database.json")
    (tmp_path / "code").write_text("2")
    git("stash")
    git("reset", "-q", "--hard")
    git("checkout", "-qf", "HEAD")
    assert list(json.loads((tmp_path / "database.json").read_text())["orders"]) == ["a"]
    assert git("status", "--porcelain", "--untracked-files=no") == ""
