"""The page that runs a model, in a real browser. Collected only where a browser is installed.

One page serves all questions: opening it takes seconds.
"""

import json
import re

import numpy as np
import pytest
import torch
from browser import chromium
from conftest import aware_model
from PIL import Image

from entroformer_lib.datasets import sample_picture
from entroformer_lib.explorer.live import live_page
from entroformer_lib.inspection.panels import rank_correlations
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.inspection.scene import Scene
from entroformer_lib.models.context import Gaps

PHOTO = (100, 0, 250, 100)  # of a sample: not a multiple of 64, so it is padded to 192 x 128
STATE = "document.getElementById('status').dataset.state"
PACKED = "(name, value) => value instanceof Object && 'BYTES_PER_ELEMENT' in value ? Array.from(value, String) : value"
TIE = 1e-5  # scores that lie closer may change places between float64 and float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page, and files to drop on it."""
    folder = tmp_path_factory.mktemp("live")
    model, reference = aware_model("parallel", name="ours"), aware_model("hyperprior", name="theirs")
    photo = sample_picture("astronaut").crop(PHOTO)
    (folder / "page.html").write_text(live_page(model, photo, reference), "utf-8")
    photo.save(folder / "first.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "other.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (20_000, 40)).save(folder / "long.png")
    Image.new("L", (1600, 20)).save(folder / "thin.png")
    Image.new("RGB", (1000, 800), "teal").save(folder / "large.png")
    (folder / "words.png").write_text("These are words.")
    return folder


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(browser, folder):
    """The page; it asks nothing of anybody and reports no errors."""
    page = browser.new_page()
    errors, foreign = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: re.match("(file|data|blob):", request.url) or foreign.append(request.url))
    page.goto((folder / "page.html").as_uri())
    wait(page)
    yield page
    page.close()
    assert errors == [] and foreign == []


@pytest.fixture
def page(opened, folder):
    """The page with its first picture, whatever another test has given it."""
    if opened.evaluate("liveSource.meta.inside.slice(2).join()") != "150,100":
        opened.evaluate(f"{STATE} = ''")
        opened.set_input_files("#photo", folder / "first.png")
        wait(opened)
    return opened


@pytest.fixture(scope="module")
def server():
    return RowServer(aware_model("parallel"), sample_picture("astronaut").crop(PHOTO))


@pytest.fixture(scope="module")
def alone():
    """Bits of every latent in the model without context."""
    return bits_of(Scene(aware_model("hyperprior"), sample_picture("astronaut").crop(PHOTO)))


def bits_of(scene, gaps=None) -> np.ndarray:
    """Of every latent, with gaps in the context."""
    gaps = Gaps() if gaps is None else gaps
    with torch.no_grad():
        said = scene.model.distributions(scene.y_hat, scene.hyper, gaps, scene.rate)
        return -scene.model.gaussian(scene.y_hat, *said).log2().sum(1).flatten().numpy()


def wait(page, state="ready"):
    page.wait_for_selector(f"#status[data-state={state}]", timeout=60_000)


def ask(page, question: str):
    """The answer of the page's source, such as `rows(0, 5, 6)`; typed arrays come as arrays."""
    text = page.evaluate(f"async () => JSON.stringify(await liveSource.{question}, {PACKED})")

    def unpacked(value):
        if isinstance(value, list) and value and isinstance(value[0], str):
            return np.array([float(v) for v in value])
        return {k: unpacked(v) for k, v in value.items()} if isinstance(value, dict) else value

    return unpacked(json.loads(text))


def change(**fields) -> str:
    return json.dumps({"hidden": [], "off": [], "position": True} | fields)


def test_first_view(page, server, alone):
    meta = page.evaluate("liveSource.meta")
    assert (meta["height"], meta["width"], meta["inside"][2:]) == (server.height, server.width, [150, 100])
    assert meta["models"][0]["channel_groups"] == [group.tolist() for group in server.channel_groups]
    assert meta["models"][0]["reference"].startswith("theirs@")
    rebuilt, guess = (ask(page, f"picture(0, '{name}')")["url"] for name in ("reconstruction", "guess"))
    assert len({meta["picture"], rebuilt, guess}) == 3
    assert all(url.startswith("data:image/png") for url in (meta["picture"], rebuilt, guess))
    found = ask(page, "overview(0)")
    np.testing.assert_allclose(found["bits"], server.bits(server.default_k)["context"].ravel(), rtol=5e-3)
    np.testing.assert_allclose(found["alone"], alone, rtol=5e-3)
    assert (found["steps"] == server.when).all() and (found["origins"] == np.arange(server.n)).all()


