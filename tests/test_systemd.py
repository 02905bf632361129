"""Under systemd: what it is told, what the journal gets, and `.systemd` in a system of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, QUICK, ROOT, Home, Manager, eventually, find_program
from dotenv import dotenv_values
from sandbox import Sandbox

README = (ROOT / "README.md").read_text()
SECTION = README.partition("\n## Run under systemd\n")[2].partition("\n## ")[0]
# Its blocks, one after the other, and their lines: a new one needs a test that pastes it.
INSTALL, DAY, TIMERS, SEVERAL, DROP_IN_LINES = map(
    textwrap.dedent, re.findall(r"(?:^    .*\n)+", SECTION, re.MULTILINE)
)
STATUS, ERRORS, LIST, SETTING, ROTATE, JOIN, CLEAN, RESET, BACKUP, RESTORE, REMOVE = DAY.splitlines()
TIMER, BACK = TIMERS.splitlines()
INSTALL_TWO, LIST_TWO = SEVERAL.splitlines()
UNITS = (
    "grafx-poller.service",
    "grafx-poller@.service",
    "grafx-poller-once.service",
    "grafx-poller-once.timer",
)
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


# --- the notify protocol -----------------------------------------------------------------------------------


@pytest.mark.parametrize("manager", ["a path", "an abstract name"], indirect=True)
def test_systemd_is_told_how_it_stands(home: Home, grafx: Sandbox, manager: Manager) -> None:
    slow, expired, done = grafx.add(size=8_000_000), grafx.add("expired"), grafx.add()
    grafx.fault("download", "slow", task_id=slow, rate=200_000)
    home.wait_for(slow, expired)
    daemon = home.start(before=QUICK, NOTIFY_SOCKET=manager.address)
    manager.hears("^READY=1$")
    manager.hears("^STATUS=.*\\b1 downloading\\b")
    assert not [line for line in manager.lines() if re.search("last delivery .*[0-9]", line)]
    home.db("add", done)
    manager.hears("^STATUS=.*\\b1 downloading\\b.*last delivery .*[0-9] \\([0-9]{2}:[0-9]{2}:[0-9]{2}\\)$")
    assert manager.lines().count("READY=1") == 1
    assert manager.lines().count("WATCHDOG=1") >= 2
    assert "STOPPING=1" not in manager.lines()
    assert daemon.stop() == 0
    assert manager.lines()[-1] == "STOPPING=1"


def test_systemd_is_told_that_grafx_cannot_be_reached(home: Home, grafx: Sandbox, manager: Manager) -> None:
    grafx.fault("token", "status-503", times=None)
    home.wait_for(grafx.add())
    daemon = home.start(before=QUICK, NOTIFY_SOCKET=manager.address)
    manager.hears("^READY=1$")  # a network that is not there yet is no reason to fail the start
    manager.hears(r"^STATUS=paused, retry in \d+ s: .*503.*; 1 new \([0-9:]+\)$")
    grafx.clear_faults()
    daemon.says(" delivered")
    manager.forget()
    manager.hears("^STATUS=(?!.*(retrying|503))idle, 0 pending; last delivery .*[0-9] ")
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    "wrong", ["settings", "credentials", "a poller of its database", "a poller of its folder"]
)
def test_systemd_is_not_told_ready_where_it_cannot_start(
    home: Home, grafx: Sandbox, manager: Manager, wrong: str
) -> None:
    env, code, says = {"POLL_INTERVAL": "often"}, 78, "POLL_INTERVAL is 'often'"
    if wrong == "credentials":
        grafx.refuse_credentials, env, says = True, {}, "rejects SERVER_ID and SERVER_SECRET"
        grafx.fault("token", "delay", seconds=1.5)
    elif wrong != "settings":
        home.wait_for("another-has-it")
        home.start().says(" pending, ")
        env, code, says = {}, 1, "is already running"
    if wrong == "a poller of its folder":
        env, says = {"DATABASE": str(home.folder / "other.json")}, "Give each an ORDERS_DIR of its own."
    ended = home.run(before=QUICK, NOTIFY_SOCKET=manager.address, **env)
    assert ended.process.returncode == code
    assert says in ended.log()
    assert "READY=1" not in manager.lines()


@pytest.mark.parametrize("wrong", ["no folder for the database", "a file as ORDERS_DIR", "a broken database"])
def test_systemd_is_told_ready_though_a_disk_is_not_there_yet(
    home: Home, grafx: Sandbox, manager: Manager, wrong: str
) -> None:
    """After a while; and all the while that the loop turns, or the watchdog would end it."""
    home.wait_for(task := grafx.add())
    disk, kept, env = home.folder / "disk", home.database.read_text(), {}
    if wrong == "no folder for the database":
        env, says = {"DATABASE": f"{disk}/database.json"}, "paused, retry.*: cannot lock .*Make the folder"
    elif wrong == "a file as ORDERS_DIR":
        home.orders.rmdir()
        home.orders.write_text("")
        says = "paused, retry.*: cannot write to .*Make it a folder"
    else:
        home.write("{")
        os.utime(home.database, (1, 1))  # as if nobody were still saving it
        says = r"database\.json: line 1"
    soon = "init = poller.Status.__init__; poller.Status.__init__ = lambda status, screen: ("
    soon += "init(status, screen), setattr(status, 'ready_by', poller.time.monotonic() + 2))[0]"
    daemon = home.start(before=f"{QUICK}; {soon}", NOTIFY_SOCKET=manager.address, **env)
    manager.hears("^READY=1$")
    manager.forget()
    manager.hears("^WATCHDOG=1$")
    manager.hears(f"^STATUS=.*{says}")
    if env:
        disk.mkdir()
        home.database.rename(disk / "database.json")
    elif home.orders.is_file():
        home.orders.unlink()
    else:
        home.write(kept)
    daemon.says(f"{task} delivered")
    assert "READY=1" not in manager.lines()
    assert daemon.stop() == 0


def test_systemd_is_told_why_the_database_cannot_be_read(
    home: Home, grafx: Sandbox, manager: Manager
) -> None:
    home.wait_for(grafx.add("never"))
    daemon = home.start(before=QUICK, NOTIFY_SOCKET=manager.address)
    manager.hears("^STATUS=")
    home.write("{")
    os.utime(home.database, (1, 1))  # as if nobody were still saving it
    manager.hears(r"^STATUS=.*database\.json: line 1, column 2")
    home.wait_for(grafx.add())
    daemon.says(" delivered")
    manager.forget()
    manager.hears("^STATUS=(?!.*line 1)")
    assert daemon.stop() == 0


def test_a_loop_that_hangs_does_not_feed_the_watchdog(home: Home, grafx: Sandbox, manager: Manager) -> None:
    """Its threads go on meanwhile, so it is the loop that speaks."""
    slow = grafx.add(size=8_000_000)
    grafx.fault("download", "slow", task_id=slow, rate=200_000)
    home.wait_for(slow)
    daemon = home.start(before=QUICK, NOTIFY_SOCKET=manager.address)
    manager.hears("^STATUS=.*1 downloading")
    pipe = home.folder / "pipe"
    os.mkfifo(pipe)
    data = home.database.read_bytes()
    pipe.replace(home.database)  # to open this hangs until somebody writes into it

    def silent() -> bool:
        manager.lines()
        return time.monotonic() > manager.told[-1][0] + 2

    (part,) = home.orders.glob(".*.part")
    eventually(silent, "no word from a loop that hangs")
    size = part.stat().st_size
    eventually(lambda: part.stat().st_size > size, "a download that goes on")
    manager.forget()
    temp = home.folder / "edited"
    temp.write_bytes(data)
    fifo = os.open(home.database, os.O_WRONLY)
    temp.replace(home.database)
    os.close(fifo)
    manager.hears("^WATCHDOG=1$")
    assert daemon.stop() == 0


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@grafx-test-nobody", "", "x" * 200])
def test_nobody_who_listens_is_no_reason_to_fail(home: Home, grafx: Sandbox, address: str) -> None:
    home.wait_for(grafx.add())
    daemon = home.start(NOTIFY_SOCKET=address)
    daemon.says(" delivered")
    assert daemon.stop() == 0


# --- the journal -------------------------------------------------------------------------------------------


def logged(home: Home, grafx: Sandbox, journal: bool) -> list[str]:
    """The lines of a run with one order of each kind of log level."""
    grafx.fault("task", "status-503", task_id=(retried := grafx.add()), times=None)
    home.wait_for(grafx.add(), grafx.add("expired"), retried, "..", "foresee-not")
    log = home.folder / f"log-{len(home.pollers)}"  # its stderr
    log.touch()
    stat = log.stat()
    stream = f"{stat.st_dev}:{stat.st_ino + (not journal)}"
    before = (
        f"{QUICK}; real = chili.order_done; "
        "chili.order_done = lambda t, *a: real(t, *a) if t != 'foresee-not' else {'one': 1}['two\\nlines']"
    )
    ended = home.run("--once", "-v", before=before, JOURNAL_STREAM=stream)
    assert ended.process.returncode == 1
    return ended.log().splitlines()


def test_the_journal_gets_levels_and_no_times(home: Home, grafx: Sandbox) -> None:
    lines = logged(home, grafx, journal=True)
    wrong = rf"(?!<[3-7]>)|<.>({TIME}|DEBUG|INFO|WARNING|ERROR)"
    assert not [line for line in lines if re.match(wrong, line)]
    for level, pattern in (
        (7, "GET "),
        (6, " delivered to "),
        (4, "left alone"),
        (4, " cannot be polled: "),
        (3, " failed: "),
        (3, "unexpected error"),
        (3, "Traceback"),
        (3, '  File "'),
        (3, "KeyError: "),
    ):
        found = [line for line in lines if pattern in line]
        assert found, (pattern, lines)
        assert {line[:3] for line in found} == {f"<{level}>"}, found
    start = next(place for place, line in enumerate(lines) if "unexpected error" in line)
    end = next(place for place, line in enumerate(lines) if "KeyError: " in line)
    assert end > start + 2
    assert {line[:3] for line in lines[start : end + 1]} == {"<3>"}


def test_anything_else_gets_times_and_no_levels(home: Home, grafx: Sandbox) -> None:
    """Also where the journal has the stderr of a parent, as with `poller.py 2>file` in a service."""
    lines = logged(home, grafx, journal=False)
    assert not [line for line in lines if line.startswith("<")]
    assert re.match(f"{TIME} WARNING ", next(line for line in lines if "left alone" in line))


# --- the secret in a file ----------------------------------------------------------------------------------


def test_the_secret_may_be_in_a_file(home: Home, grafx: Sandbox) -> None:
    home.wait_for(task := grafx.add())
    file = home.folder / "secret"
    file.write_text(f"{grafx.client_secret}\n")
    del home.env["SERVER_SECRET"]
    ended = home.run("--once", SERVER_SECRET_FILE=str(file))
    assert ended.process.returncode == 0, ended.log()
    assert home.files() == [f"{task}.png"]
    assert grafx.client_secret not in ended.log()


@pytest.mark.parametrize("wrong", ["both", "missing", "empty", "a folder", "no text"])
def test_a_secret_file_that_is_no_good_is_a_settings_error(home: Home, grafx: Sandbox, wrong: str) -> None:
    file = home.folder / "secret"
    if wrong == "both":
        file.write_text(grafx.client_secret)
    else:
        del home.env["SERVER_SECRET"]
    if wrong == "empty":
        file.write_text("\n")
    elif wrong == "a folder":
        file.mkdir()
    elif wrong == "no text":
        file.write_bytes(b"\xff\xfe")
    for option in ("--once", "--check"):
        ended = home.run(option, SERVER_SECRET_FILE=str(file))
        assert ended.process.returncode == 78, ended.log()
        (line,) = ended.log().splitlines()
        assert "SERVER_SECRET_FILE" in line
        assert grafx.client_secret not in line
    assert grafx.requests == []


# --- the units ---------------------------------------------------------------------------------------------

# What the commands find in the system that they are tried in. They cannot change the real one: what is
# written goes to a tmpfs, /sys and /proc/sys are read-only, /dev is its own, and what the machine would start
# by itself is masked.
BOOT = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/new
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/new
mkdir -p /mnt/new/opt/python
mount --bind "$1" /mnt/new/opt/python
mount -o remount,bind,ro /mnt/new/opt/python
cd /mnt/new
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind /sys sys
mount -o remount,bind,ro sys
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


class Machine:
    """A systemd of its own as PID 1, on an overlay of this machine, on the same loopback."""

    def __init__(self, log: Path) -> None:
        if not sys.platform.startswith("linux") or os.geteuid() != 0:
            pytest.skip("needs root on Linux to boot a systemd: the units are NOT tested")
        for command in ("unshare", "nsenter", "setpriv", "pivot_root", "/lib/systemd/systemd"):
            find_program(command, "systemd util-linux", "what .systemd installs")
        probe = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
        found = re.search(r"^\S+ (\S+) cgroup2 ", Path("/proc/self/mounts").read_text(), re.MULTILINE)
        if probe.returncode or found is None:
            pytest.skip(f"needs unshare and cgroup2, the units are NOT tested: {probe.stderr.strip()}")
        self.cgroup = Path(found[1], f"grafx-test-{os.getpid()}")
        try:
            self.cgroup.mkdir()
        except OSError as error:
            pytest.skip(f"cannot make a control group, the units are NOT tested: {error}")

        self.log = log
        inner = ["unshare", *NAMESPACES, "sh", "-c", BOOT, "sh", sys.base_prefix]
        with log.open("wb") as output:
            self.unshare = subprocess.Popen(
                ["sh", "-euc", 'echo 0 >"$0"; exec setpriv --pdeathsig KILL "$@"',
                 str(self.cgroup / "cgroup.procs"), *inner],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            self.pid = int(eventually(self.child, "a first process"))
            eventually(self.is_up, "a booted systemd")
        except BaseException:
            self.end()
            raise

    def child(self) -> str:
        assert self.unshare.poll() is None, self.log.read_text()
        return Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text().strip()

    def is_up(self) -> bool:
        assert self.unshare.poll() is None, self.log.read_text()
        if Path(f"/proc/{self.pid}/comm").read_text() != "systemd\n":
            return False
        running = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        assert running != "degraded", self.run("systemctl", "--failed", check=False).stdout
        return running == "running"

    def end(self) -> None:
        """SIGKILL to its PID 1 takes all of it down."""
        self.unshare.kill()  # and with it its child
        self.unshare.wait()

        def gone() -> bool:
            with suppress(OSError):  # a last process may still be on its way out
                for folder, _, _ in os.walk(self.cgroup, topdown=False):
                    Path(folder).rmdir()
            return not self.cgroup.exists()

        eventually(gone, "an empty control group")

    def run(self, *command: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        path = "/opt/python/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels"}
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-a", *command],
            env={"PATH": path, "LC_ALL": "C.UTF-8", **pip}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=60, **more,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}"
        return done

    def paste(self, block: str, user: str = "root", folder: str = CHECKOUT, check: bool = True) -> str:
        """Run commands of the README, under a umask that hides all. To root, `sudo` is nothing."""
        place = folder if user == "root" else "/"
        script = f'umask 077; cd "{place}"; sudo() {{ env "$@"; }}\n{block}'
        return self.run("runuser", "-u", user, "--", "sh", "-euc", script, check=check).stdout

    def db(self, *arguments: str, user: str = "root", like: str = LIST, check: bool = True) -> str:
        """As LIST has it; who is not root has no need of its sudo."""
        command = like.partition("#")[0].replace(" list", f" {' '.join(arguments)}")
        return self.paste(command if user == "root" else command.replace("sudo ", ""), user, check=check)

    def left(self) -> set[str]:
        """Paths of its name or of nobody, lines of its name in users and groups, and units of its name."""
        find = "find /etc /opt /root /run /srv /tmp /var -path /opt/python -prune -o -path '/root/.*' -prune "
        find += r"-o \( -name '*grafx-poller*' -o -nouser -o -nogroup \) -print -prune"
        files = self.run("sh", "-c", find).stdout
        rows = self.run("sh", "-c", "getent passwd; getent group; cat /etc/shadow /etc/gshadow").stdout
        units = self.run("systemctl", "list-units", "--all", "--plain", "--no-legend").stdout
        lines = [
            line
            for line in (rows + units).splitlines()
            if "grafx" in line and not line.startswith("run-cred")
        ]
        return {line for line in (*files.splitlines(), *lines) if CHECKOUT not in line}

    def may(self, user: str, *command: str) -> bool:
        """Whether a user may do that; where not, for no other reason."""
        done = self.run("runuser", "-u", user, "--", *command, check=False)
        assert done.returncode == 0 or re.search(r"Permission denied|Read-only", done.stdout), done.stdout
        return done.returncode == 0

    def path(self, place: str) -> Path:
        return Path(f"/proc/{self.pid}/root{place}")

    def mode(self, path: Path) -> tuple[str, str, str]:
        """Of a path: its mode, its user and its group."""
        names = []
        for file, number in (("passwd", path.lstat().st_uid), ("group", path.lstat().st_gid)):
            rows = [line.split(":") for line in self.path(f"/etc/{file}").read_text().splitlines()]
            names.append(next(row[0] for row in rows if row[2] == str(number)))
        return oct(path.lstat().st_mode & 0o7777)[2:], names[0], names[1]

    def show(self, *names: str, unit: str = "grafx-poller") -> Any:
        shown = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names)).stdout
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return tuple(values[name] for name in names) if len(names) > 1 else values[names[0]]

    def configure(self, text: str) -> None:
        """Add to the unit, until the end of the test."""
        self.path(DROP_IN).parent.mkdir(parents=True, exist_ok=True)
        self.path(DROP_IN).write_text(f"[Service]\n{text}\n")
        self.run("systemctl", "daemon-reload")

    def program(self, name: str, script: str) -> None:
        path = self.path(f"/usr/bin/{name}")
        path.write_text(f"#!/bin/sh\nset -e\n{script}\n")
        path.chmod(0o755)


def put_wheels(folder: Path) -> None:
    """What pip is going to ask for, from what is installed here: there is no network there."""
    folder.mkdir()
    wanted = ["requests", "python-dotenv"]
    for name in wanted:
        distribution = importlib.metadata.distribution(name)
        wanted += [
            re.split(r"[^\w.-]", line)[0]
            for line in distribution.requires or ()
            if "extra ==" not in line and re.split(r"[^\w.-]", line)[0] not in wanted
        ]
        wheel = f"{name.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            for file in distribution.files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    archive.write(str(file.locate()), str(file))


HARD = "not $HOME or `id`, but \"5 %\" \\n # of a 'cup'"  # what a shell or a parser might spoil


def dot_env(grafx: Sandbox, **more: str) -> str:
    """A .env as people write it, without an end to its last line."""
    given = grafx.settings("") | {"POLL_INTERVAL": "2"} | more
    quoted = given.pop("SERVER_SECRET").replace("\\", "\\\\").replace("'", "\\'")
    given["DATABASE"] = given["ORDERS_DIR"] = "not/here"
    lines = [f'{name} = "{value}"' for name, value in given.items()]
    return "\n".join(
        ["# of GraFx", f"export SERVER_SECRET = '{quoted}'", "FRONT_SECRET=front-secret", *lines]
    )


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Sandbox]]:
    """A machine on which the poller was installed, after some tries, and www-data has joined the group."""
    machine = Machine(tmp_path_factory.mktemp("machine") / "log")
    try:
        with Sandbox() as grafx:
            grafx.client_secret = HARD
            put_wheels(machine.path("/srv/wheels"))
            checkout = machine.path(CHECKOUT)
            shutil.copytree(ROOT / ".systemd", checkout / ".systemd")
            for name in ("poller.py", "chili.py", "db.py", "requirements.txt", "README.md"):
                shutil.copy(ROOT / name, checkout)
            for path in (checkout, *checkout.rglob("*")):
                path.chmod(path.stat().st_mode & 0o700)
            apache = machine.path("/etc/systemd/system/apache2.service")
            apache.write_text("[Service]\nUser=www-data\nExecStart=sleep infinity\n")
            before = machine.left()
            machine.refused = [machine.paste(INSTALL, check=False)]
            machine.run("useradd", "--no-user-group", "--gid", "users", "grafx-poller")
            (checkout / ".env").write_text(dot_env(grafx).replace("BASEURL", "BASE_URL"))
            machine.refused.append(machine.paste(INSTALL, check=False))
            machine.run("userdel", "grafx-poller")
            assert machine.left() == before
            machine.refused.append(machine.paste(INSTALL, check=False))
            assert machine.left().difference(before) == {CODE}
            (checkout / ".env").write_text(dot_env(grafx))
            machine.paste(INSTALL)
            machine.paste(JOIN)
            machine.before = before
            yield machine, grafx
    finally:
        machine.end()


class Service:
    """The README's unit on the machine, with nothing in its state."""

    def __init__(self, machine: Machine, grafx: Sandbox) -> None:
        self.machine, self.grafx = machine, grafx
        self.begin = time.monotonic()
        self.orders = machine.path(f"{STATE}/orders")

    def start(self) -> None:
        self.machine.run("systemctl", "start", "grafx-poller")

    def pid(self) -> str:
        pid: str = self.machine.show("MainPID")
        return pid

    def add(self, *task_ids: str) -> None:
        for task_id in task_ids:
            self.machine.db("add", task_id)

    def set(self, line: str) -> None:
        """Add to its settings, until the end of the test."""
        with self.machine.path(SETTINGS).open("a") as settings:
            settings.write(f"{line}\n")

    def hold(self) -> Path:
        """Have an ON_DONE that ends as soon as there is the file that is returned."""
        self.machine.program("hold", "until test -e /run/go; do sleep 0.1; done")
        self.set("ON_DONE=hold")
        return self.machine.path("/run/go")

    def once(self, *task_ids: str) -> None:
        """Add orders after the end of a pass, and have the timer start another one; a minute is long."""
        once = "grafx-poller-once.service"
        eventually(lambda: self.machine.show("ActiveState", unit=once) == "inactive", "the end of a pass")
        self.add(*task_ids)
        self.machine.run("systemctl", "restart", "grafx-poller-once.timer")

    def state(self) -> Any:
        return json.loads(self.machine.path(f"{STATE}/database.json").read_text())

    def delivers(self, *task_ids: str) -> None:
        for task_id in task_ids:
            file = self.orders / f"{task_id}.png"
            eventually(file.exists, f"the file of {task_id}")
            assert file.read_bytes() == self.grafx.body(task_id)
            eventually(lambda task_id=task_id: task_id not in self.state()["orders"], "its order is done")

    def journal(self, *options: str) -> list[dict[str, Any]]:
        self.machine.run("journalctl", "--sync")
        # Not by -u: whose a process was that has ended, a busy journald cannot find out any more.
        lines = self.machine.run("journalctl", "-o", "json", *options).stdout.splitlines()
        entries = [entry for entry in map(json.loads, lines)
                   if int(entry["__MONOTONIC_TIMESTAMP"]) > self.begin * 1e6]  # fmt: skip
        # By journald's own word, or by systemd's.
        return [entry for entry in entries
                if "grafx-poller" in f"{entry.get('_SYSTEMD_UNIT')} {entry.get('UNIT')}"]  # fmt: skip

    def says(self, pattern: str, *options: str) -> dict[str, Any]:
        def look() -> Any:
            entries = self.journal(*options)
            return next((entry for entry in entries if re.search(pattern, entry["MESSAGE"])), None)

        found: dict[str, Any] = eventually(look, f"the journal says {pattern!r}")
        return found


