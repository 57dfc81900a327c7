"""`vwt export`."""

import argparse
from pathlib import Path

from vwt.commands.options import add_draw, add_model, finish, open_model
from vwt.datasets import check_source
from vwt.errors import ArgumentError
from vwt.export.exporting import LEAST, check_target
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
    exported.add_argument("--force", action="store_true", help="export a plan of another model or device too")
    exported.set_defaults(run=_export, if_interrupted="; nothing was written")


def _export(arguments: argparse.Namespace) -> int:
    plan, show = Plan.load(arguments.plan), not arguments.quiet
    batch_size = plan.batch_size if arguments.batch_size is None else arguments.batch_size
    runtime = check_target(arguments.to, batch_size).runtime
    if arguments.count < max(LEAST, batch_size):
        raise ArgumentError(f"--count is {arguments.count}; expected at least {max(LEAST, batch_size)}")
    check_source(arguments.images)
    model = open_model(arguments)
    plan.check(model, runtime, force=arguments.force)  # before images are read
    images = load_images(arguments.images, model, arguments.count, seed=arguments.seed, progress=show)
    print(plan.export(model, arguments.to, images, batch_size=batch_size, force=arguments.force, progress=show))
    return finish(arguments, arguments.to, f"run it with {CALLS[Path(arguments.to).suffix].format(arguments.to)}")
