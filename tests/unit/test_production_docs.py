"""What the page about production names is there: settings, metrics, files, error codes, commands."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from skialith.config import Config
from skialith.stores.mysql_errors import CONNECTION_ERRORS, DATA_ERRORS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "PRODUCTION.md").read_text(encoding="utf-8")
SIDECAR = (DOCS / "SIDECAR.md").read_text(encoding="utf-8")


def test_its_settings_are_settings() -> None:
    known = {f"SKIALITH_{field.name.upper()}" for field in dataclasses.fields(Config)} | {"SKIALITH_TEST_DATABASE_URL"}
    named = set(re.findall(r"SKIALITH_[A-Z_]+", PAGE))
    assert len(named) >= 8 and named <= known


def test_its_metrics_are_metrics() -> None:
    named = set(re.findall(r"skialith_[a-z]+(?:_[a-z]+)+", PAGE)) - {"skialith_test"}
    assert len(named) >= 6
    for name in named:
        assert f"`{name}`" in SIDECAR, name


def test_its_links_lead_somewhere() -> None:
    headings = {
        path: {
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines()
            if line[:1] == "#"
        }
        for path, text in (
            (path, path.read_text(encoding="utf-8")) for path in (DOCS.parent / "README.md", DOCS / "PRODUCTION.md")
        )
    }
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) >= 6
    for link in links:
        name, _, heading = link.partition("#")
        path = (DOCS / name).resolve() if name else DOCS / "PRODUCTION.md"
        assert path.exists(), link
        assert not heading or heading in headings[path], link


def test_the_codes_it_calls_transient_are() -> None:
    named = {int(code) for code in re.findall(r"\b(1047|1213|[89]0\d\d)\b", PAGE)}
    assert {1047, 1213, 8002, 8022, 8028, 9001, 9007} <= named
    assert not named & (DATA_ERRORS.keys() | CONNECTION_ERRORS.keys())
