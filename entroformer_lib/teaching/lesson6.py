"""Lesson 6, a small research project: what its checks look at, and its hints."""

import re

import numpy as np

from entroformer_lib.errors import UserError
from entroformer_lib.models.config import GROUPED_FIELDS, TRANSFORM_FIELDS, named_config
from entroformer_lib.teaching.answers import array, called, number, shaped
from entroformer_lib.teaching.exercises import Unsolved, Wrong, exercise


@exercise(
    "6.1",
    "write the body of `savings`, where the three dots stand.",
    hints=(
        "For one seed: before 0.50, after 0.49 bits per pixel. What part of the 0.50 is saved?",
        "(before - after) / before, times 100, for arrays at once.",
        "`100 * (1 - np.asarray(after) / np.asarray(before))`",
    ),
)
def savings(answer) -> str:
    """A function from rates before and after to percent."""
    before, after = np.array([0.5, 0.4, 0.8]), np.array([0.49, 0.41, 0.6])
    right = 100 * (1 - after / before)
    got = called(answer, before.copy(), after.copy())
    got = array(got, "what `savings` returns")
    if got.size == 1 and np.isclose(number(got), right.mean()):
        raise Wrong("this is the mean. One number for each seed is asked for, because their spread is needed, too.")
    got = shaped(got, (3,), "what `savings` returns")
    if np.allclose(got, right / 100):
        raise Wrong("these are parts of 1. Percent are 100 times that.")
    if np.allclose(got, -right):
        raise Wrong("the sign: where `after` is smaller, bits are saved and the number is positive.")
    if np.allclose(got, 100 * (before / after - 1)):
        raise Wrong("you divide by `after`. It should be in percent of `before`.")
    if np.allclose(got, 100 * (before - after)):
        raise Wrong("this is the difference of the rates. Divide it by `before`.")
    if not np.allclose(got, right):
        raise Wrong(f"from 0.50 to 0.49 bits per pixel 2% are saved, and you get {got[0]:g}.")
    return "From 0.50 to 0.49 bits per pixel 2% are saved, and from 0.40 to 0.41 it is -2.5%."


@exercise(
    "6.2",
    "write the body of `standard_error`, where the three dots stand.",
    hints=(
        "Two steps: the standard deviation of the values, then the root of how many there are.",
        "`np.std(values, ddof=1)` has n - 1 below the root. (`torch.std` and pandas do that by themselves.)",
        "`np.std(values, ddof=1) / np.sqrt(len(values))`",
    ),
)
def standard_error(answer) -> str:
    """A function from savings to the standard error of their mean."""
    for values in (np.array([1.0, 2.0, 4.0, 5.0]), np.array([3.0, 0.0])):
        n, right = len(values), values.std(ddof=1) / np.sqrt(len(values))
        got = number(called(answer, values.copy()), "the standard error")
        if np.isclose(got, values.std(ddof=1)):
            raise Wrong("this is the spread of single seeds. Their mean is more certain: divide by the root of n.")
        if np.isclose(got, values.std() / np.sqrt(n)):
            raise Wrong("this has n below the root, which is too small for few seeds. Take n - 1: `ddof=1`.")
        if np.isclose(got, values.std(ddof=1) / n):
            raise Wrong("you divide by n. Divide by its square root.")
        if np.isclose(got, right**2):
            raise Wrong("this is its square. A root is missing.")
        if not np.isclose(got, right):
            raise Wrong(f"for {values.tolist()} it is {right:.3f}, and you get {got:.3f}.")
    return "For savings of 1, 2, 4 and 5% the mean is 3%, and its standard error 0.91%."


@exercise(
    "6.3",
    "write the body of `seeds_needed`, where the three dots stand.",
    hints=(
        "Write the condition down: 2 * spread / sqrt(n) is at most the effect. Then solve it for n.",
        "n is at least (2 * spread / effect) squared. Round up, and never below 2.",
        "`max(2, math.ceil((2 * spread / effect) ** 2))`",
    ),
)
def seeds_needed(answer) -> str:
    """A function from spread and effect to a number of seeds."""
    for spread, effect, right in ((1.0, 0.4, 25), (1.0, 0.9, 5), (0.3, 2.0, 2), (3.0, 1.0, 36)):
        got = number(called(answer, spread, effect), "the number of seeds")
        words = f"with a spread of {spread:g}% and an effect of {effect:g}%"
        exact = (2 * spread / effect) ** 2
        if got != int(got):
            raise Wrong(f"{words} you get {got:g} seeds. It should be a whole number: round up, `math.ceil`.")
        if got < 2:
            raise Wrong(f"{words} you get {got:g}. Fewer than 2 seeds have no spread at all: `max(2, …)`.")
        if got in (np.ceil(exact / 4), np.ceil(exact) / 4) and right > 2:
            raise Wrong("so many make *one* standard error as large as the effect. We want two: 2 * spread.")
        if got == max(2, np.ceil(2 * spread / effect)) and got != right:
            raise Wrong("the root of n is in the condition, so n is the *square* of 2 * spread / effect.")
        if got == np.floor(exact) and got != right:
            raise Wrong(f"{words} {got:g} seeds are not quite enough. Round up.")
        if got != right:
            raise Wrong(f"{words} {right} seeds are needed, and you get {got:g}.")
    return "An effect of half the spread needs 16 seeds of each row."


FIELDS = ("change", "saves", "convincing", "because")
UNUSED = (*GROUPED_FIELDS, *TRANSFORM_FIELDS, "Z", "lmbdas", "rate_aware")


