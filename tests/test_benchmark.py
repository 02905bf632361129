"""The benchmark runs whole. What it measures here, beside other tests, says nothing."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import ROOT, Home, find_program


def test_the_quick_benchmark_has_all_lines_of_the_table_in_tests_readme(home: Home) -> None:
    for name in ("nginx", "curl"):
        find_program(name, name)
    command = [sys.executable, ROOT / "tests/benchmark.py", "--quick"]
    # In the folder of `home`, which ends what is left there if this takes too long.
    env = home.environment(TMPDIR=str(home.folder))
    ended = subprocess.run(command, cwd=home.folder, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr

    def lines(table: str) -> list[str]:
        """What stands in the first column, without its numbers, which --quick has smaller."""
        names = [re.split("  +", line.strip())[0] for line in table.partition("-----\n")[2].splitlines()]
        return [re.sub(r"[\d.,]+", "1", name) for name in names]

    readme = (ROOT / "tests" / "README.md").read_text()
    printed = readme.partition("prints this:\n\n```\n")[2].partition("```")[0]
    assert lines(ended.stdout) == lines(printed)
