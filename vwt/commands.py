"""The commands of `vwt`: their options, and what they do with the library; imported when one is called."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from vwt.codebook.building import run_build
from vwt.codebook.codebook import Codebook
from vwt.codebook.config import BACKENDS, BuildConfig, BuildReport
from vwt.codebook.engine import ENGINES, Engine
from vwt.datasets import ImageSource, check_source, read_image
from vwt.documents import check_writable
from vwt.energy.meter import environment_report
from vwt.energy.sensors import POWERCAP
from vwt.errors import ArgumentError, CodebookError, ModelError, first_line
from vwt.export.exporting import LEAST, check_target
from vwt.models.create import create_model
from vwt.models.support import find_support, list_families
from vwt.pictures.charts import plot_profile, plot_utility
from vwt.pictures.figures import check_picture
from vwt.pictures.report.report import check_report, write_report
from vwt.pictures.show import save_stages
from vwt.strategies.inter_image import InterImage
from vwt.strategies.intra_image import IntraImage
from vwt.strategies.neighbours import Neighbours
from vwt.strategies.strategy import Strategy
from vwt.tokenizer import VWTokenizer
from vwt.tokens.patches import SPACES
from vwt.tuning.calibration import ENOUGH, Calibration, load_images
from vwt.tuning.goal import check_goal
from vwt.tuning.plan import CHECKED, Plan
from vwt.tuning.profile import POINTS, RUNS, LatencyProfile
from vwt.tuning.schedule import PruningSchedule
from vwt.tuning.tune import tune


def _add_build(build: argparse.ArgumentParser) -> None:
    default = BuildConfig()
    build.add_argument("source", help="a folder of images, a tar file, or hfds/…, torch/…, tfds/…, wds/…")
    build.add_argument("--model", required=True, help="timm model whose patches and data config are used")
    build.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    build.add_argument("--out", required=True, help="where to write the codebook: NAME.zarr or NAME.zarr.zip")
    build.add_argument("--words", type=int, default=default.words, help="number of words K")
    build.add_argument("--space", choices=SPACES, default=default.space, help="cluster pixels, or projected patches")
    build.add_argument("--backend", choices=BACKENDS, default=default.backend, help="k-means of a sample, or streaming")
    build.add_argument(
        "--euclidean", action="store_true", help="Euclidean k-means as in the paper, instead of spherical k-means"
    )
    build.add_argument("--iterations", type=int, default=default.iterations, help="of faiss's k-means")
    build.add_argument("--seed", type=int, default=default.seed, help="of sample and clustering")
    build.add_argument("--threshold", type=float, default=default.threshold, help="cosine distance, for the summary")
    build.add_argument("--split", default=default.split, help="split of the data set")
    build.add_argument("--data-dir", help="where named data sets are cached")
    build.add_argument("--workers", type=int, help="processes that decode images; by default half the processors")
    build.add_argument("--engine", choices=ENGINES, default="local", help="who works on the images, shard by shard")
    build.add_argument(
        "--num-workers", type=int, help="of the engine; by default this process, or all processors of the Ray cluster"
    )
    build.add_argument("--address", help="of a Ray cluster; by default the one on this machine, or a new one")
    build.add_argument("--gpus-per-worker", type=float, default=0.0, help="that each worker of Ray takes")
    build.add_argument("--work", metavar="URL", help="folder that all workers reach; by default beside OUT")
    build.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    build.add_argument("--resume", action="store_true", help="go on with an interrupted build")
    build.add_argument("--overwrite", action="store_true", help="replace what is at OUT")
    build.add_argument("--quiet", action="store_true", help="no progress bars")
    build.set_defaults(run=_build, if_interrupted="; go on with --resume")


def _build(arguments: argparse.Namespace) -> int:
    config = BuildConfig(
        words=arguments.words,
        space=arguments.space,
        backend=arguments.backend,
        spherical=not arguments.euclidean,
        iterations=arguments.iterations,
        seed=arguments.seed,
        threshold=arguments.threshold,
        split=arguments.split,
    )
    engine = Engine(arguments.engine, arguments.num_workers, arguments.address, arguments.gpus_per_worker)
    # All that is wrong is said before weights are fetched.
    if not arguments.out.endswith((".zarr", ".zarr.zip")):
        raise CodebookError(f"cannot write a codebook to {arguments.out}; expected NAME.zarr or NAME.zarr.zip")
    if not Path(arguments.out).absolute().parent.is_dir():
        raise CodebookError(f"cannot write {arguments.out}: there is no such folder; make it, or choose another place")
    check_source(arguments.source)
    # Pixels need no weights, only the model's patch size and normalisation.
    needs_weights = arguments.space == "embedding"
    model = create_model(arguments.model, arguments.checkpoint, weights=needs_weights)
    _, report = run_build(
        arguments.source,
        model,
        config,
        out=arguments.out,
        root=arguments.data_dir,
        workers=arguments.workers,
        strict=arguments.strict,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
        engine=engine,
        work=arguments.work,
    )
    print(build_summary(report, config))
    print(f"{arguments.out}")
    return 0


def _add_tune(tuned: argparse.ArgumentParser) -> None:
    _add_model(tuned)
    tuned.add_argument("--images", required=True, help="a folder of images to calibrate on, or hfds/…, torch/…")
    tuned.add_argument("--ratio", type=float, help="budget, of the model's latency")
    tuned.add_argument("--milliseconds", type=float, help="budget a batch")
    tuned.add_argument("--agreement", type=float, help="share of the images that must get the model's own class")
    tuned.add_argument("--batch-size", type=int, default=1, help="images at a time")
    own = "to try inter-image words too, a path or hf-hub:USER/NAME; can be repeated"
    tuned.add_argument("--codebook", action="append", default=[], help=own)
    tuned.add_argument("--count", type=int, default=ENOUGH, help="images to draw")
    tuned.add_argument("--seed", type=int, default=0, help="of the draw, and of the order of measurements")
    tuned.add_argument("--out", required=True, help="where to write the plan: NAME.json")
    tuned.add_argument("--report", metavar="FILE", help="write a report on the plan too: NAME.html")
    tuned.set_defaults(run=_tune, if_interrupted="; the same command goes on where it stopped")


def _tune(arguments: argparse.Namespace) -> int:
    check_writable(arguments.out, "plan")
    check_report(arguments.report)
    check_goal(arguments.ratio, arguments.milliseconds, arguments.agreement)
    check_source(arguments.images)
    model, show = _open_model(arguments), not arguments.quiet
    plan = tune(
        model,
        load_images(arguments.images, model, arguments.count, seed=arguments.seed, progress=show),
        ratio=arguments.ratio,
        milliseconds=arguments.milliseconds,
        agreement=arguments.agreement,
        batch_size=arguments.batch_size,
        codebooks=arguments.codebook,
        seed=arguments.seed,
        notes=f"{arguments.out}.tuning",
        progress=show,
    )
    plan.save(arguments.out)
    print(plan)
    print(arguments.out)
    if arguments.report:
        _write_report(arguments.report, plan, model, arguments)
    return 0


def _add_report(report: argparse.ArgumentParser) -> None:
    _add_model(report)
    report.add_argument("--plan", required=True, help="of vwt tune")
    report.add_argument("--images", required=True, help="a folder of images to show, or hfds/…, torch/…")
    report.add_argument("--force", action="store_true", help="apply a plan of another model or device too")
    report.add_argument("--seed", type=int, default=0, help="of the draw of images")
    report.add_argument("--out", required=True, help="where to write the report: NAME.html")
    report.set_defaults(run=_report, if_interrupted="; nothing was written")


def _report(arguments: argparse.Namespace) -> int:
    check_report(arguments.out)
    check_source(arguments.images)
    plan = Plan.load(arguments.plan)
    _write_report(arguments.out, plan, _open_model(arguments), arguments, force=arguments.force)
    return 0


def _write_report(
    path: str, plan: Plan, model: nn.Module, arguments: argparse.Namespace, *, force: bool = False
) -> None:
    skipped = write_report(
        path,
        plan,
        model,
        arguments.images,
        command=arguments.command_line,
        force=force,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if skipped:
        print(f"vwt: left out {len(skipped)} images that cannot be read: {', '.join(skipped)}", file=sys.stderr)
    print(path)


def _add_env(env: argparse.ArgumentParser) -> None:
    env.add_argument("--powercap", type=Path, default=POWERCAP, metavar="DIR", help="folder of RAPL's counters")
    env.set_defaults(run=_env, if_interrupted="")


def _env(arguments: argparse.Namespace) -> int:
    print(environment_report(arguments.powercap))
    return 0


def _add_models(models: argparse.ArgumentParser) -> None:
    models.add_argument("names", nargs="*", metavar="NAME", help="of a timm model, or a class of transformers")
    models.set_defaults(run=_models, if_interrupted="")


def _models(arguments: argparse.Namespace) -> int:
    if not arguments.names:
        print(list_families())
    status = 0
    for name in arguments.names:
        try:
            support = find_support(name)
        except ModelError as error:  # the others are answered all the same
            print(f"vwt: {error}", file=sys.stderr)
            status = 2
        else:
            print(support)
            status = max(status, int(support.reason is not None))
    return status


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that run a model."""
    parser.add_argument("--model", required=True, help="timm model")
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as many as torch takes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _set_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ArgumentError(f"--threads is {arguments.threads}; expected at least 1")
        torch.set_num_threads(arguments.threads)


