"""`database.json`: which orders wait and which have failed. Knows nothing of the network.

    import db
    db.add_order("84ad7436-f82f-4e87-8cd3-37299e37878c", "my-project")

People edit the file by hand and programs write it while the poller runs, so no
change is made to a remembered copy. Each one takes the lock, reads the file,
changes its own entries, and puts a new file in the place of the old one in a
single step. Whoever reads meanwhile sees the whole old file or the whole new one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from dotenv import dotenv_values

HERE = Path(__file__).resolve().parent
TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A file that cannot be read may be one that an editor is just writing; older than this it is not.
SAVING = 2.0
# What the poller writes into a failed record. An order's own field of such a name moves to "order".
RECORD = ("status", "error", "failed", "order")

Fields = dict[str, Any]


class DatabaseError(Exception):
    """The file cannot be read or written; the text says what is wrong, where, and what to do."""


class HalfSaved(DatabaseError):
    """The same, but the file was touched less than `SAVING` seconds ago: look again."""


@dataclass
class Store:
    """What the file says. `orders` and `failed` map a task id to its fields."""

    data: Fields
    orders: dict[str, Fields]
    failed: dict[str, Fields]
    strange: list[str]  # entries that are no task id, as JSON
    version: tuple[int, ...] | None  # what `version()` gave when it was read


def settings() -> dict[str, str]:
    """Environment over `.env` beside this file; an empty value counts as none.

    Nothing is interpolated, as in the workshop's Node `dotenv`: a `$` in a secret is a `$`.

    Raises DatabaseError where `.env` cannot be read.
    """
    try:
        file = dotenv_values(HERE / ".env", interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatabaseError(f"{HERE / '.env'}: {error}. Mend it or its permissions.") from None
    return {name: value for name, value in {**file, **os.environ}.items() if value}


def default_path() -> Path:
    """`DATABASE` of the settings, else `database.json` beside this file; relative to this file."""
    return HERE / settings().get("DATABASE", "database.json")


def utc_now() -> str:
    """This second, UTC, ISO 8601."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def version(path: Path) -> tuple[int, ...] | None:
    """What `stat` knows of the file's content; None where there is no file. Raises OSError."""
    try:
        return _version(path.stat())
    except FileNotFoundError:
        return None


def _version(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


# --- the file's text -------------------------------------------------------------------------

# A float is kept as the text that stands in the file: 1.10 stays 1.10, and 1e999 does not become
# Infinity, which is no JSON. It travels as a string with a mark that nobody can have typed.
_MARK = f"\0{uuid.uuid4().hex}:"
_MARKED = re.compile(json.dumps(_MARK)[:-1].replace("\\", "\\\\") + '([^"]*)"')


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{json.dumps(twice)} stands twice in one object, and only one could be kept")
    return found


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _parse(raw: bytes) -> Fields:
    text = raw.decode("utf-8-sig")
    if not text.strip():
        return {"orders": {}, "failed": {}}
    data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_json, parse_float=_MARK.__add__)
    if not isinstance(data, dict):
        raise ValueError("it must be an object, { … }")
    return data


def _text(data: Fields) -> bytes:
    # "backslashreplace" writes half a surrogate pair, which UTF-8 cannot hold, as JSON's own \udXXX.
    text = _MARKED.sub(r"\1", json.dumps(data, indent=4, ensure_ascii=False))
    return (text + "\n").encode("utf-8", "backslashreplace")


# --- the shapes of "orders" ------------------------------------------------------------------


def _is_map(orders: Any) -> bool:
    """The workshop's way to store a JavaScript Map."""
    return isinstance(orders, dict) and orders.get("dataType") == "Map"


def _entry(item: Any) -> tuple[Any, Any]:
    """Task id and fields of one item of a list: an id, an object with `taskID`, or a pair."""
    if isinstance(item, dict):
        return item.get("taskID"), item
    if isinstance(item, list) and len(item) == 2:
        return item[0], item[1]
    return item, None


