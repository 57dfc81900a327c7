"""The command `vwt`: a thin layer over the library. Errors are one line on stderr and exit status 2."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from vwt.backbones import create_model
from vwt.building import BACKENDS, BuildConfig, BuildReport, run_build
from vwt.datasets import check_source
from vwt.errors import VWTError
from vwt.patches import SPACES


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong call is one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except VWTError as error:
        print(f"vwt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nvwt: interrupted{arguments.if_interrupted}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vwt", description="Visual words for Vision Transformers.")
    commands = parser.add_subparsers(title="commands", required=True)
    _add_build(commands)
    return parser


def _add_build(commands: "argparse._SubParsersAction[Parser]") -> None:
    default = BuildConfig()
    build = commands.add_parser(
        "build",
        help="cluster the patches of a data set into a codebook",
        description="Cluster the patches of a data set into a codebook of visual words.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
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
    check_source(arguments.source)  # before weights are fetched
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
    )
    print(build_summary(report, config))
    print(f"{arguments.out}")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
