"""How near reduced models stay to the full one, over tokens and over latency, on real images.

    python benchmarks/fidelity.py --model MODEL [--checkpoint FILE] --data FOLDER [--results-file NAME] [--plot FILE]
    python benchmarks/fidelity.py --model MODEL --data FOLDER --limit 1000 --no-latency

Fidelity: every variant sees every image of the data set, or --limit of them drawn with the seed. `kl` is the mean over
images of KL(full ‖ reduced) of the class distributions, in nats; `agreement` how often the first class is the full
model's; `top1` how often it is the label's, and `top1_change` how much more often than the full model's is. Labels are
those of --class-map (names of classes, one a line, as timm takes it); by default ImageNet's, where a data set's folders
are WordNet ids and the model has these classes, or the data set's own where they are as many as the model's. `tokens`
are those that enter a block, prefix included, mean over blocks and images. `_low` and `_high` are the ends of 95 %
bootstrap intervals over images; they are paired: each resample draws the same images for all variants. The full model's
answers are kept in --cache, by its weights and the images' pixels, and so are all scores until the run is complete: the
same command goes on where it was interrupted; a run that is killed loses a minute.

Latency: afterwards, at batch 1, on --images of the images, all variants in turn (see benchmarks/latency.py). `ratio` is
to the full model, the median over images of the ratio of medians over --runs; its interval is over images. This needs
a quiet machine; --no-latency leaves it out.

`front` says on which Pareto fronts (KL over tokens, KL over latency) a variant is. The second table has, for each
comparator, the cheapest variant of vwt with at most its KL, and what it costs as a ratio to the comparator.
"""

import argparse
import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import ImageCache, find_class_map, has_labels
from fidelity_tables import (
    COLUMNS,
    EQUAL_KL,
    Scores,
    add_latency,
    equal_kl,
    fidelity_rows,
    mark_fronts,
    plot_fidelity,
)
from harness import (
    Bench,
    add_common,
    autocast,
    load_codebooks,
    load_model,
    mean_tokens,
    open_device,
    place,
    positive,
    print_table,
    results_paths,
    save_results,
    schedule_name,
    weights_checksum,
)
from latency import SCHEDULES, make_peers, possible, strategies
from peers import RandomDrop, TokenMerging, in_the_papers_way
from torch import Tensor
from tqdm import tqdm

import vwt
from vwt import Absorb, InterImage, Neighbours, Plan, PruningSchedule, VWTokenizer
from vwt.cli import Parser
from vwt.datasets import Batch, ImageSource
from vwt.errors import ArgumentError, DataError, VWTError
from vwt.measure.environment import hardware
from vwt.measure.timing import on_batches
from vwt.models.backbone import Backbone
from vwt.models.spec import PatchSpec
from vwt.pictures.figures import check_picture
from vwt.tuning.calibration import compare

DROPS = (0.15, 0.225, 0.33, 0.4)  # shares of the patches that go before the blocks: 29, 44, 64 and 78 of 196
TOGETHER = [(0.15, 0.4), (0.15, 0.5), (0.225, 0.4), (0.33, 0.4), (0.4, 0.5)]  # and inside them
ROW_OF_FULL = "full"
RANDOM, PAPER, TOME, POMT, TOPK = "random drop", "VWT paper", "ToMe", "POMT, the paper's way", "top-k"
NEIGHBOURS, BOTH, INSIDE, FILES = "Neighbours", "Neighbours + merge", "schedule", "from files"
PEERS = (RANDOM, PAPER, TOME, POMT, TOPK)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        run(arguments)
    except VWTError as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfidelity: interrupted; the same command goes on with what is kept in --cache", file=sys.stderr)
        return 130
    return 0


