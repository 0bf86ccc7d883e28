"""The operator's page names every setting and every metric of the sidecar."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from skialith.sidecar import metrics
from skialith.sidecar.config import SidecarConfig
from skialith.wal.status import ConsumerLag, WalStatus

PAGE = (Path(__file__).parents[2] / "docs" / "SIDECAR.md").read_text(encoding="utf-8")


def test_every_setting_is_in_the_table() -> None:
    for field in dataclasses.fields(SidecarConfig):
        variable = "SKIALITH_TOKEN" if field.name == "token" else f"SKIALITH_HTTP_{field.name.upper()}"
        assert f"`{variable}`" in PAGE, variable


def test_every_metric_is_in_the_table() -> None:
    lag = ConsumerLag("writer", 1, 0, 0.5, 1)
    log = WalStatus("s", "w", "n", "2.12", 1, 1, 2, 3, 4, True, 0, (lag,))
    text = metrics.exposition("", metrics.Look(log, database_ok=True, dead_in_table=0))[0].decode()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE skialith_")}
    assert len(names) >= 13
    for name in names:
        assert f"`{name}`" in PAGE, name
