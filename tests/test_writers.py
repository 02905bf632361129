"""database.json as many write it at once, and as people leave it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, ROOT, Home, end_orders, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import db

# --- other writers -------------------------------------------------------------------------------


def test_many_writers_at_once(home: Home) -> None:
    """Four programs add, while the poller takes out."""
    home.wait_for()
    poller = home.start(before=QUICK)
    code = "import sys, db\nfor task_id in sys.argv[1:]: assert db.add_order(task_id, 'a project')"
    python = [sys.executable, "-c", code]
    typed = ["sh", "-c", 'for id; do "$PYTHON" "$PYTHONPATH/db.py" add "$id" || exit; done', "-"]
    env = home.environment(PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    added, writers = list[str](), []
    for command, number in ((python, 40), (python, 40), (typed, 5), (typed, 5)):
        added += (tasks := [home.grafx.add() for _ in range(number)])
        writers.append(subprocess.Popen([*command, *tasks], env=env, stdout=subprocess.DEVNULL))
    assert [writer.wait(120) for writer in writers] == [0] * 4
    eventually(lambda: not home.waiting())
    assert poller.stop() == 0, poller.log()
    assert "Traceback" not in poller.log()
    assert home.files() == sorted(f"{task_id}.png" for task_id in added)


def test_what_an_editor_saves_while_a_change_is_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves while the new text is on its way to the disk, the slowest part: the file is read again."""
    path = tmp_path / "database.json"
    path.write_text('{"orders": {"one": {}, "two": {}}, "failed": {}}')
    db.Deliveries(path).add({"sent": "sent.png"})
    real, left = os.fsync, ["a", "b", "c"]

    def fsync(fd: int) -> None:
        real(fd)
        if left:
            data = json.loads(path.read_text())
            data["orders"][left.pop()] = {"projectID": "by hand"}
            path.with_name("edited").write_text(json.dumps(data))
            path.with_name("edited").replace(path)

    monkeypatch.setattr(os, "fsync", fsync)
    end_orders(["one"], {"two": (500, "no")}, path)
    assert db.read(path).orders.keys() == {"a", "b", "c"}
    assert db.read(path).failed.keys() == {"two"}
    left.append("d")  # while the list of deliveries is written
    assert db.retry_orders("sent", path) == ["sent"]
    assert db.read(path).orders.keys() == {"a", "b", "c", "d", "sent"}


def test_what_is_saved_in_place_just_after_a_write_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a store or `cat` saves, before the poller has looked at what it wrote itself."""
    path, real = tmp_path / "database.json", os.fsync
    path.write_text('{"orders": ["a", "b"]}')

    def fsync(fd: int) -> None:
        real(fd)
        if stat.S_ISDIR(os.fstat(fd).st_mode):  # after the rename
            path.write_text('{"orders": ["typed"]}')

    monkeypatch.setattr(os, "fsync", fsync)
    file = db.File(path)
    db.change(file, lambda store: store.take(["a"]))
    assert db.get_orders(path).keys() == {"typed"}
    assert file.changed()


# --- the file as people leave it -----------------------------------------------------------------

quiet = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
GUID = "84ad7436-f82f-4e87-8cd3-37299e37878c"
STRANGE = ["", "..", "../../etc/passwd", "a b", "ü", "-x", "Z" * 129, "a\n", "a\0b", "/", "\ud800"]
text = st.text() | st.sampled_from(["\ud800", "\udfff\ud83d", "\0", "\u2028", "\ufeff", "é", "😀"])
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["projectID", "added", "error", "status", "order", "taskID"]) | text
fields = st.dictionaries(keys, values, max_size=4)
names = st.sampled_from(["a", "b", "c", GUID, "x.png", "Z" * 128]) | st.sampled_from(STRANGE) | text
objects = st.builds(lambda name, more: {"taskID": name, **more}, names, fields)
items = st.lists(names | objects | st.tuples(names, fields | values).map(list) | values, max_size=6)
records = st.dictionaries(names, fields | values, min_size=1, max_size=5)
others = st.dictionaries(text, values, max_size=3)
stores = st.builds(
    lambda before, orders, rest, after: {**before, "orders": orders, **rest, **after},
    others,
    records | items | st.builds(lambda value: {"dataType": "Map", "value": value}, items),
    st.fixed_dictionaries({}, optional={"failed": records, "failing": records}),
    others,
)


@pytest.fixture(autouse=True, scope="module")
def impatient() -> Iterator[None]:
    """What makes no sense counts as broken at once, in this process, and nothing is logged.

    pytest-xdist hands on what was logged as UTF-8, which cannot hold the half surrogate pairs below.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "SAVING", 0.0)
        patch.setattr(db.log, "disabled", True)
        yield


