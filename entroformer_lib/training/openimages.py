"""A subset of Open Images for training, as the paper has one: which pictures, and how to fetch them elsewhere.

The paper trains on 14,886 pictures of Open Images and does not say which. Here the choice follows from a seed and the
pictures' IDs alone, whatever the order of the index. The index has no width and height, so more are listed than wanted:
`entroformer data pack --table list.csv --min-side 400 --limit 14886` takes the first of the list that are there and
large enough.
"""

import base64
import binascii
import csv
import hashlib
import heapq
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from entroformer_lib.errors import DataError
from entroformer_lib.files import write_bytes

COUNT, SEED, MIN_SIDE = 14_886, 0, 400
# Of the index that the project publishes: image_ids_and_rotation.csv
COLUMNS = (
    "ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title",
    "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation",
)  # fmt: skip


def plan_download(
    index: Sequence[str], out: Path, count: int = COUNT, spare: float = 1.0, seed: int = SEED, subset: str = "train"
) -> int:
    """Writes `list.csv`, the rows of the chosen pictures in the order of choice, and `download.txt`, the same as input
    for aria2c, with checksums, and `README.txt`, the commands.  ->  how many pictures are listed

    Args:
        index: files or addresses of Open Images' index, perhaps compressed.
        count: pictures that are wanted. spare: share of more that is listed, for those too small or gone.
        subset: train, validation or test; or all.

    Raises:
        DataError: an index that cannot be read or has other columns, or too few pictures in it; other files there.
    """
    if count < 1:
        raise DataError(f"--count must be at least 1; it is {count}.")
    if not 0 <= spare <= 1000:
        raise DataError(f"--spare must be a number from 0 to 1000; it is {spare:g}.")
    wanted = (row for row in _rows(index) if subset in ("all", row["Subset"]))
    chosen = heapq.nsmallest(round(count * (1 + spare)), wanted, key=lambda row: _rank(row["ImageID"], seed))
    if len(chosen) < count:
        raise DataError(f"The index has {len(chosen)} pictures of the subset {subset}, and {count} are wanted.")
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(chosen)
    words = f"{len(chosen)} pictures of Open Images ({subset}), seed {seed}; {count} of them are wanted.\n\n"
    words += "aria2c --input-file download.txt --dir pictures --continue --auto-file-renaming=false\n"
    words += f"entroformer data pack pictures shards --table list.csv --min-side {MIN_SIDE} --limit {count}\n"
    texts = {"list.csv": table.getvalue(), "download.txt": "".join(map(_entry, chosen)), "README.txt": words}
    files = {out / name: text.encode() for name, text in texts.items()}
    for path, data in files.items():
        if path.exists() and path.read_bytes() != data:
            raise DataError(f"{path} exists and holds something else; choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        write_bytes(path, data)
    return len(chosen)


def _rank(image: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{image}".encode()).digest()


def _entry(row: dict) -> str:
    """A picture for aria2c: its address, its name here, its checksum, which the index has in base64."""
    ending = Path(row["OriginalURL"].partition("?")[0]).suffix or ".jpg"
    lines, digest = [row["OriginalURL"], f"  out={row['ImageID']}{ending}"], b""
    with suppress(binascii.Error):
        digest = base64.b64decode(row["OriginalMD5"], validate=True)
    if len(digest) == 16:
        lines.append(f"  checksum=md5={digest.hex()}")
    return "\n".join(lines) + "\n"


def _rows(index: Sequence[str]) -> Iterator[dict]:
    import fsspec

    for name in index:
        try:
            with fsspec.open(name, "rt", encoding="utf-8", newline="", compression="infer") as file:
                rows = csv.DictReader(file)
                missing = set(COLUMNS) - set(rows.fieldnames or ())
                if missing:
                    raise DataError(f"{name} is no index of Open Images: it has no column {sorted(missing)[0]}.")
                for row in rows:
                    if None in row.values():
                        raise DataError(f"{name} is cut short in line {rows.line_num}.")
                    yield row
        except DataError:
            raise
        except Exception as error:  # each store has its own
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"The index {name} cannot be read: {reason}.") from None
