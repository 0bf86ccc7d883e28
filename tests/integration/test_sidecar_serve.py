"""How ``skialith serve`` begins and ends: signals, settings that are wrong, several workers, TLS, and what is stored then."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from skialith import SkialithAgent
from skialith.sidecar.config import load

from ..fixtures.command import Said, environment, read_until, running, skialith, stop
from ..fixtures.nats import NatsServer, free_port, wait_until
from ..fixtures.sidecar import Sidecar, sidecar
from ..fixtures.wal import new_namespace

WAL_BYTES = str(64 * 1024 * 1024)


def save(made: Sidecar, *names: str, agent: str = "a") -> None:
    for name in names:
        made.client().post(f"/agents/{agent}/events", json={"event_id": name, "payload": name}).raise_for_status()


def stored(folder: Path, name: str = ".skialith/skialith.db") -> list[str]:
    """The ids of the events that the database has, by SQL."""
    with sqlite3.connect(folder / name) as database:
        return sorted(str(row[0]) for row in database.execute("SELECT event_id FROM agent_events"))


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


# ---- beginning and ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_all_is_stored(tmp_path: Path, number: signal.Signals) -> None:
    names = [f"e{n}" for n in range(200)]
    with sidecar(cwd=tmp_path) as made:
        save(made, *names)
        assert made.stop(number) == 0, made.log
    assert stored(tmp_path) == sorted(names)
    first, about, *_, last = made.said.splitlines()
    assert first == f"Skialith serves {made.url} (1 worker)"
    assert "namespace default" in about and "skialith.db" in about
    assert last == "stopped"
    assert "Traceback" not in made.log


def test_port_0_is_any_free_one(tmp_path: Path) -> None:
    with running("serve", "--port", "0", cwd=tmp_path) as process:
        line = read_until(process, "Skialith serves")
        url = line.split()[2]
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "ok"
        assert stop(process, signal.SIGTERM).code == 0


def test_it_begins_again_at_its_port_where_it_left_off(tmp_path: Path) -> None:
    port = free_port()
    for n in range(3):
        with sidecar(cwd=tmp_path, port=port) as made:
            save(made, f"e{n}")
            made.client().post("/agents/a/checkpoint", json={"step_index": n, "state": n}).raise_for_status()
    assert stored(tmp_path) == ["e0", "e1", "e2"]


def test_agents_of_the_directory_share_its_embedded_server(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path) as made:
        with SkialithAgent("shared", directory=str(tmp_path / ".skialith")) as agent:
            agent.resume()
            agent.checkpoint(7, {"by": "python"})
        assert made.client().get("/agents/shared/state").json()["state"] == {"by": "python"}


def test_what_is_under_way_is_answered_before_it_ends(nats_server: NatsServer, tmp_path: Path) -> None:
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_WAL_BYTES": WAL_BYTES}
    with sidecar(cwd=tmp_path, settings=settings) as made:
        save(made, "before")
        nats_server.pause()
        body = {"event_id": "waiting", "payload": 1}
        thread, answers = in_background(lambda: made.client().post("/agents/a/events", json=body))
        wait_accepted(made, 2)
        made.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Shutting down" in made.log, 20, "it stops")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{made.url}/health", trust_env=False)
        assert made.process.poll() is None
        nats_server.resume()
        thread.join(30)
        assert made.process.wait(40) == 0, made.log
    assert [answer.status_code for answer in answers] == [200], answers
    assert stored(tmp_path) == ["before", "waiting"]


@pytest.mark.parametrize("workers", [1, 2])
def test_under_load_all_that_was_answered_is_stored_when_it_has_ended(tmp_path: Path, workers: int) -> None:
    answered: list[str] = []
    others: list[str] = []

    def agent(name: str) -> None:
        with httpx.Client(base_url=made.url, trust_env=False, timeout=30) as client:
            for n in range(10_000):
                try:
                    body = {"event_id": f"{name}-{n}", "payload": n}
                    answer = client.post(f"/agents/{name}/events", json=body)
                except httpx.TransportError:
                    return
                if answer.status_code != 200:
                    others.append(answer.text)
                    return
                answered.append(f"{name}-{n}")

    with sidecar("--workers", str(workers), cwd=tmp_path) as made:
        threads = [threading.Thread(target=agent, args=(f"agent{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answered) > 300, 60, "there is load")
        assert made.stop() == 0, made.log
        for thread in threads:
            thread.join(60)
    kept = set(stored(tmp_path))
    assert len(answered) > 300 and not others
    assert not set(answered) - kept
    assert len(kept) <= len(answered) + len(threads)  # one at most of each agent was stored and not answered


def wait_accepted(made: Sidecar, count: int) -> None:
    """Wait until so many records were handed over, acknowledged or not."""
    line = f'skialith_records_total{{state="accepted"}} {float(count)}\n'
    wait_until(lambda: line in made.client().get("/metrics").text, 30, f"{count} records are accepted")


def test_what_cannot_be_answered_in_time_is_told_that_it_stops(nats_server: NatsServer, tmp_path: Path) -> None:
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_WAL_BYTES": WAL_BYTES, "SKIALITH_TIMEOUT": "25"}
    with sidecar(cwd=tmp_path, limits={"SHUTDOWN_SECONDS": 1}, settings=settings) as made:
        save(made, "before")
        nats_server.pause()
        body = {"event_id": "waiting", "payload": 1}
        thread, answers = in_background(lambda: made.client().post("/agents/a/events", json=body))
        wait_accepted(made, 2)
        made.process.send_signal(signal.SIGTERM)
        thread.join(30)
        nats_server.resume()
        assert made.process.wait(60) == 0, made.log
    assert answers[0].status_code == 503, answers
    problem = answers[0].json()
    assert problem["type"] == "urn:skialith:problem:stopping"
    assert problem["outcome"] == "unknown" and problem["retryable"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_it_at_once(nats_server: NatsServer, tmp_path: Path, workers: int) -> None:
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_WAL_BYTES": WAL_BYTES}
    with sidecar("--workers", str(workers), cwd=tmp_path, settings=settings) as made:
        children = _children(made.process.pid) if workers > 1 else []
        folder = made.metrics_folder()
        assert folder.exists() == (workers > 1)
        nats_server.pause()
        body = {"event_id": "waiting", "payload": 1}
        thread, answers = in_background(lambda: made.client().post("/agents/a/events", json=body))
        wait_accepted(made, 1)
        made.process.send_signal(signal.SIGINT)
        wait_until(lambda: "Shutting down" in made.log, 20, "it stops")
        began = time.monotonic()
        assert made.stop(signal.SIGINT) == -signal.SIGINT
        assert time.monotonic() - began < 5
        thread.join(30)
    assert isinstance(answers[0], httpx.TransportError)
    wait_until(lambda: not [pid for pid in children if _alive(pid)], 10, "no worker is left")
    assert not folder.exists()


def _children(pid: int) -> list[int]:
    """The workers of a supervisor; the resource tracker of multiprocessing is none of them."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


