"""Seeing that a server syncs before it acknowledges, for ``durability="power"``."""

from __future__ import annotations

import json
import urllib.request
from urllib.parse import urlsplit

from ..config import API_TIMEOUT_SECONDS, Config
from ..errors import ConfigurationError

_FIX = (
    "set `jetstream { sync_interval: always }` on the server, open its monitoring port and name it in "
    "SKIALITH_NATS_MONITOR_URL (http://host:8222), or use durability='process'"
)


def check_syncing(config: Config, server_id: str) -> None:
    """Return if the server ``server_id`` says that it syncs every message; else raise ``ConfigurationError`` with the fix.

    Asks ``/varz`` of the monitoring port, where ``jetstream.config.sync_always`` is true for ``sync_interval: always``.
    """
    if not config.nats_monitor_url:
        raise ConfigurationError(f"durability='power' cannot be verified on this NATS server: {_FIX}")
    if urlsplit(config.nats_monitor_url).scheme not in ("http", "https"):
        raise ConfigurationError("SKIALITH_NATS_MONITOR_URL must be an http:// or https:// URL")
    url = config.nats_monitor_url.rstrip("/") + "/varz"
    try:
        with urllib.request.urlopen(url, timeout=API_TIMEOUT_SECONDS) as answer:
            varz = json.load(answer)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"durability='power' cannot be verified, {url} does not answer ({error}): {_FIX}"
        ) from error
    if varz.get("server_id") != server_id:
        raise ConfigurationError(
            f"durability='power' cannot be verified: {url} is another server than the one connected to"
        )
    if not varz.get("jetstream", {}).get("config", {}).get("sync_always"):
        raise ConfigurationError(f"durability='power', but this NATS server acknowledges before it syncs: {_FIX}")
