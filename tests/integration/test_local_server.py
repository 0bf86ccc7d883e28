"""The embedded server from the outside: real processes, real signals, real files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nats
import pytest

from skialith.config import LOCAL_WAL_MAX_BYTES, Durability
from skialith.errors import Closed, ConfigurationError, WalUnavailable
from skialith.wal import local
from skialith.wal.local import LocalAddress, LocalServer, find_binary, inspect
from tests.fixtures.local_user import LocalUser, append, is_locked, kill_all, processes, read, wait_gone
from tests.fixtures.nats import pause, wait_until

TIMEOUT = 20.0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory for an embedded server (not made yet), with nothing left running there afterwards."""
    directory = tmp_path / ".skialith"
    yield directory
    if directory.exists():
        kill_all(directory)


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` returns."""

    total: int
    used: int
    free: int


def user_of(directory: Path, durability: Durability = "process", binary: str | None = None) -> LocalServer:
    return LocalServer(directory, durability=durability, binary=binary)


@contextlib.contextmanager
def using(directory: Path, durability: Durability = "process") -> Iterator[LocalAddress]:
    server = user_of(directory, durability)
    address = server.acquire(TIMEOUT)
    try:
        yield address
    finally:
        server.release()


def port_of(address: LocalAddress) -> int:
    return int(address.url.rpartition(":")[2])


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- one user


def test_the_first_user_starts_it_and_the_last_one_gone_stops_it(place: Path) -> None:
    with using(place) as address:
        assert inspect(place) == address
        assert processes(place) == {"server": [address.pid], "watcher": processes(place)["watcher"]}
        assert len(processes(place)["watcher"]) == 1
        assert is_locked(place / "store.lock")
        assert asyncio.run(append(address.url, [1, 2])) == [1, 2]
    wait_gone(place)
    assert inspect(place) is None
    with using(place) as again:
        assert again.url == address.url
        assert again.wal_bytes == address.wal_bytes
        assert asyncio.run(read(again.url)) == [1, 2]
    wait_gone(place)


def test_only_the_owner_may_read_what_it_writes(place: Path) -> None:
    before = os.umask(0)
    try:
        with using(place) as address:
            asyncio.run(append(address.url, [1]))
            assert mode_of(place) == 0o700
            for path in place.rglob("*"):
                assert mode_of(path) & 0o077 == 0, path
            token = address.url.partition("//")[2].partition("@")[0]
            assert len(token) >= 32
            assert token in (place / "nats-server.conf").read_text()
            assert token.encode() not in Path(f"/proc/{address.pid}/cmdline").read_bytes()
    finally:
        os.umask(before)


def test_a_client_without_the_token_is_refused(place: Path) -> None:
    async def connect(url: str) -> None:
        await nats.connect(url, allow_reconnect=False, connect_timeout=5)

    with using(place) as address:
        for url in (f"nats://127.0.0.1:{port_of(address)}", f"nats://wrong@127.0.0.1:{port_of(address)}"):
            with pytest.raises(nats.errors.Error, match="Authorization"):
                asyncio.run(connect(url))


def test_it_listens_on_loopback_only(place: Path) -> None:
    with using(place) as address:
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        port = f"{port_of(address):04X}"
        listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port}")]
        assert listening == [f"0100007F:{port}"]


@pytest.mark.parametrize("name", ["with space", "ünï-日本", "quote'\"s", "back\\slash $HOME #{}", "new\nline"])
def test_any_directory_name_works(tmp_path: Path, name: str) -> None:
    place = tmp_path / name / "deep"
    try:
        with using(place) as address:
            assert asyncio.run(append(address.url, [1])) == [1]
            assert (place / "wal" / "jetstream").is_dir()
        wait_gone(place)
    finally:
        kill_all(place)


def test_a_relative_directory_is_taken_where_the_user_was_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)
    server = user_of(Path(place.name))
    monkeypatch.chdir("/")
    assert server.acquire(TIMEOUT).directory == place
    server.release()


def test_release_may_come_before_acquire_and_twice_and_acquire_again(place: Path) -> None:
    server = user_of(place)
    server.release()
    first = server.acquire(TIMEOUT)
    assert server.acquire(TIMEOUT) == first
    server.release()
    server.release()
    with pytest.raises(Closed, match="acquire"):
        server.ensure(TIMEOUT)
    assert server.acquire(TIMEOUT).url == first.url
    server.release()
    wait_gone(place)


def test_ensure_is_cheap_while_the_server_lives(place: Path) -> None:
    server = user_of(place)
    address = server.acquire(TIMEOUT)
    took = []
    for _ in range(20):
        begun = time.perf_counter()
        assert server.ensure(TIMEOUT) == address
        took.append(time.perf_counter() - begun)
    server.release()
    assert sorted(took)[10] < 0.02


def test_no_descriptor_is_left_behind(place: Path) -> None:
    with using(place):
        pass
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with using(place):
            pass
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_server_holds_its_lock_and_nothing_of_the_starter(place: Path) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    user = LocalUser(place)
    user.ask("acquire", TIMEOUT)
    found = processes(place)
    held = {name: _open_files(found[name][0]) for name in found}
    assert str(place / "store.lock") in held["server"]
    assert str(place / "users.lock") not in held["server"]
    assert str(place / "start.lock") not in held["server"] | held["watcher"]
    of_the_starter = {path for path in _open_files(user.process.pid) if path.startswith("pipe:")}
    assert not of_the_starter & (held["server"] | held["watcher"])
    assert not any("lock" in path and "users.lock" not in path for path in _open_files(user.process.pid))
    user.end()
    os.close(reading)
    os.close(writing)
    wait_gone(place)


def _open_files(pid: int) -> set[str]:
    folder = f"/proc/{pid}/fd"
    found = set()
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"{folder}/{name}"))
    return found


# ---- several users


def test_users_share_one_server_and_the_last_one_stops_it(place: Path) -> None:
    users = [LocalUser(place) for _ in range(3)]
    for user in users:
        user.tell("acquire", TIMEOUT)
    assert len({tuple(user.answer()) for user in users}) == 1
    pid = processes(place)["server"]
    assert len(pid) == 1
    users[0].kill()
    users[1].end()
    assert users[2].ask("append", inspect_url(place), [1]) == [1]
    assert processes(place)["server"] == pid
    users[2].kill()
    wait_gone(place)


def inspect_url(place: Path) -> str:
    address = inspect(place)
    assert address is not None
    return address.url


def test_threads_and_runtimes_of_one_process_share_it(place: Path) -> None:
    servers = [user_of(place) for _ in range(4)]
    pids: list[int] = []
    threads = [threading.Thread(target=lambda s=server: pids.append(s.acquire(TIMEOUT).pid)) for server in servers * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 8
    assert len(set(pids)) == 1
    for server in servers[1:]:
        server.release()
    assert servers[0].ensure(TIMEOUT).pid == pids[0]
    servers[0].release()
    wait_gone(place)


def test_ctrl_c_at_the_starter_does_not_reach_the_server(place: Path) -> None:
    starter = LocalUser(place)
    address = starter.ask("acquire", TIMEOUT)
    with using(place) as mine:
        os.killpg(starter.process.pid, signal.SIGINT)
        starter.process.wait(10)
        starter.end()
        assert asyncio.run(append(mine.url, [1])) == [1]
        assert str(mine.pid) == address[1]
    wait_gone(place)


def test_a_forked_child_is_no_user_until_it_becomes_one(place: Path) -> None:
    server = user_of(place)
    address = server.acquire(TIMEOUT)
    to_child, from_child = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            server.release()  # the parent's use must not end by this
            os.write(from_child[1], b"1")
            os.read(to_child[0], 1)  # by now the parent has released
            own = user_of(place)
            if own.acquire(TIMEOUT).url == address.url:
                os.write(from_child[1], b"2")
                os.read(to_child[0], 1)
                status = 0
        finally:
            os._exit(status)
    assert os.read(from_child[0], 1) == b"1"
    assert is_locked(place / "users.lock")
    server.release()
    wait_gone(place)
    os.write(to_child[1], b"1")
    assert os.read(from_child[0], 1) == b"2"
    assert len(processes(place)["server"]) == 1
    os.write(to_child[1], b"2")
    assert os.waitpid(child, 0)[1] == 0
    wait_gone(place)
    for fd in (*to_child, *from_child):
        os.close(fd)


def test_inspect_starts_nothing(place: Path) -> None:
    assert inspect(place) is None
    assert not place.exists()


# ---- what dies and comes back


def test_a_killed_server_comes_back_where_it_was_with_what_it_had(place: Path) -> None:
    async def publish_through_a_kill(server: LocalServer, address: LocalAddress) -> None:
        client = await nats.connect(address.url, reconnect_time_wait=0.05, max_reconnect_attempts=-1)
        log = client.jetstream()
        await log.add_stream(name="TEST", subjects=["test"])
        await log.publish("test", b"1")
        os.kill(address.pid, signal.SIGKILL)
        again = await asyncio.to_thread(server.ensure, TIMEOUT)
        assert again.url == address.url
        assert again.pid != address.pid
        deadline = time.monotonic() + TIMEOUT
        while True:  # the client itself comes back: same port, same token
            try:
                await log.publish("test", b"2", timeout=1)
                break
            except nats.errors.Error:
                assert time.monotonic() < deadline
        await client.close()

    server = user_of(place)
    address = server.acquire(TIMEOUT)
    asyncio.run(publish_through_a_kill(server, address))
    assert asyncio.run(read(address.url)) == [1, 2]
    server.release()
    wait_gone(place)


def test_when_everything_was_killed_the_next_user_finds_everything(place: Path) -> None:
    user = LocalUser(place)
    url = user.ask("acquire", TIMEOUT)[0]
    assert user.ask("append", url, list(range(50))) == list(range(50))
    victims = [user.process.pid, *processes(place)["watcher"], *processes(place)["server"]]
    assert len(victims) == 3
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    user.end()
    wait_gone(place)
    with using(place) as address:
        assert address.url == url
        assert asyncio.run(read(url)) == list(range(50))
    wait_gone(place)


@pytest.mark.parametrize("who", ["a new user", "ensure", "release"])
def test_a_killed_watcher_is_replaced(place: Path, who: str) -> None:
    server = user_of(place)
    address = server.acquire(TIMEOUT)
    (watcher,) = processes(place)["watcher"]
    os.kill(watcher, signal.SIGKILL)
    wait_until(lambda: not is_locked(place / "watcher.lock"), TIMEOUT, "the watcher ends")
    if who == "a new user":
        with using(place) as other:
            assert other == address
            assert len(processes(place)["watcher"]) == 1
    elif who == "ensure":
        assert server.ensure(TIMEOUT) == address
        assert len(processes(place)["watcher"]) == 1
    server.release()
    wait_gone(place)


def test_a_server_left_behind_by_killed_user_and_watcher_goes_with_the_next_user(place: Path) -> None:
    user = LocalUser(place)
    user.ask("acquire", TIMEOUT)
    before = processes(place)["server"]
    for pid in (*processes(place)["watcher"], user.process.pid):
        os.kill(pid, signal.SIGKILL)
    user.end()
    with using(place) as address:
        assert [address.pid] == before
    wait_gone(place)


def test_a_port_that_somebody_took_meanwhile_is_given_up(place: Path) -> None:
    with using(place) as address:
        asyncio.run(append(address.url, [1]))
    wait_gone(place)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", port_of(address)))
        thief.listen()
        with using(place) as other:
            assert port_of(other) != port_of(address)
            assert asyncio.run(read(other.url)) == [1]


def test_a_directory_removed_under_a_user_is_made_anew(place: Path) -> None:
    server = user_of(place)
    old = server.acquire(TIMEOUT)
    moved = place.with_name("moved")
    place.rename(moved)
    shutil.rmtree(moved)
    new = server.ensure(TIMEOUT)
    assert new.url != old.url
    assert asyncio.run(append(new.url, [1])) == [1]
    wait_until(lambda: not os.path.exists(f"/proc/{old.pid}/exe"), TIMEOUT, "the old server ends")
    assert asyncio.run(read(new.url)) == [1]
    server.release()
    wait_gone(place)


def test_a_lost_state_file_is_no_harm_once_the_server_has_ended(place: Path) -> None:
    with using(place) as address:
        asyncio.run(append(address.url, [1]))
    wait_gone(place)
    (place / "nats-server.json").write_text('{"port": 1, "tok')
    with using(place) as other:
        assert asyncio.run(read(other.url)) == [1]


# ---- durability


def test_power_syncs_always_and_process_does_not(place: Path) -> None:
    with using(place, "power") as address:
        assert address.durability == "power"
        assert "sync_interval: always" in (place / "nats-server.conf").read_text()
        with using(place, "process") as other:
            assert other == address
    wait_gone(place)
    with using(place, "process") as address:
        assert address.durability == "process"
        assert "sync_interval" not in (place / "nats-server.conf").read_text()


def test_power_refuses_a_server_that_does_not_sync(place: Path) -> None:
    with using(place, "process") as address:
        with pytest.raises(ConfigurationError, match="SKIALITH_DURABILITY=power"):
            user_of(place, "power").acquire(TIMEOUT)
        assert inspect(place) == address
    wait_gone(place)
    with using(place, "power"):
        pass


def test_a_restart_by_a_process_user_keeps_what_power_users_were_promised(place: Path) -> None:
    with using(place, "power") as address:
        other = user_of(place, "process")
        other.acquire(TIMEOUT)
        os.kill(address.pid, signal.SIGKILL)
        assert other.ensure(TIMEOUT).durability == "power"
        other.release()


# ---- what cannot work says why, in time


def test_a_hung_server_is_waited_for_in_bounds_and_never_doubled(place: Path) -> None:
    server = user_of(place)
    address = server.acquire(TIMEOUT)
    pause(address.pid)
    begun = time.monotonic()
    with pytest.raises(WalUnavailable, match=rf"pid {address.pid}\b.*does not answer") as caught:
        server.ensure(0.3)
    assert time.monotonic() - begun < 5
    assert caught.value.retryable
    with pytest.raises(WalUnavailable):
        user_of(place).acquire(0.3)
    assert processes(place)["server"] == [address.pid]
    os.kill(address.pid, signal.SIGCONT)
    assert server.ensure(TIMEOUT) == address
    server.release()
    wait_gone(place)


def test_a_missing_binary_names_the_extra(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "_wheel_binaries", lambda: iter([tmp_path / "none"]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"skialith\[local\].*SKIALITH_NATS_URL"):
        user_of(place).acquire(TIMEOUT)
    with pytest.raises(ConfigurationError, match="SKIALITH_NATS_SERVER"):
        user_of(place, binary=str(tmp_path / "none")).acquire(TIMEOUT)
    assert not is_locked(place / "store.lock")


def test_the_binary_is_found_in_the_wheel_or_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = find_binary(None)
    assert subprocess.run([real, "--version"], capture_output=True, check=True).stdout.startswith(b"nats-server: v2.")
    assert find_binary(real) == real
    (tmp_path / "nats-server").symlink_to(real)
    monkeypatch.setattr(local, "_wheel_binaries", lambda: iter([]))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary(None) == str(tmp_path / "nats-server")
    assert find_binary("nats-server") == str(tmp_path / "nats-server")


def test_a_binary_that_cannot_be_run_or_ends_at_once_is_named(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF is what it is not")
    broken.chmod(0o700)
    with pytest.raises(ConfigurationError, match="broken"):
        user_of(place, binary=str(broken)).acquire(TIMEOUT)
    ends = tmp_path / "ends"
    ends.write_text("#!/bin/sh\necho it is the wrong moon >&2\nexit 1\n")
    ends.chmod(0o700)
    with pytest.raises(WalUnavailable, match="the wrong moon"):
        user_of(place, binary=str(ends)).acquire(TIMEOUT)
    wait_gone(place)
    with using(place):
        pass


@pytest.mark.parametrize("directory", ["file/below", "file", "/sys/skialith"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, directory: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / directory
    with pytest.raises(ConfigurationError, match="SKIALITH_DIRECTORY") as caught:
        user_of(path).acquire(TIMEOUT)
    assert str(path) in str(caught.value)


def test_a_file_system_without_locks_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigurationError, match="network file system"):
        user_of(place).acquire(TIMEOUT)


def test_a_full_disk_is_refused_when_new_and_no_obstacle_later(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 100 << 20))
    with pytest.raises(ConfigurationError, match=r"100 MiB free.*at least 64 MiB"):
        user_of(place).acquire(TIMEOUT)
    wait_gone(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 30))
    with using(place) as address:
        assert (1 << 28) <= address.wal_bytes < (1 << 28) + (1 << 20)
        asyncio.run(append(address.url, [1]))
    wait_gone(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 0))
    with using(place) as later:
        assert later.wal_bytes == address.wal_bytes
        assert asyncio.run(append(later.url, [2])) == [2]
    wait_gone(place)


def test_a_large_disk_does_not_make_a_huge_log(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 50, 0, 1 << 50))
    with using(place) as address:
        assert address.wal_bytes == LOCAL_WAL_MAX_BYTES


def test_passing_trouble_is_not_called_a_configuration_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(WalUnavailable, match="Too many open files"):
        user_of(place).acquire(TIMEOUT)


def test_windows_is_told_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigurationError, match="SKIALITH_NATS_URL"):
        user_of(place)
