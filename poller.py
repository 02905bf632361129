"""Fetch the files of finished GraFx orders: from `database.json` to `./orders`.

    python poller.py             ask about every order, deliver, and keep on until SIGTERM or Ctrl-C
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
import math
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

import chili
import db

EX_CONFIG = 78  # sysexits.h: "configuration error"
SHORTEST_PAUSE = 2.0  # seconds between two questions about one order; CHILI's own client takes 2
FAILURES = 3  # answers in a row that speak of a failed order before it counts as one
PROGRESS = 10.0  # seconds between two log lines about one download
LOOK = 1.0  # seconds between two looks at whether database.json changed

log = logging.getLogger("poller")


class SettingsError(Exception):
    """All that is wrong with the settings, a line each with the mend."""


@dataclass(frozen=True)
class Settings:
    """What the environment and `.env` say. Times are seconds."""

    server_id: str
    server_secret: str
    base_url: str
    environment: str
    token_url: str
    poll_interval: float
    concurrency: int
    database: Path
    orders_dir: Path


def load_settings() -> Settings:
    """Raises SettingsError with one line for each thing that is wrong."""
    wrong: list[str] = []
    try:
        given = db.settings()
    except db.DatabaseError as error:
        raise SettingsError(str(error)) from None

    def required(name: str, mend: str) -> str:
        if not given.get(name):
            wrong.append(f"{name} is missing: {mend}, in .env or the environment")
        return given.get(name, "")

    def address(name: str, url: str) -> str:
        parts = urlsplit(url)
        host = parts.hostname or ""
        try:
            loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if url and (parts.scheme not in ("http", "https") or not host or parts.username or parts.query):
            wrong.append(f"{name} is no web address: write https://HOST")
        elif parts.scheme == "http" and not loopback:
            wrong.append(f"{name} must begin with https://, or the token crosses the network in the clear")
        return url.rstrip("/")

    def number(name: str, default: float, least: float, most: float, whole: bool = False) -> float:
        text = given.get(name, str(default))
        try:
            value = float(int(text) if whole else float(text))
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            wrong.append(f"{name} is {text}: write a {'whole ' * whole}number from {least:g} to {most:g}")
        return value

    settings = Settings(
        server_id=required("SERVER_ID", "the client id of the integration"),
        server_secret=required("SERVER_SECRET", "the client secret of the integration"),
        base_url=address("BASEURL", required("BASEURL", "https://ENVIRONMENT.chili-publish.online")),
        environment=required("ENVIRONMENT", "the environment's name, as in cp-abc-123"),
        token_url=address(
            "TOKEN_URL", given.get("TOKEN_URL", "https://integration-login.chiligrafx.com/oauth/token")
        ),
        # An hour at most: GraFx keeps a finished file for 4.
        poll_interval=number("POLL_INTERVAL", 60, 0.1, 3600),
        concurrency=int(number("CONCURRENCY", 8, 1, 64, whole=True)),
        database=Path(os.path.realpath(db.default_path())),
        orders_dir=db.HERE / given.get("ORDERS_DIR", "orders"),
    )
    if settings.environment and not re.fullmatch(r"[A-Za-z0-9._-]+", settings.environment):
        wrong.append("ENVIRONMENT is no environment's name: letters, digits, '.', '_' and '-'")
    if wrong:
        raise SettingsError("\n".join(wrong))
    return settings


def added(fields: db.Fields) -> float:
    """When an order was added, in seconds of `time.time()`; now where it does not say."""
    try:
        when = datetime.fromisoformat(str(fields.get("added")).replace("Z", "+00:00"))
    except ValueError:
        return time.time()
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


def prepare_folder(orders_dir: Path) -> None:
    """Make the folder where it is missing, and see that a file can be written. Raises OSError."""
    orders_dir.mkdir(exist_ok=True)
    trial = orders_dir / ".trial.part"
    trial.touch()
    trial.unlink()


# --- what a person sees ----------------------------------------------------------------------


class Screen(logging.StreamHandler):  # type: ignore[type-arg]
    """The log on stderr; in a terminal with one live line below it."""

    line = ""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.terminal = sys.stderr.isatty()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        line = self.line
        self.show("")
        super().emit(record)
        self.show(line)

    def show(self, line: str) -> None:
        """Put `line` in the place of the live line."""
        line = line[: shutil.get_terminal_size().columns - 1]
        if self.terminal and line != self.line:
            with self.lock or threading.RLock():
                self.stream.write("\r\x1b[K" + line)
                self.flush()
        self.line = line


def human(size: float) -> str:
    """Bytes as "7.6 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


