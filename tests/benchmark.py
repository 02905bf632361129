"""How fast the poller is, beside what one would have without it. Prints one table.

    python tests/benchmark.py                 all of it, in about fifteen minutes
    python tests/benchmark.py --quick         a smoke test: smaller, and one run of each
    python tests/benchmark.py --only large    only that part; more than one may be given
    python tests/benchmark.py --code FOLDER   the poller of another checkout

Needs Linux, Debian's `nginx` and `curl`, and what the tests need. What is measured runs alone on one core,
the servers on another one where there is one. A figure is the median of its runs; a ratio is made within
a run, whose contenders take turns, so that what disturbs one of them disturbs all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from statistics import median
from typing import Any, ClassVar
from urllib.request import urlopen

import trustme

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
TASKS = "/grafx/api/v1/environment/bench/output/tasks/"
CORES = sorted(os.sched_getaffinity(0))
SERVERS, MEASURED = CORES[0], CORES[-1]
DELAY = 0.05  # seconds that the far server takes for each answer
AT_ONCE = 8
RATE, BURST = 20, 10  # requests a second where GraFx limits them, and how many may come at once
ALIVE: set[int] = set()  # processes that are measured now
CODE = ROOT  # whose poller.py and db.py are measured, see --code
SETTINGS = {"SERVER_ID": "id", "SERVER_SECRET": "secret", "ENVIRONMENT": "bench", "ON_DONE": ""}
SETTINGS |= {"CONCURRENCY": str(AT_ONCE), "SERVER_SECRET_FILE": "", "HOME": "/nonexistent"}


@dataclass(frozen=True)
class Size:
    """How much of everything. A takes minutes for a sweep, and the same for each order: it does a part."""

    runs: int = 5
    sweeps: tuple[int, ...] = (1000, 3000, 10_000)
    part: tuple[int, ...] = (200, 60, 20)  # of each sweep, for A
    polls: int = 10_000
    tls: int = 5000
    far: int = 1000
    files: int = 1000
    large: int = 512
    spell: float = 12.0  # seconds: 5 of them are a minute
    renders: tuple[int, ...] = (
        *(1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 20, 25, 30, 35, 40, 50, 60, 70, 80, 90, 100, 110, 120),
    )
    limited: int = 300
    pending: int = 20_000
    finished: int = 2000  # of them
    within: float = 180.0  # seconds
    adds: int = 30
    broken: int = 10  # MB


QUICK = Size(
    1, (100, 200, 400), (20, 10, 5), 200, 100, 50, 50, 16, 0.3, (1, 2),
    limited=15, pending=400, finished=30, within=3.0, adds=4, broken=1,
)  # fmt: skip


# --- A: the seed's loop ----------------------------------------------------------------------


def seed(base_url: str, folder: Path, most: int) -> None:
    """One turn of the seed's timed loop over the first `most` orders, as straight as Python has it."""
    import requests

    database = folder / "database.json"
    data = json.loads(database.read_text())
    form = {"grant_type": "client_credentials", "client_id": "id", "client_secret": "secret"}
    token = requests.post(f"{base_url}/oauth/token", json=form, timeout=60).json()["access_token"]
    headers = {"Accept": "application/json", "Authorization": f"Bearer {token}"}
    for task_id in list(data["orders"])[:most]:
        order = data["orders"].pop(task_id)
        database.write_text(json.dumps(data, indent=4))
        response = requests.get(base_url + TASKS + task_id, headers=headers, timeout=60)
        if response.status_code == 200:
            link = response.json()["links"]["download"]
            with (
                requests.get(link, headers=headers, stream=True, timeout=60) as download,
                (folder / "orders" / f"{task_id}.png").open("wb") as file,
            ):
                for piece in download.iter_content(65536):
                    file.write(piece)
        elif response.status_code == 204:
            data["orders"][task_id] = order
        else:
            print("Failed Task:", response.text)
        database.write_text(json.dumps(data, indent=4))


def bare_loop(base_url: str, count: int, anew: bool) -> None:
    """Polls as short as requests has them: by one session, or `anew`; prints the CPU seconds of each."""
    import requests

    def auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = "Bearer token"
        return request

    session = requests.Session()
    for number in range(count + 20):
        if number == 20:  # the first ones load modules, and connect
            before = time.process_time()
        url = f"{base_url}{TASKS}pending-{number}"
        if anew:  # as the seed does
            response = requests.get(url, headers={"Authorization": "Bearer token"}, timeout=60)
        else:
            response = session.get(url, auth=auth, stream=True, timeout=60)
            response.raw.drain_conn()  # so that the connection can be used again
        if response.status_code != 204:
            raise SystemExit(f"answered {response.status_code}")
    print((time.process_time() - before) / count)


# --- servers ---------------------------------------------------------------------------------

