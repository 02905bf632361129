"""chili.order_done against a GraFx environment: the token, the poll, the download."""

from __future__ import annotations

import email.utils
import gzip
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, Relay, Wire, eventually
from sandbox import PAGE, TYPES, Answer, Request, Sandbox, skipped

import chili

REJECTED, LATER = chili.TaskRejected, chili.TryAgainLater
Servers = Callable[..., Wire]
GUID = "84ad7436-f82f-4e87-8cd3-37299e37878c"


class Client:
    """One environment of GraFx and an orders folder; a call polls a task and downloads its file."""

    def __init__(self, grafx: Sandbox, folder: Path) -> None:
        self.grafx, self.folder = grafx, folder
        self.folder.mkdir()
        self.connect()

    def connect(self, baseurl: str = "", token_url: str = "") -> None:
        """From now on with new connections and a new token, and perhaps to other servers."""
        urls = baseurl or self.grafx.base_url, self.grafx.environment, token_url or self.grafx.token_url
        self.environment = chili.GraFx(*urls, self.grafx.client_id, self.grafx.client_secret)

    def __call__(self, task_id: str) -> Path | None:
        return chili.order_done(task_id, self.environment, self.folder)

    def delivers(self, task_id: str, extension: str = "png") -> bool:
        """Whether a poll ends with the whole file, under the right name."""
        file = self(task_id)
        assert file == self.folder / f"{task_id}.{extension}"
        return file.read_bytes() == self.grafx.body(task_id)

    def fails(self, task_id: str) -> chili.TaskRejected | chili.TryAgainLater:
        """The exception that a poll ends with. It leaves no file, and tells no secret."""
        files = set(self.folder.iterdir())
        with pytest.raises((REJECTED, LATER)) as raised:
            self(task_id)
        assert set(self.folder.iterdir()) == files
        text = f"{raised.value} {raised.value!r}"
        assert "\n" not in text
        assert not [one for one in (*self.grafx.tokens, self.grafx.client_secret) if one[:40] in text]
        return raised.value


@pytest.fixture(autouse=True)
def no_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


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
    return Client(server, tmp_path / "orders")


# --- the file --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_a_finished_task_is_delivered_byte_for_byte(poll: Client, kind: str) -> None:
    task, other = poll.grafx.add(kind, size=100_000, questions=1), poll.grafx.add(kind)
    assert poll(task) is None
    assert not any(poll.folder.iterdir())
    assert poll.delivers(task, kind)
    assert [request.status for request in poll.grafx.asked("task")] == [204, 200]
    # A file that is here is neither asked for nor downloaded again.
    number = len(poll.grafx.requests)
    assert poll.delivers(task, kind)
    assert len(poll.grafx.requests) == number
    # Where the server does not say what a file is, its first bytes do.
    poll.grafx.fault("download", "octet")
    assert poll.delivers(other, kind)


def test_a_type_may_be_said_in_other_words(poll: Client) -> None:
    says = {"png": "Image/PNG; q=1", "jpg": "image/jpg", "zip": "application/x-zip-compressed"}
    for kind, said in says.items():
        poll.grafx.fault("download", "wrong-type", type=said)
        assert poll.delivers(poll.grafx.add(kind), kind)


@pytest.mark.parametrize(("fault", "options"), [("gzip-far", {}), ("coding", {"value": "gzip"})])
def test_gzip_is_undone_where_there_is_any(poll: Client, fault: str, options: Any) -> None:
    """Nobody asks for it. Some gateways name it all the same, also where they have undone it."""
    whole = poll.grafx.body(poll.grafx.add())
    filler = skipped("png", bytes(200_000))  # so well packed that it is unpacked in several steps
    poll.grafx.fault("download", fault, **options)
    assert poll.delivers(poll.grafx.add(body=whole[:-12] + filler + whole[-12:]))


@pytest.mark.parametrize("fault", ["length-long", "reset", "close", "chunked-cut", "close-end", "gzip-cut"])
def test_a_file_that_breaks_off_is_never_delivered(poll: Client, fault: str) -> None:
    """Here a JPEG, whose end nobody looks at."""
    task = poll.grafx.add("jpg", size=300_000)
    poll.grafx.fault("download", fault, **({"at": 100_000} if fault in ("reset", "close") else {}))
    error = poll.fails(task)
    assert isinstance(error, LATER)
    assert re.match("the answer (broke off after|has neither a Content-Length nor chunks)", str(error))
    assert poll.delivers(task, "jpg")


