"""`database.json`: which orders wait, which GraFx refuses, which have failed. Knows nothing of the network.

    import db
    db.add_order("84ad7436-f82f-4e87-8cd3-37299e37878c", "my-project")

People edit the file by hand and programs write it while the poller runs, so no change is made to
a remembered copy. Each one takes the lock, reads the file, changes its own entries, and puts a
new file in the place of the old one in a single step. Whoever reads meanwhile sees all of the old
file or all of the new one. Every function here raises DatabaseError where that cannot be done.

What was delivered stands in a list beside it, `.database.json.delivered`, so that no order is
delivered twice, whoever brings it back.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import io
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from dotenv import dotenv_values

HERE = Path(__file__).resolve().parent
TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
LOOK = 1.0  # seconds between two looks at whether database.json changed
SAVING = 2.0  # seconds: what has made no sense, or been missing, for less may be half saved by an editor
PATIENCE = 10.0  # seconds to wait for another writer, or for an editor that saves
SHARE = 20  # the poller spends at most the twentieth part of its time on writing
KEPT = 100_000  # deliveries that are remembered at least, and twice as many at most
# What the poller writes into a failed record; an order's own fields of these names move to "order".
RECORD = ("status", "error", "failed", "order")

LEFT = "It is left as it is: mend it."

Fields = dict[str, Any]
Failures = dict[str, tuple[int | None, str]]  # task id to HTTP status and what GraFx said
Given = TypeVar("Given")
Version = tuple[int, ...] | None

log = logging.getLogger("db")


class DatabaseError(Exception):
    """The file cannot be read or written; the text says what is wrong, where, and what to do."""


class HalfSaved(DatabaseError):
    """The same, but somebody may be saving it just now: look again."""


class Busy(DatabaseError):
    """Another process has the lock; the text says which."""


@dataclass
class Store:
    """What the file says. `orders`, `failing` and `failed` map a task id to its fields."""

    data: Fields
    items: Any  # of `data`, the object or list that holds the orders
    orders: dict[str, Fields]
    strange: list[str]  # entries that are no order, each in one line

    @property
    def failing(self) -> dict[str, Fields]:
        """The orders that GraFx refuses, but not yet for long enough; they wait as well."""
        return self._records("failing")

    @property
    def failed(self) -> dict[str, Fields]:
        """The orders that nobody asks about any more."""
        return self._records("failed")

    def _records(self, name: str) -> dict[str, Fields]:
        return {key: value for key, value in self.data.get(name, {}).items() if isinstance(value, dict)}


def settings() -> dict[str, str]:
    """The environment over `.env` beside this file; an empty variable counts as none."""
    try:
        # Not interpolated, as in the workshop's Node `dotenv`: a "$" in a secret is a "$".
        file = dotenv_values(HERE / ".env", interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatabaseError(f"cannot read {HERE / '.env'}: {error}. Mend it or its permissions.") from None
    return {name: value for name, value in (*file.items(), *os.environ.items()) if value}


def mend(error: OSError) -> str:
    """What to do about a file that cannot be made, read or written."""
    mends = {errno.ENOENT: "Make the folder.", errno.ENOSPC: "Make room.", errno.EDQUOT: "Make room."}
    return mends.get(error.errno or 0, "Mend the folder's permissions.")


def is_task_id(value: object) -> bool:
    """Whether `value` may name a task, and so a file in the orders folder."""
    return isinstance(value, str) and TASK_ID.fullmatch(value) is not None


def stamp(when: datetime | None = None) -> str:
    """A time, now if none is given, as the project's files have it: UTC, ISO 8601, to the second."""
    return (when or datetime.now(timezone.utc)).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.lru_cache(maxsize=1000)  # so once for each
def warn_once(problem: str) -> None:
    log.warning("%s", problem)


# --- the text --------------------------------------------------------------------------------

# On one line the encoder is C; with an indent it is Python, and ten times as slow.
_line = json.JSONEncoder(ensure_ascii=False).encode


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{json.dumps(twice)} stands twice in one object, and only one could be kept")
    return found


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number, or none")
    return number


