"""A stand-in for the CHILI GraFx API on loopback, with faults on demand. Standard library only.

As a program, to see the poller work without a CHILI account:

    python tests/sandbox.py            runs the real poller against a sandbox with ten orders
    python tests/sandbox.py --serve    only serves; prints settings for a .env and how to place an order

As a library, in tests:

    from sandbox import Sandbox

    with Sandbox() as grafx:
        task = grafx.add("png", after=1.5)                  # renders for 1.5 seconds
        grafx.fault("download", "reset", task_id=task)      # its first download ends in a reset
        run_something(env=grafx.settings(folder))
        assert delivered == grafx.body(task)
        assert [r.status for r in grafx.requests if r.what == "task"] == [204, 200]
"""

from __future__ import annotations

import argparse
import base64
import colorsys
import gzip
import hashlib
import io
import itertools
import json
import os
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
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache, lru_cache
from http.client import responses
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
AUDIENCE = "https://chiligrafx.com"
TOKEN_HEADER = {"alg": "RS256", "typ": "JWT"}
TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "pdf": "application/pdf",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "zip": "application/zip",
}
UNFILED = ("failed", "expired", "never")  # kinds of task whose file nobody can get
ORDERS = {kind: kind for kind in TYPES if kind != "zip"} | {"html": "zip", "image": "png", "animation": "mp4"}
PAGE = b"<!DOCTYPE html><html><head><title>Error</title></head><body><h1>Bad Gateway</h1></body></html>"

# Every fault, with the options that it takes.
FAULTS: dict[str, tuple[str, ...]] = {
    "reset": ("at",),
    "close": ("at",),
    "hang": (),
    "trickle": ("pace",),
    "trickle-body": ("pace",),
    "500-plain": (),
    "500-aspnet": (),
    "html": (),
    "cut": (),
    "cut-json": (),
    "other-json": ("value",),
    "no-link": (),
    "bad-link": ("link",),
    "other-task": ("task",),
    "length-long": (),
    "length-short": (),
    "chunked": (),
    "chunked-cut": (),
    "close-end": (),
    "gzip": (),
    "gzip-cut": (),
    "gzip-far": (),
    "gzip-padded": (),
    "coding": ("value", "body"),
    "wrong-type": ("type",),
    "octet": ("body",),
    "empty": (),
    "huge": ("size",),
    "redirect-loop": (),
    "redirect-away": (),
    "redirect-same": (),
    "echo-token": (),
    "slow": ("rate",),
    "delay": ("seconds", "until"),
    "interim": ("pause",),
    "late": ("status", "pause", "task"),
}
STATUS_OPTIONS = ("retry_after", "body", "content_type")  # of status-NNN
# These change a body, so a 204 passes them by and they wait for an answer that has one.
NEED_BODY = {"trickle-body", "cut", "length-long", "length-short", "chunked", "chunked-cut", "close-end"}
NEED_BODY |= {"gzip", "gzip-cut", "gzip-far", "gzip-padded", "coding", "wrong-type", "octet"}
# These lie in how an answer is sent; the others, in what it says.
ODDLY_SENT = {"reset", "close", "hang", "trickle", "trickle-body", "length-long", "length-short", "chunked"}
ODDLY_SENT |= {"chunked-cut", "close-end", "huge", "slow", "delay", "interim", "late"}
HARMLESS = ("slow", "delay", "interim")  # a 204 that is sent so is one all the same
FAR = 70_000  # bytes: more than a reader takes at once


# --- the files ---------------------------------------------------------------------------------------------

# Five rows of three dots; each row is one octal digit.
DOTS = "75557 26227 71747 71717 55711 74717 74757 71222 75757 75717 25755 65656 34443 65556 74747 74744"
GLYPHS = {f"{digit:x}": dots for digit, dots in enumerate(DOTS.split(" "))}


