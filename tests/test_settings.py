"""Settings, the options of poller.py, and what happens before the loop."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, Home, eventually
from sandbox import Sandbox

import db
import poller

GOOD = {
    "SERVER_ID": "id",
    "SERVER_SECRET": "secret",
    "BASEURL": "https://cp-abc-123.chili-publish.online",
    "ENVIRONMENT": "cp-abc-123",
}
ADDRESSES = (
    "http://cp-abc-123.chili-publish.online",
    "http://127.0.0.1.example.com",
    "http://loopback:8080",
    "ftp://127.0.0.1",
    "cp-abc-123.chili-publish.online",
    "https://",
    "https://[::1",
    "https://host:port",
    "https://me:password@host",
    "https://.example.com",
    "https://a b.example.com",
    "https://a.b/#/projects",
)
WRONG = dict.fromkeys(GOOD, ("",)) | {
    "BASEURL": ("", *ADDRESSES),
    "TOKEN_URL": ADDRESSES,
    "POLL_INTERVAL": ("often", "0", "-1", "nan", "inf", "3601"),
    "CONCURRENCY": ("many", "0", "1.5", "65"),
}


def load(monkeypatch: pytest.MonkeyPatch, **env: str) -> poller.Settings:
    for name, value in {**GOOD, **env}.items():
        monkeypatch.setenv(name, value)
    return poller.load_settings()


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(poller.SettingsError) as raised:
            load(monkeypatch, **{name: value})
        (line,) = str(raised.value).splitlines()
        assert line.startswith(name)
        assert "password" not in line


def test_loopback_needs_no_https(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1:8080", "127.9.9.9", "localhost:1", "[::1]:8080"):
        settings = load(monkeypatch, BASEURL=f"http://{host}/", TOKEN_URL=f"http://{host}/oauth/token")
        assert (settings.baseurl, settings.token_url) == (f"http://{host}", f"http://{host}/oauth/token")


def test_all_that_is_wrong_is_said_at_once(home: Home) -> None:
    wrong = {"SERVER_ID": "", "BASEURL": "http://example.com", "POLL_INTERVAL": "often", "CONCURRENCY": "0"}
    ended = home.run("--check", **wrong)
    assert ended.process.returncode == 78
    assert re.findall(r"WRONG settings: (\w+) ", ended.log()) == [*wrong]
    assert home.grafx.requests == []


def run(app: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A program of `app`, with no settings but these and .env, from somewhere else."""
    env = {"PATH": os.environ["PATH"], **env}
    (app.parent / "elsewhere").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(app / command[0]), *command[1:]],
        env=env, cwd=app.parent / "elsewhere", capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_workshop_env_file_and_database_work_unchanged(app: Path, grafx: Sandbox) -> None:
    grafx.client_secret = "pa$$word-${HOME}-$PATH"
    done, pending, other_done = grafx.add("png"), grafx.add("never"), grafx.add("pdf")
    (app / ".env").write_text(
        f"FRONT_ID=abc\nFRONT_SECRET=def\nSERVER_ID={grafx.client_id}\nSERVER_SECRET={grafx.client_secret}\n"
        f"BASEURL=https://127.0.0.1:1\nENVIRONMENT={grafx.environment}\nTOKEN_URL={grafx.token_url}\n",
        encoding="utf-8-sig",
    )
    entries = [[task, {"taskID": task, "projectID": "p1"}] for task in (done, pending)]
    workshop = {
        "tokens": {"integration": None},
        "storeTemplates": [],
        "users": {"dataType": "Map", "value": [["me", {"age": 1.5}]]},
        "orders": {"dataType": "Map", "value": entries},
    }
    (app / "database.json").write_text(json.dumps(workshop, indent=4))
    (app / "orders").mkdir()

    ended = run(app, "poller.py", "--once", BASEURL=grafx.base_url)  # the environment wins

    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert "WARNING" not in ended.stderr  # of FRONT_ID and FRONT_SECRET either
    assert sorted(path.name for path in (app / "orders").iterdir()) == [".poller.pid", f"{done}.png"]
    del entries[0]
    text = (app / "database.json").read_text()
    assert json.loads(text) == workshop
    # As Node writes it, but for the orders: each has a line of its own.
    assert f"\n            {json.dumps(entries[0])}\n" in text
    assert text.splitlines()[:5] == json.dumps(workshop, indent=4).splitlines()[:5]

    # Relative paths begin beside poller.py, wherever it is started; db.py finds the same file.
    (app / "sub").mkdir()
    other = {"BASEURL": grafx.base_url, "DATABASE": "sub/queue.json", "ORDERS_DIR": "sub/files"}
    assert run(app, "db.py", "add", other_done, **other).returncode == 0
    ended = run(app, "poller.py", "--once", **other)
    assert ended.returncode == 0, ended.stderr
    assert (app / "sub" / "files" / f"{other_done}.pdf").read_bytes() == grafx.body(other_done)
    assert db.get_orders(app / "sub" / "queue.json") == {}


