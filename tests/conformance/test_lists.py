"""What every store lists of a whole namespace, on real databases: agents by prefix, traces by filter, dead letters in order."""

from __future__ import annotations

import itertools
import json
import os
import random
from typing import Any

import pytest

from skialith.config import PAYLOAD_PART_BYTES
from skialith.records import NOWHERE, Position, Trace
from skialith.stores import Store, read
from skialith.stores.base import LetterPlace
from skialith.stores.sql import SqlStore

from ..fixtures.stores import NAMESPACE, TIME_NS, Run, checkpoint, event, letter, manifest, noise, trace
from .test_store import Meddled

BIG = 2 * PAYLOAD_PART_BYTES + 17
SEED = int(os.environ.get("SKIALITH_RUN_SEED", "1"))
PREFIXED = [
    "a", "a%", "a%b", "a_", "a_b", "ab", "a\0", "a\x7f", "aé", "aa", "A", "b", "%", "%%", "_", "_x", "\\", "é", "é\u0301", "éa",
    "日本", "日本語", "日\ud7ff", "日\ue000", "🦜", "🦜🦜", "\ud7ff", "\ud7ffz", "\ue000",
    "\U0010ffff", "\U0010ffffx", "\U0010ffff\U0010ffff",
]  # fmt: skip


def all_traces(store: Store, limit: int, **options: Any) -> list[Trace]:
    """The pages of a list put together; none is longer than ``limit``."""
    found: list[Trace] = []
    after: Position | None = options.pop("after", NOWHERE)
    for _ in range(10_000):
        assert after is not None
        page, following = store.traces(NAMESPACE, after=after, limit=limit, **options)
        assert len(page) <= limit
        found += page
        if following is None:
            return found
        assert following > after
        after = following
    raise AssertionError("the pages have no end")


# ---- agents


@pytest.mark.parametrize("prefix", [*PREFIXED, "", "zz", "日\ud7ffx"])
def test_agents_by_prefix(store: Store, prefix: str) -> None:
    for n, name in enumerate(PREFIXED, 1):
        if n % 3 == 0:
            store.write_dead_letter(letter(event(n, agent=name)))
        else:
            store.write_records([event(n, agent=name) if n % 3 == 1 else checkpoint(n, agent=name)])
    expected = sorted((name for name in PREFIXED if name.startswith(prefix)), key=str.encode)
    assert [agent.agent_id for agent in store.agents(NAMESPACE, prefix=prefix, limit=1000)] == expected
    for limit in (1, 3):
        found: list[str] = []
        while page := store.agents(NAMESPACE, after=found[-1] if found else "", prefix=prefix, limit=limit):
            assert len(page) <= limit
            found += [agent.agent_id for agent in page]
        assert found == expected
    for after in ("a", "é", "\U0010ffff", "zzz"):
        found = [agent.agent_id for agent in store.agents(NAMESPACE, after=after, prefix=prefix, limit=1000)]
        assert found == [name for name in expected if name.encode() > after.encode()]


# ---- traces


