"""What goes over HTTP: the bodies of requests and answers, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..config import MAX_ID_CHARACTERS
from .config import BATCH_EVENTS, OWNER_CHARACTERS


def _integer(value: Any) -> Any:
    """1.0 is an integer in JSON, and some languages write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


StepIndex = Annotated[
    int,
    # FastAPI makes a float of it, which for 2**63 - 1 is another number.
    Field(strict=True, ge=0, lt=2**63, description="Step of the agent, from 0 on.", examples=[3]),
    BeforeValidator(_integer),
]
RecordId = Annotated[
    str,
    Field(
        strict=True, min_length=1, max_length=MAX_ID_CHARACTERS, description="Any Unicode text.", examples=["step-1"]
    ),
]
Payload = Annotated[
    Any,
    Field(
        description="Any JSON value; integers of at most 64 bits. In answers, what JSON cannot hold (bytes, NaN, ... saved from "
        "Python) is an object that says so: `skialith_base64` or `skialith_omitted`.",
        examples=[{"kind": "thought", "text": "What is known so far?"}],
    ),
]
Cursor = Annotated[
    str | None, Field(description="Give it as `after` for the next page; null when there is none.", examples=[None])
]


class Body(BaseModel):
    """A request's body: a field that is not known is refused."""

    model_config = ConfigDict(extra="forbid")


# ---- writing


class EventBody(Body):
    """One event. The first one saved under its id wins for ever, so sending it again is always safe."""

    event_id: RecordId
    payload: Payload
    step_index: StepIndex = 0


class BatchBody(Body):
    """Events of one agent, appended in this order."""

    events: Annotated[list[EventBody], Field(min_length=1, max_length=BATCH_EVENTS)]


class CheckpointBody(Body):
    """The agent's whole state; the last one counts."""

    step_index: StepIndex
    state: Annotated[Payload, Field(examples=[{"messages": ["What is known so far?"]}])]


class ResumeBody(Body):
    """Who takes the agent over."""

    owner: Annotated[
        str,
        Field(max_length=OWNER_CHARACTERS, description="Named to whoever is replaced.", examples=["worker-7 pid 4242"]),
    ] = ""


class StepError(Body):
    """The error of a step that was recorded as failed."""

    type: Annotated[str, Field(strict=True, max_length=MAX_ID_CHARACTERS, examples=["TypeError"])]
    message: Annotated[str, Field(strict=True, examples=["no such city"])]


class StepBody(Body):
    """The outcome of a step: `result`, or `error` in its place. The first one recorded under its id wins for ever."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["result"], "properties": {"error": {"type": "null"}}},
                {"required": ["error"], "properties": {"error": {"type": "object"}}, "not": {"required": ["result"]}},
            ]
        }
    )

    step_id: RecordId
    name: Annotated[
        str, Field(strict=True, min_length=1, max_length=MAX_ID_CHARACTERS, description="Without its place.")
    ]
    n: Annotated[
        int,
        Field(strict=True, ge=1, le=2**31, description="The how manyth call of this name it is."),
        BeforeValidator(_integer),
    ] = 1
    function: Annotated[str, Field(strict=True, max_length=1000, description="Name of the function that was called.")]
    result: Payload = None
    error: StepError | None = None
    step_index: StepIndex = 0


class AckAnswer(BaseModel):
    """The record is durable."""

    seq: Annotated[int, Field(description="Its sequence in the log.", examples=[1795573498000123])]
    duplicate: Annotated[
        bool, Field(description="The log held this id already, within half a minute (best effort).", examples=[False])
    ]


class BatchAnswer(BaseModel):
    """All of them are durable."""

    acks: list[AckAnswer]


# ---- an agent


class Lease(BaseModel):
    """Ownership of an agent."""

    token: Annotated[
        str, Field(description="Writes carry it as `Skialith-Lease`.", examples=["6f0c1e0d5a3b4c2d9e8f7a6b5c4d3e2f"])
    ]
    seconds: Annotated[
        float,
        Field(description="How long it lives at least without a write, even if no sidecar runs.", examples=[3600.0]),
    ]


class StateAnswer(BaseModel):
    """The last checkpoint of an agent; a new agent has step 0, `{}` and `is_new`."""

    agent_id: Annotated[str, Field(examples=["my-agent"])]
    step_index: StepIndex
    state: Annotated[Payload, Field(examples=[{"messages": ["What is known so far?"]}])]
    is_new: Annotated[bool, Field(examples=[False])]
    source: Annotated[Literal["wal", "database", "none"], Field(description="Where it was read.", examples=["wal"])]
    database_ok: Annotated[
        bool, Field(description="False if the database did not answer and the log alone was read.", examples=[True])
    ]


class ResumeAnswer(StateAnswer):
    """The last checkpoint, and the lease of its new owner."""

    lease: Lease


class EventAnswer(BaseModel):
    """One saved event."""

    event_id: Annotated[str, Field(examples=["step-1"])]
    step_index: StepIndex
    type: Annotated[str, Field(description="The payload's `kind`, or `event`.", examples=["thought"])]
    created_at: Annotated[
        str,
        Field(
            description="By the clock of the sidecar or agent, RFC 3339.", examples=["2026-01-01T12:00:00.000000+00:00"]
        ),
    ]
    cursor: Annotated[str, Field(examples=["1795573498000123000-1795573498000123"])]
    stored: Annotated[bool, Field(description="Whether the database has it already.", examples=[True])]
    dead: Annotated[bool, Field(description="Whether it is a dead letter.", examples=[False])]
    payload: Payload


class HistoryAnswer(BaseModel):
    """One page of an agent's events, oldest first."""

    events: list[EventAnswer]
    next: Cursor