def _entries(data: Fields) -> Iterator[tuple[Any, Any, Any]]:
    """(task id, fields, the item itself) of all that stands under "orders"."""
    orders = data.get("orders", {})
    items = orders.get("value") if _is_map(orders) else orders
    if isinstance(items, list):
        yield from ((*_entry(item), item) for item in items)
    elif isinstance(orders, dict) and not _is_map(orders):
        yield from ((task_id, fields, {task_id: fields}) for task_id, fields in orders.items())
    else:
        raise ValueError('"orders" must be an object, a list, or {"dataType": "Map", "value": [ … ]}')


def is_task_id(value: object) -> bool:
    """Whether `value` may name a task, and so a file in the orders folder."""
    return isinstance(value, str) and TASK_ID.fullmatch(value) is not None


def _fields(task_id: str, value: Any) -> Fields:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if (key, item) != ("taskID", task_id)}
    return {} if value is None else {"order": value}


def _store(data: Fields, seen: tuple[int, ...] | None) -> Store:
    if not isinstance(data.get("failed", {}), dict):
        raise ValueError('"failed" must be an object')
    orders: dict[str, Fields] = {}
    strange = []
    for task_id, value, item in _entries(data):
        if is_task_id(task_id):
            orders[task_id] = {**_fields(task_id, value), **orders.get(task_id, {})}
        else:
            strange.append(_text(item).decode())
    failed = {key: value for key, value in data.get("failed", {}).items() if isinstance(value, dict)}
    return Store(data, orders, failed, strange, seen)


def _put(data: Fields, task_id: str, fields: Fields) -> None:
    """Add an order in the shape that "orders" has."""
    orders = data.setdefault("orders", {})
    items = orders["value"] if _is_map(orders) else orders
    if not isinstance(items, list):
        items[task_id] = fields
    elif _is_map(orders):
        items.append([task_id, {"taskID": task_id, **fields}])
    elif set(fields) <= {"added"} and all(isinstance(item, str) for item in items):
        items.append(task_id)
    else:
        items.append({"taskID": task_id, **fields})


def _take(data: Fields, task_ids: set[str]) -> None:
    """Take orders out, whatever shape "orders" has."""
    orders = data.get("orders", {})
    items = orders["value"] if _is_map(orders) else orders
    if isinstance(items, list):
        # By the item's own id only: a strange item may be anything, a list as well, and it stays.
        items[:] = [i for i in items if not (is_task_id(_entry(i)[0]) and _entry(i)[0] in task_ids)]
    else:
        for task_id in task_ids & items.keys():
            del items[task_id]


# --- reading and writing ---------------------------------------------------------------------


