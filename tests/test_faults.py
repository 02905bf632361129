"""Every fault on poll, download and token: once, for 10 s, and for ever.

All of it runs first, in many pollers side by side; a test for each row then looks at its result,
and at that of the healthy order beside it. The table is printed at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import REPORTS, ROOT, Home, eventually
from sandbox import PAGE, Fault, Request, Sandbox

ONCE, TEN, LONG = "once", "10 s", "for ever"
SECONDS = 10.0  # of TEN; each order is polled at least five times in it
YEAR = 365 * 86400
WAITS = "pending"  # says nothing about the order: it is polled for ever
FINE = "delivered at once"  # odd, but nothing is missing
HELD = "held"  # rate limited: nothing is polled
NO_LINK = "failed: 200 GraFx says finished, but gives no download link"


def failed(status: int, reason: str = ".*ordered by a test.*") -> str:
    return f"failed: {status} {reason}"


def no_file(says: str, looks: str = "something else") -> str:
    return f"failed: 200 the file says {re.escape(says)} but is {looks}"


NO_IMAGE = no_file("application/json")
NO_OCTETS = failed(200, "the file .*")
FINAL = "failed: 410 no longer available: GraFx keeps a file for 4 hours"
RED, CLEANED = "image/\x1b[31mpng", r"the file says image/ ?\[31mpng but is png"
PLAIN = {"body": PAGE, "content_type": "text/html"}
JSON_REJECTION = {"body": b'{"error": "access_denied", "error_description": "Unauthorized"}'}
ASP_NET = ".*An error occurred while processing your request.*"
SORRY = b"Service temporarily unavailable"
# What people call it, what the sandbox does, its options; the result where it lasts longer than
# GIVE_UP_AFTER, on the poll, the download, and the token. What passes has always to end well, unless
# it is FINAL or HELD.
FAULTS: list[tuple[str, str, dict[str, Any], str, str, str]] = [
    ("reset", "reset", {}, WAITS, WAITS, WAITS),
    ("reset in the body", "reset", {"at": 20}, WAITS, WAITS, WAITS),
    ("close", "close", {}, WAITS, WAITS, WAITS),
    ("close in the body", "close", {"at": 20}, WAITS, WAITS, WAITS),
    ("hang", "hang", {}, WAITS, WAITS, WAITS),
    ("head trickles", "trickle", {"pace": 0.02, "after": 0.8}, WAITS, WAITS, WAITS),
    ("body trickles", "trickle-body", {"pace": 0.1}, WAITS, WAITS, WAITS),
    ("202", "status-202", {}, WAITS, WAITS, WAITS),
    ("204", "status-204", {}, WAITS, WAITS, WAITS),
    ("400", "status-400", {}, failed(400), failed(400, "the download: .*"), WAITS),
    ("401", "status-401", {}, WAITS, WAITS, WAITS),
    ("401 in the token's words", "status-401", JSON_REJECTION, WAITS, WAITS, WAITS),
    ("403", "status-403", {}, failed(403), failed(403, "the download: .*"), WAITS),
    ("403 in HTML", "status-403", PLAIN, failed(403, ".*403 .*"), failed(403, ".*403 .*"), WAITS),
    ("404", "status-404", {}, failed(404), failed(404), WAITS),
    ("404 in HTML", "status-404", PLAIN, failed(404, ".*"), failed(404, ".*"), WAITS),
    ("408", "status-408", {}, WAITS, WAITS, WAITS),
    ("410", "status-410", {}, failed(410), FINAL, WAITS),
    ("425", "status-425", {}, WAITS, WAITS, WAITS),
    ("429", "status-429", {}, WAITS, WAITS, WAITS),
    ("425, Retry-After: 1", "status-425", {"retry_after": 1}, WAITS, WAITS, WAITS),
    ("429, Retry-After: 1", "status-429", {"retry_after": 1}, WAITS, WAITS, WAITS),
    ("503, Retry-After: 1", "status-503", {"retry_after": 1}, WAITS, WAITS, WAITS),
    ("429, Retry-After: date", "status-429", {"retry_after": "date"}, WAITS, WAITS, WAITS),
    ("429, Retry-After: soon", "status-429", {"retry_after": "soon"}, WAITS, WAITS, WAITS),
    ("429, Retry-After: -1", "status-429", {"retry_after": "-1"}, WAITS, WAITS, WAITS),
    ("429, Retry-After: a year", "status-429", {"retry_after": YEAR}, HELD, HELD, HELD),
    ("500, problem details", "status-500", {}, failed(500), failed(500), WAITS),
    ("500, ASP.NET's own", "500-aspnet", {}, failed(500, ASP_NET), failed(500, ASP_NET), WAITS),
    ("500 in HTML", "500-plain", {}, WAITS, WAITS, WAITS),
    ("500, nothing", "500-empty", {}, WAITS, WAITS, WAITS),
    ("502", "status-502", {}, WAITS, WAITS, WAITS),
    ("502 in HTML", "status-502", PLAIN, WAITS, WAITS, WAITS),
    ("503", "status-503", {}, WAITS, WAITS, WAITS),
    ("504", "status-504", {}, WAITS, WAITS, WAITS),
    ("HTML with 200", "html", {}, NO_LINK, no_file("text/html"), WAITS),
    ("half of the body", "cut", {}, NO_LINK, failed(200, "the PNG has no end"), WAITS),
    ("cut JSON", "cut-json", {}, NO_LINK, NO_IMAGE, WAITS),
    ("JSON: []", "other-json", {}, NO_LINK, NO_IMAGE, WAITS),
    ("JSON: null", "other-json", {"value": None}, NO_LINK, NO_IMAGE, WAITS),
    ("JSON: links is a text", "other-json", {"value": {"links": "x"}}, NO_LINK, NO_IMAGE, WAITS),
    ("JSON: link is a number", "other-json", {"value": {"links": {"download": 7}}}, NO_LINK, NO_IMAGE, WAITS),
    ("JSON: token is a number", "other-json", {"value": {"access_token": 7}}, NO_LINK, NO_IMAGE, WAITS),
    ("another task's answer", "other-task", {}, WAITS, NO_IMAGE, WAITS),
    ("no link", "no-link", {}, NO_LINK, NO_IMAGE, WAITS),
    ("link: no address", "bad-link", {}, NO_LINK, NO_IMAGE, WAITS),
    ("link: ftp", "bad-link", {"link": "ftp://127.0.0.1/x"}, NO_LINK, NO_IMAGE, WAITS),
    ("link: file", "bad-link", {"link": "file:///etc/passwd"}, NO_LINK, NO_IMAGE, WAITS),
    ("link: no host", "bad-link", {"link": "http://[::1"}, NO_LINK, NO_IMAGE, WAITS),
    ("link: port 99999", "bad-link", {"link": "http://localhost:99999/"}, NO_LINK, NO_IMAGE, WAITS),
    ("link: nobody listens", "bad-link", {"link": "http://127.0.0.1:9/"}, WAITS, NO_IMAGE, WAITS),
    ("Content-Length too long", "length-long", {}, WAITS, WAITS, WAITS),
    ("Content-Length too short", "length-short", {}, NO_LINK, failed(200, "the PNG has no end"), WAITS),
    ("chunked", "chunked", {}, FINE, FINE, FINE),
    ("chunked without an end", "chunked-cut", {}, WAITS, WAITS, WAITS),
    ("close without a length", "close-end", {}, WAITS, WAITS, WAITS),
    ("gzip", "gzip", {}, FINE, FINE, FINE),
    ("half of a gzip", "gzip-cut", {}, WAITS, WAITS, WAITS),
    ("gzip, two members", "gzip-members", {}, FINE, FINE, FINE),
    ("gzip, second behind 64 KiB", "gzip-far", {}, FINE, FINE, FINE),
    ("gzip and 70,000 zeros", "gzip-padded", {}, FINE, FINE, FINE),
    ("deflate", "coding", {"value": "deflate"}, WAITS, WAITS, WAITS),
    ("br", "coding", {}, WAITS, WAITS, WAITS),
    ("a coding that nobody knows", "coding", {"value": "x-new"}, WAITS, WAITS, WAITS),
    ("wrong Content-Type", "wrong-type", {}, FINE, no_file("image/jpeg", "png"), FINE),
    ("application/octet-stream", "octet", {}, FINE, FINE, FINE),
    ("octet-stream: a sentence", "octet", {"body": SORRY}, NO_LINK, NO_OCTETS, WAITS),
    ("octet-stream: HTML, BOM", "octet", {"body": b"\xef\xbb\xbf" + PAGE}, NO_LINK, NO_OCTETS, WAITS),
    ("octet-stream: HTML, blanks", "octet", {"body": b" " * 16 + PAGE}, NO_LINK, NO_OCTETS, WAITS),
    ("control characters in type", "wrong-type", {"type": RED}, FINE, failed(200, CLEANED), FINE),
    ("empty body", "empty", {}, NO_LINK, failed(200, "the file is empty"), WAITS),
    ("64 MiB of JSON", "huge", {}, NO_LINK, NO_IMAGE, WAITS),
    ("redirect loop", "redirect-loop", {}, WAITS, WAITS, WAITS),
    ("redirect on this host", "redirect-same", {}, FINE, FINE, WAITS),
    ("redirect to another host", "redirect-away", {}, NO_LINK, FINE, WAITS),
    ("103 before the answer", "interim", {}, WAITS, WAITS, WAITS),
    ("102 before the answer", "interim", {"code": 102}, WAITS, WAITS, WAITS),
    ("five 103 before the answer", "interim", {"number": 5, "pause": 0.05}, WAITS, WAITS, WAITS),
    ("504, then the answer", "late", {}, WAITS, WAITS, WAITS),
    ("504 and the answer at once", "late", {"pause": 0}, WAITS, WAITS, WAITS),
    ("504, then another's answer", "late", {"task": "OTHER"}, WAITS, WAITS, WAITS),
    ("204, then another's answer", "late", {"status": 204, "task": "OTHER"}, WAITS, WAITS, WAITS),
    ("204 with another's answer", "late", {"status": 204, "task": "OTHER", "pause": 0}, WAITS, WAITS, WAITS),
]  # fmt: skip
SLOW = ("hang", "head trickles", "body trickles")
POLITE = ("status-429", "status-503")  # a rate limit, which slows everybody down


@dataclass
class Row:
    """One fault in one place, for so long; and its result."""

    label: str
    fault: str
    options: dict[str, Any]
    place: str
    span: str
    end: str
    order: str = ""  # the one it happens to
    beside: str = ""  # a healthy one
    came: str = "nothing"
    came_beside: str = "nothing"
    during: str = ""  # the order's state while it lasted
    afterwards: str = ""  # where it outlasted GIVE_UP_AFTER, the result when it was over all the same
    requests: list[Request] = field(default_factory=list)
    requests_beside: list[Request] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.label} on the {self.place}, {self.span}"

    @property
    def expected(self) -> str:
        if self.end in (FINAL, HELD):
            return self.end.replace(HELD, WAITS)
        return self.end if self.span == LONG and self.end != FINE else "delivered"

    @property
    def group(self) -> str:
        """Which rows may share a poller."""
        if self.place == "token":
            return "token"
        if self.fault in POLITE or "retry_after" in self.options:
            return "polite"
        if self.fault == "late":  # whose answer may reach another order's poll, which is then repeated
            return "late"
        return "slow" if self.label in SLOW else "quick"

    @property
    def timeout(self) -> float:
        return 0.5 if self.label in SLOW else 10.0

    def set(self, grafx: Sandbox, name: str | None = None) -> Fault:
        """Two orders, and the fault for one of them; `name` is whose token it is."""
        size = 200_000 if self.fault.startswith("gzip-") else None
        self.order, self.beside = grafx.add(size=size), grafx.add()
        options = now(grafx, self.options)
        if self.fault == "huge" and self.place == "download":
            options["size"] = 2 << 20  # a file may be as large as it wants
        task_id = name if self.place == "token" else self.order
        times = 1 if self.span == ONCE else None
        return grafx.fault(self.place, self.fault, times=times, task_id=task_id, **options)

    def look(self, home: Home, since: int = 0, name: str | None = None) -> None:
        self.came, self.came_beside = outcome(home, self.order), outcome(home, self.beside, False)
        requests = home.grafx.requests[since:]
        self.requests_beside = [request for request in requests if request.task_id == self.beside]
        if self.place == "token":
            self.requests = [r for r in requests if r.what == "token" and r.task_id == name]
        else:
            self.requests = [request for request in requests if request.task_id == self.order]


def now(grafx: Sandbox, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a fault that is set now."""
    options = dict(options)
    if options.get("retry_after") == "date":
        options["retry_after"] = formatdate(time.time() + 2, usegmt=True)
    if options.get("task") == "OTHER":
        options["task"] = grafx.add()
    return options


