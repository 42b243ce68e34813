"""Checks of the course: right answers in two forms are taken, and typical mistakes are named; hints; messages."""

import re

import constriction
import numpy as np
import pytest
import torch
from torch import nn

from entroformer_lib.teaching import check, exercises, hint, lesson1, lesson2, lesson3  # noqa: F401  they register

ndtr = torch.special.ndtr


def coded(symbols, probs, encoder=constriction.stream.queue.RangeEncoder):
    coder = encoder()
    coder.encode(symbols.astype(np.int32), constriction.stream.model.Categorical(probs, perfect=False))
    return coder


class Counting:
    def __init__(self, n=256):
        self.counts = np.ones(n)

    def probs(self):
        return self.counts / self.counts.sum()

    def update(self, symbol):
        self.counts[symbol] += 1


class OnList(Counting):
    def __init__(self, n=256):
        self.counts = [0.25] * n

    def probs(self):
        return [count / sum(self.counts) for count in self.counts]


class FromZero(Counting):
    def __init__(self, n=256):
        self.counts = np.zeros(n) + 1e-300 * 0

    def probs(self):
        return self.counts / max(1, self.counts.sum())


class NotNormalised(Counting):
    def probs(self):
        return self.counts / 2


class Shared(Counting):
    COUNTS = {}

    def __init__(self, n=256):
        self.counts = self.COUNTS.setdefault(n, np.ones(n))


def eig(blocks, order=-1):
    return np.linalg.eigh(np.cov(blocks.T))[1][:, ::order]


def svd(blocks):
    mean = torch.tensor(blocks).mean(0)
    return [mean, torch.linalg.svd(torch.tensor(blocks) - mean, full_matrices=False)[2]]


def columns(q):
    return [np.unique(column, return_counts=True)[1] / len(column) for column in np.asarray(q).T]


def bits_of(probs):
    return -(probs * np.log2(probs)).sum()


def padded(basis, left=4, right=4):
    patterns = torch.tensor(np.ascontiguousarray(basis)).float().reshape(64, 1, 8, 8)
    return nn.functional.pad(patterns, (left, right, left, right))


def in_the_middle(basis):
    kernels = np.zeros((64, 1, 16, 16))
    kernels[:, 0, 4:12, 4:12] = basis.reshape(64, 8, 8)
    return kernels


def noise(y, low=-0.5, high=0.5):
    return y + torch.empty_like(y).uniform_(low, high)


def mass(y, scale):
    return (ndtr((y + 0.5) / scale) - ndtr((y - 0.5) / scale)).clamp_min(1e-9)


def bits(y, scale):
    return -torch.log2(mass(y, scale))


def normal_bits(y, s):
    normal = torch.distributions.Normal(0.0, s)
    return -torch.log2(torch.clamp(normal.cdf(y + 0.5) - normal.cdf(y - 0.5), min=1e-9))


def sent(z, training):
    return noise(z) if training else z.round()


def side(y, h_a, h_s, training):
    z_hat = sent(h_a(y), training)
    return z_hat, h_s(z_hat).exp()


def side_as_list(y, h_a, h_s, training):
    z_hat = h_a(y)
    z_hat = z_hat + (torch.rand(z_hat.shape) - 0.5) if training else torch.floor(z_hat + 0.5)
    return [z_hat, torch.e ** h_s(z_hat)]


def side_of_z(y, h_a, h_s, training):
    z = h_a(y)
    return sent(z, training), h_s(z).exp()


def side_without_exp(y, h_a, h_s, training):
    z_hat = sent(h_a(y), training)
    return z_hat, h_s(z_hat)


def counted(classes):
    return np.unique(np.asarray(classes), return_counts=True)[1]


def mse(x, x_hat):
    return ((x - x_hat) ** 2).mean()


