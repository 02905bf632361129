"""GraFx: the token, polling a task, downloading its file. Knows nothing of `database.json`.

    grafx = chili.GraFx(base_url, environment, token_url, client_id, client_secret)
    file = chili.order_done(task_id, grafx, Path("orders"))    # None while the task renders

Facts about GraFx are from CHILI's documentation (github.com/chili-publish/grafx-documentation,
August 2026), its workshop "Building a template store", section 14, and its examples
(chili-publish/studio-sdk-integration-examples). Where those are silent, the code holds either way.

Four rules keep one order's answer from being taken for another's:
a task's answer names its task; each download has a connection of its own; so has each token request;
and an answer that is not understood closes all idle connections, with whatever else is on its way.
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

TIMEOUT = (10.0, 30.0)  # seconds: to connect, and between two pieces of an answer
SLOWEST, SLOW_START = 1000, 60.0  # bytes a second of a body, after so many seconds; slower is an error
LONGEST_RETRY_AFTER = 300.0  # seconds
TOKEN_MARGIN = 300.0  # seconds before its end that a token is renewed
TOKEN_PAUSE = 60.0  # seconds between two renewals because of a 401, or after one that failed
FRESH = 300.0  # seconds for which connections are used
REDIRECTS = 5
HEADERS = {"Accept": "application/json, */*", "Accept-Encoding": "identity", "User-Agent": "grafx-poller"}

# extension: Content-Types, and what the file begins with
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
ASP_NET = "An error occurred while processing your request."  # the server's own fault, whatever the task
PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"

CREDENTIAL_ERRORS = ("invalid_client", "unauthorized_client", "invalid_grant", "access_denied")
GRAFX, TOKEN_SERVER, DOWNLOAD_SERVER = "GraFx", "the token server", "the download server"

log = logging.getLogger("chili")
Progress = Callable[[int, "int | None"], None]  # bytes so far, bytes in all where the server says so
_secrets: deque[str] = deque(maxlen=32)  # the last tokens and the secret, for `sanitize` to remove


class TaskRejected(Exception):
    """GraFx rejects this task: it could not render it, does not know it, or lost its file.

    status: the HTTP status. proven: it is about this task, whereas anything else may come from whatever
    stands before GraFx, or from a wrong ENVIRONMENT. final: retrying is useless.
    """

    def __init__(
        self, message: str, status: int | None = None, proven: bool = False, final: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.proven, self.final = status, proven or final, final


class TryAgainLater(Exception):
    """A failure that says nothing about the task.

    shared: it affects every order. retry_after: seconds until GraFx wants the next request of any kind.
    """

    def __init__(self, message: str, shared: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.shared, self.retry_after = shared, retry_after


class NotUnderstood(TryAgainLater):
    """An answer that may be incomplete, or belong to another request."""


class CredentialsRejected(TryAgainLater):
    """The token endpoint rejects SERVER_ID and SERVER_SECRET."""


# --- words and addresses ---------------------------------------------------------------------


def sanitize(said: Any) -> str:
    """A server's words for a log: one line, no control characters, no secret, at most 500 characters."""
    text = str(said)
    for secret in _secrets.copy():  # a server may echo it; a copy, since other threads append
        text = text.replace(secret, "[secret]")
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:500]


