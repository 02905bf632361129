"""database.json as many write it at once, and as people leave it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Home, end_orders, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sandbox import Sandbox

import db

# --- other writers -------------------------------------------------------------------------------

ADDS = """
    import sys; sys.path.insert(0, {root!r})
    import db
    for task_id in sys.stdin.read().split():
        assert db.add_order(task_id, "a project")
"""
RENAME_EXCHANGE = 2


class Editor:
    """Saves as an editor does: knows nothing of the lock, writes a new file, renames it over the old one.

    It does so by exchanging the two, which looks the same to everybody else and tells what it saved over.
    """

    def __init__(self, path: Path) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("needs renameat2 of Linux to see what an editor saves over: NOT tested")
        self.path, self.new = path, path.with_name("editor's")
        self.rename = ctypes.CDLL(None, use_errno=True).renameat2

    def edit(self, change: Callable[[Any], None]) -> list[str]:
        """Open, type something, save; gives the orders that it saved over, for the person to put back."""
        seen = self.path.read_bytes()
        data = json.loads(seen)
        change(data)
        self.new.write_text(json.dumps(data, indent=4))
        if self.rename(-100, bytes(self.new), -100, bytes(self.path), RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), "renameat2")
        under = self.new.read_bytes()
        return [] if under == seen else sorted(json.loads(under)["orders"].keys() - data["orders"].keys())


def test_many_writers_at_once(home: Home, grafx: Sandbox) -> None:
    """Four programs add, the poller takes out, and an editor saves over it all."""
    home.wait_for()
    poller = home.start(before="db.LOOK = 0.1")
    shares = [[grafx.add() for _ in range(number)] for number in (80, 80, 5, 5)]
    added = [task_id for share in shares for task_id in share]
    code = textwrap.dedent(ADDS).format(root=str(ROOT))
    commands = [[sys.executable, "-c", code]] * 2
    each = 'while read -r id; do "$@" "$id" || exit; done'
    commands += [["sh", "-c", each, "-", sys.executable, str(ROOT / "db.py"), "add"]] * 2
    writers = [
        subprocess.Popen(
            command, env=home.environment(), cwd=home.folder, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )
        for command in commands
    ]  # fmt: skip
    for writer, share in zip(writers, shares, strict=True):
        assert writer.stdin
        writer.stdin.write("\n".join(share) + "\n")
        writer.stdin.close()
    editor, typed, saved_over = Editor(home.database), list[str](), list[bool]()

    def all_have_ended() -> bool:
        typed.append(grafx.add())
        overwritten = editor.edit(lambda data: data["orders"].update({typed[-1]: {}}))
        saved_over.append(bool(overwritten))
        for task_id in overwritten:
            db.add_order(task_id, path=home.database)
        time.sleep(0.1)
        return all(writer.poll() is not None for writer in writers)

    eventually(all_have_ended, patience=120)
    assert [writer.returncode for writer in writers] == [0] * 4
    eventually(lambda: not home.waiting())
    assert poller.stop() == 0, poller.log()
    assert "Traceback" not in poller.log()
    assert not home.failed()
    delivered = {Path(name).stem for name in home.files()}
    lost = [task_id for task_id in typed if task_id not in delivered]
    print(
        f"{len(added)} orders added by four programs, none lost; {len(typed)} times saved by an editor, "
        f"which saved over a change {sum(saved_over)} times; what it saved was lost {len(lost)} times"
    )
    # What is typed may be lost: between the last look and the rename there is a moment that nobody can close.
    assert delivered >= set(added), f"{len(set(added) - delivered)} lost"


def test_saved_while_a_change_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor saves while the new file is on its way to the disk, the slowest part: it is read again."""
    path = tmp_path / "database.json"
    path.write_text('{"orders": {"one": {}, "two": {}}, "failed": {}}')
    real, typed = os.fsync, list[str]()

    def fsync(fd: int) -> None:
        real(fd)
        if len(typed) < 3:
            typed.append(f"typed-{len(typed)}")
            data = json.loads(path.read_text())
            data["orders"][typed[-1]] = {"projectID": "by hand"}
            path.with_name("edited").write_text(json.dumps(data))
            path.with_name("edited").replace(path)

    monkeypatch.setattr(os, "fsync", fsync)
    end_orders(["one"], {"two": (500, "no")}, path)
    assert len(typed) == 3
    assert db.read(path).orders.keys() == set(typed)
    assert db.read(path).failed.keys() == {"two"}


# --- the file as people leave it -----------------------------------------------------------------

