"""Hooks of blocks that are run in two halves, and so are not called themselves."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_OF_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(block: nn.Module) -> bool:
    """Whether anything was registered that is called with the block."""
    return any(getattr(block, name) for name in _OF_MODULES)


def with_hooks(block: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of tokens in the place of a block's forward pass, with the hooks of the block around it.

    The block is not changed: torch calls the hooks of a shallow copy, which are handed the block itself.
    """
    if not has_hooks(block):
        return forward
    shallow: Any = copy.copy(block)
    shallow.forward, shallow._compiled_call_impl = forward, None
    for name in _OF_MODULES:
        hooks = getattr(block, name).items()
        setattr(shallow, name, OrderedDict((key, _handing(block, hook)) for key, hook in hooks))
    return shallow


def _handing(block: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *arguments: hook(block, *arguments)
