"""Latency of reduced models against the full one, the limit, and their peers, on real images.

    python benchmarks/latency.py --model MODEL [--checkpoint FILE] [--batch-size 32] [--threads 2] [--plot FILE]
    python benchmarks/latency.py --model MODEL --matching [--words 1000 pixel:10000 ...]
    python benchmarks/latency.py --model MODEL --scaling

Protocol: images are drawn with a seed and put into batches. Every variant runs on every batch, in turn in one process,
after a warm-up on several batches; the order of the variants is drawn anew for each batch and run. A variant and its
ideal run right after each other on the same batch, in an order that alternates. The ideal is the same model's patch
embedding and position, then its blocks and head on a random subset of the batch's tokens, prepared beforehand, so that
the reduction is free: as many tokens as the variant has, or, for images of different counts, their mean rounded for
all (the sum of tokens run dense). `ms` and its quartiles are over all batches and runs; every ratio (`ratio` to the
full model, `efficiency` = ideal / actual, `vs_padding`, the throughput relative to padding with a mask) is the median
over batches of the ratio of the two medians over runs. `tokens` include the class token, and are the mean over images
of what enters block 0; for schedules, ToMe and top-k the mean over blocks.

--matching times finding the words of real patches alone, by brute force and as the strategy does it, and compares the
answers on all images. --scaling shows how time grows with images in a batch, with words, and with resolution; the
exponent is the slope in logarithms, 1 is linear.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matching
import torch
import torch.nn.functional as F
from harness import (
    Bench,
    Row,
    add_common,
    autocast,
    exponent,
    load_codebooks,
    load_model,
    open_device,
    positive,
    print_table,
    ratio,
    results_paths,
    save_results,
    schedule_name,
    spread,
)
from peers import ClassAttentionTopK, PadAndMask, TokenMerging, in_the_papers_way
from torch import Tensor, nn

from vwt import Absorb, InterImage, IntraImage, Merge, Prune, PruningSchedule, VWTokenizer
from vwt.cli import Parser
from vwt.errors import ArgumentError, VWTError
from vwt.measure.environment import hardware
from vwt.measure.timing import Calls, Seconds, on_batches
from vwt.models.backbone import Backbone
from vwt.pictures.figures import check_picture, subplots
from vwt.reductions.reduction import patches_entering
from vwt.tokens.patches import Space

DROPS = (0.25, 0.33, 0.5)
SCHEDULES = [
    *(PruningSchedule({3: Prune(removed)}) for removed in (28, 56, 84)),
    PruningSchedule({3: Merge(60)}),
    *(PruningSchedule({block: Absorb(removed)}) for block, removed in ((3, 60), (3, 80), (3, 98), (3, 120), (4, 98))),
    PruningSchedule({3: Absorb(60), 6: Absorb(50)}),
]
ALL_WORDS: list[tuple[Space, int]] = [(s, k) for s in ("embedding", "pixel") for k in (100, 1000, 10000)]
LATENCY = {
    "name": "", "tokens": ".1f", "ms": ".2f", "ms_q1": ".2f", "ms_q3": ".2f", "ratio": ".3f", "ideal_ms": ".2f",
    "efficiency": ".3f", "images_per_second": ".1f", "vs_padding": ".3f", "vs_paper": ".3f",
}  # fmt: skip
EXPONENTS = {"of": "", "x": "", "name": "", "exponent": ".2f"}
FEW = 8  # batches of each size that scaling is measured on

Strategies = dict[str, IntraImage | InterImage]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        run(arguments)
    except VWTError as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlatency: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def make_parser() -> Parser:
    """The options."""
    parser = Parser(prog="latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--torchcompile", action="store_true", help="compile everything that is measured")
    parser.add_argument("--threshold", nargs="+", type=float, default=[0.1], help="cosine distances of InterImage")
    parser.add_argument("--topk", nargs="+", type=positive, default=[84, 112], help="patches that top-k keeps")
    parser.add_argument(
        "--schedule", action="append", type=Path, metavar="JSON", help="of vwt schedule; can be repeated"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave the comparators out")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency over tokens")
    parser.add_argument("--matching", action="store_true", help="tables of matching time instead")
    parser.add_argument("--scaling", action="store_true", help="tables over images, words and resolution instead")
    parser.add_argument("--sizes", nargs="+", type=positive, default=[224, 384, 512], help="pixels, for --scaling")
    return parser


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    tables_instead = arguments.matching or arguments.scaling
    if arguments.plot and tables_instead:
        raise ArgumentError("--plot draws the table of latency; leave out --matching and --scaling")
    if arguments.images < arguments.batch_size:
        raise ArgumentError(f"--images {arguments.images} do not fill a batch of --batch-size {arguments.batch_size}")
    check_picture(arguments.plot)
    paths = results_paths(arguments.results_file)
    bench = Bench(arguments, open_device(arguments), load_model(arguments))
    bench.codebooks = load_codebooks(arguments, bench.model, ALL_WORDS if tables_instead else [("embedding", 1000)])
    line = hardware(bench.device, arguments.precision)
    print(
        f"{line}\n{arguments.model}, {arguments.images} images of {arguments.data}, batches of {arguments.batch_size}"
    )
    tables: dict[str, list[Row]] = {}
    if arguments.matching:
        tables["matching"] = matching.measure(bench)
        print_table("Matching, milliseconds a batch", tables["matching"], matching.COLUMNS)
    if arguments.scaling:
        tables |= measure_scaling(bench)
    if not tables_instead:
        tables["latency"] = measure_latency(bench)
        print_table("Latency, milliseconds a batch", tables["latency"], latency_columns(arguments.batch_size))
    save_results(paths, {"hardware": line, "arguments": vars(arguments)}, tables)
    if arguments.plot:
        plot_latency(arguments.plot, tables["latency"], f"{arguments.model}, batch {arguments.batch_size}\n{line}")


def latency_columns(batch_size: int) -> dict[str, str]:
    """Columns that say something at this batch size."""
    return {k: v for k, v in LATENCY.items() if batch_size > 1 or k not in ("images_per_second", "vs_padding")}


# -- latency -----------------------------------------------------------------------------------------------------------


class Ideal(nn.Module):
    """A model that is handed its reduced tokens.

    Args:
        model: see `vwt.models.families.FAMILIES`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.backbone = Backbone(model)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images (B, C, H, W), which is time that nobody is spared, and run the blocks on tokens (B, n, C).

        Returns:
            The model's output, and what was embedded.
        """
        _, embedded, _ = self.backbone.embed(images)
        return self.model.forward_head(self.backbone.encode(tokens)), embedded


def strategies(bench: Bench) -> Strategies:
    """Strategies by name."""
    named: Strategies = {f"IntraImage {drop:g}": IntraImage(drop) for drop in DROPS}
    for codebook in bench.codebooks:
        for threshold in bench.arguments.threshold:
            name = f"InterImage {codebook.space} {len(codebook)}, {threshold:g}"
            named[name] = InterImage(codebook, threshold)
    return named


@dataclass
class Variant:
    """Something to measure.

    Attributes:
        name: of its row.
        tokens: mean tokens, prefix included.
        calls: "actual", and where there is one "ideal", "padded" and "paper".
    """

    name: str
    tokens: float
    calls: Calls


def measure_latency(bench: Bench) -> list[Row]:
    """Rows of all variants."""
    batches = bench.batches(bench.images)
    with autocast(bench.device, bench.arguments.precision):
        variants = make_variants(bench, strategies(bench), batches, peers=not bench.arguments.no_peers)
    seconds = bench.time([variant.calls for variant in variants], len(batches))
    return make_rows(variants, seconds, bench.arguments.batch_size)


def make_variants(bench: Bench, strategies: Strategies, batches: list[Tensor], *, peers: bool) -> list[Variant]:
    """The full model first, then the strategies, then the peers."""
    full, unreduced = on_batches(bench.compiled(bench.model), batches), VWTokenizer(bench.model)
    tokens = unreduced.tokenize(batches[0][:1]).group.shape[1] + unreduced.backbone.prefix
    wrapped = on_batches(bench.compiled(unreduced), batches)
    variants = [
        Variant("full", tokens, {"actual": full}),
        Variant("VWTokenizer, no strategy", tokens, {"actual": wrapped, "ideal": full}),
        *(vwt_variant(bench, name, strategy, batches, peers) for name, strategy in strategies.items()),
        *(schedule_variant(bench, schedule, batches, peers) for schedule in make_schedules(bench, tokens)),
    ]
    if peers:
        for name, module in make_peers(bench).items():
            entering = module.lengths(tokens)
            calls: Calls = {"actual": on_batches(bench.compiled(module), batches)}
            variants.append(Variant(name, sum(entering) / len(entering), calls))
    return variants


def make_peers(bench: Bench) -> dict[str, TokenMerging | ClassAttentionTopK]:
    """Peers by name; top-k in block 3, or the last one of a model so short."""
    blocks = len(bench.model.blocks)  # type: ignore[arg-type]
    block = min(3, blocks - 1)
    peers: dict[str, TokenMerging | ClassAttentionTopK] = {f"ToMe r {r}": TokenMerging(bench.model, r) for r in (8, 13)}
    return peers | {
        f"top-k, {k} kept in block {block}": ClassAttentionTopK(bench.model, k, block) for k in bench.arguments.topk
    }


def vwt_variant(
    bench: Bench, name: str, strategy: IntraImage | InterImage, batches: list[Tensor], padded: bool
) -> Variant:
    """A strategy with its ideal and, where a batch can be ragged, the same with padding and a mask."""
    fast, ideal = VWTokenizer(bench.model, strategy), bench.compiled(Ideal(bench.model))
    counts = [fast.tokenize(batch).counts + fast.backbone.prefix for batch in batches]
    generator = torch.Generator().manual_seed(bench.arguments.seed)
    subsets = [free_tokens(fast.backbone, b, mean_count(c), generator) for b, c in zip(batches, counts, strict=True)]

    calls: Calls = {
        "actual": on_batches(bench.compiled(fast), batches),
        "ideal": lambda item: ideal(batches[item], subsets[item]),
    }
    if padded and len(batches[0]) > 1 and isinstance(strategy, InterImage):
        calls["padded"] = on_batches(bench.compiled(PadAndMask(fast)), batches)
    return Variant(name, float(torch.cat(counts).float().mean()), calls)


def make_schedules(bench: Bench, tokens: int) -> list[PruningSchedule]:
    """Those of the options, else the paper's and one merge, as far as the model can do them."""
    if bench.arguments.schedule is not None:
        return [PruningSchedule.load(path) for path in bench.arguments.schedule]
    return possible(SCHEDULES, len(bench.model.blocks), tokens - Backbone(bench.model).prefix)  # type: ignore[arg-type]


