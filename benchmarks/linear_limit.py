"""How well so many numbers per 16x16 block can describe pictures at all: a PCA of their own blocks, not even rounded.

python benchmarks/linear_limit.py --pictures kodak/ --out data/results/linear_limit.json

g_a gives M numbers per block. This is what the best linear g_a and g_s, made for these very pictures, would reach.
"""

import json
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from entroformer_lib.files import write_bytes
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.studies.results import provenance

SIDE = 16


def blocks_of(path: Path) -> np.ndarray:
    """Blocks of a picture: float32 [count, 768], values 0 to 255."""
    x = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    height, width = (n // SIDE * SIDE for n in x.shape[:2])
    x = x[:height, :width].reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3)
    return x.transpose(0, 2, 1, 3, 4).reshape(-1, SIDE * SIDE * 3)


def main(pictures: Path, out: Path, numbers: tuple[int, ...] = (96, 128, 192, 320)) -> None:
    """Writes PSNR (dB, mean over pictures and of each) for each count of numbers per block."""
    paths = pictures_to_test(pictures)
    blocks = [blocks_of(path) for path in paths]
    everything = np.concatenate(blocks).astype(np.float64)
    mean = everything.mean(0)
    vectors = np.linalg.eigh(np.cov(everything.T))[1][:, ::-1]
    rows = []
    for count in numbers:
        basis = vectors[:, :count]
        rest = [b - mean - (b - mean) @ basis @ basis.T for b in blocks]
        psnr = [float(10 * np.log10(255**2 / np.mean(r**2))) for r in rest]
        each = dict(zip((path.stem for path in paths), psnr, strict=True))
        rows.append({"numbers": count, "psnr_db": float(np.mean(psnr)), "pictures": each})
        print(f"{count:4} numbers: {rows[-1]['psnr_db']:.1f} dB")
    write_bytes(out, json.dumps({"rows": rows, "provenance": provenance()}, indent=1).encode())


if __name__ == "__main__":
    tyro.cli(main)