@pytest.mark.parametrize("k", [6, 3, 0])
def test_rows_are_those_of_torch(page, server, k):
    """Where no k-th score nearly equals the next."""
    sites = range(0, server.n, 7)
    ties = 0
    for site in sites:
        found, (rows, facts) = ask(page, f"rows(0, {site}, {k})"), server.row_and_facts(site, k or None)
        scores = np.sort(server.rows(site, k or None, "scores"))[..., ::-1]
        if k and (scores[..., k - 1] - scores[..., k] < TIE).any():
            ties += 1
            continue
        np.testing.assert_allclose(found["probs"].reshape(rows.shape), rows, atol=1e-3)
        assert found["facts"]["bits"] == pytest.approx(facts["bits"], rel=5e-3)
        for ours, theirs in zip(found["facts"]["groups"], facts["groups"], strict=True):
            names = ("channels", "value", "mean", "scale", "bits")
            assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=5e-3, abs=1e-4)
    assert ties <= 1


def test_what_a_change_does_to_the_bits(page, server):
    k, usual = server.default_k, server.bits(server.default_k)["context"].sum()

    def total(**fields) -> float:
        return ask(page, f"overview(0, {change(**fields)})")["bits"].sum()

    hidden = [1, 14, server.width + 4]  # of the first pass
    missing = torch.zeros(1, 1, server.height, server.width, dtype=torch.bool)
    missing.view(-1)[hidden] = True
    expected = {
        "hidden": (bits_of(server, Gaps(missing=missing)).sum(), total(hidden=hidden)),
        "off": (server.total_bits(k, without=(1, 0)), total(off=[[1, 0]])),
    }
    without = RowServer(aware_model("parallel"), sample_picture("astronaut").crop(PHOTO))
    with torch.inference_mode():
        for parameter in without.model.context_model.stack.positions.parameters():
            parameter.zero_()
    expected["position"] = without.bits(k)["context"].sum(), total(position=False)
    for torch_says, page_says in expected.values():
        assert abs(torch_says / usual - 1) > 1e-5  # it does change something
        assert page_says - usual == pytest.approx(torch_says - usual, rel=0.02, abs=2e-5 * usual)


def test_a_hidden_latent_is_attended_by_nobody_but_itself(page, server):
    def attention_to_1(site, **fields):
        found = ask(page, f"rows(0, {site}, 0, {change(**fields)})")["probs"]  # dense, so that all are attended to
        return found.reshape(server.layers, server.heads, -1)[..., 1]

    for site in (0, 14):  # of the second pass, and of the first
        assert (attention_to_1(site) > 0).all() and (attention_to_1(site, hidden=[1]) == 0).all()
    assert (attention_to_1(1, hidden=[1]) > 0).all()


def test_costs_of_hiding_positions(page, server):
    site = int(server.predicted()[20])
    found, (positions, bits) = ask(page, f"costs(0, {site}, 6)"), server.costs(site, 6)
    assert (found["positions"] == positions).all()
    np.testing.assert_allclose(found["bits"], bits, atol=1e-3)
    rho = rank_correlations(server.rows(site, 6), positions, bits)
    np.testing.assert_allclose(found["rho"], rho.ravel(), atol=0.02)
    first = int((server.when == 0).nonzero()[0][0])
    assert ask(page, f"costs(0, {first}, 6)")["positions"] == []


def test_one_calculation_opened(page, server):
    site, layer, head, channel = int(server.predicted()[30]), 1, 0, 5
    found = ask(page, f"calculation(0, {site}, 6, null, {layer}, {head}, {channel})")
    for point in ("content", "position", "scores", "probs"):
        expected = server.rows(site, 6, point)[layer, head]
        seen = server.visible(site) & np.isfinite(expected)
        np.testing.assert_allclose(found[point][seen], expected[seen], atol=1e-4)
        assert (np.isnan(found[point]) == ~server.visible(site)).all()
    sums = found["content"] + found["position"] - found["scores"]
    assert np.nanmax(np.abs(sums)) < 1e-5
    assert ((found["selected"] > 0) == (server.rows(site, 6)[layer, head] > 0)).all()
    means, scales, bits = (t[0, channel].item() for t in server.predict([site], 6))
    assert [found["mean"], found["scale"], found["bits"]] == pytest.approx([means, scales, bits], rel=1e-3, abs=1e-4)
    value = int(server.y_hat.flatten(2)[0, channel, site])
    pmf = found["probabilities"]
    assert pmf[value - found["first"]] == pytest.approx(2**-bits, rel=1e-3)
    assert pmf.sum() == pytest.approx(1, abs=1e-3)


