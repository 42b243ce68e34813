"""The authors' released checkpoints as models of this library, read without running anything that is in them.

The files are pickles of whole modules. Loading one the usual way imports and runs whatever it names. Here a restricted
unpickler builds nothing but inert records: a `StandIn` for each module, a `StoredTensor` for each tensor. Then the
tensors are found by name, checked against the architecture, and only then read.

Their symbols are clamped to [-128, 127], ours are not. Latents that large are rare, and only there do the numbers of
the two differ (their two end symbols also get logistic tails instead of the Gaussian's).
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
USUAL_TOP_K = 32
LIKELIHOOD_FLOOR = 1e-12  # theirs; our own models use 1e-9

# ---- the pickle ---------------------------------------------------------------------------------------------------------

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
TORCH_CLASSES = {
    "torch.device", "torch.nn.parallel.data_parallel.DataParallel", "torch.nn.modules.activation.LeakyReLU",
    "torch.nn.modules.container.ModuleList", "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.ConvTranspose2d", "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.linear.Linear",
    "torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.pixelshuffle.PixelShuffle",
    "torch.nn.modules.sparse.Embedding",
}  # fmt: skip


class StandIn:
    """Takes the place of any object of the authors' classes and of torch's modules: keeps the state, does nothing."""

    __slots__ = ("state",)

    def __new__(cls, *args, **kwargs):
        item = super().__new__(cls)
        item.state = {}
        return item

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}


class Storage(NamedTuple):
    """Where numbers lie in the file: the key of a flat array, its type and length."""

    dtype: torch.dtype
    key: str
    length: int

    @property
    def bytes(self) -> int:
        return self.length * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor that has not been read yet: a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class RestrictedUnpickler(pickle.Unpickler):
    """Builds plain containers, stand-ins and records; refuses every other name.

    Python's own unpickler imports nothing by itself: all it can call is what `find_class` hands out. Nothing that is
    handed out here does more than to keep its arguments, and nothing can be changed by the pickle for a later load.
    """

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" in TORCH_CLASSES or module.startswith("module."):
            return StandIn
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        allowed = {
            "collections.OrderedDict": OrderedDict,
            "__builtin__.set": set,  # the same under its old and its new name
            "builtins.set": set,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
        }
        if f"{module}.{name}" not in allowed:
            raise WeightsError(f"The file asks for {module}.{name}, which no checkpoint of the authors needs; refused.")
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid) -> Storage | type[StandIn]:
        if pid[0] == "module":  # older files: a class with its source code, which we leave alone
            return StandIn
        kind, dtype, key, _, length, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not _whole(length) or any(view):
            raise ValueError("an entry that is not an array of numbers")
        return Storage(dtype, str(key), length)

    def _tensor(self, storage, offset, size, stride, *_) -> StoredTensor:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(map(_whole, numbers)) or len(size) != len(stride):
            raise ValueError("a tensor whose shape is not made of numbers")
        return StoredTensor(storage, offset, tuple(size), tuple(stride))

    def _parameter(self, tensor, *_) -> StoredTensor:
        return tensor


def _whole(value) -> bool:
    return type(value) is int and value >= 0


def _unpickle(file: BinaryIO):
    """The next object in the file, as stand-ins and records."""
    try:
        return RestrictedUnpickler(file, encoding="utf-8").load()
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(f"The file is not a checkpoint of PyTorch, or is damaged ({error}).") from None


class ZippedCheckpoint:
    """torch.save since 1.6: a zip archive with the pickle as `data.pkl` and each storage as an entry of its own."""

    def __init__(self, file: BinaryIO):
        self.archive = zipfile.ZipFile(file)
        pickles = [name for name in self.archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise WeightsError("The file is a zip archive, but not a checkpoint of PyTorch.")
        self.folder = pickles[0].removesuffix("data.pkl")
        with self.archive.open(pickles[0]) as entry:
            self.content = _unpickle(entry)

    def read(self, storage: Storage) -> Tensor:
        """All numbers of a storage: [length]."""
        try:
            entry = self.archive.getinfo(f"{self.folder}data/{storage.key}")
        except KeyError:
            raise EOFError(f"the array {storage.key} is missing") from None
        with self.archive.open(entry) as file:
            return _read_numbers(file, storage, entry.file_size)


class LegacyCheckpoint:
    """torch.save before 1.6: pickles in a row (magic number, protocol, system, object, storage keys), then the storages.

    Each storage is its length as an 8-byte integer and then its numbers.
    """

    MAGIC = 0x1950A86A20F9469CFC6C

    def __init__(self, file: BinaryIO):
        magic, _, system = _unpickle(file), _unpickle(file), _unpickle(file)
        if magic != self.MAGIC or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise WeightsError("The file is a pickle, but not a checkpoint of PyTorch.")
        self.file, self.content = file, _unpickle(file)
        self.positions, dtypes = {}, {t.storage.key: t.storage.dtype for t in _stored(self.content)}
        for key in _unpickle(file):
            length = int.from_bytes(file.read(8), "little")
            self.positions[key] = file.tell()

    def read(self, storage: Storage) -> Tensor:
        """All numbers of a storage: [length]."""
        self.file.seek(self.positions[storage.key])
        return _read_numbers(self.file, storage, storage.bytes)
