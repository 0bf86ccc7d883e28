"""What must hold of owners and their writes: the model of fencing, judged by what the stream holds in the end."""

from __future__ import annotations

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
    """A claim that returned. ``began`` and ``returned``: the last sequence of the stream before it, and after it."""

    holder: Holder
    began: int
    returned: int


@dataclass(slots=True, eq=False)
class Write:
    """A record that was handed over. ``handed`` and ``settled``: when, as a count of what happened; None while it waits."""

    holder: Holder
    message_id: str
    handed: int
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
    restarts: list[int] = field(default_factory=list)
    """The last sequence of the stream at each: a server that was killed may forget an id whose record it has."""
    now: int = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def doubt(self, agent: str) -> None:
        """From here on nobody owns the agent without doubt."""
        self.rightful[agent] = None

    def claimed(self, claim: Claim) -> None:
        """Everybody who owned the agent before does not any more."""
        agent = claim.holder.agent
        for holder in {each.holder for each in self.claims if each.holder.agent == agent}:
            holder.over = True
        claim.holder.over = False
        self.claims.append(claim)
        self.rightful[agent] = claim.holder

    def ended(self, holder: Holder) -> None:
        """Its lease was given up or removed."""
        holder.over = True
        if self.rightful.get(holder.agent) is holder:
            self.doubt(holder.agent)

    # ---- the judgement

    def judge(self, stored: Iterable[Stored], agent: str) -> None:
        """Raises ``Violation``. ``stored``: all records of one agent, by sequence."""
        records = list(stored)
        writes = {write.message_id: write for write in self.writes if write.holder.agent == agent}
        if strange := [record for record in records if record.message_id not in writes]:
            raise Violation(f"stored, but under no id that was handed over: {strange}")
        at: dict[str, list[int]] = {}
        for record in records:
            at.setdefault(record.message_id, []).append(record.seq)
        for message_id, seqs in at.items():
            if any(not self._restarted(*pair) for pair in pairwise(seqs)):
                raise Violation(f"stored more than once, at {seqs}: {writes[message_id]}")
        for write in writes.values():
            _judge_outcome(write, at.get(write.message_id, []))
        for record in records:
            self._judge_owner(record, writes[record.message_id])
        _judge_order([(writes[record.message_id], record.seq) for record in records])

    def _restarted(self, first: int, second: int) -> bool:
        return any(first <= seq < second for seq in self.restarts)

    def _judge_owner(self, record: Stored, write: Write) -> None:
        """No one may write behind a claim of somebody else that returned, unless he claimed again."""
        for claim in reversed([each for each in self.claims if each.holder.agent == write.holder.agent]):
            if claim.holder is write.holder and claim.began < record.seq:
                return
            if claim.holder is not write.holder and claim.returned < record.seq:
                raise Violation(
                    f"interleaved: {write} stands at {record.seq} (fence {record.fence}), behind {claim}, which returned"
                )
        raise Violation(f"without a claim: {write} stands at {record.seq} (fence {record.fence})")


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
