"""Download the files of finished GraFx orders, from `database.json` to `./orders`.

    python poller.py             poll and deliver orders until SIGTERM or Ctrl-C
    python poller.py --once      poll each order once, for cron
    python poller.py --check     try settings, database, folder, token and GraFx

The loop is `Poller.run`. `chili.py` talks to GraFx; `db.py` reads and writes `database.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import fcntl
import heapq
import logging
import logging.handlers
import os
import queue
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import chili
import db

VERSION = "2026-11-26"
SHORTEST_PAUSE = 2.0  # seconds between two polls of one order; CHILI's own client also waits 2
LONGEST_PAUSE = 900.0  # seconds between two polls after a rejection that does not count
# Rejections before an order fails, with and without own_reason: see chili.TaskRejected.
OWN_REASON, PERHAPS_LIKE_ALL = 3, 20
MINUTE = 60.0  # seconds between similar retry warnings, and before a rejection of all orders is logged
ALARM = 600.0  # seconds before an outage, a rejection of all orders or a stall is logged as an error
WITNESSED = 600.0  # seconds for which the daemon itself must know an order before it fails
STALLED = 120.0  # seconds without progress before a poll or download is reported
FORGOTTEN = 7 * 86400.0  # seconds after which GraFx forgets a task
OUTPUT = 10_000_000  # bytes of a hook's output that are kept
NEVER = float("inf")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WAITING = "waiting for ON_DONE"  # the state of an order whose file is downloaded
STATES = ("delivered", "new", "rendering", "downloading", WAITING, "rejected", "failed", "retrying")
HIDDEN = ("SERVER_ID", "SERVER_SECRET", "SERVER_SECRET_FILE", "FRONT_ID", "FRONT_SECRET",
          "CREDENTIALS_DIRECTORY")  # fmt: skip

log = logging.getLogger("poller")
retry_log = logging.getLogger("poller.retry")  # rate limited, see OnceAMinute


# --- settings --------------------------------------------------------------------------------


class SettingsError(Exception):
    """Everything that is wrong with the settings, one line each, with what to do."""


def address(url: str) -> str:
    try:
        scheme, host, _ = chili.origin(chili.prepared(url))
        if set("?#@") & set(url):
            raise ValueError
    except ValueError:
        raise ValueError("is not a web address: write it as https://HOST") from None
    if host.startswith("environment.chili-publish"):
        raise ValueError("is still the example's: replace ENVIRONMENT with the name of your environment")
    if scheme == "http" and not re.fullmatch(r"localhost|127\.[0-9.]+|::1", host):
        raise ValueError("must begin with https://, or the token is sent unencrypted")
    return url.rstrip("/")


def number(least: float, most: float, kind: Callable[[str], Any] = float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise ValueError(f"is {text!r}: write a {'whole ' * (kind is int)}number from {least:g} to {most:g}")

    return read


def command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split into words ({error}): close its quotes") from None
    if words and "/" in words[0]:
        words[0] = str(db.HERE / words[0])
    if words and not shutil.which(words[0]):
        how = "install it, write its full path, or chmod +x it"
        raise ValueError(f"names {words[0]}, which cannot be run: {how}")
    return words


# A setting's name; how it is read; its default, or, if it is REQUIRED, a description for the error text.
# Each is also in README.md and .env.example; a secret is in HIDDEN, a command in `db.settings`, too.
READERS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("SERVER_ID", str, "the integration's client id"),
    ("SERVER_SECRET", str, "the integration's client secret"),
    ("BASEURL", address, "https://ENVIRONMENT.chili-publish.online"),
    ("ENVIRONMENT", str, "the environment's name, as in cp-abc-123,"),
    ("TOKEN_URL", address, "https://integration-login.chiligrafx.com/oauth/token"),
    ("POLL_INTERVAL", number(0.1, 3600), "60"),  # GraFx keeps a file for 4 hours
    ("GIVE_UP_AFTER", number(0, 604800), "3600"),  # GraFx forgets a task after 7 days
    ("CONCURRENCY", number(1, 64, int), "8"),
    ("DATABASE", db.beside_code, "database.json"),
    ("ORDERS_DIR", db.beside_code, "orders"),
    ("ON_DONE", command, ""),
    ("ON_DONE_TIMEOUT", number(1, 86400), "300"),
    ("ON_FAILED", command, ""),
)
NAMES = (*(name for name, _, _ in READERS), "SERVER_SECRET_FILE")
REQUIRED = ("SERVER_ID", "SERVER_SECRET", "BASEURL", "ENVIRONMENT")


def load_settings() -> SimpleNamespace:
    """The settings in READERS, each under its name in lower case, and `grafx`, the client that uses them.

    Raises SettingsError with everything that is wrong; DatabaseError if `.env` cannot be read.
    """
    wrong: list[str] = []
    settings = SimpleNamespace()
    try:
        given = db.settings(NAMES)
        if secret_file := given.get("SERVER_SECRET_FILE"):
            if "SERVER_SECRET" in given:
                raise ValueError("SERVER_SECRET is set as well: remove one of them")
            given["SERVER_SECRET"] = db.beside_code(secret_file).read_text("utf-8-sig").strip()
            if not given["SERVER_SECRET"]:
                raise ValueError("it is empty: write the secret into it")
    except OSError as error:  # without its path: perhaps somebody wrote the secret itself there
        how = "It must be the path of a readable file with the secret."
        raise SettingsError(f"SERVER_SECRET_FILE cannot be read: {error.strerror}. {how}") from None
    except ValueError as error:  # also if it is not UTF-8
        raise SettingsError(f"SERVER_SECRET_FILE: {error}") from None
    if not set(REQUIRED) & given.keys() and not db.env_file().exists():
        how = f"in {db.HERE}, cp .env.example .env, and fill in its four lines"
        raise SettingsError(f"no settings yet: {how}")
    for name, read, default in READERS:
        try:
            if name in REQUIRED and not given.get(name):
                raise ValueError(f"is missing: put {default} into {db.env_file()} or the environment")
            setattr(settings, name.lower(), read(given.get(name, default)))
        except ValueError as error:
            wrong.append(f"{name} {error}")
    if wrong:
        raise SettingsError("\n".join(wrong))
    warn_about_env(given)
    credentials = settings.token_url, settings.server_id, settings.server_secret
    settings.grafx = chili.GraFx(settings.baseurl, settings.environment, *credentials)
    return settings


def warn_about_env(given: dict[str, str]) -> None:
    """Warn about lines in `.env` that have no effect but look as if they should."""
    for name, _, original, error in db.env_lines():
        place = f"{db.env_file()}, line {original.line + original.string[:-1].count(chr(10))}"
        meant = difflib.get_close_matches((name or "").upper(), set(NAMES) - given.keys(), 1, 0.85)
        if error:
            log.warning("%s: cannot be parsed, so it is ignored", place)
        elif meant and name not in NAMES:
            log.warning("%s: unknown setting %s is ignored; did you mean %s?", place, name, meant[0])


def sources() -> str:
    """Where each setting comes from; with both values (unless secret) if the environment overrides `.env`."""
    file = {name: value for name, value, _, _ in db.env_lines() if value}
    found: dict[str, list[str]] = {"the environment": [], ".env": []}
    for name in NAMES:
        outer, inner, both = os.environ.get(name), file.get(name), ""
        if outer and inner and outer != inner:
            secret = "SECRET" in name or name in ("SERVER_ID", "ON_DONE", "ON_FAILED")
            both = " (.env has another one)" if secret else f" ({outer}, not {inner})"
        if outer or inner:
            found["the environment" if outer else ".env"].append(name + both)
    return "; ".join(f"from {place}: {', '.join(names)}" for place, names in found.items() if names)


class CannotWrite(chili.TryAgainLater):
    """No file can be written to ORDERS_DIR."""


def disk_error(folder: Path, error: OSError) -> chili.TryAgainLater:
    """The error to raise: CannotWrite, unless another file can be written; then it concerns one order."""
    text = f"cannot write to {folder}: {error.strerror}. {db.advice(error, folder)}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
            return chili.TryAgainLater(text)
    return CannotWrite(text, shared=True)


def prepare_folder(orders_dir: Path) -> Path:
    """Create the folder if it is missing; check that it is writable. Raises CannotWrite, TryAgainLater."""
    try:
        if not orders_dir.is_dir():
            orders_dir.mkdir()
            db.sync_folder(orders_dir.parent)
        tempfile.TemporaryFile(dir=orders_dir).close()
        return orders_dir
    except OSError as error:
        raise disk_error(orders_dir, error) from None


class Claim:
    """The locks that make this the only poller of its database and of its folder."""

    def __init__(self, database: Path, folder: Path) -> None:
        self.database, self.folder = database, folder
        self.locks: dict[Path, TextIO] = {}
        self.complete = False
        self.look = 0.0  # when to check the locks again, in monotonic seconds

    def take(self) -> None:
        """Take the locks that are not held: not taken yet, or lost because their file was removed.

        Raises Busy if another poller has one; DatabaseError, CannotWrite if a disk is missing.
        """
        self.look = time.monotonic() + db.LOOK
        self.lock(db.beside(self.database, "pid"), f"a poller for {self.database} is already running")
        if not self.complete:
            prepare_folder(self.folder)
        try:  # else a poller of another database could remove this one's partial downloads
            busy = f"another poller writes to {self.folder}: give each its own ORDERS_DIR"
            self.lock(self.folder / ".poller.pid", busy)
        except db.DatabaseError as error:
            if self.complete or isinstance(error, db.Busy):
                raise
            db.warn_once(f"{error} Two pollers with this folder would not be noticed.")
        if not self.complete:
            chili.remove_leftovers(self.folder)  # no other poller writes here now
            self.complete = True

    def lock(self, place: Path, busy: str) -> None:
        if place not in self.locks or not db.is_at(self.locks[place], place):
            self.locks[place] = db.hold(place, busy)
            db.note(self.locks[place])


# --- the log and the live line ---------------------------------------------------------------


class OnceAMinute(logging.Filter):
    """Passes one message of each kind and level a minute, with the number of those held back."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: dict[str, float] = {}  # kind to when one last passed, in monotonic seconds
        self.held: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        now, text = time.monotonic(), record.getMessage()
        kind = record.levelname + re.sub(r"[\w-]*\d[\w.:-]*", "#", text)  # without ids and numbers
        if now < self.passed.get(kind, -MINUTE) + MINUTE:
            self.held[kind] += 1
            return False
        self.passed[kind] = now
        if held := self.held.pop(kind, 0):
            record.msg, record.args = f"{text} (and {held} more like it since the last one)", ()
        if len(self.passed) > 1000:  # servers may say something new each time, for years
            self.passed = {kind: when for kind, when in self.passed.items() if now < when + MINUTE}
            self.held = Counter({kind: held for kind, held in self.held.items() if kind in self.passed})
        return True


