"""What is read from the ``cluster`` part of the server's answers, also what a test cannot wait for."""

from __future__ import annotations

from typing import Any

import pytest

from skialith.cli_show import group_line
from skialith.doctor import _replicas
from skialith.wal.group import Group, PeerState, group

SECOND = 1_000_000_000


def of(*replicas: dict[str, Any], leader: str = "n1", wanted: int = 3) -> Group:
    made = group({"cluster": {"name": "c", "leader": leader, "replicas": [*replicas]}}, wanted)
    assert made is not None
    return made


def peer(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "current": True, "active": SECOND // 10, **fields}


def test_one_copy_has_no_group() -> None:
    assert group({"cluster": {"leader": "n1"}}, 1) is None


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "current"),
        ({"current": False, "lag": 3}, "current"),  # on its way, as under any load
        ({"current": False, "lag": 5000}, "behind"),
        ({"active": 5 * SECOND}, "silent"),  # the server calls it current for 10 s
        ({"current": False, "active": 0, "lag": 9}, "silent"),  # this leader never heard of it
        ({"current": False, "active": 0, "offline": True}, "offline"),
        ({"offline": True}, "offline"),
    ],
)
def test_the_state_of_a_peer(fields: dict[str, Any], state: PeerState) -> None:
    found = of(peer("n2"), peer("n3", **fields))
    assert [each.state for each in found.peers] == ["current", state]
    assert found.writable
    assert found.whole == (state == "current")
    assert _replicas("replicas", found).level == ("ok" if state == "current" else "warn")


def test_a_majority_is_needed() -> None:
    assert not of(peer("n2", active=5 * SECOND), peer("n3", offline=True)).writable
    assert of(peer("n2"), peer("n3"), peer("n4", offline=True), peer("n5", offline=True), wanted=5).writable
    assert not of(peer("n2"), wanted=5).writable


def test_a_new_leader_has_not_heard_of_everybody_yet() -> None:
    """As for a moment after every election: no majority was lost by it."""
    cluster = {
        "leader": "n1",
        "leader_since": "2026-01-01T00:00:01.5Z",
        "replicas": [peer("n2", active=0), peer("n3", active=0)],
    }
    soon = group({"cluster": cluster, "ts": "2026-01-01T00:00:02.25Z"}, 3)
    later = group({"cluster": cluster, "ts": "2026-01-01T00:00:05.5Z"}, 3)
    assert soon is not None and later is not None
    assert [each.state for each in soon.peers] == ["unknown"] * 2 and soon.writable and not soon.whole
    assert [each.state for each in later.peers] == ["silent"] * 2 and not later.writable
    assert _replicas("replicas", soon).level == "warn" and _replicas("replicas", later).level == "fail"


def test_without_a_leader_nothing_is_known_of_the_peers() -> None:
    found = of(peer("n1"), peer("n2", active=0), peer("n3", current=False), leader="")
    assert found.leader is None and not found.writable and not found.whole
    assert group_line(found) == "no leader; n1 unknown; n2 unknown; n3 unknown"
    assert _replicas("replicas", found).level == "fail"


def test_the_line_for_people() -> None:
    found = of(peer("n3", active=8 * SECOND, lag=104), peer("n2", current=False, lag=7000))
    text = "leader n1; n2 7,000 operations behind; n3 silent, seen 8.0 s ago, 104 operations behind"
    assert group_line(found) == text
    assert group_line(of(peer("n2"))) == "leader n1; n2 current; 1 of 3 missing"
    assert group_line(of(peer("n2", active=0, lag=9))).startswith("leader n1; n2 silent, not seen by this leader; ")
    assert _replicas("replicas", of(peer("n2"))).level == "warn"
