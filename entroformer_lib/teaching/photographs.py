"""The lessons' photographs, which come with scikit-image: no network is needed."""

import numpy as np

from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import DataError


def grey(name: str, side: int | None = None) -> np.ndarray:
    """A photograph as bytes [H, W], whole or the square in the middle.

    Args:
        name: astronaut, chelsea, coffee or rocket.
        side: of the square, in pixels.

    Raises:
        DataError: the photograph is smaller than that.
    """
    picture = np.asarray(sample_picture(name).convert("L"))
    if side is None:
        return picture
    if side > min(picture.shape):
        raise DataError(f"{name} has {picture.shape[1]} x {picture.shape[0]} pixels, too few for a side of {side}.")
    top, left = ((length - side) // 2 for length in picture.shape)
    return picture[top : top + side, left : left + side]
