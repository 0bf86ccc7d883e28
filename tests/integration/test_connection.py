"""The connection against real servers and a proxy: resets, silence, smaller servers, TLS, credentials, closing."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skialith.errors import Closed, ConfigurationError, FlushTimeout, WalUnavailable
from skialith.records import NOWHERE
from skialith.wal import tcp
from skialith.wal.client import Wal
from skialith.wal.stream import WRITER
from skialith.wal.tcp import close_client
from tests.fixtures.nats import NatsServer, free_port, wait_until
from tests.fixtures.proxy import Proxy
from tests.fixtures.wal import OpenWal, append, checkpoint, event, new_namespace, soon

MIB = 1024 * 1024


def via(proxy: Proxy) -> str:
    return f"nats://127.0.0.1:{proxy.port}"


def test_connections_that_are_reset_under_load_fail_no_append(nats_server: NatsServer, open_wal: OpenWal) -> None:
    failures: list[BaseException] = []
    done = threading.Event()
    with Proxy("127.0.0.1", nats_server.port) as proxy:
        wal = open_wal(via(proxy))

        def work(agent_id: str) -> None:
            number = 0
            while not done.is_set():
                number += 1
                try:
                    append(wal, event(wal, agent_id, str(number)))
                except WalUnavailable as error:
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(f"a{n}",)) for n in range(16)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            wait_until(lambda: wal.connection.is_open, 10, "a connection")
            append(wal, event(wal, "b", os.urandom(8).hex()))
            proxy.cut(reset=True)
        done.set()
        for thread in threads:
            thread.join(30)
    assert failures == []


def test_a_short_deadline_does_not_end_the_connection(nats_server: NatsServer, open_wal: OpenWal) -> None:
    with Proxy("127.0.0.1", nats_server.port) as proxy:
        wal = open_wal(via(proxy))
        append(wal, event(wal, "a", "e"))
        epoch = wal.connection.epoch
        proxy.delay(0.1)
        with pytest.raises(FlushTimeout):
            wal.flush(0.01)
        append(wal, event(wal, "a", "f"))
        assert wal.connection.epoch == epoch


def test_a_silent_peer_with_a_full_socket_is_left_and_found_again(nats_server: NatsServer, open_wal: OpenWal) -> None:
    with Proxy("127.0.0.1", nats_server.port) as proxy:
        wal = open_wal(via(proxy))
        append(wal, event(wal, "a", "e"))
        proxy.stall()
        with pytest.raises(WalUnavailable) as caught:
            append(wal, event(wal, "a", "large", os.urandom(40 * MIB)), seconds=5.0)
        assert caught.value.outcome == "unknown"
        wait_until(lambda: proxy.accepted > 1, 10, "a new connection tried")
        proxy.stall(False)
        append(wal, event(wal, "a", "f"), seconds=20)


def test_a_close_inside_nats_py_that_is_cancelled_does_not_end_reconnecting(
    nats_server: NatsServer, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = open_wal(nats_server.url)
    client = wal.connection._client

    async def cancelled() -> None:
        client._status = client.CLOSED
        raise asyncio.CancelledError

    async def lose() -> None:
        client._reading_task.cancel()
        client._status = client.CLOSED
        client._transport.close()

    monkeypatch.setattr(client, "close", cancelled)
    wal.call(lose, 5.0)
    append(wal, event(wal, "a", "e"), seconds=20)


def test_a_smaller_server_refuses_one_record_and_no_other(nats_server: NatsServer, open_wal: OpenWal) -> None:
    nats_server.config = "max_payload: 8MB"
    nats_server.restart()
    wal = open_wal(nats_server.url)
    append(wal, event(wal, "a", "large", os.urandom(6 * MIB)))
    nats_server.kill()
    wait_until(lambda: not wal.connection.is_open, 10, "the loss of the connection noticed")
    record = event(wal, "a", "later", os.urandom(3 * MIB))
    ticket = wal.append("a", [record], soon())
    nats_server.config = ""
    nats_server.start()
    epoch = wal.connection.epoch
    append(wal, event(wal, "b", "small"))
    with pytest.raises(WalUnavailable, match="max_payload") as caught:
        wal.wait(ticket)
    assert caught.value.outcome == "not_written"
    assert caught.value.retryable
    append(wal, record)
    assert wal.connection.epoch <= epoch + 1
    source = wal.source(WRITER)
    found: list[int] = []

    def pulled() -> bool:
        messages = source.pull(512, 4 * MIB, 0.02, 0.5)
        found.extend(len(message.data) for message in messages)
        return len(found) == 3

    wait_until(pulled, 10, "the message that is larger than this server takes")
    assert found[0] > 6 * MIB


@pytest.mark.parametrize("size", [4096, 8192])
def test_a_server_that_takes_too_little_is_refused(nats_server: NatsServer, open_wal: OpenWal, size: int) -> None:
    nats_server.config = f"max_payload: {size}"
    nats_server.restart()
    with pytest.raises(ConfigurationError, match="max_payload"):
        open_wal(nats_server.url)


def _listen(answer: Callable[[socket.socket], None]) -> int:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def test_no_password_is_sent_to_a_server_without_tls(open_wal: OpenWal) -> None:
    received: list[bytes] = []

    def greet(connection: socket.socket) -> None:
        connection.sendall(b'INFO {"server_id":"X","version":"2.12.0","headers":true,"max_payload":1048576}\r\n')
        received.append(connection.recv(4096))

    port = _listen(greet)
    with pytest.raises(ConfigurationError, match="offers no TLS") as caught:
        open_wal(f"tls://someone:secret@127.0.0.1:{port}", seconds=5.0)
    wait_until(lambda: bool(received), 5, "the end of the connection")
    assert received == [b""]
    assert "secret" not in str(caught.value)


def test_a_silent_server_leaves_time_to_try_the_other(nats_url: str, open_wal: OpenWal) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        for _ in range(4):  # nats-py tries them in random order
            open_wal(f"nats://127.0.0.1:{silent.getsockname()[1]},{nats_url}", namespace=new_namespace())


def test_a_credentials_file_without_credentials_is_named(nats_url: str, open_wal: OpenWal, tmp_path: Path) -> None:
    path = tmp_path / "user.creds"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        open_wal(nats_url, nats_creds=str(path))
    path.write_text("nothing\n")
    with pytest.raises(ConfigurationError, match="no credentials file"):
        open_wal(nats_url, nats_creds=str(path))


def test_a_call_that_is_under_way_when_the_log_closes_says_so(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    nats_server.kill()
    wait_until(lambda: not wal.connection.is_open, 10, "the loss of the connection noticed")
    errors: list[BaseException] = []

    def read() -> None:
        try:
            wal.end(soon(20.0))
        except Closed as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    wal.close()
    thread.join(10)
    assert len(errors) == 1
    assert time.monotonic() - began < 5.0
    with pytest.raises(Closed):
        append(wal, event(wal, "a", "e"))


def test_a_client_whose_reconnecting_was_not_cancelled_connects_no_more(
    nats_server: NatsServer, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the wire away from the client that followed it."""
    wal = open_wal(nats_server.url)
    first: Any = wal.connection._client
    lost: list[BaseException] = []

    async def deaf(awaitable: Any, timeout: float) -> Any:
        """As before Python 3.12 when what is waited for is done just as the wait is cancelled."""
        try:
            return await original(awaitable, timeout)
        except asyncio.CancelledError as error:
            lost.append(error)
            raise ConnectionRefusedError from None

    async def hang(*_: object) -> socket.socket:
        await asyncio.sleep(60)
        raise AssertionError

    original, connected = asyncio.wait_for, tcp._connected
    monkeypatch.setattr(asyncio, "wait_for", deaf)
    monkeypatch.setattr(tcp, "_connected", hang)
    nats_server.kill()
    wait_until(lambda: first.is_reconnecting, 10, "it reconnects")
    time.sleep(0.2)
    wal.call(lambda: close_client(first, wal.connection._socket), 10.0)
    assert lost
    monkeypatch.setattr(tcp, "_connected", connected)
    nats_server.start()
    append(wal, event(wal, "a", "e"), seconds=20)
    wait_until(first._reconnection_task.done, 10, "nothing connects any more")
    assert wal.connection._client is not first
    assert not first.stats["reconnects"]
    append(wal, event(wal, "a", "f"))


def test_replicas_give_back_the_newest_checkpoint_and_every_event(tmp_path: Path, open_wal: OpenWal) -> None:
    routes = [free_port() for _ in range(3)]
    peers = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    servers = [
        NatsServer(tmp_path / f"n{n}", config=f'cluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{peers}] }}')
        for n, port in enumerate(routes)
    ]
    try:
        for server in servers:
            server.start()
        opened: list[Wal] = []

        def elected() -> bool:
            try:
                opened.append(open_wal(servers[0].url, replicas=3))
            except (WalUnavailable, ConfigurationError):
                return False
            return True

        wait_until(elected, 60, "a cluster with a leader")
        wal = opened[0]
        readers = [open_wal(server.url, replicas=3) for server in servers]
        cursor = newest = NOWHERE
        for step in range(1, 151):
            append(wal, checkpoint(wal, "a", step))
            append(wal, event(wal, "a", f"e{step}"))
            for reader in readers:
                found = reader.last_checkpoint("a", soon())
                assert found is not None
                assert found.step_index == step
                page, _ = reader.events("a", cursor, soon())
                assert [record.record_id for record in page] == [f"e{step}"]
                newest = page[-1].position
            cursor = newest
    finally:
        for server in servers:
            server.kill()