RIGHT = {
    "1.1": [
        lambda p: -sum(p[p > 0] * np.log2(p[p > 0])),
        lambda p: torch.special.entr(torch.tensor(p)).sum() / np.log(2),
    ],
    "1.2": [
        lambda s, p: coded(s.ravel(), p).get_compressed(),
        lambda s, p: coded(s.flatten(), p).get_compressed().tobytes(),
    ],
    "1.3": [lambda p, q: -(p * np.log2(q)).sum(), lambda p, q: [sum(a * np.log2(1 / b) for a, b in zip(p, q))]],  # noqa: B905
    "1.4": [
        lambda x: np.diff(x.astype(int), axis=1, prepend=0) % 256,
        lambda x: np.concatenate([x[:, :1], x[:, 1:] - x[:, :-1]], axis=1).tolist(),  # bytes wrap around
    ],
    "1.5": [Counting, OnList],
    "1.6": [
        lambda a, b: min(7, int(np.log2(1 + abs(a) + abs(b)))),
        lambda a, b: float(sum(max(abs(a), abs(b)) > t for t in (1, 3, 6, 10, 20, 40))),
    ],
    "2.1": [
        lambda x: x.reshape(x.shape[0] // 8, 8, -1, 8).swapaxes(1, 2).reshape(-1, 64),
        lambda x: torch.tensor(x).unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 8, 8),
    ],
    "2.2": [lambda b: (b.mean(0), eig(b).T), svd],
    "2.3": [
        lambda q: sum(map(bits_of, columns(q))) / 64,
        lambda q: torch.tensor([np.mean([bits_of(probs) for probs in columns(q)])]),
    ],
    "2.4": [padded, in_the_middle],
    "2.5": [
        lambda y, training: y + torch.rand_like(y) - 0.5 if training else torch.round(y),
        lambda y, training: noise(y) if training else torch.floor(y + 0.5),
    ],
    "2.6": [
        lambda b, x, x_hat, lmbda: b.sum() / x.numel() + lmbda * 255**2 * mse(x, x_hat),
        lambda b, x, x_hat, lmbda: b.mean() * b.numel() / x.numel() + lmbda * mse(255 * x, 255 * x_hat).reshape(1),
    ],
    "3.1": [bits, normal_bits],
    "3.2": [lambda y: y[0, 1:].abs().sum(0), lambda y: np.log1p((y.numpy()[:, 1:] ** 2).sum(1))],
    "3.3": [
        lambda c: len(c.flatten()) * bits_of(counted(c) / c.numel()),
        lambda c: torch.distributions.Categorical(torch.tensor(counted(c))).entropy() / np.log(2) * c.numel(),
    ],
    "3.4": [side, side_as_list],
    "3.5": [
        lambda y, s, z, t: bits(y, s).sum() + bits(z, t).sum(),
        lambda y, s, z, t: torch.cat([normal_bits(y, s).flatten(), normal_bits(z, t).flatten()]).sum()[None],
    ],
}

