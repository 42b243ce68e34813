"""The training loop, on Lightning Fabric: one process or many, CPU or GPU.

A run is a folder (folder.py). Starting the same command again continues it exactly where its checkpoint stands.
"""

import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from tqdm.auto import tqdm

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import Stopped, TrainingError
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.sparse_attention import SparseAttention
from entroformer_lib.training.chance import conditions
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.data import PreloadedCrops, StreamedCrops, held_out_crops, read_names, smallest_crop
from entroformer_lib.training.folder import RunFolder, read_checkpoint, taking_up
from entroformer_lib.training.initial import begin_at_channels, initial_model
from entroformer_lib.training.latents import LatentCrops, trained_lmbda
from entroformer_lib.training.loss import RateStep, TrainingStep, quality, rates_and_distortions, rates_of_latents
from entroformer_lib.training.optimizer import Mean, build_optimizer, learning_rate_factor, quick_type
from entroformer_lib.training.processes import machines, meet
from entroformer_lib.training.shard_cache import ShardCache, default_folder
from entroformer_lib.training.shards import Reading
from entroformer_lib.training.strategies import collected, model_state, optimizer_state, strategy_of, whole
from entroformer_lib.weights.zoo import device_name, save_weights

Crops = PreloadedCrops | StreamedCrops | LatentCrops
Watch = Callable[[dict, Entroformer], None]


def train(config: TrainConfig, progress: bool = True, watch: Watch | None = None) -> Path:
    """Trains, or continues, a run.  ->  path of its weights.

    Args:
        progress: show a bar.
        watch: called with each row of the log and the model, to draw or test while it trains; it must leave the model
            as it is but for train() and eval().

    Raises:
        TrainingError: the run cannot start, met a loss that is no number, or was stopped by a signal.
        DataError: no usable pictures.
    """
    fabric, folder = _fabric(config), RunFolder(Path(config.out))
    with folder.alone() if rank_zero_only.rank == 0 else nullcontext():
        meet(fabric, config.start_timeout)
        fabric.launch()
        parts = fabric.world_size * config.accumulate
        if config.batch % parts:
            raise TrainingError(
                f"A batch of {config.batch} does not divide into {parts} equal parts "
                f"(processes: {fabric.world_size}, passes of each: {config.accumulate})."
            )
        if fabric.device.type == "cpu":
            keep_freed_memory()
        if config.graphics and config.batch // parts < 2:
            raise TrainingError(
                "graphics compares the drawn crops with the photographs of one pass, which needs two crops in it at "
                "least; choose a larger batch, or a smaller --accumulate."
            )
        torch.manual_seed(config.seed)
        # A branch that has a checkpoint of its own needs its trunk no more.
        begin = folder.checkpoint if config.branch and folder.checkpoint.exists() else config.branch
        trunk = read_checkpoint(Path(begin), fabric.device) if begin else None
        model = initial_model(config, trunk)
        crops = crops_of(config, model, fabric.device)
        if config.transforms and not config.init:
            begin_at_channels(model, next(crops.batches([range(64)])).to("cpu"))
        run = Run(config, fabric, folder, model, crops)
        if fabric.is_global_zero:
            folder.check(config)
        fabric.barrier()
        first = run.resume(trunk)
        if fabric.is_global_zero:
            folder.claim(config)
        return run.go(first, progress and fabric.is_global_zero, watch)


def _fabric(config: TrainConfig) -> Fabric:
    """The devices of a run, not started yet.

    Raises:
        TrainingError: this machine does not have them.
    """
    logger = TensorBoardLogger(config.out, name="", version="")
    try:
        here = dict(accelerator=config.accelerator, devices=config.devices, num_nodes=machines())
        return Fabric(**here, strategy=strategy_of(config.strategy), loggers=logger)
    except (RuntimeError, MisconfigurationException):
        asked = f"--accelerator {config.accelerator} --devices {config.devices}"
        raise TrainingError(f"This machine does not have what {asked} asks for; --accelerator cpu works.") from None