def format_size(size: float) -> str:
    """Bytes as "7.6 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _reason(error: BaseException) -> str:
    """What the innermost cause says, as "Connection refused": the others name addresses and passwords."""
    inner: BaseException | None = error
    while inner:
        error = inner
        causes = (*error.args, getattr(error, "reason", None), error.__cause__)
        inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
    if wrong := getattr(error, "verify_message", ""):  # of a certificate
        return f"{wrong}; for a private CA, set REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt"
    return sanitize(getattr(error, "strerror", "") or error) or type(error).__name__


def _status(response: requests.Response) -> str:
    """As "404 Not Found"."""
    return f"{response.status_code} {sanitize(response.reason or '')}".strip()


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError for what is not an http or https address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http address")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def prepared(url: str) -> str:
    """`url` as requests sends it. Raises ValueError for what is not an http or https address."""
    sent = str(requests.Request("GET", url).prepare().url)
    origin(sent)
    return sent


# --- one request -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=100)  # a lookup costs 0.25 ms of CPU, more than half of a poll
def _proxies_and_certificates(server: tuple[str, str, int]) -> Any:
    """What HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE and the like say about a server, for Session.send."""
    scheme, host, port = server
    url = f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"
    return requests.Session().merge_environment_settings(url, {}, True, None, None)


def send(session: requests.Session, who: str, method: str, url: str, **more: Any) -> requests.Response:
    """One request, no redirect followed. `who` is asked, as a person would name it.

    It is prepared without the session, which so only keeps connections: no cookie passes between orders,
    and ~/.netrc is not read. Raises TryAgainLater, shared where GraFx or the token server cannot be reached.
    """
    began, server = time.monotonic(), origin(url)
    settings = _proxies_and_certificates(server)
    proxy = requests.utils.select_proxy(url, settings["proxies"]) or ""
    try:
        request = requests.Request(method, url, HEADERS, **more).prepare()
        response = session.send(request, timeout=TIMEOUT, allow_redirects=False, **settings)
    except (InvalidURL, InvalidSchema, TypeError, UnicodeEncodeError):
        # Which variable by its value, since that may have a password in it.
        names = "/".join(name for name, value in os.environ.items() if value and value == proxy)
        problem = f"{names or 'HTTPS_PROXY'} is not the address of an HTTP proxy"
        if proxy.startswith("socks"):
            problem = f"{names or 'ALL_PROXY'} is a SOCKS proxy, which needs: pip install 'requests[socks]'"
        raise TryAgainLater(problem, shared=True) from None
    except ProxyError as error:
        reason, parts = _reason(error), urlsplit(proxy if "//" in proxy else f"//{proxy}")
        problem = "refuses to connect" if reason.startswith("Tunnel connection") else "is unreachable"
        problem = "wants a user and a password" if " 407" in reason else problem
        problem = f"the proxy {parts.hostname}:{parts.port} {problem} ({reason})"
        raise TryAgainLater(problem, shared=True) from None
    except (requests.RequestException, HTTPError, OSError, ValueError) as error:
        reason = f"{_reason(error)}, {server[1]}"
        if error.args and isinstance(error.args[0], MaxRetryError):  # without retries, so it did not connect
            raise TryAgainLater(f"{who} is unreachable ({reason})", who != DOWNLOAD_SERVER) from None
        raise NotUnderstood(f"{who} gave no answer ({reason})") from None
    took, path = (time.monotonic() - began) * 1000, urlsplit(url).path  # no query: it may be signed
    log.debug("%s %s%s: %s, %.0f ms", method, server[1], path, response.status_code, took)
    return response


def coding(response: requests.Response) -> str:
    """Its Content-Encoding. None was asked for, but some gateways apply one, or name what is none."""
    return sanitize(response.headers.get("Content-Encoding", "")).lower().removeprefix("x-")[:40]


def pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes, gzip decoded. Raises NotUnderstood where it may be incomplete, or is too slow."""
    raw, total = response.raw, response.raw.length_remaining
    if total is None and not raw.chunked:
        raise NotUnderstood("the answer has neither a length nor an end that shows it is whole")
    began, came = time.monotonic(), 0
    try:
        start = [raw.read(2)]

        def read(size: int) -> bytes:
            return start.pop() if start else raw.read1(size)  # which returns what is there

        if coding(response) == "gzip" and start[0] == b"\x1f\x8b":
            # Not by urllib3, which accepts a stream that ends too early.
            source: Any = SimpleNamespace(read=read)
            read, total = gzip.GzipFile(fileobj=source).read1, None
        while piece := read(64 * 1024):
            yield piece
            came, seconds = came + len(piece), time.monotonic() - began
            if seconds > SLOW_START and came < SLOWEST * seconds:
                raise NotUnderstood(f"the answer is too slow: {format_size(came)} in {seconds:.0f} s")
    except (HTTPError, OSError, EOFError, zlib.error) as error:
        reason, of = _reason(error), f" of {format_size(total)}" if total else ""
        why = "" if reason.startswith("IncompleteRead") else f" ({reason})"
        raise NotUnderstood(f"the answer broke off after {format_size(came)}{of}{why}") from None


