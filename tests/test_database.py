"""`db.Database`: what the poller's loop needs of database.json, with other processes in between."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, eventually

import db

REJECTED = {"status": 500, "error": "No such item", "since": "2026-01-01T00:00:00Z", "times": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The same in less time."""
    monkeypatch.setattr(db, "LOOK", 0.1)
    monkeypatch.setattr(db, "SAVING", 0.4)
    caplog.set_level(logging.INFO, "db")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "database.json"
    save(path, {"orders": {name: {"projectID": "p"} for name in "abc"}, "failed": {}})
    return path


class Loop:
    """What the poller's loop does with a Database, and the orders that it knows."""

    def __init__(self, path: Path, once: bool = False) -> None:
        self.database = db.Database(path, once)
        self.orders = self.database.start().orders

    def turn(self, idle: bool = True) -> bool:
        """Whether there was something new."""
        new, gone = self.database.sync(idle)
        assert not new.keys() & self.orders.keys()
        assert gone <= self.orders.keys()
        self.orders |= new
        for task_id in gone:
            del self.orders[task_id]
        return bool(new or gone)

    def turns(self, seconds: float, idle: bool = True) -> bool:
        end, heard = time.monotonic() + seconds, False
        while time.monotonic() < end:
            heard |= self.turn(idle)
            time.sleep(0.01)
        return heard

    def too_soon(self) -> bool:
        """Turn while SAVING cannot be over, however slow the machine is."""
        saving, db.SAVING = db.SAVING, 600.0
        try:
            return self.turns(saving / 2)
        finally:
            db.SAVING = saving

    def until(self, true: Callable[[], Any]) -> None:
        """Turn until it is true."""

        def turn() -> bool:
            self.turn()
            return bool(true())

        eventually(turn, "what the loop knows or the file says", 10)

    def deliver(self, *task_ids: str, name: str = "x.png") -> None:
        for task_id in task_ids:
            self.orders.pop(task_id, None)
            self.database.delivered(task_id, name)

    def fail(self, task_id: str) -> None:
        self.orders.pop(task_id, None)
        self.database.failed(task_id, 500, "No such item")

    @property
    def file(self) -> Any:
        return json.loads(self.database.file.path.read_text())

    @property
    def pending(self) -> list[str]:
        """In the file."""
        return list(self.file["orders"])


@pytest.fixture
def loop(path: Path, caplog: pytest.LogCaptureFixture) -> Loop:
    loop = Loop(path)
    assert list(loop.orders) == ["a", "b", "c"]
    caplog.clear()
    return loop


def save(path: Path, data: Any) -> None:
    """As an editor saves that replaces the file."""
    temp = path.with_name("edited")
    temp.write_text(data if isinstance(data, str) else json.dumps(data))
    temp.replace(path)


def said(caplog: pytest.LogCaptureFixture, least: int = logging.WARNING) -> list[tuple[str, str]]:
    ours = [record for record in caplog.records if record.name == "db" and record.levelno >= least]
    lines = [(record.levelname, record.getMessage()) for record in ours]
    caplog.clear()
    return lines


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import db, os, pathlib, time; " + code
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


# --- results ---------------------------------------------------------------------------------


def test_results_are_written_at_once_or_with_the_next_look(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "LOOK", 3.0)
    loop.turn()
    loop.deliver("a")
    assert not loop.turn()  # what it wrote itself is no news
    assert list(loop.orders) == loop.pending == ["b", "c"]
    assert not loop.database.file.changed()

    loop.fail("b")
    loop.deliver("c")
    time.sleep(0.1)  # after the pause that a write is followed by
    assert not loop.turn(idle=False)
    assert loop.pending == ["b", "c"]
    assert "c" in loop.database.deliveries.ids  # that at once
    eventually(lambda: loop.turn(idle=False) or not loop.pending)
    record = {"projectID": "p", "status": 500, "error": "No such item"}
    assert loop.file["failed"]["b"].items() >= record.items()
    assert list(loop.file["failed"]) == ["b"]
    assert loop.database.flush()


