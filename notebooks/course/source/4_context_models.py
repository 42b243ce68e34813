# %% [markdown]
# # Lesson 4: Context models
#
# **After this lesson you can**
#
# - say what a decoder already knows when it comes to a latent, and write it down as a mask;
# - test any network for causality, and recognise the classic mistake by its wonderful numbers;
# - decode a picture in raster order, and say why that is slow;
# - code in two passes on a checkerboard, and say which half pays for the speed.
#
# You need 75 minutes, and lessons 1 and 3.

# %% tags=["parameters"]
picture = "astronaut"  # to test on; the network learns from the other three of astronaut, chelsea, coffee, rocket
side = 512  # pixels of the test picture, a multiple of 64; coffee and rocket have 384, chelsea 256
steps = 300  # of each training
flips = 4  # of each picture to learn from: as it is, mirrored, upside down, both

# %%
import time

import constriction
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from entroformer_lib import load_model
from entroformer_lib.datasets import SAMPLES, sample_picture
from entroformer_lib.inspection.scene import Scene
from entroformer_lib.studies.rate_distortion import middle
from entroformer_lib.teaching import check, hint
from entroformer_lib.views import course_figures as cf

# %% [markdown]
# ## A picture first
#
# We take the latents of the shipped model with a hyperprior from the end of lesson 3: a grid with one site for each
# 16 x 16 pixels, and 384 channels. We keep the 32 channels that cost most bits; they take more than half of all bits.
#
# `look` gives three things for each latent: $y$, and the mean and the scale that the hyperprior predicts for it.

# %%
model = load_model("blocks-hyperprior@0.007")


@torch.no_grad()
def look(photo):
    """A picture -> its scene; y, means, scales: [3, 384, h, w]"""
    scene = Scene(model, photo, torch.float32)
    means, scales = scene.model.distributions(scene.y_hat, scene.hyper, rate=scene.rate)
    return scene, torch.cat([scene.y_hat, means, scales]).clone()


# %%
def flipped(photo):
    """The picture, mirrored, upside down, and both."""
    mirrored = photo.transpose(Image.FLIP_LEFT_RIGHT)
    return [photo, mirrored, *(one.transpose(Image.FLIP_TOP_BOTTOM) for one in (photo, mirrored))]


photo = middle(sample_picture(picture), side)
scene, whole = look(photo)
others = [look(one)[1] for name in SAMPLES if name != picture for one in flipped(sample_picture(name))[:flips]]

# %% [markdown]
# One more word for this lesson. Let a latent be expected at `mean`, give or take `scale`. Its **surprise** is
#
# $$u = \frac{y - \text{mean}}{\text{scale}}$$
#
# A surprise of 0 is what we expected, 3 is far more. The bits of a latent follow from its surprise and its scale.
# `shift` and `stretch` are for the networks of this lesson: they move the mean and change the scale.


# %%
NOTHING = torch.zeros(())


def bits(u, scale, shift=NOTHING, stretch=NOTHING):
    """Bits of each latent, lesson 3's area under a Gaussian.  shift: in scales; stretch: a logarithm"""
    spread = (scale * stretch.exp()).clamp(0.05, 400)
    size = (u - shift).abs() * scale
    prob = torch.special.ndtr((0.5 - size) / spread) - torch.special.ndtr((-0.5 - size) / spread)
    return -torch.log2(prob.clamp_min(1e-9))


# %%
y, means, scales = whole
of_channels = bits((y - means) / scales, scales).sum(dim=(1, 2))
expensive = of_channels.argsort(descending=True)[:32]
print(f"32 of 384 channels take {of_channels[expensive].sum() / of_channels.sum():.0%} of the bits of y")
test, others = whole[:, expensive], [one[:, expensive] for one in others]

# %% [markdown]
# At first we expect something simple: each channel has one mean and one scale, those of the other pictures. (In the
# code they are `mean` and `scale`. `means` and `scales`, of each latent, are the hyperprior's, and wait for section 6.)
# How alike are the surprises of two neighbours?

# %%
known = torch.cat([one[0].flatten(1) for one in others], dim=1)  # [32, n]
mean, scale = known.mean(dim=1).view(32, 1, 1), known.std(dim=1).view(32, 1, 1)


