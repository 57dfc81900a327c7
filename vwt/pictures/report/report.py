"""One HTML file on a plan: its front, where the time goes, images with their answers, words, and what made it.

Needs Altair: `pip install vwt[report]`. The file loads nothing from the network.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vwt.documents import check_folder, make_document, replacing
from vwt.errors import ArgumentError, DocumentError
from vwt.measure.environment import hardware
from vwt.pictures.answers import Answers, Photographs, answer, load_photographs
from vwt.pictures.report.costs import measure_costs
from vwt.pictures.report.front import Row, front_rows
from vwt.pictures.report.words import describe_words
from vwt.pictures.stages import stages
from vwt.pictures.tiles import colours, data_uri
from vwt.progress import Steps
from vwt.tokenizer import VWTokenizer
from vwt.tuning.plan import VERSION, Plan

SHOWN = 12  # images
SCALES = ("linear", "log")


def check_report(path: str | os.PathLike[str] | None) -> None:
    """Raise, before anything is measured, if a report is asked for that cannot be written.

    Raises:
        ArgumentError: without Altair, Jinja or vl-convert.
        DocumentError: for a name that does not end in .html, or a folder that does not exist or cannot be written.
    """
    if path is None:
        return
    missing = [name for name in ("altair", "jinja2", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(f"a report needs {', '.join(missing)}; pip install 'vwt[report]'")
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise DocumentError(f"cannot write the report {path}; expected a name that ends in .html")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise DocumentError(f"cannot write the report {path}: there is no such folder, or it is one; make it first")
    check_folder(path, f"the report {path}")


def write_report(
    path: str | os.PathLike[str],
    plan: Plan,
    model: nn.Module,
    images: Tensor | str | os.PathLike[str],
    *,
    others: Sequence[Row] = (),
    command: str = "",
    force: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[str]:
    """Write what is known of a plan as one HTML file, and return the names of the images that could not be read.

    Args:
        path: of the file, .html.
        plan: of this model.
        model: that was tuned.
        images: a data set of which 64 are drawn, or (n, C, H, W), uint8 or normalised for the model. Twelve are shown:
            up to six on which the first class changed, and the first of the others.
        others: what the front is compared with, such as other methods, measured in the way of the plan.
        command: that makes this report.
        force: also for another model, precision, device or runtime.
        seed: of the draw.
        progress: show progress bars.

    Raises:
        ArgumentError: without Altair, or for a model of images and text.
        DocumentError: if the file cannot be written.
        MismatchError: if the plan is of another model or device.
        DataError: if there is no image that can be read.
    """
    check_report(path)
    fast = plan.apply(model, force=force)
    fast.backbone.check_alone()
    photographs = load_photographs(images, model, seed=seed, progress=progress)
    fast.backbone.check(photographs.pixels[:1].to(next(model.parameters())))
    step = Steps(3, progress)
    step("timing each part of a forward, without and with the plan")
    costs = measure_costs(fast, photographs.pixels, plan.batch_size, progress=progress)
    step.found(f"a batch takes {costs.full:.2f} ms, with the plan {costs.reduced:.2f} ms")
    step(f"asking the model and the reduced one for their answers to {len(photographs.pixels)} images")
    answers = answer(fast, photographs)
    step.found(f"the first class changed on {int((~answers.fidelity.agrees).sum())}")
    step("drawing the page")
    rows = front_rows(plan, fast, photographs.pixels) + list(others)
    shown = choose(answers)
    context = {
        "plan": plan,
        "costs": costs,
        "answers": answers,
        "photographs": photographs,
        "rows": rows,
        "cards": [card(fast, photographs, answers, index) for index in shown],
        "depth": fast.backbone.depth,
        "words": describe_words(fast, photographs.pixels) if hasattr(fast.strategy, "codebook") else None,
        "machine": hardware(next(model.parameters()).device, plan.precision),
        "version": version("vwt"),
        "command": command,
        "plan_json": json.dumps(make_document("plan", VERSION, plan.to_json()), indent=1),
    }
    page = render(context)
    try:
        with replacing(Path(path)) as fresh:
            fresh.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DocumentError(f"cannot write the report {path}: {error.strerror}; choose another file") from error
    return photographs.skipped


def choose(answers: Answers, most: int = SHOWN) -> list[int]:
    """Images to show: those whose answer changed first, which take at most half of the places unless others lack."""
    order = answers.by_change()
    changed = int((~answers.fidelity.agrees).sum())
    taken = max(min(changed, most // 2), most - (len(order) - changed))
    return order[:changed][:taken] + order[changed:][: most - taken]


def card(fast: VWTokenizer, photographs: Photographs, answers: Answers, index: int) -> dict[str, Any]:
    """One image, its stages and its answers, for the page."""
    pixels = photographs.pixels[index]
    found = stages(fast, pixels)
    agrees = bool(answers.fidelity.agrees[index])
    everything = fast.backbone.prefix + len(found[0].keeper)
    path = " → ".join(str(count) for count in dict.fromkeys([everything, *(stage.tokens for stage in found)]))
    return {
        "name": _printable(photographs.names[index]),
        "picture": data_uri(colours(pixels), "JPEG"),
        "agrees": agrees,
        "kl": float(answers.fidelity.kl[index]),
        "classes": [(_printable(name), full, reduced) for name, full, reduced in answers.first(index)],
        "tokens": everything,
        "path": path,
        "grid": found[0].grid,
        "stages": [
            {"at": 1 if s.block is None else s.block + 2, "tokens": s.tokens, "keeper": s.keeper.tolist()}
            for s in found
        ],
    }


def _printable(name: str) -> str:
    """A file's name, of which not every byte need be text."""
    return name.encode("utf-8", "backslashreplace").decode()


def render(context: dict[str, Any]) -> str:
    """The page, with everything that it needs in it."""
    import jinja2

    from vwt.pictures.report import charts

    plan, costs, rows, words = context["plan"], context["costs"], context["rows"], context["words"]
    data: dict[str, Any] = {
        "charts": {
            f"{over}": {scale: charts.front_chart(rows, over, scale, plan.batch_size) for scale in SCALES}
            for over in ("milliseconds", "tokens")
        }
        | {"parts": charts.parts_chart(costs), "profile": charts.profile_chart(costs)},
        "images": [{name: one[name] for name in ("grid", "tokens", "stages")} for one in context["cards"]],
    }
    if words is not None:
        data["charts"]["words"] = charts.words_chart(words.numbers, words.shares, words.here)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vwt.pictures.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = files("vwt.pictures.report") / "page"
    inlined = {name: (page / name).read_text() for name in ("page.css", "page.js")}
    return environment.get_template("page.html").render(
        **context, data=data, style=inlined["page.css"], script=inlined["page.js"], library=_library()
    )


@functools.cache
def _library() -> str:
    """Vega-Lite and what embeds its charts in a page, as one script."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script")
