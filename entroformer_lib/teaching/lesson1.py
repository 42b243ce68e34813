"""Lesson 1, bits and entropy: what its checks look at, and its hints."""

import contextlib
from math import log2

import constriction
import numpy as np

from entroformer_lib.teaching.answers import array, called, number, shaped
from entroformer_lib.teaching.exercises import Wrong, exercise
from entroformer_lib.teaching.photographs import grey


@exercise(
    "1.1",
    "write the body of `entropy`, where the three dots stand.",
    hints=(
        "Begin with the cost of each symbol, then take the average. An average over probabilities is a weighted sum.",
        "`np.log2` works on whole arrays and gives minus infinity for 0. Take what is above 0: `probs[probs > 0]`.",
        "`p = probs[probs > 0]`, then `-(p * np.log2(p)).sum()`.",
    ),
)
def entropy(answer) -> str:
    """A function from probabilities to bits."""
    fair = number(called(answer, np.full(8, 1 / 8)), "the entropy of 8 equal probabilities")
    if np.isclose(fair, -3) or np.isclose(fair, -3 * np.log(2)):
        raise Wrong("the sign. Logarithms of probabilities are negative, and a cost is positive.")
    if np.isclose(fair, 3 * np.log(2)):
        raise Wrong(f"eight equal symbols cost 3 bits, and you get {fair:.3f}. Which logarithm gives bits?")
    if np.isclose(fair, 3 / 8):
        raise Wrong("you took the mean over the symbols. Weight each cost with its probability and add them up.")
    if not np.isclose(fair, 3):
        raise Wrong(f"eight equal symbols cost 3 bits each, and you get {fair:.3f}.")
    skewed = number(called(answer, np.array([0.5, 0.25, 0.25])), "the entropy of 1/2, 1/4, 1/4")
    if not np.isclose(skewed, 1.5):
        raise Wrong(f"1/2, 1/4 and 1/4 have an entropy of 1.5 bits, and you get {skewed:.3f}.")
    with np.errstate(all="ignore"):
        zero = called(answer, np.array([0.5, 0.5, 0.0]))
    if not np.isfinite(np.asarray(zero, dtype=float)).all():
        raise Wrong("a probability of 0 gives NaN, because 0 * log2(0) is not a number. Leave such symbols out.")
    if not np.isclose(number(zero), 1, atol=1e-4):
        raise Wrong(f"1/2, 1/2 and 0 have an entropy of 1 bit, and you get {number(zero):.3f}.")
    return "A coin with two equal sides has an entropy of 1 bit: that is what a bit is."


@exercise(
    "1.2",
    "write the body of `compress`, where the three dots stand.",
    hints=(
        "The four lines above the exercise are nearly the answer. What must be done to `symbols` before?",
        "An image has two axes, and the coder wants one: `np.ravel`. It also wants the type `int32`.",
        "`encoder.encode(np.ravel(symbols).astype(np.int32), model)`, and `return encoder.get_compressed()`.",
    ),
)
def compress(answer) -> str:
    """A function from symbols [H, W] and probabilities to words of 32 bits."""
    rng = np.random.default_rng(1)
    probs = np.array([0.7, 0.2, 0.1])
    symbols = rng.choice(3, (20, 100), p=probs).astype(np.uint8)
    words = called(answer, symbols, probs)
    if isinstance(words, tuple | constriction.stream.queue.RangeEncoder):
        raise Wrong("return the words themselves: `encoder.get_compressed()`.")
    if isinstance(words, bytes):
        words = np.frombuffer(words, np.uint32)
    words = array(words, "what `compress` returns").astype(np.uint32).ravel()
    if not words.size:
        raise Wrong("no words come back. Is `encode` called before `get_compressed`?")
    model = constriction.stream.model.Categorical(probs, perfect=False)
    try:
        decoded = constriction.stream.queue.RangeDecoder(words).decode(model, symbols.size)
    except (AssertionError, ValueError):
        decoded = np.zeros(0)
    bits, promised = 32 * words.size, -np.log2(probs)[symbols].sum()
    if np.array_equal(decoded, symbols.ravel()[::-1]):
        raise Wrong("the symbols come out in reverse order. Give them to the coder from first to last.")
    if np.array_equal(decoded, symbols.T.ravel()):
        raise Wrong("the symbols come out column after column. Give them to the coder row after row.")
    if not np.array_equal(decoded, symbols.ravel()) and _decoded_otherwise(words, probs, symbols):
        raise Wrong("it is decoded, but not by the coder of this lesson: `RangeEncoder`, with `perfect=False`.")
    if not np.array_equal(decoded, symbols.ravel()):
        raise Wrong("what comes out of the decoder is not what went in. Are `probs` the coder's probabilities?")
    return f"2,000 symbols became {bits:,} bits; their probabilities promised {promised:,.0f}."


