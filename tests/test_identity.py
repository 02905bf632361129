"""The right file under the right name: whose answer it is, whether it is the file, and whose fault it is.

The real process against the sandbox. How each fault ends by itself is in test_faults.py.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import LATE, Home, Running, eventually
from sandbox import PAGE, Request, skipped

import chili

SHORT = "db.LOOK = poller.SHORTEST_PAUSE = 0.1"
HTML: dict[str, Any] = {"body": PAGE, "content_type": "text/html"}


def requests_of(home: Home, task_id: str | None = None, what: str = "task") -> list[Request]:
    return [r for r in list(home.grafx.requests) if r.what == what and task_id in (None, r.task_id)]


def delivered(home: Home, *tasks: str) -> None:
    """These files are here, each its own, and no others; nothing failed."""
    assert [name for name in home.files() if not name.startswith(".")] == sorted(
        f"{task}.png" for task in tasks
    )
    for task in tasks:
        assert (home.orders / f"{task}.png").read_bytes() == home.grafx.body(task), f"{task}: another's file"
    assert home.failed() == {}


@contextmanager
def daemon(
    home: Home, concurrency: int, *arguments: str, before: str = SHORT, **env: str
) -> Iterator[Running]:
    """A poller that ends with 0, without a traceback in its log, and leaves no partial download."""
    running = home.start(*arguments, before=before, CONCURRENCY=str(concurrency), **env)
    yield running
    assert running.stop() == 0, running.log()
    assert "Traceback" not in running.log(), running.log()
    assert not [name for name in home.files() if name.startswith(".")]


# --- whose answer is it? -------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "number"), [(102, 1), (103, 3)])
def test_an_interim_answer_is_retried_and_never_gives_a_wrong_file(
    home: Home, code: int, number: int
) -> None:
    """RFC 9110, section 15.2. The right answer comes behind it, and could be taken for another order's."""
    tasks = [home.grafx.add(questions=1) for _ in range(12)]
    for what, times in (("token", 2), ("task", 12), ("download", 6)):
        home.grafx.fault(what, "interim", times=times, code=code, number=number, pause=0.05)
    home.wait_for(*tasks)
    with daemon(home, 3) as running:
        eventually(lambda: not home.waiting())
    delivered(home, *tasks)
    assert len([request for request in home.grafx.requests if request.fault]) == 20
    assert "rejected" not in running.log()


@pytest.mark.parametrize("what", ["task", "download"])
def test_a_late_answer_is_nobodys(home: Home, what: str) -> None:
    """One thread polls one order after the other."""
    grafx = home.grafx
    other, tasks = grafx.add(), [grafx.add() for _ in range(4 * len(LATE))]
    for number, task in enumerate(tasks):  # the same kind in a row, and then the other kinds
        options = LATE[number // 2 % len(LATE)]
        grafx.fault(what, "late", task_id=task, **options | ({"task": other} if "task" in options else {}))
    home.wait_for(*tasks)
    with daemon(home, 1) as running:
        eventually(lambda: not home.waiting())
    delivered(home, *tasks)
    assert "rejected" not in running.log()
    assert len([request for request in grafx.requests if request.fault]) == len(tasks)


def test_a_late_token_is_nobodys(home: Home) -> None:
    grafx = home.grafx
    tasks, other = [], grafx.add()
    with daemon(home, 2, before=f"{SHORT}; chili.TOKEN_PAUSE = 0") as running:
        for options in LATE:
            grafx.revoke()
            grafx.fault("token", "late", **options | ({"task": other} if "task" in options else {}))
            new = [grafx.add(), grafx.add()]
            tasks += new
            home.wait_for(*new)
            eventually(lambda: not home.waiting())
    delivered(home, *tasks)
    assert "rejected" not in running.log()
    assert len([request for request in grafx.requests if request.fault]) == len(LATE)


def test_another_tasks_answer_is_retried_on_a_new_connection(home: Home) -> None:
    grafx = home.grafx
    tasks = [grafx.add() for _ in range(6)]
    for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True):
        grafx.fault("task", "other-task", task_id=task, task=other)
    home.wait_for(*tasks)
    with daemon(home, 1) as running:
        eventually(lambda: not home.waiting())
    delivered(home, *tasks)
    assert len(requests_of(home, what="download")) == len(tasks)
    assert "rejected" not in running.log()
    for request, following in zip(grafx.requests, grafx.requests[1:], strict=False):
        if request.fault:
            assert following.peer != request.peer


