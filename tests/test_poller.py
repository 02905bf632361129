"""The daemon: what it asks and when, what it writes, how it stops, and what a person sees."""

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
import poller

MEMORY = 60 * MIB
# For `before`: after the first look no time comes for another, nor for a write while orders are asked about.
LOOK_ONCE = "sys.addaudithook(lambda what, _: what == 'socket.connect' and setattr(poller, 'LOOK', 1e9))"
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"


def asked(grafx: Sandbox, task_id: str | None = None, what: str = "task") -> list[Request]:
    return [r for r in list(grafx.requests) if r.what == what and task_id in (None, r.task_id)]


def gaps(grafx: Sandbox, task_id: str) -> list[float]:
    times = [request.time for request in asked(grafx, task_id)]
    return [after - before for before, after in pairwise(times)]


def ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()


# --- from database.json to ./orders ----------------------------------------------------------


def test_each_order_ends_as_a_file_or_under_failed_or_waits(home: Home) -> None:
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
    assert {task: (record["status"], len(asked(grafx, task))) for task, record in records.items()} == {
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
    for task in (*good, failed, expired, unknown, pending):
        assert re.search(rf"DEBUG +{task} asked about, project p-1", log)
    for task, kind in good.items():
        said = rf"{task} delivered: {kind}, [\d.]+ (bytes|kB|MB), [\d.]+ (s|min|h) after it was ordered"
        assert len(re.findall(said, log)) == 1
    for task in records:
        assert len(re.findall(rf"{task} failed, project p-1: {re.escape(records[task]['error'])}", log)) == 1
    assert re.search(rf"GET {grafx.root}/tasks/{pending}.* 204", log)
    for secret in (*grafx.tokens, grafx.client_secret, "Bearer", "Authorization"):
        assert secret[:40] not in log
        assert secret[:40] not in home.database.read_text()


def test_it_says_nothing_of_requests_without_v_and_the_secret_never_ends_in_a_log(home: Home) -> None:
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


def test_a_failure_counts_after_three_in_a_row(home: Home) -> None:
    """An answer in between that says otherwise starts the count anew."""
    grafx = home.grafx
    rows = {
        "twice": ["500", "404"],
        "healthy": ["500", "500", "204", "403", "500"],
        "troubled": ["404", "404", "503", "404", "404"],
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
    assert home.files() == ["healthy.png", "troubled.png", "twice.png"]
    assert [(task, record["status"]) for task, record in home.failed().items()] == [("final", 500)]
    assert {task: len(asked(grafx, task)) for task in rows} == {
        "twice": 3, "healthy": 6, "troubled": 6, "final": 7,
    }  # fmt: skip


# --- when it asks ----------------------------------------------------------------------------


def test_an_order_is_asked_about_again_after_a_quarter_of_its_age(home: Home) -> None:
    """`min(POLL_INTERVAL, max(shortest, age / 4))`, and at once for the first time."""
    ages = {"new": 0.0, "typed": 0.0, "older": 2.4, "old": 3600.0}
    least = {"new": 0.3, "typed": 0.3, "older": 0.6, "old": 0.9}
    for task in ages:
        home.grafx.add("never", task_id=task)
    orders: dict[str, Any] = {task: {"added": ago(age)} for task, age in ages.items()}
    orders["typed"] = {"added": "yesterday"}  # so it counts from when it was first seen
    home.write({"orders": orders})
    began = time.monotonic()
    daemon = home.start(before="poller.SHORTEST_PAUSE = 0.3", POLL_INTERVAL="0.9")
    eventually(lambda: len(asked(home.grafx, "old")) > 2)
    daemon.stop()
    requests = asked(home.grafx)
    assert {request.task_id for request in requests[:4]} == set(ages)
    assert requests[3].time - began < 10
    for task in ages:
        assert all(gap > least[task] - 0.02 for gap in gaps(home.grafx, task)), task
    # Who is due earlier is asked earlier, however busy the machine is.
    again = [request.task_id for request in requests[4:]]
    assert again.index("older") < again.index("old")
    assert max(again.index("new"), again.index("typed")) < again.index("older")
    # The pauses grow with the age.
    assert gaps(home.grafx, "older")[1] > gaps(home.grafx, "older")[0]
    assert len(asked(home.grafx, "new")) > len(asked(home.grafx, "old"))


def test_troubles_are_asked_about_for_ever_with_growing_pauses(home: Home) -> None:
    grafx = home.grafx
    task, other = grafx.add(), grafx.add("never")
    grafx.fault("task", "status-502", task_id=task, times=5)
    home.wait_for(task, other)
    daemon = home.start(before=f"poller.SHORTEST_PAUSE = 0.05; {WATCH}", POLL_INTERVAL="0.4")
    daemon.says(f"{task} delivered")
    daemon.stop()
    pauses = gaps(grafx, task)
    for number, pause in enumerate(pauses):
        assert pause > min(0.4, 0.05 * 2**number) - 0.02
    assert sum(pauses) < 30  # 0.05 + 0.1 + 0.2 + 0.4 + 0.4
    assert home.failed() == {}
    assert len(re.findall(f"WARNING {task} waits: .*502", daemon.log())) == 1  # said once
    assert len(asked(grafx, other)) > 2  # it alone waits


def test_a_token_that_is_refused_again_makes_all_orders_wait(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(20)]
    grafx.fault("task", "status-401", times=None)
    home.wait_for(*tasks)
    daemon = home.start(before="poller.SHORTEST_PAUSE = 0.1", CONCURRENCY="1", POLL_INTERVAL="0.4")
    eventually(lambda: len(asked(grafx, what="token")) > 5)
    times = [request.time for request in asked(grafx, what="token")][1:]
    questions = len(asked(grafx))
    assert questions <= 3 * len(times) + 5  # not one for each order
    assert all(
        after - before > min(0.4, 0.1 * 2**number) - 0.02
        for number, (before, after) in enumerate(pairwise(times))
    )
    grafx.clear_faults()
    eventually(lambda: not home.waiting())
    assert home.failed() == {}
    assert daemon.stop() == 0
    assert daemon.log().count("all orders wait") == 1
    assert "over: " in daemon.log()


def test_retry_after_is_obeyed_for_all_requests(home: Home) -> None:
    grafx = home.grafx
    for what in ("token", "task", "download"):
        grafx.fault(what, "status-429", retry_after=1)
    home.wait_for(*(grafx.add() for _ in range(3)))
    daemon = home.start(before=QUICK, CONCURRENCY="1")
    eventually(lambda: not home.waiting())
    daemon.stop()
    refused = [number for number, request in enumerate(grafx.requests) if request.status == 429]
    assert [grafx.requests[number].what for number in refused] == ["token", "task", "download"]
    times = [request.time for request in grafx.requests]
    assert all(times[number + 1] - times[number] > 0.95 for number in refused)


# --- side by side ----------------------------------------------------------------------------


def test_no_more_than_concurrency_at_once_and_a_stop_within_2_s(home: Home) -> None:
    for _ in range(10):
        home.grafx.fault("task", "hang")
    home.wait_for(*(home.grafx.add() for _ in range(10)))
    daemon = home.start(CONCURRENCY="3")
    eventually(lambda: len(asked(home.grafx)) == 3)
    time.sleep(0.5)
    assert len(asked(home.grafx)) == 3
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 2
    assert len(home.waiting()) == 10


def test_connections_are_kept_alive(home: Home) -> None:
    home.wait_for(*(home.grafx.add(questions=2) for _ in range(70)))
    daemon = home.start(before=QUICK, CONCURRENCY="3")
    eventually(lambda: not home.waiting())
    daemon.stop()
    assert len(asked(home.grafx)) == 210
    assert len(asked(home.grafx, what="token")) == 1
    assert len({request.peer for request in home.grafx.requests}) <= 3


def test_a_long_download_holds_up_nobody(home: Home) -> None:
    grafx = home.grafx
    slow = grafx.add(size=600_000)
    grafx.fault("download", "slow", task_id=slow, rate=400_000)
    others = [grafx.add(questions=1) for _ in range(20)]
    home.wait_for(slow, *others)
    daemon = home.start(before=f"{QUICK}; poller.PROGRESS = 0.2", CONCURRENCY="2")
    eventually(lambda: not home.waiting())
    daemon.stop()
    delivered = re.findall(r"(\S+) delivered: ", daemon.log())
    assert sorted(delivered) == sorted([slow, *others])
    assert delivered[-1] == slow
    # Without a terminal its progress is logged now and then.
    progress = [int(share) for share in re.findall(rf"{slow} .*?(\d+)% of 600\.\d kB", daemon.log())]
    assert len(progress) >= 3
    assert progress == sorted(progress)
    assert len(progress) < 20
    assert "\x1b" not in daemon.log()


def test_answers_that_trickle_are_given_up_and_hold_up_nobody(home: Home) -> None:
    grafx = home.grafx
    head, body = grafx.add(), grafx.add(size=200_000)
    others = [grafx.add(questions=1) for _ in range(5)]
    grafx.fault("token", "trickle", pace=0.1)
    grafx.fault("task", "trickle", task_id=head, pace=0.1)
    grafx.fault("download", "trickle-body", task_id=body, pace=0.1)
    home.wait_for(head, body, *others)
    daemon = home.start(before=f"{QUICK}; chili.ANSWER_TIME = 1", CONCURRENCY="3")
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0
    delivered = re.findall(r"(\S+) delivered: ", daemon.log())
    assert sorted(delivered) == sorted([head, body, *others])
    assert set(delivered[-2:]) == {head, body}
    assert home.failed() == {}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fault", ["slow", "trickle", "hang"])
def test_a_stop_drops_downloads_and_writes_outcomes(home: Home, how: int, fault: str) -> None:
    grafx = home.grafx
    long, done, failed = grafx.add(size=3_000_000), grafx.add(), grafx.add("expired")
    grafx.fault("download", fault, task_id=long)
    home.wait_for(long, done, failed)
    daemon = home.start(before=LOOK_ONCE)  # so only the stop writes
    daemon.says(f"{done} delivered")
    daemon.says(f"{failed} failed")
    eventually(lambda: asked(grafx, long, "download"))
    if fault == "slow":
        eventually(lambda: [name for name in home.files() if name.startswith(".")])
    began = time.monotonic()
    assert daemon.stop(how) == 0
    assert time.monotonic() - began < 2
    assert home.files() == [f"{done}.png"]
    assert list(home.waiting()) == [long]
    assert list(home.failed()) == [failed]
    questions = len(grafx.requests)
    time.sleep(0.1)
    assert len(grafx.requests) == questions
    assert "Traceback" not in daemon.log()


def test_a_second_poller_is_refused_with_the_pid_of_the_first(home: Home) -> None:
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
    assert home.run("--once").process.returncode == 0  # a dead one is in nobody's way


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
    (home.orders / f"{here}.png").write_bytes(b"whole")  # delivered, but killed before it was noted
    (home.orders / ".gone.part").touch()  # of an order that waits no more
    home.wait_for(long, here)
    second = home.start(before=QUICK)
    eventually(lambda: not home.waiting())
    assert ".gone.part" not in home.files()
    second.stop()
    assert home.files() == sorted([f"{long}.png", f"{here}.png"])
    assert (home.orders / f"{long}.png").read_bytes() == grafx.body(long)
    assert (home.orders / f"{here}.png").read_bytes() == b"whole"
    assert not [request for request in grafx.requests if request.task_id == here]


def test_an_exception_that_nobody_foresaw_does_not_end_it(home: Home) -> None:
    odd, other = home.grafx.add(), home.grafx.add()
    home.wait_for(odd, other)
    code = (
        "find, odd = chili.find_file, [1]; "
        f"chili.find_file = lambda folder, task: 1 // odd.pop() * 0 or 1 // 0 if task == {odd!r} and odd "
        "else find(folder, task)"
    )
    daemon = home.start(before=f"{QUICK}; {code}")
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0
    assert set(home.files()) == {f"{odd}.png", f"{other}.png"}
    assert daemon.log().count("Traceback") == 1
    assert "ZeroDivisionError" in daemon.log()
    assert re.search(rf"ERROR +{odd}", daemon.log())


def test_a_full_disk_only_makes_it_wait(home: Home) -> None:
    task = home.grafx.add(size=500_000)
    home.wait_for(task)
    full = (
        "import resource, signal; signal.signal(signal.SIGUSR1, "
        "lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))"
    )
    daemon = home.start(before=f"{QUICK}; {full}")
    eventually(lambda: len(asked(home.grafx, task)) > 5)
    assert home.failed() == {}
    assert home.files() in ([], [f".{task}.part"])
    assert daemon.log().count("write") == 1  # said once
    daemon.process.send_signal(signal.SIGUSR1)
    eventually(lambda: not home.waiting())
    assert (home.orders / f"{task}.png").read_bytes() == home.grafx.body(task)
    assert daemon.stop() == 0


def test_a_folder_that_takes_no_file_is_over_with_a_delivery_and_not_before(home: Home) -> None:
    """What GraFx answers meanwhile about others says nothing of the disk."""
    rendering, done = home.grafx.add("never"), home.grafx.add()
    home.wait_for(rendering)
    daemon = home.start(before=QUICK)
    eventually(lambda: asked(home.grafx, rendering))
    home.orders.rmdir()
    home.db("add", done)
    daemon.says("all orders wait: cannot write to .*: make it")
    count = len(asked(home.grafx, rendering))
    eventually(lambda: len(asked(home.grafx, rendering)) > count + 3)
    assert "over: " not in daemon.log()
    home.orders.mkdir()
    daemon.says(f"{done} delivered")
    daemon.says("over: cannot write to")
    assert daemon.stop() == 0


# --- database.json while it runs -------------------------------------------------------------


def test_the_file_is_read_where_it_changed_and_written_once_for_a_sweep(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(40)]
    pending = grafx.add("never")
    home.wait_for(*tasks, pending)
    before = f"db.LOOK = 0.1; poller.SHORTEST_PAUSE = 3600; {WATCH}"
    daemon = home.start(before=before, CONCURRENCY="4", POLL_INTERVAL="3600")

    def count(what: str) -> int:
        return len(re.findall(rf"<{what} [^>]*{re.escape(home.database.name)}>", daemon.log()))

    eventually(lambda: list(home.waiting()) == [pending])
    # It may write while others are under way, but not for each one.
    assert count("to") <= 12
    log = daemon.log()
    for task in tasks:  # the file has its name before the order leaves
        assert f"/{task}.png>" in log[: log.rindex(f"{home.database.name}>")]
    time.sleep(0.3)
    reads, requests = count("read"), len(grafx.requests)
    process = psutil.Process(daemon.process.pid)
    used = sum(process.cpu_times()[:2])
    time.sleep(1)
    assert (count("read"), len(grafx.requests)) == (reads, requests)  # an idle one looks at `stat` alone
    assert sum(process.cpu_times()[:2]) - used < 0.5
    home.database.write_text(home.database.read_text())
    eventually(lambda: count("read") > reads)
    assert daemon.stop() == 0


def test_outcomes_of_a_sweep_are_one_write(home: Home) -> None:
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
    daemon = home.start(before=f"{QUICK}; db.SAVING = 0.2")
    eventually(lambda: len(asked(grafx, gone)) > 2)

    new = grafx.add()
    db.remove_order(gone, home.database)
    assert home.db("add", new).returncode == 0
    eventually(lambda: list(home.waiting()) == [stays])
    questions = len(asked(grafx, gone))
    before = len(asked(grafx, stays))
    eventually(lambda: len(asked(grafx, stays)) > before + 4)
    assert len(asked(grafx, gone)) <= questions + 1
    assert home.waiting()[stays] == {"note": "kept"}

    home.database.unlink()  # an empty store, once that is believed
    time.sleep(0.7)
    questions = len(grafx.requests)
    time.sleep(0.5)
    assert len(grafx.requests) == questions
    home.wait_for(grafx.add(task_id="later"))
    eventually(lambda: home.files() == sorted([f"{new}.png", "later.png"]))
    assert daemon.stop() == 0


def test_a_file_that_is_broken_while_it_runs_is_left_until_it_is_mended(home: Home) -> None:
    grafx = home.grafx
    first, pending = grafx.add(questions=8), grafx.add("never")
    home.wait_for(first, pending)
    daemon = home.start(before=f"{QUICK}; db.SAVING = 0.2")
    eventually(lambda: asked(grafx, pending))
    broken = '{"orders": {\n    "' + first + '": {}\n    "typed": {}}}'
    home.write(broken)
    daemon.says(r"ERROR.*line 3, column 5")
    daemon.says(f"{first} delivered")  # work goes on
    time.sleep(0.7)
    assert home.database.read_text() == broken
    said = [line for line in daemon.log().splitlines() if "line 3, column 5" in line and "ERROR" in line]
    assert len(said) <= 2  # once for reading it, once for writing the outcome
    new = grafx.add()
    home.write(json.dumps({"orders": {first: {}, pending: {}, new: {}}, "mine": 1.5}))
    eventually(lambda: list(home.waiting()) == [pending])
    assert home.read()["mine"] == 1.5
    assert home.files() == sorted([f"{first}.png", f"{new}.png"])
    assert "over: " in daemon.log()
    assert daemon.stop() == 0


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


def test_it_starts_with_a_missing_file(home: Home) -> None:
    task = home.grafx.add()
    home.orders.rmdir()
    daemon = home.start(before=QUICK)
    eventually(lambda: asked(home.grafx, what="token"))
    db.add_order(task, path=home.database)
    eventually(lambda: home.waiting() == {})
    assert home.files() == [f"{task}.png"]
    assert daemon.stop() == 0


# --- how much it takes -----------------------------------------------------------------------


@contextmanager
def peak_memory(running: Running) -> Iterator[list[int]]:
    """The largest resident size that the poller had inside."""
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
        eventually(lambda: len(asked(home.grafx)) == 1000, patience=60)
    assert 10 * MIB < peak[0] < MEMORY
    first, *_, last = (request.time for request in asked(home.grafx))
    assert last - first < 20
    assert daemon.stop() == 0
    assert list(home.waiting()) == tasks
    assert len({request.peer for request in home.grafx.requests}) <= 8


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


def test_once_ends_with_1_where_an_outcome_could_not_be_written(home: Home) -> None:
    home.wait_for(home.grafx.add())
    ended = home.run(
        "--once", before="db._rewrite = lambda *_: (_ for _ in ()).throw(db.DatabaseError('no'))"
    )
    assert ended.process.returncode == 1, ended.log()
    assert len(home.waiting()) == 1


def test_an_order_that_was_taken_out_leaves_no_trouble_behind(home: Home) -> None:
    """It met what all orders wait for, but is none of them any more."""
    home.wait_for("taken-out")
    trouble = "(time.sleep(4), (_ for _ in ()).throw(chili.AskAgainLater('GraFx is away', shared=True)))"
    ask = f"lambda id, *more: {trouble} if id == 'taken-out' else done(id, *more)"
    running = home.start(before=f"{QUICK}; import time; done = chili.order_done; chili.order_done = {ask}")
    eventually(lambda: asked(home.grafx, what="token"))
    time.sleep(1)
    home.wait_for()
    time.sleep(5)  # its answer comes
    task_id = home.grafx.add()
    home.wait_for(task_id)
    running.says(f"{task_id} delivered")
    assert "GraFx is away" not in running.log()


def test_who_was_asked_before_an_outage_was_over_does_not_begin_it_anew(home: Home) -> None:
    home.wait_for("late", "early")
    away = "(_ for _ in ()).throw(chili.AskAgainLater('GraFx is away', shared=True))"
    answers = (
        f"{{'late': lambda: (time.sleep(2), {away}), 'early': lambda: {away} if not tries.pop() else False}}"
    )
    ask = f"lambda task_id, *more: {answers}[task_id]()"
    before = f"{QUICK}; poller.MINUTE = 0; import time; tries = [1] * 99 + [0]; chili.order_done = {ask}"
    daemon = home.start("-v", before=before, CONCURRENCY="2")
    daemon.says("late waits: GraFx is away")  # it alone
    daemon.stop()
    assert daemon.log().count("all orders wait") == 1


def test_after_sigterm_nothing_is_asked(home: Home) -> None:
    home.wait_for(home.grafx.add())
    ended = home.run(before="poller.Poller.take = lambda self, store: self.on_signal()")
    assert ended.process.returncode == 0
    assert home.grafx.requests == []


def test_orders_that_are_taken_out_by_name_leave_nothing_behind() -> None:
    waiting = poller.Waiting()
    first, second = poller.Order("a", "", 0.0), poller.Order("b", "", 0.0)
    waiting.put(first, 0.0)
    for _ in range(10_000):
        waiting.put(second, 1.0)
        assert waiting.pop("b") is second
    assert len(waiting._heap) < 1000
    assert waiting.take_first() is first
