"""The README's quickstart runs as it stands, and its table of settings is complete."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from skialith.config import Config
from tests.fixtures.sidecar import sidecar

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def example(name: str) -> str:
    """The code below the README's comment of this name."""
    found = re.search(rf"<!-- {name}:.*?-->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def run(directory: Path, *arguments: str) -> list[str]:
    """The lines that Python prints, with nothing configured."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SKIALITH_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_quickstart_runs_twice(tmp_path: Path) -> None:
    outputs = [run(tmp_path, "-c", example("quickstart")) for _ in range(2)]
    assert outputs[0][1:] == [
        "thought step-1 {'kind': 'thought', 'text': 'What is known so far?'}",
        "tool_call tool-1 {'kind': 'tool_call', 'name': 'search', 'q': 'write-ahead log'}",
        "observation seen-1 {'kind': 'observation', 'hits': 3}",
    ]
    assert outputs[1][1:] == outputs[0][1:]


def test_the_steps_are_called_once(tmp_path: Path) -> None:
    first, second = [run(tmp_path, "-c", example("steps")) for _ in range(2)]
    last = "{'role': 'assistant', 'content': 'TWO'} ['write-ahead log', 3]"
    assert first == ["asked hello 32", "asked one 32", "asked two 32", last]
    assert second == [last]


def test_the_http_example(tmp_path: Path) -> None:
    """But for the port, which may be taken."""
    found = re.search(r"<!-- http:.*?-->\n```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    with sidecar(cwd=tmp_path) as made:
        script = found[1].replace("127.0.0.1:7420", f"127.0.0.1:{made.port}")
        done = subprocess.run(
            ["sh", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        decoder, text, answers = json.JSONDecoder(), done.stdout, []
        while text:
            answer, end = decoder.raw_decode(text)
            answers.append(answer)
            text = text[end:]
    event, checkpoint, state, history = answers
    assert checkpoint["seq"] > event["seq"]
    assert (state["step_index"], state["state"]) == (1, {"messages": ["..."]})
    assert [one["payload"] for one in history["events"]] == [{"kind": "thought", "text": "..."}]


SEED = """\
from skialith import SkialithAgent
with SkialithAgent(agent_id="my-agent") as agent:
    state = agent.resume()
    agent.checkpoint(
        step=state.step_index,
        data={"messages": messages}
    )
    agent.save_event("step-1", {
        "kind": "thought", "text": "..."
    })
"""
"""The lines of the document that Skialith grew from, for those who do not await."""


def test_the_seeds_lines_run_without_async(tmp_path: Path) -> None:
    code = "messages = ['hi']\n" + SEED + "print(state.step_index, state.data)"
    assert [run(tmp_path, "-c", code) for _ in range(2)] == [["0 {}"], ["0 {'messages': ['hi']}"]]


def test_the_langgraph_example_runs_twice(tmp_path: Path) -> None:
    outputs = [run(tmp_path, "-c", example("langgraph")) for _ in range(2)]
    assert outputs == [["['a draft', 'yes']"], ["['a draft', 'yes', 'a draft', 'yes']"]]


def test_the_asyncio_example_runs_twice(tmp_path: Path) -> None:
    outputs = [run(tmp_path, "-c", example("asyncio")) for _ in range(2)]
    assert outputs == [[f"tool-{n} {n}" for n in range(10)]] * 2


def test_the_async_program_goes_on_where_it_stopped(tmp_path: Path) -> None:
    program = str(ROOT / "examples" / "async_agent.py")
    first, second = run(tmp_path, program), run(tmp_path, program)
    assert first[0] == "begins at step 0 of 3" and second[0] == "begins at step 3 of 3"
    assert [line for line in first if "is durable" in line] and not [line for line in second if "is durable" in line]
    events = [line for line in first if line[0].isdigit()]
    assert len(events) == 9 and second[1:] == events


def test_every_setting_is_in_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    for field in dataclasses.fields(Config):
        assert f"`{field.name}`" in text, field.name
