"""The GraFx client: gets the token, polls a task, downloads its file. It does not use `database.json`.

    grafx = chili.GraFx(base_url, environment, token_url, client_id, client_secret)
    file = chili.order_done(task_id, grafx, Path("orders"))    # None while the task renders

Facts about GraFx are from CHILI's documentation (github.com/chili-publish/grafx-documentation,
August 2026), its workshop "Building a template store", section 14, and its examples
(chili-publish/studio-sdk-integration-examples). Where they say nothing, the code works either way.

Four rules keep one order's answer from being taken for another's:
the task id in an answer must match; each download has its own connection; so does each token request;
and an answer that is not understood closes all idle connections, so that no late data is read from them.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import logging
import os
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from requests.exceptions import InvalidSchema, InvalidURL, ProxyError
from urllib3 import Retry
from urllib3.exceptions import HTTPError, MaxRetryError

TIMEOUT = (10.0, 30.0)  # seconds: to connect, and between two reads of an answer
SLOWEST, SLOW_START = 1000, 60.0  # minimum bytes per second of a body, checked after this many seconds
LONGEST_RETRY_AFTER = 300.0  # seconds
TOKEN_MARGIN = 300.0  # seconds before a token expires that it is renewed
TOKEN_PAUSE = 60.0  # seconds between two renewals after a 401, or after a failed renewal of a valid token
FRESH = 300.0  # seconds until the connections are closed and GraFx's name is resolved again
REDIRECTS = 5
HEADERS = {"Accept": "application/json, */*", "Accept-Encoding": "identity", "User-Agent": "grafx-poller"}

# extension: Content-Types, and a pattern of the file's first bytes
FORMATS = {
    "png": (("image/png",), rb"\x89PNG\r\n\x1a\n"),
    "jpg": (("image/jpeg", "image/jpg"), rb"\xff\xd8\xff"),
    "pdf": (("application/pdf",), rb"%PDF-"),
    "gif": (("image/gif",), rb"GIF8[79]a"),
    "mp4": (("video/mp4",), rb"....ftyp"),
    "zip": (("application/zip", "application/x-zip-compressed"), rb"PK(\x03\x04|\x05\x06)"),
}
NO_CODING = ("", "identity", "gzip")
NO_TYPE = ("", "application/octet-stream", "binary/octet-stream")
NO_TASK = "00000000-0000-0000-0000-000000000000"
ASP_NET = "An error occurred while processing your request."  # a server error, not about the task
# Titles that only name the status (RFC 9457, section 4.2.1): they give no reason either.
PHRASES = ("bad request", "unprocessable entity", "unprocessable content", "internal server error")
PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"

CREDENTIAL_ERRORS = ("invalid_client", "unauthorized_client", "invalid_grant", "access_denied")
GRAFX, TOKEN_SERVER, DOWNLOAD_SERVER = "GraFx", "the token server", "the download server"

log = logging.getLogger("chili")
Progress = Callable[[int, "int | None"], None]  # bytes so far, total bytes if the server sends them
_secrets: deque[str] = deque(maxlen=32)  # recent tokens and the secret, which `sanitize` removes


class TaskRejected(Exception):
    """GraFx rejects this task: it could not render it, does not know it, or lost its file.

    status: the HTTP status. own_reason: the rejection concerns this task only; any other may come from a
    proxy in front of GraFx, or from a wrong ENVIRONMENT. final: retrying is useless.
    """

    def __init__(self, text: str, status: int | None, own_reason: bool = False, final: bool = False) -> None:
        super().__init__(text)
        self.status, self.own_reason, self.final = status, own_reason or final, final


class TryAgainLater(Exception):
    """A failure that says nothing about the task.

    shared: it affects every order. retry_after: seconds until a request of any kind may be sent.
    """

    def __init__(self, text: str, shared: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.shared, self.retry_after = shared, retry_after


class NotUnderstood(TryAgainLater):
    """An answer that may be incomplete, or belong to another request."""


class CredentialsRejected(TryAgainLater):
    """The token endpoint rejects SERVER_ID and SERVER_SECRET."""


# --- words and addresses ---------------------------------------------------------------------


def sanitize(said: Any) -> str:
    """A server's text for the log: one line, no control characters, no secrets, at most 500 characters."""
    text = str(said)
    for secret in _secrets.copy():  # a server may echo one; copied, since other threads append
        text = text.replace(secret, "[secret]")
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:500]


