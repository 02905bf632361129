"""How fast the poller is, beside what one would have without it. Prints one table.

    python tests/benchmark.py                 all of it, in about eleven minutes
    python tests/benchmark.py --quick         a smoke test: smaller, and one run of each
    python tests/benchmark.py --only large    only that part; more than one may be given
    python tests/benchmark.py --code FOLDER   the poller of another checkout

Needs Linux, Debian's `nginx` and `curl`, and what the tests need. What is measured runs alone on one core,
the servers on another one where there is one. A figure is the median of its runs; a ratio is made within
a run, whose contenders take turns, so that what disturbs one of them disturbs all.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import trustme
from conftest import ROOT, Home, eventually
from sandbox import MIB, Sandbox, make_file

CORES = sorted(os.sched_getaffinity(0))
SERVERS, MEASURED = CORES[0], CORES[-1]
DELAY = 0.05  # seconds that the far server takes for each answer
AT_ONCE = 8
RATE, BURST = 20, 10  # requests a second where GraFx limits them, and how many may come at once

# --- the table -------------------------------------------------------------------------------

Row = tuple[str, ...]
UNITS = {"s": 1.0, "ms": 1e3, "MiB": 1.0, "%": 100.0, "": 1.0}


def number(value: float, unit: str) -> str:
    value *= UNITS[unit]
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def middle(values: Sequence[float], unit: str) -> str:
    return f"{number(median(values), unit)} {unit}"


def row(
    what: str, own: str, beside: str, values: Sequence[float], unit: str = "", bar: str = "",
    judged: float | None = None,
) -> Row:  # fmt: skip
    """A figure with one value for each run; its bar, say "≤ 1.2"; and what is judged, if not the median."""
    low, mid, high = (number(value, unit) for value in (min(values), median(values), max(values)))
    spread = f"{mid} ({low}-{high})" if len(values) > 1 else mid
    if not bar:
        return (what, own, beside, f"{spread} {unit}".rstrip(), "", "")
    value, limit = (median(values) if judged is None else judged) * UNITS[unit], float(bar[2:])
    met = {"≥": value >= limit, "≤": value <= limit, "<": value < limit}[bar[0]]
    said = (f"{text} {unit}".rstrip() for text in (spread, bar))
    return (what, own, beside, *said, "yes" if met else "NO")


def compared(
    what: str, mine: Sequence[float], unit: str, text: str, other: Sequence[float], bar: str = ""
) -> Row:
    """The poller beside another one, in each run: the ratio is A / poller, else poller / other."""
    pairs = zip(other, mine, strict=True) if text.startswith("A") else zip(mine, other, strict=True)
    own = middle(mine, unit) if what else ""
    return row(what, own, text.format(middle(other, unit)), [one / two for one, two in pairs], "", bar)


# --- what stands beside the poller -----------------------------------------------------------

# A: one turn of the seed's timed loop over the first MOST orders, as straight as Python has it.
SEED = """
import json, sys, requests
from pathlib import Path
base_url, tasks, folder, most = sys.argv[1:]
database = Path(folder) / "database.json"
data = json.loads(database.read_text())
form = {"grant_type": "client_credentials", "client_id": "id", "client_secret": "secret"}
token = requests.post(f"{base_url}/oauth/token", json=form, timeout=60).json()["access_token"]
headers = {"Accept": "application/json", "Authorization": f"Bearer {token}"}
for task_id in list(data["orders"])[: int(most)]:
    order = data["orders"].pop(task_id)
    database.write_text(json.dumps(data, indent=4))
    response = requests.get(base_url + tasks + task_id, headers=headers, timeout=60)
    if response.status_code == 200:
        download = requests.get(response.json()["links"]["download"], headers=headers, timeout=60)
        (Path(folder) / "orders" / f"{task_id}.png").write_bytes(download.content)
    else:
        data["orders"][task_id] = order
    database.write_text(json.dumps(data, indent=4))
"""
# Polls as short as requests has them: by one session, or anew as the seed does; prints CPU seconds of each.
LOOP = """
import sys, time, requests
url, count, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def auth(request):
    request.headers["Authorization"] = "Bearer token"
    return request
session = requests.Session()
for turn in range(count + 20):
    if turn == 20:  # the first ones connect
        before = time.process_time()
    if how == "anew":
        response = requests.get(f"{url}pending-{turn}", headers={"Authorization": "Bearer token"}, timeout=60)
    else:
        response = session.get(f"{url}pending-{turn}", auth=auth, stream=True, timeout=60)
        response.raw.drain_conn()  # so that the connection can be used again
    assert response.status_code == 204
