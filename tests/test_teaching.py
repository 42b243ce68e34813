"""Checks of the course: right answers in two forms are taken, and typical mistakes are named; hints; messages."""

import re

import constriction
import numpy as np
import pytest
import torch
from torch import nn

from entroformer_lib.errors import DataError
from entroformer_lib.teaching import check, exercises, hint, lesson1, lesson2, lesson3, lesson4, lesson5, lesson6  # noqa: F401
from entroformer_lib.teaching.photographs import grey

ndtr = torch.special.ndtr


def coded(symbols, probs, encoder=constriction.stream.queue.RangeEncoder, perfect=False):
    coder = encoder()
    coder.encode(symbols.astype(np.int32), constriction.stream.model.Categorical(probs, perfect=perfect))
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


def causal(scores, diagonal=1):
    return scores.masked_fill(torch.ones_like(scores).triu(diagonal).bool(), -torch.inf)


def scores_in_loops(q, k):
    """NumPy, one score after the other."""
    found = np.full((len(q), len(q)), -np.inf)
    for i, j in zip(*np.tril_indices(len(q)), strict=True):
        found[i, j] = float(q[i] @ k[j]) / np.sqrt(q.shape[1])
    return found


def top_k(scores, k):
    return scores.masked_fill(scores < scores.topk(min(k, len(scores))).values[:, -1:], -torch.inf)


def softmax_by_hand(scores, k):
    """Row by row, with sorted numbers."""
    found = np.zeros(scores.shape)
    for i, row in enumerate(np.asarray(scores, dtype=float)):
        best = np.argsort(-row)[:k]
        weights = np.exp(row[best] - row.max())
        found[i, best] = weights / weights.sum()
    return found


def offsets(h, near=lambda dy, dx, h: abs(dy) + abs(dx) <= h):
    return [(dy, dx) for dy in range(-h, h + 1) for dx in range(-h, h + 1) if near(dy, dx, h)]


def hide(scores, queries, dy, dx, width, ahead=1, borders=True, copy=True, own=True, first=1, heads=slice(None)):
    scores = scores.clone() if copy else scores
    for i, query in enumerate(queries.tolist()):
        row, column = divmod(query + ahead, width)
        key = (row + dy) * width + column + dx
        inside = key >= 0 and (0 <= column + dx < width or not borders)
        if inside and query >= first and (key <= query if own else key < query):
            scores[:, heads, i, key] = -torch.inf
    return scores


