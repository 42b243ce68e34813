"""Fields of frozen dataclasses: read from words and JSON, and tested against their types."""

import dataclasses
import json
from typing import Annotated, Literal, get_args, get_origin

from entroformer_lib.errors import ConfigError


def fits(value, hint) -> bool:
    """True when `value` has the annotated type; just the few kinds of annotation that configs have."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:  # a type, and an object that tests the value
        return fits(value, args[0]) and args[1].test(value)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if args[1:] == (...,):
            args = args[:1] * len(value) if isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if args:  # int | None
        return any(fits(value, arg) for arg in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def describe(hint) -> str:
    """What a type takes, for a message."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def known(values: dict, cls: type) -> dict:
    """Values by name for a dataclass, with tuples for lists; a name that it lacks is a ConfigError."""
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise ConfigError(f"The config has no field '{name}'; it has {', '.join(names)}.")
    return {name: tuples(v) for name, v in values.items()}


def tuples(value):
    """JSON's lists, and those inside them, as tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def parse_fields(words: tuple[str, ...]) -> dict:
    """Fields of a config as typed: ("position=none", "top_k=64")  ->  {"position": "none", "top_k": 64}.

    A value is JSON where it can be (`top_k=null` is dense attention), and a plain word otherwise.

    Raises:
        ConfigError: a word without "=".
    """
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"A field of the config is given as name=value, not as '{word}'.")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values
