"""The drain's path, its judgement of failures, and a simulation of everything failing at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from skialith.config import (
    BACKOFF_LONGEST_SECONDS,
    WRITER_BATCH_BYTES,
    WRITER_BODY_READS,
    WRITER_GIVE_BACK_SECONDS,
    WRITER_WARN_SECONDS,
)
from skialith.errors import StoreConnectionLost, StoreDataError, StoreUnavailable, WalUnavailable
from skialith.records import Message, Record
from skialith.writer.batch import Batch
from skialith.writer.dead_letters import key_of

from ..fixtures.writer_fakes import NAMESPACE, FakeSource, SteppedDrain, World, message, seeds, seqs

DIGEST = b"d" * 16


def messages(count: int) -> list[Message]:
    return [message(seq) for seq in range(1, count + 1)]


def large(seq: int, size: int = 9) -> Message:
    return message(seq, body=None, manifest=(size, 1, DIGEST))


# ---- the path


def test_a_batch_is_pulled_committed_and_then_acknowledged() -> None:
    world = World(messages(5))
    world.drain.step()
    everything = [1, 2, 3, 4, 5]
    assert world.journal == [("pull", everything), ("commit", everything), ("ack", everything)]
    status = world.drain.status()
    assert (status.stored, status.batches, status.retries, status.database_ok) == (5, 1, 0, True)


def test_the_order_check_catches_an_acknowledgement_before_the_commit() -> None:
    class Canary(SteppedDrain):
        def settle(self, batch: Batch) -> None:
            self.ack(batch.messages)
            super().settle(batch)

    world = World(messages(5))
    world.drain.__class__ = Canary
    world.drain.step()
    with pytest.raises(AssertionError, match="before the commit"):
        world.check_order()


def test_progress_is_told_after_the_acknowledgement() -> None:
    left: list[int] = []
    source: list[FakeSource] = []
    world = World(messages(3), on_progress=lambda: left.append(len(source[0].due)))
    source.append(world.source)
    world.drain.step()
    assert left == [0]


def test_a_callback_that_fails_does_not_store_the_batch_again() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    world = World(messages(3), on_progress=fail)
    world.run_dry()
    assert [verb for verb, _ in world.journal].count("commit") == 1
    assert "ZeroDivisionError" in world.drain.status().last_error


def test_one_message_twice_in_one_batch_is_stored_once_and_both_are_acknowledged() -> None:
    world = World(messages(2))
    twice = [world.source.messages[1], world.source.messages[2], world.source.messages[1]._replace(reply="again")]
    world.source.pull = lambda *limits: twice  # type: ignore[method-assign]
    world.drain.step()
    assert world.database.stored_seqs() == [1, 2]
    assert world.journal[-1] == ("ack", [1, 2, 1])
    assert world.source.naks == []


# ---- poison


@pytest.mark.parametrize("seed", seeds(5))
def test_bisecting_finds_every_poison_record_and_stores_all_others(seed: int) -> None:
    random = Random(seed)
    count = random.randrange(1, 200)
    world = World(messages(count), seed=seed)
    world.database.poison = set(random.sample(range(1, count + 1), random.randrange(0, min(count, 9) + 1)))
    world.drain.step()
    assert world.source.due == {}
    good = sorted(set(range(1, count + 1)) - world.database.poison)
    assert world.database.stored_seqs() == good
    committed = [seq for verb, of in world.journal if verb == "commit" for seq in of]
    assert committed == sorted(committed), "halves are stored in the log's order"
    letters = list(world.database.letters.values())
    assert sorted(letter.position.seq for letter in letters) == sorted(world.database.poison)
    assert all(letter.error_code == 1366 and letter.sink == "writer" for letter in letters)
    assert all(letter.record is not None and letter.record.key == letter.key for letter in letters)
    assert world.drain.status().dead_letters == len(letters)
    assert world.drain.pauses == []
    world.check_order()


def test_a_refused_record_is_no_poison_while_the_database_refuses_a_probe() -> None:
    world = World(messages(1))
    world.database.poison = {1}
    world.database.error = lambda verb, of: (
        StoreUnavailable("read only") if verb == "probe" and world.clock.now < 1005 else None
    )
    world.run(lambda: bool(world.database.letters))
    assert world.clock.now >= 1005
    assert world.source.due == {}


def test_a_refused_record_is_tried_once_more_when_the_database_is_well_again() -> None:
    """What ailed the database may end between the record's try and the probe."""
    world = World(messages(3))
    world.database.poison = {2}

    def heal(verb: str, of: list[int]) -> None:
        if verb == "probe":
            world.database.poison.clear()

    world.database.error = heal
    world.drain.step()
    assert world.database.letters == {} and world.database.stored_seqs() == [1, 2, 3]
    world.check_order()


