import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from huggingface_hub import constants

from tests.codebook.test_codebook import assert_same, codebook
from tests.hub_server import TOKEN, serve
from tests.matrix import matrix
from tests.tuning.test_calibration import codebook_of, make_images
from tests.tuning.test_plan import POINT, make_model, make_plan
from tests.tuning.test_profile import make_profile
from vwt import Codebook, InterImage, LatencyProfile, Plan, VWTokenizer
from vwt.cli import main
from vwt.codebook.codebook import pin
from vwt.errors import ArgumentError, CodebookError, DocumentError, HubError, MismatchError

FILE = "{repo_id}/resolve/{revision}/{filename}"
ABSENT = "vwt: the hub has no repository user/absent, or it is private"


@pytest.fixture(scope="module")
def server():
    with serve() as (own, address):
        own.address = address
        yield own


@pytest.fixture(autouse=True)
def hub(server, tmp_path, monkeypatch):
    """The server as the hub, with its owner logged in and an empty cache."""
    server.commits.clear(), server.private.clear(), server.requests.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.address}/{FILE}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def repository_of(book, folder, **config):
    """A folder that is laid out like a repository."""
    folder.mkdir()
    book.save(folder / "codebook.zarr")
    (folder / "config.json").write_text(json.dumps({"vwt": "codebook", **config}))
    return folder


# -- codebooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "space"),
    matrix(
        product(["user/words", "hf-hub:user/words"], ["pixel", "embedding"]),
        ("user/words", "pixel"),
        ("hf-hub:user/words", "embedding"),
    ),
)
def test_a_codebook_there_and_back(hub, name, space):
    book = codebook(space, **({"mean": (0.0,) * 3, "std": (1.0,) * 3} if space == "pixel" else {}))
    address = book.push_to_hub(name)
    assert address.startswith(f"{hub.address}/user/words/commit/")
    assert_same(Codebook.from_pretrained(name), book)
    assert_same(Codebook.load("hf-hub:user/words"), book)
    assert sorted(path.partition("/")[0] for path in hub.files("user/words")) == sorted(
        ["README.md", "config.json", *["codebook.zarr"] * (len(hub.files("user/words")) - 2)]
    )
    assert any("vwt/" in agent for _, _, agent in hub.requests)


def test_the_card_is_made_of_the_provenance(hub):
    codebook("embedding", provenance={"model": "vit", "data set": {"name": "a|b\nc", "images": 3}}).push_to_hub(
        "user/w"
    )
    card = hub.files("user/w")["README.md"].decode()
    head, body = card.split("---\n")[1:]
    assert "library_name: vwt\n" in head
    assert "- vwt-codebook\n" in head
    assert "- embedding\n" in head
    assert body.startswith("\n# w\n\n5 visual words in embedding space, for vit.")
    assert 'codebook = vwt.Codebook.from_pretrained("user/w")' in body
    assert "| data set: name | a\\|b c |\n| data set: images | 3 |" in body
    assert json.loads(hub.files("user/w")["config.json"])["vwt"] == "codebook"


def test_pushing_again_replaces_it_and_old_commits_stay(hub):
    first, second = codebook(seed=1), codebook(seed=2, size=9)
    commit = first.push_to_hub("user/words").rpartition("/")[2]
    hub.commits["user/words"][commit]["codebook.zarr/stale"] = b"of the first"
    second.push_to_hub("user/words")
    assert "codebook.zarr/stale" not in hub.files("user/words")
    assert_same(Codebook.from_pretrained("user/words"), second)
    assert_same(Codebook.from_pretrained("user/words", revision=commit), first)
    assert_same(Codebook.from_pretrained(f"hf-hub:user/words@{commit}"), first)


def test_only_what_is_needed_is_downloaded(hub, tmp_path):
    codebook().push_to_hub("user/words")
    hub.add("user/words", {**hub.files("user/words"), "model.bin": b"x", "code.py": b"raise SystemExit"})
    Codebook.from_pretrained("user/words")
    assert not {"model.bin", "code.py", "README.md"} & {file.name for file in (tmp_path / "cache").rglob("*")}


def test_the_cache_serves_offline(hub, offline):
    book = codebook()
    book.push_to_hub("user/words")
    Codebook.from_pretrained("user/words")
    hub.requests.clear()
    offline()
    assert_same(Codebook.from_pretrained("user/words"), book)
    assert hub.requests == []
    with pytest.raises(HubError, match="user/other is not in the cache, and the hub is out of reach"):
        Codebook.from_pretrained("user/other")


