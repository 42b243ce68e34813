"""Weights by name: what is shipped, what lies in a folder of yours, any file. Always safetensors: no code runs on load.

A weights file holds the tensors, the config (as `_extra_state`) and a card: how it was trained and what it reaches.
Entropy models behind the same transforms store those once: a file may name another one that has them. It lies
beside it, or in `shared/` there or one folder higher, where files of transforms alone lie. A file may also hold its
transforms as differences from those.
"""

import hashlib
import json
import os
import platform
import warnings
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from entroformer_lib.entroformer import Entroformer, config_of, fingerprint
from entroformer_lib.errors import PassedOver, RateError, UserError, WeightsError
from entroformer_lib.files import data_folder, file_digest, replacing
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.priors import FactorizedPrior
from entroformer_lib.weights.forms import Form, restored, shortened

LONGEST_NAME = 255 - len(".safetensors")  # bytes of a file's name
SHARED = ("g_a.", "g_s.", "gain.")  # tensors that another file may hold
# Weights that are no longer shipped -> the revision that still has them and reads their files
TINY = ["serial", "parallel", "groupedmixer", "cnn", "minnen", "hyperprior", "hyperprior-cnn", "context", "context-cnn"]
RETIRED = {
    "tiny-rates-msssim": "06aa877",
    **dict.fromkeys(("tiny-parallel", "tiny-rates", *(f"tiny-{kind}-rates" for kind in TINY)), "720112f"),
}
# Weights whose name now belongs to better ones: first bytes of their digest, as files tell it -> the revision
REPLACED = {
    "dda61378": "3ff166b",
    "cda7fdb9": "3ff166b",
    "0ca4c778": "efa16cf",
    "1fe9fcea": "efa16cf",
}


def weight_folders() -> list[Path]:
    """Where names are looked up: the folders in ENTROFORMER_WEIGHTS first, then the shipped weights."""
    own = [Path(p) for p in os.environ.get("ENTROFORMER_WEIGHTS", "").split(os.pathsep) if p]
    return [*own, data_folder() / "weights"]


def save_weights(
    model: Entroformer,
    path: Path,
    card: dict,
    form: Form = "float32",
    transforms: str | None = None,
    near: str | None = None,
) -> None:
    """Writes weights, config, tables of p(z) and the card in one file.

    Args:
        card: anything JSON; `load_model(...).card` gives it back.
        form: how matrices and kernels are stored (forms.py). The tables are made from what will be loaded.
        transforms: name of the weights that hold g_a, g_s and gains, which this file leaves out.
        near: name of the weights whose g_a and g_s are the base of this file's, which are stored as differences.

    Raises:
        WeightsError: the file cannot be written, or the model has other transforms than those named.
    """
    if near is not None and (form != "int8" or transforms is not None):
        raise WeightsError(f"The weights {path} are stored as differences in int8 alone, and not beside transforms.")
    _check_finite(model.state_dict(), path)
    tensors = {name: t.detach().contiguous().cpu() for name, t in _with_tables(model).state_dict().items()}
    metadata, base = {"format": "entroformer", "card": json.dumps(card)}, None
    if transforms is not None:
        digest = shared_digest(_read(_holder(path, transforms), SHARED)[0])
        own = {name: t for name, t in tensors.items() if name.startswith(SHARED)}
        if digest not in (shared_digest(own), shared_digest(restored(shortened(own, "float16")))):
            raise WeightsError(f"The model for {path} has other transforms than {transforms}.")
        tensors = {name: t for name, t in tensors.items() if name not in own}
        metadata["transforms"] = json.dumps({"name": transforms, "sha256": digest})
    if near is not None:
        base = _read(_holder(path, near), SHARED)[0]
        metadata["near"] = json.dumps({"name": near, "sha256": shared_digest(base)})
    tensors = shortened(tensors, form, base)
    _check_finite(tensors, path)  # half precision ends at 65,504
    _write(path, tensors, metadata)


