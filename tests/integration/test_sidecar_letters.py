"""Dead letters over HTTP on both databases: listed from both places, looked at, stored after all, given up."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest

from skialith import SkialithAgent, _fastpath
from skialith.records import DeadLetter, Kind, Position, Record
from skialith.runtime import Runtime
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import wait_until
from tests.fixtures.proxy_plugin import MakeProxy
from tests.fixtures.refusals import accept, refuse
from tests.fixtures.sidecar_app import Serve, Served, url_of
from tests.fixtures.stores import outside

LARGE = {"text": "x" * 3_000_000, "kind": "thought"}


@pytest.fixture(params=["sqlite", "mysql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """A new database of each kind."""
    if request.param == "mysql":
        return str(request.getfixturevalue("mariadb_url"))
    return f"sqlite:///{tmp_path / 'skialith.db'}"


def bury(open_agent: OpenAgent, url: str, payload: Any, *, stream: bool) -> None:
    """A dead letter of the event ``dead``, kept in the table or in the stream, as the writer makes one."""
    agent = open_agent()
    agent.save_event("before", 1)
    agent.flush(20)
    refuse(url, "dead", letters_too=stream)
    agent.save_event("dead", payload, step=3)
    assert agent.flush(20) == 1
    agent.close()


def letter(engine: Runtime, n: int, sink: str = "writer", *, decodes: bool = True, namespace: str = "") -> DeadLetter:
    """The ``n``-th of some letters, as the sinks make them; ``namespace``: another one than the engine's."""
    namespace = namespace or engine.config.namespace
    position = Position(1_767_225_600_000_000_000 + n, n)
    body = b"\x81\xa1n" + bytes([n])
    key = n.to_bytes(16, "big")
    record = Record(Kind.EVENT, namespace, "agent", f"e{n}", key, n, "event", 1, 0, body, position)
    raw = _fastpath.encode_record(1, "agent", f"e{n}", key, n, "event", 1, 0, body, None)
    return DeadLetter(
        key,
        sink,
        namespace,
        "subject",
        position,
        1406,
        "too long",
        1,
        raw if decodes else b"no",
        record if decodes else None,
    )


def rows(url: str, table: str) -> int:
    with outside(url) as sql:
        return int(sql(f"SELECT COUNT(*) FROM {table}")[0][0])


def parts(letter_id: str) -> tuple[str, str]:
    sink, key = letter_id.split("/")
    return sink, key


def remembered(served: Served) -> list[tuple[Any, bool]]:
    """Event ids of the history and whether they are dead."""
    return [(each["event_id"], each["dead"]) for each in served.get("agents", "agent", "history")["events"]]


