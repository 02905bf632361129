"""The long runs: the poller killed at random moments, and kept busy for long.

    python tests/torture.py --kills 1000       kill -9, look at what is left and how often ON_DONE ran, go on
    python tests/torture.py --orders 20000     that many orders through one process
    python tests/torture.py --outage 1000      so many orders while GraFx has every fault there is

The suite runs a short one of each, see test_crash.py and test_outage.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import Home, Running, eventually
from sandbox import Fault, Sandbox
from test_faults import FAULTS, FINAL, HELD, JSON_REJECTION, now

import db

PENDING = 150  # orders that are pending at any time of a series of kills
MIB = 1 << 20


def place(home: Home, task_ids: Iterable[str]) -> None:
    """Add many orders in one write, as another program may: under the lock, a whole new file."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with db.lock(home.database, "lock", patience=30):
        data = home.read() if home.database.exists() else {"orders": {}, "failed": {}}
        data["orders"].update({task_id: {"added": now} for task_id in task_ids})
        home.write(data)


def hidden(folder: Path) -> set[str]:
    """Temporary files; the locks and the list of deliveries are not, they are there for ever."""
    return {path.name for path in folder.glob(".*") if path.suffix not in (".lock", ".pid", ".delivered")}


# --- kill -9 -------------------------------------------------------------------------------------


# Some files it takes away, for some it takes its time. That it has ended is its last act.
ON_DONE = """#!/bin/sh
case $TASK_ID in
    [0-3]*) mv "$ORDER_FILE" "$FOLDER/taken/" || exit ;;
    [4-7]*) sleep 0.1 ;;
esac
echo "$TASK_ID" >>"$FOLDER/ended"
"""