def save_transforms(model: Entroformer, path: Path) -> None:
    """Writes g_a, g_s and gains alone, in half precision, for `transforms` and `near` of `save_weights`."""
    tensors = {name: t.contiguous().cpu() for name, t in model.state_dict().items() if name.startswith(SHARED)}
    _write(path, shortened(tensors, "float16"), {"format": "entroformer"})


def save_card(path: Path, card: dict) -> None:
    """Gives a weights file another card; everything else stays as it is."""
    tensors, metadata = _held(path)
    _write(path, tensors, metadata | {"card": json.dumps(card)})


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(tensors, part, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The weights could not be written to {path}: {error}") from None


def tensors_digest(tensors: dict[str, torch.Tensor], before: bytes = b"") -> bytes:
    """SHA-256 over `before` and the names and values of tensors, by name, floats as float32: 32 bytes."""
    digest = hashlib.sha256(before)
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        values = values.float() if values.is_floating_point() else values
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.digest()


def shared_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Digest of g_a, g_s and gains, in hexadecimal digits."""
    return tensors_digest({name: t for name, t in tensors.items() if name.startswith(SHARED)}).hex()


def _with_tables(model: Entroformer) -> Entroformer:
    """The model with the tables of its p(z)."""
    if not isinstance(model.z_prior, FactorizedPrior):
        return model
    copy = Entroformer.from_state_dict({name: t.detach().cpu().clone() for name, t in model.state_dict().items()})
    copy.update(force=True, update_quantiles=True)
    return copy


def load_model(name_or_path: str | os.PathLike, device: str = "auto", name: str | None = None) -> Entroformer:
    """A model in eval mode.

    Args:
        name_or_path: a name from `list_models()` or a .safetensors file. Behind one of variable rate may stand @ and
            the lambda to code at, such as `blocks-parallel@0.013`.
        device: "auto" takes a GPU where there is one.
        name: what the model is called; by default as its file.

    Returns:
        The model, with its `.name` and `.card`.

    Raises:
        WeightsError: nothing of that name, or a file that is damaged or not ours. RateError: a lambda that the model
            does not have, or none behind the @. ConfigError: a config that this version does not know. UserError:
            there is no such device.
    """
    device = device_of(device)
    known_as, lmbda = split_name(name_or_path)
    path = find_weights(known_as)
    tensors, card = read_weights(path)
    model = Entroformer.from_state_dict(tensors, name or path.stem, card)
    if lmbda:
        model.level = _level(model, known_as, lmbda)
    return model.to(device)


def reference_of(model: Entroformer) -> Entroformer | None:
    """The hyperprior-only model behind the same transforms, at the same level: what the context saves is the difference
    between the two.  ->  the one whose hyperprior is of the model's kind, else another; None where there is none, and
    for a model without hyperprior, which does not differ from it by its context alone

    Only the headers of weights are read, and g_a, g_s and gains of those without context that may fit.
    """
    c, digest = model.config, shared_digest(model.state_dict())
    if not c.hyperprior:
        return None
    found = []
    for path in _files().values():
        try:
            theirs, metadata = _config_and_metadata(path)
            alike = theirs.context == "none" and (theirs.M, theirs.lmbdas) == (c.M, c.lmbdas)
            if alike and _digest_of_transforms(path, metadata) == digest:
                found.append((theirs.hyper != c.hyper, path.stem, path))
        except UserError:
            continue  # `list_models` warns of it
    if not found:
        return None
    *_, path = min(found)
    reference = load_model(path, next(model.g_s.parameters()).device)
    reference.level = model.level
    return reference


def _digest_of_transforms(path: Path, metadata: dict[str, str]) -> str:
    """`shared_digest` of a file, which may name the one that holds its transforms."""
    if "transforms" in metadata:
        return _named(path, metadata, "transforms")[1]
    return shared_digest(_read(path, SHARED)[0])


def split_name(name_or_path: str | os.PathLike) -> tuple[str, str]:
    """The name or file of a model, and the lambda behind its last @; none where weights of the whole name exist."""
    text = os.fspath(name_or_path)
    if "@" not in text or text.endswith(".safetensors") or _weights_of(text):
        return text, ""
    name, _, lmbda = text.rpartition("@")
    if not lmbda:
        raise RateError(f"Behind the @ of '{text}' there is no lambda.")
    return name, lmbda


def device_of(name: str | torch.device) -> torch.device:
    """A device by its name, such as cpu or cuda:1; "auto" is a GPU where there is one.

    Raises:
        UserError: it is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"There is no device '{name}' here; 'cpu' always works, and 'auto' chooses.") from None
    return device