def format_size(size: float) -> str:
    """Format a number of bytes, such as "7.6 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _reason(error: BaseException) -> str:
    """The innermost cause, such as "Connection refused": outer exceptions may contain URLs and passwords."""
    for cause in (*error.args, getattr(error, "reason", None), error.__cause__):
        if isinstance(cause, BaseException):
            return _reason(cause)
    if wrong := getattr(error, "verify_message", ""):  # of a certificate
        return f"{wrong}; for a private CA, set REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt"
    return sanitize(getattr(error, "strerror", "") or error) or type(error).__name__


def _status(response: requests.Response) -> str:
    """Such as "404 Not Found"."""
    return f"{response.status_code} {sanitize(response.reason or '')}".strip()


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError if `url` is not an http or https URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http address")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def prepared(url: str) -> str:
    """`url` as requests sends it. Raises ValueError if it is not an http or https URL."""
    sent = str(requests.Request("GET", url).prepare().url)
    origin(sent)
    return sent


# --- one request -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=100)  # a lookup costs 0.25 ms of CPU, more than half of a poll
def _proxies_and_certificates(server: str) -> Any:
    """The options for Session.send that HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE etc. set for a server."""
    return requests.Session().merge_environment_settings(server, {}, True, None, None)


def send(session: requests.Session, who: str, method: str, url: str, **more: Any) -> requests.Response:
    """Send one request, without following redirects. `who` is the server's name in error texts.

    The request is prepared outside the session, so that orders share no cookies and ~/.netrc is not read.
    Raises TryAgainLater; shared if the proxy, GraFx or the token server cannot be reached.
    """
    parts = urlsplit(url)
    settings = _proxies_and_certificates(f"{parts.scheme}://{parts.netloc}")
    proxy = requests.utils.select_proxy(url, settings["proxies"]) or ""
    try:
        request = requests.Request(method, url, HEADERS, **more).prepare()
        response = session.send(request, timeout=TIMEOUT, allow_redirects=False, **settings)
    except (InvalidURL, InvalidSchema, TypeError, UnicodeEncodeError):
        # Name the variable, not its value: the value may contain a password.
        names = "/".join(name for name, value in os.environ.items() if value and value == proxy)
        socks = "a SOCKS proxy, which needs: pip install 'requests[socks]'"
        wrong = socks if proxy.startswith("socks") else "not the address of an HTTP proxy"
        raise TryAgainLater(f"{names or 'HTTPS_PROXY'} is {wrong}", shared=True) from None
    except ProxyError as error:
        reason, place = _reason(error), urlsplit(proxy if "//" in proxy else f"//{proxy}")
        problem = "refuses to connect" if reason.startswith("Tunnel connection") else "is unreachable"
        problem = "requires a user name and a password" if " 407" in reason else problem
        text = f"the proxy {place.hostname}:{place.port} {problem} ({reason})"
        raise TryAgainLater(text, shared=True) from None
    except (requests.RequestException, HTTPError, OSError, ValueError, RuntimeError) as error:
        # RuntimeError: requests reads a redirect's body, and this comes if its gzip data breaks off.
        reason = f"({_reason(error)}, {parts.hostname})"
        if error.args and isinstance(error.args[0], MaxRetryError):  # no retries: it did not connect
            raise TryAgainLater(f"{who} is unreachable {reason}", who != DOWNLOAD_SERVER) from None
        raise NotUnderstood(f"{who} gave no answer {reason}") from None
    took, path = response.elapsed.total_seconds() * 1000, parts.path  # no query: it may contain a signature
    log.debug("%s %s%s: %s, %.0f ms", method, parts.hostname, path, response.status_code, took)
    return response


def coding(response: requests.Response) -> str:
    """The Content-Encoding. HEADERS ask for none, but some gateways apply one, or send a bogus name."""
    return sanitize(response.headers.get("Content-Encoding", "")).lower().removeprefix("x-")[:40]


def pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives, gzip decoded. Raises NotUnderstood if it may be incomplete or is too slow."""
    raw = response.raw
    if raw.length_remaining is None and not raw.chunked:
        raise NotUnderstood("the answer has neither a Content-Length nor chunks, so it may be incomplete")
    began, came = time.monotonic(), 0
    try:
        start = [raw.read(2)]  # to see whether it is gzip

        def arrived(size: int) -> bytes:
            return start.pop() if start else raw.read1(size)

        read = arrived
        if coding(response) == "gzip" and start[0] == b"\x1f\x8b":
            # Not decoded by urllib3, which accepts a truncated stream.
            source: Any = SimpleNamespace(read=arrived)
            read = gzip.GzipFile(fileobj=source).read1
        while piece := read(64 * 1024):
            yield piece
            came, seconds = came + len(piece), time.monotonic() - began
            if seconds > SLOW_START and came < SLOWEST * seconds:
                raise NotUnderstood(f"the answer is too slow: {format_size(came)} in {seconds:.0f} s")
    except (HTTPError, OSError, EOFError, zlib.error) as error:
        raise NotUnderstood(f"the answer broke off after {format_size(came)} ({_reason(error)})") from None


