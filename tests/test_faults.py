"""Every kind of fault on poll, download and token: once, for some seconds, and past GIVE_UP_AFTER.

All of it runs first, in several pollers side by side. A test for each kind then looks at what became of its
orders. The table is printed at the end.
"""

from __future__ import annotations

import re
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Home, eventually
from sandbox import PAGE, Sandbox

import db

PLACES = ("task", "download", "token")
ONCE, SECONDS, LONG = SPANS = ("once", "for seconds", "for ever")
GIVE_UP_AFTER = 0.5  # seconds, where a fault lasts for ever
LASTS, OFTEN = 1.0, 3  # seconds that a fault lasts, and how often an order meets it meanwhile, or more
YEAR = 365 * 86400
WAITS = "pending"  # says nothing about the order: it is polled for ever
FINE = "delivered"  # odd, but nothing is missing
HELD = "held"  # rate limited: nothing is polled


def failed(status: int, reason: str = ".*ordered by a test.*") -> str:
    """The answer speaks for itself: three times, and GIVE_UP_AFTER."""
    return f"failed: {status} {reason}"


def unproven(status: int, reason: str = ".*ordered by a test.*") -> str:
    """It may be meant for all orders: the order never fails while no other one's file comes meanwhile."""
    return f"rejected: {status} {reason}"


NO_LINK = unproven(200, "GraFx says finished, but gives no download link")
NO_IMAGE = unproven(200, "Content-Type is application/json, but the file is something else")
CUT = failed(200, "the PNG is truncated")
WRONG_TYPE = failed(200, "Content-Type is image/jpeg, but the file is png")
FINAL = "failed: 410 no longer available: GraFx keeps a file for 4 hours"
PLAIN = {"body": PAGE, "content_type": "text/html"}
JSON_REJECTION = {"body": b'{"error": "access_denied", "error_description": "Unauthorized"}'}
SORRY = {"body": b"Service temporarily unavailable"}
# What people call it, what the sandbox does, its options; the result where it lasts longer than
# GIVE_UP_AFTER, on the poll, the download, and the token. What passes has always to end well, unless
# it is FINAL or HELD.
FAULTS: list[tuple[str, str, dict[str, Any], str, str, str]] = [
    ("reset", "reset", {}, WAITS, WAITS, WAITS),
    ("hang", "hang", {}, WAITS, WAITS, WAITS),
    ("head trickles", "trickle", {"pace": 0.02, "after": 0.8}, WAITS, WAITS, WAITS),
    ("body trickles", "trickle-body", {"pace": 0.1}, WAITS, WAITS, WAITS),
    ("202", "status-202", {}, WAITS, WAITS, WAITS),
    ("400", "status-400", {}, failed(400), failed(400, "the download: .*"), WAITS),
    ("400 in HTML", "status-400", PLAIN, unproven(400, ".*400 .*"), unproven(400, ".*400 .*"), WAITS),
    ("401", "status-401", {}, WAITS, WAITS, WAITS),
    ("401 in the token's words", "status-401", JSON_REJECTION, WAITS, WAITS, WAITS),
    ("404", "status-404", {}, unproven(404), unproven(404, "the download: .*"), WAITS),
    ("408", "status-408", {}, WAITS, WAITS, WAITS),
    ("410", "status-410", {}, unproven(410), FINAL, WAITS),
    ("429", "status-429", {}, WAITS, WAITS, WAITS),
    ("429, Retry-After: a year", "status-429", {"retry_after": YEAR}, HELD, HELD, HELD),
    ("500, problem details", "status-500", {}, failed(500), failed(500), WAITS),
    ("500, ASP.NET's own", "500-aspnet", {}, WAITS, WAITS, WAITS),
    ("500 in HTML", "500-plain", {}, WAITS, WAITS, WAITS),
    ("503", "status-503", {}, WAITS, WAITS, WAITS),
    ("HTML with 200", "html", {}, NO_LINK, unproven(200, "Content-Type is text/html, .*"), WAITS),
    ("half of the body", "cut", {}, NO_LINK, CUT, WAITS),
    ("another task's answer", "other-task", {}, WAITS, NO_IMAGE, WAITS),
    ("no link, but the task", "no-link", {}, FINE, NO_IMAGE, WAITS),
    ("a link where nobody listens", "bad-link", {"link": "http://127.0.0.1:9/"}, WAITS, NO_IMAGE, WAITS),
    ("Content-Length too long", "length-long", {}, WAITS, WAITS, WAITS),
    ("Content-Length too short", "length-short", {}, NO_LINK, CUT, WAITS),
    ("chunked", "chunked", {}, FINE, FINE, FINE),
    ("chunked without an end", "chunked-cut", {}, WAITS, WAITS, WAITS),
    ("close without a length", "close-end", {}, WAITS, WAITS, WAITS),
    ("gzip", "gzip", {}, FINE, FINE, FINE),
    ("half of a gzip", "gzip-cut", {}, WAITS, WAITS, WAITS),
    ("an unknown coding", "coding", SORRY, WAITS, WAITS, WAITS),
    ("wrong Content-Type", "wrong-type", {}, FINE, WRONG_TYPE, FINE),
    ("application/octet-stream", "octet", {}, FINE, FINE, FINE),
    ("empty body", "empty", {}, NO_LINK, unproven(200, "the file is empty"), WAITS),
    ("64 MiB of JSON", "huge", {}, NO_LINK, NO_IMAGE, WAITS),
    ("redirect loop", "redirect-loop", {}, WAITS, WAITS, WAITS),
    ("redirect on this host", "redirect-same", {}, FINE, FINE, WAITS),
    ("redirect to another host", "redirect-away", {}, NO_LINK, FINE, WAITS),
    ("103 before the answer", "interim", {}, WAITS, WAITS, WAITS),
    ("504, then the answer", "late", {}, WAITS, WAITS, WAITS),
    ("204 with another's answer", "late", {"status": 204, "task": "OTHER", "pause": 0}, WAITS, WAITS, WAITS),
]
LABELS = [label for label, *_ in FAULTS]
# How long each lasts where it is not each of the SPANS.
LAST = {FINE: (LONG,), FINAL: (ONCE,), HELD: ()}


