"""The list of what was delivered: what counts as a line, and that nothing of it is lost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import db

NOON = "2026-01-01T12:00:00Z"


@pytest.fixture
def deliveries(tmp_path: Path) -> db.Deliveries:
    return db.Deliveries(tmp_path / "database.json")


def line(task_id: str, name: str = "x.png") -> str:
    return f"{NOON} {task_id} {name}\n"


def test_another_list_in_its_place_is_read_anew(deliveries: db.Deliveries) -> None:
    deliveries.add({"a": "a.png"})
    edited = deliveries.path.with_name("edited")
    edited.write_text(line("x") + line("y") + line("z") + line("a"))
    edited.replace(deliveries.path)
    deliveries.refresh()
    assert [*deliveries.ids] == ["x", "y", "z", "a"]
    deliveries.path.write_text(line("x"))  # shorter
    deliveries.refresh()
    assert [*deliveries.ids] == ["x"]


def test_a_start_keeps_the_newest(deliveries: db.Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(f"t{number}") for number in range(250)]
    deliveries.path.write_text("".join(lines))
    deliveries.path.chmod(0o640)
    for kept, locked in ((125, False), (100, True), (100, False)):
        assert deliveries.path.read_text() == "".join(lines)
        monkeypatch.setattr(db, "KEPT", kept)
        monkeypatch.setattr(db, "PATIENCE", 0.1)
        held = db.hold(db.beside(deliveries.database, "lock"), "busy") if locked else None  # by a writer
        db.Database(deliveries.database, check_writable=False).sync()
        if held:
            held.close()
    assert deliveries.path.read_text() == "".join(lines[150:])
    assert deliveries.path.stat().st_mode & 0o777 == 0o640


def test_two_processes_that_write_lose_nothing(deliveries: db.Deliveries) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import db, pathlib; "
        "d = db.Deliveries(pathlib.Path(sys.argv[1])); "
        "[d.add({f'{sys.argv[2]}-{n}': 'x.png', f'{sys.argv[2]}-{n}b': 'y.png'}) for n in range(25)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, deliveries.database, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(re.findall(r"^\S+Z [ab]-\d+b? [xy]\.png\n", deliveries.path.read_text(), re.M)) == 100
    deliveries.refresh()
    assert len(deliveries.ids) == 100


names = st.sampled_from(["a", "b", "a.png", NOON])
rubbish = st.sampled_from(["\n", "rubbish\n", " a \n", "x a y\n", f"{NOON}  a a\n", f"{NOON} a"])
pieces = st.lists(st.builds(line, names, st.sampled_from(["-", "a b c.png"])) | rubbish)


@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(st.lists(pieces, max_size=4))
def test_any_lines_in_any_portions(
    tmp_path_factory: pytest.TempPathFactory, portions: list[list[str]]
) -> None:
    """Read bit by bit or all at once: the same."""
    deliveries = db.Deliveries(tmp_path_factory.mktemp("any") / "database.json")
    for portion in portions:
        with deliveries.path.open("a") as file:
            file.write("".join(portion))
        deliveries.refresh()
    known = dict[str, str]()
    for one in "".join(map("".join, portions)).split("\n")[:-1]:
        match = re.fullmatch(rf"{NOON} ([^ ]+) (.+)", one)
        if match and db.is_task_id(match[1]):
            known[match[1]] = match[2]
    whole = db.Deliveries(deliveries.database)
    assert deliveries.ids == whole.ids
    assert whole.ids == {task_id: f"{NOON} {name}" for task_id, name in known.items() if name != "-"}
    assert deliveries.again == whole.again == known.keys() - whole.ids.keys()
