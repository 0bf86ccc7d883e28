"""A process of its own for a measurement: on uvloop, or on stock asyncio as if uvloop were not installed."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
Loop = Literal["uvloop", "asyncio"]
CALL_SECONDS = 300.0
LOOPS: tuple[Loop, ...] = ("uvloop", "asyncio")


class Child:
    """Runs functions of a module, one after the other, in its main thread; nothing else runs in it."""

    def __init__(self, loop: Loop = "uvloop") -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_choose, initargs=(loop,))

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """The function's result or exception."""
        return self._pool.submit(function, *args).result(CALL_SECONDS)

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _choose(loop: Loop) -> None:
    if loop == "asyncio":
        sys.modules["uvloop"] = None  # type: ignore[assignment]
    else:
        import uvloop  # noqa: F401
