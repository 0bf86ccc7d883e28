"""The stage of the endurance test: servers, proxies, processes that live through every epoch, and the faults that befall them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.proxy import Proxy

from . import outside, resources, stepping
from .checker import Checker, Verdict
from .enduring import folder_of, of_epoch, say_epoch
from .over_http import Client, at_work, mixed, serve
from .resources import MIB, Course
from .test_wires import disturb
from .world import SETTLE_SECONDS, Child, World

FREEZE_SECONDS = 1.5
"""Longest freeze of anything; a call of a frozen process may take as much longer."""
GRACE_SECONDS = 2.0 + 2 * FREEZE_SECONDS
ALLOWED = {"nats-server": 256 * MIB, "sidecar": 32 * MIB}
"""By how much one may grow when it is warm. nats-server keeps blocks of 8 MiB that it read in memory for a while, swings with
when its heap was collected last, and was killed at another moment before each look; what it holds is judged by the log being
empty. A sidecar remembers the last 10,000 owners (``IDLE_LANES``), which an hour does not fill."""
ALLOWED_OF_A_CHILD = 12 * MIB
COLD = 4
"""A stage that is over before anybody is warm allows so many times more."""
OFF = {"writer": "off"}
STEP_THREADS = 2
TABLES = ("agent_events", "agent_checkpoints", "agent_traces", "dead_letters")
HTTP_AGENTS = ("http-1", "http-2")
BY_CHILDREN = ("one", "two", "three", "four", "rival", "loose", "awaited-1", "awaited-2")


def cast(pace: float, steps: int) -> dict[str, dict[str, Any]]:
    """Who plays: name and options. Those named ``victim`` are killed now and then, and others follow them."""
    all_kinds: dict[str, Any] = {"threads": 2, "large": 0.01, "nowait": 0.1, "most": 20, "pace": pace}
    rival: dict[str, Any] = {
        "agents": ["rival"],
        "own_ids": True,
        "fenced": "resume",
        "pace": 4 * pace,
        "settings": OFF,
    }
    return {
        "writer": {"agents": []},
        "victim-writer": {"agents": []},
        "owner": {"agents": ["one", "two"], **all_kinds, "settings": OFF},
        "own-writer": {"agents": ["three"], **all_kinds},
        "loose": {"agents": ["loose"], "fenced": "never", "own_ids": True, "pace": pace, "settings": OFF},
        "awaited": {
            "role": "await",
            "agents": ["awaited-1", "awaited-2"],
            "most": 8,
            "cancels": 0.1,
            "pace": pace,
            "settings": OFF,
        },
        "rival": rival,
        "victim-rival": rival,
        "victim-owner": {"agents": ["four"], **all_kinds, "settings": OFF},
        "steps": {
            "role": "steps",
            "agents": ["stepper"],
            "threads": STEP_THREADS,
            "steps": steps,
            "pace": 2 * pace,
            "settings": {**OFF, "timeout": 20.0},
        },
        "browser": {"role": "browse", "agents": ["one", "rival", "loose"], "pace": 1.0, "settings": OFF},
    }


class Stage(World):
    """A world whose children play in epochs; ``folder`` is that of the current one. ``faults`` counts those that were done.

    Of servers it asks for ``url``, ``pid``, ``kill``, ``start``, ``pause`` and ``resume``, so that others can take their place.
    """

    def __init__(self, place: Path, nats: NatsServer, database: MariaDB | str, seed: int, *, cold: bool) -> None:
        url = database if isinstance(database, str) else database.url("endurance")
        super().__init__(place, nats.url, url, seed)
        self.nats = nats
        self.mariadb = None if isinstance(database, str) else database
        self.base = self.folder
        self.epoch = -1
        self.faults: Counter[str] = Counter()
        self.players: dict[str, Child] = {}
        self.courses: dict[str, Course] = {}
        self.total = Verdict()
        self.sidecar_pid = 0
        self.allowed_times = COLD if cold else 1
        self.wires: dict[str, Proxy] = {}
        self._roles: dict[str, dict[str, Any]] = {}
        self._deck: list[str] = []
        self._stored: dict[int, list[int]] = {}
        self._active: set[str] = set()

    # ---- who plays

    @contextlib.contextmanager
    def play(self, roles: dict[str, dict[str, Any]]) -> Iterator[int]:
        """Everybody is there until the block ends; gives the sidecar's port."""
        self._roles = roles
        say_epoch(self.base, None)
        with contextlib.ExitStack() as stack:
            self.wires["nats"] = stack.enter_context(_before(self.nats_url))
            if self.mariadb is not None:
                self.wires["database"] = stack.enter_context(_before(self.database_url))
            made = stack.enter_context(serve(self))
            self.sidecar_pid = made.process.pid
            for name in roles:
                self.enter(name)
            for child in self.players.values():
                child.wait_ready()
            yield made.port
            for child in self.players.values():
                assert child.stop() == 0, child.tail()

    def enter(self, name: str) -> Child:
        """One who plays begins, in the current epoch if there is one."""
        given = dict(self._roles[name])
        through = {"nats_url": f"nats://127.0.0.1:{self.wires['nats'].port}"}
        if "database" in self.wires:
            server = urlsplit(self.database_url)
            netloc = f"{server.netloc.rpartition(':')[0]}:{self.wires['database'].port}"
            through["database_url"] = server._replace(netloc=netloc).geturl()
        given["settings"] = {**through, **given.get("settings", {})}
        child = self.spawn("endure", name, folder=str(self.base), **given)
        self.players[name] = child
        return child

    # ---- an epoch

    def live(self, port: int, seconds: float, pause: float) -> None:
        """An epoch of ``seconds`` of load with a fault every ``pause`` seconds or so; then everybody has stopped."""
        self.epoch += 1
        for role in ("work", "steps"):
            folder_of(self.base, role, self.epoch).mkdir()
        self.folder = folder_of(self.base, "work", self.epoch)
        say_epoch(self.base, self.epoch)
        clients = [Client(self, of_epoch(agent_id, self.epoch), [port]) for agent_id in HTTP_AGENTS]
        until = time.monotonic() + seconds
        with at_work(clients, mixed):
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(left, self.dice.uniform(0, 2 * pause)))
                self.befall()
        for client in clients:
            client.notebook.close()
        self._end_epoch()

    def _end_epoch(self) -> None:
        epoch, say = self.epoch, say_epoch
        say(self.base, None)
        for child in self.players.values():
            child.wait_for(lambda lines: any(line.get("epoch") == epoch for line in lines), f"epoch {epoch} is over")
            assert child.running, child.tail()

    def befall(self) -> None:
        """The next fault: each kind once in every round through all of them, in an order that the dice give."""
        if not self._deck:
            self._deck = [name for name, needs in FAULTS.items() if needs.possible(self)]
            self.dice.shuffle(self._deck)
        name = self._deck.pop()
        print(f"  epoch {self.epoch}: {name}", flush=True)
        FAULTS[name].do(self)
        self.faults[name] += 1

    # ---- judging

    def judge(self) -> Verdict:
        """Settle and judge the epoch that is over, look at everybody's memory, and forget the evidence if it is in order."""
        self.hurry()
        began = time.monotonic()
        wait_until(lambda: self.log().idle, 2 * SETTLE_SECONDS, "what was frozen and cut off has stored all of it")
        print(f"  settled in {time.monotonic() - began:.1f} s", flush=True)
        names = (*BY_CHILDREN, *HTTP_AGENTS)
        agents = [of_epoch(agent_id, self.epoch) for agent_id in names]
        reader = self.spawn("read", "reader", agents=agents, settings={**OFF, "timeout": 20.0})
        assert reader.wait() == 0, reader.tail()
        self.check_exits()
        evidence, log = self.evidence(), self.log()
        tables = outside.read_tables(self.database_url, self.namespace, agents)
        verdict = Checker(evidence, tables, log, grace=GRACE_SECONDS).verdict()
        self._active.update(call.agent.partition(".")[0] for call in evidence.of("event", "events") if call.acks)
        self._judge_steps(verdict)
        self._stored[self.epoch] = self._counts(self.epoch)
        self._sample()
        self._add(verdict)
        if not verdict.problems:
            for role in ("work", "steps"):
                folder = folder_of(self.base, role, self.epoch)
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        return verdict

    def _judge_steps(self, verdict: Verdict) -> None:
        folder, self.folder = self.folder, folder_of(self.base, "steps", self.epoch)
        evidence = self.evidence()
        self.folder = folder
        tables = outside.read_tables(self.database_url, self.namespace, [of_epoch("stepper", self.epoch)])
        steps = stepping.judge(evidence, tables, STEP_THREADS, self._roles["steps"]["steps"])
        verdict.problems += steps.problems
        for name in ("acknowledged", "stored", "duplicates", "lost", "disordered", "dead_letters"):
            setattr(verdict, name, getattr(verdict, name) + getattr(steps, name))

    def _add(self, verdict: Verdict) -> None:
        self.total.problems += verdict.problems
        for name in ("acknowledged", "stored", "duplicates", "lost", "disordered", "dead_letters"):
            setattr(self.total, name, getattr(self.total, name) + getattr(verdict, name))
        self.total.longest = max(self.total.longest, verdict.longest)

    def _counts(self, epoch: int) -> list[int]:
        """Rows of the epoch's agents, table by table."""
        agents = [of_epoch(agent_id, epoch) for agent_id in (*BY_CHILDREN, *HTTP_AGENTS, "stepper")]
        where = f"namespace = ? AND agent_id IN ({', '.join('?' for _ in agents)})"
        with outside.database(self.database_url) as run:
            return [
                run(f"SELECT COUNT(*) FROM {table} WHERE {where}", (self.namespace, *agents))[0][0] for table in TABLES
            ]

    def last_look(self) -> Verdict:
        """On all epochs together: nothing came into one after it was judged, everybody did something and stayed flat."""
        for epoch, before in self._stored.items():
            if (now := self._counts(epoch)) != before:
                self.total.fault(f"DOUBLED: rows of epoch {epoch} were {before} when it was judged and are {now}")
        idle = {*BY_CHILDREN, *HTTP_AGENTS} - self._active
        self.total.problems += [f"IDLE: nothing of {agent} was ever acknowledged" for agent in sorted(idle)]
        for name, course in self.courses.items():
            self.total.problems += course.faults(name)
        return self.total

    # ---- what they hold

    def _sample(self) -> None:
        pids = {name: child.process.pid for name, child in self.players.items() if not name.startswith("victim")}
        pids |= {"nats-server": self.nats.pid, "sidecar": self.sidecar_pid}
        for name, pid in pids.items():
            allowed = ALLOWED.get(name, ALLOWED_OF_A_CHILD) * self.allowed_times
            course = self.courses.setdefault(name, Course(allowed))
            course.samples.append(resources.look(pid))


