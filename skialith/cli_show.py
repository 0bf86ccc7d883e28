"""How the command line speaks: one JSON document on stdout for machines, plain tables for people."""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import trace_json
from .wal.group import Group, Peer

_PIPED_WIDTH = 100_000
"""A pipe has no width: nothing is wrapped or cut for it."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def console(*, error: bool = False) -> Console:
    """Stdout (or stderr) as it is now: colours and the width of a terminal only on a terminal."""
    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def say(text: str | Text = "", *, style: str = "", error: bool = False, end: str = "\n") -> None:
    """One line (or several) for people, never wrapped by force; at once, even into a pipe."""
    screen = console(error=error)
    screen.print(text, style=style, soft_wrap=True, end=end)
    screen.file.flush()


def show(what: Table) -> None:
    """A table; into a pipe without the spaces that fill its lines."""
    screen = console()
    if screen.is_terminal:
        screen.print(what)
        return
    with screen.capture() as capture:
        screen.print(what)
    _write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def note(text: str) -> None:
    """A remark beside the result, on stderr so that a pipe gets the result alone."""
    say(text, style="dim", error=True)


def emit(document: Any) -> None:
    """One JSON document on one line of stdout; ASCII, so that no locale breaks it."""
    _write(json.dumps(document, allow_nan=False) + "\n")


def _write(text: str) -> None:
    """All of it to stdout: with PYTHONUNBUFFERED, Python drops what a pipe did not take at once."""
    stream = sys.stdout
    stream.flush()
    rest = memoryview(text.encode(stream.encoding, stream.errors or "strict"))
    while rest:
        rest = rest[stream.buffer.write(rest) :]
    stream.flush()


def payload(value: Any) -> Any:
    """A payload in JSON's own types, as ``agent_traces`` shows it but whole: bytes become objects that say so."""
    return json.loads(trace_json.whole_value(value))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without lines; ``right`` names the columns of numbers."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def facts(rows: list[tuple[str, str | Text]]) -> Table:
    """Names and what is to be said of them, in two columns."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, text in rows:
        made.add_row(name, text)
    return made


def printable(text: str) -> str:
    """Text from outside as a terminal may see it: what is not printable becomes an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def size(count: int) -> str:
    """Bytes for people: ``312.5 KiB``."""
    power = min(len(_UNITS) - 1, int(math.log(count, 1024))) if count > 0 else 0
    return f"{count} B" if power == 0 else f"{count / 1024**power:.1f} {_UNITS[power]}"


def span(seconds: float) -> str:
    """A duration for people: ``0.4 s``, ``3 min 20 s``, ``5 h 02 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def group_line(group: Group) -> str:
    """Who keeps the replicas: ``leader n1; n2 current; n3 silent, seen 8.0 s ago, 104 operations behind``."""
    said = [f"leader {printable(group.leader)}" if group.leader else "no leader", *map(_peer, group.peers)]
    missing = group.wanted - len(group.peers) - (group.leader is not None)
    if missing > 0:
        said.append(f"{missing} of {group.wanted} missing")
    return "; ".join(said)


def _peer(peer: Peer) -> str:
    behind = f"{plural(peer.behind or 0, 'operation')} behind"
    if not peer.away:
        return f"{printable(peer.name)} {behind if peer.state == 'behind' else peer.state}"
    said = [f"{printable(peer.name)} {peer.state}"]
    said.append("not seen by this leader" if peer.seen_seconds is None else f"seen {span(peer.seen_seconds)} ago")
    return ", ".join([*said, behind] if peer.behind else said)


def when(us: int) -> str:
    """Unix microseconds for people: local time to the second."""
    return datetime.fromtimestamp(us / 1e6, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 record``, ``1,200 records``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
