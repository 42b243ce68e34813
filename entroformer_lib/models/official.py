"""The authors' released checkpoints as models of this library, read without running anything that is in them.

The files are pickles of whole modules; loading one the usual way imports and runs whatever it names. Here a restricted
unpickler builds nothing but inert records: a `StandIn` for each module, a `StoredTensor` for each tensor. Sizes are
read off the tensors, every tensor is checked against the architecture, and only then are its numbers read.

The released code clamps symbols to [-128, 127] and gives those two end symbols a logistic tail instead of the
Gaussian's. Ours are not clamped, so the two agree wherever no latent reaches those ends.
"""

import hashlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from entroformer_lib.errors import ConfigError, WeightsError
from entroformer_lib.models.config import PRESETS, EntroformerConfig
from entroformer_lib.models.entroformer import Entroformer
from entroformer_lib.models.zoo import save_weights

PARTS = ("encode", "decode", "cit_he", "cit_hd", "prob", "cit_ar", "cit_pn")
USUAL_TOP_K = 32  # of the released models; taken when the file does not say
LIKELIHOOD_FLOOR = 1e-12  # of the released code; our own models use 1e-9


def load_official(path: str | os.PathLike, top_k: int | None = None) -> Entroformer:
    """A checkpoint of the released code as an ordinary model: eval mode, float32, on the CPU.

    Reads whole modules or plain state dicts under the seven names in `PARTS`, with or without DataParallel, in both
    file formats of torch.save. The model does not clamp symbols to [-128, 127] as the released code does.

    Args:
        top_k: k of the attention, which no tensor tells. By default what the pickled modules say, and 32 where there
            are none (state dicts).

    Returns:
        The model, with `.name`, `.card` and `.path` set.

    Raises:
        WeightsError: the file is no such checkpoint, is damaged, lacks a tensor or has one of another shape, or asks
            for a class that such a checkpoint does not need.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            model = _build(_open(file), top_k)
    except OSError as error:
        raise WeightsError(f"The checkpoint {path} cannot be read: {error.strerror or error}.") from None
    except (EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise WeightsError(f"The checkpoint {path} is damaged: {str(error).rstrip('.')}.") from None
    card = {"origin": "the authors' released code", "preset": "official", "variant": model.config.variant}
    model.name, model.path = path.stem, path
    model.card = {**card, "source_file": path.name, "source_sha256": digest}
    return model


def import_official(
    src: str | os.PathLike, dst: str | os.PathLike, force: bool = False, top_k: int | None = None
) -> Path:
    """Writes a checkpoint of the released code as a weights file of this library, in float32; returns its path.

    Args:
        dst: a path that ends in .safetensors, for `load_model`.
        force: replace `dst` if it exists.
        top_k: as for `load_official`.

    Raises:
        WeightsError: as `load_official`; or `dst` has another ending, exists, or cannot be written.
    """
    dst = Path(dst)
    if dst.suffix != ".safetensors":
        raise WeightsError(f"Weights are stored in .safetensors files, and {dst} does not end that way.")
    if dst.exists() and not force:
        raise WeightsError(f"{dst} exists already; it is replaced only with force.")
    model = load_official(src, top_k)
    save_weights(model, dst, model.card)
    return dst


# ---- their tensors, our parameters --------------------------------------------------------------------------------------

# These replacements, one after the other, turn the name of our parameter into the name of theirs.
THEIR_NAMES = (
    (r"^g_a\.", "encode.encoder."),
    (r"^g_s\.([0246])\.", r"decode.decoder.\1.transpose."),
    (r"^g_s\.", "decode.decoder."),
    (r"^h_a\.", "cit_he."),
    (r"^h_s\.", "cit_hd."),
    (r"^context_model\.", "cit_ar."),
    (r"^entropy_parameters\.layers\.", "cit_pn."),
    (r"^z_prior\.", "prob."),
    (r"\.embed\.", ".to_patch_embedding."),
    (r"\.start$", ".sos_pred_token"),
    (r"\.down\.", ".scale_blocks."),
    (r"\.up\.(\d)\.0\.", r".scale_blocks.\1.conv2d."),
    (r"\.head\.", ".mlp_head."),
    (r"\.blocks\.(\d)\.stack\.\w+\.0\.", r".trans_blocks.\1.0."),  # hyperprior: one block a stage
    (r"\.stack\.\w+\.", ".blocks."),  # context model: a table belongs to the block of its number
    (r"\.vectors$", ".layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"\.attention\.qkv\.", ".layer.0.SelfAttention.qkv."),
    (r"\.attention\.out\.", ".layer.0.SelfAttention.o."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.norm."),
    (r"\.feed_forward\.", ".layer.1.fn.net."),
)


class Storage(NamedTuple):
    """Where numbers lie in the file: key of a flat array, type and count."""

    dtype: torch.dtype
    key: str
    length: int


class StoredTensor(NamedTuple):
    """A tensor that has not been read: a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _build(checkpoint: "ZippedCheckpoint | LegacyCheckpoint", top_k: int | None) -> Entroformer:
    parts = checkpoint.content
    for part in PARTS:
        if not isinstance(parts, dict) or not isinstance(parts.get(part), StandIn | dict):
            raise WeightsError(f"The checkpoint has no part '{part}'; it needs {', '.join(PARTS)}.")
    tensors = {f"{part}.{name}": tensor for part in PARTS for name, tensor in _tensors(parts[part]).items()}
    if top_k is None:
        said = (module.state["attn_topk"] for _, module in _modules(parts["cit_ar"]) if "attn_topk" in module.state)
        top_k = next(said, USUAL_TOP_K)
    model = Entroformer(_config(tensors, top_k)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # one by one, so that the memory holds the weights once
            parameter.copy_(_converted(name, parameter.shape, checkpoint, tensors))
        for part in (model.gaussian, model.z_prior):
            part.bound.bound.fill_(LIKELIHOOD_FLOOR)  # a buffer: it is saved along with the weights
    for name in tensors:
        raise WeightsError(f"The checkpoint has a tensor '{name}', which has no place in the architecture.")
    return model


def _config(tensors: dict[str, StoredTensor], top_k: int) -> EntroformerConfig:
    """The architecture, from the shapes of tensors."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        size = _find(tensors, name).size
        if len(size) != dimensions:
            raise WeightsError(f"The tensor '{name}' has shape {list(size)}, and should have {dimensions} dimensions.")
        return size

    def radius(block: str) -> int:
        name = f"{block}.layer.0.SelfAttention.relative_attention_bias.weight"
        rows = shape(name, 2)[0]
        h = (round(rows**0.5) - 1) // 2
        if rows != (2 * h + 1) ** 2:
            raise WeightsError(f"The tensor '{name}' has {rows} rows, which is not the square of an odd number.")
        return h

    dim = shape("cit_ar.to_patch_embedding.weight", 2)[0]
    head = shape("cit_ar.blocks.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)[1]
    inner = shape("cit_ar.blocks.0.layer.0.SelfAttention.o.weight", 2)[1]
    if inner != dim or dim % head:
        raise WeightsError(f"Heads of width {head}, together {inner}, do not fit this library's model of width {dim}.")
    blocks = {name.split(".")[2] for name in tensors if name.startswith("cit_ar.blocks.")}
    tables = [name for name in tensors if re.match(r"cit_ar\.blocks\..*relative_attention_bias", name)]
    try:
        return EntroformerConfig(
            **{**PRESETS["official"], "share_position": len(tables) == 1},
            context="serial" if "cit_ar.sos_pred_token" in tensors else "parallel",
            N=shape("encode.encoder.0.weight", 4)[0],
            M=shape("encode.encoder.6.weight", 4)[0],
            Z=shape("prob.mu", 4)[1],
            dim=dim,
            heads=dim // head,
            context_layers=len(blocks),
            ffn_ratio=shape("cit_ar.blocks.0.layer.1.fn.net.0.weight", 2)[0] // dim,
            top_k=top_k,
            hyper_top_k=tuple(max(2, top_k // shrink) for shrink in (1, 2, 4)),
            radius=radius("cit_ar.blocks.0"),
            hyper_radius=tuple(radius(f"cit_he.trans_blocks.{j}.0") for j in range(3)),
        )
    except (ConfigError, TypeError) as error:
        raise WeightsError(f"The sizes of the checkpoint make no model. {error}") from None


def _find(tensors: dict[str, StoredTensor], name: str) -> StoredTensor:
    if name not in tensors:
        raise WeightsError(f"The checkpoint has no tensor '{name}'.")
    return tensors[name]


def _converted(name: str, shape: torch.Size, checkpoint, tensors: dict[str, StoredTensor]) -> Tensor:
    """The value of our parameter of this name and shape; takes the tensor it comes from out of `tensors`."""
    theirs = name
    for pattern, replacement in THEIR_NAMES:
        theirs = re.sub(pattern, replacement, theirs)
    stored = _find(tensors, theirs)
    del tensors[theirs]
    expected = list(shape)
    if name.endswith("vectors"):  # 2h(h+1) + 2 of ours, (2h+1)^2 of theirs
        expected[0] = 2 * shape[0] - 3
    elif theirs.startswith("cit_pn.") and len(shape) == 2:
        expected += [1, 1]  # a 1x1 convolution is a linear layer
    if list(stored.size) != expected:
        raise WeightsError(f"The tensor '{theirs}' has shape {list(stored.size)}, and should have {expected}.")
    try:
        value = checkpoint.read(stored.storage).as_strided(stored.size, stored.stride, stored.offset)
    except (RuntimeError, EOFError) as error:
        raise WeightsError(f"The numbers of the tensor '{theirs}' are not all there: {error}.") from None
    if name.endswith("vectors"):
        return _diamond(value)
    if name.endswith("qkv.weight"):  # their rows: q, k, v of one channel, then of the next; ours: all q, all k, all v
        return value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    return value.reshape(shape)


def _diamond(table: Tensor) -> Tensor:
    """The vectors in use, in our order.  [(2h+1)^2, d]  ->  [2h(h+1) + 2, d]

    Both go through the diamond row by row. All that is outside is row 0 of their table, the corner (-h, -h), which is
    outside too; it is the last of ours.
    """
    h = round(table.size(0) ** 0.5) // 2
    distance = torch.arange(-h, h + 1).abs()
    inside = (distance[:, None] + distance[None, :]).flatten() <= h
    return torch.cat((table[inside], table[:1]))


# ---- the pickle ---------------------------------------------------------------------------------------------------------

DTYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
}
TORCH_CLASSES = re.compile(
    r"torch\.(device|nn\.parallel\.data_parallel\.DataParallel|nn\.modules\.("
    r"activation\.LeakyReLU|container\.(Sequential|ModuleList)|conv\.(Conv2d|ConvTranspose2d)|dropout\.Dropout|"
    r"linear\.(Linear|Identity)|normalization\.LayerNorm|pixelshuffle\.PixelShuffle|sparse\.Embedding))"
)


class StandIn:
    """In place of every object of the authors' classes and of torch's modules: keeps the state, does nothing."""

    __slots__ = ("state",)

    def __new__(cls, *args, **kwargs):
        item = super().__new__(cls)
        item.state = {}
        return item

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}


class RestrictedUnpickler(pickle.Unpickler):
    """Builds containers, stand-ins and records, and refuses every other name.

    A pickle can call only what `find_class` hands out. Nothing handed out here does more than keep its arguments, and
    nothing in it can be changed for a later load: methods and built-in types take no new attributes.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str):
        full = f"{module}.{name}"
        if module.startswith("module.") or TORCH_CLASSES.fullmatch(full):
            return StandIn
        allowed = {
            "collections.OrderedDict": OrderedDict,
            "__builtin__.set": set,  # its name in Python 2, which protocol 2 writes
            "builtins.set": set,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            **{f"torch.{storage}": dtype for storage, dtype in DTYPES.items()},
        }
        if full not in allowed:
            raise WeightsError(f"The file asks for {full}, which a checkpoint of the authors does not need; refused.")
        return allowed[full]

    def persistent_load(self, pid: tuple) -> "Storage | type[StandIn]":
        if pid[0] == "module":  # the legacy format's note of a class and its source
            return StandIn
        _, dtype, key, _, length = pid[:5]
        if not isinstance(dtype, torch.dtype) or not _counts(length) or any(pid[5:]):
            raise ValueError("a storage of another kind than flat arrays of numbers")
        self.storages[key] = Storage(dtype, key, length)
        return self.storages[key]

    def _tensor(self, storage: Storage, offset: int, size: tuple, stride: tuple, *_) -> StoredTensor:
        if not isinstance(storage, Storage) or not _counts(offset, *size, *stride) or len(size) != len(stride):
            raise ValueError("a tensor that is not made of a storage and numbers")
        return StoredTensor(storage, offset, tuple(size), tuple(stride))

    def _parameter(self, data: StoredTensor, *_) -> StoredTensor:
        return data


