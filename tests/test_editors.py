"""Real editors on database.json, while orders are delivered and a program adds: what is typed is not lost."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, Home, eventually, find_program
from sandbox import Sandbox

import db

ROUNDS = 3


class Terminal:
    """A program in a terminal, and somebody who reads its screen and types."""

    def __init__(self, *command: str) -> None:
        self.process, self.screen = pty.fork()
        if not self.process:
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", "LINES": "40", "COLUMNS": "250"})
        self.seen = ""

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self.screen, keys.encode())

    def read(self, patience: float) -> bool:
        """More of the screen; False where nothing came, or the program has ended."""
        if not select.select([self.screen], [], [], patience)[0]:
            return False
        try:
            self.seen += os.read(self.screen, 65536).decode(errors="replace")
        except OSError:  # its end, on Linux
            return False
        return True

    def shows(self, pattern: str) -> str:
        """Wait until it shows that; gives what matched."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} is not shown:\n{self.seen!r}"
            self.read(0.1)
        return found[0]

    def ends(self) -> None:
        end = time.monotonic() + PATIENCE
        while not os.waitpid(self.process, os.WNOHANG)[0]:
            assert time.monotonic() < end, f"it does not end:\n{self.seen!r}"
            self.read(0.05)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        """Closing its terminal ends what has not ended."""
        os.close(self.screen)


def think(path: Path) -> None:
    """Somebody looks at the screen; meanwhile the file changes."""
    seen = db.version(path)
    eventually(lambda: db.version(path) != seen, "the file changes while an editor is open")


def vim(backupcopy: str) -> Callable[[Path, str], None]:
    def edit(path: Path, line: str) -> None:
        # backupskip: in /tmp it would not rename anything.
        how = f"set backupskip= backupcopy={backupcopy}"
        program = find_program("vim", "vim")
        with Terminal(program, "-u", "NONE", "-N", "-i", "NONE", "--cmd", how, str(path)) as editor:
            editor.shows('"orders"')
            editor.type('/"orders": {\r')
            editor.type(f"o{line}\x1b")
            editor.shows(re.escape(line[:20]))
            think(path)
            editor.type(":w!\r")
            while (found := editor.shows(r"written|really want to write|E949")) != "written":
                # E949: it was replaced in the moment when vim opened it, and is left alone. Once more.
                editor.type("y" if "really" in found else "\r:w!\r")
            editor.type(":q!\r")
            editor.ends()

    return edit


def nano(path: Path, line: str) -> None:
    with Terminal(find_program("nano", "nano"), "-I", str(path)) as editor:
        editor.shows('"orders"')
        editor.type('\x17"orders": {\r')  # search, then to the end of the line
        editor.type(f"\x05\r{line}")
        editor.shows(re.escape(line[:20]))
        think(path)
        editor.type("\x0f")
        editor.shows("Write")
        editor.type("\r")
        if "continue" in editor.shows(r"Wrote|continue saving"):
            editor.type("y")
            editor.shows("Wrote")
        editor.type("\x18")
        editor.ends()


def sh(script: str, *programs: str) -> Callable[[Path, str], None]:
    """A command line; $1 is the file, $2 what is typed."""

    def edit(path: Path, line: str) -> None:
        for program in programs:
            find_program(program, program)
        subprocess.run(["sh", "-ec", script, "-", path, line], check=True, timeout=PATIENCE, cwd=path.parent)

    return edit


INSERT = r"""sed "s/\"orders\": {/&\n$2/" """
EDITORS: dict[str, Callable[[Path, str], None]] = {
    "vim, backupcopy=no": vim("no"),
    "vim, backupcopy=yes": vim("yes"),
    "nano": nano,
    "sed -i": sh(INSERT + '-i "$1"', "sed"),
    "slow cat": sh(
        INSERT + '"$1" > new; { head -c 90 new; sleep 0.7; tail -c +91 new; } | cat > "$1"', "sed"
    ),
}
# These write into the file as it is. Such a save can fall between somebody's last look at the file and his
# rename, and here two programs write twenty times a second.
IN_PLACE = ("vim, backupcopy=yes", "nano", "slow cat")


@pytest.fixture
def adding(home: Home, grafx: Sandbox) -> Iterator[list[str]]:
    """Another program that adds orders all the while; these are the ones it has added."""
    added, stop = list[str](), threading.Event()
    command = "import sys, db\nfor line in sys.stdin: db.add_order(line.strip(), 'p'); print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**home.environment(), "PYTHONPATH": str(Path(db.__file__).parent)},
    ) as program:  # fmt: skip

        def add() -> None:
            assert program.stdin and program.stdout
            while not stop.wait(0.05):
                added.append(grafx.add(after=0.2))
                program.stdin.write(added[-1] + "\n")
                program.stdin.flush()
                program.stdout.readline()

        thread = threading.Thread(target=add)
        thread.start()
        try:
            yield added
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("name", EDITORS)
def test_editors_lose_nothing_that_was_typed(
    home: Home, grafx: Sandbox, adding: list[str], name: str
) -> None:
    pending = [grafx.add("never") for _ in range(3)]  # so that there is always a line below the typed one
    home.wait_for(*pending)
    poller = home.start(before="poller.SHORTEST_PAUSE = 0.1")
    poller.says(r"\d pending, ")
    typed = list[str]()
    for _ in range(ROUNDS):
        typed.append(grafx.add())
        EDITORS[name](home.database, f'"{typed[-1]}": {{"projectID": "by hand"}},')

    def delivered() -> set[str]:
        return {Path(file).stem for file in home.files()}

    eventually(lambda: set(pending) <= home.waiting().keys() and not home.waiting().keys() & set(typed))
    lost = set(typed) - delivered()
    assert len(lost) < (ROUNDS if name in IN_PLACE else 1), poller.log()
    assert not home.failed()
    assert poller.stop() == 0
    assert "Traceback" not in poller.log()
    # One line, one delivery: what an old text re-added was not delivered again.
    lines = home.database.with_name(".database.json.delivered").read_text().splitlines()
    ids = [line.split()[1] for line in lines]
    assert len(ids) == len(set(ids)) >= len(typed) - len(lost)
    assert json.loads(home.database.read_text())["orders"].keys() >= set(pending)
    overwritten = set(adding) - delivered() - home.waiting().keys()
    print(f"{name}: {ROUNDS} typed, {len(lost)} lost; {len(adding)} added, {len(overwritten)} overwritten")
