"""`vwt build`."""

import argparse
from pathlib import Path

from vwt.codebook.building import run_build
from vwt.codebook.config import BACKENDS, BuildConfig, BuildReport
from vwt.codebook.engine import ENGINES, Engine
from vwt.commands.options import add_named_model, create_named_model, finish
from vwt.datasets import check_source
from vwt.errors import CodebookError
from vwt.tokens.patches import SPACES


def add_build(build: argparse.ArgumentParser) -> None:
    """The options of `vwt build`."""
    default = BuildConfig()
    source = "a folder of images or a tar file, here or at a URL (s3://…), or hfds/…, torch/…, tfds/…, wds/…"
    build.add_argument("source", help=source)
    add_named_model(build, "timm model whose patches and data config are used")
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
    build.add_argument("--count-images", type=int, metavar="N", help="count words in N images only, drawn at random")
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
    build.add_argument("--quiet", action="store_true", help="results only: no progress, no advice")
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
        count_images=arguments.count_images,
    )
    engine = Engine(arguments.engine, arguments.num_workers, arguments.address, arguments.gpus_per_worker)
    # All that is wrong is said before weights are fetched.
    if not Path(arguments.out).name.endswith((".zarr", ".zarr.zip")):  # a shell may end it with a slash
        raise CodebookError(f"cannot write a codebook to {arguments.out}; expected NAME.zarr or NAME.zarr.zip")
    if not Path(arguments.out).absolute().parent.is_dir():
        raise CodebookError(f"cannot write {arguments.out}: there is no such folder; make it, or choose another place")
    check_source(arguments.source)
    # Pixels need no weights, only the model's patch size and normalisation.
    needs_weights = arguments.space == "embedding"
    model = create_named_model(arguments, weights=needs_weights)
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
    use = f'vwt.InterImage(vwt.Codebook.load("{arguments.out}"))'
    advice = f"reduce tokens with {use}, or let vwt tune --codebook {arguments.out} try it"
    return finish(arguments, arguments.out, advice)


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
