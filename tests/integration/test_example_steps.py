"""examples/steps.py as a newcomer runs it: killed again and again, it comes to one end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "steps.py"


def start(place: Path) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SKIALITH_")}
    return subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLE), "tests"],
        cwd=place,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines() if line.startswith("  working on")]


def test_the_example_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    outputs = []
    for number in (signal.SIGKILL, signal.SIGINT):
        child = start(tmp_path)
        assert child.stdout is not None
        lines: list[str] = []
        while len(set(begun("".join(lines)))) < 2:  # the second step of this run is under way, at whatever attempt
            lines.append(child.stdout.readline())
            assert lines[-1], child.communicate()
        time.sleep(0.2)
        child.send_signal(number)
        rest, err = child.communicate(timeout=60)
        assert child.returncode == (-number if number == signal.SIGKILL else 0), err
        outputs.append("".join(lines) + rest)
    assert "interrupted: run it again" in outputs[1]
    for _ in range(2):
        out, err = start(tmp_path).communicate(timeout=120)
        assert err == ""
        outputs.append(out)
    assert [begun(outputs[0])[0], *begun(outputs[1])[:1]] == ["plan", "search"]
    assert begun(outputs[2])[0] == "search#2"
    assert begun(outputs[3]) == []
    findings = [line for line in outputs[2].splitlines() if line.startswith("- ")]
    assert len(findings) == 3
    assert [line for line in outputs[3].splitlines() if line.startswith("- ")] == findings
