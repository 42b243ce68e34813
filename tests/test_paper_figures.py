"""The paper's figures and tables: the data drawn is that of the saved results; later results are drawn too."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from entroformer_lib.studies import bd
from entroformer_lib.studies.results import POSITION_NAMES
from entroformer_lib.views import paper, rate_figures
from entroformer_lib.views.rate_figures import OURS
from entroformer_lib.views.style import ONE_COLUMN, TWO_COLUMNS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    """What `drawn` drew, by name."""
    return {}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, figures) -> tuple[Path, dict[str, pd.DataFrame]]:
    folder, write = tmp_path_factory.mktemp("figures"), paper.style.write

    def keep(figure, out, name, endings) -> None:
        figures[name] = figure
        write(figure, out, name, endings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper.style, "write", keep)
        return folder, paper.regenerate(folder)


@pytest.fixture
def other_results(results_folder) -> Path:
    """A copy of the results, to change some."""
    shutil.copytree(ROOT / "data" / "results", results_folder, dirs_exist_ok=True)
    return results_folder


def test_committed_data_is_what_the_saved_results_give(drawn):
    folder, _ = drawn
    ours = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".csv", ".md")}
    committed = {name: (ROOT / "figures" / name) for name in ours}
    for name, path in committed.items():
        assert path.is_file() and path.read_text() == ours[name], f"{name} is not of these results: make figures"


def test_every_item_has_all_its_files(drawn):
    folder, data = drawn
    assert {"figure05_rate_distortion", "table2_latency", "table6_sizes"} <= set(data)
    for item in paper.ITEMS:
        assert re.fullmatch(r"(figure\d\d|table\d)_\w+|search_window", item.name)
        endings = {"png", "svg", "csv"} | ({"md"} if item.table else set())
        found = {path.suffix[1:] for path in folder.glob(f"{item.name}.*")}
        assert found == (endings if item.name in data else set())
        assert f"{item.name}" in (folder / "README.md").read_text()  # drawn, or said not to be measured


@pytest.mark.parametrize("name, quality", [
    ("figure05_rate_distortion", "psnr_db"),
    ("figure11_psnr_kodak", "psnr_db"),
    ("figure12_ms_ssim_kodak", "ms_ssim_db"),
])  # fmt: skip
def test_curves_are_drawn_as_they_are(drawn, figures, name, quality):
    """Points of the curves, read back from the axes; every curve is named."""
    _, data = drawn
    lines = [line.get_xydata() for ax in figures[name].axes for line in ax.lines]
    names = {text.get_text() for text in figures[name].legends[0].get_texts()}
    for (codec, *_), part in data[name].groupby([c for c in ("codec", "optimised_for") if c in data[name]]):
        points = part[["bpp", quality]].to_numpy()
        assert any(len(line) == len(points) and np.allclose(line, points) for line in lines)
        assert codec.removesuffix(" (paper)").replace("-effort", ", effort ") in names


def test_rates_at_equal_quality_are_those_of_the_bd_rate(drawn, figures):
    """The mean of a curve of percent, in logarithms, is its BD-rate."""
    _, data = drawn
    curves, percent = data["figure11_psnr_kodak"], figures["figure11_psnr_kodak"].axes[1]
    name = curves["codec"][0]
    (line,) = [line for line in percent.lines if len(line.get_xdata()) == 60 and line.get_color() == OURS[name][0]]
    x, y = line.get_data()
    ours, theirs = (bd.curve_of(curves, codec) for codec in (name, paper.BPG))
    found = bd.compare(ours, theirs)
    assert [x[0], x[-1]] == pytest.approx([found.low, found.high])
    assert 100 * np.expm1(np.log1p(y / 100).mean()) == pytest.approx(found.rate_percent, abs=1)


def test_columns_have_the_widths_of_the_style_sheet(drawn, figures):
    _, data = drawn
    assert set(figures) == set(data)
    assert all(ONE_COLUMN <= figure.get_figwidth() <= TWO_COLUMNS for figure in figures.values())


def test_the_same_results_give_the_same_files(drawn, tmp_path, monkeypatch):
    """A curve and a table stand for all."""
    folder, _ = drawn
    again = [item for item in paper.ITEMS if item.name in ("figure05_rate_distortion", "table2_latency")]
    monkeypatch.setattr(paper, "ITEMS", again)
    paper.regenerate(tmp_path)
    files = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert len(files) == 7
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_published_numbers_stand_beside_ours(drawn):
    folder, data = drawn
    text = (folder / "README.md").read_text()
    sizes = data["table6_sizes"].set_index("model")
    assert sizes.loc["base-serial", "published_mb"] == 142.7
    assert sizes.loc["base-serial", "megabytes"] == pytest.approx(142.7, abs=0.1)
    (row,) = [line.split("|") for line in text.splitlines() if "142.7M of weights" in line]
    cells = [cell.strip() for cell in row[3:6]]
    assert cells == ["142.7M", "+0.1% (difference of 142.6 MiB, counted)", "**reproduced**"]


def test_every_figure_and_table_of_the_paper_is_spoken_of(drawn):
    folder, _ = drawn
    text = (folder / "README.md").read_text().lower()
    assert all(f"figure {n}" in text for n in range(1, 13)) and all(f"table {n}" in text for n in range(1, 7))


def made_up_ablation() -> list[dict]:
    rows = []
    for seed in (0, 1):
        noise = 0.001 * seed
        for context, position, bpp in [("cnn", "none", 0.6), *(("serial", p, 0.55) for p in list(POSITION_NAMES)[1:])]:
            rows.append({"grid": "table1", "context": context, "position": position, "seed": seed, "bpp": bpp + noise})
        for radius, position, bpp in (
            (1, "none", 0.6),
            (1, "diamond", 0.5),
            (3, "diamond", 0.4),
            (None, "diamond", 0.45),
        ):
            rows.append({"grid": "figure6", "radius": radius, "position": position, "seed": seed, "bpp": bpp + noise})
        for k in (8, 64, None):
            for step in (100, 200):
                rows.append({"grid": "figure7", "top_k": k, "step": step, "seed": seed, "bpp": 60 / step + noise})
        for kind, bpp in (
            ("hyperprior only", 0.4),
            ("hyperprior + unidirectional", 0.3),
            ("hyperprior + bidirectional", 0.27),
        ):
            rows.append({"grid": "table3", "context": kind, "seed": seed, "bpp": bpp + noise})
        for size in (300, 600, 900, 1200):
            for position, bpp in (("absolute", 0.5), ("diamond", 0.4)):
                rows.append({"grid": "table4", "size": size, "position": position, "seed": seed, "bpp": bpp})
    kinds = [[str(row[key]) for key in ("context", "position", "radius", "top_k") if key in row] for row in rows]
    return [{**row, "run": f"{'-'.join(kind)}-seed{row['seed']}"} for row, kind in zip(rows, kinds, strict=True)]


def test_results_that_come_later_are_drawn(other_results, tmp_path, monkeypatch):
    """Of the items, those with such results; the others are drawn above."""
    names = r"(figure(06|07|08|09|10)|table[134]|figure11_psnr)_"
    later = [item for item in paper.ITEMS if re.match(names, item.name)]
    monkeypatch.setattr(paper, "ITEMS", later)
    for path in other_results.glob("ablation*.json"):
        path.unlink()
    (other_results / "ablation-all.json").write_text(json.dumps({"rows": made_up_ablation()}))
    maps = [
        {"figure": n, "title": f"{n} {i}", "query": [1, 2], "probs": [[0.1, 0.2, 0.3, 0.4]] * 3}
        for n in (8, 9, 10)
        for i in range(3)
    ]
    (other_results / "attention_maps.json").write_text(json.dumps({"maps": maps}))
    rates = [{"lmbda": r, "image": "a", "bpp": r, "psnr_db": 30 + r, "ms_ssim": 0.9 + r / 20} for r in (0.2, 0.4, 0.8)]
    (other_results / "blocks-parallel-kodak.json").write_text(json.dumps({"images": rates, "variant": "parallel"}))
    drawn = paper.regenerate(tmp_path / "figures", ROOT / "notebooks")
    assert set(drawn) == {item.name for item in later}
    table1 = drawn["table1_position_encoding"].set_index("position")
    assert table1.loc["no positions", "saving_percent"] == pytest.approx(100 * (1 - 0.5505 / 0.6005))
    assert (table1["seeds"] == 2).all()
    assert drawn["figure06_clipping_distance"].groupby("radius")["bpp"].mean().idxmin() == 3
    curves = drawn["figure11_psnr_kodak"]
    assert list(curves[curves["codec"] == "blocks-parallel"]["bpp"]) == [0.2, 0.4, 0.8]


def test_what_is_not_measured_is_left_out_and_said(other_results, tmp_path):
    for path in other_results.iterdir():
        path.unlink()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "table2_latency.png").write_bytes(b"of results that are gone")
    assert paper.regenerate(tmp_path / "figures", ROOT / "notebooks") == {}
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["README.md"]
    assert (
        "table2_latency: latency of the entropy model. There is no latency.json among the saved results."
        in (tmp_path / "figures" / "README.md").read_text()
    )


@pytest.mark.parametrize(("times", "inside"), [(2.2, 120), (1.1, 10), (0.2, -80)])
def test_a_curve_far_from_its_base_is_in_the_panel(times, inside):
    base = pd.DataFrame({"codec": "base", "source": "a paper", "bpp": [0.1, 0.2, 0.4], "psnr_db": [28.0, 30.0, 32.0]})
    ours = base.assign(codec="ours", source=None, bpp=times * base["bpp"])
    curves = pd.concat([base, ours])
    ax = Figure().subplots()
    looks = rate_figures._looks(curves)
    rate_figures._percent(ax, curves, "psnr_db", looks, pd.Series({"base": "base", "ours": "base"}))
    low, high = ax.get_ylim()
    assert low < inside < high
