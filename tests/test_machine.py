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

import pytest
from conftest import QUICK, Home, Running, eventually
from sandbox import FAULTS, Sandbox

BEFORE = QUICK
# For root no permission counts, so it gives up what makes it root; its files stay its own.
if os.geteuid() == 0 and sys.platform.startswith("linux"):
    BEFORE += (
        "; import ctypes; ctypes.CDLL(None).capset("
        "(ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())"
    )
Fix = Callable[[], object]


def goes_on(home: Home, what: str) -> None:
    """Wait until the poller has tried it some more times."""
    before = len(home.grafx.asked(what))
    eventually(lambda: len(home.grafx.asked(what)) >= before + 3)


def well(home: Home, poller: Running, *task_ids: str) -> None:
    """All are delivered, by the process that was started, with nothing unexpected in its log."""
    eventually(lambda: not home.waiting() or poller.process.poll() is not None)
    assert poller.stop() == 0, poller.log()
    assert not home.waiting(), poller.log()
    assert not home.failed()
    for task_id in task_ids:
        assert (home.orders / f"{task_id}.png").read_bytes() == home.grafx.body(task_id)
    assert not re.search("Traceback|unexpected", poller.log()), poller.log()
    assert not [name for name in home.files() if name.startswith(".")]


def logged_once(poller: Running, pattern: str, end: str, most: int = 1) -> None:
    """Each error once, and as often an `end`, as "resumed after"."""
    bad = re.findall(rf" (?:WARNING|ERROR) +(.*{pattern}.*)", poller.log())
    over = re.findall(rf" INFO +(?:{end})", poller.log())
    assert len(bad) == len(set(bad)) <= most, poller.log()
    assert 1 <= len(over) <= len(bad), poller.log()


# --- a folder that takes no files ----------------------------------------------------------------


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
    """The folder becomes a file system of 2 MiB."""
    return mounted(folder, "-t", "tmpfs", "-o", "size=2m,mode=755", "tmpfs")


def fill(folder: Path) -> Fix:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler.unlink


def closed(place: Path, mode: int = 0o555) -> Fix:
    before = place.stat().st_mode
    place.chmod(mode)
    return lambda: place.chmod(before)


def files_wait(home: Home, hinder: Callable[[], Fix], says: str) -> None:
    task_ids = [home.grafx.add(size=1_000_000), home.grafx.add()]
    home.wait_for()
    poller = home.start(before=BEFORE, POLL_INTERVAL="0.1")
    eventually(lambda: home.grafx.tokens)  # it has seen the folder
    mend = hinder()
    home.wait_for(*task_ids)
    poller.says(says)
    goes_on(home, "download")
    assert home.waiting().keys() == set(task_ids)
    mend()
    well(home, poller, *task_ids)
    logged_once(poller, says, "resumed after ")


def disk_full_for_files(home: Home) -> None:
    with small(home.orders):
        files_wait(home, lambda: fill(home.orders), "No space left on device")


def orders_folder_read_only(home: Home) -> None:
    files_wait(home, lambda: closed(home.orders), f"paused: cannot .*{home.orders}")


def files_taken_away(home: Home) -> None:
    """Another program moves each file out of the folder as soon as it sees it."""
    task_ids = [home.grafx.add() for _ in range(30)]
    away = home.folder / "away"
    away.mkdir()
    home.wait_for(*task_ids)
    poller = home.start(before=BEFORE)

    def taken() -> bool:
        for path in home.orders.glob("[!.]*"):
            path.rename(away / path.name)
        return {path.stem for path in away.iterdir()} == set(task_ids)

    eventually(taken)
    well(home, poller)


