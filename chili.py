"""GraFx: the token, the question about a task, the download. Knows nothing of the queue.

The way in is `order_done`, after what it uses: `Connections` and their `Answer`, the token, `GraFx`.

Facts about GraFx are from CHILI's documentation (github.com/chili-publish/grafx-documentation,
August 2026), its workshop "Building a template store", section 14, and RFCs where one is named.
Where those are silent, the code holds either way.

Requests makes the pools of connections, by the proxies and certificates that the environment names,
and cleans addresses. The pools themselves are asked directly: a question costs 0.17 ms that way, 0.32
by `HTTPAdapter.send` and 0.57 by `Session.get` (CPU of one thread). So this leans on some of urllib3 that
requests does not pin: `urlopen` and `ConnectionCls` of a pool, `response_class` of a connection,
`length_remaining`, `chunked`, `tell`, `drain_conn`, `release_conn` of a response; and on two private steps of
`http.client.HTTPResponse`, `_read_status` and `_close_conn`, see `_FinalResponse`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import http.client
import json
import logging
import os
import re
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import HTTPResponse, Retry, Timeout
from urllib3.exceptions import HTTPError, MaxRetryError, ProxyError

AUDIENCE = "https://chiligrafx.com"
TIMEOUT = Timeout(connect=10.0, read=30.0)  # seconds; read: between two pieces of an answer
ANSWER_TIME = 60.0  # seconds for a whole small answer, and for each PIECE of a file
PIECE = 64 * 1024  # bytes; with ANSWER_TIME: slower than 1 KiB/s counts as stuck
ANSWER_SIZE = 1024 * 1024  # bytes of an answer that is not a file; GraFx's are below 10 kB
LONGEST_PAUSE = 300.0  # seconds: the most that a Retry-After is obeyed
TOKEN_MARGIN = 300.0  # seconds before its end that a token is renewed
REDIRECTS = 5
NOBODYS = "00000000-0000-0000-0000-000000000000"  # no task has this id
SERVERS = 10  # whose connections are kept
HEADERS = {"Accept": "application/json, */*", "Accept-Encoding": "identity", "User-Agent": "grafx-poller"}

# extension: Content-Types, and what the file begins with (mp4: from its fifth byte)
FORMATS = {
    "png": (("image/png",), (b"\x89PNG\r\n\x1a\n",)),
    "jpg": (("image/jpeg", "image/jpg"), (b"\xff\xd8\xff",)),
    "pdf": (("application/pdf",), (b"%PDF-",)),
    "gif": (("image/gif",), (b"GIF87a", b"GIF89a")),
    "mp4": (("video/mp4",), (b"ftyp",)),
    "zip": (("application/zip", "application/x-zip-compressed"), (b"PK\x03\x04", b"PK\x05\x06")),
}
NO_TYPE = ("", "application/octet-stream", "binary/octet-stream")
PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"

GRAFX, TOKEN_SERVER, DOWNLOAD = "GraFx", "the token server", "the download's server"  # who is asked

log = logging.getLogger("chili")
Progress = Callable[[int, "int | None"], None]  # bytes so far, bytes in all where GraFx says so
_secrets: deque[str] = deque(maxlen=32)  # the last tokens and the secret: what `plain` takes out


class OrderRefused(Exception):
    """The answer speaks of this order: GraFx could not render it, does not know it, lost it.

    status: the HTTP status. final: no use to ask again, whereas all else may be a passing fault.
    """

    def __init__(self, message: str, status: int | None = None, final: bool = False) -> None:
        super().__init__(message)
        self.status, self.final = status, final


class AskAgainLater(Exception):
    """Not the order's fault.

    shared: it stands in every order's way. pause: seconds that GraFx wants to be left alone, by all orders.
    """

    def __init__(self, message: str, shared: bool = False, pause: float | None = None) -> None:
        super().__init__(message)
        self.shared, self.pause = shared, pause


class CannotWrite(AskAgainLater):
    """The orders folder takes no file."""


class CredentialsRefused(AskAgainLater):
    """The token endpoint does not take SERVER_ID and SERVER_SECRET."""


# --- words -----------------------------------------------------------------------------------


def plain(said: Any) -> str:
    """A server's words, fit for a log: one line, no control characters, no secret, not too long."""
    text = str(said)
    for secret in _secrets.copy():  # which a server may echo; a copy, since other threads add to it
        text = text.replace(secret, "[secret]")
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:500]