def some_traces(count: int, chance: random.Random) -> list[Trace]:
    """Traces of a few agents and types, in order of position; some share a time, and sequences start again half way."""
    made = []
    time_ns = TIME_NS
    for n in range(1, count + 1):
        time_ns += chance.choice((0, 1, 1000)) + (5 if n == count // 2 else 0)
        made.append(
            trace(
                n if n < count // 2 else n - count // 2 + 1,
                agent=chance.choice(("a", "a ", "b", "🦜")),
                event_id=f"e{n}",
                event_type=chance.choice(("thought", "thought ", "Thought", "", "tool_call", "🦜" * 255)),
                payload=f'{{"n":{n},"s":"é"}}',
                time_ns=time_ns,
            )
        )
    return made


def test_traces_come_back_in_pages_under_any_filter(store: Store) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    wrote = some_traces(80, chance)
    store.write_traces(chance.sample(wrote, len(wrote)))
    store.write_traces([trace(1, namespace="other")])
    normal = [made._replace(payload_json="") for made in wrote]
    texts = {made.key: made.payload_json for made in wrote}
    for agent_id, event_type in itertools.product((None, "a", "a ", "c"), (None, "thought", "thought ", "", "x")):
        after = chance.choice((NOWHERE, wrote[20].position, wrote[-1].position))
        until_ns = chance.choice((None, wrote[50].position.time_ns, 1))
        expected = [
            made
            for made in normal
            if agent_id in (None, made.agent_id)
            and event_type in (None, made.event_type)
            and made.position > after
            and (until_ns is None or made.position.time_ns < until_ns)
        ]
        for limit in (1, 7, max(1, len(expected)), 1000):
            for scanned in (None, 1, 5):
                found = all_traces(
                    store,
                    limit,
                    agent_id=agent_id,
                    event_type=event_type,
                    after=after,
                    until_ns=until_ns,
                    max_scanned=scanned,
                )
                assert [made._replace(payload_json="") for made in found] == expected
                assert all(same_json(made.payload_json, texts[made.key]) for made in found)


def same_json(one: str, other: str) -> bool:
    """MySQL writes JSON with spaces of its own."""
    return bool(json.loads(one) == json.loads(other))


def test_a_page_of_traces_ends_when_it_is_full(store: Store) -> None:
    sizes = (10, 900, 10, 2000, 5, 5)
    wrote = [trace(n, payload='"' + "x" * size + '"') for n, size in enumerate(sizes, 1)]
    store.write_traces(wrote)
    pages = []
    after: Position | None = NOWHERE
    while after is not None:
        page, after = store.traces(NAMESPACE, after=after, max_bytes=900)
        pages.append([made.position.seq for made in page])
    assert pages == [[1, 2], [3, 4], [5, 6]]
    assert store.traces(NAMESPACE, limit=6) == (wrote, None)
    assert store.traces(NAMESPACE, limit=5) == (wrote[:5], wrote[4].position)


def test_a_scan_of_an_agent_ends_without_a_find(store: Store) -> None:
    wrote = [trace(n, event_type="rare" if n in (6, 20) else "common") for n in range(1, 21)]
    store.write_traces(wrote)
    after: Position | None = NOWHERE
    pages = []
    while after is not None:
        page, after = store.traces(NAMESPACE, agent_id="agent", event_type="rare", after=after, max_scanned=5)
        pages.append([made.position.seq for made in page])
    assert pages == [[], [6], [], [20], []]


@pytest.mark.parametrize("us", [0, -1, 1, 253_402_300_799_999_999, -30_610_224_000_000_000])
def test_times_of_traces_come_back_to_the_microsecond(store: Store, us: int) -> None:
    wrote = trace(1)._replace(created_us=us)
    store.write_traces([wrote])
    assert [made.created_us for made in store.traces(NAMESPACE)[0]] == [us]


# ---- one event


@pytest.mark.parametrize("body", [b"small", noise(BIG, 1)], ids=["small", "large"])
def test_an_event_by_its_key(store: Store, body: bytes) -> None:
    wrote, dead = event(1, body=body), event(2, body=body)
    both, lost = event(3, body=body), event(4)._replace(body=None, manifest=manifest())
    store.write_records([wrote, both, event(5), event(6, agent="another")])
    for record in (dead, both._replace(body=b"other"), lost):
        store.write_dead_letter(letter(record))
    for record in (wrote, dead, both, lost):
        assert store.event(NAMESPACE, "agent", record.key) == record
    assert store.event(NAMESPACE, "another", wrote.key) is None
    assert store.event("other", "agent", wrote.key) is None
    assert store.event(NAMESPACE, "agent", os.urandom(16)) is None


def test_neither_checkpoints_nor_traces_are_found_as_events(store: Store) -> None:
    one, two, three = checkpoint(1), checkpoint(2), event(3)
    store.write_records([one])
    store.write_dead_letter(letter(two))
    store.write_dead_letter(letter(three, sink="trace_ingest"))
    for record in (one, two, three):
        assert store.event(NAMESPACE, "agent", record.key) is None


@pytest.mark.parametrize("body", [b"small", noise(BIG, 1)], ids=["small", "large"])
@pytest.mark.parametrize("n", range(1, 6))
def test_an_event_that_is_replayed_between_two_queries_is_found(store: Store, n: int, body: bytes) -> None:
    assert isinstance(store, SqlStore)
    wrote = event(1, body=body)
    store.write_dead_letter(letter(wrote))
    with store.reading() as session:
        meddled = Meddled(session, n, lambda: store.replay_dead_letter(letter(wrote), wrote, None))
        assert read.event(meddled, (NAMESPACE, "agent"), wrote.key) == wrote


# ---- dead letters


def test_dead_letters_in_pages_of_any_length(store: Store) -> None:
    # Both sinks gave up the same message, and two messages share a position.
    wrote = [
        letter(event(n, key=bytes([key]) * 16), sink=sink)
        for n, sink, key in itertools.product((1, 2, 3), ("trace_ingest", "writer"), (0, 1, 255))
    ]
    for one in random.Random(SEED).sample(wrote, len(wrote)):
        store.write_dead_letter(one)
    # The first of a sink and key wins, so of each there is one.
    expected = store.dead_letters(NAMESPACE)
    places = [LetterPlace(one.position, one.sink, one.key) for one in expected]
    assert len(places) == 6 and places == sorted(places)
    for whole, limit in itertools.product((True, False), range(1, 8)):
        found: list[Any] = []
        while page := store.dead_letters(
            NAMESPACE, after=places[len(found) - 1] if found else None, limit=limit, whole=whole
        ):
            assert len(page) <= limit
            found += page
        assert found == [one if whole else without_payloads(one) for one in expected]


def without_payloads(one: Any) -> Any:
    return one._replace(raw=b"", record=one.record and one.record._replace(body=None))


def test_dead_letters_without_their_payloads(store: Store, sql: Run) -> None:
    wrote = [letter(event(1, body=noise(BIG, 1)), raw=noise(BIG, 2)), letter(None, n=2), letter(event(3))]
    for one in wrote:
        store.write_dead_letter(one)
    sql("DELETE FROM payload_parts")  # they are not read
    assert store.dead_letters(NAMESPACE, whole=False) == [without_payloads(one) for one in wrote]


def test_migration_4_on_a_schema_that_has_a_part_of_it(store: Store, sql: Run) -> None:
    drop = "DROP INDEX agent_traces_by_{}" if store.name == "sqlite" else "ALTER TABLE agent_traces DROP KEY by_{}"
    for names in (("type",), ("position",), ("type", "position"), ()):
        for name in names:
            sql(drop.format(name))
        sql("DELETE FROM skialith_migrations WHERE version = 4")
        assert store.migrate() == [4]
        store.traces(NAMESPACE)
        store.traces(NAMESPACE, event_type="thought")
