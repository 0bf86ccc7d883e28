"""Lines of the NATS protocol in C, for the wire alone."""

__pyx_capi__: dict[str, object]
"""What other compiled modules take from here."""