# ---- what is wrong is said in one line


def wrong(said: Said, code: int, *parts: str) -> None:
    lines = [line for line in said.err.splitlines() if not line.startswith("{")]
    assert said.code == code, said
    assert len(lines) == 1 and lines[0].startswith("error: "), said.err
    for part in parts:
        assert part in lines[0]
    assert said.out == ""


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        wrong(skialith("serve", "--port", str(port), cwd=tmp_path), 2, str(port), "in use", "--port")


def test_the_port_of_another_sidecar(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path) as made:
        wrong(skialith("serve", "--port", str(made.port), cwd=tmp_path), 2, str(made.port), "in use")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--host", "0.0.0.0"], ["SKIALITH_TOKEN", "--insecure"]),
        (["--host", "::"], ["SKIALITH_TOKEN", "--insecure"]),
        (["--host", "no.such.host.invalid", "--insecure"], ["no.such.host.invalid"]),
        (["--host", "203.0.113.9", "--insecure"], ["203.0.113.9"]),
        (["--port", "70000"], ["port"]),
        (["--workers", "0"], ["workers"]),
        (["--body-bytes", "0"], ["body_bytes"]),
        (["--lag-seconds", "-1"], ["lag_seconds"]),
        (["--log-format", "xml"], ["xml", "json"]),
        (["--cors-origin", "example.com"], ["example.com"]),
        (["--token-file", "missing"], ["missing"]),
        (["--tls-cert", "missing"], ["--tls-key"]),
        (["--tls-cert", "missing", "--tls-key", "missing"], ["--tls-cert", "No such file"]),
        (["--database-url", "oracle://x"], ["database_url"]),
    ],
    ids=" ".join,
)
def test_a_wrong_setting(tmp_path: Path, options: list[str], parts: list[str]) -> None:
    wrong(skialith("serve", "--port", "0", *options, cwd=tmp_path), 2, *parts)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_database_of_another_log(tmp_path: Path, workers: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with sidecar(cwd=first) as made:
        save(made, "mine")
    options = ("--port", "0", "--workers", workers, "--database-url", f"sqlite:///{first / '.skialith/skialith.db'}")
    wrong(skialith("serve", *options, cwd=second), 2, "skialith.db", "--adopt-wal")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_log_that_is_away_at_the_start(tmp_path: Path, workers: str) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    options = ("--port", "0", "--workers", workers, "--nats-url", url, "--timeout", "1")
    wrong(skialith("serve", *options, cwd=tmp_path), 1, url.removeprefix("nats://"))


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from skialith.cli import main; main()"
    wrong(_python(tmp_path, code, "serve"), 2, "uvicorn", "pip install 'skialith[sidecar]'")


def _python(cwd: Path, code: str, *arguments: str) -> Said:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


def test_other_commands_do_not_import_the_web(tmp_path: Path) -> None:
    code = (
        "import sys, skialith.cli\n"
        "print([name for name in ('fastapi', 'uvicorn', 'prometheus_client', 'structlog', 'pydantic') if name in sys.modules])"
    )
    said = _python(tmp_path, code)
    assert said.out.strip() == "[]", said


# ---- addresses and tokens


def test_other_addresses_want_a_token_and_then_need_it(tmp_path: Path) -> None:
    with sidecar("--host", "0.0.0.0", cwd=tmp_path, token="secret") as made:
        assert made.client().get("/agents/a/state").status_code == 200
        assert made.client(headers={}).get("/agents/a/state").status_code == 401


def test_insecure_is_said_in_the_log(tmp_path: Path) -> None:
    with sidecar("--host", "0.0.0.0", "--insecure", cwd=tmp_path) as made:
        assert made.client().get("/agents/a/state").status_code == 200
        assert any("--insecure" in line["event"] and line["level"] == "warning" for line in made.lines)


def test_the_token_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    with sidecar("--token-file", "token", cwd=tmp_path, ready=True) as made:
        assert made.client().get("/agents/a/state").status_code == 401
        answer = made.client(headers={"Authorization": "Bearer from-a-file"}).get("/agents/a/state")
        assert answer.status_code == 200
        assert "from-a-file" not in Path(f"/proc/{made.process.pid}/cmdline").read_text()


def test_an_option_wins_over_its_variable() -> None:
    env = {
        "SKIALITH_HTTP_PORT": "1000",
        "SKIALITH_HTTP_CORS_ORIGINS": "https://A.example/, https://b.example:8",
        "SKIALITH_HTTP_INSECURE": "yes",
        "SKIALITH_HTTP_LAG_SECONDS": "2.5",
        "SKIALITH_HTTP_ACCESS_LOG": "1",
    }
    found = load(env, port=2000, workers=None)
    assert (found.port, found.workers, found.insecure, found.access_log) == (2000, 1, True, True)
    assert found.cors_origins == ("https://a.example", "https://b.example:8")
    assert found.lag_seconds == 2.5


# ---- several workers


def test_workers_share_the_embedded_server_and_one_that_is_killed_is_replaced(tmp_path: Path) -> None:
    with sidecar("--workers", "2", cwd=tmp_path) as made:
        wait_until(lambda: "2 workers" in made.said, 30, "both serve")
        before = _children(made.process.pid)
        assert len(before) == 2
        save(made, "before")
        os.kill(before[0], signal.SIGKILL)

        def replaced() -> bool:
            return len(_children(made.process.pid)) == 2 and before[0] not in _children(made.process.pid)

        wait_until(replaced, 30, "there is another worker")
        for _ in range(20):
            with httpx.Client(base_url=made.url, trust_env=False) as client:  # each may come to another worker
                assert client.get("/ready").status_code == 200
        save(made, "behind")
        assert made.stop() == 0
    assert stored(tmp_path) == ["before", "behind"]
    assert made.said.count("Skialith serves") == 1
    assert not [pid for pid in before if _alive(pid)]


def test_workers_of_a_supervisor_that_is_killed_end_and_free_the_port(tmp_path: Path) -> None:
    with sidecar("--workers", "2", cwd=tmp_path) as made:
        wait_until(lambda: "2 workers" in made.said, 30, "both serve")
        children, folder = _children(made.process.pid), made.metrics_folder()
        assert folder.exists()
        save(made, "before")
        assert made.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not [pid for pid in children if _alive(pid)], 30, "the workers end")
    assert not folder.exists()
    with sidecar("--workers", "2", cwd=tmp_path, port=made.port) as again:
        save(again, "again")
    assert stored(tmp_path) == ["again", "before"]


