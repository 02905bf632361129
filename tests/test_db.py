"""database.json: its shapes, what is kept, what is an error, and how it is written; the commands of db.py."""

from __future__ import annotations

import codecs
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Home, end_orders

import db

A, B, C = "84ad7436-f82f-4e87-8cd3-37299e37878c", "t2", "Z.3_x"
FIELDS = {"projectID": "p1", "added": "2026-01-02T03:04:05Z", "age": 3, "note": {"of": ["mine"]}}
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"

SHAPES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "object": dict,
    "ids": lambda orders: [{"taskID": task, **given} if given else task for task, given in orders.items()],
    "objects": lambda orders: [{"taskID": task, **given} for task, given in orders.items()],
    "map": lambda orders: {
        "dataType": "Map",
        "value": [[task, {"taskID": task, **given}] for task, given in orders.items()],
    },
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes no sense counts as broken at once."""
    monkeypatch.setattr(db, "SAVING", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "database.json"


def text(shape: str, orders: Mapping[str, Any]) -> str:
    """A file of this shape as the project writes it."""
    return json.dumps({"orders": SHAPES[shape](orders), "failed": {}, "z": True}, indent=4) + "\n"


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_kept(path: Path, shape: str) -> None:
    own = {} if shape == "ids" else FIELDS
    path.write_text(text(shape, dict.fromkeys((A, B, C), own)))
    assert db.get_orders(path) == dict.fromkeys((A, B, C), own)
    db.remove_order(B, path)
    assert path.read_text() == text(shape, dict.fromkeys((A, C), own))

    end_orders([], {A: (500, "No\nsuch item")}, path)
    assert list(db.get_orders(path)) == [C]
    failed = db.read(path).failed[A]
    assert re.fullmatch(UTC, failed.pop("failed"))
    assert failed == {**own, "status": 500, "error": "No\nsuch item"}
    assert db.retry_orders("unknown", path) == []
    assert db.retry_orders(A, path) == [A]
    assert path.read_text() == text(shape, dict.fromkeys((C, A), own))

    assert db.add_order("new", path=path)
    assert db.add_order(B, "my-project", path)
    orders = db.get_orders(path)
    assert list(orders) == [C, A, "new", B]
    assert path.read_text() == text(shape, orders)
    assert orders[B]["projectID"] == "my-project"
    assert re.fullmatch(UTC, orders[B]["added"])


@pytest.mark.parametrize("shape", ["object", "ids"])
def test_two_spellings_of_a_guid_are_one_order_and_all_else_is_as_it_is_typed(path: Path, shape: str) -> None:
    first, other = A.upper(), A
    path.write_text(text(shape, {task: {} for task in (first, B, other, B.upper())}))
    assert list(db.get_orders(path)) == [first, B, B.upper()]
    assert not db.add_order(other, path=path)
    end_orders([], {first: (500, "x"), B: (404, "y")}, path)
    assert list(db.read(path).failed) == [first, B]
    assert db.retry_orders(B.upper(), path) == []
    assert db.retry_orders(other, path) == [first]
    db.remove_order(other, path)
    assert list(db.get_orders(path)) == [B.upper()]
    db.remove_order(B.upper(), path)
    db.Deliveries(path).add({first: "x.png", B: "y.png"})
    assert not db.add_order(other, path=path)
    assert db.add_order(B.upper(), path=path)
    assert db.retry_orders(other, path) == [other]


TEXT = r"""{
    "price": 1.1,
    "huge": 123456789012345678901234567890,
    "sign": -0.0,
    "orders": {
        "gone": {},
        "t2": {
            "name": "Grüße, 日本, 😀",
            "half": "\ud83d",
            "text": "a \"1.5\" \\ \u0000 / \t",
            "": 1.0
        }
    },
    "failed": {}
}
"""


def test_all_else_is_kept_to_the_letter(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    db.remove_order("gone", path)
    assert path.read_text() == TEXT.replace('        "gone": {},\n', "")
    assert db.get_orders(path)[B]["half"] == "\ud83d"


def test_what_is_no_task_id_or_no_project_id_is_not_added(path: Path) -> None:
    for task_id in ("../etc/passwd", "a b", "", ".hidden", "-x", "a/b", "x" * 129, "é", "a\n", "a\0", 0):
        with pytest.raises(ValueError, match=re.escape(f"{task_id!r} is not a task id")):
            db.add_order(task_id, path=path)  # type: ignore[arg-type]
    for project in (float("nan"), ["p"], 0):  # pandas reads an empty cell as NaN
        with pytest.raises(ValueError, match=re.escape(repr(project))):
            db.add_order(A, project, path)  # type: ignore[arg-type]
    assert not path.exists()
    assert db.add_order("x" * 128, path=path)


def test_only_what_changes_is_written(path: Path) -> None:
    path.write_text(json.dumps({"orders": {A: {}}}))
    before = path.stat().st_ino, path.read_bytes()
    db.add_order(A, path=path)
    db.remove_order(B, path)
    end_orders([B], {C: (500, "")}, path)
    db.retry_orders(None, path)
    assert (path.stat().st_ino, path.read_bytes()) == before


# --- how it is read and written --------------------------------------------------------------


def test_mode_and_symbolic_link_are_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "store.json", tmp_path / "here" / "database.json"
    for folder in (real.parent, link.parent):
        folder.mkdir()
    real.write_text(json.dumps({"orders": [A, B]}))
    real.chmod(0o640)
    link.symlink_to(Path("..") / "real" / "store.json")
    db.remove_order(A, link)
    assert link.is_symlink()
    assert json.loads(real.read_text())["orders"] == [B]
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert [file.name for file in link.parent.iterdir()] == ["database.json"]
    db.beside(real, "lock").unlink()
    db.beside(real, "lock").symlink_to(real)  # not followed: root may call in another user's folder
    with pytest.raises(db.DatabaseError, match=r"It is a symbolic link: replace it with a file\."):
        db.remove_order(B, link)
    assert json.loads(real.read_text())["orders"] == [B]


def test_a_killed_writer_leaves_nothing_that_the_next_write_does_not_take_over(path: Path) -> None:
    path.write_text(json.dumps({"orders": [A]}))
    before = path.read_bytes()
    code = f"import os, pathlib, sys; sys.path.insert(0, {str(ROOT)!r}); import db; "
    code += "os.fsync = lambda fd: os.kill(os.getpid(), 9); db.add_order('x', path=pathlib.Path(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", code, path], timeout=60).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    left = {file.name for file in path.parent.iterdir()}
    db.add_order("next", path=path)
    assert list(db.get_orders(path)) == [A, "next"]
    now = {file.name for file in path.parent.iterdir()}
    assert now == {"database.json", ".database.json.lock"} < left


@pytest.mark.parametrize("half", ["", '{"orders": ', None], ids=["empty", "half", "renamed away"])
def test_what_makes_no_sense_may_be_half_saved_for_a_while(
    path: Path, half: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "SAVING", 60.0)
    path.write_text('{"orders": ["a"]}')
    (file := db.File(path)).read()
    path.unlink() if half is None else path.write_text(half)
    with pytest.raises(db.Busy):
        file.read()
    file.since -= 61  # that much later
    with pytest.raises(db.DatabaseError) as raised:
        file.read()
    assert not isinstance(raised.value, db.Busy)
    path.write_text('{"orders": ["typed"]}')
    assert list(file.read().orders) == ["typed"]


def test_an_editor_that_renames_the_file_away_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is renamed just before it is written, and so it is read again."""
    for name in ("SAVING", "PATIENCE"):
        monkeypatch.setattr(db, name, 60.0)  # the thread may be late
    aside, edits = path.with_name("database.json~"), list[str]()

    def put_back() -> None:
        with db.lock(path, 60):  # it is free once the file was missed
            aside.rename(path)

    def put(store: db.Store) -> None:
        edits.append("again")
        if len(edits) == 1:
            path.rename(aside)
            threading.Thread(target=put_back).start()
        store.put(B, {})

    db.add_order(A, path=path)
    db.edit(path, put)
    assert list(db.get_orders(path)) == [A, B]
    assert len(edits) == 2


