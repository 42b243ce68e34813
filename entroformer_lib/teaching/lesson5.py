"""Lesson 5, attention as a context model: what its checks look at, and its hints."""

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.teaching.answers import array, called, shaped, tensor
from entroformer_lib.teaching.exercises import Wrong, exercise


@exercise(
    "5.1",
    "write the body of `scores`, where the three dots stand.",
    hints=(
        "All products of queries and keys at once: a product of matrices. Then divide, then hide what is not allowed.",
        "`q @ k.T` has a row for each query. Row i may keep the columns 0 to i. "
        "`torch.ones(n, n).triu(diagonal=1).bool()` is True in the others.",
        "`(q @ k.T / d**0.5).masked_fill(torch.ones(n, n).triu(diagonal=1).bool(), -torch.inf)`",
    ),
)
def scores(answer) -> str:
    """A function from queries and keys [n, d] to scores [n, n]."""
    generator = torch.Generator().manual_seed(12)
    q, k = (torch.randn(5, 9, generator=generator) for _ in range(2))
    got = shaped(called(answer, q.clone(), k.clone()), (5, 5), "what `scores` returns", minus_infinity=True)
    right = array(q @ k.T / 3)
    seen, allowed = got > -np.inf, np.tri(5, dtype=bool)
    _look_at_scores(got, right, seen, allowed)
    return "A token sees itself and what comes before it, so the first sees one key and the last all five."


def _look_at_scores(got: np.ndarray, right: np.ndarray, seen: np.ndarray, allowed: np.ndarray) -> None:
    if seen.all() and np.allclose(got[~allowed], 0):
        raise Wrong("what is not allowed is 0, and a softmax makes a probability of it. Put minus infinity there.")
    if seen.all():
        raise Wrong("every token sees all others, those that come later, too. Put minus infinity there.")
    if np.array_equal(seen, allowed.T):
        raise Wrong("tokens see what comes *later*. A row is a query: it keeps the columns up to its own number.")
    if np.array_equal(seen, np.tri(5, k=-1, dtype=bool)):
        raise Wrong("a token should see itself, too. The first one would have nothing to look at.")
    if not np.array_equal(seen, allowed):
        raise Wrong("some tokens see what they may not, or not all that they may. Row i keeps the columns 0 to i.")
    if np.allclose(got[allowed], right.T[allowed], atol=1e-4):
        raise Wrong("rows and columns have changed places: a row should belong to a query, so `q @ k.T`.")
    if np.allclose(got[allowed], 3 * right[allowed], atol=1e-4):
        raise Wrong("the division by the square root of d is missing. d is the length of a query.")
    if np.allclose(got[allowed], right[allowed] / 3, atol=1e-4):
        raise Wrong("you divide by d. Divide by its square root.")
    if not np.allclose(got[allowed], right[allowed], atol=1e-3):
        raise Wrong(f"the score of query 1 and key 0 is {right[1, 0]:.3f}, and you get {got[1, 0]:.3f}.")


@exercise(
    "5.2",
    "write the body of `attention`, where the three dots stand.",
    hints=(
        "First find the k-th largest score of each row. What is below it becomes minus infinity. Then comes softmax.",
        "`scores.topk(k, dim=-1).values[:, -1:]` is the k-th largest of each row. With fewer columns, take all.",
        "`smallest = scores.topk(min(k, scores.shape[-1])).values[:, -1:]`, then "
        "`scores.masked_fill(scores < smallest, -torch.inf).softmax(dim=-1)`.",
    ),
)
def attention(answer) -> str:
    """A function from scores [n, n] and k to probabilities."""
    values = torch.randn(6, 6, generator=torch.Generator().manual_seed(13)) * 2
    values = values.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    for k in (3, 1, 100):
        got = called(answer, values.clone(), k)
        got = shaped(got, (6, 6), f"`attention` of [6, 6] with k = {k}", minus_infinity=True)
        _look_at_attention(got, values, k)
    return "Of each row at most k are above 0, and they add up to 1."


def _kept(values: Tensor, k: int) -> Tensor:
    smallest = values.topk(min(k, values.shape[-1])).values[:, -1:]
    return values.masked_fill(values < smallest, -torch.inf)


