"""chili.order_done against a GraFx environment: the token, the poll, the download."""

from __future__ import annotations

import email.utils
import errno
import gzip
import json
import os
import re
import resource
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import LATE, Home, Relay, Wire, eventually
from sandbox import PAGE, TYPES, Answer, Request, Sandbox

import chili

TOO_LONG = 10**13  # bytes: nobody reads so many in a test


class Client:
    """One environment of GraFx and an orders folder; a call polls a task and downloads its file."""

    def __init__(self, grafx: Sandbox, folder: Path) -> None:
        self.grafx, self.folder = grafx, folder
        self.folder.mkdir()
        self.at(grafx.base_url)

    def at(self, base_url: str) -> None:
        """Poll there from now on, with new connections, a new token, and the proxies in os.environ now."""
        grafx = self.grafx
        chili._proxies_and_certificates.cache_clear()
        self.environment = chili.GraFx(
            base_url, grafx.environment, grafx.token_url, grafx.client_id, grafx.client_secret, 8
        )

    def __call__(self, task_id: str, **more: Any) -> Path | None:
        return chili.order_done(task_id, self.environment, self.folder, **more)

    def delivers(self, task_id: str) -> bool:
        """Whether a poll ends with the whole file, and with nothing else in its place."""
        file = self(task_id)
        assert file
        return file.parent == self.folder and file.read_bytes() == self.grafx.body(task_id)

    def fails(self, task_id: str) -> chili.TaskRejected | chili.TryAgainLater:
        """The exception that a poll ends with, after which the folder is empty."""
        with pytest.raises((chili.TaskRejected, chili.TryAgainLater)) as raised:
            self(task_id)
        assert self.files() == []
        text = f"{raised.value} {raised.value!r}"
        assert "\n" not in text
        assert not [
            secret for secret in (*self.grafx.tokens, self.grafx.client_secret) if secret[:40] in text
        ]
        return raised.value

    def retried(self, *tasks: str) -> list[chili.TaskRejected | chili.TryAgainLater]:
        """Poll one after the other until all are delivered; the exceptions on the way."""
        errors: list[chili.TaskRejected | chili.TryAgainLater] = []
        for task in tasks:
            while True:
                try:
                    if self(task):
                        break
                except (chili.TaskRejected, chili.TryAgainLater) as error:
                    errors.append(error)
                    assert len(errors) < 10 * len(tasks)
        assert self.files() == sorted(f"{task}.png" for task in tasks)
        for task in tasks:
            assert (self.folder / f"{task}.png").read_bytes() == self.grafx.body(task), "another task's file"
        return errors

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def requests(self, what: str) -> list[Request]:
        return [request for request in self.grafx.requests if request.what == what]


@pytest.fixture(autouse=True)
def proxies_of_this_test() -> Iterator[None]:
    """`chili` looks up proxies and certificates once in a process."""
    chili._proxies_and_certificates.cache_clear()
    yield
    chili._proxies_and_certificates.cache_clear()


@pytest.fixture(scope="module")
def server() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def poll(server: Sandbox, tmp_path: Path) -> Client:
    server.clear_faults()
    server.revoke()
    server.requests.clear()
    server.tokens.clear()
    server.stubborn = server.refuse_credentials = False
    return Client(server, tmp_path / "orders")


# --- the poll and the file -------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_a_finished_task_is_delivered_byte_for_byte(poll: Client, kind: str) -> None:
    task = poll.grafx.add(kind, size=100_000 if kind == "gif" else 300_000, questions=2)
    assert [poll(task), poll(task), poll.files()] == [None, None, []]
    seen: list[tuple[int, int | None]] = []
    assert poll(task, progress=lambda *sizes: seen.append(sizes)) == poll.folder / f"{task}.{kind}"
    assert poll.files() == [f"{task}.{kind}"]
    whole = poll.grafx.body(task)
    assert (poll.folder / poll.files()[0]).read_bytes() == whole
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1] == (len(whole), len(whole))
    assert [request.status for request in poll.requests("task")] == [204, 204, 200]
    assert all(
        r.headers["Authorization"] == f"Bearer {poll.grafx.tokens[0]}" for r in poll.grafx.requests[1:]
    )


@pytest.mark.parametrize(
    ("task", "fault", "extension"),
    [
        *(({"kind": kind}, ("octet", {}), kind) for kind in TYPES),
        ({}, ("wrong-type", {"type": ""}), "png"),
        ({}, ("wrong-type", {"type": "Image/PNG; q=1"}), "png"),
        ({"kind": "jpg"}, ("wrong-type", {"type": "image/jpg"}), "jpg"),
        ({"kind": "zip"}, ("wrong-type", {"type": "application/x-zip-compressed"}), "zip"),
        ({"body": b"PK\5\6" + bytes(18), "content_type": "application/zip"}, None, "zip"),
        ({"size": 200_000}, ("chunked", {}), "png"),
        ({"size": 200_000}, ("gzip", {}), "png"),
    ],
)
def test_the_extension_is_what_came(poll: Client, task: Any, fault: Any, extension: str) -> None:
    task_id = poll.grafx.add(**task)
    if fault:
        poll.grafx.fault("download", fault[0], task_id=task_id, times=None, **fault[1])
    assert poll(task_id)
    assert poll.files() == [f"{task_id}.{extension}"]
    assert (poll.folder / poll.files()[0]).read_bytes() == poll.grafx.body(task_id)


REJECTED, LATER = chili.TaskRejected, chili.TryAgainLater


