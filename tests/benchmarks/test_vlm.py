"""The benchmark of vision-language models, on small ones."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed; pip install vwt[hf]")

import vlm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TOWER = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK = ["--runs", "1", "--quiet", "--results-file", "out"]


def make_folder(folder):
    """A model with weights and processor, as `save_pretrained` writes them."""
    words = ["<pad>", "<unk>", "<image>", "USER:", "what", "ASSISTANT:"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 64, "width": 64}
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size)
    LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, vocab_size=len(words), pad_token_id=0, bos_token_id=None, eos_token_id=None),
        image_token_id=words.index("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def test_small_model(run, monkeypatch):
    monkeypatch.setattr(vlm, "TOWER", TOWER)
    monkeypatch.setattr(vlm, "TEXT", TEXT)
    status, out, _ = run(vlm.main, [*QUICK, "--prompts", "1", "--text-tokens", "5"])
    assert status == 0
    rows = {row["name"]: row for row in json.loads(Path("out.json").read_text())["tables"]["prefill"]}
    tokens = {name: row["tokens"] for name, row in rows.items()}
    assert tokens["full"] == 16
    assert tokens["after=Absorb(0.25)"] == 12
    assert tokens["after=Absorb(0.5)"] == tokens["Absorb(0.5) in block 1"] == tokens["IntraImage(0.5)"] == 8
    assert all(("limit_ms" in row) == name.startswith("after=") for name, row in rows.items())
    assert rows["full"]["ratio"] == 1
    assert not any("kl" in row for row in rows.values())
    assert "Prefill, milliseconds a prompt" in out


def test_weights_and_processor(run):
    make_folder("llava")
    options = ["--model", "llava", "--data", "images", "--prompt", r"USER: <image>\n what ASSISTANT:"]
    status, _, _ = run(vlm.main, [*QUICK, *options, "--only", "after=Absorb(0.5)", "Merge"])
    assert status == 0
    rows = json.loads(Path("out.json").read_text())["tables"]["prefill"]
    assert [row["name"] for row in rows] == ["full", "after=Absorb(0.5)", "after=Merge(0.5)"]
    assert [row["tokens"] for row in rows] == [16, 8, 8]
    assert (rows[0]["kl"], rows[0]["agreement"]) == (0, 1)
    assert all(row["kl"] > 0 for row in rows[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "--model needs images and a prompt for its processor; give --data and --prompt"),
        (["--model", "nowhere", "--data", "images", "--prompt", "<image>"], "nowhere cannot be loaded: "),
        (["--model", "nowhere", "--data", "empty", "--prompt", "<image>"], "empty has 0 images, --prompts are 2"),
        (["--results-file", "file/out"], "--results-file"),
    ],
)
def test_errors_are_one_line(run, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else a network is asked again and again
    status, _, err = run(vlm.main, options)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("vlm: ")
    assert message in err