def test_a_database_that_is_missing_is_an_error_where_there_was_one(path: Path) -> None:
    assert db.get_orders(path) == {}
    db.remove_order(A, path)
    assert db.retry_orders(None, path) == []
    assert not path.exists()  # there is a lock now, but that alone shows no database
    assert db.add_order(A, path=path)
    path.unlink()
    for use in (lambda: db.get_orders(path), lambda: db.add_order(C, path=path)):
        with pytest.raises(db.DatabaseError, match=re.escape(f"{path} is missing. Put it back")):
            use()
    path.write_text('{"orders": {}}')  # as the error says
    assert db.add_order(C, path=path)


def test_a_retry_that_was_interrupted_or_begun_anew_is_not_lost(path: Path) -> None:
    """The list says "again" before the file has the order; in between the file may not be writable."""
    db.Deliveries(path).add({"a": "a.png"})
    path.write_text("{")
    with pytest.raises(db.DatabaseError):
        db.retry_orders("a", path)
    db.Deliveries(path).add({"a": "-"})  # as if it had been killed just then
    path.write_text('{"orders": {}}')
    assert db.retry_orders("a", path) == ["a"]
    assert list(db.get_orders(path)) == ["a"]


# --- several users ---------------------------------------------------------------------------


@pytest.fixture
def team() -> Iterator[Path]:
    """A folder that two users, 4001 and 4002, share by their group 4000."""
    if os.geteuid() != 0:
        pytest.skip("needs root to be several users: folders of groups are NOT tested")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shared = folder / "shared"
    shared.mkdir()
    os.chown(shared, 4001, 4000)
    shared.chmod(0o2770)
    yield shared
    shutil.rmtree(folder)


