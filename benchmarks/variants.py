"""What the benchmarks measure: one registry of variants, which latency, fidelity and energy are tables over.

To add a row, add a Variant; to add a comparator, a file to `peers` and a Variant here. What a model or this machine
cannot do is a row with a note, and no error.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import peers
import torch
from harness import Bench
from peers import PadAndMask
from results import Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vwt import Absorb, InterImage, IntraImage, Merge, Neighbours, Plan, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, VWTError, first_line
from vwt.models.backbone import Backbone
from vwt.reductions.reduction import patches_entering

Module: TypeAlias = Callable[[Tensor], Any]

FULL, QUANTISED = "full", "quantised"
RANDOM, PAPER, PADDED, TOME, POMT, TOPK = "random drop", "VWT paper", "padded", "ToMe", "POMT", "top-k"
ATC, DIFFRATE, PPT, PITOME = "ATC", "DiffRate", "PPT", "PiToMe"
NEIGHBOURS, INSIDE, BOTH, FILES = "Neighbours", "schedule", "strategy + schedule", "from files"
OURS = (NEIGHBOURS, INSIDE, BOTH, FILES)
PEERS = (RANDOM, PAPER, PADDED, TOME, POMT, TOPK, ATC, DIFFRATE, PPT, PITOME)

DROPS = (0.15, 0.225, 0.33, 0.4)  # shares of the patches that go before the blocks: 29, 44, 64 and 78 of 196
INTRA_DROPS = (0.25, 0.33, 0.5)
TOGETHER = [(0.15, 0.4), (0.15, 0.5), (0.225, 0.4), (0.33, 0.4), (0.4, 0.5)]  # before the blocks, and inside them
PRUNED = (28, 56, 84)  # in block 3, as in the paper of Prune One More Token
SCHEDULES = [
    *(PruningSchedule({3: Prune(removed)}) for removed in PRUNED),
    PruningSchedule({3: Merge(60)}),
    *(PruningSchedule({block: Absorb(removed)}) for block, removed in ((3, 60), (3, 80), (3, 98), (3, 120), (4, 98))),
    # As many tokens on average as the comparators that remove in all blocks: 168, 159, 153, 138, 134, 125 and 119.
    *(
        PruningSchedule({3: Absorb(first), 6: Absorb(second)})
        for first, second in ((30, 21), (35, 35), (40, 42), (55, 53), (60, 54), (60, 76), (60, 92))
    ),
    *(  # and in four: 169, 153, 139 and 119, with the least KL of some thirty that were tried on other images
        PruningSchedule({block: Absorb(removed) for block, removed in zip((3, 5, 7, 9), amounts, strict=True)})
        for amounts in ((6, 24, 12, 50), (26, 28, 16, 42), (40, 42, 15, 31), (61, 51, 23, 23))
    ),
]


@dataclass(frozen=True)
class Variant:
    """Something to measure.

    Attributes:
        name: of its row; no other has it.
        group: what it is one of, see above.
        build: makes what is called with images (B, C, H, W), normalised for the model; raises VWTError if it cannot.
        baseline: name of the variant that its time is a ratio of: the full model as this one is run.
        same_as: name of the variant of vwt that has the same answers, where this is another way to them.
    """

    name: str
    group: str
    build: Callable[[], Module]
    baseline: str = FULL
    same_as: str | None = None


def registry(bench: Bench) -> list[Variant]:
    """All variants of a bench, the full model first; nothing is built yet but what files hold."""
    model = bench.model
    return [
        Variant(FULL, FULL, lambda: model),
        Variant("bfloat16", QUANTISED, partial(peers.in_bfloat16, model)),
        Variant("int8 (torchao, dynamic)", QUANTISED, partial(peers.in_int8, model)),
        *before_the_blocks(bench),
        *inside_the_blocks(bench),
        *from_files(bench),
        *comparators(bench),
    ]


def before_the_blocks(bench: Bench) -> Iterator[Variant]:
    """Strategies: random dropping, the paper's two, the same padded, and our own."""
    wrap = partial(VWTokenizer, bench.model)
    for drop in (*DROPS, 0.5):
        yield Variant(f"random drop {drop:g}", RANDOM, partial(wrap, peers.RandomDrop(drop, bench.arguments.seed)))
    for drop in INTRA_DROPS:
        yield Variant(f"IntraImage {drop:g}", PAPER, partial(wrap, IntraImage(drop)))
    for name, strategy in inter_image(bench):
        yield Variant(name, PAPER, partial(wrap, strategy))
        yield Variant(f"{name}, padded and masked", PADDED, partial(padded, bench, strategy), same_as=name)
    for drop in DROPS:
        yield Variant(f"Neighbours {drop:g}", NEIGHBOURS, partial(wrap, Neighbours(drop)))


