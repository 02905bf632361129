"""`database.json`: which orders wait and which have failed. Knows nothing of the network.

    import db
    db.add_order("84ad7436-f82f-4e87-8cd3-37299e37878c", "my-project")

People edit the file by hand and programs write it while the poller runs, so no change is made to
a remembered copy. Each one takes the lock, reads the file, changes its own entries, and puts a
new file in the place of the old one in a single step. Whoever reads meanwhile sees all of the old
file or all of the new one. Every function here raises DatabaseError where that cannot be done.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dotenv import dotenv_values

HERE = Path(__file__).resolve().parent
TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SAVING = 2.0  # seconds: a file that makes no sense and is younger may be half saved by an editor
# What the poller writes into a failed record; an order's own fields of these names move to "order".
RECORD = ("status", "error", "failed", "order")

MEND = "Make room, or mend the folder's permissions."

Fields = dict[str, Any]
Version = tuple[int, ...] | None


class DatabaseError(Exception):
    """The file cannot be read or written; the text says what is wrong, where, and what to do."""


class HalfSaved(DatabaseError):
    """The same, but the file is younger than SAVING: look again."""


@dataclass
class Store:
    """What the file says. `orders` and `failed` map a task id to its fields."""

    data: Fields
    orders: dict[str, Fields]
    failed: dict[str, Fields]
    strange: list[str]  # entries that are no task id, each in one line
    version: Version  # of the file it was read from, see `version`


def settings() -> dict[str, str]:
    """The environment over `.env` beside this file; an empty value counts as none."""
    try:
        # Not interpolated, as in the workshop's Node `dotenv`: a "$" in a secret is a "$".
        file = dotenv_values(HERE / ".env", interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatabaseError(f"cannot read {HERE / '.env'}: {error}. Mend it or its permissions.") from None
    return {name: value for name, value in {**file, **os.environ}.items() if value}


def default_path() -> Path:
    """DATABASE of the settings, else `database.json`; beside this file, wherever one calls from."""
    return HERE / settings().get("DATABASE", "database.json")


def is_task_id(value: object) -> bool:
    """Whether `value` may name a task, and so a file in the orders folder."""
    return isinstance(value, str) and TASK_ID.fullmatch(value) is not None


# --- the text --------------------------------------------------------------------------------

# A float travels as a string, behind a mark that nobody can have typed, so that it is written as
# it stood: 1.10 stays 1.10, and 1e999 does not become Infinity, which is no JSON.
_MARK = f"\0{uuid.uuid4().hex} "
_MARKED = re.compile(rf'"\\u0000{_MARK[1:]}([^"]*)"')


class _Float(str):
    def __new__(cls, text: str) -> _Float:
        return super().__new__(cls, _MARK + text)

    def __str__(self) -> str:
        return self[len(_MARK) :]


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    found: Fields = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{json.dumps(key)} stands twice in one object, and only one could be kept")
        found[key] = value
    return found


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse(raw: bytes) -> Fields:
    text = raw.decode("utf-8-sig")
    if not text.strip():
        return {"orders": {}, "failed": {}}
    data = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_json, parse_float=_Float)
    if not isinstance(data, dict) or not isinstance(data.get("failed", {}), dict):
        raise ValueError('it must be an object, and so must its "failed"')
    return data


def _text(data: Any, indent: int | None = 4) -> str:
    return _MARKED.sub(r"\1", json.dumps(data, indent=indent, ensure_ascii=False))


# --- the shapes of "orders": an object, a list, or the workshop's {"dataType": "Map", "value": [ … ]} ---


def _items(data: Fields) -> Any:
    """The object or list that holds the orders."""
    orders = data.setdefault("orders", {})
    if isinstance(orders, dict) and orders.get("dataType") == "Map":
        orders = orders.get("value") if isinstance(orders.get("value"), list) else None
    if not isinstance(orders, (dict, list)):
        raise ValueError('"orders" must be an object, a list, or {"dataType": "Map", "value": [ … ]}')
    return orders


def _entry(item: Any) -> tuple[Any, Any]:
    """Task id and fields of an item of a list: an id, an object with `taskID`, or a pair of both."""
    if isinstance(item, dict):
        return item.get("taskID"), item
    return tuple(item) if isinstance(item, list) and len(item) == 2 else (item, None)


def _store(data: Fields, version: Version) -> Store:
    orders: dict[str, Fields] = {}
    strange = []
    items = _items(data)
    for item in items.items() if isinstance(items, dict) else items:
        task_id, fields = item if isinstance(items, dict) else _entry(item)
        if not is_task_id(task_id):
            strange.append(_text(item, None))
            continue
        if not isinstance(fields, dict):
            fields = {} if fields is None else {"order": fields}
        fields = {key: value for key, value in fields.items() if (key, value) != ("taskID", task_id)}
        orders[task_id] = fields | orders.get(task_id, {})
    failed = {key: value for key, value in data.get("failed", {}).items() if isinstance(value, dict)}
    return Store(data, orders, failed, strange, version)


def _put(data: Fields, task_id: str, fields: Fields) -> None:
    items = _items(data)
    if isinstance(items, dict):
        items[task_id] = fields
    elif items is not data["orders"]:
        items.append([task_id, {"taskID": task_id, **fields}])
    elif fields.keys() <= {"added"} and all(isinstance(item, str) for item in items):
        items.append(task_id)
    else:
        items.append({"taskID": task_id, **fields})


def _take(data: Fields, gone: set[str]) -> None:
    items = _items(data)
    if isinstance(items, dict):
        for task_id in gone & items.keys():
            del items[task_id]
    else:
        items[:] = [item for item in items if not (is_task_id(_entry(item)[0]) and _entry(item)[0] in gone)]


# --- the file --------------------------------------------------------------------------------


def version(path: Path) -> Version:
    """What `stat` knows of the file's content, None where there is no file. Raises OSError."""
    try:
        return _version(path.stat())
    except FileNotFoundError:
        return None


