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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import Home, Running, eventually
from sandbox import MIB, Fault, Sandbox
from test_faults import FAULTS, FINAL, HELD, JSON_REJECTION, now

import db

PENDING = 150  # orders that are pending at any time of a series of kills
Say = Callable[[str], None]


@contextlib.contextmanager
def place_for(folder: Path) -> Iterator[Home]:
    """A GraFx, and a folder whose pollers end with it."""
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        try:
            yield home
        finally:
            for poller in home.pollers:
                poller.process.kill()
                poller.process.wait()


def place(home: Home, task_ids: Iterable[str]) -> None:
    """Add many orders in one write."""

    def add(store: db.Store) -> None:
        for task_id in task_ids:
            store.put(task_id, {}, new=True)

    db.edit(home.database, add)


def new_id(chance: random.Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


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
        with contextlib.suppress(FileNotFoundError), self.path.open() as file:
            file.seek(self.at)
            # An empty line at the end is how the poller tries whether the list takes one, and goes again.
            if whole := file.read().rpartition("\n")[0].rstrip("\n"):
                self.at += len(whole) + 1
                return list(filter(None, whole.split("\n")))
        return []


class Kills:
    """Orders that finish all the time, and a poller that is killed all the time."""

    def __init__(self, home: Home, seed: int) -> None:
        self.home, self.grafx, self.chance = home, home.grafx, random.Random(seed)
        self.placed: set[str] = set()
        self.done: set[str] = set()  # out of database.json, its file compared and then put away
        self.bytes = 0
        (command := home.folder / "on-done").write_text(ON_DONE)
        command.chmod(0o755)
        (home.folder / "taken").mkdir()
        home.env |= {"ON_DONE": str(command), "FOLDER": str(home.folder)}
        self.ends = Lines(home.folder / "ended")
        self.list = Lines(home.folder / ".database.json.delivered")
        self.ended: list[str] = []  # the orders whose command has ended since the last kill
        self.runs: Counter[str] = Counter()  # how often it did before
        self.listed: set[str] = set()  # what was delivered, by the list
        self.taken: set[str] = set()  # whose file the command has moved
        self.hit: Counter[str] = Counter()  # how often it was so at a kill: ended, but no line
        self.alone = 0  # how many of these were commands that ran when the poller was killed, and went on
        self.back = 0  # delivered orders that were put into database.json again

    def new(self) -> str:
        """An order of 1 kB to 4 MB that renders for up to 1.5 s, small ones more often."""
        task_id, kind = new_id(self.chance), self.chance.choice(("png", "jpg", "pdf", "mp4"))
        size = round(1000 * 4000 ** self.chance.random())
        self.placed.add(task_id)
        return self.grafx.add(kind, task_id=task_id, size=size, after=1.5 * self.chance.random())

    def fill(self) -> None:
        new = [self.new() for _ in range(PENDING - len(self.placed - self.done))]
        old = self.chance.sample(sorted(self.done), min(len(self.done), self.chance.choice((0, 0, 1, 10))))
        self.back += len(old)
        place(self.home, new + old)

    def look(self) -> set[str]:
        """The orders whose command has ended, but whose line is not there."""
        self.ended += self.ends.new()
        for line in self.list.new():
            task_id = line.split()[1]
            assert task_id not in self.listed, f"delivered twice: {task_id}"
            self.listed.add(task_id)
        return set(self.ended) - self.listed

    def hidden(self, folder: Path) -> set[str]:
        """Temporary files; the locks and the list of deliveries are not, they are there for ever."""
        lasting = (".lock", ".pid", ".delivered")
        return {path.name for path in folder.glob(".*") if path.suffix not in lasting}

    def kill(self, poller: Running) -> None:
        """At any time, or at one of the moments that matter: as soon as its sign is seen, and a bit later."""
        folder, orders, before = self.home.folder, self.home.orders, set(self.home.files())
        signs: list[Callable[[], object]] = [
            lambda: False,
            lambda: self.hidden(orders),  # a file is being written
            lambda: self.hidden(folder),  # database.json is
            lambda: any(not name.startswith(".") for name in set(self.home.files()) - before),
            self.look,  # a command has ended
        ]
        sign, started = self.chance.choice(signs), time.monotonic()
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
        for command in commands if with_commands else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                command.kill()
        eventually(lambda: not any(map(goes_on, commands)), "commands that go on alone come to their end")
        hit = self.look()
        assert len(set(self.ended)) == len(self.ended), f"ON_DONE ran twice in one poller: {self.ended}"
        again = self.runs.keys() & set(self.ended) - self.hit.keys()
        assert not again, f"ON_DONE ran after the line was there: {again}"
        self.hit.update(hit)
        self.alone += len(hit - ended)
        self.runs.update(self.ended)
        self.ended = []

    def inspect(self) -> None:
        """What must hold at any time, whatever was killed."""
        data = json.loads(self.home.database.read_bytes())
        assert not data["failed"], data["failed"]
        visible = [path for path in self.home.orders.iterdir() if not path.name.startswith(".")]
        files = {path.stem: path for path in visible}
        assert len(files) == len(visible), f"one order, two files: {sorted(path.name for path in visible)}"
        moved = list((self.home.folder / "taken").iterdir())
        for path in visible + moved:
            assert path.stem in self.placed - self.done, f"nobody ordered {path.name}, or it came twice"
            assert path.read_bytes() == self.grafx.body(path.stem), f"{path.name} is not what was served"
        for path in moved:
            path.unlink()
            self.taken.add(path.stem)
        pending = set(data["orders"])
        out = self.placed - self.done - pending
        assert out <= files.keys() | self.taken, f"lost: {sorted(out - files.keys() - self.taken)}"
        assert out <= self.runs.keys(), f"ON_DONE did not run: {sorted(out - self.runs.keys())}"
        assert out <= self.listed, f"not noted as delivered: {sorted(out - self.listed)}"
        self.done |= out
        self.bytes += sum(len(self.grafx.body(task_id)) for task_id in out)
        for task_id in out & files.keys():
            files[task_id].unlink()
        # Somebody takes an order out whose file was on its way: what is left of it must go, too.
        half = self.hidden(self.home.orders)
        for task_id in pending - files.keys() - self.runs.keys():
            if f".{task_id}.part" in half and self.chance.random() < 0.1:
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
        assert not self.hidden(self.home.folder)
        assert not self.home.files(), self.home.files()
        once = Counter(self.placed)
        assert self.runs == once + self.hit, f"run more often: {self.runs - once - self.hit}"


def goes_on(process: psutil.Process) -> bool:
    """A process that has ended may stay known, where nobody asks how it did."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kills(folder: Path, number: int, seed: int, say: Say = print) -> str:
    """Kill the poller so many times; gives the summary. Raises AssertionError where anything is lost."""
    with place_for(folder) as home:
        run = Kills(home, seed)
        for count in range(1, number + 1):
            run.fill()
            run.kill(home.start())
            run.inspect()
            say(f"{count} of {number} kills, {len(run.done)} of {len(run.placed)} orders delivered")
        run.finish()
    again = run.hit.total()
    return (
        f"{number} kills, seed {seed}: {len(run.placed)} orders, {run.bytes / 1e6:.0f} MB; "
        "none lost, all delivered, each file equal to what was served\n"
        f"{run.runs.total()} times ON_DONE ran, for each order at least once; {again} times again:\n"
        f"  {again - run.alone} times killed between the command's end and its line in the list\n"
        f"  {run.alone} times killed while the command ran, which went on alone to its end\n"
        f"  0 times for another reason, though {run.back} times a delivered order was re-added"
    )


# --- endurance -----------------------------------------------------------------------------------


def endurance(folder: Path, number: int, first: int, say: Say = print) -> tuple[list[int], list[int], str]:
    """(bytes, descriptors) at most until the `first` were delivered, and at the end, and a summary.

    At the end is at most in the last tenth for bytes, and when all is delivered for descriptors: those of the
    requests under way vary from moment to moment.
    """
    pending = min(1000, first)  # it takes up new orders once a second, so that many at once
    placed = delivered = 0
    early, late, began = [0, 0], [0, 0], time.monotonic()
    with place_for(folder) as home:
        poller = home.start()
        process = psutil.Process(poller.process.pid)
        while delivered < number:
            left = len(home.waiting()) if placed else 0
            delivered = placed - left
            if left <= pending * 3 // 4 and placed < number:
                new = min(number - placed, pending - left)
                place(home, [home.grafx.add("png") for _ in range(new)])
                placed += new
            used = [process.memory_info().rss, process.num_fds()]
            if delivered <= first:
                early = list(map(max, early, used))
            if delivered >= number * 9 // 10:
                late = [max(late[0], used[0]), used[1]]
            seconds = time.monotonic() - began
            say(f"{delivered} of {number} orders, {seconds:.0f} s, {used[0] / MIB:.1f} MiB, {used[1]} open")
            time.sleep(0.1)
            assert poller.process.poll() is None and seconds < 60 + number, poller.log()
        assert poller.stop() == 0, poller.log()
        assert not home.failed(), home.failed()
        assert len(home.files()) == number
    summary = (
        f"{number} orders through one process in {seconds:.0f} s: resident memory {early[0] / MIB:.1f} MiB "
        f"up to the first {first} and {late[0] / MIB:.1f} MiB in the last tenth, "
        f"open descriptors {early[1]} and at the end {late[1]}"
    )
    return early, late, summary


# --- outages -------------------------------------------------------------------------------------

Event = tuple[float, Callable[[], object]]  # after so many seconds, what happens


def outage(folder: Path, number: int, longest: float, seed: int, once: bool, say: Say = print) -> str:
    """Orders that finish while GraFx has every fault of test_faults.py; gives the summary.

    Each fault lasts up to `longest` seconds, for some of the orders or for all. `once` is `--once`, again and
    again. Raises AssertionError where an order failed, was not delivered, or got another one's file.
    """
    chance = random.Random(seed)
    with place_for(folder) as home:
        grafx = home.grafx
        home.env["POLL_INTERVAL"] = str(max(0.3, longest / 12))
        tasks = [new_id(chance) for _ in range(number)]
        events = outage_plan(grafx, tasks, longest, chance)
        faults, lasts = len(events) // 2, events[-1][0]
        orders = {}
        for task_id in tasks:
            # Some 70 kB are more than is read at once, and what gzip-far needs.
            grafx.add(task_id=task_id, size=chance.randrange(70_500, 90_000), after=lasts * chance.random())
            age = timedelta(seconds=10 ** (5 * chance.random()))  # a second to a day
            orders[task_id] = {"added": db.stamp(datetime.now(timezone.utc) - age)}
        home.write({"orders": orders, "failed": {}})
        early, runs = go_through(home, events, longest / 60, once, say)
        assert not home.read().get("failing"), home.read()
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


def both_outages(folder: Path, number: int, longest: float, seed: int, say: Say = print) -> str:
    """The same with and without --once, side by side; gives both summaries."""
    with ThreadPoolExecutor() as pool:
        runs = []
        for name, once in (("one process", False), ("--once", True)):
            (folder / name).mkdir()
            report = say if not once else lambda line: None
            runs.append(pool.submit(outage, folder / name, number, longest, seed, once, report))
        return "\n".join(run.result() for run in runs)


def outage_plan(grafx: Sandbox, tasks: list[str], longest: float, chance: random.Random) -> list[Event]:
    """When which fault begins and ends, by time; some three at a time."""
    deck = [(fault, options, ends) for _, fault, options, *ends in FAULTS]
    chance.shuffle(deck)
    events: list[Event] = []
    for fault, options, ends in deck:
        # The token is everybody's, so its faults are fewer. What is final or for a year is no outage, nor is
        # a token server that says in its own words that the credentials are wrong.
        weights = {"task": 2, "download": 2, "token": int(options is not JSON_REJECTION)}
        places = [what for what, end in zip(weights, ends, strict=True) if end not in (FINAL, HELD)]
        if not any(weights[what] for what in places):
            continue
        (what,) = chance.choices(places, [weights[what] for what in places])
        some = None if what == "token" else frozenset(chance.sample(tasks, chance.randint(1, len(tasks))))
        begins = len(events) * longest / 10
        running: list[Fault] = []
        events += [
            (begins, partial(begin, grafx, running, what, fault, options, some)),
            (begins + chance.uniform(longest / 12, longest), partial(end, grafx, running)),
        ]
    return sorted(events, key=lambda event: event[0])


def begin(
    grafx: Sandbox, running: list[Fault], what: str, fault: str, options: dict[str, Any], some: Any
) -> None:
    more = {"size": 2 * MIB} if fault == "huge" else now(grafx, options)
    running.append(grafx.fault(what, fault, times=None, task_id=some, **more))
    if what == "token":
        grafx.revoke()  # so that a new one is asked for


def end(grafx: Sandbox, running: list[Fault]) -> None:
    grafx.end_fault(running[0])


def go_through(home: Home, events: list[Event], scale: float, once: bool, say: Say) -> tuple[int, int]:
    """All of it, until no order is pending; gives how many were delivered before the last fault was over, and
    how many processes it took."""
    before = ""
    if scale < 1:  # pauses and patience as short as the faults are
        before = (
            f"chili.TIMEOUT = ({max(1, 10 * scale)}, {max(1, 30 * scale)}); "
            f"chili.SLOW_START = chili.TOKEN_PAUSE = {max(1, 60 * scale)}; "
            f"poller.SHORTEST_PAUSE = {max(0.1, 2 * scale)}; db.LOOK = {max(0.1, scale)}; "
            f"poller.MINUTE = {60 * scale}; poller.LONGEST_PAUSE = {900 * scale}"
        )
    arguments = ["--once"] if once else []
    began, count, early, next_run = time.monotonic(), len(home.waiting()), 0, 0.0
    patience = events[-1][0] + max(120, 600 * scale)
    left, poller = count, home.start(*arguments, before=before)
    while left or events:
        seconds = time.monotonic() - began
        assert seconds < patience, f"{left} orders are left\n{poller.log()}"
        while events and events[0][0] <= seconds:
            events.pop(0)[1]()
        code, data = poller.process.poll(), home.read()
        assert not data["failed"], data["failed"]
        left = len(data["orders"])
        early = count - left if events else early
        say(f"{count - left} of {count} orders, {seconds:.0f} s, {len(events)} faults begin or end")
        if code is None:
            next_run = seconds + scale
        else:
            assert once and code in (0, 1) and "Traceback" not in poller.log(), poller.log()
            if seconds >= next_run:
                poller = home.start(*arguments, before=before)
        time.sleep(0.1)
    code = poller.process.wait(60) if once else poller.stop()
    assert code == 0 or (once and code == 1), poller.log()
    assert "Traceback" not in poller.log(), poller.log()
    return early, len(home.pollers)


# --- the program ---------------------------------------------------------------------------------


def progress() -> Say:
    """A line every 10 s."""
    last = time.monotonic()

    def say(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(line, flush=True)

    return say


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kills", type=int, metavar="N", help="kill the poller so many times")
    what.add_argument("--orders", type=int, metavar="N", help="let one process deliver so many orders")
    what.add_argument("--outage", type=int, metavar="N", help="let N orders meet every fault")
    parser.add_argument("--longest", type=float, metavar="S", default=60, help="seconds of a fault (60)")
    parser.add_argument("--seed", type=int, metavar="S", help="a random one if not given")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="grafx-torture-"))
    seed = random.randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}, in {folder}", flush=True)
    try:
        if given.kills:
            summary = kills(folder, given.kills, seed, progress())
        elif given.outage:
            summary = both_outages(folder, given.outage, given.longest, seed, progress())
        else:
            early, late, summary = endurance(folder, given.orders, min(2000, given.orders // 2), progress())
            known = 250 * given.orders  # bytes: the ids of the list of deliveries stay in memory
            assert late[0] <= early[0] + 2 * MIB + known and late[1] <= early[1], summary
    except AssertionError as error:
        print(f"FAILED: {error}\nAll of it is in {folder}", file=sys.stderr)
        return 1
    print(summary)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