def human(size: float) -> str:
    """Bytes as "7.6 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _reason(error: BaseException) -> str:
    """What the innermost cause says: "Connection refused", without addresses, which may be secret."""
    inner: BaseException | None = error
    while inner:
        error = inner
        causes = (*error.args, getattr(error, "reason", None), error.__cause__)
        inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    text = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
    return plain(text) or type(error).__name__


# --- addresses -------------------------------------------------------------------------------


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError for what is no http or https address."""
    parts = urlsplit("/".join(url.split("/", 3)[:3]))  # which remembers what does not differ for each task
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("no http address")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def cleaned(url: str) -> str:
    """`url` as requests makes it, without a user's name and password, and without its fragment.

    Raises ValueError for what is no http or https address.
    """
    request = requests.PreparedRequest()
    request.prepare_url(url, None)
    url = str(request.url).partition("#")[0]
    origin(url)
    user, at, _ = url.split("/", 3)[2].rpartition("@")
    return url.replace(user + at, "", 1)  # all else to the letter: it may be signed


# --- one request -----------------------------------------------------------------------------


def _end(sock: Any) -> None:
    """Let nothing more be read from a socket, in whatever thread."""
    with contextlib.suppress(OSError, TypeError):
        # Below TLS, so no waiting for a goodbye. TLS inside TLS, by a proxy, is no socket itself.
        socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_RDWR)