def test_a_worker_that_is_replaced_while_the_log_is_away_does_not_end_the_others(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_WAL_BYTES": WAL_BYTES, "SKIALITH_TIMEOUT": "1"}
    with sidecar("--workers", "2", cwd=tmp_path, settings=settings) as made:
        wait_until(lambda: "2 workers" in made.said, 30, "both serve")
        nats_server.kill()
        first, second = _children(made.process.pid)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: "a worker could not start" in made.log, 40, "the new one finds no log")
        assert _alive(second)
        nats_server.start()
        wait_until(lambda: _serving(made) == 2, 60, "there are two again")
        save(made, "behind")


def _serving(made: Sidecar) -> int:
    """Workers that serve now, by their start lines and their processes."""
    started = {line["worker"] for line in made.lines if line["event"] == "serving"}
    return len(started & set(_children(made.process.pid)))


# ---- TLS


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = ca.issue_cert("127.0.0.1", "localhost")
    server.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for n, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(str(tmp_path / "cert.pem"), append=n > 0)
    return ca


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


@pytest.mark.parametrize("workers", ["1", "2"])
def test_tls(authority: trustme.CA, tmp_path: Path, workers: str) -> None:
    options = ("--tls-cert", "cert.pem", "--tls-key", "key.pem", "--workers", workers)
    with sidecar(*options, cwd=tmp_path, scheme="https", verify=trusting(authority)) as made:
        save(made, "encrypted")
        wait_until(lambda: f"https://127.0.0.1:{made.port}" in made.said, 30, "it says so")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            made.client(verify=ssl.create_default_context()).get("/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{made.port}/health", trust_env=False)
        same = {"Origin": f"https://127.0.0.1:{made.port}"}
        assert made.client().get("/health", headers=same).status_code == 200
    assert stored(tmp_path) == ["encrypted"]


