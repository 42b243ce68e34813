"""The explorer's view model, widget and exported page, without a browser; see test_browser.py for one."""

import base64
import gzip
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import aware_model, micro_model
from PIL import Image

from entroformer_lib import cli
from entroformer_lib.codec import pictures
from entroformer_lib.errors import AttentionError
from entroformer_lib.explorer import page as page_module
from entroformer_lib.explorer.page import explorer_page, lattice, page_server, to_bytes
from entroformer_lib.explorer.widget import SCRIPT, Explorer, frame_of
from entroformer_lib.inspection.exploration import DENSE, MEAN, Exploration, rank_correlations
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.studies import attention as study
from entroformer_lib.views import attention_figures
from entroformer_lib.weights.zoo import save_weights

LIBRARY = Path(cli.__file__).parent
KINDS = ("serial", "parallel")


@pytest.fixture(scope="module", params=KINDS)
def server(request, photo):
    return RowServer(micro_model(request.param), photo)


@pytest.fixture
def view(server):
    return Exploration(server)


# ---- the view model ----


def test_view_model_knows_no_widget_and_no_network():
    heavy = {"torch", "compressai", "anywidget"}
    code = f"import sys, entroformer_lib.inspection.exploration; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=LIBRARY.parent)
    assert done.stdout.strip() == "set()"


def test_selection_is_clipped_and_counted(view):
    assert (view.layer, view.head, view.k, view.row, view.column) == (1, MEAN, 6, 4, 6)
    view.layer, view.head, view.k, view.row, view.column = 99, -7, 10**6, -3, 99
    assert (view.layer, view.head, view.k, view.row, view.column) == (1, MEAN, view.servers[0].n, 0, 11)
    before = view.revision
    view.update(row=5, column=5, layer=0, nonsense=3)
    assert view.revision == before + 1 and view.site == 65
    view.update(row=5, column=5)
    assert view.revision == before + 1
    view.mode = "heads"
    assert view.revision == before + 2
    assert view.ks == [6, 8, 16, 32, 64, DENSE]


def test_panels_of_every_mode(view, server):
    view.update(row=4, column=6, layer=1, head=0)
    rows = server.rows(view.site, 6)[1]
    (panel,) = view.panels()
    assert np.array_equal(panel.values.ravel(), rows[0]) and (panel.selected.sum() == (rows[0] > 0).sum())
    assert panel.query == (4, 6) and panel.origin == ((4, 5) if server.kind == "serial" else (4, 6))
    assert np.array_equal(panel.decoded.ravel(), server.decoded(view.site))
    view.mode = "heads"
    maps = [p.values.ravel() for p in view.panels()]
    assert len(maps) == 3 and np.allclose(np.mean(maps[:2], 0), maps[2])
    view.mode = "ks"
    counts = [int((p.values > 0).sum()) for p in view.panels()]
    assert len(counts) == 6 and counts == sorted(counts) and not view.panels()[-1].selected.any()
    assert view.panels()[0].title == f"k = 6: {server.facts(view.site, 6)['bits']:.1f} bits"
    view.mode = "pair"
    left, right = view.panels()
    assert left.selected.any() and not right.selected.any()
    assert [fact["bits"] for fact in view.facts()] == [server.facts(view.site, k)["bits"] for k in (6, None)]
    assert view.facts()[0]["name"].endswith(", k = 6") and view.facts()[1]["name"].endswith(", dense")
    view.mode = "cost"
    attention, cost = view.panels()
    positions, bits = server.costs(view.site, 6)
    assert np.array_equal(cost.values.ravel()[positions], bits) and cost.kind == "cost"
    scatter = view.scatter()
    assert np.array_equal(scatter["attention"], rows[0][positions]) and -1 <= scatter["rho"] <= 1


def test_caption_says_the_selection(view, server):
    view.update(row=4, column=6)
    bits = server.facts(view.site, 6)
    assert view.caption().startswith("Latent row 4, column 6: ")
    assert "Layer 1, mean over heads, k = 6." in view.caption() and f"{bits['bits']:.1f} bits with" in view.caption()
    captions = {view.caption()}
    for change in (
        {"mode": "heads"},
        {"mode": "ks"},
        {"mode": "pair"},
        {"other_k": 8},
        {"mode": "cost"},
        {"k": 0},
        {"row": 0, "column": 0},
        {"layer": 0},
    ):
        view.update(**change)
        captions.add(view.caption())
    assert len(captions) == 9
    assert ("nothing is decoded yet" if server.kind == "serial" else "second pass") in view.caption()


