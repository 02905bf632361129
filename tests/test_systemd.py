"""Under systemd: what it is told, what the journal gets, and `.systemd` in a system of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, ROOT, Home, Manager, eventually, find_program
from dotenv import dotenv_values
from sandbox import Sandbox

pytestmark = pytest.mark.xdist_group("systemd")  # one boot for all of them

SECTION = (ROOT / "README.md").read_text().partition("\n## Run under systemd\n")[2].partition("\n## ")[0]
# What is to be typed: a new line needs a test that pastes it.
LINES = re.findall(r"^    (.*)\n", SECTION, re.MULTILINE)
INSTALL, STATUS, ERRORS, LIST, SETTING, ROTATE, JOIN, CLEAN, RESET, BACKUP, RESTORE = LINES[:11]
REMOVE, TIMER, BACK, INSTALL_TWO, LIST_TWO, *DROP_IN_LINES = LINES[11:]
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.mark.parametrize("manager", ["an abstract name"], indirect=True)
def test_systemd_is_told_how_it_stands(home: Home, grafx: Sandbox, manager: Manager) -> None:
    """A network that is not there yet, or a database that nobody can read, is no reason to fail the start."""
    outage = grafx.fault("token", "status-503", times=None)
    home.write("{")
    os.utime(home.database, (1, 1))  # as if nobody were still saving it
    daemon = home.start(before=QUICK, NOTIFY_SOCKET=manager.address)
    manager.hears("^READY=1$")
    manager.hears(r"^STATUS=paused, retry in \d+ s: .*503.*database\.json: line 1, column 2")
    home.write(f'{{"{"k" * 9000}": 1, "{"k" * 9000}": 1}}')
    manager.hears("^STATUS=.*duplicate key")
    assert max(len(text) for _, text in manager.told) < 4096  # systemd reads no more
    home.wait_for(slow := grafx.add(size=8_000_000))
    grafx.fault("download", "slow", task_id=slow, rate=50_000)
    manager.hears(r"^STATUS=paused, retry in \d+ s: .*503[^;]*; 1 new \([0-9:]+\)$")
    grafx.end_fault(outage)
    manager.hears("^STATUS=.*\\b1 downloading\\b")
    home.db("add", grafx.add())
    manager.hears("^STATUS=.*\\b1 downloading\\b.*last delivery .*[0-9] \\([0-9]{2}:[0-9]{2}:[0-9]{2}\\)$")
    assert [text for _, text in manager.told if "STATUS=" in text and "WATCHDOG=1\n" not in text] == []
    assert daemon.stop() == 0
    assert manager.lines()[-1] == "STOPPING=1"


def test_systemd_is_not_told_ready_where_it_cannot_start(home: Home, manager: Manager) -> None:
    home.wait_for()
    first = home.start()
    first.says(" pending, ")
    assert home.run(before=QUICK, NOTIFY_SOCKET=manager.address).process.returncode == 1
    first.stop()
    home.grafx.refuse_credentials = True
    assert home.run(before=QUICK, NOTIFY_SOCKET=manager.address).process.returncode == 78
    assert "READY=1" not in manager.lines()


def test_the_journal_gets_levels_and_anything_else_times(home: Home, grafx: Sandbox) -> None:
    """In a terminal that a service started, the variable is that of another stream."""
    home.wait_for(grafx.add(), "..", projectID="p")
    (log := home.folder / "log-0").touch()  # its stderr
    stream = f"{log.stat().st_dev}:{log.stat().st_ino}"
    fails = "chili.order_done = lambda *_: {'one': 1}['two\\nlines']"
    lines = home.run("--once", "-v", before=fails, JOURNAL_STREAM=stream).log().splitlines()
    assert not [line for line in lines if re.match(rf"(?!<[3-7]>)|<.>({TIME}|DEBUG|INFO|WARN|ERR)", line)]
    errors = dict.fromkeys(("unexpected error,", "Traceback", '  File "', "KeyError: "), "<3>")
    others = {"not an order": "<4>", "polled 1 order": "<6>", " polled (": "<7>"}
    for words, level in (errors | others).items():
        assert {line[:3] for line in lines if words in line} == {level}, words
    lines = home.run("--once", JOURNAL_STREAM=stream).log().splitlines()
    assert not [line for line in lines if line.startswith("<")]
    assert re.match(f"{TIME} WARNING ", next(line for line in lines if "not an order" in line))


def test_a_secret_file_that_is_missing_or_empty_is_named(home: Home) -> None:
    file = home.folder / "secret"
    del home.env["SERVER_SECRET"]
    for _ in range(2):
        ended = home.run("--once", SERVER_SECRET_FILE=str(file))
        assert ended.process.returncode == 78
        assert re.fullmatch(".* ERROR .*SERVER_SECRET_FILE.*\n", ended.log())
        file.write_text("\n")


# What the commands find there. They cannot change the real system: what is written goes to a tmpfs, /sys and
# /proc/sys are read-only, /dev is its own, and what the machine would start by itself is masked.
BOOT = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/new
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/new
cd /mnt/new
mkdir -p opt/python
mount -o bind,ro "$1" opt/python
mount -t proc proc proc
mount -o bind,ro proc/sys proc/sys
mount -o bind,ro /sys sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 dev dev
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty dev
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
: >etc/fstab
for unit in lib/systemd/system/*.wants/* etc/systemd/system/*.wants/*; do
    case ${unit##*/} in
        *.target | systemd-journald.s* | systemd-journald-dev-log.socket | systemd-tmpfiles-setup.service) ;;
        *) ln -sfn /dev/null "etc/systemd/system/${unit##*/}" ;;
    esac
done
pivot_root . mnt
umount -l mnt
mount --make-rshared /
exec env -i container=docker /lib/systemd/systemd --unit=basic.target
"""
NAMESPACES = ("--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup")
CODE, STATE = "/opt/grafx-poller", "/var/lib/grafx-poller"
SETTINGS, SECRET = f"{CODE}/.env", f"{CODE}/server_secret"
CHECKOUT = "/root/my grafx"
DROP_IN = "/run/systemd/system/grafx-poller.service.d/test.conf"
DAEMON, ONCE, TWO = "grafx-poller", "grafx-poller-once", "grafx-poller@two"
HARD = "not $HOME or `id`, but \"5 %\" \\n # of a 'cup'"  # a secret that a shell or a parser might spoil


