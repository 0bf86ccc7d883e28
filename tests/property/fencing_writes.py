"""Writing in an exploration of fencing: one record or many, small or large, waited for or not, and what became of each."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from skialith.errors import AgentFenced, SkialithError
from skialith.records import Record
from skialith.wal.lane import Ticket
from skialith.wal.lease import LeaseMoved
from tests.fixtures.wal import checkpoint, event, soon

from .fencing_model import Holder, Violation, Write
from .fencing_processes import Process, Processes

HANDED_SECONDS = 0.5
"""How long what is handed over without waiting may take, fault or not."""
LARGE_BYTES = (9_000, 40_000)
"""The smaller ones may fit into one message."""
LARGE_CHANCE = 0.06
MOST_OF_A_CALL = 40


@dataclass(slots=True, eq=False)
class Call:
    """Records that were handed over in one call. ``patient``: it has time enough, unless its process has a fault.

    ``sure``: whether its process writes for the agent's owner, and nobody else may; it stays so as long as ``changes`` does.
    """

    process: Process
    ticket: Ticket
    writes: list[Write]
    patient: bool
    sure: bool
    changes: int


class Writing(Processes):
    """Hands records over, and notes what their callers are told."""

    waiting: list[Call]

    def _writer(self, dice: random.Random) -> tuple[Process, Holder] | None:
        """A process that writes, and for whom: mostly for one who may."""
        pairs = [(process, process.holders[agent]) for process in self.processes for agent in sorted(process.own)]
        by_number = {process.number: process for process in self.processes}
        pairs += [
            (by_number.get(holder.writer or 0) or self._pick(dice), holder)
            for holder in self.owners
            if not holder.over or dice.random() < 0.2
        ]
        rightful = [pair for pair in pairs if self.history.rightful.get(pair[1].agent) is pair[1]]
        among = rightful if rightful and dice.random() < 0.75 else pairs
        return dice.choice(among) if among else None

    def _write(self, dice: random.Random) -> None:
        if (chosen := self._writer(dice)) is not None:
            self._write_for(*chosen, self._deadline(chosen[0]), dice)

    def _write_large(self, dice: random.Random) -> None:
        if (chosen := self._writer(dice)) is not None:
            process, holder = chosen
            self._note(self._hand_over(process, holder, self._deadline(process), dice, 1, large=1.0))

    def _hand(self, dice: random.Random) -> None:
        """As many as are handed over at once, and nobody waits for them yet."""
        if (chosen := self._writer(dice)) is not None:
            process, holder = chosen
            for _ in range(dice.randrange(1, 12)):
                self.waiting.append(self._hand_over(process, holder, soon(HANDED_SECONDS), dice, 1, patient=False))

    def _settle(self, dice: random.Random) -> None:
        self._settle_all(self._pick(dice))

    def _write_for(self, process: Process, holder: Holder, deadline: float, dice: random.Random) -> None:
        """One record by itself, several in a row, or a call of many."""
        way = dice.random()
        if way < 0.4 and holder not in self.owners:
            self._append_one(process, holder, deadline, dice)
        elif way < 0.75:
            calls = [self._hand_over(process, holder, deadline, dice, 1) for _ in range(dice.choice((1, 1, 3)))]
            for call in calls:
                self._note(call)
        else:
            self._note(self._hand_over(process, holder, deadline, dice, dice.randrange(2, MOST_OF_A_CALL)))

    def _append_one(self, process: Process, holder: Holder, deadline: float, dice: random.Random) -> None:
        call, (record,) = self._call(process, holder, dice, 1, LARGE_CHANCE)
        since = time.monotonic()
        try:
            ack = process.wal.log.append_one(record, deadline)
        except SkialithError as error:
            self._failed(call, call.writes, error)
        else:
            self._acked(call.writes[0], ack.seq)
        self._waited(process, since)

    def _hand_over(
        self,
        process: Process,
        holder: Holder,
        deadline: float,
        dice: random.Random,
        count: int,
        *,
        patient: bool = True,
        large: float = LARGE_CHANCE,
    ) -> Call:
        call, records = self._call(process, holder, dice, count, large)
        call.patient = patient
        process.wal.log.append(call.ticket, records, deadline)
        return call

    def _call(
        self, process: Process, holder: Holder, dice: random.Random, count: int, large: float
    ) -> tuple[Call, list[Record]]:
        history = self.history
        with self.lock:
            number, writes, records = history.tick(), [], []
            for _ in range(count):
                body = dice.randbytes(dice.randrange(*LARGE_BYTES)) if dice.random() < large else b""
                record = self._record(process, holder.agent, history.tick(), body, dice)
                records.append(record)
                writes.append(Write(holder, record.key.hex(), history.now, process.number, number, body))
            history.writes += writes
            ticket = Ticket(self.owners.get(holder, holder.agent), count)
            sure = history.rightful.get(holder.agent) is holder and holder.writer == process.number
            return Call(process, ticket, writes, True, sure, history.changes[holder.agent]), records

    @staticmethod
    def _record(process: Process, agent: str, number: int, body: bytes, dice: random.Random) -> Record:
        if dice.random() < 0.5:
            return checkpoint(process.wal, agent, number, body or b"\x80")
        return event(process.wal, agent, f"e{number}", body or b"\x80")

    def _settle_all(self, process: Process | None) -> None:
        """Wait for what was handed over, in one process or in all."""
        mine = [call for call in self.waiting if process is None or call.process is process]
        self.waiting = [call for call in self.waiting if call not in mine]
        for call in mine:
            self._note(call)

    def _note(self, call: Call) -> None:
        """Wait for a call, and write down what its caller is told."""
        since = time.monotonic()
        try:
            acks = call.process.wal.wait(call.ticket)
        except SkialithError as error:
            acks = list(call.ticket.acks)
            self._failed(call, call.writes[len(acks) :], error)
        for write, ack in zip(call.writes, acks, strict=False):
            self._acked(write, ack.seq)
        if call.patient:
            self._waited(call.process, since)

    def _acked(self, write: Write, seq: int) -> None:
        with self.lock:
            write.settled, write.outcome, write.seq = self.history.tick(), "acked", seq

    def _failed(self, call: Call, writes: list[Write], error: SkialithError) -> None:
        with self.lock:
            for write in writes:
                write.settled, write.error = self.history.tick(), repr(error)
                write.outcome = "unknown" if error.outcome == "unknown" else "not_written"
            holder = writes[0].holder
            sure = call.sure and call.changes == self.history.changes[holder.agent]
            if isinstance(error, AgentFenced):
                self._check_fenced(holder, error, sure)
            elif isinstance(error, LeaseMoved):
                if sure:
                    raise Violation(f"{holder} writes by process {call.process.number} alone, but: {error!r}")
            elif call.patient:
                self._check_reached(call.process, error)

    def _check_fenced(self, holder: Holder, error: AgentFenced, sure: bool = True) -> None:
        if sure and self.history.rightful.get(holder.agent) is holder:
            raise Violation(f"the rightful {holder} was fenced: {error!r}; the lease: {self._lease(holder.agent)}")