@lru_cache(maxsize=512)
def picture(hue: float, word: str = "", scale: int = 1) -> bytes:
    """A PNG of 60x40 units of `scale` pixels: a card on a gradient of this hue, with 4 hex digits on it."""

    def colour(saturation: float, value: float) -> bytes:
        return bytes(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))

    palette = b"".join(colour(0.25 + step / 320, 0.98 - step / 400) for step in range(200))
    palette += b"\xff\xff\xff\x26\x28\x2c\xc9\xcc\xd1" + colour(0.8, 0.62) + colour(0.35, 1.0)
    palette += b"\x00\xae\xef\xec\x00\x8c\xff\xf2\x00\x23\x1f\x20"
    white, ink, grey, strong, light, cyan = range(200, 206)

    width, height = 60 * scale, 40 * scale
    ramp = bytes(199 * x // (width + height) for x in range(width + height))
    rows = [bytearray(ramp[y : y + width]) for y in range(height)]

    def box(x: float, y: float, wide: float, high: float, index: int) -> None:
        left, right = round(x * scale), round((x + wide) * scale)
        for row in rows[round(y * scale) : round((y + high) * scale)]:
            row[left:right] = bytes((index,)) * (right - left)

    def disc(x: float, y: float, radius: float, index: int) -> None:
        for line in range(round((y - radius) * scale), round((y + radius) * scale)):
            half = max(0.0, radius**2 - ((line + 0.5) / scale - y) ** 2) ** 0.5
            box(x - half, line / scale, 2 * half, 1 / scale, index)

    for x, y in itertools.product((4, 56), (4, 36)):  # crop marks, as a printer wants them
        box(x - 0.1, y - 3 if y < 20 else y + 1, 0.2, 2, ink)
        box(x - 3 if x < 30 else x + 1, y - 0.1, 2, 0.2, ink)
    box(4, 4, 52, 32, white)
    box(4, 4, 15, 32, strong)
    disc(11.5, 14, 5, light)
    disc(11.5, 14, 2.5, white)
    box(7.5, 24, 8, 1, light)
    box(7.5, 27, 8, 1, light)
    for place, letter in enumerate(word):
        for y, dots in enumerate(GLYPHS.get(letter, "00000")):
            for x in range(3):
                if int(dots) & (4 >> x):
                    box(23 + 8 * place + 2 * x, 8 + 2 * y, 2, 2, ink)
    for y, wide in enumerate((29, 26, 20)):
        box(23, 21.5 + 2.5 * y, wide, 1, grey)
    for place in range(4):
        box(23 + 3 * place, 31, 2, 2, cyan + place)

    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            png_chunk(b"PLTE", palette),
            png_chunk(b"IDAT", pixels),
            png_chunk(b"IEND", b""),
        )
    )


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


@dataclass(frozen=True)
class File:
    """A file that is made piece by piece when it is asked for, so that a large one is never held."""

    kind: str
    task_id: str
    size: int = 0  # padded to about this many bytes
    scale: int = 1  # of its pictures


Body = bytes | File


NOISE = secrets.token_bytes(MIB)


@cache
def sample(kind: str) -> bytes:
    return (HERE / "samples" / f"sample.{kind}").read_bytes()


def task_picture(task_id: str, scale: int) -> bytes:
    hue = zlib.crc32(task_id.encode()) % 24 / 24
    return picture(hue, task_id[:4].lower() if scale > 1 else "", scale)


# What each format has room for, where a reader skips it: bytes around one such piece, and its largest size.
ROOM = {
    "png": (12, MIB),
    "jpg": (4, 60_000),
    "gif": (4, 255),
    "mp4": (8, MIB),
    "pdf": (0, MIB),
    "zip": (0, MIB),
}


def skipped(kind: str, data: bytes) -> bytes:
    """These bytes as a piece of a file of this kind that its readers skip."""
    match kind:
        case "png":
            return png_chunk(b"paDd", data)  # an ancillary, private chunk by the case of its letters
        case "jpg":
            return b"\xff\xfe" + struct.pack(">H", len(data) + 2) + data
        case "gif":
            return b"!\xfe" + bytes((len(data),)) + data + b"\0"
        case "mp4":
            return struct.pack(">I", len(data) + 8) + b"free" + data
    return data


def ends(file: File, padding: int) -> tuple[bytes, bytes]:
    """What stands before and after the padding. The task's id is in it: each task has its own file."""
    label = skipped(file.kind, file.task_id.encode()[:200])
    match file.kind:
        case "png":
            whole = task_picture(file.task_id, file.scale)
            return whole[:-12] + label, whole[-12:]  # IEND is 12 bytes
        case "jpg":
            whole = sample("jpg")
            cut = 4 + int.from_bytes(whole[4:6], "big")  # after the JFIF segment, which has to be the first
            return whole[:cut] + label, whole[cut:]
        case "gif":
            return sample("gif")[:-1] + label, b";"
        case "mp4":
            return sample("mp4") + label, b""
        case "pdf":
            return pdf(file.task_id, padding)
    return zipped(file, padding)


def pdf(task_id: str, padding: int) -> tuple[bytes, bytes]:
    red, green, blue = colorsys.hsv_to_rgb(zlib.crc32(task_id.encode()) % 24 / 24, 0.6, 0.8)
    text = re.sub(r"[^\w-]", "", task_id)
    drawing = (
        f"{red:.2f} {green:.2f} {blue:.2f} rg 20 20 260 160 re f 1 1 1 rg 30 30 240 140 re f\n"
        f"0 g BT /F1 24 Tf 45 120 Td (Order {text[:4]}) Tj /F1 9 Tf 0 -30 Td ({text}) Tj ET"
    ).encode("ascii", "replace")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(drawing), drawing),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    head = b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n"
    places = []
    for number, text_of in enumerate(objects, 1):
        places.append(len(head))
        head += b"%d 0 obj\n%b\nendobj\n" % (number, text_of)
    places.append(len(head))
    head += b"6 0 obj\n<< /Length %d >>\nstream\n" % padding  # nothing refers to it: a reader skips it
    end = b"\nendstream\nendobj\n"
    table = b"xref\n0 7\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(head) + padding + len(end)
    return head, end + table + b"trailer\n<< /Size 7 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % start


