"""Muon: its steps are orthogonal, its other half is Adam, and every parameter has one group."""

import pytest
import torch
from conftest import MICRO

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.models.config import named_config
from entroformer_lib.training import optimizer as ours
from entroformer_lib.training.optimizer import Muon, build_optimizer, learning_rate_factor, orthogonal


def test_orthogonal_keeps_the_directions_and_evens_their_lengths():
    torch.manual_seed(0)
    for shape in ((8, 40), (40, 8), (12, 12)):
        u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        skewed = u @ torch.diag(torch.logspace(0, -1, u.size(1))) @ vt  # singular values from 1 to 0.1
        out = orthogonal(skewed[None])[0]
        inside = u.T @ out @ vt.T  # diagonal where the singular directions are kept
        assert (inside - torch.diag(inside.diag())).abs().max() < 0.1
        assert inside.diag().min() > 0.6 and inside.diag().max() < 1.3


def test_batched_equals_one_by_one():
    matrices = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0))
    together = orthogonal(matrices)
    assert torch.allclose(together, torch.cat([orthogonal(m[None]) for m in matrices]), atol=0.02)  # bfloat16


def test_the_rest_is_adam():
    torch.manual_seed(0)
    start, target = torch.randn(7), torch.randn(7)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    muon = Muon([{"params": [ours]}], lr=0.1)
    adam = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(20):
        for p, optimizer in ((ours, muon), (theirs, adam)):
            optimizer.zero_grad()
            (p - target).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_states_that_count_steps_in_whole_numbers_go_on():
    """Checkpoints of earlier versions have them."""
    ends = []
    for convert in (lambda step: step, int):
        p = torch.ones(3, requires_grad=True)
        muon = Muon([{"params": [p]}], lr=0.1)
        for i in range(4):
            p.grad = torch.tensor([1.0, -2.0, 0.5]) * (i + 1)
            muon.step()
            state = muon.state_dict()
            state["state"][0]["step"] = convert(state["state"][0]["step"])
            muon.load_state_dict(state)
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_every_parameter_is_in_one_group():
    model = Entroformer(named_config("tiny-parallel", **MICRO))
    groups = build_optimizer(model, "muon", 1e-3).param_groups
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    orthogonal_ones = {id(p) for group in groups if group["orthogonal"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in orthogonal_ones}
    assert "g_a.0.weight" in names and "h_s.embed.weight" in names
    assert not any("z_prior" in name or "norm" in name or "positions" in name for name in names)
    assert [g["lr"] for g in groups if g["fixed"]] == [1e-3]


def test_queries_and_keys_move_as_far_as_values():
    """They share a matrix, and their gradients are far smaller."""
    torch.manual_seed(0)
    model = Entroformer(named_config("tiny-parallel", **MICRO))
    optimizer = build_optimizer(model, "muon", 1e-3)
    qkv = model.context_model.stack.blocks[0].attention.qkv.weight
    before = qkv.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    qkv.grad = torch.randn_like(qkv)
    qkv.grad[: 2 * len(qkv) // 3] *= 1e-4
    optimizer.step()
    moved = [part.norm() for part in (qkv.detach() - before).chunk(3)]
    assert max(moved) < 1.1 * min(moved)


def test_a_model_without_attention_is_moved():
    model = Entroformer(named_config("tiny-minnen", **MICRO))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.h_a[0].weight.detach().clone()
    build_optimizer(model, "muon", 1e-3).step()
    assert not torch.equal(model.h_a[0].weight, before)


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (False, True), (True, True)])
def test_products_are_in_a_type_that_the_processor_multiplies(amx, avx512, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert ours.quick_type(torch.device("cpu")) == (torch.bfloat16 if amx or avx512 else torch.float32)
    assert ours.quick_type(torch.device("cuda")) == torch.bfloat16


def test_schedules_that_are_ours():
    linear = [learning_rate_factor(s, 1000, schedule="linear") for s in range(1000)]
    assert linear[0] == 1 / 50 and linear[49] == linear[400] == 1
    assert [linear[s] for s in (700, 850, 999)] == pytest.approx([0.5, 0.25, 1 / 600])
    constant = [learning_rate_factor(s, 100_000, schedule="constant") for s in (0, 249, 499, 99_999)]
    assert constant == [1 / 500, 0.5, 1, 1]
