"""A GraFx environment on loopback and the real poller as a process, for all tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sandbox import Sandbox  # noqa: E402

PATIENCE = 30.0  # seconds: how long a busy machine may take for anything


def eventually(true: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """What `true` gives as soon as it is true; fails the test where it never is."""
    deadline = time.monotonic() + patience
    while True:
        value = true()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {patience} s: {what or true}"
        time.sleep(0.02)


class Home:
    """A folder with database.json and orders, the settings for it, and the pollers started on it."""

    def __init__(self, folder: Path, grafx: Sandbox) -> None:
        self.folder, self.grafx = folder, grafx
        self.database, self.orders = folder / "database.json", folder / "orders"
        self.orders.mkdir()
        self.env = {**grafx.settings(folder), "POLL_INTERVAL": "0.3"}
        self.pollers: list[Running] = []

    def write(self, data: Any) -> None:
        """database.json as an editor saves it that replaces the file."""
        temp = self.folder / "edited"
        temp.write_text(data if isinstance(data, str) else json.dumps(data, indent=4))
        temp.replace(self.database)

    def wait_for(self, *task_ids: str, **fields: Any) -> None:
        """Write orders in the poller's own shape."""
        self.write({"orders": dict.fromkeys(task_ids, fields), "failed": {}})

    def read(self) -> Any:
        return json.loads(self.database.read_text())

    def waiting(self) -> Any:
        return self.read()["orders"]

    def failed(self) -> Any:
        return self.read().get("failed", {})

    def files(self) -> list[str]:
        """All that is in the orders folder, hidden files too."""
        return sorted(path.name for path in self.orders.iterdir())

    def command(self, *arguments: str, before: str = "") -> list[str]:
        """The poller's command line; `before` is Python that runs first, to shorten a constant."""
        if not before:
            return [sys.executable, str(ROOT / "poller.py"), *arguments]
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import chili, db, poller; {before}; "
        return [sys.executable, "-c", code + "import os; os._exit(poller.main())", *arguments]

    def environment(self, **env: str) -> dict[str, str]:
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return {**keep, **self.env, **env}

    def start(self, *arguments: str, before: str = "", **env: str) -> Running:
        running = Running(self, self.command(*arguments, before=before), self.environment(**env))
        self.pollers.append(running)
        return running

    def run(self, *arguments: str, before: str = "", timeout: float = 60, **env: str) -> Running:
        """Start, and wait for the end."""
        running = self.start(*arguments, before=before, **env)
        running.process.wait(timeout)
        return running

    def db(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "db.py"), *arguments]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)


class Running:
    """A poller process; its standard output and error go to files."""

    def __init__(self, home: Home, command: list[str], env: dict[str, str]) -> None:
        self.path = home.folder / f"log-{len(home.pollers)}"
        with self.path.open("wb") as log:
            self.process = subprocess.Popen(command, env=env, cwd=home.folder, stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL)  # fmt: skip

    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def says(self, pattern: str, patience: float = PATIENCE) -> re.Match[str]:
        """Wait until the log has a match."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.log())
            assert found or self.process.poll() is None or re.search(pattern, self.log()), (
                f"ended with {self.process.poll()} without saying {pattern!r}:\n{self.log()}"
            )
            return found

        found: re.Match[str] = eventually(look, f"log says {pattern!r}", patience)
        return found

    def stop(self, how: int = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Send a signal and give the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout)


@pytest.fixture
def grafx() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def home(tmp_path: Path, grafx: Sandbox) -> Iterator[Home]:
    home = Home(tmp_path, grafx)
    yield home
    for running in home.pollers:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