def test_a_record_whose_shape_is_refused_waits_aside_and_blocks_no_other() -> None:
    """A column was made narrower: small records pass, the probe among them, and no large one is to blame."""
    world = World(messages(64))
    world.database.poison = {23, 42}
    narrow = StoreUnavailable("well-formed ones are refused too")
    world.database.error = lambda verb, of: narrow if verb == "probe" and world.database.poison & {*of} else None
    world.run(lambda: sorted(world.source.due) == [23, 42])
    assert world.database.letters == {} and world.source.letters == []
    assert world.drain.status().aside == 2 and "well-formed" in world.drain.status().last_error
    world.database.poison.clear()
    world.run_dry()
    assert world.database.stored_seqs() == list(range(1, 65))
    assert world.drain.status().aside == 0
    world.check_order()


def test_a_message_that_does_not_decode_is_buried_at_once_and_its_neighbours_are_stored() -> None:
    bad = message(2, data=b"not a record")
    world = World([message(1), bad, message(3)])
    world.drain.step()
    assert world.database.stored_seqs() == [1, 3]
    letter = world.database.letters[key_of(bad)]
    assert (letter.record, letter.raw, letter.subject) == (None, b"not a record", bad.subject)
    assert letter.namespace == NAMESPACE
    assert "does not decode" in letter.error and letter.position == bad.position
    assert world.source.due == {}
    world.check_order()


def test_the_key_of_what_does_not_decode_depends_on_subject_and_position() -> None:
    one = message(1, data=b"x")
    assert len(key_of(one)) == 16
    assert len({key_of(one), key_of(message(2, data=b"x")), key_of(one._replace(subject="other"))}) == 3
    assert key_of(one) == key_of(one._replace(deliveries=9, reply="other", epoch=2))


@pytest.mark.parametrize(
    "error", [StoreDataError("1406", code=1406), RuntimeError("bug"), StoreUnavailable("no table")]
)
def test_a_letter_that_the_database_does_not_take_goes_to_the_log(error: Exception) -> None:
    world = World(messages(3))
    world.database.poison = {2}
    world.database.error = lambda verb, of: error if verb == "bury" else None
    world.drain.step()
    assert [letter.position.seq for letter in world.source.letters] == [2]
    assert world.source.letters[0].error_code == 1366, "the letter says why the record was refused, not the letter"
    assert world.source.due == {}
    world.check_order()


def test_a_letter_waits_while_the_database_is_away() -> None:
    world = World(messages(1))
    world.database.poison = {1}
    down = [True]
    # Away from the moment the record was found to be poison.
    world.database.error = lambda verb, of: (
        StoreUnavailable("down") if down[0] and (verb == "bury" or ("bury", [1]) in world.database.calls) else None
    )
    world.drain.on_pause = lambda: down.__setitem__(0, world.clock.now < 1003)
    world.run_dry()
    assert world.source.letters == []
    assert seqs_of_letters(world) == [1]
    world.check_order()


def test_a_letter_waits_while_neither_database_nor_log_takes_it() -> None:
    world = World(messages(1))
    world.database.poison = {1}
    world.database.error = lambda verb, of: StoreDataError("too long") if verb == "bury" else None
    world.source.bury_error = lambda: WalUnavailable("away") if world.clock.now < 1030 else None
    world.run(lambda: world.clock.now >= 1029)
    assert world.source.letters == [] and 1 in world.source.due
    world.run_dry()
    assert [letter.position.seq for letter in world.source.letters] == [1]
    world.check_order()


def seqs_of_letters(world: World) -> list[int]:
    return sorted(letter.position.seq for letter in world.database.letters.values())


# ---- transient failures


def test_a_transient_failure_tries_the_whole_batch_again() -> None:
    world = World(messages(4))
    world.database.error = lambda verb, of: StoreUnavailable("locked") if len(world.database.calls) <= 3 else None
    world.drain.step()
    assert [call for call in world.database.calls if call[0] == "write"] == [("write", [1, 2, 3, 4])] * 4
    status = world.drain.status()
    assert (status.retries, status.stored, status.batches, status.database_ok) == (3, 4, 1, True)
    assert "locked" in status.last_error and status.last_error_at is not None
    assert len(world.drain.pauses) == 3


