"""`ON_FAILED`: one run for an order that has failed, and no more, whatever is killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from conftest import QUICK, Home, eventually
from test_on_done import is_alive
from test_rejections import DAY, noted, utc

import db


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_it_is_told_once_what_failed_and_why(home: Home) -> None:
    """Where it does not end well that is logged, and it is not run again either."""
    said = home.folder / "said"
    failed, expired, fine = home.grafx.add("failed"), home.grafx.add("expired"), home.grafx.add()
    home.wait_for(failed, expired, fine, projectID="p-1")
    told = f'printf "%s|%s|%s|%s\\n" "$TASK_ID" "$PROJECT_ID" "$STATUS" "$ERROR" >>{said}'
    hook = f"sh -c '{told}; echo no mail; exit 3'"
    poller = home.start(before=QUICK, ON_FAILED=hook, GIVE_UP_AFTER="0")
    for task in (failed, expired):
        poller.says(f"ERROR   {task} ON_FAILED exited with code 3: no mail; it is not run again")
    assert poller.stop() == 0
    records = home.failed()
    assert records.keys() == {failed, expired}
    wanted = [f"{task}|p-1|{records[task]['status']}|{records[task]['error']}" for task in records]
    assert sorted(lines(said)) == sorted(wanted)
    db.add_order(another := home.grafx.add("expired"), path=home.database)
    ended = home.run("--once", ON_FAILED="sleep 600", ON_DONE_TIMEOUT="1")
    assert re.findall(r"(\S+ ON_FAILED .*)", ended.log()) == [
        f"{another} ON_FAILED took longer than 1 s; it is not run again"
    ]


def test_it_runs_when_the_file_has_the_failure_and_not_again_after_a_kill(home: Home) -> None:
    said, task, fine = home.folder / "said", home.grafx.add("expired"), home.grafx.add(questions=2)
    home.wait_for(task, fine)
    with db.lock(home.database):  # so that nothing is written
        poller = home.start(before=QUICK, ON_FAILED=f"sh -c 'echo $$ >>{said}; exec sleep 600'")
        poller.says(f"{task} failed[^~]*{fine} delivered")
        assert not said.exists()
    (pid,) = eventually(lambda: lines(said), "it runs")
    assert list(home.failed()) == [task]
    poller.stop(signal.SIGKILL)
    os.kill(int(pid), signal.SIGKILL)
    home.run("--once", ON_FAILED=f"sh -c 'echo again >>{said}'")
    assert lines(said) == [pid]


def test_once_runs_it_for_what_is_judged_at_the_end(home: Home) -> None:
    """A 404 counts by the other file of the same run, also where the run ends early."""
    said, dead, fine, last = home.folder / "said", "unknown", home.grafx.add(), home.grafx.add()
    home.grafx.fault("task", "status-429", task_id=last, retry_after=60)
    orders = {task_id: {} for task_id in (dead, fine, last, "left")}
    home.write({"orders": orders, "failing": {dead: noted(utc(-DAY), 404, 30)}, "failed": {}})
    ended = home.run("--once", CONCURRENCY="1", ON_FAILED=f"sh -c 'echo $TASK_ID >>{said}'")
    assert (ended.process.returncode, lines(said), list(home.failed())) == (1, [dead], [dead])


def test_it_takes_no_thread_of_the_polls_and_ends_with_the_poller(home: Home) -> None:
    said, expired, fine = home.folder / "said", home.grafx.add("expired"), home.grafx.add()
    home.wait_for(expired)
    hook = f"sh -c 'echo $$ >>{said}; exec sleep 600'"
    poller = home.start(before=QUICK, CONCURRENCY="1", ON_FAILED=hook)
    (pid,) = eventually(lambda: lines(said), "it runs")
    home.wait_for(fine)
    poller.says(f"{fine} delivered")
    assert is_alive(int(pid))
    assert poller.stop() == 0
    eventually(lambda: not is_alive(int(pid)), "it has ended")
