"""The servers that keep the copies of a stream or of a consumer, as its leader sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config import PEER_BEHIND_OPERATIONS, PEER_SILENT_SECONDS
from .api import time_ns

PeerState = Literal["current", "behind", "silent", "offline", "unknown"]


@dataclass(frozen=True, slots=True)
class Peer:
    """One server that keeps a copy.

    ``behind``: operations that it does not have; ``seen_seconds``: since it last answered the leader. Both are None if it
    never answered this leader. ``unknown``: there is no leader, or it was chosen a moment ago and has not heard of this one.
    """

    name: str
    state: PeerState
    behind: int | None
    seen_seconds: float | None

    @property
    def away(self) -> bool:
        """Whether it does not answer the leader."""
        return self.state in ("silent", "offline")


@dataclass(frozen=True, slots=True)
class Group:
    """``leader`` is a server's name, None while there is none; ``peers`` are the other servers, or all without a leader."""

    wanted: int
    leader: str | None
    peers: tuple[Peer, ...]

    @property
    def writable(self) -> bool:
        """Whether a leader and a majority of the wanted servers answer, without which nothing is acknowledged."""
        # Who is unknown to a new leader may have voted for it.
        answering = 1 + sum(not peer.away for peer in self.peers)
        return self.leader is not None and 2 * answering > self.wanted

    @property
    def whole(self) -> bool:
        """Whether every wanted copy is there and current."""
        current = sum(peer.state == "current" for peer in self.peers)
        return self.leader is not None and 1 + current >= self.wanted and current == len(self.peers)


def group(info: Mapping[str, Any], wanted: int) -> Group | None:
    """Of an answer to STREAM.INFO or CONSUMER.INFO; None if only one copy is ``wanted``."""
    if wanted <= 1:
        return None
    cluster = info.get("cluster") or {}
    leader = cluster.get("leader") or None
    led = _seconds(info.get("ts"), cluster.get("leader_since")) if leader else 0.0
    peers = (_peer(each, led) for each in cluster.get("replicas") or ())
    return Group(wanted, leader, tuple(sorted(peers, key=lambda peer: peer.name)))


def _seconds(now: str | None, since: str | None) -> float:
    """How long the leader is one, by its own clock; for ever if it does not tell."""
    return (time_ns(now) - time_ns(since)) / 1e9 if now and since else math.inf


def _peer(found: Mapping[str, Any], led: float) -> Peer:
    """``current`` alone says little: a peer that was killed stays so for 10 s, and one under load often is not for a moment."""
    name, offline = str(found.get("name", "")), bool(found.get("offline"))
    active = found.get("active", 0)
    if not led or not active:
        unheard: PeerState = "unknown" if led < PEER_SILENT_SECONDS else "silent"
        return Peer(name, "offline" if offline else unheard, None, None)
    seen, behind = active / 1e9, int(found.get("lag", 0))
    state: PeerState = "current"
    if offline:
        state = "offline"
    elif seen >= PEER_SILENT_SECONDS:
        state = "silent"
    elif not found.get("current") and behind >= PEER_BEHIND_OPERATIONS:
        state = "behind"
    return Peer(name, state, behind, seen)
