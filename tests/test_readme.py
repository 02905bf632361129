"""The README: each of its commands is run, its tables are what the code does, its picture is a real one.

The section "Run under systemd" is test_systemd.py's, and the ON_DONE lines are test_on_done.py's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Home, Loopback, Running, find_program
from sandbox import Sandbox
from test_systemd import put_wheels

import chili
import db
import poller

pytestmark = pytest.mark.xdist_group("readme")  # one set-up for all of them

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*)\n([\s\S]*?)(?=^## |\Z)", README, re.MULTILINE))
del SECTIONS["Run under systemd"]
PICTURE = README.split("```\n")[1]
LINES = [  # of all blocks of code, and what is a command within the text
    (indented or inline).partition("  #")[0].rstrip()
    for text in SECTIONS.values()
    for indented, inline in re.findall(r"^    (\S.*)|`(\.venv/bin/python .*?)`", text, re.MULTILINE)
]
# In their order: a new one needs a test that runs it. TEST is what .ci/run takes from the README.
TRY, TEST, SET_UP, COPY, KEEP, CHECK, POLL, ONCE, SERVE, ADD, LIST, RETRY, RETRY_ALL, RETRY_SOME = (
    line for line in LINES if not line.startswith("ON_")
)
MAIL, CHAT = (line for line in LINES if line.startswith("ON_FAILED="))
TERMINAL = "import os, pty, sys; os._exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def rows(section: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", SECTIONS[section], re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


class Place:
    """A copy of the repository, in a folder of its own, where the README's commands are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder / "app", folder / "app" / "database.json"
        self.pollers: list[Running] = []  # all that was typed
        shutil.copytree(ROOT / "tests", self.folder / "tests")
        for name in ("poller.py", "chili.py", "db.py", "requirements.txt", ".env.example"):
            shutil.copy(ROOT / name, self.folder / name)
        put_wheels(folder / "wheels")
        self.env = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        self.env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(folder)}
        self.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels"), "PYTHONUNBUFFERED": "1"}

    def start(self, command: str) -> Running:
        self.pollers.append(Running(self, ["sh", "-c", command], self.env))
        return self.pollers[-1]

    def type(self, command: str, code: int = 0) -> str:
        running = self.start(command)
        assert running.process.wait(300) == code, f"{command}:\n{running.log()}"
        return running.log()

    def write(self, orders: Any, failed: Any) -> None:
        self.database.write_text(json.dumps({"orders": orders, "failed": failed}))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The README's first command was typed there, in a terminal of 80 columns, and goes on meanwhile."""
    place = Place(tmp_path_factory.mktemp("readme"))
    first = place.start(shlex.join((sys.executable, "-c", TERMINAL, "sh", "-c", f"stty cols 80; {TRY}")))
    try:
        first.says("GraFx order poller", 300)
        yield place
    finally:
        first.process.wait(300)
        for running in place.pollers:
            running.stop(signal.SIGKILL)


@pytest.fixture
def place(shared: Place, grafx: Sandbox) -> Place:
    shared.type(COPY)
    given, text = grafx.settings(""), (shared.folder / ".env").read_text()
    for name in (*poller.REQUIRED, "TOKEN_URL"):  # each on the line that the example has for it
        text = re.sub(rf"^#?{name}=.*$", f"{name}={given[name]}", text, flags=re.MULTILINE)
    (shared.folder / ".env").write_text(text)
    shared.write({}, {})
    return shared


def test_use_it_with_your_environment(place: Place, grafx: Sandbox) -> None:
    assert TRY.startswith(SET_UP)  # so it was run
    assert (place.folder / ".env").stat().st_mode & 0o777 == 0o600
    find_program("git", "git")
    place.type(f"git init -q && git add database.json && {KEEP}")  # test_surroundings.py shows what it keeps
    assert [line[:5] for line in place.type(CHECK).splitlines()] == ["ok   "] * 5
    place.type(ADD.replace("TASK_ID", task_id := grafx.add()))
    running = place.start(f"exec {POLL}")
    running.says(f"{task_id} delivered to ")
    place.type(POLL, code=1)  # another poller is running
    assert running.stop(signal.SIGINT) == 0
    assert (place.folder / "orders" / f"{task_id}.png").read_bytes() == grafx.body(task_id)
    place.write([grafx.add(), grafx.add("never")], {})
    assert "polled 2 orders: 1 delivered, 1 rendering\n" in place.type(ONCE)
    place.write([grafx.add("expired")], {})
    assert "polled 1 order: 1 failed" in place.type(ONCE, code=1)
    place.type(f"BASEURL=http://127.0.0.1:1 {CHECK}", code=1)


