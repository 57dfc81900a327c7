import json
import sys
from html.parser import HTMLParser

import pytest
import timm
import torch

from tests.test_datasets import write_images
from vwt import Plan
from vwt.errors import ArgumentError, DataError, DocumentError, ImageError, MismatchError
from vwt.pictures.answers import Answers
from vwt.pictures.report import report
from vwt.pictures.report.report import check_report, choose, write_report
from vwt.tuning.calibration import Fidelity


class Page(HTMLParser):
    """Tags with their attributes, and the text of each element with an id."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("kind", ["neighbours", "words", "nothing"])
def test_what_a_report_holds(written, kind, tmp_path):
    plan, file = written(kind)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    charts = {place["data-chart"] for place in page.all("div") if "data-chart" in place}
    expected = {"milliseconds", "tokens", "parts", "profile"} | ({"words"} if kind == "words" else set())
    data = json.loads(page.texts["data"])
    assert charts == set(data["charts"]) == expected
    assert set(data["charts"]["milliseconds"]) == {"linear", "log"}
    assert len(page.all("article")) == len(data["images"]) == 10
    assert "vwt report --out a&amp;b.html" in text
    assert "a &lt;/script&gt; &amp; co" in text
    assert ("The codebook" in text) == (kind == "words")
    # The plan can be copied, and read as one.
    (tmp_path / "plan.json").write_text(page.texts["plan"])
    assert Plan.load(tmp_path / "plan.json") == plan


def read(written, kind):
    return Page(written(kind)[1].read_text(encoding="utf-8"))


def test_it_loads_nothing(written):
    page = read(written, "neighbours")
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    assert not page.all("link") or all(own["href"].startswith("data:") for own in page.all("link"))
    policy = next(own["content"] for own in page.all("meta") if own.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_scripts_are_held_once_and_it_is_small(small_vit, make_plan, tmp_path):
    """Twelve images of noise, which compress least."""
    noise = torch.randint(0, 256, (12, 3, 160, 160), dtype=torch.uint8)
    write_report(tmp_path / "out.html", make_plan("words"), small_vit, noise, progress=False)
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert text.count("window.vegaEmbed") == 1
    assert len(text.encode()) < 5_000_000


def test_every_picture_has_a_text(written):
    page = read(written, "words")
    assert all(own["alt"] for own in page.all("img"))
    assert all(own["aria-label"] for own in page.all("div") if own.get("role") == "img")
    assert {own.get("aria-hidden") for own in page.all("canvas")} == {"true"}


def test_stages_of_each_image(written):
    image = json.loads(read(written, "neighbours").texts["data"])["images"][0]
    assert (image["grid"], image["tokens"]) == ([10, 10], 101)
    assert [(stage["at"], stage["tokens"]) for stage in image["stages"]] == [(1, 81), (3, 71), (5, 63)]
    assert all(len(stage["keeper"]) == 100 for stage in image["stages"])


def answers_of(agrees):
    kl = torch.arange(float(len(agrees)))
    ones = torch.ones(len(agrees), 1)
    return Answers(ones, ones, Fidelity(kl, torch.tensor(agrees)), ["only"])


@pytest.mark.parametrize(
    ("agrees", "shown"),
    [
        ([True, False, True], [1, 0, 2]),
        ([True] * 5, [0, 1, 2, 3]),
        ([False] * 5, [4, 3, 2, 1]),
        ([False] * 4 + [True] * 4, [3, 2, 4, 5]),
        ([False] * 4 + [True], [3, 2, 1, 4]),
    ],
)
def test_images_that_changed_come_first_and_leave_room_for_others(agrees, shown):
    assert choose(answers_of(agrees), most=4) == shown


def test_names_that_are_no_text_and_images_that_cannot_be_read(small_vit, make_plan, tmp_path):
    folder = tmp_path / "images"
    write_images(folder, 3)
    (folder / "a" / "000.jpg").rename(folder / "a" / "caf\udce9<b>.jpg")
    (folder / "b" / "001.jpg").write_bytes(b"nothing")
    skipped = write_report(tmp_path / "out.html", make_plan(), small_vit, folder, progress=False)
    assert skipped == ["b/001.jpg (not an image, or empty)"]
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Not read: b/001.jpg (not an image, or empty)." in text
    assert r"a/caf\udce9&lt;b&gt;.jpg" in text


def test_plan_report_is_the_same_and_warns_of_images_that_cannot_be_read(small_vit, make_plan, tmp_path):
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "b" / "001.jpg").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"left out 1 images that cannot be read: b/001.jpg \(not an image"):
        make_plan().report(tmp_path / "out.html", small_vit, tmp_path / "images", progress=False)
    assert (tmp_path / "out.html").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("out.txt", DocumentError, r"out.txt; expected a name that ends in .html"),
        ("missing/out.html", DocumentError, "there is no such folder"),
        ("folder.html", DocumentError, "or it is one"),
    ],
)
def test_a_place_that_cannot_be_written(make_plan, tmp_path, name, error, message):
    """Noticed before the model is touched."""
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(error, match=message):
        write_report(tmp_path / name, make_plan(), None, None)


def test_a_disk_that_is_full(small_vit, make_plan, pixels, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "replacing", full)
    with pytest.raises(DocumentError, match=r"cannot write the report .*: No space left on device; choose another"):
        write_report(tmp_path / "out.html", make_plan(), small_vit, pixels, progress=False)


@pytest.mark.parametrize("missing", ["altair", "jinja2", "vl_convert"])
def test_without_its_packages(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ArgumentError, match=rf"a report needs {missing}; pip install 'vwt\[report\]'$"):
        check_report("out.html")
    check_report(None)


def test_a_plan_for_another_model(make_plan, pixels, tmp_path):
    other = timm.create_model("test_vit2", num_classes=10).eval()
    with pytest.raises(MismatchError, match="the plan was tuned for model"):
        write_report(tmp_path / "out.html", make_plan(), other, pixels)
    assert not (tmp_path / "out.html").exists()


def test_images_that_do_not_fit(small_vit, make_plan, tmp_path):
    with pytest.raises(ImageError):
        write_report(tmp_path / "out.html", make_plan(), small_vit, torch.zeros(2, 1, 160, 160).byte())
    with pytest.raises(DataError, match="no images"):
        write_report(tmp_path / "out.html", make_plan(), small_vit, torch.zeros(0, 3, 160, 160))
