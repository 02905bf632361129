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


def test_once_runs_it_for_what_is_judged_at_the_end_and_waits_for_no_database(home: Home) -> None:
    """A 404 counts by the other file of the same run; a database that somebody breaks is not waited for."""
    said, dead, fine = home.folder / "said", "unknown", home.grafx.add()
    record = {"status": 404, "error": "no", "since": "2026-01-01T00:00:00Z", "times": 30}
    home.write({"orders": {dead: {}, fine: {}}, "failing": {dead: record}, "failed": {}})
    hook = f"sh -c 'echo $TASK_ID >>{said}'"
    assert home.run("--once", ON_FAILED=hook).process.returncode == 1
    assert lines(said) == list(home.failed()) == [dead]
    home.wait_for(home.grafx.add("expired"))
    home.grafx.fault("download", "delay", seconds=2)
    running = home.start("--once", before="db.SAVING = db.PATIENCE = 1", ON_FAILED=hook)
    eventually(lambda: [request for request in home.grafx.requests if request.what == "download"][1:])
    home.write("{")
    assert running.process.wait(30) == 1
    assert lines(said) == [dead]


def test_it_takes_no_thread_of_the_polls(home: Home) -> None:
    expired, fine = home.grafx.add("expired"), home.grafx.add()
    home.wait_for(expired)
    go = home.folder / "go"
    hook = f"sh -c 'while ! test -e {go}; do sleep 0.1; done; echo told'"
    poller = home.start(before=QUICK, CONCURRENCY="1", ON_FAILED=hook)
    eventually(lambda: home.failed())
    home.wait_for(fine)
    poller.says(f"{fine} delivered")
    go.touch()
    poller.says(f"{expired} ON_FAILED: told")
