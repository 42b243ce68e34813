"""Where a result comes from: saved beside every number."""

import datetime
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from entroformer_lib.models.zoo import device_name, weights_digest

LIBRARIES = ("torch", "compressai", "constriction", "numpy", "pillow")


def provenance(model=None, seed: int | None = None) -> dict:
    """command, revision, date, device, library versions, seed; model name and SHA-256 of its weights."""
    record = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "seed": seed,
    }
    if model is not None:
        record["model"] = getattr(model, "name", None)
        record["weights_sha256"] = weights_digest(model).hex()
        record["device"] = device_name(model.g_s[0].weight.device)
    return record


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