def test_a_delivery_is_on_the_disk_before_its_order_leaves(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps, listed = os.fsync, list[tuple[str, bool, bool]](), loop.database.deliveries.path

    def fsync(fd: int) -> None:
        real(fd)
        file = Path(f"/proc/self/fd/{fd}").readlink() if sys.platform == "linux" else Path()
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            there = listed.exists() and "a x.png\n" in listed.read_text()
            steps.append((file.name, there, "a" in loop.pending))

    monkeypatch.setattr(os, "fsync", fsync)
    loop.deliver("a")
    loop.turn()
    assert [step[1:] for step in steps] == [(True, True), (True, True)]
    if sys.platform == "linux":
        assert [step[0] for step in steps] == [".database.json.delivered", ".database.json.tmp"]
    assert loop.pending == ["b", "c"]


def test_killed_in_between_it_is_known_as_delivered(path: Path) -> None:
    code = (
        "database = db.Database(pathlib.Path(sys.argv[1])); database.start(); database.sync(True); "
        "database.delivered('a', 'a.png'); db.change = lambda *_: os.kill(os.getpid(), 9); "
        "database.sync(True)"
    )
    assert process(code, path).wait() == -signal.SIGKILL
    assert "a" in json.loads(path.read_text())["orders"]
    loop = Loop(path)
    assert list(loop.orders) == ["b", "c"]
    loop.turn()
    assert loop.pending == ["b", "c"]


def test_a_list_that_cannot_be_written_keeps_its_orders_and_stops_nothing_else(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    database, path = loop.database, loop.database.file.path
    database.deliveries.path.mkdir()
    loop.deliver("a")
    loop.fail("b")
    loop.turns(0.5)
    assert loop.pending == ["a", "b", "c"]
    assert list(loop.orders) == ["c"]  # the others are not polled again, though
    db.add_order("new", path=path)
    loop.until(lambda: list(loop.orders) == ["c", "new"])
    problem = database.problem
    assert str(database.deliveries.path) in problem
    whole = path.read_text()
    path.write_text("broken")  # another problem besides: they are not said by turns
    loop.turns(2 * db.SAVING)
    path.write_text(whole)
    loop.turns(0.5)
    assert database.problem == problem
    assert sorted(level for level, _ in said(caplog)) == ["ERROR", "WARNING"]  # nor can it be read
    assert not database.flush()
    database.deliveries.path.rmdir()
    loop.until(lambda: loop.pending == ["c", "new"])
    assert "b" in loop.file["failed"]
    assert database.problem == ""
    assert "a" in database.deliveries.ids
    assert said(caplog, logging.INFO) == [("INFO", f"recovered: {problem}")]
    assert database.flush()


def test_writing_takes_a_small_part_of_the_time(loop: Loop) -> None:
    path = loop.database.file.path
    orders = {f"t{number}": {"projectID": "p" * 40} for number in range(20_000)}
    save(path, {"orders": orders, "failed": {}})
    loop.until(lambda: len(loop.orders) == 20_000)
    loop.turns(0.1)
    begun, used, writes, seen = time.monotonic(), time.process_time(), 0, db.version(path)
    number = 0
    while number < 400 or writes < 2:  # where the disk is slow, the second one comes later
        if number < 400:
            loop.deliver(f"t{number}")
        assert number < 10_000
        number += 1
        loop.turn()
        writes, seen = writes + (seen != db.version(path)), db.version(path)
        time.sleep(0.01)
    part = (time.process_time() - used) / (time.monotonic() - begun)
    assert writes <= 8
    assert part < 0.15  # 0.05 for writing, the rest for the list, and the first write is free
    assert loop.database.flush()
    assert len(loop.pending) == 19_600


def test_nothing_to_do_costs_nothing(loop: Loop) -> None:
    loop.database.rejected("a", dict(REJECTED))
    loop.turns(0.5)
    used = time.process_time()
    for _ in range(10_000):
        assert not loop.turn()
    assert time.process_time() - used < 0.3


# --- rejected --------------------------------------------------------------------------------


def test_what_is_rejected_stands_under_failing_as_long_as_it_is_pending(loop: Loop) -> None:
    database = loop.database
    for task_id in ("a", "b", "gone"):
        database.rejected(task_id, dict(REJECTED))
    loop.turn()
    assert loop.file["failing"] == {"a": REJECTED, "b": REJECTED}
    assert loop.pending == ["a", "b", "c"]
    another = {**REJECTED, "error": "Another", "times": 2}
    database.rejected("a", another)
    loop.until(lambda: loop.file["failing"]["a"] == another)
    # It ends as it may: by a delivery, as failed, by hand, or since GraFx accepts it.
    loop.deliver("a")
    loop.until(lambda: loop.file["failing"] == {"b": REJECTED})
    loop.fail("b")
    database.rejected("c", dict(REJECTED))
    loop.until(lambda: loop.file["failing"] == {"c": REJECTED})
    assert database.failing == {"c": REJECTED}  # of orders that are not pending any more it is forgotten
    database.pending("c")
    loop.until(lambda: "failing" not in loop.file)
    database.rejected("c", dict(REJECTED))
    loop.until(lambda: "failing" in loop.file)
    db.remove_order("c", loop.database.file.path)
    loop.until(lambda: not loop.orders)
    assert database.failing == {}  # or it would fail at once where it is added again


def test_what_others_do_to_failing_is_mended(loop: Loop) -> None:
    for task_id in ("a", "b"):
        loop.database.rejected(task_id, dict(REJECTED))
    loop.until(lambda: "failing" in loop.file)
    data = loop.file
    data["failing"] = {"note": "mine", "c": dict(REJECTED), "a": dict(REJECTED)}
    del data["orders"]["a"]
    save(loop.database.file.path, data)
    loop.until(lambda: loop.file["failing"] == {"note": "mine", "b": REJECTED})
    assert loop.pending == ["b", "c"]


@pytest.mark.parametrize("once", [False, True])
def test_rejections_count_on_after_a_restart(path: Path, once: bool) -> None:
    save(path, {"orders": ["a", "b"], "failing": {"a": REJECTED, "gone": REJECTED, "b": "typed"}})
    loop = Loop(path, once)
    assert loop.database.failing == {"a": REJECTED}
    loop.database.rejected("a", {**REJECTED, "times": 2})
    assert loop.database.flush()
    assert loop.file["failing"] == {"b": "typed", "a": {**REJECTED, "times": 2}}


# --- orders that somebody adds again ---------------------------------------------------------


def test_what_was_delivered_is_removed_whoever_adds_it_again(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    before, path = loop.file, loop.database.file.path
    loop.deliver("a")
    loop.until(lambda: loop.pending == ["b", "c"])
    for _ in range(3):
        save(path, before)
        loop.until(lambda: loop.pending == ["b", "c"])
        assert list(loop.orders) == ["b", "c"]
        assert [line for _, line in said(caplog)] == ["a was re-added although delivered; removed again"]
    many: dict[str, Any] = {f"t{number}": {} for number in range(500)}
    save(path, {"orders": many})
    loop.until(lambda: len(loop.orders) == 500)
    loop.deliver(*many)
    loop.until(lambda: not loop.pending)
    assert said(caplog) == []
    save(path, {"orders": many | {"new": {}}})
    loop.until(lambda: loop.pending == list(loop.orders) == ["new"])
    assert [line for _, line in said(caplog)] == [
        "500 orders were re-added although delivered; removed again"
    ]
    save(path, before | {"orders": {**before["orders"], **many}})
    again = Loop(path)
    assert list(again.orders) == ["b", "c"]
    assert again.database.flush()
    assert again.pending == ["b", "c"]


@pytest.mark.parametrize("written", [True, False])
def test_an_order_to_be_delivered_again_is_not_removed(
    loop: Loop, written: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while its first delivery is on the list, but the order still stands in the file."""
    path = loop.database.file.path
    with contextlib.nullcontext() if written else db.lock(path, "lock", 0):
        loop.deliver("a")
        loop.turn()
        assert ("a" in loop.pending) != written
        caplog.clear()
    assert db.retry_orders("a", path) == ["a"]
    loop.until(lambda: "a" in loop.orders)
    assert (loop.orders["a"] == {"projectID": "p"}) != written
    loop.turns(0.5)
    assert "a" in loop.pending
    assert said(caplog) == []
    loop.deliver("a", name="a.pdf")
    loop.until(lambda: "a" not in loop.pending)
    assert loop.database.deliveries.all()["a"][1] == "a.pdf"


def test_each_of_many_retries_is_noticed(loop: Loop) -> None:
    """A process retries an order as soon as it is delivered; this one delivers it as soon as it can."""
    code = (
        "path, left = pathlib.Path(sys.argv[1]), 40\n"
        "while left:\n"
        "    left -= bool(db.retry_orders('a', path))\n"
        "    time.sleep(0.003 * (left % 7))\n"
    )
    other = process(code, loop.database.file.path)
    ended, deliveries, begun = False, 0, time.monotonic()
    while "a" in loop.orders or not ended:
        if "a" in loop.orders:
            deliveries += 1
            loop.deliver("a", name=f"{deliveries}.png")
        ended = other.poll() is not None
        # What it did last has to be noticed soon.
        loop.turns(0.5 if ended else 0.002, idle=deliveries % 2 == 0)
        assert time.monotonic() < begun + 60, f"a retry was lost: {loop.file}, {deliveries}"
    assert other.returncode == 0
    assert deliveries == 41
    loop.until(lambda: "a" not in loop.pending)


# --- others who write ------------------------------------------------------------------------


def test_what_others_change_is_noticed(loop: Loop) -> None:
    db.add_order("new", path=loop.database.file.path)
    loop.until(lambda: list(loop.orders) == ["a", "b", "c", "new"])
    data = loop.file
    del data["orders"]["a"]
    save(loop.database.file.path, data)
    loop.until(lambda: list(loop.orders) == ["b", "c", "new"])
    assert not loop.turns(0.3)


def test_once_looks_no_more_but_writes_into_what_there_is(path: Path) -> None:
    loop = Loop(path, once=True)
    db.add_order("new", path=path)
    assert not loop.turns(0.3)
    loop.deliver("a")
    assert loop.database.flush()
    assert loop.pending == ["b", "c", "new"]


@pytest.mark.parametrize("broken", ["", "\n", '{"orders": {"a": {', "[]", '{"orders": 5}', None])
def test_a_file_that_makes_no_sense_is_said_once_and_left_as_it_is(
    loop: Loop, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """None: it is missing."""
    database, path = loop.database, loop.database.file.path
    loop.turn()
    path.unlink() if broken is None else path.write_text(broken)
    loop.deliver("a")
    loop.fail("b")
    database.rejected("c", dict(REJECTED))
    loop.too_soon()
    assert database.problem == ""  # somebody may be saving it
    loop.turns(2 * db.SAVING)
    (problem,) = said(caplog, logging.INFO)
    assert problem == ("ERROR", database.problem)
    assert str(path) in problem[1]
    assert list(loop.orders) == ["c"]  # what was known is still polled
    assert not database.flush()
    assert (path.read_text() if path.exists() else None) == broken
    save(path, {"orders": ["a", "b", "c", "d"]})
    loop.until(lambda: loop.pending == ["c", "d"])
    assert list(loop.orders) == ["c", "d"]
    assert database.problem == ""
    assert said(caplog, logging.INFO) == [("INFO", f"recovered: {problem[1]}")]
    assert loop.file["failing"] == {"c": REJECTED}


def test_what_is_saved_in_place_just_after_a_write_is_noticed(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a store or `cat` saves, before the poller has looked at what it wrote itself."""
    real, mine = db.sync_folder, json.dumps({"orders": ["b", "typed"]})

    def sync_folder(folder: Path) -> None:
        if "a" not in loop.pending:  # else it is the folder of the list, which is new
            loop.database.file.path.write_text(mine)
        real(folder)

    monkeypatch.setattr(db, "sync_folder", sync_folder)
    loop.deliver("a")
    loop.until(lambda: list(loop.orders) == ["b", "typed"])
    assert loop.pending == ["b", "typed"]


def test_a_slow_writer_loses_nothing(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """It empties the file, takes its time, and writes it in pieces."""
    whole = json.dumps({"orders": ["a", "b", "c", "typed"]})
    loop.deliver("a")
    with loop.database.file.path.open("w") as file:
        loop.turns(3 * db.SAVING)
        for begin in range(0, len(whole), 8):
            file.write(whole[begin : begin + 8])
            file.flush()
            loop.turns(0.1)
            assert "typed" not in loop.orders or begin + 8 >= len(whole)
    loop.until(lambda: loop.pending == list(loop.orders) == ["b", "c", "typed"])
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("ahead", [3600, 1, -3600])
def test_a_half_saved_file_is_known_with_any_clock(
    loop: Loop, ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole, path = '{"orders": ["a", "b", "c", "typed"]}', loop.database.file.path
    for half in ("", whole[:9]):
        path.write_text(half)
        os.utime(path, (time.time() + ahead,) * 2)
        assert not loop.too_soon()
    assert said(caplog) == []
    path.write_text(whole)
    loop.until(lambda: "typed" in loop.orders)


def test_a_file_that_is_moved_aside_is_waited_for(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    path = loop.database.file.path
    aside = path.with_name("aside")
    for task_id in "abc":
        path.rename(aside)
        loop.deliver(task_id)
        assert not loop.too_soon()
        assert not path.exists()
        aside.rename(path)
        loop.until(lambda task_id=task_id: task_id not in loop.pending)  # type: ignore[misc]
    assert said(caplog) == []


@contextmanager
def held(path: Path) -> Iterator[tuple[subprocess.Popen[str], Callable[[], None]]]:
    """Another process has the lock; and how to end it."""
    code = "path = pathlib.Path(sys.argv[1])\nwith db.lock(path, 'lock', 5) as held:\n    db.note(held); "
    with process(code + "print('held', flush=True); sys.stdin.read()", path) as other:
        assert other.stdout and other.stdin
        other.stdout.readline()
        yield other, other.stdin.close


def test_a_lock_that_another_has_is_no_error(
    loop: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "PATIENCE", 1.0)
    database = loop.database
    with held(database.file.path) as (other, release):
        loop.deliver("a")
        end, longest = time.monotonic() + 0.7, 0.0
        while time.monotonic() < end:
            begun = time.monotonic()
            loop.turn()
            longest = max(longest, time.monotonic() - begun)
        assert longest < 0.4
        assert "a" in database.deliveries.ids
        save(database.file.path, {"orders": ["a", "b", "c", "typed"]})  # an editor knows of no lock
        loop.until(lambda: "typed" in loop.orders)
        assert said(caplog, logging.INFO) == []
        loop.turns(3)
        ((level, line),) = said(caplog)
        assert level == "ERROR"
        assert f"process {other.pid}, " in line
        assert database.problem == line
        begun = time.monotonic()
        assert not database.flush()
        assert time.monotonic() - begun < 2
        release()
    loop.until(lambda: "a" not in loop.pending)
    assert database.problem == ""


def test_a_lock_that_nobody_waits_for_any_more_is_no_problem(
    loop: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "PATIENCE", 0.0)
    with held(loop.database.file.path) as (_, release):
        loop.deliver("a")
        loop.until(lambda: loop.database.problem)
        save(loop.database.file.path, {"orders": ["b", "c"]})  # somebody else removed it
        loop.until(lambda: not loop.database.problem)
        (problem, over) = said(caplog, logging.INFO)
        assert over == ("INFO", f"recovered: {problem[1]}")
        release()


def test_the_last_write_waits_for_a_lock_however_long_another_has_had_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(path, once=True)
    with held(path) as (_, release), monkeypatch.context() as impatient:
        impatient.setattr(db, "PATIENCE", 0.0)
        loop.fail("a")
        loop.until(lambda: loop.database.problem)
        impatient.undo()
        threading.Timer(0.5, release).start()
        assert loop.database.flush()
    assert "a" in loop.file["failed"]


def test_the_last_write_waits_for_an_editor_that_saves(path: Path) -> None:
    loop = Loop(path, once=True)
    path.write_text('{"orders": ')
    loop.fail("a")
    threading.Timer(db.SAVING / 2, save, (path, {"orders": ["a", "b"]})).start()
    assert loop.database.flush()
    assert list(loop.file["failed"]) == ["a"]


def test_a_folder_that_takes_no_file_is_said_once(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    path = loop.database.file.path
    temp = path.with_name(".database.json.tmp")
    (temp / "x").mkdir(parents=True)
    loop.fail("a")
    loop.turns(0.5)
    save(path, {"orders": ["a", "b", "typed"]})
    loop.until(lambda: list(loop.orders) == ["b", "typed"])
    loop.turns(0.5)
    ((level, line),) = said(caplog, logging.INFO)
    assert (level, line) == ("ERROR", loop.database.problem)
    assert str(path) in line
    assert not loop.database.flush()
    (temp / "x").rmdir()
    temp.rmdir()
    loop.until(lambda: loop.pending == ["b", "typed"])
    assert (loop.database.problem, said(caplog, logging.INFO)) == ("", [("INFO", f"recovered: {line}")])


def test_a_write_that_is_not_needed_any_more_is_no_problem(loop: Loop) -> None:
    temp = loop.database.file.path.with_name(".database.json.tmp")
    (temp / "x").mkdir(parents=True)
    loop.database.rejected("a", {"status": 500})
    loop.until(lambda: loop.database.problem)
    loop.database.pending("a")  # GraFx accepts it
    loop.until(lambda: not loop.database.problem)


def test_a_broken_file_of_ten_megabytes_costs_little(loop: Loop) -> None:
    loop.database.file.path.write_text('{"orders": [' + '"x", ' * 2_000_000 + "]}")
    loop.turns(1.0)
    assert loop.database.problem
    used = time.process_time()
    loop.turns(2.0, idle=False)
    assert time.process_time() - used < 0.1


def test_programs_that_add_all_the_while_are_noticed_and_do_not_keep_the_poller_out(loop: Loop) -> None:
    code = "[db.add_order(f'{sys.argv[2]}-{n}', path=pathlib.Path(sys.argv[1])) for n in range(150)]"
    others = [process(code, loop.database.file.path, name) for name in ("x", "y", "z")]
    delivered, ended = set[str](), False
    while loop.orders or not ended:
        delivered |= loop.orders.keys()
        loop.deliver(*list(loop.orders))
        ended = all(other.poll() is not None for other in others)  # then the last is noticed soon
        loop.turns(0.5 if ended else 0.01)
    assert [other.wait() for other in others] == [0, 0, 0]
    assert delivered == {"a", "b", "c"} | {f"{name}-{n}" for name in "xyz" for n in range(150)}
    loop.until(lambda: not loop.pending)
