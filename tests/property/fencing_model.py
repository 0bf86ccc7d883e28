"""What owners of an agent are promised, checked against what happened and what the stream holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from tests.fixtures.outside_nats import Stored


class Violation(AssertionError):
    """A promise of fencing that was broken; says which one."""


@dataclass(slots=True, eq=False)
class Holder:
    """One owner of an agent: a process with a lease of its own, or somebody outside whose token goes from process to process.

    ``over``: somebody else's claim returned, or its lease was given up or removed; it must never write again, until it claims.
    ``writer``: the process that writes for it, None if that is not known.
    """

    name: str
    agent: str
    writer: int | None
    over: bool = False


@dataclass(slots=True, eq=False)
class Claim:
    """A claim that returned. ``began`` and ``returned``: the last sequence of the stream before it, and after it.

    ``race``: claims that were under way at once have the same number, 0 if it was alone. ``last``: of a race, whether its lease
    is the last one in the stream.
    """

    holder: Holder
    began: int
    returned: int
    race: int = 0
    last: bool = True


@dataclass(slots=True, eq=False)
class Write:
    """A record that was handed over. ``handed`` and ``settled``: when, as a count of what happened; None while it waits.

    ``writer``: the process that it was handed to. ``call``: the same for all records of one call. ``body``: of a large record,
    whose pieces stand behind it.
    """

    holder: Holder
    message_id: str
    handed: int
    writer: int
    call: int
    body: bytes = field(default=b"", repr=False)
    settled: int | None = None
    outcome: Literal["acked", "unknown", "not_written", ""] = ""
    seq: int = 0
    error: str = ""


@dataclass(slots=True)
class History:
    """What happened, in order. ``rightful``: of each agent, who owns it without doubt."""

    claims: list[Claim] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    rightful: dict[str, Holder | None] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    """How often it may have changed who writes for the owner of an agent."""
    restarts: list[tuple[int, int]] = field(default_factory=list)
    """The last sequence of the stream before and after each: a server that was killed may forget an id whose record it has."""
    now: int = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def doubt(self, agent: str) -> None:
        """From here on nobody owns the agent without doubt."""
        self.rightful[agent] = None
        self.changes[agent] += 1

    def claimed(self, *claims: Claim) -> None:
        """One claim, or those of a race that returned, the last one of the stream last: who owned the agent before is over."""
        agent = claims[-1].holder.agent
        for holder in {each.holder for each in (*self.claims, *claims) if each.holder.agent == agent}:
            holder.over = True
        self.claims += claims
        self.changes[agent] += 1
        self.rightful[agent] = None
        if claims[-1].last:
            claims[-1].holder.over = False
            self.rightful[agent] = claims[-1].holder

    def ended(self, holder: Holder) -> None:
        """Its lease was given up or removed."""
        holder.over = True
        if self.rightful.get(holder.agent) is holder:
            self.doubt(holder.agent)

    # ---- the judgement

    def judge(self, stored: Iterable[Stored], chunks: Iterable[Stored], agent: str) -> None:
        """Raises ``Violation``. ``stored``: all records of one agent, by sequence; ``chunks``: all pieces of large ones."""
        records = list(stored)
        writes = {write.message_id: write for write in self.writes if write.holder.agent == agent}
        if strange := [record for record in records if record.message_id not in writes]:
            raise Violation(f"stored, but under no id that was handed over: {strange}")
        at = positions(records)
        for message_id, seqs in at.items():
            if self.doubled(seqs):
                raise Violation(f"stored more than once, at {seqs}: {writes[message_id]}")
        for write in writes.values():
            _judge_outcome(write, at.get(write.message_id, []))
        pairs = [(record, writes[record.message_id]) for record in records]
        for record, write in pairs:
            self._judge_owner(record, write)
        self._judge_races(pairs)
        _judge_order([(write, record.seq) for record, write in pairs])
        _judge_lanes(list(writes.values()), at)
        _judge_bodies(pairs, {chunk.seq: chunk.data for chunk in chunks})

    def doubled(self, seqs: list[int]) -> bool:
        """Whether a record stands twice that may not: without a restart in between."""
        return any(
            not any(first <= after and before < second for before, after in self.restarts)
            for first, second in pairwise(seqs)
        )

    def _judge_owner(self, record: Stored, write: Write) -> None:
        """No one may write behind a claim of somebody else that returned, unless he claimed again.

        Of claims that were under way at once only the last one of the stream says so of the others: they are in the order of
        their returns, which is not the stream's.
        """
        claims = [each for each in self.claims if each.holder.agent == write.holder.agent]
        races = {each.race for each in claims if each.holder is write.holder and each.race and each.began < record.seq}
        for claim in reversed(claims):
            if claim.holder is write.holder and claim.began < record.seq:
                return
            undecided = claim.race in races and not claim.last
            if claim.holder is not write.holder and claim.returned < record.seq and not undecided:
                raise Violation(
                    f"interleaved: {write} stands at {record.seq} (fence {record.fence}), behind {claim}, which returned"
                )
        raise Violation(f"without a claim: {write} stands at {record.seq} (fence {record.fence})")

    def _judge_races(self, records: list[tuple[Stored, Write]]) -> None:
        """Whoever is followed by another one of the same race writes no more under that claim."""
        current: dict[int, Claim] = {}
        followed: set[Claim] = set()
        for record, write in records:
            # What was sent before a claim, and came only then, shows the lease of the one before.
            made = record.seq if record.fence is None else record.fence
            claim = next(
                (each for each in reversed(self.claims) if each.holder is write.holder and each.began < made), None
            )
            if claim is None or not claim.race:
                continue
            if claim in followed:
                raise Violation(f"interleaved in a race: {write} stands at {record.seq}, behind {current[claim.race]}")
            before = current.setdefault(claim.race, claim)
            if before is not claim:
                followed.add(before)
                current[claim.race] = claim


def positions(records: Iterable[Stored]) -> dict[str, list[int]]:
    """Of each message id, where it stands."""
    at: dict[str, list[int]] = {}
    for record in records:
        at.setdefault(record.message_id, []).append(record.seq)
    return at


def _judge_outcome(write: Write, seqs: list[int]) -> None:
    if write.outcome == "acked" and write.seq not in seqs:
        raise Violation(f"acknowledged at {write.seq}, but stands at {seqs}: {write}")
    if write.outcome == "not_written" and seqs:
        raise Violation(f"said to be not written, but stands at {seqs}: {write}")


def _judge_order(stored: list[tuple[Write, int]]) -> None:
    """What was over before another record was handed over never stands behind it: no late copy becomes current."""
    latest_handed = 0
    latest: Write | None = None
    for write, seq in stored:
        if write.settled is not None and write.settled < latest_handed:
            raise Violation(f"a late copy: {write} stands at {seq}, behind {latest}, which was handed over later")
        if write.handed > latest_handed:
            latest_handed, latest = write.handed, write


def _judge_lanes(writes: list[Write], at: dict[str, list[int]]) -> None:
    """What one process was handed for one owner is acknowledged in that order.

    Nothing of a call stands before what was acknowledged of it. The rest of it may stand in any order: the copies here come one
    by one, while a connection keeps theirs.
    """
    last: dict[tuple[Holder, int] | int, tuple[int, Write]] = {}
    for write in writes:
        seqs = at.get(write.message_id)
        if not seqs:
            continue
        acked = write.outcome == "acked"
        for lane in (write.call, (write.holder, write.writer)) if acked else (write.call,):
            if lane in last and last[lane][0] > seqs[0]:
                raise Violation(
                    f"out of order: {write} stands at {seqs[0]}, before {last[lane]}, which was handed over earlier"
                )
            if acked:
                last[lane] = seqs[0], write


def _judge_bodies(records: list[tuple[Stored, Write]], pieces: dict[int, bytes]) -> None:
    """What does not fit into a record's own message stands right behind it, all of it, and there are no other pieces."""
    for record, write in records:
        if write.body in record.data:
            continue
        body, seq = b"", record.seq + 1
        while len(body) < len(write.body) and seq in pieces:
            body += pieces.pop(seq)
            seq += 1
        if body != write.body:
            raise Violation(f"torn: of {write} at {record.seq} there are {len(body)} of {len(write.body)} bytes")
    if pieces:
        raise Violation(f"torn: pieces of no record stand at {sorted(pieces)}")