def outcome(home: Home, task_id: str, written: bool = True) -> str:
    """Where not `written`, a delivered order may still stand in the file, which is written when it suits."""
    if record := home.failed().get(task_id):
        return f"failed: {record['status']} {record['error']}"
    file, waits = home.orders / f"{task_id}.png", task_id in home.waiting()
    if waits and (written or not file.exists()):
        return WAITS
    if not file.exists():
        return "LOST"
    return "delivered" if file.read_bytes() == home.grafx.body(task_id) else "WRONG FILE"


def failing(home: Home, task_id: str) -> str:
    """The state of an order that has not ended: what stands under "failing", or pending."""
    if record := home.read().get("failing", {}).get(task_id):
        return f"failed: {record['status']} {record['error']}"
    return outcome(home, task_id)


def spans(end: str) -> tuple[str, ...]:
    if end in (FINAL, HELD):
        return (ONCE,)
    return (ONCE, TEN) if end == FINE else (ONCE, TEN, LONG)


ROWS = [
    Row(label, fault, options, place, span, end)
    for label, fault, options, *ends in FAULTS
    for place, end in zip(("task", "download", "token"), ends, strict=True)
    for span in spans(end)
]


def before(timeout: float) -> str:
    return (
        f"chili.TIMEOUT = ({timeout}, {timeout}); chili.SLOW_START = {timeout}; "
        "poller.SHORTEST_PAUSE = db.LOOK = 0.05"
    )


