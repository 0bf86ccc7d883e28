"""Mixed load on everything at once with a fault every few seconds, judged again and again; who lives through it stays flat."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer, wait_until

from .conftest import Report
from .endurance import ALLOWED_OF_A_CHILD, Stage, cast
from .enduring import folder_of, say_epoch
from .evidence import ROUNDS
from .resources import Course, look, table
from .world import World, rounds

SECONDS = float(os.environ.get("SKIALITH_CHAOS_SECONDS") or 0)
"""How long the long run goes on, on MariaDB; 0: the short one, on SQLite."""
SHORT_EPOCHS = 3
LEAK_BYTES = 6_000_000
"""Evidence that a child writes down until a leak must show: some 45,000 events, each of which is about 800 bytes to keep."""

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(180 * max(1.0, ROUNDS) + 2 * SECONDS)
def test_endurance(tmp_path: Path, seed: int, report: Report) -> None:
    """Epoch after epoch: load and faults, then all stop and what they did is judged, while the processes live on."""
    long = SECONDS > 0
    with ExitStack() as stack:
        nats = stack.enter_context(NatsServer(tmp_path / "nats", jetstream_config="max_file_store: 4TB"))
        database: MariaDB | str = f"sqlite:///{tmp_path / 'skialith.db'}"
        if long:
            database = stack.enter_context(MariaDB(tmp_path / "mariadb"))
        stage = stack.enter_context(Stage(tmp_path, nats, database, seed, cold=not long))
        with stage.play(cast(0.3, 100) if long else cast(0.1, 20)) as port:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end if long else stage.epoch + 1 < rounds(SHORT_EPOCHS):
                began = time.monotonic()
                stage.live(port, *(40.0, 2.0) if long else (2.5, 0.1))
                lived = time.monotonic() - began
                verdict = stage.judge()
                judged = time.monotonic() - began - lived
                counts = f"{verdict.acknowledged} acknowledged, {verdict}"
                print(f"epoch {stage.epoch}: {lived:.0f} s, judged in {judged:.0f} s: {counts}", flush=True)
                assert not verdict.problems, f"{verdict}\nevidence: {stage.folder}"
        total = stage.last_look()
    print(*(f"{count:>6} {name}" for name, count in stage.faults.most_common()), sep="\n")
    print(table(stage.courses))
    report(f"26 endurance, {stage.epoch + 1} epochs, {stage.database}", stage.faults.total(), total)
    assert not total.problems, str(total)


def test_a_leak_is_caught(sqlite_world: World) -> None:
    """A process that keeps every call grows beyond what is allowed; one that does not stays within it."""
    world, epoch = sqlite_world, 0
    say_epoch(world.folder, epoch)
    folder_of(world.folder, "work", epoch).mkdir()
    busy: dict[str, Any] = {"batches": 1.0, "most": 200, "own_ids": True, "settings": {"writer": "off"}}
    courses = {}
    for break_ in ("", "keep every ticket"):
        child = world.spawn("endure", agents=["one"], break_=break_, **busy)
        child.wait_ready()
        written = folder_of(world.folder, "work", epoch) / child.file.name
        course = courses[break_] = Course(ALLOWED_OF_A_CHILD)
        for size in range(LEAK_BYTES // 4, LEAK_BYTES + 1, LEAK_BYTES // 4):
            wait_until(lambda: written.exists() and written.stat().st_size >= size, 60.0, "it has written")  # noqa: B023
            course.samples.append(look(child.process.pid))
        child.kill()
    print(table(courses))
    assert not courses[""].faults("honest")
    assert any(text.startswith("GROWN") for text in courses["keep every ticket"].faults("broken"))
