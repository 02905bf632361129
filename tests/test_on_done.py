"""ON_DONE: a command for each file that was downloaded, run at least once."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Running, eventually, find_program
from sandbox import Sandbox

SECRETS = ("SERVER_ID", "SERVER_SECRET", "SERVER_SECRET_FILE", "FRONT_ID", "FRONT_SECRET")
SAY_ENVIRONMENT = "import json, os, sys; json.dump(dict(os.environ), open(os.environ['OUT'], 'w'))"
# Waits until a test lets it go on; the sleep is its child.
WAIT = 'until [ -e "$FOLDER/go" ]; do sleep 0.05; done\n'
# A child, and a grandchild that ignores SIGTERM; both keep the output open. Their pids are noted.
FAMILY = """
sh -c 'trap "" TERM; echo $$ >>"$FOLDER/pids"; sh -c "echo \\$\\$ >>\\$FOLDER/pids; exec sleep 600" & wait' &
sleep 600 & echo $! >>"$FOLDER/pids"
until [ "$(wc -l <"$FOLDER/pids")" = 3 ]; do sleep 0.02; done
echo $$ >>"$FOLDER/pids"
"""


class Desk:
    """Where ON_DONE's commands of one test are, and what they leave."""

    def __init__(self, home: Home) -> None:
        self.home, self.grafx = home, home.grafx
        self.place = home.folder / "command"
        self.starts = home.folder / "starts"  # a line for each call: when, and for which order
        home.env |= {"FOLDER": str(home.folder), "ON_DONE": shlex.quote(str(self.place))}

    def command(self, text: str) -> None:
        """Make `text` the command, a script for sh; each call leaves a line in `starts`."""
        temp = self.home.folder / "new-command"
        temp.write_text(f'#!/bin/sh\necho "$(date +%s.%N) $TASK_ID" >>"$FOLDER/starts"\n{text}\n')
        temp.chmod(0o755)
        temp.replace(self.place)

    def order(self, **options: object) -> str:
        """One finished order, pending in database.json."""
        task_id = self.grafx.add(**options)  # type: ignore[arg-type]
        self.home.wait_for(task_id, projectID="p1")
        return task_id

    def go(self) -> None:
        (self.home.folder / "go").touch()

    def calls(self, task_id: str = "") -> list[float]:
        lines = self.starts.read_text().splitlines() if self.starts.exists() else []
        return [float(line.split()[0]) for line in lines if line.endswith(task_id)]

    def called(self, times: int = 1, task_id: str = "") -> None:
        eventually(lambda: len(self.calls(task_id)) >= times, f"{times} calls")

    def downloads(self, task_id: str) -> int:
        return sum(
            request.what == "download" and request.task_id == task_id for request in self.grafx.requests
        )

    def alive(self) -> list[int]:
        """Those of the noted processes that have not ended."""
        note = self.home.folder / "pids"
        return [pid for pid in map(int, note.read_text().split()) if is_alive(pid)] if note.exists() else []


class Listener:
    """The socket on which systemd is told how it stands."""

    def __init__(self) -> None:
        self.address = tempfile.mktemp(prefix="grafx-notify-")  # short, as a socket's has to be
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.setblocking(False)
        self.found: list[str] = []

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        Path(self.address).unlink()

    def forget(self) -> None:
        self.statuses()
        self.found.clear()

    def statuses(self) -> list[str]:
        """All that came since `forget`."""
        with suppress(BlockingIOError):
            while True:
                said = self.socket.recv(65536).decode()
                self.found += [line for line in said.split("\n") if line.startswith("STATUS=")]
        return self.found


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def desk(home: Home) -> Iterator[Desk]:
    desk = Desk(home)
    yield desk
    desk.go()
    for pid in desk.alive():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- how it is called ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("'a b' $HOME ; * {} x{}y{} '' \"{ }\"", ["a b", "$HOME", ";", "*", "FILE", "xFILEyFILE", "", "{ }"]),
        ("-d office", ["-d", "office", "FILE"]),
    ],
    ids=["replaced", "appended"],
)
def test_it_is_called_without_a_shell(desk: Desk, given: str, wanted: list[str]) -> None:
    home = desk.home
    folder = home.folder / 'it\'s {} "here" $HOME'
    desk.command('printf "%s\\n" "$@" >"$FOLDER/words"')
    task_id = desk.order()
    ended = home.run("--once", ON_DONE=f"{desk.place} {given}", ORDERS_DIR=str(folder))
    assert ended.process.returncode == 0
    file = str(folder / f"{task_id}.png")
    words = (home.folder / "words").read_text().split("\n")[:-1]
    assert words == [word.replace("FILE", file) for word in wanted]
    assert home.waiting() == {}


def said_environment(out: Path) -> dict[str, str]:
    said: dict[str, str] = json.loads(out.read_text())
    return said


