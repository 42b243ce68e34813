"""Files of torch.save, read without running anything that is in them.

The authors' files are pickles of whole modules; loading one the usual way imports and runs whatever it names. The
unpickler here can build containers and inert records and nothing else. Numbers stay in the file until somebody asks.
"""

import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import BinaryIO

import torch

from entroformer_lib.errors import WeightsError

Storage = namedtuple("Storage", "dtype key length")  # a flat array in the file
StoredTensor = namedtuple("StoredTensor", "storage offset size stride")  # a view of a storage, not read yet
Locate = Callable[[Storage], tuple[BinaryIO, int]]  # an open file, and where in it the numbers begin

ALLOWED = {
    **{"collections.OrderedDict": OrderedDict, "builtins.set": set, "torch.LongStorage": torch.int64},
    **{"torch.HalfStorage": torch.float16, "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64},
}
MOST_TUPLES = 2**14  # a checkpoint of the authors has some thousand
INERT = re.compile(
    r"module\..*|torch\.(device|nn\.parallel\.data_parallel\.DataParallel|nn\.modules\.("
    r"activation\.LeakyReLU|container\.(Sequential|ModuleList)|conv\.(Conv2d|ConvTranspose2d)|dropout\.Dropout|"
    r"linear\.(Linear|Identity)|normalization\.LayerNorm|pixelshuffle\.PixelShuffle|sparse\.Embedding))"
)


class StandIn:
    """In place of any object of the authors' classes and of torch's modules: keeps the state, does nothing."""

    state = None

    def __init__(self, *_): ...

    def __setstate__(self, state):
        self.state = state


class RestrictedUnpickler(pickle.Unpickler):
    """Builds containers, stand-ins and records, and refuses every other name.

    A pickle can call only what `find_class` hands out, and nothing handed out here does more than keep its arguments.
    """

    def find_class(self, module: str, name: str):
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")  # the old protocols write Python 2's name
        rebuild = {"torch._utils._rebuild_tensor_v2": self._tensor, "torch._utils._rebuild_parameter": self._parameter}
        if INERT.fullmatch(full):
            return StandIn
        if full not in ALLOWED | rebuild:
            raise WeightsError(f"The file asks for {full!r}, which no checkpoint of the authors needs; it is refused.")
        return (ALLOWED | rebuild)[full]

    def persistent_load(self, pid: tuple):
        """A storage; or, in the old format, a class with its source."""
        if pid[0] == "module":
            return StandIn
        _, dtype, key, _, length, *view = pid
        if not isinstance(dtype, torch.dtype) or length < 0 or any(view):
            raise ValueError("a storage that is no array of numbers")
        return self.storages.setdefault(key, Storage(dtype, key, length))

    def _tensor(self, storage: Storage, offset: int, size: tuple, stride: tuple, *_) -> StoredTensor:
        if not isinstance(storage, Storage) or not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
            raise ValueError("a tensor that is no view of an array")
        return StoredTensor(storage, offset, tuple(size), tuple(stride))

    def _parameter(self, data: StoredTensor, *_) -> StoredTensor:
        return data


def _unpickle(file: BinaryIO) -> tuple[object, dict[str, Storage]]:
    """The next object in the file, and the storages that it uses."""
    start = file.tell()
    try:
        _check_size(file)
        file.seek(start)
        unpickler = RestrictedUnpickler(file, encoding="utf-8")
        unpickler.storages = {}
        return unpickler.load(), unpickler.storages
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise anything, also with a text that has no end
        why = type(error).__name__ if isinstance(error, KeyError | RecursionError) else error
        raise WeightsError(f"The file is not a checkpoint written by PyTorch, or is damaged ({why}).") from None


def _check_size(file: BinaryIO) -> None:
    """Refuses what a few bytes of a pickle can make too large, before anything is made: Python allocates its memo up to
    the highest number, and hashes a tuple in a tuple in a tuple until its stack is full."""
    kept = tuples = 0
    for opcode, number, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            kept += 1
            if number > kept:
                raise ValueError("a memo with gaps")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > MOST_TUPLES:
            raise ValueError("more tuples than a checkpoint has")


def open_zip(file: BinaryIO) -> tuple[object, Locate]:
    """torch.save since 1.6: a zip archive with the pickle as `data.pkl` and an entry for each storage."""
    archive = zipfile.ZipFile(file)
    pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise WeightsError("The file is a zip archive, but not a checkpoint written by PyTorch.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise WeightsError("The file is compressed, which PyTorch does not do; it might become larger than the memory.")
    folder = pickled[0].removesuffix("data.pkl")
    content, _ = _unpickle(archive.open(pickled[0]))
    return content, lambda storage: (archive.open(archive.NameToInfo[f"{folder}data/{storage.key}"]), 0)


def open_legacy(file: BinaryIO) -> tuple[object, Locate]:
    """torch.save before 1.6: pickles of a magic number, a version, the system, the object and the keys of its storages;
    then each storage as its length in 8 bytes and its numbers."""
    if _unpickle(file)[0] != 0x1950A86A20F9469CFC6C:
        raise WeightsError("The file is a pickle, but not a checkpoint written by PyTorch.")
    _, _, (content, storages), (keys, _) = (_unpickle(file) for _ in range(4))
    positions, position = {}, file.tell()
    for key in keys if isinstance(keys, list) else ():
        positions[key] = position + 8
        position += 8 + storages[key].length * storages[key].dtype.itemsize
    return content, lambda storage: (file, positions[storage.key])


def open_checkpoint(file: BinaryIO) -> tuple[object, Locate]:
    """What the file holds, as records, and where the numbers of a storage are; both formats of torch.save."""
    return open_zip(file) if file.peek(4).startswith(b"PK\3\4") else open_legacy(file)
