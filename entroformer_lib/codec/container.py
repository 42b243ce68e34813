"""The `.ef` container: what a decoder must know, the coded strings, and checksums over both. docs/format.md says what
is in them, and what a decoder checks.

    bytes  what
    3      93 45 46, that is \\x93 "EF"
    1      version, 3 (1 and 2 had other arithmetic)
    1      flags: 1 = the picture is grey, 2 = the rate is variable, 4 = there is a search window, 8 = there is a k
    1-3    width, then the same of height, as LEB128 (7 bits a byte, low bits first, high bit = more follow)
    0 or 2 level of a variable rate in 1/256 (`models/gain.py`), where the flag says so
    0-2    search window (LEB128, up to 4,096), where the flag says so
    0-3    k of the context model (LEB128, up to 65,536; 0 = all), where the flag says so
    1-2+n  length (LEB128, up to 255) and UTF-8 name of the model
    4      first bytes of the SHA-256 of its decoder weights (`zoo.weights_digest`)
    4      CRC-32 of the latents, so that a decoder that differs is noticed
    1-5    length of the hyper-latents' string, as LEB128; 0 without hyperprior
    ...    string of z, string of y
    4      CRC-32 of everything before, so that damage is noticed

Integers are little-endian. About 45 bytes surround the strings.
"""

import io
import struct
import zlib
from dataclasses import dataclass

from entroformer_lib.errors import BitstreamError, DataError, WeightsError
from entroformer_lib.models.config import LARGEST_K, LARGEST_WINDOW

MAGIC = b"\x93EF"
VERSION = 3
LARGEST_SIDE = 2**16 - 1
LEVEL_STEPS = 256
LARGEST_NAME = 255  # bytes
MAX_PIXELS = (
    2**25
)  # of a picture that is decoded unless more are allowed: 13 GB of memory with base-serial and base-parallel
NONSENSE = "The .ef file has a header that makes no sense."
_U16, _U32 = struct.Struct("<H"), struct.Struct("<I")


@dataclass(frozen=True)
class Container:
    """One coded picture. Sizes in pixels; `weights`, `latents_crc`, `level`, `window` and `k` as described above."""

    width: int
    height: int
    grey: bool
    model: str
    weights: bytes
    latents_crc: int
    z_string: bytes
    y_string: bytes
    level: float | None = None
    window: int | None = None
    k: int | None = None

    def pack(self) -> bytes:
        """Raises WeightsError for a model's name that no file can hold."""
        name = self.model.encode(errors="surrogateescape")  # bytes of a file's name that are no text stay what they are
        if len(name) > LARGEST_NAME or name != name.decode(errors="ignore").encode() or not self.model.isprintable():
            kind = f"printable text of up to {LARGEST_NAME} bytes"
            raise WeightsError(f"A model's name is {kind} in an .ef file; {name} is not.")
        flags = self.grey, self.level is not None, self.window is not None, self.k is not None
        data = b"".join(
            [
                MAGIC,
                bytes([VERSION, sum(flag << i for i, flag in enumerate(flags))]),
                _varint(self.width),
                _varint(self.height),
                b"" if self.level is None else _U16.pack(round(self.level * LEVEL_STEPS)),
                b"" if self.window is None else _varint(self.window),
                b"" if self.k is None else _varint(self.k),
                _varint(len(name)),
                name,
                self.weights[:4],
                _U32.pack(self.latents_crc),
                _varint(len(self.z_string)),
                self.z_string,
                self.y_string,
            ]
        )
        return data + _U32.pack(zlib.crc32(data))

    @classmethod
    def unpack(cls, data: bytes) -> "Container":
        """Raises BitstreamError for anything that is not one whole, undamaged file of this version."""
        if not data:
            raise BitstreamError("The file is empty.")
        if data[: len(MAGIC)] != MAGIC[: len(data)]:
            raise BitstreamError("This is not an .ef file.")
        if len(data) > 3 and data[3] != VERSION:
            raise BitstreamError(f"This .ef file has version {data[3]}; this program reads version {VERSION}.")
        if len(data) < 12 or _U32.unpack(data[-4:])[0] != zlib.crc32(data[:-4]):
            raise BitstreamError("The .ef file is cut short or damaged: its checksum does not fit.")
        body = io.BytesIO(data[4:-4])
        flags = _take(body, 1)[0]
        width, height = _take_varint(body), _take_varint(body)
        if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE) or flags > 15:
            raise BitstreamError(NONSENSE)
        level = _U16.unpack(_take(body, 2))[0] / LEVEL_STEPS if flags & 2 else None
        window = _take_varint(body) if flags & 4 else None
        if window is not None and not 1 <= window <= LARGEST_WINDOW:
            raise BitstreamError(NONSENSE)
        k = _take_varint(body) if flags & 8 else None
        if k is not None and k > LARGEST_K:
            raise BitstreamError(NONSENSE)
        length = _take_varint(body)
        if length > LARGEST_NAME:
            raise BitstreamError(NONSENSE)
        try:
            name = _take(body, length).decode()
        except UnicodeDecodeError:
            raise BitstreamError(NONSENSE) from None
        if not name.isprintable():  # it is shown, and ends up in sentences
            raise BitstreamError(NONSENSE)
        weights, (crc,) = _take(body, 4), _U32.unpack(_take(body, 4))
        z_string = _take(body, _take_varint(body))
        return cls(width, height, bool(flags & 1), name, weights, crc, z_string, body.read(), level, window, k)

    def check_pixels(self, most: int | None) -> None:
        """Raises DataError where the picture has more pixels than are allowed; None allows all."""
        if most is not None and self.width * self.height > most:
            raise DataError(
                f"The file says that its picture has {self.width} x {self.height} pixels, and {most:,} in all are "
                "allowed; --max-pixels (in Python max_pixels) allows more."
            )


def _take(body: io.BytesIO, count: int) -> bytes:
    taken = body.read(count)
    if len(taken) < count:
        raise BitstreamError("The .ef file ends inside its header.")
    return taken


def _take_varint(body: io.BytesIO) -> int:
    value = 0
    for shift in range(0, 35, 7):
        byte = _take(body, 1)[0]
        value |= (byte & 0x7F) << shift
        if byte == 0 and shift:
            break  # longer than it need be
        if byte < 0x80:
            return value
    raise BitstreamError(NONSENSE)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
