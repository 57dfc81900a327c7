"""How near reduced models stay to the full one, over tokens and over latency, on real images.

    python benchmarks/fidelity.py --model MODEL [--checkpoint FILE] --data FOLDER [--results-file NAME] [--plot FILE]
    python benchmarks/fidelity.py --model MODEL --data FOLDER --limit 1000 --no-latency
    python benchmarks/fidelity.py --model MODEL --data FOLDER --only "in block 3" ToMe --runtime all
    python benchmarks/fidelity.py --model MODEL --data FOLDER --operators

Fidelity: every variant (see `variants.py`) sees every image of the data set, or --limit of them drawn with the seed.
`kl` is the mean over images of KL(full ‖ reduced) of the class distributions, in nats; `agreement` how often the first
class is the full model's; `top1` how often it is the label's, and `top1_change` how much more often than the full
model's is. Labels are those of --class-map (names of classes, one a line, as timm takes it); by default ImageNet's,
where a data set's folders are WordNet ids and the model has these classes, or the data set's own where they are as many
as the model's. `tokens` are those that enter a block, prefix included, mean over blocks and images. `_low` and `_high`
are the ends of 95 % bootstrap intervals over images, of the differences image by image where two variants are compared.
All scores are kept in --cache until the run is complete, by images' pixels: the same command goes on where it was
interrupted; a run that is killed loses a minute. `gmacs` are billions of multiply-accumulates an image, as torch counts
them on one image, what a reduction itself does included.

Latency: afterwards, at batch 1, on --images of the images, all variants in turn (see benchmarks/latency.py). `ratio` is
to the full model, the median over images of the ratio of medians over --runs; its interval is over images. `throughput`
is in images a second, in batches of --batch-size (of --images, if these are fewer). This needs a quiet machine;
--no-latency leaves it out. --runtime adds a column for each runtime, a ratio to the full model in the same one. It is
measured in a process of its own that holds all variants; why a variant has none is on stderr and in the results. Fronts
over it have the KL in torch. What torch.compile cannot trace it runs as torch does.

`front` says on which Pareto fronts a variant is: KL over tokens, over latency, over latency in a runtime. The second
table has, for each comparator, the cheapest variant of vwt with at most its KL, and what it costs as a ratio to it.

--operators compares the operators alone: each removes as many patches in the same one block, with proportional
attention where it merges. One row a block and count has the mean KL of each, `ratio` that of Absorb to the best of the
others, and the interval of their difference, image by image; a second table has the share of top-1 answers lost.
"""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import harness
import numpy as np
import operators
import runtimes
import torch
from harness import WORDS, Bench, positive
from image_cache import ImageCache
from image_set import Images, open_images
from results import (
    Panel,
    Row,
    bootstrap_interval,
    pareto,
    plot,
    print_table,
    ratio,
    ratio_interval,
    save_results,
)
from torch import Tensor
from variants import FULL, OURS, PEERS, Module, build, choose, mean_gmacs, mean_tokens, registry, with_notes

import vwt
from vwt import InterImage
from vwt.cli import run_script
from vwt.errors import ArgumentError, DataError
from vwt.export.runtimes import RUNTIMES, check_runtime
from vwt.locks import locked
from vwt.measure.timing import on_batches
from vwt.models.spec import weights_checksum
from vwt.progress import progress_bar
from vwt.tuning.calibration import compare

