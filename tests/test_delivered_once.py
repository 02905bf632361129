"""Delivered once: whoever re-adds an order, however often, ON_DONE gets no file a second time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable

import psutil
import pytest
from conftest import QUICK, Home, Running, eventually
from test_on_done import ENDED, HELD, Desk

import db

AGAIN = r"(?:was|were) (?:re-added although delivered; removed again|delivered before; removed)\n"
WAITS = "waiting to run ON_DONE until the list of deliveries can be written; retrying in"


@pytest.fixture
def desk(home: Home) -> Desk:
    return Desk(home)


def listed(desk: Desk) -> Counter[str]:
    """How many lines of the list each order has."""
    return Counter(line.split()[1] for line in desk.lines(desk.list.name) if line)


def each_once(desk: Desk, tasks: Iterable[str]) -> None:
    """Each was polled when it was finished, downloaded, given to ON_DONE and listed, each once."""
    polls = Counter(request.task_id for request in desk.grafx.asked("task"))
    assert desk.runs() == listed(desk) == desk.downloads() == polls == dict.fromkeys(tasks, 1)


def again(running: Running) -> int:
    """How many lines of the log say that something was re-added."""
    return len(re.findall(AGAIN, running.log()))


def test_whoever_writes_back_what_was_delivered(desk: Desk) -> None:
    """The workshop's store, which remembers all orders; a backup; an editor. The files are taken away."""
    home, tasks = desk.home, [desk.grafx.add() for _ in range(6)]
    desk.command(f'mv "$ORDER_FILE" "$FOLDER/filed-$TASK_ID"\n{ENDED}')
    running = home.start(before=QUICK)

    def remembered(number: int) -> str:
        value = [[task_id, {"taskID": task_id}] for task_id in tasks[:number]]
        return json.dumps({"orders": {"dataType": "Map", "value": value}})

    def polled(number: int) -> bool:
        """Whether the newest order is, after one more save as fs.writeFileSync does it: in place."""
        home.database.write_text(remembered(number))
        return bool(desk.grafx.asked("task", tasks[number - 1]))

    for number in range(1, 7):
        eventually(lambda number=number: polled(number), "the next order is polled")
    eventually(lambda: len(desk.runs()) == 6, "all are delivered")
    desk.removed()
    assert running.stop() == 0
    old = home.folder / "old"
    old.write_text(remembered(6))
    running = home.start(before=QUICK)
    for how in ('cat old >"$1"', 'cp -p old "$1"', 'cp old new; mv new "$1"'):
        subprocess.run(["sh", "-ec", how, "-", home.database], check=True, cwd=home.folder)
        desk.removed()
    assert running.stop() == 0
    assert again(running) == 3  # one line for many
    old.rename(home.database)
    ended = home.run("--once")
    assert (ended.process.returncode, db.get_orders(home.database)) == (0, {})
    assert re.findall(rf"(\d+) orders {AGAIN}", ended.log()) == ["6"]
    each_once(desk, tasks)


def test_a_guid_in_two_spellings_is_one_order(desk: Desk) -> None:
    """Ids that are no GUIDs are told apart as they are typed."""
    home, other = desk.home, desk.grafx.add()
    first = desk.grafx.add(task_id=other.upper())
    tasks = [first, desk.grafx.add(task_id="plain"), desk.grafx.add(task_id="PLAIN")]
    for _ in range(2):
        home.write({"orders": [*tasks, other]})
        assert home.run("--once").process.returncode == 0
        assert db.get_orders(home.database) == {}
        each_once(desk, tasks)
    assert not db.add_order(other, path=home.database)
    assert db.retry_orders(other, home.database) == [other]
    assert not db.add_order(first, path=home.database)


