"""The whole architecture as one frozen dataclass, with named sizes and variants.

Read the fields top to bottom next to the paper's section 4 and Table 5; the comment behind a field says where an
odd default comes from. `paper` follows the text, `official` the code the authors released.
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from typing import Literal, get_type_hints

from entroformer_lib.errors import ConfigError
from entroformer_lib.fields import describe, fits, known

LARGEST_WINDOW = 2**12  # sites along a side of the largest picture, 65,535 pixels
LARGEST_K = 2**16  # the largest k in a file's header

Context = Literal["serial", "parallel", "cnn", "grouped", "none"]
Position = Literal["none", "absolute", "relative_1d", "relative_2d", "diamond"]


@dataclass(frozen=True)
class EntroformerConfig:
    """Every choice that changes the network. Two equal configs build interchangeable models.

    Raises:
        ConfigError: a value outside its field's type, or a combination that cannot be built.
    """

    # serial: causal, one site a step; parallel: checkerboard, two passes (section 3.4); cnn: a masked 5x5 convolution;
    # grouped: GroupedMixer, its own fields below; none: the hyperprior alone
    context: Context = "serial"
    hyperprior: bool = True  # False leaves only the context model (Figure 5, right)
    hyper: Literal["transformer", "cnn"] = "transformer"  # layers of h_a and h_s; cnn: as Minnen et al. (2018)
    # What h_a looks at: y, as in the paper, or y after rounding (ours): then z spends no bits on what rounding removes
    hyper_input: Literal["y", "rounded"] = "y"

    # g_a and g_s, see transforms.py. gdn: the paper's four 5x5 convolutions; blocks: 1x1 and depthwise ones (ours)
    transforms: Literal["gdn", "blocks"] = "gdn"
    stages: tuple[tuple[int, int, int], ...] = ()  # if "blocks", fine to coarse: pixels a side, channels, blocks
    linear_path: Literal["none", "dct"] = "none"  # a linear map of each block of pixels beside g_a and g_s (ours)

    # Sizes (Table 5)
    N: int = 192  # channels inside g_a and g_s; blocks have theirs in `stages`
    M: int = 384  # channels of the latents y
    Z: int = 192  # channels of the hyper-latents z, as released; Table 5 prints 384
    dim: int = 384  # width of the transformers, D in our shapes
    heads: int = 6
    context_layers: int = 6  # 2N in section 3.1, whose N = 3 counts the blocks of h_a and of h_s, not channels
    ffn_ratio: int = 4

    # Top-k attention (section 3.3)
    top_k: int | None = 32  # None: dense attention
    hyper_top_k: tuple[int | None, int | None, int | None] = (32, 32, 32)  # h_a's three stages, fine to coarse
    # Ours: a token sees only tokens at most so many rows and columns away on its grid. Time is then linear in the
    # number of pixels, not quadratic. None: all, as in the paper. No weights depend on it.
    search_window: int | None = None
    top_k_jitter: bool = False  # while training, draw k from [k // 2, 2 k) at every pass (released code)

    # Position encoding (section 3.2, Table 1)
    position: Position = "diamond"
    radius: int = 3  # h: offsets with L1 distance up to h have a vector of their own (Figure 6: best at 3)
    hyper_radius: tuple[int, int, int] = (3, 3, 3)
    share_position: bool = False  # one table for all blocks of a stack (released code) instead of one per block

    attention_scale: Literal["head", "width"] = "head"  # 1/sqrt(head width) as in eq. 3; released: 1/sqrt(dim)
    activation: Literal["relu", "gelu", "leaky_relu"] = "relu"  # feed-forward "as Vaswani"; released: LeakyReLU(0.2)
    z_prior: Literal["factorized", "gaussian"] = "factorized"  # the authors call the paper's "factorized" an erratum
    scale_floor: float = 0.11  # smallest sigma of y; CompressAI's bound. Released: exp(-7)

    # GroupedMixer (context "grouped", groupedmixer.py); context_layers counts its pairs of mixers. The mixers always
    # have the diamond: position, share_position and top_k_jitter apply to its hyperprior only, attention_scale to the
    # hyperprior and inner="top_k".
    groups: tuple[int, int, int] = (5, 2, 2)  # k_c channel slices, k_h x k_w spatial phases: G = k_c k_h k_w
    group_order: Literal["channels", "raster", "sites"] = "channels"
    inner: Literal["window", "top_k", "none"] = "window"  # inner-group mixer; top_k: Entroformer's attention
    window: int = 8  # side of the inner mixer's windows, in sites of a group
    cross: bool = True  # cross-group mixer

    # Variable rate (ours, see gain.py): the lambdas one model serves, low to high; empty: one rate, no gains
    lmbdas: tuple[float, ...] = ()
    rate_aware: bool = False  # the entropy model is told the rate

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not fits(value, hint):
                raise ConfigError(f"The config field '{name}' cannot be {value!r}; it takes {describe(hint)}.")
        stages = tuple(itertools.chain(*self.stages))
        sizes = (self.N, self.M, self.Z, self.dim, self.heads, self.context_layers, self.ffn_ratio, self.radius)
        if min(sizes + self.hyper_radius + self.groups + stages + (self.window,)) < 1:
            raise ConfigError("Every size and radius in a config must be at least 1.")
        counts = (self.context_layers, self.ffn_ratio, *(n for *_, n in self.stages))
        large = max(sizes + stages) > 2**14 or max(counts) > 32 or max(self.radius, *self.hyper_radius) > 64
        if large or self.window > 2**10 or math.prod(self.groups) > 2**10:
            raise ConfigError(
                "The config describes a network that no machine can hold: sizes go up to 16,384, layers, blocks of a "
                "stage and ffn_ratio up to 32, radii up to 64, windows and groups up to 1,024."
            )
        if len(self.lmbdas) > 2**8:
            raise ConfigError(f"A model has up to 256 lmbdas, not {len(self.lmbdas):,}.")
        if self.context == "none" and not self.hyperprior:
            raise ConfigError("A model without context and without hyperprior has nothing to predict from.")
        if self.context == "grouped" and not self.hyperprior:
            raise ConfigError("GroupedMixer's first group is predicted by the hyperprior, so it needs one.")
        if self.context == "grouped" and self.groups[0] > self.M:
            raise ConfigError(f"The {self.M} channels of y are too few for {self.groups[0]} slices.")
        if (self.transforms == "blocks") != bool(self.stages):
            raise ConfigError("Transforms of blocks have stages, and those with GDN have none.")
        sides = [side for side, _, _ in self.stages]
        if any(16 % side for side in sides) or not _rises(tuple(sides)):
            raise ConfigError(f"Stages go from fine to coarse over 1, 2, 4, 8 and 16 pixels a side, not over {sides}.")
        if self.dim % self.heads:
            raise ConfigError(f"The width dim = {self.dim} does not divide into {self.heads} heads.")
        if self.position == "absolute" and self.dim % 4:
            raise ConfigError(f"Absolute positions need a width divisible by 4, and dim is {self.dim}.")
        if self.linear_path == "dct" and self.M > 768:
            raise ConfigError(
                f"A block of 16x16 pixels has 768 frequencies, too few for M = {self.M} with a linear path."
            )
        if any(k is not None and k < 2 for k in (self.top_k, *self.hyper_top_k)):
            raise ConfigError("top_k must be at least 2, or None for dense attention.")
        if self.search_window is not None and not 1 <= self.search_window <= LARGEST_WINDOW:
            raise ConfigError(
                f"A search window has 1 to {LARGEST_WINDOW:,} latents in each direction, not {self.search_window:,}."
            )
        if self.search_window is not None and self.context == "grouped":
            raise ConfigError("GroupedMixer has windows of its own and takes no search window.")
        if not self.scale_floor > 0:
            raise ConfigError(f"scale_floor must be above 0, and is {self.scale_floor}.")
        if self.rate_aware and not self.lmbdas:
            raise ConfigError("rate_aware is for models of variable rate; this one has no lmbdas.")
        if self.lmbdas and not (len(self.lmbdas) > 1 and self.lmbdas[0] > 0 and _rises(self.lmbdas)):
            raise ConfigError(f"lmbdas must be two or more positive numbers that rise, and are {self.lmbdas}.")

    @property
    def downsampling(self) -> int:
        """Pixels per side of the largest block the model works on; pictures are padded to a multiple of it."""
        return 64 if self.hyperprior else 16

    @property
    def variant(self) -> str:
        """What kind of entropy model this is, for tables: `serial`, `parallel`, `cnn`, `groupedmixer`, `hyperprior` (no
        context), or `context-serial` and so on (no hyperprior); `hyperprior-cnn`, `minnen` (context and hyperprior
        CNNs) and so on with the hyperprior as a CNN."""
        if not self.hyperprior:
            return f"context-{self.context}"
        name = {"none": "hyperprior", "grouped": "groupedmixer"}.get(self.context, self.context)
        if self.hyper == "transformer":
            return name
        return "minnen" if self.context == "cnn" else f"{name}-cnn"

    def to_json(self) -> str:
        """The config as JSON with sorted keys, so that equal configs give equal text."""
        values, default = dataclasses.asdict(self), EntroformerConfig()
        # Fields younger than the first weights, whose digest must not change, are left out where they say nothing:
        silent = [name for name in YOUNG_FIELDS if values[name] == getattr(default, name)]
        silent += GROUPED_FIELDS if self.context != "grouped" else ()
        return json.dumps({name: v for name, v in values.items() if name not in silent}, sort_keys=True)

    def replaced(self, **fields) -> "EntroformerConfig":
        """The config with some fields changed; an unknown one is a ConfigError."""
        return dataclasses.replace(self, **known(fields, type(self)))

    @classmethod
    def from_json(cls, text: str) -> "EntroformerConfig":
        """Reads `to_json`'s text back; an unknown key is a ConfigError."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"This is not a config in JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ConfigError("A config in JSON is an object of fields and values.")
        values.pop("ties", None)  # of the first weights; equal scores are always kept now
        return cls(**known(values, cls))


