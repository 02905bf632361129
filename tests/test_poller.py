"""The daemon: what it polls and when, what it writes, and how it stops."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Collection
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from time import monotonic

import psutil
import pytest
from conftest import QUICK, WATCH, Home, Running, eventually, find_program
from sandbox import MIB, TYPES, Request, Sandbox

import db

# For `before`: after the first look at the file there is no other, and no write while orders are polled.
LOOK_ONCE = "db.LOOK = 1e9"
# For `before`: no answer is late, so whatever ends has not waited for one.
PATIENT = "chili.TIMEOUT = (600, 600)"
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"


def sent(grafx: Sandbox, task_id: str | None = None, what: str = "task") -> list[Request]:
    return [r for r in list(grafx.requests) if r.what == what and task_id in (None, r.task_id)]


def pauses(requests: list[Request]) -> list[float]:
    return [after.time - before.time for before, after in pairwise(requests)]


def ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()


def turns(running: Running, number: int = 10) -> None:
    """Wait until the loop has gone on: so often at least its thread has slept and was woken."""
    process = psutil.Process(running.process.pid)
    before = process.num_ctx_switches().voluntary
    eventually(lambda: process.num_ctx_switches().voluntary >= before + number, "the loop goes on")


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
    assert all(
        (home.orders / f"{task}.{kind}").read_bytes() == grafx.body(task) for task, kind in good.items()
    )
    # Neither a 204 nor a few 404s take it out, and its fields stay.
    assert home.waiting() == {unknown: fields, pending: fields}
    assert home.read()["failing"][unknown]["status"] == 404
    records = home.failed()
    assert {task: (record["status"], len(sent(grafx, task))) for task, record in records.items()} == {
        failed: (500, 3),
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
    assert " 10 pending, 0 rejected, 0 failed, 0 delivered" in log
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
    assert log.endswith("stopped, 2 pending\n")
    for secret in (*grafx.tokens, grafx.client_secret, "Bearer", "Authorization"):
        assert secret[:40] not in log
        assert secret[:40] not in home.database.read_text()


# --- when it polls ---------------------------------------------------------------------------


def test_an_order_is_polled_again_after_a_quarter_of_its_age(home: Home) -> None:
    """`min(POLL_INTERVAL, max(shortest, age / 4))`."""
    ages = {"new": 0.0, "old": 3600.0}
    orders = {task: {"added": ago(age)} for task, age in ages.items()}
    # These count from when they were first seen.
    orders |= {"typed": {"added": "yesterday"}, "ahead": {"added": ago(-1e9)}}
    for task in orders:
        home.grafx.add("never", task_id=task)
    began = monotonic()
    home.write({"orders": orders})
    daemon = home.start(before="poller.SHORTEST_PAUSE = 0.3", POLL_INTERVAL="2")
    eventually(lambda: len(sent(home.grafx, "old")) > 2)
    daemon.stop()
    for task in orders:
        requests = sent(home.grafx, task)
        since = began - ages[task] if task in ages else requests[0].time
        for request, pause in zip(requests, pauses(requests), strict=False):
            quarter = (request.time - since) / 4  # so the pauses grow with the age
            assert pause > min(2, max(0.3, quarter)) - 0.02, task
    assert len(sent(home.grafx, "typed")) > len(sent(home.grafx, "old"))


def test_an_order_that_cannot_be_polled_is_retried_with_growing_pauses(home: Home) -> None:
    grafx = home.grafx
    task, other = grafx.add(), grafx.add("never")
    grafx.fault("task", "status-502", task_id=task, times=None)
    home.wait_for(task, other)
    daemon = home.start(before="poller.SHORTEST_PAUSE = 0.05", POLL_INTERVAL="0.4")
    # No other order is held up.
    eventually(lambda: len(sent(grafx, task)) > 5 and len(sent(grafx, other)) > 2)
    grafx.clear_faults()
    daemon.says(f"{task} delivered")
    daemon.stop()
    for number, pause in enumerate(pauses(sent(grafx, task))):
        assert pause > min(0.4, 0.05 * 2**number) - 0.02
    assert home.failed() == {}


def test_an_outage_is_retried_with_growing_pauses_not_once_for_each_order(home: Home) -> None:
    grafx = home.grafx
    grafx.fault("token", "status-502", times=5)
    home.wait_for(*(grafx.add() for _ in range(20)))
    daemon = home.start(before=QUICK, CONCURRENCY="1", POLL_INTERVAL="0.8")
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0
    assert [request.what for request in grafx.requests[:7]] == ["token"] * 6 + ["task"]
    for number, pause in enumerate(pauses(sent(grafx, what="token"))):
        assert pause > min(0.8, 0.1 * 2**number) - 0.02
    assert re.search(r"WARNING paused: .*502 Bad Gateway.*; retrying in 0\.1 s", daemon.log())
    assert daemon.log().count("paused") == daemon.log().count("resumed after ") == 1


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
    daemon = home.start(before=f"{QUICK}; {PATIENT}", CONCURRENCY="3")
    eventually(lambda: len(sent(home.grafx)) == 3)
    turns(daemon)
    assert len(sent(home.grafx)) == 3
    assert daemon.stop() == 0
    assert len(home.waiting()) == 10
    assert daemon.log().endswith("stopped, 10 pending\n")


def test_connections_are_kept_alive(home: Home) -> None:
    home.wait_for(*(home.grafx.add(questions=2) for _ in range(30)))
    daemon = home.start(before=QUICK, CONCURRENCY="3")
    eventually(lambda: not home.waiting())
    daemon.stop()
    assert len(sent(home.grafx)) == 90
    assert len(sent(home.grafx, what="token")) == 1
    assert len({request.peer for request in sent(home.grafx)}) <= 3


def test_what_takes_long_holds_up_nobody_else(home: Home) -> None:
    """A download of minutes and a head without end hold a thread each; a body that trickles is given up."""
    grafx = home.grafx
    long, head, answer, body = grafx.add(size=3_000_000), grafx.add(), grafx.add(), grafx.add(size=200_000)
    others = [grafx.add(questions=1) for _ in range(10)]
    grafx.fault("download", "slow", task_id=long)
    grafx.fault("task", "trickle", task_id=head, pace=0.1)
    for what, task in (("token", None), ("task", answer), ("download", body)):
        grafx.fault(what, "trickle-body", task_id=task, pace=0.1)
    home.wait_for(long, head, answer, body, *others)
    daemon = home.start(before=f"{QUICK}; chili.SLOW_START = 1", CONCURRENCY="4")
    eventually(lambda: list(home.waiting()) == [long, head])
    assert daemon.stop() == 0
    files = [name for name in home.files() if not name.startswith(".")]
    assert files == sorted(f"{task}.png" for task in (answer, body, *others))
    assert (home.orders / f"{body}.png").read_bytes() == grafx.body(body)
    assert [len(sent(grafx, what="token")), len(sent(grafx, answer)), len(sent(grafx, body))] == [2, 2, 2]
    assert re.search("paused: no token: .* too slow", daemon.log())
    assert home.failed() == {}


@pytest.mark.parametrize(("how", "fault"), [(signal.SIGTERM, "slow"), (signal.SIGINT, "hang")])
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
    assert "Traceback" not in daemon.log()
    assert home.run("--once").process.returncode == 0
    assert home.files() == sorted([f"{long}.png", f"{done}.png"])


def test_a_second_poller_of_one_database_or_folder_ends_and_touches_nothing(home: Home) -> None:
    task = home.grafx.add(size=3_000_000)
    home.grafx.fault("download", "slow", task_id=task)
    home.wait_for(task)
    first = home.start()
    eventually(lambda: home.files() == [f".{task}.part"])
    link, other = home.folder / "link.json", home.folder / "other.json"
    link.symlink_to(home.database)
    other.write_text('{"orders": {}}')
    running = rf"a poller for {home.database} is already running, as process {first.process.pid}\. "
    writes = rf"another poller writes to {home.orders}\. Give each an ORDERS_DIR of its own\.\n"
    for database, said in ((home.database, running), (link, running), (other, writes)):
        second = home.run(*["--once"] * (database == link), DATABASE=str(database))
        assert second.process.returncode == 1
        assert re.search(rf"ERROR +{said}", second.log())
    assert home.files() == [f".{task}.part"]
    first.process.kill()
    first.process.wait()
    for database in (other, home.database):  # a killed one leaves no lock
        assert home.run("--once", DATABASE=str(database)).process.returncode == 0
    assert home.files() == [f"{task}.png"]


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
    (home.orders / ".holiday video.part").touch()  # somebody's own
    (home.orders / ".folder.part").mkdir()
    home.wait_for(long, here)
    second = home.start(before=QUICK)
    eventually(lambda: not home.waiting())
    assert ".gone.part" not in home.files()
    second.stop()
    assert home.files() == sorted([".folder.part", ".holiday video.part", f"{long}.png", f"{here}.png"])
    assert (home.orders / f"{long}.png").read_bytes() == grafx.body(long)
    assert (home.orders / f"{here}.png").read_bytes() == b"whole"
    assert not [request for request in grafx.requests if request.task_id == here]


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
    assert daemon.log().count(f"{odd} cannot be polled: unexpected ZeroDivisionError; retrying in") == 1


def test_an_outage_of_the_folder_ends_with_a_delivery_and_not_before(home: Home) -> None:
    """What GraFx answers meanwhile about others says nothing of the disk."""
    rendering, done = home.grafx.add("never"), home.grafx.add()
    home.wait_for(rendering)
    daemon = home.start(before=QUICK)
    eventually(lambda: sent(home.grafx, rendering))
    shutil.rmtree(home.orders)
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


def test_an_idle_one_polls_and_reads_nothing_until_the_file_changes(home: Home) -> None:
    home.wait_for(home.grafx.add("never"))
    daemon = home.start(before=f"{QUICK}; poller.SHORTEST_PAUSE = 3600; {WATCH}", POLL_INTERVAL="3600")

    def reads() -> int:
        return daemon.log().count(f"<read {home.database}>")

    eventually(lambda: sent(home.grafx) and reads())
    turns(daemon)
    before = reads(), len(home.grafx.requests)
    turns(daemon)
    assert (reads(), len(home.grafx.requests)) == before
    home.database.write_text(home.database.read_text())
    eventually(lambda: reads() > before[0])
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


@pytest.mark.parametrize("how", ["taken away", "broken"])
def test_a_database_that_is_taken_away_or_broken_is_waited_for(home: Home, how: str) -> None:
    """It is never taken for an empty store, made anew, or written over; meanwhile work goes on."""
    grafx = home.grafx
    first, pending = grafx.add(questions=8), grafx.add("never")
    home.wait_for(first, pending)
    daemon = home.start(before=f"{QUICK}; db.SAVING = 0.2")
    eventually(lambda: sent(grafx, pending))
    broken = '{"orders": {\n    "' + first + '": {}\n    "typed": {}}}'
    home.write(broken) if how == "broken" else home.database.unlink()
    wrong = f"{home.database}" + (": line 3, column 5" if how == "broken" else " is missing. Put it back")
    daemon.says(rf"ERROR +{wrong}")
    daemon.says(f"{first} delivered")
    count = len(sent(grafx, pending))
    eventually(lambda: len(sent(grafx, pending)) > count + 3)
    assert home.database.read_text() == broken if how == "broken" else not home.database.exists()
    new = grafx.add()
    home.write({"orders": {first: {}, pending: {}, new: {}}, "mine": 1.5})
    daemon.says(f"recovered: {wrong}")
    eventually(lambda: list(home.waiting()) == [pending])
    assert home.read()["mine"] == 1.5
    assert home.files() == sorted([f"{first}.png", f"{new}.png"])
    assert daemon.stop() == 0
    assert daemon.log().count("ERROR") == 1


def test_entries_that_are_no_task_id_are_warned_about_once_and_left(home: Home) -> None:
    strange = ["../../etc/passwd", "a b", "a/b"]
    task, later = home.grafx.add(questions=3), home.grafx.add()
    home.write({"orders": [*strange, task, 5, {"x": 1}]})
    daemon = home.start(before=QUICK)
    eventually(lambda: home.waiting() == [*strange, 5, {"x": 1}])
    home.write({"orders": [*strange, later, 5, {"x": 1}]})
    eventually(lambda: home.waiting() == [*strange, 5, {"x": 1}])
    daemon.stop()
    for entry in strange:
        assert daemon.log().count(f'"{entry}"') == 1
    assert daemon.log().count("no task id") == len(strange) + 2
    assert {request.task_id for request in home.grafx.requests} == {None, task, later}
    assert home.files() == sorted([f"{task}.png", f"{later}.png"])


def test_it_starts_without_database_and_folder(home: Home) -> None:
    task = home.grafx.add()
    home.orders.rmdir()
    daemon = home.start(before=QUICK)
    eventually(lambda: sent(home.grafx, what="token"))
    db.add_order(task, path=home.database)
    eventually(lambda: home.waiting() == {})
    assert home.files() == [f"{task}.png"]
    assert daemon.stop() == 0


def test_once_ends_with_1_where_a_result_could_not_be_written(home: Home) -> None:
    home.wait_for(home.grafx.add())
    ended = home.run(
        "--once", before="db._replace = lambda *_: (_ for _ in ()).throw(db.DatabaseError('no'))"
    )
    assert ended.process.returncode == 1, ended.log()
    assert len(home.waiting()) == 1


def away(go: Path, others: Collection[str]) -> str:
    """For `before`: an outage that `late` meets once there is a file `go`, and each of `others` at once."""
    return f"""import os, time