def as_user(user: int, work: Callable[[], object]) -> None:
    """Let `work` be done by a process of that user."""
    # Python loads it when it is needed, perhaps from where that user may not read.
    codecs.lookup("utf-8-sig")

    def become_that_user() -> None:
        os.setgroups([4000] if user else [])
        os.setgid(user)
        os.setuid(user)
        os.umask(0o022)
        work()

    process = multiprocessing.get_context("fork").Process(target=become_that_user)
    process.start()
    process.join()
    assert process.exitcode == 0, "its error is in the captured output"


def all_there_is(path: Path, task_id: str) -> None:
    """Be the only poller, add an order, deliver it, have it again."""
    with db.hold(db.beside(path, "pid"), "busy"):
        assert db.add_order(task_id, path=path)
        database = db.Database(path, check_writable=True)
        database.sync()
        database.delivered(task_id, f"{task_id}.png")
        assert not database.flush(10.0)
        assert db.retry_orders(task_id, path) == [task_id]


@pytest.mark.parametrize("first", [4002, 0], ids=["user", "root"])
def test_users_of_a_group_work_side_by_side_whoever_began(team: Path, first: int) -> None:
    path = team / "database.json"
    users = [first, *({4001, 4002, 0} - {first})]
    for turn, user in enumerate([*users, *users]):
        as_user(user, partial(all_there_is, path, f"order-{turn}"))
    assert set(db.get_orders(path)) == {f"order-{turn}" for turn in range(6)}
    for file in team.iterdir():
        assert (file.stat().st_gid, stat.S_IMODE(file.stat().st_mode) & 0o660) == (4000, 0o660), file
    names = {file.name.removeprefix(".database.json") for file in team.iterdir()}
    assert names == {"database.json", ".lock", ".pid", ".delivered"}


def test_a_folder_of_one_user_stays_that_users(team: Path) -> None:
    team.chmod(0o700)
    path = team / "database.json"
    as_user(0, partial(all_there_is, path, "root"))
    assert {file.stat().st_uid for file in team.iterdir()} == {4001}
    assert not any(file.stat().st_mode & 0o022 for file in team.iterdir())
    path.chmod(0o640)
    as_user(4001, partial(all_there_is, path, "user"))
    as_user(0, partial(all_there_is, path, "root-2"))
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (4001, 0o640)


# --- python db.py ----------------------------------------------------------------------------


