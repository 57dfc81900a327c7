import finetune
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.test_datasets import write_images


@pytest.fixture
def arguments(tmp_path):
    write_images(tmp_path / "images", 12)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    weights = ["--checkpoint", str(tmp_path / "weights.safetensors")]
    return [str(tmp_path / "images"), "--model", "test_vit", *weights, "--batch-size", "3", "--epochs", "1", "--quiet"]


def test_a_row_for_the_full_model_and_each_reduced_one(arguments, capsys, monkeypatch):
    monkeypatch.setattr(finetune.vwt, "Absorb", lambda count: finetune.vwt.Prune(count // 4))
    assert finetune.main(arguments) == 0
    first, header, _, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("classes")
    assert header == "| model | step, ms | ratio | accuracy before | after |"
    assert [row.split(" | ")[0] for row in rows] == [
        "| full", "| Neighbours(0.25)", "| {3: Absorb(60)}", "| Neighbours(0.25), {3: Absorb(60)}"
    ]  # fmt: skip
    assert rows[0].split(" | ")[2] == "1.00"
    assert all(row.count(" % |") == 2 for row in rows)


def test_too_few_images(arguments, capsys):
    assert finetune.main([*arguments, "--batch-size", "64"]) == 2
    assert "do not fill a batch of 64" in capsys.readouterr().err


def test_no_folder(capsys, arguments):
    assert finetune.main(["nowhere", *arguments[1:]]) == 2
    assert capsys.readouterr().err.startswith("finetune: ")
