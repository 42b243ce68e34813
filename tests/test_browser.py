"""The explorer in a real browser: in JupyterLab and as an exported page. Collected only where a browser is installed.

Screenshots stay in build/screenshots. EXPLORER_CUT=1 cuts the click handler, to see that the tests then fail.
"""

import base64
import json
import os
import re
import time
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from browser import ROOT, chromium, jupyter_lab, open_notebook, run_all
from conftest import micro_model

from entroformer_lib.datasets import sample_picture
from entroformer_lib.explorer.page import explorer_page
from entroformer_lib.explorer.script import script
from entroformer_lib.explorer.widget import Explorer
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.inspection.panels import DENSE, MEAN, of_head, own_k
from entroformer_lib.weights.zoo import load_model, save_weights

SCREENSHOTS = ROOT / "build" / "screenshots"
KINDS = ("parallel", "serial", "groupedmixer")
CLICK = 'view.addEventListener("pointerup"'
STATE = """() => {
  const { explorer } = document.querySelector(".ef-explorer");
  return {
    selection: explorer.selection,
    words: document.querySelector(".ef-caption").textContent,
    maps: explorer.maps.map(({ kind, model, layer, head, k, values, selected }) => ({
      kind, model, layer, head, k,
      values: values && [...values],
      selected: values && [...values.keys()].filter((i) => selected(i)),
    })),
  };
}"""


