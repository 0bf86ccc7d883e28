"""Steps without a server: names, keys, retries, what is recorded and replayed, nesting, and errors."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skialith import (
    AgentFenced,
    InvalidArgument,
    InvalidPayload,
    RecordTooLarge,
    RunEnded,
    StepFailed,
    StepMismatch,
    WalUnavailable,
    current_step,
    payloads,
)
from skialith import _fastpath as fastpath
from skialith.config import MAX_ID_CHARACTERS, STEP_RETRIES
from skialith.errors import BodyMissing, SkialithError
from skialith.history import FoundStep
from skialith.records import NOWHERE, STEP, Ack, Position, Record, is_step, step_hash, step_key
from skialith.step_names import escaped, function_name, step_id
from skialith.step_policy import ONCE, Policy
from skialith.steps import Run, blocking


class Engine:
    """A log in memory, and runs over it. ``fails``: errors that the next appends raise."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(timeout=1.0)
        self.records: dict[bytes, Record] = {}
        self.fails: list[BaseException] = []
        self.kept: dict[bytes, Record] = {}
        self.agents: dict[str, Run] = {}
        self.wal = SimpleNamespace(log=SimpleNamespace(append_one=self._append_one))
        self.reads = 0

    def run(self, agent_id: str = "agent", *, bodies: bool = True, limit: int = 1 << 20) -> Run:
        """A new run."""
        found = {
            key: FoundStep(Position(n, n), record.codec, record.body if bodies else None)
            for n, (key, record) in enumerate(self.records.items(), 1)
            if record.agent_id == agent_id
        }
        self.agents[agent_id] = Run(
            "ns", agent_id, lambda data, name: payloads.pack(data, name, limit), found, self.kept
        )
        return self.agents[agent_id]

    def step(
        self, name: str, function: Any, *args: Any, policy: Policy = ONCE, agent_id: str = "agent", **named: Any
    ) -> Any:
        call = self.agents[agent_id].enter(name, function, policy, 7)
        return blocking(self.check, call, function, args, named)

    def check(self) -> Any:
        return self

    def steps(self, agent_id: str) -> Any:
        return SimpleNamespace(find=self._find, read=lambda key, step_id, position: self._find(key, step_id))

    def ids(self) -> list[str]:
        return [record.record_id for record in self.records.values()]

    def _find(self, key: bytes, step_id: str) -> FoundStep:
        self.reads += 1
        record = self.records[key]
        return FoundStep(NOWHERE, record.codec, record.body)

    def _append_one(self, record: Record, deadline: float) -> Ack:
        if self.fails:
            raise self.fails.pop(0)
        there = self.records.setdefault(record.key, record)
        return Ack(list(self.records).index(record.key) + 1, there is not record)


@pytest.fixture
def engine() -> Engine:
    made = Engine()
    made.run()
    return made