def zipped(file: File, padding: int) -> tuple[bytes, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in (1, 2):
            page = task_picture(f"{number}{file.task_id}", file.scale)
            archive.writestr(zipfile.ZipInfo(f"{file.task_id[:8]}-{number}.png"), page)
    whole = out.getvalue()
    # The padding stands before the central directory, and the end record has to know where that begins.
    start = int.from_bytes(whole[-6:-2], "little")
    return whole[:start], whole[start:-6] + struct.pack("<I", start + padding) + whole[-2:]


def layout(file: File) -> tuple[bytes, list[int], bytes]:
    """The head, the sizes of the pieces of padding, and the tail."""
    around, largest = ROOM[file.kind]
    missing = file.size - sum(len(end) for end in ends(file, 0))
    full, rest = divmod(max(0, missing), around + largest)
    sizes = [around + largest] * full + ([max(rest, around + 1)] if rest else [])
    head, tail = ends(file, sum(sizes))
    return head, sizes, tail


def pieces(body: Body) -> Iterator[bytes]:
    if isinstance(body, bytes):
        yield body
        return
    head, sizes, tail = layout(body)
    yield head
    around, _ = ROOM[body.kind]
    for number, size in enumerate(sizes):  # numbered, so that pieces that change places change the file
        yield skipped(
            body.kind, (struct.pack(">Q", number) + NOISE[8 : max(8, size - around)])[: size - around]
        )
    yield tail


def length(body: Body) -> int:
    if isinstance(body, bytes):
        return len(body)
    head, sizes, tail = layout(body)
    return len(head) + sum(sizes) + len(tail)


def slices(body: Body, size: int) -> Iterator[bytes]:
    for piece in pieces(body):
        for start in range(0, len(piece), size):
            yield piece[start : start + size]


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
    body: Body = b""
    content_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Task:
    kind: str
    ready_at: float
    questions: int  # to be answered 204 before it is finished
    file: Body
    content_type: str
    link: str | None

    def pending(self) -> bool:
        return self.kind == "never" or self.questions > 0 or time.monotonic() < self.ready_at


@dataclass
class Fault:
    what: str
    name: str
    times: int | None
    task_id: str | Collection[str] | None
    after: float | None
    options: dict[str, Any]

    def hits(self, request: Request) -> bool:
        wanted = (self.task_id,) if isinstance(self.task_id, str) else self.task_id
        return self.what == request.what and (wanted is None or request.task_id in wanted)


def json_answer(value: object, status: int = 200, content_type: str = "application/json") -> Answer:
    return Answer(status, json.dumps(value).encode(), content_type)


def problem(status: int, detail: str, more: dict[str, str] | None = None) -> Answer:
    """Problem details as in RFC 9457."""
    value: dict[str, object] = {
        "type": f"https://httpstatuses.io/{status}",
        "title": responses.get(status, "Unknown"),
        "status": status,
        "detail": detail,
    }
    return json_answer(value | (more or {}), status, "application/problem+json; charset=utf-8")


def head(answer: Answer, size: int | None) -> bytes:
    """The status line and the headers; a `size` of None leaves Content-Length out."""
    lines = [f"HTTP/1.1 {answer.status} {responses.get(answer.status, 'Unknown')}"]
    if answer.content_type is not None:
        lines.append(f"Content-Type: {answer.content_type}")
    if size is not None and not bodiless(answer):
        lines.append(f"Content-Length: {size}")
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    return "\r\n".join((*lines, "", "")).encode("latin-1", "replace")


def bodiless(answer: Answer) -> bool:
    return answer.status in (204, 304)


def read_request(stream: BinaryIO, connection: socket.socket, peer: tuple[str, int]) -> Request | None:
    """The next request of a connection, or None at its end. By hand: http.server is much slower."""
    line = stream.readline(65536).split()
    if len(line) != 3:
        return None
    method, path, version = (part.decode("latin-1") for part in line)
    headers = {}
    while (field_line := stream.readline(65536)) not in (b"\r\n", b"\n"):
        if not field_line:
            return None
        name, _, value = field_line.decode("latin-1").partition(":")
        headers[name.title()] = value.strip()
    if version == "HTTP/1.0":
        headers.setdefault("Connection", "close")
    if "Expect" in headers:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    size = headers.get("Content-Length", "0")
    body = stream.read(int(size)) if size.isdecimal() else b""
    return Request(time.monotonic(), "other", method, path, None, headers, peer, body)


class Listener(socketserver.ThreadingTCPServer):
    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False

    def __init__(self, sandbox: Sandbox, elsewhere: bool) -> None:
        self.sandbox, self.elsewhere = sandbox, elsewhere
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.sandbox.converse(request, client_address, self.elsewhere)

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without the polite shutdown, which would turn a reset into an end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Sandbox:
    """GraFx on loopback. All of it may be used from any thread."""

    def __init__(self, expires_in: float = 86400, *, picture: bool = False) -> None:
        """`expires_in`: the life of a token in seconds; `picture`: large pictures instead of tiny ones."""
        self.expires_in = expires_in
        self.picture = picture
        self.environment = "cp-sandbox-1"
        self.client_id = secrets.token_urlsafe(24)
        self.client_secret = f"secret-{secrets.token_hex(16)}"
        self.tokens: list[str] = []
        self.requests: list[Request] = []
        self.stubborn = False  # the same token again and again, even after `revoke`
        self.refuse_credentials = False

        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._tasks: dict[str, Task] = {}
        self._faults: list[Fault] = []
        self._token_ends: dict[str, float] = {}  # of the tokens that are not revoked
        self._cached: tuple[str, float] | None = None  # the last token, and its end
        self._listeners = [Listener(self, elsewhere=False), Listener(self, elsewhere=True)]
        self.base_url, self.elsewhere = (listener.url for listener in self._listeners)
        self.token_url = f"{self.base_url}/oauth/token"
        self._root = f"/grafx/api/v1/environment/{self.environment}/output"
        self.root = self.base_url + self._root
        self._place = re.compile(re.escape(self._root) + r"/tasks/([^/]+)(/download)?")

    def __enter__(self) -> Sandbox:
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):  # it may be shut already
                connection.shutdown(socket.SHUT_RDWR)

    # --- what a test says ---

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

    def add(
        self,
        kind: str = "png",
        *,
        after: float = 0.0,
        size: int | None = None,
        body: bytes | None = None,
        content_type: str | None = None,
        task_id: str | None = None,
        link: str | None = None,
        questions: int | None = None,
        picture: bool | None = None,
    ) -> str:
        """Make a task and return its id.

        `kind` is png, jpg, pdf, gif, mp4, zip, or "failed" (500), "expired" (finished, but its file is 410),
        "never". It is finished `after` seconds from now and when `questions` questions were answered 204.
        `size` pads the file to about so many bytes, in a way that its format allows; `body` is used instead
        of the file, `link` instead of links.download.
        """
        if kind not in TYPES and kind not in UNFILED:
            raise ValueError(f"no such kind of task: {kind}")
        made = kind if kind in TYPES else "png"
        task_id = task_id or str(uuid.uuid4())
        large = self.picture if picture is None else picture
        file = body if body is not None else File(made, task_id, size or 0, scale=10 if large else 1)
        ready_at = time.monotonic() + after
        with self._lock:
            self._tasks[task_id] = Task(
                kind, ready_at, questions or 0, file, content_type or TYPES[made], link
            )
        return task_id

    def body(self, task_id: str) -> bytes:
        return b"".join(pieces(self._tasks[task_id].file))

    def sha256(self, task_id: str) -> str:
        whole = hashlib.sha256()
        for piece in pieces(self._tasks[task_id].file):
            whole.update(piece)
        return whole.hexdigest()

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

        Of all tasks, or of one, or of several. A token that is asked for at `token_url`/NAME belongs to the
        task NAME, so that of several pollers one can be met.
        Faults that fit the same request are used in the order in which they were set. One that changes a body
        waits for an answer that has one, so a 204 does not use it up.

        reset, close           no answer; with at=N the head and N bytes of the body first
        hang                   nothing, for `after` seconds or until the sandbox stops; then the end
        trickle, trickle-body  one byte each `pace` seconds (0.2), a head without end, or for `after` seconds
                               and then the connection's end / the right body
        status-NNN             problem details; retry_after=, body=, content_type=
        500-plain              HTML
        500-aspnet             the problem details that ASP.NET sends for its own faults
        html, empty, huge      200 with a page / nothing / `size` bytes (64 MiB) of JSON
        cut                    half of the right body, with the Content-Length of that half
        cut-json               half of a JSON answer, likewise
        other-json             200 with value= ([])
        no-link, bad-link      a finished task without a link / with link= ("not a link")
        other-task             200 with what is right for a question about task= (one that nobody knows)
        length-long            a Content-Length 1000 above the body, then the end
        length-short           a Content-Length of three quarters of the body that is sent
        chunked, chunked-cut   a whole one (no fault) / half of the chunks, then the end
        close-end              no length; the end of the connection is the end of the body (no fault)
        gzip, gzip-cut         Content-Encoding: gzip (no fault) / half of that stream, with its right length
        gzip-far               the same in two members, the second of which begins behind 64 KiB (no fault)
        gzip-padded            the same with 70,000 zeros behind it, as tapes have it (no fault)
        coding                 Content-Encoding: value= (br) for the right body or body=; deflate really is
        wrong-type, octet      the right body as type= (image/jpeg) / it or body= as application/octet-stream
        redirect-loop          to itself, for ever
        redirect-away          to `elsewhere`
        redirect-same          to the same path with a query, served normally
        echo-token             500 whose detail repeats the Authorization header and the request's body
        slow                   the right body at `rate` bytes a second (20,000)
        delay                  the right answer, `seconds` later (1), or once the event `until` is set
        interim                an interim answer (103), `pause` seconds (0.3) before the right one
        late                   status= (504; 204), `pause` seconds later (0.05; 0: in the same segment) on the
                               same connection the right answer, or with task= what is right for that one
        """
        known = STATUS_OPTIONS if re.fullmatch(r"status-[2-5]\d\d", name) else FAULTS.get(name)
        if known is None:
            raise ValueError(f"no such fault: {name}")
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"{name} takes no {', '.join(unknown)}")
        fault = Fault(what, name, times, task_id, after, options)
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
        with self._lock:
            self._token_ends.clear()

    def asked(self, what: str, task_id: str | None = None) -> list[Request]:
        """All requests of this sort so far, for one task or for any."""
        return [one for one in list(self.requests) if one.what == what and task_id in (None, one.task_id)]

    # --- the right answers ---

    def _classify(self, request: Request, elsewhere: bool) -> None:
        path = request.path.partition("?")[0]
        if elsewhere:
            request.what = "elsewhere"
            request.task_id = path.removeprefix("/file/") if path.startswith("/file/") else None
        elif path == "/oauth/token" or path.startswith("/oauth/token/"):
            request.what, request.task_id = "token", path.removeprefix("/oauth/token").strip("/") or None
        elif found := self._place.fullmatch(path):
            request.task_id = found[1]
            request.what = "download" if found[2] else "task"
        elif request.method == "POST" and path.removeprefix(f"{self._root}/") in ORDERS:
            request.what = "order"

    def _right_answer(self, request: Request) -> Answer:
        if request.what == "elsewhere":
            task = self._tasks.get(request.task_id or "")
            if request.task_id is None:
                return Answer(200, PAGE, "text/html; charset=utf-8")
            return Answer(200, task.file, task.content_type) if task else problem(404, "No such file.")
        if request.what == "other":
            return problem(404, "The requested resource was not found.")
        if request.method != ("POST" if request.what in ("token", "order") else "GET"):
            return problem(405, f"{request.method} is not allowed here.")
        if request.what == "token":
            return self._token_answer(request)
        if not self._authorized(request):
            answer = problem(401, "The access token is missing, expired or invalid.")
            answer.headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
            return answer
        if request.what == "order":
            return self._order_answer(request)
        return self._task_answer(request)

    def _task_answer(self, request: Request) -> Answer:
        assert request.task_id is not None
        task = self._tasks.get(request.task_id)
        if task is None:
            return problem(404, f"Task {request.task_id} was not found.")
        if task.pending():
            return Answer(204) if request.what == "task" else problem(404, "The task is not finished.")
        if task.kind == "failed":
            detail = "Variable 'Size' has no item 'XXL'."
            more = {
                "title": "Invalid list variable value",
                "status": "500",  # GraFx gives the number as text, too
                "exceptionDetails": f"InvalidValueException: {detail}\n"
                + "   at Chili.Output.Render()\n" * 20,
            }
            return problem(500, detail, more)
        if request.what == "task":
            return json_answer(self._finished(request.task_id))
        if task.kind == "expired":
            return problem(410, "The output of this task is no longer available.")
        return Answer(200, task.file, task.content_type)

    def _finished(self, task_id: str) -> dict[str, Any]:
        task = self._tasks.get(task_id)
        link = (task and task.link) or f"{self.root}/tasks/{task_id}/download"
        return {"data": {"taskId": task_id}, "links": {"download": link}}

    def _order_answer(self, request: Request) -> Answer:
        kind = ORDERS[request.path.partition("?")[0].rpartition("/")[2]]
        request.task_id = self.add(kind, after=2.0)
        links = {"taskInfo": f"{self.root}/tasks/{request.task_id}"}
        return json_answer({"data": {"taskId": request.task_id}, "links": links})

    def _authorized(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._token_ends.get(token, 0.0) > time.monotonic()

    def _token_answer(self, request: Request) -> Answer:
        try:
            if "json" in request.headers.get("Content-Type", ""):
                asked = json.loads(request.body)
            else:
                asked = dict(parse_qsl(request.body.decode()))
        except ValueError:
            asked = None
        wanted = {
            "grant_type": "client_credentials",
            "audience": AUDIENCE,
            "client_id": self.client_id,
            "client_secret": self.client_secret,
        }
        known = isinstance(asked, dict) and all(asked.get(name) == value for name, value in wanted.items())
        if self.refuse_credentials or not known:
            return json_answer({"error": "access_denied", "error_description": "Unauthorized"}, 401)
        token, left = self._token()
        scope = "environment:read output:static output:animated"
        return json_answer(
            {"access_token": token, "scope": scope, "expires_in": round(left), "token_type": "Bearer"}
        )

    def _token(self) -> tuple[str, float]:
        """The cached token until about 1/24 of its life is left (an hour of a day), then a fresh one."""
        now = time.monotonic()
        if self._cached is not None:
            token, end = self._cached
            if end - now > self.expires_in / 24 and (self.stubborn or token in self._token_ends):
                return token, end - now
        claims = {
            "iss": "https://integration-login.chiligrafx.com/",
            "sub": f"{self.client_id}@clients",
            "aud": AUDIENCE,
            "iat": int(time.time()),
            "exp": int(time.time() + self.expires_in),
            "gty": "client-credentials",
        }
        parts = [json.dumps(part, separators=(",", ":")).encode() for part in (TOKEN_HEADER, claims)]
        encoded = [base64.urlsafe_b64encode(part) for part in (*parts, secrets.token_bytes(256))]
        token = ".".join(part.rstrip(b"=").decode() for part in encoded)
        self._cached = token, now + self.expires_in
        self._token_ends[token] = now + self.expires_in
        self.tokens.append(token)
        return token, self.expires_in

    # --- the connections ---

    def converse(self, connection: socket.socket, peer: tuple[str, int], elsewhere: bool) -> None:
        """Answer the requests of one connection until either side has had enough."""
        with self._lock:
            self._connections.add(connection)
        stream = connection.makefile("rb")
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._stopping.is_set():
                request = read_request(stream, connection, peer)
                if request is None or not self._reply(connection, request, elsewhere):
                    break
        except OSError:
            pass  # the peer went away, which is its right
        finally:
            with self._lock:
                self._connections.discard(connection)
            stream.close()

    def _reply(self, connection: socket.socket, request: Request, elsewhere: bool) -> bool:
        """Answer one request. Returns whether the connection goes on."""
        self._classify(request, elsewhere)
        with self._lock:
            self.requests.append(request)
            answer = self._right_answer(request)
            fault = self._take_fault(request, answer)
            if answer.status == 204 and (fault is None or fault.name in HARMLESS):
                self._tasks[request.task_id or ""].questions -= 1
        if fault is not None:
            request.fault = fault.name
            if fault.name in ODDLY_SENT:
                goes_on = self._send_oddly(connection, request, answer, fault)
                return goes_on and request.headers.get("Connection", "").lower() != "close"
            answer = self._altered(request, answer, fault)
        request.status = answer.status
        send(connection, answer, with_body=request.method != "HEAD")
        return request.headers.get("Connection", "").lower() != "close"

    def _take_fault(self, request: Request, answer: Answer) -> Fault | None:
        if request.query == "again=loop":
            return Fault(request.what, "redirect-loop", 1, request.task_id, None, {})
        for fault in self._faults:
            if not fault.hits(request):
                continue
            if fault.name in NEED_BODY and bodiless(answer):
                continue
            if fault.name == "redirect-same" and request.query == "again=1":
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.end_fault(fault)
            return fault
        return None

    # --- the faults ---

    def _altered(self, request: Request, right: Answer, fault: Fault) -> Answer:
        """The answer of a fault that lies in what is said."""
        option = fault.options
        finished = {"data": {"taskId": request.task_id}, "links": {}}
        match fault.name:
            case "500-plain":
                return Answer(500, PAGE, "text/html; charset=utf-8")
            case "500-aspnet":
                value = {
                    "type": "https://tools.ietf.org/html/rfc9110#section-15.6.1",
                    "title": "An error occurred while processing your request.",
                    "status": 500,
                    "traceId": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00",
                }
                return json_answer(value, 500, "application/problem+json; charset=utf-8")
            case "html":
                return Answer(200, PAGE, "text/html; charset=utf-8")
            case "empty":
                return Answer(200, b"", right.content_type)
            case "cut":
                right.body = b"".join(pieces(right.body))[: length(right.body) // 2]
                return right
            case "cut-json":
                whole = json_answer({"access_token": "ey"} if request.what == "token" else finished)
                whole.body = b"".join(pieces(whole.body))[: length(whole.body) // 2]
                return whole
            case "other-json":
                return json_answer(option.get("value", []))
            case "no-link":
                return json_answer(finished)
            case "bad-link":
                return json_answer(finished | {"links": {"download": option.get("link", "not a link")}})
            case "other-task":
                return json_answer(self._finished(option.get("task", str(uuid.uuid4()))))
            case "gzip" | "gzip-cut" | "gzip-far" | "gzip-padded":
                right.body = gzipped(right, fault.name)
                right.headers["Content-Encoding"] = "gzip"
                return right
            case "coding":
                right.headers["Content-Encoding"] = coding = option.get("value", "br")
                right.body = option.get("body", right.body)
                if coding == "deflate":
                    right.body = zlib.compress(b"".join(pieces(right.body)))
                return right
            case "wrong-type":
                right.content_type = option.get("type", "image/jpeg")
                return right
            case "octet":
                right.content_type = "application/octet-stream"
                right.body = option.get("body", right.body)
                return right
            case "redirect-loop" | "redirect-away" | "redirect-same":
                return self._redirect(request, fault.name)
            case "echo-token":
                said = request.headers.get("Authorization", "no Authorization")
                said += f"; {request.body.decode('utf-8', 'replace')}" if request.body else ""
                return problem(500, f"Could not process the request with {said}")
        return status_answer(int(fault.name.removeprefix("status-")), option)

    def _redirect(self, request: Request, how: str) -> Answer:
        path = request.path.partition("?")[0]
        code = 302
        if how == "redirect-away":
            to = f"{self.elsewhere}/file/{request.task_id}" if request.task_id else f"{self.elsewhere}/"
        elif how == "redirect-loop":
            to = f"{self.base_url}{path}?again=loop"
        else:
            to = f"{self.base_url}{path}?again=1"
            code = 307 if request.method == "POST" else 302  # a 302 turns a POST into a GET
        return Answer(code, b"", None, {"Location": to})

    def _send_oddly(self, connection: socket.socket, request: Request, right: Answer, fault: Fault) -> bool:
        """Send the answer of a fault that lies in how it is said. Returns whether the connection goes on."""
        option = fault.options
        if fault.name == "hang":
            self._stopping.wait(fault.after)
            return False
        if fault.name in ("reset", "close"):
            if "at" in option:
                request.status = right.status
                connection.sendall(head(right, length(right.body)) + first(right.body, option["at"]))
            if fault.name == "reset":
                # No lingering: closing drops what is unsent and tells the peer with an RST.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False

        if fault.name == "late":
            return self._send_late(connection, request, right, option)
        if fault.name == "huge":
            right = Answer(200, b"", "application/json")
        request.status = right.status
        size = length(right.body)
        match fault.name:
            case "delay":
                if "until" in option:
                    option["until"].wait(120)
                elif self._stopping.wait(option.get("seconds", 1.0)):
                    return False
                send(connection, right)
                return True
            case "interim":
                connection.sendall(b"HTTP/1.1 103 Soon\r\nLink: </style.css>; rel=preload\r\n\r\n")
                if self._stopping.wait(option.get("pause", 0.3)):
                    return False
                send(connection, right)
                return True
            case "slow":
                rate = option.get("rate", 20_000)
                connection.sendall(head(right, size))
                return self._drip(connection, slices(right.body, max(1, rate // 20)), 1 / rate)
            case "trickle-body":
                connection.sendall(head(right, size))
                return self._drip(connection, slices(right.body, 1), option.get("pace", 0.2))
            case "trickle":
                endless = itertools.chain(head(right, size)[:-2], b"X-Padding: ", itertools.repeat(ord("a")))
                pace, parts = option.get("pace", 0.2), (bytes((byte,)) for byte in endless)
                number = None if fault.after is None else round(fault.after / pace)
                self._drip(connection, itertools.islice(parts, number), pace)
                return False
            case "length-long" | "length-short":
                long = fault.name == "length-long"
                connection.sendall(head(right, size + 1000 if long else size - size // 4))
                send_pieces(connection, pieces(right.body))
                return not long
            case "close-end":
                right.headers["Connection"] = "close"
                connection.sendall(head(right, None))
                send_pieces(connection, pieces(right.body))
                return False
            case "chunked" | "chunked-cut":
                right.headers["Transfer-Encoding"] = "chunked"
                connection.sendall(head(right, None))
                step = min(65536, size // 3 + 1)
                chunks = slices(right.body, step)
                if fault.name == "chunked-cut":
                    chunks = itertools.islice(chunks, max(1, size // step // 2))
                send_chunks(connection, chunks)
                return fault.name == "chunked" and end_chunks(connection)
            case "huge":
                right.headers["Transfer-Encoding"] = "chunked"
                connection.sendall(head(right, None))
                line = json.dumps({"data": {"taskId": request.task_id}, "links": {}}).encode() + b",\n"
                block = line * (65536 // len(line))
                blocks = max(1, option.get("size", 64 * MIB) // len(block))
                send_chunks(connection, itertools.chain((b"[",), itertools.repeat(block, blocks), (b"0]",)))
                return end_chunks(connection)
        raise AssertionError(fault.name)

    def _send_late(
        self, connection: socket.socket, request: Request, right: Answer, option: dict[str, Any]
    ) -> bool:
        """A gateway's answer first, and then that of the server behind it, which comes too late."""
        if "task" in option:
            task = self._tasks[option["task"]]
            right = json_answer(self._finished(option["task"]))
            if request.what == "download":
                right = Answer(200, task.file, task.content_type)
        request.status = option.get("status", 504)
        soon = Answer(204) if request.status == 204 else Answer(request.status, PAGE, "text/html")
        late = head(right, length(right.body)) + b"".join(pieces(right.body))
        if pause := option.get("pause", 0.05):
            send(connection, soon)
            if self._stopping.wait(pause):
                return False
            connection.sendall(late)
        else:
            connection.sendall(head(soon, length(soon.body)) + b"".join(pieces(soon.body)) + late)
        return True

    def _drip(self, connection: socket.socket, parts: Iterator[bytes], pace: float) -> bool:
        """Send these parts at `pace` seconds per byte, until the sandbox stops."""
        due = time.monotonic()
        for part in parts:
            connection.sendall(part)
            due += len(part) * pace
            if self._stopping.wait(max(0.0, due - time.monotonic())):
                return False
        return True


