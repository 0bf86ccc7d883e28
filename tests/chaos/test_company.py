"""Writers in bad company: a database that is ill, a writer without a route, COMMITs that nobody answers, deadlocks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import MySQLdb
import pytest

from tests.fixtures.mariadb import MariaDB
from tests.fixtures.mysql_proxy import MySqlProxy
from tests.fixtures.nats import wait_until

from . import outside
from .company import FAULTS, HASTY, NOTICE_SECONDS, OFF, Database, Fault, Log, examined, read_only, server, wait_drained
from .conftest import Report
from .evidence import APPENDS
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos
ACK_WAIT = 1.0
"""Seconds after which a message that nobody settles is delivered again, in the test of routes; so it shows soon."""


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    with server(tmp_path_factory.mktemp("company")) as each:
        yield each


@pytest.fixture
def database(own_server: MariaDB) -> Iterator[Database]:
    each = Database(own_server)
    yield each
    each.close()


@pytest.fixture
def company(
    tmp_path: Path, nats_url: str, database: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A world on that database; the test reads it with more rights than its children have, and is as hasty as they are."""
    for path, value in HASTY.items():
        monkeypatch.setattr(f"skialith.{path}", value)
    with World(tmp_path, nats_url, database.admin_url, seed) as each:
        yield each


def writers(world: World, *urls: str, **given: Any) -> list[Child]:
    """A hasty writer on each URL, ready."""
    settings = given.pop("settings", {})
    made = [
        world.spawn("write", "writer", limits=HASTY, settings={**settings, "database_url": url}, **given)
        for url in urls
    ]
    for child in made:
        child.wait_ready()
    return made


def test_whatever_ails_the_database(company: World, database: Database, report: Report) -> None:
    """Both writers name the cause and what to do, callers notice nothing, and all is stored when it is over."""
    world, url = company, database.url()
    with database.in_one_file():
        pair = writers(world, url, url)
    agents = world.spawn(agents=["one", "two"], batches=0.1, pace=0.3, settings={**OFF, "database_url": url})
    browser = world.spawn("browse", "browser", agents=["one"], pace=0.3, settings={**OFF, "database_url": url})
    for child in (agents, browser):
        child.wait_ready()
    agents.wait_writes(10)
    chosen = (world.dice.sample(FAULTS, len(FAULTS)) * rounds(1))[: rounds(5)]
    for fault in chosen:
        one_fault(world, database, fault, pair)
        agents.wait_writes(5)
    for child in (agents, browser, *pair):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("24 whatever ails the database of two writers", len(chosen), verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)


def one_fault(world: World, database: Database, fault: Fault, pair: list[Child]) -> None:
    logs = [Log(child) for child in pair]
    with cast("AbstractContextManager[None]", fault.happen(database)):
        for log in logs:
            log.wait_for(fault.said)
        found = " ".join(examined(world, database.url()))
        assert re.search(fault.said, found), f"{fault.name}: the doctor finds {found}"
    print(f"{fault.name}: all is stored {wait_drained(world):.1f} s after it is over")


# ---- routes


class Route:
    """Where one writer is sent: a proxy to the database that may lead nowhere."""

    def __init__(self, proxy: MySqlProxy, database: Database) -> None:
        self.proxy = proxy
        self.url = database.url(proxy.port)

    def fail(self, how: str) -> None:
        """``"refuse"``: a closed port. ``"swallow"``: everything is taken and nothing comes back, not even an end."""
        if how == "refuse":
            self.proxy.refuse()
            self.proxy.cut()
        else:
            self.proxy.stall()

    def mend(self) -> None:
        self.proxy.refuse(False)
        self.proxy.stall(False)
        self.proxy.cut()


@pytest.fixture
def route(database: Database) -> Iterator[Route]:
    with MySqlProxy("127.0.0.1", database.server.port) as proxy:
        yield Route(proxy, database)


def crew(world: World, database: Database, **given: Any) -> Child:
    """Agents at work without a writer of their own."""
    settings = {**OFF, "database_url": database.url()}
    child = world.spawn(
        **{"agents": ["one", "two"], "threads": 2, "batches": 0.3, "pace": 0.2, "settings": settings, **given}
    )
    child.wait_ready()
    return child


def end(world: World, children: Sequence[Child], scenario: str, faults: int, report: Report) -> None:
    """All end in order, and the verdict is clean."""
    for child in children:
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report(scenario, faults, verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)