@pytest.mark.parametrize(
    ("task", "fault", "kind"),
    [
        ({}, ("wrong-type", {}), REJECTED),
        ({}, ("wrong-type", {"type": "text/html"}), REJECTED),
        ({}, ("wrong-type", {"type": "image/webp"}), REJECTED),
        ({"kind": "pdf"}, ("wrong-type", {"type": "image/png"}), REJECTED),
        ({"body": b"%PDX-1.4", "content_type": "application/pdf"}, None, REJECTED),
        ({"body": b"\n<html>Error</html>"}, ("octet", {}), REJECTED),
        ({"body": b' {"error": "x"}'}, ("octet", {}), REJECTED),
        ({}, ("html", {}), REJECTED),
        ({}, ("other-json", {}), REJECTED),
        ({}, ("empty", {}), REJECTED),
        ({"body": b""}, ("octet", {}), REJECTED),
        ({}, ("cut", {}), REJECTED),
        ({"size": 300_000}, ("cut", {}), REJECTED),
        ({}, ("length-short", {}), REJECTED),
        *(
            ({"kind": kind, "size": 300_000}, fault, LATER)
            for kind in ("png", "jpg")
            for fault in (
                ("length-long", {}),
                ("reset", {"at": 100_000}),
                ("close", {"at": 100_000}),
                ("close", {"at": 0}),
                ("chunked-cut", {}),
                ("close-end", {}),
                ("gzip-cut", {}),
            )
        ),
    ],
)
def test_what_is_not_the_whole_file_is_never_delivered(
    poll: Client, task: Any, fault: Any, kind: Any
) -> None:
    task_id = poll.grafx.add(**task)
    if fault:
        poll.grafx.fault("download", fault[0], task_id=task_id, **fault[1])
    error = poll.fails(task_id)
    assert isinstance(error, kind)
    if isinstance(error, REJECTED):
        assert error.status == 200
        assert not error.final
    if "body" not in task:
        assert poll(task_id)  # a passing fault
        assert (poll.folder / poll.files()[0]).read_bytes() == poll.grafx.body(task_id)


@pytest.mark.parametrize("extension", TYPES)
def test_a_file_that_is_there_is_found_without_a_poll(
    poll: Client, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    """A process may have been killed between the rename and the fsync of the folder."""
    file = poll.folder / f"task.{extension}"
    file.write_bytes(b"here")
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    assert chili.find_file(poll.folder, "task") == poll("task") == file
    assert synced == [True]
    assert poll.grafx.requests == []
    assert chili.find_file(poll.folder, "other") is None
    file.rename(poll.folder / "other")
    file.mkdir()
    assert chili.find_file(poll.folder, "task") is None


def test_the_file_is_durable_before_it_has_its_name_and_the_name_before_it_is_delivered(
    poll: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = poll.grafx.add()
    real, steps = os.fsync, []

    def fsync(fd: Any) -> None:
        real(fd)
        found = os.fstat(fd if isinstance(fd, int) else fd.fileno())
        steps.append((stat.S_ISDIR(found.st_mode) or found.st_size, f"{task}.png" in poll.files()))
        assert all(name.startswith(".") or name == f"{task}.png" for name in poll.files())

    monkeypatch.setattr(os, "fsync", fsync)
    assert poll(task)
    assert steps == [(len(poll.grafx.body(task)), False), (True, True)]


def test_leftovers_are_removed_and_nothing_else(poll: Client) -> None:
    task = poll.grafx.add(size=500_000)
    names = ["84ad7436.png", ".keep", "notes.txt"]
    for name in names:
        (poll.folder / name).touch()
    half: set[str] = set()
    assert poll(task, progress=lambda *_: half.update(set(poll.files()) - set(names)))
    assert half
    for name in half:  # as a killed process leaves it
        assert name.startswith(".")
        (poll.folder / name).write_bytes(b"half")
    chili.remove_leftovers(poll.folder)
    assert poll.files() == sorted([*names, f"{task}.png"])


def test_a_full_disk_is_the_callers_to_handle(poll: Client) -> None:
    task = poll.grafx.add(size=500_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            poll(task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert poll.files() == []
    assert poll.delivers(task)


@pytest.mark.parametrize("place", ["missing", "a file"])
def test_a_folder_that_cannot_be_written_is_the_callers_to_handle(poll: Client, place: str) -> None:
    task = poll.grafx.add()
    poll.folder.rmdir()
    if place == "a file":
        poll.folder.touch()
    with pytest.raises(OSError) as raised:
        poll(task)
    assert raised.value.errno == (errno.ENOTDIR if place == "a file" else errno.ENOENT)
    poll.folder.unlink(missing_ok=True)
    poll.folder.mkdir()
    assert poll.delivers(task)


def test_a_folder_in_a_files_place_is_retried(poll: Client) -> None:
    task = poll.grafx.add()
    (poll.folder / f"{task}.png").mkdir()
    with pytest.raises(LATER, match=r"\.png is a folder, .*: move it away") as raised:
        poll(task)
    assert not raised.value.shared
    assert poll.files() == [f"{task}.png"]
    (poll.folder / f"{task}.png").rmdir()
    assert poll.delivers(task)


# --- what GraFx may answer instead -----------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "fault", "options", "status"),
    [
        *(
            (what, f"status-{status}", {}, status)
            for what in ("task", "download")
            for status in (500, 404, 403, 400)
        ),
        ("task", "status-410", {}, 410),
        ("task", "no-link", {}, 200),
        *(
            ("task", "bad-link", {"link": link}, 200)
            for link in ("not a link", "", None, 5, {}, "ftp://127.0.0.1/x", "file:///etc/passwd", "/x", "http://",
                         "http://[::1", "http://127.0.0.1:port/", "http://127.0.0.1:99999/", "http://a b/")
        ),
        *(
            ("task", "other-json", {"value": value}, 200)
            for value in ([], None, 5, {"links": []}, {"links": None})
        ),
        ("task", "html", {}, 200),
        ("task", "empty", {}, 200),
        ("task", "cut-json", {}, 200),
        ("task", "huge", {"size": TOO_LONG}, 200),
    ],
)  # fmt: skip
def test_answers_that_reject_the_task(poll: Client, what: str, fault: str, options: Any, status: int) -> None:
    task = poll.grafx.add()
    poll.grafx.fault(what, fault, **options)
    error = poll.fails(task)
    assert isinstance(error, REJECTED)
    assert (error.status, error.final) == (status, False)
    assert poll(task)


@pytest.mark.parametrize("what", ["task", "download"])
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        *((f"status-{status}", {}) for status in (408, 425, 429, 502, 503, 504, 507)),
        ("status-503", {"body": b"<html>", "content_type": "text/html"}),
        ("500-plain", {}),
        ("500-empty", {}),
        *(("coding", {"value": value}) for value in ("deflate", "br", "zstd", "gzip, gzip")),
        ("status-502", {"body": b"", "content_type": "text/plain"}),
        ("reset", {}),
        ("close", {}),
        ("redirect-loop", {}),
    ],
)
def test_answers_that_are_retried(poll: Client, what: str, fault: str, options: Any) -> None:
    task = poll.grafx.add()
    poll.grafx.fault(what, fault, times=None, **options)
    assert isinstance(poll.fails(task), LATER)
    assert len(poll.requests(what)) < 20
    poll.grafx.clear_faults()
    assert poll(task)


@pytest.mark.parametrize("status", [202, 204])
@pytest.mark.parametrize("body", [b"", b"{}", b'{"data": {"status": "pending"}}', PAGE])
def test_a_202_means_the_same_as_a_204(poll: Client, status: int, body: bytes) -> None:
    """CHILI's example startPollingOnEndpoint.ts takes a 202 for "not finished"."""
    task = poll.grafx.add()
    if status == 202:
        poll.grafx.fault("task", "status-202", times=2, body=body)
    else:
        poll.grafx._tasks[task].questions = 2
    assert [poll(task), poll(task)] == [None, None]
    assert poll.delivers(task)
    assert [request.status for request in poll.requests("task")] == [status, status, 200]
    assert len({request.peer for request in poll.requests("task")}) == 1


@pytest.mark.parametrize("status", [202, 204])
def test_a_download_that_is_not_ready_is_retried(poll: Client, status: int) -> None:
    task = poll.grafx.add()
    poll.grafx.fault("download", f"status-{status}")
    error = poll.fails(task)
    assert isinstance(error, LATER)
    assert not isinstance(error, chili.CredentialsRejected)
    assert not error.shared
    assert poll.delivers(task)


def test_silence_is_retried(poll: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chili, "TIMEOUT", (0.3, 0.3))
    task = poll.grafx.add(size=300_000)
    for what, fault, options in (
        ("task", "hang", {}),
        ("download", "hang", {}),
        ("download", "slow", {"rate": 1}),
        ("token", "hang", {}),
    ):
        if what == "token":
            poll.grafx.revoke()
        poll.grafx.fault(what, fault, **options)
        assert isinstance(poll.fails(task), LATER)
    assert poll(task)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://grafx.invalid", "https"])
def test_an_unreachable_server_is_retried(
    poll: Client, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chili, "TIMEOUT", (0.5, 0.5))
    poll.at(poll.grafx.base_url.replace("http", "https") if address == "https" else address)
    assert isinstance(poll.fails("task"), LATER)


def test_410_at_the_download_is_final_at_once(poll: Client) -> None:
    error = poll.fails(poll.grafx.add("expired"))
    assert isinstance(error, REJECTED)
    assert (error.status, error.final) == (410, True)
    assert "no longer available: GraFx keeps a file for 4 hours" in str(error)


def test_a_rejection_says_in_one_line_what_grafx_said(poll: Client) -> None:
    error = poll.fails(poll.grafx.add("failed"))
    assert "Invalid list variable value" in str(error)
    assert "Variable 'Size' has no item 'XXL'." in str(error)
    assert "Render()" not in str(error)  # the trace
    detail = '{"title": "Line 1\\nLine 2\\u001b[31m\\u2028", "detail": "%s"}' % ("long " * 9999)
    task = poll.grafx.add()
    poll.grafx.fault("task", "status-500", body=detail.encode())
    error = poll.fails(task)
    assert str(error).startswith("Line 1 Line 2")
    assert str(error).isprintable()
    assert len(str(error)) < 2000


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("99999", 300, 300),
        ("9" * 400, 300, 300),
        ("in 100 s", 90, 100),
        ("in 9999 s", 300, 300),
        ("in -100 s", 0, 0),
        *((value, None, None) for value in ("soon", "", "-5", "\xb2", "1 2", "Wed, 99 Foo 2026", "nan")),
    ],
)
@pytest.mark.parametrize("what", ["token", "task", "download"])
def test_retry_after_is_understood(poll: Client, what: str, value: str, least: Any, most: Any) -> None:
    task = poll.grafx.add()
    if value.startswith("in "):
        value = email.utils.formatdate(time.time() + int(value.split()[1]), usegmt=True)
    poll.grafx.fault(what, "status-429", retry_after=value)
    error = poll.fails(task)
    assert isinstance(error, LATER)
    if least is None:
        assert error.retry_after is None
    else:
        assert error.retry_after is not None
        assert least - 1 <= error.retry_after <= most


