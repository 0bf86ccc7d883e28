"""The embedded server while its users, its watcher and itself are killed at random moments.

What must hold throughout: never two servers on one store, every acknowledged record is still there at the end, and
whoever comes next gets a server within its timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest

from skialith.wal.local import LocalServer, inspect
from tests.fixtures.local_user import LocalUser, append, has_ended, is_locked, kill_all, processes, read, wait_gone
from tests.fixtures.nats import pause, wait_until

from .world import ROUNDS, rounds

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(60 + 60 * ROUNDS)]

TIMEOUT = 20.0


@pytest.fixture
def dice(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory whose servers are counted all the time: two at once fail the test."""
    directory = tmp_path / ".skialith"
    directory.mkdir(mode=0o700)
    with never_two_servers(directory):
        yield directory
    kill_all(directory)


@contextlib.contextmanager
def never_two_servers(directory: Path) -> Iterator[None]:
    seen: list[list[int]] = []
    done = threading.Event()

    def count() -> None:
        while not done.wait(0.01):
            servers = processes(directory)["server"]
            if len(servers) > 1 and all(os.path.exists(f"/proc/{pid}/exe") for pid in servers):
                seen.append(servers)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not seen, f"two servers on one store: {seen}"


def local_server(place: Path) -> LocalServer:
    return LocalServer(place, durability="process", binary=None)


def check(place: Path, acknowledged: list[int]) -> None:
    """A new user gets a server, and finds every acknowledged value once; then everything ends."""
    server = local_server(place)
    url = server.acquire(TIMEOUT).url
    found = asyncio.run(read(url)) if acknowledged else []
    server.release()
    lost = set(acknowledged) - set(found)
    assert not lost, f"lost {sorted(lost)}"
    assert len(found) == len(set(found))
    wait_gone(place)


def test_starters_at_the_same_moment_share_one_server(place: Path, dice: random.Random) -> None:
    acknowledged: list[int] = []
    for turn in range(rounds(5)):
        users = [LocalUser(place) for _ in range(3)]
        for user in users:
            user.ask("hello")  # all have started up, so that what follows is at the same moment
        for user in users:
            user.tell("acquire", TIMEOUT)
        addresses = {tuple(user.answer()) for user in users}
        assert len(addresses) == 1
        acknowledged += users[0].ask("append", next(iter(addresses))[0], [turn])
        for user in dice.sample(users, 3):
            if dice.random() < 0.5:
                user.kill()
            else:
                user.end()
        if dice.random() < 0.5:
            wait_gone(place)
    check(place, acknowledged)


def test_a_starter_killed_at_any_moment_leaves_the_next_one_free(place: Path, dice: random.Random) -> None:
    acknowledged: list[int] = []
    for turn in range(rounds(12)):
        user = LocalUser(place)
        user.ask("hello")
        user.tell("acquire", TIMEOUT)
        time.sleep(dice.uniform(0, 0.06))
        user.kill()
        if dice.random() < 0.3:
            for pid in processes(place)["watcher"]:
                signal_quietly(pid, signal.SIGKILL)
        if dice.random() < 0.7:
            server = local_server(place)
            acknowledged += asyncio.run(append(server.acquire(TIMEOUT).url, [turn]))
            server.release()
    check(place, acknowledged)


def test_a_user_who_arrives_while_the_server_is_stopped_gets_one(place: Path, dice: random.Random) -> None:
    acknowledged: list[int] = []
    server = local_server(place)
    server.acquire(TIMEOUT)
    for turn in range(rounds(30)):
        server.release()
        time.sleep(dice.choice([0, dice.uniform(0, 0.005), dice.uniform(0, 0.05)]))
        server = local_server(place)
        acknowledged += asyncio.run(append(server.acquire(TIMEOUT).url, [turn]))
        assert is_locked(place / "watcher.lock")
    server.release()
    check(place, acknowledged)


def test_a_server_that_hangs_is_killed_after_its_last_user(place: Path) -> None:
    server = local_server(place)
    address = server.acquire(TIMEOUT)
    acknowledged = asyncio.run(append(address.url, list(range(100))))
    pause(address.pid)
    server.release()
    # Whoever comes before the watcher has noticed is a user of the hung server, and is told so.
    wait_until(lambda: is_locked(place / "users.lock"), TIMEOUT, "the watcher holds users.lock")
    check(place, acknowledged)


