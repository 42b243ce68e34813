"""The entropy model as the coder runs it: the same bits on every machine.

A range decoder falls apart when its probabilities differ from the encoder's by the smallest amount, and floating-point
sums differ between machines, thread counts and devices. So the part of the model that both sides run (h_s, context
model, entropy parameters) computes in integers, as `integer.py` explains: not nearly the same everywhere, but the same.
Means and scales are then rounded to grids, which the coder's tables need anyway. Behind it stands the container's
checksum over the latents: a machine that breaks the rules of arithmetic gives an error, never a wrong picture.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.coding.coder import SymbolDecoder, SymbolEncoder
from entroformer_lib.models.clock import stage
from entroformer_lib.models.context import Exchange
from entroformer_lib.models.gain import Rate
from entroformer_lib.models.groupedmixer import ExchangeGroup, merge, split
from entroformer_lib.models.integer_copy import integer_copy

MEAN_STEPS = 256  # means are multiples of 1/256: costs 0.0001 bit at the smallest scale
SCALE_STEPS = 32  # scales are exp(i / 32), 3% apart: costs less than 0.0002 bit
SCALE_INDEX = (-8 * SCALE_STEPS, 12 * SCALE_STEPS)
_SCALES = np.array(
    [round(math.exp(i / SCALE_STEPS) * 2**30) / 2**30 for i in range(SCALE_INDEX[0], SCALE_INDEX[1] + 1)]
)


def snap(means: Tensor, log_scales: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means, and scales given by their logarithms, on their grids, as float64 arrays of the same shape."""
    steps = torch.round(log_scales * SCALE_STEPS).clamp(*SCALE_INDEX) - SCALE_INDEX[0]
    means = (torch.round(means * MEAN_STEPS) / MEAN_STEPS).double()
    return means.cpu().numpy(), _SCALES[steps.long().cpu().numpy()]


# (sites [k] or a group, means, scales) -> latents: [k, M] or [n, M / k_c]; the coder reads or writes them
SymbolsOf = Callable[[Tensor | int, np.ndarray, np.ndarray], Tensor]


