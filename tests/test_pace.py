"""Not faster than GraFx allows."""

from __future__ import annotations

import time
from typing import Any

from conftest import Home, eventually
from sandbox import Answer, Fault, Request, Sandbox

import chili


class Limited(Sandbox):
    """Answers 429 or 503 without Retry-After to more than so many requests a second, as nginx does."""

    rate, burst, status = 40.0, 10.0, 429
    excess = last = 0.0

    def _take_fault(self, request: Request, answer: Answer) -> Fault | None:
        if request.what not in ("task", "download"):
            return None
        self.excess = max(0.0, self.excess - (request.time - self.last) * self.rate)
        self.last = request.time
        if self.excess + 1 > self.burst:
            return Fault(request.what, f"status-{self.status}", 1, None, None, {})
        self.excess += 1
        return None


def test_it_finds_the_limit_that_nobody_told_it(tmp_path: Any) -> None:
    for status in (429, 503):
        Limited.status = status
        with Limited() as grafx:
            folder = tmp_path / str(status)
            folder.mkdir()
            home = Home(folder, grafx)
            home.wait_for(*(grafx.add() for _ in range(60)))
            daemon = home.start()
            eventually(lambda home=home: not home.waiting())
            assert daemon.stop() == 0
            asked = [request for request in grafx.requests if request.what != "token"]
            refused = [request for request in asked if request.status == status]
            assert 0 < len(refused) <= len(asked) / 4
            # Most of the time it is near the limit: 120 answers at 40 a second.
            assert asked[-1].time - asked[0].time < 8 * (120 - grafx.burst) / grafx.rate
            assert home.failed() == {}


def test_it_is_as_fast_as_before_where_nothing_is_refused_and_again_when_that_is_over() -> None:
    pace = chili.Pace()
    for _ in range(1000):
        pace.heard(200, pace.wait())
    assert pace._between == 0.0
    for _ in range(3):
        pace.heard(503, pace.wait())
    slow = pace._between
    assert slow > 0
    # One round is one refusal: those that were on their way when it came do not count.
    asked = time.monotonic() - 1
    pace.heard(429, asked)
    assert pace._between == slow
    for _ in range(1000):
        pace.heard(204, asked)
    assert pace._between < 1e-6  # seconds: no question is as quick as that
    for _ in range(30):
        pace.heard(503, time.monotonic())
    assert pace._between == pace.LONGEST
