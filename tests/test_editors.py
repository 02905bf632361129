"""Real editors on database.json, while orders are delivered and added: what is typed is not lost."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pexpect
import pytest
from conftest import PATIENCE, QUICK, WATCH, Home, eventually, find_program


def open_editor(*command: str) -> Any:
    env = {**os.environ, "LC_ALL": "C", "TERM": "xterm"}
    return pexpect.spawn(command[0], [*command[1:]], timeout=PATIENCE, env=env, dimensions=(40, 250))


def vim(path: Path, line: str, think: Callable[[], None], backupcopy: str) -> None:
    how = f"set backupskip= backupcopy={backupcopy}"  # backupskip: in /tmp it would not rename anything
    program = find_program("vim", "vim")
    with open_editor(program, "-u", "NONE", "-N", "-i", "NONE", "--cmd", how, str(path)) as editor:
        editor.expect('"orders"')
        editor.send('/"orders": {\r')
        editor.send(f"o{line}\x1b")
        editor.expect_exact(line[:20])
        think()
        editor.send(":w!\r")
        if editor.expect(["written", "really want to write"]):
            editor.send("y")
            editor.expect("written")


def nano(path: Path, line: str, think: Callable[[], None]) -> None:
    with open_editor(find_program("nano", "nano"), "-I", str(path)) as editor:
        editor.expect('"orders"')
        editor.send('\x17"orders": {\r')  # search, then to the end of the line
        editor.send(f"\x05\r{line}")
        editor.expect_exact(line[:20])
        think()
        editor.send("\x0f")
        editor.expect("Write")
        editor.send("\r")
        if editor.expect(["Wrote", "continue saving"]):  # it asks if the time has another second
            editor.send("y")
            editor.expect("Wrote")


# The first one renames the file away and writes a new one; the others write into the file as it is.
EDITORS = {
    "vim, backupcopy=no": partial(vim, backupcopy="no"),
    "vim, backupcopy=yes": partial(vim, backupcopy="yes"),
    "nano": nano,
}
SLOW = "db.SAVING = 60"  # seconds that a save may take on a busy machine


@pytest.mark.parametrize("name", EDITORS)
def test_what_is_typed_into_an_old_text_is_delivered_and_nothing_else_again(home: Home, name: str) -> None:
    grafx = home.grafx
    renders, old, added, typed = grafx.add("never"), *(grafx.add() for _ in range(3))
    not_yet = grafx.fault("task", "status-202", task_id=old, times=None)
    home.wait_for(renders, old)
    poller = home.start(before=f"{QUICK}; {SLOW}")
    poller.says("2 pending, ")

    def think() -> None:
        """Somebody looks at the screen; meanwhile the file changes."""
        grafx.end_fault(not_yet)
        assert home.db("add", added).returncode == 0
        eventually(lambda: list(home.waiting()) == [renders])

    EDITORS[name](home.database, f'"{typed}": {{"projectID": "by hand"}},', think)
    poller.says(f"{old} was re-added although delivered; removed again")
    eventually(lambda: list(home.waiting()) == [renders])
    assert poller.stop() == 0
    assert not re.search("Traceback|ERROR", poller.log())
    lines = home.database.with_name(".database.json.delivered").read_text().splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted((old, added, typed))
    assert {Path(file).stem for file in home.files()} == {old, added, typed}


def test_a_file_that_is_half_saved_is_waited_for(home: Home) -> None:
    renders, task = home.grafx.add("never"), home.grafx.add()
    home.wait_for(renders)
    poller = home.start(before=f"{QUICK}; {SLOW}; {WATCH}")
    poller.says("1 pending, ")
    whole = json.dumps({"orders": {renders: {}, task: {}}})
    with home.database.open("w") as file:
        file.write(whole[:30])
        file.flush()
        looks = poller.log().count(f"<read {home.database}>")
        eventually(lambda: poller.log().count(f"<read {home.database}>") > looks + 1)
        file.write(whole[30:])
    eventually(lambda: home.files() == [f"{task}.png"])
    assert poller.stop() == 0
    assert not re.search("Traceback|ERROR|removed", poller.log())