EXPLORER = "document.querySelector('.ef-explorer').explorer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights and a picture with a grid of 8 x 12 latents, part of which is padding."""
    folder = tmp_path_factory.mktemp("browser")
    for kind in KINDS:
        save_weights(micro_model(kind, window=4), folder / f"{kind}.safetensors", {})
    sample_picture("astronaut").crop((100, 0, 290, 120)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    return {k: server_of(load_model(folder / f"{k}.safetensors", "cpu"), folder / "photo.png") for k in KINDS}


@pytest.fixture(scope="module")
def pages(folder, servers):
    """Addresses of exported pages."""
    addresses = {}
    for kind, server in servers.items():
        text = explorer_page(server, "astronaut").text
        if os.environ.get("EXPLORER_CUT"):
            assert CLICK in text
            text = text.replace(CLICK, "((name, handler) => name)('click'")
        (folder / f"{kind}.html").write_text(text)
        addresses[kind] = (folder / f"{kind}.html").as_uri()
    return addresses


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """Opens browser pages that note errors and requests to other hosts; there must be none."""
    errors, foreign, opened = [], [], []

    def note(request):
        if not re.match(r"(file|data|blob):|(http|ws)://127\.0\.0\.1[:/]", request.url):
            foreign.append(request.url)

    def open_one(address: str | None = None, **settings):
        settings = {"viewport": {"width": 1440, "height": 900}, **settings}
        page = browser.new_context(**settings).new_page()
        ended = "Canceled future"  # JupyterLab's, where a kernel ends
        page.on("pageerror", lambda error: ended in str(error) or errors.append(str(error)))
        page.on("request", note)
        opened.append(page)
        if address:
            page.goto(address)
            shown(page)
        return page

    yield open_one
    for page in opened:
        page.context.close()  # once more does no harm
    assert errors == [] and foreign == []


def shown(page, **expected) -> dict:
    """What the explorer shows, once it shows the expected selection."""
    page.wait_for_selector(".ef-panel canvas", timeout=60_000)
    page.wait_for_function(
        """expected => {
          const { explorer } = document.querySelector(".ef-explorer");
          return explorer.shownNow && Object.entries(expected).every(([name, v]) => explorer.shownNow[name] === v);
        }""",
        arg=expected,
        timeout=20_000,
    )
    return page.evaluate(STATE)


def check(state: dict, servers: list, tolerance: float = 0.004) -> None:
    """Maps and words are those of Python's servers. tolerance: half a step of the bytes in which a page holds them."""
    s = state["selection"]
    for one in state["maps"]:
        if one["kind"] == "decoding":
            continue
        server = servers[one["model"]]
        query = (s["row"] * server.width + s["column"]) * server.slices + min(s["slice"], server.slices - 1)
        k = one["k"] or None
        if server.kind == "parallel" and not server.has_context(query):
            assert one["values"] is None
            continue
        if one["kind"] == "groups":
            expected = of_head(server.groups(query)[one["layer"]], one["head"]).ravel()
        elif one["kind"] == "cost":
            positions, bits = server.costs(query, k)
            expected = np.zeros(server.n)
            expected[positions] = bits
            assert one["selected"] == sorted(positions)
        else:
            expected = of_head(server.rows(query, k)[one["layer"]], one["head"])
            if one["head"] != MEAN and k:
                assert one["selected"] == expected.nonzero()[0].tolist()
        np.testing.assert_allclose(one["values"], expected, atol=tolerance * np.sqrt(np.abs(expected).max()), rtol=1e-5)
        assert f"{server.facts(query, k)['bits']:.1f} bits" in state["words"] or s["mode"] in ("ks", "pair")


def as_the_user_does(page, servers: list, name: str) -> None:
    """Clicks, keys, sliders and every mode; after each the maps are those of the servers."""
    server = servers[0]
    grouped = server.kind == "grouped"

    def after(action, **expected):
        action()
        check(shown(page, **expected), servers)

    def click(row, column):
        box = page.locator(".ef-panel canvas").first.bounding_box()
        cell = box["width"] / server.width, box["height"] / server.height
        page.mouse.click(box["x"] + (column + 0.5) * cell[0], box["y"] + (row + 0.5) * cell[1])

    check(shown(page, layer=server.layers - 1, head=0), servers)
    inner = server.height // 2 + 1, server.width // 2 - 2
    for row, column in (inner, (inner[0], inner[1] + 1), (0, server.width - 1), inner):
        after(lambda row=row, column=column: click(row, column), row=row, column=column)
    page.locator(".ef-panel canvas").first.focus()
    after(lambda: page.keyboard.press("ArrowDown"), row=inner[0] + 1)
    after(lambda: page.keyboard.press("ArrowLeft"), column=inner[1] - 1)
    for slider, key, expected in (
        ("layer", "ArrowLeft", {"layer": server.layers - 2}),
        ("head", "ArrowLeft", {"head": MEAN}),
        ("head", "ArrowRight", {"head": 0}),
        *((("slice", "ArrowRight", {"slice": 2}),) if grouped else (("k", "End", {"k": DENSE}),)),
    ):
        page.locator(f".ef-{slider}").focus()
        after(lambda key=key: page.keyboard.press(key), **expected)
    if grouped and len(servers) == 1:
        choose_group(page, 5, len(server.order))
        channel_slice, row, column = server.order[5]
        check(shown(page, slice=channel_slice), servers)
    for button in page.locator(".ef-modes button").all():
        mode = button.get_attribute("data-mode")
        button.click()
        check(shown(page, mode=mode), servers)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}-{mode}.png")
    page.click("button[data-mode=head]")
    check(shown(page, mode="head"), servers)


def choose_group(page, group: int, groups: int) -> None:
    """Clicks a row of the table of groups, whose left margin is as wide as the one above."""
    table = page.locator(".ef-groups canvas").first
    box, (margin, cell) = table.bounding_box(), table.evaluate("c => [c.table.pad, c.table.cell]")
    assert margin + groups * cell == pytest.approx(1, abs=0.02)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * (margin + (group + 0.5) * cell))


# ---- the exported page ----


@pytest.mark.parametrize("kind", KINDS)
def test_exported_page(open_page, pages, servers, kind):
    as_the_user_does(open_page(pages[kind]), [servers[kind]], f"page-{kind}")


