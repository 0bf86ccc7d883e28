"""The engine behind the HTTP API: the process's runtime, awaited."""

from __future__ import annotations

import time
from dataclasses import replace

from ..awaiting import in_thread
from ..config import Config
from ..errors import Closed
from ..runtime import Runtime, acquire
from .config import SidecarConfig


class Engine:
    """One runtime for all requests of a process."""

    def __init__(self, config: Config, sidecar: SidecarConfig) -> None:
        self.config = replace(config, writer="on")
        self.sidecar = sidecar
        self._runtime: Runtime | None = None

    async def open(self) -> None:
        """Connect and start the writer. Raises ``ConfigurationError`` or ``WalUnavailable``."""
        self._runtime = await in_thread(lambda: acquire(self.config))

    async def close(self) -> None:
        """Flush (bounded), stop the writer, disconnect; leases stay with their owners."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await in_thread(runtime.release)

    @property
    def runtime(self) -> Runtime:
        """Raises ``Closed`` before the server has started and when it ends."""
        if self._runtime is None:
            raise Closed("the sidecar is not open; nothing was sent")
        return self._runtime

    def deadline(self) -> float:
        """When a call that begins now gives up, ``time.monotonic()``."""
        return time.monotonic() + self.config.timeout
