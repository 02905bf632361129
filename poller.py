"""Fetch the files of finished GraFx orders: from `database.json` to `./orders`.

    python poller.py             poll every order, deliver, and go on until SIGTERM or Ctrl-C
    python poller.py --once      poll each order once, for cron
    python poller.py --check     try settings, database, folder, token and GraFx

The loop is `Poller.run`. What GraFx answers is in `chili.py`, what the file says in `db.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import heapq
import logging
import logging.handlers
import os
import queue
import re
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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
REJECTIONS = 3  # at least, before an order fails; see GIVE_UP_AFTER
MINUTE = 60.0  # seconds in which no retry warning of one kind is logged twice
ALARM = 600.0  # seconds of an outage before it is an error
OUTPUT = 10_000_000  # bytes of what a command prints that are kept
NEVER = float("inf")
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
    if host == "environment.chili-publish.online":
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


def beside(text: str) -> Path:
    return Path(os.path.realpath(db.HERE / text))  # a symbolic link stays one


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
    ("DATABASE", beside, "database.json"),
    ("ORDERS_DIR", beside, "orders"),
    ("ON_DONE", command, ""),
    ("ON_DONE_TIMEOUT", number(1, 86400), "300"),
)
REQUIRED = ("SERVER_ID", "SERVER_SECRET", "BASEURL", "ENVIRONMENT")


def load_settings() -> Settings:
    """The environment over `.env`. Raises SettingsError with all that is wrong."""
    wrong: list[str] = []
    found: dict[str, Any] = {}
    try:
        given = db.settings()
        if secret_file := given.get("SERVER_SECRET_FILE"):
            if "SERVER_SECRET" in given:
                raise ValueError("SERVER_SECRET is set as well: remove one of them")
            given["SERVER_SECRET"] = beside(secret_file).read_text("utf-8-sig").strip()
            if not given["SERVER_SECRET"]:
                raise ValueError("it is empty: write the secret into it")
    except db.DatabaseError as error:
        raise SettingsError(str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, too
        raise SettingsError(f"SERVER_SECRET_FILE: {error}") from None
    if not set(REQUIRED) & given.keys() and not (db.HERE / ".env").exists():
        raise SettingsError(
            f"no settings yet: in {db.HERE}, cp .env.example .env, and fill in its four lines"
        )
    for name, read, default in READERS:
        try:
            if name in REQUIRED and not given.get(name):
                raise ValueError(f"is missing: put {default} into {db.HERE / '.env'} or the environment")
            found[name.lower()] = read(given.get(name, default))
        except ValueError as error:
            wrong.append(f"{name} {error}")
    if wrong:
        raise SettingsError("\n".join(wrong))
    return Settings(**found)


class CannotWrite(chili.TryAgainLater):
    """ORDERS_DIR takes no file."""


def disk_error(folder: Path, error: OSError) -> chili.TryAgainLater:
    text = f"cannot write to {folder}: {error.strerror}. "
    if error.errno == errno.EFBIG:  # others may be smaller
        return chili.TryAgainLater(f"{text}Raise the limit (ulimit -f).")
    return CannotWrite(text + db.advice(error), shared=True)


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
            # A terminal that was made narrower has wrapped the line: all of its rows have to go.
            up = max(0, len(self.drawn) - 1) // width
            self.drawn = line[: width - 1]
            # ?7l, ?7h: no wrapping, however wide the letters of some languages are.
            self.stream.write("\r" + f"\x1b[{up}A" * bool(up) + f"\x1b[J\x1b[?7l{self.drawn}\x1b[?7h")
            self.stream.flush()

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
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- the orders ------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Order:
    """A pending order. Times are monotonic seconds."""

    task_id: str
    project: str
    added: float  # by its `added`, else when it was first seen
    state: str = "new"  # rendering, rejected, retrying, waiting for ON_DONE
    since: float = 0.0  # when it came into this state
    times: int = 0  # polls that ended in this state, without another in between
    problem: str = ""
    due: float = 0.0  # when to poll it; infinity while it is polled
    polled: float = 0.0  # when it was polled last
    size: int = 0  # bytes of its file that have come
    download: str = ""  # how far that is, as long as it goes on

    def enter(self, state: str, problem: str = "") -> None:
        """The one change of state; pauses, rejections and GIVE_UP_AFTER follow from what it counts."""
        if state != self.state:
            self.state, self.since, self.times = state, time.monotonic(), 0
        self.times, self.problem = self.times + 1, problem

    def progress(self, size: int, total: int | None) -> None:
        """The download calls this for each piece."""
        speed = size / max(0.001, time.monotonic() - self.polled)
        share = f"{100 * size // total}% of {chili.format_size(total)}" if total else chili.format_size(size)
        self.size, self.download = size, f"{share}, {chili.format_size(speed)}/s"


def monotonic(when: Any) -> float:
    """A time in the file in monotonic seconds; now for what is no time, or lies ahead."""
    now = time.monotonic()  # a clock that is set back does not stop the polls
    with contextlib.suppress(ValueError, OverflowError):
        return min(now, now - time.time() + db.utc(str(when)).timestamp())
    return now


def backoff(times: int, longest: float) -> float:
    """2 s, 4 s, 8 s, … up to `longest`."""
    return min(longest, SHORTEST_PAUSE * 2.0 ** min(times - 1, 20))


class Outage:
    """What affects every order, and until when none is polled. Times are monotonic seconds."""

    def __init__(self, longest: float) -> None:
        self.longest = longest  # seconds between two tries
        self.error: chili.TryAgainLater | None = None
        self.since = self.until = 0.0  # when it began; the next try
        self.said: set[str] = set()  # what was logged of it
        self.quiet = self.ended = 0.0  # until when the next one is not logged; when the last one was over
        self.limited = 0.0  # until when GraFx wants no request

    def begin(self, error: chili.TryAgainLater) -> None:
        """It was met, perhaps once more."""
        now = time.monotonic()
        if self.error is None:
            self.since, self.said = now, set()
        self.error = error
        if now >= self.until:  # 2 s, 4 s, 8 s, …, as long as it has lasted
            self.until = now + min(self.longest, SHORTEST_PAUSE + now - self.since)
        if str(error) not in self.said and now >= self.quiet:
            log.warning("paused: %s; retrying in %s", error, duration(self.until - now))
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


# --- ON_DONE ---------------------------------------------------------------------------------


class HookFailed(chili.TryAgainLater):
    """The file is here, but ON_DONE has not ended with 0."""


class Hook:
    """ON_DONE: a command for each file that was downloaded."""

    def __init__(self, words: list[str], timeout: float) -> None:
        self.words, self.timeout = words, timeout
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def run(self, order: Order, file: Path) -> None:
        """Run the command for an order's file. Raises HookFailed unless it ends by itself, with 0."""
        if self.stopping:
            raise HookFailed("the poller is stopping")
        if not file.is_file():
            raise HookFailed("its file was removed before ON_DONE could run")
        with tempfile.TemporaryFile() as output:  # not a pipe, which what it leaves running would hold open
            fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)  # so that it can be truncated
            process = self.start(order, file, output)
            why = self.wait(process, output)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 10_000))
            text = output.read().decode(errors="replace")
        lines = list(filter(None, map(chili.sanitize, text.splitlines())))[-10:]
        code = process.returncode
        fine = code == 0 and not why
        for line in lines if fine else lines[:-1]:  # the last one is in the error
            (log if fine else retry_log).info("%s ON_DONE: %s", order.task_id, line)
        if fine:
            return
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with {code}"
        raise HookFailed(": ".join((f"ON_DONE {why or how}", *lines[-1:])))

    def start(self, order: Order, file: Path, output: Any) -> subprocess.Popen[bytes]:
        words = [word.replace("{}", str(file)) for word in self.words]
        if words == self.words:
            words.append(str(file))
        env = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        env |= {"TASK_ID": order.task_id, "PROJECT_ID": order.project, "ORDER_FILE": str(file)}
        try:
            process = subprocess.Popen(  # noqa: S603 - no shell, and the words are the user's own
                words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise HookFailed(f"ON_DONE cannot be run: {error}") from None
        self.running.add(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], output: Any) -> str:
        """Until it has ended; by force at its timeout, or when the poller stops. Returns why by force."""
        deadline, why = time.monotonic() + self.timeout, ""
        while process.poll() is None:
            if os.fstat(output.fileno()).st_size > OUTPUT:  # not after its end
                output.truncate(0)
            if self.stopping and not why:
                deadline, why = time.monotonic() + 0.8, "was ended because the poller stops"
                signal_group(process, signal.SIGTERM)
            if time.monotonic() >= deadline:
                why = why or f"took longer than {self.timeout:g} s"
                signal_group(process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        if process.returncode or why:
            signal_group(process, signal.SIGKILL)  # what it left running
        self.running.discard(process)
        return why

    def stop(self) -> None:
        """Have all that run ended, whose exit code does not count then; no more are started."""
        self.stopping = True
        deadline = time.monotonic() + 1.5
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)


