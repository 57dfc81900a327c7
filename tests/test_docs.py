"""README and docs/: links lead somewhere, names exist, commands parse, and Python snippets run.

The Python snippets of a page run in order, as one program, in a folder that has images at `path/to/images`, with
`images`, `model` and `codebook` at hand. What takes minutes or the network is replaced, see `stand_ins`. A snippet that
follows a line `<!-- not run -->` is only compiled.
"""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

import vwt
from tests.test_datasets import write_images
from tests.tuning.test_profile import make_profile
from vwt.cli import _parser
from vwt.tuning.plan import Plan, Point

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for folder in ("vwt", "benchmarks", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
# With real weights, in tests/scripts/test_feature_map.py; and without vwt, in tests/export/test_snippets.py.
RUN_ELSEWHERE = {"feature_maps.md", "export.md"}
SCHEDULE = vwt.PruningSchedule({3: vwt.Absorb(60)})


def name_of(page):
    return page.name


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def snippets(page, *languages):
    """The code blocks of a page in these languages, and whether each is to be run."""
    found = re.findall(r"(<!-- not run -->\n+)?^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(code, not skipped) for skipped, language, code in found if language in languages]


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What a link can name of a page: its headings, in lower case, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_page
def test_links_lead_somewhere(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}; {file.name} has no such heading"


def test_reference_links_are_used():
    """No reference without a definition: Markdown would show it as text."""
    for page in PAGES:
        text = prose(page)
        assert set(re.findall(r"\]\[([^\]]+)\]", text)) == set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))


def exists(name):
    """Whether a full name is that of a module of vwt, or of something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("vwt"):
                pytest.skip(f"{error.name} is not installed")
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_full_names_exist(path):
    """A name in backticks that starts with `vwt.` is one that can be imported."""
    names = set(re.findall(r"`(vwt(?:\.\w+)+)", path.read_text()))
    assert not [name for name in sorted(names) if not exists(name)]


def test_reference_lists_the_public_names():
    listed = re.findall(r"^\| `vwt\.(\w+)` \| \{py:\w+\}`([\w.]+)` \|$", (ROOT / "docs/reference.md").read_text(), re.M)
    assert sorted(name for name, _ in listed) == sorted(vwt.__all__)
    for name, home in listed:
        module, _, attribute = home.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(vwt, name)


@each_page
def test_commands_parse(page):
    """`vwt ...` is taken by the command; scripts exist, and know the options."""
    for code, _ in snippets(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["vwt"]:
                assert _parser().parse_args(words[1:]).run
            elif words[:1] == ["python"] and words[1] != "-m":
                source = "".join(file.read_text() for file in sorted((ROOT / words[1]).parent.glob("*.py")))
                assert (ROOT / words[1]).is_file(), line
                for option in (word for word in words if word.startswith("--")):
                    assert f'"{option}"' in source, f"{page.name}: {words[1]} has no option {option}"
            elif words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@pytest.fixture
def stand_ins(monkeypatch):
    """Random weights in place of those from the hub; searches and measurements are only checked for their arguments."""
    make = timm.create_model

    def create_model(name, pretrained=False, **options):
        torch.manual_seed(0)
        return make(name, pretrained=False, **options)

    def tune(model, images, **options):
        inspect.signature(tune_itself).bind(model, images, **options)
        own = vwt.LatencyProfile.identify(model)
        point = Point({"name": "Neighbours", "drop": 0.15}, SCHEDULE, 10.0, 0.8, 0.01, 0.95)
        machine = {"cpu": own["cpu"], "device": own["device"]}
        return Plan(own["model"], 1, own["precision"], machine, {"ratio": 0.8}, point, [point])

    def measure(model, batch_size=1, device=None, **options):
        inspect.signature(measure_itself).bind(model, batch_size, device, **options)
        return make_profile()

    def for_budget(profile, model, images, **options):
        inspect.signature(for_budget_itself).bind(profile, model, images, **options)
        return SCHEDULE

    tune_itself, measure_itself = vwt.tune, vwt.LatencyProfile.measure
    for_budget_itself = vwt.PruningSchedule.for_budget
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(vwt, "tune", tune)
    monkeypatch.setattr(vwt.LatencyProfile, "measure", measure)
    monkeypatch.setattr(vwt.PruningSchedule, "for_budget", for_budget)


@pytest.fixture
def small_blip(monkeypatch):
    """A small captioning model with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision = {**sizes, "image_size": 224, "patch_size": 16}
    text = {**sizes, "vocab_size": 60, "encoder_hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"pad_token_id": 0, "sep_token_id": 2, "max_position_embeddings": 40}

    def from_pretrained(name):
        torch.manual_seed(0)
        config = transformers.BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=16)
        return transformers.BlipForConditionalGeneration(config)

    monkeypatch.setattr(transformers.BlipForConditionalGeneration, "from_pretrained", from_pretrained)


@each_page
def test_python_snippets(page, request, tmp_path, monkeypatch):
    code = snippets(page, "python")
    for text, _ in code:
        compile(text, page.name, "exec")
    if page.name in RUN_ELSEWHERE or not code:
        return
    request.getfixturevalue("stand_ins")
    if any("transformers" in text for text, _ in code):
        request.getfixturevalue("small_blip")
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "path" / "to" / "images", count=16)
    torch.manual_seed(0)
    names = {
        "images": torch.randn(2, 3, 224, 224),
        "model": timm.create_model("vit_tiny_patch16_224").eval(),
        "codebook": vwt.Codebook.load(ROOT / "codebooks" / "pixel-patch16-1000.zarr"),
    }
    for text, run in code:
        if run:
            exec(compile(text, page.name, "exec"), names)