def _decoded_otherwise(words: np.ndarray, probs: np.ndarray, symbols: np.ndarray) -> bool:
    """Whether another coder of constriction makes the symbols of the words."""
    stream, found = constriction.stream, []
    models = [stream.model.Categorical(probs, perfect=perfect) for perfect in (False, True)]
    for make in (stream.queue.RangeDecoder, stream.stack.AnsCoder):
        for model in models:
            with contextlib.suppress(AssertionError, ValueError):
                found.append(make(words).decode(model, symbols.size))
    return any(np.array_equal(one, symbols.ravel()) for one in found)


@exercise(
    "1.3",
    "write the body of `cross_entropy`, where the three dots stand.",
    hints=(
        "Compare with the entropy. There the same probabilities do two things; here p and q do one each.",
        "q decides what a symbol costs. p decides how often we pay.",
        "`-(p * np.log2(q)).sum()`",
    ),
)
def cross_entropy(answer) -> str:
    """A function from two lists of probabilities to bits."""
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.8, 0.1, 0.1])
    right, swapped = -(p * np.log2(q)).sum(), -(q * np.log2(p)).sum()
    own = -(p * np.log2(p)).sum()
    got = number(called(answer, p, q), "the cross entropy")
    if np.isclose(got, -right):
        raise Wrong("the sign. Logarithms of probabilities are negative, and a cost is positive.")
    if np.isclose(got, swapped):
        raise Wrong("p and q have changed places. The symbol *occurs* with p, and it is *coded* with q.")
    if np.isclose(got, right - own):
        raise Wrong("this is only what is paid too much (the Kullback-Leibler divergence). We ask for the whole price.")
    if np.isclose(got, own):
        raise Wrong("this is the entropy of p. Where does q come in?")
    if np.isclose(got, right * np.log(2)):
        raise Wrong("this is right in another unit. Which logarithm gives bits?")
    if not np.isclose(got, right):
        raise Wrong(f"for p = 1/2, 1/4, 1/4 and q = 0.8, 0.1, 0.1 it is {right:.3f} bits, and you get {got:.3f}.")
    return f"Here the wrong model costs {right:.2f} bits where the right one would cost {own:.2f}."


@exercise(
    "1.4",
    "write the body of `residual`, where the three dots stand.",
    hints=(
        "The pixel at [row, column] minus the pixel at [row, column - 1]. What happens to bytes below 0?",
        "Turn the image into `int` first. `np.diff(..., axis=1, prepend=0)` keeps the first column.",
        "`np.diff(np.asarray(image).astype(int), axis=1, prepend=0) % 256`",
    ),
)
def residual(answer) -> str:
    """A function from bytes [H, W] to bytes [H, W] that a sum over the columns undoes."""
    image = np.array([[10, 12, 9, 9], [250, 4, 4, 255], [0, 0, 128, 1]], dtype=np.uint8)
    right = np.diff(image.astype(int), axis=1, prepend=0)
    got = array(called(answer, image.copy()), "what `residual` returns")
    if got.shape == (3, 3):
        raise Wrong("a column is missing. The first column has no left neighbour and stays as it is.")
    got = shaped(got, image.shape, "what `residual` returns")
    if np.array_equal(got % 256, right % 256) and (got.min() < 0 or got.max() > 255):
        raise Wrong("the differences are right, but some are outside 0 … 255. Take them modulo 256.")
    if np.array_equal(got, np.abs(right)) or np.array_equal(got, np.clip(right, 0, 255)):
        raise Wrong("the sign is lost, so nobody can undo it. Take the difference modulo 256: -3 becomes 253.")
    if np.array_equal(got % 256, -right % 256):
        raise Wrong("the sign. Take the left neighbour away from the pixel, not the pixel from its neighbour.")
    if np.array_equal(got % 256, np.diff(image.astype(int), axis=0, prepend=0) % 256):
        raise Wrong("these are differences to the pixel above. Which axis runs from left to right?")
    if not np.array_equal(got % 256, right % 256):
        row, column = np.argwhere(got % 256 != right % 256)[0]
        raise Wrong(
            f"at row {row}, column {column} the pixel is {image[row, column]} and the answer should be "
            f"{right[row, column] % 256}; you get {got[row, column]:g}."
        )
    return "Nothing is lost: adding up the columns gives the picture back."


