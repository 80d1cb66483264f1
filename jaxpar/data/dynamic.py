"""Plans which document of a step goes into which row of which dp rank. A plan depends on its arguments alone.

A row is one microbatch: whole documents in a fixed number of tokens, the budget. All ranks get the same number of rows,
because all run the same program. Only a few numbers of rows are used, because XLA compiles a program for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Rows = list[list[list[int]]]  # [rank][row]: indices of documents


@dataclass(frozen=True)
class DocumentCost:
    """FLOPs of training on a document of n tokens with attention inside it: per_token · n + per_pair · n · min(n, window)."""

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
      rows: rows[r][m] has the indices of the documents in row m of dp rank r, ascending. Each document is in exactly
        one row; a row may be empty.
      costs: total cost of the documents of each dp rank.
      padding_fraction: share of all row tokens that are padding.
    """

    rows: Rows
    costs: Float[np.ndarray, " ranks"]
    padding_fraction: float

    @property
    def num_rows(self) -> int:
        """Rows of each rank, the same for all ranks."""
        return len(self.rows[0])

    @property
    def balance(self) -> float:
        """Cost of the busiest rank divided by the mean; 1 is perfect balance."""
        mean = self.costs.mean()
        return float(self.costs.max() / mean) if mean else 1.0


def row_counts(most: int) -> Iterator[int]:
    """The numbers of rows that a rank may have, up to `most`: 1, 2, … 16, 18, 20, … 32, 36, …

    Above 16 there are eight for each doubling, so that rounding up adds less than an eighth of the rows.
    """
    count = 1
    while count < most:
        yield count
        count += max(1, (1 << count.bit_length()) // 16)
    yield most


def plan_rows(lengths: Int[np.ndarray, " documents"], budget: int, num_ranks: int, cost: DocumentCost) -> Plan:
    """Packs documents into as few rows per rank as `row_counts` and the packing allow, then balances the ranks' costs.

    The longest document comes first. Each goes to the rank with the lowest cost among those with room for it, there into
    the fullest row with room for it (longest processing time first, Graham, 1969, "Bounds on multiprocessing timing
    anomalies"; best fit decreasing). Pairs of ranks then exchange documents as long as this improves the balance.

    Args:
      lengths: tokens in each document, from 0 to `budget`.
      budget: tokens in a row.
      num_ranks: size of dp.

    Raises:
      ValueError: a document is longer than the budget; names the document.
    """
    if too_long := np.flatnonzero(lengths > budget).tolist():
        raise ValueError(f"document {too_long[0]} has {lengths[too_long[0]]} tokens, more than the {budget} in a row")
    costs = cost(lengths)
    least = -(-int(lengths.sum()) // (budget * num_ranks))
    counts = (count for count in row_counts(-(-len(lengths) // num_ranks)) if count >= least)
    tries = (_Packing(lengths, costs, budget, num_ranks, num_rows) for num_rows in counts)
    # The last count gives each document a row of its own, so it cannot fail.
    packing = next(packing for packing in tries if packing.spread())
    packing.even_out()
    return Plan(packing.rows(), packing.rank_costs, float(packing.room.sum() / (budget * packing.room.size)))


class _Packing:
    """A plan under construction.

    Attributes:
      room: int [ranks, rows], unused tokens of each row.
      rank_costs: float [ranks], total cost of the documents of each rank.
      row_of: int [documents], rank * num_rows + row of each document; -1 before it has one.
    """

    def __init__(self, lengths: np.ndarray, costs: np.ndarray, budget: int, num_ranks: int, num_rows: int):
        self.lengths, self.costs = lengths, costs
        self.num_rows = num_rows
        self.room = np.full((num_ranks, num_rows), budget)
        self.rank_costs = np.zeros(num_ranks)
        self.row_of = np.full(len(lengths), -1)

    def _put(self, document: int, rank: int, row: int) -> None:
        self.room[rank, row] -= self.lengths[document]
        self.rank_costs[rank] += self.costs[document]
        self.row_of[document] = rank * self.num_rows + row

    def _take(self, document: int) -> tuple[int, int]:
        rank, row = divmod(int(self.row_of[document]), self.num_rows)
        self.room[rank, row] += self.lengths[document]
        self.rank_costs[rank] -= self.costs[document]
        return rank, row

    def spread(self) -> bool:
        """Gives each document to a rank and row, as in `plan_rows`. False if some document fits nowhere."""
        for document in np.argsort(-self.lengths, kind="stable").tolist():
            fits = self.room.max(1) >= self.lengths[document]
            if not fits.any():
                return False
            rank = int(np.where(fits, self.rank_costs, np.inf).argmin())
            self._put(document, rank, _fullest(self.room[rank], self.lengths[document]))
        return True

    def even_out(self) -> None:
        """Moves or exchanges documents between the busiest rank and another, as long as this lowers the higher of their
        two costs. Each time, the best exchange is taken."""
        for _ in range(4 * len(self.lengths)):
            busiest = int(self.rank_costs.argmax())
            idle_first = np.argsort(self.rank_costs, kind="stable").tolist()
            if not any(self._exchange(busiest, other) for other in idle_first if other != busiest):
                return

    def _exchange(self, busy: int, idle: int) -> bool:
        """Makes the best exchange between two ranks. False if none helps."""
        gap = self.rank_costs[busy] - self.rank_costs[idle]
        rank_of = self.row_of // self.num_rows
        given, taken = np.flatnonzero(rank_of == busy), np.flatnonzero(rank_of == idle)
        # The last column stands for no document in return: the given one goes into the idle rank's emptiest row.
        room = np.append(self.room.ravel()[self.row_of[taken]] + self.lengths[taken], self.room[idle].max())
        lengths, costs = np.append(self.lengths[taken], 0), np.append(self.costs[taken], 0)
        difference = self.costs[given, None] - costs
        fits = self.lengths[given, None] <= room
        fits &= lengths <= (self.room.ravel()[self.row_of[given]] + self.lengths[given])[:, None]
        # A gain below a millionth is not worth an exchange, and rounding must not make two ranks exchange forever.
        better = fits & (difference > 1e-6 * gap) & (difference < (1 - 1e-6) * gap)
        if not better.any():
            return False
        i, j = np.unravel_index(np.where(better, np.abs(difference - gap / 2), np.inf).argmin(), difference.shape)
        document, target = int(given[i]), (idle, int(self.room[idle].argmax()))
        freed = self._take(document)
        if j < len(taken):
            target = self._take(int(taken[j]))
            self._put(int(taken[j]), *freed)
        self._put(document, *target)
        return True

    def rows(self) -> Rows:
        num_ranks, num_rows = self.room.shape
        rows: Rows = [[[] for _ in range(num_rows)] for _ in range(num_ranks)]
        for document, row in enumerate(self.row_of.tolist()):
            rows[row // num_rows][row % num_rows].append(document)
        return rows


def _fullest(room: np.ndarray, length: int) -> int:
    """The row with the least room among those with room for `length`."""
    return int(np.where(room >= length, room, np.iinfo(room.dtype).max).argmin())