def inside_the_blocks(bench: Bench) -> Iterator[Variant]:
    """Schedules, alone and after a strategy."""
    wrap, half = partial(VWTokenizer, bench.model), Backbone(bench.model).depth // 2
    for schedule in SCHEDULES:
        yield Variant(schedule_name(schedule), INSIDE, partial(wrap, schedule=schedule))
    both: list[tuple[str, Any, PruningSchedule]] = [
        (f"Neighbours {drop:g}", Neighbours(drop), PruningSchedule({half: Absorb(merged)})) for drop, merged in TOGETHER
    ]
    both += [(name, strategy, PruningSchedule({3: Prune(56)})) for name, strategy in inter_image(bench)]
    for name, strategy, schedule in both:
        yield Variant(f"{name} + {schedule_name(schedule)}", BOTH, partial(wrap, strategy, schedule))


def from_files(bench: Bench) -> Iterator[Variant]:
    """Schedules and plans that were saved; they are built here, so that what is wrong with them is an error."""
    for path in bench.arguments.schedule or []:
        reduced = VWTokenizer(bench.model, schedule=PruningSchedule.load(path))
        yield Variant(f"schedule {path.name}", FILES, lambda reduced=reduced: reduced)  # type: ignore[misc]
    for path in bench.arguments.plan or []:
        reduced = Plan.load(path).apply(bench.model, force=True)  # one of another machine may well be measured here
        yield Variant(f"plan {path.name}", FILES, lambda reduced=reduced: reduced)  # type: ignore[misc]


def comparators(bench: Bench) -> Iterator[Variant]:
    """The comparators that reduce inside the blocks, as their papers run them."""
    model, patches = bench.model, Backbone(bench.model).patches
    for r in (8, 13):
        everywhere = dict.fromkeys(range(Backbone(model).depth), r)
        yield Variant(f"ToMe r {r}", TOME, partial(peers.TokenMerging, model, everywhere))
        yield Variant(f"ATC r {r}", ATC, partial(peers.AgglomerativeClustering, model, everywhere))
    for keep in bench.arguments.topk:
        dropped = {3: max(0, patches - keep)}
        yield Variant(f"top-k, {keep} kept in block 3", TOPK, partial(peers.ClassAttentionTopK, model, dropped))
    for removed in PRUNED:
        name, same_as = f"POMT R {removed} in block 3", schedule_name(PruningSchedule({3: Prune(removed)}))
        yield Variant(name, POMT, partial(peers.PruneOneMoreToken, model, {3: removed}), same_as=same_as)
    deit = peers.diffrate.nearest(int(getattr(model, "embed_dim", 0)))
    for gmacs in peers.diffrate.DEIT[deit]:
        name = f"DiffRate, rates of {deit} at {gmacs} GMACs"
        yield Variant(name, DIFFRATE, partial(peers.DiffRate.published, model, gmacs))
    for removed in (30, 50):
        thrice = dict.fromkeys((3, 6, 9), removed)
        yield Variant(f"PPT, {removed} in blocks 3, 6 and 9", PPT, partial(peers.PruneOrPool, model, thrice))
    for rate in (0.95, 0.925):
        yield Variant(f"PiToMe, {rate:g} kept", PITOME, partial(peers.EnergyMerging.keeping, model, rate))


