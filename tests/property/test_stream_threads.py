"""The wire under many threads, slow and dying peers, and signals: own answers only, whole frames only, nobody left behind."""

from __future__ import annotations

import asyncio
import os
import random
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import pytest

from skialith.records import Message, Position
from skialith.wal._waiting import Tally
from skialith.wal._wire import Unsettled
from skialith.wal.lane import holding
from tests.fixtures.wires import INBOX, LIMITS, LoopDriven, permitted, record

from . import oracle

LONGER = max(1.0, float(os.environ.get("SKIALITH_CHAOS_ROUNDS", "1")) / 4)
THREADS, EACH = 8, 300
KEY = bytes(16)
SIZES = (8, 200, 20_000, 70_000, 1 << 20)
_QUIET_SECONDS = 0.001
PUBLISH = re.compile(rb"(PUB|HPUB) (\S+) (?:(\S+) )??(?:(\d+) )?(\d+)\r\n")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


class Frames:
    """Splits what a client sends into frames; fails at anything else."""

    def __init__(self, peer: socket.socket, rng: random.Random, piece: int = 1 << 16, pause: float = 0.0) -> None:
        self._peer = peer
        self._rng = rng
        self._piece = piece
        self._pause = pause
        self._data = bytearray()

    def more(self) -> Iterator[tuple[str, str, bytes] | None]:
        """Frames as (subject, reply, data without headers) until the client is gone; None when there is none now."""
        while True:
            if not select.select([self._peer], [], [], _QUIET_SECONDS)[0]:
                yield None
                continue
            piece = self._peer.recv(self._rng.randint(1, self._piece))
            if not piece:
                break
            self._data += piece
            if self._pause:
                time.sleep(self._rng.random() * self._pause)
            yield from self._whole()
        assert not self._data, f"a torn frame at the end: {self._data[:80]!r}"

    def _whole(self) -> Iterator[tuple[str, str, bytes]]:
        while b"\r\n" in self._data:
            if self._data.startswith(b"PING\r\n"):
                del self._data[:6]
                continue
            found = PUBLISH.match(self._data)
            assert found, f"not a frame: {self._data[:80]!r}"
            _, subject, reply, head, total = found.groups()
            end = found.end() + int(total)
            if len(self._data) < end + 2:
                return
            assert self._data[end : end + 2] == b"\r\n", f"torn: {self._data[: found.end()]!r}"
            data = bytes(self._data[found.end() + int(head or 0) : end])
            del found, self._data[: end + 2]
            yield subject.decode(), (reply or b"").decode(), data


def answer(reply: str, data: bytes) -> bytes:
    """A PubAck whose sequence tells which record it is for."""
    body = b'{"stream":"S","seq":%d}' % (oracle.decode_record(data)[4] + 1)
    return b"MSG %s 1 %d\r\n%s\r\n" % (reply.encode(), len(body), body)


class Server(threading.Thread):
    """Answers appends: at once, out of order, late, in pieces; or dies after some."""

    def __init__(self, peer: socket.socket, rng: random.Random, manner: str) -> None:
        super().__init__(daemon=True)
        self.peer = peer
        self.manner = manner
        self.failure: BaseException | None = None
        self._rng = rng
        self._held: list[bytes] = []
        self._left = rng.randint(1, 2000)

    def run(self) -> None:
        try:
            for frame in Frames(self.peer, self._rng).more():
                if frame is not None and frame[1].startswith(INBOX):
                    self._held.append(answer(*frame[1:]))
                if self.manner in ("in order", "in pieces", "dying"):
                    self._send(len(self._held))
                elif frame is None or self._rng.random() < 0.2:
                    self._rng.shuffle(self._held)
                    if self.manner == "late":
                        time.sleep(self._rng.random() * 0.004)
                    self._send(self._rng.randint(0, len(self._held)))
        except OSError:
            pass
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.failure = error

    def _send(self, count: int) -> None:
        data = b"".join(self._held[:count])
        del self._held[:count]
        if self.manner == "dying":
            self._left -= count
            if self._left <= 0:
                self.peer.sendall(data[: self._rng.randint(0, len(data))])
                self.peer.shutdown(socket.SHUT_RDWR)
                return
        step = self._rng.randint(1, 40) if self.manner == "in pieces" else 1 << 16
        for at in range(0, len(data), step):
            self.peer.sendall(data[at : at + step])


