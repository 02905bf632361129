"""ON_DONE: a command for each file that was downloaded, run at least once."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Manager, Running, eventually, find_program

# As in the README. A new one needs a test.
PRINT, INSTALL, RENAME, UPLOAD = re.findall(
    r"^    (ON_DONE=.*)", (ROOT / "README.md").read_text(), re.MULTILINE
)
SAY = "import json, os, sys; json.dump([sys.argv[1:], {**os.environ}, sys.stdin.read()], open('said', 'w'))"
# Waits until a test lets it go on; the sleep is its child.
WAIT = 'until [ -e "$FOLDER/go" ]; do sleep 0.05; done\n'
# A child, and a grandchild that ignores SIGTERM; both keep the output open. Their pids are noted.
FAMILY = """
sh -c 'trap "" TERM; echo $$ >>"$FOLDER/pids"; sh -c "echo \\$\\$ >>\\$FOLDER/pids; exec sleep 600" & wait' &
sleep 600 & echo $! >>"$FOLDER/pids"
until [ "$(wc -l <"$FOLDER/pids")" -ge 3 ]; do sleep 0.02; done
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

    def downloads(self) -> Counter[str | None]:
        return Counter(request.task_id for request in self.grafx.requests if request.what == "download")

    def alive(self) -> list[int]:
        """Those of the noted processes that have not ended."""
        note = self.home.folder / "pids"
        return [pid for pid in map(int, note.read_text().split()) if is_alive(pid)] if note.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def desk(home: Home) -> Iterator[Desk]:
    desk = Desk(home)
    yield desk
    for running in home.pollers:  # or it would start the next command
        running.stop(signal.SIGKILL)
    desk.go()
    for pid in desk.alive():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- how it is called ------------------------------------------------------------------------


def test_it_is_called_without_a_shell_an_input_or_a_secret(app: Path, desk: Desk) -> None:
    """Its environment is the poller's, without the credentials; settings of `.env` are not in it."""
    home, folder = desk.home, desk.home.folder / 'it\'s {} "here" $HOME'
    secret = {name: home.env.pop(name) for name in ("SERVER_ID", "SERVER_SECRET")}
    secret |= {"FRONT_ID": "id", "FRONT_SECRET": "secret", "CREDENTIALS_DIRECTORY": "/run/credentials"}
    words = "'a b' $HOME ; * {} x{}y{} '' \"{ }\""
    ours = {"ON_DONE": f"{shlex.join([sys.executable, '-c', SAY])} {words}", "ORDERS_DIR": str(folder)}
    ours |= {"PATH": os.environ["PATH"], "OWN": "a b"}
    (app / ".env").write_text("".join(f"{name}={value}\n" for name, value in home.env.items()))
    task_id = desk.order()
    command = [sys.executable, str(app / "poller.py"), "--once"]
    env = {**secret, "SERVER_SECRET_FILE": "", **ours}
    ended = subprocess.run(command, env=env, cwd=home.folder, input="own", text=True,
                           capture_output=True, timeout=60)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    given, environment, read = json.loads((home.folder / "said").read_text())
    file = str(folder / f"{task_id}.png")
    wanted = ["a b", "$HOME", ";", "*", "FILE", "xFILEyFILE", "", "{ }"]
    assert given == [word.replace("FILE", file) for word in wanted]
    environment.pop("LC_CTYPE", None)  # Python may set it by itself
    assert environment == {**ours, "TASK_ID": task_id, "PROJECT_ID": "p1", "ORDER_FILE": file}
    assert read == ""


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


@pytest.mark.parametrize(
    ("on_done", "on_failed"),
    [("FOLDER/plain {}", "no-such-program"), ("lp 'office", "''")],
    ids=["cannot be run", "are no words"],
)
def test_a_wrong_command_is_a_settings_error(home: Home, on_done: str, on_failed: str) -> None:
    (home.folder / "plain").write_text("#!/bin/sh\n")
    home.wait_for(home.grafx.add())
    on_done = on_done.replace("FOLDER", str(home.folder))
    ended = home.run(ON_DONE=on_done, ON_DONE_TIMEOUT="0", ON_FAILED=on_failed)
    assert ended.process.returncode == 78
    wrong = re.findall(r"ERROR +(\w+) (?:names .*, which cannot be run|cannot be split|is '0')", ended.log())
    assert wrong == ["ON_DONE", "ON_DONE_TIMEOUT", "ON_FAILED"]
    assert home.grafx.requests == []