def make_parser() -> Parser:
    """The options; `--batch-size` is said anew, since latency is at batch 1."""
    parser = Parser(
        prog="fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    add_common(parser)
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="for fidelity; latency is at 1")
    parser.add_argument("--limit", type=positive, metavar="N", help="images for fidelity, drawn at random; default all")
    parser.add_argument("--class-map", type=Path, metavar="FILE", help="names of classes, one a line")
    parser.add_argument("--threshold", nargs="+", type=float, default=[0.1, 0.2], help="cosine distances of InterImage")
    parser.add_argument("--topk", nargs="+", type=positive, default=[84, 112], help="patches that top-k keeps")
    parser.add_argument("--schedule", action="append", type=Path, metavar="JSON", help="of vwt schedule; repeatable")
    parser.add_argument("--plan", action="append", type=Path, metavar="JSON", help="of vwt tune; repeatable")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="variants with one of these in their names")
    parser.add_argument("--no-peers", action="store_true", help="leave ToMe, POMT and top-k out")
    parser.add_argument("--no-latency", action="store_true", help="leave latency out")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw KL over tokens and over latency")
    parser.set_defaults(torchcompile=False)
    return parser


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    if arguments.workers < 0:
        raise ArgumentError(f"--workers is {arguments.workers}; expected at least 0")
    check_picture(arguments.plot)
    paths = results_paths(arguments.results_file)
    bench = Bench(arguments, open_device(arguments), load_model(arguments))
    images = open_images(bench)
    answers = ImageCache(arguments.cache / f"full-{answers_name(bench, images.source)}")
    bench.codebooks = load_codebooks(arguments, bench.model, [("embedding", 1000)])
    latency_images = None if arguments.no_latency else bench.images
    place(bench.model, bench.device, arguments.precision)
    variants = make_variants(bench)
    line = hardware(bench.device, arguments.precision)
    print(f"{line}\n{arguments.model}, {len(images.chosen) or 'all'} images of {arguments.data}{images.remark}")
    known = ImageCache(arguments.cache / f"scores-{scores_name(bench, variants, answers.path.name, line)}")
    scores = measure_fidelity(bench, variants, images, answers, known)
    rows = fidelity_rows(scores, {v.name: v.family for v in variants}, arguments.seed)
    header = {"hardware": line, "arguments": vars(arguments), "images": len(scores[ROW_OF_FULL].kl)}
    save_results(paths, header, {"fidelity": rows})  # whatever becomes of the rest
    seconds: dict[str, np.ndarray] = {}
    if latency_images is not None:
        seconds = measure_latency(bench, variants, bench.batches(latency_images, 1))
        add_latency(rows, seconds, arguments.seed)
    mark_fronts(rows)
    tables = {"fidelity": rows, "equal_kl": equal_kl(rows, scores, seconds, PEERS, arguments.seed)}
    print_table("Fidelity", rows, COLUMNS)
    print_table("At the KL of the comparators", tables["equal_kl"], EQUAL_KL)
    save_results(paths, header, tables)
    if arguments.plot:
        plot_fidelity(arguments.plot, rows, f"{arguments.model}, {header['images']} images\n{line}")
    known.path.unlink(missing_ok=True)


