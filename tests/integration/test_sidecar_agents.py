"""What agents do over HTTP, against ``skialith serve``: write, resume, own, and be told what became of a record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest

from skialith import SkialithAgent
from skialith.errors import AgentFenced
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.sidecar import Sidecar, sidecar

WAL = {"SKIALITH_WAL_BYTES": str(256 * 1024 * 1024)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """A sidecar on its own embedded server, for tests with agents of their own."""
    with sidecar(cwd=tmp_path_factory.mktemp("sidecar"), settings=WAL) as made:
        yield made


@pytest.fixture
def http(served: Sidecar) -> httpx.Client:
    return served.client()


def resume(http: httpx.Client, agent: str, owner: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """The state, and the header of its owner's writes."""
    answer = http.post(f"/agents/{agent}/resume", json={"owner": owner} if owner else None)
    assert answer.status_code == 200, answer.text
    state = answer.json()
    return state, {"Skialith-Lease": state["lease"]["token"]}


def save(http: httpx.Client, agent: str, event_id: str, payload: Any = None, **headers: str) -> httpx.Response:
    body = {"event_id": event_id, "payload": {"n": 1} if payload is None else payload}
    return http.post(f"/agents/{agent}/events", json=body, headers=headers)


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"urn:skialith:problem:{kind}"
    assert document["status"] == status
    assert {"title", "detail", "outcome", "retryable"} <= document.keys()
    return document


def test_the_endpoints_of_the_original(http: httpx.Client) -> None:
    """The bodies as its clients send them, and no header of ours."""
    new = http.get("/agents/original/state").json()
    assert (new["agent_id"], new["step_index"], new["state"], new["is_new"]) == ("original", 0, {}, True)
    saved = http.post("/agents/original/events", json={"event_id": "e1", "payload": {"kind": "thought"}})
    assert saved.status_code == 200
    assert saved.json()["duplicate"] is False
    assert http.post("/agents/original/checkpoint", json={"step_index": 3, "state": {"m": ["ä"]}}).status_code == 200
    state = http.get("/agents/original/state").json()
    assert (state["agent_id"], state["step_index"], state["state"]) == ("original", 3, {"m": ["ä"]})
    assert http.get("/health").json()["status"] == "ok"


def test_the_first_event_under_an_id_wins(http: httpx.Client) -> None:
    first, again = save(http, "twice", "e", {"n": 1}), save(http, "twice", "e", {"n": 2})
    assert again.json() == {"seq": first.json()["seq"], "duplicate": True}
    (event,) = http.get("/agents/twice/history").json()["events"]
    assert event["payload"] == {"n": 1}


def test_a_batch_keeps_its_order_and_its_steps(http: httpx.Client) -> None:
    _, mine = resume(http, "batch")
    events = [{"event_id": f"e{n}", "payload": {"n": n}, "step_index": n} for n in range(1000)]
    acks = http.post("/agents/batch/events/batch", json={"events": events}, headers=mine).json()["acks"]
    assert [ack["seq"] for ack in acks] == sorted({ack["seq"] for ack in acks})
    assert len(acks) == 1000
    found = http.get("/agents/batch/history", params={"limit": 1000}).json()["events"]
    assert [(event["payload"]["n"], event["step_index"]) for event in found] == [(n, n) for n in range(1000)]


def test_the_newest_owner_fences_the_one_before(http: httpx.Client) -> None:
    _, first = resume(http, "owned", "worker-1")
    assert http.post("/agents/owned/checkpoint", json={"step_index": 1, "state": 1}, headers=first).status_code == 200
    state, second = resume(http, "owned", "worker-2")
    assert (state["step_index"], state["state"], state["is_new"]) == (1, 1, False)
    for _ in range(2):
        refused = problem(save(http, "owned", "late", **first), 409, "fenced")
        assert (refused["owner"], refused["outcome"], refused["retryable"]) == ("worker-2", "not_written", False)
        batch = {"events": [{"event_id": f"late{n}", "payload": n} for n in range(30)]}
        refused = problem(http.post("/agents/owned/events/batch", json=batch, headers=first), 409, "fenced")
        assert (refused["owner"], refused["failed"], refused["acks"]) == ("worker-2", 0, [])
        checkpoint = http.post("/agents/owned/checkpoint", json={"step_index": 9, "state": 9}, headers=first)
        assert problem(checkpoint, 409, "fenced")["owner"] == "worker-2"
    assert save(http, "owned", "mine", **second).status_code == 200
    events = http.get("/agents/owned/history").json()["events"]
    assert [event["event_id"] for event in events] == ["mine"]
    assert http.get("/agents/owned/state").json()["step_index"] == 1