def test_no_network(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="user/words is not in the cache, and the hub is out of reach") as error:
        Codebook.from_pretrained("user/words")
    assert "\n" not in str(error.value)
    with pytest.raises(HubError, match="cannot reach user/words on the hub") as error:
        codebook().push_to_hub("user/words")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_that_is_laid_out_like_a_repository(tmp_path, prefix, offline):
    offline()
    folder = repository_of(codebook(), tmp_path / "copy")
    assert_same(Codebook.from_pretrained(f"{prefix}{folder}"), codebook())


def test_a_codebook_for_another_model_is_refused(small_vit):
    codebook(size=9).push_to_hub("user/words")
    with pytest.raises(MismatchError):
        VWTokenizer(small_vit, InterImage(Codebook.from_pretrained("user/words")))


@pytest.mark.parametrize("revision", ["v2", "0" * 40])
def test_a_revision_that_there_is_not(revision):
    codebook().push_to_hub("user/words")
    with pytest.raises(HubError, match=f"no revision user/words@{revision}; expected a branch, tag or commit"):
        Codebook.from_pretrained("user/words", revision=revision)


def test_a_private_repository(hub, monkeypatch):
    codebook().push_to_hub("user/words", private=True)
    assert hub.private["user/words"]
    assert_same(Codebook.from_pretrained("user/words"), codebook())
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-of-somebody-else")
    with pytest.raises(HubError, match="has no repository user/words, or it is private; check its name, or log in"):
        Codebook.from_pretrained("user/words")
    with pytest.raises(HubError, match="user/words"):
        codebook().push_to_hub("user/words")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/absent", "the hub has no repository user/absent, or it is private"),
        ("absent", "no folder and no repository 'absent'; expected user/name"),
        ("user/../x", "no folder and no repository 'user/../x'"),
        ("hf-hub:", "no folder and no repository ''"),
        ("user/a--b", "no name of a repository; expected user/name"),
        ("local-dir:absent", "no folder absent; expected the copy of a repository with a codebook"),
    ],
)
def test_names_of_nothing(name, message):
    with pytest.raises(HubError) as error:
        Codebook.from_pretrained(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["words", "user/a--b", "a/b/c", ""])
def test_names_that_nothing_can_be_pushed_to(name):
    with pytest.raises(HubError, match="is no name of a repository; expected user/name"):
        codebook().push_to_hub(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{"vwt": "plan"}', "user/it holds a plan of vwt; expected a codebook"),
        (b'{"architectures": ["ViT"]}', "user/it holds something else; expected a codebook"),
        (b'{"vwt": ["codebook"]}', "user/it holds something else; expected a codebook"),
        (b"[]", "user/it holds something else; expected a codebook"),
        (b"{", "user/it holds no codebook of vwt: it has no readable config.json"),
        (None, "user/it holds no codebook of vwt: it has no readable config.json"),
    ],
)
def test_a_repository_of_another_kind(hub, config, message):
    hub.add("user/it", {"weights": b"1"} | ({} if config is None else {"config.json": config}))
    with pytest.raises(HubError) as error:
        Codebook.from_pretrained("user/it")
    assert message in str(error.value)


@pytest.mark.parametrize("damage", ["altered", "missing", "none"])
def test_a_damaged_codebook(hub, tmp_path, damage):
    codebook().push_to_hub("user/words")
    files = dict(hub.files("user/words"))
    chunk = next(name for name in files if name.startswith("codebook.zarr/words/c/"))
    if damage == "altered":
        files[chunk] = files[chunk][:-9] + b"\0" * 9
    kept = {name for name in files if damage != "none" or not name.startswith("codebook.zarr")}
    hub.add("user/words", {name: files[name] for name in kept - ({chunk} if damage == "missing" else set())})
    with pytest.raises(CodebookError) as error:
        Codebook.from_pretrained("user/words")
    assert "\n" not in str(error.value)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_there_and_back(hub, tmp_path):
    picture = tmp_path / "front.png"
    picture.write_bytes(b"a picture")
    plan = make_plan()
    plan.push_to_hub("user/plan", profile=make_profile(), files=[picture])
    assert Plan.from_pretrained("user/plan") == plan
    assert Plan.load("hf-hub:user/plan") == plan
    assert LatencyProfile.load("hf-hub:user/plan") == make_profile()
    assert hub.files("user/plan")["front.png"] == b"a picture"
    card = hub.files("user/plan")["README.md"].decode()
    assert "![front.png](front.png)" in card
    assert str(plan) in card
    assert "| goal: ratio | 0.75 |" in card


