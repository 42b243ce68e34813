"""The model of what training costs: what it counts, and what the recipes say of it."""

import re
from pathlib import Path

import pytest
import torch
from conftest import MICRO, micro_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import TRIED, Training, extended, multiplications, simulated, watch
from entroformer_lib.models.config import named_config
from entroformer_lib.studies.results import load

RECIPES = Path(__file__).parents[1] / "recipes"
BLOCKS = dict(transforms="blocks", stages=((4, 16, 1), (8, 24, 2)), linear_path="dct")


@pytest.mark.parametrize("variant", ["serial", "parallel"])
@pytest.mark.parametrize(
    "fields", [{}, BLOCKS, dict(radius=2, dim=36, context_layers=3)], ids=["gdn", "blocks", "wide"]
)
def test_the_formula_counts_what_torch_counts(variant, fields):
    """But for p(z), which has less than a thousandth."""
    model = micro_model(variant, **fields).train()
    with FlopCounterMode(display=False) as counted:
        model(torch.rand(1, 3, 128, 192))
    assert sum(multiplications(model.config, 128, 192).values()) == pytest.approx(
        counted.get_total_flops() / 2, rel=1e-3
    )


def test_small_crops_tell_what_a_large_batch_does():
    training = Training(named_config("tiny-serial", **MICRO))
    work = extended([watch(training.step, 1, side) for side in TRIED], 3, 256)
    true = watch(training.step, 3, 256)
    assert work.multiplications == pytest.approx(true.multiplications, rel=0.01)
    assert work.bytes == pytest.approx(true.bytes, rel=0.02)
    assert work.kernels == pytest.approx(true.kernels, rel=0.05)


def test_more_gpus_take_less_time_and_more_of_it_together():
    work = extended([watch(Training(named_config("tiny-serial", **MICRO)).step, 1, side) for side in TRIED], 16, 384)
    one, eight = (simulated(work, gpus, 16 * gpus, 1000 // gpus, input_per_core=100.0) for gpus in (1, 8))
    assert one["exchanging_ms"] == 0 < eight["exchanging_ms"]
    assert eight["hours"] < one["hours"] and one["gpu_hours"] < eight["gpu_hours"]


def test_two_measured_sizes_were_predicted():
    predicted = {row["model"]: row for row in load("cost")["predictions"]}
    for model in ("tiny-serial", "study-serial"):
        assert abs(predicted[model]["predicted_s"] / predicted[model]["measured_s"] - 1) < 0.15


@pytest.mark.parametrize(
    ("recipe", "rows", "gpus"),
    [("paper.sh", "paper", 1), ("paper.sbatch", "paper", 8), ("fast.sh", "fast", 1), ("fast.sbatch", "fast", 16)],
)
def test_recipes_say_the_hours_of_the_result(recipe, rows, gpus):
    hours = {row["gpus"]: row["hours"] for row in load("cost")[f"{rows}_on_gpus"]}
    said = re.search(r"^# Time: (\S+) hours", (RECIPES / recipe).read_text(), re.M)
    assert said[1] == f"{hours[gpus]:.1f}"
