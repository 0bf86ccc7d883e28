"""The routes to what the database refused: list, look, store after all, give up."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query
from starlette.responses import Response

from .. import letters
from ..awaiting import in_thread
from ..runtime import Runtime
from ..stores.base import LetterPlace
from . import answers, requests
from .config import PAGE_DEFAULT
from .pages import CURSOR, Limit, position
from .problems import HttpProblem, documented
from .requests import EngineOf
from .wire import LetterAnswer, LettersAnswer, WholeLetterAnswer

router = APIRouter(route_class=requests.Route, tags=["dead letters"])

Sink = Annotated[
    Literal["writer", "trace_ingest"],
    Path(description="Who gave it up: the first part of its id.", examples=["writer"]),
]
Key = Annotated[
    str,
    Path(
        pattern="^[0-9a-f]{32}$",
        description="The second part of its id.",
        examples=["00112233445566778899aabbccddeeff"],
    ),
]


async def _after(
    after: Annotated[
        str | None,
        Query(
            pattern=f"^{CURSOR}-[a-z_]{{1,32}}-[0-9a-f]{{32}}$",
            description="`next` of the page before: only what stands behind it.",
            examples=["1795573498000123000-1795573498000123-writer-00112233445566778899aabbccddeeff"],
        ),
    ] = None,
) -> LetterPlace | None:
    if after is None:
        return None
    _, _, sink, key = after.split("-")
    return LetterPlace(position(after), sink, bytes.fromhex(key))


After = Annotated[LetterPlace | None, Depends(_after)]


@router.get("/dead-letters", response_model=LettersAnswer, responses=documented(400, 401, 503))
async def dead_letters(engine: EngineOf, after: After, limit: Limit = PAGE_DEFAULT) -> Response:
    """Records that the database refused for their data, and messages that do not decode, oldest first, without payloads."""
    return answers.answer(await in_thread(partial(_page, engine.runtime, after, limit)))


def _page(runtime: Runtime, after: LetterPlace | None, limit: int) -> bytes:
    found, at = letters.page(runtime, after, limit)
    following = None if at is None else f"{at.position.cursor()}-{at.sink}-{at.key.hex()}"
    return answers.page("dead_letters", [answers.document(letters.document(each)) for each in found], following)


@router.get("/dead-letters/{sink}/{key}", response_model=WholeLetterAnswer, responses=documented(400, 401, 404, 503))
async def dead_letter(engine: EngineOf, sink: Sink, key: Key) -> Response:
    """One dead letter with its payload."""
    return answers.answer(await in_thread(partial(_whole, engine.runtime, sink, key)))


def _whole(runtime: Runtime, sink: str, key: str) -> bytes:
    found = _found(runtime, sink, key)[0]
    fields = {**letters.document(found), "raw_hex": found.letter.raw.hex()}
    return answers.document(fields, payload=letters.payload(found.letter)).encode()


@router.post(
    "/dead-letters/{sink}/{key}/replay",
    response_model=LetterAnswer,
    responses=documented(400, 401, 404, 422, 503),
)
async def replay(engine: EngineOf, sink: Sink, key: Key) -> Response:
    """Store it after all, when what was wrong is mended; it is no dead letter any more then. Answered with what it was."""
    return answers.answer(await in_thread(partial(_replay, engine.runtime, sink, key)))


def _replay(runtime: Runtime, sink: str, key: str) -> bytes:
    found = _found(runtime, sink, key)
    for each in found:
        letters.replay(runtime, each)
    return answers.document(letters.document(found[0])).encode()


@router.delete("/dead-letters/{sink}/{key}", status_code=204, responses=documented(400, 401, 404, 503))
async def discard(engine: EngineOf, sink: Sink, key: Key) -> Response:
    """Give it up for good: for a record this is the last copy."""
    await in_thread(partial(_discard, engine.runtime, sink, key))
    return Response(status_code=204)


def _discard(runtime: Runtime, sink: str, key: str) -> None:
    for each in _found(runtime, sink, key):
        letters.discard(runtime, each)


def _found(runtime: Runtime, sink: str, key: str) -> list[letters.Found]:
    try:
        return letters.one(runtime, sink, bytes.fromhex(key))
    except letters.NoSuchLetter as error:
        raise HttpProblem(404, str(error), path="key") from error
