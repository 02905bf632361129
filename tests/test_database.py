"""`db.Database`: what the poller's loop needs of database.json, with other processes in between."""

from __future__ import annotations

import json
import logging
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
    """It looks at the file more often; what makes no sense counts as broken at once."""
    monkeypatch.setattr(db, "LOOK", 0.1)
    monkeypatch.setattr(db, "SAVING", 0.0)
    caplog.set_level(logging.INFO, "db")


class Loop:
    """What the poller's loop does with a Database, and the orders that it knows."""

    def __init__(self, path: Path) -> None:
        self.database = db.Database(path, prove=False)
        self.orders, gone = self.database.sync(idle=True)
        assert self.database.loaded and not gone

    def turn(self) -> None:
        new, gone = self.database.sync(idle=True)
        assert not new.keys() & self.orders.keys()
        assert gone <= self.orders.keys()
        self.orders = {name: given for name, given in (self.orders | new).items() if name not in gone}

    def until(self, true: Callable[[], Any]) -> None:
        """Turn until it is true."""

        def turn() -> bool:
            self.turn()
            return bool(true())

        eventually(turn, "what the loop knows or the file says")

    def look(self, times: int = 5) -> None:
        """Turn until it has looked at the file so many times."""
        for _ in range(times):
            before = self.database._look
            self.until(lambda before=before: self.database._look > before)

    def deliver(self, task_id: str, name: str = "x.png") -> None:
        self.orders.pop(task_id, None)
        self.database.delivered(task_id, name)

    def fail(self, task_id: str) -> None:
        self.orders.pop(task_id, None)
        self.database.failed(task_id, 500, "No such item")

    @property
    def path(self) -> Path:
        return self.database.file.path

    @property
    def file(self) -> Any:
        return json.loads(self.path.read_text())

    @property
    def pending(self) -> list[str]:
        """In the file."""
        return list(self.file["orders"])


@pytest.fixture
def loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Loop:
    path = tmp_path / "database.json"
    save(path, {"orders": {name: {"projectID": "p"} for name in "abc"}, "failed": {}})
    loop = Loop(path)
    assert list(loop.orders) == ["a", "b", "c"]
    caplog.clear()
    return loop