WRONG = {
    "1.1": [
        (lambda p: -(p[p > 0] * np.log(p[p > 0])).sum(), "Which logarithm gives bits"),
        (lambda p: -(p * np.log2(p)).sum(), "a probability of 0 gives NaN"),
        (lambda p: (p[p > 0] * np.log2(p[p > 0])).sum(), "the sign"),
    ],
    "1.2": [
        (lambda s, p: coded(s.ravel()[::-1], p).get_compressed(), "reverse order"),
        (lambda s, p: coded(s.ravel(), np.ones(3) / 3).get_compressed(), "not what went in"),
        (lambda s, p: coded(s.ravel(), p), "return the words themselves"),
        (lambda s, p: coded(s.T.ravel(), p).get_compressed(), "column after column"),
    ],
    "1.3": [
        (lambda p, q: -(q * np.log2(p)).sum(), "changed places"),
        (lambda p, q: (p * np.log2(p / q)).sum(), "what is paid too much"),
        (lambda p, q: -(p * np.log2(p)).sum(), "Where does q come in"),
    ],
    "1.4": [
        (lambda x: np.diff(x.astype(int), axis=1), "a column is missing"),
        (lambda x: np.abs(np.diff(x.astype(int), axis=1, prepend=0)), "the sign is lost"),
        (lambda x: np.diff(x.astype(int), axis=1, prepend=0), "modulo 256"),
        (lambda x: np.diff(x.astype(int), axis=0, prepend=0) % 256, "pixel above"),
    ],
    "1.5": [
        (FromZero, "at the beginning a symbol has probability 0"),
        (NotNormalised, "add up to 2.000 instead of 1"),
        (Shared, "remembers what the first has seen"),
        (type("Deaf", (Counting,), {"update": lambda self, symbol: None}), "changes nothing"),
    ],
    "1.6": [
        (lambda a, b: 3, "Let it depend on the neighbours"),
        (lambda a, b: abs(a) + abs(b), "should be a whole number from 0 to 7"),
        (lambda a, b: int(abs(a) % 2), "5% is possible"),
    ],
    "2.1": [
        (lambda x: x.reshape(-1, 64), "one line of pixels"),
        (lambda x: x.reshape(2, 8, 3, 8).transpose(2, 0, 1, 3).reshape(-1, 64), "column after column"),
        (lambda x: x.reshape(2, 8, 3, 8).transpose(0, 2, 3, 1).reshape(-1, 64), "rows and columns have changed places"),
    ],
    "2.2": [
        (lambda b: (b.mean(0), eig(b)), "stand in the columns"),
        (lambda b: (b.mean(0), eig(b, 1).T), "largest variance should come first"),
        (lambda b: (eig(b).T, b.mean(0)), "in the other order"),
        (lambda b: (b.mean(1)[:64], eig(b).T), "not the mean block"),
    ],
    "2.3": [
        (lambda q: sum(map(bits_of, columns(q))), "bits of a block"),
        (lambda q: bits_of(columns(q.reshape(-1, 1))[0]), "one histogram for all numbers"),
    ],
    "2.4": [
        (lambda basis: padded(basis, 0, 8), "upper left corner"),
        (lambda basis: padded(basis.T), "A pattern is a row"),
        (lambda basis: padded(basis, 0, 0), "should have the shape [64, 1, 16, 16]"),
    ],
    "2.5": [
        (lambda y, training: y + torch.randn_like(y) if training else torch.round(y), "goes up to"),
        (lambda y, training: y + torch.rand_like(y) if training else torch.round(y), "has the mean 0.5"),
        (lambda y, training: torch.round(y), "rounds in training"),
        (lambda y, training: noise(y) if not training else torch.round(y), "changed places"),
        (lambda y, training: noise(y.detach()) if training else torch.round(y), "no gradient"),
    ],
    "2.6": [
        (lambda b, x, x_hat, lmbda: b.sum() / x.numel() + lmbda * mse(x, x_hat), "255² is missing"),
        (lambda b, x, x_hat, lmbda: b.mean() + lmbda * 255**2 * mse(x, x_hat), "rate is per latent"),
        (lambda b, x, x_hat, lmbda: lmbda * b.sum() / x.numel() + 255**2 * mse(x, x_hat), "lambda stands at the rate"),
        (lambda *a: (a[0].sum() / a[1].numel() + a[3] * 255**2 * mse(*a[1:3])).item(), "it has no gradient"),
    ],
    "3.1": [
        (lambda y, s: -torch.distributions.Normal(0.0, s).log_prob(y) / np.log(2), "height of the curve"),
        (lambda y, s: bits(y, s) * np.log(2), "Which logarithm gives bits"),
        (lambda y, s: -torch.log2(ndtr((y + 0.5) / s) - ndtr((y - 0.5) / s)), "infinitely many bits"),
        (lambda y, s: -torch.log2(ndtr(y / s) - ndtr((y - 1) / s)), "lies beside y"),
    ],
    "3.2": [
        (lambda y: y[0].sum(0), "Is the sign taken away"),
        (lambda y: y[0].abs().sum((1, 2)), "one number for each channel"),
        (lambda y: y[0, 0].abs(), "easy"),
    ],
    "3.3": [
        (lambda c: bits_of(counted(c) / c.numel()), "one class costs on average"),
        (lambda c: c.numel() * np.log2(3), "equally frequent"),
        (lambda c: c.numel() * bits_of(counted(c) / c.numel()) * np.log(2), "Which logarithm gives bits"),
    ],
    "3.4": [
        (side_of_z, "before it is rounded"),
        (side_without_exp, "take `torch.exp`"),
        (lambda y, h_a, h_s, training: (h_a(y), h_s(h_a(y)).exp()), "z is not rounded"),
        (lambda y, h_a, h_s, training: side(y, h_a, h_s, False), "rounds in training"),
        (lambda *a: side(*a)[::-1], "changed places"),
    ],
    "3.5": [
        (lambda y, s, z, t: bits(y, s).sum(), "bits of z are missing"),
        (lambda y, s, z, t: bits(y, s).mean() + bits(z, t).mean(), "two means"),
    ],
}


