"""A folder of pictures as tar shards for streaming (WebDataset's form), with a manifest that says what is in them.

The pictures come in a random order, which a table may give instead, and shard i has the i-th part of it. So shards can
be made by several processes, and those that an interrupted command has made are kept. A shard and what is told of it
depend on the pictures and the options alone: the same bytes on every machine.

manifest.json: pictures, bytes, plan (a checksum of what was asked for), min_side, licences (with the number of
pictures), licence_texts, left_out (name and reason); shards, each with file, bytes, sha256 and, in the order of the
tar, names, sizes ([width, height]) and licences (numbers in the list above).
"""

import csv
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from entroformer_lib.codec.many import go_through
from entroformer_lib.codec.pictures import pixels_of
from entroformer_lib.datasets import files_under, is_picture
from entroformer_lib.errors import DataError
from entroformer_lib.files import read_json, write_bytes
from entroformer_lib.training.chance import generator
from entroformer_lib.training.shards import MANIFEST

LICENCE_FILES = ("licence", "license", "copying")
NAME_COLUMNS, LICENCE_COLUMNS = ("name", "ImageID"), ("licence", "license", "License")
UNKNOWN = "unknown"
BEGUN = "packing.json"  # says what an unfinished folder is made of


@dataclass(frozen=True)
class Plan:
    """What goes into the shards: the names of the pictures below `folder` in their order, each with its licence."""

    folder: Path
    names: tuple[str, ...]
    licences: tuple[str, ...]
    texts: dict[str, str]
    per_shard: int
    min_side: int

    @property
    def digest(self) -> str:
        """Other pictures, sizes of files, licences or options have another one."""
        files = [(name, _size(self.folder / name)) for name in self.names]
        told = [files, self.licences, self.texts, self.per_shard, self.min_side]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class _Packing:
    """One shard, as `codec/many.py` has work done. What it is made of are names and licences of pictures."""

    folder: Path
    min_side: int
    device = "cpu"
    ending = ".tar"
    what = "shard"

    def prepared(self) -> "_Packing":
        return self

    def __call__(self, pictures: list[tuple[str, str]], form: str) -> tuple[bytes, dict]:
        """The tar, and what the manifest tells of it. Every picture is decoded once, to see whether it is whole."""
        tar, row = io.BytesIO(), {"names": [], "sizes": [], "licences": [], "left_out": []}
        with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as shard:
            for name, licence in pictures:
                try:
                    data = (self.folder / name).read_bytes()
                    height, width = pixels_of(data).shape[:2]
                    if min(height, width) < self.min_side:
                        raise DataError(f"Its shorter side has {min(height, width)} pixels.")
                except (DataError, OSError) as error:
                    row["left_out"].append({"name": name, "reason": getattr(error, "strerror", None) or str(error)})
                    continue
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
                row["names"].append(name)
                row["sizes"].append([width, height])
                row["licences"].append(licence)
        data = tar.getvalue()
        return data, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **row}