def test_given_up_and_forgotten(http: httpx.Client) -> None:
    _, mine = resume(http, "given")
    assert save(http, "given", "e1", **mine).status_code == 200
    for _ in range(2):
        assert http.delete("/agents/given/lease", headers=mine).status_code == 204
    refused = problem(save(http, "given", "e2", **mine), 409, "fenced")
    assert refused["owner"] == ""
    _, other = resume(http, "given")
    assert http.delete("/agents/given/lease", headers=mine).status_code == 204
    assert save(http, "given", "e3", **other).status_code == 200
    problem(http.delete("/agents/given/lease"), 400, "invalid")


def test_a_token_that_nobody_gave(http: httpx.Client) -> None:
    resume(http, "strange", "somebody")
    assert problem(save(http, "strange", "e", **{"Skialith-Lease": "0" * 32}), 409, "fenced")["owner"] == "somebody"
    assert problem(save(http, "nobody", "e", **{"Skialith-Lease": "0" * 32}), 409, "fenced")["owner"] == ""
    for bad in ("", "x", "0" * 31, "A" * 32):
        refused = problem(save(http, "strange", "e", **{"Skialith-Lease": bad}), 400, "invalid")
        assert refused["path"] == "Skialith-Lease"


def test_a_checkpoint_that_is_sent_again_is_written_once(http: httpx.Client) -> None:
    call = {"Idempotency-Key": "call-1"}
    for large in ("", "x" * 3_000_000):
        agent = f"again{len(large)}"
        acks = [
            http.post(f"/agents/{agent}/checkpoint", json={"step_index": 1, "state": [large]}, headers=call).json()
            for _ in range(2)
        ]
        assert acks[1] == {"seq": acks[0]["seq"], "duplicate": True}
        other = http.post(f"/agents/{agent}/checkpoint", json={"step_index": 1, "state": ["b"]}, headers=call).json()
        assert other["seq"] > acks[0]["seq"] and not other["duplicate"]
        assert http.get(f"/agents/{agent}/state").json()["state"] == ["b"]
        back = http.post(f"/agents/{agent}/checkpoint", json={"step_index": 1, "state": [large]}).json()
        assert not back["duplicate"]
        assert http.get(f"/agents/{agent}/state").json()["state"] == [large]


IDS = (
    "a/b",
    "..a",
    "%",
    "%2F",
    "a b",
    "?#&+;=:@",
    "ä€😀",
    "\x00\x0b\x7f\n",
    "*>.",
    "x" * 255,
    "😀" * 255,
    "~",
    "{agent_id}",
)