def read_json(response: requests.Response) -> dict[str, Any]:
    """The JSON object in a small answer; empty for anything else. Raises TryAgainLater."""
    body = bytearray()
    for piece in pieces(response):
        body += piece
        if len(body) > 1024 * 1024:  # GraFx's answers are below 10 kB
            return {}
    said = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(body)
    if said is None and body and coding(response) not in NO_CODING:
        raise TryAgainLater(f"the answer has the unknown Content-Encoding {coding(response)}")
    return said if isinstance(said, dict) else {}


def retry_after(response: requests.Response) -> float:
    """Seconds from either form of Retry-After (RFC 9110, section 10.2.3), capped; 0 if there is none."""
    with contextlib.suppress(HTTPError, ValueError, OverflowError):
        return min(Retry().get_retry_after(response.raw) or 0.0, LONGEST_RETRY_AFTER)
    return 0.0


def _words(problem: dict[str, Any]) -> str:
    """What GraFx says in an error's JSON (RFC 9457); empty if it says nothing."""
    return ": ".join(sanitize(problem[key]) for key in ("title", "detail") if problem.get(key))


def _is_own_reason(status: int, said: str) -> bool:
    """Whether GraFx gives a reason for this task. A 403 or 404 may concern all tasks, even with a reason."""
    generic = said.lower() in ("", *PHRASES) or said.startswith(ASP_NET)
    return status in (400, 422, 500) and not generic


def error_for(response: requests.Response, who: str, prefix: str = "") -> TaskRejected | TryAgainLater:
    """The error to raise for an unusable answer. Itself raises TryAgainLater if the body cannot be read."""
    status, plainly = response.status_code, f"{prefix}{who} answered {_status(response)}"
    pause = retry_after(response) if who == GRAFX else 0.0
    if status in (407, 408, 425) or (status not in (202, 204, 500) and not 400 <= status < 500):
        return NotUnderstood(plainly, retry_after=pause)
    said = _words(read_json(response))
    own_reason = who == GRAFX and _is_own_reason(status, said)
    if status in (202, 204, 401, 429, 500) and not own_reason:
        return TryAgainLater(plainly, retry_after=pause)
    return TaskRejected(prefix + said if said else plainly, status, own_reason)


