"""Seeing that servers sync before they acknowledge, for ``durability="power"``: before any record, and now and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ..config import API_TIMEOUT_SECONDS, PEER_SILENT_SECONDS, POWER_AGAIN_SECONDS, POWER_CHECK_SECONDS, Config
from ..errors import ConfigurationError, WalUnavailable
from ..urls import redact
from .access import access_options, bare
from .api import ApiError, NoResponders
from .group import Group, group
from .stream import Stream
from .transport import Connection, Disconnected, NoReply

log = logging.getLogger("skialith.wal")

_FIX = (
    "set `jetstream { sync_interval: always }` on every server that keeps the log and restart it, or use durability='process'; "
    "records are taken again as soon as all of them sync"
)
_WAY = (
    "name the monitoring port of every server that keeps the log in SKIALITH_NATS_MONITOR_URL (http://n1:8222,http://n2:8222), "
    "or a user of the system account in SKIALITH_NATS_SYSTEM_URL, or use durability='process'"
)


_PATIENCE_SECONDS = 2 * PEER_SILENT_SECONDS
"""How long after a connection was made records wait for servers that cannot be asked, before they are refused."""


class Unseen(ConfigurationError):
    """Nobody can tell now whether a server syncs."""


class Server(NamedTuple):
    """What a server says of itself."""

    name: str
    server_id: str
    syncs: bool


class Seen(NamedTuple):
    """Names of the servers that were seen to sync, and of those that keep the log too and are away."""

    syncing: tuple[str, ...]
    away: tuple[str, ...]


class Power:
    """The guard of a connection: admits records where every server that keeps the log was seen to sync."""

    def __init__(self, config: Config, connection: Connection, stream: Stream) -> None:
        self._config = config
        self._connection = connection
        self._stream = stream
        self._whole = True
        self._since = 0.0
        self._known: set[str] = set()
        """Names of peers that were seen to sync, which need not be seen again while they do not answer."""

    def check_settings(self) -> None:
        """Raises ``ConfigurationError`` if there is no way to see anything."""
        if not self._config.nats_monitor_url and not self._config.nats_system_url:
            raise ConfigurationError(f"durability='power' cannot be verified on this NATS server: {_WAY}")
        for url in (self._config.nats_monitor_url or "").split(",") if self._config.nats_monitor_url else ():
            if urlsplit(url.strip()).scheme not in ("http", "https"):
                raise ConfigurationError("SKIALITH_NATS_MONITOR_URL must be http:// or https:// URLs")

    async def begin(self) -> None:
        """The first check, before any record. Raises ``ConfigurationError`` with the fix, or what a request raises."""
        epoch = self._connection.epoch
        self._note(await self.look())
        self._connection.admit(epoch)

    async def look(self) -> Seen:
        """Raises ``ConfigurationError`` if a server that keeps the log does not sync, or ``Unseen`` if nobody can tell.

        A server of which the log's leader hears nothing is left out, as long as a majority is seen: it acknowledges nothing now.
        """
        deadline = time.monotonic() + API_TIMEOUT_SECONDS
        connected = str(self._connection.info.get("server_id", ""))
        groups = await self._groups(deadline)
        names = {name for each in groups for name in _members(each)}
        found = await self._ask(names or {connected})
        if not names:
            mine = [server for server in found if server.server_id == connected]
            if not mine:
                raise Unseen(
                    f"durability='power' cannot be verified: what was asked is another server than the one connected to; {_WAY}"
                )
            return Seen(_syncing(mine), ())
        syncing = _syncing(sorted(server for server in found if server.name in names))
        here = str(self._connection.info.get("server_name", "")) if connected not in {each[1] for each in found} else ""
        away: set[str] = set()
        for each in groups:
            away |= self._away(each, set(syncing), here)
        self._known |= set(syncing)
        return Seen(syncing, tuple(sorted(away)))

    def _away(self, each: Group, syncing: set[str], here: str) -> set[str]:
        """Those that keep a stream and were not seen, if that is no matter. ``here``: who is connected and was not seen."""
        members = _members(each)
        missing = members - syncing
        excused = {peer.name for peer in each.peers if peer.away} | self._known - {here}
        if missing <= excused and 2 * len(members - missing) > each.wanted:
            return missing
        raise Unseen(
            f"durability='power' cannot be verified: {', '.join(sorted(missing))} was not seen, and the log is kept by "
            f"{', '.join(sorted(members))}: {_WAY}"
        )

    async def keep(self) -> None:
        """For ever: check every server that is connected, soon, and then now and again, for a peer may come back changed."""
        connection = self._connection
        while True:
            taking = connection.wire.takes_records
            pause = POWER_CHECK_SECONDS if taking and self._whole else POWER_AGAIN_SECONDS
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(connection.opened.wait(), pause)
            if connection.opened.is_set():
                connection.opened.clear()
                self._since = time.monotonic()
            if connection.is_open:
                await self._judge()

    async def _judge(self) -> None:
        connection = self._connection
        epoch, taking = connection.epoch, connection.wire.takes_records
        try:
            seen = await self.look()
        except Unseen as error:
            # A monitor may be up a moment after its server; and what was seen before is not undone by not seeing it now.
            if not taking and time.monotonic() - self._since > _PATIENCE_SECONDS:
                self._refuse(epoch, error)
        except ConfigurationError as error:
            self._refuse(epoch, error)
        except (ApiError, Disconnected, NoReply, NoResponders, WalUnavailable) as error:
            log.info("whether the NATS server syncs cannot be told now: %s", error)
        except Exception:  # a bug must not end the guard
            log.exception("whether the NATS server syncs could not be told")
        else:
            self._note(seen)
            if not taking:
                log.info("records are taken: %s sync before they acknowledge", ", ".join(seen.syncing))
            connection.admit(epoch)

    def _refuse(self, epoch: int, error: ConfigurationError) -> None:
        if self._connection.wire.takes_records or self._connection.refusal is None:
            log.error("%s; no record is taken until then", error)
        self._connection.refuse(epoch, error)

    def _note(self, seen: Seen) -> None:
        self._whole = not seen.away

    # ---- who is to be asked

    async def _groups(self, deadline: float) -> list[Group]:
        """Who keeps the records and the dead letters; empty if the server is not of a cluster."""
        if not self._connection.info.get("cluster"):
            return []
        infos = [await self._stream.info(deadline), await self._stream.dead_info(deadline)]
        found = []
        for info in infos:
            wanted = info["config"]["num_replicas"]
            leader = (info.get("cluster") or {}).get("leader")
            alone = Group(1, leader, ()) if leader else None
            each = group(info, wanted) or alone
            if each is None or each.leader is None:
                raise WalUnavailable(f"{info['config']['name']} has no leader now")
            found.append(each)
        return found

    # ---- asking

    async def _ask(self, wanted: set[str]) -> list[Server]:
        """What the servers say that can be reached; ``wanted``: names or ids after which nobody else is waited for."""
        if self._config.nats_system_url:
            return await ask_system(self._config, wanted)
        urls = [url.strip() for url in (self._config.nats_monitor_url or "").split(",")]
        loop = asyncio.get_running_loop()
        answers = await asyncio.gather(*(loop.run_in_executor(None, _ask_monitor, url) for url in urls))
        found = [answer for answer in answers if isinstance(answer, Server)]
        if not found:
            raise Unseen(f"durability='power' cannot be verified: {'; '.join(map(str, answers))}: {_WAY}")
        return found


def _members(each: Group) -> set[str]:
    return {*((each.leader,) if each.leader else ()), *(peer.name for peer in each.peers)}


def _syncing(servers: Iterable[Server]) -> tuple[str, ...]:
    lazy = [server.name for server in servers if not server.syncs]
    if lazy:
        raise ConfigurationError(
            f"durability='power', but the NATS server {', '.join(lazy)} acknowledges before it syncs: {_FIX}"
        )
    return tuple(server.name for server in servers)


def _server(varz: dict[str, Any]) -> Server:
    """Of ``/varz``, where ``jetstream.config.sync_always`` is true for ``sync_interval: always``."""
    syncs = bool((varz.get("jetstream") or {}).get("config", {}).get("sync_always"))
    return Server(str(varz.get("server_name", "")), str(varz.get("server_id", "")), syncs)


def _ask_monitor(url: str) -> Server | str:
    """What the server of one monitoring port says, or why it does not."""
    asked = url.rstrip("/") + "/varz"
    try:
        with urllib.request.urlopen(asked, timeout=API_TIMEOUT_SECONDS) as answer:
            return _server(json.load(answer))
    except (OSError, ValueError) as error:
        return f"{asked} does not answer ({error})"


async def ask_system(config: Config, wanted: set[str]) -> list[Server]:
    """What all servers say to a user of the system account, over a connection that is closed afterwards."""
    url = config.nats_system_url or ""
    own = replace(config, nats_creds=config.nats_system_creds, nats_nkey_seed=None)
    client: Any = Client()

    async def quiet(error: Exception) -> None:
        log.debug("nats, system account: %s", error)

    found: dict[str, Server] = {}
    complete = asyncio.Event()

    async def note(message: Any) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            server = _server(json.loads(message.data)["data"])
            found[server.server_id] = server
        if wanted <= {*found, *(server.name for server in found.values())}:
            complete.set()

    try:
        await asyncio.wait_for(
            client.connect(
                [bare(each) for each in url.split(",")],
                name="skialith-power",
                allow_reconnect=False,
                error_cb=quiet,
                connect_timeout=API_TIMEOUT_SECONDS / 2,
                **access_options(own, url),
            ),
            API_TIMEOUT_SECONDS,
        )
        inbox = client.new_inbox()
        await client.subscribe(inbox, cb=note)
        await client.publish("$SYS.REQ.SERVER.PING.VARZ", b"", reply=inbox)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(complete.wait(), API_TIMEOUT_SECONDS / 2)
    except (NatsError, OSError, asyncio.TimeoutError) as error:
        where = ",".join(redact(each.strip()) for each in url.split(","))
        raise Unseen(
            f"durability='power' cannot be verified: the system account at {where} cannot be reached "
            f"({error!r}): {_WAY}"
        ) from error
    finally:
        with contextlib.suppress(NatsError, OSError):
            await client.close()
    if not found:
        raise Unseen(
            "durability='power' cannot be verified: no server answers $SYS.REQ.SERVER.PING.VARZ: SKIALITH_NATS_SYSTEM_URL must "
            "name a user of the system account"
        )
    return list(found.values())