@pytest.mark.parametrize("payload", [{"kind": "thought", "n": 1}, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("place", ["table", "stream"])
def test_a_dead_letter_is_looked_at_and_replayed(
    sidecar_app: Serve, open_agent: OpenAgent, database_url: str, place: str, payload: Any
) -> None:
    bury(open_agent, database_url, payload, stream=place == "stream")
    served = sidecar_app()
    (listed,) = served.get("dead-letters")["dead_letters"]
    assert (listed["kept_in"], listed["sink"], listed["agent_id"]) == (place, "writer", "agent")
    assert (listed["kind"], listed["event_id"], listed["step_index"]) == ("event", "dead", 3)
    assert listed["decodes"] is True and "refused" in listed["error"]
    whole = served.get("dead-letters", *parts(listed["id"]))
    assert whole.pop("payload") == payload
    assert bytes.fromhex(whole.pop("raw_hex"))
    assert whole == listed
    assert remembered(served) == [("before", False), ("dead", True)]

    # What was wrong is not mended yet.
    said = served.problem(422, "POST", "dead-letters", *parts(listed["id"]), "replay")
    assert said["type"] == "urn:skialith:problem:refused"
    assert served.get("dead-letters")["dead_letters"] == [listed]
    accept(database_url)
    answer = served.http.post(url_of("dead-letters", *parts(listed["id"]), "replay"))
    assert (answer.status_code, answer.json()) == (200, listed)
    assert served.get("dead-letters") == {"dead_letters": [], "next": None}
    assert remembered(served) == [("before", False), ("dead", False)]
    (_, event) = served.get("agents", "agent", "history")["events"]
    assert event["stored"] and event["payload"] == payload
    for method, rest in (("POST", ["replay"]), ("GET", []), ("DELETE", [])):
        served.problem(404, method, "dead-letters", *parts(listed["id"]), *rest)
    assert rows(database_url, "dead_letters") == 0


@pytest.mark.parametrize("place", ["table", "stream"])
def test_a_dead_letter_is_given_up(sidecar_app: Serve, open_agent: OpenAgent, database_url: str, place: str) -> None:
    bury(open_agent, database_url, LARGE, stream=place == "stream")
    served = sidecar_app()
    (listed,) = served.get("dead-letters")["dead_letters"]
    answer = served.http.delete(url_of("dead-letters", *parts(listed["id"])))
    assert (answer.status_code, answer.content) == (204, b"")
    assert served.get("dead-letters") == {"dead_letters": [], "next": None}
    assert remembered(served) == [("before", False)]
    assert rows(database_url, "payload_parts") == 0
    accept(database_url)
    for method, rest in (("DELETE", []), ("POST", ["replay"]), ("GET", [])):
        said = served.problem(404, method, "dead-letters", *parts(listed["id"]), *rest)
        assert listed["id"] in said["detail"]


def test_pages_of_both_places(sidecar_app: Serve, open_agent: OpenAgent) -> None:
    open_agent("later").save_event("e", 1)  # behind them, as in a log from which they were pulled
    served = sidecar_app()
    engine = served.engine
    expected = []
    for n in range(1, 13):
        for sink in ("trace_ingest", "writer"):
            one = letter(engine, n, sink, decodes=n % 5 != 0)
            expected.append(f"{sink}/{one.key.hex()}")
            if n % 3 == 0 or n == 4:
                engine.wal.source("writer").bury(one)
            if n % 3 != 0:
                engine.store.write_dead_letter(one)
    engine.store.write_dead_letter(letter(engine, 99, namespace="another"))
    whole = served.get("dead-letters", limit=1000)
    assert [each["id"] for each in whole["dead_letters"]] == expected and whole["next"] is None
    places = [each["kept_in"] for each in whole["dead_letters"]]
    assert places == ["stream" if n % 3 == 0 else "table" for n in range(1, 13) for _ in range(2)]
    for limit in range(1, len(expected) + 2):
        assert served.pages("dead_letters", "dead-letters", limit=limit) == whole["dead_letters"]
    for each in whole["dead_letters"]:
        looked = served.get("dead-letters", *parts(each["id"]))
        n = int(parts(each["id"])[1], 16)
        assert looked["payload"] == ({"n": n} if n % 5 else None)
    # What is kept in both places leaves both.
    both = [each for each in expected if int(each.split("/")[1], 16) == 4]
    assert served.http.delete(url_of("dead-letters", *parts(both[0]))).status_code == 204
    assert served.http.post(url_of("dead-letters", *parts(both[1]), "replay")).status_code == 200
    left = [each["id"] for each in served.pages("dead_letters", "dead-letters")]
    assert left == [each for each in expected if each not in both]
    served.problem(404, "GET", "dead-letters", "writer", (99).to_bytes(16, "big").hex())
    served.problem(404, "DELETE", "dead-letters", "writer", (99).to_bytes(16, "big").hex())
    assert engine.store.dead_letter("writer", (99).to_bytes(16, "big")) is not None


def test_a_page_that_was_read_does_not_miss_what_follows(sidecar_app: Serve) -> None:
    served = sidecar_app()
    for n in range(1, 9):
        served.engine.store.write_dead_letter(letter(served.engine, n))
    page = served.get("dead-letters", limit=3)
    assert len(page["dead_letters"]) == 3
    for each in page["dead_letters"]:
        assert served.http.delete(url_of("dead-letters", *parts(each["id"]))).status_code == 204
    rest = served.pages("dead_letters", "dead-letters", limit=3, after=page["next"])
    assert [each["event_id"] for each in rest] == [f"e{n}" for n in range(4, 9)]


def test_what_cannot_be_replayed(sidecar_app: Serve, open_agent: OpenAgent, database_url: str) -> None:
    bury(open_agent, database_url, LARGE, stream=False)
    served = sidecar_app()
    undecodable = letter(served.engine, 1, decodes=False)
    served.engine.store.write_dead_letter(undecodable)
    with outside(database_url) as sql:
        sql("UPDATE dead_letters SET body = NULL, body_parts = NULL WHERE record_id IS NOT NULL")
    listed = served.get("dead-letters")["dead_letters"]
    assert [each["decodes"] for each in listed] == [False, True]
    for each, why in zip(listed, ("does not decode", "is lost"), strict=True):
        said = served.problem(400, "POST", "dead-letters", *parts(each["id"]), "replay")
        assert why in said["detail"] and "discard it" in said["detail"]
        assert served.get("dead-letters", *parts(each["id"]))["payload"] is None
    assert served.get("dead-letters")["dead_letters"] == listed


def test_a_letter_of_trace_ingest_becomes_a_trace(sidecar_app: Serve) -> None:
    served = sidecar_app()
    one = letter(served.engine, 1, "trace_ingest")
    served.engine.store.write_dead_letter(one)
    assert served.get("traces")["traces"] == []
    assert served.http.post(url_of("dead-letters", "trace_ingest", one.key.hex(), "replay")).status_code == 200
    (trace,) = served.get("traces")["traces"]
    assert (trace["event_id"], trace["payload"]) == ("e1", {"n": 1})
    assert remembered(served) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("path", "query", "bad"),
    [
        *((("dead-letters",), {"limit": limit}, "limit") for limit in ("0", "1001", "x")),
        *(
            (("dead-letters",), {"after": after}, "after")
            for after in ("", "1-1", "1-1-writer-00", f"{2**63}-1-writer-{'0' * 32}", f"1-1-writer-{'0' * 31}g")
        ),
        (("dead-letters", "writer", "00"), {}, "key"),
        (("dead-letters", "writer", "0" * 31 + "G"), {}, "key"),
        (("dead-letters", "reader", "0" * 32), {}, "sink"),
    ],
)
def test_bad_parameters_are_named(sidecar_app: Serve, path: tuple[str, ...], query: dict[str, str], bad: str) -> None:
    assert sidecar_app().problem(400, "GET", *path, **query)["path"] == bad


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
def test_while_the_database_is_away_nothing_is_dropped(
    sidecar_app: Serve, proxy: MakeProxy, settings: dict[str, Any]
) -> None:
    port = urlsplit(settings["database_url"]).port
    assert port is not None
    between = proxy(port)
    with SkialithAgent("later", **settings) as agent:
        agent.save_event("e", 1)
        agent.flush(20)
    served = sidecar_app(database_url=settings["database_url"].replace(f":{port}/", f":{between.port}/"))
    one = letter(served.engine, 1)
    served.engine.wal.source("writer").bury(one)
    path = ("dead-letters", "writer", one.key.hex())
    between.refuse()
    between.cut()
    for method, rest in (("POST", ("replay",)), ("DELETE", ()), ("GET", ())):
        served.problem(503, method, *path, *rest)
    between.refuse(False)
    wait_until(lambda: served.http.get(url_of(*path)).status_code == 200, 20, "it is back")
    assert served.http.post(url_of(*path, "replay")).status_code == 200
    assert [each["event_id"] for each in served.get("agents", "agent", "history")["events"]] == ["e1"]
