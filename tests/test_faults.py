"""Every kind of fault on poll, download and token: once, for 10 s, and past GIVE_UP_AFTER.

All of it runs first, in many pollers side by side; a test for each row then looks at what became of its
order, and of the healthy order beside it. The table is printed at the end.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import REPORTS, ROOT, Home, eventually
from sandbox import PAGE, Request, Sandbox

ONCE, TEN, LONG = "once", "10 s", "for ever"
LASTS = {TEN: 10.0, LONG: 3.0}  # seconds from the first time that an order meets it to the last, or more
OFTEN = 5  # times that it meets it at least meanwhile
YEAR = 365 * 86400
WAITS = "pending"  # says nothing about the order: it is polled for ever
FINE = "delivered at once"  # odd, but nothing is missing
HELD = "held"  # rate limited: nothing is polled


def failed(status: int, reason: str = ".*ordered by a test.*") -> str:
    """The answer speaks for itself: three times, and GIVE_UP_AFTER."""
    return f"failed: {status} {reason}"


def unproven(status: int, reason: str = ".*ordered by a test.*") -> str:
    """It may be meant for all orders: the order never fails while no other one's file comes meanwhile."""
    return f"rejected: {status} {reason}"


NO_LINK = unproven(200, "GraFx says finished, but gives no download link")
NO_IMAGE = unproven(200, "the file says application/json but is something else")
NO_OCTETS = unproven(200, "the file is none of png, .*")
CUT = failed(200, "the PNG has no end")
FINAL = "failed: 410 no longer available: GraFx keeps a file for 4 hours"
PLAIN = {"body": PAGE, "content_type": "text/html"}
JSON_REJECTION = {"body": b'{"error": "access_denied", "error_description": "Unauthorized"}'}
SORRY = {"body": b"Service temporarily unavailable"}
# What people call it, what the sandbox does, its options; the result where it lasts longer than
# GIVE_UP_AFTER, on the poll, the download, and the token. What passes has always to end well, unless
# it is FINAL or HELD.
FAULTS: list[tuple[str, str, dict[str, Any], str, str, str]] = [
    ("reset", "reset", {}, WAITS, WAITS, WAITS),
    ("close in the body", "close", {"at": 20}, WAITS, WAITS, WAITS),
    ("hang", "hang", {}, WAITS, WAITS, WAITS),
    ("head trickles", "trickle", {"pace": 0.02, "after": 0.8}, WAITS, WAITS, WAITS),
    ("body trickles", "trickle-body", {"pace": 0.1}, WAITS, WAITS, WAITS),
    ("202", "status-202", {}, WAITS, WAITS, WAITS),
    ("400", "status-400", {}, failed(400), failed(400, "the download: .*"), WAITS),
    ("400 in HTML", "status-400", PLAIN, unproven(400, ".*400 .*"), unproven(400, ".*400 .*"), WAITS),
    ("401", "status-401", {}, WAITS, WAITS, WAITS),
    ("401 in the token's words", "status-401", JSON_REJECTION, WAITS, WAITS, WAITS),
    ("404", "status-404", {}, unproven(404), unproven(404, "the download: .*"), WAITS),
    ("404 in HTML", "status-404", PLAIN, unproven(404, ".*404 .*"), unproven(404, ".*404 .*"), WAITS),
    ("408", "status-408", {}, WAITS, WAITS, WAITS),
    ("410", "status-410", {}, unproven(410), FINAL, WAITS),
    ("429", "status-429", {}, WAITS, WAITS, WAITS),
    ("429, Retry-After: 1", "status-429", {"retry_after": 1}, WAITS, WAITS, WAITS),
    ("429, Retry-After: a year", "status-429", {"retry_after": YEAR}, HELD, HELD, HELD),
    ("500, problem details", "status-500", {}, failed(500), failed(500), WAITS),
    ("500, ASP.NET's own", "500-aspnet", {}, WAITS, WAITS, WAITS),
    ("500 in HTML", "500-plain", {}, WAITS, WAITS, WAITS),
    ("502 in HTML", "status-502", PLAIN, WAITS, WAITS, WAITS),
    ("503", "status-503", {}, WAITS, WAITS, WAITS),
    ("HTML with 200", "html", {}, NO_LINK, unproven(200, "the file says text/html .*"), WAITS),
    ("half of the body", "cut", {}, NO_LINK, CUT, WAITS),
    ("other JSON", "other-json", {}, NO_LINK, NO_IMAGE, WAITS),
    ("another task's answer", "other-task", {}, WAITS, NO_IMAGE, WAITS),
    ("no link, but the task", "no-link", {}, FINE, NO_IMAGE, WAITS),
    ("link: a sentence", "bad-link", {}, unproven(404, "the download: .*was not found."), NO_IMAGE, WAITS),
    ("link: ftp", "bad-link", {"link": "ftp://127.0.0.1/x"}, NO_LINK, NO_IMAGE, WAITS),
    ("link: nobody listens", "bad-link", {"link": "http://127.0.0.1:9/"}, WAITS, NO_IMAGE, WAITS),
    ("Content-Length too long", "length-long", {}, WAITS, WAITS, WAITS),
    ("Content-Length too short", "length-short", {}, NO_LINK, CUT, WAITS),
    ("chunked", "chunked", {}, FINE, FINE, FINE),
    ("chunked without an end", "chunked-cut", {}, WAITS, WAITS, WAITS),
    ("close without a length", "close-end", {}, WAITS, WAITS, WAITS),
    ("gzip", "gzip", {}, FINE, FINE, FINE),
    ("half of a gzip", "gzip-cut", {}, WAITS, WAITS, WAITS),
    ("an unknown coding", "coding", SORRY, WAITS, WAITS, WAITS),
    ("a coding that is none", "coding", {"value": "aws-chunked"}, FINE, FINE, FINE),
    ("wrong Content-Type", "wrong-type", {}, FINE, failed(200, "the file says image/jpeg but is png"), FINE),
    ("application/octet-stream", "octet", {}, FINE, FINE, FINE),
    ("octet-stream: a sentence", "octet", SORRY, NO_LINK, NO_OCTETS, WAITS),
    ("empty body", "empty", {}, NO_LINK, unproven(200, "the file is empty"), WAITS),
    ("64 MiB of JSON", "huge", {}, NO_LINK, NO_IMAGE, WAITS),
    ("redirect loop", "redirect-loop", {}, WAITS, WAITS, WAITS),
    ("redirect on this host", "redirect-same", {}, FINE, FINE, WAITS),
    ("redirect to another host", "redirect-away", {}, NO_LINK, FINE, WAITS),
    ("103 before the answer", "interim", {}, WAITS, WAITS, WAITS),
    ("504, then the answer", "late", {}, WAITS, WAITS, WAITS),
    ("204 with another's answer", "late", {"status": 204, "task": "OTHER", "pause": 0}, WAITS, WAITS, WAITS),
]
SLOW = ("hang", "head trickles", "body trickles")


