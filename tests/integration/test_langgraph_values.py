"""Ids of any text, values of any size, what is written again and what is not, encryption, clones, forks and threads."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from skialith.errors import Closed, ConfigurationError, InvalidArgument, RecordTooLarge
from skialith.langchain import SkialithCheckpointer
from tests.fixtures.agents import OpenAgent
from tests.fixtures.graphs import OpenSaver, at, checkpoint, id_of, metadata, put, settle
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.stores import noise, outside

from .test_processes import finish, run

TEXTS = [
    "",
    " ",
    "  ",
    "a b",
    ".",
    "a.b",
    "*",
    ">",
    "a.>",
    "\0",
    "a\0b",
    "\x7f\x0b\x0c\r\n",
    "🦜" * 300,
    "x" * 10_000,
    "%s?'\\",
    "a~b",
    "A",
    "a",
]


def values_of(saver: SkialithCheckpointer, config: Any) -> dict[str, Any]:
    found = saver.get_tuple(config)
    assert found is not None
    return found.checkpoint["channel_values"]


@pytest.mark.parametrize("stored", [False, True], ids=["log", "database"])
def test_ids_and_namespaces_of_any_text(
    saver: SkialithCheckpointer, unstored: SkialithCheckpointer, stored: bool
) -> None:
    used = saver if stored else unstored
    made = {}
    for thread, ns in [*((text, "") for text in TEXTS), *(("thread", text) for text in TEXTS[1:])]:
        first = put(used, at(thread, ns), {"who": [thread, ns]})
        used.put_writes(first, [("who", [thread, ns, "pending"])], "task")
        made[thread, ns] = first
    if stored:
        settle(used)
    for (thread, ns), config in made.items():
        for asked in (at(thread, ns), config):
            found = used.get_tuple(asked)
            assert found is not None
            assert found.checkpoint["channel_values"] == {"who": [thread, ns]}
            assert found.pending_writes == [("task", "who", [thread, ns, "pending"])]
            assert found.config["configurable"] == config["configurable"]
        assert len(list(used.list(at(thread, ns)))) == 1
    used.delete_thread("*")
    assert used.get_tuple(at("*")) is None
    assert len(list(used.list(None))) == len(made) - 1
    assert put(used, at(7), {"n": 1})["configurable"]["thread_id"] == "7"
    assert values_of(used, at("7")) == values_of(used, at(7)) == {"n": 1}


def test_what_is_no_unicode_text_is_refused_and_nothing_is_sent(unstored: SkialithCheckpointer) -> None:
    before = unstored._door.open().wal.status(5).messages
    for config in (at("\ud800"), at("t", "\udfff")):
        with pytest.raises(InvalidArgument, match="lone surrogate"):
            put(unstored, config, {"a": 1})
        with pytest.raises(InvalidArgument, match="lone surrogate"):
            unstored.get_tuple(config)
    for call in (
        unstored.delete_thread,
        lambda thread: unstored.prune([thread]),
        lambda thread: unstored.copy_thread("t", thread),
    ):
        with pytest.raises(InvalidArgument, match="lone surrogate"):
            call("\ud800")
    with pytest.raises(InvalidArgument, match="strategy"):
        unstored.prune(["t"], strategy="some")
    with pytest.raises(InvalidArgument, match=r"channel_values\.lambda cannot be serialized") as caught:
        put(unstored, at("t"), {"good": 1, "lambda": lambda: None})
    assert caught.value.argument == "channel_values.lambda"
    assert unstored._door.open().wal.status(5).messages == before


@pytest.mark.parametrize("stored", [False, True], ids=["log", "database"])
def test_large_values_and_states(saver: SkialithCheckpointer, unstored: SkialithCheckpointer, stored: bool) -> None:
    used = saver if stored else unstored
    state = {f"c{n}": noise(3_000_000, n) for n in range(6)} | {"text": "y" * 3_000_000, "tiny": 1}
    first = put(used, at("large"), state)
    used.put_writes(first, [("c0", noise(2_500_000, 9)), ("tiny", 2)], "task")
    second = put(used, first, {**state, "tiny": 2}, versions=dict.fromkeys(state, 1) | {"tiny": 2}, new={"tiny": 2})
    if stored:
        settle(used)
    assert values_of(used, first) == state
    assert values_of(used, at("large")) == {**state, "tiny": 2}
    found = used.get_tuple(first)
    assert found is not None and found.pending_writes == [("task", "c0", noise(2_500_000, 9)), ("task", "tiny", 2)]
    assert [id_of(each.config) for each in used.list(at("large"))] == [id_of(second), id_of(first)]
    used.prune(["large"])
    assert [id_of(each.config) for each in used.list(at("large"))] == [id_of(second)]
    assert values_of(used, at("large")) == {**state, "tiny": 2}


def test_a_record_over_the_limit_is_refused(open_saver: OpenSaver) -> None:
    saver = open_saver(writer="off", max_record_bytes=100_000)
    with pytest.raises(RecordTooLarge, match="thread 't'"):
        put(saver, at("t"), {"a": noise(100_000, 1)})
    assert saver.get_tuple(at("t")) is None


def test_a_value_that_did_not_change_is_not_written_again(
    nats_server: NatsServer, open_saver: OpenSaver, settings: dict[str, Any]
) -> None:
    saver = open_saver(nats_url=nats_server.url)
    wal, big = saver._door.open().wal, noise(300_000, 1)
    config = put(saver, at("t"), {"big": big, "n": 0}, versions={"big": "1", "n": "0"})
    wait_empty(saver)
    unstored = open_saver(nats_url=nats_server.url, writer="off")  # knows nothing, and then learns it by reading
    assert values_of(unstored, at("t"))["n"] == 0
    sizes = []
    for n in range(1, 6):
        used = saver if n % 2 else unstored
        used.get_tuple(config)
        with outside(settings["database_url"]) as sql:
            before = sql("SELECT COUNT(*), SUM(body_bytes) FROM graph_blobs")[0]
            versions = {"big": "1", "n": str(n)}
            config = put(used, config, {"big": big, "n": n}, versions=versions, new={"n": str(n)})
            sizes.append(wal.status(5).bytes)
            wait_empty(saver)
            after = sql("SELECT COUNT(*), SUM(body_bytes) FROM graph_blobs")[0]
        assert after[0] - before[0] == 1 and after[1] - before[1] < 10
    assert max(sizes) < 5_000, sizes
    assert values_of(saver, at("t")) == {"big": big, "n": 5}


def wait_empty(saver: SkialithCheckpointer) -> None:
    """All is stored, what others put too, and nothing is in the log."""
    wal = saver._door.open().wal
    wal.stream.keep_graphs_seconds = 0.0

    def empty() -> bool:
        wal.trim()
        return wal.status(5).messages == 0

    wait_until(empty, 20, "all is stored and trimmed")


# ---- encryption


@pytest.fixture(params=["sqlite", "mysql"])
def each_settings(request: pytest.FixtureRequest, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings on both databases in turn."""
    if request.param == "mysql":
        return {**settings, "database_url": request.getfixturevalue("mariadb_url")}
    return settings


