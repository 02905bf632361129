"""When a rejected order fails: by evidence and time, over restarts, and from one `--once` to the next."""

from __future__ import annotations

import re
import time
import uuid
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from conftest import QUICK, Home, eventually
from sandbox import PAGE

import db

UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
HTML: dict[str, Any] = {"body": PAGE, "content_type": "text/html"}
DAY = 86400.0
FORGOTTEN = "not finished after 7 days, when GraFx forgets a task; last answer: "
# Python for `before`: rejections that do not count are polled as often as all others; outages are said soon.
SOON = f"{QUICK}; poller.LONGEST_PAUSE = 0.1; poller.MINUTE = 0.5"


def times(home: Home, task_id: str) -> list[float]:
    """When this order was polled."""
    return [request.time for request in home.grafx.asked("task", task_id)]


def failing(home: Home) -> Any:
    return home.read().get("failing", {})


def unknown() -> str:
    """A task that GraFx does not know: its answer is a 404 in its own words."""
    return str(uuid.uuid4())


def add(home: Home, task_id: str) -> str:
    db.add_order(task_id, path=home.database)
    return task_id


def utc(seconds: float) -> str:
    """So many seconds from now."""
    return db.stamp(datetime.now(timezone.utc) + timedelta(seconds=seconds))


def test_what_was_delivered_is_counted_as_that_alone(home: Home) -> None:
    """GraFx rejected it for a while, and the poller was killed before the order left the file."""
    record = {"status": 500, "error": "x", "since": utc(-60), "times": 2}
    home.write({"orders": {"a": {}}, "failing": {"a": record}, "failed": {}})
    db.Deliveries(home.database).add({"a": "a.png"})
    assert " 0 pending, 0 rejected, 0 failed, 1 delivered" in home.run("--once").log()
    assert home.read() == {"orders": {}, "failed": {}}


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_an_order_fails_after_so_many_seconds_and_three_rejections(home: Home, seconds: float) -> None:
    task = home.grafx.add("failed")
    home.wait_for(task)
    home.start(before=QUICK, GIVE_UP_AFTER=str(seconds))
    eventually(lambda: task in home.failed())
    polled = times(home, task)
    assert polled[-1] - polled[0] > seconds - 1
    assert len(polled) == 3 if not seconds else len(polled) > 3


def test_from_the_first_rejection_on_it_stands_under_failing_and_stays_pending(home: Home) -> None:
    grafx = home.grafx
    task, fine = grafx.add("failed"), grafx.add("never")
    fields = {"projectID": "p-1", "added": utc(-100)}
    home.wait_for(task, fine, **fields)
    daemon = home.start(before=QUICK)
    eventually(lambda: len(times(home, task)) > 4)
    record = failing(home)[task]
    assert list(failing(home)) == [task]
    assert record["status"] == 500
    assert "Variable 'Size' has no item 'XXL'." in record["error"]
    assert re.fullmatch(UTC, record["since"])
    assert record["times"] >= 1
    assert home.waiting() == {task: fields, fine: fields}
    listed = home.db("list").stdout
    assert re.search(
        rf"1 pending.*{fine}.*1 rejected, and retried.*{task}.*500.*XXL.*0 failed", listed, re.DOTALL
    )
    # Logged once, with GraFx's words, the project, and until when it is retried.
    (said,) = re.findall(rf"WARNING {task} rejected by GraFx: (.*)", daemon.log())
    assert re.fullmatch(
        r"Invalid list.*'XXL'.* \(project p-1\); retrying until \d\d:\d\d:\d\d, then it fails", said
    )
    grafx._tasks[task].kind = "never"
    eventually(lambda: "failing" not in home.read())
    assert daemon.stop() == 0
    assert home.failed() == {}


def test_since_counts_on_after_a_restart_but_three_more_rejections_are_needed(home: Home) -> None:
    task = home.grafx.add("failed")
    record = {"status": 500, "error": "no", "since": utc(-60), "times": 9}
    home.write({"orders": {task: {}}, "failing": {task: record}, "failed": {}})
    first = home.start(before=QUICK)
    eventually(lambda: len(times(home, task)) > 3)
    first.stop()
    assert failing(home)[task]["since"] == record["since"]
    before = len(times(home, task))
    second = home.start(before=f"{QUICK}; poller.WITNESSED = 0", GIVE_UP_AFTER="50")
    eventually(lambda: task in home.failed())
    assert len(times(home, task)) == before + 3
    assert "failing" not in home.read()
    assert second.stop() == 0