@dataclass
class Row:
    """One fault in one place, for so long; and its result."""

    label: str
    fault: str
    options: dict[str, Any]
    place: str
    span: str
    end: str
    name: str = ""  # whose token it is, of several pollers
    order: str = ""  # the one it happens to
    beside: str = ""  # a healthy one
    during: str = "nothing"  # what the order was while the fault lasted
    beside_during: str = "nothing"
    came: str = "nothing"  # and when it was over
    began: float = 0.0
    requests: list[Request] = field(default_factory=list)  # where the fault is

    def __str__(self) -> str:
        return f"{self.label} on the {self.place}, {self.span}"

    @property
    def stops_all(self) -> bool:
        """Whether nobody is polled as long as it lasts, since there is no token."""
        return self.place == "token" and (self.span != ONCE or self.end == HELD)

    @property
    def group(self) -> str:
        """Which rows may share a poller."""
        if self.place == "token":
            return "token"
        if self.fault in ("status-429", "status-503"):  # a rate limit, which slows everybody down
            return "polite"
        if self.fault == "late":  # whose answer may reach another order's poll, which is then repeated
            return "late"
        return "slow" if self.label in SLOW else "quick"

    def set(self, grafx: Sandbox, name: str = "") -> None:
        """Two orders, and the fault for one of them."""
        self.name = name if self.place == "token" else ""
        self.order, self.beside, self.began = grafx.add(), grafx.add(), time.monotonic()
        options = now(grafx, self.options)
        if self.fault == "huge" and self.place == "download":
            options["size"] = 2 << 20  # a file may be as large as it wants
        times, task_id = 1 if self.span == ONCE else None, self.name or self.order
        grafx.fault(self.place, self.fault, times=times, task_id=task_id, **options)

    def settled(self, waiting: Any, met: list[float]) -> bool:
        """Whether it came to an end, or has lasted long enough and held up nobody meanwhile."""
        if not self.stops_all and self.beside in waiting:
            return False
        if self.end == HELD:
            return len(met) > 0
        if self.order not in waiting:
            return True
        if self.span == ONCE or (self.span == LONG and self.end.startswith("failed")):
            return False
        return len(met) >= OFTEN and met[-1] - met[0] > LASTS[self.span]

    def look(self, grafx: Sandbox) -> None:
        asked = grafx.asked(self.place, self.name or self.order)
        self.requests = [request for request in asked if request.time >= self.began]


