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
import operator
import os
import platform
import pty
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import requests
import trustme

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
TASKS = "/grafx/api/v1/environment/bench/output/tasks/"
TOKEN = '{"access_token": "token", "token_type": "Bearer", "expires_in": 86400}'
CORES = sorted(os.sched_getaffinity(0))
SERVERS, MEASURED = CORES[0], CORES[-1]
DELAY = 0.05  # seconds that the far server takes for each answer
AT_ONCE = 8
RATE, BURST = 20, 10  # requests a second where GraFx limits them, and how many may come at once
STARTED: list[subprocess.Popen[bytes]] = []
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


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def expect(true: object, what: str) -> None:
    if not true:
        raise SystemExit(f"this benchmark or the poller is broken: {what}")


def until(true: Callable[[], Any], what: str, patience: float = 60.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + patience
    while not true():
        expect(time.monotonic() < deadline, what)
        time.sleep(0.1)


# --- the table -------------------------------------------------------------------------------

UNITS = {"s": 1.0, "ms": 1e3, "MiB": 1.0, "%": 100.0, "": 1.0}
MEETS = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


def number(value: float, unit: str = "") -> str:
    value *= UNITS[unit]
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def middle(values: Sequence[float], unit: str) -> str:
    return f"{number(median(values), unit)} {unit}"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


@dataclass
class Table:
    """A line for each figure: what is judged, one value for each run, and its bar, say "≤ 1.2"."""

    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(
        self, what: str, own: str, beside: str, values: Sequence[float], unit: str = "", bar: str = "",
        judged: Callable[[Sequence[float]], float] = median,
    ) -> None:  # fmt: skip
        low, mid, high = (number(value, unit) for value in (min(values), median(values), max(values)))
        spread = f"{mid} ({low}-{high})" if len(values) > 1 else mid
        met = ""
        if bar:
            sign, limit = bar.split()
            met = "yes" if MEETS[sign](judged(values) * UNITS[unit], float(limit)) else "NO"
        said = (f"{text} {unit}".rstrip() if text else "" for text in (spread, bar))
        self.rows.append((what, own, beside, *said, met))

    def text(self, about: Sequence[str]) -> str:
        rows = [("figure", "poller", "beside it", "median (min-max)", "bar", "met"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join((*about, "", lines[0], "-" * max(map(len, lines)), *lines[1:]))


# --- what stands beside the poller -----------------------------------------------------------


def seed(base_url: str, folder: Path, most: int) -> None:
    """A: one turn of the seed's timed loop over the first `most` orders, as straight as Python has it."""
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

    def auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = "Bearer token"
        return request

    session = requests.Session()
    for turn in range(count + 20):
        if turn == 20:  # the first ones connect
            before = time.process_time()
        url = f"{base_url}{TASKS}pending-{turn}"
        if anew:  # as the seed does
            response = requests.get(url, headers={"Authorization": "Bearer token"}, timeout=60)
        else:
            response = session.get(url, auth=auth, stream=True, timeout=60)
            response.raw.drain_conn()  # so that the connection can be used again
        expect(response.status_code == 204, f"answered {response.status_code}")
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
        location = /oauth/token { default_type application/json; return 200 'TOKEN'; }
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
        listen 127.0.0.1:THERE;
        access_log PLACE/times-STATUS times;
        limit_req zone=STATUS burst=BURST nodelay; limit_req_status STATUS;
        root PLACE/files;
        location ~ ^TASKS(?<task>.+)$ { try_files /none @finished; }
        location @finished {
            default_type application/json;
            return 200 '{"links": {"download": "http://127.0.0.1:THERE/files/$task"}}';
        }
        location /files/small { try_files /small.png =404; }
    }
"""


def filled(text: str, **words: object) -> str:
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def serve(port: int, command: Sequence[str | Path]) -> str:
    """Start a server; gives what a poller's BASEURL is."""
    STARTED.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    until(answers, f"{command[0]} does not start")
    return f"http://127.0.0.1:{port}"


class Nginx:
    """Fixed answers, so that the server is not what is measured."""

    def __init__(self, place: Path, large: int) -> None:
        self.place, port, tls = place, free_port(), free_port()
        (place / "files").mkdir(parents=True)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(place / "ca.pem")
        issued = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
        issued.write_to_path(place / "server.pem")
        self.tls = {"BASEURL": f"https://127.0.0.1:{tls}", "REQUESTS_CA_BUNDLE": str(place / "ca.pem")}
        write_png(place / "files/small.png", 100_000)
        write_png(place / "files/large.png", large * MIB)
        self.limited = {status: free_port() for status in (429, 503)}
        limited = "".join(
            filled(LIMITED, THERE=self.limited[status], STATUS=status) for status in self.limited
        )
        words = {"PLACE": place, "PORT": port, "TLS": tls, "TASKS": TASKS, "RATE": RATE, "BURST": BURST}
        (place / "nginx.conf").write_text(filled(NGINX, LIMITED=limited, TOKEN=TOKEN, **words))
        self.read: Counter[str] = Counter()  # bytes of its logs
        self.url = serve(port, [NGINX_PATH, "-p", place, "-c", place / "nginx.conf", "-e", "stderr"])

    def seen(self, what: str, name: str = "times") -> list[tuple[float, int]]:
        """The requests for `what` since the last call: when each came in, and what it was answered."""
        with (self.place / name).open("rb") as log:
            log.seek(self.read[name])
            whole, _, _ = log.read().rpartition(b"\n")
            self.read[name] += len(whole)
        lines = [line.split() for line in whole.decode().splitlines() if line]
        return [
            (float(end) - float(took), int(code)) for end, took, code, uri in lines if uri.startswith(what)
        ]

    def first(self, what: str, count: int) -> float:
        """When the first request for `what` since the last call came in; there must be `count` of them."""
        seen = self.seen(what)
        expect(len(seen) == count, f"{len(seen)} requests for {what}, where there should be {count}")
        return min(seen)[0]


def write_png(path: Path, size: int) -> None:
    """What begins and ends as a PNG does."""
    noise = os.urandom(MIB)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for left in range(size - 20, 0, -MIB):
            file.write(noise[:left])
        file.write(b"\0\0\0\0IEND\xaeB\x60\x82")


@dataclass
class Far:
    """A server that takes its time, but not for tasks `old-…`.

    A task `ready-MS-…` or `soon-MS-…` is finished from that moment of 1970 on, where MS is not 0; the
    first kind is answered at once.
    """

    port: int
    file: bytes
    first = polled = 0.0  # when the first request and the first poll since the last report came in
    polls: Counter[str] = field(default_factory=Counter)

    def answer(self, path: str) -> tuple[float, bytes, str]:
        """For how long to wait; the body, and its type."""
        task_id, kind = path.rpartition("/")[2], "application/json"
        if path == "/oauth/token":
            return 0.0, TOKEN.encode(), kind
        if path == "/report":
            seen = json.dumps({"first": self.first, "polled": self.polled, "polls": self.polls})
            self.first = self.polled = 0.0
            self.polls.clear()
            return 0.0, seen.encode(), kind
        if not path.startswith(TASKS):
            return 0.0, self.file, "image/png"
        self.polled = self.polled or time.time()
        self.polls[task_id] += 1
        moment = int(task_id.split("-")[1]) if task_id.startswith(("ready-", "soon-")) else 0
        finished = 0 < moment <= time.time() * 1000
        link = {"links": {"download": f"http://127.0.0.1:{self.port}/files/{task_id}"}}
        delay = 0.0 if task_id.startswith(("ready-", "old-")) else DELAY
        return delay, json.dumps(link).encode() if finished else b"", kind

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.first = self.first or time.time()
                if length := re.search(rb"(?i)content-length: *(\d+)", head):
                    await reader.readexactly(int(length[1]))
                delay, body, kind = self.answer(head.split(b" ", 2)[1].decode())
                status = f"200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}"
                await asyncio.sleep(delay)
                writer.write(f"HTTP/1.1 {status if body else '204 No Content'}\r\n\r\n".encode() + body)
        writer.close()

    async def serve(self) -> None:
        server = await asyncio.start_server(self.converse, "127.0.0.1", self.port)
        await server.serve_forever()


def report(far: str) -> dict[str, Any]:
    """What the far server saw since the last time."""
    with urlopen(f"{far}/report", timeout=30) as response:
        seen: dict[str, Any] = json.load(response)
    return seen


# --- what is measured ------------------------------------------------------------------------


@dataclass
class Run:
    """A contender's process. Times are seconds since 1970."""

    process: subprocess.Popen[bytes]
    start: float
    log: Path
    end: float = 0.0
    used: float = 0.0  # seconds of CPU
    peak: float = 0.0  # MiB
    stood: list[float] = field(default_factory=list)  # seconds that the live line stood still, see `watch`

    def note_peak(self) -> None:
        """From its own high-water mark: `ru_maxrss` has that of the process that started it, too."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        self.peak = int(found[1]) / 1024 if found else self.peak  # a process that ends has none

    def cpu(self) -> float:
        """Seconds of CPU up to now: its clock, as clock_getcpuclockid(3) makes it."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def wait(self) -> Run:
        ended = os.pidfd_open(self.process.pid)
        while not select.select([ended], [], [], 0.02)[0]:
            self.note_peak()
        os.close(ended)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = self.process.wait()
        self.end = time.time()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        expect(code == 0, f"ended with {code}:\n{self.log.read_text(errors='replace')[-2000:]}")
        return self

    def stop(self) -> Run:
        self.note_peak()
        self.process.terminate()
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
    STARTED.append(process)
    run = Run(process, began, log)
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
def home(parent: Path, task_ids: Sequence[str] = ()) -> Iterator[Path]:
    """A folder with a database.json of these orders, a day old, and an orders folder, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        (folder / "orders").mkdir()
        (folder / "adds").mkdir()
        added = datetime.now(timezone.utc) - timedelta(days=1)  # after 7 days GraFx forgets a task
        fields = {"projectID": "project", "added": added.isoformat()}
        data = {"orders": dict.fromkeys(task_ids, fields), "failed": {}}
        (folder / "database.json").write_text(json.dumps(data, indent=4))
        os.sync()  # what an earlier run left to be written is not this one's
        yield folder
    os.sync()


def own(what: str, *arguments: object) -> list[str]:
    """The command of this program that does one of HELPERS."""
    return [sys.executable, __file__, "--helper", what, *map(str, arguments)]


def names(kind: str, count: int) -> list[str]:
    return [f"{kind}-4f82-4e87-8cd3-{place:012d}" for place in range(count)]


def pending(folder: Path, rejected: int = 0) -> int:
    data = json.loads((folder / "database.json").read_text())
    expect(len(data.get("failing", {})) == rejected, "an order is rejected")
    return len(data["orders"])


def files(folder: Path) -> list[os.stat_result]:
    return [path.stat() for path in (folder / "orders").glob("*.png")]


# --- the parts -------------------------------------------------------------------------------


@dataclass
class Bench:
    folder: Path
    size: Size
    code: Path  # whose poller.py and db.py are measured
    nginx: Nginx
    far: str
    table: Table = field(default_factory=Table)

    def turns(self, what: str, count: int = 0) -> Iterator[int]:
        for turn in range(count or self.size.runs):
            progress(f"{what}, {turn + 1} of {count or self.size.runs}")
            yield turn

    def poller(self, url: str, folder: Path, *arguments: str, terminal: bool = False, **more: str) -> Run:
        env = {
            **SETTINGS, "BASEURL": url, "TOKEN_URL": f"{url}/oauth/token",
            "DATABASE": str(folder / "database.json"), "ORDERS_DIR": str(folder / "orders"), **more,
        }  # fmt: skip
        return start([sys.executable, self.code / "poller.py", *arguments], folder, env, terminal)

    def add_order(self, folder: Path, task_id: str) -> float:
        """Seconds that `db.py add` takes."""
        env = {"DATABASE": str(folder / "database.json"), "HOME": "/nonexistent"}
        run = start([sys.executable, self.code / "db.py", "add", task_id], folder / "adds", env).wait()
        return run.end - run.start

    def compete(self, who: str, folder: Path, tasks: Sequence[str], most: int, where: str = TASKS) -> Run:
        """A over the first `most`, the poller over all, or B: curl, whose files go to orders/."""
        if who == "A":
            return start(own("seed", self.nginx.url, folder, most), folder).wait()
        if who == "poller":
            return self.poller(self.nginx.url, folder, "--once").wait()
        lines = ['header = "Authorization: Bearer token"']
        for task_id in tasks:
            place = "/dev/null" if where == TASKS else f"orders/{task_id}.png"
            lines += [f'url = "{self.nginx.url}{where}{task_id}"', f'output = "{place}"']
        (folder / "curlrc").write_text("\n".join(lines))
        command = [
            "curl",
            "-q",
            "-sS",
            "--fail",
            "--parallel",
            "--parallel-max",
            str(AT_ONCE),
            "-K",
            "curlrc",
        ]
        return start(command, folder).wait()

    def start(self) -> None:
        """From the exec to the first byte at the server."""
        took = defaultdict(list)
        for _ in self.turns("start", 2 * self.size.runs):
            for who in ("A", "poller"):
                with home(self.folder) as folder:
                    report(self.far)
                    if who == "A":
                        run = start(own("seed", self.far, folder, 0), folder).wait()
                    else:
                        run = self.poller(self.far, folder, "--once").wait()
                    took[who].append(report(self.far)["first"] - run.start)
        beside = f"A {middle(took['A'], 'ms')}"
        mine = took["poller"]
        self.table.add("start to the first request", middle(mine, "ms"), beside, mine, "ms", "< 300")

    def sweep(self) -> None:
        """Pending orders: each is polled once, and all are still there."""
        took, cpu, sweeps = defaultdict(list), defaultdict(list), self.size.sweeps
        for _ in self.turns("sweeps"):
            for count, part in zip(sweeps, self.size.part, strict=True):
                tasks = names("pending", count)
                for who, polls in (("A", part), ("poller", count), ("B", count)):
                    with home(self.folder, tasks) as folder:
                        run = self.compete(who, folder, tasks, part)
                        expect(pending(folder) == count, "a pending order is gone")
                    seconds = run.end - self.nginx.first(TASKS, polls)
                    took[who, count].append(seconds * count / polls)
                    cpu[who, count].append(run.used / polls)
        for count, part in zip(sweeps, self.size.part, strict=True):
            a, mine, b = (took[who, count] for who in ("A", "poller", "B"))
            beside, bar = f"A {middle(a, 's')}, from {part}", "≥ 8" * (count == sweeps[0])
            what = f"sweep of {count:,} pending orders"
            self.table.add(what, middle(mine, "s"), beside, ratios(a, mine), bar=bar)
            self.table.add("", "", f"B {middle(b, 's')}", ratios(mine, b))
        small, large = sweeps[0], sweeps[-1]
        each = {count: [seconds / count for seconds in took["poller", count]] for count in sweeps}
        what, beside = f"  time per order beside {small:,}'s", middle(each[small], "ms")
        self.table.add(what, middle(each[large], "ms"), beside, ratios(each[large], each[small]), bar="≤ 1.2")
        mine = cpu["poller", large]
        beside = f"A {middle(cpu['A', small], 'ms')}, B {middle(cpu['B', large], 'ms')}"
        self.table.add("  CPU per poll, with start and log", middle(mine, "ms"), beside, mine, "ms")

    def polls(self) -> None:
        """CPU of a daemon that has more pending orders than it can poll, in turns with bare loops."""
        count, mine, loops = self.size.polls, list[float](), defaultdict[str, list[float]](list)
        with home(self.folder, names("pending", count)) as folder, home(self.folder) as bare:
            daemon = self.poller(self.nginx.url, folder, POLL_INTERVAL="0.1")
            for turn in self.turns(f"{count} polls", self.size.runs + 1):
                polled, before = 0, daemon.cpu()
                while polled < count:
                    time.sleep(0.2)
                    polled += len(self.nginx.seen(TASKS))
                if turn == 0:  # it has the start and a log line for each order
                    continue
                mine.append((daemon.cpu() - before) / polled)
                daemon.process.send_signal(signal.SIGSTOP)
                for how in ("session", "anew"):
                    run = start(own("loop", self.nginx.url, count, how), bare).wait()
                    loops[how].append(float(run.log.read_text()))
                self.nginx.seen(TASKS)
                daemon.process.send_signal(signal.SIGCONT)
            daemon.stop()
            while self.nginx.seen(TASKS):  # what was on its way is logged a little later
                time.sleep(0.5)
        session, anew = loops["session"], loops["anew"]
        beside = f"Session.get {middle(session, 'ms')}"
        self.table.add("CPU per poll", middle(mine, "ms"), beside, ratios(mine, session), bar="≤ 1.4")
        self.table.add("", "", f"requests.get {middle(anew, 'ms')}", ratios(mine, anew), bar="< 0.7")

    def tls(self) -> None:
        """Polls over TLS, of which one in ten gets a 404, beside those that all get a 204."""
        count, lost = self.size.tls, self.size.tls // 10
        tasks = {0: names("pending", count), lost: names("pending", count - lost)}
        for place, task_id in enumerate(names("lost", lost)):
            tasks[lost].insert(place * 10, task_id)
        cpu = defaultdict(list)
        for _ in self.turns(f"{count} polls over TLS"):
            for number_lost, task_ids in tasks.items():
                with home(self.folder, task_ids) as folder:
                    run = self.poller(self.nginx.url, folder, "--once", **self.nginx.tls).wait()
                    answers = Counter(status for _, status in self.nginx.seen(TASKS))
                    expect(answers[404] == number_lost, "a 404 is missing")
                    expect(answers.total() == count, "a poll is missing")
                    expect(pending(folder, number_lost) == count, "an order is missing")
                    cpu[number_lost].append(run.used / count)
        what, beside = "CPU per poll over TLS, 1 in 10 a 404", f"all get a 204 {middle(cpu[0], 'ms')}"
        self.table.add(what, middle(cpu[lost], "ms"), beside, ratios(cpu[lost], cpu[0]), bar="≤ 1.5")

    def delay(self) -> None:
        """Pending orders at a server that is not near."""
        count, took = self.size.far, []
        for _ in self.turns(f"{DELAY * 1000:.0f} ms to the server"):
            with home(self.folder, names("pending", count)) as folder:
                report(self.far)
                run = self.poller(self.far, folder, "--once").wait()
                seen = report(self.far)
                expect(sum(seen["polls"].values()) == count, "a poll is missing")
                took.append(run.end - seen["polled"])
        ideal = count * DELAY / AT_ONCE
        what = f"{count:,} pending, {DELAY * 1000:.0f} ms away"
        beside = f"{count} x {DELAY * 1000:.0f} ms / {AT_ONCE} = {ideal:.2f} s"
        self.table.add(what, middle(took, "s"), beside, [seconds / ideal for seconds in took], bar="≤ 1.15")

    def deliver(self) -> None:
        """Finished orders: poll, download, and ours durable."""
        count, tasks, took = self.size.files, names("small", self.size.files), defaultdict(list)
        for _ in self.turns(f"{count} files"):
            for who in ("A", "poller", "B"):
                with home(self.folder, tasks) as folder:
                    run = self.compete(who, folder, tasks, count, "/files/")
                    took[who].append(run.end - self.nginx.first("/files/" if who == "B" else TASKS, count))
                    sizes = [stat.st_size for stat in files(folder)]
                    expect(sizes == [100_000] * count, f"{who} did not bring every file whole")
                    expect(who == "B" or pending(folder) == 0, "a delivered order is still there")
        a, mine, b = took["A"], took["poller"], took["B"]
        what, beside = f"{count:,} finished, 100 kB, fsynced", f"A {middle(a, 's')}, no fsync"
        self.table.add(what, middle(mine, "s"), beside, ratios(a, mine), bar="≥ 2")
        self.table.add("", "", f"B {middle(b, 's')}, no poll", ratios(mine, b))

    def large(self) -> None:
        """One large file."""
        took, peak = defaultdict(list), []
        command = ["sh", "-c", f"curl -q -sS --fail -o F {self.nginx.url}/files/large && sync F"]
        for _ in self.turns(f"{self.size.large} MiB"):
            seconds = Counter[str]()
            # Each one first and second: that makes a difference of half the time, whoever it is.
            for who in ("poller", "curl", "curl", "poller"):
                with home(self.folder, ["large-1"]) as folder:
                    if who == "curl":
                        run = start(command, folder).wait()
                        seconds[who] += run.end - self.nginx.first("/", 1)
                        continue
                    run = self.poller(self.nginx.url, folder, "--once").wait()
                    seconds[who] += run.end - self.nginx.first(TASKS, 1)
                    peak.append(run.peak)
                    expect(files(folder)[0].st_size == self.size.large * MIB, "the large file is not whole")
            for who, both in seconds.items():
                took[who].append(both / 2)
        mine, curl = took["poller"], took["curl"]
        what, beside = f"one file of {self.size.large} MiB", f"curl && sync {middle(curl, 's')}"
        self.table.add(what, middle(mine, "s"), beside, ratios(mine, curl), bar="≤ 1.25")
        self.table.add("  peak memory", f"{max(peak):.1f} MiB", "", peak, "MiB", "< 45", max)

    def idle(self) -> None:
        """A daemon with many orders that are not due; beside it, one with some that render."""
        size, count, step = self.size, self.size.sweeps[-1], self.size.spell
        slowest = max(size.renders)
        with home(self.folder, names("pending", count)) as idle, home(self.folder) as busy:
            progress(f"{count} orders pending")
            sleeper = self.poller(self.nginx.url, idle, POLL_INTERVAL="3600")
            renderer = self.poller(self.far, busy)
            polled = 0
            while polled < count:
                polled += len(self.nginx.seen(TASKS))
                time.sleep(0.2)
            report(self.far)
            ready = self.place_orders(busy / "database.json")
            progress(f"renders of {min(size.renders)} to {slowest} s")
            time.sleep(2)
            spells = []
            for _ in range(5):
                before = sleeper.cpu()
                time.sleep(step)
                spells.append((sleeper.cpu() - before) / step)
            until(lambda: pending(busy) == 0, "an order is never delivered", 2 * slowest + 20)
            renderer.stop()
            peak = sleeper.stop().peak
            polls = report(self.far)["polls"]
            late = defaultdict(list)
            for task_id, (moment, render, batch) in ready.items():
                # A rename sets ctime: so that is when the file had its final name.
                here = (busy / "orders" / f"{task_id}.png").stat().st_ctime
                late[batch].append((here - moment) / (render / 4 + 2))
        memory = f"{count:,} pending: peak memory"
        self.table.add(memory, f"{peak:.1f} MiB", "", [peak], "MiB", "< 64", max)
        cpu, mean = f"  CPU of a core, {5 * step:.0f} s idle", f"{sum(spells) / 5 * 100:.2f} %"
        self.table.add(cpu, mean, "", spells, "%", "< 0.2")
        what, worst = f"renders of {min(size.renders)} to {slowest} s: lateness", map(max, late.values())
        self.table.add(what, "", "25 % of render + 2 s", [*worst], bar="≤ 1", judged=max)
        each = sum(polls.values()) / len(ready)
        loop = sum(-(-render // 2) + 1 for _, render, _ in ready.values()) / len(ready)
        self.table.add("  polls per order", f"{each:.1f}", f"{loop:.1f} every 2 s", [loop / each])

    def place_orders(self, database: Path) -> dict[str, tuple[float, int, int]]:
        """Place an order for each render time, five times; gives its moment, render time and batch."""
        sys.path.insert(0, str(self.code))
        import db

        ready = {}
        for batch in range(5):
            for render in self.size.renders:
                moment = time.time() + render
                task_id = f"ready-{moment * 1000:.0f}-{render}-{batch}"
                ready[task_id] = (moment, render, batch)
                db.add_order(task_id, "project", database)
        return ready

    def limit(self) -> None:
        """Finished orders at a server that takes only so many requests a second; else it is 429 or 503."""
        count, took, refused = self.size.limited, [], []
        ideal = (2 * count - BURST) / RATE
        for _ in self.turns(f"{count} files, {RATE} requests a second", min(2, self.size.runs)):
            with contextlib.ExitStack() as stack:
                runs = {}
                for status, port in self.nginx.limited.items():
                    folder = stack.enter_context(home(self.folder, names("small", count)))
                    more = {"BASEURL": f"http://127.0.0.1:{port}"}
                    runs[status] = folder, self.poller(self.nginx.url, folder, **more)
                deadline = time.monotonic() + 10 * ideal + 20
                while any(pending(folder) for folder, _ in runs.values()) and time.monotonic() < deadline:
                    time.sleep(0.2)
                for status, (folder, run) in runs.items():
                    run.stop()
                    seen = self.nginx.seen("/", f"times-{status}")
                    last = max(stat.st_ctime for stat in files(folder))
                    took.append(float("inf") if pending(folder) else last - min(seen)[0])
                    refused.append(sum(answer == status for _, answer in seen) / len(seen))
        expect(min(took) > 0.9 * ideal, "the limit is none")
        what, beside = f"{count} finished, at most {RATE} a second", f"({2 * count} - {BURST}) / {RATE}"
        relative = [seconds / ideal for seconds in took]
        self.table.add(what, middle(took, "s"), f"{beside} = {ideal:.1f} s", relative, "", "≤ 1.5", max)
        self.table.add("  requests answered 429 or 503", "", "of all", refused, "%", "≤ 20", max)

    def many(self) -> None:
        """Many pending orders, of which some finish; beside it the same, where none of them does."""
        size, old = self.size, names("old", self.size.pending - self.size.finished)
        with home(self.folder, old) as busy, home(self.folder, old) as still, home(self.folder) as third:
            progress(f"{size.pending} orders pending, {size.finished} finished in {size.within:.0f} s")
            alone = [self.add_order(busy, f"alone-{turn}") for turn in range(size.adds)]
            more = {"POLL_INTERVAL": "3600", "COLUMNS": "200"}
            reader = self.poller(self.far, busy, terminal=True, **more)
            beside = self.poller(self.far, still, terminal=True, **more)
            report(self.far)
            idler = self.poller(self.far, third)
            polled = 0
            while polled < 2 * len(old) + size.adds:
                time.sleep(0.2)
                polled += sum(report(self.far)["polls"].values())
            now, step = time.time(), size.within / size.finished
            moments = [int((now + 1 + turn * step) * 1000) for turn in range(size.finished)]
            type_orders(busy, [f"soon-{moment}-{turn}" for turn, moment in enumerate(moments)], size.within)
            type_orders(still, [f"soon-0-{turn}" for turn in range(size.finished)], size.within)
            entries = (f'"id-{turn:093d}": {{}}' for turn in range(size.broken * 10_000))
            (third / "database.json").write_text('{"orders": {' + ", ".join(entries))  # without its end
            time.sleep(1)
            runs = reader, beside, idler
            before, began = [run.cpu() for run in runs], time.time()
            report(self.far)
            adds = []
            for turn in range(size.adds):
                time.sleep(max(0.0, began + turn * size.within / size.adds - time.time()))
                adds.append(self.add_order(busy, f"added-{turn}"))
            time.sleep(max(0.0, began + size.within - time.time()))
            until(lambda: len(files(busy)) >= size.finished / 4 and reader.stood, "few files were delivered")
            until(lambda: "line 1" in idler.log.read_text(), "a broken file is not noticed")
            cpu = [run.cpu() - start for run, start in zip(runs, before, strict=True)]
            seconds, polls = time.time() - began, report(self.far)["polls"]
            peak = reader.stop().peak
            (third / "database.json").write_text('{"orders": {}, "failed": {}}')
            until(lambda: "recovered" in idler.log.read_text(), "a mended file is not noticed")
            idler.stop()
            beside.stop()
        theirs = sum(count for task, count in polls.items() if task.startswith("soon-0-"))
        ours = sum(polls.values()) - theirs
        mine, other, broken = (used / seconds for used in cpu)
        what = f"{size.pending:,} pending, {size.finished:,} finished"
        said = f"{other * 100:.1f} %, none finished"
        self.table.add(what, f"{mine * 100:.1f} %", said, [mine - other * ours / theirs], "%", "≤ 12")
        what, said = "  db.py add at the same time", f"without a poller {middle(alone, 's')}"
        self.table.add(what, middle(adds, "s"), said, [median(adds) / median(alone)], bar="≤ 1.5")
        pauses = sorted(reader.stood)
        pauses = [pauses[int(len(pauses) * 0.99)], pauses[-1]]
        what, said = "  live line after a delivery", "99 of 100, and the longest"
        self.table.add(what, "", said, pauses, "s", "< 0.5", min)
        self.table.add("  peak memory", f"{peak:.1f} MiB", "", [peak], "MiB", "< 80")
        self.table.add(f"broken database.json, {size.broken} MB: CPU", "", "of a core", [broken], "%", "< 1")


def type_orders(folder: Path, task_ids: Sequence[str], oldest: float) -> None:
    """Add all of them at once, as an editor does it; of all ages up to so many seconds."""
    database, now = folder / "database.json", datetime.now(timezone.utc)
    data = json.loads(database.read_text())
    for place, task_id in enumerate(task_ids):
        age = timedelta(seconds=place * 7 % len(task_ids) / len(task_ids) * oldest)
        data["orders"][task_id] = {"projectID": "project", "added": (now - age).isoformat()}
    (folder / "edited").write_text(json.dumps(data, indent=4))
    (folder / "edited").replace(database)


# --- python tests/benchmark.py ---------------------------------------------------------------

PARTS = ("start", "sweep", "polls", "tls", "delay", "deliver", "large", "idle", "limit", "many")
HELPERS: dict[str, Callable[..., None]] = {  # what the benchmark starts of itself
    "seed": lambda url, folder, most: seed(url, Path(folder), int(most)),
    "loop": lambda url, count, how: bare_loop(url, int(count), how == "anew"),
    "far": lambda port, file: asyncio.run(Far(int(port), Path(file).read_bytes()).serve()),
}


def about(folder: Path, size: Size) -> list[str]:
    """What stands above the table."""

    def version(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
        return f"{Path(command[0]).name} {found[0] if found else '?'}"

    disk = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True).stdout.split()
    programs = f"Python {platform.python_version()}, {version(NGINX_PATH, '-v')}, {version('curl', '-V')}"
    where = f"servers on core {SERVERS}, what is measured on core {MEASURED}, by sched_setaffinity"
    return [
        f"{date.today()}, {programs}, {len(CORES)} cores, files on {disk[-1]}",
        where if SERVERS != MEASURED else "all of it on one core",
        f"A: the seed's loop in Python, without its pause. B: curl --parallel --parallel-max {AT_ONCE}.",
        f"{size.runs} runs, in turns. No unit: a ratio in a run: A / poller, poller / B, or poller / beside.",
        "met: by the median; memory and lateness by the worst.",
    ]


def measure(size: Size, code: Path, parts: Sequence[str]) -> None:
    os.sched_setaffinity(0, {SERVERS})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder, port = Path(name), free_port()
        try:
            write_png(folder / "far.png", 1000)
            far = serve(port, own("far", port, folder / "far.png"))
            bench = Bench(folder, size, code, Nginx(folder / "nginx", size.large), far)
            for part in PARTS:
                if part in parts:
                    getattr(bench, part)()
            print(bench.table.text(about(folder, size)))
        finally:
            for process in STARTED:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: smaller, and one run of each")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--code", type=Path, default=ROOT, help="where the poller is that is measured")
    parser.add_argument("--helper", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.helper:
        HELPERS[given.helper[0]](*given.helper[1:])
    else:
        measure(QUICK if given.quick else Size(), given.code.resolve(), given.only or PARTS)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
