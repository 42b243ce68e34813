"""The entropy model as the coder runs it: the same bits on every machine.

A range decoder falls apart when its probabilities differ from the encoder's by the smallest amount, and floating-point
sums differ between machines, thread counts and devices. Three steps take that away:

1. the part of the model that both sides run (h_s, context model, entropy parameters) runs in float64, where the
   differences are about 1e-13;
2. attention ranks scores on a coarse grid and settles ties by a rule (`attention.keep_top_k`), so those differences
   cannot choose other keys;
3. means and scales are rounded to coarse grids, so that what is left of the differences disappears.

What remains is the chance that a value falls within 1e-13 of the border between two grid points. The container's
checksum over the latents turns even that into an error instead of a wrong picture.
"""

import copy
import math

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.coding.coder import SymbolDecoder, SymbolEncoder
from entroformer_lib.models.clock import stage

MEAN_STEPS = 256  # means are multiples of 1/256: costs 0.0001 bit at the smallest scale
SCALE_STEPS = 32  # scales are exp(i / 32), 3% apart: costs less than 0.0002 bit
SCALE_INDEX = (-8 * SCALE_STEPS, 12 * SCALE_STEPS)
_SCALES = np.array(
    [round(math.exp(i / SCALE_STEPS) * 2**30) / 2**30 for i in range(SCALE_INDEX[0], SCALE_INDEX[1] + 1)]
)


def snap(means: Tensor, scales: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means and scales on their grids, as float64 arrays of the same shape."""
    steps = torch.round(scales.log() * SCALE_STEPS).clamp(*SCALE_INDEX) - SCALE_INDEX[0]
    return (torch.round(means * MEAN_STEPS) / MEAN_STEPS).cpu().numpy(), _SCALES[steps.long().cpu().numpy()]


class ExactEntropyModel:
    """Codes the latents of one picture with a float64 copy of a model's entropy model.

    Encoder and decoder call the same method, `_code`; they differ only in where the symbols come from.
    """

    def __init__(self, model):
        self.h_s, self.context_model, self.entropy_parameters = (
            None if part is None else copy.deepcopy(part).eval().double()
            for part in (model.h_s, model.context_model, model.entropy_parameters)
        )
        for part in (self.h_s, self.context_model, self.entropy_parameters):
            for layer in [] if part is None else part.modules():
                if isinstance(layer, torch.nn.Linear):  # input-major in memory: one token is then 1.5 times as fast
                    layer.weight.data = layer.weight.data.T.contiguous().T
        self.M = model.config.M

    @torch.inference_mode()
    def encode(self, y_hat: Tensor, z_hat: Tensor | None) -> bytes:
        """y_hat: [1, M, h, w] integers, z_hat: [1, Z, h/4, w/4]  ->  the string of y."""
        known = y_hat[0].double().flatten(1).T.contiguous()  # [n, M]
        encoder = SymbolEncoder()

        def write(sites, means, scales):
            symbols = known[sites.to(known.device)]
            encoder.write(symbols.cpu().numpy(), means, scales)
            return symbols

        self._code(y_hat.shape[-2:], z_hat, write)
        with stage("entropy coding"):
            return encoder.finish()

    @torch.inference_mode()
    def decode(self, string: bytes, z_hat: Tensor | None, size) -> Tensor:
        """The string of y and (h, w)  ->  y_hat: [1, M, h, w] in float64."""
        decoder = SymbolDecoder(string)
        device = next(self.entropy_parameters.parameters()).device

        def read(sites, means, scales):
            with stage("entropy coding"):
                symbols = decoder.read(means, scales)
            return torch.from_numpy(symbols).to(device, torch.float64)

        return self._code(size, z_hat, read).T.reshape(1, self.M, *size)

    def _code(self, size, z_hat: Tensor | None, symbols_of) -> Tensor:
        """Runs the model's coding steps. `symbols_of(sites, means, scales)` gives latents: [k, M]  ->  [n, M]."""
        h, w = size
        with stage("hyper"):
            hyper = None if z_hat is None else self.h_s(z_hat.double()).flatten(2)[..., None]  # [1, D, n, 1]

        def exchange(sites, context):
            with stage("parameters"):
                here = None if hyper is None else hyper[:, :, sites.to(hyper.device)]
                means, scales = self.entropy_parameters(here, context, sites=len(sites))  # [1, M, k, 1]
                means, scales = snap(means[0, :, :, 0].T, scales[0, :, :, 0].T)  # [k, M]
            return symbols_of(sites, means, scales)

        if self.context_model is None:
            return exchange(torch.arange(h * w), None)
        return self.context_model.code(h, w, exchange)
