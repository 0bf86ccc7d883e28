"""skialith demo: its story ends well for real, and its verdict fails when the evidence is wrong."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from skialith.cli_sql import open_query
from skialith.config import load
from skialith.demo_agent import PLAN, answer_of
from skialith.demo_evidence import SIGKILLED, Evidence, Plan, judge, read_calls, read_rows
from tests.fixtures.command import Said, read_until, running, skialith, stop
from tests.fixtures.local_user import kill_all, wait_gone
from tests.fixtures.mariadb import MariaDB

STEPS = tuple(range(1, len(PLAN) + 1))
PROMISES = 9


def verdicts(said: Said) -> list[str]:
    """The verdict lines of a run."""
    return re.findall(r"^  (?:ok|FAIL)    .*$|^  FAIL  .*$", said.out, re.MULTILINE)


@dataclass
class Kept:
    """A demo whose directory was kept."""

    directory: Path
    said: Said

    @property
    def agent_id(self) -> str:
        return next(self.directory.glob("llm-calls-*.txt")).stem.removeprefix("llm-calls-")

    @property
    def calls_file(self) -> Path:
        return self.directory / f"llm-calls-{self.agent_id}.txt"

    @property
    def plan(self) -> Plan:
        return Plan("default", self.agent_id, f"{self.agent_id}-samples", 3, 6, 1000)

    def judge(self) -> list[str]:
        """The promises that do not hold, by what the files say now."""
        with open_query(load({}, directory=str(self.directory))) as query:
            rows = read_rows(query, self.plan)
        evidence = good(
            calls=read_calls(self.calls_file),
            events=rows.events,
            samples=rows.samples,
            checkpoints=rows.checkpoints,
            traces=rows.counts["agent_traces"],
            duplicates=rows.duplicates,
            dead_letters=rows.dead_letters,
        )
        return [verdict.promise for verdict in judge(self.plan, evidence) if not verdict.held]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """One demo of the embedded default, kept."""
    folder = tmp_path_factory.mktemp("demo")
    yield Kept(folder / "kept", skialith("demo", "--directory", "kept", cwd=folder))
    kill_all(folder / "kept")


# ---- the run


def test_the_demo_keeps_its_promises(kept: Kept) -> None:
    said = kept.said
    assert said.code == 0, said.out + said.err
    found = verdicts(said)
    assert len(found) == PROMISES and all(line.startswith("  ok") for line in found), said.out
    assert "an agent without a log would have made 17" in said.out
    assert len(re.findall(r"^  kill -9 ", said.out, re.MULTILINE)) == 2
    assert "answer found in history(), LLM not called" in said.out
    assert re.search(r"save_event\(\) over 1,000 calls: p50 \d+ us, p95 \d+ us, p99 \d+ us", said.out)
    assert "durability 'process'" in said.out and "What to type next" in said.out
    assert "\x1b" not in said.out


def test_its_claims_stand_when_checked_here_by_hand(kept: Kept) -> None:
    calls = [int(line) for line in kept.calls_file.read_text().splitlines()]
    assert calls == [1, 2, 3, 3, 4, 5, 6, 7, 8]
    with contextlib.closing(sqlite3.connect(kept.directory / "skialith.db")) as database:
        count = "SELECT COUNT(*), COUNT(DISTINCT event_id) FROM agent_events WHERE agent_id = ?"
        assert database.execute(count, (kept.agent_id,)).fetchone() == (8, 8)
        assert database.execute(count, (f"{kept.agent_id}-samples",)).fetchone() == (1000, 1000)
        assert database.execute("SELECT COUNT(*) FROM agent_checkpoints").fetchone() == (8,)
        assert database.execute("SELECT COUNT(*) FROM agent_traces").fetchone() == (1008,)


def test_what_it_says_to_type_next_works(kept: Kept) -> None:
    next_lines = re.findall(r"^  skialith (--directory .*)$", kept.said.out, re.MULTILINE)
    assert len(next_lines) == 3
    for line in next_lines:
        said = skialith(*line.split(), cwd=kept.directory.parent)
        assert said.code == 0 and said.out, line
    history = skialith("--directory", "kept", "history", kept.agent_id, "--json", cwd=kept.directory.parent)
    assert [event["event_id"] for event in history.lines] == [f"step-{step}" for step in STEPS]


def test_at_the_last_step_and_nothing_left_behind(tmp_path: Path) -> None:
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    said = skialith("demo", "--crash-at", "8", cwd=here, TMPDIR=str(temporary))
    assert said.code == 0, said.out + said.err
    assert len(verdicts(said)) == PROMISES and "FAIL" not in said.out
    assert not list(here.iterdir())
    assert not list(temporary.iterdir())


def test_with_a_server_and_a_database_given(nats_url: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'given.db'}"
    given = ["--nats-url", nats_url, "--database-url", url, "--crash-at", "1"]
    said = skialith("demo", *given, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert said.code == 0, said.out + said.err
    assert len(verdicts(said)) == PROMISES and "FAIL" not in said.out
    assert {path.name for path in tmp_path.iterdir()} <= {"given.db", "given.db-wal", "given.db-shm"}
    with contextlib.closing(sqlite3.connect(tmp_path / "given.db")) as database:
        ((namespace,),) = database.execute("SELECT DISTINCT namespace FROM agent_events").fetchall()
    gone = skialith("status", "--nats-url", nats_url, "--namespace", namespace, cwd=tmp_path)
    assert gone.code == 1 and "has no log" in gone.err


def test_with_mysql(nats_url: str, mariadb_url: str, mariadb_server: MariaDB, tmp_path: Path) -> None:
    said = skialith("demo", "--database-url", mariadb_url, "--nats-url", nats_url, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert said.code == 0, said.out + said.err
    assert len(verdicts(said)) == PROMISES and "FAIL" not in said.out
    assert mariadb_server.password not in said.out
    assert not list(tmp_path.iterdir())
    database = mariadb_url.rpartition("/")[2]
    assert mariadb_server.run("SELECT COUNT(*) FROM agent_events", database=database) == [(1008,)]


def test_ctrl_c_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    with running("demo", cwd=tmp_path, TMPDIR=str(tmp_path)) as process:
        said = stop(process, signal.SIGINT, read_until(process, "step 1"))
    assert said.code == 130, said.err
    pids = re.findall(r"\(pid (\d+)\)", said.out)
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    said = skialith("demo", "--nats-url", "nats://127.0.0.1:9", "--timeout", "1", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert said.code == 1 and "error:" in said.err and "Process" not in said.out
    assert not list(tmp_path.iterdir())


# ---- the verdict with wrong evidence


def good(**changes: Any) -> Evidence:
    """Evidence of a demo that went well, with changes."""
    evidence = Evidence(
        exits=(SIGKILLED, SIGKILLED, 0),
        calls=(1, 2, 3, 3, 4, 5, 6, 7, 8),
        acknowledged=tuple(f"step-{step}" for step in STEPS),
        events=tuple(f"step-{step}" for step in STEPS),
        samples=1000,
        checkpoints=STEPS,
        traces=1008,
        duplicates=0,
        state=(8, {"notes": [answer_of(step) for step in STEPS]}),
        unstored=0,
        dead_letters=0,
    )
    return evidence._replace(**changes)


PLANNED = Plan("default", "a", "a-samples", 3, 6, 1000)


def test_good_evidence_holds() -> None:
    assert len(judge(PLANNED, good())) == PROMISES
    assert all(verdict.held for verdict in judge(PLANNED, good()))
    assert all(verdict.held for verdict in judge(PLANNED, good(traces=None)))


@pytest.mark.parametrize(
    ("wrong", "promise"),
    [
        ({"exits": (SIGKILLED, 0)}, "killed twice"),
        ({"exits": (SIGKILLED, SIGKILLED, 1)}, "killed twice"),
        ({"calls": (1, 2, 3, 3, 4, 5, 6, 6, 7, 8)}, "paid for twice"),
        ({"calls": (1, 2, 2, 3, 3, 4, 5, 6, 7, 8)}, "paid for twice"),
        ({"calls": (1, 2, 3, 4, 5, 6, 7, 8)}, "paid for twice"),
        ({"calls": (1, 2, 3, 3, 4, 5, 6, 7)}, "paid for twice"),
        ({"events": tuple(f"step-{step}" for step in STEPS[:-1])}, "every acknowledged event"),
        ({"samples": 999}, "every acknowledged event"),
        ({"samples": 1001}, "nothing else"),
        ({"events": (*(f"step-{step}" for step in STEPS), "step-9")}, "nothing else"),
        ({"events": (*(f"step-{step}" for step in STEPS), "step-8")}, "nothing else"),
        ({"duplicates": 1}, "there twice"),
        ({"checkpoints": STEPS[:-1]}, "its one checkpoint"),
        ({"checkpoints": (*STEPS, 8)}, "its one checkpoint"),
        ({"traces": 1007}, "agent_traces"),
        ({"state": (7, {"notes": []})}, "the finished state"),
        ({"state": (8, {"notes": [answer_of(step) for step in reversed(STEPS)]})}, "the finished state"),
        ({"state": (8, None)}, "the finished state"),
        ({"unstored": 1}, "left over"),
        ({"dead_letters": 1}, "left over"),
    ],
)
def test_wrong_evidence_fails_its_promise(wrong: dict[str, Any], promise: str) -> None:
    broken = [verdict for verdict in judge(PLANNED, good(**wrong)) if not verdict.held]
    assert any(promise in verdict.promise for verdict in broken), broken
    assert all(verdict.found for verdict in broken)


def test_the_files_of_a_real_run_hold_and_fail_when_they_are_falsified(kept: Kept, tmp_path: Path) -> None:
    wait_gone(kept.directory)
    assert kept.judge() == []
    forged = Kept(tmp_path / "forged", kept.said)
    shutil.copytree(kept.directory, forged.directory)
    assert forged.judge() == []

    with forged.calls_file.open("a") as file:
        file.write("5\n")
    assert forged.judge() == ["no finished step was paid for twice"]
    os.truncate(forged.calls_file, forged.calls_file.stat().st_size - 2)

    with contextlib.closing(sqlite3.connect(forged.directory / "skialith.db")) as database:
        database.execute("DELETE FROM agent_events WHERE event_id = 'step-4'")
        database.commit()
        assert "every acknowledged event is in the database" in forged.judge()
        database.execute(
            "INSERT INTO agent_events SELECT randomblob(16), namespace, agent_id, event_id, step_index, event_type, "
            "created_us, store_time_ns, seq, codec, body, body_bytes, body_parts FROM agent_events WHERE event_id = 'step-5'"
        )
        database.commit()
        assert "no row is there twice" in forged.judge()
