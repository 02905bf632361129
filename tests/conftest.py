"""A GraFx environment on loopback and the real poller as a process, for all tests."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sandbox import Loopback, Sandbox, read_request  # noqa: E402

import db  # noqa: E402

# Python for `before`: short pauses; a line in the log for each file that is opened or renamed.
QUICK = "db.LOOK = poller.SHORTEST_PAUSE = 0.1"
WATCH = "said = {'open': '<read {0}>', 'os.rename': '<to {1}>'}; "
WATCH += "sys.addaudithook(lambda what, on: what in said and print(said[what].format(*on), file=sys.stderr))"
# Options of the sandbox's fault "late": one answer, and behind it another that may be another task's.
LATE: list[dict[str, Any]] = [{"status": 504, "pause": pause} for pause in (0, 0.05, 0.3)]
LATE += [{"status": status, "pause": pause, "task": "other"} for status in (204, 504) for pause in (0, 0.05)]
PATIENCE = 30.0  # seconds: how long a busy machine may take for anything
SHARED = ("test_faults.py", "test_machine.py", "test_readme.py")  # each has something that is slow to make
ALONE = ("test_systemd.py", "test_editors.py")  # in each other's way
# Under nohup or in the background of a script they are ignored, and so they would be by the pollers.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Groups(LoadScopeScheduling):
    """Of pytest-xdist, whose --dist loadgroup groups nothing with pytest 9.2: what one process gets whole."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.endswith(SHARED) else "alone" if file.endswith(ALONE) else nodeid


def pytest_xdist_auto_num_workers() -> int:
    return 2 * (os.cpu_count() or 1)  # most of the time the tests wait


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    return Groups(config, log)


def eventually(true: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """What `true` gives as soon as it is true; fails the test where it never is."""
    deadline = time.monotonic() + patience
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {patience} s: {what or true}"
        time.sleep(0.02)
    return value


def end_orders(delivered: list[str], failed: dict[str, tuple[int | None, str]], path: Path) -> None:
    """What the poller does with orders that have ended, but for the list of deliveries."""
    db.edit(path, lambda store: (store.take(delivered), store.fail(failed)))


class Home:
    """A folder with database.json and orders, the settings for it, and the pollers started on it."""

    def __init__(self, folder: Path, grafx: Sandbox) -> None:
        self.folder, self.grafx = folder, grafx
        self.database, self.orders = folder / "database.json", folder / "orders"
        self.orders.mkdir()
        self.env = {**grafx.settings(folder), "POLL_INTERVAL": "0.3"}
        self.pollers: list[Running] = []

    def write(self, data: Any) -> None:
        """database.json as an editor saves it that replaces the file."""
        temp = self.folder / "edited"
        temp.write_text(data if isinstance(data, str) else json.dumps(data, indent=4))
        temp.replace(self.database)

    def wait_for(self, *task_ids: str, **fields: Any) -> None:
        self.write({"orders": dict.fromkeys(task_ids, fields), "failed": {}})

    def read(self) -> Any:
        return json.loads(self.database.read_text())

    def waiting(self) -> Any:
        return self.read()["orders"]

    def failed(self) -> Any:
        return self.read().get("failed", {})

    def files(self) -> list[str]:
        """All that is in the orders folder, hidden files too, but for the poller's lock."""
        return sorted(path.name for path in self.orders.iterdir() if path.name != ".poller.pid")

    def command(self, *arguments: str, before: str = "") -> list[str]:
        """The poller's command line; `before` is Python that runs first, to shorten a constant."""
        if not before:
            return [sys.executable, str(ROOT / "poller.py"), *arguments]
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import chili, db, poller; {before}; "
        return [sys.executable, "-c", code + "import os; os._exit(poller.main())", *arguments]

    def environment(self, **env: str) -> dict[str, str]:
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        # No settings of the one who runs the tests.
        return {**keep, "GRAFX_ENV_FILE": os.devnull, **self.env, **env}

    def start(self, *arguments: str, before: str = "", **env: str) -> Running:
        running = Running(self, self.command(*arguments, before=before), self.environment(**env))
        self.pollers.append(running)
        return running

    def run(self, *arguments: str, before: str = "", timeout: float = 60, **env: str) -> Running:
        running = self.start(*arguments, before=before, **env)
        running.process.wait(timeout)
        return running

    def db(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "db.py"), *arguments]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)


class Running:
    """A poller process; its standard output and error go to files."""

    def __init__(self, home: Home, command: list[str], env: dict[str, str]) -> None:
        self.path = home.folder / f"log-{len(home.pollers)}"
        with self.path.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, cwd=home.folder, stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL)  # fmt: skip

    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def says(self, pattern: str, patience: float = PATIENCE) -> re.Match[str]:
        ended = self.process.poll
        eventually(lambda: re.search(pattern, self.log()) or ended() is not None, pattern, patience)
        found = re.search(pattern, self.log())
        assert found, f"ended with {ended()} without saying {pattern!r}:\n{self.log()}"
        return found

    def stop(self, how: int = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout)


