"""The training loop, on Lightning Fabric: one process or many, CPU or GPU.

A run is a folder: `config.json`, `checkpoint.pt`, `log.jsonl`, TensorBoard's events and, at the end,
`weights.safetensors`.
Starting the same command again continues the run exactly where its checkpoint stands.
"""

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from tqdm import tqdm

from entroformer_lib.entroformer import Entroformer, build_model
from entroformer_lib.errors import Stopped, TrainingError
from entroformer_lib.files import replacing
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.models.config import named_config, parse_fields
from entroformer_lib.models.context import NO_GAPS, Gaps
from entroformer_lib.models.gain import RateGain
from entroformer_lib.training.config import RUNTIME_FIELDS, TrainConfig
from entroformer_lib.training.data import (
    PreloadedCrops,
    StreamedCrops,
    held_out_crops,
    random_drawn,
    random_kept,
    random_levels,
    random_missing,
    random_one_way,
    read_names,
    uniform_noise,
)
from entroformer_lib.training.growth import grown
from entroformer_lib.training.latents import LatentCrops, freeze, frozen_transforms, trained_lmbda, with_transforms
from entroformer_lib.training.loss import RateStep, TrainingStep, rates_and_distortions
from entroformer_lib.training.optimizer import build_optimizer
from entroformer_lib.training.schedule import learning_rate_factor
from entroformer_lib.weights.zoo import device_name, load_model, save_weights

# Lambda of 1 - MS-SSIM over that of 255^2 MSE at about the same rate: the ratio of CompressAI's two tables of lambdas,
# which runs from 1,333 (2.4 and 0.0018) to 1,222 (220 and 0.18).
MS_SSIM_OVER_MSE = 1290.0

Crops = PreloadedCrops | StreamedCrops | LatentCrops


def train(config: TrainConfig, progress: bool = True, watch: Callable[[dict, Entroformer], None] | None = None) -> Path:
    """Trains, or continues, a run.  ->  path of its weights.

    Args:
        progress: show a bar.
        watch: called with each row of the log and the model, to draw or test while it trains; it must leave the model
            as it is but for train() and eval().

    Raises:
        TrainingError: the run cannot start, met a loss that is no number, or was stopped by a signal.
        DataError: no usable pictures.
    """
    out = Path(config.out)
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        loggers=TensorBoardLogger(out, name="", version=""),
    )
    fabric.launch()
    _check(config, out, fabric)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    trunk = _checkpoint(Path(config.branch), fabric.device) if config.branch else None
    model = _initial_model(config, trunk)
    if model.config.context == "grouped" and (config.missing or config.pretrain):
        raise TrainingError("missing and pretrain hide latents of Entroformer's context models; GroupedMixer has none.")
    optimizer = build_optimizer(model, config.optimizer, config.lr)
    for part in (model.g_a, model.g_s):
        part.to(memory_format=torch.channels_last)
    bf16 = config.precision == "bfloat16"
    even = config.even_rates
    if config.transforms:
        goal = RateStep(model, bf16, even, config.rounded)
    else:
        goal = TrainingStep(model, config.metric, bf16, even)
    step_module, optimizer = fabric.setup(goal, optimizer)
    step_module.train()
    run = Run(config, fabric, model, step_module, optimizer)
    first = run.resume(trunk)
    return run.go(_pictures(config, model, fabric), first, progress and fabric.is_global_zero, watch)


def _pictures(config: TrainConfig, model: Entroformer, fabric: Fabric) -> Crops:
    if config.transforms:
        return LatentCrops(Path(config.latents), model, config.crop, config.seed, fabric.device)
    largest = max(crop for _, crop in config.crops)
    more = dict(left_out=_held_out(config), graphics=config.graphics, permuted=config.permuted)
    kind = PreloadedCrops if config.preload else StreamedCrops
    return kind(config.data, largest, config.seed, fabric.device, **more)


def _held_out(config: TrainConfig) -> frozenset[str]:
    return read_names(config.held_out) if config.held_out else frozenset()