def _version(stat: os.stat_result) -> Version:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def read(path: Path, patience: float = 2 * SAVING) -> Store:
    """Read the file; a missing or empty one is an empty store.

    patience: seconds to look again while it may be half saved; HalfSaved where they end first.
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
    # Some editors empty a file and then write it. To put a new file in its place in that moment
    # would lose all of it: the editor would go on writing into the old one, which is gone.
    young = 0 <= time.time() - stat.st_mtime < SAVING
    try:
        if young and not raw.strip():
            raise ValueError("it is empty")
        return _store(_parse(raw), _version(stat))
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is no UTF-8"
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise (HalfSaved if young else DatabaseError)(f"{path}: {problem}. It is left as it is: mend it.")


def lock(path: Path, name: str, patience: float) -> TextIO:
    """Take the lock `.<database>.<name>` beside the file: `with lock(…):` holds it.

    It is on a file of its own that is never replaced or removed. On the database itself, a rename
    would leave one process with a lock on a file that is no longer there and the next one with a
    lock on the new file; so would a lock file that is removed after use. The kernel lets go of it
    when its process ends, however it ends. patience: seconds to wait for it.
    """
    place = path.with_name(f".{path.name}.{name}")
    deadline = time.monotonic() + patience
    try:
        # No link is followed: root may call in a folder that is another user's.
        file = open(place, "a+", opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, 0o666))  # noqa: SIM115
        _give(file.fileno(), path.parent)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                take_note(file, "")
                return file
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.readline().partition(" ")[0].strip() or "unknown"
                    raise DatabaseError(
                        f"{place} is held by process {holder}. Wait for its end, or end it."
                    ) from None
            time.sleep(0.01)
    except OSError as error:
        raise DatabaseError(f"cannot lock {place}: {error.strerror}. {MEND}") from None


def take_note(lock: TextIO, note: str) -> None:
    """Write into a held lock whose it is, and the poller's note for `db.py list`."""
    with contextlib.suppress(OSError):  # it is for people; the lock itself is the kernel's
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"{os.getpid()} {note}\n".encode())  # unbuffered: nothing is left for close