OTHER_RUNTIMES = tuple(name for name in RUNTIMES if name != "torch")
COLUMNS = {
    "name": "", "tokens": ".1f", "agreement": ".3f", "agreement_low": ".3f", "agreement_high": ".3f", "kl": ".4f",
    "kl_low": ".4f", "kl_high": ".4f", "top1": ".4f", "top1_change": "+.4f", "top1_change_low": "+.4f",
    "top1_change_high": "+.4f", "gmacs": ".2f", "throughput": ".1f", "ms": ".2f", "ratio": ".3f", "ratio_low": ".3f",
    "ratio_high": ".3f", **dict.fromkeys(OTHER_RUNTIMES, ".3f"), "front": "", "note": "",
}  # fmt: skip
EQUAL_KL = {
    "peer": "", "kl": ".4f", "vwt": "", "vwt_kl": ".4f", "kl_change_low": "+.4f", "kl_change_high": "+.4f",
    "tokens": ".3f", "latency": ".3f", "latency_low": ".3f", "latency_high": ".3f",
}  # fmt: skip
KL = ("kl_low", "kl_high"), "KL(full ‖ reduced), nats"
OVER_TOKENS = Panel(
    title="Over tokens: the lower left is best",
    x="tokens",
    y="kl",
    ends=KL[0],
    labels=("tokens an image, mean over blocks", KL[1]),
    front=True,
)
OVER_LATENCY = dataclasses.replace(
    OVER_TOKENS,
    title="Over latency: the lower left is best",
    x="ratio",
    labels=("latency at batch 1, ratio to the full model", KL[1]),
)


def over_latency_in(runtime: str) -> Panel:
    """The panel of a runtime."""
    name = "torch.compile" if runtime == "compile" else runtime
    labels = (f"latency at batch 1 in {name}, ratio to the full model in it", KL[1])
    return dataclasses.replace(OVER_LATENCY, title=f"Over latency in {name}", x=runtime, labels=labels)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options; --batch-size is for fidelity, latency is at batch 1."""
    harness.add_common(parser)
    parser.set_defaults(batch_size=32)
    parser.add_argument("--limit", type=positive, metavar="N", help="images for fidelity, drawn at random; default all")
    parser.add_argument("--class-map", type=Path, metavar="FILE", help="names of classes, one a line")
    parser.add_argument(
        "--operators", action="store_true", help="table of operators by depth instead, of fidelity alone"
    )
    parser.add_argument("--no-latency", action="store_true", help="leave latency out")
    parser.add_argument(
        "--runtime", nargs="+", choices=("all", *OTHER_RUNTIMES), default=[], help="latency in these, too"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError for options that exclude each other."""
    if arguments.workers < 0:
        raise ArgumentError(f"--workers is {arguments.workers}; expected at least 0")
    if arguments.plot and arguments.operators:
        raise ArgumentError("--plot draws the table of variants; leave out --operators")
    if arguments.runtime and (arguments.no_latency or arguments.operators):
        raise ArgumentError("--runtime measures latency; leave out --no-latency and --operators")
    if arguments.runtime and (arguments.torchcompile or arguments.precision != "float32"):
        raise ArgumentError("--runtime is in float32, and names compile; leave out --precision and --torchcompile")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    check_options(arguments)
    bench = Bench.open(arguments, [] if arguments.operators else WORDS)
    for name in set(arguments.runtime) - {"all"}:
        check_runtime(name, device=bench.device)
    every = operators.operator_variants(bench) if arguments.operators else registry(bench)
    images = open_images(bench)
    variants = choose(every, arguments.only)
    batches = [] if arguments.no_latency or arguments.operators else bench.batches(1)
    first = bench.prepare(images.first())
    modules, notes = build(bench, variants, first)
    header = bench.header
    title = f"{arguments.model}, {len(images.chosen) or 'all'} images of {arguments.data}"
    print(f"{header['hardware']}\n{title}{images.remark}")
    kept = arguments.cache / scores_name(bench, modules, images)
    with locked(kept.with_name(f"{kept.name}.lock"), kept, ArgumentError):
        known = ImageCache(kept)
        scores = measure_fidelity(bench, modules, images, known)
        header["images"] = len(scores.kl)
        rows = fidelity_rows(scores, arguments.seed)
        tables = {"fidelity": with_notes(variants, rows, notes)}
        save_results(bench.paths, header, tables)  # whatever becomes of the rest
        if arguments.operators:
            save_results(bench.paths, header, tables | print_operators(bench, scores))
            known.path.unlink(missing_ok=True)
            return
        with bench.autocast():
            rows = [row | {"gmacs": mean_gmacs(modules[row["name"]], first)} for row in rows]
        seconds = measure_latency(bench, modules, batches) if batches else {}
        if seconds:
            add_latency(rows, seconds, {v.name: v.baseline for v in variants}, arguments.seed)
            add_throughput(bench, modules, rows)
        if arguments.runtime:
            save_results(bench.paths, header, {"fidelity": with_notes(variants, rows, notes)})
            header["not_in_runtimes"] = add_runtimes(bench, rows)
        mark_fronts(rows)
        rows = with_notes(variants, rows, notes)
        tables = {"fidelity": rows, "equal_kl": equal_kl(rows, scores, seconds, arguments.seed)}
        print_table("Fidelity", rows, COLUMNS)
        print_table("At the KL of the comparators", tables["equal_kl"], EQUAL_KL)
        save_results(bench.paths, header, tables)
        if arguments.plot:
            plot_fronts(arguments.plot, rows, f"{title}\n{header['hardware']}")
        known.path.unlink(missing_ok=True)


