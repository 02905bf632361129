"""Killed at any moment, cut off from power, on odd file systems: nothing is lost, nothing piles up."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Home, find_program
from sandbox import Sandbox
from torture import endurance, kills

import db

SEED = 20260801
CALLS = "openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink,mkdir,mkdirat"


def test_killed_at_random_moments(home: Home) -> None:
    """In a folder of `home`, which ends whatever runs there."""
    (folder := home.folder / "kills").mkdir()
    print(kills(folder, 8, SEED))


def test_descriptors_do_not_grow(tmp_path: Path) -> None:
    early, late, summary = endurance(tmp_path, 300, 100)
    print(summary)
    assert late[1] <= early[1] + 8, summary  # idle connections


# --- a power cut: only what is on the disk counts, so the order of the system calls does ---------


@dataclass
class Call:
    name: str
    text: str  # its arguments; a descriptor has its path beside it
    began: int
    ended: int = -1


def strace(*options: str | Path, what: str) -> list[str]:
    """The words before a command that is to run under strace; without it, `what` is not tested."""
    program = find_program("strace", "strace", what)
    probe = subprocess.run([program, "-o", os.devnull, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"strace may not trace here, {what} is NOT tested: {probe.stderr}")
    return [program, "-f", "-qq", *map(str, options)]


def refuse(calls: str, how: str, *places: Path) -> list[str]:
    """The words before a command of which such calls fail or take long; it is the process that is started."""
    paths = [word for place in places for word in ("-P", str(place))]
    options = ("-D", "-o", os.devnull, *paths, "-e", f"trace={calls}", "-e", f"inject={calls}:{how}")
    return strace(*options, what="a system call that fails or takes long")


def trace(home: Home, command: list[str], log: Path) -> list[Call]:
    """Run a command to its end; gives its system calls that worked, in the order in which they began."""
    words = strace("-y", "-s", "0", "-e", f"trace={CALLS}", "-o", log, what="the order of the writes")
    done = subprocess.run(
        [*words, *command], env=home.environment(), capture_output=True, text=True, timeout=60
    )
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
    listed = db.beside(home.database, "delivered")
    line = find(calls, "write", lambda text: f"<{listed}>" in text, "listed")[-1]
    assert any(line.ended < call.began and call.ended < replaced.began for call in synced(calls, listed)), (
        "the order leaves database.json before the list has it"
    )
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


# --- file systems that refuse a call -------------------------------------------------------------


@pytest.mark.parametrize(("calls", "error"), [("fsync", "EOPNOTSUPP"), ("fchmod,fchown", "EINVAL")])
def test_a_file_system_that_refuses_a_call(home: Home, grafx: Sandbox, calls: str, error: str) -> None:
    """fsync of a folder, as on a VirtualBox share; fchmod and fchown, as on CIFS or in a user's namespace."""
    tasks = [grafx.add(), grafx.add()]
    home.wait_for(*tasks)
    folders = [home.folder, home.orders] if calls == "fsync" else []
    command = [*refuse(calls, f"error={error}", *folders), *home.command("--once", "-v")]
    home.env["ON_DONE"] = "true"  # so the list of deliveries is proven, too
    done = subprocess.run(command, env=home.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (home.waiting(), home.files()) == ({}, sorted(f"{task_id}.png" for task_id in tasks))
    assert not re.search("WARNING|ERROR|Traceback", done.stderr), done.stderr
    said = re.findall(r"DEBUG +(\S+) cannot be synced: ", done.stderr)
    assert sorted(said) == sorted(map(str, folders))  # of each folder once
