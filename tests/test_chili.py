"""chili.order_done against a GraFx environment: the token, the poll, the download."""

from __future__ import annotations

import email.utils
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
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

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def requests(self, what: str) -> list[Request]:
        return self.grafx.asked(what)


@pytest.fixture(autouse=True)
def proxies_of_this_test() -> Iterator[None]:
    """`chili` looks up proxies and certificates once in a process."""
    chili._proxies_and_certificates.cache_clear()
    yield
    chili._proxies_and_certificates.cache_clear()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass at once for `chili`."""
    passed = 0.0

    def let_pass(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed, sleep=time.sleep)
    monkeypatch.setattr(chili, "time", clock)
    return let_pass


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
        # Some gateways name what is no coding, or what they have undone.
        *(({}, ("coding", {"value": value}), "png") for value in ("aws-chunked", "gzip")),
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
    ("fault", "options", "says"),
    [
        ("length-long", {}, "the answer broke off after 300.0 kB of 301.0 kB"),
        ("reset", {"at": 100_000}, "the answer broke off after "),
        ("close", {"at": 100_000}, "the answer broke off after 100.0 kB of 300.0 kB"),
        ("close", {"at": 0}, "the answer broke off after 0 bytes of 300.0 kB"),
        ("chunked-cut", {}, "the answer broke off after "),
        ("close-end", {}, "neither a length nor an end"),
        ("gzip-cut", {}, "the answer broke off after "),
    ],
)
def test_a_file_that_breaks_off_is_never_delivered(poll: Client, fault: str, options: Any, says: str) -> None:
    """Also of a format whose end is not looked at."""
    task = poll.grafx.add("jpg", size=300_000)
    poll.grafx.fault("download", fault, **options)
    error = poll.fails(task)
    assert isinstance(error, chili.NotUnderstood)
    assert says in str(error)
    assert poll(task)
    assert (poll.folder / f"{task}.jpg").read_bytes() == poll.grafx.body(task)


@pytest.mark.parametrize(
    ("body", "says", "proven"),
    [
        (b"\x89PNG\r\n\x1a\n and no end", "image/png", True),
        (b"\x89PNG\r\n\x1a\n", "text/html", True),  # nobody else's answer begins so
        (b"%PDX-1.4", "application/pdf", False),  # it may be a page for all orders
        (b"\n<html>Error</html>", "application/octet-stream", False),
        (b"", "image/png", False),
    ],
)
def test_a_file_that_is_not_what_it_says_rejects_the_task(
    poll: Client, body: bytes, says: str, proven: bool
) -> None:
    error = poll.fails(poll.grafx.add(body=body, content_type=says))
    assert isinstance(error, REJECTED)
    assert (error.status, error.proven, error.final) == (200, proven, False)


@pytest.mark.parametrize("extension", TYPES)
def test_a_file_that_is_there_is_found_without_a_poll(poll: Client, extension: str) -> None:
    file = poll.folder / f"task.{extension}"
    file.write_bytes(b"here")
    assert chili.find_file(poll.folder, "task") == poll("task") == file
    assert poll.grafx.requests == []
    assert chili.find_file(poll.folder, "other") is None
    file.rename(poll.folder / "other")
    file.mkdir()
    assert chili.find_file(poll.folder, "task") is None


# --- what GraFx may answer instead -----------------------------------------------------------


HTML = {"body": PAGE, "content_type": "text/html"}


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        *(
            ("bad-link", {"link": link})
            for link in (5, "file:///etc/passwd", "http://[::1", "http://127.0.0.1:99999/")
        ),
        *(("other-json", {"value": value}) for value in (None, {"links": []})),
        ("huge", {"size": TOO_LONG}),
    ],
)
def test_an_answer_without_a_link_that_can_be_followed_rejects_the_task(
    poll: Client, fault: str, options: Any
) -> None:
    task = poll.grafx.add()
    poll.grafx.fault("task", fault, **options)
    error = poll.fails(task)
    assert isinstance(error, REJECTED)
    assert (error.status, error.proven, error.final) == (200, False, False)
    assert poll(task)


def test_another_servers_500_or_400_proves_nothing(poll: Client, wire: Callable[..., Wire]) -> None:
    body = b'{"title": "No such blob"}'
    for status, kind in ((500, LATER), (400, REJECTED)):
        answer = f"HTTP/1.1 {status} Oops\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        elsewhere = wire(lambda *_, answer=answer: answer)
        error = poll.fails(poll.grafx.add(link=f"{elsewhere.url}/file"))
        assert type(error) is kind
        assert not getattr(error, "proven", False)


def test_without_a_link_the_address_of_its_download_is_tried(poll: Client) -> None:
    """From where CHILI's own web client downloads. Only if there is nothing either, the task is rejected."""
    task = poll.grafx.add()
    poll.grafx.fault("task", "bad-link", times=2, link="")
    poll.grafx.fault("download", "status-404")
    error = poll.fails(task)
    assert isinstance(error, REJECTED)
    assert (error.status, error.proven) == (404, False)
    assert poll.delivers(task)
    assert len(poll.requests("download")) == 2


