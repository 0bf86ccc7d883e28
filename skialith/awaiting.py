"""Temporary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from .records import Ack, Record
from .runtime import Runtime

T = TypeVar("T")


async def in_thread(
    call: Callable[[], T],
    seconds: float | None = None,  # noqa: ARG001
) -> T:
    return await asyncio.to_thread(call)


async def append(engine: Runtime, record: Record, deadline: float) -> Ack:
    return await asyncio.to_thread(engine.wal.log.append_one, record, deadline)
