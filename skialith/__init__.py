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
    RecordsLost,
    RecordTooLarge,
    RunEnded,
    SkialithError,
    StepFailed,
    StepMismatch,
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
from .steps import StepContext, current_step

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
    "RecordsLost",
    "RunEnded",
    "SkialithAgent",
    "SkialithError",
    "StepContext",
    "StepFailed",
    "StepMismatch",
    "StoreDataError",
    "StoreError",
    "StoreUnavailable",
    "UnsupportedEnvironment",
    "WalError",
    "WalFull",
    "WalRejected",
    "WalUnavailable",
    "current_step",
]