class _FinalResponse(http.client.HTTPResponse):
    """The answer itself: not an interim one before it, and with nothing behind it."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._sock = sock

    def _read_status(self) -> Any:
        # RFC 9110, section 15.2: a client reads past any number of interim answers. http.client knows
        # 100 only; for it a 103 would be the answer, and the real one that of the next question.
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)

    def _close_conn(self) -> None:
        """The answer has ended. Whoever has sent more than that is not listened to any more."""
        timeout = self._sock.gettimeout()
        with contextlib.suppress(OSError, ValueError):
            self._sock.settimeout(0)  # so that `peek` waits for nothing
            if self.fp.peek(1):
                _end(self._sock)
        with contextlib.suppress(OSError):
            self._sock.settimeout(timeout)
        super()._close_conn()  # type: ignore[misc]


class Connections(HTTPAdapter):
    """Kept-alive connections for `size` threads, each with a time by which its answer must be in.

    A read timeout bounds one `recv`; an answer that trickles passes it for ever, and holds its
    thread. So the socket is kept at hand here, and another thread calls `cut`.
    """

    def __init__(self, size: int) -> None:
        super().__init__(pool_connections=1, pool_maxsize=size)
        # Looked up once: to find a server's proxy and its certificates is slow. urllib3 closes the idle
        # connections of a pool that nobody has any more.
        self._pool = functools.lru_cache(SERVERS)(self._new_pool)
        self._reading: dict[int, tuple[float, socket.socket]] = {}  # thread: (monotonic, its socket)

    def ask(
        self, who: str, method: str, url: str, headers: dict[str, str], body: str | None = None
    ) -> Answer:
        """An answer, its body unread. `url` is a `cleaned` one; `who` is asked, as a person would say it.

        Raises AskAgainLater, shared where there is no way to GraFx or to the token server. No `Session`: it
        would let ~/.netrc replace the token, carry cookies from one order to the next, and read a redirect's
        body whatever its size.
        """
        began = time.monotonic()
        outcome, pool = "", None
        *server, path = url.split("/", 3)
        try:
            pool = self._pool("/".join(server))
            target = url if pool.proxy and url.startswith("http:") else f"/{path}"
            response = pool.urlopen(
                method, target, body, headers, timeout=TIMEOUT, retries=self.max_retries, redirect=False,
                assert_same_host=False, preload_content=False, decode_content=False,
            )  # fmt: skip
            outcome = response.status
            return Answer(self, response, url, who)
        except (HTTPError, http.client.HTTPException, ValueError, OSError) as error:  # requests' are OSErrors
            self.done()
            trouble = _no_answer(who, origin(url)[1], pool and pool.proxy, error)
            outcome = str(trouble)
            raise trouble from None
        finally:
            if log.isEnabledFor(logging.DEBUG):  # no query: a signed link's signature is a secret, too
                took = (time.monotonic() - began) * 1000
                log.debug("%s %s: %s, %.0f ms", method, plain(url.partition("?")[0]), outcome, took)

    def _new_pool(self, server: str) -> Any:
        scheme, host, port = origin(server)  # NO_PROXY may name the port
        url = f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"
        found = requests.Session().merge_environment_settings(url, {}, None, None, None)
        bundle = DEFAULT_CA_BUNDLE_PATH if found["verify"] is True else str(found["verify"])
        if not Path(bundle).exists():
            raise OSError(f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE is no file or folder: {bundle}")
        request = requests.Request("GET", url).prepare()
        try:
            pool: Any = self.get_connection_with_tls_context(request, bundle, found["proxies"])
        except (TypeError, ValueError):  # its text may have the proxy's password in it
            raise OSError("HTTPS_PROXY or HTTP_PROXY is no address of an HTTP proxy") from None
        expect = self.expect

        class Connection(type(pool).ConnectionCls):  # type: ignore[misc]
            def response_class(self, sock: Any, *args: Any, **kwargs: Any) -> Any:
                expect(sock)  # also for a proxy's answer to CONNECT
                return _FinalResponse(sock, *args, **kwargs)

        pool.ConnectionCls = Connection
        return pool

    def expect(self, sock: socket.socket | None = None) -> None:
        """This thread now waits for the next piece of its answer, from `sock` or the last one."""
        thread = threading.get_ident()
        self._reading[thread] = (time.monotonic() + ANSWER_TIME, sock or self._reading[thread][1])

    def cut(self, everything: bool = False) -> None:
        """End the answers that are overdue, or all; their threads go on with an AskAgainLater."""
        for deadline, sock in list(self._reading.values()):
            if everything or time.monotonic() > deadline:
                _end(sock)

    def done(self) -> None:
        """This thread waits for no answer now."""
        self._reading.pop(threading.get_ident(), None)


def _no_answer(who: str, host: str, proxy: Any, error: Exception) -> AskAgainLater:
    """Why there is no answer at all, by its own name: GraFx, the token server, or a proxy in between."""
    # MaxRetryError, with no retries: it was the connecting that failed, which is no order's own.
    reason, connecting = _reason(error), isinstance(error, MaxRetryError)
    if proxy and isinstance(getattr(error, "reason", None), ProxyError):
        return AskAgainLater(f"the proxy {proxy.host}:{proxy.port} is unreachable: {reason}", shared=True)
    if proxy and reason.startswith("Tunnel connection failed"):
        trouble = f"the proxy {proxy.host}:{proxy.port} lets nobody through: {reason}"
        return AskAgainLater(trouble, shared=True)
    trouble = f"{who} {'is unreachable' if connecting else 'gave no answer'}: {host}: {reason}"
    return AskAgainLater(trouble, shared=connecting and who != DOWNLOAD)


class Answer:
    """An answer, its body unread: `with … as answer:`.

    Leaving the block ends it, and decides alone whether its connection is used again: only where the block
    was not left by an exception (so the answer was understood), where it is no 4xx or 5xx, and where it was
    read to its end. On all others somebody may have more to say, which the next order would hear.
    """

    def __init__(self, connections: Connections, response: HTTPResponse, url: str, who: str) -> None:
        self.status, self.headers, self.url, self.who = response.status, response.headers, url, who
        self.location = response.get_redirect_location() or ""
        self._connections, self._response = connections, response
        # By itself it would let another thread have its connection as soon as it is read.
        response.release_conn = lambda: None  # type: ignore[method-assign]

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, problem: type[BaseException] | None, *_: object) -> None:
        if self.status == 204:
            self._response.drain_conn()  # nothing; `pieces` would do, but takes three times as long
        if problem is None and self.status < 400 and self._response.isclosed():
            HTTPResponse.release_conn(self._response)
        self._response.close()  # and its connection, where it is not given back
        self._connections.done()

    def __str__(self) -> str:
        return f"{self.status} {http.client.responses.get(self.status, '')}".strip()

    def must_end(self) -> None:
        """Raises AskAgainLater where it ends with its connection: one that is cut off would look whole."""
        if self._response.length_remaining is None and not self._response.chunked:
            raise AskAgainLater("the answer has neither a length nor an end that shows it is whole")

    @property
    def coding(self) -> str:
        """Its Content-Encoding. Nobody asked for one, but some gateways do it anyway."""
        coding = self.headers.get("Content-Encoding", "").strip().lower()
        return "" if coding == "identity" else coding.removeprefix("x-")

    def total(self) -> int | None:
        """Bytes of its body, where it says so."""
        return None if self.coding else self._response.length_remaining

    def pieces(self) -> Iterator[bytes]:
        """The body, PIECE bytes at a time, fewer at its end. Raises AskAgainLater where it is not whole."""
        if self.coding not in ("", "gzip"):
            raise AskAgainLater(f"the answer is coded as {plain(self.coding)[:40]}, which nobody asked for")
        # urllib3's own decoding says nothing of a stream that ends too early.
        source: Any = gzip.GzipFile(fileobj=self._response) if self.coding else self._response
        total = self._response.length_remaining
        try:
            while piece := source.read(PIECE):
                self._connections.expect()
                yield piece
        except (HTTPError, http.client.HTTPException, OSError, EOFError, zlib.error) as error:
            came = human(self._response.tell())
            if total:
                unit = human(total).partition(" ")[2]
                came = f"{came.removesuffix(f' {unit}')} of {human(total)}"
            cause = error.args[-1] if error.args else None
            said = "" if isinstance(cause, http.client.IncompleteRead) else f" ({_reason(error)})"
            raise AskAgainLater(f"the answer broke off: {came} came{said}") from None

    def json(self) -> dict[str, Any]:
        """A small answer's JSON object; empty for all else, and for more than ANSWER_SIZE."""
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if len(body) > ANSWER_SIZE:
                return {}
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            return {}
        return said if isinstance(said, dict) else {}

    def pause(self) -> float | None:
        """Seconds, from either form of Retry-After, RFC 9110, section 10.2.3; else None."""
        try:
            seconds = Retry().get_retry_after(self._response)
        except (HTTPError, ValueError, OverflowError):
            return None
        return None if seconds is None else min(seconds, LONGEST_PAUSE)

    def redirect(self) -> str:
        """Where else to ask, by its `location`. Raises AskAgainLater."""
        self.json()  # so that the connection can be used again
        try:
            return cleaned(urljoin(self.url, self.location))
        except ValueError:
            raise AskAgainLater("redirected to what is no http address") from None

    def trouble(self, what: str = "") -> OrderRefused | AskAgainLater:
        """What an answer that is neither 200 nor 204 means, in one line, for the caller to raise.

        Raises AskAgainLater where its body breaks off.
        """
        plainly = f"{what}{self.who} answered {self}"
        passing = self.status in (401, 407, 408, 425, 429) or not 400 <= self.status <= 500
        problem = {} if passing else self.json()  # RFC 9457
        said = ": ".join(plain(problem[key]) for key in ("title", "detail") if problem.get(key))
        if passing or (self.status == 500 and not said):
            return AskAgainLater(plainly, pause=self.pause() if self.who == GRAFX else None)
        return OrderRefused(what + said if said else plainly, self.status)


