"""database.json: its shapes, what is kept, what is refused, and how it is written."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Home, git

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
    "fields first": lambda *orders: [{**FIELDS, "taskID": task} for task in orders],
    "map": workshop_map,
    "mixed": lambda *orders: [task if task == B else {"taskID": task, **FIELDS} for task in orders],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "database.json"


def pretty(data: Any) -> str:
    return json.dumps(data, indent=4, ensure_ascii=False) + "\n"


def save(path: Path, data: Any) -> None:
    """A file that nobody is saving just now."""
    text = data if isinstance(data, (str, bytes)) else pretty(data)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.utime(path, (1, 1))


def around(orders: Any) -> dict[str, Any]:
    return {"tokens": {"x": None}, "users": [1], "orders": orders, "failed": {}, "z": True}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_read_and_written_back_as_it_came(path: Path, shape: str) -> None:
    make = SHAPES[shape]
    save(path, around(make(A, B, C)))
    bare = shape == "ids"
    assert db.get_orders(path) == {
        task: {} if bare or (shape == "mixed" and task == B) else FIELDS for task in (A, B, C)
    }
    db.remove_order(B, path)
    assert path.read_text() == pretty(around(make(A, C)))

    assert db.add_order("new", path=path)
    orders = json.loads(path.read_text())["orders"]
    kept = make(A, C)
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


@pytest.mark.parametrize("shape", SHAPES)
def test_a_failed_order_keeps_its_fields_and_comes_back_as_it_was(path: Path, shape: str) -> None:
    make = SHAPES[shape]
    save(path, around(make(C, A)))
    db.end_orders([], {A: (500, "No such item")}, path)
    data = json.loads(path.read_text())
    assert list(data) == list(around(0))
    assert data["orders"] == make(C)
    record = data["failed"][A]
    assert record.items() >= {"status": 500, "error": "No such item"}.items()
    assert record.items() >= ({} if shape == "ids" else FIELDS).items()
    assert re.fullmatch(UTC, record["failed"])

    assert db.retry_orders([A, "unknown"], path) == [A]
    data = json.loads(path.read_text())
    assert data["failed"] == {}
    assert db.get_orders(path)[A] == ({} if shape == "ids" else FIELDS)
    assert data["orders"] == (make(C, A) if shape != "fields first" else [*make(C), {"taskID": A, **FIELDS}])


def test_fields_that_are_called_like_those_of_a_record_are_not_lost(path: Path) -> None:
    fields = {"projectID": "p", "status": "rush", "error": "none yet", "failed": 0, "order": [7]}
    save(path, {"orders": {A: fields}})
    db.end_orders([], {A: (404, "gone")}, path)
    record = json.loads(path.read_text())["failed"][A]
    assert (record["status"], record["error"]) == (404, "gone")
    db.retry_orders(None, path)
    assert db.get_orders(path) == {A: fields}


def test_a_project_is_kept_also_where_ids_stand_in_a_list(path: Path) -> None:
    save(path, {"orders": [A]})
    assert db.add_order(B, "my-project", path)
    assert db.get_orders(path)[B]["projectID"] == "my-project"
    assert json.loads(path.read_text())["orders"][0] == A


def test_add_order(path: Path) -> None:
    assert db.add_order(A, "p1", path) is True
    assert db.add_order(A, "p2", path) is False
    (fields,) = db.get_orders(path).values()
    assert fields["projectID"] == "p1"
    assert re.fullmatch(UTC, fields["added"])


TEXT = r"""{
    "price": 1.10,
    "infinite": 1e999,
    "precise": 0.1000000000000000055511151231257827,
    "huge": 123456789012345678901234567890,
    "signs": [
        -0.0,
        1E5,
        1e-7
    ],
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


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_all_else_is_kept_to_the_letter(path: Path, bom: bytes) -> None:
    save(path, bom + TEXT.encode())
    db.remove_order("gone", path)
    assert path.read_bytes().removeprefix(bom) == TEXT.replace('        "gone": {},\n', "").encode()
    assert db.get_orders(path)[B]["half"] == "\ud83d"


@pytest.mark.parametrize(
    "content", [None, "", " \n", b"\xef\xbb\xbf"], ids=["missing", "empty", "blank", "bom"]
)
def test_a_missing_or_empty_file_becomes_an_empty_store(path: Path, content: Any) -> None:
    if content is not None:
        save(path, content)
    assert db.get_orders(path) == {}
    db.add_order(A, path=path)
    added = json.loads(path.read_text())["orders"][A]["added"]
    assert path.read_text() == pretty({"orders": {A: {"added": added}}, "failed": {}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{\n    "orders": {\n        "a" {}\n    }\n}', "line 3, column 13"),
        ('{"orders": {}} x', "line 1, column 16"),
        ('{"orders": ', "line 1, column 12"),
        ("{'orders': {}}", "line 1, column 2"),
        (b'{"orders": {}, "x": "\xff"}', "UTF-8"),
        ("[]", "object"),
        ('{"orders": 5}', '"orders" must be'),
        ('{"orders": null}', '"orders" must be'),
        ('{"orders": {"dataType": "Map"}}', '"orders" must be'),
        ('{"orders": {"dataType": "Map", "value": {}}}', '"orders" must be'),
        ('{"orders": {}, "failed": []}', '"failed"'),
        ('{"orders": {"a": {}, "twice": {}, "twice": {}}}', '"twice"'),
        ('{"orders": {}, "x": {"deep": [{"k": 1, "k": 1}]}}', '"k"'),
        ('{"orders": {}, "x": NaN}', "NaN"),
        ('{"orders": {}, "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_and_left_as_it_is(path: Path, content: Any, said: str) -> None:
    save(path, content)
    before = path.read_bytes(), path.stat().st_ino
    for change in (
        lambda: db.get_orders(path),
        lambda: db.add_order(A, path=path),
        lambda: db.end_orders([A], {B: (500, "")}, path),
        lambda: db.retry_orders(None, path),
    ):
        with pytest.raises(db.DatabaseError, match=re.escape(said)) as raised:
            change()
        assert str(path) in str(raised.value)
        assert not isinstance(raised.value, db.HalfSaved)
    assert (path.read_bytes(), path.stat().st_ino) == before


STRANGE = ["../etc/passwd", "a b", "", ".hidden", "-x", "a/b", "x" * 129, "é", "a\n", "a\0"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_entry_that_is_no_task_id_stays_and_is_no_order(path: Path, shape: str) -> None:
    make, longest = SHAPES[shape], "x" * 128
    save(path, around(make(A, *STRANGE, longest)))
    store = db.read(path)
    assert list(store.orders) == [A, longest]
    assert len(store.strange) == len(STRANGE)
    db.end_orders([A], dict.fromkeys(STRANGE, (500, "")), path)
    db.remove_order(longest, path)
    assert path.read_text() == pretty(around(make(*STRANGE)))


def test_items_of_a_list_that_are_no_order_at_all_stay(path: Path) -> None:
    items = [None, 5, 1.50, {}, {"taskID": ["x"]}, [], [A, {}, 1], {"id": A}, [["x"], {}], True]
    save(path, {"orders": [*items, A]})
    assert list(db.get_orders(path)) == [A]
    db.remove_order(A, path)
    assert json.loads(path.read_text())["orders"] == items


@pytest.mark.parametrize("task_id", STRANGE)
def test_nothing_but_a_task_id_is_added(path: Path, task_id: str) -> None:
    with pytest.raises(ValueError, match="task id"):
        db.add_order(task_id, path=path)
    assert not path.exists()


def test_only_what_changes_is_written(path: Path) -> None:
    save(path, {"orders": {A: {}}})
    before = path.stat().st_ino, path.read_bytes()
    db.add_order(A, path=path)
    db.remove_order(B, path)
    db.end_orders([B], {C: (500, "")}, path)
    db.retry_orders(None, path)
    assert (path.stat().st_ino, path.read_bytes()) == before
    seen = db.version(path)
    assert db.version(path) == seen == db.read(path).version
    db.add_order(B, path=path)
    assert db.version(path) != seen
    assert db.version(path.with_name("none")) is None


# --- how it is written -----------------------------------------------------------------------


def spy_on_fsync(monkeypatch: pytest.MonkeyPatch, seen: Callable[[bool], None]) -> None:
    """Call `seen` (is it a folder?) at each fsync, which is made all the same."""
    real = os.fsync

    def fsync(fd: Any) -> None:
        real(fd)
        seen(stat.S_ISDIR(os.fstat(fd if isinstance(fd, int) else fd.fileno()).st_mode))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_new_file_is_durable_before_it_takes_the_place_and_then_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, {"orders": [A]})
    steps: list[tuple[str, bool]] = []
    spy_on_fsync(
        monkeypatch,
        lambda folder: steps.append(("folder" if folder else "file", A in path.read_text())),
    )
    db.remove_order(A, path)
    assert steps == [("file", True), ("folder", False)]


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


def program(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    return subprocess.Popen([*command, *map(str, arguments)], cwd="/", stderr=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_nothing_that_the_next_write_does_not_take_over(path: Path) -> None:
    save(path, {"orders": [A]})
    before = path.read_bytes()
    kill = "import os, db, pathlib; os.fsync = lambda fd: os.kill(os.getpid(), 9); "
    for task in (B, C):
        writer = program(kill + "db.add_order(sys.argv[1], path=pathlib.Path(sys.argv[2]))", task, path)
        assert writer.wait(30) == -signal.SIGKILL, writer.stderr and writer.stderr.read()
        assert path.read_bytes() == before
    left = {file.name for file in path.parent.iterdir()} - {path.name}
    assert all(name.startswith(".") for name in left)
    db.add_order("next", path=path)
    assert list(db.get_orders(path)) == [A, "next"]
    now = {file.name for file in path.parent.iterdir()} - {path.name}
    assert len(now) < len(left)  # the lock file stays, and it alone
    assert now <= left


def test_programs_that_write_at_the_same_time_lose_nothing(path: Path) -> None:
    code = (
        "import db, pathlib; name, path = sys.argv[1], pathlib.Path(sys.argv[2]); "
        "[db.add_order(f'{name}-{n}', 'p', path) for n in range(20)]"
    )
    writers = [program(code, name, path) for name in "abcd"]
    for turn in range(10):
        db.remove_order(f"a-{turn}", path)
    for writer in writers:
        assert writer.wait(60) == 0, writer.stderr and writer.stderr.read()
    added = {f"{name}-{number}" for name in "abcd" for number in range(20)}
    assert added - {f"a-{turn}" for turn in range(10)} <= set(db.get_orders(path)) <= added


def test_what_an_editor_saves_meanwhile_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, {"orders": [A]})
    edited = False

    def edit(folder: bool) -> None:
        nonlocal edited
        if not edited:
            edited = True
            path.write_text(json.dumps({"orders": [A, "typed"], "mine": 1}))

    spy_on_fsync(monkeypatch, edit)
    db.end_orders([A], {}, path)
    assert json.loads(path.read_text()).items() >= {"orders": ["typed"], "mine": 1}.items()


@pytest.mark.parametrize("half", [b"", b'{"orders": ["typed", '])
def test_a_file_that_an_editor_is_just_saving_is_waited_for(path: Path, half: bytes) -> None:
    whole = b'{"orders": ["typed", "t2"]}'
    with path.open("wb", buffering=0) as file:
        file.write(half)
        with pytest.raises(db.HalfSaved):
            db.read(path, patience=0)
        change = threading.Thread(target=db.remove_order, args=(B, path))
        change.start()
        time.sleep(0.3)
        file.write(whole[len(half) :])
    change.join()
    assert list(db.get_orders(path)) == ["typed"]


def test_a_lock_is_had_by_one_at_a_time_and_names_its_holder(path: Path) -> None:
    save(path, {"orders": [A]})
    with db.lock(path, "pid", 0):
        with pytest.raises(db.DatabaseError, match=rf"\b{os.getpid()}\b"):
            db.lock(path, "pid", 0).__enter__()
        db.add_order(B, path=path)  # another lock
    with db.lock(path, "pid", 0):
        pass


# --- python db.py ----------------------------------------------------------------------------


def test_the_commands_of_db_py(home: Home) -> None:
    def ended(*arguments: str) -> tuple[int, str]:
        result = home.db(*arguments)
        assert "Traceback" not in result.stderr
        return result.returncode, result.stdout + result.stderr

    assert ended("add", A, "--project", "my-project")[0] == 0
    assert ended("add", B)[0] == 0
    assert ended("add", B) == (0, f"{B} waited already\n")
    code, said = ended("add", "../x")
    assert (code, "no task id" in said) == (1, True)
    assert {task: fields.get("projectID") for task, fields in home.waiting().items()} == {
        A: "my-project",
        B: None,
    }

    db.end_orders([], {A: (500, "Invalid value: it has\nno 'XXL'"), B: (404, "Not Found")}, home.database)
    db.add_order(C, "p3", home.database)
    data = home.read()
    data["orders"]["not an id"] = {}
    home.write(data)
    code, said = ended("list")
    rows = [re.split(r"  +", line) for line in said.splitlines()]
    assert code == 0
    assert ["1 waiting"] in rows
    assert ["2 failed"] in rows
    assert [C, "p3", data["orders"][C]["added"]] in rows
    assert [A, "my-project", data["failed"][A]["failed"], "500", "Invalid value: it has no 'XXL'"] in rows
    lines = [line for line in said.splitlines() if line.startswith((A, f"{B} "))]
    columns = {line.index(data["failed"][line.split()[0]]["failed"]) for line in lines}
    assert len(columns) == 1  # it is a table
    assert '"not an id"' in said

    assert ended("retry", A)[0] == 0
    assert list(home.failed()) == [B]
    assert home.waiting()[A]["projectID"] == "my-project"
    code, said = ended("retry", A)
    assert (code, A in said) == (1, True)
    assert ended("retry")[0] == ended("retry", B, "--all")[0] == 2
    assert ended("retry", "--all")[0] == 0
    assert ended("retry", "--all")[0] == 0  # nothing to do is no error
    assert (set(home.waiting()), home.failed()) == ({A, B, C, "not an id"}, {})


def test_db_py_says_what_is_wrong_with_the_file(home: Home) -> None:
    save(home.database, '{"orders": [}')
    for arguments in (("list",), ("add", A), ("retry", "--all")):
        result = home.db(*arguments)
        assert result.returncode == 1
        assert "line 1, column 13" in result.stderr
        assert "Traceback" not in result.stderr
    assert home.database.read_text() == '{"orders": [}'


def test_the_shipped_database_is_empty_and_in_the_own_shape() -> None:
    text = git("show", "HEAD:database.json") or (ROOT / "database.json").read_text()
    assert text == '{\n    "orders": {},\n    "failed": {}\n}\n'


def test_a_lock_that_is_a_link_is_not_followed(path: Path) -> None:
    """Root may call in a folder that is another user's."""
    victim = path.with_name("victim")
    victim.write_text("precious")
    path.with_name(f".{path.name}.lock").symlink_to(victim)
    with pytest.raises(db.DatabaseError):
        db.add_order("a", path=path)
    assert victim.read_text() == "precious"


def test_the_same_id_twice_is_tried_again_once(path: Path) -> None:
    path.write_text('{"orders": {}, "failed": {"a": {"status": 500}}}')
    assert db.retry_orders(iter(["a", "a"]), path) == ["a"]
    assert list(db.get_orders(path)) == ["a"]