def read_json(response: requests.Response) -> dict[str, Any]:
    """The JSON object of a small answer; empty for anything else. Raises TryAgainLater."""
    body = bytearray()
    for piece in pieces(response):
        body += piece
        if len(body) > 1024 * 1024:  # GraFx's are below 10 kB
            return {}
    said = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(body)
    if said is None and body and coding(response) not in NO_CODING:
        raise TryAgainLater(f"the answer has the unknown coding {coding(response)}")
    return said if isinstance(said, dict) else {}


def retry_after(response: requests.Response) -> float | None:
    """Seconds, from either form of Retry-After (RFC 9110, section 10.2.3); else None."""
    with contextlib.suppress(HTTPError, ValueError, OverflowError):
        seconds = Retry().get_retry_after(response.raw)
        return None if seconds is None else min(seconds, LONGEST_RETRY_AFTER)
    return None


def error_for(response: requests.Response, who: str, prefix: str = "") -> TaskRejected | TryAgainLater:
    """What an answer other than 200, 202 and 204 means, for the caller to raise. Raises TryAgainLater."""
    status, plainly = response.status_code, f"{prefix}{who} answered {_status(response)}"
    pause = retry_after(response) if who == GRAFX else None
    if status in (407, 408, 425) or not (status in (202, 204, 500) or 400 <= status < 500):
        return NotUnderstood(plainly, retry_after=pause)
    problem = read_json(response)  # RFC 9457
    said = ": ".join(sanitize(problem[key]) for key in ("title", "detail") if problem.get(key))
    # GraFx says so of this task. A 403 or 404 may be meant for all, whoever's words it has.
    proven = status in (400, 422, 500) and who == GRAFX and bool(said) and not said.startswith(ASP_NET)
    if status in (202, 204, 401, 429) or (status == 500 and not proven):
        return TryAgainLater(plainly, retry_after=pause)
    return TaskRejected(prefix + said if said else plainly, status, proven)


