"""The same files on other machines: encoded under one configuration, decoded under another, in processes of their own.

    python benchmarks/matrix.py --out data/results/matrix.json
    python benchmarks/matrix.py --pythons /path/to/python3.12 --out data/results/matrix.json \\
        --emulate "qemu-user: Nehalem=qemu-x86_64 -cpu Nehalem .venv/bin/python"

A pair is a picture, coded by one model, and a configuration. The models are those of the test vectors, of every variant
and preset (tests/format_vectors.py), and a trained one that is shipped. The latents themselves are compared, not only
the checksum that a file carries. Outcomes:

    right     the encoder's latents
    refused   an error of ours, a sentence
    wrong     other latents, and no error
    error     any other error

Rows of configurations that this run does not measure are kept, so a machine may add its own to those of another.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parents[1]
TESTS = FOLDER / "tests"
SHIPPED = "blocks-parallel"
SIZE = 100, 60  # not multiples of the model's blocks
LARGE = SHIPPED, "large"  # enough latents for attention that ranks keys in groups (exact/ranked.py)


@dataclass(frozen=True)
class Settings:
    """What a process sets inside itself, one after the other."""

    threads: int = 1
    onednn: bool = True
    loops: bool = True
    int8: bool | None = None  # None: as the library chooses
    together: bool = False  # all pictures of a model in one batch

    @contextlib.contextmanager
    def applied(self):
        import torch

        from entroformer_lib.exact import loops

        before = torch.get_num_threads(), torch.backends.mkldnn.enabled, loops.serve, loops.int8_works
        torch.set_num_threads(self.threads)
        torch.backends.mkldnn.enabled = self.onednn
        if not self.loops:
            loops.serve = lambda x: False
        if self.int8 is not None:
            loops.int8_works = lambda: self.int8
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.backends.mkldnn.enabled, loops.serve, loops.int8_works = before[1:]


@dataclass(frozen=True)
class Configuration:
    """Settings, and the process that they need: its environment and its interpreter."""

    name: str
    settings: Settings = field(default_factory=Settings)
    environment: dict[str, str] = field(default_factory=dict)
    numba: bool = True
    start: tuple[str, ...] = (sys.executable,)
    few: bool = False  # a slow one, which decodes two pictures and encodes none

    def process(self) -> tuple:
        """Those for which this is the same share a process."""
        return self.environment, self.numba, self.start


def configurations(pythons: tuple[str, ...] = (), emulate: tuple[str, ...] = ()) -> list[Configuration]:
    """Those that this machine has; the first is the reference."""
    C, S = Configuration, Settings
    old = {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": " ".join(numpy_features())}
    old |= {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    old |= {"MKL_CBWR": "COMPATIBLE"}
    everything = Settings(threads=2, onednn=False, loops=False, int8=False)
    found = [
        C("as it comes, one thread"),
        C("two threads", S(threads=2)),
        C("without oneDNN", S(onednn=False)),
        C("ATEN_CPU_CAPABILITY=default", environment={"ATEN_CPU_CAPABILITY": "default"}),
        C("ATEN_CPU_CAPABILITY=avx2", environment={"ATEN_CPU_CAPABILITY": "avx2"}),
        C("ATEN_CPU_CAPABILITY=avx512", environment={"ATEN_CPU_CAPABILITY": "avx512"}),
        C("numpy without its vector code", environment={"NPY_DISABLE_CPU_FEATURES": old["NPY_DISABLE_CPU_FEATURES"]}),
        C("the C library without FMA and AVX", environment={"GLIBC_TUNABLES": old["GLIBC_TUNABLES"]}),
        C("oneDNN held to SSE 4.1", S(loops=False), {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
        C("MKL_CBWR=COMPATIBLE, float32 products", S(int8=False), {"MKL_CBWR": "COMPATIBLE"}),
        C("int8 products", S(int8=True)),
        C("float32 products", S(int8=False)),
        C("float32 products, two threads", S(threads=2, int8=False)),
        C("without compiled loops", S(loops=False)),
        C("without numba", numba=False),
        C("several pictures in a batch", S(together=True)),
        C("all of these at once, without loops", everything, old, numba=False),
    ]
    for python in pythons:
        name = about(python)
        found += [C(name, start=(python,)), C(f"{name}, float32 products", S(int8=False), start=(python,))]
    for name, _, command in (text.partition("=") for text in emulate):
        found.append(C(f"{name}, without numba", numba=False, start=tuple(shlex.split(command)), few=True))
    import torch

    if torch.cuda.is_available():
        found.append(C("GPU", Settings(), {"MATRIX_DEVICE": "cuda"}))
    return found


def numpy_features() -> list[str]:
    """What numpy has faster code for and this processor has too."""
    import numpy as np

    core = getattr(np, "_core", None) or np.core
    umath = core._multiarray_umath
    return [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]


def about(python: str) -> str:
    """Another interpreter in words."""
    code = (
        "import platform, torch, numpy; print('Python', platform.python_version() + ', torch', torch.__version__ + ', "
    )
    code += "numpy', numpy.__version__)"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# ---- inside a process -----------------------------------------------------------------------------------------------


def work(job: dict) -> list[dict]:
    """Decodes and encodes cases, for each of the settings of a job.  ->  the outcomes of what was decoded, seconds, and
    what the process ran on"""
    if not job["numba"]:
        sys.modules["numba"] = None  # importing it raises ImportError
    sys.path[:0] = [str(FOLDER), str(TESTS)]
    folder, results = Path(job["folder"]), []
    for task in job["tasks"]:
        settings, start = Settings(**task["settings"]), time.monotonic()
        model_of.cache_clear()  # a coder has made its weights ready for the settings it first met
        with settings.applied():
            outcomes = decode(task["decode"], folder, settings.together)
            encode(task["encode"], folder)
            results.append({"outcomes": outcomes, "seconds": round(time.monotonic() - start, 1), **seen()})
    return results


def seen() -> dict:
    """Versions and hardware in words."""
    import numpy as np
    import torch

    from entroformer_lib.exact import loops

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "processor": names[0] if names else platform.processor(), "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()), "torch_vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "numpy_vectors": (numpy_features() or ["none"])[-1],
        "numba": loops.numba and loops.numba.__version__, "int8": loops.int8_works(),
    }  # fmt: skip


@functools.cache
def model_of(name: str):
    """A model of the test vectors, or a shipped one."""
    from format_vectors import SMALL, VECTORS, formula_model

    from entroformer_lib.models.config import named_config
    from entroformer_lib.weights.zoo import load_model

    device = os.environ.get("MATRIX_DEVICE", "cpu")
    if name not in VECTORS:
        return load_model(name, device)
    variant, preset, fields, level = VECTORS[name]
    model = formula_model(named_config(f"tiny-{variant}", preset, **{**SMALL, **fields}), name).to(device)
    model.level = level
    return model


@contextlib.contextmanager
def coded_latents():
    """The latents of every file that the codec writes or reads in the block, as bytes, y before z."""
    from entroformer_lib.codec import codec

    found, checksum = [], codec.latents_checksum

    def listening(y_hat, z_hat):
        found.append(as_bytes(y_hat, z_hat))
        return checksum(y_hat, z_hat)

    codec.latents_checksum = listening
    try:
        yield found
    finally:
        codec.latents_checksum = checksum


def as_bytes(*latents) -> bytes:
    return b"".join(t.cpu().numpy().astype("<f4").tobytes() for t in latents if t is not None)


def encode(cases: list[tuple[str, str]], folder: Path) -> None:
    """Writes MODEL.PICTURE.ef and beside it, as .latents, what its encoder coded."""
    from entroformer_lib.codec import codec

    for name, picture in cases:
        with coded_latents() as latents:
            data = codec.encode(model_of(name), folder / f"{picture}.png")
        (folder / f"{name}.{picture}.ef").write_bytes(data)
        (folder / f"{name}.{picture}.latents").write_bytes(latents[-1])


def decode(cases: list[tuple[str, str]], folder: Path, together: bool) -> list[tuple[str, str]]:
    """The outcome of each file, with the sentence of an error."""
    files = [(name, folder / f"{name}.{picture}.ef") for name, picture in cases]
    if not together:
        return [outcome(model_of(name), [path])[0] for name, path in files]
    batches = {name: [path for other, path in files if other == name] for name, _ in files}
    return [found for name, paths in batches.items() for found in outcome(model_of(name), paths)]


def outcome(model, paths: list[Path]) -> list[tuple[str, str]]:
    """Of a single file, by the codec; or of several in one batch, which has no checksum."""
    from entroformer_lib.codec import codec
    from entroformer_lib.codec.container import Container
    from entroformer_lib.errors import UserError

    found = []
    try:
        if len(paths) == 1:
            with coded_latents() as found:
                codec.decode(paths[0].read_bytes(), model)
        else:
            files = [Container.unpack(path.read_bytes()) for path in paths]
            y_shape, z_shape = codec.latent_shapes(files[0].width, files[0].height, model)
            strings = [[c.y_string for c in files], [c.z_string for c in files]]
            y_hat, z_hat = model.decompress_latents(strings, z_shape or y_shape, files[0].level)
            found = [as_bytes(y, None if z_hat is None else z_hat[i]) for i, y in enumerate(y_hat)]
    except UserError as error:
        return [("refused", str(error))] * len(paths)
    except Exception as error:
        return [("error", f"{type(error).__name__}: {error}")] * len(paths)
    known = [path.with_suffix(".latents").read_bytes() for path in paths]
    return [("right" if a == b else "wrong", "") for a, b in zip(found, known, strict=True)]


# ---- outside --------------------------------------------------------------------------------------------------------


def run(configurations: list[Configuration], folder: Path, decodes: list[list], encodes: list[list]) -> list[dict]:
    """`work` in a process that suits all of some configurations."""
    tasks = [
        {"settings": dataclasses.asdict(c.settings), "decode": d, "encode": e}
        for c, d, e in zip(configurations, decodes, encodes, strict=True)
    ]
    c = configurations[0]
    job = json.dumps({"numba": c.numba, "folder": str(folder), "tasks": tasks})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **c.environment}
    words = [*c.start, "-W", "ignore", __file__, "work"]
    done = subprocess.run(words, input=job, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{c.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def pictures(folder: Path) -> list[str]:
    """Writes a photograph, a flat picture and drawn graphics, and LARGE's.  ->  the names of the first three"""
    from PIL import Image

    from entroformer_lib.datasets import sample_picture

    photograph = sample_picture("astronaut").crop((180, 60, 180 + SIZE[0], 60 + SIZE[1]))
    photograph.save(folder / "photograph.png")
    sample_picture("astronaut").crop((0, 0, 400, 304)).save(folder / f"{LARGE[1]}.png")
    Image.new("RGB", SIZE, (200, 120, 40)).save(folder / "flat.png")
    return ["photograph", "flat", graphics(folder, 0)]


