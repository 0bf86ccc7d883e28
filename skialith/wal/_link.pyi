"""One TCP connection in C: frames go out whole from any thread, bytes come in for whoever waits."""

from collections.abc import Callable
from typing import final

@final
class Link:
    """One connection to a server, with what waits to be sent and what was received of an unfinished frame.

    ``fd``: a connected, non-blocking socket that belongs to the link from now on; or -1 with ``pass_on``, which is
    called (on any thread, at most once until :meth:`take_out`) when there is something to be taken out: TLS.
    """

    epoch: int
    broken: bool
    last_received: float

    def __init__(self, epoch: int, fd: int, pass_on: Callable[[], object] | None = None) -> None: ...
    @property
    def poll_fd(self) -> int:
        """The descriptor that is readable when the loop has something to do here; -1 under TLS."""

    def take_out(self) -> bytes:
        """All that waits to be sent; the caller sends it."""

    def hand_over(self) -> int:
        """The socket, which is the caller's from now on; nothing may be waiting to be sent."""

    def end(self) -> None:
        """Shut the connection down. The descriptor is closed when no thread uses it any more."""

__pyx_capi__: dict[str, object]
"""What other compiled modules take from here."""
