"""Skialith: the write-ahead log for AI agents."""

from .agent import SkialithAgent
from .aio import AsyncSkialithAgent
from .errors import (
    AgentFenced,
    BatchFailed,
    BlockingCallInEventLoop,
    Closed,
    ConfigurationError,
    FlushTimeout,
    InvalidArgument,
    InvalidPayload,
    RecordTooLarge,
    SkialithError,
    StoreDataError,
    StoreError,
    StoreUnavailable,
    UnsupportedEnvironment,
    WalError,
    WalFull,
    WalRejected,
    WalUnavailable,
)
from .records import Ack, AgentState, Event, Position

__version__ = "0.1.0"

__all__ = [
    "Ack",
    "AgentFenced",
    "AgentState",
    "AsyncSkialithAgent",
    "BatchFailed",
    "BlockingCallInEventLoop",
    "Closed",
    "ConfigurationError",
    "Event",
    "FlushTimeout",
    "InvalidArgument",
    "InvalidPayload",
    "Position",
    "RecordTooLarge",
    "SkialithAgent",
    "SkialithError",
    "StoreDataError",
    "StoreError",
    "StoreUnavailable",
    "UnsupportedEnvironment",
    "WalError",
    "WalFull",
    "WalRejected",
    "WalUnavailable",
]