def test_the_local_grafx_alone(place: Place) -> None:
    """What it says is a .env, and, as comments, how to order."""
    find_program("curl", "curl")
    serving = place.start(f"exec {SERVE}")
    order = serving.says(r"\n# (TOKEN=[\s\S]*)\n# Then .* db.py add TASK_ID")[1]
    (place.folder / ".env").write_text(serving.log())
    answer = place.type(order.replace("\n# ", "\n").replace("curl -X", "curl -s -X"))
    task_id = json.loads(answer)["data"]["taskId"]
    place.type(ADD.replace("TASK_ID", task_id))
    running = place.start(f"exec {POLL}")
    running.says(f"{task_id} delivered to ")
    assert running.stop(signal.SIGINT) == 0
    serving.stop(signal.SIGINT)


def test_add_orders(place: Place) -> None:
    failed = {"TASK_ID": {"failed": "2026-01-31T11:59:59Z"}, "new": {"failed": "2026-01-31T12:00:00Z"}}
    (code,) = re.findall(r"`(import db; .*?)`", SECTIONS["Add orders"])
    call = f".venv/bin/python -c 'task_id = project_id = \"mine\"; {code}'"
    # One that was delivered: test_delivered_once.py.
    wanted = {ADD: "TASK_ID", call: "mine", RETRY: "TASK_ID", RETRY_ALL: "TASK_ID new", RETRY_SOME: "new"}
    for command, orders in wanted.items():
        place.write({}, {} if command == ADD else failed)
        place.type(command)
        assert " ".join(db.get_orders(place.database)) == orders, command
    counts = re.findall(r"^\d (?:pending|rejected|failed)\b", place.type(LIST), re.MULTILINE)
    assert counts == ["1 pending", "0 rejected", "1 failed"]