def test_first_pass_shows_no_attention_as_if_it_predicted(open_page, pages, servers):
    server = servers["parallel"]
    page = open_page(pages["parallel"] + "#row=3&column=4")
    state = shown(page, row=3, column=4)
    assert state["maps"][0]["values"] is None and "First pass" in state["words"]
    page.check(".ef-gathers")
    state = shown(page, gathers=True)
    expected = server.rows(3 * server.width + 4, own_k(server))[state["maps"][0]["layer"], 0]
    np.testing.assert_allclose(state["maps"][0]["values"], expected, atol=0.004)
    page.click(".ef-nearest")
    state = shown(page, gathers=False)
    place = state["selection"]["row"], state["selection"]["column"]
    assert server.has_context(place[0] * server.width + place[1]) and abs(place[0] - 3) + abs(place[1] - 4) == 1


def test_a_change_of_the_view_alone_stays_at_the_nearest_block_that_is_held(open_page, pages):
    page = open_page(pages["serial"])
    places = page.evaluate("""() => {
        const explorer = document.querySelector(".ef-explorer").explorer, { width } = explorer.meta;
        explorer.source.held = (mode) => (mode === "head" ? undefined : [width + 5, 4 * width + 3]);
        explorer.choose({ row: 2, column: 5 });
        const at = ({ row, column }) => [row, column];
        return ["ks", "pair", "cost", "head"].map((mode) => (explorer.choose({ mode }), at(explorer.selection)));
    }""")
    assert places == [[1, 5], [1, 5], [1, 5], [2, 5]]


def test_address_keeps_the_view(open_page, pages):
    page = open_page(pages["parallel"])
    page.click("button[data-mode=heads]")
    shown(page, mode="heads")
    page.locator(".ef-layer").focus()
    page.keyboard.press("Home")
    before = shown(page, layer=0)["selection"]
    assert "mode=heads" in page.url and "layer=0" in page.url
    assert shown(open_page(page.url), mode="heads")["selection"] == before


def test_backgrounds_and_decoding(open_page, pages, servers):
    """The background slider passes four pictures; as bytes arrive more blocks are known, at the end all."""
    server = servers["parallel"]
    page = open_page(pages["parallel"])
    drawn = set()
    for place in range(4):
        page.locator(".ef-backdrop").fill(str(place))
        shown(page, backdrop=place)
        drawn.add(page.evaluate("document.querySelector('.ef-panel canvas').toDataURL()"))
    assert len(drawn) == 4
    page.click("button[data-mode=decoding]")
    shown(page, mode="decoding")
    for part in (1, 0.3):
        page.locator(".ef-part").fill(str(part))
        shown(page, part=part)
        assert ("complete" in page.inner_text(".ef-panel figcaption")) == (part == 1)
    total = (server.z_bits + server.overview()[0].sum()) / 8
    words = page.inner_text(".ef-panel figcaption").replace(",", "")
    received, whole = map(int, re.search(r"(\d+) of (\d+) bytes", words).groups())
    assert whole == pytest.approx(total, abs=1) and received == pytest.approx(0.3 * total, abs=1)


def test_what_comes_late_is_not_drawn_over_a_later_choice(open_page, pages):
    """The pictures of a decoding, which a model needs a second for."""
    page = open_page(pages["parallel"])
    page.evaluate(
        f"""() => {{
          const {{ answers }} = {EXPLORER}, soon = answers.picture.bind(answers);
          answers.picture = async (...words) => (await new Promise((done) => setTimeout(done, 500)), soon(...words));
        }}"""
    )
    page.click("text=Decoding")
    page.click("text=One head")
    page.wait_for_timeout(1000)
    assert page.get_attribute("[aria-pressed=true]", "data-mode") == "head"
    assert [one["kind"] for one in page.evaluate(STATE)["maps"]] == ["attention"]
    assert "head 0" in page.inner_text("figcaption") and "Layer 1, head 0" in page.inner_text(".ef-caption")


