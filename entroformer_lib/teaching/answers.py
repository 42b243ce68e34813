"""A student's answer in one form: lists, arrays and tensors become arrays; functions are called with care."""

import linecache
import traceback
from collections.abc import Callable

import numpy as np

from entroformer_lib.teaching.exercises import NotYet, Unsolved, Wrong


def array(answer, what: str = "the answer", minus_infinity: bool = False) -> np.ndarray:
    """A number, list, array, tensor or picture as float64.

    minus_infinity: is allowed.

    Raises:
        Unsolved: it is `...`.
        Wrong: it is no numbers, or has NaN or infinity in it.
    """
    if answer is ...:
        raise Unsolved
    if answer is None:
        raise Wrong(f"{what} is None. Is a `return` missing?")
    if hasattr(answer, "detach"):
        answer = answer.detach().cpu()
    try:
        values = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        if "ellipsis" in repr(answer).lower():
            raise Unsolved from None
        raise Wrong(f"{what} should be numbers and is of type {type(answer).__name__}.") from None
    if minus_infinity and (np.isnan(values).any() or (values == np.inf).any()):
        raise Wrong(f"{what} is not a number, or plus infinity, somewhere. (0 times infinity is not a number.)")
    if not minus_infinity and not np.isfinite(values).all():
        raise Wrong(f"{what} is not a finite number somewhere. Look for log2(0), 0 * log2(0) or a division by 0.")
    return values


def number(answer, what: str = "the answer") -> float:
    """One number, in whatever it is wrapped.

    Raises:
        Wrong: it is several numbers.
    """
    values = array(answer, what)
    if values.size != 1:
        raise Wrong(
            f"{what} should be one number and has the shape {list(values.shape)}. Is a `sum` or `mean` missing?"
        )
    return float(values.reshape(()))


def shaped(answer, shape: tuple[int, ...], what: str = "the answer", minus_infinity: bool = False) -> np.ndarray:
    """An `array` of a given shape.

    Raises:
        Wrong: it has another shape.
    """
    values = array(answer, what, minus_infinity)
    if values.shape != tuple(shape):
        raise Wrong(f"{what} should have the shape {list(shape)} and has {list(values.shape)}.")
    return values


def tensor(answer, what: str = "the answer"):
    """The answer itself, where the lesson goes on with it as a tensor.

    Raises:
        Unsolved: it is `...`.
        Wrong: it is no tensor of float32.
    """
    array(answer, what)
    kind = getattr(answer, "dtype", None)
    if not hasattr(answer, "detach"):
        raise Wrong(f"{what} should be a tensor and is of type {type(answer).__name__}. Stay with torch.")
    if str(kind) != "torch.float32":
        raise Wrong(f"{what} should have the type torch.float32 and has {kind}.")
    return answer


def called(function: Callable, *arguments, what: str = ""):
    """What the student's function returns. None is a legal answer.

    Raises:
        Unsolved: it returns `...`, or works with it.
        Wrong: it is no function, or stops with an error; the sentence quotes the line.
    """
    name = what or f"`{getattr(function, '__name__', 'the function')}`"
    if not callable(function):
        raise Wrong(f"this exercise asks for a function, and {name} is of type {type(function).__name__}.")
    try:
        answer = function(*arguments)
    except NotYet:
        raise
    except Exception as error:
        if "ellipsis" in str(error).lower():
            raise Unsolved from None
        raise Wrong(f"{name} stops with {type(error).__name__}: {error}.{_line_of(error)}") from None
    if answer is ...:
        raise Unsolved
    return answer


def _line_of(error: Exception) -> str:
    """The student's line that an error comes from: the last one that is in no installed file."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "ipykernel" in frame.filename or frame.filename.startswith("<"):
            line = (frame.line or linecache.getline(frame.filename, frame.lineno)).strip()
            return f" Look at the line `{line}`." if line else ""
    return ""
