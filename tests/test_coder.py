import numpy as np
import pytest

from entroformer_lib.errors import BitstreamError, WeightsError
from entroformer_lib.rangecoder import SymbolDecoder, SymbolEncoder, decode_gaussian, encode_gaussian


def drawn(count, seed=0, spread=5.0):
    rng = np.random.default_rng(seed)
    means, scales = rng.normal(0, spread, count), np.exp(rng.uniform(np.log(0.11), np.log(20), count))
    return np.round(rng.normal(means, scales)).astype(np.int32), means, scales


def ideal_bits(symbols, means, scales):
    from scipy.stats import norm

    mass = norm.cdf(symbols + 0.5, means, scales) - norm.cdf(symbols - 0.5, means, scales)
    return -np.log2(np.maximum(mass, 1e-9)).sum()


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_round_trip(count):
    symbols, means, scales = drawn(count)
    assert np.array_equal(decode_gaussian(encode_gaussian(symbols, means, scales), means, scales), symbols)


def test_size_is_close_to_ideal():
    symbols, means, scales = drawn(50_000)
    assert 8 * len(encode_gaussian(symbols, means, scales)) < 1.001 * ideal_bits(symbols, means, scales) + 100


def test_parts_are_read_as_they_were_written():
    parts = [drawn(n, seed=n) for n in (5, 1, 300)]
    encoder = SymbolEncoder()
    for part in parts:
        encoder.write(*part)
    decoder = SymbolDecoder(encoder.finish())
    for symbols, means, scales in parts:
        assert np.array_equal(decoder.read(means.reshape(1, -1), scales.reshape(1, -1)), symbols.reshape(1, -1))


def test_any_symbol_can_be_coded():
    """However unlikely: far from its mean, at the smallest scale, or all alike."""
    means, scales = np.zeros(6), np.full(6, 0.11)
    for symbols in ([0, 3, -4000, 32767, -32767, 1], [7] * 6, [0] * 6):
        symbols = np.array(symbols, dtype=np.int32)
        assert np.array_equal(decode_gaussian(encode_gaussian(symbols, means, scales), means, scales), symbols)


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(WeightsError, match="40000"):
        encode_gaussian(np.array([0, 40_000]), np.zeros(2), np.ones(2))
    with pytest.raises(WeightsError, match="finite"):
        encode_gaussian(np.array([0, 1]), np.array([0, np.nan]), np.ones(2))


@pytest.mark.parametrize("string", [b"", b"\x00\x00\x00", b"\x05\x00\x00\x00", b"\x00\x00\x05\x00\x01"])
def test_damaged_strings_are_refused(string):
    with pytest.raises(BitstreamError):
        SymbolDecoder(string)
