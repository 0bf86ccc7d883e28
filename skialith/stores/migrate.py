"""Migrations: the numbered .sql files of one database, and which of them are missing."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from ..errors import ConfigurationError

_NAME = re.compile(r"(\d{4})_(\w+)\.sql")
_COMMENT = re.compile(r"^\s*--.*$", re.MULTILINE)


class Migration(NamedTuple):
    """One file: ``0001_tables.sql`` has version 1 and name ``tables``."""

    version: int
    name: str
    statements: tuple[str, ...]


@cache
def load(database: str) -> tuple[Migration, ...]:
    """The migrations of ``"mysql"`` or ``"sqlite"``, in order."""
    found = []
    for file in (files(__package__) / "migrations" / database).iterdir():
        match = _NAME.fullmatch(file.name)
        if match is not None:
            script = _COMMENT.sub("", file.read_text(encoding="utf-8"))
            statements = tuple(statement.strip() for statement in re.split(r";[ \t]*\n", script) if statement.strip())
            found.append(Migration(int(match[1]), match[2], statements))
    return tuple(sorted(found))


def missing(database: str, applied: set[int], url: str) -> list[Migration]:
    """Those not applied yet. Raises ``ConfigurationError`` for a schema that is newer than this code."""
    known = load(database)
    newer = applied - {migration.version for migration in known}
    if newer:
        raise ConfigurationError(
            f"the database {url} has schema version {max(newer)}, this Skialith knows versions up to {known[-1].version}: "
            "install the newer Skialith that upgraded it, or use another database"
        )
    return [migration for migration in known if migration.version not in applied]
