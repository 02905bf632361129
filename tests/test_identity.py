"""The right file under the right name: whose answer it is, and whose fault it is.

The real process against the sandbox. How each fault ends by itself is in test_faults.py; what each answer
means, in test_chili.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import LATE, QUICK, Home, Running, eventually


def delivered(home: Home, *tasks: str) -> None:
    """These files are here, each its own, and no others; nothing failed."""
    assert home.files() == sorted(f"{task}.png" for task in tasks)
    for task in tasks:
        assert (home.orders / f"{task}.png").read_bytes() == home.grafx.body(task), f"{task}: another's file"
    assert home.failed() == {}


@contextmanager
def daemon(home: Home, concurrency: int, *arguments: str, before: str = QUICK) -> Iterator[Running]:
    """A poller that ends with 0, and without a traceback in its log."""
    running = home.start(*arguments, before=before, CONCURRENCY=str(concurrency), POLL_INTERVAL="0.1")
    yield running
    assert running.stop() == 0, running.log()
    assert "Traceback" not in running.log(), running.log()


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_late_answer_is_nobodys(home: Home, concurrency: int) -> None:
    """One thread polls one order after the other; with eight, another thread may get it."""
    grafx = home.grafx
    other, tasks = grafx.add(), [grafx.add() for _ in range(4 * len(LATE))]
    for number, task in enumerate(tasks):  # the same kind in a row, and then the other kinds
        options = LATE[number // 2 % len(LATE)]
        options = options | ({"task": other} if "task" in options else {})
        grafx.fault("task" if number < 2 * len(LATE) else "download", "late", task_id=task, **options)
    home.wait_for(*tasks)
    with daemon(home, concurrency) as running:
        eventually(lambda: not home.waiting())
    delivered(home, *tasks)
    assert "rejected by" not in running.log()
    assert len([request for request in grafx.requests if request.fault]) == len(tasks)


def test_credentials_that_are_rejected_later_are_retried(home: Home) -> None:
    first, second = home.grafx.add(), home.grafx.add()
    home.wait_for(first)
    with daemon(home, 1) as running:
        eventually(lambda: not home.waiting())
        home.grafx.refuse_credentials = True
        home.grafx.revoke()
        home.wait_for(second)
        running.says("ERROR .*rejects SERVER_ID and SERVER_SECRET")
        eventually(lambda: len(home.grafx.asked("token")) > 3)
        home.grafx.refuse_credentials = False
        eventually(lambda: not home.waiting())
    delivered(home, first, second)


def test_a_folder_in_a_files_place_delays_only_its_order(home: Home) -> None:
    blocked, others = home.grafx.add(), [home.grafx.add(questions=1) for _ in range(5)]
    place = home.orders / f"{blocked}.png"
    place.mkdir()
    home.wait_for(blocked, *others)
    with daemon(home, 1) as running:
        eventually(lambda: list(home.waiting()) == [blocked])
        eventually(lambda: len(home.grafx.asked("task", blocked)) > 3)
        assert f"{place} is a folder where the file should be: move it away" in running.log()
        assert "paused" not in running.log()
        place.rmdir()
        eventually(lambda: not home.waiting())
    delivered(home, blocked, *others)


def test_an_outage_is_over_with_the_first_good_answer(home: Home) -> None:
    """Not when the last order that met it has been polled again."""
    grafx = home.grafx
    first, a, b = grafx.add(), grafx.add(), grafx.add()
    home.wait_for(first)
    with daemon(home, 2, before=f"{QUICK}; chili.TIMEOUT = (30, 600)") as running:
        eventually(lambda: not home.waiting())
        fault = grafx.fault("token", "status-503", times=None)
        grafx.fault("task", "status-401", task_id=b)  # so that it meets the outage first
        grafx.fault("task", "hang", task_id=b, times=None)  # beyond the end of the test
        grafx.revoke()
        home.wait_for(a, b)
        running.says("paused: no token: ")
        eventually(lambda: len(grafx.asked("token")) > 4)
        assert "resumed" not in running.log()
        grafx.end_fault(fault)
        running.says("resumed after")
        eventually(lambda: list(home.waiting()) == [b])
        assert running.log().count("paused: ") == 1
    delivered(home, first, a)


def test_a_poll_from_before_an_outage_does_not_end_it(home: Home) -> None:
    """A slow 204, on its way when the token could not be had any more."""
    grafx, over = home.grafx, threading.Event()
    slow, other = grafx.add("never"), grafx.add("never")
    home.wait_for(slow)
    grafx.fault("task", "delay", task_id=slow, until=over)
    with daemon(home, 2, "-v") as running:
        eventually(lambda: grafx.asked("task", slow))
        grafx.fault("token", "status-503", times=None)
        grafx.revoke()
        home.wait_for(slow, other)
        running.says("paused: no token: ")
        over.set()
        running.says(f"{slow}: 204")
        tried = len(grafx.asked("token"))
        eventually(lambda: len(grafx.asked("token")) > tried + 2)
        assert "resumed" not in running.log()
