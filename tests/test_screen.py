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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from conftest import PATIENCE, QUICK, Home, eventually, find_program

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
        return [line for line in (line.rstrip() for line in self.picture.display) if line]

    def live(self) -> str:
        """The live line."""
        return (self.look() or [""])[-1]

    def shows(self, pattern: str) -> str:
        """Wait for a live line that begins so; it never fills the last column."""

        def look() -> str:
            line = self.live()
            assert len(line) < self.picture.columns or re.match(STAMP, self.look()[-2]), line
            return line if re.match(pattern, line) else ""

        try:
            line: str = eventually(look, pattern)
        except AssertionError:
            raise AssertionError(f"no {pattern!r} in:\n" + "\n".join(self.look())) from None
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


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_render_a_download_and_an_outage(
    home: Home, terminal: Callable[..., Terminal], columns: int
) -> None:
    """What matters most stands first, so 40 columns have it too."""
    grafx = home.grafx
    slow = grafx.add(size=200_000, task_id="5107ab1e-slow")
    grafx.fault("download", "slow", rate=35_000)
    home.wait_for(*(grafx.add("never") for _ in range(3)), "no-such-task", slow)
    shown = terminal(columns, "poller.SHORTEST_PAUSE = 60", POLL_INTERVAL="60")

    line = shown.shows(r"5107ab1e \d+% of 200\.\d kB, \d+\.\d kB/s")
    assert columns == 40 or "kB/s | 3 rendering, 1 downloading, 1 rejected" in line
    percent = int(line.split()[1].rstrip("%"))
    eventually(lambda: int(re.findall(r"^\S+ (\d+)%", shown.live())[0]) > percent, "the download moves")

    line = shown.shows(r"3 rendering, 1 rejected \| next poll in" + r" \d+ s \|" * (columns > 40))
    assert columns == 40 or re.search(r"last delivery \d\d:\d\d:\d\d$", line)
    if columns > 40:
        seconds = int(line.split("next poll in ")[1].split()[0])
        eventually(lambda: int(shown.live().split("next poll in ")[1].split()[0]) < seconds, "it counts down")
    assert shown.end() == 0
    assert "".join(shown.look()).endswith("stopped, 4 pending")

    shown = terminal(columns, "poller.SHORTEST_PAUSE = 60", POLL_INTERVAL="60", BASEURL="http://127.0.0.1:1")
    line = shown.shows(r"retrying in \d+ s: paused: GraFx is unr")
    if columns > 40:
        assert ": paused: GraFx is unreachable: 127.0.0.1: Connection refused" in line
    if columns > 80:
        shown.shows(r"retrying in \d+ s: paused: .* Connection refused \| 4 retrying$")


def test_an_order_that_cannot_be_polled_says_why_and_when_it_is_retried(
    home: Home, terminal: Callable[..., Terminal]
) -> None:
    """And hides nothing of the others."""
    home.wait_for(home.grafx.add("never"), home.grafx.add(link="http://127.0.0.1:1/file"))
    shown = terminal(120, "poller.SHORTEST_PAUSE = 1", POLL_INTERVAL="60")
    problem = "1 order: the download server is unreachable: 127.0.0.1: Connection refused"
    # Its fourth pause is 8 s. The other order is polled earlier, which is not what is told.
    shown.shows(rf"retrying in 8 s: {problem} \| 1 rendering, 1 retrying$")
    shown.shows(rf"retrying in 6 s: {problem} \| 1 rendering, 1 retrying$")


def test_an_order_that_was_removed_while_it_was_polled_is_not_counted(
    home: Home, terminal: Callable[..., Terminal]
) -> None:
    stays, other = home.grafx.add("never"), home.grafx.add("never")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # until it is closed
        home.wait_for(home.grafx.add(link=f"http://127.0.0.1:{silent.getsockname()[1]}/file"), stays)
        shown = terminal(80, "poller.SHORTEST_PAUSE = 60", POLL_INTERVAL="60")
        shown.shows(r"1 new, 1 rendering \|")
        home.wait_for(stays, other)
        shown.shows(r"2 rendering \|")  # although it is still being polled
    shown.shows(r"2 rendering \|")


def test_letters_that_are_wide_do_not_break_the_line(home: Home, terminal: Callable[..., Terminal]) -> None:
    """Each takes two columns; a line that breaks leaves a copy of itself each time."""
    home.wait_for(home.grafx.add())
    shown = terminal(100, QUICK, ON_DONE=f"sh -c 'echo {'没有纸' * 20}; exit 1'")
    shown.shows(r"retrying in \d+ s: 1 order: ON_DONE ended with 1: 没有纸")
    for _ in range(20):
        lines = shown.look()
        assert len([line for line in lines if line.startswith("retrying")]) == 1, lines


def test_a_terminal_that_is_made_narrower_has_no_copies(home: Home, tmp_path: Path) -> None:
    """Tmux breaks a line that has become too long, as most terminals do."""
    tmux = [find_program("tmux", "tmux", "a terminal that is made narrower"), "-S", str(tmp_path / "tmux")]

    def run(*words: str) -> str:
        env = home.environment(
            TERM="xterm", TERMINFO_DIRS="/lib/terminfo:/usr/share/terminfo", SHELL="/bin/sh"
        )
        done = subprocess.run(
            [*tmux, *words], env=env, check=True, capture_output=True, text=True, cwd=tmp_path
        )
        return done.stdout

    def copies(pattern: str) -> int:
        return sum(pattern in line for line in run("capture-pane", "-pJ", "-S", "-").splitlines())

    home.wait_for(*(home.grafx.add("never") for _ in range(3)), *(f"no-such-task-{n}" for n in range(3)))
    run("-f", os.devnull, "new-session", "-d", "-x", "100", "-y", "20", *home.command(before=QUICK))
    try:
        eventually(lambda: copies("next poll") == 1, "the live line")
        tty = os.open(run("display-message", "-p", "#{pane_tty}").strip(), os.O_RDWR | os.O_NOCTTY)
        for width in (61, 39, 33, 20, 58, 31, 100, 24):
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
    home.wait_for(home.grafx.add("never"))
    shown = terminal(80)
    shown.shows("1 rendering")
    os.write(shown.ours, b"\x13")
    shown.look()
    seen = len(shown.raw)
    new = [home.grafx.add() for _ in range(20)]
    home.wait_for(*new, *home.waiting())
    eventually(lambda: len(home.waiting()) == 1, "deliveries")
    shown.look()
    assert len(shown.raw) == seen  # it is really held
    os.write(shown.ours, b"\x11")  # Ctrl-Q: all of it comes, and the line as it is now
    eventually(lambda: (shown.look(), shown.raw.count(b" delivered to ") == 20)[1])
    shown.shows("1 rendering .* last delivery")
    os.write(shown.ours, b"\x13")
    time.sleep(1)
    shown.process.send_signal(signal.SIGTERM)
    assert shown.process.wait(PATIENCE) == 0
