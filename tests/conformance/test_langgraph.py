"""LangGraph's own conformance suite, on both databases: read from the log, from the database, and from wherever it is."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import Capability
from langgraph.checkpoint.conformance.report import CapabilityReport

from skialith import runtime
from skialith.langchain import SkialithCheckpointer

from ..fixtures.graphs import FromDatabase
from ..fixtures.stores import outside
from ..fixtures.wal import new_namespace

KNOWN_TESTS = 81
"""How many tests version 0.0.2 of the suite has; a later one may have more, none may have fewer."""


def expected() -> dict[str, int]:
    """How many tests the suite has for each capability."""
    counts = {}
    for capability in Capability:
        spec = importlib.import_module(f"langgraph.checkpoint.conformance.spec.test_{capability.value}")
        counts[capability.value] = len(getattr(spec, f"ALL_{capability.value.upper()}_TESTS"))
    return counts


def conform(kind: type[BaseCheckpointSaver[str]], settings: dict[str, Any]) -> CapabilityReport:
    """Run the suite; each capability gets a checkpointer of its own, and all of them one namespace."""

    @checkpointer_test(name=kind.__name__)
    async def made() -> AsyncGenerator[BaseCheckpointSaver[Any], None]:
        saver = kind(**settings)
        yield saver
        if isinstance(saver, SkialithCheckpointer):
            await asyncio.to_thread(saver.close)

    return asyncio.run(validate(made))


def check(report: CapabilityReport) -> None:
    """All capabilities are detected, and every one of their tests ran and passed."""
    wanted = expected()
    for name, result in report.results.items():
        assert result.failures == [], f"{name}: {result.failures}"
    ran = {name: result.tests_passed for name, result in report.results.items() if result.detected and result.passed}
    assert ran == wanted
    assert sum(wanted.values()) >= KNOWN_TESTS
    print(f"conformance: {sum(ran.values())} of {sum(wanted.values())} tests passed, {len(ran)} capabilities")


@pytest.fixture
def suite(store_url: str, nats_url: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Settings for one run of the suite, whose runtime stays open from one checkpointer to the next."""
    settings: dict[str, Any] = {
        "nats_url": nats_url,
        "database_url": store_url,
        "namespace": new_namespace(),
        "wal_bytes": 256 * 1024 * 1024,
        "directory": str(tmp_path / ".skialith"),
    }
    with SkialithCheckpointer(**settings):
        yield settings


def test_everything_passes_wherever_it_is_read_from(suite: dict[str, Any]) -> None:
    check(conform(SkialithCheckpointer, suite))


def test_everything_passes_from_the_database_alone(suite: dict[str, Any], store_url: str) -> None:
    check(conform(FromDatabase, suite))
    with outside(store_url) as run:
        assert run("SELECT COUNT(*) > 50 FROM graph_checkpoints") == [(1,)]


def test_everything_passes_from_the_log_alone(nats_url: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "nats_url": nats_url,
        "database_url": f"sqlite:///{tmp_path / 'none.db'}",
        "namespace": new_namespace(),
        "wal_bytes": 256 * 1024 * 1024,
        "writer": "off",
    }
    with SkialithCheckpointer(**settings) as saver:
        check(conform(SkialithCheckpointer, settings))
        assert not saver._door.open().wal.anything_stored(10)


def test_a_checkpointer_that_does_nothing_does_not_pass() -> None:
    class Nothing(BaseCheckpointSaver[str]):
        pass

    report = conform(Nothing, {})
    assert report.conformance_level() == "FULL"
    with pytest.raises(AssertionError):
        check(report)


def test_the_runtime_is_given_back(suite: dict[str, Any]) -> None:
    saver = SkialithCheckpointer(**suite)
    engine = saver._door.open()
    users = engine.users
    saver.close()
    assert engine.users == users - 1
    assert engine in runtime._registry.runtimes.values()
