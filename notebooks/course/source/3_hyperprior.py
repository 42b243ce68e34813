# %% [markdown]
# # Lesson 3: The hyperprior
#
# **After this lesson you can**
#
# - say why one fixed histogram for each channel wastes bits, and see it in a picture;
# - send a description of the busy places, count what it costs, and find out when it pays for itself;
# - train a small hyperprior that decides by itself what to send;
# - look at scales as an image, and say where the bits go.
#
# You need 75 minutes, and lessons 1 and 2.

# %% tags=["parameters"]
picture = "astronaut"  # to test on; the network learns from the other three of astronaut, chelsea, coffee, rocket
side = 512  # pixels of the test picture, a multiple of 16; coffee and rocket have 384, chelsea 288
steps = 400  # of the training

# %%
import numpy as np
import torch
from scipy.fft import dctn
from torch import nn

from entroformer_lib import load_model
from entroformer_lib.datasets import SAMPLES, sample_picture
from entroformer_lib.studies import rate_distortion as rd
from entroformer_lib.teaching import check, grey, hint
from entroformer_lib.views import course_figures as cf

# %% [markdown]
# ## A picture first
#
# Lesson 2 ended with 64 numbers for each block of 8 x 8 pixels. We take the waves of JPEG as the transform here, which
# are nearly what PCA found, and round with a step of 0.12. The result is `y`: 64 *channels*, each a small image with
# one pixel for each block.