@pytest.mark.parametrize("secret", ["SERVER_SECRET", "SERVER_SECRET_FILE"])
def test_its_environment_is_the_pollers_without_the_secrets(desk: Desk, secret: str) -> None:
    home, out = desk.home, desk.home.folder / "environment"
    secret_file = home.folder / "secret"
    secret_file.write_text(home.grafx.client_secret)
    env = {"FRONT_ID": "front-id", "FRONT_SECRET": "front-secret", "OUT": str(out), "OWN": "a b"}
    if secret == "SERVER_SECRET_FILE":
        env |= {"SERVER_SECRET": "", secret: str(secret_file)}
    env["ON_DONE"] = shlex.join([sys.executable, "-c", SAY_ENVIRONMENT])
    task_id = desk.order()
    assert home.run("--once", **env).process.returncode == 0
    wanted = {name: value for name, value in home.environment(**env).items() if name not in SECRETS}
    wanted |= {"TASK_ID": task_id, "PROJECT_ID": "p1", "ORDER_FILE": str(home.orders / f"{task_id}.png")}
    said = said_environment(out)
    assert {**said, "LC_CTYPE": ""} == {**wanted, "LC_CTYPE": ""}  # Python may set that one by itself
    assert not [value for value in said.values() if home.grafx.client_secret in value]


def test_nothing_of_the_env_file_is_in_its_environment(app: Path, desk: Desk) -> None:
    home, out = desk.home, desk.home.folder / "environment"
    settings = {**home.grafx.settings(home.folder), "FRONT_ID": "front-id", "FRONT_SECRET": "front-secret"}
    settings["ON_DONE"] = shlex.join([sys.executable, "-c", SAY_ENVIRONMENT])
    (app / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    task_id = desk.order()
    env = {"PATH": os.environ["PATH"], "OUT": str(out)}
    command = [sys.executable, str(app / "poller.py"), "--once"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    env |= {"TASK_ID": task_id, "PROJECT_ID": "p1", "ORDER_FILE": str(home.orders / f"{task_id}.png")}
    assert {**said_environment(out), "LC_CTYPE": ""} == {**env, "LC_CTYPE": ""}


def test_its_input_is_empty(desk: Desk) -> None:
    desk.command('echo "read $(cat | wc -c) bytes"')
    task_id = desk.order()
    ended = subprocess.run(
        desk.home.command("--once"), env=desk.home.environment(), input="the poller's own", text=True,
        stderr=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    assert re.search(f"{task_id} ON_DONE: read +0 bytes", ended.stderr)


# --- at least once ---------------------------------------------------------------------------


def test_the_order_leaves_the_database_only_after_0(desk: Desk) -> None:
    home = desk.home
    desk.command(f"{WAIT}exit 3")
    task_id = desk.order(size=300_000)
    running = home.start(before=QUICK)
    desk.called()
    time.sleep(0.3)
    assert list(home.waiting()) == [task_id]  # while it runs
    desk.go()
    desk.called(3)
    assert list(home.waiting()) == [task_id]  # after it failed
    assert (home.orders / f"{task_id}.png").read_bytes() == home.grafx.body(task_id)
    assert not re.search(f"{task_id} delivered", running.log())
    desk.command("exit 0")
    running.says(f"{task_id} delivered")
    eventually(lambda: home.waiting() == {})
    assert desk.downloads(task_id) == 1
    calls = len(desk.calls())
    running.stop()
    assert len(desk.calls()) == calls
    assert len(re.findall("ON_DONE ended with 3", running.log())) == 1  # the others came within a minute
    assert "ON_DONE ended with 0" not in running.log()  # "delivered" says it


def test_it_is_retried_after_growing_pauses(desk: Desk) -> None:
    desk.command("exit 1")
    task_id = desk.order()
    desk.home.start(before=QUICK, POLL_INTERVAL="0.5")
    desk.called(5)
    calls = desk.calls()
    pauses = [later - earlier for earlier, later in itertools.pairwise(calls)]
    assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.4, 0.5), strict=False)), pauses
    assert desk.downloads(task_id) == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_it_is_retried_after_a_restart(desk: Desk, how: signal.Signals) -> None:
    home = desk.home
    desk.command(f'echo $$ >>"$FOLDER/pids"\n{WAIT}')
    task_id = desk.order()
    running = home.start(before=QUICK)
    desk.called()
    running.stop(how)
    assert list(home.waiting()) == [task_id]
    desk.command("exit 0")
    assert home.run("--once").process.returncode == 0
    assert (home.waiting(), len(desk.calls()), desk.downloads(task_id)) == ({}, 2, 1)


def test_once_ends_with_1_where_it_failed_and_the_next_goes_on(desk: Desk) -> None:
    home = desk.home
    desk.command("exit 1")
    task_id = desk.order()
    assert home.run("--once").process.returncode == 1
    assert (list(home.waiting()), len(desk.calls())) == ([task_id], 1)
    desk.command("exit 0")
    assert home.run("--once").process.returncode == 0
    assert (home.waiting(), len(desk.calls()), desk.downloads(task_id)) == ({}, 2, 1)


@pytest.mark.parametrize("what", ['rm "$ORDER_FILE"', 'mv "$ORDER_FILE" "$FOLDER/moved"'], ids=["rm", "mv"])
def test_it_may_move_or_delete_the_file(desk: Desk, what: str) -> None:
    home = desk.home
    desk.command(what)
    task_id = desk.order()
    ended = home.run("--once")
    assert ended.process.returncode == 0
    assert f"{task_id} delivered" in ended.log()
    assert not re.search("WARNING|ERROR|Traceback", ended.log())
    assert (home.waiting(), home.files(), len(desk.calls()), desk.downloads(task_id)) == ({}, [], 1, 1)
    if what.startswith("mv"):
        assert (home.folder / "moved").read_bytes() == home.grafx.body(task_id)


