"""Fetch the files of finished GraFx orders: from `database.json` to `./orders`.

    python poller.py             ask about every order, deliver, and go on until SIGTERM or Ctrl-C
    python poller.py --once      ask about each order once, for cron
    python poller.py --check     try settings, database, folder, token and GraFx

The loop is `Poller.run`. What GraFx says is in `chili.py`, what the file says in `db.py`.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the slow imports: until `Poller.begin`, a stop needs no words
    for _name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_name) != signal.SIG_IGN:  # as nohup has it
            signal.signal(_name, lambda *_: os._exit(0))

import argparse
import contextlib
import heapq
import ipaddress
import itertools
import logging
import logging.handlers
import queue
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import chili
import db

VERSION = "2026-11-25"
EX_SOFTWARE, EX_CONFIG = 70, 78  # sysexits.h: "internal software error", "configuration error"
SHORTEST_PAUSE = 2.0  # seconds between two questions about one order; CHILI's own client takes 2
REFUSALS = 3  # the least, before an order has failed; see GIVE_UP_AFTER
PROGRESS = 10.0  # seconds between two log lines about one download
MINUTE = 60.0  # seconds until a trouble is told again; then after 4, 16, 64, and once an hour
STATES = ("delivered", "new", "rendering", "downloading", "not handed over", "failing", "failed", "stuck")
ALARM = 600.0  # seconds that all orders wait before it is an error
HIDDEN = ("SERVER_ID", "SERVER_SECRET", "SERVER_SECRET_FILE", "FRONT_ID", "FRONT_SECRET",
          "CREDENTIALS_DIRECTORY")  # fmt: skip

log = logging.getLogger("poller")
REDRAW = logging.makeLogRecord({})  # no line of the log, but the live line is another one


# --- settings --------------------------------------------------------------------------------


class SettingsError(Exception):
    """All that is wrong with the settings, a line each with the mend."""


@dataclass(frozen=True)
class Settings:
    """What the environment and `.env` say. Times are seconds."""

    server_id: str
    server_secret: str = field(repr=False)
    baseurl: str
    environment: str
    token_url: str
    poll_interval: float
    give_up_after: float
    concurrency: int
    database: Path
    orders_dir: Path
    on_done: list[str]
    on_done_timeout: float


def address(url: str) -> str:
    try:
        scheme, host, _ = chili.origin(url)
        # It must still be the same server when requests has cleaned it.
        if set("?#@") & set(url) or chili.origin(chili.cleaned(url)) != chili.origin(url):
            raise ValueError
    except ValueError:
        raise ValueError("is no web address: write it as https://HOST") from None
    if host == "environment.chili-publish.online":
        raise ValueError("is still the example's: write your environment's name in the place of ENVIRONMENT")
    if scheme == "http" and not is_loopback(host):
        raise ValueError("must begin with https://, else the token travels unencrypted")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def environment_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise ValueError("is no environment's name: letters, digits, '.', '_' and '-'")
    return text


def number(least: float, most: float, kind: Callable[[str], Any] = float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise ValueError(f"is {text!r}: write a {'whole ' * (kind is int)}number from {least:g} to {most:g}")

    return read


def beside(text: str) -> Path:
    return db.HERE / text


def real_file(text: str) -> Path:
    return Path(os.path.realpath(db.HERE / text))


def command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split into words ({error}): close its quotes") from None
    if words and "/" in words[0]:
        words[0] = str(db.HERE / words[0])
    if words and not shutil.which(words[0]):
        raise ValueError(
            f"names {words[0]}, which cannot be found or run: install it, or write its whole path"
        )
    return words


# Its name, in lower case, is its field of `Settings`; how it is read; its default, or for those that are
# REQUIRED what has to be written there.
READERS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("SERVER_ID", str, "the integration's client id"),
    ("SERVER_SECRET", str, "the integration's client secret"),
    ("BASEURL", address, "https://ENVIRONMENT.chili-publish.online"),
    ("ENVIRONMENT", environment_name, "the environment's name, as in cp-abc-123,"),
    ("TOKEN_URL", address, "https://integration-login.chiligrafx.com/oauth/token"),
    ("POLL_INTERVAL", number(0.1, 3600), "60"),  # GraFx keeps a file for 4 hours
    ("GIVE_UP_AFTER", number(0, 604800), "3600"),  # GraFx forgets a task after 7 days
    ("CONCURRENCY", number(1, 64, int), "8"),
    ("DATABASE", real_file, "database.json"),
    ("ORDERS_DIR", beside, "orders"),
    ("ON_DONE", command, ""),
    ("ON_DONE_TIMEOUT", number(1, 86400), "300"),
)
REQUIRED = ("SERVER_ID", "SERVER_SECRET", "BASEURL", "ENVIRONMENT")


def load_settings() -> Settings:
    """Raises SettingsError with all that is wrong."""
    wrong: list[str] = []
    found: dict[str, Any] = {}
    try:
        given = db.settings()
        add_secret(given)
    except (db.DatabaseError, ValueError) as error:
        raise SettingsError(str(error)) from None
    if not set(REQUIRED) & given.keys() and not (db.HERE / ".env").exists():
        raise SettingsError(
            f"no settings yet: in {db.HERE}, cp .env.example .env, and fill in its four lines"
        )
    for name, read, default in READERS:
        if name in REQUIRED and name not in given:
            wrong.append(f"{name} is missing: put {default} into {db.HERE / '.env'} or the environment")
            continue
        try:
            found[name.lower()] = read(given.get(name, default))
        except ValueError as error:
            wrong.append(f"{name} {error}")
    if wrong:
        raise SettingsError("\n".join(wrong))
    return Settings(**found)


def environment_of(settings: Settings) -> chili.GraFx:
    """The environment of GraFx that the settings speak of."""
    return chili.GraFx(
        settings.baseurl, settings.environment, settings.token_url,
        settings.server_id, settings.server_secret, settings.concurrency,
    )  # fmt: skip


def add_secret(given: dict[str, str]) -> None:
    """What SERVER_SECRET_FILE names becomes SERVER_SECRET. Raises ValueError."""
    if "SERVER_SECRET_FILE" not in given:
        return
    if "SERVER_SECRET" in given:
        raise ValueError("SERVER_SECRET and SERVER_SECRET_FILE are both set: remove one of them")
    try:
        text = beside(given["SERVER_SECRET_FILE"]).read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"SERVER_SECRET_FILE: {error}: name a file that holds the secret and can be read"
        ) from None
    if not text:
        raise ValueError("SERVER_SECRET_FILE is empty: put the integration's client secret into it")
    given["SERVER_SECRET"] = text


def prepare_folder(orders_dir: Path) -> None:
    """Make the folder where it is missing, and see that a file can be made. Raises OSError."""
    trial = orders_dir / ".trial.part"
    try:
        if not orders_dir.is_dir():
            orders_dir.mkdir()
            db.sync_folder(orders_dir.parent)
        trial.touch()
        trial.unlink()
    except OSError as error:
        said = f"cannot write to ORDERS_DIR, {orders_dir}: {error.strerror}. {db.mend(error)}"
        raise OSError(said) from None


# --- what a person sees ----------------------------------------------------------------------


class Screen(logging.StreamHandler):  # type: ignore[type-arg]  # 3.10 knows no argument
    """The log on stderr: in a terminal with a live line below it, under systemd as the journal likes it.

    A thread of its own writes it, since nobody may read it: a full pipe or Ctrl-S must hold up neither a
    delivery nor the stop. What does not fit into its queue is dropped, and counted.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.terminal, self.dropped = sys.stderr.isatty(), 0
        self.live = self.line = ""  # the live line as it should be, and as it is drawn
        stat = os.fstat(2)  # systemd.exec(5): so one knows that stderr is the journal itself
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
        stamp = "" if self.journal else "%(asctime)s %(levelname)-7s "
        self.setFormatter(logging.Formatter(stamp + "%(message)s", "%Y-%m-%d %H:%M:%S"))
        self.queue: queue.Queue[Any] = queue.Queue(1000)
        self.inlet = logging.handlers.QueueHandler(self.queue)
        self.inlet.enqueue = self.enqueue  # type: ignore[method-assign]
        logging.handlers.QueueListener(self.queue, self).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put(record, timeout=0.0 if self.dropped else 0.2)  # mostly it is only slow
        except queue.Full:
            self.dropped += 1

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self.journal:  # sd-daemon(3): a level for each line, or a traceback would lose it
            level = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            return "\n".join(f"<{level}>{line}" for line in text.splitlines())
        colour = {"WARNING": 33, "ERROR": 31, "CRITICAL": 31}.get(record.levelname)
        colour = 32 if hasattr(record, "good") else colour
        if colour and self.terminal and not os.environ.get("NO_COLOR"):  # no-color.org
            return f"\x1b[{colour}m{text}\x1b[0m"
        return text

    def emit(self, record: logging.LogRecord) -> None:
        if record is not REDRAW:
            self.draw("")
            if dropped := self.dropped:
                self.dropped -= dropped
                text = f"{dropped} lines of the log were dropped, since nobody read them"
                super().emit(logging.makeLogRecord({"msg": text, "levelname": "WARNING"}))
            super().emit(record)
        self.draw(self.live)

    def show(self, line: str) -> None:
        """Put `line` in the place of the live line; where more is to be written, that brings it along."""
        if self.terminal:
            self.live = line
            if self.queue.empty():
                self.enqueue(REDRAW)

    def draw(self, line: str) -> None:
        if not self.terminal:
            return
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(2).columns or 80
            if line[: width - 1] == self.line:
                return
            # A terminal that was made narrower has broken the line: all of its rows have to go.
            up = max(0, len(self.line) - 1) // width
            self.line = line[: width - 1]
            # ?7l, ?7h: it breaks no line now, however wide the letters of some languages are.
            self.stream.write("\r" + f"\x1b[{up}A" * bool(up) + f"\x1b[J\x1b[?7l{self.line}\x1b[?7h")
            self.stream.flush()

    def finish(self) -> None:
        """Let what was said be written, where it can be."""
        deadline = time.monotonic() + 0.5
        while self.queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)


