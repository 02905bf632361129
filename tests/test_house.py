"""The house as it was drawn."""

from __future__ import annotations

import json
import re

from conftest import ROOT, git

TOP = [
    "poller.py",
    "chili.py",
    "db.py",
    "database.json",
    "orders",
    ".env.example",
    "requirements.txt",
    "tests",
    "README.md",
]


def test_the_top_level_is_as_drawn() -> None:
    tracked = git("ls-files")
    if tracked is None:  # an unpacked archive, in which somebody may have made what .gitignore names
        names = {path.name for path in ROOT.iterdir()} - {"__pycache__"}
    else:
        names = {name.partition("/")[0] for name in tracked.splitlines()}
    assert {name for name in names if not name.startswith(".")} == set(TOP) - {".env.example"}
    assert ".env.example" in names


def test_at_run_time_there_are_two_packages_both_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [re.sub(r"==[0-9.]+$", "", line) for line in lines] == ["requests", "python-dotenv"]
    assert all("==" in line for line in lines)


def test_the_shipped_database_is_empty() -> None:
    committed = git("show", "HEAD:database.json") or (ROOT / "database.json").read_text()
    assert json.loads(committed) == {"orders": {}, "failed": {}}
