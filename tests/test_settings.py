"""Settings, the options of poller.py, and what happens before the loop."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, Home
from sandbox import Sandbox

import db
import poller

GOOD = {"SERVER_ID": "a", "SERVER_SECRET": "b", "BASEURL": "https://c.example", "ENVIRONMENT": "d"}
ADDRESSES = (
    "http://127.0.0.1.example.com",
    "ftp://127.0.0.1",
    "cp-abc-123.chili-publish.online",
    "https://me:password@host",
    "https://a.b/#/projects",
)
WRONG = dict.fromkeys(GOOD, ("",)) | {
    "BASEURL": ("", *ADDRESSES),
    "TOKEN_URL": ADDRESSES,
    "POLL_INTERVAL": ("often", "0", "nan", "3601"),
    "CONCURRENCY": ("many", "0", "1.5", "65"),
    "DATABASE": ("~/here",),  # the home of who writes the settings is not the service's
    "ORDERS_DIR": ("~/here",),
    "SERVER_SECRET_FILE": ("beside-the-secret-itself",),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for one, good in (GOOD | {"GRAFX_ENV_FILE": os.devnull}).items():
        monkeypatch.setenv(one, good)
    for value in WRONG[name]:
        monkeypatch.setenv(name, value)
        with pytest.raises(poller.SettingsError) as raised:
            poller.load_settings()
        (line,) = str(raised.value).splitlines()
        assert re.match(rf"{name}\b", line)
        assert "password" not in line


def run(app: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A program of `app`, with no settings but these and .env, from somewhere else."""
    return subprocess.run(
        [sys.executable, str(app / command[0]), *command[1:]],
        env={"PATH": os.environ["PATH"], **env}, cwd="/", capture_output=True, text=True, timeout=60,
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
        "users": {"dataType": "Map", "value": [["me", {"age": 1.5}]]},
        "orders": {"dataType": "Map", "value": entries},
    }
    (app / "database.json").write_text(json.dumps(workshop, indent=4))

    ended = run(app, "poller.py", "--once", BASEURL=grafx.base_url)  # the environment wins
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert "WARNING" not in ended.stderr  # of FRONT_ID and FRONT_SECRET either
    assert (app / "orders" / f"{done}.png").read_bytes() == grafx.body(done)
    del entries[0]
    assert json.loads((app / "database.json").read_text()) == workshop

    # Relative paths begin beside poller.py, wherever it is started; db.py finds the same file.
    (app / "sub").mkdir()
    other = {"BASEURL": grafx.base_url, "DATABASE": "sub/queue.json", "ORDERS_DIR": "sub/files"}
    assert run(app, "db.py", "add", other_done, **other).returncode == 0
    assert run(app, "poller.py", "--once", **other).returncode == 0
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


def test_all_that_is_wrong_or_missing_is_said_at_once(app: Path) -> None:
    """An empty variable counts as none, also over .env."""
    (app / ".env").write_text("DATABASE=mine.json\nPOLL_INTERVAL=often\nSERVER_ID=a\nSERVER_SECRET=b\n")
    assert run(app, "db.py", "add", "new", DATABASE="").stdout == f"new is pending now, in {app}/mine.json\n"
    said = run(app, "poller.py", "--check", SERVER_ID="", POLL_INTERVAL="")
    assert said.returncode == 78
    assert re.findall(r"WRONG settings: (\w+ is \S+)", said.stdout) == [
        "BASEURL is missing:",
        "ENVIRONMENT is missing:",
        "POLL_INTERVAL is 'often':",
    ]
    (app / ".env.two").write_text("DATABASE=two.json")
    new = run(app, "db.py", "add", "new", GRAFX_ENV_FILE=".env.two")
    assert new.stdout == f"new is pending now, in {app}/two.json\n"
    place = f"{app}/.env or the environment"
    assert f"BASEURL is missing: put https://ENVIRONMENT.chili-publish.online into {place}\n" in said.stdout


def test_a_secret_in_place_of_its_file_is_not_printed(app: Path) -> None:
    for secret, why in (("hush-hush", "No such file or directory"), ("/", "Is a directory")):
        said = run(app, "poller.py", "--check", SERVER_SECRET_FILE=secret)
        assert said.returncode == 78
        how = "It must be the path of a readable file with the secret."
        assert said.stdout == f"WRONG settings: SERVER_SECRET_FILE cannot be read: {why}. {how}\n"
        assert "hush-hush" not in said.stderr


# Five good lines, so the next one is the sixth.
COMPLETE = (
    "SERVER_ID=a\nSERVER_SECRET=hush-hush\nBASEURL=https://127.0.0.1:1\nENVIRONMENT=c\n"
    "TOKEN_URL=http://127.0.0.1:1/oauth/token\n"
)


