"""The released code, plainly: written down a second time with the most direct arithmetic, to compare the library with.

Position vectors are gathered into [n, n, d], attention is a loop over queries, and modules are pickled in the authors'
layout.
"""

import copy
import math
import sys
import types
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

COMMON = dict(serial=True, N=8, M=12, Z=6, dim=24, heads=2, layers=2, ratio=4, k=4, size=(1, 64, 128))
COMMON |= dict(side=7, shared=True, hyper_sides=(7, 5, 5))  # table of the context model, one for all blocks, and of h_a
CASES = {
    "serial": COMMON,
    "parallel": COMMON
    | dict(
        serial=False, dim=40, heads=5, layers=3, k=6, side=3, shared=False, hyper_sides=(5, 7, 3), size=(2, 128, 64)
    ),
    "one wide head": COMMON | dict(M=20, heads=1, k=40, side=9, hyper_sides=(9, 3, 5), ratio=2, size=(1, 128, 128)),
    "narrow heads": COMMON | dict(serial=False, N=5, Z=9, dim=32, heads=8, layers=1, k=8, size=(1, 192, 64)),
}


class Part(nn.Module):
    """Any of the authors' classes: children and attributes only, the arithmetic is in `Reference`."""

    __module__ = "module.entroformer"

    def __init__(self, **items):
        super().__init__()
        for name, item in items.items():
            setattr(self, name, nn.ModuleList(item) if isinstance(item, list) else item)


def released(c: dict) -> dict[str, nn.Module]:
    """The seven parts with random weights that make lively latents, the same at every call."""
    torch.manual_seed(c["dim"])
    N, M, Z, dim, wide = c["N"], c["M"], c["Z"], c["dim"], c["ratio"] * c["dim"]

    def gdn(inverse):
        beta, gamma = torch.rand(N) + 0.5, torch.rand(N, N) * 0.5 - 0.1  # some gammas lie below their bound
        return Part(beta=nn.Parameter(beta), gamma=nn.Parameter(gamma), inverse=inverse, beta_bound=torch.ones(1))

    def norm():
        layer = nn.LayerNorm(dim)
        layer.weight.data, layer.bias.data = torch.rand(dim) + 0.5, torch.randn(dim) * 0.1
        return layer

    def block(side=None):
        attention = Part(qkv=nn.Linear(dim, 3 * dim, bias=False), o=nn.Linear(dim, dim, bias=False))
        attention.qkv.weight.data *= 2
        if side:
            attention.relative_attention_bias = nn.Embedding(side**2, dim // c["heads"])
        net = nn.Sequential(nn.Linear(dim, wide), nn.LeakyReLU(0.2), nn.Linear(wide, dim))
        return Part(layer=[Part(SelfAttention=attention, layer_norm=norm()), Part(norm=norm(), fn=Part(net=net))])

    def hyper(inputs, sides, scales, head):
        stages = [nn.ModuleList([block(side)]) for side in sides]
        return Part(to_patch_embedding=nn.Linear(inputs, dim), trans_blocks=stages, scale_blocks=scales, mlp_head=head)

    def down():
        return nn.Conv2d(dim, dim, 3, 2, 1)

    def up():
        return Part(conv2d=nn.Conv2d(dim, 4 * dim, 3, padding=1), up=nn.PixelShuffle(2))

    def upsample(a, b):
        return Part(transpose=nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1))

    encoder = [layer for a, b in pairwise((3, N, N, N, M)) for layer in (nn.Conv2d(a, b, 5, 2, 2), gdn(False))]
    decoder = [layer for a, b in pairwise((M, N, N, N, 3)) for layer in (upsample(a, b), gdn(True))]
    blocks = [block(c["side"] if i == 0 or not c["shared"] else None) for i in range(c["layers"])]
    parts = {
        "encode": Part(encoder=nn.Sequential(*encoder[:-1]), norm=Part),
        "decode": Part(decoder=nn.Sequential(*decoder[:-1]), norm=Part),
        "cit_he": hyper(M, c["hyper_sides"], [down(), down()], nn.Sequential(norm(), nn.Linear(dim, Z))),
        "cit_hd": hyper(Z, c["hyper_sides"][::-1], [up(), up()], nn.Identity()),
        "prob": Part(mu=nn.Parameter(torch.randn(1, Z, 1, 1)), log_sigma=nn.Parameter(torch.rand(1, Z, 1, 1))),
        "cit_ar": Part(to_patch_embedding=nn.Linear(M, dim), blocks=blocks, attn_topk=c["k"], drop=nn.Dropout(0.0)),
        "cit_pn": nn.Sequential(nn.Conv2d(2 * dim, 4 * dim, 1), nn.LeakyReLU(0.2), nn.Conv2d(4 * dim, 2 * M, 1)),
    }
    parts["cit_pn"][2].weight.data *= 5
    if c["serial"]:
        parts["cit_ar"].sos_pred_token = nn.Parameter(torch.randn(1, 1, dim))
    return parts