def test_an_outage_is_logged_seldom_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    world = World(messages(600))
    end = world.clock.now + 5 * WRITER_WARN_SECONDS
    world.database.error = lambda verb, of: StoreUnavailable("down") if world.clock.now < end else None
    with caplog.at_level(logging.INFO, "skialith.writer"):
        world.run_dry()
    levels = Counter(record.levelname for record in caplog.records)
    assert 2 <= levels["WARNING"] <= 6
    assert levels["INFO"] == 1
    assert levels["ERROR"] == 0


def test_messages_are_given_back_and_the_database_is_asked_empty_handed() -> None:
    world = World(messages(4))
    world.database.error = lambda verb, of: StoreUnavailable("down") if world.clock.now < 1100 else None
    world.drain.step()
    pulls = [index for index, (verb, _) in enumerate(world.journal) if verb == "pull"]
    assert len(pulls) == 1, "one round holds on, gives back, and comes home when the database answers"
    assert world.source.naks == [([1, 2, 3, 4], 0.0)]
    gave_up = next(index for index, call in enumerate(world.database.calls) if call[0] == "ping")
    assert {verb for verb, _ in world.database.calls[gave_up:]} <= {"ping", "probe"}
    assert world.clock.now < 1100 + BACKOFF_LONGEST_SECONDS + 1
    assert not world.drain.held_anything()
    world.run_dry()
    assert world.database.stored_seqs() == [1, 2, 3, 4]
    world.check_order()


def test_messages_are_held_for_the_give_back_time_and_no_longer() -> None:
    world = World(messages(1))
    world.database.error = lambda verb, of: StoreUnavailable("down") if world.clock.now < 1100 else None
    held: list[float] = []
    world.drain.on_pause = lambda: held.append(world.clock.now) if not world.source.naks else None
    world.drain.step()
    assert abs(held[-1] - 1000 - WRITER_GIVE_BACK_SECONDS) <= BACKOFF_LONGEST_SECONDS


def test_a_try_that_hangs_counts_with_its_whole_length() -> None:
    world = World(messages(2))

    def hang(verb: str, of: list[int]) -> Exception | None:
        if world.clock.now >= 1100:
            return None
        world.clock.now += 30.0
        return StoreConnectionLost("read timeout")

    world.database.error = hang
    world.drain.step()
    assert world.source.naks[0] == ([1, 2], 0.0)
    assert [verb for verb, _ in world.database.calls].count("write") == 1, "one hanging try is enough to let go"


def test_the_status_says_that_the_database_is_away_until_it_answers() -> None:
    world = World(messages(1))
    seen: list[bool] = []
    world.database.error = lambda verb, of: StoreUnavailable("down") if world.clock.now < 1020 else None
    world.drain.on_pause = lambda: seen.append(world.drain.status().database_ok)
    world.drain.step()
    assert seen and not any(seen)
    assert world.drain.status().database_ok


def test_a_batch_that_loses_the_connection_twice_while_the_database_answers_is_halved() -> None:
    world = World(messages(8))
    lost = StoreConnectionLost("gone away")
    world.database.error = lambda verb, of: lost if verb == "write" and len(of) > 2 else None
    world.drain.step()
    writes = [of for verb, of in world.database.calls if verb == "write"]
    assert writes == [list(range(1, 9))] * 2 + [[1, 2, 3, 4], [1, 2], [3, 4], [5, 6, 7, 8], [5, 6], [7, 8]]
    assert world.database.stored_seqs() == list(range(1, 9))
    assert world.source.naks == [] and world.database.letters == {}
    world.check_order()


def test_a_lost_connection_does_not_halve_while_the_database_is_away() -> None:
    world = World(messages(8))
    world.database.error = lambda verb, of: StoreConnectionLost("gone away") if world.clock.now < 1002 else None
    world.drain.step()
    assert {len(of) for verb, of in world.database.calls if verb == "write"} == {8}