class Pace:
    """Not faster than GraFx allows: a time between two requests, 0 until it refuses one for being too many.

    As TCP and Postfix do it: twice as slow after a refusal, a little faster after each good answer. So it
    finds a limit that nobody has told it, stays near it, and forgets it when it is gone.
    """

    SLOWER, FASTER = 2.0, 1.03
    LONGEST, SHORTEST = 1.0, 0.001  # seconds; a refusal doubles at least the shortest
    IDLE = 0.05  # seconds: longer than that it was not GraFx that was waited for

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._between = 0.0  # seconds from one request to the next
        self._usual = 0.0  # what it is by itself, a mean of the last ones
        self._last = self._slowed = 0.0  # monotonic

    def wait(self) -> float:
        """Wait for this thread's turn; returns when it took a place in the queue, in monotonic seconds."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._last + self._between)
            self._usual += (min(turn - self._last, self.IDLE) - self._usual) / 8
            self._last = turn
        if turn > now:
            time.sleep(turn - now)
        return now

    def heard(self, status: int, asked: float) -> None:
        """Learn from the answer to who was in the queue since then."""
        with self._lock:
            if status in (429, 503):
                if asked >= self._slowed:  # else it was on its way when another one was refused
                    slower = self.SLOWER * max(self._between, self._usual, self.SHORTEST)
                    self._between, self._slowed = min(self.LONGEST, slower), time.monotonic()
            elif status < 400:
                self._between /= self.FASTER


# --- the token -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Token:
    value: str = field(repr=False)
    renew: float  # monotonic seconds, as is the next
    ends: float
    worked: bool = False  # GraFx has taken it


class DangerousToken:
    """The workshop's "dangerous" token: whoever has it can do what the integration can.

    Kept in memory only, shared by all threads, renewed by itself.
    """

    def __init__(self, connections: Connections, token_url: str, client_id: str, client_secret: str) -> None:
        self._connections, self._url = connections, token_url
        self._id, self._secret = client_id, client_secret
        self._lock = threading.Lock()
        self._token: _Token | None = None
        self._error: tuple[float, AskAgainLater] | None = None
        self.issued = False  # whether there ever was one
        _secrets.append(client_secret)

    def get(self, refused: _Token | None = None) -> _Token:
        """The token, fetched where there is none, where its end is near, or where it was `refused`.

        Raises CredentialsRefused, AskAgainLater.
        """
        began = time.monotonic()
        with self._lock:
            token = self._token
            # By identity: the endpoint caches, so that a new fetch may bring the same text again.
            if token is None or token is refused or time.monotonic() >= token.renew:
                if self._error and began < self._error[0]:
                    raise self._error[1]  # failed while this thread waited, or is to be left alone
                try:
                    token = self._token = self._fetch()
                except AskAgainLater as error:
                    self._error = (time.monotonic() + (error.pause or 0.0), error)
                    if token is None or token is refused or time.monotonic() >= token.ends:
                        raise
                    # It is still good for a while.
                    pause = max(TOKEN_MARGIN / 10, error.pause or 0.0)
                    token.renew = min(token.ends, time.monotonic() + pause)
            return token

    def _fetch(self) -> _Token:
        form = {"grant_type": "client_credentials", "audience": AUDIENCE}
        form |= {"client_id": self._id, "client_secret": self._secret}
        headers = HEADERS | {"Content-Type": "application/json"}
        try:
            url = cleaned(self._url)
            with self._connections.ask(TOKEN_SERVER, "POST", url, headers, json.dumps(form)) as answer:
                return self._read(answer, answer.json())
        except CredentialsRefused:
            raise
        except AskAgainLater as error:
            raise AskAgainLater(f"no token: {error}", shared=True, pause=error.pause) from None

    def _read(self, answer: Answer, said: dict[str, Any]) -> _Token:
        # RFC 6749, section 5.2: a refusal has its own words. Without them it is a gateway's.
        if answer.status in (400, 401, 403) and isinstance(said.get("error"), str):
            words = plain(said.get("error_description") or said["error"])
            raise CredentialsRefused(
                f"{self._url} refuses SERVER_ID and SERVER_SECRET: {answer} {words}".rstrip(),
                shared=True,
                pause=answer.pause(),
            )
        value, lasts = said.get("access_token"), said.get("expires_in")
        # RFC 6750, section 2.1. Anything else in a header would end up in an exception's text.
        if answer.status != 200 or not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
            without = " without one" * (answer.status == 200)
            raise AskAgainLater(f"{self._url} answered {answer}{without}", pause=answer.pause())
        if not isinstance(lasts, (int, float)) or not 0 < lasts < 1e9:
            lasts = 3600  # where it ends earlier, a 401 tells
        self.issued = True
        _secrets.extend((self._secret, value))
        now = time.monotonic()
        return _Token(value, now + lasts - min(TOKEN_MARGIN, lasts / 2), now + lasts)


# --- one environment -------------------------------------------------------------------------


class GraFx:
    """One environment of GraFx: where it is, the token for it, the connections to it.

    size: so many threads ask at once. Raises ValueError for what is no http or https address.
    """

    def __init__(
        self,
        base_url: str,
        environment: str,
        token_url: str,
        client_id: str,
        client_secret: str,
        size: int = 1,
    ) -> None:
        self.base_url, self.home = base_url, origin(base_url)
        # The address of a task, without its id; cleaned once, since each question begins with it.
        self.tasks = cleaned(
            f"{base_url}/grafx/api/v1/environment/{quote(environment, safe='')}/output/tasks/"
        )
        self.connections, self.pace = Connections(size), Pace()
        self.token = DangerousToken(self.connections, token_url, client_id, client_secret)

    def get(self, url: str) -> Answer:
        """GET, redirects followed; the token goes along to this environment's server and nowhere else.

        Raises AskAgainLater, OrderRefused.
        """
        for _ in range(REDIRECTS + 1):
            # Compared is what requests made of the address, since that is where it connects to:
            # it and urlsplit do not agree on whose "http://one\\@two/" is.
            scheme, host, port = where = origin(url)
            if (self.home[0], scheme, host) == ("https", "http", self.home[1]) and port in (80, self.home[2]):
                # A server behind a TLS proxy may not know that it is.
                url = urlsplit(url)._replace(scheme="https", netloc=urlsplit(self.base_url).netloc).geturl()
                where = self.home
            if where == self.home:
                answer = self._ask_home(url)
            else:
                answer = self.connections.ask(DOWNLOAD, "GET", url, HEADERS)
            if not answer.location:
                return answer
            with answer:
                url = answer.redirect()
        raise AskAgainLater("redirected in circles")

    def _ask_home(self, url: str) -> Answer:
        """With the token; where that is refused, with a new one. Raises AskAgainLater, OrderRefused."""
        refused = None
        while True:
            token = self.token.get(refused)
            answer = self._ask_with(token, url)
            if answer.status != 401:
                return answer
            with answer:
                if (refused or token.worked) and self._takes(token):
                    raise OrderRefused("GraFx takes the token for other tasks, but not for this one", 401)
                if refused:
                    raise AskAgainLater("GraFx refuses a token that is new: 401 Unauthorized", shared=True)
            refused = token

    def _takes(self, token: _Token) -> bool:
        """Whether GraFx takes the token for a task that cannot exist: then a 401 was the order's own."""
        with self._ask_with(token, self.tasks + NOBODYS) as answer:
            return answer.status < 300 or answer.status in (403, 404)

    def _ask_with(self, token: _Token, url: str) -> Answer:
        turn = self.pace.wait()
        answer = self.connections.ask(GRAFX, "GET", url, HEADERS | {"Authorization": f"Bearer {token.value}"})
        self.pace.heard(answer.status, turn)
        token.worked = token.worked or answer.status < 400
        return answer


