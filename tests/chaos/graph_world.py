"""Threads of graphs under chaos: whoever drives them, what they saw, the log as a mirror kept it, and the checker of it all."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import nats
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from skialith import graphs, payloads
from skialith.errors import ChannelValueMissing
from skialith.graph_past import Filled
from skialith.graphs import Delete, Drop, Operation, Put, split_refs
from skialith.langchain import SkialithCheckpointer
from skialith.langchain_codec import Codec
from skialith.records import Kind, Position, Record, decode_record
from skialith.wal.api import time_ns

from ..fixtures.graph_model import Model
from ..fixtures.graphs import at, id_of, put

THREADS = ("t0", "t1", "t2", "copied")
RUNS = ("run-0", "run-1", "run-2")
_CODEC = Codec(JsonPlusSerializer())


# ---- the log, kept by a mirror that nobody trims


async def _api(url: str, subject: str, query: dict[str, Any]) -> dict[str, Any]:
    client = await nats.connect(url, connect_timeout=5, allow_reconnect=False)
    try:
        answer = await client.request(f"$JS.API.{subject}", json.dumps(query).encode(), timeout=10)
        found: dict[str, Any] = json.loads(answer.data)
        return found
    finally:
        await client.close()


def mirror(url: str, namespace: str) -> None:
    """From now on the server keeps a copy of every message of the namespace's log."""
    settings: dict[str, Any] = {
        "name": f"MIRROR_{namespace}",
        "mirror": {"name": f"SKIALITH_{namespace}"},
        "storage": "file",
    }
    settings |= {"retention": "limits", "allow_msg_ttl": True, "allow_direct": True}
    made = asyncio.run(_api(url, f"STREAM.CREATE.MIRROR_{namespace}", settings))
    assert "error" not in made, made


def mirrored(url: str, namespace: str, up_to: int) -> list[tuple[Record, Operation]]:
    """All operations on threads that were ever in the log, in its order."""
    return asyncio.run(_mirrored(url, namespace, up_to))


async def _mirrored(url: str, namespace: str, up_to: int) -> list[tuple[Record, Operation]]:
    client = await nats.connect(url, connect_timeout=5, allow_reconnect=False)
    name = f"MIRROR_{namespace}"
    bodies: dict[int, bytes] = {}
    records: list[Record] = []
    try:
        deadline = time.monotonic() + 20
        while True:
            info = json.loads((await client.request(f"$JS.API.STREAM.INFO.{name}", timeout=10)).data)
            if info["state"]["last_seq"] >= up_to:
                break
            assert time.monotonic() < deadline, f"the mirror stands at {info['state']['last_seq']}, not at {up_to}"
            await asyncio.sleep(0.02)
        seq = 1
        while True:
            query = json.dumps({"seq": seq, "next_by_subj": ">"}).encode()
            answer = json.loads((await client.request(f"$JS.API.STREAM.MSG.GET.{name}", query, timeout=10)).data)
            if "error" in answer:
                break
            message = answer["message"]
            seq, data = message["seq"] + 1, base64.b64decode(message.get("data", ""))
            if message["subject"].startswith(f"skialith.{namespace}.log.graph."):
                records.append(decode_record(namespace, data, Position(time_ns(message["time"]), message["seq"])))
            elif message["subject"].startswith(f"skialith.{namespace}.chunk."):
                bodies[message["seq"]] = data
    finally:
        await client.close()
    found = []
    for record in sorted(records, key=lambda each: each.position):
        body = record.body
        if record.manifest is not None:
            body = b"".join(bodies[record.position.seq + 1 + n] for n in range(record.manifest.chunks))
            assert len(body) == record.manifest.size
        assert record.kind == Kind.GRAPH
        found.append((record, graphs.decode(payloads.uncompressed(record.codec, body or b""))))
    return found


# ---- whoever drives them


class Seen(NamedTuple):
    """What a reader was told. ``first``, ``last``: where the log ended before and after the call."""

    first: int
    last: int
    thread: str
    ns: str | None
    found: list[CheckpointTuple] | ChannelValueMissing
    latest: bool


