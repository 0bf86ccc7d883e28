"""An owner that gives a request up and goes on: what it gave up is never written behind what was answered since."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fixtures.sidecar import Sidecar, sidecar

TIMES = 15


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with sidecar(
        cwd=tmp_path_factory.mktemp("sidecar"), settings={"SKIALITH_WAL_BYTES": str(256 * 1024 * 1024)}
    ) as made:
        yield made


def give_up(made: Sidecar, path: str, body: Any, headers: dict[str, str]) -> None:
    """Send a whole request, and close the connection without waiting for the answer."""
    text = json.dumps(body).encode()
    head = {
        "Host": f"127.0.0.1:{made.port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(text)),
        **headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    with socket.create_connection(("127.0.0.1", made.port), timeout=30) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + text)


@pytest.mark.parametrize("size", [10, 100_000, 1_500_000, 8_000_000])
def test_a_checkpoint_that_was_given_up(served: Sidecar, size: int) -> None:
    """It takes longer on its way to the log than the next one, which is answered."""
    http, agent = served.client(), f"agent-{size}"
    lease = http.post(f"/agents/{agent}/resume").json()["lease"]["token"]
    owner = {"Skialith-Lease": lease}
    for step in range(1, TIMES, 2):
        give_up(served, f"/agents/{agent}/checkpoint", {"step_index": step, "state": "~" * size}, owner)
        body = {"step_index": step + 1, "state": "next"}
        assert http.post(f"/agents/{agent}/checkpoint", json=body, headers=owner).status_code == 200
        for _ in range(10):
            assert http.get(f"/agents/{agent}/state").json()["step_index"] == step + 1


def test_a_batch_that_was_given_up(served: Sidecar) -> None:
    """All its events stand before the one that was answered since, or none."""
    http, agent = served.client(), "batches"
    owner = {"Skialith-Lease": http.post(f"/agents/{agent}/resume").json()["lease"]["token"]}
    for step in range(TIMES):
        events = [{"event_id": f"{step}.{n}", "payload": "~" * 2000} for n in range(900)]
        give_up(served, f"/agents/{agent}/events/batch", {"events": events}, owner)
        body = {"event_id": f"{step}.answered", "payload": None}
        assert http.post(f"/agents/{agent}/events", json=body, headers=owner).status_code == 200
    saved = list(event_ids(http, agent))
    for step in range(TIMES):
        places = [place for place, event in enumerate(saved) if event.startswith(f"{step}.")]
        assert saved[places[-1]] == f"{step}.answered"


def test_a_resume_that_was_given_up(served: Sidecar) -> None:
    """It does not take the agent from the one that was made again."""
    http = served.client()
    for n in range(TIMES):
        give_up(served, "/agents/resumed/resume", {"owner": "given up"}, {})
        owner = {
            "Skialith-Lease": http.post("/agents/resumed/resume", json={"owner": "again"}).json()["lease"]["token"]
        }
        for part in range(5):
            body = {"event_id": f"{n}.{part}", "payload": None}
            answer = http.post("/agents/resumed/events", json=body, headers=owner)
            assert answer.status_code == 200, answer.text


def event_ids(http: httpx.Client, agent: str) -> Iterator[str]:
    after: str | None = None
    while True:
        given = {"limit": "1000", **({"after": after} if after else {})}
        page = http.get(f"/agents/{agent}/history", params=given).json()
        yield from (event["event_id"] for event in page["events"])
        after = page["next"]
        if after is None:
            return