def _counts(*values) -> bool:
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def _unpickle(file: BinaryIO) -> tuple[object, dict[str, Storage]]:
    """The next object of the file, and the storages that it uses."""
    unpickler = RestrictedUnpickler(file)
    try:
        return unpickler.load(), unpickler.storages
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(f"The file is not a checkpoint written by PyTorch, or it is damaged ({error}).") from None


def _modules(root) -> Iterator[tuple[str, StandIn]]:
    """Every module below a module with its name as a prefix; each once, so that loops in a damaged file end."""
    waiting, seen = [("", root)], set()
    while waiting:
        prefix, module = waiting.pop()
        if isinstance(module, StandIn) and id(module) not in seen:
            seen.add(id(module))
            yield prefix, module
            waiting += [(f"{prefix}{name}.", child) for name, child in _dict_in(module, "_modules").items()]


def _dict_in(module: StandIn, key: str) -> dict:
    value = module.state.get(key)
    return value if isinstance(value, dict) else {}


def _tensors(part: StandIn | dict) -> dict[str, StoredTensor]:
    """Names and tensors of a part, a module or its state dict, without the `module.` of DataParallel."""
    kinds = ("_parameters", "_buffers")
    found = part if isinstance(part, dict) else {
        f"{prefix}{name}": tensor
        for prefix, module in _modules(part) for kind in kinds for name, tensor in _dict_in(module, kind).items()
    }
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items() if isinstance(tensor, StoredTensor)}


