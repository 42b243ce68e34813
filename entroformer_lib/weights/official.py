"""The authors' released checkpoints as models of this library, read without running anything that is in them.

`checkpoint.py` turns the file into inert records: a `StandIn` for each module, a `StoredTensor` for each tensor. Here
sizes are read off the tensors, every tensor is checked against the architecture, and only then are its numbers read.

The released code clamps symbols to [-128, 127] and gives those two a logistic tail instead of the Gaussian's. Ours are
not clamped, so the two agree wherever no latent reaches those ends.
"""

import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError, WeightsError
from entroformer_lib.files import file_digest
from entroformer_lib.models.config import PRESETS, EntroformerConfig
from entroformer_lib.weights.checkpoint import Locate, StandIn, StoredTensor, open_checkpoint
from entroformer_lib.weights.zoo import save_weights

PARTS = ("encode", "decode", "cit_he", "cit_hd", "prob", "cit_ar", "cit_pn")
USUAL_TOP_K = 32  # of the released models; taken when the file does not say
LIKELIHOOD_FLOOR = 1e-12  # of the released code; our own models use 1e-9


def load_official(path: str | Path, top_k: int | None = None) -> Entroformer:
    """A checkpoint of the released code as an ordinary model: in eval mode, float32, with its `.name` and `.card`.

    Reads whole modules or plain state dicts under the names in `PARTS`, with or without DataParallel, in both file
    formats of torch.save. The model does not clamp symbols to [-128, 127] as the released code does.

    Args:
        top_k: k of the attention, which no tensor tells; by default what the pickled modules say, else 32.

    Raises:
        WeightsError: the file is no such checkpoint, is damaged, lacks a tensor or has one of another shape, or asks
            for a class that such a checkpoint does not need.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            parts, locate = open_checkpoint(file)
            return _build(path, parts, locate, top_k)
    except KeyError as error:  # a part, a tensor, an entry of the archive
        raise WeightsError(f"The checkpoint {path} has no '{error.args[0]}'.") from None
    except (OSError, EOFError, NotImplementedError, UnicodeError, zipfile.BadZipFile) as error:
        raise WeightsError(f"The checkpoint {path} cannot be read: {getattr(error, 'strerror', error)}.") from None


def import_official(src: str | Path, dst: str | Path, force: bool = False, top_k: int | None = None) -> None:
    """Writes a checkpoint of the released code as a weights file of this library, a float32 .safetensors.

    Raises:
        WeightsError: as `load_official`; or `dst` has another ending, exists (without `force`), or cannot be written.
    """
    dst = Path(dst)
    if dst.suffix != ".safetensors":
        raise WeightsError(f"Weights are stored in .safetensors files, and {dst} does not end that way.")
    if dst.exists() and not force:
        raise WeightsError(f"{dst} exists already; it is replaced only with force.")
    model = load_official(src, top_k)
    save_weights(model, dst, model.card)


# ---- their tensors, our parameters ---------------------------------------------------------------------------------

TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"
# These replacements, one after the other, turn the name of our parameter into the name of theirs. Of the two for a
# `stack`, the first is for the hyperprior, one block a stage, the second for the context model.
THEIR_NAMES = r"""
    ^g_a\. -> encode.encoder.   ^g_s\.([0246])\. -> decode.decoder.\1.transpose.   ^g_s\. -> decode.decoder.
    ^h_a\. -> cit_he.   ^h_s\. -> cit_hd.   ^context_model\. -> cit_ar.   ^entropy_parameters\.layers\. -> cit_pn.
    ^z_prior\. -> prob.   \.embed\. -> .to_patch_embedding.   \.head\. -> .mlp_head.   \.start$ -> .sos_pred_token
    \.down\. -> .scale_blocks.   \.up\.(\d)\.0\. -> .scale_blocks.\1.conv2d.
    \.blocks\.(\d)\.stack\.\w+\.0\. -> .trans_blocks.\1.0.   \.stack\.\w+\. -> .blocks.
    \.norm1\. -> .layer.0.layer_norm.   \.norm2\. -> .layer.1.norm.   \.feed_forward\. -> .layer.1.fn.net.
    \.attention\.qkv\. -> .layer.0.SelfAttention.qkv.   \.attention\.out\. -> .layer.0.SelfAttention.o.
    \.vectors$ -> .layer.0.SelfAttention.relative_attention_bias.weight
