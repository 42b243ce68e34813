"""What a context model may know, by perturbation: a latent is changed, and what must not move stays bit-equal."""

import contextlib

import pytest
import torch
from conftest import micro_model

from entroformer_lib.models.context import Gaps, first_slice

H, W = 6, 8


def parameters(model, y_hat):
    """means and scales [2, M, h w] with a fixed hyperprior."""
    hyper = torch.ones(1, model.config.dim, H, W) if model.config.hyperprior else None
    return torch.stack(model.distributions(y_hat, hyper))[:, 0].flatten(2)


def test_one_way_context_is_causal():
    """One picture sees its context one way, the other both ways: in the first nothing after a site moves it."""
    model = micro_model("parallel")
    y_hat = torch.randn(1, 24, H, W).mul(4).round()
    one_way = torch.tensor([True, False])
    with torch.no_grad():
        before = model.context_model(y_hat.expand(2, -1, -1, -1), Gaps(one_way=one_way)).flatten(2)
        assert torch.equal(before[1], model.context_model(y_hat)[0].flatten(1))
        for i in first_slice(H, W).flatten().nonzero()[:, 0].tolist():
            changed = y_hat.clone()
            changed.view(1, 24, -1)[:, :, i] += 3
            after = model.context_model(changed.expand(2, -1, -1, -1), Gaps(one_way=one_way)).flatten(2)
            assert torch.equal(after[0, :, :i], before[0, :, :i]), i
            if 0 < i < H * W - 1:
                assert not torch.equal(after[0, :, i:], before[0, :, i:])
                assert not torch.equal(after[1, :, :i], before[1, :, :i])


@pytest.mark.parametrize("variant", ["serial", "context"])
@pytest.mark.parametrize("position", ["diamond", "none", "absolute", "relative_1d", "relative_2d"])
def test_serial_is_causal(variant, position):
    model = micro_model(variant, position=position)
    y_hat = torch.randn(1, 24, H, W).mul(4).round()
    with torch.no_grad():
        before = parameters(model, y_hat)
        for i in (0, 1, 7, 8, 20, H * W - 1):
            changed = y_hat.clone()
            changed.view(1, 24, -1)[:, :, i] += 3
            after = parameters(model, changed)
            assert torch.equal(after[:, :, : i + 1], before[:, :, : i + 1]), i  # up to and including i
            if i + 1 < H * W:
                assert not torch.equal(after[:, :, i + 1], before[:, :, i + 1]), i  # and the next one does see it


def test_no_leak_between_the_slices():
    model = micro_model("parallel")
    first = first_slice(H, W).flatten()
    y_hat = torch.randn(1, 24, H, W).mul(4).round()
    with torch.no_grad():
        before = parameters(model, y_hat)
        for i in range(0, H * W, 5):
            changed = y_hat.clone()
            changed.view(1, 24, -1)[:, :, i] += 3
            after = parameters(model, changed)
            if first[i]:  # seen by second-slice sites, by no first-slice site
                assert torch.equal(after[:, :, first], before[:, :, first])
                assert not torch.equal(after[:, :, ~first], before[:, :, ~first])
            else:  # seen by nobody
                assert torch.equal(after, before)


def test_first_slice_has_no_context_feature():
    model = micro_model("parallel")
    feature = model.context_model(torch.randn(1, 24, H, W))
    assert feature[:, :, first_slice(H, W)].abs().max() == 0
    assert feature[:, :, ~first_slice(H, W)].abs().min() > 0


def test_second_slice_sites_are_seen_by_themselves_only():
    model = micro_model("parallel", top_k=None)
    seen = []
    model.context_model.stack.blocks[0].attention.scores.register_forward_hook(lambda m, a, out: seen.append(out))
    model.context_model(torch.randn(1, 24, H, W))
    visible = (seen[0] > -torch.inf)[0, 0]  # [query, key]
    first = first_slice(H, W).flatten()
    assert torch.equal(visible, first[None, :] | torch.eye(H * W).bool())


def test_first_slice_is_where_row_plus_column_is_odd():
    assert first_slice(2, 3).tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("serial", {}),
        ("parallel", {}),
        ("parallel", {"position": "absolute"}),
        ("parallel", {"position": "absolute", "context_layers": 1}),
        ("cnn", {}),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 6)])
def test_coding_steps_see_what_the_forward_pass_sees(variant, fields, size):
    """The features handed to the coder, step by step, equal those of one pass over the known latents."""
    model = micro_model(variant, **fields).double()
    y_hat = torch.randn(1, 24, *size, dtype=torch.float64).mul(4).round()
    seen, asked = torch.zeros(1, 24, size[0] * size[1], dtype=torch.float64), []
    with torch.no_grad(), contextlib.suppress(StopIteration):
        steps, latents = model.context_model.steps(*size), None
        while True:
            sites, feature = steps.send(latents)
            if feature is not None:
                seen[:, :, sites] = feature[..., 0]
            asked += sites.tolist()
            latents = y_hat[0].flatten(1).T[sites]
    with torch.no_grad():
        torch.testing.assert_close(seen.view(1, 24, *size), model.context_model(y_hat))
    assert sorted(asked) == list(range(size[0] * size[1]))


@pytest.mark.parametrize("variant", ["serial", "parallel", "cnn"])
def test_random_mask_hides_what_it_says(variant):
    """Pretraining: hidden latents influence nothing; nobody is predicted from a context that contains itself."""
    model = micro_model(variant)
    kept = torch.rand(1, 1, H, W) < 0.5
    y_hat = torch.randn(1, 24, H, W)
    with torch.no_grad():
        feature = model.context_model(y_hat, Gaps(kept))
        assert torch.equal(model.context_model(y_hat + 5 * ~kept, Gaps(kept)), feature)
        from_hyperprior_alone = ~kept if variant != "parallel" else kept
        assert (feature * from_hyperprior_alone).abs().max() == 0
        for i in range(0, H * W, 7):
            changed = y_hat.clone()
            changed.view(1, 24, -1)[:, :, i] += 3
            moved = (model.context_model(changed, Gaps(kept)) - feature).view(24, -1)[:, i]
            assert moved.abs().max() == 0


@pytest.mark.parametrize("variant", ["serial", "parallel", "cnn"])
def test_a_missing_latent_moves_nothing_but_is_predicted(variant):
    model = micro_model(variant)
    y_hat, missing = torch.randn(1, 24, H, W).mul(4).round(), torch.rand(1, 1, H, W) < 0.3
    with torch.no_grad():
        before = model.context_model(y_hat, Gaps(missing=missing))
        assert torch.equal(model.context_model(y_hat + 5 * missing, Gaps(missing=missing)), before)
        assert not torch.equal(model.context_model(y_hat), before)
