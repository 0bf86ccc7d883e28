"""Backoff, throttle and outage: how long a drain pauses and how seldom it speaks."""

from __future__ import annotations

import logging
from random import Random

import pytest

from skialith.config import BACKOFF_FIRST_SECONDS, BACKOFF_LONGEST_SECONDS, WRITER_WARN_SECONDS
from skialith.errors import StoreUnavailable
from skialith.writer.backoff import Backoff
from skialith.writer.outage import Outage, Throttle

from ..fixtures.writer_fakes import Clock


def test_pauses_have_full_jitter_below_a_doubling_cap() -> None:
    class Most(Random):
        def uniform(self, a: float, b: float) -> float:
            assert a == 0.0
            return b

    backoff = Backoff(0.1, 1.0, Most())
    assert [backoff.pause() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    backoff.reset()
    assert backoff.pause() == pytest.approx(0.1)


def test_pauses_repeat_with_the_seed_and_stay_in_bounds() -> None:
    one, other = Backoff(random=Random(7)), Backoff(random=Random(7))
    pauses = [one.pause() for _ in range(200)]
    assert pauses == [other.pause() for _ in range(200)]
    assert all(0.0 <= pause <= BACKOFF_LONGEST_SECONDS for pause in pauses)
    assert pauses[0] <= BACKOFF_FIRST_SECONDS
    assert max(pauses) > BACKOFF_LONGEST_SECONDS / 2


def test_a_throttle_lets_the_first_through_and_then_one_per_interval_with_the_count() -> None:
    clock = Clock()
    throttle = Throttle(10.0, clock)
    assert throttle.due() == 1
    assert [throttle.due() for _ in range(5)] == [0] * 5
    clock.now += 10.0
    assert throttle.due() == 6
    assert throttle.due() == 0


def test_an_outage_warns_once_per_interval_and_says_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    outage = Outage("writer: cannot store records", clock=clock)
    with caplog.at_level(logging.INFO, "skialith.writer"):
        assert outage.seconds == 0.0
        for _ in range(100):
            outage.failed(StoreUnavailable("down"), clock.now)
            clock.now += 0.1
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        clock.now += WRITER_WARN_SECONDS
        outage.failed(StoreUnavailable("down"), clock.now)
        assert "101 failures" in caplog.records[-1].getMessage()
        assert outage.seconds == pytest.approx(40.0)
        outage.over()
        outage.over()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert outage.seconds == 0.0


def test_an_outage_counts_from_the_beginning_of_the_failed_try() -> None:
    clock = Clock()
    outage = Outage("x", clock=clock)
    began = clock.now
    clock.now += 30.0
    outage.failed(StoreUnavailable("hung"), began)
    assert outage.seconds == pytest.approx(30.0)


def test_an_error_that_is_a_bug_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("x", clock=Clock())
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        outage.failed(error, 0.0)
    assert caplog.records[0].exc_info is not None
    assert "ZeroDivisionError" in caplog.text
