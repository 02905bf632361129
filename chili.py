"""GraFx: the token, the question about a task, the download. Knows nothing of the queue.

Facts about GraFx are from CHILI's documentation (github.com/chili-publish/grafx-documentation,
August 2026), its workshop "Building a template store", section 14, and RFCs where one is named.
Where those are silent, the code holds either way.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
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
from http.client import HTTPException, responses
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import HTTPResponse, Timeout
from urllib3.exceptions import HTTPError, MaxRetryError

AUDIENCE = "https://chiligrafx.com"
TIMEOUT = Timeout(connect=10.0, read=30.0)  # seconds; read: between two pieces of an answer
ANSWER_TIME = 60.0  # seconds for a whole small answer, and for each PIECE of a file
PIECE = 64 * 1024  # bytes; with ANSWER_TIME: slower than 1 KiB/s counts as stuck
ANSWER_SIZE = 1024 * 1024  # bytes of an answer that is not a file; GraFx's are below 10 kB
LONGEST_PAUSE = 300.0  # seconds: the most that a Retry-After is obeyed
TOKEN_MARGIN = 300.0  # seconds before its end that a token is renewed
REDIRECTS = 5
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

log = logging.getLogger("chili")
Progress = Callable[[int, "int | None"], None]  # bytes so far, bytes in all where GraFx says so
_secrets: deque[str] = deque(maxlen=32)  # the last tokens and the secret: what `plain` takes out


class OrderFailed(Exception):
    """The answer speaks of this order: GraFx could not render it, does not know it, lost it.

    status: the HTTP status. final: no use to ask again, whereas all else may be a passing fault.
    """

    def __init__(self, message: str, status: int | None = None, final: bool = False) -> None:
        super().__init__(message)
        self.status, self.final = status, final


class AskAgainLater(Exception):
    """Not the order's fault.

    shared: it stands in every order's way. pause: seconds that GraFx wants to be left alone.
    """

    def __init__(self, message: str, shared: bool = False, pause: float | None = None) -> None:
        super().__init__(message)
        self.shared, self.pause = shared, pause


class CredentialsRefused(AskAgainLater):
    """The token endpoint does not take SERVER_ID and SERVER_SECRET."""


# --- one request -----------------------------------------------------------------------------


class Connections(HTTPAdapter):
    """Kept-alive connections for `size` threads, each with a time by which its answer must be in.

    A read timeout bounds one `recv`; an answer that trickles passes it for ever, and holds its
    thread. So the socket is kept at hand here, and another thread calls `cut`.
    """

    def __init__(self, size: int) -> None:
        super().__init__(pool_maxsize=size)
        self._pools: dict[tuple[str, str, int], Any] = {}
        self._reading: dict[int, tuple[float, socket.socket]] = {}  # thread: (monotonic, its socket)

    def ask(self, method: str, url: str, headers: dict[str, str], body: str | None = None) -> HTTPResponse:
        """An answer, its body unread. `url` is a `cleaned` one. Raises what urllib3 and requests raise.

        No `Session`: it would let ~/.netrc replace the token, carry cookies from one order to the next,
        and read a redirect's body whatever its size. No `HTTPAdapter.send` either: it looks for proxies
        and certificates anew each time, which would be a fifth of what a question costs.
        """
        where = origin(url)
        pool = self._pools.get(where)
        if pool is None:
            if len(self._pools) >= SERVERS:
                self.close()
            pool = self._pools[where] = self._pool(*where)
        target = url if pool.proxy and where[0] == "http" else f"/{url.split('/', 3)[3]}"
        response: HTTPResponse = pool.urlopen(
            method, target, body, headers, timeout=TIMEOUT, retries=self.max_retries, redirect=False,
            assert_same_host=False, preload_content=False, decode_content=False,
        )  # fmt: skip
        return response

    def _pool(self, scheme: str, host: str, port: int) -> Any:
        """The connections to a server, by the proxies and certificates that the environment names."""
        url = f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"
        found = requests.Session().merge_environment_settings(url, {}, None, None, None)
        bundle = DEFAULT_CA_BUNDLE_PATH if found["verify"] is True else str(found["verify"])
        if not Path(bundle).exists():
            raise OSError(f"REQUESTS_CA_BUNDLE is no file or folder: {bundle}")
        request = requests.Request("GET", url).prepare()
        try:
            pool: Any = self.get_connection_with_tls_context(request, bundle, found["proxies"])
        except (TypeError, ValueError):  # its text may have the proxy's password in it
            raise OSError("HTTPS_PROXY or HTTP_PROXY is no address of an HTTP proxy") from None
        expect = self.expect

        class Connection(pool.ConnectionCls):  # type: ignore[misc]
            def getresponse(self, *args: Any, **kwargs: Any) -> Any:
                expect(self.sock)
                return super().getresponse(*args, **kwargs)

        pool.ConnectionCls = Connection
        return pool

    def close(self) -> None:
        """Forget all connections: idle ones end now, others with their answers."""
        self._pools = {}  # urllib3 closes a pool that nobody has any more
        super().close()

    def expect(self, sock: socket.socket | None = None) -> None:
        """This thread now waits for the next piece of its answer, from `sock` or the last one."""
        thread = threading.get_ident()
        with contextlib.suppress(KeyError):
            self._reading[thread] = (time.monotonic() + ANSWER_TIME, sock or self._reading[thread][1])

    def cut(self, everything: bool = False) -> None:
        """End the answers that are overdue, or all; their threads go on with an AskAgainLater."""
        for deadline, sock in list(self._reading.values()):
            if everything or time.monotonic() > deadline:
                with contextlib.suppress(OSError, TypeError):
                    # Below TLS, so no waiting for a goodbye. TLS inside TLS, by a proxy, is no socket itself.
                    socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_RDWR)

    def done(self) -> None:
        """This thread waits for no answer now."""
        self._reading.pop(threading.get_ident(), None)


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError for what is no http or https address."""
    return _origin("/".join(url.split("/", 3)[:3]))  # remembered, so without what differs for each task


