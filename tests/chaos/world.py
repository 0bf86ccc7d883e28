"""One scenario's world: a namespace on a NATS server, a database, and the children that come and go in it."""

from __future__ import annotations

import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tests.fixtures.nats import pause, wait_until

from . import evidence, outside
from .checker import Checker, Verdict
from .script import BUG, Options

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0
END_SECONDS = 40.0
SETTLE_SECONDS = 60.0
ROUNDS = evidence.ROUNDS


def rounds(count: int) -> int:
    """How often to do it in this run: ``count`` times ``SKIALITH_CHAOS_ROUNDS``."""
    return max(1, round(count * evidence.ROUNDS))


class Child:
    """One running child."""

    def __init__(self, program: str, options: Options, place: Path) -> None:
        self.name = options.name
        self.agents = options.agents
        self.log = place / f"{options.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "tests.chaos.children", program, options.text()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.file = Path(options.folder) / f"{options.name}.{self.process.pid}{evidence.SUFFIX}"

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def lines(self) -> list[dict[str, Any]]:
        """What it has written down so far."""
        return evidence.lines(self.file)

    def wait_for(self, condition: Callable[[list[dict[str, Any]]], bool], what: str) -> None:
        """Until its notes fulfil the condition, or it has ended."""
        wait_until(lambda: not self.running or condition(self.lines()), START_SECONDS, f"{self.name}: {what}")

    def wait_ready(self) -> None:
        self.wait_for(lambda lines: any(line.get("what") == "ready" for line in lines), "is ready")
        assert self.running or self.process.returncode == -signal.SIGKILL, self.tail()

    def wait_writes(self, count: int) -> None:
        """Until so many more calls of it have returned."""
        before = len(self._returned())
        self.wait_for(lambda _: len(self._returned()) >= before + count, f"{count} calls more")

    def in_flight(self) -> int:
        """Records of its calls that have begun and not returned."""
        begun: dict[int, int] = {}
        for line in self.lines():
            if line["op"] == "call":
                begun[line["n"]] = len(line["items"])
            elif line["op"] in ("done", "fail"):
                del begun[line["n"]]
        return sum(begun.values())

    def _returned(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["op"] in ("done", "fail")]

    def signal(self, number: signal.Signals) -> None:
        if self.running and number == signal.SIGSTOP:
            pause(self.process.pid)
        elif self.running:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.process.wait(END_SECONDS)

    def wait_frozen(self) -> None:
        """Until it has stopped itself."""
        state = Path(f"/proc/{self.process.pid}/stat")
        wait_until(
            lambda: state.read_text().rpartition(")")[2].split()[0] == "T", START_SECONDS, f"{self.name} is frozen"
        )

    def stop(self) -> int:
        """SIGTERM, on which it ends its work in order; its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = END_SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGABRT)  # faulthandler writes every thread's stack into the log
            self.process.wait(END_SECONDS)
            raise AssertionError(f"{self.name} does not end:\n{self.tail()}") from None

    def tail(self) -> str:
        return f"{self.name} ({self.process.returncode}): " + self.log.read_text("utf-8", "replace")[-6000:]


class World:
    """Leaves no child behind. ``nats_url`` and ``database_url`` are the real ones; children may be given proxies instead."""

    def __init__(self, place: Path, nats_url: str, database_url: str, seed: int) -> None:
        self.place = place
        self.nats_url = nats_url
        self.database_url = database_url
        self.seed = seed
        self.dice = random.Random(seed)
        self.namespace = f"c{secrets.token_hex(6)}"
        self.folder = place / "evidence"
        self.folder.mkdir()
        self.children: list[Child] = []
        self.runs = 0
        self.bugs = {BUG, -signal.SIGSEGV, -signal.SIGABRT}
        """Exit codes that no child may have."""

    def options(self, name: str = "child", **given: Any) -> Options:
        """Options of a child in this world; ``settings`` are added to the usual ones."""
        settings = {
            "nats_url": self.nats_url,
            "database_url": self.database_url,
            "namespace": self.namespace,
            "timeout": 5.0,
            "wal_bytes": 256 * 1024 * 1024,
            **given.pop("settings", {}),
        }
        options = Options(f"{name}-{len(self.children)}", str(self.folder), settings, seed=self.dice.randrange(1 << 32))
        return replace(options, **given)

    def spawn(self, program: str = "work", name: str = "child", **given: Any) -> Child:
        child = Child(program, self.options(name, **given), self.place)
        self.children.append(child)
        return child

    def settle(self) -> None:
        """A fresh writer runs until the log holds no record any more."""
        writer = self.spawn("write", "settler")
        writer.wait_ready()
        self.hurry()
        deadline = time.monotonic() + SETTLE_SECONDS
        while writer.running and not (log := self.log()).idle:
            assert time.monotonic() < deadline, f"the log does not get empty: {log}\n{writer.tail()}"
            time.sleep(0.02)
        assert writer.stop() == 0, writer.tail()

    def log(self) -> outside.LogState:
        return outside.read_log(self.nats_url, self.namespace)

    def hurry(self) -> None:
        outside.hurry(self.nats_url, self.namespace)

    def evidence(self) -> evidence.Evidence:
        return evidence.read(self.folder)

    def verdict(self, *, settle: bool = True, dead: Iterable[tuple[str, str]] = (), **expected: Any) -> Verdict:
        """Settle, let a newcomer read everything, and judge."""
        if settle:
            self.settle()
        agents = sorted({call.agent for call in self.evidence().calls if call.agent})
        reader = self.spawn("read", "reader", agents=agents, settings={"writer": "off", "timeout": 20.0})
        assert reader.wait(END_SECONDS * max(1.0, ROUNDS)) == 0, reader.tail()
        self.check_exits()
        tables = outside.read_tables(self.database_url, self.namespace)
        return Checker(self.evidence(), tables, self.log(), dead=dead, settled=settle, **expected).verdict()

    @property
    def database(self) -> str:
        """``"sqlite"`` or ``"mysql"``."""
        return self.database_url.partition(":")[0]

    def wait_closed(self, part: str, count: int) -> None:
        """Until so many children whose name holds ``part`` have written down that they closed."""
        wait_until(
            lambda: sum(note["what"] == "closed" and part in note["child"] for note in self.evidence().notes) >= count,
            END_SECONDS,
            f"{count} children named {part} are closed",
        )

    def check_exits(self) -> None:
        """Children that are gone were killed or ended in order; none met an error that is not Skialith's own."""
        bugs = [child.tail() for child in self.children if child.process.poll() in self.bugs]
        assert not bugs, bugs[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in self.children:
            child.signal(signal.SIGKILL)
        for child in self.children:
            child.process.wait(END_SECONDS)