@dataclass
class Row:
    """One fault in one place, for so long; and what came of it."""

    label: str
    fault: str
    options: dict[str, Any]
    place: str
    span: str
    end: str
    order: str = ""  # whose it is
    during: str = "nothing"  # what the order was while the fault lasted
    came: str = "nothing"  # and when it was over

    @property
    def fails(self) -> bool:
        return self.end == FINAL or (self.span == LONG and self.end.startswith("failed"))

    @property
    def slow(self) -> bool:
        """Whether its poller is one with short timeouts."""
        return self.label in ("hang", "head trickles", "body trickles")

    @property
    def group(self) -> object:
        """Which rows share a poller."""
        if self.place == "token":
            return self.label if self.slow else LABELS.index(self.label) % 12
        return self.slow, self.span == LONG

    def settled(self, waiting: Any, met: list[float]) -> bool:
        """Whether it came to an end, or has lasted long enough."""
        if self.order not in waiting:
            return True
        ends = self.span == ONCE or self.fails or self.end == FINE
        return not ends and len(met) >= OFTEN and met[-1] - met[0] > LASTS

    def problem(self) -> str:
        """What is wrong with what came of it."""
        during = self.end if self.fails else self.end.replace("failed", "rejected")
        if self.span != ONCE and not re.fullmatch(during, self.during):
            return f"while it lasted: {self.during}"
        if not re.fullmatch(self.end if self.fails else "delivered", self.came):
            return f"when it was over: {self.came}"
        return ""