def test_a_setting_in_env_that_cannot_be_read_is_an_error(app: Path) -> None:
    """Without its ON_DONE or DATABASE an order would be delivered to nobody. No value is printed."""
    for lines, wrong in (
        (b'ON_DONE="/bin/sh" -c \'cp "$1" /hush-hush/\' sh {}', ", line 6: ON_DONE cannot be parsed. "),
        # Another program's open quote, up to the next one.
        (b'A="hush-hush\nPOLL_INTERVAL=5\nB="hush-hush"', ", line 7: POLL_INTERVAL cannot be parsed. "),
        (b"DATABASE=\xff\xfe", ": 'utf-8' codec can't decode .* Save it as UTF-8."),
        (b"export DATABASE='/hush-hush' or so", ", line 6: DATABASE cannot be parsed. "),
    ):
        (app / ".env").write_bytes(COMPLETE.encode() + lines + b"\nPORT='80'\n")
        ended = run(app, "poller.py", "--once")
        assert ended.returncode == 78
        assert re.search(f"{app}/.env{wrong}", ended.stderr)
        assert "hush-hush" not in ended.stderr
    ended = run(app, "db.py", "add", "new")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"db.py: {app}/.env{wrong}")
    assert not (app / "database.json").exists()


def test_a_line_of_env_that_may_be_meant_for_the_poller_is_a_warning(app: Path) -> None:
    lines = {
        'GREETING="hush-hush" to all': "cannot be parsed, so it is ignored",
        "ONDONE=hush-hush": "unknown setting ONDONE is ignored; did you mean ON_DONE?",
        "concurrency=9": "unknown setting concurrency is ignored; did you mean CONCURRENCY?",
    }
    (app / ".env").write_text("\n".join((COMPLETE, *lines)))
    ended = run(app, "poller.py", "--check")
    assert ended.stdout.startswith("ok    settings: ")
    said = [f"WARNING {app}/.env, line {number}: {text}" for number, text in enumerate(lines.values(), 7)]
    assert [line[20:] for line in ended.stderr.splitlines()] == said
    assert "hush-hush" not in ended.stdout + ended.stderr


# --- --check and --once ----------------------------------------------------------------------

STEPS = ("settings:", "database:", "folder:", "token:", "GraFx:")


def test_check_says_that_all_is_fine_also_while_a_daemon_runs(home: Home) -> None:
    home.wait_for(task := home.grafx.add("never"))
    home.start().says("1 pending")
    data, before = home.read(), home.database.stat()
    ended = home.run("--check")
    assert ended.process.returncode == 0
    assert [line.split()[:2] for line in ended.log().splitlines()] == [["ok", step] for step in STEPS]
    assert "1 pending, 0 rejected, 0 failed" in ended.log()
    assert f"answers about {task}\n" in ended.log()
    assert home.database.stat().st_ino != before.st_ino  # it was really written
    assert home.read() == data


@pytest.mark.parametrize(("fine", "code"), [(STEPS[:1], 78), (STEPS[:1] + STEPS[3:], 1)])
def test_check_says_what_is_not_fine(home: Home, fine: tuple[str, ...], code: int) -> None:
    home.grafx.refuse_credentials = "token:" not in fine
    home.write('{"orders": {\n  "a" 1}}')
    home.orders.rmdir()
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


def test_check_names_an_entry_that_is_no_order(home: Home) -> None:
    home.write({"orders": [{"taskId": "one"}, {"taskID": "two"}]})
    ended = home.run("--check")
    assert ended.process.returncode == 1
    how = 'ignored, since it is not an order (write {"taskID": "TASK_ID"}): {"taskId": "one"}'
    assert f"WRONG database: {home.database}: {how}\n" in ended.log()


def test_rejected_credentials_end_it_at_the_start(home: Home) -> None:
    home.grafx.refuse_credentials = True
    home.wait_for(home.grafx.add())
    ended = home.run(before=QUICK)
    assert ended.process.returncode == 78
    assert ended.log().count("rejects SERVER_ID and SERVER_SECRET") == ended.log().count("ERROR") == 1
    assert {request.what for request in home.grafx.requests} == {"token"}


def test_once_polls_each_order_once_and_waits_for_nothing(home: Home) -> None:
    done, pending = home.grafx.add(), home.grafx.add("never")
    home.wait_for(done, pending)
    assert home.run("--once").process.returncode == 0
    assert list(home.waiting()) == [pending]
    assert len(home.grafx.asked("task", pending)) == 1
    home.grafx.fault("task", "status-503", times=None, retry_after=200)
    assert home.run("--once").process.returncode == 1
    assert len(home.grafx.asked("task", pending)) == 2
    assert (list(home.waiting()), home.failed()) == ([pending], {})
