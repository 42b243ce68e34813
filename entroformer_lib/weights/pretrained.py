"""Transforms of CompressAI's pretrained models, as g_a and g_s of ours: `zoo:mbt2018-mean:4`.

They have the same layers. CompressAI's see pixels in [0, 1], ours in [-1, 1]; that is worked into the kernels of the
first and the last layer. One difference stays: a convolution pads its input with zeros, which are black there and grey
here, so the latents along the border of a picture differ from CompressAI's.
"""

import pickle

import torch
from torch import nn

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import WeightsError
from entroformer_lib.models.config import named_config

PREFIX = "zoo:"
ARCHITECTURES = ("bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean", "mbt2018")
# lambda of each quality, from CompressAI's documentation (optimised for MSE)
LMBDAS = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483, 7: 0.0932, 8: 0.1800}


def pretrained_lmbda(name: str) -> float:
    """The lambda that `zoo:ARCHITECTURE:QUALITY` was trained with."""
    return LMBDAS[_parsed(name)[1]]


def pretrained_transforms(name: str) -> Entroformer:
    """A model with the transforms of `zoo:ARCHITECTURE:QUALITY` and an untrained entropy model. Takes a network once.

    Raises:
        WeightsError: no such architecture or quality, or the weights cannot be fetched.
    """
    architecture, quality = _parsed(name)
    from compressai.zoo import image, load_state_dict

    try:  # as CompressAI does it, but so that no code in the file runs, and with the checksum in its name
        address = image.model_urls[architecture]["mse"][quality]
        fetched = torch.hub.load_state_dict_from_url(
            address, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
        theirs = image.model_architectures[architecture].from_state_dict(load_state_dict(fetched))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as error:
        first = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise WeightsError(f"What was fetched for {name} holds no weights ({first}).") from None
    except OSError as error:  # URLError is one
        raise WeightsError(
            f"The weights of {name} could not be fetched ({error}); they come from CompressAI's server, once, and need "
            "a network."
        ) from None
    return with_transforms_of(theirs)


@torch.no_grad()
def with_transforms_of(theirs: nn.Module) -> Entroformer:
    """A model with g_a and g_s of a CompressAI model of one of ARCHITECTURES."""
    first, last = theirs.g_a[0], theirs.g_a[-1]
    model = Entroformer(named_config("tiny-hyperprior", N=first.out_channels, M=last.out_channels)).eval()
    model.g_a.load_state_dict(theirs.g_a.state_dict())
    model.g_s.load_state_dict(theirs.g_s.state_dict())
    # x = (2x - 1) / 2 + 1 / 2
    model.g_a[0].weight.div_(2)
    model.g_a[0].bias.add_(model.g_a[0].weight.sum((1, 2, 3)))
    # ours are halved and lifted by 1 / 2 behind the last layer
    model.g_s[-1].weight.mul_(2)
    model.g_s[-1].bias.mul_(2).sub_(1)
    return model


def _parsed(name: str) -> tuple[str, int]:
    """`zoo:mbt2018-mean:4`  ->  mbt2018-mean, 4"""
    architecture, _, quality = name.removeprefix(PREFIX).partition(":")
    if architecture not in ARCHITECTURES or not quality.isdigit() or int(quality) not in LMBDAS:
        raise WeightsError(
            f"There are no transforms '{name}'; a name is {PREFIX}, one of {', '.join(ARCHITECTURES)}, a colon, and a "
            "quality of 1 to 8."
        )
    return architecture, int(quality)