# --- what GraFx says -------------------------------------------------------------------------


@pytest.mark.parametrize("link", [5, "file:///etc/passwd", "http://[::1", "http://127.0.0.1:99999/"])
def test_an_answer_without_a_link_that_can_be_followed_rejects_the_task(poll: Client, link: Any) -> None:
    task = poll.grafx.add()
    poll.grafx.fault("task", "bad-link", link=link)
    error = poll.fails(task)
    assert isinstance(error, REJECTED)
    assert (error.status, error.own_reason, error.final) == (200, False, False)
    assert poll.delivers(task)


@pytest.mark.parametrize("data", [{"taskId": GUID.upper()}, {"taskId": None}, {}])
def test_an_answer_may_name_no_task_and_a_relative_link(poll: Client, data: Any) -> None:
    poll.grafx.add(task_id=GUID)
    value = {"data": data, "links": {"download": f"{GUID}/download"}}
    poll.grafx.fault("task", "other-json", value=value)
    assert poll.delivers(GUID)


def test_a_redirect_whose_gzip_body_breaks_off_is_not_understood(poll: Client, wire: Servers) -> None:
    """requests reads it, although nobody asks for it."""
    body = gzip.compress(os.urandom(400_000))
    head = f"Location: /\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = b"HTTP/1.1 302 Found\r\n" + head.encode() + body[:200_000]
    elsewhere = wire(lambda _, connection: connection.sendall(answer))  # and it closes the connection
    assert isinstance(poll.fails(poll.grafx.add(link=f"{elsewhere.url}/file")), chili.NotUnderstood)


@pytest.mark.parametrize(("status", "kind"), [(500, LATER), (400, REJECTED), (401, LATER)])
def test_an_error_of_another_server_proves_nothing_and_renews_no_token(
    poll: Client, wire: Servers, status: int, kind: type[Exception]
) -> None:
    body = '{"title": "No such blob"}'
    answer = f"HTTP/1.1 {status} Oops\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    elsewhere = wire(lambda *_: answer)
    error = poll.fails(poll.grafx.add(link=f"{elsewhere.url}/file"))
    assert isinstance(error, kind)
    assert not getattr(error, "own_reason", False)
    assert not getattr(error, "shared", False)
    assert elsewhere.asked == ["GET /file HTTP/1.1"]
    assert len(poll.grafx.asked("token")) == 1


def test_a_rejection_says_in_one_line_what_grafx_said(poll: Client) -> None:
    detail = '{"title": "Line 1\\nLine 2\\u001b[31m\\u2028", "detail": "%s"}' % ("long " * 9999)
    task = poll.grafx.add()
    poll.grafx.fault("task", "status-500", body=detail.encode())
    said = f"image/\x1b[31m{poll.grafx.client_secret}\x07{'x' * 5000}"
    poll.grafx.fault("download", "wrong-type", type=said)
    for begins in ("Line 1 Line 2", "Content-Type is image/ [31m[secret] xxx"):
        error = poll.fails(task)
        assert str(error).startswith(begins)
        assert str(error).isprintable()
        assert len(str(error)) < 2000


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("9" * 400, 300), (200, pytest.approx(150, abs=50)), (-100, 0), ("soon", 0)],
)
def test_retry_after_is_understood(poll: Client, value: Any, seconds: Any) -> None:
    """In seconds, or as a date, here so many seconds from now."""
    if isinstance(value, int):
        value = email.utils.formatdate(time.time() + value, usegmt=True)
    for what, status in (("token", 429), ("task", 503), ("download", 425)):
        poll.connect()
        poll.grafx.fault(what, f"status-{status}", retry_after=value)
        error = poll.fails(poll.grafx.add())
        assert isinstance(error, LATER)
        assert error.retry_after == seconds, what


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "http://[::1", "http://\xff/"])
def test_a_redirect_to_what_is_not_an_http_address_is_retried(poll: Client, wire: Servers, to: str) -> None:
    answer = f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
    error = poll.fails(poll.grafx.add(link=f"{wire(lambda *_: answer).url}/file"))
    assert isinstance(error, LATER)
    assert "PROXY" not in str(error)


# --- the token -------------------------------------------------------------------------------


