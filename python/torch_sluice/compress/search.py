"""How far one can go: the longest prefix of a list of steps that keeps enough, measured at as few places as will do."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

_WORTH = 0.03  # of all that the steps win, which is not worth another measurement


def find_longest(
    measure: Callable[[int], float],
    floor: float,
    costs: Sequence[float],
    worths: Sequence[float],
    good: tuple[int, float],
    bad: tuple[int, float],
) -> int:
    """A number of steps at which ``measure`` gave ``floor`` or more, or that of ``good``: next to one at which it did
    not, or to one beyond which there is next to nothing to win.

    What is kept is taken to fall with the costs in a straight line between what is known, so that the place where it
    meets the floor is looked at first. Where that comes closer from one side alone, the middle is looked at.

    Args:
        costs, worths: of so many steps, together; index 0: of none. Ascending.
        good, bad: a number of steps, and what was measured there: at least ``floor``, or less; ``-inf`` where nothing
            is known of how much.
    """
    side, repeated = 0, 0
    while bad[0] - good[0] > 1 and worths[bad[0] - 1] - worths[good[0]] > _WORTH * worths[-1]:
        number = (good[0] + bad[0]) // 2
        if math.isfinite(bad[1]) and repeated < 2 and costs[bad[0]] > costs[good[0]]:
            share = (good[1] - floor) / (good[1] - bad[1])
            aim = costs[good[0]] + share * (costs[bad[0]] - costs[good[0]])
            number = min(max(bisect_right(costs, aim) - 1, good[0] + 1), bad[0] - 1)
        found = measure(number)
        now = 1 if found >= floor else -1
        repeated = repeated + 1 if now == side else 1
        side = now
        if now > 0:
            good = number, found
        else:
            bad = number, found
    return good[0]