@pytest.fixture
def service(booted: tuple[Machine, Sandbox]) -> Iterator[Service]:
    machine, grafx = booted
    machine.run("systemctl", "stop", "grafx-poller")
    machine.run("systemctl", "reset-failed")
    for place in machine.path(STATE).iterdir() if machine.path(STATE).exists() else ():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    machine.run("cp", "-a", SETTINGS, SECRET, "/srv")
    yield Service(machine, grafx)
    grafx.clear_faults()
    if machine.path(CODE).exists():
        machine.run("cp", "-a", "/srv/.env", "/srv/server_secret", CODE)
    shutil.rmtree(machine.path(DROP_IN).parent, ignore_errors=True)
    machine.run("systemctl", "daemon-reload")


def test_install_goes_with_any_umask_and_any_quotes(service: Service) -> None:
    """It was run under umask 077, from a folder with mode 700, and with a .env with quotes and spaces."""
    machine = service.machine
    assert machine.refused == [
        "install: no .env yet: cp .env.example .env, and fill in its four lines\n",
        "install: the user grafx-poller has the group users, which could read all orders:"
        " give it a group grafx-poller (groupadd, usermod -g), or another name\n",
        f"install: BASEURL is missing: put https://ENVIRONMENT.chili-publish.online into {CHECKOUT}/.env"
        " or the environment\n",
    ]
    assert machine.path(SECRET).read_text() == f"{HARD}\n"
    assert machine.mode(machine.path(SECRET)) == ("600", "root", "root")
    settings = machine.path(SETTINGS)
    assert machine.mode(settings) == ("640", "root", "grafx-poller")
    assert not re.search(f"SECRET|secret|{re.escape(HARD)}", settings.read_text())
    assert dotenv_values(settings, interpolate=False) == {
        **{name: value for name, value in service.grafx.settings(STATE).items() if name != "SERVER_SECRET"},
        "POLL_INTERVAL": "2",
    }
    assert settings.read_text().endswith("\n")
    for path in machine.path(CODE).rglob("*"):
        if path not in (settings, machine.path(SECRET)) and not path.is_symlink():
            assert path.stat().st_mode & 0o055 >= (0o055 if path.is_dir() else 0o044), path
            assert not path.stat().st_mode & 0o022, path


