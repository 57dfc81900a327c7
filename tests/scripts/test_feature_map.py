"""The feature map: the script that draws it, and the worked example of the guide."""

import re
import runpy
from pathlib import Path

import feature_map
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "feature_maps.md"


@pytest.fixture
def small(tmp_path):
    """Options for a model of 160 x 160 pixels with random weights."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    return ["--model", "test_vit", "--checkpoint", str(tmp_path / "weights.safetensors"), "--block", "3"]


def draw(arguments, out):
    assert feature_map.main([*arguments, "--out", str(out)]) == 0
    return torch.from_numpy(np.array(Image.open(out)))


def test_scene_full_and_reduced(small, tmp_path, capsys):
    pixels = draw(small, tmp_path / "new" / "map.png")
    out = capsys.readouterr().out
    assert "100 patches, 75 tokens leave the last block\n" in out
    assert re.search(r"mean 0\.\d{3}, 5 % quantile -?0\.\d{3}\n", out)
    scene, full, reduced = pixels.split(feature_map.SIZE, dim=1)
    assert scene.shape == full.shape == reduced.shape == (feature_map.SIZE, feature_map.SIZE, 3)
    drawn = feature_map.draw_scene(160, 160).permute(1, 2, 0)
    assert torch.equal(scene.unique(), drawn.unique())
    assert len(full.flatten(0, 1).unique(dim=0)) <= 100
    assert len(reduced.flatten(0, 1).unique(dim=0)) <= 75
    assert torch.equal(draw(small, tmp_path / "again.png"), pixels)


def test_photograph(small, tmp_path):
    Image.new("L", (200, 300), 70).save(tmp_path / "grey.png")
    pixels = draw([*small, "--image", str(tmp_path / "grey.png")], tmp_path / "map.png")
    assert pixels[:, : feature_map.SIZE].unique().tolist() == [70]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "missing.jpg"], "cannot read missing.jpg"),
        (["--block", "6"], "block 6"),
        (["--share", "3"], "Merge"),
        (["--checkpoint", "missing.safetensors"], "no checkpoint file"),
        (["--out", "map.txt"], "cannot write map.txt: .*; choose another --out"),
        (["--colour", "red"], "unrecognized"),
    ],
)
def test_errors_are_one_line(small, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = feature_map.main([*small, *options])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1)
    assert re.match(f"feature_map: .*{message}", err)


def test_picture_of_the_guide(shared, tmp_path):
    """It is what the script draws of its own scene, and small."""
    picture = ROOT / "docs" / "feature_map.png"
    assert picture.stat().st_size < 150_000
    assert "feature_map.png" in PAGE.read_text()
    checkpoint = shared / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    drawn = draw(["--checkpoint", str(checkpoint)], tmp_path / "map.png")
    kept = torch.from_numpy(np.array(Image.open(picture)))
    assert (drawn.int() - kept.int()).abs().float().mean() < 2


@pytest.mark.slow
def test_example_of_the_guide(vit_tiny, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "def segment" in block)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: vit_tiny)
    torch.manual_seed(0)
    (tmp_path / "example.py").write_text(example)
    runpy.run_path(str(tmp_path / "example.py"))
    found = dict(re.findall(r"(\w+) IoU (\S+)", capsys.readouterr().out))
    assert float(found["full"]) > 0.8
    assert abs(float(found["reduced"]) - float(found["full"])) < 0.05
