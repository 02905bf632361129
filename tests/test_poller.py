"""The daemon: what it polls and when, what it writes, how it stops, and what a person sees."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

import psutil
import pytest
from conftest import QUICK, WATCH, Home, Running, eventually
from sandbox import MIB, TYPES, Request, Sandbox

import db

MEMORY = 60 * MIB
# For `before`: after the first look at the file there is no other, and no write while orders are polled.
LOOK_ONCE = "db.LOOK = 1e9"
# For `before`: no answer is late, so whatever ends has not waited for one.
PATIENT = "chili.TIMEOUT = (600, 600)"
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"


def sent(grafx: Sandbox, task_id: str | None = None, what: str = "task") -> list[Request]:
    return [r for r in list(grafx.requests) if r.what == what and task_id in (None, r.task_id)]


def gaps(grafx: Sandbox, task_id: str) -> list[float]:
    times = [request.time for request in sent(grafx, task_id)]
    return [after - before for before, after in pairwise(times)]


def ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()


# --- from database.json to ./orders ----------------------------------------------------------


def test_each_order_ends_as_a_file_or_under_failed_or_stays_pending(home: Home) -> None:
    grafx = home.grafx
    good = {grafx.add(kind, questions=1): kind for kind in TYPES}
    failed, expired, unknown = grafx.add("failed"), grafx.add("expired"), "no-such-task"
    pending = grafx.add("never")
    fields = {"projectID": "p-1", "added": "2026-01-02T03:04:05Z", "age": 3}
    home.wait_for(*good, failed, expired, unknown, pending, **fields)
    daemon = home.start("-v", before=QUICK, GIVE_UP_AFTER="0")
    eventually(lambda: list(home.waiting()) == [pending])
    assert daemon.stop() == 0

    assert home.files() == sorted(f"{task}.{kind}" for task, kind in good.items())
    assert all(
        (home.orders / f"{task}.{kind}").read_bytes() == grafx.body(task) for task, kind in good.items()
    )
    assert home.waiting() == {pending: fields}  # 204 never takes it out, and its fields stay
    records = home.failed()
    assert {task: (record["status"], len(sent(grafx, task))) for task, record in records.items()} == {
        failed: (500, 3),
        unknown: (404, 3),
        expired: (410, 1),
    }
    for record in records.values():
        assert record.items() >= fields.items()
        assert re.fullmatch(UTC, record["failed"])
        assert "\n" not in record["error"]
    assert "Invalid list variable value: Variable 'Size' has no item 'XXL'." in records[failed]["error"]
    assert "no longer available: GraFx keeps a file for 4 hours" in records[expired]["error"]

    # One line for each thing that happened, with the task id; -v shows requests, but no secret.
    log = daemon.log()
    assert ": 10 pending, 0 failing, 0 failed, 0 delivered" in log
    for task in (*good, failed, expired, unknown, pending):
        assert re.search(rf"DEBUG +{task} polled \(project p-1\)", log)
    for task, kind in good.items():
        said = (
            rf"{task} delivered to orders/{task}\.{kind} "
            r"\([\d.]+ (bytes|kB|MB), [\d.]+ h after it was added\)"
        )
        assert len(re.findall(said, log)) == 1
    for task in records:
        error = re.escape(records[task]["error"])
        assert len(re.findall(rf"ERROR +{task} failed \(project p-1\): {error}\n", log)) == 1
    assert re.search(rf"GET \S+/tasks/{pending}: 204", log)
    assert log.endswith("stopped, 1 pending\n")
    for secret in (*grafx.tokens, grafx.client_secret, "Bearer", "Authorization"):
        assert secret[:40] not in log
        assert secret[:40] not in home.database.read_text()


def test_without_v_no_request_is_logged_and_no_secret_ever(home: Home) -> None:
    grafx = home.grafx
    task = grafx.add()
    grafx.fault("token", "echo-token")
    grafx.fault("task", "echo-token", task_id=task, times=3)
    home.wait_for(task)
    daemon = home.start(before=QUICK, GIVE_UP_AFTER="0")
    record = eventually(lambda: home.failed().get(task))
    daemon.stop()
    assert "Could not process the request" in record["error"]
    for secret in (*grafx.tokens, grafx.client_secret):
        assert secret[:40] not in daemon.log() + home.database.read_text()
    assert " GET " not in daemon.log()


def test_an_order_fails_after_three_rejections_in_a_row(home: Home) -> None:
    """Another answer in between starts the count anew."""
    grafx = home.grafx
    rows = {
        "twice": ["500", "404"],
        "rendering": ["500", "500", "204", "403", "500"],
        "unclear": ["404", "404", "503", "404", "404"],
        "final": ["500", "204", "404", "503", "404", "403", "500"],
    }
    for task, answers in rows.items():
        grafx.add(task_id=task)
        for answer in answers:
            grafx.fault("task", f"status-{answer}", task_id=task)
    home.wait_for(*rows)
    daemon = home.start(before=QUICK, GIVE_UP_AFTER="0")
    eventually(lambda: not home.waiting())
    daemon.stop()
    assert home.files() == ["rendering.png", "twice.png", "unclear.png"]
    assert [(task, record["status"]) for task, record in home.failed().items()] == [("final", 500)]
    assert {task: len(sent(grafx, task)) for task in rows} == {
        "twice": 3, "rendering": 6, "unclear": 6, "final": 7,
    }  # fmt: skip


# --- when it polls ---------------------------------------------------------------------------


def test_an_order_is_polled_again_after_a_quarter_of_its_age(home: Home) -> None:
    """`min(POLL_INTERVAL, max(shortest, age / 4))`, and at once for the first time."""
    ages = {"new": 0.0, "typed": 0.0, "older": 2.4, "old": 3600.0}
    for task in ages:
        home.grafx.add("never", task_id=task)
    orders: dict[str, Any] = {task: {"added": ago(age)} for task, age in ages.items()}
    orders["typed"] = {"added": "yesterday"}  # so it counts from when it was first seen
    began = time.monotonic()
    home.write({"orders": orders})
    daemon = home.start(before="poller.SHORTEST_PAUSE = 0.3", POLL_INTERVAL="2")
    eventually(lambda: len(sent(home.grafx, "old")) > 2)
    daemon.stop()
    requests = sent(home.grafx)
    assert {request.task_id for request in requests[:4]} == set(ages)
    for task in ages.keys() - {"typed"}:
        for request, gap in zip(sent(home.grafx, task), gaps(home.grafx, task), strict=False):
            quarter = (ages[task] + request.time - began) / 4  # so the pauses grow with the age
            assert gap > min(2, max(0.3, quarter)) - 0.02, task
    assert min(gaps(home.grafx, "typed")) > 0.28
    # An order that is due earlier is polled earlier, however busy the machine is.
    again = [request.task_id for request in requests[4:]]
    assert again.index("older") < again.index("old")
    assert max(again.index("new"), again.index("typed")) < again.index("older")
    assert len(sent(home.grafx, "new")) > len(sent(home.grafx, "old"))


def test_an_order_that_cannot_be_polled_is_retried_with_growing_pauses(home: Home) -> None:
    grafx = home.grafx
    task, other = grafx.add(), grafx.add("never")
    grafx.fault("task", "status-502", task_id=task, times=6)
    home.wait_for(task, other)
    daemon = home.start(before="poller.SHORTEST_PAUSE = 0.05", POLL_INTERVAL="0.4")
    daemon.says(f"{task} delivered")
    daemon.stop()
    pauses = gaps(grafx, task)
    assert len(pauses) == 6
    for number, pause in enumerate(pauses):
        assert pause > min(0.4, 0.05 * 2**number) - 0.02
    assert home.failed() == {}
    said = re.findall(rf"WARNING {task} cannot be polled: GraFx answered 502.*; retrying in ", daemon.log())
    assert len(said) == daemon.log().count("cannot be polled") == 1  # once a minute
    assert len(sent(grafx, other)) > 2  # no other order is held up


def test_an_outage_is_retried_with_growing_pauses_not_once_for_each_order(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(20)]
    grafx.fault("token", "status-502", times=5)
    home.wait_for(*tasks)
    daemon = home.start(before="poller.SHORTEST_PAUSE = 0.1", CONCURRENCY="1", POLL_INTERVAL="0.8")
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0
    assert [request.what for request in grafx.requests[:7]] == ["token"] * 6 + ["task"]
    times = [request.time for request in sent(grafx, what="token")]
    pauses = [after - before for before, after in pairwise(times)]
    assert len(pauses) == 5
    assert all(pause > min(0.8, 0.1 * 2**number) - 0.02 for number, pause in enumerate(pauses))
    assert re.search(r"WARNING paused: .*502 Bad Gateway.*; retrying in 0\.1 s", daemon.log())
    assert daemon.log().count("paused") == daemon.log().count("resumed after ") == 1


def test_a_new_token_that_is_rejected_as_well_is_not_fetched_again_for_each_order(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(20)]
    grafx.fault("task", "status-401", times=None)
    home.wait_for(*tasks)
    daemon = home.start(before=f"{QUICK}; chili.TOKEN_PAUSE = 3600")  # for a minute
    eventually(lambda: all(len(sent(grafx, task)) > 3 for task in tasks))
    assert len(sent(grafx, what="token")) == 2
    assert len(home.waiting()) == 20
    grafx.clear_faults()
    eventually(lambda: not home.waiting())
    assert home.failed() == {}
    assert len(home.files()) == 20
    assert daemon.stop() == 0
    assert daemon.log().count("cannot be polled: GraFx answered 401") == 1  # for all of them


def test_retry_after_is_obeyed_for_all_requests(home: Home) -> None:
    grafx = home.grafx
    for what in ("token", "task", "download"):
        grafx.fault(what, "status-429", retry_after=1)
    home.wait_for(*(grafx.add() for _ in range(3)))
    daemon = home.start(before=QUICK, CONCURRENCY="1")
    eventually(lambda: not home.waiting())
    daemon.stop()
    limited = [number for number, request in enumerate(grafx.requests) if request.status == 429]
    assert [grafx.requests[number].what for number in limited] == ["token", "task", "download"]
    times = [request.time for request in grafx.requests]
    assert all(times[number + 1] - times[number] > 0.95 for number in limited)
    assert daemon.log().count("rate limited: Retry-After 1 s") == 1  # once a minute


# --- side by side ----------------------------------------------------------------------------


def test_no_more_than_concurrency_at_once_and_a_stop_waits_for_none(home: Home) -> None:
    home.grafx.fault("task", "hang", times=None)
    home.wait_for(*(home.grafx.add() for _ in range(10)))
    daemon = home.start(before=PATIENT, CONCURRENCY="3")
    eventually(lambda: len(sent(home.grafx)) == 3)
    time.sleep(0.5)
    assert len(sent(home.grafx)) == 3
    assert daemon.stop() == 0
    assert len(home.waiting()) == 10
    assert daemon.log().endswith("stopped, 10 pending\n")


def test_connections_are_kept_alive(home: Home) -> None:
    home.wait_for(*(home.grafx.add(questions=2) for _ in range(70)))
    daemon = home.start(before=QUICK, CONCURRENCY="3")
    eventually(lambda: not home.waiting())
    daemon.stop()
    assert len(sent(home.grafx)) == 210
    assert len(sent(home.grafx, what="token")) == 1
    assert len({request.peer for request in sent(home.grafx)}) <= 3


def test_a_long_download_holds_up_nobody(home: Home) -> None:
    grafx = home.grafx
    slow = grafx.add(size=3_000_000)
    grafx.fault("download", "slow", task_id=slow)  # which takes minutes
    others = [grafx.add(questions=1) for _ in range(20)]
    home.wait_for(slow, *others)
    daemon = home.start(before=QUICK, CONCURRENCY="2")
    eventually(lambda: list(home.waiting()) == [slow])
    assert daemon.stop() == 0
    assert len(sent(grafx, slow, "download")) == 1
    delivered = re.findall(r"(\S+) delivered to ", daemon.log())
    assert sorted(delivered) == sorted(others)
    assert "\x1b" not in daemon.log()  # it is no terminal


def test_answers_that_trickle_are_given_up_and_hold_up_nobody(home: Home) -> None:
    """A head that trickles for ever holds its thread, and nothing else."""
    grafx = home.grafx
    head, answer, body = grafx.add(), grafx.add(), grafx.add(size=200_000)
    others = [grafx.add(questions=1) for _ in range(5)]
    grafx.fault("token", "trickle-body", pace=0.1)
    grafx.fault("task", "trickle", task_id=head, pace=0.1)
    grafx.fault("task", "trickle-body", task_id=answer, pace=0.1)
    grafx.fault("download", "trickle-body", task_id=body, pace=0.1)
    home.wait_for(head, answer, body, *others)
    daemon = home.start(before=f"{QUICK}; chili.SLOW_START = 1", CONCURRENCY="4")
    eventually(lambda: list(home.waiting()) == [head])
    assert daemon.stop() == 0
    assert sorted(home.files()) == sorted(f"{task}.png" for task in (answer, body, *others))
    assert (home.orders / f"{body}.png").read_bytes() == grafx.body(body)
    assert [len(sent(grafx, what="token")), len(sent(grafx, answer)), len(sent(grafx, body))] == [2, 2, 2]
    assert re.search("paused: no token: .* too slow", daemon.log())
    assert home.failed() == {}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fault", ["slow", "trickle", "hang"])
def test_a_stop_drops_downloads_and_writes_results(home: Home, how: int, fault: str) -> None:
    grafx = home.grafx
    long, done, failed = grafx.add(size=3_000_000), grafx.add(), grafx.add("expired")
    grafx.fault("download", fault, task_id=long)
    home.wait_for(long, done, failed)
    daemon = home.start(before=f"{LOOK_ONCE}; {PATIENT}")  # so only the stop writes
    daemon.says(f"{done} delivered")
    daemon.says(f"{failed} failed")
    eventually(lambda: sent(grafx, long, "download"))
    if fault == "slow":
        eventually(lambda: f".{long}.part" in home.files())
    assert list(home.waiting()) == [long, done, failed]
    assert daemon.stop(how) == 0
    assert list(home.waiting()) == [long]
    assert list(home.failed()) == [failed]
    # What had come of a download is left, and goes at the next start.
    assert home.files() == [f".{long}.part"] * (fault == "slow") + [f"{done}.png"]
    count = len(grafx.requests)
    time.sleep(0.1)
    assert len(grafx.requests) == count
    assert "Traceback" not in daemon.log()
    assert home.run("--once").process.returncode == 0
    assert home.files() == sorted([f"{long}.png", f"{done}.png"])


def test_a_second_poller_ends_and_names_the_pid_of_the_first(home: Home) -> None:
    home.wait_for(home.grafx.add("never"))
    first = home.start()
    first.says("GraFx order poller")
    link = home.folder / "link.json"
    link.symlink_to(home.database)
    for arguments, env in (((), {}), (("--once",), {}), ((), {"DATABASE": str(link)})):
        second = home.run(*arguments, **env)
        assert second.process.returncode not in (0, 78)
        assert re.search(rf"\b{first.process.pid}\b", second.log())
    first.process.kill()
    first.process.wait()
    assert home.run("--once").process.returncode == 0  # a killed one leaves no lock


def test_a_killed_poller_loses_nothing_and_leaves_nothing(home: Home) -> None:
    grafx = home.grafx
    long, here = grafx.add(size=3_000_000), grafx.add()
    grafx.fault("download", "slow", task_id=long, rate=400_000)
    home.wait_for(long)
    first = home.start()
    left = eventually(lambda: [name for name in home.files() if (home.orders / name).stat().st_size > 0])
    first.process.kill()
    first.process.wait()
    assert home.files() == left
    assert left[0].startswith(".")
    (home.orders / f"{here}.png").write_bytes(b"whole")  # killed before it was noted
    (home.orders / ".gone.part").touch()  # of an order that is not pending any more
    home.wait_for(long, here)
    second = home.start(before=QUICK)
    eventually(lambda: not home.waiting())
    assert ".gone.part" not in home.files()
    second.stop()
    assert home.files() == sorted([f"{long}.png", f"{here}.png"])
    assert (home.orders / f"{long}.png").read_bytes() == grafx.body(long)
    assert (home.orders / f"{here}.png").read_bytes() == b"whole"
    assert not [request for request in grafx.requests if request.task_id == here]


def test_an_unexpected_exception_does_not_end_it(home: Home) -> None:
    odd, other = home.grafx.add(), home.grafx.add()
    home.wait_for(odd, other)
    code = (
        "done, bad = chili.order_done, [1]; "
        f"chili.order_done = lambda id, *more: bad.pop() / 0 if id == {odd!r} and bad else done(id, *more)"
    )
    daemon = home.start(before=f"{QUICK}; {code}")
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0
    assert set(home.files()) == {f"{odd}.png", f"{other}.png"}
    assert daemon.log().count("Traceback") == 1
    assert "ZeroDivisionError" in daemon.log()
    assert re.search(rf"ERROR +{odd} unexpected error", daemon.log())


def test_a_file_above_the_size_limit_is_retried_until_the_limit_is_raised(home: Home) -> None:
    task = home.grafx.add(size=500_000)
    home.wait_for(task)
    full = (
        "import resource, signal; signal.signal(signal.SIGUSR1, "
        "lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))"
    )
    daemon = home.start(before=f"{QUICK}; {full}")
    eventually(lambda: len(sent(home.grafx, task)) > 5)
    assert home.failed() == {}
    assert home.files() in ([], [f".{task}.part"])
    said = rf"WARNING {task} cannot be polled: cannot write to .*ulimit -f"
    assert len(re.findall(said, daemon.log())) == daemon.log().count("write") == 1  # once a minute
    daemon.process.send_signal(signal.SIGUSR1)
    eventually(lambda: not home.waiting())
    assert (home.orders / f"{task}.png").read_bytes() == home.grafx.body(task)
    assert daemon.stop() == 0


def test_an_outage_of_the_folder_ends_with_a_delivery_and_not_before(home: Home) -> None:
    """What GraFx answers meanwhile about others says nothing of the disk."""
    rendering, done = home.grafx.add("never"), home.grafx.add()
    home.wait_for(rendering)
    daemon = home.start(before=QUICK)
    eventually(lambda: sent(home.grafx, rendering))
    home.orders.rmdir()
    home.db("add", done)
    daemon.says(r"paused: cannot write to .*\. Make the folder\.")
    count = len(sent(home.grafx, rendering))
    eventually(lambda: len(sent(home.grafx, rendering)) > count + 3)
    assert "resumed" not in daemon.log()
    home.orders.mkdir()
    daemon.says(f"{done} delivered")
    daemon.says("resumed after ")
    assert daemon.stop() == 0
    assert daemon.log().count("paused") == 1


# --- database.json while it runs -------------------------------------------------------------


def test_the_file_is_read_where_it_changed_and_not_written_for_each_result(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(40)]
    pending = grafx.add("never")
    home.wait_for(*tasks, pending)
    began = time.monotonic()
    before = f"poller.SHORTEST_PAUSE = 3600; {WATCH}"
    daemon = home.start(before=before, CONCURRENCY="4", POLL_INTERVAL="3600")

    def count(what: str) -> int:
        return len(re.findall(rf"<{what} [^>]*{re.escape(home.database.name)}>", daemon.log()))

    eventually(lambda: list(home.waiting()) == [pending])
    # While others are polled it may write at each look, and once where nothing else is to be done.
    assert 0 < count("to") <= 2 + (time.monotonic() - began) / db.LOOK
    log = daemon.log()
    for task in tasks:  # the file has its name before the order leaves
        assert f"/{task}.png>" in log[: log.rindex(f"{home.database.name}>")]
    time.sleep(0.3)
    reads, requests = count("read"), len(grafx.requests)
    time.sleep(2.5 * db.LOOK)
    assert (count("read"), len(grafx.requests)) == (reads, requests)  # an idle one looks at `stat` alone
    home.database.write_text(home.database.read_text())
    eventually(lambda: count("read") > reads)
    assert daemon.stop() == 0


def test_the_results_of_one_run_are_one_write(home: Home) -> None:
    tasks = [home.grafx.add() for _ in range(40)]
    home.wait_for(*tasks)
    ended = home.run("--once", before=f"{LOOK_ONCE}; {WATCH}", CONCURRENCY="8")
    assert home.waiting() == {}
    assert len(re.findall(rf"<to [^>]*{re.escape(home.database.name)}>", ended.log())) == 1


def test_orders_come_and_go_in_the_file(home: Home) -> None:
    grafx = home.grafx
    gone, stays = grafx.add("never"), grafx.add("never")
    home.wait_for(gone, stays, note="kept")
    assert db.LOOK <= 1  # shortened here
    daemon = home.start(before=QUICK)
    eventually(lambda: len(sent(grafx, gone)) > 2)

    new = grafx.add()
    db.remove_order(gone, home.database)
    assert home.db("add", new).returncode == 0
    daemon.says(f"INFO +{gone} removed from the file by somebody\n")
    daemon.says(rf"INFO +{new} added\b")
    eventually(lambda: list(home.waiting()) == [stays])
    count = len(sent(grafx, gone))
    before = len(sent(grafx, stays))
    eventually(lambda: len(sent(grafx, stays)) > before + 4)
    assert len(sent(grafx, gone)) <= count + 1
    assert home.waiting()[stays] == {"note": "kept"}
    assert home.files() == [f"{new}.png"]

    many = [grafx.add() for _ in range(6)]
    home.wait_for(stays, *many)
    daemon.says("INFO +6 orders added\n")
    eventually(lambda: len(home.files()) == 7)
    assert daemon.stop() == 0
    assert not re.search(f"{many[0]} added", daemon.log())


def test_a_database_that_was_taken_away_is_waited_for(home: Home) -> None:
    """It is never taken for an empty store, nor made anew."""
    grafx = home.grafx
    done, pending = grafx.add(questions=8), grafx.add("never")
    home.wait_for(done, pending)
    daemon = home.start(before=f"{QUICK}; db.SAVING = 0.2")
    eventually(lambda: sent(grafx, pending))
    away = home.database.rename(home.folder / "away.json")
    daemon.says(rf"ERROR +{home.database} is missing\. Put it back")
    daemon.says(f"{done} delivered")  # work goes on
    count = len(sent(grafx, pending))
    eventually(lambda: len(sent(grafx, pending)) > count + 3)
    assert not home.database.exists()
    away.rename(home.database)
    daemon.says(f"recovered: {home.database} is missing")
    eventually(lambda: list(home.waiting()) == [pending])
    assert daemon.stop() == 0
    assert daemon.log().count("ERROR") == 1


def test_a_file_that_is_broken_while_it_runs_is_left_until_it_is_mended(home: Home) -> None:
    grafx = home.grafx
    first, pending = grafx.add(questions=8), grafx.add("never")
    home.wait_for(first, pending)
    daemon = home.start(before=f"{QUICK}; db.SAVING = 0.2")
    eventually(lambda: sent(grafx, pending))
    broken = '{"orders": {\n    "' + first + '": {}\n    "typed": {}}}'
    home.write(broken)
    daemon.says(r"ERROR.*line 3, column 5")
    daemon.says(f"{first} delivered")  # work goes on
    count = len(sent(grafx, pending))
    eventually(lambda: len(sent(grafx, pending)) > count + 3)
    assert home.database.read_text() == broken
    new = grafx.add()
    home.write(json.dumps({"orders": {first: {}, pending: {}, new: {}}, "mine": 1.5}))
    daemon.says("recovered: .*line 3, column 5")
    eventually(lambda: list(home.waiting()) == [pending])
    assert home.read()["mine"] == 1.5
    assert home.files() == sorted([f"{first}.png", f"{new}.png"])
    assert daemon.stop() == 0
    assert daemon.log().count("ERROR") == 1


@pytest.mark.parametrize("content", ['{"orders": {\n  "a" 1}}', "[]", '{"orders": 5}', "", " \n"])
def test_a_broken_file_at_the_start_is_an_error(home: Home, content: str) -> None:
    home.write(content)
    os.utime(home.database, (1, 1))
    ended = home.run()
    assert ended.process.returncode not in (0, 78)
    assert str(home.database) in ended.log()
    assert "\n  " not in content or "line 2, column 7" in ended.log()
    assert "Traceback" not in ended.log()
    assert home.database.read_text() == content
    assert home.grafx.requests == []


def test_entries_that_are_no_task_id_are_warned_about_once_and_left(home: Home) -> None:
    strange = ["../../etc/passwd", "a b", "a/b"]
    task = home.grafx.add(questions=3)
    home.write({"orders": [*strange, task, 5, {"x": 1}]})
    daemon = home.start(before=QUICK)
    eventually(lambda: home.waiting() == [*strange, 5, {"x": 1}])
    home.write({"orders": [*strange, 5, {"x": 1}], "mine": True})
    time.sleep(0.5)
    daemon.stop()
    for entry in strange:
        assert daemon.log().count(f'"{entry}"') == 1
    assert daemon.log().count("no task id") == len(strange) + 2
    assert {request.task_id for request in home.grafx.requests} == {None, task}
    assert home.files() == [f"{task}.png"]


def test_it_starts_without_database_and_folder(home: Home) -> None:
    task = home.grafx.add()
    home.orders.rmdir()
    daemon = home.start(before=QUICK)
    eventually(lambda: sent(home.grafx, what="token"))
    db.add_order(task, path=home.database)
    eventually(lambda: home.waiting() == {})
    assert home.files() == [f"{task}.png"]
    assert daemon.stop() == 0


# --- how much it takes -----------------------------------------------------------------------


@contextmanager
def peak_memory(running: Running) -> Iterator[list[int]]:
    """The largest resident size that the poller had meanwhile."""
    peak, process, over = [0], psutil.Process(running.process.pid), threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def test_a_thousand_pending_orders(home: Home) -> None:
    tasks = [home.grafx.add("never") for _ in range(1000)]
    home.wait_for(*tasks, projectID="p")
    daemon = home.start(POLL_INTERVAL="3600", before="poller.SHORTEST_PAUSE = 3600")
    with peak_memory(daemon) as peak:
        eventually(lambda: len(sent(home.grafx)) == 1000, patience=60)
    assert 10 * MIB < peak[0] < MEMORY
    assert daemon.stop() == 0
    assert list(home.waiting()) == tasks
    assert len({request.peer for request in sent(home.grafx)}) <= 8


def test_a_large_file_takes_no_memory(home: Home) -> None:
    task = home.grafx.add(size=256 * MIB)
    home.wait_for(task)
    daemon = home.start()
    with peak_memory(daemon) as peak:
        daemon.says(f"{task} delivered", patience=90)
    assert daemon.stop() == 0
    file = home.orders / f"{task}.png"
    size = file.stat().st_size
    file.unlink()
    assert abs(size - 256 * MIB) < MIB
    assert 10 * MIB < peak[0] < MEMORY


def test_no_other_answer_is_read_past_1_mib(home: Home) -> None:
    task = home.grafx.add()
    for what in ("token", "task"):
        home.grafx.fault(what, "huge", size=10**13)
    home.wait_for(task)
    daemon = home.start(before=QUICK)
    with peak_memory(daemon) as peak:
        eventually(lambda: not home.waiting())
    assert daemon.stop() == 0
    assert peak[0] < MEMORY
    assert home.files() == [f"{task}.png"]


def test_once_ends_with_1_where_a_result_could_not_be_written(home: Home) -> None:
    home.wait_for(home.grafx.add())
    ended = home.run(
        "--once", before="db._replace = lambda *_: (_ for _ in ()).throw(db.DatabaseError('no'))"
    )
    assert ended.process.returncode == 1, ended.log()
    assert len(home.waiting()) == 1


def test_an_outage_that_only_a_removed_order_met_ends_with_the_next_answer(home: Home) -> None:
    home.wait_for("removed")
    go = home.folder / "go"
    away = "(_ for _ in ()).throw(chili.TryAgainLater('GraFx is away', shared=True))"
    late = f"[time.sleep(0.02) for _ in iter(lambda: os.path.exists({str(go)!r}), True)] and 0 or {away}"
    poll = f"lambda id, *more: ({late}) if id == 'removed' else done(id, *more)"
    code = f"done = chili.order_done; chili.order_done = {poll}"
    daemon = home.start("-v", before=f"{QUICK}; import os, time; {code}")
    daemon.says("removed polled")
    home.wait_for()
    daemon.says("removed removed from the file by somebody")
    go.touch()
    daemon.says("paused: GraFx is away")
    task_id = home.grafx.add()
    home.wait_for(task_id)
    daemon.says(f"{task_id} delivered")
    daemon.says("resumed after ")
    eventually(lambda: home.waiting() == {} and "the poller says" not in home.db("list").stdout)
    assert daemon.stop() == 0
    assert daemon.log().count("removed polled") == 1


def test_an_answer_from_before_the_end_of_an_outage_does_not_begin_it_anew(home: Home) -> None:
    home.wait_for("late", "early")
    go = home.folder / "go"
    away = "(_ for _ in ()).throw(chili.TryAgainLater('GraFx is away', shared=True))"
    late = f"[time.sleep(0.02) for _ in iter(lambda: os.path.exists({str(go)!r}), True)] and 0 or {away}"
    poll = f"lambda id, *more: ({late}) if id == 'late' else ({away}) if not tries.pop() else None"
    before = (
        f"{QUICK}; poller.MINUTE = 0; import os, time; tries = [1] * 9999 + [0]; chili.order_done = {poll}"
    )
    daemon = home.start(before=before, CONCURRENCY="2")
    daemon.says("paused: GraFx is away")
    daemon.says("resumed after ")
    go.touch()
    daemon.says("late cannot be polled: GraFx is away")  # it alone
    daemon.stop()
    assert daemon.log().count("paused") == 1


def test_after_a_signal_at_the_start_nothing_is_polled(home: Home) -> None:
    home.wait_for(home.grafx.add())
    add = "lambda self, *more: (add(self, *more), self.on_signal())"
    ended = home.run(before=f"add = poller.Poller.add; poller.Poller.add = {add}")
    assert ended.process.returncode == 0
    assert "stopped, 1 pending" in ended.log()
    assert home.grafx.requests == []
