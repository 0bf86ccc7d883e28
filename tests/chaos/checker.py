"""The verdict on a run, from outside evidence only: the children's notebooks, the log and the database."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .evidence import APPENDS, Call, Evidence
from .outside import Letter, LogState, Row, Tables

MAX_SHOWN = 20
IN_HAND_NS = 5_000_000_000
"""How long a writer may be busy storing what it got from a log that is gone."""
NEVER = 1 << 62
"""An end that never came."""


@dataclass
class Verdict:
    """What was found. ``problems`` is empty when all that was promised was kept; the rest are counts for the summary."""

    problems: list[str] = field(default_factory=list)
    acknowledged: int = 0
    stored: int = 0
    dead_letters: int = 0
    duplicates: int = 0
    lost: int = 0
    missing: int = 0
    """Records that are gone with a log that was lost, as the test did it, and named by whoever was acknowledged them."""
    disordered: int = 0
    """Records, or calls of several, that stand where they may not: out of an agent's order, or behind its next owner's."""
    longest: float = 0.0
    """The longest wait of a caller for one append or resume, s."""

    def fault(self, text: str) -> None:
        self.problems.append(text)
        self.disordered += text.startswith(("ORDER", "FENCE"))

    def __str__(self) -> str:
        shown = "\n".join(self.problems[:MAX_SHOWN])
        return f"{len(self.problems)} broken promises, {self.lost} lost, {self.duplicates} doubled:\n{shown}"


@dataclass(frozen=True, slots=True)
class Gone:
    """What was acknowledged from ``since`` on and was under way by ``until`` may be gone with the log (CLOCK_MONOTONIC ns)."""

    since: int
    until: int

    def covers(self, call: Call) -> bool:
        """Whether a call's acknowledgements may be of records that are gone."""
        return call.ended >= self.since and call.began <= self.until


@dataclass(slots=True)
class Fate:
    """All that is known of one record from the notebooks. Records are known by agent and id (a checkpoint's: its token)."""

    agent: str
    identity: str
    digests: set[str] = field(default_factory=set)
    began: int = NEVER
    """When it was first intended."""
    ended: int = 0
    """When the last call about it was over; ``NEVER`` if one may still have been on its way without a later PubAck."""
    acknowledged: bool = False
    first_ack: int = NEVER
    excluded: bool = True
    """Every call about it said ``not_written``."""
    calls: int = 0
    seq: int = 0
    children: set[str] = field(default_factory=set)