class Counted:
    """A function that counts its calls and returns the count."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any) -> int:
        self.calls += 1
        return self.calls


def failing(*errors: Exception | None) -> Callable[[], str]:
    """Raises these in turn, and returns for a None."""
    left = list(errors)

    def attempt() -> str:
        error = left.pop(0)
        if error is not None:
            raise error
        return "done"

    return attempt


def nested(levels: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(levels):
        made = [made]
    return made


# ---- what a step is called


paths = st.lists(
    st.tuples(
        st.text(st.sampled_from("a#2/%~") | st.characters(codec="utf-8"), min_size=1, max_size=4), st.integers(1, 22)
    ),
    min_size=1,
    max_size=3,
)


@given(paths, paths)
def test_two_places_never_have_one_id(one: list[tuple[str, int]], other: list[tuple[str, int]]) -> None:
    assert (_place(one) == _place(other)) == (one == other)


def _place(path: list[tuple[str, int]]) -> str:
    return functools.reduce(lambda scope, part: step_id(scope, escaped(part[0]), part[1]), path, "")


def test_ids_read_well() -> None:
    assert [step_id("", "ask-llm", n) for n in (1, 2, 10)] == ["ask-llm", "ask-llm#2", "ask-llm#10"]
    assert step_id("outer#2", "inner", 3) == "outer#2/inner#3"
    assert [escaped(name) for name in ("a#2", "a/b", "100%", "~", "ünï")] == ["a%232", "a%2Fb", "100%25", "%7E", "ünï"]


def test_a_long_id_is_a_prefix_and_a_hash() -> None:
    longest = "n" * MAX_ID_CHARACTERS
    assert step_id("", longest, 1) == longest
    ids = {step_id("", longest, n) for n in range(2, 300)} | {step_id(longest, "x", n) for n in range(1, 300)}
    assert len(ids) == 298 + 299
    assert {len(each) for each in ids} == {MAX_ID_CHARACTERS}
    assert all("~" in each for each in ids)


@pytest.mark.parametrize("name", ["", "x" * 256, 5, None, b"x", ["x"], "\ud800"])
def test_a_bad_name_is_refused(engine: Engine, name: Any) -> None:
    with pytest.raises(InvalidArgument, match="name") as caught:
        engine.step(name, Counted())
    assert caught.value.argument == "name"
    assert engine.records == {}


def test_no_event_has_the_key_of_a_step() -> None:
    texts = ["a", "s", "ask", "agent", ""]
    events = {fastpath.event_key(*three) for three in itertools.product(texts, repeat=3)}
    keys = {step_key(step_hash(one, two), three) for one, two, three in itertools.product(texts, repeat=3)}
    assert len(events) == len(keys) == 125
    assert not events & keys


def test_a_step_is_told_by_its_key(engine: Engine) -> None:
    engine.step("s", Counted())
    (record,) = engine.records.values()
    assert is_step(record)
    assert not is_step(record._replace(key=fastpath.event_key("ns", "agent", "s")))
    assert not is_step(record._replace(agent_id="other"))
    assert not is_step(record._replace(event_type="thought"))


class Tool:
    def run(self) -> None: ...

    def __call__(self) -> None: ...

    @staticmethod
    def helped() -> None: ...


def test_function_names() -> None:
    here = __name__
    assert function_name(failing) == f"{here}.failing"
    assert function_name(Tool().run) == function_name(Tool.run) == f"{here}.Tool.run"
    assert function_name(Tool.helped) == f"{here}.Tool.helped"
    assert function_name(Tool) == function_name(Tool()) == f"{here}.Tool"
    assert function_name(functools.partial(functools.partial(failing, None), None)) == f"{here}.failing"
    assert function_name(lambda: 0) == f"{here}.test_function_names.<locals>.<lambda>"
    assert function_name(len) == "builtins.len"
    assert function_name(str.upper) == "builtins.str.upper"


@pytest.mark.parametrize("function", [None, 5, "text", {}])
def test_what_is_no_function_is_refused(engine: Engine, function: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"must be callable.*pass the function and its arguments"):
        engine.step("s", function)


# ---- record and replay


def test_a_result_is_recorded_and_replayed_without_a_call(engine: Engine) -> None:
    ask = Counted()
    assert [engine.step("ask", ask) for _ in range(3)] == [1, 2, 3]
    assert engine.ids() == ["ask", "ask#2", "ask#3"]
    record = engine.records[step_key(step_hash("ns", "agent"), "ask#2")]
    assert (record.event_type, record.step_index, record.body) == (STEP, 7, payloads.encode(_data("ask", 2, ask, 2)))
    engine.run()
    assert [engine.step("ask", ask) for _ in range(4)] == [1, 2, 3, 4]
    assert ask.calls == 4


def _data(name: str, n: int, function: object, result: object) -> dict[str, Any]:
    return {"kind": "step", "name": name, "n": n, "function": function_name(function), "result": result}


@pytest.mark.parametrize("bodies", [True, False])
def test_what_a_step_returns_is_the_same_in_every_run(engine: Engine, bodies: bool) -> None:
    results: list[Any] = [None, True, 5, 2.5, "text", b"bytes", (1, (2,)), {"a": [1]}, {1: "x"}, [], {}]
    values = [engine.step(f"s{n}", lambda result=result: result) for n, result in enumerate(results)]
    assert values == [None, True, 5, 2.5, "text", b"bytes", [1, [2]], {"a": [1]}, {1: "x"}, [], {}]
    engine.run(bodies=bodies)
    again = [engine.step(f"s{n}", lambda: pytest.fail("called")) for n in range(len(results))]
    assert [(value, type(value)) for value in again] == [(value, type(value)) for value in values]
    assert engine.reads == (0 if bodies else len(results))


def test_replayed_results_are_let_go_of(engine: Engine) -> None:
    for n in range(5):
        engine.step(f"s{n}", bytes, 1000)
    run = engine.run()
    for n in range(5):
        engine.step(f"s{n}", bytes)
        assert len(run.recorded) == 4 - n


def test_another_function_is_refused(engine: Engine) -> None:
    engine.step("s", str)
    engine.run()
    with pytest.raises(
        StepMismatch, match=r"'s' of agent 'agent' is recorded for builtins\.str, and.* builtins\.int"
    ) as caught:
        engine.step("s", int)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.step, error.recorded, error.given, error.outcome) == (
        "s",
        "builtins.str",
        "builtins.int",
        "not_written",
    )
    assert len(engine.records) == 1


@pytest.mark.parametrize(
    ("result", "path", "why"),
    [
        ({"messages": [1, {"content": {1}}]}, "result.messages[1].content", "set is not serializable"),
        (object(), "result", "object is not serializable"),
        ([2**64], "result[0]", "int is over 64 bits"),
        (nested(300), "result[0][0][0]", "nested deeper"),
    ],
    ids=["set", "object", "int", "deep"],
)
def test_a_result_that_cannot_be_recorded_is_refused_with_its_path(
    engine: Engine, result: Any, path: str, why: str
) -> None:
    with pytest.raises(InvalidPayload) as caught:
        engine.step("s", lambda: result)
    assert caught.value.path.startswith(path)
    assert str(caught.value).startswith(f"step 's' of agent 'agent': {path}")
    assert why in str(caught.value)
    assert "the function has run; its result was not sent and is not recorded" in str(caught.value)
    assert (caught.value.argument, caught.value.outcome) == ("result", "not_written")
    assert engine.records == {}
    assert engine.step("s", lambda: 1) == 1
    assert engine.ids() == ["s#2"]


def test_a_result_over_the_limit_is_refused() -> None:
    engine = Engine()
    engine.run(limit=1000)
    with pytest.raises(RecordTooLarge, match=r"result has \d+ bytes encoded.*the function has run") as caught:
        engine.step("s", bytes, 1000)
    assert (caught.value.limit, caught.value.argument) == (1000, "result")


def test_a_coroutine_function_is_refused(engine: Engine) -> None:
    async def ask() -> None: ...

    with pytest.raises(InvalidArgument, match=r"coroutine function.*await agent\.step"):
        engine.step("s", ask)
    assert engine.records == {}


def test_of_two_at_one_step_the_first_record_counts(engine: Engine) -> None:
    """Two objects of one agent, each with a run of its own."""
    first, second = engine.run(), engine.run()
    ask = Counted()
    values = [blocking(engine.check, run.enter("s", ask, ONCE, 0), ask, (), {}) for run in (first, second)]
    assert values == [1, 1]
    assert ask.calls == 2
    with pytest.raises(StepMismatch):
        blocking(engine.check, engine.run().enter("s", int, ONCE, 0), int, (), {})


# ---- errors and retries


def test_what_a_function_raises_is_raised_and_not_recorded(engine: Engine) -> None:
    raised = ValueError("no")
    with pytest.raises(ValueError, match="no") as caught:
        engine.step("s", failing(raised))
    assert caught.value is raised
    assert engine.records == {}
    assert engine.step("s", failing(None)) == "done"
    assert engine.ids() == ["s#2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), asyncio.CancelledError(), GeneratorExit()])
def test_what_ends_a_program_is_never_retried_or_recorded(engine: Engine, error: BaseException) -> None:
    ask = Counted()

    def ending() -> None:
        ask()
        raise error

    with pytest.raises(type(error)):
        engine.step("s", ending, policy=Policy(retries=5, backoff=0, record_errors=(Exception,)))
    assert (ask.calls, engine.records, current_step()) == (1, {}, None)


def test_retries(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("skialith.steps.time.sleep", slept.append)
    monkeypatch.setattr("skialith.steps.random.random", lambda: 1.0)
    errors = [OSError(n) for n in range(4)]
    policy = Policy(retries=4, backoff=1, backoff_factor=3, backoff_max=10, retry_on=(OSError,))
    assert engine.step("s", failing(*errors, None), policy=policy) == "done"
    assert slept == [1, 3, 9, 10]
    with pytest.raises(OSError, match="4"):
        engine.step("s", failing(*errors, OSError(4), None), policy=policy)
    with pytest.raises(ValueError, match="other"):
        engine.step("s", failing(OSError(0), ValueError("other"), None), policy=policy)
    assert engine.ids() == ["s"]


@given(st.integers(1, STEP_RETRIES), st.floats(0, 1), st.floats(0, 100), st.floats(1, 100))
def test_a_pause_is_between_half_and_all(failures: int, share: float, first: float, factor: float) -> None:
    policy = Policy(1, first, factor, 60)
    whole = min(60, first * factor ** (failures - 1))
    assert whole / 2 <= policy.pause(failures, share) <= whole


@pytest.mark.parametrize(
    "bad",
    [
        {"retries": -1},
        {"retries": STEP_RETRIES + 1},
        {"retries": True},
        {"retries": 1.0},
        {"retries": None},
        {"backoff": -0.1},
        {"backoff": float("nan")},
        {"backoff": "1"},
        {"backoff_factor": 0.5},
        {"backoff_factor": float("inf")},
        {"backoff_max": 3601},
        {"retry_on": (KeyboardInterrupt,)},
        {"retry_on": "ValueError"},
        {"record_errors": (ValueError, BaseException)},
        {"record_errors": [ValueError]},
    ],
)
def test_bad_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Policy(**bad)
    assert caught.value.argument == next(iter(bad))


def test_an_error_is_recorded_if_asked_and_raised_alike_in_every_run(engine: Engine) -> None:
    policy = Policy(record_errors=(ValueError,))
    original = ValueError("no \ud800 " + "x" * 5000)
    with pytest.raises(StepFailed) as first:
        engine.step("s", failing(original), policy=policy)
    assert first.value.__cause__ is original
    engine.run()
    with pytest.raises(StepFailed) as second:
        engine.step("s", failing(None), policy=policy)
    assert str(first.value) == str(second.value)
    error = pickle.loads(pickle.dumps(second.value))
    assert (error.step, error.error_type, error.outcome, error.retryable) == (
        "s",
        "builtins.ValueError",
        "durable",
        False,
    )
    assert error.error_message.startswith("no \\ud800 xxx")
    with pytest.raises(StepMismatch):
        engine.run()
        engine.step("s", int)


def test_only_what_is_left_after_the_retries_is_recorded(engine: Engine) -> None:
    policy = Policy(retries=1, backoff=0, record_errors=(Exception,))
    assert engine.step("s", failing(OSError(), None), policy=policy) == "done"
    with pytest.raises(StepFailed, match="last"):
        engine.step("s", failing(OSError("first"), OSError("last")), policy=policy)


def test_errors_of_skialith_are_not_recorded_and_retried_only_if_that_may_help(engine: Engine) -> None:
    policy = Policy(retries=1, backoff=0, record_errors=(Exception,))
    assert engine.step("s", failing(WalUnavailable("away"), None), policy=policy) == "done"
    with pytest.raises(AgentFenced):
        engine.step("s", failing(AgentFenced("taken over"), None), policy=policy)
    with pytest.raises(WalUnavailable):
        engine.step("s", failing(WalUnavailable("away"), WalUnavailable("still")), policy=policy)
    assert engine.ids() == ["s"]


def test_an_error_with_a_bad_text_is_recorded_all_the_same(engine: Engine) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with pytest.raises(StepFailed, match="<Mute>"):
        engine.step("s", failing(Mute()), policy=Policy(record_errors=(Mute,)))


# ---- a record that fails


@pytest.mark.parametrize("outcome", ["unknown", "not_written"])
def test_a_failed_record_ends_the_run_and_is_made_up_for_in_the_next(engine: Engine, outcome: Any) -> None:
    ask = Counted()
    engine.step("s", ask)
    engine.fails.append(WalUnavailable("no PubAck", outcome=outcome))
    with pytest.raises(WalUnavailable, match=r"'s#2' of agent 'agent': the function has run, but.*no PubAck") as caught:
        engine.step("s", ask)
    assert (caught.value.outcome, caught.value.retryable) == (outcome, True)
    for name in ("s", "other"):
        with pytest.raises(RunEnded, match=r"call resume\(\)") as ended:
            engine.step(name, ask)
        assert isinstance(ended.value.__cause__, WalUnavailable)
    assert ask.calls == 2
    engine.run()
    assert [engine.step("s", ask) for _ in range(3)] == [1, 2, 3]
    assert ask.calls == 3
    assert engine.kept == {}


def test_a_kept_result_of_another_function_is_refused(engine: Engine) -> None:
    engine.fails.append(WalUnavailable("no PubAck"))
    with pytest.raises(WalUnavailable):
        engine.step("s", str)
    engine.run()
    with pytest.raises(StepMismatch):
        engine.step("s", int)


def test_what_was_recorded_meanwhile_counts_more_than_what_was_kept(engine: Engine) -> None:
    engine.fails.append(WalUnavailable("no PubAck", outcome="unknown"))
    with pytest.raises(WalUnavailable):
        engine.step("s", int, 1)
    engine.run()
    engine.kept, kept = {}, engine.kept
    engine.run()
    assert engine.step("s", int, 2) == 2
    engine.kept = kept
    engine.run()
    assert engine.step("s", int) == 2
    assert engine.kept == {}


def test_a_failed_recorded_error_is_made_up_for_too(engine: Engine) -> None:
    policy = Policy(record_errors=(ValueError,))
    engine.fails.append(WalUnavailable("no PubAck"))
    with pytest.raises(WalUnavailable):
        engine.step("s", failing(ValueError("no")), policy=policy)
    engine.run()
    with pytest.raises(StepFailed, match="no"):
        engine.step("s", failing(None), policy=policy)
    assert len(engine.records) == 1


def test_ctrl_c_in_a_record_ends_the_run(engine: Engine) -> None:
    engine.fails.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step("s", int)
    with pytest.raises(RunEnded):
        engine.step("s", int)


def test_a_fenced_agents_functions_are_not_called_any_more(engine: Engine) -> None:
    ask = Counted()
    engine.fails.append(AgentFenced("taken over", owner="x", agent_id="agent"))
    with pytest.raises(AgentFenced) as caught:
        engine.step("s", ask)
    assert (caught.value.owner, caught.value.agent_id) == ("x", "agent")
    with pytest.raises(RunEnded):
        engine.step("s", ask)
    assert ask.calls == 1


def test_a_refused_record_does_not_end_the_run(engine: Engine) -> None:
    engine.fails.append(RecordTooLarge("over", size=2, limit=1))
    with pytest.raises(RecordTooLarge, match="the function has run"):
        engine.step("s", int)
    assert engine.step("s", int) == 0


def test_a_record_that_cannot_be_read_ends_the_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.step("s", int)
    engine.run(bodies=False)

    def lost(key: bytes, step_id: str) -> FoundStep:
        raise BodyMissing("lost")

    monkeypatch.setattr(engine, "_find", lost)
    with pytest.raises(BodyMissing, match=r"is recorded, but its result cannot be read: lost"):
        engine.step("s", int)
    with pytest.raises(RunEnded):
        engine.step("s", int)


# ---- inside of a step


def test_a_step_knows_itself(engine: Engine) -> None:
    seen: list[tuple[str, str, int, str]] = []

    def look() -> None:
        here = current_step()
        assert here is not None
        seen.append((here.name, here.id, here.attempt, here.idempotency_key))
        if len(seen) in (1, 3):
            raise OSError("again")

    assert current_step() is None
    engine.step("a/b", look, policy=Policy(retries=1, backoff=0))
    with pytest.raises(OSError, match="again"):
        engine.step("a/b", look)
    engine.run()
    engine.step("a/b", look)
    engine.step("a/b", look)
    keys = [step_key(step_hash("ns", "agent"), place).hex() for place in ("a%2Fb", "a%2Fb#2")]
    assert seen == [
        ("a/b", "a%2Fb", 1, keys[0]),
        ("a/b", "a%2Fb", 2, keys[0]),
        ("a/b", "a%2Fb#2", 1, keys[1]),
        ("a/b", "a%2Fb#2", 1, keys[1]),
    ]
    assert current_step() is None


def test_inner_steps_keep_their_places_whatever_is_replayed(engine: Engine) -> None:
    inner = Counted()

    def outer() -> list[int]:
        return [engine.step("inner", inner) for _ in range(2)]

    def program() -> list[Any]:
        return [
            engine.step("inner", inner),
            engine.step("outer", outer),
            engine.step("inner", inner),
            engine.step("outer", outer),
        ]

    assert program() == [1, [2, 3], 4, [5, 6]]
    assert engine.ids() == [
        "inner", "outer/inner", "outer/inner#2", "outer", "inner#2", "outer#2/inner", "outer#2/inner#2", "outer#2",
    ]  # fmt: skip
    for lost in range(8):  # a run that ended anywhere, then another
        everything = dict(engine.records)
        engine.records = dict(list(everything.items())[: 8 - lost])
        engine.run()
        values = program()
        assert [record.record_id for record in engine.records.values()] == [r.record_id for r in everything.values()]
        engine.run()
        calls = inner.calls
        assert program() == values
        assert inner.calls == calls


def test_inner_steps_of_a_failed_attempt_are_not_called_again(engine: Engine) -> None:
    inner, deepest = Counted(), Counted()
    attempts = failing(OSError(), OSError(), None)

    def middle() -> Any:
        return engine.step("deepest", deepest), attempts()

    def outer() -> Any:
        return engine.step("inner", inner), engine.step("middle", middle)

    assert engine.step("outer", outer, policy=Policy(retries=2, backoff=0)) == [1, [1, "done"]]
    assert (inner.calls, deepest.calls) == (1, 1)
    assert engine.ids() == ["outer/inner", "outer/middle/deepest", "outer/middle", "outer"]


def test_an_outer_step_without_its_record_replays_its_inner_ones(engine: Engine) -> None:
    inner = Counted()
    attempts = failing(OSError("again"), None)

    def outer() -> Any:
        return engine.step("inner", inner), engine.step("inner", inner), attempts()

    with pytest.raises(OSError, match="again"):
        engine.step("outer", outer)
    engine.run()
    assert engine.step("outer", outer) == [1, 2, "done"]
    assert inner.calls == 2


def test_the_step_of_another_agent_inside_a_step_counts_within_it(engine: Engine) -> None:
    engine.run("helper")
    work = Counted()

    def plan() -> Any:
        return [engine.step("work", work, agent_id="helper"), engine.step("work", work)]

    def program() -> list[Any]:
        return [engine.step("plan", plan), engine.step("work", work, agent_id="helper")]

    first = program()
    assert engine.ids() == ["agent//plan/work", "plan/work", "plan", "work"]
    engine.run()
    engine.run("helper")
    assert program() == first
    assert work.calls == 3


def test_threads_and_tasks_inside_a_step(engine: Engine) -> None:
    work = Counted()

    def outer() -> list[str]:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(engine.step, "thread", work).result()
            pool.submit(contextvars.copy_context().run, engine.step, "copied", work).result()
            outside = pool.submit(current_step).result()
        assert outside is None

        async def gather() -> None:
            await asyncio.gather(*(asyncio.to_thread(engine.step, f"task-{n}", work) for n in range(3)))

        asyncio.run(gather())
        return []

    engine.step("outer", outer)
    assert sorted(engine.ids()) == [
        "outer", "outer/copied", "outer/task-0", "outer/task-1", "outer/task-2", "thread",
    ]  # fmt: skip


def test_threads_that_share_a_name_have_places_of_their_own(engine: Engine) -> None:
    barrier = threading.Barrier(8)

    def work(n: int) -> list[int]:
        barrier.wait()
        return [engine.step("s", int, n * 100 + k) for k in range(50)]

    with ThreadPoolExecutor(8) as pool:
        values = [value for part in pool.map(work, range(8)) for value in part]
    assert len(set(values)) == 400
    assert sorted(engine.ids()) == sorted(["s", *(f"s#{n}" for n in range(2, 401))])


def test_errors_are_all_of_one_family() -> None:
    for kind in (StepFailed, StepMismatch, RunEnded):
        assert issubclass(kind, SkialithError)
        assert pickle.loads(pickle.dumps(kind("text"))).args == ("text",)