def test_two_models_side_by_side(photo):
    one, other = (RowServer(micro_model(kind, heads=h), photo) for kind, h in (("serial", 2), ("parallel", 3)))
    view = Exploration(one, other, head=2)
    titles = [panel.title for panel in view.panels()]
    assert len(titles) == 2 and "head 1" in titles[0] and "head 2" in titles[1] and "untrained serial" in titles[0]
    assert [fact["name"] for fact in view.facts()] == ["untrained serial", "untrained parallel"]
    for server in (one, other):
        assert f"{server.name}: " in view.caption() and f"{server.facts(view.site, 6)['bits']:.1f}" in view.caption()
    counts = {"head": (1, 1), "heads": (3, 4), "ks": (6, 6), "pair": (2, 2), "cost": (2, 2)}
    for mode, expected in counts.items():
        view.mode = mode
        assert tuple([p.model for p in view.panels()].count(m) for m in (0, 1)) == expected
        frame, data = frame_of(view)
        assert len(data) == 5 * one.n * sum(expected) and len(frame["scatters"]) == 2 * (view.mode == "cost")
    assert [m["kind"] for m in Explorer(view).meta["models"]] == ["serial", "parallel"]
    with pytest.raises(AttentionError, match="same grid"):
        Exploration(one, RowServer(micro_model("serial"), photo.crop((0, 0, 64, 64))))


def test_rank_correlations():
    """Equal values share their mean rank; where one of both does not vary there is none."""
    scipy = pytest.importorskip("scipy.stats")
    rows, positions = np.random.default_rng(0).integers(0, 4, (2, 3, 9)).astype(float), np.array([0, 2, 3, 5, 7, 8])
    rows[1, 2] = 0.5
    bits = np.array([5.0, 1, 2, 2, 9, -1])
    found = rank_correlations(rows, positions, bits)
    maps = np.concatenate((rows, rows.mean(1, keepdims=True)), 1)[..., positions]
    for layer, head in np.ndindex(2, 4):
        if (layer, head) == (1, 2):
            assert np.isnan(found[layer, head])
        else:
            assert found[layer, head] == pytest.approx(scipy.spearmanr(maps[layer, head], bits).statistic)
    assert np.isnan(rank_correlations(rows, positions[:2], bits[:2])).all()


# ---- the widget ----


def test_widget_follows_the_view_and_forwards_clicks(view):
    widget = Explorer(view)
    assert widget.frame["caption"] == view.caption() and widget.meta["picture"].startswith("data:image/jpeg")
    before = widget.maps
    widget._handle_custom_msg({"row": 3, "column": 2}, [])  # as ipywidgets does with a message from the browser
    assert (view.row, view.column) == (3, 2) and widget.frame["caption"] == view.caption() and widget.maps != before
    view.mode = "heads"
    assert len(widget.maps) == 3 * 5 * view.servers[0].n and len(widget.frame["panels"]) == 3
    json.dumps(widget.frame)


def maps_of(frame, data) -> list[tuple[np.ndarray, np.ndarray]]:
    """Values and flags of each panel, as the script reads them."""
    sizes = [int(np.prod(panel["shape"])) for panel in frame["panels"]]
    assert len(data) == 5 * sum(sizes)
    values, flags = np.frombuffer(data, "<f4", sum(sizes)), np.frombuffer(data, "u1", sum(sizes), 4 * sum(sizes))
    ends = np.cumsum(sizes)[:-1]
    return list(zip(np.split(values, ends), np.split(flags, ends), strict=True))


def test_bytes_of_a_frame(view):
    for mode in view.modes:
        view.mode = mode
        for panel, (values, flags) in zip(view.panels(), maps_of(*frame_of(view)), strict=True):
            np.testing.assert_allclose(values, panel.values.ravel(), rtol=1e-6)
            assert np.array_equal(flags & 1, panel.decoded.ravel())
            assert np.array_equal(flags & 2, 2 * panel.selected.ravel())


# ---- the exported page ----


@pytest.fixture(scope="module")
def page(server):
    return explorer_page(server, "a <cat> & more")


def stored(page) -> tuple[dict, bytes]:
    meta = re.search(r'<script type="application/json" id="meta">(.*?)</script>', page.text, re.S)[1]
    data = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page.text, re.S)[1]
    return json.loads(meta.replace("<\\/", "</")), gzip.decompress(base64.b64decode(data))