def test_no_background_says_what_nobody_measured(open_page, pages):
    """A GroupedMixer without another model does not know what context saves."""
    page = open_page(f"{pages['groupedmixer']}#backdrop=3")
    assert page.get_attribute(".ef-backdrop", "max") == "2"
    assert page.evaluate(f"{EXPLORER}.selection.backdrop") == 2


def test_tour_goes_to_places_of_the_picture(open_page, pages, servers):
    server = servers["parallel"]
    page = open_page(pages["parallel"])
    page.click(".ef-tour")
    page.wait_for_selector(".ef-stop:not([hidden])")
    bits, alone = server.overview()
    saved = np.where(server.when > 0, alone - bits, -np.inf).reshape(server.height, server.width)
    saved[[0, -1]] = saved[:, [0, -1]] = -np.inf  # which lie partly in the padding
    row, column = divmod(int(saved.argmax()), server.width)
    before = page.evaluate("explorer => explorer.home", page.evaluate_handle(EXPLORER))
    shown(page, row=row, column=column)
    count = int(re.search(r"1 of (\d)", page.inner_text(".ef-stop"))[1])
    for _ in range(count):
        page.click(".ef-next")
    page.wait_for_selector(".ef-stop[hidden]", state="attached")
    shown(page, row=before["row"], column=before["column"])  # back where it began


def test_what_can_be_kept(open_page, pages, servers, tmp_path):
    server = servers["parallel"]
    page = open_page(pages["parallel"] + "#row=4&column=6", permissions=["clipboard-read", "clipboard-write"])
    state = shown(page, row=4)
    page.click(".ef-keep summary")
    for kind in ("png", "svg", "csv"):
        with page.expect_download() as download:
            page.click(f"[data-keep={kind}]")
        download.value.save_as(tmp_path / f"view.{kind}")
    assert (tmp_path / "view.png").read_bytes().startswith(b"\x89PNG")
    drawing = ElementTree.parse(tmp_path / "view.svg").iter("{http://www.w3.org/2000/svg}text")
    assert state["words"] in " ".join(text.text for text in drawing)
    lines = (tmp_path / "view.csv").read_text().splitlines()
    values = np.array([float(line.rsplit(",", 3)[1]) for line in lines[2:]])
    assert lines[0] == f"# {state['words']}"
    np.testing.assert_allclose(values, server.rows(54, own_k(server))[-1, 0], atol=0.004)
    page.click("[data-keep=python]")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "row=4, column=6" in copied and 'mode="head"' in copied
    compile(copied, "copied", "exec")


def test_phone_and_dark_mode(open_page, pages):
    page = open_page(pages["groupedmixer"], viewport={"width": 400, "height": 800}, color_scheme="dark")
    for button in page.locator(".ef-modes button").all():
        button.click()
        shown(page, mode=button.get_attribute("data-mode"))
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    heights = page.evaluate(
        "[...document.querySelectorAll('.ef-explorer button, .ef-explorer .ef-bar label')]"
        ".filter((e) => e.offsetParent).map((e) => e.getBoundingClientRect().height)"
    )
    assert len(heights) > 6 and min(heights) >= 40
    colour = page.evaluate("getComputedStyle(document.querySelector('.ef-explorer')).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour))) < 60
    page.screenshot(path=SCREENSHOTS / "phone-dark.png")


def test_picture_and_controls_are_seen_without_scrolling(open_page, pages):
    page = open_page(pages["parallel"])
    for part in (".ef-panels", ".ef-choices", ".ef-under", ".ef-legend", ".ef-costs"):
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] <= 900, part


def test_zoom(open_page, pages):
    """The wheel with Ctrl enlarges around the pointer; dragging then moves, and a click still finds its block."""
    page = open_page(pages["parallel"])
    box = page.locator(".ef-view").first.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    large = page.locator(".ef-panel canvas").first.bounding_box()
    assert large["width"] > 2 * box["width"]
    before = page.evaluate(STATE)["selection"]
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()
    moved = page.locator(".ef-panel canvas").first.bounding_box()
    assert moved["x"] < large["x"] - 0.1 * box["width"] and page.evaluate(STATE)["selection"] == before
    place = (box["x"] + 0.6 * box["width"] - moved["x"]) / moved["width"] * 12
    page.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
    shown(page, column=int(place))


