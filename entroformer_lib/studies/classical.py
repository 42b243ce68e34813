"""Classical codecs beside the models, as Pillow has them: coded live, so the files are as real as ours."""

import bisect
import io
from pathlib import Path

from PIL import Image, features

from entroformer_lib.codec import codec
from entroformer_lib.codec.quality import psnr_db
from entroformer_lib.errors import StudyError
from entroformer_lib.studies.rate_distortion import measured

# Settings from coarse to fine, and what each is called. All in 4:2:0 but JPEG 2000, which has no subsampling.
CODECS = {
    "jpeg": ("quality", (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)),
    "webp": ("quality", (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)),
    "jpeg2000": ("compression ratio", (240, 120, 80, 60, 48, 34, 24, 17, 12, 8, 6)),
    "avif": ("quality", (10, 20, 30, 40, 50, 60, 70, 80, 90)),
}
_FEATURES = {"jpeg": "jpg", "webp": "webp", "jpeg2000": "jpg_2000", "avif": "avif"}


def available(name: str) -> bool:
    """Whether this Pillow was built with the codec."""
    return name in CODECS and bool(features.check(_FEATURES[name]))


def check_available(name: str) -> None:
    """Refuses a codec that is unknown or that this Pillow does not have.

    Raises:
        StudyError: with what there is.
    """
    if not available(name):
        there = ", ".join(n for n in CODECS if available(n))
        raise StudyError(f"This Pillow has no codec '{name}'; it has {there}.")


def coded(picture: Image.Image, name: str, setting: float) -> bytes:
    """A picture as a file of a classical codec.

    Raises:
        StudyError: a codec that is unknown or that this Pillow does not have.
    """
    check_available(name)
    options = {
        "jpeg": dict(format="JPEG", quality=int(setting), optimize=True),
        "webp": dict(format="WEBP", quality=int(setting), method=6),
        "jpeg2000": dict(format="JPEG2000", quality_mode="rates", quality_layers=[setting], irreversible=True, mct=1),
        "avif": dict(format="AVIF", quality=int(setting), speed=4, max_threads=1),
    }[name]
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


def evaluate_classical(path: Path, name: str, setting: float) -> dict:
    """One picture through a classical codec: the columns of `rate_distortion.measured`."""
    picture, _ = codec.to_rgb(codec.open_picture(path))
    return measured(picture, lambda: coded(picture, name, setting), decoded)


def decoded(data: bytes) -> Image.Image:
    """The picture in a file of a classical codec, RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg_of_size(
    picture: Image.Image, size: int, optimize: bool = True, subsampling: str = "4:2:0"
) -> tuple[bytes, int]:
    """The smallest JPEG (Pillow) of at least `size` bytes, or the largest there is, and its quality.

    JPEG gets at least as many bytes as what it is compared with. Huffman tables made for the picture (`optimize`) save
    a fifth at low rates; the published JPEG curves use the standard tables.
    """

    def jpeg(quality: int) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=quality, optimize=optimize, subsampling=subsampling)
        return buffer.getvalue()

    qualities = range(1, 96)  # size grows with quality
    first = bisect.bisect_left(qualities, size, key=lambda quality: len(jpeg(quality)))
    quality = qualities[min(first, len(qualities) - 1)]
    return jpeg(quality), quality


def jpeg_psnr_db(path: Path, size: int, optimize: bool = True, subsampling: str = "4:2:0") -> float:
    """PSNR of the JPEG of a picture that has at least `size` bytes, in dB; see `jpeg_of_size`."""
    picture, _ = codec.to_rgb(codec.open_picture(path))
    data, _ = jpeg_of_size(picture, size, optimize, subsampling)
    return psnr_db(picture, decoded(data))