@functools.lru_cache(maxsize=64)
def _origin(server: str) -> tuple[str, str, int]:
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("no http address")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def cleaned(url: str) -> str:
    """`url` as requests makes it, without a user's name and password.

    Raises ValueError for what is no http or https address.
    """
    request = requests.PreparedRequest()
    request.prepare_url(url, None)
    url = str(request.url)
    origin(url)
    user, at, _ = url.split("/", 3)[2].rpartition("@")
    return url.replace(user + at, "", 1)


def _send(
    http: Connections, method: str, url: str, home: bool, headers: dict[str, str], body: str | None = None
) -> HTTPResponse:
    """One request, its answer's body unread. Raises AskAgainLater."""
    began = time.monotonic()

    def debug(outcome: Any) -> None:
        if log.isEnabledFor(logging.DEBUG):  # without the query: a signed link's signature is a secret, too
            where, took = plain(re.split("[?#]", url)[0]), (time.monotonic() - began) * 1000
            log.debug("%s %s: %s, %.0f ms", method, where, outcome, took)

    try:
        response = http.ask(method, url, headers, body)
    except (requests.RequestException, HTTPError, HTTPException, ValueError, OSError) as error:
        # MaxRetryError, with no retries: it was the connecting that failed, which is no order's own.
        shared = home and isinstance(error, MaxRetryError)
        message = f"{'GraFx unreachable: ' * shared}{urlsplit(url).hostname}: {_reason(error)}"
        debug(message)
        http.done()
        raise AskAgainLater(message, shared) from None
    debug(response.status)
    return response


def _reason(error: BaseException) -> str:
    """What the innermost cause says: "Connection refused", without addresses, which may be secret."""
    inner: BaseException | None = error
    while inner:
        error = inner
        causes = (*error.args, getattr(error, "reason", None), error.__cause__)
        inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    text = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
    return plain(text) or type(error).__name__


