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


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_a_delivery_is_a_line_beside_the_database(deliveries: db.Deliveries) -> None:
    deliveries.add({"a": "a.png", "b": "b.pdf"})
    deliveries.add({"c": "c.zip"})
    assert deliveries.path.name == ".database.json.delivered"
    text = deliveries.path.read_text()
    assert LINE.findall(text) == [("a", "a.png"), ("b", "b.pdf"), ("c", "c.zip")]
    assert "".join(match[0] for match in LINE.finditer(text)) == text
    assert len(deliveries.ids) == 3
    assert "a" in deliveries.ids
    assert "d" not in deliveries.ids
    again = db.Deliveries(deliveries.database)
    again.refresh()
    assert again.ids == deliveries.ids == {"a", "b", "c"}


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


def test_an_order_to_be_delivered_again_does_not_count(deliveries: db.Deliveries) -> None:
    deliveries.add({"a": "a.png", "b": "b.png"})
    deliveries.add({"a": "-"})
    assert deliveries.ids == {"b"}
    assert "a" not in deliveries.all()
    deliveries.add({"a": "a.pdf"})
    assert deliveries.ids == {"a", "b"}
    assert list(deliveries.all()) == ["b", "a"]
    assert deliveries.all()["a"] == (deliveries.path.read_text().splitlines()[-1].split()[0], "a.pdf")


@pytest.mark.parametrize("half", ["2026", "2026-01-01T12:00:00Z half half.p", "2026-01-01T12:00:00Z whole -"])
def test_a_line_that_was_cut_off_does_not_count_and_spoils_none(deliveries: db.Deliveries, half: str) -> None:
    deliveries.path.write_text(line("whole") + half)
    deliveries.refresh()
    assert deliveries.ids == {"whole"}
    assert "half" not in deliveries.all()
    assert "whole" in deliveries.all()
    deliveries.add({"next": "next.png"})
    assert deliveries.ids >= {"next"}
    assert "next" in deliveries.all()
    assert line("whole") in deliveries.path.read_text()


def test_rubbish_is_ignored(deliveries: db.Deliveries) -> None:
    rubbish = [
        b"hello\n",
        b"\0\0\0\n",
        b"\xff\xfe x y\n",
        b"2026-01-01T12:00:00Z ../x x.png\n",
        b"\n",
        b"x y z\n",
    ]
    rubbish += [b"2026-01-01T12:00:00Z c \n", b" c c.png\n", b"yesterday c c.png\n"]
    deliveries.path.write_bytes(line("a").encode() + b"".join(rubbish) + line("b").encode())
    deliveries.refresh()
    assert deliveries.ids == {"a", "b"}
    assert list(deliveries.all()) == ["a", "b"]
    with deliveries.path.open("a") as file:
        file.write("more\n")
    deliveries.refresh()
    deliveries.add({"c": "c.png"})
    assert deliveries.ids == {"a", "b", "c"}


def test_what_another_process_wrote_is_noticed(deliveries: db.Deliveries) -> None:
    other = db.Deliveries(deliveries.database)
    deliveries.add({"a": "a.png"})
    other.add({"b": "b.png", "a": "-"})
    assert "b" not in deliveries.ids
    deliveries.refresh()
    assert deliveries.ids == {"b"}
    # Another file in its place, and a shorter one.
    edited = deliveries.path.with_name("edited")
    edited.write_text(line("x") + line("y") + line("z") + line("a"))
    edited.replace(deliveries.path)
    deliveries.refresh()
    assert deliveries.ids == {"a", "x", "y", "z"}
    deliveries.path.write_text(line("x"))
    deliveries.refresh()
    assert deliveries.ids == {"x"}


def test_a_list_that_is_gone_or_cannot_be_read_is_said_once(
    deliveries: db.Deliveries, caplog: pytest.LogCaptureFixture
) -> None:
    deliveries.refresh()
    assert said(caplog) == []  # there was none yet
    deliveries.add({"a": "a.png"})
    deliveries.path.unlink()
    deliveries.refresh()
    deliveries.refresh()
    assert deliveries.ids == set()
    (problem,) = said(caplog)
    assert str(deliveries.path) in problem
    deliveries.path.mkdir()
    deliveries.refresh()
    deliveries.refresh()
    (problem,) = said(caplog)
    assert str(deliveries.path) in problem
    with pytest.raises(db.DatabaseError, match=re.escape(str(deliveries.path))):
        deliveries.add({"a": "a.png"})
    assert "a" not in deliveries.all()
    deliveries.path.rmdir()
    deliveries.add({"b": "b.png"})
    assert deliveries.ids == {"b"}