def test_damaged_pages_and_no_javascript(browser, pages, folder):
    text = (folder / "parallel.html").read_text()
    start = text.index('id="data">') + 100
    (folder / "damaged.html").write_text(text[:start] + text[start + 40 :])
    page = browser.new_page()
    page.goto((folder / "damaged.html").as_uri())
    assert "damaged" in page.locator("[role=alert]").first.inner_text()
    page.close()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["parallel"])
    assert "Switch it on" in page.inner_text("body")
    context.close()


def test_nonsense_in_addresses_and_selections(open_page, pages):
    """What makes no sense is passed over, the nearest that exists is taken, and the address says so."""
    page = open_page(pages["parallel"] + "#row=x&column=&layer=99&mode=no&k=5&dim=maybe&backdrop=1e9")
    before = shown(page, row=4, column=6, layer=1, mode="head", k=6, dim=False, backdrop=3)["selection"]
    page.evaluate("location.hash = 'row=x&column=1e3&head=?'")
    shown(page, column=11, row=4)
    assert "row=4&column=11" in page.url
    page.evaluate("location.hash = 'row=x'")  # which changes nothing
    page.wait_for_function("() => location.hash.includes('row=4')")
    nonsense = {"hidden": 5, "off": ["a", 3], "overlay": "x", "part": None, "row": [1], "column": 6, "layer": {}}
    page.evaluate("parts => document.querySelector('.ef-explorer').explorer.choose(parts)", nonsense)
    assert shown(page, column=6)["selection"] == before and page.locator(".ef-trouble").is_hidden()