def _initial_model(config: TrainConfig, trunk: dict | None = None) -> Entroformer:
    lmbdas = tuple(config.lmbdas)
    fields = parse_fields(config.architecture)
    if trunk is not None:
        return grown(Entroformer.from_state_dict(trunk["model"]), fields)
    if config.transforms:
        source = frozen_transforms(config.transforms)
        if config.init is None:
            return with_transforms(source, config.model, config.preset, **fields)
        return freeze(changed(load_model(config.init, device="cpu"), fields), source)
    if config.init is None:
        return build_model(config.model, config.preset, **{"lmbdas": lmbdas, **fields})
    model = load_model(config.init, device="cpu")
    if lmbdas:
        fields["lmbdas"] = lmbdas
    other_metric = config.metric == "ms-ssim" and model.card.get("metric", "mse") == "mse"
    return changed(model, fields, MS_SSIM_OVER_MSE if other_metric else 1.0)


def changed(model: Entroformer, fields: dict, lmbda_scale: float = 1.0) -> Entroformer:
    """A model of another architecture that begins with all that fits: every tensor of the same name and shape.

    What does not fit begins afresh. Gains of other lambdas begin from those interpolated at them.

    Args:
        model: the one to begin from.
        fields: of its config, to change.
        lmbda_scale: the new lambdas over the model's at the same rate; not 1 where the distortion is another.
    """
    config = model.config.replaced(**fields)
    if config == model.config:
        return model
    new = Entroformer(config)
    if new.gain is not None and model.gain is None:
        new.gain = RateGain(config.lmbdas, config.M, reference=model.card.get("lmbda"))
    state = new.state_dict()
    for name, tensor in model.state_dict().items():
        fits = name in state and state[name].shape == tensor.shape
        if fits and name != "_extra_state" and not name.startswith("gain."):
            state[name] = tensor
    new.load_state_dict(state)
    if new.gain is not None and model.gain is not None and config.M == model.config.M:
        new.gain.begin_from(model.gain, lmbda_scale)
    return new


def _check(config: TrainConfig, out: Path, fabric: Fabric) -> None:
    if config.batch % fabric.world_size:
        raise TrainingError(f"A batch of {config.batch} cannot be shared by {fabric.world_size} processes.")
    for _, crop in config.crops:
        if config.metric == "ms-ssim" and crop <= 160:
            raise TrainingError(f"MS-SSIM needs crops above 160 pixels, and the crop is {crop}.")
        if crop < 64 or crop % 64:
            raise TrainingError(f"The crop must be a multiple of 64 pixels, and is {crop}.")
    if (config.transforms is None) != (config.latents is None):
        raise TrainingError("Frozen transforms and the latents they gave go together: set both or none of the two.")
    if config.transforms and (config.last_crop or config.pretrain_lmbda is not None):
        raise TrainingError("On latents of frozen transforms there is no last_crop or pretrain_lmbda.")
    if config.branch and (config.init or config.transforms or config.lmbdas):
        raise TrainingError("A branch has model and lambdas of its trunk: init, transforms and lmbdas are not for it.")
    if config.schedule == "decay" and not config.branch:
        raise TrainingError("The schedule decay has no warm-up: it is for a branch of another run.")
    for name in ("graphics", "permuted"):
        if not 0 <= getattr(config, name) <= 1 or (config.transforms and getattr(config, name)):
            raise TrainingError(f"{name} is a share of at most 1, and does not go with latents.")
    if config.held_out and config.transforms:
        raise TrainingError("held_out goes with pictures; leave these pictures out of the latents.")
    if config.rounded and not config.transforms:
        raise TrainingError("rounded goes with the latents of frozen transforms; g_a learns from noisy latents.")
    if config.missing and not config.transforms or not 0 <= config.missing < 1:
        raise TrainingError("missing is a share below 1, and goes with the latents of frozen transforms.")
    if config.one_way and not config.transforms or not 0 <= config.one_way <= 1:
        raise TrainingError("one_way is a share of at most 1, and goes with the latents of frozen transforms.")
    fields = parse_fields(config.architecture)
    if config.one_way and named_config(config.model, config.preset, **fields).context != "parallel":
        raise TrainingError("Only a parallel model can see its context one way or both ways (one_way).")
    if config.lmbdas and config.pretrain_lmbda is not None:
        raise TrainingError("pretrain_lmbda goes with one lmbda; with lmbdas the high rates are trained all along.")
    if not 0 <= config.ema < 1:
        raise TrainingError(f"The ema must be at least 0 and below 1, and is {config.ema}.")
    if config.steps < 1 or config.batch < 1:
        raise TrainingError("A run needs at least one step and a batch of at least one.")
    text = json.dumps(dataclasses.asdict(config), indent=1)
    if fabric.is_global_zero:
        out.mkdir(parents=True, exist_ok=True)
        saved = out / "config.json"
        if saved.exists():
            # What runs of earlier versions do not have.
            young = {"architecture": [], "missing": 0.0, "one_way": 0.0, "even_rates": False, "rounded": False}
            was = {**young, "graphics": 0.0, "permuted": 0.0, **json.loads(saved.read_text())}
            may = RUNTIME_FIELDS | ({"steps"} if config.schedule == "constant" else set())
            changed = [k for k, v in json.loads(text).items() if was.get(k) != v and k not in may]
            if changed:
                raise TrainingError(
                    f"The folder {out} holds a run with another {changed[0]} ({was.get(changed[0])}); "
                    "choose another folder, or remove it to start afresh."
                )
        saved.write_text(text)
    fabric.barrier()