def try_out(grafx: GraFx) -> str:
    """Ask about a task that cannot exist; returns what is fine. Raises AskAgainLater, OrderRefused."""
    mend = "look at BASEURL and ENVIRONMENT, and whether the integration may read output"
    with grafx.get(grafx.tasks + NOBODYS) as answer:
        if origin(answer.url) != grafx.home:
            raise AskAgainLater(f"{grafx.base_url} redirects to {origin(answer.url)[1]}: look at BASEURL")
        said = answer.json()
        if answer.status == 204 or (answer.status in (200, 404) and said):
            return f"{grafx.base_url} answers"
        words = "without a word of GraFx's own"
        if said:
            words = plain(said.get("detail") or said.get("title") or "")
        raise AskAgainLater(f"{grafx.base_url} answered {answer} {words}".rstrip() + f": {mend}")


# --- the order -------------------------------------------------------------------------------


def order_done(
    task_id: str, grafx: GraFx, orders_dir: Path, progress: Progress = lambda done, total: None
) -> bool:
    """Ask about a task; where it is finished, bring its file to `<orders_dir>/<task_id>.<ext>`.

    Returns True once the file is whole and on the disk, False while GraFx answers 204.
    Raises OrderRefused, AskAgainLater.
    """
    with grafx.get(grafx.tasks + task_id) as answer:
        if answer.status == 204:
            return False
        if answer.status != 200:
            raise answer.trouble()
        link = _download_link(answer, task_id)
    with grafx.get(link) as answer:
        if answer.status == 410:
            raise OrderRefused("no longer available: GraFx keeps a file for 4 hours", 410, final=True)
        if answer.status != 200:
            raise answer.trouble("the download: ")
        _save(answer, orders_dir, task_id, progress)
    return True