class Pace:
    """The rate limit: a time between two requests, 0 until GraFx answers that they are too many.

    As TCP and Postfix do it: twice as slow after a 429 or 503, a little faster after each good answer.
    So it finds a limit that is not documented, stays near it, and forgets it when it is gone.
    """

    SLOWER, FASTER = 2.0, 1.03
    LONGEST, SHORTEST = 1.0, 0.001  # seconds; a 429 doubles at least the shortest
    IDLE = 0.05  # seconds: a longer pause between two requests was not GraFx's

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._between = 0.0  # seconds from one request to the next
        self._usual = 0.0  # what it is without a limit, a mean of the last ones
        self._last = self._slowed = 0.0  # monotonic

    def wait(self) -> float:
        """Wait for this thread's turn; returns when it began to wait, in monotonic seconds."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._last + self._between)
            self._usual += (min(turn - self._last, self.IDLE) - self._usual) / 8
            self._last = turn
        if turn > now:
            time.sleep(turn - now)
        return now

    def learn(self, status: int, began: float) -> None:
        """Learn from the answer to a request that began to wait then."""
        with self._lock:
            if status in (429, 503):
                if began >= self._slowed:  # else it was on its way when another one was answered so
                    slower = self.SLOWER * max(self._between, self._usual, self.SHORTEST)
                    self._between, self._slowed = min(self.LONGEST, slower), time.monotonic()
            elif status < 400:
                self._between /= self.FASTER


# --- the token, the environment --------------------------------------------------------------


class DangerousToken(AuthBase):
    """The workshop's "dangerous" token: whoever has it can do what the integration can.

    It goes to the server of `base_url`, and to no other; shared by all threads, renewed when needed.
    """

    def __init__(self, base_url: str, token_url: str, client_id: str, client_secret: str) -> None:
        self.home, self.url = origin(base_url), token_url
        self._form = {"grant_type": "client_credentials", "audience": "https://chiligrafx.com"}
        self._form |= {"client_id": client_id, "client_secret": client_secret}
        self._lock = threading.Lock()
        self._result: str | TryAgainLater = ""  # the Authorization header, or why there is none
        # Monotonic seconds: when to fetch it anew, when it ends, when a 401 had it renewed.
        self._renew, self._ends, self._replaced = 0.0, 0.0, float("-inf")
        _secrets.append(client_secret)

    @property
    def issued(self) -> bool:
        """Whether there ever was one."""
        return self._ends > 0

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Called by requests. Raises TryAgainLater, CredentialsRejected."""
        if origin(str(request.url)) == self.home:
            request.headers["Authorization"] = self.get()
        return request

    def get(self) -> str:
        """The Authorization header. Raises TryAgainLater, CredentialsRejected."""
        began = time.monotonic()
        if began >= self._renew:
            if not self._lock.acquire(timeout=2 * sum(TIMEOUT)):
                raise TryAgainLater(f"no token: {self.url} has not answered yet", shared=True)
            try:
                if began >= self._renew:  # else another thread has tried it meanwhile
                    self._fetch()
            finally:
                self._lock.release()
        if isinstance(result := self._result, TryAgainLater):
            raise result
        return result

    def replace(self, rejected: str | None) -> bool:
        """Whether to repeat a request whose token was `rejected`; a 401 renews it at most once a minute."""
        with self._lock:
            now = time.monotonic()
            if self._result == rejected and now < self._renew:  # else another thread renews it
                if now < self._replaced + TOKEN_PAUSE:
                    return False
                self._replaced, self._renew, self._ends = now, 0.0, now
            return rejected is not None  # else it is another server's 401

    def _fetch(self) -> None:
        try:
            value, lasts = _ask_for_token(self.url, self._form)
        except TryAgainLater as error:
            now, pause = time.monotonic(), error.retry_after or 0
            if now < self._ends:  # the old one is still good
                self._renew = min(self._ends, now + max(TOKEN_PAUSE, pause))
                return
            if not isinstance(error, CredentialsRejected):
                error = TryAgainLater(f"no token: {error}", True, error.retry_after)
            self._result, self._renew = error, now + pause
        else:
            _secrets.extend((self._form["client_secret"], value))
            self._result, self._ends = f"Bearer {value}", time.monotonic() + lasts
            self._renew = self._ends - min(TOKEN_MARGIN, lasts / 2)


def _ask_for_token(url: str, form: dict[str, str]) -> tuple[str, float]:
    """A token, and for how many seconds it lasts. Raises TryAgainLater, CredentialsRejected."""
    # By a connection of its own, and without the session's token, which would wait for itself.
    with requests.Session() as session, send(session, TOKEN_SERVER, "POST", url, json=form) as response:
        said, pause, status = read_json(response), retry_after(response), response.status_code
    value, lasts = said.get("access_token"), said.get("expires_in")
    # RFC 6749, section 5.2, and Auth0's access_denied. Any other 4xx is a gateway's, or passes.
    if status in (400, 401, 403) and said.get("error") in CREDENTIAL_ERRORS:
        words = sanitize(said.get("error_description") or said["error"])
        text = f"{url} rejects SERVER_ID and SERVER_SECRET: {_status(response)} {words}".rstrip()
        raise CredentialsRejected(text, True, pause)
    # RFC 6750, section 2.1. Anything else in a header would end up in an exception's text.
    if status != 200 or not isinstance(value, str) or not re.fullmatch("[!-~]+", value):
        without = " without a token" * (status == 200)
        raise TryAgainLater(f"{url} answered {_status(response)}{without}", retry_after=pause)
    if not isinstance(lasts, (int, float)) or not 0 < lasts < 1e9:
        lasts = 3600  # where it ends earlier, a 401 tells
    return value, lasts