class Lines:
    """The lines of a file that others append to."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0

    def new(self) -> list[str]:
        """Those that came since the last call."""
        if not self.path.exists():
            return []
        with self.path.open() as file:
            file.seek(self.at)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self.at += len(whole.encode())
        return whole.splitlines()


class Kills:
    """Orders that finish all the time, and a poller that is killed all the time."""

    def __init__(self, folder: Path, grafx: Sandbox, seed: int) -> None:
        self.home, self.grafx, self.chance = Home(folder, grafx), grafx, random.Random(seed)
        self.placed: set[str] = set()
        self.done: set[str] = set()  # out of database.json, its file compared and then put away
        self.bytes = 0
        grafx.body(grafx.add(size=10_000))  # what it pads files with is the same from here on
        self.left: Counter[str] = Counter()  # what kills left behind
        (command := folder / "on-done").write_text(ON_DONE)
        command.chmod(0o755)
        (folder / "taken").mkdir()
        self.home.env |= {"ON_DONE": str(command), "FOLDER": str(folder)}
        self.ends_file, self.list_file = Lines(folder / "ended"), Lines(folder / ".database.json.delivered")
        self.ended: list[str] = []  # the orders whose command has ended since the last kill
        self.runs: Counter[str] = Counter()  # how often it did before
        self.listed: set[str] = set()  # what was delivered, by the list
        self.taken: set[str] = set()  # whose file the command has moved
        self.hit: Counter[str] = Counter()  # how often it was so at a kill: ended, but no line
        self.alone = 0  # how many of these were commands that ran when the poller was killed, and went on
        self.back = 0  # delivered orders that were put into database.json again

    def new(self) -> str:
        """An order of 1 kB to 4 MB that renders for up to 1.5 s, small ones more often."""
        task_id = str(uuid.UUID(int=self.chance.getrandbits(128), version=4))
        kind = self.chance.choice(("png", "jpg", "pdf", "mp4"))
        size = round(1000 * 4000 ** self.chance.random())
        self.grafx.add(kind, task_id=task_id, size=size, after=1.5 * self.chance.random())
        self.placed.add(task_id)
        return task_id

    def fill(self) -> None:
        new = [self.new() for _ in range(PENDING - len(self.placed - self.done))]
        old = self.chance.sample(sorted(self.done), min(len(self.done), self.chance.choice((0, 0, 1, 10))))
        self.back += len(old)
        place(self.home, new + old)

    def look(self) -> set[str]:
        """The orders whose command has ended, but whose line is not there."""
        self.ended += self.ends_file.new()
        for line in self.list_file.new():
            task_id = line.split()[1]
            assert task_id not in self.listed, f"delivered twice: {task_id}"
            self.listed.add(task_id)
        return {task_id for task_id in self.ended if task_id not in self.listed}

    def kill(self, poller: Running) -> None:
        """At any time, or at one of the moments that matter: as soon as its sign is seen, and a bit later."""
        folder, orders = self.home.folder, self.home.orders
        before = set(self.home.files())
        sign: Callable[[], object] = self.chance.choice(
            (
                lambda: False,
                lambda: hidden(orders),  # a file is being written
                lambda: hidden(folder),  # database.json is
                lambda: any(not name.startswith(".") for name in set(self.home.files()) - before),
                self.look,  # a command has ended
            )
        )
        started = time.monotonic()
        until = started + 1.5 * self.chance.random()
        if self.chance.random() < 0.5:  # another program adds one meanwhile
            db.add_order(self.new(), path=self.home.database)
        while time.monotonic() < until and not (time.monotonic() > started + 0.3 and sign()):
            time.sleep(0.0005)
        time.sleep(0.01 * self.chance.random() ** 2)
        self.kill_now(poller, self.chance.random() < 0.5)

    def kill_now(self, poller: Running, with_commands: bool) -> None:
        """The poller, with its commands as systemd does it, or alone; and see which orders it hit."""
        poller.process.send_signal(signal.SIGSTOP)  # so that all of it is looked at as it was killed
        assert os.WIFSTOPPED(os.waitpid(poller.process.pid, os.WUNTRACED)[1]), poller.log()
        commands = psutil.Process(poller.process.pid).children(recursive=True)
        ended = self.look()
        poller.stop(signal.SIGKILL)
        for command in commands:
            with contextlib.suppress(psutil.NoSuchProcess):
                if with_commands:
                    command.kill()
        eventually(lambda: not any(map(runs, commands)), "commands that go on alone come to their end")
        hit = self.look()
        assert len(set(self.ended)) == len(self.ended), f"ON_DONE ran twice in one poller: {self.ended}"
        assert not self.runs.keys() & set(self.ended) - self.hit.keys(), (
            "ON_DONE ran after the line was there"
        )
        self.hit.update(hit)
        self.alone += len(hit - ended)
        self.runs.update(self.ended)
        self.ended = []

    def inspect(self) -> None:
        """What must hold at any time, whatever was killed."""
        data = json.loads(self.home.database.read_bytes())
        assert not data["failed"], data["failed"]
        pending = set(data["orders"])
        visible = [path for path in self.home.orders.iterdir() if not path.name.startswith(".")]
        files = {path.stem: path for path in visible}
        assert len(files) == len(visible), f"one order, two files: {sorted(path.name for path in visible)}"
        for task_id, path in files.items():
            assert task_id in self.placed - self.done, f"nobody ordered {path.name}, or it came twice"
            assert path.read_bytes() == self.grafx.body(task_id), f"{path.name} is not what was served"
        for path in (self.home.folder / "taken").iterdir():
            assert path.stem in self.placed - self.done, f"nobody ordered {path.name}, or it came twice"
            assert path.read_bytes() == self.grafx.body(path.stem), f"{path.name} is not what was served"
            path.unlink()
            self.taken.add(path.stem)
        out = self.placed - self.done - pending
        lost = out - files.keys() - self.taken
        assert not lost, f"lost: {sorted(lost)}"
        assert out <= self.runs.keys(), f"ON_DONE did not run: {sorted(out - self.runs.keys())}"
        assert out <= self.listed, f"not noted as delivered: {sorted(out - self.listed)}"
        for task_id in out:
            self.done.add(task_id)
            self.bytes += len(self.grafx.body(task_id))
            if task_id in files:
                files.pop(task_id).unlink()
        half = hidden(self.home.orders)
        self.left["a half-written file"] += bool(half)
        self.left["a half-written database.json beside the whole one"] += bool(hidden(self.home.folder))
        self.left["a delivered file whose order still stood in database.json"] += bool(pending & set(files))
        # Somebody takes an order out whose file was on its way: what is left of it must go, too.
        for task_id in pending - files.keys() - self.runs.keys():
            if any(task_id in name for name in half) and self.chance.random() < 0.1:
                db.remove_order(task_id, self.home.database)
                self.placed.remove(task_id)

    def finish(self) -> None:
        """Without a kill: all is delivered, nothing is left over."""
        poller = self.home.start()
        eventually(lambda: not self.home.waiting(), "the last orders are delivered", 120)
        assert poller.stop() == 0, poller.log()
        assert not self.look(), "delivered without a line"
        self.runs.update(self.ended)
        self.inspect()
        assert self.done == self.placed == self.listed
        assert not hidden(self.home.orders) | hidden(self.home.folder)
        assert not self.home.files(), self.home.files()
        once = Counter(self.placed)
        assert self.runs == once + self.hit, f"run more often: {self.runs - once - self.hit}"


def runs(process: psutil.Process) -> bool:
    """A process that has ended may stay known, where nobody asks how it did."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kills(folder: Path, number: int, seed: int, say: Callable[[str], None] = print) -> str:
    """Kill the poller so many times; gives the summary. Raises AssertionError where anything is lost."""
    with Sandbox() as grafx:
        run = Kills(folder, grafx, seed)
        for count in range(1, number + 1):
            run.fill()
            run.kill(run.home.start())
            run.inspect()
            say(f"{count} of {number} kills, {len(run.done)} of {len(run.placed)} orders delivered")
        run.finish()
    again = run.hit.total()
    return (
        f"{number} kills, seed {seed}: {len(run.placed)} orders, {run.bytes / 1e6:.0f} MB; "
        "none lost, all delivered, each file equal to what was served\n"
        + "\n".join(f"  {count} kills left {what}" for what, count in run.left.items())
        + f"\n{run.runs.total()} times ON_DONE ran, for each order at least once; {again} times again:\n"
        f"  {again - run.alone} times killed between the command's end and its line in the list\n"
        f"  {run.alone} times killed while the command ran, which went on alone to its end\n"
        f"  0 times for another reason, though {run.back} times a delivered order was re-added"
    )


