"""What long-lived processes hold: memory, open files and threads, sampled from outside, and whether they stay flat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a process. ``memory``: resident bytes."""

    memory: int
    files: int
    threads: int


def look(pid: int) -> Sample:
    """The process as it is now."""
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    memory = int(fields["VmRSS"].split()[0]) * 1024
    return Sample(memory, len(list((process / "fd").iterdir())), int(fields["Threads"]))


@dataclass(slots=True)
class Course:
    """The samples of one process, each taken when nothing was under way. ``allowed``: bytes by which it may grow."""

    allowed: int
    samples: list[Sample] = field(default_factory=list)

    def faults(self, name: str) -> list[str]:
        """What grew, after the first quarter of the samples: the median of the last third beside that of the first one."""
        found = []
        for what, more in (("memory", self.allowed), ("files", 8), ("threads", 8)):
            first, last = self.ends(what)
            if last > first + more:
                found.append(f"GROWN: {name}: {what} from {first:,} to {last:,}, {more:,} more are allowed")
        return found

    def ends(self, what: str) -> tuple[int, int]:
        """The figure at the beginning, when warm, and at the end."""
        warm = self.samples[(len(self.samples) + 3) // 4 :] or self.samples
        values = [int(getattr(sample, what)) for sample in warm]
        third = max(1, len(values) // 3)
        return round(statistics.median(values[:third])), round(statistics.median(values[-third:]))


def table(courses: dict[str, Course]) -> str:
    """All processes: samples, each figure first (when warm) and last, and the memory in every sample."""
    lines = [f"{'process':<16}{'samples':>8}{'RSS first':>13}{'last':>11}{'files':>12}{'threads':>12}  RSS, MiB"]
    for name, course in courses.items():
        memory, files, threads = (course.ends(what) for what in ("memory", "files", "threads"))
        rss = f"{memory[0] / MIB:>9.1f} MiB{memory[1] / MIB:>7.1f} MiB"
        every = " ".join(f"{sample.memory / MIB:.0f}" for sample in course.samples)
        lines.append(f"{name:<16}{len(course.samples):>8}{rss}{_pair(files):>12}{_pair(threads):>12}  {every}")
    return "\n".join(lines)


def _pair(ends: Sequence[int]) -> str:
    return f"{ends[0]} -> {ends[1]}"
