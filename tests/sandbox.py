"""A stand-in for the CHILI GraFx API on loopback, with faults on demand. Standard library only.

As a program, to see the poller work without a CHILI account:

    python tests/sandbox.py            runs the real poller against a sandbox with ten orders
    python tests/sandbox.py --serve    only serves; prints settings for a .env and how to place an order
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import random
import re
import secrets
import shlex
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.client import responses
from pathlib import Path
from typing import Any, BinaryIO

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
TYPES = {"png": "image/png", "jpg": "image/jpeg", "gif": "image/gif", "mp4": "video/mp4"}
TYPES |= {"pdf": "application/pdf", "zip": "application/zip"}
ORDERS = {kind: kind for kind in TYPES if kind != "zip"} | {"html": "zip", "image": "png", "animation": "mp4"}
HTML, PROBLEM = "text/html; charset=utf-8", "application/problem+json; charset=utf-8"
ASPNET = {"title": "An error occurred while processing your request.", "status": 500, "traceId": "00-1-2-00"}
PAGE = b"<!DOCTYPE html><html><head><title>Error</title></head><body><h1>Bad Gateway</h1></body></html>"

# Every fault, and what is sent; NAME= is an option, and behind it stands what it is if it is not given.
FAULTS = {
    "reset": "no answer; with at= the head and so many bytes of the body first",
    "close": "the same, but with an orderly end; at=",
    "hang": "nothing until the sandbox stops; then the end",
    "trickle": "one byte each pace= (0.2) seconds, a head without end; or for `after` seconds, then the end",
    "trickle-body": "the right body, one byte each pace= (0.2) seconds",
    "500-plain": "500 with a page",
    "500-aspnet": "the problem details that ASP.NET sends for its own faults",
    "html": "200 with a page",
    "empty": "200 with nothing",
    "huge": "200 with size= (64 MiB) bytes of JSON",
    "cut": "half of the right body, with the Content-Length of that half",
    "cut-json": "half of a JSON answer, likewise",
    "other-json": "200 with value= ([])",
    "no-link": "a finished task without a link",
    "bad-link": "a finished task with link= (not a link)",
    "other-task": "200 with what is right for a question about task= (one that nobody knows)",
    "length-long": "a Content-Length 1000 above the body, then the end",
    "length-short": "a Content-Length of three quarters of the body that is sent",
    "chunked": "the right body in chunks (no fault)",
    "chunked-cut": "half of the chunks, then the end",
    "close-end": "no length; the end of the connection is the end of the body (no fault)",
    "gzip": "Content-Encoding: gzip (no fault)",
    "gzip-cut": "half of that stream, with its right length",
    "gzip-far": "the same in two members, the second of which begins behind 64 KiB (no fault)",
    "coding": "the right body, or body=, with Content-Encoding: value= (br)",
    "wrong-type": "the right body as type= (image/jpeg)",
    "octet": "the right body, or body=, as application/octet-stream",
    "redirect-loop": "a redirect to itself, for ever",
    "redirect-away": "a redirect to `elsewhere`",
    "redirect-same": "a redirect to the same path with a query, which is served normally",
    "echo-token": "500 whose detail repeats the Authorization header and the request's body",
    "slow": "the right body at rate= (20,000) bytes a second",
    "delay": "the right answer, seconds= (1) later, or once the event until= is set",
    "interim": "an interim answer (103), 0.3 seconds before the right one",
    "late": "status= (504; or 204), and pause= (0.05) seconds later the right answer, or that for task=",
}
STATUS = "problem details; body=, content_type=, retry_after="  # of status-NNN
# These change a body, so a 204 passes them by and they wait for an answer that has one.
NEED_BODY = {"trickle-body", "cut", "length-long", "length-short", "chunked", "chunked-cut", "close-end"}
NEED_BODY |= {"gzip", "gzip-cut", "gzip-far", "coding", "wrong-type", "octet"}
FAR = 70_000  # bytes: more than a reader takes at once


# --- the files ---------------------------------------------------------------------------------------------


def slices(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def skipped(kind: str, data: bytes) -> bytes:
    """These bytes as a piece of a file of this kind that its readers skip."""
    match kind:
        case "png":
            named = b"paDd" + data  # private and not needed, by the case of its letters
            return b"".join((struct.pack(">I", len(data)), named, struct.pack(">I", zlib.crc32(named))))
        case "jpg":
            parts = slices(data, 60_000)
            return b"".join(b"\xff\xfe%b%b" % (struct.pack(">H", len(part) + 2), part) for part in parts)
        case "gif":
            return b"!\xfe" + b"".join(b"%c%b" % (len(part), part) for part in slices(data, 255)) + b"\0"
        case "mp4":
            return struct.pack(">I", len(data) + 8) + b"free" + data
        case "pdf":  # an object to which nothing refers
            return b"6 0 obj\n<< /Length %d >>\nstream\n%b\nendstream\nendobj\n" % (len(data), data)
    return data


def make_file(kind: str, task_id: str, size: int) -> bytes:
    """A file like no other task's: in what is skipped stands its id, and noise for about this size."""
    whole = (HERE / "samples" / f"sample.{kind}").read_bytes()
    place = {
        "png": len(whole) - 12,  # before IEND
        "jpg": 20,  # after the JFIF segment, which has to be the first
        "gif": len(whole) - 1,
        "mp4": len(whole),
        "pdf": whole.find(b"xref\n0 "),
        "zip": whole.find(b"PK\1\2"),  # the central directory
    }[kind]
    label = task_id.encode()[:200]
    missing = max(0, size - len(whole) - len(skipped(kind, label)))
    piece = skipped(kind, label + random.Random(task_id).randbytes(missing))
    end, moved = whole[place:], place + len(piece)
    # The last lines of a PDF and the last bytes of a ZIP say where this end begins.
    if kind == "pdf":
        end = end.replace(b"startxref\n%d\n" % place, b"startxref\n%d\n" % moved)
    if kind == "zip":
        end = end[:-6] + struct.pack("<I", moved) + end[-2:]
    return b"".join((whole[:place], piece, end))