@pytest.mark.parametrize("about", ["upper case", None, 7, [], "left out"])
def test_an_answer_that_names_no_other_task_is_its_own(home: Home, about: Any) -> None:
    task = home.grafx.add(task_id="84ad7436-f82f-4e87-8cd3-37299e37878c")
    links = {"download": f"{home.grafx.root}/tasks/{task}/download"}
    data = {} if about == "left out" else {"taskId": task.upper() if about == "upper case" else about}
    home.grafx.fault("task", "other-json", value={"data": data, "links": links})
    home.wait_for(task)
    with daemon(home, 1):
        eventually(lambda: not home.waiting())
    delivered(home, task)
    assert len(requests_of(home)) == 1


# --- is it the file? -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["gzip-far", "gzip-padded"])
def test_gzip_that_was_not_accepted_is_decoded_whole_and_blocks_no_thread(home: Home, fault: str) -> None:
    filler = skipped("png", bytes(200_000))  # so well packed that it is unpacked in several steps
    tasks = []
    for _ in range(8):
        whole = home.grafx.body(home.grafx.add())
        tasks.append(home.grafx.add(body=whole[:-12] + filler + whole[-12:]))
    home.grafx.fault("download", fault, times=8)
    home.wait_for(*tasks)
    with daemon(home, 8) as running:
        eventually(lambda: not home.waiting())
        after = [home.grafx.add() for _ in range(8)]  # one for each thread
        home.wait_for(*after)
        eventually(lambda: not home.waiting())
    delivered(home, *tasks, *after)
    assert len(requests_of(home, what="download")) == 16
    assert "WARNING" not in running.log()


def test_what_is_no_file_of_grafx_is_never_delivered(home: Home) -> None:
    """What is none of the six formats is rejected; an unknown coding is retried."""
    texts = [b"Service temporarily unavailable", b"\xef\xbb\xbf" + PAGE, b" " * 16 + PAGE, b"\0\1\2 new"]
    rejected, later = [home.grafx.add() for _ in texts], [home.grafx.add() for _ in range(3)]
    for task, text in zip(rejected, texts, strict=True):
        home.grafx.fault("download", "octet", times=None, task_id=task, body=text)
    for task, coding in zip(later, ("deflate", "br", "gzip, br"), strict=True):
        home.grafx.fault("download", "coding", times=None, task_id=task, value=coding)
    beside = home.grafx.add(questions=2)
    home.wait_for(*rejected, *later, beside)
    with daemon(home, 2):
        eventually(lambda: all(len(requests_of(home, task, "download")) > 4 for task in rejected + later))
        eventually(lambda: beside not in home.waiting())
        delivered(home, beside)
        assert set(home.waiting()) == {*rejected, *later}
        eventually(lambda: set(home.read().get("failing", {})) == set(rejected))
        home.grafx.clear_faults()
        eventually(lambda: not home.waiting())
    delivered(home, *rejected, *later, beside)
    assert not home.read().get("failing")


def test_a_content_type_is_sanitized_before_it_is_logged(home: Home) -> None:
    secret = home.grafx.client_secret
    task = home.grafx.add()
    said = f"image/\x1b[31m{secret}\x07" + "x" * 5000
    home.grafx.fault("download", "wrong-type", times=None, task_id=task, type=said)
    home.wait_for(task)
    with daemon(home, 1) as running:
        record = eventually(lambda: home.read().get("failing", {}).get(task))
        running.says("the file says image/")
    assert record["error"].startswith("the file says image/")
    assert record["error"].isprintable()
    assert len(record["error"]) < 600
    for text in (running.log(), home.database.read_text()):
        assert secret not in text
        assert not re.search(r"[\x07\x1b]|x{1000}", text)


# --- whose fault? --------------------------------------------------------------------------------