def test_every_exercise_is_tested():
    assert exercises.EXERCISES.keys() == RIGHT.keys() == WRONG.keys()
    assert min(map(len, (*RIGHT.values(), *WRONG.values()))) >= 2


@pytest.mark.parametrize(("number", "answer"), [(n, a) for n, answers in RIGHT.items() for a in answers])
def test_right_answers_are_taken(number, answer, capsys):
    check(number, answer)
    said = capsys.readouterr().out
    assert said.startswith(f"Exercise {number} is right. ") and said.endswith(".\n")


@pytest.mark.parametrize(("number", "answer", "says"), [(n, *pair) for n, pairs in WRONG.items() for pair in pairs])
def test_mistakes_are_named(number, answer, says, capsys):
    with np.errstate(all="ignore"), pytest.raises(exercises.Wrong, match=re.escape(says)) as caught:
        check(number, answer)
    assert str(caught.value).startswith(f"Exercise {number} isn't right yet: ")
    assert "\n" not in str(caught.value) and not capsys.readouterr().out


@pytest.mark.parametrize("number", RIGHT)
def test_what_cannot_be_an_answer_is_refused_in_a_sentence(number):
    for nothing in (..., None):
        with pytest.raises(exercises.Unsolved, match=f"Exercise {number} isn't solved yet: write "):
            check(number, nothing)
    for answer in (3, lambda *arguments: None, lambda *arguments: "text", lambda *arguments: 1 / 0):
        with pytest.raises(exercises.Wrong, match=f"Exercise {number} isn't right yet: .*"):
            check(number, answer)


def test_the_line_that_stops_is_quoted():
    names = {}
    exec(compile("def entropy(probs):\n    return probs.nothing", "<cell>", "exec"), names)
    with pytest.raises(exercises.Wrong, match="`entropy` stops with AttributeError: .*nothing"):
        check("1.1", names["entropy"])


def test_three_dots_inside_a_function_are_unsolved():
    with pytest.raises(exercises.Unsolved):
        check("1.1", lambda probs: -(... * probs))


def test_a_notebook_shows_one_sentence():
    with pytest.raises(exercises.NotYet) as caught:
        check("1.1", ...)
    assert caught.value._render_traceback_() == [str(caught.value)]


@pytest.mark.parametrize("number", ["9.1", "1.99", "x", 1.1])
def test_unknown_exercises(number):
    with pytest.raises(exercises.NotYet, match=r"^There is no [^\n]*\.$"):
        check(number, 1)


@pytest.mark.parametrize("number", RIGHT)
def test_three_hints_lie_in_one_another(number, monkeypatch):
    exercise = exercises.EXERCISES[number]
    monkeypatch.setattr(exercise, "opened", 0)
    assert len(exercise.hints) == 3
    html = hint(number)._repr_html_()
    assert [html.count(tag) for tag in ("<details>", "</details>")] == [3, 3] and html.endswith("</details>" * 3)
    assert [len(repr(hint(number)).splitlines()) for _ in range(3)] == [2, 3, 3]


def test_hints_show_code_as_code():
    assert "<code>p[p &gt; 0]</code>" in hint("1.1")._repr_html_()