# --- .env ------------------------------------------------------------------------------------


def test_where_nothing_is_set_one_line_says_how_to_begin(app: Path) -> None:
    said = run(app, "poller.py")
    assert said.returncode == 78
    assert said.stderr.count("\n") == 1
    assert said.stderr.endswith(f"in {app}, cp .env.example .env, and fill in its four lines\n")
    (app / ".env").mkdir()  # as some call their virtual environment
    assert re.search("^.* ERROR +SERVER_ID is missing", run(app, "poller.py").stderr)


def test_a_missing_setting_is_named_with_its_place(app: Path) -> None:
    """An empty variable counts as none, also over .env."""
    (app / ".env").write_text("DATABASE=mine.json\nPOLL_INTERVAL=often\nSERVER_ID=a\n")
    assert run(app, "db.py", "add", "new", DATABASE="").stdout == f"new is pending now, in {app}/mine.json\n"
    said = run(app, "poller.py", "--check", SERVER_ID="", POLL_INTERVAL="")
    assert said.returncode == 78
    assert "SERVER_ID" not in said.stdout
    assert "POLL_INTERVAL is 'often'" in said.stdout
    place = f"{app}/.env or the environment"
    assert f"BASEURL is missing: put https://ENVIRONMENT.chili-publish.online into {place}\n" in said.stdout


def test_an_env_file_that_is_no_text_is_said(app: Path) -> None:
    (app / ".env").write_bytes(b"SERVER_ID=\xff\xfe")
    ended = run(app, "poller.py", "--once")
    assert ended.returncode == 78
    assert re.search(rf"ERROR +cannot read {app}/\.env: .* Save it as UTF-8\.\n$", ended.stderr)
    assert "Traceback" not in ended.stderr


# Five good lines, so the next one is the sixth.
COMPLETE = (
    "SERVER_ID=a\nSERVER_SECRET=hush-hush\nBASEURL=https://127.0.0.1:1\nENVIRONMENT=c\n"
    "TOKEN_URL=http://127.0.0.1:1/oauth/token\n"
)


@pytest.mark.parametrize(
    ("lines", "number", "name"),
    [
        ('ON_DONE="/bin/sh" -c \'cp "$1" /hush-hush/\' sh {}', 6, "ON_DONE"),
        ("ON_DONE:/hush-hush", 6, "ON_DONE"),
        ("export DATABASE='/hush-hush' or so", 6, "DATABASE"),
        # Another program's open quote, up to the next one.
        ('GREETING="hello\nPOLL_INTERVAL=5\nFRONT_SECRET="hush-hush"', 7, "POLL_INTERVAL"),
    ],
)
def test_a_setting_in_env_that_cannot_be_parsed_is_an_error(
    app: Path, lines: str, number: int, name: str
) -> None:
    """Without its ON_DONE or DATABASE an order would be delivered to nobody. No value is printed."""
    (app / ".env").write_text(f"{COMPLETE}{lines}\nPORT='80'\n")
    (app / "store.py").write_text("import db; db.get_orders()")
    how = f"Write {name}=VALUE, with quotes around all of VALUE or without."
    error = f"{app}/.env, line {number}: {name} cannot be parsed. {how}\n"
    for command in (["poller.py", "--once"], ["db.py", "list"], ["store.py"]):
        said = run(app, *command)
        wrong = command[0] == "poller.py" or name == "DATABASE"
        assert said.returncode == ((78 if command[0] == "poller.py" else 1) if wrong else 0)
        assert said.stderr.endswith(error) if wrong else not said.stderr
        assert "hush-hush" not in said.stdout + said.stderr
    assert not (app / "database.json").exists()


