"""The wire test vectors that the TypeScript SDK shares with Python: played against a real sidecar, and its error documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from skialith import errors
from skialith.sidecar import problems
from skialith.sidecar.wire import Problem

from ..fixtures.sidecar import Sidecar, sidecar

VECTORS = Path(__file__).parent / "vectors"


def vectors(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


# ---- a sidecar


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with sidecar(cwd=tmp_path_factory.mktemp("sidecar")) as running:
        yield running


def asked(
    served: Sidecar, method: str, path: str, body: str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Status and answer of a request whose path goes out as it stands here."""
    connection = HTTPConnection("127.0.0.1", served.port, timeout=30)
    try:
        connection.request(method, path, None if body is None else body.encode(), headers or {})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


def posted(served: Sidecar, path: str, body: str) -> tuple[int, Any]:
    return asked(served, "POST", path, body, {"Content-Type": "application/json"})


def headers_of(served: Sidecar, vector: Any) -> dict[str, str]:
    """The vector's headers, with the lease of a ``resume`` that comes before it."""
    found: dict[str, str] = dict(vector["headers"])
    if vector["owned"]:
        agent = vector["path"].split("/")[2]
        status, answer = asked(served, "POST", f"/agents/{agent}/resume")
        assert status == 200, answer
        found["skialith-lease"] = answer["lease"]["token"]
    return {name: value.replace("{random}", vector["name"]) for name, value in found.items()}


@pytest.mark.timeout(180)
def test_requests(served: Sidecar) -> None:
    for vector in vectors("requests")["requests"]:
        body = json.dumps(vector["body"]) if "body" in vector else None
        status, answer = asked(served, vector["method"], vector["path"], body, headers_of(served, vector))
        assert status == vector["status"], (vector["name"], answer)
        for name, value in vector.get("answer", {}).items():
            assert answer[name] == value, (vector["name"], answer)


def test_what_requests_wrote(served: Sidecar) -> None:
    """Ids and data arrive as the calls had them."""
    _, history = asked(served, "GET", "/agents/ids/history?limit=1000")
    wanted = [v for v in vectors("requests")["requests"] if v["verb"] == "save_event" and v["agent_id"] == "ids"]
    before = {event["event_id"] for event in history["events"]}
    for vector in wanted:
        status, _ = posted(served, vector["path"], json.dumps(vector["body"]))
        assert status == 200
    _, history = asked(served, "GET", "/agents/ids/history?limit=1000")
    ids = [event["event_id"] for event in history["events"]]
    assert ids == [vector["arguments"]["event_id"] for vector in wanted]
    assert before <= set(ids)


def test_requests_that_are_refused(served: Sidecar) -> None:
    for vector in vectors("requests")["refused"]:
        status, answer = posted(served, f"/agents/{vector['agent_id']}/events", json.dumps(vector["body"]))
        assert (status, answer["outcome"], answer["path"]) == (400, "not_written", vector["sidecar_path"]), answer


@pytest.mark.timeout(180)
def test_payloads_come_back(served: Sidecar) -> None:
    accepted = vectors("payloads")["accepted"]
    for n, text in enumerate(accepted):
        status, answer = posted(served, "/agents/payloads/events", f'{{"event_id":"e{n}","payload":{text}}}')
        assert status == 200, (text, answer)
        status, answer = posted(served, "/agents/payloads/checkpoint", f'{{"step_index":{n},"state":{text}}}')
        assert status == 200, (text, answer)
        _, state = asked(served, "GET", "/agents/payloads/state")
        assert (state["step_index"], state["state"]) == (n, json.loads(text))
    _, history = asked(served, "GET", "/agents/payloads/history?limit=1000")
    assert [event["payload"] for event in history["events"]] == [json.loads(text) for text in accepted]


def test_payloads_that_are_refused(served: Sidecar) -> None:
    for vector in vectors("payloads")["refused"]:
        for verb, field, first in (("events", "payload", '"event_id":"e"'), ("checkpoint", "state", '"step_index":1')):
            status, answer = posted(served, f"/agents/refused/{verb}", f'{{{first},"{field}":{vector["json"]}}}')
            path = vector.get("sidecar_path", f"{field}{vector['at']}")
            assert (status, answer["outcome"], answer["path"]) == (400, "not_written", path), (vector, answer)
    _, history = asked(served, "GET", "/agents/refused/history")
    assert history == {"events": [], "next": None}


# ---- documents


@pytest.mark.parametrize("vector", vectors("problems")["problems"], ids=lambda vector: vector["name"])
def test_problems(vector: Any) -> None:
    document = vector["document"]
    Problem.model_validate(document)
    if "python" in vector:
        name, text, facts = vector["python"]
        response = problems.of_error(getattr(errors, name)(text, **facts))
    elif "refusal" in vector:
        status, detail, retryable = vector["refusal"]
        response = problems.of_refusal(problems.HttpProblem(status, detail, retryable=retryable))
    else:
        return  # one that no sidecar of today says
    assert response.status_code == document["status"]
    assert response.media_type == problems.MEDIA_TYPE
    assert json.loads(bytes(response.body)) == document


def test_every_kind_of_problem_has_a_vector() -> None:
    known = {vector["document"]["type"].rpartition(":")[2] for vector in vectors("problems")["problems"]}
    # Nobody reads the answer to a client that is gone.
    kinds = {kind.name for known, kind in problems._KINDS if known is not problems.Gone}
    kinds |= {kind.name for kind in problems._BY_STATUS.values()}
    assert kinds | {problems._INTERNAL.name} <= known
