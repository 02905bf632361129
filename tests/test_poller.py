"""The daemon: what it polls and when, what it writes, and how it stops."""

from __future__ import annotations

import os
import re
import signal
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import QUICK, Home, Running, eventually, find_program
from sandbox import MIB, TYPES, Request

import db

# For `before`: no answer is late, so whatever ends has not waited for one.
PATIENT = "chili.TIMEOUT = (600, 600)"


def pauses(requests: list[Request]) -> list[float]:
    return [after.time - before.time for before, after in pairwise(requests)]


def ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()


# --- from database.json to ./orders ----------------------------------------------------------


def test_each_order_ends_as_a_file_or_under_failed_or_stays_pending(home: Home) -> None:
    grafx = home.grafx
    good = {grafx.add(kind, questions=1): kind for kind in TYPES}
    failed, expired, unknown = grafx.add("failed"), grafx.add("expired"), "no-such-task"
    pending = grafx.add("never")
    fields = {"projectID": "p-1", "added": ago(2 * 86400), "age": 3}
    home.wait_for(*good, failed, expired, unknown, pending, **fields)
    daemon = home.start("-v", before=QUICK, GIVE_UP_AFTER="0")
    eventually(lambda: list(home.waiting()) == [unknown, pending])
    assert daemon.stop() == 0

    assert home.files() == sorted(f"{task}.{kind}" for task, kind in good.items())
    for task, kind in good.items():
        assert (home.orders / f"{task}.{kind}").read_bytes() == grafx.body(task)
    # Neither a 204 nor a few 404s take it out, and its fields stay.
    assert home.waiting() == {unknown: fields, pending: fields}
    assert home.read()["failing"][unknown]["status"] == 404
    records = home.failed()
    ends = {task: (record["status"], len(grafx.asked("task", task))) for task, record in records.items()}
    assert ends == {failed: (500, 3), expired: (410, 1)}
    for record in records.values():
        assert record.items() >= fields.items()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["failed"])
    assert "Invalid list variable value: Variable 'Size' has no item 'XXL'." in records[failed]["error"]
    assert "no longer available: GraFx keeps a file for 4 hours" in records[expired]["error"]

    log = daemon.log()
    for task, record in records.items():
        assert f"{task} failed (project p-1): {record['error']}\n" in log
    assert f"{pending} polled (project p-1)\n" in log
    assert re.search(rf"GET \S+/tasks/{pending}: 204", log)
    for secret in (*grafx.tokens, grafx.client_secret):
        assert secret not in log
        assert secret not in home.database.read_text()


# --- when it polls ---------------------------------------------------------------------------


def test_an_order_is_polled_again_after_a_quarter_of_its_age(home: Home) -> None:
    """But not before 2 s, here 0.1 s, and after POLL_INTERVAL at the latest."""
    grafx = home.grafx
    # The age of the last two is counted from when they were first seen.
    added = {"old": ago(3600), "new": ago(0), "typed": "yesterday", "ahead": ago(-1e9)}
    _, *young = (grafx.add("never", task_id=task) for task in added)
    home.write({"orders": {task: {"added": when} for task, when in added.items()}})
    daemon = home.start(before=QUICK, POLL_INTERVAL="3600")
    eventually(lambda: all(len(grafx.asked("task", task)) > 4 for task in young))
    daemon.stop()
    assert len(grafx.asked("task", "old")) == 1
    assert "failing" not in home.read()  # none counts as older than 7 days
    for task in young:
        requests = grafx.asked("task", task)
        for request, pause in zip(requests, pauses(requests), strict=False):
            age = request.time - requests[0].time
            assert pause > max(0.1, age / 4) - 0.02, task
    home.start(before=QUICK, POLL_INTERVAL="0.2")
    eventually(lambda: len(grafx.asked("task", "old")) > 3)


