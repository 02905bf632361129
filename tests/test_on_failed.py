"""`ON_FAILED`: one run for an order that has failed, and no more, whatever is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from conftest import QUICK, Home, eventually

import db


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_it_is_told_what_failed_and_why(home: Home) -> None:
    said = home.folder / "said"
    failed, expired, fine = home.grafx.add("failed"), home.grafx.add("expired"), home.grafx.add()
    home.wait_for(failed, expired, fine, projectID="p-1")
    hook = f'sh -c \'printf "%s|%s|%s|%s\\n" "$TASK_ID" "$PROJECT_ID" "$STATUS" "$ERROR" >>{said}\''
    poller = home.start(before=QUICK, ON_FAILED=hook, GIVE_UP_AFTER="0")
    eventually(lambda: len(lines(said)) == 2)
    assert poller.stop() == 0
    assert home.run("--once", ON_FAILED=hook).process.returncode == 0
    told = {task: what for task, *what in (line.split("|") for line in lines(said))}
    assert len(lines(said)) == 2
    assert told == {
        task: ["p-1", str(record["status"]), record["error"]] for task, record in home.failed().items()
    }
    assert told.keys() == {failed, expired}


def test_where_it_does_not_end_well_that_is_logged_and_it_is_not_run_again(home: Home) -> None:
    said, task = home.folder / "said", home.grafx.add("expired")
    home.wait_for(task)
    hook = f"sh -c 'echo x >>{said}; echo no mail today; exit 3'"
    ended = home.run("--once", ON_FAILED=hook)
    assert f"ERROR   {task} ON_FAILED ended with 3: no mail today; it is not run again" in ended.log()
    assert list(home.failed()) == [task]
    home.run("--once", ON_FAILED=hook)
    assert lines(said) == ["x"]


def test_it_runs_only_for_what_the_file_has_under_failed(home: Home) -> None:
    """Killed while it runs, the order is known to have failed: it is told once at most."""
    said, task, fine = home.folder / "said", home.grafx.add("expired"), home.grafx.add(after=1)
    home.wait_for(task, fine)
    with db.lock(home.database, "lock", 10):  # so that nothing is written
        poller = home.start(before=QUICK, ON_FAILED=f"sh -c 'echo $$ >>{said}; exec sleep 60'")
        poller.says(f"{task} failed[^~]*{fine} delivered")
        assert not said.exists()
    pid = eventually(lambda: lines(said))[0]
    assert list(home.failed()) == [task]
    poller.stop(signal.SIGKILL)
    os.kill(int(pid), signal.SIGKILL)
    home.run("--once", ON_FAILED=f"sh -c 'echo again >>{said}'")
    assert lines(said) == [pid]
