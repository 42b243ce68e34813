"""The long run on one GPU: the goal of `entroformer train`, with a whole step in one CUDA graph.

    python benchmarks/long_run_gpu.py --init start.safetensors --data pictures/train --out OUT --seconds 500

goes on from weights whose config stands in their metadata, for so many seconds. The learning rate rises over the first
`--warm` of them and then falls to 0. With `--ms-ssim-seconds` a version for MS-SSIM is finetuned behind it. With
`--kinds serial:1e-3 parallel@192:1e-3 serial#1:1e-3 parallel+:5e-4 serial/top_k=8:1e-3` entropy models alone are
trained in its place, all at the same time on the same crops: of a kind, a width, a seed, with + from what fits of the
old entropy model, with ^ from its hyperprior alone, and with another field of the config.

Loss and optimizer are those of the loop (training/loss.py, training/optimizer.py). Some things differ, because a step
has to take milliseconds: crops are cut from copies of the pictures that were scaled once, chance comes from the GPU's
generator and not from (seed, g), blocks are compiled, the k-th largest score is found by bisection, and the schedule
follows the clock.
"""

import argparse
import io
import json
import math
import os
import re
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from entroformer_lib.fields import parse_fields
from entroformer_lib.models import attention, gain, network, position
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.models.context import Gaps
from entroformer_lib.models.transforms import ConvBlock
from entroformer_lib.training.initial import begin_at_channels
from entroformer_lib.training.loss import ERROR_WEIGHT, errors, evenly, rates, unrest

# Entropy models by the names of benchmarks/family.py: variant, and fields of the config
KINDS = {name: (name, {}) for name in ("parallel", "serial", "cnn", "minnen", "hyperprior", "hyperprior-cnn")}
KINDS |= {"context": ("context", {}), "context-cnn": ("context-cnn", {})}
KINDS |= {
    "groupedmixer": ("groupedmixer", {"groups": (3, 2, 2)}),
    "groupedmixer-32": ("groupedmixer", {"groups": (8, 2, 2)}),
}
CROP, VERSIONS, PIECE = 256, 10, 15 * 2**20
MS_SSIM_OVER_MSE = 1290.0  # as in training/initial.py
HIDDEN = ("missing", "one_way")  # words of --kinds that are no fields of the config
HYPERPRIOR = ("h_a.", "h_s.", "z_prior.", "rate_knowledge.")
DRAWN = 1  # crops of a batch that are drawn by code
low = torch.bfloat16


def say(*words) -> None:
    print(f"[{time.monotonic() - BEGIN:6.1f}]", *words, flush=True)


BEGIN = time.monotonic()

# ---- the same network, written for the GPU ---------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.to(low), weight.flatten(1).to(low), None if bias is None else bias.to(low))


def conv_block(x, enter, enter_b, depth, depth_b, leave, leave_b, gates, gates_b, mix, mix_b):
    """A ConvBlock, channels last.  x: [B, h, w, N]"""
    h, w = x.shape[1:3]
    u = F.pad(F.leaky_relu(linear(x, enter, enter_b), 0.1), (0, 0, 1, 1, 1, 1))
    d = depth_b
    for i in range(3):
        for j in range(3):
            d = d + u[:, i : i + h, j : j + w].float() * depth[:, 0, i, j]
    x = x + linear(d, leave, leave_b)
    a, b = linear(x, gates, gates_b).chunk(2, dim=-1)
    return x + linear(F.relu6(a) * b.clamp(-3, 3), mix, mix_b)


def kth_largest(scores: Tensor, lowest: Tensor, k: int | Tensor) -> Tensor:
    """A threshold that k scores of each row reach, or a few more where they are nearly equal.  [..., n] -> [..., 1]"""
    high, low_ = scores.amax(-1, keepdim=True), lowest
    for _ in range(18):
        middle = (low_ + high) / 2
        enough = (scores >= middle).sum(-1, keepdim=True) >= k
        low_, high = torch.where(enough, middle, low_), torch.where(enough, high, middle)
    return low_