print((time.process_time() - before) / count)
"""

TASKS = "/grafx/api/v1/environment/cp-sandbox-1/output/tasks/"
os.environ["PATH"] += ":/usr/sbin"  # where Debian has nginx, which a user's PATH leaves out
# Fixed answers, so that the server is not what is measured.
NGINX = """
daemon off; master_process off; pid %(place)s/nginx.pid; error_log %(place)s/error.log;
events { worker_connections 1024; }
http {
    log_format times "$msec $request_time $status $request_uri";
    access_log %(place)s/times times;
    client_body_temp_path %(place)s/body; proxy_temp_path %(place)s/proxy; uwsgi_temp_path %(place)s/uwsgi;
    fastcgi_temp_path %(place)s/fastcgi; scgi_temp_path %(place)s/scgi;
    sendfile on; tcp_nopush on; keepalive_requests 1000000; keepalive_timeout 600s;
    ssl_certificate %(place)s/server.pem; ssl_certificate_key %(place)s/server.pem;
    default_type application/json;
    server {
        listen 127.0.0.1:%(port)s;
        listen 127.0.0.1:%(tls)s ssl;
        location = /oauth/token { return 200 '{"access_token": "token", "expires_in": 86400}'; }
        location ~ ^%(tasks)spending { return 204; }
        location ~ ^%(tasks)slost { return 404 '{"title": "Not Found", "detail": "There is no task."}'; }
        location ~ ^%(tasks)s(.+)$ { return 200 '{"links": {"download": "http://$http_host/files/$1"}}'; }
        location ~ ^/files/(small|large) { default_type image/png; alias %(place)s/$1.png; }
    }
    %(limited)s
}
"""
# It says neither its limit nor when to come again.
# `return` comes before the limit, so here it stands behind an internal redirect.
LIMITED = """
    limit_req_zone $server_port zone=%(status)s:1m rate=%(rate)sr/s;
    server {
        listen 127.0.0.1:%(port)s;
        limit_req zone=%(status)s burst=%(burst)s nodelay; limit_req_status %(status)s;
        location ~ ^%(tasks)s(?<task>.+)$ { try_files /none @finished; }
        location @finished { return 200 '{"links": {"download": "http://$http_host/files/$task"}}'; }
        location ~ ^/files/(small) { default_type image/png; alias %(place)s/$1.png; }
    }
"""


class Run:
    """A contender's process, alone on its core. Its log goes to a file, as a daemon's, or to a terminal."""

    def __init__(self, command: Sequence[Any], home: Home, terminal: bool = False, **env: str) -> None:
        self.log = home.folder / f"log-{time.monotonic_ns()}"
        self.stood: list[float] = []  # seconds that the live line stood still, see `watch`
        reader, out = pty.openpty() if terminal else (0, os.open(self.log, os.O_WRONLY | os.O_CREAT))
        if terminal:
            threading.Thread(target=self.watch, args=(reader,), daemon=True).start()
        os.sched_setaffinity(0, {MEASURED})  # a child inherits it
        self.start = time.time()
        self.process = subprocess.Popen([*map(str, command)], cwd=home.folder, env=home.environment(**env),
                                        stdin=subprocess.DEVNULL, stdout=out, stderr=out)  # fmt: skip
        os.sched_setaffinity(0, {SERVERS})
        os.close(out)

    def watch(self, terminal: int) -> None:
        """Note for how long the live line stands still once the log has said something, and copy it all."""
        text, last, since = b"", b"", 0.0
        with self.log.open("wb", buffering=0) as log, suppress(OSError):  # until the terminal is closed
            while data := os.read(terminal, 65536):
                log.write(data)
                text, end = text + data, 0
                # Between these two is the live line; a line of the log ends with \n.
                for shown in re.finditer(rb"\x1b\[\?7l(.*?)\x1b\[\?7h|\n", text):
                    line, end = shown[1], shown.end()
                    if line is None:
                        since = since or time.time()
                    elif line and line != last:
                        self.stood += [time.time() - since] if since else []
                        last, since = line, 0.0
                text = text[end:]

    def cpu(self) -> float:
        """Seconds of CPU up to now: its clock, as clock_getcpuclockid(3) makes it."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def wait(self) -> Run:
        """Until it has ended well."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.end, self.used = time.time(), usage.ru_utime + usage.ru_stime
        self.process.returncode = os.waitstatus_to_exitcode(status)
        assert status == 0, f"{self.process}:\n{self.log.read_text(errors='replace')[-2000:]}"
        return self

    def stop(self) -> float:
        """Gives its peak of memory in MiB; the `ru_maxrss` of a process has that of its parent, too."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.process.terminate()
        self.wait()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def names(kind: str, count: int) -> list[str]:
    return [f"{kind}-4f82-4e87-8cd3-{place:012d}" for place in range(count)]


