"""Children whose connection goes through a proxy, and the end of such a scenario."""

from __future__ import annotations

from typing import Any

from tests.fixtures.nats_proxy import NatsProxy

from .conftest import Report
from .evidence import APPENDS
from .world import Child, World

UNAVAILABLE = {"WalUnavailable", "BatchFailed"}
"""What calls may end in while the log cannot be reached by their deadlines."""


def spawn(world: World, proxy: NatsProxy, *, settings: dict[str, Any] | None = None, **given: Any) -> Child:
    """A child that is ready, connected through the proxy."""
    through = {"nats_url": f"nats://127.0.0.1:{proxy.port}", **(settings or {})}
    child = world.spawn(settings=through, **given)
    child.wait_ready()
    return child


def finish(world: World, report: Report, scenario: str, runs: int, allowed: set[str]) -> None:
    """Stop the children in order and judge; the server lived through it. ``allowed``: the errors that calls may have had."""
    world.hurry()  # a writer's last flush waits for what was delivered on a connection that is gone
    for child in list(world.children):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report(scenario, runs, verdict)
    assert not verdict.problems, str(verdict)
    errors = world.evidence().errors(*APPENDS)
    assert errors <= allowed, errors
