"""Which models can be wrapped, and why others cannot."""

from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import Any

import timm
import torch

from vwt.errors import ModelError, first_line
from vwt.models.backbone import Backbone
from vwt.models.create import quiet
from vwt.models.families import FAMILIES
from vwt.models.family import Abilities

INSTALL = "pip install 'vwt[hf]'"


@dataclass(frozen=True)
class Support:
    """Whether a model can be wrapped.

    Attributes:
        name: the model's.
        reason: why it cannot be; None if it can.
        facts: what there is to say of it, if it can.
    """

    name: str
    reason: str | None
    facts: str = ""

    def __str__(self) -> str:
        return f"{self.name}: " + (f"supported, {self.facts}" if self.reason is None else f"no. {self.reason}")


def find_support(name: str, **options: Any) -> Support:
    """Whether a model of timm, or of a class of transformers, can be wrapped.

    Neither weights nor memory are needed to say so. A model of timm is made with options as `timm.create_model` takes
    them.

    Raises:
        ModelError: if there is no such model, or it cannot be made without memory.
    """
    kind, _, tag = name.partition(".")
    if not timm.is_model(kind):
        return _find_class_support(name)
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # whatever a model does when it is made
        if tag and "pretrained tag" in str(error):
            raise ModelError(
                f"timm {timm.__version__} has no weights {name!r}; see timm.list_pretrained('{kind}.*')"
            ) from error
        if options:
            given = ", ".join(f"{option}={value!r}" for option, value in options.items())
            raise ModelError(f"timm {timm.__version__} cannot make {name} with {given}: {first_line(error)}") from error
        raise ModelError(
            f"{name} cannot be made on the meta device: {first_line(error)}; wrap it to see whether that works"
        ) from error
    try:
        backbone = Backbone(model)
    except ModelError as error:
        return Support(name, str(error))
    _, height, width = backbone.input_shape
    facts = (
        f"{type(model).__name__}: {backbone.depth} blocks, {backbone.prefix} prefix tokens, {backbone.patches} patches "
        f"of {height}x{width} pixels"
    )
    if not backbone.merges_positions:
        facts += "; only strategies that keep patches in their places, and no schedule"
    return Support(name, None, facts)


def _find_class_support(name: str) -> Support:
    """The same for a class of transformers."""
    unknown = f"timm {timm.__version__} has no model {name!r}; see timm.list_models()"
    hf = _transformers()
    if hf is None:
        raise ModelError(f"{unknown}; to ask for a class of transformers, {INSTALL}")
    with quiet("torch.utils._pytree"):  # where transformers imports torchao
        kind = hf.find_class(name)
    if kind is None:
        raise ModelError(f"{unknown}; nor has transformers a class of models of that name")
    known = hf.describe().get(kind)
    if known is not None:
        about, abilities = known
        return Support(name, None, about + ("" if abilities.tune is True else f"; tuned {abilities.tune}"))
    return Support(name, hf.unsupported(kind))


def _transformers() -> ModuleType | None:
    """The adapters of transformers' models, where it is installed."""
    try:
        with quiet("torch.utils._pytree"):  # where transformers imports torchao
            return import_module("vwt.models.hf")
    except ImportError:
        return None


def list_families() -> str:
    """The classes of models that can be wrapped, and what can be done with each, as a table in Markdown."""
    rows = [_row("timm", family.MODEL, family.ABOUT, family.ABILITIES) for family in FAMILIES]
    hf = _transformers()
    if hf is None:
        rows.append(["transformers", f"some of its models too: {INSTALL}", *[""] * len(fields(Abilities))])
    else:
        rows += [_row("transformers", kind, *known) for kind, known in hf.describe().items()]
    head = ["class", "for example", *(field.name for field in fields(Abilities))]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _row(library: str, kind: type, about: str, abilities: Abilities) -> list[str]:
    values = [getattr(abilities, field.name) for field in fields(abilities)]
    return [f"{library} {kind.__name__}", about, *({True: "yes", False: "no"}.get(value, value) for value in values)]