@pytest.mark.parametrize(
    "link", ["{task}/download", "{path}/{task}/download", "//{host}{path}/{task}/download"]
)
def test_a_relative_link_begins_at_the_answers_address(poll: Client, link: str) -> None:
    task = "84ad7436-f82f-4e87-8cd3-37299e37878c"
    host, _, path = f"{poll.grafx.root}/tasks".removeprefix("http://").partition("/")
    poll.grafx.add(task_id=task, link=link.format(task=task, host=host, path=f"/{path}"))
    assert poll.delivers(task)


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
    said = f"image/\x1b[31m{poll.grafx.client_secret}\x07" + "x" * 5000
    poll.grafx.fault("download", "wrong-type", type=said)
    error = poll.fails(task)
    assert str(error).startswith("the file says image/ [31m[secret] xxx")
    assert str(error).isprintable()
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("9" * 400, 300, 300),
        ("in 200 s", 100, 200),
        ("in -100 s", 0, 0),
        *((value, None, None) for value in ("soon", "", "-5", "\xb2", "Wed, 99 Foo 2026")),
    ],
)
def test_retry_after_is_understood(poll: Client, value: str, least: Any, most: Any) -> None:
    task = poll.grafx.add()
    if value.startswith("in "):
        value = email.utils.formatdate(time.time() + int(value.split()[1]), usegmt=True)
    for what, status in (("token", 429), ("task", 503), ("download", 425)):
        poll.grafx.fault(what, f"status-{status}", retry_after=value)
        error = poll.fails(task)
        assert isinstance(error, LATER)
        if least is None:
            assert error.retry_after is None
        else:
            assert error.retry_after is not None
            assert least <= error.retry_after <= most


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


def test_it_is_renewed_before_its_end_and_at_most_once_a_minute_where_that_fails(
    poll: Client, later: Callable[[float], None]
) -> None:
    """Which holds up nobody, as long as the old one is good."""
    task = poll.grafx.add("never")
    assert poll(task) is None
    later(86_400 - chili.TOKEN_MARGIN - 100)
    assert poll(task) is None
    assert len(poll.requests("token")) == 1
    later(150)
    poll.grafx.fault("token", "status-429", times=2, retry_after="0")
    assert [poll(task), poll(task)] == [None, None]
    later(60)
    assert [poll(task), poll(task)] == [None, None]
    later(60)
    assert [poll(task), poll(task)] == [None, None]
    assert [request.status for request in poll.requests("token")] == [200, 429, 429, 200]
    assert {request.status for request in poll.requests("task")} == {204}
    assert chili.TOKEN_MARGIN >= 200


def test_a_401_fetches_a_new_one_and_repeats_the_request(poll: Client) -> None:
    """The endpoint caches, so the new one may be the old one."""
    poll.grafx.fault("task", "status-401")
    assert poll(poll.grafx.add())
    assert [request.status for request in poll.requests("task")] == [401, 200]
    assert [len(poll.requests("token")), len(poll.grafx.tokens)] == [2, 1]


@pytest.mark.parametrize(
    ("what", "stubborn"), [("task", False), ("download", True)], ids=["a new token", "the same token again"]
)
def test_a_401_renews_the_token_at_most_once_a_minute(
    poll: Client, later: Callable[[float], None], what: str, stubborn: bool
) -> None:
    assert poll(poll.grafx.add("never")) is None
    poll.grafx.stubborn = stubborn
    bad = [poll.grafx.add() for _ in range(10)]
    poll.grafx.fault(what, "status-401", times=None, task_id=bad)
    errors = [poll.fails(task) for task in bad]
    assert all(isinstance(error, LATER) and "401 Unauthorized" in str(error) for error in errors)
    assert len(poll.requests("token")) == 2
    assert len([request for request in poll.requests(what) if request.status == 401]) == 11
    task = poll.grafx.add()  # nobody else is held up
    assert poll.delivers(task)
    (poll.folder / f"{task}.png").unlink()
    assert len(poll.requests("token")) == 2
    later(60)
    assert isinstance(poll.fails(bad[0]), LATER)
    assert len(poll.requests("token")) == 3
    poll.grafx.clear_faults()
    assert poll.delivers(bad[0])