done, others = chili.order_done, set({others!r})
def order_done(task_id, *more):
    while task_id == "late" and not os.path.exists({str(go)!r}):
        time.sleep(0.02)
    if task_id == "late" or task_id in others:
        others.discard(task_id)
        raise chili.TryAgainLater("GraFx is away", shared=True)
    return done(task_id, *more)
chili.order_done = order_done"""


def test_an_outage_that_only_a_removed_order_met_ends_with_the_next_answer(home: Home) -> None:
    home.wait_for("late")
    go = home.folder / "go"
    daemon = home.start("-v", before=f"{QUICK}; {away(go, ())}")
    daemon.says("late polled")
    home.wait_for()
    daemon.says("late removed from the file by somebody")
    go.touch()
    daemon.says("paused: GraFx is away")
    home.wait_for(task_id := home.grafx.add())
    daemon.says(f"{task_id} delivered")
    daemon.says("resumed after ")
    eventually(lambda: home.waiting() == {} and "the poller says" not in home.db("list").stdout)
    assert daemon.stop() == 0
    assert daemon.log().count("late polled") == 1


def test_an_answer_from_before_the_end_of_an_outage_does_not_begin_it_anew(home: Home) -> None:
    home.wait_for("late", home.grafx.add("never", task_id="early"))
    go = home.folder / "go"
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 0; {away(go, ['early'])}", CONCURRENCY="2")
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
    assert sent(home.grafx) == []


def test_memory_does_not_grow_with_what_comes(home: Home) -> None:
    """A large file is streamed; of any other answer no more than 1 MiB is read."""
    size = 128 * MIB
    task = home.grafx.add(size=size)
    for what in ("token", "task"):
        home.grafx.fault(what, "huge", size=size)
    home.wait_for(task)
    daemon = home.start(before=QUICK)
    daemon.says(f"{task} delivered", patience=120)
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    assert peak < size
    assert daemon.stop() == 0
    assert abs((home.orders / f"{task}.png").stat().st_size - size) < MIB
    (home.orders / f"{task}.png").unlink()
