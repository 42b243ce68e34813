"""Lesson 2, transforms and quantisation: what its checks look at, and its hints."""

import numpy as np
import torch
from torch import nn

from entroformer_lib.teaching.answers import array, called, number, shaped, tensor
from entroformer_lib.teaching.exercises import Wrong, exercise
from entroformer_lib.teaching.photographs import grey


@exercise(
    "2.1",
    "write the body of `to_blocks`, where the three dots stand.",
    hints=(
        "`image.reshape(-1, 64)` takes 64 neighbours of one *line*. Split both axes: `H // 8, 8, W // 8, 8`.",
        "The axes are now: line of blocks, row in a block, place in the line, column in a block. Swap two of them.",
        "`image.reshape(H // 8, 8, W // 8, 8).swapaxes(1, 2).reshape(-1, 64)`",
    ),
)
def to_blocks(answer) -> str:
    """A function from [H, W] to [n, 64] or [n, 8, 8]."""
    image = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    split = image.reshape(2, 8, 3, 8)
    right = split.swapaxes(1, 2).reshape(-1, 64)
    got = array(called(answer, image), "what `to_blocks` returns")
    if got.shape == (6, 8, 8):
        got = got.reshape(6, 64)
    got = shaped(got, (6, 64), "`to_blocks` of an image of 16 x 24 pixels")
    if np.array_equal(got, image.reshape(-1, 64)):
        raise Wrong(
            "a row holds 64 neighbours of one line of pixels. The first row should hold the 8 x 8 pixels top left."
        )
    if np.array_equal(got, split.transpose(2, 0, 1, 3).reshape(-1, 64)):
        raise Wrong("the blocks are right, but they are ordered column after column. Go from left to right first.")
    if np.array_equal(got, split.transpose(0, 2, 3, 1).reshape(-1, 64)):
        raise Wrong("inside each block rows and columns have changed places.")
    if not np.array_equal(got, right):
        place = int(np.argwhere((got != right).any(axis=1))[0, 0])
        raise Wrong(
            f"block {place} does not hold the right pixels: it begins {got[place, :3]}, not {right[place, :3]}."
        )
    return "Every block is in its row."


@exercise(
    "2.2",
    "write the body of `pca`, where the three dots stand.",
    hints=(
        "`blocks.mean(axis=0)` is the mean block, and `np.cov(blocks.T)` the covariance matrix.",
        "`np.linalg.eigh` takes a symmetric matrix. It sorts from small to large. Eigenvectors are columns.",
        "`variances, vectors = np.linalg.eigh(np.cov(blocks.T))`, then `return mean, vectors[:, ::-1].T`.",
    ),
)
def pca(answer) -> str:
    """A function from blocks [n, 64] to mean [64] and basis [64, 64], whatever the sign of each row."""
    photo = grey("coffee")[:200, :400] / 255
    blocks = photo.reshape(25, 8, 50, 8).swapaxes(1, 2).reshape(-1, 64)
    got = called(answer, blocks.copy())
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong("return two things, the mean block and the basis: `return mean, basis`.")
    first, second = array(got[0], "the mean"), array(got[1], "the basis")
    if first.shape == (64, 64):
        raise Wrong("the basis comes first and the mean second. Return them in the other order.")
    mean, basis = shaped(first.squeeze(), (64,), "the mean"), shaped(second, (64, 64), "the basis")
    if not np.allclose(mean, blocks.mean(axis=0), atol=1e-4):
        raise Wrong(
            "the mean is not the mean block. Take the mean over the blocks, `axis=0`: one number for each pixel."
        )
    if not np.allclose(basis @ basis.T, np.eye(64), atol=1e-3):
        raise Wrong("the rows are not orthogonal and of length 1. Eigenvectors of a symmetric matrix are: use `eigh`.")
    if not _uncorrelated(blocks, basis):
        if _uncorrelated(blocks, basis.T):
            raise Wrong("the eigenvectors stand in the columns. We want one in each row: transpose.")
        raise Wrong("the new numbers are correlated. Are these the eigenvectors of the covariance over the *pixels*?")
    variances = ((blocks - mean) @ basis.T).var(axis=0)
    if (np.diff(variances) > 1e-6 * variances.max()).any():
        raise Wrong(
            "the largest variance should come first. `eigh` sorts from small to large, so turn the order around."
        )
    return f"The first pattern alone carries {variances[0] / variances.sum():.0%} of the variance of a test picture."


def _uncorrelated(blocks: np.ndarray, basis: np.ndarray) -> bool:
    covariance = np.cov(basis @ (blocks - blocks.mean(axis=0)).T)
    return bool(np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3 * covariance.max())


