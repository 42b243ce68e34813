"""Looking on while a model trains: what `train(..., watch=...)` can be given."""

from collections.abc import Callable

import torch
from PIL import Image

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer


class Watcher:
    """Keeps the log of a run and what the model makes of one picture at intervals.

    Args:
        picture: the picture to look at.
        every: steps between two reconstructions.
        show: called with the watcher after each new row, to draw it.

    Attributes:
        rows: the log so far, as in log.jsonl.
        pictures: (step, reconstruction) pairs.
    """

    def __init__(
        self, picture: Image.Image, every: int = 100, show: Callable[["Watcher"], None] = lambda watcher: None
    ):
        self.picture, self.every, self.show = picture, every, show
        self.rows: list[dict] = []
        self.pictures: list[tuple[int, Image.Image]] = []

    def __call__(self, row: dict, model: Entroformer) -> None:
        self.rows.append(row)
        if row["step"] % self.every == 0:
            self.pictures.append((row["step"], reconstruction(model, self.picture)))
        self.show(self)


@torch.inference_mode()
def reconstruction(model: Entroformer, picture: Image.Image) -> Image.Image:
    """What a model makes of a picture, without coding it to bytes."""
    y_hat, _ = model.eval().latents(codec.to_tensor(picture, model))
    return codec.to_picture(codec.unpad(model.reconstruct(y_hat), picture.height, picture.width))