def status_answer(status: int, option: dict[str, Any]) -> Answer:
    answer = problem(status, "This answer was ordered by a test.")
    if "body" in option:
        answer.body = option["body"]
    answer.content_type = option.get("content_type", answer.content_type)
    if "retry_after" in option:
        answer.headers["Retry-After"] = str(option["retry_after"])
    return answer


def gzipped(right: Answer, how: str) -> bytes:
    whole = b"".join(pieces(right.body))
    if how == "gzip-far":  # not compressed, so that it is as long as it has to be
        if right.content_type and "json" in right.content_type:
            whole = b" " * FAR + whole
        assert len(whole) > FAR, "the second member would be empty"
        return gzip.compress(whole[:FAR], compresslevel=0) + gzip.compress(whole[FAR:])
    packed = gzip.compress(whole, compresslevel=1)
    if how == "gzip-padded":
        return packed + bytes(FAR)
    return packed[: len(packed) // 2] if how == "gzip-cut" else packed


def first(body: Body, size: int) -> bytes:
    start = b""
    for piece in pieces(body):
        start += piece[: size - len(start)]
        if len(start) >= size:
            break
    return start


def send(connection: socket.socket, answer: Answer, *, with_body: bool = True) -> None:
    size = length(answer.body)
    if bodiless(answer) or not with_body:
        connection.sendall(head(answer, size))
    elif size <= 65536:  # in one go
        connection.sendall(head(answer, size) + b"".join(pieces(answer.body)))
    else:
        connection.sendall(head(answer, size))
        send_pieces(connection, pieces(answer.body))


def send_pieces(connection: socket.socket, parts: Iterator[bytes]) -> None:
    for part in parts:
        connection.sendall(part)


def send_chunks(connection: socket.socket, parts: Iterator[bytes]) -> None:
    for part in parts:
        if part:  # an empty chunk would be the end
            connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))


