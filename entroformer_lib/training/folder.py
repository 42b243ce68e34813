"""A run is a folder: `config.json`, `checkpoint.pt`, `log.jsonl` and, at the end, `weights.safetensors`."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from entroformer_lib.errors import PassedOver, TrainingError, UserError
from entroformer_lib.files import remove_parts, replacing, write_bytes
from entroformer_lib.training.config import RUNTIME_FIELDS, TrainConfig

PATIENCE = 10.0  # seconds that the worker processes of a killed run have to end


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.log = path / "config.json", path / "log.jsonl"
        self.checkpoint, self.weights = path / "checkpoint.pt", path / "weights.safetensors"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, nobody else trains in the folder. The lock is the operating system's: that of a killed run is free.

        Raises:
            TrainingError: somebody else does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.path / "training.lock").acquire(timeout=PATIENCE)
        except Timeout:
            raise TrainingError(f"Another process is training in the folder {self.path}.") from None
        with lock:
            remove_parts(self.path)  # of a checkpoint each, in a run that is killed again and again
            yield

    def check(self, config: TrainConfig) -> None:
        """Whether the folder may be that of a run; it may be that already.

        Raises:
            TrainingError: the folder holds another run, or nothing says which.
        """
        now = _plain(config)
        if self.config.exists():
            # Runs of earlier versions lack the fields that came later; those have the defaults, but for even_rates.
            before = _plain(TrainConfig("DATA", "OUT", even_rates=False)) | self._saved_config()
            may_change = RUNTIME_FIELDS | ({"steps"} if config.schedule == "constant" else set())
            for name in now:
                if before[name] != now[name] and name not in may_change:
                    raise TrainingError(
                        f"The folder {self.path} holds a run with another {name} ({before[name]}); "
                        "choose another folder, or remove it to start afresh."
                    )
        else:
            for path in (self.weights, self.checkpoint, self.log):
                if path.exists():
                    raise TrainingError(f"{path} exists, and no {self.config.name} beside it; choose another folder.")

    def claim(self, config: TrainConfig) -> None:
        """Makes the folder that of a run."""
        write_bytes(self.config, json.dumps(_plain(config), indent=1).encode())

    def _saved_config(self) -> dict:
        try:
            saved = json.loads(self.config.read_text())
        except ValueError:
            saved = None
        if not isinstance(saved, dict) or not {"data", "out", "model", "steps"} <= saved.keys():
            raise TrainingError(
                f"The file {self.config} is damaged or not that of a run. Remove it if the folder holds the run that "
                "is to go on; otherwise choose another folder."
            )
        return saved

    def save(self, state: dict) -> None:
        """Writes the checkpoint beside the old one, then takes its place: a full disk cannot lose both."""
        try:
            with replacing(self.checkpoint) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise TrainingError(
                f"The checkpoint of step {state['step']} could not be written to {self.checkpoint}: {reason}."
            ) from None

    def append(self, row: dict) -> None:
        """Adds a row to the log."""
        with open(self.log, "a") as file:
            file.write(json.dumps(row) + "\n")

    def cut_log(self, step: int) -> None:
        """Forgets what was logged after a step: the run goes on from there. Damaged rows go too, with a warning."""
        if not self.log.exists():
            return
        rows = [(row + b"\n", _step_of(row)) for row in self.log.read_bytes().splitlines()]
        whole = [(row, at) for row, at in rows if at is not None]
        if len(whole) < len(rows):
            warnings.warn(f"left out {len(rows) - len(whole)} damaged rows of {self.log}", PassedOver, stacklevel=2)
        write_bytes(self.log, b"".join(row for row, at in whole if at <= step))


def _plain(config: TrainConfig) -> dict:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _step_of(row: bytes) -> int | None:
    """The step of a row of the log; None where the row is damaged."""
    try:
        step = json.loads(row)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def logged_steps(log: Path) -> list[int]:
    """The steps of a log's rows, without damaged ones."""
    return [step for row in log.read_bytes().splitlines() if (step := _step_of(row)) is not None]


def read_checkpoint(path: Path, device: torch.device) -> dict:
    """What `RunFolder.save` wrote.

    Raises:
        TrainingError: no such file, a damaged one, or one of something else.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise TrainingError(f"The checkpoint {path} cannot be read: {error.strerror}.") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a damaged file can raise anything
        state = None
    known = isinstance(state, dict) and {"model", "optimizer", "step", "seconds", "mean"} <= state.keys()
    if not known or not isinstance(state["model"], dict):
        raise TrainingError(f"The file {path} is damaged or not the checkpoint of a run.")
    return state


@contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """Around what loads the parts of a checkpoint.

    Raises:
        TrainingError: they do not fit.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception:  # states of other modules can raise anything
        raise TrainingError(f"The checkpoint {path} is that of another run, or damaged.") from None
