"""Every fault on task question, download and token, once and three times in a row, then health.

All of it runs first, in a few pollers side by side; a test for each row then looks at what came of it,
and of the healthy order that stood beside it. The table is printed at the end.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import REPORTS, Home, eventually
from sandbox import PAGE, Request, Sandbox

YEAR = 365 * 86400
LATER = "delivered"  # it cannot be told from a passing trouble, and is asked about for ever
FINE = "delivered at once"  # odd, but nothing is missing
HELD = "waiting"
NO_LINK = "failed: 200 GraFx says finished, but gives no download link"


def failed(status: int, reason: str = ".*ordered by a test.*") -> str:
    return f"failed: {status} {reason}"


def no_file(says: str, looks: str = "something else") -> str:
    return f"failed: 200 the file says {re.escape(says)} but is {looks}"


NO_IMAGE = no_file("application/json")
FINAL = "failed: 410 no longer available: GraFx keeps a file for 4 hours"
PLAIN = {"body": PAGE, "content_type": "text/html"}
# What people call it, what the sandbox does, its options; what comes of it where it happens three times to
# a task question, to a download, and to a token. What has happened once has always to end well, unless it is
# FINAL or HELD.
FAULTS: list[tuple[str, str, dict[str, Any], str, str, str]] = [
    ("reset", "reset", {}, LATER, LATER, LATER),
    ("reset in the body", "reset", {"at": 20}, LATER, LATER, LATER),
    ("close", "close", {}, LATER, LATER, LATER),
    ("close in the body", "close", {"at": 20}, LATER, LATER, LATER),
    ("hang", "hang", {}, LATER, LATER, LATER),
    ("head trickles", "trickle", {"pace": 0.1}, LATER, LATER, LATER),
    ("body trickles", "trickle-body", {"pace": 0.1}, LATER, LATER, LATER),
    ("400", "status-400", {}, failed(400), failed(400, "the download: .*"), LATER),
    ("401", "status-401", {}, LATER, LATER, LATER),
    ("403", "status-403", {}, failed(403), failed(403, "the download: .*"), LATER),
    ("403 in HTML", "status-403", PLAIN, failed(403, ".*403 .*"), failed(403, ".*403 .*"), LATER),
    ("404", "status-404", {}, failed(404), failed(404), LATER),
    ("404 in HTML", "status-404", PLAIN, failed(404, ".*"), failed(404, ".*"), LATER),
    ("408", "status-408", {}, LATER, LATER, LATER),
    ("410", "status-410", {}, failed(410), FINAL, LATER),
    ("425", "status-425", {}, LATER, LATER, LATER),
    ("429", "status-429", {}, LATER, LATER, LATER),
    ("425, Retry-After: 1", "status-425", {"retry_after": 1}, LATER, LATER, LATER),
    ("429, Retry-After: 1", "status-429", {"retry_after": 1}, LATER, LATER, LATER),
    ("503, Retry-After: 1", "status-503", {"retry_after": 1}, LATER, LATER, LATER),
    ("429, Retry-After: date", "status-429", {"retry_after": "date"}, LATER, LATER, LATER),
    ("429, Retry-After: soon", "status-429", {"retry_after": "soon"}, LATER, LATER, LATER),
    ("429, Retry-After: -1", "status-429", {"retry_after": "-1"}, LATER, LATER, LATER),
    ("429, Retry-After: a year", "status-429", {"retry_after": YEAR}, HELD, HELD, HELD),
    ("500, problem details", "status-500", {}, failed(500), failed(500), LATER),
    ("500 in HTML", "500-plain", {}, LATER, LATER, LATER),
    ("500, nothing", "500-empty", {}, LATER, LATER, LATER),
    ("502", "status-502", {}, LATER, LATER, LATER),
    ("502 in HTML", "status-502", PLAIN, LATER, LATER, LATER),
    ("503", "status-503", {}, LATER, LATER, LATER),
    ("504", "status-504", {}, LATER, LATER, LATER),
    ("HTML with 200", "html", {}, NO_LINK, no_file("text/html"), LATER),
    ("half of the body", "cut", {}, NO_LINK, failed(200, "the PNG has no end"), LATER),
    ("cut JSON", "cut-json", {}, NO_LINK, NO_IMAGE, LATER),
    ("JSON: []", "other-json", {}, NO_LINK, NO_IMAGE, LATER),
    ("JSON: null", "other-json", {"value": None}, NO_LINK, NO_IMAGE, LATER),
    ("JSON: links is a text", "other-json", {"value": {"links": "x"}}, NO_LINK, NO_IMAGE, LATER),
    ("JSON: link is a number", "other-json", {"value": {"links": {"download": 7}}}, NO_LINK, NO_IMAGE, LATER),
    ("JSON: token is a number", "other-json", {"value": {"access_token": 7}}, NO_LINK, NO_IMAGE, LATER),
    ("no link", "no-link", {}, NO_LINK, NO_IMAGE, LATER),
    ("link: no address", "bad-link", {}, NO_LINK, NO_IMAGE, LATER),
    ("link: ftp", "bad-link", {"link": "ftp://127.0.0.1/x"}, NO_LINK, NO_IMAGE, LATER),
    ("link: file", "bad-link", {"link": "file:///etc/passwd"}, NO_LINK, NO_IMAGE, LATER),
    ("link: no host", "bad-link", {"link": "http://[::1"}, NO_LINK, NO_IMAGE, LATER),
    ("link: port 99999", "bad-link", {"link": "http://localhost:99999/"}, NO_LINK, NO_IMAGE, LATER),
    ("link: nobody listens", "bad-link", {"link": "http://127.0.0.1:9/"}, LATER, NO_IMAGE, LATER),
    ("Content-Length too long", "length-long", {}, LATER, LATER, LATER),
    ("Content-Length too short", "length-short", {}, NO_LINK, failed(200, "the PNG has no end"), LATER),
    ("chunked", "chunked", {}, FINE, FINE, FINE),
    ("chunked without an end", "chunked-cut", {}, LATER, LATER, LATER),
    ("close without a length", "close-end", {}, FINE, LATER, FINE),
    ("gzip", "gzip", {}, FINE, FINE, FINE),
    ("half of a gzip", "gzip-cut", {}, LATER, LATER, LATER),
    ("wrong Content-Type", "wrong-type", {}, FINE, no_file("image/jpeg", "png"), FINE),
    ("application/octet-stream", "octet", {}, FINE, FINE, FINE),
    ("empty body", "empty", {}, NO_LINK, failed(200, "the file is empty"), LATER),
    ("64 MiB of JSON", "huge", {}, NO_LINK, NO_IMAGE, LATER),
    ("redirect loop", "redirect-loop", {}, LATER, LATER, LATER),
    ("redirect on this host", "redirect-same", {}, FINE, FINE, LATER),
    ("redirect to another host", "redirect-away", {}, NO_LINK, FINE, LATER),
]  # fmt: skip
SLOW = ("hang", "head trickles", "body trickles")


@dataclass
class Row:
    """One fault in one place, so many times; and what came of it."""

    label: str
    fault: str
    options: dict[str, Any]
    place: str
    times: int
    expected: str
    order: str = ""  # the one it happens to
    beside: str = ""  # a healthy one
    came: str = "nothing"
    came_beside: str = "nothing"
    requests: list[Request] = field(default_factory=list)
    requests_beside: list[Request] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.label} on the {self.place}, {'once' if self.times == 1 else '3 times'}"

    def set(self, grafx: Sandbox) -> None:
        """Two orders, and the fault for one of them."""
        self.order, self.beside = grafx.add(), grafx.add()
        options = dict(self.options)
        if options.get("retry_after") == "date":
            options["retry_after"] = formatdate(time.time() + 2, usegmt=True)
        if self.fault == "huge" and self.place == "download":
            options["size"] = 2 << 20  # a file may be as large as it wants
        task_id = None if self.place == "token" else self.order
        grafx.fault(self.place, self.fault, times=self.times, task_id=task_id, **options)

    def look(self, home: Home, since: int = 0) -> None:
        self.came, self.came_beside = outcome(home, self.order), outcome(home, self.beside)
        requests = home.grafx.requests[since:]
        self.requests_beside = [request for request in requests if request.task_id == self.beside]
        if self.place == "token":
            self.requests = [request for request in requests if request.what == "token"]
        else:
            self.requests = [request for request in requests if request.task_id == self.order]


def outcome(home: Home, task_id: str) -> str:
    if record := home.failed().get(task_id):
        return f"failed: {record['status']} {record['error']}"
    if task_id in home.waiting():
        return "waiting"
    file = home.orders / f"{task_id}.png"
    if not file.exists():
        return "LOST"
    return "delivered" if file.read_bytes() == home.grafx.body(task_id) else "DELIVERED, BUT NOT WHOLE"


ROWS = [
    Row(label, fault, options, place, times, expected)
    for label, fault, options, *ends in FAULTS
    for place, expected in zip(("task", "download", "token"), ends, strict=True)
    for times in ((1,) if expected in (FINE, HELD, FINAL) else (1, 3))
]


def before(timeout: float) -> str:
    return (
        f"chili.TIMEOUT = chili.Timeout(connect={timeout}, read={timeout}); chili.ANSWER_TIME = {timeout}; "
        "poller.SHORTEST_PAUSE = db.LOOK = 0.05"
    )


def all_at_once(folder: Path, rows: list[Row], timeout: float) -> None:
    """One poller meets them all."""
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        for row in rows:
            row.set(grafx)
        home.wait_for(*itertools.chain.from_iterable((row.order, row.beside) for row in rows))
        poller = home.start(before=before(timeout), POLL_INTERVAL="0.2", CONCURRENCY="16")
        try:
            if rows[0].expected == HELD:
                eventually(lambda: any(request.fault for request in grafx.requests))
                eventually(lambda: rows[0].beside not in home.waiting())
                time.sleep(1.5)
            else:
                eventually(lambda: not home.waiting(), patience=90)
        finally:
            end(poller, home)
            for row in rows:
                row.look(home)


def one_after_the_other(folder: Path, rows: list[Row], timeout: float) -> None:
    """A token is everybody's; a new one is fetched where the old one is refused."""
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        home.wait_for(grafx.add())
        poller = home.start(before=before(timeout), POLL_INTERVAL="0.1")
        try:
            eventually(lambda: not home.waiting())
            for row in rows:
                since = len(grafx.requests)
                row.set(grafx)
                grafx.revoke()
                if row.expected == HELD:
                    home.wait_for(row.order)
                    eventually(lambda since=since: any(request.fault for request in grafx.requests[since:]))
                home.wait_for(row.order, row.beside)
                if row.expected == HELD:
                    time.sleep(1.5)
                else:
                    eventually(lambda: not home.waiting(), str(row))
                row.look(home, since)
        finally:
            end(poller, home)


