"""The OpenAPI document: FastAPI's, corrected where it says what is not so."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "SKIALITH_TOKEN of the sidecar, if it has one; `/health`, `/ready` and `/openapi.json` do without.",
}


class Documented(FastAPI):
    """FastAPI with what its document does not say by itself: the token, and that what is invalid is answered with 400."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            _make_whole(document)
            for path in document["paths"].values():
                for operation in path.values():
                    _correct(operation)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            document["components"]["securitySchemes"] = {"token": _TOKEN}
            document["security"] = [{"token": []}, {}]
        assert self.openapi_schema is not None
        return self.openapi_schema


def _correct(operation: dict[str, Any]) -> None:
    if "HTTPValidationError" in str(operation["responses"].get("422")):
        del operation["responses"]["422"]
    for parameter in operation.get("parameters", ()):
        # One that may be left out cannot be null for that: a header or query has no null.
        schema = parameter["schema"]
        for choice in schema.pop("anyOf", ()):
            if choice != {"type": "null"}:
                schema.update(choice)


def _make_whole(node: Any) -> None:
    """Limits of integers are written as such: as a float in JSON, 2**63 is taken for what its digits say, which is more."""
    for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        if isinstance(value, float) and value.is_integer():
            node[key] = int(value)
        elif isinstance(value, (dict, list)):
            _make_whole(value)
