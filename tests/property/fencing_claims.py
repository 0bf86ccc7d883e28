"""Owning in an exploration of fencing: claims, alone or several at once, adoptions, and all ways in which a lease ends."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from skialith.errors import AgentFenced, SkialithError, WalUnavailable
from skialith.wal.lane import Owner
from tests.fixtures.nats import wait_until
from tests.fixtures.outside_nats import Stored
from tests.fixtures.wal import soon

from .fencing_model import Claim, Holder, Violation
from .fencing_processes import AGENTS, Process, at_once
from .fencing_writes import Writing

BRIEF_SECONDS = 1


@dataclass(slots=True, eq=False)
class Racer:
    """One of several whose claims of an agent are under way at once; ``seed``: what it draws from in a thread of its own.

    ``returned``: the last sequence after its claim returned, 0 if it did not.
    """

    process: Process
    holder: Holder
    outside: bool
    seed: int
    returned: int = 0


class Owning(Writing):
    """Claims and ends ownership, and notes who is the owner without doubt."""

    # ---- one claim

    def _claiming(self, process: Process, holder: Holder, claim: Callable[[float], None]) -> bool:
        """Whether it returned; until then nobody owns the agent without doubt."""
        history, before = self.history, self._lease(holder.agent)
        doubtful = history.rightful.get(holder.agent) is not holder
        history.doubt(holder.agent)
        began = self._last_seq()
        if not self._reached(process, claim):
            return False
        history.claimed(Claim(holder, began, self._last_seq()))
        if doubtful and before == self._lease(holder.agent):
            history.doubt(holder.agent)  # it was there all the time, and a claim that is under way may still follow it
        return True

    def _reached(self, process: Process, claim: Callable[[float], None]) -> bool:
        """Whether a claim returned, as it must unless its process has a fault."""
        since = time.monotonic()
        try:
            claim(self._deadline(process))
        except WalUnavailable as error:
            if not process.faulty:
                raise Violation(f"a claim without a fault failed: {error!r}") from error
            return False
        self._waited(process, since)
        return True

    def _own_holder(self, process: Process, agent: str) -> Holder:
        return process.holders.setdefault(agent, Holder(f"process {process.number}", agent, process.number))

    def _new_holder(self, process: Process, agent: str) -> Holder:
        return Holder(f"owner {self.history.tick()}", agent, process.number)

    def _claim_outside(self, process: Process, holder: Holder, deadline: float) -> None:
        owning = process.wal.log.owning
        owner = process.wal.call(
            lambda: owning.claim_for(holder.agent, holder.name, deadline), deadline - time.monotonic()
        )
        with self.lock:
            self.owners[holder] = owner

    def _claim(self, dice: random.Random) -> None:
        process, agent = self._pick(dice), dice.choice(AGENTS)
        self._settle_all(process)  # what waits for its lane is sent under the new claim
        if self._claiming(process, self._own_holder(process, agent), lambda until: process.wal.claim(agent, until)):
            process.own.add(agent)

    def _claim_for(self, dice: random.Random) -> None:
        process = self._pick(dice)
        holder = self._new_holder(process, dice.choice(AGENTS))
        self._claiming(process, holder, lambda deadline: self._claim_outside(process, holder, deadline))

    # ---- several at once

    def _race(self, dice: random.Random) -> None:
        """Two or three claims at once, each followed by writes at once; sometimes a server is disturbed meanwhile."""
        agent, history = dice.choice(AGENTS), self.history
        racers = self._racers(agent, dice)
        before, known = self._lease(agent), history.rightful.get(agent)
        history.doubt(agent)
        began, number = self._last_seq(), history.tick()
        ready = threading.Barrier(len(racers))
        disturbed = dice.random() < 0.02
        at_once(
            [partial(self._run, racer, ready) for racer in racers],
            (lambda: self._disturb(dice)) if disturbed else (lambda: None),
        )
        after = self._lease(agent)
        returned = [racer for racer in racers if racer.returned]
        if not returned:
            return
        returned.sort(key=lambda racer: (self._stands_for(racer, after), racer.returned))
        claims = [Claim(racer.holder, began, racer.returned, number, last=False) for racer in returned]
        claims[-1].last = self._stands_for(returned[-1], after)
        if not claims[-1].last and len(returned) == len(racers) and known is not None:
            raise Violation(f"none of those who claimed {agent!r} at once has it: {after}")
        history.claimed(*claims)
        if len(returned) < len(racers) or (before == after and known is not returned[-1].holder):
            history.doubt(agent)  # a claim that is under way may still follow

    def _racers(self, agent: str, dice: random.Random) -> list[Racer]:
        """Each process claims at most once for itself; what it had waiting is over by then."""
        racers = []
        for process in dice.sample(self.processes, dice.choice((2, 2, 3))):
            outside = dice.random() < 0.5
            self._settle_all(process)
            holder = self._new_holder(process, agent) if outside else self._own_holder(process, agent)
            racers.append(Racer(process, holder, outside, dice.randrange(1 << 32)))
        return racers

    def _run(self, racer: Racer, ready: threading.Barrier) -> None:
        process, dice, agent = racer.process, random.Random(racer.seed), racer.holder.agent

        def claim(deadline: float) -> None:
            if racer.outside:
                self._claim_outside(process, racer.holder, deadline)
            else:
                process.wal.claim(agent, deadline)
                process.own.add(agent)

        ready.wait()
        if self._reached(process, claim):
            racer.returned = self._last_seq()
            for _ in range(dice.randrange(4)):
                self._write_for(process, racer.holder, self._deadline(process), dice)

    def _stands_for(self, racer: Racer, lease: Stored | None) -> bool:
        """Whether this is its lease: its process sent it, under its name if that is not the process itself."""
        if lease is None or lease.body.get("owner") != (racer.holder.name if racer.outside else ""):
            return False
        return self._sent(racer.process, lease)

    @staticmethod
    def _sent(process: Process, lease: Stored) -> bool:
        return any(sent.message_id == lease.message_id for sent in process.proxy.sent)

    # ---- adoption

    def _adopt(self, dice: random.Random, process: Process | None = None, holder: Holder | None = None) -> None:
        process, holder = process or self._pick(dice), holder or self._some_owner(dice)
        if holder is None:
            return
        if process.wal.log.owning.held(self.owners[holder]) is not None:
            return
        known, holder.writer = holder.writer, None
        self.history.changes[holder.agent] += 1
        if self._adopted(process, holder):
            holder.writer = process.number
        elif holder.over:
            holder.writer = known

    def _adopt_at_once(self, dice: random.Random) -> None:
        """Two processes write for one owner at once, as when its requests go to two workers."""
        if (holder := self._some_owner(dice)) is None:
            return
        holder.writer = None
        self.history.changes[holder.agent] += 1
        processes, adopted = dice.sample(self.processes, 2), list[Process]()

        def adopt_and_write(process: Process, dice: random.Random) -> None:
            if self._adopted(process, holder):
                adopted.append(process)
            for _ in range(dice.randrange(1, 4)):
                self._write_for(process, holder, self._deadline(process), dice)

        at_once([partial(adopt_and_write, each, random.Random(dice.random())) for each in processes], lambda: None)
        lease, owner = self._lease(holder.agent), self.owners[holder]
        if len(adopted) == 2 and lease is not None:  # else an adoption that is under way may still follow
            writers = [each for each in processes if each.wal.log.owning.held(owner) and self._sent(each, lease)]
            holder.writer = writers[0].number if writers else None

    def _adopted(self, process: Process, holder: Holder) -> bool:
        owner, owning, deadline = self.owners[holder], process.wal.log.owning, self._deadline(process)
        held = owning.held(owner) is not None
        try:
            process.wal.call(lambda: owning.adopt(owner, deadline), deadline - time.monotonic())
        except AgentFenced as error:
            self._check_fenced(holder, error)
        except WalUnavailable as error:
            self._check_reached(process, error)
        else:
            if holder.over and not held:
                raise Violation(f"{holder} was adopted by process {process.number}")
            return True
        return False

    def _some_owner(self, dice: random.Random) -> Holder | None:
        """One that is there now, mostly."""
        living = [each for each in self.owners if not each.over]
        among = living if living and dice.random() < 0.7 else list(self.owners)
        return dice.choice(among) if among else None

    # ---- the end of a lease

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

    def _expire(self, dice: random.Random) -> None:
        """The lease is removed behind everybody's back, as when its time is over."""
        agent = dice.choice(AGENTS)
        self._settle_all(None)
        removed = 0
        while (lease := self._lease(agent)) is not None and lease.seq > removed:
            self.outside.remove(lease.seq)  # and the later one, if a renewal came between
            removed = lease.seq
        self.faults["removed leases"] += removed > 0
        self._nobody(agent, dice)

    def _age(self, dice: random.Random) -> None:
        """A lease whose time is over on the server's clock."""
        process, agent = self._pick(dice), dice.choice(AGENTS)
        brief = self._connect(self.site.port(process.number), lease_seconds=BRIEF_SECONDS)
        try:
            self._settle_all(None)
            holder = Holder(f"brief owner {self.history.tick()}", agent, None)
            deadline = soon(self.site.patience)
            began = self._last_seq()
            owner = brief.call(lambda: brief.log.owning.claim_for(agent, holder.name, deadline), self.site.patience)
            self.history.claimed(Claim(holder, began, self._last_seq()))
            self.owners[holder] = owner
            wait_until(lambda: not self._stands(owner), self.site.patience, "the lease is removed by its age")
            self.faults["removed leases"] += 1
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
