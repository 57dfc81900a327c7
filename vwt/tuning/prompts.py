"""Tuning of vision-language models: how many image tokens the language model must read, on prompts that are given."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from vwt.errors import ArgumentError
from vwt.measure.environment import describe_machine
from vwt.measure.timing import measure_batches
from vwt.models.layers import blocks_read
from vwt.models.spec import PatchSpec
from vwt.progress import Steps, progress_bar
from vwt.reductions.absorb import Absorb
from vwt.reductions.kinds import KINDS
from vwt.reductions.reduction import Reduction
from vwt.tokenizer import VWTokenizer
from vwt.tuning.calibration import Fidelity, compare
from vwt.tuning.goal import choose
from vwt.tuning.plan import Plan, Point, front_of
from vwt.tuning.profile import LatencyProfile
from vwt.tuning.schedule import PruningSchedule

SHARES = (0.2, 0.4, 0.6, 0.8)  # of the image tokens that are removed


TIMED_PROMPTS = 4  # of which the prefill is timed


Prompt: TypeAlias = Mapping[str, Any]  # what a model's processor makes of images and texts: "input_ids" and others


class _Reduced(NamedTuple):
    """What reduces the image tokens, in the vision tower or after it."""

    schedule: PruningSchedule
    after: Reduction | None = None

    def wrap(self, model: nn.Module) -> VWTokenizer:
        return VWTokenizer(model, schedule=self.schedule, after=self.after, check=False)


def tune_on_prompts(
    model: nn.Module,
    prompts: Prompt | Sequence[Prompt],
    goal: Mapping[str, float],
    *,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Find how a vision-language model reads fewer image tokens, with the lowest KL of the next token's distribution.

    Tries each kind of reduction after the vision tower, and `Absorb` in a block a quarter, half and three quarters of
    the way through it, each with several shares. All are compared with the full model on all prompts. Kinds that leave
    as many tokens at the same place cost nearly the same, so that only the closest to the full model is timed. Latency
    is that of the prefill: one forward with a cache, up to the logits of the next token. The prefills of the first
    prompts run interleaved.

    Args:
        model: that reads image tokens in its prompt, in eval mode.
        prompts: what its processor makes of images and texts, on the model's device; each is a batch of its own, of one
            prompt or more.
        goal: see `vwt.tuning.goal.check_goal`.
        seed: of the order of measurements.
        progress: show progress bars.

    Raises:
        ArgumentError: for prompts that are none, or a goal that cannot be reached; says what can.
        ModelError: see `VWTokenizer`.
    """
    batches = _check_prompts(prompts)
    if model.training:
        raise ArgumentError("the model is in train mode; call .eval() first")
    whole, step = VWTokenizer(model), Steps(3, progress)
    step(f"asking the model itself for the next token of {len(batches)} prompts")
    target = _next_logits(whole, batches)
    closest: list[tuple[_Reduced, Fidelity]] = []
    step("reducing image tokens in one way after the other, and comparing the answers")
    for group in progress_bar(_candidates(whole), desc="reducing", unit="place", show=progress):
        compared = [(reduced, compare(target, _next_logits(reduced.wrap(model), batches))) for reduced in group]
        closest.append(min(compared, key=lambda pair: pair[1].mean_kl))
    calls = [partial(prefill, fast) for fast in (model, *(reduced.wrap(model) for reduced, _ in closest))]
    step(f"timing the {len(closest)} closest")
    timed = measure_batches(calls, batches[:TIMED_PROMPTS], device=target.device, seed=seed, progress=progress)
    points = [Point(None, PruningSchedule({}), timed[0].milliseconds, timed[0].ratio, 0.0, 1.0)]
    for (reduced, fidelity), own in zip(closest, timed[1:], strict=True):
        kl, agreement = fidelity.mean_kl, fidelity.agreement
        points.append(Point(None, reduced.schedule, own.milliseconds, own.ratio, kl, agreement, reduced.after))
    name, precision = PatchSpec.of(model).model, LatencyProfile.identify(model)["precision"]
    machine, size = describe_machine(target.device), len(batches[0]["input_ids"])
    return Plan(name, size, precision, machine, dict(goal), choose(points, goal), front_of(points))


def prefill(model: Callable[..., Any], prompt: Prompt) -> Any:
    """What `generate` does with a prompt first: a forward with a cache, and logits at the last position only."""
    return model(**prompt, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def next_logits(fast: VWTokenizer, prompt: Prompt) -> Tensor:
    """Logits (B, V) of the token after the last one of each prompt that is no padding."""
    inputs = fast.processor_inputs(**prompt)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    attended = torch.ones_like(ids) if mask is None else (mask != 0).long()
    last = (attended * torch.arange(ids.shape[1], device=ids.device)).amax(dim=1)
    positions, which = last.unique(return_inverse=True)
    logits = fast.model(**inputs, logits_to_keep=positions).logits
    return logits[torch.arange(len(ids), device=ids.device), which]


def _next_logits(fast: VWTokenizer, prompts: Sequence[Prompt]) -> Tensor:
    """Those of all prompts (n, V)."""
    return torch.cat([next_logits(fast, prompt) for prompt in prompts])


def _candidates(whole: VWTokenizer) -> list[list[_Reduced]]:
    """What is tried, in groups that leave the same number of tokens at the same place."""
    parent, patches = whole.family.parent, whole.backbone.patches
    assert parent is not None
    blocks = max(blocks_read(parent.layers, whole.backbone.depth))
    inside = sorted({blocks * quarters // 4 for quarters in (1, 2, 3)})
    if blocks == 0:  # what enters the first block is read, before anything can be reduced
        return []
    groups = []
    for share in SHARES:
        kinds = [kind(share) for kind in KINDS.values()]
        able = [what for what in kinds if 1 <= what.wanted(patches) <= what.most(patches)]
        groups.append([_Reduced(PruningSchedule({}), what) for what in able])
        if Absorb(share) in able:
            groups += [[_Reduced(PruningSchedule({block: Absorb(share)}))] for block in inside]
    return [group for group in groups if group]


def _check_prompts(prompts: object) -> list[dict[str, Any]]:
    """Prompts one by one, without labels; raises ArgumentError for what is none."""
    given = [prompts] if isinstance(prompts, Mapping) else prompts
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ArgumentError(
            f"prompts are {type(prompts).__name__}{'' if given else ', and empty'}; expected a list of what the "
            "model's processor makes, or one of these"
        )
    for index, prompt in enumerate(given):
        if not isinstance(prompt, Mapping):
            raise ArgumentError(
                f"prompt {index} is {type(prompt).__name__}; expected what the model's processor makes, with input_ids "
                "and pixel_values"
            )
        missing = [name for name in ("input_ids", "pixel_values") if not isinstance(prompt.get(name), Tensor)]
        if missing:
            raise ArgumentError(
                f"prompt {index} has no {' and no '.join(missing)}; give tensors of both, as the model's processor "
                "makes them of an image and a text with return_tensors='pt'"
            )
    return [{name: value for name, value in prompt.items() if name != "labels"} for prompt in given]
