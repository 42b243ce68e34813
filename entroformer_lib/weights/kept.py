"""Models that a process keeps from one task to the next, and that are the ones which are meant.

A worker of a cluster lives longer than a command: a file of weights may have been written anew since it was loaded. And
it may run on another machine, where other weights have that name. So a task carries the digest of its weights.
"""

import functools
from dataclasses import dataclass

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import WeightsError
from entroformer_lib.files import data_folder
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.weights.zoo import find_weights, load_model, split_name, tensors_digest

MOST = 2


@dataclass(frozen=True)
class Kept:
    """digest: of all weights, the encoder's too, and the config. level: the one that the name asks for."""

    model: Entroformer
    digest: str
    level: float | None


def kept_model(name: str, device: str, digest: str | None = None) -> Kept:
    """A model as `load_model` gives it, loaded once.

    Args:
        digest: that its weights must have; None takes what is kept, or what is there.

    Raises:
        WeightsError: nothing of that name, or other weights.
    """
    name = name_elsewhere(name)
    if digest not in (None, _loaded(name, device).digest):
        forget()
        if digest != _loaded(name, device).digest:
            raise WeightsError(f"The weights {name} are others than those at the start, or on this machine.")
    return _loaded(name, device)


@functools.lru_cache(MOST)
def _loaded(name: str, device: str) -> Kept:
    keep_freed_memory()
    model = load_model(name, device)
    model.refresh_tables()
    digest = tensors_digest(model.state_dict(), model.config.to_json().encode()).hex()
    return Kept(model, digest, model.level)


def forget() -> None:
    """Keeps no model any more: each is loaded again when it is next asked for, as its file may be another one now."""
    _loaded.cache_clear()


def name_elsewhere(name: str) -> str:
    """What a model is called by a process in another folder: shipped weights as ever, others by their whole path."""
    known_as, lmbda = split_name(name)
    path = find_weights(known_as)
    if path.parent == data_folder() / "weights":
        return name
    return f"{path.absolute()}@{lmbda}" if lmbda else str(path.absolute())