def read(path: Path, patience: float = 2 * SAVING) -> Store:
    """Read the file; a missing or empty one is an empty store.

    patience: seconds to look again while the file may be half saved.

    Raises DatabaseError, and HalfSaved where the patience ended first.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return _read(path)
        except HalfSaved:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.05)


def _read(path: Path) -> Store:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            raw = file.read()
    except FileNotFoundError:
        return _store({"orders": {}, "failed": {}}, None)
    except OSError as error:
        raise DatabaseError(f"cannot read {path}: {error.strerror}. Mend its permissions.") from None
    problem = "it is empty" if not raw.strip() else ""
    try:
        store = _store(_parse(raw), _version(stat))
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        problem = f"it is no UTF-8 text (byte {error.start + 1})"
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = str(error)
    # In an editor's save there is a moment when the file is empty or cut. To write then would put
    # a new file in its place, and the editor's text would go into the old one, which is gone.
    if problem and 0 <= time.time() - stat.st_mtime < SAVING:
        raise HalfSaved(f"{path}: {problem}")
    if problem and raw.strip():
        raise DatabaseError(f"{path}: {problem}. It is left as it is: mend it and save it.")
    return store


@contextlib.contextmanager
def lock(path: Path, name: str, patience: float) -> Iterator[int]:
    """Hold `.<database>.<name>` beside the file; gives its descriptor.

    The lock is on a file of its own that is never replaced or removed. On the database itself, a
    rename would leave one process with the lock on a file that is no longer there and the next
    with the lock on the new one; so would a lock file that somebody deletes when he is done.
    The kernel lets go of it when the process ends, however it ends.

    Raises DatabaseError when it is not to be had within `patience` seconds.
    """
    place = path.with_name(f".{path.name}.{name}")
    try:
        fd = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        _give(fd, path.parent)
    except OSError as error:
        raise DatabaseError(f"cannot open {place}: {error.strerror}. Mend its permissions.") from None
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
                    raise DatabaseError(f"{place} is held by another process, pid {holder}") from None
            time.sleep(0.01)
        os.ftruncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())  # for people; the lock itself is the kernel's
        yield fd
    finally:
        os.close(fd)


def _change(path: Path | None, edit: Callable[[Store], bool], patience: float) -> Store:
    """Read the file anew, let `edit` change it, and put the result in its place, all under the lock.

    `edit` says whether it changed anything; where it did not, nothing is written.
    """
    path = Path(os.path.realpath(path or default_path()))  # a symbolic link stays one
    temp = path.with_name(f".{path.name}.tmp")  # always the same: a killed writer leaves one at most
    with lock(path, "lock", patience):
        while True:
            store = read(path, patience)
            if not edit(store):
                return store
            try:
                text = _text(store.data)
                _write(temp, text, path)
                # The last look: an editor knows nothing of the lock, and saving takes a while.
                # What it saves between here and the rename is lost.
                if version(path) == store.version:
                    temp.replace(path)
                    sync_folder(path.parent)
                    return _store(store.data, version(path))
            except RecursionError:
                raise DatabaseError(f"{path}: it is nested too deeply") from None
            except OSError as error:
                with contextlib.suppress(OSError):
                    temp.unlink()
                raise DatabaseError(
                    f"cannot write {path}: {error.strerror}. Make room, or mend {path.parent}'s permissions."
                ) from None


def _write(temp: Path, text: bytes, like: Path) -> None:
    """Write `temp` to the disk itself, with mode and owner of `like`. Raises OSError."""
    temp.unlink(missing_ok=True)
    with temp.open("xb") as file:
        if like.exists():
            _give(file.fileno(), like)
            os.fchmod(file.fileno(), like.stat().st_mode & 0o7777)
        else:
            _give(file.fileno(), like.parent)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _give(fd: int, like: Path) -> None:
    """Where root runs `db.py`, the file must still be the poller's; nobody else can or need."""
    if os.geteuid() == 0:
        stat = like.stat()
        os.fchown(fd, stat.st_uid, stat.st_gid)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- what the poller and other programs call -------------------------------------------------


def get_orders(path: Path | None = None) -> dict[str, Fields]:
    """The waiting orders: task id to its fields (`projectID`, `added`, …). Raises DatabaseError."""
    return read(path or default_path()).orders


def add_order(task_id: str, project_id: str | None = None, path: Path | None = None) -> bool:
    """Let an order wait, in the file and on the disk when this returns; False where it waited already.

    Raises ValueError for what is no task id, DatabaseError.
    """
    if not is_task_id(task_id):
        raise ValueError(f"{task_id!r} is no task id: letters, digits, '.', '_' and '-', 128 at most")
    fields: Fields = {"projectID": project_id} if project_id else {}
    new = False

    def edit(store: Store) -> bool:
        nonlocal new
        new = task_id not in store.orders
        if new:
            _put(store.data, task_id, {**fields, "added": utc_now()})
        return new

    _change(path, edit, patience=10)
    return new


def remove_order(task_id: str, path: Path | None = None) -> None:
    """Take a delivered order out. Raises DatabaseError."""
    end_orders([task_id], {}, path)


