"""What a person sees in a terminal: the live line at any width, and one that is held by Ctrl-S."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from conftest import PATIENCE, QUICK, Home, Loopback, eventually, find_program

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Terminal:
    """A terminal of so many columns, with the poller in it."""

    def __init__(self, home: Home, columns: int, before: str = QUICK, *arguments: str, **env: str) -> None:
        self.picture = pyte.Screen(columns, 24)
        self.stream = pyte.ByteStream(self.picture)
        self.raw = b""
        self.ours, its = os.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            home.command(*arguments, before=before), env=home.environment(TERM="xterm", **env),
            stdin=its, stdout=subprocess.DEVNULL, stderr=its, start_new_session=True,
        )  # fmt: skip
        os.close(its)

    def look(self) -> list[str]:
        """The lines that are to be seen now."""
        while select.select([self.ours], [], [], 0.05)[0]:
            try:
                data = os.read(self.ours, 65536)
            except OSError:  # the other side is closed
                break
            self.raw += data
            self.stream.feed(data)
        rows, columns = range(self.picture.lines), range(self.picture.columns)
        # Not `display`, which fails where a wide letter has lost its second half.
        lines = ("".join(self.picture.buffer[row][column].data for column in columns) for row in rows)
        return [line for line in map(str.rstrip, lines) if line]

    def live(self) -> str:
        """The live line."""
        return (self.look() or [""])[-1]

    def shows(self, pattern: str) -> str:
        """Wait for a live line that begins so; it never fills the last column."""

        def look() -> str:
            line = self.live()
            assert len(line) < self.picture.columns or re.match(STAMP, self.look()[-2]), line
            return line if re.match(pattern, line) else ""

        line: str = eventually(look, pattern)
        return line

    def end(self, how: int = signal.SIGTERM) -> int:
        """Stop the poller, and give its exit code."""
        self.process.send_signal(how)
        eventually(lambda: (self.look(), self.process.poll() is not None)[1], "the end")
        return self.process.wait()


@pytest.fixture
def terminal(home: Home) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*arguments: Any, **env: str) -> Terminal:
        made.append(Terminal(home, *arguments, **env))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.wait()
        os.close(one.ours)


@pytest.fixture
def held(home: Home, wire: Callable[..., Loopback]) -> tuple[str, threading.Event]:
    """An order of which 30 % come, and the rest after the event."""
    ends, body = threading.Event(), home.grafx.body(home.grafx.add(size=200_000))

    def answer(line: str, connection: socket.socket) -> bytes:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:60_000])
        ends.wait(2 * PATIENCE)
        return body[60_000:]

    return home.grafx.add(task_id="5107ab1e-slow", link=wire(answer).url), ends


@pytest.mark.parametrize("columns", [40, 120])
def test_a_render_a_download_and_an_outage(
    home: Home, terminal: Callable[..., Terminal], held: tuple[str, threading.Event], columns: int
) -> None:
    """What matters most stands first, so 40 columns have it too."""
    home.wait_for(*(home.grafx.add("never") for _ in range(3)), "no-such-task", held[0])
    shown = terminal(columns, "poller.SHORTEST_PAUSE = 60", POLL_INTERVAL="60")
    shown.shows(
        r"5107ab1e 30% of 200\.0 kB, \d+\.\d .?B/s"
        + r" \| 3 rendering, 1 downloading, 1 rejected" * (columns > 40)
    )
    held[1].set()
    line = shown.shows(r"3 rendering, 1 rejected \| next poll in" + r" \d+ s \|" * (columns > 40))
    if columns > 40:
        assert re.search(r"last delivery \d\d:\d\d:\d\d$", line)
        seconds = int(line.split("next poll in ")[1].split()[0])
        eventually(lambda: f" in {seconds} s" not in shown.live(), "it counts down")
    assert shown.end() == 0
    assert "".join(shown.look()).endswith("stopped, 4 pending")

    shown = terminal(columns, BASEURL="http://127.0.0.1:1")
    shown.shows(
        r"paused, retry in \d+ s: GraFx is unreac"
        + r"hable \(Connection refused, 127.0.0.1\) \| 4 retrying" * (columns > 40)
    )


def test_an_order_that_cannot_be_polled_says_why_and_when_it_is_retried(
    home: Home, terminal: Callable[..., Terminal]
) -> None:
    """And hides nothing of the others, which are polled earlier."""
    home.wait_for(home.grafx.add("never"), home.grafx.add(link="http://127.0.0.1:1/file"))
    shown = terminal(120, "poller.SHORTEST_PAUSE = 1; poller.backoff = lambda *_: 60.0", POLL_INTERVAL="60")
    problem = r"the download server is unreachable \(Connection refused, 127.0.0.1\)"
    shown.shows(rf"1 order, retry in \d\d s: {problem} \| 1 rendering, 1 retrying$")


def test_an_order_that_was_removed_during_its_download_is_not_shown(
    home: Home, terminal: Callable[..., Terminal], held: tuple[str, threading.Event]
) -> None:
    home.wait_for(held[0])
    shown = terminal(80, f"{QUICK}; chili.TIMEOUT = (90, 90)")
    shown.shows("5107ab1e 30%")
    home.wait_for(home.grafx.add("never"))
    shown.shows(r"1 rendering \|")
    held[1].set()


def test_letters_that_are_wide_do_not_break_the_line(home: Home, terminal: Callable[..., Terminal]) -> None:
    """Each takes two columns; a line that breaks leaves a copy of itself each time."""
    home.wait_for(home.grafx.add())
    on_done = f"sh -c 'echo {'没有纸' * 20}; exit 1'"
    shown = terminal(100, "poller.SHORTEST_PAUSE = 60", POLL_INTERVAL="60", ON_DONE=on_done)
    shown.shows(r"1 order, retry in \d+ s: ON_DONE ended with 1: 没有纸")
    drawn = shown.raw.count(b"\x1b[J")
    eventually(lambda: (shown.look(), shown.raw.count(b"\x1b[J") > drawn + 1)[1], "it is drawn again")
    assert len([line for line in shown.look() if line.startswith("1 order")]) <= 1, shown.look()


def test_a_terminal_that_is_made_narrower_has_no_copies(home: Home, tmp_path: Path) -> None:
    """Tmux breaks a line that has become too long, as most terminals do."""
    tmux = [find_program("tmux", "tmux", "a terminal that is made narrower"), "-S", str(tmp_path / "tmux")]

    env = home.environment(TERM="xterm", TERMINFO_DIRS="/lib/terminfo:/usr/share/terminfo", SHELL="/bin/sh")

    def run(*words: str) -> str:
        return subprocess.run([*tmux, *words], env=env, check=True, capture_output=True, text=True).stdout

    def copies(pattern: str) -> int:
        return sum(pattern in line for line in run("capture-pane", "-pJ", "-S", "-").splitlines())

    home.wait_for(*(home.grafx.add("never") for _ in range(3)), *(f"no-such-task-{n}" for n in range(3)))
    run("-f", os.devnull, "new-session", "-d", "-x", "100", "-y", "20", *home.command(before=QUICK))
    try:
        eventually(lambda: copies("next poll") == 1, "the live line")
        tty = os.open(run("display-message", "-p", "#{pane_tty}").strip(), os.O_RDWR | os.O_NOCTTY)
        for width in (61, 33, 20, 100, 24):
            run("resize-window", "-x", str(width))  # tmux tells its programs a little later
            eventually(lambda width=width: os.get_terminal_size(tty).columns == width)
            home.wait_for(*home.waiting(), task_id := home.grafx.add())  # a line of the log
            eventually(lambda task_id=task_id: copies(f"{task_id} delivered") == 1, task_id)
            eventually(lambda: copies("3 rendering") == 1, f"one line at {width} columns")
        os.close(tty)
    finally:
        run("kill-server")


def test_ctrl_s_holds_up_neither_deliveries_nor_the_stop(
    home: Home, terminal: Callable[..., Terminal]
) -> None:
    home.wait_for(never := home.grafx.add("never"))
    shown = terminal(80)
    shown.shows("1 rendering")

    def deliver(number: int) -> None:
        home.wait_for(never, *(home.grafx.add() for _ in range(number)))
        eventually(lambda: list(home.waiting()) == [never], "deliveries")

    os.write(shown.ours, b"\x13")
    shown.look()
    seen = len(shown.raw)
    deliver(20)
    shown.look()
    assert len(shown.raw) == seen  # it is really held
    os.write(shown.ours, b"\x11")  # Ctrl-Q: all of it comes, and the line as it is now
    eventually(lambda: (shown.look(), shown.raw.count(b" delivered to ") == 20)[1])
    shown.shows("1 rendering .* last delivery")
    os.write(shown.ours, b"\x13")
    deliver(1)
    shown.process.send_signal(signal.SIGTERM)
    assert shown.process.wait(PATIENCE) == 0
