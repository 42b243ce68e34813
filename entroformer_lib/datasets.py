"""Pictures to test on: fetched with checksums, or the samples that come with scikit-image."""

import hashlib
import os
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from entroformer_lib.errors import DataError
from entroformer_lib.files import data_folder, replacing


@dataclass(frozen=True)
class Remote:
    """One file to fetch: where it is, what it is called here, and its checksum as `algorithm:hex`."""

    url: str
    name: str
    checksum: str


def _kodak() -> list[Remote]:
    """24 photographs of 768x512, the field's test set. Test only: never train on them."""
    lines = (data_folder() / "reference" / "kodak.sha256").read_text().split("\n")
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [Remote(f"http://r0k.us/graphics/kodak/kodak/{name}", name, f"sha256:{digest}") for digest, name in pairs]


def _clic2020() -> list[Remote]:
    """Professional photographs, the validation set of CLIC 2020."""
    name = "professional_valid_2020.zip"
    return [Remote(f"https://data.vision.ee.ethz.ch/cvl/clic/{name}", name, "md5:7111ee240435911db04dbc5f40d50272")]


DATASETS = {
    "kodak": _kodak,
    "clic2020": _clic2020,
}
SAMPLES = ("astronaut", "chelsea", "coffee", "rocket")  # photographs inside scikit-image, no network needed


def fetch(name: str, folder: Path) -> list[Path]:
    """Fetches a data set into a folder; what is already there and whole is not fetched again.

    Args:
        name: a key of DATASETS, or "samples" for scikit-image's photographs.

    Returns:
        The pictures, sorted.

    Raises:
        DataError: unknown name, no network, or a file that does not have its checksum.
    """
    if name == "samples":
        return _write_samples(folder)
    if name not in DATASETS:
        raise DataError(f"There is no data set '{name}'; there are samples, {', '.join(DATASETS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    remotes = DATASETS[name]()
    for number, remote in enumerate(remotes, 1):
        print(f"{number}/{len(remotes)} {remote.name}", file=sys.stderr)
        fetch_file(remote, folder)
    for path in folder.glob("*.zip"):
        _unpack(path, folder)
    return sorted(folder.rglob("*.png"))


def fetch_file(remote: Remote, folder: Path) -> Path:
    """One file, whole and with the right checksum; a part left by an earlier try is continued."""
    path = folder / remote.name
    if path.exists() and _checksum(path, remote.checksum) == remote.checksum:
        return path
    part = folder / (remote.name + ".part")
    request = urllib.request.Request(remote.url)
    have = part.stat().st_size if part.exists() else 0
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            mode = "ab" if answer.status == 206 else "wb"  # a server that ignores Range sends all of it again
            with open(part, mode) as file:
                while block := answer.read(2**16):
                    file.write(block)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is already as long as the file
            raise DataError(f"{remote.url} answers {error.code} {error.reason}; {_by_hand(remote, folder)}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{remote.url} cannot be reached ({reason}); {_by_hand(remote, folder)}") from None
    if _checksum(part, remote.checksum) != remote.checksum:
        part.unlink()
        raise DataError(f"{remote.url} has not the expected checksum and was removed; {_by_hand(remote, folder)}")
    os.replace(part, path)
    return path


def _by_hand(remote: Remote, folder: Path) -> str:
    return f"if you have {remote.name} from elsewhere, put it into {folder}."


def _checksum(path: Path, like: str) -> str:
    algorithm = like.split(":")[0]
    with open(path, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _unpack(archive: Path, folder: Path) -> None:
    """Takes the pictures out of a zip, by their bare names."""
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            name = Path(member).name
            if name.lower().endswith(".png") and not name.startswith("."):
                with replacing(folder / name) as part:
                    part.write_bytes(file.read(member))


def sample_picture(name: str = "astronaut"):
    """A photograph that comes with scikit-image, as a PIL image in RGB; see SAMPLES."""
    from PIL import Image
    from skimage import data

    if name not in SAMPLES:
        raise DataError(f"There is no sample picture '{name}'; there are {', '.join(SAMPLES)}.")
    return Image.fromarray(getattr(data, name)())


def _write_samples(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in SAMPLES]
    for path in paths:
        with replacing(path) as part:
            sample_picture(path.stem).save(part, format="png")
    return paths