# --- endurance -----------------------------------------------------------------------------------


def endurance(
    folder: Path, number: int, first: int, say: Callable[[str], None] = print
) -> tuple[list[int], list[int], str]:
    """(bytes, descriptors) at most until the `first` were delivered, and at the end, and a summary.

    At the end is at most in the last tenth for bytes, and when all is delivered for descriptors: those of the
    requests under way vary from moment to moment.
    """
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        pending = min(1000, first)  # it takes up new orders once a second, so that many at once
        placed = delivered = 0
        poller = home.start()
        try:
            process = psutil.Process(poller.process.pid)
            peaks: dict[str, list[int]] = {"first": [0, 0], "last": [0, 0]}
            began = time.monotonic()
            while delivered < number:
                left = len(home.waiting()) if placed else 0
                delivered = placed - left
                if left <= pending * 3 // 4 and placed < number:
                    new = min(number - placed, pending - left)
                    place(home, [grafx.add("png") for _ in range(new)])
                    placed += new
                now = [process.memory_info().rss, process.num_fds()]
                for part, counts in (("first", delivered <= first), ("last", delivered >= number * 9 // 10)):
                    if counts:
                        peaks[part] = list(map(max, peaks[part], now))
                seconds = time.monotonic() - began
                say(f"{delivered} of {number} orders, {seconds:.0f} s, {now[0] / MIB:.1f} MiB, {now[1]} open")
                time.sleep(0.1)
                assert poller.process.poll() is None, poller.log()
            peaks["last"][1] = now[1]
            assert poller.stop() == 0, poller.log()
        finally:
            poller.process.kill()
            poller.process.wait()
        assert not home.failed(), home.failed()
        assert len(home.files()) == number
    early, late = peaks["first"], peaks["last"]
    return (
        early,
        late,
        f"{number} orders through one process in {seconds:.0f} s: resident memory {early[0] / MIB:.1f} MiB "
        f"up to the first {first} and {late[0] / MIB:.1f} MiB in the last tenth, "
        f"open descriptors {early[1]} and at the end {late[1]}",
    )


# --- outages -------------------------------------------------------------------------------------

LANES = 3  # faults at a time
Event = tuple[float, Callable[[], object]]  # after so many seconds, what happens


def outage(
    folder: Path, number: int, longest: float, seed: int, once: bool, say: Callable[[str], None] = print
) -> str:
    """Orders that finish while GraFx has every fault of test_faults.py; gives the summary.

    Each fault lasts up to `longest` seconds, for some of the orders or for all. `once` is `--once`, again and
    again. Raises AssertionError where an order failed, was not delivered, or got another one's file.
    """
    chance = random.Random(seed)
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        home.env["POLL_INTERVAL"] = str(max(0.3, longest / 12))
        tasks = [str(uuid.UUID(int=chance.getrandbits(128), version=4)) for _ in range(number)]
        events, faults = outage_plan(grafx, tasks, longest, chance)
        lasts = events[-1][0]
        orders = {}
        for task_id in tasks:
            # Some 70 kB are more than is read at once, and what gzip-far needs.
            grafx.add(task_id=task_id, size=chance.randrange(70_500, 90_000), after=lasts * chance.random())
            age = timedelta(seconds=10 ** (5 * chance.random()))  # a second to a day
            orders[task_id] = {"added": (datetime.now(timezone.utc) - age).isoformat(timespec="seconds")}
        home.write({"orders": orders, "failed": {}})
        early, runs = go_through(home, events, longest / 60, once, say)
        left = home.read()
        assert not left.get("failing"), left
        assert set(home.files()) == {f"{task_id}.png" for task_id in tasks}
        for task_id in tasks:
            file = home.orders / f"{task_id}.png"
            assert file.read_bytes() == grafx.body(task_id), f"{file.name} is not its own"
        hit = sum(request.fault is not None for request in grafx.requests)
        return (
            f"{number} orders, {faults} faults of {longest / 12:g} to {longest:g} s in {lasts:.0f} s, "
            f"{f'{runs} times --once' if once else 'one process'}, seed {seed}: none failed, all delivered, "
            f"each file its own; {hit} of {len(grafx.requests)} requests met a fault, "
            f"{early} orders were delivered all the same before the last one was over"
        )


def both_outages(
    folder: Path, number: int, longest: float, seed: int, say: Callable[[str], None] = print
) -> str:
    """The same with and without --once, side by side; gives both summaries."""
    modes = ("one process", False), ("--once", True)
    with ThreadPoolExecutor() as pool:
        runs = []
        for name, once in modes:
            (folder / name).mkdir()
            report = say if not once else lambda line: None
            runs.append(pool.submit(outage, folder / name, number, longest, seed, once, report))
        return "\n".join(run.result() for run in runs)


def outage_plan(
    grafx: Sandbox, tasks: list[str], longest: float, chance: random.Random
) -> tuple[list[Event], int]:
    """When which fault begins and ends, by time, and how many there are."""
    deck = [(fault, options, ends) for _, fault, options, *ends in FAULTS]
    chance.shuffle(deck)
    events: list[Event] = []
    ready = [0.0] * LANES
    for fault, options, ends in deck:
        # The token is everybody's, so its faults are fewer. What is final or for a year is no outage, nor is
        # a token server that says in its own words that the credentials are wrong.
        weights = (2, 2, 0 if options is JSON_REJECTION else 1)
        places = [
            place
            for place, end, weight in zip(("task", "download", "token"), ends, weights, strict=True)
            for _ in range(0 if end in (FINAL, HELD) else weight)
        ]
        if not places:
            continue
        place, lane = chance.choice(places), ready.index(min(ready))
        begins = ready[lane] + chance.uniform(0, longest / 6)
        ready[lane] = ends_at = begins + chance.uniform(longest / 12, longest)
        some = frozenset(chance.sample(tasks, round(len(tasks) * chance.uniform(0.2, 1))))
        running: list[Fault] = []

        def begin(
            place: str = place, fault: str = fault, options: dict[str, Any] = options,
            some: Collection[str] = some, running: list[Fault] = running,
        ) -> None:  # fmt: skip
            hit = None if place == "token" else some
            more = {"size": 2 * MIB} if fault == "huge" else now(grafx, options)
            running.append(grafx.fault(place, fault, times=None, task_id=hit, **more))
            if place == "token":
                grafx.revoke()  # so that a new one is asked for

        def end(running: list[Fault] = running) -> None:
            grafx.end_fault(running[0])

        events += [(begins, begin), (ends_at, end)]
    events.sort(key=lambda event: event[0])
    return events, len(events) // 2


def go_through(
    home: Home, events: list[Event], scale: float, once: bool, say: Callable[[str], None]
) -> tuple[int, int]:
    """All of it, until no order is pending; gives how many were delivered before the last fault was over, and
    how many processes it took."""
    before = ""
    if scale < 1:  # pauses and patience as short as the faults are
        before = (
            f"chili.TIMEOUT = ({max(1, 10 * scale)}, {max(1, 30 * scale)}); "
            f"chili.SLOW_START = chili.TOKEN_PAUSE = {max(1, 60 * scale)}; "
            f"poller.SHORTEST_PAUSE = {max(0.1, 2 * scale)}; db.LOOK = {max(0.1, scale)}"
        )
    arguments = ["--once"] if once else []
    began, count, early, runs = time.monotonic(), len(home.waiting()), 0, 1
    patience = events[-1][0] + max(60, 600 * scale)
    poller, pause_until = home.start(*arguments, before=before), 0.0
    try:
        while True:
            seconds = time.monotonic() - began
            while events and events[0][0] <= seconds:
                events.pop(0)[1]()
            data, code = home.read(), poller.process.poll()
            assert not data["failed"], data["failed"]
            left = len(data["orders"])
            early = early if not events else count - left
            say(f"{count - left} of {count} orders, {seconds:.0f} s, {len(events)} faults begin or end")
            if code is not None:
                assert once and code in (0, 1) and "Traceback" not in poller.log(), poller.log()
            if not left and not events:
                break
            assert seconds < patience, f"{left} orders are left\n{poller.log()}"
            if code is not None and not pause_until:
                pause_until = seconds + scale
            elif code is not None and seconds >= pause_until:
                poller, pause_until, runs = home.start(*arguments, before=before), 0.0, runs + 1
            time.sleep(0.1)
        assert poller.stop() in ((0, 1) if once else (0,)), poller.log()
        assert "Traceback" not in poller.log(), poller.log()
    finally:
        poller.process.kill()
        poller.process.wait()
    return early, runs


# --- the program ---------------------------------------------------------------------------------


def progress() -> Callable[[str], None]:
    """One live line; where nobody sits before it, a line every 10 s."""
    last = time.monotonic()

    def say(line: str) -> None:
        nonlocal last
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="", flush=True)
        elif time.monotonic() - last >= 10:
            last = time.monotonic()
            print(line, flush=True)

    return say


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kills", type=int, metavar="N", help="kill the poller so many times")
    what.add_argument("--orders", type=int, metavar="N", help="let one process deliver so many orders")
    what.add_argument(
        "--outage", type=int, metavar="N", help="let N orders meet every fault, without and with --once"
    )
    parser.add_argument(
        "--longest", type=float, metavar="S", default=60, help="seconds of a fault at most (60)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of kills and faults; a random one if not given"
    )
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="grafx-torture-"))
    seed = random.randrange(10**6) if given.seed is None else given.seed
    try:
        if given.orders is None:
            print(f"seed {seed}, in {folder}", flush=True)
        if given.kills:
            summary = kills(folder, given.kills, seed, progress())
        elif given.outage:
            summary = both_outages(folder, given.outage, given.longest, seed, progress())
        else:
            early, late, summary = endurance(folder, given.orders, min(2000, given.orders // 2), progress())
            known = 250 * given.orders  # bytes: the ids of the list of deliveries stay in memory
            assert late[0] <= early[0] + 2 * MIB + known and late[1] <= early[1], summary
    except AssertionError as error:
        print(f"\nFAILED: {error}\nAll of it is in {folder}", file=sys.stderr)
        return 1
    print(f"\n{summary}" if sys.stdout.isatty() else summary)
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