ROWS = [
    Row(label, fault, options, place, span, end)
    for label, fault, options, *ends in FAULTS
    for place, end in zip(("task", "download", "token"), ends, strict=True)
    for span in ((ONCE,) if end in (FINE, FINAL, HELD) else (ONCE, TEN, LONG))
]


def now(grafx: Sandbox, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a fault that is set now."""
    return options | ({"task": grafx.add()} if options.get("task") == "OTHER" else {})


def outcome(home: Home, task_id: str) -> str:
    data, file = home.read(), home.orders / f"{task_id}.png"
    for key, what in (("failed", "failed"), ("failing", "rejected")):
        if record := data.get(key, {}).get(task_id):
            return f"{what}: {record['status']} {record['error']}"
    if task_id in data["orders"]:
        return WAITS
    if not file.exists():
        return "LOST"
    return "delivered" if file.read_bytes() == home.grafx.body(task_id) else "WRONG FILE"


def before(row: Row) -> str:
    timeout = 1.0 if row.label in SLOW else 30.0
    return (
        f"chili.TIMEOUT = ({timeout}, {timeout}); chili.SLOW_START = {timeout}; "
        "poller.SHORTEST_PAUSE = 0.05; poller.LONGEST_PAUSE = 1; db.LOOK = 0.2"
    )


def meet(grafx: Sandbox, met: list[tuple[Home, Row]]) -> None:
    """Wait until each row has shown what comes of it. Then all faults are over."""

    def settled() -> bool:
        time.sleep(0.2)
        times: dict[str | None, list[float]] = defaultdict(list)
        for request in list(grafx.requests):
            if request.fault and request.time >= began:
                times[request.task_id].append(request.time)
        waiting = {home.folder: home.waiting() for home, _ in met}
        return all(row.settled(waiting[home.folder], times[row.name or row.order]) for home, row in met)

    began = min(row.began for _, row in met)
    try:
        eventually(settled, "each fault has shown what comes of it", patience=120)
    finally:
        for home, row in met:
            row.during, row.beside_during = outcome(home, row.order), outcome(home, row.beside)
        grafx.clear_faults()
        mortal = [home for home, row in met if row.end != HELD]
        try:
            eventually(lambda: not any(home.waiting() for home in mortal), "all is delivered", patience=60)
        finally:
            for home, row in met:
                row.came = outcome(home, row.order)
                row.look(grafx)


def together(folder: Path, rows: list[Row]) -> None:
    """One poller meets them all."""
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        for row in rows:
            row.set(grafx)
        home.wait_for(*itertools.chain.from_iterable((row.order, row.beside) for row in rows))
        give_up_after = "1" if rows[0].span == LONG else "3600"
        env = {"CONCURRENCY": "16", "POLL_INTERVAL": "0.5", "GIVE_UP_AFTER": give_up_after}
        poller = home.start(before=before(rows[0]), **env)
        try:
            meet(grafx, [(home, row) for row in rows])
            ended_well(home, poller.stop(), poller.log())
            assert "paused" not in poller.log(), "one order's fault held up all"
        finally:
            poller.process.kill()
            poller.process.wait()


def ended_well(home: Home, code: int, log: str) -> None:
    assert code == 0, log
    assert "Traceback" not in log, log
    assert not [name for name in home.files() if name.startswith(".")]


# --- what affects every order: the token, and the rate limit -------------------------------------


# Starts a poller for each line that it reads, by a fork, which is much quicker than 60 starts of Python.
# Where there are no more lines, it ends them all.
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
os.killpg(0, signal.SIGTERM)
while True:
    try:
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    except ChildProcessError:
        break
"""


def apart(folder: Path, rows: list[Row]) -> None:
    """A poller for each fault, with a short GIVE_UP_AFTER: it meets the fault once, and then for 10 s.

    What is pending with a short one is pending with a long one, so this is the result for TEN and for LONG.
    """
    pollers: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        pollers[row.label, row.place][row.span] = row
    with Sandbox() as grafx:
        alone: list[tuple[str, Home, dict[str, Row]]] = []
        for number, spans in enumerate(pollers.values()):
            place = folder / str(number)
            place.mkdir()
            home = Home(place, grafx)
            home.env |= {"TOKEN_URL": f"{grafx.token_url}/{number}", "GIVE_UP_AFTER": "1"}
            home.env |= {"POLL_INTERVAL": "1", "CONCURRENCY": "2"}
            home.wait_for(grafx.add())
            alone.append((str(number), home, spans))
        starter = subprocess.Popen([sys.executable, "-c", STARTER, ROOT], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
        try:
            assert starter.stdin
            for _, home, spans in alone:
                start = f"{before(next(iter(spans.values())))}; chili.TOKEN_PAUSE = 0"
                one = {"env": home.environment(), "log": str(home.folder / "log")}
                starter.stdin.write(json.dumps(one | {"before": start}) + "\n")
                starter.stdin.flush()
            eventually(lambda: not any(home.waiting() for _, home, _ in alone), patience=60)
            for wanted in ((ONCE,), (TEN, LONG)):
                met = [
                    (name, home, same)
                    for name, home, spans in alone
                    if (same := [spans[span] for span in wanted if span in spans])
                ]
                for name, _, same in met:
                    same[0].set(grafx, name)
                if rows[0].place == "token":
                    grafx.revoke()  # so a new one is needed
                for _, home, same in met:
                    home.wait_for(same[0].order, same[0].beside)
                meet(grafx, [(home, same[0]) for _, home, same in met])
                for _, _, same in met:
                    vars(same[-1]).update(vars(same[0]) | {"span": same[-1].span})
            for row in rows:
                if row.end == HELD:
                    row.look(grafx)
            codes = starter.communicate(timeout=60)[0].split()
        finally:
            if starter.poll() is None:
                os.killpg(starter.pid, signal.SIGKILL)
                starter.wait()
        assert codes == ["0"] * len(alone), codes
        for _, home, _ in alone:
            ended_well(home, 0, (home.folder / "log").read_text())


# --- all of it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All rows, each with its outcome; prints the table when its tests are through."""
    wanted = {item.name for item in request.session.items}  # `pytest -k` may want a few only
    rows = [row for row in ROWS if f"test_fault[{row}]" in wanted]
    groups = defaultdict(list)
    for row in rows:
        shared = row.group not in ("token", "polite")
        groups[together if shared else apart, row.group, shared and row.span == LONG].append(row)
    with ThreadPoolExecutor(len(groups)) as pool:
        futures = [
            pool.submit(run, tmp_path_factory.mktemp("faults"), part) for (run, *_), part in groups.items()
        ]
    problems = [future.exception() for future in futures if future.exception()]
    yield
    REPORTS.append("\n".join(table(rows)))
    assert not problems, problems


def table(rows: list[Row]) -> Iterator[str]:
    """A line for each fault; what the numbers of rejected orders mean stands below."""
    reasons: dict[str, int] = {}
    places, columns = ("task", "download", "token"), (ONCE, TEN, LONG)
    came = {(row.label, row.place, row.span): row.during if row.span == LONG else row.came for row in rows}

    def cell(label: str, place: str, span: str) -> str:
        text = came.get((label, place, span), "-")
        what, _, reason = text.partition(": ")
        if not reason:
            return text
        what = what.replace("rejected", WAITS)
        return f"{what} {reasons.setdefault(reason, len(reasons) + 1)}"

    yield (f"{'':27}" + "".join(f"{place:33}" for place in places)).rstrip()
    yield (f"{'fault':27}" + "".join(f"{span:11}" for _ in places for span in columns)).rstrip()
    for label in dict.fromkeys(row.label for row in rows):
        cells = (cell(label, place, span) for place in places for span in columns)
        yield f"{label:27}" + "".join(f"{text:11}" for text in cells).rstrip()
    yield "for ever: when GIVE_UP_AFTER was over. -: as before, for there is nothing to go on"
    yield "pending and a number: it stands under failing, and does not fail, since no other order's file came"
    for reason, number in reasons.items():
        yield f"{number:2}  {reason}"


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fault(row: Row) -> None:
    fails = row.end == FINAL or (row.span == LONG and row.end.startswith("failed"))
    end = row.end if fails else WAITS if row.end == HELD else "delivered"
    assert re.fullmatch(end, row.came), row.came
    if row.span != ONCE:
        end = row.end if fails else row.end.replace("failed", "rejected", 1)
        assert re.fullmatch(end, row.during), f"while it lasted: {row.during}"
    assert row.beside_during == (WAITS if row.stops_all else "delivered"), "the healthy order beside it"
    met = [request for request in row.requests if request.fault]
    if row.span == ONCE and row.fault != "redirect-loop":  # which goes on by itself
        assert len(met) == 1
    if row.end == FINE:
        assert len([request for request in row.requests if request.query == ""]) == 1
    if row.end == HELD:
        assert row.requests[-1] == met[0], "it was polled again, although Retry-After is a year"
    if row.options.get("retry_after") == 1:
        assert all(after.time - before.time > 0.95 for before, after in itertools.pairwise(met))