def test_the_units_are_well_formed_and_rated_safe(service: Service) -> None:
    places = [f"/etc/systemd/system/{unit}" for unit in UNITS]
    texts = [(ROOT / ".systemd" / unit).read_text() for unit in UNITS]
    assert [service.machine.path(place).read_text() for place in places] == texts
    assert service.machine.run("systemd-analyze", "verify", *places).stdout == ""
    assert service.machine.show("UnitFileState") == "enabled"
    assert len({re.findall(r"# First the poller[^[]*\w", text)[0] for text in texts[:3]}) == 1
    for place in places[:3]:
        rated = service.machine.run("systemd-analyze", "security", "--offline=yes", place).stdout
        assert float(re.findall(r"Overall exposure level for \S+: (\S+)", rated)[0]) <= 2.0


def test_a_day_of_the_service(service: Service) -> None:
    machine, grafx = service.machine, service.grafx
    done, expired, slow = grafx.add(), grafx.add("expired"), grafx.add(size=8_000_000)
    grafx.fault("download", "slow", task_id=slow, rate=200_000)
    service.start()
    shown = machine.show("ActiveState", "SubState", "WatchdogUSec", "TimeoutStopUSec")
    assert shown == ("active", "running", "5min", "1min 30s")
    service.add(done)
    machine.db("add", expired, user="www-data")
    python = f'bin/python -c \'import db; db.add_order("{slow}", "a-project")\''
    machine.paste(f"cd {CODE}/current; {python}", user="www-data")
    service.delivers(done)
    eventually(lambda: expired in service.state()["failed"], "a failed order")

    # It is nobody in particular, and may do nothing in particular.
    process = Path("/proc", eventually(lambda: process_outside(machine, service.pid())))
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert machine.run("id", "-u", "grafx-poller").stdout.strip() in status["Uid"].split()
    assert "0" not in status["Uid"].split() + status["Gid"].split() + status["Groups"].split()
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert machine.show("MemoryMax") == str(256 << 20)

    # Who is in its group reads files and orders, and adds some; nobody else does. The secret is root's.
    eventually(lambda: list(service.orders.glob(".*.part")), "a download")
    for path in (machine.path(STATE), *machine.path(STATE).rglob("*")):
        with suppress(FileNotFoundError):
            mode, _, group = machine.mode(path)
            assert (mode, group) == ("2770" if path.is_dir() else "660", "grafx-poller"), path
    file, credential = f"{STATE}/orders/{done}.png", "/run/credentials/grafx-poller.service/server_secret"
    for place in (file, f"{STATE}/database.json", SETTINGS):
        assert machine.may("www-data", "cat", place)
        assert not machine.may("nobody", "cat", place)
    for place in (SECRET, credential):
        assert machine.run("test", "-s", place).returncode == 0
        assert not machine.may("www-data", "cat", place)
    assert not machine.may("grafx-poller", "cat", SECRET)
    assert not machine.may("grafx-poller", "touch", f"{CODE}/current/poller.py")
    assert "run this with sudo" in machine.db("list", user="nobody", check=False)
    apache = Path("/proc", process_outside(machine, machine.show("MainPID", unit="apache2")) or "", "status")
    gid = machine.run("getent", "group", "grafx-poller").stdout.split(":")[2]
    assert gid in re.findall(r"^Groups:(.*)", apache.read_text(), re.MULTILINE)[0].split()

    # What a person sees.
    eventually(lambda: re.search('Status: ".*1 downloading', machine.paste(STATUS)), "its status")
    assert f"Docs: file:{CODE}/current/README.md" in machine.paste(STATUS)
    assert expired in (listed := machine.paste(LIST))
    assert slow in listed
    assert service.says(f"{done} delivered")["PRIORITY"] == "6"
    assert service.says(f"{expired} failed")["PRIORITY"] == "3"
    assert re.findall(r" grafx-poller\[\d+\]: (\S+) failed", machine.paste(ERRORS))[-1] == expired
    own = [entry for entry in service.journal() if entry["_COMM"] != "systemd"]
    assert not [entry for entry in own if re.match(f"<|{TIME}", entry["MESSAGE"])]
    assert [entry["MESSAGE"][:43] for entry in service.journal("-p", "err")] == [f"{expired} failed"]

    # Stopped in the midst of a download.
    before = time.monotonic()
    machine.run("systemctl", "stop", "grafx-poller")
    assert time.monotonic() - before < 2
    assert machine.show("ActiveState") == "inactive"
    assert service.says("^grafx-poller.service: Deactivated successfully")  # what it says of an exit with 0
    assert "stopped, 1 pending" in [entry["MESSAGE"] for entry in service.journal()]
    left = {path.name for path in service.orders.iterdir()}  # the next start removes what came of the other
    assert left - {f".{slow}.part"} == {f"{done}.png", ".poller.pid"}
    assert list(service.state()["orders"]) == [slow]

    # The secret is nowhere but in its file.
    machine.run("systemctl", "start", "grafx-poller")
    process = Path("/proc", eventually(lambda: process_outside(machine, service.pid())))
    everything = machine.paste("journalctl; for verb in show cat; do systemctl $verb grafx-poller; done")
    for file in (process / "environ", process / "cmdline", machine.path(SETTINGS)):
        everything += file.read_text()
    assert done in everything
    assert not [word for word in (HARD, *grafx.tokens) if word in everything]