def _open_model(arguments: argparse.Namespace) -> nn.Module:
    _set_threads(arguments)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"no device {arguments.device!r}: {first_line(error)}") from error
    if timm.is_model(arguments.model.split(".")[0]):  # before weights are fetched
        support = find_support(arguments.model)
        if support.reason is not None:
            raise ModelError(str(support))
    model = create_model(arguments.model, arguments.checkpoint)
    return model.to(device=arguments.device, dtype=getattr(torch, arguments.dtype))


def _add_profile(profile: argparse.ArgumentParser) -> None:
    _add_model(profile)
    profile.add_argument("--batch-size", type=int, default=1, help="images at a time")
    profile.add_argument("--points", type=int, default=POINTS, help="token counts to measure")
    profile.add_argument("--runs", type=int, default=RUNS, help="runs of each part, of which the median is taken")
    profile.add_argument("--seed", type=int, default=0, help="of the order, and of the forwards that are checked")
    profile.add_argument("--out", required=True, help="where to write the profile: NAME.json")
    profile.add_argument("--plot", metavar="FILE", help="draw latency over tokens")
    profile.set_defaults(run=_profile, if_interrupted="; nothing was written")


def _profile(arguments: argparse.Namespace) -> int:
    check_picture(arguments.plot)
    check_writable(arguments.out, "profile")
    profile = LatencyProfile.measure(
        _open_model(arguments),
        arguments.batch_size,
        points=arguments.points,
        runs=arguments.runs,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    profile.save(arguments.out)
    print(profile_summary(profile))
    if arguments.plot:
        plot_profile(arguments.plot, profile)
    print(arguments.out)
    return 0


def profile_summary(profile: LatencyProfile) -> str:
    """The profile as a table of text."""
    machine = profile.machine
    lines = [
        f"{profile.model}, batch {profile.batch_size}, {profile.dtype}, {machine['cpu']}, {machine['device']}, "
        f"{machine['threads']} threads",
        "tokens  one block, ms  of it attention",
    ]
    rows = zip(profile.counts, profile.block, profile.attention, strict=True)
    knees = profile.knees()
    lines += [f"{n:>6}  {block:>13.3f}  {own:>15.3f}{'  knee' if n in knees else ''}" for n, block, own in rows]
    lines.append(
        f"whole model {profile.predict():.2f} ms; predictions of forwards err by {100 * profile.error:.1f} % (median)"
    )
    return "\n".join(lines)


def _add_schedule(schedule: argparse.ArgumentParser) -> None:
    _add_model(schedule)
    schedule.add_argument("--profile", required=True, help="of vwt profile, on this device")
    schedule.add_argument("--images", required=True, help="a folder of images to calibrate on, or hfds/…, torch/…")
    goal = schedule.add_mutually_exclusive_group(required=True)
    goal.add_argument("--ratio", type=float, help="budget, of the full model's latency")
    goal.add_argument("--milliseconds", type=float, help="budget a batch")
    goal.add_argument("--utility", action="store_true", help="Prune One More Token's choice for one block")
    schedule.add_argument("--alpha", type=float, default=0.5, help="weight of latency, for --utility")
    schedule.add_argument("--block", type=int, help="that prunes, for --utility; by default a quarter of the way")
    schedule.add_argument("--count", type=int, default=ENOUGH, help="images to draw")
    schedule.add_argument("--seed", type=int, default=0, help="of the draw")
    schedule.add_argument("--out", required=True, help="where to write the schedule: NAME.json")
    schedule.add_argument("--plot", metavar="FILE", help="draw utility over tokens, for --utility")
    schedule.set_defaults(run=_schedule, if_interrupted="; nothing was written")


def _schedule(arguments: argparse.Namespace) -> int:
    if arguments.plot and not arguments.utility:
        raise ArgumentError("--plot draws the utility; give --utility, or leave it out")
    check_picture(arguments.plot)
    check_writable(arguments.out, "schedule")
    if arguments.utility and not 0 <= arguments.alpha <= 1:
        raise ArgumentError(f"alpha is {arguments.alpha}; expected a weight in [0, 1]")
    check_source(arguments.images)
    profile, show = LatencyProfile.load(arguments.profile), not arguments.quiet
    model = _open_model(arguments)
    if arguments.utility:  # else for_budget does
        profile.check(model)
    images = load_images(arguments.images, model, arguments.count, seed=arguments.seed, progress=show)
    if arguments.utility:
        block = profile.depth // 4 if arguments.block is None else arguments.block
        counts = [profile.prefix + n for n in range(profile.patches, 0, -max(1, profile.patches // 14))]
        accuracy = Calibration(model, images, progress=show).removal(block, counts, seed=arguments.seed, progress=show)
        schedule = PruningSchedule.from_utility(profile, accuracy, arguments.alpha, block)
        if arguments.plot:
            plot_utility(arguments.plot, profile, accuracy, arguments.alpha, block)
    else:
        budget = {"milliseconds": arguments.milliseconds, "ratio": arguments.ratio}
        schedule = PruningSchedule.for_budget(profile, model, images, **budget, progress=show)
    schedule.save(arguments.out)
    print(schedule.table(profile) if schedule else "do not prune: the full model is within the budget or as fast")
    print(arguments.out)
    return 0


def _add_export(exported: argparse.ArgumentParser) -> None:
    _add_model(exported)
    exported.add_argument("--plan", required=True, help="of vwt tune")
    exported.add_argument("--to", required=True, help="where to write the model: NAME.onnx, NAME.xml or NAME.pt2")
    exported.add_argument("--images", required=True, help="a folder of images to check it on, or hfds/…, torch/…")
    exported.add_argument("--count", type=int, default=CHECKED, help="images to draw")
    exported.add_argument("--seed", type=int, default=0, help="of the draw")
    exported.add_argument("--batch-size", type=int, help="at which latency is measured; by default that of the plan")
    exported.add_argument("--force", action="store_true", help="export a plan of another model or device too")
    exported.set_defaults(run=_export, if_interrupted="; nothing was written")


def _export(arguments: argparse.Namespace) -> int:
    plan, show = Plan.load(arguments.plan), not arguments.quiet
    batch_size = plan.batch_size if arguments.batch_size is None else arguments.batch_size
    check_target(arguments.to, batch_size)
    if arguments.count < max(LEAST, batch_size):
        raise ArgumentError(f"--count is {arguments.count}; expected at least {max(LEAST, batch_size)}")
    check_source(arguments.images)
    model = _open_model(arguments)
    plan.apply(model, force=arguments.force)  # before images are read
    images = load_images(arguments.images, model, arguments.count, seed=arguments.seed, progress=show)
    print(plan.export(model, arguments.to, images, batch_size=batch_size, force=arguments.force, progress=show))
    print(arguments.to)
    return 0


def _add_show(show: argparse.ArgumentParser) -> None:
    show.add_argument("image", help="file of an image")
    _add_model(show)
    show.add_argument("--plan", help="of vwt tune, or hf-hub:USER/NAME")
    show.add_argument("--force", action="store_true", help="apply a plan of another model or device too")
    show.add_argument("--strategy", help="neighbours:SHARE, intra:SHARE or inter:CODEBOOK[:THRESHOLD]")
    show.add_argument("--schedule", help="of vwt schedule")
    show.add_argument("--images", help="where to look for patches like the words; by default in the image alone")
    show.add_argument("--count", type=int, default=64, help="how many of those images to draw")
    show.add_argument("--seed", type=int, default=0, help="of the draw")
    show.add_argument("--out", required=True, help="the picture: NAME.png")
    show.set_defaults(run=_show, if_interrupted="; nothing was written")


def _show(arguments: argparse.Namespace) -> int:
    check_picture(arguments.out)
    if arguments.count < 1:
        raise ArgumentError(f"--count is {arguments.count}; expected at least 1")
    strategy = None if arguments.strategy is None else read_strategy(arguments.strategy)
    schedule = None if arguments.schedule is None else PruningSchedule.load(arguments.schedule)
    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    if plan is not None and (strategy is not None or schedule is not None):
        raise ArgumentError("a plan has its strategy and schedule; leave out --strategy and --schedule, or --plan")
    if plan is None and strategy is None and not schedule:
        raise ArgumentError("nothing is reduced; give --plan, --strategy, or a --schedule that is not empty")
    model = _open_model(arguments)
    image, images = read_image(arguments.image, model), None
    fast = VWTokenizer(model, strategy, schedule) if plan is None else plan.apply(model, force=arguments.force)
    codebook = getattr(fast.strategy, "codebook", None)
    if arguments.images is not None and codebook is not None:
        source = ImageSource(arguments.images, model)
        images = source.sample(arguments.count, seed=arguments.seed, progress=not arguments.quiet)
    save_stages(
        arguments.out, image, fast, codebook, images, heading=f"{Path(arguments.image).name}, {arguments.model}"
    )
    print(arguments.out)
    return 0


def read_strategy(text: str) -> Strategy:
    """`neighbours:0.22`, `intra:0.5` or `inter:CODEBOOK[:THRESHOLD]` as a strategy.

    Raises:
        ArgumentError: for anything else, or an argument out of its range.
        CodebookError: if the codebook cannot be read.
    """
    kind, _, rest = text.partition(":")
    path, _, last = rest.rpartition(":")
    share, threshold = _number(rest), _number(last)
    if kind in ("neighbours", "intra") and share is not None:
        return Neighbours(share) if kind == "neighbours" else IntraImage(share)
    if kind == "inter" and rest:
        if path and threshold is not None:
            return InterImage(Codebook.load(path), threshold)
        return InterImage(Codebook.load(rest))
    raise ArgumentError(f"no strategy {text!r}; expected neighbours:SHARE, intra:SHARE or inter:CODEBOOK[:THRESHOLD]")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def build_summary(report: BuildReport, config: BuildConfig) -> str:
    """The summary of a build as a table of text."""
    seconds = sorted(report.seconds.items(), key=lambda part: -part[1])
    total = sum(report.seconds.values())
    lines = [
        f"images    {report.images} read, {len(report.skipped)} skipped",
        *(f"          skipped {name}: {reason}" for name, reason in list(report.skipped.items())[:10]),
        f"patches   {report.patches} seen, {report.sampled} sampled",
        f"words     {config.words}, {report.effective} effective ({report.empty} empty, {report.duplicate} duplicate)",
        f"distance  {report.distance:.4f} mean cosine distance to the nearest word",
        f"matched   {100 * report.matched:.1f} % of patches within {config.threshold:g}",
        f"seconds   {total:.1f} (" + ", ".join(f"{part} {value:.1f}" for part, value in seconds) + ")",
    ]
    if len(report.skipped) > 10:
        lines.insert(11, f"          ... and {len(report.skipped) - 10} more")
    return "\n".join(lines)


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "build": _add_build,
    "profile": _add_profile,
    "schedule": _add_schedule,
    "tune": _add_tune,
    "report": _add_report,
    "export": _add_export,
    "show": _add_show,
    "env": _add_env,
    "models": _add_models,
}