def signal_group(process: subprocess.Popen[bytes], how: int) -> None:
    """To a command and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


# --- the loop --------------------------------------------------------------------------------


class Poller:
    """The single loop, and one method for each result. All state is the loop's.

    A pending order is in `orders`, and either in `queue` until it is due or in `polling` while a thread polls
    it. One that has ended is a result in `database`, until the file says so.
    """

    def __init__(self, settings: Settings, screen: Screen, lock: TextIO, once: bool) -> None:
        self.settings, self.once = settings, once
        self.grafx = settings.grafx()
        self.database = db.Database(settings.database, once)
        self.orders: dict[str, Order] = {}
        self.queue: list[tuple[float, str]] = []  # a heap; an entry that is not its order's `due` is stale
        self.polling: dict[Future[Any], Order | None] = {}  # None: the first token
        self.results: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(settings.concurrency)
        self.outage = Outage(settings.poll_interval)
        self.hook = Hook(settings.on_done, settings.on_done_timeout)
        self.status = Status(screen, lock)
        self.ready = self.stopping = False  # ready: the token endpoint has answered
        self.exit_code = 0
        store, failing = self.database.start(), self.database.failing
        counts = f"{len(store.orders) - len(failing)} pending, {len(failing)} failing"
        counts += f", {len(store.failed)} failed, {len(self.database.deliveries.ids)} delivered"
        log.info("GraFx order poller %s: %s, %s: %s", VERSION, settings.database, settings.baseurl, counts)
        for task_id, fields in store.orders.items():
            self.add(task_id, fields)
        for name in STOP_SIGNALS:
            if signal.getsignal(name) != signal.SIG_IGN:
                signal.signal(name, self.on_signal)

    def run(self) -> int:
        """Poll until a signal, with `once` until each order was polled; returns the exit code."""
        while not self.stopping and not (self.once and self.is_done()):
            self.sync_orders()
            self.poll_due_orders()
            self.handle_results()
            self.status.report(self)
        return self.stop()

    def is_done(self) -> bool:
        """With `once`: an outage is not waited for."""
        return self.ready and not self.polling and (not self.orders or self.outage.pause() > 0)

    def on_signal(self, *_: object) -> None:
        """Set a flag, wake the loop, and nothing else: a signal may interrupt anything."""
        self.stopping = True
        self.results.put(None)

    def sync_orders(self) -> None:
        """Write the results; see which orders came into the file, and which were removed from it."""
        new, gone = self.database.sync(idle=not self.polling and self.next_due() > time.monotonic())
        if self.once:
            return
        if new or gone:
            self.status.states = None, Counter()  # to be counted anew
        for task_id, fields in new.items():
            self.add(task_id, fields)
            if len(new) <= 5:
                project = self.orders[task_id].project
                log.info("%s added%s", task_id, f" (project {project})" if project else "")
        for task_id in gone:
            del self.orders[task_id]
            if len(gone) <= 5:
                log.info("%s removed from the file by somebody", task_id)
        for task_ids, what in ((new, "added"), (gone, "removed from the file by somebody")):
            if len(task_ids) > 5:
                log.info("%d orders %s", len(task_ids), what)

    def add(self, task_id: str, fields: db.Fields) -> None:
        """Know an order of the file; where an earlier process saw it rejected, that counts on."""
        for order in self.polling.values():
            if order and order.task_id == task_id:  # removed and added again while it is polled
                self.orders[task_id] = order
                return
        order = Order(task_id, chili.sanitize(fields.get("projectID") or ""), monotonic(fields.get("added")))
        if record := self.database.failing.get(task_id):
            order.state, order.since = "rejected", monotonic(record.get("since"))
            times = record.get("times")
            # The daemon polls it three times more, since it does not note each time.
            order.times = times if self.once and isinstance(times, int) else 0
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
            order.polled, order.due = time.monotonic(), NEVER
        future = self.pool.submit(self.poll, order) if order else self.pool.submit(self.grafx.token.get)
        self.polling[future] = order
        future.add_done_callback(self.results.put)

    def poll(self, order: Order) -> Path | None:
        """In a thread: `chili.order_done`, then ON_DONE where it is set; None while the task renders."""
        try:
            file = chili.order_done(order.task_id, self.grafx, self.settings.orders_dir, order.progress)
        except OSError as error:
            raise disk_error(self.settings.orders_dir, error) from None
        order.download = ""
        try:
            if file and self.hook.words:
                self.hook.run(order, file)
        except OSError as error:  # no room for its output
            raise HookFailed(f"ON_DONE cannot be run: {error}") from None
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
            self.exit_code, self.stopping = EX_CONFIG, True
        if isinstance(error, chili.TryAgainLater) and error.retry_after:
            retry_log.warning("rate limited: Retry-After %.0f s", error.retry_after)
            self.outage.limited = max(self.outage.limited, time.monotonic() + error.retry_after)
        if order:
            self.end_outage(order, error)
            if isinstance(error, chili.TaskRejected):
                self.rejected(order, error)
            elif isinstance(error, chili.TryAgainLater):
                self.retry_later(order, error)
            elif file := future.result():
                self.delivered(order, file)
            else:
                self.pending(order)
            order.size, order.download = 0, ""
            self.status.results[order.state] += 1
            return
        self.ready = True  # orders are polled from now on, and systemd is told
        if self.outage.error and not error:
            self.outage.end()
        elif isinstance(error, chili.TryAgainLater) and not self.stopping:
            self.outage.begin(error)

    def end_outage(self, order: Order, error: BaseException | None) -> None:
        """Where this poll began after the outage did, and shows that it is over."""
        if self.outage.error is None or order.polled < self.outage.since:
            return
        if isinstance(self.outage.error, CannotWrite):  # only a new file shows that the disk takes one
            over = order.size > 0 and (error is None or isinstance(error, HookFailed))
        else:  # a file that was here says nothing about GraFx
            shared = isinstance(error, chili.TryAgainLater) and error.shared
            over = order.state != WAITING and not shared
        if over:
            self.outage.end()

    def delivered(self, order: Order, file: Path) -> None:
        """Its file is whole on the disk, and ON_DONE has run: it may leave database.json."""
        order.enter("delivered")
        self.orders.pop(order.task_id, None)  # somebody may have removed it meanwhile
        self.database.delivered(order.task_id, file.name)
        self.status.last = f"last delivery {time.strftime('%H:%M:%S')}"
        size = chili.format_size(order.size) if order.size else "downloaded before"
        place, took = f"{file.parent.name}/{file.name}", duration(time.monotonic() - order.added)
        log.info("%s delivered to %s (%s, %s after it was added)", order.task_id, place, size, took)

    def pending(self, order: Order) -> None:
        """204: GraFx renders it."""
        order.enter("rendering")
        self.database.pending(order.task_id)
        # So a file is here at most a quarter of its render time (and 2 s) after it is ready,
        # and an order that renders for an hour is not polled 1,800 times.
        quarter = (time.monotonic() - order.added) / 4
        self.requeue(order, min(self.settings.poll_interval, max(SHORTEST_PAUSE, quarter)))

    def rejected(self, order: Order, error: chili.TaskRejected) -> None:
        """There is no file, GraFx says. It fails when that was so for GIVE_UP_AFTER without a break."""
        order.enter("rejected", str(error))
        left = order.since + self.settings.give_up_after - time.monotonic()
        project = order.project or "not given"
        if error.final or (order.times >= REJECTIONS and left <= 0):
            order.enter("failed")
            self.orders.pop(order.task_id, None)
            self.database.failed(order.task_id, error.status, str(error))
            log.error("%s failed (project %s): %s", order.task_id, project, error)
            return
        if order.times == 1:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + max(0.0, left)))
            text = "%s rejected by GraFx: %s (project %s); retrying until %s, then it fails"
            retry_log.warning(text, order.task_id, error, project, until)
        if self.once or self.database.failing.get(order.task_id, {}).get("status") != error.status:
            seconds = round(time.time() - time.monotonic() + order.since)
            since = db.stamp(datetime.fromtimestamp(seconds, timezone.utc))
            record = {"status": error.status, "error": str(error), "since": since, "times": order.times}
            self.database.rejected(order.task_id, record)
        self.requeue(order, backoff(order.times, self.settings.poll_interval))

    def retry_later(self, order: Order, error: chili.TryAgainLater) -> None:
        """It could not be polled or delivered, through no fault of its own."""
        pause, hook = 0.0, isinstance(error, HookFailed)
        order.enter(WAITING if hook else "retrying", str(error))
        self.database.pending(order.task_id)
        # What was asked before the last outage ended says nothing about now.
        shared = error.shared and (self.outage.error is not None or order.polled >= self.outage.ended)
        if shared and not self.stopping:
            self.outage.begin(error)
        elif not self.stopping:
            pause = backoff(order.times, self.settings.poll_interval)
            text = "%s %s; retrying in %s" if hook else "%s cannot be polled: %s; retrying in %s"
            retry_log.warning(text, order.task_id, error, duration(pause))
        self.requeue(order, pause)

    def stop(self) -> int:
        """End the commands, and write the results. Downloads are dropped."""
        notify("STOPPING=1")
        self.stopping = True
        self.hook.stop()
        self.handle_results(0.5 if self.hook.words and self.polling else 0.05)
        written, left, results = self.database.flush(), len(self.orders), self.status.results
        db.note(self.status.lock)  # nothing is wrong any more
        if not self.once:
            log.info("stopped, %d pending", left)
            return self.exit_code
        if left:
            log.warning("%s not polled; the next run polls them", plural(left, "order"))
        said = ", ".join(f"{results[state]} {state}" for state in STATES if results[state])
        log.info("polled %s%s", plural(results.total(), "order"), said and f": {said}")
        fine = written and not left and not results.keys() & {"failed", WAITING, "retrying"}
        return self.exit_code or (0 if fine else 1)


class Status:
    """What a person sees beside the log: the live line, systemd's status, the note for `db.py list`."""

    def __init__(self, screen: Screen, lock: TextIO) -> None:
        self.screen, self.lock = screen, lock
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
        self.due, version = now + self.pause, self.results.total()
        if version != self.states[0]:  # there may be 20,000 of them
            self.states = version, Counter(order.state for order in poller.orders.values())
        polled = (order for order in poller.polling.values() if order and order.task_id in poller.orders)
        downloads = [order for order in polled if order.download]
        states = self.states[1] - Counter(order.state for order in downloads)
        states["downloading"] = len(downloads)
        counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        problem, due = self.problem(poller, states)
        if problem != self.note:
            self.note = problem
            db.note(self.lock, problem)
        when = f" in {max(0.0, due - now):.0f} s" if due < NEVER else ""
        wrong = f"retrying{when}: {problem}" if problem else ""
        first = now >= self.ready_by or (poller.ready and self.ready_by < NEVER)
        self.ready_by = NEVER if first else self.ready_by
        state = "; ".join(filter(None, (wrong, counts, self.last)))
        notify("READY=1\n" * first + f"WATCHDOG=1\nSTATUS={state}")  # it stops where the loop hangs
        loading = [f"{order.task_id[:8]} {order.download}" for order in downloads]
        following = f"next poll{when}" if when and not wrong else ""
        self.screen.show(" | ".join(filter(None, (wrong, *loading, counts, following, self.last))))

    def problem(self, poller: Poller, states: Counter[str]) -> tuple[str, float]:
        """What is wrong just now, and when the next try is, in monotonic seconds."""
        outage, due = poller.outage, poller.next_due()
        reasons = []
        if outage.error and (outage.pause() or poller.polling):  # else no order is left that would end it
            reasons = [f"paused: {outage.error}"]
        if outage.pause():
            due = time.monotonic() + outage.pause()
            reasons = reasons or ["rate limited by GraFx"]
        if poller.database.problem:
            reasons.append(poller.database.problem)
        stuck = []
        if not reasons and (states["retrying"] or states[WAITING]):
            orders = poller.orders.values()
            stuck = [order for order in orders if order.problem and order.state in ("retrying", WAITING)]
        if stuck:
            due = min(order.due for order in stuck)
            oldest = min(stuck, key=lambda order: order.since)
            reasons = [f"{plural(len(stuck), 'order')}: {oldest.problem}"]
        return "; ".join(reasons), due


