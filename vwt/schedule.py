"""PruningSchedule: in which blocks how many tokens go."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from vwt.documents import load_document, save_document
from vwt.errors import ArgumentError, DocumentError
from vwt.pruning import KINDS, Prune, Reduction

VERSION = 1


class PruningSchedule(Mapping[int, Reduction]):
    """Which blocks make fewer tokens of theirs, between attention and MLP.

    A mapping from the index of a block, from 0, to `Prune` or `Merge`; a bare number means `Prune`. Empty, it prunes
    nothing.

    Args:
        reductions: by block; tokens to remove (`56`), or their share of the patch tokens that enter it (`0.3`).

    Raises:
        ArgumentError: for a block that is no index, or an amount that is none.

    >>> PruningSchedule({3: 56})
    PruningSchedule({3: Prune(56)})
    """

    def __init__(self, reductions: Mapping[int, int | float | Reduction]) -> None:
        if not isinstance(reductions, Mapping):
            raise ArgumentError(f"a schedule is {reductions!r}; expected a mapping such as {{3: 56, 6: Merge(40)}}")
        made = {_check_block(block): _check_reduction(what) for block, what in reductions.items()}
        self._reductions = dict(sorted(made.items()))

    def __getitem__(self, block: int) -> Reduction:
        return self._reductions[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self._reductions)

    def __len__(self) -> int:
        return len(self._reductions)

    def __repr__(self) -> str:
        return f"PruningSchedule({self._reductions})"

    def __hash__(self) -> int:
        return hash(tuple(self._reductions.items()))

    def check(self, blocks: int, patches: int | None = None) -> None:
        """Raise ArgumentError unless a model of so many blocks can do what is scheduled.

        Args:
            blocks: the model's depth.
            patches: patch tokens (or words) that enter the first block, None where images differ. An image that has too
                few loses as many as it can.
        """
        for block, reduction in self.items():
            if block >= blocks:
                raise ArgumentError(
                    f"the schedule names block {block}; expected one of the model's {blocks}, from 0 to {blocks - 1}"
                )
            if patches is None:
                continue
            wanted, most = reduction.wanted(patches), reduction.most(patches)
            if not 1 <= wanted <= most:
                expected = f"expected 1 to {most}" if most > 0 else "leave the block out, nothing can go there"
                raise ArgumentError(
                    f"{reduction} in block {block} removes {wanted} of the {patches} patch tokens that enter it; "
                    + expected
                )
            patches -= wanted

    def to_json(self) -> list[dict[str, Any]]:
        """As it is written into files."""
        return [{"block": b, "operation": what.kind, "amount": what.amount} for b, what in self.items()]

    @classmethod
    def from_json(cls, rows: Any, origin: str = "the schedule") -> "PruningSchedule":
        """What `to_json` gave.

        Raises:
            DocumentError: if that is something else; `origin` names where it was read.
        """
        reductions: dict[int, Reduction] = {}
        if not isinstance(rows, list):
            raise DocumentError(f"{origin} has reductions of type {type(rows).__name__}; expected a list of them")
        for row in rows:
            if not isinstance(row, dict) or set(row) != {"block", "operation", "amount"}:
                raise DocumentError(f"{origin} has the reduction {row!r}; expected a block, an operation and an amount")
            kind = KINDS.get(str(row["operation"]))
            if kind is None:
                raise DocumentError(f"{origin} has the operation {row['operation']!r}; expected {' or '.join(KINDS)}")
            try:
                block, reduction = _check_block(row["block"]), kind(row["amount"])
            except (ArgumentError, TypeError) as error:
                raise DocumentError(f"{origin} has the reduction {row!r}: {error}") from error
            if block in reductions:
                raise DocumentError(f"{origin} names block {block} twice; expected one reduction a block")
            reductions[block] = reduction
        return cls(reductions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            DocumentError: if the file cannot be written.
        """
        save_document(path, "schedule", VERSION, {"reductions": self.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningSchedule":
        """Read what `save` wrote.

        Raises:
            DocumentError: if the file is missing, cut short, or no schedule.
        """
        fields = load_document(path, "schedule", VERSION, ("reductions",))
        return cls.from_json(fields["reductions"], str(path))


def _check_block(block: Any) -> int:
    if not isinstance(block, int) or isinstance(block, bool) or block < 0:
        raise ArgumentError(f"the schedule names block {block!r}; expected an index from 0")
    return block


def _check_reduction(what: Any) -> Reduction:
    if not isinstance(what, Reduction):
        return Prune(what)
    if type(what) not in KINDS.values():
        raise ArgumentError(
            f"the schedule has {what!r}; expected a number, {' or '.join(k.__name__ for k in KINDS.values())}"
        )
    return what
