"""Weights files: transforms stored once and shared; numbers in half precision, in eight bits, as differences."""

import pytest
import torch
from conftest import LMBDAS, micro_model
from safetensors import safe_open

from entroformer_lib.errors import WeightsError
from entroformer_lib.training.latents import freeze
from entroformer_lib.weights import zoo
from entroformer_lib.weights.forms import restored, shortened
from entroformer_lib.weights.zoo import (
    SHARED,
    list_models,
    load_model,
    read_weights,
    reference_of,
    save_card,
    save_transforms,
    save_weights,
    weights_digest,
)

TRANSFORMS = dict(transforms="blocks", stages=((8, 10, 1),), linear_path="dct", lmbdas=LMBDAS)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A parallel model, and a serial one behind its transforms, in the folder of weights."""
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    first = micro_model("parallel", **TRANSFORMS)
    second = freeze(micro_model("serial", seed=1, **TRANSFORMS), first)
    save_weights(first, tmp_path / "first.safetensors", {}, form="float16")
    save_weights(second, tmp_path / "second.safetensors", {}, form="float16", transforms="first")
    return tmp_path, second


def test_shared_transforms_are_stored_once(family):
    folder, second = family
    with safe_open(folder / "second.safetensors", framework="pt") as file:
        assert not any(name.startswith(SHARED) for name in file.keys())  # noqa: SIM118
    loaded, alone = load_model("second", "cpu"), folder / "alone.safetensors"
    save_weights(second, alone, {}, form="float16")
    assert weights_digest(loaded) == weights_digest(load_model(alone, "cpu"))
    assert loaded.config == second.config
    assert {row["name"].partition("@")[0] for row in list_models()} >= {"first", "second", "alone"}


def test_transforms_are_found_one_folder_higher(family):
    folder, second = family
    save_transforms(second, folder / "shared" / "common.safetensors")
    save_weights(second, folder / "inner" / "third.safetensors", {}, form="float16", transforms="common")
    loaded = load_model(folder / "inner" / "third.safetensors", "cpu")
    assert weights_digest(loaded) == weights_digest(load_model("second", "cpu"))


def test_missing_or_other_transforms_are_named(family):
    folder, second = family
    save_weights(micro_model("parallel", seed=2, **TRANSFORMS), folder / "first.safetensors", {}, form="float16")
    with pytest.raises(WeightsError, match=r"second.safetensors belongs to other transforms than those that .*first"):
        load_model("second", "cpu")
    with pytest.raises(WeightsError, match="other transforms than first"):
        save_weights(second, folder / "third.safetensors", {}, form="float16", transforms="first")
    assert not (folder / "third.safetensors").exists()
    (folder / "first.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"first.safetensors, which is not there"):
        load_model("second", "cpu")


def test_a_file_that_points_to_itself_is_refused(family):
    folder, second = family
    (folder / "first.safetensors").write_bytes((folder / "second.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="other transforms"):
        load_model("first", "cpu")


def test_values_are_those_that_were_saved(family):
    folder, second = family
    loaded = load_model("second", "cpu").state_dict()
    for name, tensor in second.state_dict().items():
        if name.startswith(SHARED):
            torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_reference_has_the_same_transforms_and_no_context(family, monkeypatch):
    folder, model = family
    first, loaded = load_model("first", "cpu"), load_model("second", "cpu")
    assert reference_of(loaded) is None
    for name, variant, seed in (("b", "hyperprior", 3), ("a", "hyperprior-cnn", 4)):
        behind = freeze(micro_model(variant, seed=seed, **TRANSFORMS), first)
        save_weights(
            behind, folder / f"{name}.safetensors", {}, form="float16", transforms="first" if name == "b" else None
        )
    save_weights(micro_model("hyperprior", seed=5, **TRANSFORMS), folder / "other.safetensors", {}, form="float16")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    read = []
    monkeypatch.setattr(
        zoo, "read_weights", lambda path, whole=zoo.read_weights: (read.append(path.stem), whole(path))[1]
    )
    loaded.level = 0.25
    reference = reference_of(loaded)
    assert read == ["b"] and (reference.name, reference.level) == ("b", 0.25)  # its hyperprior is of the same kind
    (folder / "b.safetensors").unlink()
    assert reference_of(loaded).name == "a"
    alone = freeze(micro_model("context", **TRANSFORMS), first)
    assert reference_of(alone) is None  # without hyperprior it does not differ by its context alone
    with torch.no_grad():
        loaded.gain.log_gain += 0.1
    assert reference_of(loaded) is None


def test_transforms_alone_lie_in_a_folder_of_their_own(family):
    folder, second = family
    save_transforms(load_model("first", "cpu"), folder / "shared" / "both.safetensors")
    (folder / "first.safetensors").unlink()
    save_weights(second, folder / "second.safetensors", {}, form="int8", transforms="both")
    loaded = load_model("second", "cpu").state_dict()
    held = read_weights(folder / "shared" / "both.safetensors")[0]
    assert set(held) == {name for name in loaded if name.startswith(SHARED)}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in held.items())
    assert {row["name"].partition("@")[0] for row in list_models()} >= {"second"}  # and no warning of `both`
    with pytest.raises(WeightsError, match="no model 'both'"):
        load_model("both", "cpu")


@pytest.mark.parametrize("near", [None, "first"])
def test_eight_bits_are_close_and_stay_when_saved_again(family, near):
    folder, _ = family
    model = load_model("first", "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.abs().mean() * torch.randn(parameter.shape)
    path = folder / "finetuned.safetensors"
    save_weights(model, path, {"a": 1}, form="int8", near=near)
    once = read_weights(path)[0]
    for name, tensor in model.state_dict().items():
        if name.endswith("weight") and tensor.dim() >= 2:
            rows, error = tensor.flatten(1), (once[name] - tensor).flatten(1)
            if near is not None and name.startswith(("g_a.", "g_s.")):  # steps fit the difference
                rows = rows - load_model("first", "cpu").state_dict()[name].flatten(1)
            assert (error.abs().amax(1) <= 0.5 * rows.abs().amax(1)).all()
            assert error.norm() < 0.02 * rows.norm()
        elif tensor.is_floating_point() and "quantiles" not in name:  # they are found anew for the tables
            assert torch.equal(once[name], tensor)
    save_card(path, {"a": 2})
    again, card = read_weights(path)
    assert card == {"a": 2} and all(torch.equal(again[name], tensor) for name, tensor in once.items())
    if near is None:
        save_weights(load_model(path, "cpu"), path, {}, form="int8")
        again = read_weights(path)[0]
        assert all(torch.equal(again[name], tensor) for name, tensor in once.items())


def test_differences_need_the_weights_they_are_from(family):
    folder, _ = family
    path = folder / "finetuned.safetensors"
    save_weights(load_model("first", "cpu"), path, {}, form="int8", near="first")
    save_weights(micro_model("parallel", seed=2, **TRANSFORMS), folder / "first.safetensors", {}, form="float16")
    with pytest.raises(WeightsError, match="belongs to other transforms"):
        load_model(path, "cpu")
    (folder / "first.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match="no transforms of its own"):
        load_model(path, "cpu")


def test_retired_weights_name_the_revision_that_has_them():
    for name, revision in zoo.RETIRED.items():
        with pytest.raises(WeightsError, match=rf"'{name}' are no longer .* revision {revision} reads"):
            load_model(name, "cpu")


def test_damaged_forms_are_named():
    weight = {"layer.weight": torch.randn(4, 6), "layer.bias": torch.randn(4)}
    held = shortened(weight, "int8")
    assert held["layer.weight:int8"].dtype == torch.int8 and torch.equal(held["layer.bias"], weight["layer.bias"])
    assert torch.equal(restored(shortened({"w.weight": torch.zeros(2, 3)}, "int8"))["w.weight"], torch.zeros(2, 3))
    for change in (
        {"layer.weight:step": torch.ones(3)},
        {"layer.weight:int8": torch.ones(4, 6)},
        {"other.weight:int8": torch.ones(4, 6, dtype=torch.int8)},
        {"other.weight:int4": torch.ones(4, 6, dtype=torch.int8), "other.weight:step": torch.ones(4)},
    ):
        with pytest.raises(WeightsError, match="damaged"):
            restored(held | change)
    with pytest.raises(WeightsError, match="not there"):
        restored(shortened(weight, "int8", near=weight))
