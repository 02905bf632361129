"""Fetch the files of finished GraFx orders: from `database.json` to `./orders`.

    python poller.py             ask about every order, deliver, and go on until SIGTERM or Ctrl-C
    python poller.py --once      ask about each order once, for cron
    python poller.py --check     try settings, database, folder and token

The loop is `Poller.run`. What GraFx says is in `chili.py`, what the file says in `db.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import ipaddress
import logging
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import chili
import db

EX_CONFIG = 78  # sysexits.h: "configuration error"
SHORTEST_PAUSE = 2.0  # seconds between two questions about one order; CHILI's own client takes 2
FAILURES = 3  # answers in a row that speak of a failed order before it counts as one
LOOK = 1.0  # seconds between two looks at whether database.json changed
PROGRESS = 10.0  # seconds between two log lines about one download
UNHANDED = 3600.0  # seconds a file may wait for ON_DONE before everybody is told
SECRETS = ("SERVER_ID", "SERVER_SECRET", "SERVER_SECRET_FILE", "FRONT_ID", "FRONT_SECRET")

log = logging.getLogger("poller")


# --- settings --------------------------------------------------------------------------------


class SettingsError(Exception):
    """All that is wrong with the settings, a line each with the mend."""


@dataclass(frozen=True)
class Settings:
    """What the environment and `.env` say. Times are seconds."""

    server_id: str
    server_secret: str = field(repr=False)
    base_url: str
    environment: str
    token_url: str
    poll_interval: float
    concurrency: int
    database: Path
    orders_dir: Path
    on_done: list[str]
    on_done_timeout: float


def load_settings() -> Settings:
    """Raises SettingsError with all that is wrong."""
    try:
        given = db.settings()
    except db.DatabaseError as error:
        raise SettingsError(str(error)) from None
    wrong: list[str] = []

    def required(name: str, what: str) -> str:
        if name not in given:
            wrong.append(f"{name} is missing: put {what} into .env or the environment")
        return given.get(name, "")

    def address(name: str, url: str) -> str:
        try:
            scheme, host, _ = chili.origin(url)
            # It must still be the same server when requests has cleaned it.
            if set("?#@") & set(url) or chili.origin(chili.cleaned(url)) != chili.origin(url):
                raise ValueError
            if scheme == "http" and not is_loopback(host):
                wrong.append(f"{name} must begin with https://, else the token travels unencrypted")
        except ValueError:
            if url:
                wrong.append(f"{name} is no web address: write it as https://HOST")
        return url.rstrip("/")

    def number(
        name: str, default: str, least: float, most: float, kind: Callable[[str], float] = float
    ) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(given.get(name, default))
            if least <= value <= most:
                return value
        wrong.append(
            f"{name} is {given[name]!r}: write a {'whole ' * (kind is int)}number from {least:g} to {most:g}"
        )
        return kind(default)

    def secret() -> str:
        if "SERVER_SECRET_FILE" not in given:
            return required("SERVER_SECRET", "the integration's client secret")
        if "SERVER_SECRET" in given:
            wrong.append("SERVER_SECRET and SERVER_SECRET_FILE are both set: remove one of them")
        try:
            text = (db.HERE / given["SERVER_SECRET_FILE"]).read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            wrong.append(f"SERVER_SECRET_FILE: {error}: name a file that holds the secret and can be read")
            return ""
        if not text:
            wrong.append("SERVER_SECRET_FILE is empty: put the integration's client secret into it")
        return text

    def command() -> list[str]:
        try:
            words = shlex.split(given.get("ON_DONE", ""))
        except ValueError as error:
            wrong.append(f"ON_DONE cannot be split into words ({error}): close its quotes")
            return []
        if words and "/" in words[0]:
            words[0] = str(db.HERE / words[0])
        if words and not shutil.which(words[0]):
            wrong.append(f"ON_DONE: {words[0]} cannot be found or run: install it, or write its whole path")
        return words

    settings = Settings(
        server_id=required("SERVER_ID", "the integration's client id"),
        server_secret=secret(),
        base_url=address("BASEURL", required("BASEURL", "https://ENVIRONMENT.chili-publish.online")),
        environment=required("ENVIRONMENT", "the environment's name, as in cp-abc-123,"),
        token_url=address(
            "TOKEN_URL", given.get("TOKEN_URL", "https://integration-login.chiligrafx.com/oauth/token")
        ),
        poll_interval=number("POLL_INTERVAL", "60", 0.1, 3600),  # GraFx keeps a file for 4 hours
        concurrency=number("CONCURRENCY", "8", 1, 64, int),
        database=Path(os.path.realpath(db.default_path())),
        orders_dir=db.HERE / given.get("ORDERS_DIR", "orders"),
        on_done=command(),
        on_done_timeout=number("ON_DONE_TIMEOUT", "300", 1, 86400),
    )
    if settings.environment and not re.fullmatch(r"[A-Za-z0-9._-]+", settings.environment):
        wrong.append("ENVIRONMENT is no environment's name: letters, digits, '.', '_' and '-'")
    if wrong:
        raise SettingsError("\n".join(wrong))
    return settings


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


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
        mend = "Make the folder, or mend its permissions."
        raise OSError(f"cannot write to ORDERS_DIR, {orders_dir}: {error.strerror}. {mend}") from None


# --- what a person sees ----------------------------------------------------------------------


class Screen(logging.StreamHandler):  # type: ignore[type-arg]  # 3.10 knows no argument
    """The log on stderr: in a terminal with a live line below it, under systemd as the journal likes it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.terminal, self.line = sys.stderr.isatty(), ""
        stat = os.fstat(2)  # systemd.exec(5): so one knows that stderr is the journal itself
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
        stamp = "" if self.journal else "%(asctime)s %(levelname)-7s "
        self.setFormatter(logging.Formatter(stamp + "%(message)s", "%Y-%m-%d %H:%M:%S"))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self.journal:  # sd-daemon(3): a level for each line, or a traceback would lose it
            level = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            text = "\n".join(f"<{level}>{line}" for line in text.splitlines())
        return text

    def emit(self, record: logging.LogRecord) -> None:
        line = self.line
        self.show("")
        super().emit(record)
        self.show(line)

    def show(self, line: str) -> None:
        """Put `line` in the place of the live line."""
        if not self.terminal or line == self.line:
            return
        self.acquire()
        self.line = line[: shutil.get_terminal_size().columns - 1]
        with contextlib.suppress(OSError):
            self.stream.write("\r\x1b[K" + self.line)
            self.stream.flush()
        self.release()


