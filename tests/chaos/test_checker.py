"""The checker itself, on evidence made by hand: each promise broken once, and found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .checker import Checker, Verdict
from .evidence import Call, Evidence
from .outside import Letter, LogState, Row, Tables


def call(verb: str, began: int, *identities: str, ended: int = 0, child: str = "c", **given: Any) -> Call:
    """A call at ``began`` that returned a little later with an ack for each of its records, unless told otherwise."""
    made = Call(child, verb, "a", [(each, "d") for each in identities], 5.0, began, ended or began + 5, outcome="")
    made.acks = [(began + n, False) for n, _ in enumerate(identities)]
    return replace(made, **given)


def resume(began: int, token: str | None, child: str = "c") -> Call:
    return call("resume", began, child=child, result={"token": token, "digest": "d"})


def row(identity: str, seq: int) -> Row:
    return Row("a", identity, "d", (seq, seq), identity.encode())


def judge(calls: list[Call], tables: Tables, log: LogState | None = None, **given: Any) -> Verdict:
    return Checker(Evidence(sorted(calls, key=lambda each: each.began)), tables, log or LogState(), **given).verdict()


def stored(*identities: str) -> Tables:
    rows = [row(identity, seq) for seq, identity in enumerate(identities, start=1)]
    return Tables(events=rows, traces=[each.key for each in rows])


def assert_found(verdict: Verdict, text: str) -> None:
    assert any(text in problem for problem in verdict.problems), str(verdict)


FINE = [call("event", 10, "e1"), call("events", 20, "e2", "e3")]


def test_nothing_is_found_where_all_is_well() -> None:
    verdict = judge(FINE, stored("e1", "e2", "e3"))
    assert (verdict.problems, verdict.acknowledged, verdict.stored) == ([], 3, 3)


def test_what_is_missing_doubled_altered_or_made_up_is_found() -> None:
    assert judge(FINE, stored("e1", "e2")).lost == 1
    assert judge(FINE, stored("e1", "e2", "e3", "e3")).duplicates == 2  # the row and its trace
    altered = stored("e1", "e2", "e3")
    altered.events[0].digest = "other"
    assert_found(judge(FINE, altered), "with a payload that nobody gave it")
    assert_found(judge(FINE, stored("e1", "e2", "e3", "e4")), "nobody ever intended it")
    assert_found(judge(FINE, Tables(events=stored("e1", "e2", "e3").events)), "TRACE")


def test_what_was_not_written_must_be_absent_and_what_is_unknown_may_be_there() -> None:
    failed = call("event", 10, "e1", acks=[], error="WalFull", outcome="not_written")
    assert_found(judge([failed], stored("e1")), "every call about it said not_written")
    assert judge([failed, call("event", 20, "e1")], stored("e1")).problems == []
    for outcome in ("unknown", "killed"):
        unknown = replace(failed, outcome=outcome)
        assert judge([unknown], stored("e1")).problems == judge([unknown], stored()).problems == []


def test_order_is_checked_between_calls_and_inside_one() -> None:
    assert_found(judge(FINE, stored("e2", "e3", "e1")), "ORDER")
    assert_found(judge(FINE, stored("e1", "e3", "e2")), "ORDER")
    overlapping = [call("event", 10, "e1", ended=50), call("event", 20, "e2", ended=40)]
    assert judge(overlapping, stored("e2", "e1")).problems == []
    in_turn = [replace(each, lane="thread") for each in overlapping]
    assert judge(in_turn, stored("e1", "e2")).problems == []
    assert_found(judge(in_turn, stored("e2", "e1")), "ORDER")


def test_a_resume_that_goes_back_or_was_never_written_is_found() -> None:
    calls = [call("checkpoint", 10, "k1"), call("checkpoint", 20, "k2")]
    tables = Tables(checkpoints=[row("k1", 1), row("k2", 2)])
    assert judge([*calls, resume(30, "k2")], tables).problems == []
    for token in ("k1", None):
        assert_found(judge([*calls, resume(30, token)], tables), "RESUME went back")
    assert_found(judge([*calls, resume(30, "k3")], tables), "never written")
    # An unknown one may or may not be current, but once it was seen it must not vanish again.
    calls[1] = replace(calls[1], acks=[], outcome="unknown")
    assert judge([*calls, resume(30, "k1")], tables).problems == []
    assert_found(judge([*calls, resume(30, "k2"), resume(40, "k1")], tables), "RESUME went back")


def test_writes_of_an_old_owner_are_found() -> None:
    owned = [resume(10, None, "old"), resume(20, None, "new"), call("event", 40, "n1", child="new")]
    late = call("event", 30, "o1", child="old", ended=35)
    assert_found(judge([*owned, late], stored("o1", "n1")), "FENCE")
    again = [call("event", 16, "o1", child="old", ended=17), replace(late, acks=[(16, True)])]
    assert judge([*owned, *again], stored("o1", "n1")).problems == []
    begun_before = call("event", 17, "o1", child="old", acks=[], error="AgentFenced", outcome="unknown", ended=60)
    assert judge([*owned, begun_before], stored("o1", "n1")).problems == []
    assert_found(judge([*owned, begun_before], stored("n1", "o1")), "FENCE")


def test_histories_logs_letters_and_times_are_checked() -> None:
    def history(began: int, *identities: str) -> Call:
        return call("history", began, result={"events": [[each, "d", False] for each in identities]})

    tables = stored("e1", "e2", "e3")
    assert judge([*FINE, history(17, "e1"), history(30, "e1", "e2", "e3")], tables).problems == []
    for wrong in (
        history(17),
        history(30, "e1", "e2"),
        history(30, "e2", "e1", "e3"),
        history(30, "e1", "e2", "e3", "e3"),
    ):
        assert_found(judge([*FINE, wrong], tables), "HISTORY")
    assert_found(judge(FINE, tables, LogState(subjects={"log": 1})), "LOG")
    assert_found(judge([*FINE, call("event", 40, "e4", ended=40 + 10 * 10**9)], stored("e1", "e2", "e3", "e4")), "TIME")
    letter = Letter("a", "e3", "d", (3, 3), b"e3", "writer", "event", "refused")
    dead = Tables(stored("e1", "e2").events, [], [b"e1", b"e2", b"e3"], [letter])
    assert judge(FINE, dead, dead=[("a", "e3")]).problems == []
    assert_found(judge(FINE, dead), "is a dead letter")
    assert_found(judge(FINE, tables, dead=[("a", "e3")]), "should be a dead letter")