# --- the token -------------------------------------------------------------------------------


def test_one_token_is_shared_by_all_requests(poll: Client) -> None:
    tasks = [poll.grafx.add() for _ in range(100)]
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(poll, tasks))
        assert len(poll.requests("token")) == 1
        poll.grafx.revoke()  # all notice it, and one fetches a new one
        assert all(threads.map(poll, [poll.grafx.add() for _ in range(20)]))
    assert len(poll.requests("token")) == 2
    assert len(poll.requests("task")) <= 120 + 8
    # Kept alive, but for those that were answered 401.
    assert len({request.peer for request in poll.requests("task")}) <= 8 + 8
    assert len(poll.files()) == 120


def test_it_is_renewed_before_its_end(grafx: Sandbox, tmp_path: Path) -> None:
    grafx.expires_in = 2
    poll = Client(grafx, tmp_path / "orders")
    task = grafx.add("never")
    poll(task)
    poll(task)
    assert len(poll.requests("token")) == 1
    time.sleep(1.2)
    poll(task)
    assert len(poll.requests("token")) == 2
    assert {request.status for request in poll.requests("task")} == {204}
    assert 120 <= chili.TOKEN_MARGIN <= 600  # where it lasts longer


@pytest.mark.parametrize(("pause", "retry_after"), [(0.0, "300"), (60.0, "0")])
def test_a_renewal_that_fails_holds_up_nobody_while_the_old_token_is_good(
    poll: Client, monkeypatch: pytest.MonkeyPatch, pause: float, retry_after: str
) -> None:
    task = poll.grafx.add("never")
    assert poll(task) is None
    poll.environment.token._renew = 0.0
    poll.grafx.fault("token", "status-429", times=None, retry_after=retry_after)
    monkeypatch.setattr(chili, "TOKEN_PAUSE", pause)  # the longer of the two counts
    assert [poll(task), poll(task)] == [None, None]
    assert [request.status for request in poll.requests("token")] == [200, 429]
    assert {request.status for request in poll.requests("task")} == {204}


def test_a_401_fetches_a_new_one_and_repeats_the_request(poll: Client) -> None:
    """The endpoint caches, so the new one may be the old one."""
    poll.grafx.fault("task", "status-401")
    assert poll(poll.grafx.add())
    assert [request.status for request in poll.requests("task")] == [401, 200]
    assert [len(poll.requests("token")), len(poll.grafx.tokens)] == [2, 1]