def _parse(raw: bytes) -> Fields:
    """Raises ValueError with what is wrong, RecursionError."""
    if not raw.strip(b" \t\r\n\xef\xbb\xbf"):
        # No empty store: an editor or a command may have emptied it, and may be about to write it.
        raise ValueError("it is empty. Put back what was in it, or remove it")
    try:
        text = raw.decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_number, parse_float=_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    for key in ("failing", "failed"):
        if not isinstance(data, dict) or not isinstance(data.get(key, {}), dict):
            raise ValueError('it must be an object, and so must its "failing" and "failed"')
    return cast(Fields, data)


def _text(store: Store) -> bytes:
    """Each order on a line of its own, for `grep`, `sed` and the eye; all else indented by 4."""
    rows = [id(part) for part in (store.items, store.data.get("failing"), store.data.get("failed"))]
    # backslashreplace: half a surrogate pair, which UTF-8 cannot hold, in JSON's own \uXXXX.
    return (_laid_out(store.data, "\n", rows) + "\n").encode("utf-8", "backslashreplace")


def _laid_out(value: Any, start: str, rows: list[int]) -> str:
    """`value` as JSON; `start` is how each of its lines starts, `rows` is whose entries stay on one."""
    if not isinstance(value, (dict, list)) or not value:
        return _line(value)
    inner = start + "    "
    inside: Callable[[Any], str] = _line
    if id(value) not in rows:
        inside = functools.partial(_laid_out, start=inner, rows=rows)
    if isinstance(value, dict):
        ends, lines = "{}", [f"{_line(key)}: {inside(part)}" for key, part in value.items()]
    else:
        ends, lines = "[]", [inside(part) for part in value]
    return ends[0] + inner + ("," + inner).join(lines) + start + ends[1]


# --- the orders: in an object, a list, or the workshop's {"dataType": "Map", "value": [ … ]} ---


def _entry(item: Any) -> tuple[str | None, Fields]:
    """Task id and fields of an entry; None where it is no order.

    Of an object it is a key and its value; of a list an id, an object with `taskID`, or a pair of both.
    """
    task_id, fields = item, {}
    if isinstance(item, tuple):
        task_id, fields = item
        if not isinstance(fields, dict):
            fields = {} if fields is None else {"order": fields}
    elif isinstance(item, dict):
        task_id, fields = item.get("taskID"), item
    elif isinstance(item, list) and len(item) == 2 and isinstance(item[1], dict):
        task_id, fields = item
    if not is_task_id(task_id):
        return None, {}
    if fields.get("taskID") == task_id:  # it only says the id again
        fields = {key: value for key, value in fields.items() if key != "taskID"}
    return task_id, fields


def _store(data: Fields) -> Store:
    items = data.setdefault("orders", {})
    if isinstance(items, dict) and items.get("dataType") == "Map":
        items = items["value"] if isinstance(items.get("value"), list) else None
    if not isinstance(items, (dict, list)):
        raise ValueError('"orders" must be an object, a list, or {"dataType": "Map", "value": [ … ]}')
    store = Store(data, items, {}, [])
    for item in items.items() if isinstance(items, dict) else items:
        task_id, fields = _entry(item)
        if task_id is None:
            store.strange.append(_line(item))
        else:
            known = store.orders.get(task_id)
            store.orders[task_id] = fields | known if known else fields
    return store


def _put(store: Store, task_id: str, fields: Fields, new: bool = False) -> None:
    """Put an order in, in the shape that the others have; `new` notes when."""
    items = store.items
    bare = not fields and isinstance(items, list) and isinstance((items or [None])[-1], str)
    if new and not bare:
        fields = {**fields, "added": stamp()}
    store.orders[task_id] = fields
    if isinstance(items, dict):
        items[task_id] = fields
    elif bare:
        items.append(task_id)
    elif fields.get("taskID", task_id) != task_id or items is not store.data["orders"]:
        # The field has another meaning, or it is a Map.
        items.append([task_id, {"taskID": task_id, **fields}])
    else:
        items.append({"taskID": task_id, **fields})


def _take(store: Store, gone: set[str]) -> None:
    for task_id in gone:
        del store.orders[task_id]
        if isinstance(store.items, dict):
            del store.items[task_id]
    if isinstance(store.items, list):
        store.items[:] = [item for item in store.items if _entry(item)[0] not in gone]