# --- at least once ---------------------------------------------------------------------------


def test_a_command_that_fails_is_retried_after_growing_pauses(desk: Desk) -> None:
    home = desk.home
    desk.command('sleep 600 & echo $! >>"$FOLDER/pids"; exit 3')
    task_id = desk.order(size=300_000)
    running = home.start(before=QUICK)
    desk.called(4)
    pauses = [later - earlier for earlier, later in itertools.pairwise(desk.calls())]
    assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.3), strict=False)), pauses
    assert list(home.waiting()) == [task_id]
    assert (home.orders / f"{task_id}.png").read_bytes() == home.grafx.body(task_id)
    assert not re.search(f"{task_id} delivered", running.log())
    desk.command("exit 0")
    running.says(f"{task_id} delivered")
    eventually(lambda: home.waiting() == {})
    assert desk.downloads() == {task_id: 1}
    eventually(lambda: not desk.alive(), "what it left running has ended")
    assert len(re.findall("ON_DONE ended with 3", running.log())) == 1  # the others came within a minute


def test_it_may_move_the_file_which_is_downloaded_again_where_it_fails_then(desk: Desk) -> None:
    home = desk.home
    desk.command('mv "$1" "$FOLDER/moved"; [ -e "$FOLDER/go" ]')
    task_id = desk.order()
    running = home.start(before=QUICK)
    desk.called(2)
    desk.go()
    running.says(f"{task_id} delivered")
    eventually(lambda: home.waiting() == {})
    assert desk.downloads() == {task_id: len(desk.calls())}
    assert (home.folder / "moved").read_bytes() == home.grafx.body(task_id)
    assert home.files() == []
    assert "Traceback" not in running.log()


def test_a_file_that_was_taken_away_is_downloaded_again(desk: Desk) -> None:
    """By another program, in the moment before the command could have it, some time after its download."""
    home = desk.home
    desk.command("exit 0")
    file = home.orders / f"{desk.order()}.png"
    file.write_bytes(home.grafx.body(file.stem))
    taken = f"files = [db.Path({str(file)!r})]; db.sync_folder = lambda folder: "
    taken += "folder.name == 'orders' and files and files.pop().unlink()"
    running = home.start(before=f"{QUICK}; {taken}")
    running.says(f"{file.stem} its file was removed before ON_DONE could run; retrying in")
    eventually(lambda: not home.waiting(), "it is delivered")
    assert (len(desk.calls()), desk.downloads()) == (1, {file.stem: 1})


def test_a_command_that_breaks_meanwhile_is_retried(desk: Desk) -> None:
    """Its interpreter is gone, which nobody can know before it is run."""
    desk.place.write_text("#!/no/such/interpreter\n")
    desk.place.chmod(0o755)
    task_id = desk.order()
    running = desk.home.start(before=QUICK)
    running.says(f"{task_id} ON_DONE cannot be run: .*No such file.*; retrying in")
    desk.command("exit 0")
    running.says(f"{task_id} delivered")


def test_in_an_outage_it_runs_for_files_that_are_here(desk: Desk) -> None:
    """The token server is down, so nothing can be polled; a file of an earlier process needs no GraFx.

    An order that has lost its file is paused as all others.
    """
    home, (here, gone) = desk.home, [desk.grafx.add() for _ in range(2)]
    home.wait_for(here, gone)
    desk.command("exit 1")
    assert home.run("--once").process.returncode == 1
    desk.command(f'[ "$TASK_ID" = {here} ] || ! rm "$ORDER_FILE"')
    fault = desk.grafx.fault("token", "status-503", times=None)
    poller = home.start("-v", before=f"{QUICK}; chili.TOKEN_PAUSE = 0.1", POLL_INTERVAL="60")
    poller.says(rf"{here} delivered to .* \(downloaded before, ")
    poller.says(f"{gone} ON_DONE ended with 1")
    asked = len(desk.grafx.requests)
    eventually(lambda: len(desk.grafx.requests) >= asked + 3, "GraFx is tried again")
    assert poller.log().count(f"{gone} polled") <= 2
    assert "resumed" not in poller.log()  # a file that was here says nothing about GraFx
    desk.grafx.end_fault(fault)
    poller.says("resumed after")
    eventually(lambda: desk.downloads() == {here: 1, gone: 2})


# --- what it prints --------------------------------------------------------------------------


