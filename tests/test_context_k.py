"""Another k for one picture: chosen by its bits, said in the file, and nothing else changed by it."""

from dataclasses import replace

import pytest
import torch
from conftest import aware_model, micro_model
from test_cli import call

from entroformer_lib.codec import codec
from entroformer_lib.codec.container import Container
from entroformer_lib.errors import BitstreamError, ConfigError
from entroformer_lib.weights.zoo import weights_digest

KS = (2, 5, 0)


@pytest.mark.parametrize("variant", ["serial", "parallel", "context"])
def test_the_file_says_its_k_and_the_model_keeps_its_own(variant, flat_picture):
    model = micro_model(variant, top_k=4)
    for k, said in ((2, 2), (0, 0), (4, None)):
        data = codec.encode(model, flat_picture, ks=(k,))
        assert Container.unpack(data).k == said and model.context_k == 4
        model.context_k = 3  # whatever the model at hand has, the file decides
        codec.decode(data, model)  # other latents than the encoder's would raise
        assert model.context_k == 3
        assert Container.unpack(codec.encode(model, flat_picture)).k == 3
        model.context_k = 4


@pytest.mark.parametrize("make", [micro_model, aware_model])
def test_the_k_with_the_fewest_bits_is_taken(make, flat_picture):
    model = make("serial", top_k=4)
    level = codec.level_of_file(model)
    taken = set()
    for seed in range(6):
        y = torch.randn(1, model.config.M, 8, 8, generator=torch.Generator().manual_seed(seed)).mul(3).round()
        z, bits = model.hyper_analysis(y, model.rate(level)), {}
        for k in KS:
            model.context_k = k or None
            bits[k] = float(model.estimated_bits(y, level)["y"].sum())
        model.context_k = 4
        taken.add(model.best_k(y, z, KS, level))
        assert model.best_k(y, z, KS, level) == min(bits, key=bits.get) and model.context_k == 4
    assert len(taken) > 1
    data = codec.encode(model, flat_picture, ks=KS)
    y_hat, z = model.latents(codec.to_tensor(codec.to_rgb(flat_picture)[0], model), level)
    assert Container.unpack(data).k == model.best_k(y_hat, z, KS, level)


def test_another_k_is_an_error_and_no_picture(flat_picture):
    model = micro_model("parallel", top_k=4)
    container = Container.unpack(codec.encode(model, flat_picture, ks=(2,)))
    for k in (None, 3, 0):
        with pytest.raises(BitstreamError):
            codec.decode(replace(container, k=k).pack(), model)
    with pytest.raises(BitstreamError, match="no sense"):
        Container.unpack(replace(container, k=2**16 + 1).pack())


def test_weights_are_the_same_with_any_k():
    model = micro_model("serial", top_k=4)
    digest = weights_digest(model)
    model.context_k = None
    assert weights_digest(model) == digest and all(
        block.attention.top_k is None for block in model.context_model.stack.blocks
    )


@pytest.mark.parametrize("variant", ["groupedmixer", "cnn", "hyperprior"])
def test_models_without_a_k_refuse_one(variant, flat_picture):
    model = micro_model(variant)
    assert model.context_k is None
    container = Container.unpack(codec.encode(model, flat_picture))
    with pytest.raises(BitstreamError, match="number k of keys"):
        codec.decode(replace(container, k=2).pack(), model)
    with pytest.raises(ConfigError, match="serial and parallel"):
        codec.encode(model, flat_picture, ks=(2,))


def test_the_command_line_takes_several(flat_picture, tmp_path):
    flat_picture.save(tmp_path / "a.png")
    call("compress", tmp_path / "a.png", "--model", "blocks-parallel@0.013", "--k", 2, 3)
    assert '"k": ' in call("info", tmp_path / "a.ef", "--json")[0]
    call("decompress", tmp_path / "a.ef", "-o", tmp_path / "b.png")
    for words in (["--k", 70000], ["--k", 8, "--model", "blocks-groupedmixer@0.013"]):
        said = call("compress", tmp_path / "a.png", "-o", tmp_path / "c.ef", *words, expect=1)[1]
        assert "k" in said and said.count("\n") == 1 and not (tmp_path / "c.ef").exists()