SECRET = "plaintext-0f4c1d"
NUMBER = 7_391_220_518_374_421


def everything(nats_server: NatsServer, database_url: str, tmp_path: Path) -> dict[str, bytes]:
    """Every byte that the log's server and the database keep, by where it is."""
    found = {str(path): path.read_bytes() for path in nats_server.store.rglob("*") if path.is_file()}
    for path in tmp_path.glob("skialith.db*"):
        found[str(path)] = path.read_bytes()
    with outside(database_url) as sql:
        for table in (
            "graph_checkpoints",
            "graph_blobs",
            "graph_writes",
            "graph_threads",
            "payload_parts",
            "dead_letters",
        ):
            rows = sql(f"SELECT * FROM {table}")
            found[table] = b"|".join(
                bytes(cell) if isinstance(cell, (bytes, bytearray)) else str(cell).encode()
                for row in rows
                for cell in row
            )
    return found


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "plain"])
def test_encryption_covers_every_value(
    nats_server: NatsServer, each_settings: dict[str, Any], tmp_path: Path, encrypted: bool
) -> None:
    serde = EncryptedSerializer.from_pycryptodome_aes(key=b"k" * 32) if encrypted else JsonPlusSerializer()
    for writer in ("on", "off"):
        with SkialithCheckpointer(
            serde=serde, **{**each_settings, "nats_url": nats_server.url, "writer": writer}
        ) as saver:
            secret = {
                "text": SECRET,
                "number": NUMBER,
                "list": [SECRET, {"deep": SECRET}],
                "none": None,
                "bytes": SECRET.encode(),
            }
            made = put(saver, at(f"thread {writer}"), secret, note=SECRET, run_id=SECRET)
            saver.put_writes(made, [("text", SECRET), ("number", NUMBER), ("__interrupt__", SECRET)], "task")
            put(saver, made, {"free": SECRET, "number": NUMBER}, versions={"number": 1}, new={})
            if writer == "on":
                saver.flush()
            assert values_of(saver, made) == secret
            found = saver.get_tuple(made)
            assert found is not None and found.metadata["note"] == SECRET  # type: ignore[typeddict-item]
            assert {value for _, _, value in found.pending_writes or []} == {SECRET, NUMBER}
            assert [*saver.list(None, filter={"note": SECRET})]
            bytes_kept = everything(nats_server, each_settings["database_url"], tmp_path)
            needles = [SECRET.encode(), NUMBER.to_bytes(8, "big"), NUMBER.to_bytes(8, "little"), str(NUMBER).encode()]
            places = [where for where, data in bytes_kept.items() for needle in needles if needle in data]
            assert (places == []) == encrypted, places


# ---- lives