class ExactEntropyModel:
    """Codes the latents of one picture with a copy of a model's entropy model that computes in integers.

    Encoder and decoder call the same method, `_code`; they differ only in where the symbols come from. A context model
    that takes one site at a time has one difference more: its encoder knows all latents and computes all features at
    once, in a tenth of the time of so many single steps. Sums of integers do not notice.

    Such a context model runs on the CPU, also beside a GPU: starting a GPU's kernels for a single token takes longer
    than computing it here. The bits are the same either way.
    """

    def __init__(self, model):
        self.site_by_site = model.config.context in ("serial", "cnn")
        self.device = torch.device("cpu") if self.site_by_site else next(model.g_s.parameters()).device
        parts = map(integer_copy, (model.h_s, model.context_model, model.entropy_parameters))
        self.h_s, self.context_model, self.entropy_parameters = (p and p.to(self.device) for p in parts)
        self.dim, self.M = model.config.dim, model.config.M
        self.grouped = model.config.context == "grouped"

    @torch.inference_mode()
    def encode(self, y_hat: Tensor, z_hat: Tensor | None, rate: Rate | None = None) -> bytes:
        """y_hat: [1, M, h, w] integers, z_hat: [1, Z, h/4, w/4], rate: of `model.rate(..., exact=True)`
        ->  the string of y."""
        y_hat = y_hat.to(self.device, torch.float32)
        known = self._in_order(y_hat)
        encoder = SymbolEncoder()

        def write(which, means, scales):
            symbols = known[which]
            encoder.write(symbols.cpu().numpy(), means, scales)
            return symbols

        self._code(y_hat.shape[-2:], z_hat, write, rate, y_hat if self.site_by_site else None)
        with stage("entropy coding"):
            return encoder.finish()

    @torch.inference_mode()
    def decode(self, string: bytes, z_hat: Tensor | None, size, rate: Rate | None = None) -> Tensor:
        """The string of y and (h, w)  ->  y_hat: [1, M, h, w]"""
        decoder = SymbolDecoder(string)
        coded = self._in_order(torch.empty(1, self.M, *size, device=self.device))

        def read(which, means, scales):
            with stage("entropy coding"):
                symbols = decoder.read(means, scales)
            coded[which] = torch.from_numpy(symbols).to(self.device, torch.float32)
            return coded[which]

        self._code(size, z_hat, read, rate)
        if self.grouped:
            return merge(coded[None], size, self.context_model.counts, self.context_model.order_name)
        return coded.T.reshape(1, self.M, *size)

    def _in_order(self, y_hat: Tensor) -> Tensor:
        """Latents as the steps take them.  y_hat: [1, M, h, w]  ->  [n, M], or of groups [G, n, M / k_c]"""
        if self.grouped:
            return split(y_hat, self.context_model.counts, self.context_model.order_name)[0]
        return y_hat[0].flatten(1).T.contiguous()

    def _code(
        self, size, z_hat: Tensor | None, symbols_of: SymbolsOf, rate: Rate | None = None, known: Tensor | None = None
    ) -> None:
        """Runs the model's coding steps; only one where all latents are `known`, [1, M, h, w]."""
        h, w = size
        rate = rate and Rate(*(t.to(self.device, torch.float32) for t in rate))
        hyper = None
        if z_hat is not None:
            with stage("hyper"):
                z_hat = z_hat.to(self.device, torch.float32)
                hyper = self.h_s(z_hat) if rate is None else self.h_s(z_hat * rate.z_inverse) + rate.vector
        if self.grouped:
            self.context_model.code(h, w, hyper, self._exchange_of_groups(symbols_of, rate))
            return
        exchange = self._exchange_of_sites(hyper, symbols_of, rate)
        if self.context_model is None:
            exchange(torch.arange(h * w), None)
        elif known is not None:
            with stage("context"):
                context = self.context_model.features(known if rate is None else known * rate.inverse)
            exchange(torch.arange(h * w), context.flatten(2)[..., None])
        else:
            self.context_model.code(h, w, exchange)

    def _exchange_of_sites(self, hyper: Tensor | None, symbols_of: SymbolsOf, rate: Rate | None) -> Exchange:
        hyper = None if hyper is None else hyper.flatten(2)[..., None]  # [1, D, n, 1]

        def exchange(sites, context):
            sites = sites.to(self.device)
            with stage("parameters"):
                here = None if hyper is None else hyper[:, :, sites]
                if here is None and context is None:  # the first slice of a model without hyperprior
                    context = torch.zeros(1, self.dim, len(sites), 1, device=self.device)
                if here is None and rate is not None:
                    context = context + rate.vector
                means, log_scales = self.entropy_parameters.raw(here, context, rate)  # [1, M, k, 1]
                means, scales = snap(means[0, :, :, 0].T, log_scales[0, :, :, 0].T)  # [k, M]
            symbols = symbols_of(sites, means, scales)
            return symbols if rate is None else symbols * rate.inverse[0, :, 0, 0]

        return exchange

    def _exchange_of_groups(self, symbols_of: SymbolsOf, rate: Rate | None) -> ExchangeGroup:
        slices = [None] * self.context_model.counts[0]
        if rate is not None:  # of each channel slice: [m]
            parts = (t[0, :, 0, 0].chunk(len(slices)) for t in rate[:3])
            slices = [rate._replace(gain=g, inverse=i, log_gain=log) for g, i, log in zip(*parts, strict=True)]

        def exchange(group, means, log_scales):
            part = slices[self.context_model.order[group][0]]
            symbols = symbols_of(group, *snap(*self.entropy_parameters.raw(means, log_scales, part)))
            return symbols if part is None else symbols * part.inverse

        return exchange
