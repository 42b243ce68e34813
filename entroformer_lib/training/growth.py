"""A larger model that begins as the smaller one: more channels or blocks in the transforms, or more latents.

With more channels and blocks the outputs are the same, exactly so in a network without normalisation. What is new is
computed from old and new, and nothing old reads it yet: those weights begin at zero, and the gradient moves them from
the first step on. (After Net2Net, Chen et al. 2016; copies of channels are not needed here.)

More latents are the next frequencies of the linear path's DCT. What the old latents are, how they are predicted and
what they add to the picture stays; the new ones add their frequencies to it.
"""

import math

import torch
from torch import Tensor, nn

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import TrainingError
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.transforms import DCT_LMBDA, ConvBlock, WithLinearPath

GROWS = ("stages", "M")  # fields of the config that may change
COARSER = 0.6  # gain of a new latent in parts of what theory says for fine steps: most of the new ones round to zero


def grown(model: Entroformer, fields: dict) -> Entroformer:
    """A model of another config: with the same outputs, or with more latents that add to them.

    Args:
        fields: of the config, to change: wider or longer `stages` on the same grids, or a larger `M`.

    Raises:
        TrainingError: another field, or something would become smaller.
    """
    config = model.config.replaced(**fields)
    different = [name for name in fields if getattr(config, name) != getattr(model.config, name)]
    if not different:
        return model
    if not set(different) <= set(GROWS):
        raise TrainingError(f"A model grows in {' and '.join(GROWS)}, not in {(set(different) - set(GROWS)).pop()}.")
    old, new = model.config.stages, config.stages
    grids = [[stage[0] for stage in stages] for stages in (old, new)]
    if grids[0] != grids[1] or any(o[1] > n[1] or o[2] > n[2] for o, n in zip(old, new, strict=True)):
        raise TrainingError(f"Stages grow in channels and blocks on the same grids; {old} cannot become {new}.")
    if "M" in different:
        _check_latents(model.config, config)
    larger = Entroformer(config).train(model.training)
    known, state = model.state_dict(), larger.state_dict()
    for name in state:
        if not name.startswith(("_extra_state", "g_a.", "g_s.")):
            state[name] = _with_more_latents(name, known[name], state[name], config)
    larger.load_state_dict(state)
    for part, bigger in ((model.g_a, larger.g_a), (model.g_s, larger.g_s)):
        _grow(part, bigger)
    if "M" in different:
        _silence(larger, model.config.M)
    return larger


def _check_latents(old: EntroformerConfig, new: EntroformerConfig) -> None:
    if new.linear_path != "dct" or new.transforms != "blocks":
        raise TrainingError("M grows with transforms of blocks and a linear path, whose next frequencies are added.")
    if new.context in ("cnn", "grouped") or new.hyper == "cnn":
        raise TrainingError(
            "M grows with Entroformer's own context and hyperprior, not with a CNN's or GroupedMixer's."
        )
    if new.M < old.M:
        raise TrainingError(f"A model grows; M = {old.M} cannot become {new.M}.")


def _with_more_latents(name: str, old: Tensor, new: Tensor, config: EntroformerConfig) -> Tensor:
    """A tensor of the entropy model or of the gains, for as many latents as there are now."""
    if old.shape == new.shape:
        return old
    if name.startswith("gain."):  # [levels, M]: new ones as theory says for a coefficient of the DCT, but coarser
        sign = 1 if name == "gain.log_gain" else -1
        rates = torch.tensor(config.lmbdas)[:, None] / DCT_LMBDA
        more = sign * (rates.log() / 2 + math.log(COARSER)).expand(-1, new.size(1) - old.size(1))
        return torch.cat((old, more.to(old)), dim=1)
    if name.startswith("entropy_parameters."):  # outputs: scales, then means; new ones as the last of the old
        count = (len(new) - len(old)) // 2
        halves = old.chunk(2)
        last = [half[torch.arange(-count, 0) % len(half)] for half in halves]
        return torch.cat((halves[0], last[0], halves[1], last[1]))
    if not name.endswith("embed.weight"):  # tables of z's coder
        return old
    wider = torch.zeros_like(new)  # layers that read latents: [D, M], nothing of the new ones yet
    wider[:, : old.size(1)] = old
    return wider


@torch.no_grad()
def _silence(model: Entroformer, old: int) -> None:
    """The nonlinear networks neither write new latents nor read them yet: the linear path alone does."""
    writes = [layer for layer in model.g_a.network if isinstance(layer, nn.Conv2d)][-1]
    reads = next(layer for layer in model.g_s.network if isinstance(layer, nn.Conv2d))
    writes.weight[old:], writes.bias[old:], reads.weight[:, old:] = 0, 0, 0


@torch.no_grad()
def _grow(old: nn.Module, new: nn.Module) -> None:
    """Writes the old transform into the new one."""
    if isinstance(old, WithLinearPath):
        for known, larger in zip(old.linear.parameters(), new.linear.parameters(), strict=True):
            larger[: len(known)] = known  # further kernels begin as the DCT's
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
