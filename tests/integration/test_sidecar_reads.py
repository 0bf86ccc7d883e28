"""What the sidecar reads, over HTTP on both databases: history, steps, agents and traces, page by page."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit

import pytest

from skialith import Event, SkialithAgent
from skialith.errors import StepFailed
from skialith.sidecar import reads
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import wait_until
from tests.fixtures.proxy_plugin import MakeProxy
from tests.fixtures.refusals import refuse
from tests.fixtures.sidecar_app import Serve, Served, serving
from tests.fixtures.stores import outside
from tests.fixtures.wal import new_namespace

ODD = "odd/ä%_ 🦜?#&+"


@pytest.fixture(params=["sqlite", "mysql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """A new database of each kind."""
    if request.param == "mysql":
        return str(request.getfixturevalue("mariadb_url"))
    return f"sqlite:///{tmp_path / 'skialith.db'}"


def document(event: Event) -> dict[str, Any]:
    """What HTTP says of an event whose payload JSON can hold."""
    return {
        "event_id": event.event_id,
        "step_index": event.step_index,
        "type": event.event_type,
        "created_at": event.created_at.isoformat(timespec="microseconds"),
        "cursor": event.position.cursor(),
        "stored": event.stored,
        "dead": event.dead,
        "payload": event.data,
    }


def mixed(open_agent: OpenAgent, url: str, place: str, agent_id: str = ODD) -> SkialithAgent:
    """An agent with events in the database and in the log alone, and a dead letter in ``place`` between them."""
    agent = open_agent(agent_id)
    agent.save_events([(f"e{n}", {"kind": ("a", "b")[n % 2], "n": n}) for n in range(12)])
    agent.flush(20)
    refuse(url, "dead", letters_too=place == "stream")
    agent.save_event("dead", {"kind": "a", "n": 12})
    agent.save_event("behind", {"kind": "b", "n": 13})
    assert agent.flush(20) == 1
    agent.close()
    agent = open_agent(agent_id, writer="off")
    agent.save_events([(f"late{n}", {"kind": ("a", "b")[n % 2], "n": n}) for n in range(14, 20)])
    return agent


# ---- history


@pytest.mark.parametrize("place", ["table", "stream"])
def test_pages_of_any_length_make_the_whole_history(
    sidecar_app: Serve, open_agent: OpenAgent, database_url: str, place: str
) -> None:
    agent = mixed(open_agent, database_url, place)
    served = sidecar_app(writer="off")
    whole = [document(event) for event in agent.history()]
    assert [each["payload"]["n"] for each in whole] == list(range(20))
    assert [each["event_id"] for each in whole if each["dead"]] == ["dead"]
    assert [each["stored"] for each in whole] == [n < 14 and (n != 12 or place == "table") for n in range(20)]
    for limit in range(1, 22):
        assert served.pages("events", "agents", ODD, "history", limit=limit) == whole
    for n, each in enumerate(whole):
        assert served.pages("events", "agents", ODD, "history", limit=7, after=each["cursor"]) == whole[n + 1 :]
    last = served.get("agents", ODD, "history", limit=20)
    assert last["next"] is None and last["events"] == whole
    assert served.get("agents", "nobody", "history") == {"events": [], "next": None}
    last = 9 * 10**18 - 1
    assert served.get("agents", ODD, "history", after=f"{last}-{last}") == {"events": [], "next": None}


@pytest.mark.parametrize("limit", [1, 3, 20])
def test_events_by_type(
    sidecar_app: Serve, open_agent: OpenAgent, database_url: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed(open_agent, database_url, "table")
    served = sidecar_app(writer="off")
    for kind, rest in (("a", 0), ("b", 1)):
        found = served.pages("events", "agents", ODD, "history", limit=limit, type=kind)
        assert [each["payload"]["n"] for each in found] == list(range(rest, 20, 2))
    assert served.pages("events", "agents", ODD, "history", limit=limit, type="c") == []
    monkeypatch.setattr(reads, "PAGE_SCANNED", 5)
    first = served.get("agents", ODD, "history", limit=limit, type="c")
    assert first["events"] == [] and first["next"] is not None
    found = served.pages("events", "agents", ODD, "history", limit=limit, type="a")
    assert [each["payload"]["n"] for each in found] == list(range(0, 20, 2))


@pytest.mark.parametrize("limit", [1, 4, 13])
def test_what_is_stored_between_two_pages_is_seen_once(
    sidecar_app: Serve, open_agent: OpenAgent, limit: int, settings: dict[str, Any]
) -> None:
    agent = open_agent(writer="off")
    agent.save_events([(f"e{n}", n) for n in range(40)])
    served = sidecar_app(writer="off")
    page = served.get("agents", "agent", "history", limit=limit)
    found = page["events"]
    assert not any(each["stored"] for each in found)
    with SkialithAgent("another", **settings):
        wait_until(lambda: not _in_log(served), 20, "the log is trimmed")
    while page["next"] is not None:
        page = served.get("agents", "agent", "history", limit=limit, after=page["next"])
        assert all(each["stored"] for each in page["events"])
        found += page["events"]
    assert [each["payload"] for each in found] == list(range(40))


def _in_log(served: Served) -> int:
    return served.engine.wal.status(10).messages


def test_pages_while_events_are_saved_and_stored(sidecar_app: Serve, open_agent: OpenAgent) -> None:
    served = sidecar_app()
    agent = open_agent(writer="off")

    def save() -> None:
        for n in range(300):
            agent.save_event(f"e{n}", n)

    thread = threading.Thread(target=save)
    thread.start()
    found: list[int] = []
    query: dict[str, Any] = {"limit": 7}
    deadline = time.monotonic() + 60
    while len(found) < 300 and time.monotonic() < deadline:
        page = served.get("agents", "agent", "history", **query)
        found += [each["payload"] for each in page["events"]]
        if page["events"]:
            query["after"] = page["events"][-1]["cursor"]
    thread.join()
    assert found == list(range(300))


@pytest.mark.parametrize("writer", ["on", "off"])
def test_payloads_are_whole_however_large(sidecar_app: Serve, open_agent: OpenAgent, writer: str) -> None:
    agent = open_agent(writer=writer)
    text = base64.b85encode(bytes(range(256)) * 13_000).decode()  # over 3 MiB
    payloads: list[Any] = [{"text": text[n:]} for n in range(4)]
    agent.save_events([(f"e{n}", payload) for n, payload in enumerate(payloads)])
    if writer == "on":
        agent.flush(20)
    served = sidecar_app(writer="off")
    found = served.get("agents", "agent", "history", limit=10)
    assert len(found["events"]) == 3 and found["next"] is not None  # the third passes what a page may hold
    every = served.pages("events", "agents", "agent", "history", limit=10)
    assert [each["payload"] for each in every] == payloads
    assert all(each["stored"] is (writer == "on") for each in every)


def test_what_json_cannot_hold(sidecar_app: Serve, open_agent: OpenAgent) -> None:
    deep: Any = "bottom"
    for _ in range(150):
        deep = [deep]
    with_agent = open_agent()
    with_agent.save_event("e", {"b": b"\x00\xff", "n": float("nan"), 1: 2, "deep": deep, "big": 2**64 - 1})
    (event,) = sidecar_app().get("agents", "agent", "history")["events"]
    assert event["payload"] == {
        "b": {"skialith_base64": "AP8="},
        "n": {"skialith_omitted": "NaN"},
        "1": 2,
        "deep": deep,
        "big": 2**64 - 1,
    }


def test_a_lost_payload_does_not_hide_the_others(sidecar_app: Serve, open_agent: OpenAgent, database_url: str) -> None:
    agent = open_agent()
    agent.save_event("before", 1)
    agent.flush(20)
    refuse(database_url, "dead")
    agent.save_event("dead", {"x": 1})
    assert agent.flush(20) == 1
    with outside(database_url) as sql:
        sql("UPDATE dead_letters SET body = NULL, manifest_size = 5, manifest_chunks = 1, manifest_digest = 'x'")
    before, lost = sidecar_app().get("agents", "agent", "history")["events"]
    assert before["payload"] == 1
    assert (lost["event_id"], lost["dead"], lost["payload"]) == ("dead", True, {"skialith_omitted": "lost", "bytes": 5})


# ---- steps


def failing() -> None:
    raise ValueError("no such city")


def test_recorded_steps_wherever_they_stand(sidecar_app: Serve, open_agent: OpenAgent, database_url: str) -> None:
    agent = open_agent(ODD)
    results: dict[str, Any] = {"first": None, "second/ %": {"b": b"\xff", "n": 1}, "large": "x" * 3_000_000}
    agent.resume()
    for name, result in results.items():
        agent.step(name, lambda result=result: result)
    with pytest.raises(StepFailed):
        agent.step("fails", failing, record_errors=(ValueError,))
    agent.save_event("fails#2", {"kind": "step", "function": "f", "result": 1})  # merely says so
    agent.flush(20)
    refuse(database_url, "dead")
    agent.step("dead", str)
    assert agent.flush(20) == 1
    agent.close()
    agent = open_agent(ODD, writer="off")
    agent.resume()
    agent.step("in the log", dict)
    agent.step("large in the log", lambda: "y" * 3_000_000)

    served = sidecar_app(writer="off")

    def step(step_id: str) -> Any:
        return served.get("agents", ODD, "steps", step_id)

    assert step("first") | {"function": ""} == {"step_id": "first", "function": "", "result": None}
    assert step("second%2F %25")["result"] == {"b": {"skialith_base64": "/w=="}, "n": 1}
    assert step("large")["result"] == results["large"]
    assert step("fails") == {
        "step_id": "fails",
        "function": f"{__name__}.failing",
        "error": {"type": "builtins.ValueError", "message": "no such city"},
    }
    assert step("dead") == {"step_id": "dead", "function": "builtins.str", "result": ""}
    assert step("in the log") == {"step_id": "in the log", "function": "builtins.dict", "result": {}}
    assert step("large in the log")["result"] == "y" * 3_000_000
    for agent_id, step_id in ((ODD, "none"), (ODD, "fails#2"), (ODD, "second/ %"), ("nobody", "first")):
        said = served.problem(404, "GET", "agents", agent_id, "steps", step_id)
        assert repr(step_id) in said["detail"] and repr(agent_id) in said["detail"]


# ---- agents


def test_agents_by_prefix_in_pages(sidecar_app: Serve, open_agent: OpenAgent) -> None:
    names = ["a", "a%", "a%b", "a_", "ab", "aé", "A", "é", "日本", "日本語", "🦜", "🦜/x", "\U0010ffff"]
    writer = open_agent("a")
    for n, name in enumerate(names):
        agent = open_agent(name)
        agent.save_event("e", n)
        agent.checkpoint(n, {})
    writer.flush(20)
    served = sidecar_app()
    for prefix in ("", *names, "x", "日"):
        expected = sorted((name for name in names if name.startswith(prefix)), key=str.encode)
        for limit in (1, 2, len(names), 1000):
            found = served.pages("agents", "agents", prefix=prefix, limit=limit)
            assert [each["agent_id"] for each in found] == expected
    (found,) = served.get("agents", prefix="🦜/")["agents"]
    assert {**found, "last_at": ""} == {
        "agent_id": "🦜/x",
        "events": 1,
        "checkpoints": 1,
        "step_index": names.index("🦜/x"),
        "last_at": "",
    }
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["last_at"])
    assert timedelta(0) <= age < timedelta(minutes=5)


# ---- traces


def traced(open_agent: OpenAgent) -> None:
    """Twenty traces of two agents and two types."""
    for n in range(20):
        agent = open_agent(("one", "two")[n // 2 % 2])
        agent.save_event(f"e{n}", {"kind": ("thought", "tool_call")[n % 2], "n": n})


def _numbers(found: list[Any]) -> list[int]:
    return [each["payload"]["n"] for each in found]


def test_traces_by_agent_type_and_time(
    sidecar_app: Serve, open_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = sidecar_app()
    traced(open_agent)
    wait_until(lambda: len(served.pages("traces", "traces")) == 20, 20, "the traces are there")
    whole = served.pages("traces", "traces")
    assert _numbers(whole) == list(range(20))
    (first,) = served.get("traces", limit=1)["traces"]
    (same,) = [each for each in served.get("agents", "one", "history")["events"] if each["event_id"] == "e0"]
    logged = datetime.fromisoformat(first.pop("logged_at"))
    assert first == {"agent_id": "one", **{name: same[name] for name in first if name != "agent_id"}}
    assert abs((logged - datetime.fromisoformat(first["created_at"])).total_seconds()) < 60

    filters: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
        ({}, lambda n: True),
        ({"agent_id": "one"}, lambda n: n // 2 % 2 == 0),
        ({"type": "thought"}, lambda n: n % 2 == 0),
        ({"agent_id": "two", "type": "tool_call"}, lambda n: n // 2 % 2 == 1 and n % 2 == 1),
        ({"agent_id": "two", "type": "Thought"}, lambda n: False),
        ({"type": "thought "}, lambda n: False),
        ({"agent_id": "nobody"}, lambda n: False),
    ]
    times = [whole[n]["logged_at"] for n in (0, 7, 12, 19)]
    spans: list[dict[str, str]] = [{}, {"since": times[1]}, {"until": times[2]}, {"since": times[1], "until": times[2]}]
    spans += [
        {"since": times[2], "until": times[1]},
        {"since": "0001-01-01T00:00:00Z", "until": "9999-12-31T23:59:59Z"},
    ]
    monkeypatch.setattr(reads, "PAGE_SCANNED", 4)
    for query, fits in filters:
        for span in spans:
            expected = [
                n
                for n, each in enumerate(whole)
                if fits(n)
                and each["logged_at"] >= span.get("since", "")
                and each["logged_at"] < span.get("until", "9999")
            ]
            for limit in (1, 3, 20):
                assert _numbers(served.pages("traces", "traces", limit=limit, **query, **span)) == expected
    for each in whole[:-1]:
        assert served.get("traces", after=each["cursor"], limit=1)["traces"] == [whole[whole.index(each) + 1]]


def test_offsets_of_times_count(sidecar_app: Serve, open_agent: OpenAgent) -> None:
    served = sidecar_app()
    open_agent().save_event("e", 1)
    wait_until(lambda: bool(served.get("traces")["traces"]), 20, "the trace is there")
    (trace,) = served.get("traces")["traces"]
    moment = datetime.fromisoformat(trace["logged_at"])
    there = moment.astimezone(timezone(timedelta(hours=-5, minutes=-30))).isoformat()
    assert served.get("traces", since=there)["traces"] == [trace]
    assert served.get("traces", until=there)["traces"] == []
    later = (moment + timedelta(microseconds=1)).isoformat()
    assert served.get("traces", since=later)["traces"] == []
    assert served.get("traces", since=there, until=later)["traces"] == [trace]


# ---- what is refused, and what is away


@pytest.mark.parametrize(
    ("path", "query", "bad"),
    [
        *(
            (path, {"limit": limit}, "limit")
            for path in (("agents", "a", "history"), ("agents",), ("traces",))
            for limit in ("0", "1001", "-1", "x", "1.5", "", "99999999999999999999999")
        ),
        *(
            (path, {"after": after}, "after")
            for path in (("agents", "a", "history"), ("traces",))
            for after in ("x", "", "1", "1-", "-1", "1-2-3", "-1-2", "1-2 ", "١-٢", f"{2**63}-1", f"1-{2**63}", "1-2\n")
        ),
        *(
            (("traces",), {name: value}, name)
            for name in ("since", "until")
            for value in (
                "now", "", "0", "1767225600", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z", "2026-01-01T25:00:00Z",
                "2026-01-01T00:00:00 00:00", "2026-01-01T00:00:00ZZ", "2026-01-01T00:00:00+99:00",
            )
        ),
        (("agents", "a", "history"), {"type": "x" * 256}, "type"),
        (("traces",), {"type": "x" * 256}, "type"),
        (("traces",), {"agent_id": ""}, "agent_id"),
        (("traces",), {"agent_id": "x" * 256}, "agent_id"),
        (("agents",), {"prefix": "x" * 256}, "prefix"),
        (("agents",), {"after": "x" * 256}, "after"),
        (("agents", "x" * 256, "history"), {}, "agent_id"),
        (("agents", "a", "steps", "x" * 256), {}, "step_id"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(everything: Served, path: tuple[str, ...], query: dict[str, str], bad: str) -> None:
    said = everything.problem(400, "GET", *path, **query)
    assert (said["path"], said["outcome"]) == (bad, "not_written")
    assert bad in said["detail"]


@pytest.fixture(scope="module")
def everything(nats_url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One application for all tests that only ask."""
    folder = tmp_path_factory.mktemp("sidecar")
    with serving(
        {
            "nats_url": nats_url,
            "database_url": f"sqlite:///{folder / 'skialith.db'}",
            "namespace": new_namespace(),
            "wal_bytes": 64 * 1024 * 1024,
            "directory": str(folder / ".skialith"),
        }
    ) as served:
        yield served