def shifted(values, dy, dx, reach=3):
    """The part of the grid that lies (dy, dx) from its middle part, as a list for each channel."""
    h, w = values.shape[1:]
    return values[:, reach + dy : h - reach + dy, reach + dx : w - reach + dx].flatten(1)


# %%
def likeness(values):
    """Correlation with the neighbour at (dy, dx), mean over channels: [7, 7], not a number in the middle"""
    found = np.full((7, 7), np.nan)
    for dy, dx in np.argwhere(np.isnan(found)) - 3:
        pairs = zip(shifted(values, 0, 0), shifted(values, dy, dx), strict=True)
        found[dy + 3, dx + 3] = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs if a.std() * b.std() > 0])
    found[3, 3] = np.nan
    return found


u = (test[0] - mean) / scale
maps = {"latents and their neighbours": likeness(u), "their sizes |u|": likeness(u.abs())}
cf.pictures(maps, bar="correlation", columns=2, height=2.6)

# %% [markdown]
# The white square in the middle is the latent itself, and around it lie its neighbours. The closest ones are the most
# alike, in value and in size. A transform should take such likeness away, and it did not take all. So whoever knows the
# neighbours can predict better. Which neighbours does the *decoder* know?
#
# ## 1. The mask
#
# Let the coder go through the sites in **raster order**: row by row, each from left to right. When the decoder comes to
# a site, it has all sites above, and in the same row those to the left. A convolution should see these and no others.
#
# **Exercise 4.1.** Write `causal_mask`: a square of `side` x `side` numbers, 1 where the decoder knows the neighbour,
# 0 elsewhere. The middle is the site that is to be decoded.


# %% tags=["exercise"]
def causal_mask(side):
    """An odd side -> [side, side] of 0 and 1"""
    return ...