def met(grafx: Sandbox) -> dict[str | None, list[float]]:
    """When each task, or token, met its fault."""
    times: dict[str | None, list[float]] = defaultdict(list)
    for request in list(grafx.requests):
        if request.fault:
            times[request.task_id].append(request.time)
    return times


def all_at_once(folder: Path, rows: list[Row]) -> None:
    """One poller meets them all, once."""
    with started(folder, rows, POLL_INTERVAL="0.2") as home:
        try:
            eventually(lambda: not home.waiting(), patience=60)
        finally:
            for row in rows:
                row.look(home)


def for_ten_seconds(folder: Path, rows: list[Row]) -> None:
    """One poller with the default GIVE_UP_AFTER meets them all for so long. Then they are over."""
    with started(folder, rows, POLL_INTERVAL="1") as home:
        eventually(lambda: met(home.grafx).keys() >= {row.order for row in rows})
        time.sleep(SECONDS)
        for row in rows:
            row.during = failing(home, row.order)
        home.grafx.clear_faults()
        try:
            eventually(lambda: not home.waiting(), patience=60)
        finally:
            for row in rows:
                row.look(home)


def for_ever(folder: Path, rows: list[Row]) -> None:
    """One poller with a short GIVE_UP_AFTER meets them all, until what can fail has failed."""
    with started(folder, rows, POLL_INTERVAL="0.3", GIVE_UP_AFTER="1") as home:

        def settled() -> bool:
            time.sleep(0.2)
            waiting, times = home.waiting(), met(home.grafx)
            return all(
                row.order not in waiting
                or (row.end == WAITS and len(hit := times[row.order]) > 4 and hit[-1] - hit[0] > 3)
                for row in rows
            )

        try:
            eventually(settled, patience=40)
        finally:
            for row in rows:
                row.look(home)
        home.grafx.clear_faults()
        try:
            eventually(lambda: not home.waiting(), patience=60)
        finally:
            for row in rows:
                row.afterwards = outcome(home, row.order)


