"""Killed at any moment, cut off from power, kept busy for long: nothing is lost, nothing piles up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Home
from sandbox import Sandbox
from torture import MIB, endurance, kills

SEED = 20260801
CALLS = "openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink,mkdir,mkdirat"


def test_killed_at_random_moments(tmp_path: Path) -> None:
    print(kills(tmp_path, 15, SEED))


def test_memory_and_descriptors_do_not_grow(tmp_path: Path) -> None:
    early, late, summary = endurance(tmp_path, 1200, 400)
    print(summary)
    assert late[0] <= early[0] + 2 * MIB, summary
    assert late[1] <= early[1], summary


# --- a power cut: only what is on the disk counts, so the order of the system calls does ---------


@dataclass
class Call:
    name: str
    text: str  # its arguments; a descriptor has its path beside it
    began: int
    ended: int = -1


def trace(home: Home, command: list[str], log: Path) -> list[Call]:
    """Run a command to its end; gives its system calls that worked, in the order in which they began."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace (Debian: apt-get install strace): the order of the writes is NOT tested")
    probe = subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"strace may not trace here, the order of the writes is NOT tested: {probe.stderr}")
    done = subprocess.run(
        [strace, "-f", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", str(log), *command],
        *(), env=home.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls: list[Call] = []
    open_calls: dict[str, Call] = {}
    for place, line in enumerate(log.read_text(errors="replace").splitlines()):
        thread, _, said = line.partition(" ")
        said = said.strip()
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", said):
            call = open_calls.pop(thread)
            call.text += resumed[1]
        elif found := re.match(r"(\w+)\((.*)", said):
            call = Call(found[1], found[2].removesuffix(" <unfinished ...>"), place)
            calls.append(call)
            if said.endswith("<unfinished ...>"):
                open_calls[thread] = call
                continue
        else:
            continue
        if " = -1 " not in call.text:
            call.ended = place
    return [call for call in calls if call.ended >= 0]


def find(calls: list[Call], names: str, matches: Callable[[str], bool], what: str) -> list[Call]:
    found = [call for call in calls if re.fullmatch(names, call.name) and matches(call.text)]
    assert found, f"never {what}:\n" + "\n".join(f"{call.name}({call.text}" for call in calls[-60:])
    return found


def renamed(calls: list[Call], to: Path) -> tuple[Call, str]:
    """The one call that gave a file its final name, and the name that it had before."""
    (call,) = find(calls, "rename.*", lambda text: f'"{to}"' in text, f"renamed to {to}")
    return call, re.findall(r'"([^"]*)"', call.text)[0]


def synced(calls: list[Call], path: Path | str) -> list[Call]:
    return find(calls, "fsync|fdatasync", lambda text: f"<{path}>" in text, f"synced {path}")


def whole_before_its_name(calls: list[Call], to: Path) -> Call:
    """The data is on the disk before the rename, nothing is written after that; gives the rename."""
    rename, temp = renamed(calls, to)
    before = [call for call in calls if call.ended < rename.began]
    last_write = find(calls, "write", lambda text: f"<{temp}>" in text, f"written to {temp}")[-1]
    assert synced(before, temp)[-1].began > last_write.ended, f"{temp} is written to after its fsync"
    assert not [
        call for call in calls if call.name == "openat" and f'"{to}"' in call.text and "O_WR" in call.text
    ]
    return rename


def test_order_of_the_writes(home: Home, grafx: Sandbox) -> None:
    """Of one delivery, with the folder that is made for it."""
    task_id = grafx.add(size=300_000)
    home.wait_for(task_id)
    home.orders.rmdir()
    calls = trace(home, home.command("--once"), home.folder / "calls")
    assert not home.waiting()
    named = whole_before_its_name(calls, home.orders / f"{task_id}.png")
    replaced = whole_before_its_name(calls, home.database)
    assert any(
        named.ended < call.began and call.ended < replaced.began for call in synced(calls, home.orders)
    ), "the order leaves database.json before its file's name is on the disk"
    assert synced(calls, home.folder)[-1].began > replaced.ended, "database.json's folder is not synced"
    made = find(calls, "mkdir|mkdirat", lambda text: f'"{home.orders}"' in text, "made the orders folder")[0]
    assert any(
        made.ended < call.began and call.ended < replaced.began for call in synced(calls, home.folder)
    ), "a power cut can take the new orders folder, with all that is in it"


def test_order_of_the_writes_after_a_kill(home: Home, grafx: Sandbox) -> None:
    """The file of a killed process has its final name, but perhaps not on the disk yet."""
    task_id = grafx.add()
    home.wait_for(task_id)
    (home.orders / f"{task_id}.png").write_bytes(grafx.body(task_id))
    calls = trace(home, home.command("--once"), home.folder / "calls")
    assert not home.waiting()
    assert synced(calls, home.orders)[0].ended < renamed(calls, home.database)[0].began


def test_order_of_the_writes_of_an_added_order(home: Home) -> None:
    home.wait_for()
    command = [*home.command()[:1], str(ROOT / "db.py"), "add", "some-task"]
    calls = trace(home, command, home.folder / "calls")
    rename = whole_before_its_name(calls, home.database)
    said = find(calls, "write", lambda text: text.startswith("1<"), "said that it is pending")[0]
    assert any(rename.ended < call.began and call.ended < said.began for call in synced(calls, home.folder))
