"""Models as ONNX graphs, for other runtimes: analysis, hyper synthesis, context and synthesis apart.

    graphs = export(load_model("blocks-parallel"))  # {"analysis": bytes, ...}

What is written down is what the model's own code does when it runs once (a trace); only attention is said again here,
because the model's asks for sizes in Python, and a graph is for all sizes.

    graph            inputs             outputs
    analysis         x                  y, z
    hyper_synthesis  z_hat              hyper
    context          y_hat, hyper       means, scales
    synthesis        y_hat              x_hat

x: [B, 3, H, W] in [0, 1], H and W multiples of 64 (16 without hyperprior); y, y_hat, means, scales: [B, M, H/16, W/16],
in a model of variable rate scaled by its gain; z, z_hat: [B, Z, H/64, W/64]; hyper: [B, D, H/16, W/16]; x_hat: as x,
not clamped. Where the result depends on the rate there is one more input, level: [B], from 0 to the number of lambdas
less one. Without hyperprior there is neither z nor hyper, without context no y_hat in `context`.

Between the graphs stands what users do in a language of their own: y_hat = floor(y + 0.5), z_hat = floor(z - medians +
0.5) + medians, and coding both. `context` takes all of y_hat at once, as an encoder does; its memory grows with the
square of the number of latents.
"""

import copy
import io
import json
import math
import warnings
from pathlib import Path

import torch
from compressai.layers import GDN
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError, UserError
from entroformer_lib.files import write_bytes
from entroformer_lib.models.attention import attend
from entroformer_lib.models.entropy_model import LARGEST_LOG_SCALE
from entroformer_lib.models.position import RelativePosition
from entroformer_lib.models.priors import FactorizedPrior

OPSET = 17
REFUSED = {"cnn": "a CNN as its context", "grouped": "the groups of a GroupedMixer"}
# Axes that differ from call to call. (Those of the explorer's page are named in `explorer/live_graphs.py`.)
PICTURE = {0: "batch", 2: "height", 3: "width"}
GRID = {0: "batch", 2: "rows", 3: "columns"}
HYPER_GRID = {0: "batch", 2: "hyper_rows", 3: "hyper_columns"}
AXES = {
    **dict.fromkeys(("x", "x_hat"), PICTURE),
    **dict.fromkeys(("y", "y_hat", "hyper", "means", "scales"), GRID),
    **dict.fromkeys(("z", "z_hat"), HYPER_GRID),
    "level": {0: "batch"},
}


def export(model: Entroformer) -> dict[str, bytes]:
    """The graphs of a model by name, each a whole ONNX file; see the head of this file.

    Raises:
        ConfigError: a context that is not one of attention over all latents.
        UserError: the package onnx is missing.
    """
    model = prepared(model)
    c, level = model.config, rate_input(model)
    told = level if model.rate_knowledge is not None else {}
    x, y_hat = torch.rand(1, 3, 128, 192), torch.randn(1, c.M, 8, 12).round()
    hyper = {"hyper": torch.randn(1, c.dim, 8, 12)} if c.hyperprior else {}
    latents = {} if c.context == "none" else {"y_hat": y_hat}
    graphs = {
        "analysis": traced(model, analysis, {"x": x, **level}, ("y", "z") if c.hyperprior else ("y",)),
        "context": traced(model, _context, {**latents, **hyper, **told}, ("means", "scales")),
        "synthesis": traced(model, synthesis, {"y_hat": y_hat, **level}, ("x_hat",)),
    }
    if c.hyperprior:
        z_hat = {"z_hat": torch.randn(1, c.Z, 2, 3)}
        graphs["hyper_synthesis"] = traced(model, hyper_synthesis, {**z_hat, **told}, ("hyper",))
    return graphs


def facts(model: Entroformer) -> dict:
    """What a user of the graphs needs besides them, for JSON: the config, the level that the model is set to, the
    lambda of each level (or none), the multiple of which pictures have sides, and the medians of z."""
    c, medians = model.config, None
    if c.hyperprior:
        factorized = isinstance(model.z_prior, FactorizedPrior)
        medians = model.z_prior._get_medians().flatten().tolist() if factorized else [0.0] * c.Z
    return {
        "name": model.name,
        "config": json.loads(c.to_json()),
        "level": model.level,
        "lmbdas": list(c.lmbdas),
        "downsampling": c.downsampling,
        "medians": medians,
    }