quiet = settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
ids = st.sampled_from(["a", "b", "c", "84ad7436-f82f-4e87-8cd3-37299e37878c", "x.png", "Z" * 128])
strange_ids = st.sampled_from(
    ["", "..", "../../etc/passwd", "a b", "ü", "-x", "Z" * 129, "a\n", "a\0b", "/", "\ud800"]
)
text = st.text() | st.sampled_from(["\ud800", "\udfff\ud83d", "\0", "\u2028", "\ufeff", "é", "😀"])
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.sampled_from(["projectID", "added", "error", "status", "order", "taskID"]) | text, values, max_size=4
)
names = ids | strange_ids | text
items = (
    names
    | st.builds(lambda name, more: {"taskID": name, **more}, names, fields)
    | st.tuples(names, fields | values).map(list)
    | values
)
shapes = (
    st.dictionaries(names, fields | values, max_size=6)
    | st.lists(items, max_size=6)
    | st.builds(lambda value: {"dataType": "Map", "value": value}, st.lists(items, max_size=6))
)
others = st.dictionaries(text | st.sampled_from(["tokens", "users"]), values, max_size=3)
failures = st.dictionaries(
    names,
    fields | st.fixed_dictionaries({}, optional={"status": values, "error": values}) | values,
    max_size=3,
)
rejections = st.dictionaries(
    names, st.fixed_dictionaries({}, optional={"since": values, "times": values}) | values, max_size=3
)
stores = st.builds(
    lambda before, orders, failed, failing, after: {
        **before,
        "orders": orders,
        "failed": failed,
        **({"failing": failing} if failing else {}),
        **after,
    },
    others,
    shapes,
    failures,
    rejections,
    others,
).filter(lambda data: isinstance(data["orders"], (dict, list)))


@pytest.fixture(autouse=True, scope="module")
def impatient() -> Iterator[None]:
    """What makes no sense counts as broken at once, in this process, and nothing is logged.

    pytest-xdist hands on what was logged as UTF-8, which cannot hold the half surrogate pairs below.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "SAVING", 0.0)
        patch.setattr(db.log, "disabled", True)
        yield


def exact(raw: bytes) -> Any:
    """A file's content with the order of its keys, and 1 apart from 1.0 and True."""
    return json.loads(
        raw.decode("utf-8-sig"),
        object_pairs_hook=lambda pairs: ("{}", pairs),
        parse_float=lambda number: ("float", repr(float(number))),
        parse_int=lambda number: ("int", number),
    )


@contextlib.contextmanager
def left(raw: bytes) -> Iterator[Path]:
    """database.json with this content, in memory where there is some."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    try:
        path = folder / "database.json"
        path.write_bytes(raw)
        yield path
    finally:
        shutil.rmtree(folder)


def attempt(path: Path, change: Callable[[], object]) -> bool:
    """Whether it was possible. Where not, there is one clear line and the file is as it was."""
    before = path.read_bytes()
    try:
        change()
    except db.DatabaseError as error:
        assert path.read_bytes() == before
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return False
    finally:
        assert {other.name for other in path.parent.iterdir()} <= {path.name, f".{path.name}.lock"}
    return True


def without(data: Any, gone: set[str]) -> Any:
    """The file's exact content without what an order takes with it when it ends."""
    kept = []
    for key, value in data[1]:
        if key == "orders":
            if isinstance(value, tuple) and ("dataType", "Map") in value[1]:
                value = ("{}", [(k, drop(v, gone) if k == "value" else v) for k, v in value[1]])
            else:
                value = drop(value, gone)
        elif key in ("failed", "failing"):
            value = drop(value, gone)
        if key != "failing" or value[1]:  # it goes when nothing is left of it
            kept.append((key, value))
    return kept


def drop(entries: Any, gone: set[str]) -> Any:
    if isinstance(entries, tuple):
        return "{}", [(key, value) for key, value in entries[1] if key not in gone]
    return [item for item in entries if name(item) not in gone]


def name(item: Any) -> Any:
    """The id of one item of a list."""
    if isinstance(item, tuple) and item[0] == "{}":
        item = dict(item[1]).get("taskID")
    elif isinstance(item, list) and len(item) == 2 and isinstance(item[1], tuple) and item[1][0] == "{}":
        item = item[0]
    return item if isinstance(item, str) else None


