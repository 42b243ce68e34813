import struct
import zlib

import pytest

from entroformer_lib.codec.container import Container
from entroformer_lib.errors import BitstreamError

WHOLE = Container(768, 512, False, "tiny-parallel", b"\x01\x02\x03\x04", 0xDEADBEEF, b"zz" * 100, b"y" * 999)


@pytest.mark.parametrize("changes", [{}, dict(width=1, height=65535, grey=True, model="", z_string=b"", y_string=b"")])
def test_round_trip(changes):
    from dataclasses import replace

    container = replace(WHOLE, **changes)
    assert Container.unpack(container.pack()) == container


def test_overhead_is_small():
    assert len(WHOLE.pack()) - len(WHOLE.y_string) - len(WHOLE.z_string) <= 45


def test_every_damaged_byte_is_noticed():
    data = WHOLE.pack()
    for i in range(len(data)):
        with pytest.raises(BitstreamError):
            Container.unpack(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])


def test_every_cut_and_every_addition_is_noticed():
    data = WHOLE.pack()
    for i in range(len(data)):
        with pytest.raises(BitstreamError):
            Container.unpack(data[:i])
    with pytest.raises(BitstreamError):
        Container.unpack(data + b"\x00")


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, "not an .ef file"),
        (b"hello, world, this is text", "not an .ef file"),
        (b"\x93EF\x01" + b"\x00" * 50, "version 1"),
        (b"\x93EF\x03" + b"\x00" * 50, "checksum"),
    ],
)
def test_what_it_is_instead_is_said(data, sentence):
    with pytest.raises(BitstreamError, match=sentence):
        Container.unpack(data)


def resealed(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def test_a_forged_header_is_refused():
    """With a correct checksum, but lengths that point outside, sizes of zero, or a name that is no text."""
    data = WHOLE.pack()
    for i in range(4, 30):
        for value in (0x00, 0x80, 0xFF):
            forged = resealed(data[:i] + bytes([value]) + data[i + 1 :])
            try:
                container = Container.unpack(forged)
            except BitstreamError:
                continue
            assert 1 <= container.width <= 65535 and 1 <= container.height <= 65535