def facts_in(meta, data, section) -> np.ndarray:
    """Lines of facts of a section: [queries, 2 + 5 groups]"""
    width = 2 + 5 * len(meta["group_channels"])
    queries = len(section["sites"]) * meta["slices"]
    return np.frombuffer(data, "<f4", queries * width, section["facts"]).reshape(queries, width)


def test_page_holds_the_rows(page, server):
    meta, data = stored(page)
    assert f"{server.n} latents x 2 layers x 2 heads" in page.in_words()
    for section in meta["sections"]:
        k, sites = section["k"] or None, section["sites"]
        maps = len(sites) * 4
        facts = facts_in(meta, data, section)
        counts = np.frombuffer(data, "<u2", maps, section["counts"]).astype(int)
        where = np.frombuffer(data, "<u2", counts.sum(), section["positions"])
        codes = np.zeros((maps, server.n), np.uint8)
        codes[np.repeat(np.arange(maps), counts), where] = np.frombuffer(data, "u1", counts.sum(), section["bytes"])
        codes = codes.reshape(len(sites), 2, 2, server.n)
        for i in (0, 1, 50):
            rows = server.rows(sites[i], k)
            assert np.array_equal(codes[i] > 0, rows > 0)
            assert np.abs((codes[i] / 255) ** 2 - rows).max() < 1 / 250
            expected = server.facts(sites[i], k)
            np.testing.assert_allclose(facts[i, :2], [expected["bits"], expected["alone"]], rtol=1e-5)


def test_page_asks_for_nothing(page):
    """Neither the script nor the page names an address, and the policy forbids requests."""
    outside = page.text.replace("http-equiv", "")
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|\bimport\(|src=\"(?!data:)|@import|url\(", outside)
    assert "of 96 latents also with k = 8, k = 16, k = 32, k = 64 and dense, and the measured costs" in page.text
    assert "default-src 'none'" in page.text and "</script" not in SCRIPT.read_text()
    assert "<title>What the entropy model looks at: a &lt;cat&gt; &amp; more</title>" in page.text


def test_byte_code_keeps_what_is_attended():
    probs = np.array([0, 1e-9, 0.25, 1.0])
    assert to_bytes(probs).tolist() == [0, 1, 128, 255]


def test_lattice_thins_out(server, monkeypatch):
    ks = Exploration(server).ks
    assert lattice(server, ks) == list(range(server.n))
    monkeypatch.setattr(page_module, "LARGEST_REST", 60_000)
    some = lattice(server, ks)
    assert 0 < len(some) < server.n / 3 and all(sum(divmod(site, server.width)) % 2 == 0 for site in some)
    thin = explorer_page(server)
    assert thin.holds.startswith(f"{server.n} latents ") and f"; of {len(some)} latents also" in thin.holds
    meta, _ = stored(thin)
    assert {len(s["sites"]) for s in meta["sections"] if s["k"] != 6} == {len(some)} == {len(meta["costs"]["sites"])}


def test_dense_model_gets_a_page(photo):
    page = explorer_page(RowServer(micro_model("parallel", top_k=None), photo))
    meta, _ = stored(page)
    assert meta["models"][0]["own_k"] == DENSE and meta["ks"] == [8, 16, 32, 64, DENSE]


def test_page_is_served_on_the_loopback_address():
    with page_server("<p>hello") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        address = f"http://127.0.0.1:{server.server_port}/"
        assert urllib.request.urlopen(address).read() == b"<p>hello"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address + "else")
        server.shutdown()


NODE_SCRIPT = """
import { PageSource } from "./explorer.mjs";
import { readFileSync } from "node:fs";
const { meta, data, selections } = JSON.parse(readFileSync(0, "utf8"));
const source = await PageSource.open(meta, data);
let told = null;
source.listen((...all) => { told = all; });
const frames = [];
for (const selection of selections) {
  source.send(selection);
  const [frame, values, flags] = told;
  frames.push([frame, Buffer.concat([Buffer.from(values.buffer), Buffer.from(flags.buffer)]).toString("base64")]);
}
console.log(JSON.stringify(frames));
"""


