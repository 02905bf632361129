"""Delivered once: whoever re-adds an order, however often, ON_DONE gets no file a second time."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import QUICK, Home, Running, eventually
from test_machine import BEFORE, fill, small

import db

# Waits until a test lets this order's command go on.
HELD = 'until [ -e "$FOLDER/go-$TASK_ID" ]; do sleep 0.05; done'
AGAIN = r"(?:was|were) (?:re-added although delivered; removed again|delivered before; removed)\n"


class Desk:
    """ON_DONE counts its runs, as its last act; `begun` has the process of each."""

    def __init__(self, home: Home) -> None:
        self.home, self.grafx = home, home.grafx
        self.place, self.list = home.folder / "command", home.folder / ".database.json.delivered"
        home.env |= {"FOLDER": str(home.folder), "ON_DONE": shlex.quote(str(self.place))}
        self.command()

    def command(self, before: str = "", after: str = "") -> None:
        """What it does before and after it counts this run."""
        temp = self.home.folder / "new-command"
        temp.write_text(
            '#!/bin/sh\necho "$$ $TASK_ID" >>"$FOLDER/begun"\n'
            f'{before}\necho "$TASK_ID" >>"$FOLDER/ended"\n{after}\n'
        )
        temp.chmod(0o755)
        temp.replace(self.place)

    def noted(self, name: str) -> list[str]:
        file = self.home.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def runs(self) -> Counter[str]:
        """How often it came to its end, for each order."""
        return Counter(self.noted("ended"))

    def orders(self, number: int, **options: Any) -> list[str]:
        """Finished ones, pending in database.json."""
        tasks = [self.grafx.add(**options) for _ in range(number)]
        self.home.wait_for(*tasks, projectID="p1")
        return tasks

    def go(self, task_id: str) -> None:
        (self.home.folder / f"go-{task_id}").touch()

    def listed(self) -> list[str]:
        """The orders of the list, a line each."""
        return [line.split()[1] for line in self.list.read_text().splitlines()] if self.list.exists() else []

    def downloads(self) -> Counter[str]:
        return Counter(request.task_id for request in self.grafx.requests if request.what == "download")

    def removed(self) -> None:
        eventually(lambda: not ids(self.home.waiting()), "all is delivered and removed")

    def each_once(self, tasks: Iterable[str]) -> None:
        """Each was polled until it was finished, downloaded, given to ON_DONE and listed, each once."""
        once = dict.fromkeys(tasks, 1)
        assert self.runs() == once
        assert Counter(self.listed()) == once
        assert self.downloads() == once
        finished = Counter(request.task_id for request in self.grafx.requests if request.what == "task")
        assert {task_id: finished[task_id] for task_id in once} == once


def ids(orders: Any) -> set[str]:
    """Of the poller's own shape, or the workshop's."""
    return {task_id for task_id, _ in orders["value"]} if "dataType" in orders else set(orders)


def again(running: Running) -> int:
    """How many lines of the log say that something was re-added."""
    return len(re.findall(AGAIN, running.log()))


@pytest.fixture
def desk(home: Home) -> Desk:
    return Desk(home)


# --- who re-adds them -----------------------------------------------------------------------


class Store:
    """The workshop's: reads the file once into a Map, and writes all of it back after each change."""

    def __init__(self, path: Path) -> None:
        self.path, self.orders = path, dict[str, Any]()
        self.save()

    def order(self, task_id: str) -> None:
        self.orders[task_id] = {"taskID": task_id, "projectID": "p1"}
        self.save()

    def save(self) -> None:
        """As fs.writeFileSync does: the file is emptied first."""
        value = [[task_id, fields] for task_id, fields in self.orders.items()]
        text = json.dumps({"users": {}, "orders": {"dataType": "Map", "value": value}})
        self.path.write_text(text)


def test_a_store_that_writes_back_what_it_remembers(desk: Desk) -> None:
    home, store = desk.home, Store(desk.home.database)
    running = home.start(before=QUICK)
    tasks = []
    for _ in range(50):
        tasks.append(desk.grafx.add())
        store.order(tasks[-1])  # saved with all before, delivered or not
        time.sleep(0.01)

    def delivered() -> bool:
        desk.removed()
        store.save()
        return len(desk.runs()) == 50

    eventually(delivered)
    desk.removed()
    before = again(running)
    for _ in range(3):
        store.save()
        desk.removed()
    assert running.stop() == 0
    assert again(running) == before + 3  # one line for many
    store.save()
    ended = home.run("--once")
    assert (ended.process.returncode, ids(home.waiting())) == (0, set())
    assert re.findall(rf"(\d+) orders {AGAIN}", ended.log()) == ["50"]
    desk.each_once(tasks)


