"""An exploration of fencing: random steps of the owners of a few agents, faults, late copies, and what all of it must come to."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from functools import partial

from tests.fixtures.chaos_summary import Line
from tests.fixtures.outside_nats import Sent, Stored
from tests.fixtures.wal import soon

from .fencing_claims import Owning
from .fencing_model import Holder, Violation, positions
from .fencing_processes import AGENTS, FAULTY_SECONDS, Process, at_once
from .fencing_sites import Site
from .fencing_steps import Step

SURE_SECONDS = 20.0
"""How long after it was sent a copy is refused by its id alone, if not by its fence: the duplicate window, less a margin."""
MOST_WRITES = 50
"""Of one owner while a server is disturbed."""
FAULTS = ("cut_off", "lose_answers", "cut_answer", "cut", "kill", "restart")
"""The steps that are faults; copies and removed leases are counted where they happen."""


class Explorer(Owning):
    """Takes the steps."""

    def __init__(self, site: Site, seed: int) -> None:
        super().__init__(site, seed)
        self.waiting = []
        self.done = 0
        self.result = Line()

    def run(self, program: list[Step]) -> None:
        """Take the steps and judge them; ``result`` is what the summary says of it. Raises ``Violation``."""
        try:
            for step in program:
                if step.name in FAULTS:
                    self.faults[step.name] += 1
                getattr(self, f"_{step.name}")(random.Random(step.seed))
                self.done += 1
            self._finish()
            self.result = self._counts(0)
        except Violation as error:
            self.result = self._counts(1)
            raise Violation(f"after step {self.done} of {len(program)}, seed {self.seed}: {error}") from None

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
        """It is gone for the server, as after SIGKILL; what it had on the way may still come."""
        process = self._pick(dice)
        process.proxy.refuse()
        process.proxy.cut()
        self.processes.remove(process)
        self._settle_all(process)
        self._bury(process)
        self._open()

    def _restart(self, dice: random.Random) -> None:
        """A server is disturbed, mostly while owners go on writing."""
        chosen = [self._writer(dice) for _ in range(dice.randrange(4))]
        writers = {
            each[1]: each for each in chosen if each is not None
        }  # one thread each: the order in a lane is known
        over = threading.Event()

        def write(process: Process, holder: Holder, dice: random.Random) -> None:
            for _ in range(MOST_WRITES):
                self._write_for(process, holder, self._deadline(process), dice)
                if over.wait(0.02):
                    break
            self._write_for(process, holder, self._deadline(process), dice)

        def disturb() -> None:
            try:
                self._disturb(dice)
            finally:
                over.set()

        at_once([partial(write, *each, random.Random(dice.random())) for each in writers.values()], disturb)

    # ---- late copies

    def _replay(self, dice: random.Random) -> None:
        """A late copy of a record or a batch, fenced as it was: rather of one that was given up, under a lease that stands."""
        frames = [
            sent
            for sent in self._frames()
            if sent.expected is not None and sent.whole and ".lease." not in sent.subject
        ]
        unknown = {write.message_id for write in self.history.writes if write.outcome == "unknown"}
        leases = {agent: self._lease(agent) for agent in AGENTS}
        current = {lease.seq for lease in leases.values() if lease is not None}
        lost = [sent for sent in frames if sent.message_ids & unknown]
        fits = [sent for sent in lost if sent.expected in current]
        among = fits or (lost if lost and dice.random() < 0.5 else frames)
        # Under the same lease, a copy of what was acknowledged is refused by its id alone, for as long as the server keeps it.
        since = max(self.restarted, time.monotonic() - SURE_SECONDS)
        among = [
            sent for sent in among if sent.expected not in current or sent.message_ids & unknown or sent.at > since
        ]
        if among:
            sent = dice.choice(among)
            self._repeat(sent if dice.random() < 0.5 else sent.in_another_batch())

    def _replay_lease(self, dice: random.Random) -> None:
        """A late copy of a claim, a renewal or an adoption, or of what was sent before it; or an earlier attempt at the same."""
        frames = [sent for sent in self._frames() if ".lease." in sent.subject]
        if not frames:
            return
        sent = dice.choice(frames)
        if dice.random() < 0.5:
            sent = sent.of_another_attempt()
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
            self.faults["late copies"] += 1

    # ---- the end

    def _finish(self) -> None:
        for process in self.processes:
            self._heal_one(process, random.Random(self.seed))
        dice = random.Random(self.seed)
        for _ in range(20):
            self._replay(dice)
        for agent in AGENTS:
            chunks = self.outside.messages(f"{self.prefix}chunk.{agent}")
            self.history.judge(self._stored(agent), chunks, agent)

    def _stored(self, agent: str) -> list[Stored]:
        return self.outside.messages(f"{self.prefix}log.*.{agent}")

    def _counts(self, violations: int) -> Line:
        at = {key: seqs for agent in AGENTS for key, seqs in positions(self._stored(agent)).items()}
        acked = [write for write in self.history.writes if write.outcome == "acked"]
        line = Line(sum(self.faults.values()), len(acked), len(at))
        line.lost = sum(write.message_id not in at for write in acked)
        line.duplicates = sum(self.history.doubled(seqs) for seqs in at.values())
        line.disordered, line.longest = violations, self.longest
        return line
