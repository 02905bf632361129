"""`database.json`: the orders that are pending, rejected, or failed. Knows nothing of the network.

    import db
    db.add_order("84ad7436-f82f-4e87-8cd3-37299e37878c", "my-project")

People edit the file by hand and programs write it while the poller runs, so nobody writes a remembered
copy: `change` reads the file, edits it, and puts a new one in its place in a single step. What was
delivered is listed beside it. What cannot be read or written raises DatabaseError.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import grp
import json
import logging
import math
import os
import pwd
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
LOOK = 1.0  # seconds between two looks at whether database.json changed
SAVING = 2.0  # seconds for which a file that makes no sense, or is missing, may be half saved by an editor
PATIENCE = 10.0  # seconds to wait for another writer, or for an editor that saves
SHARE = 20  # the poller spends at most a twentieth of its time on writing
KEPT = 100_000  # deliveries that are kept in the list; it is shortened when it has twice as many
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
PUT_BACK = 'Put it back, or start with an empty one: {"orders": {}}'
# No link is followed: root may call in another user's folder.
OPEN = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW
# The fields of a failed record; an order's own fields of these names move to "order".
RECORD = ("status", "error", "failed", "order")

Fields = dict[str, Any]
Given = TypeVar("Given")
Version = tuple[int, ...] | None

log = logging.getLogger("db")


class DatabaseError(Exception):
    """The file cannot be read or written; the text says what is wrong, where, and what to do."""


class Busy(DatabaseError):
    """Somebody is writing the file just now, or may be: try again."""


def env_file() -> Path:
    """Where settings are read from: GRAFX_ENV_FILE, else `.env` beside this file."""
    return Path(os.environ.get("GRAFX_ENV_FILE") or HERE / ".env")


def env_lines() -> list[Binding]:
    """What stands in the settings file. Raises DatabaseError."""
    place = env_file()
    try:
        with place.open(encoding="utf-8-sig") as file:
            return list(parse_stream(file))
    except OSError as error:
        # A folder `.env` is somebody's virtual environment.
        if isinstance(error, (FileNotFoundError, IsADirectoryError)) and place == HERE / ".env":
            return []
        raise DatabaseError(f"cannot read {place}: {error.strerror}. {advice(error, place)}") from None
    except UnicodeDecodeError as error:
        raise DatabaseError(f"cannot read {place}: {error}. Save it as UTF-8.") from None


def settings(names: Collection[str] = ("DATABASE",)) -> dict[str, str]:
    """The environment over the settings file; an empty variable counts as none.

    Raises DatabaseError where what sets one of `names` cannot be parsed, or has quotes around it.
    """
    given: list[tuple[str | None, str | None]] = []
    for name, value, original, error in env_lines():
        begin = rf"^\s*(?:export\s+)?['\"]?({'|'.join(names)})\b"
        if (error or value is None) and (line := re.search(begin, original.string, re.MULTILINE)):
            number = original.line + original.string.count("\n", 0, line.start(1))
            how = f"Write {line[1]}=VALUE, with quotes around all of VALUE or without."
            raise DatabaseError(f"{env_file()}, line {number}: {line[1]} cannot be parsed. {how}")
        # Not interpolated, as in the workshop's Node `dotenv`: a "$" in a secret is a "$".
        given.append((name, value))
    given += os.environ.items()
    found = {name: value.strip() for name, value in given if name and value and value.strip()}
    for name in set(names) - {"ON_DONE", "ON_FAILED"}:  # a command may have both
        if re.fullmatch(r"([\"']).*\1|.*[\x00-\x1f\x7f].*", found.get(name, ""), re.DOTALL):
            how = "Remove them; docker's --env-file keeps quotes."
            raise DatabaseError(f"{name} has quotes around it, or a control character in it. {how}")
    return found


def advice(error: OSError, place: Path) -> str:
    """What to do about a file that cannot be made, locked, read or written."""
    known = {
        errno.ENOENT: "Make the folder.",
        errno.EROFS: "Mount its file system for writing.",
        errno.EBUSY: "It is mounted as a single file: mount its folder.",
        errno.EFBIG: "Raise the limit (ulimit -f).",
        errno.ELOOP: "It is a symbolic link: put a file in its place.",
    }
    known |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room.")
    known |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "Make it a folder.")
    known |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit (ulimit -n).")
    known |= dict.fromkeys(UNSUPPORTED, "Its file system has no locks: use another one.")
    if error.errno not in (errno.EACCES, errno.EPERM):
        return known.get(error.errno or 0, "Look at its disk.")
    for where in (place, place.parent):
        with contextlib.suppress(OSError, KeyError):
            stat = where.stat()
            owner, group = pwd.getpwuid(stat.st_uid).pw_name, grp.getgrgid(stat.st_gid).gr_name
            mine = f"{where} is {owner}:{group}'s with mode {stat.st_mode & 0o7777:o}"
            return f"{mine}: run this with sudo, join that group, or fix owner and mode."
    return "Fix the folder's permissions."


def is_task_id(value: object) -> bool:
    """Whether `value` may name a task, and so a file in the orders folder."""
    return isinstance(value, str) and TASK_ID.fullmatch(value) is not None


def key(task_id: str) -> str:
    """What orders are told apart by: the case of a GUID does not matter."""
    return task_id.lower() if GUID.fullmatch(task_id) else task_id


def stamp(when: datetime | None = None) -> str:
    """A time, now if none is given, as the project's files have it: UTC, ISO 8601, to the second."""
    return (when or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def utc(text: str) -> datetime:
    """A time of ISO 8601; without a zone it is UTC. Raises ValueError."""
    when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


@functools.lru_cache(maxsize=1000)  # so once for each problem
def warn_once(problem: str, level: int = logging.WARNING) -> None:
    log.log(level, "%s", problem)


# --- what the file says ----------------------------------------------------------------------


class Store:
    """The content of `database.json`. `orders` maps a pending order's task id to its fields.

    The orders may stand in an object, in a list, or in the workshop's {"dataType": "Map", "value": [ … ]};
    the methods keep that shape, and set `changed` where there is something to write. Raises ValueError.
    """

    def __init__(self, data: Fields) -> None:
        items = data.setdefault("orders", {})
        if isinstance(items, dict) and items.get("dataType") == "Map":
            items = items["value"] if isinstance(items.get("value"), list) else None
        if not isinstance(items, (dict, list)):
            raise ValueError('"orders" must be an object, a list, or {"dataType": "Map", "value": [ … ]}')
        self.data, self.items, self.changed = data, items, False
        self.orders: dict[str, Fields] = {}
        self.ids: dict[str, str] = {}  # `key` of an order to its id in `orders`, as it stands there first
        self.others: list[str] = []  # the same orders once more, spelled in another way
        self.strange: list[str] = []  # entries that are no order, each in one line
        for item in items.items() if isinstance(items, dict) else items:
            task_id, fields = _entry(item)
            if task_id is None:
                self.strange.append(_encode(item))
            else:
                first = self.ids.setdefault(key(task_id), task_id)
                if first != task_id:
                    self.others.append(task_id)
                twice = self.orders.get(first)
                self.orders[first] = fields | twice if twice else fields

    @property
    def failing(self) -> dict[str, Fields]:
        """The records of orders that GraFx rejects; they are pending as well, and retried."""
        return _records(self.data.get("failing", {}))

    @property
    def failed(self) -> dict[str, Fields]:
        """The records of orders that are not polled any more."""
        return _records(self.data.get("failed", {}))

    def put(self, task_id: str, fields: Fields, new: bool = False) -> None:
        """Add an order, in the shape that the others have; `new` notes when."""
        items = self.items
        bare = not fields and isinstance(items, list) and isinstance((items or [None])[-1], str)
        if new and not bare:
            fields = {**fields, "added": stamp()}
        self.orders[task_id], self.ids[key(task_id)], self.changed = fields, task_id, True
        if isinstance(items, dict):
            items[task_id] = fields
        elif bare:
            items.append(task_id)
        elif "taskID" in fields or items is not self.data["orders"]:
            # The field has another meaning, or it is a Map.
            items.append([task_id, {"taskID": task_id, **fields}])
        else:
            items.append({"taskID": task_id, **fields})

    def named(self, task_ids: Iterable[str]) -> set[str]:
        """Those of these orders that are pending, as the file spells them."""
        return {self.ids[name] for name in self.ids.keys() & map(key, task_ids)}

    def take(self, task_ids: Iterable[str]) -> None:
        """Remove pending orders, with what stands under "failing" and "failed" about them."""
        gone = self.named(task_ids)
        for task_id in gone:
            del self.orders[task_id], self.ids[key(task_id)]
            for name in ("failing", "failed"):
                self.data.get(name, {}).pop(task_id, None)
        both = gone | {other for other in self.others if key(other) not in self.ids}
        if isinstance(self.items, dict):
            for task_id in both:
                self.items.pop(task_id, None)
        elif gone:
            self.items[:] = [item for item in self.items if _entry(item)[0] not in both]
        self.changed = self.changed or bool(gone)

    def fail(self, failures: Mapping[str, tuple[int | None, str]]) -> None:
        """Move pending orders to "failed", with the HTTP status and what GraFx said."""
        records = {}
        for task_id, (status, error) in failures.items():
            if key(task_id) in self.ids:
                fields = self.orders[self.ids[key(task_id)]]
                own = {name: fields[name] for name in RECORD if name in fields}
                record = fields | {"status": status, "error": error, "failed": stamp()}
                records[task_id] = record | ({"order": own} if own else {})
        self.take(records)
        if records:
            self.data.setdefault("failed", {}).update(records)

    def retry(self, task_id: str) -> None:
        """Make a failed order pending again, with all of its own fields."""
        record = self.data["failed"].pop(task_id)
        fields = {key: value for key, value in record.items() if key not in RECORD[:3]}
        own = fields.get("order")
        if isinstance(own, dict) and own and own.keys() <= set(RECORD):  # by `fail`
            del fields["order"]
            fields |= own
        fields |= self.orders.get(self.ids.get(key(task_id), task_id), {})
        self.take([task_id])
        self.put(task_id, fields)

    def set_failing(self, records: Fields) -> None:
        """Have these records under "failing". What a person typed there that is no object stays."""
        if self.failing != records:
            entries = self.data.get("failing", {})
            typed = {key: value for key, value in entries.items() if not isinstance(value, dict)}
            self.data["failing"], self.changed = typed | records, True

    def text(self) -> bytes:
        """The file: each order on a line of its own, for `grep` and the eye; all else indented by 4."""
        levels = {"orders": 1 + (self.items is not self.data["orders"]), "failing": 1, "failed": 1}
        lines = [
            f"    {_encode(key)}: {_block(value, 1, levels.get(key, math.inf))}"
            for key, value in self.data.items()
            if value or key != "failing"
        ]
        # backslashreplace: half a surrogate pair, which UTF-8 cannot hold, in JSON's own \uXXXX.
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", "backslashreplace")


# On one line the encoder is C; with an indent it is Python, and ten times as slow.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _block(value: Any, depth: int, levels: float) -> str:
    """JSON in which so many levels have each entry on a line of its own."""
    if levels == 0 or not value or not isinstance(value, (dict, list)):
        return _encode(value)
    if isinstance(value, dict):
        ends = "{}"
        lines = [f"{_encode(key)}: {_block(part, depth + 1, levels - 1)}" for key, part in value.items()]
    else:
        ends, lines = "[]", [_block(part, depth + 1, levels - 1) for part in value]
    margin = "\n" + "    " * depth
    return ends[0] + margin + "    " + f",{margin}    ".join(lines) + margin + ends[1]


def _records(entries: Fields) -> dict[str, Fields]:
    return {key: value for key, value in entries.items() if isinstance(value, dict)}


def _entry(item: Any) -> tuple[str | None, Fields]:
    """Task id and fields of an entry; None where it is no order.

    Of an object it is a key and its value; of a list an id, an object with `taskID`, or a pair of both.
    """
    task_id, fields = item, {}
    if isinstance(item, tuple):
        task_id, fields = item
    elif isinstance(item, dict):
        task_id, fields = item.get("taskID"), item
    elif isinstance(item, list) and len(item) == 2 and isinstance(item[1], dict):
        task_id, fields = item
    if not isinstance(fields, dict):
        fields = {} if fields is None else {"order": fields}
    if fields.get("taskID") == task_id:  # it only says the id again
        fields = {key: value for key, value in fields.items() if key != "taskID"}
    return (task_id, fields) if is_task_id(task_id) else (None, {})


def _parse(raw: bytes) -> Store:
    """Raises ValueError with what is wrong, RecursionError."""
    if not raw.strip(b" \t\r\n\xef\xbb\xbf"):
        # Not an empty store: an editor or a command may have emptied it, and be about to write it.
        raise ValueError(f"it is empty. {PUT_BACK}")
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    for key in ("failing", "failed"):
        if not isinstance(data, dict) or not isinstance(data.get(key, {}), dict):
            raise ValueError('it must be an object, and so must its "failing" and "failed"')
    return Store(data)


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{json.dumps(twice)} stands twice in one object, and only one could be kept")
    return found


# --- the file --------------------------------------------------------------------------------


def version(file: Path | int) -> Version:
    """What `stat` knows of a file's content, None where there is no file. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        stat = os.stat(file)  # noqa: PTH116 - of a path or of an open file
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


class File:
    """`database.json` on the disk, and since when it has been as it is.

    One that makes no sense, be it broken, empty or missing, may be half saved for SAVING seconds; after that
    it is an error; it is never written over. Only where there never was a file it is an empty store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: Version = ()  # as it was at the last look
        self.since = 0.0  # when it was seen like that for the first time; monotonic, since clocks jump
        self.problem = ""  # with what was seen: a broken file is parsed again only when it has changed
        self.existed = False

    def changed(self) -> bool:
        """Whether there is something to read, or still a problem."""
        with contextlib.suppress(OSError):
            return version(self.path) != self.seen or bool(self.problem)
        return True

    def read(self) -> Store:
        """Read the file now. Raises Busy for what may be half saved."""
        try:
            with self.path.open("rb") as file:
                self.existed = True
                self._saw(version(file.fileno()))
                if not self.problem:
                    return _parse(file.read())
        except FileNotFoundError:  # some editors rename a file away before they write the new one
            self._saw(None)
            lock = version(beside(self.path, "lock"))
            self.existed = self.existed or bool(lock and lock[2])  # see `change`
            if not self.existed:
                return Store({"orders": {}, "failed": {}})
            self.problem = f"{self.path} is missing. {PUT_BACK}"
        except OSError as error:
            self.seen = ()
            how = advice(error, self.path)
            raise DatabaseError(f"cannot read {self.path}: {error.strerror}. {how}") from None
        except (ValueError, RecursionError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else error
            self.problem = f"{self.path}: {what}. It is left as it is: fix it."
        young = time.monotonic() < self.since + SAVING
        raise (Busy if young else DatabaseError)(self.problem)

    def _saw(self, seen: Version) -> None:
        if seen != self.seen:
            self.seen, self.since, self.problem = seen, time.monotonic(), ""


def change(file: File, edit: Callable[[Store], None], patience: float) -> Store:
    """The one way to change the file: lock, read, `edit`, write a new one, rename it over the old one.

    Returns what the file says then. Where `edit` changes nothing, nothing is written. It is called again
    where an editor has saved the file meanwhile. patience: seconds to wait for the lock.
    """
    with lock(file.path, "lock", patience) as held:
        if file.path.exists():
            note(held)  # only then: a lock with a note in it shows that there was a database
        while True:
            store = file.read()
            edit(store)
            if not store.changed:
                return store
            seen, file.seen = file.seen, ()  # until it is written, nobody knows what was read
            try:
                written = _replace(file.path, store.text(), seen)
            except (ValueError, RecursionError) as error:  # of what JSON can be read, but not be written
                raise DatabaseError(f"{file.path}: {error}. Fix it.") from None
            if written:
                note(held)
                file.seen, file.existed = written, True
                return store


def _replace(path: Path, content: bytes, seen: Version) -> Version:
    """Put a new file in the place of `path`, in one step; None where that is not as `seen` any more."""
    temp = path.with_name(f".{path.name.removeprefix('.')}.tmp")  # one, however many are killed
    try:
        old = path.stat() if seen else None
    except FileNotFoundError:  # some editors rename a file away before they write the new one
        return None
    try:
        temp.unlink(missing_ok=True)
        with os.fdopen(_create(temp, old), "wb") as file:
            fd = file.fileno()
            file.write(content)
            file.flush()
            os.fsync(fd)
            written = version(fd)  # now: what is saved in place after the rename is not ours
            # An editor knows nothing of the lock. What it saves after this look is lost.
            if version(path) != seen:
                return None
            temp.replace(path)
            sync_folder(path.parent)
            return written
    except OSError as error:
        raise DatabaseError(f"cannot write {path}: {error.strerror}. {advice(error, path.parent)}") from None
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def _create(place: Path, old: os.stat_result | None = None) -> int:
    """Make a file, with owner, group and mode of the `old` one, else for those who may write its folder.

    Raises OSError, also where there is one.
    """
    fd = os.open(place, OPEN | os.O_CREAT | os.O_EXCL, 0o666)
    folder = place.parent.stat()
    like, mode = old or folder, old.st_mode if old else os.fstat(fd).st_mode
    if not old and folder.st_mode & 0o020:
        mode |= 0o060
    # As far as possible: perhaps the owner but not the group; some file systems have neither.
    for owner, group in ((-1, like.st_gid), (like.st_uid, -1)):
        with contextlib.suppress(OSError):
            os.fchown(fd, owner, group)
    with contextlib.suppress(OSError):
        os.fchmod(fd, mode & 0o7777)
    return fd


def _open(place: Path) -> int:
    """Open a file beside the database to read and append, made where it is missing. Raises OSError."""
    try:
        return _create(place)
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
    """What `step` gives, tried for so many seconds while somebody saves the file or has the lock."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return step()
        except (Busy, BlockingIOError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.01)


def read(path: Path) -> Store:
    """Read the file; one that may be half saved is waited for."""
    return _patiently(File(path).read, PATIENCE)


def hold(path: Path, name: str, patience: float) -> TextIO:
    """Take the lock `.<database>.<name>` beside the file: "lock" to write, "pid" to be its only poller.

    It is on a file of its own that is never replaced; where somebody has removed that, another one is made.
    The kernel releases it when its process ends, however it ends. patience: seconds to wait; then Busy.
    """
    place = beside(path, name)
    try:
        while True:
            file = os.fdopen(_open(place), "r+")
            _patiently(functools.partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB), patience)
            if is_at(file, place):
                return file
            file.close()
    except BlockingIOError:
        with file:
            holder = f"process {file.readline().partition(' ')[0].strip() or 'unknown'}"
        if name == "pid":
            raise Busy(f"a poller for {path} is already running, as {holder}. One is enough.") from None
        raise Busy(f"{path} is being written by {holder}, which holds {place}. Try again.") from None
    except OSError as error:
        raise DatabaseError(f"cannot lock {place}: {error.strerror}. {advice(error, place)}") from None


@contextlib.contextmanager
def lock(path: Path, name: str, patience: float) -> Iterator[TextIO]:
    """Hold a lock for a while. Raises as `hold`."""
    with hold(path, name, patience) as file:
        try:
            yield file
        finally:  # explicitly: a child that was forked meanwhile shares the lock, and would keep it
            fcntl.flock(file, fcntl.LOCK_UN)


def is_at(file: TextIO, place: Path) -> bool:
    """Whether an open file still is the one of this name. Raises OSError."""
    return (version(file.fileno()) or ())[:2] == (version(place) or ())[:2]


def note(lock: TextIO, text: str = "") -> None:
    """Write into a held lock whose it is, and what the poller has to say to `db.py list`."""
    with contextlib.suppress(OSError):  # it is for people; the lock itself is the kernel's
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"{os.getpid()} {text}\n".encode(errors="backslashreplace"))


# --- the list of deliveries ------------------------------------------------------------------


class Deliveries:
    """`.database.json.delivered`: one line for each delivery, `<UTC> <task id> <file name>`.

    A file name of `-`: deliver it again. The last whole line about an order counts.
    """

    LINE = re.compile(rb"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (%b) (.+)\n" % TASK_ID.pattern.encode(), re.M)

    def __init__(self, database: Path) -> None:
        self.database, self.path = database, beside(database, "delivered")
        self.ids: set[str] = set()  # the `key` of each order that is listed
        self.again: set[str] = set()  # of each that is to be delivered again
        self.file: Version = None  # device and inode of what was read: another one is read anew
        self.end = 0  # up to which byte it was read
        self.writable = False  # whether it takes a line, as far as is known

    def refresh(self) -> None:
        """Read what was appended since; where that is not possible, say so once and go on without."""
        try:
            now = version(self.path)
            if self.file and not now:
                warn_once(f"{self.path} was taken away: what was delivered before counts as not delivered.")
            file, size = (now[:2], now[2]) if now else (None, 0)
            if file != self.file or size < self.end:
                self.ids, self.again = set(), set()
                self.file, self.end = file, 0
            if size > self.end:
                with self.path.open("rb") as lines:
                    lines.seek(self.end)
                    data = lines.read()
                self.end += data.rfind(b"\n") + 1
                for _, task_id, name in self.LINE.findall(data):
                    ends, begins = (self.ids, self.again) if name == b"-" else (self.again, self.ids)
                    ends.discard(order := key(task_id.decode()))
                    begins.add(order)
        except OSError as error:
            warn_once(f"cannot read {self.path}: {error.strerror}. Fix that: nothing counts as delivered.")

    def all(self) -> dict[str, tuple[str, str]]:
        """When (UTC) and as which file each order was delivered, by its `key`, the oldest first."""
        delivered: dict[str, tuple[str, str]] = {}
        with contextlib.suppress(OSError):
            for when, task_id, name in self.LINE.findall(self.path.read_bytes()):
                delivered.pop(order := key(task_id.decode()), None)
                if name != b"-":
                    delivered[order] = (when.decode(), name.decode("utf-8", "replace"))
        return delivered

    def prove(self, patience: float) -> None:
        """See that the list takes a line, by really writing an empty one, which is removed again.

        patience: seconds to wait for the lock. Raises DatabaseError.
        """
        with lock(self.database, "lock", patience):  # other programs append under it
            self.add({})

    def add(self, files: Mapping[str, str]) -> None:
        """List deliveries, task id to file name; when this returns they are on the disk.

        Raises DatabaseError; then they may be listed in part, and can be listed again.
        """
        lines = [f"{stamp()} {task_id} {name}\n" for task_id, name in files.items()]
        try:
            with os.fdopen(_open(self.path), "r+b", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    lines.insert(0, "\n")  # the line that was cut off stays apart
                rest = "".join(lines or ["\n"]).encode("utf-8", "backslashreplace")
                while rest:  # in one piece, but where the disk is just full
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                if not files:
                    file.truncate(size)
            if not size:
                sync_folder(self.path.parent)
            self.writable = True
        except OSError as error:
            self.writable = False
            what = f"cannot write {self.path}: {error.strerror}."
            raise DatabaseError(f"{what} {advice(error, self.path)}") from None
        self.refresh()

    def shorten(self) -> None:
        """Keep the newest KEPT lines where there are twice as many. Says where that is not possible."""
        try:
            with self.path.open("rb") as file:
                if sum(1 for _ in file) <= 2 * KEPT:
                    return
            with lock(self.database, "lock", PATIENCE):
                seen, lines = version(self.path), self.path.read_bytes().splitlines(keepends=True)
                _replace(self.path, b"".join(lines[-KEPT:]), seen)
        except FileNotFoundError:
            return
        except (DatabaseError, OSError) as error:
            warn_once(f"{self.path} cannot be shortened: {error}")


# --- what the poller's loop needs ------------------------------------------------------------


@dataclass
class _Unwritten:
    """What became of orders, and the file does not say yet. Times are monotonic seconds."""

    delivered: dict[str, str] = field(default_factory=dict)  # task id to file name, to be listed
    listed: set[str] = field(default_factory=set)  # to leave the file
    failed: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    failing: bool = False  # whether "failing" has to change
    pause: float = 0.0  # until when nothing is written
    busy: float = math.inf  # since when somebody else has been writing

    def ended(self) -> set[str]:
        return self.delivered.keys() | self.listed | self.failed.keys()

    def __bool__(self) -> bool:
        return bool(self.ended() or self.failing)


class Database:
    """`database.json` for the poller's loop: `sync` each turn, `flush` at the end.

    `delivered`, `failed`, `rejected` and `pending` say what became of an order; the next `sync` writes it:
    a delivery into the list first. A problem is logged once, and once when it is over.
    """

    def __init__(self, path: Path, prove: bool) -> None:
        self.file, self.deliveries = File(path), Deliveries(path)
        self.failing: dict[str, Fields] = {}  # the records of rejected orders, as they have to be in the file
        self.loaded = False  # whether the file was read
        self.problem = ""  # what is wrong with the file or the list just now
        self._unwritten = _Unwritten()
        self._known: set[str] = set()  # the orders that the loop knows
        self._look = 0.0  # when to look at the file again, in monotonic seconds
        self.deliveries.writable = not prove

    def delivered(self, task_id: str, file: str) -> None:
        """Its file is whole on the disk, and ON_DONE has run."""
        self._known.discard(task_id)
        self._unwritten.delivered[task_id] = file

    def failed(self, task_id: str, status: int | None, error: str) -> None:
        """It is not polled any more."""
        self._known.discard(task_id)
        self._unwritten.failed[task_id] = (status, error)

    def rejected(self, task_id: str, record: Fields) -> None:
        """It is retried, and the record stands under "failing" meanwhile."""
        self.failing[task_id], self._unwritten.failing = record, True

    def pending(self, task_id: str) -> None:
        """It is not rejected any more."""
        if self.failing.pop(task_id, None) is not None:
            self._unwritten.failing = True

    @property
    def settled(self) -> bool:
        """Whether the file has every failure."""
        return not self._unwritten.failed

    def sync(self, idle: bool) -> tuple[dict[str, Fields], set[str]]:
        """Write what is to be written, and look at what others changed: the new orders, and those gone.

        idle: nothing else is under way, so what is to be written need not wait for more.
        """
        now, unwritten, problem, store = time.monotonic(), self._unwritten, "", None
        if look := now >= self._look:
            self._look = now + LOOK
        if look and not self.loaded:
            self.deliveries.shorten()
        try:
            if look and not unwritten.delivered and not self.deliveries.writable:
                self.deliveries.prove(0.2 if self.loaded else PATIENCE)
            if look or not self.problem:
                self._list()
            if unwritten and now >= unwritten.pause and (look or (idle and not self.problem)):
                store = self._save()
        except Busy as error:
            unwritten.busy, unwritten.pause = min(unwritten.busy, now), time.monotonic() + 0.2
            if now >= unwritten.busy + PATIENCE:
                problem = str(error)
        except DatabaseError as error:
            problem = str(error)
        if look and not store and self.file.changed():
            try:
                store = self.file.read()
            except Busy:
                problem = problem or self.problem  # neither another one nor over
            except DatabaseError as error:
                if not unwritten:  # else the failed write is the problem that is reported
                    problem = str(error)
        if problem or (look and not self._unwritten):
            unwritten.busy = math.inf
            self._report(problem)
        return self._compare(store) if store else ({}, set())

    def flush(self, patience: float) -> int:
        """Try for so many seconds to write everything; returns how many results are not written."""
        if self._unwritten:
            try:
                self._list()
                _patiently(self._save, patience)
            except DatabaseError as error:
                self._report(str(error))
        return len(self._unwritten.ended()) + self._unwritten.failing

    def _report(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.error("%s", problem)
        elif self.problem and not problem:
            log.info("recovered: %s", self.problem)
        self.problem = problem

    def _list(self) -> None:
        """List deliveries, all with one fsync; from then on they are safe."""
        if delivered := self._unwritten.delivered:
            self.deliveries.add(delivered)
            self._unwritten.listed |= delivered.keys()
            delivered.clear()

    def _save(self) -> Store:
        """Let the file say what became of the orders."""
        begun = time.monotonic()
        try:
            store = change(self.file, self._edit, 0.2)
        finally:
            self._unwritten.pause = time.monotonic() + (SHARE - 1) * (time.monotonic() - begun)
        self._unwritten = _Unwritten(pause=self._unwritten.pause)
        return store

    def _edit(self, store: Store) -> None:
        store.take(self._listed_in(store))
        store.fail(self._unwritten.failed)
        store.set_failing({name: record for name, record in self.failing.items() if name in store.orders})

    def _listed_in(self, store: Store) -> set[str]:
        """The orders of the file that are delivered; says which of them somebody added again."""
        self.deliveries.refresh()  # after the file: `retry` writes to the list before it writes to the file
        listed = {store.ids[name] for name in store.ids.keys() & self.deliveries.ids}
        again, self._unwritten.listed = listed - self._unwritten.listed, listed
        if again:
            what = f"{len(again)} orders were" if len(again) > 1 else f"{again.pop()} was"
            # At the start perhaps nobody did that, but the process was killed before it could remove it.
            how = "re-added although delivered; removed again" if self.loaded else "delivered before; removed"
            log.warning("%s %s", what, how)
        return listed

    def _compare(self, store: Store) -> tuple[dict[str, Fields], set[str]]:
        """The orders that are new to the loop, and those that are gone; `store` loses the ended ones."""
        for task_id in self._listed_in(store) | store.named(self._unwritten.ended()):
            del store.orders[task_id]
        new = {task_id: fields for task_id, fields in store.orders.items() if task_id not in self._known}
        gone, self._known = self._known - store.orders.keys(), set(store.orders)
        first, self.loaded = not self.loaded, True
        records = store.failing if first else self.failing
        self.failing = {task_id: record for task_id, record in records.items() if task_id in store.orders}
        self._unwritten.failing = self.failing != store.failing  # others may have changed it
        if first:
            counts = f"{len(new) - len(self.failing)} pending, {len(self.failing)} rejected"
            log.info("%s, %d failed, %d delivered", counts, len(store.failed), len(self.deliveries.ids))
        for entry in store.strange:
            warn_once(f"no task id, left alone in the database: {entry}")
        return new, gone


# --- what other programs call ----------------------------------------------------------------


def beside_code(path: str | Path) -> Path:
    """A path of the settings, which is beside this file; a symbolic link stays one. Raises ValueError."""
    if str(path).startswith("~"):  # a service's home is another one's, or nobody's
        raise ValueError(f"is {path}: write the whole path, without ~")
    return Path(os.path.realpath(HERE / path))


def _real(path: Path | None) -> Path:
    """`path`, else DATABASE of the settings, wherever one calls from."""
    if path:
        return Path(os.path.realpath(path))
    try:
        return beside_code(settings().get("DATABASE", "database.json"))
    except ValueError as error:
        raise DatabaseError(f"DATABASE {error}") from None


def rewrite(path: Path) -> Store:
    """Write the file as it is, where there is one, to see that it can be written. Raises DatabaseError."""
    store = read(path)
    with lock(path, "lock", PATIENCE):
        if seen := version(path):
            _replace(path, path.read_bytes(), seen)
    return store


def edit(path: Path, how: Callable[[Store], None]) -> Store:
    """`change` for other programs, which wait where somebody saves the file or has the lock."""
    file = File(path)
    return _patiently(lambda: change(file, how, PATIENCE), PATIENCE)


def get_orders(path: Path | None = None) -> dict[str, Fields]:
    """The pending orders: task id to its fields (`projectID`, `added`, …)."""
    return read(_real(path)).orders


def add_order(task_id: str, project_id: str | None = None, path: Path | None = None) -> bool:
    """Add an order; when this returns it is on the disk. False where it is pending or was delivered.

    Raises ValueError for what is not a task id, and for a project id that is not a string.
    """
    if not is_task_id(task_id):
        raise ValueError(f"{task_id!r} is not a task id: letters, digits, '.', '_' and '-', at most 128")
    if not isinstance(project_id, (str, type(None))):
        raise ValueError(f"the project id {project_id!r} is not a string")
    path, new = _real(path), False
    deliveries = Deliveries(path)

    def add(store: Store) -> None:
        nonlocal new
        deliveries.refresh()
        new = key(task_id) not in store.ids and key(task_id) not in deliveries.ids
        if new:
            store.put(task_id, {"projectID": project_id} if project_id else {}, new=True)

    edit(path, add)
    return new


def remove_order(task_id: str, path: Path | None = None) -> None:
    """Remove an order, where it is pending."""
    edit(_real(path), lambda store: store.take([task_id]))


def retry_orders(
    task_id: str | None = None, path: Path | None = None, since: datetime | None = None
) -> list[str]:
    """Make an order pending again that failed or was delivered, or (None) all that failed; returns which.

    since: only those that failed since then.
    """
    path, moved, first = _real(path), list[str](), stamp(since) if since else ""

    def again(store: Store) -> None:
        failed, deliveries = store.failed, Deliveries(path)
        wanted = None if task_id is None else key(task_id)
        deliveries.refresh()
        named = [name for name in failed if is_task_id(name) and wanted in (None, key(name))]
        moved[:] = [name for name in named if str(failed[name].get("failed", "")) >= first]
        if task_id and not named:
            # To be delivered again, and not pending: an earlier try was interrupted.
            lost = wanted in deliveries.again and wanted not in store.ids
            moved.extend([task_id] * (lost or wanted in deliveries.ids))
        if listed := {name: "-" for name in moved if key(name) in deliveries.ids}:
            deliveries.add(listed)  # before it is pending, or the poller would remove it
        for name in moved:
            if name in failed:
                store.retry(name)
            elif key(name) not in store.ids:
                store.put(name, {}, new=True)
            store.changed = True  # also where it is pending already: so the running poller notices

    edit(path, again)
    return moved


# --- python db.py ----------------------------------------------------------------------------


def _show(name: str, orders: dict[str, Fields], *keys: str) -> None:
    print(f"{len(orders)} {name}")
    if orders:
        rows = [["order", *keys]]
        for task_id, fields in orders.items():
            rows.append([task_id, *(" ".join(str(fields.get(key, "")).split()) for key in keys)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), "", sep="\n")


def _list(path: Path) -> None:
    store, delivered = read(path), Deliveries(path).all()
    pending = {name: fields for name, fields in store.orders.items() if key(name) not in delivered}
    failing = {name: pending.pop(name) | said for name, said in store.failing.items() if name in pending}
    print(path)
    _show("pending", pending, "projectID", "added")
    _show("rejected, and retried", failing, "projectID", "since", "status", "error")
    _show("failed", store.failed, "projectID", "failed", "status", "error")
    with contextlib.suppress(OSError):
        if said := beside(path, "pid").read_text().partition(" ")[2].strip():
            print(f"the poller says: {said}")
    for item in store.strange:
        print(f"not an order, left alone: {item}")
    first = stamp(datetime.now(timezone.utc) - timedelta(days=1))
    count = sum(when >= first for when, _ in delivered.values())
    print(f"{count} delivered in the last 24 hours")
    for task_id, (when, name) in [*delivered.items()][-1:]:
        print(f"last delivery: {when} {task_id} {name}")


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
    elif delivered := Deliveries(path).all().get(key(given.task_id)):
        again = f"To deliver it again: python db.py retry {task_id}"
        raise ValueError(f"{task_id} was delivered at {delivered[0]}, as {delivered[1]}. {again}")
    else:
        print(f"{task_id} was pending already, in {path}")


def open_streams() -> None:
    """Let each standard stream take any text; where one was closed, no other file may take its place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    # Escape what a terminal cannot show.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def main() -> int:
    """`python db.py`. Exit code 0, or 1 with a message on stderr."""
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
    what.add_argument(
        "--since", metavar="UTC", type=utc, help="those that failed since then, as in 2026-01-31T12:00:00Z"
    )
    given = parser.parse_args()
    for name in (signal.SIGPIPE, signal.SIGINT):  # `db.py list | head` and Ctrl-C are no errors
        signal.signal(name, signal.SIG_DFL)
    try:
        _run(given)
        sys.stdout.flush()
    except (DatabaseError, ValueError, OSError) as error:
        print(f"db.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # no second try to flush what could not be written, say to a full disk