def test_its_last_lines_are_logged_and_the_very_last_is_the_reason(desk: Desk) -> None:
    """Whatever ends it: a realtime signal has no name in Python."""
    number = getattr(signal, "SIGRTMIN", signal.SIGKILL).value
    desk.command(f"echo one; echo two >&2; printf 'no end'; [ -e \"$FOLDER/go\" ] || kill -{number} $$")
    task_id = desk.order()
    running = desk.home.start(before=QUICK)
    how = rf"was ended by signal {number} \(.*\): no end; retrying in [\d.]+ s\n"
    running.says(f"WARNING {task_id} ON_DONE {how}")
    desk.go()
    running.says(f"{task_id} delivered to")
    # Those of a retry came within a minute.
    said = re.findall(f"INFO +{task_id} (?:ON_DONE: (.*)|(delivered) to .*)\n", running.log())
    assert ["".join(line) for line in said] == [*("one", "two") * 2, "no end", "delivered"]


def test_any_output_is_fine(desk: Desk) -> None:
    desk.command(
        "seq 5000; head -c 5000 /dev/zero | tr '\\0' x; printf '\\n\\0\\033[2J\\377\\n'; echo '<END>'"
    )
    task_id = desk.order()
    ended = desk.home.run("--once")
    printed = re.findall(f"{task_id} ON_DONE: (.*)\n", ended.log())
    assert printed[:7] == [str(number) for number in range(4994, 5001)]
    assert [printed[7], printed[9:]] == ["x" * 500, ["<END>"]]
    assert ended.log().replace("\n", "").isprintable()
    assert "Traceback" not in ended.log()


def test_what_it_leaves_behind_costs_nothing(desk: Desk) -> None:
    """It did its work, and may go on with its output open: that takes no thread and no descriptor."""
    home = desk.home
    desk.command('sleep 600 & echo $! >>"$FOLDER/pids"')
    tasks = [desk.grafx.add() for _ in range(20)]
    home.wait_for(tasks[0])
    running = home.start(before=QUICK)
    eventually(lambda: not home.waiting())
    process = psutil.Process(running.process.pid)
    threads, descriptors = process.num_threads(), process.num_fds()
    home.wait_for(*tasks[1:])
    eventually(lambda: not home.waiting())
    assert len(desk.alive()) == len(tasks)
    eventually(lambda: process.num_threads() <= threads + 8)  # those that poll
    eventually(lambda: process.num_fds() <= descriptors + 8)  # connections


def test_while_it_fails_everybody_is_told(desk: Desk, manager: Manager) -> None:
    """What it printed last, without a secret, and when it is retried. (The live line: test_screen.py.)"""
    home = desk.home
    desk.command(
        '[ -e "$FOLDER/go" ] || { echo first; echo "no  paper $(cat "$FOLDER/secret")"; echo; exit 1; }'
    )
    (home.folder / "secret").write_text(f"{desk.grafx.client_secret}, sorry")
    home.wait_for(*(desk.grafx.add() for _ in range(2)))
    running = home.start(before=QUICK, NOTIFY_SOCKET=manager.address)
    problem = r"ON_DONE ended with 1: no paper \[secret\], sorry"
    manager.hears(rf"^STATUS=2 orders, retry.*: {problem}; 2 waiting for ON_DONE \(\d\d:\d\d:\d\d\)$")
    noted = f"the poller says: 2 orders: {problem}\n"
    eventually(lambda: re.search(noted, home.db("list").stdout), "db.py list")
    desk.go()
    eventually(lambda: home.waiting() == {})
    manager.forget()
    manager.hears("^STATUS=idle")
    eventually(lambda: "paper" not in home.db("list").stdout, "db.py list without it")
    assert desk.grafx.client_secret not in running.log()


# --- how long it may take, and what goes on beside it ----------------------------------------


def test_a_timeout_ends_it_with_all_that_it_started(desk: Desk) -> None:
    """Words without the end of a line are the reason too: of one that asks for a password, they are all."""
    desk.command(f"[ -e \"$FOLDER/go\" ] && exit\nprintf 'Password: '\n{FAMILY}wait")
    task_id = desk.order()
    running = desk.home.start(before=QUICK, ON_DONE_TIMEOUT="2")
    eventually(lambda: len(desk.alive()) == 4)  # in one of its runs
    desk.go()
    running.says(f"{task_id} ON_DONE took longer than 2 s: Password:; retrying in")
    running.says(f"{task_id} delivered")
    eventually(lambda: not desk.alive(), "all ended")


