"""A run is a folder: `config.json`, `checkpoint.pt`, `log.jsonl` and, at the end, `weights.safetensors`."""

import dataclasses
import json
from pathlib import Path

import torch

from entroformer_lib.errors import TrainingError
from entroformer_lib.files import replacing
from entroformer_lib.training.config import RUNTIME_FIELDS, TrainConfig


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.log = path / "config.json", path / "log.jsonl"
        self.checkpoint, self.weights = path / "checkpoint.pt", path / "weights.safetensors"

    def claim(self, config: TrainConfig) -> None:
        """Makes the folder that of a run; it may be that already.

        Raises:
            TrainingError: the folder holds another run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        now = json.loads(json.dumps(dataclasses.asdict(config)))
        if self.config.exists():
            # Runs of earlier versions lack the fields that came later; those have the defaults, but for even_rates.
            saved = {"even_rates": False, **json.loads(self.config.read_text())}
            before = json.loads(json.dumps(dataclasses.asdict(TrainConfig("", "")))) | saved
            may_change = RUNTIME_FIELDS | ({"steps"} if config.schedule == "constant" else set())
            for name in now:
                if before[name] != now[name] and name not in may_change:
                    raise TrainingError(
                        f"The folder {self.path} holds a run with another {name} ({before[name]}); "
                        "choose another folder, or remove it to start afresh."
                    )
        self.config.write_text(json.dumps(now, indent=1))

    def save(self, state: dict) -> None:
        """Writes the checkpoint beside the old one, then takes its place: a full disk cannot lose both."""
        try:
            with replacing(self.checkpoint) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TrainingError(
                f"The checkpoint of step {state['step']} could not be written to {self.checkpoint}: {error}"
            ) from None

    def append(self, row: dict) -> None:
        """Adds a row to the log."""
        with open(self.log, "a") as file:
            file.write(json.dumps(row) + "\n")

    def cut_log(self, step: int) -> None:
        """Forgets what was logged after a step: the run goes on from there."""
        if self.log.exists():
            rows = [row for row in self.log.read_text().splitlines() if json.loads(row)["step"] <= step]
            self.log.write_text("".join(row + "\n" for row in rows))


def read_checkpoint(path: Path, device: torch.device) -> dict:
    """What `RunFolder.save` wrote.

    Raises:
        TrainingError: no such file, or a damaged one.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise TrainingError(f"The checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
