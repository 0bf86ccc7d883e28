"""The OpenAPI document held against a running sidecar by schemathesis, with what it allows and with what it does not."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.command import environment
from tests.fixtures.sidecar import Sidecar, sidecar

ROOT = Path(__file__).parents[2]
EXAMPLES = 15
"""Of each operation in each phase, at most."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with sidecar(
        cwd=tmp_path_factory.mktemp("sidecar"), settings={"SKIALITH_WAL_BYTES": str(256 * 1024 * 1024)}
    ) as made:
        yield made


@pytest.mark.timeout(240)
def test_it_answers_as_its_document_says(served: Sidecar, tmp_path: Path) -> None:
    """All of schemathesis's checks, and ours: every error is problem JSON."""
    seed = os.environ.get("SKIALITH_RUN_SEED") or str(random.SystemRandom().randrange(1 << 32))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
            *("--seed", seed, "--max-examples", str(EXAMPLES), "--mode", "all", "--checks", "all"),
            *("--phases", "examples,coverage,fuzzing,stateful", "--generation-database", "none", "--no-color"),
        ],
        cwd=tmp_path,
        env=environment(SCHEMATHESIS_HOOKS="tests.fixtures.schema_hooks"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    said = done.stdout + done.stderr
    operations, tested = (int(found) for found in _numbers(r"Selected: (\d+)/\d+\s+Tested: (\d+)", said))
    cases, problems = (
        int(found) for found in (*_numbers(r"(\d+) generated", said), *_numbers(r"(\d+) problems", said))
    )
    print(f"schemathesis: seed {seed}, {operations} operations, {cases} cases, of which {problems} ended in a problem")
    assert done.returncode == 0, said
    assert operations == tested == len(list(_operations(served)))
    assert cases > 20 * operations and problems > 5 * operations
    assert "Traceback" not in served.log, served.log


def _numbers(pattern: str, said: str) -> tuple[str, ...]:
    found = re.search(pattern, said)
    assert found is not None, said
    return found.groups()


def _operations(served: Sidecar) -> Iterator[tuple[str, str]]:
    for path, methods in served.client().get("/openapi.json").json()["paths"].items():
        for method in methods:
            yield path, method.upper()


def test_other_methods_are_refused_with_a_problem(served: Sidecar) -> None:
    known = set(_operations(served))
    filled = {"agent_id": "a", "step_id": "s", "sink": "writer", "key": "0" * 32}
    for path in {path for path, _ in known}:
        allowed = {method for method in METHODS if (path, method) in known}
        for method in set(METHODS) - allowed:
            answer = served.client().request(method, path.format(**filled))
            assert answer.status_code == 405, (method, path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["type"] == "urn:skialith:problem:method-not-allowed"
            assert allowed <= set(re.split(", *", answer.headers["allow"])), (method, path, answer.headers["allow"])
