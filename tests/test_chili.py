"""chili.order_done against a GraFx environment: the token, the question, the download."""

from __future__ import annotations

import email.utils
import gzip
import os
import re
import resource
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, Relay, Wire
from sandbox import PAGE, TYPES, Sandbox

import chili

TOO_LONG = 10**13  # bytes: nobody reads so many in a test


class Asker:
    """What the poller keeps between two questions, and the question."""

    def __init__(self, grafx: Sandbox, folder: Path) -> None:
        self.grafx, self.folder = grafx, folder
        self.folder.mkdir()
        self.at(grafx.base_url)

    def at(self, base_url: str) -> None:
        """Ask there from now on, with new connections and a new token."""
        grafx = self.grafx
        self.environment = chili.GraFx(
            base_url, grafx.environment, grafx.token_url, grafx.client_id, grafx.client_secret, 8
        )

    def __call__(self, task_id: str, **more: Any) -> bool:
        return chili.order_done(task_id, self.environment, self.folder, **more)

    def fails(self, task_id: str) -> chili.OrderRefused | chili.AskAgainLater:
        """The exception that the question ends with, after which nothing lies in the folder."""
        with pytest.raises((chili.OrderRefused, chili.AskAgainLater)) as raised:
            self(task_id)
        assert self.files() == []
        said = f"{raised.value} {raised.value!r}"
        assert "\n" not in said
        assert not [
            secret for secret in (*self.grafx.tokens, self.grafx.client_secret) if secret[:40] in said
        ]
        return raised.value

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def asked(self, what: str) -> list[Any]:
        return [request for request in self.grafx.requests if request.what == what]


@pytest.fixture(scope="module")
def server() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def ask(server: Sandbox, tmp_path: Path) -> Asker:
    server.clear_faults()
    server.revoke()
    server.requests.clear()
    server.tokens.clear()
    server.stubborn = server.refuse_credentials = False
    return Asker(server, tmp_path / "orders")


# --- the question and the file ---------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_a_finished_task_is_delivered_byte_for_byte(ask: Asker, kind: str) -> None:
    task = ask.grafx.add(kind, size=100_000 if kind == "gif" else 300_000, questions=2)
    assert [ask(task), ask(task), ask.files()] == [False, False, []]
    seen: list[tuple[int, int | None]] = []
    assert ask(task, progress=lambda done, total: seen.append((done, total))) is True
    assert ask.files() == [f"{task}.{kind}"]
    whole = ask.grafx.body(task)
    assert (ask.folder / ask.files()[0]).read_bytes() == whole
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1] == (len(whole), len(whole))
    assert [request.status for request in ask.asked("task")] == [204, 204, 200]
    assert all(r.headers["Authorization"] == f"Bearer {ask.grafx.tokens[0]}" for r in ask.grafx.requests[1:])


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
def test_the_extension_is_what_came(ask: Asker, task: Any, fault: Any, extension: str) -> None:
    task_id = ask.grafx.add(**task)
    if fault:
        ask.grafx.fault("download", fault[0], task_id=task_id, times=None, **fault[1])
    assert ask(task_id)
    assert ask.files() == [f"{task_id}.{extension}"]
    assert (ask.folder / ask.files()[0]).read_bytes() == ask.grafx.body(task_id)


FAILED, LATER = chili.OrderRefused, chili.AskAgainLater