@dataclass
class Driver:
    """One user of checkpoints: puts, writes, deletes, prunes and looks at random."""

    saver: SkialithCheckpointer
    dice: random.Random
    name: str
    count: int
    put_ids: list[str] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    failed: BaseException | None = None

    def __post_init__(self) -> None:
        self._heads: dict[tuple[str, str], tuple[Any, dict[str, Any], dict[str, Any]]] = {}
        self.thread = threading.Thread(target=self._main, name=f"driver-{self.name}")
        self.thread.start()

    def _main(self) -> None:
        try:
            for n in range(self.count):
                self._once(n)
                time.sleep(self.dice.uniform(0, 0.03))
        except BaseException as error:  # noqa: BLE001 - raised by join
            self.failed = error

    def join(self) -> None:
        self.thread.join(90)
        assert not self.thread.is_alive(), f"driver {self.name} does not end"
        if self.failed is not None:
            raise self.failed

    def _once(self, n: int) -> None:
        dice, thread, ns = self.dice, self.dice.choice(THREADS[:3]), self.dice.choice(["", "sub"])
        kinds = {"put": 40, "writes": 20, "look": 25, "delete": 2, "prune": 5, "runs": 2, "copy": 1}
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        if kind == "put":
            self._put(thread, ns, n)
        elif kind == "writes" and (thread, ns) in self._heads:
            task = f"{self.name}.{n}"
            self.saver.put_writes(self._heads[thread, ns][0], [("a", task), ("b", n)][: dice.randrange(1, 3)], task)
        elif kind == "look":
            self.look(dice.choice(THREADS), dice.choice(["", "sub"]), latest=dice.random() < 0.6)
        elif kind == "delete":
            self.saver.delete_thread(thread)
        elif kind == "prune":
            self.saver.prune([thread])
        elif kind == "runs":
            self.saver.delete_for_runs([dice.choice(RUNS)])
        elif kind == "copy":
            with contextlib.suppress(ChannelValueMissing):  # pruned while it was copied
                self.saver.copy_thread(thread, "copied")

    def _put(self, thread: str, ns: str, n: int) -> None:
        parent, versions, values = self._heads.get((thread, ns), (at(thread, ns), {}, {}))
        new = {"a": f"{n:08}.{self.name}"}
        values = {**values, "a": f"{self.name}.{n}"}
        if "b" not in versions or self.dice.random() < 0.4:
            new["b"] = f"{n:08}.{self.name}"
            size = 1_200_000 if self.dice.random() < 0.03 else 10
            values["b"] = self.dice.randbytes(size)
        versions = {**versions, **new}
        run = {"run_id": self.dice.choice(RUNS)} if self.dice.random() < 0.3 else {}
        made = put(self.saver, parent, values, versions=versions, new=new, **run)
        self.put_ids.append(id_of(made))
        self._heads[thread, ns] = made, versions, values

    def look(self, thread: str, ns: str, *, latest: bool) -> None:
        first = self._end()
        found: list[CheckpointTuple] | ChannelValueMissing
        try:
            if latest:
                one = self.saver.get_tuple(at(thread, ns))
                found = [] if one is None else [one]
            else:
                found = list(self.saver.list({"configurable": {"thread_id": thread}}))
        except ChannelValueMissing as error:
            found = error
        self.seen.append(Seen(first, self._end(), thread, ns if latest else None, found, latest))

    def _end(self) -> int:
        return self.saver._door.open().wal.end(time.monotonic() + 10).seq


# ---- the checker


@dataclass
class Moment:
    """A thread behind one of its operations. Whole checkpoints by (namespace, id); ``torn``: those whose values are gone."""

    seq: int
    change: Operation
    whole: dict[tuple[str, str], CheckpointTuple]
    torn: set[tuple[str, str]]


def moments(operations: list[tuple[Record, Operation]]) -> tuple[Model, dict[str, list[Moment]]]:
    """The model behind the last operation, and all moments of each thread."""
    model, found = Model(), defaultdict[str, list[Moment]](list)
    for record, change in operations:
        model.apply(record.key, change)
        whole: dict[tuple[str, str], CheckpointTuple] = {}
        torn = set()
        for (thread, ns, checkpoint_id), made in model.cells.items():
            if thread == change.thread_id:
                refs = split_refs(made.refs)
                values = {ref: model.blobs[thread, ns, ref] for ref in refs if (thread, ns, ref) in model.blobs}
                if len(values) < len(refs):
                    torn.add((ns, checkpoint_id))
                    continue
                pending = [each for each in model.writes.values() if each[:3] == (thread, ns, checkpoint_id)]
                whole[ns, checkpoint_id] = _tuple(made, values, tuple(pending))
        found[change.thread_id].append(Moment(record.position.seq, change, whole, torn))
    return model, found