@pytest.mark.parametrize("since", ["2099-01-01T00:00:00Z", "yesterday", None])
def test_a_since_that_lies_ahead_or_is_no_time_counts_from_now(home: Home, since: Any) -> None:
    """As after a clock was set back: it neither fails at once nor is retried for ever."""
    task = home.grafx.add("failed")
    record = {"status": 500, "error": "no", "since": since, "times": 9}
    home.write({"orders": {task: {}}, "failing": {task: record}, "failed": {}})
    assert home.run("--once", GIVE_UP_AFTER="600").process.returncode == 0
    assert utc(-60) < failing(home)[task]["since"] < utc(60)
    home.write({"orders": {task: {}}, "failing": {task: record}, "failed": {}})
    began = time.monotonic()
    home.start(before=QUICK, GIVE_UP_AFTER="1")
    eventually(lambda: task in home.failed())
    assert time.monotonic() - began >= 1


def test_once_polls_once_and_follows_the_rule_from_run_to_run(home: Home) -> None:
    failed, passing = home.grafx.add("failed"), home.grafx.add()
    home.grafx.fault("task", "status-404", task_id=passing)
    home.wait_for(failed, passing)
    logs = []
    for run in (1, 2, 3):
        ended = home.run("--once", GIVE_UP_AFTER="3600")
        logs.append(ended.log())
        assert ended.process.returncode == 0
        assert failing(home)[failed]["times"] == run
        assert len(times(home, failed)) == run
    assert home.files() == [f"{passing}.png"]
    assert list(home.waiting()) == [failed]
    assert [log.count(f"{failed} rejected by GraFx") for log in logs] == [1, 0, 0]
    assert "polled 2 orders: 1 delivered, 1 rejected" in logs[1]
    assert home.run("--once", GIVE_UP_AFTER="0").process.returncode == 1
    assert list(home.failed()) == [failed]
    assert len(times(home, failed)) == 4


@pytest.mark.parametrize("fault", [{}, HTML], ids=["own words", "a page"])
def test_once_during_an_outage_fails_no_order_and_says_at_its_end_what_it_is(home: Home, fault: Any) -> None:
    tasks = [home.grafx.add() for _ in range(20)]
    home.wait_for(*tasks)
    home.grafx.fault("task", "status-404", times=None, **fault)
    # Also where it takes longer than a minute, and than an outage that is an error.
    ended = home.run("--once", before="poller.MINUTE, poller.ALARM = 0.02, 0.04", GIVE_UP_AFTER="0")
    assert ended.process.returncode == 1
    (said,) = re.findall("(?:WARNING|ERROR) .*GraFx answers.*", ended.log())
    assert "GraFx answers 404 to all 20 orders: look at ENVIRONMENT and at the integr" in said
    assert home.failed() == {}
    assert len(failing(home)) == 20
    home.grafx.clear_faults()
    assert home.run("--once").process.returncode == 0
    assert (home.waiting(), home.failed(), len(home.files())) == ({}, {}, 20)
    assert "failing" not in home.read()


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("task", "status-202"),
        ("task", "status-502"),
        ("task", "status-404"),
        ("download", "html"),  # after a 200 for the task
    ],
)
def test_only_a_202_or_204_starts_the_count_anew(home: Home, what: str, fault: str) -> None:
    """Not a trouble, nor a 200 whose download is rejected. That its own file does, goes without saying."""
    task = home.grafx.add()
    for _ in range(4):
        home.grafx.fault("task", "status-500", task_id=task, times=2)
        if what == "download":
            home.grafx.fault("task", "delay", task_id=task, seconds=0)
        home.grafx.fault(what, fault, task_id=task)
    home.wait_for(task)
    home.start(before=QUICK, GIVE_UP_AFTER="0", POLL_INTERVAL="0.1")
    eventually(lambda: not home.waiting())
    anew = fault == "status-202"
    assert len(times(home, task)) == (13 if anew else 4)
    assert (home.files(), list(home.failed())) == (([f"{task}.png"], []) if anew else ([], [task]))


def test_a_record_under_failing_goes_with_its_order(home: Home) -> None:
    removed, stays = home.grafx.add("failed"), home.grafx.add("failed")
    home.wait_for(removed, stays)
    home.start(before=QUICK)
    eventually(lambda: len(failing(home)) == 2)
    data = home.read()
    del data["orders"][removed]
    home.write(data)
    eventually(lambda: list(failing(home)) == [stays])


