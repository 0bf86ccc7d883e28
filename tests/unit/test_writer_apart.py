"""Records that writers may have died of: who decides, what a death means, and what is never taken for one."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from skialith.config import WRITER_DEATHS, WRITER_SUSPECT_DELIVERIES
from skialith.errors import StoreUnavailable
from skialith.records import Message
from skialith.stores.sqlite import SqliteStore
from skialith.writer import apart as writer_apart
from skialith.writer.apart import Apart, suspects
from skialith.writer.batch import Deadly, Endless
from skialith.writer.dead_letters import key_of

from ..fixtures.writer_fakes import NAMESPACE, Clock, FakeSource, World, message, seeds, seqs

OFTEN = WRITER_SUSPECT_DELIVERIES


class FakeApart(Apart):
    """Another process in name; ``deaths``: sequences that kill it, how often still, and whether it decodes them before."""

    def __init__(self) -> None:
        super().__init__(["writer", NAMESPACE, "", False])
        self.asked: list[int] = []
        self.deaths: dict[int, tuple[int, bool]] = {}
        self.answer: Any = True
        self.closed = 0

    def store(self, message: Message, source: Any) -> bool:
        seq = message.position.seq
        self.asked.append(seq)
        left, decodes = self.deaths.get(seq, (0, True))
        if left:
            self.deaths[seq] = left - 1, decodes
            raise Deadly("it died of SIGSEGV", decodes=decodes)
        if isinstance(self.answer, Exception):
            raise self.answer
        return bool(self.answer)

    def close(self) -> None:
        self.closed += 1


def world_of(often: set[int], count: int = 8, seed: int = 1) -> tuple[World, FakeApart]:
    apart = FakeApart()
    log = [message(seq)._replace(deliveries=OFTEN if seq in often else 1) for seq in range(1, count + 1)]
    return World(log, seed=seed, apart=apart), apart


def test_what_was_delivered_often_comes_last_and_is_stored_apart() -> None:
    world, apart = world_of({2, 5})
    world.drain.step()
    assert world.source.due == {}
    assert sorted(apart.asked) == [2, 5]
    assert world.database.stored_seqs() == [1, 3, 4, 6, 7, 8], "the other process stored the rest"
    assert [verb for verb, _ in world.journal] == ["pull", "commit", "ack", "ack", "ack"]


def test_what_the_other_process_only_survives_is_stored_here() -> None:
    world, apart = world_of({2, 5})
    apart.answer = False
    world.drain.step()
    assert world.source.due == {} and world.database.stored_seqs() == list(range(1, 9))
    world.check_order()


@pytest.mark.parametrize("decodes", [True, False])
def test_a_record_that_kills_again_and_again_is_a_dead_letter(decodes: bool) -> None:
    world, apart = world_of({2, 5})
    apart.answer = False
    apart.deaths[5] = (99, decodes)
    world.run_dry()
    assert apart.asked.count(5) == WRITER_DEATHS
    assert world.database.stored_seqs() == [1, 2, 3, 4, 6, 7, 8]
    (letter,) = world.database.letters.values()
    assert "SIGSEGV" in letter.error and letter.raw == message(5).data
    assert (letter.record is not None) == decodes
    assert decodes or letter.key == key_of(message(5)), "it is not even decoded"
    world.check_order()


def test_a_record_that_is_not_at_fault_is_never_given_up() -> None:
    """Whatever else kills it, as long as it does not do so each time in a row."""
    world, apart = world_of({2})
    apart.answer = False
    for _ in range(5):
        world.source.due.setdefault(2, 0.0)
        apart.deaths[2] = (WRITER_DEATHS - 1, True)
        world.run_dry()
    assert 2 in world.database.stored_seqs() and world.database.letters == {}


def test_a_database_that_is_away_says_nothing_of_a_record() -> None:
    world, apart = world_of({2})
    apart.answer = StoreUnavailable("away over there")
    world.database.error = lambda verb, of: StoreUnavailable("down") if world.clock.now < 1100 else None
    world.drain.on_pause = lambda: setattr(apart, "answer", False if world.clock.now >= 1100 else apart.answer)
    world.run_dry()
    assert world.database.stored_seqs() == list(range(1, 9)) and world.database.letters == {}
    world.check_order()


def test_a_record_that_does_not_end_waits_aside_and_is_not_given_up() -> None:
    world, apart = world_of({2})
    apart.answer = Endless("no end")
    world.run(lambda: len(apart.asked) >= 6)
    assert list(world.source.due) == [2] and world.database.letters == {}
    apart.answer = True
    world.run_dry()


@pytest.mark.parametrize("seed", seeds(5))
def test_the_count_alone_buries_nobody(seed: int) -> None:
    """Counts as high as you like, an outage, deaths by chance: healthy records are stored, those that kill are letters."""
    random = Random(seed)
    count = random.randrange(20, 300)
    often = set(random.sample(range(1, count + 1), random.randrange(10, count)))
    killers = set(random.sample(sorted(often), 3))
    world, apart = world_of(often, count, seed)
    apart.answer = False
    apart.deaths = {seq: (random.randrange(WRITER_DEATHS), True) for seq in often} | dict.fromkeys(killers, (99, True))
    world.database.error = lambda verb, of: (
        StoreUnavailable("down") if world.clock.now < 1030 and random.random() < 0.7 else None
    )
    world.run_dry(20_000)
    assert world.database.stored_seqs() == sorted(set(range(1, count + 1)) - killers)
    letters = [*world.database.letters.values(), *world.source.letters]
    assert {letter.position.seq for letter in letters} == killers
    world.check_order()


def test_those_behind_a_killer_come_first_every_other_time() -> None:
    log = [message(seq)._replace(deliveries=OFTEN) for seq in (1, 2, 3)]
    again = [each._replace(deliveries=OFTEN + 1) for each in log]
    assert {tuple(seqs(suspects(log))), tuple(seqs(suspects(again)))} == {(1, 2, 3), (3, 2, 1)}
    assert suspects([message(1)._replace(deliveries=OFTEN - 1)]) == []


# ---- with a real process


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(f"sqlite:///{tmp_path / 'apart.db'}")
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def apart(store: SqliteStore) -> Iterator[Apart]:
    made = Apart(["writer", NAMESPACE, store.url, False])
    yield made
    made.close()


def source() -> FakeSource:
    return FakeSource(Clock(), [], [])


def events(store: SqliteStore) -> list[str]:
    return [record.record_id for record, _ in store.events(NAMESPACE, "a", message(0).position, None, 100)]


def test_a_process_of_its_own_stores_records_and_their_bodies(apart: Apart, store: SqliteStore) -> None:
    log = source()
    log.bodies[2] = b"\xc4\x01x"
    assert apart.store(message(1), log)
    assert apart.store(message(2, body=None, manifest=(3, 1, b"d" * 16)), log)
    assert not apart.store(message(3, body=None, manifest=(3, 1, b"d" * 16)), log), "its body cannot be had"
    assert not apart.store(message(4, data=b"not a record"), log)
    assert apart.store(message(1), log), "once more"
    assert events(store) == ["e1", "e2"]
    assert log.body_reads == [2, 3]


def test_a_process_that_was_killed_between_two_records_is_nobodys_fault(apart: Apart, store: SqliteStore) -> None:
    assert apart.store(message(1), source())
    assert apart._process is not None
    apart._process.kill()
    apart._process.wait()
    assert apart.store(message(2), source())
    assert events(store) == ["e1", "e2"]


def test_one_that_is_slow_gives_signs_of_life_and_one_that_hangs_does_not(
    apart: Apart, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(slow: str) -> tuple[str, ...]:
        text = (
            "import sys, time; import skialith.apart; from skialith.writer.sinks import EventSink; "
            "skialith.apart._LIFE_SECONDS = 0.05; original = EventSink.write; "
            f"EventSink.write = lambda *of: ({slow}, original(*of)); skialith.apart.main(int(sys.argv[1]))"
        )
        return (sys.executable, "-c", text)

    words: list[str] = []
    receive = writer_apart.receive

    def remember(wire: socket.socket) -> list[Any]:
        frame = receive(wire)
        words.append(frame[0])
        return frame

    monkeypatch.setattr(writer_apart, "receive", remember)
    apart.command = program("time.sleep(0.5)")
    assert apart.store(message(1), source()) and events(store) == ["e1"]
    assert words[:3] == ["ready", "decoded", "alive"] and words[-1] == "stored"
    monkeypatch.setattr(writer_apart, "WRITER_APART_LONGEST_SECONDS", 0.0)
    with pytest.raises(Endless):
        apart.store(message(2), source())

    apart.command = program("3 ** 10 ** 8")  # which holds the GIL
    assert apart._ready() is not None and apart._wire is not None
    apart._wire.settimeout(1.0)
    with pytest.raises(Endless):
        apart.store(message(3), source())
    assert events(store) == ["e1"]


def test_a_process_that_cannot_be_started_leaves_it_to_the_writer(apart: Apart) -> None:
    apart.command = ("/nowhere/python",)
    assert not apart.store(message(1), source())
    apart.command = (sys.executable, "-c", "raise SystemExit(3)")
    assert not apart.store(message(1), source())


def test_a_database_that_is_away_is_said_so(tmp_path: Path) -> None:
    apart = Apart(["writer", NAMESPACE, f"sqlite:///{tmp_path / 'apart.db'}", False])  # without its tables
    with pytest.raises(StoreUnavailable, match="no such table"):
        apart.store(message(1), source())
    apart.close()


@pytest.mark.parametrize(
    ("die", "decodes"),
    [
        ("skialith.apart.decode = lambda *_: signal.raise_signal(signal.SIGSEGV)", False),
        ("EventSink.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", True),
    ],
)
def test_a_death_names_the_signal_and_how_far_it_came(
    apart: Apart, store: SqliteStore, die: str, decodes: bool
) -> None:
    program = (
        "import os, signal, sys; import skialith.apart; from skialith.writer.sinks import EventSink; "
        f"{die}; skialith.apart.main(int(sys.argv[1]))"
    )
    apart.command = (sys.executable, "-c", program)
    with pytest.raises(Deadly, match="died of SIG") as caught:
        apart.store(message(1), source())
    assert caught.value.decodes == decodes
    assert events(store) == []
