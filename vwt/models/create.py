"""Models by name."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.models import load_checkpoint
from torch import nn

from vwt.errors import ModelError, first_line


def create_model(
    name: str, checkpoint: str | os.PathLike[str] | None = None, *, weights: bool = True, **options: Any
) -> nn.Module:
    """A timm model in eval mode, with its pretrained weights or those of a checkpoint file.

    Args:
        name: as `timm.create_model` takes it.
        checkpoint: a file of weights; None fetches the pretrained ones from the hub, or its cache.
        weights: False for random weights where none are needed.
        options: as `timm.create_model` takes them; positions are resampled for another `img_size`.

    Raises:
        ModelError: if the model is unknown, or its weights are out of reach.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ModelError(f"no checkpoint file at {checkpoint}")
    try:
        with quiet("huggingface_hub", "timm"):  # which log each attempt; what went wrong is said below
            model = timm.create_model(name, pretrained=weights and checkpoint is None, **options).eval()
            if checkpoint is not None:
                adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
                load_checkpoint(model, os.fspath(checkpoint), filter_fn=adapt)
            return model
    # timm, huggingface_hub, safetensors and torch each raise errors of their own.
    except Exception as error:
        detail = first_line(error)
        if not timm.is_model(name.split("/")[-1].split(".")[0]) and "/" not in name:
            raise ModelError(f"timm {timm.__version__} has no model {name!r}; see timm.list_models()") from error
        if checkpoint is not None:
            raise ModelError(f"{checkpoint} holds no weights for {name}: {detail}") from error
        if not weights:
            raise ModelError(f"timm {timm.__version__} cannot make {name}: {detail}") from error
        raise ModelError(
            f"no pretrained weights for {name}: {detail} Give a file of weights (--checkpoint), or see that the hub "
            "is in reach"
        ) from error


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hold back the warnings of other libraries' loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
