"""Not faster than GraFx allows."""

from __future__ import annotations

import time
from statistics import median

from conftest import Home, eventually
from sandbox import Answer, Fault, Request, Sandbox

import chili


class Limited(Sandbox):
    """Answers 429 or 503 without Retry-After to all but four requests in 0.2 s."""

    def _take_fault(self, request: Request, answer: Answer) -> Fault | None:
        recent = [one for one in self.requests if one.time > request.time - 0.2]
        if len([one for one in recent if not one.fault]) <= 4:
            return None
        return Fault(request.what, f"status-{429 if len(self.requests) % 2 else 503}", 1, None, None, {})


def test_it_finds_the_limit_that_nobody_told_it(home: Home) -> None:
    with Limited() as grafx:
        home.env |= grafx.settings(home.folder)
        home.wait_for(*(grafx.add() for _ in range(30)))
        home.start()
        eventually(lambda: not home.waiting(), patience=120)
        limited = [request for request in grafx.requests if request.fault]
        assert 0 < len(limited) < len(grafx.requests) / 2  # without a pace it is four of five
        assert home.failed() == {}


def test_it_slows_down_after_a_429_or_503_only_and_forgets_it_in_time() -> None:
    pace = chili.Pace()

    def waits(number: int, status: int) -> float:
        """The median of so many waits, each before a request that is answered so."""
        waited = []
        for _ in range(number):
            began = pace.wait()
            waited.append(time.monotonic() - began)
            pace.learn(status, began)
        return median(waited)

    free = waits(50, 200)
    waits(2, 503)
    slow = waits(5, 404)
    waits(400, 204)
    assert max(free, waits(50, 204)) < slow / 10
