"""The search for the candidate of lowest KL(full ‖ reduced) within a latency budget.

A candidate is a strategy before the blocks, and reductions inside them. The search has three rounds, each more costly:

1. The KL of each strategy and of each single reduction is measured on a part of the images.
2. The KL of a combination is estimated as the sum of the KL of its parts, and the combinations of lowest estimate are
   measured.
3. Local search: the best are changed a little, as long as that lowers their KL.

The winner is chosen on all images.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vwt.errors import ArgumentError
from vwt.progress import progress_bar
from vwt.reductions.absorb import Absorb
from vwt.reductions.reduction import Reduction, patches_entering
from vwt.tuning.calibration import Calibration
from vwt.tuning.profile import LatencyProfile

SCREENING_IMAGES = 64  # images on which candidates are compared


TRIES = 36  # candidates that are measured for a budget, after strategies and single reductions


FINALISTS = 8


SHARES = (0.12, 0.3, 0.6)  # that each reduction is tried with alone


GRID = (0.08, 0.16, 0.26, 0.38, 0.5)  # shares that one of two reductions removes


BLOCKS = 7  # that are combined: those in which reductions change the answer least for the blocks that they spare


NO_CHANGE = 1e-6  # nats below which answers are taken to be the same


class Candidate(NamedTuple):
    """A strategy, by its name among the options, and reductions by block."""

    option: str
    reductions: tuple[tuple[int, Reduction], ...]

    @property
    def blocks(self) -> dict[int, Reduction]:
        """The reductions as a mapping."""
        return dict(self.reductions)

    def without(self, block: int) -> "Candidate":
        """The others of its reductions."""
        return Candidate(self.option, tuple(pair for pair in self.reductions if pair[0] != block))


class Outcome(NamedTuple):
    """A candidate, and what it changes on all images.

    Attributes:
        candidate: strategy and reductions.
        kl: mean KL(model ‖ reduced) in nats.
        agreement: share of the images in which the first class is the model's.
    """

    candidate: Candidate
    kl: float
    agreement: float


@dataclass
class Option:
    """A strategy that may be chosen.

    Attributes:
        calibration: the images, reduced by it.
        cost: milliseconds a batch that it takes itself.
    """

    calibration: Calibration
    cost: float = 0.0
    patches: int = field(init=False)

    def __post_init__(self) -> None:
        self.patches = round(self.calibration.patches(SCREENING_IMAGES))

    @property
    def by_share(self) -> bool:
        """Whether images differ in their counts: a number would take all of one and little of another."""
        strategy = self.calibration.fast.strategy
        return strategy is not None and not strategy.fixed_count


class Search:
    """Candidates for one model on one device.

    Args:
        profile: of the model.
        options: strategies by name; "" is none, and must be there, with the tokens of `SCREENING_IMAGES` images kept.
        measured: what was measured before, by name; what is measured is added.
        progress: show progress bars.
    """

    def __init__(
        self,
        profile: LatencyProfile,
        options: Mapping[str, Option],
        measured: dict[str, float] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.profile, self.options, self.progress = profile, options, progress
        self.measured: dict[str, float] = {} if measured is None else measured
        self.blocks = range(self.last + 1)
        self.log_kl = self._measure_single_reductions()
        # Late blocks change least because least is gained there: what counts is KL over the square of blocks spared.
        cost = {block: self.log_kl[block][1] - 2 * math.log(profile.depth - block) for block in self.blocks}
        self.candidate_blocks = sorted(self.blocks, key=cost.__getitem__)[:BLOCKS]

    @property
    def last(self) -> int:
        """The last block in which a reduction changes anything."""
        return self.profile.depth - (2 if self.profile.reads_prefix_only else 1)

    def best(self, limit: float, tries: int = TRIES, finalists: int = FINALISTS) -> Outcome:
        """The candidate of lowest KL on all images whose predicted milliseconds are within the limit.

        Args:
            limit: milliseconds a batch.
            tries: candidates to measure on some images.
            finalists: of them, on all.

        Raises:
            ArgumentError: if there is none; says the least possible.
        """
        starts = self._starts(limit)
        if not starts:
            raise ArgumentError(
                f"nothing takes {limit:.2f} ms; the least possible is {self.least():.2f} ms (the model itself: "
                f"{self.profile.predict():.2f} ms)"
            )
        with progress_bar(total=tries + finalists, desc="searching", unit="candidate", show=self.progress) as bar:
            pool = starts[: max(1, tries // 2)]
            for start in pool:
                self.kl(start)
                bar.update()
            best = min(pool, key=self.kl)
            while len(pool) < tries and (better := self._improve(best, limit, pool, tries, bar.update)) != best:
                best = better
            outcomes = []
            for finalist in sorted(pool, key=self.kl)[:finalists]:
                outcomes.append(self.outcome(finalist))
                bar.update()
        return min(outcomes, key=lambda outcome: outcome.kl)

    def refit(self, candidate: Candidate, limit: float) -> Outcome | None:
        """The candidate with one of its reductions made such that the limit is just kept, if that can be."""
        fits = [self._fit(candidate.without(block), block, limit) for block, _ in candidate.reductions]
        kept = [fitted for fitted in fits if fitted is not None]
        return self.outcome(min(kept, key=self.kl)) if kept else None

    def outcome(self, candidate: Candidate) -> Outcome:
        """Measured on all images, once."""
        names = [f"{what} of {candidate!r}" for what in ("kl", "agreement")]
        if names[0] not in self.measured:
            fidelity = self.options[candidate.option].calibration.evaluate(candidate.blocks)
            self.measured[names[0]], self.measured[names[1]] = fidelity.mean_kl, fidelity.agreement
        return Outcome(candidate, *(self.measured[name] for name in names))

    def kl(self, candidate: Candidate) -> float:
        """Measured on `SCREENING_IMAGES` images, once."""
        key = repr(candidate)
        if key not in self.measured:
            calibration = self.options[candidate.option].calibration
            self.measured[key] = calibration.evaluate(candidate.blocks, SCREENING_IMAGES).mean_kl
        return self.measured[key]

    def predict(self, candidate: Candidate) -> float:
        """Milliseconds of a forward."""
        option = self.options[candidate.option]
        patches = option.patches if candidate.option else None
        return option.cost + self.profile.predict(candidate.blocks, patches)

    def least(self) -> float:
        """The fewest milliseconds that a strategy with one reduction reaches."""
        singles = [
            Candidate(name, ((block, self._reduction(option, Absorb.most(option.patches), option.patches)),))
            for name, option in self.options.items()
            for block in self.blocks
            if Absorb.most(option.patches) > 0
        ]
        return min((self.predict(candidate) for candidate in singles), default=self.profile.predict())

    # -- what each does alone ----------------------------------------------------------------------------------------

    def _measure_single_reductions(self) -> dict[int, list[float]]:
        """By block: logarithms of the KL when each of SHARES is removed there."""
        everything, log_kl = self.options[""], {}
        for block in progress_bar(self.blocks, desc="reducing", unit="block", show=self.progress):
            counts = [max(1, int(share * everything.patches)) for share in SHARES]
            made = [self._reduction(everything, count, everything.patches) for count in counts]
            log_kl[block] = [math.log(max(self.kl(Candidate("", ((block, what),))), NO_CHANGE)) for what in made]
        return log_kl

    def guess(self, candidate: Candidate) -> float:
        """KL, as if each changed what it changes alone."""
        total = self.kl(Candidate(candidate.option, ())) if candidate.option else 0.0
        entering = self._entering(candidate)
        for block, reduction in candidate.reductions:
            share = math.log(max(1, reduction.removed(entering[block])) / entering[block])
            shares, kls = [math.log(share) for share in SHARES], self.log_kl[block]
            low = 0 if share < shares[1] else 1
            slope = (kls[low + 1] - kls[low]) / (shares[low + 1] - shares[low])
            total += math.exp(kls[low] + max(slope, 0.0) * (share - shares[low]))
        return total

    # -- candidates within the limit ---------------------------------------------------------------------------------

    def _starts(self, limit: float) -> list[Candidate]:
        """Each strategy with no, one and two reductions, the most promising first; and the best of each strategy."""
        found: list[Candidate] = []
        for name in self.options:
            own = sorted(self._within(name, limit), key=self.guess)
            found += own[:30]
        found.sort(key=self.guess)
        firsts = {name: next((c for c in found if c.option == name), None) for name in self.options}
        promising = [first for first in firsts.values() if first is not None]
        promising.sort(key=self.guess)
        return list(dict.fromkeys([*found[:6], *promising[:6], *found[6:]]))

    def _within(self, name: str, limit: float) -> Iterator[Candidate]:
        empty = Candidate(name, ())
        if name and self.predict(empty) <= limit:
            yield empty  # with room left, which a weaker strategy uses better
            return
        yield from (single for block in self.blocks if (single := self._fit(empty, block, limit)))
        for block in self.candidate_blocks:
            for share in GRID:
                if first := self._with(empty, block, share):
                    rest = [later for later in self.candidate_blocks if later > block]
                    yield from (pair for later in rest if (pair := self._fit(first, later, limit)))

    def _entering(self, candidate: Candidate) -> list[int]:
        return patches_entering(candidate.blocks, self.profile.depth, self.options[candidate.option].patches)

    @staticmethod
    def _reduction(option: Option, removed: int, entering: int) -> Reduction:
        # Prune and Merge change the answer more at the same cost.
        return Absorb(min(removed / entering, 1 - 1e-9) if option.by_share else removed)

    def _with(self, candidate: Candidate, block: int, share: float) -> Candidate | None:
        """One reduction more, of a share of what enters; None where that is not possible."""
        entering = self._entering(candidate)[block]
        removed = int(share * entering)
        if not 1 <= removed <= Absorb.most(entering):
            return None
        what = self._reduction(self.options[candidate.option], removed, entering)
        return self._checked(candidate.option, candidate.blocks | {block: what})

    def _fit(self, others: Candidate, block: int, limit: float) -> Candidate | None:
        """Others and the least reduction in a block with which the limit is kept; None if there is none."""
        entering = self._entering(others)[block]
        low, high = 0, Absorb.most(entering)

        def make(removed: int) -> Candidate:
            what = self._reduction(self.options[others.option], removed, entering)
            return Candidate(others.option, tuple(sorted((others.blocks | {block: what}).items(), key=_by_block)))

        if high < 1 or self.predict(make(high)) > limit:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.predict(make(middle)) <= limit else (middle, high)
        return self._checked(others.option, make(high).blocks)

    def _checked(self, option: str, blocks: Mapping[int, Reduction]) -> Candidate | None:
        """The candidate, if there are tokens enough for all of its reductions."""
        candidate = Candidate(option, tuple(sorted(blocks.items(), key=_by_block)))
        entering = self._entering(candidate)
        fits = all(1 <= what.wanted(entering[b]) <= what.most(entering[b]) for b, what in candidate.reductions)
        return candidate if fits else None

    # -- moves -------------------------------------------------------------------------------------------------------

    def _improve(
        self, best: Candidate, limit: float, pool: list[Candidate], tries: int, count: Callable[[], Any]
    ) -> Candidate:
        """The first neighbour that is measured to be better, else the same."""
        for neighbour in sorted(set(self._neighbours(best, limit)) - set(pool), key=self.guess):
            if len(pool) >= tries:
                break
            pool.append(neighbour)
            count()
            if self.kl(neighbour) < self.kl(best):
                return neighbour
        return best

    def _neighbours(self, best: Candidate, limit: float) -> Iterator[Candidate]:
        """Each reduction a block up or down, larger or smaller, gone; one more; another strategy."""
        fits: Iterable[Candidate | None]
        for block, what in best.reductions:
            others = best.without(block)
            near = [other for other in self.blocks if abs(other - block) <= 1 and other not in others.blocks]
            fits = [self._fit(others, other, limit) for other in near]
            for share in (0.08, 0.2):
                more = [self._with(others, other, share) for other in self.candidate_blocks if other not in best.blocks]
                fits += [self._fit(added, block, limit) for added in more if added]
            for free, _ in others.reductions:
                rest = others.without(free)
                fits.append(self._fit(rest, free, limit))
                for factor in (0.7, 0.85, 1.15, 1.4):
                    share = factor * what.removed(self._entering(best)[block]) / self._entering(best)[block]
                    if changed := self._with(rest, block, share):
                        fits.append(self._fit(changed, free, limit))
            for name in self.options:
                moved = self._checked(name, others.blocks)
                fits.append(self._fit(moved, block, limit) if moved else None)
            yield from (fitted for fitted in fits if fitted and fitted != best)


def _by_block(pair: tuple[int, Reduction]) -> int:
    return pair[0]