def notify(state: str) -> None:
    """Tell systemd, where it asked to be told: a datagram to $NOTIFY_SOCKET, see sd_notify(3)."""
    place = os.environ.get("NOTIFY_SOCKET")
    if not place:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(state.encode(errors="replace"), re.sub("^@", "\0", place))  # @: an abstract one


def duration(seconds: float) -> str:
    """Seconds as "4.7 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def clock(seconds: float = 0.0) -> str:
    """The time of day, in so many seconds."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))


# --- the orders ------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Order:
    """A waiting order, as long as this process knows it. Times are monotonic seconds."""

    task_id: str
    project: str
    born: float  # by its `added`, else when it was first seen
    due: float = 0.0
    asked: float = 0.0  # when it was asked about last; 0: not yet
    state: str = "new"  # rendering, failing, stuck, or its file "not handed over"
    refusals: int = 0  # in a row
    refused: float = 0.0  # since when
    troubles: int = 0  # in a row: it could not be asked
    met: tuple[str, ...] = ()  # kinds of trouble that it is in, see Troubles
    gone: bool = False  # somebody took it out while it was asked about
    size: int = 0  # bytes of its file that came by now
    total: int | None = None
    began: float = 0.0  # when the first of them came; 0: it is not being downloaded
    logged: float = 0.0  # when its progress was logged

    def progress(self, size: int, total: int | None) -> None:
        """The download calls this for each piece."""
        self.began = self.began or time.monotonic()
        self.total, self.size = total, size

    def loading(self) -> str:
        """How far its download is; nothing where there is none under way."""
        if not (began := self.began):  # read once: its thread may end it just now
            return ""
        seconds = max(0.001, time.monotonic() - began)
        share = f"{100 * self.size // self.total}% of {chili.human(self.total)}" if self.total else ""
        return f"{share or chili.human(self.size)}, {chili.human(self.size / seconds)}/s"


