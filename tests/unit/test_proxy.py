"""The proxy that tests cut connections with, against an echo server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from random import Random

import pytest

from ..fixtures.proxy import HELD_BYTES, Proxy
from ..fixtures.proxy_plugin import MakeProxy, proxy

__all__ = ["proxy"]

SECONDS = 20.0


class Echo:
    """Sends back what it gets, on every connection, and closes when the other side does."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received += len(data)
                    connection.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


def connect(through: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", through.port), SECONDS)


def read(connection: socket.socket, count: int) -> bytes:
    """``count`` bytes, or fewer if the connection ends before."""
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def test_bytes_pass_in_both_directions_and_so_does_the_end(echo: Echo, proxy: MakeProxy) -> None:
    through = proxy(echo.port)
    data = Random(1).randbytes(3_000_000)
    with connect(through) as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert read(client, len(data)) == data
        assert client.recv(1) == b""
        sender.join(SECONDS)
    assert through.forwarded("up") == through.forwarded("down") == len(data)
    assert through.accepted == 1


def test_cut_drops_every_connection_and_new_ones_work(echo: Echo, proxy: MakeProxy) -> None:
    through = proxy(echo.port)
    clients = [connect(through) for _ in range(3)]
    for client in clients:
        client.sendall(b"x")
        assert read(client, 1) == b"x"
    assert through.connections == 3
    assert through.cut() == 3
    assert through.connections == 0
    assert [client.recv(1) for client in clients] == [b"", b"", b""]
    with connect(through) as client:
        client.sendall(b"again")
        assert read(client, 5) == b"again"


def test_cut_with_reset_is_seen_as_a_reset(echo: Echo, proxy: MakeProxy) -> None:
    through = proxy(echo.port)
    with connect(through) as client:
        client.sendall(b"x")
        assert read(client, 1) == b"x"
        through.cut(reset=True)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_refuse_keeps_open_connections_and_the_port(echo: Echo, proxy: MakeProxy) -> None:
    through = proxy(echo.port)
    port = through.port
    with connect(through) as client:
        client.sendall(b"x")
        assert read(client, 1) == b"x"
        through.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(through)
        client.sendall(b"y")
        assert read(client, 1) == b"y"
    through.refuse(False)
    assert through.port == port
    with connect(through) as client:
        client.sendall(b"z")
        assert read(client, 1) == b"z"


def test_a_stalled_direction_holds_bytes_and_sends_them_later(echo: Echo, proxy: MakeProxy) -> None:
    through = proxy(echo.port)
    with connect(through) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        through.stall(direction="down")
        client.sendall(b"b")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert echo.received == 2, "the other direction goes on"
        through.stall(False)
        client.settimeout(SECONDS)
        assert read(client, 1) == b"b"
        through.stall()
        client.sendall(b"c")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert echo.received == 2
        assert through.connections == 1


def test_a_stall_is_felt_by_who_sends_too_much(echo: Echo, proxy: MakeProxy) -> None:
    through = proxy(echo.port)
    through.stall(direction="up")
    with connect(through) as client:
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sendall(b"x" * (HELD_BYTES + 64 * 1024 * 1024))


def test_a_delay_is_per_direction_and_keeps_what_is_behind_it_pipelined(echo: Echo, proxy: MakeProxy) -> None:
    through = proxy(echo.port)
    with connect(through) as client:
        through.delay(0.05)
        began = time.monotonic()
        client.sendall(b"x")
        assert read(client, 1) == b"x"
        assert time.monotonic() - began >= 0.1
        began = time.monotonic()
        for _ in range(100):
            client.sendall(b"y")
            time.sleep(0.001)
        assert read(client, 100) == b"y" * 100
        assert time.monotonic() - began < 100 * 0.1, "not one round trip each"
        through.delay(0.0)
        through.delay(0.03, "up")
        began = time.monotonic()
        client.sendall(b"x")
        assert read(client, 1) == b"x"
        assert time.monotonic() - began >= 0.03


@pytest.mark.parametrize("count", [0, 1, 9, 100_000])
@pytest.mark.parametrize("reset", [False, True])
def test_cut_after_lets_exactly_so_many_bytes_through_and_then_drops(
    echo: Echo, proxy: MakeProxy, count: int, reset: bool
) -> None:
    through = proxy(echo.port)
    with connect(through) as client:
        client.sendall(b"first")
        assert read(client, 5) == b"first"
        through.cut_after(count, "down", reset=reset)
        sender = threading.Thread(target=send_all, args=(client, b"x" * (count + 10)))
        sender.start()
        got = b""
        try:
            got = read(client, 5 + count + 10)
        except ConnectionResetError:
            assert reset or count > 0
        sender.join(SECONDS)
        assert through.forwarded("down") == 5 + count
        if not reset and count < 1000:
            assert got == b"x" * count
    with connect(through) as client:
        client.sendall(b"only once")
        assert read(client, 9) == b"only once"


def send_all(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        return  # The proxy cut it, as the test wants.


def test_a_target_that_is_down_closes_the_connection(proxy: MakeProxy) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        through = proxy(unused.getsockname()[1])
        with connect(through) as client:
            assert client.recv(1) == b""


def test_stop_and_start_keep_the_port(echo: Echo) -> None:
    through = Proxy("127.0.0.1", echo.port)
    through.stop()
    with through:
        port = through.port
        with connect(through) as client:
            client.sendall(b"x")
            assert read(client, 1) == b"x"
    through.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(through)
    with through:
        assert through.port == port
        with connect(through) as client:
            client.sendall(b"x")
            assert read(client, 1) == b"x"
