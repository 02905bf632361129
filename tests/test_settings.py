"""Settings, the options of poller.py, and what happens before the loop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, Home, Relay, eventually
from sandbox import Sandbox

import db
import poller

GOOD = {
    "SERVER_ID": "id",
    "SERVER_SECRET": "secret",
    "BASEURL": "https://cp-abc-123.chili-publish.online",
    "ENVIRONMENT": "cp-abc-123",
    "TOKEN_URL": "",  # nothing stands for no value at all
    "POLL_INTERVAL": "",
    "CONCURRENCY": "",
    "DATABASE": "",
    "ORDERS_DIR": "",
}
WRONG = [
    *((name, "") for name in ("SERVER_ID", "SERVER_SECRET", "BASEURL", "ENVIRONMENT")),
    *(
        (name, value)
        for name in ("BASEURL", "TOKEN_URL")
        for value in (
            "http://cp-abc-123.chili-publish.online",
            "http://127.0.0.1.example.com",
            "http://loopback:8080",
            "ftp://127.0.0.1",
            "cp-abc-123.chili-publish.online",
            "https://",
            "https://[::1",
            "https://host:port",
            "https://me:password@host",
        )
    ),
    *(("POLL_INTERVAL", value) for value in ("often", "0", "-1", "nan", "inf", "1e9")),
    *(("CONCURRENCY", value) for value in ("many", "0", "-1", "1.5", "100000")),
]


def load(monkeypatch: pytest.MonkeyPatch, **env: str) -> poller.Settings:
    for name, value in {**GOOD, **env}.items():
        monkeypatch.setenv(name, value)
    return poller.load_settings()


def test_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch)
    beside = Path(poller.__file__).resolve().parent
    assert settings.token_url == "https://integration-login.chiligrafx.com/oauth/token"
    assert (settings.poll_interval, settings.concurrency) == (60, 8)
    assert (settings.database, settings.orders_dir) == (beside / "database.json", beside / "orders")


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_each_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(poller.SettingsError) as raised:
        load(monkeypatch, **{name: value})
    (line,) = str(raised.value).splitlines()
    assert line.startswith(name)
    assert "password" not in line


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "127.9.9.9", "localhost:1", "[::1]:8080"])
def test_loopback_needs_no_https(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    settings = load(monkeypatch, BASEURL=f"http://{host}/", TOKEN_URL=f"http://{host}/oauth/token")
    assert (settings.baseurl, settings.token_url) == (f"http://{host}", f"http://{host}/oauth/token")


def test_all_that_is_wrong_is_said_at_once(home: Home) -> None:
    wrong = {"SERVER_ID": "", "BASEURL": "http://example.com", "POLL_INTERVAL": "often", "CONCURRENCY": "0"}
    for option in ("--once", "--check"):
        ended = home.run(option, **wrong)
        assert ended.process.returncode == 78
        assert [name for name in GOOD if f" {name} " in ended.log()] == list(wrong)
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
    workshop = {
        "tokens": {"integration": None},
        "storeTemplates": [],
        "users": {"dataType": "Map", "value": [["me", {"age": 1.5}]]},
        "orders": {
            "dataType": "Map",
            "value": [[task, {"taskID": task, "projectID": "p1"}] for task in (done, pending)],
        },
    }
    (app / "database.json").write_text(json.dumps(workshop, indent=4))
    (app / "orders").mkdir()

    ended = run(app, "poller.py", "--once", BASEURL=grafx.base_url)  # the environment wins

    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert [path.name for path in (app / "orders").iterdir()] == [f"{done}.png"]
    del workshop["orders"]["value"][0]  # type: ignore[call-overload]
    text = (app / "database.json").read_text()
    assert json.loads(text) == workshop
    # As Node writes it, but for the orders: each has a line of its own.
    line = json.dumps(workshop["orders"]["value"][0])  # type: ignore[call-overload]
    assert f"\n            {line}\n" in text
    assert text.splitlines()[:5] == json.dumps(workshop, indent=4).splitlines()[:5]

    # Relative paths begin beside poller.py, wherever it is started; db.py finds the same file.
    (app / "sub").mkdir()
    other = {"BASEURL": grafx.base_url, "DATABASE": "sub/queue.json", "ORDERS_DIR": "sub/files"}
    assert run(app, "db.py", "add", other_done, **other).returncode == 0
    ended = run(app, "poller.py", "--once", **other)
    assert ended.returncode == 0, ended.stderr
    assert (app / "sub" / "files" / f"{other_done}.pdf").read_bytes() == grafx.body(other_done)
    assert db.get_orders(app / "sub" / "queue.json") == {}


@pytest.mark.parametrize("content", [b"SERVER_ID=\xff\xfe", None], ids=["no text", "a folder"])
def test_an_env_file_that_cannot_be_read_is_said(app: Path, content: bytes | None) -> None:
    (app / ".env").mkdir() if content is None else (app / ".env").write_bytes(content)
    ended = run(app, "poller.py", "--once")
    assert ended.returncode == 78
    assert ".env" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_is_complete(app: Path) -> None:
    ended = run(app, "poller.py", "--help")  # without any setting
    assert ended.returncode == 0
    for word in ("--once", "--check", "-v", "78", ".env", "database.json", "README"):
        assert word in ended.stdout
    ended = run(app, "db.py", "--help")
    assert ended.returncode == 0
    assert all(word in ended.stdout for word in ("add", "list", "retry"))


# --- the start -------------------------------------------------------------------------------


def test_rejected_credentials_end_it_at_the_start(home: Home) -> None:
    home.grafx.refuse_credentials = True
    home.wait_for(home.grafx.add())
    ended = home.run()
    assert ended.process.returncode == 78
    assert ended.log().count("rejects SERVER_ID and SERVER_SECRET") == ended.log().count("ERROR") == 1
    assert home.grafx.client_secret not in ended.log()
    assert {request.what for request in home.grafx.requests} == {"token"}
    assert len(home.waiting()) == 1


def test_a_folder_may_have_any_name(home: Home) -> None:
    """Here no UTF-8; --check, systemd's status and the note for db.py list say what is wrong in it."""
    odd = os.fsdecode(os.fsencode(home.folder) + b"/\xff")
    Path(odd).mkdir()
    home.database = Path(odd, "database.json")
    home.env |= {"DATABASE": str(home.database)}
    home.database.write_text('{"orders": ')
    checked = home.run("--check", LANG="C.UTF-8")
    assert re.search(r"WRONG database: .*/\\udcff/database.json: line 1", checked.log())
    home.wait_for(home.grafx.add("never"))
    daemon = home.start(before=QUICK)
    daemon.says("1 pending")
    home.database.write_text('{"orders": ')
    daemon.says("line 1, column 12")
    eventually(lambda: "line 1, column 12" in home.database.with_name(".database.json.pid").read_text())
    home.wait_for(home.grafx.add())
    eventually(lambda: not home.waiting())
    assert daemon.stop() == 0


