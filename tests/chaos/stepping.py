"""A program of steps for children that are killed, and the verdict on all their runs from outside evidence only."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from skialith import AgentFenced, RunEnded, SkialithAgent, SkialithError, current_step

from .checker import Verdict
from .evidence import Evidence, Notebook, digest
from .outside import Row, Tables
from .script import Options, stop_on_bug

FUNCTION = "tests.chaos.stepping.Work"


def program(thread: int, steps: int) -> Iterator[tuple[str, str, int, list[str]]]:
    """The steps of one thread in order: id, name, which one of its name, ids of the steps inside it."""
    same = outer = 0
    for n in range(steps):
        if n % 7 == 3:
            outer += 1
            place = f"{thread}.outer" + (f"#{outer}" if outer > 1 else "")
            yield place, f"{thread}.outer", outer, [f"{place}/in%2Fner", f"{place}/in%2Fner#2"]
        elif n % 3:
            same += 1
            yield f"{thread}.same" + (f"#{same}" if same > 1 else ""), f"{thread}.same", same, []
        else:
            yield f"{thread}.{n}", f"{thread}.{n}", 1, []


class Work:
    """The function of every step: writes down that it was called and what it returns, which no other call does."""

    def __init__(self, agent: SkialithAgent, notebook: Notebook, options: Options, thread: int) -> None:
        self.agent = agent
        self.notebook = notebook
        self.pace = options.pace
        self.large = options.large
        self.dice = random.Random(f"{options.seed}/{thread}")

    def __call__(self, name: str, n: int, inner: int) -> dict[str, Any]:
        here = current_step()
        assert here is not None
        for k in range(1, inner + 1):
            self.notebook.line(
                "note", what="got", **_told(f"{here.id}/in%2Fner", k, self.agent.step("in/ner", self, "in/ner", k, 0))
            )
        value: dict[str, Any] = {"token": f"{self.notebook.name}:{time.monotonic_ns()}:{self.dice.random()}"}
        if self.dice.random() < self.large:
            value["blob"] = self.dice.randbytes(1_200_000)
        record = {"kind": "step", "name": name, "n": n, "function": FUNCTION, "result": value}
        facts = {"id": here.id, "token": value["token"], "digest": digest(record), "key": here.idempotency_key}
        self.notebook.line("note", what="called", **facts)
        if self.pace:
            time.sleep(self.dice.uniform(0, self.pace))
        return value


def _told(place: str, k: int, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": place + (f"#{k}" if k > 1 else ""), "token": value["token"]}


def run(options: Options, notebook: Notebook, agent: SkialithAgent) -> None:
    """One run of the program, on each thread, until it is done or the agent is taken over."""
    agent.resume()
    notebook.line("note", what="ready")

    def work(thread: int) -> None:
        function = Work(agent, notebook, options, thread)
        with stop_on_bug(notebook):
            try:
                for place, name, n, inner in program(thread, options.steps):
                    value = agent.step(name, function, name, n, len(inner))
                    notebook.line("note", what="got", id=place, token=value["token"])
            except (AgentFenced, RunEnded) as error:
                notebook.line("note", what="fenced", text=str(error)[:300])
            except SkialithError as error:
                notebook.line("note", what="failed", error=type(error).__name__, text=str(error)[:300])

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(options.threads)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    notebook.line("note", what="closed")


def judge(evidence: Evidence, tables: Tables, threads: int, steps: int) -> Verdict:
    """Each step recorded once, with a result that its function returned; every run got just that, in order, and called no
    function again whose result somebody had got before the run began."""
    verdict = Verdict()
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in tables.events:
        rows[row.identity].append(row)
    for place, copies in rows.items():
        if len(copies) > 1:
            verdict.duplicates += len(copies) - 1
            verdict.fault(f"DOUBLED: {place} is stored {len(copies)} times")
    notes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for note in evidence.notes:
        notes[note["what"]].append(note)
    for note in notes["failed"]:
        verdict.fault(f"FAILED: {note}")
    _check_results(verdict, rows, notes)
    _check_calls(verdict, notes)
    for thread in range(threads):
        _check_order(verdict, rows, notes["got"], thread, steps)
    verdict.acknowledged = len({note["id"] for note in notes["got"]})
    verdict.stored = len(tables.events)
    verdict.dead_letters = len(tables.letters)
    return verdict


def _check_results(verdict: Verdict, rows: dict[str, list[Row]], notes: dict[str, list[dict[str, Any]]]) -> None:
    made = {note["token"]: note for note in notes["called"]}
    returned = {(note["id"], note["digest"]) for note in notes["called"]}
    for place, copies in rows.items():
        if (place, copies[0].digest) not in returned:
            verdict.fault(f"FORGED: {place} is stored with a result that no call returned")
    for note in notes["got"]:
        place, call = note["id"], made.get(note["token"])
        if place not in rows:
            verdict.lost += 1
            verdict.fault(f"LOST: {note['child']} got the result of {place}, which is not stored")
        elif call is None or call["id"] != place or call["digest"] != rows[place][0].digest:
            verdict.fault(f"OTHER: {note['child']} got {note['token']} of {place}, which is not what is stored")
    for note in notes["called"]:
        if note["id"] in rows and note["key"] != rows[note["id"]][0].key.hex():
            verdict.fault(f"KEY: {note['id']} was called with the idempotency key {note['key']}")


def _check_calls(verdict: Verdict, notes: dict[str, list[dict[str, Any]]]) -> None:
    began = {note["child"]: note["at"] for note in notes["ready"]}
    known: dict[str, int] = {}
    for note in notes["got"]:
        known[note["id"]] = min(note["at"], known.get(note["id"], note["at"]))
    seen: set[tuple[str, str]] = set()
    for note in notes["called"]:
        child, place = note["child"], note["id"]
        if (child, place) in seen or began[child] > known.get(place, began[child]):
            verdict.fault(f"CALLED AGAIN: {place} by {child}, after its result was known")
        seen.add((child, place))


def _check_order(
    verdict: Verdict, rows: dict[str, list[Row]], got: list[dict[str, Any]], thread: int, steps: int
) -> None:
    order: list[str] = []
    for place, _, _, inner in program(thread, steps):
        order += [*inner, place]
    places = {place: n for n, place in enumerate(order)}
    stored = [rows[place][0].position for place in order if place in rows]
    if stored != sorted(stored) or [place for place in order if place in rows] != order[: len(stored)]:
        verdict.fault(f"ORDER: the steps of thread {thread} do not stand in the order of the program")
    children: dict[str, list[int]] = defaultdict(list)
    for note in got:
        if note["id"] in places:
            children[note["child"]].append(places[note["id"]])
    for child, numbers in children.items():
        if numbers != sorted(set(numbers)):
            verdict.fault(f"ORDER: {child} got the steps of thread {thread} as {numbers}")