# %%
def latents(image, step=0.12):
    """Grey bytes [H, W] -> y: tensor [1, 64, H/8, W/8] of whole numbers"""
    H, W = image.shape[0] // 16 * 16, image.shape[1] // 16 * 16
    blocks = (image[:H, :W] / 255 - 0.5).reshape(H // 8, 8, W // 8, 8)
    y = np.round(dctn(blocks, axes=(1, 3), norm="ortho") / step).transpose(1, 3, 0, 2)
    return torch.tensor(y.reshape(1, 64, H // 8, W // 8), dtype=torch.float32)


# %%
photo = grey(picture, side)
y = latents(photo)
sizes = np.log2(1 + y[0, 1:].abs().sum(dim=0).numpy())
cf.pictures({"photograph": photo, "how large the latents are": sizes}, bar="log2(1 + sum of |y|)", columns=2)

# %% [markdown]
# The latents show the photograph again. Where it is quiet, all but the first of the 64 are 0. Along the edges they are
# large, *all at the same time*. But lesson 2 used one histogram for each channel, the same in the quiet and in the busy
# places. The picture above says that we can do better.
#
# ## 1. Bits from a Gaussian
#
# A histogram has many numbers. A Gaussian has one, its **scale** (its standard deviation), when the mean is 0. Latents
# are whole numbers, so the probability of $y$ is the area under the Gaussian between $y - 1/2$ and $y + 1/2$:
#
# $$p(y) = \Phi\left(\frac{y + 1/2}{s}\right) - \Phi\left(\frac{y - 1/2}{s}\right)$$
#
# where $\Phi$ is the cumulative distribution of the normal distribution, in PyTorch `torch.special.ndtr`.
#
# **Exercise 3.1.** Write `gaussian_bits`: the bits of each latent. Let no probability be below $10^{-9}$, or some
# latent would cost infinitely many bits.


# %% tags=["exercise"]
def gaussian_bits(y, scale):
    """Whole numbers and scales, tensors of shapes that fit each other -> bits of each"""
    return ...


# %% tags=["solution"]
def gaussian_bits(y, scale):
    """Whole numbers and scales, tensors of shapes that fit each other -> bits of each"""
    size = y.abs()  # the same area, but in the tail where small differences keep their digits
    prob = torch.special.ndtr((0.5 - size) / scale) - torch.special.ndtr((-0.5 - size) / scale)
    return -torch.log2(prob.clamp_min(1e-9))


# %% tags=["hint"]
hint("3.1")

# %% tags=["check"]
check("3.1", gaussian_bits)

# %%
widths = 2.0 ** torch.arange(-2, 6.1, 0.5)
lines = {f"y = {value}": (widths, gaussian_bits(torch.tensor(float(value)), widths)) for value in (0, 2, 10)}
cf.curves(lines, "scale", "bits", log="x", best=True)

# %% [markdown]
# Each latent has its own best scale, the ring: about its own size. A zero wants a small scale, a 10 a large one. A
# channel with *one* scale must find a compromise, and both pay for it.


# %%
def best_scales(values):
    """Of each channel the scale with the fewest bits. [64, n] -> [64]"""
    tried = torch.logspace(-1.3, 2.3, 60)
    return tried[torch.stack([gaussian_bits(values, scale).sum(dim=1) for scale in tried]).argmin(dim=0)]


others = [latents(grey(name)) for name in SAMPLES if name != picture]
known = torch.cat([of_picture[0].flatten(1) for of_picture in others], dim=1)  # [64, n]: what we may learn from
fixed = best_scales(known)
fixed_bits = gaussian_bits(y, fixed.view(1, 64, 1, 1))
print(f"one scale for each channel: {fixed_bits.sum() / photo.size:.3f} bits per pixel")

# %% [markdown]
# ## 2. Side information, by hand
#
# An old idea (Chen and Smith, 1977): sort the blocks into a few **classes**, from quiet to busy, and send the class of
# each block first. Each class has its own scales. The class is *side information*: bits that say nothing about the
# picture by themselves, but make all other bits cheaper.
#
# **Exercise 3.2.** Write `activity`: one number for each block, larger where the block is busier. Any measure is
# right that helps nearly as much as the sum of the sizes. Channel 0 is the brightness of the block.


# %% tags=["exercise"]
def activity(y):
    """[1, 64, h, w] -> [h, w]"""
    return ...


# %% tags=["solution"]
def activity(y):
    """[1, 64, h, w] -> [h, w]"""
    return y[0, 1:].abs().sum(dim=0)


# %% tags=["hint"]
hint("3.2")

# %% tags=["check"]
check("3.2", activity)


# %%
def classes_of(y, bounds):
    """The class of each block: how many bounds lie below its activity. [h, w]"""
    return torch.bucketize(torch.as_tensor(activity(y)).float().reshape(y.shape[2:]), bounds)


def bounds_for(count):
    """Bounds that sort the blocks of the other pictures into `count` classes of equal size."""
    seen = torch.cat([torch.as_tensor(activity(of_picture)).float().flatten() for of_picture in others])
    return torch.quantile(seen, torch.linspace(0, 1, count + 1)[1:-1])


# %% [markdown]
# **Exercise 3.3.** The decoder must get the classes, and they are not free. Write `side_information`: how many bits do
# all classes of a picture cost together, when they are coded with their own histogram? (Lesson 1 knows.)


# %% tags=["exercise"]
def side_information(classes):
    """[h, w] whole numbers -> bits of all of them together"""
    return ...


# %% tags=["solution"]
def side_information(classes):
    """[h, w] whole numbers -> bits of all of them together"""
    counts = torch.unique(classes, return_counts=True)[1]
    probs = counts / counts.sum()
    return -(counts * torch.log2(probs)).sum()


# %% tags=["hint"]
hint("3.3")

# %% tags=["check"]
check("3.3", side_information)


# %%
def by_classes(count):
    """Bits per pixel of the latents, and of the classes, with so many classes."""
    bounds = bounds_for(count)
    theirs = torch.cat([classes_of(of_picture, bounds).flatten() for of_picture in others])
    scales = [best_scales(known[:, theirs == c]) if (theirs == c).any() else fixed for c in range(count)]
    mine = classes_of(y, bounds)
    bits_y = gaussian_bits(y[0], torch.stack(scales)[mine].permute(2, 0, 1)).sum()
    return float(bits_y) / photo.size, float(side_information(mine)) / photo.size


counts = [1, 2, 4, 8, 16, 32, 64]
parts = np.array([by_classes(count) for count in counts]).T
lines = {"latents": (counts, parts[0]), "classes": (counts, parts[1]), "together": (counts, parts.sum(axis=0))}
cf.curves(lines, "number of classes", "bits per pixel", log="x", best=True)

# %%
best = int(parts.sum(axis=0).argmin())
saved = 1 - parts[:, best].sum() / parts[0, 0]
print(f"best with {counts[best]} classes: {parts[0, best]:.3f} + {parts[1, best]:.3f} bits per pixel")
print(f"{saved:.0%} of all bits are saved")
print(f"one bit for a class saves {(parts[0, 0] - parts[0, best]) / parts[1, best]:.1f} bits of latents")

# %% [markdown]
# **Finding.** Side information pays for itself: for *astronaut* about a third of all bits is saved, and the classes are
# less than a tenth of what is left. But more classes are not always better. Look at the blue line: beyond 16 classes
# the latents hardly become cheaper, while the classes still cost more and more. Who tells us how much to send? The sum
# of both, and nothing else.
#
# ## 3. A network decides what to send
#
# Ballé and others (2018) let a network do it. $h_a$ looks at $y$ and makes a small image $z$ of it. $z$ is rounded and
# sent first. $h_s$ makes of it a scale for **each single latent**. This is the **hyperprior**. All is trained together,
# and what it minimises is the sum of both: the bits of $y$ and the bits of $z$.

# %%
boxes = {"y": ("latents y", 0, 0), "c": ("coder of y", 3, 0), "d": ("decoder of y", 4.2, 0)}
boxes |= {"a": ("$h_a$", 0, 1), "z": ("round z,\ncode z", 1.5, 1), "s": ("$h_s$", 3, 1)}
boxes |= {"u": ("decode z", 1.5, 2), "t": ("$h_s$", 4.2, 2)}
arrows = [("y", "c", ""), ("c", "d", "bits of y"), ("y", "a", ""), ("a", "z", "z"), ("z", "s", "$\\hat{z}$")]
arrows += [
    ("s", "c", "scales"),
    ("z", "u", "bits of z"),
    ("u", "t", "the same $\\hat{z}$"),
    ("t", "d", "the same\nscales"),
]
cf.diagram(boxes, arrows)

# %% [markdown]
# The decoder has the last row and the box on the right. Encoder and decoder both need the scales. So they may be
# computed from what **both** have.
#
# **Exercise 3.4.** Write `side_path`. `h_a` and `h_s` are networks. `h_s` gives *logarithms* of scales: a
# network's output may be below 0, and a scale may not. In training, noise stands in for rounding, as in lesson 2.


# %% tags=["exercise"]
def side_path(y, h_a, h_s, training):
    """-> z_hat, as it is sent; scales [B, 64, h, w], as encoder and decoder compute them"""
    z_hat = ...
    scales = ...
    return z_hat, scales


# %% tags=["solution"]
def side_path(y, h_a, h_s, training):
    """-> z_hat, as it is sent; scales [B, 64, h, w], as encoder and decoder compute them"""
    z = h_a(y)
    z_hat = z + torch.rand_like(z) - 0.5 if training else torch.round(z)
    scales = torch.exp(h_s(z_hat))
    return z_hat, scales


# %% tags=["hint"]
hint("3.4")

# %% tags=["check"]
check("3.4", side_path)

# %% [markdown]
# **Exercise 3.5.** And what is the price? Write `total_bits` with your `gaussian_bits`. `z_hat` is coded with
# `z_scale`, a fixed scale for each of its channels.


# %% tags=["exercise"]
def total_bits(y, scales, z_hat, z_scale):
    """-> all bits of the file: one number"""
    return ...


# %% tags=["solution"]
def total_bits(y, scales, z_hat, z_scale):
    """-> all bits of the file: one number"""
    return gaussian_bits(y, scales).sum() + gaussian_bits(z_hat, z_scale).sum()


# %% tags=["hint"]
hint("3.5")

# %% tags=["check"]
check("3.5", total_bits)


# %%
class Hyperprior(nn.Module):
    def __init__(self, Z=4, width=32):
        super().__init__()
        self.h_a = nn.Sequential(nn.Conv2d(64, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, Z, 4, 2, 1))
        self.h_s = nn.Sequential(nn.ConvTranspose2d(Z, width, 4, 2, 1), nn.GELU(), nn.Conv2d(width, 64, 3, padding=1))
        self.z_log_scale = nn.Parameter(torch.zeros(Z, 1, 1))

    def forward(self, y):
        def log_scales(z_hat):  # begins near the fixed scales, and stays in a sane range
            return (fixed.log().view(64, 1, 1) + self.h_s(z_hat)).clamp(-3, 6)

        z_hat, scales = side_path(torch.log1p(y.abs()), self.h_a, log_scales, self.training)
        return scales, z_hat, self.z_log_scale.exp()


# %%
def crops(rng, count=8, size=16):
    """Squares from the latents of the other pictures: [count, 64, size, size]"""
    found = []
    for of_picture in (others[i] for i in rng.integers(len(others), size=count)):
        top, left = (2 * rng.integers((length - size) // 2) for length in of_picture.shape[2:])
        found.append(of_picture[:, :, top : top + size, left : left + size])
    return torch.cat(found)


# %%
torch.manual_seed(0)
rng, model = np.random.default_rng(0), Hyperprior()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
losses = []
for _ in range(steps):
    batch = crops(rng)
    bpp = total_bits(batch, *model(batch)) / batch.numel()
    optimizer.zero_grad()
    bpp.backward()
    optimizer.step()
    schedule.step()
    losses.append(bpp.item())
means = np.convolve(losses, np.ones(25) / 25, mode="valid")  # of 25 steps: single crops differ much
cf.curves({"training": (np.arange(len(means)), means)}, "step", "bits per pixel", points=False)

# %%
with torch.no_grad():
    scales, z_hat, z_scale = model.eval()(y)
    bits_y, bits_z = gaussian_bits(y, scales), gaussian_bits(z_hat, z_scale)
table = {"one scale for each channel": float(fixed_bits.sum()) / photo.size}
table[f"{counts[best]} classes, by hand"] = parts[:, best].sum()
table["hyperprior"] = float(total_bits(y, scales, z_hat, z_scale)) / photo.size
cf.bars(table, "bits per pixel, side information included")

# %%
print(f"hyperprior: {1 - table['hyperprior'] / table['one scale for each channel']:.0%} saved")
print(f"z takes {bits_z.sum() / (bits_y.sum() + bits_z.sum()):.1%} of the bits")
print(f"one bit of z saves {(fixed_bits.sum() - bits_y.sum()) / bits_z.sum():.1f} bits of y")

# %% [markdown]
# **Finding.** The hyperprior learned in 400 steps, from three pictures, what Chen and Smith had thought out, and a
# little more. On *astronaut* it saves between 30% and 42%, and $z$ takes between 3% and 9% of the bits. Be honest about
# the difference: most of the gain comes from the *idea* of side information. The network takes the rest, and nobody had
# to choose the number of classes.
#
# ## 4. Scales as an image
#
# What did $z$ say? We look at the scales that $h_s$ made of it: here for one slow wave and for one fast wave.

# %%
slow, fast = 1, 27  # channels: a slow wave from left to right, and a fast one in both directions
shown = {f"log2 of the scale, channel {c}": scales[0, c].log2().numpy() for c in (slow, fast)}
cf.pictures({"photograph": photo, **shown}, bar="log2", columns=3)

# %%
wide = scales[0] > scales[0, 1:].quantile(0.98)  # where scales are large, rounding does not hide the shape
wide[0] = False  # brightness: large black or white places have one value many times
one = fixed.view(64, 1, 1).expand_as(scales[0])[wide]
shapes = {"y": y[0][wide], "y / one scale": y[0][wide] / one, "y / scale": y[0][wide] / scales[0][wide]}
cf.histograms(shapes, "value", np.arange(-6.25, 6.5, 0.5), density=True)

# %% [markdown]
# The latents with the largest scales are shown, one of fifty, without those of channel 0, the brightness. On the right
# each was divided by its own scale, and a Gaussian of width 1 is left. In the middle each was divided by the one scale
# of its channel: a peak and long tails, which no Gaussian fits. A mixture of narrow and wide Gaussians looks like that.
# The hyperprior takes the mixture apart.
#
# ## 5. Where the bits go

# %%
before, after = fixed_bits[0].sum(dim=0).numpy(), bits_y[0].sum(dim=0).numpy()
maps = {"one scale": before, "hyperprior": after, "saved": before - after}
cf.pictures(maps, bar="bits of a block", columns=3)

# %%
quiet = np.argsort(before.ravel())[: before.size // 2]  # the half of the blocks that was cheapest before
saved = (before - after).ravel()
print(f"the quiet half of the blocks gives {saved[quiet].sum() / saved.sum():.0%} of what is saved")
largest = np.sort(after.ravel())[::-1]
share = largest[: largest.size // 10].sum() / largest.sum()
print(f"now the most expensive tenth of the blocks takes {share:.0%} of y")

# %% [markdown]
# Look at *saved*: bits are saved in the quiet places (each block a little) **and** at the edges (a lot in each). In
# lesson 1 you saw why. At the edges the one scale was too small, and that is punished hard. In the quiet places it was
# too large. That costs a little in each, but there are many of them.
#
# **A common mistake.** To compute the scales from something that the decoder does not have. With the latents themselves
# the bits become wonderful:

# %%
cheating = gaussian_bits(y, y.abs().clamp_min(0.05))
print(f"{cheating.sum() / photo.size:.3f} bits per pixel, and no decoder in the world can read them")

# %% [markdown]
# A milder form is to forget the rounding of $z$, or to forget to count its bits. The check of exercise 3.4 looked for
# the first one, that of 3.5 for the second.
#
# ## 6. A real one
#
# The suite ships a model with a hyperprior and without a context model. It works in colour, with latents on a grid of
# 16 x 16 pixels. Its transforms and its hyperprior learned together for days, with another model. Then the hyperprior
# learned alone for half an hour. Does what you found
# hold there?

# %%
shipped = load_model("blocks-hyperprior@0.007")
bits = rd.bit_maps(shipped, rd.middle(sample_picture(picture), side))
share = bits["z"].sum() / (bits["y"].sum() + bits["z"].sum())
print(f"{(bits['y'].sum() + bits['z'].sum()) / photo.size:.3f} bits per pixel, z takes {share:.1%}")
cf.pictures({"photograph": photo, "y": bits["y"], "z": bits["z"]}, bar="bits of a place", columns=3)

# %% [markdown]
# ## To argue about
#
# $z$ takes about a twentieth of the bits and saves a third. So let us send ten times as much $z$! Who is against it,
# and with which argument? Look at the curve of section 2 first. Then say who makes this choice in a trained hyperprior,
# and when.
#
# ## If there is time
#
# 1. Give the hyperprior more channels, `Hyperprior(Z=16)`. Does `z` take more bits? Is the sum smaller?
# 2. Print `z_hat` as images. Can you say what each channel tells?
# 3. Set `step` in `latents` to 0.4. Does side information still pay for itself when there is so little to code?
#
# ## Further reading
#
# - W.-H. Chen, C. H. Smith, *Adaptive Coding of Monochrome and Color Images*, IEEE Transactions on Communications,
#   1977: the classes.
# - J. Ballé, D. Minnen, S. Singh, S. J. Hwang, N. Johnston, *Variational Image Compression with a Scale Hyperprior*,
#   ICLR 2018, arXiv:1802.01436.
# - D. Minnen, J. Ballé, G. Toderici, *Joint Autoregressive and Hierarchical Priors for Learned Image Compression*,
#   NeurIPS 2018, arXiv:1809.02736: means as well as scales, and the context that is the subject of lesson 4.