def write(model: Entroformer, folder: Path, force: bool = False) -> list[Path]:
    """Writes the graphs, and the `facts` as model.json, into a folder, which is made where it is not there.

    Raises:
        UserError: files of these names are there already; and as `export`.
    """
    names = [f"{name}.onnx" for name in ("analysis", "hyper_synthesis", "context", "synthesis")] + ["model.json"]
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise UserError(f"{folder / there[0]} exists; --force replaces it.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the output is a folder.")
    files = {f"{name}.onnx": data for name, data in export(model).items()}
    files["model.json"] = json.dumps(facts(model), indent=1).encode() + b"\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)
    for name in there:
        if name not in files:  # of another model, which had more
            (folder / name).unlink()
    return [folder / name for name in names if name in files]


# ---- models to graphs -----------------------------------------------------------------------------------------------


def prepared(model: Entroformer) -> Entroformer:
    """A copy in float32 on the CPU, without what only training needs.

    Raises:
        ConfigError, UserError: see `export`.
    """
    context = getattr(getattr(model, "config", None), "context", None)
    if context is None or context in REFUSED:
        has = REFUSED.get(context, "no context of ours")
        raise ConfigError(
            f"This model has {has}; ONNX graphs are made of models whose context is parallel, serial or none."
        )
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UserError("ONNX graphs need one more package: pip install onnx.") from None
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, GDN):  # its weights as they are used, not as they are learned
            for name in ("beta", "gamma"):
                reparametrised = getattr(module, f"{name}_reparam")
                setattr(module, name, nn.Parameter(reparametrised(getattr(module, name)), requires_grad=False))
                setattr(module, f"{name}_reparam", nn.Identity())
    return model


def rate_input(model: Entroformer) -> dict[str, Tensor]:
    """The input `level`, where there is a choice of rates."""
    return {} if model.gain is None else {"level": torch.tensor([model.level])}


class _Part(nn.Module):
    """A function of a model and tensors, in the form that the exporter takes."""

    def __init__(self, model: Entroformer, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor):
        return self.function(self.model, *inputs)


