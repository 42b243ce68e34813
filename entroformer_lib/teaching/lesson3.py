"""Lesson 3, the hyperprior: what its checks look at, and its hints."""

import numpy as np
import torch
from scipy.fft import dctn

from entroformer_lib.models.priors import gaussian_mass
from entroformer_lib.teaching.answers import array, called, number, shaped, tensor
from entroformer_lib.teaching.exercises import Wrong, exercise
from entroformer_lib.teaching.photographs import grey


@exercise(
    "3.1",
    "write the body of `gaussian_bits`, where the three dots stand.",
    hints=(
        "First the probability, as in the formula above: two calls of `torch.special.ndtr`, one minus the other.",
        "Then the bits: minus the logarithm with base 2. Before it, `clamp_min(1e-9)` keeps the probability above 0.",
        "`-torch.log2((ndtr((y + 0.5) / scale) - ndtr((y - 0.5) / scale)).clamp_min(1e-9))`",
    ),
)
def gaussian_bits(answer) -> str:
    """A function from whole numbers and scales to bits."""
    y = torch.tensor([[0.0, 1.0, -3.0, 7.0], [0.0, -1.0, 2.0, 0.0]])
    scale = torch.tensor([[0.4, 1.0, 2.0, 5.0], [3.0, 0.7, 1.5, 10.0]])
    mass = gaussian_mass(y, torch.zeros(()), scale)
    right = array(-torch.log2(mass))
    got = tensor(called(answer, y, scale), "what `gaussian_bits` returns")
    got = shaped(got, y.shape, "what `gaussian_bits` returns")
    density = array(-torch.distributions.Normal(0.0, scale).log_prob(y) / np.log(2))
    late = array(-torch.log2(torch.special.ndtr(y / scale) - torch.special.ndtr((y - 1) / scale)))
    for form, sentence in {
        "negative": "the sign: bits are minus the logarithm of the probability.",
        "nats": "the unit. Which logarithm gives bits?",
        "mass": "these are the probabilities. Bits are minus their logarithm.",
        "density": "this is the height of the curve. A whole number has the *area* between y - 1/2 and y + 1/2.",
        "late": "the area lies beside y. It should go from y - 1/2 to y + 1/2.",
    }.items():
        wrong = dict(negative=-right, nats=right * np.log(2), mass=array(mass), density=density, late=late)[form]
        if np.allclose(got, wrong, atol=1e-3):
            raise Wrong(sentence)
    if not np.allclose(got, right, rtol=1e-3, atol=1e-3):
        row, column = np.argwhere(~np.isclose(got, right, rtol=1e-3, atol=1e-3))[0]
        raise Wrong(
            f"y = {y[row, column]:g} with scale {scale[row, column]:g} costs {right[row, column]:.3f} bits, "
            f"and you get {got[row, column]:.3f}."
        )
    with np.errstate(all="ignore"):
        far = called(answer, torch.tensor([60.0, -60.0]), torch.tensor([0.5, 0.5]))
    if not np.isfinite(np.asarray(far.detach() if hasattr(far, "detach") else far, dtype=float)).all():
        raise Wrong("y = 60 with scale 0.5 costs infinitely many bits. Clamp the probability: `.clamp_min(1e-9)`.")
    return f"A 0 with scale 0.4 costs {right[0, 0]:.2f} bits, a 0 with scale 10 costs {right[1, 3]:.2f}."


@exercise(
    "3.2",
    "write the body of `activity`, where the three dots stand.",
    hints=(
        "In a busy block many latents are large, above or below 0. What tells large from small, whatever the sign?",
        "Add up absolute values (or squares) over the channels. Leave channel 0 out: bright is not busy.",
        "`y[0, 1:].abs().sum(dim=0)`",
    ),
)
def activity(answer) -> str:
    """A function from y [1, 64, h, w] to [h, w]."""
    photo = grey("coffee")[:320, 100:500]
    blocks = (photo / 255 - 0.5).reshape(40, 8, 50, 8)
    y = np.round(dctn(blocks, axes=(1, 3), norm="ortho") / 0.12).transpose(1, 3, 0, 2).reshape(1, 64, 40, 50)
    y = torch.tensor(y, dtype=torch.float32)
    got = array(called(answer, y.clone()), "what `activity` returns")
    if got.shape == (1, 40, 50):
        got = got[0]
    if got.shape in ((64,), (1, 64)):
        raise Wrong("this is one number for each channel. Sum over the channels: one number for each block is left.")
    got = shaped(got, (40, 50), "`activity` of latents [1, 64, 40, 50]")
    plain, yours = _bits(y, np.zeros((40, 50), int)), _bits(y, _classes(got))
    reference = _bits(y, _classes(array(y[0, 1:].abs().sum(dim=0))))
    gain = (plain - yours) / (plain - reference)
    if gain < 0.25:
        raise Wrong(
            f"with 8 classes of it a test picture becomes {1 - yours / plain:.0%} smaller, "
            f"and {1 - reference / plain:.0%} is easy. Is the sign taken away before the "
            "sum? Is it the *size* of the waves, not the brightness?"
        )
    if gain < 0.8:
        raise Wrong(
            f"it helps, but with 8 classes it gives {gain:.0%} of what is easy. Look at all channels but channel 0, "
            "not at a few, and do not let a large channel 0 hide the others."
        )
    return f"With 8 classes of it the latents of a test picture become {1 - yours / plain:.0%} cheaper."


