"""`vwt profile`, `vwt schedule` and `vwt tune`."""

import argparse

from vwt.commands.options import add_draw, add_model, add_runtime, finish, open_model
from vwt.commands.pictures import save_report
from vwt.datasets import check_source
from vwt.documents import check_writable
from vwt.errors import ArgumentError, MismatchError
from vwt.export.formats import FORMATS
from vwt.export.runtimes import EXPORTED
from vwt.pictures.charts import plot_profile, plot_utility
from vwt.pictures.figures import check_picture
from vwt.pictures.report.report import check_report
from vwt.progress import say
from vwt.tuning.calibration import ENOUGH, Calibration, load_images
from vwt.tuning.goal import check_goal
from vwt.tuning.profile import POINTS, RUNS, LatencyProfile
from vwt.tuning.schedule import PruningSchedule
from vwt.tuning.tune import tune

AS_IT_IS = "use the model as it is, or ask for less of its latency"


def add_profile(profile: argparse.ArgumentParser) -> None:
    """The options of `vwt profile`."""
    add_model(profile)
    add_runtime(profile)
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
    model = open_model(arguments)
    say(f"timing each part of it on {arguments.points} token counts", not arguments.quiet)
    profile = LatencyProfile.measure(
        model,
        arguments.batch_size,
        runtime=arguments.runtime,
        points=arguments.points,
        runs=arguments.runs,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    profile.save(arguments.out)
    print(profile_summary(profile))
    if arguments.plot:
        plot_profile(arguments.plot, profile)
    options = f"--profile {arguments.out} --model {arguments.model} --images DIR --ratio 0.8 --out NAME.json"
    return finish(arguments, arguments.out, f"vwt schedule {options}")


def profile_summary(profile: LatencyProfile) -> str:
    """The profile as a table of text."""
    machine = profile.machine
    lines = [
        f"{profile.model}, batch {profile.batch_size}, {profile.precision}, {profile.runtime}, {machine['cpu']}, "
        f"{machine['device']}, {machine['threads']} threads",
        "tokens  one block, ms  of it attention, ms",
    ]
    rows = zip(profile.counts, profile.block, profile.attention, strict=True)
    knees = profile.knees()
    lines += [f"{n:>6}  {block:>13.3f}  {own:>19.3f}{'  knee' if n in knees else ''}" for n, block, own in rows]
    lines.append(
        f"whole model {profile.predict():.2f} ms; predictions of forwards err by {100 * profile.error:.1f} % (median)"
    )
    return "\n".join(lines)


def add_schedule(schedule: argparse.ArgumentParser) -> None:
    """The options of `vwt schedule`."""
    add_model(schedule)
    add_runtime(schedule, None)
    schedule.add_argument("--profile", required=True, help="of vwt profile, on this device")
    schedule.add_argument("--images", required=True, help="a folder of images to calibrate on, or hfds/…, torch/…")
    goal = schedule.add_mutually_exclusive_group(required=True)
    goal.add_argument("--ratio", type=float, help="budget, of the full model's latency")
    goal.add_argument("--milliseconds", type=float, help="budget a batch")
    goal.add_argument("--utility", action="store_true", help="Prune One More Token's choice for one block")
    schedule.add_argument("--alpha", type=float, default=0.5, help="weight of latency, for --utility")
    schedule.add_argument("--block", type=int, help="that prunes, for --utility; by default a quarter of the way")
    add_draw(schedule, ENOUGH)
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
    if arguments.runtime not in (None, profile.runtime):
        raise MismatchError(
            f"{arguments.profile} was measured in {profile.runtime}, not in {arguments.runtime}; measure again, or "
            "leave out --runtime"
        )
    model = open_model(arguments)
    if arguments.utility:  # else for_budget does
        profile.check(model)
    images = load_images(arguments.images, model, arguments.count, seed=arguments.seed, progress=show)
    if arguments.utility:
        block = profile.depth // 4 if arguments.block is None else arguments.block
        counts = [profile.prefix + n for n in range(profile.patches, 0, -max(1, profile.patches // 14))]
        say(f"removing tokens at random after block {block}, and comparing the answers", show)
        accuracy = Calibration(model, images, progress=show).removal(block, counts, seed=arguments.seed, progress=show)
        schedule = PruningSchedule.from_utility(profile, accuracy, arguments.alpha, block)
        if arguments.plot:
            plot_utility(arguments.plot, profile, accuracy, arguments.alpha, block)
    else:
        budget = {"milliseconds": arguments.milliseconds, "ratio": arguments.ratio}
        schedule = PruningSchedule.for_budget(profile, model, images, **budget, progress=show)
    schedule.save(arguments.out)
    print(schedule.table(profile) if schedule else "do not prune: the full model is within the budget or as fast")
    use = f'vwt.VWTokenizer(model, schedule=vwt.PruningSchedule.load("{arguments.out}"))'
    return finish(arguments, arguments.out, f"apply it with {use}" if schedule else AS_IT_IS)


def add_tune(tuned: argparse.ArgumentParser) -> None:
    """The options of `vwt tune`."""
    add_model(tuned)
    add_runtime(tuned)
    tuned.add_argument("--images", required=True, help="a folder of images to calibrate on, or hfds/…, torch/…")
    tuned.add_argument("--ratio", type=float, help="budget, of the model's latency")
    tuned.add_argument("--milliseconds", type=float, help="budget a batch")
    tuned.add_argument("--agreement", type=float, help="share of the images that must get the model's own class")
    tuned.add_argument("--batch-size", type=int, default=1, help="images at a time")
    own = "to try inter-image words too, a path or hf-hub:USER/NAME; can be repeated"
    tuned.add_argument("--codebook", action="append", default=[], help=own)
    add_draw(tuned, ENOUGH)
    tuned.add_argument("--out", required=True, help="where to write the plan: NAME.json")
    tuned.add_argument("--report", metavar="FILE", help="write a report on the plan too: NAME.html")
    tuned.set_defaults(run=_tune, if_interrupted="; the same command goes on where it stopped")


def _tune(arguments: argparse.Namespace) -> int:
    check_writable(arguments.out, "plan")
    check_report(arguments.report)
    if arguments.report and arguments.runtime != "torch":
        raise ArgumentError(f"a report measures a plan in torch, not in {arguments.runtime}; leave out --report")
    check_goal(arguments.ratio, arguments.milliseconds, arguments.agreement)
    check_source(arguments.images)
    model, show = open_model(arguments), not arguments.quiet
    plan = tune(
        model,
        load_images(arguments.images, model, arguments.count, seed=arguments.seed, progress=show),
        ratio=arguments.ratio,
        milliseconds=arguments.milliseconds,
        agreement=arguments.agreement,
        batch_size=arguments.batch_size,
        runtime=arguments.runtime,
        codebooks=arguments.codebook,
        seed=arguments.seed,
        notes=f"{arguments.out}.tuning",
        progress=show,
    )
    plan.save(arguments.out)
    print(plan)
    advice = _use(arguments) if plan.chosen.reduces else AS_IT_IS
    if not arguments.report:
        return finish(arguments, arguments.out, advice)
    print(arguments.out)
    save_report(arguments.report, plan, model, arguments)
    return finish(arguments, arguments.report, f"{advice}, and open {arguments.report} in a browser")


def _use(arguments: argparse.Namespace) -> str:
    """What to do with the plan that was made."""
    if arguments.runtime not in EXPORTED:
        return f'apply it with vwt.Plan.load("{arguments.out}").apply(model)'
    suffix = next(suffix for suffix, kind in FORMATS.items() if kind.runtime == arguments.runtime)
    return f"vwt export --plan {arguments.out} --model {arguments.model} --images DIR --to NAME{suffix}"