def process_outside(machine: Machine, pid: str) -> str | None:
    """The process id here of a process on the machine."""
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            found = re.search(r"^NSpid:\t(\d+)\t(\d+)$", path.read_text(), re.MULTILINE)
            if found and found[2] == pid and machine.cgroup.name in (path.parent / "cgroup").read_text():
                return found[1]
    return None


def test_who_is_in_the_group_may_make_the_first_order(service: Service) -> None:
    """Under a umask that hides what it makes; the service has yet to make anything."""
    task, later = service.grafx.add(), service.grafx.add()
    said = service.machine.db("add", task, user="www-data")
    service.start()
    service.delivers(task)
    assert f"{STATE}/database.json" in said
    assert f"{STATE}/database.json" in service.machine.db("add", later)
    service.delivers(later)
    assert f"{STATE}/database.json" in service.machine.paste(LIST)


def test_whatever_ended_it_it_is_started_again_and_delivers_the_rest(service: Service) -> None:
    """systemd takes a SIGHUP for an end in peace."""
    service.machine.configure("RestartSec=0.1")
    rest = service.grafx.add(size=2_000_000)
    service.grafx.fault("download", "slow", task_id=rest, rate=400_000)
    service.start()
    ended = ["0", service.pid()]
    service.machine.run("kill", "-HUP", ended[-1])
    eventually(lambda: service.pid() not in ended, "another process")
    service.add(rest)
    eventually(lambda: list(service.orders.glob(".*.part")), "a download")
    ended.append(service.pid())
    service.machine.run("kill", "-KILL", ended[-1])
    service.delivers(rest)
    assert service.pid() not in ended
    assert service.machine.show("ActiveState", "NRestarts") == ("active", "2")
    assert service.says("code=killed, status=9/KILL")
    assert {path.name for path in service.orders.iterdir()} == {f"{rest}.png", ".poller.pid"}


