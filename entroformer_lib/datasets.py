"""Pictures in folders, and pictures to test on: fetched with checksums, or scikit-image's samples."""

import functools
import http.client
import io
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from entroformer_lib.errors import DataError
from entroformer_lib.files import data_folder, file_digest, write_bytes

Remote = tuple[str, str]  # the address of a file, and its checksum as `algorithm:hex`


def _kodak() -> list[Remote]:
    """24 photographs of 768x512, the field's test set. Test only: never train on them."""
    lines = (data_folder() / "reference" / "kodak.sha256").read_text().split("\n")
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [(f"http://r0k.us/graphics/kodak/kodak/{name}", f"sha256:{digest}") for digest, name in pairs]


def _clic2020() -> list[Remote]:
    """Professional photographs, the validation set of CLIC 2020."""
    address = "https://data.vision.ee.ethz.ch/cvl/clic/professional_valid_2020.zip"
    return [(address, "md5:7111ee240435911db04dbc5f40d50272")]


DATASETS = {"kodak": _kodak, "clic2020": _clic2020}
SAMPLES = ("astronaut", "chelsea", "coffee", "rocket")  # photographs inside scikit-image, no network needed
# Formats that Pillow knows by their beginning and cannot read by itself; EPS it hands to another program.
ONLY_NAMED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def files_under(folder: str | os.PathLike) -> list[Path]:
    """All files of a folder and its subfolders, sorted. Links are followed, and no folder is entered twice."""
    known, files = {os.path.realpath(parent) for parent in Path(folder).resolve().parents}, []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in known:
            subfolders.clear()
            continue
        known.add(real)
        subfolders.sort()
        files += [path for path in map(Path(place).joinpath, names) if path.is_file() or not path.exists()]
    return sorted(files)


def is_picture(name: str | os.PathLike) -> bool:
    """Whether a file's ending is that of a format that Pillow reads."""
    return Path(name).suffix.lower() in _endings()


@functools.cache
def _endings() -> frozenset[str]:
    from PIL import Image

    formats = Image.registered_extensions()
    read = {*Image.OPEN, "MPO"} - ONLY_NAMED  # MPO begins as a JPEG and is opened as one
    return frozenset(ending for ending, form in formats.items() if form in read)


def fetch(name: str, folder: Path) -> list[Path]:
    """Fetches a data set into a folder; what is already there and whole is not fetched again.

    Args:
        name: a key of DATASETS, or "samples" for scikit-image's photographs.

    Returns:
        The pictures, sorted.

    Raises:
        DataError: unknown name, no network, a file that does not have its checksum, or something else under the name of
            a sample.
    """
    if name == "samples":
        return _write_samples(folder)
    if name not in DATASETS:
        raise DataError(f"There is no data set '{name}'; there are samples, {', '.join(DATASETS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    for url, checksum in tqdm(DATASETS[name](), unit="file", disable=None):
        path = fetch_file(url, checksum, folder)
        pictures += _unpack(path, folder) if path.suffix == ".zip" else [path] if path.suffix == ".png" else []
    return sorted(pictures)


def fetch_file(url: str, checksum: str, folder: Path) -> Path:
    """One file, whole and with the right checksum; a part left by an earlier try is continued.

    Raises:
        DataError: it cannot be fetched, or has another checksum.
    """
    path, (algorithm, _, digest) = folder / url.rpartition("/")[2], checksum.partition(":")
    if path.exists():
        if file_digest(path, algorithm) == digest:
            return path
        raise DataError(f"{path} exists and is another file than {url}; remove it, or choose another folder.")
    part, by_hand = (
        path.with_name(f"{path.name}.part"),
        f"if you have {path.name} from elsewhere, put it into {folder}.",
    )
    try:
        _download(url, part)
    except urllib.error.HTTPError as error:
        raise DataError(f"{url} answers {error.code} {error.reason}; {by_hand}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} cannot be reached ({getattr(error, 'reason', error)}); {by_hand}") from None
    if file_digest(part, algorithm) != digest:
        part.unlink()
        raise DataError(f"{url} has not the expected checksum and was removed; {by_hand}")
    os.replace(part, path)
    return path


def _download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            mode = "ab" if answer.status == 206 else "wb"  # a server that ignores Range sends all of it again
            with part.open(mode) as file:
                shutil.copyfileobj(answer, file)
            if answer.length:  # what urllib still waits for
                raise OSError(f"the connection ended {answer.length} bytes before the end; the same command goes on")
    except urllib.error.HTTPError as error:
        if not have or error.code != 416:  # 416: the part is as long as the file already
            raise


def _unpack(archive: Path, folder: Path) -> list[Path]:
    """Takes the pictures out of a zip, by their bare names.  ->  them"""
    found = []
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            name = Path(member).name
            if name.lower().endswith(".png") and not name.startswith("."):
                content, path = file.read(member), folder / name
                if path.exists() and path.read_bytes() != content:
                    raise DataError(f"{path} exists and is another picture; choose another folder.")
                write_bytes(path, content)
                found.append(path)
    return found


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
        file = io.BytesIO()
        sample_picture(path.stem).save(file, format="png")
        if path.exists() and path.read_bytes() != file.getvalue():
            raise DataError(f"{path} exists and is another picture; choose another folder.")
        write_bytes(path, file.getvalue())
    return paths