def test_one_token_is_shared_by_all_threads(poll: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """All notice that it was revoked, one fetches a new one, and all repeat their request."""
    monkeypatch.setattr(chili, "TOKEN_PAUSE", 0)
    with ThreadPoolExecutor(8) as threads:
        for number in range(1, 5):
            assert all(threads.map(poll, [poll.grafx.add() for _ in range(20)]))
            assert len(poll.grafx.asked("token")) == number
            poll.grafx.revoke()


@pytest.mark.parametrize("what", ["task", "download"])
def test_a_401_renews_the_token_and_repeats_the_request_but_once_a_minute(
    poll: Client, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    poll.grafx.fault(what, "status-401")
    assert poll.delivers(poll.grafx.add())
    assert [request.status for request in poll.grafx.asked(what)] == [401, 200]
    assert len(poll.grafx.asked("token")) == 2
    bad = poll.grafx.add()
    poll.grafx.fault(what, "status-401", times=None, task_id=bad)
    for _ in range(3):
        assert isinstance(poll.fails(bad), LATER)
    assert poll.delivers(poll.grafx.add())  # nobody else is held up
    assert len(poll.grafx.asked("token")) == 2
    monkeypatch.setattr(chili, "TOKEN_PAUSE", 0)  # as after a minute
    poll.fails(bad)
    assert len(poll.grafx.asked("token")) == 3


def test_a_renewal_that_fails_holds_up_nobody_while_the_old_token_is_good(poll: Client) -> None:
    """And it is tried once a minute. While the token server does not answer, one thread waits for it."""
    task = poll.grafx.add("never")
    assert poll(task) is None
    poll.grafx.fault("token", "status-429")
    poll.environment.token._renew = 0.0  # as in its last minutes
    assert [poll(task), poll(task)] == [None, None]
    assert [request.status for request in poll.grafx.asked("token")] == [200, 429]
    poll.grafx.fault("token", "hang")
    poll.environment.token._renew = 0.0
    waits = ThreadPoolExecutor(1).submit(poll, task)  # until the sandbox stops
    eventually(lambda: len(poll.grafx.asked("token")) == 3)
    assert (poll(task), waits.done()) == (None, False)


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("redirect-away", {}),
        ("echo-token", {}),
        ("status-401", {"body": PAGE, "content_type": "text/html"}),
        # A gateway's word, and a passing error of RFC 6749 (section 5.2).
        ("status-403", {"body": b'{"error": "Forbidden"}'}),
        ("status-400", {"body": b'{"error": "temporarily_unavailable"}'}),
        *(("other-json", {"value": {"access_token": token}}) for token in ("", None, [], "two\nlines", "é")),
    ],
)
def test_no_token_is_an_outage_and_no_wrong_credentials(poll: Client, fault: str, options: Any) -> None:
    poll.grafx.fault("token", fault, **options)
    task = poll.grafx.add()
    error = poll.fails(task)
    assert isinstance(error, LATER)
    assert error.shared
    assert not isinstance(error, chili.CredentialsRejected)
    assert "lines" not in str(error)
    assert poll.grafx.asked("elsewhere") == []
    assert poll.delivers(task)


def test_a_token_that_does_not_say_how_long_it_lasts_serves(poll: Client) -> None:
    task = poll.grafx.add("never")
    assert poll(task) is None
    for number, lasts in enumerate((None, "soon", -1, 1e400), 2):
        value = {"access_token": poll.grafx.tokens[0], "expires_in": lasts}
        poll.grafx.fault("token", "other-json", value=value)
        poll.connect()
        assert [poll(task), poll(task)] == [None, None], lasts
        assert len(poll.grafx.asked("token")) == number, lasts


@pytest.mark.parametrize(
    "link",
    [
        "http://{home}@{elsewhere}/file/{task}",
        "http://{elsewhere}\\@{home}/file/{task}",
        "http://{home}\\@{elsewhere}/file/{task}",
    ],
)
def test_a_link_whose_host_is_anybodys_guess_takes_the_token_nowhere_else(poll: Client, link: str) -> None:
    home, elsewhere = (url.removeprefix("http://") for url in (poll.grafx.base_url, poll.grafx.elsewhere))
    poll.grafx.add(task_id=GUID, link=link.format(home=home, elsewhere=elsewhere, task=GUID))
    with suppress(REJECTED, LATER):
        poll(GUID)
    for request in poll.grafx.asked("elsewhere"):
        assert poll.grafx.tokens[0] not in str(request)