# --- the loop --------------------------------------------------------------------------------


@dataclass(eq=False)
class Order:
    """A waiting order, as long as this process knows it. Times are monotonic seconds."""

    task_id: str
    project: str
    born: float  # by its `added`, else when it was first seen
    due: float
    questions: int = 0
    failures: int = 0  # answers in a row that speak of a failed order
    troubles: int = 0  # in a row: it could not be asked
    trouble: str = ""  # what it waits on, as logged
    size: int = 0  # bytes of its file that are here
    total: int | None = None
    logged: float = 0.0  # when its progress was, or it was asked about

    def progress(self, size: int, total: int | None) -> None:
        """Called by the download for each piece."""
        self.size, self.total = size, total

    def share(self) -> str:
        """How much of its file is here: "45% of 7.6 MB"."""
        return f"{100 * self.size // self.total}% of {human(self.total)}" if self.total else human(self.size)


class Poller:
    """The settings, the orders known, and those being asked about."""

    def __init__(self, settings: Settings, screen: Screen, once: bool = False) -> None:
        self.settings, self.screen, self.once = settings, screen, once
        self.token = chili.DangerousToken(settings.token_url, settings.server_id, settings.server_secret)
        self.http = chili.Connections(settings.concurrency)
        self.todo: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Order, bool | Exception] | None] = queue.SimpleQueue()
        self.orders: dict[str, Order] = {}
        self.due: list[tuple[float, str]] = []  # a heap; an entry that is not its order's `due` is stale
        self.asking: dict[str, Order] = {}
        self.delivered: set[str] = set()  # not yet written to database.json, as are:
        self.failed: dict[str, tuple[int | None, str]] = {}
        self.written = 0.0
        self.seen: tuple[int, ...] | None = ()
        self.look = 0.0
        self.strange: set[str] = set()  # entries warned about
        self.complaints: dict[str, str] = {}  # what is wrong with reading or writing database.json
        self.shared: dict[str, set[str]] = {}  # what stands in every order's way: the orders that met it
        self.troubles = 0
        self.paused_until = 0.0
        self.accepted = False  # the credentials, at least once
        self.stopping = False
        self.exit_code = 0

    def run(self) -> int:
        """Poll until a signal, or for `--once` until each order was asked about; gives the exit code."""
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.on_signal)
        for _ in range(self.settings.concurrency):
            # Daemons: a thread that hangs in a name lookup must not hold up the stop.
            threading.Thread(target=self.work, daemon=True).start()
        self.orders[""] = Order("", "", time.monotonic(), 0.0)  # no order: whether a token is to be had
        self.again(self.orders[""], 0.0)
        while True:
            self.take_new_orders()
            self.ask_due_orders()
            self.hear_answers()
            self.write_outcomes()
            self.show()
            if self.stopping or (self.once and not self.due and not self.asking):
                return self.stop()

    def on_signal(self, *_: object) -> None:
        """Set a flag, wake the loop, and nothing else: it may interrupt anything."""
        self.stopping = True
        self.answers.put(None)

    def work(self) -> None:
        """A thread: ask about one order after the other."""
        while not self.stopping:
            order = self.todo.get()
            try:
                answer: bool | Exception = self.ask(order)
            except Exception as error:  # noqa: BLE001 - the loop looks at what it is
                answer = error
            self.answers.put((order, answer))

    def ask(self, order: Order) -> bool:
        """What GraFx says of the order; see `chili.order_done`."""
        if not order.task_id:
            self.token.get(self.http)
            return True
        return chili.order_done(
            order.task_id,
            self.settings.base_url,
            self.settings.environment,
            self.token,
            self.http,
            self.settings.orders_dir,
            order.progress,
        )

    def take_new_orders(self) -> None:
        """Look at whether database.json changed, and if so which orders came or went."""
        now = time.monotonic()
        if now < self.look:
            return
        self.look = now + LOOK
        try:
            if db.version(self.settings.database) != self.seen:
                self.take(db.read(self.settings.database, patience=0))
            self.complain("read", "")
        except db.HalfSaved:
            pass  # the next look tells
        except (db.DatabaseError, OSError) as error:
            self.complain("read", str(error))

    def take(self, store: db.Store) -> None:
        """Know the orders of `store` and no others."""
        first = self.seen == ()
        self.seen = store.version
        if self.once and not first:
            return
        for task_id in self.orders.keys() - store.orders.keys() - {""}:
            self.over(self.orders.pop(task_id))
        for task_id, fields in store.orders.items():
            if task_id in self.orders or task_id in self.delivered or task_id in self.failed:
                continue
            if task_id in self.asking:  # taken out of the file and put back meanwhile
                self.orders[task_id] = self.asking[task_id]
                continue
            age = max(0.0, time.time() - added(fields))
            order = Order(task_id, str(fields.get("projectID") or ""), time.monotonic() - age, 0.0)
            self.orders[task_id] = order
            self.again(order, 0.0)
        for item in set(store.strange) - self.strange:
            log.warning(
                "%s: not a task id, left alone: %s", self.settings.database.name, " ".join(item.split())
            )
        self.strange = set(store.strange)

    def ask_due_orders(self) -> None:
        """Hand orders whose time has come to the threads, as many as may be asked about at once."""
        now = time.monotonic()
        if now < self.paused_until:
            if self.once:  # cron comes again
                self.due.clear()
                self.exit_code = self.exit_code or 1
            return
        while self.due and self.due[0][0] <= now and len(self.asking) < self.settings.concurrency:
            due, task_id = heapq.heappop(self.due)
            order = self.orders.get(task_id)
            if order is None or order.due != due:
                continue
            if order.questions == 0 and task_id:
                log.info(
                    "%s asked about for the first time%s",
                    task_id,
                    order.project and f", project {order.project}",
                )
            order.questions, order.logged = order.questions + 1, now
            self.asking[task_id] = order
            self.todo.put(order)

    def again(self, order: Order, pause: float) -> None:
        """Re-queue an order; it stays in database.json all the while."""
        order.due = time.monotonic() + pause
        heapq.heappush(self.due, (order.due, order.task_id))

    def hear_answers(self) -> None:
        """Wait for an answer, the next order due, or the next look at the file."""
        now = time.monotonic()
        until = now + (0.2 if self.screen.terminal and self.asking else LOOK)
        if self.due and len(self.asking) < self.settings.concurrency:
            until = min(until, max(self.due[0][0], self.paused_until))
        try:
            answer = self.answers.get(timeout=max(0.0, until - now))
            while True:
                if answer:
                    self.heard(*answer)
                answer = self.answers.get_nowait()
        except queue.Empty:
            self.http.cut()

    def heard(self, order: Order, answer: bool | Exception) -> None:
        """Decide what becomes of an order."""
        del self.asking[order.task_id]
        order.size = 0
        if isinstance(answer, chili.AskAgainLater):
            self.later(order, answer)
            return
        if isinstance(answer, Exception) and not isinstance(answer, chili.OrderFailed):
            log.error("%s: unforeseen, please report it", order.task_id, exc_info=answer)
            self.later(order, chili.AskAgainLater(f"{type(answer).__name__}, see above"))
            return
        self.accepted = True
        self.troubles = order.troubles = 0
        self.over(order)
        # So a file is here at most a quarter of its render time (and 2 s) after it is ready,
        # and an order that takes an hour is not asked about 1,800 times.
        pause = min(self.settings.poll_interval, max(SHORTEST_PAUSE, (time.monotonic() - order.born) / 4))
        if isinstance(answer, chili.OrderFailed):
            order.failures += 1
            if answer.final or order.failures >= FAILURES:
                self.orders.pop(order.task_id, None)
                self.failed[order.task_id] = (answer.status, str(answer))
                self.exit_code = self.exit_code or 1
                log.error("%s failed: %s", order.task_id, answer)
                return
            pause = min(pause, SHORTEST_PAUSE) if self.once else pause
            log.warning(
                "%s: %s (%d of %d, asked again in %.0f s)",
                *(order.task_id, answer, order.failures, FAILURES, pause),
            )
            self.again(order, pause)
        elif answer:
            self.orders.pop(order.task_id, None)
            if order.task_id:
                self.delivered.add(order.task_id)
                self.log_delivery(order)
        else:
            order.failures = 0
            if not self.once:
                self.again(order, pause)

    def later(self, order: Order, error: chili.AskAgainLater) -> None:
        """The order could not be asked about, through no fault of its own."""
        if self.stopping:
            return
        now = time.monotonic()
        if isinstance(error, chili.CredentialsRefused) and not self.accepted:
            log.error("%s", error)
            self.exit_code, self.stopping = EX_CONFIG, True
            return
        if error.shared and now >= self.paused_until:
            self.troubles += 1
            self.paused_until = now + self.growing(self.troubles)
        if error.pause is not None:
            self.paused_until = max(self.paused_until, now + error.pause)
        order.failures = 0
        order.troubles += 1
        if order.trouble != str(error):
            self.over(order)
            order.trouble = str(error)
            if error.shared:
                met = self.shared.setdefault(order.trouble, set())
                if not met:
                    log.warning("all orders wait: %s", error)
                met.add(order.task_id)
            else:
                log.warning("%s waits: %s", order.task_id, error)
        if self.once:
            self.exit_code = self.exit_code or 1
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
        order.trouble = ""

    def log_delivery(self, order: Order) -> None:
        file = chili.find_file(self.settings.orders_dir, order.task_id)
        log.info(
            "%s delivered: %s, %s, %.1f s, %d question%s",
            order.task_id,
            file.name if file else "moved away already",
            human(file.stat().st_size if file else 0),
            time.monotonic() - order.born,
            order.questions,
            "s" * (order.questions != 1),
        )

    def write_outcomes(self, patience: float = 0.2) -> None:
        """Write what came of the orders: all at once when nobody is being asked, else every second."""
        now = time.monotonic()
        busy = self.asking or self.complaints.get("write")
        if not (self.delivered or self.failed) or (busy and now - self.written < 1 and not self.stopping):
            return
        self.written = now
        try:
            store = db.end_orders(self.delivered, self.failed, self.settings.database, patience)
        except db.DatabaseError as error:
            self.complain("write", str(error))
            return
        self.complain("write", "")
        self.delivered.clear()
        self.failed.clear()
        self.take(store)

    def complain(self, what: str, problem: str) -> None:
        """Log once what is wrong with database.json, and once that it is over."""
        before = self.complaints.get(what, "")
        if problem and problem != before:
            log.error("%s", problem)
        elif before and not problem:
            log.info("over: %s", before)
        self.complaints[what] = problem

    def show(self) -> None:
        """The live line; elsewhere the progress of long downloads."""
        running = [order for order in self.asking.values() if order.size]
        if self.screen.terminal:
            waiting = f"{len(self.orders.keys() - {''})} waiting"
            trouble = [f"all wait: {text}" for text in self.shared]
            self.screen.show(
                " | ".join([waiting, *trouble, *(f"{order.task_id} {order.share()}" for order in running)])
            )
            return
        now = time.monotonic()
        for order in running:
            if now - order.logged >= PROGRESS:
                order.logged = now
                log.info("%s downloading: %s", order.task_id, order.share())

    def stop(self) -> int:
        """Drop what is under way, write what came of the rest."""
        self.stopping = True
        deadline = time.monotonic() + 1.0
        while self.asking and time.monotonic() < deadline:
            self.http.cut(everything=True)
            try:
                answer = self.answers.get(timeout=0.05)
                if answer:
                    self.heard(*answer)
            except queue.Empty:
                pass
        self.write_outcomes()
        with contextlib.suppress(OSError):
            chili.remove_leftovers(self.settings.orders_dir)
        self.screen.show("")
        log.info("stopped, %d waiting", len(self.orders.keys() - {""}))
        if self.delivered or self.failed:
            log.error(
                "%d outcomes could not be written; they are found again at the next start",
                len(self.delivered) + len(self.failed),
            )
            return self.exit_code or 1
        return self.exit_code


