"""Many tar shards as one collection, in which sample g has a place that follows from the seed, g and the batch size.

Each epoch has every picture once. The shards, in an order of the epoch's own, make one long row, which is cut into as
many stretches, equal within one picture, as a batch has samples: place l of every batch takes the l-th stretch, one
picture after the other. A process that has some places of the batch so reads its own shards and few others', whatever
their sizes, and no process ever runs out before another. Inside a shard the pictures come in a random order.

Nothing is read but what is asked for: to open a shard, the headers of its members; then the pictures themselves. So a
run that goes on at sample g reads nothing of the samples before.
"""

import contextlib
import functools
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entroformer_lib.datasets import is_picture
from entroformer_lib.errors import DataError, PassedOver
from entroformer_lib.files import file_digest
from entroformer_lib.training.chance import SHARDS, generator
from entroformer_lib.training.shard_cache import ShardCache, default_folder, file_name, is_remote, read

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """A tar, and which of its pictures count. sha256: its checksum, by the manifest, where there is one."""

    name: str
    usable: np.ndarray  # int32, their numbers among the shard's pictures
    pictures: int
    sha256: str | None = None


class _Header(tarfile.TarInfo):
    """A member's header. A damaged one is an error here; tarfile takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


class OpenShard:
    """A shard, opened: the name of every picture, and its bytes on request.

    Only the headers of the members are read here, of which each says where the next one stands.

    Raises:
        DataError: it is missing, cannot be fetched, is cut short or no tar, or not what its manifest says.
    """

    def __init__(self, name: str, cache: ShardCache, sha256: str | None = None, checked: bool = False):
        self.name = name
        with _intact(self.name), contextlib.ExitStack() as opened:
            self.file = opened.enter_context(cache.open(name, sha256, checked))
            if checked and not is_remote(name) and file_digest(Path(name)) != sha256:
                raise DataError(f"The shard {name} has not the checksum that its manifest says.")
            with tarfile.open(fileobj=self.file, mode="r:", tarinfo=_Header) as members:
                found = [m for m in members if m.isreg() and not m.issparse() and is_picture(m.name)]
            opened.pop_all()  # stays open
        self.names = [m.name for m in found]
        self.places = np.array([(m.offset_data, m.size) for m in found], np.int64).reshape(-1, 2)

    def read(self, number: int) -> bytes:
        """The bytes of one picture."""
        offset, size = map(int, self.places[number])
        with _intact(self.name):
            self.file.seek(offset)
            return self.file.read(size)

    def close(self) -> None:
        self.file.close()


@contextmanager
def _intact(name: str) -> Iterator[None]:
    """Inside, an error of a tar becomes a sentence that names it."""
    try:
        yield
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise DataError(f"The tar {name} is damaged or cannot be read: {reason}.") from None


@dataclass(frozen=True)
class Reading:
    """How shards are read.

    checked: compare each with its checksum in the manifest. pass_over: leave out a shard that cannot be read, with a
    warning.
    """

    cache: ShardCache = ShardCache(default_folder())
    checked: bool = False
    pass_over: bool = False


READING = Reading()


def shard_names(manifest: str) -> list[str]:
    """The shards that a manifest lists, by their whole names.

    Raises:
        DataError: it is not there, or damaged.
    """
    if read(manifest) is None:
        raise DataError(f"There is no manifest at {manifest}, or it may not be read.")
    names = [_beside(manifest, file) for file in _manifest(manifest)]
    return names if is_remote(manifest) else [file_name(name) for name in names]


def _beside(name: str, file: str) -> str:
    """The name of another file in the same folder, or at an address that differs in its last part."""
    return re.sub(r"[^/\\]*$", lambda _: file, name, count=1)


def find_shards(names: Sequence[str], side: int, wanted: Callable[[str], bool], reading: Reading) -> list[Shard]:
    """What is known of each shard: from the manifest that lies beside it (packing.py), or from its headers.

    Without a manifest every shard is opened once for that, which fetches it.

    Args:
        side: with a manifest, pictures with a shorter side do not count.
        wanted: whether a picture counts, by its file name.

    Raises:
        DataError: a shard that cannot be read, a damaged manifest, or checksums asked for where there is no manifest.
    """
    shards = []
    for name in names:
        row = None
        if not name.startswith("pipe:"):
            row = _manifest(_beside(name, MANIFEST)).get(name[len(_beside(name, "")) :])
        if row is None and reading.checked:
            raise DataError(f"There is no {MANIFEST} beside {name} with its checksum.")
        try:
            if row is None:
                opened = OpenShard(name, reading.cache)
                opened.close()
                found, sizes = opened.names, None
            else:
                found, sizes = row["names"], row["sizes"]
        except DataError as error:
            _pass_over(error, reading)
            continue
        kept = [wanted(Path(picture).name) for picture in found]
        if sizes is not None:
            kept = [k and min(size) >= side for k, size in zip(kept, sizes, strict=True)]
        usable = np.flatnonzero(kept).astype(np.int32)
        shards.append(Shard(name, usable, len(found), row and row["sha256"]))
    _manifest.cache_clear()
    return shards


def open_shard(shard: Shard, reading: Reading) -> OpenShard | None:
    """A shard, opened; None where it is broken and passed over.

    Raises:
        DataError: it is broken, or has another number of pictures than its manifest says.
    """
    try:
        opened = OpenShard(shard.name, reading.cache, shard.sha256, reading.checked)
        if len(opened.names) != shard.pictures:
            has = f"{len(opened.names)} pictures, and its manifest says {shard.pictures}"
            raise DataError(f"The shard {shard.name} has {has}.")
        return opened
    except DataError as error:
        _pass_over(error, reading)
        return None


def _pass_over(error: DataError, reading: Reading) -> None:
    if not reading.pass_over:
        raise error
    warnings.warn(f"left out a shard: {error}", PassedOver, stacklevel=3)


@functools.lru_cache(maxsize=4)
def _manifest(name: str) -> dict[str, dict]:
    """The rows of a manifest by their file; none where there is no manifest."""
    data = read(name)
    if data is None:
        return {}
    try:
        rows = json.loads(data)["shards"]
        return {_bare(row["file"]): _checked(row) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{name} is damaged, or no manifest of `entroformer data pack`.") from None


def _bare(file: str) -> str:
    """The name of a file beside the manifest: no path, no address, no command. ValueError for another."""
    if re.search(r"[/\\]|^pipe:", file):
        raise ValueError(file)
    return file


def _checked(row: dict) -> dict:
    """What a manifest says of one shard. ValueError or TypeError where no shard can be so."""
    names, sizes = [os.fspath(name) for name in row["names"]], [(int(w), int(h)) for w, h in row["sizes"]]
    if len(names) != len(sizes) or not isinstance(row["sha256"], str):
        raise ValueError(row["file"])
    return {"names": names, "sizes": sizes, "sha256": row["sha256"]}


class ShardedPictures:
    """The pictures of shards, in the order that stands at the top.

    Args:
        places: how many samples a batch has, over all processes.
        seed: decides the order.
        reading: where a shard turns out to be broken and that is passed over, the following one takes its place.
    """

    def __init__(self, shards: list[Shard], places: int, seed: int, reading: Reading):
        self.shards, self.places, self.seed, self.reading = shards, places, seed, reading
        self.counts = tuple(len(shard.usable) for shard in shards)
        self.count = sum(self.counts)
        self.opened: dict[int, OpenShard | None] = {}  # the latest last; None: broken

    def place(self, g: int) -> tuple[int, int, int]:
        """Where sample g stands: its epoch; its shard, counted in the epoch's order; and its number in that shard's."""
        epoch, p = divmod(g, self.count)
        stretch, step = p % self.places, p // self.places
        position = stretch * (self.count // self.places) + min(stretch, self.count % self.places) + step
        ends = _order_of(epoch, self.seed, self.counts)[1]
        at = int(np.searchsorted(ends, position, side="right"))
        return epoch, at, position - int(ends[at - 1] if at else 0)

    def candidates(self, g: int) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of sample g's picture; then of those that may take its place, where it cannot be used: the
        others of its shard, and those of the shards that follow."""
        epoch, first, number = self.place(g)
        order = _order_of(epoch, self.seed, self.counts)[0]
        for i in range(len(order)):
            which = int(order[(first + i) % len(order)])
            pictures = self._open(which)
            if pictures is None:
                continue
            inside = generator(self.seed, SHARDS, epoch, which).permutation(self.shards[which].usable)
            for j in range(len(inside)):
                member = int(inside[(number + j) % len(inside)])
                yield pictures.names[member], pictures.read(member)

    def _open(self, which: int) -> OpenShard | None:
        """A shard, left open for the pictures that will follow: one for each place of the batch, and one more."""
        opened = self.opened.pop(which) if which in self.opened else open_shard(self.shards[which], self.reading)
        self.opened[which] = opened
        if len(self.opened) > self.places + 1:
            oldest = self.opened.pop(next(iter(self.opened)))
            if oldest is not None:
                oldest.close()
        return opened


@functools.lru_cache(maxsize=4)
def _order_of(epoch: int, seed: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    order = generator(seed, SHARDS, epoch).permutation(len(counts))
    return order, np.cumsum(np.array(counts)[order])