def _download_link(answer: Answer, task_id: str) -> str:
    """Where a finished task's file is. Raises OrderRefused, AskAgainLater."""
    said = answer.json()
    data = said.get("data")
    about = data.get("taskId") if isinstance(data, dict) else None
    if isinstance(about, str) and about.casefold() != task_id.casefold():
        raise AskAgainLater(f"the answer was another task's: {plain(about)[:80]}")
    try:
        return cleaned(said["links"]["download"])
    except (KeyError, TypeError, ValueError):
        answer.must_end()
        raise OrderRefused("GraFx says finished, but gives no download link", 200) from None


# --- the file --------------------------------------------------------------------------------


def find_file(orders_dir: Path, task_id: str) -> Path | None:
    """The file of a task where it has been delivered."""
    for extension in FORMATS:
        name = f"{orders_dir}/{task_id}.{extension}"  # as text, since pathlib takes ten times as long
        if os.access(name, os.F_OK) and Path(name).is_file():
            return Path(name)
    return None


def is_here(orders_dir: Path, task_id: str) -> bool:
    """Whether a task's file is here: its order was not noted as delivered, or is to be handed over again.

    It is whole, since it has its final name; but where a process was killed right after the rename perhaps
    not yet for ever, so that is made sure of. Raises AskAgainLater.
    """
    here = find_file(orders_dir, task_id) is not None
    if here:
        _sync_folder(orders_dir)
    return here


