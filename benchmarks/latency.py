"""Latency of reduced models against the full one, the limit, and their peers, on real images.

    python benchmarks/latency.py --model MODEL [--checkpoint FILE] [--batch-size 32] [--threads 2] [--plot FILE]
    python benchmarks/latency.py --model MODEL --only ToMe "Absorb(80)" schedule
    python benchmarks/latency.py --model MODEL --matching [--words 1000 pixel:10000 ...]
    python benchmarks/latency.py --model MODEL --scaling
    python benchmarks/latency.py --model MODEL --runtime all
    python benchmarks/latency.py --model MODEL --training --batch-size 16

Protocol: images are drawn with a seed and put into batches. Every variant (see `variants.py`) runs on every batch, in
turn in one process, after a warm-up on several batches; the order of the variants is drawn anew for each batch and run.
A strategy and its ideal run right after each other on the same batch, in an order that alternates. The ideal is the
same model's patch embedding and position, then its blocks and head on a random subset of the batch's tokens, prepared
beforehand, so that the reduction is free: as many tokens as the variant has, or, for images of different counts, their
mean rounded for all (the sum of tokens run dense). `ms` and its quartiles are over all batches and runs; every ratio
(`ratio` to the full model, `efficiency` = ideal / actual, `vs_vwt` = a comparator's time over that of vwt to the same
answers) is the median over batches of the ratio of the two medians over runs. `tokens` include prefix tokens, and are
the mean over images and blocks of what enters. `page_faults` are the median over batches of one more call each, with
the allocator that the header names (see `memory.py`).

--matching times finding the words of real patches alone, by brute force and as the strategy does it, and compares the
answers on all images. --scaling shows how time grows with images in a batch, with words, and with resolution; the
exponent is the slope in logarithms, 1 is linear. --runtime has a row for each runtime and precision (see
`runtimes.py`), each in a process of its own, with its own full model.
--training times a training step (forward, backward, AdamW).
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import harness
import matching
import runtimes
import scaling
import torch
import torch.nn.functional as F
import training
from harness import WORDS, Bench, positive
from memory import allocator, page_faults
from results import Panel, Row, plot, print_table, ratio, save_results, spread
from torch import Tensor, nn
from variants import Module, Variant, build, choose, mean_tokens, registry, with_notes

from vwt import VWTokenizer
from vwt.cli import run_script
from vwt.errors import ArgumentError
from vwt.measure.timing import Calls, Seconds, on_batches
from vwt.models.backbone import Backbone

COLUMNS = {
    "name": "", "tokens": ".1f", "ms": ".2f", "ms_q1": ".2f", "ms_q3": ".2f", "ratio": ".3f", "ideal_ms": ".2f",
    "efficiency": ".3f", "images_per_second": ".1f", "vs_vwt": ".3f", "page_faults": ".0f", "note": "",
}  # fmt: skip
PANEL = Panel(
    "What tokens cost; dashed: on as many tokens for nothing",
    "tokens",
    "ms",
    ("ms_q1", "ms_q3"),
    ("tokens an image, mean", "milliseconds a batch"),
    limit="ideal_ms",
    log=False,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    harness.add_common(parser)
    parser.add_argument("--matching", action="store_true", help="tables of matching time instead")
    parser.add_argument("--scaling", action="store_true", help="tables over images, words and resolution instead")
    parser.add_argument(
        "--runtime", nargs="+", type=runtimes.runtime_and_precisions, metavar="NAME[:PRECISION]",
        help="a row for each runtime and precision instead; all, or some",
    )  # fmt: skip
    parser.add_argument("--training", action="store_true", help="a table of training steps instead")
    parser.add_argument("--sizes", nargs="+", type=positive, default=[224, 384, 512], help="pixels, for --scaling")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    if arguments.plot and (arguments.matching or arguments.scaling or arguments.runtime):
        raise ArgumentError("--plot draws the table of latency; leave out --matching, --scaling and --runtime")
    if arguments.runtime and (arguments.torchcompile or arguments.precision != "float32"):
        raise ArgumentError("--runtime names precisions itself, and compile; leave out --precision and --torchcompile")
    if arguments.training and (arguments.matching or arguments.scaling or arguments.runtime):
        raise ArgumentError("--training is another table; leave out --matching, --scaling and --runtime")
    with torch.inference_mode(not arguments.training):
        make_tables(arguments)


def make_tables(arguments: argparse.Namespace) -> None:
    """Measure, print and save what the options ask for."""
    other = scaling.WORDS if arguments.matching or arguments.scaling else []
    bench = Bench.open(arguments, WORDS if not (other or arguments.runtime) else other)
    batches = bench.batches()
    title = f"{arguments.model}, {arguments.images} images of {arguments.data}, batches of {arguments.batch_size}"
    print(f"{bench.header['hardware']}\nallocator {allocator()}\n{title}")
    tables: dict[str, list[Row]] = {}
    if arguments.matching:
        tables["matching"] = matching.measure(bench)
        print_table("Matching, milliseconds a batch", tables["matching"], matching.COLUMNS)
    if arguments.scaling:
        tables |= scaling.measure(bench, measure, COLUMNS)
    if arguments.runtime:
        tables["runtimes"] = runtimes.measure(bench)
        print_table("Runtimes, ratios to the full model in the same one", tables["runtimes"], runtimes.COLUMNS)
    if not tables:
        variants = choose(registry(bench), arguments.only)
        variants = training.steps(variants) if arguments.training else variants
        tables["latency"] = measure(bench, variants, batches)
        what = "Training steps, milliseconds" if arguments.training else "Latency, milliseconds a batch"
        print_table(what, tables["latency"], COLUMNS)
    save_results(bench.paths, bench.header | {"allocator": allocator()}, tables)
    if arguments.plot:
        plot(arguments.plot, tables["latency"], [PANEL], f"{title}\n{bench.header['hardware']}")


def measure(bench: Bench, variants: Sequence[Variant], batches: list[Tensor]) -> list[Row]:
    """Rows of variants."""
    modules, notes = build(bench, variants, batches[0])
    with bench.autocast():
        calls = [make_calls(bench, module, batches) for module in modules.values()]
        tokens = {
            name: float(torch.cat([mean_tokens(bench, reduced(module), batch) for batch in batches]).mean())
            for name, module in modules.items()
        }
    seconds = dict(zip(modules, bench.time(calls, len(batches)), strict=True))
    rows = [make_row(variant, tokens, seconds, len(batches[0])) for variant in variants if variant.name in modules]
    with bench.autocast():
        for row, own in zip(rows, calls, strict=True):
            row["page_faults"] = page_faults(own["actual"], len(batches))
    return with_notes(variants, rows, notes)


def reduced(module: Module) -> Module:
    """What reduces tokens in a module: itself, or what a training step trains."""
    return module.module if isinstance(module, training.Step) else module


def make_row(variant: Variant, tokens: dict[str, float], seconds: dict[str, Seconds], batch_size: int) -> Row:
    """A row of the table, of tokens and seconds by name."""
    actual, ideal = seconds[variant.name]["actual"], seconds[variant.name].get("ideal")
    low, middle, high = spread(actual)
    row: Row = {"name": variant.name, "tokens": tokens[variant.name], "ms": middle, "ms_q1": low, "ms_q3": high}
    row |= {"ratio": ratio(actual, seconds[variant.baseline]["actual"]), "images_per_second": 1e3 * batch_size / middle}
    if ideal is not None:
        row |= {"ideal_ms": spread(ideal)[1], "efficiency": ratio(ideal, actual)}
    if variant.same_as in seconds:
        row["vs_vwt"] = ratio(actual, seconds[variant.same_as]["actual"])
    return row


# -- the limit ---------------------------------------------------------------------------------------------------------


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


def make_calls(bench: Bench, module: Module, batches: list[Tensor]) -> Calls:
    """What is timed of a module: itself, and the ideal where all that it does is done before the blocks."""
    calls: Calls = {"actual": on_batches(bench.compiled(module), batches)}
    if isinstance(module, VWTokenizer) and module.strategy is not None and not module.schedule:
        generator = torch.Generator().manual_seed(bench.arguments.seed)
        prefix, ideal = module.backbone.prefix, bench.compiled(Ideal(bench.model))
        subsets = [
            free_tokens(module.backbone, batch, prefix + mean_count(module.tokenize(batch).counts), generator)
            for batch in batches
        ]
        calls["ideal"] = lambda item: ideal(batches[item], subsets[item])
    return calls


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


main = partial(run_script, "latency", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
