"""ON_DONE: a command for each file that was downloaded, run at least once."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Running, eventually, find_program

import db

# As in the README. A new one needs a test.
README = (ROOT / "README.md").read_text()
PRINT, INSTALL, RENAME, UPLOAD = re.findall(r"^    (ON_DONE=.*)", README, re.MULTILINE)
ENDED = 'echo "$TASK_ID" >>"$FOLDER/ended"'
GO = '[ -e "$FOLDER/go-$TASK_ID" ]'
HELD = f"until {GO}; do sleep 0.05; done"
SLEEPER = 'sleep 600 & echo $! >>"$FOLDER/pids"\n'
# A child and its child, which ignore SIGTERM and keep the output open.
FAMILY = f"""sh -c 'trap "" TERM; echo $$ >>"$FOLDER/pids"; {SLEEPER} wait' &
echo $$ >>"$FOLDER/pids"
wait
"""


class Desk:
    """ON_DONE's command of a test, and what it leaves."""

    def __init__(self, home: Home) -> None:
        self.home, self.grafx = home, home.grafx
        self.place, self.list = home.folder / "command", home.folder / ".database.json.delivered"
        home.env |= {"FOLDER": str(home.folder), "ON_DONE": shlex.quote(str(self.place))}
        self.command(ENDED)

    def command(self, text: str, interpreter: str = "/bin/sh") -> None:
        """A script. Each run begins with a line in `begun`: when, its process, its order."""
        temp = self.home.folder / "new-command"
        begin = 'echo "$(date +%s.%N) $$ $TASK_ID" >>"$FOLDER/begun"'
        temp.write_text(f"#!{interpreter}\n{begin}\n{text}\n")
        temp.chmod(0o755)
        temp.replace(self.place)

    def orders(self, number: int, **options: Any) -> list[str]:
        tasks = [self.grafx.add(**options) for _ in range(number)]
        self.home.wait_for(*tasks, projectID="p1")
        return tasks

    def go(self, *task_ids: str) -> None:
        for task_id in task_ids:
            (self.home.folder / f"go-{task_id}").touch()

    def lines(self, name: str) -> list[str]:
        file = self.home.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def begun(self, times: int) -> list[list[str]]:
        eventually(lambda: len(self.lines("begun")) >= times, f"{times} runs of the command")
        return [line.split() for line in self.lines("begun")]

    def runs(self) -> Counter[str]:
        return Counter(self.lines("ended"))

    def downloads(self) -> Counter[str | None]:
        return Counter(request.task_id for request in self.grafx.asked("download"))

    def removed(self) -> None:
        eventually(lambda: not db.get_orders(self.home.database), "all is delivered and removed")

    def alive(self) -> list[int]:
        return [pid for pid in map(int, self.lines("pids")) if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def desk(home: Home) -> Desk:
    return Desk(home)


def test_it_is_called_without_a_shell_an_input_or_a_secret(home: Home) -> None:
    """Its environment is the poller's, without the credentials; what the settings file has is not in it.

    Its working folder is that of poller.py, wherever that was started.
    """
    folder, settings = home.folder / 'it\'s {} "here" $HOME', home.folder / "settings"
    secret = {name: home.env.pop(name) for name in ("SERVER_ID", "SERVER_SECRET")}
    secret |= {"FRONT_ID": "id", "FRONT_SECRET": "secret", "CREDENTIALS_DIRECTORY": "/run/credentials"}
    settings.write_text("".join(f"{name}={value}\n" for name, value in home.env.items()))
    say = "import json, os, sys; "
    said = home.folder / "said"
    say += f"json.dump([sys.argv[1:], dict(os.environ), os.getcwd(), sys.stdin.read()], open('{said}', 'w'))"
    words = "'a b' $HOME ; * {} x{}y{} '' \"{ }\""
    ours = {"ON_DONE": f"{shlex.join([sys.executable, '-c', say])} {words}", "ORDERS_DIR": str(folder)}
    ours |= {"PATH": os.environ["PATH"], "OWN": "a b", "GRAFX_ENV_FILE": str(settings)}
    home.wait_for(task_id := home.grafx.add(), projectID="p1")
    env = {**secret, "SERVER_SECRET_FILE": "", **ours}
    ended = subprocess.run(home.command("--once"), env=env, cwd=home.folder, input="own", text=True,
                           capture_output=True, timeout=60)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    given, environment, where, read = json.loads(said.read_text())
    file = str(folder / f"{task_id}.png")
    wanted = ["a b", "$HOME", ";", "*", "FILE", "xFILEyFILE", "", "{ }"]
    assert given == [word.replace("FILE", file) for word in wanted]
    environment.pop("LC_CTYPE", None)  # Python may set it by itself
    assert environment == {**ours, "TASK_ID": task_id, "PROJECT_ID": "p1", "ORDER_FILE": file}
    assert (where, read) == (str(ROOT), "")


def test_a_wrong_command_is_a_settings_error(home: Home) -> None:
    ended = home.run(ON_DONE="lp 'office", ON_DONE_TIMEOUT="0", ON_FAILED="no-such-program")
    assert ended.process.returncode == 78
    wrong = re.findall(r"ERROR +(\w+ (?:names|cannot be split|is '0'))", ended.log())
    assert wrong == ["ON_DONE cannot be split", "ON_DONE_TIMEOUT is '0'", "ON_FAILED names"]


def test_one_that_fails_is_retried_after_growing_pauses_without_a_second_download(desk: Desk) -> None:
    """Also where a parent ignores SIGCHLD, and each command seems to end with 0. It blocks SIGTERM, too."""
    home, (task_id,) = desk.home, desk.orders(1, size=300_000)
    desk.command(f"{SLEEPER}exit 3")
    inherit = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", inherit, *home.command(before=QUICK)]
    home.pollers.append(running := Running(home, command, home.environment()))
    times = [float(when) for when, *_ in desk.begun(4)]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.3), strict=False)), pauses
    desk.command("", interpreter="/no/such/program")
    running.says(f"{task_id} ON_DONE: .*No such file.*; retrying in")
    assert list(home.waiting()) == [task_id]
    desk.command(ENDED)
    desk.removed()
    assert running.stop() == 0
    assert desk.runs() == desk.downloads() == {task_id: 1}
    eventually(lambda: not desk.alive(), "what the failed ones left running has ended")