def hide_by_mask(scores, queries, dy, dx, width):
    """All queries at once."""
    sites, keys = queries[:, None] + 1, torch.arange(scores.shape[-1])
    there = (keys // width - sites // width == dy) & (keys % width - sites % width == dx) & (keys < sites) & (sites > 1)
    return torch.where(there, -torch.inf, scores).numpy()


def se(values, ddof=1, root=0.5):
    return np.std(values, ddof=ddof) / len(values) ** root


def need(spread, effect, errors=2, least=2, up=np.ceil, power=2):
    return max(least, up((errors * spread / effect) ** power))


BECAUSE = "The latent above lies two steps from the token."
HYPOTHESIS = {"change": {"radius": 1}, "saves": -2, "convincing": 1, "because": BECAUSE}


def range_of(effect, doubt, convincing):
    low, high = effect - doubt, effect + doubt
    if low >= convincing or high <= -convincing:
        return "saves" if low > 0 else "costs"
    return "no effect" if max(abs(low), abs(high)) < convincing else "undecided"


def in_capitals(effect, doubt, convincing):
    states = [effect - doubt >= convincing, effect + doubt <= -convincing, abs(effect) + doubt < convincing, True]
    return ("SAVES", "COSTS", "NO_EFFECT", "UNDECIDED")[states.index(True)]


QUESTION = "Does a context model of two layers need a diamond that is larger than 1?"
FINDING = "On one photograph and with 4 seeds a radius of 1 costs 1.2%, give or take 0.8%."
LIMIT = "After 60 steps on three photographs this says little about models that are trained in earnest."


def mse(x, x_hat):
    return ((x - x_hat) ** 2).mean()


def before(side):
    return np.arange(side * side).reshape(side, side) < side * side // 2


def conv(u, weight, bias, mask, **how):
    return nn.functional.conv2d(u, weight * mask, bias, **{"padding": mask.shape[-1] // 2, **how})


def conv_of_its_own(u, weight, bias, mask):
    """A new layer each time, so what is learned is thrown away."""
    layer = nn.Conv2d(u.shape[1], len(weight), weight.shape[-1], padding="same")
    layer.weight.data, layer.bias.data = (weight * mask).detach(), bias.detach()
    return layer(u)


def conv_by_taps(u, weight, bias, mask):
    """Adds up shifted images, one for each place of the mask."""
    reach, (h, w) = mask.shape[-1] // 2, u.shape[2:]
    padded = nn.functional.pad(u, (reach,) * 4)
    taps = [
        torch.einsum("bchw,oc->bohw", padded[:, :, y : y + h, x : x + w], weight[:, :, y, x])
        for y, x in torch.nonzero(mask).tolist()
    ]
    return sum(taps) + bias.view(-1, 1, 1)


def by_gradient(network, u, row, column, of=slice(None), channels=slice(None)):
    u = u.clone().requires_grad_()
    said = sum(v[0, channels, row, column].sum() for v in network(u)[of])
    return torch.autograd.grad(said, u)[0].abs().sum((0, 1))


def by_trying(network, u, row, column, copy=torch.clone):
    with torch.no_grad():
        usual, found = torch.cat(network(u))[:, :, row, column], []
        for place in np.ndindex(u.shape[2:]):
            other = copy(u)
            other[:, :, place[0], place[1]] += 1.5
            found.append(bool((torch.cat(network(other))[:, :, row, column] != usual).any()))
    return np.reshape(found, u.shape[2:]).tolist()


def of_all_sites(network, u, row, column):
    u = u.clone().requires_grad_()
    return torch.autograd.grad(sum(v.sum() for v in network(u)), u)[0].abs().sum((0, 1))


def in_raster_order(u, network, read, sites=np.ndindex, again=True, write=True):
    said = network(u)
    for row, column in sites(*u.shape[2:]):
        said = network(u) if again else said
        found = read(row, column, *(v[0, :, row, column] for v in said))
        if write:
            u[0, :, row, column] = found
    return u


def in_a_list(u, network, read):
    known = u.clone()
    for i in range(u[0, 0].numel()):
        row, column = divmod(i, u.shape[3])
        shift, stretch = (v.detach() for v in network(known))
        known[:, :, row, column] = read(row, column, shift[:, :, row, column], stretch[:, :, row, column])
    return known[0].numpy()


def by_columns(height, width):
    return [(row, column) for column in range(width) for row in range(height)]


def board(u, colour=1):
    return (torch.arange(u.shape[2])[:, None] + torch.arange(u.shape[3])) % 2 == colour


def even_first(network, u):
    found = [torch.zeros_like(u), torch.zeros_like(u)]
    seen = u.clone()
    seen[:, :, ::2, 1::2] = seen[:, :, 1::2, ::2] = 0
    for whole, said in zip(found, network(seen), strict=True):
        whole[:, :, ::2, 1::2], whole[:, :, 1::2, ::2] = said[:, :, ::2, 1::2], said[:, :, 1::2, ::2]
    return found


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
    "4.1": [before, lambda side: torch.tensor([1.0] * (side * side // 2) + [0.0] * (side * side // 2 + 1))],
    "4.2": [lambda *given: conv(*given, padding="same"), conv_by_taps],
    "4.3": [by_gradient, by_trying],
    "4.4": [in_raster_order, in_a_list],
    "4.5": [lambda network, u: [v * ~board(u) for v in network(u * board(u))], even_first],
    "5.1": [lambda q, k: causal(q @ k.T / q.shape[1] ** 0.5), scores_in_loops],
    "5.2": [lambda scores, k: top_k(scores, k).softmax(-1), softmax_by_hand],
    "5.3": [offsets, lambda h: np.array(offsets(h), dtype=np.int32)],
    "5.4": [
        lambda computed, start: torch.cat((start[None], computed[:-1])),
        lambda computed, start: torch.stack([start, *computed][:-1]),
    ],
    "5.5": [hide, hide_by_mask],
    "6.1": [lambda b, a: 100 * (1 - a / b), lambda b, a: [(x - y) / x * 100 for x, y in zip(b, a)]],  # noqa: B905
    "6.2": [se, lambda values: torch.tensor(values).std() / len(values) ** 0.5],
    "6.3": [need, lambda spread, effect: next(n for n in range(2, 999) if effect >= 2 * spread / n**0.5 - 1e-9)],
    "6.4": [HYPOTHESIS, HYPOTHESIS | {"change": {"top_k": None}, "saves": 0.5, "convincing": np.float64(2)}],
    "6.5": [range_of, in_capitals],
    "6.6": [
        f"{QUESTION} {FINDING} {LIMIT}",
        f"{QUESTION}\n{FINDING.replace('%', ' percent')}\n{LIMIT[:-1]}!\n",
        f"{QUESTION} On one photograph (e.g. coffee) a radius of 1 costs (1.2 ± 0.8)% of the bits. {LIMIT}",
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
        (lambda s, p: coded(s.ravel()[::-1], p).get_compressed()[None], "reverse order"),
        (lambda s, p: [10**400], "should be numbers"),
        (lambda s, p: coded(s.ravel(), p, perfect=True).get_compressed(), "not by the coder of this lesson"),
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
        (lambda basis: torch.tensor(basis).reshape(64, 1, 8, 8), "stops with ValueError"),
    ],
    "2.5": [
        (lambda y, training: y + torch.randn_like(y) if training else torch.round(y), "goes up to"),
        (lambda y, training: y + torch.rand_like(y) if training else torch.round(y), "has the mean 0.5"),
        (lambda y, training: torch.round(y), "rounds in training"),
        (lambda y, training: noise(y) if not training else torch.round(y), "changed places"),
        (lambda y, training: noise(y.detach()) if training else torch.round(y), "no gradient"),
        (lambda y, training: noise(y.double()) if training else torch.round(y), "type torch.float32"),
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
        (lambda y, s: bits(y, s).numpy(), "should be a tensor"),
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
        (lambda y, h_a, h_s, t: side(y, lambda v: h_a(v).detach(), h_s, t), "gets no gradient through z_hat"),
    ],
    "3.5": [
        (lambda y, s, z, t: bits(y, s).sum(), "bits of z are missing"),
        (lambda y, s, z, t: bits(y, s).mean() + bits(z, t).mean(), "two means"),
    ],
    "4.1": [
        (lambda side: np.arange(side**2).reshape(side, side) <= side**2 // 2, "predicted from itself"),
        (lambda side: before(side).T, "column after column"),
        (lambda side: 1 - before(side), "come *later*"),
        (lambda side: np.eye(side), "should be 1"),
        (lambda side: before(5), "`causal_mask(3)` should have the shape [3, 3]"),
        (lambda side: np.repeat(np.arange(side) < side // 2, side).reshape(side, side), "left in the same row"),
    ],
    "4.2": [
        (lambda u, weight, bias, mask: conv(u, weight, bias, mask * 0 + 1), "the mask is not used"),
        (lambda u, weight, bias, mask: conv(u, weight, None, mask), "the bias is missing"),
        (lambda u, weight, bias, mask: conv(u, weight, bias, mask, padding=0), "smaller than the image"),
        (lambda u, weight, bias, mask: conv(u, weight, bias, 1 - mask), "not with 1 - mask"),
        (lambda u, weight, bias, mask: conv(u, weight.detach(), bias, mask), "no gradient"),
        (conv_of_its_own, "never learn"),
        (lambda u, weight, bias, mask: conv(u, weight, bias, mask, padding=2), "`masked_conv` of [2, 3, 6, 7]"),
    ],
    "4.3": [
        (lambda *given: by_gradient(*given, of=slice(1)), "Look at both things"),
        (lambda *given: by_gradient(*given, channels=slice(1)), "Look at all channels"),
        (of_all_sites, "nearly every place seems to matter"),
        (lambda *given: by_trying(*given, copy=lambda u: u), "Change a copy of u"),
        (lambda *given: by_gradient(*given, of=slice(1, 2)), "do you look at both things"),
        (lambda network, u, row, column: by_gradient(network, u, column, row), "the place"),
    ],
    "4.4": [
        (lambda *given: in_raster_order(*given, again=False), "must run again after each site"),
        (lambda *given: in_raster_order(*given, sites=by_columns), "The encoder went row by row"),
        (lambda *given: in_raster_order(*given, write=False), "written into u before"),
        (lambda *given: in_raster_order(*given, sites=lambda h, w: np.ndindex(h, h)), "has 3 rows and 4 columns"),
        (lambda u, network, read: network(u)[0], "and 0 are read"),
    ],
    "4.5": [
        (lambda network, u: [v * ~board(u) for v in network(u)], "each site sees itself"),
        (lambda network, u: network(u * board(u)), "sites of the first half have a shift"),
        (lambda network, u: [v * board(u) for v in network(u * board(u))], "Keep the other one"),
        (lambda network, u: network(u * (torch.arange(6) % 2)), "is no half of a checkerboard"),
        (lambda network, u: [v * ~board(u) for v in network(u.mul_(board(u)))], "it changes u itself"),
    ],
    "5.1": [
        (lambda q, k: q @ k.T / 3, "every token sees all others"),
        (lambda q, k: causal(q @ k.T), "square root of d is missing"),
        (lambda q, k: causal(q @ k.T / 9), "Divide by its square root"),
        (lambda q, k: causal(k @ q.T / 3), "rows and columns have changed places"),
        (lambda q, k: causal(q @ k.T / 3, 0), "see itself, too"),
        (lambda q, k: (q @ k.T / 3).tril(), "is 0, and a softmax makes"),
        (lambda q, k: (q @ k.T / 3) * torch.ones(5, 5).tril().log().exp().log(), "not a number"),
    ],
    "5.2": [
        (lambda scores, k: scores.softmax(-1), "more than k probabilities"),
        (lambda scores, k: scores.softmax(-1) * (top_k(scores, k) > -torch.inf), "*before* softmax"),
        (lambda scores, k: top_k(scores, k).exp(), "divides by the sum"),
        (lambda scores, k: scores.softmax(0), "Each *row* should"),
        (lambda scores, k: top_k(scores, k).nan_to_num(neginf=0).softmax(-1), "must stay so"),
    ],
    "5.3": [
        (lambda h: offsets(h, lambda dy, dx, h: True), "the whole square"),
        (lambda h: offsets(h, lambda dy, dx, h: dy**2 + dx**2 <= h**2), "this is a circle"),
        (lambda h: offsets(h, lambda dy, dx, h: 0 < abs(dy) + abs(dx) <= h), "(0, 0) is missing"),
        (lambda h: offsets(h, lambda dy, dx, h: abs(dy) + abs(dx) < h), "its border is missing"),
        (lambda h: [offset[::-1] for offset in offsets(h)], "changed places"),
        (lambda h: offsets(h)[::-1], "but not their order"),
        (lambda h: len(offsets(h)), "a list of pairs"),
    ],
    "5.4": [
        (lambda computed, start: computed, "nothing is shifted"),
        (lambda computed, start: torch.roll(computed, 1, 0), "by the *last* token"),
        (lambda computed, start: torch.cat((start[None], computed)), "one feature too many"),
        (lambda computed, start: computed[:-1], "one feature is missing"),
        (lambda computed, start: torch.cat((computed[1:], start[None])), "shifts the other way"),
        (lambda computed, start: torch.cat((start[None], computed[1:])), "Shift all by one"),
        (lambda computed, start: np.vstack((start.detach(), computed.detach()[:-1])), "should be a tensor"),
    ],
    "5.5": [
        (lambda *given: hide(*given, ahead=0), "count from `query + 1`"),
        (lambda *given: hide(*given, borders=False), "at the other side of the picture"),
        (lambda *given: hide(*given, copy=False), "Begin with `scores = scores.clone()`"),
        (lambda *given: hide(*given, first=0), "token 0 loses its only key"),
        (lambda *given: hide(*given, own=False), "the token's own, and stays"),
        (lambda *given: hide(*given, heads=0), "in all of them"),
        (lambda *given: given[0].clone(), "does not hide key"),
    ],
    "6.1": [
        (lambda b, a: 1 - a / b, "these are parts of 1"),
        (lambda b, a: 100 * (a / b - 1), "the sign"),
        (lambda b, a: 100 * (b / a - 1), "you divide by `after`"),
        (lambda b, a: 100 * (1 - a / b).mean(), "this is the mean"),
        (lambda b, a: [[1.0], [2.0, 3.0]], "should be numbers"),
    ],
    "6.2": [
        (lambda values: np.std(values, ddof=1), "the spread of single seeds"),
        (lambda values: se(values, ddof=0), "`ddof=1`"),
        (lambda values: se(values, root=1), "Divide by its square root"),
    ],
    "6.3": [
        (lambda *given: need(*given, errors=1), "We want two"),
        (lambda *given: need(*given, least=0), "Fewer than 2 seeds"),
        (lambda *given: need(*given, up=float), "round up"),
        (lambda *given: need(*given, up=np.floor), "Round up"),
        (lambda *given: need(*given, power=1), "the *square*"),
    ],
    "6.4": [
        (HYPOTHESIS | {"change": {"radius": 1, "top_k": 4}}, "Two are two studies"),
        (HYPOTHESIS | {"change": {"radios": 1}}, "no such model can be built"),
        (HYPOTHESIS | {"change": {"heads": 5}}, "no such model can be built"),
        (HYPOTHESIS | {"convincing": 0}, "should be above 0"),
        (HYPOTHESIS | {"because": "we try"}, "at least six words"),
        ({"change": {"radius": 1}}, "`saves` is missing"),
        (HYPOTHESIS | {"saves": "-2"}, "without quotation marks"),
        (HYPOTHESIS | {"change": {"window": 4}}, "does not use `window`"),
        (HYPOTHESIS | {"change": {"M": 64}}, "does not use `M`"),
    ],
    "6.5": [
        (lambda e, d, c: "saves" if e > 0 else "costs", "and you say 'saves'"),
        (lambda e, d, c: range_of(e, 0, c), "you say"),
        (lambda e, d, c: e - d >= c, "one of the four words"),
        (lambda e, d, c: "maybe", "none of the four words"),
        (lambda e, d, c: "no effect" if abs(e) < c and d < c else range_of(e, d, c), "and you say 'no effect'"),
        (lambda e, d, c: "no effect" if abs(e) + d <= c else range_of(e, d, c), "and you say 'no effect'"),
    ],
    "6.6": [
        (f"{QUESTION} {FINDING}", "three sentences, and I count 2"),
        (f"{QUESTION} A radius of 1 costs some bits in our runs. {LIMIT}", "Give its number in percent"),
        (f"{QUESTION} A radius of 1 costs 1.2% in our runs. {LIMIT}", "no doubt beside it"),
        (f"{QUESTION} {FINDING} Who knows?", "very short"),
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
    assert "<code>probs[probs &gt; 0]</code>" in hint("1.1")._repr_html_()


def test_a_photograph_has_no_square_larger_than_itself():
    assert grey("chelsea", 288).shape == (288, 288)
    with pytest.raises(DataError, match="chelsea has 451 x 300 pixels"):
        grey("chelsea", 301)