@pytest.mark.parametrize(
    "error", [StoreConnectionLost("gone away"), StoreUnavailable("8025 entry too large"), TypeError("bug")]
)
def test_a_record_that_alone_cannot_be_stored_waits_aside_and_blocks_no_other(error: Exception) -> None:
    world = World(messages(64))
    world.database.error = lambda verb, of: error if verb == "write" and 23 in of else None
    world.run(lambda: list(world.source.due) == [23])
    assert world.clock.now < 1000 + 3 * WRITER_GIVE_BACK_SECONDS
    assert world.database.stored_seqs() == [seq for seq in range(1, 65) if seq != 23]
    assert world.database.letters == {} and world.source.letters == []
    assert world.drain.status().aside == 1

    before = len(world.source.naks)
    world.run(lambda: len(world.source.naks) >= before + 6)
    delays = [delay for of, delay in world.source.naks if of == [23]]
    assert delays == sorted(delays) and delays[-1] > 20 * delays[0], "given back for a growing while"

    world.source.messages[99] = message(99)
    world.source.due[99] = 0.0
    began = world.clock.now
    world.run(lambda: 99 not in world.source.due)
    assert world.clock.now - began < 1.0, "others do not wait for it"

    world.database.error = lambda verb, of: None
    world.run_dry()
    assert 23 in world.database.stored_seqs()
    assert world.drain.status().aside == 0
    world.check_order()


def test_a_known_record_is_tried_alone_and_last_when_it_returns() -> None:
    world = World(messages(8))
    world.database.error = lambda verb, of: StoreConnectionLost("gone away") if verb == "write" and 3 in of else None
    world.run(lambda: list(world.source.due) == [3])
    for seq in (20, 21):
        world.source.messages[seq] = message(seq)
        world.source.due[seq] = 0.0
    world.source.due[3] = 0.0
    world.database.calls.clear()
    world.drain.step()
    assert [of for verb, of in world.database.calls if verb == "write"] == [[20, 21], [3]]


def test_when_nothing_can_be_stored_although_a_probe_is_taken_the_tries_stay_few_and_nothing_is_buried() -> None:
    world = World(messages(512))
    missing = StoreUnavailable("1146 no such table agent_events")
    world.database.error = lambda verb, of: missing if verb == "write" else None
    world.run(lambda: world.clock.now > 1600)
    writes = [of for verb, of in world.database.calls if verb == "write"]
    assert len(writes) < 600 * 12, "a few statements per pause, not a storm"
    assert len(writes) / (world.clock.now - 1000) < 12
    assert world.database.letters == {} and len(world.source.due) == 512
    world.database.error = lambda verb, of: None
    world.run_dry()
    assert world.database.stored_seqs() == list(range(1, 513))
    world.check_order()


# ---- large records


def test_a_stored_record_whose_body_is_trimmed_is_acknowledged_without_a_write() -> None:
    world = World([large(1), message(2)])
    head = Record(1, NAMESPACE, "a", "e1", b"", 0, "", 0, 0, None)
    key = world.drain.decode(message(1)).key  # type: ignore[union-attr]
    world.database.rows[key] = head
    world.drain.step()
    assert world.source.due == {}
    assert [of for verb, of in world.database.calls if verb == "write"] == [[2]]
    assert world.drain.status().stored == 1 and world.database.letters == {}


def test_a_body_that_stays_missing_is_believed_after_some_reads_and_then_a_dead_letter() -> None:
    world = World([message(1), large(2), message(3)])
    world.drain.step()
    assert world.database.stored_seqs() == [1, 3]
    world.run_dry()
    letter = next(iter(world.database.letters.values()))
    assert letter.record is not None and letter.record.manifest is not None and letter.record.body is None
    sights = [of for of, _ in world.source.naks]
    assert sights == [[2]] * (WRITER_BODY_READS - 1)
    world.check_order()


def test_a_body_that_was_missing_for_a_moment_is_stored() -> None:
    world = World([large(1)])
    world.drain.step()
    assert 1 in world.source.due
    world.source.bodies[1] = b"x" * 9
    world.run_dry()
    assert next(iter(world.database.rows.values())).body == b"x" * 9
    assert world.database.letters == {}


def test_a_log_that_is_away_while_a_body_is_read_stops_only_that_record() -> None:
    world = World([message(1), large(2), message(3)])
    reads: list[float] = []

    def read_body(record: Record) -> bytes:
        reads.append(world.clock.now)
        if world.clock.now < 1003:
            raise WalUnavailable("away")
        return b"x" * 9

    world.source.read_body = read_body  # type: ignore[method-assign]
    world.run_dry()
    assert world.database.stored_seqs() == [1, 2, 3]
    assert world.drain.status().database_ok and world.database.letters == {}
    assert len(reads) > 2