@contextlib.contextmanager
def started(folder: Path, rows: list[Row], **env: str) -> Iterator[Home]:
    """A GraFx environment with all these faults, and a poller that meets them."""
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        for row in rows:
            row.set(grafx)
        home.wait_for(*itertools.chain.from_iterable((row.order, row.beside) for row in rows))
        poller = home.start(before=before(rows[0].timeout), CONCURRENCY="16", **env)
        try:
            yield home
        finally:
            code = poller.stop()
        ended_well(home, code, poller.log())


def ended_well(home: Home, code: int, log: str) -> None:
    assert code in (0, 1), log
    assert "Traceback" not in log, log
    assert not [name for name in home.files() if name.startswith(".")]


# --- what affects every order: the token, and the rate limit -------------------------------------


# Starts a poller for each line that it reads, by a fork, which is much quicker than 200 starts of Python.
STARTER = """
import json, os, signal, sys
sys.path.insert(0, sys.argv.pop())
import chili, db, poller
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for line in sys.stdin:
    one = json.loads(line)
    if not os.fork():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(one["env"])
        log = os.open(one["log"], os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        exec(one["before"])
        os._exit(poller.main())
while True:
    try:
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    except ChildProcessError:
        break
"""


Alone = tuple[str, Home, list[Row]]  # its name, and what its poller meets: TEN and LONG together