@exercise(
    "6.4",
    "write your `hypothesis`, where the three dots stand.",
    hints=(
        "Which field of the table makes you curious? Say first what you expect and why, then write it down.",
        'Four entries: `{"change": {FIELD: VALUE}, "saves": …, "convincing": …, "because": "…"}`.',
        '`{"change": {"radius": 1}, "saves": -2, "convincing": 1, "because": "The latent above lies two steps from the '
        'token."}`',
    ),
)
def hypothesis(answer) -> str:
    """A dictionary with one change, an expectation, the size of a convincing effect and a reason."""
    if not isinstance(answer, dict):
        raise Wrong(f"it should be a dictionary with {', '.join(FIELDS)}, and is of type {type(answer).__name__}.")
    if any(value is ... for value in answer.values()):
        raise Unsolved
    for name in FIELDS:
        if name not in answer:
            raise Wrong(f"the entry `{name}` is missing.")
    change = answer["change"]
    if not isinstance(change, dict) or len(change) != 1:
        raise Wrong('`change` should be a dictionary with one field, such as {"radius": 1}. Two are two studies.')
    if unused := [name for name in change if name in UNUSED or name.startswith("hyper")]:
        raise Wrong(
            f"a model of context alone does not use `{unused[0]}`, so nothing would change. Take another field."
        )
    try:
        named_config("tiny-context", **{"context_layers": 2, **change})
    except (UserError, TypeError, ValueError) as error:
        raise Wrong(f"no such model can be built: {' '.join(str(error).split())}") from None
    for name in ("saves", "convincing"):
        if isinstance(answer[name], str):
            raise Wrong(f"`{name}` should be a number, without quotation marks.")
    number(answer["saves"], "`saves`")
    convincing = number(answer["convincing"], "`convincing`")
    if convincing <= 0:
        raise Wrong("`convincing` is a size, so it should be above 0. Every study finds an effect above 0.")
    if not isinstance(answer["because"], str) or len(answer["because"].split()) < 6:
        raise Wrong("`because` should be a reason, in a sentence of at least six words.")
    ((field, value),) = change.items()
    return f"You change {field} to {value}, and would care for an effect of {convincing:g}%."


@exercise(
    "6.5",
    "write the body of `verdict`, where the three dots stand.",
    hints=(
        "Draw a line of numbers with three marks: -convincing, 0, convincing. Where must the whole range lie?",
        "`low, high = effect - doubt, effect + doubt`. To save, even `low` must be at or above `convincing`.",
        "If `low >= convincing`: saves. If `high <= -convincing`: costs. If `-convincing < low and high < convincing`: "
        "no effect. Else undecided.",
    ),
)
def verdict(answer) -> str:
    """A function from effect, doubt and convincing to one of four words."""
    cases = {
        (3.0, 1.0, 1.0): "saves",
        (-3.0, 1.0, 1.0): "costs",
        (0.2, 0.3, 1.0): "no effect",
        (-0.5, 0.4, 1.0): "no effect",
        (1.5, 1.0, 1.0): "undecided",
        (-1.2, 0.5, 1.0): "undecided",
        (0.1, 5.0, 1.0): "undecided",
        (0.8, 0.5, 1.0): "undecided",
        (-0.8, 0.5, 1.0): "undecided",
        (0.0, 1.0, 1.0): "undecided",
        (2.0, 0.0, 2.0): "saves",
        (-2.0, 0.0, 2.0): "costs",
    }
    for given, right in cases.items():
        got = called(answer, *given)
        if not isinstance(got, str):
            raise Wrong(f"it should return one of the four words, and returns {type(got).__name__}.")
        got = " ".join(got.lower().replace("_", " ").split())
        effect, doubt, convincing = given
        if got not in cases.values():
            raise Wrong(f"it returns {got!r}, which is none of the four words.")
        if got != right:
            raise Wrong(
                f"{effect:+g}% give or take {doubt:g}% lies between {effect - doubt:+g}% and {effect + doubt:+g}%; "
                f"with {convincing:g}% as convincing this is {right!r}, and you say {got!r}."
            )
    return "A doubt that is too large gives no verdict, whatever the effect."


@exercise(
    "6.6",
    "write your `report`, where the three dots stand.",
    hints=(
        "One sentence for each: what did you ask, what did you find, and what would change your mind?",
        'The finding has a number with % and its doubt: "give or take …". A reader does not know your variables.',
        '"Is … needed, compared with …? On one photograph, with 4 seeds, it changes the bits by …%, give or take …%. '
        'After so few steps this says little about …"',
    ),
)
def report(answer) -> str:
    """Three sentences with a number."""
    if not isinstance(answer, str):
        raise Wrong(f"it should be a text, and is of type {type(answer).__name__}.")
    sentences = [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])", answer.strip()) if part]
    if len(sentences) != 3:
        raise Wrong(f"it should have three sentences, and I count {len(sentences)}. Each ends with . or ? or !")
    shortest, longest = (f(sentences, key=lambda s: len(s.split())) for f in (min, max))
    if len(shortest.split()) < 5:
        raise Wrong(f"one sentence is very short: {shortest!r}. Can somebody understand it who was not here?")
    if len(longest.split()) > 60:
        raise Wrong(f"one sentence has {len(longest.split())} words. Say one thought in it.")
    percent = r"\d+(?:[.,]\d+)?\)?\s*(?:%|percent|per cent)"
    if not re.search(percent, answer):
        raise Wrong("where is the effect? Give its number in percent.")
    if len(re.findall(percent, answer)) < 2 and not re.search(rf"\d\s*(?:±|\+/-|\+-)\s*{percent}", answer):
        raise Wrong('the effect has no doubt beside it. Give both in percent: "… %, give or take … %".')
    return "A machine can count your sentences. Let your neighbour judge them, with the rubric."