@pytest.mark.parametrize("what", ["task", "download"])
@pytest.mark.parametrize("stubborn", [False, True], ids=["a new token", "the same token again"])
def test_a_401_renews_the_token_at_most_once_a_minute(
    poll: Client, monkeypatch: pytest.MonkeyPatch, what: str, stubborn: bool
) -> None:
    assert poll(poll.grafx.add("never")) is None
    poll.grafx.stubborn = stubborn
    bad = [poll.grafx.add() for _ in range(10)]
    poll.grafx.fault(what, "status-401", times=None, task_id=bad)
    errors = [poll.fails(task) for task in bad]
    assert all(isinstance(error, LATER) and "401 Unauthorized" in str(error) for error in errors)
    assert len(poll.requests("token")) == 2
    assert len([request for request in poll.requests(what) if request.status == 401]) == 11
    for task in (poll.grafx.add(), poll.grafx.add()):  # nobody else is held up
        assert poll.delivers(task)
        (poll.folder / f"{task}.png").unlink()
    assert len(poll.requests("token")) == 2
    monkeypatch.setattr(chili, "TOKEN_PAUSE", 0.0)  # a minute is over
    assert isinstance(poll.fails(bad[0]), LATER)
    assert len(poll.requests("token")) == 3
    poll.grafx.clear_faults()
    assert poll.delivers(bad[0])


def test_threads_that_are_answered_401_together_all_repeat_their_request(poll: Client) -> None:
    rounds = 10
    with ThreadPoolExecutor(8) as threads:
        for _ in range(rounds):
            poll.environment.token._replaced = -float("inf")  # a minute is over
            poll.grafx.revoke()
            assert all(threads.map(poll, [poll.grafx.add() for _ in range(8)]))
    assert len(poll.requests("token")) == rounds


def test_a_401_of_another_server_renews_nothing_and_is_not_repeated(
    poll: Client, wire: Callable[..., Wire]
) -> None:
    elsewhere = wire(lambda *_: b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
    error = poll.fails(poll.grafx.add(link=f"{elsewhere.url}/file"))
    assert isinstance(error, LATER)
    assert not error.shared
    assert elsewhere.asked == ["GET /file HTTP/1.1"]
    assert len(poll.requests("token")) == 1


def test_who_waits_for_the_token_says_why(
    grafx: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that trickles holds its thread, which holds the token's lock."""
    monkeypatch.setattr(chili, "TIMEOUT", (0.2, 0.2))
    poll = Client(grafx, tmp_path / "orders")
    grafx.fault("token", "trickle", pace=0.02)

    def hold() -> None:
        with suppress(LATER):  # when the sandbox stops
            poll("held")

    threading.Thread(target=hold, daemon=True).start()
    eventually(lambda: poll.requests("token"))
    error = poll.fails("task")
    assert isinstance(error, LATER)
    assert error.shared
    assert f"no token: {grafx.token_url} has not answered yet" in str(error)
    assert len(poll.requests("token")) == 1


def test_rejected_credentials_have_an_exception_of_their_own(poll: Client) -> None:
    poll.grafx.refuse_credentials = True
    error = poll.fails(poll.grafx.add())
    assert isinstance(error, chili.CredentialsRejected)
    assert error.shared
    assert "Unauthorized" in str(error)


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        *((f"status-{status}", {}) for status in (404, 429, 500, 503)),
        *((f"status-{status}", {"body": PAGE, "content_type": "text/html"}) for status in (400, 401, 403)),
        *((name, {}) for name in ("cut-json", "html", "empty", "reset", "redirect-away", "echo-token")),
        *(  # a gateway's words, or a passing error of RFC 6749 (section 5.2) and RFC 8628
            (f"status-{status}", {"body": json.dumps({"error": word}).encode()})
            for status, word in (
                (403, "Forbidden"),
                (400, "temporarily_unavailable"),
                (400, "server_error"),
                (401, "slow_down"),
                (403, "Rate limit reached"),
                (403, ["access_denied"]),
            )
        ),
        ("huge", {"size": TOO_LONG}),
        *(
            ("other-json", {"value": value})
            for value in ([], {}, *({"access_token": token} for token in ("", None, [], "two\nlines", "é")))
        ),
    ],
)
def test_no_token_is_retried(poll: Client, fault: str, options: Any) -> None:
    task = poll.grafx.add()
    poll.grafx.fault("token", fault, **options)
    error = poll.fails(task)
    assert isinstance(error, LATER)
    assert error.shared
    assert not isinstance(error, chili.CredentialsRejected)
    assert "lines" not in str(error)
    for request in poll.requests("elsewhere"):
        assert poll.grafx.client_secret.encode() not in request.body
    assert poll(task)


@pytest.mark.parametrize("lasts", [None, "soon", -1, 0, 1e400, [], True])
def test_a_token_that_does_not_say_how_long_it_lasts_serves(poll: Client, lasts: Any) -> None:
    task = poll.grafx.add("never")
    assert not poll(task)
    value = {"access_token": poll.grafx.tokens[0], "expires_in": lasts}
    poll.grafx.fault("token", "other-json", value=value)
    other = Client(poll.grafx, poll.folder / "other")
    other(task)
    other(task)
    assert len(poll.requests("token")) == 2


def test_it_is_never_shown(poll: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "chili")
    poll.grafx.fault("task", "echo-token")
    task = poll.grafx.add()
    error = poll.fails(task)
    assert "Could not process the request with Bearer" in str(error)
    assert poll(task)
    assert "/output/tasks/" in caplog.text
    (secret,) = poll.grafx.tokens
    shown = (
        caplog.text,
        repr(poll.environment),
        repr(poll.environment.token),
        str(os.environ),
        repr(error.__cause__),
    )
    assert not [text for text in shown if secret[:40] in text]


def hosts(grafx: Sandbox) -> tuple[str, str]:
    return grafx.base_url.removeprefix("http://"), grafx.elsewhere.removeprefix("http://")