def run_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run it in threads and raise the first failure; all must end."""
    failures: list[BaseException] = []
    together = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            together.wait(30)
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("manner", ["in order", "out of order", "late", "in pieces", "dying"])
def test_every_append_ends_with_its_own_answer(manner: str, rng: random.Random) -> None:
    for _ in range(round(LONGER if manner != "dying" else 6 * LONGER)):
        with closing(LoopDriven()) as rig:
            server = Server(rig.peer, random.Random(rng.random()), manner)
            server.start()
            tally = Tally()

            def work(number: int, rig: LoopDriven = rig, tally: Tally = tally) -> None:
                turn = permitted()
                for n in range(number * 1000, number * 1000 + EACH):
                    try:
                        found = rig.wire.append(turn, tally, f"s.{number}", record(n), time.monotonic() + 30)
                    except Unsettled:
                        assert manner == "dying"
                        continue
                    assert found == (n + 1, False) or (found is None and not rig.wire.is_open)

            run_threads(work)
            assert server.failure is None
            assert rig.wire.appending == 0
            assert manner == "dying" or (rig.lost == [] and tally.last_seq == (THREADS - 1) * 1000 + EACH)


def test_a_turn_is_held_by_one_at_a_time_and_reaches_everybody(rng: random.Random) -> None:
    """Threads that append and coroutines that queue up, on one turn."""
    with closing(LoopDriven()) as rig:
        server = Server(rig.peer, random.Random(rng.random()), "in pieces")
        server.start()
        turn, tally = permitted(), Tally()
        inside, held = [0], [0]
        over = threading.Event()

        async def hold() -> None:
            while not over.is_set():
                async with holding(turn):
                    inside[0] += 1
                    assert inside[0] == 1 and turn.taken
                    await asyncio.sleep(0)
                    inside[0] -= 1
                    held[0] += 1
                await asyncio.sleep(rng.random() * 0.001)

        def work(number: int) -> None:
            done = 0
            end = time.monotonic() + 2.0 * LONGER
            while time.monotonic() < end or (not done and time.monotonic() < end + 60):
                found = rig.wire.append(turn, tally, "s", record(number), time.monotonic() + 30)
                assert found in (None, (number + 1, False))
                done += found is not None
            assert done

        holders = [asyncio.run_coroutine_threadsafe(hold(), rig.thread.loop) for _ in range(2)]
        run_threads(work, 4)
        over.set()
        for holder in holders:
            holder.result(10)
        assert held[0] > 10 and not turn.taken


# ---- out


class SlowReader(threading.Thread):
    """Notes the number that every frame begins with, by subject."""

    def __init__(self, peer: socket.socket, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, list[int]] = {}
        self.failure: BaseException | None = None
        self._frames = Frames(peer, rng, 1 << 18, 0.0005)

    def run(self) -> None:
        try:
            for frame in self._frames.more():
                if frame is not None:
                    subject, _, data = frame
                    self.seen.setdefault(subject, []).append(int(data[:8]))
                    assert data[8:] == bytes(len(data) - 8)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.failure = error


FRAMES, TOLD = 36, 50


def send(rig: LoopDriven, rng: random.Random, number: int) -> None:
    """Frames that begin with 0, 1, 2 and so on; acknowledgements in runs of equal ones."""
    for n in range(0, FRAMES, 3):
        bodies = [b"%08d" % (n + i) + bytes(rng.choice(SIZES) - 8) for i in range(3)]
        if number % 3 == 0:
            for body in bodies:
                assert rig.wire.put(b"PUB put.%d %d\r\n%b\r\n" % (number, len(body), body))
        elif number % 3 == 1:
            messages = [(f"window.{number}", KEY, body) for body in bodies]
            assert rig.wire.pipeline(messages, b"", lambda _: None) is not None
        else:
            told = [Message("", b"", Position(0, 0), f"tell.{number}", 1, 1)]
            for body in bodies:
                rig.wire.tell(told * TOLD, body[:8])


def test_a_slow_reader_sees_whole_frames_in_order(rng: random.Random) -> None:
    """Frames of up to 1 MiB from many threads, through a socket that takes a few kilobytes at a time."""
    for _ in range(round(LONGER)):
        with closing(LoopDriven(send_buffer=4096)) as rig:
            reader = SlowReader(rig.peer, random.Random(rng.random()))
            reader.start()
            run_threads(partial(send, rig, rng), 6)
            deadline = time.monotonic() + 60
            while sum(map(len, reader.seen.values())) < 4 * FRAMES + 2 * TOLD * FRAMES and not reader.failure:
                assert time.monotonic() < deadline, "frames are missing"
                time.sleep(0.01)
            rig.wire.detach(1)
            reader.join(30)
            assert reader.failure is None
            for subject, numbers in reader.seen.items():
                repeats = TOLD if subject.startswith("tell") else 1
                assert numbers == [n for n in range(FRAMES) for _ in range(repeats)]


# ---- signals


class Interrupted(BaseException):
    """What the handler raises."""


class Alarm:
    """Raises in the main thread at random moments, once each time it is armed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._armed = False
        self.raised = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            self.raised += 1
            raise Interrupted

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self._handle)
        try:
            yield
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def during(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's result, or Interrupted."""
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._rng.random() * 0.0004 + 1e-6)
            result = call(*arguments)
            self._armed = False
        except Interrupted:
            return Interrupted
        except Unsettled:
            self._armed = False
            return Unsettled
        return result