def too_many_open_files(home: Home) -> None:
    """Nothing can be opened, no file, no folder, no connection; and there are orders at every stage."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit of Linux to change the limits of a running process: NOT tested")
    here, *others = home.grafx.add(), home.grafx.add(), home.grafx.add(size=1_000_000)
    home.grafx.fault("task", "status-503", times=None)
    home.wait_for(here, *others)
    poller = home.start(before=BEFORE)
    eventually(lambda: {request.task_id for request in home.grafx.requests} >= {here, *others})
    limits = resource.prlimit(poller.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(poller.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    home.grafx.clear_faults()
    (home.orders / f"{here}.png").write_bytes(home.grafx.body(here))
    home.wait_for(here, *others, added := home.grafx.add())
    poller.says("Too many open files")
    assert home.waiting().keys() == {here, *others, added}
    resource.prlimit(poller.process.pid, resource.RLIMIT_NOFILE, limits)
    well(home, poller, here, *others, added)
    logged_once(poller, "Too many open files", "resumed after |recovered: ", most=6)


# --- a database that cannot be written -----------------------------------------------------------


def database_waits(home: Home, hinder: Callable[[], Fix], says: str, most: int = 1) -> None:
    """From before the first order is finished; the other one is polled all the while."""
    grafx, ready, later = home.grafx, home.grafx.add(), home.grafx.add()
    renders = grafx.fault("task", "status-204", times=None, task_id=ready)
    grafx.fault("task", "status-204", times=None, task_id=later)
    home.database.write_text(json.dumps({"orders": {ready: {}, later: {}}, "mine": "x" * 20_000}))
    poller = home.start(before=BEFORE, POLL_INTERVAL="0.1", DATABASE=str(home.database))
    eventually(lambda: grafx.asked("task", ready))
    mend = hinder()
    grafx.end_fault(renders)
    poller.says(f"{ready} delivered")
    poller.says(f"ERROR .*{says}")
    goes_on(home, "task")
    mend()
    assert ready in home.waiting()
    grafx.clear_faults()
    well(home, poller, ready, later)
    assert home.read()["mine"] == "x" * 20_000
    logged_once(poller, says, "recovered: ", most)


def disk_full_for_the_database(home: Home) -> None:
    disk = home.folder / "disk"
    disk.mkdir()
    home.database = disk / "database.json"
    with small(disk):
        # With a line in it, so that there is room for the next ones: the list is written first.
        (disk / ".database.json.delivered").write_text("2026-01-01T00:00:00Z an-order an-order.png\n")
        database_waits(home, lambda: fill(disk), r"cannot write \S+/database\.json: No space left on device")


def database_unreadable(home: Home) -> None:
    database_waits(home, lambda: closed(home.database, 0), r"database\.json", most=2)


def database_in_a_read_only_folder(home: Home) -> None:
    database_waits(home, lambda: closed(home.folder), r"database\.json", most=2)


def check_of_a_database_that_cannot_be_replaced(home: Home) -> None:
    """`--check` really writes it."""
    home.wait_for()
    with mounted(home.database, "--bind", str(home.database)):
        ended = home.run("--check", before=BEFORE)
    assert ended.process.returncode == 1
    said = "Device or resource busy. It is mounted as a single file: mount its folder."
    assert f"WRONG database: cannot write {home.database}: {said}" in ended.log(), ended.log()


def clock_set_back(home: Home) -> None:
    """All that was written before is from the future then: orders, and the file's own time."""
    first, second, last = home.grafx.add(questions=3), home.grafx.add(questions=3), home.grafx.add()
    home.write(
        {"orders": {first: {"added": "2099-12-31T23:59:59Z"}, second: {"added": "9999-12-31T00:00-23:59"}}}
    )
    os.utime(home.database, (time.time() + 86400,) * 2)
    poller = home.start(before=BEFORE)
    eventually(lambda: not home.waiting())
    home.wait_for(last)
    well(home, poller, first, second, last)


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
    grafx, orders, signature = home.grafx, list[str](), "signature-of-a-link-0123456789"
    names = [*FAULTS.keys() - {"gzip-far"}]  # for which a file is too small
    for what in ("task", "download"):
        for name in [*names, "status-401", "status-404", "status-500", "status-503"]:
            orders.append(grafx.add(questions=1 if what == "task" else 0))
            options = {"huge": {"size": 2 << 20}, "trickle": {"after": 1.0}}.get(name, {})
            times = 3 if name == "echo-token" else 1
            grafx.fault(what, name, task_id=orders[-1], times=times, **options)
    nowhere = ("http://127.0.0.1:9/?sig=", "http://nowhere.invalid/?sig=", "http://[::1/?sig=")
    orders += [grafx.add(link=link + signature) for link in nowhere]
    task_id = grafx.add()
    orders.append(grafx.add(task_id=task_id, link=f"{grafx.elsewhere}/file/{task_id}?sig={signature}"))
    home.wait_for(*orders)
    for name in ("echo-token", "redirect-away", "hang"):
        grafx.fault("token", name)
    quick = QUICK + "; chili.TIMEOUT = (0.5, 0.5); chili.SLOW_START = chili.TOKEN_PAUSE = 0.5"
    on_done = f"sh -c 'env > {home.folder}/env-$TASK_ID' {{}}"
    poller = home.start("-v", before=quick, CONCURRENCY="16", ON_DONE=on_done, GIVE_UP_AFTER="0")
    eventually(lambda: len(home.waiting()) < len(orders))  # so the credentials are known to be right
    for name in ("echo-token", "cut-json", "html", "status-401", "status-500"):
        grafx.fault("token", name)
    grafx.revoke()
    eventually(lambda: len(home.waiting()) <= len(nowhere), str(poller.path), patience=90)
    # Also where all orders were done before: those that lead nowhere need a token, too.
    eventually(lambda: sum(request.fault is not None for request in grafx.asked("token")) == 8)
    written = {"list": home.db("list").stdout}
    assert poller.stop() in (0, 1), poller.log()
    assert "Traceback" not in poller.log(), poller.log()

    # Credentials that are rejected in words that repeat them.
    said = {"error": "invalid_client", "error_description": f"unknown: {grafx.client_secret}"}
    grafx.fault("token", "status-401", times=None, body=json.dumps(said).encode())
    for argument in ("--check", "--once"):
        assert home.run(argument, "-v", before=QUICK).process.returncode == 78

    for path in home.folder.rglob("*"):
        if path.is_file():
            written[str(path)] = path.name + path.read_text(errors="replace")
    assert len(grafx.tokens) >= 2
    assert any("/env-" in name for name in written)
    assert "[secret]" in written[str(home.database)], "the echo is gone, and nothing is tested"
    signed = [token.rpartition(".")[2] for token in grafx.tokens]
    for secret in (grafx.client_secret, *grafx.tokens, *signed, signature):
        for form in forms(secret):
            where = [name for name, text in written.items() if form in text]
            assert not where, f"{form[:20]}… stands in {where}"


# --- run -----------------------------------------------------------------------------------------

CASES: list[Callable[[Home], None]] = [
    disk_full_for_files, orders_folder_read_only, files_taken_away, too_many_open_files,
    disk_full_for_the_database, database_unreadable, database_in_a_read_only_folder,
    check_of_a_database_that_cannot_be_replaced, clock_set_back, secrets,
]  # fmt: skip


def run(case: Callable[[Home], None], folder: Path) -> None:
    with Sandbox() as grafx:
        home = Home(folder, grafx)
        try:
            case(home)
        finally:
            for running in home.pollers:
                running.process.kill()
                running.process.wait()
            for place in (folder, home.orders):
                with contextlib.suppress(OSError):
                    place.chmod(0o755)  # so that pytest can tidy up


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[None]]:
    with ThreadPoolExecutor(len(CASES)) as pool:
        return {case.__name__: pool.submit(run, case, tmp_path_factory.mktemp("case")) for case in CASES}


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_machine(case: str, ran: dict[str, Future[None]]) -> None:
    ran[case].result()
