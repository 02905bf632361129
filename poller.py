"""Fetch the files of finished GraFx orders: from `database.json` to `./orders`.

    python poller.py             poll every order, deliver, and go on until SIGTERM or Ctrl-C
    python poller.py --once      poll each order once, for cron
    python poller.py --check     try settings, database, folder, token and GraFx

The loop is `Poller.run`. What GraFx answers is in `chili.py`, what the file says in `db.py`.
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
EX_SOFTWARE, EX_CONFIG = 70, 78  # of sysexits.h
SHORTEST_PAUSE = 2.0  # seconds between two polls of one order; CHILI's own client takes 2
LONGEST_PAUSE = 900.0  # of a rejection that says nothing about its order
# Rejections before an order fails: such as are about it, and such as may have another reason.
PROVEN, UNPROVEN = 3, 20
MINUTE = 60.0  # seconds in which no retry warning of one kind is logged twice
ALARM = 600.0  # seconds of an outage before it is an error
WITNESSED = 600.0  # seconds for which the daemon itself has to see a rejection, however old that is
STALLED = 120.0  # seconds in which a poll or download moves nothing, before that is said
FORGOTTEN = 7 * 86400.0  # seconds after which GraFx forgets a task
OUTPUT = 10_000_000  # bytes of what a command prints that are kept
NEVER = float("inf")
MORE_THREADS = "Raise the limit (ulimit -u, systemd's TasksMax=)."
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WAITING = "waiting for ON_DONE"  # the state of an order whose file is here
STATES = ("delivered", "new", "rendering", "downloading", WAITING, "rejected", "failed", "retrying")
HIDDEN = ("SERVER_ID", "SERVER_SECRET", "SERVER_SECRET_FILE", "FRONT_ID", "FRONT_SECRET",
          "CREDENTIALS_DIRECTORY")  # fmt: skip

log = logging.getLogger("poller")
retry_log = logging.getLogger("poller.retry")  # says nothing twice in a minute, see OnceAMinute


# --- settings --------------------------------------------------------------------------------


class Settings(SimpleNamespace):
    """What READERS gives, each by its name in lower case."""

    def grafx(self) -> chili.GraFx:
        credentials = self.token_url, self.server_id, self.server_secret
        return chili.GraFx(self.baseurl, self.environment, *credentials, self.concurrency)


class SettingsError(Exception):
    """All that is wrong with the settings, a line each with what to do."""


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
        raise ValueError(f"names {words[0]}, which cannot be run: install it, or write its whole path")
    return words


# A setting's name; how it is read; its default, or for those that are REQUIRED what has to be written there.
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


def load_settings() -> Settings:
    """The environment over `.env`. Raises SettingsError with all that is wrong."""
    wrong: list[str] = []
    found: dict[str, Any] = {}
    try:
        given = db.settings(NAMES)
        if secret_file := given.get("SERVER_SECRET_FILE"):
            if "SERVER_SECRET" in given:
                raise ValueError("SERVER_SECRET is set as well: remove one of them")
            given["SERVER_SECRET"] = db.beside_code(secret_file).read_text("utf-8-sig").strip()
            if not given["SERVER_SECRET"]:
                raise ValueError("it is empty: write the secret into it")
    except db.DatabaseError as error:
        raise SettingsError(str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, too
        raise SettingsError(f"SERVER_SECRET_FILE: {error}") from None
    if not set(REQUIRED) & given.keys() and not db.env_file().exists():
        raise SettingsError(
            f"no settings yet: in {db.HERE}, cp .env.example .env, and fill in its four lines"
        )
    for name, read, default in READERS:
        try:
            if name in REQUIRED and not given.get(name):
                raise ValueError(f"is missing: put {default} into {db.env_file()} or the environment")
            found[name.lower()] = read(given.get(name, default))
        except ValueError as error:
            wrong.append(f"{name} {error}")
    if wrong:
        raise SettingsError("\n".join(wrong))
    warn_about_env(given)
    return Settings(**found)


def warn_about_env(given: dict[str, str]) -> None:
    """Say what in `.env` has no effect, and may be meant to have one."""
    for name, _, original, error in db.env_lines():
        place = f"{db.env_file()}, line {original.line + original.string[:-1].count(chr(10))}"
        meant = difflib.get_close_matches((name or "").upper(), set(NAMES) - given.keys(), 1, 0.85)
        if error:
            log.warning("%s: cannot be parsed, and has no effect", place)
        elif meant and name not in NAMES:
            log.warning("%s: %s is no setting, and has no effect: is it %s?", place, name, meant[0])


def sources() -> str:
    """Where the settings are from; both values where the environment goes before another one of `.env`."""
    file = {name: value for name, value, _, _ in db.env_lines() if value}
    both = {}
    for name in NAMES:
        if name in file and os.environ.get(name, file[name]) != file[name]:
            secret = "SECRET" in name or name in ("SERVER_ID", "ON_DONE", "ON_FAILED")
            both[name] = " (.env has another one)" if secret else f" ({os.environ[name]}, not {file[name]})"
    outer = [name + both.get(name, "") for name in NAMES if os.environ.get(name)]
    inner = [name for name in NAMES if name in file and not os.environ.get(name)]
    parts = (("the environment: ", outer), (".env: ", inner))
    return "; ".join(f"from {place}{', '.join(names)}" for place, names in parts if names)


class CannotWrite(chili.TryAgainLater):
    """ORDERS_DIR takes no file."""


def disk_error(folder: Path, error: OSError) -> chili.TryAgainLater:
    """It is one order's where another file can be written."""
    text = f"cannot write to {folder}: {error.strerror}. {db.advice(error, folder)}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
            return chili.TryAgainLater(text)
    return CannotWrite(text, shared=True)


def prepare_folder(orders_dir: Path) -> Path:
    """Make the folder where it is missing, and see that a file can be made. Raises CannotWrite."""
    try:
        if not orders_dir.is_dir():
            orders_dir.mkdir()
            db.sync_folder(orders_dir.parent)
        tempfile.TemporaryFile(dir=orders_dir).close()
        return orders_dir
    except OSError as error:
        raise disk_error(orders_dir, error) from None