@pytest.mark.parametrize(
    ("link", "followed"),
    [
        ("http://{elsewhere}/file/{task}", True),
        ("HTTP://{elsewhere}/file/{task}?signature=s", True),
        ("http://{home}@{elsewhere}/file/{task}", None),
        ("http://{elsewhere}\\@{home}/file/{task}", None),
        ("http://{home}\\@{elsewhere}/file/{task}", None),
        ("http://{elsewhere}#@{home}/file/{task}", None),
        ("http://{home}:80@{elsewhere}/file/{task}", None),
        ("http://{elsewhere}%2f@{home}/file/{task}", None),
        ("http://{elsewhere}\t@{home}/file/{task}", None),
    ],
)
def test_a_link_elsewhere_is_followed_without_it(poll: Client, link: str, followed: bool | None) -> None:
    task = "84ad7436-f82f-4e87-8cd3-37299e37878c"
    home, elsewhere = hosts(poll.grafx)
    poll.grafx.add(task_id=task, link=link.format(home=home, elsewhere=elsewhere, task=task))
    if followed:
        assert poll(task)
        assert len(poll.requests("elsewhere")) == 1
    else:  # what it means is anybody's guess
        with suppress(REJECTED, LATER):
            poll(task)
    for request in poll.requests("elsewhere"):
        assert "Bearer" not in str(request.headers)
        assert poll.grafx.tokens[0] not in str(request)


def test_a_password_in_a_link_is_neither_sent_nor_logged(
    poll: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "chili")
    _, elsewhere = hosts(poll.grafx)
    poll.grafx.add(task_id="task", link=f"http://me:hidden@{elsewhere}/file/task")
    assert poll("task")
    (request,) = poll.requests("elsewhere")
    assert "Authorization" not in request.headers
    assert "127.0.0.1/file/task" in caplog.text  # no query, no user
    assert "hidden" not in caplog.text


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_elsewhere_is_followed_without_it(poll: Client, code: int) -> None:
    task = poll.grafx.add()
    poll.grafx.fault("download", "redirect-away", code=code)
    assert poll(task)
    (request,) = poll.requests("elsewhere")
    assert "Authorization" not in request.headers

    other = poll.grafx.add()
    poll.grafx.fault("task", "redirect-away", code=code)
    with pytest.raises((REJECTED, LATER)):
        poll(other)  # a picture is no answer
    assert "Authorization" not in poll.requests("elsewhere")[1].headers


@pytest.mark.parametrize("what", ["task", "download"])
def test_a_redirect_on_the_same_server_is_followed_with_it(poll: Client, what: str) -> None:
    poll.grafx.fault(what, "redirect-same")
    assert poll(poll.grafx.add())
    assert len(poll.requests(what)) == 2
    assert all("Authorization" in request.headers for request in poll.requests(what))


@pytest.mark.parametrize("what", ["token", "task", "download", "elsewhere"])
@pytest.mark.parametrize("redirect", ["", "redirect-same", "redirect-away"])
def test_netrc_is_never_used(
    poll: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, redirect: str
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\ndefault login me password mine\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    link = f"{poll.grafx.elsewhere}/file/task" if what == "elsewhere" else None
    poll.grafx.add(task_id="task", link=link)
    if redirect:
        poll.grafx.fault(what, redirect)
    with suppress(REJECTED, LATER):
        poll("task")
    assert not redirect or [request for request in poll.grafx.requests if request.fault]
    assert poll("task")
    for request in poll.grafx.requests:
        home = poll.grafx.base_url.endswith(request.headers["Host"]) and request.what != "token"
        sent = request.headers.get("Authorization")
        assert sent == (f"Bearer {poll.grafx.tokens[0]}" if home else None), request


class Cookies(Sandbox):
    """Sets a cookie with each answer, for all paths."""

    def _right_answer(self, request: Request) -> Answer:
        answer = super()._right_answer(request)
        answer.headers["Set-Cookie"] = f"last={request.task_id or request.what}; Path=/"
        return answer


def test_cookies_are_never_sent(tmp_path: Path) -> None:
    with Cookies() as grafx:
        poll = Client(grafx, tmp_path / "orders")
        for _ in range(2):
            task = grafx.add(questions=1)
            assert poll(task) is None
            assert poll.delivers(task)
        assert not [request for request in grafx.requests if "Cookie" in request.headers]
        assert len({request.peer for request in poll.requests("task")}) == 1


@pytest.mark.parametrize(
    "to", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "http://a:b/", "http://\xff/"]
)
@pytest.mark.parametrize("what", ["task", "download"])
def test_a_redirect_to_what_is_not_an_http_address_is_retried(
    poll: Client, monkeypatch: pytest.MonkeyPatch, what: str, to: str
) -> None:
    task = poll.grafx.add()
    answer = Answer(302, b"", None, {"Location": to})
    monkeypatch.setattr(poll.grafx, "_redirect", lambda *_: answer)
    poll.grafx.fault(what, "redirect-same")
    error = poll.fails(task)
    assert isinstance(error, LATER)
    assert "PROXY" not in str(error)
    assert poll.delivers(task)


# --- https and proxies -----------------------------------------------------------------------