class Screen(logging.StreamHandler):  # type: ignore[type-arg]  # not generic in 3.10
    """The log on stderr: in a terminal with a live line below it, under systemd with the journal's levels.

    It is written in a thread, so that a full pipe or Ctrl-S delays neither a delivery nor a stop.
    """

    def __init__(self, verbose: bool) -> None:
        super().__init__(sys.stderr)
        self.terminal = sys.stderr.isatty()
        self.pause = min(db.LOOK, 0.2) if self.terminal else db.LOOK  # seconds between two reports
        self.live = self.drawn = ""  # the live line to show, and as it was last drawn
        stat = os.fstat(2)  # systemd.exec(5): how to detect that stderr is the journal
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
        stamp = "" if self.journal else "%(asctime)s %(levelname)-7s "
        self.setFormatter(logging.Formatter(stamp + "%(message)s", "%Y-%m-%d %H:%M:%S"))
        self.queue: queue.Queue[Any] = queue.Queue(10_000)
        self.listener = logging.handlers.QueueListener(self.queue, self)
        self.listener.start()
        logging.getLogger().addHandler(logging.handlers.QueueHandler(self.queue))
        for name in ("poller", "chili", "db"):
            logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs full URLs, with signatures
        logging.raiseExceptions = False  # a log that cannot be written must not cause errors
        retry_log.addFilter(OnceAMinute())

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self.journal:  # sd-daemon(3): each line needs a level, or a traceback would lose it
            level = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            return "\n".join(f"<{level}>{line}" for line in text.splitlines())
        return text

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "redraw"):
            self.draw("")
            super().emit(record)
        self.draw(self.live)

    def show(self, line: str) -> None:
        self.live = line
        if self.terminal and self.queue.empty():  # else the next record draws it
            self.queue.put_nowait(logging.makeLogRecord({"redraw": True}))

    def draw(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it is not a terminal, or is gone
            width = os.get_terminal_size(2).columns or 80
            if line[: width - 1] == self.drawn:
                return
            self.drawn = line[: width - 1]
            # ?7l, ?7h: no wrapping, even of characters that are two columns wide. The cursor returns to the
            # start, so that all of the line is erased, even after ^C or in a terminal made narrower.
            self.stream.write(f"\r\x1b[J\x1b[?7l{self.drawn}\x1b[?7h\r")
            self.stream.flush()

    def gone(self) -> bool:
        """Whether nobody can read the log any more: journald was stopped, or a pipe's reader is gone."""
        descriptor = select.poll()
        descriptor.register(2, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in descriptor.poll(0))

    def finish(self) -> None:
        """Write what is in the queue, but wait at most half a second for a slow reader."""
        self.show("")
        stop = threading.Thread(target=self.listener.stop, daemon=True)
        stop.start()
        stop.join(0.5)


def notify(state: str) -> None:
    """Notify systemd, if it set $NOTIFY_SOCKET, with one datagram; see sd_notify(3)."""
    if place := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(errors="replace"), re.sub("^@", "\0", place))  # @: an abstract socket