def test_a_clone_shares_the_runtime(open_saver: OpenSaver) -> None:
    saver = open_saver(serde=JsonPlusSerializer(allowed_msgpack_modules=None))
    clone = saver.with_allowlist([("some.module", "Name")])
    assert isinstance(clone, SkialithCheckpointer)
    assert clone is not saver and clone._door.open() is saver._door.open()
    put(clone, at("t"), {"a": 1})
    assert values_of(saver, at("t")) == {"a": 1}
    users = saver._door.open().users
    clone.close()
    clone.close()
    for each in (saver, clone):
        with pytest.raises(Closed, match="nothing was sent"):
            put(each, at("t"), {"a": 2})
    assert users == 1


def test_wrong_settings_show_where_they_stand() -> None:
    with pytest.raises(ConfigurationError, match="nats_url"):
        SkialithCheckpointer(nats_url="http://nowhere")
    with pytest.raises(ConfigurationError, match="unknown setting 'color'"):
        SkialithCheckpointer(color="red")


def test_made_on_a_loop_it_opens_at_its_first_use(settings: dict[str, Any]) -> None:
    async def use() -> Any:
        saver = SkialithCheckpointer(**settings)
        assert not saver._door._uses
        async with saver:
            await saver.aput(at("t"), checkpoint({"a": 1}, {"a": 1}), metadata(), {"a": 1})
            await saver.aput_writes(at("t", "", "1"), [("a", 1)], "task")
            found = await saver.aget_tuple(at("t"))
            assert found is not None
            await saver.adelete_for_runs(["none"])
            await saver.adelete_thread("t")
            assert [each async for each in saver.alist(at("t"))] == []
            return found.checkpoint["channel_values"]

    assert asyncio.run(use()) == {"a": 1}


def test_versions_grow_and_never_repeat(saver: SkialithCheckpointer) -> None:
    version, seen = None, []
    for _ in range(300):
        version = saver.get_next_version(version, None)
        seen.append(version)
    assert seen == sorted(seen) and len(set(seen)) == 300
    assert saver.get_next_version(seen[7], None) not in seen
    assert saver.get_next_version("9", None) > saver.get_next_version(None, None)
    assert saver.get_next_version(9, None).startswith("0" * 30 + "10.")  # type: ignore[arg-type]


def test_many_threads_use_one_checkpointer(saver: SkialithCheckpointer) -> None:
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            config = at(f"thread {int(name) % 4}", name)
            for n in range(12):
                config = put(saver, config, {"n": [name, n]}, versions={"n": n + 1})
                saver.put_writes(config, [("n", n)], name)
                assert values_of(saver, at(config["configurable"]["thread_id"], name)) == {"n": [name, n]}
            assert len(list(saver.list(at(config["configurable"]["thread_id"], name)))) == 12
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    settle(saver)
    assert len(list(saver.list(None))) == 144


_FORK = """
from skialith.langchain import SkialithCheckpointer
from tests.fixtures.graphs import at, put
saver = SkialithCheckpointer(**settings)
put(saver, at('shared', 'parent'), {'n': 0})
pids = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            assert 'n' in saver.get_tuple(at('shared', 'parent')).checkpoint['channel_values']
            for n in range(10):
                put(saver, at('shared', f'child {number}'), {'n': n}, versions={'n': n})
            saver.flush(20)
            saver.close()
            os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
    pids.append(pid)
for n in range(1, 10):
    put(saver, at('shared', 'parent'), {'n': n}, versions={'n': n})
for pid in pids:
    assert os.waitpid(pid, 0)[1] == 0
saver.close()
"""


def test_made_before_a_fork(settings: dict[str, Any], open_saver: OpenSaver) -> None:
    finish(run(_FORK, settings, cwd=Path(__file__).parents[2]))
    saver = open_saver()
    counts = [len(list(saver.list(at("shared", ns)))) for ns in ("parent", "child 0", "child 1", "child 2")]
    assert counts == [10, 10, 10, 10]


def test_a_thread_is_no_agent(saver: SkialithCheckpointer, open_agent: OpenAgent) -> None:
    agent = open_agent("same")
    agent.resume()
    agent.checkpoint(3, {"agent": True})
    put(saver, at("same"), {"thread": True})
    saver.delete_thread("same")
    assert agent.peek().step_index == 3
    assert list(agent.history()) == []


def test_runs_are_deleted_wherever_they_went(saver: SkialithCheckpointer, unstored: SkialithCheckpointer) -> None:
    for n, (thread, used) in enumerate(itertools.product(["a", "b"], [saver, unstored])):
        put(used, at(thread), {"n": n}, versions={"n": n}, run_id="doomed" if n % 2 else "stays")
        saver.flush()
    unstored.delete_for_runs(["doomed", secrets.token_hex(4)])
    assert sorted(each.checkpoint["channel_values"]["n"] for each in saver.list(None)) == [0, 2]
    saver.delete_for_runs([])
    assert len(list(saver.list(None))) == 2