def end_chunks(connection: socket.socket) -> bool:
    connection.sendall(b"0\r\n\r\n")
    return True


# --- the program -------------------------------------------------------------------------------------------

POLLER = HERE.parent / "poller.py"
PATIENCE = 120.0  # seconds


def new_folder(orders: Collection[str]) -> Path:
    """A temporary folder with folders for files and a database.json in which these orders wait."""
    folder = Path(tempfile.mkdtemp(prefix="grafx-sandbox-"))
    for name in ("orders", "done"):
        (folder / name).mkdir()
    added = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = {task_id: {"projectID": str(uuid.uuid4()), "added": added} for task_id in orders}
    (folder / "database.json").write_text(json.dumps({"orders": fields, "failed": {}}, indent=4) + "\n")
    return folder


def watch(poller: subprocess.Popen[bytes], database: Path) -> str:
    """Wait until no order is left. Returns what went wrong instead, if anything."""
    end = time.monotonic() + PATIENCE
    while left := json.loads(database.read_text())["orders"]:
        if (code := poller.poll()) is not None:
            return f"The poller ended by itself with exit code {code}."
        if time.monotonic() > end:
            return f"After {PATIENCE:.0f} seconds these orders are left: {', '.join(left)}"
        time.sleep(0.2)
    return ""


