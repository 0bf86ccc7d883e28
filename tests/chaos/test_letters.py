"""A thousand dead letters: shown, stored after all, given up, by commands that are killed and by HTTP."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from skialith import SkialithAgent
from tests.fixtures.command import SECONDS, environment

from . import outside
from .conftest import Report
from .evidence import Notebook
from .over_http import serve
from .script import Script
from .world import World

pytestmark = pytest.mark.chaos
LETTERS = 1000
PAGE = 100


def bury(world: World, count: int) -> list[str]:
    """So many events of an agent are refused, and every other letter by the table too; ids in order. Then all is mended."""
    settings = world.options().settings
    ids = [f"dead{n:04}" for n in range(count)]
    with SkialithAgent("one", **settings) as agent:
        script = Script(agent, Notebook(world.folder, "test"))
        script.resume()
        script.save("alive")
        script.flush()
        outside.refuse(world.database_url, ids, letters_too=ids[::2])
        script.save_all(ids)
        script.checkpoint(1)
        assert agent.flush(SECONDS) == count
    outside.accept(world.database_url)
    return ids


class Commands:
    """``skialith dead-letters`` in this world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._settings = {f"SKIALITH_{name.upper()}": str(value) for name, value in world.options().settings.items()}

    def run(self, *arguments: str, before: str = "") -> tuple[int, str, float]:
        """Exit code, output and seconds of one command; ``before``: code that it runs first."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", f"{before}\nfrom skialith.cli import main\nmain()", "dead-letters", *arguments],
            cwd=self._world.place,
            env=environment(**self._settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
            text=True,
        )
        return done.returncode, done.stdout, time.monotonic() - began

    def listed(self) -> dict[str, dict[str, Any]]:
        """Every letter by its id, in order."""
        code, text, _ = self.run("list", "--json")
        assert code == 0
        return {each["id"]: each for each in json.loads(text)}

    def until_done(self, verb: str, ids: Sequence[str], point: str, passages: Sequence[int]) -> float:
        """The command, killed at these passages of a point, and then once more to its end; that one's seconds."""
        flags = ["--yes"] if verb == "discard" else []
        for passage in passages:
            die = f"from tests.chaos import faults; faults.install({{{point!r}: {passage}}}, {{}})"
            left = [each for each in self.listed() if each in set(ids)]
            code, _, _ = self.run(verb, *left, *flags, before=die)
            assert code == -signal.SIGKILL
        left = [each for each in self.listed() if each in set(ids)]
        code, text, seconds = self.run(verb, *left, *flags)
        assert code == 0 and f"{len(left)} dead letters" in text, text
        return seconds


def test_a_thousand_dead_letters(sqlite_world: World, report: Report) -> None:
    world, dice = sqlite_world, sqlite_world.dice
    buried = bury(world, LETTERS)
    commands = Commands(world)
    listed = commands.listed()
    assert [each["event_id"] for each in listed.values()] == buried
    assert [each["kept_in"] for each in listed.values()] == ["stream", "table"] * (LETTERS // 2)
    ids = list(listed)

    with serve(world) as made, made.client() as http:
        paged: list[str] = []
        after: dict[str, str] = {}
        began = time.monotonic()
        while True:
            page = http.get("/dead-letters", params={"limit": PAGE, **after}).raise_for_status().json()
            paged += [each["id"] for each in page["dead_letters"]]
            assert len(page["dead_letters"]) == PAGE
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        paging = time.monotonic() - began
        assert paged == ids
        for each in ids[:10]:
            http.post(f"/dead-letters/{each}/replay").raise_for_status()
        for each in ids[-10:]:
            http.delete(f"/dead-letters/{each}").raise_for_status()

    names = {each: ("one", listed[each]["event_id"]) for each in ids}
    replayed, discarded = ids[10:600], ids[600:]
    passages = [dice.randrange(2, 90) for _ in range(2)]
    replaying = commands.until_done("replay", replayed, dice.choice(["before replay", "after replay"]), passages)
    discarding = commands.until_done("discard", discarded[:-10], "after discard", [dice.randrange(2, 90)])
    assert commands.listed() == {}
    keys = {names[each]: bytes.fromhex(each.partition("/")[2]) for each in discarded}
    verdict = world.verdict(steady=True, discarded=keys)
    report("25 a thousand dead letters", 3, verdict)
    print(
        f"{LETTERS} letters: pages {paging:.2f} s, replay {replaying:.1f} s, discard {discarding:.1f} s (the last runs)"
    )
    assert not verdict.problems, str(verdict)


def test_a_replay_that_removes_the_letter_first_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    bury(world, 4)
    commands = Commands(world)
    broken = "from tests.chaos import faults; faults.install({}, {}, 'remove before replay')"
    code, _, _ = commands.run("replay", "--all", before=broken)
    assert code == -signal.SIGKILL
    assert commands.run("replay", "--all")[0] == 0
    verdict = world.verdict()
    report("canary: a letter removed before its replay (lost is right here)", 1, verdict)
    assert verdict.lost and any(text.startswith("LOST") for text in verdict.problems), verdict