def test_drawing_and_table_of_every_mode(open_page, pages, servers, tmp_path):
    """Each title is in the drawing; the table has what the maps show, or the bits that arrive."""
    server = servers["groupedmixer"]
    page = open_page(pages["groupedmixer"])
    page.click(".ef-keep summary")
    sizes = {"heads": server.n * 3, "groups": len(server.order) ** 2 * 3, "decoding": server.n * server.slices}
    for mode, size in sizes.items():
        page.click(f"[data-mode={mode}]")
        shown(page, mode=mode)
        for kind in ("svg", "csv"):
            with page.expect_download() as download:
                page.click(f"[data-keep={kind}]")
            download.value.save_as(tmp_path / f"view.{kind}")
        drawing = ElementTree.parse(tmp_path / "view.svg")
        texts = {text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")}
        assert texts.issuperset(page.locator(".ef-panels figcaption").all_inner_texts())
        table = pd.read_csv(tmp_path / "view.csv", comment="#")
        assert len(table) == size
        if mode == "decoding":
            np.testing.assert_allclose(table["bits"], server.overview()[0], rtol=1e-4)
        elif mode == "groups":
            rows = table["value"].to_numpy().reshape(3, -1, len(server.order))
            np.testing.assert_allclose(rows[:2], server.groups(server.query(54, 1))[-1], atol=0.004)


def test_copied_python_shows_the_same_view(open_page, pages, servers, folder):
    page = open_page(pages["parallel"] + "#row=4&column=6&mode=pair&other_k=8&gathers=true&dim=true&channel=3")
    selection = shown(page, mode="pair")["selection"]
    page.click(".ef-keep summary")
    page.evaluate("delete Navigator.prototype.clipboard")  # as at an address without a certificate
    page.click("[data-keep=python]")
    *_, copied = page.inner_text(".ef-trouble").partition("by hand: ")
    code = copied.replace("PICTURE", str(folder / "photo.png")).replace('model("parallel', f'model("{folder}/parallel')
    code = code.replace('parallel")', 'parallel.safetensors")').replace("Explorer(\n", "made = Explorer(\n")
    names = {}
    exec(code, names)
    chosen = names["made"].selection
    assert chosen == {name: selection[name] for name in chosen} and chosen["channel"] == 3 and chosen["gathers"]
    assert names["made"].meta["inside"] == [*servers["parallel"].inside]


def test_tour_says_only_what_is_so(open_page, pages):
    page = open_page(pages["groupedmixer"])
    page.evaluate(
        """() => {
          const { explorer } = document.querySelector(".ef-explorer");
          const { bits } = explorer.source.all;
          const helped = { bits, alone: bits.map((b) => b + 1) };  // context helps everywhere
          explorer.source.all = explorer.answers.overviews[0] = helped;  // asked before, or not yet
        }"""
    )
    page.click(".ef-tour")
    page.wait_for_selector(".ef-stop:not([hidden])")
    stops = [page.inner_text(".ef-stop")]
    for _ in range(4):
        page.keyboard.press("Enter")  # the next button keeps the focus
        page.wait_for_function("before => document.querySelector('.ef-stop').innerText !== before", arg=stops[-1])
        stops.append(page.inner_text(".ef-stop"))
    assert "helps" in "".join(stops) and "hurts" not in "".join(stops) and "5 of 5: The beginning" in stops[-1]
    assert "is group 0 " in shown(page, slice=0)["words"]


def test_padding_is_told(open_page, folder):
    """A picture of two blocks amid padding: it is said of a block, and the tour has a place to go."""
    server = server_of(micro_model("parallel"), sample_picture("astronaut").crop((0, 0, 24, 20)))
    (folder / "dot.html").write_text(explorer_page(server).text)
    page = open_page((folder / "dot.html").as_uri() + "#row=0&column=0")
    assert "in the padding" in shown(page, row=0)["words"] and "padding" in page.inner_text(".ef-costs")
    page.mouse.move(*(page.locator(".ef-view").bounding_box()[name] + 5 for name in "xy"))
    assert "padding" in page.inner_text(".ef-tip")
    page.click(".ef-tour")
    page.wait_for_selector(".ef-stop:not([hidden])")
    assert "padding" not in shown(page, row=2)["words"]


def test_keys_and_names_of_controls(open_page, pages):
    page = open_page(pages["parallel"] + "#row=3&column=4")
    for name, words in (("layer", "1 (0 to 1)"), ("k", "k = 6 (as trained)"), ("backdrop", "photograph")):
        assert page.get_attribute(f".ef-{name}", "aria-valuetext") == words
    page.focus(".ef-gathers")
    for expected in (True, False):
        page.keyboard.press("Space")
        shown(page, gathers=expected)  # the panel is made anew, and keeps the focus
    view = page.locator(".ef-view").bounding_box()
    page.mouse.click(view["x"] + 5, view["y"] + 5, button="right")  # opens the browser's menu
    page.mouse.move(view["x"] + 5, view["y"] + 5)
    page.mouse.down()
    page.mouse.move(5, 5)
    page.mouse.up()  # outside
    page.mouse.move(view["x"] + 50, view["y"] + 50)
    assert page.locator(".ef-tip").is_visible() and page.evaluate(STATE)["selection"]["row"] == 3


def test_rows_of_groups_where_phases_do_not_divide_the_grid(open_page, folder):
    server = server_of(micro_model("groupedmixer", groups=(3, 3, 3), window=4), folder / "photo.png")
    (folder / "thirds.html").write_text(explorer_page(server).text)
    page = open_page((folder / "thirds.html").as_uri() + "#row=7&column=11")
    shown(page)
    for group in (5, 14, 26):
        choose_group(page, group, len(server.order))
        channel_slice, row, column = server.order[group]
        chosen = shown(page, slice=channel_slice)["selection"]
        assert (chosen["row"] % 3, chosen["column"] % 3) == (row, column)


# ---- the widget, its kernel played by the test ----

WIDGET = """<!doctype html><body><div id="one"></div><div id="two"></div><script type="module">
SCRIPT
const [state, heard] = [{ meta: META, selection: {}, still: {} }, {}];
const fire = (name, ...said) => (heard[name] ?? []).forEach((one) => one(...said));
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
window.model = {
  get: (name) => state[name],
  set(name, value) {
    const changed = JSON.stringify(state[name]) !== JSON.stringify(value);
    state[name] = value;
    if (changed) fire("change:" + name);
  },
  save_changes() {}, off() {}, on(name, one) { (heard[name] ??= []).push(one); },
  async send(message) {
    while (window.busy) await new Promise(requestAnimationFrame);
    const { answered, buffers } = await reply(message);
    fire("msg:custom", { answered }, buffers.map(bytes));
  },
};
window.views = ["one", "two"].map((name) => document.getElementById(name));
window.explorerOf = (el) => el.querySelector(".ef-explorer").explorer;
window.show = () => views.forEach((el) => render({ model, el }));
show();
</script>"""


@pytest.fixture
def widget_page(open_page, servers, folder):
    """Two views of one widget of two models in an ordinary page; Python answers as the widget does."""
    deeper = server_of(micro_model("serial", context_layers=3), folder / "photo.png")
    widget = Explorer(servers["parallel"], deeper)
    page = open_page()

    def reply(message):
        sent = []
        widget.send = lambda content, buffers: sent.append((content, buffers))
        widget._handle_custom_msg(message, [])
        content, buffers = sent[0]
        return {**content, "buffers": [base64.b64encode(b).decode() for b in buffers]}

    page.expose_function("reply", reply)
    code = script().replace("PATIENCE = 10_000", "PATIENCE = 300")
    (folder / "widget.html").write_text(WIDGET.replace("SCRIPT", code).replace("META", json.dumps(widget.meta)))
    page.goto((folder / "widget.html").as_uri())
    both(page)
    return page


def both(page, **expected) -> None:
    """Waits until both views show the expected."""
    page.wait_for_function(
        """expected => views.map(explorerOf).every(
          ({ shownNow }) => shownNow && Object.entries(expected).every(([name, v]) => shownNow[name] === v))""",
        arg=expected,
    )


def test_two_views_do_not_take_each_others_answers(widget_page, servers):
    """Both ask at once for different things, and each shows its own."""
    widget_page.evaluate(
        """() => views.map(explorerOf).forEach((explorer, i) => {
          explorer.source.chosen = () => {};  // else they agree
          explorer.choose({ row: 4 + 2 * i, column: 6 });
        })"""
    )
    widget_page.wait_for_function("() => views.map(explorerOf).every(({ shownNow }, i) => shownNow.row === 4 + 2 * i)")
    found = widget_page.evaluate("() => views.map((el) => [...explorerOf(el).maps[0].values])")
    expected = [servers["parallel"].rows(row * 12 + 6, 6)[-1, 0] for row in (4, 6)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_calculation_of_the_first_of_two_models(widget_page):
    widget_page.evaluate("() => explorerOf(views[0]).choose({ mode: 'calculation', layer: 2, row: 4, column: 6 })")
    both(widget_page, mode="calculation", layer=2)
    assert "parallel: Layer 1, head 0, channel 2" in widget_page.inner_text("#one .ef-more")
    assert widget_page.locator(".ef-trouble:not([hidden])").count() == 0


def test_a_busy_kernel_is_told_and_waited_for(widget_page):
    page = widget_page
    page.evaluate("() => { window.busy = true; explorerOf(views[0]).choose({ row: 2, column: 2 }); }")
    page.wait_for_selector("#one .ef-trouble:not([hidden])")
    assert "busy" in page.inner_text("#one .ef-trouble")
    page.evaluate("() => (window.busy = false)")
    both(page, row=2)
    assert page.locator("#one .ef-trouble").is_hidden()


def test_an_explorer_that_is_replaced_is_no_longer_there(widget_page):
    assert not widget_page.evaluate("() => { const { root } = explorerOf(views[0]); show(); return root.isConnected; }")


# ---- JupyterLab ----

NOTEBOOK = """\
from entroformer_lib import load_model
from entroformer_lib.explorer.script import script
from entroformer_lib.explorer.widget import Explorer
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.explorer.widget import Explorer
kinds = {kinds}
explorer = Explorer(*(server_of(load_model(kind + ".safetensors", "cpu"), "photo.png") for kind in kinds))
explorer"""
CUT = """
from entroformer_lib.explorer import widget
widget.Explorer._esm = widget.script().replace({click!r}, "((name, handler) => name)('click'")
"""


@pytest.fixture(scope="module")
def jupyter(folder):
    """JupyterLab.  ->  (address, token)"""
    with jupyter_lab(folder) as lab:
        yield lab


def notebook(kinds) -> str:
    """The cell, with the click handler cut where EXPLORER_CUT asks for it."""
    cut = CUT.format(click=CLICK) if os.environ.get("EXPLORER_CUT") else ""
    return cut + NOTEBOOK.format(kinds=kinds)


@pytest.mark.parametrize("kinds", [("parallel",), ("groupedmixer",), ("parallel", "serial")])
def test_widget_in_jupyterlab(open_page, folder, servers, kinds, jupyter):
    page, name = open_page(), "-".join(kinds)
    open_notebook(page, jupyter, folder / f"{name}.ipynb", [notebook(kinds)])
    run_all(page)
    as_the_user_does(page, [servers[kind] for kind in kinds], f"jupyterlab-{name}")


def run_cell(page, number: int) -> None:
    page.evaluate(
        """number => {
          const { content } = window.jupyterapp.shell.currentWidget;
          content.activeCellIndex = number;
          return window.jupyterapp.commands.execute('notebook:run-cell');
        }""",
        number,
    )


def test_widget_and_kernel(open_page, folder, jupyter):
    """A cell moves the widget and reads it; the saved notebook shows the last view, and a dead kernel is said."""
    page, path = open_page(), folder / "kept.ipynb"
    cells = [notebook(("parallel",)), "explorer.select(row=2, column=4)", "print(explorer.selection['layer'])"]
    open_notebook(page, jupyter, path, cells)
    run_cell(page, 0)
    shown(page)
    run_cell(page, 1)
    shown(page, row=2, column=4)
    page.locator(".ef-layer").focus()
    page.keyboard.press("Home")
    state = shown(page, layer=0)
    page.wait_for_function("document.querySelector('.ef-still img')?.alt.includes('Layer 0')", timeout=20_000)
    assert page.locator(".ef-still").is_hidden()  # where the widget lives
    run_cell(page, 2)
    page.wait_for_function("[...document.querySelectorAll('pre')].some((p) => p.textContent.trim() === '0')")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    saved = _saved(path)
    outputs = json.dumps(saved["cells"][0]["outputs"])
    assert state["words"] in outputs and "data:image/jpeg;base64" in outputs and "object at 0x" not in outputs
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.wait_for_selector(".ef-trouble:not([hidden])")
    assert "Run the cell again" in page.inner_text(".ef-trouble")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.shutdown()")
    page.context.close()
    again = open_page()
    again.goto(f"{jupyter[0]}/doc/tree/{path.name}?token={jupyter[1]}")
    again.wait_for_selector(".ef-still img", timeout=60_000)
    assert again.locator(".ef-still").is_visible() and not again.locator("text=Error displaying widget").is_visible()


def _saved(path) -> dict:
    """The notebook once it holds the still picture."""
    for _ in range(100):
        found = json.loads(path.read_text())
        if "data:image/jpeg" in json.dumps(found["cells"][0]["outputs"]):
            return found
        time.sleep(0.1)
    raise AssertionError("the still picture was not saved")