def test_one_that_hangs_is_ended_by_the_watchdog_and_started_again(service: Service) -> None:
    service.machine.configure("WatchdogSec=3\nRestartSec=0.1")
    service.start()
    stopped = service.pid()
    service.machine.run("kill", "-STOP", stopped)
    task = service.grafx.add()
    service.add(task)
    service.delivers(task)
    assert service.pid() not in (stopped, "0")
    assert service.says(r"Watchdog timeout \(limit 3s\)")
    assert int(service.machine.show("NRestarts")) >= 1
    assert service.machine.show("ActiveState") == "active"

    # Where it hung: a traceback of each thread, among the lines of that process.
    assert service.says("Fatal Python error: Aborted")["_PID"] == stopped
    assert service.says(rf'File "{CODE}/current/poller.py", line \d+ in main')["_PID"] == stopped
    own = [entry for entry in service.journal() if entry["_PID"] == stopped]
    assert {entry["SYSLOG_IDENTIFIER"] for entry in own} == {"grafx-poller"}


def test_it_logs_again_after_journald_was_stopped(service: Service) -> None:
    """A restart of journald keeps the stream; a stop ends it, and the poller cannot open it again."""
    machine, first, second = service.machine, service.grafx.add(), service.grafx.add()
    machine.configure("RestartSec=0.1")
    service.start()
    service.says(" pending, ")
    old = service.pid()
    machine.run("systemctl", "restart", "systemd-journald")
    service.add(first)
    assert service.says(f"{first} delivered")["_PID"] == old
    for verb in ("stop", "start"):
        machine.run("systemctl", verb, "systemd-journald")
    eventually(lambda: machine.show("NRestarts") == "1", "a new process")
    service.add(second)
    assert service.says(f"{second} delivered")["_PID"] == service.pid() != old
    assert service.machine.show("ActiveState", "NRestarts") == ("active", "1")