def duration(seconds: float) -> str:
    """Format seconds, such as "4.7 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{round(seconds, 1):g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def in_project(project: Any) -> str:
    return f" (project {chili.sanitize(project)})" if project else ""


def clause(error: BaseException) -> str:
    """An error's text, after which the sentence goes on."""
    return str(error).rstrip(".")


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- the orders ------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Order:
    """A pending order. Times are monotonic seconds, except `added`."""

    task_id: str
    added: float  # seconds since 1970; infinity if the file does not say
    seen: float  # when this process first saw it
    project: Any = None  # "projectID" in the file, of any type
    state: str = "new"  # rendering, rejected, retrying, waiting for ON_DONE, delivered, failed
    alarm: float = 0.0  # when to log a problem as an error; infinity if it was
    times: int = 0  # consecutive polls that ended in this state; rejected and retrying count as one
    problem: str = ""  # why it could not be polled or delivered
    due: float = 0.0  # when to poll it next; infinity while it is being polled
    polled: float = 0.0  # when the last poll began
    handled: float = 0.0  # when the result of the last poll was handled
    rejected_since: float = 0.0  # perhaps before this process started; 0: it is not rejected
    rejections: int = 0  # the rejections that count, see Poller.rejected
    last_progress: float = 0.0  # when its poll or download last made progress; infinity while ON_DONE runs
    size: int = 0  # bytes of its file received in this poll
    download: str = ""  # the progress as text, while it is being downloaded

    @property
    def age(self) -> float:
        """Seconds since it was added; at least those since `seen`, even if the clock was set back."""
        return max(time.monotonic() - self.seen, time.time() - self.added)

    @property
    def doing(self) -> str:
        """Its state, or what its poll is doing now."""
        if self.download:
            return "downloading"
        return WAITING if self.last_progress == NEVER else self.state

    def enter(self, state: str, problem: str = "") -> None:
        """The only place that changes the state. The back-off depends on `times`."""
        if state != self.state or not self.times:
            self.alarm = time.monotonic() + ALARM
            if not {state, self.state} <= {"rejected", "retrying"}:  # a gateway may alternate between them
                self.times = 0
        self.state, self.problem, self.times = state, problem, self.times + 1

    def progress(self, size: int, total: int | None) -> None:
        """Called by the download for each piece."""
        self.last_progress = time.monotonic()
        speed = size / max(0.001, self.last_progress - self.polled)
        share = f"{100 * size // total}% of {chili.format_size(total)}" if total else chili.format_size(size)
        self.size, self.download = size, f"{share}, {chili.format_size(speed)}/s"


def epoch(when: Any) -> float:
    """A time from the file in seconds since 1970; infinity if it is not a valid time."""
    seconds = NEVER
    with contextlib.suppress(ValueError, OverflowError):
        seconds = db.utc(str(when)).timestamp()
    return seconds if seconds >= 0 else NEVER


def backoff(times: int, longest: float) -> float:
    """The pause after `times` equal results: 2 s, 4 s, 8 s, … up to `longest`."""
    return min(longest, SHORTEST_PAUSE * 2.0 ** min(times - 1, 20))


class Outage:
    """A failure that affects every order, and until when none is polled. Times are monotonic seconds."""

    def __init__(self, longest: float) -> None:
        self.longest = longest  # the most seconds between two tries
        self.error: BaseException | None = None
        self.since = self.until = 0.0  # when it began; when to try again
        self.said: set[str] = set()  # what was logged about it
        self.quiet = 0.0  # until when a new outage is not logged
        self.limited = 0.0  # until when Retry-After forbids requests

    def begin(self, error: BaseException) -> None:
        """Start the outage, or note that it continues."""
        now = time.monotonic()
        # Without any try for so long, the last one has ended unnoticed: perhaps its only order was removed.
        if self.error is None or now >= self.until + ALARM:
            self.since, self.said = now, set()
        self.error = error
        if now >= self.until:  # 2 s, 4 s, 8 s, …: the pause grows with its duration
            self.until = now + min(self.longest, SHORTEST_PAUSE + now - self.since)
        if str(error) not in self.said and now >= self.quiet:
            level = logging.ERROR if isinstance(error, chili.CredentialsRejected) else logging.WARNING
            log.log(level, "paused: %s; retrying in %s", clause(error), duration(self.until - now))
            self.said.add(str(error))
        if "" not in self.said and now >= self.since + ALARM:
            log.error("paused for %s: %s", duration(now - self.since), error)
            self.said.add("")

    def end(self) -> bool:
        """End the outage. Returns whether there was one."""
        now, was = time.monotonic(), self.error
        if was and self.said:
            log.info("resumed after %s", duration(now - self.since))
            self.quiet = now + MINUTE
        self.error, self.until = None, 0.0
        return was is not None

    def pause(self) -> float:
        """Seconds until an order may be polled."""
        return max(0.0, max(self.until, self.limited) - time.monotonic())