def test_it_is_one_of_concurrency_and_holds_up_nobody_else(desk: Desk, manager: Manager) -> None:
    home, grafx, log = desk.home, desk.grafx, desk.home.folder / "log"
    stuck, others = grafx.add(), [grafx.add() for _ in range(4)]
    desk.command(
        f'echo "+" >>"$FOLDER/log"\n[ $TASK_ID = {stuck} ] && {WAIT}sleep 0.2; echo - >>"$FOLDER/log"'
    )
    home.wait_for(stuck)
    running = home.start(before=QUICK, CONCURRENCY="2", NOTIFY_SOCKET=manager.address)
    desk.called(1, stuck)
    home.wait_for(stuck, *others)
    eventually(lambda: list(home.waiting()) == [stuck], "all others are delivered")
    manager.forget()
    assert "downloading" not in manager.hears("^STATUS=")
    assert f"{stuck} delivered" not in running.log()
    desk.go()
    running.says(f"{stuck} delivered")
    at_once = itertools.accumulate(1 if line == "+" else -1 for line in log.read_text().splitlines())
    assert max(at_once) == 2


@pytest.mark.parametrize("how", ["SIGTERM", "a closed terminal"])
def test_a_stop_ends_it_with_all_that_it_started(desk: Desk, how: str) -> None:
    home = desk.home
    desk.command(f"trap '' TERM\n{FAMILY}wait; wait; exit 1")
    task_id = desk.order()
    poller, terminal = pty.fork()
    if not poller:
        os.execve(sys.executable, home.command(before=QUICK), home.environment(TERM="xterm"))
    try:
        # It is read on, or the poller's log would fill the terminal.
        eventually(lambda: len(desk.alive()) == 4 and os.read(terminal, 65536), "the command runs")
        if how == "SIGTERM":
            os.kill(poller, signal.SIGTERM)
        else:
            os.close(terminal)
        eventually(lambda: not is_alive(poller))  # not after its 600 s
    finally:
        with suppress(ProcessLookupError):
            os.kill(poller, signal.SIGKILL)
        code = os.waitpid(poller, 0)[1]
        with suppress(OSError):
            os.close(terminal)
    assert code == 0
    eventually(lambda: not desk.alive(), "all ended")
    assert list(home.waiting()) == [task_id]
    assert home.files() == [f"{task_id}.png"]


def test_what_the_poller_ended_has_not_ended_with_0(desk: Desk) -> None:
    """Whatever its exit code: the next start runs it to its end, without a second download."""
    home = desk.home
    desk.command(
        """trap 'touch "$FOLDER/tidied"; exit 0' TERM\n[ -e "$FOLDER/go" ] || {"""
        f'{FAMILY}wait; exit 1; }}\necho "$TASK_ID" >>"$FOLDER/done"'
    )
    task_id = desk.order()
    running = home.start(before=QUICK)
    eventually(lambda: len(desk.alive()) == 4)
    assert running.stop() == 0
    assert (home.folder / "tidied").exists()  # SIGTERM comes before SIGKILL
    eventually(lambda: not desk.alive(), "all ended")
    assert not re.search(f"{task_id} delivered", running.log())
    assert list(home.waiting()) == [task_id]
    desk.go()
    assert home.run("--once").process.returncode == 0
    assert (home.folder / "done").read_text() == f"{task_id}\n"
    assert (home.waiting(), desk.downloads()) == ({}, {task_id: 1})


# --- the README's uses -----------------------------------------------------------------------


