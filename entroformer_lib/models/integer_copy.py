"""Copies of the entropy model's parts that compute in integers: each layer is replaced by its like."""

import copy

from torch import nn

from entroformer_lib.models.attention import Block
from entroformer_lib.models.groupedmixer import MixerPair
from entroformer_lib.models.integer_layers import (
    IntegerAttention,
    IntegerConv3x3,
    IntegerGELU,
    IntegerLayerNorm,
    IntegerLinear,
    IntegerPosition,
)
from entroformer_lib.models.integer_mixers import IntegerCross, IntegerTopK, IntegerWindow, integer_inner
from entroformer_lib.models.position import RelativePosition


def integer_copy(part: nn.Module | None) -> nn.Module | None:
    """A copy of h_s, a context model or the entropy parameters whose layers all compute in digits.

    Raises:
        ValueError: weights that are not finite numbers.
    """
    if part is None:
        return None
    if not all(parameter.isfinite().all() for parameter in part.parameters()):
        raise ValueError("the entropy model has weights that are not finite numbers")
    return _replaced(copy.deepcopy(part).eval().float().requires_grad_(False))


FINISHED = (IntegerAttention, IntegerCross, IntegerTopK, IntegerWindow)


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return IntegerLinear(module.weight, module.bias)
    if isinstance(module, nn.LayerNorm):
        return IntegerLayerNorm(module)
    if isinstance(module, nn.Conv2d):
        return IntegerConv3x3(module)
    if isinstance(module, RelativePosition):
        return IntegerPosition(module)
    if isinstance(module, nn.GELU):
        return IntegerGELU()
    if isinstance(module, Block):
        module.attention = IntegerAttention(module.attention, module.norm1)
    if isinstance(module, MixerPair):
        module.inner = None if module.inner is None else integer_inner(module.inner, module.norm1)
        module.cross = None if module.cross is None else IntegerCross(module.cross, module.norm2)
    for name, child in module.named_children():
        if not isinstance(child, FINISHED):
            setattr(module, name, _replaced(child))
    return module