def _level(model: Entroformer, name: str, lmbda: str) -> float:
    if model.gain is None:
        raise RateError(f"The model '{name}' has one rate; load it without @{lmbda}.")
    try:
        return model.gain.level_of(float(lmbda))
    except ValueError as error:
        raise RateError(f"The model '{name}' cannot code at @{lmbda}: {error}") from None


def find_weights(name_or_path: str | os.PathLike) -> Path:
    """Path of the weights that a name or path means."""
    name = os.fspath(name_or_path)
    if name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise WeightsError(f"There is no weights file {name}.")
        return Path(name)
    path = _weights_of(name)
    if path is not None:
        return path
    if name in RETIRED:
        raise WeightsError(f"The weights '{name}' are no longer shipped; revision {RETIRED[name]} reads their files.")
    known = ", ".join(sorted(p.stem for folder in weight_folders() for p in folder.glob("*.safetensors")))
    raise WeightsError(f"There is no model '{name}' here; there are: {known or 'none'}.")


def _weights_of(name: str) -> Path | None:
    """The first file of that name in the folders."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        return None  # asked for such a file, the system complains
    paths = (folder / f"{name}.safetensors" for folder in weight_folders())
    return next((path for path in paths if os.path.basename(name) == name and path.is_file()), None)


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors (floats as float32) and card of a weights file, with those that it shares with another file.

    Raises:
        WeightsError: no whole file of ours, or the file with its transforms is missing or has other ones.
    """
    tensors, metadata = _read(path)
    if "transforms" in metadata:
        tensors |= _shared_with(path, *_named(path, metadata, "transforms"))
    return tensors, _record(path, metadata, "card")


def _record(path: Path, metadata: dict[str, str], key: str) -> dict:
    """What a weights file says under a key, as JSON; empty where it says nothing."""
    try:
        record = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise WeightsError(f"The {key} in {path} is no record in JSON.")
    return record


def _named(path: Path, metadata: dict[str, str], key: str) -> tuple[str, str]:
    """Name and digest of the transforms that a file has in common with another, or differs from."""
    record = _record(path, metadata, key)
    name, digest = record.get("name"), record.get("sha256")
    if not (isinstance(name, str) and isinstance(digest, str)):
        raise WeightsError(f"{path} does not say where its transforms are.")
    return name, digest


