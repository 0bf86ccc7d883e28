"""The proxy that knows a server's frames, against a server that says what the test wants."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ..fixtures.nats import wait_until
from ..fixtures.nats_proxy import NatsProxy

INFO = b'INFO {"server_id":"S","max_payload":1048576}\r\n'
ACKS = [b'MSG _INBOX.a.%d 1 30\r\n{"stream":"S","seq":%d,"a":"%d"}\r\n' % (n, n, n) for n in range(1, 6)]
API = b'MSG _INBOX.a.9 1 16\r\n{"type":"x.y.z"}\r\n'
RECORD = b"HMSG log.a 2 $JS.ACK.x 12 24\r\nNATS/1.0\r\n\r\nPING\r\nabc\r\n\x00\r\n"
SECONDS = 10.0


class Speaker:
    """A server of one connection that says what it is told to."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def accept(self) -> socket.socket:
        self._listener.settimeout(SECONDS)
        connection, _ = self._listener.accept()
        return connection

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def speaker() -> Iterator[Speaker]:
    each = Speaker()
    yield each
    each.close()


@pytest.fixture
def through(speaker: Speaker) -> Iterator[NatsProxy]:
    with NatsProxy("127.0.0.1", speaker.port, 1) as each:
        yield each


@pytest.fixture
def ends(speaker: Speaker, through: NatsProxy) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(server, client) of one connection on which the greeting is over."""
    with socket.create_connection(("127.0.0.1", through.port), SECONDS) as client, speaker.accept() as server:
        server.sendall(INFO + b"PONG\r\n")
        assert read(client, len(INFO) + 6) == INFO + b"PONG\r\n"
        yield server, client


def read(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := client.recv(count - len(data))):
        data += piece
    return data


def read_line(client: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\r\n"):
        line += read(client, 1)
    return line


def test_whole_frames_pass_in_any_pieces(through: NatsProxy, ends: tuple[socket.socket, socket.socket]) -> None:
    server, client = ends
    said = b"".join([*ACKS, RECORD, b"+OK\r\n", API, b"PING\r\n"])
    for at in range(len(said)):
        server.sendall(said[at : at + 1])
    assert read(client, len(said)) == said
    through.dribble(3)
    server.sendall(said)
    assert read(client, len(said)) == said


@pytest.mark.parametrize("at", [0, 1, 17, len(ACKS[0]) - 1])
def test_it_cuts_inside_the_next_frame_of_a_kind(
    through: NatsProxy, ends: tuple[socket.socket, socket.socket], at: int
) -> None:
    server, client = ends
    through.cut_inside("PUBACK", at)
    server.sendall(API + RECORD + ACKS[0] + ACKS[1])
    expected = API + RECORD + ACKS[0][:at]
    assert read(client, len(expected)) == expected
    assert client.recv(1) == b""
    assert through.cuts == 1


def test_it_holds_pubacks_and_nothing_else(through: NatsProxy, ends: tuple[socket.socket, socket.socket]) -> None:
    server, client = ends
    through.hold()
    server.sendall(b"".join(ACKS[:2]) + API + RECORD + ACKS[2])
    assert read(client, len(API + RECORD)) == API + RECORD
    wait_until(lambda: through.held == 3, SECONDS, "three held")
    assert through.release(on=True) == 3
    assert read(client, 3 * len(ACKS[0])) == b"".join(ACKS[:3])
    server.sendall(b"".join(ACKS))
    wait_until(lambda: through.held == 5, SECONDS, "five held")
    through.release(shuffled=True)
    mixed = read(client, 5 * len(ACKS[0]))
    assert mixed != b"".join(ACKS)
    assert sorted(mixed.split(b"MSG ")) == sorted(b"".join(ACKS).split(b"MSG "))


def test_it_swaps_repeats_and_spoils_pubacks(through: NatsProxy, ends: tuple[socket.socket, socket.socket]) -> None:
    server, client = ends
    through.hold()
    server.sendall(ACKS[0] + ACKS[1])
    wait_until(lambda: through.held == 2, SECONDS, "two held")
    through.release(swapped=True)
    swapped = ACKS[0].split(b"\r\n")[0] + b"\r\n" + ACKS[1].split(b"\r\n")[1] + b"\r\n"
    assert read(client, 2 * len(ACKS[0])).startswith(swapped)
    through.twice(1.0)
    server.sendall(ACKS[2])
    assert read(client, 2 * len(ACKS[2])) == 2 * ACKS[2]
    through.twice(0.0)
    through.spoil(1)
    server.sendall(ACKS[3] + b"PING\r\n")
    wait_until(lambda: through.spoilt == 1, SECONDS, "one spoilt")
    words = read_line(client).split()
    assert words[:3] == ACKS[3].split()[:3]
    size = int(words[3])
    assert read(client, size + 8)[size:] == b"\r\nPING\r\n"


def test_it_speaks_between_two_frames_only(through: NatsProxy, ends: tuple[socket.socket, socket.socket]) -> None:
    server, client = ends
    server.sendall(RECORD[:20])
    assert through.say(b"+OK\r\n") == 1
    server.sendall(RECORD[20:])
    assert read(client, 5 + len(RECORD)) == b"+OK\r\n" + RECORD
    assert through.say_info(ldm=True) == 1
    assert b'"ldm": true' in read_line(client)