@pytest.mark.parametrize("answer", ["HTTP/1.1 502 {echo}", "{echo} 200 OK"])
def test_a_token_in_a_broken_answer_is_never_shown(poll: Client, wire: Servers, answer: str) -> None:
    """A server that puts what it was sent into its status line."""
    said: list[bytes] = []
    poll.connect(wire(lambda *_: said[0]).url)
    said.append((answer.format(echo=poll.environment.token.get()) + "\r\n\r\n").encode())
    poll.fails("task")


class Cookies(Sandbox):
    """Sets a cookie with each answer, for all paths."""

    def _right_answer(self, request: Request) -> Answer:
        answer = super()._right_answer(request)
        answer.headers["Set-Cookie"] = f"last={request.task_id or request.what}; Path=/"
        return answer


def test_neither_cookies_nor_passwords_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of ~/.netrc or of a link; also where a server redirects. The token goes to GraFx alone."""
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\ndefault login me password mine\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with Cookies() as grafx:
        poll = Client(grafx, tmp_path / "orders")
        for what in ("token", "task", "download"):
            fault = grafx.fault(what, "redirect-away")
            with suppress(REJECTED, LATER):
                poll(grafx.add())
            assert fault.times == 0
        assert poll.delivers(grafx.add())
        link = grafx.elsewhere.replace("//", "//me:hidden@") + "/file/there"
        assert poll.delivers(grafx.add(task_id="there", link=link))
        assert len(poll.grafx.asked("elsewhere")) == 3
        for request in grafx.requests:
            home = request.what in ("task", "download")
            sent = request.headers.get("Authorization")
            assert sent == (f"Bearer {grafx.tokens[0]}" if home else None), request
            assert "Cookie" not in request.headers, request


def test_an_address_is_requested_to_the_letter_but_without_a_user(
    poll: Client, wire: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be signed. Neither the user nor the signature is logged. The same goes for a redirect's."""
    caplog.set_level("DEBUG", "chili")

    def answer(line: str, connection: socket.socket) -> bytes:
        if line.startswith("GET /first"):
            return f"HTTP/1.1 302 Found\r\nLocation: {link % 'second'}\r\nContent-Length: 0\r\n\r\n".encode()
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"

    server = wire(answer)
    link = server.url.replace("http://", "HTTP://me:hidden@") + "/%s?sig=a%%2Fb@c#part"
    poll.fails(poll.grafx.add(link=link % "first;"))
    assert server.asked == [f"GET /{path}?sig=a%2Fb@c HTTP/1.1" for path in ("first;", "second")]
    assert "127.0.0.1/second: 404" in caplog.text
    assert not re.search("hidden|sig", caplog.text)


# --- https and proxies -----------------------------------------------------------------------