# --- python poller.py ------------------------------------------------------------------------


def check(settings: Settings) -> int:
    """Try all that the poller needs, and say what is fine and what is not; gives the exit code."""

    def database() -> str:
        store = db.read(settings.database)
        return f"{settings.database}: {len(store.orders)} waiting, {len(store.failed)} failed"

    def folder() -> str:
        prepare_folder(settings.orders_dir)
        return str(settings.orders_dir)

    def token() -> str:
        chili.DangerousToken(settings.token_url, settings.server_id, settings.server_secret).get(
            chili.Connections(1)
        )
        return f"{settings.token_url} gives one"

    print("ok    settings")
    code = 0
    for step in (database, folder, token):
        try:
            print(f"ok    {step.__name__}: {step()}")
        except (db.DatabaseError, chili.AskAgainLater, OSError) as error:
            print(f"WRONG {step.__name__}: {error}")
            code = EX_CONFIG if isinstance(error, chili.CredentialsRefused) else code or 1
    return code


def main() -> int:
    """`python poller.py`; gives the exit code."""
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
        with db.lock(settings.database, "pid", patience=0):
            db.read(settings.database)
            prepare_folder(settings.orders_dir)
            chili.remove_leftovers(settings.orders_dir)
            return Poller(settings, screen, given.once).run()
    except (db.DatabaseError, OSError) as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a thread that still hangs somewhere must not hold up the end
