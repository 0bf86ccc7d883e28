"""The routes by which agents write and go on: resume, events, checkpoint, state."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from .. import awaiting, payloads
from ..base_agent import checkpoint_record, event_record
from ..config import MAX_ID_CHARACTERS
from ..errors import InvalidArgument, InvalidPayload
from ..history import Found
from ..records import Ack, Codec, Record, retry_id, step_hash, step_key
from ..steps import payload, step_record
from ..wal.lane import LaneName, Owner
from . import answers, requests
from .engine import Engine
from .problems import documented
from .requests import AgentId, EngineOf, LeaseToken, RequiredLease
from .wire import (
    AckAnswer,
    BatchAnswer,
    BatchBody,
    CheckpointBody,
    EventBody,
    Lease,
    ResumeAnswer,
    ResumeBody,
    StateAnswer,
    StepAckAnswer,
    StepBody,
)

router = APIRouter(route_class=requests.Route)

_READ = documented(400, 401, 503)
_WRITE = documented(400, 401, 409, 413, 415, 503, 507)


@router.post("/agents/{agent_id}/events", response_model=AckAnswer, responses=_WRITE, tags=["agent"])
async def save_event(
    agent_id: AgentId, body: EventBody, engine: EngineOf, request: Request, lease: LeaseToken = None
) -> Response:
    """Append one event; answered when it is durable."""
    record = _event(engine, agent_id, body)
    ack = await engine.append(_lane(agent_id, lease), record, requests.has_gone(request), "event")
    return answers.answer(_ack(ack))


@router.post("/agents/{agent_id}/events/batch", response_model=BatchAnswer, responses=_WRITE, tags=["agent"])
async def save_events(
    agent_id: AgentId, body: BatchBody, engine: EngineOf, request: Request, lease: LeaseToken = None
) -> Response:
    """Append events in order; answered when all of them are durable. Sending all again is safe."""
    records = [_event(engine, agent_id, event, f"events[{n}].") for n, event in enumerate(body.events)]
    acks = await engine.append_all(agent_id, _lane(agent_id, lease), records, requests.has_gone(request))
    return answers.answer(f'{{"acks":[{",".join(map(_ack, acks))}]}}')


@router.post("/agents/{agent_id}/checkpoint", response_model=AckAnswer, responses=_WRITE, tags=["agent"])
async def checkpoint(
    agent_id: AgentId,
    body: CheckpointBody,
    engine: EngineOf,
    request: Request,
    lease: LeaseToken = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=MAX_ID_CHARACTERS,
            description="Any text that a retry of the same call repeats, and no other call: within half a minute it is written "
            "once, unless the log's server was restarted meanwhile. Without it a retry may write the checkpoint twice, which "
            "does no harm.",
        ),
    ] = None,
) -> Response:
    """Append the agent's state; answered when it is durable. The last one counts, whatever its step."""
    record = checkpoint_record(engine.config.namespace, agent_id, body.step_index, _pack(engine, body.state, "state"))
    message_id = None if idempotency_key is None else retry_id(record, idempotency_key)
    ack = await engine.append(_lane(agent_id, lease), record, requests.has_gone(request), "checkpoint", message_id)
    return answers.answer(_ack(ack))


@router.get("/agents/{agent_id}/state", response_model=StateAnswer, responses=_READ, tags=["agent"])
async def state(agent_id: AgentId, engine: EngineOf) -> Response:
    """The last checkpoint, read only: nothing is claimed."""
    return await _state(agent_id, await engine.newest_checkpoint(agent_id))


@router.post("/agents/{agent_id}/resume", response_model=ResumeAnswer, responses=_READ, tags=["agent"])
async def resume(agent_id: AgentId, engine: EngineOf, request: Request, body: ResumeBody | None = None) -> Response:
    """Own the agent and get its last checkpoint.

    From here on writes that carry an older lease are refused with 409, wherever they come from. The lease is good at every
    worker of every sidecar of the log, also after a restart.
    """
    named = body.owner if body is not None else ""
    owner = await engine.claim(agent_id, named or requests.client_name(request), requests.has_gone(request))
    found = await engine.newest_checkpoint(agent_id)
    lease = Lease(token=owner.token, seconds=engine.config.lease_seconds)
    return await _state(agent_id, found, lease=lease.model_dump())


@router.delete("/agents/{agent_id}/lease", status_code=204, responses=documented(400, 401, 503), tags=["agent"])
async def give_up(agent_id: AgentId, engine: EngineOf, lease: RequiredLease) -> Response:
    """Give the agent up. Answered alike when it has another owner by now."""
    await engine.disown(Owner(agent_id, lease))
    return Response(status_code=204)


@router.post("/agents/{agent_id}/steps", response_model=StepAckAnswer, responses=_WRITE, tags=["agent"])
async def record_step(
    agent_id: AgentId, body: StepBody, engine: EngineOf, request: Request, lease: LeaseToken = None
) -> Response:
    """Record the outcome of a step; answered when it is durable.

    Look for what is recorded before the step's function is called. If another run was faster, `recorded` is what it recorded,
    and that counts.
    """
    record = _step(engine, agent_id, body)
    ack = await engine.append(_lane(agent_id, lease), record, requests.has_gone(request), "step")
    recorded = "null"
    if ack.duplicate:
        found = await awaiting.in_thread(partial(engine.runtime.steps(agent_id).find, record.key, body.step_id))
        recorded = answers.step(body.step_id, found)
    return answers.answer(answers.document({"seq": ack.seq, "duplicate": ack.duplicate}, recorded=recorded))


# ---- records of requests


def _lane(agent_id: str, lease: str | None) -> LaneName:
    return agent_id if lease is None else Owner(agent_id, lease)


def _event(engine: Engine, agent_id: str, body: EventBody, where: str = "") -> Record:
    packed = _pack(engine, body.payload, f"{where}payload")
    return event_record(engine.config.namespace, agent_id, body.event_id, body.step_index, body.payload, packed)


def _step(engine: Engine, agent_id: str, body: StepBody) -> Record:
    if ("result" in body.model_fields_set) == (body.error is not None):
        raise InvalidArgument("result: a step has either `result` or `error`", argument="result")
    outcome, value = ("error", body.error.model_dump()) if body.error is not None else ("result", body.result)
    data = payload(body.name, body.n, body.function, outcome, value)
    namespace = engine.config.namespace
    key = step_key(step_hash(namespace, agent_id), body.step_id)
    try:
        packed = _pack(engine, data, "")
    except InvalidPayload as error:
        path = error.path.lstrip(".")
        raise InvalidPayload(str(error).lstrip("."), argument=outcome, path=path) from error
    return step_record(namespace, agent_id, body.step_id, key, body.step_index, packed)


def _pack(engine: Engine, data: Any, argument: str) -> tuple[Codec, bytes]:
    return payloads.plain(data, argument, engine.config.max_record_bytes)


# ---- answers


def _ack(ack: Ack) -> str:
    return f'{{"seq":{ack.seq},"duplicate":{"true" if ack.duplicate else "false"}}}'


async def _state(agent_id: str, found: Found, **more: Any) -> Response:
    record, source, database_ok = found
    fields = {
        "agent_id": agent_id,
        "step_index": 0 if record is None else record.step_index,
        "is_new": record is None,
        "source": source,
        "database_ok": database_ok,
        **more,
    }
    if record is None:
        return answers.answer(answers.document(fields, state="{}"))
    return await answers.of_record(fields, "state", record)
