"""``skialith serve`` with one route more: the same request, answered by a handler that does nothing."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from skialith.cli import main
from skialith.config import Config
from skialith.sidecar import answers, app, requests
from skialith.sidecar.config import SidecarConfig
from skialith.sidecar.requests import AgentId, EngineOf, LeaseToken
from skialith.sidecar.wire import AckAnswer, EventBody

router = APIRouter(route_class=requests.Route)
_create = app.create


@router.post("/agents/{agent_id}/empty", response_model=AckAnswer)
async def empty(
    agent_id: AgentId, body: EventBody, engine: EngineOf, request: Request, lease: LeaseToken = None
) -> Response:
    """Everything that ``save_event`` is given, and nothing done with it."""
    return answers.answer('{"seq":1795573498000123,"duplicate":false}')


def with_empty(config: Config, sidecar: SidecarConfig) -> FastAPI:
    made = _create(config, sidecar)
    made.include_router(router)
    return made


if __name__ == "__main__":
    app.create = with_empty
    main()
