"""A GraFx environment on loopback and the real poller as a process, for all tests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import trustme
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sandbox import Sandbox  # noqa: E402

import db  # noqa: E402

# Python for `before`: short pauses; a line in the log for each file that is opened or renamed.
QUICK = "db.LOOK = poller.SHORTEST_PAUSE = 0.1"
WATCH = (
    "sys.addaudithook(lambda what, about: print({'open': '<read %s>', 'os.rename': '<to %s>'}[what] % ("
    "about[what == 'os.rename'],), file=sys.stderr) if what in ('open', 'os.rename') else None)"
)
# Under nohup or in the background of a script they are ignored, and so they would be by the pollers.
for name, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(name) == signal.SIG_IGN:
        signal.signal(name, handler)

REPORTS: list[str] = []  # what tests want to be printed at the end

# Options of the sandbox's fault "late": one answer, and behind it another that may be another task's.
LATE: list[dict[str, Any]] = [
    {"status": 504},
    {"status": 504, "pause": 0},
    {"status": 504, "pause": 0.3},
    {"status": 504, "task": "other"},
    {"status": 204, "task": "other"},
    {"status": 204, "task": "other", "pause": 0},
]

PATIENCE = 30.0  # seconds: how long a busy machine may take for anything


# Files whose tests share what is slow to make; with pytest-xdist each of them is one process's.
TOGETHER = ("test_faults.py", "test_machine.py", "test_readme.py", "test_systemd.py")


class OneByOne(LoadScopeScheduling):
    """Tests run side by side as they come, whatever file they are in, but those of TOGETHER."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.endswith(TOGETHER) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneByOne:
    return OneByOne(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of pytest-xdist: a worker has ended, and hands in its reports."""
    REPORTS.extend(getattr(node, "workeroutput", {}).get("reports", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    getattr(session.config, "workeroutput", {})["reports"] = REPORTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in REPORTS:
        terminalreporter.write_line("\n" + report)


def eventually(true: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """What `true` gives as soon as it is true; fails the test where it never is."""
    deadline = time.monotonic() + patience
    while True:
        value = true()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {patience} s: {what or true}"
        time.sleep(0.02)


def end_orders(delivered: list[str], failed: dict[str, tuple[int | None, str]], path: Path) -> None:
    """What the poller does with orders that have ended, but for the list of deliveries."""

    def edit(store: db.Store) -> None:
        store.take(delivered)
        store.fail(failed)

    db.edit(path, edit)


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
        """Write orders in the poller's own shape."""
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
        return {**keep, **self.env, **env}

    def start(self, *arguments: str, before: str = "", **env: str) -> Running:
        running = Running(self, self.command(*arguments, before=before), self.environment(**env))
        self.pollers.append(running)
        return running

    def run(self, *arguments: str, before: str = "", timeout: float = 60, **env: str) -> Running:
        """Start, and wait for the end."""
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
        """Wait until the log has a match."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.log())
            assert found or self.process.poll() is None or re.search(pattern, self.log()), (
                f"ended with {self.process.poll()} without saying {pattern!r}:\n{self.log()}"
            )
            return found

        found: re.Match[str] = eventually(look, f"log says {pattern!r}", patience)
        return found

    def stop(self, how: int = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Send a signal and give the exit code."""
        if self.process.poll() is None:
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
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
    for process in psutil.process_iter():  # their commands, which have their working folder
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(tmp_path):
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


@pytest.fixture
def tls(certificate: Path) -> Iterator[Sandbox]:
    """A GraFx environment over https; `elsewhere` is plain http."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    sandbox = Sandbox()
    listener = sandbox._listeners[0]
    listener.socket = context.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
    for name in ("base_url", "root", "token_url"):
        setattr(sandbox, name, getattr(sandbox, name).replace("http://", "https://"))
    with sandbox:
        yield sandbox


class Loopback(socketserver.ThreadingTCPServer):
    """A server on loopback with a thread of its own. `asked` is what it was asked."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        self.asked = list[str]()
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def made_by(kind: Callable[..., Loopback]) -> Iterator[Callable[..., Loopback]]:
    """A fixture that makes servers of a kind, and ends them."""
    made: list[Loopback] = []

    def make(*arguments: Any) -> Loopback:
        made.append(kind(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        one.server_close()


class Relay(Loopback):
    """A proxy: CONNECT and absolute addresses; or, with a target, a plain relay to it."""

    def __init__(self, port: int = 0, target: str = "") -> None:
        self.target = target
        super().__init__(port)

    def finish_request(self, request: Any, client_address: Any) -> None:
        with suppress(OSError):
            first = request.recv(65536)
            if not first:
                return
            target, prefix = self.target, b""
            if not target:
                method, where = first.decode("latin-1").split()[:2]
                self.asked.append(f"{method} {where}")
                if method == "CONNECT":
                    target, first = f"//{where}", b""
                    request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                else:
                    target, prefix = where, f"http://{urlsplit(where).netloc}/".encode()
            parts = urlsplit(target)
            with socket.create_connection((parts.hostname, parts.port)) as other:
                back = threading.Thread(target=self.pump, args=(other, request), daemon=True)
                back.start()
                self.pump(request, other, first, prefix)
                back.join()

    def pump(
        self, source: socket.socket, sink: socket.socket, data: bytes = b"", prefix: bytes = b""
    ) -> None:
        """Copy until the end; a request's absolute address becomes a path."""
        with suppress(OSError):
            while data := data or source.recv(65536):
                sink.sendall(data.replace(prefix, b"/", 1) if prefix else data)
                data = b""
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay() -> Iterator[Callable[..., Loopback]]:
    yield from made_by(Relay)


class Wire(Loopback):
    """A server that says what it is told to, byte by byte.

    `answer` gets a request's first line and its connection; what it returns is sent, nothing ends it.
    """

    def __init__(self, answer: Callable[[str, socket.socket], bytes | None]) -> None:
        self.answer, self.open = answer, 0
        super().__init__()

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.open += 1
        with suppress(OSError), request.makefile("rb") as lines:
            while line := lines.readline():
                self.asked.append(line.decode("latin-1").strip())
                length = 0
                while (header := lines.readline()).strip():
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                lines.read(length)
                said = self.answer(self.asked[-1], request)
                if not said:
                    break
                request.sendall(said)
        self.open -= 1


@pytest.fixture
def wire() -> Iterator[Callable[..., Loopback]]:
    yield from made_by(Wire)


@pytest.fixture
def tls_front(certificate: Path) -> Iterator[Callable[[int], int]]:
    """Gives, for the port of a server on loopback, one where the same is spoken inside TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    def make(port: int) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

        started = asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        server = asyncio.run_coroutine_threadsafe(started, loop).result(20)
        outer: int = server.sockets[0].getsockname()[1]
        return outer

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    yield make
    asyncio.run_coroutine_threadsafe(end(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)


class Manager:
    """The end of the notify socket that systemd has."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[tuple[float, str]] = []  # when, and the datagram
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self.socket.setblocking(False)

    def lines(self) -> list[str]:
        """All that was told so far, without the names of their own datagrams."""
        with suppress(BlockingIOError):
            while True:
                self.told.append((time.monotonic(), self.socket.recv(65536).decode()))
        return [line for _, text in self.told for line in text.splitlines()]

    def hears(self, pattern: str) -> str:
        """Wait for a line, among those to come as well as those that came."""
        return eventually(
            lambda: next((line for line in self.lines() if re.search(pattern, line)), None), pattern
        )

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
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"needs {name} (Debian: apt-get install {package}): {what} is NOT tested")
    return found


def git(*arguments: str) -> str | None:
    """What git says of this repository; None in an unpacked archive."""
    if not (ROOT / ".git").exists():
        return None
    command = [find_program("git", "git", "what is committed"), "-c", f"safe.directory={ROOT}"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Where CI=true, a test that was skipped has failed: nobody reads there what was not tested."""
    report: Any = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which counts as failed where CI=true: {report.longrepr[2]}"
    return report