class Pace:
    """The rate limiter: a delay between requests, 0 until GraFx answers 429 or 503.

    As in TCP and Postfix, each 429 or 503 halves the rate, and each good answer raises it a little.
    So it finds an undocumented limit, stays near it, and speeds up again when the limit is gone.
    """

    SLOWER, FASTER = 2.0, 1.03
    SHORTEST, LONGEST = 0.02, 1.0  # seconds between requests: after the first 429 or 503, and at most

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._between = 0.0  # seconds between two requests
        self._next = self._slowed = 0.0  # monotonic: when the next request may be sent; the last slowdown

    def wait(self) -> float:
        """Wait for this thread's turn. Returns the time at which the wait began, in monotonic seconds."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._between
        if turn > now:
            time.sleep(turn - now)
        return now

    def learn(self, status: int, began: float) -> None:
        """Adapt the delay to the answer to a request; `began` is what `wait` returned for it."""
        with self._lock:
            # One that was already under way at the last slowdown says nothing new.
            if status in (429, 503) and began >= self._slowed:
                slower = max(self.SHORTEST, self.SLOWER * self._between)
                self._between, self._slowed = min(self.LONGEST, slower), time.monotonic()
            elif status < 400:
                self._between /= self.FASTER


# --- the token, the environment --------------------------------------------------------------


class DangerousToken(AuthBase):
    """The workshop's "dangerous" token: whoever has it can do what the integration can.

    It is sent only to the server of `base_url`. All threads share it, and it is renewed when needed.
    """

    def __init__(self, base_url: str, token_url: str, client_id: str, client_secret: str) -> None:
        self.home, self.url = origin(base_url), token_url
        self._form = {"grant_type": "client_credentials", "audience": "https://chiligrafx.com"}
        self._form |= {"client_id": client_id, "client_secret": client_secret}
        self._lock = threading.Lock()
        self._result: str | TryAgainLater = ""  # the Authorization header, or why there is none
        # Monotonic seconds: when to renew it, when it expires, when a 401 last caused a renewal.
        self._renew, self._ends, self._replaced = 0.0, 0.0, float("-inf")
        _secrets.append(client_secret)

    @property
    def issued(self) -> bool:
        """Whether there ever was a token."""
        return self._ends > 0

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Called by requests. Raises TryAgainLater, CredentialsRejected."""
        if origin(str(request.url)) == self.home:
            request.headers["Authorization"] = self.get()
        return request

    def get(self) -> str:
        """The Authorization header. Raises TryAgainLater, CredentialsRejected."""
        began = time.monotonic()
        patience = 0 if began < self._ends else 2 * sum(TIMEOUT)  # with a valid token, nobody waits
        if began >= self._renew and self._lock.acquire(timeout=patience):
            try:
                if began >= self._renew:  # else another thread has just tried
                    self._fetch()
            finally:
                self._lock.release()
        if began >= max(self._renew, self._ends):  # nobody has tried since
            raise TryAgainLater(f"no token: {self.url} has not answered yet", shared=True)
        if isinstance(result := self._result, TryAgainLater):
            raise result
        return result

    def replace(self, rejected: str | None) -> bool:
        """Whether to retry a request whose token was `rejected`. A 401 renews it at most once a minute."""
        with self._lock:
            now = time.monotonic()
            if self._result == rejected and now < self._renew:  # else it is or will be renewed
                if now < self._replaced + TOKEN_PAUSE:
                    return False
                self._replaced = self._renew = self._ends = now
            return rejected is not None  # None: it went to another server, without the token

    def _fetch(self) -> None:
        try:
            value, lasts = _ask_for_token(self.url, self._form)
        except TryAgainLater as error:
            now, pause = time.monotonic(), error.retry_after
            if now < self._ends:  # the old token is still valid
                self._renew = min(self._ends, now + max(TOKEN_PAUSE, pause))
                return
            if not isinstance(error, CredentialsRejected):
                error = TryAgainLater(f"no token: {error}", True, pause)
            self._result, self._renew = error, now + pause  # also for the threads that wait already
        else:
            _secrets.extend((self._form["client_secret"], value))
            self._result, self._ends = f"Bearer {value}", time.monotonic() + lasts
            self._renew = self._ends - min(TOKEN_MARGIN, lasts / 2)


def _ask_for_token(url: str, form: dict[str, str]) -> tuple[str, float]:
    """A token and its lifetime in seconds. Raises TryAgainLater, CredentialsRejected."""
    # On its own connection, and without `auth`: fetching the token must not wait for the token.
    with requests.Session() as session, send(session, TOKEN_SERVER, "POST", url, json=form) as response:
        said, pause, status = read_json(response), retry_after(response), response.status_code
    value, lasts = said.get("access_token"), said.get("expires_in")
    # RFC 6749, section 5.2, and Auth0's access_denied. Any other 4xx is from a gateway, or temporary.
    if status in (400, 401, 403) and said.get("error") in CREDENTIAL_ERRORS:
        words = sanitize(said.get("error_description") or said["error"])
        text = f"{url} rejects SERVER_ID and SERVER_SECRET: {_status(response)} {words}".rstrip()
        raise CredentialsRejected(text, True, pause)
    # RFC 6750, section 2.1. An invalid header value would be quoted in an exception's text.
    if status != 200 or not isinstance(value, str) or not re.fullmatch("[!-~]+", value):
        without = " without a token" * (status == 200)
        raise TryAgainLater(f"{url} answered {_status(response)}{without}", retry_after=pause)
    if not isinstance(lasts, (int, float)) or not 0 < lasts < 1e9:
        lasts = 3600  # if it expires earlier, a 401 renews it
    return value, lasts