@pytest.mark.parametrize("healthy", [20, 0])
def test_tasks_that_always_answer_401_delay_no_other_and_never_fail(home: Home, healthy: int) -> None:
    """A 401 renews the token once a minute at most; each further one is retried for its order alone."""
    good = [home.grafx.add(questions=2) for _ in range(healthy)]
    bad = [home.grafx.add() for _ in range(5)]
    for task in bad:
        home.grafx.fault("task", "status-401", times=None, task_id=task)
    home.wait_for(*good, *bad)
    began = time.monotonic()
    with daemon(home, 2, GIVE_UP_AFTER="0") as running:
        eventually(lambda: set(home.waiting()) == set(bad))
        delivered(home, *good)
        eventually(lambda: all(len(requests_of(home, task)) > 8 for task in bad))
        tokens, minutes = len(requests_of(home, what="token")), (time.monotonic() - began) / 60
        assert 2 <= tokens <= 2 + minutes  # the first one, and one a minute
        running.says("cannot be polled: GraFx answered 401 Unauthorized; retrying in")
        assert set(home.waiting()) == set(bad)
        assert not home.read().get("failing")
        home.grafx.clear_faults()
        eventually(lambda: not home.waiting())
    delivered(home, *good, *bad)
    assert not re.search("paused|rejected", running.log())


def test_a_401_for_all_is_not_the_orders(home: Home) -> None:
    tasks = [home.grafx.add(questions=1) for _ in range(5)]
    home.wait_for(*tasks)
    home.grafx.fault("task", "status-401", times=40)
    with daemon(home, 2, POLL_INTERVAL="0.2", GIVE_UP_AFTER="0") as running:
        eventually(lambda: not home.waiting())
    delivered(home, *tasks)
    assert not re.search("paused|rejected", running.log())


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_gateways_page_at_the_token_endpoint_is_retried(home: Home, status: int) -> None:
    """Only the endpoint's own words (RFC 6749: JSON with `error`) speak of the credentials."""
    task = home.grafx.add()
    home.wait_for(task)
    home.grafx.fault("token", f"status-{status}", times=3, **HTML)
    ended = home.run("--once", before=SHORT)
    assert ended.process.returncode == 1, ended.log()
    with daemon(home, 1) as running:
        eventually(lambda: not home.waiting())
    delivered(home, task)
    assert "rejects SERVER_ID" not in running.log()

    home.grafx.refuse_credentials = True
    home.wait_for(home.grafx.add())
    ended = home.run(before=SHORT)
    assert ended.process.returncode == 78
    assert "rejects SERVER_ID and SERVER_SECRET" in ended.log()


def test_credentials_that_are_rejected_later_are_retried(home: Home) -> None:
    first, second = home.grafx.add(), home.grafx.add()
    home.wait_for(first)
    with daemon(home, 1) as running:
        eventually(lambda: not home.waiting())
        home.grafx.refuse_credentials = True
        home.grafx.revoke()
        home.wait_for(second)
        running.says("rejects SERVER_ID and SERVER_SECRET")
        eventually(lambda: len(requests_of(home, what="token")) > 3)
        assert running.process.poll() is None
        home.grafx.refuse_credentials = False
        eventually(lambda: not home.waiting())
    delivered(home, first, second)


def test_a_folder_in_a_files_place_delays_only_its_order(home: Home) -> None:
    blocked, others = home.grafx.add(), [home.grafx.add(questions=1) for _ in range(5)]
    place = home.orders / f"{blocked}.png"
    place.mkdir()
    (place / "mine").touch()
    home.wait_for(blocked, *others)
    with daemon(home, 1) as running:
        eventually(lambda: list(home.waiting()) == [blocked])
        eventually(lambda: len(requests_of(home, blocked)) > 3)
        assert str(place) in running.log()
        assert "paused" not in running.log()
        (place / "mine").unlink()
        place.rmdir()
        eventually(lambda: not home.waiting())
    delivered(home, blocked, *others)