class Checker:
    """Compares what was promised with what is there.

    ``dead``: (agent, id) of records that must be dead letters, and nothing else may be. ``discarded``: key of each record that
    an operator gave up, which must be nowhere. ``grace``: seconds that a call may
    last longer than its timeout. ``settled``: whether the log must be empty of records. ``steady``: whether the log's server
    lived through it, so that every record stands where its first PubAck said. ``gone``: times for which the log
    was lost: what was acknowledged then may be missing, if whoever lives on has named it, and nothing else was named.
    ``by_sequence``: whether order is by sequence alone, because the server's clock did not go on steadily.
    """

    def __init__(
        self,
        evidence: Evidence,
        tables: Tables,
        log: LogState,
        *,
        dead: Iterable[tuple[str, str]] = (),
        discarded: Mapping[tuple[str, str], bytes] | None = None,
        grace: float = 2.0,
        settled: bool = True,
        steady: bool = False,
        gone: Sequence[Gone] = (),
        by_sequence: bool = False,
    ) -> None:
        self._gone = gone
        self._missing: set[tuple[str, str]] = set()
        self._acked: dict[tuple[str, str], list[Call]] = defaultdict(list)
        for call in evidence.of(*APPENDS):
            for identity, _ in call.acknowledged:
                self._acked[call.agent, identity].append(call)
        self._evidence = evidence
        self._tables = tables
        self._log = log
        self._expected_dead = set(dead)
        self._discarded = dict(discarded or {})
        self._grace = grace
        self._settled = settled
        self._steady = steady
        self._by_sequence = by_sequence
        self._verdict = Verdict()
        self._events = _fates(evidence.of("event", "events"))
        self._checkpoints = _fates(evidence.of("checkpoint"))
        self._letters = [*tables.letters, *log.letters]

    def verdict(self) -> Verdict:
        self._check_kept("event", self._events, self._tables.events)
        self._check_kept("checkpoint", self._checkpoints, self._tables.checkpoints)
        self._check_named()
        self._check_order()
        self._check_resumes()
        self._check_takeovers()
        self._check_histories()
        self._check_traces()
        self._check_log()
        self._check_time()
        fates = [*self._events.values(), *self._checkpoints.values()]
        self._verdict.acknowledged = sum(fate.acknowledged for fate in fates)
        self._verdict.stored = len(self._tables.events) + len(self._tables.checkpoints)
        self._verdict.dead_letters = len({(letter.agent, letter.identity) for letter in self._letters_of_writer()})
        self._verdict.longest = max((call.seconds for call in self._evidence.of(*APPENDS, "resume")), default=0.0)
        return self._verdict

    # ---- exactly once

    def _check_kept(self, kind: str, fates: dict[tuple[str, str], Fate], rows: list[Row]) -> None:
        kept: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            kept[row.agent, row.identity].append(row)
        buried = {
            (letter.agent, letter.identity): letter for letter in self._letters_of_writer() if letter.kind == kind
        }
        for name, letter in buried.items():
            kept[name].append(letter)
            if name not in self._expected_dead:
                self._verdict.fault(f"{kind} {name} is a dead letter: {letter.error}")
        for name, copies in kept.items():
            self._check_copies(kind, name, fates.get(name), copies)
        for name, fate in fates.items():
            if name in self._discarded:
                if name in kept:
                    self._verdict.fault(f"{kind} {name} was discarded and is there")
            elif fate.acknowledged and name not in kept and self._may_be_missing(name):
                self._missing.add(name)
                self._verdict.missing += 1
            elif fate.acknowledged and name not in kept:
                self._verdict.lost += 1
                self._verdict.fault(f"LOST: {kind} {name} was acknowledged at sequence {fate.seq} and is nowhere")
            if fate.acknowledged and name in self._expected_dead and name not in buried:
                self._verdict.fault(f"{kind} {name} should be a dead letter and is not")

    def _may_be_missing(self, name: tuple[str, str]) -> bool:
        """Whether every acknowledgement of the record fell into a time that is lost."""
        return bool(self._gone) and all(any(gone.covers(call) for gone in self._gone) for call in self._acked[name])

    def _check_named(self) -> None:
        """Whoever lives on names the sequences of its records that are missing, and of no others."""
        named: dict[str, set[int]] = defaultdict(set)
        for call in self._evidence.of("flush"):
            for first, last, count in call.result.get("lost", ()):
                if count != last - first + 1:
                    self._verdict.fault(f"NAMED: {call.child} does not know which of {first} to {last}")
                named[call.child].update(range(first, last + 1))
        flushed = {call.child for call in self._evidence.of("flush") if call.ended}
        rows = {(row.agent, row.identity): row.position[1] for row in (*self._tables.events, *self._tables.checkpoints)}
        acks: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
        for call in self._evidence.of(*APPENDS) if self._gone else ():
            if not any(gone.covers(call) for gone in self._gone):
                continue
            for (identity, _), (seq, _) in zip(call.acknowledged, call.acks, strict=True):
                name = (call.agent, identity)
                acks[call.child, seq].append(name)  # a sequence may have been given twice
                if name in self._missing and call.child in flushed and seq not in named[call.child]:
                    self._verdict.fault(
                        f"UNNAMED: {call.child} was acknowledged {name} at {seq}; it does not say that this is lost"
                    )
        for child, seqs in named.items():
            for seq in seqs:
                if all(rows.get(name) == seq and len(self._acked[name]) == 1 for name in acks[child, seq]):
                    self._verdict.fault(f"NAMED: {child} says that {seq} is lost, and it is not: {acks[child, seq]}")

    def _check_copies(self, kind: str, name: tuple[str, str], fate: Fate | None, copies: list[Row]) -> None:
        if len(copies) > 1:
            self._verdict.duplicates += len(copies) - 1
            self._verdict.fault(
                f"DOUBLED: {kind} {name} is stored {len(copies)} times, at {[c.position for c in copies]}"
            )
        if fate is None:
            self._verdict.fault(f"{kind} {name} is stored and nobody ever intended it")
            return
        if fate.excluded:
            self._verdict.fault(f"{kind} {name} is stored though every call about it said not_written")
        if any(copy.digest not in fate.digests for copy in copies):
            self._verdict.fault(f"{kind} {name} is stored with a payload that nobody gave it")
        if self._steady and fate.acknowledged and fate.calls == 1 and fate.seq != copies[0].position[1]:
            self._verdict.fault(f"{kind} {name} was acknowledged at {fate.seq} and stands at {copies[0].position}")

    def _letters_of_writer(self) -> list[Letter]:
        return [letter for letter in self._letters if letter.sink == "writer"]

    # ---- order

    def _check_order(self) -> None:
        """What was over before another record was intended stands before it, per agent; and calls of many keep their order."""
        for agent, records in self._placed().items():
            over: list[tuple[int, tuple[int, int], str]] = []
            highest, holder = (0, 0), ""
            for fate, position in sorted(records, key=lambda each: each[0].began):
                while over and over[0][0] < fate.began:
                    _, before, identity = heapq.heappop(over)
                    if before > highest:
                        highest, holder = before, identity
                if position < highest:
                    self._verdict.fault(
                        f"ORDER: {agent}: {fate.identity} at {position} was intended when {holder} at {highest} was over"
                    )
                heapq.heappush(over, (fate.ended, position, fate.identity))
        positions = {(row.agent, row.identity): self._where(row) for row in self._tables.events}
        for call in self._evidence.of("events"):
            places = [
                positions[call.agent, identity]
                for identity, _ in call.acknowledged
                if self._events[call.agent, identity].calls == 1 and (call.agent, identity) in positions
            ]
            if places != sorted(places):
                self._verdict.fault(f"ORDER: {call.agent}: the events of one call stand at {places}")
        self._check_lanes(positions)

    def _check_lanes(self, positions: dict[tuple[str, str], tuple[int, int]]) -> None:
        """What one thread handed over one after the other without waiting stands in that order."""
        lanes: dict[tuple[str, str, str], list[tuple[int, int]]] = defaultdict(list)
        for call in self._evidence.of("event"):
            name = (call.agent, call.items[0][0])
            if call.lane and name in positions and self._events[name].calls == 1:
                lanes[call.child, call.agent, call.lane].append(positions[name])
        for (child, agent, _), places in lanes.items():
            if places != sorted(places):
                at = next(n for n, pair in enumerate(itertools.pairwise(places)) if pair[0] > pair[1])
                self._verdict.fault(f"ORDER: {agent}: {child} handed over in turn what stands at {places[at : at + 2]}")

    def _placed(self) -> dict[str, list[tuple[Fate, tuple[int, int]]]]:
        """Stored records with their fates, per agent."""
        placed: dict[str, list[tuple[Fate, tuple[int, int]]]] = defaultdict(list)
        for fates, rows in ((self._events, self._tables.events), (self._checkpoints, self._tables.checkpoints)):
            for row in rows:
                fate = fates.get((row.agent, row.identity))
                if fate is not None:
                    placed[row.agent].append((fate, self._where(row)))
        return placed

    def _where(self, row: Row) -> tuple[int, int]:
        """Its place in the order of the log."""
        return (0, row.position[1]) if self._by_sequence else row.position

    # ---- resume

    def _check_resumes(self) -> None:
        """Every resume gave a checkpoint that was intended, and none that was superseded before it began."""
        by_agent: dict[str, list[Call]] = defaultdict(list)
        for call in self._evidence.of("resume", "peek"):
            if not call.error and call.ended:
                by_agent[call.agent].append(call)
        for agent, resumes in by_agent.items():
            known = {fate.identity: fate for fate in self._checkpoints.values() if fate.agent == agent}
            claims = sorted(call.ended for call in resumes if call.verb == "resume")
            for fate in known.values():
                if fate.ended == NEVER:  # its writer was killed: over at the latest when the next owner stands
                    after = bisect.bisect_left(claims, fate.began)
                    fate.ended = claims[after] if after < len(claims) else NEVER
            news = [(fate.ended, fate.began, fate.identity) for fate in known.values() if fate.acknowledged]
            for call in sorted(resumes, key=lambda each: each.ended):
                self._check_resume(call, known, news)
                token = call.result["token"]
                if token in known:
                    news.append((call.ended, known[token].began, token))

    def _check_resume(self, call: Call, known: dict[str, Fate], news: list[tuple[int, int, str]]) -> None:
        """``news``: (since when it is known to be current, when it was intended, token) of checkpoints."""
        token = call.result["token"]
        shown = f"{call.child}: {call.verb} of {call.agent} gave {token}"
        fate = known.get(token) if token is not None else None
        if token is not None and (fate is None or fate.excluded or call.result["digest"] not in fate.digests):
            self._verdict.fault(f"RESUME: {shown}, which was never written")
            return
        over = fate.ended if fate is not None else 0
        for current, began, newer in news:
            if self._went_with_the_log((call.agent, newer), call):
                continue
            if current < call.began and began > over:
                self._verdict.fault(f"RESUME went back: {shown}, though {newer} was current before")
                return

    def _went_with_the_log(self, name: tuple[str, str], call: Call) -> bool:
        """Whether a record need not be found any more: gone for good, or for as long as a writer has it in its hands."""
        if not self._may_be_missing(name):
            return False
        return any(
            call.ended >= gone.until and (name in self._missing or call.began < gone.until + IN_HAND_NS)
            for gone in self._gone
        )

    # ---- fencing

    def _check_takeovers(self) -> None:
        """Behind the first record of a new owner stands nothing of an old one, and what the old one began then failed."""
        positions = {
            **{(row.agent, row.identity): self._where(row) for row in self._tables.events},
            **{(row.agent, row.identity): self._where(row) for row in self._tables.checkpoints},
        }
        claims: dict[str, list[Call]] = defaultdict(list)
        for call in self._evidence.of("resume"):
            if not call.error and call.ended:
                claims[call.agent].append(call)
        epochs = self._epochs(claims)
        for agent, owners in claims.items():
            for claim in owners:
                own = epochs.get((claim.child, claim.began), [])
                placed = [
                    positions[agent, i] for call in own for i, _ in call.items if self._alone(agent, i, positions)
                ]
                first = min(placed, default=None)
                for rival in owners:
                    if rival.child == claim.child or rival.ended >= claim.began:
                        continue
                    self._check_rival(agent, claim, first, epochs.get((rival.child, rival.began), []), positions)

    def _check_rival(
        self,
        agent: str,
        claim: Call,
        first: tuple[int, int] | None,
        rivals: list[Call],
        positions: dict[tuple[str, str], tuple[int, int]],
    ) -> None:
        for call in rivals:
            # With replicas the server looks for the id before the lease: what is durable already is said to be, to anybody.
            written = [item for item, ack in zip(call.items, call.acks, strict=False) if not ack[1]]
            if call.began > claim.ended and written:
                self._verdict.fault(f"FENCE: {call.child} wrote {written[0]} after {claim.child} owned {agent}")
            for identity, _ in call.items:
                if not self._alone(agent, identity, positions):
                    continue
                position = positions[agent, identity]
                if call.began > claim.ended or (first is not None and position > first):
                    self._verdict.fault(
                        f"FENCE: {identity} of {call.child} at {position} stands behind the first of {claim.child} at {first}"
                    )

    def _alone(self, agent: str, identity: str, positions: dict[tuple[str, str], tuple[int, int]]) -> bool:
        """Whether the record is stored and only one call was ever about it."""
        fate = self._events.get((agent, identity)) or self._checkpoints.get((agent, identity))
        return (agent, identity) in positions and fate is not None and fate.calls == 1

    def _epochs(self, claims: dict[str, list[Call]]) -> dict[tuple[str, int], list[Call]]:
        """The writes of each owner, by (child, when its claim began): those that began after it and before its next one."""
        epochs: dict[tuple[str, int], list[Call]] = defaultdict(list)
        begins: dict[tuple[str, str], list[Call]] = defaultdict(list)
        for agent, owners in claims.items():
            for claim in owners:
                begins[agent, claim.child].append(claim)
        for call in self._evidence.of("event", "events", "checkpoint"):
            mine = [claim for claim in begins[call.agent, call.child] if claim.ended < call.began]
            if mine:
                epochs[call.child, max(mine, key=lambda claim: claim.began).began].append(call)
        return epochs

    # ---- the rest

    def _check_histories(self) -> None:
        """A history is in order, each event once, and holds all that was acknowledged before; at the end, all there is."""
        letters = [letter for letter in self._letters_of_writer() if letter.kind == "event" and letter.decoded]
        rows: dict[str, list[Row]] = defaultdict(list)
        for row in (*self._tables.events, *letters):
            rows[row.agent].append(row)
        dead = {(letter.agent, letter.identity) for letter in letters}
        last = max((call.ended or NEVER for call in self._evidence.of(*APPENDS) if call.outcome != "killed"), default=0)
        for call in self._evidence.of("history"):
            if not call.ended or call.error:
                continue
            known = {identity: value for identity, value, _ in call.result["events"]}
            wanted = sorted((row for row in rows[call.agent] if row.identity in known), key=_place)
            if [(each, value) for each, value, _ in call.result["events"]] != [
                (row.identity, row.digest) for row in wanted
            ]:
                self._verdict.fault(f"HISTORY of {call.agent} in {call.child} is not what is stored, in order and once")
            due = {
                row.identity
                for row in rows[call.agent]
                if call.began > last
                or ((fate := self._events.get((call.agent, row.identity))) and fate.first_ack < call.began)
            }
            if missing := due - known.keys():
                self._verdict.fault(
                    f"HISTORY of {call.agent} in {call.child} lacks {len(missing)}: {sorted(missing)[:5]}"
                )
            marked = {(call.agent, identity) for identity, _, is_dead in call.result["events"] if is_dead}
            if not marked <= dead or (call.began > last and marked != {name for name in dead if name[0] == call.agent}):
                self._verdict.fault(f"HISTORY of {call.agent} in {call.child}: dead letters {marked}")

    def _check_traces(self) -> None:
        traces = Counter(self._tables.traces)
        buried = {letter.key for letter in self._letters if letter.sink == "trace_ingest"}
        events = {row.key for row in self._tables.events}
        known = events | {letter.key for letter in self._letters_of_writer()} | set(self._discarded.values())
        for key, count in traces.items():
            if count > 1:
                self._verdict.duplicates += count - 1
                self._verdict.fault(f"TRACE {key.hex()} is stored {count} times")
        strange = traces.keys() - known
        if len(strange) > self._verdict.missing:  # of events that went with the log
            self._verdict.fault(f"TRACE {next(iter(strange)).hex()} and others, {len(strange)}, belong to no event")
        gone = {row.key for row in self._tables.events if self._may_be_missing((row.agent, row.identity))}
        missing = events - traces.keys() - buried - gone
        if missing and self._settled:
            self._verdict.fault(f"TRACE: {len(missing)} of {len(events)} events have none")

    def _check_log(self) -> None:
        if self._settled and self._log.records:
            self._verdict.fault(f"LOG: {self._log.records} records and chunks are left: {self._log.subjects}")

    def _check_time(self) -> None:
        for call in self._evidence.of(*APPENDS, "resume", "peek", "flush"):
            if call.seconds > call.timeout + self._grace:
                self._verdict.fault(
                    f"TIME: {call.child}: {call.verb} took {call.seconds:.1f} s instead of {call.timeout} s ({call.error})"
                )


def _place(row: Row) -> tuple[int, int]:
    return row.position


def _fates(calls: Iterator[Call]) -> dict[tuple[str, str], Fate]:
    """What became of each record, all calls about it together; ``calls`` in the order they began."""
    fates: dict[tuple[str, str], Fate] = {}
    for call in calls:
        for number, (identity, value) in enumerate(call.items):
            fate = fates.setdefault((call.agent, identity), Fate(call.agent, identity))
            fate.digests.add(value)
            fate.children.add(call.child)
            fate.began = min(fate.began, call.began)
            fate.calls += 1
            if number < len(call.acks):
                fate.acknowledged, fate.excluded = True, False
                fate.first_ack = min(fate.first_ack, call.ended)
                fate.seq = fate.seq or call.acks[number][0]
                fate.ended = call.ended
            elif call.outcome != "not_written":
                fate.excluded = False
                fate.ended = call.ended or NEVER
            else:
                fate.ended = max(fate.ended, call.ended)
    return fates