class GraFx:
    """A GraFx environment, for all threads. Raises ValueError, as `prepared` does."""

    def __init__(self, base_url: str, environment: str, token_url: str, client_id: str, secret: str) -> None:
        self.base_url = prepared(base_url).rstrip("/")
        self.tasks = f"{self.base_url}/grafx/api/v1/environment/{quote(environment, safe='')}/output/tasks/"
        self.token = DangerousToken(self.base_url, token_url, client_id, secret)
        self.session, self.pace = requests.Session(), Pace()
        self.fresh_until = time.monotonic() + FRESH
        self.session.mount(self.base_url, HTTPAdapter(pool_maxsize=64))  # CONCURRENCY is not higher

    def poll(self, task_id: str) -> str | None:
        """The URL of a finished task's file; None while it renders. Raises TaskRejected, TryAgainLater."""
        if time.monotonic() >= self.fresh_until:  # GraFx may have a new IP address
            self.fresh_until = time.monotonic() + FRESH
            self.session.close()
        try:
            with self.get(self.session, self.tasks + task_id) as response:
                if response.status_code not in (200, 202, 204):
                    raise error_for(response, GRAFX)
                said = read_json(response)
                # CHILI's example startPollingOnEndpoint.ts treats a 202 as "not finished".
                return self._link(response, said, task_id) if response.status_code == 200 else None
        except NotUnderstood:
            self.session.close()
            raise

    def get(self, session: requests.Session, url: str) -> requests.Response:
        """GET. Redirects are followed here, so that DangerousToken checks each URL. Raises TryAgainLater."""
        for _ in range(REDIRECTS + 1):
            response = self._get_once(session, url)
            sent = response.request.headers.get("Authorization")
            if response.status_code == 401 and self.token.replace(sent):
                response.close()
                response = self._get_once(session, url)
            if response.next is None:
                return response
            response.close()
            try:
                url = self._address(response.next.url)
            except ValueError:
                raise TryAgainLater("redirected to an address that is not http") from None
        raise TryAgainLater(f"redirected more than {REDIRECTS} times")

    def _get_once(self, session: requests.Session, url: str) -> requests.Response:
        if origin(url) != self.token.home:
            return send(session, DOWNLOAD_SERVER, "GET", url, auth=self.token)
        began = self.pace.wait()
        response = send(session, GRAFX, "GET", url, auth=self.token)
        self.pace.learn(response.status_code, began)
        return response

    def _link(self, response: requests.Response, said: dict[str, Any], task_id: str) -> str:
        data, links = said.get("data"), said.get("links")
        about = data.get("taskId") if isinstance(data, dict) else None
        if isinstance(about, str) and about.casefold() != task_id.casefold():
            raise NotUnderstood(f"the answer is about another task: {sanitize(about)[:80]}")
        link = links.get("download") if isinstance(links, dict) else None
        if not link and about:  # CHILI's own web client (studio-ui) downloads from here
            link = f"{self.tasks}{task_id}/download"
        with contextlib.suppress(TypeError, ValueError):
            if link:
                # An absolute URL is not joined: urljoin might change it, and it may be signed.
                whole = re.match("https?://", link, re.IGNORECASE)
                return self._address(link if whole else urljoin(response.url, link))
        raise TaskRejected("GraFx says finished, but gives no download link", 200)

    def _address(self, given: Any) -> str:
        """The URL to request for one that a server gave. Raises ValueError, as `prepared` does."""
        url = prepared(given)
        home, (scheme, host, port) = self.token.home, origin(url)
        # Behind a TLS proxy, GraFx may give http URLs. Those would get no token, so use https.
        if (home[0], scheme, host) == ("https", "http", home[1]) and port in (80, home[2]):
            return urlsplit(url)._replace(scheme="https", netloc=urlsplit(self.base_url).netloc).geturl()
        return url


def check_environment(grafx: GraFx, task_id: str | None) -> str:
    """Poll a pending task, or else one that cannot exist. Returns what works. Raises TryAgainLater."""
    with grafx.get(grafx.session, grafx.tasks + (task_id or NO_TASK)) as response:
        said, status = read_json(response), response.status_code
    if (at := origin(str(response.url))) != grafx.token.home:
        raise TryAgainLater(f"{grafx.base_url} redirects to {at[1]}: check BASEURL")
    about, words = f" about {task_id}" if task_id else "", _words(said)
    own_reason = task_id and _is_own_reason(status, words)
    if own_reason or status in (202, 204) or (status == 200 and said):
        return f"{grafx.base_url} answers{about}"
    if status == 404 and said and not task_id:
        return f"{grafx.base_url} answers; only the first order shows whether ENVIRONMENT is right"
    text = f"{grafx.base_url} answered {_status(response)}{about}: {words.rstrip('.') or 'no reason given'}."
    raise TryAgainLater(f"{text} Check BASEURL, ENVIRONMENT and the integration's permissions.")