# -- images ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What fidelity is measured on.

    Attributes:
        source: the data set.
        chosen: ascending indices; empty for a stream without a limit.
        labelled: whether its labels are the model's classes.
        remark: what is to be said of them, for the first lines.
    """

    source: ImageSource
    chosen: Sequence[int]
    labelled: bool
    remark: str

    def batches(self, size: int, workers: int) -> Iterator[Batch]:
        """All of them, in order."""
        return self.source.batches(size, workers=workers, chosen=self.chosen or None)


def open_images(bench: Bench) -> Images:
    """The images of the options, and whether they have labels.

    Raises:
        DataError: if there are fewer than --limit.
    """
    options, remark = bench.arguments, ""
    classes = int(getattr(bench.model, "num_classes", 0))
    source = ImageSource(options.data, bench.model, split=options.split)
    class_map = options.class_map or find_class_map(source, classes)
    if class_map is not None:
        every = len(source)
        source = ImageSource(options.data, bench.model, split=options.split, class_map=class_map)
        if len(source) < every:
            remark = f" ({every - len(source)} of classes that {class_map.name} does not have left out)"
    labelled = has_labels(source, classes, class_map)
    if not labelled:
        remark += "; no top-1, its classes are not known to be the model's (--class-map)"
    count = options.limit or len(source)
    if len(source) and count > len(source):
        raise DataError(f"{options.data} has {len(source)} images, {count} were asked for with --limit")
    chosen: Sequence[int] = range(count)
    if len(source):
        chosen = sorted(random.Random(options.seed).sample(range(len(source)), count))
    return Images(source, chosen, labelled, remark)


def answers_name(bench: Bench, source: ImageSource) -> str:
    """What names the full model's answers: model, weights, data set and precision."""
    precision = f"{bench.arguments.precision}-{bench.device.type}"
    parts = (weights_checksum(bench.model)[:8], source.fingerprint()[:8], f"{source.input_size[-1]}px", precision)
    return f"{PatchSpec.of(bench.model).model}-{'-'.join(parts)}.safetensors"


