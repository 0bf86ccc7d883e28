"""What the sidecar logs: JSON, line by line, each request's lines with its id, and nothing that is secret."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..fixtures.command import environment
from ..fixtures.nats import NatsServer, free_port, wait_until
from ..fixtures.sidecar import Sidecar, sidecar

TOKEN = "a-token-nobody-may-read"
SECRET = "a-payload-nobody-may-read"


def requests(made: Sidecar) -> list[dict[str, Any]]:
    """The lines of the access log."""
    return [line for line in made.lines if line["logger"] == "skialith.access"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_line_is_json_and_none_is_there_twice(tmp_path: Path, workers: str) -> None:
    with sidecar("--access-log", "--workers", workers, cwd=tmp_path, token=TOKEN) as made:
        client = made.client()
        for n in range(20):
            client.post("/agents/a%2Fb/events", json={"event_id": f"{SECRET}{n}", "payload": SECRET}).raise_for_status()
            client.get("/nowhere")
        client.post("/agents/a/events", json={"event_id": "x", "payload": {"n": 2**70, "s": SECRET}})
        client.post("/agents/a/events", content=f'{{"{SECRET}'.encode(), headers={"Content-Type": "application/json"})
        made.client(headers={"Authorization": f"Bearer {TOKEN}-wrong"}).get("/metrics")
    for line in made.lines:
        assert {"event", "level", "logger", "timestamp"} <= line.keys()
    mine = [line for line in requests(made) if line["path"] != "/ready"]
    assert len(mine) == 43
    assert len({line["request_id"] for line in mine}) == 43
    assert {line["path"] for line in mine} == {"/agents/a%2Fb/events", "/nowhere", "/agents/a/events", "/metrics"}
    assert [line["status"] for line in mine].count(200) == 20
    for line in mine:
        assert line["ms"] > 0 and line["bytes"] > 0 and line["client"].startswith("127.0.0.1:")
    assert TOKEN not in made.log + made.said
    assert SECRET not in made.log + made.said
    assert not [line for line in made.lines if line["logger"] == "uvicorn.access"]


def test_without_the_access_log_requests_are_silent(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path) as made:
        for _ in range(5):
            made.client().get("/agents/a/state")
            made.client().get("/nowhere")
        assert not [line for line in made.lines if "path" in line]


def test_request_ids_are_taken_over_if_they_are_sane(tmp_path: Path) -> None:
    with sidecar("--access-log", cwd=tmp_path) as made:
        client = made.client()
        mine = client.get("/health", headers={"X-Request-Id": "trace-1.a_b~c"})
        assert mine.headers["x-request-id"] == "trace-1.a_b~c"
        for bad in ("x" * 129, "with space", 'quo"te', "<script>", ""):
            given = client.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
            assert re.fullmatch("[0-9a-f]{16}", given)
        ids = [line["request_id"] for line in requests(made)]
        assert ids.count("trace-1.a_b~c") == 1
        assert "x-request-id" in client.get("/nowhere").headers


def test_what_fails_is_logged_with_its_request(nats_server: NatsServer, tmp_path: Path) -> None:
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_WAL_BYTES": str(64 * 1024 * 1024)}
    with sidecar(cwd=tmp_path, settings={**settings, "SKIALITH_TIMEOUT": "1"}) as made:
        nats_server.kill()
        headers = {"X-Request-Id": "the-one"}
        answer = made.client().post("/agents/a/events", json={"event_id": SECRET, "payload": SECRET}, headers=headers)
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:skialith:problem:log-unavailable"
        (line,) = [line for line in made.lines if line.get("request_id") == "the-one"]
        assert line["level"] == "warning" and line["event"].startswith("503 log-unavailable: ")
        assert (line["method"], line["path"]) == ("POST", "/agents/a/events")
        nats_server.start()
        assert not [
            line
            for line in made.lines
            if "request_id" in line and line["request_id"] != "the-one" and "path" not in line
        ]


def test_a_bug_is_a_problem_and_one_line_with_its_traceback(tmp_path: Path) -> None:
    code = (
        "from skialith.sidecar import engine\n"
        f"async def broken(self, agent_id): state = {SECRET!r}; raise RuntimeError('a bug')\n"
        "engine.Engine.newest_checkpoint = broken\n"
        "from skialith.cli import main\nmain()"
    )
    port = free_port()
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--port", str(port)], cwd=tmp_path, env=environment(), stderr=err,
            stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    made = Sidecar(f"http://127.0.0.1:{port}", port, process, tmp_path / "out", tmp_path / "err")
    try:
        client = httpx.Client(base_url=made.url, trust_env=False, timeout=30)
        wait_until(lambda: "serving" in made.log, 60, "it serves")
        answer = client.get("/agents/a/state", headers={"X-Request-Id": "buggy"})
        client.close()
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["x-request-id"] == "buggy"
        assert answer.json()["outcome"] == "unknown"
        assert "a bug" not in answer.text
        (line,) = [line for line in made.lines if line["level"] == "error"]
        assert line["request_id"] == "buggy"
        assert "RuntimeError: a bug" in line["exception"]
        assert made.stop() == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("options", "as_json"), [((), False), (("--log-format", "json"), True)])
def test_a_terminal_gets_lines_for_people(tmp_path: Path, options: tuple[str, ...], as_json: bool) -> None:
    master, slave = pty.openpty()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "skialith.cli", "serve", "--port", str(port), "--access-log", *options],
        cwd=tmp_path, env=environment(), stderr=slave, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        text = _read(master, "serving")
        httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, headers={"X-Request-Id": "person"})
        text += _read(master, "person")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        os.close(master)
        if process.poll() is None:
            process.kill()
            process.wait()
    lines = [line for line in text.splitlines() if "person" in line]
    assert len(lines) == 1
    assert lines[0].startswith("{") == as_json
    assert "/health" in lines[0] and "200" in lines[0]


def _read(master: int, until: str) -> str:
    text = ""
    while until not in text or not text.endswith("\n"):
        text += os.read(master, 65536).decode()
    return text