@pytest.fixture
def grafx() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def home(tmp_path: Path, grafx: Sandbox) -> Iterator[Home]:
    home = Home(tmp_path, grafx)
    yield home
    for running in home.pollers:
        running.process.kill()
        running.process.wait()
    for process in psutil.process_iter():  # the commands that they started, by their environment
        with suppress(psutil.Error, OSError):
            if process.environ().get("DATABASE") == str(home.database):
                process.kill()


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The three modules in a folder of their own, where a .env can lie beside them."""
    folder = tmp_path / "app"
    folder.mkdir()
    for name in ("poller.py", "chili.py", "db.py"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for loopback with its key and its authority, in one file."""
    place = tmp_path_factory.mktemp("tls") / "loopback.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    place.write_bytes(issued.private_key_and_cert_chain_pem.bytes() + authority.cert_pem.bytes())
    return place


def made_by(kind: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A fixture that makes servers of a kind, and ends them."""
    with ExitStack() as made:
        yield lambda *arguments: made.enter_context(kind(*arguments))


class Wire(Loopback):
    """It says what `answer` makes of a request's first line and its connection; nothing ends it."""

    def __init__(self, answer: Callable[[str, socket.socket], bytes | None]) -> None:
        self.answer, self.open = answer, 0
        super().__init__()

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.open += 1
        with suppress(OSError), request.makefile("rb") as stream:
            while asked := read_request(stream, client_address):
                self.asked.append(f"{asked.method} {asked.path} HTTP/1.1")
                if not (said := self.answer(self.asked[-1], request)):
                    break
                request.sendall(said)
        self.open -= 1


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    yield from made_by(Wire)


class Relay(Loopback):
    """Passes on what comes, as an HTTP proxy, or to a port of loopback; it speaks TLS if it has a context."""

    def __init__(self, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self.port, self.context = port, context
        super().__init__()

    def finish_request(self, request: Any, client_address: Any) -> None:
        port, first = self.port, b""
        with suppress(OSError):
            request = self.context.wrap_socket(request, server_side=True) if self.context else request
            if not port and (first := request.recv(65536)):
                method, where = first.decode("latin-1").split()[:2]
                self.asked.append(f"{method} {where}")
                port = int(re.findall(r":(\d+)", where)[0])
                if method == "CONNECT":
                    request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    first = b""
            with request, socket.create_connection(("127.0.0.1", port)) as server:
                server.sendall(first)
                other = {request: server, server: request}
                decrypted = getattr(request, "pending", int)  # what TLS has, and select does not see
                while True:
                    for one in [request] if decrypted() else select.select([*other], [], [])[0]:
                        if not (data := one.recv(65536)):
                            return
                        other[one].sendall(data)


@pytest.fixture
def relay() -> Iterator[Callable[..., Relay]]:
    yield from made_by(Relay)


@pytest.fixture
def tls(certificate: Path, relay: Callable[..., Relay]) -> Iterator[Sandbox]:
    """A GraFx environment over https; `elsewhere` is plain http."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Sandbox() as sandbox:
        plain = sandbox.base_url
        front = relay(int(plain.rpartition(":")[2]), context)
        https = f"https://127.0.0.1:{front.server_address[1]}"
        for name in ("base_url", "root", "token_url"):
            setattr(sandbox, name, getattr(sandbox, name).replace(plain, https))
        yield sandbox


class Manager:
    """The end of the notify socket that systemd has."""

    def __init__(self, address: str) -> None:
        self.address, self.told = address, list[tuple[float, str]]()  # when, and the datagram
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(re.sub("^@", "\0", address))

    def lines(self) -> list[str]:
        with suppress(BlockingIOError):
            while True:
                self.told.append((time.monotonic(), self.socket.recv(65536, socket.MSG_DONTWAIT).decode()))
        return [line for _, text in self.told for line in text.splitlines()]

    def hears(self, pattern: str) -> str:
        """Wait for a line, among those to come as well as those that came."""
        return eventually(lambda: [line for line in self.lines() if re.search(pattern, line)], pattern)[0]

    def forget(self) -> None:
        self.lines()
        self.told.clear()


@pytest.fixture
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    # The path of a socket may be 107 bytes long, and pytest's temporary folders can be longer.
    with tempfile.TemporaryDirectory() as folder:
        abstract = getattr(request, "param", "") == "an abstract name"
        manager = Manager(f"{'@' * abstract}{folder}/notify")
        yield manager
        manager.socket.close()


def find_program(name: str, package: str, what: str = "the README's use of it") -> str:
    """Where this program is; without it the test is skipped, and says what is not tested."""
    need = f"needs {name} (Debian: apt-get install {package}): {what} is NOT tested"
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or pytest.skip(need)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Where CI=true, a test that was skipped has failed: nobody reads there what was not tested."""
    report: Any = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which counts as failed where CI=true: {report.longrepr[2]}"
    return report
