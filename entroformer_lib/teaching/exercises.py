"""Exercises by number: a check that answers in words, and three hints that open one after the other.

A lesson's exercises are functions of its module `lesson1.py`, `lesson2.py`, …. Such a function gets the student's
answer. It raises `Wrong` with what is wrong and where to look, or returns a sentence about what is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import import_module
from importlib.util import find_spec

from entroformer_lib.errors import UserError


class NotYet(UserError):
    """An answer that is missing or wrong. It stops a notebook, which shows the sentence and no traceback."""

    def _render_traceback_(self) -> list[str]:
        """IPython asks for this instead of printing a traceback."""
        return [str(self)]


class Unsolved(NotYet):
    """Nothing was written where the three dots stand."""


class Wrong(NotYet):
    """What is wrong with an answer, and where to look."""


@dataclass
class Exercise:
    """One exercise.

    task: what is to be written, as the rest of the sentence "Exercise 1.1 isn't solved yet: …".
    hints: three, each says more than the one before.
    """

    number: str
    task: str
    hints: tuple[str, str, str]
    examine: Callable[..., str]
    opened: int = 0  # hints that a console has shown


EXERCISES: dict[str, Exercise] = {}


def exercise(number: str, task: str, hints: tuple[str, str, str]):
    """Makes a function the check of an exercise: `@exercise("1.1", "write …", hints=(…, …, …))`."""

    def register(examine: Callable[..., str]) -> Callable[..., str]:
        EXERCISES[number] = Exercise(number, task, hints, examine)
        return examine

    return register


def find(number: str) -> Exercise:
    """The exercise of a number.

    Raises:
        UserError: there is none.
    """
    module = f"entroformer_lib.teaching.lesson{str(number).partition('.')[0]}"
    if not module.rpartition("lesson")[2].isdigit() or find_spec(module) is None:
        raise NotYet(f'There is no lesson for exercise {number!r}; exercises are called "1.2", for example.')
    import_module(module)
    if number not in EXERCISES:
        raise NotYet(f"There is no exercise {number!r} in this lesson.")
    return EXERCISES[number]


def check(number: str, *answers) -> None:
    """Looks at an answer and says what it finds. Prints a sentence when the answer is right.

    Raises:
        Unsolved: the three dots are still there.
        Wrong: with what is wrong and where to look.
    """
    task = find(number)
    try:
        if any(answer is None or answer is ... for answer in answers):
            raise Unsolved
        remark = task.examine(*answers)
    except Unsolved:
        raise Unsolved(f"Exercise {number} isn't solved yet: {task.task}") from None
    except Wrong as wrong:
        raise Wrong(f"Exercise {number} isn't right yet: {wrong}") from None
    print(f"Exercise {number} is right. {remark}")


class Hints:
    """Hints as a notebook shows them: inside each opened hint lies the next one. A console shows one more each time."""

    def __init__(self, texts: tuple[str, ...], opened: int):
        self.texts, self.opened = texts, opened

    def _repr_html_(self) -> str:
        inner = ""
        for place, text in reversed(list(enumerate(self.texts, start=1))):
            inner = f"<details><summary>Hint {place}</summary><p>{_marked(text)}</p>{inner}</details>"
        return inner

    def __repr__(self) -> str:
        shown = self.texts[: self.opened]
        return "\n".join(f"Hint {place}: {text}" for place, text in enumerate(shown, start=1))


def hint(number: str) -> Hints:
    """The three hints of an exercise, closed: open the first, and inside it lies the second."""
    task = find(number)
    task.opened = min(task.opened + 1, len(task.hints))
    return Hints(task.hints, task.opened)


def _marked(text: str) -> str:
    """`code` between backticks as HTML."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