@pytest.mark.parametrize(
    "re_add", ['cp -p "$1" "$2"', 'cp "$1" new; mv new "$2"'], ids=["a backup", "an editor"]
)
def test_an_old_file(desk: Desk, re_add: str) -> None:
    """$1 is a copy of the time before, $2 the database. The command has taken the files away."""
    home = desk.home
    desk.command('mv "$ORDER_FILE" "$FOLDER/filed-$TASK_ID"')
    tasks = desk.orders(3)
    old = home.folder / "old.json"
    old.write_bytes(home.database.read_bytes())
    running = home.start(before=QUICK)
    desk.removed()
    for _ in range(2):
        subprocess.run(["sh", "-ec", re_add, "-", old, home.database], check=True, cwd=home.folder)
        desk.removed()
    assert running.stop() == 0
    assert again(running) == 2
    desk.each_once(tasks)


def test_a_file_that_is_moved_aside_and_back(desk: Desk) -> None:
    """While the commands run: some end while there is no file, one when it is back."""
    home = desk.home
    desk.command(HELD)
    *ended, late = tasks = desk.orders(4)
    never = desk.grafx.add("never")
    home.wait_for(*tasks, never)
    running = home.start(before=f"{QUICK}; db.SAVING = 0.2")
    eventually(lambda: len(desk.noted("begun")) == 4, "all commands run")
    aside = home.database.rename(home.folder / "aside")
    for task_id in ended:
        desk.go(task_id)
    eventually(lambda: sorted(desk.listed()) == sorted(ended), "listed without the file")
    running.says("ERROR .* is missing")
    aside.rename(home.database)
    eventually(lambda: ids(home.waiting()) == {late, never}, "what was delivered is removed")
    desk.go(late)
    eventually(lambda: ids(home.waiting()) == {never})
    assert running.stop() == 0
    assert desk.runs() == Counter(desk.listed()) == desk.downloads() == dict.fromkeys(tasks, 1)


def test_a_guid_in_two_spellings_is_one_order(desk: Desk) -> None:
    """Ids that are no GUIDs are told apart as they are typed."""
    home, other = desk.home, desk.grafx.add()
    first = desk.grafx.add(task_id=other.upper())
    tasks = [first, desk.grafx.add(task_id="plain"), desk.grafx.add("pdf", task_id="PLAIN")]
    for _ in range(2):
        home.write({"orders": [*tasks, other]})
        assert home.run("--once", CONCURRENCY="1").process.returncode == 0
        assert db.get_orders(home.database) == {}
        assert home.files() == sorted([f"{first}.png", "plain.png", "PLAIN.pdf"])
        desk.each_once(tasks)
    added = home.db("add", other)
    assert (added.returncode, f"{other} was delivered at " in added.stderr) == (1, True)
    assert home.db("retry", other).stdout == "1 order will be polled again\n"
    assert home.db("add", first).stdout == f"{first} was pending already, in {home.database}\n"


def test_several_databases_in_one_folder(desk: Desk) -> None:
    """Each has a list of its own, by its name."""
    home, shares = desk.home, {name: desk.grafx.add() for name in ("one.json", "two.json")}
    for _ in range(2):
        for name, task_id in shares.items():
            (home.folder / name).write_text(json.dumps({"orders": [task_id]}))
            ended = home.run("--once", DATABASE=str(home.folder / name))
            assert ended.process.returncode == 0
            assert json.loads((home.folder / name).read_text())["orders"] == []
    for name, task_id in shares.items():
        assert db.Deliveries(home.folder / name).path.read_text().split()[1::3] == [task_id]
    assert desk.runs() == desk.downloads() == dict.fromkeys(shares.values(), 1)


# --- killed ----------------------------------------------------------------------------------


