"""Continuity: whether the log that a server comes back with is the one of before, and which records of this process it lacks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from ..config import API_TIMEOUT_SECONDS, FLOOR_SECONDS, RETRY_LONGEST_SECONDS
from ..errors import WalError
from .api import ApiError, NoResponders, rfc3339
from .read import Reader
from .stream import WRITER, Stream
from .transport import Connection, Disconnected, NoReply

DOUBT_SECONDS = 10.0
"""How long records of a log with replicas must seem to be gone before they are taken to be; longer than an election takes."""

log = logging.getLogger("skialith.wal")

Run: TypeAlias = tuple[int, int, int]
"""First and last sequence of some records of this process, and how many there are between."""


class Setback(NamedTuple):
    """Records that were acknowledged to this process and are not in the log any more; the writer may have stored some.

    ``runs``: their sequences. ``until_ns``: when the log was lost (server's clock); what is stored at a sequence with a later
    time is another record, which got it again. ``moment``: the same, ``time.monotonic()``.
    """

    runs: tuple[Run, ...]
    until_ns: int
    moment: float


class Continuity:
    """Remembers which sequences this process was acknowledged and compares. Everything runs on the loop."""

    def __init__(self, connection: Connection, stream: Stream, reader: Reader) -> None:
        self._connection = connection
        self._stream = stream
        self._reader = reader
        self._created = stream.created
        self._runs: list[Run] = []
        self._floor_at = time.monotonic()
        self._earlier: list[tuple[list[Run], int, float]] = []
        """What was acknowledged on servers that are gone, and when each was lost, until the log was looked at since."""
        self._news = asyncio.Event()
        self._news_at = 0.0
        self._short_since = 0.0
        self.setbacks: list[Setback] = []
        """What nobody was told yet; whoever tells it takes it out."""

    @property
    def sure(self) -> bool:
        """Whether the log was looked at since the server, or the log, became another one."""
        return not self._news.is_set() and self._stream.created == self._created

    def another_server(self) -> None:
        """To be called before anything is sent to a server that is not the one of before."""
        self._part_with(self._connection.wire.heard_last)

    def _part_with(self, moment: float) -> None:
        """What was acknowledged until then is to be looked for again."""
        runs, self._runs = self._runs, []
        self._earlier.append(([*runs, *self._stream.tally.take()], self._stream.time_at(moment), moment))
        self._news_at = time.monotonic()
        self._news.set()

    async def watch(self) -> None:
        """For ever look at the log when the server has changed, until it has answered."""
        while True:
            await self._news.wait()
            try:
                await self._connection.ready(time.monotonic() + API_TIMEOUT_SECONDS)
                if await self._look():
                    self._news.clear()
                    continue
            except (ApiError, Disconnected, NoReply, NoResponders, WalError) as error:
                log.debug("whether %s is as it was cannot be told yet: %s", self._stream.name, error)
            except Exception:  # a bug must not end the look-out
                log.exception("whether %s is as it was could not be told", self._stream.name)
            await asyncio.sleep(RETRY_LONGEST_SECONDS / 10)

    async def look_again(self) -> None:
        """Now and then: whether the log is still the one of before, and what of it the writer has stored.

        Raises what a request raises.
        """
        if self._news.is_set():
            return
        stream = self._stream
        if self.notice_new_log():
            return
        if stream.shorter:
            self._short_since = self._short_since or time.monotonic()
            if self._is_sure(self._short_since):
                log.warning("%s is shorter than it was; connecting anew", stream.name)
                await self._connection.distrust()
            return
        self._short_since = 0.0
        if time.monotonic() - self._floor_at >= FLOOR_SECONDS:
            await self._forget_stored()

    def _is_sure(self, since: float) -> bool:
        """Of a log with replicas: a follower may answer while there is no leader, and lack what was acknowledged."""
        return self._stream.replicas == 1 or time.monotonic() - since >= DOUBT_SECONDS

    def notice_new_log(self) -> bool:
        """Whether the stream was made anew, as it was seen last, while its server lived on."""
        if self._news.is_set() or self._stream.created == self._created:
            return False
        self._part_with(time.monotonic())
        return True

    async def _forget_stored(self) -> None:
        """What the writer has acknowledged is in the database, whatever becomes of the log."""
        created, server_id = self._stream.created, self._connection.server_id
        info = await self._stream.consumer_info(WRITER)
        if (created, server_id) == (self._created, self._connection.server_id) and not self._news.is_set():
            floor = int(info["ack_floor"]["stream_seq"])
            self._runs = beyond([*self._runs, *self._stream.tally.take()], floor)
            self._floor_at = time.monotonic()

    async def _look(self) -> bool:
        """Compare, once; False if the server changed meanwhile, or if it is too early to say that records are lost."""
        epoch, stream, earlier = self._connection.epoch, self._stream, list(self._earlier)
        info = await stream.info()
        self._runs += stream.tally.take()  # acknowledged since the last change: these are in the log
        newest = max((run[1] for run in self._runs), default=0)
        found: list[tuple[list[Run], list[Run], int, float]] = []
        new_log, last = stream.created != self._created, 0
        if new_log:
            first = int(info["config"].get("first_seq") or 1)
            for runs, lost_ns, moment in earlier:
                found.append(([run for run in runs if run[0] < first], beyond(runs, first - 1), lost_ns, moment))
            last = first - 1
        else:
            later = list(self._runs)
            for runs, lost_ns, moment in reversed(earlier):
                # The last that was there when the server was lost; what stands behind it came after.
                deadline = time.monotonic() + API_TIMEOUT_SECONDS
                last = (
                    await self._reader.goes_on(lost_ns, deadline, min((run[0] for run in later), default=0))
                ).seq - 1
                found.append((beyond(runs, last), up_to(runs, last), lost_ns, moment))
                later += runs
            found.reverse()
        if epoch != self._connection.epoch or len(earlier) != len(self._earlier):
            return False
        if any(each[0] for each in found) and not self._is_sure(self._news_at):
            return False
        self._created, self._earlier = stream.created, []
        stream.tally.set_back(max(last, newest))
        for lost, kept, lost_ns, moment in found:
            self._runs += kept
            if lost:
                self._note(Setback(tuple(lost), lost_ns, moment), new_log=new_log)
        return True

    def _note(self, setback: Setback, *, new_log: bool) -> None:
        self.setbacks.append(setback)
        what = "was made anew" if new_log else "came back without its last records"
        log.error(
            "the log %s %s: %d records that were acknowledged to this process until %s (sequences %s) are not in it. Those that "
            "the writer had stored are in the database; flush() and `skialith doctor` tell the others",
            self._stream.name,
            what,
            sum(run[2] for run in setback.runs),
            rfc3339(setback.until_ns),
            shown(setback.runs),
        )


def beyond(runs: Iterable[Run], seq: int) -> list[Run]:
    """The parts of runs behind a sequence."""
    found = []
    for first, last, count in runs:
        if last > seq:
            start = max(first, seq + 1)
            found.append((start, last, min(count, last - start + 1)))
    return found


def up_to(runs: Iterable[Run], seq: int) -> list[Run]:
    """The parts of runs up to a sequence."""
    return [
        (first, min(last, seq), min(count, min(last, seq) - first + 1)) for first, last, count in runs if first <= seq
    ]


def without(run: Run, seqs: Iterable[int]) -> list[Run]:
    """What is left of a run without some sequences, given in order."""
    first, last, count = run
    if count < last - first + 1:  # which of them it has is not known
        count -= min(count, sum(1 for _ in seqs))
        return [(first, last, count)] if count else []
    left: list[Run] = []
    for seq in seqs:
        if seq > first:
            left.append((first, seq - 1, seq - first))
        first = seq + 1
    return [*left, (first, last, last - first + 1)] if first <= last else left


def shown(runs: Iterable[Run], most: int = 20) -> str:
    """Runs for people: ``5 to 9, 12``."""
    merged: list[list[int]] = []
    for first, last, count in sorted(runs):
        if merged and first <= merged[-1][1] + 1 and count == last - first + 1:
            merged[-1][1] = max(last, merged[-1][1])
        else:
            merged.append([first, last])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in merged[:most]]
    return ", ".join(texts) + (f" and {len(merged) - most} more" if len(merged) > most else "")
