"""The routes that look and change nothing: history, recorded steps, agents, traces."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from .. import trace_json
from ..awaiting import in_thread
from ..config import HISTORY_PAGE_RECORDS, MAX_EVENT_TYPE_CHARACTERS, MAX_ID_CHARACTERS
from ..history import Entry
from ..records import Position, Trace, iso, step_hash, step_key
from ..runtime import Runtime
from . import answers, requests
from .config import PAGE_BYTES, PAGE_DEFAULT, PAGE_SCANNED
from .pages import After, Limit, Time, unix_ns
from .problems import HttpProblem, documented
from .requests import AgentId, EngineOf, decoded
from .wire import AgentsAnswer, HistoryAnswer, StepAnswer, TracesAnswer

router = APIRouter(route_class=requests.Route)

EventType = Annotated[
    str | None,
    Query(
        max_length=MAX_EVENT_TYPE_CHARACTERS,
        description="Only this type: the `kind` of the payload, `event` for one without. Compared exactly.",
        examples=["thought"],
    ),
]


# ---- one agent


@router.get(
    "/agents/{agent_id}/history", response_model=HistoryAnswer, responses=documented(400, 401, 503), tags=["agent"]
)
async def history(
    agent_id: AgentId,
    engine: EngineOf,
    after: After,
    limit: Limit = PAGE_DEFAULT,
    type: EventType = None,  # noqa: A002 - the name of the query's parameter
) -> Response:
    """The agent's events, oldest first: the log and the database together, dead letters included.

    A page ends early when its payloads are large, or, with `type`, when it has looked at many events; it may be empty and
    still have `next`. An agent that never saved anything has none.
    """
    page = partial(_history, engine.runtime, agent_id, after, limit, type)
    return answers.answer(await in_thread(page))


def _history(runtime: Runtime, agent_id: str, after: Position, limit: int, event_type: str | None) -> bytes:
    at_once = min(limit + 1, HISTORY_PAGE_RECORDS) if event_type is None else HISTORY_PAGE_RECORDS
    texts: list[str] = []
    size = 0
    for scanned, entry in enumerate(runtime.history(agent_id).entries(after, at_once)):
        if len(texts) == limit or size >= PAGE_BYTES or scanned == PAGE_SCANNED:
            return answers.page("events", texts, after.cursor())
        after = entry[0].position
        if event_type in (None, entry[0].event_type):
            texts.append(_event(entry))
            size += len(texts[-1])
    return answers.page("events", texts, None)


def _event(entry: Entry) -> str:
    record, stored, dead = entry
    fields = {
        "event_id": record.record_id,
        "step_index": record.step_index,
        "type": record.event_type,
        "created_at": iso(record.created_us),
        "cursor": record.position.cursor(),
        "stored": stored,
        "dead": dead,
    }
    return answers.document(fields, payload=trace_json.shown(record))


@router.get(
    "/agents/{agent_id}/steps/{step_id}",
    response_model=StepAnswer,
    responses=documented(400, 401, 404, 503),
    tags=["agent"],
)
async def step(
    agent_id: AgentId,
    engine: EngineOf,
    step_id: Annotated[
        str,
        requests.id_in_path(
            "ask-llm#2",
            "Its name, with `#2` for the second call of it, behind the id of the step that called it and `/`.",
        ),
    ],
) -> Response:
    """What is recorded of a step: its `result`, or `error` in its place; 404 if nothing is.

    The database is always asked, because the first record of a step counts, so without it the answer is 503 unless the log
    still holds all there ever was.
    """
    return answers.answer(await in_thread(partial(_step, engine.runtime, agent_id, decoded("step_id", step_id))))


def _step(runtime: Runtime, agent_id: str, step_id: str) -> bytes:
    key = step_key(step_hash(runtime.config.namespace, agent_id), step_id)
    found = runtime.steps(agent_id).lookup(key, step_id)
    if found is None:
        raise HttpProblem(404, f"agent {agent_id!r}: no step {step_id!r} is recorded", path="step_id")
    return answers.step(step_id, found).encode()


# ---- the namespace


@router.get("/agents", response_model=AgentsAnswer, responses=documented(400, 401, 503), tags=["namespace"])
async def agents(
    engine: EngineOf,
    after: Annotated[
        str,
        Query(max_length=MAX_ID_CHARACTERS, description="An agent id: only those behind it.", examples=["my-agent"]),
    ] = "",
    prefix: Annotated[
        str,
        Query(
            max_length=MAX_ID_CHARACTERS,
            description="Only agents whose id begins with this text, which is taken as it is: no wildcards.",
            examples=["my-"],
        ),
    ] = "",
    limit: Limit = PAGE_DEFAULT,
) -> Response:
    """The agents that the database knows, ordered by the bytes of their ids.

    One whose first record is still in the log alone is not among them yet.
    """
    return answers.answer(await in_thread(partial(_agents, engine.runtime, after, prefix, limit)))


def _agents(runtime: Runtime, after: str, prefix: str, limit: int) -> bytes:
    found = runtime.store.agents(runtime.config.namespace, after=after, prefix=prefix, limit=limit + 1)
    following = found[limit - 1].agent_id if len(found) > limit else None
    return answers.page("agents", [answers.document(each.document()) for each in found[:limit]], following)


@router.get("/traces", response_model=TracesAnswer, responses=documented(400, 401, 503), tags=["namespace"])
async def traces(
    engine: EngineOf,
    after: After,
    limit: Limit = PAGE_DEFAULT,
    agent_id: Annotated[
        str | None,
        Query(min_length=1, max_length=MAX_ID_CHARACTERS, description="Only this agent's.", examples=["my-agent"]),
    ] = None,
    type: EventType = None,  # noqa: A002 - the name of the query's parameter
    since: Annotated[
        Time | None,
        Query(description="Only with `logged_at` at or behind this time.", examples=["2026-01-01T12:00:00Z"]),
    ] = None,
    until: Annotated[
        Time | None,
        Query(description="Only with `logged_at` before this time.", examples=["2026-01-02T12:00:00Z"]),
    ] = None,
) -> Response:
    """Events of all agents as the table `agent_traces` has them, oldest first by `logged_at`, the time at which the log stored
    them; `since` and `until` mean this time too.

    A trace appears here some moments after its event, and now and then one appears before others that were there already: a
    reader that follows the end begins again a little before it. A page ends early when its payloads are large, or, with
    `agent_id` and `type` together, when it has looked at many traces; it may be empty and still have `next`. While the
    namespace has its traces switched off nothing is added.
    """
    if since is not None:
        after = max(after, Position(unix_ns(since) - 1, 2**63 - 1))
    until_ns = None if until is None else unix_ns(until)
    return answers.answer(await in_thread(partial(_traces, engine.runtime, agent_id, type, after, until_ns, limit)))


def _traces(
    runtime: Runtime,
    agent_id: str | None,
    event_type: str | None,
    after: Position,
    until_ns: int | None,
    limit: int,
) -> bytes:
    found, following = runtime.store.traces(
        runtime.config.namespace,
        agent_id=agent_id,
        event_type=event_type,
        after=after,
        until_ns=until_ns,
        limit=limit,
        max_bytes=PAGE_BYTES,
        max_scanned=PAGE_SCANNED,
    )
    return answers.page("traces", list(map(_trace, found)), None if following is None else following.cursor())


def _trace(trace: Trace) -> str:
    fields = {
        "agent_id": trace.agent_id,
        "event_id": trace.event_id,
        "step_index": trace.step_index,
        "type": trace.event_type,
        "created_at": iso(trace.created_us),
        "logged_at": iso(trace.position.time_ns // 1000),
        "cursor": trace.position.cursor(),
    }
    return answers.document(fields, payload=trace.payload_json)
