"""When a rejected order fails: by evidence and time, over restarts, and from one `--once` to the next."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from conftest import QUICK, Home, Running, eventually
from sandbox import PAGE

import db

HTML: dict[str, Any] = {"body": PAGE, "content_type": "text/html"}
DAY = 86400.0
DEAD = "no-such-task"  # its answer is a 404 in GraFx's own words
FORGOTTEN = "not finished after 7 days, when GraFx forgets a task; last answer: "
# Python for `before`: rejections that do not count are polled as often as all others; outages are said soon.
SOON = f"{QUICK}; poller.LONGEST_PAUSE = 0.1; poller.MINUTE = 0.2"


def times(home: Home, task_id: str) -> int:
    """How often this order was polled."""
    return len(home.grafx.asked("task", task_id))


def failing(home: Home) -> Any:
    return home.read().get("failing", {})


def add(home: Home, task_id: str) -> str:
    db.add_order(task_id, path=home.database)
    return task_id


def utc(seconds: float) -> str:
    """So many seconds from now."""
    return db.stamp(datetime.now(timezone.utc) + timedelta(seconds=seconds))


def noted(since: Any, status: int = 500, times: int = 9) -> dict[str, Any]:
    """What an earlier process noted under "failing"."""
    return {"status": status, "error": "no", "since": since, "times": times}


def test_from_the_first_rejection_on_it_stands_under_failing_and_stays_pending(home: Home) -> None:
    grafx = home.grafx
    task, fine = grafx.add("failed"), grafx.add("never")
    fields = {"projectID": "p-1", "added": utc(-100)}
    home.wait_for(task, DEAD, fine, **fields)
    daemon = home.start(before=QUICK, POLL_INTERVAL="0.1", GIVE_UP_AFTER="604800")
    eventually(lambda: failing(home).keys() == {task, DEAD} and times(home, task) > 4)
    daemon.says(rf"{task} rejected .* retrying until \d{{4}}-\d\d-\d\d \d\d:\d\d, then it fails\n")
    home.wait_for(task, fine, **fields)
    eventually(lambda: failing(home).keys() == {task})
    record = failing(home)[task]
    assert (record["status"], record["since"] <= utc(0)) == (500, True)
    assert "Variable 'Size' has no item 'XXL'." in record["error"]
    assert home.waiting() == {task: fields, fine: fields}
    listed = home.db("list").stdout
    assert re.search(rf"1 pending.*{fine}.*1 rejected, and retried.*{task}.*500.*XXL.*0 failed", listed, re.S)
    assert len(re.findall(rf"WARNING {task} rejected by GraFx: .*'XXL'.* \(project p-1\)", daemon.log())) == 1
    grafx._tasks[task].kind = "never"
    eventually(lambda: "failing" not in home.read())
    assert home.failed() == {}


def test_it_fails_after_give_up_after_and_not_before(home: Home) -> None:
    """Also where, as after a clock was set back, it was rejected since a time that lies ahead, or is none."""
    tasks = [home.grafx.add("failed") for _ in range(3)]
    records = {tasks[0]: noted("2099-01-01T00:00:00Z"), tasks[1]: noted("yesterday")}
    home.write({"orders": {task: {} for task in tasks}, "failing": records})
    began = time.monotonic()
    home.start(before=QUICK, GIVE_UP_AFTER="1", POLL_INTERVAL="0.1")
    eventually(lambda: home.failed())
    assert time.monotonic() - began >= 1
    eventually(lambda: home.failed().keys() == {*tasks})


def test_it_fails_with_the_third_rejection_since_it_rendered(home: Home) -> None:
    """Any other answer does not count, nor does it start the count anew."""
    others = ["task status-202", "task status-502", "task status-404", "download html"]
    rendered, *tasks = [home.grafx.add("png" if "download" in other else "never") for other in others]
    for other, task in zip(others, [rendered, *tasks], strict=True):
        for _ in range(3):
            home.grafx.fault("task", "status-500", task_id=task, times=2)
            if "download" in other:
                home.grafx.fault("task", "delay", task_id=task, seconds=0)
            home.grafx.fault(*other.split(), task_id=task)
    home.wait_for(rendered, *tasks)
    home.start(before=QUICK, GIVE_UP_AFTER="0", POLL_INTERVAL="0.1")
    eventually(lambda: times(home, rendered) > 9 and len(home.failed()) == 3)
    assert home.failed().keys() == {*tasks}
    assert [times(home, task) for task in tasks] == [4, 4, 4]


def test_over_a_restart_its_time_counts_on_but_not_its_rejections(home: Home) -> None:
    """GraFx may be ill just at the start, so the new process watches it for a while, too."""
    task = home.grafx.add("failed")
    record = noted(utc(-9 * 3600), times=50)
    home.write({"orders": {task: {}}, "failing": {task: record}})
    first = home.start(before=QUICK, POLL_INTERVAL="0.1")
    eventually(lambda: times(home, task) > 6)
    first.stop()
    assert (list(home.waiting()), home.failed()) == ([task], {})
    assert failing(home)[task]["since"] == record["since"]
    home.start(before=f"{QUICK}; poller.WITNESSED = 0")
    eventually(lambda: task in home.failed())
    token = home.grafx.asked("token")[-1]
    assert [one.what for one in home.grafx.requests if one.time > token.time] == ["task"] * 3
    assert "failing" not in home.read()


def test_once_polls_once_and_follows_the_rule_from_run_to_run(home: Home) -> None:
    failed, passing = home.grafx.add("failed"), home.grafx.add()
    home.grafx.fault("task", "status-404", task_id=passing)
    home.wait_for(failed, passing)
    for run in (1, 2):
        ended = home.run("--once")
        assert ended.process.returncode == 0
        assert ended.log().count(f"{failed} rejected by GraFx") == (run == 1)
        assert failing(home)[failed]["times"] == run
    assert "polled 2 orders: 1 delivered, 1 rejected" in ended.log()
    assert (home.files(), list(home.waiting())) == ([f"{passing}.png"], [failed])
    assert home.run("--once", GIVE_UP_AFTER="0").process.returncode == 1
    assert list(home.failed()) == [failed]
    assert times(home, failed) == 3


def test_once_during_an_outage_fails_no_order_and_says_at_its_end_what_it_is(home: Home) -> None:
    pages, words = ([home.grafx.add() for _ in range(10)] for _ in range(2))
    home.wait_for(*pages, *words)
    home.grafx.fault("task", "status-404", times=None, task_id=pages, **HTML)
    home.grafx.fault("task", "status-404", times=None, task_id=words)
    # Also where it takes longer than a minute, and than an outage that is an error.
    ended = home.run("--once", before="poller.MINUTE, poller.ALARM = 0.02, 0.04", GIVE_UP_AFTER="0")
    assert ended.process.returncode == 1
    (said,) = re.findall("(?:WARNING|ERROR) .*GraFx answers.*", ended.log())
    assert "GraFx answers 404 to all 20 orders: check ENVIRONMENT and the integr" in said
    assert (home.failed(), len(failing(home))) == ({}, 20)
    home.grafx.clear_faults()
    assert home.run("--once").process.returncode == 0
    assert (home.waiting(), len(home.files())) == ({}, 20)
    assert "failing" not in home.read()


@pytest.mark.parametrize("beside", ["here", "rendering", "delivered"])
def test_once_counts_a_404_where_another_file_came_in_the_same_run(home: Home, beside: str) -> None:
    """Also after it; but neither a file that was here nor an order that renders is one that came."""
    other, counts = home.grafx.add("never" if beside == "rendering" else "png"), beside == "delivered"
    if beside == "here":
        (home.orders / f"{other}.png").write_bytes(home.grafx.body(other))
    home.write({"orders": {DEAD: {}, other: {}}, "failing": {DEAD: noted(utc(-7200), 404, 19)}})
    ended = home.run("--once", CONCURRENCY="1")
    assert list(home.failed()) == [DEAD] * counts
    assert counts or failing(home)[DEAD]["times"] == 19
    said = "GraFx answers 404 to the only order" in ended.log()
    assert said is (beside == "here")
    assert ended.process.returncode == (said or counts)


TEXT: dict[str, Any] = {"body": b"default backend - 404", "content_type": "text/plain"}
SCENES: dict[str, tuple[str, str, dict[str, Any]]] = {  # where it is, the fault, and its options
    "from the start": ("task", "status-404", TEXT),
    "for the only order": ("task", "status-404", {}),
    "while all render": ("task", "html", {}),
    "after one was rejected alone": ("task", "status-404", HTML),
    "at the download": ("download", "html", {}),
}


def test_a_page_for_all_orders_fails_none(home: Home) -> None:
    """Each scene has a poller, a database and orders of its own; and a page for twice GIVE_UP_AFTER."""
    grafx = home.grafx
    cases: list[tuple[str, Home, Running, list[str]]] = []
    for scene, (what, fault, options) in SCENES.items():
        (folder := home.folder / scene).mkdir()
        one = Home(folder, grafx)
        one.pollers = home.pollers  # which end with this test
        tasks = [grafx.add() for _ in range(1 if "only" in scene else 3)]
        one.wait_for(*tasks)
        if "alone" in scene:
            grafx.fault(what, fault, times=3, task_id=tasks[0], **options)
            add(one, grafx.add())
        for task in tasks if "render" in scene or "alone" in scene else ():
            grafx.fault("task", "status-204", times=5, task_id=task)
        grafx.fault(what, fault, times=None, task_id=tasks, **options)
        before = f"{SOON}; poller.ALARM = 0.8; poller.PERHAPS_LIKE_ALL = 5"
        daemon = one.start(before=before, GIVE_UP_AFTER="0.5", POLL_INTERVAL="0.1")
        cases.append((scene, one, daemon, tasks))

    def outlasted(scene: str, task: str) -> bool:
        what, fault, _ = SCENES[scene]
        met = [request.time for request in grafx.asked(what, task) if request.fault == fault]
        return len(met) > 10 and met[-1] - met[0] > 1

    eventually(lambda: all(outlasted(scene, task) for scene, _, _, tasks in cases for task in tasks))
    text = "GraFx answers (404|200 without a file) to (all 3 orders|both orders|the only order)"
    for scene, one, daemon, tasks in cases:
        for level in ("WARNING", "ERROR  "):
            daemon.says(rf" {level} {text}.*: check ENVIRONMENT and the integration's permissions\n")
        eventually(lambda one=one, tasks=tasks: set(one.waiting()) == set(failing(one)) == {*tasks})
        assert one.failed() == {}, scene
    grafx.clear_faults()
    for scene, one, daemon, tasks in cases:
        daemon.says("resumed after")
        eventually(lambda one=one: not one.waiting())
        assert {f"{task}.png" for task in tasks} <= set(one.files()), scene
        assert "start" not in scene or daemon.log().count("GraFx answers") == 2


def test_dead_orders_hold_up_no_new_one(home: Home) -> None:
    """Their pauses grow; with the first good answer they are due at once, for it may have been an outage."""
    dead = [f"{DEAD}-{number}" for number in range(50)]
    home.wait_for(*dead)
    daemon = home.start(before="db.LOOK = 0.1; poller.SHORTEST_PAUSE = 300; poller.MINUTE = 0.2")
    daemon.says(" WARNING GraFx answers 404 to ")
    eventually(lambda: len(home.grafx.requests) == 51)  # the token, and each once
    new = add(home, home.grafx.add())
    daemon.says("resumed after")
    eventually(lambda: {request.task_id for request in home.grafx.requests[53:]} >= {*dead})
    first = [request.task_id for request in home.grafx.requests[51:53]]
    assert first == [new, new]  # its poll and its download come before the second poll of any other
    assert (home.files(), home.failed()) == ([f"{new}.png"], {})


def test_what_was_said_of_a_dead_order_is_not_said_again(home: Home) -> None:
    home.wait_for(DEAD)
    daemon = home.start(before=SOON)
    daemon.says("GraFx answers 404 to the only order: ")
    add(home, home.grafx.add())
    daemon.says("resumed after")
    polled = times(home, DEAD)
    eventually(lambda: times(home, DEAD) > polled + 10)  # which takes several times MINUTE
    assert daemon.log().count("GraFx answers") == 1
    add(home, f"{DEAD}-2")
    eventually(lambda: daemon.log().count("GraFx answers") == 2)
    eventually(lambda: "GraFx answers" in home.db("list").stdout)
    home.wait_for()
    eventually(lambda: "GraFx answers" not in home.db("list").stdout)


def test_it_is_not_said_of_all_orders_before_the_others_are_due(home: Home) -> None:
    home.wait_for(DEAD, home.grafx.add("never"))
    daemon = home.start(before=f"{QUICK}; poller.MINUTE = 0.1", POLL_INTERVAL="60")
    eventually(lambda: times(home, DEAD) > 4)
    assert "GraFx answers" not in daemon.log()


def test_a_404_counts_only_where_another_file_came_since_the_previous_poll(home: Home) -> None:
    """It fails with so many as PERHAPS_LIKE_ALL says, here 3. That other orders render is no evidence."""
    home.wait_for(DEAD, home.grafx.add("never"))
    home.start(before=f"{SOON}; poller.PERHAPS_LIKE_ALL = 3", GIVE_UP_AFTER="0", POLL_INTERVAL="0.1")
    for files in (0, 1, 2):
        eventually(lambda files=files: len(home.files()) == files)
        polled = times(home, DEAD)
        eventually(lambda polled=polled: times(home, DEAD) > polled + 5)
        assert home.failed() == {}
        add(home, home.grafx.add())
    eventually(lambda: list(home.failed()) == [DEAD])


def test_an_order_that_is_older_than_seven_days_fails_whatever_it_is_answered(home: Home) -> None:
    answers = {
        "status-204": "204", "status-404": "Not Found: This answer .*", "status-503": "GraFx answered 503 .*",
        "close": r"GraFx gave no answer \(.*",
    }  # fmt: skip
    old, young = ({home.grafx.add(): fault for fault in answers} for _ in range(2))
    for task, fault in [*old.items(), *young.items()]:
        home.grafx.fault("task", fault, times=None, task_id=task)
    orders = {task: {"added": utc(-8 * DAY)} for task in old}
    home.write({"orders": orders | {task: {"added": utc(-6 * DAY)} for task in young}})
    patient = home.start(before=f"{SOON}; chili.Pace.LONGEST = 0", POLL_INTERVAL="0.1")
    eventually(lambda: set(failing(home)) >= {*old})
    assert patient.stop() == 0
    home.start(before=f"{SOON}; chili.Pace.LONGEST = 0", GIVE_UP_AFTER="0", POLL_INTERVAL="0.1")
    eventually(lambda: all(times(home, task) > 4 for task in young))
    eventually(lambda: set(home.waiting()) == {*young})
    for task, fault in old.items():
        assert re.fullmatch(FORGOTTEN + answers[fault], home.failed()[task]["error"])


def test_an_order_without_a_date_is_as_old_as_the_process_or_its_record_knows_it(home: Home) -> None:
    home.write({"orders": {DEAD: {}}, "failing": {DEAD: noted(utc(-8 * DAY), 404, 2)}})
    home.run("--once")
    assert home.failed()[DEAD]["error"].startswith(f"{FORGOTTEN}Not Found")
    home.wait_for(task := home.grafx.add("never"))
    home.start(before=f"{QUICK}; poller.FORGOTTEN = 0.5", GIVE_UP_AFTER="0", POLL_INTERVAL="0.1")
    eventually(lambda: home.failed().get(task, {}).get("error") == f"{FORGOTTEN}204")


def test_neither_an_outage_nor_its_hook_is_an_old_orders_trouble(home: Home) -> None:
    grafx, mended, ran = home.grafx, home.folder / "mended", home.folder / "ran"
    here, later = grafx.add(), grafx.add()
    home.wait_for(here, added=utc(-8 * DAY))
    hook = f"sh -c 'echo x >>{ran}; test -e {mended}' sh"
    daemon = home.start(before=QUICK, GIVE_UP_AFTER="0", POLL_INTERVAL="0.1", ON_DONE=hook)
    daemon.says(f"{here} ON_DONE exited with code 1")
    grafx.fault("token", "status-503", times=None)
    grafx.revoke()
    home.wait_for(here, later, added=utc(-8 * DAY))
    daemon.says("paused: no token: ")
    eventually(lambda: len(grafx.asked("token")) > 5 and ran.read_text().count("x") > 4)
    grafx.clear_faults()
    mended.touch()
    eventually(lambda: not home.waiting())
    assert home.files() == sorted([f"{here}.png", f"{later}.png"])
    assert home.failed() == {}
    assert "rejected by" not in daemon.log()


@pytest.mark.parametrize(
    ("pending", "fault", "options", "said"),
    [
        # Without an order, a task that cannot exist.
        (False, "", {}, "only the first order shows whether ENVIRONMENT is right"),
        (False, "status-404", HTML, "404 Not Found: no reason given"),
        (False, "redirect-away", {}, "redirects to"),
        # Else the last order.
        (True, "500-aspnet", {}, "Check BASEURL, ENVIRONMENT"),
        (True, "status-404", {}, "Check BASEURL, ENVIRONMENT"),
    ],
)
def test_check_polls_the_last_order_or_a_task_that_cannot_exist(
    home: Home, pending: bool, fault: str, options: Any, said: str
) -> None:
    """And says what is wrong with the answer, where anything is."""
    last = home.grafx.add() if pending else ""
    home.wait_for(*([DEAD, last] if pending else []))
    if fault:
        home.grafx.fault("task", fault, times=None, **options)
    ended = home.run("--check")
    (line,) = [line for line in ended.log().splitlines() if "GraFx:" in line]
    assert (ended.process.returncode, line[:6]) == ((1, "WRONG ") if fault else (0, "ok    "))
    assert said in line
    assert last in line
    assert not pending or [request.task_id for request in home.grafx.asked("task")] == [last]


def test_the_examples_own_address_is_named_as_such(home: Home) -> None:
    ended = home.run("--check", BASEURL="https://ENVIRONMENT.chili-publish.online")
    assert ended.process.returncode == 78
    assert "BASEURL is still the example's" in ended.log()
