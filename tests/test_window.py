"""A search window: what it means, that pieces and exact loops mean the same, that a file says it."""

import pytest
import torch
from conftest import MICRO, micro_model
from test_cli import call

from entroformer_lib.codec import codec
from entroformer_lib.codec.container import Container
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import BitstreamError, ConfigError
from entroformer_lib.exact import arithmetic, ranked
from entroformer_lib.exact.arithmetic import Exact
from entroformer_lib.models.attention import Stack, UpToItself
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.models.position import grid_sites
from entroformer_lib.tiles import Tiles, queries_with_keys
from entroformer_lib.weights.zoo import weights_digest

SITES = grid_sites(19, 23)
NEAR = (SITES[:, None] - SITES).abs().amax(-1) <= 3


def stack_with(window, **changes) -> Stack:
    torch.manual_seed(1)
    c = named_config("tiny-serial", **{**MICRO, **changes})
    stack = Stack(c, 2, c.top_k, c.radius).eval().requires_grad_(False)
    for parameter in stack.parameters():
        parameter.mul_(5 if parameter.dim() > 1 else 1)
    for block in stack.blocks:
        block.attention.window = window
    return stack


@pytest.fixture
def x():
    torch.manual_seed(2)
    x = torch.randn(1, len(SITES), MICRO["dim"])
    x[:, 100:200] = x[0, 0]  # a flat part
    return x


CHANGES = [{"top_k": 4}, {"top_k": None}, {"top_k": 4, "position": "relative_2d"}, {"top_k": 4, "position": "none"}]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_is_a_mask(causal, changes, x):
    """By plain attention, in pieces, and exactly by loops and by tensors; exact ones are equal to the last bit."""
    whole, windowed = stack_with(None, **changes), stack_with(3, **changes)
    causally = UpToItself(len(SITES))

    def near(i):
        return NEAR[i] & causally(i) if causal else NEAR[i]

    seen = causally if causal else None
    expected = whole(x, SITES, visible=near)
    assert torch.allclose(windowed(x, SITES, visible=seen), expected, atol=1e-5)
    with Tiles():
        assert torch.allclose(windowed(x, SITES, visible=seen), expected, atol=1e-5)
    with torch.inference_mode(), Exact():
        assert torch.equal(windowed(x, SITES, visible=seen), whole(x, SITES, visible=near))


def test_loops_and_tensors_agree_in_a_window(x, monkeypatch):
    stack, found = stack_with(3, top_k=4), []
    attend = ranked.attend
    monkeypatch.setattr(ranked, "attend", lambda *args: found.append(1) or attend(*args))
    with torch.inference_mode(), Exact():
        quick = stack(x, SITES)
        assert found
        monkeypatch.setattr(arithmetic, "ranks", lambda *args: False)
        assert torch.equal(stack(x, SITES), quick)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 9, 4096])
def test_pieces_have_every_query_once_with_all_its_keys_and_a_bound(window, causal):
    """A window that a stranger wrote may be larger than the picture; it may not take more memory than no window."""
    sites = grid_sites(21, 90)
    near, met = (sites[:, None] - sites).abs().amax(-1) <= window, []
    if causal:
        near = near.tril()
    for i, keys in queries_with_keys(sites, torch.arange(len(sites)), len(sites), 64, 10_000, causal, window):
        assert len(i) <= 64 or len(i) * len(keys) <= 10_000
        assert (keys.diff() > 0).all()
        assert near[i][:, keys].sum() == near[i].sum()
        met.append(i)
    assert torch.cat(met).sort().values.equal(torch.arange(len(sites)))


def test_pieces_keep_a_mask_with_a_column_for_the_own_key(x):
    """As the explorer hides positions: the last column is a token's own key."""
    stack, q = stack_with(3, top_k=4), 60
    hidden = torch.rand(q, len(SITES) - q + 1, generator=torch.Generator().manual_seed(0)) < 0.3
    hidden[:, -1] = False

    def visible(i):
        return ~hidden[i - len(SITES) + q]

    def run():
        cache = stack.cache(len(SITES) - q)
        stack.remember(x[:, q:], SITES[q:], cache)
        for part in cache:
            part.closed = True
        return stack(x[:, :q], torch.cat((SITES[q:], SITES[:q])), visible=visible, cache=cache)

    with torch.no_grad():
        expected = run()
        with Tiles():
            assert torch.allclose(run(), expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["serial", "parallel"])