def test_killed_before_it_ended_or_after_it_was_listed(desk: Desk) -> None:
    """Anywhere but between the two: exactly one run. The command is killed along, as by systemd."""
    home, grafx = desk.home, desk.grafx
    tasks = desk.orders(3, size=300_000)
    before = home.read()
    desk.command(f'{HELD}\nmv "$ORDER_FILE" "$FOLDER/filed"')
    fault = grafx.fault("download", "hang", times=None)
    running = home.start(before=QUICK)
    eventually(lambda: desk.downloads().keys() == set(tasks), "all downloads have begun")
    running.stop(signal.SIGKILL)

    grafx.end_fault(fault)
    running = home.start(before=QUICK)
    eventually(lambda: len(desk.noted("begun")) == 3, "all commands run")
    running.stop(signal.SIGKILL)
    for line in desk.noted("begun"):
        os.killpg(int(line.split()[0]), signal.SIGKILL)
    assert (desk.runs(), desk.listed()) == ({}, [])
    assert desk.downloads() == dict.fromkeys(tasks, 2)

    running = home.start(before=QUICK)
    eventually(lambda: len(desk.noted("begun")) == 6, "all commands run once more")
    with db.lock(home.database, "lock", 10):  # so that no order can leave the file
        for task_id in tasks:
            desk.go(task_id)
        eventually(lambda: sorted(desk.listed()) == sorted(tasks), "listed")
        running.stop(signal.SIGKILL)
    assert home.read() == before

    running = home.start(before=QUICK)
    desk.removed()
    running.stop(signal.SIGKILL)
    home.write(before)
    assert home.run("--once").process.returncode == 0
    assert ids(home.waiting()) == set()
    assert desk.runs() == Counter(desk.listed()) == dict.fromkeys(tasks, 1)
    assert desk.downloads() == dict.fromkeys(tasks, 2)  # with the first one, which was killed


def test_killed_between_its_end_and_the_line(desk: Desk) -> None:
    """The poller cannot know: ON_DONE runs again, without a second download, and then no more."""
    home = desk.home
    desk.command(after=HELD)
    (task_id,) = desk.orders(1)
    running = home.start(before=QUICK)
    eventually(lambda: desk.runs() == {task_id: 1}, "the command has done its work")
    running.process.send_signal(signal.SIGSTOP)
    os.waitpid(running.process.pid, os.WUNTRACED)  # so the poller does not see its end
    desk.go(task_id)
    command = psutil.Process(int(desk.noted("begun")[0].split()[0]))
    eventually(lambda: command.status() == psutil.STATUS_ZOMBIE, "the command has ended")
    running.stop(signal.SIGKILL)
    assert (desk.runs(), desk.listed()) == ({task_id: 1}, [])
    desk.command()
    before = home.read()
    for _ in range(2):
        running = home.start(before=QUICK)
        desk.removed()
        running.stop(signal.SIGKILL)
        home.write(before)
    assert desk.runs() == {task_id: 2}
    assert desk.listed() == [task_id]
    assert desk.downloads() == {task_id: 1}


# --- on purpose ------------------------------------------------------------------------------


def test_a_retry_beside_the_running_poller(desk: Desk) -> None:
    """It is noticed with the next look, and the file that is still there is given to ON_DONE."""
    home = desk.home
    (task_id,) = desk.orders(1)
    running = home.start(before="db.LOOK = 0.1", POLL_INTERVAL="3600")
    desk.removed()
    for times in range(2, 4):
        retried = home.db("retry", task_id)
        assert (retried.returncode, retried.stdout) == (0, "1 order will be polled again\n")
        # Not after POLL_INTERVAL.
        eventually(lambda times=times: desk.runs() == {task_id: times}, "it is delivered again")
        desk.removed()
    home.wait_for(task_id)  # not on purpose
    running.says(f"WARNING {task_id} {AGAIN}")
    desk.removed()
    assert running.stop() == 0
    assert again(running) == 1
    assert desk.runs() == {task_id: 3}
    assert desk.downloads() == {task_id: 1}
    assert [line.split()[2] for line in desk.list.read_text().splitlines()] == [
        *[f"{task_id}.png", "-"] * 2,
        f"{task_id}.png",
    ]


def test_a_retry_where_the_file_is_gone_downloads_it_again(desk: Desk) -> None:
    home = desk.home
    desk.command('rm "$ORDER_FILE"')
    (task_id,) = desk.orders(1)
    assert home.run("--once").process.returncode == 0
    assert home.db("retry", task_id).returncode == 0
    assert ids(home.waiting()) == {task_id}
    assert home.run("--once").process.returncode == 0
    assert desk.runs() == desk.downloads() == {task_id: 2}
    home.wait_for(task_id)
    assert home.run("--once").process.returncode == 0
    assert desk.runs() == desk.downloads() == {task_id: 2}


# --- without the list ------------------------------------------------------------------------


