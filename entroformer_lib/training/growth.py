"""A larger model that begins as the smaller one (after Net2Net, Chen et al. 2016). The outputs are the same.

More channels or blocks in the transforms of blocks: what is new is computed from old and new, and nothing old reads it
yet. Those weights begin at zero, and the gradient moves them from the first step on.
"""

import torch
from torch import nn

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import TrainingError
from entroformer_lib.models.transforms import ConvBlock, WithLinearPath


def grown(model: Entroformer, fields: dict) -> Entroformer:
    """A model of another config with the same outputs.

    Args:
        fields: of the config, to change: wider or longer `stages` on the same grids.

    Raises:
        TrainingError: another field, or something would become smaller.
    """
    config = model.config.replaced(**fields)
    different = {name for name in fields if getattr(config, name) != getattr(model.config, name)}
    if not different:
        return model
    if different != {"stages"}:
        raise TrainingError(f"A model grows in stages, not in {(different - {'stages'}).pop()}.")
    old, new = model.config.stages, config.stages
    grids = [[stage[0] for stage in stages] for stages in (old, new)]
    if grids[0] != grids[1] or any(o[1] > n[1] or o[2] > n[2] for o, n in zip(old, new, strict=True)):
        raise TrainingError(f"Stages grow in channels and blocks on the same grids; {old} cannot become {new}.")
    larger = Entroformer(config).train(model.training)
    state = larger.state_dict()
    same = {name for name in state if not name.startswith(("_extra_state", "g_a.", "g_s."))}
    larger.load_state_dict(state | {name: tensor for name, tensor in model.state_dict().items() if name in same})
    for part, bigger in ((model.g_a, larger.g_a), (model.g_s, larger.g_s)):
        _grow(part, bigger)
    return larger


@torch.no_grad()
def _grow(old: nn.Module, new: nn.Module) -> None:
    """Writes the old transform into the new one."""
    if isinstance(old, WithLinearPath):
        new.linear.load_state_dict(old.linear.state_dict())
        old, new = old.network, new.network
    waiting = [layer for layer in old if isinstance(layer, nn.Conv2d | ConvBlock)]
    for layer in new:
        if isinstance(layer, nn.Conv2d):
            _widen(waiting.pop(0), layer)
        elif isinstance(layer, ConvBlock):
            if waiting and isinstance(waiting[0], ConvBlock):
                known = waiting.pop(0)
                for name, child in layer.named_children():
                    _widen(getattr(known, name), child, halves=name == "gates")
            else:  # a block more at the end of a stage: adds nothing yet
                for last in (layer.leave, layer.mix):
                    for parameter in last.parameters():
                        parameter.zero_()


def _widen(old: nn.Conv2d, new: nn.Conv2d, halves: bool = False) -> None:
    """Old outputs read old inputs as before, and of the new inputs nothing. halves: outputs are two groups of channels,
    of which each grows."""
    pairs = zip(old.weight.chunk(1 + halves), new.weight.chunk(1 + halves), strict=True)
    for known, weight in pairs:
        outputs, inputs = known.shape[:2]
        weight[:outputs] = 0
        weight[:outputs, :inputs] = known
    for known, bias in zip(old.bias.chunk(1 + halves), new.bias.chunk(1 + halves), strict=True):
        bias[: len(known)] = known