def _end(store: Store, delivered: Iterable[str], failed: Failures) -> bool:
    """Take orders out, with what stands under "failing", and the failed ones in under "failed"."""
    gone = {*delivered, *failed} & store.orders.keys()
    for task_id in gone:
        store.data.get("failed", {}).pop(task_id, None)
    for task_id in [task_id for task_id in failed if task_id in gone]:
        fields, (status, error) = store.orders[task_id], failed[task_id]
        record = {key: value for key, value in fields.items() if key not in RECORD}
        record |= {"status": status, "error": error, "failed": stamp()}
        if own := {key: fields[key] for key in RECORD if key in fields}:
            record["order"] = own
        store.data.setdefault("failed", {})[task_id] = record
    if gone:
        _take(store, gone)
        _set_failing(store, {key: record for key, record in store.failing.items() if key not in gone})
    return bool(gone)


def _revive(store: Store, task_id: str) -> None:
    """Let a failed order wait again, with all of its own fields."""
    record = store.data["failed"].pop(task_id)
    fields = {key: value for key, value in record.items() if key not in RECORD[:3]}
    own = fields.get("order")
    if isinstance(own, dict) and own and own.keys() <= set(RECORD):  # by `_end`
        del fields["order"]
        fields |= own
    if task_id in store.orders:
        fields |= store.orders[task_id]
        _take(store, {task_id})
    _put(store, task_id, fields)


def _set_failing(store: Store, records: dict[str, Fields]) -> bool:
    """Whether that changed something. What a person typed there that is no object stays."""
    if store.failing == records:
        return False
    failing = store.data.setdefault("failing", {})
    for task_id in store.failing.keys() - records.keys():
        del failing[task_id]
    failing |= {task_id: dict(record) for task_id, record in records.items()}
    if not failing:
        del store.data["failing"]
    return True


# --- the file --------------------------------------------------------------------------------


def version(file: Path | int) -> Version:
    """What `stat` knows of a file's content, None where there is no file. Raises OSError."""
    try:
        stat = os.stat(file)  # noqa: PTH116 - of a path or of an open file
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class Watch:
    """Reads the file, and knows for how long it has been as it is.

    By the monotonic clock: the clocks of people and of file servers are ahead, or are set back. Only
    who watches a file can tell one that somebody is saving from one that is broken or was taken away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # As it was at the last look. Where there is a lock, there was a file, and it is missed.
        self.seen: Version = () if _beside(path, "lock").exists() else None
        self.since = -math.inf  # when it was seen like that for the first time
        self.problem = ""  # with what was seen: a broken file is parsed again only when it changed

    def changed(self) -> bool:
        """Whether there is something to read, or to say again."""
        try:
            return version(self.path) != self.seen or bool(self.problem)
        except OSError:
            return True

    def read(self) -> Store:
        """Read the file now. Raises HalfSaved for what may be half saved."""
        try:
            with self.path.open("rb") as file:
                seen = version(file.fileno())
                raw = b"" if self.problem and seen == self.seen else file.read()
        except FileNotFoundError:
            seen = None
        except OSError as error:
            self.seen = ()
            raise DatabaseError(f"cannot read {self.path}: {error.strerror}. Mend its permissions.") from None
        if seen != self.seen:
            self.seen, self.since, self.problem = seen, time.monotonic(), ""
        young = time.monotonic() < self.since + SAVING
        if seen is None and not young:
            if self.problem:
                log.warning("%s is missing: that counts as no orders. Put it back.", self.path)
            self.problem = ""
            return _store({"orders": {}, "failed": {}})
        if seen is None:  # some editors rename a file away before they write the new one
            self.problem = f"{self.path} is missing. Put it back."
        elif not self.problem:
            try:
                return _store(_parse(raw))
            except (ValueError, RecursionError) as error:
                what = "it is nested too deeply" if isinstance(error, RecursionError) else error
                self.problem = f"{self.path}: {what}. {LEFT}"
        raise (HalfSaved if young else DatabaseError)(self.problem)


def _patiently(step: Callable[[], Given], patience: float) -> Given:
    """What `step` gives, tried for so many seconds while somebody saves the file or has the lock."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return step()
        except (HalfSaved, BlockingIOError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.01)


def read(path: Path) -> Store:
    """Read the file; a missing one is an empty store. What may be half saved is waited for."""
    return _patiently(Watch(path).read, PATIENCE)