def test_the_commands_of_db_py(home: Home) -> None:
    def ended(*arguments: str) -> tuple[int, str]:
        result = home.db(*arguments)
        assert "Traceback" not in result.stderr
        return result.returncode, result.stdout + result.stderr

    assert ended("add", A, "--project", "my-project") == (0, f"{A} is pending now, in {home.database}\n")
    assert ended("add", A) == (0, f"{A} was pending already, in {home.database}\n")
    code, said = ended("add", "../x")
    assert (code, "is not a task id" in said) == (1, True)

    db.add_order(B, path=home.database)
    end_orders([], {A: (500, "x"), B: (404, "Not Found")}, home.database)
    assert ended("retry", A) == (0, "1 order will be polled again\n")
    assert (list(home.failed()), home.waiting()[A]["projectID"]) == ([B], "my-project")
    code, said = ended("retry", A)
    assert (code, A in said) == (1, True)
    assert ended("retry", "")[0] == 1  # a shell's empty variable does not mean all
    for wrong in ([], [B, "--all"], [B, "--since", "2026-01-01"], ["--since", "noon"]):
        assert ended("retry", *wrong)[0] == 2
    assert ended("retry", "--all") == (0, "1 order will be polled again\n")
    assert ended("retry", "--all") == (0, "0 orders will be polled again\n")  # it is no error
    assert (set(home.waiting()), home.failed()) == ({A, B}, {})

    end_orders([], {A: (500, "x")}, home.database)
    assert ended("add", A) == (0, f"{A} is pending now, in {home.database}\n")
    end_orders([], {A: (404, "y")}, home.database)
    record = home.failed()[A]
    assert (record["projectID"], record["error"]) == ("my-project", "y")
    home.db("retry", A)

    db.Deliveries(home.database).add({"sent": "sent.pdf"})
    code, said = ended("add", "sent")
    assert code == 1
    assert re.search(rf"sent was delivered at {UTC}, as sent\.pdf\..* retry sent\n", said)
    assert ended("retry", "sent") == (0, "1 order will be polled again\n")
    assert "sent" in home.waiting()


def test_db_py_lists_orders_in_a_table_and_the_last_delivery(home: Home) -> None:
    when = "2026-01-01T00:00:00Z"
    orders = {A: {"projectID": "p"}, B: {"projectID": "p2", "added": when}, C: {}, "no id": {}}
    rejected = {"status": 500, "error": "Invalid\nvalue", "since": when, "times": 2}
    failed = {"projectID": "p3", "failed": when, "status": 404, "error": "Not\nFound"}
    data = {"orders": orders, "failing": {A: rejected, "x": 1}, "failed": {"f1": failed}}
    home.write(data)
    db.Deliveries(home.database).add({"other": "other.pdf", C: f"{C}.png"})
    said = home.db("list").stdout
    assert said.splitlines()[0] == str(home.database)
    rows = [re.split(r"  +", line) for line in said.splitlines()]
    numbers = [row[0] for row in rows if re.match(r"\d [prf]", row[0])]
    assert numbers == ["1 pending", "1 rejected, and retried", "1 failed"]
    assert [B, "p2", when] in rows
    assert [A, "p", when, "500", "Invalid value"] in rows
    assert ["f1", "p3", when, "404", "Not Found"] in rows
    assert 'ignored, since it is not an order (write {"taskID": "TASK_ID"}): ["no id", {}]' in said
    assert said.splitlines()[-2] == "2 delivered in the last 24 hours"
    assert re.fullmatch(rf"last delivery: {UTC} {re.escape(C)} {re.escape(C)}\.png", said.splitlines()[-1])


def test_db_py_retries_by_time(home: Home) -> None:
    times = {"a": "2026-01-01T11:59:59Z", "b": "2026-01-01T12:00:00Z", "c": "2026-01-01T13:00:00Z"}
    failed = {key: {"status": 500, "failed": when} for key, when in times.items()} | {"bare": {}}
    home.write({"orders": {}, "failed": failed})
    assert home.db("retry", "--since", "2026-01-01 12:30").stdout == "1 order will be polled again\n"
    assert set(home.waiting()) == {"c"}
    assert home.db("retry", "--since", "2026-01-01T17:00:00+05:00").stdout.startswith("1 ")
    assert (set(home.waiting()), set(home.failed())) == ({"b", "c"}, {"a", "bare"})
    said = home.db("retry", "--since", "0001-01-01T00:00:00+05:00")
    assert (said.returncode, said.stderr) == (1, "db.py: date value out of range\n")
