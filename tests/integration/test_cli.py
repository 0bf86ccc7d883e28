"""The skialith command as a user runs it: what it says, to whom, and with which exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from skialith import SkialithAgent
from skialith.config import load
from skialith.graphs import PutWrites, Write, record, typed
from skialith.records import DeadLetter, Kind, Position, Record
from skialith.runtime import acquire
from tests.fixtures.agents import OpenAgent
from tests.fixtures.command import environment, read_until, running, skialith, stop
from tests.fixtures.graphs import OpenSaver, at, id_of, put
from tests.fixtures.local_user import kill_all
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer, free_port, wait_until
from tests.fixtures.stores import outside
from tests.fixtures.wal import new_namespace

STRANGE = "\x1b[31mred\n[bold]"
"""An agent id that a terminal must not see as it is."""


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as the command's options."""
    names = {"nats_url": "--nats-url", "database_url": "--database-url", "namespace": "--namespace"}
    return [word for name, option in names.items() for word in (option, str(settings[name]))]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose .skialith holds two agents; its server does not run."""
    folder = tmp_path_factory.mktemp("user")
    directory = folder / ".skialith"
    settings: dict[str, Any] = {"directory": str(directory), "timeout": 20.0}
    with SkialithAgent("writer-of-many", **settings) as agent, SkialithAgent(STRANGE, **settings) as strange:
        agent.resume()
        agent.save_event("step-1", {"kind": "thought", "text": "héllo"}, step=1)
        agent.save_event("step-2", {"kind": "tool_call", "raw": b"\x00\xff", "nan": float("nan")}, step=2)
        agent.save_event("step-3", {"kind": "thought", "text": "x" * 300}, step=3)
        agent.checkpoint(step=3, data={"messages": ["a", "b"]})
        strange.save_event(STRANGE, {"kind": STRANGE})
        agent.flush(20)
    yield folder
    kill_all(directory)


# ---- the program itself


def test_version_and_help(tmp_path: Path) -> None:
    assert skialith("--version", cwd=tmp_path).out == "skialith 0.1.0\n"
    said = skialith("--help", cwd=tmp_path)
    assert said.code == 0
    commands = "demo up writer status agents history state dead-letters migrate traces doctor bench"
    for command in commands.split():
        assert command in said.out
        assert skialith(command, "--help", cwd=tmp_path).code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["status", "--nonsense"],
        ["status", "--timeout", "soon"],
        ["status", "--timeout", "-1"],
        ["status", "--durability", "maybe"],
        ["status", "--namespace", "a b"],
        ["status", "--nats-url", "http://localhost:4222"],
        ["status", "--nats-url", "nats://localhost:4222", "--database-url", "postgres://localhost/db"],
        ["history"],
        ["history", "agent", "--limit", "0"],
        ["traces", "perhaps"],
        ["dead-letters", "replay"],
        ["demo", "--crash-at", "9"],
        ["up", "--nats-url", "nats://localhost:4222"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_explained_and_exits_with_2(arguments: list[str], tmp_path: Path) -> None:
    said = skialith(*arguments, cwd=tmp_path)
    assert (said.code, said.out) == (2, "")
    assert said.err.strip()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["status", "agents", "history a", "state a", "dead-letters list", "traces off"])
def test_where_nothing_is_it_says_how_to_begin_and_leaves_nothing_behind(command: str, tmp_path: Path) -> None:
    said = skialith(*command.split(), cwd=tmp_path)
    assert (said.code, said.out) == (1, "")
    assert "nothing here yet" in said.err and "skialith demo" in said.err
    assert not list(tmp_path.iterdir())


# ---- looking


def test_status_for_people_and_for_machines(embedded: Path) -> None:
    said = skialith("status", cwd=embedded)
    assert said.code == 0
    for text in ("namespace", "embedded nats-server", "up to date", "agent_events 4", "dead letters", "process: "):
        assert text in said.out
    assert "\x1b" not in said.out
    document = skialith("status", "--json", cwd=embedded).document
    assert document["database"]["rows"] == {
        "agent_events": 4,
        "agent_checkpoints": 1,
        "agent_traces": 4,
        "dead_letters": 0,
    }
    assert document["oldest_unstored"] is None and document["traces"] is True
    assert [(lag["name"], lag["records"]) for lag in document["consumers"]] == [("writer", 0), ("trace_ingest", 0)]
    assert document["dead_letters"] == {"table": 0, "stream": 0}
    assert document["log"]["max_bytes"] > 0 and document["server"]["version"].startswith("2.")
    assert document["durability"]["setting"] == "process"


def test_status_says_what_is_not_stored(open_agent: OpenAgent, settings: dict[str, Any], tmp_path: Path) -> None:
    agent = open_agent(writer="off")
    agent.save_events([(f"e{n}", n) for n in range(3)])
    said = skialith("status", *options(settings), cwd=tmp_path)
    assert said.code == 0
    assert "3 records behind" in said.out and "skialith writer" in said.out and "ago" in said.out
    document = skialith("status", "--json", *options(settings), cwd=tmp_path).document
    assert document["consumers"][0]["records"] == 3
    assert document["oldest_unstored"]["seconds"] > 0


def test_agents(embedded: Path) -> None:
    said = skialith("agents", cwd=embedded)
    assert (
        said.code == 0
        and "writer-of-many" in said.out
        and "\x1b" not in said.out
        and r"\x1b[31mred\n[bold]" in said.out
    )
    found = skialith("agents", "--json", cwd=embedded).document
    assert [(a["agent_id"], a["events"], a["checkpoints"], a["step_index"]) for a in found] == [
        (STRANGE, 1, 0, 0),
        ("writer-of-many", 3, 1, 3),
    ]
    limited = skialith("agents", "--json", "--limit", "1", cwd=embedded)
    assert [a["agent_id"] for a in limited.document] == [STRANGE] and "more follow" in limited.err
    assert [a["agent_id"] for a in skialith("agents", "--json", "--after", STRANGE, cwd=embedded).document] == [
        "writer-of-many"
    ]


def test_history(embedded: Path) -> None:
    said = skialith("history", "writer-of-many", "--json", cwd=embedded)
    assert said.code == 0
    assert [(event["event_id"], event["type"], event["step_index"], event["stored"]) for event in said.lines] == [
        ("step-1", "thought", 1, True),
        ("step-2", "tool_call", 2, True),
        ("step-3", "thought", 3, True),
    ]
    assert said.lines[0]["data"] == {"kind": "thought", "text": "héllo"}
    assert said.lines[1]["data"]["raw"] == {"skialith_base64": "AP8="}
    assert said.lines[1]["data"]["nan"] == {"skialith_omitted": "NaN"}

    first = skialith("history", "writer-of-many", "--json", "--limit", "1", cwd=embedded)
    assert [event["event_id"] for event in first.lines] == ["step-1"] and "more follow" in first.err
    rest = skialith("history", "writer-of-many", "--json", "--after", first.lines[0]["cursor"], cwd=embedded)
    assert [event["event_id"] for event in rest.lines] == ["step-2", "step-3"]
    thoughts = skialith("history", "writer-of-many", "--json", "--type", "thought", cwd=embedded)
    assert [event["event_id"] for event in thoughts.lines] == ["step-1", "step-3"]

    people = skialith("history", "writer-of-many", cwd=embedded)
    assert "x" * 300 in people.out, "a pipe gets everything"
    assert len(people.out.splitlines()) == 4
    strange = skialith("history", STRANGE, cwd=embedded)
    assert "\x1b" not in strange.out and len(strange.out.splitlines()) == 2


def test_state(embedded: Path) -> None:
    said = skialith("state", "writer-of-many", "--json", cwd=embedded)
    assert said.document == {
        "agent_id": "writer-of-many",
        "step_index": 3,
        "is_new": False,
        "source": "database",
        "database_ok": True,
        "data": {"messages": ["a", "b"]},
    }
    assert '"messages"' in skialith("state", "writer-of-many", cwd=embedded).out
    fresh = skialith("state", STRANGE, "--json", cwd=embedded)
    assert fresh.document["is_new"] is True and fresh.code == 0


@pytest.mark.parametrize("command", ["history", "state"])
def test_an_unknown_agent(command: str, embedded: Path) -> None:
    for json in ([], ["--json"]):
        said = skialith(command, "nobody", *json, cwd=embedded)
        assert (said.code, said.out) == (1, "")
        assert "nobody" in said.err and "skialith agents" in said.err


def test_a_wrong_cursor(embedded: Path) -> None:
    said = skialith("history", "writer-of-many", "--after", "yesterday", cwd=embedded)
    assert said.code == 2 and "after" in said.err


def test_a_large_and_deep_state_is_shown_whole(open_agent: OpenAgent, settings: dict[str, Any], tmp_path: Path) -> None:
    deep: Any = "bottom"
    for _ in range(100):
        deep = [deep]
    open_agent(writer="off").checkpoint(step=1, data={"text": "y" * 3_000_000, "deep": deep})
    for _ in range(5):  # unbuffered, Python gives up what a pipe did not take at once
        said = skialith("state", "agent", "--json", *options(settings), cwd=tmp_path, PYTHONUNBUFFERED="1")
        assert said.document["step_index"] == 1
    document = skialith("state", "agent", "--json", *options(settings), cwd=tmp_path).document
    assert len(document["data"]["text"]) == 3_000_000 and document["source"] == "wal"
    for _ in range(100):
        (document["data"]["deep"],) = document["data"]["deep"]
    assert document["data"]["deep"] == "bottom"


# ---- settings


def test_settings_may_stand_before_and_behind_the_command_and_win_over_the_environment(
    open_agent: OpenAgent, settings: dict[str, Any], tmp_path: Path
) -> None:
    open_agent(writer="off").save_event("e", 1)
    words = options(settings)
    everywhere = [
        skialith("status", "--json", *words, cwd=tmp_path),
        skialith(*words, "status", "--json", cwd=tmp_path),
        skialith("--namespace", "other", "status", "--json", *words, cwd=tmp_path, SKIALITH_NAMESPACE="third"),
        skialith(
            "status", "--json", cwd=tmp_path,
            SKIALITH_NATS_URL=settings["nats_url"], SKIALITH_DATABASE_URL=settings["database_url"],
            SKIALITH_NAMESPACE=settings["namespace"],
        ),
    ]  # fmt: skip
    for said in everywhere:
        assert said.code == 0, said.err
        assert said.document["namespace"] == settings["namespace"]
        assert said.document["log"]["messages"] >= 1


def test_looking_at_a_mistyped_namespace_makes_nothing(nats_url: str, tmp_path: Path) -> None:
    words = ["--nats-url", nats_url, "--namespace", new_namespace()]
    for command in (["status"], ["agents"], ["history", "a"], ["dead-letters", "list"]):
        said = skialith(*command, *words, cwd=tmp_path)
        assert (said.code, said.out) == (1, "") and "has no log" in said.err, command
    assert not list(tmp_path.iterdir())


# ---- what can be wrong around it


def test_an_unreachable_server(tmp_path: Path) -> None:
    said = skialith("status", "--nats-url", f"nats://127.0.0.1:{free_port()}", "--timeout", "1", cwd=tmp_path)
    assert (said.code, said.out) == (1, "") and "SKIALITH_NATS_URL" in said.err


def test_a_wrong_nats_password(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "server", user="u", password="right") as server:
        url = server.url.replace("right", "wr0ng")
        said = skialith("status", "--nats-url", url, cwd=tmp_path)
        assert (said.code, said.out) == (2, "") and "credentials" in said.err
        assert "wr0ng" not in said.err


def test_a_wrong_database_password(
    open_agent: OpenAgent, settings: dict[str, Any], mariadb_server: MariaDB, mariadb_url: str, tmp_path: Path
) -> None:
    open_agent(writer="off").save_event("e", 1)
    wrong = {**settings, "database_url": mariadb_url.replace(mariadb_server.password, "wr0ng")}
    status = skialith("status", *options(wrong), cwd=tmp_path)
    assert status.code == 0 and "not readable" in status.out, "the log can be looked at all the same"
    for command in (
        ["history", "agent"],
        ["agents"],
        ["dead-letters", "discard", "--all", "-y"],
        ["migrate"],
        ["writer"],
    ):
        said = skialith(*command, *options(wrong), cwd=tmp_path)
        assert (said.code in (1, 2), said.out) == (True, ""), command
        assert "denied" in said.err and "wr0ng" not in said.err, command
    doctor = skialith("doctor", *options(wrong), cwd=tmp_path)
    assert doctor.code == 1 and "denied" in doctor.out and "wr0ng" not in doctor.out


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = skialith("up", "--directory", str(tmp_path / "file" / "below"), cwd=tmp_path)
    assert (said.code, said.out) == (2, "") and "SKIALITH_DIRECTORY" in said.err
    assert skialith("status", "--directory", str(tmp_path / "file"), cwd=tmp_path).code in (1, 2)


def test_ctrl_c_is_quiet(open_agent: OpenAgent, nats_server: NatsServer, tmp_path: Path) -> None:
    open_agent(nats_url=nats_server.url, writer="off").save_event("e", 1)
    nats_server.pause()
    with running("status", "--nats-url", nats_server.url, "--timeout", "20", cwd=tmp_path) as process:
        tasks = Path(f"/proc/{process.pid}/task")
        wait_until(lambda: len(list(tasks.iterdir())) > 1, 30, "the command waits for the server")
        said = stop(process, signal.SIGINT)
    nats_server.resume()
    assert (said.code, said.out) == (130, "")


def test_a_reader_that_has_enough(embedded: Path) -> None:
    command = f"{sys.executable} -m skialith.cli history writer-of-many --json | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=embedded,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert len(done.stdout.splitlines()) == 1 and not done.stderr


# ---- changing things


def test_migrate(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    first = skialith("migrate", "--database-url", url, cwd=tmp_path)
    assert first.code == 0 and "0001" in first.out
    again = skialith("migrate", "--database-url", url, cwd=tmp_path)
    assert again.code == 0 and "up to date" in again.out
    with contextlib.closing(sqlite3.connect(tmp_path / "new.db")) as database:
        assert database.execute("SELECT COUNT(*) FROM agent_events").fetchone() == (0,)


def test_adopting_another_log(
    open_agent: OpenAgent, settings: dict[str, Any], nats_server: NatsServer, tmp_path: Path
) -> None:
    open_agent().save_event("e", 1)
    open_agent().flush(20)
    moved = {**settings, "nats_url": nats_server.url}
    with SkialithAgent("agent", **{**moved, "writer": "off"}) as agent:
        agent.save_event("f", 2)
        refused = skialith("doctor", *options(moved), cwd=tmp_path)
        assert refused.code == 1 and "--adopt-wal" in refused.out
        adopted = skialith("migrate", "--adopt-wal", *options(moved), cwd=tmp_path)
        assert adopted.code == 0 and "fed by" in adopted.out
        assert skialith("writer", "--until-empty", *options(moved), cwd=tmp_path).code == 0
        assert [event.event_id for event in agent.history() if event.stored] == ["e", "f"]


def test_traces_are_switched_for_the_namespace(open_agent: OpenAgent, settings: dict[str, Any], tmp_path: Path) -> None:
    open_agent(writer="off").save_event("e", 1)
    for switch, expected in (("off", False), ("on", True)):
        said = skialith("traces", switch, *options(settings), cwd=tmp_path)
        assert said.code == 0 and switch in said.out
        document = skialith("status", "--json", *options(settings), cwd=tmp_path).document
        assert document["traces"] is expected
        assert len(document["consumers"]) == 1 + expected


def event_record(namespace: str, agent_id: str, event_id: str, key: bytes) -> Record:
    body = b"\x82\xa4kind\xa7thought\xa1n\x01"
    return Record(Kind.EVENT, namespace, agent_id, event_id, key, 7, "thought", 1_700_000_000_000_000, 0, body)


def bury(settings: dict[str, Any], *, bind: bool = True) -> dict[str, str]:
    """A dead letter in the table, one in the stream, one that does not decode; their ids by the name of their place."""
    config = load(**{**settings, "writer": "off"})
    engine = acquire(config)
    try:
        engine.store.migrate()
        if bind:
            engine.store.bind_wal(config.namespace, engine.wal.stream.wal_id)
        letters = {}
        for n, place in enumerate(("table", "stream", "undecodable"), start=1):
            position = Position(time.time_ns(), n)
            record = event_record(config.namespace, f"agent {place}", f"event-{n}", bytes([n]) * 16)
            record = record._replace(position=position)
            raw = _raw(record)
            letters[place] = DeadLetter(
                record.key, "writer", config.namespace, "subject", position, 1406, f"too long {STRANGE}", 1, raw, record
            )
        undecodable = letters["undecodable"]._replace(raw=b"nonsense", record=None)
        engine.store.write_dead_letter(letters["table"])
        engine.store.write_dead_letter(undecodable)
        engine.wal.source("writer").bury(letters["stream"])
        # A record behind them, as there is in a log from which they were pulled.
        with SkialithAgent("later", **asdict(config)) as agent:
            agent.save_event("later", 1)
        return {place: f"writer/{letter.key.hex()}" for place, letter in letters.items()}
    finally:
        engine.release()


def _raw(record: Record) -> bytes:
    from skialith import _fastpath

    return _fastpath.encode_record(
        record.kind, record.agent_id, record.record_id, record.key, record.step_index, record.event_type,
        record.created_us, record.codec, record.body, None,
    )  # fmt: skip


@pytest.mark.parametrize("gone", [False, True])
def test_a_dead_letter_of_a_graph_is_shown_and_replayed(
    open_saver: OpenSaver, settings: dict[str, Any], tmp_path: Path, gone: bool
) -> None:
    saver = open_saver()
    first = put(saver, at("t"), {"a": 1})
    assert saver.flush() == 0
    engine = saver._door.open()
    config, words = engine.config, options(settings)
    lost = record(
        config.namespace, PutWrites("t", "", id_of(first), "task", "", [Write(0, "b", typed("bytes", b"x"))]), 999
    )
    lost = lost._replace(position=Position(time.time_ns(), engine.wal.status(5).last_seq))
    subject = engine.wal.stream.subjects.graph("t")
    letter = DeadLetter(
        lost.key, "writer", config.namespace, subject, lost.position, 1406, "too long", 1, _raw(lost), lost
    )
    engine.store.write_dead_letter(letter)
    found = saver.get_tuple(at("t"))
    assert found is not None and found.pending_writes == [("task", "b", b"x")]
    if gone:
        saver.delete_thread("t")
        again = put(saver, at("t"), {"a": 2})
        found = saver.get_tuple(at("t"))
        assert found is not None and found.config == again and found.pending_writes == []
        assert saver.flush() == 1
    (listed,) = skialith("dead-letters", "list", "--json", *words, cwd=tmp_path).document
    assert (listed["agent_id"], listed["kind"], listed["event_id"]) == ("t", "put_writes", None)
    assert "put_writes on a thread" in skialith("dead-letters", "list", *words, cwd=tmp_path).out
    assert "task" in skialith("dead-letters", "show", listed["id"], *words, cwd=tmp_path).out
    assert skialith("dead-letters", "replay", "--all", *words, cwd=tmp_path).code == 0
    saver._door.open()._recent.forget(("t", ""))
    found = saver.get_tuple(at("t"))
    assert found is not None and found.pending_writes == ([] if gone else [("task", "b", b"x")])
    with outside(settings["database_url"]) as sql:
        assert sql("SELECT COUNT(*) FROM graph_writes") == [(0 if gone else 1,)]
        assert sql("SELECT COUNT(*) FROM dead_letters") == [(0,)]


def test_dead_letters_are_listed_shown_replayed_and_discarded(settings: dict[str, Any], tmp_path: Path) -> None:
    ids = bury(settings)
    words = options(settings)
    listed = skialith("dead-letters", "list", "--json", *words, cwd=tmp_path).document
    assert {each["id"]: (each["kept_in"], each["decodes"]) for each in listed} == {
        ids["table"]: ("table", True),
        ids["stream"]: ("stream", True),
        ids["undecodable"]: ("table", False),
    }
    people = skialith("dead-letters", "list", *words, cwd=tmp_path)
    assert people.code == 0 and all(each in people.out for each in ids.values()) and "\x1b" not in people.out
    status = skialith("status", "--json", *words, cwd=tmp_path).document
    assert status["dead_letters"] == {"table": 2, "stream": 1}

    shown = skialith("dead-letters", "show", ids["stream"], "--json", *words, cwd=tmp_path).document
    assert (shown["agent_id"], shown["event_id"], shown["step_index"]) == ("agent stream", "event-2", 7)
    assert shown["data"] == {"kind": "thought", "n": 1} and shown["error_code"] == 1406
    assert "event-1" in skialith("dead-letters", "show", ids["table"][:12], *words, cwd=tmp_path).out
    assert skialith("dead-letters", "show", "writer/ff", *words, cwd=tmp_path).code == 1
    assert skialith("dead-letters", "show", "writer/", *words, cwd=tmp_path).code == 2

    replayed = skialith("dead-letters", "replay", "--all", *words, cwd=tmp_path)
    assert replayed.code == 1 and "2 dead letters" in replayed.out and ids["undecodable"] in replayed.err
    left = skialith("dead-letters", "list", "--json", *words, cwd=tmp_path).document
    assert [each["id"] for each in left] == [ids["undecodable"]]
    for agent_id in ("agent table", "agent stream"):
        (event,) = skialith("history", agent_id, "--json", *words, cwd=tmp_path).lines
        assert event["stored"] and not event["dead"] and event["data"] == {"kind": "thought", "n": 1}

    refused = skialith("dead-letters", "discard", "--all", *words, cwd=tmp_path)
    assert refused.code == 2 and "--yes" in refused.err
    assert skialith("dead-letters", "discard", ids["undecodable"], "--yes", *words, cwd=tmp_path).code == 0
    assert skialith("dead-letters", "list", "--json", *words, cwd=tmp_path).document == []


def test_a_letter_of_the_stream_is_not_replayed_into_a_strange_database(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    ids = bury(settings, bind=False)
    words = options(settings)
    said = skialith("dead-letters", "replay", ids["stream"], *words, cwd=tmp_path)
    assert said.code == 2 and "--database-url" in said.err
    left = skialith("dead-letters", "list", "--json", *words, cwd=tmp_path).document
    assert ids["stream"] in [each["id"] for each in left]


def test_discarding_a_letter_of_the_stream(settings: dict[str, Any], tmp_path: Path) -> None:
    ids = bury(settings)
    words = options(settings)
    assert skialith("dead-letters", "discard", ids["stream"], "-y", *words, cwd=tmp_path).code == 0
    left = skialith("dead-letters", "list", "--json", *words, cwd=tmp_path).document
    assert sorted(each["id"] for each in left) == sorted([ids["table"], ids["undecodable"]])


# ---- staying in the foreground


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_writer_stores_until_it_is_told_to_stop(
    number: signal.Signals, open_agent: OpenAgent, settings: dict[str, Any], tmp_path: Path
) -> None:
    agent = open_agent(writer="off")
    agent.save_events([(f"e{n}", n) for n in range(20)])
    with running("writer", "--every", "0.2", *options(settings), cwd=tmp_path) as process:
        said = read_until(process, "0 records waiting")
        assert "writing the namespace" in said
        agent.flush(20)
        ended = stop(process, number, said)
    assert ended.code == 0, ended.err
    assert "20 records stored" in ended.out
    assert all(event.stored for event in agent.history())


def test_the_writer_until_everything_is_stored(open_agent: OpenAgent, settings: dict[str, Any], tmp_path: Path) -> None:
    agent = open_agent(writer="off")
    agent.save_events([(f"e{n}", n) for n in range(1500)])
    said = skialith("writer", "--until-empty", *options(settings), cwd=tmp_path)
    assert said.code == 0 and "1,500 records stored" in said.out
    document = skialith("status", "--json", *options(settings), cwd=tmp_path).document
    assert document["database"]["rows"]["agent_events"] == document["database"]["rows"]["agent_traces"] == 1500
    assert document["oldest_unstored"] is None


def test_everything_with_mysql(
    open_agent: OpenAgent, settings: dict[str, Any], mariadb_url: str, tmp_path: Path
) -> None:
    words = options({**settings, "database_url": mariadb_url})
    agent = open_agent(writer="off", database_url=mariadb_url)
    agent.save_events([(f"e{n}", {"kind": "thought", "n": n}) for n in range(700)])
    agent.checkpoint(step=1, data={"n": 1})
    assert skialith("state", "agent", "--json", *words, cwd=tmp_path).document["source"] == "wal"
    assert skialith("migrate", *words, cwd=tmp_path).code == 0
    stored = skialith("writer", "--until-empty", *words, cwd=tmp_path)
    assert stored.code == 0 and "701 records stored" in stored.out
    rows = skialith("status", "--json", *words, cwd=tmp_path).document["database"]["rows"]
    assert rows == {"agent_events": 700, "agent_checkpoints": 1, "agent_traces": 700, "dead_letters": 0}
    assert [event["data"]["n"] for event in skialith("history", "agent", "--json", *words, cwd=tmp_path).lines] == [
        *range(700)
    ]
    assert skialith("agents", "--json", *words, cwd=tmp_path).document[0]["events"] == 700
    assert skialith("doctor", *words, cwd=tmp_path).code == 0
    assert not list(tmp_path.glob(".skialith"))


def test_a_writer_without_a_log(tmp_path: Path) -> None:
    said = skialith("writer", "--nats-url", f"nats://127.0.0.1:{free_port()}", "--timeout", "1", cwd=tmp_path)
    assert said.code == 1 and "NATS" in said.err


def test_up_serves_other_shells_until_ctrl_c(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    try:
        with running("up", "--every", "0.2", cwd=here) as process:
            said = read_until(process, "Ctrl-C")
            assert "secret" in said
            exports = dict(line.split()[1].split("=", 1) for line in said.splitlines() if "export" in line)
            with SkialithAgent("elsewhere", nats_url=exports["SKIALITH_NATS_URL"],
                               database_url=exports["SKIALITH_DATABASE_URL"], writer="off") as agent:  # fmt: skip
                agent.save_event("e", 1)
                agent.flush(20)
            status = skialith("status", "--json", cwd=there, **exports)
            assert status.code == 0 and status.document["database"]["rows"]["agent_events"] == 1
            ended = stop(process, signal.SIGINT, said)
        assert ended.code == 0, ended.err
        assert stat.S_IMODE(os.stat(here / ".skialith").st_mode) == 0o700
        assert not list(there.iterdir())
    finally:
        kill_all(here / ".skialith")


# ---- the doctor


def test_the_doctor_of_a_healthy_embedded_log(embedded: Path) -> None:
    said = skialith("doctor", cwd=embedded)
    assert said.code == 0, said.out
    assert "all is well" in said.out and "FAIL" not in said.out.upper().replace("FAILURE", "")
    checks = skialith("doctor", "--json", cwd=embedded).document
    assert {each["level"] for each in checks} == {"ok"}
    assert {"settings", "nats-server", "directory", "disk", "NATS", "stream", "database", "clock", "writer"} <= {
        each["check"] for each in checks
    }


def test_the_doctor_where_nothing_is(tmp_path: Path) -> None:
    said = skialith("doctor", cwd=tmp_path)
    assert said.code == 0 and "nothing here yet" in said.out
    assert not list(tmp_path.iterdir())


def levels(document: list[dict[str, Any]]) -> dict[str, str]:
    return {each["check"]: each["level"] for each in document}


def test_the_doctor_finds_what_is_wrong(open_agent: OpenAgent, settings: dict[str, Any], tmp_path: Path) -> None:
    open_agent(writer="off").save_event("e", 1)
    waiting = skialith("doctor", "--json", *options(settings), cwd=tmp_path)
    assert levels(waiting.document)["writer"] == "warn" and levels(waiting.document)["database"] == "warn"
    assert not (tmp_path / "skialith.db").exists(), "a look makes no database"
    bury(settings)
    assert levels(skialith("doctor", "--json", *options(settings), cwd=tmp_path).document)["dead letters"] == "warn"
    away = skialith("doctor", "--nats-url", f"nats://127.0.0.1:{free_port()}", "--timeout", "1", cwd=tmp_path)
    assert away.code == 1 and "fail" in away.out


def test_the_doctor_minds_open_permissions(tmp_path: Path) -> None:
    with SkialithAgent("a", directory=str(tmp_path / ".skialith"), timeout=20.0) as agent:
        agent.save_event("e", 1)
    os.chmod(tmp_path / ".skialith", 0o755)
    said = skialith("doctor", "--json", cwd=tmp_path)
    assert levels(said.document)["directory"] == "warn" and said.code == 0
    kill_all(tmp_path / ".skialith")


def test_the_doctor_says_when_the_server_is_unfit(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "server", jetstream=False) as server:
        said = skialith("doctor", "--nats-url", server.url, cwd=tmp_path)
    assert said.code == 1 and "JetStream" in said.out