def inter(path):
    return replace(POINT, strategy={"name": "InterImage", "codebook": str(path), "threshold": 0.1})


@torch.inference_mode()
def test_a_plan_goes_with_its_codebooks(hub, tmp_path):
    images = make_images(3)
    path = tmp_path / "words.zarr"
    codebook_of(images).save(path)
    local = repository_of(codebook_of(images), tmp_path / "copy")
    plan = make_plan(chosen=inter(path), front=[POINT, inter(path), inter(f"local-dir:{local}")])
    plan.push_to_hub("user/plan")
    assert str(tmp_path) not in "".join(map(repr, hub.files("user/plan").values()))
    loaded = Plan.from_pretrained("user/plan")
    assert {name.partition("/")[0] for name in hub.files("user/plan") if "codebook" in name} == {
        "codebook-0.zarr",
        "codebook-1.zarr",
    }
    model = make_model()
    assert torch.equal(loaded.apply(model)(images), plan.apply(model)(images))


def test_a_plan_names_codebooks_of_the_hub_by_their_commit(hub, tmp_path):
    commit = codebook_of(make_images(3)).push_to_hub("user/words").rpartition("/")[2]
    name = pin("hf-hub:user/words")
    assert name == f"hf-hub:user/words@{commit}"
    folder = repository_of(codebook(), tmp_path / "copy")
    assert pin(f"local-dir:{folder}") == f"local-dir:{folder}"
    make_plan(chosen=inter(name)).push_to_hub("user/plan")
    assert Plan.from_pretrained("user/plan").chosen.strategy["codebook"] == name


PATHS = ["/etc/words.zarr", "../words.zarr", "s3://bucket/words.zarr", "local-dir:/etc", "codebook-0.zarr/.."]


@pytest.mark.parametrize("path", PATHS)
def test_a_plan_that_names_a_codebook_elsewhere_is_refused(hub, tmp_path, path):
    make_plan(chosen=inter(path)).save(tmp_path / "plan.json")
    hub.add("user/plan", {"config.json": b'{"vwt": "plan"}', "plan.json": (tmp_path / "plan.json").read_bytes()})
    with pytest.raises(DocumentError, match="outside its repository"):
        Plan.from_pretrained("user/plan")


def test_a_repository_without_what_it_says(hub):
    hub.add("user/plan", {"config.json": b'{"vwt": "plan"}'})
    with pytest.raises(DocumentError, match="cannot read the plan"):
        Plan.from_pretrained("user/plan")
    with pytest.raises(DocumentError, match="cannot read the profile"):
        LatencyProfile.load("hf-hub:user/plan")
    with pytest.raises(HubError, match="holds a plan of vwt; expected a codebook"):
        Codebook.from_pretrained("user/plan")


@pytest.mark.parametrize("name", ["absent.png", "plan.json"])
def test_files_that_are_no_report_or_picture(tmp_path, name):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ArgumentError, match="no report or picture: "):
        make_plan().push_to_hub("user/plan", files=[tmp_path / name])


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "hf-hub:user/absent"], ABSENT),
        (["--strategy", "inter:hf-hub:user/absent"], ABSENT),
        (
            ["--strategy", "inter:hf-hub:user/absent:0.1"],
            "vwt: the hub has no repository user/absent, or it is private",
        ),
    ],
)
def test_commands_take_repositories(capsys, tmp_path, options, message):
    (tmp_path / "image.png").write_bytes(b"")
    status = main(
        ["show", str(tmp_path / "image.png"), *options, "--model", "test_vit", "--out", str(tmp_path / "o.png")]
    )
    assert status == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.slow
def test_the_environment_says_where_the_hub_is(hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when huggingface_hub is imported."""
    code = "import vwt, sys; print(len(vwt.Codebook.from_pretrained('user/words')))"
    codebook(size=9).push_to_hub("user/words")
    known = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):
        hub.requests.clear()
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**known, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout == "9\n"
        assert bool(hub.requests) == (offline == "0")