def since(when: Any) -> float:
    """A time in the file in monotonic seconds; now for what is no time, or lies ahead.

    By the monotonic clock ages count on: a clock that is set back does not stop the questions.
    """
    now = time.monotonic()
    with contextlib.suppress(ValueError, OverflowError):
        return min(now, now - time.time() + db.utc(str(when)).timestamp())
    return now


class Waiting(dict[str, Order]):
    """The orders that wait for their next question, by id; and which is due next."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[float, str]] = []  # an entry that is not its order's `due` is stale

    def put(self, order: Order, pause: float) -> None:
        """Re-queue an order for in so many seconds; all the while it stays in database.json."""
        order.due = time.monotonic() + pause
        self[order.task_id] = order
        heapq.heappush(self._heap, (order.due, order.task_id))
        if len(self._heap) > 2 * len(self) + 100:  # most of it is of orders that were taken out by id
            self._heap = [(order.due, task_id) for task_id, order in self.items()]
            heapq.heapify(self._heap)

    def first(self) -> float:
        """When the next one is due, in monotonic seconds; infinity where none waits."""
        while self._heap:
            due, task_id = self._heap[0]
            if task_id in self and self[task_id].due == due:
                return due
            heapq.heappop(self._heap)
        return float("inf")

    def take_first(self) -> Order:
        """Take out the one that `first` speaks of."""
        return self.pop(heapq.heappop(self._heap)[1])


@dataclass(eq=False)
class Trouble:
    """What orders meet, and who is in it. Times are monotonic seconds."""

    text: str
    remind: bool
    orders: dict[str, Order]
    since: float
    due: float  # when it is told again
    unsaid: int = 0  # orders that met it since it was said


def kind_of(text: str) -> str:
    """What is the same for many orders: a text without its ids and numbers."""
    return re.sub(r"[\w-]*\d[\w.-]*", "#", text)


class Troubles:
    """What orders meet on their own, each kind said once for all, then now and then, then when it is over."""

    def __init__(self) -> None:
        self._kinds: dict[str, Trouble] = {}

    def meet(self, order: Order, text: str, more: str = "", remind: bool = True, quiet: bool = False) -> None:
        """The order is in it; `more` is only said of this order."""
        kind = kind_of(text)
        if kind not in self._kinds:
            now, of_all = time.monotonic(), text.replace(order.task_id, "#")
            self._kinds[kind] = Trouble(of_all, remind, {}, now, now + MINUTE)
            if not quiet:
                log.warning("%s %s%s", order.task_id, text, more)
        elif kind not in order.met:
            self._kinds[kind].unsaid += not quiet
        self._kinds[kind].orders[order.task_id] = order
        order.met = (*(other for other in order.met if other != kind), kind)  # the present one stands last

    def leave(self, order: Order, quiet: bool = False) -> None:
        """The order is out of all of them; `quiet` where it did not end well, and that is said already."""
        for kind in order.met:
            trouble = self._kinds[kind]
            del trouble.orders[order.task_id]
            if not trouble.orders:
                del self._kinds[kind]
                more = f" ({trouble.unsaid} more orders met it)" if trouble.unsaid else ""
                if not quiet:
                    log.info("over: %s %s%s", order.task_id, trouble.text, more)
        order.met = ()

    def tell(self) -> None:
        """After 1, 4, 16 … minutes what is still not over, or was met by more orders."""
        now = time.monotonic()
        for trouble, stuck in self.present():
            if now < trouble.due or not (trouble.remind or trouble.unsaid):
                continue
            lasts, others = now - trouble.since, len(stuck) - 3
            some = ", ".join(sorted(stuck)[:3]) + f" and {others} more" * (others > 0)
            more = f" ({trouble.unsaid} more met it)" * bool(trouble.unsaid)
            log.warning("still after %s%s: %s %s", duration(lasts), more, some, trouble.text)
            trouble.due, trouble.unsaid = now + min(3 * lasts, 60 * MINUTE), 0

    def present(self) -> Iterator[tuple[Trouble, list[str]]]:
        """The oldest first, each with the orders that are in it just now."""
        for kind, trouble in self._kinds.items():
            stuck = [task_id for task_id, order in trouble.orders.items() if order.met[-1] == kind]
            if stuck:
                yield trouble, stuck

    def oldest(self) -> str:
        """The one that has lasted longest, for who looks: live line, systemd's status, `db.py list`."""
        for trouble, stuck in self.present():
            if trouble.remind:
                return f"{len(stuck)} stuck: {trouble.text.removeprefix('waits: ')}"
        return ""