# --- a page for all orders -------------------------------------------------------------------

PAGES: list[tuple[str, dict[str, Any], int]] = [  # the fault, its options, for how many orders
    ("status-404", {"body": b"default backend - 404", "content_type": "text/plain"}, 3),
    ("html", {}, 3),
    ("status-404", {}, 1),
]
SCENES = ("from the start", "while all render", "after one was rejected alone", "at the download")


def home_beside(home: Home, name: str) -> Home:
    """Another database, whose pollers end with those of this one."""
    folder = home.folder / name
    folder.mkdir()
    other = Home(folder, home.grafx)
    other.pollers = home.pollers
    return other


@pytest.mark.parametrize("scene", SCENES)
def test_a_page_for_all_orders_fails_none(home: Home, scene: str) -> None:
    """For twice GIVE_UP_AFTER; a poller for each kind of page."""
    grafx = home.grafx
    what = "download" if scene == "at the download" else "task"
    cases = []
    for number, (name, options, orders) in enumerate(PAGES):
        one = home_beside(home, str(number))
        tasks = [grafx.add("never" if scene in SCENES[1:3] else "png") for _ in range(orders)]
        delivered = [grafx.add() for _ in range(scene == SCENES[2])]
        if delivered:
            grafx.fault("task", name, times=3, task_id=tasks[0], **options)
        elif scene != SCENES[1]:
            grafx.fault(what, name, times=None, task_id=tasks, **options)
        one.wait_for(*tasks, *delivered)
        daemon = one.start(before=f"{SOON}; poller.ALARM = 1.5", GIVE_UP_AFTER="1", POLL_INTERVAL="0.1")
        cases.append((one, daemon, tasks))
    if scene in SCENES[1:3]:
        for (one, _, tasks), (name, options, _) in zip(cases, PAGES, strict=True):
            eventually(lambda one=one, tasks=tasks: all(len(times(one, task)) > 4 for task in tasks))
            grafx.fault("task", name, times=None, task_id=tasks, **options)

    def outlasted() -> bool:
        time.sleep(0.2)
        met = defaultdict(list)
        for request in grafx.asked(what):
            if request.fault:
                met[request.task_id].append(request.time)
        hit = [met[task] for _, _, tasks in cases for task in tasks]
        return all(len(one) > 25 and one[-1] - one[0] > 2 for one in hit)

    eventually(outlasted, patience=90)
    text = "GraFx answers (404|200 without a file) to (all [23] orders|the only order)"
    for one, daemon, tasks in cases:
        eventually(lambda one=one, tasks=tasks: set(one.waiting()) == {*tasks})
        assert one.failed() == {}
        assert set(one.read()["failing"]) == {*tasks}
        for level in ("WARNING", "ERROR  "):
            daemon.says(rf" {level} {text}.*: look at ENVIRONMENT and at the integration's permissions\n")
        for task in tasks:
            grafx._tasks[task].kind = "png"
    grafx.clear_faults()
    for one, daemon, tasks in cases:
        daemon.says("resumed after")
        eventually(lambda one=one: not one.waiting())
        assert {f"{task}.png" for task in tasks} <= set(one.files())
        assert scene != SCENES[0] or daemon.log().count("GraFx answers") == 2


def test_dead_orders_hold_up_no_new_one(home: Home) -> None:
    """Their pauses grow; with the first good answer they are due at once, for it may have been an outage."""
    dead = [unknown() for _ in range(50)]
    home.wait_for(*dead)
    daemon = home.start(before="db.LOOK = 0.1; poller.SHORTEST_PAUSE = 300; poller.MINUTE = 0.2")
    daemon.says(" WARNING GraFx answers 404 to ")
    eventually(lambda: len(home.grafx.requests) == 51)  # the token, and each once
    eventually(lambda: "GraFx answers 404 to" in home.db("list").stdout)
    new = add(home, home.grafx.add())
    eventually(lambda: f"{new}.png" in home.files())
    daemon.says("resumed after")
    eventually(lambda: {request.task_id for request in home.grafx.requests[53:]} >= {*dead})
    first = [request.task_id for request in home.grafx.requests[51:53]]
    assert first == [new, new]  # its poll and its download come before the second poll of any other
    assert home.failed() == {}


