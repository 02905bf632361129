"""database.json: its shapes, what is kept, what is an error, and how it is written."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, Home, end_orders, eventually, find_program

import db

A, B, C = "84ad7436-f82f-4e87-8cd3-37299e37878c", "t2", "Z.3_x"
FIELDS = {"projectID": "p1", "added": "2026-01-02T03:04:05Z", "age": 3, "note": {"of": ["mine"]}}
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"


def workshop_map(*orders: str) -> dict[str, Any]:
    return {"dataType": "Map", "value": [[task, {"taskID": task, **FIELDS}] for task in orders]}


SHAPES: dict[str, Callable[..., Any]] = {
    "own": lambda *orders: dict.fromkeys(orders, FIELDS),
    "ids": lambda *orders: list(orders),
    "objects": lambda *orders: [{"taskID": task, **FIELDS} for task in orders],
    "map": workshop_map,
    "mixed": lambda *orders: [task if task == B else {"taskID": task, **FIELDS} for task in orders],
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes no sense counts as broken at once."""
    monkeypatch.setattr(db, "SAVING", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "database.json"


def pretty(data: dict[str, Any]) -> str:
    """The file as the project writes it: an order a line, all else as `json.dumps(…, indent=4)`."""
    lines = dict[str, str]()

    def line(item: Any) -> str:
        lines[f'"line {len(lines)}."'] = json.dumps(item, ensure_ascii=False)
        return f"line {len(lines) - 1}."

    def entries(value: Any) -> Any:
        if isinstance(value, list):
            return [line(item) for item in value]
        if value.get("dataType") == "Map":
            return {**value, "value": entries(value["value"])}
        return {key: line(item) for key, item in value.items()}

    data = {key: entries(data[key]) if key in ("orders", "failing", "failed") else data[key] for key in data}
    text = json.dumps(data, indent=4, ensure_ascii=False) + "\n"
    for mark, item in lines.items():
        text = text.replace(mark, item)
    return text


def save(path: Path, data: Any) -> None:
    text = data if isinstance(data, (str, bytes)) else pretty(data)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def around(orders: Any) -> dict[str, Any]:
    more = {"orders": orders, "failing": {C: {"times": 1}}, "failed": {}, "z": True}
    return {"tokens": {"x": None}, "users": [1]} | more


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_kept_with_a_line_for_each_order(path: Path, shape: str) -> None:
    make, bare = SHAPES[shape], shape == "ids"
    save(path, around(make(A, B, C)))
    assert db.get_orders(path) == {
        task: {} if bare or (shape == "mixed" and task == B) else FIELDS for task in (A, B, C)
    }
    db.remove_order(B, path)
    assert path.read_text() == pretty(around(make(A, C)))

    assert db.add_order("new", path=path)
    orders, kept = json.loads(path.read_text())["orders"], make(A, C)
    match shape:
        case "own":
            assert list(orders.items())[:-1] == list(kept.items())
            assert list(orders)[-1] == "new"
        case "map":
            assert orders["value"][:-1] == kept["value"]
            assert orders["value"][-1][0] == orders["value"][-1][1]["taskID"] == "new"
        case _:
            assert orders[:-1] == kept
            assert orders[-1] == "new" if bare else orders[-1]["taskID"] == "new"
    assert db.add_order(B, "my-project", path)
    assert db.get_orders(path)[B]["projectID"] == "my-project"

    end_orders(["new", B], {A: (500, "No\nsuch item")}, path)
    data = json.loads(path.read_text())
    assert path.read_text() == pretty(data)
    assert (list(data), data["orders"]) == (list(around(0)), make(C))
    record = {"status": 500, "error": "No\nsuch item"} | ({} if bare else FIELDS)
    assert data["failed"][A].items() >= record.items()
    assert re.fullmatch(UTC, data["failed"][A]["failed"])
    assert db.retry_orders("unknown", path) == []
    assert db.retry_orders(A, path) == [A]
    assert path.read_text() == pretty(around(make(C, A)))


def test_a_retry_adds_to_what_is_pending_already(path: Path) -> None:
    failed = {A: {"n": 2, "projectID": "p", "status": 5}}
    save(path, {"orders": [{"taskID": A.upper(), "n": 1}], "failed": failed})
    assert db.retry_orders(A, path) == [A]
    assert list(db.get_orders(path).values()) == [{"n": 1, "projectID": "p"}]


@pytest.mark.parametrize("shape", ["own", "ids", "map"])
def test_two_spellings_of_a_guid_are_one_order_and_all_else_is_as_it_is_typed(path: Path, shape: str) -> None:
    first, other = A.upper(), A
    save(path, around(SHAPES[shape](first, B, other, B.upper())))
    assert list(db.get_orders(path)) == [first, B, B.upper()]
    assert not db.add_order(other, path=path)
    end_orders([], {first: (500, "x"), B: (404, "y")}, path)
    assert list(db.get_orders(path)) == [B.upper()]
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
    assert db.retry_orders(first, path) == []  # it is pending already


TEXT = r"""{
    "price": 1.1,
    "huge": 123456789012345678901234567890,
    "signs": [
        -0.0,
        100000.0,
        1e-07
    ],
    "orders": {
        "gone": {},
        "t2": {"name": "Grüße, 日本, 😀", "half": "\ud83d", "text": "a \"1.5\" \\ \u0000 / \t", "": 1.0}
    },
    "failed": {}
}
"""


def test_all_else_is_kept_to_the_letter(path: Path) -> None:
    save(path, b"\xef\xbb\xbf" + TEXT.encode())
    db.remove_order("gone", path)
    assert path.read_text() == TEXT.replace('        "gone": {},\n', "")
    assert db.get_orders(path)[B]["half"] == "\ud83d"


STRANGE = ["../etc/passwd", "a b", "", ".hidden", "-x", "a/b", "x" * 129, "é", "a\n", "a\0"]


def test_items_of_a_list_that_are_no_order_at_all_stay(path: Path) -> None:
    items = [None, 5, {}, {"taskID": ["x"]}, [], [A, {}, 1], {"id": A}, [["x"], {}], [A, B], [A, None]]
    save(path, {"orders": [*items, *STRANGE, A]})
    store = db.read(path)
    assert list(store.orders) == [A]
    assert list(map(json.loads, store.strange)) == [*items, *STRANGE]
    db.remove_order(A, path)
    assert json.loads(path.read_text())["orders"] == [*items, *STRANGE]


@pytest.mark.parametrize("task_id", STRANGE)
def test_nothing_but_a_task_id_is_added(path: Path, task_id: str) -> None:
    with pytest.raises(ValueError, match="task id"):
        db.add_order(task_id, path=path)
    assert not path.exists()
    assert db.add_order("x" * 128, path=path)


@pytest.mark.parametrize("project", [float("nan"), ["p"], 0])
def test_a_project_that_is_no_string_is_an_error_that_names_it(path: Path, project: Any) -> None:
    """pandas reads an empty cell as NaN."""
    with pytest.raises(ValueError, match=re.escape(repr(project))):
        db.add_order(A, project, path)
    with pytest.raises(ValueError, match=re.escape(repr(project))):
        db.add_order(project, path=path)
    assert not path.exists()


def test_only_what_changes_is_written(path: Path) -> None:
    save(path, {"orders": {A: {}}})
    before = path.stat().st_ino, path.read_bytes()
    db.add_order(A, path=path)
    db.remove_order(B, path)
    end_orders([B], {C: (500, "")}, path)
    db.retry_orders(None, path)
    assert (path.stat().st_ino, path.read_bytes()) == before


# --- how it is written -----------------------------------------------------------------------


def test_mode_and_symbolic_link_are_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "store.json", tmp_path / "here" / "database.json"
    for folder in (real.parent, link.parent):
        folder.mkdir()
    save(real, {"orders": [A, B]})
    real.chmod(0o640)
    link.symlink_to(Path("..") / "real" / "store.json")
    db.remove_order(A, link)
    assert link.is_symlink()
    assert json.loads(real.read_text())["orders"] == [B]
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert [file.name for file in link.parent.iterdir()] == ["database.json"]


def test_a_killed_writer_leaves_nothing_that_the_next_write_does_not_take_over(path: Path) -> None:
    save(path, {"orders": [A]})
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


@pytest.mark.parametrize("half", [b"", b'{"orders": ', None], ids=["empty", "half", "renamed away"])
def test_what_makes_no_sense_may_be_half_saved_for_a_while(
    path: Path, half: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that does not jump, whatever the file's own time says."""
    save(path, {"orders": [A]})
    (file := db.File(path)).read()
    path.unlink() if half is None else save(path, half)
    now = [1000.0]
    monkeypatch.setattr(db, "SAVING", 2.0)
    monkeypatch.setattr(db, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def half_saved(ahead: int = 0) -> bool:
        if ahead and path.exists():
            os.utime(path, (time.time() + ahead,) * 2)
        with pytest.raises(db.DatabaseError) as raised:
            file.read()
        return isinstance(raised.value, db.Busy)

    assert half_saved(ahead=3600)
    now[0] += 1.9
    assert half_saved()
    now[0] += 0.2
    assert not half_saved()
    save(path, b'{"orders": ["t')  # it is being saved all the same
    assert half_saved(ahead=-3600)
    now[0] += 2.1
    assert not half_saved()
    save(path, {"orders": ["typed"]})
    assert list(file.read().orders) == ["typed"]


def test_a_file_that_an_editor_has_renamed_away_is_no_empty_store(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.add_order(A, path=path)
    aside = path.with_name("database.json~")
    path.rename(aside)
    real, reads = db.File.read, list[db.File]()
    with monkeypatch.context() as patient:
        patient.setattr(db, "SAVING", 30.0)
        patient.setattr(db, "PATIENCE", 60.0)
        patient.setattr(db.File, "read", lambda file: (reads.append(file), real(file))[1])
        change = threading.Thread(target=db.add_order, args=(B, None, path))
        change.start()
        eventually(lambda: len(reads) > 2, "it tries again")
        assert not path.exists()
        aside.rename(path)
        change.join()
    assert list(db.get_orders(path)) == [A, B]
    path.unlink()  # for good
    for use in (lambda: db.get_orders(path), lambda: db.add_order(C, path=path)):
        with pytest.raises(db.DatabaseError, match=re.escape("is missing. Put it back")) as raised:
            use()
        assert not isinstance(raised.value, db.Busy)
        assert str(path) in str(raised.value)
        assert not path.exists()
    path.write_text('{"orders": {}}')  # as the error says
    assert db.add_order(C, path=path)


def test_a_command_that_changes_nothing_makes_no_database_that_could_be_missing(path: Path) -> None:
    """It leaves a lock file, though, and that alone does not show that there was a database."""
    assert db.get_orders(path) == {}
    db.remove_order(A, path)
    assert db.retry_orders(None, path) == []
    assert not path.exists()
    assert db.add_order(A, path=path)


def test_a_child_that_was_forked_meanwhile_does_not_keep_the_lock(path: Path) -> None:
    end, hold = os.pipe()
    with db.lock(path, "lock", 0):
        child = os.fork()
        if not child:
            os.close(hold)
            os.read(end, 1)
            os._exit(0)
    try:
        with db.lock(path, "lock", 0):
            pass
    finally:
        os.close(hold)
        os.waitpid(child, 0)


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
    end, said = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([4000] if user else [])
            os.setgid(user)
            os.setuid(user)
            os.umask(0o022)
            work()
        except BaseException:  # noqa: BLE001 - it is the parent's to see
            os.write(said, traceback.format_exc().encode())
        os._exit(0)
    os.close(said)
    with os.fdopen(end) as file:
        problem = file.read()
    os.waitpid(child, 0)
    assert not problem, problem


def all_there_is(path: Path, task_id: str) -> None:
    """Be the only poller, add an order, deliver it, have it again."""
    with db.lock(path, "pid", 0):
        assert db.add_order(task_id, path=path)
        database = db.Database(path, prove=True)
        database.sync(idle=True)
        database.delivered(task_id, f"{task_id}.png")
        assert not database.flush(10.0)
        assert db.retry_orders(task_id, path) == [task_id]


@pytest.mark.parametrize("first", [4001, 4002, 0])
def test_users_of_a_group_work_side_by_side_whoever_began(team: Path, first: int) -> None:
    path = team / "database.json"
    users = [first, *({4001, 4002, 0} - {first})]
    for turn, user in enumerate([*users, *users]):
        as_user(user, partial(all_there_is, path, f"order-{turn}"))
    assert set(db.get_orders(path)) == {f"order-{turn}" for turn in range(6)}
    for file in team.iterdir():
        assert (file.stat().st_gid, stat.S_IMODE(file.stat().st_mode) & 0o660) == (4000, 0o660), file
    assert {file.name for file in team.iterdir()} == {
        "database.json", ".database.json.lock", ".database.json.pid", ".database.json.delivered",
    }  # fmt: skip


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


def test_root_gives_away_only_what_it_made(team: Path) -> None:
    """A hard link to a file of root's, planted by the folder's owner where the lock will be."""
    victim = team.parent / "victim"
    victim.write_text("")
    victim.chmod(0o600)
    os.link(victim, team / ".database.json.lock")
    as_user(0, partial(db.add_order, "a", path=team / "database.json"))
    assert (victim.stat().st_uid, stat.S_IMODE(victim.stat().st_mode)) == (0, 0o600)


def test_who_writes_is_named_to_who_waits(path: Path) -> None:
    save(path, {"orders": [A]})
    named: list[str] = []

    def edit(store: db.Store) -> None:
        with pytest.raises(db.Busy) as raised, db.lock(path, "lock", 0):
            pass
        named.append(str(raised.value))

    db.change(db.File(path), edit, 0)
    assert f"is being written by process {os.getpid()}, " in named[0]


# --- python db.py ----------------------------------------------------------------------------


def test_the_commands_of_db_py(home: Home) -> None:
    def ended(*arguments: str) -> tuple[int, str]:
        result = home.db(*arguments)
        assert "Traceback" not in result.stderr
        return result.returncode, result.stdout + result.stderr

    assert ended("add", A, "--project", "my-project") == (0, f"{A} is pending now, in {home.database}\n")
    assert re.fullmatch(UTC, home.waiting()[A]["added"])
    assert ended("add", A) == (0, f"{A} was pending already, in {home.database}\n")
    code, said = ended("add", "../x")
    assert (code, "is not a task id" in said) == (1, True)

    db.add_order(B, path=home.database)
    end_orders([], {A: (500, "Invalid value: it has\nno 'XXL'"), B: (404, "Not Found")}, home.database)
    db.add_order(C, "p3", home.database)
    data = home.read()
    data["orders"]["not an id"] = {}
    home.write(data)
    code, said = ended("list")
    rows = [re.split(r"  +", line) for line in said.splitlines()]
    assert code == 0
    assert ["1 pending"] in rows
    assert ["2 failed"] in rows
    assert [C, "p3", data["orders"][C]["added"]] in rows
    assert [A, "my-project", data["failed"][A]["failed"], "500", "Invalid value: it has no 'XXL'"] in rows
    lines = [line for line in said.splitlines() if line.startswith((A, f"{B} "))]
    columns = {line.index(data["failed"][line.split()[0]]["failed"]) for line in lines}
    assert len(columns) == 1  # it is a table
    assert '"not an id"' in said

    assert ended("retry", A)[0] == 0
    assert (list(home.failed()), home.waiting()[A]["projectID"]) == ([B], "my-project")
    code, said = ended("retry", A)
    assert (code, A in said) == (1, True)
    assert ended("retry", "")[0] == 1  # a shell's empty variable does not mean all
    assert ended("retry")[0] == ended("retry", B, "--all")[0] == 2
    assert list(home.failed()) == [B]
    assert ended("retry", "--all") == (0, "1 order will be polled again\n")
    assert ended("retry", "--all")[0] == 0  # nothing to do is no error
    assert (set(home.waiting()), home.failed()) == ({A, B, C, "not an id"}, {})


def test_db_py_lists_rejected_and_delivered_orders(home: Home) -> None:
    rejection = {"status": 500, "error": "Invalid\nvalue", "since": "2026-01-01T00:00:00Z", "times": 2}
    home.write({"orders": {A: {"projectID": "p"}, B: {}, C: {}}, "failing": {A: rejection, "x": 1}})
    deliveries = db.Deliveries(home.database)
    said = home.db("list").stdout
    assert said.splitlines()[0] == str(home.database)
    assert said.splitlines()[-1] == "0 delivered in the last 24 hours"
    deliveries.add({"other": "other.pdf", C: f"{C}.png"})
    said = home.db("list").stdout
    rows = [re.split(r"  +", line) for line in said.splitlines()]
    assert [row[0] for row in rows if re.match(r"\d+ ", row[0])][:3] == [
        "1 pending",
        "1 rejected, and retried",
        "0 failed",
    ]
    assert [A, "p", "2026-01-01T00:00:00Z", "500", "Invalid value"] in rows
    assert [B] in rows
    assert [C] not in rows
    assert said.splitlines()[-2] == "2 delivered in the last 24 hours"
    assert re.fullmatch(rf"last delivery: {UTC} {re.escape(C)} {re.escape(C)}\.png", said.splitlines()[-1])

    added = home.db("add", "other")
    assert added.returncode == 1
    assert re.search(rf"other was delivered at {UTC}, as other\.pdf\..* retry other\n", added.stderr)
    assert not db.add_order("other", path=home.database)
    assert "other" not in home.waiting()
    again = home.db("retry", "other")
    assert (again.returncode, again.stdout) == (0, "1 order will be polled again\n")
    assert "other" in home.waiting()
    assert home.db("add", "other").returncode == 0  # it is pending already
    assert home.db("retry", "never seen").returncode == 1


def test_db_py_retries_by_time(home: Home) -> None:
    times = {"a": "2026-01-01T11:59:59Z", "b": "2026-01-01T12:00:00Z", "c": "2026-01-01T13:00:00Z"}
    failed = {key: {"status": 500, "failed": when} for key, when in times.items()} | {"bare": {}}
    home.write({"orders": {}, "failed": failed})
    for wrong in (["x", "--since", "2026-01-01"], ["--since", "noon"]):
        assert home.db("retry", *wrong).returncode == 2
    assert home.db("retry", "--since", "2026-01-01 12:30").stdout == "1 order will be polled again\n"
    assert set(home.waiting()) == {"c"}
    assert home.db("retry", "--since", "2026-01-01T17:00:00+05:00").stdout.startswith("1 ")
    assert (set(home.waiting()), set(home.failed())) == ({"b", "c"}, {"a", "bare"})


def test_a_lock_that_is_a_link_is_not_followed(path: Path) -> None:
    """Root may call in a folder that is another user's."""
    victim = path.with_name("victim")
    victim.write_text("precious")
    path.with_name(f".{path.name}.lock").symlink_to(victim)
    with pytest.raises(db.DatabaseError, match=r"It is a symbolic link: put a file in its place\."):
        db.add_order("a", path=path)
    assert victim.read_text() == "precious"


def test_a_file_system_without_locks_is_called_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = f"cannot lock {path.parent}/.database.json.lock: {os.strerror(errno.ENOLCK)}. "
    with pytest.raises(db.DatabaseError, match=re.escape(said + "Its file system has no locks: use another")):
        db.add_order("a", path=path)
    assert not path.exists()


def test_a_database_that_is_mounted_as_a_single_file_is_called_so(home: Home) -> None:
    """As `docker run -v ./database.json:…` does it: no other file can take its place."""
    home.wait_for(task_id := home.grafx.add())
    before = home.database.read_bytes()
    unshare = find_program("unshare", "util-linux", "a database that is mounted as a single file")
    mount = [unshare, "-m", "sh", "-c", 'mount --bind "$DATABASE" "$DATABASE" && "$@"', "-"]
    if os.geteuid() or subprocess.run([*mount, "true"], env=home.environment()).returncode:
        pytest.skip("nothing may be mounted here: a database that is mounted as a single file is NOT tested")
    said = "Device or resource busy. It is mounted as a single file: mount its folder.\n"
    add = [sys.executable, str(ROOT / "db.py"), "add", B]
    for command in (home.command("--once"), add):
        done = subprocess.run([*mount, *command], env=home.environment(), capture_output=True, text=True)
        assert done.returncode == 1
        assert f"cannot write {home.database}: {said}" in done.stdout + done.stderr
        assert home.database.read_bytes() == before
    assert home.files() == [f"{task_id}.png"]


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


def test_a_retry_survives_an_editor_that_saves_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db.Deliveries(path).add({"a": "a.png"})
    path.write_text('{"orders": {}}')
    real, saved = db.Deliveries.add, []

    def add(deliveries: db.Deliveries, files: Any) -> None:
        real(deliveries, files)
        if not saved:
            saved.append(path.write_text('{"orders": {"typed": {}}}'))

    monkeypatch.setattr(db.Deliveries, "add", add)
    assert db.retry_orders("a", path) == ["a"]
    assert sorted(db.get_orders(path)) == ["a", "typed"]


def test_an_editor_that_renames_the_file_away_just_before_it_is_written_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text('{"orders": {"old": {}}}')
    real, away = db._replace, path.with_name("database.json~")

    def replace(place: Path, content: bytes, seen: Any) -> Any:
        if not away.exists():
            place.rename(away)
            threading.Timer(0.3, path.write_text, ['{"orders": {"typed": {}}}']).start()
        return real(place, content, seen)

    monkeypatch.setattr(db, "_replace", replace)
    monkeypatch.setattr(db, "SAVING", 30.0)  # the timer may be late
    assert db.add_order("new", path=path)
    assert sorted(db.get_orders(path)) == ["new", "typed"]
