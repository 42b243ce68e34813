"""What attention is made of besides layers: products of queries and keys, the choice of the k best, the weighted sum.

They are functions of their own, and `replaceable`: a torch.overrides.TorchFunctionMode may compute them in another way,
with the same bits on every machine for the coder, or a few queries at a time to save memory. This file defines what
they compute.
"""

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

# Marks a function of ours so that a TorchFunctionMode sees its calls, as it sees those of torch's own functions.
replaceable = wrap_torch_function(lambda *tensors, **more: [t for t in tensors if isinstance(t, Tensor)])


@replaceable
def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """Every query times every key.  q: [..., q, d], k: [..., n, d]  ->  [..., q, n]"""
    return q @ k.transpose(-1, -2)


@replaceable
def keep_top_k(scores: Tensor, top_k: int | None) -> Tensor:
    """f_k of eq. 7 (its "row j" is row i, the query's): keeps the k largest scores of each query, the rest is -inf.

    Eq. 7 does not say what to do with ties; here all scores that equal the k-th are kept. Flat parts of a picture give
    many scores that would be equal without rounding, and in floating point rounding noise chooses among them, here and
    in the released code. The coder therefore computes the scores exactly (exact/).

    scores: [..., n] with -inf where a key is not visible  ->  the same shape
    """
    if top_k is None or top_k >= scores.size(-1):
        return scores
    kth = scores.detach().topk(top_k).values[..., -1:]
    return scores + torch.where(scores.detach() < kth, -torch.inf, 0.0)  # quicker than masked_fill, backward too


@replaceable
def weighted_sum(probs: Tensor, v: Tensor) -> Tensor:
    """The values, weighted by the attention paid to them.  probs: [..., q, n], v: [..., n, d]  ->  [..., q, d]"""
    return probs @ v


def float_or_wider(v: Tensor) -> Tensor:
    """bfloat16 to float32; float32 and float64 unchanged."""
    return v.to(torch.promote_types(v.dtype, torch.float32))