@pytest.mark.parametrize(
    ("command", "nano", "code", "says"),
    [
        (
            SETTING,
            "sed -i 's/^POLL_INTERVAL.*/POLL_INTERVAL=often/' \"$1\"",
            "78",
            "POLL_INTERVAL is 'often'",
        ),
        (SETTING, 'rm "$1"', "78", f"cannot read {SETTINGS}: No such file"),
        (SETTING, f"mv {CODE}/current/bin/python /srv", "203", "Failed at step EXEC .*: No such file"),
        (ROTATE, 'echo wrong-secret >"$1"', "78", "SERVER_ID"),
        (ROTATE, 'rm "$1"', "243", "Failed at step CREDENTIALS"),
    ],
)
def test_what_a_restart_does_not_mend_is_said_once(
    service: Service, command: str, nano: str, code: str, says: str
) -> None:
    """With a nano that types by itself."""
    machine = service.machine
    machine.configure("RestartSec=0.1")
    machine.program("nano", nano)
    service.grafx.requests.clear()
    machine.paste(command, check=False)
    # A unit that is to be started again is "activating", never "failed".
    eventually(lambda: machine.show("ActiveState") == "failed", "a failed unit")
    machine.run("sh", "-c", f"! [ -L /srv/python ] || mv /srv/python {CODE}/current/bin")
    shown = machine.show("Result", "ExecMainCode", "ExecMainStatus", "NRestarts")
    assert shown == ("exit-code", str(os.CLD_EXITED), code, "0")
    assert service.says(says, "-p", "err")
    assert len([entry for entry in service.journal() if re.search(says, entry["MESSAGE"])]) == 1
    assert {request.what for request in service.grafx.requests} == ({"token"} if "echo" in nano else set())
    assert "wrong-secret" not in json.dumps(service.journal())