def graphics(folder: Path, seed: int) -> str:
    """Writes a picture drawn by code.  ->  its name"""
    import numpy as np
    from PIL import Image

    from entroformer_lib.training.graphics import drawn

    pixels = drawn(SIZE[0], np.random.default_rng(seed)).movedim(0, -1).mul(255).byte().numpy()
    Image.fromarray(pixels).crop((0, 0, *SIZE)).save(folder / f"graphics{seed}.png")
    return f"graphics{seed}"


def row(name: str, direction: str, result: dict) -> dict:
    """One of the saved table."""
    counts = Counter(what for what, _ in result["outcomes"])
    numbers = {what: counts[what] for what in ("right", "refused", "wrong", "error")}
    said = sorted({sentence for _, sentence in result.pop("outcomes") if sentence})
    pairs = {"configuration": name, "direction": direction, "pairs": sum(numbers.values())}
    return {**pairs, **numbers, "said": said, **result}


def main(
    out: Path | None = None,
    pythons: tuple[str, ...] = (),
    emulate: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> None:
    """Encodes under the reference and decodes under all others, then the other way round; prints and writes.

    Args:
        pythons: Other interpreters, in which the library's packages are.
        emulate: Slow interpreters, as NAME=COMMAND.
        only: Configurations of which one of these words is a part.
    """
    sys.path[:0] = [str(FOLDER), str(TESTS)]
    from format_vectors import VECTORS

    from entroformer_lib.studies import results

    reference, *others = configurations(pythons, emulate)
    others = [c for c in others if not only or any(word in c.name for word in only)]
    rows = [] if out is None or not out.exists() else json.loads(out.read_text())["rows"]

    def add(c: Configuration, direction: str, result: dict) -> None:
        new = row(c.name, direction, result)
        rows[:] = [old for old in rows if (old["configuration"], old["direction"]) != (c.name, direction)] + [new]
        print({key: value for key, value in new.items() if value}, flush=True)
        if out is not None:
            results.save(out, {"reference": reference.name, "rows": rows})

    place = Path(tempfile.mkdtemp(prefix="matrix-"))
    try:
        names = pictures(place)
        models = [name for name in VECTORS if name not in ("grey", "one-pixel")] + [SHIPPED]  # those are pictures
        cases = [(model, picture) for model in models for picture in names] + [LARGE]
        run([reference], place, [[]], [cases])
        left, back = [reference, *others], []
        while left:
            group = [c for c in left if c.process() == left[0].process()]
            left = [c for c in left if c not in group]
            slow = (names[0], LARGE[1])  # pictures that a slow configuration leaves out; a batch is of one size
            left_out = [slow if c.few else slow[1:] if c.settings.together else () for c in group]
            theirs = [[case for case in cases if case[1] not in names_out] for names_out in left_out]
            encoders = [c for c in group if not c.few and not c.settings.together and c != reference]
            mine = {c.name: graphics(place, 1 + len(back) + n) for n, c in enumerate(encoders)}
            own = [[(model, mine[c.name]) for model in models if c.name in mine] for c in group]
            for c, result, encoded in zip(group, run(group, place, theirs, own), own, strict=True):
                back += [(c, encoded, dict(result))] if encoded else []
                add(c, "decoded", result)
        all_back = [case for _, encoded, _ in back for case in encoded]
        outcomes = run([reference], place, [all_back], [[]])[0]["outcomes"]
        for number, (c, encoded, result) in enumerate(back):
            add(c, "encoded", {**result, "outcomes": outcomes[number * len(models) :][: len(encoded)]})
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        print(json.dumps(work(json.load(sys.stdin))))
    else:
        import tyro

        tyro.cli(main)