def _checkpoint(path: Path, device) -> dict:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise TrainingError(f"The checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None


class Mean:
    """Exponential running mean of the weights. It follows quickly at first: the decay grows as (1 + t) / (10 + t)."""

    def __init__(self, model: Entroformer, decay: float):
        self.model, self.decay = model, decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p for _, p in self.model.named_parameters()], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """The mean becomes the model's weights, and its weights what is kept here; the second call undoes the first."""
        for name, parameter in self.model.named_parameters():
            last = parameter.clone()
            parameter.copy_(self.values[name])
            self.values[name] = last


class Run:
    """One run under way: its step, its checkpoint, its log."""

    def __init__(self, config: TrainConfig, fabric: Fabric, model: Entroformer, step_module, optimizer):
        self.config, self.fabric, self.model = config, fabric, model
        self.step_module, self.optimizer = step_module, optimizer
        self.out = Path(config.out)
        self.mean = Mean(model, config.ema) if config.ema else None
        self.signal: int | None = None
        self.seconds = 0.0  # training time of earlier starts
        self.first_sample = 0  # a branch goes on where its trunk's samples end
        self.held_out: torch.Tensor | None = None

    def go(self, crops: Crops, first: int, progress: bool, watch=None) -> Path:
        c = self.config
        caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {s: signal.signal(s, self._on_signal) for s in caught}
        bar = tqdm(total=c.steps, initial=first, disable=not progress, unit="step", file=sys.stderr)
        begin = saved_at = time.monotonic()
        logged_at, logged = begin, first
        try:
            for step, x in self._crops(crops, first):
                terms = self.step(x, step)
                bar.update()
                now = time.monotonic()
                if (step + 1) % c.log_every == 0 or step + 1 == c.steps:
                    seconds = self.seconds + now - begin
                    speed = (step + 1 - logged) * c.batch / (now - logged_at)
                    logged_at, logged = now, step + 1
                    row = self._log(step + 1, terms, seconds, speed)
                    measuring = time.monotonic() - now  # is no training time
                    begin, logged_at, now = begin + measuring, logged_at + measuring, now + measuring
                    bar.set_postfix({k: f"{row[k]:.3f}" for k in ("rd_loss", "bpp", "psnr_db", "ms_ssim") if k in row})
                    if watch is not None and self.fabric.is_global_zero:
                        watch(row, self.model)
                        self.step_module.train()
                stop = self._stopped()
                if stop or now - saved_at > c.checkpoint_seconds or step + 1 == c.steps:
                    self.save(step + 1, self.seconds + now - begin)
                    saved_at = now
                if stop:
                    raise Stopped(
                        f"Stopped by a signal at step {step + 1} of {c.steps}; "
                        f"the same command goes on from {self.out / 'checkpoint.pt'}."
                    )
        finally:
            bar.close()
            for s, handler in previous.items():
                signal.signal(s, handler)
        return self._finish()

    def _crops(self, crops: Crops, first: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Step and batch, from step `first` on."""
        for all_steps, crop in self.config.crops:
            steps = range(max(first, all_steps.start), all_steps.stop)
            if steps:
                yield from zip(steps, crops.batches((self.samples(s) for s in steps), crop), strict=True)

    def samples(self, step: int) -> range:
        """Numbers of the samples that are this process's share of a step's batch."""
        share = self.config.batch // self.fabric.world_size
        start = self.first_sample + step * self.config.batch + self.fabric.global_rank * share
        return range(start, start + share)

    def step(self, x: torch.Tensor, step: int) -> dict:
        """One step on crops [B, 3, h, w], or latents [B, M, h / 16, w / 16].  ->  the terms of the loss"""
        c, device, samples = self.config, self.fabric.device, self.samples(step)
        torch.manual_seed(hash((c.seed, step)) % 2**63)  # what is left to chance inside the model: k's jitter
        x = x.contiguous(memory_format=torch.channels_last)
        h, w = (side // (1 if c.transforms else 16) for side in x.shape[2:])
        shapes = {"y": (self.model.config.M, h, w)}
        if self.model.config.hyperprior:
            shapes["z"] = (self.model.config.Z, h // 4, w // 4)
        noise = uniform_noise(samples, shapes, c.seed, device)
        gaps = self.gaps(step, samples, (h, w))

        lmbda, level, lmbdas = c.lmbda_at(step), None, self.model.config.lmbdas
        if lmbdas:
            level = torch.tensor(random_levels(samples, len(lmbdas), c.seed), device=device)
            lmbda = torch.tensor(lmbdas, device=device)[level]

        lr = c.lr * learning_rate_factor(step, c.steps, decay=c.decay, schedule=c.schedule)
        for group in self.optimizer.param_groups:
            if not group["fixed"]:
                group["lr"] = lr
        try:
            if c.transforms:
                terms = self.step_module(x, noise, gaps, level)
            else:
                drawn = random_drawn(samples, c.graphics, c.seed, device) if c.graphics else None
                terms = self.step_module(x, lmbda, noise, gaps, level, drawn)
            self.fabric.backward(terms["loss"])
        except torch.OutOfMemoryError:
            raise TrainingError(self._too_large(x)) from None
        if not math.isfinite(terms["loss"].detach()):
            raise TrainingError(
                f"The loss at step {step + 1} is not a finite number; the run stopped there, and the checkpoint "
                "before it is kept. A smaller lr or clip usually helps."
            )
        main = [p for group in self.optimizer.param_groups if not group["fixed"] for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(main, c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.mean is not None:
            self.mean.update(step)
        return terms

    def gaps(self, step: int, samples: range, size: tuple[int, int]) -> Gaps:
        """What is hidden from the context model at a step."""
        c, device = self.config, self.fabric.device
        kept = random_kept(samples, size, c.pretrain_mask, c.seed, device) if c.pretraining(step) else None
        missing = random_missing(samples, size, c.missing, c.seed, device) if c.missing else None
        one_way = random_one_way(samples, c.one_way, c.seed, device) if c.one_way else None
        return NO_GAPS if kept is missing is one_way is None else Gaps(kept, missing, one_way)

    def _too_large(self, x: torch.Tensor) -> str:
        """Finds by trying which batch fits.  ->  the sentence to stop with"""
        batch = len(x) // 2
        while batch:
            self.optimizer.zero_grad()
            try:
                words = () if self.config.transforms else (self.config.lmbda,)
                self.fabric.backward(self.step_module(x[:batch], *words)["loss"])
                break
            except torch.OutOfMemoryError:
                batch //= 2
        c, fits, size = self.config, batch * self.fabric.world_size, x.size(2)
        advice = "not even one fits; a smaller --crop may"
        if fits:
            advice = f"{fits} fit, and the same command with --batch {fits} goes on from the checkpoint"
        return f"The memory of {device_name(self.fabric.device)} is too small for {c.batch} crops of {size}: {advice}."

    # ---- checkpoint and log ----

    def save(self, step: int, seconds: float) -> None:
        """Writes the checkpoint beside the old one, then takes its place: a full disk cannot lose both."""
        if self.fabric.is_global_zero:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "first_sample": self.first_sample,
                "batch": self.config.batch,
                "mean": self.mean and self.mean.values,
            }
            path = self.out / "checkpoint.pt"
            try:
                with replacing(path) as part:
                    torch.save(state, part)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                raise TrainingError(f"The checkpoint of step {step} could not be written to {path}: {error}") from None
        self.fabric.barrier()

    def resume(self, trunk: dict | None = None) -> int:
        """Loads the checkpoint, if there is one, or begins a branch of a trunk's.  ->  the step to go on with."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            if self.fabric.is_global_zero:
                (self.out / "log.jsonl").unlink(missing_ok=True)
            if trunk is not None:
                self.first_sample = trunk.get("first_sample", 0) + trunk["step"] * trunk["batch"]
                if not self.config.architecture:
                    self.optimizer.load_state_dict(trunk["optimizer"])
            return 0
        state = _checkpoint(path, self.fabric.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.first_sample = state["seconds"], state.get("first_sample", 0)
        if self.mean is not None:
            self.mean.values = state["mean"]
        log = self.out / "log.jsonl"
        if self.fabric.is_global_zero and log.exists():  # forget what was logged after the checkpoint
            rows = [row for row in log.read_text().splitlines() if json.loads(row)["step"] <= state["step"]]
            log.write_text("".join(row + "\n" for row in rows))
        return state["step"]

    def _log(self, step: int, terms: dict, seconds: float, speed: float) -> dict:
        row = {name: float(self.fabric.all_reduce(value.detach())) for name, value in terms.items()}
        row = {"step": step, **row, "lr": self.optimizer.param_groups[0]["lr"]}
        row.update(lmbda=self.config.lmbda_at(step - 1), seconds=round(seconds, 3), images_per_s=round(speed, 2))
        self.fabric.log_dict({k: v for k, v in row.items() if k != "step"}, step=step)
        c = self.config
        if self.fabric.is_global_zero:
            if c.held_out and (step % c.held_out_every < c.log_every or step == c.steps):
                row["held_out"] = self._measured()
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def _measured(self) -> list[dict]:
        """The held-out pictures at every lambda, see `rates_and_distortions`."""
        c = self.config
        if self.held_out is None:
            self.held_out = held_out_crops(c.data, _held_out(c)).to(self.fabric.device)
        if self.mean is not None:  # it is what will be kept
            self.mean.swap()
        rows = rates_and_distortions(self.model.eval(), self.held_out, self.model.config.lmbdas or (c.lmbda,), c.metric)
        if self.mean is not None:
            self.mean.swap()
        self.step_module.train()
        return rows

    def _finish(self) -> Path:
        path = self.out / "weights.safetensors"
        if self.fabric.is_global_zero:
            seconds = torch.load(self.out / "checkpoint.pt", weights_only=True)["seconds"]
            if self.mean is not None:
                self.mean.swap()
            lmbda = None if self.model.config.lmbdas else self.config.lmbda
            if self.config.transforms and lmbda:
                lmbda = trained_lmbda(self.config.transforms)
            card = {
                "training": dataclasses.asdict(self.config),
                "lmbda": lmbda,
                "metric": self.config.metric,
                "train_seconds": round(seconds, 1),
                "device": device_name(self.fabric.device),
            }
            save_weights(self.model, path, card)
        self.fabric.barrier()
        return path

    # ---- signals ----

    def _on_signal(self, number, frame) -> None:
        self.signal = number

    def _stopped(self) -> bool:
        """True in every process as soon as one of them got a signal."""
        if self.fabric.world_size == 1:
            return self.signal is not None
        flag = torch.tensor(float(self.signal is not None), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="sum") > 0)
