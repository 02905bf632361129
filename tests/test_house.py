"""The house as it was drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, find_program

TOP = {"poller.py", "chili.py", "db.py", "database.json", "orders", "requirements.txt", "tests", "README.md"}
MODULES = ("poller", "chili", "db")


def git(*arguments: str) -> str | None:
    """What git says of this repository; None in an unpacked archive."""
    if not (ROOT / ".git").exists():
        return None
    command = [find_program("git", "git", "what is committed"), "-c", f"safe.directory={ROOT}"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_top_level_is_as_drawn() -> None:
    tracked = git("ls-files")
    if tracked is None:  # an unpacked archive, in which somebody may have made what .gitignore names
        names = {path.name for path in ROOT.iterdir()} - {"__pycache__"}
    else:
        names = {name.partition("/")[0] for name in tracked.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP
    assert ".env.example" in names


def test_at_run_time_there_are_two_packages_both_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [re.sub(r"==[0-9.]+$", "", line) for line in lines] == ["requests", "python-dotenv"]
    assert all("==" in line for line in lines)


def test_the_shipped_database_is_empty() -> None:
    committed = git("show", "HEAD:database.json") or (ROOT / "database.json").read_text()
    assert json.loads(committed) == {"orders": {}, "failed": {}}


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_others_is_used(module: str) -> None:
    """Else the next release of requests, or the poller's own `chili` and `db`, may break it unnoticed."""
    rules = ("--select=SLF001,PLC2701", "--preview", "--isolated", "--ignore-noqa", "--output-format=concise")
    example = "\nfrom urllib3 import _collections\nresponse.raw._fp.read()\n"
    command, code = [sys.executable, "-m", "ruff", "check", *rules, "-"], (ROOT / f"{module}.py").read_text()
    found = subprocess.run(command, input=code + example, capture_output=True, text=True, timeout=60)
    assert re.findall("`(_.*?)`", found.stdout) == ["_collections", "_fp"], found.stdout + found.stderr


def test_chili_and_db_know_neither_each_other_nor_the_poller() -> None:
    imports = re.compile(r"^ *(?:from|import) (poller|chili|db)\b", re.MULTILINE)
    known = {module: {*imports.findall((ROOT / f"{module}.py").read_text())} - {module} for module in MODULES}
    assert known == {"poller": {"chili", "db"}, "chili": set(), "db": set()}
