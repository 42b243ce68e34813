"""Pictures drawn by code, to train on beside photographs: text, flat saturated colours, gradients, lines, charts.

Photographs hold few saturated colours and no letters, so a model trained on them alone codes a chart in wrong colours
at every rate.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WORDS = "entropy latent scale mean prior attention rate bits pixel signal noise context 0.25 1,024 3.14 % dB (x, y)"


def drawn(side: int, rng: np.random.Generator) -> Tensor:
    """A square picture of one of the kinds in `KINDS`.  ->  float32 [3, side, side] in [0, 1]"""
    image = Image.new("RGB", (side, side), colour(rng))
    KINDS[rng.integers(len(KINDS))](image, ImageDraw.Draw(image), rng)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float() / 255


def colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Half of the time a corner of the colour cube, or else anywhere in it."""
    if rng.random() < 0.5:
        return tuple(int(v) for v in 255 * rng.integers(0, 2, 3))
    return tuple(int(v) for v in rng.integers(0, 256, 3))


def _word(rng: np.random.Generator) -> str:
    return str(rng.choice(WORDS.split()))


def _page(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Lines of text, dark on light or light on dark, or each line or word in a colour of its own."""
    dark, light = (tuple(int(v) for v in rng.integers(*r, 3)) for r in ((0, 90), (170, 256)))
    if rng.random() < 0.5:
        light = (255, 255, 255)
    paper, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    coloured = rng.choice(("no", "no", "lines", "words"))
    image.paste(paper, (0, 0, *image.size))
    size = int(rng.integers(8, 28))
    for top in range(int(rng.integers(0, size)), image.height, round(1.4 * size)):
        left = int(rng.integers(-30, 20))
        ink = colour(rng) if coloured == "lines" else ink
        while left < image.width:
            word = _word(rng)
            draw.text(
                (left, top), word, fill=colour(rng) if coloured == "words" else ink, font=ImageFont.load_default(size)
            )
            left += round(0.55 * size * (len(word) + 1))


def _shapes(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Flat rectangles, ellipses and triangles."""
    for _ in range(rng.integers(3, 12)):
        (x0, x1), (y0, y1) = (np.sort(rng.integers(0, image.width + 1, 2)).tolist() for _ in range(2))
        kind = rng.integers(3)
        if kind == 2:
            draw.polygon(rng.integers(0, image.width, 6).tolist(), fill=colour(rng))
        else:
            (draw.rectangle, draw.ellipse)[kind]((x0, y0, x1, y1), fill=colour(rng))


def _checks(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A checkerboard or stripes of two colours."""
    side, stripes = int(rng.choice([2, 4, 8, 16, 32, 48])), rng.random() < 0.3
    ink, shift = colour(rng), rng.integers(0, side, 2).tolist()
    for top in range(-side, image.height + side, side):
        for left in range(-side, image.width + side, side):
            if (left // side + (0 if stripes else top // side)) % 2:
                x, y = left + shift[0], top + shift[1]
                draw.rectangle((x, y, x + side - 1, y + side - 1), fill=ink)


def _lines(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A line drawing."""
    image.paste((255, 255, 255) if rng.random() < 0.7 else colour(rng), (0, 0, *image.size))
    ink = (0, 0, 0) if rng.random() < 0.5 else colour(rng)
    for _ in range(rng.integers(5, 25)):
        width = int(rng.integers(1, 4))
        if rng.random() < 0.5:
            draw.line(rng.integers(0, image.width, 4).tolist(), fill=ink, width=width)
        else:
            x, y, r = (int(v) for v in rng.integers(4, image.width, 3))
            draw.arc((x - r, y - r, x + r, y + r), *rng.integers(0, 360, 2).tolist(), fill=ink, width=width)


def _chart(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Axes with a grid and labels, and bars or curves."""
    side = image.width
    image.paste((255, 255, 255), (0, 0, side, side))
    font, edge = ImageFont.load_default(int(rng.integers(8, 14))), side // 8
    for i in range(1, 6):
        y = side - edge - i * (side - 2 * edge) // 5
        draw.line((edge, y, side, y), fill=(210, 210, 210))
        draw.text((2, y - 6), f"{i * rng.random():.1f}", fill=(0, 0, 0), font=font)
        draw.text((edge + i * side // 7, side - edge + 2), _word(rng)[:4], fill=(0, 0, 0), font=font)
    for series in range(rng.integers(1, 4)):
        heights = rng.integers(edge, side - edge, 8)
        if rng.random() < 0.5:
            for i, h in enumerate(heights):
                left = edge + i * side // 8 + 3 * series
                draw.rectangle((left, int(h), left + side // 12, side - edge), fill=colour(rng))
        else:
            points = [(edge + i * (side - edge) // 7, int(h)) for i, h in enumerate(heights)]
            draw.line(points, fill=colour(rng), width=int(rng.integers(1, 4)))
    draw.line((edge, 0, edge, side - edge, side, side - edge), fill=(0, 0, 0), width=2)


def _gradient(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """One colour goes over into another, along a line or around a point, with a flat shape on top."""
    side = image.width
    y, x = np.mgrid[0:side, 0:side] / side - rng.random((2, 1, 1))
    angle = rng.uniform(0, 2 * np.pi)
    way = np.hypot(x, y) if rng.random() < 0.3 else (np.cos(angle) * x + np.sin(angle) * y) / 2 + 0.5
    way = way.clip(0, 1)[..., None]
    values = (1 - way) * np.array(colour(rng)) + way * np.array(colour(rng))
    image.paste(Image.fromarray(values.round().astype(np.uint8)), (0, 0))
    if rng.random() < 0.5:
        (x0, x1), (y0, y1) = (np.sort(rng.integers(0, side + 1, 2)).tolist() for _ in range(2))
        draw.ellipse((x0, y0, x1, y1), fill=colour(rng))


KINDS = (_page, _page, _shapes, _checks, _lines, _chart, _gradient)
