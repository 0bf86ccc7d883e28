"""Which sequences a process was acknowledged, kept as runs, and what is left of them."""

from __future__ import annotations

import random

from skialith.wal._waiting import Tally
from skialith.wal.continuity import Run, beyond, shown, up_to, without


def seqs(runs: list[Run]) -> list[int]:
    assert all(count == last - first + 1 for first, last, count in runs)
    return [seq for first, last, _ in runs for seq in range(first, last + 1)]


def test_a_tally_has_every_sequence_once_in_runs() -> None:
    tally = Tally()
    for seq in (5, 6, 7, 7, 9, 10, 3, 11, 6):
        tally.note(seq, 10)
    assert tally.take() == [(5, 7, 3), (9, 10, 2), (3, 3, 1), (11, 11, 1), (6, 6, 1)]
    assert tally.take() == [] and tally.last_seq == 11 and tally.appended_bytes == 90


def test_of_very_many_runs_the_later_ones_stay_exact() -> None:
    tally, noted = Tally(), list(range(0, 40_000, 2))
    for seq in noted:
        tally.note(seq, 1)
    runs = tally.take()
    assert len(runs) <= 4096 and sum(run[2] for run in runs) == len(noted)
    assert runs[-1000:] == [(seq, seq, 1) for seq in noted[-1000:]]
    assert runs == sorted(runs) and runs[0][0] == 0


def test_a_log_that_is_shorter_takes_the_last_sequence_back_but_not_what_came_since() -> None:
    tally = Tally()
    tally.note(50, 1)
    tally.take()
    tally.set_back(40)
    assert tally.last_seq == 40
    tally.note(41, 1)
    tally.note(43, 1)
    tally.set_back(40)
    assert tally.last_seq == 43
    tally.take()
    tally.set_back(100)
    assert tally.last_seq == 43


def test_runs_are_cut_and_thinned_like_sets() -> None:
    dice = random.Random(1)
    for _ in range(200):
        have = sorted(dice.sample(range(60), dice.randrange(40)))
        tally = Tally()
        for seq in have:
            tally.note(seq, 1)
        runs, cut, gone = tally.take(), dice.randrange(60), sorted(dice.sample(range(60), 20))
        assert seqs(beyond(runs, cut)) == [seq for seq in have if seq > cut]
        assert seqs(up_to(runs, cut)) == [seq for seq in have if seq <= cut]
        left = [run for each in runs for run in without(each, [s for s in gone if each[0] <= s <= each[1]])]
        assert seqs(left) == [seq for seq in have if seq not in gone]


def test_a_merged_run_says_how_many_at_most() -> None:
    assert without((10, 20, 4), [11, 12]) == [(10, 20, 2)]
    assert without((10, 20, 4), [11, 12, 13, 14, 15]) == []
    assert beyond([(10, 20, 4)], 18) == [(19, 20, 2)] and up_to([(10, 20, 4)], 9) == []


def test_runs_for_people() -> None:
    assert shown([(7, 9, 3), (5, 6, 2), (12, 12, 1)]) == "5 to 9, 12"
    assert shown([(n, n, 1) for n in range(0, 100, 2)], most=3) == "0, 2, 4 and 47 more"