# -- measuring ---------------------------------------------------------------------------------------------------------


def scores_name(bench: Bench, modules: dict[str, Module], images: Images) -> str:
    """The file of the scores, named by all that they depend on, code, machine and versions included."""
    options = (bench.arguments.seed, bench.arguments.batch_size, bench.arguments.limit)
    origin = (weights_checksum(bench.model.state_dict()), images.source.fingerprint(), images.source.input_size)
    digest = hashlib.blake2b(f"{origin}\n{bench.header['hardware']}\n{options}".encode(), digest_size=8)
    for name, module in modules.items():
        strategy, schedule = (getattr(module, part, None) for part in ("strategy", "schedule"))
        digest.update(f"\n{name}: {strategy}, {schedule}".encode())
        if isinstance(strategy, InterImage):
            digest.update(strategy.codebook.words.numpy().tobytes())
    for folder in (Path(vwt.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return f"scores-{digest.hexdigest()}.safetensors"


@dataclasses.dataclass(frozen=True)
class Scores:
    """What v variants, the full model first, do to each of n images.

    Attributes:
        names: of the variants.
        kl: (n, v) KL(full ‖ reduced), nats.
        agrees: (n, v) 1.0 where the first class is the full model's, else 0.0.
        right: (n, v) 1.0 where it is the label, else 0.0; None where there are no labels.
        tokens: (n, v) prefix included, mean over the blocks that they enter.
    """

    names: list[str]
    kl: np.ndarray
    agrees: np.ndarray
    right: np.ndarray | None
    tokens: np.ndarray


def measure_fidelity(bench: Bench, modules: dict[str, Module], images: Images, known: ImageCache) -> Scores:
    """Scores of all variants, the full model's first.

    Args:
        bench: the model.
        modules: what is measured, by name.
        images: what on.
        known: what `score` found before.

    Raises:
        DataError: if no image can be read.
    """
    options = bench.arguments
    figures: list[Tensor] = []
    labels: list[int] = []
    skipped: list[str] = []
    with (
        bench.autocast(),
        progress_bar(total=len(images.chosen) or None, desc="comparing", unit="image", show=not options.quiet) as bar,
    ):
        try:
            for batch in images.batches(options.batch_size, options.workers):
                skipped += [f"{name} ({reason})" for _, name, reason in batch.skipped]
                if batch.indices:
                    figures.append(known(batch.images, partial(score, bench, modules, batch.images)))
                    labels += batch.labels
                bar.update(len(batch.indices) + len(batch.skipped))
        finally:
            known.save()
    if skipped:
        named = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
        print(f"fidelity: left out {len(skipped)} that cannot be read: {named}", file=sys.stderr)
    if not figures:
        raise DataError(f"{options.data} has no image that can be read")
    kl, agrees, best, tokens = torch.cat(figures).permute(2, 0, 1).numpy()  # each (n, variants)
    right = (best == np.array(labels)[:, None]).astype(float) if images.labelled else None
    return Scores(list(modules), kl, agrees, right, tokens)


def score(bench: Bench, modules: dict[str, Module], images: Tensor) -> Tensor:
    """KL, agreement, first class and tokens of each variant on images (B, C, H, W) uint8: (B, variants, 4) float64."""
    inputs = bench.prepare(images)
    full = bench.model(inputs).float().cpu()
    figures = []
    for name, module in modules.items():
        logits = full if name == FULL else module(inputs).float().cpu()
        found = compare(full, logits)
        tokens = mean_tokens(bench, module, inputs)
        figures.append(torch.stack([x.double() for x in (found.kl, found.agrees, logits.argmax(-1), tokens)], dim=-1))
    return torch.stack(figures, dim=1)


def measure_latency(bench: Bench, modules: dict[str, Module], batches: list[Tensor]) -> dict[str, np.ndarray]:
    """Seconds (images, runs) of all variants by name, interleaved."""
    timed = bench.time([{"actual": on_batches(bench.compiled(m), batches)} for m in modules.values()], len(batches))
    return {name: seconds["actual"] for name, seconds in zip(modules, timed, strict=True)}


# -- tables ------------------------------------------------------------------------------------------------------------


def print_operators(bench: Bench, scores: Scores) -> dict[str, list[Row]]:
    """The tables by depth, which are printed."""
    by_depth = partial(operators.by_depth, scores.names, model=bench.model, seed=bench.arguments.seed)
    tables = {"operators": by_depth(loss=scores.kl)}
    print_table("KL by block and patches removed", tables["operators"], operators.COLUMNS)
    if scores.right is not None:
        tables["operators_top1"] = by_depth(loss=scores.right[:, :1] - scores.right)
        print_table("Top-1 lost, as a share of the images", tables["operators_top1"], operators.TOP1_COLUMNS)
    return tables


def fidelity_rows(scores: Scores, seed: int) -> list[Row]:
    """One row a variant, in their order."""
    figures = {"agreement": scores.agrees, "kl": scores.kl}
    if scores.right is not None:
        figures["top1_change"] = scores.right - scores.right[:, :1]
    ends = bootstrap_interval(np.concatenate(list(figures.values()), axis=1), seed)
    low, high = (end.reshape(len(figures), -1) for end in ends)
    rows: list[Row] = []
    for at, name in enumerate(scores.names):
        row: Row = {"name": name, "tokens": float(scores.tokens[:, at].mean())}
        if scores.right is not None:
            row["top1"] = float(scores.right[:, at].mean())
        for index, (figure, values) in enumerate(figures.items()):
            row[figure] = float(values[:, at].mean())
            row |= {f"{figure}_low": float(low[index, at]), f"{figure}_high": float(high[index, at])}
        rows.append(row)
    return rows


def latency_columns(own: np.ndarray, baseline: np.ndarray, seed: int) -> Row:
    """Milliseconds, and the ratio to a baseline, of seconds (items, runs)."""
    low, high = ratio_interval(own, baseline, seed)
    return {"ms": 1e3 * float(np.median(own)), "ratio": ratio(own, baseline), "ratio_low": low, "ratio_high": high}


def add_latency(rows: Sequence[Row], seconds: dict[str, np.ndarray], baselines: dict[str, str], seed: int) -> None:
    """To each row what `latency_columns` makes of seconds by name, against the variant's baseline."""
    for row in rows:
        name = row["name"]
        row |= latency_columns(seconds[name], seconds[baselines[name]], seed)


def add_throughput(bench: Bench, modules: dict[str, Module], rows: Sequence[Row]) -> None:
    """To each row images a second in batches, measured on --images of the images."""
    options = bench.arguments
    batches = bench.batches(min(options.batch_size, options.images))
    seconds = measure_latency(bench, modules, batches)
    for row in rows:
        row["throughput"] = len(batches[0]) / float(np.median(seconds[row["name"]]))


def add_runtimes(bench: Bench, rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """To each row its ratio to the full model in each of --runtime, by the runtime's name; why others have none."""
    options = argparse.Namespace(**{**vars(bench.arguments), "batch_size": 1})
    names = [name for name in OTHER_RUNTIMES if name in options.runtime or "all" in options.runtime]
    models = partial(runtimes.of_registry, [row["name"] for row in rows])
    pairs = [(name, "float32") for name in names]
    timed = dict(zip(names, runtimes.time_in_processes(options, bench.device, pairs, models, WORDS), strict=True))
    for name, own in timed.items():
        for variant, note in own.notes.items():
            print(f"fidelity: {variant} in {name}: {note}", file=sys.stderr)
        for row in rows:
            if row["name"] in own.seconds:
                row[name] = ratio(own.seconds[row["name"]], own.seconds[FULL])
    return {name: own.notes for name, own in timed.items()}


def mark_fronts(rows: Sequence[Row]) -> None:
    """Say of each row on which Pareto fronts it is: "tokens", "latency", runtimes, or none."""
    costs = {"tokens": "tokens", "latency": "ratio"} | {name: name for name in OTHER_RUNTIMES}
    fronts = {name: pareto(rows, cost, "kl") for name, cost in costs.items()}
    for row in rows:
        row["front"] = " ".join(name for name, front in fronts.items() if any(row is other for other in front))


def plot_fronts(path: Path, rows: Sequence[Row], caption: str) -> None:
    """Draw KL over tokens, and over latency, in torch and in other runtimes, where it was measured."""
    every = (OVER_TOKENS, OVER_LATENCY, *map(over_latency_in, OTHER_RUNTIMES))
    panels = [panel for panel in every if any(row.get(panel.x) is not None for row in rows)]
    plot(path, [row for row in rows if row.get("kl", 0) > 0], panels, caption)


def equal_kl(rows: Sequence[Row], scores: Scores, seconds: dict[str, np.ndarray], seed: int) -> list[Row]:
    """For each comparator, the cheapest variant of vwt with at most its KL.

    Args:
        rows: of the table; those with a note are left out.
        scores: of the others.
        seconds: (items, runs) by name; empty where latency was not measured, and tokens are the cost.
        seed: of the bootstrap.
    """
    cost = "ratio" if seconds else "tokens"
    kl = dict(zip(scores.names, scores.kl.T, strict=True))
    ours, peers = ([row for row in rows if row["group"] in groups and row["name"] in kl] for groups in (OURS, PEERS))
    found = []
    for peer in peers:
        best = min((row for row in ours if row["kl"] <= peer["kl"]), key=lambda row: row[cost], default=None)
        if best is None:
            continue
        low, high = bootstrap_interval((kl[best["name"]] - kl[peer["name"]])[:, None], seed)
        row: Row = {"peer": peer["name"], "kl": peer["kl"], "vwt": best["name"], "vwt_kl": best["kl"]}
        row |= {"kl_change_low": float(low[0]), "kl_change_high": float(high[0])}
        row["tokens"] = best["tokens"] / peer["tokens"]
        if seconds:
            times = latency_columns(seconds[best["name"]], seconds[peer["name"]], seed)
            row |= {name.replace("ratio", "latency"): value for name, value in times.items() if name != "ms"}
        found.append(row)
    return found


KEPT = "the same command goes on with what is kept in --cache"
main = partial(run_script, "fidelity", __doc__, add_options, run, if_interrupted=KEPT)

if __name__ == "__main__":
    sys.exit(main())
