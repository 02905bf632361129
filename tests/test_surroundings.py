"""What surrounds the poller: environment, locks, watchers, hung and odd disks, limits, other servers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import QUICK, ROOT, Home, Loopback, Running, eventually, find_program
from sandbox import Sandbox

import db


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


def test_check_says_where_each_setting_is_from(app: Path, home: Home) -> None:
    lines = {**home.env, "ENVIRONMENT": "cp-file", "SERVER_SECRET": "of-the-file"}
    (app / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    env = {"PATH": os.environ["PATH"], "ENVIRONMENT": "production", "SERVER_SECRET": "of-the-environment"}
    command = [sys.executable, str(app / "poller.py"), "--check"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout
    outer = "SERVER_SECRET (.env has another one), ENVIRONMENT (production, not cp-file)"
    assert f"from the environment: {outer}; from .env: SERVER_ID, BASEURL" in said
    assert "of-the" not in said


def test_names_that_the_locale_cannot_encode_reach_the_hook(home: Home) -> None:
    home.wait_for(task := home.grafx.add(), projectID="订单")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = hook(home, f'printf "%s %s" "$PROJECT_ID" "$1" >{home.folder}/out')
    done = home.run("--once", ON_DONE=command, ORDERS_DIR=str(home.folder / "渲染"), **plain)
    assert done.process.returncode == 0, done.log()
    assert (home.folder / "out").read_text("utf-8") == f"订单 {home.folder}/渲染/{task}.png"


# --- signals, a watcher, the hook ------------------------------------------------------------


def test_signals_that_a_parent_ignores_stay_ignored(home: Home) -> None:
    """As nohup has it."""
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    home.wait_for()
    poller = start(home, sys.executable, "-c", ignore)
    poller.says("0 pending")
    for number in (signal.SIGHUP, signal.SIGINT):
        poller.process.send_signal(number)
    db.add_order(task := home.grafx.add(), path=home.database)
    poller.says(f"{task} delivered")
    assert poller.stop() == 0


def test_a_file_that_is_taken_before_its_hook_fails_its_order_at_once(home: Home) -> None:
    """By a watcher, which would otherwise take each new download as well."""
    home.wait_for(task := home.grafx.add())
    # The watcher sees the new name when the folder is opened for its fsync, which is just before the hook.
    (taken := home.folder / "taken").mkdir()
    file = home.orders / f"{task}.png"
    watch = (
        f"sys.addaudithook(lambda what, about: what == 'open' and str(about[0]) == {str(home.orders)!r} "
        f"and db.os.path.exists({str(file)!r}) and db.os.rename({str(file)!r}, {str(taken / 'it')!r}))"
    )
    home.start(before=f"{QUICK}; {watch}", ON_DONE=hook(home, ""))
    eventually(lambda: home.failed())
    assert home.failed()[task]["error"] == "its file was taken out of orders before ON_DONE could run"
    assert (taken / "it").read_bytes() == home.grafx.body(task)
    assert (len(home.grafx.asked("download")), noted(home)) == (1, [])


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
    command = hook(home, f"exec yes '{'many words ' * 9}'")
    poller = home.start(before=f"{QUICK}; poller.OUTPUT = 100_000", ON_DONE=command, ON_DONE_TIMEOUT="1")
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
    ended_at = poller.says(f"{task} ON_DONE took longer than 1 s(: .+)?; retrying in").start()
    poller.stop()
    assert poller.log()[:ended_at].count("ON_DONE: ") < 10
    eventually(lambda: all(map(ended, noted(home))))


# --- locks -----------------------------------------------------------------------------------


def test_a_lock_file_that_was_removed_is_made_anew(home: Home) -> None:
    """But where somebody else has taken the lock meanwhile, it stops."""
    home.wait_for(home.grafx.add("never"))
    first = home.start(before=QUICK)
    first.says("1 pending")
    place, other = db.beside(home.database, "pid"), home.folder / "other"
    for lock in (place, home.orders / ".poller.pid"):
        lock.unlink()
        eventually(lock.exists)
    second = home.run()
    assert second.process.returncode == 1
    assert re.search(rf"already running \(process {first.process.pid} ", second.log())
    with other.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other.rename(place)
        assert first.process.wait(30) == 1
    assert re.search("already running[^~]*stopped, 1 pending", first.log())


# --- disks and networks ----------------------------------------------------------------------


def test_a_poll_that_moves_nothing_is_said_and_is_an_error_in_the_end(home: Home) -> None:
    """Nothing is said of an order whose ON_DONE runs for longer than that."""
    grafx, task, stuck, fine = home.grafx, home.grafx.add(), home.grafx.add(), home.grafx.add(questions=2)
    grafx.fault("task", "hang", task_id=stuck, times=None)
    home.wait_for(task)
    command = hook(home, f"while [ $TASK_ID = {task} ] && ! [ -e {home.folder}/go ]; do sleep 0.1; done")
    poller = home.start(before=f"{QUICK}; poller.STALLED, poller.ALARM = 0.5, 1", ON_DONE=command)
    eventually(lambda: noted(home))
    before = len(poller.log())
    home.wait_for(task, stuck, fine)
    since = "has been waiting for its disk or network since \\d\\d:\\d\\d"
    poller.says(f"WARNING {stuck} {since}")
    eventually(lambda: "has been waiting for its disk" in home.db("list").stdout)
    poller.says(f"ERROR   {stuck} {since}")
    (home.folder / "go").touch()
    poller.says(f"{task} delivered")
    poller.says(f"{fine} delivered")
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


def test_an_error_of_the_disk_makes_all_wait_though_a_small_file_can_be_written(home: Home) -> None:
    home.wait_for(task := home.grafx.add())
    strace = find_program("strace", "strace", "a disk that has an error")
    place, fault = str(home.orders / f".{task}.part"), "inject=fsync:error=EIO:when=1"
    poller = start(home, strace, "-D", "-f", "-qq", "-o", os.devnull, "-P", place, "-e", fault)
    wrong = f"cannot write to {home.orders}: Input/output error"
    poller.says(rf"paused: {wrong}\. Check its disk; retrying in [\d.]+ s\n")
    poller.says(f"{task} delivered")


def test_the_next_outage_is_not_the_one_whose_only_order_was_removed(home: Home) -> None:
    poller = home.start(before=f"{QUICK}; poller.ALARM = 0.5")
    poller.says("0 pending")
    home.orders.rename(home.folder / "away")
    for number in (1, 2):
        home.wait_for(home.grafx.add(), renders := home.grafx.add("never"))
        eventually(lambda number=number: poller.log().count("WARNING paused: cannot write to ") == number)
        eventually(lambda renders=renders: len(home.grafx.asked("task", renders)) > 3)
        home.wait_for()
        time.sleep(1.0)  # longer than ALARM
    assert "resumed" not in poller.log()  # a 204 says nothing about the disk


def test_a_connection_is_not_used_for_ever(home: Home) -> None:
    """Or a server would go on answering after GraFx has moved to another address."""
    home.wait_for(home.grafx.add("never"))
    home.start(before=f"{QUICK}; chili.FRESH = 0.2", POLL_INTERVAL="0.1")
    eventually(lambda: len({request.peer for request in home.grafx.asked("task")}) > 2)


def test_a_certificate_of_a_private_authority_is_told_how_to_trust(home: Home, tls: Sandbox) -> None:
    home.wait_for(tls.add())
    home.env.update(tls.settings(home.folder))
    poller = home.start(before=QUICK)
    poller.says("paused: .*certificate.* set REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt")


def test_skip_worktree_keeps_the_orders_from_git(tmp_path: Path) -> None:
    """The README's command, in a clone in which database.json is tracked."""
    program = find_program("git", "git", "what keeps orders from git")
    command = re.search(r"^    git (.*--skip-worktree.*?) *#", (ROOT / "README.md").read_text(), re.M)
    assert command

    def git(line: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        words = [program, *who, *line.split()]
        return subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init -q")
    shutil.copy(ROOT / "database.json", tmp_path)
    (tmp_path / "code").write_text("1")
    git("add .")
    git("commit -qm code")
    git(command[1])
    db.add_order("a", path=tmp_path / "database.json")
    (tmp_path / "code").write_text("2")
    for line in ("stash", "reset -q --hard", "checkout -qf HEAD"):
        git(line)
    assert list(json.loads((tmp_path / "database.json").read_text())["orders"]) == ["a"]
    assert git("status --porcelain --untracked-files=no") == ""


def test_a_proxy_that_wants_a_password_says_so(home: Home, wire: Callable[..., Loopback]) -> None:
    proxy = wire(lambda line, _: b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
    home.wait_for(home.grafx.add())
    secret = proxy.url.replace("//", "//me:pa55word@")
    poller = home.start(before=QUICK, BASEURL="https://grafx.example", TOKEN_URL="https://login.example/t",
                        HTTPS_PROXY=secret)  # fmt: skip
    poller.says("paused: .*the proxy 127.0.0.1:\\d+ requires a user name and a password")
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