class StepAnswer(BaseModel):
    """A recorded step: `result`, or `error` in its place."""

    step_id: Annotated[str, Field(examples=["ask-llm#2"])]
    function: Annotated[str, Field(examples=["askModel"])]
    result: Payload = None
    error: StepError | None = None


class StepAckAnswer(AckAnswer):
    """The step is recorded."""

    recorded: Annotated[
        StepAnswer | None, Field(description="What stood there before, if `duplicate`: it counts.", examples=[None])
    ] = None


# ---- looking


class AgentAnswer(BaseModel):
    """One agent as the database knows it."""

    agent_id: Annotated[str, Field(examples=["my-agent"])]
    events: Annotated[int, Field(examples=[12])]
    checkpoints: Annotated[int, Field(examples=[4])]
    step_index: StepIndex
    last_at: Annotated[
        str, Field(description="When the log stored its last record.", examples=["2026-01-01T12:00:00.000000+00:00"])
    ]


class AgentsAnswer(BaseModel):
    """One page of agents, ordered by the bytes of their ids."""

    agents: list[AgentAnswer]
    next: Cursor


class TraceAnswer(BaseModel):
    """One event as `agent_traces` has it."""

    agent_id: Annotated[str, Field(examples=["my-agent"])]
    event_id: Annotated[str, Field(examples=["step-1"])]
    step_index: StepIndex
    type: Annotated[str, Field(examples=["thought"])]
    created_at: Annotated[str, Field(examples=["2026-01-01T12:00:00.000000+00:00"])]
    logged_at: Annotated[
        str, Field(description="When the log stored it.", examples=["2026-01-01T12:00:00.000000+00:00"])
    ]
    cursor: Annotated[str, Field(examples=["1795573498000123000-1795573498000123"])]
    payload: Payload


class TracesAnswer(BaseModel):
    """One page of traces, oldest first."""

    traces: list[TraceAnswer]
    next: Cursor


class LetterAnswer(BaseModel):
    """A record that the database refused for its data, or a message that does not decode."""

    id: Annotated[str, Field(examples=["writer/00112233445566778899aabbccddeeff"])]
    kept_in: Literal["table", "stream"]
    sink: Annotated[str, Field(examples=["writer"])]
    agent_id: Annotated[str | None, Field(examples=["my-agent"])]
    kind: Annotated[str | None, Field(examples=["event"])]
    event_id: Annotated[str | None, Field(examples=["step-1"])]
    step_index: Annotated[int | None, Field(examples=[3])]
    cursor: Annotated[str, Field(examples=["1795573498000123000-1795573498000123"])]
    error: Annotated[str, Field(examples=["Data too long for column"])]
    error_code: Annotated[int, Field(examples=[1406])]
    given_up_at: Annotated[str, Field(examples=["2026-01-01T12:00:00.000000+00:00"])]
    decodes: Annotated[bool, Field(description="If not, it cannot be replayed.", examples=[True])]


class LettersAnswer(BaseModel):
    """One page of dead letters, oldest first."""

    dead_letters: list[LetterAnswer]
    next: Cursor


class WholeLetterAnswer(LetterAnswer):
    """One dead letter with its payload."""

    payload: Payload
    raw_hex: Annotated[str, Field(description="The message as it stood in the log.", examples=["9a01"])]


# ---- how it is


class HealthAnswer(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: Annotated[str, Field(examples=["0.1.0"])]


class Check(BaseModel):
    """One thing that must be well for the sidecar to be ready."""

    name: Annotated[str, Field(examples=["log"])]
    ok: Annotated[bool, Field(examples=[True])]
    detail: Annotated[str, Field(examples=["12 of 8192 MiB used"])]


class ReadyAnswer(BaseModel):
    """Whether the sidecar can do its work now."""

    ready: Annotated[bool, Field(examples=[True])]
    checks: list[Check]


class Problem(BaseModel):
    """An error, RFC 9457 (`application/problem+json`). Fields that say nothing are left out."""

    type: Annotated[str, Field(description="Names the kind of error.", examples=["urn:skialith:problem:fenced"])]
    title: Annotated[str, Field(examples=["Agent fenced"])]
    status: Annotated[int, Field(examples=[409])]
    detail: Annotated[str, Field(description="What happened, to what, and what to do.")]
    outcome: Annotated[
        Literal["not_written", "unknown", "durable"],
        Field(description="What became of the record.", examples=["not_written"]),
    ]
    retryable: Annotated[bool, Field(description="Whether the same request may succeed later.", examples=[False])]
    path: Annotated[str | None, Field(description="The bad value.", examples=["payload.messages[3].content"])] = None
    limit: Annotated[int | None, Field(description="The limit that was passed, bytes.")] = None
    size: Annotated[int | None, Field(description="What passed it, bytes.")] = None
    owner: Annotated[str | None, Field(description="The new owner; empty if the lease expired.")] = None
    failed: Annotated[int | None, Field(description="Of a batch: index of the first event that is not durable.")] = None
    acks: Annotated[list[AckAnswer] | None, Field(description="Of a batch: one for each event that is durable.")] = None
