"""What training costs: counted work, two speeds measured at one size, and what follows for other sizes and machines.

    python benchmarks/cost.py --data DATA/train --out data/results/cost.json

A step's work is counted, not timed: multiplications (`multiplications`, a formula over the config), bytes that
operations read and write, and operations started (both by watching a real step, `watch`). A step then takes

    seconds = multiplications x a + bytes x b                                                  (the model of cost)

On one core, a and b are measured at one size that is neither of the two it must predict. For GPUs they come from
published peaks and a stated share of them: simulated, not measured. CPU time is measured, so that other programs on
the machine count little.
"""

import dataclasses
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from entroformer_lib.datasets import SAMPLES, sample_picture
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.studies import results
from entroformer_lib.training.data import StreamedCrops
from entroformer_lib.training.loss import TrainingStep
from entroformer_lib.training.optimizer import build_optimizer

BETWEEN = dict(N=80, M=224, Z=56, dim=112, heads=4, top_k=16, hyper_top_k=(16, 16, 16))  # tiny and study
SIZE = 1024, 768  # of most pictures of Open Images
PAPER = dict(model="base-serial", preset="paper", batch=16, crop=384, pictures=14_886, epochs=300)
FAST = dict(
    model="base-parallel",
    fields=dict(
        transforms="blocks",
        stages=((8, 256, 6),),
        linear_path="dct",
        M=320,
        rate_aware=True,
        lmbdas=(0.00035, 0.0008, 0.0017, 0.0035, 0.007, 0.014, 0.029, 0.06, 0.12),
    ),
    batch=16,
    crop=256,
    steps=220_000,
)

# Published for the H100 SXM (NVIDIA's data sheet): dense bfloat16, memory, NVLink one way; and one 400 Gb/s port a GPU.
# The shares are assumptions, of what well-written training reaches; so are the seconds that starting a kernel takes.
H100 = {
    "multiplications_per_s": 989e12 / 2,
    "memory_bytes_per_s": 3.35e12,
    "link_bytes_per_s": 450e9,
    "network_bytes_per_s": 50e9,
    "share_of_multiplications": 0.35,
    "share_of_memory": 0.6,
    "share_of_links": 0.6,
    "seconds_per_kernel": 6e-6,
    "gpus_per_machine": 8,
    "cores_per_gpu": 16,
}


# ---- counting -------------------------------------------------------------------------------------------------------


