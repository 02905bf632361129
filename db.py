"""Reads and writes `database.json`: the pending, rejected and failed orders. It does not use the network.

People and programs may change the file while the poller runs, so no cached copy is ever written:
`change` reads the file, edits it, and replaces it atomically. Delivered orders are listed in a file
beside it. If a file cannot be read or written, DatabaseError is raised.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TextIO, TypeVar

from dotenv.parser import Binding, parse_stream

HERE = Path(__file__).resolve().parent
TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
GUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
LOOK = 1.0  # seconds between two checks whether database.json changed
SAVING = 2.0  # seconds for which an editor may still be saving a file that is invalid or missing
PATIENCE = 10.0  # seconds to wait for another writer, or for an editor to finish saving
BRIEFLY = 0.2  # seconds for which the poller's loop waits for another writer
SHARE = 20  # the poller spends at most 1/SHARE of its time on writing the file
KEPT = 100_000  # deliveries to keep in the list; it is shortened when it has more than twice as many
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
IGNORED = 'ignored, since it is not an order (write {"taskID": "TASK_ID"}): '
PUT_BACK = 'Put it back, or start with an empty one: {"orders": {}}'
# Follow no symbolic link: root may run this in another user's folder.
OPEN = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW
# The fields of a failed record; an order's own fields with these names move to "order".
RECORD = ("status", "error", "failed", "order")

Fields = dict[str, Any]
Given = TypeVar("Given")
Version = tuple[int, ...] | None

log = logging.getLogger("db")


class DatabaseError(Exception):
    """The file cannot be read or written; the text says what is wrong, where, and what to do."""


class Busy(DatabaseError):
    """Another program is writing the file, or may be: try again."""


def env_file() -> Path:
    """The settings file: GRAFX_ENV_FILE, else `.env` beside this module."""
    return HERE / (os.environ.get("GRAFX_ENV_FILE") or ".env")


def env_lines() -> list[Binding]:
    """The lines of the settings file. Raises DatabaseError."""
    place = env_file()
    try:
        with place.open(encoding="utf-8-sig") as file:
            return list(parse_stream(file))
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, IsADirectoryError))
        if missing and place == HERE / ".env":  # a folder of this name is a virtual environment
            return []
        how = "Check GRAFX_ENV_FILE." if missing else advice(error, place)
        raise DatabaseError(f"cannot read {place}: {error.strerror}. {how}") from None
    except UnicodeDecodeError as error:
        raise DatabaseError(f"cannot read {place}: {error}. Save it as UTF-8.") from None


def settings(names: Collection[str] = ("DATABASE",)) -> dict[str, str]:
    """The settings. The environment overrides the settings file; an empty value counts as unset.

    Raises DatabaseError if one of `names` cannot be parsed, or has quotes around it or a control character.
    """
    given: list[tuple[str | None, str | None]] = []
    for name, value, original, error in env_lines():
        begin = rf"^\s*(?:export\s+)?['\"]?({'|'.join(names)})\b"
        if (error or value is None) and (line := re.search(begin, original.string, re.MULTILINE)):
            number = original.line + original.string.count("\n", 0, line.start(1))
            how = f"Write {line[1]}=VALUE, with quotes around all of VALUE or without."
            raise DatabaseError(f"{env_file()}, line {number}: {line[1]} cannot be parsed. {how}")
        # Not interpolated, as in the workshop's Node `dotenv`: a "$" in a secret stays a "$".
        given.append((name, value))
    given += os.environ.items()
    found = {name: value.strip() for name, value in given if name and value and value.strip()}
    for name in set(names) - {"ON_DONE", "ON_FAILED"}:  # a command may have both
        if re.fullmatch(r"([\"']).*\1|.*[\x00-\x1f\x7f].*", found.get(name, ""), re.DOTALL):
            how = "Remove them; docker's --env-file keeps quotes."
            raise DatabaseError(f"{name} has quotes around it, or a control character in it. {how}")
    return found


def advice(error: OSError, place: Path) -> str:
    """What to do about a file that cannot be created, locked, read or written."""
    known = {
        errno.ENOENT: "Make the folder.",
        errno.EISDIR: "It is a folder: replace it with a file.",
        errno.EROFS: "Mount its file system for writing.",
        errno.EBUSY: "It is mounted as a single file: mount its folder.",
        errno.EFBIG: "Raise the limit (ulimit -f).",
        errno.ELOOP: "It is a symbolic link: replace it with a file.",
        **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room."),
        **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "It must be a folder."),
        **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit (ulimit -n)."),
        **dict.fromkeys(UNSUPPORTED, "Its file system has no locks: use another one."),
    }
    if error.errno not in (errno.EACCES, errno.EPERM):
        return known.get(error.errno or 0, "Check its disk.")
    for where in (place, place.parent):
        with contextlib.suppress(OSError, KeyError):
            mode = where.stat().st_mode & 0o7777
            mine = f"{where} belongs to {where.owner()}:{where.group()} with mode {mode:o}"
            return f"{mine}: run this with sudo, join that group, or fix owner and mode."
    return "Fix the folder's permissions."


def is_task_id(value: object) -> bool:
    """Whether `value` is a valid task id, and so safe in a file name."""
    return isinstance(value, str) and TASK_ID.fullmatch(value) is not None


def key(task_id: str) -> str:
    """The key that identifies an order: GUIDs are case-insensitive."""
    return task_id.lower() if GUID.fullmatch(task_id) else task_id


def stamp(when: datetime | None = None) -> str:
    """A time (default: now) in the format of the project's files: UTC, ISO 8601, to the second."""
    return (when or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def utc(text: str) -> datetime:
    """Parse an ISO 8601 time; without a zone it is UTC. Raises ValueError."""
    when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


@functools.lru_cache(maxsize=1000)  # so that each problem is logged once
def warn_once(problem: str, level: int = logging.WARNING) -> None:
    log.log(level, "%s", problem)


# --- what the file says ----------------------------------------------------------------------


class Store:
    """The content of `database.json`. `orders` maps a pending order's task id to its fields.

    The orders may be in an object, in a list, or in the workshop's {"dataType": "Map", "value": [ … ]};
    the methods keep that shape, and set `changed` if there is something to write.
    """

    def __init__(self, raw: bytes) -> None:
        """Parse the file. Raises ValueError that says what is wrong, RecursionError."""
        if not raw.strip(b" \t\r\n\xef\xbb\xbf"):
            # Not an empty store: an editor or a command may have truncated the file and not written it yet.
            raise ValueError(f"it is empty. {PUT_BACK}")
        try:
            data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start + 1} is not UTF-8") from None
        except json.JSONDecodeError as error:
            what = error.msg.removesuffix(" at")  # as in "Invalid control character at"
            raise ValueError(f"line {error.lineno}, column {error.colno}: {what}") from None
        for name in ("failing", "failed"):
            if not isinstance(data, dict) or not isinstance(data.get(name, {}), dict):
                raise ValueError('it must be an object, and so must its "failing" and "failed"')
        # Else misspelt orders would just not be there.
        likely = [name for name in data if name.lower() in ("order", "orders") or GUID.fullmatch(name)]
        if likely and "orders" not in data:
            raise ValueError(f'it has no "orders", but {json.dumps(likely[0])}')
        items = data.setdefault("orders", {})
        if isinstance(items, dict) and items.get("dataType") == "Map":
            items = items["value"] if isinstance(items.get("value"), list) else None
        if not isinstance(items, (dict, list)):
            raise ValueError('"orders" must be an object, a list, or {"dataType": "Map", "value": [ … ]}')
        self.data, self.items, self.changed = data, items, False
        self.orders: dict[str, Fields] = {}
        self.ids: dict[str, str] = {}  # `key` of an order to its id in `orders`, in its first spelling
        self.invalid: list[str] = []  # entries that are not orders, each on one line
        for item in items.items() if isinstance(items, dict) else items:
            task_id, fields = _entry(item)
            if task_id is None:
                self.invalid.append(json.dumps(item, ensure_ascii=False))
            else:
                first = self.ids.setdefault(key(task_id), task_id)
                twice = self.orders.get(first)
                self.orders[first] = fields | twice if twice else fields

    @property
    def failing(self) -> dict[str, Fields]:
        """The records of rejected orders, which are still pending and are retried."""
        return _records(self.data.get("failing", {}))

    @property
    def failed(self) -> dict[str, Fields]:
        """The records of failed orders, which are no longer polled."""
        return _records(self.data.get("failed", {}))

    def put(self, task_id: str, fields: Fields, new: bool = False) -> None:
        """Add an order, in the same shape as the others. new: record the current time as `added`."""
        items = self.items
        last = items[-1] if isinstance(items, list) and items else None
        bare = isinstance(last, str) and not fields
        if new and not bare:
            fields = {**fields, "added": stamp()}
        self.orders[task_id], self.ids[key(task_id)], self.changed = fields, task_id, True
        entry = {"taskID": task_id, **fields}
        if isinstance(items, dict):
            items[task_id] = fields
        elif bare:
            items.append(task_id)
        elif "taskID" in fields or items is not self.data["orders"]:  # it has one of its own; or a Map
            items.append([task_id, entry])
        else:
            items.append(entry)

    def take(self, task_ids: Iterable[str]) -> dict[str, Fields]:
        """Remove pending orders, in each spelling, and their records. Returns their fields by `key`."""
        gone = {same: self.orders.pop(self.ids.pop(same)) for same in self.ids.keys() & map(key, task_ids)}
        if not gone:
            return gone
        for place in (self.data.get("failing", {}), self.data.get("failed", {}), self.items):
            if isinstance(place, list):
                place[:] = [item for item in place if key(_entry(item)[0] or "") not in gone]
            else:
                for name in [name for name in place if key(name) in gone]:
                    del place[name]
        self.changed = True
        return gone

    def fail(self, failures: Mapping[str, tuple[int | None, str]]) -> None:
        """Move pending orders to "failed", with the HTTP status and the error text."""
        before, taken = self.failed, self.take(failures)
        for task_id, (status, error) in failures.items():
            if key(task_id) in taken:
                fields = taken[key(task_id)]
                # An order that had failed and was added again keeps the fields that it had then.
                record = before.get(task_id, {}) | fields
                record |= {"status": status, "error": error, "failed": stamp()}
                if own := {name: fields[name] for name in RECORD if name in fields}:
                    record["order"] = own
                self.data.setdefault("failed", {})[task_id] = record

    def retry(self, task_id: str) -> None:
        """Make a failed order pending again, with all of its own fields."""
        record = self.data["failed"].pop(task_id)
        fields = {name: value for name, value in record.items() if name not in RECORD[:3]}
        own = fields.get("order")
        if isinstance(own, dict) and own and own.keys() <= set(RECORD):  # moved there by `fail`
            del fields["order"]
            fields |= own
        pending = self.take([task_id]).get(key(task_id), {})
        self.put(task_id, fields | pending)

    def set_failing(self, records: Fields) -> None:
        """Replace the records under "failing". Entries that are not objects stay: a person typed them."""
        if self.failing != records:
            entries = self.data.get("failing", {})
            typed = {name: value for name, value in entries.items() if not isinstance(value, dict)}
            self.data["failing"], self.changed = typed | records, True

    def text(self) -> bytes:
        """The file's new content. Raises ValueError, RecursionError for data that JSON cannot represent."""
        data = {name: value for name, value in self.data.items() if value or name != "failing"}
        text = json.dumps(data, indent=4, ensure_ascii=False, allow_nan=False) + "\n"
        # backslashreplace: a lone surrogate, which UTF-8 cannot encode, becomes JSON's own \uXXXX.
        return text.encode("utf-8", "backslashreplace")