class Claim:
    """What makes this the only poller of its database, and of its folder."""

    def __init__(self, database: Path, folder: Path) -> None:
        self.database, self.folder = database, folder
        self.locks: dict[Path, TextIO] = {}
        self.complete = False
        self.look = 0.0  # when to look at the locks again, in monotonic seconds

    def take(self) -> None:
        """Raises Busy where another poller has it; DatabaseError, CannotWrite where a disk is not there."""
        self.lock(self.database)
        prepare_folder(self.folder)
        self.lock_folder()
        chili.remove_leftovers(self.folder)  # which nobody else is writing now
        self.complete = True

    def lock(self, path: Path) -> None:
        """Have the lock for this path, another one where somebody removed its file. Raises DatabaseError."""
        if path not in self.locks or not db.is_at(self.locks[path], db.beside(path, "pid")):
            self.locks[path] = db.hold(path, "pid", 0)
            db.note(self.locks[path])

    def lock_folder(self) -> None:
        """Or another database's poller would remove what is being downloaded here. Raises Busy."""
        try:
            self.lock(self.folder / "poller")
        except db.Busy:
            wrong = f"another poller writes to {self.folder}. Give each an ORDERS_DIR of its own."
            raise db.Busy(wrong) from None
        except db.DatabaseError as error:
            db.warn_once(f"{error} Two pollers with this folder would not be noticed.")

    def renew(self) -> None:
        """Look whether the locks are still there. Raises Busy where another poller has taken one."""
        self.look = time.monotonic() + db.LOOK
        for path in self.locks:
            self.lock(path)


# --- the log and the live line ---------------------------------------------------------------


class OnceAMinute(logging.Filter):
    """Lets a kind of message pass once a minute, with the number of those that did not."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: dict[str, float] = {}  # kind to monotonic seconds
        self.held: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        now, text = time.monotonic(), record.getMessage()
        kind = re.sub(r"[\w-]*\d[\w.:-]*", "#", text)  # without ids and numbers
        if now < self.passed.get(kind, -MINUTE) + MINUTE:
            self.held[kind] += 1
            return False
        self.passed[kind] = now
        if held := self.held.pop(kind, 0):
            record.msg, record.args = f"{text} (and {held} more like it since the last one)", ()
        return True


class Screen(logging.StreamHandler):  # type: ignore[type-arg]  # 3.10 knows no argument
    """The log on stderr: in a terminal with a live line below it, under systemd as the journal likes it.

    Behind a queue with a thread of its own: a full pipe or Ctrl-S holds up neither a delivery nor a stop.
    """

    def __init__(self, verbose: bool) -> None:
        super().__init__(sys.stderr)
        self.terminal = sys.stderr.isatty()
        self.live = self.drawn = ""  # the live line as it should be, and as it is
        stat = os.fstat(2)  # systemd.exec(5): so one knows that stderr is the journal itself
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
        stamp = "" if self.journal else "%(asctime)s %(levelname)-7s "
        self.setFormatter(logging.Formatter(stamp + "%(message)s", "%Y-%m-%d %H:%M:%S"))
        self.queue: queue.Queue[Any] = queue.Queue(10_000)
        self.listener = logging.handlers.QueueListener(self.queue, self)
        self.listener.start()
        logging.getLogger().addHandler(logging.handlers.QueueHandler(self.queue))
        for name in ("poller", "chili", "db"):
            logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs whole addresses, with signatures
        logging.raiseExceptions = False  # a log that nobody reads is no reason to fail
        retry_log.addFilter(OnceAMinute())

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self.journal:  # sd-daemon(3): a level for each line, or a traceback would lose it
            level = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            return "\n".join(f"<{level}>{line}" for line in text.splitlines())
        return text

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "redraw"):
            self.draw("")
            super().emit(record)
        self.draw(self.live)

    def show(self, line: str) -> None:
        """Put `line` in the place of the live line."""
        self.live = line
        if self.terminal and self.queue.empty():  # else the next record draws it
            self.queue.put_nowait(logging.makeLogRecord({"redraw": True}))

    def draw(self, line: str) -> None:
        if not self.terminal:
            return
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(2).columns or 80
            if line[: width - 1] == self.drawn:
                return
            self.drawn = line[: width - 1]
            # ?7l, ?7h: no wrapping, however wide the letters of some languages are. The cursor goes back, so
            # that all of the line goes, also after ^C, or where a narrower terminal has wrapped it.
            self.stream.write(f"\r\x1b[J\x1b[?7l{self.drawn}\x1b[?7h\r")
            self.stream.flush()

    def gone(self) -> bool:
        """Whether nobody can read the log any more: journald was stopped, or the end of a pipe closed."""
        descriptor = select.poll()
        descriptor.register(2, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in descriptor.poll(0))

    def finish(self) -> None:
        """Write what is in the queue, but wait no longer than half a second for a reader."""
        self.show("")
        stop = threading.Thread(target=self.listener.stop, daemon=True)
        stop.start()
        stop.join(0.5)


def notify(state: str) -> None:
    """Tell systemd, where it asked to be told: a datagram to $NOTIFY_SOCKET, see sd_notify(3)."""
    if place := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(errors="replace"), re.sub("^@", "\0", place))  # @: an abstract one


def duration(seconds: float) -> str:
    """Seconds as "4.7 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- the orders ------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Order:
    """A pending order. Times are monotonic seconds, but for `added`."""

    task_id: str
    project: str
    added: float  # seconds since 1970; infinity where the file does not say
    seen: float  # when this process first saw it
    state: str = "new"  # rendering, rejected, retrying, waiting for ON_DONE
    times: int = 0  # polls in a row that ended in this state
    problem: str = ""
    due: float = 0.0  # when to poll it; infinity while it is polled
    polled: float = 0.0  # when it was polled last
    handled: float = 0.0  # when the result of the last poll was handled
    rejected: float = 0.0  # since when GraFx has rejected it; 0: it does not
    witnessed: float = 0.0  # since when this process has seen that
    rejections: int = 0  # how many of those count, see Poller.rejected
    suspect: bool = False  # it was said that GraFx rejects all orders, this one too
    moved: float = 0.0  # when its poll or download moved last; infinity while ON_DONE runs
    alarms: int = 0  # how often it was said that it does not move
    size: int = 0  # bytes of its file that have come
    download: str = ""  # how far that is, as long as it goes on

    @property
    def age(self) -> float:
        """Seconds since it was added, whatever the clock did meanwhile."""
        return max(time.monotonic() - self.seen, time.time() - self.added)

    def enter(self, state: str, problem: str = "") -> None:
        """The one change of state; the pauses follow from what it counts."""
        self.times = self.times + 1 if state == self.state else 1
        self.state, self.problem = state, problem

    def progress(self, size: int, total: int | None) -> None:
        """The download calls this for each piece."""
        self.moved = time.monotonic()
        speed = size / max(0.001, self.moved - self.polled)
        share = f"{100 * size // total}% of {chili.format_size(total)}" if total else chili.format_size(size)
        self.size, self.download = size, f"{share}, {chili.format_size(speed)}/s"