def _look_at_attention(got: np.ndarray, values: Tensor, k: int) -> None:
    right, dense = array(_kept(values, k).softmax(dim=-1)), array(values.softmax(dim=-1))
    if np.allclose(got, right, atol=1e-4):
        return
    if np.allclose(got, dense, atol=1e-4):
        raise Wrong(f"with k = {k}, more than k probabilities of a row are above 0. The others are to be taken away.")
    if np.allclose(got, np.where(right > 0, dense, 0), atol=1e-4):
        raise Wrong("the rows do not add up to 1: take the other scores away *before* softmax, not after it.")
    if np.allclose(got, array(_kept(values, k).exp()), atol=1e-4):
        raise Wrong("the rows do not add up to 1. Softmax divides by the sum of the row.")
    if (got[np.triu_indices(6, 1)] > 1e-6).any():
        raise Wrong("later tokens get a probability above 0. Their score is minus infinity and must stay so.")
    if np.allclose(got.sum(axis=0), 1, atol=1e-4):
        raise Wrong("the columns add up to 1. Each *row* should: `softmax(dim=-1)`.")
    most = int((got > 1e-6).sum(axis=1).max())
    if most > k:
        raise Wrong(f"with k = {k}, a row has {most} probabilities above 0. Is k counted for each row?")
    raise Wrong(f"with k = {k}, the last row should be {np.round(right[-1], 2)}, and yours is {np.round(got[-1], 2)}.")


@exercise(
    "5.3",
    "write the body of `diamond`, where the three dots stand.",
    hints=(
        "Go through a square of (2h + 1) x (2h + 1) offsets row by row, and keep some of them. Which?",
        "`for dy in range(-h, h + 1)`, inside it `for dx in range(-h, h + 1)`, and keep what has "
        "`abs(dy) + abs(dx) <= h`.",
        "`[(dy, dx) for dy in range(-h, h + 1) for dx in range(-h, h + 1) if abs(dy) + abs(dx) <= h]`",
    ),
)
def diamond(answer) -> str:
    """A function from h to the offsets inside."""
    for h in (3, 1, 2):
        got = array(called(answer, h), "what `diamond` returns")
        around = range(-h, h + 1)
        square = [(dy, dx) for dy in around for dx in around]
        right = [offset for offset in square if sum(map(abs, offset)) <= h]
        if got.ndim != 2 or got.shape[1] != 2:
            raise Wrong(f"it should be a list of pairs (rows, columns), and has the shape {list(got.shape)}.")
        _look_at_diamond([tuple(map(int, offset)) for offset in got], right, square, h)
    return "25 offsets for h = 3; with the one for outside, 26 vectors."


def _look_at_diamond(got: list, right: list, square: list, h: int) -> None:
    if got == right:
        return
    if sorted(got) == square:
        raise Wrong("this is the whole square. Inside the diamond rows and columns *together* are at most h.")
    if sorted(got) == [offset for offset in square if 0 < sum(map(abs, offset)) <= h]:
        raise Wrong("(0, 0) is missing: a token looks at itself, too.")
    if sorted(got) == [offset for offset in square if sum(map(abs, offset)) < h]:
        raise Wrong("its border is missing: a distance of exactly h is inside.")
    if sorted(got) == [o for o in square if o[0] ** 2 + o[1] ** 2 <= h * h]:
        raise Wrong("this is a circle. The distance of a diamond is |rows| + |columns|.")
    if [offset[::-1] for offset in got] == right:
        raise Wrong("rows and columns have changed places. Go row by row: rows come first in a pair.")
    if sorted(got) == right:
        raise Wrong("the offsets are right, but not their order. Go row by row from the top, left to right.")
    if len(set(got)) != len(got):
        raise Wrong("some offsets occur twice.")
    raise Wrong(f"for h = {h} there are {len(right)} offsets, from {right[0]} to {right[-1]}, and you give {len(got)}.")


@exercise(
    "5.4",
    "write the body of `shifted`, where the three dots stand.",
    hints=(
        "Latent 0 is predicted by `start`, latent 1 by token 0, latent 2 by token 1. Who predicts nothing?",
        "Put `start` in front and leave the last token out. `start[None]` has the shape [1, D].",
        "`torch.cat((start[None], computed[:-1]))`",
    ),
)
def shifted(answer) -> str:
    """A function from [n, D] and [D] to [n, D]."""
    computed, start = torch.arange(12.0).reshape(4, 3) + 1, torch.tensor([-1.0, -2.0, -3.0])
    given = (computed.clone().requires_grad_(), start.clone().requires_grad_())
    got = array(tensor(called(answer, *given), "what `shifted` returns"))
    if got.shape == (5, 3):
        raise Wrong("there is one feature too many. The last token predicts nothing: there is no latent after it.")
    if got.shape == (3, 3):
        raise Wrong("one feature is missing. What predicts latent 0?")
    got = shaped(got, (4, 3), "what `shifted` returns")
    whole, first = array(computed), array(start)
    if np.array_equal(got, whole):
        raise Wrong("nothing is shifted, so latent i is predicted by the token that carries it.")
    if np.array_equal(got, np.roll(whole, 1, axis=0)):
        raise Wrong("latent 0 is predicted by the *last* token. That goes around in a circle. Put `start` there.")
    if np.array_equal(got[:-1], whole[1:]):
        raise Wrong("this shifts the other way: latent 0 is predicted by token 1, which is decoded later.")
    if np.array_equal(got[1:], whole[1:]):
        raise Wrong("`start` takes the place of token 0, but the others still predict themselves. Shift all by one.")
    if np.array_equal(got, np.concatenate((whole[:-1], first[None]))):
        raise Wrong("`start` stands at the end. It predicts the first latent.")
    if not np.array_equal(got, np.concatenate((first[None], whole[:-1]))):
        raise Wrong("row 0 should be `start`, row 1 what token 0 has computed, and so on.")
    return "Latent i is predicted by token i - 1, which has seen everything before latent i."