def test_photographs_are_dropped_and_refused_in_sentences(page, folder):
    def choose(name, state):
        page.evaluate(f"{STATE} = ''")
        page.set_input_files("#photo", folder / name)
        wait(page, state)
        return page.inner_text("#status")

    assert "words.png is not a picture" in choose("words.png", "failed")
    assert "1 x 1 pixels" in choose("dot.png", "failed")
    assert "20000 x 40 pixels" in choose("long.png", "failed")
    assert "768 x 10" in choose("thin.png", "failed")
    assert "scaled to 768 x 614" in choose("large.png", "ready")
    choose("other.png", "ready")
    assert page.evaluate("liveSource.meta.inside.slice(2)") == [100, 150]
    assert page.evaluate("document.querySelector('.ef-explorer').explorer.meta.inside") == [14, 21, 100, 150]


@pytest.mark.parametrize(
    "script, sentence",
    [
        ("delete globalThis.DecompressionStream", "cannot unpack the model"),
        ("WebAssembly.validate = () => false", "no WebAssembly SIMD"),
    ],
)
def test_browsers_that_lack_something(browser, folder, script, sentence):
    page = browser.new_page()
    page.add_init_script(script)
    page.goto((folder / "page.html").as_uri())
    wait(page, "failed")
    assert sentence in page.inner_text("#status")
    page.close()


def test_a_damaged_page(browser, folder, tmp_path):
    text = (folder / "page.html").read_text("utf-8")
    start = text.index('id="part-look"') + 5000
    other = "A" if text[start] != "A" else "B"
    (tmp_path / "damaged.html").write_text(text[:start] + other + text[start + 1 :], "utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "damaged.html").as_uri())
    wait(page, "failed")
    assert 'This page is damaged: its part "look"' in page.inner_text("#status")
    page.close()


def test_without_javascript(browser, folder):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((folder / "page.html").as_uri())
    assert "JavaScript is switched off" in page.inner_text("body")
    context.close()


def test_explorer_over_the_live_model(page, folder, server):
    """What is shown is what the model says; what-if changes the bits, and "as it was" takes that back."""
    explorer = "document.querySelector('.ef-explorer').explorer"

    def shown(condition: str) -> dict:
        for _ in range(200):
            if page.evaluate(f"{explorer}.shownNow && (({{shownNow: s}}) => {condition})({explorer})"):
                return page.evaluate(f"({{...{explorer}.shown[0].facts, before: {explorer}.shown[0].before}})")
            page.wait_for_timeout(50)
        raise AssertionError(condition)

    site = 4 * server.width + 6
    page.evaluate(f"{explorer}.choose({{row: 4, column: 6, layer: 1, head: 0}})")
    usual = shown("s.row === 4 && s.column === 6")
    assert usual["bits"] == pytest.approx(server.facts(site, server.default_k)["bits"], rel=5e-3)
    page.check(".ef-head-off")
    changed = shown("s.off.length === 1")
    assert changed["bits"] != usual["bits"] and changed["before"] == usual["bits"]
    page.check(".ef-hiding")
    box = page.locator(".ef-panel canvas").first.bounding_box()
    page.mouse.click(box["x"] + 5.5 / server.width * box["width"], box["y"] + 4.5 / server.height * box["height"])
    shown("s.hidden.length === 1")
    assert "changes nothing" not in page.inner_text(".ef-costs")
    page.evaluate(f"{explorer}.choose({{hidden: [{4 * server.width + 4}]}})")  # of the second pass
    shown(f"s.hidden[0] === {4 * server.width + 4}")
    assert "changes nothing" in page.inner_text(".ef-costs")
    page.click(".ef-as-it-was")
    assert shown("!s.hidden.length && !s.off.length")["bits"] == usual["bits"]
    page.click("button[data-mode=calculation]")
    shown("s.mode === 'calculation'")
    assert "bits for this channel" in page.inner_text(".ef-more")
    page.click("button[data-mode=decoding]")
    shown("s.mode === 'decoding'")
    words = page.inner_text(".ef-panel figcaption").replace(",", "")
    total = (server.z_bits + server.overview()[0].sum()) / 8
    assert int(re.search(r"of (\d+) bytes", words)[1]) == pytest.approx(total, rel=5e-3)
