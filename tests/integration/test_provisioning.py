"""Setting up against real nats-servers: races, wrong settings, and an error that names the fix within the timeout."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skialith.errors import ConfigurationError, SkialithError, WalUnavailable
from skialith.wal.client import Wal
from tests.fixtures.nats import NatsServer, free_port
from tests.fixtures.wal import OpenWal, append, event, new_namespace

_OPEN = """
import sys
from skialith.config import load
from skialith.wal.client import Wal
url, namespace = sys.argv[1:]
wal = Wal(load({}, nats_url=url, namespace=namespace, wal_bytes=64_000_000), lambda: url)
wal.open(15)
print(wal.stream.wal_id)
wal.close()
"""


def test_many_processes_set_up_one_stream(nats_server: NatsServer) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN, nats_server.url, "race"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(6)
    ]
    results = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 6, results
    assert len({out for out, _ in results}) == 1


def api(wal: Wal, name: str, body: dict[str, object] | None = None) -> dict[str, object]:
    return wal.call(lambda: wal.stream.api.call(name, body), 5.0)


def test_a_stream_with_other_settings_is_refused(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url, namespace="ours")
    info = api(wal, f"STREAM.INFO.{wal.stream.name}")
    settings = info["config"]
    assert isinstance(settings, dict)
    changed = {**settings, "name": "SKIALITH_other", "max_age": 3_600_000_000_000, "first_seq": 1}
    changed["subjects"] = ["skialith.other.log.>", "skialith.other.chunk.>", "skialith.other.lease.>"]
    api(wal, "STREAM.CREATE.SKIALITH_other", changed)
    with pytest.raises(ConfigurationError, match=r"max_age.*must be 0"):
        open_wal(nats_server.url, namespace="other")


def test_a_consumer_with_other_settings_is_refused(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url, namespace="ours")
    name = wal.stream.name
    api(wal, f"CONSUMER.DELETE.{name}.writer")
    consumer = {"durable_name": "writer", "ack_policy": "none", "filter_subject": "skialith.ours.log.>"}
    api(wal, f"CONSUMER.DURABLE.CREATE.{name}.writer", {"stream_name": name, "config": consumer})
    with pytest.raises(ConfigurationError, match="ack_policy"):
        open_wal(nats_server.url, namespace="ours")


def test_jetstream_disabled(tmp_path: Path, open_wal: OpenWal) -> None:
    with NatsServer(tmp_path / "nats", jetstream=False) as server, pytest.raises(ConfigurationError, match="JetStream"):
        open_wal(server.url)


def test_a_stream_larger_than_the_server_allows(tmp_path: Path, open_wal: OpenWal) -> None:
    with (
        NatsServer(tmp_path / "nats", jetstream_config="max_file_store: 64MB") as server,
        pytest.raises(ConfigurationError, match="SKIALITH_WAL_BYTES"),
    ):
        open_wal(server.url, wal_bytes=1_000_000_000)


def test_nobody_at_the_url(open_wal: OpenWal) -> None:
    began = time.monotonic()
    with pytest.raises(WalUnavailable, match="SKIALITH_NATS_URL") as caught:
        open_wal(f"nats://127.0.0.1:{free_port()}", seconds=1.5)
    assert time.monotonic() - began < 5
    assert caught.value.outcome == "not_written"


def test_wrong_credentials_name_the_setting_and_hide_the_password(tmp_path: Path, open_wal: OpenWal) -> None:
    with NatsServer(tmp_path / "nats", user="me", password="right") as server:
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match="refused the credentials") as caught:
            open_wal(server.url.replace("right", "secret-wrong"))
        assert time.monotonic() - began < 5
        assert "secret-wrong" not in str(caught.value)


@pytest.mark.parametrize("password", ["plain", "p@ss:w/rd %#?"])
def test_credentials_in_the_url_are_percent_decoded(tmp_path: Path, open_wal: OpenWal, password: str) -> None:
    from urllib.parse import quote

    with NatsServer(tmp_path / "nats", user="me", password=password) as server:
        wal = open_wal(f"nats://me:{quote(password, safe='')}@127.0.0.1:{server.port}")
        assert append(wal, event(wal, "a", "e"))[0].seq > 0


def test_a_token_in_the_url(tmp_path: Path, open_wal: OpenWal) -> None:
    with NatsServer(tmp_path / "nats", token="s3cret") as server:
        assert append(wal := open_wal(server.url), event(wal, "a", "e"))[0].seq > 0


def test_tls_is_not_silently_left_out(nats_server: NatsServer, open_wal: OpenWal) -> None:
    with pytest.raises(ConfigurationError, match="offers no TLS"):
        open_wal(nats_server.url.replace("nats://", "tls://"))


def test_an_old_server_is_refused_with_the_missing_feature(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    wal.connection._client._server_info["version"] = "2.11.9"
    with pytest.raises(ConfigurationError, match=r"2\.11\.9 is too old.*atomic batch"):
        wal.stream._check_server()


def test_a_missing_permission_is_named(tmp_path: Path, open_wal: OpenWal) -> None:
    permissions = json.dumps({"publish": {"deny": ["$JS.API.STREAM.CREATE.>"]}})
    users = f"authorization {{ users: [ {{ user: me, password: pw, permissions: {permissions} }} ] }}"
    with NatsServer(tmp_path / "nats", config=users) as server, pytest.raises(SkialithError, match=r"STREAM\.CREATE"):
        open_wal(f"nats://me:pw@127.0.0.1:{server.port}", seconds=3.0)


def test_traces_are_a_property_of_the_namespace(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    wal.call(lambda: wal.stream.set_traces(False, time.monotonic() + 5), 5.0)
    assert not open_wal(nats_server.url).stream.traces
    wal.call(lambda: wal.stream.set_traces(True, time.monotonic() + 5), 5.0)
    assert open_wal(nats_server.url).stream.traces


def test_power_runs_only_where_syncing_can_be_seen(tmp_path: Path, open_wal: OpenWal) -> None:
    with NatsServer(tmp_path / "lazy", monitor=True) as server:
        with pytest.raises(ConfigurationError, match="SKIALITH_NATS_MONITOR_URL"):
            open_wal(server.url, durability="power")
        with pytest.raises(ConfigurationError, match="acknowledges before it syncs"):
            open_wal(server.url, durability="power", nats_monitor_url=server.monitor_url)
        lazy = server.monitor_url
        with NatsServer(tmp_path / "eager", monitor=True, jetstream_config="sync_interval: always") as eager:
            with pytest.raises(ConfigurationError, match="another server"):
                open_wal(eager.url, durability="power", nats_monitor_url=lazy)
            wal = open_wal(eager.url, durability="power", nats_monitor_url=eager.monitor_url)
            assert append(wal, event(wal, "a", "e"))[0].seq > 0
