"""The house as it was drawn."""

from __future__ import annotations

import ast
import json
import re

import pytest
from conftest import ROOT, git

TOP = {"poller.py", "chili.py", "db.py", "database.json", "orders", "requirements.txt", "tests", "README.md"}
MODULES = ("poller", "chili", "db")
DOCUMENTED = {"_exit", "_replace"}  # os._exit, and what named tuples have


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


def imported(code: str) -> set[str]:
    """What is imported, with dots in between: "requests.adapters.HTTPAdapter"."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def private_names_of_others(code: str) -> set[str]:
    """The names with a leading underscore that are used here, but made elsewhere."""
    used, made = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            # self._lock = ...; but not response._body = ..., and not super()._method()
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (made if own and isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used |= {node.value} if re.fullmatch("_[a-z]+(_[a-z]+)*", node.value) else set()  # as for getattr
    used |= {part for name in imported(code) if name != "__future__" for part in name.split(".")}
    return {name for name in used - made - DOCUMENTED if re.match("_[^_]", name)}


def test_a_private_name_of_others_is_found() -> None:
    code = """
from urllib3._collections import HTTPHeaderDict
import _socket
class A:
    def _b(self):
        self._c = self._b
        response._content = response.raw._fp.read()
        getattr(connection, "_tunnel")
        os._exit(address._replace(port=1))
        return super().__init__()
"""
    assert private_names_of_others(code) == {"_collections", "_socket", "_content", "_fp", "_tunnel"}


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_others_is_used(module: str) -> None:
    """Else the next release of requests, or the poller's own `chili` and `db`, may break it unnoticed."""
    code = (ROOT / f"{module}.py").read_text()
    assert private_names_of_others(code) == set()
    names = imported(code)
    assert not [name for name in names if name.startswith(("http.client", "."))]
    # chili and db know neither each other nor the poller.
    known = {name.partition(".")[0] for name in names} & set(MODULES)
    assert known == ({"chili", "db"} if module == "poller" else set())
