"""What a person sees in a terminal: the live line at any width, and one that is held by Ctrl-S."""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest
from conftest import PATIENCE, QUICK, Home, Loopback, eventually, find_program

import db


class Terminal:
    """A terminal, in which the poller is started."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.picture = pyte.Screen(120, 24)
        self.stream = pyte.ByteStream(self.picture)
        self.raw = b""
        self.ours, self.its = os.openpty()
        self.resize(120)

    def start(self, before: str = QUICK, **env: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.home.command(before=before), env=self.home.environment(TERM="xterm", **env),
            cwd=self.home.folder, stdin=self.its, stdout=subprocess.DEVNULL, stderr=self.its,
        )  # fmt: skip

    def resize(self, columns: int) -> None:
        self.picture.resize(columns=columns)
        fcntl.ioctl(self.its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def look(self) -> list[str]:
        """The lines that are to be seen now."""
        while select.select([self.ours], [], [], 0.05)[0]:
            data = os.read(self.ours, 65536)
            self.raw += data
            self.stream.feed(data)
        rows, columns = range(self.picture.lines), range(self.picture.columns)
        # Not `display`, which fails where a wide letter has lost its second half.
        lines = ("".join(self.picture.buffer[row][column].data for column in columns) for row in rows)
        return [line for line in map(str.rstrip, lines) if line]

    def shows(self, pattern: str) -> None:
        """Wait for a last line, which is the live one, that is exactly so."""
        eventually(lambda: re.fullmatch(pattern, (self.look() or [""])[-1]), pattern)


@pytest.fixture
def terminal(home: Home) -> Iterator[Terminal]:
    terminal = Terminal(home)
    yield terminal
    os.close(terminal.ours)
    os.close(terminal.its)


def test_an_outage_a_render_and_a_download_at_any_width(
    home: Home, terminal: Terminal, wire: Callable[..., Loopback]
) -> None:
    """What matters most stands first, so a narrow terminal has it too; the last column is never filled."""
    goes_on, body = threading.Event(), home.grafx.body(home.grafx.add(size=200_000))

    def answer(line: str, connection: socket.socket) -> bytes:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:60_000])
        goes_on.wait(2 * PATIENCE)
        return body[60_000:]

    home.grafx.fault("token", "status-503", times=None)
    slow = home.grafx.add(task_id="5107ab1e-slow", link=wire(answer).url)
    home.wait_for(*(home.grafx.add("never") for _ in range(3)), slow)
    process = terminal.start()
    terminal.shows(r"paused, retry in \d+ s: no token: \S+ answered 503 Service Unavailable \| 4 new")
    terminal.resize(30)
    terminal.shows(r"paused, retry in \d+ s: no tok?e?")
    terminal.resize(120)
    home.grafx.clear_faults()
    speed = r"5107ab1e 30% of 200\.0 kB, \d+\.\d .?B/s"
    terminal.shows(rf"{speed} \| 3 rendering, 1 downloading \| next poll in \d+ s")
    goes_on.set()
    terminal.shows(r"3 rendering \| next poll in \d+ s \| last delivery \d\d:\d\d:\d\d")
    process.terminate()
    terminal.shows(".* INFO +stopped, 3 pending")
    assert process.wait(PATIENCE) == 0


def test_who_cannot_be_delivered_is_said_also_in_letters_that_are_wide(
    home: Home, terminal: Terminal
) -> None:
    """Each of them takes two columns; a line that breaks leaves a copy of itself each time."""
    home.wait_for(home.grafx.add("never"), home.grafx.add())
    on_done = f"sh -c 'echo {'没有纸' * 5}; exit 1'"
    terminal.start("poller.SHORTEST_PAUSE = 60; db.LOOK = 0.1", POLL_INTERVAL="60", ON_DONE=on_done)
    retry, letters = r"1 order, retry in \d+ s: ON_DONE exited with code 1: ", "(没 ?|有 ?|纸 ?)+"
    terminal.shows(rf"{retry}{letters}\| 1 rendering, 1 waiting for ON_DONE.*")
    terminal.resize(60)
    for _ in range(2):  # a line of the log, and so a new live line
        db.add_order(task_id := home.grafx.add("never"), path=home.database)
        terminal.shows(f"{retry}{letters}")
        eventually(lambda task_id=task_id: f"{task_id} added" in "".join(terminal.look()))
    assert len([line for line in terminal.look() if line.startswith("1 order")]) == 1, terminal.look()


def test_a_terminal_that_is_made_narrower_has_no_copies(home: Home, tmp_path: Path) -> None:
    """Tmux breaks a line that has become too long, as most terminals do."""
    tmux = [find_program("tmux", "tmux", "a terminal that is made narrower"), "-S", str(tmp_path / "tmux")]
    env = home.environment(TERM="xterm", TERMINFO_DIRS="/lib/terminfo:/usr/share/terminfo", SHELL="/bin/sh")

    def run(*words: str) -> str:
        return subprocess.run([*tmux, *words], env=env, check=True, capture_output=True, text=True).stdout

    def copies(pattern: str) -> int:
        return sum(pattern in line for line in run("capture-pane", "-pJ", "-S", "-").splitlines())

    home.wait_for(*(home.grafx.add("never") for _ in range(3)))
    run("-f", os.devnull, "new-session", "-d", "-x", "100", "-y", "20", *home.command(before=QUICK))
    try:
        eventually(lambda: copies("next poll") == 1, "the live line")
        tty = os.open(run("display-message", "-p", "#{pane_tty}").strip(), os.O_RDWR | os.O_NOCTTY)
        for width in (33, 20, 100, 24):
            run("resize-window", "-x", str(width))  # tmux tells its programs a little later
            eventually(lambda width=width: os.get_terminal_size(tty).columns == width)
            db.add_order(task_id := home.grafx.add(), path=home.database)  # a line of the log
            eventually(lambda task_id=task_id: copies(f"{task_id} delivered") == 1, task_id)
            eventually(lambda: copies("3 rendering") == 1, f"one line at {width} columns")
        os.close(tty)
    finally:
        run("kill-server")


def test_ctrl_s_holds_up_neither_deliveries_nor_the_stop(home: Home, terminal: Terminal) -> None:
    home.wait_for(never := home.grafx.add("never"))
    process = terminal.start()
    terminal.shows("1 rendering.*")
    os.write(terminal.ours, b"\x13")
    home.wait_for(never, *(home.grafx.add() for _ in range(20)))
    eventually(lambda: list(home.waiting()) == [never], "deliveries")
    terminal.look()
    assert b" delivered to " not in terminal.raw  # it is really held
    os.write(terminal.ours, b"\x11")  # Ctrl-Q: all of it comes, and the line as it is now
    eventually(lambda: (terminal.look(), terminal.raw.count(b" delivered to ") == 20)[1])
    terminal.shows("1 rendering .* last delivery.*")
    os.write(terminal.ours, b"\x13")
    process.terminate()
    assert process.wait(PATIENCE) == 0
