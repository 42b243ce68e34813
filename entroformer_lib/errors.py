"""Errors whose text is meant for the person at the keyboard: one plain sentence, no traceback needed."""

import os


class UserError(Exception):
    """Something the user can put right; the command line prints the sentence and exits with code 1."""


class BitstreamError(UserError):
    """The bytes are not one whole, undamaged `.ef` file that this model can decode."""


class ConfigError(UserError):
    """A configuration or an option that does not exist, or that this model does not take."""


class WeightsError(UserError):
    """Weights that are missing, damaged, or made for another architecture."""


class DataError(UserError):
    """Pictures, or other data, that are missing, cannot be read or cannot be used."""


class TrainingError(UserError):
    """A training run that cannot start or cannot go on."""


class Stopped(TrainingError):
    """A training run that was stopped by a signal and left a checkpoint."""


class RateError(UserError):
    """A rate that a model cannot give."""


class StudyError(UserError):
    """A study asked of a model or picture that cannot answer it, or in a way that cannot be done."""


class ClusterError(UserError):
    """A cluster that does not answer, has no workers, or is gone."""


class PassedOver(UserWarning):
    """Something that was left out while the rest went on, and why: one sentence."""


class AttentionError(UserError):
    """A point, layer, head or latent that a model does not have, or a model without attention."""


def in_words(error: Exception) -> str:
    """What is wrong, in a sentence. One that nobody expected is raised again where ENTROFORMER_TRACEBACK is set."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'}: {error.strerror or error}."
    if isinstance(error, MemoryError):
        return "The memory of this machine does not suffice."
    if isinstance(error, RuntimeError) and "allocate" in str(error):  # as torch says that memory is full
        return "The memory of this machine or its GPU does not suffice."
    if os.environ.get("ENTROFORMER_TRACEBACK"):
        raise error
    return (
        f"An error that nobody expected: {type(error).__name__}: {error}\n"
        "Please report it with the command, and with what it prints when ENTROFORMER_TRACEBACK=1 is set."
    )
