"""`db.Database`: what the poller's loop needs of database.json, with other processes in between."""

from __future__ import annotations

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

REFUSED = {"status": 500, "error": "No such item", "since": "2026-01-01T00:00:00Z", "times": 1}


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


@pytest.fixture
def database(path: Path, caplog: pytest.LogCaptureFixture) -> db.Database:
    database = db.Database(path)
    assert list(database.start().orders) == ["a", "b", "c"]
    caplog.clear()
    return database


def save(path: Path, data: Any) -> None:
    """As an editor saves that replaces the file."""
    temp = path.with_name("edited")
    temp.write_text(data if isinstance(data, str) else json.dumps(data))
    temp.replace(path)


def content(database: db.Database) -> Any:
    return json.loads(database.path.read_text())


def turns(database: db.Database, seconds: float, soon: bool = True) -> db.Store | None:
    """Let the loop turn for a while; the last that it was told."""
    last, end = None, time.monotonic() + seconds
    while time.monotonic() < end:
        last = database.sync(soon) or last
        time.sleep(0.01)
    return last


def too_soon(database: db.Database) -> db.Store | None:
    """Let the loop turn while SAVING cannot be over, however slow the machine is."""
    saving, db.SAVING = db.SAVING, 600.0
    try:
        return turns(database, saving / 2)
    finally:
        db.SAVING = saving


def told(database: db.Database, right: Callable[[db.Store], Any]) -> db.Store:
    """Let the loop turn until it is told what is right."""

    def turn() -> db.Store | None:
        store = database.sync(True)
        return store if store and right(store) else None

    store: db.Store = eventually(turn, "what the loop is told", 10)
    return store


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


# --- what came of the orders -----------------------------------------------------------------


def test_outcomes_are_written_at_once_or_with_the_next_look(
    database: db.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "LOOK", 3.0)
    database.sync(True)
    database.delivered["a"] = "a.png"
    store = database.sync(True)
    assert store and list(store.orders) == list(content(database)["orders"]) == ["b", "c"]
    assert not database.watch.changed()
    assert database.sync(True) is None  # what it wrote itself is no news

    database.failed["b"], database.delivered["c"] = (500, "No such item"), "c.png"
    time.sleep(0.1)  # after the pause that a write is followed by
    assert database.sync(False) is None
    assert list(content(database)["orders"]) == ["b", "c"]
    assert "c" in database.deliveries.ids  # that at once
    eventually(lambda: database.sync(False))
    assert (database.delivered, database.failed) == ({}, {})
    data = content(database)
    assert data["orders"] == {}
    assert data["failed"]["b"].items() >= {"projectID": "p", "status": 500, "error": "No such item"}.items()