NGINX_PATH = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"
NGINX = """
daemon off; master_process off; pid PLACE/nginx.pid; error_log PLACE/error.log;
events { worker_connections 1024; }
http {
    types { image/png png; application/json json; }
    log_format times "$msec $request_time $status $request_uri";
    limit_req_zone $server_port zone=429:1m rate=RATEr/s;
    limit_req_zone $server_port zone=503:1m rate=RATEr/s;
    access_log PLACE/times times;
    client_body_temp_path PLACE/body; proxy_temp_path PLACE/proxy; fastcgi_temp_path PLACE/fastcgi;
    uwsgi_temp_path PLACE/uwsgi; scgi_temp_path PLACE/scgi;
    sendfile on; tcp_nopush on; keepalive_requests 1000000; keepalive_timeout 600s;
    ssl_certificate PLACE/server.pem; ssl_certificate_key PLACE/server.pem;
    server {
        listen 127.0.0.1:PORT;
        listen 127.0.0.1:TLS ssl;
        root PLACE/files;
        location = /oauth/token {
            default_type application/json;
            return 200 '{"access_token": "token", "token_type": "Bearer", "expires_in": 86400}';
        }
        location ~ ^TASKSpending { return 204; }
        location ~ ^TASKSlost {
            default_type application/problem+json;
            return 404 '{"title": "Not Found", "detail": "The task was not found."}';
        }
        location ~ ^TASKS(.+)$ {
            default_type application/json;
            return 200 '{"data": {"taskId": "$1"}, "links": {"download": "http://127.0.0.1:PORT/files/$1"}}';
        }
        location /files/small { try_files /small.png =404; }
        location /files/large { try_files /large.png =404; }
    }
    LIMITED
}
"""
# It says neither its limit nor when to come again.
# `return` comes before the limit, so here it stands behind an internal redirect.
LIMITED = """
    server {
        listen 127.0.0.1:PORT;
        access_log PLACE/times-STATUS times;
        limit_req zone=STATUS burst=BURST nodelay; limit_req_status STATUS;
        root PLACE/files;
        location ~ ^TASKS(?<task>.+)$ { try_files /none @finished; }
        location @finished {
            default_type application/json;
            return 200 '{"links": {"download": "http://127.0.0.1:PORT/files/$task"}}';
        }
        location /files/small { try_files /small.png =404; }
    }
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Server:
    """A server process. `url` is what a poller's BASEURL is."""

    def __init__(self, place: Path, port: int, command: Sequence[str | Path]) -> None:
        self.place, self.url = place, f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not start")
            time.sleep(0.02)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Nginx(Server):
    """Fixed answers, so that the server is not what is measured."""

    def __init__(self, folder: Path, large: int) -> None:
        place, port, tls = folder / "nginx", free_port(), free_port()
        (place / "files").mkdir(parents=True)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(place / "ca.pem")
        issued = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
        issued.write_to_path(place / "server.pem")
        self.tls = {"BASEURL": f"https://127.0.0.1:{tls}", "REQUESTS_CA_BUNDLE": str(place / "ca.pem")}
        write_png(place / "files/small.png", 100_000)
        write_png(place / "files/large.png", large * MIB)
        self.limited = {status: free_port() for status in (429, 503)}
        limited = [
            LIMITED.replace("PORT", str(there)).replace("STATUS", str(status))
            for status, there in self.limited.items()
        ]
        text = NGINX.replace("LIMITED", "".join(limited))
        words = {"PLACE": place, "PORT": port, "TLS": tls, "TASKS": TASKS, "RATE": RATE, "BURST": BURST}
        for word, value in words.items():
            text = text.replace(word, str(value))
        (place / "nginx.conf").write_text(text)
        self.read: Counter[str] = Counter()  # bytes of its logs
        super().__init__(place, port, [NGINX_PATH, "-p", place, "-c", place / "nginx.conf", "-e", "stderr"])

    def times(self, what: str) -> list[float]:
        """When the requests for `what` since the last call came in."""
        return [moment for moment, _ in self.seen(what)]

    def seen(self, what: str, name: str = "times") -> list[tuple[float, int]]:
        """The same with what was answered, from this log."""
        with (self.place / name).open("rb") as log:
            log.seek(self.read[name])
            whole, _, _ = log.read().rpartition(b"\n")
            self.read[name] += len(whole)
        lines = [line.split() for line in whole.decode().splitlines() if line]
        return [
            (float(end) - float(took), int(status))
            for end, took, status, uri in lines if uri.startswith(what)
        ]  # fmt: skip

    def first(self, what: str, count: int) -> float:
        """When the first request for `what` since the last call came in; there must be `count` of them."""
        times = self.times(what)
        if len(times) != count:
            raise SystemExit(f"{len(times)} requests for {what}, where there should be {count}")
        return min(times)