def test_a_writer_without_a_route_beside_a_healthy_one(
    company: World, database: Database, route: Route, report: Report
) -> None:
    """It gives back what it held, once, and takes nothing more; the healthy one stores all; a late route makes two again."""
    world = company
    broken, healthy = writers(world, route.url, database.url())
    agents = crew(world, database, large=0.03)
    outside.hurry(world.nats_url, world.namespace, ACK_WAIT)
    ways = (world.dice.sample(["refuse", "swallow"], 2) * rounds(1))[: rounds(1)]
    for how in ways:
        agents.wait_writes(10)
        lead_nowhere(world, route, broken, how)
        wait_drained(world)
    end(world, [agents, broken, healthy], "24 a writer without a route beside a healthy one", len(ways), report)


def lead_nowhere(world: World, route: Route, broken: Child, how: str) -> None:
    """Fail the route until nothing more is taken away, and a while longer; then mend it and wait until both drains know."""
    log, delays = Log(broken), Delays(world)
    route.fail(how)
    for drain in ("writer", "trace_ingest"):
        lost = f"{drain}: cannot store records: (cannot connect|lost the connection)"
        delays.watch_until(partial(says, log, lost), lost)
    # A try that is swallowed, giving back, the ack wait of what was fetched ahead.
    delays.watch_until(lambda at: delays.calm(at, 2 * ACK_WAIT), "no more redeliveries")
    calm = time.monotonic()
    delays.watch(3 * ACK_WAIT)
    assert delays.redelivered(calm) == 0, delays.seen
    assert "over after" not in log.text()
    print(f"{how}: the longest delay is {delays.longest():.1f} s at first and {delays.longest(calm):.1f} s later")
    route.mend()
    for drain in ("writer", "trace_ingest"):
        log.wait_for(f"{drain}: cannot store records: over after")


def says(log: Log, pattern: str, at: float) -> bool:
    return log.says(pattern)


class Delays:
    """How long records waited, from what was seen of the log: a look at a time, and when what stood in it then was settled."""

    def __init__(self, world: World) -> None:
        self.seen: list[tuple[float, outside.Progress]] = []
        self._world = world

    def watch(self, seconds: float) -> None:
        """Look for so long."""
        until = time.monotonic() + seconds
        self._watch(lambda at: at > until)

    def watch_until(self, condition: Callable[[float], bool], what: str) -> None:
        """Look until it holds."""
        limit = time.monotonic() + NOTICE_SECONDS
        self._watch(lambda at: condition(at) or at > limit)
        assert condition(self.seen[-1][0]), f"{what} within {NOTICE_SECONDS} s"

    def calm(self, at: float, seconds: float) -> bool:
        """Whether nothing was being delivered again in these last seconds."""
        return at - seconds > self.seen[0][0] and self.redelivered(at - seconds) == 0

    def _watch(self, until: Callable[[float], bool]) -> None:
        def look(at: float, progress: outside.Progress) -> bool:
            self.seen.append((at, progress))
            return until(at)

        outside.watch(self._world.nats_url, self._world.namespace, look)

    def longest(self, since: float = 0.0) -> float:
        """Seconds, of what was appended after ``since``."""
        longest = 0.0
        for at, progress in self.seen:
            done = next((then for then, other in self.seen if other.settled >= progress.last), self.seen[-1][0])
            longest = max(longest, done - at) if at >= since else longest
        return longest

    def redelivered(self, since: float = 0.0) -> int:
        """The most messages that were being delivered again at a time."""
        return max((progress.redelivered for at, progress in self.seen if at >= since), default=0)


# ---- COMMITs


def test_commits_that_nobody_answers(company: World, database: Database, route: Route, report: Report) -> None:
    """COMMIT let through and its answer swallowed, or kept back: given up, arriving late, or never; nothing doubles."""
    world, proxy = company, route.proxy
    broken, healthy = writers(world, route.url, database.url())
    agents = crew(world, database, large=0.05)
    acts = ["lost answer", "lost answer and cut", "kept back and cut", "late", "never"]
    caught = 0
    for act in (world.dice.sample(acts, len(acts)) * rounds(1))[: rounds(3)]:
        before = proxy.caught
        (proxy.lose_answers if act.startswith("lost") else proxy.hold_commits)()
        wait_until(partial(catches_more, proxy, before), 60, f"{act}: a COMMIT came by")
        if act.endswith("cut"):
            proxy.cut(reset=world.dice.random() < 0.5)
        if act == "late":
            time.sleep(world.dice.uniform(0.0, 3.5))  # before or after the writer gave it up
            proxy.release()
        proxy.lose_answers(False)
        proxy.hold_commits(False)
        caught += proxy.caught - before
        print(f"{act}: all is stored {wait_drained(world):.1f} s later")
    end(world, [agents, broken, healthy], "24 COMMITs that nobody answers", caught, report)