def type_orders(home: Home, ages: dict[str, float]) -> None:
    """Add all of them at once, as an editor does it; with the seconds since each was added."""
    data, now = home.read(), datetime.now(timezone.utc)
    for task_id, age in ages.items():
        added = (now - timedelta(seconds=age)).isoformat()
        data["orders"][task_id] = {"projectID": "project", "added": added}
    home.write(data)


class Bench:
    """The servers, and whose poller.py and db.py are measured."""

    def __init__(self, folder: Path, quick: bool, code: Path, far: Sandbox) -> None:
        self.folder, self.quick, self.code, self.far = folder, quick, code, far
        self.runs = self.size(5, 1)
        for name, length in (("small", 100_000), ("large", self.size(512, 2) * MIB)):
            with (folder / f"{name}.png").open("wb") as file:
                image, noise = make_file("png", name, 100_000), os.urandom(MIB)
                file.write(image[:-12])  # the last piece of a PNG has 12 bytes
                for _ in range((length - len(image)) // MIB):
                    file.write(noise)
                file.write(image[-12:])
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        certificate = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
        certificate.write_to_path(folder / "server.pem")
        self.sizes = {path.stem: path.stat().st_size for path in folder.glob("*.png")}
        free = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        port, tls, *limited = (one.getsockname()[1] for one in free)
        for one in free:
            one.close()
        self.url, self.rest = f"http://127.0.0.1:{port}", ""
        self.tls = {"BASEURL": f"https://127.0.0.1:{tls}", "REQUESTS_CA_BUNDLE": f"{folder}/ca.pem"}
        self.limited = dict(zip((429, 503), limited, strict=True))
        words = {"place": folder, "tasks": TASKS, "tls": tls, "rate": RATE, "burst": BURST}
        servers = ({**words, "status": status, "port": there} for status, there in self.limited.items())
        words |= {"port": port, "limited": "".join(LIMITED % server for server in servers)}
        (folder / "nginx.conf").write_text(NGINX % words)
        subprocess.Popen(["nginx", "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr"])
        self.token_asked = 0.0  # when the last token was asked for
        eventually(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "nginx starts")
        self.log = os.fdopen(os.open(folder / "times", os.O_RDONLY))

    def size(self, whole: Any, quick: Any) -> Any:
        """How much of something, without and with --quick."""
        return quick if self.quick else whole

    def seen(self, least: int = 0) -> list[tuple[float, int, str]]:
        """Polls and downloads since the last call, at least so many: when each came, its answer, its path."""
        found: list[tuple[float, int, str]] = []

        def enough() -> bool:
            *lines, self.rest = (self.rest + self.log.read()).split("\n")
            for end, took, status, path in map(str.split, lines):
                found.append((float(end) - float(took), int(status), path))
                if path == "/oauth/token":
                    self.token_asked = found.pop()[0]
            return len(found) >= least

        eventually(enough, f"{least} polls and downloads", 300)
        return found

    @contextmanager
    def home(self, task_ids: Sequence[str] = (), url: str = "") -> Iterator[Home]:
        """A folder with a database.json of these orders, a day old; after 7 days GraFx forgets a task."""
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as name:
            home, url = Home(Path(name), self.far), url or self.url
            home.env |= {"BASEURL": url, "TOKEN_URL": f"{url}/oauth/token", "CONCURRENCY": str(AT_ONCE)}
            home.env |= {"POLL_INTERVAL": "60", "HOME": "/nonexistent", "GRAFX_ENV_FILE": os.devnull}
            home.wait_for()
            type_orders(home, dict.fromkeys(task_ids, 86400.0))
            # What an earlier run left to be written and logged is not this one's.
            os.sync()
            self.seen()
            yield home

    def poller(self, home: Home, *arguments: str, terminal: bool = False, **env: str) -> Run:
        return Run([sys.executable, self.code / "poller.py", *arguments], home, terminal, **env)

    def race(self, kind: str, count: int, part: int) -> Iterator[tuple[str, Run, float]]:
        """A has `part` of so many orders, the poller all of them; B is curl, and polls or only downloads all.

        Gives of each its run, and when its first poll or download came in.
        """
        small = kind == "small"
        to, place = (f"{self.url}/files/", "orders/#1.png") if small else (self.url + TASKS, "/dev/null")
        curl = f"curl -q -sS --fail --parallel --parallel-max {AT_ONCE} -H Authorization:token -o {place}"
        for who, polls in (("A", part), ("poller", count), ("B", count)):
            with self.home(names(kind, count)) as home:
                commands: dict[str, list[Any]] = {
                    "A": [sys.executable, "-c", SEED, self.url, TASKS, home.folder, part],
                    "poller": [sys.executable, self.code / "poller.py", "--once"],
                    "B": [*curl.split(), f"{to}{kind}-4f82-4e87-8cd3-[{0:012d}-{count - 1:012d}]"],
                }
                run = Run(commands[who], home).wait()
                delivered = polls if small and who != "B" else 0
                seen = self.seen(polls + delivered)
                assert (len(seen), len(home.waiting())) == (polls + delivered, count - delivered), who
                sizes = [path.stat().st_size for path in home.orders.glob("*.png")]
                assert sizes == [self.sizes["small"]] * (count * small), who
            yield who, run, min(seen)[0]


# --- the parts -------------------------------------------------------------------------------


def start(bench: Bench) -> Iterator[Row]:
    """From the exec to the first byte at the server."""
    took = defaultdict(list)
    for _ in range(bench.size(10, 1)):
        for who, run, _ in bench.race("pending", 1, 1):
            took[who].append(bench.token_asked - run.start)
    a, mine = middle(took["A"], "ms"), middle(took["poller"], "ms")
    yield row("start to the first request", mine, f"A {a}", took["poller"], "ms", "< 300")


def sweep(bench: Bench) -> Iterator[Row]:
    """Pending orders: each is polled once, and all are still there."""
    took, cpu = defaultdict(list), defaultdict(list)
    # A takes minutes for a sweep, and the same time for each order: it does a part.
    sweeps = bench.size({1000: 200, 3000: 60, 10_000: 20}, {20: 4, 30: 3, 40: 2})
    for _ in range(bench.runs):
        for count, part in sweeps.items():
            for who, run, first in bench.race("pending", count, part):
                polls = part if who == "A" else count
                took[who, count].append((run.end - first) * count / polls)
                cpu[who, count].append(run.used / polls)
    small, large = min(sweeps), max(sweeps)
    for count, part in sweeps.items():
        a, mine, b = (took[who, count] for who in ("A", "poller", "B"))
        what, bar = f"sweep of {count:,} pending orders", "≥ 8" if count == small else ""
        yield compared(what, mine, "s", f"A {{}}, from {part}", a, bar)
        yield compared("", mine, "s", "B {}", b)
    one, other = ([seconds / count for seconds in took["poller", count]] for count in (small, large))
    yield compared(f"  time per order beside {small:,}'s", other, "ms", "{}", one, "≤ 1.2")
    a, mine, b = (middle(cpu[which], "ms") for which in (("A", small), ("poller", large), ("B", large)))
    yield row("  CPU per poll, with start and log", mine, f"A {a}, B {b}", cpu["poller", large], "ms")


def polls(bench: Bench) -> Iterator[Row]:
    """CPU of a daemon that has more pending orders than it can poll, in turns with bare loops."""
    count, cpu = bench.size(10_000, 50), defaultdict(list)
    for _ in range(bench.runs):
        with bench.home(names("pending", count)) as home:
            daemon = bench.poller(home, POLL_INTERVAL="0.1")
            bench.seen(count)  # these have the start and a log line for each order
            before = daemon.cpu()
            polled = len(bench.seen(count))
            cpu["mine"].append((daemon.cpu() - before) / polled)
            daemon.stop()
            for how in ("session", "anew"):
                run = Run([sys.executable, "-c", LOOP, bench.url + TASKS, count, how], home).wait()
                cpu[how].append(float(run.log.read_text()))
    mine, session, anew = cpu.values()
    yield compared("CPU per poll", mine, "ms", "Session.get {}", session, "≤ 1.4")
    yield compared("", mine, "ms", "requests.get {}", anew, "< 0.7")


def tls(bench: Bench) -> Iterator[Row]:
    """Polls over TLS, of which one in ten gets a 404, beside those that all get a 204."""
    count, cpu = bench.size(5000, 20), defaultdict(list)
    for _ in range(bench.runs):
        for every in (count + 1, 10):
            kinds = ["pending" if place % every else "lost" for place in range(1, count + 1)]
            with bench.home([f"{kind}-{place}" for place, kind in enumerate(kinds)]) as home:
                run = bench.poller(home, "--once", **bench.tls).wait()
                statuses = Counter(status for _, status, _ in bench.seen(count))
                assert (statuses[204], statuses[404]) == (kinds.count("pending"), kinds.count("lost"))
                assert len(home.waiting()) == count
                cpu[every].append(run.used / count)
    fine, mixed = cpu.values()
    yield compared("CPU per poll over TLS, 1 in 10 a 404", mixed, "ms", "all get a 204 {}", fine, "≤ 1.5")


def delay(bench: Bench) -> Iterator[Row]:
    """Pending orders at a server that is not near."""
    count, far, took = bench.size(1000, 16), bench.far, []
    tasks = [far.add("never") for _ in range(count)]
    fault = far.fault("task", "delay", times=None, seconds=DELAY)
    for _ in range(bench.runs):
        with bench.home(tasks, far.base_url) as home:
            far.requests.clear()
            run = bench.poller(home, "--once").wait()
            polls = far.asked("task")
            assert len(polls) == count
            took.append(run.end - time.time() + time.monotonic() - polls[0].time)
    far.end_fault(fault)
    ideal, what = count * DELAY / AT_ONCE, f"{count:,} pending, {DELAY * 1000:.0f} ms away"
    beside = f"{count} x {DELAY * 1000:.0f} ms / {AT_ONCE} = {ideal:.2f} s"
    yield row(what, middle(took, "s"), beside, [seconds / ideal for seconds in took], "", "≤ 1.15")


def deliver(bench: Bench) -> Iterator[Row]:
    """Finished orders: poll, download, and ours durable."""
    count, took = bench.size(1000, 10), defaultdict(list)
    for _ in range(bench.runs):
        for who, run, first in bench.race("small", count, count):
            took[who].append(run.end - first)
    a, mine, b = took.values()
    yield compared(f"{count:,} finished, 100 kB, fsynced", mine, "s", "A {}, no fsync", a, "≥ 2")
    yield compared("", mine, "s", "B {}, no poll", b)


def large(bench: Bench) -> Iterator[Row]:
    """One large file, until it and the change of database.json are durable."""
    took, peaks = defaultdict(list), []
    command = ["sh", "-c", f"curl -q -sS --fail -o F {bench.url}/files/large && sync F"]
    for _ in range(bench.runs):
        # Each one first and second: that makes a difference of half the time, whoever it is.
        for who in ("poller", "curl", "curl", "poller"):
            with bench.home(["large-1"]) as home:
                if who == "curl":
                    run = Run(command, home).wait()
                    took[who].append(run.end - bench.seen(1)[0][0])
                else:
                    run = bench.poller(home)
                    eventually(lambda: not home.waiting(), "the large file is delivered", 300)
                    took[who].append(home.database.stat().st_ctime - min(bench.seen(2))[0])
                    peaks.append(run.stop())
                    assert (home.orders / "large-1.png").stat().st_size == bench.sizes["large"]
    both = (zip(seconds[::2], seconds[1::2], strict=True) for seconds in took.values())
    mine, curl = ([sum(pair) / 2 for pair in pairs] for pairs in both)
    yield compared(f"one file of {bench.size(512, 2)} MiB", mine, "s", "curl && sync {}", curl, "≤ 1.25")
    yield row("  peak memory", f"{max(peaks):.1f} MiB", "", peaks, "MiB", "< 45", max(peaks))


def idle(bench: Bench) -> Iterator[Row]:
    """A daemon with many orders that are not due; beside it, one with some that render."""
    count, step, far = bench.size(10_000, 40), bench.size(12.0, 0.1), bench.far  # 5 steps are a minute
    renders = bench.size((*range(1, 6), 6, 8, 10, 12, 15, 18, *range(20, 41, 5), *range(50, 121, 10)), (0.1,))
    far.requests.clear()
    with bench.home(names("pending", count)) as still, bench.home([], far.base_url) as busy:
        sleeper, renderer = bench.poller(still, POLL_INTERVAL="3600"), bench.poller(busy)
        bench.seen(count)
        eventually(lambda: far.requests, "both have started")
        batches, spells = [], []
        for _ in range(5):
            batches.append((time.time(), {far.add(after=render): render for render in renders}))
            type_orders(busy, dict.fromkeys(batches[-1][1], 0.0))
            time.sleep(step / 30)  # so that the poller does not see all batches at once
        time.sleep(step / 6)
        for _ in range(5):
            before = sleeper.cpu()
            time.sleep(step)
            spells.append((sleeper.cpu() - before) / step)
        eventually(lambda: not busy.waiting(), "all are delivered", 2 * max(renders) + 60)
        renderer.stop()
        peak, late = sleeper.stop(), []
        for began, batch in batches:
            # A rename sets ctime: so that is when the file had its final name.
            here = {task_id: (busy.orders / f"{task_id}.png").stat().st_ctime - began for task_id in batch}
            late.append(max((here[task] - render) / (render / 4 + 2) for task, render in batch.items()))
    yield row(f"{count:,} pending: peak memory", f"{peak:.1f} MiB", "", [peak], "MiB", "< 64")
    what, mean = f"  CPU of a core, {5 * step:.0f} s idle", f"{sum(spells) / 5 * 100:.2f} %"
    yield row(what, mean, "", spells, "%", "< 0.2")
    what = f"renders of {min(renders)} to {max(renders)} s: lateness"
    yield row(what, "", "25 % of render + 2 s", late, "", "≤ 1", max(late))
    each = len(far.asked("task")) / (5 * len(renders))
    loop = sum(-(-render // 2) + 1 for render in renders) / len(renders)
    yield row("  polls per order", f"{each:.1f}", f"{loop:.1f} every 2 s", [loop / each])


def limit(bench: Bench) -> Iterator[Row]:
    """Finished orders at a server that takes only so many requests a second; else it is 429 or 503."""
    count, took, refused = bench.size(300, 6), [], []
    for status, port in [*bench.limited.items()][: bench.runs]:
        with bench.home(names("small", count)) as home:
            run = bench.poller(home, BASEURL=f"http://127.0.0.1:{port}")
            eventually(lambda: not home.waiting(), "all are delivered", count + 60)
            run.stop()
            seen = bench.seen(2 * count)
            took.append(max(path.stat().st_ctime for path in home.orders.glob("*.png")) - min(seen)[0])
            refused.append(sum(answer == status for _, answer, _ in seen) / len(seen))
    ideal = (2 * count - BURST) / RATE
    relative = [seconds / ideal for seconds in took]
    assert min(relative) > 0.9, "the limit is none"
    what, beside = f"{count} finished, at most {RATE} a second", f"({2 * count} - {BURST}) / {RATE}"
    beside += f" = {ideal:.1f} s"
    yield row(what, middle(took, "s"), beside, relative, "", "≤ 1.5", max(relative))
    yield row("  requests answered 429 or 503", "", "of all", refused, "%", "≤ 20", max(refused))


def many(bench: Bench) -> Iterator[Row]:
    """Many pending orders, of which some finish; beside it the same, where none of them does."""
    far, url, within, adds = bench.far, bench.far.base_url, bench.size(180.0, 0.2), bench.size(30, 1)
    pending, finished, megabytes = bench.size((20_000, 2000, 10), (40, 8, 1))
    old, new = names("old", pending - finished), names("new", 2 * adds)
    for task_id in old + new:
        far.add("never", task_id=task_id)
    far.requests.clear()
    with bench.home(old, url) as busy, bench.home(old, url) as still, bench.home([], url) as third:

        def add(task_id: str) -> float:
            run = Run([sys.executable, bench.code / "db.py", "add", task_id], busy).wait()
            return run.end - run.start

        alone = [*map(add, new[:adds])]
        more = {"POLL_INTERVAL": "3600", "COLUMNS": "200"}
        reader, beside = (bench.poller(home, terminal=True, **more) for home in (busy, still))
        runs = reader, beside, bench.poller(third)
        eventually(lambda: len(far.requests) >= 3 + 2 * len(old) + adds, "all are polled", 300)
        ages = [turn * 7 % finished * within / finished for turn in range(finished)]
        soon = {far.add(after=(turn + 10) * within / finished): age for turn, age in enumerate(ages)}
        never = {far.add("never"): age for age in ages}
        far.fault("task", "delay", times=None, task_id={*soon, *never}, seconds=DELAY)
        type_orders(busy, soon)
        type_orders(still, never)
        entries = (f'"id-{turn:093d}": {{}}' for turn in range(megabytes * 10_000))
        third.write('{"orders": {' + ", ".join(entries))  # without its end
        time.sleep(bench.size(1, 0.1))
        far.requests.clear()
        before, began, took = [run.cpu() for run in runs], time.time(), []
        for turn, task_id in enumerate(new[adds:]):
            time.sleep(max(0.0, began + turn * within / adds - time.time()))
            took.append(add(task_id))
        time.sleep(max(0.0, began + within - time.time()))
        eventually(lambda: len(busy.files()) >= finished / 4 and reader.stood, "files are delivered")
        eventually(lambda: "line 1" in runs[2].log.read_text(), "the broken file is noticed")
        eventually(lambda: any(one.task_id in never for one in far.requests), "the others are polled")
        cpu = [(run.cpu() - used) / (time.time() - began) for run, used in zip(runs, before, strict=True)]
        theirs = sum(one.task_id in never for one in far.requests)
        for_as_many_polls = cpu[1] * (len(far.requests) - theirs) / theirs
        peak = reader.stop()
        third.wait_for()
        eventually(lambda: "recovered" in runs[2].log.read_text(), "the mended file is noticed")
        beside.stop()
        runs[2].stop()
    what = f"{pending:,} pending, {finished:,} finished"
    mine, other = (f"{100 * used:.1f} %" for used in cpu[:2])
    yield row(what, mine, f"{other}, none finished", [cpu[0] - for_as_many_polls], "%", "≤ 12")
    what, said = "  db.py add at the same time", f"without a poller {middle(alone, 's')}"
    yield row(what, middle(took, "s"), said, [median(took) / median(alone)], "", "≤ 1.5")
    longest = sorted(reader.stood)[int(len(reader.stood) * 0.99) :]
    what, said = "  live line after a delivery", "99 of 100, and the longest"
    yield row(what, "", said, [longest[0], longest[-1]], "s", "< 0.5", longest[0])
    yield row("  peak memory", f"{peak:.1f} MiB", "", [peak], "MiB", "< 80")
    yield row(f"broken database.json, {megabytes} MB: CPU", "", "of a core", cpu[2:], "%", "< 1")


PARTS = {part.__name__: part for part in (start, sweep, polls, tls, delay, deliver, large, idle, limit, many)}


def about(folder: str, runs: int) -> list[str]:
    """What stands above the table."""
    command = f"nginx -v 2>&1; curl -V | head -1; df --output=fstype {folder}"
    said = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.split()
    programs = f"Python {sys.version.split()[0]}, {said[2].replace('/', ' ')}, curl {said[4]}"
    where = f"servers on core {SERVERS}, what is measured on core {MEASURED}, by sched_setaffinity"
    return [
        f"{date.today()}, {programs}, {len(CORES)} cores, files on {said[-1]}",
        where if SERVERS != MEASURED else "all of it on one core",
        f"A: the seed's loop in Python, without its pause. B: curl --parallel --parallel-max {AT_ONCE}.",
        f"{runs} runs, in turns. No unit: a ratio in a run: A / poller, poller / B, or poller / beside.",
        "met: by the median; memory and lateness by the worst.\n",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: smaller, and one run of each")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--code", type=Path, default=ROOT, help="where the poller is that is measured")
    given = parser.parse_args()
    os.sched_setaffinity(0, {SERVERS})
    rows: list[Row] = [("figure", "poller", "beside it", "median (min-max)", "bar", "met")]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Sandbox() as far:
        bench = Bench(Path(folder), given.quick, given.code.resolve(), far)
        try:
            for part, measure in PARTS.items():
                if part in (given.only or PARTS):
                    print(time.strftime("%H:%M:%S"), part, file=sys.stderr, flush=True)
                    rows += measure(bench)
        finally:  # where a part breaks, what the others found is printed all the same
            for process in psutil.Process().children():
                process.kill()
                process.wait()
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in rows]
            lines.insert(1, "-" * max(map(len, lines)))
            print(*about(folder, bench.runs), *lines, sep="\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