@exercise(
    "1.5",
    "write the three parts of `Adaptive`, where the three dots stand.",
    hints=(
        "Keep one number for each symbol: how often it was seen. Before anything was seen it must not be 0. Why?",
        "`np.ones(number_of_symbols)` is a good beginning. Probabilities are counts divided by their sum.",
        "`self.counts[symbol] += 1` learns. A smaller beginning, such as 0.1 for each symbol, learns faster.",
    ),
)
def adaptive(answer) -> str:
    """A class with `probs` and `update`, or a function that makes such an object."""
    if not callable(answer):
        raise Wrong('give the class itself, `check("1.5", Adaptive)`.')
    model = called(answer, 4, what="`Adaptive(4)`")
    for method in ("probs", "update"):
        if not callable(getattr(model, method, None)):
            raise Wrong(f"what `Adaptive(4)` makes has no method `{method}`. Keep the three names of the exercise.")
    first = shaped(called(model.probs), (4,), "`probs()` of a model of 4 symbols")
    if (first <= 0).any():
        raise Wrong(
            "at the beginning a symbol has probability 0. The coder could not write it. Begin with counts above 0."
        )
    _add_up(first)
    if not np.allclose(first, 1 / 4):
        raise Wrong("before anything was seen, all symbols should be equally probable.")
    kept = first.copy()
    for symbol in (2, 2, 1):
        called(model.update, symbol)
    after = shaped(called(model.probs), (4,), "`probs()` after three symbols")
    if np.allclose(after, kept):
        raise Wrong("`update` changes nothing: the probabilities are as before.")
    if (after <= 0).any():
        raise Wrong("after an update some symbol has probability 0. What was not seen yet must stay possible.")
    _add_up(after)
    if not after[2] > after[1] > after[0]:
        raise Wrong("after the symbols 2, 2, 1 the symbol 2 should be the most probable, then 1, then the others.")
    other = called(answer, 4, what="`Adaptive(4)`")
    if not np.allclose(array(called(other.probs)), kept):
        raise Wrong(
            "a second model remembers what the first has seen. Make the counts in `__init__`, as `self.counts`."
        )
    rng, learner = np.random.default_rng(2), called(answer, 4, what="`Adaptive(4)`")
    truth, bits = np.array([0.85, 0.05, 0.05, 0.05]), 0.0
    for symbol in rng.choice(4, 400, p=truth):
        bits -= np.log2(array(called(learner.probs))[symbol])
        called(learner.update, int(symbol))
    if bits / 400 > 1.3:
        raise Wrong(
            f"it learns too slowly: after 400 symbols it has paid {bits / 400:.2f} bits for each, where equal "
            "probabilities cost 2 and the true ones cost 0.85. Does every symbol count?"
        )
    return f"On a test message of entropy 0.85 it pays {bits / 400:.2f} bits a symbol, learning included."


def _add_up(probs: np.ndarray) -> None:
    if not np.isclose(probs.sum(), 1):
        raise Wrong(f"the probabilities add up to {probs.sum():.3f} instead of 1. Divide the counts by their sum.")


@exercise(
    "1.6",
    "write the body of `context`, where the three dots stand.",
    hints=(
        "A difference of -20 is as busy as one of 20. So begin with the absolute values.",
        "Add the two absolute values. There are many small sums and few large ones, so a logarithm makes good classes.",
        "`min(7, int(np.log2(1 + abs(from_left) + abs(from_above))))`",
    ),
)
def context(answer) -> str:
    """A function from two signed differences to 0 … 7, or to as many other things as it likes, up to 8."""
    photo = grey("astronaut")[100:228, 150:278].astype(int)
    signed = (np.diff(photo, axis=1, prepend=0) + 128) % 256 - 128
    left = np.pad(signed, ((0, 0), (1, 0)))[:, :-1].ravel().tolist()
    above = np.pad(signed, ((1, 0), (0, 0)))[:-1].ravel().tolist()
    table = {pair: called(answer, *pair) for pair in {*zip(left, above, strict=True), (-127, -127), (127, 127)}}
    for pair, got in table.items():
        value = number(got, f"`context{pair}`")
        if value != int(value) or not 0 <= value <= 7:
            raise Wrong(f"`context{pair}` is {value:g}. It should be a whole number from 0 to 7.")
    chosen = [int(number(table[pair])) for pair in zip(left, above, strict=True)]
    symbols = (signed.ravel() % 256).tolist()
    plain, yours = _bits(symbols, [0] * len(symbols)), _bits(symbols, chosen)
    if len(set(chosen)) == 1:
        raise Wrong(f"every pixel gets the context {chosen[0]}. Let it depend on the neighbours.")
    if yours > 0.97 * plain:
        raise Wrong(
            f"on a test picture it saves {1 - yours / plain:.1%}, and 5% is possible. Quiet neighbours should "
            "give another context than busy ones, whatever the sign of the differences."
        )
    return f"On a test picture it saves {1 - yours / plain:.1%} of the bits."


def _bits(symbols: list[int], contexts: list[int]) -> float:
    """What adaptive models, one for each context, pay for symbols from 0 to 255."""
    counts, totals, bits = [[0.1] * 256 for _ in range(8)], [25.6] * 8, 0.0
    for symbol, place in zip(symbols, contexts, strict=True):
        bits += log2(totals[place] / counts[place][symbol])
        counts[place][symbol] += 1
        totals[place] += 1
    return bits
