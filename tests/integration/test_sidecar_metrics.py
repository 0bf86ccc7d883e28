"""What the sidecar says of itself to machines: Prometheus metrics that are right to the record, and whether it is ready."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

import skialith

from ..fixtures.mariadb import MariaDB
from ..fixtures.nats import NatsServer, wait_until
from ..fixtures.proxy_plugin import MakeProxy
from ..fixtures.sidecar import Sidecar, sidecar

WAL_BYTES = 64 * 1024 * 1024


def scraped(made: Sidecar) -> dict[str, float]:
    """All samples, by name with sorted labels: ``skialith_records_total{state="stored"}``."""
    answer = made.client().get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def ready(made: Sidecar) -> tuple[int, dict[str, tuple[bool, str]]]:
    """Status of ``/ready``, and its checks by name."""
    answer = made.client().get("/ready")
    document = answer.json()
    assert document["ready"] == (answer.status_code == 200)
    return answer.status_code, {check["name"]: (check["ok"], check["detail"]) for check in document["checks"]}


def wait_ready(made: Sidecar, status: int, failing: set[str]) -> dict[str, tuple[bool, str]]:
    """Wait until ``/ready`` answers so, with exactly these checks failing."""
    seen: list[tuple[int, dict[str, tuple[bool, str]]]] = []

    def so() -> bool:
        seen.append(ready(made))
        return seen[-1][0] == status and {name for name, (ok, _) in seen[-1][1].items() if not ok} == failing

    try:
        wait_until(so, 40, f"/ready says {status} for {failing or 'nothing'}")
    except AssertionError as error:
        raise AssertionError(f"{error}; last {seen[-1]}") from None
    return seen[-1][1]


def append_all_kinds(client: httpx.Client, agent: str) -> dict[str, int]:
    """Appends of every kind; how many records each kind has."""
    url = f"/agents/{agent}"
    for n in range(5):
        client.post(f"{url}/events", json={"event_id": f"e{n}", "payload": n}).raise_for_status()
    for n in range(3):
        client.post(f"{url}/checkpoint", json={"step_index": n, "state": n}).raise_for_status()
    for n in range(2):
        events = [{"event_id": f"b{n}-{k}", "payload": k} for k in range(7)]
        client.post(f"{url}/events/batch", json={"events": events}).raise_for_status()
    step = {"step_id": "s#1", "name": "s", "function": "f", "result": 1}
    client.post(f"{url}/steps", json=step).raise_for_status()
    assert client.post(f"{url}/events", json={"event_id": "", "payload": 1}).status_code == 400
    return {"event": 5, "checkpoint": 3, "batch": 14, "step": 1}


REQUESTS = {"event": 5, "checkpoint": 3, "batch": 2, "step": 1}


def test_the_numbers_are_right(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path, settings={"SKIALITH_WAL_BYTES": str(WAL_BYTES)}) as made:
        zero = scraped(made)
        assert all(
            zero[f'skialith_records_total{{state="{s}"}}'] == 0 for s in ("accepted", "durable", "stored", "released")
        )
        total = sum(append_all_kinds(made.client(), "a").values())

        def settled() -> bool:
            now = scraped(made)
            return (
                now['skialith_records_total{state="released"}'] >= total
                and now['skialith_lag_records{consumer="writer"}'] == 0
            )

        wait_until(settled, 30, "all is stored and released")
        now = scraped(made)
        for state in ("accepted", "durable", "stored", "released"):
            assert now[f'skialith_records_total{{state="{state}"}}'] == total, state
        for kind, count in REQUESTS.items():
            assert now[f'skialith_append_seconds_count{{kind="{kind}"}}'] == count
            assert now[f'skialith_append_seconds_bucket{{kind="{kind}",le="+Inf"}}'] == count
            assert 0 < now[f'skialith_append_seconds_sum{{kind="{kind}"}}'] < 60
        events = 'method="POST",route="/agents/{agent_id}/events"'
        assert now[f'skialith_http_requests_total{{{events},status="200"}}'] == 5
        assert now[f'skialith_http_requests_total{{{events},status="400"}}'] == 1
        assert now[f"skialith_http_request_seconds_count{{{events}}}"] == 6
        assert now["skialith_wal_max_bytes"] == WAL_BYTES
        assert now["skialith_wal_bytes"] >= 0
        assert now['skialith_lag_seconds{consumer="writer"}'] == 0
        assert now['skialith_retries_total{consumer="writer"}'] == 0
        assert now['skialith_dead_letters{kept_in="table"}'] == now['skialith_dead_letters{kept_in="stream"}'] == 0
        assert now["skialith_log_up"] == now["skialith_database_up"] == 1
        assert now["process_resident_memory_bytes"] > 0
        assert any(name.startswith("skialith_build_info{") and skialith.__version__ in name for name in now)


def test_routes_and_not_paths_are_the_labels(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path) as made:
        client = made.client()
        for n in range(50):
            client.get(f"/agents/agent-{n}/state")
            client.get(f"/nowhere/{n}")
            client.put(f"/agents/agent-{n}/state")
        names = [name for name in scraped(made) if name.startswith("skialith_http_requests_total")]
        routes = {name.partition('route="')[2].partition('"')[0] for name in names}
        assert routes <= {"/agents/{agent_id}/state", "none", "/ready", "/health", "/metrics"}
        assert len(names) <= 8


def test_workers_count_together_and_those_of_the_dead_stay(tmp_path: Path) -> None:
    with sidecar("--workers", "2", cwd=tmp_path) as made:
        wait_until(lambda: "2 workers" in made.said, 30, "both serve")
        workers = {line["worker"] for line in made.lines if line["event"] == "serving"}
        total = 0
        for n in range(8):
            with httpx.Client(base_url=made.url, trust_env=False) as client:  # each may come to another worker
                total += sum(append_all_kinds(client, f"a{n}").values())

        def settled() -> bool:
            return scraped(made)['skialith_records_total{state="stored"}'] >= total

        wait_until(settled, 30, "all is stored and published")
        _check_sums(made, total, 8)
        os.kill(min(workers), signal.SIGKILL)
        wait_until(lambda: _healthy(made), 30, "another worker answers")
        _check_sums(made, total, 8)
        assert not [
            name for name in scraped(made) if name.startswith("process_")
        ]  # they would be those of any one worker
        folder = made.metrics_folder()
        assert any(folder.glob("*.db"))
    assert not folder.exists()


def _check_sums(made: Sidecar, total: int, rounds: int) -> None:
    for _ in range(6):  # whichever worker answers
        with httpx.Client(base_url=made.url, trust_env=False) as client:
            text = client.get("/metrics").text
        assert f'skialith_records_total{{state="accepted"}} {float(total)}' in text
        assert f'skialith_records_total{{state="durable"}} {float(total)}' in text
        assert f'skialith_records_total{{state="stored"}} {float(total)}' in text
        for kind, count in REQUESTS.items():
            assert f'skialith_append_seconds_count{{kind="{kind}"}} {float(rounds * count)}' in text


def _healthy(made: Sidecar) -> bool:
    try:
        with httpx.Client(base_url=made.url, trust_env=False) as client:
            return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_openmetrics_for_those_who_ask(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path) as made:
        answer = made.client().get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")


# ---- ready


def test_it_is_not_ready_while_the_log_is_away(nats_server: NatsServer, tmp_path: Path) -> None:
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_WAL_BYTES": str(WAL_BYTES)}
    with sidecar(cwd=tmp_path, settings=settings) as made:
        assert wait_ready(made, 200, set())["log"][1].endswith("used")
        for away, back in ((nats_server.kill, nats_server.start), (nats_server.pause, nats_server.resume)):
            away()
            checks = wait_ready(made, 503, {"log", "lag"})
            assert "does not answer" in checks["log"][1]
            assert made.client().get("/health").status_code == 200
            now = scraped(made)
            assert now["skialith_log_up"] == 0
            assert "skialith_wal_bytes" not in now
            back()
            wait_ready(made, 200, set())
        assert scraped(made)["skialith_log_up"] == 1


def test_probes_are_answered_from_what_was_just_asked(nats_server: NatsServer, tmp_path: Path) -> None:
    settings = {"SKIALITH_NATS_URL": nats_server.url, "SKIALITH_WAL_BYTES": str(WAL_BYTES)}
    limits = {"STATUS_FRESH_SECONDS": 3600.0}
    with sidecar(cwd=tmp_path, settings=settings, limits=limits) as made:
        nats_server.kill()
        assert [ready(made)[1]["log"][0] for _ in range(20)] == [True] * 20
        nats_server.start()


def test_it_is_not_ready_while_the_database_is_away(
    mariadb_server: MariaDB, mariadb_url: str, nats_server: NatsServer, proxy: MakeProxy, tmp_path: Path
) -> None:
    between = proxy(mariadb_server.port)
    settings = {
        "SKIALITH_NATS_URL": nats_server.url,
        "SKIALITH_WAL_BYTES": str(WAL_BYTES),
        "SKIALITH_DATABASE_URL": mariadb_url.replace(f":{mariadb_server.port}/", f":{between.port}/"),
    }
    with sidecar(cwd=tmp_path, settings=settings) as made:
        append(made, "before", 3)
        wait_ready(made, 200, set())
        between.refuse()
        between.cut()
        append(made, "away", 3)
        checks = wait_ready(made, 503, {"writer"})
        assert "the database is away" in checks["writer"][1]
        assert mariadb_server.password not in str(checks)
        now = scraped(made)
        assert now["skialith_database_up"] == 0
        assert now["skialith_log_up"] == 1
        between.refuse(False)
        wait_ready(made, 200, set())
        wait_until(lambda: scraped(made)['skialith_records_total{state="stored"}'] == 6, 30, "all is stored")
        assert scraped(made)['skialith_retries_total{consumer="writer"}'] >= 1


def test_dead_letters_are_counted_where_they_are(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path) as made:
        append(made, "fine", 1)
        for table, refused in (
            ("agent_events", "NEW.event_id LIKE 'poison%'"),
            ("dead_letters", "NEW.record_id = 'poison-1'"),
        ):
            with closing(sqlite3.connect(tmp_path / ".skialith" / "skialith.db")) as database, database:
                when = f"WHEN {refused} BEGIN SELECT RAISE(ABORT, 'refused'); END"
                database.execute(f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} {when}")
        append(made, "poison", 3)

        def counted() -> bool:
            now = scraped(made)
            return (now['skialith_dead_letters{kept_in="table"}'], now['skialith_dead_letters{kept_in="stream"}']) == (
                2,
                1,
            )

        wait_until(counted, 30, "two are in the table and one in the stream")
        wait_until(lambda: scraped(made)['skialith_records_total{state="released"}'] == 4, 30, "all are released")
        assert scraped(made)['skialith_records_total{state="stored"}'] == 1


def test_it_is_not_ready_while_too_much_waits(tmp_path: Path) -> None:
    options = ("--lag-records", "10", "--lag-seconds", "3600")
    with sidecar(*options, cwd=tmp_path, settings={"SKIALITH_NAMESPACE": "lagging"}) as made:
        append(made, "warm-up", 1)
        wait_until(lambda: scraped(made)['skialith_records_total{state="released"}'] == 1, 30, "nothing waits")
        with locked(tmp_path / ".skialith" / "skialith.db"):
            append(made, "many", 20)
            checks = wait_ready(made, 503, {"lag"})
            assert "writer: 20 records wait" in checks["lag"][1] and "limits: 10 records" in checks["lag"][1]
        wait_ready(made, 200, set())


def append(made: Sidecar, name: str, count: int) -> None:
    events: list[dict[str, Any]] = [{"event_id": f"{name}-{n}", "payload": n} for n in range(count)]
    made.client().post("/agents/a/events/batch", json={"events": events}).raise_for_status()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Nobody else writes to the database meanwhile."""
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")