class GraFx:
    """One environment of GraFx, for `pool_size` threads. Raises ValueError as `prepared`."""

    def __init__(
        self, base_url: str, environment: str, token_url: str, client_id: str, client_secret: str,
        pool_size: int = 1,
    ) -> None:  # fmt: skip
        self.base_url = prepared(base_url).rstrip("/")
        self.tasks = f"{self.base_url}/grafx/api/v1/environment/{quote(environment, safe='')}/output/tasks/"
        self.token = DangerousToken(self.base_url, token_url, client_id, client_secret)
        self.session, self.pace = requests.Session(), Pace()
        self.fresh_until = time.monotonic() + FRESH
        self.session.mount(self.base_url, HTTPAdapter(pool_maxsize=pool_size))

    def poll(self, task_id: str) -> str | None:
        """The address of a finished task's file; None while it renders. Raises as order_done."""
        if time.monotonic() >= self.fresh_until:  # GraFx may have moved: its name is resolved again
            self.fresh_until = time.monotonic() + FRESH
            self.session.close()
        try:
            with self.get(self.session, self.tasks + task_id) as response:
                if response.status_code not in (200, 202, 204):
                    raise error_for(response, GRAFX)
                said = read_json(response)
                # CHILI's example startPollingOnEndpoint.ts takes a 202 for "not finished".
                return self._link(response, said, task_id) if response.status_code == 200 else None
        except NotUnderstood:
            self.session.close()
            raise

    def get(self, session: requests.Session, url: str) -> requests.Response:
        """GET. Redirects are followed here, so that the token's rule holds for each. Raises TryAgainLater."""
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
                raise TryAgainLater("redirected to what is not an http address") from None
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
            raise NotUnderstood(f"the answer was another task's: {sanitize(about)[:80]}")
        link = links.get("download") if isinstance(links, dict) else None
        if not link and about:  # from where CHILI's own web client (studio-ui) downloads
            link = f"{self.tasks}{task_id}/download"
        with contextlib.suppress(TypeError, ValueError):
            if link:
                # Not joined where it is whole, since that would change what may be signed.
                whole = re.match("https?://", link, re.IGNORECASE)
                return self._address(link if whole else urljoin(response.url, link))
        raise TaskRejected("GraFx says finished, but gives no download link", 200)

    def _address(self, given: Any) -> str:
        """An address that a server gave, to be requested. Raises ValueError as `prepared`."""
        url = prepared(given)
        home, (scheme, host, port) = self.token.home, origin(url)
        # A server behind a TLS proxy may give out http addresses; without TLS they get no token.
        if (home[0], scheme, host) == ("https", "http", home[1]) and port in (80, home[2]):
            return urlsplit(url)._replace(scheme="https", netloc=urlsplit(self.base_url).netloc).geturl()
        return url


def check_environment(grafx: GraFx, task_id: str | None) -> str:
    """Poll a pending task, else one that cannot exist; returns what is fine. Raises TryAgainLater."""
    with grafx.get(grafx.session, grafx.tasks + (task_id or NO_TASK)) as response:
        said, status = read_json(response), response.status_code
    if origin(str(response.url)) != grafx.token.home:
        host = urlsplit(str(response.url)).hostname
        raise TryAgainLater(f"{grafx.base_url} redirects to {host}: look at BASEURL")
    about = f" about {task_id}" if task_id else ""
    rejected = status == 500 and task_id and said and not str(said.get("title")).startswith(ASP_NET)
    if rejected or status in (202, 204) or (status == 200 and said):
        return f"{grafx.base_url} answers{about}"
    if status == 404 and said and not task_id:
        return f"{grafx.base_url} answers; only the first order shows whether ENVIRONMENT is right"
    words = sanitize(said.get("detail") or said.get("title") or "not in GraFx's own words").rstrip(".")
    raise TryAgainLater(
        f"{grafx.base_url} answered {_status(response)}{about}: {words}."
        " Look at BASEURL and ENVIRONMENT, and at the integration's permissions."
    )