def inter_image(bench: Bench) -> list[tuple[str, InterImage]]:
    """The paper's words, of each codebook at each threshold, by name."""
    return [
        (f"InterImage {codebook.space} {len(codebook)}, {threshold:g}", InterImage(codebook, threshold))
        for codebook in bench.codebooks
        for threshold in bench.arguments.threshold
    ]


def padded(bench: Bench, strategy: InterImage) -> PadAndMask:
    """A strategy on the bench's model, with padding and a mask."""
    return PadAndMask(VWTokenizer(bench.model, strategy))


def schedule_name(schedule: PruningSchedule) -> str:
    """As rows are named: `Prune(56) in block 3`."""
    return ", ".join(f"{what!r} in block {block}" for block, what in schedule.items())


# -- use ---------------------------------------------------------------------------------------------------------------


def choose(variants: Sequence[Variant], only: Sequence[str] | None) -> list[Variant]:
    """Variants with one of these texts in their name, or as their group, and what they are compared with.

    Raises:
        ArgumentError: if there are none.
    """
    chosen = [v for v in variants if only is None or any(text in v.name or text == v.group for text in only)]
    if only is not None and not chosen:
        raise ArgumentError(
            f"no variant has {' or '.join(only)} in its name; there are {', '.join(v.name for v in variants)}"
        )
    names = {FULL, *(name for v in chosen for name in (v.name, v.baseline))}
    return [v for v in variants if v.name in names]


def build(bench: Bench, variants: Sequence[Variant], batch: Tensor) -> tuple[dict[str, Module], dict[str, str]]:
    """Modules by name, each tried on a batch (B, C, H, W), and the reasons why others cannot be had."""
    modules: dict[str, Module] = {}
    notes: dict[str, str] = {}
    for variant in variants:
        try:
            module = variant.build()
            with bench.autocast():
                module(batch)
        except (VWTError, RuntimeError) as error:  # such as a kernel that this device lacks
            notes[variant.name] = f"not measured: {first_line(error)}"
        else:
            modules[variant.name] = module
    return modules, notes


def with_notes(variants: Sequence[Variant], rows: Sequence[Row], notes: dict[str, str]) -> list[Row]:
    """Rows in the order of the variants, each with its group, and one with a note for each that was not measured."""
    known = {row["name"]: row for row in rows}
    return [{"name": v.name, "group": v.group, **known.get(v.name, {"note": notes.get(v.name)})} for v in variants]


def mean_tokens(bench: Bench, module: Any, images: Tensor) -> Tensor:
    """Tokens of images (B, C, H, W), prefix included, mean over the blocks that they enter: (B,) float64.

    Args:
        bench: the full model.
        module: a VWTokenizer, padded or not, a comparator that says its `lengths`, or a model that reduces nothing.
        images: normalised for the model.
    """
    backbone = Backbone(bench.model)
    module = module.fast if isinstance(module, PadAndMask) else module
    if isinstance(module, VWTokenizer):
        counts = module.tokenize(images).counts.tolist()
        entering = [patches_entering(module.schedule, backbone.depth, count)[:-1] for count in counts]
        return backbone.prefix + torch.tensor(entering, dtype=torch.float64).mean(dim=1)
    full = backbone.prefix + backbone.patches
    lengths: list[int] = module.lengths(full) if hasattr(module, "lengths") else [full]
    return torch.full((len(images),), float(np.mean(lengths)), dtype=torch.float64)


def mean_gmacs(module: Module, images: Tensor) -> float:
    """Billions of multiply-accumulates an image: those of linear layers, convolutions, attention and what is added.

    As torch counts the calls that are made for images (B, C, H, W), normalised for the model.
    """
    # As products of matrices: not every torch counts fused attention on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(images)
    return float(counter.get_total_flops()) / 2e9 / len(images)