def frames_of_page(page, selections, folder) -> list[tuple[dict, bytes]]:
    """What the page's script makes of its data, run in Node: a frame and its maps after each selection."""
    (folder / "explorer.mjs").write_text(SCRIPT.read_text())
    (folder / "run.mjs").write_text(NODE_SCRIPT)
    meta, _ = stored(page)
    data = re.search(r'id="data">(.*?)</script>', page.text, re.S)[1]
    question = json.dumps({"meta": meta, "data": data, "selections": selections})
    done = subprocess.run([NODE, folder / "run.mjs"], input=question, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(frame, base64.b64decode(maps)) for frame, maps in json.loads(done.stdout)]


def page_is_the_view_model(page, server, selections, folder) -> None:
    """After each selection the page says and shows what a view model in Python does; attention as stored, in bytes."""
    view = Exploration(server)
    for change, (frame, data) in zip(selections, frames_of_page(page, selections, folder), strict=True):
        if "by" in change:
            change = {"row": view.row + change["by"][0], "column": view.column + change["by"][1]}
        view.update(**change)
        expected, maps = frame_of(view)
        expected = json.loads(json.dumps(expected))
        assert frame["caption"] == expected["caption"] and frame["selection"] == view.selection()
        assert frame["panels"] == expected["panels"]
        for (values, flags), (known, marks) in zip(maps_of(frame, data), maps_of(expected, maps), strict=True):
            assert np.array_equal(flags, marks)  # decoded and selected
            np.testing.assert_allclose(values, known, atol=0.004 * np.sqrt(np.abs(known).max()))  # half a byte's step
        for facts, known in zip(frame["facts"], expected["facts"], strict=True):
            for part, known_part in zip([facts, *facts.pop("groups")], [known, *known.pop("groups")], strict=True):
                assert part.keys() == known_part.keys()
                for name, value in known_part.items():
                    assert part[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
        for scatter, known in zip(frame["scatters"], expected["scatters"], strict=True):
            assert scatter["rho"] == (None if known["rho"] is None else pytest.approx(known["rho"], abs=1e-6))
            assert scatter["bits"] == pytest.approx(known["bits"], rel=1e-5)


def says_and_shows_what_the_view_model_does(page, server, tmp_path):
    selections = [
        {"row": 4, "column": 6},
        {"row": 4, "column": 7, "head": 1},
        {"layer": 0},
        {"by": [0, -1]},
        {"by": [1, 0]},
        {"k": 0},
        {"row": 0, "column": server.width - 1},
        {"by": [-1, 0]},
        {"mode": "heads"},
        {"mode": "ks", "row": 2, "column": 2},
        {"mode": "pair", "other_k": 8},
        {"mode": "cost", "k": 6, "head": -1},
        {"head": 0},
        {"row": 0, "column": 0},
    ]
    page_is_the_view_model(page, server, selections, tmp_path)


NODE = shutil.which("node")
if NODE:  # not collected elsewhere
    test_page_says_and_shows_what_the_view_model_does = says_and_shows_what_the_view_model_does


# ---- the command ----


@pytest.fixture
def folder(tmp_path, monkeypatch, photo):
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path / "weights"))
    for variant in ("parallel", "hyperprior"):
        save_weights(micro_model(variant), tmp_path / "weights" / f"{variant}.safetensors", {})
    photo.crop((0, 0, 70, 64)).save(tmp_path / "small.png")
    return tmp_path


def explore(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["entroformer", "explore", *map(str, arguments)])
    return cli.main()


def test_explore_writes_a_page(folder, monkeypatch, capsys):
    assert explore(monkeypatch, folder / "small.png", "--model", "parallel", "-o", folder / "page.html") == 0
    assert "32 latents x 2 layers x 2 heads" in capsys.readouterr().out
    meta, _ = stored(type("Text", (), {"text": (folder / "page.html").read_text()}))
    assert (meta["height"], meta["width"], meta["models"][0]["name"]) == (4, 8, "parallel")


def test_explore_scales_a_photograph_down_and_says_what_it_takes(folder, monkeypatch, capsys):
    """Before any work; how long and how large a page will be is said from a few latents."""
    Image.new("RGB", (4000, 3000), "teal").save(folder / "camera.jpg")
    words = [folder / "camera.jpg", "--model", "parallel", "--side", "128", "-o", folder / "page.html"]
    assert explore(monkeypatch, *words) == 0
    scaled, effort = capsys.readouterr().err.splitlines()
    assert scaled.endswith("camera.jpg: 4000 x 3000 pixels are scaled to 128 x 96; --side takes more.")
    megabytes = float(re.fullmatch(r"64 latents: about \d+ seconds and ([\d.]+) MB", effort)[1])
    assert megabytes == pytest.approx((folder / "page.html").stat().st_size / 1e6, abs=0.2)
    assert pictures.within(Image.new("RGB", (20_000, 2)), 768).size == (768, 1)


