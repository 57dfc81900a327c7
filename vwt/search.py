"""The search for a schedule within a budget of time, at the least change of a model's answers.

Three rounds, from cheap to dear: single reductions are measured one by one on a part of the images; what several do
together is first taken to be the sum of what they do alone, which finds the region where the best lie; these are
measured, and the best is moved about as long as that helps. The winner is chosen on all images.
"""

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from tqdm import tqdm

from vwt.calibration import Calibration
from vwt.errors import ArgumentError
from vwt.profile import LatencyProfile
from vwt.pruning import KINDS, Reduction, patches_entering

SCREEN = 64  # images on which candidates are compared
TRIES = 60  # candidates that are measured, after the single reductions
FINALISTS = 4
SHARES = {"prune": (0.12, 0.3, 0.6), "merge": (0.12, 0.28, 0.5)}
NO_CHANGE = 1e-6  # nats below which answers are taken to be the same

Candidate: TypeAlias = dict[int, Reduction]


class Search:
    """Reductions for one model, with or without words before the blocks.

    Args:
        profile: of the model.
        calibration: with the tokens of `SCREEN` images kept.
        progress: show progress bars.
    """

    def __init__(self, profile: LatencyProfile, calibration: Calibration, *, progress: bool = True) -> None:
        self.profile, self.calibration, self.progress = profile, calibration, progress
        self.patches = round(calibration.patches)
        # Where words give each image its own count, a number would take all of one image and little of another.
        self.by_share = calibration.fast.strategy is not None and not calibration.fast.strategy.fixed_count
        self.measured: dict[tuple[tuple[int, Reduction], ...], float] = {}
        self.damage = self._measure_damage()

    def best(self, limit: float) -> Candidate:
        """The reductions whose predicted milliseconds are within the limit, and whose KL on all images is lowest.

        Raises:
            ArgumentError: if no reductions are within the limit; says the least possible.
        """
        if self.predict({}) <= limit:
            return {}
        starts = sorted(self._guesses(limit), key=self._guess)[: TRIES // 3]
        if not starts:
            raise ArgumentError(
                f"no schedule takes {limit:.2f} ms; the least possible is {self.least():.2f} ms (all: "
                f"{self.predict({}):.2f} ms)"
            )
        with tqdm(total=TRIES + FINALISTS, desc="search", unit="schedule", disable=not self.progress) as bar:
            for start in starts:
                self._kl(start)
                bar.update()
            best = min(starts, key=self._kl)
            while bar.n < TRIES:
                better = self._improve(best, limit, bar)
                if better == best:
                    break
                best = better
            within = [dict(key) for key in sorted(self.measured, key=self.measured.__getitem__)]
            finalists = [c for c in within if self.predict(c) <= limit][:FINALISTS]
            finals = {}
            for index, candidate in enumerate(finalists):
                finals[index] = self.calibration.evaluate(candidate).mean_kl
                bar.update()
        return finalists[min(finals, key=finals.__getitem__)]

    def predict(self, candidate: Candidate) -> float:
        """Milliseconds of a forward, without what is done before the blocks."""
        return self.profile.predict(candidate, self.patches)

    def least(self) -> float:
        """The fewest milliseconds that any single reduction reaches."""
        made = [{b: self._reduction(kind, self._most(kind))} for b in range(self.profile.depth) for kind in KINDS]
        return min(self.predict(candidate) for candidate in made)

    # -- what single reductions do -----------------------------------------------------------------------------------

    def _measure_damage(self) -> dict[tuple[str, int], tuple[list[float], list[float]]]:
        """By kind and block: logarithms of shares, and of the KL when such a share is removed there."""
        places = [(kind, block) for kind in KINDS for block in range(self.profile.depth)]
        damage = {}
        for kind, block in tqdm(places, desc="single reductions", unit="block", disable=not self.progress):
            kls = []
            for share in SHARES[kind]:
                kls.append(self._kl({block: self._reduction(kind, max(1, int(share * self.patches)))}))
            damage[kind, block] = ([math.log(s) for s in SHARES[kind]], [math.log(max(k, NO_CHANGE)) for k in kls])
        return damage

    def _guess(self, candidate: Candidate) -> float:
        """KL, as if each reduction changed what it changes alone."""
        entering = patches_entering(candidate, self.profile.depth, self.patches)
        total = 0.0
        for block, reduction in candidate.items():
            share = math.log(max(1, reduction.removed(entering[block])) / entering[block])
            shares, kls = self.damage[reduction.kind, block]
            low = int(np.clip(np.searchsorted(shares, share) - 1, 0, len(shares) - 2))
            slope = (kls[low + 1] - kls[low]) / (shares[low + 1] - shares[low])
            total += math.exp(kls[low] + max(slope, 0.0) * (share - shares[low]))
        return total

    def _kl(self, candidate: Candidate) -> float:
        key = tuple(sorted(candidate.items()))
        if key not in self.measured:
            self.measured[key] = self.calibration.evaluate(candidate, SCREEN).mean_kl
        return self.measured[key]

    # -- candidates --------------------------------------------------------------------------------------------------

    def _most(self, kind: str) -> int:
        return KINDS[kind].most(self.patches)

    def _reduction(self, kind: str, removed: int) -> Reduction:
        return KINDS[kind](removed / self.patches if self.by_share else removed)

    def _fit(self, others: Candidate, block: int, kind: str, limit: float) -> Candidate | None:
        """Others and the least reduction in a block with which the limit is kept; None if there is none."""
        entering = patches_entering(others, self.profile.depth, self.patches)[block]
        low, high = 0, KINDS[kind].most(entering)

        def make(removed: int) -> Candidate:
            reduction = KINDS[kind](removed / entering if self.by_share else removed)
            return dict(sorted({**others, block: reduction}.items()))

        if high < 1 or not self._possible(made := make(high)) or self.predict(made) > limit:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.predict(make(middle)) <= limit else (middle, high)
        return made if self._possible(made := make(high)) else None

    def _possible(self, candidate: Candidate) -> bool:
        entering = patches_entering(candidate, self.profile.depth, self.patches)
        return all(1 <= what.wanted(entering[b]) <= what.most(entering[b]) for b, what in candidate.items())

    def _guesses(self, limit: float) -> Iterator[Candidate]:
        """One, two and three reductions within the limit."""
        blocks = range(self.profile.depth)
        places = [(block, kind) for block in blocks for kind in KINDS]
        singles = [c for block, kind in places if (c := self._fit({}, block, kind, limit))]
        yield from singles
        pairs = []
        for block, kind in places:
            for share in (0.06, 0.12, 0.2, 0.3, 0.4, 0.6, 0.9):
                removed = int(share * self.patches)
                if not 1 <= removed <= self._most(kind):
                    continue
                first = {block: self._reduction(kind, removed)}
                rest = [self._fit(first, other, what, limit) for other, what in places if other != block]
                pairs += [pair for pair in rest if pair]
        pairs.sort(key=self._guess)
        yield from pairs[:100]
        for pair in pairs[:20]:
            for block, kind in places:
                if block not in pair:
                    for share in (0.06, 0.15, 0.3, 0.9):
                        yield from self._refit(pair, block, kind, share, limit)

    def _refit(self, candidate: Candidate, block: int, kind: str, share: float, limit: float) -> Iterator[Candidate]:
        """One reduction more, and one of the others as much less as the limit allows."""
        entering = patches_entering(candidate, self.profile.depth, self.patches)[block]
        removed = min(int(share * entering), KINDS[kind].most(entering))
        if removed < 1:
            return
        added = {block: KINDS[kind](share if self.by_share else removed)}
        for free, what in candidate.items():
            others = {b: r for b, r in candidate.items() if b != free} | added
            if fitted := self._fit(others, free, what.kind, limit):
                yield fitted

    # -- moves -------------------------------------------------------------------------------------------------------

    def _improve(self, best: Candidate, limit: float, bar: "tqdm[None]") -> Candidate:
        """The first neighbour that is measured to be better, else the same."""
        tried = {tuple(best.items())}
        for neighbour in sorted(self._neighbours(best, limit), key=self._guess):
            key = tuple(neighbour.items())
            if key in tried or bar.n >= TRIES:
                continue
            tried.add(key)
            if key not in self.measured:
                bar.update()
            if self._kl(neighbour) < self._kl(best):
                return neighbour
        return best

    def _neighbours(self, best: Candidate, limit: float) -> Iterator[Candidate]:
        """Each reduction a block up or down, of the other kind, larger or smaller, gone; or one more."""
        places = [(block, kind) for block in range(self.profile.depth) for kind in KINDS]
        for block, what in best.items():
            others = {b: r for b, r in best.items() if b != block}
            for other, kind in places:
                near = abs(other - block) <= 1 and (other, kind) != (block, what.kind)
                if near and other not in others and (fitted := self._fit(others, other, kind, limit)):
                    yield fitted
            for free, freed in others.items():
                rest = {b: r for b, r in others.items() if b != free}
                if fitted := self._fit(rest, free, freed.kind, limit):
                    yield fitted
                for factor in (0.7, 0.85, 1.15, 1.4):
                    changed = _scaled(what, factor)
                    if changed and (fitted := self._fit(rest | {block: changed}, free, freed.kind, limit)):
                        yield fitted
        for block, kind in places:
            if block not in best:
                for share in (0.08, 0.2):
                    yield from self._refit(best, block, kind, share, limit)


def _scaled(reduction: Reduction, factor: float) -> Reduction | None:
    amount = reduction.amount * factor
    if isinstance(reduction.amount, int):
        return type(reduction)(max(1, round(amount)))
    return type(reduction)(amount) if 0 < amount < 1 else None