def possible(schedules: Sequence[PruningSchedule], depth: int, patches: int) -> list[PruningSchedule]:
    """The schedules that a model of so many blocks and patches can do."""
    return [
        s for s in schedules if all(b < depth and what.wanted(patches) <= what.most(patches) for b, what in s.items())
    ]


def schedule_variant(bench: Bench, schedule: PruningSchedule, batches: list[Tensor], peers: bool) -> Variant:
    """A schedule, and where it is a single pruning, the same in the paper's way."""
    fast = VWTokenizer(bench.model, schedule=schedule)
    calls: Calls = {"actual": on_batches(bench.compiled(fast), batches)}
    if peers and (paper := in_the_papers_way(bench.model, schedule)) is not None:
        calls["paper"] = on_batches(bench.compiled(paper), batches)
    entering = patches_entering(schedule, fast.backbone.depth, fast.backbone.patches)[:-1]
    return Variant(schedule_name(schedule), fast.backbone.prefix + sum(entering) / len(entering), calls)


def mean_count(counts: Tensor) -> int:
    """Tokens (B,) of images to how many each has if all have the same: the mean, rounded half up."""
    total, images = int(counts.sum()), len(counts)
    return (2 * total + images) // (2 * images)


def free_tokens(backbone: Backbone, images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random subset of the tokens of images (B, C, H, W), prefix tokens first, in their order: (B, count, D)."""
    _, tokens, _ = backbone.embed(images)
    patches = tokens.shape[1] - backbone.prefix
    chosen = torch.rand(len(images), patches, generator=generator).topk(count - backbone.prefix, dim=1).indices
    index = F.pad(chosen.sort(dim=1).values + backbone.prefix, (backbone.prefix, 0))
    index[:, : backbone.prefix] = torch.arange(backbone.prefix)
    return tokens.gather(1, index.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2]))


def make_rows(variants: Sequence[Variant], seconds: Sequence[Seconds], batch_size: int) -> list[Row]:
    """Rows of the table; the first variant is what others are a ratio of."""
    full = seconds[0]["actual"]
    rows = []
    for variant, times in zip(variants, seconds, strict=True):
        for role in ("actual", "padded"):
            if role not in times:
                continue
            low, middle, high = spread(times[role])
            name = variant.name if role == "actual" else f"{variant.name}, padded and masked"
            row: Row = {"name": name, "tokens": variant.tokens, "ms": middle, "ms_q1": low, "ms_q3": high}
            row["ratio"] = ratio(times[role], full)
            row["images_per_second"] = 1e3 * batch_size / middle
            if "ideal" in times:
                row["ideal_ms"] = spread(times["ideal"])[1]
                row["efficiency"] = ratio(times["ideal"], times[role])
            if role == "actual" and "paper" in times:
                row["vs_paper"] = ratio(times["actual"], times["paper"])
            if "padded" in times:
                row["vs_padding"] = ratio(times["padded"], times[role])
            rows.append(row)
    return rows


def plot_latency(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw milliseconds over tokens, with quartiles, and the ideal as a line.

    Args:
        path: .png, .svg or .pdf.
        rows: with name, tokens, ms, ms_q1, ms_q3 and, where there is one, ideal_ms.
        title: of the plot.
    """
    figure, ((axes,),) = subplots(1, 1, size=(9, 6))
    ideal = sorted((row["tokens"], row["ideal_ms"]) for row in rows if row.get("ideal_ms") is not None)
    if ideal:
        axes.plot(*zip(*ideal, strict=True), color="0.6", linestyle="--", marker=".", label="ideal: reduction for free")
    for index, row in enumerate(rows):
        error = [[row["ms"] - row["ms_q1"]], [row["ms_q3"] - row["ms"]]]
        axes.errorbar(row["tokens"], row["ms"], error, fmt="osD^v"[index // 10 % 5], capsize=3, label=row["name"])
    axes.set(xlabel="tokens an image, mean", ylabel="milliseconds a batch, median and quartiles", ylim=(0, None))
    axes.set_title(title, fontsize=8, wrap=True)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


# -- scaling -----------------------------------------------------------------------------------------------------------


def measure_scaling(bench: Bench) -> dict[str, list[Row]]:
    """Tables over images in a batch, words, and resolution, and the exponents of growth; printed as they come."""
    codebook = next((c for c in bench.codebooks if (c.space, len(c)) == ("embedding", 1000)), bench.codebooks[0])
    strategies: Strategies = {"IntraImage 0.5": IntraImage(0.5)}
    strategies[f"InterImage {codebook.space} {len(codebook)}"] = InterImage(codebook, bench.arguments.threshold[0])
    tables = {"images": scale_images(bench, strategies)}
    print_table("Growth with images in a batch", tables["images"], {"images": "d", **LATENCY})
    tables["words"] = matching.measure(bench)
    print_table("Growth with words: matching, milliseconds a batch", tables["words"], matching.COLUMNS)
    tables["resolution"] = scale_resolution(bench, strategies)
    print_table("Growth with resolution", tables["resolution"], {"pixels": "d", "patches": "d", **LATENCY})
    tables["exponents"] = [
        *growth(tables["images"], "images", ("name",), ("ms",)),
        *growth(tables["words"], "words", ("space", "threshold"), ("brute_ms", "own_ms")),
        *growth(tables["resolution"], "patches", ("name",), ("ms",)),
    ]
    print_table("Exponents: time grows as x to the power of", tables["exponents"], EXPONENTS)
    return tables


def scale_images(bench: Bench, strategies: Strategies) -> list[Row]:
    """Latency of one batch of 1, 2, 4, … 32 images, as far as there are images."""
    rows = []
    for size in (1, 2, 4, 8, 16, 32):
        if size <= len(bench.images):
            batches = bench.batches(bench.images, size)[:FEW]
            rows += [{"images": size, **row} for row in measure_strategies(bench, strategies, batches)]
    return rows


def scale_resolution(bench: Bench, strategies: Strategies) -> list[Row]:
    """Latency at each image size; codebooks stay the same."""
    rows = []
    for pixels in bench.arguments.sizes:
        other = Bench(bench.arguments, bench.device, load_model(bench.arguments, pixels))
        batches = other.batches(other.images)[:FEW]
        patches = int(other.model.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]
        found = measure_strategies(other, strategies, batches)
        rows += [{"pixels": pixels, "patches": patches, **row} for row in found]
    return rows


def measure_strategies(bench: Bench, strategies: Strategies, batches: list[Tensor]) -> list[Row]:
    """Rows of the full model and the strategies, without peers."""
    with autocast(bench.device, bench.arguments.precision):
        variants = make_variants(bench, strategies, batches, peers=False)
    return make_rows(variants, bench.time([v.calls for v in variants], len(batches)), len(batches[0]))


def growth(rows: Sequence[Row], size: str, names: Sequence[str], values: Sequence[str]) -> list[Row]:
    """Exponents of the growth of columns with the column `size`, where that varies, for each value of `names`."""
    found = []
    for name in dict.fromkeys(tuple(row[n] for n in names) for row in rows):
        own = [row for row in rows if tuple(row[n] for n in names) == name]
        for value in values if len({row[size] for row in own}) > 1 else ():
            slope = exponent([row[size] for row in own], [row[value] for row in own])
            found.append({"of": value, "x": size, "name": ", ".join(map(str, name)), "exponent": slope})
    return found


if __name__ == "__main__":
    sys.exit(main())
