"""Where a result comes from: saved beside every number."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from entroformer_lib.weights.zoo import device_name, weights_digest

LIBRARIES = ("torch", "compressai", "constriction", "numpy", "pillow")


def provenance(model=None, seed: int | None = None) -> dict:
    """command, revision, date, device, library versions, seed; model name and SHA-256 of its weights."""
    record = {
        "command": command_line(sys.argv),
        "revision": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "seed": seed,
    }
    if model is not None:
        record["model"] = getattr(model, "name", None)
        record["weights_sha256"] = weights_digest(model).hex()
        record["device"] = device_name(next(model.g_s.parameters()).device)
    return record


def command_line(words: list[str]) -> str:
    """The command that runs, without the folders of this machine: of an absolute path only its last name stays."""
    return shlex.join(Path(word).name if os.path.isabs(word) else word for word in words)


def git_revision() -> str | None:
    """The commit of this library's checkout, with "+" where files were changed; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if changed.stdout.strip() else "")


def as_json(result: dict) -> str:
    """JSON with one line for each row of a table."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        else:
            text = json.dumps(value, indent=1)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
