"""Joules, watts and milliseconds of reduced models against the full one, on real images.

    python benchmarks/energy.py --model MODEL [--checkpoint FILE] [--seconds 10] [--runs 5] [--results-file NAME]
    python benchmarks/energy.py --model MODEL --estimate 5,35

    ── time ──────────────────────────────────────────────────────────────────────────────────────────▶
     decode │ build │ rest │ IDLE │ round 1:  w B  w A  w C │ round 2:  w C  w B  w A │ … │ rest │ IDLE

Images are drawn with a seed, decoded and put on the device. Each variant (A, B, C) has one window a round, --runs
rounds in all; the order is drawn anew for each round, so that a drift of the machine hits all alike. Before its window
a variant runs on a few batches (w). A window is passes over all images, each batch waited for, until --seconds have
gone by: every variant sees every image equally often. In IDLE, as long as a window, nothing is computed.

Every figure is a mean over windows; `_ci` is half the width of its 95 % confidence interval (Student's t).
`joules_per_image` is all that the sensors saw, the idle machine included; `above_idle` is less by the idle watts (the
mean of before and after) times the window's seconds. `ms` is a batch's: watts x ms / 1000 / images a batch = joules an
image.
`tokens` include prefix tokens; where they change inside, they are the mean over blocks of what enters. `agreement` is
how often the top class is the full model's. `source` says where joules come from: nvml, amdsmi, rapl, soc, estimated or
none. The sum is over all devices that have a sensor; where one gives nothing in a window, that window has no sum.

With --results-file, each window is written as it ends; the same command again goes on where it was stopped.
"""

import argparse
import copy
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from energy_record import Record, plot_energy, report
from harness import (
    Bench,
    Row,
    add_common,
    autocast,
    load_codebooks,
    load_model,
    mean_tokens,
    open_device,
    positive,
    results_paths,
)
from latency import DROPS
from peers import TokenMerging
from torch import Tensor, nn
from tqdm import tqdm

import vwt
from vwt.cli import Parser
from vwt.energy.meter import Energy, EnergyMeter
from vwt.energy.sensors import POWERCAP, Missing, Sensor, estimator, find_sensors
from vwt.errors import ArgumentError, VWTError, first_line
from vwt.measure.environment import hardware
from vwt.measure.timing import WARMUP, time_call
from vwt.pictures.figures import check_picture
from vwt.tokens.patches import Space

WORDS: list[tuple[Space, int]] = [("embedding", k) for k in (100, 1000, 10000)]
SHARE = 2 / 7  # of the patches that the default schedule removes after a quarter of the blocks: 56 of 196
REST = 1.0  # seconds after which caches, clocks and the threads of torch have come to rest
# Arguments that change no figure.
FREE = ("results_file", "plot", "quiet", "fresh", "cache", "runs")