@contextlib.contextmanager
def lock(path: Path, name: str, patience: float) -> Iterator[TextIO]:
    """Hold the lock `.<database>.<name>` beside the file: "lock" to write, "pid" to be its only poller.

    It is on a file of its own that is never replaced or removed. On the database itself, a rename
    would leave one process with a lock on a file that is no longer there and the next one with a
    lock on the new file; so would a lock file that is removed after use. The kernel lets go of it
    when its process ends, however it ends. patience: seconds to wait for it; Busy where they end.
    """
    place = _beside(path, name)
    try:
        file = os.fdopen(_open(place), "r+")
        _patiently(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB), patience)
    except BlockingIOError:
        with file:
            holder = _holder(file)
        if name == "pid":
            raise Busy(f"a poller with {path} runs already, as {holder}. One is enough.") from None
        raise Busy(f"{path} is being written by {holder}, which holds {place}. Try again.") from None
    except OSError as error:
        raise DatabaseError(f"cannot lock {place}: {error.strerror}. {mend(error)}") from None
    with file:
        take_note(file, "")
        try:
            yield file
        finally:  # explicitly: a child that was forked meanwhile shares the lock, and would keep it
            fcntl.flock(file, fcntl.LOCK_UN)


def _holder(lock: TextIO) -> str:
    pid = lock.readline().partition(" ")[0].strip()
    try:
        return f"process {pid} ({Path(f'/proc/{int(pid)}/comm').read_text(errors='replace').strip()})"
    except (ValueError, OSError):  # nothing is noted, no Linux, or not for us to know
        return f"process {pid}" if pid else "another process"


def take_note(lock: TextIO, note: str) -> None:
    """Write into a held lock whose it is, and the poller's note for `db.py list`."""
    with contextlib.suppress(OSError):  # it is for people; the lock itself is the kernel's
        os.ftruncate(lock.fileno(), 0)
        text = f"{os.getpid()} {note}\n".encode(errors="backslashreplace")
        os.write(lock.fileno(), text)  # unbuffered: nothing is left for close


def _change(path: Path, edit: Callable[[Store], bool]) -> bool:
    """Take the lock and rewrite; whether that changed something."""
    watch = Watch(path)  # before there is a lock: then a file was never there
    with lock(path, "lock", PATIENCE):
        _, changed = _rewrite(watch, edit, PATIENCE)
    return changed


def _rewrite(watch: Watch, edit: Callable[[Store], bool], patience: float) -> tuple[Store, bool]:
    """Under the lock: read the file anew, and where `edit` says that it changed something, write it."""
    while True:
        store = _patiently(watch.read, patience)
        if not edit(store):
            return store, False
        seen, watch.seen = watch.seen, ()  # until it is written, nobody knows what was read
        try:
            written = _replace(watch.path, _text(store), seen)
        except RecursionError:
            raise DatabaseError(f"{watch.path}: it is nested too deeply. {LEFT}") from None
        if written:
            watch.seen = written
            return store, True