def test_large_bodies_are_held_one_batch_at_a_time() -> None:
    size = WRITER_BATCH_BYTES // 2 + 1
    world = World([large(seq, size) for seq in range(1, 8)])
    world.source.bodies = dict.fromkeys(range(1, 8), b"x" * size)
    world.drain.step()
    batches = [[1, 2], [3, 4], [5, 6], [7]]
    assert [of for verb, of in world.database.calls if verb == "write"] == batches
    assert [of for verb, of in world.journal if verb == "ack"] == batches


# ---- the log is away, and bugs


def test_a_log_that_cannot_be_read_is_said_once_and_tried_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    world = World(messages(2))
    world.source.pull_error = lambda: WalUnavailable("no server") if world.clock.now < 1020 else None
    with caplog.at_level(logging.INFO, "skialith.writer"):
        world.run_dry()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert world.database.stored_seqs() == [1, 2]
    assert world.drain.status().database_ok
    assert all(pause <= BACKOFF_LONGEST_SECONDS for pause in world.drain.pauses)


def test_a_bug_while_writing_is_shown_and_the_batch_tried_again() -> None:
    world = World(messages(2))
    bugs = [KeyError("surprise"), AttributeError("surprise")]
    world.database.error = lambda verb, of: bugs.pop() if bugs and verb == "write" else None
    world.run_dry()
    assert world.database.stored_seqs() == [1, 2]
    assert "surprise" in world.drain.status().last_error and world.drain.status().retries == 2


# ---- everything at once


class Weather:
    """Failures drawn at random until ``calm`` is set; data errors only for what is poison."""

    def __init__(self, world: World, random: Random) -> None:
        self.world, self.random, self.calm = world, random, False
        self.stubborn = {seq: random.randrange(1, 12) for seq in random.sample(sorted(world.source.due), 5)}
        self.down_until = 0.0
        world.database.error = self.database
        world.source.pull_error = lambda: WalUnavailable("away") if self.chance(0.05) else None
        world.source.bury_error = lambda: WalUnavailable("away") if self.chance(0.5) else None
        world.source.lose_ack = lambda: self.chance(0.2)

    def chance(self, probability: float) -> bool:
        return not self.calm and self.random.random() < probability

    def database(self, verb: str, of: Sequence[int]) -> Exception | None:
        now = self.world.clock.now
        for seq in self.stubborn.keys() & set(of):
            if verb == "write" and self.stubborn[seq] > 0:
                self.stubborn[seq] -= 1
                return StoreConnectionLost(f"lost at {seq}")
        if self.chance(0.02):
            self.down_until = now + self.random.uniform(0.1, 40.0)
        if not self.calm and now < self.down_until:
            return StoreUnavailable("down")
        if verb == "bury" and self.chance(0.3):
            return StoreDataError("the letter too")
        if self.chance(0.05):
            return self.random.choice([StoreUnavailable("deadlock"), StoreConnectionLost("reset"), RuntimeError("bug")])
        return None


@pytest.mark.parametrize("seed", seeds(12))
def test_whatever_fails_every_record_is_stored_once_or_a_dead_letter(seed: int) -> None:
    random = Random(seed)
    count = random.randrange(20, 900)
    log = messages(count)
    undecodable = set(random.sample(range(1, count + 1), random.randrange(0, 4)))
    log = [message(m.position.seq, data=b"?") if m.position.seq in undecodable else m for m in log]
    world = World(log, seed=seed)
    world.database.poison = set(random.sample(range(1, count + 1), random.randrange(0, 8))) - undecodable
    weather = Weather(world, random)
    dead = world.database.poison | undecodable
    world.run(lambda: world.clock.now > 1300 or not world.source.due)
    weather.calm = True
    world.run_dry(steps=20_000)
    assert world.database.stored_seqs() == sorted(set(range(1, count + 1)) - dead)
    letters = list(world.database.letters.values()) + world.source.letters
    assert {letter.position.seq for letter in letters} == dead
    assert not world.drain.held_anything()
    world.check_order()


def test_the_fake_log_delivers_again_what_nobody_settled() -> None:
    world = World(messages(1))
    first = world.source.pull(1, 1, 0.0, 0.0)
    assert world.source.pull(1, 1, 0.0, 0.0) == []
    world.clock.now += FakeSource.ack_wait
    assert world.source.pull(1, 1, 0.0, 0.0) == first
    assert seqs(first) == [1]
