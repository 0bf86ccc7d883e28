"""Finds what in a payload cannot be carried, and the path to it; runs only after encoding has failed."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable, Iterator
from typing import Any

from .config import MAX_PAYLOAD_DEPTH

Fault = tuple[str, str]
"""``("data.messages[3].content", "set is not serializable")``"""

Pack = Callable[[Any], bytes]
Unpack = Callable[[bytes], Any]
Child = tuple[str, Any]

_PATH_CHARACTERS = 500
_KEY_CHARACTERS = 80


def find(value: Any, argument: str, pack: Pack, unpack: Unpack) -> Fault | None:
    """The first fault in ``value``, depth first, or None. ``pack`` and ``unpack`` are the ones that failed.

    The walk keeps its own stack, so it is safe at any nesting, and it packs and reads leaf by leaf, so that ormsgpack
    alone decides what is a fault.
    """
    open_ids: dict[int, str] = {}
    stack: list[tuple[str, Any, Iterator[Child] | None]] = [(argument, value, None)]
    while stack:
        path, node, rest = stack.pop()
        if rest is None:
            if id(node) in open_ids:
                return _cut(path), f"holds itself: it is the same object as {_cut(open_ids[id(node)])}"
            children = _children(path, node)
            if children is None:
                reason = _leaf_fault(node, pack, unpack)
                if reason is not None:
                    return _cut(path), reason
                continue
            if len(open_ids) >= MAX_PAYLOAD_DEPTH:
                return _cut(path), f"nested deeper than {MAX_PAYLOAD_DEPTH} levels"
            fault = _key_fault(path, node, pack, unpack)
            if fault is not None:
                return fault
            open_ids[id(node)] = path
            rest = iter(children)
        child = next(rest, None)
        if child is not None:
            stack.append((path, node, rest))
            stack.append((*child, None))
            continue
        del open_ids[id(node)]
    return None


def _children(path: str, node: Any) -> list[Child] | None:
    """The parts ormsgpack would look into, None if it takes ``node`` as one."""
    if isinstance(node, dict):
        return [(path + _step(key), value) for key, value in node.items()]
    if isinstance(node, list) or type(node) is tuple:
        return [(f"{path}[{index}]", value) for index, value in enumerate(node)]
    if isinstance(node, enum.Enum):
        return [(f"{path}.value", node.value)]
    try:
        fields = fields_of(node)
    except AttributeError:
        return None  # a field that was never set: the object itself is the fault
    return None if fields is None else [(f"{path}.{name}", value) for name, value in fields.items()]


def fields_of(node: Any) -> dict[str, Any] | None:
    """What is carried of a dataclass or a pydantic model, by name; None for anything else.

    Raises ``AttributeError`` for a field that was never set.
    """
    if isinstance(node, type):
        return None
    if dataclasses.is_dataclass(node):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node) if field.name[0] != "_"}
    if hasattr(type(node), "__pydantic_validator__"):
        return {**vars(node), **(getattr(node, "__pydantic_extra__", None) or {})}
    return None


def _leaf_fault(node: Any, pack: Pack, unpack: Unpack) -> str | None:
    try:
        unpack(pack(node))
    except (TypeError, ValueError) as error:
        return _reason(node, error)
    return None


def _reason(node: Any, error: Exception) -> str:
    if isinstance(node, int):
        return "int is over 64 bits"
    if isinstance(node, str):
        at = next((i for i, c in enumerate(node) if "\ud800" <= c <= "\udfff"), -1)
        return f"text holds a lone surrogate at index {at}"
    name = type(node).__name__
    if name == "ndarray":
        name = f"ndarray of {node.dtype}"
    if str(error).startswith("Type is not msgpack serializable"):
        return f"{name} is not serializable"
    return f"{name} is not serializable ({error})"


def _key_fault(path: str, node: Any, pack: Pack, unpack: Unpack) -> Fault | None:
    """A key that cannot be a key, or two that become the same key."""
    if not isinstance(node, dict):
        return None
    seen: dict[Any, Any] = {}
    for key in node:
        if type(key) is str:
            reason = _leaf_fault(key, pack, unpack)
            if reason is not None:
                return _cut(path), f"a key {reason.removeprefix('text ')}: {_short(key)}"
            converted: Any = key
        else:
            try:
                (converted,) = unpack(pack({key: None}))
            except (TypeError, ValueError) as error:
                why = "" if str(error).startswith("Dict key must") else f" ({error})"
                return _cut(path), f"{type(key).__name__} cannot be a key{why}: {_short(key)}"
        if converted in seen:
            return _cut(path), f"keys {_short(seen[converted])} and {_short(key)} both become {_short(converted)}"
        seen[converted] = key
    return None


def _step(key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f".{str.__str__(key)}"
    return f"[{_short(key, quote=True)}]"


def _short(value: Any, *, quote: bool = False) -> str:
    try:
        text = (
            json.dumps(value, ensure_ascii=not value.isprintable()) if quote and isinstance(value, str) else repr(value)
        )
    except Exception:  # noqa: BLE001 - a foreign __repr__ must not replace the fault that is being reported
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _KEY_CHARACTERS else f"{text[: _KEY_CHARACTERS - 4]}...{text[-1]}"


def _cut(path: str) -> str:
    if len(path) <= _PATH_CHARACTERS:
        return path
    half = _PATH_CHARACTERS // 2
    return f"{path[:half]}...{path[-half:]}"
