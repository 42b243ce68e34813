"""The table of latents: what the servers say, a row for each, whole files or none."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import LMBDAS, micro_model

from entroformer_lib import cli
from entroformer_lib.errors import StudyError
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.studies import attention, latent_table
from entroformer_lib.weights.zoo import save_weights


def test_rows_are_what_the_server_says(photo):
    server = server_of(micro_model("parallel"), photo)
    table = latent_table.latent_table(server)
    assert len(table) == server.n and (table["slice"] == 0).all() and (table["step"] == server.when).all()
    bits = server.bits(6)
    np.testing.assert_allclose(table["bits"], bits["context"].ravel())
    np.testing.assert_allclose(table["saved"], (bits["alone"] - bits["context"]).ravel(), atol=1e-9)
    site, probs = 50, server.rows(50, 6)  # [layers, heads, n]
    distance = attention.distances(server, [site])[0]
    row = table.loc[site]
    assert (row["row"], row["column"]) == divmod(site, server.width)
    for layer in (0, 1):
        assert row[f"layer{layer}_distance_sites"] == pytest.approx((probs[layer] * distance).sum(-1).mean())
        inside = probs[layer][:, distance <= server.radius].sum(-1).mean()
        assert row[f"layer{layer}_share_diamond"] == pytest.approx(inside)
        seen = probs[layer][probs[layer] > 0]
        assert row[f"layer{layer}_entropy_bits"] == pytest.approx(-(seen * np.log2(seen)).sum() / server.heads)
    without = table[[name for name in table if name.startswith("layer")]].isna().all(axis=1)
    assert np.array_equal(without, server.when == 0)  # no attention predicts them


def test_a_groupedmixer_has_a_row_for_each_slice(photo):
    server = server_of(micro_model("groupedmixer", window=4), photo, micro_model("hyperprior"))
    table = latent_table.latent_table(server)
    assert len(table) == server.n * 3 and table["slice"].tolist()[:4] == [0, 1, 2, 0]
    facts = server.facts(server.query(50, 2))
    row = table.loc[server.query(50, 2)]
    assert row["bits"] == pytest.approx(facts["groups"][2]["bits"])
    assert row["saved"] == pytest.approx(facts["groups"][2]["alone"] - row["bits"])
    np.testing.assert_allclose(table.groupby(["row", "column"])["bits"].sum(), server.bits().ravel())


@pytest.fixture
def folder(tmp_path, monkeypatch, photo):
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path / "weights"))
    for variant in ("parallel", "hyperprior"):
        save_weights(micro_model(variant, lmbdas=LMBDAS), tmp_path / "weights" / f"{variant}.safetensors", {})
    (tmp_path / "photos").mkdir()
    photo.crop((0, 0, 128, 64)).save(tmp_path / "photos" / "wide.png")
    photo.crop((0, 0, 60, 60)).save(tmp_path / "photos" / "small.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    return tmp_path


def explore(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["entroformer", "explore", *map(str, arguments)])
    return cli.main()


def test_a_table_of_a_folder(folder, monkeypatch, capsys):
    out, words = folder / "latents.csv", ["--model", "parallel@0.02", "--side", "64"]
    assert explore(monkeypatch, folder / "photos", "--table", out, *words) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 2 and "broken.png is left out" in lines[0]
    assert lines[1].endswith("wide.png: 128 x 64 pixels are scaled to 64 x 32; --side takes more.")
    table = pd.read_csv(out)
    assert table.groupby("picture").size().to_dict() == {"small": 16, "wide": 16}  # padded to 64 x 64
    assert "32 rows of 2 pictures" in said.out and np.isfinite(table["saved"]).all()
    about = json.loads((folder / "latents.csv.json").read_text())
    assert about["alone"] == "hyperprior@0.02" and about["images"] == ["small", "wide"]
    assert about["provenance"]["model"] == "parallel" and about["provenance"]["weights_sha256"]
    assert explore(monkeypatch, folder / "photos", "--table", out, *words) == 1  # it exists
    assert "--force" in capsys.readouterr().err


def test_a_table_is_whole_or_not_there(folder, monkeypatch):
    seen = []

    def fails(server):
        if seen:
            raise StudyError("stop")
        seen.append(server)
        return pd.DataFrame({"bits": [1.0]})

    monkeypatch.setattr(latent_table, "latent_table", fails)
    assert explore(monkeypatch, folder / "photos", "--table", folder / "latents.csv", "--model", "parallel") == 1
    assert seen and sorted(path.name for path in folder.iterdir()) == ["photos", "weights"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["photos", "--table", "latents.xls"], "A table is a .csv or a .parquet file, and latents.xls is neither."),
        (["photos", "--table", "latents.parquet"], "Parquet files take pyarrow, which cannot be imported here"),
        (["photos", "--table", "latents.csv", "--serve"], "no page"),
        (["photos/broken.png", "--table", "latents.csv"], "no picture in photos/broken.png that can be read"),
        (["nowhere", "--table", "latents.csv"], "There is no folder nowhere"),
        (["photos", "--table", "latents.csv", "--model", "hyperprior"], "hyperprior alone"),
    ],
)
def test_bad_input(arguments, sentence, folder, monkeypatch, capsys):
    def no_engine(table, file):
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", no_engine)
    monkeypatch.chdir(folder)
    assert explore(monkeypatch, *arguments) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(folder.glob("latents*"))