@pytest.mark.parametrize("agent_id", IDS)
def test_ids_are_any_text(http: httpx.Client, agent_id: str) -> None:
    path = "".join(f"%{byte:02X}" for byte in agent_id.encode())
    _, mine = resume(http, path)
    assert http.post(f"/agents/{path}/checkpoint", json={"step_index": 2, "state": {}}, headers=mine).status_code == 200
    assert save(http, path, agent_id, **mine).status_code == 200
    state = http.get(f"/agents/{path}/state").json()
    assert (state["agent_id"], state["step_index"]) == (agent_id, 2)
    assert [event["event_id"] for event in http.get(f"/agents/{path}/history").json()["events"]] == [agent_id]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ('{"event_id": "e", "payload": {"a": [1, {"b": 123456789012345678901234567890}]}}', "payload.a[1].b"),
        ('{"event_id": "e", "payload": {"a": NaN}}', "body"),
        ('{"event_id": "e", "payload": {"a": [1, {"b": -1e400}]}}', "payload.a[1].b"),
        ('{"event_id": "e", "payload": 1' + "0" * 400 + ".0}", "payload"),
        ('{"event_id": "e", "payload": {"a": 1}', "body"),
        ('{"event_id": "e", "payload": ' + "[" * 250 + "]" * 250 + "}", "body"),
        ('{"event_id": "", "payload": 1}', "event_id"),
        ('{"event_id": 1, "payload": 1}', "event_id"),
        ('{"event_id": "' + "x" * 256 + '", "payload": 1}', "event_id"),
        ('{"event_id": "e"}', "payload"),
        ('{"event_id": "e", "payload": 1, "step_index": -1}', "step_index"),
        ('{"event_id": "e", "payload": 1, "step_index": true}', "step_index"),
        ('{"event_id": "e", "payload": 1, "step_index": 9223372036854775808}', "step_index"),
        ('{"event_id": "e", "payload": 1, "lease": "x"}', "lease"),
        ("[]", "body"),
        ("", "body"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(http: httpx.Client, body: str, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused = problem(http.post("/agents/bad/events", content=body, headers=headers), 400, "invalid")
    assert (refused["path"], refused["outcome"], refused["retryable"]) == (path, "not_written", False)
    assert refused["detail"].startswith(path) or path == "body"
    assert http.get("/agents/bad/history").json() == {"events": [], "next": None}


def test_bad_values_in_a_batch_and_in_a_step(http: httpx.Client) -> None:
    events = [{"event_id": "e", "payload": 1}, {"event_id": "f", "payload": {"x": [2**70]}}]
    refused = problem(http.post("/agents/bad2/events/batch", json={"events": events}), 400, "invalid")
    assert refused["path"] == "events[1].payload.x[0]"
    events[1] = {"event_id": "", "payload": 1}
    refused = problem(http.post("/agents/bad2/events/batch", json={"events": events}), 400, "invalid")
    assert refused["path"] == "events[1].event_id"
    problem(http.post("/agents/bad2/events/batch", json={"events": []}), 400, "invalid")
    step = {"step_id": "s", "name": "s", "function": "f"}
    for more, path in (
        ({}, "result"),
        ({"result": 1, "error": {"type": "E", "message": ""}}, "result"),
        ({"result": {"a": [2**70]}}, "result.a[0]"),
        ({"error": {"type": "E"}}, "error.message"),
    ):
        refused = problem(http.post("/agents/bad2/steps", json={**step, **more}), 400, "invalid")
        assert refused["path"] == path
    assert http.get("/agents/bad2/history").json()["events"] == []


def test_steps_are_those_of_python(served: Sidecar, http: httpx.Client) -> None:
    """A step that Python recorded is found over HTTP, and the other way round."""
    directory = str(served.stdout.parent / ".skialith")
    with SkialithAgent("steps", directory=directory, writer="off") as agent:
        assert agent.step("ask", len, "four") == 4
    found = http.get("/agents/steps/steps/ask").json()
    assert found == {"step_id": "ask", "function": "builtins.len", "result": 4}
    body = {"step_id": "ask#2", "name": "ask", "n": 2, "function": "builtins.len", "result": 40}
    assert http.post("/agents/steps/steps", json=body).json()["recorded"] is None
    lost = http.post("/agents/steps/steps", json={**body, "result": 41}).json()
    assert lost["duplicate"] is True
    assert lost["recorded"] == {"step_id": "ask#2", "function": "builtins.len", "result": 40}
    failed = {"step_id": "bad", "name": "bad", "function": "f", "error": {"type": "E", "message": "m"}}
    assert http.post("/agents/steps/steps", json=failed).status_code == 200
    assert http.get("/agents/steps/steps/bad").json()["error"] == {"type": "E", "message": "m"}
    problem(http.get("/agents/steps/steps/none"), 404, "not-found")
    with SkialithAgent("steps", directory=directory, writer="off") as agent:
        assert [agent.step("ask", len, "four") for _ in range(2)] == [4, 40]


def test_what_json_cannot_hold_says_so(served: Sidecar, http: httpx.Client) -> None:
    directory = str(served.stdout.parent / ".skialith")
    with SkialithAgent("python", directory=directory, writer="off") as agent:
        agent.checkpoint(1, {"b": b"\x00", "n": math.nan, 5: "five", "t": date(2026, 1, 1), "big": 2**63})
    state = http.get("/agents/python/state").json()["state"]
    assert state == {
        "b": {"skialith_base64": "AA=="},
        "n": {"skialith_omitted": "NaN"},
        "5": "five",
        "t": "2026-01-01",
        "big": 2**63,
    }


def test_an_owner_in_python_and_one_over_http_fence_each_other(served: Sidecar, http: httpx.Client) -> None:
    directory = str(served.stdout.parent / ".skialith")
    with SkialithAgent("mixed", directory=directory, writer="off") as agent:
        agent.resume()
        agent.checkpoint(1, "python")
        state, mine = resume(http, "mixed", "over http")
        assert state["state"] == "python"
        with pytest.raises(AgentFenced) as caught:
            agent.save_event("late", 1)
        assert caught.value.owner == "over http"
        assert save(http, "mixed", "e", **mine).status_code == 200
        assert agent.resume().step_index == 1
        assert "pid" in problem(save(http, "mixed", "late", **mine), 409, "fenced")["owner"]


def test_a_lease_is_good_after_a_crash_and_at_another_sidecar(nats_server: NatsServer, tmp_path: Path) -> None:
    settings = {**WAL, "SKIALITH_NATS_URL": nats_server.url}
    with sidecar(cwd=tmp_path, settings=settings) as one:
        _, mine = resume(one.client(), "a", "me")
        assert save(one.client(), "a", "e1", **mine).status_code == 200
        with sidecar(cwd=tmp_path, settings=settings) as other:
            for n in range(6):  # in turns, as behind a load balancer
                client = (one, other)[n % 2].client()
                body = {"step_index": n, "state": n}
                assert client.post("/agents/a/checkpoint", json=body, headers=mine).status_code == 200
            one.process.kill()
            one.process.wait()
            assert save(other.client(), "a", "e2", **mine).status_code == 200
        with sidecar(cwd=tmp_path, port=one.port, settings=settings) as again:
            assert save(again.client(), "a", "e3", **mine).status_code == 200
            assert again.client().get("/agents/a/state").json()["step_index"] == 5
            resume(again.client(), "a", "you")
            assert problem(save(again.client(), "a", "e4", **mine), 409, "fenced")["owner"] == "you"


def test_the_log_is_away_and_back(nats_server: NatsServer, tmp_path: Path) -> None:
    settings = {**WAL, "SKIALITH_NATS_URL": nats_server.url, "SKIALITH_TIMEOUT": "1"}
    with sidecar(cwd=tmp_path, settings=settings) as made:
        http = made.client()
        _, mine = resume(http, "a")
        nats_server.stop()
        refused = problem(save(http, "a", "e1", **mine), 503, "log-unavailable")
        assert refused["retryable"] is True and refused["outcome"] in ("not_written", "unknown")
        assert int(http.post("/agents/a/resume").headers["Retry-After"]) >= 1
        batch = {"events": [{"event_id": "b1", "payload": 1}]}
        assert problem(http.post("/agents/a/events/batch", json=batch), 503, "log-unavailable")["failed"] == 0
        nats_server.start()
        wait_until(lambda: save(http, "a", "e1", **mine).status_code == 200, 20, "the sidecar writes again")


def test_the_log_is_full(nats_server: NatsServer, tmp_path: Path) -> None:
    """Nothing moves its records on, because its database does not answer."""
    nowhere = "mysql://u:p@127.0.0.1:1/none"
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_DATABASE_URL": nowhere}
    with sidecar(cwd=tmp_path, ready=False, settings={**settings, "SKIALITH_WAL_BYTES": "1000000"}) as made:
        http = made.client()
        answers = [save(http, "a", f"e{n}", "x" * 50_000) for n in range(30)]
        full = [answer for answer in answers if answer.status_code != 200]
        assert full
        refused = problem(full[-1], 507, "log-full")
        assert (refused["outcome"], refused["retryable"]) == ("not_written", True)
        assert "Retry-After" in full[-1].headers
        problem(http.post("/agents/new/resume"), 503, "database-unavailable")