def _before(url: str) -> Proxy:
    server = urlsplit(url)
    return Proxy(server.hostname or "", server.port or 0)


# ---- faults: each is over when its function returns


class Fault:
    """``do``: what happens. ``possible``: whether the stage has what it happens to."""

    def __init__(self, do: Callable[[Stage], None], possible: Callable[[Stage], bool] = lambda stage: True) -> None:
        self.do = do
        self.possible = possible


def _one_of(stage: Stage, part: str, *, victims: bool) -> str:
    names = [name for name in stage.players if part in name and name.startswith("victim") == victims]
    return stage.dice.choice([name for name in names if victims or part or "writer" not in name])


def _kill(part: str) -> Callable[[Stage], None]:
    def kill(stage: Stage) -> None:
        name = _one_of(stage, part, victims=True)
        stage.players[name].kill()
        time.sleep(stage.dice.uniform(0, 0.3))
        stage.enter(name).wait_ready()

    return kill


def _freeze(part: str) -> Callable[[Stage], None]:
    def freeze(stage: Stage) -> None:
        child = stage.players[_one_of(stage, part, victims=False)]
        child.signal(signal.SIGSTOP)
        time.sleep(stage.dice.uniform(0.1, FREEZE_SECONDS))
        child.signal(signal.SIGCONT)

    return freeze