def test_only_clients_with_a_certificate_of_the_authority_come_in(authority: trustme.CA, tmp_path: Path) -> None:
    mine, foreign = trusting(authority), trusting(authority)
    authority.issue_cert("agent@example.com").configure_cert(mine)
    trustme.CA().issue_cert("agent@example.com").configure_cert(foreign)
    options = ("--tls-cert", "cert.pem", "--tls-key", "key.pem", "--tls-client-ca", "ca.pem")
    with sidecar(*options, cwd=tmp_path, scheme="https", verify=mine) as made:
        save(made, "known")
        for stranger in (trusting(authority), foreign):
            with pytest.raises(httpx.TransportError):
                made.client(verify=stranger).get("/health")
        assert made.client().get("/health").status_code == 200
    assert stored(tmp_path) == ["known"]


def test_a_key_of_another_certificate_is_said_at_the_start(authority: trustme.CA, tmp_path: Path) -> None:
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(str(tmp_path / "other.pem"))
    options = ("--port", "0", "--tls-cert", "cert.pem", "--tls-key", "other.pem")
    wrong(skialith("serve", *options, cwd=tmp_path), 2, "--tls-key")


def test_a_nats_server_and_a_namespace_of_ones_own(nats_url: str, tmp_path: Path) -> None:
    namespace = new_namespace()
    options = ("--nats-url", nats_url, "--namespace", namespace, "--database-url", f"sqlite:///{tmp_path / 'mine.db'}")
    with sidecar(*options, cwd=tmp_path, settings={"SKIALITH_WAL_BYTES": WAL_BYTES}) as made:
        save(made, "mine")
        assert f"namespace {namespace}" in made.said
    assert stored(tmp_path, "mine.db") == ["mine"]
    assert not (tmp_path / ".skialith").exists()