@exercise(
    "2.3",
    "write the body of `rate`, where the three dots stand.",
    hints=(
        "Column i of `q` is `q[:, i]`. What does one of its values cost? How many pixels does a row stand for?",
        "Add up the entropies of the columns: this is what a block costs. A block has 64 pixels.",
        "`sum(entropy_of(q[:, i]) for i in range(64)) / 64`",
    ),
)
def rate(answer) -> str:
    """A function from whole numbers [n, 64] to bits per pixel."""
    rng = np.random.default_rng(3)
    q = np.round(rng.laplace(0, np.geomspace(8, 0.1, 64), (500, 64)))
    columns = np.array([_entropy(q[:, i]) for i in range(64)])
    right = columns.mean()
    got = number(called(answer, q), "the rate")
    if np.isclose(got, columns.sum()):
        raise Wrong("these are the bits of a block. A block has 64 pixels, and we want bits per pixel.")
    if np.isclose(got, 500 * columns.sum()):
        raise Wrong("these are the bits of the whole picture. Divide by the number of its pixels.")
    if np.isclose(got, _entropy(q)) or np.isclose(got, _entropy(q) / 64):
        raise Wrong(
            "you have one histogram for all numbers. Give each column its own: the first is wide, the last narrow."
        )
    if np.isclose(got, np.mean([_entropy(row) for row in q])):
        raise Wrong("you have a histogram for each block. Take the columns, `q[:, i]`: the same number of every block.")
    if not np.isclose(got, right):
        raise Wrong(f"for a test picture it is {right:.3f} bits per pixel, and you get {got:.3f}.")
    return f"With one histogram for all, the same numbers would cost {_entropy(q) / right:.1f} times as much."


def _entropy(values: np.ndarray) -> float:
    probs = np.unique(values, return_counts=True)[1] / values.size
    return float(-(probs * np.log2(probs)).sum())


@exercise(
    "2.4",
    "write the body of `kernels`, where the three dots stand.",
    hints=(
        "Turn each row into 8 x 8 first: a tensor of [64, 1, 8, 8]. Then add a border of 0.",
        "`nn.functional.pad` adds a border on all four sides. How wide must it be to come from 8 to 16?",
        "`nn.functional.pad(torch.tensor(basis.copy(), dtype=torch.float32).reshape(64, 1, 8, 8), (4, 4, 4, 4))`",
    ),
)
def kernels(answer) -> str:
    """A function from basis [64, 64] to kernels [64, 1, 16, 16]."""
    basis = np.linalg.qr(np.random.default_rng(4).normal(size=(64, 64)))[0]
    turned = basis[:, ::-1].copy()[:, ::-1]  # the same numbers, lying backwards, as those of exercise 2.2 do
    got = shaped(called(answer, turned), (64, 1, 16, 16), "what `kernels` returns")
    middle = got[:, 0, 4:12, 4:12]
    right = basis.reshape(64, 8, 8)
    if np.allclose(got[:, 0, :8, :8], right, atol=1e-5):
        raise Wrong(
            "the patterns stand in the upper left corner. Put them into the middle: the border is 4 on every side."
        )
    if np.allclose(middle, basis.T.reshape(64, 8, 8), atol=1e-5):
        raise Wrong("you took the columns of the basis. A pattern is a row.")
    if np.allclose(middle, right.swapaxes(1, 2), atol=1e-5):
        raise Wrong("inside each pattern rows and columns have changed places.")
    if not np.allclose(middle, right, atol=1e-5):
        raise Wrong("the middle 8 x 8 numbers of kernel i should be row i of the basis.")
    if np.abs(got).sum() > np.abs(middle).sum() + 1e-3:
        raise Wrong("the border should be 0.")
    return "A convolution with these kernels, stride 8 and padding 4 is your PCA."


