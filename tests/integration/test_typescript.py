"""The TypeScript SDK: its document is the sidecar's, and npm installs, builds, checks and tests it here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..fixtures import openapi
from ..fixtures.command import environment

PACKAGE = Path(__file__).parents[2] / "sdk" / "typescript"
SOURCES = sorted(
    path
    for folder in ("src", "test", "scripts", "examples")
    for path in (PACKAGE / folder).iterdir()
    if path.suffix in (".ts", ".mjs") and not path.name.endswith(".d.ts")
)
LONGEST_FILE = 400
STEP_SECONDS = 240
"""How long npm may take for one of its steps on a busy machine."""


def test_the_openapi_document_is_the_sidecars() -> None:
    kept = json.loads(openapi.TARGET.read_text(encoding="utf-8"))
    assert kept == openapi.document(), (
        "the sidecar's API changed: run `.venv/bin/python -m tests.fixtures.openapi`, then `npm run types` in sdk/typescript"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_file_opens_with_a_sentence_and_is_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if not line.startswith("///"))
    assert first.startswith("// ") and first.rstrip().endswith(".")
    assert len(lines) <= LONGEST_FILE


@pytest.mark.timeout(600)
def test_npm_builds_and_tests_the_package() -> None:
    """One test, because all of it works on one folder."""
    missing = _missing()
    if missing is not None:
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    for step in (["ci", "--prefer-offline"], ["test"]):  # the tests build and check the types first
        code, said = _npm(*step)
        assert code == 0, f"npm {' '.join(step)} in {PACKAGE}:\n{said}"


def _missing() -> str | None:
    """What this machine lacks, in one line."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return "the TypeScript SDK is not tested: it needs Node 20 or newer, with npm"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 20:
        return f"the TypeScript SDK is not tested: it needs Node 20 or newer, and this is {version}"
    return None


def _npm(*arguments: str) -> tuple[int, str]:
    """Exit code and output; whatever it started is ended with it."""
    process = subprocess.Popen(
        ["npm", "--no-audit", "--no-fund", *arguments],
        cwd=PACKAGE,
        env=environment(SKIALITH_PYTHON=sys.executable),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"npm {' '.join(arguments)} took more than {STEP_SECONDS} s:\n{said}")
    return process.returncode, said