class Interrupting:
    """What the main thread does while signals come; whatever of it is interrupted, nothing may be left behind."""

    def __init__(self, rig: LoopDriven, rng: random.Random, tally: Tally) -> None:
        self.alarm = Alarm(rng)
        self.taken: list[int] = []
        self.handed_over = 0
        self.promised: set[int] = set()
        self._rig, self._rng, self._tally = rig, rng, tally
        self._turn = permitted()

    def step(self) -> None:
        choices = (self._append, self._append_before_another, self._hand_over, self._find_too_much, self._put)
        self._rng.choice(choices)()
        assert not self._turn.taken

    def _append(self) -> None:
        number = self._rng.randrange(1000)
        arguments = self._turn, self._tally, "s", record(number), time.monotonic() + 30
        assert self.alarm.during(self._rig.wire.append, *arguments) in (Interrupted, None, (number + 1, False))

    def _append_before_another(self) -> None:
        """Somebody queues up behind an append that may be interrupted, and must get the turn."""

        async def hold() -> None:
            async with holding(self._turn):
                pass

        holder = asyncio.run_coroutine_threadsafe(hold(), self._rig.thread.loop)
        self._append()
        holder.result(30)

    def _hand_over(self) -> None:
        self.handed_over += 1
        arguments = self._turn, 1, 1, self.taken.append, self.handed_over
        found = self.alarm.during(self._rig.wire.hand_over, *arguments)
        assert found in (True, Interrupted)
        if found is True:
            self.promised.add(self.handed_over)
        self._leave()

    def _find_too_much(self) -> None:
        wire = self._rig.wire
        assert wire.hand_over(self._turn, LIMITS[2], 1, lambda _: None, None)
        assert self.alarm.during(wire.hand_over, self._turn, 1, 1, lambda _: None, None) in (False, Interrupted)
        self.alarm.during(wire.wait_for_room, 0.0005)
        self._leave()

    def _leave(self) -> None:
        self._rig.on_loop(lambda: self._rig.wire.leave(self._turn, self._rig.wire.queued, 0))

    def _put(self) -> None:
        body = bytes(self._rng.choice([1, 5000, 100_000]))
        self.alarm.during(self._rig.wire.put, b"PUB put %d\r\n%b\r\n" % (len(body), body))


def test_signals_at_every_moment_tear_nothing_and_leave_nobody_waiting(rng: random.Random) -> None:
    with closing(LoopDriven(send_buffer=8192)) as rig:
        server = Server(rig.peer, random.Random(rng.random()), "in pieces")
        server.start()
        tally, over = Tally(), threading.Event()
        failures: list[BaseException] = []

        def beside(number: int) -> None:
            turn = permitted()
            try:
                while not over.is_set():
                    found = rig.wire.append(turn, tally, "s", record(number), time.monotonic() + 30)
                    assert found == (number + 1, False)
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                failures.append(error)

        others = [threading.Thread(target=beside, args=(number,)) for number in range(2)]
        for thread in others:
            thread.start()
        main = Interrupting(rig, rng, tally)
        try:
            with main.alarm.installed():
                end = time.monotonic() + 4.0 * LONGER
                while time.monotonic() < end and not failures:
                    main.step()
        finally:
            over.set()
            for thread in others:
                thread.join(30)
        print(f"{main.alarm.raised} calls were interrupted, {main.handed_over} records handed over")
        assert not failures, failures
        assert server.failure is None
        assert main.alarm.raised > 200
        assert main.taken == sorted(main.taken) and main.promised <= set(main.taken)
        assert len(main.taken) == len(set(main.taken))
        assert rig.wire.append(permitted(), tally, "s", record(1), time.monotonic() + 10) == (2, False)
        assert rig.wire.appending == 0