def test_a_line_of_env_that_may_be_meant_for_the_poller_is_a_warning(app: Path) -> None:
    lines = {
        'GREETING="hush-hush" to all': "cannot be parsed, and has no effect",
        "DATABASE_URL: hush-hush or so": "cannot be parsed, and has no effect",
        "ONDONE=hush-hush": "ONDONE is no setting, and has no effect: is it ON_DONE?",
        "concurrency=9": "concurrency is no setting, and has no effect: is it CONCURRENCY?",
        "POLL_INTERVALL=9": "",  # since POLL_INTERVAL is set
        "POLL_INTERVAL=5": "",
        "SECRET=hush-hush": "",
    }
    (app / ".env").write_text("\n".join((COMPLETE, *lines)))
    ended = run(app, "poller.py", "--check")
    assert ended.stdout.startswith("ok    settings: ")
    said = [
        f"WARNING {app}/.env, line {number}: {text}" for number, text in enumerate(lines.values(), 7) if text
    ]
    assert [line[20:] for line in ended.stderr.splitlines()] == said
    assert "hush-hush" not in ended.stdout + ended.stderr


def test_a_path_has_to_be_whole(app: Path) -> None:
    """The home of who writes the settings is not the service's."""
    secret = {name: value for name, value in GOOD.items() if name != "SERVER_SECRET"}
    wrong = "is ~/here: write the whole path, without ~\n"
    for given, names in (
        (GOOD | {"DATABASE": "~/here", "ORDERS_DIR": "~/here"}, ["DATABASE", "ORDERS_DIR"]),
        (secret | {"SERVER_SECRET_FILE": "~/here"}, ["SERVER_SECRET_FILE:"]),
    ):
        ended = run(app, "poller.py", "--check", **given)
        assert ended.returncode == 78
        assert re.findall(rf"WRONG settings: (\S+) {wrong}", ended.stdout) == names
    ended = run(app, "db.py", "add", "new", DATABASE="~/here")
    assert (ended.returncode, ended.stderr) == (1, f"db.py: DATABASE {wrong}")
    assert not list(app.parent.rglob("~*"))


# --- the start -------------------------------------------------------------------------------


def test_help_is_complete(app: Path) -> None:
    ended = run(app, "poller.py", "--help")  # without any setting
    assert ended.returncode == 0
    for word in ("--once", "--check", "-v", "78", ".env", "database.json", "README"):
        assert word in ended.stdout
    ended = run(app, "db.py", "--help")
    assert ended.returncode == 0
    assert all(word in ended.stdout for word in ("add", "list", "retry"))


def test_rejected_credentials_end_it_at_the_start(home: Home) -> None:
    home.grafx.refuse_credentials = True
    home.wait_for(home.grafx.add())
    ended = home.run()
    assert ended.process.returncode == 78
    assert ended.log().count("rejects SERVER_ID and SERVER_SECRET") == ended.log().count("ERROR") == 1
    assert {request.what for request in home.grafx.requests} == {"token"}
    assert len(home.waiting()) == 1