# --- the file --------------------------------------------------------------------------------


def order_done(task_id: str, grafx: GraFx, folder: Path, progress: Progress = lambda *_: None) -> Path | None:
    """Poll a task; if it is finished, download its file to `<folder>/<task_id>.<extension>`.

    Returns the file once it is complete and fsynced, None while the task renders. A file that is already
    there is not downloaded again. The caller syncs the folder. Raises TaskRejected, TryAgainLater; OSError
    if the folder cannot be written.
    """
    if file := find_file(folder, task_id):
        return file
    if not (link := grafx.poll(task_id)):
        return None
    # On its own connection: a late answer to another request cannot be taken for the file.
    with requests.Session() as session, grafx.get(session, link) as response:
        if response.status_code == 200:
            return _save(response, folder, task_id, progress)
        if response.status_code == 410:
            raise TaskRejected("no longer available: GraFx keeps a file for 4 hours", 410, final=True)
        home = origin(str(response.url)) == grafx.token.home
        raise error_for(response, GRAFX if home else DOWNLOAD_SERVER, "the download: ")


def find_file(folder: Path, task_id: str) -> Path | None:
    """The downloaded file of a task, if there is one."""
    for extension in FORMATS:
        name = f"{folder}/{task_id}.{extension}"  # a string: pathlib takes ten times as long
        if os.access(name, os.F_OK) and Path(name).is_file():
            return Path(name)
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove the partial downloads of a killed process, and nothing else."""
    for path in folder.glob(".*.part"):
        if re.fullmatch(r"\.[\w.-]+\.part", path.name, re.ASCII):
            with contextlib.suppress(OSError):  # the next download of that order reports it
                path.unlink()


def _save(response: requests.Response, folder: Path, task_id: str, progress: Progress) -> Path:
    """Stream the body to its file. Raises as order_done does, and then leaves no partial file."""
    total = None if response.headers.get("Content-Encoding") else response.raw.length_remaining
    temp, size = folder / f".{task_id}.part", 0
    try:
        # The guarantee depends on this sequence: the file gets its final name only when it is complete and
        # fsynced, and the caller drops the order only when the rename is on the disk as well.
        with temp.open("w+b") as file:
            for piece in pieces(response):
                file.write(piece)
                size += len(piece)
                progress(size, total)
            file.seek(0)
            extension = _extension(response, file.read(16))
            file.seek(max(0, size - len(PNG_END)))
            if extension == "png" and file.read() != PNG_END:
                raise TaskRejected("the PNG is truncated", 200, own_reason=True)
            os.fsync(file.fileno())
        whole = folder / f"{task_id}.{extension}"
        if whole.is_dir():
            raise TryAgainLater(f"{whole} is a folder where the file should be: move it away")
        return temp.replace(whole)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def _extension(response: requests.Response, first: bytes) -> str:
    """The extension for the type and first bytes. Raises TaskRejected if they disagree, TryAgainLater."""
    says = sanitize(response.headers.get("Content-Type", "").partition(";")[0]).lower()[:80]
    looks = next((ext for ext, (_, begin) in FORMATS.items() if re.match(begin, first, re.DOTALL)), "")
    if looks and says in (*FORMATS[looks][0], *NO_TYPE):
        return looks
    if looks:
        raise TaskRejected(f"Content-Type is {says}, but the file is {looks}", 200, own_reason=True)
    if not first:
        raise TaskRejected("the file is empty", 200)
    if coding(response) not in NO_CODING:
        raise TryAgainLater(f"the file has the unknown Content-Encoding {coding(response)}")
    # It may be an error page from a proxy, so it may concern all orders.
    if says in NO_TYPE:
        raise TaskRejected(f"the file's format is none of {', '.join(FORMATS)}", 200)
    raise TaskRejected(f"Content-Type is {says}, but the file is something else", 200)
