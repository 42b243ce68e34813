"""The explorer's answers, widget and exported page, without a browser; see test_browser.py for one."""

import base64
import gzip
import io
import json
import re
import sys
import threading
import urllib.request

import numpy as np
import pytest
import torch
from conftest import aware_model, micro_model
from matplotlib.colors import to_rgba
from PIL import Image

from benchmarks import overview
from entroformer_lib import cli
from entroformer_lib.codec import pictures
from entroformer_lib.errors import AttentionError
from entroformer_lib.explorer import page as page_module
from entroformer_lib.explorer.answers import Answers, packed
from entroformer_lib.explorer.page import explorer_page, lattice, page_server, to_bytes
from entroformer_lib.explorer.script import FOLDER, script
from entroformer_lib.explorer.widget import Explorer
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.inspection.panels import (
    DENSE,
    MEAN,
    attention_panel,
    cost_panel,
    every_head,
    offered_ks,
    rank_correlations,
    telling_layer,
)
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.models.attention import TopKAttention
from entroformer_lib.models.groupedmixer import WindowAttention
from entroformer_lib.studies import attention as study
from entroformer_lib.views import attention_figures
from entroformer_lib.weights.zoo import save_weights

KINDS = ("serial", "parallel")


@pytest.fixture(scope="module", params=KINDS)
def server(request, photo):
    return RowServer(micro_model(request.param), photo)


# ---- panels ----


def test_panels(server):
    site = 4 * server.width + 6
    rows = server.rows(site, 6)[1]
    panel = attention_panel(server, site, 1, 0)
    assert np.array_equal(panel.values.ravel(), rows[0]) and (panel.selected.sum() == (rows[0] > 0).sum())
    assert panel.query == (4, 6) and panel.origin == ((4, 5) if server.kind == "serial" else (4, 6))
    assert np.array_equal(panel.decoded.ravel(), server.decoded(site)) and panel.title == "layer 1, head 0, k = 6"
    maps = [p.values.ravel() for p in every_head(server, site, 1)]
    assert len(maps) == 3 and np.allclose(np.mean(maps[:2], 0), maps[2])
    several = [attention_panel(server, site, 1, 0, k) for k in offered_ks(server)]
    counts = [int((p.values > 0).sum()) for p in several]
    assert len(counts) == 6 and counts == sorted(counts) and not several[-1].selected.any()
    cost = cost_panel(server, site)
    positions, bits = server.costs(site, 6)
    assert np.array_equal(cost.values.ravel()[positions], bits) and cost.kind == "cost"


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


# ---- answers and widget ----


def test_answers_are_the_servers(server):
    site, answers = 4 * server.width + 6, Answers(server)
    rows = answers.answer("rows", 0, site, 6)
    np.testing.assert_allclose(rows["probs"].reshape(2, 2, -1), server.rows(site, 6), rtol=1e-6)
    assert rows["facts"] == server.facts(site, 6)
    overview = answers.answer("overview", 0)
    facts = [server.facts(i, 6) for i in (0, 1, site)]
    np.testing.assert_allclose(overview["bits"][[0, 1, site]], [f["bits"] for f in facts], rtol=1e-5)
    np.testing.assert_allclose(overview["alone"][[0, 1, site]], [f["alone"] for f in facts], rtol=1e-5)
    costs = answers.answer("costs", 0, site, DENSE)
    assert np.array_equal(costs["positions"], server.costs(site, None)[0])
    buffers = [b"those of another answer"]
    plain = packed(rows, buffers)
    json.dumps(plain)
    assert np.array_equal(np.frombuffer(buffers[plain["probs"]["array"]], plain["probs"]["dtype"]), rows["probs"])
    with pytest.raises(AttentionError, match="no question"):
        answers.answer("model", 0)