def _change(path: Path | None, edit: Callable[[Store], bool], patience: float = 10) -> Store:
    """Read the file anew, let `edit` change its data, and write it where `edit` says that it did."""
    path = Path(os.path.realpath(path or default_path()))  # a symbolic link stays one
    temp = path.with_name(f".{path.name}.tmp")  # one name, so that killed writers leave one file at most
    with lock(path, "lock", patience):
        while True:
            store = read(path, patience)
            if not edit(store):
                return store
            try:
                # backslashreplace: half a surrogate pair, which UTF-8 cannot hold, in JSON's own \uXXXX.
                text = _text(store.data).encode("utf-8", "backslashreplace")
                temp.unlink(missing_ok=True)
                with temp.open("xb") as file:
                    _give(file.fileno(), path if store.version else path.parent)
                    if store.version:
                        os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)
                    file.write(text + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    # An editor knows nothing of the lock. What it saves after this look is lost.
                    if version(path) != store.version:
                        temp.unlink()
                        continue
                    temp.replace(path)
                    sync_folder(path.parent)
                    return _store(store.data, _version(os.fstat(file.fileno())))
            except RecursionError:
                raise DatabaseError(
                    f"{path}: it is nested too deeply. It is left as it is: mend it."
                ) from None
            except OSError as error:
                with contextlib.suppress(OSError):
                    temp.unlink()
                raise DatabaseError(f"cannot write {path}: {error.strerror}. {MEND}") from None


def _give(fd: int, like: Path) -> None:
    """Where root runs `db.py`, the file must still be the poller's; nobody else can, or needs to."""
    if os.geteuid() == 0:
        os.fchown(fd, like.stat().st_uid, like.stat().st_gid)
        os.fchmod(fd, like.stat().st_mode & 0o664)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- what the poller and other programs call -------------------------------------------------


def get_orders(path: Path | None = None) -> dict[str, Fields]:
    """The waiting orders: task id to its fields (`projectID`, `added`, …)."""
    orders: dict[str, Fields] = json.loads(_text(read(path or default_path()).orders))
    return orders


def add_order(task_id: str, project_id: str | None = None, path: Path | None = None) -> bool:
    """Let an order wait; when this returns it is on the disk. False where it waited already.

    Raises ValueError for what is no task id.
    """
    if not is_task_id(task_id):
        raise ValueError(f"{task_id!r} is no task id: letters, digits, '.', '_' and '-', at most 128")
    fields: Fields = {"projectID": project_id} if project_id else {}
    new = False

    def edit(store: Store) -> bool:
        nonlocal new
        new = task_id not in store.orders
        if new:
            _put(store.data, task_id, {**fields, "added": _now()})
        return new

    _change(path, edit)
    return new


def remove_order(task_id: str, path: Path | None = None) -> None:
    """Take a delivered order out."""
    end_orders([task_id], {}, path)


def end_orders(
    delivered: Iterable[str],
    failed: Mapping[str, tuple[int | None, str]],
    path: Path | None = None,
    patience: float = 10,
) -> Store:
    """Take delivered orders out and move failed ones under "failed", all in one write.

    failed: task id to HTTP status and what GraFx said. What somebody took out meanwhile stays out.
    patience: seconds to wait for the lock. Where DatabaseError is raised, nothing has changed.
    """

    ended = {*delivered, *failed}

    def edit(store: Store) -> bool:
        gone = ended & store.orders.keys()
        records = (
            store.data.setdefault("failed", {}) if gone & failed.keys() else store.data.get("failed", {})
        )
        for task_id in gone:
            records.pop(task_id, None)
            if task_id in failed:
                fields, (status, error) = store.orders[task_id], failed[task_id]
                own = {key: fields.pop(key) for key in RECORD if key in fields}
                records[task_id] = {**fields, "status": status, "error": error, "failed": _now()}
                if own:
                    records[task_id]["order"] = own
        _take(store.data, gone)
        return bool(gone)

    return _change(path, edit, patience)


def retry_orders(task_ids: Iterable[str] | None = None, path: Path | None = None) -> list[str]:
    """Move failed orders (None: all) back among the waiting ones; returns those moved."""
    moved: list[str] = []
    asked = None if task_ids is None else dict.fromkeys(task_ids)  # each once; `edit` may be called twice

    def edit(store: Store) -> bool:
        wanted = store.failed if asked is None else asked
        moved[:] = [task_id for task_id in wanted if task_id in store.failed and is_task_id(task_id)]
        for task_id in moved:
            record = store.data["failed"].pop(task_id)
            own = record.get("order")
            fields = {key: value for key, value in record.items() if key not in RECORD}
            if task_id not in store.orders:
                _put(store.data, task_id, fields | (own if isinstance(own, dict) else {}))
        return bool(moved)

    _change(path, edit)
    return moved


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- python db.py ----------------------------------------------------------------------------


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cell(fields: Fields, key: str) -> str:
    value = fields.get(key)
    return " ".join(str(value).split()) if isinstance(value, (str, int)) else ""


def _list(path: Path) -> None:
    store = read(path)
    for name, orders, keys in (
        ("waiting", store.orders, ("projectID", "added")),
        ("failed", store.failed, ("projectID", "failed", "status", "error")),
    ):
        print(f"{len(orders)} {name}")
        if orders:
            rows = [(task_id, *(_cell(fields, key) for key in keys)) for task_id, fields in orders.items()]
            print(_table([("order", *keys), *rows]) + "\n")
    with contextlib.suppress(OSError):
        note = path.with_name(f".{path.name}.pid").read_text().partition(" ")[2].strip()
        if note:
            print(f"the poller said last: {note}")
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
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what a terminal cannot show
    for name in (signal.SIGPIPE, signal.SIGINT):  # `db.py list | head` and Ctrl-C are no errors
        signal.signal(name, signal.SIG_DFL)
    try:
        if given.command == "add":
            new = add_order(given.task_id, given.project)
            print(f"{given.task_id} {'waits now' if new else 'waited already'}")
        elif given.command == "list":
            _list(Path(os.path.realpath(default_path())))
        else:
            moved = retry_orders(None if given.all else [given.task_id])
            if not moved and not given.all:
                raise ValueError(f'{given.task_id} is not under "failed"; python db.py list shows what is')
            print(f"{len(moved)} failed order{'s' * (len(moved) != 1)} will be asked about again")
    except (DatabaseError, ValueError) as error:
        print(f"db.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