def test_it_may_move_the_file_which_is_downloaded_again_where_it_fails_then(desk: Desk) -> None:
    home, (task_id,) = desk.home, desk.orders(1)
    desk.command(f'mv "$1" "$FOLDER/moved"; {GO}')
    home.start(before=QUICK)
    desk.begun(2)
    desk.go(task_id)
    desk.removed()
    assert desk.downloads() == {task_id: len(desk.lines("begun"))}
    assert (home.folder / "moved").read_bytes() == home.grafx.body(task_id)


def test_in_an_outage_it_runs_for_a_file_that_is_here(desk: Desk) -> None:
    """No GraFx is needed for the file of an earlier process, whose order may have been rejected before."""
    home, (task_id,) = desk.home, desk.orders(1)
    desk.command("exit 1")
    assert home.run("--once").process.returncode == 1
    home.write(home.read() | {"failing": {task_id: {"status": 404}}})
    home.grafx.fault("token", "status-503", times=None)
    running = home.start(before=QUICK)
    running.says("paused: no token")
    desk.begun(len(desk.lines("begun")) + 2)  # the second one in the outage, whenever the first one began
    desk.command(ENDED)
    running.says(rf"{task_id} delivered to .* \(downloaded before, ")
    assert "resumed" not in running.log()
    assert desk.runs() == desk.downloads() == {task_id: 1}


def test_once_in_an_outage_it_runs_for_each_file_that_is_here(desk: Desk) -> None:
    tasks = desk.orders(5)
    desk.command("exit 1")
    assert desk.home.run("--once").process.returncode == 1
    desk.command(ENDED)
    desk.grafx.fault("token", "status-503", times=None)
    assert desk.home.run("--once", CONCURRENCY="1").process.returncode == 0
    assert desk.runs() == desk.downloads() == dict.fromkeys(tasks, 1)


