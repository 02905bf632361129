"""The machine fails the poller: it lives, logs that once, and goes on afterwards. It tells no secrets.

All cases run first, side by side, since most of what they do is wait; a test for each then has its result.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from conftest import QUICK, Home, Manager, Running, eventually
from sandbox import FAULTS, Sandbox
from test_poller import turns

BEFORE = QUICK
# For root no permission counts, so it gives up what makes it root; its files stay its own.
if os.geteuid() == 0 and sys.platform.startswith("linux"):
    BEFORE += (
        "; import ctypes; ctypes.CDLL(None).capset("
        "(ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())"
    )
QUICKER = f"{BEFORE}; db.SAVING = 0.2"  # a broken file is no editor's
Fix = Callable[[], object]


def requests(home: Home, what: str) -> int:
    return sum(request.what == what for request in home.grafx.requests)


def well(home: Home, poller: Running, *task_ids: str) -> None:
    """All are delivered, by the process that was started, with nothing unexpected in its log."""
    eventually(lambda: not home.waiting() or poller.process.poll() is not None)
    assert poller.stop() == 0, poller.log()
    assert not home.waiting(), poller.log()
    assert not home.failed()
    for task_id in task_ids:
        assert (home.orders / f"{task_id}.png").read_bytes() == home.grafx.body(task_id)
    assert "Traceback" not in poller.log(), poller.log()
    assert "unexpected" not in poller.log(), poller.log()
    assert not [name for name in home.files() if name.startswith(".")]


def logged_once(poller: Running, pattern: str, end: str, most: int = 1) -> None:
    """Each error once, and as often an `end`, as "resumed after"."""
    lines = re.findall(r"^\S+ \S+ ([A-Z]+) +(.*)", poller.log(), re.M)
    bad = [line for level, line in lines if level != "INFO" and re.search(pattern, line)]
    over = [line for level, line in lines if level == "INFO" and re.match(end, line)]
    assert len(bad) == len(set(bad)) <= most, poller.log()
    assert 1 <= len(over) <= len(bad), poller.log()


# --- a full disk ---------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    command = ["mount", *options, str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"nothing can be mounted here, so this is NOT tested: {' '.join(command)}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def small(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The folder becomes a file system of 2 MiB. Where nothing may be mounted, see `file_too_large`."""
    return mounted(folder, "-t", "tmpfs", "-o", "size=2m,mode=755", "tmpfs")


def fill(folder: Path) -> Fix:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler.unlink


def disk_full_for_files(home: Home) -> None:
    task_ids = [home.grafx.add(size=1_000_000), home.grafx.add()]
    home.wait_for(*task_ids)
    with small(home.orders):
        make_room = fill(home.orders)
        poller = home.start(before=BEFORE)
        poller.says("No space left on device")
        before = requests(home, "download")
        eventually(lambda: requests(home, "download") >= before + 4)
        assert home.waiting().keys() == set(task_ids)
        make_room()
        well(home, poller, *task_ids)
        logged_once(poller, "No space left on device", "resumed after ")


def disk_full_for_the_database(home: Home) -> None:
    task_ids = [home.grafx.add(), home.grafx.add()]
    disk = home.folder / "disk"
    disk.mkdir()
    with small(disk):
        home.database = disk / "database.json"
        data = {"orders": {task_id: {} for task_id in task_ids}, "failed": {}, "mine": "x" * 20_000}
        home.database.write_text(json.dumps(data))
        before = home.database.read_bytes()
        (disk / ".database.json.lock").touch()
        (disk / ".database.json.pid").write_text("99999\n")
        # With a line in it, so that there is room for the next ones: the list is written first.
        (disk / ".database.json.delivered").write_text("2026-01-01T00:00:00Z an-order an-order.png\n")
        make_room = fill(disk)
        poller = home.start(before=BEFORE, DATABASE=str(home.database))
        poller.says(r"cannot write \S+/database\.json: No space left on device")
        turns(poller)
        assert home.database.read_bytes() == before
        make_room()
        well(home, poller, *task_ids)
        logged_once(poller, "No space left on device", "recovered: ")
        assert {path.name for path in disk.iterdir()} == {f"{lock}database.json{name}" for lock, name in (
            ("", ""), (".", ".lock"), (".", ".pid"), (".", ".delivered"))}  # fmt: skip