def test_where_it_moves_the_file_and_fails_the_file_is_downloaded_again(desk: Desk) -> None:
    home = desk.home
    desk.command('mv "$ORDER_FILE" "$FOLDER/moved"; [ -e "$FOLDER/go" ]')
    task_id = desk.order()
    running = home.start(before=QUICK)
    desk.called(2)
    desk.go()
    running.says(f"{task_id} delivered")
    assert "Traceback" not in running.log()
    assert desk.downloads(task_id) == len(desk.calls())


# --- what it prints, and how it ends ---------------------------------------------------------


def test_its_output_is_logged_after_its_end(desk: Desk) -> None:
    desk.command("echo one; echo two three >&2; printf 'no end'")
    task_id = desk.order()
    running = desk.home.run("--once")
    assert re.findall(f"INFO +{task_id} ON_DONE: (.*)\n", running.log()) == ["one", "two three", "no end"]
    assert running.log().index("ON_DONE: no end") < running.log().index(f"{task_id} delivered to")


def test_where_it_fails_the_last_line_is_the_reason(desk: Desk) -> None:
    desk.command("echo one; echo two three >&2; printf 'no end'; kill -9 $$")
    task_id = desk.order()
    running = desk.home.start(before=QUICK)
    running.says(
        rf"WARNING {task_id} ON_DONE was ended by signal 9 \(Killed\): no end; retrying in \d\.\d s\n"
    )
    assert re.findall(f"{task_id} ON_DONE: (.*)\n", running.log()) == ["one", "two three"]


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="there are no realtime signals here")
def test_every_signal_is_an_end(desk: Desk) -> None:
    """Realtime signals have no name in Python."""
    desk.command('[ -e "$FOLDER/go" ] || kill -40 $$')
    task_id = desk.order()
    running = desk.home.start(before=QUICK)
    running.says(rf"{task_id} ON_DONE was ended by signal 40 .*; retrying in")
    assert "Traceback" not in running.log()
    desk.go()
    running.says(f"{task_id} delivered")


@pytest.mark.parametrize(
    ("what", "last", "number"),
    [
        ("head -c 3000000 /dev/zero | tr '\\0' x", "x{500}", 1),
        ("head -c 300000 /dev/urandom; printf '\\0\\033[2J\\377'; echo; echo '<END>'", "<END>", None),
        ("seq 5000", "5000", 10),
    ],
    ids=["no newline", "binary", "many lines"],
)
def test_any_output_is_fine(desk: Desk, what: str, last: str, number: int | None) -> None:
    """Its last lines are logged, each fit for a log."""
    desk.command(what)
    task_id = desk.order()
    running = desk.home.start(before=QUICK)
    running.says(f"{task_id} delivered")
    running.stop()
    printed = re.findall(f"{task_id} ON_DONE: (.*)\n", running.log())
    assert re.fullmatch(last, printed[-1])
    assert len(printed) == (number or len(printed)) <= 10
    assert running.log().replace("\n", "").isprintable()
    assert max(map(len, running.log().split("\n"))) < 1000
    assert all(task_id in line for line in running.log().splitlines() if "ON_DONE" in line)
    assert "Traceback" not in running.log()


def test_after_much_output_its_last_line_is_the_reason(desk: Desk) -> None:
    """The file that keeps what it prints is truncated while the command runs, not after its end."""
    desk.command("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo '<END>'; exit 1")
    task_id = desk.order()
    running = desk.home.start(before=f"{QUICK}; poller.OUTPUT = 100_000")
    running.says(f"{task_id} ON_DONE ended with 1: <END>; retrying in")


def test_what_it_prints_fills_no_disk(desk: Desk) -> None:
    """A command that prints for ever, until its timeout: the file that keeps it is truncated."""
    home = desk.home
    desk.command('echo $$ >>"$FOLDER/pids"; exec yes "0123456789"')
    desk.order()
    poller = home.start(before=f"{QUICK}; poller.OUTPUT = 100_000")
    sizes: list[int] = []

    def size() -> int:
        """Of its standard output."""
        with suppress(FileNotFoundError):
            sizes.extend(Path(f"/proc/{pid}/fd/1").stat().st_size for pid in desk.alive())
        return len(sizes)

    eventually(lambda: size() and any(later < earlier for earlier, later in itertools.pairwise(sizes)))
    assert poller.process.poll() is None


def test_a_process_that_it_leaves_behind_does_not_hold_up_the_order(desk: Desk) -> None:
    """It keeps the output open, too."""
    home = desk.home
    desk.command(f'(echo behind; touch "$FOLDER/printed"; {WAIT.strip()}; sleep 600) &\n'
                 'echo $! >>"$FOLDER/pids"; until [ -e "$FOLDER/printed" ]; do sleep 0.02; done')  # fmt: skip
    task_id = desk.order()
    running = home.start(before=QUICK)
    running.says(f"{task_id} delivered")
    assert f"{task_id} ON_DONE: behind\n" in running.log()
    eventually(lambda: home.waiting() == {})
    assert desk.alive()  # it did its work, and may go on