def _down(stage: Stage) -> float:
    return stage.dice.uniform(0, FREEZE_SECONDS)


def _kill_nats(stage: Stage) -> None:
    stage.nats.kill()
    time.sleep(_down(stage))
    stage.nats.start()


def _freeze_nats(stage: Stage) -> None:
    stage.nats.pause()
    time.sleep(_down(stage))
    stage.nats.resume()


def _kill_mariadb(stage: Stage) -> None:
    assert stage.mariadb is not None
    stage.mariadb.kill()
    time.sleep(_down(stage))
    stage.mariadb.start()


def _freeze_mariadb(stage: Stage) -> None:
    assert stage.mariadb is not None
    stage.mariadb.pause()
    time.sleep(_down(stage))
    stage.mariadb.resume()


def _disturb(wire: str) -> Callable[[Stage], None]:
    return lambda stage: print(f"    {disturb(stage.wires[wire], stage.dice)}", flush=True)


def _has_mariadb(stage: Stage) -> bool:
    return stage.mariadb is not None


FAULTS: dict[str, Fault] = {
    "an owner killed": Fault(_kill("owner")),
    "a rival killed": Fault(_kill("rival")),
    "a writer killed": Fault(_kill("writer")),
    "an agent frozen": Fault(_freeze("")),
    "a writer frozen": Fault(_freeze("writer")),
    "nats-server killed": Fault(_kill_nats),
    "nats-server frozen": Fault(_freeze_nats),
    "the wire to NATS": Fault(_disturb("nats")),
    "MariaDB killed": Fault(_kill_mariadb, _has_mariadb),
    "MariaDB frozen": Fault(_freeze_mariadb, _has_mariadb),
    "the wire to MariaDB": Fault(_disturb("database"), _has_mariadb),
}
"""Every kind of fault in the mix; whoever has another one adds it here."""