def multiplications(c: EntroformerConfig, height: int, width: int) -> dict[str, int]:
    """Multiplications (with an addition each) to take one picture forward, by the part of the network.

    For the paper's transforms or those of blocks, the transformer's hyperprior, and a serial or parallel context.
    """
    pixels, n = height * width, height * width // 256
    if c.transforms == "gdn":
        convolutions = 25 * (3 * c.N / 4 + c.N**2 / 16 + c.N**2 / 64 + c.N * c.M / 256)
        transforms = pixels * (convolutions + c.N**2 * (1 / 4 + 1 / 16 + 1 / 64))
    else:
        transforms, side, channels = 0, 1, 3
        for next_side, next_channels, blocks in (*c.stages, (16, c.M, 0)):
            inside = channels * (next_side // side) ** 2 * next_channels + blocks * (
                5 * next_channels**2 + 9 * next_channels
            )
            transforms += inside * pixels / next_side**2
            side, channels = next_side, next_channels
    if c.linear_path == "dct":
        transforms += 768 * c.M * n
    D = c.dim
    hyper = c.M * D * n + 2 * D * c.Z * n // 16  # embeddings of y and z, head of h_a
    hyper += 9 * D**2 * (n // 4 + n // 16) + 36 * D**2 * (n // 4 + n // 16)  # down, up
    hyper += 2 * sum(_block(c, n // 4**i, h) for i, h in enumerate(c.hyper_radius))
    context = c.M * D * n + c.context_layers * _block(c, n, c.radius)
    parameters = (2 * D * 4 * D + 4 * D * 2 * c.M) * n
    parts = {"g_a": transforms, "g_s": transforms, "hyperprior": hyper, "context": context, "parameters": parameters}
    return {name: round(count) for name, count in parts.items()}


def _block(c: EntroformerConfig, n: int, radius: int) -> int:
    """Of one transformer block over n sites, each of which looks at all."""
    positions = 2 * radius * (radius + 1) + 2  # distinct vectors of the diamond
    return n * c.dim * ((4 + 2 * c.ffn_ratio) * c.dim + 2 * n + positions)


class Watch(TorchDispatchMode):
    """Counts what operations read and write in bytes, and how many are started. Views cost nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, operation, types, inputs=(), more=None):
        out = operation(*inputs, **(more or {}))
        if not operation.is_view:
            touched = {t.data_ptr(): t for t in tree_leaves((inputs, more, out)) if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in touched.values())
            self.kernels += 1
        return out


@dataclasses.dataclass
class Work:
    """Of one step."""

    multiplications: float
    bytes: float
    kernels: float
    parameters: int

    def seconds(self, a: float, b: float) -> float:
        """The model of cost."""
        return self.multiplications * a + self.bytes * b


class Training:
    """Steps of a model on random crops, in float32, to be counted or timed."""

    def __init__(self, config: EntroformerConfig, optimizer: str = "adam"):
        torch.manual_seed(0)
        self.model = Entroformer(config)
        for part in (self.model.g_a, self.model.g_s):
            part.to(memory_format=torch.channels_last)
        self.step_module = TrainingStep(self.model).train()
        self.optimizer = build_optimizer(self.model, optimizer, 1e-4)

    def step(self, batch: int, crop: int) -> None:
        x = torch.rand(batch, 3, crop, crop).contiguous(memory_format=torch.channels_last)
        self._finish(self.step_module(x, 0.013)["loss"])

    def transforms(self, batch: int, crop: int) -> None:
        """Those parts of a step that are nearly all multiplications."""
        x = torch.rand(batch, 3, crop, crop).contiguous(memory_format=torch.channels_last)
        self._finish(self.model.g_s(self.model.g_a(x)).square().mean())

    def entropy_model(self, batch: int, crop: int) -> None:
        """Those that move many bytes."""
        y = torch.randn(batch, self.model.config.M, crop // 16, crop // 16, requires_grad=True)
        self._finish(sum(p.log().sum() for p in self.model.likelihoods(y)[0].values()))

    def _finish(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def watch(run, batch: int, crop: int) -> Work:
    """What a step does, after one that made the optimizer's state."""
    run(1, 64)
    with Watch() as seen, FlopCounterMode(display=False) as flops:
        run(batch, crop)
    parameters = sum(p.numel() for p in run.__self__.model.parameters())
    return Work(flops.get_total_flops() / 2, seen.bytes, seen.kernels, parameters)


TRIED = (64, 128, 192)


def extended(small: list[Work], batch: int, crop: int) -> Work:
    """What a large step would do. Of one crop, work is c0 + c1 n + c2 n^2 in the number n of its latents; three small
    crops (TRIED) give the three numbers. What does not grow with n (the optimizer) does not grow with the batch."""
    sites = torch.tensor([(side // 16) ** 2 for side in TRIED], dtype=torch.float64)
    powers = torch.stack([sites**i for i in range(3)], dim=1)
    n = (crop // 16) ** 2

    def at_n(name: str) -> float:
        values = torch.tensor([getattr(work, name) for work in small], dtype=torch.float64)
        c0, c1, c2 = torch.linalg.solve(powers, values).tolist()
        return c0 + batch * (c1 * n + c2 * n**2)

    return Work(at_n("multiplications"), at_n("bytes"), small[-1].kernels, small[-1].parameters)


def kept_bytes(training: Training, crop: int) -> int:
    """What a forward pass keeps of one crop for the way back."""
    weights = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        training.step_module(torch.rand(1, 3, crop, crop), 0.013)
    return sum(kept.values())


# ---- measuring ------------------------------------------------------------------------------------------------------


def cpu_seconds(run, batch: int, crop: int, repeats: int) -> float:
    """Median CPU time, after two steps that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.process_time()
        run(batch, crop)
        times.append(time.process_time() - start)
    return statistics.median(times[2:])


def speeds(training: Training, batch: int, crop: int, repeats: int) -> dict[str, float]:
    """a and b of this machine, from the two halves of a step at one size."""
    halves = [training.transforms, training.entropy_model]
    work = [watch(half, batch, crop) for half in halves]
    measured = torch.tensor([cpu_seconds(half, batch, crop, repeats) for half in halves], dtype=torch.float64)
    table = torch.tensor([[w.multiplications, w.bytes] for w in work], dtype=torch.float64)
    a, b = torch.linalg.solve(table, measured).tolist()
    return {"seconds_per_multiplication": a, "seconds_per_byte": b}


def predictions(a: float, b: float, batch: int, crop: int, repeats: int) -> list[dict]:
    """Predicted and measured CPU time of a step of sizes that were not used: two near by, and the paper's."""
    rows = []
    for name in ("tiny-serial", "study-serial", "base-serial"):
        training = Training(named_config(name))
        repeats = 3 if name.startswith("base") else repeats
        work = watch(training.step, batch, crop)
        predicted, measured = work.seconds(a, b), cpu_seconds(training.step, batch, crop, repeats)
        row = {"model": name, "predicted_s": predicted, "measured_s": measured, "error": predicted / measured - 1}
        row |= {"kept_bytes": batch * kept_bytes(training, crop), "peak_growth_bytes": peak_growth(name, batch, crop)}
        rows.append(row)
        print(rows[-1], flush=True)
    return rows


def peak_growth(model: str, batch: int, crop: int) -> int:
    """By how many bytes a step lets the largest memory of a process grow, after a small one."""
    code = f"from benchmarks.cost import print_peak_growth; print_peak_growth({model!r}, {batch}, {crop})"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def print_peak_growth(model: str, batch: int, crop: int) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    training = Training(named_config(model))
    training.step(1, 64)
    before = _peak()
    training.step(batch, crop)
    print(_peak() - before)


def _peak() -> int:
    """Of this process on Linux, in bytes. (What `resource` says begins with the peak of the parent.)"""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def pictures_per_second(data: str | Path, crop: int, count: int = 64) -> float:
    """Photographs that one core decodes and crops in a second of CPU time."""
    batches = StreamedCrops(data, crop, workers=0).batches([range(8), range(8, 8 + count)])
    next(batches)
    start = time.process_time()
    next(batches)
    return count / (time.process_time() - start)


# ---- the paper's training on GPUs: simulated ------------------------------------------------------------------------


def simulated(work: Work, gpus: int, batch: int, steps: int, input_per_core: float) -> dict:
    """A whole training on so many H100. work: of one GPU's share of the batch."""
    h = H100
    a = 1 / (h["multiplications_per_s"] * h["share_of_multiplications"])
    b = 1 / (h["memory_bytes_per_s"] * h["share_of_memory"])
    link = h["link_bytes_per_s"] if gpus <= h["gpus_per_machine"] else h["network_bytes_per_s"]
    times = {
        "multiplying": work.multiplications * a,
        "moving": work.bytes * b,
        "starting": work.kernels * h["seconds_per_kernel"],
        "exchanging": 2 * (gpus - 1) / gpus * 4 * work.parameters / (link * h["share_of_links"]),
    }
    seconds = max(work.seconds(a, b), times["starting"]) + times["exchanging"]
    share = batch // gpus
    return {
        "gpus": gpus,
        "batch": batch,
        "step_ms": 1e3 * seconds,
        **{f"{name}_ms": 1e3 * s for name, s in times.items()},
        "hours": seconds * steps / 3600,
        "gpu_hours": gpus * seconds * steps / 3600,
        "pictures_per_s_and_gpu": share / seconds,
        "input_over_need": input_per_core * h["cores_per_gpu"] * seconds / share,
        "longest": max(times, key=times.get),
    }


def trainings(
    training: Training, crop: int, epochs_of: int, plans: list[tuple[int, int]], reading: float
) -> list[dict]:
    """A training on several numbers of GPUs.  epochs_of: all crops of it; plans: GPUs and batch"""
    small, rows = [watch(training.step, 1, side) for side in TRIED], []
    for gpus, batch in plans:
        rows.append(simulated(extended(small, batch // gpus, crop), gpus, batch, epochs_of // batch, reading))
        print(rows[-1], flush=True)
    return rows


def main(data: str, out: Path, batch: int = 2, crop: int = 256, repeats: int = 5) -> None:
    """Counts, measures, predicts, and writes all of it with its provenance.

    Args:
        data: Training pictures, for the speed of reading.
        out: JSON file.
        batch: Crops of the steps that are timed.
        crop: Their side in pixels.
        repeats: Steps of which the median counts.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    speed = speeds(Training(named_config("tiny-serial", **BETWEEN)), batch, crop, repeats)
    print(speed, flush=True)
    sizes = predictions(*speed.values(), batch, crop, repeats)
    reading = {"these pictures, crop 128": pictures_per_second(data, 128)}
    with tempfile.TemporaryDirectory() as folder:
        for name in SAMPLES:
            sample_picture(name).resize(SIZE).save(Path(folder, f"{name}.jpg"), quality=90)
        reading["1024x768, crop 384"] = pictures_per_second(folder, 384)
    print(reading, flush=True)
    cropped = reading["1024x768, crop 384"]
    paper = Training(named_config(PAPER["model"], PAPER["preset"]))
    shown = PAPER["epochs"] * PAPER["pictures"]
    rows = trainings(paper, PAPER["crop"], shown, [(1, 16), (8, 16), (64, 64)], cropped)
    fast = Training(named_config(FAST["model"], **FAST["fields"]), "muon")
    fast_rows = trainings(fast, FAST["crop"], FAST["steps"] * FAST["batch"], [(1, 16), (16, 128)], cropped)
    result = {
        "settings": {"batch": batch, "crop": crop, "repeats": repeats, "between": BETWEEN, "h100": H100},
        "paper": PAPER,
        "fast": FAST,
        "speeds": speed,
        "forward_per_picture": multiplications(paper.model.config, PAPER["crop"], PAPER["crop"]),
        "kept_bytes_per_crop": kept_bytes(paper, PAPER["crop"]),
        "parameters": sum(p.numel() for p in paper.model.parameters()),
        "decoded_per_s_and_core": reading,
        "predictions": sizes,
        "paper_on_gpus": rows,
        "fast_on_gpus": fast_rows,
    }
    results.save(out, result, threads=1, machine=platform.machine())


if __name__ == "__main__":
    tyro.cli(main)