def write_png(path: Path, size: int) -> None:
    """A PNG of one grey pixel and a private chunk that fills it up to `size` bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes((0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0)))
    tail = chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b"")
    left = size - len(head) - len(tail) - 12
    with path.open("wb") as file:
        file.write(head + left.to_bytes(4, "big") + b"paDd")
        crc, noise = zlib.crc32(b"paDd"), os.urandom(MIB)
        while left:
            piece = noise[:left]
            crc, left = zlib.crc32(piece, crc), left - len(piece)
            file.write(piece)
        file.write(crc.to_bytes(4, "big") + tail)


class Far(asyncio.Protocol):
    """A server that takes its time, but not for tasks `old-…`.

    A task `ready-MS-…` or `soon-MS-…` is finished from that moment of 1970 on, where MS is not 0; the
    first kind is answered at once.
    """

    first = polled = 0.0  # when the first request and the first poll since the last report came in
    polls: ClassVar[Counter[str]] = Counter()
    url = ""
    file = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.got = transport, b""

    def data_received(self, data: bytes) -> None:
        Far.first = Far.first or time.time()
        self.got += data
        head, end, body = self.got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not end or len(body) < int(length[1] if length else 0):
            return
        self.got = b""
        path = head.split(b" ", 2)[1].decode()
        answer, delay, kind = b"", DELAY, "application/json"
        if path.startswith(TASKS):
            task_id = path.rpartition("/")[2]
            Far.polled = Far.polled or time.time()
            Far.polls[task_id] += 1
            delay = 0.0 if task_id.startswith(("ready-", "old-")) else DELAY
            moment = int(task_id.split("-")[1]) if task_id.startswith(("ready-", "soon-")) else 0
            if 0 < moment <= time.time() * 1000:
                answer = json.dumps({"links": {"download": f"{Far.url}/files/{task_id}"}}).encode()
        elif path == "/report":
            seen = {"first": Far.first, "polled": Far.polled, "polls": Far.polls}
            answer, delay = json.dumps(seen).encode(), 0.0
            Far.first = Far.polled = 0.0
            Far.polls.clear()
        elif path == "/oauth/token":
            answer, delay = b'{"access_token": "token", "expires_in": 86400}', 0.0
        else:
            answer, delay, kind = Far.file, 0.0, "image/png"
        status = (
            f"200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(answer)}" if answer else "204 No Content"
        )
        whole = f"HTTP/1.1 {status}\r\n\r\n".encode() + answer
        asyncio.get_running_loop().call_later(delay, self.transport.write, whole)

    @staticmethod
    async def serve(port: int) -> None:
        Far.url = f"http://127.0.0.1:{port}"
        with tempfile.NamedTemporaryFile() as file:
            write_png(Path(file.name), 1000)
            Far.file = Path(file.name).read_bytes()
        server = await asyncio.get_running_loop().create_server(Far, "127.0.0.1", port)
        await server.serve_forever()


def far_server(folder: Path) -> Server:
    port = free_port()
    return Server(folder, port, [sys.executable, __file__, "--serve", str(port)])


def report(server: Server) -> dict[str, Any]:
    """What the far server saw since the last time."""
    with urlopen(f"{server.url}/report", timeout=30) as response:
        seen: dict[str, Any] = json.load(response)
    return seen


# --- what is measured ------------------------------------------------------------------------


@dataclass
class Run:
    """A contender's process. Times are seconds since 1970."""

    pid: int
    start: float
    log: Path
    end: float = 0.0
    cpu: float = 0.0  # seconds, user and system
    peak: float = 0.0  # MiB
    stood: list[float] = field(default_factory=list)  # seconds that the live line stood still, see `watch`

    def note_peak(self) -> None:
        """From its own high-water mark: `ru_maxrss` has that of the process that started it, too."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        self.peak = int(found[1]) / 1024 if found else self.peak  # a process that ends has none

    def wait(self) -> Run:
        ended = os.pidfd_open(self.pid)
        while not select.select([ended], [], [], 0.02)[0]:
            self.note_peak()
        os.close(ended)
        _, status, used = os.wait4(self.pid, 0)
        ALIVE.discard(self.pid)
        self.end = time.time()
        self.cpu = used.ru_utime + used.ru_stime
        if status:
            text = self.log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"ended with {os.waitstatus_to_exitcode(status)}:\n{text}")
        return self

    def stop(self) -> Run:
        self.note_peak()
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()


def start(
    command: Sequence[str | Path], folder: Path, env: dict[str, str] | None = None, terminal: bool = False
) -> Run:
    """Start a contender on its core; its log goes to a file, as a daemon's does, or to a terminal."""
    log = folder / "log"
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(log.open("w"))
        if terminal:
            reader, writer = map(os.fdopen, pty.openpty(), ("rb", "wb"))
            file = stack.enter_context(writer)
        os.sched_setaffinity(0, {MEASURED})  # a child inherits it
        began = time.time()
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": os.environ["PATH"], **(env or {})},
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
        os.sched_setaffinity(0, {SERVERS})
    process.returncode = 0  # `Run.wait` looks after it
    ALIVE.add(process.pid)
    run = Run(process.pid, began, log)
    if terminal:
        threading.Thread(target=watch, args=(run, reader), daemon=True).start()
    return run


def watch(run: Run, terminal: Any) -> None:
    """Note for how long the live line stands still once the log has said something.

    Until the terminal is closed; all that is said goes to the log.
    """
    text, last, since = b"", b"", 0.0
    with terminal, run.log.open("wb", buffering=0) as log, contextlib.suppress(OSError):
        while data := os.read(terminal.fileno(), 65536):
            log.write(data)
            text, end = text + data, 0
            # Between these two is the live line; a line of the log ends with \n.
            for shown in re.finditer(rb"\x1b\[\?7l(.*?)\x1b\[\?7h|\n", text):
                line, end = shown[1], shown.end()
                if line is None:
                    since = since or time.time()
                elif line and line != last:
                    run.stood += [time.time() - since] if since else []
                    last, since = line, 0.0
            text = text[end:]


