"""The long runs: the poller killed at random moments, kept busy for long, or with every fault of GraFx.

    python tests/torture.py --kills 1000       kill -9, look at what is left and how often ON_DONE ran, go on
    python tests/torture.py --orders 20000     that many orders through one process
    python tests/torture.py --outage 1000      so many orders while GraFx has every fault there is

The suite runs a short one of each: test_crash.py.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from conftest import Home, Running, eventually
from sandbox import FAULTS, MIB, PAGE, Fault, Sandbox

import db

# --- kill -9 -------------------------------------------------------------------------------------

# Some files it takes away, for some it takes its time. That it has ended is its last act.
ON_DONE = """#!/bin/sh
case $TASK_ID in
    [0-3]*) mv "$ORDER_FILE" "$FOLDER/taken/" || exit ;;
    [4-7]*) sleep 0.1 ;;
esac
>"$FOLDER/ended/$TASK_ID.$$"
"""
# Where a new file shows a moment that matters: a download, a write of database.json, a final name, the end
# of a command; and one that never comes.
SIGNS = ("orders/.*.part", ".*.tmp", "orders/[!.]*", "ended/*", "never")


class Kills:
    """Orders that finish all the time, and a poller that is killed all the time."""

    def __init__(self, home: Home, seed: int) -> None:
        self.home, self.grafx, self.folder, self.chance = home, home.grafx, home.folder, random.Random(seed)
        (command := self.folder / "on-done").write_text(ON_DONE)
        command.chmod(0o755)
        for name in ("taken", "ended"):
            (self.folder / name).mkdir()
        home.env |= {"ON_DONE": str(command), "FOLDER": str(self.folder)}
        home.wait_for()
        self.placed: set[str] = set()
        self.done: set[str] = set()  # out of database.json, its file compared and then removed
        self.bytes = 0
        self.runs: Counter[str] = Counter()  # how often the command of an order came to its end
        self.unlisted: Counter[str] = Counter()  # how often that was before a kill, and its line was not
        self.alone = 0  # how many of these were commands that went on after the kill
        self.back = 0  # delivered orders that were put into database.json again

    def new(self) -> str:
        """An order of 1 kB to 4 MB that renders for up to 1.5 s, small and quick ones more often."""
        chance, task_id = self.chance, f"{self.chance.getrandbits(128):032x}"
        kind, size = chance.choice(("png", "jpg", "pdf", "mp4")), round(1000 * 4000 ** chance.random())
        self.placed.add(task_id)
        return self.grafx.add(kind, task_id=task_id, size=size, after=1.5 * chance.random() ** 2)

    def ended(self) -> Counter[str]:
        """How often the command of an order came to its end, in this poller's time."""
        return Counter(path.stem for path in self.folder.glob("ended/*"))

    def listed(self) -> Counter[str]:
        """The lines of the list of deliveries, where there is one."""
        text = "".join(path.read_text() for path in self.folder.glob(".database.json.delivered"))
        return Counter(re.findall(r"^\S+Z (\S+) .+\n", text, re.M))

    def kill(self, poller: Running, longest: float) -> None:
        """When a sign is seen, or at any time; with its commands, as systemd does it, or alone."""
        chance, sign = self.chance, self.chance.choice(SIGNS)
        if chance.random() < 0.5:  # another program adds one meanwhile
            db.add_order(self.new(), path=self.home.database)
        if chance.random() < 0.9:  # else perhaps while it starts
            poller.says(" pending, ")
        time.sleep(longest / 2 * chance.random())
        before, latest = set(self.folder.glob(sign)), time.monotonic() + longest / 2 * chance.random()
        while time.monotonic() < latest and set(self.folder.glob(sign)) <= before:
            time.sleep(0.0005)
        time.sleep(0.01 * chance.random() ** 2)
        poller.process.send_signal(signal.SIGSTOP)  # so that all of it is looked at as it was killed
        assert os.WIFSTOPPED(os.waitpid(poller.process.pid, os.WUNTRACED)[1]), poller.log()
        scripts, ended = psutil.Process(poller.process.pid).children(recursive=True), self.ended()
        poller.stop(signal.SIGKILL)
        for script in scripts if chance.random() < 0.5 else ():
            with suppress(psutil.NoSuchProcess):
                script.kill()
        # Those that go on alone come to their end; where nobody asks how they did, they stay known.
        dead = {"status": psutil.STATUS_ZOMBIE}
        eventually(lambda: all(one.info == dead for one in psutil.process_iter(["status"]) if one in scripts))
        unlisted = self.ended() - self.listed()
        self.unlisted += unlisted
        self.alone += (unlisted - ended).total()

    def inspect(self) -> None:
        """What must hold at any time, whatever was killed."""
        data, runs, listed = self.home.read(), self.ended(), self.listed()
        assert not data.get("failed"), data["failed"]
        assert set(runs.values()) <= {1}, f"ON_DONE ran twice in one poller: {runs.most_common(5)}"
        assert set(listed.values()) <= {1}, f"delivered twice: {listed.most_common(5)}"
        self.runs += runs
        shutil.rmtree(self.folder / "ended")
        (self.folder / "ended").mkdir()
        files, moved = list(self.folder.glob("orders/[!.]*")), list(self.folder.glob("taken/*"))
        assert len({path.stem for path in files}) == len(files), f"one order, two files: {sorted(files)}"
        for path in files + moved:
            assert path.stem in self.placed - self.done, f"nobody ordered {path.name}, or it came twice"
            assert path.read_bytes() == self.grafx.body(path.stem), f"{path.name} is not what was served"
        there, out = {path.stem for path in files + moved}, self.placed - self.done - data["orders"].keys()
        for what, those in (("no file", there), ("no ON_DONE", self.runs.keys()), ("no line", listed.keys())):
            assert out <= those, f"orders left database.json with {what}: {sorted(out - those)}"
        self.done |= out
        for path in files + moved:
            if path.stem in out:
                self.bytes += path.stat().st_size
                path.unlink()

    def run(self, number: int, longest: float, before: str) -> None:
        """So many kills; then without one: all is delivered, nothing is left over."""
        for count in range(number):
            print(f"{count} kills, {len(self.done)} orders delivered", end="\r", flush=True)
            again = self.chance.sample(sorted(self.done), min(len(self.done), self.chance.choice((0, 1, 10))))
            self.back += len(again)
            new = [self.new() for _ in range(150 - len(self.placed - self.done))]
            self.home.wait_for(*self.home.waiting(), *again, *new)
            self.kill(self.home.start(before=before), longest)
            self.inspect()
        poller = self.home.start(before=before)
        poller.says(" pending, ")  # else it could be stopped before it knows how to
        eventually(lambda: not self.home.waiting(), "the last orders are delivered", 120)
        assert poller.stop() == 0, poller.log()
        self.inspect()
        assert self.done == self.placed == set(self.listed())
        assert self.home.files() == list(self.folder.glob(".*.tmp")) == []
        wanted = Counter(self.placed) + self.unlisted
        assert self.runs == wanted, f"ON_DONE ran {self.runs - wanted} more, {wanted - self.runs} less"


