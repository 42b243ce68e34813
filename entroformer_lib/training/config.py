"""What one training run is: read by the loop, the command line and the model cards. Imports nothing heavy."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from entroformer_lib.errors import TrainingError
from entroformer_lib.fields import fits, tuples


class Must(NamedTuple):
    """What the values of a type must be besides, in words and as a test."""

    be: str
    test: Callable[..., bool]


Text = Annotated[str, Must("a word that is not empty", lambda s: s.strip() != "")]
Count = Annotated[int, Must("a whole number of at least 1", lambda n: n >= 1)]
Workers = Annotated[int, Must("a whole number of at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Must("a whole number of at least 0 and below 2^63", lambda n: 0 <= n < 2**63)]
Side = Annotated[int, Must("a multiple of 64 pixels", lambda n: n >= 64 and n % 64 == 0)]
Positive = Annotated[float, Must("a number above 0", lambda n: 0 < n < math.inf)]
LearningRate = Annotated[float, Must("a number above 0 and up to 1000", lambda n: 0 < n <= 1000)]
Seconds = Annotated[float, Must("a number of at least 0", lambda n: 0 <= n < math.inf)]
Share = Annotated[float, Must("a share from 0 to 1", lambda n: 0 <= n <= 1)]
LessThanOne = Annotated[float, Must("at least 0 and below 1", lambda n: 0 <= n < 1)]
Factor = Annotated[float, Must("above 0 and at most 1", lambda n: 0 < n <= 1)]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the paper's (appendix A.5) but for the size of model and
    crops, batch and length, and the random mask at the beginning (`pretrain`).

    The line under a field is its help text on the command line.

    Raises:
        TrainingError: a value out of its range, or fields that do not go together.
    """

    data: Text
    """Pictures to train on: a folder, a .txt list, a .tar, a glob of tars, or the manifest.json of packed ones; the
    last three also at an address: s3://, gs://, https://, hf:// (docs/scaling.md). On latents: only a word for the
    card."""
    out: Text
    """Folder of the run. The same command again continues it."""
    model: Text = "tiny-parallel"
    """Size and variant: {base, study, tiny}-{serial, parallel, cnn, minnen, hyperprior, hyperprior-cnn, context,
    context-cnn, groupedmixer, groupedmixer-fast, groupedmixer-large}. With init or branch the model is theirs."""
    architecture: tuple[Text, ...] = ()
    """Fields of the architecture to change, of the model's or of init's, such as: position=none top_k=64."""
    preset: Literal["paper", "official"] = "paper"
    lmbda: Positive = 0.0035
    """Weight of the distortion: 255^2 * MSE, or 1 - MS-SSIM."""
    lmbdas: tuple[Positive, ...] = ()
    """Several weights, rising: one model of variable rate, every crop with one of them. Replaces lmbda."""
    even_rates: bool = True
    """With several lmbdas the loss of each crop counts 1 / sqrt(lmbda), so that every rate counts alike. With
    --no-even-rates every crop counts alike."""
    metric: Literal["mse", "ms-ssim"] = "mse"
    steps: Count = 20_000
    batch: Count = 8
    """Pictures per step, over all processes together."""
    accumulate: Count = 1
    """Passes of a step, each on a part of the batch; their gradients are added. The same numbers in less memory."""
    crop: Side = 128
    """Side of a crop in pixels."""
    last_crop: Side | None = None
    """Side of a crop over the last steps; default: crop."""
    last_share: Share = 0.2
    """Share of the steps that have last_crop."""
    optimizer: Literal["adam", "muon"] = "adam"
    """muon: orthogonalised momentum for matrices and kernels, Adam for the rest; far fewer steps (docs/training.md)."""
    lr: LearningRate = 1e-4
    schedule: Literal["steps", "linear", "constant", "decay"] = "steps"
    """After the warm-up: steps of `decay` (the paper); constant and then linearly down to 0 over the last 60%;
    constant; or, with branch and without warm-up, linearly down to 0 from the first step on."""
    decay: Factor = 0.75
    """Factor on the learning rate at every fifth of the steps; the released code has 0.5."""
    ema: LessThanOne = 0.0
    """Decay of a running mean of the weights that is kept instead of the last ones, such as 0.999; 0: none."""
    clip: Positive = 1.0
    """Largest norm of the gradient; longer ones are shortened to it."""
    pretrain: Share = 0.0
    """Share of the steps with the random mask and with pretrain_lmbda."""
    pretrain_lmbda: Positive | None = None
    """Weight of the distortion meanwhile, for a high-rate start; default: lmbda."""
    pretrain_mask: Share = 0.5
    """Share of the latents masked meanwhile."""
    transforms: Text | None = None
    """A model whose g_a, g_s and gains are taken and kept frozen; with @ and a lambda, at that rate alone; or
    zoo:NAME:QUALITY of CompressAI. Only the entropy model is trained, on `latents`, by its rate."""
    latents: Text | None = None
    """Folder of the latents of these transforms, written by python -m entroformer_lib.training.latents."""
    missing: LessThanOne = 0.0
    """Each crop hides a random share of its latents, up to this one, from all the others: for what a position is worth.
    Only on latents."""
    one_way: Share = 0.0
    """Share of the crops in which a parallel model sees only the context before a latent, in raster order: for the
    comparison of one-way and two-way context. Only on latents."""
    no_context: Share = 0.0
    """Share of the crops of which a parallel model predicts all latents by the hyperprior alone, for the same
    comparison. Only on latents."""
    rounded: bool = False
    """Train the rate of rounded y, which is what a file holds, and not of noisy y. Only on latents, where y needs no
    gradient."""
    init: Text | None = None
    """Weights to go on from: a name of `entroformer models` or a .safetensors file. With architecture or lmbdas, what
    still fits is taken, tensor by tensor, and the rest begins afresh."""
    branch: Text | None = None
    """Checkpoint of another run to go on from, with its optimizer's state and after its samples; with a constant
    schedule there and decay here, an unfinished run shows what it is worth. With architecture, transforms of more
    channels or blocks begin with the same outputs, and the optimizer begins afresh."""
    held_out: Text | None = None
    """A list of file names, one a line. These pictures are left out of training, and R + lambda D of one crop of each
    is logged at every lambda, with rounding as in files."""
    held_out_every: Count = 2000
    """Steps between these measurements; there is one at the end too."""
    graphics: Share = 0.0
    """Share of the crops that are drawn by code: text, charts, flat colours (graphics.py). Each counts at most as much
    as the middle photograph among the crops that are computed at once."""
    permuted: Share = 0.0
    """Share of the photographs whose colour channels change places."""
    seed: Seed = 0
    preload: bool = True
    """All pictures are kept on the device. With --no-preload they are streamed through worker processes."""
    workers: Workers = 2
    """Of pictures that are streamed, how many processes read and crop them, for each process that trains."""
    cache: Text | None = None
    """Folder for shards that are fetched; default: ~/.cache/entroformer/shards."""
    cache_gb: Positive = 50.0
    """How much it may hold. What was not used for longest is thrown away."""
    check_shards: bool = False
    """Compare every shard with the checksum in its manifest, when it is fetched or opened."""
    pass_over_shards: bool = False
    """Name a shard that is broken or cannot be fetched, and go on without it."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """bfloat16 is for layers, never for attention scores or likelihoods; auto: where the device computes in it."""
    compile: bool = False
    """Compile g_a and g_s with torch.compile: a minute or more at the start, and a C++ compiler (docs/scaling.md)."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Count | Literal["auto"] = "auto"
    """How many processes; under torchrun and Slurm, per machine."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each process has the whole model. fsdp: each has a part of every weight, for models larger than the
    paper's."""
    start_timeout: Seconds = 600.0
    """Under torchrun and Slurm: how long the processes wait for each other at the start."""
    checkpoint_seconds: Seconds = 120.0
    log_every: Count = 50

    def __post_init__(self):
        check(vars(self), TrainConfig)
        for name, value in vars(self).items():
            if isinstance(value, float):  # NumPy's are too, but what is saved holds plain numbers alone
                object.__setattr__(self, name, float(value))
        for wrong, sentence in self._rules():
            if wrong:
                raise TrainingError(sentence)

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Fields that do not go together, each with the sentence that says so."""
        for crop in (self.crop, self.last_crop or self.crop):
            small = self.metric == "ms-ssim" and crop <= 160
            yield small, f"MS-SSIM needs crops above 160 pixels, and the crop is {crop}."
        on_latents, alone = self.transforms is not None, (self.transforms is None) != (self.latents is None)
        yield alone, "Frozen transforms and the latents they gave go together: set both or none of the two."
        for name in ("pretrain_lmbda", "graphics", "permuted", "held_out", "compile"):
            wrong = on_latents and getattr(self, name) not in (None, 0)
            yield wrong, f"{name} goes with pictures, not with the latents of frozen transforms."
        for name in ("rounded", "missing", "one_way", "no_context"):
            wrong = not on_latents and bool(getattr(self, name))
            yield wrong, f"{name} goes with the latents of frozen transforms."
        wrong = on_latents and len(self.lmbdas) > 0
        yield wrong, "The rates are those of the frozen transforms: lmbdas goes with pictures."
        wrong = on_latents and self.metric != "mse"
        yield wrong, "With frozen transforms the rate alone is trained: metric goes with pictures."
        wrong = self.branch is not None and (self.init is not None or on_latents or len(self.lmbdas) > 0)
        yield wrong, "A branch has model and lambdas of its trunk: init, transforms and lmbdas are not for it."
        wrong = self.schedule == "decay" and self.branch is None
        yield wrong, "The schedule decay has no warm-up: it is for a branch of another run."
        wrong = len(self.lmbdas) > 0 and self.pretrain_lmbda is not None
        yield wrong, "pretrain_lmbda goes with one lmbda; with lmbdas the high rates are trained all along."

    def lmbda_at(self, step: int) -> float:
        """The weight of the distortion at a step of a model of one rate."""
        early = self.pretraining(step) and self.pretrain_lmbda is not None
        return self.pretrain_lmbda if early else self.lmbda

    def pretraining(self, step: int) -> bool:
        return step < round(self.pretrain * self.steps)

    @property
    def crops(self) -> list[tuple[range, int]]:
        """Which steps have which crop."""
        if self.last_crop in (None, self.crop):
            return [(range(self.steps), self.crop)]
        change = self.steps - int(self.steps * self.last_share + 1e-6)
        return [(range(change), self.crop), (range(change, self.steps), self.last_crop)]


def check(values: dict, annotated: Callable) -> None:
    """Compares values with the annotations of the same names in a class or function. Lists count as tuples.

    Raises:
        TrainingError: one of them does not fit.
    """
    hints = get_type_hints(annotated, include_extras=True)
    for name, value in values.items():
        if not fits(tuples(value), hints[name]):
            raise TrainingError(f"{name} must be {_in_words(hints[name])}, and is {value!r}.")


def _in_words(hint) -> str:
    """What a field of this type may hold."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return inner[1].be
    if kind is Literal:
        return " or ".join(map(str, inner))
    if kind is tuple:
        return f"a list, each of it {_in_words(inner[0])}"
    return " or ".join(_in_words(one) for one in inner if one is not NoneType) or f"a {hint.__name__}"


# These may differ when a run is continued. (With another batch it goes on, but not as if it had never stopped.)
RUNTIME_FIELDS = {"out", "data", "latents", "batch", "accumulate", "compile", "accelerator", "devices", "strategy"}
RUNTIME_FIELDS |= {"start_timeout", "checkpoint_seconds", "log_every", "held_out_every"}
RUNTIME_FIELDS |= {"workers", "cache", "cache_gb", "check_shards", "pass_over_shards"}