def test_a_folder_may_have_any_name(home: Home) -> None:
    """Here no UTF-8; --check and the note for db.py list say what is wrong in it."""
    odd = os.fsdecode(os.fsencode(home.folder) + b"/\xff")
    Path(odd).mkdir()
    home.database = Path(odd, "database.json")
    home.env |= {"DATABASE": str(home.database)}
    home.database.write_text('{"orders": ')
    checked = home.run("--check", before="db.PATIENCE = 0", LANG="C.UTF-8")
    assert re.search(r"WRONG database: .*/\\udcff/database.json: line 1", checked.log())
    daemon = home.start(before=QUICK)
    daemon.says("line 1, column 12")
    eventually(lambda: "line 1, column 12" in home.database.with_name(".database.json.pid").read_text())
    home.wait_for(home.grafx.add())
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0


def test_a_folder_of_the_database_that_is_missing_is_to_be_made(home: Home) -> None:
    ended = home.run("--once", DATABASE=str(home.folder / "none" / "here"))
    assert ended.process.returncode == 1
    assert re.search(r"WARNING .*: No such file or directory\. Make the folder\.", ended.log())


# --- --check and --once ----------------------------------------------------------------------

STEPS = ("settings:", "database:", "folder:", "token:", "GraFx:")


def test_check_says_that_all_is_fine_also_while_a_daemon_runs(home: Home) -> None:
    home.wait_for(task := home.grafx.add("never"))
    home.database.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(home.database, 7, 8)
    daemon = home.start()
    daemon.says("1 pending")
    data, before = home.read(), home.database.stat()
    ended = home.run("--check")
    assert ended.process.returncode == 0
    assert [line.split()[:2] for line in ended.log().splitlines()] == [["ok", step] for step in STEPS]
    assert "1 pending, 0 rejected, 0 failed" in ended.log()
    assert f"answers about {task}\n" in ended.log()
    after = home.database.stat()
    assert after.st_ino != before.st_ino  # it was really written
    assert [after.st_uid, after.st_gid, after.st_mode] == [before.st_uid, before.st_gid, before.st_mode]
    assert home.read() == data
    assert home.files() == []
    assert daemon.stop() == 0


@pytest.mark.parametrize(("fine", "code"), [(STEPS[:1], 78), (STEPS[:1] + STEPS[3:], 1)])
def test_check_says_what_is_not_fine(home: Home, fine: tuple[str, ...], code: int) -> None:
    home.grafx.refuse_credentials = "token:" not in fine
    home.write('{"orders": {\n  "a" 1}}')
    shutil.rmtree(home.orders)
    home.orders.write_text("")
    ended = home.run("--check", before="db.PATIENCE = 0")
    assert ended.process.returncode == code
    words = [["ok" if step in fine else "WRONG", step] for step in STEPS]
    assert [line.split()[:2] for line in ended.log().splitlines()] == words
    assert "line 2, column 7" in ended.log()


def test_check_of_what_is_not_there_yet_waits_for_no_editor(home: Home) -> None:
    """Nor does what it leaves, a lock, show that there was a database."""
    for _ in range(2):
        ended = home.run("--check", before="db.SAVING = 600")
        assert ended.process.returncode == 0
        assert "database.json: 0 pending, 0 rejected, 0 failed" in ended.log()
        assert not home.database.exists()


def test_once_polls_each_order_once(home: Home) -> None:
    done, pending = home.grafx.add(), home.grafx.add("never")
    home.wait_for(done, pending)
    assert home.run("--once").process.returncode == 0
    assert list(home.waiting()) == [pending]
    assert [request.task_id for request in home.grafx.requests if request.what == "task"].count(pending) == 1
    assert home.run("--once").process.returncode == 0  # nothing new, and nothing wrong


def test_once_does_not_wait_where_it_is_to_come_later(home: Home) -> None:
    task = home.grafx.add()
    home.grafx.fault("task", "status-503", times=None, retry_after=200)
    home.wait_for(task)
    assert home.run("--once").process.returncode == 1
    assert list(home.waiting()) == [task]
    assert home.failed() == {}
