"""How weights move: Adam as in the paper, and Muon, which needs far fewer steps (docs/training.md compares the two).

Also the learning rate over a run, and the running mean of the weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from entroformer_lib.training.strategies import like, whole

QUANTILES_LR = 1e-3  # of the factorized prior, as in CompressAI
COOL_DOWN = 0.6  # share of the steps over which the linear schedule goes to zero


def build_optimizer(model: nn.Module, kind: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a run. The quantiles of the factorized prior form a group with a `fixed` learning rate."""
    matrices, threefold, others, quantiles = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".quantiles"):
            quantiles.append(parameter)
        elif kind == "muon" and _is_matrix(name, parameter):
            (matrices if parts_of(name) == 1 else threefold).append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": others, "fixed": False}, {"params": quantiles, "lr": QUANTILES_LR, "fixed": True}]
    if kind == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    orthogonal_ones = [{"params": matrices, "orthogonal": True}, {"params": threefold, "orthogonal": True, "parts": 3}]
    return Muon([*groups, *orthogonal_ones], lr)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Weights of linear layers and kernels of convolutions; not GDN, position vectors or p(z)."""
    return parameter.dim() in (2, 4) and name.endswith("weight") and "z_prior" not in name


def parts_of(name: str) -> int:
    """How many matrices lie below each other in a weight: queries, keys and values share one."""
    return 3 if name.endswith("qkv.weight") else 1


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised for matrices (Jordan et al. 2024, "Muon"); Adam for everything else.

    The step of a matrix is the nearest matrix with equal singular values to its momentum: directions with small
    gradients move as far as the others. A kernel [out, in, h, w] counts as a matrix [out, in h w], and one of a
    transposed convolution [in, out, h, w] as [in, out h w]. Steps are scaled to
    the size that Adam's usually have (0.2 sqrt(longer side), Liu et al. 2025), so both share one learning rate.

    torch.optim.Muon takes matrices alone and one after the other. Here kernels are matrices too, and those of equal
    shape go through one batched product, which is most of a step's time.

    Groups with `orthogonal` hold matrices of `parts` that lie below each other, each made orthogonal on its own.
    (Queries, keys and values share a weight. As a single matrix, nearly all of its step would go to the values, whose
    gradients are by far the largest.) A `fixed` learning rate is not scheduled.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, betas=(0.9, 0.999), eps: float = 1e-8):
        defaults = dict(lr=lr, momentum=momentum, betas=betas, eps=eps, orthogonal=False, parts=1, fixed=False)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:  # a CNN has no queries
                continue
            (self._muon if group["orthogonal"] else self._adam)(parameters, group)

    def _adam(self, parameters: list[Tensor], group: dict) -> None:
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            # An int in earlier checkpoints, and on the GPU where a checkpoint was loaded to one.
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")
        means, squares, steps = ([state[key] for state in states] for key in ("mean", "square", "step"))
        numbers = dict(zip(("beta1", "beta2"), group["betas"], strict=True), lr=group["lr"], eps=group["eps"])
        fixed = dict(amsgrad=False, maximize=False, weight_decay=0.0, foreach=True)
        adam(parameters, [p.grad for p in parameters], means, squares, [], steps, **numbers, **fixed)

    def _muon(self, parameters: list[Tensor], group: dict) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        aheads, means = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(means, aheads, 1 - group["momentum"])
        torch._foreach_lerp_(aheads, means, group["momentum"])  # Nesterov, in the place of the gradients
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, ahead in zip(parameters, aheads, strict=True):
            by_shape.setdefault(ahead.flatten(1).shape, []).append((p, ahead))
        for (rows, columns), members in by_shape.items():  # equal shapes in one batched product
            # Of a sharded matrix each process has some rows, and what is made orthogonal is the whole.
            low, part = quick_type(aheads[0].device), (rows // group["parts"], columns)
            updates = orthogonal(torch.cat([whole(ahead).flatten(1).to(low).view(-1, *part) for _, ahead in members]))
            for (p, _), update in zip(members, updates.split(group["parts"]), strict=True):
                p.add_(like(update.reshape(p.shape), p), alpha=-0.2 * math.sqrt(max(part)) * group["lr"])


def quick_type(device: torch.device) -> torch.dtype:
    """bfloat16, but on processors without instructions for it, whose products take four times as long as those of
    float32."""
    has_instructions = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.float32 if device.type == "cpu" and not has_instructions else torch.bfloat16


# Odd polynomials a x + b x^3 + c x^5 that bring singular values of [0.01, 1] as near to 1 as three of them can, each
# the best for the range that the one before it leaves (after Amsel et al. 2025, "Polar Express", arXiv 2505.16932).
NEAR_ONE = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, by three steps of Newton-Schulz: singular values above a hundredth of the
    bound end between 0.73 and 1.27.  [B, n, m], bfloat16 or wider  ->  [B, n, m]"""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    # The fourth root of the sum of s^4 bounds the largest singular value s more closely than Frobenius' norm does.
    bound = 1.02 * gram.norm(dim=(-2, -1), keepdim=True) + 1e-7
    x, gram = x / bound.sqrt(), gram / bound
    for step, (a, b, c) in enumerate(NEAR_ONE):  # x <- a x + (b gram + c gram^2) x, each line one pass over memory
        gram = x @ x.mT if step else gram
        even = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, even, x, beta=a)
    return x.mT if tall else x


def learning_rate_factor(
    step: int, total: int, warmup: float = 0.05, decay: float = 0.75, schedule: str = "steps"
) -> float:
    """Factor on the base learning rate: linear warm-up over 5% of the steps (with `constant` at
    most 500), then

    `steps`: times `decay` at every fifth of the steps (appendix A.5; the released code has 0.5 instead of 0.75);
    `linear`: constant, and over the last 60% of the steps linearly down to 0 (ours, for short budgets);
    `constant`: constant. `decay` has no warm-up: linearly from 1 to 0, for a branch of a constant run.
    """
    if schedule == "decay":
        return 1 - step / total
    warm_steps = max(1, round(warmup * total))
    if schedule == "constant":  # open-ended: its length says nothing about its beginning
        warm_steps = min(warm_steps, 500)
    warm = min(1.0, (step + 1) / warm_steps)
    if schedule == "linear":
        return warm * min(1.0, (total - step) / (COOL_DOWN * total))
    if schedule == "constant":
        return warm
    return warm * decay ** (5 * step // total)


class Mean:
    """Exponential running mean of the weights. It follows quickly at first: the decay grows as (1 + t) / (10 + t).

    With a decay of 0 there is no mean, and nothing happens.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()} if decay else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes up the weights after a step."""
        if self.values is not None:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.values.values()), list(self.model.parameters()), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the mean is the model's weights, to be measured or saved."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.model.named_parameters() if self.values is not None else ():
            last = parameter.clone()
            parameter.copy_(self.values[name])
            self.values[name] = last
