"""A reduced model as a file, which answers real images as the model does before it is left in place."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor

from vwt.documents import check_folder
from vwt.errors import ArgumentError, ExportError
from vwt.export.formats import FORMATS, Format, Run
from vwt.export.quantising import quantise_onnx
from vwt.export.runtimes import Answer, check_runtime, written_in
from vwt.measure.timing import measure_latency
from vwt.models.spec import PatchSpec
from vwt.progress import Steps
from vwt.tokenizer import VWTokenizer

LEAST = 64  # images on which a file is checked
BATCH = 16  # of them at a time
KEY = "vwt"  # of the metadata
# Of the answers: their largest difference in an image, over their standard deviation, in the median of images; and the
# share of images whose first class may differ. Where two patches are nearly as important, runtimes may keep either.
TOLERANCE = {"float32": (0.01, 0.02), "bfloat16": (0.5, 0.1), "int8": (1.0, 0.1)}
CALIBRATED = 64  # images that an int8 file is calibrated on, beside those that it is checked on


@dataclass(frozen=True)
class Parity:
    """An exported model beside the one that it was made of, on real images.

    Attributes:
        path: the file.
        runtime: that ran it.
        precision: that it computes in.
        images: how many.
        difference: largest of an answer, over all images.
        median: of the largest difference of each image, over the standard deviation of the answers.
        agreement: share of the images whose first class is the same; of embeddings, which are nearest to the model's of
            the same image.
        milliseconds: a batch.
        ratio: of that to the full model, exported likewise and measured in the same run.
        batch_size: of these two.
    """

    path: str
    runtime: str
    precision: str
    images: int
    difference: float
    median: float
    agreement: float
    milliseconds: float
    ratio: float
    batch_size: int

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.path}: for {self.runtime}, {self.precision}, any number of images",
                f"{self.images} images: agreement {100 * self.agreement:.1f} %, largest difference "
                f"{self.difference:.2g} (in the median image {self.median:.2g} of the answers' standard deviation)",
                f"latency {self.ratio:.3f} of the full model's in {self.runtime} ({self.milliseconds:.2f} ms, batch "
                f"{self.batch_size}, {torch.get_num_threads()} threads)",
            )
        )


def check_target(path: str | os.PathLike[str], batch_size: int = 1) -> Format:
    """The format that a path names; raises, before long work, unless a model can be exported there.

    Raises:
        ArgumentError: for another suffix, a runtime that is not installed, or a batch size below 1.
        ExportError: if nothing can be written there.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ArgumentError(f"cannot export to {path}; expected a name that ends in {', '.join(FORMATS)}")
    if batch_size < 1:
        raise ArgumentError(f"batch size is {batch_size}; expected at least 1")
    check_runtime(FORMATS[path.suffix].runtime)
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder; choose another file")
    check_folder(path, str(path), ExportError)
    return FORMATS[path.suffix]


def export(
    fast: VWTokenizer,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    batch_size: int = 1,
    plan: Mapping[str, Any] | None = None,
    tolerance: tuple[float, float] | None = None,
    int8: bool = False,
    progress: bool = True,
) -> Parity:
    """Write a reduced model as ONNX, OpenVINO IR or AOTInductor package, and compare it with itself on real images.

    The file takes any number of images, of the size of those given, and says in its metadata how they are prepared.

    Args:
        fast: in eval mode, with as many tokens for every image.
        path: NAME.onnx, NAME.xml (beside which NAME.bin is written) or NAME.pt2.
        images: (n, C, H, W) normalised for the model, n at least 64.
        batch_size: at which latency is measured.
        plan: as it is written into the metadata.
        tolerance: see `TOLERANCE`, by default that of the file's precision.
        int8: quantise an ONNX file (see `vwt.export.quantising`), calibrated on the first 64 images and checked on the
            others, of which there must be as many as without.
        progress: show a progress bar.

    Raises:
        ArgumentError: see `check_target`; for too few images; for a strategy that gives each image its own number.
        ExportError: if it cannot be exported or written, or answers otherwise; nothing is left behind then.
        ImageError: for images that the model does not take.
    """
    kind, path = check_target(path, batch_size), Path(path)
    if not fast.family.ABILITIES.export:
        raise ExportError(
            f"a {type(fast.model).__name__} on fewer tokens cannot be exported for any number of images (`vwt models` "
            "says what can); run it in torch"
        )
    if fast.training:
        raise ArgumentError("the model is in train mode; call .eval() first")
    fast.backbone.check(images)
    check_int8(int8, kind)
    least = least_images(batch_size, int8)
    if len(images) < least:
        raise ArgumentError(f"{len(images)} images; an exported model is checked on at least {least}, give more")
    precision = str(images.dtype).removeprefix("torch.")
    check_runtime(kind.runtime, precision, images.device)
    written = written_in(kind.runtime, precision)
    named = "int8" if int8 else precision
    metadata = {KEY: json.dumps(describe(fast, images, named, plan))}
    images, step = images.float(), Steps(4 if int8 else 3, progress)
    with _drafts(path) as folder:
        fresh, whole = folder / path.name, folder / f"full{path.suffix}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporters, about themselves
            step(f"writing the reduced model for {kind.runtime}")
            kind.write(Answer(fast, written), images, fresh, metadata)
            if int8:
                step(f"quantising it, calibrated on {CALIBRATED} images")
                quantise_onnx(fresh, images[:CALIBRATED])
                images = images[CALIBRATED:]
            made = sorted(folder.iterdir())
            step("writing the model itself likewise, to compare with")
            kind.write(Answer(fast.model, written), images, whole, None)
        step(f"comparing the answers to {len(images)} images, and timing both")
        parity = _compare(fast, kind, fresh, whole, images, precision, batch_size, progress)
        parity = replace(parity, path=str(path), precision=named)
        _check(parity, tolerance or TOLERANCE[named])
        for file in made:
            os.replace(file, path.parent / file.name)
    return parity