TRANSFORM_FIELDS = ("N", "M", "transforms", "stages", "linear_path")
GROUPED_FIELDS = ("groups", "group_order", "inner", "window", "cross")
YOUNG_FIELDS = ("lmbdas", "rate_aware", "hyper", "hyper_input", "transforms", "stages", "linear_path", "search_window")


def _rises(values: tuple[float, ...]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


SIZES = {
    "base": {},  # the paper's Table 5; docs/differences.md lists where it differs
    # The smaller ones keep at least half of the 384 channels of y: with fewer, fine detail is lost.
    "study": dict(N=96, M=256, Z=64, dim=128, heads=4),  # about a third as wide: trains in minutes on a GPU
    "tiny": dict(N=64, M=192, Z=48, dim=96, heads=3, top_k=16, hyper_top_k=(16, 16, 16)),  # two CPU cores
}

VARIANTS = {
    "serial": dict(context="serial"),
    "parallel": dict(context="parallel"),
    "cnn": dict(context="cnn"),
    "hyperprior": dict(context="none"),
    "context": dict(context="serial", hyperprior=False),
    # Our counterparts of the CNNs in the paper's Figure 5: everything a CNN, and each half of it alone
    "minnen": dict(context="cnn", hyper="cnn"),
    "hyperprior-cnn": dict(context="none", hyper="cnn"),
    "context-cnn": dict(context="cnn", hyperprior=False),
    "groupedmixer": dict(context="grouped"),
    "groupedmixer-fast": dict(context="grouped"),
    "groupedmixer-large": dict(context="grouped"),
}

# k_c of each size of GroupedMixer; with 2 x 2 phases G = 4 k_c. `base` has M = 320, so that its 5 slices are of equal
# size. context_layers is 3 and not 6, because a pair of mixers runs over k_c times as many tokens as a layer of
# Entroformer.
GROUPED = {
    "base": ({"groupedmixer": 5, "groupedmixer-fast": 2, "groupedmixer-large": 10}, dict(M=320, context_layers=3)),
    "study": ({"groupedmixer": 4, "groupedmixer-fast": 2, "groupedmixer-large": 8}, dict(context_layers=3)),
    "tiny": ({"groupedmixer": 3, "groupedmixer-fast": 1, "groupedmixer-large": 6}, dict(context_layers=3)),
}

PRESETS = {
    "paper": {},
    "official": dict(
        share_position=True,
        attention_scale="width",
        activation="leaky_relu",
        z_prior="gaussian",
        scale_floor=0.0009118819655545162,  # exp(-7)
        top_k_jitter=True,
    ),
}


def named_config(name: str, preset: str = "paper", **overrides) -> EntroformerConfig:
    """Config of a name such as `base-serial` or `tiny-parallel`, with fields replaced by keyword.

    Args:
        name: `{base, study, tiny}-{serial, parallel, cnn, hyperprior, context, groupedmixer}`; GroupedMixer also has
            `-groupedmixer-fast` and `-groupedmixer-large`, with fewer and more groups. `minnen` is a CNN throughout,
            `hyperprior-cnn` and `context-cnn` are its halves.
        preset: `paper` (as written) or `official` (as released).
        overrides: any fields of EntroformerConfig.

    Raises:
        ConfigError: an unknown size, variant, preset or field.
    """
    size, _, variant = name.partition("-")
    if size not in SIZES or variant not in VARIANTS:
        raise ConfigError(
            f"There is no model '{name}'; a name is one of {', '.join(SIZES)}, "
            f"a dash, and one of {', '.join(VARIANTS)}."
        )
    if preset not in PRESETS:
        raise ConfigError(f"There is no preset '{preset}'; there are {', '.join(PRESETS)}.")
    values = {**SIZES[size], **VARIANTS[variant], **PRESETS[preset]}
    if values["context"] == "grouped":
        slices, more = GROUPED[size]
        values.update(more, groups=(slices[variant], 2, 2))
    if preset == "official":  # the hyper stages' k and table side shrink with their grid
        k = overrides.get("top_k", values.get("top_k", 32))
        if isinstance(k, int):
            values.update(hyper_top_k=(k, max(2, k // 2), max(2, k // 4)))
        values.update(hyper_radius=(3, 2, 2))
    values.update(known(overrides, EntroformerConfig))
    return EntroformerConfig(**values)
