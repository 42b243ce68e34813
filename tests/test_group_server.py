"""The explorer of a GroupedMixer: rows and groups are those of the model."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from conftest import LMBDAS, aware_model, micro_model
from test_explorer import stored

from entroformer_lib import cli
from entroformer_lib.codec import codec
from entroformer_lib.errors import AttentionError
from entroformer_lib.explorer.answers import Answers
from entroformer_lib.explorer.page import explorer_page
from entroformer_lib.inspection.capture import capture
from entroformer_lib.inspection.group_server import GroupServer, server_of
from entroformer_lib.inspection.panels import attention_panel, every_head
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.models.groupedmixer import split
from entroformer_lib.studies import rate_distortion as rd
from entroformer_lib.views import attention_figures
from entroformer_lib.weights.zoo import save_weights

WINDOW = 4  # so that a group of 4 x 6 has several


def grouped(**overrides):
    return micro_model("groupedmixer", window=WINDOW, **overrides)


@pytest.fixture(scope="module")
def server(photo):
    return GroupServer(grouped(), photo)


def wide_run(model, photo):
    """A float64 copy of the model and its y_hat and hyperprior feature, by the model's own methods."""
    y_hat, z = model.latents(codec.to_tensor(photo, model))
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        rate = wide.rate()
        hyper = wide.hyper_synthesis(model.z_prior.quantize_z(z).double(), rate)
    return wide, y_hat.double().clone(), hyper.clone(), rate


# ---- the server ----


@pytest.mark.parametrize("counts", [(3, 2, 2), (2, 3, 1)])  # 3 phases do not divide 8 rows
@pytest.mark.parametrize("order", ["channels", "sites"])
def test_rows_are_what_the_prediction_depends_on(counts, order, photo):
    """With one pair of mixers and without the cross mixer, the gradient of a prediction lies on the sites of its row,
    in the channel slice of the group before."""
    model = grouped(context_layers=1, cross=False, groups=counts, group_order=order)
    server = GroupServer(model, photo)
    assert server.cross is None
    wide, y_hat, hyper, _ = wide_run(model, photo)
    y_hat.requires_grad_()
    means, _ = wide.distributions(y_hat, hyper)
    m = model.config.M // counts[0]
    for site in (0, 1, 15, 40, 95):
        for s in range(counts[0]):
            query = server.query(site, s)
            (slope,) = torch.autograd.grad(
                means[0, s * m : (s + 1) * m].flatten(1)[:, site].sum(), y_hat, retain_graph=True
            )
            moved = slope[0].abs().view(counts[0], m, -1).amax(1) > 1e-12  # [k_c, n]
            row = server.rows(query)
            assert row.shape == (1, 2, server.n) and (row.sum(-1) <= 1 + 1e-6).all()
            group = server.step(query)
            assert server.order[group][0] == s and server.has_context(query) == (group > 0)
            if group == 0:
                assert not moved.any() and row.sum() == pytest.approx(2) and server.origin(query) == site
                continue
            before = server.order[group - 1][0]
            assert not moved[[i for i in range(counts[0]) if i != before]].any()
            assert np.array_equal(moved[before].numpy(), (row > 0).any((0, 1)))
            assert row[0, :, server.origin(query)].min() > 0 or counts[1] == 3
            assert server.decoded(query)[(row > 0).any((0, 1))].all()