def test_what_ends_again_and_again_is_failed_and_restarts_by_hand_are_not(service: Service) -> None:
    """A library that is broken; its traceback has no level of its own."""
    machine = service.machine
    machine.configure("RestartSec=0.1\nType=exec")
    service.start()
    machine.paste(f"for number in $(seq 21); do {RESET}\ndone")
    assert machine.show("ActiveState") == "active"
    refused = machine.paste("for number in $(seq 20); do systemctl restart grafx-poller; done", check=False)
    assert "start of the service was attempted too often" in refused
    (library,) = machine.path(f"{CODE}/current").glob("lib/*/site-packages/requests/__init__.py")
    whole = library.read_bytes()
    library.write_bytes(b"raise ImportError('broken')\n")
    try:
        machine.paste(RESET)
        eventually(lambda: machine.show("ActiveState") == "failed", "the end of its starts")
        assert machine.show("NRestarts") == "20"
        assert service.says("^ImportError: broken", "-p", "err")
    finally:
        library.write_bytes(whole)
    machine.configure("RestartSec=0.1")
    machine.paste(RESET)
    assert machine.show("ActiveState", "SubState", "NRestarts") == ("active", "running", "0")


def test_a_command_that_is_killed_for_memory_does_not_end_the_poller(service: Service) -> None:
    machine, task = service.machine, service.grafx.add()
    eat = "kill -KILL $$"
    if "memory" in (machine.cgroup / "cgroup.controllers").read_text():
        eat = "python3 -c 'all = []\nwhile True: all.append(b\"x\" * 2**20)'"
    machine.program("eat", f'test -e "$1.again" || {{ touch "$1.again"; {eat}; }}')
    service.set("ON_DONE=eat")
    machine.configure("MemorySwapMax=0")
    service.start()
    pid = service.pid()
    service.add(task)
    assert service.says(f"^{task} ON_DONE .*{'signal 9' if 'kill' in eat else 'ended with 137'}")
    service.delivers(task)
    shown = machine.show("ActiveState", "MainPID", "NRestarts", "OOMPolicy")
    assert shown == ("active", pid, "0", "continue")


def test_a_disk_that_is_mounted_after_the_start(service: Service) -> None:
    """Nothing is written to its empty mount point meanwhile."""
    machine, task = service.machine, service.grafx.add()
    machine.path("/srv/nas").mkdir()
    machine.configure("ReadWritePaths=-/srv/nas/orders")
    service.set("ORDERS_DIR=/srv/nas/orders")
    machine.run("systemctl", "start", "--no-block", "grafx-poller")
    service.says("^paused: cannot write to /srv/nas/orders")
    service.add(task)
    assert list(machine.path("/srv/nas").iterdir()) == []
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/srv/nas")
    machine.run("install", "-d", "-o", "grafx-poller", "-g", "grafx-poller", "/srv/nas/orders")
    service.says(f"^{task} delivered")
    assert machine.show("NRestarts") == "0"
    machine.run("systemctl", "stop", "grafx-poller")
    machine.run("umount", "/srv/nas")


def test_the_lines_that_on_done_needs(service: Service) -> None:
    """A folder of another program, a member of whose group reads what comes, and a socket of a third one."""
    machine, task, later = service.machine, service.grafx.add(), service.grafx.add()
    machine.run("useradd", "--system", "--user-group", "dam")
    machine.run("install", "-d", "-o", "dam", "-g", "dam", "-m", "2775", "/srv/dam/inbox")
    connect = "python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"/run/printer\")'"
    machine.program("hand-over", f'cp "$1" /srv/dam/inbox\n{connect}')
    machine.program("type-it", f"cat >/tmp/lines <<'END'\n{DROP_IN_LINES}END\n"
                    "sed -i '/^### Anything between here/r /tmp/lines' \"$1\"")  # fmt: skip
    alert = machine.path("/etc/systemd/system/my-alert.service")
    alert.write_text("[Service]\nExecStart=touch /tmp/alerted\n")
    service.set("ON_DONE=hand-over")
    with socket.socket(socket.AF_UNIX) as printer:
        place = machine.path("/run/printer")
        printer.bind(str(place))
        printer.listen()
        place.chmod(0o666)
        service.start()
        service.add(task)
        service.says(f"^{task} ON_DONE ended with 1: .*Read-only file system")
        (command,) = re.findall("`(sudo systemctl edit grafx-poller)`", SECTION)
        machine.program("at-a-terminal", f'sudo() {{ env "$@"; }}\n{command}')  # `systemctl edit` wants one
        machine.paste("SYSTEMD_EDITOR=type-it script -qec at-a-terminal /dev/null")
        machine.run("systemctl", "restart", "grafx-poller")
        service.add(later)
        service.delivers(task, later)
        printer.settimeout(PATIENCE)
        printer.accept()[0].close()
    folder = machine.path("/srv/dam/inbox")
    assert {path.name for path in folder.iterdir()} == {f"{task}.png", f"{later}.png"}
    for path in folder.iterdir():
        assert machine.mode(path) == ("660", "grafx-poller", "dam")
        assert machine.may("dam", "cat", f"/srv/dam/inbox/{path.name}")
        assert not machine.may("www-data", "cat", f"/srv/dam/inbox/{path.name}")
    machine.path(SECRET).unlink()
    machine.paste(RESET, check=False)
    eventually(machine.path("/tmp/alerted").exists, "the alert")


def test_backup_restore_and_what_is_old(service: Service) -> None:
    machine, grafx = service.machine, service.grafx
    old, new, kept = grafx.add(), grafx.add(), grafx.add(questions=10**6)
    service.start()
    service.add(kept, old, new)
    service.delivers(old, new)
    month_ago = time.time() - 31 * 86400
    for name in (f"{old}.png", ".poller.pid"):
        os.utime(service.orders / name, (month_ago, month_ago))
    machine.paste(BACKUP)
    machine.paste(CLEAN)
    assert {path.name for path in service.orders.iterdir()} == {f"{new}.png", ".poller.pid"}
    machine.run("sh", "-c", "mkdir /srv/backup && tar -xzf /root/grafx.tgz -C /srv/backup")
    machine.path(f"{STATE}/database.json").unlink()
    machine.paste(RESTORE, folder=f"/srv/backup{STATE}")
    grafx._tasks[kept].questions = 0
    service.delivers(kept)
    for place in (SETTINGS, SECRET):
        assert machine.path(f"/srv/backup{place}").read_bytes() == machine.path(place).read_bytes()
    assert not list(machine.path(f"/srv/backup{CODE}").glob("venv-*"))
    shutil.rmtree(machine.path("/srv/backup"))


