"""In which form the numbers of a weights file are stored: float32, half precision, or eight bits.

Only matrices and kernels are shortened: what is small and sensitive (GDN, p(z), biases, gains) stays in float32. In
eight bits each output channel has a step, and a number is a multiple of it from -127 to 127. What is loaded comes from
single float32 operations on what is stored, so it has the same bits on every machine.

Weights that were finetuned from others may be stored as differences from them: they are small, so their steps are too.
"""

from typing import Literal

import torch
from torch import Tensor

from entroformer_lib.errors import WeightsError

Form = Literal["float32", "float16", "int8"]
Tensors = dict[str, Tensor]
LARGEST = 127
WHOLE, DIFFERENCE, STEP = ":int8", ":difference", ":step"  # behind the name of a shortened tensor
SHARES = tuple(1 - 0.04 * i for i in range(10))  # of the largest number, where the range may end


def shortened(tensors: Tensors, form: Form, near: Tensors | None = None) -> Tensors:
    """What a file holds of these tensors. near: those of the same names that differences are taken from."""
    if form == "float32":
        return tensors
    held: Tensors = {}
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and name.endswith("weight") and tensor.dim() >= 2):
            held[name] = tensor
        elif form == "float16":
            held[name] = tensor.half()
        else:
            base = None if near is None else near.get(name)
            numbers, steps = _multiples(tensor if base is None else tensor - base)
            held[name + (WHOLE if base is None else DIFFERENCE)], held[name + STEP] = numbers, steps
    return held


def restored(held: Tensors, near: Tensors | None = None) -> Tensors:
    """The tensors that a file stands for, floats as float32.

    Raises:
        WeightsError: parts of a shortened tensor are missing or do not fit.
    """
    tensors: Tensors = {}
    for key, tensor in held.items():
        name, colon, form = key.rpartition(":")
        if not colon:
            tensors[key] = tensor.float() if tensor.is_floating_point() else tensor
        elif colon + form != STEP:
            steps, base = held.get(name + STEP), (near or {}).get(name)
            whole = tensor.dtype == torch.int8 and steps is not None and steps.shape == tensor.shape[:1]
            if not whole or colon + form not in (WHOLE, DIFFERENCE):
                raise WeightsError(f"The stored form of {name} is damaged.")
            value = tensor.float() * steps.float().view(-1, *(1,) * (tensor.dim() - 1))
            if colon + form == DIFFERENCE:
                if base is None or base.shape != value.shape:
                    raise WeightsError(f"The weights that {name} differs from are not there.")
                value = base + value
            tensors[name] = value
    return tensors


def _multiples(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest multiples of a step, which is chosen for each row so that the squared error is least.

    tensor: [out, ...]  ->  int8 of the same shape, steps: [out]
    """
    rows = tensor.flatten(1)
    largest = rows.abs().amax(1).clamp(min=1e-30) / LARGEST
    # The neighbours of the first step find the very step of rows that were shortened before
    steps = [largest, *(torch.nextafter(largest, largest.new_tensor(end)) for end in (0.0, 1.0))]
    steps += [share * largest for share in SHARES[1:]]
    best = torch.full_like(largest, torch.inf)
    chosen, numbers = largest.clone(), torch.zeros_like(rows)
    for step in steps:
        tried = (rows / step[:, None]).round().clamp(-LARGEST, LARGEST)
        error = (tried * step[:, None] - rows).square().sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, step, chosen)
        numbers = torch.where(better[:, None], tried, numbers)
    return numbers.to(torch.int8).view_as(tensor), chosen