def test_http_links_of_an_https_environment(
    tls: Sandbox, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own are downloaded over https, also without the port; others as they are, without the token."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    poll = Client(tls, tmp_path / "orders")
    own = tls.root.replace("https:", "http:") + "/tasks"
    tls.add(task_id="own", link=f"{own}/own/download")
    tls.add(task_id="no-port", link=re.sub(r":\d+", "", own) + "/no-port/download")
    tls.add(task_id="other", link=f"{tls.elsewhere}/file/other")
    assert all(poll.delivers(task) for task in ("own", "no-port", "other"))
    assert "Authorization" not in tls.asked("elsewhere")[0].headers


def test_certificate_checks_cannot_be_turned_off(home: Home, tls: Sandbox) -> None:
    home.wait_for(tls.add())
    home.env |= tls.settings(home.folder)
    off = {"PYTHONHTTPSVERIFY": "0", "CURL_CA_BUNDLE": "", "REQUESTS_CA_BUNDLE": "", "SSL_VERIFY": "0"}
    ended = home.run("--once", **off, VERIFY="false")
    assert ended.process.returncode == 1
    assert "certificate" in ended.log()
    assert tls.requests == []


@pytest.mark.parametrize(
    ("scheme", "variable", "excepted", "asked"),
    [
        ("http", "HTTP_PROXY", "", ["GET", "GET", "POST"]),  # task, download, token
        ("https", "https_proxy", "", ["CONNECT"] * 3),
        ("https", "HTTPS_PROXY", "127.0.0.1", []),
    ],
)
def test_proxies_from_the_environment(
    home: Home, tls: Sandbox, certificate: Path, relay: type[Relay],
    scheme: str, variable: str, excepted: str, asked: list[str],
) -> None:  # fmt: skip
    proxy, sandbox = relay(), home.grafx if scheme == "http" else tls
    home.env |= sandbox.settings(home.folder)
    home.env |= {variable: proxy.url, "NO_PROXY": excepted, "REQUESTS_CA_BUNDLE": str(certificate)}
    task = sandbox.add()
    home.wait_for(task)
    ended = home.run("--once")
    assert ended.process.returncode == 0, ended.log()
    assert (home.orders / f"{task}.png").read_bytes() == sandbox.body(task)
    assert sorted(line.split()[0] for line in proxy.asked) == asked


NO_ADDRESS = "HTTP_PROXY is not the address of an HTTP proxy"


@pytest.mark.parametrize(
    ("name", "address", "says", "never"),
    [
        ("BASEURL", "http://{port}", "GraFx is unreachable", "token|proxy"),
        ("TOKEN_URL", "http://{port}/oauth", "no token: the token server is unreachable", "GraFx|proxy"),
        ("HTTP_PROXY", "http://me:hidden@{port}", "the proxy {port} is unreachable", "GraFx|token server"),
        ("ALL_PROXY", "socks5h://me:hidden@{port}", "ALL_PROXY is a SOCKS proxy, which needs: pip ", "HTTP"),
        ("HTTP_PROXY", "me:hidden@[::1", NO_ADDRESS, "ALL_PROXY|HTTPS_"),
        ("HTTP_PROXY", "http://me:hidd/en@{port}", NO_ADDRESS, "GraFx"),
    ],
)
def test_who_cannot_be_reached_is_named_without_a_password(
    poll: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    name: str, address: str, says: str, never: str,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG", "chili")
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        address = address.format(port=port)
        if name in ("BASEURL", "TOKEN_URL"):
            poll.connect(**{name.lower(): address})
        else:
            monkeypatch.setenv(name, address)
            nobody = f"http://{uuid.uuid4()}.invalid"
            poll.connect(nobody, f"{nobody}/oauth")
        error = poll.fails("task")
    assert isinstance(error, LATER)
    assert error.shared
    assert says.format(port=port) in str(error)
    assert not re.search(never, str(error))
    assert not re.search("me:|hidd|en@", f"{error}{caplog.text}")


# --- connections -----------------------------------------------------------------------------


def test_each_download_has_a_connection_of_its_own(poll: Client) -> None:
    """So nobody's late answer can be taken for a file. The polls share one."""
    for number in range(3):
        name = f"there-{number}"
        assert poll.delivers(poll.grafx.add())
        assert poll.delivers(poll.grafx.add(task_id=name, link=f"{poll.grafx.elsewhere}/file/{name}"))
    downloads = poll.grafx.asked("download") + poll.grafx.asked("elsewhere")
    peers = {request.peer for request in downloads}
    assert len(peers) == len(downloads) == 6
    others = {request.peer for request in poll.grafx.asked("task")}
    assert len(others) == 1
    assert not peers & others


@pytest.mark.parametrize(
    ("fault", "options", "kept"),
    [
        ("status-404", {"body": PAGE, "content_type": "text/html"}, True),
        ("gzip", {}, True),
        ("status-502", {}, False),
        ("other-task", {}, False),
        ("late", {"pause": 0}, False),
        ("chunked-cut", {}, False),
    ],
)
def test_an_answer_that_is_not_understood_drops_all_idle_connections(
    poll: Client, fault: str, options: Any, kept: bool
) -> None:
    """Another order's answer may be on its way on one of them. After any other answer they are kept."""
    number = 4
    never = [poll.grafx.add("never") for _ in range(number)]

    def peers() -> set[tuple[str, int]]:
        """Those of as many polls at the same time: none is answered before all are asked."""
        poll.grafx.fault("task", "delay", task_id=never, until=threading.Barrier(number), times=number)
        with ThreadPoolExecutor(number) as threads:
            assert list(threads.map(poll, never)) == [None] * number
        return {request.peer for request in poll.grafx.asked("task")[-number:]}

    before = peers()
    assert len(before) == number
    task = poll.grafx.add()
    poll.grafx.fault("task", fault, task_id=task, **options)
    with suppress(REJECTED, LATER):
        poll(task)
    after = peers()
    assert after == before if kept else not after & before