class Machine:
    """A systemd of its own as PID 1, on an overlay of this machine, on the same loopback."""

    def __init__(self, log: Path, grafx: Sandbox) -> None:
        if not sys.platform.startswith("linux") or os.geteuid() != 0:
            pytest.skip("needs root on Linux to boot a systemd: the units are NOT tested")
        for command in ("unshare", "nsenter", "setpriv", "pivot_root", "/lib/systemd/systemd"):
            find_program(command, "systemd util-linux", "what .systemd installs")
        try:
            subprocess.run(["unshare", *NAMESPACES, "true"], check=True, capture_output=True)
            (top,) = re.findall(r"^\S+ (\S+) cgroup2 ", Path("/proc/self/mounts").read_text(), re.MULTILINE)
            self.cgroup = Path(top, f"grafx-test-{os.getpid()}")
            self.cgroup.mkdir()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot make namespaces and a control group, the units are NOT tested: {error}")
        self.log, self.grafx = log, grafx
        enter = f'echo 0 >{self.cgroup}/cgroup.procs; exec setpriv --pdeathsig KILL unshare "$@"'
        command = ["sh", "-euc", enter, "sh", *NAMESPACES, "sh", "-c", BOOT, "sh", sys.base_prefix]
        with log.open("wb") as out:
            self.unshare = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def is_up(self) -> bool:
        assert self.unshare.poll() is None, self.log.read_text()
        self.init = Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text().strip()
        self.orders = self.path(f"{STATE}/orders")
        if not self.init or Path(f"/proc/{self.init}/comm").read_text() != "systemd\n":
            return False
        said = self.run("systemctl", "is-system-running", check=False).strip()
        assert said != "degraded", self.run("systemctl", "--failed")
        return said == "running"

    def close(self) -> None:
        self.unshare.kill()  # and with it its PID 1, which takes all of it down
        self.unshare.wait()
        events = self.cgroup / "cgroup.events"
        eventually(lambda: "populated 0" in events.read_text(), "the end of all its processes")
        for folder, _, _ in os.walk(self.cgroup, topdown=False):
            Path(folder).rmdir()

    def run(self, *command: str, check: bool = True) -> str:
        env = {"PATH": "/opt/python/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels"}
        done = subprocess.run(
            ["nsenter", "-t", self.init, "-a", *command], env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=300,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def systemctl(self, verb: str, unit: str = DAEMON, check: bool = True) -> None:
        self.run("systemctl", verb, unit, check=check)

    def paste(self, block: str, user: str = "root", folder: str = CHECKOUT, check: bool = True) -> str:
        """Run commands of the README, under a umask that hides all. To root, `sudo` is nothing."""
        place = folder if user == "root" else "/"
        script = f'umask 077; cd "{place}"; sudo() {{ env "$@"; }}\n{block}'
        return self.run("runuser", "-u", user, "--", "sh", "-euc", script, check=check)

    def add(self, *task_ids: str) -> None:
        for task_id in task_ids:
            assert "/database.json" in self.paste(LIST.replace(" list", f" add {task_id}"))

    def configure(self, service: str, unit: str = "") -> None:
        """Add to the daemon's unit, until the end of the test."""
        self.path(DROP_IN).parent.mkdir(parents=True, exist_ok=True)
        self.path(DROP_IN).write_text(f"[Unit]\n{unit}\n[Service]\n{service}\n")
        self.run("systemctl", "daemon-reload")

    def hold(self, task_id: str) -> Path:
        """Have a pass of the timer, whose ON_DONE ends as soon as there is the file that is returned."""
        go = self.path("/run/go")
        go.unlink(missing_ok=True)
        self.systemctl("stop")
        with self.path(SETTINGS).open("a") as settings:
            settings.write("ON_DONE=sh -c 'until test -e /run/go; do sleep 0.1; done'\n")
        self.add(task_id)
        self.systemctl("restart", f"{ONCE}.timer")
        eventually((self.orders / f"{task_id}.png").exists, "a command that waits")
        return go

    def path(self, place: str) -> Path:
        return Path(f"/proc/{self.init}/root{place}")

    def pending(self) -> list[str]:
        return list(json.loads(self.path(f"{STATE}/database.json").read_text())["orders"])

    def mode(self, place: str) -> str:
        return self.run("stat", "-c", "%a %U %G", place).strip()

    def may(self, user: str, *command: str) -> bool:
        """Whether a user may do that; where not, for no other reason."""
        script = ("runuser", "-u", user, "--", "sh", "-c", '"$@" >/dev/null && echo yes', "sh")
        said = self.run(*script, *command, check=False)
        assert re.search("^yes$|Permission denied|Read-only", said), said
        return said == "yes\n"

    def left(self) -> set[str]:
        """Paths of its name or of nobody; users, groups and units of its name."""
        find = "find /etc /opt /root /run /srv /tmp /var -path /opt/python -prune -o -path '/root/.*' -prune "
        find += r"-o \( -name '*grafx-poller*' -o -nouser -o -nogroup \) -print -prune"
        names = "getent passwd; getent group; systemctl list-units --all --plain"
        found = self.run("sh", "-c", f"{find}; ({names}) | grep grafx | grep -v ^run-cred", check=False)
        return {line for line in found.splitlines() if CHECKOUT not in line}

    def show(self, *names: str, unit: str = DAEMON) -> Any:
        shown = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names))
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return tuple(values[name] for name in names) if len(names) > 1 else values[names[0]]

    def becomes(self, state: str, unit: str = DAEMON) -> None:
        eventually(lambda: self.show("ActiveState", unit=unit) == state, f"{unit} is {state}")

    def delivers(self, *task_ids: str) -> None:
        for task_id in task_ids:
            file = self.orders / f"{task_id}.png"
            eventually(file.exists, f"the file of {task_id}")
            assert file.read_bytes() == self.grafx.body(task_id)
            eventually(lambda task_id=task_id: task_id not in self.pending(), "its order is done")

    def journal(self, *options: str) -> list[dict[str, Any]]:
        """Its entries since the test began, by journald's own word or by systemd's."""
        self.run("journalctl", "--sync")
        # Not by -u: whose a process was that has ended, a busy journald cannot find out any more.
        entries = map(json.loads, self.run("journalctl", "-o", "json", *options).splitlines())
        new = (entry for entry in entries if int(entry["__MONOTONIC_TIMESTAMP"]) > self.begin * 1e6)
        return [entry for entry in new if DAEMON in f"{entry.get('_SYSTEMD_UNIT')} {entry.get('UNIT')}"]

    def says(self, pattern: str, *options: str) -> dict[str, Any]:
        def look() -> Any:
            return [entry for entry in self.journal(*options) if re.search(pattern, entry["MESSAGE"])]

        return eventually(look, f"the journal says {pattern!r}")[0]


