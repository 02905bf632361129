"""database.json: its shapes, what is kept, what is an error, and how it is written."""

from __future__ import annotations

import codecs
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
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Home, end_orders, git

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


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes no sense counts as broken after 0.3 s already."""
    monkeypatch.setattr(db, "SAVING", 0.3)


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
    end_orders([], {A: (500, "No such item")}, path)
    data = json.loads(path.read_text())
    assert list(data) == list(around(0))
    assert data["orders"] == make(C)
    record = data["failed"][A]
    assert record.items() >= {"status": 500, "error": "No such item"}.items()
    assert record.items() >= ({} if shape == "ids" else FIELDS).items()
    assert re.fullmatch(UTC, record["failed"])

    assert db.retry_orders("unknown", path) == []
    assert db.retry_orders(A, path) == [A]
    data = json.loads(path.read_text())
    assert data["failed"] == {}
    assert db.get_orders(path)[A] == ({} if shape == "ids" else FIELDS)
    assert data["orders"] == (make(C, A) if shape != "fields first" else [*make(C), {"taskID": A, **FIELDS}])


@pytest.mark.parametrize("shape", SHAPES)
def test_each_order_has_a_line_of_its_own(path: Path, shape: str) -> None:
    save(
        path, json.dumps({"users": [1], "orders": SHAPES[shape](A, B, C, "d"), "failing": {B: {"times": 1}}})
    )
    end_orders([A], {C: (500, "no\nsuch")}, path)
    text = path.read_text()
    assert text == pretty(json.loads(text))
    assert "\n    " + '"users": [\n        1\n    ]' in text
    for task_id, times in ((A, 0), (B, 2), (C, 1), ("d", 1)):
        assert sum(f'"{task_id}"' in line for line in text.splitlines()) == times, text


def test_an_order_that_ends_takes_its_rejections_along(path: Path) -> None:
    rejection = {"status": 500, "error": "x", "since": "2026-01-01T00:00:00Z", "times": 2}
    save(path, {"orders": [A, B, C], "failing": {A: rejection, "note": "mine", B: rejection}})
    assert db.read(path).failing == {A: rejection, B: rejection}
    db.remove_order(A, path)
    assert json.loads(path.read_text())["failing"] == {"note": "mine", B: rejection}
    save(path, {"orders": [A, B, C], "failing": {C: rejection, "note": "mine", B: rejection}})
    db.remove_order(C, path)
    assert list(json.loads(path.read_text())["failing"]) == ["note", B]
    save(path, {"orders": [A, B, C], "failing": {A: rejection, B: rejection, "note": "mine"}})
    db.remove_order(A, path)
    assert list(json.loads(path.read_text())["failing"]) == [B, "note"]  # in the order that it had
    save(path, {"orders": [A, B, C], "failing": {A: rejection, B: rejection}})
    end_orders([A], {B: (500, "")}, path)
    assert "failing" not in json.loads(path.read_text())


@pytest.mark.parametrize("orders", [{}, [], ["x"], [{"taskID": "x"}], {"dataType": "Map", "value": []}])
@pytest.mark.parametrize(
    "own",
    [
        {"taskID": "another", "order": "PO-4711"},
        {"taskID": A, "order": {"lines": 3}, "added": "2026-01-02T03:04:05Z"},
        {"order": {}},
        {"order": None, "taskID": None},
        {"added": "2026-01-02T03:04:05Z"},
    ],
)
def test_a_record_that_a_person_typed_comes_back_under_its_id_with_all_its_fields(
    path: Path, orders: Any, own: dict[str, Any]
) -> None:
    save(path, {"orders": orders, "failed": {A: {**own, "status": 500, "error": "x", "failed": "?"}}})
    for _ in range(2):  # and again after it failed once more
        assert db.retry_orders(A, path) == [A]
        store = db.read(path)
        assert store.orders.keys() - {"x"} == {A}
        assert {"taskID": A, **store.orders[A]} == {"taskID": A, **own}
        assert store.failed == {}
        end_orders([], {A: (404, "no")}, path)


def test_a_retry_adds_to_what_is_pending_already(path: Path) -> None:
    save(path, {"orders": [{"taskID": A, "n": 1}], "failed": {A: {"n": 2, "projectID": "p", "status": 5}}})
    assert db.retry_orders(A, path) == [A]
    assert db.get_orders(path) == {A: {"n": 1, "projectID": "p"}}


def test_many_entries_cost_no_more_each_than_few(path: Path) -> None:
    """What is done for one of them must not look at all of them: that would be minutes here."""
    begun, many = time.process_time(), [f"t{number}" for number in range(20_000)]
    save(path, json.dumps({"orders": [], "failed": {task: {"status": 500, **FIELDS} for task in many}}))
    assert db.retry_orders(None, path) == many
    assert list(db.get_orders(path)) == many
    twice = ", ".join(f'"{task}": {{}}' for task in [*many, many[-1]])
    save(path, f'{{"orders": {{{twice}}}}}')
    with pytest.raises(db.DatabaseError, match=f'"{many[-1]}" stands twice'):
        db.read(path)
    assert time.process_time() - begun < 4


def test_a_retry_by_time(path: Path) -> None:
    records = {
        "early": {"status": 500, "failed": "2026-01-01T11:59:59Z"},
        "late": {"status": 500, "failed": "2026-01-01T12:00:00Z"},
        "gone": {"status": 404, "failed": "2026-01-01T13:00:00Z"},
        "bare": {},
    }
    noon = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
    abroad = noon.astimezone(timezone(timedelta(hours=5)))
    for since, moved in ((noon, {"late", "gone"}), (abroad, {"late", "gone"}), (None, set(records))):
        save(path, {"orders": {}, "failed": records})
        assert set(db.retry_orders(None, path, since)) == moved
        assert set(db.get_orders(path)) == moved
        assert db.read(path).failed.keys() == records.keys() - moved


def test_fields_that_are_called_like_those_of_a_record_are_not_lost(path: Path) -> None:
    fields = {"projectID": "p", "status": "rush", "error": "none yet", "failed": 0, "order": [7]}
    save(path, {"orders": {A: fields}})
    end_orders([], {A: (404, "gone")}, path)
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


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_all_else_is_kept_to_the_letter(path: Path, bom: bytes) -> None:
    save(path, bom + TEXT.encode())
    db.remove_order("gone", path)
    assert path.read_bytes().removeprefix(bom) == TEXT.replace('        "gone": {},\n', "").encode()
    assert db.get_orders(path)[B]["half"] == "\ud83d"


def test_a_missing_file_becomes_an_empty_store(path: Path) -> None:
    assert db.get_orders(path) == {}
    assert not path.exists()
    db.add_order(A, path=path)
    added = json.loads(path.read_text())["orders"][A]["added"]
    assert path.read_text() == pretty({"orders": {A: {"added": added}}, "failed": {}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", 'it is empty. Put it back, or start with an empty one: {"orders": {}}.'),
        (" \r\n\t\n", "it is empty"),
        (b"\xef\xbb\xbf", "it is empty"),
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
        ('{"orders": {}, "failing": 1}', '"failing"'),
        ('{"orders": {}, "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_an_error_and_left_as_it_is(path: Path, content: Any, said: str) -> None:
    save(path, content)
    before = path.read_bytes(), path.stat().st_ino
    for change in (
        lambda: db.get_orders(path),
        lambda: db.add_order(A, path=path),
        lambda: end_orders([A], {B: (500, "")}, path),
        lambda: db.retry_orders(None, path),
    ):
        with pytest.raises(db.DatabaseError, match=re.escape(said)) as raised:
            change()
        assert str(path) in str(raised.value)
        assert not isinstance(raised.value, db.Busy)
    assert (path.read_bytes(), path.stat().st_ino) == before


STRANGE = ["../etc/passwd", "a b", "", ".hidden", "-x", "a/b", "x" * 129, "é", "a\n", "a\0"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_entry_that_is_no_task_id_stays_and_is_no_order(path: Path, shape: str) -> None:
    make, longest = SHAPES[shape], "x" * 128
    save(path, around(make(A, *STRANGE, longest)))
    store = db.read(path)
    assert list(store.orders) == [A, longest]
    assert len(store.strange) == len(STRANGE)
    end_orders([A], dict.fromkeys(STRANGE, (500, "")), path)
    db.remove_order(longest, path)
    assert path.read_text() == pretty(around(make(*STRANGE)))


def test_items_of_a_list_that_are_no_order_at_all_stay(path: Path) -> None:
    items = [
        None,
        5,
        1.5,
        {},
        {"taskID": ["x"]},
        [],
        [A, {}, 1],
        {"id": A},
        [["x"], {}],
        True,
        [A, B],
        [A, None],
    ]
    save(path, {"orders": [*items, A]})
    store = db.read(path)
    assert list(store.orders) == [A]
    assert list(map(json.loads, store.strange)) == items
    db.remove_order(A, path)
    assert json.loads(path.read_text())["orders"] == items


@pytest.mark.parametrize("task_id", STRANGE)
def test_nothing_but_a_task_id_is_added(path: Path, task_id: str) -> None:
    with pytest.raises(ValueError, match="task id"):
        db.add_order(task_id, path=path)
    assert not path.exists()


@pytest.mark.parametrize("project", [float("nan"), 7, b"p", ["p"], False, 0])
def test_a_project_that_is_no_string_is_an_error_that_names_it(path: Path, project: Any) -> None:
    """pandas reads an empty cell as NaN."""
    with pytest.raises(ValueError, match=re.escape(repr(project))):
        db.add_order(A, project, path)
    with pytest.raises(ValueError, match=re.escape(repr(project))):
        db.add_order(project, path=path)
    assert not path.exists()


def test_a_project_of_half_a_character_is_kept(path: Path) -> None:
    assert db.add_order(A, "\ud83d", path)
    assert db.get_orders(path)[A]["projectID"] == "\ud83d"
    path.read_text("utf-8")


def test_only_what_changes_is_written(path: Path) -> None:
    save(path, {"orders": {A: {}}})
    before = path.stat().st_ino, path.read_bytes()
    db.add_order(A, path=path)
    db.remove_order(B, path)
    end_orders([B], {C: (500, "")}, path)
    db.retry_orders(None, path)
    assert (path.stat().st_ino, path.read_bytes()) == before
    seen = db.version(path)
    assert db.version(path) == seen
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
    end_orders([A], {}, path)
    assert json.loads(path.read_text()).items() >= {"orders": ["typed"], "mine": 1}.items()


@pytest.mark.parametrize("half", [b"", b'{"orders": '])
def test_a_file_that_an_editor_is_just_saving_is_waited_for(path: Path, half: bytes) -> None:
    whole = b'{"orders": ["typed", "t2"]}'
    with path.open("wb", buffering=0) as file:
        file.write(half)
        with pytest.raises(db.Busy):
            db.File(path).read()
        change = threading.Thread(target=db.remove_order, args=(B, path))
        change.start()
        for piece in range(len(half), len(whole)):  # slower in all than SAVING, but never still for that long
            time.sleep(0.05)
            file.write(whole[piece : piece + 1])
    change.join()
    assert list(db.get_orders(path)) == ["typed"]


def test_a_file_that_an_editor_has_renamed_away_is_no_empty_store(path: Path) -> None:
    db.add_order(A, path=path)
    aside = path.with_name("database.json~")
    path.rename(aside)
    change = threading.Thread(target=db.add_order, args=(B, None, path))
    change.start()
    time.sleep(db.SAVING / 2)
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
    db.remove_order(A, path)
    assert db.retry_orders(None, path) == []
    assert path.with_name(".database.json.lock").exists()
    assert db.get_orders(path) == {}
    assert db.add_order(A, path=path)


@pytest.mark.parametrize("ahead", [3600, 3, -3600])
@pytest.mark.parametrize("half", [b"", b'{"orders": '])
def test_a_half_saved_file_is_known_with_any_clock(path: Path, half: bytes, ahead: int) -> None:
    save(path, half)
    os.utime(path, (time.time() + ahead,) * 2)
    with pytest.raises(db.Busy):
        db.File(path).read()
    begun = time.monotonic()
    with pytest.raises(db.DatabaseError) as raised:
        db.read(path)
    assert not isinstance(raised.value, db.Busy)
    assert db.SAVING <= time.monotonic() - begun < db.SAVING + 0.5


def test_a_broken_file_is_parsed_again_only_when_it_changed(path: Path) -> None:
    save(path, '{"orders": [' + '"x", ' * 500_000 + "]}")
    watch = db.File(path)
    with pytest.raises(db.Busy):
        watch.read()
    begun = time.process_time()
    for _ in range(100):
        assert watch.changed()
        with pytest.raises(db.DatabaseError):
            watch.read()
    assert time.process_time() - begun < 0.1  # a single time takes 0.03 s
    save(path, {"orders": [A]})
    assert list(watch.read().orders) == [A]
    assert not watch.changed()


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
        database = db.Database(path)
        database.start()
        database.delivered(task_id, f"{task_id}.png")
        assert database.flush()
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


def test_a_lock_is_had_by_one_at_a_time_and_names_its_holder(path: Path) -> None:
    save(path, {"orders": [A]})
    for lock, said in (("pid", "a poller for .* is already running"), ("lock", "is being written by")):
        with db.lock(path, lock, 0) as held:
            db.note(held)
            with pytest.raises(db.Busy) as raised, db.lock(path, lock, 0.1):
                pass
        assert re.search(rf"{said}.* process {os.getpid()}\b", str(raised.value))
        assert str(path) in str(raised.value)
        assert not re.search(r"\b(end it|kill)\b", str(raised.value))
    with db.lock(path, "pid", 0):
        db.add_order(B, path=path)  # another lock
    with db.lock(path, "pid", 0):
        pass


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

    assert ended("add", A, "--project", "my-project")[0] == 0
    assert ended("add", B)[0] == 0
    assert ended("add", B) == (0, f"{B} was pending already, in {home.database}\n")
    code, said = ended("add", "../x")
    assert (code, "is not a task id" in said) == (1, True)
    assert {task: fields.get("projectID") for task, fields in home.waiting().items()} == {
        A: "my-project",
        B: None,
    }

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
    assert list(home.failed()) == [B]
    assert home.waiting()[A]["projectID"] == "my-project"
    code, said = ended("retry", A)
    assert (code, A in said) == (1, True)
    assert ended("retry", "")[0] == 1  # a shell's empty variable does not mean all
    assert list(home.failed()) == [B]
    assert ended("retry")[0] == ended("retry", B, "--all")[0] == 2
    assert ended("retry", "--all")[0] == 0
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
    assert [row[0] for row in rows if re.match(r"\d+ ", row[0])][:3] == ["1 pending", "1 failing", "0 failed"]
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
    times = {"a": "2026-01-01T11:00:00Z", "b": "2026-01-01T12:00:00Z", "c": "2026-01-01T13:00:00Z"}
    home.write(
        {"orders": {}, "failed": {key: {"status": 500, "failed": when} for key, when in times.items()}}
    )
    for wrong in (["x", "--since", "2026-01-01"], ["--all", "--since", "2026-01-01"], ["--since", "noon"]):
        assert home.db("retry", *wrong).returncode == 2
    done = home.db("retry", "--since", "2026-01-01 12:30")
    assert (done.returncode, done.stdout) == (0, "1 order will be polled again\n")
    assert set(home.waiting()) == {"c"}
    assert home.db("retry", "--since", "2026-01-01T12:00:00Z").stdout.startswith("1 ")
    assert home.db("retry", "--since", "2026-01-01T12:00:00Z").stdout.startswith("0 ")
    assert set(home.waiting()) == {"b", "c"}


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
    assert db.add_order("new", path=path)
    assert sorted(db.get_orders(path)) == ["new", "typed"]