def apart(folder: Path, rows: list[Row]) -> None:
    """A poller for each fault, with a short GIVE_UP_AFTER; after 10 s of it, it is over.

    What is pending with a short one is pending with a long one, so this is the result for TEN and for LONG.
    """
    groups: dict[tuple[str, str, bool], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.label, row.place, row.span == ONCE].append(row)
    with Sandbox() as grafx:
        alone: list[Alone] = []
        for number, group in enumerate(groups.values()):
            place = folder / str(number)
            place.mkdir()
            home = Home(place, grafx)
            home.env |= {"TOKEN_URL": f"{grafx.token_url}/{number}", "GIVE_UP_AFTER": "1"}
            home.env |= {"POLL_INTERVAL": "1", "CONCURRENCY": "2"}
            home.wait_for(grafx.add())
            alone.append((str(number), home, group))
        starter = subprocess.Popen([sys.executable, "-c", STARTER, ROOT], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
        try:
            assert starter.stdin
            for _, home, group in alone:
                start = before(group[0].timeout).replace("db.LOOK = 0.05", "db.LOOK = 0.4")
                job = {"env": home.environment(), "log": str(home.folder / "log"), "before": start}
                starter.stdin.write(json.dumps(job) + "\n")
                starter.stdin.flush()
            eventually(lambda: not any(home.waiting() for _, home, _ in alone))
            last_ten_seconds(grafx, alone)
        finally:
            os.killpg(starter.pid, signal.SIGTERM)
            codes = starter.communicate(timeout=30)[0].split()
        assert codes == ["0"] * len(alone), codes
        for _, home, _ in alone:
            ended_well(home, 0, (home.folder / "log").read_text())


def last_ten_seconds(grafx: Sandbox, alone: list[Alone]) -> None:
    """Each poller meets its fault, for 10 s; then it is over."""
    times: dict[str | None, list[float]] = {}
    since = len(grafx.requests)
    for name, _, group in alone:
        group[0].set(grafx, name)
        for row in group[1:]:
            row.order, row.beside = group[0].order, group[0].beside
    if alone[0][2][0].place == "token":
        grafx.revoke()  # so a new one is needed
    for _, home, group in alone:
        home.wait_for(group[0].order, group[0].beside)

    def settled(name: str, home: Home, row: Row) -> bool:
        hit = times[name if row.place == "token" else row.order]
        if row.end == HELD:
            return len(hit) > 0 and time.monotonic() > hit[0] + 1.5
        long = len(hit) > 4 and time.monotonic() > hit[0] + SECONDS
        return long or row.order not in home.waiting()

    def all_settled() -> bool:
        nonlocal times
        time.sleep(0.2)
        times = met(grafx)
        return all(settled(name, home, group[0]) for name, home, group in alone)

    try:
        eventually(all_settled, patience=60)
    finally:
        for name, home, group in alone:
            for row in group:
                row.during = outcome(home, row.order)
                row.look(home, since, name)
    grafx.clear_faults()
    mortal = [(name, home, group) for name, home, group in alone if group[0].end != HELD]
    try:
        eventually(lambda: not any(home.waiting() for _, home, _ in mortal), patience=60)
    finally:
        for name, home, group in mortal:
            for row in group:
                row.afterwards = outcome(home, row.order)
                if row.span == TEN:
                    row.look(home, since, name)


# --- all of it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All rows, each with its outcome; prints the table when its tests are through."""
    wanted = {item.name for item in request.session.items}  # `pytest -k` may want a few only
    rows = [row for row in ROWS if f"test_fault[{row}]" in wanted]
    runs: list[tuple[Callable[[Path, list[Row]], None], list[Row]]] = []
    for group in ("quick", "slow", "late"):
        for span, run in ((ONCE, all_at_once), (TEN, for_ten_seconds), (LONG, for_ever)):
            runs.append((run, [row for row in rows if (row.group, row.span) == (group, span)]))
    for group in ("token", "polite"):
        runs.append((apart, [row for row in rows if row.group == group]))
    with ThreadPoolExecutor(len(runs)) as pool:
        futures: list[Future[None]] = [
            pool.submit(run, tmp_path_factory.mktemp("faults"), part) for run, part in runs if part
        ]
    problems = [future.exception() for future in futures if future.exception()]
    yield
    REPORTS.append("\n".join(table(rows)))
    assert not problems, problems


def table(rows: list[Row]) -> Iterator[str]:
    """A line for each fault; what the numbers of failed orders mean stands below."""
    reasons: dict[str, int] = {}
    places, columns = ("task", "download", "token"), (ONCE, TEN, LONG)
    came = {(row.label, row.place, row.span): row.came for row in rows}

    def cell(label: str, place: str, span: str) -> str:
        text = came.get((label, place, span), "-")
        if not text.startswith("failed: "):
            return text
        return f"failed {reasons.setdefault(text.removeprefix('failed: '), len(reasons) + 1)}"

    yield (f"{'':27}" + "".join(f"{place:33}" for place in places)).rstrip()
    yield (f"{'fault':27}" + "".join(f"{span:11}" for _ in places for span in columns)).rstrip()
    for label in dict.fromkeys(row.label for row in rows):
        cells = (cell(label, place, span) for place in places for span in columns)
        yield f"{label:27}" + "".join(f"{text:11}" for text in cells).rstrip()
    yield "for ever: when GIVE_UP_AFTER was over. -: as before, for there is nothing to go on"
    for reason, number in reasons.items():
        yield f"{number:2}  {reason}"


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fault(row: Row) -> None:
    assert re.fullmatch(row.expected, row.came), row.came
    hit = [request for request in row.requests if request.fault]
    if row.fault != "redirect-loop":  # which goes on by itself
        often = {ONCE: 1, TEN: 1 if row.end == FINE else 5, LONG: 3}[row.span]
        assert len(hit) == often if row.span == ONCE else len(hit) >= often, "it did not meet it often enough"
    if row.end == FINE and row.place != "token":
        assert [request.what for request in row.requests if request.query == ""].count(row.place) == 1
    if row.span == TEN and row.end != FINE and row.place != "token" and row.group != "polite":
        polls = [(request.what, request.status, request.fault) for request in row.requests]
        assert re.fullmatch(row.end, row.during), (
            f"{row.during}, but where it is rejected it stands under failing: {polls}"
        )
    if row.span == LONG and row.end == WAITS:
        assert row.afterwards == "delivered"
    if row.options.get("retry_after") == 1 and row.span != ONCE:
        times = [request.time for request in hit]
        assert min(after - before for before, after in itertools.pairwise(times)) > 0.95
    if row.end == HELD:
        after = [request for request in row.requests if request.time > hit[0].time]
        assert not after, "it was polled again, although Retry-After is a year"


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_nobody_else_is_held_up(row: Row) -> None:
    """Except by a rate limit, or where there is no token."""
    if row.place == "token" and (row.end == HELD or (row.span == LONG and row.end == WAITS)):
        assert row.came_beside == WAITS
        return
    assert row.came_beside == "delivered"
    if row.span != ONCE and row.place != "token" and row.end != FINE and row.group != "polite":
        last = max(request.time for request in row.requests if request.fault)
        file = min(request.time for request in row.requests_beside if request.what == "download")
        assert file < last, "the healthy order beside it had to wait for it"