def test_an_order_of_which_it_was_said_begins_no_new_outage(home: Home) -> None:
    dead = unknown()
    home.wait_for(dead)
    daemon = home.start(before=SOON)
    daemon.says("GraFx answers 404 to the only order: ")
    add(home, home.grafx.add())
    daemon.says("resumed after")
    polled, now = len(times(home, dead)), time.monotonic()
    eventually(lambda: len(times(home, dead)) > polled + 10 and time.monotonic() > now + 1)
    assert daemon.log().count("GraFx answers") == 1
    add(home, unknown())
    eventually(lambda: daemon.log().count("GraFx answers") == 2)
    assert daemon.stop() == 0


def test_nothing_is_said_of_orders_that_were_removed(home: Home) -> None:
    home.wait_for(unknown())
    daemon = home.start(before=f"{SOON}; poller.ALARM = 0.7")
    daemon.says(" ERROR   GraFx answers 404 to the only order: ")
    home.wait_for()
    eventually(lambda: "GraFx answers" not in home.db("list").stdout)


@pytest.mark.parametrize("beside", ["png", "never"])
def test_a_404_fails_only_where_other_files_came_between_its_polls(home: Home, beside: str) -> None:
    """So many times as UNPROVEN says, here 5. That other orders render is no evidence."""
    dead = unknown()
    home.wait_for(dead, home.grafx.add(beside))
    home.start(before=f"{SOON}; poller.UNPROVEN = 5", GIVE_UP_AFTER="1", POLL_INTERVAL="0.1")

    def ended() -> bool:
        if beside == "png" and len(home.waiting()) == 1:
            add(home, home.grafx.add())
        polled = times(home, dead)
        return dead in home.failed() or (
            beside == "never" and len(polled) > 20 and polled[-1] - polled[0] > 2
        )

    eventually(ended, patience=90)
    assert list(home.failed()) == [dead] * (beside == "png")
    assert beside == "never" or len(home.files()) >= 5


@pytest.mark.parametrize("beside", ["first", "last", "here", "rendering", "none"])
def test_once_counts_a_404_where_another_file_came_in_the_same_run(home: Home, beside: str) -> None:
    """Before it or after it; a file that was here, or an order that renders, is none."""
    dead, counts = unknown(), beside in ("first", "last")
    other = home.grafx.add("never" if beside == "rendering" else "png")
    if beside == "here":
        (home.orders / f"{other}.png").write_bytes(home.grafx.body(other))
    tasks = {"first": [other, dead], "none": [dead]}.get(beside, [dead, other])
    record = {"status": 404, "error": "no", "since": utc(-7200), "times": 19}
    home.write({"orders": {task: {} for task in tasks}, "failing": {dead: record}, "failed": {}})
    ended = home.run("--once", CONCURRENCY="1")
    assert list(home.failed()) == [dead] * counts
    assert counts or failing(home)[dead]["times"] == 19
    said = "GraFx answers 404 to the only order" in ended.log()
    assert said is (beside in ("here", "none"))
    assert ended.process.returncode == (said or counts)


# --- what GraFx has forgotten ----------------------------------------------------------------


def test_an_order_that_is_older_than_seven_days_fails_whatever_it_is_answered(home: Home) -> None:
    """By the ordinary rule, and noted under failing before; a younger one does not."""
    answers = {
        "status-204": "204", "status-404": "Not Found: This answer .*", "status-503": "GraFx answered 503 .*",
        "close": r"GraFx gave no answer \(.*",
    }  # fmt: skip
    old, young = ({home.grafx.add(): fault for fault in answers} for _ in range(2))
    for task, fault in [*old.items(), *young.items()]:
        home.grafx.fault("task", fault, times=None, task_id=task)
    orders = {task: {"added": utc(-8 * DAY)} for task in old}
    orders |= {task: {"added": utc(-6 * DAY)} for task in young}
    home.write({"orders": orders, "failed": {}})
    home.run("--once")
    rejected = {*old, next(task for task, fault in young.items() if fault == "status-404")}
    assert set(failing(home)) == rejected
    assert {failing(home)[task]["times"] for task in old} == {1}
    daemon = home.start(before=f"{QUICK}; chili.Pace.LONGEST = 0", GIVE_UP_AFTER="1")
    eventually(lambda: set(home.failed()) == {*old})
    for task, fault in old.items():
        assert re.fullmatch(FORGOTTEN + answers[fault], home.failed()[task]["error"])
        assert len(times(home, task)) >= 4
    before = len(home.grafx.requests)
    eventually(lambda: {request.task_id for request in home.grafx.requests[before:]} >= {*young})
    assert set(home.waiting()) == {*young}
    assert daemon.stop() == 0


