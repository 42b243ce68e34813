import dataclasses
import math

import pytest

from entroformer_lib.entroformer import build_model
from entroformer_lib.errors import ConfigError, TrainingError
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.training.config import TrainConfig


@pytest.mark.parametrize("name", ["base-serial", "study-parallel", "tiny-hyperprior", "tiny-context"])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_json_round_trip(name, preset):
    config = named_config(name, preset)
    assert EntroformerConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "make, offender",
    [
        (lambda: named_config("tiny-serial", heds=3), "heds"),
        (lambda: EntroformerConfig.from_json('{"colour": 1}'), "colour"),
        (lambda: EntroformerConfig.from_json("[1]"), "object"),
        (lambda: EntroformerConfig.from_json("{"), "JSON"),
        (lambda: named_config("huge-serial"), "huge-serial"),
        (lambda: named_config("tiny-serial", preset="mine"), "mine"),
        (lambda: EntroformerConfig(position="circle"), "circle"),
        (lambda: EntroformerConfig(top_k="many"), "many"),
        (lambda: EntroformerConfig(top_k=True), "top_k"),
        (lambda: EntroformerConfig(dim=100), "100"),
        (lambda: EntroformerConfig(context="none", hyperprior=False), "nothing to predict from"),
        (lambda: EntroformerConfig(scale_floor=0.0), "scale_floor"),
    ],
)
def test_what_cannot_be_built_is_named(make, offender):
    with pytest.raises(ConfigError, match=offender):
        make()


@pytest.mark.parametrize(
    "nonsense",
    [
        dict(lmbda=-1),
        dict(clip=0),
        dict(pretrain_mask=5),
        dict(decay=-3),
        dict(data=""),
        dict(log_every=0),
        dict(seed=-1),
        dict(lr=math.nan),
        dict(devices=0),
        dict(accelerator="banana"),
        dict(lmbdas=(0.1, 0.0)),
        dict(steps=2.5),
        dict(batch=True),
        dict(seed=2**63),
        dict(metric="psnr"),
        dict(init=" "),
        dict(preload="no"),
    ],
    ids=lambda nonsense: next(iter(nonsense)),
)
def test_nonsense_about_a_run_is_refused(nonsense):
    (name,) = nonsense
    with pytest.raises(TrainingError, match=f"^{name} must be .*, and is "):
        TrainConfig(**{"data": "DATA", "out": "OUT", **nonsense})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrainConfig)])
def test_no_field_of_a_run_takes_anything(field):
    for nonsense in (-1, math.inf, -math.inf, math.nan, "", (-1.0,), ("",), [None]):
        with pytest.raises(TrainingError, match=f"^{field} must be "):
            TrainConfig(**{"data": "DATA", "out": "OUT", field: nonsense})


def test_the_ends_of_the_ranges_belong_to_a_run():
    ends = dict(steps=1, batch=1, crop=64, last_crop=None, decay=1, pretrain=1, pretrain_mask=0, seed=0, devices=2)
    config = TrainConfig("DATA", "OUT", lmbdas=[1, 2], ema=0, clip=1e9, checkpoint_seconds=0, graphics=1, **ends)
    assert config.decay == 1 and config.lmbdas == [1, 2]


def test_overrides_reach_the_model():
    model = build_model("tiny-parallel", top_k=None, position="relative_2d", radius=2)
    assert model.config.top_k is None
    assert model.context_model.stack.positions[0].table().shape == (25, 32)


def test_the_released_stages_shrink_k_with_their_grid():
    """k, k // 2, k // 4 of whatever k the model has."""
    assert named_config("tiny-serial", "official", top_k=64).hyper_top_k == (64, 32, 16)
    assert named_config("tiny-serial", "official").hyper_top_k == (16, 8, 4)
    assert named_config("tiny-serial", "official", top_k=None).hyper_top_k == (16, 16, 16)


def test_base_entropy_model_by_hand():
    """Table 6: 142.7 MB of float32. Counted from Table 5 layer by layer."""
    D, M, Z, d = 384, 384, 192, 64
    vectors = 26  # the diamond of h = 3 has 2 * 3 * 4 + 1 offsets, and one vector for all others
    attention = 3 * D * D + D * D + vectors * d
    feed_forward = (D * 4 * D + 4 * D) + (4 * D * D + D)
    block = attention + feed_forward + 2 * 2 * D  # two layer norms
    h_a = (M * D + D) + 3 * block + 2 * (9 * D * D + D) + 2 * D + (D * Z + Z)
    h_s = (Z * D + D) + 3 * block + 2 * (9 * D * 4 * D + 4 * D)
    context = (M * D + D) + 6 * block + D  # and the start token
    parameters = (2 * D * 4 * D + 4 * D) + (4 * D * 2 * M + 2 * M)
    bottleneck = Z * (
        (3 + 9 + 9 + 9 + 3) + (3 + 3 + 3 + 3 + 1) + (3 + 3 + 3 + 3) + 3
    )  # matrices, biases, factors, quantiles
    model = build_model("base-serial")
    counted = sum(p.numel() for part in model.entropy_model_parts() for p in part.parameters())
    assert counted == h_a + h_s + context + parameters + bottleneck
    assert 37e6 < counted < 38e6
    assert abs(counted * 4 / 2**20 - 142.7) < 1  # the paper's megabytes are 2^20 bytes