def _tuple(made: Put, values: dict[bytes, Any], pending: tuple[Any, ...]) -> CheckpointTuple:
    key = made[:8], tuple(values.items()), tuple((each.task_id, len(each.writes)) for each in pending)
    if key not in _tuples:
        _tuples[key] = _CODEC.checkpoint_tuple(Filled(made, values, list(pending)))
    return _tuples[key]


_tuples: dict[Any, CheckpointTuple] = {}


class Contradictions:
    """Compares what readers were told with what the log's order allows.

    A reader may be told of anything that happened while it asked, or not; but nothing that had ended before, and all that stood
    from before until after.
    """

    def __init__(self, history: dict[str, list[Moment]]) -> None:
        self._history = history

    def of(self, seen: Seen) -> Iterator[str]:
        during = self._during(seen)
        if isinstance(seen.found, ChannelValueMissing):
            changed = any(isinstance(moment.change, (Delete, Drop)) for moment in during[1:])
            if not changed and not any(moment.torn for moment in during):
                yield f"{seen}: no value was missing"
            return
        names = {(_ns(each), _id(each)): each for each in seen.found}
        always = set.intersection(*(set(moment.whole) for moment in during)) if during else set()
        always = {name for name in always if seen.ns in (None, name[0])}
        if seen.latest:
            greatest = max(always, default=("", ""), key=lambda name: name[1])[1]
            if greatest and (not names or next(iter(names))[1] < greatest):
                yield f"{seen.thread} {seen.ns!r} [{seen.first}..{seen.last}]: {greatest} stood and {list(names)} was given"
        else:
            yield from (
                f"{seen.thread} [{seen.first}..{seen.last}]: {name} is missing" for name in always - names.keys()
            )
            ids = [_id(each) for each in seen.found]
            if ids != sorted(ids, reverse=True):
                yield f"{seen.thread}: the list is not in order"
        for name, found in names.items():
            told = [moment.whole[name] for moment in during if name in moment.whole]
            where = f"{seen.thread} {name} [{seen.first}..{seen.last}]"
            if not told:
                yield f"{where}: had ended before, or never was: {self._life(seen.thread, name)}"
                continue
            yield from (f"{where}: {text}" for text in _compare(found, told, len(told) == len(during)))

    def _life(self, thread: str, name: tuple[str, str]) -> list[str]:
        """What became of a checkpoint, for people."""
        lines, before = [], ""
        for moment in self._history.get(thread, []):
            now = "whole" if name in moment.whole else "torn" if name in moment.torn else "not there"
            if now != before:
                lines.append(f"{now} from {moment.seq} by {moment.change!r:.200}")
            before = now
        return lines

    def _during(self, seen: Seen) -> list[Moment]:
        """The state before the call (an empty one if there is none) and those that came up to its end."""
        moments = self._history.get(seen.thread, [])
        before = [moment for moment in moments if moment.seq <= seen.first][-1:]
        start = before or [Moment(0, Delete(seen.thread), {}, set())]
        return [*start, *(moment for moment in moments if seen.first < moment.seq <= seen.last)]


def _compare(found: CheckpointTuple, told: list[CheckpointTuple], throughout: bool) -> Iterator[str]:
    if not any(
        (found.checkpoint, found.metadata, found.parent_config) == (each.checkpoint, each.metadata, each.parent_config)
        for each in told
    ):
        yield f"its contents are {found.checkpoint!r:.300}"
    mine = set(map(_text, found.pending_writes or []))
    possible = [set(map(_text, each.pending_writes or [])) for each in told]
    if extra := mine - set[str]().union(*possible):
        yield f"writes that had ended: {extra}"
    if throughout and (lacking := set.intersection(*possible) - mine):
        yield f"writes are missing: {lacking}"


def _text(write: Any) -> str:
    return repr(tuple(write))


def _ns(each: CheckpointTuple) -> str:
    return str(each.config["configurable"]["checkpoint_ns"])


def _id(each: CheckpointTuple) -> str:
    return id_of(each.config)
