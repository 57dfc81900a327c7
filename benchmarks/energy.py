"""Joules, watts and milliseconds of reduced models against the full one, on real images.

    python benchmarks/energy.py --model MODEL [--checkpoint FILE] [--seconds 10] [--runs 5] [--results-file NAME]
    python benchmarks/energy.py --model MODEL --estimate 5,35 --only ToMe quantised "Absorb(80)"

    ── time ──────────────────────────────────────────────────────────────────────────────────────────▶
     decode │ build │ rest │ IDLE │ round 1:  w B  w A  w C │ round 2:  w C  w B  w A │ … │ rest │ IDLE

Images are drawn with a seed, decoded and put on the device. Each variant (A, B, C; see `variants.py`) has one window a
round, --runs rounds in all; the order is drawn anew for each round, so that a drift of the machine hits all alike.
Before its window a variant runs on a few batches (w). A window is passes over all images, each batch waited for, until
--seconds have gone by: every variant sees every image equally often. In IDLE, as long as a window, nothing is computed.

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
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import harness
import torch
from energy_record import Record, report
from harness import Bench
from results import Panel, Row, plot
from torch import Tensor
from variants import Module, Variant, build, choose, mean_tokens, registry

import vwt
from vwt.cli import run_script
from vwt.energy.meter import Energy, EnergyMeter
from vwt.energy.sensors import POWERCAP, Missing, Sensor, estimator, find_sensors
from vwt.errors import ArgumentError
from vwt.measure.timing import WARMUP, time_call
from vwt.progress import progress_bar

REST = 1.0  # seconds after which caches, clocks and the threads of torch have come to rest
FREE = ("results_file", "plot", "quiet", "fresh", "cache", "runs", "only")  # arguments that change no figure
PANEL = Panel(
    "What an image costs, and how often the model's class stays: the lower right is best",
    "agreement",
    "joules_per_image",
    ("joules_low", "joules_high"),
    ("agreement with the full model, share of the images", "joules an image"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options; --runs are windows."""
    harness.add_common(parser)
    parser.set_defaults(runs=5)
    parser.add_argument("--seconds", type=seconds, default=10.0, metavar="S", help="the least length of a window")
    parser.add_argument(
        "--estimate", nargs="?", const="", metavar="IDLE,BUSY", help="watts to estimate joules with; or codecarbon"
    )
    parser.add_argument("--powercap", type=Path, default=POWERCAP, metavar="DIR", help="folder of RAPL's counters")
    parser.add_argument("--fresh", action="store_true", help="measure anew what the results file has")


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
    meter = EnergyMeter(choose_sensors(arguments))
    meter.check(arguments.seconds)
    if arguments.plot and not meter.senses:
        raise ArgumentError(f"--plot draws joules, and {what_is_missing(meter)}")
    bench = Bench.open(arguments)
    record = Record.open(bench.paths, make_header(bench, meter), fresh=arguments.fresh)
    title = f"{arguments.model}, {arguments.images} images of {arguments.data}, batches of {arguments.batch_size}"
    print(f"{record.header['hardware']}\n{title}, windows of {arguments.seconds:g} s\n{describe(meter)}")
    try:
        measure(bench, meter, record)
    finally:  # also of what was finished before Ctrl-C
        report(record)
    if arguments.plot:
        rows = [row | joules_ends(row) for row in record.rows() if row.get("joules_per_image") is not None]
        if not rows:
            raise ArgumentError(f"no window has joules, see the notes; {arguments.plot} was not drawn")
        plot(arguments.plot, rows, [PANEL], f"{title}\n{record.header['hardware']}")


def joules_ends(row: Row) -> Row:
    """The ends of the interval of joules."""
    mean, half = row["joules_per_image"], row["joules_ci"] or 0.0
    return {"joules_low": mean - half, "joules_high": mean + half}


def make_header(bench: Bench, meter: EnergyMeter) -> Row:
    """What figures depend on; results of another header are not gone on with."""
    header = {
        "version": vwt.__version__,
        "sensors": [f"{s.name} ({s.source})" for s in meter.sensors if s.source != "none"],
        "hardware": bench.header["hardware"],
        "arguments": {name: value for name, value in vars(bench.arguments).items() if name not in FREE},
    }
    return dict(json.loads(json.dumps(header, default=str)))  # as it comes back from a file


# -- sensors -----------------------------------------------------------------------------------------------------------


def choose_sensors(arguments: argparse.Namespace) -> list[Sensor]:
    """The estimate of the options, or else the sensors of the host and of the GPU that computes."""
    if arguments.estimate is not None:
        return [estimator(arguments.estimate)]
    device = harness.open_device(arguments)
    return find_sensors(arguments.powercap, [device.index or 0] if device.type == "cuda" else [])


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


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(bench: Bench, meter: EnergyMeter, record: Record) -> None:
    """Add to the record the windows that are missing."""
    options, session = bench.arguments, record.session
    every = registry(bench)
    wanted = [variant for variant in choose(every, options.only) if record.done(variant.name) < options.runs]
    if not wanted:
        return
    batches = bench.batches()
    modules, notes = build(bench, wanted, batches[0])
    with bench.autocast():
        add_facts(bench, wanted, modules, notes, batches, record)
        record.sort([variant.name for variant in every])
        if not modules:
            return
        calls = {name: bench.compiled(module) for name, module in modules.items()}
        rest(meter, record, session, options.seconds)
        left = sum(options.runs - record.done(name) for name in calls)
        with progress_bar(total=left, desc="measuring", unit="window", show=not options.quiet) as bar:
            for number in range(options.runs):
                names = [name for name in calls if record.done(name) <= number]
                random.Random(f"{options.seed} {number}").shuffle(names)
                for name in names:
                    energy = measure_window(meter, calls[name], batches, bench.device, options.seconds)
                    record.add(record.windows, name, session, energy)
                    bar.update()
        rest(meter, record, session, options.seconds)


def add_facts(
    bench: Bench,
    variants: Sequence[Variant],
    modules: dict[str, Module],
    notes: dict[str, str],
    batches: Sequence[Tensor],
    record: Record,
) -> None:
    """Tokens and agreement of variants to the record, or why they are not measured."""
    answers = [bench.model(batch).argmax(-1) for batch in batches]
    for variant in variants:
        facts: Row = {"name": variant.name, "group": variant.group, "tokens": None, "agreement": None}
        if module := modules.get(variant.name):
            same = [module(batch).argmax(-1) == answer for batch, answer in zip(batches, answers, strict=True)]
            facts["agreement"] = float(torch.cat(same).float().mean())
            facts["tokens"] = float(torch.cat([mean_tokens(bench, module, batch) for batch in batches]).mean())
        record.set_facts(facts | {"note": notes.get(variant.name)})


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


KEPT = "with --results-file, the windows that were finished are kept, and the same command goes on with the others"
main = partial(run_script, "energy", __doc__, add_options, run, if_interrupted=KEPT)

if __name__ == "__main__":
    sys.exit(main())