def test_the_timer_and_back(service: Service) -> None:
    machine, once = service.machine, "grafx-poller-once.service"
    done, expired, pending, later = map(service.grafx.add, ("png", "expired", "never", "png"))
    service.start()
    service.add(pending)
    machine.paste(TIMER)
    service.once(done, expired)
    service.delivers(done)
    service.says(f"^{once}: Deactivated successfully")
    assert service.says(f"^{expired} failed")["PRIORITY"] == "3"  # and so it ended with 1
    assert list(service.state()["orders"]) == [pending]
    assert machine.show("ActiveState", "UnitFileState") == ("inactive", "disabled")
    eventually(lambda: machine.show("ActiveState", unit=once) == "inactive", "its end")
    names = "ActiveState", "UnitFileState", "NextElapseUSecMonotonic"
    timer = machine.show(*names, unit="grafx-poller-once.timer")
    assert timer[:2] == ("active", "enabled")
    assert timer[2] not in ("", "0", "infinity")

    # Back, while it runs.
    go = service.hold()
    service.once(later)
    eventually((service.orders / f"{later}.png").exists, "a command that waits")
    machine.paste(BACK)
    assert machine.show("ActiveState", unit=once) == "activating"
    assert machine.show("ActiveState") == "inactive"  # it waits
    go.touch()
    service.delivers(later)
    eventually(lambda: machine.show("ActiveState") == "active", "the daemon")
    assert machine.show("NRestarts", "UnitFileState") == ("0", "enabled")
    assert machine.show(*names[:2], unit="grafx-poller-once.timer") == ("inactive", "disabled")
    go.unlink()


def test_upgrades_and_a_second_environment(service: Service) -> None:
    machine, checkout, two = service.machine, service.machine.path(CHECKOUT), "grafx-poller@two"
    current, state = machine.path(f"{CODE}/current"), "/var/lib/grafx-poller@two"

    def status() -> Any:
        """What an upgrade may change."""
        unit = machine.path("/etc/systemd/system/grafx-poller.service").read_text()
        pids = service.pid(), machine.show("MainPID", unit=two)
        return current.readlink(), unit, (current / "chili.py").read_text(), *pids

    # Python went with an upgrade of the distribution. What installs another one mends the first one, too.
    (current / "bin/python").unlink()
    machine.run("systemctl", "start", "grafx-poller", check=False)
    eventually(lambda: machine.show("ActiveState") == "failed", "a failed unit")
    with Sandbox() as other:
        missing = machine.paste(INSTALL_TWO, check=False)
        assert missing.startswith("install: no .env.two yet: cp .env.example .env.two, and ")
        (checkout / ".env.two").write_text(dot_env(other))
        machine.paste(INSTALL_TWO)
        pending, of_two = service.grafx.add(questions=10**6), other.add()
        service.add(pending)
        machine.db("add", of_two, like=LIST_TWO)
        file = machine.path(f"{state}/orders/{of_two}.png")
        eventually(file.exists, "the file of the other environment")
        assert file.read_bytes() == other.body(of_two)
        assert list(service.state()["orders"]) == [pending]
        assert machine.mode(machine.path(state)) == ("2770", "grafx-poller", "grafx-poller")
        assert machine.mode(file) == ("660", "grafx-poller", "grafx-poller")
        for unit in ("grafx-poller", two):
            eventually(lambda unit=unit: machine.show("ActiveState", unit=unit) == "active", "the poller")
            assert machine.show("UnitFileState", unit=unit) == "enabled"
        assert machine.show("Description", unit=two) == "GraFx order poller two"
        machine.run("systemctl", "start", "grafx-poller@too", check=False)  # mistyped
        assert machine.show("ExecMainStatus", unit="grafx-poller@too") == "243"

        # An upgrade that fails.
        newer = "chili.py", ".systemd/grafx-poller.service"
        for file, line in (*((name, "# newer") for name in newer), ("requirements.txt", "no==1")):
            with (checkout / file).open("a") as append:
                append.write(f"{line}\n")
        before = status()
        assert "no==1" in machine.paste(INSTALL, check=False)
        assert status() == before
        shutil.copy(ROOT / "requirements.txt", checkout)

        # One that does not. A pass goes on; what was stopped stays stopped; the old libraries are there.
        go = service.hold()
        settings = {place: machine.path(place).read_bytes() for place in (SETTINGS, SECRET)}
        machine.paste(TIMER)
        service.once(held := service.grafx.add())
        eventually((service.orders / f"{held}.png").exists, "a command that waits")
        a_pass = machine.show("MainPID", unit="grafx-poller-once")
        machine.paste(INSTALL)
        assert machine.show("MainPID", unit="grafx-poller-once") == a_pass
        go.touch()
        assert current.readlink() != before[0]
        assert [text.endswith("# newer\n") for text in status()[1:3]] == [True, True]
        assert {path.name for path in current.parent.glob("venv-*")} == {
            str(before[0]),
            str(current.readlink()),
        }
        assert machine.show("ActiveState") == "inactive"
        eventually(lambda: machine.show("MainPID", unit=two) not in ("0", before[4]), "a restart")
        assert {place: machine.path(place).read_bytes() for place in settings} == settings
        assert machine.mode(machine.path(SECRET)) == ("600", "root", "root")
        assert machine.mode(machine.path(SETTINGS)) == ("640", "root", "grafx-poller")
        service.delivers(held)


def test_nothing_is_left_where_it_was_removed(service: Service) -> None:
    """The last one: the machine has no poller any more."""
    machine = service.machine
    service.start()
    pid = process_outside(machine, service.pid())
    machine.run("systemctl", "start", "grafx-poller@broken", check=False)
    assert machine.show("ActiveState", unit="grafx-poller@broken") in ("failed", "activating")
    machine.run("rm", "/srv/.env", "/srv/server_secret")
    before = machine.left()
    machine.paste(REMOVE, check=False)  # nobody answers
    assert machine.left() == before
    machine.paste(f"echo y | {REMOVE}")
    assert machine.left() == machine.before
    assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
    assert not Path(f"/proc/{pid}").exists()
    assert "removed" in machine.paste(f"{REMOVE.partition('#')[0]} --yes")