def test_what_it_leaves_behind_costs_nothing(desk: Desk) -> None:
    """Neither a thread nor a descriptor, however many there are."""
    home = desk.home
    desk.command('sleep 600 & echo $! >>"$FOLDER/pids"')
    tasks = [desk.grafx.add() for _ in range(32)]
    home.wait_for(tasks[0])
    running = home.start(before=QUICK, CONCURRENCY="8")
    eventually(lambda: not home.waiting())
    process = psutil.Process(running.process.pid)
    threads, descriptors = process.num_threads(), process.num_fds()
    home.wait_for(*tasks[1:])
    eventually(lambda: not home.waiting())
    assert len(desk.alive()) == len(tasks)
    eventually(lambda: process.num_threads() <= threads + 8)  # those that poll
    eventually(lambda: process.num_fds() <= descriptors + 8)  # connections


@pytest.mark.parametrize("end", ["exit 1", "wait"], ids=["leaves it open", "takes too long"])
def test_words_without_the_end_of_a_line_are_logged_too(desk: Desk, end: str) -> None:
    """Of a command that asks for a password, they are all that it says."""
    desk.command(f"printf 'Password: '\nsleep 600 & echo $! >>\"$FOLDER/pids\"\n{end}")
    task_id = desk.order()
    running = desk.home.start(before=QUICK, ON_DONE_TIMEOUT="1")
    running.says(f"{task_id} ON_DONE (ended with 1|took longer than 1 s): Password:; retrying in")


def test_a_secret_that_it_prints_is_not_logged(desk: Desk) -> None:
    home, grafx = desk.home, desk.grafx
    desk.command(f'{WAIT}cat "$FOLDER/known"; exit 1')
    task_id = desk.order()
    running = home.start("-v", before=QUICK)
    desk.called()
    (home.folder / "known").write_text(
        f"the secret {grafx.client_secret}, the token {grafx.tokens[0]}, the end\n"
    )
    desk.go()
    running.says(f"{task_id} ON_DONE ended with 1: the secret .*, the token .*, the end; retrying in")
    listed = eventually(lambda: [text for text in [home.db("list").stdout] if "the end" in text])[0]
    running.stop()
    for text in (listed, running.log()):
        assert grafx.client_secret not in text
        assert grafx.tokens[0] not in text


# --- how long it may take, and what goes on beside it--------------------------------------------


def test_a_timeout_ends_it_with_all_that_it_started(desk: Desk) -> None:
    home = desk.home
    desk.command(f'[ -e "$FOLDER/go" ] && exit\n{FAMILY}echo begun\nwait')
    task_id = desk.order()
    running = home.start(before=QUICK, ON_DONE_TIMEOUT="1")
    desk.called()
    assert len(eventually(lambda: len(desk.alive()) == 4 and desk.alive())) == 4
    desk.go()
    running.says(f"{task_id} ON_DONE took longer than 1 s: begun; retrying in")
    eventually(lambda: not desk.alive(), "all ended")
    running.says(f"{task_id} delivered")
    assert desk.downloads(task_id) == 1


def test_it_is_one_of_concurrency_and_holds_up_nobody_else(desk: Desk) -> None:
    home, grafx = desk.home, desk.grafx
    desk.command(
        f'echo "+ $TASK_ID" >>"$FOLDER/log"\n[ "$PROJECT_ID" = stuck ] && {WAIT}echo - >>"$FOLDER/log"'
    )
    stuck, others = grafx.add(), [grafx.add() for _ in range(4)]
    home.write({"orders": {task_id: {"projectID": "stuck"} for task_id in [stuck]}})
    running = home.start(before=QUICK, CONCURRENCY="2")
    desk.called(1, stuck)
    home.write({"orders": {stuck: {"projectID": "stuck"}, **{task_id: {} for task_id in others}}})
    eventually(lambda: list(home.waiting()) == [stuck], "all others are delivered")
    assert f"{stuck} delivered" not in running.log()
    desk.go()
    running.says(f"{stuck} delivered")
    at_once, peak = 0, 0
    for line in (home.folder / "log").read_text().splitlines():
        at_once += 1 if line.startswith("+") else -1
        peak = max(peak, at_once)
    assert peak == 2


def test_with_a_concurrency_of_1_nothing_is_polled_meanwhile(desk: Desk) -> None:
    home, grafx = desk.home, desk.grafx
    desk.command(WAIT)
    first = desk.order()
    running = home.start(before=QUICK, CONCURRENCY="1")
    desk.called()
    second = grafx.add()
    home.wait_for(first, second)
    time.sleep(0.6)
    assert not [request for request in grafx.requests if request.task_id == second]
    desk.go()
    running.says(f"{second} delivered")


def test_while_it_runs_its_file_is_no_download(desk: Desk) -> None:
    home = desk.home
    desk.command(WAIT)
    desk.order(size=300_000)
    with Listener() as listener:
        home.start(before=QUICK, NOTIFY_SOCKET=listener.address)
        desk.called()
        listener.forget()
        eventually(lambda: len(listener.statuses()) > 2)
        assert "downloading" not in "".join(listener.found[1:])  # the first may have been on its way


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP], ids=lambda how: how.name)
@pytest.mark.parametrize("trap", ["", "touch $FOLDER/tidied; exit 1"], ids=["ignores SIGTERM", "tidies up"])
def test_a_stop_ends_it_with_all_that_it_started(desk: Desk, trap: str, how: int) -> None:
    home = desk.home
    desk.command(f"trap '{trap}' TERM\n{FAMILY}wait; wait; exit 1")
    task_id = desk.order()
    running = home.start(before=QUICK)
    eventually(lambda: len(desk.alive()) == 4)
    assert running.stop(how) == 0  # not after its 600 s
    eventually(lambda: not desk.alive(), "all ended")
    assert (home.folder / "tidied").exists() == bool(trap)  # SIGTERM comes before SIGKILL
    assert list(home.waiting()) == [task_id]
    assert home.files() == [f"{task_id}.png"]