def epoch(when: Any) -> float:
    """A time in the file in seconds since 1970; infinity for what is no time."""
    with contextlib.suppress(ValueError, OverflowError):
        seconds = db.utc(str(when)).timestamp()
        return seconds if seconds >= 0 else NEVER
    return NEVER


def backoff(times: int, longest: float) -> float:
    """2 s, 4 s, 8 s, … up to `longest`."""
    return min(longest, SHORTEST_PAUSE * 2.0 ** min(times - 1, 20))


class Outage:
    """What affects every order, and until when none is polled. Times are monotonic seconds."""

    def __init__(self, longest: float) -> None:
        self.longest = longest  # seconds between two tries
        self.error: Exception | None = None
        self.since = self.until = 0.0  # when it began; the next try
        self.said: set[str] = set()  # what was logged of it
        self.quiet = self.ended = 0.0  # until when the next one is not logged; when the last one was over
        self.limited = 0.0  # until when GraFx wants no request

    def begin(self, error: Exception) -> None:
        """It was met, perhaps once more."""
        now = time.monotonic()
        if self.error is None:
            self.since, self.said = now, set()
        self.error = error
        if now >= self.until:  # 2 s, 4 s, 8 s, …, as long as it has lasted
            self.until = now + min(self.longest, SHORTEST_PAUSE + now - self.since)
        if str(error) not in self.said and now >= self.quiet:
            level = logging.ERROR if isinstance(error, chili.CredentialsRejected) else logging.WARNING
            log.log(level, "paused: %s; retrying in %s", error, duration(self.until - now))
            self.said.add(str(error))
        if "" not in self.said and now >= self.since + ALARM:
            log.error("paused for %s: %s", duration(now - self.since), error)
            self.said.add("")

    def end(self) -> None:
        now = time.monotonic()
        if self.said:
            log.info("resumed after %s", duration(now - self.since))
            self.quiet = now + MINUTE
        self.error, self.until, self.ended = None, 0.0, now

    def pause(self) -> float:
        """Seconds until an order may be polled."""
        return max(0.0, max(self.until, self.limited) - time.monotonic())


class Evidence:
    """What tells a dead order from a GraFx that rejects all of them. Times are monotonic seconds.

    A 404 may be a maintenance page, or come from a wrong ENVIRONMENT. So it counts against its order only
    where another order's file came meanwhile. Where no poll has a good answer, that is said.
    """

    def __init__(self) -> None:
        self.last_file = 0.0  # when a file came whole
        self.answered = False  # whether any poll had a good answer
        self.since, self.report_at = NEVER, NEVER  # since when none had; when to say so
        self.error: chili.TaskRejected | None = None  # the last unproven rejection
        self.problem, self.alarmed = "", False  # what was said, and whether as an error
        self.unjudged: list[tuple[Order, chili.TaskRejected]] = []  # with `once`, until all were polled

    def good(self) -> bool:
        """A poll had a good answer; returns whether that ends what was said."""
        if over := bool(self.problem):
            log.info("resumed after %s", duration(time.monotonic() - self.since))
        self.answered, self.problem, self.alarmed = True, "", False
        self.since, self.report_at = NEVER, NEVER
        return over

    def rejected(self, order: Order, error: chili.TaskRejected) -> None:
        """An order has a rejection that may be meant for all."""
        self.error = error
        if self.problem:
            order.suspect = True
        elif self.since == NEVER and not order.suspect:  # what was said of an order is not said again
            self.since, self.report_at = order.polled, time.monotonic() + MINUTE

    def report(self, orders: Iterable[Order]) -> None:
        """Where no poll has a good answer: say so after a minute, and once more as an error."""
        now = time.monotonic()
        if now >= self.report_at:
            self.report_at = now + MINUTE
            self.say([order for order in orders if order.rejected and order.polled >= self.since])

    def say(self, rejected: list[Order]) -> None:
        if not rejected or self.error is None:  # they have ended, or were removed
            self.good()
            return
        for order in rejected:
            order.suspect = True
        status, number = self.error.status, len(rejected)
        whom = {1: "the only order", 2: "both orders"}.get(number, f"all {number} orders")
        what = f"{status} without a file to {whom} ({self.error})" if status == 200 else f"{status} to {whom}"
        said, advice = self.problem, "look at ENVIRONMENT and at the integration's permissions"
        self.problem = f"GraFx answers {what}: {advice}"
        alarm = not self.alarmed and time.monotonic() >= self.since + ALARM
        if alarm or not said:
            log.log(logging.ERROR if alarm else logging.WARNING, "%s", self.problem)
        self.alarmed = self.alarmed or alarm


# --- ON_DONE ---------------------------------------------------------------------------------