def save(path: Path, data: Any) -> None:
    """As an editor saves that replaces the file."""
    temp = path.with_name("edited")
    temp.write_text(json.dumps(data))
    temp.replace(path)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    lines = [(one.levelname, one.getMessage()) for one in caplog.records if one.name == "db"]
    caplog.clear()
    return lines


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import db, pathlib, time; " + code
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@contextmanager
def held(path: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """Another process has the lock: its number, and how to end it."""
    code = "path = pathlib.Path(sys.argv[1])\nwith db.lock(path, 'lock', 5) as held:\n    db.note(held); "
    with process(code + "print('held', flush=True); sys.stdin.read()", path) as other:
        assert other.stdout and other.stdin
        other.stdout.readline()
        try:
            yield other.pid, other.stdin.close
        finally:
            other.kill()


def test_what_others_do_to_failing_is_mended(loop: Loop) -> None:
    for task_id in ("a", "b"):
        loop.database.rejected(task_id, dict(REJECTED))
    loop.until(lambda: "failing" in loop.file)
    data = loop.file
    data["failing"] = {"note": "mine", "c": dict(REJECTED), "a": dict(REJECTED)}
    del data["orders"]["a"]
    save(loop.path, data)
    loop.until(lambda: loop.file["failing"] == {"note": "mine", "b": REJECTED})
    assert loop.pending == ["b", "c"]
    assert loop.database.failing.keys() == {"b"}  # or `a` would fail at once where it is added again


def test_a_write_is_followed_by_a_pause_as_long_as_nineteen_of_it(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writes = db.change, list[tuple[float, float]]()

    def change(*given: Any) -> db.Store:
        begun = time.monotonic()
        store = real(*given)
        writes.append((begun, time.monotonic()))
        return store

    monkeypatch.setattr(db, "change", change)
    for task_id in "ab":
        loop.deliver(task_id)
        loop.until(lambda task_id=task_id: task_id not in loop.pending)
    (begun, ended), (later, _) = writes
    assert later - ended >= (db.SHARE - 1) * (ended - begun)


def test_a_retry_is_no_readded_order_though_the_first_delivery_still_stands_in_the_file(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    with db.lock(loop.path, "lock", 0):
        loop.deliver("a")
        loop.turn()
        assert "a" in loop.pending and "a" in loop.database.deliveries.ids
    assert db.retry_orders("a", loop.path) == ["a"]
    loop.until(lambda: "a" in loop.orders)
    loop.look()
    assert "a" in loop.pending
    assert said(caplog) == []
    loop.deliver("a", name="a.pdf")
    loop.until(lambda: "a" not in loop.pending)
    assert loop.database.deliveries.all()["a"][1] == "a.pdf"


def test_each_of_many_retries_is_noticed(loop: Loop) -> None:
    """A process retries an order as soon as it is delivered; this one delivers it as soon as it can."""
    code = (
        "path, left = pathlib.Path(sys.argv[1]), 15\n"
        "while left:\n"
        "    left -= bool(db.retry_orders('a', path))\n"
        "    time.sleep(0.003 * (left % 7))\n"
    )
    with process(code, loop.path) as other:
        for number in range(15):
            loop.deliver("a", name=f"{number}.png")
            loop.until(lambda: "a" in loop.orders)
        assert other.wait(60) == 0
    loop.deliver("a")
    loop.until(lambda: "a" not in loop.pending)


def test_what_is_saved_in_place_just_after_a_write_is_noticed(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a store or `cat` saves, before the poller has looked at what it wrote itself."""
    real, mine = db.sync_folder, json.dumps({"orders": ["b", "typed"]})

    def sync_folder(folder: Path) -> None:
        if "a" not in loop.pending:  # else it is the folder of the list, which is new
            loop.path.write_text(mine)
        real(folder)

    monkeypatch.setattr(db, "sync_folder", sync_folder)
    loop.deliver("a")
    loop.until(lambda: list(loop.orders) == ["b", "typed"])
    assert loop.pending == ["b", "typed"]


def test_a_lock_that_another_has_is_an_error_only_after_a_while(
    loop: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = loop.database
    monkeypatch.setattr(db, "PATIENCE", 600.0)
    with held(loop.path) as (pid, release):
        loop.deliver("a")
        loop.until(lambda: "a" in database.deliveries.ids)
        save(loop.path, {"orders": ["a", "b", "c", "typed"]})  # an editor knows of no lock
        loop.until(lambda: "typed" in loop.orders)
        assert said(caplog) == []
        monkeypatch.setattr(db, "PATIENCE", 0.0)
        loop.until(lambda: database.problem)
        loop.look()
        ((level, line),) = said(caplog)
        assert (level, line) == ("ERROR", database.problem)
        assert f"process {pid}, " in line
        save(loop.path, {"orders": ["b", "c", "typed"]})  # somebody else removed it
        loop.until(lambda: not database.problem)
        assert said(caplog) == [("INFO", f"recovered: {line}")]
        loop.fail("b")
        loop.until(lambda: database.problem)
        assert database.flush(0.5) == 1
        threading.Timer(0.5, release).start()
        assert database.flush(30.0) == 0  # the last write waits, however long another has had it
    assert (loop.pending, list(loop.file["failed"])) == (["c", "typed"], ["b"])


def test_the_last_write_waits_for_an_editor_that_saves(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "SAVING", 60.0)
    loop.path.write_text('{"orders": ')
    loop.fail("a")
    threading.Timer(0.2, save, (loop.path, {"orders": ["a", "b"]})).start()
    assert loop.database.flush(30.0) == 0
    assert list(loop.file["failed"]) == ["a"]


def test_a_write_that_is_not_needed_any_more_is_no_problem(loop: Loop) -> None:
    (loop.path.with_name(".database.json.tmp") / "x").mkdir(parents=True)
    loop.database.rejected("a", {"status": 500})
    loop.until(lambda: loop.database.problem)
    loop.database.pending("a")  # GraFx accepts it
    loop.until(lambda: not loop.database.problem)


def test_a_broken_file_is_parsed_once(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is looked at, and though there is something to write."""
    loop.path.write_text('{"orders": [')
    loop.fail("a")
    loop.until(lambda: loop.database.problem)
    monkeypatch.setattr(db, "_parse", None)  # a call would raise
    loop.look()