def _pieces(http: Connections, response: HTTPResponse) -> Iterator[bytes]:
    """The body, each piece at most PIECE bytes. Raises AskAgainLater where it does not come whole."""
    unzip = None
    if response.headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip"):
        unzip = zlib.decompressobj(wbits=31)  # nobody asked for it, but some gateways do it anyway
    try:
        since = 0
        for piece in response.stream(PIECE):
            since += len(piece)
            if since >= PIECE:  # a chunk may be a single byte, and no reason for more patience
                http.expect()
                since = 0
            while piece and unzip:
                yield unzip.decompress(piece, PIECE)
                piece = unzip.unconsumed_tail
            if piece:
                yield piece
        if unzip and not unzip.eof:
            raise HTTPException("the gzip stream ends in the middle")
    except (HTTPError, HTTPException, OSError, zlib.error) as error:
        raise AskAgainLater(f"the answer broke off: {_reason(error)}") from None
    finally:
        response.close()
        http.done()


def _body(http: Connections, response: HTTPResponse) -> Any:
    """A small answer's JSON; None for none, for other text and for more than ANSWER_SIZE."""
    body = bytearray()
    for piece in _pieces(http, response):
        body += piece
        if len(body) > ANSWER_SIZE:
            return None
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None


def _retry_after(response: HTTPResponse) -> float | None:
    """Seconds, from either form of RFC 9110, section 10.2.3; None where it makes no sense."""
    value = response.headers.get("Retry-After", "").strip()
    date = email.utils.parsedate_to_datetime
    try:
        seconds = float(value) if value.isdigit() else date(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_PAUSE)


def _must_end(response: HTTPResponse) -> None:
    """Raises AskAgainLater where it ends with its connection: one that is cut off would look whole."""
    if response.length_remaining is None and not response.chunked:
        raise AskAgainLater("the answer has neither a length nor an end that shows it is whole")


def _status(response: HTTPResponse) -> str:
    return f"{response.status} {responses.get(response.status, '')}".strip()


# --- the token -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Token:
    value: str = field(repr=False)
    renew: float  # monotonic seconds


class DangerousToken:
    """The workshop's "dangerous" token: whoever has it can do what the integration can.

    Kept in memory only, shared by all threads, renewed by itself.
    """

    def __init__(self, token_url: str, client_id: str, client_secret: str) -> None:
        self._url, self._id, self._secret = token_url, client_id, client_secret
        self._lock = threading.Lock()
        self._token: _Token | None = None
        self._error: tuple[float, AskAgainLater] | None = None
        self.issued = False  # whether there ever was one
        _secrets.append(client_secret)

    def get(self, http: Connections, refused: _Token | None = None) -> _Token:
        """The token, fetched where there is none, where its end is near, or where it was `refused`.

        Raises CredentialsRefused, AskAgainLater.
        """
        began = time.monotonic()
        with self._lock:
            if self._error and began < self._error[0]:
                raise self._error[1]  # failed while this thread waited for its turn, or is to be left alone
            token = self._token
            # By identity: the endpoint caches, so that a new fetch may bring the same text again.
            if token is None or token is refused or time.monotonic() >= token.renew:
                try:
                    token = self._token = self._fetch(http)
                except AskAgainLater as error:
                    self._error = (time.monotonic() + (error.pause or 0.0), error)
                    raise
            return token

    def _fetch(self, http: Connections) -> _Token:
        form = {"grant_type": "client_credentials", "audience": AUDIENCE}
        form |= {"client_id": self._id, "client_secret": self._secret}
        headers = HEADERS | {"Content-Type": "application/json"}
        try:
            response = _send(http, "POST", cleaned(self._url), True, headers, json.dumps(form))
            answer = _body(http, response)
        except AskAgainLater as error:
            raise AskAgainLater(f"no token: {error}", shared=True) from None
        answer = answer if isinstance(answer, dict) else {}
        if response.status in (400, 401, 403):  # RFC 6749, section 5.2
            said = plain(answer.get("error_description") or answer.get("error") or "")
            raise CredentialsRefused(
                f"{self._url} refuses SERVER_ID and SERVER_SECRET: {_status(response)} {said}".rstrip(),
                shared=True,
                pause=_retry_after(response),
            )
        value, lasts = str(answer.get("access_token") or ""), answer.get("expires_in")
        # RFC 6750, section 2.1. Anything else in a header would end up in an exception's text.
        if response.status != 200 or not re.fullmatch(r"[\x21-\x7e]+", value):
            said = _status(response) + " without one" * (response.status == 200)
            raise AskAgainLater(
                f"no token: {self._url} answered {said}", shared=True, pause=_retry_after(response)
            )
        if not isinstance(lasts, (int, float)) or not 0 < lasts < 1e9:
            lasts = 3600  # where it ends earlier, a 401 tells
        self.issued = True
        _secrets.extend((self._secret, value))
        return _Token(value, time.monotonic() + lasts - min(TOKEN_MARGIN, lasts / 2))