def test_retries_come_after_growing_pauses_or_after_what_grafx_asks_for(home: Home) -> None:
    """In an outage they are not for each order; and an order that cannot be polled holds up no other."""
    grafx = home.grafx
    grafx.fault("token", "status-502", times=5)
    odd, *others = (grafx.add() for _ in range(20))
    for fault in ("status-502", "status-400") * 100:
        grafx.fault("task", fault, task_id=odd)
    grafx.fault("task", "status-429", task_id=others[9], retry_after=1)
    home.wait_for(odd, *others)
    daemon = home.start(before=f"{QUICK}; poller.SHORTEST_PAUSE = 0.05", CONCURRENCY="1", POLL_INTERVAL="0.2")
    eventually(lambda: list(home.waiting()) == [odd] and len(grafx.asked("task", odd)) > 5)
    grafx.clear_faults()
    daemon.says(f"{odd} delivered")
    assert [request.what for request in grafx.requests[:7]] == ["token"] * 6 + ["task"]
    for requests in (grafx.asked("token"), grafx.asked("task", odd)):
        for number, pause in enumerate(pauses(requests)):
            assert pause > min(0.2, 0.05 * 2**number) - 0.02
    (limited,) = [number for number, request in enumerate(grafx.requests) if request.status == 429]
    assert pauses(grafx.requests)[limited] > 0.95  # whoever's request is the next
    assert "rate limited: Retry-After 1 s" in daemon.log()


# --- side by side ----------------------------------------------------------------------------


def test_no_more_than_concurrency_at_once_and_a_stop_waits_for_none(home: Home) -> None:
    grafx = home.grafx
    home.wait_for(*(grafx.add(questions=2) for _ in range(30)))
    daemon = home.start(before=f"{QUICK}; {PATIENT}", CONCURRENCY="3")
    eventually(lambda: not home.waiting())
    polls = grafx.asked("task")
    assert (len(polls), len(grafx.asked("token"))) == (90, 1)
    assert len({request.peer for request in polls}) <= 3  # connections are kept alive

    grafx.fault("task", "hang", times=None)
    home.wait_for(*(grafx.add() for _ in range(10)))
    eventually(lambda: len(grafx.asked("task")) == 93)
    db.add_order("one-more", path=home.database)
    daemon.says("one-more added")
    assert len(grafx.asked("task")) == 93
    assert daemon.stop() == 0
    assert len(home.waiting()) == 11
    assert daemon.log().endswith("stopped, 11 pending\n")


def test_what_takes_long_holds_up_nobody_else(home: Home) -> None:
    """A download of minutes and a head without end hold a thread each; a body that trickles is given up."""
    grafx = home.grafx
    long, head, answer, body = grafx.add(size=3_000_000), grafx.add(), grafx.add(), grafx.add()
    others = [grafx.add(questions=1) for _ in range(10)]
    grafx.fault("download", "slow", task_id=long)
    grafx.fault("task", "trickle", task_id=head, pace=0.1)
    for what, task in (("token", None), ("task", answer), ("download", body)):
        grafx.fault(what, "trickle-body", task_id=task, pace=0.1)
    home.wait_for(long, head, answer, body, *others)
    daemon = home.start(before=f"{QUICK}; chili.SLOW_START = 0.5", CONCURRENCY="4")
    eventually(lambda: list(home.waiting()) == [long, head])
    assert daemon.stop() == 0
    files = {name for name in home.files() if not name.startswith(".")}
    assert files == {f"{task}.png" for task in (answer, body, *others)}
    assert (home.orders / f"{body}.png").read_bytes() == grafx.body(body)
    for asked in (grafx.asked("token"), grafx.asked("task", answer), grafx.asked("download", body)):
        assert len(asked) > 1
    assert re.search("paused: no token: .* too slow", daemon.log())
    assert home.failed() == {}


def test_an_unexpected_exception_is_logged_once_and_ends_nothing(home: Home) -> None:
    odd, other = home.grafx.add(), home.grafx.add()
    home.wait_for(odd, other)
    code = (
        "done, bad = chili.order_done, [1, 2, 3]; "
        f"chili.order_done = lambda id, *more: bad.pop() / 0 if id == {odd!r} and bad else done(id, *more)"
    )
    daemon = home.start(before=f"{QUICK}; {code}")
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0
    assert set(home.files()) == {f"{odd}.png", f"{other}.png"}
    assert daemon.log().count(f"{odd} unexpected error, please report it\nTraceback") == 1
    assert daemon.log().count("Traceback") == 1