def test_check_of_what_is_not_there_yet_waits_for_no_editor(home: Home) -> None:
    """Nor does what it leaves, a lock, show that there was a database."""
    for _ in range(2):
        ended = home.run("--check", before="db.SAVING = 600")
        assert ended.process.returncode == 0
        assert "database.json: 0 pending, 0 failed" in ended.log()
        assert not home.database.exists()


def test_a_network_that_is_not_there_yet_is_no_reason_to_end(home: Home, relay: type[Relay]) -> None:
    task = home.grafx.add()
    home.wait_for(task)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        daemon = home.start(before=QUICK, TOKEN_URL=f"http://127.0.0.1:{port}/oauth/token")
        daemon.says("paused: no token: .*refused")
    relay(port, home.grafx.base_url)
    daemon.says(f"{task} delivered")
    assert daemon.stop() == 0
    assert daemon.log().count("paused") == 1
    assert daemon.log().count("resumed after ") == 1


def test_check_says_that_all_is_fine_also_while_a_daemon_runs(home: Home) -> None:
    home.wait_for(home.grafx.add("never"))
    daemon = home.start()
    daemon.says("GraFx order poller")
    text = home.database.read_bytes()
    ended = home.run("--check")
    assert ended.process.returncode == 0
    assert [line.split()[:2] for line in ended.log().splitlines()] == [
        ["ok", word] for word in ("settings:", "database:", "folder:", "token:", "GraFx:")
    ]
    assert "1 pending, 0 failed" in ended.log()
    assert home.database.read_bytes() == text
    assert home.files() == []
    assert daemon.stop() == 0


