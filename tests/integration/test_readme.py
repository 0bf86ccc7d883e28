"""The README's quickstart runs as it stands, and its table of settings is complete."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

from skialith.config import Config

README = Path(__file__).parents[2] / "README.md"


def test_the_quickstart_runs_twice(tmp_path: Path) -> None:
    outputs = _run_twice("quickstart", tmp_path)
    assert outputs[0][1:] == [
        "thought step-1 {'kind': 'thought', 'text': 'What is known so far?'}",
        "tool_call tool-1 {'kind': 'tool_call', 'name': 'search', 'q': 'write-ahead log'}",
        "observation seen-1 {'kind': 'observation', 'hits': 3}",
    ]
    assert outputs[1][1:] == outputs[0][1:]


def test_the_steps_are_called_once(tmp_path: Path) -> None:
    first, second = _run_twice("steps", tmp_path)
    last = "{'role': 'assistant', 'content': 'TWO'} ['write-ahead log', 3]"
    assert first == ["asked hello 32", "asked one 32", "asked two 32", last]
    assert second == [last]


def _run_twice(name: str, tmp_path: Path) -> list[list[str]]:
    """What the example behind the comment ``name`` prints, in two processes one after the other."""
    found = re.search(rf"<!-- {name}:.*?-->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    env = {name: value for name, value in os.environ.items() if not name.startswith("SKIALITH_")}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", found[1]],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    return outputs


def test_every_setting_is_in_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    for field in dataclasses.fields(Config):
        assert f"`{field.name}`" in text, field.name
