"""ONNX graphs say what torch says, at sizes other than those they were traced with."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import LMBDAS, aware_model, micro_model
from torch.nn.functional import interpolate

from entroformer_lib import cli, onnx_export
from entroformer_lib.entroformer import build_model
from entroformer_lib.errors import ConfigError, UserError
from entroformer_lib.weights.zoo import save_weights

MODELS = {
    "parallel": lambda: micro_model("parallel"),
    "serial": lambda: micro_model("serial", "official", lmbdas=LMBDAS, hyper="cnn"),
    "hyperprior": lambda: micro_model("hyperprior", hyper="cnn"),
    "context": lambda: aware_model("context", position="absolute"),
    "blocks": lambda: aware_model(
        "parallel", transforms="blocks", stages=((8, 16, 1),), linear_path="dct", position="relative_1d", top_k=None
    ),
}
CLOSE = 1e-4  # of the largest number of an output


def runner(graphs, level):
    """Calls a graph by its name with named arrays; those it does not take are left out."""
    sessions = {name: onnxruntime.InferenceSession(data) for name, data in graphs.items()}

    def run(name, **inputs):
        session = sessions[name]
        inputs |= {"level": np.array([level], np.float32)}
        inputs = {i.name: inputs[i.name] for i in session.get_inputs()}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {k: np.asarray(v) for k, v in inputs.items()}), strict=True))

    return run


def agree(found, expected):
    assert np.abs(found - expected.numpy()).max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_graphs_agree_with_torch(kind):
    model = MODELS[kind]()
    graphs, level = onnx_export.export(model), None if model.gain is None else 0.7
    run, rate = runner(graphs, level), model.rate(level)
    assert set(graphs) == {"analysis", "context", "synthesis"} | ({"hyper_synthesis"} if model.h_a else set())
    for height, width in ((64, 64), (192, 320)):
        x = interpolate(torch.rand(1, 3, height // 16, width // 16), (height, width), mode="bicubic")
        y, hyper = model.scaled(model.g_a(x), level), None
        found = run("analysis", x=x)
        agree(found["y"], y)
        if model.h_a is not None:
            z = model.hyper_analysis(y, rate)
            agree(found["z"], z)
            medians = torch.tensor(onnx_export.facts(model)["medians"])[:, None, None]
            z_hat = torch.floor(z - medians + 0.5) + medians
            assert torch.allclose(z_hat, model.z_prior.quantize_z(z))
            hyper = model.hyper_synthesis(z_hat, rate)
            agree(run("hyper_synthesis", z_hat=z_hat)["hyper"], hyper)
        y_hat = torch.floor(y + 0.5)
        found = run("context", y_hat=y_hat, hyper=hyper)
        for name, expected in zip(("means", "scales"), model.distributions(y_hat, hyper, rate=rate), strict=True):
            agree(found[name], expected)
        agree(run("synthesis", y_hat=y_hat)["x_hat"], model.g_s(y_hat * model.gains(level)[1]))


def test_exporting_leaves_the_model_as_it_was():
    model = micro_model("context")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    onnx_export.export(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_half_precision_is_taken_only_where_nothing_is_lost(tmp_path):
    model = micro_model("context")
    data = onnx_export.export(model)["context"]
    assert onnx_export.halved(data) == data
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    data = onnx_export.export(model)["context"]
    half = onnx_export.halved(data)
    assert len(half) < 0.8 * len(data)
    y_hat = torch.randn(1, model.config.M, 4, 8).round()
    full, less = (runner({"context": d}, None)("context", y_hat=y_hat) for d in (data, half))
    assert all((full[name] == less[name]).all() for name in full)


@pytest.mark.parametrize("name, word", [("tiny-cnn", "CNN"), ("tiny-groupedmixer", "GroupedMixer")])
def test_other_contexts_are_refused_in_a_sentence(name, word):
    with pytest.raises(ConfigError, match=word):
        onnx_export.export(build_model(name))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx"):
        onnx_export.export(micro_model("context"))


def test_the_command_writes_whole_folders(tmp_path, monkeypatch, capsys):
    save_weights(micro_model("context"), tmp_path / "micro.safetensors", {})
    folder = tmp_path / "graphs"
    monkeypatch.setattr(sys, "argv", ["entroformer", "export-onnx", str(tmp_path / "micro.safetensors"), str(folder)])
    assert cli.main() == 0
    names = {"analysis.onnx", "context.onnx", "synthesis.onnx", "model.json"}
    assert {path.name for path in folder.iterdir()} == names
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert cli.main() == 1
    assert "--force replaces it" in capsys.readouterr().err
    (folder / "hyper_synthesis.onnx").write_bytes(b"of another model")
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--force"])
    assert cli.main() == 0
    assert {path.name for path in folder.iterdir()} == {*names, "notes.txt"}
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / "micro.safetensors")])
    assert cli.main() == 1
    assert "is a file" in capsys.readouterr().err