@pytest.mark.parametrize(("credentials", "code"), [(False, 78), (True, 1)])
def test_check_says_what_is_not_fine(home: Home, credentials: bool, code: int) -> None:
    home.grafx.refuse_credentials = not credentials
    home.write('{"orders": {\n  "a" 1}}')
    os.utime(home.database, (1, 1))
    shutil.rmtree(home.orders)
    home.orders.write_text("")
    ended = home.run("--check")
    assert ended.process.returncode == code
    ok = {"settings:", "token:", "GraFx:"} if credentials else {"settings:"}
    words = ("settings:", "database:", "folder:", "token:", "GraFx:")
    assert [line.split()[:2] for line in ended.log().splitlines()] == [
        ["ok" if word in ok else "WRONG", word] for word in words
    ]
    assert "line 2, column 7" in ended.log()


# --- --once ----------------------------------------------------------------------------------


def test_once_polls_each_order_once(home: Home) -> None:
    done, pending = home.grafx.add(), home.grafx.add("never")
    home.wait_for(done, pending)
    assert home.run("--once").process.returncode == 0
    assert list(home.waiting()) == [pending]
    assert [request.task_id for request in home.grafx.requests if request.what == "task"].count(pending) == 1
    assert home.run("--once").process.returncode == 0  # nothing new, and nothing wrong


@pytest.mark.parametrize("fault", ["status-503", "close"])
def test_once_ends_with_1_where_an_order_could_not_be_polled(home: Home, fault: str) -> None:
    task, done = home.grafx.add(), home.grafx.add()
    home.grafx.fault("task", fault, task_id=task, times=None, **{"retry_after": 200} if "-" in fault else {})
    home.wait_for(task, done)
    assert home.run("--once", CONCURRENCY="2").process.returncode == 1
    assert task in home.waiting()
    assert home.failed() == {}


def test_once_ends_without_a_network(home: Home) -> None:
    home.wait_for(home.grafx.add())
    ended = home.run("--once", TOKEN_URL="http://127.0.0.1:1/oauth/token")
    assert ended.process.returncode == 1
    assert len(home.waiting()) == 1
    eventually(lambda: "refused" in ended.log())


@pytest.mark.parametrize(
    "url",
    ["https://.example.com", "https://a b.example.com", "https://*.example.com", "https://a.b/#/projects"],
)
def test_an_address_that_no_request_can_be_sent_to_is_named(home: Home, url: str) -> None:
    ended = home.run("--check", BASEURL=url)
    assert ended.process.returncode == 78
    assert "BASEURL is not a web address" in ended.log()


@pytest.mark.parametrize("arguments", [["--check"], ["--once"]])
def test_ctrl_c_before_the_loop_needs_no_traceback(home: Home, arguments: list[str]) -> None:
    home.grafx.fault("token", "hang", times=None)
    running = home.start(*arguments)
    eventually(lambda: home.grafx.requests, "the token is requested")
    running.stop(signal.SIGINT)
    assert "Traceback" not in running.log()


def test_a_gateways_403_for_the_first_token_is_retried(home: Home) -> None:
    """With exit code 78 systemd would not start it again."""
    body = b'{"statusCode": 403, "error": "Forbidden"}'
    fault = home.grafx.fault("token", "status-403", body=body, content_type="application/json", times=None)
    home.wait_for(task_id := home.grafx.add())
    daemon = home.start(before=QUICK)
    daemon.says("paused: no token: .* answered 403 Forbidden; retrying in")
    assert fault
    home.grafx.clear_faults()
    daemon.says(f"{task_id} delivered to ")
    assert daemon.stop() == 0