def test_threads_that_are_answered_401_together_all_repeat_their_request(
    poll: Client, later: Callable[[float], None]
) -> None:
    rounds = 5
    with ThreadPoolExecutor(8) as threads:
        for _ in range(rounds):
            later(60)
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


def test_who_waits_for_the_token_says_why(poll: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread asks for it, and has no answer yet."""
    over = threading.Event()
    poll.grafx.fault("token", "delay", until=over)
    with ThreadPoolExecutor(1) as threads:
        try:
            asks = threads.submit(poll.environment.token.get)
            eventually(lambda: poll.requests("token"))
            monkeypatch.setattr(chili, "TIMEOUT", (0.1, 0.1))
            error = poll.fails("task")
        finally:
            over.set()
        assert asks.result().startswith("Bearer ")
    assert isinstance(error, LATER)
    assert error.shared
    assert f"no token: {poll.grafx.token_url} has not answered yet" in str(error)
    assert len(poll.requests("token")) == 1


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("redirect-away", {}),
        ("echo-token", {}),
        ("status-401", HTML),
        *(  # a gateway's words, or a passing error of RFC 6749 (section 5.2)
            (f"status-{status}", {"body": json.dumps({"error": word}).encode()})
            for status, word in (
                (403, "Forbidden"),
                (400, "temporarily_unavailable"),
                (403, ["access_denied"]),
            )
        ),
        ("huge", {"size": TOO_LONG}),
        *(("other-json", {"value": {"access_token": token}}) for token in ("", None, [], "two\nlines", "é")),
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


@pytest.mark.parametrize("lasts", [None, "soon", -1, 1e400])
def test_a_token_that_does_not_say_how_long_it_lasts_serves(poll: Client, lasts: Any) -> None:
    task = poll.grafx.add("never")
    assert not poll(task)
    value = {"access_token": poll.grafx.tokens[0], "expires_in": lasts}
    poll.grafx.fault("token", "other-json", value=value)
    poll.at(poll.grafx.base_url)
    poll(task)
    poll(task)
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
        ("HTTP://{elsewhere}/file/{task}?signature=s", True),
        ("http://{home}@{elsewhere}/file/{task}", None),
        ("http://{elsewhere}\\@{home}/file/{task}", None),
        ("http://{home}\\@{elsewhere}/file/{task}", None),
        ("http://{elsewhere}#@{home}/file/{task}", None),
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


@pytest.mark.parametrize("redirect", ["", "redirect-same", "redirect-away"])
def test_netrc_is_never_used(
    poll: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redirect: str
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\ndefault login me password mine\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    for what in ("token", "task", "download", "elsewhere"):
        task, link = poll.grafx.add(task_id=what), f"{poll.grafx.elsewhere}/file/{what}"
        poll.grafx.add(task_id=what, link=link if what == "elsewhere" else None)
        poll.at(poll.grafx.base_url)
        if redirect:
            fault = poll.grafx.fault(what, redirect)
            with suppress(REJECTED, LATER):
                poll(task)
            assert fault.times == 0
        assert poll(task)
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


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "http://[::1", "http://\xff/"])
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
        "http://me:hidden@127.0.0.1:99999", "http://me:hidd/en@127.0.0.1:1", "http://me:hidden€@127.0.0.1:1",
        "http://me:hidden@", "foo://me:hidden@[::1]:1", "http://me:hidden@127.0.0.1:1",
    ):  # fmt: skip
        monkeypatch.setenv("HTTP_PROXY", address)
        poll.at(poll.grafx.base_url)
        error = poll.fails("task")
        assert isinstance(error, LATER)
        assert not re.search("hidd|en@|€", f"{error}{caplog.text}")
        assert "HTTP_PROXY" in str(error) or address.endswith("127.0.0.1:1")
    assert poll.grafx.requests == []


@pytest.mark.parametrize("answer", ["403 Forbidden", "407 me:hidden", "oops"])
def test_a_proxy_that_refuses_to_connect_is_named_without_its_password(
    poll: Client, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, answer: str,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG", "chili")
    proxy = wire(lambda *_: f"HTTP/1.1 {answer}\r\n\r\n".encode())
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:hidden@"))
    monkeypatch.setattr(poll.grafx, "token_url", "https://grafx.invalid/oauth/token")
    poll.at("https://grafx.invalid")
    error = poll.fails("task")
    assert isinstance(error, LATER)
    assert error.shared
    if answer[:1] == "4":
        problem = "wants a user and a password" if answer[:3] == "407" else "refuses to connect"
        assert f"the proxy {proxy.url.removeprefix('http://')} {problem}" in str(error)
    if "hidden" not in answer:
        assert "hidden" not in f"{error}{error!r}{caplog.text}"
    assert [line.rpartition(" ")[0] for line in proxy.asked] == ["CONNECT grafx.invalid:443"]


def test_a_proxy_may_be_spoken_to_by_tls(
    poll_tls: Client, poll: Client, relay: type[Relay], tls_front: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch, later: Callable[[float], None],
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
    with pytest.raises(chili.NotUnderstood, match="too slow"):
        poll_tls(poll_tls.grafx.add(size=5000), progress=lambda *_: later(61))


# --- what servers do to a connection ---------------------------------------------------------


def raw(line: str, connection: socket.socket, answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n") -> bytes:
    """What a `Wire` says: a token, else `answer`."""
    return whole(b'{"access_token": "abc"}') if "oauth" in line else answer


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


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


@pytest.mark.parametrize("about", ["upper case", None, [], "left out"])
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
    assert all(map(poll.delivers, tasks))
    downloads = poll.requests("download") + poll.requests("elsewhere")
    peers = {request.peer for request in downloads}
    assert len(peers) == len(downloads) == len(tasks)
    assert not peers & {request.peer for request in poll.requests("task")}
    assert len({request.peer for request in poll.requests("task")}) == 1
    assert len({request.peer for request in poll.requests("token")}) == 1


# What keeps its connection, and what does not: see "four rules" in chili.py.
KEEPS: list[tuple[str, dict[str, Any]]] = [
    *((f"status-{status}", {}) for status in (202, 404, 429, 500)),
    ("status-404", HTML),
    ("no-link", {}),
    ("empty", {}),
    ("chunked", {}),
    ("gzip", {}),
    ("delay", {"seconds": 0.1}),
    ("redirect-loop", {}),
]
DROPS: list[tuple[str, dict[str, Any]]] = [
    ("status-408", {}),
    ("status-502", {}),
    ("other-task", {}),
    ("interim", {}),
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
        before, together = len(poll.requests("task")), threading.Event()
        grafx.fault("task", "delay", task_id=never, until=together, times=number)
        with ThreadPoolExecutor(number) as threads:
            polls = [threads.submit(poll, task) for task in never]
            try:
                eventually(lambda: len(poll.requests("task")) == before + number)
            finally:
                together.set()
            assert [one.result() for one in polls] == [None] * number
        return {request.peer for request in poll.requests("task")[before:]}

    before = peers()
    assert len(before) == number
    task = grafx.add()
    grafx.fault("task", fault, task_id=task, **options)
    try:
        poll(task)
    except (REJECTED, LATER) as error:
        assert isinstance(error, chili.NotUnderstood) is not kept, error
    else:
        assert kept
    after = peers()
    assert after == before if kept else not after & before


def test_the_connection_of_an_answer_that_is_left_unread_is_closed(poll: Client) -> None:
    for fault in ("huge", "status-401"):
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


@pytest.mark.parametrize("answer", ["200 OK\r\nContent-Ty", '200 OK\r\n\r\n{"links": {', "20"])
def test_an_answer_that_is_cut_off_is_retried(wire: Callable[..., Wire], tmp_path: Path, answer: str) -> None:
    def cut_off(line: str, connection: socket.socket) -> bytes:
        said = raw(line, connection, b"")
        if not said:
            connection.sendall(f"HTTP/1.1 {answer}".encode())
        return said

    with pytest.raises(LATER):
        chili.order_done("a", grafx_at(wire(cut_off)), tmp_path)


@pytest.mark.parametrize("fault", ["chunked", "gzip"])
def test_a_body_that_is_too_slow_is_retried(poll: Client, later: Callable[[float], None], fault: str) -> None:
    """Below 1,000 bytes a second, after a minute."""
    task = poll.grafx.add(size=1000)
    poll.grafx.fault("download", fault, times=2)
    with pytest.raises(chili.NotUnderstood, match=r"too slow: .* in 6\d s"):
        poll(task, progress=lambda *_: later(61))
    assert poll.files() == []
    assert poll(task, progress=lambda *_: later(10))


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
    servers = [wire(lambda *_, answer=answer: answer) for answer in answers for _ in range(2)]
    for server in servers:
        with suppress(REJECTED, LATER):
            poll(poll.grafx.add(link=f"{server.url}/file"))
        assert server.asked == ["GET /file HTTP/1.1"]
    assert len(poll.files()) == 2
    eventually(lambda: not any(server.open for server in servers))


@pytest.mark.parametrize("answer", ["HTTP/1.1 200 {echo}", "{echo} 200 OK"])
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