def transformer_block(
    x, norm1, norm1_b, qkv, out, norm2, norm2_b, up, up_b, down, down_b, vectors, where, mask, k, heads: int, scale
):
    """A Block of Entroformer.  x: [B, n, D]; vectors: [R, d] of relative positions, or None; where: one-hot buckets
    [n, R, n]; mask: [n, n] or [B, 1, n, n], 0 or -inf; k: a tensor, so that another is not compiled anew, or None"""
    B, n, D = x.shape
    x = x.float()
    q, key, v = (
        linear(F.layer_norm(x, (D,), norm1, norm1_b), qkv).view(B, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    )
    q = q.float() * scale
    scores = q @ key.float().mT + mask
    if vectors is not None:
        products = (q @ vectors.T).permute(2, 0, 1, 3).flatten(1, 2) @ where  # [n, B heads, n]
        scores = scores + products.view(n, B, heads, n).permute(1, 2, 0, 3)
    if k is not None:
        fixed = scores.detach()
        lowest = torch.where(mask < 0, torch.inf, fixed).amin(-1, keepdim=True)
        scores = torch.where(fixed >= kth_largest(fixed, lowest, k), scores, -torch.inf)
    gathered = scores.softmax(-1).to(low) @ v
    x = x + linear(gathered.transpose(1, 2).flatten(2), out)
    return x + linear(F.relu(linear(F.layer_norm(x, (D,), norm2, norm2_b), up, up_b)), down, down_b)


def analysis(transform, x: Tensor) -> Tensor:
    """g_a of blocks of one stage, with its linear path."""
    first, *blocks, last = (layer for layer in transform.network if isinstance(layer, nn.Conv2d | ConvBlock))
    with torch.autocast(x.device.type, enabled=False):
        sites = F.pixel_unshuffle(2 * x - 1, 8).permute(0, 2, 3, 1).contiguous()  # [B, H/8, W/8, 192]
        v = F.linear(sites, first.weight.flatten(1), first.bias).to(low)
        for block in blocks:
            v = CONV_BLOCK(v, *parameters_of(block))
        B, h, w, N = v.shape
        v = v.view(B, h // 2, 2, w // 2, 2, N).permute(0, 1, 3, 5, 2, 4).flatten(3)  # [B, h/2, w/2, 4 N]
        y = F.linear(v.float(), last.weight.flatten(1), last.bias)
        return y.permute(0, 3, 1, 2) + transform.linear(x)


def synthesis(transform, y_hat: Tensor) -> Tensor:
    """g_s of blocks of one stage, with its linear path."""
    first, *blocks, last = (layer for layer in transform.network if isinstance(layer, nn.Conv2d | ConvBlock))
    with torch.autocast(y_hat.device.type, enabled=False):
        v = F.linear(y_hat.float().permute(0, 2, 3, 1), first.weight.flatten(1), first.bias)
        B, h, w, N = v.shape
        v = v.view(B, h, w, N // 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(B, 2 * h, 2 * w, N // 4).to(low)
        for block in blocks:
            v = CONV_BLOCK(v, *parameters_of(block))
        v = F.linear(v.float(), last.weight.flatten(1), last.bias).permute(0, 3, 1, 2)
        return F.pixel_shuffle(v, 8) / 2 + 0.5 + transform.linear(y_hat.float())


def parameters_of(block: ConvBlock) -> list[Tensor]:
    parts = (block.enter, block.depthwise, block.leave, block.gates, block.mix)
    return [parameter for part in parts for parameter in (part.weight, part.bias)]


CONV_BLOCK, TRANSFORMER_BLOCK = conv_block, transformer_block
FAST_TOKENS = tuple((CROP // side) ** 2 for side in (16, 32, 64))
ONE_HOT: dict[tuple, Tensor] = {}


def one_hot(relative, sites: Tensor) -> Tensor:
    """Buckets of all pairs of a square's sites, [n, R, n]; made once, before the graph."""
    key = (len(sites), relative.kind, relative.radius)
    if key not in ONE_HOT:
        buckets = relative.buckets(sites, sites)  # [n, n]
        numbers = torch.arange(len(padded(relative.table())), device=sites.device)
        ONE_HOT[key] = (buckets[:, None] == numbers[:, None]).float()
    return ONE_HOT[key]


def padded(table: Tensor) -> Tensor:
    """Rows of zeros behind a table, up to a multiple of 32: [R, d]"""
    return F.pad(table, (0, 0, 0, -len(table) % 32))


def install_on(model: nn.Module) -> None:
    """Gives one model's transforms their forms for the GPU."""
    model.g_a.forward = types.MethodType(analysis, model.g_a)
    model.g_s.forward = types.MethodType(synthesis, model.g_s)


def install(model: nn.Module) -> None:
    """Gives the model's parts, and those of all entropy models, their forms for the GPU; parameters and their names
    stay."""
    install_on(model)
    slow = attention.Block.forward
    numbers: dict[int, Tensor] = {}

    def block(self, x, sites, visible=None, relative=None, top_k=None, cache=None):
        n, a, ff = x.size(1), self.attention, self.feed_forward
        if n not in FAST_TOKENS or not isinstance(ff[1], nn.ReLU):
            return slow(self, x, sites, visible=visible, relative=relative, top_k=top_k, cache=cache)
        mask = torch.zeros(n, n, device=x.device)
        if visible is not None:
            mask = torch.where(visible(torch.arange(n, device=x.device)), 0.0, -torch.inf)
        k = top_k or a.top_k
        if k is not None and k not in numbers:  # before the graph, which takes nothing from the CPU
            numbers[k] = torch.tensor(k, device=x.device)
        k = None if k is None or k >= n else numbers[k]
        table, where = None, None
        if relative is not None:
            table, where = padded(relative.table()), one_hot(relative, sites)
        with torch.autocast(x.device.type, enabled=False):
            return TRANSFORMER_BLOCK(
                x, self.norm1.weight, self.norm1.bias, a.qkv.weight, a.out.weight, self.norm2.weight, self.norm2.bias,
                ff[0].weight, ff[0].bias, ff[2].weight, ff[2].bias, table, where, mask, k,
                heads=a.heads, scale=a.scale,
            )  # fmt: skip

    def relative_forward(self, q, queries, keys):
        return torch.einsum("bhqr,qrn->bhqn", q @ padded(self.table()).T, one_hot(self, queries))

    def at_level(table, level):
        chosen = (level[:, None] == torch.arange(len(table), device=level.device)).float()
        return (chosen[..., None] * table).sum(1)

    def gains(self, level):
        return at_level(self.log_gain, level).exp()[..., None, None], at_level(self.log_inverse, level).exp()[
            ..., None, None
        ]

    waves: dict[tuple, Tensor] = {}
    made = attention.sinusoidal_positions

    def absolute(sites, dim):  # made before the graph, which takes nothing from the CPU
        key = (len(sites), dim)
        return waves[key] if key in waves else waves.setdefault(key, made(sites, dim))

    attention.sinusoidal_positions = absolute
    attention.Block.forward, position.RelativePosition.forward = block, relative_forward
    gain.at_level, gain.RateGain.forward = at_level, gains


# ---- pictures --------------------------------------------------------------------------------------------------------


def decoded(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def graphic(seed: int) -> np.ndarray:
    from entroformer_lib.training.graphics import drawn

    return (drawn(CROP, np.random.default_rng(seed)) * 255).round().byte().numpy()


def read(folder: Path, graphics: int) -> tuple[list[tuple[str, np.ndarray]], np.ndarray]:
    """Photographs with the ends of their names, and graphics, by processes that are forked before torch has threads."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".webp", ".png", ".jpg", ".jpeg"))
    with ProcessPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        drawn = pool.map(graphic, range(graphics), chunksize=16)
        pictures = list(pool.map(decoded, files, chunksize=8))
        return [(path.suffix, picture) for path, picture in zip(files, pictures, strict=True)], np.stack(list(drawn))


class Pictures:
    """Photographs at several scales, and graphics, all on the device as uint8."""

    def __init__(self, photographs: list[tuple[str, np.ndarray]], graphics: np.ndarray, device, often: int = 4):
        rng, flat, rows, table, start = np.random.default_rng(0), [], [], [], 0
        for suffix, picture in photographs:
            x = torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1)
            height, width = x.shape[1:]
            if min(height, width) < CROP:
                continue
            smallest = max(0.5, CROP / min(height, width))
            for version in range(VERSIONS):
                s = 1.0 if version == 0 else rng.uniform(smallest, 1)
                size = [max(CROP, round(s * side)) for side in (height, width)]
                y = x if version == 0 else F.interpolate(x[None].float(), size, mode="bilinear", antialias=True)[0]
                flat.append((y.round().clamp(0, 255).byte() if version else y).flatten())
                table += [len(rows)] * (often if suffix in (".webp", ".png") else 1)  # those without JPEG's damage
                rows.append((start, *size))
                start += flat[-1].numel()
        self.graphics = torch.from_numpy(graphics).to(device)
        self.flat, self.rows = torch.cat(flat), torch.tensor(rows, device=device)
        self.table, self.device = torch.tensor(table, device=device), device
        say(f"{len(photographs)} pictures, {len(rows)} versions, {start / 2**30:.2f} GiB, {len(graphics)} graphics")

    def fill(self, x: Tensor) -> None:
        """Cuts a batch into x: [B, 3, CROP, CROP]; the first DRAWN are graphics."""
        B, device = len(x), self.device
        start, height, width = self.rows[self.table[torch.randint(len(self.table), (B,), device=device)]].unbind(1)
        chance = torch.rand(6, B, device=device)
        top, left = (chance[0] * (height - CROP + 1)).long(), (chance[1] * (width - CROP + 1)).long()
        i = torch.arange(CROP, device=device)
        down = torch.where(chance[2, :, None] < 0.1, CROP - 1 - i, i)  # [B, CROP]
        right = torch.where(chance[3, :, None] < 0.5, CROP - 1 - i, i)
        rows, columns = down[:, :, None].expand(-1, -1, CROP), right[:, None].expand(-1, CROP, -1)
        turn = (chance[4] < 0.2)[:, None, None]
        rows, columns = torch.where(turn, columns.mT, rows), torch.where(turn, rows.mT, columns)
        channels = torch.rand(B, 3, device=device).argsort(1)
        channels = torch.where((chance[5] < 0.05)[:, None], channels, torch.arange(3, device=device))
        place = (top[:, None, None] + rows) * width[:, None, None] + left[:, None, None] + columns
        index = (start[:, None] + channels * (height * width)[:, None])[..., None, None] + place[:, None]
        x.copy_(self.flat[index])
        x[:DRAWN].copy_(self.graphics[torch.randint(len(self.graphics), (DRAWN,), device=device)])
        x.div_(255)


WINDOW: dict[torch.device, Tensor] = {}

# ---- a step ----------------------------------------------------------------------------------------------------------


def ms_ssim_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """1 - MS-SSIM of each picture, with what could be negative kept above 0: [B]"""
    from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim

    if x.device not in WINDOW:
        WINDOW[x.device] = _fspecial_gauss_1d(11, 1.5).repeat([3, 1, 1, 1]).to(x)
    window = WINDOW[x.device]
    weights, product = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), 1.0
    for scale, weight in enumerate(weights):
        whole, contrast = _ssim(x_hat, x, data_range=1.0, win=window, size_average=False)
        part = contrast if scale < 4 else whole
        product = product * part.clamp(min=1e-3) ** weight
        x_hat, x = F.avg_pool2d(x_hat, 2), F.avg_pool2d(x, 2)
    return 1 - product.mean(1)


def levels(batch: int, count: int, device) -> Tensor:
    """Every level about as often as the others, in any order: [batch]"""
    return (torch.randperm(batch, device=device) + torch.randint(count, (1,), device=device)) % count


def tempered(loss: Tensor) -> Tensor:
    """Losses [B], of which the drawn crops count at most as much as the middle photograph."""
    middle = loss.detach()[DRAWN:].sort().values[(len(loss) - DRAWN) // 2]
    factor = (middle / loss.detach()[:DRAWN]).clamp(max=1)
    return torch.cat((loss[:DRAWN] * factor, loss[DRAWN:]))


class Step:
    """Model, optimizer and one step, which `capture` turns into a graph."""

    def __init__(self, model, lmbdas: tuple[float, ...], batch: int, device, metric: str, lr: float):
        from entroformer_lib.training.optimizer import QUANTILES_LR, _is_matrix, parts_of

        self.model, self.metric, self.device = model, metric, device
        self.lmbdas, self.peak, self.quantiles_lr = torch.tensor(lmbdas, device=device), lr, QUANTILES_LR
        self.all_lmbdas, self.batch = lmbdas, batch
        self.x = torch.zeros(batch, 3, CROP, CROP, device=device)
        self.level = torch.zeros(batch, device=device)
        self.lr, self.count = torch.zeros((), device=device), torch.zeros((), device=device)
        self.sums = torch.zeros(5, device=device)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.quantiles = [p for n, p in named if n.endswith(".quantiles")]
        matrices = [(p, parts_of(n)) for n, p in named if _is_matrix(n, p) and not n.endswith(".quantiles")]
        self.matrices, self.parts = [p for p, _ in matrices], [parts for _, parts in matrices]
        chosen = {id(p) for p in self.quantiles + self.matrices}
        self.others = [p for _, p in named if id(p) not in chosen]
        self.make_states()

    def make_states(self) -> None:
        """What the optimizer remembers, at its beginning."""
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adams = [([torch.zeros_like(p) for p in group], [torch.zeros_like(p) for p in group])
                      for group in (self.others, self.quantiles)]  # fmt: skip

    def forward(self) -> Tensor:
        model, x, level = self.model, self.x, self.level
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low == torch.bfloat16):
            out = model(x, level=level)
        lmbda = self.lmbdas[level.long()]
        bpp = sum(rates(out["likelihoods"], CROP * CROP).values())
        error = errors(out["x_hat"], x, "mse") if self.metric == "mse" else ms_ssim_error(out["x_hat"], x)
        goal = bpp + lmbda * (ERROR_WEIGHT[self.metric] * error)
        loss = evenly(lmbda, self.all_lmbdas) * (goal + unrest(out["y"]))
        loss = tempered(loss)
        photographs = slice(DRAWN, None)
        self.sums[:4] += torch.stack(
            [v.detach()[photographs].mean() for v in (goal / lmbda.sqrt(), bpp, error)] + [loss.detach().mean()]
        )
        return loss.mean() + model.aux_loss()

    def update(self) -> None:
        """Muon for matrices, Adam for the rest (training/optimizer.py), with the rate in a tensor."""
        from entroformer_lib.training.optimizer import orthogonal

        moved = self.matrices + self.others
        grads = [p.grad for p in moved]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1))
        self.sums[4] += norm
        self.count += 1
        for group, (means, squares), lr in zip(
            (self.others, self.quantiles), self.adams, (self.lr, self.quantiles_lr), strict=True
        ):
            if not group:
                continue
            grads = [p.grad for p in group]
            torch._foreach_lerp_(means, grads, 0.1)
            torch._foreach_mul_(squares, 0.999)
            torch._foreach_addcmul_(squares, grads, grads, 0.001)
            width = torch._foreach_sqrt(squares)
            torch._foreach_div_(width, (1 - 0.999**self.count).sqrt())
            torch._foreach_add_(width, 1e-8)
            steps = torch._foreach_div(means, width)
            torch._foreach_mul_(steps, lr / (1 - 0.9**self.count))
            torch._foreach_sub_(group, steps)
        aheads = [p.grad for p in self.matrices]
        torch._foreach_lerp_(self.momenta, aheads, 0.05)
        torch._foreach_lerp_(aheads, self.momenta, 0.95)
        by_shape: dict[tuple, list[int]] = {}
        for i, (ahead, parts) in enumerate(zip(aheads, self.parts, strict=True)):
            by_shape.setdefault((parts, *ahead.flatten(1).shape), []).append(i)
        for (parts, rows, columns), members in by_shape.items():
            part = rows // parts, columns
            updates = orthogonal(torch.cat([aheads[i].flatten(1).bfloat16().view(-1, *part) for i in members])).float()
            updates = (updates * (self.lr * (0.2 * math.sqrt(max(part))))).split(parts)
            matrices = [self.matrices[i] for i in members]
            torch._foreach_sub_(matrices, [u.reshape(m.shape) for m, u in zip(matrices, updates, strict=True)])

    @torch.no_grad()
    def _update(self) -> None:
        self.update()

    def once(self) -> None:
        self.forward().backward()
        self._update()

    def fill(self, pictures: Pictures) -> None:
        pictures.fill(self.x)
        self.level.copy_(levels(self.batch, len(self.all_lmbdas), self.device))

    def zero(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def state(self) -> list[Tensor]:
        lists = [self.matrices, self.others, self.quantiles, self.momenta, *(t for pair in self.adams for t in pair)]
        return [t for one in lists for t in one] + [self.count]

    def capture(self, pictures: Pictures):
        """->  a function that does a step"""
        self.fill(pictures)
        self.zero()
        self.forward().backward()  # whatever has no gradient now has none ever
        for name in ("matrices", "others", "quantiles"):
            setattr(self, name, [p for p in getattr(self, name) if p.grad is not None])
        self.make_states()
        self.sums.zero_()
        before = [t.detach().clone() for t in self.state()]
        if self.device.type != "cuda":

            def eager() -> None:
                self.zero()
                self.once()

            return eager
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.zero()
                self.once()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        say("warm", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        self.zero()
        graph = torch.cuda.CUDAGraph()
        # On a stream of its own a graph has a workspace of cuBLAS of its own, and may run beside others
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            self.once()
        with torch.no_grad():
            for t, value in zip(self.state(), before, strict=True):
                t.copy_(value)
            self.sums.zero_()
        torch.cuda.synchronize()
        say("captured")
        return graph.replay

    def run(self, pictures: Pictures, seconds: float, warm: float, save, most: int = 10**9, every: int = 100) -> int:
        """Steps for so many seconds.  ->  how many"""
        replay = self.capture(pictures)
        begin, done, kept, saved, cooled = time.monotonic(), 0, None, 0.0, 1.0
        while (part := (time.monotonic() - begin) / seconds) < 1 and done < most:
            rising, falling = part * seconds / warm, (1 - part) / max(1e-3, 1 - warm / seconds)
            self.lr.fill_(cooled * self.peak * min(1.0, rising, falling))
            self.fill(pictures)
            replay()
            done += 1
            if done % every == 0:
                goal, bpp, error, loss, norm = (self.sums / every).tolist()
                self.sums.zero_()
                quality = -10 * math.log10(max(error, 1e-9))
                if done % (5 * every) == 0 or done == every:
                    ms = (time.monotonic() - begin) / done * 1000
                    say(f"{self.metric} {done} loss {loss:.4f} goal {goal:.3f} bpp {bpp:.4f} dB {quality:.3f} "
                        f"norm {norm:.2f} lr {self.lr.item():.2e} {ms:.1f} ms")  # fmt: skip
                if not math.isfinite(loss):
                    say(f"not finite at {done}: back to the last good state, with half of the rate")
                    cooled /= 2
                    with torch.no_grad():
                        for t, value in zip(self.state(), kept, strict=True):
                            t.copy_(value)
                elif done % (5 * every) == 0 or kept is None:
                    kept = [t.detach().clone() for t in self.state()]
                if time.monotonic() - saved > 120:
                    saved = time.monotonic()
                    save(done)
        return done


class Latents:
    """Batches of latents of frozen transforms, for all entropy models of a run."""

    def __init__(self, model: nn.Module, batch: int, device):
        self.g_a, self.gain, self.batch, self.device = model.g_a, model.gain, batch, device
        self.x = torch.zeros(batch, 3, CROP, CROP, device=device)
        self.level = torch.zeros(batch, device=device)
        self.y = torch.zeros(batch, model.config.M, CROP // 16, CROP // 16, device=device)
        self.replay = None

    @torch.no_grad()
    def compute(self) -> None:
        self.y.copy_(self.g_a(self.x))

    def capture(self) -> None:
        if self.device.type != "cuda":
            self.replay = self.compute
            return
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                self.compute()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        self.replay = graph.replay

    def next(self, pictures: Pictures) -> None:
        pictures.fill(self.x)
        self.level.copy_(levels(self.batch, len(self.gain.log_gain), self.device))
        self.replay()


class RateStep(Step):
    """A step of the entropy model alone: the rate of rounded y (training/loss.py).

    missing: the largest share of latents that are hidden from the context of a crop; one_way: the share of crops whose
    context comes before a site (models/context.py, `Gaps`).
    """

    def __init__(self, model, latents: Latents, lr: float, missing: float = 0.0, one_way: float = 0.0):
        for part in (model.g_a, model.g_s, model.gain):
            part.requires_grad_(False)
        super().__init__(model, model.config.lmbdas, latents.batch, latents.device, "rate", lr)
        self.latents, self.x, self.level = latents, None, latents.level
        self.missing, self.one_way = missing, one_way

    def fill(self, pictures: Pictures) -> None:
        """What the latents are is not this step's affair."""

    def forward(self) -> Tensor:
        model, level = self.model, self.level
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low == torch.bfloat16):
            y = model.scaled(self.latents.y, level)
            noise = {"y": torch.floor(y + 0.5) - y}
            likelihoods, _ = model.likelihoods(y, noise, self.gaps(y), level=level)
        bpp = sum(rates(likelihoods, CROP * CROP).values())
        loss = tempered(evenly(self.lmbdas[level.long()], self.all_lmbdas) * bpp)
        self.sums[1:4] += torch.stack([bpp.detach()[DRAWN:].mean(), torch.ones_like(loss[0]), loss.detach().mean()])
        return loss.mean() + model.aux_loss()

    def gaps(self, y: Tensor) -> Gaps:
        B, _, h, w = y.shape
        share = self.missing * torch.rand(B, 1, 1, 1, device=y.device)
        missing = torch.rand(B, 1, h, w, device=y.device) < share if self.missing else None
        return Gaps(missing=missing, one_way=torch.rand(B, device=y.device) < self.one_way if self.one_way else None)


def entropy_model(
    word: str, config: EntroformerConfig, state: dict[str, Tensor], device, before: dict[str, Tensor] | None = None
) -> tuple[nn.Module, dict]:
    """One behind the transforms of `state`, as a word of --kinds names it, and what is noted of it; it goes on from the
    weights that it has in `before`."""
    name, lr = word.split(":")
    name, *changes = name.split("/")
    kind, width, seed, warm = re.fullmatch(r"([a-z0-9-]+)(?:@(\d+))?(?:#(\d+))?([+^])?", name).groups()
    variant, fields = KINDS[kind]
    wanted = named_config(f"tiny-{variant}")
    fields = {field: getattr(wanted, field) for field in ("context", "hyper", "hyperprior", "context_layers")} | fields
    if width:
        fields |= {"dim": int(width), "heads": int(width) // 32, "Z": int(width) // 2}
    fields |= parse_fields(tuple(change for change in changes if not change.startswith(HIDDEN)))
    hidden = {key: float(value) for key, value in (c.split("=") for c in changes if c.startswith(HIDDEN))}
    name = "-".join((name, *(change.replace("=", "") for change in changes)))
    torch.manual_seed(int(seed or 0))
    model = network.Network(config.replaced(**fields))
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if warm != "+":
        taken = ("g_a.", "g_s.", "gain.", *(HYPERPRIOR if warm else ()))
        fits = {k: v for k, v in fits.items() if k.startswith(taken)}
    name = name.translate(str.maketrans("@#+^", "-_wh"))
    known = {k.removeprefix(f"{name}/"): v for k, v in (before or {}).items() if k.startswith(f"{name}/")}
    nn.Module.load_state_dict(model, fits | known, strict=False)
    say(name, f"{len(fits)} tensors of the old model, {len(known)} of its own before")
    note = {"config": model.config.to_json(), "kind": kind, "lr": float(lr), "seed": int(seed or 0), "warm": bool(warm)}
    note |= {"name": name, "hidden": hidden, "fresh": warm != "+" and not known}
    return model.to(device).train(), note


def entropy_models(args, pictures: Pictures, config: EntroformerConfig, state: dict[str, Tensor], device) -> None:
    """Trains entropy models behind the transforms of `state`, all at the same time and on the same latents."""
    steps, replays, notes, latents = [], [], [], None
    before, _ = read_pieces(args.before)
    for word in args.kinds:
        model, note = entropy_model(word, config, state, device, before)
        if latents is None:
            install_on(model)
            latents = Latents(model, args.batch, device)
            latents.capture()
            latents.next(pictures)
        if note["fresh"]:
            begin_at_channels(model, latents.y)
        step = RateStep(model, latents, note["lr"], **note["hidden"])
        try:
            begin = time.monotonic()
            replay = step.capture(pictures)
        except Exception as error:  # the others go on
            say(note["name"], "left out:", type(error).__name__, str(error)[:300])
            continue
        if device.type == "cuda":
            replay()
            torch.cuda.synchronize()
            again = time.monotonic()
            for _ in range(5):
                replay()
            torch.cuda.synchronize()
            say(note["name"], f"ready in {again - begin:.0f} s, {(time.monotonic() - again) * 200:.1f} ms alone")
        steps.append(step)
        replays.append(replay)
        notes.append(note)
    for step in steps:
        step.sums.zero_()  # of the steps that were timed
    begin, done, curves = time.monotonic(), 0, []
    while (part := (time.monotonic() - begin) / args.seconds) < 1 and done < args.most:
        rising, falling = part * args.seconds / args.warm, (1 - part) / max(1e-3, 1 - args.warm / args.seconds)
        latents.next(pictures)
        for step in steps:
            step.lr.fill_(step.peak * min(1.0, rising, falling))
        for replay in replays:
            replay()
        if device.type == "cuda" and done % 4 == 0:
            torch.cuda.synchronize()  # the clock is the GPU's
        done += 1
        if done % args.every == 0:
            mean = [float(step.sums[1]) / args.every for step in steps]
            for step in steps:
                step.sums.zero_()
            seconds = time.monotonic() - begin
            bpp = {note["name"]: round(m, 5) for note, m in zip(notes, mean, strict=True)}
            curves.append({"step": done, "seconds": round(seconds, 2), "bpp": bpp})
            if done % (10 * args.every) == 0:
                say(done, f"{seconds / done * 1000:.1f} ms", " ".join(f"{name} {m:.4f}" for name, m in bpp.items()))
    (args.out / "curves.json").write_text(json.dumps(curves))
    by_file: dict[str, Tensor] = {}
    for step, note in zip(steps, notes, strict=True):
        for key, value in rounded(step.model, leave=("g_a.", "g_s.", "gain.")).items():
            by_file[f"{note['name']}/{key}"] = value
        note |= {"steps": done, "batch": args.batch}
    in_pieces(by_file, args.out, "kinds", {"kinds": notes})
    say("done", done)


def rounded(model: nn.Module, leave: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The weights, matrices in half precision; without the parts to leave."""
    tensors = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
    tensors = {k: v for k, v in tensors.items() if not (leave and k.startswith(leave))}
    return {k: (v.half() if v.dim() > 1 and v.numel() > 4096 else v).cpu().contiguous() for k, v in tensors.items()}


def read_pieces(pieces: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the files of `in_pieces` hold, as float32, and the metadata of the last."""
    tensors, about = {}, {}
    for piece in pieces:
        with safe_open(piece, "pt") as file:
            about = file.metadata()
            tensors |= {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
    return tensors, about


def in_pieces(tensors: dict[str, Tensor], out: Path, name: str, note: dict) -> None:
    """Files of at most PIECE bytes."""
    piece, size, number = {}, 0, 0
    for key, value in [*tensors.items(), (None, None)]:
        if key is None or size + value.nbytes > PIECE:
            save_file(piece, out / f"{name}-{number}.safetensors", metadata={"note": json.dumps(note)})
            piece, size, number = {}, 0, number + 1
        if key is not None:
            piece[key] = value
            size += value.nbytes


def main() -> None:
    global CONV_BLOCK, TRANSFORMER_BLOCK, low
    parser = argparse.ArgumentParser()
    for name, kind, default in (
        ("data", Path, None), ("out", Path, None), ("seconds", float, 60.0), ("batch", int, 72),
        ("lr", float, 1.5e-3), ("warm", float, 15.0), ("ms-ssim-seconds", float, 0.0), ("ms-ssim-lr", float, 4e-4),
        ("graphics", int, 4096), ("most", int, 10**9), ("device", str, "cuda"), ("compile", int, 1),
        ("every", int, 100),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--init", type=Path, nargs="+", help="weights, in one file or in pieces")
    parser.add_argument("--before", type=Path, nargs="*", default=[], help="what an earlier run of --kinds wrote")
    parser.add_argument("--kinds", nargs="*", default=[], help="entropy models alone, such as serial:1e-3")
    args = parser.parse_args()
    photographs, graphics = read(args.data, args.graphics)
    say(f"read {len(photographs)} photographs")
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        low = torch.float32
    say(torch.__version__, torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    state, about = read_pieces(args.init)
    config = EntroformerConfig.from_json((json.loads(about["note"]) if "note" in about else about)["config"])
    pictures = Pictures(photographs, graphics, device)
    model = network.Network(config)
    missing, unexpected = nn.Module.load_state_dict(model, state, strict=False)
    say("missing", [k for k in missing if "cdf" not in k and "offset" not in k], "unexpected", unexpected)
    model.to(device).train()
    install(model)
    if args.compile:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        inductor.compile_threads = max(4, (os.cpu_count() or 4))
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 256
        CONV_BLOCK = torch.compile(conv_block, dynamic=False, fullgraph=True)
        TRANSFORMER_BLOCK = torch.compile(transformer_block, dynamic=False, fullgraph=True)
    step = Step(model, config.lmbdas, args.batch, device, "mse", args.lr)
    note = {"config": config.to_json(), "batch": args.batch, "crop": CROP, "lr": args.lr, "seconds": args.seconds}
    if args.kinds:
        return entropy_models(args, pictures, config, state, device)
    save = lambda done, name="mse", **more: in_pieces(rounded(model), args.out, name, note | {"steps": done} | more)  # noqa: E731
    if args.seconds:
        done = step.run(pictures, args.seconds, args.warm, save, args.most, args.every)
        save(done, finished=True)
        say("mse done", done)
    if args.ms_ssim_seconds:
        lmbdas = tuple(float(f"{MS_SSIM_OVER_MSE * lmbda:.4g}") for lmbda in config.lmbdas)
        second = Step(model, lmbdas, args.batch, device, "ms-ssim", args.ms_ssim_lr)
        done = second.run(pictures, args.ms_ssim_seconds, 5.0, lambda done: None, args.most, args.every)
        save(done, "ms-ssim", lmbdas=lmbdas, finished=True)
        say("ms-ssim done", done)


if __name__ == "__main__":
    sys.exit(main())