def kills(home: Home, number: int, seed: int, longest: float = 1.5, before: str = "") -> str:
    """Kill so many pollers, each after up to `longest` s; gives the summary. Raises AssertionError."""
    (seen := Kills(home, seed)).run(number, longest, before)
    again = seen.unlisted.total()
    return (
        f"{number} kills, seed {seed}: {len(seen.placed)} orders, {seen.bytes / 1e6:.0f} MB; "
        "none lost, all delivered, each file equal to what was served\n"
        f"{seen.runs.total()} times ON_DONE ran, for each order at least once; {again} times again:\n"
        f"  {again - seen.alone} times killed between the command's end and its line in the list\n"
        f"  {seen.alone} times killed while the command ran, which went on alone to its end\n"
        f"  0 times for another reason, though {seen.back} times a delivered order was re-added"
    )


# --- endurance -----------------------------------------------------------------------------------


def endurance(home: Home, number: int, first: int, before: str = "") -> str:
    """So many orders through one process; gives the summary. Raises AssertionError where it grows."""
    memory, files, wave, began = list[int](), list[int](), min(1000, first), time.monotonic()
    process = psutil.Process((poller := home.start(before=before)).process.pid)
    for placed in range(0, number, wave):
        home.wait_for(*(home.grafx.add() for _ in range(min(wave, number - placed))))
        eventually(lambda: not home.waiting(), "all orders of a wave are delivered", 60 + wave)
        # Only now: what requests need varies from moment to moment.
        memory.append(process.memory_info().rss)
        files.append(process.num_fds())
    seconds = time.monotonic() - began
    assert poller.stop() == 0, poller.log()
    assert len(home.files()) == number
    early, late = max(memory[: first // wave]), max(memory[-max(1, len(memory) // 10) :])
    summary = (
        f"{number} orders through one process in {seconds:.0f} s: resident memory {early / MIB:.1f} MiB "
        f"up to the first {first} and {late / MIB:.1f} MiB in the last tenth, "
        f"open descriptors {files[0]} and at the end {files[-1]}"
    )
    assert late <= early + 2 * MIB + 250 * number, summary  # the ids of the list of deliveries stay in memory
    assert files[-1] <= files[0] + 16, summary  # idle connections
    return summary


# --- outages -------------------------------------------------------------------------------------

PLACES = ("task", "task", "download", "download", "token")  # the token is everybody's: its faults are fewer
HTML = {"body": PAGE, "content_type": "text/html"}
# What has options here would go on long after it is over. A 410 of a download is no outage: the file is gone.
OPTIONS = {"trickle": {"pace": 0.02, "after": 0.8}, "huge": {"size": 2 * MIB}, "slow": {"rate": 200_000}}
STATUSES = ("202", "400", "401", "403", "404", "408", "422", "429", "500", "502", "503", "504")
DECK: list[tuple[str, Any]] = [(name, OPTIONS.get(name, {})) for name in FAULTS]
DECK += [(f"status-{status}", {}) for status in STATUSES]
DECK += [("status-400", HTML), ("status-404", HTML), ("status-502", HTML), ("status-429", {"retry_after": 1})]
SHORT = (  # pauses and patience for faults of less than 5 s
    "chili.TIMEOUT = (0.5, 0.5); chili.SLOW_START = 0.5; chili.TOKEN_PAUSE = 0.1; db.LOOK = 0.1; "
    "poller.SHORTEST_PAUSE = 0.1; poller.LONGEST_PAUSE = 0.2"
)


def outage(home: Home, number: int, longest: float, seed: int) -> str:
    """Orders that finish while GraFx has every fault, by a daemon and by --once; gives both summaries."""
    with Sandbox() as other, ThreadPoolExecutor() as pool:
        beside = Home(Path(tempfile.mkdtemp(dir=home.folder)), other)
        daemon = pool.submit(meet_all, home, number, longest, seed)
        return f"{meet_all(beside, number, longest, seed, '--once')}\n{daemon.result()}"


def meet_all(home: Home, number: int, longest: float, seed: int, *arguments: str) -> str:
    """Some eight faults at a time, each for up to `longest` seconds and until it was met.

    Raises AssertionError where an order failed, was not delivered, or got another one's file.
    """
    home.wait_for()
    chance, grafx, before = random.Random(seed), home.grafx, SHORT if longest < 5 else ""
    home.env["POLL_INTERVAL"] = str(max(0.1, longest / 12))
    late = ("late", {"status": 204, "task": grafx.add()})  # behind it comes another order's answer
    deck = [(chance.choice(PLACES), name, options) for name, options in (*DECK, late)]
    chance.shuffle(deck)
    tasks, running = list[str](), list[tuple[float, int, Fault]]()
    began, poller = time.monotonic(), home.start(*arguments, before=before)
    while deck or running or home.waiting():
        seconds = time.monotonic() - began
        assert seconds < 120 + 60 * longest, f"left: {running or home.waiting()}\n{poller.log()}"
        assert not home.failed(), home.failed()
        for one in list(running):
            until, first, fault = one
            if seconds >= until and any(asked.fault == fault.name for asked in grafx.requests[first:]):
                grafx.end_fault(fault)
                running.remove(one)
        if deck and len(running) < 8:
            print(f"{len(tasks)} orders, {len(deck)} faults to come", end="\r", flush=True)
            what, name, options = deck.pop()
            # Some 70 kB are more than is read at once, and what gzip-far needs.
            new = [grafx.add(size=chance.randrange(70_500, 90_000), after=longest * chance.random() / 2)
                   for _ in range(max(1, number // len(DECK)))]  # fmt: skip
            hit = None if what == "token" else [*new, *chance.sample(tasks, len(tasks) // 2)]
            fault = grafx.fault(what, name, times=None, task_id=hit, **options)
            running.append((seconds + chance.uniform(longest / 12, longest), len(grafx.requests), fault))
            if what == "token":
                grafx.revoke()  # so that a new one is asked for
            for task_id in new:
                db.add_order(task_id, path=home.database)
            tasks += new
        if poller.process.poll() is not None:
            assert arguments, poller.log()
            poller = home.start(*arguments, before=before)
        time.sleep(min(0.1, longest / 20))
    for poller in home.pollers:
        assert poller.stop() in ((0, 1) if arguments else (0,)), poller.log()
        assert "Traceback" not in poller.log(), poller.log()
    assert not home.read().get("failing"), home.read()
    assert home.files() == sorted(f"{task_id}.png" for task_id in tasks)
    for file in home.orders.glob("*.png"):
        assert file.read_bytes() == grafx.body(file.stem), f"{file.name} is not its own"
    hits = sum(request.fault is not None for request in grafx.requests)
    return (
        f"{len(tasks)} orders, {len(DECK) + 1} faults of up to {longest:g} s in {seconds:.0f} s, "
        f"{f'{len(home.pollers)} times --once' if arguments else 'one process'}, seed {seed}: none failed, "
        f"all delivered, each file its own; {hits} of {len(grafx.requests)} requests met a fault"
    )


def main() -> None:
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
        with Sandbox() as grafx:
            home = Home(folder, grafx)
            if given.kills:
                print(kills(home, given.kills, seed))
            elif given.orders:
                print(endurance(home, given.orders, min(2000, given.orders // 2)))
            else:
                print(outage(home, given.outage, given.longest, seed))
    finally:
        for process in psutil.Process().children(recursive=True):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