class Evidence:
    """Decides whether GraFx rejects one order or all of them. Times are monotonic seconds.

    A 404 may be a maintenance page, or come from a wrong ENVIRONMENT. So it counts against its order only
    if another order's file came meanwhile. If no poll gets a good answer for a minute, that is logged.
    """

    def __init__(self) -> None:
        self.last_file = 0.0  # when the last complete file came
        self.answered = False  # whether any poll ever got a good answer
        self.since = NEVER  # since when none has; NEVER: the last answer was good
        self.error = chili.TaskRejected("", None)  # the last rejection that may concern all orders
        self.problem, self.level = "", 0  # what was logged, and with which level
        self.ended = -NEVER  # when the last logged problem ended
        self.unjudged: list[tuple[Order, chili.TaskRejected]] = []  # with `once`, for `judge`

    def good(self) -> bool:
        """A poll got a good answer. Returns whether that ends a logged problem."""
        over, self.answered = bool(self.problem), True
        if over:
            self.ended = time.monotonic()
            log.info("resumed after %s", duration(self.ended - self.since))
        self.problem, self.level, self.since = "", 0, NEVER
        return over

    def bad(self, order: Order, error: chili.TaskRejected) -> None:
        """An order got a rejection that may concern all orders."""
        self.error = error
        reported = order.rejected_since and order.rejected_since < self.ended
        if self.since == NEVER and not reported:  # an order is not reported twice
            self.since = order.polled

    def report(self, orders: Iterable[Order], patience: float) -> None:
        """If no poll got a good answer for `patience` seconds, log that; after ALARM, as an error."""
        if time.monotonic() >= self.since + patience:
            rejected = [order for order in orders if order.rejected_since and order.polled >= self.since]
            if rejected:
                self.say(len(rejected))
            else:  # they have failed, or were removed: nothing has resumed
                self.problem, self.level, self.since = "", 0, NEVER

    def say(self, number: int) -> None:
        error, status = self.error, self.error.status
        whom = {1: "the only order", 2: "both orders"}.get(number, f"all {number} orders")
        what = f"{status} without a file to {whom} ({error})" if status == 200 else f"{status} to {whom}"
        self.problem = f"GraFx answers {what}: check ENVIRONMENT and the integration's permissions"
        level = logging.ERROR if time.monotonic() >= self.since + ALARM else logging.WARNING
        if level > self.level:
            log.log(level, "%s", self.problem)
        self.level = level


# --- ON_DONE ---------------------------------------------------------------------------------


class HookFailed(chili.TryAgainLater):
    """ON_DONE or ON_FAILED did not run, or did not end with 0."""


class Hook:
    """A command from the settings, ON_DONE or ON_FAILED, which runs in its own session."""

    def __init__(self, name: str, words: list[str], timeout: float) -> None:
        self.name, self.words, self.timeout = name, words, timeout
        self.running: set[Order] = set()
        self.stopping = False

    def run(self, order: Order, file: Path | None = None, **more: str) -> None:
        """Run the hook for an order. Raises HookFailed unless it ends by itself, with 0."""
        project = chili.sanitize(order.project or "")
        words, more = self.words, {"TASK_ID": order.task_id, "PROJECT_ID": project, **more}
        # In bytes, so that the locale's encoding does not matter.
        env = {name: value for name, value in os.environb.items() if name.decode("latin-1") not in HIDDEN}
        env |= {name.encode(): value.encode(errors="replace") for name, value in more.items()}
        if file:
            env[b"ORDER_FILE"] = os.fsencode(file)
            words = words if any("{}" in word for word in words) else [*words, "{}"]
            words = [word.replace("{}", str(file)) for word in words]
        self.running.add(order)  # before `stopping` is read: either `stop` waits for it, or it does not start
        try:
            with tempfile.TemporaryFile() as output:  # not a pipe: its children could keep that open
                fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)  # so that it can be truncated
                wrong = self.execute(words, env, output)
                output.seek(max(0, output.seek(0, os.SEEK_END) - 10_000))
                text = output.read().decode(errors="replace")
        except (OSError, ValueError) as error:  # e.g. no space for its output
            raise HookFailed(f"{self.name}: {error}") from None
        finally:
            self.running.discard(order)
        lines = list(filter(None, map(chili.sanitize, text.splitlines())))[-10:]
        for line in lines[:-1] if wrong else lines:  # the last line is in the error
            (retry_log if wrong else log).info("%s %s: %s", order.task_id, self.name, line)
        if wrong:
            raise HookFailed(": ".join((f"{self.name} {wrong}", *lines[-1:])))

    def execute(self, words: list[str], env: dict[bytes, bytes], output: Any) -> str:
        """Run a command; end it at its timeout, or when the poller stops. Returns what is wrong, else ""."""
        if self.stopping:
            return "was not run, because the poller is stopping"
        process = subprocess.Popen(  # noqa: S603 - no shell, and the user set the command
            words,
            env=env,
            cwd=db.HERE,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        deadline, why = time.monotonic() + self.timeout, ""
        try:
            while process.poll() is None:
                if os.fstat(output.fileno()).st_size > OUTPUT:  # only while it runs
                    output.truncate(0)
                if self.stopping and not why:
                    deadline, why = time.monotonic() + 0.8, "was ended because the poller is stopping"
                    signal_session(process.pid, signal.SIGTERM)
                if time.monotonic() >= deadline:
                    deadline, why = time.monotonic() + 1.0, why or f"took longer than {self.timeout:g} s"
                    signal_session(process.pid, signal.SIGKILL)
                time.sleep(0.05)
        finally:
            if why or process.returncode != 0:  # else its children would run alongside the retry
                signal_session(process.pid, signal.SIGKILL)
            process.wait()
        code = process.returncode
        if code < 0:
            why = why or f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return why or (f"exited with code {code}" if code else "")

    def stop(self) -> None:
        """End all running hooks, whose exit codes are then ignored, and start no more."""
        self.stopping = True
        deadline = time.monotonic() + 5.0
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)


class OnFailed(Hook):
    """ON_FAILED: at most once for each failed order, one at a time, in its own thread."""

    def __init__(self, words: list[str], timeout: float) -> None:
        super().__init__("ON_FAILED", words, timeout)
        self.failures: list[tuple[Order, chili.TaskRejected]] = []  # those it has not run for yet
        self.pool = ThreadPoolExecutor(1)

    def run_for_all(self) -> None:
        """Queue it for each of `failures`; they are in `running` from now on."""
        for order, error in self.failures:
            self.running.add(order)  # so that `is_done` waits for it
            self.pool.submit(self.run_once, order, error)
        self.failures = []

    def run_once(self, order: Order, error: chili.TaskRejected) -> None:
        """Runs in a thread. If the hook fails, that is logged, and it is not run again."""
        try:
            self.run(order, STATUS=str(error.status or ""), ERROR=str(error))
        except HookFailed as wrong:
            log.error("%s %s; it is not run again", order.task_id, wrong)