def _replace(path: Path, content: bytes, seen: Version) -> Version:
    """Put a new file in the place of `path`, in one step; None where that is no longer as `seen`."""
    temp = path.with_name(f".{path.name.removeprefix('.')}.tmp")  # one, however many are killed
    try:
        temp.unlink(missing_ok=True)
        with temp.open("xb") as file:
            _dress(file.fileno(), path)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written = version(file.fileno())  # now: what is saved in place after the rename is not ours
            # An editor knows nothing of the lock. What it saves after this look is lost.
            if version(path) != seen:
                return None
            temp.replace(path)
            sync_folder(path.parent)
            return written
    except OSError as error:
        raise DatabaseError(f"cannot write {path}: {error.strerror}. {mend(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f".{path.name}.{name}")


def _open(place: Path) -> int:
    """Open a file beside the database to read and append; a new one is made. Raises OSError.

    No link is followed, and only what is new changes hands: root may call in another user's folder.
    """
    how = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW
    try:
        fd = os.open(place, how | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return os.open(place, how)
    _share(fd, place.parent)
    return fd


def _dress(fd: int, path: Path) -> None:
    """Let what takes the place of `path` be whose that is, as far as one may, with the same permissions."""
    try:
        old = path.stat()
    except FileNotFoundError:
        return _share(fd, path.parent)
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):  # one may be ours to give, the other not
        with contextlib.suppress(PermissionError):
            os.fchown(fd, owner, group)
    os.fchmod(fd, old.st_mode & 0o7777)


def _share(fd: int, folder: Path) -> None:
    """A new file is for all whom its folder lets write; where root makes it, for its owner too."""
    with contextlib.suppress(PermissionError):  # who is not of that group has nothing to share with it
        like = folder.stat()
        if os.geteuid() == 0:
            os.fchown(fd, like.st_uid, like.st_gid)
            os.fchmod(fd, like.st_mode & 0o664)
        elif like.st_mode & 0o020:
            os.fchown(fd, -1, like.st_gid)
            os.fchmod(fd, os.fstat(fd).st_mode & 0o7777 | 0o060)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- the list of what was delivered ----------------------------------------------------------


class Deliveries:
    """`.database.json.delivered`: one line for each delivery, `<UTC> <task id> <file name>`.

    A file name of `-` says that the order is to be delivered again; the last line about an order
    counts. A line without its end was cut off by a crash, and is none. Only the poller shortens it.
    """

    LINE = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (%b) (.+)\n" % TASK_ID.pattern.encode())

    def __init__(self, database: Path) -> None:
        self.database = database
        self.path = _beside(database, "delivered")
        self.file: Version = None  # device and inode of what was read: another one is read anew
        self.lines = self.end = 0  # read so far, and up to which byte
        self.ids: set[str] = set()

    def refresh(self) -> None:
        """Read what was appended since; where that cannot be done, say so once and go on without."""
        try:
            self._read_on()
        except OSError as error:
            warn_once(f"cannot read {self.path}: {error.strerror}. Mend that: nothing counts as delivered.")

    def _read_on(self) -> None:
        now = version(self.path)
        if self.file and not now:
            warn_once(f"{self.path} was taken away: what was delivered before counts as never delivered.")
        file, size = (now[:2], now[2]) if now else (None, 0)
        if file != self.file or size < self.end:
            self.ids.clear()
            self.file, self.lines, self.end = file, 0, 0
        if size == self.end:
            return
        with self.path.open("rb") as lines:
            lines.seek(self.end)
            for line in lines:
                if line.endswith(b"\n"):
                    self.lines, self.end = self.lines + 1, self.end + len(line)
                    self._know(line)

    def _know(self, line: bytes) -> None:
        match = self.LINE.fullmatch(line)
        if match and match[3] == b"-":
            self.ids.discard(match[2].decode())
        elif match:
            self.ids.add(match[2].decode())
        elif line != b"\n":
            warn_once(f"{self.path}: lines that speak of no delivery are passed over.")

    def add(self, files: Mapping[str, str]) -> None:
        """Note deliveries, task id to file name; when this returns they are on the disk.

        Raises DatabaseError; then they may be noted in part, and can be noted again.
        """
        lines = [f"{stamp()} {task_id} {name or '?'}\n" for task_id, name in files.items()]
        try:
            with os.fdopen(_open(self.path), "r+b", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    lines.insert(0, "\n")  # the line that was cut off stays apart
                rest = "".join(lines).encode("utf-8", "backslashreplace")
                while rest:  # in one piece, but where the disk is just full
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            if not size:
                sync_folder(self.path.parent)
            self._read_on()
        except OSError as error:
            raise DatabaseError(f"cannot write {self.path}: {error.strerror}. {mend(error)}") from None

    def shorten(self) -> None:
        """Leave the newest KEPT lines where there are twice as many. Says where that is not possible."""
        if self.lines <= 2 * KEPT:
            return
        try:
            with lock(self.database, "lock", 1.0), self.path.open("rb") as file:
                seen = version(file.fileno())
                self.refresh()
                for _ in range(self.lines - KEPT):
                    file.readline()
                _replace(self.path, file.read(self.end - file.tell()), seen)
        except Busy:
            pass  # the next time will do
        except (DatabaseError, OSError) as error:
            warn_once(f"{self.path} cannot be shortened: {error}")

    def last(self, task_id: str) -> tuple[str, str] | None:
        """When an order was delivered (UTC) and as which file, without making sense of all of the list."""
        text, last, word = b"", None, f" {task_id} ".encode()
        with contextlib.suppress(OSError):
            text = self.path.read_bytes()
        for line in io.BytesIO(text) if word in text else ():  # it seldom is
            if word in line and (match := self.LINE.fullmatch(line)) and match[2] == word.strip():
                last = match
        if last is None or last[3] == b"-":
            return None
        return last[1].decode(), last[3].decode("utf-8", "replace")

    def since(self, when: datetime) -> tuple[int, str]:
        """How many deliveries there were since then, and the last line of all."""
        first, count, last = stamp(when).encode(), 0, b""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            for line in file:
                match = self.LINE.fullmatch(line)
                if match and match[3] != b"-":
                    count, last = count + (match[1] >= first), line
        return count, last.decode("utf-8", "replace").strip()


# --- what the poller's loop needs ------------------------------------------------------------


@dataclass
class _Turn:
    """What changes with each look at the file or write to it. Times are monotonic seconds."""

    look: float = 0.0  # when the next look is due
    write: float = 0.0  # until when nothing is written
    busy: float = math.inf  # since when the lock is another's
    over: set[str] = field(default_factory=set)  # delivered, but still in the file: to be taken out
    failing: dict[str, Fields] = field(default_factory=dict)  # in the file
    problems: dict[str, str] = field(default_factory=dict)  # with the "database" and with the "list"


class Database:
    """`database.json` as the loop needs it: `start` once, then `sync` each turn, `flush` at the end.

    The loop sets what came of the orders, `delivered` (task id to file name), `failed` (to HTTP
    status and what GraFx said) and `failing` (what has to stand under "failing"); the file is made
    to say so. An order that was delivered goes on the list first, and leaves the file then.
    """

    def __init__(self, path: Path, once: bool = False) -> None:
        self.path, self.watch, self.deliveries = path, Watch(path), Deliveries(path)
        self.once = once  # then nobody looks for new orders
        self.failing: dict[str, Fields] = {}
        self.delivered: dict[str, str] = {}  # these two only until they are written
        self.failed: Failures = {}
        self._turn = _Turn()

    @property
    def problem(self) -> str:
        """What is wrong with the file or the list just now."""
        return next(iter(self._turn.problems.values()), "")

    def start(self) -> Store:
        """Read the file and the list. Raises DatabaseError."""
        store = self._shown(_patiently(self.watch.read, PATIENCE))
        self.failing = {key: dict(record) for key, record in store.failing.items() if key in store.orders}
        return store

    def sync(self, soon: bool) -> Store | None:
        """Write what came of the orders, and see what others changed; what is new, or None.

        soon: nothing else is under way, so what is to be written need not wait for more.
        A problem is logged once, and once when it is over; meanwhile nothing is lost or forgotten.
        """
        turn, now, store = self._turn, time.monotonic(), None
        look = now >= turn.look
        if look:
            turn.look = now + LOOK
        if self.delivered and (look or "list" not in turn.problems):
            self._note()
        if now >= turn.write and (look or (soon and "database" not in turn.problems)) and self._unwritten():
            store = self._tried(self._write)
        # Where there is nothing to write any more, a problem with that is over once the file can be read.
        needless = "database" in turn.problems and not self._unwritten()
        if look and not store and not self.once and (self.watch.changed() or needless):
            store = self._tried(lambda: self._shown(self.watch.read()))
        return store

    def flush(self) -> bool:
        """One last try to write everything; False where something is not written."""
        deadline = time.monotonic() + (PATIENCE if self.once else 1.0)
        if self.delivered:
            self._note()
        while self._unwritten() and not self._tried(self._write):
            # A lock that another has is waited for; all else will not be mended so soon.
            broken = "database" in self._turn.problems and self._turn.busy == math.inf
            if broken or time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return not self.delivered

    def _note(self) -> None:
        """Put deliveries on the list, all with one fsync; from then on they are safe."""
        try:
            self.deliveries.add(self.delivered)
        except DatabaseError as error:
            return self._complain("list", str(error))
        self._complain("list", "")
        self._turn.over |= self.delivered.keys()
        self.delivered.clear()
        self.deliveries.shorten()

    def _unwritten(self) -> bool:
        """Whether the file does not say yet what came of the orders."""
        turn = self._turn
        return bool(turn.over or self.failed) or self.failing != turn.failing

    def _tried(self, step: Callable[[], Store]) -> Store | None:
        turn = self._turn
        try:
            store = step()
            if not self._unwritten():
                self._complain("database", "")
            return store
        except Busy as error:  # somebody writes, or waits for an editor: no problem yet
            now = time.monotonic()
            turn.busy, turn.write = min(turn.busy, now), now + 0.2
            if now >= turn.busy + PATIENCE and "database" not in turn.problems:
                self._complain("database", str(error), logging.WARNING)
        except HalfSaved:
            pass
        except DatabaseError as error:
            self._complain("database", str(error))
        return None

    def _write(self) -> Store:
        turn = self._turn
        with lock(self.path, "lock", 0.2):
            turn.busy, begun = math.inf, time.monotonic()
            try:
                store, _ = _rewrite(self.watch, self._settle, 0)
            finally:
                turn.write = begun + SHARE * (time.monotonic() - begun)
        self.failed.clear()
        return self._shown(store)

    def _settle(self, store: Store) -> bool:
        """Let the file say what came of the orders; whether that changed it."""
        changed = _end(store, self._over(store), self.failed)
        self.failing = {key: record for key, record in self.failing.items() if key in store.orders}
        return _set_failing(store, self.failing) or changed

    def _over(self, store: Store) -> set[str]:
        """The orders of the file that are delivered; says which of them somebody brought back.

        The list is read after the file: `retry` writes to the list first, so that what it puts into
        the file is never taken out again for an older line.
        """
        self.deliveries.refresh()
        over = store.orders.keys() & self.deliveries.ids
        back, self._turn.over = over - self._turn.over, over
        if back:
            what = f"{len(back)} orders that had been delivered were"
            if len(back) == 1:
                what = f"{back.pop()} had been delivered and was"
            log.warning("%s brought back, by hand or by a store; taken out", what)
        return over

    def _shown(self, store: Store) -> Store:
        """Remember what the file has; returns it without what has ended, which is not the loop's business."""
        over, self._turn.failing = self._over(store), store.failing
        for task_id in (over | self.delivered.keys() | self.failed.keys()) & store.orders.keys():
            del store.orders[task_id]
        return store

    def _complain(self, what: str, problem: str, level: int = logging.ERROR) -> None:
        """Log a problem once, and once that it is over."""
        before = self._turn.problems.pop(what, "")
        if problem:
            self._turn.problems[what] = problem
        if before and before != problem:
            log.info("over: %s", before)
        if problem and before != problem:
            log.log(level, "%s", problem)


# --- what other programs call ----------------------------------------------------------------


def _real(path: Path | None) -> Path:
    """`path`, else DATABASE of the settings, beside this file wherever one calls from."""
    path = path or HERE / settings().get("DATABASE", "database.json")
    return Path(os.path.realpath(path))  # a symbolic link stays one


def get_orders(path: Path | None = None) -> dict[str, Fields]:
    """The waiting orders: task id to its fields (`projectID`, `added`, …)."""
    return read(_real(path)).orders


def add_order(task_id: str, project_id: str | None = None, path: Path | None = None) -> bool:
    """Let an order wait; when this returns it is on the disk. False where it waits or was delivered.

    Raises ValueError for what is no task id, and for a project id that is no string.
    """
    if not is_task_id(task_id):
        raise ValueError(f"{task_id!r} is no task id: letters, digits, '.', '_' and '-', at most 128")
    if not isinstance(project_id, (str, type(None))):
        raise ValueError(f"the project id {project_id!r} is no string")
    path = _real(path)

    def edit(store: Store) -> bool:
        if task_id in store.orders or Deliveries(path).last(task_id):
            return False
        _put(store, task_id, {"projectID": project_id} if project_id else {}, new=True)
        return True

    return _change(path, edit)


def remove_order(task_id: str, path: Path | None = None) -> None:
    """Take an order out, where it still waits."""
    _change(_real(path), lambda store: _end(store, [task_id], {}))


def retry_orders(
    task_id: str | None = None,
    path: Path | None = None,
    since: datetime | None = None,
    status: int | None = None,
) -> list[str]:
    """Let an order wait again that failed or was delivered, or (None) all that failed; returns which.

    since, status: only those that failed since then, or with that HTTP status.
    """
    path, moved = _real(path), list[str]()

    def edit(store: Store) -> bool:
        deliveries, failed = Deliveries(path), store.failed
        deliveries.refresh()
        named = [key for key in failed if is_task_id(key) and task_id in (None, key)]
        moved[:] = [key for key in named if _matches(failed[key], since, status)]
        if not named and task_id and task_id in deliveries.ids:
            moved.append(task_id)
        if again := {key: "-" for key in moved if key in deliveries.ids}:
            deliveries.add(again)  # before it waits, or the poller would take it out
        for key in moved:
            if key in failed:
                _revive(store, key)
            elif key not in store.orders:
                _put(store, key, {}, new=True)
        return bool(moved)  # also where it waits already: the running poller notices by that

    _change(path, edit)
    return moved


def _matches(record: Fields, since: datetime | None, status: int | None) -> bool:
    try:
        late = since is None or utc(str(record.get("failed"))) >= since
    except ValueError:  # typed by somebody
        late = False
    return late and status in (None, record.get("status"))


def utc(text: str) -> datetime:
    """A time of ISO 8601; without a zone it is UTC. Raises ValueError."""
    when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


# --- python db.py ----------------------------------------------------------------------------


def _cell(value: object) -> str:
    return " ".join(str(value).split()) if isinstance(value, (str, int)) else ""


def _show(name: str, orders: dict[str, Fields], *keys: str) -> None:
    print(f"{len(orders)} {name}")
    if orders:
        rows = [[task_id, *(_cell(fields.get(key)) for key in keys)] for task_id, fields in orders.items()]
        rows.insert(0, ["order", *keys])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), "", sep="\n")