def crops_of(config: TrainConfig, model: Entroformer, device: torch.device) -> Crops:
    """What a run trains on: pictures, or latents of frozen transforms."""
    largest = max(crop for _, crop in config.crops)
    if config.transforms:
        return LatentCrops(Path(config.latents), model, largest, config.seed, device)
    left_out = read_names(config.held_out) if config.held_out else frozenset()
    more = dict(left_out=left_out, reading=reading_of(config), graphics=config.graphics, permuted=config.permuted)
    if config.preload:
        return PreloadedCrops(config.data, largest, config.seed, device, **more)
    streaming = dict(workers=config.workers, places=config.batch)
    return StreamedCrops(config.data, largest, config.seed, device, **streaming, **more)


def reading_of(config: TrainConfig) -> Reading:
    """How a run reads shards."""
    cache = ShardCache(Path(config.cache) if config.cache else default_folder(), config.cache_gb)
    return Reading(cache, config.check_shards, config.pass_over_shards)


class Run:
    """One run under way: the model, its optimizer, and how far it has come."""

    def __init__(self, config: TrainConfig, fabric: Fabric, folder: RunFolder, model: Entroformer, crops: Crops):
        self.config, self.fabric, self.folder, self.model, self.crops = config, fabric, folder, model, crops
        if config.strategy == "ddp":  # FSDP takes no other layout than the usual one
            for part in (model.g_a, model.g_s):
                part.to(memory_format=torch.channels_last)
        fast = quick_type(fabric.device) == torch.bfloat16
        bf16 = config.precision == "bfloat16" or (config.precision == "auto" and fast)
        if config.transforms:
            goal = RateStep(model, bf16, config.even_rates, config.rounded)
        else:
            goal = TrainingStep(model, config.metric, bf16, config.even_rates)
        if config.compile:
            model.g_a.compile(), model.g_s.compile()
        self.step_module = fabric.setup_module(goal)
        self.optimizer = fabric.setup_optimizers(build_optimizer(model, config.optimizer, config.lr))
        self.step_module.train()
        self.mean = Mean(model, config.ema)
        self.lmbda = trained_lmbda(config.transforms) if config.transforms else config.lmbda  # None: several
        self.seconds = 0.0  # of training, over all starts
        self.first_sample = 0  # a branch goes on where its trunk's samples end
        self.held_out = crops.held_out if config.transforms else None  # latents, or pictures in the first process
        self.measures = self.held_out is not None or config.held_out is not None
        if config.held_out and fabric.is_global_zero:
            names = read_names(config.held_out)
            crops = held_out_crops(config.data, names, reading_of(config), smallest_crop(config.metric))
            self.held_out = crops.to(fabric.device)

    def go(self, first: int, progress: bool, watch: Watch | None = None) -> Path:
        """All steps from `first` on, with log and checkpoints.  ->  path of the weights"""
        c, logged, logged_at, saved_at = self.config, first, self.seconds, self.seconds
        bar = tqdm(total=c.steps, initial=first, disable=not progress, unit="step", file=sys.stderr)
        with bar, _signals() as caught:
            begin = time.monotonic()
            for step, x in self.batches(first):
                terms, done = self.step(x, step), step + 1
                self.seconds += time.monotonic() - begin
                bar.update()
                if done % c.log_every == 0 or done == c.steps:
                    speed = (done - logged) * c.batch / (self.seconds - logged_at)
                    logged, logged_at = done, self.seconds
                    row = self.log(done, terms, speed)
                    bar.set_postfix({k: f"{row[k]:.3f}" for k in ("rd_loss", "bpp", "psnr_db", "ms_ssim") if k in row})
                    model = None if watch is None else self.whole_model()
                    if model is not None:
                        watch(row, model)
                        self.step_module.train()
                # Together: each process has a clock of its own, and all must save, or none.
                stop, due = self._anywhere(bool(caught), self.seconds - saved_at > c.checkpoint_seconds)
                if stop or due or done == c.steps:
                    self.save(done)
                    saved_at = self.seconds
                if stop:
                    raise Stopped(
                        f"Stopped by a signal at step {done} of {c.steps}; "
                        f"the same command goes on from {self.folder.checkpoint}."
                    )
                begin = time.monotonic()  # the log and the checkpoint are no training time
        return self.finish()

    def batches(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """Step and batch, from step `first` on."""
        for all_steps, crop in self.config.crops:
            steps = range(max(first, all_steps.start), all_steps.stop)
            if steps:
                yield from zip(steps, self.crops.batches((self.samples(s) for s in steps), crop), strict=True)

    def samples(self, step: int) -> range:
        """Numbers of the samples that are this process's share of a step's batch."""
        share = self.config.batch // self.fabric.world_size
        start = self.first_sample + step * self.config.batch + self.fabric.global_rank * share
        return range(start, start + share)

    def step(self, x: Tensor, step: int) -> dict:
        """One step on crops [B, 3, h, w], or latents [B, M, h / 16, w / 16].  ->  the terms of the loss"""
        c, samples = self.config, self.samples(step)
        scheduled = [group for group in self.optimizer.param_groups if not group["fixed"]]
        for group in scheduled:
            group["lr"] = c.lr * learning_rate_factor(step, c.steps, decay=c.decay, schedule=c.schedule)
        count, passes = len(samples) // c.accumulate, []
        for start in range(0, len(samples), count):
            last = start + count == len(samples)  # gradients of all processes meet once, behind it
            with self.fabric.no_backward_sync(self.step_module, enabled=not last):
                passes.append(self.forward_and_backward(x[start : start + count], step, samples[start : start + count]))
        terms = {name: torch.stack([one[name] for one in passes]).mean(0) for name in passes[0]}
        norm = torch.nn.utils.clip_grad_norm_([p for group in scheduled for p in group["params"]], c.clip)
        if not (math.isfinite(terms["loss"]) and math.isfinite(whole(norm))):
            raise TrainingError(
                f"The loss at step {step + 1}, or its gradient, is not a finite number; the run stopped there, and the "
                "checkpoint before it is kept. A smaller lr or clip usually helps."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.mean.update(step)
        return terms

    def forward_and_backward(self, x: Tensor, step: int, samples: range) -> dict:
        """One pass, whose gradients are added to those of the passes before.  ->  the terms of the loss"""
        c = self.config
        torch.manual_seed(hash((c.seed, step)) % 2**63)  # what is left to chance inside the model: k's jitter
        x, terms = x.contiguous(memory_format=torch.channels_last), None
        try:
            with nullcontext() if c.compile else SparseAttention():
                terms = self.step_module(x, **self._given(x, step, samples))
            self.fabric.backward(terms["loss"] / c.accumulate)
            return {name: value.detach() for name, value in terms.items()}
        except torch.OutOfMemoryError:
            terms = None  # its graph holds memory, and while this block lasts so does what the error knows of it
        raise TrainingError(self._too_large(x, step, samples))

    def log(self, step: int, terms: dict, speed: float) -> dict:
        """Writes a row of the log, with the held-out pictures where they are due.  ->  the row"""
        c = self.config
        terms = {name: self.fabric.all_reduce(value) for name, value in terms.items()}
        if "error" in terms:
            terms |= quality(terms.pop("error"), c.metric)
        row = {name: float(value) for name, value in terms.items()}
        several = self.model.config.lmbdas  # the middle one is logged
        lmbda = self.lmbda if c.transforms else several[len(several) // 2] if several else c.lmbda_at(step - 1)
        row = {"step": step, **row, "lr": self.optimizer.param_groups[0]["lr"], "lmbda": lmbda}
        row |= {"seconds": round(self.seconds, 3), "images_per_s": round(speed, 2)}
        self.fabric.log_dict({k: v for k, v in row.items() if k != "step" and v is not None}, step=step)
        if self.measures and (step % c.held_out_every < c.log_every or step == c.steps):
            with self.mean.in_place():  # the mean is what will be kept
                model = self.whole_model()
                if model is not None:
                    row["held_out"] = self.measured(model.eval())
            self.step_module.train()
        if self.fabric.is_global_zero:
            self.folder.append(row)
        return row

    def measured(self, model: Entroformer) -> list[dict]:
        """What the model in eval mode does with the held-out pictures or latents, at each lambda."""
        lmbdas = model.config.lmbdas or (self.lmbda,)
        if self.config.transforms:
            return rates_of_latents(model, self.held_out, lmbdas)
        return rates_and_distortions(model, self.held_out, lmbdas, self.config.metric)

    def whole_model(self) -> Entroformer | None:
        """The model as one process can use it alone; None but in the first. All processes must ask for it."""
        if self.config.strategy == "ddp" and not self.config.compile:  # compiled for the crops of training
            return self.model if self.fabric.is_global_zero else None
        state = collected(self.model.state_dict(), self.fabric.is_global_zero)
        return Entroformer.from_state_dict(state).to(self.fabric.device) if self.fabric.is_global_zero else None

    def save(self, step: int) -> None:
        """Writes the checkpoint: all that a run needs to go on exactly."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "seconds": self.seconds,
            "first_sample": self.first_sample,
            "batch": self.config.batch,
            "mean": self.mean.values,
        }
        state = collected(state, self.fabric.is_global_zero)
        if self.fabric.is_global_zero:
            self.folder.save(state)
        self.fabric.barrier()

    def resume(self, trunk: dict | None = None) -> int:
        """Loads the checkpoint, if there is one, or begins a branch of a trunk's.  ->  the step to go on with."""
        step = 0
        if self.folder.checkpoint.exists():
            # What is shared out is read to the CPU: as a whole it may be too large for a device.
            place = self.fabric.device if self.config.strategy == "ddp" else torch.device("cpu")
            state = read_checkpoint(self.folder.checkpoint, place)
            with taking_up(self.folder.checkpoint):
                step = state["step"]
                self.model.load_state_dict(model_state(self.model, state["model"]))
                self.optimizer.load_state_dict(optimizer_state(self.optimizer, state["optimizer"]))
                self.mean.values = state["mean"] and model_state(self.model, state["mean"])
                self.seconds, self.first_sample = state["seconds"], state.get("first_sample", 0)
            if step > self.config.steps:
                raise TrainingError(
                    f"The run in {self.folder.path} has {step} steps already, and not {self.config.steps}."
                )
        elif trunk is not None:
            with taking_up(Path(self.config.branch)):
                self.first_sample = trunk.get("first_sample", 0) + trunk["step"] * trunk["batch"]
                if not self.config.architecture:
                    if len(trunk["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
                        raise TrainingError("The trunk was trained with another optimizer; give its --optimizer.")
                    self.optimizer.load_state_dict(optimizer_state(self.optimizer, trunk["optimizer"]))
        if self.fabric.is_global_zero:
            self.folder.cut_log(step)
        return step

    def finish(self) -> Path:
        """Writes the weights with their card."""
        with self.mean.in_place():
            model = self.whole_model()
            if model is not None:
                save_weights(model, self.folder.weights, self.card())
        self.fabric.barrier()
        return self.folder.weights

    def card(self) -> dict:
        """What is said of the weights."""
        c = self.config
        lmbda = None if self.model.config.lmbdas else self.lmbda
        return {
            "training": dataclasses.asdict(c),
            "lmbda": lmbda,
            "metric": c.metric,
            "train_seconds": round(read_checkpoint(self.folder.checkpoint, torch.device("cpu"))["seconds"], 1),
            "device": device_name(self.fabric.device),
        }

    def _anywhere(self, *here: bool) -> list[bool]:
        """Which of these are so in any of the processes."""
        if self.fabric.world_size == 1:
            return list(here)
        counts = self.fabric.all_reduce(torch.tensor(here, device=self.fabric.device).float(), reduce_op="sum")
        return (counts > 0).tolist()

    def _given(self, x: Tensor, step: int, samples: range) -> dict:
        """What a pass has beside its crops."""
        h, w = (side // (1 if self.config.transforms else 16) for side in x.shape[2:])
        return conditions(self.config, self.model.config, step, samples, (h, w), self.fabric.device)

    def _too_large(self, x: Tensor, step: int, samples: range) -> str:
        """The sentence to stop with where the memory does not hold the crops x; it says how many fit."""
        size = len(x)
        fits, advice = size // 2, "not even one fits; a smaller --crop may"
        while fits:
            try:
                self.optimizer.zero_grad()
                self.fabric.backward(self.step_module(x[:fits], **self._given(x, step, samples[:fits]))["loss"])
                break
            except torch.OutOfMemoryError:
                fits //= 2
        if fits:
            parts = next(n for n in range(2, size + 1) if size % n == 0 and size // n <= fits)
            advice = (
                f"{fits} at a time fit, and the same command with --accumulate {self.config.accumulate * parts} "
                "goes on from the checkpoint as if they all did"
            )
        crops = f"{size} crops of {x.size(2)} at a time"
        return f"The memory of {device_name(self.fabric.device)} is too small for {crops}: {advice}."


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM do not end the process but come into the list, so that a run can save first.

    Only the main thread can catch signals; in another one nothing changes.
    """
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