def test_rows_and_groups_are_those_of_the_whole_run(server, photo):
    """Windows taken apart by the places' coordinates."""
    wide, y_hat, hyper, _ = wide_run(grouped(), photo)
    with torch.inference_mode(), capture(wide, "*.probs") as maps:
        wide.distributions(y_hat, hyper)
    sites = split(torch.arange(96.0).view(1, 1, 8, 12).repeat(1, 3, 1, 1), (3, 2, 2))[0, ..., 0].long()  # [G, places]
    for group, place in ((0, 0), (1, 7), (6, 23), (11, 12)):
        query = server.query(int(sites[group, place]), server.order[group][0])
        assert (server.step(query), server.place(query)) == (group, place)
        assert server.origin(query) == sites[max(group - 1, 0), place]
        found = server.rows(query)
        for layer in (0, 1):
            shift = WINDOW // 2 * layer
            down, right = (v + shift for v in np.divmod(np.arange(24), 6))
            across = -(-(6 + shift) // WINDOW)
            window = down // WINDOW * across + right // WINDOW
            inside = down % WINDOW * WINDOW + right % WINDOW
            count = len(maps[f"inner.{layer}.probs"]) // 12
            rows = maps[f"inner.{layer}.probs"][group * count + window[place], :, inside[place]].numpy()  # [heads, 16]
            expected = np.zeros((2, 96))
            near = window == window[place]
            expected[:, sites[max(group - 1, 0)].numpy()[near]] = rows[:, inside[near]]
            np.testing.assert_allclose(found[layer], expected, atol=1e-6)
        groups = server.groups(query)
        cross = torch.stack([maps[f"cross.{layer}.probs"][place] for layer in (0, 1)]).numpy()
        np.testing.assert_allclose(groups, cross, atol=1e-6)
        assert not groups[..., np.triu_indices(12, 1)[0], np.triu_indices(12, 1)[1]].any()
        np.testing.assert_allclose(groups.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("aware", [False, True])
def test_bits_are_those_of_the_model(aware, photo):
    model = aware_model("groupedmixer", window=WINDOW) if aware else grouped()
    for level in (0.5, 2.0) if aware else (None,):
        if aware:
            model.level = level
        server = GroupServer(model, photo)
        wide, y_hat, hyper, rate = wide_run(model, photo)
        with torch.inference_mode():
            means, scales = wide.distributions(y_hat, hyper, rate=rate)
            expected = -wide.gaussian(y_hat, means, scales).log2()[0]  # [M, h, w]
        np.testing.assert_allclose(server.bits(), expected.sum(0), atol=1e-6)
        np.testing.assert_allclose(server.bits(), rd.bit_maps(model, photo)["y"], rtol=1e-3, atol=1e-2)
        site, s = 50, 2
        facts = server.facts(server.query(site, s))
        assert facts["bits"] == pytest.approx(float(expected.flatten(1)[:, site].sum())) and facts["slice"] == s
        for i, group in enumerate(facts["groups"]):
            part = slice(8 * i, 8 * i + 8)
            assert group["bits"] == pytest.approx(float(expected[part].flatten(1)[:, site].sum()))
            assert group["mean"] == pytest.approx(float(means[0, part].flatten(1)[:, site].square().mean().sqrt()))
            assert server.order[group["group"]][0] == i


def test_batches_are_the_single_answers(server):
    queries = [0, 1, 2, 130, 287]
    ((part, rows, lines),) = server.many(queries)
    for i, query in enumerate(queries):
        assert part[i] == query and np.array_equal(rows[i], server.rows(query))
        facts = server.facts(query)
        assert lines[i, 0] == pytest.approx(facts["bits"]) and np.isnan(lines[i, 1])
        assert lines[i, 2::5].tolist() == [g["value"] for g in facts["groups"]]
        assert lines[i, 5::5].tolist() == [g["bits"] for g in facts["groups"]]


def test_each_model_gets_its_server(server, photo):
    assert isinstance(server_of(grouped(), photo), GroupServer)
    assert isinstance(server_of(micro_model("serial"), photo), RowServer)
    with pytest.raises(AttentionError, match="hyperprior alone"):
        server_of(micro_model("hyperprior"), photo)
    with pytest.raises(AttentionError, match="no inner-group mixers"):
        server_of(grouped(inner="none"), photo).rows(0)
    with pytest.raises(AttentionError, match="parallel Entroformer; only GroupedMixers"):
        GroupServer(micro_model("parallel"), photo)
    with pytest.raises(AttentionError, match="no attention"):
        server_of(torch.nn.Linear(2, 2), photo)
    with pytest.raises(AttentionError, match="no latent 96; the grid has 8 x 12"):
        server.rows(96 * 3)
    with pytest.raises(AttentionError, match="slice 3; there are 0 to 2"):
        server.query(0, 3)
    with pytest.raises(AttentionError, match="no cross mixers"):
        GroupServer(grouped(cross=False), photo).groups(5)


# ---- panels and answers ----


def test_panels(server):
    query = server.query(5 * server.width + 7, 2)
    inner = attention_panel(server, query, 1, 0)
    assert np.array_equal(inner.values.ravel(), server.rows(query)[1, 0]) and not inner.selected.any()
    assert inner.query == (5, 7) and inner.origin == divmod(server.origin(query), server.width)
    panels = every_head(server, query, 1)
    shown = attention_figures.attention_maps(server.picture, panels).axes[: len(panels)]
    for axis, panel in zip(shown, panels, strict=True):
        assert axis.get_title().startswith(panel.title)
        assert axis.images[-1].get_array().shape[:2] == panel.values.shape


def test_answers_beside_another_model(photo, server):
    answers = Answers(RowServer(micro_model("parallel"), photo), server)
    meta = json.loads(json.dumps(answers.meta()))
    one, grouped = meta["models"]
    assert grouped["counts"] == [3, 2, 2] and one["counts"] is None and grouped["slices"] == 3 and not meta["costs"]
    assert len(grouped["steps"]) == 3 * server.n and max(grouped["steps"]) == 11
    bits = answers.answer("overview", 1)["bits"]
    np.testing.assert_allclose(bits.reshape(-1, 3).sum(1), server.bits().ravel(), rtol=1e-5)
    query = server.query(67, 2)
    cross = answers.answer("cross", 1, query)["probs"]
    np.testing.assert_allclose(cross, server.groups(query).ravel(), rtol=1e-6)


# ---- the page ----


@pytest.fixture(scope="module")
def page(server):
    return explorer_page(server, "a cat")


def test_page_in_words(page):
    assert "96 latents x 3 channel slices x 2 layers x 2 heads; " in page.in_words() and "cost" not in page.in_words()
    assert page.holds in page.text


def test_page_without_cross_mixers(photo):
    meta, _ = stored(explorer_page(GroupServer(grouped(cross=False), photo)))
    assert not meta["models"][0]["cross"] and meta["stored"]["cross"] is None


def test_a_mixer_that_takes_the_top_k_has_rows_and_a_page(photo):
    server = GroupServer(grouped(inner="top_k", top_k=3), photo)
    query = server.query(50, 1)
    assert ((server.rows(query) > 0).sum(-1) == 3).all() and server.decoded(query)[server.rows(query)[1, 0] > 0].all()
    meta, data = stored(explorer_page(server))
    counts = np.frombuffer(data, "<u2", 96 * 3 * 4, meta["stored"]["sections"][0]["counts"])
    assert set(counts) == {3}


def test_explore_writes_a_page_of_a_groupedmixer(tmp_path, monkeypatch, photo, capsys):
    model = grouped(lmbdas=LMBDAS)
    save_weights(model, tmp_path / "mixer.safetensors", {})
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    photo.crop((0, 0, 70, 64)).save(tmp_path / "small.png")
    words = ["entroformer", "explore", tmp_path / "small.png", "--model", "mixer@0.02", "-o", tmp_path / "page.html"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert cli.main() == 0
    assert "32 latents x 3 channel slices" in capsys.readouterr().out
    meta, _ = stored(type("Text", (), {"text": (tmp_path / "page.html").read_text()}))
    assert (
        meta["models"][0]["name"] == "mixer@0.02"
        and meta["models"][0]["kind"] == "grouped"
        and meta["models"][0]["slices"] == 3
    )