def test_a_project_that_is_typed_while_the_order_is_pending_reaches_it(desk: Desk) -> None:
    home, task, other = desk.home, desk.grafx.add(), desk.grafx.add("never")
    renders = desk.grafx.fault("task", "status-204", task_id=task, times=None)
    home.wait_for(task)
    desk.command('echo "$PROJECT_ID" >>"$FOLDER/ended"')
    running = home.start(before=QUICK)
    eventually(lambda: desk.grafx.asked("task", task))
    home.wait_for(task, other, projectID="p-2")
    running.says(rf"{other} added \(project p-2\)")
    desk.grafx.end_fault(renders)
    running.says(f"{task} delivered")
    assert desk.runs() == {"p-2": 1}


def test_its_last_lines_are_logged_and_the_very_last_is_the_reason(desk: Desk) -> None:
    """Whatever they are, but no secret, and nothing that a terminal takes for a command."""
    home, (task_id,) = desk.home, desk.orders(1)
    (home.folder / "secret").write_text(home.grafx.client_secret)
    desk.command(
        "seq 5000; head -c 5000 /dev/zero | tr '\\0' x; printf '\\n\\0\\033[2J\\377\\n'\n"
        f'echo "<END>" >&2; printf "no  paper, $(cat $FOLDER/secret)"; {GO} || kill -KILL $$'
    )
    running = home.start(before=QUICK)
    reason = r"ON_DONE was killed by signal 9 \(Killed.*\): no paper, \[secret\]"
    running.says(f"WARNING {task_id} {reason}; retrying in")
    eventually(lambda: re.search(f"the poller says: 1 order: {reason}\n", home.db("list").stdout))
    desk.go(task_id)
    running.says(f"{task_id} delivered to")
    *numbers, long, _, last, very_last = re.findall(f"INFO +{task_id} ON_DONE: (.*)\n", running.log())[-10:]
    assert numbers == [str(number) for number in range(4995, 5001)]
    assert (long, last, very_last) == ("x" * 500, "<END>", "no paper, [secret]")
    assert running.log().replace("\n", "").isprintable()


def test_what_it_leaves_running_goes_on_and_holds_up_nobody(desk: Desk) -> None:
    """It has the command's output open."""
    desk.orders(3)
    desk.command(SLEEPER)
    assert desk.home.run("--once", CONCURRENCY="1").process.returncode == 0
    assert len(desk.alive()) == 3


def test_a_timeout_ends_it_with_all_that_it_started(desk: Desk) -> None:
    (task_id,) = desk.orders(1)
    desk.command(f"{GO} && exit\nprintf 'Password: '\n{FAMILY}")
    running = desk.home.start(before=QUICK, ON_DONE_TIMEOUT="1")
    running.says(f"{task_id} ON_DONE took longer than 1 s: Password:; retrying in")
    eventually(lambda: len(desk.lines("pids")) >= 3, "all of the family has run")
    desk.go(task_id)
    desk.removed()
    eventually(lambda: not desk.alive(), "all ended")


def test_it_is_one_of_concurrency_and_holds_up_nobody_else(desk: Desk) -> None:
    home, grafx = desk.home, desk.grafx
    held = [grafx.add(task_id=f"held-{number}") for number in range(3)]
    others = [grafx.add() for _ in range(3)]
    note = 'echo {} >>"$FOLDER/log"'
    wait = f"case $TASK_ID in held-*) {HELD} ;; esac"
    desk.command("\n".join((note.format("+"), wait, note.format("-"))))
    home.wait_for(held[0])
    running = home.start(before=QUICK, CONCURRENCY="2")
    desk.begun(1)
    home.wait_for(held[0], *others)
    eventually(lambda: list(home.waiting()) == held[:1], "all others are delivered")
    home.wait_for(*held)
    desk.begun(5)  # and the poller has looked once more, before any of them ends
    home.wait_for(*held, last := grafx.add())
    running.says(f"{last} added")
    desk.go(*held)
    desk.removed()
    at_once = itertools.accumulate(1 if line == "+" else -1 for line in desk.lines("log"))
    assert max(at_once) == 2