class Inbox(Loopback):
    """A server for mail (SMTP); `asked` is all that it was told."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.sendall(b"220 here\r\n")
        with request.makefile("rb") as lines:
            for line in lines:
                self.asked.append(line.decode())
                if line == b"DATA\r\n":
                    request.sendall(b"354 go on\r\n")
                    self.asked.extend(text.decode() for text in iter(lines.readline, b".\r\n"))
                request.sendall(b"250 fine\r\n")


@pytest.mark.parametrize("line", [MAIL, CHAT], ids=["mail", "chat"])
def test_each_use_of_on_failed(home: Home, line: str) -> None:
    for name in ("curl", "jq"):
        find_program(name, name)
    task_id = home.grafx.add("failed")
    home.grafx.fault("other", "status-200", body=b"")
    settings = home.folder / "settings"
    rejected = {task_id: {"since": "2026-01-31T12:00:00Z", "times": 2}}
    home.write({"orders": [task_id], "failing": rejected})
    with Inbox() as mail:
        line = line.replace("smtp://mail.example.com", mail.url.replace("http:", "smtp:"))
        settings.write_text(line.replace("https://chat.example.com", home.grafx.base_url))
        home.run("--once", GRAFX_ENV_FILE=str(settings))
    error = home.failed()[task_id]["error"]
    assert "'XXL'" in error  # with quotes in it
    if "smtp:" in line:
        assert f"Subject: order {task_id} failed\r\n\r\n{error}\r\n" in "".join(mail.asked)
    else:
        (body,) = [request.body for request in home.grafx.requests if request.path.startswith("/hook")]
        assert json.loads(body) == {"text": f"{task_id} failed: {error}"}


def test_what_grafx_sends_does_what_the_table_says(grafx: Sandbox, tmp_path: Path) -> None:
    credentials = grafx.token_url, grafx.client_id, grafx.client_secret
    poll = chili.GraFx(grafx.base_url, grafx.environment, *credentials)

    def happens(fault: str, **options: bytes) -> str:
        grafx.fault(*fault.split(), times=None, task_id=(task_id := grafx.add()), **options)
        poll.pace = chili.Pace()  # else a 429 slows down all that follow
        try:
            return "delivered" if chili.order_done(task_id, poll, tmp_path) else "renders"
        except chili.TaskRejected as error:
            return "failed" if error.final else "rejected" if error.own_reason else "perhaps"
        except chili.TryAgainLater:
            return "retried"

    sent = [sent for sent, _ in rows("What happens to an order")]
    renders, _, reason, _, _, again, _ = (re.findall(r"\b\d{3}\b", words) for words in sent)
    for status in (201, 202, 203, 204, 206, 300, 304, *range(400, 432), 451, 499, *range(500, 506), 599):
        for body in (b'{"title": "A reason"}', b'{"title": "Internal Server Error"}', b"<p>"):
            wanted = "perhaps" if status // 100 == 4 and str(status) not in again else "retried"
            wanted = "rejected" if str(status) in reason and b"A reason" in body else wanted
            wanted = "renders" if str(status) in renders else wanted
            assert happens(f"task status-{status}", body=body) == wanted, (status, body)
    outcomes = ("renders", "delivered", "rejected", "perhaps", "failed", "retried", "rejected")
    for words, faults in {
        "200": ["task no-link"],
        "a PNG without its end": ["download cut"],
        "a file of another type than it says": ["download wrong-type"],
        "a page or anything else in place of an answer": ["task html", "task other-json"],
        "or a file": ["download html", "download empty"],
        "410 at the download": ["download status-410"],
        "no answer": ["task reset"],
        "one that is incomplete": ["task length-long"],
        "about another order": ["task other-task"],
    }.items():
        (wanted,) = (outcome for row, outcome in zip(sent, outcomes, strict=True) if words in row)
        assert {fault: happens(fault) for fault in faults} == dict.fromkeys(faults, wanted)


def test_its_numbers_are_those_of_the_code() -> None:
    text = " ".join(README.split())
    for words in (
        f"at least {poller.SHORTEST_PAUSE:g} s",
        f"up to {poller.LONGEST_PAUSE / 60:g} minutes",
        f"up to {chili.LONGEST_RETRY_AFTER / 60:g} minutes",
        f"{poller.PERHAPS_LIKE_ALL} such rejections are needed",
        f"for another {poller.WITNESSED / 60:g} minutes first",
        f"not before its {('first', 'second', 'third')[poller.OWN_REASON - 1]} rejection",
        f"no file for {poller.FORGOTTEN / 86400:g} days",
        f"After {poller.ALARM / 60:g} minutes it says so again, as an error",
        f"newest {db.KEPT:,}, one a line",
        f"{os.EX_SOFTWARE}: a bug, please report it. {os.EX_CONFIG}: wrong settings or credentials.",
    ):
        assert words in text
    (others,) = re.findall(r"TASK_ID\.png` \(or ([\w, ]+)\)", text)
    assert {"png", *others.split(", ")} == set(chili.FORMATS)


def test_the_settings_of_the_readme_the_example_and_the_code_are_the_same() -> None:
    code = {name: "required" if name in poller.REQUIRED else default for name, _, default in poller.READERS}
    code["SERVER_SECRET_FILE"] = ""
    table = rows("Settings")
    readme = {name: default.strip("`") for names, default, _ in table for name in re.findall(r"\w+", names)}
    assert readme == code
    lines = dict(re.findall(r"^(#?[A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    # The four required ones are to be filled in, all others are comments that say the default.
    wanted = {name if value == "required" else f"#{name}": value for name, value in code.items()}
    wanted |= {"SERVER_ID": "", "SERVER_SECRET": "", "ENVIRONMENT": ""}
    assert lines == wanted | {"BASEURL": "https://ENVIRONMENT.chili-publish.online"}


def test_each_message_of_troubleshooting_is_one_of_the_code() -> None:
    code = "".join((ROOT / name).read_text() for name in ("poller.py", "chili.py", "db.py"))
    messages = [message.strip("`") for message, _, _ in rows("Troubleshooting")]
    assert [message for message in messages if message not in code] == []


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https:)(.*?)\)", README):
        assert (ROOT / link).exists(), link


def test_tests_readme_has_a_row_for_each_file_of_tests() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "tests" / "README.md").read_text(), re.MULTILINE)
    named = [name for cell in table for name in re.findall(r"`(test_\w+\.py)`", cell)]
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


def test_the_first_command_delivers_and_shows_what_the_picture_shows(shared: Place) -> None:
    assert shared.pollers[0].process.wait(300) == 0
    tried = shared.pollers[0].log()
    assert "Delivered: 8 of 8" in tried
    lines = re.split(r"\n(?=\d{4}-|[0-9a-f]{8} )", PICTURE)  # others go on with what does not fit into one
    time, guid = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", r"[0-9a-f]{8}-[0-9a-f-]{27}"
    patterns = (
        rf"{time} INFO    {guid} delivered to orders/{guid}\.png \([\d.]+ kB, [\d.]+ s after it was added\)",
        rf"{time} ERROR   {guid} failed \(project {guid}\): Invalid list .* has no item 'XXL'\.",
        r"[0-9a-f]{8} \d+% of 2\.0 MB, [\d.]+ kB/s \| [\w, ]+ \| last delivery [\d:]{8}",
    )
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line.replace("\n", "")), line
        assert re.search(pattern, tried), pattern
