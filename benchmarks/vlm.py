r"""Prefill of vision-language models that read fewer image tokens, against the full model and the limit.

    python benchmarks/vlm.py [--threads 2] [--prompts 2] [--text-tokens 64]
    python benchmarks/vlm.py --model FOLDER --data IMAGES --prompt "USER: <image>\nWhat is shown? ASSISTANT:"

Without --model a small LLaVA with random weights: a CLIP tower of 576 patches and a Llama, whose sizes are in the
proportion of LLaVA-1.5-7B. Its latency is that of trained weights; its answers mean nothing, so that their KL is left
out. --model is a folder with weights and processor, as `save_pretrained` writes it, of a class that vwt supports.

Prefill is one forward pass of a prompt with its image, with a cache, up to the logits of the next token: what
`generate` does first. Every variant runs on every prompt, in turn in one process. `tokens` are the image tokens that
the language model reads, `tower_ms` what encodes the image. The limit of what is reduced after the tower is the model
itself on a prompt with so many image tokens, after embedding, blocks that are read, and projector; `efficiency` is
limit / actual. Ratios are medians over prompts of the ratio of the medians over runs. `kl` is that of the next token's
distribution from the full model's, the mean over prompts, and `agreement` how often both have the same first choice.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import PRECISIONS, place, positive
from PIL import Image
from results import Row, print_table, ratio, results_paths, save_results, spread
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vwt import Absorb, IntraImage, Merge, Neighbours, Prune, VWTokenizer
from vwt.cli import run_script
from vwt.errors import ArgumentError, DataError, first_line
from vwt.measure.environment import hardware
from vwt.measure.timing import Calls, interleave
from vwt.tuning.calibration import compare
from vwt.tuning.prompts import next_logits, prefill

COLUMNS = {
    "name": "", "tokens": ".0f", "ms": ".1f", "ms_q1": ".1f", "ms_q3": ".1f", "ratio": ".3f", "tower_ms": ".1f",
    "limit_ms": ".1f", "efficiency": ".3f", "kl": ".4f", "agreement": ".3f",
}  # fmt: skip
# The small model.
TOWER: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 336,
    "patch_size": 14,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
IMAGE = 31999  # its placeholder
FILES = (".jpg", ".jpeg", ".png", ".webp")

Inputs = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--model", metavar="FOLDER", help="weights and processor; by default a small random LLaVA")
    parser.add_argument("--data", type=Path, help="folder of images, for --model")
    parser.add_argument("--prompt", help="with the placeholder of one image, for --model")
    parser.add_argument("--prompts", type=positive, default=2, metavar="N", help="how many, with an image each")
    parser.add_argument("--text-tokens", type=positive, default=64, metavar="N", help="of the small model's prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, metavar="N", help="by default as many as torch takes")
    parser.add_argument("--precision", choices=[name for name in PRECISIONS if "amp" not in name], default="float32")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="variants with one of these in their names")
    parser.add_argument("--runs", type=positive, default=10, metavar="N", help="how often each is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results-file", type=Path, metavar="NAME", help="writes NAME.json and NAME.csv")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    paths, device = results_paths(arguments.results_file), harness.open_device(arguments)
    torch.manual_seed(arguments.seed)
    model, prompts = load(arguments) if arguments.model else make_small(arguments)
    model = place(model, device, arguments.precision)
    prompts = [{name: value.to(device) for name, value in prompt.items()} for prompt in prompts]
    header = {"hardware": hardware(device, arguments.precision), "arguments": vars(arguments)}
    print(f"{header['hardware']}\n{type(model).__name__}, {len(prompts)} prompts")
    rows = measure(arguments, model, prompts, device)
    print_table("Prefill, milliseconds a prompt", rows, COLUMNS)
    save_results(paths, header, {"prefill": rows})


# -- what is measured --------------------------------------------------------------------------------------------------


def make_small(arguments: argparse.Namespace) -> tuple[Any, list[Inputs]]:
    """A small LLaVA with random weights, and prompts of random images and tokens."""
    tower: Any
    tower, text = CLIPVisionConfig(**TOWER), LlamaConfig(**TEXT, vocab_size=IMAGE + 1)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE))
    patches = (tower.image_size // tower.patch_size) ** 2
    ids = torch.randint(3, IMAGE, (arguments.prompts, arguments.text_tokens + patches))
    ids[:, 1 : 1 + patches] = IMAGE
    images = torch.randn(arguments.prompts, 1, 3, tower.image_size, tower.image_size)
    return model, [
        {"input_ids": own[None], "attention_mask": torch.ones_like(own[None]), "pixel_values": image}
        for own, image in zip(ids, images, strict=True)
    ]


def load(arguments: argparse.Namespace) -> tuple[Any, list[Inputs]]:
    """The model of a folder, and what its processor makes of the prompt with each image."""
    if arguments.data is None or arguments.prompt is None:
        raise ArgumentError("--model needs images and a prompt for its processor; give --data and --prompt")
    files = sorted(path for path in arguments.data.rglob("*") if path.suffix.lower() in FILES)[: arguments.prompts]
    if len(files) < arguments.prompts:
        raise DataError(f"{arguments.data} has {len(files)} images, --prompts are {arguments.prompts}")
    try:
        model = AutoModelForImageTextToText.from_pretrained(arguments.model, local_files_only=True)
        processor = AutoProcessor.from_pretrained(arguments.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{arguments.model} cannot be loaded: {first_line(error)}") from error
    prompt = arguments.prompt.replace("\\n", "\n")
    images = [Image.open(file).convert("RGB") for file in files]
    return model, [dict(processor(images=image, text=prompt, return_tensors="pt")) for image in images]


def make_variants(arguments: argparse.Namespace, model: Any) -> dict[str, VWTokenizer]:
    """Reduced models by name, the full one first."""
    middle = model.config.vision_config.num_hidden_layers // 2
    options: dict[str, dict[str, Any]] = {"full": {}}
    for reduction in (Absorb(0.25), Absorb(0.5), Absorb(0.75), Merge(0.5), Prune(0.5)):
        options[f"after={reduction}"] = {"after": reduction}
    options[f"{Absorb(0.5)} in block {middle}"] = {"schedule": {middle: Absorb(0.5)}}
    options["Neighbours(0.33)"] = {"strategy": Neighbours(0.33)}
    options["IntraImage(0.5)"] = {"strategy": IntraImage(0.5)}
    chosen = arguments.only or [""]
    names = ["full", *(name for name in options if name != "full" and any(text in name for text in chosen))]
    return {name: VWTokenizer(model, **options[name], check=False) for name in names}


def measure(arguments: argparse.Namespace, model: Any, prompts: list[Inputs], device: torch.device) -> list[Row]:
    """Rows of all variants."""
    variants = make_variants(arguments, model)
    calls, tokens, logits = [], {}, {}
    for name, fast in variants.items():
        cut = [fast.processor_inputs(**prompt) for prompt in prompts]
        tokens[name] = mean(count_images(model, prompt) for prompt in cut)
        logits[name] = torch.cat([next_logits(fast, prompt) for prompt in prompts])
        calls.append(make_calls(model, fast, prompts, [count_images(model, prompt) for prompt in cut]))
    progress = not arguments.quiet
    seconds = interleave(calls, len(prompts), arguments.runs, device=device, seed=arguments.seed, progress=progress)
    timed = dict(zip(variants, seconds, strict=True))
    rows = []
    for name, own in timed.items():
        low, middle, high = spread(own["actual"])
        row: Row = {"name": name, "tokens": tokens[name], "ms": middle, "ms_q1": low, "ms_q3": high}
        row |= {"ratio": ratio(own["actual"], timed["full"]["actual"]), "tower_ms": spread(own["tower"])[1]}
        if "limit" in own:
            row |= {"limit_ms": spread(own["limit"])[1], "efficiency": ratio(own["limit"], own["actual"])}
        if arguments.model:
            fidelity = compare(logits["full"], logits[name])
            row |= {"kl": fidelity.mean_kl, "agreement": fidelity.agreement}
        rows.append(row)
    return rows


def make_calls(model: Any, fast: VWTokenizer, prompts: list[Inputs], counts: list[int]) -> Calls:
    """What is timed of a variant, each with the number of a prompt."""
    images = [{name: prompt[name] for name in ("pixel_values", "image_sizes") if name in prompt} for prompt in prompts]
    calls: Calls = {
        "actual": lambda item: prefill(fast, prompts[item]),
        "tower": lambda item: fast.get_image_features(**images[item]),
    }
    if fast.after is not None and isinstance(model, LlavaForConditionalGeneration):
        calls["limit"] = limit(model, prompts, counts)
    return calls


def limit(model: Any, prompts: list[Inputs], counts: list[int]) -> Callable[[int], Any]:
    """The model's own parts, where choosing the image tokens is free: the first ones are taken."""
    bare = VWTokenizer(model, check=False)
    backbone, layer = bare.backbone, model.config.vision_feature_layer
    blocks = layer % (backbone.depth + 1)
    cut = []
    for prompt, count in zip(prompts, counts, strict=True):
        ids = prompt["input_ids"][0]
        kept = (ids != model.config.image_token_id) | ((ids == model.config.image_token_id).cumsum(0) <= count)
        cut.append({"input_ids": ids[kept][None], "attention_mask": prompt["attention_mask"][:, kept]})

    def call(item: int) -> Any:
        packed, _ = backbone.pack_all(prompts[item]["pixel_values"])
        packed, _ = backbone.run(backbone.pre_norm(packed), stop=blocks)
        left = packed.dense()[:, backbone.prefix : backbone.prefix + counts[item]]
        features: Any = list(model.model.multi_modal_projector(left))
        output = BaseModelOutputWithPooling(pooler_output=features)
        return prefill(model, {**cut[item], "mm_encoder_outputs": {"image": output}})

    return call


def count_images(model: Any, inputs: Inputs) -> int:
    """Image tokens of prompts."""
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


def mean(values: Any) -> float:
    """Of numbers."""
    return float(torch.tensor(list(values), dtype=torch.float64).mean())


main = partial(run_script, "vlm", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