# %% tags=["solution"]
def causal_mask(side):
    """An odd side -> [side, side] of 0 and 1"""
    mask = np.zeros((side, side))
    mask[: side // 2] = 1  # the rows above
    mask[side // 2, : side // 2] = 1  # to the left
    return mask


# %% tags=["hint"]
hint("4.1")

# %% tags=["check"]
check("4.1", causal_mask)

# %%
raster = torch.tensor(np.asarray(causal_mask(5), dtype=np.float32)).reshape(5, 5)
sees_itself = raster.clone()
sees_itself[2, 2] = 1  # the classic mistake: we keep it to look at its consequences
everything = torch.ones(5, 5)
cf.masks({"causal": raster.numpy(), "the mistake": sees_itself.numpy()})

# %% [markdown]
# **Exercise 4.2.** Write `masked_conv`: a convolution whose kernels are 0 where the mask is 0. What comes out has as
# many rows and columns as what went in. Beyond the border everything is 0: nothing surprising there.


# %% tags=["exercise"]
def masked_conv(u, weight, bias, mask):
    """u [B, C, h, w], weight [out, C, side, side], bias [out], mask [side, side] -> [B, out, h, w]"""
    return ...


# %% tags=["solution"]
def masked_conv(u, weight, bias, mask):
    """u [B, C, h, w], weight [out, C, side, side], bias [out], mask [side, side] -> [B, out, h, w]"""
    return F.conv2d(u, weight * mask, bias, padding=mask.shape[-1] // 2)


# %% tags=["hint"]
hint("4.2")

# %% tags=["check"]
check("4.2", masked_conv)

# %% [markdown]
# ## 2. A context model, and a test for it
#
# Our network is small. **One** kernel of 5 x 5 numbers, the same for all channels, says by how much the expectation is
# shifted; `gain` says for each channel how much of this it takes. A second convolution looks at the sizes of the
# surprises around and says by which factor the scale is stretched (as a logarithm). At the beginning both say 0:
# "nothing to add".


# %%
class Context(nn.Module):
    def __init__(self, mask, width=16):
        super().__init__()
        self.mask, self.gain = mask, nn.Parameter(torch.ones(32, 1, 1))
        self.value, self.size, self.head = nn.Conv2d(1, 1, 5), nn.Conv2d(32, width, 5), nn.Conv2d(width, 32, 1)
        for parameter in (*self.value.parameters(), *self.head.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, u):
        """u [B, 32, h, w] -> shift, in scales, and the logarithm of stretch, both [B, 32, h, w]"""
        u = torch.asinh(u)  # large surprises count less
        alone = u.reshape(-1, 1, *u.shape[2:])  # each channel by itself
        shift = masked_conv(alone, self.value.weight, self.value.bias, self.mask).view_as(u) * self.gain
        stretch = self.head(F.gelu(masked_conv(u.abs(), self.size.weight, self.size.bias, self.mask)))
        return shift, stretch


# %% [markdown]
# Can we trust it? Reading the code is not enough: a wrong mask, a layer norm over all sites or a shift by one in the
# wrong direction are easily overlooked. So we **test**: which surprises change what the network says about one site?
#
# **Exercise 4.3.** Write `influence`: a map that is True, or any number but 0, at each place whose latent, in any
# channel, changes what the network says about the site (`row`, `column`). Elsewhere it is 0 or False. The network gives
# two things. You may change latents and look, or ask the gradient.


# %% tags=["exercise"]
def influence(network, u, row, column):
    """network: u -> shift, stretch; u [1, C, h, w] -> [h, w]"""
    return ...


# %% tags=["solution"]
def influence(network, u, row, column):
    """network: u -> shift, stretch; u [1, C, h, w] -> [h, w]"""
    u = u.clone().requires_grad_()
    said = sum(answer[0, :, row, column].sum() for answer in network(u))
    (gradient,) = torch.autograd.grad(said, u)
    return gradient[0].abs().sum(dim=0)


# %% tags=["hint"]
hint("4.3")

# %% tags=["check"]
check("4.3", influence)


# %%
def tested(network):
    """Where the middle of a small grid gets its knowledge from: 1 there, 0 elsewhere. [9, 9]"""
    found = influence(network, torch.randn(1, 32, 9, 9), 4, 4)
    found = found.detach() if hasattr(found, "detach") else found
    return (np.abs(np.asarray(found, dtype=float)) > 1e-9).astype(float)


def untrained(mask):
    """A network with random weights: zeros would hide everything."""
    network = Context(mask)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


# %%
honest, cheating = tested(untrained(raster)), tested(untrained(sees_itself))
print(f"the honest network sees the site itself: {bool(honest[4, 4])}; the other: {bool(cheating[4, 4])}")
cf.masks({"the honest network": honest, "the other": cheating})

# %% [markdown]
# The ring marks the site to be decoded. One blue square is all that differs. What does it do to the bits?
#
# ## 3. Training


# %%
def crops(rng, count=8, size=16):
    """Squares from the other pictures: y, means, scales of [count, 32, size, size] each"""
    found = []
    for one in (others[i] for i in rng.integers(len(others), size=count)):
        top, left = (rng.integers(length - size + 1) for length in one.shape[2:])
        found.append(one[:, :, top : top + size, left : left + size])
    return torch.stack(found, dim=1)


def expectation(values, with_hyperprior):
    """y, means, scales -> surprises and scales; without the hyperprior those of the channel."""
    m, s = values[1:] if with_hyperprior else (mean, scale)
    return (values[0] - m) / s, s


# %%
def trained(mask, code=lambda network, u: network(u), with_hyperprior=False):
    """A network that has learned.  code: how it is used, by default for all sites at once"""
    torch.manual_seed(0)
    rng, network = np.random.default_rng(0), Context(mask)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for _ in range(steps):
        u, s = expectation(crops(rng), with_hyperprior)
        loss = bits(u, s, *code(network, u)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


# %%
@torch.no_grad()
def cost(network=None, code=lambda network, u: network(u), with_hyperprior=False):
    """Bits of the test picture's sites, all 32 channels together: [h, w]"""
    u, s = expectation(test[:, None], with_hyperprior)
    said = () if network is None else code(network, u)
    return bits(u, s, *said)[0].sum(dim=0).numpy()


networks = {"causal": trained(raster), "the mistake": trained(sees_itself)}
costs = {"no context": cost()} | {name: cost(network) for name, network in networks.items()}
cf.bars({name: one.sum() / side**2 for name, one in costs.items()}, "bits per pixel, 32 channels")

# %%
saved = {name: 1 - one.sum() / costs["no context"].sum() for name, one in costs.items()}
print(f"causal: {saved['causal']:.0%} saved; the mistake: {saved['the mistake']:.0%} saved")
seen = {"causal": raster, "the mistake": sees_itself}
kernels = {name: network.value.weight[0, 0].detach().numpy() for name, network in networks.items()}
kernels = {f"kernel, {name}": np.where(seen[name] > 0, kernel, np.nan) for name, kernel in kernels.items()}
cf.pictures(kernels, bar="weight", columns=2, height=2.4)

# %% [markdown]
# **Finding.** Twelve weights for the value, the same for all channels, and a few thousand for the size save about a
# fifth on *astronaut*. The two direct neighbours have the largest weights, as the first picture of this lesson
# promised. (What is white is not seen.) With one square more in the mask, about half of all bits seem to be gone: the
# kernel of the mistake looks at the site itself and at hardly anything else. Nobody believes that number, *if* they
# know what to expect: a codec that is so much better than all others does not come from one square.
# (How much an honest context saves depends on the picture. With `side = 384` you can try *rocket* and *coffee*.)
#
# **A common mistake.** To let the model see what it predicts: one square in a mask, or one missing shift by a place in
# a transformer. In training nothing looks wrong. The loss falls, faster than ever. Somebody took the shift out of the
# Entroformer and "reached" 39 dB at 0.17 bits per pixel (issue 7 of `damo-cv/entroformer` on GitHub). There are two
# cures: the test of exercise 4.3, and a decoder that really decodes.
#
# ## 4. A decoder that really decodes
#
# The encoder goes through the sites in raster order and codes all channels of each with their means and scales.

# %%
FAMILY = constriction.stream.model.QuantizedGaussian(-2000, 2000)


def gaussians(shift, stretch):
    """What a network says of one site, [32] each -> means and scales for the coder"""
    s = scale.flatten()
    spread = (s * stretch.flatten().exp()).clamp(0.05, 400)
    return [v.double().numpy() for v in (mean.flatten() + shift.flatten() * s, spread)]


# %%
def encode(network):
    """The test picture's latents -> words of 32 bits"""
    encoder = constriction.stream.queue.RangeEncoder()
    u, _ = expectation(test[:, None], False)
    with torch.no_grad():
        shift, stretch = network(u)
    for row, column in np.ndindex(u.shape[2:]):
        site = (0, slice(None), row, column)
        encoder.encode(test[0][site[1:]].numpy().astype(np.int32), FAMILY, *gaussians(shift[site], stretch[site]))
    return encoder.get_compressed()


# %% [markdown]
# **Exercise 4.4.** Write `decode`. You get a grid full of zeros, the network, and `read`, which takes the next latents
# from the file: `read(row, column, shift, stretch)` needs what the network says of this site, two tensors `[C]`, and
# gives the surprises of the site, `[C]`. Fill the grid.


# %% tags=["exercise"]
def decode(u, network, read):
    """u: zeros [1, C, h, w]; network: u -> shift, stretch -> the grid of surprises"""
    return ...


# %% tags=["solution"]
def decode(u, network, read):
    """u: zeros [1, C, h, w]; network: u -> shift, stretch -> the grid of surprises"""
    for row in range(u.shape[2]):
        for column in range(u.shape[3]):
            shift, stretch = network(u)
            u[0, :, row, column] = read(row, column, shift[0, :, row, column], stretch[0, :, row, column])
    return u


# %% tags=["hint"]
hint("4.4")

# %% tags=["check"]
check("4.4", decode)


# %%
def decoded(network, words):
    """Words -> the latents that come out, [32, h, w]"""
    decoder = constriction.stream.queue.RangeDecoder(words)

    def read(row, column, shift, stretch):
        try:
            values = decoder.decode(FAMILY, *gaussians(shift, stretch))
        except AssertionError:  # the coder itself sees that the file cannot be right, and gives up
            return torch.zeros(32)
        return (torch.tensor(values, dtype=torch.float32) - mean.flatten()) / scale.flatten()

    with torch.no_grad():
        u = decode(torch.zeros_like(test[:1]), network, read)
    return torch.round(torch.as_tensor(u).reshape(test[0].shape) * scale + mean)


# %%
shown = {"photograph": np.asarray(photo)}
for name, network in networks.items():
    words, start = encode(network), time.perf_counter()
    values = decoded(network, words)
    seconds = time.perf_counter() - start
    right = (values == test[0])[test[0] != 0].float().mean()
    print(f"{name}: {4 * len(words):,} bytes; {right:.0%} of the latents that are not 0 are right; {seconds:.1f} s")
    latents = scene.y_hat.clone()
    latents[0, expensive] = values.clamp(-200, 200)
    shown[name] = np.asarray(scene.reconstruct(latents).crop((0, 0, side, side)))
cf.pictures(shown, columns=3)

# %% [markdown]
# (The 352 other channels are given: the fine lines on the right come from them.) The decoder of the mistake asks the
# network about a site whose latent it does not have yet, and gets another answer than the encoder got. From the first
# site on it reads nonsense, until the coder notices that no file can look like this and gives up.
#
# And the honest one is *slow*. It ran the network once for every site.

# %%
sites = test[0, 0].numel()
print(f"this picture: {sites:,} runs of the network, one after the other")
print(f"a photograph of 4000 x 3000 pixels: {4000 // 16 * -(-3000 // 16):,} runs")

# %% [markdown]
# A run can be made cheaper, by computing only the neighbourhood of the site. But in this order one run must wait for
# the other: each needs the latent that the one before has decoded. A GPU with ten thousand arithmetic units waits for
# one site. (A small mask leaves a way out: see *If there is time*. A model that looks at *all* earlier sites, as that
# of lesson 5, has none.)
#
# ## 5. The checkerboard
#
# He and others (2021) colour the sites like a checkerboard. All sites of the **first half** are decoded at once,
# without context. Then all sites of the second half, at once, too: each of them has known neighbours above, below, left
# and right. Two passes, whatever the size of the picture.
#
# **Exercise 4.5.** Write `two_passes`. The network may see the first half only, so put 0 in the place of the second.
# For sites of the first half there is no context, so shift and stretch are 0 there.


# %% tags=["exercise"]
def two_passes(network, u):
    """u [B, C, h, w] -> shift, stretch of all sites: [B, C, h, w] each"""
    return ...


# %% tags=["solution"]
def two_passes(network, u):
    """u [B, C, h, w] -> shift, stretch of all sites: [B, C, h, w] each"""
    rows, columns = torch.arange(u.shape[2]).view(-1, 1), torch.arange(u.shape[3])
    first = (rows + columns) % 2 == 1
    shift, stretch = network(u * first)
    return shift * ~first, stretch * ~first


# %% tags=["hint"]
hint("4.5")

# %% tags=["check"]
check("4.5", two_passes)

# %%
networks["checkerboard"] = trained(everything, two_passes)
costs["checkerboard"] = cost(networks["checkerboard"], two_passes)
shift = two_passes(untrained(everything), torch.randn(1, 32, *costs["causal"].shape))[0]
second = (shift[0] != 0).any(dim=0).numpy()  # your half with context
shown = {name: costs[name] for name in ("no context", "causal", "checkerboard")}
cf.bars({name: one.sum() / side**2 for name, one in shown.items()}, "bits per pixel, 32 channels")

# %%
saved = {name: 1 - one.sum() / costs["no context"].sum() for name, one in shown.items()}
print(f"raster order saves {saved['causal']:.1%}, the checkerboard {saved['checkerboard']:.1%}")
for name, one in shown.items():
    halves = [one[part].sum() / side**2 for part in (~second, second)]
    print(f"{name:13} first half {halves[0]:.3f}, second half {halves[1]:.3f} bits per pixel")
maps = {f"{name}: bits saved": costs["no context"] - shown[name] for name in ("causal", "checkerboard")}
cf.pictures(maps, bar="bits of a site", columns=2, limits=(-100, 100))

# %% [markdown]
# **Finding.** In the second half the checkerboard is *better* than raster order: it sees neighbours on all sides, not
# only above and to the left. But its first half pays the full price. Together it saves on *astronaut* between a half
# and four fifths of what raster order saves, in 2 passes instead of 1,024. (The dark squares are sites that the context
# makes *more expensive*: edges and borders, where something comes that the neighbours did not announce.)
#
# ## 6. Together with the hyperprior
#
# The first half pays because it knows nothing. But lesson 3 has something that speaks of *all* sites: $z$. We take the
# hyperprior's means and scales as the expectation, and let the context models learn what is left to say.

# %%
hyper = {"hyperprior alone": cost(with_hyperprior=True)}
for name, (mask, code) in {"raster": (raster, lambda n, u: n(u)), "checkerboard": (everything, two_passes)}.items():
    hyper[f"hyperprior, {name}"] = cost(trained(mask, code, True), code, True)
values = {name: one.sum() / side**2 for name, one in {"no context": costs["no context"], **hyper}.items()}
cf.bars(values, "bits per pixel of y, 32 channels")

# %%
for name, one in list(hyper.items())[1:]:
    print(f"{name}: {1 - one.sum() / hyper['hyperprior alone'].sum():+.1%} saved over the hyperprior alone")

# %% [markdown]
# **Finding, and an honest one.** Behind the hyperprior our small networks find next to nothing: between -2% and +3% on
# *astronaut*. Either the hyperprior has said all that neighbours know, or a network of a few thousand numbers, with
# three pictures to learn from, is too small to find it. Which of the two? Let us ask a larger model. It is a
# transformer in raster order, and it learned from a thousand photographs. It stands behind the same transforms, so it
# codes *the same latents*.

# %%
serial = load_model("blocks-serial@0.007")
earnest = Scene(serial, photo, torch.float32)
with torch.no_grad():
    found = earnest.model.distributions(earnest.y_hat, earnest.hyper, rate=earnest.rate)
    with_context = float(-earnest.model.gaussian(earnest.y_hat, *found).log2().sum()) + earnest.z_bits
without = float(of_channels.sum()) + scene.z_bits
print(f"the same latents: {bool(torch.equal(earnest.y_hat, scene.y_hat))}")
print(f"all 384 channels and z: {without / side**2:.4f} bits per pixel without context,", end=" ")
print(f"{with_context / side**2:.4f} with: {1 - with_context / without:.1%} saved")

# %% [markdown]
# So there *is* something left to say: on *astronaut* between 5% and 12% of all bits, z included. (The hyperpriors of
# both models began as that of a third one. The serial model's is a later one, and learned for longer, so a part of this
# saving may be the hyperprior's.) A context model of that kind is the subject of lesson 5.
#
# ## To argue about
#
# "The checkerboard's first half should be as small as possible: it is coded without context." So let a quarter of the
# sites be first, and three quarters second! Who gains, and who loses its neighbours? What would you do with three
# passes, or with ten? (Lesson 6 shows one answer.)
#
# ## If there is time
#
# 1. Set `width=64` in `Context`. Does the test picture gain, or only the training? What does that say of three
#    pictures?
# 2. Two masked convolutions one after the other: which of them may have the mask that sees itself? Ask `tested`.
# 3. Write `causal_mask` for an order of columns. Are the bits the same?
# 4. A mask of 5 x 5 sees two sites to the right in the row above, and no further. So which site of the second row can
#    be decoded while the first row is not finished? How many steps does a grid of 32 x 32 sites take, when everything
#    is decoded at once that can be? (It is 125, not 1,024. Video codecs call it a *wavefront*.)
#
# ## Further reading
#
# - A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu, *Pixel Recurrent Neural Networks*, ICML 2016, arXiv:1601.06759:
#   the masked convolution, there for pixels.
# - D. Minnen, J. Ballé, G. Toderici, *Joint Autoregressive and Hierarchical Priors for Learned Image Compression*,
#   NeurIPS 2018, arXiv:1809.02736: context and hyperprior together.
# - D. He, Y. Zheng, B. Sun, Y. Wang, H. Qin, *Checkerboard Context Model for Efficient Learned Image Compression*,
#   CVPR 2021, arXiv:2103.15306.
