"""Symbols and Gaussian parameters to bytes and back, by constriction's range coder. No network in here.

A coded string is two int16, the smallest and the largest symbol, then the range coder's words. The coder gives every
symbol between those two a probability, however unlikely the Gaussian finds it, so any latents can be coded.
"""

import struct

import constriction
import numpy as np

from entroformer_lib.errors import BitstreamError, WeightsError

_RANGE = struct.Struct("<hh")
LARGEST = 2**15 - 1  # symbols and range are int16


class SymbolEncoder:
    """Collects symbols in coding order; `finish` returns the string."""

    def __init__(self):
        self._symbols: list[np.ndarray] = []
        self._means: list[np.ndarray] = []
        self._scales: list[np.ndarray] = []

    def write(self, symbols: np.ndarray, means: np.ndarray, scales: np.ndarray) -> None:
        """symbols: integers of any shape; means and scales: float64 of the same shape."""
        self._symbols.append(np.asarray(symbols).astype(np.int32).ravel())
        self._means.append(_finite(means))
        self._scales.append(_finite(scales))

    def finish(self) -> bytes:
        symbols = np.concatenate(self._symbols)
        low, high = (int(symbols.min()), int(symbols.max())) if symbols.size else (0, 0)
        if max(-low, high) > LARGEST:
            raise WeightsError(f"A latent of {low if -low > high else high} does not fit the 16 bits of the format.")
        encoder = constriction.stream.queue.RangeEncoder()
        if low < high:
            model = constriction.stream.model.QuantizedGaussian(low, high)
            encoder.encode(symbols, model, np.concatenate(self._means), np.concatenate(self._scales))
        return _RANGE.pack(low, high) + encoder.get_compressed().astype("<u4").tobytes()


class SymbolDecoder:
    """Hands the symbols of one string out in the order they were written."""

    def __init__(self, string: bytes):
        if len(string) < _RANGE.size or len(string) % 4:
            raise BitstreamError("The coded latents are cut short.")
        self.low, self.high = _RANGE.unpack_from(string)
        if self.low > self.high:
            raise BitstreamError("The coded latents are damaged: their range is empty.")
        words = np.frombuffer(string, dtype="<u4", offset=_RANGE.size).astype(np.uint32)
        self._decoder = constriction.stream.queue.RangeDecoder(words)
        if self.low < self.high:
            self._model = constriction.stream.model.QuantizedGaussian(self.low, self.high)

    def read(self, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Symbols, int32, of the shape of `means`."""
        if self.low == self.high:
            return np.full(means.shape, self.low, dtype=np.int32)
        try:
            symbols = self._decoder.decode(self._model, _finite(means), _finite(scales))
        except AssertionError:
            raise BitstreamError("The coded latents are damaged.") from None
        return symbols.reshape(means.shape)


def encode_gaussian(symbols: np.ndarray, means: np.ndarray, scales: np.ndarray) -> bytes:
    """All symbols of one string at once."""
    encoder = SymbolEncoder()
    encoder.write(symbols, means, scales)
    return encoder.finish()


def decode_gaussian(string: bytes, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Inverse of `encode_gaussian`, given the same parameters."""
    return SymbolDecoder(string).read(means, scales)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        raise WeightsError("The entropy model predicts a mean or scale that is not a finite number.")
    return values