class HookFailed(chili.TryAgainLater):
    """The file is here, but ON_DONE has not ended with 0."""


class Hook:
    """ON_DONE, a command for each file that was downloaded; or ON_FAILED, for each order that failed."""

    def __init__(self, name: str, words: list[str], timeout: float) -> None:
        self.name, self.words, self.timeout = name, words, timeout
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self.failures: list[tuple[Order, chili.TaskRejected]] = []  # for ON_FAILED, once the file has them
        self.jobs: list[Future[None]] = []  # of ON_FAILED, which are no polls
        self.pool = ThreadPoolExecutor(1)

    def run(self, order: Order, file: Path | None, **more: str) -> None:
        """Run the command for an order. Raises HookFailed unless it ends by itself, with 0."""
        if self.stopping:
            raise HookFailed("the poller is stopping")
        if file and not file.is_file():
            if order.size:  # it came just now, so somebody takes each: a person has to decide
                gone = "its file was taken out of orders before ON_DONE could run"
                raise chili.TaskRejected(gone, 200, final=True)
            raise HookFailed("its file was removed before ON_DONE could run")
        with tempfile.TemporaryFile() as output:  # not a pipe, which what it leaves running would hold open
            fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)  # so that it can be truncated
            process = self.start(order, file, output, more)
            why = "was not seen to end"
            try:
                why = self.wait(process, output)
            finally:  # whatever happened, it may have run
                self.end(process, why)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 10_000))
            text = output.read().decode(errors="replace")
        lines = list(filter(None, map(chili.sanitize, text.splitlines())))[-10:]
        code = process.returncode
        fine = code == 0 and not why
        for line in lines if fine else lines[:-1]:  # the last one is in the error
            (log if fine else retry_log).info("%s %s: %s", order.task_id, self.name, line)
        if fine:
            return
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with {code}"
        raise HookFailed(": ".join((f"{self.name} {why or how}", *lines[-1:])))

    def start(
        self, order: Order, file: Path | None, output: Any, more: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        words = [word.replace("{}", str(file)) for word in self.words] if file else self.words
        if file and words == self.words:
            words.append(str(file))
        # In bytes, whatever the locale can encode.
        env = {name: value for name, value in os.environb.items() if name.decode("latin-1") not in HIDDEN}
        more = {"TASK_ID": order.task_id, "PROJECT_ID": order.project, **more}
        env |= {name.encode(): value.encode(errors="replace") for name, value in more.items()}
        if file:
            env[b"ORDER_FILE"] = os.fsencode(file)
        try:
            process = subprocess.Popen(  # noqa: S603 - no shell, and the words are the user's own
                words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise HookFailed(f"{self.name} cannot be run: {error}") from None
        self.running.add(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], output: Any) -> str:
        """Until it has ended; by force at its timeout, or when the poller stops. Returns why by force."""
        deadline, why = time.monotonic() + self.timeout, ""
        # Not reaped yet: so long its number is its session's, and no other process's.
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if os.fstat(output.fileno()).st_size > OUTPUT:  # not after its end
                output.truncate(0)
            if self.stopping and not why:
                deadline, why = time.monotonic() + 0.8, "was ended because the poller stops"
                signal_session(process.pid, signal.SIGTERM)
            if time.monotonic() >= deadline:
                why = why or f"took longer than {self.timeout:g} s"
                signal_session(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        return why

    def end(self, process: subprocess.Popen[bytes], why: str) -> None:
        """Reap it; unless it ended by itself, with 0, what it left running is ended too."""
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if why or not ended or ended.si_status:
            signal_session(process.pid, signal.SIGKILL)
        process.wait()
        self.running.discard(process)

    def report(self, order: Order, error: chili.TaskRejected) -> None:
        """In a thread: ON_FAILED. Where it does not end well that is logged, and it is not run again."""
        try:
            self.run(order, None, STATUS=str(error.status or ""), ERROR=str(error))
        except (HookFailed, OSError) as wrong:
            log.error("%s %s; it is not run again", order.task_id, wrong)

    def stop(self) -> None:
        """Have all that run ended, whose exit code does not count then; no more are started."""
        self.stopping = True
        deadline = time.monotonic() + 1.5
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)


def signal_session(leader: int, how: int) -> None:
    """To a command and all that it started, whatever process groups they made: proc(5), field 6."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, how)  # all there is without /proc
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text(errors="replace").rpartition(")")[2].split()[3] == str(leader):
                os.kill(int(stat.parent.name), how)


# --- the loop --------------------------------------------------------------------------------


class Poller:
    """The single loop, and one method for each result. All state is the loop's.

    A pending order is in `orders`, and either in `queue` until it is due or in `polling` while a thread polls
    it. One that has ended is a result in `database`, until the file says so.
    """

    def __init__(self, settings: Settings, screen: Screen) -> None:
        self.settings = settings
        self.grafx = settings.grafx()
        self.database = db.Database(settings.database, prove=bool(settings.on_done))
        self.orders: dict[str, Order] = {}
        self.queue: list[tuple[float, str]] = []  # a heap; an entry that is not its order's `due` is stale
        self.polling: dict[Future[Any], Order | None] = {}  # None: the first token
        self.results: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(settings.concurrency)
        self.outage, self.evidence = Outage(settings.poll_interval), Evidence()
        self.hook = Hook("ON_DONE", settings.on_done, settings.on_done_timeout)
        self.on_failed = Hook("ON_FAILED", settings.on_failed, settings.on_done_timeout)
        self.status = Status(screen)
        self.claim = Claim(settings.database, settings.orders_dir)
        self.exit_code: int | None = None  # of a stop that was asked for
        what = settings.database, settings.baseurl, settings.environment, settings.orders_dir
        log.info("GraFx order poller %s: %s, %s, environment %s, files to %s", VERSION, *what)
        for name in STOP_SIGNALS:
            if signal.getsignal(name) != signal.SIG_IGN:
                signal.signal(name, self.on_signal)

    @property
    def once(self) -> bool:
        return bool(self.settings.once)

    def run(self) -> int:
        """Poll until a signal, with `once` until each order was polled; returns the exit code."""
        while True:
            if self.once and not self.polling and not self.orders:
                self.judge()
            if self.exit_code is not None or (self.once and self.is_done()):
                return self.stop()
            if self.prepare():
                self.sync_orders()
                self.poll_due_orders()
            self.handle_results()
            if not self.once:  # else at the end
                self.evidence.report(self.orders.values())
            self.status.report(self)

    def is_done(self) -> bool:
        """With `once`: an outage is not waited for, nor that somebody mends the database."""
        if self.polling or not all(job.done() for job in self.on_failed.jobs):
            return False
        if self.on_failed.failures and not self.database.problem:
            return False
        if self.outage.error or self.outage.pause() > 0:
            return True
        loaded = self.database.loaded
        return self.status.ready and not self.orders if loaded else bool(self.database.problem)

    def on_signal(self, *_: object) -> None:
        """Set a flag, wake the loop, and nothing else: a signal may interrupt anything."""
        self.exit_code = self.exit_code or 0
        self.results.put(None)

    def prepare(self) -> bool:
        """Whether this is the only poller here; a disk that is not there yet is waited for."""
        complete = self.claim.complete
        if time.monotonic() < self.claim.look if complete else self.outage.pause() > 0:
            return complete
        try:
            if complete:
                self.claim.renew()
            else:
                self.claim.take()
                self.outage.end()
        except db.Busy as error:
            log.error("%s", error)
            self.exit_code = 1
        except (db.DatabaseError, chili.TryAgainLater, OSError) as error:
            if not complete:
                self.outage.begin(error)
        return self.claim.complete

    def sync_orders(self) -> None:
        """Write the results; see which orders came into the file, and which were removed from it."""
        first = not self.database.loaded
        new, gone = self.database.sync(idle=not self.polling and self.next_due() > time.monotonic())
        self.report_failures()
        if self.once and not first:
            return
        if new or gone:
            self.status.states = None, Counter()  # to be counted anew
        for task_id, fields in new.items():
            self.add(task_id, fields)
            if len(new) <= 5 and not first:
                project = self.orders[task_id].project
                log.info("%s added%s", task_id, f" (project {project})" if project else "")
        for task_id in gone:
            del self.orders[task_id]
            if len(gone) <= 5:
                log.info("%s removed from the file by somebody", task_id)
        for task_ids, what in ((new, "added"), (gone, "removed from the file by somebody")):
            if len(task_ids) > 5 and not first:
                log.info("%d orders %s", len(task_ids), what)

    def report_failures(self) -> None:
        """Start ON_FAILED for what the file has under "failed", so that it runs once at most."""
        while self.on_failed.failures and self.database.settled:
            failure = self.on_failed.failures.pop(0)
            job = self.on_failed.pool.submit(self.on_failed.report, *failure)
            job.add_done_callback(lambda _: self.results.put(None))
            self.on_failed.jobs = [one for one in (*self.on_failed.jobs, job) if not one.done()]

    def add(self, task_id: str, fields: db.Fields) -> None:
        """Know an order of the file; where an earlier process saw it rejected, that counts on."""
        for order in self.polling.values():
            if order and db.key(order.task_id) == db.key(task_id):  # removed and added again meanwhile
                order.task_id, self.orders[task_id] = task_id, order
                return
        now, project = time.monotonic(), chili.sanitize(fields.get("projectID") or "")
        order = Order(task_id, project, epoch(fields.get("added")), now, handled=now)
        if record := self.database.failing.get(task_id):
            # A clock that was set back neither stops the polls nor ends them.
            order.state, order.rejected = "rejected", min(now, now - time.time() + epoch(record.get("since")))
            times = record.get("times")
            # The daemon polls it so often once more, since it does not note each time.
            order.rejections = times if self.once and isinstance(times, int) else 0
        elif chili.find_file(self.settings.orders_dir, task_id):
            order.state = WAITING
        self.orders[task_id] = order
        self.requeue(order, 0.0)

    def requeue(self, order: Order, pause: float) -> None:
        """Poll it again in so many seconds; all the while it stays in database.json."""
        if self.once and order.polled:
            self.orders.pop(order.task_id, None)
        order.due = time.monotonic() + pause
        heapq.heappush(self.queue, (order.due, order.task_id))  # stale where somebody removed it meanwhile

    def next_due(self) -> float:
        """When the next order is due, in monotonic seconds."""
        while self.queue:
            due, task_id = self.queue[0]
            if task_id in self.orders and self.orders[task_id].due == due:
                return due
            heapq.heappop(self.queue)
        return NEVER

    def poll_due_orders(self) -> None:
        """Give due orders to the threads, no more than may be polled at once."""
        now, paused = time.monotonic(), self.outage.pause() > 0
        if not self.grafx.token.issued and not paused and None not in self.polling.values():
            self.submit(None)  # so it shows at once whether the credentials are right
        if paused or not self.grafx.token.issued:  # a file that is here needs no GraFx
            here = [order for order in self.orders.values() if order.state == WAITING and order.due <= now]
            for order in here[: max(0, self.settings.concurrency - len(self.polling))]:
                self.submit(order)
            return
        while len(self.polling) < self.settings.concurrency and self.next_due() <= now:
            self.submit(self.orders[heapq.heappop(self.queue)[1]])

    def submit(self, order: Order | None) -> None:
        """Let a thread poll an order, or fetch the first token; its result comes back through `results`."""
        if order:
            log.debug("%s polled (project %s)", order.task_id, order.project or "not given")
            order.polled = order.moved = time.monotonic()
            order.due, order.alarms = NEVER, 0
        future = self.pool.submit(self.poll, order) if order else self.pool.submit(self.grafx.token.get)
        self.polling[future] = order
        future.add_done_callback(self.results.put)

    def poll(self, order: Order) -> Path | None:
        """In a thread: `chili.order_done`, then ON_DONE where it is set; None while the task renders."""
        folder = self.settings.orders_dir
        try:
            file = chili.order_done(order.task_id, self.grafx, folder, order.progress)
            if file:  # also where it was here: a process may have been killed between its rename and this
                db.sync_folder(folder)
        except OSError as error:
            raise disk_error(folder, error) from None
        order.download, order.moved = "", NEVER
        try:
            if file and self.hook.words:
                if not self.database.deliveries.writable:  # or it would run again after each start
                    raise HookFailed("waits with ON_DONE until the list of deliveries can be written")
                self.hook.run(order, file)
        except OSError as error:  # no room for its output, say
            raise HookFailed(f"ON_DONE was not seen to end well: {error}") from None
        return file

    def handle_results(self, seconds: float | None = None) -> None:
        """Wait for a result, but no longer than to the next order due or the next report; handle all."""
        if seconds is None:
            seconds, now = self.status.pause, time.monotonic()
            if self.grafx.token.issued and len(self.polling) < self.settings.concurrency:
                seconds = min(seconds, max(self.next_due() - now, self.outage.pause()))
        with contextlib.suppress(queue.Empty):
            while True:
                if future := self.results.get(timeout=max(0.0, seconds)):
                    self.handle(self.polling.pop(future), future)
                seconds = 0.0

    def handle(self, order: Order | None, future: Future[Any]) -> None:
        """What a poll, or the first token's request, ended with."""
        error = future.exception()
        if error and not isinstance(error, (chili.TaskRejected, chili.TryAgainLater)):
            what = order.task_id if order else "the token:"
            retry_log.error("%s unexpected error, please report it", what, exc_info=error)
            error = chili.TryAgainLater(f"unexpected {type(error).__name__}")
        if isinstance(error, chili.CredentialsRejected) and not self.grafx.token.issued:
            log.error("%s", error)
            self.exit_code = EX_CONFIG
        if isinstance(error, chili.TryAgainLater) and error.retry_after:
            retry_log.warning("rate limited: Retry-After %.0f s", error.retry_after)
            self.outage.limited = max(self.outage.limited, time.monotonic() + error.retry_after)
        if order:
            self.handle_order(order, None if error else future.result(), error)
            return
        self.status.ready = True  # orders are polled from now on, and systemd is told
        if self.outage.error and not error:
            self.outage.end()
        elif isinstance(error, chili.TryAgainLater) and self.exit_code is None:
            self.outage.begin(error)

    def handle_order(self, order: Order, file: Path | None, error: BaseException | None) -> None:
        """What the poll of an order ended with: its file, an error, or neither."""
        came = order.size > 0 and (error is None or isinstance(error, HookFailed))
        resumed = self.end_outage(order, error, came)
        if came:
            self.evidence.last_file = time.monotonic()
        rejected = error if isinstance(error, chili.TaskRejected) else None
        renders = error is None and not file
        if came or renders or (rejected and rejected.proven):  # so GraFx, and not a page before it, answers
            resumed = self.evidence.good() or resumed
        elif rejected:
            self.evidence.rejected(order, rejected)
        if order.age > FORGOTTEN and not file:
            error = forgotten(error)
        if isinstance(error, chili.TaskRejected) and not error.proven and self.once:
            self.orders.pop(order.task_id, None)
            self.evidence.unjudged.append((order, error))
            return
        if isinstance(error, chili.TaskRejected):
            self.rejected(order, error)
        elif isinstance(error, chili.TryAgainLater):
            self.retry_later(order, error)
        elif file:
            self.delivered(order, file)
        else:
            self.pending(order)
        order.size, order.download, order.handled = 0, "", time.monotonic()
        self.status.results[order.state] += 1
        # Rejected orders have long pauses, for which there is no reason any more.
        soon = 0.0 if resumed else self.settings.poll_interval
        for other in map(self.orders.get, [*self.database.failing] if resumed or came else []):
            if other and time.monotonic() + soon < other.due < NEVER:
                self.requeue(other, soon)

    def end_outage(self, order: Order, error: BaseException | None, came: bool) -> bool:
        """End the outage where this poll began after it did, and shows that it is over."""
        if self.outage.error is None or order.polled < self.outage.since:
            return False
        if isinstance(self.outage.error, CannotWrite):  # only a new file shows that the disk takes one
            over = came
        else:  # a file that was here says nothing about GraFx
            shared = isinstance(error, chili.TryAgainLater) and error.shared
            over = order.state != WAITING and not shared
        if over:
            self.outage.end()
        return over

    def delivered(self, order: Order, file: Path) -> None:
        """Its file is whole on the disk, and ON_DONE has run: it may leave database.json."""
        order.enter("delivered")
        self.orders.pop(order.task_id, None)  # somebody may have removed it meanwhile
        self.database.delivered(order.task_id, file.name)
        self.status.last = f"last delivery {time.strftime('%H:%M:%S')}"
        size = chili.format_size(order.size) if order.size else "downloaded before"
        place, took = f"{file.parent.name}/{file.name}", duration(order.age)
        log.info("%s delivered to %s (%s, %s after it was added)", order.task_id, place, size, took)

    def pending(self, order: Order) -> None:
        """202 or 204: GraFx renders it."""
        order.enter("rendering")
        self.clear(order)
        # So a file is here at most a quarter of its render time (and 2 s) after it is ready,
        # and an order that renders for an hour is not polled 1,800 times.
        self.requeue(order, min(self.settings.poll_interval, max(SHORTEST_PAUSE, order.age / 4)))

    def clear(self, order: Order) -> None:
        """It is rejected no more: it renders, or its file is here."""
        order.rejected, order.witnessed, order.rejections, order.suspect = 0.0, 0.0, 0, False
        self.database.pending(order.task_id)

    def rejected(self, order: Order, error: chili.TaskRejected) -> None:
        """There is no file, GraFx says. It fails where that was so often enough, and for GIVE_UP_AFTER.

        What may be meant for all orders counts only where another one's file came since the last poll.
        """
        now, give_up_after = time.monotonic(), self.settings.give_up_after
        first, order.rejected = not order.rejected, order.rejected or now
        order.witnessed = order.witnessed or now
        order.enter("rejected", str(error))
        counts = error.proven or self.evidence.last_file > order.handled
        order.rejections += counts
        left = order.rejected + give_up_after - now
        if not self.once:  # what was noted before a night off is not enough
            left = max(left, order.witnessed + min(WITNESSED, give_up_after) - now)
        project = f" (project {order.project})" if order.project else ""
        if error.final or (order.rejections >= (PROVEN if error.proven else UNPROVEN) and left <= 0):
            order.enter("failed")
            known = self.orders.pop(order.task_id, None) or self.once  # else somebody removed it meanwhile
            self.database.failed(order.task_id, error.status, str(error))
            log.error("%s failed%s: %s", order.task_id, project, error)
            if self.on_failed.words and known:
                self.on_failed.failures.append((order, error))
            return
        if first:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + max(0.0, left)))
            until += ", then it fails" if error.proven else " or later"
            said = str(error).rstrip(".")
            text = "%s rejected by GraFx: %s%s; retrying until %s"
            retry_log.warning(text, order.task_id, said, project, until)
        if self.once or self.database.failing.get(order.task_id, {}).get("status") != error.status:
            seconds = round(time.time() - time.monotonic() + order.rejected)
            since = db.stamp(datetime.fromtimestamp(seconds, timezone.utc))
            record = {"status": error.status, "error": str(error), "since": since, "times": order.rejections}
            self.database.rejected(order.task_id, record)
        longest = self.settings.poll_interval if counts else LONGEST_PAUSE
        self.requeue(order, backoff(order.times, longest))

    def retry_later(self, order: Order, error: chili.TryAgainLater) -> None:
        """It could not be polled or delivered, through no fault of its own."""
        pause, hook = 0.0, isinstance(error, HookFailed)
        order.enter(WAITING if hook else "retrying", str(error))
        if hook:
            self.clear(order)
        # What was asked before the last outage ended says nothing about now.
        shared = error.shared and (self.outage.error is not None or order.polled >= self.outage.ended)
        if self.exit_code is not None:
            pass
        elif shared:
            self.outage.begin(error)
        else:
            pause = backoff(order.times, self.settings.poll_interval)
            text = "%s %s; retrying in %s" if hook else "%s cannot be polled: %s; retrying in %s"
            retry_log.warning(text, order.task_id, error, duration(max(pause, self.outage.pause())))
        self.requeue(order, pause)

    def stop(self) -> int:
        """End the commands, and write the results. Downloads are dropped."""
        notify("STOPPING=1")
        self.exit_code = self.exit_code or 0
        self.hook.stop()
        self.on_failed.stop()
        wait(self.polling, 0.5 if self.hook.words else 0.05)
        self.handle_results(0.0)
        self.judge()
        unwritten = self.database.flush(10.0 if self.once else 1.0)
        for order, _ in self.on_failed.failures:
            log.error("%s ON_FAILED was not run, since the poller stops", order.task_id)
        for file in self.claim.locks.values():
            db.note(file)  # nothing is wrong any more
        if not self.once:
            log.info("stopped, %d pending", len(self.orders) + unwritten)
            return self.exit_code or int(unwritten > 0)
        if self.orders:
            log.warning("%s not polled; the next run polls them", plural(len(self.orders), "order"))
        results = self.status.results
        said = ", ".join(f"{results[state]} {state}" for state in STATES if results[state])
        log.info("polled %s%s", plural(results.total(), "order"), said and f": {said}")
        fine = self.database.loaded and not self.database.problem and not self.orders
        fine = fine and not results.keys() & {"failed", WAITING, "retrying"} and not self.evidence.problem
        return self.exit_code or (0 if fine else 1)

    def judge(self) -> None:
        """With `once`: judge the rejections that may be meant for all, now that all orders were polled."""
        unjudged, self.evidence.unjudged = self.evidence.unjudged, []
        for order, error in unjudged:
            self.rejected(order, error)
            self.status.results[order.state] += 1
        if unjudged and not self.evidence.answered:
            self.evidence.say([order for order, _ in unjudged])