def survives(raw: bytes) -> bool:
    """Add, end, fail, retry: what was in the file before is in it after, exactly, in its place.

    Gives whether it could be read at all.
    """
    with left(raw) as path:
        if not attempt(path, lambda: db.read(path)):
            for change in (
                lambda: db.add_order("new", path=path),
                lambda: end_orders(["a"], {"b": (None, "x")}, path),
                lambda: db.retry_orders(path=path),
            ):
                assert not attempt(path, change)
            return False
        before = exact(raw)
        store = db.read(path)
        assert all(db.is_task_id(task_id) for task_id in store.orders)
        if db.add_order("new", "p", path):
            assert without(exact(path.read_bytes()), {"new"})[: len(before[1])] == without(before, {"new"})
        assert db.get_orders(path).keys() == store.orders.keys() | {"new"}
        assert not db.add_order("new", path=path)
        end_orders(
            ["a", "new", "never was"], {"b": (500, "no\n\ud800"), "never was either": (None, "")}, path
        )
        assert db.get_orders(path).keys() == store.orders.keys() - {"a", "b", "new"}
        gone = {"a", "b", "new"}
        assert without(exact(path.read_bytes()), gone)[: len(before[1])] == without(before, gone)
        if "b" in store.orders:
            record = db.read(path).failed["b"]
            assert (record["status"], record["error"]) == (500, "no\n\ud800")
            kept = record.keys() | (
                record["order"].keys() if isinstance(record.get("order"), dict) else set()
            )
            assert kept >= store.orders["b"].keys()
            assert db.retry_orders("b", path) == ["b"]
            assert db.read(path).orders["b"] == store.orders["b"], "what a retry puts back is not what it was"
        retry(path)
        return True


def retry(path: Path) -> None:
    """All failed orders are pending again: under their ids, with all that a person wrote there."""
    before, store = exact(path.read_bytes()), db.read(path)
    moved = {task_id for task_id in store.failed if db.is_task_id(task_id)}
    assert set(db.retry_orders(path=path)) == moved
    now = db.read(path)
    assert now.orders.keys() == store.orders.keys() | moved
    assert now.failed.keys() == store.failed.keys() - moved
    for task_id in now.orders:
        own = {
            key: value
            for key, value in store.failed.get(task_id, {}).items()
            if key not in ("status", "error", "failed") and (key, value) != ("taskID", task_id)
        }
        kept = own.get("order")  # where an order's own fields go that are called like those of a record
        if isinstance(kept, dict) and kept and kept.keys() <= {"status", "error", "failed", "order"}:
            del own["order"]
            own |= kept
        assert now.orders[task_id] == own | store.orders.get(task_id, {})
    assert without(exact(path.read_bytes()), moved)[: len(before[1])] == without(before, moved)


@quiet
@given(stores, st.sampled_from([0, 1, 2, 3]))
def test_any_mix_of_entries(data: Any, style: int) -> None:
    raw = json.dumps(data, indent=(4, None, 1, "\t")[style], ensure_ascii=style == 2).encode(
        "utf-8", "backslashreplace"
    )
    if style == 1:
        raw = b"\xef\xbb\xbf" + raw
    survives(raw.replace(b"\n", b"\r\n") if style == 3 else raw)


@quiet
@given(values | others | st.binary() | st.text().map(lambda text: text.encode("utf-16", "replace")))
def test_any_file(data: Any) -> None:
    survives(data if isinstance(data, bytes) else json.dumps(data).encode())


WHOLE = json.dumps(
    {"orders": {"a": {"projectID": "é"}, "b": {}}, "n": 1.50, "failed": {}}, indent=4, ensure_ascii=False
)


def test_truncated_at_any_byte() -> None:
    raw = (WHOLE + "\n").encode()
    for end in range(len(raw)):
        survives(raw[:end])
    survives(raw)