def put_wheels(folder: Path) -> None:
    """What pip is going to ask for, from what is installed here: there is no network there."""
    folder.mkdir()
    for name in ("requests", "python-dotenv", "certifi", "charset-normalizer", "idna", "urllib3"):
        distribution = importlib.metadata.distribution(name)
        wheel = f"{name.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            for file in distribution.files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    archive.write(str(file.locate()), str(file))


def dot_env(grafx: Sandbox) -> str:
    """As people write it, without an end to its last line."""
    given = grafx.settings("") | {"POLL_INTERVAL": "0.1", "DATABASE": "not/here", "ORDERS_DIR": "not/here"}
    quoted = given.pop("SERVER_SECRET").replace("\\", "\\\\").replace("'", "\\'")
    lines = ["# of GraFx", f"export SERVER_SECRET = '{quoted}'", "FRONT_SECRET=front-secret"]
    return "\n".join(lines + [f'{name} = "{value}"' for name, value in given.items()])


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the poller was installed, and www-data has joined the group."""
    log = tmp_path_factory.mktemp("machine") / "log"
    with Sandbox() as grafx, closing(Machine(log, grafx)) as machine:
        eventually(machine.is_up, "a booted systemd", 300)
        grafx.client_secret = HARD
        put_wheels(machine.path("/srv/wheels"))
        checkout = machine.path(CHECKOUT)
        shutil.copytree(ROOT / ".systemd", checkout / ".systemd")
        for name in ("poller.py", "chili.py", "db.py", "requirements.txt", "README.md"):
            shutil.copy(ROOT / name, checkout)
        machine.run("chmod", "-R", "go=", CHECKOUT)
        apache = machine.path("/etc/systemd/system/apache2.service")
        apache.write_text("[Service]\nUser=www-data\nExecStart=sleep infinity\n")
        machine.before = machine.left()
        (checkout / ".env").write_text(dot_env(grafx))
        machine.paste(INSTALL)
        machine.paste(JOIN)
        machine.run("cp", "-a", SETTINGS, SECRET, "/srv")
        yield machine


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """Its poller is stopped, and has no orders; settings and unit are put back after the test."""
    booted.systemctl("stop", "grafx-poller*")
    enable = "systemctl -q is-enabled grafx-poller || systemctl -q enable grafx-poller"
    booted.run("sh", "-c", f"{enable}; systemctl reset-failed; rm -rf {STATE}/* {STATE}/.[!.]*")
    booted.begin = time.monotonic()
    yield booted
    booted.grafx.clear_faults()
    booted.run("sh", "-c", f"rm -f {DROP_IN}; systemctl daemon-reload")
    if booted.path(CODE).exists():
        booted.run("cp", "-a", "/srv/.env", "/srv/server_secret", CODE)


def test_the_units_are_well_formed_and_rated_safe(machine: Machine) -> None:
    units = [f"/etc/systemd/system/{path.name}" for path in (ROOT / ".systemd").glob("*.*")]
    assert machine.run("systemd-analyze", "verify", *units) == ""
    for unit in (DAEMON, ONCE, f"{DAEMON}@"):
        file = f"/etc/systemd/system/{unit}.service"
        rated = machine.run("systemd-analyze", "security", "--offline=yes", file)
        assert float(re.findall(r"Overall exposure level for \S+: (\S+)", rated)[0]) <= 2.0
    for unit in (ONCE, TWO, DAEMON):  # a command that takes too much memory does not end the poller
        assert machine.show("OOMPolicy", "MemoryMax", unit=unit) == ("continue", str(256 << 20))
    assert machine.show("StartLimitBurst", "StartLimitIntervalUSec") == ("20", "1h")


def test_who_is_in_its_group_reads_files_and_adds_orders(machine: Machine) -> None:
    """The first order, too, under a umask that hides what it makes."""
    first, second = machine.grafx.add(), machine.grafx.add()
    python = f"cd {CODE}/current; bin/python"
    assert f"{STATE}/database.json" in machine.paste(f"{python} db.py add {first}", user="www-data")
    machine.systemctl("start")
    machine.delivers(first)
    machine.paste(f"{python} -c 'import db; db.add_order(\"{second}\", None)'", user="www-data")
    machine.delivers(second)
    modes = machine.run("find", STATE, "-printf", "%y %m %g\n").splitlines()
    assert set(modes) == {"d 2770 grafx-poller", "f 660 grafx-poller"}
    for place in (f"{STATE}/orders/{first}.png", f"{STATE}/database.json", SETTINGS):
        assert machine.may("www-data", "cat", place)
        assert not machine.may("nobody", "cat", place)


def test_it_has_no_privileges_and_the_secret_is_in_its_file_alone(machine: Machine) -> None:
    machine.systemctl("start")
    machine.add(done := machine.grafx.add())
    machine.delivers(done)
    proc = f"/proc/{machine.show('MainPID')}"
    assert machine.mode(proc).endswith("grafx-poller grafx-poller")
    status = machine.run("cat", f"{proc}/status")
    assert set(re.findall(r"^Cap\w+:\t(.*)", status, re.MULTILINE)) == {"0" * 16}
    assert "NoNewPrivs:\t1\nSeccomp:\t2\n" in status
    assert not machine.may("grafx-poller", "touch", f"{CODE}/current/poller.py")
    for place in (SECRET, "/run/credentials/grafx-poller.service/server_secret"):
        machine.run("test", "-s", place)
        assert not machine.may("www-data", "cat", place)
    assert not machine.may("grafx-poller", "cat", SECRET)
    # Install was run under umask 077, from a folder with mode 700, and with a .env with quotes and spaces.
    assert machine.path(SECRET).read_text() == f"{HARD}\n"
    assert machine.mode(SECRET) == "600 root root"
    assert machine.mode(SETTINGS) == "640 root grafx-poller"
    wanted = machine.grafx.settings(STATE) | {"POLL_INTERVAL": "0.1"}
    del wanted["SERVER_SECRET"]
    assert dotenv_values(machine.path(SETTINGS), interpolate=False) == wanted
    said = machine.paste(f"journalctl; systemctl show {DAEMON}; cat {proc}/environ {proc}/cmdline {SETTINGS}")
    assert done in said
    assert not [word for word in (HARD, *machine.grafx.tokens) if word in said]


def test_what_a_person_sees_of_it_and_a_stop_amid_a_download(machine: Machine) -> None:
    grafx = machine.grafx
    done, expired, slow = grafx.add(), grafx.add("expired"), grafx.add(size=8_000_000)
    grafx.fault("download", "slow", task_id=slow, rate=50_000)
    machine.add(done, expired, slow)
    machine.systemctl("start")
    machine.delivers(done)
    eventually(lambda: re.search('Status: ".*1 downloading', machine.paste(STATUS)), "its status")
    assert machine.show("WatchdogUSec", "TimeoutStopUSec") == ("5min", "1min 30s")
    assert {expired, slow} < set(machine.paste(LIST).split())
    assert machine.says(f"^{done} delivered")["PRIORITY"] == "6"
    assert re.findall(r" grafx-poller\[\d+\]: (\S+) failed", machine.paste(ERRORS))[-1] == expired
    machine.systemctl("stop")  # which does not wait for the download
    assert machine.says("^grafx-poller.service: Deactivated successfully")  # what it says of an exit with 0
    assert machine.pending() == [slow]


def test_whatever_ended_it_it_is_started_again_and_delivers_the_rest(machine: Machine) -> None:
    """Also after a SIGHUP, which systemd takes for an end in peace."""
    machine.configure("RestartSec=0.1")
    rest = machine.grafx.add(size=2_000_000)
    machine.grafx.fault("download", "slow", task_id=rest, rate=25_000)
    machine.systemctl("start")
    machine.run("kill", "-HUP", machine.show("MainPID"))
    eventually(lambda: machine.show("ActiveState", "NRestarts") == ("active", "1"), "another process")
    machine.add(rest)
    eventually(lambda: list(machine.orders.glob(".*.part")), "a download")
    machine.run("kill", "-KILL", machine.show("MainPID"))
    machine.delivers(rest)
    assert machine.show("NRestarts") == "2"


def test_a_loop_that_hangs_is_ended_by_the_watchdog_and_started_again(machine: Machine) -> None:
    """Its downloads go on meanwhile, so it is the loop that feeds the watchdog."""
    slow = machine.grafx.add(size=8_000_000)
    machine.grafx.fault("download", "slow", task_id=slow, rate=50_000)
    machine.add(slow)
    machine.configure("WatchdogSec=3\nRestartSec=0.1")
    machine.systemctl("start")
    eventually(lambda: list(machine.orders.glob(".*.part")), "a download")
    hung, database = machine.show("MainPID"), machine.path(f"{STATE}/database.json")
    kept, pipe = database.with_name("kept"), database.with_name("pipe")
    kept.hardlink_to(database)
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    pipe.replace(database)  # to open this hangs until somebody writes into it
    assert machine.says(r"Watchdog timeout \(limit 3s\)")
    writer = os.open(database, os.O_RDWR)
    kept.replace(database)
    os.close(writer)  # so the next process does not hang, whether it has opened the pipe or not
    # Where it hung: a traceback of each thread, among the lines of that process.
    assert machine.says(rf'File "{CODE}/current/poller.py", line \d+ in main')["_PID"] == hung
    machine.delivers(slow)
    assert machine.show("MainPID") not in (hung, "0")


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (SETTING.replace("nano", "sed -i s/0.1/often/"), "78", "POLL_INTERVAL is 'often'"),
        (ROTATE.replace("sudo nano", "echo wrong-secret >"), "78", "SERVER_ID"),
        (ROTATE.replace("nano", "rm"), "243", "Failed at step CREDENTIALS"),
    ],
    ids=["wrong setting", "wrong secret", "no secret"],
)
def test_what_no_restart_mends_is_said_once(machine: Machine, command: str, code: str, says: str) -> None:
    machine.configure("RestartSec=0.1")
    machine.paste(command, check=False)
    machine.becomes("failed")  # a unit that is to be started again is "activating"
    assert machine.show("ExecMainStatus", "NRestarts") == (code, "0")
    assert machine.says(says, "-p", "err")
    assert len([entry for entry in machine.journal() if says in entry["MESSAGE"]]) == 1
    assert "wrong-secret" not in json.dumps(machine.journal())


def test_what_ends_again_and_again_is_failed_until_it_is_reset(machine: Machine) -> None:
    """A library that is broken; its traceback has no level of its own. Three starts, to save time."""
    machine.configure("RestartSec=0.1\nType=exec", "StartLimitBurst=3")
    (library,) = machine.path(f"{CODE}/current").glob("lib/*/site-packages/requests/__init__.py")
    whole = library.read_text()
    library.write_text("raise ImportError('broken')\n")
    machine.systemctl("start")
    machine.becomes("failed")
    library.write_text(whole)
    assert machine.says("^ImportError: broken", "-p", "err")
    machine.paste(RESET)
    assert machine.show("ActiveState", "SubState", "NRestarts") == ("active", "running", "0")


def test_the_lines_that_on_done_needs(machine: Machine) -> None:
    """A folder of another program, on a disk that is mounted after the start; and an alert."""
    machine.run("useradd", "--system", "--user-group", "dam")
    machine.path("/srv/dam").mkdir()
    machine.path("/tmp/lines").write_text("\n".join(DROP_IN_LINES))
    (command,) = re.findall("`sudo (systemctl edit grafx-poller)`", SECTION)  # which wants a terminal
    editor = "sed -i /^###.Anything.between.here/r/tmp/lines"
    machine.paste(f"SYSTEMD_EDITOR='{editor}' script -qec '{command}' /dev/null")
    machine.configure("Environment=ON_DONE='cp {} /srv/dam/inbox'")
    machine.systemctl("start")
    machine.add(task := machine.grafx.add())
    machine.says(f"^{task} ON_DONE exited with code 1: .*Read-only file system")
    machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/srv/dam")
    machine.run("install", "-d", "-o", "dam", "-g", "dam", "-m", "2775", "/srv/dam/inbox")
    machine.delivers(task)
    machine.systemctl("restart")  # with the disk
    machine.add(later := machine.grafx.add())
    machine.delivers(later)
    assert machine.mode(f"/srv/dam/inbox/{later}.png") == "660 grafx-poller dam"
    alert = "[Service]\nExecStart=touch /tmp/alerted\n"
    machine.path("/etc/systemd/system/my-alert.service").write_text(alert)
    machine.path(SECRET).unlink()
    machine.paste(RESET, check=False)
    eventually(machine.path("/tmp/alerted").exists, "the alert")


def test_backup_restore_and_what_is_old(machine: Machine) -> None:
    old, new, kept = machine.grafx.add(), machine.grafx.add(), machine.grafx.add()
    machine.grafx.fault("task", "status-204", task_id=kept, times=None)
    machine.add(kept, old, new)
    machine.systemctl("start")
    machine.delivers(old, new)
    machine.run("touch", "-d", "31 days ago", f"{STATE}/orders/{old}.png", f"{STATE}/orders/.poller.pid")
    machine.paste(f"{BACKUP}\n{CLEAN}")
    assert {path.name for path in machine.orders.iterdir()} == {f"{new}.png", ".poller.pid"}
    machine.run("sh", "-c", "mkdir /mnt/backup && tar -xzf /root/grafx.tgz -C /mnt/backup")
    machine.path(f"{STATE}/database.json").unlink()
    machine.paste(RESTORE, folder=f"/mnt/backup{STATE}")
    machine.grafx.clear_faults()
    machine.delivers(kept)
    for place in (SETTINGS, SECRET):
        assert machine.path(f"/mnt/backup{place}").read_bytes() == machine.path(place).read_bytes()
    assert not list(machine.path(f"/mnt/backup{CODE}").glob("venv-*"))


def test_the_timer_and_back(machine: Machine) -> None:
    done, expired, pending, later = map(machine.grafx.add, ("png", "expired", "never", "png"))
    machine.add(pending, done, expired)
    machine.paste(TIMER)
    machine.says(f"^{ONCE}.service: Deactivated successfully")
    assert machine.says(f"^{expired} failed")["PRIORITY"] == "3"  # and so it ended with 1
    machine.delivers(done)
    assert machine.pending() == [pending]
    assert machine.show("ActiveState", "UnitFileState") == ("inactive", "disabled")
    timer = machine.show("ActiveState", "UnitFileState", "NextElapseUSecMonotonic", unit=f"{ONCE}.timer")
    assert timer[:2] == ("active", "enabled")
    assert timer[2] not in ("", "0", "infinity")

    # Back, while it runs.
    go = machine.hold(later)
    machine.paste(BACK)
    assert machine.show("ActiveState", unit=ONCE) == "activating"
    assert machine.show("ActiveState") == "inactive"  # it waits
    go.touch()
    machine.delivers(later)
    machine.becomes("active")
    assert machine.show("NRestarts", "UnitFileState") == ("0", "enabled")
    assert machine.show("ActiveState", "UnitFileState", unit=f"{ONCE}.timer") == ("inactive", "disabled")


def test_a_second_environment_and_upgrades(machine: Machine) -> None:
    checkout, current = machine.path(CHECKOUT), machine.path(f"{CODE}/current")
    # Python went with an upgrade of the distribution. What installs another environment mends this one, too.
    (current / "bin/python").unlink()
    machine.systemctl("start", check=False)
    machine.becomes("failed")
    assert machine.show("ExecMainStatus", "NRestarts") == ("203", "0")
    with Sandbox() as other:
        (checkout / ".env.two").write_text(dot_env(other))
        machine.paste(INSTALL_TWO)
        machine.add(pending := machine.grafx.add("never"))
        machine.paste(LIST_TWO.replace(" list", f" add {(of_two := other.add())}"))
        file = f"/var/lib/{TWO}/orders/{of_two}.png"
        eventually(machine.path(file).exists, "the file of the other environment")
        assert machine.pending() == [pending]
        assert machine.mode(file) == "660 grafx-poller grafx-poller"
        machine.becomes("active")
        assert machine.show("ActiveState", "UnitFileState", unit=TWO) == ("active", "enabled")

        # One that cannot be installed changes nothing.
        go = machine.hold(held := machine.grafx.add())
        machine.paste("echo '# newer' | tee -a chili.py .systemd/grafx-poller.service")

        def stands() -> Any:
            files = current / "chili.py", machine.path("/etc/systemd/system/grafx-poller.service")
            is_newer = [file.read_text().endswith("# newer\n") for file in files]
            return is_newer, current.readlink(), machine.show("MainPID", unit=TWO)

        before, a_pass = stands(), machine.show("MainPID", unit=ONCE)
        (checkout / ".env.three").write_text(dot_env(other).replace("BASEURL", "BASE_URL"))
        refused = machine.paste(INSTALL_TWO.replace("two", "three"), check=False)
        assert refused.startswith("install: BASEURL is missing: put https://ENVIRONMENT.chili-publish.")
        assert stands() == before

        # One that does. It restarts what runs, but for a pass of the timer; what was stopped stays stopped.
        secrets = [machine.path(place).read_bytes() for place in (SETTINGS, SECRET)]
        machine.paste(INSTALL)
        eventually(lambda: stands()[2] not in ("0", before[2]), "a restart")
        assert stands()[0] == [True, True]
        assert {path.name for path in current.parent.glob("venv-*")} == {str(before[1]), str(stands()[1])}
        assert machine.show("MainPID", unit=ONCE) == a_pass
        go.touch()
        machine.delivers(held)
        assert machine.show("ActiveState") == "inactive"
        assert [machine.path(place).read_bytes() for place in (SETTINGS, SECRET)] == secrets


def test_nothing_is_left_where_it_was_removed(machine: Machine) -> None:
    """The last one: the machine has no poller any more."""
    machine.systemctl("start")
    machine.systemctl("start", "grafx-poller@broken", check=False)
    machine.path("/var/lib/grafx-poller@broken/orders").mkdir(parents=True, exist_ok=True)
    machine.run("rm", "/srv/.env", "/srv/server_secret")
    before = machine.left()
    machine.paste(REMOVE, check=False)  # nobody answers
    assert machine.left() == before
    machine.paste(f"echo y | {REMOVE}")
    assert machine.left() == machine.before