def file_too_large(home: Home) -> None:
    """Where nothing may be mounted, this stands for the full disk: a write fails in the middle."""
    large, beside = home.grafx.add(size=1_000_000), home.grafx.add()
    home.wait_for(large, beside)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))"
    poller = home.start(before=f"{BEFORE}; {limit}")
    poller.says("File too large")
    before = requests(home, "download")
    eventually(lambda: requests(home, "download") >= before + 4)
    assert home.waiting().keys() <= {large}, "another order is held up by it"
    assert not (home.orders / f"{large}.png").exists()
    limits(poller, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    well(home, poller, large, beside)
    logged_once(poller, "File too large", f"{large} delivered to ")


def limits(poller: Running, limit: int, soft: int) -> None:
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit of Linux to change the limits of a running process: NOT tested")
    hard = resource.prlimit(poller.process.pid, limit)[1]
    resource.prlimit(poller.process.pid, limit, (soft, hard))


def too_many_open_files(home: Home) -> None:
    """Nothing can be opened, no file, no folder, no connection; and there are orders at every stage."""
    small_one, large, here = home.grafx.add(), home.grafx.add(size=1_000_000), home.grafx.add()
    home.grafx.fault("task", "status-503", times=None)
    home.wait_for(small_one, large, here)
    poller = home.start(before=BEFORE)
    eventually(lambda: {request.task_id for request in home.grafx.requests} >= {small_one, large, here})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limits(poller, resource.RLIMIT_NOFILE, 3)
    home.grafx.clear_faults()
    (home.orders / f"{here}.png").write_bytes(home.grafx.body(here))
    added = home.grafx.add()
    home.wait_for(small_one, large, here, added)
    poller.says("Too many open files")
    turns(poller)
    assert home.waiting().keys() == {small_one, large, here, added}
    limits(poller, resource.RLIMIT_NOFILE, before)
    well(home, poller, small_one, large, here, added)
    logged_once(poller, "Too many open files", "resumed after |recovered: ", most=6)


# --- folders and files that go away --------------------------------------------------------------


def closed(place: Path, mode: int = 0o555) -> Fix:
    before = place.stat().st_mode
    place.chmod(mode)
    return lambda: place.chmod(before)


def another_kind(place: Path) -> Fix:
    """A file becomes a folder, a folder becomes a file."""
    kept = place.rename(place.with_name("kept"))
    place.touch() if kept.is_dir() else place.mkdir()
    return lambda: (place.rmdir() if kept.is_file() else place.unlink(), kept.rename(place))


def orders_folder(home: Home, fault: Callable[[Path], Fix]) -> None:
    task_ids = [home.grafx.add(), home.grafx.add()]
    home.wait_for()
    poller = home.start(before=BEFORE)
    eventually(lambda: home.grafx.tokens)
    mend = fault(home.orders)
    home.wait_for(*task_ids)
    poller.says(f"cannot .*{home.orders}")
    turns(poller)
    assert home.waiting().keys() == set(task_ids)
    mend()
    well(home, poller, *task_ids)
    logged_once(poller, f"cannot .*{home.orders}", "resumed after ")


def orders_folder_read_only(home: Home) -> None:
    orders_folder(home, closed)


def orders_folder_is_a_file(home: Home) -> None:
    orders_folder(home, another_kind)


def database(home: Home, fault: Callable[[], Fix]) -> None:
    """It goes away before the order is finished, so both reading and writing fail."""
    task_id = home.grafx.add()
    home.grafx.fault("task", "status-204", times=None)
    home.wait_for(task_id)
    poller = home.start(before=BEFORE)
    eventually(lambda: requests(home, "task"))
    mend = fault()
    home.grafx.clear_faults()
    poller.says(f"{task_id} delivered")
    poller.says(r"ERROR.*database\.json")
    turns(poller)
    mend()
    well(home, poller, task_id)
    logged_once(poller, r"database\.json", "recovered: ", most=2)


def database_unreadable(home: Home) -> None:
    database(home, lambda: closed(home.database, 0))


def database_is_a_folder(home: Home) -> None:
    database(home, lambda: another_kind(home.database))


def database_in_a_read_only_folder(home: Home) -> None:
    database(home, lambda: closed(home.folder))


def check_of_a_database_that_cannot_be_replaced(home: Home) -> None:
    """`--check` really writes it where it is there; else it tries the folder."""
    folder = home.folder / "data"
    folder.mkdir()
    database, text = folder / "database.json", '{"orders": {}}'
    (folder / ".database.json.lock").touch()  # so it is not the lock that cannot be made

    def check(what: Path | str, wrong: str) -> None:
        ended = home.run("--check", before=BEFORE, DATABASE=str(database))
        assert ended.process.returncode == 1
        assert f"WRONG database: cannot write {what}: {wrong}" in ended.log(), ended.log()
        folder.chmod(0o755)

    denied = f"Permission denied. {folder} is "
    folder.chmod(0o555)
    check(f"to {folder}", denied)
    assert not database.exists()
    database.write_text(text)
    folder.chmod(0o555)
    check(database, denied)
    with mounted(database, "--bind", str(database)):
        check(database, "Device or resource busy. It is mounted as a single file: mount its folder.")
    assert database.read_text() == text


# --- at the start --------------------------------------------------------------------------------


def at_the_start(home: Home, task_id: str, wrong: str, mend: Fix) -> None:
    """It is waited for, by a service that is up. `--once` and `--check` end with 1."""
    for argument in ("--once", "--check"):
        ended = home.run(argument, before=QUICKER)
        assert ended.process.returncode == 1
        assert re.search(wrong, ended.log()), ended.log()
    manager = Manager(f"@{home.folder.name}-{os.getpid()}")
    # READY comes after 30 s at the latest, here after 2 s.
    sooner = "(init(self, screen), setattr(self, 'ready_by', self.ready_by - 28))[0]"
    init = f"init = poller.Status.__init__; poller.Status.__init__ = lambda self, screen: {sooner}"
    poller = home.start(before=f"{QUICKER}; {init}", NOTIFY_SOCKET=manager.address)
    poller.says(f"(ERROR|WARNING) .*{wrong}")
    manager.hears("^READY=1$")
    manager.forget()
    manager.hears("^WATCHDOG=1$")
    manager.hears(f"^STATUS=.*retry.*: .*{wrong}")
    assert requests(home, "download") == 0
    mend()
    well(home, poller, task_id)
    logged_once(poller, wrong, "resumed after |recovered: ")
    manager.socket.close()


def start_without_the_folder_of_orders(home: Home) -> None:
    """As where a NAS is not mounted yet."""
    home.orders = home.folder / "nas" / "orders"
    home.env |= {"ORDERS_DIR": str(home.orders)}
    home.wait_for(task_id := home.grafx.add())
    wrong = f"cannot write to {home.orders}: No such file or directory. Make the folder."
    at_the_start(home, task_id, wrong, home.orders.parent.mkdir)


def start_with_a_broken_database(home: Home) -> None:
    task_id = home.grafx.add()
    home.write('{"orders": {\n  "a" 1}}')
    at_the_start(home, task_id, f"{home.database}: line 2, column 7", lambda: home.wait_for(task_id))


# --- files and the clock -------------------------------------------------------------------------


def files_taken_away(home: Home) -> None:
    """Another program moves each file out of the folder as soon as it sees it."""
    task_ids = [home.grafx.add() for _ in range(30)]
    away = home.folder / "away"
    away.mkdir()
    home.wait_for(*task_ids)
    poller = home.start(before=BEFORE)

    def take() -> bool:
        for path in home.orders.glob("[!.]*"):
            path.rename(away / path.name)
        return poller.process.poll() is not None or not home.waiting()

    eventually(take)
    take()
    well(home, poller)
    assert {path.stem for path in away.iterdir()} == set(task_ids)


def clock_set_back(home: Home) -> None:
    """All that was written before is from the future then: orders, the file's own time, an error in it."""
    add = home.grafx.add
    ready, later, last = add(), add(questions=3), add()

    def write(text: str, when: float) -> None:
        temp = home.folder / "edited"
        temp.write_text(text)
        os.utime(temp, (when, when))
        temp.replace(home.database)

    future = {"added": "2099-12-31T23:59:59Z"}
    orders = {ready: future, later: {"added": "9999-12-31T23:59:59.9-23:59"}}
    write(json.dumps({"orders": orders, "failed": {}}), time.time() + 86400)
    poller = home.start(before=QUICKER)
    eventually(lambda: not home.waiting())
    write('{"orders": ', time.time() + 86400)
    poller.says("line 1, column 12")
    write(json.dumps({"orders": {last: {"added": "0001-01-01T00:00:00+23:59"}}, "failed": {}}), 1_000_000_000)
    well(home, poller, ready, later, last)


# --- secrets -------------------------------------------------------------------------------------


def forms(secret: str) -> set[str]:
    """As it may stand somewhere: as it is, in an address, in base64 (with any neighbours)."""
    found = {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1]}
    for shift in range(3):
        packed = base64.b64encode(b"x" * shift + secret.encode()).decode()
        found.add(packed[4 : len(packed) - 4])
    return found