def test_a_delivery_is_on_the_disk_before_its_order_leaves(
    database: db.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = os.fsync, list[tuple[str, bool, bool]]()

    def fsync(fd: int) -> None:
        real(fd)
        file = Path(f"/proc/self/fd/{fd}").readlink() if sys.platform == "linux" else Path()
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            listed = database.deliveries.path.exists() and "a a.png\n" in database.deliveries.path.read_text()
            steps.append((file.name, listed, "a" in content(database)["orders"]))

    monkeypatch.setattr(os, "fsync", fsync)
    database.delivered["a"] = "a.png"
    database.sync(True)
    assert [step[1:] for step in steps] == [(True, True), (True, True)]
    if sys.platform == "linux":
        assert [step[0] for step in steps] == [".database.json.delivered", ".database.json.tmp"]
    assert list(content(database)["orders"]) == ["b", "c"]


def test_killed_in_between_it_is_known_as_delivered(path: Path) -> None:
    code = (
        "database = db.Database(pathlib.Path(sys.argv[1])); database.start(); database.sync(True); "
        "database.delivered['a'] = 'a.png'; database._turn.write = 1e9; database.sync(True); "
        "print('listed', flush=True); time.sleep(60)"
    )
    killed = process(code, path)
    assert killed.stdout and killed.stdout.readline() == "listed\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert "a" in json.loads(path.read_text())["orders"]
    database = db.Database(path)
    assert list(database.start().orders) == ["b", "c"]
    database.sync(True)
    assert list(content(database)["orders"]) == ["b", "c"]


def test_a_list_that_cannot_be_written_keeps_the_order_and_stops_nothing_else(
    database: db.Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.deliveries.path.mkdir()
    database.delivered["a"], database.failed["b"] = "a.png", (500, "no")
    store = told(database, lambda store: True)
    assert list(store.orders) == ["c"]  # it is not asked about again, though
    assert list(content(database)["orders"]) == ["a", "c"]
    db.add_order("new", path=database.path)
    assert list(told(database, lambda store: "new" in store.orders).orders) == ["c", "new"]
    turns(database, 0.5)
    assert str(database.deliveries.path) in database.problem
    assert sorted(level for level, _ in said(caplog)) == ["ERROR", "WARNING"]  # nor can it be read
    assert not database.flush()
    database.deliveries.path.rmdir()
    told(database, lambda store: "a" not in content(database)["orders"])
    assert database.problem == ""
    assert "a" in database.deliveries.ids
    assert [line for line in said(caplog, logging.INFO) if line[1].startswith("over: ")]
    assert database.flush()


def test_writing_takes_a_small_part_of_the_time(database: db.Database) -> None:
    orders = {f"t{number}": {"projectID": "p" * 40} for number in range(20_000)}
    save(database.path, {"orders": orders, "failed": {}})
    told(database, lambda store: len(store.orders) == 20_000)
    turns(database, 0.1)
    begun, used, writes, seen = time.monotonic(), time.process_time(), 0, db.version(database.path)
    number = 0
    while number < 400 or writes < 2:  # where the disk is slow, the second one comes later
        if number < 400:
            database.delivered[f"t{number}"] = "x.png"
        assert number < 10_000
        number += 1
        database.sync(True)
        writes, seen = writes + (seen != db.version(database.path)), db.version(database.path)
        time.sleep(0.01)
    part = (time.process_time() - used) / (time.monotonic() - begun)
    assert writes <= 8
    assert part < 0.15  # 0.05 for writing, the rest for the list, and the first write is free
    assert database.flush()
    assert len(content(database)["orders"]) == 19_600


def test_nothing_to_do_costs_nothing(database: db.Database) -> None:
    database.failing["a"] = dict(REFUSED)
    turns(database, 0.5)
    used = time.process_time()
    for _ in range(10_000):
        assert database.sync(True) is None
    assert time.process_time() - used < 0.3


# --- failing ---------------------------------------------------------------------------------


def test_what_is_refused_stands_under_failing_as_long_as_it_waits(database: db.Database) -> None:
    database.failing = {"a": dict(REFUSED), "b": dict(REFUSED), "gone": dict(REFUSED)}
    database.sync(True)
    assert content(database)["failing"] == {"a": REFUSED, "b": REFUSED}
    assert list(content(database)["orders"]) == ["a", "b", "c"]
    database.failing["a"] |= {"error": "Another", "times": 2}
    told(database, lambda store: store.failing["a"]["error"] == "Another")
    assert content(database)["failing"]["a"] == {**REFUSED, "error": "Another", "times": 2}
    # It ends as it may: by a delivery, as failed, by hand, or since GraFx thought better of it.
    database.delivered["a"] = "a.png"
    store = told(database, lambda store: "a" not in store.orders)
    assert store.failing == {"b": REFUSED}
    database.failed["b"] = (500, "No such item")
    database.failing["c"] = dict(REFUSED)
    told(database, lambda store: "b" not in store.orders)
    assert content(database)["failing"] == {"c": REFUSED}
    assert database.failing == {"c": REFUSED}  # of orders that wait no more it is forgotten
    del database.failing["c"]
    told(database, lambda store: "failing" not in store.data)
    assert "failing" not in content(database)


def test_what_others_do_to_failing_is_mended(database: db.Database) -> None:
    database.failing = {"a": dict(REFUSED), "b": dict(REFUSED)}
    told(database, lambda store: store.failing)
    data = content(database)
    data["failing"] = {"note": "mine", "c": dict(REFUSED), "a": dict(REFUSED)}
    del data["orders"]["a"]
    save(database.path, data)
    told(database, lambda store: store.failing == {"b": REFUSED})
    assert content(database)["failing"] == {"note": "mine", "b": REFUSED}
    assert list(content(database)["orders"]) == ["b", "c"]


@pytest.mark.parametrize("once", [False, True])
def test_refusals_count_on_after_a_restart(path: Path, once: bool) -> None:
    save(path, {"orders": ["a", "b"], "failing": {"a": REFUSED, "gone": REFUSED, "b": "typed"}})
    database = db.Database(path, once)
    database.start()
    assert database.failing == {"a": REFUSED}
    database.failing["a"]["times"] += 1
    assert database.flush()
    assert content(database)["failing"] == {"b": "typed", "a": {**REFUSED, "times": 2}}


# --- orders that somebody brings back --------------------------------------------------------


def test_what_was_delivered_is_taken_out_whoever_brings_it_back(
    database: db.Database, caplog: pytest.LogCaptureFixture
) -> None:
    before = content(database)
    database.delivered["a"] = "a.png"
    told(database, lambda store: "a" not in store.orders)
    for _ in range(3):
        save(database.path, before)
        store = told(database, lambda store: True)
        assert list(store.orders) == ["b", "c"]
        eventually(lambda: database.sync(True) or "a" not in content(database)["orders"])
        assert [line for _, line in said(caplog)] == [
            "a had been delivered and was brought back, by hand or by a store; taken out"
        ]
    many: dict[str, Any] = {f"t{number}": {} for number in range(500)}
    save(database.path, {"orders": many})
    told(database, lambda store: len(store.orders) == 500)
    database.delivered = dict.fromkeys(many, "x.png")
    told(database, lambda store: content(database)["orders"] == {})
    assert said(caplog) == []
    save(database.path, {"orders": many | {"new": {}}})
    eventually(lambda: database.sync(True) or list(content(database)["orders"]) == ["new"])
    assert [line for _, line in said(caplog)] == [
        "500 orders that had been delivered were brought back, by hand or by a store; taken out"
    ]
    save(database.path, before | {"orders": {**before["orders"], **many}})
    again = db.Database(database.path)
    assert list(again.start().orders) == ["b", "c"]
    assert again.flush()
    assert list(content(again)["orders"]) == ["b", "c"]


@pytest.mark.parametrize("written", [True, False])
def test_an_order_to_be_had_again_is_not_taken_out(
    database: db.Database, written: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while what came of it the first time is on the list, but the order still stands in the file."""
    database._turn.write = 0.0 if written else time.monotonic() + 1
    database.delivered["a"] = "a.png"
    database.sync(True)
    assert ("a" in content(database)["orders"]) != written
    assert db.retry_orders("a", database.path) == ["a"]
    store = told(database, lambda store: "a" in store.orders)
    assert (store.orders["a"] == {"projectID": "p"}) != written
    database._turn.write = 0.0
    turns(database, 0.5)
    assert "a" in content(database)["orders"]
    assert said(caplog) == []
    database.delivered["a"] = "a.pdf"
    told(database, lambda store: "a" not in store.orders)
    assert "a" not in content(database)["orders"]
    delivered = database.deliveries.last("a")
    assert delivered and delivered[1] == "a.pdf"


def test_each_of_many_retries_is_heard(database: db.Database) -> None:
    """A process wants an order again as soon as it is delivered; this one delivers it as soon as it waits."""
    code = (
        "path, left = pathlib.Path(sys.argv[1]), 40\n"
        "while left:\n"
        "    left -= bool(db.retry_orders('a', path))\n"
        "    time.sleep(0.003 * (left % 7))\n"
    )
    other = process(code, database.path)
    waits, ended, deliveries, begun = True, False, 0, time.monotonic()
    while waits or not ended:
        if waits:
            deliveries += 1
            database.delivered["a"] = f"{deliveries}.png"
        ended = other.poll() is not None  # then what it did last has to be heard within half a second
        store = turns(database, 0.5 if ended else 0.002, soon=deliveries % 2 == 0)
        waits = bool(store and "a" in store.orders)
        assert time.monotonic() < begun + 60, f"a retry was lost: {content(database)}, {deliveries}"
    assert other.returncode == 0
    assert deliveries == 41
    assert "a" not in content(database)["orders"]


# --- others who write ------------------------------------------------------------------------


def test_what_others_change_is_noticed(database: db.Database) -> None:
    db.add_order("new", path=database.path)
    assert list(told(database, lambda store: True).orders) == ["a", "b", "c", "new"]
    data = content(database)
    del data["orders"]["a"]
    save(database.path, data)
    assert list(told(database, lambda store: True).orders) == ["b", "c", "new"]
    assert turns(database, 0.3) is None


def test_once_looks_no_more_but_writes_into_what_there_is(path: Path) -> None:
    database = db.Database(path, once=True)
    database.start()
    db.add_order("new", path=path)
    assert turns(database, 0.3) is None
    database.delivered["a"] = "a.png"
    assert database.flush()
    assert list(content(database)["orders"]) == ["b", "c", "new"]


@pytest.mark.parametrize(
    "broken", ["", "\n", '{"orders": {"a": {', "[]", '{"orders": {}, "x": 1e999}', '{"orders": 5}']
)
def test_a_broken_file_is_said_once_and_left_as_it_is(
    database: db.Database, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    database.sync(True)
    database.path.write_text(broken)
    database.delivered["a"], database.failed["b"] = "a.png", (500, "no")
    database.failing["c"] = dict(REFUSED)
    assert too_soon(database) is None
    assert database.problem == ""  # somebody may be saving it
    assert turns(database, 2 * db.SAVING) is None
    (problem,) = said(caplog, logging.INFO)
    assert problem == ("ERROR", database.problem)
    assert str(database.path) in problem[1]
    assert not database.flush()
    assert database.path.read_text() == broken
    save(database.path, {"orders": ["a", "b", "c", "d"]})
    store = told(database, lambda store: content(database)["orders"] == ["c", "d"])
    assert list(store.orders) == ["c", "d"]
    assert database.problem == ""
    assert said(caplog, logging.INFO) == [("INFO", f"over: {problem[1]}")]
    assert content(database)["failing"] == {"c": REFUSED}


def test_what_is_saved_in_place_just_after_a_write_is_noticed(
    database: db.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a store or `cat` saves, before the poller has looked at what it wrote itself."""
    real, mine = db.sync_folder, json.dumps({"orders": ["b", "typed"]})

    def sync_folder(folder: Path) -> None:
        if "a" not in content(database)["orders"]:  # else it is the folder of the list, which is new
            database.path.write_text(mine)
        real(folder)

    monkeypatch.setattr(db, "sync_folder", sync_folder)
    database.delivered["a"] = "a.png"
    store = told(database, lambda store: "typed" in store.orders)
    assert list(store.orders) == ["b", "typed"]
    assert content(database)["orders"] == ["b", "typed"]


def test_a_slow_writer_loses_nothing(database: db.Database, caplog: pytest.LogCaptureFixture) -> None:
    """It empties the file, takes its time, and writes it in pieces."""
    whole = json.dumps({"orders": ["a", "b", "c", "typed"]})
    database.delivered["a"] = "a.png"
    with database.path.open("w") as file:
        turns(database, 3 * db.SAVING)
        for begin in range(0, len(whole), 8):
            file.write(whole[begin : begin + 8])
            file.flush()
            store = turns(database, 0.1)
            assert store is None or begin + 8 >= len(whole)
    store = store or told(database, lambda store: True)
    assert list(store.orders) == ["b", "c", "typed"]
    eventually(lambda: database.sync(True) or content(database)["orders"] == ["b", "c", "typed"])
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("ahead", [3600, 1, -3600])
def test_a_half_saved_file_is_known_with_any_clock(
    database: db.Database, ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = '{"orders": ["a", "b", "c", "typed"]}'
    for half in ("", whole[:9]):
        database.path.write_text(half)
        os.utime(database.path, (time.time() + ahead,) * 2)
        assert too_soon(database) is None
    assert said(caplog) == []
    database.path.write_text(whole)
    assert "typed" in told(database, lambda store: True).orders


def test_a_file_that_is_moved_aside_is_missed_only_after_a_while(
    database: db.Database, caplog: pytest.LogCaptureFixture
) -> None:
    aside = database.path.with_name("aside")
    for _ in range(3):
        database.path.rename(aside)
        database.delivered["a"] = "a.png"
        assert too_soon(database) is None
        assert not database.path.exists()
        aside.rename(database.path)
        eventually(lambda: database.sync(True) or list(content(database)["orders"]) == ["b", "c"])
    database.path.rename(aside)
    database.failed["b"] = (500, "no")
    store = told(database, lambda store: True)
    assert store.orders == {}
    assert database.failed == {}
    assert not database.path.exists()
    assert said(caplog) == [
        ("WARNING", f"{database.path} is missing: that counts as no orders. Put it back.")
    ]
    aside.rename(database.path)
    assert list(told(database, lambda store: True).orders) == ["b", "c"]


@contextmanager
def held(path: Path) -> Iterator[tuple[subprocess.Popen[str], Callable[[], None]]]:
    """Another process has the lock; and how to end it."""
    code = "path = pathlib.Path(sys.argv[1])\nwith db.lock(path, 'lock', 5):\n    "
    with process(code + "print('held', flush=True); sys.stdin.read()", path) as other:
        assert other.stdout and other.stdin
        other.stdout.readline()
        yield other, other.stdin.close


def test_a_lock_that_another_has_is_no_error(
    database: db.Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "PATIENCE", 1.0)
    with held(database.path) as (other, let_go):
        database.delivered["a"] = "a.png"
        end, longest = time.monotonic() + 0.7, 0.0
        while time.monotonic() < end:
            begun = time.monotonic()
            database.sync(True)
            longest = max(longest, time.monotonic() - begun)
        assert longest < 0.4
        assert "a" in database.deliveries.ids
        save(database.path, {"orders": ["a", "b", "c", "typed"]})  # an editor knows of no lock
        assert "typed" in told(database, lambda store: True).orders
        assert said(caplog, logging.INFO) == []
        turns(database, 3)
        ((level, line),) = said(caplog)
        assert level == "WARNING"
        name = Path(f"/proc/{other.pid}/comm").read_text().strip() if sys.platform == "linux" else ""
        assert f"process {other.pid} ({name})" in line
        assert database.problem == line
        begun = time.monotonic()
        assert not database.flush()
        assert time.monotonic() - begun < 2
        let_go()
    told(database, lambda store: "a" not in content(database)["orders"])
    assert database.problem == ""


def test_a_lock_that_nobody_waits_for_any_more_is_no_problem(
    database: db.Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "PATIENCE", 0.0)
    with held(database.path) as (_, let_go):
        database.delivered["a"] = "a.png"
        eventually(lambda: database.sync(True) or database.problem)
        save(database.path, {"orders": ["b", "c"]})  # somebody else took it out
        eventually(lambda: database.sync(True) or not database.problem)
        (problem, over) = said(caplog, logging.INFO)
        assert over == ("INFO", f"over: {problem[1]}")
        let_go()


def test_the_last_write_waits_for_a_lock_however_long_another_has_had_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = db.Database(path, once=True)
    database.start()
    with held(path) as (_, let_go), monkeypatch.context() as impatient:
        impatient.setattr(db, "PATIENCE", 0.0)
        database.failed["a"] = (500, "no")
        eventually(lambda: database.sync(True) or database.problem)
        impatient.undo()
        threading.Timer(0.5, let_go).start()
        assert database.flush()
    assert "a" in content(database)["failed"]


def test_a_folder_that_takes_no_file_is_said_once(
    database: db.Database, caplog: pytest.LogCaptureFixture
) -> None:
    temp = database.path.with_name(".database.json.tmp")
    (temp / "x").mkdir(parents=True)
    database.failed["a"] = (500, "no")
    turns(database, 0.5)
    db.sync_folder(database.path.parent)
    save(database.path, {"orders": ["a", "b", "typed"]})
    assert list(told(database, lambda store: True).orders) == ["b", "typed"]
    turns(database, 0.5)
    ((level, line),) = said(caplog, logging.INFO)
    assert (level, line) == ("ERROR", database.problem)
    assert str(database.path) in line
    assert not database.flush()
    (temp / "x").rmdir()
    temp.rmdir()
    told(database, lambda store: content(database)["orders"] == ["b", "typed"])
    assert (database.problem, said(caplog, logging.INFO)) == ("", [("INFO", f"over: {line}")])


def test_a_write_that_is_not_needed_any_more_is_no_problem(database: db.Database) -> None:
    temp = database.path.with_name(".database.json.tmp")
    (temp / "x").mkdir(parents=True)
    database.failing["a"] = {"status": 500}
    eventually(lambda: database.sync(True) or database.problem)
    del database.failing["a"]  # GraFx has taken that back
    eventually(lambda: database.sync(True) or not database.problem)


def test_a_broken_file_of_ten_megabytes_costs_little(database: db.Database) -> None:
    database.path.write_text('{"orders": [' + '"x", ' * 2_000_000 + "]}")
    turns(database, 1.0)
    assert database.problem
    used = time.process_time()
    turns(database, 2.0, soon=False)
    assert time.process_time() - used < 0.1


def test_programs_that_add_all_the_while_are_heard_and_do_not_keep_the_poller_out(
    database: db.Database,
) -> None:
    code = "[db.add_order(f'{sys.argv[2]}-{n}', path=pathlib.Path(sys.argv[1])) for n in range(150)]"
    others = [process(code, database.path, name) for name in ("x", "y", "z")]
    delivered, known, ended = set[str](), {"a", "b", "c"}, False
    while known or not ended:
        database.delivered.update(dict.fromkeys(known, "x.png"))
        delivered |= known
        ended = all(other.poll() is not None for other in others)  # then the last is heard soon
        store = turns(database, 0.5 if ended else 0.01)
        known = set(store.orders) - delivered if store else set()
    assert [other.wait() for other in others] == [0, 0, 0]
    assert delivered == {"a", "b", "c"} | {f"{name}-{n}" for name in "xyz" for n in range(150)}
    eventually(lambda: database.sync(True) or content(database)["orders"] == {})