# What the error says; "" for what can be read.
ODD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", 'it is empty. Put it back, or start with an empty one: {"orders": {}}'),
    "NUL": (b"\0" * 4096, "line 1, column 1"),
    "two": ((WHOLE * 2).encode(), "line 10, column 2: Extra data"),
    "UTF-16": (WHOLE.encode("utf-16"), "byte 1 is not UTF-8"),
    "comment": (b"// mine\n" + WHOLE.encode(), "line 1, column 1"),
    "comma": (b'{"orders": ["a",\n]}', "line 2, column 1"),
    "key twice": (b'{"orders": {"a": {"n": [{"k": 1, "k": 1}]}}}', '"k" stands twice in one object'),
    "deep, not closed": (b'{"orders": ' * 100_000, "it is nested too deeply"),
    "no object": (b"[]", "it must be an object"),
    "failed": (b'{"orders": {}, "failed": []}', '"failing" and "failed"'),
    "orders": (b'{"orders": 5}', '"orders" must be'),
    "Map without": (b'{"orders": {"dataType": "Map"}}', '"orders" must be'),
    "CRLF": (WHOLE.replace("\n", "\r\n").encode(), ""),
    "BOM": (b"\xef\xbb\xbf" + WHOLE.encode(), ""),
    "id twice": (b'{"orders": ["a", "a", {"taskID": "a", "projectID": "p"}, ["a", {}], "b", "b"]}', ""),
    "numbers": (b'{"orders": {"b": {"n": 1.10}}, "x": [-0.0, 1E5, 0.1000000000000000001]}', ""),
    "a list of pairs of ids": (b'{"orders": [["a", "b"], ["c", {"n": 1}]]}', ""),
    "failing": (
        b'{"orders": {"a": {}, "b": {}}, "failing": {"a": {"times": 1}, "b": {"times": 2}, "c": 7}}',
        "",
    ),
    "surrogates": (b'{"orders": {"b": {"projectID": "\\ud800"}}, "x": "\\udfff\\ud83d\\ude00"}', ""),
    "number of 5,000 digits": (b'{"orders": {}, "x": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "deep orders": (b'{"orders": [' + b"[" * 200 + b"]" * 200 + b"]}", ""),
    "no orders": (b'{"users": {}}', ""),
    "strange": (b'{"orders": ["../x", "a b", "", 7, null, {}, [], {"taskID": ["a"]}, ["b"], "b"]}', ""),
    "typed failures": (
        b'{"orders": ["x"], "failed": {"a": {"taskID": "y", "order": {"lines": 3}}, "b": {"taskID": "b",'
        b' "order": {}}, "c": {"status": 1, "order": {"status": "rush", "failed": 0}}}}',
        "",
    ),
    "fields like a record's": (
        b'{"orders": {"b": {"status": "x", "error": "y", "failed": 0, "order": [7]}}}',
        "",
    ),
    "fields": (
        b'{"orders": {"a": 7, "b": [1.50], "c": null, "x.png": {"taskID": "b"}}, "failed": {"a": 1}}',
        "",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_file(kind: str) -> None:
    raw, said = ODD[kind]
    assert survives(raw) == (not said)
    if said:
        with left(raw) as path, pytest.raises(db.DatabaseError, match=re.escape(said)):
            db.read(path)


@pytest.mark.parametrize("number", ["NaN", "1e999"])
@pytest.mark.parametrize("text", ['{"orders": {"b": {}}, "x": %s}', '{"orders": {"b": {"n": [%s]}}}'])
def test_what_json_cannot_hold_is_never_written(text: str, number: str) -> None:
    with left((text % number).encode()) as path:
        assert attempt(path, lambda: db.read(path))
        for change in (
            lambda: db.add_order("new", "p", path),
            lambda: end_orders(["new"], {"b": (500, "x")}, path),
        ):
            assert not attempt(path, change)


@pytest.mark.parametrize(
    "inside", ['"x": %s, "orders": ["b"]', '"orders": ["b", %s]', '"orders": {"b": {"x": %s}}']
)
def test_any_depth(inside: str) -> None:
    """Where the depth that can be read ends, the one that can be written may have ended before."""

    def tries(depth: int) -> list[bool]:
        deep = "[" * depth + "]" * depth
        changes: list[Callable[[Path], object]] = [
            db.read,
            lambda path: db.add_order("new", path=path),
            lambda path: end_orders(["new"], {"b": (500, "x")}, path),
            lambda path: db.retry_orders(path=path),
        ]
        with left(("{" + inside % deep + "}").encode()) as path:
            worked = [attempt(path, partial(change, path)) for change in changes]
            assert deep in "".join(path.read_text().split())
            return worked

    assert tries(100) == [True] * 4
    assert tries(100_000) == [False] * 4
    least, most = 100, 100_000
    while least < most - 1:
        depth = (least + most) // 2
        with left(("{" + inside % ("[" * depth + "]" * depth) + "}").encode()) as path:
            least, most = (depth, most) if attempt(path, partial(db.read, path)) else (least, depth)
    for depth in (least - 40, *range(least - 3, least + 3)):
        tries(depth)


# --- the same through the programs, where a person sees it ---------------------------------------


@pytest.mark.parametrize("kind", ["surrogates", "strange"])
def test_odd_file_in_the_programs(home: Home, grafx: Sandbox, kind: str) -> None:
    for task_id in ("a", "b", "c", "new", "x.png"):
        grafx.add(task_id=task_id)
    home.database.write_bytes(ODD[kind][0])
    for arguments in (["list"], ["add", "new", "--project", "é"], ["retry", "--all"]):
        done = home.db(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
    poller = home.run("--once")
    assert poller.process.returncode == 0, poller.log()
    assert "Traceback" not in poller.log(), poller.log()
    assert db.get_orders(home.database) == {}


def test_a_broken_file_is_one_clear_line_of_db_py(home: Home) -> None:
    home.database.write_bytes(ODD["comma"][0])
    done = home.db("list")
    assert done.returncode == 1
    assert re.fullmatch(f"db.py: {home.database}: line 2, column .* fix it.\n", done.stderr)
    assert home.database.read_bytes() == ODD["comma"][0]
