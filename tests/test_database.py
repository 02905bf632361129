"""What the running poller writes into database.json and what it notices there, with others beside it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from conftest import QUICK, Home, eventually

import db


def test_what_others_do_to_failing_is_mended(home: Home) -> None:
    removed, stays, fine = home.grafx.add("failed"), home.grafx.add("failed"), home.grafx.add("never")
    old = {"status": 500, "error": "x", "since": "2020-01-01T00:00:00Z", "times": 1}
    home.write({"orders": {removed: {}, stays: {}, fine: {}}, "failing": {removed: old}})
    home.start(before=QUICK)
    eventually(lambda: home.read()["failing"].keys() == {removed, stays})
    data = home.read()
    del data["orders"][removed]
    data["failing"] |= {"note": "mine", fine: old}
    home.write(data)
    eventually(lambda: home.read()["failing"].keys() == {"note", stays})
    assert home.waiting().keys() == {stays, fine}
    db.add_order(removed, path=home.database)
    eventually(lambda: removed in home.read()["failing"])
    assert home.read()["failing"][removed]["since"] > old["since"], "it would fail too early"


def test_each_of_many_retries_is_noticed_and_none_is_called_readded(home: Home) -> None:
    """Each comes as soon as the order is listed as delivered: mostly the file still has it then."""
    home.wait_for(task_id := home.grafx.add())
    poller = home.start(before=QUICK)
    for _ in range(6):
        eventually(lambda: db.retry_orders(task_id, home.database), "it is delivered, and retried")
    eventually(lambda: not home.waiting())
    assert poller.stop() == 0
    listed = [line.split()[2] for line in db.Deliveries(home.database).path.read_text().splitlines()]
    assert listed == [f"{task_id}.png", "-"] * 6 + [f"{task_id}.png"]
    assert "delivered before" not in poller.log()
    assert "re-added" not in poller.log()


def test_a_lock_that_another_has_is_an_error_only_after_a_while(home: Home) -> None:
    first, typed, slow = home.grafx.add(), home.grafx.add("never"), home.grafx.add()
    home.grafx.fault("task", "hang", task_id=slow)  # so that a poll is always under way
    home.wait_for(first)
    # SIGUSR1 stands for the end of its patience.
    end = "import signal; signal.signal(signal.SIGUSR1, lambda *_: setattr(db, 'PATIENCE', 0.5))"
    busy = f"is being written by another program, try again .process {os.getpid()} has locked "
    with db.lock(home.database) as held:
        db.note(held)
        poller = home.start(before=f"{QUICK}; db.LOOK = 0.3; db.PATIENCE = 600.0; {end}")
        poller.says(f"{first} delivered")
        home.wait_for(first, typed, slow)  # an editor knows of no lock
        eventually(lambda: home.grafx.asked("task", typed) and home.grafx.asked("task", slow))
        assert first in home.waiting()
        assert "ERROR" not in poller.log()
        poller.process.send_signal(signal.SIGUSR1)
        poller.says(f"ERROR +{home.database} {busy}")
        asked = len(home.grafx.asked("task", typed))
        eventually(lambda: len(home.grafx.asked("task", typed)) > asked + 1)
    poller.says(f"recovered: {home.database} {busy}")
    eventually(lambda: list(home.waiting()) == [typed, slow])
    assert poller.stop() == 0
    assert poller.log().count("ERROR") == 1
    assert len(home.grafx.asked("download")) == 1


def test_the_last_write_waits_for_an_editor_that_saves_and_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "SAVING", 60.0)  # the timers may be late
    path = tmp_path / "database.json"
    path.write_text(whole := '{"orders": ["a", "b"]}')
    database = db.Database(path, check_writable=False)
    database.sync()
    path.write_text(whole[:12])
    database.failed("a", 500, "No such item")
    assert database.flush(0.0) == 1
    threading.Timer(0.1, path.write_text, [whole]).start()
    assert database.flush(30.0) == 0
    assert list(db.read(path).failed) == ["a"]

    held = db.hold(db.beside(path, "lock"), "busy")
    database.failed("b", 500, "No such item")
    assert database.flush(0.0) == 1
    threading.Timer(0.1, held.close).start()
    assert database.flush(30.0) == 0
    assert list(db.read(path).failed) == ["a", "b"]