def test_a_name_that_is_no_text_is_refused(everything: Served) -> None:
    for path in ("/agents/%ff/history", "/agents/a/steps/%c3%28", "/agents/%ed%a0%80/history"):
        answer = everything.http.get(path)
        assert answer.status_code == 400 and answer.json()["path"] in ("agent_id", "step_id")


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
def test_while_the_database_is_away(
    sidecar_app: Serve, open_agent: OpenAgent, proxy: MakeProxy, settings: dict[str, Any]
) -> None:
    port = urlsplit(settings["database_url"]).port
    assert port is not None
    between = proxy(port)
    url = settings["database_url"].replace(f":{port}/", f":{between.port}/")
    served = sidecar_app(database_url=url, writer="off")
    agent = open_agent(writer="off")
    agent.resume()
    agent.step("s", int)
    between.refuse()
    between.cut()
    # Nothing was stored yet, so the log holds all there ever was.
    assert served.get("agents", "agent", "steps", "s")["result"] == 0
    served.problem(404, "GET", "agents", "agent", "steps", "t")
    between.refuse(False)
    with SkialithAgent("another", **settings):
        wait_until(lambda: served.engine.wal.anything_stored(10), 20, "the step is stored")
    assert served.get("agents", "agent", "steps", "s")["result"] == 0
    agent.step("u", int)
    between.refuse()
    between.cut()
    for path in (
        ("agents", "agent", "history"),
        ("agents", "agent", "steps", "s"),
        ("agents", "agent", "steps", "u"),
        ("agents", "agent", "steps", "v"),
        ("agents",),
        ("traces",),
        ("dead-letters",),
        ("dead-letters", "writer", "0" * 32),
    ):
        said = served.problem(503, "GET", *path)
        assert said["type"] == "urn:skialith:problem:database-unavailable"
    between.refuse(False)
    assert [each["event_id"] for each in served.get("agents", "agent", "history")["events"]] == ["s", "u"]
    assert served.get("agents", "agent", "steps", "u")["result"] == 0