ROWS = [
    Row(label, fault, options, place, span, end)
    for label, fault, options, *ends in FAULTS
    for place, end in zip(PLACES, ends, strict=True)
    for span in LAST.get(end, SPANS)
    if (place, span) != ("token", SECONDS)  # then all wait, just as where it lasts for ever
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


def meet(home: Home, rows: list[Row]) -> None:
    """Set these faults, and wait until each has shown what comes of it. Then all are over."""
    grafx, begin, token = home.grafx, len(home.grafx.requests), rows[0].place == "token"
    for row in rows:
        row.order, options = grafx.add(), now(grafx, row.options)
        if row.fault == "huge" and row.place == "download":
            options["size"] = 2 << 20  # a file may be as large as it wants
        whose, times = None if token else row.order, 1 if row.span == ONCE else None
        grafx.fault(row.place, row.fault, times=times, task_id=whose, **options)
    if token:
        grafx.revoke()  # so a new one is needed
    home.wait_for(*(row.order for row in rows))

    def settled() -> bool:
        met, waiting = defaultdict(list), home.waiting()
        for request in grafx.requests[begin:]:
            if request.fault:
                met[request.task_id].append(request.time)
        return all(row.settled(waiting, met[None if token else row.order]) for row in rows)

    try:
        eventually(settled, "each fault has shown what comes of it", patience=90)
        if not token:
            db.add_order(beside := grafx.add(), path=home.database)
            eventually(lambda: beside not in home.waiting(), "a healthy order beside them is delivered")
    finally:
        for row in rows:
            row.during = outcome(home, row.order)
        grafx.clear_faults()
        try:
            eventually(lambda: not home.waiting(), "all is delivered")
        finally:
            for row in rows:
                row.came = outcome(home, row.order)


def run(folder: Path, rows: list[Row]) -> None:
    """One poller meets the token's faults one after the other, all others at once."""
    token, timeout = rows[0].place == "token", 1.0 if rows[0].slow else 30.0
    before = (
        f"chili.TIMEOUT = ({timeout}, {timeout}); chili.SLOW_START = {timeout}; chili.Pace.LONGEST = 0; "
        "poller.SHORTEST_PAUSE = 0.05; poller.LONGEST_PAUSE = 0.5; db.LOOK = 0.1"
    )
    if token:
        before += "; chili.TOKEN_PAUSE = 0"
    give_up_after = GIVE_UP_AFTER if any(row.span == LONG for row in rows) else 3600
    env = {"CONCURRENCY": "32", "POLL_INTERVAL": "0.5", "GIVE_UP_AFTER": str(give_up_after)}
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        home.wait_for(grafx.add())
        poller = home.start(before=before, **env)
        try:
            eventually(lambda: not home.waiting(), "the credentials are known to be right")
            for batch in [[row] for row in rows] if token else [rows]:
                meet(home, batch)
            assert poller.stop() == 0, poller.log()
            assert "Traceback" not in poller.log(), poller.log()
            assert token or "paused" not in poller.log(), "one order's fault held up all"
            assert not [name for name in home.files() if name.startswith(".")]
        finally:
            poller.process.kill()
            poller.process.wait()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Future[None]]:
    """All pollers have ended, and each row has what came of it."""
    groups = defaultdict(list)
    for row in ROWS:
        groups[row.group].append(row)
    with ThreadPoolExecutor(len(groups)) as pool:
        ended = [pool.submit(run, tmp_path_factory.mktemp("faults"), rows) for rows in groups.values()]
    return ended


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("label", dict.fromkeys(row.label for row in ROWS))
def test_fault(label: str) -> None:
    rows = [row for row in ROWS if row.label == label]
    wrong = {f"on the {row.place}, {row.span}": row.problem() for row in rows if row.problem()}
    assert not wrong


def test_each_poller_ended_well(ran: list[Future[None]]) -> None:
    """With 0, no traceback in its log, and no partial download."""
    for ended in ran:
        ended.result()


@pytest.mark.parametrize("place", PLACES)
def test_a_long_retry_after_holds_all_requests(home: Home, place: str) -> None:
    """For five minutes at most; meanwhile the loop goes on."""
    home.grafx.fault(place, "status-429", retry_after=YEAR)
    home.wait_for(home.grafx.add())
    poller = home.start(before=QUICK)
    poller.says("rate limited: Retry-After 300 s")
    db.add_order(later := home.grafx.add(), path=home.database)
    poller.says(f"{later} added")
    assert poller.stop() == 0
    assert home.grafx.requests[-1].status == 429
    assert len(home.waiting()) == 2