def test_what_the_poller_ended_has_not_ended_with_0(desk: Desk) -> None:
    """Whatever its exit code: the next start runs it to its end."""
    home = desk.home
    desk.command(
        """trap 'echo "tidied up"; touch "$FOLDER/tidied"; exit 0' TERM\n"""
        '[ -e "$FOLDER/go" ] || { touch "$FOLDER/begun"; while :; do sleep 0.05; done; }\n'
        'echo "$TASK_ID" >>"$FOLDER/done"'
    )
    task_id = desk.order()
    running = home.start(before=QUICK)
    eventually((home.folder / "begun").exists)
    assert running.stop() == 0
    assert (home.folder / "tidied").exists()
    assert not re.search(f"{task_id} delivered", running.log())
    assert list(home.waiting()) == [task_id]
    desk.go()
    assert home.run("--once").process.returncode == 0
    assert (home.folder / "done").read_text() == f"{task_id}\n"
    assert (home.waiting(), len(desk.calls()), desk.downloads(task_id)) == ({}, 2, 1)


def test_a_closed_terminal_leaves_no_command_running_alone(desk: Desk) -> None:
    home = desk.home
    desk.command(f"{FAMILY}wait")
    task_id = desk.order()
    process, terminal = pty.fork()
    if not process:
        os.execve(sys.executable, home.command(before=QUICK), home.environment(TERM="xterm"))
    try:
        # It is read on, or the poller's log would fill the terminal.
        eventually(lambda: len(desk.alive()) == 4 and os.read(terminal, 65536), "the command runs")
        os.close(terminal)
        assert eventually(lambda: not is_alive(process)) and os.waitpid(process, 0)[1] == 0
    finally:
        if is_alive(process):
            os.kill(process, signal.SIGKILL)
    eventually(lambda: not desk.alive(), "all ended")
    assert list(home.waiting()) == [task_id]


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("no-such-command-anywhere {}", "no-such-command-anywhere"),
        ("/no/such/to-dam", "/no/such/to-dam"),
        ("FOLDER/plain {}", "FOLDER/plain"),
        ("FOLDER", "FOLDER"),
        ("lp 'office", "quot"),
        ("''", "ON_DONE"),
    ],
    ids=["not found", "no such path", "not executable", "a folder", "unbalanced", "no word"],
)
def test_a_command_that_cannot_be_run_is_a_settings_error(home: Home, command: str, what: str) -> None:
    (home.folder / "plain").write_text("#!/bin/sh\n")
    home.wait_for(home.grafx.add())
    ended = home.run("--once", ON_DONE=command.replace("FOLDER", str(home.folder)))
    assert ended.process.returncode == 78
    (line,) = ended.log().splitlines()
    assert re.search(r"\bON_DONE\b", line)
    assert what.replace("FOLDER", str(home.folder)) in line
    assert home.grafx.requests == []


def test_a_wrong_timeout_is_a_settings_error(home: Home) -> None:
    ended = home.run("--check", ON_DONE_TIMEOUT="0", ON_DONE="no-such-command-anywhere")
    assert ended.process.returncode == 78
    assert all(re.search(rf" {name}[: ]", ended.log()) for name in ("ON_DONE_TIMEOUT", "ON_DONE"))


def test_a_command_that_breaks_meanwhile_is_retried(desk: Desk) -> None:
    """Its interpreter is gone, which nobody can know before it is run; then it is gone itself."""
    desk.place.write_text("#!/no/such/interpreter\n")
    desk.place.chmod(0o755)
    task_id = desk.order()
    running = desk.home.start(before=QUICK)
    running.says(f"{task_id} ON_DONE cannot be run: .*No such file.*; retrying in")
    desk.place.unlink()
    time.sleep(0.3)
    assert running.process.poll() is None
    desk.command("exit 0")
    running.says(f"{task_id} delivered")
    assert "Traceback" not in running.log()


# --- while it fails --------------------------------------------------------------------------


