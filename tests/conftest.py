"""What every folder of tests may use: fixtures, and Hypothesis with a seed that is printed."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
from typing import Any

import hypothesis
import pytest

from .fixtures import chaos_summary
from .fixtures.agents import database_url, open_agent, settings
from .fixtures.celery_plugin import broker, redis_server, start_worker
from .fixtures.chaos_summary import report
from .fixtures.graphs import open_saver, saver, unstored
from .fixtures.mariadb_plugin import mariadb_server, mariadb_url
from .fixtures.nats_plugin import nats_server, nats_url
from .fixtures.proxy_plugin import proxy
from .fixtures.sidecar_app import sidecar_app
from .fixtures.wal import open_wal

__all__ = [
    "broker",
    "database_url",
    "mariadb_server",
    "mariadb_url",
    "nats_server",
    "nats_url",
    "open_agent",
    "open_saver",
    "open_wal",
    "proxy",
    "redis_server",
    "report",
    "saver",
    "settings",
    "sidecar_app",
    "start_worker",
    "unstored",
]

SEED_OPTION = "--hypothesis-seed"

# Two noisy cores make any deadline a coin toss.
hypothesis.settings.register_profile("skialith", deadline=None, print_blob=True, derandomize=False)
hypothesis.settings.load_profile("skialith")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # A run that hangs shows where: kill -USR1 <pid>.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # A shell ignores Ctrl-C for what it runs in the background, and children inherit that; some tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption(SEED_OPTION) is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(1 << 32))
    os.environ.setdefault("SKIALITH_RUN_SEED", str(random.SystemRandom().randrange(1 << 32)))
    chaos_summary.start(config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    chaos_summary.hand_over(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """pytest-xdist: a process that ran tests has ended."""
    chaos_summary.take(node.config, getattr(node, "workeroutput", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    chaos_summary.show(terminalreporter, config)


def pytest_report_header(config: pytest.Config) -> str:
    return f"hypothesis seed: {config.getoption(SEED_OPTION)} (again with {SEED_OPTION}=...)"