def notify(state: str) -> None:
    """Tell systemd, where it asked to be told: a datagram to $NOTIFY_SOCKET, see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def human(size: float) -> str:
    """Bytes as "7.6 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


# --- the loop --------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Order:
    """A waiting order, as long as this process knows it. Times are monotonic seconds."""

    task_id: str
    project: str
    born: float  # by its `added`, else when it was first seen
    due: float = 0.0
    questions: int = 0
    failures: int = 0  # answers in a row that speak of a failed order
    troubles: int = 0  # in a row: it could not be asked
    trouble: str = ""  # what it waits on, as logged
    unhanded: float = 0.0  # `time.time()` of its file, where ON_DONE failed for it
    size: int = 0  # bytes of its file that are here
    total: int | None = None
    look: bool = True  # its file may be here already; not where it was still rendering a while ago
    logged: float = 0.0  # when it was asked about, or its progress was logged

    def progress(self, size: int, total: int | None) -> None:
        """The download calls this for each piece."""
        self.size, self.total = size, total

    def __str__(self) -> str:
        if not self.total:
            return human(self.size)
        return f"{min(100, 100 * self.size // self.total)}% of {human(self.total)}"


def new_order(task_id: str, fields: db.Fields) -> Order:
    """An order as the file has it."""
    age = 0.0
    with contextlib.suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(str(fields.get("added")).replace("Z", "+00:00"))
        age = time.time() - (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
    # The age is counted on with the monotonic clock: a clock set back does not stop the questions.
    return Order(task_id, str(fields.get("projectID") or ""), time.monotonic() - max(0.0, age))


class NotHandedOver(chili.AskAgainLater):
    """The file is here, but ON_DONE did not take it."""


class Poller:
    """The settings, the orders known, and those being asked about."""

    def __init__(self, settings: Settings, screen: Screen, lock: TextIO, once: bool = False) -> None:
        self.settings, self.screen, self.lock, self.once = settings, screen, lock, once
        self.token = chili.DangerousToken(settings.token_url, settings.server_id, settings.server_secret)
        self.http = chili.Connections(settings.concurrency)
        self.todo: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Order, bool | Exception] | None] = queue.SimpleQueue()
        self.orders: dict[str, Order] = {}
        self.due: list[tuple[float, str]] = []  # a heap; an entry that is not its order's `due` is stale
        self.asking: dict[str, Order] = {}
        self.delivered: set[str] = set()  # these two are not yet written to database.json
        self.failed: dict[str, tuple[int | None, str]] = {}
        self.children: set[subprocess.Popen[str]] = set()  # ON_DONE commands at work
        self.seen: db.Version = None  # the version of database.json that `orders` is from
        self.strange: set[str] = set()  # its entries that were warned about
        self.failed_before = 0  # the orders under its "failed"
        self.complaints: dict[str, str] = {}  # what is wrong with reading it, and with writing it
        self.shared: dict[str, set[str]] = {}  # what stands in every order's way: the orders that met it
        self.troubles = 0  # the same in a row, for the growing pauses
        self.looked = self.written = self.told = self.paused_until = 0.0
        self.stopping = False
        self.since = self.last = self.said = self.noted = ""  # what `tell` tells
        self.exit_code = 0

    def run(self) -> int:
        """Poll until a signal, with `once` until each order was asked about; returns the exit code."""
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.on_signal)
        for _ in range(self.settings.concurrency):
            # Daemons: a thread that hangs in a name lookup must not hold up the stop.
            threading.Thread(target=self.work, daemon=True).start()
        self.orders[""] = new_order("", {})  # no order, but whether there is a token to be had
        self.again(self.orders[""], 0.0)
        while True:
            self.take_new_orders()
            self.ask_due_orders()
            self.hear_answers()
            self.write_outcomes()
            if self.stopping or (self.once and not self.due and not self.asking):
                return self.stop()
            self.tell()

    def on_signal(self, *_: object) -> None:
        """Set a flag, wake the loop, and nothing else: a signal may interrupt anything."""
        self.stopping = True
        self.answers.put(None)

    def take_new_orders(self) -> None:
        """See whether database.json changed, and if so which orders came or went."""
        now = time.monotonic()
        if self.once or now < self.looked + LOOK:
            return
        self.looked = now
        try:
            if db.version(self.settings.database) != self.seen:
                self.take(db.read(self.settings.database, patience=0))
            self.complain("read", "")
        except db.HalfSaved:
            pass  # the next look tells
        except (db.DatabaseError, OSError) as error:
            self.complain("read", str(error))

    def take(self, store: db.Store) -> None:
        """Know the orders of `store`, and no others."""
        self.seen, self.failed_before = store.version, len(store.failed)
        for task_id in self.orders.keys() - store.orders.keys() - {""}:
            self.over(self.orders.pop(task_id))
        for task_id, fields in store.orders.items():
            if task_id in self.asking:
                self.orders[task_id] = self.asking[task_id]
            elif not (task_id in self.orders or task_id in self.delivered or task_id in self.failed):
                self.orders[task_id] = new_order(task_id, fields)
                self.again(self.orders[task_id], 0.0)
        for item in store.strange:
            if item not in self.strange:
                log.warning("%s: not a task id, left alone: %s", self.settings.database, item)
        self.strange = set(store.strange)

    def ask_due_orders(self) -> None:
        """Give orders whose time has come to the threads, no more than may be asked about at once."""
        now = time.monotonic()
        if now < self.paused_until:
            if self.once and self.due:
                log.warning("%d orders were not asked about; the next run will do it", len(self.due))
                self.due.clear()
                self.exit_code = 1
            return
        free = 0 if self.stopping else self.settings.concurrency
        while self.due and self.due[0][0] <= now and len(self.asking) < free:
            due, task_id = heapq.heappop(self.due)
            order = self.orders.get(task_id)
            if order is None or order.due != due or task_id in self.asking:
                continue
            if task_id and not order.questions:
                log.info(
                    "%s asked about for the first time, project %s",
                    task_id,
                    chili.plain(order.project) or "not given",
                )
            order.questions, order.logged = order.questions + 1, now
            self.asking[task_id] = order
            self.todo.put(order)

    def again(self, order: Order, pause: float) -> None:
        """Re-queue an order; all the while it stays in database.json."""
        order.due = time.monotonic() + pause
        heapq.heappush(self.due, (order.due, order.task_id))

    def work(self) -> None:
        """A thread: ask about one order after the other."""
        while not self.stopping:
            order = self.todo.get()
            try:
                answer: bool | Exception = self.ask(order)
            except Exception as error:  # noqa: BLE001 - `heard` looks at what it is
                answer = error
            self.answers.put((order, answer))

    def ask(self, order: Order) -> bool:
        """`chili.order_done`, then ON_DONE where it is set."""
        settings = self.settings
        if not order.task_id:
            self.token.get(self.http)
            return True
        look, order.look = order.look, True
        done = chili.order_done(
            order.task_id, settings.base_url, settings.environment, self.token,
            self.http, settings.orders_dir, order.progress, look,
        )  # fmt: skip
        order.look = done
        order.total = order.size  # nothing of it is under way now
        if done and settings.on_done:
            self.hand_over(order)
        return done

    def hear_answers(self) -> None:
        """Wait for an answer, but no longer than to the next order due or the next look at the file."""
        now = time.monotonic()
        until = now + (0.2 if self.screen.terminal and self.asking else LOOK)
        if self.due and len(self.asking) < self.settings.concurrency:
            until = min(until, max(self.due[0][0], self.paused_until))
        with contextlib.suppress(queue.Empty):
            answer = self.answers.get(timeout=max(0.0, until - now))
            while True:
                if answer:
                    self.heard(*answer)
                answer = self.answers.get_nowait()
        self.http.cut()

    def heard(self, order: Order, answer: bool | Exception) -> None:
        """Decide what becomes of an order."""
        task_id, size = order.task_id, order.size
        del self.asking[task_id]
        order.size = 0
        if isinstance(answer, Exception) and not isinstance(answer, (chili.OrderFailed, chili.AskAgainLater)):
            error, answer = answer, chili.AskAgainLater(f"unexpected {type(answer).__name__}")
            if order.trouble != str(answer):
                log.error("%s: unexpected error, please report it", task_id, exc_info=error)
        if isinstance(answer, chili.AskAgainLater):
            self.later(order, answer)
            return
        self.troubles = order.troubles = 0
        self.over(order)
        # So a file is here at most a quarter of its render time (and 2 s) after it is ready,
        # and an order that renders for an hour is not asked about 1,800 times.
        pause = min(self.settings.poll_interval, max(SHORTEST_PAUSE, (time.monotonic() - order.born) / 4))
        if answer is True:
            self.orders.pop(task_id, None)
            if task_id:
                self.delivered.add(task_id)
                self.last = time.strftime("%Y-%m-%d %H:%M:%S")
                file = chili.find_file(self.settings.orders_dir, task_id)
                name = file.name if file else "taken away already"
                amount = human(size) if size else "here before"
                took, times = time.monotonic() - order.born, order.questions
                log.info(
                    "%s delivered: %s, %s, after %.1f s, questions: %d", task_id, name, amount, took, times
                )
        elif answer is False:
            order.failures = 0
            if not self.once:
                self.again(order, pause)
        elif isinstance(answer, chili.OrderFailed):
            order.failures += 1
            if answer.final or order.failures == FAILURES:
                self.orders.pop(task_id, None)
                self.failed[task_id] = (answer.status, str(answer))
                self.exit_code = int(self.once)
                log.error("%s failed: %s", task_id, answer)
            else:
                pause = min(pause, SHORTEST_PAUSE) if self.once else pause
                log.warning(
                    "%s: %s (%d of %d, again in %.0f s)", task_id, answer, order.failures, FAILURES, pause
                )
                self.again(order, pause)

    def later(self, order: Order, error: chili.AskAgainLater) -> None:
        """The order could not be asked about, or not be delivered, through no fault of its own."""
        if self.stopping or self.orders.get(order.task_id) is not order:  # or somebody took it out
            return
        if isinstance(error, chili.CredentialsRefused) and not self.token.issued:
            log.error("%s", error)
            self.exit_code, self.stopping = EX_CONFIG, True
            return
        now = time.monotonic()
        if error.shared and now >= self.paused_until:
            self.troubles += 1
            self.paused_until = now + self.growing(self.troubles)
        self.paused_until = max(self.paused_until, now + (error.pause or 0.0))
        order.failures, order.troubles = 0, order.troubles + 1
        if order.trouble != str(error):
            if not error.shared:
                pause = f"; GraFx wants a pause of {error.pause:.0f} s for all" if error.pause else ""
                log.warning("%s waits: %s%s", order.task_id, error, pause)
            elif str(error) not in self.shared:
                log.warning("all orders wait: %s", error)
                self.since = self.since or time.strftime("%Y-%m-%d %H:%M:%S")
            if error.shared:
                self.shared.setdefault(str(error), set()).add(order.task_id)
            self.over(order)  # after that, so that `since` stays
            order.trouble = str(error)
        if self.once:
            self.exit_code = 1
        else:
            self.again(order, self.growing(order.troubles))

    def growing(self, times: int) -> float:
        """2 s, 4 s, 8 s, … up to POLL_INTERVAL."""
        return min(self.settings.poll_interval, SHORTEST_PAUSE * 2.0 ** min(times - 1, 20))

    def over(self, order: Order) -> None:
        """What the order waited on is over, or the order is gone."""
        met = self.shared.get(order.trouble, set())
        met.discard(order.task_id)
        if order.trouble in self.shared and not met:
            del self.shared[order.trouble]
            log.info("over: %s", order.trouble)
            self.since = self.since if self.shared else ""
        order.trouble = ""

    def write_outcomes(self) -> None:
        """Write what came of the orders: at once when nothing is under way, else once a second."""
        now = time.monotonic()
        soon = self.stopping or not (self.asking or self.complaints.get("write"))
        if not (self.delivered or self.failed) or (not soon and now < self.written + LOOK):
            return
        self.written = now
        try:
            store = db.end_orders(self.delivered, self.failed, self.settings.database, patience=0.3)
        except db.HalfSaved:
            return
        except db.DatabaseError as error:
            self.complain("write", str(error))
            return
        self.complain("write", "")
        self.complain("read", "")
        self.delivered.clear()
        self.failed.clear()
        if not self.once:
            self.take(store)

    def complain(self, what: str, problem: str) -> None:
        """Log once what is wrong with database.json, and once that it is over."""
        before = set(self.complaints.values())  # reading and writing mostly fail alike
        self.complaints[what] = problem
        now = set(self.complaints.values())
        for text in now - before - {""}:
            log.error("%s", text)
        for text in before - now - {""}:
            log.info("over: %s", text)

    # --- ON_DONE

    def hand_over(self, order: Order) -> None:
        """Run ON_DONE for a delivered file. Raises NotHandedOver unless it ends with 0."""
        if self.stopping:
            raise NotHandedOver("the poller stops")
        gone = NotHandedOver("its file was taken away before ON_DONE could have it")
        file = chili.find_file(self.settings.orders_dir, order.task_id)
        if file is None:
            raise gone
        try:  # it may go at any time
            arrived = file.stat().st_mtime  # the hour for `tell` goes on after a restart
        except OSError:
            raise gone from None
        words = [word.replace("{}", str(file)) for word in self.settings.on_done]
        if words == self.settings.on_done:
            words.append(str(file))
        env = {name: value for name, value in os.environ.items() if name not in SECRETS}
        env |= {"TASK_ID": order.task_id, "PROJECT_ID": order.project, "ORDER_FILE": str(file)}
        last = [""]
        try:
            process = subprocess.Popen(  # noqa: S603 - no shell, and the words are the user's own
                words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            self.said, order.unhanded = str(error), arrived
            raise NotHandedOver(f"ON_DONE cannot be run: {error}") from None
        self.children.add(process)

        def listen() -> None:
            for line in iter(lambda: process.stdout.readline(2000) if process.stdout else "", ""):
                if said := chili.plain(line):
                    last[0] = said
                    log.info("%s: ON_DONE says: %s", order.task_id, said)

        # A thread: what the command leaves running may keep the pipe open, and is not waited for.
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            code = process.wait(self.settings.on_done_timeout)
            end = f"ended with {code}"
            if code < 0:
                end = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        except subprocess.TimeoutExpired:
            code, end = -1, f"took longer than {self.settings.on_done_timeout:g} s"
            kill(process, signal.SIGKILL)
            process.wait()
        finally:
            self.children.discard(process)
        if code or self.stopping:
            kill(process, signal.SIGKILL)  # what it left running
        listener.join(1.0)
        log.log(logging.WARNING if code else logging.INFO, "%s: ON_DONE %s", order.task_id, end)
        if code:
            self.said, order.unhanded = last[0] or end, arrived
            raise NotHandedOver(f"ON_DONE {end}")

    # --- telling

    def tell(self) -> None:
        """The live line, systemd's status, the note for `db.py list`, the progress of long downloads."""
        now = time.monotonic()
        if now < self.told + (0.2 if self.screen.terminal else LOOK):
            return
        ready, self.told = "" if self.told else "READY=1\n", now
        loading = [order for order in self.asking.values() if order.size not in (0, order.total)]
        status = f"{len(self.orders) - ('' in self.orders)} waiting, {len(loading)} downloading"
        status += f", {self.failed_before} failed, last delivery {self.last or 'none yet'}"
        if self.shared:
            status += f"; all orders wait since {self.since}: {next(iter(self.shared))}"
        late = time.time() - UNHANDED
        unhanded = [order for order in self.orders.values() if 0 < order.unhanded < late]
        note = f"{len(unhanded)} wait for ON_DONE, which said: {self.said}" if unhanded else ""
        if note != self.noted:
            self.noted = note
            db.take_note(self.lock, note)
        parts = [note, status] if note else [status]
        notify(f"{ready}WATCHDOG=1\nSTATUS={'; '.join(parts)}")  # from the loop, so only while it turns
        self.screen.show(" | ".join([*parts, *(f"{order.task_id[:8]} {order}" for order in loading)]))
        for order in loading:
            if not self.screen.terminal and now >= order.logged + PROGRESS:
                order.logged = now
                log.info("%s downloading: %s", order.task_id, order)

    def stop(self) -> int:
        """Drop what is under way, write what came of the rest."""
        notify("STOPPING=1")
        self.stopping = True
        deadline = time.monotonic() + 0.8
        while self.asking and time.monotonic() < deadline:
            self.http.cut(everything=True)
            for child in tuple(self.children):
                kill(child, signal.SIGTERM)
            with contextlib.suppress(queue.Empty):
                answer = self.answers.get(timeout=0.05)
                if answer:
                    self.heard(*answer)
        for child in tuple(self.children):
            kill(child, signal.SIGKILL)
        self.write_outcomes()
        if self.once and (self.delivered or self.failed):  # not written
            self.exit_code = 1
        with contextlib.suppress(OSError):
            chili.remove_leftovers(self.settings.orders_dir)
        self.screen.show("")
        log.info("stopped, %d waiting", len(self.orders) - ("" in self.orders))
        return self.exit_code


def kill(process: subprocess.Popen[str], how: int) -> None:
    """Signal a command and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


# --- python poller.py ------------------------------------------------------------------------


def check(settings: Settings) -> int:
    """Try all that the poller needs, and say what is fine and what is not; returns the exit code."""

    def database() -> str:
        store = db.read(settings.database)
        return f"{settings.database}: {len(store.orders)} waiting, {len(store.failed)} failed"

    def folder() -> str:
        prepare_folder(settings.orders_dir)
        return str(settings.orders_dir)

    def token() -> str:
        token = chili.DangerousToken(settings.token_url, settings.server_id, settings.server_secret)
        token.get(chili.Connections(1))
        return f"{settings.token_url} gives one"

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--check | head` is no error
    print("ok    settings")
    code = 0
    for step in (database, folder, token):
        try:
            print(f"ok    {step.__name__}: {step()}", flush=True)
        except (db.DatabaseError, chili.AskAgainLater, OSError) as error:
            print(f"WRONG {step.__name__}: {error}", flush=True)
            code = EX_CONFIG if isinstance(error, chili.CredentialsRefused) else code or 1
    return code


def main() -> int:
    """`python poller.py`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="poller.py",
        description="Fetch the files of finished GraFx orders: from database.json to ./orders.",
        epilog="Settings come from the environment and .env beside poller.py; README.md lists them."
        " Exit codes: 0 done; 1 an order failed or could not be asked, or the poller cannot start;"
        " 78 wrong settings or refused credentials.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="ask about each order once, and end")
    what.add_argument(
        "--check", action="store_true", help="try settings, database, folder and token, and end"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log each request, without any secret")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run` has its own: Ctrl-C needs no traceback
    screen = Screen()
    logging.basicConfig(handlers=[screen])
    for logger in (log, logging.getLogger("chili")):
        logger.setLevel(logging.DEBUG if given.verbose else logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs addresses whole, signatures too
    logging.raiseExceptions = False  # a log that nobody reads any more is no reason to fail
    try:
        settings = load_settings()
    except SettingsError as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return EX_CONFIG
    if given.check:
        return check(settings)
    try:
        with db.lock(settings.database, "pid", patience=0) as lock:
            store = db.read(settings.database)
            prepare_folder(settings.orders_dir)
            chili.remove_leftovers(settings.orders_dir)
            poller = Poller(settings, screen, lock, given.once)
            poller.take(store)
            return poller.run()
    except (db.DatabaseError, OSError) as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a thread that still hangs somewhere must not hold up the end