def test_killed_before_it_ended_or_after_it_was_listed(desk: Desk) -> None:
    """Anywhere but between the two: exactly one run. The command is killed along, as by systemd."""
    home, tasks = desk.home, desk.orders(2, size=300_000)
    before = home.read()
    desk.command(f'{HELD}\nmv "$ORDER_FILE" "$FOLDER/filed"\n{ENDED}')
    running = home.start(before=QUICK)
    begun = desk.begun(2)
    running.stop(signal.SIGKILL)
    for _, process, _ in begun:
        os.killpg(int(process), signal.SIGKILL)
    assert (desk.runs(), listed(desk)) == ({}, {})

    running = home.start(before=QUICK)
    desk.begun(4)
    with db.lock(home.database):  # so that no order can leave the file
        desk.go(*tasks)
        eventually(lambda: listed(desk) == dict.fromkeys(tasks, 1), "listed")
        running.stop(signal.SIGKILL)
    assert home.read() == before

    for _ in range(2):
        home.write(before)
        assert home.run("--once").process.returncode == 0
        assert home.waiting() == {}
    assert desk.runs() == listed(desk) == desk.downloads() == dict.fromkeys(tasks, 1)


def test_it_is_listed_at_once_even_where_the_file_is_written_later(desk: Desk) -> None:
    """So that a kill meanwhile does not run ON_DONE again."""
    home, tasks = desk.home, desk.orders(2)
    desk.command(f"{HELD}\n{ENDED}")  # one is held, so that the poller is not idle
    running = home.start(before="db.LOOK = 3600")
    desk.begun(2)
    desk.go(tasks[0])
    eventually(lambda: listed(desk) == {tasks[0]: 1}, "listed")
    assert [*home.waiting()] == tasks
    desk.go(tasks[1])
    desk.removed()
    assert running.stop() == 0
    assert desk.runs() == listed(desk) == dict.fromkeys(tasks, 1)


def test_killed_between_its_end_and_the_line(desk: Desk) -> None:
    """The poller cannot know: ON_DONE runs again, without a second download, and then no more."""
    home, (task_id,) = desk.home, desk.orders(1)
    before = home.read()
    desk.command(f"{ENDED}\n{HELD}")
    running = home.start(before=QUICK)
    eventually(lambda: desk.runs() == {task_id: 1}, "the command has done its work")
    running.process.send_signal(signal.SIGSTOP)
    os.waitpid(running.process.pid, os.WUNTRACED)  # so the poller does not see its end
    desk.go(task_id)
    command = psutil.Process(int(desk.begun(1)[0][1]))
    eventually(lambda: command.status() == psutil.STATUS_ZOMBIE, "the command has ended")
    running.stop(signal.SIGKILL)
    assert listed(desk) == {}
    for _ in range(2):
        home.write(before)
        assert home.run("--once").process.returncode == 0
        assert home.waiting() == {}
        assert desk.runs() == {task_id: 2}
    assert listed(desk) == desk.downloads() == {task_id: 1}


def test_a_retry_beside_the_running_poller(desk: Desk) -> None:
    """ON_DONE gets the file that is still there; where it is gone, it is downloaded again."""
    home, (task_id,) = desk.home, desk.orders(1)
    running = home.start(before="db.LOOK = 0.1", POLL_INTERVAL="3600")  # which it does not wait for
    desk.removed()
    for runs, downloads in ((2, 1), (3, 2)):
        retried = home.db("retry", task_id)
        assert (retried.returncode, retried.stdout) == (0, "1 order will be polled again\n")
        desk.removed()
        assert (desk.runs(), desk.downloads()) == ({task_id: runs}, {task_id: downloads})
        (home.orders / f"{task_id}.png").unlink()
    assert again(running) == 0
    home.wait_for(task_id)  # not on purpose
    running.says(f"WARNING {task_id} {AGAIN}")
    desk.removed()
    assert running.stop() == 0
    assert desk.runs() == {task_id: 3}