class Reference:
    """The stages of the released code in float64, with loops over pairs of sites and [n, n, d] position tensors."""

    def __init__(self, c: dict, parts: dict[str, nn.Module]):
        self.c, self.parts = c, copy.deepcopy(nn.ModuleDict(parts)).double()
        self.gap = 1.0  # smallest step from a k-th score to the next: rounding noise must not decide between the two

    def transform(self, layers, x):
        for layer in layers:
            if hasattr(layer, "beta"):
                beta = layer.beta.clamp(min=(1e-6 + 2**-36) ** 0.5) ** 2 - 2**-36
                gamma = layer.gamma.clamp(min=2**-18) ** 2 - 2**-36
                norm = (beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x * x)).sqrt()
                x = x * norm if layer.inverse else x / norm
            else:
                x = getattr(layer, "transpose", layer)(x)
        return x

    def block(self, block, table, x, width, k, mask):
        """x: [B, n, D], table: [side^2, d], mask: [n, n] of pairs that may be attended to."""
        first, second = block.layer
        n, side, sites = x.size(1), math.isqrt(len(table)), [divmod(i, width) for i in range(x.size(1))]
        bucket = torch.zeros(n, n, dtype=torch.long)
        for i, (row, column) in enumerate(sites):
            for j, (dy, dx) in enumerate((r - row, s - column) for r, s in sites):
                if abs(dy) + abs(dx) <= side // 2:
                    bucket[i, j] = (dy + side // 2) * side + dx + side // 2
        qkv = first.SelfAttention.qkv(first.layer_norm(x)).unflatten(-1, (self.c["heads"], -1, 3))  # [B, n, H, d, 3]
        q, key, v = qkv.unbind(-1)
        scores = torch.einsum("bihd,bjhd->bhij", q, key) + torch.einsum("bihd,ijd->bhij", q, table[bucket])
        scores = (scores * self.c["dim"] ** -0.5).masked_fill(~mask, -1e300)
        if k < n:
            best = scores.sort(-1, descending=True).values
            steps = (best[..., k - 1] - best[..., k])[best[..., k] > -1e300]
            self.gap = min([self.gap, *steps.tolist()])
            scores = scores.masked_fill(scores < best[..., k - 1 : k], -1e300)
        x = x + first.SelfAttention.o(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))
        return x + second.fn.net(second.norm(x))

    def hyper(self, part, x, ks):
        """x: [B, C, h, w]  ->  z or the hyperprior's feature."""
        x = part.to_patch_embedding(x.movedim(1, -1))
        for stage, k in enumerate(ks):
            B, h, w, dim = x.shape
            block = part.trans_blocks[stage][0]
            table = block.layer[0].SelfAttention.relative_attention_bias.weight
            x = self.block(block, table, x.flatten(1, 2), w, k, torch.ones(h * w, h * w, dtype=torch.bool))
            x = x.view(B, h, w, dim)
            if stage < 2:
                scale = part.scale_blocks[stage]
                x = x.movedim(-1, 1)
                x = (scale.up(scale.conv2d(x)) if hasattr(scale, "up") else scale(x)).movedim(1, -1)
        return part.mlp_head(x).movedim(-1, 1)

    def context(self, y_hat):
        """y_hat: [B, M, h, w]  ->  the context feature."""
        part, (h, w) = self.parts["cit_ar"], y_hat.shape[-2:]
        odd = torch.tensor([[(r + s) % 2 == 1 for s in range(w)] for r in range(h)])
        mask = torch.ones(h * w, h * w, dtype=torch.bool).tril()
        if not self.c["serial"]:
            y_hat, mask = y_hat * odd, odd.flatten()[None, :] | torch.eye(h * w, dtype=torch.bool)
        x = part.to_patch_embedding(y_hat.flatten(2).mT)
        for block in part.blocks:
            owner = part.blocks[0] if self.c["shared"] else block
            x = self.block(block, owner.layer[0].SelfAttention.relative_attention_bias.weight, x, w, self.c["k"], mask)
        if self.c["serial"]:
            return torch.cat((part.sos_pred_token.expand(len(x), 1, -1), x[:, :-1]), 1).mT.unflatten(-1, (h, w))
        return x.mT.unflatten(-1, (h, w)) * ~odd

    @torch.no_grad()
    def stages(self) -> dict[str, torch.Tensor]:
        """Under the names of the fixtures' arrays."""
        p, k, (B, H, W) = self.parts, self.c["k"], self.c["size"]
        ks = (k, max(2, k // 2), max(2, k // 4))
        r = {"x": torch.rand(B, 3, H, W).double()}
        r["encode_out"] = self.transform(p["encode"].encoder, 2 * r["x"] - 1)
        r["y"] = (r["encode_out"] * 4 / r["encode_out"].std()).float().double()
        r["y_hat"] = torch.floor(r["y"] + 0.5)
        r["z"] = self.hyper(p["cit_he"], r["y"], ks)
        r["z_hat"] = torch.floor(3 * r["z"] + 0.5)
        r["feat_hyper"], r["feat_context"] = self.hyper(p["cit_hd"], r["z_hat"], ks[::-1]), self.context(r["y_hat"])
        r["params"] = p["cit_pn"](torch.cat((r["feat_hyper"], r["feat_context"]), 1)).float().double()
        log_sigma, mu = r["params"].chunk(2, 1)
        r["nats_y"] = -mass(r["y_hat"], mu, log_sigma.clamp(min=-7).exp()).log()
        r["prob_z"] = mass(r["z_hat"], p["prob"].mu, p["prob"].log_sigma.exp())
        r["decode_in"] = r["y_hat"] / 16
        r["decode_out"] = self.transform(p["decode"].decoder, r["decode_in"])
        r["x_hat"] = (r["decode_out"] / 2 + 0.5).clamp(0, 1)
        return {name: value.float() for name, value in r.items()}


def mass(v, mu, sigma):
    """Probability of the integers v, as released."""
    near, far = ((v - mu).abs() - 0.5) / (sigma * 2**0.5), ((v - mu).abs() + 0.5) / (sigma * 2**0.5)
    return (0.5 * torch.erfc(near) - 0.5 * torch.erfc(far)).clamp(min=1e-12)


def save(content, path: Path, **options) -> Path:
    """torch.save while the authors' class can be imported; when it is loaded, it cannot."""
    authors = {name: types.ModuleType(name) for name in ("module", "module.entroformer")}
    authors["module.entroformer"].Part = Part
    sys.modules.update(authors)
    try:
        with warnings.catch_warnings(action="ignore"):  # the old format misses the source of the class
            torch.save(content, path, **options)
    finally:
        for name in authors:
            del sys.modules[name]
    return path