def end_orders(
    delivered: Iterable[str],
    failed: Mapping[str, tuple[int | None, str]],
    path: Path | None = None,
    patience: float = 10,
) -> Store:
    """Take delivered orders out and move failed ones under "failed", all in one write.

    failed: task id to (HTTP status, what GraFx said). An order that somebody took out meanwhile
    stays out. patience: seconds to wait for the lock.

    Raises DatabaseError; then nothing has changed.
    """

    def edit(store: Store) -> bool:
        gone = {*delivered, *failed} & store.orders.keys()
        for task_id in gone & failed.keys():
            status, error = failed[task_id]
            fields = store.orders[task_id]
            own = {key: fields[key] for key in RECORD if key in fields}
            record = {key: value for key, value in fields.items() if key not in RECORD}
            record |= {"status": status, "error": error, "failed": utc_now()}
            store.data.setdefault("failed", {})[task_id] = record | ({"order": own} if own else {})
        for task_id in gone - failed.keys():
            store.data.get("failed", {}).pop(task_id, None)
        _take(store.data, gone)
        return bool(gone)

    return _change(path, edit, patience)


def retry_orders(task_ids: Iterable[str] | None = None, path: Path | None = None) -> list[str]:
    """Move failed orders (None: all) back among the waiting ones; returns those moved.

    Raises DatabaseError.
    """
    moved: list[str] = []

    def edit(store: Store) -> bool:
        wanted = store.failed if task_ids is None else task_ids
        moved[:] = [task_id for task_id in wanted if task_id in store.failed and is_task_id(task_id)]
        for task_id in moved:
            record = store.data["failed"].pop(task_id)
            own = record.get("order")
            fields = {key: value for key, value in record.items() if key not in RECORD}
            if task_id not in store.orders:
                _put(store.data, task_id, fields | (own if isinstance(own, dict) else {}))
        return bool(moved)

    _change(path, edit, patience=10)
    return moved


# --- python db.py ----------------------------------------------------------------------------


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(fields: Fields, key: str) -> str:
    value = fields.get(key)
    return " ".join(str(value).split()) if isinstance(value, (str, int)) else ""


def _list(store: Store) -> None:
    for name, orders, keys in (
        ("waiting", store.orders, ("projectID", "added")),
        ("failed", store.failed, ("projectID", "failed", "status", "error")),
    ):
        print(f"{len(orders)} {name}")
        if orders:
            rows = [(task_id, *(_cell(fields, key) for key in keys)) for task_id, fields in orders.items()]
            print(_table([("order", *keys), *rows]) + "\n")
    for item in store.strange:
        print(f"not a task id, left alone: {' '.join(item.split())}")


def main() -> int:
    """`python db.py`. Exit code 0, or 1 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="db.py", description="See and change the orders in database.json.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="let the poller fetch a task's file")
    add.add_argument("task_id", metavar="TASK_ID", help="what GraFx answered as data.taskId")
    add.add_argument("--project", metavar="ID", help="kept with the order as projectID")
    commands.add_parser("list", help="show what waits and what has failed")
    retry = commands.add_parser("retry", help="ask about failed orders again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("task_id", metavar="TASK_ID", nargs="?", help="one failed order")
    which.add_argument("--all", action="store_true", help="all of them")
    given = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `db.py list | head` is no error
    try:
        if given.command == "add":
            new = add_order(given.task_id, given.project)
            print(f"{given.task_id} {'waits now' if new else 'waited already'}")
        elif given.command == "list":
            _list(read(default_path()))
        else:
            moved = retry_orders(None if given.all else [given.task_id])
            print(f"{len(moved)} failed order{'s' * (len(moved) != 1)} will be asked about again")
            if not moved and not given.all:
                raise ValueError(f'{given.task_id} is not under "failed"; python db.py list shows what is')
    except (DatabaseError, ValueError) as error:
        print(f"db.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