def signal_session(leader: int, how: int) -> None:
    """Signal a hook and everything it started. While any of that lives, its session has the hook's id."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, how)  # the only way without /proc
    for stat in Path("/proc").glob("[0-9]*/stat"):  # proc(5): field 6 is the session
        with contextlib.suppress(OSError):
            if stat.read_text(errors="replace").rpartition(")")[2].split()[3] == str(leader):
                os.kill(int(stat.parent.name), how)


# --- the loop --------------------------------------------------------------------------------


class Poller:
    """The poll loop, with one method for each result.

    All state belongs to the loop's thread, but for the progress of an order while a thread polls it. A
    pending order is in `orders`, and in `queue` or `polling`. One that has ended is a result in `database`.
    """

    def __init__(self, settings: SimpleNamespace, screen: Screen) -> None:
        self.settings = settings
        self.token: chili.DangerousToken = settings.grafx.token
        self.database = db.Database(settings.database, check_writable=bool(settings.on_done))
        self.orders: dict[str, Order] = {}
        self.queue: list[tuple[float, str]] = []  # a heap; an entry is stale if its order's `due` differs
        self.polling: dict[Future[Any], Order | None] = {}  # None: the first token request
        self.results: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(settings.concurrency)
        self.outage, self.evidence = Outage(settings.poll_interval), Evidence()
        self.hook = Hook("ON_DONE", settings.on_done, settings.on_done_timeout)
        self.on_failed = OnFailed(settings.on_failed, settings.on_done_timeout)
        self.status = Status(screen)
        self.claim = Claim(settings.database, settings.orders_dir)
        self.exit_code: int | None = None  # set when a stop was requested
        what = settings.database, settings.baseurl, settings.environment, settings.orders_dir
        log.info("GraFx order poller %s: %s, %s, environment %s, files to %s", VERSION, *what)
        handle_stop_signals(self.on_signal)

    def run(self) -> int:
        """Poll until a signal, or with `once` until each order was polled. Returns the exit code."""
        while True:
            if self.settings.once and self.is_done():
                self.judge()  # then orders that failed must be written, and ON_FAILED run
            if self.exit_code is not None or (self.settings.once and self.is_done()):
                return self.stop()
            if self.prepare():
                self.sync_orders()
                self.poll_due_orders()
            self.handle_results()
            self.status.report(self)

    def is_done(self) -> bool:
        """With `once`: whether to stop. It does not wait for an outage to end or a database to be fixed."""
        hooks = self.on_failed.running or (self.on_failed.failures and not self.database.problem)
        if self.polling or hooks:
            return False
        if self.outage.error or self.outage.pause() > 0:  # a downloaded file does not need GraFx
            return all(order.state != WAITING for order in self.orders.values())
        if not self.database.loaded:
            return bool(self.database.problem)
        return self.token.issued and not self.orders

    def on_signal(self, *_: object) -> None:
        """Only set a flag and wake the loop: a signal may interrupt anything."""
        self.exit_code = self.exit_code or 0
        self.results.put(None)

    def prepare(self) -> bool:
        """Whether this is the only poller here. If a disk is not there yet, wait for it."""
        if time.monotonic() >= self.claim.look:
            try:
                self.claim.take()
            except db.Busy as error:
                log.error("%s", error)
                self.exit_code = 1
                return False
            except (db.DatabaseError, chili.TryAgainLater, OSError) as error:
                if not self.claim.complete:  # the first token ends this outage
                    self.outage.begin(error)
        return self.claim.complete

    def sync_orders(self) -> None:
        """Write the results; apply what others changed in the file."""
        first = not self.database.loaded
        idle = not self.polling and self.next_due() > time.monotonic()
        pending = self.database.sync(idle)
        if self.database.failures_written:  # else it could run twice for an order not yet under "failed"
            self.on_failed.run_for_all()
        if pending is None or (self.settings.once and not first):
            return
        new = [task_id for task_id in pending if task_id not in self.orders]
        gone = self.orders.keys() - pending.keys()
        for task_id in new:
            self.add(task_id, pending[task_id])
        for task_id, fields in pending.items():
            self.orders[task_id].project = fields.get("projectID")
        for task_id in gone:
            del self.orders[task_id]
        if first:
            return
        added = [f"{task_id} added{in_project(self.orders[task_id].project)}" for task_id in new]
        removed = [f"{task_id} removed from the file" for task_id in gone]
        for lines, what in ((added, "orders added"), (removed, "orders removed from the file")):
            for line in lines if len(lines) <= 5 else [f"{len(lines)} {what}"]:
                log.info("%s", line)

    def add(self, task_id: str, fields: db.Fields) -> None:
        """Add an order from the file; if an earlier process saw it rejected, that time still counts."""
        for order in self.polling.values():
            if order and db.key(order.task_id) == db.key(task_id):  # removed and re-added during its poll
                order.task_id, self.orders[task_id] = task_id, order
                return
        now = time.monotonic()
        order = Order(task_id, epoch(fields.get("added")), now, handled=now)
        if record := self.database.failing.get(task_id):
            order.state, since, times = "rejected", epoch(record.get("since")), record.get("times")
            order.added = min(order.added, since)  # if the file does not say when it was added
            order.rejected_since = min(now, now - time.time() + since)  # at most now, whatever `since` says
            if self.settings.once and isinstance(times, int):  # the daemon does not write each rejection
                order.rejections = times
        if chili.find_file(self.settings.orders_dir, task_id):
            order.state = WAITING
        self.orders[task_id] = order
        self.requeue(order, 0.0)

    def requeue(self, order: Order, pause: float) -> None:
        """Re-queue an order, to be polled in `pause` seconds."""
        order.due = time.monotonic() + pause
        heapq.heappush(self.queue, (order.due, order.task_id))  # stale if it was removed meanwhile

    def next_due(self) -> float:
        """When the next order is due, in monotonic seconds."""
        while self.queue:
            due, task_id = self.queue[0]
            if task_id in self.orders and self.orders[task_id].due == due:
                return due
            heapq.heappop(self.queue)
        return NEVER

    def poll_due_orders(self) -> None:
        """Submit due orders to the threads, at most CONCURRENCY at once."""
        now, paused = time.monotonic(), self.outage.pause() > 0
        if not self.token.issued and not paused and None not in self.polling.values():
            self.submit(None)  # to check the credentials at once
        if paused or not self.token.issued:  # a downloaded file does not need GraFx
            here = [order for order in self.orders.values() if order.state == WAITING and order.due <= now]
            for order in here[: max(0, self.settings.concurrency - len(self.polling))]:
                self.submit(order)
            return
        while len(self.polling) < self.settings.concurrency and self.next_due() <= now:
            self.submit(self.orders[heapq.heappop(self.queue)[1]])

    def submit(self, order: Order | None) -> None:
        """Let a thread poll an order, or fetch the first token (None). The result comes back in `results`."""
        if order:
            log.debug("%s polled%s", order.task_id, in_project(order.project))
            order.polled = order.last_progress = time.monotonic()
            order.due = NEVER
        future = self.pool.submit(self.poll, order) if order else self.pool.submit(self.token.get)
        self.polling[future] = order
        future.add_done_callback(self.results.put)

    def poll(self, order: Order) -> Path | None:
        """Runs in a thread: `chili.order_done`, then ON_DONE if it is set. None while the task renders."""
        folder = self.settings.orders_dir
        try:
            file = chili.order_done(order.task_id, self.settings.grafx, folder, order.progress)
            if file:  # even if it was already here: a process may have been killed after its rename
                db.sync_folder(folder)
        except OSError as error:
            raise disk_error(folder, error) from None
        order.download = ""
        if file and self.hook.words:
            order.last_progress = NEVER
            if not self.database.deliveries.writable:  # else it would run again after each restart
                raise HookFailed("waiting to run ON_DONE until the list of deliveries can be written")
            if not file.is_file():
                gone = "its file was taken out of orders before ON_DONE could run"
                # If something takes each new file, retries are useless.
                raise chili.TaskRejected(gone, 200, final=True) if order.size else HookFailed(gone)
            self.hook.run(order, file)
        return file

    def handle_results(self) -> None:
        """Wait for a result, at most until the next order or report is due; then handle all results."""
        seconds = self.status.screen.pause
        if self.token.issued and len(self.polling) < self.settings.concurrency:
            seconds = min(seconds, max(self.next_due() - time.monotonic(), self.outage.pause()))
        with contextlib.suppress(queue.Empty):
            while True:
                if future := self.results.get(timeout=max(0.0, seconds)):
                    self.handle(self.polling.pop(future), future)
                seconds = 0.0

    def handle(self, order: Order | None, future: Future[Any]) -> None:
        """Handle the result of a poll, or of the first token request (None)."""
        error = future.exception()
        if error and not isinstance(error, (chili.TaskRejected, chili.TryAgainLater)):
            what = order.task_id if order else "the token:"
            retry_log.error("%s unexpected error, please report it", what, exc_info=error)
            error = chili.TryAgainLater(f"unexpected {type(error).__name__}")
        if isinstance(error, chili.TryAgainLater) and error.retry_after:
            retry_log.warning("rate limited: Retry-After %.0f s", error.retry_after)
            self.outage.limited = max(self.outage.limited, time.monotonic() + error.retry_after)
        if order:
            self.handle_order(order, None if error else future.result(), error)
        elif isinstance(error, chili.CredentialsRejected):
            log.error("%s", error)
            self.exit_code = os.EX_CONFIG
        elif not error:
            self.outage.end()
        elif self.exit_code is None:
            self.outage.begin(error)

    def handle_order(self, order: Order, file: Path | None, error: BaseException | None) -> None:
        """Handle the result of an order's poll: its file, an error, or neither."""
        here = file is not None or isinstance(error, HookFailed)
        came = here and order.size > 0  # this poll downloaded it, even if ON_DONE failed then
        over = self.learn(order, error, here, came)
        if self.settings.once:  # it was polled; it stays in database.json
            self.orders.pop(order.task_id, None)
        if order.age > FORGOTTEN and not here:
            error = forgotten(error)
        if isinstance(error, chili.TaskRejected):
            if self.settings.once and not error.own_reason:
                self.evidence.unjudged.append((order, error))
                return
            self.rejected(order, error)
        elif isinstance(error, chili.TryAgainLater):
            self.retry_later(order, error)
        elif file:
            self.delivered(order, file)
        else:
            self.pending(order)
        order.size, order.download, order.handled = 0, "", time.monotonic()
        self.status.results[order.state] += 1
        if over or came:  # rejected orders no longer need their long pauses
            pause = 0.0 if over else self.settings.poll_interval
            for waiting in map(self.orders.get, [*self.database.failing]):
                if waiting and order.handled + pause < waiting.due < NEVER:
                    self.requeue(waiting, pause)

    def learn(self, order: Order, error: BaseException | None, here: bool, came: bool) -> bool:
        """Note what a poll shows about GraFx and the disk. Returns whether a problem with them has ended.

        Any answer ends an outage that began before its poll, unless it affects all orders. A file that was
        here before says nothing; only a new one, which `came`, shows that the disk is writable.
        """
        answered = came or not (here or getattr(error, "shared", False))
        fine = came if isinstance(self.outage.error, CannotWrite) else answered
        over = fine and order.polled >= self.outage.since and self.outage.end()
        if came:
            self.evidence.last_file = time.monotonic()
        if came or not (here or error) or getattr(error, "own_reason", False):  # from GraFx itself
            over = self.evidence.good() or over
        elif isinstance(error, chili.TaskRejected):
            self.evidence.bad(order, error)
        return over

    def delivered(self, order: Order, file: Path) -> None:
        """The file is complete and on the disk, and ON_DONE has succeeded: remove it from database.json."""
        order.enter("delivered")
        self.orders.pop(order.task_id, None)  # it may have been removed meanwhile
        self.database.delivered(order.task_id, file.name)
        self.status.last = f"last delivery {time.strftime('%H:%M:%S')}"
        size = chili.format_size(order.size) if order.size else "downloaded before"
        place, took = f"{file.parent.name}/{file.name}", duration(order.age)
        log.info("%s delivered to %s (%s, %s after it was added)", order.task_id, place, size, took)

    def pending(self, order: Order) -> None:
        """202 or 204: GraFx is rendering the order."""
        order.enter("rendering")
        self.clear(order)
        # So a file is noticed after a quarter of its render time at most, with few polls of a long one.
        self.requeue(order, min(self.settings.poll_interval, max(SHORTEST_PAUSE, order.age / 4)))

    def clear(self, order: Order) -> None:
        """The order is no longer rejected: it is rendering, or its file is here."""
        order.rejected_since, order.rejections = 0.0, 0
        self.database.pending(order.task_id)

    def rejected(self, order: Order, error: chili.TaskRejected) -> None:
        """GraFx rejected the order. It fails after enough rejections that count, and GIVE_UP_AFTER."""
        now, first = time.monotonic(), not order.rejected_since
        order.rejected_since = order.rejected_since or now
        order.enter("rejected")
        # What may concern all orders counts only if another order's file came since this order's last poll.
        counts = error.own_reason or self.evidence.last_file > order.handled
        order.rejections += counts
        enough = order.rejections >= (OWN_REASON if error.own_reason else PERHAPS_LIKE_ALL)
        end = order.rejected_since + self.settings.give_up_after
        if not self.settings.once:  # an old record alone must not make it fail at startup
            end = max(end, order.seen + min(WITNESSED, self.settings.give_up_after))
        left = max(0.0, end - now)
        if error.final or (enough and not left):
            self.failed(order, error)
            return
        if first:
            style = "%H:%M:%S" if left < 43200 else "%Y-%m-%d %H:%M"
            until = time.strftime(style, time.localtime(time.time() + left))
            until += ", then it fails" if error.own_reason else " or later"
            text = "%s rejected by GraFx: %s%s; retrying until %s"
            retry_log.warning(text, order.task_id, clause(error), in_project(order.project), until)
        noted = self.database.failing.get(order.task_id)
        if self.settings.once or not noted or noted.get("status") != error.status:
            seconds = round(time.time() - now + order.rejected_since)
            since = db.stamp(datetime.fromtimestamp(seconds, timezone.utc))
            record = {"status": error.status, "error": str(error), "since": since, "times": order.rejections}
            self.database.rejected(order.task_id, record)
        longest = self.settings.poll_interval if counts else LONGEST_PAUSE
        self.requeue(order, backoff(order.times, longest))

    def failed(self, order: Order, error: chili.TaskRejected) -> None:
        """The order is no longer polled."""
        order.enter("failed")
        known = self.orders.pop(order.task_id, None) or self.settings.once  # else it was removed meanwhile
        self.database.failed(order.task_id, error.status, str(error))
        log.error("%s failed%s: %s", order.task_id, in_project(order.project), error)
        if self.on_failed.words and known:
            self.on_failed.failures.append((order, error))

    def retry_later(self, order: Order, error: chili.TryAgainLater) -> None:
        """The order could not be polled or delivered, for a reason that says nothing about it."""
        pause, hook = 0.0, isinstance(error, HookFailed)
        order.enter(WAITING if hook else "retrying", str(error))
        if hook:
            self.clear(order)
        if self.exit_code is not None:
            return
        if error.shared:
            self.outage.begin(error)
        else:
            pause = backoff(order.times, self.settings.poll_interval)
            text = "%s %s; retrying in %s" if hook else "%s cannot be polled: %s; retrying in %s"
            level = logging.WARNING
            if time.monotonic() >= order.alarm:
                order.alarm, level = NEVER, logging.ERROR
            when = duration(max(pause, self.outage.pause()))
            retry_log.log(level, text, order.task_id, clause(error), when)
        self.requeue(order, pause)

    def stop(self) -> int:
        """End the hooks and write the results. Running downloads are dropped."""
        notify("STOPPING=1")
        self.exit_code = self.exit_code or 0
        self.hook.stop()
        self.on_failed.stop()
        for future in wait(self.polling, 0.5 if self.hook.words else 0.05).done:
            self.handle(self.polling.pop(future), future)
        self.judge()
        unwritten = self.database.flush(10.0 if self.settings.once else 1.0)
        for order, _ in self.on_failed.failures:
            log.error("%s ON_FAILED was not run, because the poller is stopping", order.task_id)
        for file in self.claim.locks.values():
            db.note(file)  # clear the status for `db.py list`
        if not self.settings.once:
            log.info("stopped, %d pending", len(self.orders) + unwritten)
            return self.exit_code or int(unwritten > 0)
        if self.orders:
            log.warning("%s not polled, left for the next run", plural(len(self.orders), "order"))
        results = self.status.results
        said = ", ".join(f"{results[state]} {state}" for state in STATES if results[state])
        log.info("polled %s%s", plural(results.total(), "order"), said and f": {said}")
        bad = self.orders, results.keys() & {"failed", WAITING, "retrying"}, not self.database.loaded
        return self.exit_code or int(any((*bad, self.database.problem, self.evidence.problem)))

    def judge(self) -> None:
        """With `once`, after all orders were polled: handle the rejections that may concern all orders."""
        unjudged, self.evidence.unjudged = self.evidence.unjudged, []
        for order, error in unjudged:
            self.rejected(order, error)
            self.status.results[order.state] += 1
        if unjudged and not self.evidence.answered:
            self.evidence.say(len(unjudged))


