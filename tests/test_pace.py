"""Not faster than GraFx allows."""

from __future__ import annotations

import time

from conftest import Home, eventually
from sandbox import Answer, Fault, Request, Sandbox

import chili


class Limited(Sandbox):
    """Answers 429 or 503 without Retry-After to more than so many requests a second, as nginx does."""

    rate, burst = 20.0, 4.0
    excess = last = 0.0

    def _take_fault(self, request: Request, answer: Answer) -> Fault | None:
        if request.what not in ("task", "download"):
            return None
        self.excess = max(0.0, self.excess - (request.time - self.last) * self.rate)
        self.last = request.time
        if self.excess + 1 > self.burst:
            return Fault(request.what, f"status-{429 if len(self.requests) % 2 else 503}", 1, None, None, {})
        self.excess += 1
        return None


def test_it_finds_the_limit_that_nobody_told_it(home: Home) -> None:
    with Limited() as grafx:
        home.env |= grafx.settings(home.folder)
        home.wait_for(*(grafx.add() for _ in range(60)))
        daemon = home.start()
        # Near the limit it takes 6 s, with a second between two requests two minutes.
        eventually(lambda: not home.waiting(), patience=60)
        assert daemon.stop() == 0
        sent = [request for request in grafx.requests if request.what != "token"]
        limited = [request for request in sent if request.status in (429, 503)]
        assert 0 < len(limited) <= len(sent) / 3
        assert home.failed() == {}


def test_it_does_not_slow_down_without_a_429_or_503_and_forgets_one_in_time() -> None:
    pace = chili.Pace()
    for _ in range(1000):
        pace.learn(200, pace.wait())
    assert pace._between == 0.0
    for _ in range(3):
        pace.learn(503, pace.wait())
    slow = pace._between
    assert slow > 0
    # One round is one 429: those that were on their way when it came do not count.
    asked = time.monotonic() - 1
    pace.learn(429, asked)
    assert pace._between == slow
    for _ in range(1000):
        pace.learn(204, asked)
    assert pace._between < 1e-6  # seconds: no poll is as quick as that
    for _ in range(30):
        pace.learn(503, time.monotonic())
    assert pace._between == pace.LONGEST