"""


def _build(path: Path, parts, locate: Locate, top_k: int | None) -> Entroformer:
    if not isinstance(parts, dict):
        raise WeightsError(f"The file holds no dict of the parts {', '.join(PARTS)}.")
    tensors = {f"{part}.{name}": tensor for part in PARTS for name, tensor in _tensors(parts[part])}
    said = (value for name, value in _leaves(parts["cit_ar"]) if name.endswith(".attn_topk"))
    config = _config(tensors, next(said, USUAL_TOP_K) if top_k is None else top_k)
    card = {"origin": "the authors' released code", "source_file": path.name, "source_sha256": file_digest(path)}
    card |= {"preset": "official", "variant": config.variant}
    model = Entroformer(config, name=path.stem, card=card).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # one by one: the weights are in memory only once
            parameter.copy_(_value(name, parameter.shape, tensors, locate))
        for prior in (model.gaussian, model.z_prior):
            prior.bound.bound.fill_(LIKELIHOOD_FLOOR)  # a buffer: it is saved along with the weights
    if tensors:
        raise WeightsError(f"The checkpoint has a tensor {min(tensors)!r}, which has no place in the architecture.")
    return model


def _config(tensors: dict[str, StoredTensor], top_k: int) -> EntroformerConfig:
    """The architecture, from sizes of tensors; `_value` compares every tensor with it."""

    def size(name: str, axis: int = 0) -> int:
        return tensors[name].size[axis] if tensors[name].size else 0

    blocks = ("cit_ar.blocks.0", *(f"cit_he.trans_blocks.{stage}.0" for stage in range(3)))
    radius, *hyper_radius = ((math.isqrt(size(f"{block}.{TABLE}")) - 1) // 2 for block in blocks)
    dim, head = size("cit_ar.to_patch_embedding.weight"), size(f"cit_ar.blocks.0.{TABLE}", -1)
    inner = size("cit_ar.blocks.0.layer.0.SelfAttention.o.weight", -1)
    if inner != dim or not head or dim % head:
        raise WeightsError(f"Heads {head} wide, {inner} together, do not fit a model {dim} wide.")
    try:
        return EntroformerConfig(
            **{**PRESETS["official"], "share_position": f"cit_ar.blocks.1.{TABLE}" not in tensors},
            context="serial" if "cit_ar.sos_pred_token" in tensors else "parallel",
            N=size("encode.encoder.0.weight"),
            M=size("encode.encoder.6.weight"),
            Z=size("cit_he.mlp_head.1.weight"),
            dim=dim,
            heads=dim // head,
            context_layers=len({name.split(".")[2] for name in tensors if name.startswith("cit_ar.blocks.")}),
            ffn_ratio=size("cit_ar.blocks.0.layer.1.fn.net.0.weight") // dim,
            top_k=top_k,
            hyper_top_k=(top_k, max(2, top_k // 2), max(2, top_k // 4)),
            radius=radius,
            hyper_radius=tuple(hyper_radius),
        )
    except (ConfigError, TypeError) as error:
        raise WeightsError(f"The checkpoint's sizes make no model. {error}") from None


def _value(name: str, shape: torch.Size, tensors: dict[str, StoredTensor], locate: Locate) -> Tensor:
    """The value of our parameter of this name and shape; takes what it is made from out of `tensors`."""
    theirs = name
    for pattern, replacement in re.findall(r"(\S+) -> (\S+)", THEIR_NAMES):
        theirs = re.sub(pattern, replacement, theirs)
    storage, offset, size, stride = tensors.pop(theirs)
    expected = list(shape)
    if theirs.endswith(TABLE):
        expected[0] = 2 * shape[0] - 3  # (2h+1)^2 where we have 2h(h+1) + 2
    elif theirs.startswith("cit_pn.") and len(shape) == 2:
        expected += [1, 1]  # their 1x1 convolution is our linear layer
    if list(size) != expected:
        raise WeightsError(f"The tensor '{theirs}' has shape {list(size)}, and should have {expected}.")
    try:
        flat = torch.empty(storage.length, dtype=storage.dtype)
        value = flat.as_strided(size, stride, offset)
    except (RuntimeError, TypeError):
        raise WeightsError(f"The tensor '{theirs}' reaches beyond its numbers.") from None
    file, position = locate(storage)
    file.seek(position)
    if file.readinto(flat.view(torch.uint8).numpy()) != flat.nbytes:
        raise EOFError(f"the numbers of '{theirs}' are not all there")
    if theirs.endswith(TABLE):
        return _diamond(value)
    if name.endswith("qkv.weight"):  # their rows: q, k, v of channel 0, then of channel 1; ours: all q, all k, all v
        return value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    return value.reshape(shape)


def _diamond(table: Tensor) -> Tensor:
    """The vectors in use, in our order: both go through the diamond row by row. What is outside shares row 0 of their
    table, the corner (-h, -h), and the last of ours.  [(2h+1)^2, d]  ->  [2h(h+1) + 2, d]"""
    h = math.isqrt(table.size(0)) // 2
    distance = torch.arange(-h, h + 1).abs()
    inside = (distance[:, None] + distance[None, :]).flatten() <= h
    return torch.cat((table[inside], table[:1]))


def _tensors(part: StandIn | dict) -> Iterator[tuple[str, StoredTensor]]:
    """Names and tensors of a part, without the `module.` that DataParallel prepends. What a module keeps outside its
    parameters and buffers, such as GDN's bounds, are constants."""
    wanted = ".*" if isinstance(part, dict) else r"(\._modules\.\w+)*\._(parameters|buffers)\.\w+"
    for name, item in _leaves(part):
        if isinstance(item, StoredTensor) and re.fullmatch(wanted, name):
            yield re.sub(r"\._(modules|parameters|buffers)\b", "", name).removeprefix(".").removeprefix("module."), item


def _leaves(part: StandIn | dict) -> Iterator[tuple[str, object]]:
    """All that is in a module or dict, by dotted name, level by level; no dict twice, so that a loop ends."""
    waiting, seen = [("", part)], set()
    while waiting:
        name, item = waiting.pop(0)
        item = item.state if isinstance(item, StandIn) else item
        if not isinstance(item, dict):
            yield name, item
        elif id(item) not in seen:
            seen.add(id(item))
            items = dict.items(item)  # not item.items(), an attribute that a pickled OrderedDict can bring along
            waiting += [(f"{name}.{key}", value) for key, value in items if isinstance(key, str)]