@contextlib.contextmanager
def home(parent: Path, task_ids: Sequence[str] = (), added: str = "2026-01-01T00:00:00Z") -> Iterator[Path]:
    """A folder with a database.json of these orders and an orders folder, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        (folder / "orders").mkdir()
        (folder / "adds").mkdir()
        orders = {task_id: {"projectID": "project", "added": added} for task_id in task_ids}
        (folder / "database.json").write_text(json.dumps({"orders": orders, "failed": {}}, indent=4))
        os.sync()  # what an earlier run left to be written is not this one's
        yield folder
    os.sync()


def poller(server: Server, folder: Path, *arguments: str, terminal: bool = False, **more: str) -> Run:
    env = {
        **SETTINGS, "BASEURL": server.url, "TOKEN_URL": f"{server.url}/oauth/token",
        "DATABASE": str(folder / "database.json"), "ORDERS_DIR": str(folder / "orders"), **more,
    }  # fmt: skip
    return start([sys.executable, CODE / "poller.py", *arguments], folder, env, terminal)


def seed_loop(server: Server, folder: Path, most: int) -> Run:
    return start([sys.executable, __file__, "--seed", server.url, folder, str(most)], folder)


def curl(folder: Path, urls: Sequence[str]) -> Run:
    """B. Files go to orders/, empty answers to nowhere; the token goes along."""
    lines = ['header = "Authorization: Bearer token"']
    for url in urls:
        place = "/dev/null" if TASKS in url else f"orders/{url.rpartition('/')[2]}.png"
        lines += [f'url = "{url}"', f'output = "{place}"']
    (folder / "curlrc").write_text("\n".join(lines))
    command = ["curl", "-q", "-sS", "--fail", "--parallel", "--parallel-max", str(AT_ONCE), "-K", "curlrc"]
    return start(command, folder)


def pending(folder: Path) -> int:
    return len(json.loads((folder / "database.json").read_text())["orders"])


def names(kind: str, count: int) -> list[str]:
    return [f"{kind}-4f82-4e87-8cd3-{number:012d}" for number in range(count)]


def expect(true: bool, what: str) -> None:
    if not true:
        raise SystemExit(f"this benchmark or the poller is broken: {what}")


def until(true: Callable[[], Any], what: str) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + 60
    while not true():
        expect(time.monotonic() < deadline, what)
        time.sleep(0.1)


# --- the table -------------------------------------------------------------------------------

UNITS = {"s": 1.0, "ms": 1e3, "MiB": 1.0, "%": 100.0, "": 1.0}


def number(value: float, unit: str = "") -> str:
    value *= UNITS[unit]
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def spread(values: Sequence[float], unit: str = "") -> str:
    low, middle, high = (number(value, unit) for value in (min(values), median(values), max(values)))
    return f"{middle} ({low}-{high})" if len(values) > 1 else middle


def middle(values: Sequence[float], unit: str) -> str:
    return f"{number(median(values), unit)} {unit}"


@dataclass
class Table:
    """A line for each figure: what is judged, one value for each run, and its bar."""

    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(
        self,
        what: str,
        own: str,
        beside: str,
        values: Sequence[float],
        unit: str = "",
        *,
        least: float | None = None,
        most: float | None = None,
        below: float | None = None,
        judged: Callable[[Sequence[float]], float] = median,
    ) -> None:
        value, bar, met = judged(values), "", ""
        for limit, sign, good in (
            (least, "≥", least is not None and value >= least),
            (most, "≤", most is not None and value <= most),
            (below, "<", below is not None and value < below),
        ):
            if limit is not None:
                bar = f"{sign} {limit * UNITS[unit]:g} {unit}".rstrip()
                met = "yes" if good else "NO"
        self.rows.append((what, own, beside, f"{spread(values, unit)} {unit}".rstrip(), bar, met))

    def text(self, about: Sequence[str]) -> str:
        rows = [("figure", "poller", "beside it", "median (min-max)", "bar", "met"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join((*about, "", lines[0], "-" * max(map(len, lines)), *lines[1:]))


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# --- the parts -------------------------------------------------------------------------------


@dataclass
class Bench:
    folder: Path
    size: Size
    nginx: Nginx
    far: Server
    table: Table = field(default_factory=Table)

    def sweep(self) -> None:
        """Pending orders: each is polled once, and all are still there."""
        size = self.size
        took: dict[tuple[str, int], list[float]] = {}
        cpu: dict[tuple[str, int], list[float]] = {}

        def note(who: str, run: Run, count: int, of: int) -> None:
            run.wait()
            seconds = run.end - self.nginx.first(TASKS, count)
            took.setdefault((who, of), []).append(seconds * of / count)
            cpu.setdefault((who, of), []).append(run.cpu / count)

        for turn in range(size.runs):
            for count, part in zip(size.sweeps, size.part, strict=True):
                progress(f"sweep of {count}, {turn + 1} of {size.runs}")
                tasks = names("pending", count)
                with home(self.folder, tasks) as folder:
                    note("A", seed_loop(self.nginx, folder, part), part, count)
                with home(self.folder, tasks) as folder:
                    note("", poller(self.nginx, folder, "--once"), count, count)
                    expect(pending(folder) == count, "a pending order is gone")
                with home(self.folder) as folder:
                    note("B", curl(folder, [self.nginx.url + TASKS + task for task in tasks]), count, count)
        small, *_, large = size.sweeps
        for count, part in zip(size.sweeps, size.part, strict=True):
            own, ours = took["", count], middle(took["", count], "s")
            what, ratio = f"sweep of {count:,} pending orders", ratios(took["A", count], own)
            beside = f"A {middle(took['A', count], 's')}{'' if part == count else f', from {part}'}"
            self.table.add(what, ours, beside, ratio, least=8 if count == small else None)
            self.table.add("", "", f"B {middle(took['B', count], 's')}", ratios(own, took["B", count]))
        each = {count: [seconds / count for seconds in took["", count]] for count in size.sweeps}
        self.table.add(
            f"  time per order beside {small:,}'s", middle(each[large], "ms"), middle(each[small], "ms"),
            ratios(each[large], each[small]), most=1.2,
        )  # fmt: skip
        self.table.add(
            "  CPU per poll, with start and log", middle(cpu["", large], "ms"),
            f"A {middle(cpu['A', small], 'ms')}, B {middle(cpu['B', large], 'ms')}", cpu["", large], "ms",
        )  # fmt: skip

    def polls(self) -> None:
        """CPU of a daemon that has more pending orders than it can poll, in turns with bare loops."""
        count, own = self.size.polls, list[float]()
        loops: dict[str, list[float]] = {"session": [], "anew": []}
        with home(self.folder, names("pending", count)) as folder, home(self.folder) as bare:
            daemon = poller(self.nginx, folder, POLL_INTERVAL="0.1")
            for turn in range(self.size.runs + 1):
                progress(f"{count} polls, {turn} of {self.size.runs}")
                polled, before = 0, cpu_of(daemon.pid)
                while polled < count:
                    time.sleep(0.2)
                    polled += len(self.nginx.times(TASKS))
                own.append((cpu_of(daemon.pid) - before) / polled)
                if turn:
                    os.kill(daemon.pid, signal.SIGSTOP)
                    for how, spells in loops.items():
                        command = [sys.executable, __file__, "--loop", self.nginx.url, str(count), how]
                        spells.append(float(start(command, bare).wait().log.read_text()))
                    self.nginx.times(TASKS)
                    os.kill(daemon.pid, signal.SIGCONT)
            daemon.stop()
            while self.nginx.times(TASKS):  # what was on its way is logged a little later
                time.sleep(0.5)
        del own[0]  # it has the start and a log line for each order
        self.table.add(
            "CPU per poll", middle(own, "ms"), f"Session.get {middle(loops['session'], 'ms')}",
            ratios(own, loops["session"]), most=1.4,
        )  # fmt: skip
        self.table.add(
            "", "", f"requests.get {middle(loops['anew'], 'ms')}", ratios(own, loops["anew"]), below=0.7
        )

    def tls(self) -> None:
        """Polls over TLS, of which one in ten gets a 404, beside those that all get a 204."""
        count = self.size.tls
        tasks = {"204": names("pending", count), "404": names("pending", count - count // 10)}
        for place, task_id in enumerate(names("lost", count // 10)):
            tasks["404"].insert(place * 10, task_id)
        cpu: dict[str, list[float]] = {"204": [], "404": []}
        for turn in range(self.size.runs):
            progress(f"{count} polls over TLS, {turn + 1} of {self.size.runs}")
            for what, each in cpu.items():
                with home(self.folder, tasks[what]) as folder:
                    run = poller(self.nginx, folder, "--once", terminal=False, **self.nginx.tls).wait()
                    answers = Counter(status for _, status in self.nginx.seen(TASKS))
                    expect(answers[404] == (what == "404") * (count // 10), "a 404 is missing")
                    expect(answers.total() == count == pending(folder), "a poll or an order is missing")
                    each.append(run.cpu / count)
        self.table.add(
            "CPU per poll over TLS, 1 in 10 a 404", middle(cpu["404"], "ms"),
            f"all get a 204 {middle(cpu['204'], 'ms')}", ratios(cpu["404"], cpu["204"]), most=1.5,
        )  # fmt: skip

    def delay(self) -> None:
        """Pending orders at a server that is not near."""
        count, took = self.size.far, []
        for turn in range(self.size.runs):
            progress(f"{DELAY * 1000:.0f} ms to the server, {turn + 1} of {self.size.runs}")
            with home(self.folder, names("pending", count)) as folder:
                report(self.far)
                run = poller(self.far, folder, "--once").wait()
                seen = report(self.far)
                expect(sum(seen["polls"].values()) == count, "a poll is missing")
                took.append(run.end - seen["polled"])
        ideal = count * DELAY / AT_ONCE
        self.table.add(
            f"{count:,} pending, {DELAY * 1000:.0f} ms away", middle(took, "s"),
            f"{count} x {DELAY * 1000:.0f} ms / {AT_ONCE} = {ideal:.2f} s",
            [seconds / ideal for seconds in took], most=1.15,
        )  # fmt: skip

    def deliver(self) -> None:
        """Finished orders: poll, download, and ours durable."""
        count = self.size.files
        tasks = names("small", count)
        took: dict[str, list[float]] = {"A": [], "": [], "B": []}

        def note(who: str, run: Run, folder: Path) -> None:
            run.wait()
            took[who].append(run.end - self.nginx.first("/" if who == "B" else TASKS, count))
            sizes = [path.stat().st_size for path in (folder / "orders").iterdir()]
            expect(sizes == [100_000] * count, f"{who or 'the poller'} did not bring every file whole")

        for turn in range(self.size.runs):
            progress(f"{count} files, {turn + 1} of {self.size.runs}")
            with home(self.folder, tasks) as folder:
                note("A", seed_loop(self.nginx, folder, count), folder)
            with home(self.folder, tasks) as folder:
                note("", poller(self.nginx, folder, "--once"), folder)
                expect(pending(folder) == 0, "a delivered order is still there")
            with home(self.folder) as folder:
                note("B", curl(folder, [f"{self.nginx.url}/files/{task}" for task in tasks]), folder)
        own = took[""]
        self.table.add(
            f"{count:,} finished, 100 kB, fsynced", middle(own, "s"), f"A {middle(took['A'], 's')}, no fsync",
            ratios(took["A"], own), least=2,
        )  # fmt: skip
        self.table.add("", "", f"B {middle(took['B'], 's')}, no poll", ratios(own, took["B"]))

    def large(self) -> None:
        """One large file."""
        own, beside, peak = [], [], []

        def ours() -> None:
            with home(self.folder, ["large-1"]) as folder:
                run = poller(self.nginx, folder, "--once").wait()
                own.append(run.end - self.nginx.first(TASKS, 1))
                peak.append(run.peak)
                size = (folder / "orders/large-1.png").stat().st_size
                expect(size == self.size.large * MIB, "the large file is not whole")

        def theirs() -> None:
            with home(self.folder) as folder:
                command = f"curl -q -sS --fail -o F {self.nginx.url}/files/large && sync F"
                run = start(["sh", "-c", command], folder).wait()
                beside.append(run.end - self.nginx.first("/", 1))

        for turn in range(self.size.runs):
            progress(f"{self.size.large} MiB, {turn + 1} of {self.size.runs}")
            # Each one first and second: that makes a difference of half the time, whoever it is.
            for contender in (ours, theirs, theirs, ours):
                contender()
        own, beside = (
            [sum(pair) / 2 for pair in zip(took[::2], took[1::2], strict=True)] for took in (own, beside)
        )
        self.table.add(
            f"one file of {self.size.large} MiB", middle(own, "s"), f"curl && sync {middle(beside, 's')}",
            ratios(own, beside), most=1.25,
        )  # fmt: skip
        self.table.add("  peak memory", f"{max(peak):.1f} MiB", "", peak, "MiB", below=45, judged=max)

    def start(self) -> None:
        """From the exec to the first byte at the server."""
        took: dict[str, list[float]] = {"A": [], "": []}
        for turn in range(2 * self.size.runs):
            progress(f"start, {turn + 1} of {2 * self.size.runs}")
            for who, times in took.items():
                with home(self.folder) as folder:
                    report(self.far)
                    run = seed_loop(self.far, folder, 0) if who else poller(self.far, folder, "--once")
                    run.wait()
                    times.append(report(self.far)["first"] - run.start)
        self.table.add(
            "start to the first request", middle(took[""], "ms"), f"A {middle(took['A'], 'ms')}",
            took[""], "ms", below=0.3,
        )  # fmt: skip

    def idle(self) -> None:
        """A daemon with many orders that are not due; beside it, one with some that render."""
        size, count = self.size, self.size.sweeps[-1]
        with home(self.folder, names("pending", count)) as idle, home(self.folder) as busy:
            progress(f"{count} orders pending")
            sleeper = poller(self.nginx, idle, POLL_INTERVAL="3600")
            renderer = poller(self.far, busy)
            polled = 0
            while polled < count:
                polled += len(self.nginx.times(TASKS))
                time.sleep(0.2)
            report(self.far)
            ready = place_orders(busy / "database.json", size.renders)
            progress(f"renders of {min(size.renders)} to {max(size.renders)} s")
            time.sleep(2)
            spells, step = [], size.spell
            for _ in range(5):
                before = cpu_of(sleeper.pid)
                time.sleep(step)
                spells.append((cpu_of(sleeper.pid) - before) / step)
            deadline = time.monotonic() + 2 * max(size.renders) + 20
            while pending(busy) and time.monotonic() < deadline:
                time.sleep(0.5)
            expect(pending(busy) == 0, "an order is never delivered")
            renderer.stop()
            peak = sleeper.stop().peak
            polls = report(self.far)["polls"]
            late: dict[int, list[float]] = {}
            for task_id, (moment, render, batch) in ready.items():
                # A rename sets ctime: so that is when the file had its final name.
                here = (busy / "orders" / f"{task_id}.png").stat().st_ctime
                late.setdefault(batch, []).append((here - moment) / (render / 4 + 2))
        self.table.add(
            f"{count:,} pending: peak memory", f"{peak:.1f} MiB", "", [peak], "MiB", below=64, judged=max
        )
        self.table.add(
            f"  CPU of a core, {5 * step:.0f} s idle", f"{sum(spells) / 5 * 100:.2f} %", "",
            spells, "%", below=0.002,
        )  # fmt: skip
        self.table.add(
            f"renders of {min(size.renders)} to {max(size.renders)} s: lateness", "", "25 % of render + 2 s",
            [max(values) for values in late.values()], most=1, judged=max,
        )  # fmt: skip
        each = sum(polls.values()) / len(ready)
        loop = sum(-(-render // 2) + 1 for _, render, _ in ready.values()) / len(ready)
        self.table.add(
            "  polls per order", f"{each:.1f}", f"{loop:.1f} every 2 s", [loop / each],
        )  # fmt: skip

    def limit(self) -> None:
        """Finished orders at a server that takes only so many requests a second; else it is 429 or 503."""
        count, took, refused = self.size.limited, [], []
        ideal = (2 * count - BURST) / RATE
        for turn in range(2 if self.size.runs > 2 else 1):
            progress(f"{count} files, {RATE} requests a second, {turn + 1}")
            with contextlib.ExitStack() as stack:
                runs = []
                for status, port in self.nginx.limited.items():
                    folder = stack.enter_context(home(self.folder, names("small", count)))
                    url = f"http://127.0.0.1:{port}"
                    run = poller(self.nginx, folder, BASEURL=url, TOKEN_URL=self.nginx.url + "/oauth/token")
                    runs.append((status, folder, run))
                deadline = time.monotonic() + 10 * ideal + 20
                while any(pending(folder) for _, folder, _ in runs) and time.monotonic() < deadline:
                    time.sleep(0.2)
                for status, folder, run in runs:
                    run.stop()
                    left = pending(folder)
                    if left:
                        progress(f"{left} of {count} are still not delivered where {status} is answered")
                    seen = self.nginx.seen("/", f"times-{status}")
                    ends = [path.stat().st_ctime for path in (folder / "orders").iterdir()]
                    first = min(moment for moment, _ in seen)
                    took.append(float("inf") if left else max(ends) - first)
                    refused.append(sum(answer == status for _, answer in seen) / len(seen))
        self.nginx.times(TASKS)
        expect(min(took) > 0.9 * ideal, "the limit is none")
        self.table.add(
            f"{count} finished, at most {RATE} a second", middle(took, "s"),
            f"({2 * count} - {BURST}) / {RATE} = {ideal:.1f} s",
            [seconds / ideal for seconds in took], most=1.5, judged=max,
        )  # fmt: skip
        self.table.add("  requests answered 429 or 503", "", "of all", refused, "%", most=0.2, judged=max)

    def many(self) -> None:
        """Many pending orders, of which some finish; beside it the same, where none of them does."""
        size, old = self.size, names("old", self.size.pending - self.size.finished)
        with home(self.folder, old) as busy, home(self.folder, old) as still, home(self.folder) as third:
            progress(f"{size.pending} orders pending, {size.finished} finished in {size.within:.0f} s")
            alone = [add_order(busy, f"alone-{number}") for number in range(size.adds)]
            reader = poller(self.far, busy, terminal=True, POLL_INTERVAL="3600", COLUMNS="200")
            beside = poller(self.far, still, terminal=True, POLL_INTERVAL="3600", COLUMNS="200")
            report(self.far)
            idler = poller(self.far, third)
            polled = 0
            while polled < 2 * len(old) + size.adds:
                time.sleep(0.2)
                polled += sum(report(self.far)["polls"].values())
            now, step = time.time(), size.within / size.finished
            moments = [int((now + 1 + number * step) * 1000) for number in range(size.finished)]
            type_orders(
                busy, [f"soon-{moment}-{number}" for number, moment in enumerate(moments)], size.within
            )
            type_orders(still, [f"soon-0-{number}" for number in range(size.finished)], size.within)
            entries = (f'"id-{number:093d}": {{}}' for number in range(size.broken * 10_000))
            (third / "database.json").write_text('{"orders": {' + ", ".join(entries))  # without its end
            time.sleep(1)
            runs = reader, beside, idler
            before, began = [cpu_of(run.pid) for run in runs], time.time()
            report(self.far)
            adds = []
            for number in range(size.adds):
                time.sleep(max(0.0, began + number * size.within / size.adds - time.time()))
                adds.append(add_order(busy, f"added-{number}"))
            time.sleep(max(0.0, began + size.within - time.time()))
            until(lambda: files(busy) >= size.finished / 4 and reader.stood, "few files were delivered")
            until(lambda: "line 1" in idler.log.read_text(), "a broken file is not noticed")
            cpu = [cpu_of(run.pid) - start for run, start in zip(runs, before, strict=True)]
            seconds, polls = time.time() - began, report(self.far)["polls"]
            peak = reader.stop().peak
            idler.stop()
            beside.stop()
        theirs = sum(count for task, count in polls.items() if task.startswith("soon-0-"))
        ours = sum(polls.values()) - theirs
        above = (cpu[0] - cpu[1] * ours / theirs) / seconds
        pauses = sorted(reader.stood)
        self.table.add(
            f"{size.pending:,} pending, {size.finished:,} finished", f"{cpu[0] / seconds * 100:.1f} %",
            f"{cpu[1] / seconds * 100:.1f} %, none finished", [above], "%", most=0.12,
        )  # fmt: skip
        self.table.add(
            "  db.py add at the same time", middle(adds, "s"), f"without a poller {middle(alone, 's')}",
            [median(adds) / median(alone)], most=1.5,
        )  # fmt: skip
        self.table.add(
            "  live line after a delivery", "", "99 of 100, and the longest",
            [pauses[int(len(pauses) * 0.99)], pauses[-1]], "s", below=0.5, judged=min,
        )  # fmt: skip
        self.table.add("  peak memory", f"{peak:.1f} MiB", "", [peak], "MiB", below=80, judged=max)
        self.table.add(
            f"broken database.json, {size.broken} MB: CPU", "", "of a core",
            [cpu[2] / seconds], "%", below=0.01,
        )  # fmt: skip


def files(folder: Path) -> int:
    """How many files have come."""
    return len(list((folder / "orders").glob("*.png")))


def add_order(folder: Path, task_id: str) -> float:
    """Seconds that `db.py add` takes."""
    env = {"DATABASE": str(folder / "database.json"), "HOME": "/nonexistent"}
    run = start([sys.executable, CODE / "db.py", "add", task_id], folder / "adds", env).wait()
    return run.end - run.start


def type_orders(folder: Path, task_ids: Sequence[str], oldest: float) -> None:
    """Add all of them at once, as an editor does it; of all ages up to so many seconds."""
    database, now = folder / "database.json", datetime.now(timezone.utc)
    data = json.loads(database.read_text())
    for number, task_id in enumerate(task_ids):
        age = timedelta(seconds=number * 7 % len(task_ids) / len(task_ids) * oldest)
        data["orders"][task_id] = {"projectID": "project", "added": (now - age).isoformat()}
    (folder / "edited").write_text(json.dumps(data, indent=4))
    (folder / "edited").replace(database)


def place_orders(database: Path, renders: Sequence[int]) -> dict[str, tuple[float, int, int]]:
    """Place an order for each render time, five times; gives its moment, render time and batch."""
    sys.path.insert(0, str(CODE))
    import db

    ready = {}
    for batch in range(5):
        for render in renders:
            moment = time.time() + render
            task_id = f"ready-{moment * 1000:.0f}-{render}-{batch}"
            ready[task_id] = (moment, render, batch)
            db.add_order(task_id, "project", database)
    return ready


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has taken: its clock, as clock_getcpuclockid(3) makes it."""
    return time.clock_gettime((~pid << 3) | 2)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


