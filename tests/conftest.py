"""Fixtures that every folder of tests may use."""

from .fixtures.agents import open_agent, settings
from .fixtures.nats_plugin import nats_server, nats_url
from .fixtures.wal import open_wal

__all__ = ["nats_server", "nats_url", "open_agent", "open_wal", "settings"]
