"""Building the live page; test_live_page.py opens it."""

import sys

import pytest
import torch
from conftest import micro_model

from entroformer_lib import cli
from entroformer_lib.errors import AttentionError, UserError
from entroformer_lib.explorer import live
from entroformer_lib.explorer.live_graphs import live_graphs
from entroformer_lib.weights.zoo import save_weights


@pytest.mark.parametrize("kind", ["serial", "hyperprior", "context", "groupedmixer"])
def test_other_kinds_are_refused_in_a_sentence(kind):
    with pytest.raises(AttentionError, match="parallel model with a hyperprior"):
        live_graphs(micro_model(kind))


def test_a_reference_behind_other_transforms_is_refused():
    other = micro_model("hyperprior")
    with torch.no_grad():
        other.g_a[0].weight.add_(0.1)
    for reference in (other, micro_model("serial")):
        with pytest.raises(AttentionError, match="reference must"):
            live_graphs(micro_model("parallel"), reference)


def test_a_damaged_runtime_is_noticed(tmp_path, monkeypatch):
    for path in live.VENDOR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(live, "VENDOR", tmp_path)
    assert set(live.runtime()) == {"runtime", "wasm"}
    with open(tmp_path / live.RUNTIME["runtime"], "r+b") as file:
        file.seek(100)
        file.write(b"\0\0\0")
    with pytest.raises(UserError, match="missing or damaged"):
        live.runtime()


def test_the_command(tmp_path, monkeypatch, capsys):
    save_weights(micro_model("parallel", hyper="cnn"), tmp_path / "micro.safetensors", {})
    words = ["entroformer", "explore", "--model", str(tmp_path / "micro.safetensors")]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 1
    assert "there is --live" in capsys.readouterr().err
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", [*words, "--live", "-o", str(page)])
    assert cli.main() == 0
    assert "with the model inside" in capsys.readouterr().out
    assert "Model micro runs" in page.read_text("utf-8")


def test_the_default_model_fits_into_a_page(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["entroformer", "explore", "--live", "-o", str(page)])
    assert cli.main() == 0
    text = page.read_text("utf-8")
    assert "Model blocks-parallel" in text and "blocks-hyperprior" in text  # and what context saves is a real saving
