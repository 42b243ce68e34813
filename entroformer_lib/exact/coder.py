"""The latents of one picture to a string and back, by an entropy model that computes exactly.

A range decoder falls apart when its probabilities differ from the encoder's by the smallest amount, and floating-point
sums differ between machines, thread counts and devices. So the part of the model that both sides run (h_s, context
model, entropy parameters) computes exactly (arithmetic.py): not nearly the same everywhere, but the same. Means and
scales are then rounded to grids, which the coder's tables need anyway. Behind it stands the container's checksum over
the latents: a machine that breaks the rules of arithmetic gives an error, never a wrong picture.
"""

import copy
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.errors import WeightsError
from entroformer_lib.exact.arithmetic import Exact
from entroformer_lib.models.attention import Block
from entroformer_lib.models.entropy_model import ToldTheRate
from entroformer_lib.models.gain import Rate
from entroformer_lib.rangecoder import SymbolDecoder, SymbolEncoder, scale_of
from entroformer_lib.stages import stage, tell

MEAN_STEPS = 256  # means are multiples of 1/256: costs 0.0001 bit at the smallest scale
SCALE_STEPS = 32  # scales are exp(i / 32), 3% apart: costs less than 0.0002 bit
SCALE_INDEX = (-8 * SCALE_STEPS, 12 * SCALE_STEPS)
_SCALES = np.array(
    [round(scale_of(i / SCALE_STEPS) * 2**30) / 2**30 for i in range(SCALE_INDEX[0], SCALE_INDEX[1] + 1)]
)

# (channels, sites, means, scales), float64 [k, m]  ->  these latents: [k, m]
SymbolsOf = Callable[[slice, Tensor, np.ndarray, np.ndarray], Tensor]


def snap(means: Tensor, log_scales: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means, and scales given by their logarithms, on their grids, as float64 arrays of the same shape.

    Raises:
        WeightsError: a scale that is no number.
    """
    steps = torch.round(log_scales * SCALE_STEPS).clamp(*SCALE_INDEX) - SCALE_INDEX[0]
    if steps.isnan().any():
        raise WeightsError("The entropy model predicts a scale that is not a finite number.")
    means = (torch.round(means * MEAN_STEPS) / MEAN_STEPS).double()
    return means.cpu().numpy(), _SCALES[steps.long().cpu().numpy()]


class ExactCoder:
    """Codes latents with a copy of a network's entropy model.

    Encoder and decoder take the same steps; they differ only in where the symbols come from. An entropy model that
    takes one site at a time has one difference more: its encoder knows all latents and computes all distributions at
    once, in a tenth of the time of so many single steps. Exact sums do not notice.

    Such a model runs on the CPU, also beside a GPU: starting a GPU's kernels for a single token takes longer than
    computing it here. The bits are the same either way.
    """

    def __init__(self, network):
        parts = (network.h_s, network.context_model, network.entropy_parameters)
        h_s, context, parameters = (p and copy.deepcopy(p).float().eval().requires_grad_(False) for p in parts)
        self.model, self.parameters, self.h_s = network.kind(context, parameters), parameters, h_s
        self.M, self.device = network.config.M, next(network.g_s.parameters()).device
        if self.model.one_by_one:
            self.device = torch.device("cpu")
        for part in (h_s, context, parameters):
            if part is not None:
                part.to(self.device)
        self.exact = Exact()
        for block in context.modules() if self.model.one_by_one else ():
            if isinstance(block, Block):
                block.forward = functools.partial(self.exact.through, block)

    def rate(self, network, level: float | None) -> Rate | None:
        """What the entropy model is told of a level, exactly."""
        with self.exact:
            rate = network.rate(level)
        return rate and Rate(*(t.to(self.device, torch.float32) for t in rate))

    @torch.inference_mode()
    def encode(self, y_hat: Tensor, z_hat: Tensor | None, rate: Rate | None = None) -> bytes:
        """y_hat: [1, M, h, w] integers, z_hat: [1, Z, h/4, w/4], rate: as `rate` above gives it
        ->  the string of y."""
        y_hat = y_hat.to(self.device, torch.float32)
        known, encoder = y_hat[0].flatten(1), SymbolEncoder()  # [M, n]

        def write(channels, sites, means, scales):
            symbols = known[channels][:, sites].T
            encoder.write(symbols.cpu().numpy(), means, scales)
            return symbols

        self._code(y_hat.shape[-2:], z_hat, rate, write, y_hat if self.model.one_by_one else None)
        with stage("entropy coding"):
            return encoder.finish()

    @torch.inference_mode()
    def decode(self, string: bytes, z_hat: Tensor | None, size, rate: Rate | None = None) -> Tensor:
        """The string of y and (h, w)  ->  y_hat: [1, M, h, w]"""
        decoder, coded = (
            SymbolDecoder(string),
            torch.empty(self.M, size[0] * size[1], dtype=torch.float32, device=self.device),
        )

        def read(channels, sites, means, scales):
            symbols = torch.from_numpy(decoder.read(means, scales)).to(self.device, torch.float32)
            coded[channels, sites] = symbols.T
            return symbols

        self._code(size, z_hat, rate, read)
        decoder.finish()
        return coded.view(1, self.M, *size)

    def _code(
        self, size, z_hat: Tensor | None, rate: Rate | None, symbols_of: SymbolsOf, known: Tensor | None = None
    ) -> None:
        """Takes the model's coding steps; only one where all latents are `known`, [1, M, h, w]."""
        model, hyper = self.model, None
        if rate is not None:
            model = ToldTheRate(model, rate)
        with self.exact, stage("hyper"):
            if z_hat is not None:
                z_hat = z_hat.to(self.device, torch.float32)
                hyper = self.h_s(z_hat if rate is None else z_hat * rate.z_inverse)
        if known is not None:
            with self.exact, stage("context"):
                means, log_scales = (v[0].flatten(1).T for v in model.predict(known, hyper))  # [n, M]
            symbols_of(slice(None), slice(None), *snap(means, self.parameters.bounded(log_scales)))
            return
        steps, latents, done = model.steps(*size, hyper), None, 0
        while True:
            with self.exact, stage("context"):
                try:
                    step = steps.send(latents)
                except StopIteration:
                    return
            grids = snap(step.means, self.parameters.bounded(step.log_scales))
            with stage("entropy coding"):
                latents = symbols_of(step.channels, step.sites, *grids)
            done += latents.numel()
            tell("latents", done, self.M * size[0] * size[1])