def _list(path: Path) -> None:
    store, deliveries = read(path), Deliveries(path)
    deliveries.refresh()
    waiting = {key: fields for key, fields in store.orders.items() if key not in deliveries.ids}
    refused = {key: waiting.pop(key) | record for key, record in store.failing.items() if key in waiting}
    print(path)
    _show("waiting", waiting, "projectID", "added")
    _show("failing", refused, "projectID", "since", "status", "error")
    _show("failed", store.failed, "projectID", "failed", "status", "error")
    with contextlib.suppress(OSError):
        if note := _beside(path, "pid").read_text().partition(" ")[2].strip():
            print(f"the poller said last: {note}")
    for item in store.strange:
        print(f"no order, left alone: {' '.join(item.split())}")
    count, last = deliveries.since(datetime.now(timezone.utc) - timedelta(days=1))
    print(f"{count} delivered in the last 24 hours, the last: {last or 'none yet'}")


def _run(given: argparse.Namespace, path: Path) -> None:
    if given.command == "list":
        return _list(path)
    task_id = given.task_id
    if given.command == "add":
        if add_order(task_id, given.project, path):
            print(f"{task_id} waits now, in {path}")
        elif delivered := Deliveries(path).last(task_id):
            again = f"To have it again: python db.py retry {task_id}"
            raise ValueError(f"{task_id} was delivered at {delivered[0]}, as {delivered[1]}. {again}")
        else:
            print(f"{task_id} waited already, in {path}")
    else:
        moved = retry_orders(task_id, path, given.since, given.status)
        if task_id is not None and not moved:
            raise ValueError(
                f"{task_id} has neither failed nor been delivered; python db.py list shows what has"
            )
        print(f"{len(moved)} order{'s' * (len(moved) != 1)} will be asked about again")