def exact(raw: bytes) -> list[str]:
    """The fields of a file in their order, each as text, where 1 is neither 1.0 nor True."""
    return [json.dumps(field) for field in json.loads(raw.decode("utf-8-sig")).items()]


@contextlib.contextmanager
def left(raw: bytes) -> Iterator[Path]:
    """database.json with this content, in memory where there is some."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        path = Path(folder) / "database.json"
        path.write_bytes(raw)
        yield path


def refused(raw: bytes, *changes: Callable[[Path], object]) -> str:
    """What is said, in one clear line, of each of these changes; the file is left as it is."""
    said = set[str]()
    with left(raw) as path:
        for change in changes:
            with pytest.raises(db.DatabaseError) as raised:
                change(path)
            said.add(str(raised.value).replace(str(path), "FILE"))
            assert path.read_bytes() == raw
            assert {other.name for other in path.parent.iterdir()} <= {path.name, f".{path.name}.lock"}
    (one,) = said
    assert re.fullmatch("FILE(:| cannot be saved as JSON:) .+", one)
    return one


def add(path: Path) -> None:
    assert db.add_order("new", "p", path)


def end(path: Path) -> None:
    end_orders(["new"], {"b": (500, "x")}, path)


def problem(raw: bytes) -> str:
    """What is wrong with a file; where that is nothing, all else in it stays while orders come and go."""
    with left(raw) as path:
        try:
            store = db.read(path)
        except db.DatabaseError:
            return refused(raw, db.read, add, end, lambda path: db.retry_orders(path=path))
        before = exact(raw)
        assert all(db.is_task_id(task_id) for task_id in store.orders)
        add(path)
        end_orders([], {"new": (500, "no\n\ud800")}, path)
        assert db.retry_orders("new", path) == ["new"]
        end_orders(["new", "never was"], {"never was either": (None, "")}, path)
        assert exact(path.read_bytes())[: len(before)] == before

        failed = {task_id: record for task_id, record in store.failed.items() if db.is_task_id(task_id)}
        assert sorted(db.retry_orders(path=path)) == sorted(failed)
        now = db.read(path)
        assert (now.orders.keys(), now.invalid) == (store.orders.keys() | failed.keys(), store.invalid)
        assert now.failed.keys() == store.failed.keys() - failed.keys()
        for task_id, record in failed.items():
            own = {key: value for key, value in record.items() if key not in (*db.RECORD, "taskID")}
            assert now.orders[task_id].items() >= (own | store.orders.get(task_id, {})).items()

        for task_id in now.orders:
            end_orders([], {task_id: (None, "x")}, path)
            assert db.get_orders(path).keys() == now.orders.keys() - {task_id}
            assert db.retry_orders(task_id, path) == [task_id]
        assert db.get_orders(path) == now.orders
        end_orders(list(now.orders), {}, path)
        last = db.read(path)
        assert (last.orders, last.invalid, last.failed) == ({}, store.invalid, now.failed)
        return ""


@quiet
@given(stores, st.sampled_from([0, 1, 2, 3]))
def test_any_mix_of_entries(data: Any, style: int) -> None:
    indent = (4, None, 1, "\t")[style]
    raw = json.dumps(data, indent=indent, ensure_ascii=style == 2).encode("utf-8", "backslashreplace")
    raw = b"\xef\xbb\xbf" + raw if style == 1 else raw
    assert not problem(raw.replace(b"\n", b"\r\n") if style == 3 else raw)


@quiet
@given(values | others | st.binary() | st.text().map(lambda text: text.encode("utf-16", "replace")))
def test_any_file(data: Any) -> None:
    problem(data if isinstance(data, bytes) else json.dumps(data).encode())


WHOLE = '{\n "orders": {"a": {"projectID": "é"}, "b": {}},\n "n": 1.50,\n "failed": {}\n}\n'.encode()


def test_a_file_that_is_cut_off_anywhere() -> None:
    for size in range(len(WHOLE) - 1):
        assert problem(WHOLE[:size])
    assert not problem(WHOLE)


ODD = {
    "nothing": (b"\r\n", 'it is empty. Put it back, or start with an empty one: {"orders": {}}'),
    "two": (WHOLE * 2, "line 6, column 1: Extra data"),
    "UTF-16": (WHOLE.decode().encode("utf-16"), "byte 1 is not UTF-8"),
    "comma": (b'{"orders": ["a",\n]}', "line 2, column 1"),
    "key twice": (b'{"orders": {"a": {"n": [{"k": 1, "k": 1}]}}}', 'duplicate key "k" in one object'),
    "control": (b'{"a": "\n"}', "line 1, column 8: Invalid control character. It is left as it is"),
    "misspelt": (b'{"Orders": {"a": {}}, "failed": {}}', 'it has no "orders", but "Orders". It is left'),
    "bare": (b'{"00000000-0000-0000-0000-00000000000A": {}}', 'it has no "orders", but "0000'),
    "deep": (b'{"orders": ' * 100_000, "it is nested too deeply"),
    "failed": (b'{"orders": {}, "failed": []}', '"failing" and "failed"'),
    "orders": (b'{"orders": 5}', '"orders" must be'),
}


@pytest.mark.parametrize(("raw", "said"), ODD.values(), ids=ODD)
def test_what_is_wrong_with_the_file_is_said(raw: bytes, said: str) -> None:
    assert said in problem(raw)


def test_what_json_cannot_hold_is_never_written() -> None:
    for raw in (b'{"orders": {"b": {}}, "x": NaN}', b'{"orders": {"b": {"n": [1e999]}}}'):
        refused(raw, add, end)


# --- the same through the programs, where a person sees it ---------------------------------------


def test_an_odd_file_in_the_programs(home: Home) -> None:
    strange = ["../x", "a b", "", 7, None, {}, [], {"taskID": ["a"]}, ["b"], ["a", "b"], {"\ud83d": "\ud800"}]
    orders = [*strange, "a", "a", ["a", {}], "b", {"taskID": "c", "projectID": "\ud800"}]
    failed = {"x.png": {}, "c": {"projectID": "of before"}}
    home.write({"orders": orders, "x": "\udfff\ud83d\ude00", "failed": failed})
    assert not problem(home.database.read_bytes())
    for task_id in ("a", "b", "c", "new", "x.png"):
        home.grafx.add(task_id=task_id)
    for arguments in (["list"], ["add", "new", "--project", "é"], ["retry", "--all"]):
        done = home.db(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
    poller = home.run("--once")
    assert poller.process.returncode == 0, poller.log()
    assert home.files() == ["a.png", "b.png", "c.png", "new.png", "x.png.png"]
    assert home.read() == {"orders": strange, "x": "\udfff\U0001f600", "failed": {}}


def test_a_broken_file_is_one_clear_line_of_db_py(home: Home) -> None:
    home.write(broken := '{"orders": ["a",\n]}')
    done = home.run("list", before="db.SAVING = 0; sys.exit(db.main())")  # db.py, less patient
    assert done.process.returncode == 1
    assert re.fullmatch(f"db.py: {home.database}: line 2, column .* fix it.\n", done.log())
    assert home.database.read_text() == broken