def end(poller: Any, home: Home) -> None:
    code = poller.stop()
    assert code in (0, 1), poller.log()
    assert "Traceback" not in poller.log(), poller.log()
    assert not [name for name in home.files() if name.startswith(".")]


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All rows, each with its outcome; prints the table when its tests are through."""
    wanted = {item.name for item in request.session.items}  # `pytest -k` may want a few only
    rows = [row for row in ROWS if f"test_fault[{row}]" in wanted]
    shared = [row for row in rows if row.place != "token"]
    tokens = [row for row in rows if row.place == "token"]

    def pick(these: list[Row], group: str) -> list[Row]:
        def kind(row: Row) -> str:
            if row.label in SLOW:
                return "slow"
            return "polite" if "retry_after" in row.options else "quick"

        return [row for row in these if row.expected != HELD and kind(row) == group]

    runs: list[tuple[Any, list[Row], float]] = [(all_at_once, pick(shared, "quick"), 10)]
    runs += [(all_at_once, pick(shared, "polite"), 10), (all_at_once, pick(shared, "slow"), 0.5)]
    runs += [(all_at_once, [row], 10) for row in shared if row.expected == HELD]
    runs += [(one_after_the_other, [row], 10) for row in tokens if row.expected == HELD]
    runs += [(one_after_the_other, pick(tokens, "quick")[part::5], 10) for part in range(5)]
    runs += [(one_after_the_other, pick(tokens, "polite")[part::5], 10) for part in range(5)]
    runs += [(one_after_the_other, pick(tokens, "slow")[part::3], 0.5) for part in range(3)]
    with ThreadPoolExecutor(len(runs)) as pool:
        futures: list[Future[None]] = [
            pool.submit(run, tmp_path_factory.mktemp("faults"), part, timeout)
            for run, part, timeout in runs
            if part
        ]
    problems = [future.exception() for future in futures if future.exception()]
    yield
    REPORTS.append("\n".join(table(rows)))
    assert not problems, problems


def table(rows: list[Row]) -> Iterator[str]:
    """A line for each fault; what the letters of failed orders mean stands below."""
    reasons: dict[str, str] = {}
    columns = list(itertools.product(("task", "download", "token"), (1, 3)))

    def cell(label: str, place: str, times: int) -> str:
        for row in rows:
            if (row.label, row.place, row.times) == (label, place, times):
                if not row.came.startswith("failed: "):
                    return row.came
                letter = reasons.setdefault(row.came.removeprefix("failed: "), chr(ord("a") + len(reasons)))
                return f"failed ({letter})"
        return "-"

    heads = [f"{place} x{times}" for place, times in columns]
    yield (f"{'fault':27}" + "".join(f"{head:13}" for head in heads)).rstrip()
    for label in dict.fromkeys(row.label for row in rows):
        yield f"{label:27}" + "".join(f"{cell(label, *column):13}" for column in columns).rstrip()
    yield "-: as x1, for there is nothing to repeat"
    for reason, letter in reasons.items():
        yield f"({letter}) {reason}"


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fault(row: Row) -> None:
    met = [request for request in row.requests if request.fault]
    if row.fault != "redirect-loop":  # which goes on by itself
        assert len(met) == row.times, "the fault did not happen as often as it should"
    expected = row.expected
    if expected == FINE or (expected.startswith("failed") and row.times == 1 and expected != FINAL):
        expected = "delivered"
    assert re.fullmatch(expected, row.came), row.came
    if row.expected == FINE and row.place != "token":
        assert [request.what for request in row.requests if request.query == ""].count(row.place) == 1
    if row.options.get("retry_after") == 1 and (row.place != "token" or row.times == 3):
        times = [request.time for request in row.requests if request.what == row.place]
        pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
        # The other order may already be on its way to the token when the first one is told to wait.
        assert (max if row.place == "token" else min)(pauses) > 0.95
    # Nobody else is held up by it, except where GraFx wants to be left alone or gives no token.
    if row.expected == HELD:
        after = [request for request in row.requests if request.time > met[0].time]
        assert not after, "it was asked again, although GraFx wants to be left alone for a year"
    if row.expected == HELD and row.place == "token":
        assert row.came_beside == "waiting"
    else:
        assert row.came_beside == "delivered"
        if row.times == 3 and row.place != "token" and "retry_after" not in row.options:
            last = max(request.time for request in row.requests if request.what == "task")
            file = min(request.time for request in row.requests_beside if request.what == "download")
            assert file < last, "the healthy order beside it had to wait for it"