def catches_more(proxy: MySqlProxy, than: int) -> bool:
    return proxy.caught > than


def test_a_proxy_with_small_packets(company: World, database: Database, route: Route, report: Report) -> None:
    """What is too large for it waits and is no dead letter; all else is stored; it is stored when there is room again."""
    world, proxy = company, route.proxy
    pair = writers(world, route.url, route.url)
    agents = crew(world, database, large=0.1)
    log = Log(pair[0])
    proxy.limit(300_000)
    log.wait_for("cannot be stored though others can.*error 1153.*set max_allowed_packet to 16M", 90)
    agents.wait_writes(10)
    assert proxy.refused > 0
    proxy.limit(0)
    print(f"all is stored {wait_drained(world):.1f} s after it is over")
    end(world, [agents, *pair], "24 a proxy with small packets", proxy.refused, report)


# ---- deadlocks


def test_deadlocks_between_four_writers(company: World, database: Database, route: Route, report: Report) -> None:
    """What one of them still writes is delivered to the others too; and somebody locks the rows the other way round."""
    world = company
    four = writers(world, *[route.url] * 4)
    agents = crew(world, database, threads=1, pace=0.4)
    agents.wait_writes(20)
    route.proxy.delay(0.05)  # transactions that last longer than the ack wait
    outside.hurry(world.nats_url, world.namespace, 0.3)
    logs = [Log(child) for child in four]
    delays, before = Delays(world), contention(database)
    delays.watch(3.0)
    alone = contention(database)
    wanted, limit = rounds(3), time.monotonic() + NOTICE_SECONDS * rounds(1)
    while sum(log.text().count("error 1213") for log in logs) < wanted:
        assert time.monotonic() < limit, "no writer was the victim of a deadlock"
        lock_backwards(database)
        delays.watch(0.2)
    with_a_rival = contention(database)
    print(f"(deadlocks, waits for rows): {before}, {alone} by the writers alone, {with_a_rival} with a rival")
    assert delays.redelivered() > 0
    assert with_a_rival[0] > before[0]
    route.proxy.delay(0.0)
    world.hurry()
    wait_drained(world)
    end(world, [agents, *four], "24 deadlocks between four writers", with_a_rival[0] - before[0], report)


def contention(database: Database) -> tuple[int, int]:
    """Deadlocks and waits for rows that the server has seen."""
    status = dict(
        database.run("SHOW GLOBAL STATUS WHERE Variable_name IN ('Innodb_deadlocks', 'Innodb_row_lock_waits')")
    )
    return int(status["Innodb_deadlocks"]), int(status["Innodb_row_lock_waits"])


def lock_backwards(database: Database) -> None:
    """Lock checkpoints before events, and those from the last key to the first, with more to undo than any writer has."""
    rival = database.server.connect(database.name)
    try:
        rival.query("CREATE TABLE IF NOT EXISTS scratch (n INT)")
        rival.query("START TRANSACTION")
        rival.query("INSERT INTO scratch SELECT seq FROM seq_1_to_5000")
        with suppress(MySQLdb.OperationalError):  # whoever loses
            with rival.cursor() as cursor:
                cursor.execute("SELECT record_key FROM agent_checkpoints FOR UPDATE")
                cursor.execute("SELECT record_key FROM agent_events ORDER BY record_key DESC FOR UPDATE")
            rival.rollback()
    finally:
        rival.close()


# ---- canaries


def test_a_writer_that_blames_the_record_is_caught(company: World, database: Database, report: Report) -> None:
    world = company
    agents = crew(world, database)
    (broken,) = writers(world, database.url(), break_="blame the record")
    agents.wait_writes(5)
    with read_only(database):
        Log(broken).wait_for("is a dead letter, kept in the")
    for child in (agents, broken):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict()
    report("canary: blame the record (dead letters are right here)", 1, verdict)
    assert verdict.dead_letters and any("is a dead letter" in text for text in verdict.problems), verdict


def test_a_writer_that_acknowledges_a_failed_commit_is_caught(
    company: World, database: Database, route: Route, report: Report
) -> None:
    world = company
    agents = crew(world, database)
    (broken,) = writers(world, route.url, break_="acknowledge a failed commit")
    agents.wait_writes(5)
    route.proxy.hold_commits()
    wait_until(partial(catches_more, route.proxy, 1), 60, "a COMMIT of both drains is kept back")
    route.proxy.cut()
    route.proxy.hold_commits(False)
    agents.wait_writes(5)
    for child in (agents, broken):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict()
    report("canary: acknowledge a failed COMMIT (lost is right here)", 1, verdict)
    assert verdict.lost and any(text.startswith("LOST") for text in verdict.problems), verdict