def pack(
    folder: Path,
    out: Path,
    min_side: int = 64,
    per_shard: int = 500,
    table: Path | None = None,
    limit: int | None = None,
    jobs: int | None = None,
    tell: Callable[[dict, int], None] = lambda row, shards: None,
) -> dict:
    """Packs every picture of a folder and its subfolders.  ->  the manifest

    Args:
        folder: a LICENCE, LICENSE or COPYING file in it or a subfolder is that of the pictures there and below.
        out: a folder; what an interrupted call with the same arguments has made in it is kept.
        min_side: pixels that a picture must have on its shorter side.
        per_shard: pictures of a shard, before broken ones are left out.
        table: a CSV with a column name or ImageID (file names may lack their ending), and perhaps licence or License.
            Pictures that it does not name are left out; the others come in its order.
        limit: the most pictures, the first ones of the order that are large enough.
        jobs: processes; default: as many as there are cores.
        tell: called with what is known of each shard as it is done, and how many there are.

    Raises:
        DataError: no picture, a number below 1, a table that is none, or `out` holds something else.
        UserError: it cannot be written to.
    """
    for what, number in {"per-shard": per_shard, "limit": limit, "jobs": jobs}.items():
        if number is not None and number < 1:
            raise DataError(f"--{what} must be at least 1; it is {number}.")
    if folder.resolve() == out.resolve():
        raise DataError(f"{out} is the folder of the pictures; name another one for the shards.")
    plan = _plan(folder, out, min_side, per_shard, table, limit)
    digest, path, begun = plan.digest, out / MANIFEST, out / BEGUN
    for note in (path, begun):
        if note.exists() and not _is_of(note, digest):
            raise DataError(f"{out} holds shards of other pictures or options; choose another folder, or remove it.")
    if path.exists():
        manifest = read_json(path)
        for shard in manifest["shards"]:
            if _size(out / shard["file"]) != shard["bytes"]:
                raise DataError(f"{out / shard['file']} is missing or damaged; remove {out} and pack again.")
        return manifest
    if not begun.exists() and any(out.glob("shard-*.tar")):
        raise DataError(f"{out} holds shards already, and no manifest says of what; choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(begun, json.dumps({"plan": digest}).encode())
    pictures = list(zip(plan.names, plan.licences, strict=True))
    parts = [pictures[i : i + per_shard] for i in range(0, len(pictures), per_shard)]
    files = [out / f"shard-{i:06}.tar" for i in range(len(parts))]
    rows: dict[Path, dict] = {}
    for file in files:
        if note := _note(file):
            rows[file] = note
            tell(note, len(files))
    left = [(part, file) for part, file in zip(parts, files, strict=True) if file not in rows]
    for row in go_through(_Packing(folder.absolute(), min_side), left, jobs):
        if "error" in row:
            raise DataError(f"{row['output']}: {row['error']}")
        file = Path(row.pop("output"))
        rows[file] = {**row, "file": file.name}  # where `file` was the list of its pictures
        write_bytes(file.with_suffix(".json"), json.dumps(rows[file]).encode())
        tell(rows[file], len(files))
    manifest = _manifest_of(plan, digest, [rows[file] for file in files])
    if not manifest["pictures"]:
        raise DataError(f"All {len(plan.names)} pictures in {folder} are broken or too small.")
    write_bytes(path, json.dumps(manifest).encode())
    for note in (begun, *(file.with_suffix(".json") for file in files)):
        note.unlink(missing_ok=True)
    return manifest


def _is_of(note: Path, digest: str) -> bool:
    """Whether a manifest, or what is there before it, is that of a plan."""
    try:
        return json.loads(note.read_bytes())["plan"] == digest
    except (ValueError, KeyError, TypeError):
        return False


def _note(file: Path) -> dict | None:
    """What an earlier call has told of a shard that it has finished."""
    try:
        note = json.loads(file.with_suffix(".json").read_bytes())
        return note if _size(file) == note["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def _size(file: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return file.stat().st_size
    except OSError:  # a broken link, or one to itself
        return None


def _manifest_of(plan: Plan, digest: str, rows: list[dict]) -> dict:
    counts = Counter(licence for row in rows for licence in row["licences"])
    licences = sorted(counts)
    numbers = {licence: i for i, licence in enumerate(licences)}
    keys = ("file", "bytes", "sha256", "names", "sizes")
    return {
        "pictures": sum(counts.values()),
        "bytes": sum(row["bytes"] for row in rows),
        "plan": digest,
        "min_side": plan.min_side,
        "licences": [{"name": name, "pictures": counts[name]} for name in licences],
        "licence_texts": plan.texts,
        "left_out": [left for row in rows for left in row["left_out"]],
        "shards": [
            {key: row[key] for key in keys} | {"licences": [numbers[name] for name in row["licences"]]} for row in rows
        ],
    }


def _plan(folder: Path, out: Path, min_side: int, per_shard: int, table: Path | None, limit: int | None) -> Plan:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    inside = Path(os.path.realpath(out))
    files = [path for path in files_under(folder) if inside not in Path(os.path.realpath(path)).parents]
    texts = {
        path.relative_to(folder).as_posix(): path.read_text(errors="replace")
        for path in files
        if path.stem.lower() in LICENCE_FILES and not is_picture(path)
    }
    names = [path.relative_to(folder).as_posix() for path in files if is_picture(path)]
    if table is None:
        names = [names[i] for i in generator(0, len(names)).permutation(len(names))]
        licences = [_licence_of(name, texts) for name in names]
    else:
        names, licences = _by_table(names, texts, table)
    if limit is not None:
        large = (i for i, name in enumerate(names) if _shorter_side(folder / name) >= min_side)
        first = [i for i, _ in zip(large, range(limit), strict=False)]
        names, licences = [names[i] for i in first], [licences[i] for i in first]
    if not names:
        raise DataError(f"There is no picture to pack in {folder}.")
    return Plan(folder, tuple(names), tuple(licences), texts, per_shard, min_side)


def _licence_of(name: str, texts: dict[str, str]) -> str:
    """The licence file that lies nearest above a picture."""
    for parent in Path(name).parents:
        for file in texts:
            if Path(file).parent == parent:
                return file
    return UNKNOWN


def _by_table(names: list[str], texts: dict[str, str], table: Path) -> tuple[list[str], list[str]]:
    """The pictures that a table names, in its order, and their licences."""
    known = {key: name for name in names for key in (Path(name).stem, Path(name).name, name)}
    found: dict[str, str] = {}
    for row in _rows(table):
        column = next((column for column in NAME_COLUMNS if column in row), None)
        if column is None:
            raise DataError(f"The table {table} has no column {' or '.join(NAME_COLUMNS)}.")
        if (key := row[column]) in known:  # None in a row that is too short
            licence = next((row[column] for column in LICENCE_COLUMNS if row.get(column)), None)
            found.setdefault(known[key], licence or _licence_of(known[key], texts))
    return list(found), list(found.values())


def _rows(table: Path) -> Iterator[dict]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"The table {table} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _shorter_side(path: Path) -> int:
    """By the header of the picture alone; 0 where that cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # a damaged header can raise anything
        return 0
