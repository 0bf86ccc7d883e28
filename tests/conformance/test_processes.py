"""What every store promises when several processes use one database, and when a process forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skialith.records import Position
from skialith.stores import Store, migrate
from skialith.stores.base import Counts

from ..fixtures.stores import NAMESPACE, TABLES, Run, outside

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import gc, os, signal, sys, threading
from skialith.records import Position
from skialith.stores import open_store
from tests.fixtures.stores import event, checkpoint, noise, NAMESPACE
url = sys.argv[1]

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            code = 0
        except Exception as error:
            print("child:", repr(error), file=sys.stderr, flush=True)
            code = 1
        sys.exit(code)  # the interpreter's whole clean-up runs, as at the end of any program
    return pid

def wait(*pids):
    for pid in pids:
        if os.waitpid(pid, 0)[1] != 0:
            raise SystemExit(f"child {pid} failed")
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A fresh interpreter, without pytest's threads."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PREAMBLE + script, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    """What it printed; fails if it failed."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    return out


def test_six_processes_migrate_at_once(empty_store: Store, store_url: str, sql: Run) -> None:
    script = """
sys.stdin.readline()
store = open_store(url)
print(store.migrate())
store.write_records([event(1)])
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + script, store_url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, err) == (0, "")
        said.append(out.strip())
    every = [migration.version for migration in migrate.load(empty_store.name)]
    assert sorted(said) == [str(every)] + ["[]"] * 5
    assert sql("SELECT COUNT(*) FROM skialith_migrations") == [(len(every),)]
    assert empty_store.counts(NAMESPACE).events == 6
    for table in TABLES:
        sql(f"SELECT COUNT(*) FROM {table}")


def test_processes_write_the_same_records_at_once(store: Store, store_url: str) -> None:
    script = """
import random
store = open_store(url)
seed = int(sys.argv[2])
rng = random.Random(seed)
records = [(event if n % 3 else checkpoint)(n, key=n.to_bytes(16, "little")) for n in range(1, 401)]
records.append(event(500, key=bytes(16), body=noise(3_000_000, seed)))
for _ in range(8):
    store.write_records(rng.sample(records, 150) + records[-1:])
store.write_records(records)
"""
    processes = [start(script, store_url, str(seed)) for seed in range(4)]
    for process in processes:
        end(process)
    assert store.counts(NAMESPACE) == Counts(268, 133, 0, 0)
    page = store.events(NAMESPACE, "agent", Position(0, 0), None, 1000)
    assert len(page) == 268
    assert page[-1][0].body is not None
    assert len(page[-1][0].body) == 3_000_000


@pytest.mark.parametrize("keep", ["kept", "dropped", "closed"])
def test_a_child_starts_its_own_connections(store: Store, store_url: str, keep: str) -> None:
    script = f"""
store = open_store(url)
store.write_records([event(1, agent="parent")])

def work():
    global store
    if {keep!r} == "dropped":
        mine, store = store, None
        del mine
        gc.collect()
        store = open_store(url)
    if {keep!r} == "closed":
        store.close()
        store = open_store(url)
    me = f"child {{os.getpid()}}"
    for n in range(1, 6):
        store.write_records([event(n, agent=me)])
        assert len(store.events(NAMESPACE, me, Position(0, 0), None, 100)) == n

before = list(store._pool._state.open.values())
wait(child(work), child(work))
for n in range(2, 6):
    store.write_records([event(n, agent="parent")])
if store.name == "mysql":
    assert list(store._pool._state.open.values()) == before, "the parent's connection was lost"
wait(child(work))
assert store.counts(NAMESPACE).events == 5 + 15, store.counts(NAMESPACE)
"""
    end(start(script, store_url))
    assert store.counts(NAMESPACE).events == 20


def test_threads_are_using_the_store_when_it_forks(store: Store, store_url: str) -> None:
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what is tested
store = open_store(url)
store.ping()
stop = threading.Event()
failed = []

def busy(i):
    n = 0
    try:
        while not stop.is_set() or n < 10:
            n += 1
            store.write_records([event(n, agent=f"t{i}")])
            store.latest_checkpoint(NAMESPACE, f"t{i}")
    except BaseException as error:
        failed.append(error)
    written[i] = n

written = {}
threads = [threading.Thread(target=busy, args=(i,)) for i in range(4)]
for thread in threads:
    thread.start()

def work():
    for n in range(1, 4):
        store.write_records([event(n, agent=f"child {os.getpid()}")])
    assert len(store.events(NAMESPACE, f"child {os.getpid()}", Position(0, 0), None, 100)) == 3

children = [child(work) for _ in range(6)]
wait(*children)
stop.set()
for thread in threads:
    thread.join()
assert not failed, failed
for i, n in written.items():
    assert len(store.events(NAMESPACE, f"t{i}", Position(0, 0), None, 100_000)) == n
assert len(store.agents(NAMESPACE)) == 4 + len(children)
"""
    end(start(script, store_url))


def test_a_grandchild_and_its_siblings(store: Store, store_url: str) -> None:
    script = """
store = open_store(url)
store.write_records([event(1, agent="0")])

def grandchild():
    store.write_records([event(1, agent="2")])

def work():
    store.write_records([event(1, agent="1")])
    wait(child(grandchild))
    store.write_records([event(2, agent="1")])

wait(child(work))
store.write_records([event(2, agent="0")])
assert [agent.events for agent in store.agents(NAMESPACE)] == [2, 2, 1]
"""
    end(start(script, store_url))


def test_a_child_goes_on_when_its_parent_is_gone(store: Store, store_url: str) -> None:
    # A SQLite connection of a child that inherited one of its parent has no lock of its own: the parent's close() then
    # deletes the WAL file that the child writes to.
    script = """
store = open_store(url)
store.write_records([event(1)])
ready, go = os.pipe(), os.pipe()

def work():
    store.write_records([event(2)])
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    store.write_records([event(n) for n in range(3, 9)])
    assert store.counts(NAMESPACE).events == 8

pid = child(work)
os.read(ready[0], 1)
store.close()
with_parent_gone = open_store(url)
assert with_parent_gone.counts(NAMESPACE).events == 2
with_parent_gone.close()
os.write(go[1], b"x")
wait(pid)
"""
    store.close()
    end(start(script, store_url))
    with outside(store_url) as run:
        assert run("SELECT COUNT(*) FROM agent_events") == [(8,)]