# --- the file --------------------------------------------------------------------------------


def order_done(
    task_id: str, grafx: GraFx, orders_dir: Path, progress: Progress = lambda size, total: None
) -> Path | None:
    """Poll a task; where it is finished, download its file to `<orders_dir>/<task_id>.<extension>`.

    Returns the file once it is whole and on the disk, None while the task renders. A file that is there
    already is not downloaded again. The caller syncs the folder. Raises TaskRejected, TryAgainLater; OSError
    where the folder cannot be written.
    """
    if file := find_file(orders_dir, task_id):
        return file
    if not (link := grafx.poll(task_id)):
        return None
    # A connection of its own: nobody's late answer can be taken for the file.
    with requests.Session() as session, grafx.get(session, link) as response:
        if response.status_code == 200:
            return _save(response, orders_dir, task_id, progress)
        if response.status_code == 410:
            raise TaskRejected("no longer available: GraFx keeps a file for 4 hours", 410, final=True)
        home = origin(str(response.url)) == grafx.token.home
        raise error_for(response, GRAFX if home else DOWNLOAD_SERVER, "the download: ")


def find_file(orders_dir: Path, task_id: str) -> Path | None:
    """The file of a task where it has been delivered."""
    for extension in FORMATS:
        name = f"{orders_dir}/{task_id}.{extension}"  # as text: pathlib takes ten times as long
        if os.access(name, os.F_OK) and Path(name).is_file():
            return Path(name)
    return None


def remove_leftovers(orders_dir: Path) -> None:
    """Remove the partial downloads of a killed process, and nothing else."""
    for path in orders_dir.glob(".*.part"):
        if re.fullmatch(r"\.[\w.-]+\.part", path.name, re.ASCII):
            with contextlib.suppress(OSError):  # the next download of that order says so
                path.unlink()


def _save(response: requests.Response, orders_dir: Path, task_id: str, progress: Progress) -> Path:
    """Stream the body to its place. Raises as order_done; then nothing is left of it."""
    total = None if response.headers.get("Content-Encoding") else response.raw.length_remaining
    temp, size = orders_dir / f".{task_id}.part", 0
    try:
        # The order of these steps is the guarantee: the file has its final name only when it is whole and
        # on the disk, and the caller forgets the order only when the name is on the disk as well.
        with temp.open("w+b") as file:
            for piece in pieces(response):
                file.write(piece)
                size += len(piece)
                progress(size, total)
            file.seek(0)
            extension = _extension(response, file.read(16))
            file.seek(max(0, size - len(PNG_END)))
            if extension == "png" and file.read() != PNG_END:
                raise TaskRejected("the PNG has no end", 200, proven=True)
            os.fsync(file.fileno())
        whole = orders_dir / f"{task_id}.{extension}"
        if whole.is_dir():
            raise TryAgainLater(f"{whole} is a folder, where the file belongs: move it away")
        return temp.replace(whole)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def _extension(response: requests.Response, first: bytes) -> str:
    """The extension by type and first bytes. Raises TaskRejected where they do not agree, TryAgainLater."""
    says = sanitize(response.headers.get("Content-Type", "").partition(";")[0]).lower()[:80]
    looks = next((ext for ext, (_, begin) in FORMATS.items() if re.match(begin, first, re.DOTALL)), "")
    if looks and says in (*FORMATS[looks][0], *NO_TYPE):
        return looks
    if first and not looks and coding(response) not in NO_CODING:
        raise TryAgainLater(f"the file has the unknown coding {coding(response)}")
    if not first:
        raise TaskRejected("the file is empty", 200)
    if says in NO_TYPE:
        raise TaskRejected(f"the file is none of {', '.join(FORMATS)}", 200)
    # What is none of the formats may be a page of whatever stands in the way.
    raise TaskRejected(f"the file says {says} but is {looks or 'something else'}", 200, proven=bool(looks))
