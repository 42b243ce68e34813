"""A part of benchmarks/matrix.py: processes that compute otherwise decode the files of this one to the same latents."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import matrix
from benchmarks.matrix import Configuration, Settings

# Windows and top-k, absolute positions, p(z) as a Gaussian, a convolution, what is told the rate by exp
MODELS = ("grouped-channels-window", "position-absolute", "official-parallel", "cnn", "aware-context")
OLD = {
    "ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": " ".join(matrix.numpy_features()),
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX", "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
}  # fmt: skip
PROCESSES = {
    "older": [
        Configuration("without compiled loops, two threads", Settings(threads=2, loops=False), OLD),
        Configuration("float route, without oneDNN", Settings(onednn=False, loops=False, int8=False), OLD),
        Configuration("compiled loops", Settings(), OLD),
    ],
    "without numba": [
        Configuration("as it comes", Settings(), {"ATEN_CPU_CAPABILITY": "avx2"}, numba=False),
        Configuration("batch", Settings(together=True), {"ATEN_CPU_CAPABILITY": "avx2"}, numba=False),
    ],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of files, and which they are."""
    folder = tmp_path_factory.mktemp("matrix")
    Image.new("RGB", (70, 40), (200, 120, 40)).save(folder / "flat.png")
    matrix.graphics(folder, 0)
    with Image.open(folder / "graphics0.png") as picture:
        picture.crop((0, 0, 70, 40)).save(folder / "graphics0.png")
    cases = [(model, picture) for model in MODELS for picture in ("flat", "graphics0")]
    matrix.encode(cases, folder)
    return folder, cases


@pytest.mark.parametrize("process", PROCESSES)
def test_other_processes_decode_the_same_latents(process, written):
    folder, cases = written
    group = PROCESSES[process]
    nothing = [[] for _ in group]
    results = matrix.run(group, folder, [cases] * len(group), nothing)
    for configuration, result in zip(group, results, strict=True):
        assert result["outcomes"] == [["right", ""]] * len(cases), configuration.name
    assert {result["numba"] is None for result in results} == {process == "without numba"}
    if process == "older":
        assert {(r["torch_vectors"], r["numpy_vectors"]) for r in results} == {("DEFAULT", "none")}


def test_other_latents_are_told(written):
    """Outcomes of a file whose encoder had others, by the codec and in a batch, which has no checksum."""
    folder, _ = written
    model, paths = matrix.model_of("cnn"), [folder / f"cnn.{name}.ef" for name in ("flat", "graphics0")]
    known = [path.with_suffix(".latents").read_bytes() for path in paths]
    other = np.frombuffer(known[1], "<f4").copy()
    other[0] += 1
    paths[1].with_suffix(".latents").write_bytes(other.tobytes())
    try:
        assert matrix.outcome(model, paths[1:]) == [("wrong", "")]
        assert [what for what, _ in matrix.outcome(model, paths)] == ["right", "wrong"]
    finally:
        paths[1].with_suffix(".latents").write_bytes(known[1])
    ((what, said),) = matrix.outcome(matrix.model_of("official-parallel"), paths[1:])
    assert what == "refused" and "other weights" in said