def scores_name(bench: Bench, variants: Sequence["Variant"], answers: str, line: str) -> str:
    """What names the scores: all that they depend on, code, machine and versions included.

    Args:
        bench: the options.
        variants: what is measured, in order.
        answers: what names the full model's.
        line: of the hardware and versions.
    """
    options = (bench.arguments.seed, bench.arguments.batch_size, bench.arguments.limit)
    digest = hashlib.blake2b(f"{answers}\n{line}\n{options}".encode(), digest_size=8)
    for variant in variants:
        strategy, schedule = (getattr(variant.module, part, None) for part in ("strategy", "schedule"))
        digest.update(f"\n{variant.name}: {strategy}, {schedule}".encode())
        if isinstance(strategy, InterImage):
            digest.update(strategy.codebook.words.numpy().tobytes())
    for folder in (Path(vwt.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return f"{digest.hexdigest()}.safetensors"


# -- variants ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Something to measure.

    Attributes:
        name: of its row.
        family: what it is one of, for the plot.
        module: from images, normalised for the model, to logits.
    """

    name: str
    family: str
    module: Callable[[Tensor], Tensor]


def make_variants(bench: Bench) -> list[Variant]:
    """The full model first, then what --only leaves.

    Raises:
        ArgumentError: if that is nothing.
    """
    made = [*own_variants(bench), *variants_of_files(bench)]
    if not bench.arguments.no_peers:
        made += peer_variants(bench)
    only = bench.arguments.only
    chosen = [v for v in made if only is None or any(text in v.name for text in only)]
    if not chosen:
        raise ArgumentError(
            f"no variant has {' or '.join(only)} in its name; there are {', '.join(v.name for v in made)}"
        )
    return [Variant(ROW_OF_FULL, ROW_OF_FULL, bench.model), *chosen]


def own_variants(bench: Bench) -> list[Variant]:
    """What is done before the blocks, inside them, and both."""
    model, made = bench.model, []
    backbone = Backbone(model)

    def add(name: str, family: str, strategy: Any = None, schedule: PruningSchedule | None = None) -> None:
        made.append(Variant(name, family, VWTokenizer(model, strategy, schedule)))

    for drop in (*DROPS, 0.5):
        add(f"random drop {drop:g}", RANDOM, RandomDrop(drop, bench.arguments.seed))
    for name, strategy in strategies(bench).items():
        add(name, PAPER, strategy)
    for drop in DROPS:
        add(f"Neighbours {drop:g}", NEIGHBOURS, Neighbours(drop))
    for drop, merged in TOGETHER:
        schedule = PruningSchedule({backbone.depth // 2: Absorb(merged)})
        add(f"Neighbours {drop:g} + {schedule_name(schedule)}", BOTH, Neighbours(drop), schedule)
    for schedule in possible(SCHEDULES, backbone.depth, backbone.patches):
        add(schedule_name(schedule), INSIDE, None, schedule)
    return made


def peer_variants(bench: Bench) -> list[Variant]:
    """The comparators that are no strategies of vwt."""
    backbone = Backbone(bench.model)
    peers = make_peers(bench).items()
    made = [Variant(name, TOME if isinstance(module, TokenMerging) else TOPK, module) for name, module in peers]
    for schedule in possible(SCHEDULES, backbone.depth, backbone.patches):
        if (paper := in_the_papers_way(bench.model, schedule)) is not None:
            made.append(Variant(f"POMT R {paper.removed} in block {paper.block}", POMT, paper))
    return made


def variants_of_files(bench: Bench) -> list[Variant]:
    """Schedules and plans that were saved."""
    options = bench.arguments
    schedules = [
        Variant(f"schedule {path.name}", FILES, VWTokenizer(bench.model, schedule=PruningSchedule.load(path)))
        for path in options.schedule or []
    ]
    # A plan of another machine may well be measured here.
    plans = [
        Variant(f"plan {path.name}", FILES, Plan.load(path).apply(bench.model, force=True))
        for path in options.plan or []
    ]
    return schedules + plans


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure_fidelity(
    bench: Bench, variants: Sequence[Variant], images: Images, answers: ImageCache, known: ImageCache
) -> dict[str, Scores]:
    """Scores of all variants by name, the full model's first.

    Args:
        bench: the model.
        variants: what is measured.
        images: what on.
        answers: the full model's.
        known: what `score` found before.

    Raises:
        DataError: if no image can be read.
    """
    options = bench.arguments
    figures: list[Tensor] = []
    labels: list[int] = []
    skipped: list[str] = []
    with (
        autocast(bench.device, options.precision),
        tqdm(total=len(images.chosen) or None, desc="fidelity", unit="img", disable=options.quiet) as bar,
    ):
        try:
            for batch in images.batches(options.batch_size, options.workers):
                skipped += [f"{name} ({reason})" for _, name, reason in batch.skipped]
                if batch.indices:
                    figures.append(known(batch.images, partial(score, bench, variants, batch, answers)))
                    labels += batch.labels
                bar.update(len(batch.indices) + len(batch.skipped))
        finally:
            answers.save()
            known.save()
    if skipped:
        named = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
        print(f"fidelity: left out {len(skipped)} that cannot be read: {named}", file=sys.stderr)
    if not figures:
        raise DataError(f"{options.data} has no image that can be read")
    columns = torch.cat(figures).permute(1, 2, 0).numpy()  # (variants, 4, n)
    return {
        variant.name: Scores(kl, agrees, (best == labels).astype(float) if images.labelled else None, tokens)
        for variant, (kl, agrees, best, tokens) in zip(variants, columns, strict=True)
    }


def score(bench: Bench, variants: Sequence[Variant], batch: Batch, answers: ImageCache) -> Tensor:
    """KL, agreement, first class and tokens of each variant on the images of one batch: (B, variants, 4) float64."""
    inputs, backbone = bench.prepare(batch.images), Backbone(bench.model)
    full = answers(batch.images, lambda: bench.model(inputs).float().cpu())
    figures = []
    for variant in variants:
        logits = full if variant.name == ROW_OF_FULL else variant.module(inputs).float().cpu()
        found = compare(full, logits)
        tokens = mean_tokens(variant.module, backbone.prefix + backbone.patches, inputs)
        figures.append(torch.stack([x.double() for x in (found.kl, found.agrees, logits.argmax(-1), tokens)], dim=-1))
    return torch.stack(figures, dim=1)


def measure_latency(bench: Bench, variants: Sequence[Variant], batches: list[Tensor]) -> dict[str, np.ndarray]:
    """Seconds (images, runs) of all variants by name, interleaved."""
    timed = bench.time([{"actual": on_batches(v.module, batches)} for v in variants], len(batches))
    return {v.name: seconds["actual"] for v, seconds in zip(variants, timed, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