def summarize(grafx: Sandbox, folder: Path, good: Collection[str], bad: Collection[str]) -> bool:
    """Print how the orders ended. Returns whether each ended as it should."""
    wanted = {task_id: grafx.sha256(task_id) for task_id in good}
    delivered, done = (
        {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(f"{name}/[!.]*")}
        for name in ("orders", "done")
    )
    failed = json.loads((folder / "database.json").read_text())["failed"]
    print(f"\nDelivered: {len(delivered.items() & wanted.items())} of {len(wanted)}")
    print(f"ON_DONE ran for: {len(done.items() & wanted.items())} of {len(wanted)}")
    print(f"Failed: {len(failed)}, expected {len(bad)}")
    print(f"The files are in {folder / 'orders'}, and copies in {folder / 'done'}")
    for path in sorted(folder.glob("orders/[!.]*")):
        print(f"  {path.stat().st_size:>9,}  {path.name}")
    return delivered == done == wanted and set(failed) == set(bad)


def run_poller() -> int:
    with Sandbox(picture=True) as grafx:
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
        print(f"A local GraFx is at {grafx.base_url}")
        print(f"{len(good | bad)} orders are in {folder / 'database.json'}:")
        for task_id, what in (good | bad).items():
            print(f"  {task_id}  {what}")
        on_done = f"cp {{}} {shlex.quote(str(folder / 'done'))}"
        print(f"The poller starts, with ON_DONE={on_done}. Ctrl-C stops both.\n", flush=True)

        hurry = {"POLL_INTERVAL": "5", "GIVE_UP_AFTER": "3", "ON_DONE": on_done}
        environment = os.environ | grafx.settings(folder) | hurry
        poller = subprocess.Popen([sys.executable, POLLER.name], cwd=POLLER.parent, env=environment)
        try:
            trouble = watch(poller, folder / "database.json")
        finally:
            poller.terminate()
            try:
                poller.wait(15)
            except subprocess.TimeoutExpired:
                poller.kill()
        as_expected = summarize(grafx, folder, good, bad)
    if trouble:
        print(trouble, file=sys.stderr)
    return 0 if as_expected and not trouble else 1


def serve() -> int:
    with Sandbox(picture=True) as grafx:
        print("# Put these lines into .env. The local GraFx serves until Ctrl-C.")
        for name, value in grafx.settings(new_folder({})).items():
            print(f"{name}={value}")
        credentials = {
            "grant_type": "client_credentials",
            "audience": AUDIENCE,
            "client_id": grafx.client_id,
            "client_secret": grafx.client_secret,
        }
        print(
            f"""
# To order a render (png, jpg, pdf, gif, mp4, html, image or animation), get a token, and send it:
# TOKEN=$(curl -s {grafx.token_url} -H 'Content-Type: application/json' -d '{json.dumps(credentials)}' \\
#     | {Path(sys.executable).name} -c 'import json, sys; print(json.load(sys.stdin)["access_token"])')
# curl -X POST {grafx.root}/png -H "Authorization: Bearer $TOKEN"
# Then add the taskId of the answer: python db.py add TASK_ID""",
            flush=True,
        )
        threading.Event().wait()
    return 0


def main() -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
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