def secrets(home: Home) -> None:
    """All kinds of faults at -v, and then a look at everything that was written."""
    grafx, written = home.grafx, dict[str, str]()
    signature = "signature-of-a-link-0123456789"
    orders = []
    statuses = ["status-401", "status-403", "status-404", "status-500", "status-503"]
    for what in ("task", "download"):
        for name in [*FAULTS.keys() - {"gzip-far"}, *statuses]:  # for which a file is too small
            task_id = grafx.add(questions=1 if what == "task" else 0)
            options = {"huge": {"size": 2 << 20}, "trickle": {"after": 1.0}}.get(name, {})
            grafx.fault(what, name, task_id=task_id, times=3 if name == "echo-token" else 1, **options)
            orders.append(task_id)
    for link in (grafx.elsewhere + "/file/{}?sig=", "http://127.0.0.1:9/{}?sig=", "http://nowhere.invalid/{}?sig=",
                 "http://[::1/{}?sig=", "http://localhost:99999/{}?sig=", "http://a..b/{}?sig="):  # fmt: skip
        task_id = grafx.add()
        orders.append(grafx.add(task_id=task_id, link=link.format(task_id) + signature))
    grafx.fault("token", "echo-token")
    grafx.fault("token", "redirect-away")
    grafx.fault("token", "hang")
    home.wait_for(*orders)
    quick = QUICK + "; chili.TIMEOUT = (0.5, 0.5); chili.SLOW_START = chili.TOKEN_PAUSE = 0.5"
    on_done = f"sh -c 'env > {home.folder}/env-$TASK_ID' {{}}"
    poller = home.start("-v", before=quick, CONCURRENCY="16", ON_DONE=on_done, GIVE_UP_AFTER="0")
    process = psutil.Process(poller.process.pid)
    eventually(lambda: len(home.waiting()) < len(orders))  # so the credentials are known to be right
    written["command line"] = " ".join(process.cmdline())
    for name in ("echo-token", "cut-json", "html", "status-401", "status-500"):
        grafx.fault("token", name)
        grafx.revoke()
        count = len(grafx.tokens)
        eventually(lambda count=count: len(grafx.tokens) > count)
    # Five of the links lead nowhere for ever.
    eventually(lambda: len(home.waiting()) <= 5, str(poller.path), patience=90)
    written["list"] = home.db("list").stdout
    assert poller.stop() in (0, 1), poller.log()
    assert "Traceback" not in poller.log(), poller.log()

    # Credentials that are rejected in words that repeat them.
    said = json.dumps(
        {"error": "invalid_client", "error_description": f"unknown: {grafx.client_secret}"}
    ).encode()
    grafx.fault("token", "status-401", times=None, body=said, content_type="application/json")
    for argument in ("--check", "--once"):
        assert home.run(argument, "-v", before=quick).process.returncode == 78
    grafx.clear_faults()

    for path in home.folder.rglob("*"):
        if path.is_file():
            written[str(path)] = path.name + path.read_text(errors="replace")
    assert len(grafx.tokens) >= 5
    assert any("/env-" in name for name in written)
    assert "[secret]" in written[str(home.database)], "the echo is gone, and nothing is tested"
    signed = [token.rpartition(".")[2] for token in grafx.tokens]
    for secret in (grafx.client_secret, *grafx.tokens, *signed, signature):
        for form in forms(secret):
            where = [name for name, text in written.items() if form in text]
            assert not where, f"{form[:20]}… stands in {where}"