def test_a_calculation_leads_from_scores_to_bits(server):
    """Content and position make the score, the chosen scores the shares, and the shares' Gaussian the bits."""
    site, channel = 4 * server.width + 6, 3
    c = Answers(server).answer("calculation", 0, site, 6, None, 1, 1, channel)
    others = np.isfinite(c["content"]) & np.isfinite(c["position"])
    np.testing.assert_allclose((c["content"] + c["position"])[others], c["scores"][others], atol=1e-5)
    chosen = c["selected"].astype(bool)
    shares = np.exp(c["scores"][chosen] - c["scores"][chosen].max())
    np.testing.assert_allclose(shares / shares.sum(), c["probs"][chosen], rtol=1e-4)
    assert chosen.sum() == 6 and c["probs"][~chosen].sum() == 0
    assert c["bits"] == pytest.approx(float(server.predict([site], 6)[2][0, channel]))
    assert -np.log2(c["probabilities"][int(c["value"]) - c["first"]]) == pytest.approx(c["bits"], rel=1e-3)


def test_two_models_need_the_same_grid(photo, server):
    with pytest.raises(AttentionError, match="same grid"):
        Answers(server, RowServer(micro_model("serial"), photo.crop((0, 0, 64, 64))))


@pytest.mark.parametrize("kind", ["serial", "parallel", "groupedmixer"])
def test_the_explorer_begins_with_a_layer_that_prefers_something(photo, kind):
    """All keys of the last layer get the same attention there, as in layers that were added to a trained model."""
    model = micro_model(kind, context_layers=3)
    attention = [m for m in model.context_model.modules() if isinstance(m, TopKAttention | WindowAttention)]
    with torch.no_grad():
        for layer, strength in zip(attention, (1000, 1000, 0), strict=True):
            layer.qkv.weight[: layer.qkv.in_features] *= strength  # the queries
    server = server_of(model, photo)
    assert telling_layer(server) == 1
    assert Answers(server).meta()["models"][0]["layer"] == 1


def test_widget_answers_by_number(server, capsys):
    widget, sent = Explorer(server, row=3), []
    assert widget.selection == {"row": 3} and widget.meta["picture"].startswith("data:image/jpeg")
    widget.send = lambda content, buffers: sent.append((content, buffers))
    good = {"number": 7, "question": "rows", "values": [0, 54, 6]}
    no_latent = {**good, "number": 8, "values": [0, 10**6, 6]}
    unexpected = {**good, "number": 9, "values": [0]}
    asked = [good, no_latent, unexpected, {**good, "number": 10}]
    widget._handle_custom_msg({"asked": asked}, [])  # as ipywidgets does with a message from the browser
    ((content, buffers),) = sent
    answers = {row["number"]: row["answer"] for row in content["answered"]}
    for number in (7, 10):
        assert np.frombuffer(buffers[answers[number]["probs"]["array"]], "<f4").size == 4 * server.n
    assert "no latent" in answers[8]["error"]
    assert "nobody expected: TypeError" in answers[9]["error"]  # whatever goes wrong, the browser does not wait
    assert "Traceback" in capsys.readouterr().err


