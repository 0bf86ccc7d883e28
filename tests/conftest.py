"""Fixtures that every folder of tests may use."""

from .fixtures.nats_plugin import nats_server, nats_url

__all__ = ["nats_server", "nats_url"]
