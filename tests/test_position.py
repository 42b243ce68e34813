import pytest
import torch

from entroformer_lib.exact.arithmetic import Exact
from entroformer_lib.models import position
from entroformer_lib.models.position import RelativePosition, grid_sites, sinusoidal_positions

KINDS = ("relative_1d", "relative_2d", "diamond")


def naive_vector(relative: RelativePosition, dy: int, dx: int) -> torch.Tensor:
    """p of one offset, from the definitions in the paper and the class's docstring."""
    h = relative.radius
    if relative.kind == "diamond":
        inside = [(a, b) for a in range(-h, h + 1) for b in range(-h, h + 1) if abs(a) + abs(b) <= h]
        return relative.vectors[inside.index((dy, dx)) if abs(dy) + abs(dx) <= h else len(inside)]
    dy, dx = max(-h, min(h, dy)), max(-h, min(h, dx))
    if relative.kind == "relative_1d":
        return relative.rows[dy + h] + relative.columns[dx + h]
    return relative.vectors[(dy + h) * (2 * h + 1) + dx + h]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [1, 3])
def test_gathered_positions_equal_a_double_loop(kind, radius):
    relative = RelativePosition(kind, radius, head_dim=5)
    sites = grid_sites(4, 6)
    q = torch.randn(2, 3, len(sites), 5)
    naive = torch.zeros(2, 3, len(sites), len(sites))
    for i, (r, c) in enumerate(sites.tolist()):
        for j, (s, t) in enumerate(sites.tolist()):
            naive[:, :, i, j] = q[:, :, i] @ naive_vector(relative, s - r, t - c)
    torch.testing.assert_close(relative(q, sites, sites), naive)


def test_both_ways_through_the_diamond_give_the_same_bits(monkeypatch):
    """Also for keys that are a part of the grid in any order, and queries that are not among them."""
    relative = RelativePosition("diamond", 3, head_dim=6)
    sites = grid_sites(7, 9)[torch.randperm(63)]
    for keys, queries in [(sites, sites), (sites[:30], sites[30:]), (sites[:27], sites[5:20])]:
        q = torch.randn(2, 2, len(queries), 6)
        ways = []
        for few in (0, 99):
            monkeypatch.setattr(position, "FEW_QUERIES", few)
            ways.append(relative(q, queries, keys))
        assert torch.equal(*ways)


def test_diamond_has_26_vectors_at_radius_3():
    relative = RelativePosition("diamond", 3, head_dim=4)
    assert relative.table().shape == (26, 4)
    assert len(relative.buckets(grid_sites(9, 9), grid_sites(9, 9)).unique()) == 26


def test_every_vector_gets_a_gradient():
    for kind in KINDS:
        relative = RelativePosition(kind, 2, head_dim=4)
        sites = grid_sites(8, 8)
        relative(torch.randn(1, 1, 64, 4), sites, sites).square().sum().backward()
        for parameter in relative.parameters():
            assert (parameter.grad.abs().sum(-1) > 0).all(), kind


def test_sites_are_in_raster_order():
    assert grid_sites(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_sinusoidal_positions_tell_all_sites_apart():
    code = sinusoidal_positions(grid_sites(12, 16), 24)
    assert code.shape == (192, 24)
    assert torch.cdist(code, code).add(torch.eye(192) * 9).min() > 0.1


def test_sinusoidal_positions_are_sines_and_cosines():
    sites = torch.tensor([[0, 1], [7, 4095], [4096, 300]])
    angles = sites[..., None] * 10000 ** -(torch.arange(6, dtype=torch.float64) / 6)  # [3, 2, 6]
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)
    assert torch.equal(sinusoidal_positions(sites, 24), waves.float())
    with Exact():
        exact = sinusoidal_positions(sites, 24)
    assert (exact - waves).abs().max() <= 2**-17 + 1e-12
    assert torch.equal(exact * 2**16 % 1, torch.zeros(3, 24))


@pytest.mark.parametrize("kind", ["diamond", "relative_1d", "relative_2d"])
def test_looking_up_equals_the_tensor_of_all_pairs(kind):
    """Values and gradients, against equation 4 written out: n^2 vectors, one for every pair."""
    relative, sites = RelativePosition(kind, 2, 8).double(), grid_sites(5, 7)
    q, weights = torch.randn(2, 3, 20, 8).double(), torch.randn(2, 3, 20, 35).double()
    results = []

    def all_pairs(q, queries, keys):
        vectors = relative.table()[relative.buckets(queries, keys)]  # [q, n, d]
        return torch.einsum("bhqd,qnd->bhqn", q, vectors.to(q.dtype))

    for way in (relative, all_pairs):
        relative.zero_grad()
        out = way(q, sites[4:24], sites)
        (out * weights).sum().backward()
        results.append((out, [parameter.grad for parameter in relative.parameters()]))
    torch.testing.assert_close(results[0], results[1])