def test_without_the_list_it_works_and_says_so_once(desk: Desk) -> None:
    """There was none yet, or somebody takes it away while it runs; then it begins anew."""
    home, (first, second) = desk.home, desk.orders(2)
    running = home.start(before=QUICK)
    desk.removed()
    desk.list.unlink()
    for _ in range(2):
        home.wait_for(first)
        desk.removed()
        assert desk.runs() == {first: 2, second: 1}
    assert running.stop() == 0
    said = f"{desk.list} was removed: earlier deliveries are no longer known"
    assert running.log().count(str(desk.list)) == running.log().count(said) == 1
    assert desk.downloads() == {first: 1, second: 1}  # its file was in orders
    assert listed(desk) == {first: 1}


def test_while_the_list_cannot_be_read_nothing_is_polled_and_nothing_leaves(desk: Desk) -> None:
    home, (task_id,) = desk.home, desk.orders(1)
    assert home.run("--once").process.returncode == 0
    desk.list.rename(away := home.folder / "away")
    desk.list.symlink_to(desk.list)
    home.wait_for(task_id)
    running = home.start(before=QUICK)
    running.says(f"ERROR +cannot read {desk.list}: ")
    away.replace(desk.list)
    running.says(f"recovered: cannot read {desk.list}: ")
    desk.removed()
    assert desk.runs() == {task_id: 1}


def test_rubbish_in_the_list_is_ignored(desk: Desk) -> None:
    """So is a last line that was cut off, as by a power cut before its fsync; the next one stands apart."""
    home, (first, second) = desk.home, desk.orders(2)
    rubbish = b"\xff\xfe\0\n{}\n" + f"2026-01-01T00:00:00Z\n{second}\n".encode()
    lines = [f"2026-01-01T00:00:00Z {name} {name}.png\n".encode() for name in (first, second)]
    there = rubbish + lines[0] + rubbish + lines[1][:-1]
    desk.list.write_bytes(there)
    for _ in range(2):
        home.wait_for(first, second)
        assert home.run("--once").process.returncode == 0
        assert home.waiting() == {}
    assert desk.runs() == desk.downloads() == {second: 1}
    assert desk.list.read_bytes().startswith(there + b"\n")


def test_no_command_begins_while_the_list_cannot_be_written(desk: Desk) -> None:
    """It can be opened, but takes no line, as on a full disk: here it is larger than a file may be."""
    home, (task_id,) = desk.home, desk.orders(1)
    desk.list.write_text("rubbish\n" * 10_000)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))"
    ended = home.run("--once", before=f"{QUICK}; {limit}")
    assert ended.process.returncode == 1
    assert re.findall("ERROR +(.*?): ", ended.log()) == [f"cannot write {desk.list}"]
    assert f"{task_id} {WAITS}" in ended.log()
    running = home.start(before=f"{QUICK}; {limit}")
    running.says(WAITS)
    assert (desk.lines("begun"), list(home.waiting())) == ([], [task_id])
    desk.list.write_text("")
    running.says(f"INFO +recovered: cannot write {desk.list}: ")
    desk.removed()
    assert running.stop() == 0
    assert running.log().count(f"cannot write {desk.list}") == 2  # once, and that it is over
    assert desk.runs() == listed(desk) == desk.downloads() == {task_id: 1}


def test_after_a_line_that_could_not_be_written_no_command_begins(desk: Desk) -> None:
    home, (first,) = desk.home, desk.orders(1)
    desk.command(f"{HELD}\n{ENDED}")
    running = home.start(before=QUICK)
    desk.begun(1)
    desk.list.unlink()
    desk.list.symlink_to("elsewhere")
    desk.go(first)
    running.says(f"ERROR +cannot write {desk.list}: .* It is a symbolic link: replace it with a file.")
    db.add_order(second := desk.grafx.add(), path=home.database)
    running.says(f"{second} {WAITS}")
    assert (len(desk.begun(1)), list(home.waiting())) == (1, [first, second])
    desk.go(second)
    desk.list.unlink()
    desk.removed()
    assert running.stop() == 0
    assert desk.runs() == listed(desk) == desk.downloads() == dict.fromkeys([first, second], 1)
