"""Weights files: transforms stored once and shared."""

import pytest
import torch
from conftest import LMBDAS, micro_model
from safetensors import safe_open

from entroformer_lib.errors import WeightsError
from entroformer_lib.training.latents import freeze
from entroformer_lib.weights import zoo
from entroformer_lib.weights.zoo import SHARED, list_models, load_model, reference_of, save_weights, weights_digest

TRANSFORMS = dict(transforms="blocks", stages=((8, 10, 1),), linear_path="dct", lmbdas=LMBDAS)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A parallel model, and a serial one behind its transforms, in the folder of weights."""
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    first = micro_model("parallel", **TRANSFORMS)
    second = freeze(micro_model("serial", seed=1, **TRANSFORMS), first)
    save_weights(first, tmp_path / "first.safetensors", {}, half=True)
    save_weights(second, tmp_path / "second.safetensors", {}, half=True, transforms="first")
    return tmp_path, second


def test_shared_transforms_are_stored_once(family):
    folder, second = family
    with safe_open(folder / "second.safetensors", framework="pt") as file:
        assert not any(name.startswith(SHARED) for name in file.keys())  # noqa: SIM118
    loaded, alone = load_model("second", "cpu"), folder / "alone.safetensors"
    save_weights(second, alone, {}, half=True)
    assert weights_digest(loaded) == weights_digest(load_model(alone, "cpu"))
    assert loaded.config == second.config
    assert {row["name"].partition("@")[0] for row in list_models()} >= {"first", "second", "alone"}


def test_missing_or_other_transforms_are_named(family):
    folder, second = family
    save_weights(micro_model("parallel", seed=2, **TRANSFORMS), folder / "first.safetensors", {}, half=True)
    with pytest.raises(WeightsError, match=r"second.safetensors belongs to other transforms than those that .*first"):
        load_model("second", "cpu")
    with pytest.raises(WeightsError, match="other transforms than first"):
        save_weights(second, folder / "third.safetensors", {}, half=True, transforms="first")
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
        save_weights(behind, folder / f"{name}.safetensors", {}, half=True, transforms="first" if name == "b" else None)
    save_weights(micro_model("hyperprior", seed=5, **TRANSFORMS), folder / "other.safetensors", {}, half=True)
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