def forgotten(error: BaseException | None) -> BaseException | None:
    """What a poll's result means for an order that is older than GraFx keeps a task."""
    if isinstance(error, chili.TryAgainLater) and (error.shared or isinstance(error, HookFailed)):
        return error
    if isinstance(error, chili.TaskRejected) and error.proven:
        return error
    text = f"not finished after 7 days, when GraFx forgets a task; last answer: {error or 204}"
    return chili.TaskRejected(text, getattr(error, "status", None if error else 204), proven=True)


class Status:
    """What a person sees beside the log: the live line, systemd's status, the note for `db.py list`."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.ready = False  # the token endpoint has answered
        self.results: Counter[str] = Counter()  # of all polls
        self.states: tuple[Any, Counter[str]] = (None, Counter())  # of the orders, and as of which results
        self.last = self.note = ""  # the last delivery; what `db.py list` shows
        self.due = 0.0  # the next report
        self.ready_by = time.monotonic() + 30.0  # READY=1 is sent by then at the latest

    @property
    def pause(self) -> float:
        """Seconds between two reports."""
        return min(db.LOOK, 0.2) if self.screen.terminal else db.LOOK

    def report(self, poller: Poller) -> None:
        now = time.monotonic()
        if now < self.due:
            return
        if self.screen.gone():
            poller.exit_code = 1
        self.due, version = now + self.pause, self.results.total()
        if version != self.states[0]:  # there may be 20,000 of them
            self.states = version, Counter(order.state for order in poller.orders.values())
        polled = (order for order in poller.polling.values() if order and order.task_id in poller.orders)
        downloads = [order for order in polled if order.download]
        states = self.states[1] - Counter(order.state for order in downloads)
        states["downloading"] = len(downloads)
        counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        whom, problem, due = self.problem(poller, states)
        if (note := ": ".join(filter(None, (whom, problem)))) != self.note:
            self.note = note
            for file in poller.claim.locks.values():
                db.note(file, note)
        when = f" in {max(0.0, due - now):.0f} s" if due < NEVER else ""
        wrong = ", ".join(filter(None, (whom, f"retry{when}: {problem}"))) if problem else ""
        first = now >= self.ready_by or (self.ready and self.ready_by < NEVER)
        self.ready_by = NEVER if first else self.ready_by
        state = "; ".join(filter(None, (wrong, counts or "idle, 0 pending", self.last)))
        state += time.strftime(" (%H:%M:%S)")
        notify("READY=1\n" * first + f"WATCHDOG=1\nSTATUS={state}")  # it stops where the loop hangs
        loading = [f"{order.task_id[:8]} {order.download}" for order in downloads]
        following = f"next poll{when}" if when and not wrong else ""
        self.screen.show(" | ".join(filter(None, (wrong, *loading, counts, following, self.last))))

    def stalled(self, orders: Iterable[Order | None]) -> str:
        """Say which polls and downloads hang, each once and once as an error; returns it for the first."""
        said = []
        for order in filter(None, orders):
            if (silent := time.monotonic() - order.moved) >= STALLED:
                since = time.strftime("%H:%M", time.localtime(time.time() - silent))
                said.append(f"{order.task_id} has been waiting for its disk or network since {since}")
                if order.alarms < 1 + (silent >= ALARM):
                    order.alarms += 1
                    log.log(logging.ERROR if silent >= ALARM else logging.WARNING, "%s", said[-1])
        return said[0] if said else ""

    def problem(self, poller: Poller, states: Counter[str]) -> tuple[str, str, float]:
        """For whom something is wrong just now, what, and when the next try is, in monotonic seconds."""
        outage, due, whom, reasons = poller.outage, poller.next_due(), "", list[str]()
        if outage.error and (outage.pause() or poller.polling):  # else no order is left that would end it
            whom, reasons = "paused", [str(outage.error)]
        if outage.pause():
            due = time.monotonic() + outage.pause()
            whom, reasons = "paused", reasons or ["rate limited by GraFx"]
        reasons += filter(None, (poller.database.problem, poller.evidence.problem))
        stuck = []
        if not reasons and (states["retrying"] or states[WAITING]):
            orders = poller.orders.values()
            stuck = [order for order in orders if order.problem and order.state in ("retrying", WAITING)]
        if stuck:
            due = min(order.due for order in stuck)
            worst = max(stuck, key=lambda order: order.times)
            whom, reasons = plural(len(stuck), "order"), [worst.problem]
        reasons += filter(None, (self.stalled(poller.polling.values()),))
        return whom, "; ".join(reasons), due


# --- python poller.py ------------------------------------------------------------------------


def check(settings: Settings) -> int:
    """Try all that the poller needs, and say what is fine and what is not; returns the exit code."""
    grafx, code, pending = settings.grafx(), 0, list[str]()

    def database() -> str:
        store = db.rewrite(settings.database)
        prepare_folder(settings.database.parent)
        good = store.orders.keys() - store.failing.keys()
        pending.extend(task_id for task_id in store.orders if task_id in (good or store.orders))
        counts = f"{len(good)} pending, {len(store.orders) - len(good)} rejected"
        return f"{settings.database}: {counts}, {len(store.failed)} failed"

    def poll() -> str:
        if not grafx.token.issued:
            raise chili.TryAgainLater("not tried, since there is no token")
        return chili.check_environment(grafx, pending[-1] if pending else None)

    steps: dict[str, Callable[[], Any]] = {
        "settings": sources,
        "database": database,
        "folder": lambda: prepare_folder(settings.orders_dir),
        "token": lambda: grafx.token.get() and f"{settings.token_url} gave a token",
        "GraFx": poll,
    }
    for name, step in steps.items():
        try:
            said = f"ok    {name}: {step()}"
        except (db.DatabaseError, chili.TryAgainLater, chili.TaskRejected) as error:
            said = f"WRONG {name}: {error}"
            code = EX_CONFIG if isinstance(error, chili.CredentialsRejected) else code or 1
        print(said, flush=True)
    return code


def run(settings: Settings, screen: Screen) -> int:
    poller = Poller(settings, screen)
    try:
        return poller.run()
    except Exception as error:
        poller.hook.stop()
        poller.on_failed.stop()
        for _ in [*poller.polling]:  # what ended well is not done again
            with contextlib.suppress(Exception):
                poller.handle_results(0.0)
        with contextlib.suppress(Exception):
            poller.database.flush(1.0)
        if isinstance(error, RuntimeError) and "thread" in str(error):
            log.error("%s. %s", error, MORE_THREADS)
            return 1
        log.critical("the poller crashed, please report it", exc_info=True)
        return EX_SOFTWARE


def main() -> int:
    """`python poller.py`; returns the exit code."""
    # A parent may have them ignored or blocked. Where SIGCHLD is ignored, each command seems to end with 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for name in STOP_SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:  # as nohup has it
            signal.signal(name, lambda *_: os._exit(0))  # until there is a Poller, there is nothing to end
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
    try:
        screen = Screen(given.verbose)
    except RuntimeError as error:
        print(f"poller.py: {error}. {MORE_THREADS}", file=sys.stderr)
        return 1
    try:
        settings = load_settings()
        settings.once = given.once
        return check(settings) if given.check else run(settings, screen)
    except SettingsError as error:
        for line in str(error).splitlines():
            if given.check:
                print(f"WRONG settings: {line}", flush=True)
            else:
                log.error("%s", line)
        return EX_CONFIG
    except OSError as error:  # say, of what --check prints
        log.error("%s", error)
        return 1
    finally:
        screen.finish()


if __name__ == "__main__":
    os._exit(main())  # a thread that still hangs somewhere must not hold up the end