@contextmanager
def _drafts(path: Path) -> Iterator[Path]:
    """A folder beside `path`, in which files are made that then take their places; it goes in the end.

    Raises:
        ExportError: if the disk refuses.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.stem}-") as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def check_int8(int8: bool, kind: Format) -> None:
    """Raise ArgumentError unless files of a format can be quantised, if they are to be."""
    if int8 and kind.runtime != "onnxruntime":
        raise ArgumentError(
            f"int8 is for onnxruntime, not for {kind.runtime}; name the file NAME.onnx, or leave int8 out"
        )


def least_images(batch_size: int, int8: bool) -> int:
    """The fewest images with which a model is exported."""
    return max(LEAST, batch_size) + int8 * CALIBRATED


def describe(fast: VWTokenizer, images: Tensor, precision: str, plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an exported file says of itself: how images are prepared, and what reduces their tokens."""
    spec = PatchSpec.of(fast.backbone.tower)
    config = resolve_data_config(pretrained_cfg=fast.family.pretrained_cfg)
    preparation = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    return {
        "model": spec.model,
        "precision": precision,
        "preprocessing": {"input_size": list(images.shape[1:]), "mean": spec.mean, "std": spec.std, **preparation},
        "strategy": None if fast.strategy is None else repr(fast.strategy),
        "schedule": {str(block): repr(what) for block, what in fast.schedule.items()},
        "plan": plan,
        "versions": {name: version(name) for name in ("vwt", "torch", "timm")},
    }


@torch.inference_mode()
def _compare(
    fast: VWTokenizer,
    kind: Format,
    fresh: Path,
    whole: Path,
    images: Tensor,
    precision: str,
    batch_size: int,
    progress: bool,
) -> Parity:
    """Run a file beside the model that it was made of, and beside the file of the full model."""
    answers = _answers(kind.open(fresh, precision, None), images)
    reference = _answers(Answer(fast, precision), images)
    runs = [kind.open(file, precision, (batch_size, *images.shape[1:])) for file in (whole, fresh)]
    _, (ms, ratio, _) = measure_latency(runs[0], runs[1:], images, batch_size, progress=progress)
    furthest = (reference - answers).abs().flatten(1).amax(dim=1)
    return Parity(
        path=str(fresh),
        runtime=kind.runtime,
        precision=precision,
        images=len(images),
        difference=float(furthest.max()),
        median=float(furthest.median() / reference.std()),
        agreement=_agreement(reference, answers, fast.family.has_classes),
        milliseconds=ms,
        ratio=ratio,
        batch_size=batch_size,
    )


def _answers(run: Run, images: Tensor) -> Tensor:
    """Of images one after another, the first alone, as the number of them is free."""
    return torch.cat([run(batch.clone()) for batch in (images[:1], *images[1:].split(BATCH))])


def _agreement(reference: Tensor, answers: Tensor, classes: bool) -> float:
    if classes:
        agrees = reference.argmax(dim=-1) == answers.argmax(dim=-1)
    else:
        likeness = F.normalize(answers.flatten(1), dim=-1) @ F.normalize(reference.flatten(1), dim=-1).T
        agrees = likeness.argmax(dim=-1) == torch.arange(len(answers), device=answers.device)
    return float(agrees.float().mean())


def _check(parity: Parity, tolerance: tuple[float, float]) -> None:
    """Raise ExportError if the file answers otherwise than the model."""
    median, disagreement = tolerance
    # Not a number is no difference that is small enough.
    if not (parity.median <= median and 1 - parity.agreement <= disagreement):
        raise ExportError(
            f"{parity.path} is not written, as it answers otherwise than the model: agreement "
            f"{100 * parity.agreement:.1f} % (expected at least {100 * (1 - disagreement):g} %), difference in the "
            f"median image {parity.median:.2g} of the answers' standard deviation (at most {median:g}); try another "
            "format"
        )
