"""The lessons' photographs, which come with scikit-image: no network is needed."""

import numpy as np

from entroformer_lib.datasets import sample_picture


def grey(name: str, side: int | None = None) -> np.ndarray:
    """A photograph as bytes [H, W], whole or the square in the middle.

    Args:
        name: astronaut, chelsea, coffee or rocket.
        side: of the square, in pixels.
    """
    picture = np.asarray(sample_picture(name).convert("L"))
    if side is None:
        return picture
    top, left = ((length - side) // 2 for length in picture.shape)
    return picture[top : top + side, left : left + side]
