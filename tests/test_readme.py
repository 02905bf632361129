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
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, Home, Loopback, eventually, find_program, made_by
from sandbox import Sandbox
from test_systemd import put_wheels

import chili
import db
import poller

README = (ROOT / "README.md").read_text()
TESTS_README = (ROOT / "tests" / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*)\n([\s\S]*?)(?=^## |\Z)", README, re.MULTILINE))
del SECTIONS["Run under systemd"]
HAPPENS = SECTIONS["What happens to an order"]
PICTURE = README.split("```\n")[1]
LINES = [  # of all blocks of code, and what is a command within the text
    (indented or inline).partition("  #")[0].rstrip()
    for text in SECTIONS.values()
    for indented, inline in re.findall(r"^    (\S.*)|`(\.venv/bin/python .*?)`", text, re.MULTILINE)
]
# In their order: a new one needs a test that runs it.
TRY, TEST, SET_UP, COPY, KEEP, CHECK, POLL, ONCE, SERVE, ADD, LIST, RETRY, RETRY_ALL, RETRY_SOME = (
    line for line in LINES if not line.startswith("ON_")
)
TERMINAL = "import os, pty, sys; os._exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
MAIL, CHAT = (line for line in LINES if line.startswith("ON_FAILED="))


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


# --- its commands ----------------------------------------------------------------------------


class Place:
    """A copy of the repository, in a folder of its own, where the README's commands are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tmp = folder / "app", folder / "tmp"
        self.tmp.mkdir()
        shutil.copytree(ROOT / "tests" / "samples", self.folder / "tests" / "samples")
        code = ("poller.py", "chili.py", "db.py", "tests/sandbox.py")
        for name in (*code, "requirements.txt", ".env.example"):
            shutil.copy(ROOT / name, self.folder / name)
        self.write({}, {})
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
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
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

    def fill_in(self, settings: dict[str, str]) -> None:
        """As a person does it: each setting on the line that the example has for it."""
        text = (self.folder / ".env").read_text()
        for name, value in settings.items():
            text, found = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert found == 1, f"{name} stands {found} times in .env.example"
        (self.folder / ".env").write_text(text)

    def state(self) -> Any:
        return json.loads((self.folder / "database.json").read_text())

    def write(self, orders: Any, failed: Any) -> None:
        (self.folder / "database.json").write_text(json.dumps({"orders": orders, "failed": failed}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def tried(place: Place) -> str:
    """What the first command of the README shows in a terminal of 80 columns."""
    words = (sys.executable, "-c", TERMINAL, "sh", "-c", f"stty cols 80; {TRY}")
    return place.type(shlex.join(words))


@pytest.fixture
def set_up(place: Place, tried: object, grafx: Sandbox) -> Place:
    """With its own environment, and no orders."""
    place.type(COPY)
    given = grafx.settings("")
    place.fill_in({name: given[name] for name in poller.REQUIRED} | {"TOKEN_URL": grafx.token_url})
    place.write({}, {})
    return place


def test_quick_start(tried: str) -> None:
    (folder,) = re.findall(r"The files are in (\S+),", tried)
    assert len(list(Path(folder).glob("[!.]*"))) == 8
    assert "Delivered: 8 of 8" in tried
    # The second one is what runs these tests.
    script = (ROOT / ".ci" / "run").read_text()
    (taken,) = re.findall(r"^test_command=\$\((.*)\)$", script, re.MULTILINE)
    found = subprocess.run(["sh", "-c", taken], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == TEST
    assert 'eval "$test_command"\n' in script


def test_the_picture_is_what_the_first_command_shows(tried: str) -> None:
    def alike(line: str) -> str:
        """What does not differ from run to run."""
        line = re.sub(r"\s+", "", line)
        line = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|^[0-9a-f]{8}(?=\d+%)", "ID", line)
        line = re.sub(r"\|[\w,]*(?=\|)", "", line)  # how many others there are just then
        return re.sub(r"\d+(\.\d+)?(kB/s|MB/s)?", "0", line)

    shown = {alike(line) for line in re.split(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]", tried)}
    assert max(map(len, PICTURE.splitlines())) <= 80
    begins = r"\n(?=\d{4}-\d\d-\d\d |[0-9a-f]{8} )"  # other rows go on with what does not fit into one
    lines = re.split(begins, PICTURE.strip("\n"))
    assert not [line for line in lines if alike(line) not in shown]
    for what in (" delivered to ", r" failed \(project ", r" \d+% of "):
        assert re.search(what, PICTURE.replace("\n", "")), what


def test_use_it_with_your_environment(set_up: Place, grafx: Sandbox, tmp_path: Path) -> None:
    place = set_up
    assert TRY.startswith(SET_UP)  # so it was run
    assert (place.folder / ".env").stat().st_mode & 0o777 == 0o600
    find_program("git", "git")
    place.type(f"git init -q && git add database.json && {KEEP}")  # test_surroundings.py shows what it keeps
    assert [line[:5] for line in place.type(CHECK).splitlines()] == ["ok   "] * 5
    task_id, log = grafx.add(), tmp_path / "log"
    place.type(ADD, TASK_ID=task_id, PROJECT_ID="a-project")
    with place.typed(POLL, log) as process:
        eventually(lambda: f"{task_id} delivered to " in log.read_text())
    assert process.returncode == 0, log.read_text()
    assert (place.folder / "orders" / f"{task_id}.png").read_bytes() == grafx.body(task_id)
    place.write(dict.fromkeys((grafx.add(), grafx.add("never"))), {})
    assert "polled 2 orders: 1 delivered, 1 rendering\n" in place.type(ONCE)
    place.write([grafx.add("expired")], {})
    assert "polled 1 order: 1 failed" in place.type(ONCE, code=1)
    place.fill_in({"POLL_INTERVAL": "often"})
    place.type(CHECK, code=78)


def test_the_local_grafx_alone(place: Place, tried: object, tmp_path: Path) -> None:
    """What it says is a .env, and, as comments, how to order."""
    find_program("curl", "curl")
    with place.typed(SERVE, said := tmp_path / "said"):
        eventually(lambda: "db.py add TASK_ID" in said.read_text())
        (place.folder / ".env").write_text(said.read_text())
        (order,) = re.findall(r"^# (TOKEN=[\s\S]*)^# Then", said.read_text(), re.MULTILINE)
        task_id = json.loads(place.type(order.replace("\n# ", "\n").replace("curl -X", "curl -s -X")))[
            "data"
        ]["taskId"]
        place.type(ADD, TASK_ID=task_id, PROJECT_ID="a-project")
        (folder,) = re.findall(r"^ORDERS_DIR=(.*)", said.read_text(), re.MULTILINE)
        with place.typed(POLL, tmp_path / "log"):
            eventually((Path(folder) / f"{task_id}.png").exists)


def test_add_orders(set_up: Place) -> None:
    place = set_up
    assert "a-task is pending now" in place.type(ADD, TASK_ID="a-task", PROJECT_ID="a-project")
    # From Python.
    (code,) = re.findall(r"`(import db; .*?)`", SECTIONS["Add orders"])
    code = code.replace("(task_id", '("from-python"').replace("project_id", '"a-project"')
    place.type(f".venv/bin/python -c {shlex.quote(code)}")
    for name in ("a-task", "from-python"):
        assert place.state()["orders"][name]["projectID"] == "a-project"
    # Failed ones, by hand as the file has them. (One that was delivered: test_delivered_once.py.)
    failed = {"old": "2026-01-31T11:59:59Z", "gone": "2026-01-31T12:00:00Z", "new": "2026-01-31T12:00:00Z"}
    for command, back in ((RETRY, {"old"}), (RETRY_ALL, set(failed)), (RETRY_SOME, {"gone", "new"})):
        place.write({}, {name: {"status": 500, "failed": when} for name, when in failed.items()})
        place.type(command.replace("TASK_ID", "old"))
        assert place.state()["orders"].keys() == back
        assert place.state()["failed"].keys() == failed.keys() - back
    assert re.findall(r"^(\d) (pending|rejected|failed)\b", place.type(LIST), re.MULTILINE) == [
        ("2", "pending"),
        ("0", "rejected"),
        ("1", "failed"),
    ]


def test_the_shapes_that_orders_may_have(tmp_path: Path) -> None:
    shapes = re.findall(r"`([{\[].*?[}\]])`", SECTIONS["Add orders"])
    assert len(shapes) == 4
    for shape in shapes:
        path = tmp_path / "database.json"
        path.write_text(f'{{"orders": {shape}, "failed": {{}}}}')
        assert db.get_orders(path) == {"TASK_ID": {"projectID": "ID"} if "ID" in shape[12:] else {}}


class Inbox(Loopback):
    """A server for mail (SMTP); `asked` is all that it was told."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.sendall(b"220 here\r\n")
        with request.makefile("rb") as lines:
            text = False
            for line in lines:
                self.asked.append(line.decode())
                begins = line == b"DATA\r\n"
                text = begins or (text and line != b".\r\n")
                request.sendall(b"354 go on\r\n" if begins else b"" if text else b"250 fine\r\n")


@pytest.fixture
def inbox() -> Iterator[Callable[..., Loopback]]:
    yield from made_by(Inbox)


@pytest.mark.parametrize("line", [MAIL, CHAT], ids=["mail", "chat"])
def test_each_use_of_on_failed(app: Path, home: Home, inbox: Callable[[], Loopback], line: str) -> None:
    for name in ("curl", "jq"):
        find_program(name, name)
    mail, task_id = inbox(), home.grafx.add("failed")
    home.grafx.fault("other", "status-200", body=b"")
    for where, here in (("smtp://mail.example.com", mail.url.replace("http:", "smtp:")),
                        ("https://chat.example.com", home.grafx.base_url)):  # fmt: skip
        line = line.replace(where, here)
    (app / ".env").write_text(f"{line}\n")
    rejected = {"status": 500, "error": "", "since": "2026-01-31T12:00:00Z", "times": 2}
    home.write({"orders": {task_id: {}}, "failing": {task_id: rejected}, "failed": {}})
    ended = subprocess.run([sys.executable, app / "poller.py", "--once"], env=home.environment(),
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    assert ended.returncode == 1
    assert "ON_FAILED" not in ended.stderr
    error = home.failed()[task_id]["error"]
    assert "'XXL'" in error  # with quotes in it
    if "smtp:" in line:
        assert f"Subject: order {task_id} failed\r\n\r\n{error}\r\n.\r\n" in "".join(mail.asked)
        assert "RCPT TO:<me@example.com>\r\n" in mail.asked
    else:
        (body,) = [request.body for request in home.grafx.requests if request.path.startswith("/hook")]
        assert json.loads(body) == {"text": f"{task_id} failed: {error}"}


# --- what GraFx sends ------------------------------------------------------------------------

OUTCOMES = {"renders": "is rendering", "delivered": "is downloaded", "rejected": "is rejected for its own",
            "unproven": "is rejected, perhaps", "failed": "fails at once", "retried": "is ret"}  # fmt: skip
SENT = {
    outcome: "; ".join(sent for sent, order in rows(HAPPENS) if order.startswith(begin))
    for outcome, begin in OUTCOMES.items()
}
BODIES = {
    "reason": b'{"title": "A reason"}',
    "asp": json.dumps({"title": chili.ASP_NET}).encode(),
    "page": b"<p>",
}


def said(status: int, reason: bool) -> str:
    """What the table says about an answer to a poll, with or without GraFx's reason."""
    named = {outcome: set(re.findall(r"\b\d{3}\b", sent)) for outcome, sent in SENT.items()}
    assert "any other 4xx" in SENT["unproven"]
    assert "any other 5xx or other status" in SENT["retried"]
    for outcome in ("renders", *["rejected"] * reason, "retried", "unproven"):
        if str(status) in named[outcome]:
            return outcome
    return "unproven" if status // 100 == 4 else "retried"


WORDS = {  # of the table, and faults of the sandbox for each
    "200": ("task no-link",),
    "a PNG without its end": ("download cut",),
    "a file of another type than it says": ("download wrong-type",),
    "a page or anything else in place of an answer": ("task html", "task other-json"),
    "or a file": ("download html", "download empty"),
    "410 at the download": ("download status-410",),
    "no answer": ("task reset",),
    "one that is incomplete": ("task length-long",),
    "another order's": ("task other-task",),
}


def test_what_grafx_sends_does_what_the_table_says(grafx: Sandbox, tmp_path: Path) -> None:
    given = grafx.settings(tmp_path)
    names = ("BASEURL", "ENVIRONMENT", "TOKEN_URL", "SERVER_ID", "SERVER_SECRET")
    poll = chili.GraFx(*(given[name] for name in names))

    def happens(fault: str, **options: bytes) -> str:
        grafx.fault(*fault.split(), times=None, task_id=(task_id := grafx.add()), **options)
        poll.pace = chili.Pace()  # else a 429 slows down all that follow
        try:
            return "delivered" if chili.order_done(task_id, poll, tmp_path) else "renders"
        except chili.TaskRejected as error:
            return "failed" if error.final else "rejected" if error.proven else "unproven"
        except chili.TryAgainLater:
            return "retried"

    for status in (201, 202, 203, 204, 206, 300, 304, *range(400, 432), 451, 499, *range(500, 506), 599):
        for words, body in BODIES.items():
            came = happens(f"task status-{status}", body=body)
            assert came == said(status, words == "reason"), (status, words)
    for words, faults in WORDS.items():
        (outcome,) = (outcome for outcome, sent in SENT.items() if words in sent)
        assert {fault: happens(fault) for fault in faults} == dict.fromkeys(faults, outcome)


def test_its_numbers_are_those_of_the_code() -> None:
    text = " ".join(README.split())
    for words in (
        f"at least {poller.SHORTEST_PAUSE:g} s",
        f"up to {poller.LONGEST_PAUSE / 60:g} minutes",
        f"up to {chili.LONGEST_RETRY_AFTER / 60:g} minutes",
        f"{poller.UNPROVEN} such rejections are needed",
        f"for another {poller.WITNESSED / 60:g} minutes first",
        f"no file for {poller.FORGOTTEN / 86400:g} days",
        f"After {poller.ALARM / 60:g} minutes it says so again, as an error",
        f"newest {db.KEPT:,}, one a line",
    ):
        assert words in text
    assert (poller.PROVEN, poller.MINUTE) == (3, 60)
    assert "not before its third rejection" in text
    assert "for a minute, the log says" in text
    (others,) = re.findall(r"TASK_ID\.png` \(or ([\w, ]+)\)", text)
    assert {"png", *others.split(", ")} == set(chili.FORMATS)


# --- settings, exit codes, messages, figures -------------------------------------------------


def test_the_settings_of_the_readme_the_example_and_the_code_are_the_same() -> None:
    code = {name: "required" if name in poller.REQUIRED else default for name, _, default in poller.READERS}
    code["SERVER_SECRET_FILE"] = ""
    table = rows(SECTIONS["Settings"])
    readme = {name: default.strip("`") for names, default, _ in table for name in re.findall(r"\w+", names)}
    assert readme == code
    example = (ROOT / ".env.example").read_text()
    lines = dict(re.findall(r"^(#?[A-Z_]+)=(.*)$", example, re.MULTILINE))
    # The four required ones are to be filled in, all others are comments that say the default.
    wanted = {name if value == "required" else f"#{name}": value for name, value in code.items()}
    wanted |= {"SERVER_ID": "", "SERVER_SECRET": "", "ENVIRONMENT": ""}
    wanted["BASEURL"] = "https://ENVIRONMENT.chili-publish.online"
    assert lines == wanted
    for name, _, words in table:
        if found := re.search(r"([\d.]+) to (\d+)", words):
            read = next(reader for key, reader, _ in poller.READERS if f"`{key}`" == name)
            with pytest.raises(ValueError, match=re.escape(f"number from {found[1]} to {found[2]}")):
                read("x")


def test_the_exit_codes(home: Home) -> None:
    """Those that no other test of this file has met."""
    codes = dict(re.findall(r"\b(\d+): ([^.]*)", SECTIONS["Exit codes"].replace("\n", " ")))
    assert codes.keys() == {"0", "1", str(poller.EX_SOFTWARE), str(poller.EX_CONFIG)}
    home.wait_for()
    running = home.start()
    running.says("0 pending")
    for words, ended in (
        ("something is wrong (`--check`)", home.run("--check", BASEURL="http://127.0.0.1:1")),
        ("credentials", home.run("--check", SERVER_SECRET="another")),
        ("another poller is running", home.run()),
    ):
        assert words in codes[str(ended.process.returncode)], ended.log()


def test_each_message_of_troubleshooting_is_one_of_the_code() -> None:
    code = "".join((ROOT / name).read_text() for name in ("poller.py", "chili.py", "db.py"))
    messages = [message.strip("`") for message, _, _ in rows(SECTIONS["Troubleshooting"])]
    assert [message for message in messages if message not in code] == []


def test_its_figures_are_what_the_long_runs_printed() -> None:
    (figures,) = re.findall(r"^Measured: (.*?) \[", README, re.DOTALL | re.MULTILINE)
    kills, orders, cpu, pending, memory = re.findall(r"\d[\d,.]*\d", figures.replace("kill -9", ""))
    assert f"{kills.replace(',', '')} kills, seed 1: {orders.replace(',', '')} orders" in TESTS_README
    assert re.search(rf"^CPU per poll +{re.escape(cpu)} ms ", TESTS_README, re.M)
    assert re.search(rf"^{pending} pending: peak memory +{re.escape(memory)} MiB ", TESTS_README, re.M)


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 130 and not line.startswith(("|", "    "))] == []
    assert not re.search(r"\([^()]*\(", re.sub(r"`[^`]*`|\]\(.*?\)", "", README.replace("\n", " ")))
    for link in re.findall(r"\]\((?!https:)(.*?)\)", README):
        assert (ROOT / link).exists(), link


def test_tests_readme_has_a_row_for_each_file_of_tests() -> None:
    named = re.findall(r"^\| `(test_\w+\.py)` \|", TESTS_README, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


def test_the_commands_of_tests_readme_are_right() -> None:
    """Each word of an expression is one of the file's tests, and each program has the options."""
    for command in re.findall(r"\.venv/bin/python ([^`#\n]*)", TESTS_README):
        words = shlex.split(command)
        (file,) = [word for word in words if word.endswith(".py")] or ["tests/conftest.py"]
        text = (ROOT / file).read_text()
        if words[0] == "-m":
            expression = words[words.index("-k") + 1] if "-k" in words else ""
            assert all(word in text for word in re.sub(r"\b(and|or|not)\b", "", expression).split())
        else:
            assert all(f'"{word}"' in text for word in words if word.startswith("--"))
