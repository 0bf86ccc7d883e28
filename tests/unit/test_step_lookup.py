"""A recorded step is found by its key wherever it stands, also when it moves between any two questions."""

from __future__ import annotations

from typing import Any

import pytest

from skialith.errors import BodyMissing, StoreUnavailable
from skialith.history import NothingStored, StepPast
from skialith.records import Manifest, Position, Record
from skialith.stores.base import StepEntry

from ..fixtures.stores import NAMESPACE, event, step

PLACES = ("log", "buried", "store")
MANIFEST = Manifest(7, 1, b"")


class World:
    """A log, its dead letters and a database, which hold records by key; ``move_at``: something happens before that question."""

    def __init__(self, *, large: bool = False) -> None:
        self.places: dict[str, dict[bytes, Record]] = {place: {} for place in PLACES}
        self.large = large
        self.away = False
        self.stored_something = True
        self.questions = 0
        self.move: tuple[int, bytes, str, str] | None = None

    def past(self) -> StepPast:
        return StepPast(self, lambda: Database(self), NAMESPACE, "agent", 1.0)

    def asked(self) -> None:
        self.questions += 1
        if self.move is not None and self.questions == self.move[0]:
            _, key, source, target = self.move
            record = self.places[source].pop(key)
            self.places[target].setdefault(key, record)

    # ---- the log

    def events(self, agent_id: str, after: Position, *_: Any, **__: Any) -> Any:
        self.asked()
        found = sorted(self.places["log"].values(), key=lambda record: record.position)
        page = [self._head(record) for record in found if record.position > after][:2]
        return page, bool(page) and page[-1].position < found[-1].position

    def _head(self, record: Record) -> Record:
        return record._replace(body=None, manifest=MANIFEST) if self.large else record

    def with_body(self, record: Record, deadline: float) -> Record:
        self.asked()
        if record.key not in self.places["log"]:
            raise BodyMissing("trimmed")
        return self.places["log"][record.key]

    def dead_records(self, agent_id: str, kind: str, deadline: float) -> list[Record]:
        self.asked()
        return list(self.places["buried"].values())

    def anything_stored(self, timeout: float) -> bool:
        return self.stored_something

    def end(self, deadline: float) -> Position:
        raise NotImplementedError

    def last_checkpoint(self, agent_id: str, deadline: float) -> Record | None:
        raise NotImplementedError


class Database(NothingStored):
    """The world's database, of which one event is asked at a time."""

    def __init__(self, world: World) -> None:
        self.world = world

    def event(self, *asked: object) -> Record | None:
        self.world.asked()
        if self.world.away:
            raise StoreUnavailable("away")
        _, _, key = asked
        assert isinstance(key, bytes)
        return self.world.places["store"].get(key)

    def steps(self, *_: object, **__: object) -> list[StepEntry]:
        raise AssertionError("a lookup must not read all steps")


@pytest.mark.parametrize(("large", "target"), [(False, "buried"), (False, "store"), (True, "store")])
@pytest.mark.parametrize("n", range(12))
def test_it_is_found_while_it_moves(large: bool, target: str, n: int) -> None:
    world = World(large=large)
    wanted = step(9, body=b"result")
    others = [step(number) for number in range(1, 5)]
    world.places["log"] = {record.key: record for record in [*others, wanted]}
    world.move = (n, wanted.key, "log", target)
    found = world.past().lookup(wanted.key, "s9")
    assert found is not None and (found.body, found.position) == (b"result", wanted.position)


def test_where_it_stands_costs_what_it_must() -> None:
    world = World()
    wanted = step(1)
    world.places["store"][wanted.key] = wanted
    world.places["log"] = {record.key: record for record in (step(n) for n in range(2, 40))}
    assert world.past().lookup(wanted.key, "s1") is not None
    assert world.questions == 1
    assert world.past().lookup(step(99).key, "s99") is None


def test_the_row_of_an_earlier_record_counts() -> None:
    world = World()
    first, again = step(1, step_id="s", body=b"first"), step(5, step_id="s", body=b"again")
    world.places["log"][again.key] = again
    found = world.past().lookup(first.key, "s")
    assert found is not None and found.body == b"again"
    world.places["store"][first.key] = first
    found = world.past().lookup(first.key, "s")
    assert found is not None and found.body == b"first"


def test_while_the_database_is_away() -> None:
    world = World()
    wanted, buried = step(1), step(2)
    world.places["log"][wanted.key] = wanted
    world.places["buried"][buried.key] = buried
    world.away = True
    for record in (wanted, buried, step(3)):
        with pytest.raises(StoreUnavailable, match="call again when the database is back"):
            world.past().lookup(record.key, record.record_id)
    world.stored_something = False
    for record, there in ((wanted, True), (buried, True), (step(3), False)):
        assert (world.past().lookup(record.key, record.record_id) is not None) is there


def test_what_is_lost_is_said() -> None:
    world = World()
    lost = step(1)._replace(body=None, manifest=MANIFEST)
    world.places["store"][lost.key] = lost
    with pytest.raises(BodyMissing, match="'s1'"):
        world.past().lookup(lost.key, "s1")
    with pytest.raises(BodyMissing, match="'s7'"):
        world.past().find(step(7).key, "s7")


def test_an_event_that_only_says_so_is_not_found() -> None:
    world = World()
    pretender = event(1, event_id="s1", event_type="step")
    world.places["log"][pretender.key] = pretender
    assert world.past().lookup(step(1).key, "s1") is None
