"""The runtime of an object that lives on in forked children: opened once in each process that uses it."""

from __future__ import annotations

from . import runtime
from .config import Config
from .errors import Closed
from .runtime import Runtime


class _Use:
    """One process's use of a runtime."""

    def __init__(self, engine: Runtime) -> None:
        self.engine = engine


class Door:
    """The runtime of a checkpointer and its clones, opened once in each process that uses it. Any thread may."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._uses: dict[int, _Use] = {}
        self._closed = False

    def open(self) -> Runtime:
        if self._closed:
            raise Closed("the checkpointer was used after close(); nothing was sent. Make a new SkialithCheckpointer")
        use = self._uses.get(runtime.process_id())
        if use is None:
            mine = _Use(runtime.acquire(self._config))
            # Without a lock, which a fork could leave locked for ever.
            use = self._uses.setdefault(runtime.process_id(), mine)
            if use is not mine:
                mine.engine.release()
        use.engine.check_open()
        return use.engine

    def close(self) -> None:
        self._closed = True
        use = self._uses.pop(runtime.process_id(), None)
        if use is not None and not use.engine.closed:
            use.engine.release()