def _classes(values: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.quantile(values, np.linspace(0, 1, 9)[1:-1]), values)


def _bits(y: torch.Tensor, classes: np.ndarray) -> float:
    """Bits of y when each class and channel has its best of 30 scales."""
    scales = torch.logspace(-1.3, 2.3, 30)
    total = 0.0
    for place in np.unique(classes):
        values = y[0][:, torch.as_tensor(classes == place)]
        costs = [-torch.log2(gaussian_mass(values, torch.zeros(()), s).clamp_min(1e-9)).sum(dim=1) for s in scales]
        total += float(torch.stack(costs).min(dim=0).values.sum())
    return total


@exercise(
    "3.3",
    "write the body of `side_information`, where the three dots stand.",
    hints=(
        "Count how often each class occurs. `torch.unique(classes, return_counts=True)` does it.",
        "The entropy of the histogram is the bits of *one* class. How many are there?",
        "`p = counts / counts.sum()`, then `-(counts * torch.log2(p)).sum()`.",
    ),
)
def side_information(answer) -> str:
    """A function from classes [h, w] to bits."""
    classes = torch.tensor([0] * 60 + [1] * 30 + [5] * 10).reshape(10, 10)
    probs = np.array([0.6, 0.3, 0.1])
    right = -100 * (probs * np.log2(probs)).sum()
    got = number(called(answer, classes.clone()), "what `side_information` returns")
    if np.isclose(got, right / 100):
        raise Wrong("this is what one class costs on average. We ask for all of them together.")
    if np.isclose(got, right / 6400) or np.isclose(got, right / 64):
        raise Wrong("this is divided by the number of pixels. We ask for all bits together.")
    if np.isclose(got, -right):
        raise Wrong("the sign: bits are minus the logarithm of the probability.")
    if np.isclose(got, right * np.log(2)):
        raise Wrong("the unit. Which logarithm gives bits?")
    if any(np.isclose(got, 100 * np.log2(n)) for n in (3, 5, 6)) or got in (200, 300):
        raise Wrong("so much they cost when all classes are equally frequent. Use how often each of them occurs.")
    if not np.isclose(got, right, rtol=1e-3):
        raise Wrong(f"60, 30 and 10 blocks of three classes cost {right:.1f} bits together, and you get {got:.1f}.")
    equal = 100 * np.log2(3)
    return f"100 blocks in classes of 60, 30 and 10 cost {right:.0f} bits, less than {equal:.0f} for equal classes."


@exercise(
    "3.4",
    "write `z_hat` and `scales`, where the three dots stand.",
    hints=(
        "Follow the lower row of the diagram: y, h_a, round, h_s. What goes into h_s is what the decoder has, too.",
        "`z = h_a(y)`. Noise or rounding as in lesson 2. The logarithm is undone by `torch.exp`.",
        "`z_hat = z + torch.rand_like(z) - 0.5 if training else torch.round(z)`, and `torch.exp(h_s(z_hat))`.",
    ),
)
def side_path(answer) -> str:
    """A function from y, h_a, h_s and training to z_hat and scales."""
    y = 4 * torch.rand(1, 64, 8, 8, generator=torch.Generator().manual_seed(6)) - 2
    seen, weight = [], torch.tensor(1.3, requires_grad=True)

    def h_a(latents):
        return weight * latents[:, :3, ::2, ::2]

    def h_s(z):
        seen.append(array(z, "what h_s gets"))
        return z.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, 22, 1, 1)[:, :64] / 2 - 0.3

    z = array(h_a(y))
    for training in (False, True):
        seen.clear()
        got = called(answer, y, h_a, h_s, training)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("return two things: `return z_hat, scales`.")
        z_hat = array(got[0], "z_hat")
        scales = array(got[1], "scales")
        if z_hat.shape == y.shape and scales.shape == z.shape:
            raise Wrong("z_hat and scales have changed places: `return z_hat, scales`.")
        shaped(z_hat, z.shape, "z_hat"), shaped(scales, y.shape, "scales")
        _look_at(z, z_hat, scales, seen, training)
        if training and not getattr(got[1], "requires_grad", False):
            raise Wrong("h_a gets no gradient through z_hat. In training stay with tensors: no NumPy, no `detach`.")
    return "Encoder and decoder compute the same scales, from what both have."


