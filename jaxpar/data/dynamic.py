"""Which document of a step goes into which row of which dp rank. Numpy alone; a plan depends on its arguments only.

A row is a microbatch of a fixed number of tokens, the budget, that holds whole documents. All ranks get the same number
of rows, because all run one program, and this number is one of a few, because XLA compiles a program for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Rows = list[list[list[int]]]  # of each rank, of each of its rows: indices of documents


@dataclass(frozen=True)
class DocumentCost:
    """FLOPs of training on one document, for attention that stays inside of it: a · n + b · n · min(n, window)."""

    per_token: float
    per_pair: float
    window: int | None = None

    def __call__(self, lengths: Int[np.ndarray, " documents"]) -> Float[np.ndarray, " documents"]:
        seen = lengths if self.window is None else np.minimum(lengths, self.window)
        return lengths * (self.per_token + self.per_pair * seen.astype(np.float64))


@dataclass(frozen=True)
class Plan:
    """The rows of one step.

    Attributes:
      rows: rows[r][m] has the indices of the documents in row m of dp rank r, ascending. Each document is in one row; a
        row may be empty.
      costs: of each dp rank, what its documents cost.
      padding_fraction: share of all places in rows that hold no token.
    """

    rows: Rows
    costs: Float[np.ndarray, " ranks"]
    padding_fraction: float

    @property
    def num_rows(self) -> int:
        """Of each rank, the same on all."""
        return len(self.rows[0])

    @property
    def balance(self) -> float:
        """Cost of the busiest rank over the mean: 1 is even."""
        mean = self.costs.mean()
        return float(self.costs.max() / mean) if mean else 1.0


def row_counts(most: int) -> Iterator[int]:
    """The numbers of rows that a rank may have: 1, 2, … 16, 18, 20, … 32, 36, …, `most`; eight to each doubling, so that
    less than an eighth of the rows are there for the count alone."""
    count = 1
    while count < most:
        yield count
        count += max(1, (1 << count.bit_length()) // 16)
    yield most


def plan_rows(lengths: Int[np.ndarray, " documents"], budget: int, num_ranks: int, cost: DocumentCost) -> Plan:
    """Packs documents into rows: as few rows a rank as `row_counts` and the packing allow, then costs as even as can be.

    Documents go, the longest first, to the rank that has the least to do among those with room for it, there into the
    fullest row that takes it (longest processing time first, Graham, 1969, "Bounds on multiprocessing timing anomalies";
    best fit decreasing). Pairs of ranks then exchange documents as long as it evens them out.

    Args:
      lengths: tokens of each document, from 0 to `budget`.
      budget: tokens of a row.
      num_ranks: size of dp.

    Raises:
      ValueError: a document is longer than the budget; says which.
    """
    if too_long := np.flatnonzero(lengths > budget).tolist():
        raise ValueError(f"document {too_long[0]} has {lengths[too_long[0]]} tokens, more than the {budget} of a row")
    costs = cost(lengths)
    least = -(-int(lengths.sum()) // (budget * num_ranks))
    counts = (count for count in row_counts(-(-len(lengths) // num_ranks)) if count >= least)
    tries = (_Packing(lengths, costs, budget, num_ranks, num_rows) for num_rows in counts)
    # The last has a row for each document, and cannot fail.
    packing = next(packing for packing in tries if packing.spread())
    packing.even_out()
    return Plan(packing.rows(), packing.rank_costs, float(packing.room.sum() / (budget * packing.room.size)))


class _Packing:
    """Documents on their way into rows.

    Attributes:
      room: int [ranks, rows], free places.
      place: int [documents], rank · rows + row, or -1.
    """

    def __init__(self, lengths: np.ndarray, costs: np.ndarray, budget: int, num_ranks: int, num_rows: int):
        self.lengths, self.costs = lengths, costs
        self.num_rows = num_rows
        self.room = np.full((num_ranks, num_rows), budget)
        self.rank_costs = np.zeros(num_ranks)
        self.place = np.full(len(lengths), -1)

    def _put(self, document: int, rank: int, row: int) -> None:
        self.room[rank, row] -= self.lengths[document]
        self.rank_costs[rank] += self.costs[document]
        self.place[document] = rank * self.num_rows + row

    def _take(self, document: int) -> tuple[int, int]:
        rank, row = divmod(int(self.place[document]), self.num_rows)
        self.room[rank, row] += self.lengths[document]
        self.rank_costs[rank] -= self.costs[document]
        return rank, row

    def spread(self) -> bool:
        """The longest document to the idlest rank with room. False if one finds none."""
        for document in np.argsort(-self.lengths, kind="stable").tolist():
            fits = self.room.max(1) >= self.lengths[document]
            if not fits.any():
                return False
            rank = int(np.where(fits, self.rank_costs, np.inf).argmin())
            self._put(document, rank, _fullest(self.room[rank], self.lengths[document]))
        return True

    def even_out(self) -> None:
        """Moves or exchanges documents between the busiest rank and another, the best step first, while the busier of
        the two gets less to do."""
        for _ in range(4 * len(self.lengths)):
            busiest = int(self.rank_costs.argmax())
            idle_first = np.argsort(self.rank_costs, kind="stable").tolist()
            if not any(self._exchange(busiest, other) for other in idle_first if other != busiest):
                return

    def _exchange(self, busy: int, idle: int) -> bool:
        gap = self.rank_costs[busy] - self.rank_costs[idle]
        rank_of = self.place // self.num_rows
        given, taken = np.flatnonzero(rank_of == busy), np.flatnonzero(rank_of == idle)
        # In exchange for each document, or (the last columns) for nothing, into the idle rank's emptiest row.
        room = np.append(self.room.ravel()[self.place[taken]] + self.lengths[taken], self.room[idle].max())
        lengths, costs = np.append(self.lengths[taken], 0), np.append(self.costs[taken], 0)
        difference = self.costs[given, None] - costs
        fits = self.lengths[given, None] <= room
        fits &= lengths <= (self.room.ravel()[self.place[given]] + self.lengths[given])[:, None]
        # A gain of a millionth is worth no step, and rounding must not make two ranks exchange for ever.
        better = fits & (difference > 1e-6 * gap) & (difference < (1 - 1e-6) * gap)
        if not better.any():
            return False
        i, j = np.unravel_index(np.where(better, np.abs(difference - gap / 2), np.inf).argmin(), difference.shape)
        document, place = int(given[i]), (idle, int(self.room[idle].argmax()))
        freed = self._take(document)
        if j < len(taken):
            place = self._take(int(taken[j]))
            self._put(int(taken[j]), *freed)
        self._put(document, *place)
        return True

    def rows(self) -> Rows:
        num_ranks, num_rows = self.room.shape
        rows: Rows = [[[] for _ in range(num_rows)] for _ in range(num_ranks)]
        for document, place in enumerate(self.place.tolist()):
            rows[place // num_rows][place % num_rows].append(document)
        return rows


def _fullest(room: np.ndarray, length: int) -> int:
    """Of the rows with room for `length`, the one with the least."""
    return int(np.where(room >= length, room, np.iinfo(room.dtype).max).argmin())
