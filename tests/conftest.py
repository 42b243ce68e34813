"""Shared fixtures: small models with lively latents, and real photographs."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from browser import browser_path
from PIL import Image

from entroformer_lib.datasets import SAMPLES, sample_picture
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.files import data_folder
from entroformer_lib.models.config import named_config
from entroformer_lib.studies import results
from entroformer_lib.weights.zoo import save_weights

collect_ignore = [] if browser_path() else ["test_browser.py", "test_live_page.py"]

FIRST = ("browser", "notebooks", "training", "shards", "packing", "engine", "cluster", "ablation", "measuring", "cli")
MICRO = dict(N=16, M=24, Z=12, dim=24, heads=2, top_k=6, hyper_top_k=(6, 6, 6), context_layers=2)
VARIANTS = ("serial", "parallel", "hyperprior", "context", "cnn", "minnen", "groupedmixer")
LMBDAS = (0.01, 0.04, 0.16)


def pytest_report_header() -> str:
    return "no Chromium, so what happens in a browser is not tested" if collect_ignore else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, or one would still run when all else is done; and those that start processes lie side by
    side, so that one server (`warm.py`) serves most of them."""
    places = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def micro_model(
    variant: str = "parallel",
    preset: str = "paper",
    seed: int = 0,
    name: str = "",
    card: dict | None = None,
    **overrides,
) -> Entroformer:
    """An untrained model of a few thousand weights whose latents, means and scales vary as in a trained one."""
    torch.manual_seed(seed)
    config = named_config(f"tiny-{variant}", preset, **{**MICRO, **overrides})
    model = Entroformer(config, name=name, card=card).eval()
    with torch.no_grad():
        if model.config.linear_path == "none":
            model.g_a[-1].weight.mul_(40)
        for key, parameter in model.named_parameters():
            if key.startswith(("h_s", "context_model", "entropy_parameters")) and parameter.dim() > 1:
                parameter.mul_(2)
    return model


def aware_model(variant: str = "parallel", **overrides) -> Entroformer:
    """A micro model of variable rate whose entropy model is told the rate, and lively in what it makes of that."""
    model = micro_model(variant, lmbdas=LMBDAS, rate_aware=True, **overrides)
    torch.nn.init.normal_(model.rate_knowledge.vectors)
    torch.nn.init.normal_(model.rate_knowledge.z_log_gain, std=0.2)
    return model


@pytest.fixture(params=VARIANTS)
def any_variant(request) -> Entroformer:
    return micro_model(request.param)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> str:
    """Weights that give frozen transforms."""
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    save_weights(micro_model("parallel"), path, {"lmbda": 0.02})
    return str(path)


def pictures_folder(part: str) -> Path | None:
    """`kodak` or `train` under ENTROFORMER_DATA, or None."""
    folder = Path(os.environ.get("ENTROFORMER_DATA", "/nowhere")).resolve() / part
    return folder if folder.is_dir() else None


@pytest.fixture
def results_folder(tmp_path, monkeypatch) -> Path:
    """An empty folder that is read instead of data/results; published numbers stay."""
    (tmp_path / "data" / "results").mkdir(parents=True)
    shutil.copytree(data_folder() / "reference", tmp_path / "data" / "reference")
    monkeypatch.setattr(results, "data_folder", lambda: tmp_path / "data")
    return tmp_path / "data" / "results"


@pytest.fixture
def warm_workers():
    """dask's processes begin with the library imported."""
    warm.ensure_server()  # before dask would start another


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    return sample_picture("astronaut").crop((100, 0, 292, 128))


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    """A few real photographs of 128 to 300 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for name in SAMPLES:
        picture = sample_picture(name)
        picture.resize((picture.width // 2, picture.height // 2)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def flat_picture() -> Image.Image:
    """A drawing: flat areas, which give many equal attention scores, beside a photograph."""
    pixels = np.full((128, 192, 3), (90, 150, 220), dtype=np.uint8)
    pixels[64:] = (30, 120, 40)
    pixels[20:60, 30:80] = 255
    pixels[80:128, 128:] = np.asarray(sample_picture("coffee"))[100:148, 100:164]
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def _calm_torch():
    torch.manual_seed(0)
    yield


def small_disk(work):
    """The kernel refuses to write beyond 64 bytes, as a full disk would."""
    resource = pytest.importorskip("resource", reason="limits of processes are there on Unix alone")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