def test_nothing_beyond_the_window_matters(variant):
    """Layer by layer a latent's influence reaches one window farther, and no farther."""
    model = micro_model(variant, search_window=2, top_k=4)
    y_hat = torch.randn(1, 24, 4, 24).mul(3).round()
    other = y_hat.clone()
    other[..., 0] += 5
    reach = 2 * len(model.context_model.stack.blocks) + 1  # and the serial model's shift
    with torch.no_grad():
        changed = (model.context_model(y_hat) != model.context_model(other)).any(1)[0].any(0)
    assert changed[1:3].any() and not changed[reach + 1 :].any()


@pytest.mark.parametrize("variant", ["serial", "parallel", "hyperprior", "minnen"])
def test_a_file_says_its_window(variant, flat_picture):
    model = micro_model(variant, top_k=4)
    plain = codec.encode(model, flat_picture)
    model.search_window = 1
    data = codec.encode(model, flat_picture)
    assert (Container.unpack(plain).window, Container.unpack(data).window) == (None, 1)
    picture = codec.decode(data, model)
    model.search_window = None  # whatever the model at hand has, the file decides, and the model keeps its own
    assert codec.decode(data, model).tobytes() == picture.tobytes() and model.search_window is None
    model.search_window = 2
    codec.decode(plain, model)
    assert model.search_window == 2 and codec.encode(model, flat_picture) != plain


@pytest.mark.parametrize("variant", ["serial", "parallel", "context"])
def test_round_trips_of_any_size(variant, flat_picture):
    """A decoder that computed anything else than its encoder would raise."""
    model = micro_model(variant, top_k=4)
    for size in ((1, 1), (16, 17), (190, 30), (65, 128)):
        for model.search_window in (1, 3, 4096):
            data = codec.encode(model, flat_picture.crop((0, 0, *size)))
            assert codec.decode(data, model).size == size


def test_groupedmixer_takes_no_window(flat_picture):
    model = micro_model("groupedmixer")
    container = Container.unpack(codec.encode(model, flat_picture))
    with pytest.raises(BitstreamError, match="has a search window, and this model takes none"):
        codec.decode(Container(**{**vars(container), "window": 8}).pack(), model)


def test_the_command_line_takes_a_window(flat_picture, tmp_path):
    flat_picture.save(tmp_path / "a.png")
    call("compress", tmp_path / "a.png", "--model", "blocks-parallel@0.013", "--window", 16)
    assert '"window": 16' in call("info", tmp_path / "a.ef", "--json")[0]
    call("decompress", tmp_path / "a.ef", "-o", tmp_path / "b.png")
    for words in (["--window", 0], ["--window", 16, "--model", "blocks-groupedmixer@0.014"]):
        said = call("compress", tmp_path / "a.png", "-o", tmp_path / "c.ef", *words, expect=1)[1]
        assert "window" in said and said.count("\n") == 1 and not (tmp_path / "c.ef").exists()


def test_another_window_is_an_error_and_no_picture(flat_picture):
    model = micro_model("parallel", top_k=4)
    model.search_window = 1
    container = Container.unpack(codec.encode(model, flat_picture))
    for window in (None, 2):
        with pytest.raises(BitstreamError):
            codec.decode(Container(**{**vars(container), "window": window}).pack(), model)
    with pytest.raises(BitstreamError, match="no sense"):
        Container.unpack(Container(**{**vars(container), "window": 0}).pack())


def test_weights_serve_any_window():
    plain, windowed = micro_model("parallel"), micro_model("parallel", search_window=5)
    windowed.load_state_dict(plain.state_dict())
    assert weights_digest(plain) == weights_digest(windowed)
    again = Entroformer.from_state_dict(windowed.state_dict())
    assert again.search_window == 5 and again.context_model.stack.blocks[0].attention.window == 5
    assert "search_window" not in EntroformerConfig().to_json()


def test_a_window_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="1 to 4,096"):
        micro_model("parallel").search_window = 0
    with pytest.raises(ConfigError, match="GroupedMixer"):
        micro_model("groupedmixer").search_window = 8