# --- the order -------------------------------------------------------------------------------


def order_done(
    task_id: str,
    base_url: str,
    environment: str,
    token: DangerousToken,
    http: Connections,
    orders_dir: Path,
    progress: Progress = lambda done, total: None,
    look: bool = True,
) -> bool:
    """Ask about a task; where it is finished, bring its file to `<orders_dir>/<task_id>.<ext>`.

    look: whether the file may be there already.
    Returns True once the file is whole and on the disk, False while GraFx answers 204.
    Raises OrderFailed, AskAgainLater.
    """
    if look and find_file(orders_dir, task_id):
        # Left by a process that was killed before its caller could note it: whole, since it has its
        # final name, but perhaps not yet for ever.
        _sync_folder(orders_dir)
        return True
    response = _get(http, _tasks(base_url, environment) + task_id, base_url, token)
    if response.status == 204:
        response.drain_conn()  # nothing; `_body` would do, but takes three times as long
        http.done()
        return False
    answer = _body(http, response)
    if response.status != 200:
        raise _trouble(response, answer)
    try:
        link = cleaned(answer["links"]["download"])
    except (LookupError, ValueError, AttributeError, TypeError):
        _must_end(response)
        raise OrderFailed("GraFx says finished, but gives no download link", 200) from None
    response = _get(http, link, base_url, token)
    if response.status == 410:
        _body(http, response)
        raise OrderFailed("no longer available: GraFx keeps a file for 4 hours", 410, final=True)
    if response.status != 200:
        raise _trouble(response, _body(http, response), "the download: ")
    try:
        _save(http, response, orders_dir, task_id, progress)
    finally:
        response.close()
        http.done()
    return True


@functools.lru_cache(maxsize=1)
def _tasks(base_url: str, environment: str) -> str:
    """The address of a task, without its id; cleaned once, since each question begins with it."""
    return cleaned(f"{base_url}/grafx/api/v1/environment/{quote(environment, safe='')}/output/tasks/")


def _get(http: Connections, url: str, base_url: str, token: DangerousToken) -> HTTPResponse:
    """GET, redirects followed; the token goes along to `base_url`'s own server and nowhere else.

    Raises AskAgainLater.
    """
    home, refused = origin(base_url), None
    for _ in range(REDIRECTS + 3):  # and a change to https, and a new token
        # Compared is what requests made of the address, since that is where it connects to:
        # it and urlsplit do not agree on whose "http://one\\@two/" is.
        where, headers = origin(url), HEADERS
        if home[0] == "https" and where[:2] == ("http", home[1]) and where[2] in (80, home[2]):
            # A server behind a TLS proxy may not know that it is.
            url = urlsplit(url)._replace(scheme="https", netloc=urlsplit(base_url).netloc).geturl()
            where = home
        if where == home:
            current = token.get(http, refused)
            headers = HEADERS | {"Authorization": f"Bearer {current.value}"}
        response = _send(http, "GET", url, where == home, headers)
        if response.status == 401 and where == home:
            _body(http, response)
            if refused:
                raise AskAgainLater("GraFx refuses a token that is new: 401 Unauthorized", shared=True)
            refused = current
        elif location := response.get_redirect_location():
            _body(http, response)
            try:
                url = cleaned(urljoin(url, location))
            except ValueError:
                raise AskAgainLater("redirected to what is no http address") from None
        else:
            return response
    raise AskAgainLater("redirected in circles")


