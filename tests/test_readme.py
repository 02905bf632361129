"""The README: each of its commands is run, its tables are what the code does, its picture is a real one.

The section "Under systemd" is test_systemd.py's, and what the ON_DONE lines do is test_on_done.py's.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from conftest import PATIENCE, ROOT, Loopback, eventually
from sandbox import Sandbox, read_state
from test_faults import FAULTS
from test_systemd import put_wheels

import chili
import db
import poller

README = (ROOT / "README.md").read_text()
TESTS_README = (ROOT / "tests" / "README.md").read_text()
MINE = re.sub(r"^## Under systemd\n[\s\S]*?(?=^## )", "", README, flags=re.MULTILINE)
PICTURE = MINE.split("```\n")[1]
LINES = [  # of all blocks of code, and what is a command within the text
    (indented or inline).partition("  #")[0].rstrip()
    for indented, inline in re.findall(r"^    (\S.*)|`(\.venv/bin/python .*?)`", MINE, re.MULTILINE)
]
# In their order: a new one needs a test that runs it.
TRY, TEST, SET_UP, COPY, CHECK, POLL, ONCE, SERVE, ADD, LIST, RETRY, RETRY_ALL, RETRY_SOME = (
    line for line in LINES if not line.startswith("ON_DONE=")
)


def section(title: str) -> str:
    return MINE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ][1:]


# --- its commands ----------------------------------------------------------------------------


class Place:
    """A copy of the repository, in a folder of its own, where the README's commands are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tmp = folder / "app", folder / "tmp"
        self.tmp.mkdir()
        shutil.copytree(ROOT / "tests" / "samples", self.folder / "tests" / "samples")
        names = ("poller.py", "chili.py", "db.py", "requirements.txt", ".env.example", "tests/sandbox.py")
        for name in names:
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "database.json").write_text('{"orders": {}, "failed": {}}')
        (self.folder / "orders").mkdir()
        put_wheels(folder / "wheels")
        self.env = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        self.env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(self.tmp)}
        self.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels")}
        self.env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}

    def type(self, command: str, code: int = 0, **replaced: str) -> str:
        """Type a command, with these words in it replaced; gives what it says."""
        for word, by in replaced.items():
            assert word in command
            command = command.replace(word, by)
        ended = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        assert ended.returncode == code, f"{command}: {ended.returncode}\n{ended.stdout}"
        return ended.stdout

    @contextmanager
    def typed(self, command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Type a command that goes on until Ctrl-C."""
        with log.open("wb") as out:
            process = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=self.folder, env=self.env,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=out)  # fmt: skip
        try:
            yield process
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()

    def in_a_terminal(self, command: str, columns: int) -> tuple[int, str]:
        """Type it in a terminal that is so wide; gives its exit code and all that was shown there."""
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        env, shown, deadline = {**self.env, "TERM": "xterm"}, b"", time.monotonic() + 240
        process = subprocess.Popen(["sh", "-c", command], cwd=self.folder, env=env, stdin=theirs,
                                   stdout=theirs, stderr=theirs, start_new_session=True)  # fmt: skip
        os.close(theirs)
        try:
            with suppress(OSError):  # which is how Linux says that nobody has the other end any more
                while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    data = os.read(ours, 65536)
                    if not data:
                        break
                    shown += data
            return process.wait(PATIENCE), shown.decode(errors="replace")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(ours)

    def fill_in(self, settings: dict[str, str]) -> None:
        """As a person does it: each setting on the line that the example has for it."""
        text = (self.folder / ".env").read_text()
        for name, value in settings.items():
            text, found = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert found == 1, f"{name} stands {found} times in .env.example"
        (self.folder / ".env").write_text(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def tried(place: Place) -> tuple[int, str]:
    """The first command of the README, in a terminal of 80 columns."""
    return place.in_a_terminal(TRY, 80)


@pytest.fixture
def set_up(place: Place, tried: object, grafx: Sandbox) -> Place:
    """With its own environment, and no orders."""
    place.type(COPY)
    given = grafx.settings("")
    place.fill_in({name: given[name] for name in poller.REQUIRED} | {"TOKEN_URL": grafx.token_url})
    for path in (*place.folder.glob(".database.json.*"), *(place.folder / "orders").iterdir()):
        path.unlink()
    (place.folder / "database.json").write_text('{"orders": {}, "failed": {}}')
    return place


def test_try_it_without_an_account(place: Place, tried: tuple[int, str]) -> None:
    code, shown = tried
    assert code == 0, shown
    (folder,) = re.findall(r"The files are in (\S+),", shown)
    assert len(list(Path(folder).iterdir())) == 8
    assert "Delivered: 8 of 8" in shown


def test_the_picture_is_what_the_first_command_shows(tried: tuple[int, str]) -> None:
    def alike(line: str) -> str:
        """What does not differ from run to run."""
        line = re.sub(r"\s+", "", line)
        line = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|^[0-9a-f]{8}(?=\d+%)", "ID", line)
        return re.sub(r"\d+", "0", line)

    shown = {alike(line) for line in re.split(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]", tried[1])}
    assert max(map(len, PICTURE.splitlines())) <= 80
    begins = r"\n(?=\d{4}-\d\d-\d\d |[0-9a-f]{8} )"  # other rows go on with what does not fit into one
    lines = re.split(begins, PICTURE.strip("\n"))
    assert not [line for line in lines if alike(line) not in shown]
    for what in (" delivered to ", r" failed \(project ", r" \d+% of "):
        assert re.search(what, PICTURE.replace("\n", "")), what


def test_the_two_commands_that_set_it_up_are_as_they_were() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install -r "
    assert [
        f"{setup}requirements.txt && .venv/bin/python tests/sandbox.py",
        f"{setup}tests/requirements.txt && .venv/bin/python -m pytest",
    ] == [TRY, TEST]


def test_the_second_command_is_what_runs_these_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (taken,) = re.findall(r"^test_command=\$\((.*)\)$", script, re.MULTILINE)
    found = subprocess.run(["sh", "-c", taken], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == TEST
    assert 'eval "$test_command"\n' in script


def test_with_your_own_environment(set_up: Place, grafx: Sandbox, tmp_path: Path) -> None:
    place = set_up
    place.type(SET_UP)
    assert (place.folder / ".env").stat().st_mode & 0o777 == 0o600
    assert [line[:5] for line in place.type(CHECK).splitlines()] == ["ok   "] * 5
    first, second, failed, late = grafx.add(), grafx.add(), grafx.add("expired"), grafx.add("never")
    place.type(ADD, TASK_ID=first, PROJECT_ID="a-project")
    log = tmp_path / "log"
    with place.typed(POLL, log) as process:
        eventually(lambda: f"{first} delivered to " in log.read_text())
    assert process.returncode == 0, log.read_text()
    place.type(ADD, TASK_ID=second, PROJECT_ID="a-project")
    place.type(ADD, TASK_ID=late, PROJECT_ID="a-project")
    assert "polled 2 orders: 1 delivered, 1 rendering\n" in place.type(ONCE)
    for task_id in (first, second):
        assert (place.folder / "orders" / f"{task_id}.png").read_bytes() == grafx.body(task_id)
    place.type(ADD, TASK_ID=failed, PROJECT_ID="a-project")
    assert "polled 2 orders: 1 rendering, 1 failed" in place.type(ONCE, code=1)
    assert "-v, --verbose" in place.type(f"{POLL} --help")
    place.fill_in({"POLL_INTERVAL": "often"})
    place.type(CHECK, code=78)


def test_a_grafx_to_play_with(place: Place, tried: object, tmp_path: Path) -> None:
    """Its lines are a .env; what it says of how to order is right."""
    with place.typed(SERVE, said := tmp_path / "said"):
        eventually(lambda: "db.py add TASK_ID" in said.read_text())
        given = dict(line.split("=", 1) for line in re.findall(r"^[A-Z_]+=.*", said.read_text(), re.M))
        (place.folder / ".env").write_text(said.read_text())
        (body,) = re.findall(r"-d '(.*?)'", said.read_text())
        (order,) = re.findall(r"curl -X POST (\S+)", said.read_text())

        def post(url: str, data: bytes, **headers: str) -> Any:
            request = Request(url, data, {"Content-Type": "application/json", **headers})
            with urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)

        token = post(given["TOKEN_URL"], body.encode())["access_token"]
        task_id = post(order, b"", Authorization=f"Bearer {token}")["data"]["taskId"]
        place.type(ADD, TASK_ID=task_id, PROJECT_ID="a-project")
        with place.typed(POLL, tmp_path / "log"):
            eventually((Path(given["ORDERS_DIR"]) / f"{task_id}.png").exists)


def test_how_orders_get_in(set_up: Place, grafx: Sandbox) -> None:
    place, task_id = set_up, grafx.add()
    state: Callable[[], Any] = lambda: read_state(place.folder / "database.json")  # noqa: E731
    assert f"{task_id} is pending now" in place.type(ADD, TASK_ID=task_id, PROJECT_ID="a-project")
    assert state()["orders"][task_id]["projectID"] == "a-project"
    place.type(ONCE)
    downloads = [request.what for request in grafx.requests].count("download")
    assert f"{task_id} was delivered at " in place.type(ADD, code=1, TASK_ID=task_id, PROJECT_ID="a-project")

    # What was delivered is only removed again, also where its file is gone; on purpose it is delivered again.
    file = place.folder / "orders" / f"{task_id}.png"
    file.unlink()
    (place.folder / "database.json").write_text(json.dumps({"orders": [task_id], "failed": {}}))
    assert "re-added although delivered; removed again" in place.type(ONCE)
    assert not state()["orders"]
    assert [request.what for request in grafx.requests].count("download") == downloads
    assert not file.exists()
    place.type(RETRY, TASK_ID=task_id)
    place.type(ONCE)
    assert file.read_bytes() == grafx.body(task_id)

    # Failed ones, by hand as the file has them.
    failed = {"old": ("2026-01-31T11:59:59Z", 500), "gone": ("2026-01-31T12:00:00Z", 410),
              "new": ("2026-01-31T12:00:00Z", 500)}  # fmt: skip

    def fail() -> None:
        records = {key: {"status": status, "failed": when} for key, (when, status) in failed.items()}
        (place.folder / "database.json").write_text(json.dumps({"orders": {}, "failed": records}))

    for command, back in ((RETRY, {"old"}), (RETRY_ALL, set(failed)), (RETRY_SOME, {"gone", "new"})):
        fail()
        listed = place.type(LIST)
        assert "3 failed" in listed
        assert "1 delivered in the last 24 hours" in listed
        place.type(command.replace("TASK_ID", "old"))
        assert state()["orders"].keys() == back
        assert state()["failed"].keys() == failed.keys() - back

    # From Python.
    (code,) = re.findall(r"`(import db; .*?)`", section("How orders get in"))
    code = code.replace("(task_id", '("from-python"').replace("project_id", '"a-project"')
    place.type(f".venv/bin/python -c {shlex.quote(code)}")
    assert state()["orders"]["from-python"]["projectID"] == "a-project"


def test_the_shapes_that_orders_may_have(tmp_path: Path) -> None:
    shapes = re.findall(r"`([{\[].*?[}\]])`", section("How orders get in"))
    assert len(shapes) == 4
    for shape in shapes:
        path = tmp_path / "database.json"
        path.write_text(f'{{"orders": {shape}, "failed": {{}}}}')
        assert db.get_orders(path) == {"TASK_ID": {"projectID": "ID"} if "ID" in shape[12:] else {}}


def test_each_use_of_on_done_is_run_by_its_own_tests() -> None:
    uses = [line.removeprefix("ON_DONE=").split()[0] for line in LINES if line.startswith("ON_DONE=")]
    known = set(re.findall(r'uses\("(\w+)"\)', (ROOT / "tests" / "test_on_done.py").read_text()))
    assert len(uses) == len(set(uses))
    assert set(uses) == known | {"install"}  # a parameter there, with sh


# --- what GraFx answers ----------------------------------------------------------------------

ANSWERS = {cells[1].partition(";")[0].split(":")[0].split(",")[0]: cells[0]
           for cells in rows(section("What GraFx answers, and what happens to the order"))}  # fmt: skip
PROBLEM = b'{"title": "A reason", "status": "500"}'


def said(status: int, reason: bool) -> str:
    """What the table says about an answer to a poll."""
    rejected, later = ANSWERS["is rejected"], ANSWERS["cannot be polled"]
    if status in (202, 204):
        assert str(status) in ANSWERS["renders"]
        return "renders"
    if status == 500:
        assert "500 with a reason" in rejected
        assert "500 without a reason" in later
        return "rejected" if reason else "retried"
    named = {text: set(map(int, re.findall(r"\b(\d{3})\b(?! with)", text))) for text in (rejected, later)}
    assert not named[later] & named[rejected]
    if status in named[later]:
        return "retried"
    if status in named[rejected]:
        return "rejected"
    if status // 100 == 4:
        assert "any other 4xx" in rejected
        return "rejected"
    assert "any other 5xx" in later
    assert "any other answer" in later
    return "retried"


def what_happens(grafx: chili.GraFx, task_id: str, folder: Path) -> str:
    try:
        return "delivered" if chili.order_done(task_id, grafx, folder) else "renders"
    except chili.TaskRejected as error:
        return "failed" if error.final else "rejected"
    except chili.TryAgainLater:
        return "retried"


def test_each_status_does_what_the_table_says(
    tmp_path: Path, wire: Callable[[Callable[[str, socket.socket], bytes]], Loopback]
) -> None:
    def answer(line: str, _: socket.socket) -> bytes:
        body, status = b'{"access_token": "x"}', "200"
        if "/tasks/" in line:
            status, words = line.split()[1].rpartition("/")[2].split("-")
            body = b"" if status == "304" else PROBLEM if words == "True" else b"<html>"
        return b"HTTP/1.1 %b X\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)

    url = wire(answer).url
    grafx = chili.GraFx(url, "env", f"{url}/oauth/token", "id", "secret")
    wrong = []
    for status in (201, 202, 203, 205, 206, 300, 304, *range(400, 600)):
        for reason in (True, False):
            grafx.pace = chili.Pace()  # else a 429 slows down all that follow
            came = what_happens(grafx, f"{status}-{reason}", tmp_path)
            wrong += [(status, reason, came)] * (came != said(status, reason))
    assert not wrong


@pytest.mark.parametrize(
    ("words", "what", "fault"),
    [
        ("a 200 without a link", "task", "no-link"),
        ("a file that is not what it says", "download", "wrong-type"),
        ("410 at the download", "download", "status-410"),
        ("an answer that is short", "download", "length-long"),
        ("another order's", "task", "other-task"),
        ("no network", "task", "reset"),
    ],
)
def test_what_the_table_says_in_words(
    grafx: Sandbox, tmp_path: Path, words: str, what: str, fault: str
) -> None:
    (row,) = (end for end, cell in ANSWERS.items() if words in cell)
    grafx.fault(what, fault, task_id=(task_id := grafx.add()))
    given = grafx.settings(tmp_path)
    one = chili.GraFx(given["BASEURL"], given["ENVIRONMENT"], given["TOKEN_URL"], given["SERVER_ID"],
                      given["SERVER_SECRET"])  # fmt: skip
    came = what_happens(one, task_id, tmp_path)
    assert came == {"is rejected": "rejected", "fails at once": "failed", "cannot be polled": "retried"}[row]


def test_the_table_knows_every_status_that_is_tried_as_a_fault() -> None:
    """What comes of each in the whole poller stands there, and is nothing else."""
    for label, fault, options, task, _, _ in FAULTS:
        if found := re.fullmatch(r"status-(\d+)", fault):
            body = options.get("body", PROBLEM)
            end = "rejected" if task.startswith("failed") else "retried"
            end = "renders" if found[1] in ("202", "204") else end
            assert said(int(found[1]), body.startswith(b"{")) == end, label


def test_the_numbers_in_its_words_are_those_of_the_code() -> None:
    text = section("What GraFx answers, and what happens to the order")
    assert (poller.SHORTEST_PAUSE, poller.REJECTIONS, chili.LONGEST_RETRY_AFTER) == (2, 3, 300)
    for words in ("2 s at least", "at least three times", "up to 5 minutes"):
        assert words in text
    (others,) = re.findall(r"TASK_ID\.png` \(([\w, ]+)\)", text)
    assert {"png", *others.split(", ")} == set(chili.FORMATS)
    assert f"newest {db.KEPT:,} deliveries" in " ".join(README.split())


# --- settings and figures --------------------------------------------------------------------


def test_the_settings_of_the_readme_the_example_and_the_code_are_the_same() -> None:
    code = {name: "required" if name in poller.REQUIRED else default for name, _, default in poller.READERS}
    code["SERVER_SECRET_FILE"] = ""
    readme = {
        name: default.strip("`")
        for names, default, _ in rows(section("Settings"))
        for name in re.findall(r"`(\w+)`", names)
    }
    assert readme == code
    example = (ROOT / ".env.example").read_text()
    lines = dict(re.findall(r"^(#?[A-Z_]+)=(.*)$", example, re.MULTILINE))
    # The four required ones are to be filled in, all others are comments that say the default.
    wanted = {name if value == "required" else f"#{name}": value for name, value in code.items()}
    wanted |= {"SERVER_ID": "", "SERVER_SECRET": "", "ENVIRONMENT": ""}
    wanted["BASEURL"] = "https://ENVIRONMENT.chili-publish.online"
    assert lines == wanted


@pytest.mark.parametrize("name", ["POLL_INTERVAL", "GIVE_UP_AFTER", "CONCURRENCY", "ON_DONE_TIMEOUT"])
def test_the_least_and_the_most_of_a_setting(name: str) -> None:
    (words,) = (cells[2] for cells in rows(section("Settings")) if cells[0] == f"`{name}`")
    (found,) = re.findall(r"from ([\d.]+) to (\d+)", words)
    read = next(reader for key, reader, _ in poller.READERS if key == name)
    with pytest.raises(ValueError, match=re.escape(f"number from {found[0]} to {found[1]}")):
        read("x")


def test_its_figures_are_what_the_long_runs_printed() -> None:
    (figures,) = re.findall(r"In figures: (.*?) \[", README, re.DOTALL)
    kills, orders, cpu, pending, memory = re.findall(r"\d[\d,.]*\d", figures)
    assert f"{kills.replace(',', '')} kills, seed 1: {orders.replace(',', '')} orders" in TESTS_README
    assert re.search(rf"^CPU per poll +{re.escape(cpu)} ms ", TESTS_README, re.MULTILINE)
    assert re.search(
        rf"^{pending} pending: peak memory +{re.escape(memory)} MiB ", TESTS_README, re.MULTILINE
    )


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 250
    for link in re.findall(r"\]\((?!https:)(.*?)\)", README):
        assert (ROOT / link).exists(), link


def test_tests_readme_has_a_row_for_each_file_of_tests() -> None:
    named = re.findall(r"^\| `(test_\w+\.py)` \|", TESTS_README, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


def test_the_commands_of_tests_readme_are_right() -> None:
    """Each finds its tests, or its program has the options."""
    commands = {line.strip() for line in re.findall(r"\.venv/bin/python ([^`#\n]*)", TESTS_README)}
    assert len(commands) > 5
    collecting = []
    for command in commands - {"-m pytest"}:  # which is what runs all this
        words = shlex.split(command)
        if words[:2] == ["-m", "pytest"]:
            again = [sys.executable, *words, "--collect-only", "-q", "-n", "0"]
            process = subprocess.Popen(again, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            collecting.append((command, process))
        else:
            text = (ROOT / words[0]).read_text()
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), command
    for command, process in collecting:
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 0, f"{command}\n{out.decode()}"