# --- run -----------------------------------------------------------------------------------------

CASES: list[Callable[[Home], None]] = [
    disk_full_for_files, disk_full_for_the_database, file_too_large, too_many_open_files,
    orders_folder_read_only, orders_folder_is_a_file, database_unreadable, database_is_a_folder,
    database_in_a_read_only_folder, check_of_a_database_that_cannot_be_replaced,
    start_without_the_folder_of_orders, start_with_a_broken_database,
    files_taken_away, clock_set_back, secrets,
]  # fmt: skip


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[None]]:
    def run(case: Callable[[Home], None]) -> None:
        with Sandbox() as grafx:
            home = Home(tmp_path_factory.mktemp(case.__name__), grafx)
            try:
                case(home)
            finally:
                for running in home.pollers:
                    running.process.kill()
                    running.process.wait()
                for folder in (home.folder, home.orders):
                    with contextlib.suppress(OSError):
                        folder.chmod(0o755)  # so that pytest can tidy up

    wanted = {item.name for item in request.session.items}  # `pytest -k` may want a few only
    cases = [case for case in CASES if f"test_machine[{case.__name__}]" in wanted]
    tmp_path_factory.getbasetemp()  # made here, once, and not by several of them at the same time
    with Sandbox() as grafx:
        grafx.body(grafx.add(size=10_000))  # what it pads files with is the same for all from here on
    with ThreadPoolExecutor(len(cases)) as pool:
        return {case.__name__: pool.submit(run, case) for case in cases}


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_machine(case: str, ran: dict[str, Future[None]]) -> None:
    ran[case].result()