def test_a_stop_ends_it_with_all_that_it_started_and_the_next_start_runs_it_again(desk: Desk) -> None:
    """However it takes SIGTERM, and though it ends with 0 then; without a second download."""
    home, tasks = desk.home, [desk.grafx.add(task_id=name) for name in ("polite", "stubborn")]
    home.wait_for(*tasks)
    traps = "case $TASK_ID in polite) trap 'exit 0' TERM ;; *) trap '' TERM ;; esac"
    desk.command(f"{traps}\n{GO} || {{ {FAMILY} exit 1; }}\n{ENDED}")
    running = home.start(before=QUICK)
    eventually(lambda: len(desk.alive()) == 6, "both families run")
    assert running.stop() == 0
    eventually(lambda: not desk.alive(), "all ended")
    assert list(home.waiting()) == tasks
    desk.go(*tasks)
    assert home.run("--once").process.returncode == 0
    assert desk.runs() == desk.downloads() == dict.fromkeys(tasks, 1)


def deliver(home: Home, line: str, task_id: str, code: int = 0, **env: str) -> str:
    """Run the poller once with this line in its settings file; gives its log."""
    (settings := home.folder / "settings").write_text(f"{line}\n")
    home.wait_for(task_id)
    ended = home.run("--once", GRAFX_ENV_FILE=str(settings), **env)
    assert ended.process.returncode == code, ended.log()
    assert list(home.waiting()) == [task_id] * code
    return ended.log()


@pytest.mark.parametrize("line", [INSTALL, RENAME], ids=["install", "rename"])
def test_readme_a_folder(home: Home, line: str) -> None:
    """It bears being called twice: here `install` first ends after a part of the file, as at a full disk."""
    (inbox := home.folder / "inbox").mkdir()
    (bin := home.folder / "bin").mkdir()
    (bin / "install").write_text(
        '#!/bin/sh\nfor to; do :; done\n[ -d "$to" ] && to="$to/${ORDER_FILE##*/}"\n'
        'head -c 1000 "$ORDER_FILE" >"$to"; exit 1\n'
    )
    (bin / "install").chmod(0o755)
    task_id, part = home.grafx.add("pdf", size=300_000), "{}.pdf" if line == INSTALL else ".{}"
    line = line.replace("/srv/dam/inbox", str(inbox))
    deliver(home, line, task_id, 1, PATH=f"{bin}:{os.environ['PATH']}")
    assert [path.name for path in inbox.iterdir()] == [part.format(task_id)]
    deliver(home, line, task_id)
    (file,) = inbox.iterdir()
    assert (file.name, file.stat().st_mode & 0o777) == (f"{task_id}.pdf", 0o644)
    assert file.read_bytes() == home.grafx.body(task_id)


def test_readme_an_http_upload(home: Home) -> None:
    find_program("curl", "curl")
    task_id = home.grafx.add("pdf", size=300_000)
    line = re.sub("https://[a-z.]+(?=/inbox/)", home.grafx.base_url, UPLOAD)
    failed = (507, 1, r"ON_DONE exited with code \d+: curl: .*507")
    for status, code, says in (failed, (201, 0, "delivered to")):
        home.grafx.fault("other", f"status-{status}", body=b"")
        assert re.search(f"{task_id} {says}", deliver(home, line, task_id, code))
        (sent,) = home.grafx.asked("other")[code - 1 :]
        assert (sent.method, sent.path) == ("PUT", f"/inbox/{task_id}.pdf")
        assert sent.body == home.grafx.body(task_id)


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


def test_readme_a_printer(home: Home) -> None:
    """A real CUPS server of its own, whose printer "office" writes into the file `paper`."""
    program = Path(find_program("cupsd", "cups-daemon")).resolve()
    find_program("lp", "cups-client")
    usr, task_id = program.parent.parent, home.grafx.add("pdf", size=100_000)
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
        server = subprocess.Popen([program, "-f", *configured], stderr=subprocess.DEVNULL)
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                eventually(lambda: sock.connect_ex(f"{place}/cups.sock") == 0, "the server")
            log = deliver(home, PRINT, task_id, CUPS_SERVER=f"{place}/cups.sock")
            assert re.search(rf"{task_id} ON_DONE: request id is office-\d", log)
            paper, body = place / "paper", home.grafx.body(task_id)
            eventually(lambda: paper.exists() and paper.read_bytes() == body, "it is printed")
        finally:
            server.terminate()
            server.wait(PATIENCE)