# --- python poller.py ------------------------------------------------------------------------


def check(settings: Settings) -> int:
    """Try all that the poller needs, and say what is fine and what is not; returns the exit code."""
    grafx, code = settings.grafx(), 0

    def database() -> str:
        store = db.read(settings.database)
        with db.lock(settings.database, "lock", db.PATIENCE):  # it can be had, so the file can be written
            return f"{settings.database}: {len(store.orders)} pending, {len(store.failed)} failed"

    steps: dict[str, Callable[[], Any]] = {
        "settings": lambda: "complete",
        "database": database,
        "folder": lambda: prepare_folder(settings.orders_dir),
        "token": lambda: grafx.token.get() and f"{settings.token_url} gives one",
        "GraFx": lambda: chili.check_environment(grafx),
    }
    for name, step in steps.items():
        try:
            said = f"ok    {name}: {step()}"
        except (db.DatabaseError, chili.TryAgainLater, chili.TaskRejected) as error:
            said = f"WRONG {name}: {error}"
            code = EX_CONFIG if isinstance(error, chili.CredentialsRejected) else code or 1
        print(said, flush=True)
    return code


def run(settings: Settings, screen: Screen, once: bool) -> int:
    """Be the only poller of this database. Raises DatabaseError, CannotWrite, OSError."""
    with db.lock(settings.database, "pid", patience=0) as lock:
        db.note(lock)
        prepare_folder(settings.orders_dir)
        chili.remove_leftovers(settings.orders_dir)
        poller = Poller(settings, screen, lock, once)
        try:
            return poller.run()
        except Exception:
            poller.hook.stop()
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
        description="Fetch the files of finished GraFx orders: from database.json to ./orders.",
        epilog="Settings come from the environment and .env; README.md lists them. Exit codes:"
        " 1 an order failed or could not be polled; 70 please report it; 78 wrong settings or credentials.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="poll each order once, and end")
    what.add_argument("--check", action="store_true", help="try settings, database, folder, token and GraFx")
    parser.add_argument("-v", "--verbose", action="store_true", help="log each request, without any secret")
    given = parser.parse_args()
    screen = Screen(given.verbose)
    try:
        settings = load_settings()
        return check(settings) if given.check else run(settings, screen, given.once)
    except SettingsError as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return EX_CONFIG
    except (db.DatabaseError, CannotWrite, OSError) as error:
        log.error("%s", error)
        return 1
    finally:
        screen.finish()


if __name__ == "__main__":
    os._exit(main())  # a thread that still hangs somewhere must not hold up the end
