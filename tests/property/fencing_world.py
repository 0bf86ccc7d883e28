"""Random steps of the owners of a few agents in a few processes on a real nats-server, and what they must come to."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from skialith.config import load
from skialith.errors import AgentFenced, SkialithError, WalUnavailable
from skialith.records import Record
from skialith.wal.client import Wal
from skialith.wal.lane import Owner, Ticket
from skialith.wal.lease import LeaseMoved
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.outside_nats import OutsideClient, Sent, Stored, TappedProxy
from tests.fixtures.wal import checkpoint, event, new_namespace, soon

from .fencing_model import Claim, History, Holder, Violation, Write

AGENTS = ("one", "two")
PROCESSES = 3
PATIENCE_SECONDS = 20.0
"""How long a call may take that nothing stands in the way of."""
FAULTY_SECONDS = 0.1
"""How long it may take while its process is cut off, and then gives up."""
HANDED_SECONDS = 0.5
"""How long what is handed over without waiting may take, fault or not."""
SURE_SECONDS = 20.0
"""How long after it was sent a copy is refused by its id alone, if not by its fence: the duplicate window, less a margin."""
BRIEF_SECONDS = 1

WEIGHTS = {
    "write": 40,
    "hand": 10,
    "settle": 4,
    "claim": 8,
    "claim_for": 7,
    "adopt": 8,
    "release": 3,
    "disown": 3,
    "expire": 3,
    "age": 0.2,
    "give_up": 8,
    "cut_off": 5,
    "lose_answers": 5,
    "cut_answer": 6,
    "heal": 12,
    "cut": 3,
    "replay": 14,
    "replay_lease": 8,
    "kill": 2,
    "restart": 1,
}


class Step(NamedTuple):
    """One step, and what it draws its choices from."""

    name: str
    seed: int


def steps(seed: int, count: int) -> list[Step]:
    """So many steps at random."""
    dice = random.Random(seed)
    names = dice.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)
    return [Step(name, dice.randrange(1 << 32)) for name in names]


@dataclass(slots=True, eq=False)
class Process:
    """One process: a log of its own, on a connection of its own."""

    number: int
    proxy: TappedProxy
    wal: Wal
    faulty: bool = False
    holders: dict[str, Holder] = field(default_factory=dict)
    """Of each agent that it claimed for itself."""
    own: set[str] = field(default_factory=set)
    """The agents that it may write for, fenced or not."""


class Explorer:
    """A namespace of one exploration, with its processes, owners and the history of both."""

    def __init__(self, server: NatsServer, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.history = History()
        self.namespace = new_namespace()
        self.prefix = f"skialith.{self.namespace}."
        self.outside = OutsideClient(server.url, f"SKIALITH_{self.namespace}")
        self.processes: list[Process] = []
        self.owners: dict[Holder, Owner] = {}
        self.sent: list[Sent] = []
        self.closing: list[threading.Thread] = []
        self.waiting: list[tuple[Process, Ticket, list[Write]]] = []
        self.done = 0
        self.replayed = 0
        self.restarted = time.monotonic()
        self._made = 0
        for _ in range(PROCESSES):
            self._open()

    def run(self, program: list[Step]) -> None:
        """Take the steps and judge them. Raises ``Violation``."""
        try:
            for step in program:
                getattr(self, f"_{step.name}")(random.Random(step.seed))
                self.done += 1
            self._finish()
        except Violation as error:
            raise Violation(f"after step {self.done} of {len(program)}, seed {self.seed}: {error}") from None
        finally:
            self._close()

    # ---- processes

    def _open(self) -> None:
        self._made += 1
        proxy = TappedProxy("127.0.0.1", self.server.port, self._made, self.prefix)
        proxy.start()
        url = f"nats://127.0.0.1:{proxy.port}"
        wal = Wal(load({}, nats_url=url, namespace=self.namespace, wal_bytes=64 << 20), lambda: url)
        wal.open(PATIENCE_SECONDS)
        self.processes.append(Process(self._made, proxy, wal))

    def _pick(self, dice: random.Random) -> Process:
        return dice.choice(self.processes)

    def _frames(self) -> list[Sent]:
        return self.sent + [sent for process in self.processes for sent in process.proxy.sent]

    def _die(self, process: Process) -> None:
        """It is gone for the server, as after SIGKILL; what it had on the way may still come."""
        process.proxy.refuse()
        process.proxy.cut()
        self.processes.remove(process)
        self.sent += process.proxy.sent
        self._settle_all(process)
        self._end(process)

    def _end(self, process: Process) -> None:
        def close() -> None:
            process.wal.close()
            process.proxy.stop()

        thread = threading.Thread(target=close, name=f"closing-{process.number}")
        thread.start()
        self.closing.append(thread)

    def _deadline(self, process: Process) -> float:
        return soon(FAULTY_SECONDS if process.faulty else PATIENCE_SECONDS)

    # ---- owning

    def _claiming(self, process: Process, holder: Holder, claim: Callable[[float], None]) -> bool:
        """Whether it returned; until then nobody owns the agent without doubt."""
        history, before = self.history, self._lease(holder.agent)
        doubtful = history.rightful.get(holder.agent) is not holder
        history.doubt(holder.agent)
        began = self.outside.last_seq()
        try:
            claim(self._deadline(process))
        except WalUnavailable as error:
            if not process.faulty:
                raise Violation(f"a claim without a fault failed: {error!r}") from error
            return False
        history.claimed(Claim(holder, began, self.outside.last_seq()))
        if doubtful and before == self._lease(holder.agent):
            history.doubt(holder.agent)  # it was there all the time, and a claim that is under way may still follow it
        return True

    def _claim(self, dice: random.Random) -> None:
        process, agent = self._pick(dice), dice.choice(AGENTS)
        self._settle_all(process)  # what waits for its lane is sent under the new claim
        holder = process.holders.setdefault(agent, Holder(f"process {process.number}", agent, process.number))
        if self._claiming(process, holder, lambda deadline: process.wal.claim(agent, deadline)):
            process.own.add(agent)

    def _claim_for(self, dice: random.Random) -> None:
        process, agent = self._pick(dice), dice.choice(AGENTS)
        holder = Holder(f"owner {len(self.owners) + 1}", agent, process.number)
        owning = process.wal.log.owning

        def claim(deadline: float) -> None:
            self.owners[holder] = process.wal.call(
                lambda: owning.claim_for(agent, holder.name, deadline), deadline - time.monotonic()
            )

        self._claiming(process, holder, claim)

    def _adopt(self, dice: random.Random, process: Process | None = None, holder: Holder | None = None) -> None:
        process, holder = process or self._pick(dice), holder or self._some_owner(dice)
        if holder is None:
            return
        owner, owning = self.owners[holder], process.wal.log.owning
        if owning.held(owner) is not None:
            return
        known, holder.writer = holder.writer, None
        deadline = self._deadline(process)
        try:
            process.wal.call(lambda: owning.adopt(owner, deadline), deadline - time.monotonic())
        except AgentFenced as error:
            holder.writer = known
            self._check_fenced(holder, error)
        except WalUnavailable as error:
            self._check_reached(process, error)
        else:
            holder.writer = process.number
            if holder.over:
                raise Violation(f"{holder} was adopted by process {process.number}")

    def _some_owner(self, dice: random.Random) -> Holder | None:
        """One that is there now, mostly."""
        living = [each for each in self.owners if not each.over]
        among = living if living and dice.random() < 0.7 else list(self.owners)
        return dice.choice(among) if among else None

    def _release(self, dice: random.Random) -> None:
        process = self._pick(dice)
        if process.faulty or not process.own:
            return
        agent = dice.choice(sorted(process.own))
        self._settle_all(process)
        lease = process.wal.log.lane(agent).lease
        while lease is not None and lease.users > 0:
            process.wal.release(agent)
        process.own.discard(agent)
        self.history.ended(process.holders[agent])

    def _disown(self, dice: random.Random) -> None:
        process, holder = self._pick(dice), self._some_owner(dice)
        if holder is None:
            return
        self._settle_all(None)
        self.history.ended(holder)  # whoever asks for it does not write any more, whatever comes of it
        owner, deadline = self.owners[holder], self._deadline(process)
        try:
            process.wal.call(lambda: process.wal.log.owning.disown(owner, deadline), deadline - time.monotonic())
        except SkialithError as error:
            self._check_reached(process, error)
            holder.over = False  # it may still stand there

    def _lease(self, agent: str) -> Stored | None:
        return self.outside.last(f"{self.prefix}lease.{agent}")

    def _expire(self, dice: random.Random) -> None:
        """The lease is removed behind everybody's back, as when its time is over."""
        agent = dice.choice(AGENTS)
        self._settle_all(None)
        while (lease := self._lease(agent)) is not None:  # another one, if a renewal came between
            self.outside.remove(lease.seq)
        self._nobody(agent, dice)

    def _age(self, dice: random.Random) -> None:
        """A lease whose time is over on the server's clock."""
        settings = {"nats_url": self.server.url, "lease_seconds": BRIEF_SECONDS, "namespace": self.namespace}
        brief = Wal(load({}, **settings), lambda: self.server.url)
        brief.open(PATIENCE_SECONDS)
        try:
            process, agent = self._pick(dice), dice.choice(AGENTS)
            self._settle_all(None)
            holder = Holder(f"brief owner {self.history.tick()}", agent, None)
            deadline = soon(PATIENCE_SECONDS)
            began = self.outside.last_seq()
            owner = brief.call(lambda: brief.log.owning.claim_for(agent, holder.name, deadline), PATIENCE_SECONDS)
            self.history.claimed(Claim(holder, began, self.outside.last_seq()))
            self.owners[holder] = owner
            wait_until(lambda: not self._stands(owner), PATIENCE_SECONDS, "the lease is removed by its age")
            self._nobody(agent, dice)
            self._write_for(process, holder, self._deadline(process), dice)
        finally:
            brief.close()

    def _stands(self, owner: Owner) -> bool:
        lease = self._lease(owner.agent_id)
        return lease is not None and lease.body.get("token") == owner.token

    def _nobody(self, agent: str, dice: random.Random) -> None:
        """No one owns the agent; those who did last try to write."""
        holders = list(dict.fromkeys(claim.holder for claim in self.history.claims if claim.holder.agent == agent))
        for holder in holders:
            self.history.ended(holder)
        for process in self.processes:
            for holder in holders[-3:]:
                if holder.writer == process.number and (holder in self.owners or agent in process.own):
                    self._write_for(process, holder, self._deadline(process), dice)

    # ---- writing

    def _writer(self, dice: random.Random) -> tuple[Process, Holder] | None:
        """A process that writes, and for whom: mostly for one who may."""
        pairs = [(process, process.holders[agent]) for process in self.processes for agent in process.own]
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

    def _hand(self, dice: random.Random) -> None:
        """As many as are handed over at once, and nobody waits for them yet."""
        if (chosen := self._writer(dice)) is not None:
            process, holder = chosen
            self._hand_over(process, holder, soon(HANDED_SECONDS), dice, dice.randrange(1, 12))

    def _settle(self, dice: random.Random) -> None:
        self._settle_all(self._pick(dice))

    def _records(self, process: Process, agent: str, dice: random.Random, count: int) -> list[Record]:
        return [
            checkpoint(process.wal, agent, self.history.now)
            if dice.random() < 0.5
            else event(process.wal, agent, f"e{self.history.now}-{number}")
            for number in range(count)
        ]

    def _noted(self, holder: Holder, records: list[Record]) -> list[Write]:
        writes = [Write(holder, record.key.hex(), self.history.tick()) for record in records]
        self.history.writes += writes
        return writes

    def _write_for(self, process: Process, holder: Holder, deadline: float, dice: random.Random) -> None:
        if holder in self.owners or dice.random() < 0.5:
            self._hand_over(process, holder, deadline, dice, dice.choice((1, 1, 1, 3)))
            self._settle_all(process)
            return
        (record,) = self._records(process, holder.agent, dice, 1)
        (write,) = self._noted(holder, [record])
        sure = self._is_sure(process, holder)
        try:
            ack = process.wal.log.append_one(record, deadline)
        except SkialithError as error:
            self._failed(process, write, error, sure)
        else:
            self._acked(process, write, ack.seq)

    def _hand_over(self, process: Process, holder: Holder, deadline: float, dice: random.Random, count: int) -> None:
        records = self._records(process, holder.agent, dice, count)
        writes = self._noted(holder, records)
        for record, write in zip(records, writes, strict=True):
            ticket = Ticket(self.owners.get(holder, holder.agent), 1)
            process.wal.log.append(ticket, [record], deadline)
            self.waiting.append((process, ticket, [write]))

    def _settle_all(self, process: Process | None) -> None:
        """Wait for what was handed over, in one process or in all."""
        mine = [each for each in self.waiting if process is None or each[0] is process]
        self.waiting = [each for each in self.waiting if each not in mine]
        for where, ticket, (write,) in mine:
            sure = self._is_sure(where, write.holder)
            try:
                (ack,) = where.wal.wait(ticket)
            except SkialithError as error:
                self._failed(where, write, error, sure)
            else:
                self._acked(where, write, ack.seq)

    def _is_sure(self, process: Process, holder: Holder) -> bool:
        """Whether this process writes for the agent's owner, and nobody else may."""
        return self.history.rightful.get(holder.agent) is holder and holder.writer == process.number

    def _acked(self, process: Process, write: Write, seq: int) -> None:
        write.settled, write.outcome, write.seq = self.history.tick(), "acked", seq

    def _failed(self, process: Process, write: Write, error: SkialithError, sure: bool) -> None:
        write.settled, write.error = self.history.tick(), repr(error)
        write.outcome = "unknown" if error.outcome == "unknown" else "not_written"
        if isinstance(error, AgentFenced):
            self._check_fenced(write.holder, error, sure)
        elif isinstance(error, LeaseMoved):
            if sure:
                raise Violation(f"{write.holder} writes by process {process.number} alone, but: {error!r}")
        else:
            self._check_reached(process, error)

    def _check_fenced(self, holder: Holder, error: AgentFenced, sure: bool = True) -> None:
        if sure and self.history.rightful.get(holder.agent) is holder:
            raise Violation(f"the rightful {holder} was fenced: {error!r}; the lease: {self._lease(holder.agent)}")

    def _check_reached(self, process: Process, error: SkialithError) -> None:
        if not process.faulty and process in self.processes and not self._lately(process):
            raise Violation(f"process {process.number} has no fault, but: {error!r}")

    def _lately(self, process: Process) -> bool:
        """Whether what was handed over with a short deadline may have met a restart."""
        return any(each[0] is process for each in self.waiting)

    # ---- faults

    def _give_up(self, dice: random.Random) -> None:
        """A record that never arrived is given up, its owner goes on, here or elsewhere, and then it arrives."""
        if (chosen := self._writer(dice)) is None or chosen[0].faulty:
            return
        process, holder = chosen
        self._cut_off(dice, process)
        self._write_for(process, holder, soon(FAULTY_SECONDS), dice)
        process.proxy.cut()
        self._heal_one(process, dice)
        if holder in self.owners and dice.random() < 0.7:
            process = self._pick(dice)
            self._adopt(dice, process, holder)
        self._write_for(process, holder, self._deadline(process), dice)
        self._replay(dice)

    def _cut_off(self, dice: random.Random, process: Process | None = None) -> None:
        """What it sends waits on the way, until it is healed."""
        process = process or self._pick(dice)
        process.faulty = True
        process.proxy.stall(direction="up")

    def _lose_answers(self, dice: random.Random) -> None:
        """What it sends arrives, and no PubAck comes back, until it is healed."""
        process = self._pick(dice)
        process.faulty = True
        process.proxy.hold()

    def _cut_answer(self, dice: random.Random) -> None:
        """The next PubAck is cut, and the connection with it."""
        self._pick(dice).proxy.cut_inside("PUBACK", dice.randrange(200), reset=dice.random() < 0.5)

    def _cut(self, dice: random.Random) -> None:
        self._pick(dice).proxy.cut(reset=dice.random() < 0.5)

    def _heal(self, dice: random.Random) -> None:
        faulty = [process for process in self.processes if process.faulty]
        if faulty:
            self._heal_one(dice.choice(faulty), dice)

    def _heal_one(self, process: Process, dice: random.Random) -> None:
        self._settle_all(process)
        if dice.random() < 0.3:
            process.proxy.cut()
        process.proxy.release(shuffled=dice.random() < 0.5)
        process.proxy.stall(False)
        process.faulty = False

    def _kill(self, dice: random.Random) -> None:
        self._die(self._pick(dice))
        self._open()

    def _restart(self, dice: random.Random) -> None:
        if dice.random() < 0.5:
            self._settle_all(None)
        self.server.restart()
        self.restarted = time.monotonic()
        self.history.restarts.append(self.outside.last_seq())

    # ---- late copies

    def _replay(self, dice: random.Random) -> None:
        """A late copy of a record, fenced as it was: rather of one that was given up, and whose fence may still fit."""
        frames = [sent for sent in self._frames() if sent.expected is not None and ".lease." not in sent.subject]
        unknown = {write.message_id for write in self.history.writes if write.outcome == "unknown"}
        leases = {agent: self._lease(agent) for agent in AGENTS}
        current = {lease.seq for lease in leases.values() if lease is not None}
        lost = [sent for sent in frames if sent.message_id in unknown]
        fits = [sent for sent in lost if sent.expected in current]
        among = fits or (lost if lost and dice.random() < 0.5 else frames)
        # Under the same lease, a copy of what was acknowledged is refused by its id alone, for as long as the server keeps it.
        since = max(self.restarted, time.monotonic() - SURE_SECONDS)
        among = [
            sent for sent in among if sent.expected not in current or sent.message_id in unknown or sent.at > since
        ]
        if among:
            self._repeat(dice.choice(among))

    def _replay_lease(self, dice: random.Random) -> None:
        """A late copy of a claim, a renewal or an adoption, or of what was sent before it."""
        frames = [sent for sent in self._frames() if ".lease." in sent.subject]
        if not frames:
            return
        sent = dice.choice(frames)
        agent = sent.subject.rpartition(".")[2]
        before = self._lease(agent)
        self._repeat(sent)
        after = self._lease(agent)
        if after is None or after == before or after.message_id != sent.message_id:
            return
        if before is None and after.body.get("token"):
            raise Violation(f"a claim that is long over won: {after}")
        if before is not None:
            self.history.doubt(agent)  # the copy is as good as a claim that was under way until now

    def _repeat(self, sent: Sent) -> None:
        with contextlib.suppress(OSError, EOFError):
            self.outside.replay(sent)
            self.replayed += 1

    # ---- the end

    def _finish(self) -> None:
        for process in self.processes:
            self._heal_one(process, random.Random(self.seed))
        dice = random.Random(self.seed)
        for _ in range(20):
            self._replay(dice)
        for agent in AGENTS:
            self.history.judge(self._stored(agent), agent)

    def _stored(self, agent: str) -> list[Stored]:
        return self.outside.messages(f"{self.prefix}log.*.{agent}")

    def _close(self) -> None:
        self.outside.close()
        for process in self.processes:
            process.proxy.stall(False)
            process.proxy.release()
            self._end(process)
        for thread in self.closing:
            thread.join()


def explore(server: NatsServer, seed: int, program: list[Step]) -> Explorer:
    """One exploration. Raises ``Violation``."""
    explorer = Explorer(server, seed)
    explorer.run(program)
    return explorer


def shrunk(program: list[Step], fails: Callable[[list[Step]], bool], seconds: float) -> list[Step]:
    """The steps without those that are not needed to fail, as far as time allows."""
    until, size = time.monotonic() + seconds, len(program) // 2
    while size and time.monotonic() < until:
        for shorter in _without(program, size):
            if time.monotonic() > until:
                break
            if fails(shorter):
                program = shorter
                break
        else:
            size //= 2
    return program


def _without(program: list[Step], size: int) -> Iterator[list[Step]]:
    for start in range(0, len(program), size):
        yield program[:start] + program[start + size :]