# ---- the two file formats -----------------------------------------------------------------------------------------------


class ZippedCheckpoint:
    """torch.save since 1.6: a zip archive with the pickle as `data.pkl` and an entry for each storage."""

    def __init__(self, file: BinaryIO):
        self.archive = zipfile.ZipFile(file)
        pickles = [name for name in self.archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError("The file is a zip archive, but not a checkpoint written by PyTorch.")
        self.folder = pickles[0].removesuffix("data.pkl")
        with self.archive.open(pickles[0]) as entry:
            self.content, _ = _unpickle(entry)

    def read(self, storage: Storage) -> Tensor:
        """All numbers of a storage: [length]."""
        name = f"{self.folder}data/{storage.key}"
        if name not in self.archive.NameToInfo:
            raise EOFError(f"{name} is missing")
        with self.archive.open(name) as entry:
            return _read_numbers(entry, storage, self.archive.getinfo(name).file_size)


class LegacyCheckpoint:
    """torch.save before 1.6: pickles of a magic number, a version, the system, the object and the keys of its storages;
    then each storage as its length, 8 bytes, and its numbers."""

    MAGIC = 0x1950A86A20F9469CFC6C

    def __init__(self, file: BinaryIO):
        magic, _, system = (_unpickle(file)[0] for _ in range(3))
        if magic != self.MAGIC: 
            raise WeightsError("The file is a pickle, but not a checkpoint written by PyTorch.")
        self.content, storages = _unpickle(file)
        self.file = file
