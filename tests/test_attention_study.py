"""The points inside attention, the row server and the two studies on it."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import LMBDAS, VARIANTS, aware_model, micro_model
from test_groupedmixer import capture_input

from entroformer_lib import tiles
from entroformer_lib.codec import codec
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import AttentionError
from entroformer_lib.exact.arithmetic import Exact
from entroformer_lib.inspection.capture import POINTS, attention_points, capture, intervene
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.inspection.row_server import K_HELD, RowServer
from entroformer_lib.studies import attention as study
from entroformer_lib.studies import rate_distortion as rd
from entroformer_lib.weights.zoo import load_model, save_weights

KINDS = ("serial", "parallel")


@pytest.fixture(params=KINDS)
def model(request):
    return micro_model(request.param)


@pytest.fixture
def server(model, photo):
    return RowServer(model, photo)


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- capture ----


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "minnen"])  # which has no attention
def test_capture_changes_nothing(variant, photo, grad):
    """But for rounding: attention that somebody looks at is computed with all keys."""
    any_variant = micro_model(variant)
    x = codec.to_tensor(photo, any_variant)
    with torch.set_grad_enabled(grad):
        before = any_variant(x)
        with capture(any_variant, "*") as maps:
            during = any_variant(x)
    assert maps and hooks_of(any_variant) == 0
    assert torch.equal(before["x_hat"], during["x_hat"])
    for name, likelihood in before["likelihoods"].items():
        torch.testing.assert_close(likelihood, during["likelihoods"][name], rtol=1e-4, atol=1e-6)


def test_tiles_are_put_together(model, photo, monkeypatch):
    """Small tiles of heads and queries give the same maps as one piece."""
    x = codec.to_tensor(photo, model)
    with torch.inference_mode():
        with capture(model, "context.*.probs", "h_a.0.scores") as whole:
            model(x)
        monkeypatch.setitem(tiles.ELEMENTS, "cpu", 96 * 30)
        with capture(model, "context.*.probs", "h_a.0.scores") as tiled:
            model(x)
    assert sorted(whole) == sorted(tiled) == ["context.0.probs", "context.1.probs", "h_a.0.scores"]
    for name, map_ in whole.items():
        assert map_.shape == (1, 2, 96, 96)
        torch.testing.assert_close(tiled[name], map_)


def test_points_fit_together(model, photo):
    with torch.inference_mode(), capture(model, "context.1.*") as maps:
        model(codec.to_tensor(photo, model))
    scores, selected, probs = (maps[f"context.1.{p}"] for p in ("scores", "selected", "probs"))
    seen = scores > -torch.inf
    together = maps["context.1.content"] + maps["context.1.position"]
    torch.testing.assert_close(scores[seen], together[seen])
    assert ((probs > 0).sum(-1) <= 6).all() and ((probs > 0) == (selected > -torch.inf)).all()
    torch.testing.assert_close(probs, selected.softmax(-1))


def test_keep_reduces_every_tile(model, photo):
    def keep(tile, queries):
        return torch.cat((tile.amax(-1, keepdim=True), queries.expand(*tile.shape[:2], -1)[..., None]), -1)

    with torch.inference_mode(), capture(model, "context.0.probs", keep=keep) as maps:
        model(codec.to_tensor(photo, model))
    assert maps["context.0.probs"].shape == (1, 2, 96, 2)
    assert torch.equal(maps["context.0.probs"][0, 0, :, 1], torch.arange(96.0))


def test_hooks_are_gone_after_an_exception(model):
    with pytest.raises(RuntimeError, match="stop"), capture(model, "*"):
        assert hooks_of(model) > 0
        raise RuntimeError("stop")
    assert hooks_of(model) == 0


@pytest.mark.parametrize("pattern", ["context.9.probs", "context.0.prob", "g_a.0.probs", ""])
def test_a_pattern_that_matches_nothing(model, pattern):
    possible = r"context\.0 to context\.1, h_a\.0 to h_a\.2.*\.probs"
    with pytest.raises(AttentionError, match=possible), capture(model, "context.*.probs", pattern):
        pass
    assert hooks_of(model) == 0


def test_models_without_attention():
    with pytest.raises(AttentionError, match="no attention"), capture(torch.nn.Linear(2, 2), "*"):
        pass
    names = attention_points(micro_model("parallel", position="none"))
    assert "context.0.content" in names and "context.0.position" not in names
    assert not any(n.startswith("context") for n in attention_points(micro_model("hyperprior")))


# ---- intervene ----


def silent(layer_head):
    return lambda tile, heads, queries: tile * (heads != layer_head)[:, None, None]


@pytest.mark.parametrize("point", ["outputs", "probs"])
@pytest.mark.parametrize("elements", [2**20, 96 * 70])  # in one piece, and in tiles of one head and some queries
def test_a_head_switched_off_is_one_of_the_row_servers(server, model, photo, monkeypatch, elements, point):
    """In bits, of the model's own estimate, here in float64, and of the server's."""
    monkeypatch.setitem(tiles.ELEMENTS, "cpu", elements)
    y, wide = rd.latents_of(model, photo).double(), copy.deepcopy(model).double()
    usual = wide.estimated_bits(y)["y"].sum()
    with intervene(wide, {f"context.1.{point}": silent(1)}):
        without = wide.estimated_bits(y)["y"].sum()
    assert float(without) == pytest.approx(server.total_bits(6, without=(1, 1)), abs=1e-3)
    assert abs(float(without - usual)) > 1
    assert hooks_of(wide) == 0 and torch.equal(wide.estimated_bits(y)["y"].sum(), usual)


def test_tiles_are_numbered_as_they_are_captured(model, photo, monkeypatch):
    """What a function is told of heads and queries fits what stands there, and what it gives is what comes out."""
    x, told = codec.to_tensor(photo, model), []

    def mark(tile, heads, queries):
        told.append(tile.shape[1:3])
        return tile * 0 + heads[:, None, None] + queries[:, None] / 1000

    monkeypatch.setitem(tiles.ELEMENTS, "cpu", 96 * 70)
    with torch.inference_mode(), intervene(model, {"context.*.probs": mark}), capture(model, "context.*.probs") as maps:
        model(x)
    expected = torch.arange(2.0)[:, None, None] + torch.arange(96.0)[:, None] / 1000
    assert len(told) > 4 and len(maps) == 2
    for found in maps.values():
        torch.testing.assert_close(found[0], expected.expand(2, 96, 96))


def test_groups_and_gradients_take_interventions_too(photo):
    model = micro_model("groupedmixer", window=4)
    x = codec.to_tensor(photo, model)
    usual = model(x)["likelihoods"]["y"]
    for name in ("inner.0.probs", "cross.1.scores", "cross.0.outputs", "h_s.0.probs"):
        with intervene(model, {name: lambda tile, heads, queries: tile}):
            assert torch.equal(model(x)["likelihoods"]["y"], usual)
        with intervene(model, {name: lambda tile, heads, queries: tile * (1 + heads)[:, None, None]}):
            assert not torch.equal(model(x)["likelihoods"]["y"], usual)
    with intervene(model, {"cross.*.outputs": silent(0), "cross.1.outputs": silent(1)}):  # in layer 1 both
        one = model(x)["likelihoods"]["y"]
    with torch.no_grad():
        model.context_model.pairs[0].cross.out.weight[:, :12] = 0
        model.context_model.pairs[1].cross.out.weight.zero_()
    torch.testing.assert_close(model(x)["likelihoods"]["y"], one)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda tile, heads, queries: tile + torch.inf, "numbers that are none"),
        (lambda tile, heads, queries: tile[..., :1], r"gave \[1, 2, 96, 1\] for a tile of \[1, 2, 96, 96\]"),
        (lambda tile, heads, queries: None, "gave NoneType"),
        (lambda tile, heads, queries: tile * torch.nan, "numbers that are none"),
        (lambda tile, heads, queries: tile - torch.inf, "left a query no key"),
    ],
)
def test_what_cannot_take_a_tiles_place(change, sentence, model, photo):
    with pytest.raises(AttentionError, match=sentence), intervene(model, {"context.0.scores": change}):
        model(codec.to_tensor(photo, model))
    assert hooks_of(model) == 0
    changes = {"context.0.probs": change, "context.0.value": change}
    with pytest.raises(AttentionError, match=r"no point 'context.0.value'.*\.outputs"), intervene(model, changes):
        pass
    assert hooks_of(model) == 0


# ---- the row server ----


def exact_maps(model, photo, k) -> dict:
    """All maps of a context model as one run over all sites, in float64."""
    context = copy.deepcopy(model.context_model).double()
    for block in context.stack.blocks:
        block.attention.top_k = k
    wide = copy.copy(model)
    wide._modules = {**model._modules, "context_model": context}
    y_hat, _ = model.latents(codec.to_tensor(photo, model))
    with torch.inference_mode(), capture(wide, "context.*") as maps:
        context(y_hat.double())
    return maps


@pytest.mark.parametrize("k", [2, 6, None])
@pytest.mark.parametrize("point", POINTS)
def test_rows_are_those_of_the_whole_map(server, model, photo, k, point):
    maps = exact_maps(model, photo, k)
    for site in (0, 1, 5, 11, 12, 40, server.n - 1):
        rows = server.rows(site, k, point)
        if server.kind == "serial" and site == 0:
            assert np.isnan(rows).all() or not np.isfinite(rows).any() or not rows.any()
            continue
        seen = server.visible(site)
        for layer in range(server.layers):
            theirs = maps[f"context.{layer}.{point}"][0, :, server.origin(site)].numpy()
            used = seen.copy()
            if server.has_context(site):  # the own key has a column of its own, see `rows`
                used[server.origin(site)] &= point not in ("content", "position")
            np.testing.assert_allclose(rows[layer][:, used], theirs[:, used], atol=1e-9)
            assert not np.isfinite(rows[layer][:, ~used]).any() or not rows[layer][:, ~used].any()


def test_serial_row_belongs_to_the_next_latent(photo):
    server = RowServer(micro_model("serial"), photo)
    for site in (1, 2, 12, 13):
        row = server.rows(site, None).sum((0, 1))
        assert (row[:site] > 0).all() and not row[site:].any()
    assert not server.rows(0, None).any() and server.origin(12) == 11 and not server.has_context(0)


def test_parallel_row_sees_the_first_slice_and_itself(photo):
    server = RowServer(micro_model("parallel"), photo)
    rows, columns = np.divmod(np.arange(server.n), server.width)
    first = (rows + columns) % 2 == 1
    row = server.rows(26, None).sum((0, 1))  # row 2, column 2
    assert (row[first] > 0).all() and row[26] > 0 and not np.delete(row, first.nonzero()[0].tolist() + [26]).any()
    assert server.has_context(26) and not server.has_context(27)
    assert (server.decoded(26) == first).all() and not server.decoded(27).any()
    assert len(server.costs(27, 6)[0]) == 0


def test_bits_are_those_of_the_model(server, model, photo):
    k = model.config.top_k
    bits = server.bits(k)
    theirs = rd.bit_maps(model, photo)["y"]  # in float32, where nearly equal scores may let another key in
    assert np.isclose(bits["context"], theirs, rtol=1e-3, atol=1e-2).mean() > 0.97
    assert bits["context"].sum() == pytest.approx(theirs.sum(), rel=1e-3)
    for site in (0, 1, 50):
        row, column = divmod(site, server.width)
        assert float(server.predict([site], k)[2].sum()) == pytest.approx(bits["context"][row, column])
        facts = server.facts(site, k)
        assert facts["bits"] == pytest.approx(bits["context"][row, column])
        assert facts["alone"] == pytest.approx(bits["alone"][row, column])
        assert facts["bits"] == pytest.approx(sum(g["bits"] for g in facts["groups"]))
        assert sum(g["channels"] for g in facts["groups"]) == model.config.M
        if not server.has_context(site) and server.kind == "parallel":
            assert facts["bits"] == pytest.approx(facts["alone"])
    assert server.total_bits(k) == pytest.approx(bits["context"].sum())


@pytest.mark.parametrize("variant", ["serial", "parallel"])
def test_k_and_window_are_those_that_the_model_codes_with(variant, photo):
    model = micro_model(variant)
    model.context_k, model.search_window = 2, 1
    server = RowServer(model, photo)
    assert server.default_k == 2
    for site in (27, 50):
        looked_at = server.rows(site, None).max((0, 1)) > 0
        assert np.array_equal(looked_at, server.visible(site)) and looked_at.sum() <= 9


def test_a_single_latent_without_hyperprior_has_no_context():
    """There is no first slice whose keys could be kept."""
    server = RowServer(micro_model("parallel", hyperprior=False), np.zeros((16, 16, 3), np.uint8))
    assert server.n == 1 and server.bits(None)["context"].shape == (1, 1)
    assert server.rows(0, None).sum() == pytest.approx(server.layers * server.heads)  # its own place alone


@pytest.mark.parametrize("variant", ["serial", "parallel", "context"])
def test_bits_of_a_model_that_is_told_the_rate(variant, photo):
    """They are the model's own at the level that it has, in float64, and fall with the rate."""
    model, sums = aware_model(variant), []
    wide = copy.deepcopy(model).double()
    for level in (2.0, 0.75, 0.0):
        model.level = level + 0.001  # a file says levels in 1/256
        server = RowServer(model, photo)
        model.level = 1.3  # the server keeps its own
        with torch.inference_mode():
            y = model.scaled(model.g_a(codec.to_tensor(photo, model)), level)
        expected = wide.estimated_bits(y.double(), level)["y"][0].numpy()
        bits = server.bits(server.default_k)
        np.testing.assert_allclose(bits["context"], expected, atol=1e-5)
        facts = [server.facts(site, server.default_k) for site in (0, 50)]
        np.testing.assert_allclose([f["bits"] for f in facts], expected.ravel()[[0, 50]], atol=1e-5)
        first = 0 if variant != "parallel" else 1
        assert facts[0]["alone"] == pytest.approx(bits["alone"][0, 0])
        assert (bits["alone"].ravel()[first] == bits["context"].ravel()[first]) == (variant == "parallel")
        sums.append(expected.sum())
        assert server.name == f"untrained {model.config.variant}@{model.gain.lmbda_of(level):.3g}"
    assert sums == sorted(sums, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_model_that_is_told_the_rate_sees_latents_of_the_same_size(kind, photo):
    """And hiding a position costs something there, if some head looks at it, and else nothing."""
    model = aware_model(kind)
    model.level = 0.0
    server = RowServer(model, photo)
    y_hat, _ = model.latents(codec.to_tensor(photo, model), 0.0)
    with capture_input(server.model.context_model.embed) as seen:
        server.rows(50, 6)
    carriers = server.when == 0 if kind == "parallel" else np.arange(96) < 96
    expected = 2 * y_hat[0].flatten(1).T[torch.from_numpy(carriers)]  # the middle of LMBDAS has a gain of 1
    torch.testing.assert_close(seen[0].squeeze(0).float(), expected, rtol=1e-6, atol=1e-6)
    positions, bits = server.costs(50, 6)
    assert len(positions) and np.abs(bits).max() > 1e-3
    rest = np.setdiff1d(np.flatnonzero(server.visible(50)), [*positions, server.origin(50)])[:3]
    usual, hidden = (server.predict([50] * len(rest), 6, hide=hide)[2] for hide in (None, rest.tolist()))
    torch.testing.assert_close(hidden, usual, rtol=0, atol=1e-9)


def test_studies_take_models_that_are_told_the_rate(photo):
    model = aware_model("parallel")
    model.level = 0.5
    table = study.head_profile(model, [photo])
    usual = rd.bit_maps(model, photo)["y"].sum()
    assert np.allclose(100 * table.masked_bits / table.masked_percent, usual, rtol=1e-3)
    assert len(study.attention_against_cost(model, [photo], ks=(6,), queries=2)) == 5


@pytest.mark.parametrize("variant", ["serial", "parallel", "groupedmixer"])
def test_a_reference_says_what_the_context_saves(variant, photo):
    """`alone` are the bits of a trained model without context, of the same latents and at the same level."""
    model, reference = (micro_model(v, lmbdas=LMBDAS) for v in (variant, "hyperprior"))
    model.level, reference.level = 0.5, 2.0
    server = server_of(model, photo, reference)
    assert server.reference_name == "untrained hyperprior@0.02" and reference.level == 2.0
    reference.level = 0.5
    expected = rd.bit_maps(reference, photo)["y"]
    facts = [server.facts(site * server.slices) for site in range(0, server.n, 7)]
    np.testing.assert_allclose([f["alone"] for f in facts], expected.ravel()[::7], rtol=1e-4)
    assert facts[3]["alone"] == pytest.approx(sum(group["alone"] for group in facts[3]["groups"]))
    if server.family == "rows":
        np.testing.assert_allclose(server.bits(6)["alone"], expected, rtol=1e-4)
        assert server.facts(50)["alone"] != pytest.approx(server_of(model, photo).facts(50)["alone"])
    assert server_of(model, photo).reference_name is None
    with pytest.raises(AttentionError, match="hyperprior alone; this model is a parallel"):
        server_of(model, photo, micro_model("parallel", lmbdas=LMBDAS))
    with pytest.raises(AttentionError, match="no reference for untrained .* its transforms are others"):
        server_of(model, photo, micro_model("hyperprior", lmbdas=LMBDAS, seed=1))


def test_predictions_are_what_the_coder_uses(server, model, photo):
    """Means of single latents equal those of the model run with another k, built for it."""
    other = micro_model(server.kind, top_k=3)
    y_hat, z = model.latents(codec.to_tensor(photo, model))
    known, seen, latents = y_hat[0].flatten(1).T, {}, None
    with torch.inference_mode(), Exact():
        steps = other.entropy_model().steps(*y_hat.shape[-2:], other.h_s(model.z_prior.quantize_z(z)))
        while len(seen) < len(known):
            step = steps.send(latents)
            seen.update(zip(step.sites.tolist(), step.means.numpy(), strict=True))
            latents = known[step.sites]
    for site in (0, 1, 14, 60):
        np.testing.assert_allclose(server.predict([site], 3)[0][0], seen[site], atol=1 / 200)


def test_costs_are_those_of_hiding_one_by_one(server):
    site = 50
    positions, bits = server.costs(site, 6)
    attended = (server.rows(site, 6) > 0).any((0, 1))
    attended[server.origin(site)] = False
    assert (positions == attended.nonzero()[0]).all()
    usual = server.predict([site], 6)[2].sum()
    for position, cost in list(zip(positions, bits, strict=True))[:4]:
        hidden = server.predict([site], 6, hide=[int(position)])[2].sum()
        assert float(hidden - usual) == pytest.approx(cost, abs=1e-9)
    unattended = np.flatnonzero(server.visible(site) & ~attended)[:3]
    unattended = unattended[unattended != server.origin(site)]
    if len(unattended):  # hiding what no head attends to changes nothing
        hidden = server.predict([site] * len(unattended), 6, hide=unattended.tolist())[2].sum(1)
        np.testing.assert_allclose(hidden, float(usual), atol=1e-9)


@pytest.mark.parametrize("k", [3, None])
def test_costs_of_many_are_those_of_each(server, k):
    """Also in an order that is not that of the grid, and of latents without context."""
    sites = [50, 0, 95, 27, 14, 1]
    found = list(server.many_costs(sites, k))
    assert [site for site, *_ in found] == sites
    for site, rows, positions, bits in found:
        np.testing.assert_allclose(rows, server.rows(site, k), atol=1e-12)
        if not server.has_context(site):
            assert len(positions) == len(bits) == 0
            continue
        attended = (rows > 0).any((0, 1))
        attended[server.origin(site)] = False
        assert np.array_equal(positions, attended.nonzero()[0])
        usual = server.predict([site], k)[2].sum()
        hidden = [server.predict([site], k, hide=[position])[2].sum() for position in positions[::5]]
        np.testing.assert_allclose(bits[::5], np.array(hidden) - float(usual), atol=1e-9)


def test_an_answer_is_the_same_however_many_are_asked():
    """In the padding latents repeat, and with them scores, of which rounding would keep one or the other."""
    server = RowServer(load_model("blocks-serial"), sample_picture("chelsea").crop((0, 0, 210, 150)))
    sites = range(150, 192)
    together = np.concatenate([lines[:, 0] for _, _, lines in server.many(sites, 16)])
    assert np.allclose(together, [server.facts(site, 16)["bits"] for site in sites], atol=1e-6)


def test_another_k_is_kept(server):
    first, held = server.rows(50, 6), server.keys_and_values(6)
    server.rows(50, None)
    assert server.keys_and_values(6) is held and np.array_equal(server.rows(50, 6), first)
    for k in range(7, 7 + K_HELD):
        server.rows(50, k)
    assert server.keys_and_values(6) is not held and np.array_equal(server.rows(50, 6), first)


def test_a_silent_head_is_silent(server, model, photo):
    """Zeroing a head by hook equals zeroing its columns of the output matrix."""
    cost = server.total_bits(6, without=(1, 0))
    usual, width = server.total_bits(6), server.config.dim // server.heads
    with torch.no_grad():
        model.context_model.stack.blocks[1].attention.out.weight[:, :width] = 0
    assert RowServer(model, photo).total_bits(6) == pytest.approx(cost) and usual != pytest.approx(cost)


@pytest.mark.parametrize("call", [lambda s: s.rows(96, 6), lambda s: s.rows(-1, 6), lambda s: s.rows(3, 0)])
def test_what_does_not_exist(server, call):
    with pytest.raises(AttentionError):
        call(server)


def test_sentences(server, photo):
    with pytest.raises(AttentionError, match="layers 0 to 1"):
        server.check_layer(2)
    with pytest.raises(AttentionError, match="heads 0 to 1"):
        server.total_bits(6, (0, 5))
    with pytest.raises(AttentionError, match="hyperprior alone"):
        RowServer(micro_model("hyperprior"), photo)
    with pytest.raises(AttentionError, match="no attention"):
        RowServer(torch.nn.Linear(2, 2), photo)


def test_context_only_and_released_presets_work(photo):
    for model in (
        micro_model("context"),
        micro_model("parallel", "official"),
        micro_model("serial", position="absolute"),
    ):
        server = RowServer(model, photo)
        np.testing.assert_allclose(server.rows(50, 6).sum(-1), 1)
        assert np.isfinite(server.facts(0, 6)["bits"])


# ---- the studies ----


def test_head_profile(model, photo):
    table = study.head_profile(model, [photo])
    assert len(table) == 4 and set(zip(table.layer, table["head"], strict=True)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert (table.entropy_bits <= np.log2(6) + 1e-9).all() and (table.entropy_bits >= 0).all()
    assert ((table.share_own <= table.share_diamond) & (table.share_diamond + table.share_far <= 1 + 1e-9)).all()
    assert table.masked_bits.abs().max() > 0
    server = RowServer(model, photo)
    row = np.mean([server.rows(s, 6)[1, 0] @ study.distances(server, [s])[0] for s in server.predicted()])
    assert table.distance_sites[2] == pytest.approx(row)
    alike = [server.visible(s) / server.visible(s).sum() @ study.distances(server, [s])[0] for s in server.predicted()]
    assert np.allclose(table.uniform_distance_sites, np.mean(alike))


def test_attention_against_cost(model, photo):
    table = study.attention_against_cost(model, [photo], ks=(2, 6, None), queries=4, seed=1)
    assert len(table) == 3 * 5 and table["k"].isna().sum() == 5
    assert table.rho.dropna().between(-1, 1).all() and (table.positions > 0).all()
    again = study.attention_against_cost(model, [photo], ks=(2, 6, None), queries=4, seed=1)
    assert table.equals(again)


def test_correlations_are_means_over_latents(server, model, photo):
    """Every number from the rows and costs of the sampled latents, here all of them."""
    scipy = pytest.importorskip("scipy.stats")
    small = photo.crop((0, 0, 64, 64))
    server = RowServer(model, small)
    table = study.attention_against_cost(model, [small], ks=(6,), queries=16).set_index(["layer", "head"])
    rho, near, costs = [], [], []
    for site in server.predicted():
        positions, bits = server.costs(site, 6)
        costs.append(bits.mean() if len(bits) else np.nan)
        if len(positions) > 2:
            far = study.distances(server, [site])[0, positions]
            rho.append(scipy.spearmanr(server.rows(site, 6)[1, 0, positions], bits).statistic)
            near.append(scipy.spearmanr(-far, np.abs(bits)).statistic)
    found = table.loc[(1, 0)]
    assert found.rho == pytest.approx(np.nanmean(rho)) and found.rho_std == pytest.approx(np.nanstd(rho))
    assert found.latents == np.isfinite(rho).sum()
    assert found.rho_magnitude_nearness == pytest.approx(np.nanmean(near))
    assert found.cost_bits == pytest.approx(np.nanmean(costs))


def test_saved_with_provenance(tmp_path, photo_folder, monkeypatch, capsys):
    for kind in KINDS:
        save_weights(micro_model(kind), tmp_path / f"{kind}.safetensors", {})
        study.main(str(tmp_path / f"{kind}.safetensors"), photo_folder, limit=1, queries=2, out=tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())["models"]
    assert sorted(saved) == ["parallel", "serial"] and "NaN" not in (tmp_path / "a.json").read_text()
    assert saved["serial"]["images"] == ["astronaut"] and len(saved["serial"]["provenance"]["weights_sha256"]) == 64
    tables = study.read_results(tmp_path / "a.json")
    assert len(tables["serial"]["heads"]) == 4 and len(tables["serial"]["explained"]) == 5 * 5
