"""Adam as in the paper, and Muon, which needs far fewer steps (docs/training.md has the comparison)."""

import math

import torch
from torch import Tensor, nn

QUANTILES_LR = 1e-3  # of the factorized prior, as in CompressAI


def build_optimizer(model: nn.Module, kind: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a run. The quantiles of the factorized prior form a group with a `fixed` learning rate."""
    matrices, others, quantiles = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".quantiles"):
            quantiles.append(parameter)
        elif kind == "muon" and _is_matrix(name, parameter):
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": others, "fixed": False}, {"params": quantiles, "lr": QUANTILES_LR, "fixed": True}]
    if kind == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    return Muon([*groups, {"params": matrices, "orthogonal": True}], lr)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Weights of linear layers and kernels of convolutions; not GDN, position vectors or p(z)."""
    return parameter.dim() in (2, 4) and name.endswith("weight") and "z_prior" not in name


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised for matrices (Jordan et al. 2024, "Muon"); Adam for everything else.

    The step of a matrix is the nearest matrix with equal singular values to its momentum: directions with small
    gradients move as far as the others. A kernel [out, in, h, w] counts as a matrix [out, in h w]. Steps are scaled to
    the size that Adam's usually have (0.2 sqrt(longer side), Liu et al. 2025), so both share one learning rate.

    Groups with `orthogonal` hold matrices; a `fixed` learning rate is not scheduled.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, betas=(0.9, 0.999), eps: float = 1e-8):
        defaults = dict(lr=lr, momentum=momentum, betas=betas, eps=eps, orthogonal=False, fixed=False)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["orthogonal"] else self._adam)(parameters, group)

    def _adam(self, parameters: list[Tensor], group: dict) -> None:
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            self.state[p]["step"] += 1
        b1, b2 = group["betas"]
        gradients = [p.grad for p in parameters]
        means, squares = ([self.state[p][key] for p in parameters] for key in ("mean", "square"))
        torch._foreach_lerp_(means, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        steps = [self.state[p]["step"] for p in parameters]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - b2**t) for t in steps])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, means, roots, [-group["lr"] / (1 - b1**t) for t in steps])

    def _muon(self, parameters: list[Tensor], group: dict) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            m = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(m, group["momentum"]).flatten(1)  # Nesterov
            by_shape.setdefault(ahead.shape, []).append((p, ahead))
        for shape, members in by_shape.items():  # equal shapes in one batched product
            updates = orthogonal(torch.stack([a for _, a in members]))
            for (p, _), update in zip(members, updates, strict=True):
                p.add_(update.view_as(p), alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each matrix U S V^T, by five steps of Newton-Schulz with Jordan's coefficients: singular values
    end between 0.7 and 1.2.  [..., n, m] -> [..., n, m]"""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):  # x <- a x + (b gram + c gram^2) x, each line one pass over memory
        gram = x @ x.mT
        even = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, even, x, beta=3.4445)
    x = x.to(matrices.dtype)
    return (x.mT if tall else x).reshape(matrices.shape)