class Outage:
    """What stands in every order's way, and until when nobody is asked. Times are monotonic seconds."""

    def __init__(self, longest: float) -> None:
        self.longest = longest  # seconds between two tries
        self.error: chili.AskAgainLater | None = None
        self.said: dict[str, float] = {}  # what was met, and since when; "" when it became an error
        self.lately: dict[str, float] = {}  # what was over, and when: not worth a word again so soon
        self.times = 0  # tries in a row
        self.until = self.alone = 0.0  # the next try; how long GraFx wants to be left alone
        self.since = 0.0  # when it began; where there is none, when the last one was over

    def begins(self, error: chili.AskAgainLater) -> None:
        """It was met, perhaps once more."""
        now = time.monotonic()
        if self.error is None:
            self.since = now
        if now >= self.until:
            self.times += 1
            self.until = now + growing(self.times, self.longest)
        if str(error) not in self.said and now >= self.lately.get(str(error), -MINUTE) + MINUTE:
            log.warning("all orders wait: %s", error)
            self.said[str(error)] = now
        if "" not in self.said and now >= self.since + ALARM:
            log.error("all orders have waited for %s: %s", duration(ALARM), error)
            self.said[""] = now
        self.error = error

    def ends(self, delivered: bool) -> None:
        """The way is free; where it was the disk, it takes a file on it to show that."""
        if self.error is None or (isinstance(self.error, chili.CannotWrite) and not delivered):
            return
        self.since = time.monotonic()
        for text in filter(None, self.said):
            log.info("over: %s, after %s", text, duration(self.since - self.said[text]))
            self.lately[text] = self.since
        self.error, self.said, self.times, self.until = None, {}, 0, 0.0

    def is_known_to(self, order: Order) -> bool:
        """Who was asked before it began, or before the last one was over, says nothing of it."""
        return order.asked >= self.since

    def pause(self) -> float:
        """Seconds until somebody may be asked."""
        return max(0.0, max(self.until, self.alone) - time.monotonic())

    def __str__(self) -> str:
        """What it is; nothing where nobody has to wait."""
        return str(self.error or ("GraFx wants to be left alone" if self.pause() else ""))

    def leave_alone(self, seconds: float) -> None:
        """GraFx asks for that."""
        level = logging.DEBUG if self.pause() else logging.WARNING
        log.log(level, "GraFx wants to be left alone for %.0f s", seconds)
        self.alone = max(self.alone, time.monotonic() + seconds)


def growing(times: int, longest: float) -> float:
    """2 s, 4 s, 8 s, … up to `longest`."""
    return min(longest, SHORTEST_PAUSE * 2.0 ** min(times - 1, 20))


# --- ON_DONE ---------------------------------------------------------------------------------


class NotHandedOver(chili.AskAgainLater):
    """The file is here, but ON_DONE did not take it."""