# --- how it ends -----------------------------------------------------------------------------


def test_a_stop_drops_downloads_and_writes_results(home: Home) -> None:
    grafx = home.grafx
    slow, hangs = grafx.add(size=3_000_000), grafx.add()
    done, failed = grafx.add(), grafx.add("expired")
    grafx.fault("download", "slow", task_id=slow)
    grafx.fault("download", "hang", task_id=hangs)
    home.wait_for(slow, hangs, done, failed)
    daemon = home.start(before=f"db.LOOK = 1e9; {PATIENT}")  # so only the stop writes
    daemon.says(f"{done} delivered")
    daemon.says(f"{failed} failed")
    eventually(lambda: f".{slow}.part" in home.files() and grafx.asked("download", hangs))
    assert list(home.waiting()) == [slow, hangs, done, failed]
    assert daemon.stop(signal.SIGINT) == 0
    assert list(home.waiting()) == [slow, hangs]
    assert list(home.failed()) == [failed]
    assert "Traceback" not in daemon.log()
    # What had come of a download goes at the next start.
    assert home.files() == [f".{slow}.part", f"{done}.png"]
    assert home.run("--once").process.returncode == 0
    assert home.files() == sorted(f"{task}.png" for task in (slow, hangs, done))


def test_a_folder_without_locks_is_a_warning(home: Home) -> None:
    strace = find_program("strace", "strace", "a file system without locks")
    home.wait_for(home.grafx.add())
    place = home.orders / ".poller.pid"
    refuse = [strace, "-f", "-qq", "-o", os.devnull, "-P", str(place), "-e", "inject=flock:error=ENOLCK"]
    ended = Running(home, [*refuse, *home.command("--once")], home.environment())
    home.pollers.append(ended)
    assert ended.process.wait(60) == 0
    reason = "No locks available. Its file system has no locks: use another one."
    assert f"WARNING cannot lock {place}: {reason} Two pollers with this folder would not be" in ended.log()
    assert home.waiting() == {}


def test_a_killed_poller_loses_nothing_and_leaves_nothing(home: Home) -> None:
    grafx = home.grafx
    long, here = grafx.add(size=3_000_000), grafx.add()
    grafx.fault("download", "slow", task_id=long)
    home.wait_for(long)
    first = home.start()
    eventually(lambda: home.files() == [f".{long}.part"])
    first.process.kill()
    first.process.wait()
    (home.orders / f"{here}.png").write_bytes(b"whole")  # killed before it was noted
    (home.orders / ".gone.part").touch()  # of an order that is not pending any more
    (home.orders / ".holiday video.part").touch()  # somebody's own
    home.wait_for(long, here)
    assert home.run("--once").process.returncode == 0
    assert home.waiting() == {}
    assert home.files() == sorted([".holiday video.part", f"{long}.png", f"{here}.png"])
    assert (home.orders / f"{long}.png").read_bytes() == grafx.body(long)
    assert (home.orders / f"{here}.png").read_bytes() == b"whole"
    assert not grafx.asked("task", here)


def test_a_second_poller_of_one_database_or_folder_ends_and_touches_nothing(home: Home) -> None:
    task = home.grafx.add(size=3_000_000)
    home.grafx.fault("download", "slow", task_id=task)
    home.wait_for(task)
    first = home.start()
    eventually(lambda: home.files() == [f".{task}.part"])
    link, other = home.folder / "link.json", home.folder / "other.json"
    link.symlink_to(home.database)
    other.write_text('{"orders": {}}')
    running = rf"a poller for {home.database} is already running \(process {first.process.pid} "
    writes = rf"another poller writes to {home.orders}: give each its own ORDERS_DIR \("
    for database, said in ((home.database, running), (link, running), (other, writes)):
        second = home.run(before=QUICK, DATABASE=str(database))
        assert second.process.returncode == 1
        assert re.search(rf"ERROR +{said}", second.log())
    assert home.files() == [f".{task}.part"]