# --- what is asked, what is answered -----------------------------------------------------------------------


@dataclass
class Request:
    """One request that arrived. `status` stays None when it was never answered."""

    time: float  # time.monotonic() when it had been read
    what: str  # token, task, download, order, elsewhere, other
    method: str
    path: str  # with its query
    task_id: str | None
    headers: dict[str, str]  # names Written-Like-This, however they came
    peer: tuple[str, int]
    body: bytes = field(default=b"", repr=False)
    status: int | None = None
    fault: str | None = None

    @property
    def query(self) -> str:
        return self.path.partition("?")[2]


@dataclass
class Answer:
    status: int
    body: bytes = b""
    content_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def head(self, size: int | None) -> bytes:
        """The status line and the headers; a `size` of None leaves Content-Length out."""
        size = None if self.status in (204, 304) else size
        headers = {"Content-Type": self.content_type, "Content-Length": size, **self.headers}
        lines = [f"HTTP/1.1 {self.status} {responses.get(self.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        return "\r\n".join((*lines, "", "")).encode("latin-1", "replace")

    def whole(self) -> bytes:
        return self.head(len(self.body)) + (b"" if self.status in (204, 304) else self.body)


@dataclass
class Task:
    task_id: str
    kind: str
    ready_at: float
    questions: int  # to be asked before it is finished
    size: int
    body: bytes | None
    content_type: str | None
    link: str | None

    def pending(self) -> bool:
        return self.kind == "never" or self.questions > 0 or time.monotonic() < self.ready_at

    def file(self) -> Answer:
        """Made when it is asked for, so that many large ones are never held."""
        kind = self.kind if self.kind in TYPES else "png"
        body = make_file(kind, self.task_id, self.size) if self.body is None else self.body
        return Answer(200, body, self.content_type or TYPES[kind])


@dataclass
class Fault:
    what: str
    name: str
    times: int | None
    task_ids: Collection[str] | None
    after: float | None
    options: dict[str, Any]


def json_answer(value: object, status: int = 200, content_type: str = "application/json") -> Answer:
    return Answer(status, json.dumps(value).encode(), content_type)


def problem(code: int, detail: str, **more: str) -> Answer:
    """Problem details as in RFC 9457."""
    value: dict[str, Any] = {"title": responses.get(code, "Unknown"), "status": code, "detail": detail}
    return json_answer(value | more, code, PROBLEM)


def read_request(stream: BinaryIO, peer: tuple[str, int]) -> Request | None:
    """The next request of a connection, or None at its end. By hand: http.server is much slower."""
    line = stream.readline(65536).split()
    if len(line) != 3:
        return None
    method, path, _ = (part.decode("latin-1") for part in line)
    headers = {}
    while field_line := stream.readline(65536).strip():
        name, _, value = field_line.decode("latin-1").partition(":")
        headers[name.title()] = value.strip()
    body = stream.read(int(headers.get("Content-Length", "0")))
    return Request(time.monotonic(), "other", method, path, None, headers, peer, body)


class Loopback(socketserver.ThreadingTCPServer):
    """A server on loopback with a thread of its own; `asked` is for what it was asked."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int = 0) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Listener(Loopback):
    def __init__(self, sandbox: Sandbox, elsewhere: bool) -> None:
        self.sandbox, self.elsewhere = sandbox, elsewhere
        super().__init__()

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.sandbox.converse(request, client_address, self.elsewhere)

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without the polite shutdown, which would turn a reset into an end


class Sandbox:
    """GraFx on loopback. All of it may be used from any thread."""

    def __init__(self) -> None:
        self.environment = "cp-sandbox-1"
        self.client_id = secrets.token_urlsafe(24)
        self.client_secret = f"secret-{secrets.token_hex(16)}"
        self.tokens: list[str] = []
        self.requests: list[Request] = []
        self.refuse_credentials = False

        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._tasks: dict[str, Task] = {}
        self._faults: list[Fault] = []
        self._good_token = ""
        self._listeners = [Listener(self, elsewhere=False), Listener(self, elsewhere=True)]
        self.base_url, self.elsewhere = (listener.url for listener in self._listeners)
        self.token_url = f"{self.base_url}/oauth/token"
        self._root = f"/grafx/api/v1/environment/{self.environment}/output"
        self.root = self.base_url + self._root

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for listener in self._listeners:
            listener.__exit__()
        for connection in list(self._connections):
            with suppress(OSError):  # it may be shut already
                connection.shutdown(socket.SHUT_RDWR)

    def settings(self, folder: str | Path) -> dict[str, str]:
        return {
            "SERVER_ID": self.client_id,
            "SERVER_SECRET": self.client_secret,
            "BASEURL": self.base_url,
            "ENVIRONMENT": self.environment,
            "TOKEN_URL": self.token_url,
            "DATABASE": str(Path(folder) / "database.json"),
            "ORDERS_DIR": str(Path(folder) / "orders"),
        }

    def credentials(self) -> dict[str, str]:
        """What is to be sent for a token."""
        return {
            "grant_type": "client_credentials",
            "audience": "https://chiligrafx.com",
            "client_id": self.client_id,
            "client_secret": self.client_secret,
        }

    def add(
        self,
        kind: str = "png",
        *,
        after: float = 0.0,
        size: int = 0,
        body: bytes | None = None,
        content_type: str | None = None,
        task_id: str | None = None,
        link: str | None = None,
        questions: int = 0,
    ) -> str:
        """Make a task and return its id.

        `kind` is png, jpg, pdf, gif, mp4, zip, or "failed" (500), "expired" (finished, but its file is 410),
        "never". It is finished `after` seconds from now and when `questions` questions found it rendering.
        `size` pads the file to about so many bytes, in a way that its format allows; `body` is used instead
        of the file, `link` instead of links.download.
        """
        if kind not in (*TYPES, "failed", "expired", "never"):
            raise ValueError(f"no such kind of task: {kind}")
        task_id = task_id or str(uuid.uuid4())
        ready_at = time.monotonic() + after
        self._tasks[task_id] = Task(task_id, kind, ready_at, questions, size, body, content_type, link)
        return task_id

    def body(self, task_id: str) -> bytes:
        return self._tasks[task_id].file().body

    def fault(
        self,
        what: str,
        name: str,
        *,
        times: int | None = 1,
        task_id: str | Collection[str] | None = None,
        after: float | None = None,
        **options: Any,
    ) -> Fault:
        """The next `times` requests of this sort (task, download, token …) get this fault; None is for ever.

        FAULTS says what it does. It is for all tasks, or for one, or for several. A token that is asked for
        at `token_url`/NAME belongs to the task NAME, so that of several pollers one can be met.
        Faults that fit the same request are used in the order in which they were set. One that changes a body
        waits for an answer that has one, so a 204 does not use it up.
        """
        known = STATUS if re.fullmatch(r"status-[2-5]\d\d", name) else FAULTS.get(name)
        if known is None:
            raise ValueError(f"no such fault: {name}")
        for option in options:
            if f"{option}=" not in known:
                raise TypeError(f"{name} takes no {option}")
        task_ids = {task_id} if isinstance(task_id, str) else task_id
        fault = Fault(what, name, times, task_ids, after, options)
        with self._lock:
            self._faults.append(fault)
        return fault

    def end_fault(self, fault: Fault) -> None:
        """No more of this one, if there still is any."""
        with self._lock:
            self._faults = [one for one in self._faults if one is not fault]

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def revoke(self) -> None:
        """Every token issued so far answers 401 from now."""
        self._good_token = ""

    def asked(self, what: str, task_id: str | None = None) -> list[Request]:
        """All requests of this sort so far, for one task or for any."""
        return [one for one in list(self.requests) if one.what == what and task_id in (None, one.task_id)]

    def _classify(self, request: Request, elsewhere: bool) -> None:
        request.path = re.sub("^http://[^/]*", "", request.path)  # as it comes through a proxy
        path = request.path.partition("?")[0]
        if elsewhere:
            request.what, request.task_id = "elsewhere", path.removeprefix("/file/")
        elif found := re.fullmatch("/oauth/token/?(.*)", path):
            request.what, request.task_id = "token", found[1] or None
        elif found := re.fullmatch(f"{self._root}/tasks/([^/]+)(/download)?", path):
            request.what, request.task_id = "download" if found[2] else "task", found[1]
        elif request.method == "POST" and path.removeprefix(f"{self._root}/") in ORDERS:
            request.what = "order"

    def _right_answer(self, request: Request) -> Answer:
        task_id = request.task_id or ""
        task = self._tasks.get(task_id)
        if request.what == "elsewhere":
            return task.file() if task else problem(404, "No such file.")
        if request.what == "other":
            return problem(404, "The requested resource was not found.")
        if request.method != ("POST" if request.what in ("token", "order") else "GET"):
            return problem(405, f"{request.method} is not allowed here.")
        if request.what == "token":
            return self._token_answer(request)
        if not self._good_token or request.headers.get("Authorization") != f"Bearer {self._good_token}":
            return problem(401, "The access token is missing, expired or invalid.")
        if request.what == "order":
            task_id = self.add(ORDERS[request.path.rpartition("/")[2]], after=2.0)
            links = {"taskInfo": f"{self.root}/tasks/{task_id}"}
            return json_answer({"data": {"taskId": task_id}, "links": links})
        if task is None:
            return problem(404, f"Task {task_id} was not found.")
        if task.pending():
            return Answer(204) if request.what == "task" else problem(404, "The task is not finished.")
        if task.kind == "failed":
            detail = "Variable 'Size' has no item 'XXL'."
            trace = f"InvalidValueException: {detail}\n" + "   at Chili.Output.Render()\n" * 20
            more = {"title": "Invalid list variable value", "status": "500"}  # a text, as GraFx has it
            return problem(500, detail, **more, exceptionDetails=trace)
        if request.what == "task":
            return json_answer(self._finished(task_id))
        if task.kind == "expired":
            return problem(410, "The output of this task is no longer available.")
        return task.file()

    def _finished(self, task_id: str) -> dict[str, Any]:
        task = self._tasks.get(task_id)
        link = (task and task.link) or f"{self.root}/tasks/{task_id}/download"
        return {"data": {"taskId": task_id}, "links": {"download": link}}

    def _token_answer(self, request: Request) -> Answer:
        """The same token, as GraFx does it, until it is revoked."""
        known = False
        with suppress(ValueError):
            known = json.loads(request.body) == self.credentials()
        if self.refuse_credentials or not known:
            return json_answer({"error": "access_denied", "error_description": "Unauthorized"}, 401)
        if not self._good_token:
            self._good_token = ".".join(secrets.token_urlsafe(size) for size in (30, 200, 256))
            self.tokens.append(self._good_token)
        token = self._good_token or self.tokens[-1]
        return json_answer({"access_token": token, "expires_in": 86400, "token_type": "Bearer"})

    def converse(self, connection: socket.socket, peer: tuple[str, int], elsewhere: bool) -> None:
        """Answer the requests of one connection until either side has had enough."""
        self._connections.add(connection)
        with suppress(OSError), connection.makefile("rb") as stream:  # the peer may go away at any time
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._stopping.is_set():
                request = read_request(stream, peer)
                if request is None or not self._reply(connection, request, elsewhere):
                    break
        self._connections.discard(connection)

    def _reply(self, connection: socket.socket, request: Request, elsewhere: bool) -> bool:
        """Answer one request. Returns whether the connection goes on."""
        self._classify(request, elsewhere)
        with self._lock:
            self.requests.append(request)
            answer = self._right_answer(request)
            fault = self._take_fault(request, answer)
            if answer.status == 204:
                self._tasks[request.task_id or ""].questions -= 1
        if fault is None:
            request.status = answer.status
            connection.sendall(answer.whole())
            return True
        request.fault = fault.name
        answer = self._altered(request, answer, fault)
        return self._send_oddly(connection, request, answer, fault)

    def _take_fault(self, request: Request, answer: Answer) -> Fault | None:
        if request.query == "again=loop":
            return Fault(request.what, "redirect-loop", 1, None, None, {})
        for fault in self._faults:
            others = fault.task_ids is not None and request.task_id not in fault.task_ids
            redirected = fault.name == "redirect-same" and request.query == "again=1"
            if fault.what != request.what or others or redirected:
                continue
            if fault.name in NEED_BODY and not answer.body:
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.end_fault(fault)
            return fault
        return None

    def _altered(self, request: Request, right: Answer, fault: Fault) -> Answer:
        """The answer of a fault that lies in what is said; else the right one."""
        name, option, body = fault.name, fault.options, right.body
        if name.startswith("status-"):
            answer = problem(int(name[7:]), "This answer was ordered by a test.")
            if "retry_after" in option:
                answer.headers["Retry-After"] = str(option["retry_after"])
            answer.body = option.get("body", answer.body)
            answer.content_type = option.get("content_type", answer.content_type)
            return answer
        if name.startswith("redirect-"):
            return self._redirect(request, name)
        if name.startswith("gzip"):
            return replace(right, body=gzipped(body, name), headers={"Content-Encoding": "gzip"})
        if name == "late" and "task" in option:
            other: str = option["task"]
            right = self._tasks[other].file()
            return right if request.what == "download" else json_answer(self._finished(other))
        unlinked: dict[str, Any] = {"data": {"taskId": request.task_id}, "links": {}}
        linked = unlinked | {"links": {"download": option.get("link", "not a link")}}
        whole = json.dumps({"access_token": "ey"} if request.what == "token" else unlinked).encode()
        sent = f"{request.headers.get('Authorization')} {request.body.decode('utf-8', 'replace')}"
        answers = {
            "500-plain": Answer(500, PAGE, HTML),
            "500-aspnet": json_answer(ASPNET, 500, PROBLEM),
            "html": Answer(200, PAGE, HTML),
            "empty": Answer(200, b"", right.content_type),
            "huge": Answer(200, b"", "application/json"),
            "cut": replace(right, body=body[: len(body) // 2]),
            "cut-json": Answer(200, whole[: len(whole) // 2], "application/json"),
            "other-json": json_answer(option.get("value", [])),
            "no-link": json_answer(unlinked),
            "bad-link": json_answer(linked),
            "other-task": json_answer(self._finished(option.get("task", str(uuid.uuid4())))),
            "close-end": replace(right, headers={"Connection": "close"}),
            "coding": replace(right, headers={"Content-Encoding": option.get("value", "br")}),
            "wrong-type": replace(right, content_type=option.get("type", "image/jpeg")),
            "octet": replace(right, content_type="application/octet-stream"),
            "echo-token": problem(500, f"Could not process the request with {sent}"),
        }
        answer = answers.get(name, right)
        if name in ("coding", "octet"):
            answer.body = option.get("body", body)
        return answer

    def _redirect(self, request: Request, how: str) -> Answer:
        path = request.path.partition("?")[0]
        if how == "redirect-away":
            to = f"{self.elsewhere}/file/{request.task_id or ''}"
        else:
            to = f"{self.base_url}{path}?again={'loop' if how == 'redirect-loop' else '1'}"
        # A 302 turns a POST into a GET.
        code = 307 if how == "redirect-same" and request.method == "POST" else 302
        return Answer(code, b"", None, {"Location": to})

    def _send_oddly(self, connection: socket.socket, request: Request, answer: Answer, fault: Fault) -> bool:
        """Send it as the fault has it, if it lies in that. Returns whether the connection goes on."""
        name, option, body, size = fault.name, fault.options, answer.body, len(answer.body)
        if name == "hang":
            self._stopping.wait()
            return False
        if name in ("reset", "close"):
            if "at" in option:
                request.status = answer.status
                connection.sendall(answer.head(size) + body[: option["at"]])
            if name == "reset":
                # No lingering: closing drops what is unsent and tells the peer with an RST.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False

        request.status = answer.status
        match name:
            case "delay" if "until" in option:
                option["until"].wait(120)
            case "delay":
                self._stopping.wait(option.get("seconds", 1.0))
            case "interim":
                connection.sendall(b"HTTP/1.1 103 Soon\r\nLink: </style.css>; rel=preload\r\n\r\n")
                self._stopping.wait(0.3)
            case "late":
                request.status, pause = option.get("status", 504), option.get("pause", 0.05)
                soon = Answer(204) if request.status == 204 else Answer(request.status, PAGE, HTML)
                if not pause:  # both in one segment
                    connection.sendall(soon.whole() + answer.whole())
                    return True
                connection.sendall(soon.whole())
                self._stopping.wait(pause)
            case "slow":
                rate = option.get("rate", 20_000)
                connection.sendall(answer.head(size))
                return self._drip(connection, slices(body, max(1, rate // 20)), 1 / rate)
            case "trickle-body":
                connection.sendall(answer.head(size))
                return self._drip(connection, slices(body, 1), option.get("pace", 0.2))
            case "trickle":
                start, pace = answer.head(size)[:-2] + b"X-Padding: ", option.get("pace", 0.2)
                endless = itertools.chain(slices(start, 1), itertools.repeat(b"a"))
                number = None if fault.after is None else round(fault.after / pace)
                self._drip(connection, itertools.islice(endless, number), pace)
                return False
            case "length-long" | "length-short" | "close-end":
                said = {"length-long": size + 1000, "length-short": size - size // 4}.get(name)
                connection.sendall(answer.head(said) + body)
                return name == "length-short"
            case "chunked" | "chunked-cut":
                chunks = slices(body, min(65536, size // 3 + 1))
                whole = name == "chunked"
                send_chunks(connection, answer, chunks if whole else chunks[: len(chunks) // 2], end=whole)
                return whole
            case "huge":
                block = b'{"links": {}},\n' * 4000
                blocks = itertools.repeat(block, max(1, option.get("size", 64 * MIB) // len(block)))
                send_chunks(connection, answer, itertools.chain((b"[",), blocks, (b"{}]",)))
                return True
        connection.sendall(answer.whole())
        return True

    def _drip(self, connection: socket.socket, parts: Iterable[bytes], pace: float) -> bool:
        """Send these parts at `pace` seconds per byte, until the sandbox stops."""
        due = time.monotonic()
        for part in parts:
            connection.sendall(part)
            due += len(part) * pace
            if self._stopping.wait(max(0.0, due - time.monotonic())):
                return False
        return True


def gzipped(body: bytes, how: str) -> bytes:
    if how == "gzip-far":  # not compressed, so that it is as long as it has to be
        assert len(body) > FAR, "the second member would be empty"
        return gzip.compress(body[:FAR], 0) + gzip.compress(body[FAR:])
    packed = gzip.compress(body)
    return packed[: len(packed) // 2] if how == "gzip-cut" else packed


def send_chunks(connection: socket.socket, answer: Answer, chunks: Iterable[bytes], end: bool = True) -> None:
    answer.headers["Transfer-Encoding"] = "chunked"
    connection.sendall(answer.head(None))
    for chunk in chunks:
        connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    if end:
        connection.sendall(b"0\r\n\r\n")


# --- the program -------------------------------------------------------------------------------------------


def new_folder(orders: Collection[str]) -> Path:
    """A temporary folder with folders for files and a database.json in which these orders wait."""
    folder = Path(tempfile.mkdtemp(prefix="grafx-sandbox-"))
    for name in ("orders", "done"):
        (folder / name).mkdir()
    added = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    fields = {task_id: {"projectID": str(uuid.uuid4()), "added": added} for task_id in orders}
    (folder / "database.json").write_text(json.dumps({"orders": fields, "failed": {}}, indent=4) + "\n")
    return folder


def run_poller() -> int:
    with Sandbox() as grafx:
        slow = grafx.add("png", after=3, size=2_000_000)
        grafx.fault("download", "slow", task_id=slow, times=None, rate=500_000)
        good = {
            grafx.add("png"): "PNG, ready",
            grafx.add("png", after=3): "PNG that renders for 3 s",
            slow: "PNG that renders for 3 s and downloads for 4 s",
            **{grafx.add(kind): kind.upper() for kind in ("jpg", "pdf", "gif", "mp4", "zip")},
        }
        bad = {
            grafx.add("failed"): "a render that fails",
            grafx.add("expired"): "a file that is no longer there",
        }
        folder = new_folder(good | bad)
        database, files, copies = folder / "database.json", folder / "orders", folder / "done"
        print(f"A local GraFx is at {grafx.base_url}")
        print(f"{len(good | bad)} orders are in {database}:")
        for task_id, what in (good | bad).items():
            print(f"  {task_id}  {what}")
        on_done = f"cp {{}} {shlex.quote(str(copies))}"
        print(f"The poller starts, with ON_DONE={on_done}. Ctrl-C stops both.\n", flush=True)

        hurry = {"POLL_INTERVAL": "5", "GIVE_UP_AFTER": "3", "ON_DONE": on_done}
        environment = os.environ | grafx.settings(folder) | hurry
        poller = subprocess.Popen([sys.executable, "poller.py"], cwd=HERE.parent, env=environment)
        try:
            while json.loads(database.read_text())["orders"] and poller.poll() is None:
                time.sleep(0.2)
        finally:
            poller.terminate()
            poller.wait()

    def right(place: Path) -> int:
        """How many files are there, each with its own content."""
        return sum(path.read_bytes() == grafx.body(path.stem) for path in place.glob("[!.]*"))

    delivered, done = right(files), right(copies)
    failed = json.loads(database.read_text())["failed"]
    print(f"\nDelivered: {delivered} of {len(good)}")
    print(f"ON_DONE ran for: {done} of {len(good)}")
    print(f"Failed: {len(failed)}, expected {len(bad)}")
    print(f"The files are in {files}, and copies in {copies}")
    for path in sorted(files.glob("[!.]*")):
        print(f"  {path.stat().st_size:>9,}  {path.name}")
    return 0 if delivered == done == len(good) and set(failed) == set(bad) else 1


def serve() -> int:
    with Sandbox() as grafx:
        print("# Put these lines into .env. The local GraFx serves until Ctrl-C.")
        for name, value in grafx.settings(new_folder({})).items():
            print(f"{name}={value}")
        credentials = json.dumps(grafx.credentials())
        print(
            f"""
# To order a render (png, jpg, pdf, gif, mp4, html, image or animation), get a token, and send it:
# TOKEN=$(curl -s {grafx.token_url} -H 'Content-Type: application/json' -d '{credentials}' \\
#     | {Path(sys.executable).name} -c 'import json, sys; print(json.load(sys.stdin)["access_token"])')
# curl -X POST {grafx.root}/png -H "Authorization: Bearer $TOKEN"
# Then add the taskId of the answer: python db.py add TASK_ID""",
            flush=True,
        )
        threading.Event().wait()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--serve", action="store_true", help="only serve, until Ctrl-C, without the poller")
    arguments = parser.parse_args()
    # A stop from outside has to stop the poller as well, so it goes the way of Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return serve() if arguments.serve else run_poller()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