class HandOff:
    """ON_DONE: a command for each file that has come. Where it is not set, this is false."""

    def __init__(self, words: list[str], timeout: float) -> None:
        self.words, self.timeout = words, timeout
        self.running: dict[subprocess.Popen[bytes], bool] = {}  # whether it was signalled before its end
        self.stopping = False
        self.failing = False  # the last one did

    def __bool__(self) -> bool:
        return bool(self.words)

    def give(self, order: Order, file: Path | None) -> None:
        """Run the command for an order's file. Raises NotHandedOver unless it ends by itself, with 0."""
        if self.stopping:
            raise NotHandedOver("the poller stops")
        if file is None:
            raise NotHandedOver("its file was taken away before ON_DONE could have it")
        process = self.start(order, file)
        try:
            with process:  # the end of the block waits for it
                last = self.listen(order, process)
        finally:
            signalled = self.running.pop(process)
        code = process.returncode
        if signalled:  # whatever its exit code says, it was not done
            code, end = -1, "was ended by the poller" if self.stopping else last
        elif code < 0:
            end = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        else:
            end = f"ended with {code}"
        log.debug("%s: ON_DONE %s", order.task_id, end)
        self.failing = code != 0
        if code:
            self.end(process, signal.SIGKILL)  # what it left running
            raise NotHandedOver(f"ON_DONE {end}" + (f", it said: {last}" if last not in ("", end) else ""))

    def start(self, order: Order, file: Path) -> subprocess.Popen[bytes]:
        words = [word.replace("{}", str(file)) for word in self.words]
        if words == self.words:
            words.append(str(file))
        env = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        env |= {"TASK_ID": order.task_id, "PROJECT_ID": order.project, "ORDER_FILE": str(file)}
        try:
            process = subprocess.Popen(  # noqa: S603 - no shell, and the words are the user's own
                words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise NotHandedOver(f"ON_DONE cannot be run: {error}") from None
        self.running[process] = False
        return process

    def listen(self, order: Order, process: subprocess.Popen[bytes]) -> str:
        """Log what it says until it has ended, at its timeout by force; returns the last words."""
        last = ""
        for line in self.lines(process):
            if said := chili.plain(line.decode(errors="replace")):
                last = said
                level = logging.DEBUG if self.failing else logging.INFO  # else it is told for all orders
                log.log(level, "%s: ON_DONE says: %s", order.task_id, said)
        if process.poll() is None:
            last = f"took longer than {self.timeout:g} s"
            self.end(process, signal.SIGKILL)
        return last

    def lines(self, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
        """What it says, in pieces where a line is too long, until it has ended or its time is over.

        What it leaves running may hold its output for ever: a second after its own end nobody listens.
        """
        until, ended, line = time.monotonic() + self.timeout, False, b""
        output: Any = process.stdout
        while (now := time.monotonic()) < until and not (ended and self.stopping):
            if not ended and process.poll() is not None:
                ended, until = True, now + 1.0
            if not select.select([output], [], [], min(0.1, until - now))[0]:
                continue
            data = os.read(output.fileno(), 2000)
            if not data:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
                break
            *lines, line = (line + data).split(b"\n")
            yield from lines
            if len(line) >= 2000:
                yield line
                line = b""
        yield line

    def stop(self, how: int) -> None:
        """Signal all that run; no more are begun."""
        self.stopping = True
        for process in tuple(self.running):
            self.end(process, how)

    def end(self, process: subprocess.Popen[bytes], how: int) -> None:
        """Signal a command and all that it started."""
        if process.poll() is None:  # else it ended by itself, and only what it left running is meant
            self.running[process] = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, how)


# --- the loop --------------------------------------------------------------------------------


class Poller:
    """The single loop, its threads, and what becomes of an order: one method for each outcome.

    An order that the file has is in `waiting`; from when it is given to a thread (by `todo`) until its answer
    is heard (by `answers`) it is in `asking`; when it has ended, it is an outcome in `database`, until the
    file says so. All of that is the loop's alone. A thread gives its order a file and tells how far it is.
    """

    def __init__(self, settings: Settings, screen: Screen, lock: TextIO, once: bool) -> None:
        self.settings, self.once = settings, once
        self.grafx = environment_of(settings)
        self.database = db.Database(settings.database, once)
        self.waiting = Waiting()
        self.asking: dict[str, Order] = {}
        self.todo: queue.SimpleQueue[Order | None] = queue.SimpleQueue()  # None: only the token
        self.answers: queue.SimpleQueue[tuple[Order | None, Any] | None] = queue.SimpleQueue()
        self.troubles, self.outage = Troubles(), Outage(settings.poll_interval)
        self.hand_off = HandOff(settings.on_done, settings.on_done_timeout)
        self.telling = Telling(screen, lock)
        self.ready = self.stopping = False  # ready: the token endpoint was asked
        self.exit_code = 0

    def run(self) -> int:
        """Poll until a signal, with `once` until each order was asked about; returns the exit code."""
        while True:
            store = self.database.sync(soon=not self.asking and self.waiting.first() > time.monotonic())
            if store and not self.once:
                self.take(store)
            self.ask_due_orders()
            self.hear_answers()
            if self.stopping or (self.once and self.ready and not (self.waiting or self.asking)):
                return self.stop()
            self.telling.tell(self)

    def begin(self) -> None:
        """Read the file, and start the threads."""
        store = self.database.start()
        log.info(
            "GraFx order poller %s: %s, %s: %d waiting, %d failing, %d failed, %d delivered",
            VERSION, self.settings.database, self.settings.baseurl,
            len(store.orders) - len(self.database.failing), len(self.database.failing), len(store.failed),
            len(self.database.deliveries.ids),
        )  # fmt: skip
        self.take(store)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(name) != signal.SIG_IGN:
                signal.signal(name, self.on_signal)
        for _ in range(self.settings.concurrency):
            # Daemons: a thread that hangs in a name lookup must not hold up the stop.
            threading.Thread(target=self.work, daemon=True).start()
        self.todo.put(None)  # so it shows at once whether the credentials are right

    def on_signal(self, *_: object) -> None:
        """Set a flag, wake the loop, and nothing else: a signal may interrupt anything."""
        self.stopping = True
        self.answers.put(None)

    def take(self, store: db.Store) -> None:
        """Know the orders of the file, and no others."""
        new = []
        for task_id, fields in store.orders.items():
            if task_id not in self.waiting and task_id not in self.asking:
                new.append(order := self.new_order(task_id, fields))
                self.waiting.put(order, 0.0)
        for order in self.asking.values():
            order.gone = order.task_id not in store.orders
        gone = [self.waiting.pop(task_id) for task_id in self.waiting.keys() - store.orders.keys()]
        for order in gone:
            self.clear(order, quiet=True)
        for entry in store.strange:
            db.warn_once(f"no task id, left alone in the database: {entry}")
        if self.ready:
            self.telling.came_and_went(new, gone)

    def new_order(self, task_id: str, fields: db.Fields) -> Order:
        """An order as the file has it; where an earlier process saw it refused, that counts on."""
        order = Order(task_id, chili.plain(fields.get("projectID") or ""), since(fields.get("added")))
        if record := self.database.failing.get(task_id):
            order.state, order.refused = "failing", since(record.get("since"))
            times = record.get("times")
            # The daemon asks three times more, since it does not note each time.
            order.refusals = times if self.once and isinstance(times, int) else 0
            self.troubles.meet(order, f"refused: {record.get('error')}", remind=False, quiet=True)
        return order

    def ask_due_orders(self) -> None:
        """Give orders whose time has come to the threads, no more than may be asked about at once."""
        if self.stopping or not self.ready:
            return
        if self.outage.pause():
            if self.once and self.waiting:
                log.warning("%d orders were not asked about; the next run will do it", len(self.waiting))
                self.waiting.clear()
                self.exit_code = 1
            self.hand_over_again()
            return
        while len(self.asking) < self.settings.concurrency and self.waiting.first() <= time.monotonic():
            self.give_out(self.waiting.take_first())

    def hand_over_again(self) -> None:
        """While all orders wait, those whose file is here need no GraFx, and no room on the disk."""
        now, folder = time.monotonic(), self.settings.orders_dir
        due = (o for o in self.waiting.values() if o.state == "not handed over" and o.due <= now)
        here = (order for order in due if chili.find_file(folder, order.task_id))
        for order in list(itertools.islice(here, self.settings.concurrency - len(self.asking))):
            self.give_out(self.waiting.pop(order.task_id))

    def give_out(self, order: Order) -> None:
        """To a thread, the next one that is free."""
        log.debug("%s asked about, project %s", order.task_id, order.project or "not given")
        order.asked = time.monotonic()
        self.asking[order.task_id] = order
        self.todo.put(order)

    def work(self) -> None:
        """A thread: ask about one order after the other."""
        while not self.stopping:
            order = self.todo.get()
            try:
                answer: Any = self.ask(order) if order else self.grafx.token.get()
            except Exception as error:  # noqa: BLE001 - `heard` looks at what it is
                answer = error
            self.answers.put((order, answer))

    def ask(self, order: Order) -> str:
        """`chili.order_done`, then ON_DONE where it is set; returns the file's name, "" while it renders."""
        folder = self.settings.orders_dir
        # No file is here where it was still rendering a while ago, and to look takes a fifth of a question.
        here = order.state != "rendering" and chili.is_here(folder, order.task_id)
        if not here and not chili.order_done(order.task_id, self.grafx, folder, order.progress):
            return ""
        order.began = 0.0
        file = chili.find_file(folder, order.task_id)
        if self.hand_off:
            self.hand_off.give(order, file)
        return file.name if file else order.task_id  # taken away already

    def hear_answers(self) -> None:
        """Wait for an answer, but no longer than to the next order due, the next look, the next live line."""
        now = time.monotonic()
        until = now + self.telling.tick()
        if self.ready and len(self.asking) < self.settings.concurrency:
            until = min(until, max(self.waiting.first(), now + self.outage.pause()))
        self.hear(until - now)
        self.grafx.connections.cut()

    def hear(self, seconds: float) -> None:
        """Wait so long for an answer, then take all that came."""
        with contextlib.suppress(queue.Empty):
            while True:
                if answer := self.answers.get(timeout=max(0.0, seconds)):
                    self.heard(*answer)
                seconds = 0.0

    def heard(self, order: Order | None, answer: Any) -> None:
        """Decide what becomes of an order."""
        if isinstance(answer, chili.CredentialsRefused) and not self.grafx.token.issued:
            log.error("%s", answer)
            self.exit_code, self.stopping = EX_CONFIG, True
        if order is None:
            self.token_came(answer)
            return
        del self.asking[order.task_id]
        match answer:
            case "":
                self.rendering(order)
            case str():
                self.delivered(order, answer)
            case chili.OrderRefused():
                self.refused(order, answer)
            case chili.AskAgainLater():
                self.later(order, answer)
            case _:
                self.unforeseen(order, answer)
        order.size, order.began = 0, 0.0

    def token_came(self, answer: Any) -> None:
        """The first thing at the start: from now on orders are asked about, and systemd knows."""
        self.ready = True
        if self.stopping:
            return
        if isinstance(answer, chili.AskAgainLater) and self.waiting:
            self.outage.begins(answer)
        elif isinstance(answer, Exception):
            log.warning("%s%s", answer, "" if self.once else "; it is tried again when an order waits")

    def delivered(self, order: Order, file: str) -> None:
        """Its file is whole on the disk, and handed over: it may leave database.json."""
        if order.size and (not self.hand_off or self.outage.is_known_to(order)):
            self.outage.ends(delivered=True)  # else the file was here before, or the command took long
        self.clear(order)
        self.database.delivered[order.task_id] = file
        amount = chili.human(order.size) if order.size else "here before"
        kind = Path(file).suffix.removeprefix(".") or "taken away already"
        took = duration(time.monotonic() - order.born)
        text = "%s delivered: %s, %s, %s after it was ordered"
        log.info(text, order.task_id, kind, amount, took, extra={"good": True})
        self.telling.count(order, "delivered")

    def rendering(self, order: Order) -> None:
        """204: GraFx works on it."""
        self.way_is_free(order)
        self.clear(order)
        self.telling.count(order, "rendering")
        # So a file is here at most a quarter of its render time (and 2 s) after it is ready,
        # and an order that renders for an hour is not asked about 1,800 times.
        quarter = (time.monotonic() - order.born) / 4
        self.again(order, min(self.settings.poll_interval, max(SHORTEST_PAUSE, quarter)))

    def refused(self, order: Order, error: chili.OrderRefused) -> None:
        """GraFx says that there is no such file. It has failed when that was so for GIVE_UP_AFTER on end."""
        now = time.monotonic()
        self.way_is_free(order)
        order.troubles, order.refusals = 0, order.refusals + 1
        order.refused = order.refused or now
        left = order.refused + self.settings.give_up_after - now
        if error.final or (order.refusals >= REFUSALS and left <= 0):
            self.troubles.leave(order, quiet=True)
            self.database.failed[order.task_id] = (error.status, str(error))
            log.error("%s failed, project %s: %s", order.task_id, order.project or "not given", error)
            self.telling.count(order, "failed")
            return
        until = f" (project {order.project or 'not given'}; asked until {clock(left)}, then it has failed)"
        self.troubles.meet(order, f"refused: {error}", until, remind=False)
        self.note_refusal(order, error)
        self.telling.count(order, "failing")
        self.again(order, growing(order.refusals, self.settings.poll_interval))

    def note_refusal(self, order: Order, error: chili.OrderRefused) -> None:
        """Have it under "failing" where its status is new; with `--once` each time, for the next run."""
        known = self.database.failing.get(order.task_id, {})
        if known.get("status") == error.status and not self.once:
            return
        seconds = round(time.time() - time.monotonic() + order.refused)
        began = db.stamp(datetime.fromtimestamp(seconds, timezone.utc))
        record = {"status": error.status, "error": str(error), "since": began, "times": order.refusals}
        self.database.failing[order.task_id] = record

    def later(self, order: Order, error: chili.AskAgainLater) -> None:
        """The order could not be asked about, or not be delivered, through no fault of its own."""
        if self.stopping or order.gone:
            self.again(order, 0.0)
            return
        self.not_refused(order)
        if error.pause:
            self.outage.leave_alone(error.pause)
        # An echo of an outage that is over is this order's trouble alone.
        if error.shared and (self.outage.error or self.outage.is_known_to(order)):
            self.outage.begins(error)
            self.telling.results["stuck"] += 1
            if order.state == "not handed over" or isinstance(error, chili.CannotWrite):
                order.state, self.telling.stale = "stuck", True  # whether its file is here is not known now
            self.again(order, 0.0)
            return
        if not isinstance(error, NotHandedOver):
            self.way_is_free(order)
        order.troubles += 1
        self.troubles.meet(order, f"waits: {error}")
        self.telling.count(order, "not handed over" if isinstance(error, NotHandedOver) else "stuck")
        self.again(order, growing(order.troubles, self.settings.poll_interval))

    def unforeseen(self, order: Order, error: Exception) -> None:
        """A fault of ours: it is said once with all that helps to find it, and the order goes on waiting."""
        later = chili.AskAgainLater(f"unexpected {type(error).__name__}")
        if kind_of(f"waits: {later}") not in order.met:
            log.error("%s: unexpected error, please report it", order.task_id, exc_info=error)
        self.later(order, later)

    def way_is_free(self, order: Order) -> None:
        """GraFx has answered."""
        if self.outage.is_known_to(order):
            self.outage.ends(delivered=False)

    def clear(self, order: Order, quiet: bool = False) -> None:
        """It is in no trouble any more; `quiet` where somebody took it out of the file."""
        order.troubles = 0
        self.not_refused(order)
        self.troubles.leave(order, quiet)

    def not_refused(self, order: Order) -> None:
        """Anything but a refusal came of it: "on end" begins anew."""
        order.refusals, order.refused = 0, 0.0
        self.database.failing.pop(order.task_id, None)

    def again(self, order: Order, pause: float) -> None:
        """Re-queue it, except where each order is asked about once, or where somebody took it out."""
        if order.gone:
            self.clear(order, quiet=True)
            self.telling.stale = True
        elif not self.once:
            self.waiting.put(order, pause)

    def stop(self) -> int:
        """Drop what is under way, write what came of the rest."""
        notify("STOPPING=1")
        self.stopping = True
        deadline = time.monotonic() + 0.8
        while self.asking and time.monotonic() < deadline:
            self.grafx.connections.cut(everything=True)
            self.hand_off.stop(signal.SIGTERM)
            self.hear(0.05)
        self.hand_off.stop(signal.SIGKILL)
        bad = self.telling.results.keys() & {"failed", "not handed over", "stuck"}
        if (not self.database.flush() or bad) and self.once:
            self.exit_code = self.exit_code or 1
        with contextlib.suppress(OSError):
            chili.remove_leftovers(self.settings.orders_dir)
        self.telling.stop(self)
        return self.exit_code


class Telling:
    """What a person sees beside the log: the live line, systemd's status, the note for `db.py list`."""

    def __init__(self, screen: Screen, lock: TextIO) -> None:
        self.screen, self.lock = screen, lock
        self.states: Counter[str] = Counter()  # of the orders that wait
        self.results: Counter[str] = Counter()  # of all questions
        self.last = self.note = ""  # the last delivery; what `db.py list` says of the poller
        self.told = 0.0
        self.stale = True  # whether `states` are of before

    def count(self, order: Order, state: str) -> None:
        """An order is in this state now."""
        self.results[state] += 1
        order.state, self.stale = state, True
        if state == "delivered":
            self.last = f"last delivery {clock()}"

    def came_and_went(self, new: list[Order], gone: list[Order]) -> None:
        """Each by name, or their number where they are many."""
        self.stale = True
        for orders, what in ((new, "came in"), (gone, "taken out of the file by somebody")):
            if len(orders) > 5:
                log.info("%d orders %s", len(orders), what)
                continue
            for order in orders:
                log.info("%s %s, project %s", order.task_id, what, order.project or "not given")

    def tick(self) -> float:
        """Seconds between two looks at what there is to tell."""
        return min(db.LOOK, 0.2) if self.screen.terminal else db.LOOK

    def tell(self, poller: Poller) -> None:
        """What changed since the last tick."""
        now = time.monotonic()
        if not poller.ready or now < self.told + self.tick():
            return
        ready, self.told = "" if self.told else "READY=1\n", now
        poller.troubles.tell()
        loading = [order for order in poller.asking.values() if order.loading()]
        outage, stuck = poller.outage, poller.troubles.oldest()
        waits = f"again in {outage.pause():.0f} s: " if outage.pause() else ""
        wrong = "; ".join(filter(None, (str(outage), poller.database.problem)))
        if (note := "; ".join(filter(None, (wrong, stuck)))) != self.note:
            self.note = note
            db.take_note(self.lock, note)
        counts = self.counts(poller, loading)
        # From the loop, so only while it turns.
        status = "; ".join(filter(None, (waits + note, counts, self.last)))
        notify(f"{ready}WATCHDOG=1\nSTATUS={status}")
        parts = [waits + wrong, *(f"{order.task_id[:8]} {order.loading()}" for order in loading), counts]
        pause = poller.waiting.first() - now
        if pause < 1e6 and not waits:
            parts.append(f"asks in {max(0.0, pause):.0f} s")
        self.screen.show(" | ".join(filter(None, (*parts, self.last, stuck))))
        for order in loading:
            if not self.screen.terminal and now >= max(order.asked, order.logged) + PROGRESS:
                order.logged = now
                log.info("%s downloading: %s", order.task_id, order.loading())

    def counts(self, poller: Poller, loading: list[Order]) -> str:
        """How many orders are in which state, each in one."""
        if self.stale:  # there may be 20,000 of them
            orders = itertools.chain(poller.waiting.values(), poller.asking.values())
            self.states, self.stale = Counter(order.state for order in orders), False
        states = self.states - Counter(order.state for order in loading)
        states["downloading"] = len(loading)
        return ", ".join(f"{states[state]} {state}" for state in STATES if states[state])

    def stop(self, poller: Poller) -> None:
        """The last words."""
        self.screen.show("")
        if poller.once:
            said = ", ".join(f"{self.results[state]} {state}" for state in STATES if self.results[state])
            log.info("asked about %d%s", self.results.total(), said and f": {said}")
        else:
            log.info("stopped, %d waiting", len(poller.waiting) + len(poller.asking))


# --- python poller.py ------------------------------------------------------------------------


def check(settings: Settings) -> int:
    """Try all that the poller needs, and say what is fine and what is not; returns the exit code."""
    grafx = environment_of(settings)

    def database() -> str:
        store = db.read(settings.database)
        with db.lock(settings.database, "lock", db.PATIENCE):
            pass  # it can be had, so the file can be written
        return f"{settings.database}: {len(store.orders)} waiting, {len(store.failed)} failed"

    def folder() -> str:
        prepare_folder(settings.orders_dir)
        return str(settings.orders_dir)

    def token() -> str:
        grafx.token.get()
        return f"{settings.token_url} gives one"

    def answers() -> str:
        if not grafx.token.issued:
            raise chili.AskAgainLater("not asked, since there is no token")
        return chili.try_out(grafx)

    code = 0
    print("ok    settings")
    for name, step in (("database", database), ("folder", folder), ("token", token), ("GraFx", answers)):
        try:
            said = f"ok    {name}: {step()}"
        except (db.DatabaseError, chili.AskAgainLater, chili.OrderRefused, OSError) as error:
            said = f"WRONG {name}: {error}"
            code = EX_CONFIG if isinstance(error, chili.CredentialsRefused) else code or 1
        print(said, flush=True)
    return code


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="poller.py",
        description="Fetch the files of finished GraFx orders: from database.json to ./orders.",
        epilog="Settings come from the environment and .env beside poller.py; README.md lists them."
        " Exit codes: 0 done; 1 an order failed or could not be asked, or the poller cannot start;"
        " 70 a fault of the poller's own; 78 wrong settings or refused credentials.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="ask about each order once, and end")
    what.add_argument(
        "--check", action="store_true", help="try settings, database, folder, token and GraFx, and end"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log each request, without any secret")
    return parser.parse_args()


def main() -> int:
    """`python poller.py`; returns the exit code."""
    db.open_streams()
    given = arguments()
    screen = Screen()
    logging.getLogger().addHandler(screen.inlet)
    for name in ("poller", "chili", "db"):
        logging.getLogger(name).setLevel(logging.DEBUG if given.verbose else logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs addresses whole, signatures too
    logging.raiseExceptions = False  # a log that nobody reads any more is no reason to fail
    try:
        settings = load_settings()
        return check(settings) if given.check else run(settings, screen, given.once)
    except SettingsError as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return EX_CONFIG
    except (db.DatabaseError, OSError) as error:
        log.error("%s", error)
        return 1
    finally:
        screen.finish()


def run(settings: Settings, screen: Screen, once: bool) -> int:
    """Be the only poller of this database. Raises DatabaseError, OSError."""
    with db.lock(settings.database, "pid", patience=0) as lock:
        prepare_folder(settings.orders_dir)
        chili.remove_leftovers(settings.orders_dir)
        poller = Poller(settings, screen, lock, once)
        poller.begin()
        try:
            return poller.run()
        except Exception:
            poller.hand_off.stop(signal.SIGKILL)
            log.critical("the poller is broken and ends, please report it", exc_info=True)
            return EX_SOFTWARE


if __name__ == "__main__":
    os._exit(main())  # a thread that still hangs somewhere must not hold up the end
