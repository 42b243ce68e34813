"""Lesson 4, context models: what its checks look at, and its hints."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from entroformer_lib.teaching.answers import array, called, shaped
from entroformer_lib.teaching.exercises import Wrong, exercise


@exercise(
    "4.1",
    "write the body of `causal_mask`, where the three dots stand.",
    hints=(
        "Draw 5 x 5 squares, mark the one in the middle, and number them in the decoder's order. Which come before it?",
        "Two parts are 1: all rows above the middle, whole, and in the middle row what is left of the middle.",
        "`mask = np.zeros((side, side))`, then `mask[: side // 2] = 1` and `mask[side // 2, : side // 2] = 1`.",
    ),
)
def causal_mask(answer) -> str:
    """A function from an odd side to a mask [side, side]."""
    for side in (5, 3, 7):
        got = array(called(answer, side), "what `causal_mask` returns")
        if got.size == side * side:
            got = got.reshape(side, side)
        got = shaped(got, (side, side), f"`causal_mask({side})`")
        _look_at_mask(got, _before(side), side)
    return "A kernel of 5 x 5 numbers keeps 12 of them."


def _before(side: int) -> np.ndarray:
    return (np.arange(side * side) < side * side // 2).astype(float).reshape(side, side)


def _look_at_mask(got: np.ndarray, right: np.ndarray, side: int) -> None:
    middle = np.zeros_like(right)
    middle[side // 2, side // 2] = 1
    if not np.isin(got, (0, 1)).all():
        raise Wrong(f"a mask is made of 0 and 1, and yours has {got[~np.isin(got, (0, 1))][0]:g} in it.")
    if np.array_equal(got, right + middle):
        raise Wrong("the middle is 1: the site would be predicted from itself, and the decoder does not have it yet.")
    if np.array_equal(got, right[::-1, ::-1]) or np.array_equal(got, 1 - right):
        raise Wrong("these are the sites that come *later*. 1 is for what the decoder knows already.")
    if np.array_equal(got, right.T):
        raise Wrong("this goes column after column. Raster order goes row after row.")
    corner = np.zeros_like(right)
    corner[: side // 2 + 1, : side // 2 + 1] = 1
    if np.array_equal(got, corner - middle):
        raise Wrong("the sites above to the *right* are missing. Their row is finished, so the decoder knows them.")
    if np.array_equal(got, right * (np.arange(side) != side // 2)[:, None].repeat(side, axis=1)):
        raise Wrong("the sites to the left in the same row are missing.")
    if not np.array_equal(got, right):
        row, column = np.argwhere(got != right)[0]
        place = f"{row - side // 2:+d} rows and {column - side // 2:+d} columns from the middle"
        raise Wrong(f"with a side of {side}, the neighbour {place} should be {right[row, column]:g}.")


@exercise(
    "4.2",
    "write the body of `masked_conv`, where the three dots stand.",
    hints=(
        "A kernel that is 0 somewhere does not see what lies there. So multiply the kernels with the mask.",
        "`F.conv2d(image, kernels, bias, padding=...)`. With how much padding does the size stay?",
        '`F.conv2d(u, weight * mask, bias, padding="same")`',
    ),
)
def masked_conv(answer) -> str:
    """A function from u, weight, bias and mask to a convolution."""
    generator = torch.Generator().manual_seed(8)
    for side in (5, 3):
        u, weight = (torch.randn(size, generator=generator) for size in ((2, 3, 6, 7), (4, 3, side, side)))
        bias, mask = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor(_before(side), dtype=torch.float32)
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        kept = weight.detach().clone()
        answered = called(answer, u.clone(), weight, bias, mask)
        if not torch.equal(weight.detach(), kept):
            raise Wrong("it changes the weights themselves. Use `weight * mask`, which is a new tensor.")
        got = array(answered, "what `masked_conv` returns")
        if got.shape == (2, 4, 7 - side, 8 - side):
            raise Wrong("the result is smaller than the image. Add `padding`: half of the kernel's side, rounded down.")
        got = shaped(got, (2, 4, 6, 7), f"`masked_conv` of [2, 3, 6, 7] with kernels of {side} x {side}")
        with torch.no_grad():
            _look_at_conv(got, u, weight, bias, mask)
        if not getattr(answered, "requires_grad", False):
            raise Wrong(
                "the numbers are right, but they have no gradient. Stay with tensors: no `detach`, no `data`, no NumPy."
            )
        reached = torch.autograd.grad(answered.sum(), (weight, bias), allow_unused=True)
        if any(gradient is None for gradient in reached):
            raise Wrong(
                "the numbers are right, but no gradient reaches `weight` or `bias`: they would never learn. Is there a "
                "`detach` or `data`, or a new layer with numbers of its own? `F.conv2d` takes `weight` as it is."
            )
    return "No weight outside of the mask matters, whatever its value."


def _look_at_conv(got: np.ndarray, u: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> None:
    padding = mask.shape[-1] // 2
    right = array(F.conv2d(u, weight * mask, bias, padding=padding))
    if np.allclose(got, array(F.conv2d(u, weight, bias, padding=padding)), atol=1e-4):
        raise Wrong("the mask is not used.")
    if np.allclose(got, array(F.conv2d(u, weight * mask, None, padding=padding)), atol=1e-4):
        raise Wrong("the bias is missing.")
    if np.allclose(got, array(F.conv2d(u, weight * (1 - mask), bias, padding=padding)), atol=1e-4):
        raise Wrong("it keeps what the mask should take away. Multiply with the mask, not with 1 - mask.")
    if np.allclose(got, array(F.conv2d(u, weight * mask.T, bias, padding=padding)), atol=1e-4):
        raise Wrong("rows and columns of the mask have changed places.")
    if not np.allclose(got, right, atol=1e-3):
        raise Wrong("these are not the numbers of a convolution with `weight * mask`, `bias` and zeros as the border.")


@exercise(
    "4.3",
    "write the body of `influence`, where the three dots stand.",
    hints=(
        "Two ways. Change one place of u, run the network again, and look whether the answer at the site has changed. "
        "Or ask PyTorch for the gradient of that answer with respect to u.",
        "The gradient: `u = u.clone().requires_grad_()`; add up both answers at `[0, :, row, column]`; "
        "`torch.autograd.grad(sum, u)`. One map is left when you sum its sizes over the channels.",
        "`shift, stretch = network(u)`, `said = (shift + stretch)[0, :, row, column].sum()`, "
        "`torch.autograd.grad(said, u)[0][0].abs().sum(dim=0)`.",
    ),
)
def influence(answer) -> str:
    """A function from a network, u, row and column to a map [h, w]."""
    u = torch.randn(1, 3, 5, 6, generator=torch.Generator().manual_seed(9))
    for name, (network, wanted) in _networks().items():
        for row, column in ((2, 3), (1, 1)):
            right = wanted(row, column, 5, 6)
            found = called(answer, network, u.clone(), row, column)
            got = array(found, "what `influence` returns")
            if got.shape == (3, 5, 6) or got.shape == (1, 3, 5, 6):
                raise Wrong("there is a map for each channel. Sum over the channels: one map is left.")
            if got.shape == (1, 5, 6) or got.shape == (1, 1, 5, 6):
                got = got.reshape(5, 6)
            got = np.abs(shaped(got, (5, 6), "the map"))
            _look_at_map(got > 1e-7 * max(got.max(), 1e-7), right, name, row, column)
    return "It finds what a network sees, in its shift and in its stretch, in any channel."


def _networks() -> dict:
    """{name: (network, map of what it sees)}: each looks at other places."""

    def moved(u: Tensor, dy: int, dx: int) -> Tensor:
        return F.pad(u, (dx, 0, dy, 0))[:, :, : u.shape[2], : u.shape[3]]

    def above_and_left(u):
        return torch.tanh(moved(u, 1, 0)) - 2 * moved(u, 0, 1), torch.zeros_like(u) * u

    def in_stretch(u):
        return torch.sin(moved(u, 1, 1)), 0.5 * u**3

    def in_one_channel(u):
        total = u[:, 2:] * torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
        return moved(total, 0, 1), -moved(total, 1, 0)

    def at(*offsets):
        def wanted(row, column, h, w):
            found = np.zeros((h, w), bool)
            for dy, dx in offsets:
                found[row + dy, column + dx] = True
            return found

        return wanted

    return {
        "above and left": (above_and_left, at((-1, 0), (0, -1))),
        "stretch": (in_stretch, at((-1, -1), (0, 0))),
        "one channel": (in_one_channel, at((-1, 0), (0, -1))),
    }


def _look_at_map(got: np.ndarray, right: np.ndarray, name: str, row: int, column: int) -> None:
    if np.array_equal(got, right):
        return
    if name == "stretch" and np.array_equal(got, right & (np.arange(6) != column)):
        raise Wrong("a network that sees itself in its stretch is not found. Look at both things that it gives.")
    if name == "one channel" and not got.any():
        raise Wrong("a network that speaks of its last channel only is not found. Look at all channels of the site.")
    if got.sum() > 15:
        raise Wrong(
            "nearly every place seems to matter. Look only at what the network says of the site `row`, `column`. If "
            "you change places in turn: does a change stay for the next place? Change a copy of u."
        )
    if not got.any():
        raise Wrong(
            "no place seems to matter, and this network sees two. Is the changed u given to the network, and do you "
            "look at both things that it gives?"
        )
    missing, more = right & ~got, got & ~right
    kind, places = ("is missing", missing) if missing.any() else ("should not be there", more)
    y, x = np.argwhere(places)[0]
    raise Wrong(f"for the site ({row}, {column}) of a test network the place ({y}, {x}) {kind} in your map.")


@exercise(
    "4.4",
    "write the body of `decode`, where the three dots stand.",
    hints=(
        "Two loops, over rows and over columns. What must happen again at each site, because one more latent is known?",
        "At each site: run the network on what is known so far, take what it says of this site, read, and write the "
        "result into u.",
        "`shift, stretch = network(u)`, then "
        "`u[0, :, row, column] = read(row, column, shift[0, :, row, column], stretch[0, :, row, column])`, and at the "
        "end `return u`.",
    ),
)
def decode(answer) -> str:
    """A function from zeros, a network and a reader to the decoded grid."""
    true, sites = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(10)), []
    runs = [0]

    def network(u: Tensor) -> tuple[Tensor, Tensor]:
        runs[0] += 1
        flat = u.flatten(2)
        before = torch.cat((torch.zeros_like(flat[:, :, :1]), flat.cumsum(dim=2)[:, :, :-1]), dim=2).view_as(u)
        return before + 1, 2 * before - 1

    shift, stretch = network(true)

    def read(row: int, column: int, *said) -> Tensor:
        row, column = int(row), int(column)
        if (row, column) != divmod(len(sites), 4):
            raise Wrong(
                f"site {len(sites) + 1} of the file lies at {divmod(len(sites), 4)}, and you read it as "
                f"({row}, {column}). The encoder went row by row; the grid has 3 rows and 4 columns."
            )
        sites.append((row, column))
        for name, given, whole in zip(("shift", "stretch"), said, (shift, stretch), strict=True):
            given = array(given, name)
            given = shaped(given.reshape(-1) if given.size == 2 else given, (2,), f"{name} of one site")
            if not np.allclose(given, array(whole[0, :, row, column]), atol=1e-4):
                raise Wrong(_why(runs[0] - 1, len(sites), name))
        return true[0, :, row, column].clone()

    got = called(answer, torch.zeros(1, 2, 3, 4), network, read)
    if len(sites) < 12:
        raise Wrong(f"the grid has 12 sites, and {len(sites)} are read.")
    got = array(got, "what `decode` returns")
    got = shaped(got[None] if got.shape == (2, 3, 4) else got, (1, 2, 3, 4), "what `decode` returns")
    if not np.allclose(got, array(true), atol=1e-5):
        raise Wrong("everything was read, but it does not stand in the grid that you return.")
    return f"12 sites took {runs[0] - 1} runs of the network."


def _why(runs: int, sites: int, name: str) -> str:
    if runs < sites:
        return (
            f"at site {sites} the network has run {runs} {'time' if runs == 1 else 'times'}. It must run again after "
            "each site, because it knows one more."
        )
    return (
        f"at site {sites} `read` gets another {name} than the encoder had. Is each latent written into u before the "
        "network runs again? Is it what the network says of *this* site, shift first?"
    )


@exercise(
    "4.5",
    "write the body of `two_passes`, where the three dots stand.",
    hints=(
        "Make a map of the first half: True where row + column is odd (or even, as you like).",
        "`u * first` hides the second half from the network. Multiply what it says with `~first`: it speaks of the "
        "second half only.",
        "`first = (torch.arange(u.shape[2]).view(-1, 1) + torch.arange(u.shape[3])) % 2 == 1`, "
        "`shift, stretch = network(u * first)`, `return shift * ~first, stretch * ~first`.",
    ),
)
def two_passes(answer) -> str:
    """A function from a network and u to shift and stretch."""
    u = 1 + torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(11))
    seen = []

    def network(values: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(array(values, "what the network gets"))
        return 3 + 0 * values, 0 * values - 2

    given = u.clone()
    got = called(answer, network, given)
    if not torch.equal(given, u):
        raise Wrong("it changes u itself, so the latents are lost for whoever asks next. Work with `u.clone()`.")
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong("return two things, shift and stretch: `return shift * ~first, stretch * ~first`.")
    shift, stretch = (shaped(value, u.shape, name) for value, name in zip(got, ("shift", "stretch"), strict=True))
    if not seen:
        raise Wrong("the network is never asked.")
    odd = (np.arange(5)[:, None] + np.arange(6)) % 2 == 1
    known = (shaped(seen[-1], u.shape, "what the network gets") != 0).all(axis=(0, 1))
    spoken = (shift != 0).all(axis=(0, 1))
    if known.all():
        raise Wrong("the network sees all of u, so each site sees itself. Put 0 in the place of the second half.")
    if not any(np.array_equal(known, half) for half in (odd, ~odd)):
        raise Wrong("what the network sees is no half of a checkerboard. Is it row + column that is odd?")
    if not np.allclose(seen[-1], array(u) * known):
        raise Wrong("the latents of the first half are changed on their way to the network.")
    if np.array_equal(spoken, known):
        raise Wrong("you keep what the network says of the half that it has seen. Keep the other one: `~first`.")
    if spoken.all():
        raise Wrong("sites of the first half have a shift, too, and they are decoded before there is any context.")
    if (shift.max(), shift.min()) == (0, -2):
        raise Wrong("shift and stretch have changed places: `return shift, stretch`.")
    if not np.allclose(shift, 3 * ~known) or not np.allclose(stretch, -2.0 * ~known):
        raise Wrong("the second half should get what the network says, and the first half gets 0.")
    return f"The network sees {int(known.sum())} of 30 sites and speaks of the other {int((~known).sum())}."