def test_while_it_fails_everybody_is_told(desk: Desk) -> None:
    """What it printed last, and when it is retried: the live line, systemd, `db.py list`."""
    home = desk.home
    desk.command('[ -e "$FOLDER/go" ] || { echo first words; echo "out of  paper"; echo; exit 1; }')
    home.wait_for(*(desk.grafx.add() for _ in range(2)), projectID="p1")
    terminal, its = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(terminal, 65536):
                shown.append(data)
        except OSError as error:  # Linux says so when the other side is closed
            assert error.errno == errno.EIO

    def live_lines() -> list[str]:
        found = re.findall(r"\r(?:\x1b\[\d+A)?\x1b\[J\x1b\[\?7l([^\r\n\x1b]+)", b"".join(shown).decode())
        return [line for line in found if line.startswith("retrying")]

    with Listener() as listener:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        env = home.environment(NOTIFY_SOCKET=listener.address, TERM="xterm")
        poller = subprocess.Popen(home.command(before=QUICK), env=env, stdin=its, stdout=its, stderr=its)
        os.close(its)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            problem = "2 orders: ON_DONE ended with 1: out of paper"
            counts = "2 waiting for ON_DONE"
            told = rf"^STATUS=retrying in \d+ s: {problem}; {counts}$"
            eventually(lambda: [text for text in listener.statuses() if re.search(told, text)], told)
            eventually(lambda: f"the poller says: {problem}\n" in home.db("list").stdout, "db.py list")
            live = rf"retrying in \d+ s: {re.escape(problem)} \| {counts}"
            eventually(
                lambda: [text for text in live_lines() if re.fullmatch(live, text)], str(live_lines()[-3:])
            )
            assert all(len(text) < 120 for text in live_lines())

            desk.go()
            eventually(lambda: home.waiting() == {})
            listener.forget()
            eventually(
                lambda: [text for text in listener.statuses() if "paper" not in text], "STATUS without it"
            )
            eventually(lambda: "paper" not in home.db("list").stdout, "db.py list without it")
        finally:
            poller.terminate()
            poller.wait(PATIENCE)
            reader.join(PATIENCE)
            os.close(terminal)


# --- the README's three uses -----------------------------------------------------------------


