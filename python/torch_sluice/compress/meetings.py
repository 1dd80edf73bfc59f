"""A record of which numbers (couplings.py) became equal in a run, operator by operator."""

import numpy as np

Key = tuple[int, int]  # an operator of the run, and which of what it told


class Meetings:
    """Pairs of numbers that met. Two runs of one forward(), at different widths, give them under the same keys."""

    def __init__(self):
        self.pairs: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        self.rows: dict[Key, tuple[np.ndarray, bool]] = {}  # numbers in the order of rows, and whether they are several
        self._operator = self._place = self._row = 0

    def begin(self) -> None:
        """The next operator runs."""
        self._operator, self._place, self._row = self._operator + 1, 0, 0

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        self.pairs[self._operator, self._place] = (first, second)
        self._place += 1

    def add_rows(self, numbers: np.ndarray, are_rows: bool) -> None:
        self.rows[self._operator, self._row] = (numbers, are_rows)
        self._row += 1