def test_explore_takes_the_rate_that_the_entropy_model_is_told(folder, monkeypatch):
    save_weights(aware_model(), folder / "weights" / "aware.safetensors", {})
    bits = []
    for lmbda in ("0.01", "0.16"):
        page = folder / f"{lmbda}.html"
        assert explore(monkeypatch, folder / "small.png", "--model", f"aware@{lmbda}", "-o", page) == 0
        meta, data = stored(type("Text", (), {"text": page.read_text()}))
        assert meta["models"][0]["name"] == f"aware@{lmbda}"
        bits.append(facts_in(meta, data, meta["sections"][0])[:, 0].sum())
    assert bits[0] < bits[1]


def test_explore_serves(folder, monkeypatch, capsys):
    pages = []
    monkeypatch.setattr(page_module, "serve_page", pages.append)
    assert explore(monkeypatch, folder / "small.png", "--model", "parallel", "--serve") == 0
    assert "<!doctype html>" in pages[0] and not list(folder.glob("*.html"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["small.png", "--model", "hyperprior"], "hyperprior alone"),
        (["small.png", "--model", "parallel", "--layer", "7"], "layers 0 to 1"),
        (["small.png", "--model", "parallel", "--head", "2"], "heads 0 to 1"),
        (["none.png", "--model", "parallel"], "no picture"),
        (["small.png", "--model", "nosuch"], "no model 'nosuch'"),
        (["small.png", "--model", "parallel", "-o", "there.html"], "--force"),
        (["large.png", "--model", "parallel"], "too large for a page"),
    ],
)
def test_explore_bad_input(arguments, sentence, folder, monkeypatch, capsys, photo):
    (folder / "there.html").write_text("precious")
    photo.resize((512, 512)).save(folder / "large.png")
    monkeypatch.setattr(page_module, "LARGEST_OWN", 50_000)
    monkeypatch.chdir(folder)
    assert explore(monkeypatch, *arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("entroformer: ") and sentence in errors[0]
    assert [p.name for p in folder.glob("*.html")] == ["there.html"] and (
        folder / "there.html"
    ).read_text() == "precious"


def test_static_maps_are_the_panels(view):
    for mode in ("head", "heads", "ks"):
        view.mode = mode
        panels = view.panels()
        shown = [
            axis for axis in attention_figures.attention_maps(server_picture(view), panels).axes if axis.get_title()
        ]
        for axis, panel in zip(shown, panels, strict=True):
            assert axis.get_title() == f"{panel.title} (up to {panel.values.max():.0%})"
            painted = axis.images[2].get_array()[..., 3] > 0  # above the picture and the veil
            assert np.array_equal(painted, panel.values > 0)
            assert len(axis.collections[0].get_paths()) == panel.selected.sum()  # white frames


def test_static_figure_of_costs(view):
    view.mode = "cost"
    scatter = view.scatter()
    figure = attention_figures.attention_and_cost(server_picture(view), view.panels(), scatter)
    assert np.array_equal(
        figure.axes[2].collections[0].get_offsets(), np.stack((scatter["attention"], scatter["bits"]), 1)
    )
    assert figure.axes[2].get_title() == f"rank correlation {scatter['rho']:.2f}"


def test_figures_of_saved_studies_show_their_means():
    saved = study.read_results()["tiny-parallel"]
    explained = saved["explained"]
    left, right = attention_figures.attention_against_cost(explained, 16).axes
    own = explained[(explained["k"] == 16) & (explained["head"] == 1)].groupby("layer")["rho"].mean()
    assert any(np.allclose(line.get_ydata(), own) for line in right.lines if len(line.get_ydata()) == len(own))
    over_all = explained[explained["layer"] == -1].groupby("k", dropna=False)["rho"].mean()
    assert any(np.allclose(line.get_ydata(), over_all) for line in left.lines if len(line.get_ydata()) == len(over_all))
    assert [label.get_text() for label in left.get_xticklabels()] == ["8", "16", "32", "64", "dense"]


def server_picture(view):
    return view.servers[0].picture
