"""`vwt export`."""

import argparse
from pathlib import Path

from vwt.commands.options import add_draw, add_model, finish, open_model
from vwt.datasets import check_source
from vwt.errors import ArgumentError
from vwt.export.exporting import check_int8, check_target, least_images
from vwt.tuning.calibration import load_images
from vwt.tuning.plan import CHECKED, Plan

CALLS = {
    ".onnx": 'onnxruntime.InferenceSession("{}").run(None, {{"images": images}})',
    ".xml": 'openvino.Core().compile_model("{}", "CPU")(images)',
    ".pt2": 'torch._inductor.aoti_load_package("{}")(images)',
}  # what runs a file, by its suffix


def add_export(exported: argparse.ArgumentParser) -> None:
    """The options of `vwt export`."""
    add_model(exported)
    exported.add_argument("--plan", required=True, help="of vwt tune")
    exported.add_argument("--to", required=True, help="where to write the model: NAME.onnx, NAME.xml or NAME.pt2")
    exported.add_argument("--images", required=True, help="a folder of images to check it on, or hfds/…, torch/…")
    add_draw(exported, CHECKED)
    exported.add_argument("--batch-size", type=int, help="at which latency is measured; by default that of the plan")
    exported.add_argument(
        "--int8", action="store_true", help="quantise it, for onnxruntime; half of the images calibrate"
    )
    exported.add_argument("--force", action="store_true", help="export a plan of another model or device too")
    exported.set_defaults(run=_export, if_interrupted="; nothing was written")


def _export(arguments: argparse.Namespace) -> int:
    plan, show = Plan.load(arguments.plan), not arguments.quiet
    batch_size = plan.batch_size if arguments.batch_size is None else arguments.batch_size
    kind = check_target(arguments.to, batch_size)
    check_int8(arguments.int8, kind)
    least = least_images(batch_size, arguments.int8)
    if arguments.count < least:
        raise ArgumentError(f"--count is {arguments.count}; expected at least {least}")
    check_source(arguments.images)
    model = open_model(arguments)
    plan.check(model, kind.runtime, force=arguments.force)  # before images are read
    images = load_images(arguments.images, model, arguments.count, seed=arguments.seed, progress=show)
    options = {"batch_size": batch_size, "int8": arguments.int8, "force": arguments.force}
    print(plan.export(model, arguments.to, images, **options, progress=show))
    return finish(arguments, arguments.to, f"run it with {CALLS[Path(arguments.to).suffix].format(arguments.to)}")