def _look_at(z: np.ndarray, z_hat: np.ndarray, scales: np.ndarray, seen: list[np.ndarray], training: bool) -> None:
    if not seen:
        raise Wrong("h_s is never called. The scales come from it.")
    given = seen[-1]
    if not training and np.array_equal(z_hat, z):
        raise Wrong("z is not rounded. What is sent are whole numbers: `torch.round(z)` when it is not training.")
    if not training and not np.array_equal(z_hat, np.round(z)):
        raise Wrong("when it is not training, z_hat should be `torch.round(h_a(y))`.")
    if training and np.array_equal(z_hat, np.round(z)):
        raise Wrong("it rounds in training, too, and no gradient passes. Use noise there, as in lesson 2.")
    error = z_hat - z
    if training and not (np.abs(error).max() <= 0.51 and error.std() > 0.2 and abs(error.mean()) < 0.2):
        raise Wrong("in training, z_hat should be z plus noise that is uniform between -0.5 and 0.5.")
    if np.array_equal(given, z):
        raise Wrong("h_s gets z before it is rounded, and the decoder has no such z. Give it z_hat.")
    if not np.array_equal(given, z_hat):
        raise Wrong("h_s gets something else than the z_hat that you return. Encoder and decoder both have only z_hat.")
    logs = np.repeat(np.repeat(np.tile(given, (1, 22, 1, 1))[:, :64], 2, 2), 2, 3) / 2 - 0.3
    if np.allclose(scales, logs, atol=1e-4):
        raise Wrong("some scales are below 0. h_s gives logarithms: take `torch.exp` of them.")
    if not np.allclose(scales, np.exp(logs), rtol=1e-3):
        raise Wrong("the scales should be `torch.exp(h_s(z_hat))`.")


@exercise(
    "3.5",
    "write the body of `total_bits`, where the three dots stand.",
    hints=(
        "What is in the file? Two things are coded: y, with its scales, and what made the scales.",
        "`gaussian_bits(y, scales)` and `gaussian_bits(z_hat, z_scale)` are bits of each latent. Add all of them up.",
        "`gaussian_bits(y, scales).sum() + gaussian_bits(z_hat, z_scale).sum()`",
    ),
)
def total_bits(answer) -> str:
    """A function from y, scales, z_hat and z_scale to bits."""
    generator = torch.Generator().manual_seed(7)
    y, z = torch.round(4 * torch.randn(2, 64, 4, 4, generator=generator)), torch.tensor([2.0, -1.0, 0.0, 3.0])
    z = z.repeat(2, 2, 1).reshape(2, 2, 2, 2)
    scales, z_scale = torch.full_like(y, 4.0).requires_grad_(), torch.tensor([1.0, 2.0]).view(2, 1, 1)
    of_y = float(-torch.log2(gaussian_mass(y, torch.zeros(()), scales.detach())).sum())
    of_z = float(-torch.log2(gaussian_mass(z, torch.zeros(()), z_scale)).sum())
    answered = called(answer, y, scales, z, z_scale)
    got = number(answered, "what `total_bits` returns")
    if np.isclose(got, of_y, rtol=1e-5):
        raise Wrong("the bits of z are missing. Side information is not free.")
    if np.isclose(got, of_z, rtol=1e-4):
        raise Wrong("the bits of y are missing.")
    if np.isclose(got, of_y - of_z, rtol=1e-5):
        raise Wrong("the bits of z are taken away. They are in the file, too, so add them.")
    if np.isclose(got, of_y / y.numel() + of_z / z.numel(), rtol=1e-4):
        raise Wrong("you added two means. There are more latents in y than in z: take sums.")
    if not np.isclose(got, of_y + of_z, rtol=1e-4):
        raise Wrong(f"y costs {of_y:.0f} bits and z {of_z:.0f} bits, and you get {got:.0f}.")
    if not getattr(answered, "requires_grad", False):
        raise Wrong("the number is right, but it has no gradient. Stay with tensors: no `item`, no `float`, no NumPy.")
    return f"In the test y costs {of_y:.0f} bits and z {of_z:.0f}."
