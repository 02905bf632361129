"""Killed at any moment, cut off from power, on odd file systems: nothing is lost, nothing piles up."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import QUICK, ROOT, Home, find_program
from sandbox import Sandbox
from torture import DECK, endurance, kills, outage

import db

CALLS = "trace=write,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat"


def test_killed_at_random_moments(home: Home) -> None:
    print(kills(home, 6, seed=20260801, longest=0.7, before=QUICK))


def test_open_files_do_not_grow(home: Home) -> None:
    print(endurance(home, 200, 50, before=QUICK))


class Call(NamedTuple):
    began: float  # seconds since 1970
    ended: float
    text: str  # its name and arguments; a descriptor has its path beside it


def under_strace(home: Home, command: list[str], *options: str) -> str:
    """Run a command to its end; gives what it said."""
    program = find_program("strace", "strace", "the order of the writes, and of calls that are refused")
    probe = subprocess.run([program, "-o", os.devnull, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"strace may not trace here, so the order of the writes is NOT tested: {probe.stderr}")
    done = subprocess.run([program, "-f", "-qq", *options, *command], env=home.environment(), timeout=60,
                          cwd=home.folder, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def trace(home: Home, command: list[str]) -> list[Call]:
    """Its system calls that worked, in order. After a power cut only what is on the disk counts."""
    log = home.folder / "calls"
    under_strace(home, command, "-z", "-y", "-ttt", "-T", "-s0", "-e", CALLS, "-o", str(log))
    found = re.findall(r"^\d+ +([\d.]+) (.*) <([\d.]+)>$", log.read_text(errors="replace"), re.M)
    return sorted(Call(float(began), float(began) + float(took), text) for began, text, took in found)


def find(calls: list[Call], pattern: str) -> list[Call]:
    found = [call for call in calls if re.match(pattern, call.text)]
    assert found, f"no {pattern}:\n" + "\n".join(map(str, calls[-60:]))
    return found


def synced(calls: list[Call], path: Path, after: Call | None, before: Call | None) -> bool:
    """Whether a file or folder was put on the disk, all of it between these two calls."""
    return any(
        (not after or after.ended < call.began) and (not before or call.ended < before.began)
        for call in find(calls, rf"(fsync|fdatasync)\(\d+<{path}>")
    )


def named(calls: list[Call], path: Path) -> Call:
    """The one rename that gave a file this name; all of its content was on the disk before."""
    (rename,) = find(calls, rf'rename.*, "{path}"')
    temp = Path(re.findall(r'"([^"]*)"', rename.text)[0])
    last = find(calls, rf"write\(\d+<{temp}>")[-1]
    assert synced(calls, temp, last, rename), f"{path} has its name before its content is on the disk"
    return rename


def test_order_of_the_writes_of_a_delivery_into_a_new_folder(home: Home, grafx: Sandbox) -> None:
    task_id, listed = grafx.add(size=300_000), db.beside(home.database, "delivered")
    home.wait_for(task_id)
    home.orders.rmdir()
    listed.write_text("2026-01-01T00:00:00Z other other.png\n")  # a new list has its folder synced, too
    calls = trace(home, home.command("--once"))
    assert not home.waiting()
    made, line = find(calls, f'mkdir.*"{home.orders}"')[0], find(calls, rf"write\(\d+<{listed}>")[-1]
    file, leaves = named(calls, home.orders / f"{task_id}.png"), named(calls, home.database)
    assert synced(calls, home.folder, made, leaves), "a power cut can take the new folder with its files"
    assert synced(calls, home.orders, file, leaves), "the order leaves before its file's name is on the disk"
    assert synced(calls, listed, line, leaves), "the order leaves before the list has it"
    assert synced(calls, home.folder, leaves, None), "that it left is never put on the disk"


def test_order_of_the_writes_after_a_kill(home: Home, grafx: Sandbox) -> None:
    """The file of a killed process has its final name, but perhaps not on the disk yet."""
    home.wait_for(task_id := grafx.add())
    (home.orders / f"{task_id}.png").write_bytes(grafx.body(task_id))
    calls = trace(home, home.command("--once"))
    assert not home.waiting()
    assert synced(calls, home.orders, None, named(calls, home.database))


def test_order_of_the_writes_of_an_added_order(home: Home) -> None:
    home.wait_for()
    calls = trace(home, [*home.command()[:1], str(ROOT / "db.py"), "add", "some-task"])
    said = find(calls, r"write\(1<")[0]
    assert synced(calls, home.folder, named(calls, home.database), said), "said before it is on the disk"


@pytest.mark.parametrize(("refused", "error"), [("fsync", "EOPNOTSUPP"), ("fchmod,fchown", "EINVAL")])
def test_a_file_system_that_refuses_a_call(home: Home, grafx: Sandbox, refused: str, error: str) -> None:
    """fsync of a folder, as on a VirtualBox share; fchmod and fchown, as on CIFS or in a user's namespace."""
    tasks = [grafx.add(), grafx.add()]
    home.wait_for(*tasks)
    home.env["ON_DONE"] = "true"  # so the list of deliveries is checked, too
    folders = [home.folder, home.orders] if refused == "fsync" else []
    inject = ("-o", os.devnull, "-e", f"trace={refused}", "-e", f"inject={refused}:error={error}")
    log = under_strace(home, home.command("--once", "-v"), *inject, *(f"-P{folder}" for folder in folders))
    assert (home.waiting(), home.files()) == ({}, sorted(f"{task_id}.png" for task_id in tasks))
    assert not re.search("WARNING|ERROR|Traceback", log), log
    assert sorted(re.findall(r"DEBUG +(\S+) cannot be synced: ", log)) == sorted(map(str, folders)), "once"


def test_no_order_fails_in_an_outage(home: Home) -> None:
    """With and without --once, GraFx has every fault there is, each for up to 0.2 s and until it was met."""
    print(outage(home, len(DECK), 0.2, seed=20260801))