def closed_port() -> int:
    """One on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_who_cannot_be_reached_is_named(home: Home) -> None:
    """GraFx, the token server, or the proxy in between, without its password."""
    port = closed_port()
    nobody = f"http://127.0.0.1:{port}"
    home.wait_for(home.grafx.add())
    for env, says, never in (
        ({"BASEURL": nobody}, "GraFx is unreachable", "token server|proxy"),
        ({"TOKEN_URL": f"{nobody}/oauth"}, "the token server is unreachable", "GraFx is un|GraFx un|proxy"),
        (
            {"HTTP_PROXY": f"http://me:hidden@127.0.0.1:{port}", "NO_PROXY": ""},
            rf"proxy 127\.0\.0\.1:{port} is unreachable", "hidden|me:|GraFx is un|GraFx un|server is un",
        ),
    ):  # fmt: skip
        with daemon(home, 1, **env) as running:
            running.says(f"paused: .*{says}")
        assert not re.search(never, running.log()), running.log()
    assert len(home.waiting()) == 1


def test_the_log_says_after_how_much_of_a_file_the_answer_broke_off(home: Home) -> None:
    task = home.grafx.add(size=6_000_000)
    home.grafx.fault("download", "close", task_id=task, at=2_000_000)
    home.wait_for(task)
    with daemon(home, 1) as running:
        running.says(rf"{task} cannot be polled: the answer broke off after 2\.0 MB of 6\.0 MB; retrying in")
        eventually(lambda: not home.waiting())
    delivered(home, task)


def test_an_outage_is_over_with_the_first_good_answer(home: Home) -> None:
    """Not when the last order that met it has been polled again."""
    grafx = home.grafx
    first, a, b = grafx.add(), grafx.add(), grafx.add()
    home.wait_for(first)
    with daemon(home, 2, before=f"{SHORT}; chili.TIMEOUT = (30, 600)") as running:
        eventually(lambda: not home.waiting())
        fault = grafx.fault("token", "status-503", times=None)
        grafx.fault("task", "status-401", task_id=b)  # so that it meets the outage first
        grafx.fault("task", "hang", task_id=b, times=None)  # beyond the end of the test
        grafx.revoke()
        home.wait_for(a, b)
        running.says("paused: no token: ")
        eventually(lambda: len(requests_of(home, what="token")) > 4)
        assert "resumed" not in running.log()
        grafx.end_fault(fault)
        running.says("resumed after")
        eventually(lambda: list(home.waiting()) == [b])
        grafx.clear_faults()
        assert running.log().count("paused: ") == 1
    delivered(home, first, a)


def test_a_poll_from_before_an_outage_does_not_end_it(home: Home) -> None:
    """A slow 204, on its way when the token could not be had any more."""
    grafx = home.grafx
    slow, other = grafx.add("never"), grafx.add("never")
    home.wait_for(slow)
    with daemon(home, 2, "-v", POLL_INTERVAL="30") as running:
        eventually(lambda: requests_of(home, slow))
        delay = grafx.fault("task", "delay", task_id=slow, seconds=3)
        eventually(lambda: delay.times == 0)
        grafx.fault("token", "status-503", times=None)
        grafx.revoke()
        home.wait_for(slow, other)
        running.says("paused: no token: ")
        eventually(lambda: running.log().count(f"{slow}: 204") == 2)
        time.sleep(1)  # by now the loop has handled it
        assert "resumed" not in running.log()


def test_in_an_outage_the_status_says_when_the_next_try_is(home: Home, tmp_path: Path) -> None:
    place = tmp_path / "notify"
    home.grafx.fault("token", "status-503", times=None)
    home.wait_for(home.grafx.add())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(place))
        listener.settimeout(30)
        before = "db.LOOK = 0.1; poller.SHORTEST_PAUSE = 30"
        with daemon(home, 1, before=before, NOTIFY_SOCKET=str(place), POLL_INTERVAL="60"):
            said, deadline = "", time.monotonic() + 30
            while not re.search(r"STATUS=retrying in \d+ s: paused: no token: ", said):
                assert time.monotonic() < deadline, said
                said = listener.recv(65536).decode()


def test_secrets_are_replaced_while_others_are_added() -> None:
    """By many threads at once; a failure of one of them would be an order's "unexpected error"."""
    problems: list[Exception] = []
    over = threading.Event()

    def add() -> None:
        number = 0
        while not over.is_set():
            number += 1
            chili._secrets.append(f"secret-{number}-{'x' * 40}")

    def look() -> None:
        try:
            for _ in range(30_000):
                chili.sanitize("Service temporarily unavailable")
        except Exception as error:  # noqa: BLE001 - whatever it is
            problems.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    before = list(chili._secrets)
    try:
        adder = threading.Thread(target=add)
        lookers = [threading.Thread(target=look) for _ in range(3)]
        for thread in (adder, *lookers):
            thread.start()
        for thread in lookers:
            thread.join()
        over.set()
        adder.join()
    finally:
        sys.setswitchinterval(interval)
        chili._secrets.clear()
        chili._secrets.extend(before)
    assert not problems