def traced(model, function, inputs: dict[str, Tensor], outputs: tuple[str, ...], axes: dict | None = None) -> bytes:
    """What function(model, *inputs) does with these examples, as an ONNX file.  axes: of more names than AXES knows."""
    axes, file = AXES | (axes or {}), io.BytesIO()
    named = {name: axes[name] for name in (*inputs, *outputs) if name in axes}
    with warnings.catch_warnings(), torch.no_grad(), InGraphs():
        warnings.simplefilter("ignore")  # the exporter's own: that it traces, and what it does not fold
        torch.onnx.export(
            _Part(model, function), tuple(inputs.values()), file, input_names=list(inputs), output_names=list(outputs),
            dynamic_axes=named, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    return file.getvalue()


class InGraphs(TorchFunctionMode):
    """Inside the block attention is computed in a way that can be traced for all sizes.

    Args:
        attend: takes the place of `models.attention.attend`.
    """

    def __init__(self, attend=None):
        super().__init__()
        self.attend = attend or attend_in_graph

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is attend and args[3].window is not None:
            raise ConfigError("A graph has no search window; set the model's search_window to None.")
        return (self.attend if function is attend else function)(*args, **(kwargs or {}))


def attend_in_graph(q, k, v, layer, sites, visible, relative, top_k, own=None) -> Tensor:
    """`attend`, with sizes that are part of the graph."""
    content, position = parts_of_scores(q, k, layer, sites, relative, own)
    scores = content if position is None else content + position
    if visible is not None:
        count = q.size(2)
        numbers = torch.arange(count) + (sites.size(0) - count)
        scores = scores.masked_fill(~visible(numbers)[..., : scores.size(-1)], -torch.inf)
    if top_k is not None:
        scores = scores.masked_fill(scores < kth_largest(scores, torch.tensor(top_k)), -torch.inf)
    return gathered(scores.softmax(dim=-1), v, own)


def parts_of_scores(q, k, layer, sites, relative, own) -> tuple[Tensor, Tensor | None]:
    """Content and position of each pair of query and key, and of each query's own key in one column more where it is
    not among the others: [B, heads, q, n] each.  Position is None in a model without relative positions."""
    q = q * layer.scale
    content = q @ k.transpose(-1, -2)
    if own is not None:
        content = torch.cat((content, (q * own[0]).sum(-1, keepdim=True)), dim=-1)
    if relative is None:
        return content, None
    products = q @ relative.table().T  # [B, heads, q, buckets]
    position = spread(products, relative, sites[sites.size(0) - q.size(2) :], sites[: k.size(2)])
    if own is not None:
        here = relative.own_bucket
        position = torch.cat((position, products[..., here : here + 1]), dim=-1)
    return content, position


def spread(products: Tensor, relative: RelativePosition, queries: Tensor, keys: Tensor) -> Tensor:
    """`RelativePosition.spread` for all sizes: [B, heads, q, buckets]  ->  [B, heads, q, n]"""
    if relative.kind != "diamond":
        return products.gather(-1, relative.buckets(queries, keys).expand(*products.shape[:2], -1, -1))
    # Every key gets the product of outside, and then the neighbours of each query get theirs.
    n, h = keys.size(0), relative.radius
    height, width = torch.maximum(keys.amax(0), queries.amax(0)) + 1 + 2 * h  # with a border

    def flat(sites: Tensor) -> Tensor:
        return (sites[..., 0] + h) * width + sites[..., 1] + h

    number = torch.zeros(height * width, dtype=torch.long) + n  # of the key at a site; n where there is none
    number = number.scatter(0, flat(keys), torch.arange(n))
    inside = (relative.lookup < relative.lookup.amax()).nonzero() - relative.radius - 1  # in the order of the buckets
    near = number[flat(queries[:, None] + inside)].expand(*products.shape[:2], -1, -1)  # [B, heads, q, buckets - 1]
    everywhere = products[..., -1:].expand(*products.shape[:3], n + 1)  # one column more for "none"
    return everywhere.scatter(-1, near, products[..., :-1])[..., :n]


def kth_largest(scores: Tensor, k: Tensor) -> Tensor:
    """The k-th largest score of each query, or the smallest of fewer.  scores: [..., n]  ->  [..., 1]"""
    return scores.topk(torch.minimum(k, torch.as_tensor(scores.size(-1)))).values[..., -1:]


def gathered(probs: Tensor, v: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
    """The values, weighted by the attention paid to them.  [B, heads, q, n], [B, heads, n, d]  ->  [B, heads, q, d]"""
    return probs @ v if own is None else probs[..., :-1] @ v + probs[..., -1:] * own[1]


def analysis(model: Entroformer, x: Tensor, level: Tensor | None = None):
    """x  ->  y, z"""
    y = model.scaled(model.g_a(x), level)
    return y if model.h_a is None else (y, model.hyper_analysis(y, model.rate(level)))


def synthesis(model: Entroformer, y_hat: Tensor, level: Tensor | None = None) -> Tensor:
    """y_hat  ->  x_hat"""
    return model.g_s(y_hat * model.gains(level)[1])


def hyper_synthesis(model: Entroformer, z_hat: Tensor, level: Tensor | None = None) -> Tensor:
    """z_hat  ->  hyper"""
    return model.hyper_synthesis(z_hat, model.rate(level))


def _context(model: Entroformer, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """y_hat, hyper, level, where the model has them  ->  means, scales"""
    c, left = model.config, list(inputs)
    y_hat = None if c.context == "none" else left.pop(0)
    hyper = left.pop(0) if c.hyperprior else None
    predictor = model.entropy_model(model.rate(left[0] if left else None))
    means, log_scales = predictor.predict(hyper if y_hat is None else y_hat, hyper)
    return means, scales_of(model, log_scales)


def scales_of(model: Entroformer, log_scales: Tensor) -> Tensor:
    """Scales within their bounds."""
    return log_scales.clamp(math.log(model.config.scale_floor), LARGEST_LOG_SCALE).exp()


# ---- half precision -------------------------------------------------------------------------------------------------

SMALL = 256  # numbers; fewer are not worth a conversion


def halved(data: bytes) -> bytes:
    """A graph that keeps weights in float16 and turns them into float32 when it is loaded, wherever nothing is lost by
    that: shipped weights were rounded to float16 once."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_from_string(data)
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < SMALL:
            continue
        half = values.astype("float16")
        if (half.astype("float32") != values).any():
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model.SerializeToString()