def test_once_ends_with_1_where_a_result_could_not_be_written(home: Home) -> None:
    home.wait_for(task := home.grafx.add())
    (home.folder / ".database.json.tmp").mkdir()  # where the new file is written
    ended = home.run("--once")
    assert ended.process.returncode == 1
    assert f"{task} delivered" in ended.log()
    assert f"cannot write {home.database}: " in ended.log()
    assert list(home.waiting()) == [task]


# --- database.json while it runs -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (None, " is missing. Put it back"),
        ('{"orders": {\n    "first": {}\n    "typed": {}}}', ": line 3, column 5"),
    ],
    ids=["gone", "broken"],
)
def test_a_database_that_is_gone_or_broken_is_waited_for(home: Home, text: str | None, wrong: str) -> None:
    """It is never taken for an empty store, made anew, or written over; meanwhile work goes on."""
    grafx = home.grafx
    first, new, pending = grafx.add(task_id="first"), grafx.add(), grafx.add("never")
    renders = grafx.fault("task", "status-204", task_id=first, times=None)
    home.wait_for(first, pending)
    daemon = home.start(before=f"{QUICK}; db.SAVING = 0.2", POLL_INTERVAL="0.1")
    eventually(lambda: grafx.asked("task", first))
    home.write(text) if text else home.database.unlink()
    daemon.says(rf"ERROR +{home.database}{wrong}")
    grafx.end_fault(renders)
    daemon.says(f"{first} delivered")
    polls = len(grafx.asked("task", pending))
    eventually(lambda: len(grafx.asked("task", pending)) > polls + 3)
    assert (home.database.read_text() if home.database.exists() else None) == text
    home.write({"orders": {first: {}, pending: {}, new: {}}, "mine": 1.5})
    daemon.says(f"recovered: {home.database}{wrong}")
    eventually(lambda: list(home.waiting()) == [pending])
    assert home.read()["mine"] == 1.5
    assert home.files() == sorted([f"{first}.png", f"{new}.png"])
    assert daemon.log().count("ERROR") == 1


def test_an_order_that_is_removed_from_the_file_is_not_polled_any_more(home: Home) -> None:
    grafx = home.grafx
    gone, stays = grafx.add("never"), grafx.add("never")
    home.wait_for(gone, stays)
    daemon = home.start(before=QUICK)
    eventually(lambda: grafx.asked("task", gone))
    db.remove_order(gone, home.database)
    daemon.says(f"{gone} removed from the file")
    polls = len(grafx.asked("task", gone)), len(grafx.asked("task", stays))
    eventually(lambda: len(grafx.asked("task", stays)) > polls[1] + 3)
    assert len(grafx.asked("task", gone)) <= polls[0] + 1  # one may have been on its way


def test_entries_that_are_no_task_id_are_warned_about_once_and_left(home: Home) -> None:
    strange = ["../../etc/passwd", "a b", 5, {"x": 1}]
    task, later = home.grafx.add(), home.grafx.add()
    home.write({"orders": [*strange, task]})
    daemon = home.start(before=QUICK)
    eventually(lambda: home.waiting() == strange)
    home.write({"orders": [*strange, later]})
    eventually(lambda: home.waiting() == strange)
    assert daemon.log().count("ignored, since it is not an order") == len(strange)
    assert {request.task_id for request in home.grafx.requests} == {None, task, later}
    assert home.files() == sorted([f"{task}.png", f"{later}.png"])


def test_memory_does_not_grow_with_what_comes(home: Home) -> None:
    """A large file is streamed; of any other answer no more than 1 MiB is read."""
    size = 128 * MIB
    for what in ("token", "task"):
        home.grafx.fault(what, "huge", size=size)
    home.wait_for(task := home.grafx.add(size=size))
    daemon = home.start(before=QUICK)
    daemon.says(f"{task} delivered", patience=120)
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    assert peak < size
    (file,) = home.orders.glob("*.png")
    assert abs(file.stat().st_size - size) < MIB
    file.unlink()