def forgotten(error: BaseException | None) -> BaseException | None:
    """The error to use instead of a poll's own, for an order older than FORGOTTEN."""
    if getattr(error, "shared", False) or getattr(error, "own_reason", False):
        return error
    text = f"not finished after 7 days, when GraFx forgets a task; last answer: {error or 204}"
    return chili.TaskRejected(text, getattr(error, "status", None if error else 204), own_reason=True)


class Status:
    """What a person sees besides the log: the live line, systemd's status, the note for `db.py list`."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.results: Counter[str] = Counter()  # the states in which polls ended
        self.states: Counter[str] = Counter()  # the orders' states, as they were counted last
        self.counted = (-1, 0)  # then: the number of results and of orders
        self.last = self.note = ""  # the last delivery; what `db.py list` shows
        self.due = 0.0  # when the next report is due
        self.ready_by = time.monotonic() + 30.0  # READY=1 is sent by then at the latest

    def report(self, poller: Poller) -> None:
        now, orders = time.monotonic(), poller.orders.values()
        if now < self.due:
            return
        if self.screen.gone():
            poller.exit_code = 1
        self.due = now + self.screen.pause
        if not poller.settings.once:  # with `once`, `judge` reports
            poller.evidence.report(orders, max(MINUTE, poller.settings.poll_interval))
        version = self.results.total(), len(orders)
        if poller.polling or version != self.counted:  # not each second: there may be 20,000 orders
            self.states, self.counted = Counter(order.doing for order in orders), version
        states = self.states
        counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        whom, problem, due = self.problem(poller)
        if (note := ": ".join(filter(None, (whom, problem)))) != self.note:
            self.note = note
            for file in poller.claim.locks.values():
                db.note(file, note)
        when = f" in {max(0.0, due - now):.0f} s" if due < NEVER else ""
        wrong = [", ".join(filter(None, (whom, f"retry{when}: {problem}")))] if problem else []
        following = f"next poll{when}" if when and not wrong else ""
        said = list(filter(None, (counts or "idle, 0 pending", following, self.last)))
        polled = [order for order in poller.polling.values() if order and order.download]
        loading = [f"{order.task_id[:8]} {order.download}" for order in polled]
        self.screen.show(" | ".join(wrong + loading + said))
        tried = poller.claim.complete and (poller.token.issued or poller.outage.error)
        ready = "READY=1\n" if tried or now >= self.ready_by else ""  # once the credentials were tried
        state = "; ".join(wrong + said)[:1000] + time.strftime(" (%H:%M:%S)")  # systemd reads 4 kB
        notify(f"{ready}WATCHDOG=1\nSTATUS={state}")  # without WATCHDOG=1, systemd ends a loop that hangs

    def stalled(self, orders: Iterable[Order | None]) -> list[str]:
        """Log what hangs, once as a warning and once as an error. Returns the texts."""
        said = []
        for order in filter(None, orders):
            if (silent := time.monotonic() - order.last_progress) >= STALLED:
                since = time.strftime("%H:%M", time.localtime(time.time() - silent))
                said.append(f"{order.task_id} has been waiting for its disk or network since {since}")
                db.warn_once(said[-1], logging.ERROR if silent >= ALARM else logging.WARNING)
        return said

    def problem(self, poller: Poller) -> tuple[str, str, float]:
        """Whom a current problem affects, what it is, and when the next try is due, in monotonic seconds."""
        whom, due, reasons = "", poller.next_due(), list[str]()
        error, pause = poller.outage.error, poller.outage.pause()
        if pause or (error and poller.polling):  # else no order is left that could end it
            whom, reasons = "paused", [str(error or "rate limited by GraFx")]
            due = time.monotonic() + pause
        reasons += filter(None, (poller.database.problem, poller.evidence.problem))
        stuck = []
        if not reasons and (self.states["retrying"] or self.states[WAITING]):
            stuck = [order for order in poller.orders.values() if order.problem]
        if stuck:
            due = min(order.due for order in stuck)
            worst = max(stuck, key=lambda order: order.times)
            whom, reasons = plural(len(stuck), "order"), [worst.problem]
        reasons += self.stalled(poller.polling.values())[:1]
        return whom, "; ".join(reasons), due


# --- python poller.py ------------------------------------------------------------------------


def check(settings: SimpleNamespace) -> int:
    """Try everything the poller needs, and print what works and what does not. Returns the exit code."""
    code, pending = 0, list[str]()
    handle_stop_signals(signal.SIG_DFL)  # an interrupted check must not exit with 0

    def database() -> str:
        store = db.rewrite(settings.database)
        prepare_folder(settings.database.parent)
        good = [task_id for task_id in store.orders if task_id not in store.failing]
        pending.extend(good or store.orders)
        if store.invalid:
            raise db.DatabaseError(f"{settings.database}: {db.IGNORED}{store.invalid[0]}")
        counts = f"{len(good)} pending, {len(store.orders) - len(good)} rejected"
        delivered = len(db.Deliveries(settings.database).ids)
        return f"{settings.database}: {counts}, {len(store.failed)} failed, {delivered} delivered"

    def poll() -> str:
        if not settings.grafx.token.issued:
            raise chili.TryAgainLater("not tried: there is no token")
        return chili.check_environment(settings.grafx, pending[-1] if pending else None)

    steps: dict[str, Callable[[], Any]] = {
        "settings": sources,
        "database": database,
        "folder": lambda: prepare_folder(settings.orders_dir),
        "token": lambda: settings.grafx.token.get() and f"{settings.token_url} gave a token",
        "GraFx": poll,
    }
    for name, step in steps.items():
        try:
            said = f"ok    {name}: {step()}"
        except (db.DatabaseError, chili.TryAgainLater, chili.TaskRejected) as error:
            said = f"WRONG {name}: {error}"
            code = os.EX_CONFIG if isinstance(error, chili.CredentialsRejected) else code or 1
        print(said, flush=True)
    return code


def handle_stop_signals(handler: Any) -> None:
    for name in STOP_SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(name, handler)


def run(settings: SimpleNamespace, screen: Screen) -> int:
    poller = Poller(settings, screen)
    try:
        return poller.run()
    except Exception as error:
        few = isinstance(error, RuntimeError) and "thread" in str(error)
        if not few:
            log.critical("the poller crashed, please report it", exc_info=True)
        for _ in range(len(poller.polling) + 1):  # a result that crashes the poller must not lose the others
            with contextlib.suppress(Exception):
                poller.stop()
                break
        if few:
            raise
        return os.EX_SOFTWARE


def main() -> int:
    """`python poller.py`; returns the exit code."""
    # The parent may have ignored or blocked them. If SIGCHLD is ignored, each hook seems to end with 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    handle_stop_signals(lambda *_: os._exit(0))  # without a Poller there is nothing to clean up
    db.open_streams()
    parser = argparse.ArgumentParser(
        prog="poller.py",
        description="Download the files of finished GraFx orders, from database.json to ./orders.",
        epilog="README.md lists the settings, which .env holds. Exit codes: 0 stopped, or all orders polled;"
        " 1 an order failed or could not be polled or delivered, or the poller could not start;"
        " 70 a bug, please report it; 78 wrong settings or credentials.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="poll each order once, then exit")
    what.add_argument("--check", action="store_true", help="try everything, and say what to fix")
    parser.add_argument("-v", "--verbose", action="store_true", help="log each request, without any secret")
    given = parser.parse_args()
    screen = None
    try:
        screen = Screen(given.verbose)
        settings = load_settings()
        settings.once = given.once
        return check(settings) if given.check else run(settings, screen)
    except (SettingsError, db.DatabaseError) as error:
        for line in str(error).splitlines():
            if given.check:
                print(f"WRONG settings: {line}", flush=True)
            else:
                log.error("%s", line)
        return os.EX_CONFIG
    except OSError as error:  # e.g. from printing in --check
        log.error("%s", error)
        return 1
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        log.error("%s. Raise the limit (ulimit -u, systemd's TasksMax=).", error)
        return 1
    finally:
        if screen:
            screen.finish()


if __name__ == "__main__":
    os._exit(main())  # a thread that hangs must not delay the exit