def test_without_the_list_it_works_and_says_so_once(desk: Desk) -> None:
    """There was none yet, or somebody takes it away while it runs."""
    home = desk.home
    tasks = desk.orders(2)
    running = home.start(before=QUICK)
    desk.removed()
    desk.list.unlink()
    more = desk.grafx.add()
    home.wait_for(tasks[0], more)
    running.says(f"{desk.list} was taken away: what was delivered before counts as not delivered")
    desk.removed()
    home.wait_for(tasks[0], more)
    desk.removed()
    assert running.stop() == 0
    assert running.log().count(str(desk.list)) == 1
    assert re.search(r" 2 pending, 0 rejected, 0 failed, 0 delivered\n", running.log())
    assert desk.runs() == {tasks[0]: 2, tasks[1]: 1, more: 1}
    assert set(desk.downloads().values()) == {1}  # its file was in orders
    assert sorted(desk.listed()) == sorted([tasks[0], more])


def test_rubbish_in_the_list_is_ignored(desk: Desk) -> None:
    """So is a last line that was cut off, as by a power cut before its fsync; the next one stands apart."""
    home = desk.home
    first, second = desk.orders(2)
    rubbish = b"\xff\xfe\0\n{}\n" + f"2026-01-01T00:00:00Z\n{second}\n".encode()
    lines = [f"2026-01-01T00:00:00Z {name} {name}.png\n" for name in (first, second)]
    there = rubbish + lines[0].encode() + rubbish + lines[1].encode()[:-1]
    desk.list.write_bytes(there)
    for _ in range(2):
        home.wait_for(first, second)
        ended = home.run("--once")
        assert (ended.process.returncode, ids(home.waiting())) == (0, set())
        assert "Traceback" not in ended.log()
    assert desk.runs() == desk.downloads() == {second: 1}
    assert desk.list.read_bytes().startswith(there + b"\n")


# --- while the list cannot be written --------------------------------------------------------


def point_elsewhere(folder: Path) -> Callable[[], object]:
    link = folder / ".database.json.delivered"
    link.symlink_to("elsewhere")
    return link.unlink


def close(folder: Path) -> Callable[[], object]:
    folder.chmod(0o555)
    return lambda: folder.chmod(0o755)


HINDRANCES = {"full": fill, "closed": close}
WAITS = "waits with ON_DONE until the list of deliveries can be written; retrying in"


@pytest.mark.parametrize("how", HINDRANCES)
def test_no_command_begins_while_the_list_cannot_be_written(desk: Desk, how: str) -> None:
    home, disk, task_id = desk.home, desk.home.folder / "disk", desk.grafx.add()
    disk.mkdir()
    home.database, desk.list = disk / "database.json", disk / ".database.json.delivered"
    home.env["DATABASE"] = str(home.database)
    with small(disk) if how == "full" else nullcontext():
        home.database.write_text(json.dumps({"orders": {task_id: {}}}))
        for name in ("lock", "pid"):
            db.beside(home.database, name).touch()
        mend = HINDRANCES[how](disk)
        ended = home.run("--once", before=BEFORE)
        assert ended.process.returncode == 1
        assert re.findall("ERROR +(.*?): ", ended.log()) == [f"cannot write {desk.list}"]
        assert f"{task_id} {WAITS}" in ended.log()
        daemon = home.start(before=BEFORE)
        daemon.says(WAITS)
        assert (desk.noted("begun"), ids(home.waiting())) == ([], {task_id})
        mend()
        daemon.says(f"INFO +recovered: cannot write {desk.list}: ")
        desk.removed()
        assert daemon.stop() == 0
        assert daemon.log().count(f"cannot write {desk.list}") == 2  # once, and that it is over
        desk.each_once([task_id])


def test_after_a_line_that_could_not_be_written_no_command_begins(desk: Desk) -> None:
    home = desk.home
    desk.command(HELD)
    (first,) = desk.orders(1)
    running = home.start(before=QUICK)
    eventually(lambda: len(desk.noted("begun")) == 1, "the first command runs")
    desk.list.unlink()
    mend = point_elsewhere(home.folder)
    desk.go(first)
    running.says(f"ERROR +cannot write {desk.list}: .* It is a symbolic link: put a file in its place.")
    db.add_order(second := desk.grafx.add(), path=home.database)
    running.says(f"{second} {WAITS}")
    assert (len(desk.noted("begun")), ids(home.waiting())) == (1, {first, second})
    desk.go(second)
    mend()
    desk.removed()
    assert running.stop() == 0
    desk.each_once([first, second])