def deliver(app: Path, home: Home, line: str, task_id: str, code: int = 0, **env: str) -> str:
    """Run a copy of the poller once, with this line in its .env, as if nothing had been delivered before."""
    (app / ".env").write_text(f"{line}\n")
    (home.folder / ".database.json.delivered").unlink(missing_ok=True)
    home.wait_for(task_id)
    command = [sys.executable, str(app / "poller.py"), "--once"]
    ended = subprocess.run(command, env=home.environment(**env), capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert list(home.waiting()) == [task_id] * code
    return ended.stderr


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system where there is one, else in another folder of this one."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("line", [INSTALL, RENAME], ids=["install", "rename"])
def test_readme_a_folder_on_another_disk(app: Path, home: Home, other_disk: Path, line: str) -> None:
    assert "/srv/dam/inbox" in line
    line, task_id = line.replace("/srv/dam/inbox", str(other_disk)), home.grafx.add("pdf", size=300_000)
    # An `install` that ends in the middle, as at a full disk: it writes half of the file to its target.
    broken = home.folder / "bin" / "install"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\nfor to; do :; done\n[ -d "$to" ] && to="$to/${ORDER_FILE##*/}"\n'
                      'head -c 1000 "$ORDER_FILE" >"$to"; exit 1\n')  # fmt: skip
    broken.chmod(0o755)
    deliver(app, home, line, task_id, 1, PATH=f"{broken.parent}:{os.environ['PATH']}")
    half = f".{task_id}" if line.startswith("ON_DONE=sh") else f"{task_id}.pdf"
    assert [path.name for path in other_disk.iterdir()] == [half]
    for _ in range(2):  # it bears being called twice
        deliver(app, home, line, task_id)
        (file,) = other_disk.iterdir()
        assert (file.name, file.stat().st_mode & 0o777) == (f"{task_id}.pdf", 0o644)
        assert file.read_bytes() == home.grafx.body(task_id)
    assert home.files() == [f"{task_id}.pdf"]


def test_readme_an_http_upload(app: Path, home: Home) -> None:
    """Where the server does not take the file, the log says why."""
    find_program("curl", "curl")
    task_id = home.grafx.add("pdf", size=300_000)
    line, found = re.subn("https://[a-z.]+(?=/inbox/)", home.grafx.base_url, UPLOAD)
    assert found == 1
    for status, code in ((201, 0), (507, 1)):
        home.grafx.fault("other", f"status-{status}", body=b"")
        log = deliver(app, home, line, task_id, code)
        sent = home.grafx.requests[-1]
        assert (sent.method, sent.path) == ("PUT", f"/inbox/{task_id}.pdf")
        assert sent.body == home.grafx.body(task_id)
        assert re.findall("ON_DONE.*", log)[:1] == re.findall(r"ON_DONE ended with \d+: curl: .*507.*", log)


CUPS = {
    "cups-files.conf": """
SystemGroup root
DataDir {usr}/share/cups
ServerBin {place}/bin
ServerRoot {place}/etc
RequestRoot {place}/spool
TempDir {place}/spool/tmp
CacheDir {place}/cache
StateDir {place}/state
ErrorLog stderr
AccessLog stderr
PageLog stderr
""",
    "cupsd.conf": "Listen {place}/cups.sock\n",
    "printers.conf": "<Printer office>\nDeviceURI paper:\nState Idle\nAccepting Yes\n</Printer>\n",
}


@pytest.fixture
def cups() -> Iterator[Path]:
    """The folder of a real CUPS server of its own, whose printer "office" writes into the file `paper`."""
    program = Path(find_program("cupsd", "cups-daemon")).resolve()
    find_program("lp", "cups-client")
    usr = program.parent.parent
    with tempfile.TemporaryDirectory(prefix="grafx-cups-") as folder:  # a short one, for the socket
        place = Path(folder)
        for name in ("etc", "spool/tmp", "cache", "state", "bin/backend"):
            (place / name).mkdir(parents=True)
        for name, text in CUPS.items():
            (place / "etc" / name).write_text(text.format(place=place, usr=usr))
        (place / "bin" / "daemon").symlink_to(usr / "lib" / "cups" / "daemon")
        printer = place / "bin" / "backend" / "paper"
        printer.write_text(f'#!/bin/sh\nexec cp "$6" {place}/paper\n')
        printer.chmod(0o700)
        configured = ("-c", f"{place}/etc/cupsd.conf", "-s", f"{place}/etc/cups-files.conf")
        with (place / "said").open("wb") as said:
            server = subprocess.Popen([program, "-f", *configured], stdin=subprocess.DEVNULL,
                                      stdout=said, stderr=said)  # fmt: skip
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                eventually(lambda: sock.connect_ex(f"{place}/cups.sock") == 0, "the server")
            yield place
        finally:
            server.terminate()
            server.wait(PATIENCE)


def test_readme_a_printer(app: Path, home: Home, cups: Path) -> None:
    task_id, paper = home.grafx.add("pdf", size=100_000), cups / "paper"
    log = deliver(app, home, PRINT, task_id, CUPS_SERVER=f"{cups}/cups.sock")
    assert re.search(rf"{task_id} ON_DONE: request id is office-\d", log)
    body = home.grafx.body(task_id)
    eventually(lambda: paper.exists() and paper.read_bytes() == body, "it is printed")