def remove_leftovers(orders_dir: Path) -> None:
    """Remove what a killed process left half written. Raises OSError."""
    for path in orders_dir.glob(".*.part"):
        path.unlink(missing_ok=True)


def _save(answer: Answer, orders_dir: Path, task_id: str, progress: Progress) -> None:
    """Stream the body to its place. Raises OrderRefused, AskAgainLater; then nothing is left of it."""
    answer.must_end()
    total = answer.total()
    temp = orders_dir / f".{task_id}.part"
    says = answer.headers.get("Content-Type", "")
    size, extension, first, last = 0, "", b"", b""
    try:
        # The order of these steps is the promise: nothing has its final name before it is whole and
        # on the disk, and the caller forgets the order only after the name is on the disk as well.
        with temp.open("wb") as file:
            for piece in answer.pieces():
                file.write(piece)
                size, first, last = size + len(piece), (first + piece)[:16], (last + piece)[-len(PNG_END) :]
                # Fewer than 16 may be all that came before it breaks off, which says nothing of the file.
                extension = extension or (_extension(says, first) if len(first) == 16 else "")
                progress(size, total)
            extension = extension or _extension(says, first)
            if extension == "png" and last != PNG_END:
                raise OrderRefused("the PNG has no end", 200)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(orders_dir / f"{task_id}.{extension}")
        _sync_folder(orders_dir)
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            place = error.filename2 or error.filename
            raise AskAgainLater(f"{place} is a folder, where the file belongs: move it away") from None
        raise _unwritable(orders_dir, error) from None
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def _extension(content_type: str, first: bytes) -> str:
    """The extension by type and first bytes. Raises OrderRefused where the file is not what it says."""
    content_type = plain(content_type.partition(";")[0]).lower()[:80]
    starts = (first, first[4:])
    looks = next((ext for ext, (_, magic) in FORMATS.items() if starts[ext == "mp4"].startswith(magic)), "")
    says = next((ext for ext, (types, _) in FORMATS.items() if content_type in types), "")
    if not first:
        raise OrderRefused("the file is empty", 200)
    if content_type not in NO_TYPE and not (says and says == looks):
        raise OrderRefused(f"the file says {content_type} but is {looks or 'something else'}", 200)
    if not looks:
        raise OrderRefused(f"the file is none of {', '.join(FORMATS)}", 200)
    return looks


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Raises AskAgainLater."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> AskAgainLater:
    if error.errno == errno.EFBIG:  # others may be smaller
        return AskAgainLater(f"cannot write to {folder}: {error.strerror}: raise the limit (ulimit -f)")
    mends = {errno.ENOENT: ": make it", errno.ENOTDIR: ": make it a folder"}
    mends |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": make room")
    mends |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ": mend its permissions")
    return CannotWrite(
        f"cannot write to {folder}: {error.strerror}{mends.get(error.errno or 0, '')}", shared=True
    )