def test_a_widget_that_is_interrupted_says_so_to_all_who_wait(server, monkeypatch):
    widget, sent = Explorer(server), []
    widget.send = lambda content, buffers: sent.append(content)
    monkeypatch.setattr(widget.answers, "answer", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        widget._reply(widget, {"asked": [{"number": n, "question": "rows", "values": []} for n in (1, 2)]}, [])
    assert [row["answer"]["error"] for row in sent[0]["answered"]] == ["Python was interrupted."] * 2


def test_widget_selection(server):
    widget = Explorer(server, row=3)
    widget.select(layer=1)
    assert widget.selection == {"row": 3, "layer": 1}


def test_a_widget_that_is_shown_twice_has_two_still_pictures(server, monkeypatch):
    shown = []
    monkeypatch.setattr("entroformer_lib.explorer.widget.display", lambda still, display_id: shown.append(display_id))
    widget = Explorer(server)
    for _ in range(2):
        widget._repr_mimebundle_()
    assert len(shown) == 2 and len(set(shown)) == 1  # under one name, so both follow


@pytest.mark.parametrize("selection", [{}, {"row": -4, "column": 2, "head": -1, "k": 0}, {"layer": "x", "k": 7.5}])
def test_a_notebook_that_ran_without_a_browser_shows_the_first_view(server, monkeypatch, selection):
    shown = []
    monkeypatch.setattr("entroformer_lib.explorer.widget.display", lambda still, display_id: shown.append(still.data))
    Explorer(server, **selection)._repr_mimebundle_()
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', shown[0])[1])))
    assert picture.width > 300 and np.asarray(picture.convert("RGB")).std() > 10


def test_modules_are_short_and_make_one_script():
    for path in FOLDER.glob("*.js"):
        assert len(path.read_text().splitlines()) < 400, path.name
    for sources in ((), ("stored.js",)):
        assert not re.search(r"^import |^export (?!default)|</script", script(*sources), re.M)


# ---- the exported page ----


@pytest.fixture(scope="module")
def page(server):
    return explorer_page(server, "a <cat> & more")


def stored(page) -> tuple[dict, bytes]:
    meta = re.search(r'id="meta">(.*?)</script>', page.text, re.S)[1]
    data = re.search(r'id="data">(.*?)</script>', page.text, re.S)[1]
    return json.loads(meta.replace("<\\/", "</")), gzip.decompress(base64.b64decode(data))


def facts_in(meta, data, section) -> np.ndarray:
    """Lines of facts of a section: [queries, 2 + 5 groups]"""
    model = meta["models"][0]
    width = 2 + 5 * len(model["channel_groups"])
    queries = len(section["sites"]) * model["slices"]
    return np.frombuffer(data, "<f4", queries * width, section["facts"]).reshape(queries, width)


def test_page_holds_the_rows(page, server):
    meta, data = stored(page)
    assert f"{server.n} latents x 2 layers x 2 heads" in page.in_words()
    for section in meta["stored"]["sections"]:
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
    outside = re.sub(r"http-equiv|http://www.w3.org/\S+", "", page.text)  # names of XML, not addresses
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|\bimport\(|src=\"(?!data:)|@import|url\(", outside)
    assert "of 96 latents also with k = 8, k = 16, k = 32, k = 64 and dense, and the measured costs" in page.text
    assert "default-src 'none'" in page.text
    assert re.search(r"<title>What untrained \S+ looks at: a &lt;cat&gt; &amp; more</title>", page.text)


def test_byte_code_keeps_what_is_attended():
    probs = np.array([0, 1e-9, 0.25, 1.0])
    assert to_bytes(probs).tolist() == [0, 1, 128, 255]


def test_lattice_thins_out(server, monkeypatch):
    ks = offered_ks(server)
    assert lattice(server, ks) == list(range(server.n))
    monkeypatch.setattr(page_module, "LARGEST_REST", 60_000)
    some = lattice(server, ks)
    assert 0 < len(some) < server.n / 3 and all(sum(divmod(site, server.width)) % 2 == 0 for site in some)
    thin = explorer_page(server)
    assert thin.holds.startswith(f"{server.n} latents ") and f"; of {len(some)} latents also" in thin.holds
    meta, _ = stored(thin)
    held = [meta["stored"]["costs"], *(s for s in meta["stored"]["sections"] if s["k"] != 6)]
    assert {len(part["sites"]) for part in held} == {len(some)}


def test_dense_model_gets_a_page(photo):
    page = explorer_page(RowServer(micro_model("parallel", top_k=None), photo))
    meta, _ = stored(page)
    assert meta["models"][0]["own_k"] == DENSE and meta["models"][0]["ks"] == [8, 16, 32, 64, DENSE]


def test_page_is_served_on_the_loopback_address():
    with page_server("<p>hello") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        address = f"http://127.0.0.1:{server.server_port}/"
        assert urllib.request.urlopen(address).read() == b"<p>hello"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address + "else")
        server.shutdown()


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
        bits.append(facts_in(meta, data, meta["stored"]["sections"][0])[:, 0].sum())
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
        (["small.png", "--model", "parallel", "--live", "--layer", "0"], "stored answers"),
        (["dot.png", "--model", "parallel", "--live", "-o", "page.html"], "16 and more on each side"),
        (["small.png", "--model", "parallel", "-o", "there.html"], "--force"),
        (["large.png", "--model", "parallel"], "too large for a page"),
    ],
)
def test_explore_bad_input(arguments, sentence, folder, monkeypatch, capsys, photo):
    (folder / "there.html").write_text("precious")
    photo.resize((512, 512)).save(folder / "large.png")
    photo.resize((20, 10)).save(folder / "dot.png")
    monkeypatch.setattr(page_module, "LARGEST_OWN", 50_000)
    monkeypatch.chdir(folder)
    assert explore(monkeypatch, *arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("entroformer: ") and sentence in errors[0]
    assert [p.name for p in folder.glob("*.html")] == ["there.html"] and (
        folder / "there.html"
    ).read_text() == "precious"


def test_static_maps_are_the_panels(server):
    site = 4 * server.width + 6
    for panels in (every_head(server, site, 1), [attention_panel(server, site, 0, MEAN, k) for k in (6, DENSE)]):
        figure = attention_figures.attention_maps(server.picture, panels)
        shown = [axis for axis in figure.axes if axis.get_title()]
        for axis, panel in zip(shown, panels, strict=True):
            assert axis.get_title() == f"{panel.title} (up to {panel.values.max():.0%})"
            painted = axis.images[2].get_array()[..., 3] > 0  # above the picture and the veil
            assert np.array_equal(painted, panel.values > 0)
            assert len(axis.collections[0].get_paths()) == panel.selected.sum()  # white frames


def test_static_figure_of_costs(server):
    site = 4 * server.width + 6
    panels = [attention_panel(server, site, 1, 0), cost_panel(server, site)]
    figure = attention_figures.attention_and_cost(server.picture, panels)
    positions, bits = server.costs(site, 6)
    attention = server.rows(site, 6)[1, 0][positions]
    assert np.array_equal(figure.axes[2].collections[0].get_offsets(), np.stack((attention, bits), 1))
    rho = rank_correlations(server.rows(site, 6), positions, bits)[1, 0]
    assert figure.axes[2].get_title() == f"rank correlation {rho:.2f}"


def test_figures_of_saved_studies_show_their_means():
    (saved,) = study.read_results().values()
    explained = saved["explained"]
    left, right = attention_figures.attention_against_cost(explained, 16).axes
    own = explained[(explained["k"] == 16) & (explained["head"] == 1)].groupby("layer")["rho"].mean()
    assert any(np.allclose(line.get_ydata(), own) for line in right.lines if len(line.get_ydata()) == len(own))
    over_all = explained[explained["layer"] == -1].groupby("k", dropna=False)["rho"].mean()
    assert any(np.allclose(line.get_ydata(), over_all) for line in left.lines if len(line.get_ydata()) == len(over_all))
    assert [label.get_text() for label in left.get_xticklabels()] == ["8", "16", "32", "64", "dense"]


def test_what_helped_is_orange(photo):
    server = RowServer(micro_model("serial"), photo)
    site = 4 * server.width + 6
    cost = cost_panel(server, site)
    figure = attention_figures.attention_and_cost(server.picture, [attention_panel(server, site, 1, 0), cost])
    painted = figure.axes[1].images[2].get_array()
    for where, colour in ((cost.values > 0, attention_figures.DEARER), (cost.values < 0, attention_figures.CHEAPER)):
        assert where.any() and np.allclose(painted[where][:, :3], to_rgba(colour)[:3])


def test_the_overview_paints_the_first_pass_blue(photo):
    server = RowServer(micro_model("parallel"), photo)
    squares = overview.overview(server, query=26).axes[2].patches[: server.n]
    for site, square in enumerate(squares):
        colour = overview.SECOND if server.step(site) else overview.FIRST
        assert square.get_xy() == divmod(site, server.width)[::-1] and square.get_facecolor() == to_rgba(colour, 0.6)
