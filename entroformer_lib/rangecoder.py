"""Symbols to bytes and back: with Gaussian parameters by constriction's range coder, with tables by rANS. No network in
here.

A coded string is two int16, the smallest and the largest symbol, then the range coder's words. The coder gives every
symbol between those two a probability, however unlikely the Gaussian finds it, so any latents can be coded.
"""

import struct
from bisect import bisect_right
from decimal import Context, Decimal

import constriction
import numpy as np

from entroformer_lib.errors import BitstreamError, WeightsError

_RANGE = struct.Struct("<hh")
_FORTY_DIGITS = Context(prec=40, traps=[])
LARGEST = 2**15 - 1  # symbols and range are int16
# No honest string is longer: a symbol of y costs up to 24 bits, one of z up to 16 and 9 groups of 4 bits
Y_BYTES, Z_BYTES, MORE_BYTES = 4, 8, 16  # for each symbol; and for each string


def scale_of(log_scale: float) -> float:
    """exp of a scale's logarithm, rounded as it should be. The last bit of exp differs between C libraries, and in
    numpy between processors; this one is computed in integers."""
    return float(_FORTY_DIGITS.exp(Decimal(log_scale)))


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
        self._scales.append(_scales(scales))

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
            symbols = self._decoder.decode(self._model, _finite(means), _scales(scales))
        except AssertionError:
            raise BitstreamError("The coded latents are damaged.") from None
        return symbols.reshape(means.shape)

    def finish(self) -> None:
        """Raises BitstreamError where words are left."""
        if not self._decoder.maybe_exhausted():
            raise BitstreamError("The coded latents are damaged: they go on behind the last.")


def encode_gaussian(symbols: np.ndarray, means: np.ndarray, scales: np.ndarray) -> bytes:
    """All symbols of one string at once."""
    encoder = SymbolEncoder()
    encoder.write(symbols, means, scales)
    return encoder.finish()


def decode_gaussian(string: bytes, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Inverse of `encode_gaussian`, given the same parameters."""
    decoder = SymbolDecoder(string)
    symbols = decoder.read(means, scales)
    decoder.finish()
    return symbols


class RansDecoder:
    """Reads strings of CompressAI's coder, whose own decoder reads on behind the end of a string that is cut short.

    Probabilities are multiples of 1/65536. A string is two 32-bit words, the state, low half first, and then the words
    that it takes in whenever it falls below 2^31. At the end it is 2^31 and no word is left.

    The last symbol of a table stands for all values beyond it, which follow in groups of 4 bits: first their number,
    then the value, low groups first, its sign in the lowest bit.
    """

    START = 2**31
    LONGEST = 8  # groups of 4 bits in a value of 32 bits

    def __init__(self, string: bytes):
        if len(string) < 8 or len(string) % 4:
            raise BitstreamError("The coded hyper-latents are cut short.")
        low, high, *words = struct.unpack(f"<{len(string) // 4}I", string)
        self._state, self._words = high << 32 | low, iter(words)

    def read(self, count: int, cdf: list[int]) -> list[int]:
        """`count` symbols of one table.  cdf: rising from 0 to 65536, one number more than there are symbols"""
        state, last, symbols = self._state, len(cdf) - 2, []
        for _ in range(count):
            part = state & 0xFFFF
            symbol = bisect_right(cdf, part) - 1
            state = (cdf[symbol + 1] - cdf[symbol]) * (state >> 16) + part - cdf[symbol]
            if state < self.START:
                state = state << 32 | self._word()
            if symbol == last:
                self._state = state
                symbol = self._beyond(last)
                state = self._state
            symbols.append(symbol)
        self._state = state
        return symbols

    def finish(self) -> None:
        """Raises BitstreamError where the string is not at its end."""
        if self._state != self.START or next(self._words, None) is not None:
            raise BitstreamError("The coded hyper-latents are damaged.")

    def _beyond(self, last: int) -> int:
        groups = self._four_bits()
        if groups > self.LONGEST:
            raise BitstreamError("The coded hyper-latents are damaged.")
        value = sum(self._four_bits() << 4 * i for i in range(groups))
        return -(value >> 1) - 1 if value & 1 else (value >> 1) + last

    def _four_bits(self) -> int:
        bits = self._state & 15
        self._state >>= 4
        if self._state < self.START:
            self._state = self._state << 32 | self._word()
        return bits

    def _word(self) -> int:
        word = next(self._words, None)
        if word is None:
            raise BitstreamError("The coded hyper-latents are cut short.")
        return word


def _scales(values: np.ndarray) -> np.ndarray:
    values = _finite(values)
    if values.size and not values.min() > 0:  # the coder would end the process
        raise WeightsError("The entropy model predicts a scale of 0.")
    return values


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        raise WeightsError("The entropy model predicts a mean or scale that is not a finite number.")
    return values
