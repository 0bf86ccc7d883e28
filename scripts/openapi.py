"""Writes the sidecar's OpenAPI document to sdk/typescript/openapi.json, from which the types of the TypeScript SDK are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skialith.config import load
from skialith.sidecar import app
from skialith.sidecar import config as sidecar_config

TARGET = Path(__file__).parents[1] / "sdk" / "typescript" / "openapi.json"


def document() -> dict[str, Any]:
    """The document with nothing configured."""
    return app.create(load({}), sidecar_config.load({})).openapi()


if __name__ == "__main__":
    TARGET.write_text(json.dumps(document(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