def uses(first_word: str) -> list[str]:
    """The README's ON_DONE lines that begin with this command, as they are."""
    section = re.search(r"^## ON_DONE\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    assert section
    found = re.findall(rf"^ +(ON_DONE={first_word} .*)$", section[1], re.M)
    assert found, f"the README shows no {first_word}"
    return found


def deliver(app: Path, home: Home, line: str, *task_ids: str, **env: str) -> str:
    """Run a copy of the poller with this line in its .env until all is delivered; gives its log."""
    (app / ".env").write_text(f"{line}\n")
    home.wait_for(*task_ids)
    env = {name: value for name, value in home.environment(**env).items() if name != "ON_DONE"}
    command = [sys.executable, str(app / "poller.py"), "--once"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert home.waiting() == {}
    return ended.stderr


def forget(home: Home) -> None:
    """As if nothing had been delivered before."""
    (home.folder / ".database.json.delivered").unlink()


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system where there is one, else in another folder of this one."""
    places = [Path("/dev/shm"), Path("/run/shm"), Path(tempfile.gettempdir()), tmp_path]
    other = [place for place in places if place.is_dir() and os.access(place, os.W_OK)]
    device = tmp_path.stat().st_dev
    best = next((place for place in other if place.stat().st_dev != device), tmp_path)
    with tempfile.TemporaryDirectory(dir=best) as folder:
        yield Path(folder)


@pytest.mark.parametrize("first_word", ["install", "sh"])
def test_readme_a_folder_on_another_disk(
    app: Path, home: Home, grafx: Sandbox, other_disk: Path, first_word: str
) -> None:
    (line,) = uses(first_word)
    assert "/srv/dam/inbox" in line
    task_ids = [grafx.add("png", size=300_000), grafx.add("pdf")]
    for _ in range(2):  # it bears being called twice
        deliver(app, home, line.replace("/srv/dam/inbox", str(other_disk)), *task_ids)
        forget(home)
    names = [f"{task_ids[0]}.png", f"{task_ids[1]}.pdf"]
    assert sorted(path.name for path in other_disk.iterdir()) == sorted(names)
    for task_id, name in zip(task_ids, names, strict=True):
        assert (other_disk / name).read_bytes() == grafx.body(task_id)
        assert (other_disk / name).stat().st_mode & 0o777 == 0o644
    assert home.files() == sorted(names)


def test_readme_the_copy_with_a_rename_shows_no_half_file(
    app: Path, home: Home, grafx: Sandbox, other_disk: Path
) -> None:
    (tmp := home.folder / "bin").mkdir()
    # An `install` that ends in the middle, as at a full disk: it writes half of the file to its target.
    (tmp / "install").write_text('#!/bin/sh\nfor to; do :; done\n[ -d "$to" ] && to="$to/${ORDER_FILE##*/}"\n'
                                 'head -c 1000 "$ORDER_FILE" >"$to"; exit 1\n')  # fmt: skip
    (tmp / "install").chmod(0o755)
    (app / ".env").write_text(uses("sh")[0].replace("/srv/dam/inbox", str(other_disk)) + "\n")
    task_id = grafx.add(size=100_000)
    home.wait_for(task_id)
    env = home.environment(PATH=f"{tmp}:{os.environ['PATH']}")
    command = [sys.executable, str(app / "poller.py"), "--once"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended.stderr
    assert [path.name for path in other_disk.iterdir()] == [f".{task_id}"]
    deliver(app, home, uses("sh")[0].replace("/srv/dam/inbox", str(other_disk)), task_id)
    assert [path.name for path in other_disk.iterdir()] == [f"{task_id}.png"]


@pytest.fixture
def served() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a server in the foreground, and wait until it is there."""
    started: list[subprocess.Popen[bytes]] = []

    def serve(command: list[str], ready: Callable[[], bool], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            started.append(subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL))
        eventually(lambda: started[-1].poll() is not None or ready(), "the server")
        assert started[-1].poll() is None, log.read_text()
        return started[-1]

    yield serve
    for process in started:
        process.terminate()
        process.wait(PATIENCE)


def listens(address: tuple[str, int] | str) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        return sock.connect_ex(address) == 0


NGINX = """
daemon off; master_process off; pid nginx.pid; error_log nginx.log;
events {{}}
http {{
    access_log access.log; client_max_body_size 0;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{port}; root www;
        location /inbox/ {{ dav_methods PUT; create_full_put_path on; }}
        location /closed/ {{ return 507; }}
    }}
}}
"""


def test_readme_an_http_upload(
    app: Path, home: Home, grafx: Sandbox, served: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """To a real nginx with WebDAV."""
    nginx = find_program("nginx", "nginx")
    find_program("curl", "curl")
    (line,) = uses("curl")
    assert {"-f", "-T", "{}"} <= set(line.split())
    place = home.folder / "nginx"
    (place / "www" / "inbox").mkdir(parents=True)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    (place / "nginx.conf").write_text(NGINX.format(port=port))
    command = [nginx, "-p", str(place), "-e", "nginx.log", "-c", "nginx.conf"]
    served(command, lambda: listens(("127.0.0.1", port)), place / "said")
    url = line.split()[-1]
    assert re.fullmatch(r"https://dam\.example\.com/inbox/", url)
    here = line.replace(url, f"http://127.0.0.1:{port}/inbox/")
    task_ids = [grafx.add("png", size=300_000), grafx.add("pdf")]
    names = [f"{task_ids[0]}.png", f"{task_ids[1]}.pdf"]
    for _ in range(2):  # it bears being called twice
        log = deliver(app, home, here, *task_ids)
        assert "ON_DONE: " not in log  # no progress
        forget(home)
    inbox = place / "www" / "inbox"
    assert sorted(path.name for path in inbox.iterdir()) == sorted(names)
    for task_id, name in zip(task_ids, names, strict=True):
        assert (inbox / name).read_bytes() == grafx.body(task_id)

    # A server that does not take it: the order stays pending, and the log says why.
    home.wait_for(task_ids[0])
    ended = home.run("--once", ON_DONE=here.removeprefix("ON_DONE=").replace("/inbox/", "/closed/"))
    assert ended.process.returncode == 1
    assert re.search(rf"{task_ids[0]} ON_DONE ended with \d+: curl: .*507", ended.log())
    assert list(home.waiting()) == [task_ids[0]]


CUPS_FILES = """
FileDevice Yes
SystemGroup root
DataDir {data}
ServerBin {programs}
ServerRoot {place}/etc
RequestRoot {place}/spool
TempDir {place}/spool/tmp
CacheDir {place}/cache
StateDir {place}/state
ErrorLog {place}/errors
AccessLog {place}/requests
PageLog {place}/pages
"""
CUPSD = """
Listen {place}/cups.sock
Browsing No
WebInterface No
DefaultAuthType None
PreserveJobHistory Yes
<Location />
    Order allow,deny
    Allow all
</Location>
<Policy default>
    <Limit All>
        Order allow,deny
        Allow all
    </Limit>
</Policy>
"""
PRINTERS = """
<Printer office>
    DeviceURI file://{place}/paper
    State Idle
    Accepting Yes
</Printer>
"""
# A printer that takes PNG and PDF as they are. (CUPS would not copy a file to a "raw" queue of this sort.)
PPD = """*PPD-Adobe: "4.3"
*FormatVersion: "4.3"
*FileVersion: "1.0"
*LanguageVersion: English
*LanguageEncoding: ISOLatin1
*PCFileName: "OFFICE.PPD"
*Manufacturer: "File"
*Product: "(File)"
*ModelName: "File"
*ShortNickName: "File"
*NickName: "File"
*PSVersion: "(3010.000) 0"
*LanguageLevel: "3"
*cupsFilter: "image/png 0 {place}/copy"
*cupsFilter: "application/pdf 0 {place}/copy"
"""


def test_readme_a_printer(
    app: Path, home: Home, grafx: Sandbox, served: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """A real CUPS server of its own, whose printer "office" writes into a file."""
    cupsd = Path(find_program("cupsd", "cups-daemon"))
    find_program("lp", "cups-client")
    assert uses("lp") == ["ON_DONE=lp -d office"]
    with tempfile.TemporaryDirectory(prefix="grafx-cups-") as folder:
        # Not in tmp_path: that is closed to the user under whom CUPS runs a filter.
        place = Path(folder)
        place.chmod(0o755)
        for name in ("etc/ppd", "spool/tmp", "cache", "state"):
            (place / name).mkdir(parents=True)
        usr = cupsd.parent.parent
        files = CUPS_FILES.format(place=place, data=usr / "share" / "cups", programs=usr / "lib" / "cups")
        (place / "etc" / "cups-files.conf").write_text(files)
        (place / "etc" / "cupsd.conf").write_text(CUPSD.format(place=place))
        (place / "etc" / "printers.conf").write_text(PRINTERS.format(place=place))
        (place / "etc" / "ppd" / "office.ppd").write_text(PPD.format(place=place))
        (place / "copy").write_text('#!/bin/sh\nexec cat "$6"\n')
        (place / "copy").chmod(0o755)
        command = [str(cupsd), "-f", "-c", f"{place}/etc/cupsd.conf", "-s", f"{place}/etc/cups-files.conf"]
        address = str(place / "cups.sock")
        served(command, lambda: listens(address), place / "said")
        paper = place / "paper"
        for kind in ("png", "pdf"):
            task_id = grafx.add(kind, size=100_000)
            log = deliver(app, home, "ON_DONE=lp -d office", task_id, CUPS_SERVER=address)
            assert re.search(rf"{task_id} ON_DONE: request id is office-\d", log)
            body = grafx.body(task_id)
            eventually(lambda body=body: paper.exists() and paper.read_bytes() == body, "it is printed")

        # A printer that is not there: the order stays pending, and the log says why.
        home.wait_for(task_id)
        forget(home)
        ended = home.run("--once", ON_DONE="lp -d nowhere", CUPS_SERVER=address)
        assert ended.process.returncode == 1
        assert re.search(rf"{task_id} ON_DONE ended with 1: lp: .*does not exist", ended.log())
        assert list(home.waiting()) == [task_id]


def test_in_an_outage_it_runs_for_files_that_are_here(desk: Desk) -> None:
    """GraFx cannot be reached any more, and many others are pending."""
    desk.command('[ -e "$FOLDER/go" ] || exit 1')
    here = desk.order()
    poller = desk.home.start(before=QUICK, CONCURRENCY="2", POLL_INTERVAL="5")
    desk.called(2)
    desk.grafx.fault("task", "status-401", times=None)
    desk.grafx.fault("token", "status-503", times=None)
    others = [desk.grafx.add() for _ in range(50)]
    desk.home.wait_for(here, *others)
    poller.says("paused: no token")
    desk.go()
    poller.says(f"{here} delivered")
    poller.stop()
    polled = {request.task_id for request in desk.grafx.requests if request.what == "task"}
    assert len(polled - {here}) < len(others), "it only came after all of them"


def test_at_a_start_in_an_outage_it_runs_for_files_that_are_here(desk: Desk) -> None:
    """The token server is down, so nothing can be polled; a file of an earlier process needs no GraFx."""
    home = desk.home
    desk.command("exit 1")
    here = desk.order()
    assert home.run("--once").process.returncode == 1
    desk.command("exit 0")
    home.wait_for(here, other := desk.grafx.add())
    desk.grafx.fault("token", "status-503", times=None)
    poller = home.start(before=QUICK, POLL_INTERVAL="60")
    poller.says(rf"{here} delivered to .* \(downloaded before, ")
    eventually(lambda: list(home.waiting()) == [other])
    assert "resumed" not in poller.log()  # it says nothing about GraFx


def test_in_an_outage_an_order_whose_file_is_gone_is_paused_as_all_others(desk: Desk) -> None:
    desk.command('rm -f "$ORDER_FILE"; exit 1')
    desk.order()
    poller = desk.home.start(before=QUICK, POLL_INTERVAL="2")
    desk.called(2)
    desk.grafx.fault("task", "status-401", times=None)
    desk.grafx.fault("token", "status-503", times=None)
    poller.says("paused: no token")
    before = len(desk.grafx.requests)
    time.sleep(3)
    assert len(desk.grafx.requests) - before < 20


def test_after_a_folder_that_took_no_file_one_may_be_here(desk: Desk) -> None:
    """Also for an order that was rendering before: the rename may have been the last that succeeded."""
    home = desk.home
    desk.command("exit 0")
    task_id = desk.order(questions=3)
    poller = home.start(before=QUICK, POLL_INTERVAL="1")
    eventually(lambda: [r for r in desk.grafx.requests if r.task_id == task_id])
    aside = home.folder / "aside"
    home.orders.rename(aside)
    poller.says("paused: cannot write to")
    (aside / f"{task_id}.png").write_bytes(home.grafx.body(task_id))
    downloads = desk.downloads(task_id)
    aside.rename(home.orders)
    poller.says(rf"{task_id} delivered to .* \(downloaded before, ")
    assert desk.downloads(task_id) <= downloads + 1  # one may have begun just before


def test_a_file_that_was_taken_away_is_downloaded_again(desk: Desk) -> None:
    """By another program, in the moment before the command could have it."""
    home = desk.home
    desk.command('echo "$ORDER_FILE" >>"$FOLDER/log"')
    task_id = home.grafx.add()
    home.wait_for(task_id)
    before = (
        f"{QUICK}; real, took = chili.order_done, []; chili.order_done = lambda *given: next("
        "file for file in [real(*given)] if not file or took or took.append(file.unlink()) or True)"
    )
    running = home.start(before=before)
    running.says(f"{task_id} its file was removed before ON_DONE could run; retrying in")
    eventually(lambda: not home.waiting(), "it is delivered")
    assert (home.folder / "log").read_text() == f"{home.orders / task_id}.png\n"
    assert desk.downloads(task_id) == 2


def test_a_parent_that_ignores_or_blocks_signals_changes_nothing(home: Home) -> None:
    """Where SIGCHLD is ignored nobody learns an exit code, and a command that failed seems to end with 0."""
    home.wait_for(task_id := home.grafx.add())
    inherit = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", inherit, *home.command(before=QUICK)]
    running = Running(home, command, home.environment(ON_DONE="false"))
    home.pollers.append(running)
    running.says(f"{task_id} ON_DONE ended with 1; retrying in")
    assert running.stop() == 0
    assert list(home.waiting()) == [task_id]