def test_forks_while_starting_keep_no_lock(place: Path, dice: random.Random) -> None:
    children: list[int] = []
    hold, let_go = os.pipe()
    try:
        for _ in range(rounds(6)):
            server = local_server(place)
            starting = threading.Thread(target=server.acquire, args=(TIMEOUT,))
            starting.start()
            while starting.is_alive():
                time.sleep(dice.uniform(0, 0.01))
                child = os.fork()
                if child == 0:
                    os.close(let_go)
                    os.read(hold, 1)  # lives on with whatever it inherited
                    os._exit(0)
                children.append(child)
            server.ensure(TIMEOUT)
            server.release()
            wait_gone(place)
    finally:
        os.close(let_go)
        for child in children:
            os.waitpid(child, 0)
        os.close(hold)


def signal_quietly(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Everything:
    """Users, server and watcher of one directory, with one random thing done to them at a time."""

    def __init__(self, place: Path, dice: random.Random) -> None:
        self.place = place
        self.dice = dice
        self.users: list[LocalUser] = []
        self.acknowledged: list[int] = []
        self.next_value = 0

    def user_comes(self) -> None:
        if len(self.users) < 3:
            self.users.append(LocalUser(self.place))
            self.users[-1].ask("acquire", TIMEOUT)

    def user_goes(self) -> None:
        if self.users:
            self.users.pop(self.dice.randrange(len(self.users))).end()

    def user_is_killed(self) -> None:
        if self.users:
            self.users.pop(self.dice.randrange(len(self.users))).kill()

    def user_is_killed_while_it_comes(self) -> None:
        user = LocalUser(self.place)
        user.ask("hello")
        user.tell("acquire", TIMEOUT)
        time.sleep(self.dice.uniform(0, 0.05))
        user.kill()

    def server_is_killed(self) -> None:
        """Until it has ended: its lock lives for a moment longer than the signal takes, and whoever looks then finds it alive."""
        killed = processes(self.place)["server"]
        for pid in killed:
            signal_quietly(pid, signal.SIGKILL)
        wait_until(lambda: all(map(has_ended, killed)), TIMEOUT, "the killed server has ended")

    def watcher_is_killed(self) -> None:
        for pid in processes(self.place)["watcher"]:
            signal_quietly(pid, signal.SIGKILL)

    def everything_is_killed(self) -> None:
        for user in self.users:
            user.process.kill()
        self.watcher_is_killed()
        self.server_is_killed()
        while self.users:
            self.users.pop().kill()

    def records_are_appended(self) -> None:
        if not self.users:
            return
        url = self.dice.choice(self.users).ask("ensure", TIMEOUT)[0]
        killer = threading.Timer(self.dice.uniform(0, 0.05), self.server_is_killed)
        if self.dice.random() < 0.3:
            killer.start()
        for _ in range(20):
            value, self.next_value = self.next_value, self.next_value + 1
            try:
                self.acknowledged += asyncio.run(append(url, [value], seconds=2.0))
            except (nats.errors.Error, OSError):
                break  # unknown: it may be there or not
        killer.cancel()
        if killer.ident is not None:
            killer.join()

    def all_ensure_at_once(self) -> None:
        for user in self.users:
            user.tell("ensure", TIMEOUT)
        assert len({tuple(user.answer()) for user in self.users}) <= 1


def test_anything_may_happen_in_any_order(place: Path, dice: random.Random) -> None:
    everything = Everything(place, dice)
    acts = [
        *[everything.user_comes] * 3,
        *[everything.records_are_appended] * 4,
        *[everything.all_ensure_at_once] * 2,
        everything.user_goes,
        everything.user_is_killed,
        everything.user_is_killed_while_it_comes,
        everything.server_is_killed,
        everything.watcher_is_killed,
        everything.everything_is_killed,
    ]
    try:
        for _ in range(rounds(60)):
            dice.choice(acts)()
        for user in everything.users:
            user.ask("ensure", TIMEOUT)
            user.end()
    finally:
        for user in everything.users:
            user.kill()
    check(place, everything.acknowledged)
    assert inspect(place) is None
