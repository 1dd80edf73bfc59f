"""The estimate of a progress bar, by a clock of the test's."""

import pytest

from torch_sluice.compress.progress import Progress


class Work:
    def __init__(self):
        self.now, self.progress, self.seen = 0.0, None, []
        self.progress = Progress(False, lambda: self.now)

    def phase(self, name, steps, seconds):
        self.progress.start(name, steps)
        for _ in range(steps or 1):
            self.progress.step()
            self.seen.append((self.now, self.progress.remaining))
            self.now += seconds

    def errors(self, after=0.1):
        """Of the estimated whole, relative, once this share of the time is over."""
        return [abs(at + left - self.now) / self.now for at, left in self.seen if at >= after * self.now]


@pytest.mark.parametrize("off", [0.6, 1.0, 1.6])
def test_the_estimate_is_right_where_costs_are_off_alike(off):
    work = Work()
    for phase, seconds in (("channels", 10), ("sensitivity", 100), ("pruning", 40), ("result", 10)):
        work.progress.foresee(phase, seconds)
    work.phase("channels", 10, off)
    work.phase("sensitivity", 50, 2 * off)
    work.phase("pruning", 5, 8 * off)
    work.phase("result", None, 10 * off)
    assert max(work.errors(0.15)) < 0.3
    assert work.progress.remaining < 0.1 * work.now


def test_steps_that_are_skipped_count_no_longer():
    work = Work()
    work.progress.foresee("sensitivity", 100)
    work.progress.start("sensitivity", 100)
    for _ in range(10):
        work.progress.step()
        work.now += 1
    before = work.progress.remaining
    work.progress.skip(45)
    assert work.progress.remaining == pytest.approx(before / 2, rel=0.1)
    work.progress.skip(1000)
    assert work.progress.remaining < 1.5  # of the step that goes on


def test_a_phase_that_will_not_come_and_one_that_nobody_foresaw():
    work = Work()
    work.progress.foresee("first", 10)
    work.progress.foresee("second", 30)
    assert work.progress.remaining == 40
    work.progress.forget("second")
    assert work.progress.remaining == 10
    work.phase("unknown", 4, 1.0)
    assert 10 <= work.progress.remaining < 12
    work.phase("first", None, 10.0)
    assert work.progress.remaining == 0


def test_a_short_phase_that_is_far_off_says_little_of_long_ones():
    work = Work()
    for phase, seconds in (("channels", 1), ("measuring", 40), ("pruning", 40)):
        work.progress.foresee(phase, seconds)
    work.phase("channels", None, 5.0)
    work.progress.start("measuring")
    assert work.progress.remaining == pytest.approx(80, rel=0.1)