@pytest.fixture
def poll_tls(
    tls: Sandbox, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    yield Client(tls, tmp_path / "orders by tls")


@pytest.mark.parametrize("port", [True, False], ids=["same port", "no port"])
def test_an_http_link_of_an_https_environment_is_downloaded_over_https(poll_tls: Client, port: bool) -> None:
    task = "84ad7436-f82f-4e87-8cd3-37299e37878c"
    path = f"{poll_tls.grafx.root}/tasks/{task}/download"
    host = path.split("/")[2]
    link = path.replace("https://", "http://").replace(host, host if port else "127.0.0.1")
    poll_tls.grafx.add(task_id=task, link=link)
    assert poll_tls(task)
    assert poll_tls.requests("download")[0].headers["Authorization"].startswith("Bearer ")


def test_a_link_from_https_to_http_elsewhere_goes_without_it(poll_tls: Client) -> None:
    task = "84ad7436-f82f-4e87-8cd3-37299e37878c"
    poll_tls.grafx.add(task_id=task, link=f"{poll_tls.grafx.elsewhere}/file/{task}")
    assert poll_tls(task)
    assert "Authorization" not in poll_tls.requests("elsewhere")[0].headers


def test_certificate_checks_cannot_be_turned_off(home: Home, tls: Sandbox, certificate: Path) -> None:
    task = tls.add()
    home.wait_for(task)
    home.env |= tls.settings(home.folder)
    off = {"PYTHONHTTPSVERIFY": "0", "CURL_CA_BUNDLE": "", "REQUESTS_CA_BUNDLE": "", "SSL_VERIFY": "0"}
    ended = home.run("--once", **off, VERIFY="false")
    assert ended.process.returncode == 1
    assert "certificate" in ended.log()
    assert tls.requests == []
    # The same with the authority of this server.
    assert home.run("--once", REQUESTS_CA_BUNDLE=str(certificate)).process.returncode == 0
    assert (home.orders / f"{task}.png").read_bytes() == tls.body(task)


def test_proxies_from_the_environment(
    home: Home, grafx: Sandbox, tls: Sandbox, certificate: Path, relay: type[Relay]
) -> None:
    proxy = relay()
    methods_of = {
        "HTTP_PROXY": ["GET", "GET", "POST"],
        "https_proxy": ["CONNECT"] * 3,
    }  # token, task, download
    for sandbox, variable in ((grafx, "HTTP_PROXY"), (tls, "https_proxy")):
        for excepted in ("", "127.0.0.1"):
            proxy.asked.clear()
            task = sandbox.add()
            home.wait_for(task)
            env = {variable: proxy.url, "NO_PROXY": excepted, "REQUESTS_CA_BUNDLE": str(certificate)}
            ended = home.run("--once", **sandbox.settings(home.folder), **env)
            assert ended.process.returncode == 0, ended.log()
            assert (home.orders / f"{task}.png").read_bytes() == sandbox.body(task)
            methods = sorted(line.split()[0] for line in proxy.asked)
            assert methods == ([] if excepted else methods_of[variable])


def test_no_proxy_may_name_a_port(wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = wire(raw)
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    for excepted, asked in (("localhost:81", True), ("localhost:80", False)):
        proxy.asked.clear()
        monkeypatch.setenv("NO_PROXY", excepted)
        chili._proxies_and_certificates.cache_clear()
        with suppress(LATER):
            chili.DangerousToken("http://localhost", "http://localhost/oauth", "id", "secret").get()
        assert bool(proxy.asked) is asked


def test_a_proxys_password_is_never_shown(
    poll: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "chili")
    for address in (
        "http://me:hidden@127.0.0.1:99999", "http://me:hidd/en@127.0.0.1:1", "http://me:hidd#en@127.0.0.1:1",
        "http://me:hidden€@127.0.0.1:1", "http://me:hidden@", "http://me:hidden@[::1", "foo://me:hidden@[::1]:1",
        "http://me:hidden@127.0.0.1:1",
    ):  # fmt: skip
        monkeypatch.setenv("HTTP_PROXY", address)
        poll.at(poll.grafx.base_url)
        error = poll.fails("task")
        assert isinstance(error, LATER)
        assert not re.search("hidd|en@|€", f"{error}{caplog.text}")
        assert "HTTP_PROXY" in str(error) or address.endswith("127.0.0.1:1")
    assert poll.grafx.requests == []


@pytest.mark.parametrize(
    "answer", ["403 Forbidden", "407 Proxy Authentication Required", "407 me:hidden", "oops", ""]
)
def test_a_proxy_that_refuses_to_connect_is_named_without_its_password(
    poll: Client, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, answer: str,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG", "chili")
    proxy = wire(lambda *_: f"HTTP/1.1 {answer}\r\n\r\n".encode() if answer else None)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:hidden@"))
    monkeypatch.setattr(poll.grafx, "token_url", "https://grafx.invalid/oauth/token")
    poll.at("https://grafx.invalid")
    error = poll.fails("task")
    assert isinstance(error, LATER)
    assert error.shared
    if answer[:1] == "4":
        assert f"the proxy {proxy.url.removeprefix('http://')} refuses to connect" in str(error)
    if "hidden" not in answer:
        assert "hidden" not in f"{error}{error!r}{caplog.text}"
    assert [line.rpartition(" ")[0] for line in proxy.asked] == ["CONNECT grafx.invalid:443"]


def test_a_proxy_may_be_spoken_to_by_tls(
    poll_tls: Client, poll: Client, relay: type[Relay], tls_front: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    proxy = relay()
    port = tls_front(proxy.server_address[1])
    monkeypatch.setenv("NO_PROXY", "")
    for client, variable in ((poll_tls, "HTTPS_PROXY"), (poll, "HTTP_PROXY")):
        # The certificate is for 127.0.0.1. Who else shows it gets nothing. (requests does not look at it
        # for an http address, to which the token is sent on loopback only.)
        if client is poll_tls:
            monkeypatch.setenv(variable, f"https://localhost:{port}")
            client.at(client.grafx.base_url)
            assert "localhost" in str(client.fails("task"))
            assert proxy.asked == []
        monkeypatch.setenv(variable, f"https://127.0.0.1:{port}")
        client.at(client.grafx.base_url)
        assert client.delivers(client.grafx.add())
        assert proxy.asked
        proxy.asked.clear()
    # Through TLS inside TLS, too, a body that is too slow is an error.
    monkeypatch.setattr(chili, "SLOW_START", 0.3)
    poll_tls.grafx.fault("download", "slow", rate=200)
    with pytest.raises(chili.NotUnderstood, match="too slow"):
        poll_tls(poll_tls.grafx.add(size=5000))


# --- what servers do to a connection ---------------------------------------------------------


def raw(line: str, connection: socket.socket, answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n") -> bytes:
    """What a `Wire` says: a token, else `answer`."""
    return whole(b'{"access_token": "abc"}') if "oauth" in line else answer


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("what", ["token", "task", "download"])
def test_a_late_answer_never_gives_a_wrong_file(poll: Client, what: str) -> None:
    """A gateway answers, and then, on the same connection, the server behind it."""
    grafx = poll.grafx
    other = grafx.add()
    for number in range(4 * len(LATE)):
        options = LATE[number // 2 % len(LATE)]  # the same kind in a row, and then the other kinds
        options = options | ({"task": other} if "task" in options else {})
        task = grafx.add()
        if what == "token":
            poll.environment.token._replaced = -float("inf")  # a minute is over
            grafx.revoke()
        fault = grafx.fault(what, "late", task_id=None if what == "token" else task, **options)
        errors = poll.retried(task)
        assert fault.times == 0
        assert all(isinstance(error, LATER) for error in errors), errors
        (poll.folder / f"{task}.png").unlink()


def test_a_late_answer_never_gives_a_wrong_file_to_many_threads(poll: Client) -> None:
    grafx = poll.grafx
    other, tasks = grafx.add(), [grafx.add(questions=1) for _ in range(48)]
    for what in ("task", "download"):
        for number, task in enumerate(tasks):
            options = LATE[number % len(LATE)]
            options = options | ({"task": other} if "task" in options else {})
            grafx.fault(what, "late", task_id=task, **options)

    def until_delivered(task: str) -> int:
        for number in range(20):
            with suppress(REJECTED, LATER):
                if poll(task):
                    return number
        raise AssertionError(f"{task} is not delivered")

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(until_delivered, tasks)) >= 2 * len(tasks)
    for task in tasks:
        assert (poll.folder / f"{task}.png").read_bytes() == grafx.body(task), "another task's file"
    assert len(poll.files()) == len(tasks)


@pytest.mark.parametrize("code", [100, 102, 103])
@pytest.mark.parametrize("pause", [0, 0.02])
def test_an_interim_answer_never_gives_a_wrong_file(poll: Client, code: int, pause: float) -> None:
    """`http.client` knows 100 only; another 1xx is not understood, and the poll is retried."""
    grafx = poll.grafx
    for number in range(24):
        what = ("token", "task", "download")[number % 3]
        if what == "token":
            poll.environment.token._replaced = -float("inf")  # a minute is over
            grafx.revoke()
        grafx.fault(what, "interim", code=code, number=1 + number % 2, pause=pause)
        task = grafx.add()
        errors = poll.retried(task)
        assert len(errors) == (code != 100), errors
        assert all(isinstance(error, LATER) for error in errors), errors
        (poll.folder / f"{task}.png").unlink()


def test_another_tasks_answer_is_retried_on_a_new_connection(poll: Client) -> None:
    tasks = [poll.grafx.add() for _ in range(6)]
    for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True):
        poll.grafx.fault("task", "other-task", task_id=task, task=other)
    errors = poll.retried(*tasks)
    assert [str(error) for error in errors] == [
        f"the answer was another task's: {other}" for other in tasks[1:] + tasks[:1]
    ]
    assert all(isinstance(error, chili.NotUnderstood) for error in errors)
    polls = poll.requests("task")
    assert [request.task_id for request in polls] == [task for task in tasks for _ in range(2)]
    for request, following in pairwise(polls):
        assert (request.peer == following.peer) is (request.fault is None)
    assert len(poll.requests("download")) == len(tasks)


@pytest.mark.parametrize("about", ["upper case", None, 7, [], "left out"])
def test_an_answer_that_names_no_other_task_is_its_own(poll: Client, about: Any) -> None:
    task = poll.grafx.add(task_id="84ad7436-f82f-4e87-8cd3-37299e37878c")
    links = {"download": f"{poll.grafx.root}/tasks/{task}/download"}
    data = {} if about == "left out" else {"taskId": task.upper() if about == "upper case" else about}
    poll.grafx.fault("task", "other-json", value={"data": data, "links": links})
    assert poll.delivers(task)


def test_each_download_has_a_connection_of_its_own(poll: Client) -> None:
    """Also where the server keeps all of them open."""
    tasks = [
        poll.grafx.add(link=None if n % 2 else f"{poll.grafx.elsewhere}/file/{n}", task_id=str(n))
        for n in range(10)
    ]
    poll.retried(*tasks)
    downloads = poll.requests("download") + poll.requests("elsewhere")
    peers = {request.peer for request in downloads}
    assert len(peers) == len(downloads) == len(tasks)
    assert not peers & {request.peer for request in poll.requests("task")}
    assert len({request.peer for request in poll.requests("task")}) == 1
    assert len({request.peer for request in poll.requests("token")}) == 1


# What keeps its connection, and what does not: see "four rules" in chili.py.
KEEPS: list[tuple[str, dict[str, Any]]] = [
    *((f"status-{status}", {}) for status in (202, 400, 403, 404, 410, 422, 429, 500)),
    ("status-404", {"body": PAGE, "content_type": "text/html"}),
    ("500-plain", {}),
    ("500-empty", {}),
    ("no-link", {}),
    ("html", {}),
    ("empty", {}),
    ("other-json", {}),
    ("chunked", {}),
    ("gzip", {}),
    ("delay", {"seconds": 0.1}),
    ("redirect-loop", {}),
]
DROPS: list[tuple[str, dict[str, Any]]] = [
    *((f"status-{status}", {}) for status in (408, 425, 502, 503, 504, 507)),
    ("other-task", {}),
    ("interim", {}),
    ("interim", {"code": 102, "pause": 0}),
    ("late", {}),
    ("late", {"pause": 0}),
    ("length-long", {}),
    ("chunked-cut", {}),
    ("gzip-cut", {}),
    ("reset", {}),
    ("close", {}),
]


@pytest.mark.parametrize(
    ("fault", "options", "kept"),
    [*((*case, True) for case in KEEPS), *((*case, False) for case in DROPS)],
)
def test_an_answer_that_is_not_understood_drops_all_idle_connections(
    poll: Client, fault: str, options: Any, kept: bool
) -> None:
    grafx, number = poll.grafx, 4
    never = [grafx.add("never") for _ in range(number)]

    def peers() -> set[tuple[str, int]]:
        """Those of as many polls at the same time."""
        before = len(grafx.requests)
        together = threading.Barrier(number)

        def ask(task: str) -> None:
            together.wait()
            poll(task)

        grafx.fault("task", "delay", task_id=never, seconds=0.2, times=number)
        with ThreadPoolExecutor(number) as threads:
            list(threads.map(ask, never))
        return {request.peer for request in grafx.requests[before:] if request.what == "task"}

    before = peers()
    assert len(before) > 1
    task = grafx.add()
    grafx.fault("task", fault, task_id=task, **options)
    try:
        poll(task)
    except (REJECTED, LATER) as error:
        assert isinstance(error, chili.NotUnderstood) is not kept, error
    else:
        assert kept
    after = peers()
    assert (after <= before) if kept else not after & before


def test_the_connection_of_an_answer_that_is_left_unread_is_closed(poll: Client) -> None:
    for fault in ("huge", "coding", "status-401"):
        poll.grafx.requests.clear()
        task = poll.grafx.add()
        poll.grafx.fault("task", fault, task_id=task)
        with suppress(REJECTED, LATER):
            poll(task)
        assert poll(poll.grafx.add("never")) is None
        (bad,) = [request.peer for request in poll.requests("task") if request.fault]
        assert poll.requests("task")[-1].peer != bad


def grafx_at(server: Wire) -> chili.GraFx:
    return chili.GraFx(server.url, "e", f"{server.url}/oauth", "id", "secret")


@pytest.mark.parametrize(
    "answer", ["200 OK\r\nContent-Ty", "200 OK\r\n", '200 OK\r\n\r\n{"links": {', "20", "500 Oops\r\n\r\n{"]
)
def test_an_answer_that_is_cut_off_is_retried(wire: Callable[..., Wire], tmp_path: Path, answer: str) -> None:
    def cut_off(line: str, connection: socket.socket) -> bytes:
        said = raw(line, connection, b"")
        if not said:
            connection.sendall(f"HTTP/1.1 {answer}".encode())
        return said

    with pytest.raises(LATER):
        chili.order_done("a", grafx_at(wire(cut_off)), tmp_path)


@pytest.mark.parametrize("what", ["token", "task", "download"])
@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_a_body_that_is_too_slow_is_retried(
    grafx: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, encoding: str
) -> None:
    """It comes often enough for the timeout of a read."""
    poll = Client(grafx, tmp_path / "orders")
    monkeypatch.setattr(chili, "SLOW_START", 0.3)
    monkeypatch.setattr(chili, "TIMEOUT", (10.0, 5.0))
    slow = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"
    if encoding:
        slow += b"Content-Encoding: gzip\r\n"
    send = grafx._send_oddly

    def drip(connection: socket.socket, request: Request, right: Answer, fault: Any) -> bool:
        if fault.name != "slow":
            return send(connection, request, right, fault)
        connection.sendall(slow + b"\r\n")
        data = b"\x89PNG\r\n\x1a\n" + os.urandom(100_000)
        data = gzip.compress(data, compresslevel=0) if encoding else data
        return grafx._drip(connection, (data[n : n + 10] for n in range(0, 100_000, 10)), 0.005)

    monkeypatch.setattr(grafx, "_send_oddly", drip)
    task = grafx.add()
    grafx.fault(what, "slow")
    error = poll.fails(task)
    assert isinstance(error, LATER)
    assert re.search("the answer (is|was) too slow: .* bytes in ", str(error))
    assert poll.delivers(task)


def test_a_slow_start_and_a_slow_end_are_no_error(poll: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    task = poll.grafx.add(size=5000)
    poll.grafx.fault("download", "slow", rate=5000)
    monkeypatch.setattr(chili, "SLOW_START", 0.2)
    assert poll.delivers(task)


def test_what_follows_a_bad_file_is_not_the_next_orders_answer(
    wire: Callable[..., Wire], tmp_path: Path
) -> None:
    """A server that says a length that is too short, and sends the rest when the next request comes."""
    rest = b'HTTP/1.1 404 Not Found\r\nContent-Length: 18\r\n\r\n{"title": "other"}'
    lied: list[socket.socket] = []

    def lie(line: str, connection: socket.socket) -> bytes:
        if connection in lied:
            return rest
        if "/file" in line:
            lied.append(connection)
            return b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 8\r\n\r\n\x89PNG\r\n\x1a\n"
        link = f'{{"links": {{"download": "{server.url}/file"}}}}'.encode()
        if not lied:
            return raw(line, connection, whole(link))
        return raw(line, connection)

    server = wire(lie)
    grafx = grafx_at(server)
    with pytest.raises(REJECTED, match="the PNG has no end"):
        chili.order_done("a", grafx, tmp_path)
    assert chili.order_done("a", grafx, tmp_path) is None


def test_connections_do_not_pile_up(wire: Callable[..., Wire], poll: Client) -> None:
    """Each download's connection is closed after it, whatever came of it."""
    png = poll.grafx.body(poll.grafx.add())
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%s" % (len(png), png),
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong",
    ]
    servers = [wire(lambda *_, answer=answer: answer) for answer in answers for _ in range(5)]
    for server in servers:
        with suppress(REJECTED, LATER):
            poll(poll.grafx.add(link=f"{server.url}/file"))
        assert server.asked == ["GET /file HTTP/1.1"]
    assert len(poll.files()) == 5
    eventually(lambda: not any(server.open for server in servers))


@pytest.mark.parametrize("answer", ["HTTP/1.1 200 {echo}", "{echo} 200 OK", "HTTP/1.1 {echo}"])
def test_a_token_in_a_broken_answer_is_never_shown(
    poll: Client, tmp_path: Path, wire: Callable[..., Wire], answer: str
) -> None:
    """A server that puts what it was sent into its status line."""
    said: list[bytes] = []
    poll.at(wire(lambda _, connection: connection.sendall(said[0])).url)
    value = poll.environment.token.get().removeprefix("Bearer ")
    said.append((answer.format(echo=f"Bearer {value}") + "\r\n\r\n").encode())
    with pytest.raises((REJECTED, LATER)) as raised:
        poll("a")
    assert value[:100] not in str(raised.value)


@pytest.mark.parametrize(
    ("link", "asked", "redirected"),
    [
        ("{url}/a;?x=1", "/a;?x=1", False),
        ("http://me:secret@{host}/x?sig=a%2Fb@c#part", "/x?sig=a%2Fb@c", False),
        ("http://me:secret@{host}/x?sig=a%2Fb@c#part", "/x?sig=a%2Fb@c", True),
    ],
)
def test_an_address_is_requested_to_the_letter_but_without_a_user(
    poll: Client, wire: Callable[..., Wire], link: str, asked: str, redirected: bool
) -> None:
    """It may be signed."""

    def answer(line: str, connection: socket.socket) -> bytes:
        if line.startswith("GET /first "):
            return f"HTTP/1.1 302 Found\r\nLocation: {link}\r\nContent-Length: 0\r\n\r\n".encode()
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"

    server = wire(answer)
    link = link.format(url=server.url, host=server.url.removeprefix("http://"))
    poll.fails(poll.grafx.add(link=f"{server.url}/first" if redirected else link))
    assert server.asked[-1] == f"GET {asked} HTTP/1.1"
    assert len(server.asked) == 1 + redirected


def test_a_file_system_that_cannot_sync_a_folder_is_no_reason_to_stop(
    poll: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    task = poll.grafx.add()
    assert poll(task) == poll.folder / f"{task}.png"