def _records(entries: Fields) -> dict[str, Fields]:
    return {name: value for name, value in entries.items() if isinstance(value, dict)}


def _entry(item: Any) -> tuple[str | None, Fields]:
    """The task id and fields of an entry; the id is None if the entry is not an order."""
    task_id, fields = item, {}
    if isinstance(item, tuple) or (isinstance(item, list) and len(item) == 2 and isinstance(item[1], dict)):
        task_id, fields = item  # a key of an object and its value, or a pair in a list
    elif isinstance(item, dict):
        task_id, fields = item.get("taskID"), item
    if not isinstance(fields, dict):
        fields = {} if fields is None else {"order": fields}
    if fields.get("taskID") == task_id:  # it only repeats the id
        fields = {name: value for name, value in fields.items() if name != "taskID"}
    return (task_id, fields) if is_task_id(task_id) else (None, {})


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {json.dumps(twice)} in one object")
    return found


# --- the file --------------------------------------------------------------------------------


def version(file: Path | int) -> Version:
    """What `stat` says about a file's identity and content; None if it is missing. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        stat = os.stat(file)  # noqa: PTH116 - a path or a descriptor
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


class File:
    """`database.json` on the disk, and since when it has been unchanged.

    A broken, empty or missing file may be half saved. After SAVING seconds it is an error. It is never
    overwritten. A missing file counts as an empty store only if there never was a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: Version = ()  # its version when it was last read; None: missing, (): to be read again
        self.since = 0.0  # when that version was first seen; monotonic, since clocks jump
        self.problem = ""  # with that version: a broken file is parsed again only when it has changed
        self.existed = False  # whether it was ever read

    def changed(self) -> bool:
        """Whether the file has changed, or still has a problem."""
        with contextlib.suppress(OSError):
            return version(self.path) != self.seen or bool(self.problem)
        return True

    def read(self) -> Store:
        """Read the file. Raises Busy if it may be half saved, DatabaseError."""
        seen, raw = None, b""
        try:
            with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
                seen = version(file.fileno())
                if seen != self.seen or not self.problem:
                    raw = file.read()
            lock_file = version(beside(self.path, "lock"))
        except OSError as error:
            self.seen = ()
            how = advice(error, self.path)
            raise DatabaseError(f"cannot read {self.path}: {error.strerror}. {how}") from None
        if seen != self.seen:
            self.seen, self.since, self.problem = seen, time.monotonic(), ""
        if not seen:  # some editors rename a file away before they write the new one
            if not self.existed and not (lock_file and lock_file[2]):  # see `change`
                return Store(b'{"orders": {}, "failed": {}}')
            self.problem = f"{self.path} is missing. {PUT_BACK}"
        self.existed = True
        try:
            if not self.problem:
                return Store(raw)
        except (ValueError, RecursionError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else error
            self.problem = f"{self.path}: {what}. It is left as it is: fix it."
        young = time.monotonic() < self.since + SAVING
        raise (Busy if young else DatabaseError)(self.problem)


def change(file: File, edit: Callable[[Store], object]) -> Store:
    """The only way to change the file: lock, read, `edit`, write a new one, rename it over the old one.

    If `edit` changes nothing, nothing is written. Raises DatabaseError; Busy if it may help to try again.
    Then `edit` may have been called, and is called again.
    """
    path = file.path
    with lock(path) as held:
        store = file.read()
        if file.seen:  # only then: a note in the lock file shows that there was a database
            note(held)
        edit(store)
        if store.changed:
            seen, file.seen = file.seen, ()  # if the write fails, the file is read again
            try:
                file.seen = _replace(path, store.text(), seen)
            except (ValueError, RecursionError) as error:
                raise DatabaseError(f"{path} cannot be saved as JSON: {error}. Fix that entry.") from None
            note(held)
        return store


def _replace(path: Path, content: bytes, seen: Version) -> Version:
    """Replace `path` atomically; returns its version. Raises DatabaseError; Busy if it is not `seen`."""
    temp = path.with_name(f".{path.name}.tmp")  # a fixed name: kills leave at most one
    try:
        temp.unlink(missing_ok=True)
        with os.fdopen(_create(temp, path), "wb") as file:
            fd = file.fileno()
            file.write(content)
            file.flush()
            os.fsync(fd)
            written = version(fd)  # before the rename: an editor may save in place right after it
            # An editor does not take the lock. What it saves after this check is lost.
            if version(path) != seen:
                raise Busy(f"{path} was saved by another program meanwhile, try again")
            temp.replace(path)
            sync_folder(path.parent)
            return written
    except OSError as error:
        raise DatabaseError(f"cannot write {path}: {error.strerror}. {advice(error, path.parent)}") from None
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def _create(place: Path, like: Path) -> int:
    """Create a file with the rights of another one, else of its folder. Raises OSError, also if it exists."""
    folder, old = place.parent.stat(), None
    with contextlib.suppress(FileNotFoundError):
        old = like.stat()
    fd = os.open(place, OPEN | os.O_CREAT | os.O_EXCL, 0o666)
    model, mode = old or folder, (old or os.fstat(fd)).st_mode
    if not old and folder.st_mode & 0o020:  # those who can write the folder can write the file
        mode |= 0o060
    # Best effort: perhaps only one of them can be set, and some file systems have neither.
    for owner, group in ((-1, model.st_gid), (model.st_uid, -1)):
        with contextlib.suppress(OSError):
            os.fchown(fd, owner, group)
    with contextlib.suppress(OSError):
        os.fchmod(fd, mode & 0o7777)
    return fd


def _open(place: Path) -> int:
    """Open a file beside the database to read and append; create it if it is missing. Raises OSError."""
    try:
        return _create(place, place)
    except FileExistsError:
        return os.open(place, OPEN)


def beside(path: Path, name: str) -> Path:
    return path.with_name(f".{path.name}.{name}")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # as on VirtualBox shared folders
            raise
        warn_once(f"{folder} cannot be synced: {error.strerror}", logging.DEBUG)
    finally:
        os.close(fd)


def _patiently(step: Callable[[], Given], patience: float) -> Given:
    """Return `step()`; retry for `patience` seconds while it raises Busy."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return step()
        except Busy:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.001)  # short: who writes again and again frees the lock for a moment only


def read(path: Path) -> Store:
    """Read the file; wait if it may be half saved."""
    return _patiently(File(path).read, PATIENCE)


def hold(place: Path, busy: str) -> TextIO:
    """Lock this file, and create it if it is missing. The kernel unlocks it however the process ends.

    Raises DatabaseError; if another process has the lock, Busy with the text `busy` and that process.
    """
    try:
        file = os.fdopen(_open(place), "r+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        with file:
            holder = file.readline().partition(" ")[0].strip() or "unknown"
        raise Busy(f"{busy} (process {holder} has locked {place})") from None
    except OSError as error:
        raise DatabaseError(f"cannot lock {place}: {error.strerror}. {advice(error, place)}") from None


@contextlib.contextmanager
def lock(path: Path, patience: float = BRIEFLY) -> Iterator[TextIO]:
    """Hold the lock for writing `database.json` and the files beside it; wait for it. Raises as `hold`."""
    busy = f"{path} is being written by another program, try again"
    # Each try opens the file anew: nobody waits for one that was removed.
    with _patiently(lambda: hold(beside(path, "lock"), busy), patience) as file:
        try:
            yield file
        finally:  # explicitly: a child forked meanwhile shares the lock, and would keep it
            fcntl.flock(file, fcntl.LOCK_UN)


def is_at(file: TextIO, place: Path) -> bool:
    """Whether an open file is still the one at this path. Raises OSError."""
    return (version(file.fileno()) or ())[:2] == (version(place) or ())[:2]


def note(lock: TextIO, text: str = "") -> None:
    """Write this process's id into a held lock file, with the poller's status for `db.py list`."""
    with contextlib.suppress(OSError):  # only information: the kernel keeps the lock itself
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"{os.getpid()} {text}\n".encode(errors="backslashreplace"))


# --- the list of deliveries ------------------------------------------------------------------


class Deliveries:
    """`.database.json.delivered`: one line for each delivery, `<UTC> <task id> <file name>`.

    A file name of `-` means: deliver it again. The last complete line for an order counts.
    """

    LINE = re.compile(rb"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (%b) (.+)\n" % TASK_ID.pattern.encode(), re.M)

    def __init__(self, database: Path, read: bool = True) -> None:
        self.database, self.path = database, beside(database, "delivered")
        self.ids: dict[str, str] = {}  # `key` of a delivered order to "<UTC> <file name>"
        self.again: set[str] = set()  # `key` of each order to deliver again
        self.file: Version = None  # device and inode of what was read: a new file is read from the start
        self.end = 0  # the offset up to which it was read
        self.writable = False  # whether it can be written, as far as is known
        if read:
            self.refresh()

    def refresh(self) -> None:
        """Read what was appended since. Raises DatabaseError."""
        try:
            now = version(self.path)
            if self.file and not now:
                warn_once(f"{self.path} was removed: earlier deliveries are no longer known.")
            file, size = (now[:2], now[2]) if now else (None, 0)
            if file != self.file or size < self.end:
                self.ids, self.again, self.file, self.end = {}, set(), file, 0
            if size > self.end:
                with self.path.open("rb") as lines:
                    lines.seek(self.end)
                    data = lines.read()
                self.end += data.rfind(b"\n") + 1
                self._understand(data)
        except OSError as error:
            how = advice(error, self.path)
            raise DatabaseError(f"cannot read {self.path}: {error.strerror}. {how}") from None

    def _understand(self, lines: bytes) -> None:
        for when, task_id, name in self.LINE.findall(lines):
            self.ids.pop(order := key(task_id.decode()), None)
            self.again.discard(order)
            if name == b"-":
                self.again.add(order)
            else:
                self.ids[order] = (when + b" " + name).decode("utf-8", "replace")

    def add(self, files: Mapping[str, str]) -> None:
        """List deliveries (task id to file name); when this returns they are on the disk.

        Raises DatabaseError; then some of them may be listed, and all can be listed again. With none of
        them, this only checks that the list can be written; it needs the lock, since it truncates the list.
        """
        lines = [f"{stamp()} {task_id} {name}\n" for task_id, name in files.items()] or ["\n"]
        content = "".join(lines).encode()
        try:
            with os.fdopen(_open(self.path), "r+b", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                # Do not append to a truncated line.
                cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
                rest = b"\n" * cut + content
                while rest:  # one write, unless the disk is almost full
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                if not files:
                    file.truncate(size)
            if not size:
                sync_folder(self.path.parent)
        except OSError as error:
            self.writable = False
            what = f"cannot write {self.path}: {error.strerror}."
            raise DatabaseError(f"{what} {advice(error, self.path)}") from None
        self.writable = True
        self._understand(content)  # not read back: that could fail, and the order would be delivered twice

    def shorten(self) -> None:
        """Keep the newest KEPT lines if more than twice as many orders are listed."""
        if len(self.ids) <= 2 * KEPT:
            return
        try:
            with lock(self.database, PATIENCE):
                lines = self.path.read_bytes().splitlines(keepends=True)
                _replace(self.path, b"".join(lines[-KEPT:]), version(self.path))
        except (DatabaseError, OSError) as error:
            warn_once(f"{self.path} cannot be shortened: {error}")


# --- what the poller's loop needs ------------------------------------------------------------


@dataclass
class _Unwritten:
    """Results that are not in the file yet."""

    delivered: dict[str, str] = field(default_factory=dict)  # task id to file name, not listed yet
    listed: set[str] = field(default_factory=set)  # in the list, to be removed from the file
    failed: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    other: bool = False  # whether anything else in the file must change, such as "failing"
    pause: float = 0.0  # when the file may be written again, in monotonic seconds

    def ended(self) -> set[str]:
        return self.delivered.keys() | self.listed | self.failed.keys()

    def __bool__(self) -> bool:
        return bool(self.ended() or self.other)


class Database:
    """`database.json` for the poller's loop: `sync` each turn, `flush` at the end.

    `delivered`, `failed`, `rejected` and `pending` record a result, and a later `sync` writes it; a delivery
    is written to the list first. A problem is logged when it begins and when it ends.
    """

    def __init__(self, path: Path, check_writable: bool) -> None:
        self.file, self.deliveries = File(path), Deliveries(path, read=False)
        self.deliveries.writable = not check_writable
        self.failing: dict[str, Fields] = {}  # the records of rejected orders, as the file should have them
        self.loaded = False  # whether the file was ever read
        self.problem = ""  # the current problem with the file or the list
        self._unwritten = _Unwritten()
        self._look = 0.0  # when to look at the file again, in monotonic seconds
        self._free = time.monotonic()  # when the file and its lock were last not busy

    def delivered(self, task_id: str, file: str) -> None:
        """The order's file is complete and on the disk, and ON_DONE has succeeded."""
        self._unwritten.delivered[task_id] = file

    def failed(self, task_id: str, status: int | None, error: str) -> None:
        """The order is no longer polled."""
        self._unwritten.failed[task_id] = (status, error)

    def rejected(self, task_id: str, record: Fields) -> None:
        """The order is retried; meanwhile its record is under "failing"."""
        self.failing[task_id], self._unwritten.other = record, True

    def pending(self, task_id: str) -> None:
        """The order is no longer rejected."""
        if self.failing.pop(task_id, None) is not None:
            self._unwritten.other = True

    @property
    def failures_written(self) -> bool:
        """Whether every failed order is under "failed" in the file."""
        return not self._unwritten.failed

    def sync(self, idle: bool = True) -> dict[str, Fields] | None:
        """List deliveries at once; each LOOK write the other results, and read what others changed.

        Returns the pending orders if the file was read, else None. idle: nothing else is under way, so that
        results need not wait for others.
        """
        now = time.monotonic()
        at_once = idle and self._unwritten and not self.problem
        if now < self._look and not at_once:
            if not self.problem:
                with contextlib.suppress(DatabaseError):  # the next look reports it
                    self._list()
            return None
        self._look = now + LOOK
        store, wrong = None, None
        for step in (self._prepare, self._write, self._read):  # each, even if the one before it failed
            try:
                store = step() or store
            except DatabaseError as error:
                wrong = wrong or error
        if not (busy := isinstance(wrong, Busy)):
            self._free = now
        if not busy or now >= self._free + PATIENCE:  # before that, the problem is neither new nor over
            self._report(str(wrong or ""))
        if not store:
            return None
        self._log_content(store)
        return store.orders

    def _prepare(self) -> None:
        """At the start, shorten the list, and see whether it can be written: ON_DONE waits for that."""
        if not self.loaded:
            self.deliveries.refresh()
            self.deliveries.shorten()
        if not self._unwritten.delivered and not self.deliveries.writable:
            with lock(self.file.path, BRIEFLY if self.loaded else PATIENCE):
                self.deliveries.add({})

    def _write(self) -> Store | None:
        """List the deliveries, then write all results, unless too much time was spent on that."""
        self._list()
        begun = time.monotonic()
        if not self._unwritten or begun < self._unwritten.pause:
            return None
        store = change(self.file, self._edit)
        self._unwritten = _Unwritten(pause=begun + SHARE * (time.monotonic() - begun))
        return store

    def _read(self) -> Store | None:
        """Read the file if it has changed, and see whether it has to be written."""
        if not self.file.changed():
            return None
        store = self.file.read()
        self._edit(store)
        self._unwritten.other = store.changed
        store.take(self._unwritten.delivered)  # they stay in the file until they are listed
        return store

    def flush(self, patience: float) -> int:
        """Try for `patience` seconds to write everything. Returns how many results are not written."""
        self._unwritten.pause = 0.0
        try:
            _patiently(self._write, patience)
        except DatabaseError as error:
            self._report(str(error))
        return len(self._unwritten.ended())

    def _report(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.error("%s", problem)
        elif self.problem and not problem:
            log.info("recovered: %s", self.problem)
        self.problem = problem

    def _list(self) -> None:
        """List all deliveries with one fsync; after that they are safe. One append needs no lock."""
        if delivered := self._unwritten.delivered:
            self.deliveries.add(delivered)
            self._unwritten.listed |= delivered.keys()
            delivered.clear()

    def _edit(self, store: Store) -> None:
        """Take out the orders that have ended, and set "failing"."""
        try:  # after reading the file: `retry` writes the list first, then the file
            self.deliveries.refresh()
        except DatabaseError:
            self.file.seen = ()  # so that the file is read again
            raise
        listed = {store.ids[name] for name in store.ids.keys() & self.deliveries.ids.keys()}
        if again := listed - self._unwritten.listed:
            what = f"{again.pop()} was" if len(again) == 1 else f"{len(again)} orders were"
            # At startup, perhaps nobody re-added it: a process was killed before it could remove it.
            how = "re-added although delivered; removed again" if self.loaded else "delivered before; removed"
            log.warning("%s %s", what, how)
        self._unwritten.listed = listed
        store.take(listed)
        store.fail(self._unwritten.failed)
        records = self.failing if self.loaded else store.failing
        self.failing = {name: record for name, record in records.items() if name in store.orders}
        store.set_failing(self.failing)

    def _log_content(self, store: Store) -> None:
        """Log how many orders there are at the start, and which entries are no orders."""
        if not self.loaded:
            self.loaded = True
            counts = f"{len(store.orders) - len(self.failing)} pending, {len(self.failing)} rejected"
            log.info("%s, %d failed, %d delivered", counts, len(store.failed), len(self.deliveries.ids))
        for entry in store.invalid[:20]:
            warn_once(IGNORED + entry)


# --- what other programs call ----------------------------------------------------------------


def beside_code(path: str | Path) -> Path:
    """A path relative to this module; resolved, so that no symbolic link is replaced. Raises ValueError."""
    if str(path).startswith("~"):  # a service may have a different home, or none
        raise ValueError(f"is {path}: write the full path, without ~")
    return Path(os.path.realpath(HERE / path))


def _real(path: Path | None) -> Path:
    """`path`, else DATABASE from the settings, whatever the working directory is."""
    if path:
        return Path(os.path.realpath(path))
    try:
        return beside_code(settings().get("DATABASE", "database.json"))
    except ValueError as error:
        raise DatabaseError(f"DATABASE {error}") from None


def edit(path: Path, how: Callable[[Store], object]) -> Store:
    """`change` for other programs; it waits while an editor saves the file or the lock is taken."""
    file = File(path)
    return _patiently(lambda: change(file, how), PATIENCE)


def rewrite(path: Path) -> Store:
    """Write the file, if there is one, as the poller would, with the same content. Raises DatabaseError."""

    def touch(store: Store) -> None:
        store.changed = path.exists()

    return edit(path, touch)


def get_orders(path: Path | None = None) -> dict[str, Fields]:
    """The pending orders: task id to fields (`projectID`, `added`, …)."""
    return read(_real(path)).orders


def add_order(task_id: str, project_id: str | None = None, path: Path | None = None) -> bool:
    """Add an order; when this returns it is on the disk. False if it was already pending or delivered.

    Raises ValueError if the task id is invalid, or the project id is not a string.
    """
    if not is_task_id(task_id):
        raise ValueError(f"{task_id!r} is not a task id: letters, digits, '.', '_' and '-', at most 128")
    if not isinstance(project_id, (str, type(None))):
        raise ValueError(f"the project id {project_id!r} is not a string")
    path = _real(path)
    deliveries = Deliveries(path)  # before the lock: a list of 100,000 takes 0.1 s

    def add(store: Store) -> None:
        deliveries.refresh()
        if key(task_id) not in store.ids and key(task_id) not in deliveries.ids:
            store.put(task_id, {"projectID": project_id} if project_id else {}, new=True)

    return edit(path, add).changed


def remove_order(task_id: str, path: Path | None = None) -> None:
    """Remove an order if it is pending."""
    edit(_real(path), lambda store: store.take([task_id]))


def retry_orders(
    task_id: str | None = None, path: Path | None = None, since: datetime | None = None
) -> list[str]:
    """Make a failed or delivered order pending again, or (None) all failed orders. Returns their ids.

    since: only with None; only orders that failed at this time or later.
    """
    path, moved, first = _real(path), list[str](), stamp(since) if since else ""

    def again(store: Store) -> None:
        failed, deliveries = store.failed, Deliveries(path)
        names, before = filter(is_task_id, failed), set(map(key, moved))  # before: an editor saved meanwhile
        if task_id is None:
            moved[:] = [name for name in names if str(failed[name].get("failed", "")) >= first]
        else:
            moved[:] = [name for name in names if key(name) == key(task_id)]
            interrupted = deliveries.again - store.ids.keys()  # an earlier retry only came as far as the list
            if not moved and key(task_id) in deliveries.ids.keys() | interrupted | before:
                moved.append(task_id)
        if listed := {name: "-" for name in moved if key(name) in deliveries.ids}:
            deliveries.add(listed)  # before it is pending, else the poller would remove it
        for name in moved:
            if name in failed and name in store.data["failed"]:  # else another spelling was retried
                store.retry(name)
            elif key(name) not in store.ids:
                store.put(name, {}, new=True)
            store.changed = True  # even if it is already pending, so that a running poller notices

    edit(path, again)
    return moved


# --- python db.py ----------------------------------------------------------------------------


def _show(title: str, orders: dict[str, Fields], *names: str) -> None:
    print(f"{len(orders)} {title}")
    if orders:
        rows = [["order", *names]]
        for task_id, fields in orders.items():
            rows.append([task_id, *(" ".join(str(fields.get(name, "")).split()) for name in names)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), "", sep="\n")


def _list(path: Path) -> None:
    store, deliveries = read(path), Deliveries(path)
    pending = {name: fields for name, fields in store.orders.items() if key(name) not in deliveries.ids}
    failing = {name: pending.pop(name) | said for name, said in store.failing.items() if name in pending}
    print(path)
    _show("pending", pending, "projectID", "added")
    _show("rejected, and retried", failing, "projectID", "since", "status", "error")
    _show("failed", store.failed, "projectID", "failed", "status", "error")
    with contextlib.suppress(OSError):
        if said := beside(path, "pid").read_text().partition(" ")[2].strip():
            print(f"the poller says: {said}")
    for item in store.invalid:
        print(f"{IGNORED}{item}")
    first = stamp(datetime.now(timezone.utc) - timedelta(days=1))
    print(f"{sum(said >= first for said in deliveries.ids.values())} delivered in the last 24 hours")
    for task_id, said in [*deliveries.ids.items()][-1:]:
        print(f"last delivery: {said[:20]} {task_id} {said[21:]}")


def _run(given: argparse.Namespace) -> None:
    path, task_id = _real(None), vars(given).get("task_id")
    if given.command == "list":
        _list(path)
    elif given.command == "retry":
        moved = retry_orders(task_id, path, given.since)
        if task_id is not None and not moved:
            raise ValueError(f"{task_id} has neither failed nor been delivered: see python db.py list")
        print(f"{len(moved)} order{'s' * (len(moved) != 1)} will be polled again")
    elif add_order(given.task_id, given.project, path):
        print(f"{task_id} is pending now, in {path}")
    elif delivered := Deliveries(path).ids.get(key(given.task_id)):
        again = f"To deliver it again: python db.py retry {task_id}"
        raise ValueError(f"{task_id} was delivered at {delivered[:20]}, as {delivered[21:]}. {again}")
    else:
        print(f"{task_id} was pending already, in {path}")


def open_streams() -> None:
    """Let stdout take any text. Reopen closed standard streams, or other files would take their place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def main() -> int:
    """`python db.py`. Returns the exit code: 0, or 1 with a message on stderr."""
    open_streams()
    parser = argparse.ArgumentParser(prog="db.py", description="See and change the orders in database.json.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the pending, rejected and failed orders, and the last delivery")
    add = commands.add_parser("add", help="add an order, whose file the poller downloads")
    add.add_argument("task_id", metavar="TASK_ID", help="data.taskId of GraFx's answer")
    add.add_argument("--project", metavar="ID", help="the order's project")
    retry = commands.add_parser("retry", help="poll failed orders again, or deliver one again")
    what = retry.add_mutually_exclusive_group(required=True)
    what.add_argument("task_id", metavar="TASK_ID", nargs="?", help="an order that failed or was delivered")
    what.add_argument("--all", action="store_true", help="all failed orders")
    since = "those that failed since then, as in 2026-01-31T12:00:00Z"
    what.add_argument("--since", metavar="UTC", type=utc, help=since)
    given = parser.parse_args()
    for name in (signal.SIGPIPE, signal.SIGINT):  # `db.py list | head` and Ctrl-C are not errors
        signal.signal(name, signal.SIG_DFL)
    try:
        _run(given)
        sys.stdout.flush()
    except (DatabaseError, ValueError, OverflowError, OSError) as error:
        print(f"db.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # do not flush stdout again after a failed write, e.g. to a full disk