def test_an_order_without_a_date_is_as_old_as_the_process_knows_it(home: Home) -> None:
    task = home.grafx.add("never")
    home.wait_for(task)
    home.start(before=f"{QUICK}; poller.FORGOTTEN = 1", GIVE_UP_AFTER="0", POLL_INTERVAL="0.1")
    eventually(lambda: home.failed())
    assert home.failed()[task]["error"] == f"{FORGOTTEN}204"
    assert len(times(home, task)) >= 3


def test_neither_an_outage_nor_its_hook_is_an_old_orders_trouble(home: Home) -> None:
    grafx, mended = home.grafx, home.folder / "mended"
    here, later = grafx.add(), grafx.add()
    home.wait_for(here, added=utc(-8 * DAY))
    ran = home.folder / "ran"
    ran.touch()
    hook = f"sh -c 'echo x >>{ran}; test -e {mended}' sh"
    daemon = home.start(before=QUICK, GIVE_UP_AFTER="0", ON_DONE=hook)
    eventually(lambda: home.files() == [f"{here}.png"])
    grafx.fault("token", "status-503", times=None)
    grafx.revoke()
    home.wait_for(here, later, added=utc(-8 * DAY))
    daemon.says("paused: no token: ")
    eventually(lambda: len([request for request in grafx.requests if request.fault]) > 4)
    eventually(lambda: ran.read_text().count("x") > 4)
    grafx.clear_faults()
    mended.touch()
    eventually(lambda: not home.waiting())
    assert home.files() == sorted([f"{here}.png", f"{later}.png"])
    assert home.failed() == {}
    assert "rejected by" not in daemon.log()


# --- --check ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fault", "options", "said"),
    [
        # Without an order, a task that cannot exist.
        ("", "status-404", HTML, "404 Not Found: not in GraFx's own words"),
        ("", "html", {}, "200 OK: not in GraFx's own words"),
        ("", "redirect-away", {}, "redirects to"),
        ("", "status-500", {}, "500"),
        ("", "close", {}, "gave no answer"),
        # Else the last order.
        ("png", "", {}, ""),
        ("never", "", {}, ""),
        ("failed", "", {}, ""),
        ("png", "500-aspnet", {}, "Look at BASEURL and ENVIRONMENT"),
        ("png", "html", {}, "Look at BASEURL and ENVIRONMENT"),
        ("png", "status-404", {}, "Look at BASEURL and ENVIRONMENT"),
    ],
)
def test_check_polls_the_last_order_or_a_task_that_cannot_exist(
    home: Home, kind: str, fault: str, options: Any, said: str
) -> None:
    """And says what is wrong with the answer, where anything is."""
    last = home.grafx.add(kind) if kind else ""
    home.wait_for(*([unknown(), last] if kind else []))
    if fault:
        home.grafx.fault("task", fault, times=None, **options)
    ended = home.run("--check")
    (line,) = [line for line in ended.log().splitlines() if "GraFx:" in line]
    assert (ended.process.returncode, line[:6]) == ((1, "WRONG ") if said else (0, "ok    "))
    assert said in line
    assert last in line
    assert "ok    token:" in ended.log()
    assert not kind or [request.task_id for request in home.grafx.requests if request.what != "token"] == [
        last
    ]


def test_check_knows_a_wrong_environment_by_a_pending_order_only(home: Home) -> None:
    home.env["ENVIRONMENT"] = "cp-another-2"
    ended = home.run("--check")
    assert ended.process.returncode == 0
    assert re.search(
        "\nok    GraFx: .*only the first order shows whether ENVIRONMENT is right\n", ended.log()
    )
    home.wait_for(home.grafx.add())
    ended = home.run("--check")
    assert ended.process.returncode == 1
    assert re.search("\nWRONG GraFx: .* answered 404 .*\\. Look at BASEURL and ENVIRONMENT", ended.log())


def test_the_examples_own_address_is_named_as_such(home: Home) -> None:
    ended = home.run("--check", BASEURL="https://ENVIRONMENT.chili-publish.online")
    assert ended.process.returncode == 78
    assert "BASEURL is still the example's" in ended.log()