def open_streams() -> None:
    """Let each standard stream be one that takes any text.

    Where one was closed, as by 2>&-, no other file may take its place.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what a terminal cannot show


def main() -> int:
    """`python db.py`. Exit code 0, or 1 with a message on stderr."""
    open_streams()
    parser = argparse.ArgumentParser(prog="db.py", description="See and change the orders in database.json.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show what waits, what GraFx refuses, what has failed or was delivered")
    add = commands.add_parser("add", help="let the poller fetch a task's file")
    add.add_argument("task_id", metavar="TASK_ID", help="what GraFx answered as data.taskId")
    add.add_argument("--project", metavar="ID", help="kept with the order as projectID")
    retry = commands.add_parser("retry", help="ask about failed orders again, or deliver one again")
    retry.add_argument("task_id", metavar="TASK_ID", nargs="?", help="one that failed or was delivered")
    retry.add_argument("--all", action="store_true", help="all that failed")
    retry.add_argument("--since", metavar="UTC", type=utc, help="failed since then, say 2026-01-31T12:00:00Z")
    retry.add_argument("--status", metavar="N", type=int, help="failed with this HTTP status")
    given = parser.parse_args()
    if given.command == "retry":
        some = given.since is not None or given.status is not None
        if (given.task_id is not None) + given.all + some != 1:
            retry.error("give one of: TASK_ID, --all, or --since and --status")
    for name in (signal.SIGPIPE, signal.SIGINT):  # `db.py list | head` and Ctrl-C are no errors
        signal.signal(name, signal.SIG_DFL)
    try:
        _run(given, _real(None))
        sys.stdout.flush()
    except (DatabaseError, ValueError, OSError) as error:
        print(f"db.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # what could not be said, as into a full disk, is not tried again