def test_a_link_is_not_followed(deliveries: db.Deliveries) -> None:
    """Root may call in a folder that is another user's."""
    victim = deliveries.path.with_name("victim")
    victim.write_text("precious")
    deliveries.path.symlink_to(victim)
    with pytest.raises(db.DatabaseError):
        deliveries.add({"a": "a.png"})
    assert victim.read_text() == "precious"


def test_the_newest_are_kept(deliveries: db.Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(f"t{number}", "-" if number == 150 else "") for number in range(250)]
    deliveries.path.write_text("".join(lines) + "2026-01-01")
    deliveries.path.chmod(0o640)
    deliveries.refresh()
    monkeypatch.setattr(db, "KEPT", 126)
    before = deliveries.path.stat().st_ino
    deliveries.shorten()
    assert deliveries.path.stat().st_ino == before
    monkeypatch.setattr(db, "KEPT", 100)
    monkeypatch.setattr(db, "PATIENCE", 0.1)
    with db.lock(deliveries.database, "lock", 0):  # somebody may be writing to it
        deliveries.shorten()
        assert deliveries.path.read_text().startswith(lines[0])
    monkeypatch.undo()
    monkeypatch.setattr(db, "KEPT", 100)
    deliveries.shorten()
    assert deliveries.path.read_text() == "".join(lines[151:]) + "2026-01-01"
    deliveries.refresh()
    assert deliveries.ids == {f"t{number}" for number in range(151, 250)}
    assert deliveries.path.stat().st_mode & 0o777 == 0o640
    assert {file.name for file in deliveries.path.parent.iterdir()} == {
        ".database.json.delivered",
        ".database.json.lock",
    }
    deliveries.add({"next": "next.png"})
    assert "next" in deliveries.ids


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start shortens it, where there is something to gain."""
    monkeypatch.setattr(db, "KEPT", 10)
    deliveries = db.Deliveries(tmp_path / "database.json")
    for number in range(100):
        deliveries.add({f"t{number}": f"t{number}.png"})
        if number % 7 == 0:
            database = db.Database(deliveries.database)
            database.start()
            assert {f"t{kept}" for kept in range(max(0, number - 9), number)} <= database.deliveries.ids
            assert len(database.deliveries.ids) <= 20


COST = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import db, os, pathlib, time
def memory():
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20
before, begun = memory(), time.process_time()
database = db.Database(pathlib.Path(sys.argv[1]))
database.start()
took = time.process_time() - begun
after = memory()
begun = time.process_time()
database.deliveries.has("none")
print(len(database.deliveries.ids), took, after - before, time.process_time() - begun)
"""


def test_a_hundred_thousand_cost_little(deliveries: db.Deliveries) -> None:
    if sys.platform != "linux":
        pytest.skip("needs /proc to know the memory: NOT tested")
    ids = (f"{number:08x}-0000-4000-8000-{number:012x}" for number in range(100_000))
    deliveries.path.write_text("".join(map(line, ids)))
    done = subprocess.run(
        [sys.executable, "-c", COST, deliveries.database], capture_output=True, text=True, check=True
    )
    number, took, memory, found = map(float, done.stdout.split())
    assert number == 100_000
    assert took < 0.5
    assert memory < 20
    assert found < 0.1


def test_two_processes_that_write_lose_nothing(deliveries: db.Deliveries) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import db, pathlib; "
        "d = db.Deliveries(pathlib.Path(sys.argv[1])); "
        "[d.add({f'{sys.argv[2]}-{n}': 'x.png', f'{sys.argv[2]}-{n}b': 'y.png'}) for n in range(50)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, deliveries.database, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(LINE.findall(deliveries.path.read_text())) == 200
    deliveries.refresh()
    assert len(deliveries.ids) == 200


names = st.sampled_from(["a", "b", "c", "a.png", "2026-01-01T12:00:00Z"])
pieces = st.lists(
    st.builds(line, names, st.sampled_from(["-", "a.png", "a b c.png", "b"]))
    | st.sampled_from(
        ["\n", "rubbish\n", " a \n", "x a y\n", "2026-01-01T12:00:00Z  a a\n", "2026-01-01T12:00:00Z a"]
    )
)


@settings(deadline=None, database=None, derandomize=True, max_examples=300)
@given(st.lists(pieces, max_size=4))
def test_any_lines_in_any_portions(
    tmp_path_factory: pytest.TempPathFactory, portions: list[list[str]]
) -> None:
    """Read bit by bit, all at once, or for a single order: the same."""
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
        assert deliveries.has(task_id) == bool(found)
        assert found.items() <= deliveries.all().items()
