"""The picture of what Absorb keeps: the script that draws it, and the picture of the docs."""

import re
from pathlib import Path

import absorbing
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path):
    """Options for a model of 160 x 160 pixels with random weights, and a grey picture."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    Image.new("L", (200, 300), 70).save(tmp_path / "grey.png")
    weights, picture = str(tmp_path / "weights.safetensors"), str(tmp_path / "grey.png")
    return ["--model", "test_vit", "--checkpoint", weights, "--image", picture]


@pytest.mark.parametrize("block", ["2", "3"])  # of 6: the root of the distance, and the distance
def test_picture_is_drawn(small, tmp_path, capsys, block):
    assert absorbing.main([*small, "--block", block, "--share", "0.4", "--out", str(tmp_path / "drawn.png")]) == 0
    assert capsys.readouterr().out == f"40 patches join 60 in block {block}\n{tmp_path / 'drawn.png'}\n"
    assert Image.open(tmp_path / "drawn.png").size == (720, 560)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "missing.jpg"], "cannot read missing.jpg"),
        (["--block", "6"], "block 6"),
        (["--share", "3.0"], "Absorb"),
        (["--out", "drawn.txt"], "cannot draw drawn.txt"),
    ],
)
def test_errors_are_one_line(small, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert absorbing.main([*small, *options]) == 2
    err = capsys.readouterr().err
    assert re.match(f"absorbing: .*{message}", err)
    assert err.count("\n") == 1


def test_picture_of_the_docs():
    assert (ROOT / "docs" / "absorbing.png").stat().st_size < 300_000
    assert "absorbing.png" in (ROOT / "docs" / "absorb.md").read_text()