# --- python tests/benchmark.py ---------------------------------------------------------------

PARTS = ("start", "sweep", "polls", "tls", "delay", "deliver", "large", "idle", "limit", "many")


def about(folder: Path, size: Size) -> list[str]:
    """What stands above the table."""

    def said(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
        return f"{Path(command[0]).name} {found[0] if found else '?'}"

    disk = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True).stdout.split()[
        -1
    ]
    where = f"servers on core {SERVERS}, what is measured on core {MEASURED}, by sched_setaffinity"
    return [
        f"{date.today()}, Python {platform.python_version()}, {said(NGINX_PATH, '-v')}, {said('curl', '-V')},"
        f" {len(CORES)} cores, files on {disk}",
        where if SERVERS != MEASURED else "all of it on one core",
        f"A: the seed's loop in Python, without its pause. B: curl --parallel --parallel-max {AT_ONCE}.",
        f"{size.runs} runs, in turns. No unit: a ratio in a run: A / poller, poller / B, or poller / beside.",
        "met: by the median; memory and lateness by the worst.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: smaller, and one run of each")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--code", type=Path, default=ROOT, help="where the poller is that is measured")
    # What the benchmark starts of itself.
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    global CODE
    CODE = given.code.resolve()
    if given.serve:
        asyncio.run(Far.serve(given.serve))
    elif given.seed:
        seed(given.seed[0], Path(given.seed[1]), int(given.seed[2]))
    elif given.loop:
        bare_loop(given.loop[0], int(given.loop[1]), given.loop[2] == "anew")
    else:
        measure(QUICK if given.quick else Size(), given.only or PARTS)


def measure(size: Size, parts: Sequence[str]) -> None:
    os.sched_setaffinity(0, {SERVERS})
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        nginx = stack.enter_context(contextlib.closing(Nginx(folder, size.large)))
        far = stack.enter_context(contextlib.closing(far_server(folder)))
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in ALIVE])
        bench = Bench(folder, size, nginx, far)
        for part in PARTS:
            if part in parts:
                getattr(bench, part)()
        print(bench.table.text(about(folder, size)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