@exercise(
    "5.5",
    "write the body of `hide`, where the three dots stand.",
    hints=(
        "Go through the queries. For each: which site does it predict, in which row and column? Where is the key then?",
        "`row, column = divmod(query + 1, width)`. The key's number is `(row + dy) * width + column + dx`, if that "
        "place is inside the picture and its number at most the query's. Leave query 0 as it is.",
        "In the loop: `if row + dy >= 0 and 0 <= column + dx < width and key <= query and query > 0: "
        "scores[:, :, i, key] = -torch.inf`. Before it `scores = scores.clone()`, after it `return scores`.",
    ),
)
def hide(answer) -> str:
    """A function from scores, queries, dy, dx and width to scores."""
    height, width = 4, 5
    n = height * width
    whole = torch.randn(1, 2, n, n, generator=torch.Generator().manual_seed(14))
    whole = whole.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    for part in (torch.arange(n), torch.arange(7, 14)):  # attention comes in tiles of queries
        for dy, dx in ((-1, 0), (-1, 1), (0, -1), (0, -2), (-1, -1), (-2, 2)):
            given = whole[:, :, part]
            kept = given.clone()
            answered = called(answer, given, part.clone(), dy, dx, width)
            if not torch.equal(given, kept):
                raise Wrong("it changes the scores that it gets. Begin with `scores = scores.clone()`.")
            got = shaped(answered, tuple(kept.shape), f"`hide` with dy = {dy}, dx = {dx}", minus_infinity=True)
            _look_at_hidden(got, kept.double().numpy(), part.numpy(), (dy, dx), width)
    return "And token 0 keeps its only key, whatever is hidden."


def _hidden(queries: np.ndarray, n: int, offset: tuple[int, int], width: int, ahead: int = 1) -> np.ndarray:
    """Which key each query should not see: bool [q, n].  ahead: the site counted from is so many after the token's"""
    found = np.zeros((len(queries), n), dtype=bool)
    for i, query in enumerate(queries):
        row, column = divmod(int(query) + ahead, width)
        y, x = row + offset[0], column + offset[1]
        if query > 0 and y >= 0 and 0 <= x < width and y * width + x <= query:
            found[i, y * width + x] = True
    return found


def _look_at_hidden(
    got: np.ndarray, before: np.ndarray, queries: np.ndarray, offset: tuple[int, int], width: int
) -> None:
    n, words = before.shape[-1], f"for dy = {offset[0]}, dx = {offset[1]}"
    right, visible = _hidden(queries, n, offset, width), np.arange(n) <= queries[:, None]
    own = np.arange(n) == queries[:, None]
    gone = (got == -np.inf) & visible
    if (got[:, :, ~visible] > -np.inf).any():
        raise Wrong("keys that come later can be seen now. What is minus infinity must stay so.")
    if not (gone == gone[:1, :1]).all():
        raise Wrong("heads or pictures differ. Hide the key in all of them: `scores[:, :, i, key]`.")
    gone = gone[0, 0]
    if gone.all(axis=1, where=visible).any():
        raise Wrong(f"{words}, token 0 loses its only key, and a softmax of nothing is no number. Leave it as it is.")
    if np.array_equal(gone, right & ~own) and (right & own).any():
        raise Wrong(f"{words}, the key is the token's own, and stays. Hide it, too, in all tokens but 0.")
    if np.array_equal(gone, _hidden(queries, n, offset, width, ahead=0)) and not np.array_equal(gone, right):
        raise Wrong("you count from the token. It predicts the *next* site: count from `query + 1`.")
    if not np.array_equal(gone, right):
        query, key = np.argwhere(gone != right)[0]
        if gone[query, key] and (key % width - (queries[query] + 1) % width) != offset[1]:
            raise Wrong(f"{words}, a key at the other side of the picture is hidden. Is column + dx inside?")
        does, should = ("hides", "should not") if gone[query, key] else ("does not hide", "should")
        raise Wrong(f"{words} and rows of {width}, token {queries[query]} {does} key {key}, and {should}.")
    if not np.allclose(np.where(right, 0, got)[:, :, visible], np.where(right, 0, before)[:, :, visible]):
        raise Wrong("other scores have changed. Only the hidden one becomes minus infinity.")
