"""The list of what was delivered: what counts as a line, and that nothing of it is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import db

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (\S+) (\S+)\n")


@pytest.fixture
def deliveries(tmp_path: Path) -> db.Deliveries:
    return db.Deliveries(tmp_path / "database.json")


def line(task_id: str, name: str = "", hour: int = 12) -> str:
    return f"2026-01-01T{hour:02}:00:00Z {task_id} {name or task_id + '.png'}\n"


def test_all_that_ended_together_are_one_fsync(
    deliveries: db.Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, there = os.fsync, list[str]()

    def fsync(fd: int) -> None:
        real(fd)
        there.append(deliveries.path.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    deliveries.add({f"{number}": "x.png" for number in range(500)})
    assert len(there) == 2  # and one of the folder, since the file is new
    assert there[0].count("\n") == 500
    deliveries.add({"a": "a.png", "b": "b.png"})
    assert len(there) == 3


def test_while_a_line_is_written_the_list_counts_as_writable(
    deliveries: db.Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a command that could begin just then would be put off."""
    seen = list[bool]()
    deliveries.prove(1)
    assert deliveries.path.read_bytes() == b""
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(deliveries.writable))
    deliveries.add({"a": "a.png"})
    assert all(seen)


def test_another_list_in_its_place_is_read_anew(deliveries: db.Deliveries) -> None:
    deliveries.add({"a": "a.png"})
    edited = deliveries.path.with_name("edited")
    edited.write_text(line("x") + line("y") + line("z") + line("a"))
    edited.replace(deliveries.path)
    deliveries.refresh()
    assert deliveries.ids == {"a", "x", "y", "z"}
    deliveries.path.write_text(line("x"))  # shorter
    deliveries.refresh()
    assert deliveries.ids == {"x"}


def test_a_start_keeps_the_newest(deliveries: db.Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(f"t{number}", "-" if number == 150 else "") for number in range(250)]
    deliveries.path.write_text("".join(lines) + "2026-01-01")
    deliveries.path.chmod(0o640)
    monkeypatch.setattr(db, "KEPT", 126)
    before = deliveries.path.stat().st_ino
    db.Database(deliveries.database, prove=False).sync(idle=True)
    assert deliveries.path.stat().st_ino == before
    monkeypatch.setattr(db, "KEPT", 100)
    with monkeypatch.context() as patch, db.lock(deliveries.database, "lock", 0):
        patch.setattr(db, "PATIENCE", 0.1)
        db.Database(deliveries.database, prove=False).sync(idle=True)  # somebody may be writing to it
        assert deliveries.path.read_text().startswith(lines[0])
    db.Database(deliveries.database, prove=False).sync(idle=True)
    assert deliveries.path.read_text() == "".join(lines[151:]) + "2026-01-01"
    assert deliveries.path.stat().st_mode & 0o777 == 0o640


def test_two_processes_that_write_lose_nothing(deliveries: db.Deliveries) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import db, pathlib; "
        "d = db.Deliveries(pathlib.Path(sys.argv[1])); "
        "[d.add({f'{sys.argv[2]}-{n}': 'x.png', f'{sys.argv[2]}-{n}b': 'y.png'}) for n in range(25)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, deliveries.database, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(LINE.findall(deliveries.path.read_text())) == 100
    deliveries.refresh()
    assert len(deliveries.ids) == 100


names = st.sampled_from(["a", "b", "c", "a.png", "2026-01-01T12:00:00Z"])
pieces = st.lists(
    st.builds(line, names, st.sampled_from(["-", "a.png", "a b c.png", "b"]))
    | st.sampled_from(
        ["\n", "rubbish\n", " a \n", "x a y\n", "2026-01-01T12:00:00Z  a a\n", "2026-01-01T12:00:00Z a"]
    )
)


@settings(deadline=None, database=None, derandomize=True, max_examples=100)
@given(st.lists(pieces, max_size=4))
def test_any_lines_in_any_portions(
    tmp_path_factory: pytest.TempPathFactory, portions: list[list[str]]
) -> None:
    """Read bit by bit or all at once: the same."""
    deliveries = db.Deliveries(tmp_path_factory.mktemp("any") / "database.json")
    text = ""
    for portion in portions:
        text += "".join(portion)
        with deliveries.path.open("a") as file:
            file.write("".join(portion))
        deliveries.refresh()
    known = dict[str, str]()
    for one in text.split("\n")[:-1]:
        match = re.fullmatch(r"(2026-01-01T12:00:00Z) ([^ ]+) (.+)", one)
        if match and db.is_task_id(match[2]):
            known[match[2]] = match[3]
    whole = db.Deliveries(deliveries.database)
    whole.refresh()
    assert deliveries.ids == whole.ids == {task_id for task_id, name in known.items() if name != "-"}
    for task_id in ("a", "b", "c", "a.png", "none"):
        name = known.get(task_id, "-")
        found = {} if name == "-" else {task_id: ("2026-01-01T12:00:00Z", name)}
        assert (task_id in deliveries.again) == (task_id in known and not found)
        assert found.items() <= deliveries.all().items()