Module = Callable[[Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        run(arguments)
    except VWTError as error:
        print(f"energy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "nothing was written, for want of --results-file"
        if arguments.results_file:
            kept = "the windows that were finished are kept; the same command goes on with the others"
        print(f"\nenergy: interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


def make_parser() -> Parser:
    """The options; `--runs` is said anew, since here they are windows."""
    parser = Parser(
        prog="energy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    add_common(parser)
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help="windows of each variant")
    parser.add_argument("--seconds", type=seconds, default=10.0, metavar="S", help="the least length of a window")
    parser.add_argument("--threshold", type=float, default=0.1, help="cosine distance of InterImage")
    parser.add_argument("--schedule", type=Path, metavar="FILE", help="a PruningSchedule that was saved")
    parser.add_argument(
        "--estimate", nargs="?", const="", metavar="IDLE,BUSY", help="watts to estimate joules with; or codecarbon"
    )
    parser.add_argument("--powercap", type=Path, default=POWERCAP, metavar="DIR", help="folder of RAPL's counters")
    parser.add_argument("--fresh", action="store_true", help="measure anew what the results file has")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw joules over agreement")
    return parser


def seconds(text: str) -> float:
    """A time above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    if arguments.images < arguments.batch_size:
        raise ArgumentError(f"--images {arguments.images} do not fill a batch of --batch-size {arguments.batch_size}")
    check_picture(arguments.plot)
    paths = results_paths(arguments.results_file)
    device = open_device(arguments)
    meter = EnergyMeter(choose_sensors(arguments, device))
    meter.check(arguments.seconds)
    if arguments.plot and not meter.senses:
        raise ArgumentError(f"--plot draws joules, and {what_is_missing(meter)}")
    record = Record.open(paths, make_header(arguments, device, meter), fresh=arguments.fresh)
    bench = Bench(arguments, device, load_model(arguments))
    bench.codebooks = load_codebooks(arguments, bench.model, WORDS)
    print(
        f"{record.header['hardware']}\n{arguments.model}, {arguments.images} images of {arguments.data}, batches of "
        f"{arguments.batch_size}, windows of {arguments.seconds:g} s\n{describe(meter)}"
    )
    try:
        measure(bench, meter, record)
    finally:  # also of what was finished before Ctrl-C
        report(record)
    if arguments.plot:
        title = f"{arguments.model}, batch {arguments.batch_size}\n{record.header['hardware']}"
        plot_energy(arguments.plot, record.rows(), title)


# -- sensors -----------------------------------------------------------------------------------------------------------


def choose_sensors(arguments: argparse.Namespace, device: torch.device) -> list[Sensor]:
    """The estimate of the options, or else the sensors of the host and of the GPU that computes."""
    if arguments.estimate is not None:
        return [estimator(arguments.estimate)]
    gpus = [device.index or 0] if device.type == "cuda" else []
    return find_sensors(arguments.powercap, gpus)


def what_is_missing(meter: EnergyMeter) -> str:
    """Why there are no joules, and what would give some, in one line."""
    return (
        f"no sensor can be read ({not_measured(meter)}); a processor with RAPL, a GPU or SoC that zeus knows would "
        "measure joules, --estimate IDLE,BUSY (watts) or --estimate codecarbon would estimate them"
    )


def describe(meter: EnergyMeter) -> str:
    """Which devices the joules are of, and which are left out, in one line."""
    if not meter.senses:
        return f"No joules: {what_is_missing(meter)}."
    of = ", ".join(f"{s.name} ({s.source})" for s in meter.sensors if not isinstance(s, Missing))
    out = not_measured(meter)
    return f"Joules of {of}." + (f" Not measured: {out}." if out else "")


def not_measured(meter: EnergyMeter) -> str:
    """Devices without joules, and why."""
    return "; ".join(f"{s.name}: {s.reason.rstrip('.')}" for s in meter.sensors if isinstance(s, Missing))


def make_header(arguments: argparse.Namespace, device: torch.device, meter: EnergyMeter) -> Row:
    """What figures depend on; results of another header are not gone on with."""
    header = {
        "version": vwt.__version__,
        "hardware": hardware(device, arguments.precision),
        "sensors": [f"{s.name} ({s.source})" for s in meter.sensors if s.source != "none"],
        "arguments": {name: value for name, value in vars(arguments).items() if name not in FREE},
    }
    return dict(json.loads(json.dumps(header, default=str)))  # as it comes back from a file


# -- variants ----------------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """Something to measure.

    Attributes:
        name: of its row.
        build: makes the module that is called with batches; may raise VWTError.
    """

    name: str
    build: Callable[[], Module]


def make_variants(bench: Bench) -> list[Variant]:
    """The full model first; nothing is built yet."""
    model, options = bench.model, bench.arguments
    strategies: dict[str, Any] = {f"IntraImage {drop:g}": vwt.IntraImage(drop) for drop in DROPS}
    for book in bench.codebooks:
        strategies[f"InterImage {book.space} {len(book)}, {options.threshold:g}"] = vwt.InterImage(
            book, options.threshold
        )
    if options.schedule:
        schedule = vwt.PruningSchedule.load(options.schedule)
    else:
        schedule = vwt.PruningSchedule({len(model.blocks) // 4: SHARE})  # type: ignore[arg-type]
    return [
        Variant("full", lambda: model),
        Variant("bfloat16", lambda: in_bfloat16(model)),
        Variant("int8 (torchao, dynamic)", lambda: in_int8(model)),
        *(Variant(n, lambda s=s: vwt.VWTokenizer(model, s)) for n, s in strategies.items()),  # type: ignore[misc]
        Variant("schedule", lambda: vwt.VWTokenizer(model, schedule=schedule)),
        *(
            Variant(f"{n} + schedule", lambda s=s: vwt.VWTokenizer(model, s, schedule))  # type: ignore[misc]
            for n, s in strategies.items()
        ),
        *(Variant(f"ToMe r {r}", lambda r=r: TokenMerging(model, r)) for r in (8, 13)),  # type: ignore[misc]
    ]


def in_bfloat16(model: nn.Module) -> Module:
    """A copy of the model in bfloat16."""
    if next(model.parameters()).dtype == torch.bfloat16:
        raise ArgumentError("the full model is in bfloat16 already")
    low: Any = copy.deepcopy(model).bfloat16()
    return lambda images: low(images.bfloat16())


def in_int8(model: nn.Module) -> Module:
    """A copy of the model with weights in int8, and activations brought to int8 as they come, by torchao.

    Raises:
        ArgumentError: if torchao is not there, or cannot do it.
    """
    try:
        logging.disable(logging.WARNING)  # of torch, about how torchao uses it
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        low = copy.deepcopy(model)
        quantize_(low, Int8DynamicActivationInt8WeightConfig())
    except ModuleNotFoundError as error:
        raise ArgumentError("torchao is not installed; pip install 'vwt[int8]'") from error
    except Exception as error:  # of whichever kernel this device lacks
        raise ArgumentError(f"torchao cannot quantize it: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    return low


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(bench: Bench, meter: EnergyMeter, record: Record) -> None:
    """Add to the record the windows that are missing."""
    options = bench.arguments
    variants = make_variants(bench)
    wanted = [variant for variant in variants if record.done(variant.name) < options.runs]
    if not wanted:
        return
    batches = bench.batches(bench.images)
    session = record.session
    with autocast(bench.device, options.precision):
        modules = build(bench, wanted, batches, record)
        record.sort([variant.name for variant in variants])
        if not modules:
            return
        rest(meter, record, session, options.seconds)
        left = sum(options.runs - record.done(name) for name in modules)
        with tqdm(total=left, desc="windows", unit="window", disable=options.quiet) as bar:
            for number in range(options.runs):
                names = [name for name in modules if record.done(name) <= number]
                random.Random(f"{options.seed} {number}").shuffle(names)
                for name in names:
                    energy = measure_window(meter, modules[name], batches, bench.device, options.seconds)
                    record.add(record.windows, name, session, energy)
                    bar.update()
        rest(meter, record, session, options.seconds)


def build(bench: Bench, variants: Sequence[Variant], batches: Sequence[Tensor], record: Record) -> dict[str, Module]:
    """The modules of variants by name, with their facts in the record; those that cannot be had have a note only."""
    answers = [bench.model(batch).argmax(-1) for batch in batches]
    unreduced = vwt.VWTokenizer(bench.model)
    tokens = unreduced.tokenize(batches[0][:1]).group.shape[1] + unreduced.backbone.prefix
    modules: dict[str, Module] = {}
    for variant in variants:
        facts: Row = {"name": variant.name, "tokens": None, "agreement": None, "note": None}
        try:
            module = variant.build()
            same = [module(batch).argmax(-1) == answer for batch, answer in zip(batches, answers, strict=True)]
            facts["agreement"] = float(torch.cat(same).float().mean())
            facts["tokens"] = float(torch.cat([mean_tokens(module, tokens, batch) for batch in batches]).mean())
            modules[variant.name] = module
        except (VWTError, RuntimeError) as error:  # such as a kernel that this device lacks
            facts["note"] = f"not measured: {first_line(error)}"
        record.set_facts(facts)
    return modules


def rest(meter: EnergyMeter, record: Record, session: int, seconds: float) -> None:
    """Add a window in which nothing is computed, if anything can be sensed in it."""
    if meter.senses:
        time.sleep(REST)
        meter.begin(idle=True)
        time.sleep(seconds)
        record.add(record.idle, "idle", session, meter.end())


def measure_window(
    meter: EnergyMeter, module: Module, batches: Sequence[Tensor], device: torch.device, seconds: float
) -> Energy:
    """One window of at least so many seconds, after a warm-up."""

    def call(item: int) -> Tensor:
        return module(batches[item])

    for item in range(min(WARMUP, len(batches))):
        time_call(call, item, device)
    images, spent = 0, 0.0
    meter.begin()
    while spent < seconds:
        spent += sum(time_call(call, item, device) for item in range(len(batches)))
        images += sum(map(len, batches))
    return meter.end(images)


if __name__ == "__main__":
    sys.exit(main())