def _trouble(response: HTTPResponse, answer: Any, what: str = "") -> OrderFailed | AskAgainLater:
    """What an answer that is neither 200 nor 204 means, in one line."""
    status, problem = response.status, answer if isinstance(answer, dict) else {}
    said = ": ".join(plain(problem[key]) for key in ("title", "detail") if problem.get(key))
    message = what + (said or f"GraFx answered {_status(response)}")
    if (status == 500 and said) or (400 <= status < 500 and status not in (407, 408, 425, 429)):
        return OrderFailed(message, status)
    return AskAgainLater(f"{what}GraFx answered {_status(response)}", pause=_retry_after(response))


def plain(said: Any) -> str:
    """A server's words, fit for a log: one line, no control characters, no secret, not too long."""
    text = str(said)
    for secret in _secrets:  # which a server may echo
        text = text.replace(secret, "[secret]")
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:500]


# --- the file --------------------------------------------------------------------------------


def find_file(orders_dir: Path, task_id: str) -> Path | None:
    """The file of a task where it has been delivered."""
    stem = f"{orders_dir}/{task_id}."  # as text, since pathlib takes ten times as long
    for name in [stem + extension for extension in (*FORMATS, "bin")]:
        if os.access(name, os.F_OK) and Path(name).is_file():
            return Path(name)
    return None


def remove_leftovers(orders_dir: Path) -> None:
    """Remove what a killed process left half written. Raises OSError."""
    for path in orders_dir.glob(".*.part"):
        path.unlink(missing_ok=True)


def _save(
    http: Connections, response: HTTPResponse, orders_dir: Path, task_id: str, progress: Progress
) -> None:
    """Stream the body to its place. Raises OrderFailed, AskAgainLater; then nothing is left of it."""
    _must_end(response)
    total = response.length_remaining
    temp = orders_dir / f".{task_id}.part"
    size, first, last = 0, b"", b""
    try:
        # The order of these steps is the promise: nothing has its final name before it is whole and
        # on the disk, and the caller forgets the order only after the name is on the disk as well.
        with temp.open("wb") as file:
            for piece in _pieces(http, response):
                file.write(piece)
                size, first, last = size + len(piece), (first + piece)[:16], (last + piece)[-len(PNG_END) :]
                progress(size, total)
            extension = _extension(response.headers.get("Content-Type", ""), first, last)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(orders_dir / f"{task_id}.{extension}")
        _sync_folder(orders_dir)
    except OrderFailed:
        http.close()  # if its length was a lie, the rest would come as the next answer
        raise
    except OSError as error:
        raise _unwritable(orders_dir, error) from None
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def _extension(content_type: str, first: bytes, last: bytes) -> str:
    """The extension by type and first bytes. Raises OrderFailed where the file is not what it says."""
    content_type = content_type.partition(";")[0].strip().lower()
    starts = (first, first[4:])
    looks = next((ext for ext, (_, magic) in FORMATS.items() if starts[ext == "mp4"].startswith(magic)), "")
    says = next((ext for ext, (types, _) in FORMATS.items() if content_type in types), "")
    if not first:
        raise OrderFailed("the file is empty", 200)
    if content_type not in NO_TYPE and not (says and says == looks):
        raise OrderFailed(f"the file says {content_type} but is {looks or 'something else'}", 200)
    if not looks and first.lstrip()[:1] in (b"<", b"{"):
        raise OrderFailed("the file is an error page or other text", 200)
    if looks == "png" and last != PNG_END:
        raise OrderFailed("the PNG has no end", 200)
    return looks or "bin"


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
    return AskAgainLater(f"cannot write to {folder}: {error.strerror}", shared=True)
