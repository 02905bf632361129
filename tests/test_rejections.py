"""When a rejected order fails: by time, over restarts, and from one `--once` to the next."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from conftest import QUICK, Home, eventually
from sandbox import PAGE, Request

import db

UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


def polls(home: Home, task_id: str) -> list[Request]:
    return [
        request for request in home.grafx.requests if (request.what, request.task_id) == ("task", task_id)
    ]


def failing(home: Home) -> Any:
    return home.read().get("failing", {})


def utc(seconds: float) -> str:
    """So many seconds from now."""
    when = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def test_what_was_delivered_is_counted_as_that_alone(home: Home) -> None:
    """GraFx rejected it for a while, and the poller was killed before the order left the file."""
    record = {"status": 500, "error": "x", "since": utc(-60), "times": 2}
    home.write({"orders": {"a": {}}, "failing": {"a": record}, "failed": {}})
    db.Deliveries(home.database).add({"a": "a.png"})
    assert ": 0 pending, 0 failing, 0 failed, 1 delivered" in home.run("--once").log()
    assert home.read() == {"orders": {}, "failed": {}}


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_an_order_fails_after_so_many_seconds_and_three_rejections(home: Home, seconds: float) -> None:
    task = home.grafx.add("failed")
    home.wait_for(task)
    home.start(before=QUICK, GIVE_UP_AFTER=str(seconds))
    eventually(lambda: task in home.failed())
    times = [request.time for request in polls(home, task)]
    assert times[-1] - times[0] > seconds - 1
    assert len(times) == 3 if not seconds else len(times) > 3


def test_from_the_first_rejection_on_it_stands_under_failing_and_stays_pending(home: Home) -> None:
    grafx = home.grafx
    task, fine = grafx.add("failed"), grafx.add("never")
    fields = {"projectID": "p-1", "added": "2026-01-02T03:04:05Z"}
    home.wait_for(task, fine, **fields)
    daemon = home.start(before=QUICK)
    eventually(lambda: len(polls(home, task)) > 4)
    record = failing(home)[task]
    assert list(failing(home)) == [task]
    assert record["status"] == 500
    assert "Variable 'Size' has no item 'XXL'." in record["error"]
    assert re.fullmatch(UTC, record["since"])
    assert record["times"] >= 1
    assert home.waiting() == {task: fields, fine: fields}
    listed = home.db("list").stdout
    assert re.search(rf"1 pending.*{fine}.*1 failing.*{task}.*500.*XXL.*0 failed", listed, re.DOTALL)
    # Logged once, with GraFx's words, the project, and until when it is retried.
    (said,) = re.findall(rf"WARNING {task} rejected by GraFx: (.*)", daemon.log())
    assert re.fullmatch(
        r"Invalid list.*'XXL'.* \(project p-1\); retrying until \d\d:\d\d:\d\d, then it fails", said
    )
    grafx._tasks[task].kind = "never"
    eventually(lambda: "failing" not in home.read())
    assert daemon.stop() == 0
    assert home.failed() == {}


def test_since_counts_on_after_a_restart_but_three_more_rejections_are_needed(home: Home) -> None:
    task = home.grafx.add("failed")
    home.wait_for(task)
    first = home.start(before=QUICK)
    since = eventually(lambda: failing(home).get(task))["since"]
    first.stop()
    assert failing(home)[task]["since"] == since
    time.sleep(3)  # which is over GIVE_UP_AFTER, however `since` was rounded
    before = len(polls(home, task))
    second = home.start(before=QUICK, GIVE_UP_AFTER="2")
    eventually(lambda: task in home.failed())
    assert len(polls(home, task)) == before + 3
    assert "failing" not in home.read()
    assert second.stop() == 0


@pytest.mark.parametrize("since", ["2099-01-01T00:00:00Z", "yesterday", None, 7])
@pytest.mark.parametrize("once", [False, True], ids=["daemon", "once"])
def test_a_since_that_lies_ahead_or_is_no_time_counts_from_now(home: Home, since: Any, once: bool) -> None:
    """As after a clock was set back: it neither fails at once nor is retried for ever."""
    task = home.grafx.add("failed")
    record = {"status": 500, "error": "no", "since": since, "times": 9}
    home.write({"orders": {task: {}}, "failing": {task: record}, "failed": {}})
    began = time.monotonic()
    if once:
        assert home.run("--once", GIVE_UP_AFTER="60").process.returncode == 0
        assert utc(-60) < failing(home)[task]["since"] < utc(60)
        time.sleep(1.5)
        assert home.run("--once", GIVE_UP_AFTER="1").process.returncode == 1
    else:
        home.start(before=QUICK, GIVE_UP_AFTER="1")
    eventually(lambda: task in home.failed())
    assert time.monotonic() - began >= 1


def test_once_polls_once_and_follows_the_rule_from_run_to_run(home: Home) -> None:
    failed, passing = home.grafx.add("failed"), home.grafx.add()
    home.grafx.fault("task", "status-404", task_id=passing, times=2)
    home.wait_for(failed, passing, added="2020-01-01T00:00:00Z")
    logs = []
    for run in (1, 2, 3, 4):
        ended = home.run("--once", GIVE_UP_AFTER="3600")
        logs.append(ended.log())
        assert ended.process.returncode == 0
        assert failing(home)[failed]["times"] == run
        assert len(polls(home, failed)) == run
    assert home.files() == [f"{passing}.png"]
    assert list(home.waiting()) == [failed]
    assert [log.count(f"{failed} rejected by GraFx") for log in logs] == [1, 0, 0, 0]
    assert "polled 2 orders: 1 delivered, 1 rejected" in logs[2]
    assert home.run("--once", GIVE_UP_AFTER="0").process.returncode == 1
    assert list(home.failed()) == [failed]
    assert len(polls(home, failed)) == 5


def test_once_during_an_outage_fails_no_order_whatever_its_age(home: Home) -> None:
    tasks = [home.grafx.add() for _ in range(100)]
    home.wait_for(*tasks, added="2020-01-01T00:00:00Z")
    for fault in ({}, {"body": PAGE, "content_type": "text/html"}):
        home.grafx.clear_faults()
        home.grafx.fault("task", "status-404", times=None, **fault)
        for _ in range(2):
            assert home.run("--once").process.returncode == 0
    assert home.failed() == {}
    assert len(failing(home)) == 100
    home.grafx.clear_faults()
    assert home.run("--once").process.returncode == 0
    assert (home.waiting(), home.failed(), len(home.files())) == ({}, {}, 100)
    assert "failing" not in home.read()


def test_an_answer_that_does_not_concern_the_order_starts_the_count_anew(home: Home) -> None:
    """Rejected for long, but never without a break."""
    task = home.grafx.add()
    for _ in range(12):
        home.grafx.fault("task", "status-500", task_id=task, times=2)
        home.grafx.fault("task", "close", task_id=task)
    home.wait_for(task)
    home.start(before=QUICK, GIVE_UP_AFTER="1", POLL_INTERVAL="0.1")
    eventually(lambda: not home.waiting())
    assert home.files() == [f"{task}.png"]
    assert len(polls(home, task)) == 37


def test_a_record_under_failing_goes_with_its_order(home: Home) -> None:
    removed, stays = home.grafx.add("failed"), home.grafx.add("failed")
    home.wait_for(removed, stays)
    home.start(before=QUICK)
    eventually(lambda: len(failing(home)) == 2)
    data = home.read()
    del data["orders"][removed]
    home.write(data)
    eventually(lambda: list(failing(home)) == [stays])


# --- --check ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        ("status-403", {}, "403 Forbidden"),
        (
            "status-404",
            {"body": PAGE, "content_type": "text/html"},
            "404 Not Found without a word of GraFx's",
        ),
        ("html", {}, "200 OK without a word"),
        ("redirect-away", {}, "redirects to"),
        ("status-500", {}, "500"),
        ("close", {}, "gave no answer"),
    ],
)
def test_check_polls_a_task_that_cannot_exist(home: Home, fault: str, options: Any, said: str) -> None:
    home.grafx.fault("task", fault, times=None, **options)
    ended = home.run("--check")
    assert ended.process.returncode == 1
    (line,) = [line for line in ended.log().splitlines() if "GraFx:" in line]
    assert line.startswith("WRONG GraFx: ")
    assert said in line
    assert "ok    token:" in ended.log()


def test_the_examples_own_address_is_named_as_such(home: Home) -> None:
    ended = home.run("--check", BASEURL="https://ENVIRONMENT.chili-publish.online")
    assert ended.process.returncode == 78
    assert "BASEURL is still the example's" in ended.log()