@pytest.mark.parametrize(
    ("task", "fault", "kind"),
    [
        ({}, ("wrong-type", {}), FAILED),
        ({}, ("wrong-type", {"type": "text/html"}), FAILED),
        ({}, ("wrong-type", {"type": "image/webp"}), FAILED),
        ({"kind": "pdf"}, ("wrong-type", {"type": "image/png"}), FAILED),
        ({"body": b"%PDX-1.4", "content_type": "application/pdf"}, None, FAILED),
        ({"body": b"\n<html>Error</html>"}, ("octet", {}), FAILED),
        ({"body": b' {"error": "x"}'}, ("octet", {}), FAILED),
        ({}, ("html", {}), FAILED),
        ({}, ("other-json", {}), FAILED),
        ({}, ("empty", {}), FAILED),
        ({"body": b""}, ("octet", {}), FAILED),
        ({}, ("cut", {}), FAILED),
        ({"size": 300_000}, ("cut", {}), FAILED),
        ({}, ("length-short", {}), FAILED),
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
def test_what_is_not_the_whole_file_is_never_delivered(ask: Asker, task: Any, fault: Any, kind: Any) -> None:
    task_id = ask.grafx.add(**task)
    if fault:
        ask.grafx.fault("download", fault[0], task_id=task_id, **fault[1])
    error = ask.fails(task_id)
    assert isinstance(error, kind)
    if isinstance(error, FAILED):
        assert error.status == 200
        assert not error.final
    if "body" not in task:
        assert ask(task_id)  # a passing fault
        assert (ask.folder / ask.files()[0]).read_bytes() == ask.grafx.body(task_id)


@pytest.mark.parametrize("extension", TYPES)
def test_a_file_that_is_there_is_found(tmp_path: Path, extension: str) -> None:
    (tmp_path / f"task.{extension}").write_bytes(b"here")
    assert chili.find_file(tmp_path, "task") == tmp_path / f"task.{extension}"
    assert chili.is_here(tmp_path, "task")
    assert not chili.is_here(tmp_path, "other")


def test_the_file_is_durable_before_it_has_its_name_and_the_name_before_it_counts(
    ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ask.grafx.add()
    real, steps = os.fsync, []

    def fsync(fd: Any) -> None:
        real(fd)
        found = os.fstat(fd if isinstance(fd, int) else fd.fileno())
        steps.append((stat.S_ISDIR(found.st_mode) or found.st_size, f"{task}.png" in ask.files()))
        assert all(name.startswith(".") or name == f"{task}.png" for name in ask.files())

    monkeypatch.setattr(os, "fsync", fsync)
    assert ask(task)
    assert steps == [(len(ask.grafx.body(task)), False), (True, True)]


def test_leftovers_are_removed_and_nothing_else(ask: Asker) -> None:
    task = ask.grafx.add(size=500_000)
    names = ["84ad7436.png", ".keep", "notes.txt"]
    for name in names:
        (ask.folder / name).touch()
    half: set[str] = set()
    assert ask(task, progress=lambda *_: half.update(set(ask.files()) - set(names)))
    assert half
    for name in half:  # as a killed process leaves it
        assert name.startswith(".")
        (ask.folder / name).write_bytes(b"half")
    chili.remove_leftovers(ask.folder)
    assert ask.files() == sorted([*names, f"{task}.png"])


def test_a_full_disk_is_not_the_orders_fault(ask: Asker) -> None:
    task = ask.grafx.add(size=500_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        error = ask.fails(task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(error, LATER)
    assert "write" in str(error)
    assert ask(task)


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
def test_answers_that_speak_of_the_order(
    ask: Asker, what: str, fault: str, options: Any, status: int
) -> None:
    task = ask.grafx.add()
    ask.grafx.fault(what, fault, **options)
    error = ask.fails(task)
    assert isinstance(error, FAILED)
    assert (error.status, error.final) == (status, False)
    assert ask(task)


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
def test_answers_that_are_not_the_orders_fault(ask: Asker, what: str, fault: str, options: Any) -> None:
    task = ask.grafx.add()
    ask.grafx.fault(what, fault, times=None, **options)
    assert isinstance(ask.fails(task), LATER)
    assert len(ask.asked(what)) < 20
    ask.grafx.clear_faults()
    assert ask(task)


def test_silence_is_not_the_orders_fault(ask: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chili, "TIMEOUT", chili.Timeout(connect=0.3, read=0.3))
    task = ask.grafx.add(size=300_000)
    for what, fault, options in (
        ("task", "hang", {}),
        ("download", "hang", {}),
        ("download", "slow", {"rate": 1}),
        ("token", "hang", {}),
    ):
        if what == "token":
            ask.grafx.revoke()
        ask.grafx.fault(what, fault, **options)
        assert isinstance(ask.fails(task), LATER)
    assert ask(task)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://grafx.invalid", "https"])
def test_no_way_to_the_server_is_not_the_orders_fault(
    ask: Asker, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chili, "TIMEOUT", chili.Timeout(connect=0.5, read=0.5))
    ask.at(ask.grafx.base_url.replace("http", "https") if address == "https" else address)
    assert isinstance(ask.fails("task"), LATER)


def test_410_at_the_download_is_final_at_once(ask: Asker) -> None:
    error = ask.fails(ask.grafx.add("expired"))
    assert isinstance(error, FAILED)
    assert (error.status, error.final) == (410, True)
    assert "no longer available: GraFx keeps a file for 4 hours" in str(error)


def test_a_failure_says_in_one_line_what_grafx_said(ask: Asker) -> None:
    error = ask.fails(ask.grafx.add("failed"))
    assert "Invalid list variable value" in str(error)
    assert "Variable 'Size' has no item 'XXL'." in str(error)
    assert "Render()" not in str(error)  # the trace
    detail = '{"title": "Line 1\\nLine 2\\u001b[31m\\u2028", "detail": "%s"}' % ("long " * 9999)
    task = ask.grafx.add()
    ask.grafx.fault("task", "status-500", body=detail.encode())
    error = ask.fails(task)
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
def test_retry_after_is_understood(ask: Asker, what: str, value: str, least: Any, most: Any) -> None:
    task = ask.grafx.add()
    if value.startswith("in "):
        value = email.utils.formatdate(time.time() + int(value.split()[1]), usegmt=True)
    ask.grafx.fault(what, "status-429", retry_after=value)
    error = ask.fails(task)
    assert isinstance(error, LATER)
    assert error.pause is None if least is None else least - 1 <= (error.pause or 0.0) <= most


# --- the token -------------------------------------------------------------------------------


def test_one_token_is_shared_by_all_requests(ask: Asker) -> None:
    tasks = [ask.grafx.add() for _ in range(100)]
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, tasks))
        assert len(ask.asked("token")) == 1
        ask.grafx.revoke()  # all notice it, and one fetches a new one
        assert all(threads.map(ask, [ask.grafx.add() for _ in range(20)]))
    assert len(ask.asked("token")) == 2
    assert len(ask.asked("task")) <= 120 + 8 + 8  # and whether it is the task or the token
    assert (
        len({request.peer for request in ask.grafx.requests}) <= 8 + 3 * 8
    )  # kept alive, but for those that were refused
    assert len(ask.files()) == 120


def test_it_is_renewed_before_its_end(grafx: Sandbox, tmp_path: Path) -> None:
    grafx.expires_in = 2
    ask = Asker(grafx, tmp_path / "orders")
    task = grafx.add("never")
    ask(task)
    ask(task)
    assert len(ask.asked("token")) == 1
    time.sleep(1.2)
    ask(task)
    assert len(ask.asked("token")) == 2
    assert {request.status for request in ask.asked("task")} == {204}
    assert 120 <= chili.TOKEN_MARGIN <= 600  # where it lasts longer


def test_while_it_is_good_a_renewal_that_fails_stands_in_nobodys_way(
    ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ask.grafx.add("never")
    ask.environment.token.get().renew = 0.0
    ask.grafx.fault("token", "status-429", times=None, retry_after="300")
    monkeypatch.setattr(chili, "TOKEN_MARGIN", 0.0)  # the endpoint wants a longer pause than that
    assert [ask(task), ask(task)] == [False, False]
    assert [request.status for request in ask.asked("token")] == [200, 429]
    assert {request.status for request in ask.asked("task")} == {204}


def test_a_401_fetches_a_new_one_and_repeats_the_request(ask: Asker) -> None:
    """The endpoint caches, so the new one may be the old one."""
    ask.grafx.fault("task", "status-401")
    assert ask(ask.grafx.add())
    assert [request.status for request in ask.asked("task")] == [401, 200]
    assert [len(ask.asked("token")), len(ask.grafx.tokens)] == [2, 1]


@pytest.mark.parametrize("what", ["task", "download"])
def test_a_401_to_a_token_that_is_taken_for_others_is_the_orders_own(ask: Asker, what: str) -> None:
    assert ask(ask.grafx.add("never")) is False
    task = ask.grafx.add()
    ask.grafx.fault(what, "status-401", times=None, task_id=task)
    error = ask.fails(task)
    assert isinstance(error, FAILED)
    assert (error.status, error.final) == (401, False)
    assert len(ask.asked("token")) == 1


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_401_is_not_the_orders_own_where_others_are_not_answered_at_all(ask: Asker, status: int) -> None:
    assert ask(ask.grafx.add("never")) is False
    task = ask.grafx.add()
    ask.grafx.fault("task", "status-401", times=None, task_id=task)
    ask.grafx.fault("task", f"status-{status}", times=None, task_id=chili.NOBODYS)
    error = ask.fails(task)
    assert isinstance(error, LATER)
    assert error.shared


def test_a_token_that_is_refused_twice_stands_in_every_orders_way(ask: Asker) -> None:
    ask.grafx.stubborn = True
    task = ask.grafx.add()
    ask.grafx.fault("task", "status-401", times=None)
    error = ask.fails(task)
    assert isinstance(error, LATER)
    assert error.shared
    assert [len(ask.asked("token")), len(ask.asked("task"))] == [2, 3]  # and for a task that cannot exist


def test_refused_credentials_have_an_exception_of_their_own(ask: Asker) -> None:
    ask.grafx.refuse_credentials = True
    error = ask.fails(ask.grafx.add())
    assert isinstance(error, chili.CredentialsRefused)
    assert error.shared
    assert "Unauthorized" in str(error)


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        *((f"status-{status}", {}) for status in (404, 429, 500, 503)),
        *((f"status-{status}", {"body": PAGE, "content_type": "text/html"}) for status in (400, 401, 403)),
        *((name, {}) for name in ("cut-json", "html", "empty", "reset", "redirect-away", "echo-token")),
        ("huge", {"size": TOO_LONG}),
        *(
            ("other-json", {"value": value})
            for value in ([], {}, *({"access_token": token} for token in ("", None, [], "two\nlines", "é")))
        ),
    ],
)
def test_no_token_is_no_orders_fault(ask: Asker, fault: str, options: Any) -> None:
    task = ask.grafx.add()
    ask.grafx.fault("token", fault, **options)
    error = ask.fails(task)
    assert isinstance(error, LATER)
    assert error.shared
    assert not isinstance(error, chili.CredentialsRefused)
    assert "lines" not in str(error)
    for request in ask.asked("elsewhere"):
        assert ask.grafx.client_secret.encode() not in request.body
    assert ask(task)


@pytest.mark.parametrize("lasts", [None, "soon", -1, 0, 1e400, [], True])
def test_a_token_that_does_not_say_how_long_it_lasts_serves(ask: Asker, lasts: Any) -> None:
    task = ask.grafx.add("never")
    assert not ask(task)
    value = {"access_token": ask.grafx.tokens[0], "expires_in": lasts}
    ask.grafx.fault("token", "other-json", value=value)
    other = Asker(ask.grafx, ask.folder / "other")
    other(task)
    other(task)
    assert len(ask.asked("token")) == 2


def test_it_stands_nowhere(ask: Asker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "chili")
    ask.grafx.fault("task", "echo-token")
    task = ask.grafx.add()
    error = ask.fails(task)
    assert "Could not process the request with Bearer" in str(error)
    assert ask(task)
    assert "/output/tasks/" in caplog.text
    (secret,) = ask.grafx.tokens
    shown = (
        caplog.text,
        repr(ask.environment.token),
        repr(ask.environment.token.get()),
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
def test_a_link_elsewhere_is_followed_without_it(ask: Asker, link: str, followed: bool | None) -> None:
    task = "84ad7436-f82f-4e87-8cd3-37299e37878c"
    home, elsewhere = hosts(ask.grafx)
    ask.grafx.add(task_id=task, link=link.format(home=home, elsewhere=elsewhere, task=task))
    if followed:
        assert ask(task)
        assert len(ask.asked("elsewhere")) == 1
    else:  # what it means is anybody's guess
        with suppress(FAILED, LATER):
            ask(task)
    for request in ask.asked("elsewhere"):
        assert "Bearer" not in str(request.headers)
        assert ask.grafx.tokens[0] not in str(request)


def test_a_password_in_a_link_is_neither_sent_nor_logged(
    ask: Asker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "chili")
    _, elsewhere = hosts(ask.grafx)
    ask.grafx.add(task_id="task", link=f"http://me:hidden@{elsewhere}/file/task")
    assert ask("task")
    (request,) = ask.asked("elsewhere")
    assert "Authorization" not in request.headers
    assert f"http://{elsewhere}/file/task" in caplog.text
    assert "hidden" not in caplog.text


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_elsewhere_is_followed_without_it(ask: Asker, code: int) -> None:
    task = ask.grafx.add()
    ask.grafx.fault("download", "redirect-away", code=code)
    assert ask(task)
    (request,) = ask.asked("elsewhere")
    assert "Authorization" not in request.headers

    other = ask.grafx.add()
    ask.grafx.fault("task", "redirect-away", code=code)
    with pytest.raises((FAILED, LATER)):
        ask(other)  # a picture is no answer
    assert "Authorization" not in ask.asked("elsewhere")[1].headers


@pytest.mark.parametrize("what", ["task", "download"])
def test_a_redirect_on_the_same_server_is_followed_with_it(ask: Asker, what: str) -> None:
    ask.grafx.fault(what, "redirect-same")
    assert ask(ask.grafx.add())
    assert len(ask.asked(what)) == 2
    assert all("Authorization" in request.headers for request in ask.asked(what))


def test_netrc_does_not_replace_it(ask: Asker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\ndefault login me password mine\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    task = "task"
    ask.grafx.add(task_id=task, link=f"{ask.grafx.elsewhere}/file/{task}")
    assert ask(task)
    assert ask.asked("task")[0].headers["Authorization"] == f"Bearer {ask.grafx.tokens[0]}"
    assert "Authorization" not in ask.asked("token")[0].headers


# --- https and proxies -----------------------------------------------------------------------


@pytest.fixture
def ask_tls(
    tls: Sandbox, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Asker]:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    yield Asker(tls, tmp_path / "orders by tls")


@pytest.mark.parametrize("port", [True, False], ids=["same port", "no port"])
def test_an_http_link_of_an_https_environment_is_asked_over_https(ask_tls: Asker, port: bool) -> None:
    task = "84ad7436-f82f-4e87-8cd3-37299e37878c"
    path = f"{ask_tls.grafx.root}/tasks/{task}/download"
    host = path.split("/")[2]
    link = path.replace("https://", "http://").replace(host, host if port else "127.0.0.1")
    ask_tls.grafx.add(task_id=task, link=link)
    assert ask_tls(task)
    assert ask_tls.asked("download")[0].headers["Authorization"].startswith("Bearer ")


def test_a_link_from_https_to_http_elsewhere_goes_without_it(ask_tls: Asker) -> None:
    task = "84ad7436-f82f-4e87-8cd3-37299e37878c"
    ask_tls.grafx.add(task_id=task, link=f"{ask_tls.grafx.elsewhere}/file/{task}")
    assert ask_tls(task)
    assert "Authorization" not in ask_tls.asked("elsewhere")[0].headers


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
    for sandbox, variable, method in ((grafx, "HTTP_PROXY", "POST http://"), (tls, "https_proxy", "CONNECT")):
        for excepted in ("", "127.0.0.1"):
            proxy.asked.clear()
            task = sandbox.add()
            home.wait_for(task)
            env = {variable: proxy.url, "NO_PROXY": excepted, "REQUESTS_CA_BUNDLE": str(certificate)}
            ended = home.run("--once", **sandbox.settings(home.folder), **env)
            assert ended.process.returncode == 0, ended.log()
            assert (home.orders / f"{task}.png").read_bytes() == sandbox.body(task)
            assert bool(proxy.asked) is not bool(excepted)
            assert all(asked.startswith(method) for asked in proxy.asked)


def test_no_proxy_may_name_a_port(wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = wire(raw)
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    for excepted, asked in (("localhost:81", True), ("localhost:80", False)):
        proxy.asked.clear()
        monkeypatch.setenv("NO_PROXY", excepted)
        with suppress(LATER):
            chili.DangerousToken(chili.Connections(1), "http://localhost/oauth", "id", "secret").get()
        assert bool(proxy.asked) is asked


def test_a_proxys_password_is_not_said(
    ask: Asker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "chili")
    for address in (
        "http://me:hidden@127.0.0.1:99999", "http://me:hidd/en@127.0.0.1:1", "http://me:hidd#en@127.0.0.1:1",
        "http://me:hidden€@127.0.0.1:1", "http://me:hidden@", "http://me:hidden@[::1", "foo://me:hidden@[::1]:1",
        "http://me:hidden@127.0.0.1:1",
    ):  # fmt: skip
        ask.at(ask.grafx.base_url)
        monkeypatch.setenv("HTTP_PROXY", address)
        error = ask.fails("task")
        assert isinstance(error, LATER)
        assert not re.search("hidd|en@|€", f"{error}{caplog.text}")
        assert "HTTP_PROXY" in str(error) or address.endswith("127.0.0.1:1")
    assert ask.grafx.requests == []


def test_a_proxy_may_be_spoken_to_by_tls(
    ask_tls: Asker, ask: Asker, relay: type[Relay], tls_front: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    proxy = relay()
    port = tls_front(proxy.server_address[1])
    monkeypatch.setenv("NO_PROXY", "")
    for asker, variable in ((ask_tls, "HTTPS_PROXY"), (ask, "HTTP_PROXY")):
        # The certificate is for 127.0.0.1. Who else shows it gets nothing.
        monkeypatch.setenv(variable, f"https://localhost:{port}")
        assert "localhost" in str(asker.fails("task"))
        assert proxy.asked == []
        monkeypatch.setenv(variable, f"https://127.0.0.1:{port}")
        asker.at(asker.grafx.base_url)
        task = asker.grafx.add()
        assert asker(task)
        (asker.folder / f"{task}.png").unlink()
        assert proxy.asked
        proxy.asked.clear()
    # Through TLS inside TLS, too, an answer that trickles is ended.
    monkeypatch.setattr(chili, "ANSWER_TIME", 0.5)
    task = ask_tls.grafx.add()
    ask_tls.grafx.fault("download", "slow", rate=20)
    with ThreadPoolExecutor() as thread:
        answer = thread.submit(ask_tls.fails, task)
        while not answer.done():
            ask_tls.environment.connections.cut()
            time.sleep(0.05)
        assert isinstance(answer.result(), LATER)


def test_a_proxy_that_trickles_is_given_up(
    wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    endured: list[bool] = []

    def trickle(_: str, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nVia: ")
        for _byte in range(1000):
            connection.sendall(b"x")
            time.sleep(0.02)
        endured.append(True)

    monkeypatch.setenv("HTTPS_PROXY", wire(trickle).url)
    monkeypatch.setattr(chili, "ANSWER_TIME", 0.5)
    connections = chili.Connections(1)
    with ThreadPoolExecutor() as thread:
        answer = thread.submit(connections.ask, "it", "GET", "https://grafx.invalid/", chili.HEADERS)
        while not answer.done():
            connections.cut()
            time.sleep(0.05)
    assert isinstance(answer.exception(), LATER)
    assert endured == []


# --- what servers do to a connection ---------------------------------------------------------


def raw(line: str, connection: socket.socket, answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n") -> bytes:
    """What a `Wire` says: a token, else `answer`."""
    return whole(b'{"access_token": "abc"}') if "oauth" in line else answer


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def grafx_at(server: Wire) -> chili.GraFx:
    return chili.GraFx(server.url, "e", f"{server.url}/oauth", "id", "secret")


@pytest.mark.parametrize(
    "answer", ["200 OK\r\nContent-Ty", "200 OK\r\n", '200 OK\r\n\r\n{"links": {', "20", "500 Oops\r\n\r\n{"]
)
def test_an_answer_that_is_cut_off_is_not_the_orders_fault(
    wire: Callable[..., Wire], tmp_path: Path, answer: str
) -> None:
    def cut_off(line: str, connection: socket.socket) -> bytes:
        said = raw(line, connection, b"")
        if not said:
            connection.sendall(f"HTTP/1.1 {answer}".encode())
        return said

    with pytest.raises(LATER):
        chili.order_done("a", grafx_at(wire(cut_off)), tmp_path)


def test_gzip_with_zeros_behind_it_for_ever_is_given_up(
    wire: Callable[..., Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pad(line: str, connection: socket.socket) -> bytes:
        said = raw(line, connection, b"")
        if not said:
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            zeros = gzip.compress(b"{}")
            while True:  # until nobody listens any more
                connection.sendall(b"%x\r\n%s\r\n" % (len(zeros), zeros))
                zeros = bytes(chili.PIECE)
                time.sleep(0.1)
        return said

    monkeypatch.setattr(chili, "ANSWER_TIME", 2)
    grafx = grafx_at(wire(pad))
    with ThreadPoolExecutor() as thread:
        answer = thread.submit(chili.order_done, "a", grafx, tmp_path)
        deadline = time.monotonic() + 30
        while not answer.done():
            grafx.connections.cut(everything=time.monotonic() > deadline)
            time.sleep(0.05)
    assert isinstance(answer.exception(), LATER)
    assert time.monotonic() < deadline


def test_what_follows_a_bad_file_is_not_the_next_orders_answer(
    wire: Callable[..., Wire], tmp_path: Path
) -> None:
    """A server that says a length that is too short, and sends the rest when the next question comes."""
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
    with pytest.raises(FAILED, match="the PNG has no end"):
        chili.order_done("a", grafx, tmp_path)
    assert chili.order_done("a", grafx, tmp_path) is False


def test_connections_do_not_pile_up(wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    servers, connections = [wire(raw) for _ in range(3 * chili.SERVERS)], chili.Connections(1)

    def ask_at(url: str) -> None:
        with connections.ask("it", "GET", f"{url}/", chili.HEADERS) as answer:
            assert answer.status == 204

    for server in servers:
        ask_at(server.url)
    deadline = time.monotonic() + 20
    while sum(server.open for server in servers) > chili.SERVERS and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sum(server.open for server in servers) <= chili.SERVERS
    # Through a proxy all servers have the same one.
    monkeypatch.setenv("HTTP_PROXY", servers[0].url)
    connections = chili.Connections(1)
    for number in range(1200):  # more than Python lets calls nest
        ask_at(f"http://{number}.example")
    assert servers[0].open <= 2


@pytest.mark.parametrize("answer", ["HTTP/1.1 200 {echo}", "{echo} 200 OK", "HTTP/1.1 {echo}"])
def test_a_token_in_a_broken_answer_is_not_said(
    ask: Asker, tmp_path: Path, wire: Callable[..., Wire], answer: str
) -> None:
    """A server that puts what it was sent into its status line."""
    said: list[bytes] = []
    ask.at(wire(lambda _, connection: connection.sendall(said[0])).url)
    value = ask.environment.token.get().value
    said.append((answer.format(echo=f"Bearer {value}") + "\r\n\r\n").encode())
    with pytest.raises((FAILED, LATER)) as raised:
        ask("a")
    assert value[:100] not in str(raised.value)


@pytest.mark.parametrize(
    ("link", "asked"),
    [
        ("https://host/a;?x=1", "https://host/a;?x=1"),
        ("https://me:secret@host/x?sig=a%2Fb@c#part", "https://host/x?sig=a%2Fb@c"),
    ],
)
def test_an_address_is_asked_to_the_letter_but_without_a_user(link: str, asked: str) -> None:
    assert chili.cleaned(link) == asked