@exercise(
    "2.5",
    "write the body of `quantise`, where the three dots stand.",
    hints=(
        "Two cases: `if training:` noise, else `torch.round`.",
        "`torch.rand_like(y)` is uniform between 0 and 1. How do you get it between -0.5 and 0.5?",
        "`return y + torch.rand_like(y) - 0.5 if training else torch.round(y)`",
    ),
)
def quantise(answer) -> str:
    """A function from a tensor and training or not, to a tensor."""
    y = torch.linspace(-3, 3, 6000).requires_grad_()
    used, noisy, again = (called(answer, y, training) for training in (False, True, True))
    tensor(noisy, "`quantise(y, True)`")
    used = shaped(tensor(used, "`quantise(y, False)`"), y.shape, "`quantise(y, False)`")
    error = shaped(noisy, y.shape, "`quantise(y, True)`") - array(y)
    if np.abs(used - np.round(array(y))).max() > 1e-6:
        if np.allclose(np.sort(np.abs(used - array(y)))[-1], 0.5, atol=0.01) or np.ptp(used - array(y)) > 0.1:
            raise Wrong("when it is not training, it should round. Have the two cases changed places?")
        raise Wrong("when it is not training, it should round: `torch.round(y)`.")
    if np.abs(array(noisy) - np.round(array(y))).max() < 1e-6:
        raise Wrong("it rounds in training, too. Rounding passes no gradient on; here we want noise.")
    if abs(error.mean()) > 0.1:
        raise Wrong(f"the noise has the mean {error.mean():.2f}. It should be 0: noise between -0.5 and 0.5.")
    if np.abs(error).max() > 0.51:
        raise Wrong(f"the noise goes up to {np.abs(error).max():.2f}. The error of rounding is never above 0.5.")
    if not 0.25 < error.std() < 0.32:
        raise Wrong(
            f"the noise has a standard deviation of {error.std():.2f}; uniform between -0.5 and 0.5 it is 0.29."
        )
    if np.array_equal(error, array(again) - array(y)):
        raise Wrong("the noise is the same every time. Draw new noise in each call.")
    if not getattr(noisy, "requires_grad", False):
        raise Wrong("the result has no gradient. Stay with tensors: no NumPy, no `detach`, no `.data`.")
    noisy.sum().backward()
    if not torch.allclose(y.grad, torch.ones_like(y)):
        raise Wrong("the gradient should be 1 everywhere: add the noise, and do nothing else to y in training.")
    return "Noise when it learns, rounding when it works."


@exercise(
    "2.6",
    "write the body of `loss`, where the three dots stand.",
    hints=(
        "Two terms. The first: all bits, divided by the number of *pixels* (not of latents). The second: the error.",
        "`x.numel()` is the number of pixels of a grey batch. `((x - x_hat) ** 2).mean()` is D.",
        "`bits.sum() / x.numel() + lmbda * 255**2 * ((x - x_hat) ** 2).mean()`",
    ),
)
def loss(answer) -> str:
    """A function from bits, x, x_hat and lambda to the loss."""
    generator = torch.Generator().manual_seed(5)
    x, x_hat = torch.rand(2, 1, 16, 16, generator=generator), torch.rand(2, 1, 16, 16, generator=generator)
    bits = 3 * torch.rand(2, 10, 2, 2, generator=generator)
    x_hat, lmbda = (x + 0.05 * (x_hat - 0.5)).requires_grad_(), 0.01
    R, D = float(bits.sum() / x.numel()), float(nn.functional.mse_loss(x, x_hat.detach()))
    answered = called(answer, bits, x, x_hat, lmbda)
    got = number(answered, "the loss")
    wrong = {
        R + lmbda * D: "the 255² is missing. Without it an error of pixels between 0 and 1 weighs nearly nothing.",
        float(bits.mean()) + lmbda * 255**2 * D: "the rate is per latent. Divide the sum of the bits by the number of "
        "pixels: `x.numel()`.",
        float(bits.sum())
        + lmbda * 255**2 * D: "the rate is of all pictures together. Divide it by the number of pixels.",
        float(bits.sum()) / 2 + lmbda * 255**2 * D: "the rate is per picture. Divide it by the number of pixels.",
        lmbda * R + 255**2 * D: "lambda stands at the rate. In this course it weighs the distortion.",
        R + lmbda * 255 * D: "the error is squared, so the 255 must be squared, too.",
        R - lmbda * 255**2 * D: "the sign: an error is bad, so add it.",
        R + lmbda * 255**2 * float((x - x_hat.detach()).abs().mean()): "D is the mean *squared* error.",
        R + lmbda * 255**2 * D * x.numel(): "D is the *mean* squared error, and you have the sum.",
    }
    for value, sentence in wrong.items():
        if np.isclose(got, value, rtol=1e-4):
            raise Wrong(sentence)
    right = R + lmbda * 255**2 * D
    if not np.isclose(got, right, rtol=1e-4):
        raise Wrong(f"for R = {R:.4f}, D = {D:.6f} and lambda = 0.01 it is {right:.4f}, and you get {got:.4f}.")
    if not getattr(answered, "requires_grad", False):
        raise Wrong("the number is right, but it has no gradient. Stay with tensors: no `item`, no `float`, no NumPy.")
    return f"In the test, {R:.2f} bits per pixel and {lmbda * 255**2 * D:.2f} for the errors."