def _read(path: Path, parts: tuple[str, ...] = ("",)) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What the file itself stands for: tensors, or those of some parts, floats as float32; and metadata."""
    held, metadata = _held(path, parts)
    _check_finite(held, path)
    near = _shared_with(path, *_named(path, metadata, "near")) if "near" in metadata else None
    return restored(held, near), metadata


def _held(path: Path, parts: tuple[str, ...] = ("",)) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What lies in the file: tensors as they are stored, and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(parts)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}.") from None
    if metadata.get("format") != "entroformer":
        raise WeightsError(f"{path} holds weights, but not of a model of this library.")
    return tensors, metadata


def _check_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"The weights {name} for {path} are not finite numbers.")


def _shared_with(path: Path, name: str, sha256: str) -> dict[str, torch.Tensor]:
    """g_a, g_s and gains that the weights at `path` have in common with those of a name, or differ from."""
    other = _holder(path, name)
    if not other.is_file():
        raise WeightsError(f"{path} has its transforms in common with {other}, which is not there.")
    held, metadata = _held(other, SHARED)
    if "near" in metadata:
        raise WeightsError(f"{other} has no transforms of its own for {path}.")
    _check_finite(held, other)
    tensors = restored(held)
    if shared_digest(tensors) != sha256:
        raise WeightsError(f"{path} belongs to other transforms than those that {other} holds now.")
    return tensors


def _holder(path: Path, name: str) -> Path:
    """The file of a name that has the transforms for weights at `path`: in `shared/` there or one folder higher, or
    beside it."""
    file = f"{os.path.basename(name)}.safetensors"
    apart = [folder / "shared" / file for folder in (path.parent, path.absolute().parent.parent)]
    return next((place for place in apart if place.is_file()), path.with_name(file))


_digests: WeakKeyDictionary[Entroformer, tuple[tuple, bytes]] = WeakKeyDictionary()  # with what they were computed of


def weights_digest(model: Entroformer) -> bytes:
    """SHA-256 over config, names and values of everything the decoder needs: 32 bytes.

    It is taken from the weights in memory, so it does not depend on the file they came from. The search window is not
    part of it: a file says it itself.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    model.refresh_tables()
    state = fingerprint([model])
    known, digest = _digests.get(model, (None, b""))
    if known != state:
        needed = {k: t for k, t in model.state_dict().items() if not k.startswith(("_extra_state", "g_a.", "h_a."))}
        digest = tensors_digest(needed, before=model.config.replaced(search_window=None).to_json().encode())
        _digests[model] = state, digest
    return digest


def list_models() -> list[dict]:
    """One row per model that `load_model` finds by name; of a variable-rate model one for each of its lambdas.

    Keys: name, architecture (what `--model` was in training, such as tiny-parallel), variant, lmbda, metric, bytes,
    sha256 (of the file), kodak_bpp, kodak_psnr_db (None where not measured), path. A file that is none of ours is
    passed over with a warning.
    """
    found, rows = _files(), []
    for name in sorted(found):
        try:
            rows += _describe(found[name])
        except (UserError, ValueError, AttributeError, TypeError) as error:
            warnings.warn(f"{found[name]} is no weights file of this library: {error}", PassedOver, stacklevel=2)
    return rows


def _files() -> dict[str, Path]:
    """All weights by name."""
    found = {}
    for folder in reversed(weight_folders()):  # own folders come last and win
        found.update({path.stem: path for path in folder.glob("*.safetensors")})
    return found


def _config_and_metadata(path: Path) -> tuple[EntroformerConfig, dict[str, str]]:
    """What the header of a weights file says."""
    try:
        with safe_open(path, framework="pt") as file:
            return config_of(file.get_tensor("_extra_state")), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{error}.") from None


def _describe(path: Path) -> list[dict]:
    config, metadata = _config_and_metadata(path)
    card = _record(path, metadata, "card")
    row = {
        "architecture": card.get("training", {}).get("model"),
        "variant": config.variant,
        "metric": card.get("metric"),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "path": str(path),
    }
    kodak = card.get("kodak", {})
    points = (
        [(f"{path.stem}@{lmbda:g}", lmbda, kodak.get(f"{lmbda:g}", {})) for lmbda in config.lmbdas]
        if config.lmbdas
        else [(path.stem, card.get("lmbda"), kodak)]
    )
    return [
        {"name": name, "lmbda": lmbda, **row, "kodak_bpp": mean.get("bpp"), "kodak_psnr_db": mean.get("psnr_db")}
        for name, lmbda, mean in points
    ]


def device_name(device: torch.device) -> str:
    """What a result was measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{device.type} of {platform.machine()}"
    )
