# %% [markdown]
# # Lesson 2: Transforms and quantisation
#
# **After this lesson you can**
#
# - compute the best linear transform of a picture's blocks, and say what it is good for;
# - measure a rate and a distortion, and draw the curve that joins them;
# - say why a network is trained with noise where the codec rounds;
# - train a small autoencoder that begins as your own transform, and move along the curve with lambda.
#
# You need 75 minutes, lesson 1, and a little PyTorch: what a tensor, a convolution and a gradient are.

# %% tags=["parameters"]
picture = "chelsea"  # to test on; the network learns from the other three of astronaut, chelsea, coffee, rocket
side = 256  # pixels of the test picture, a multiple of 8
steps = 300  # of each training

# %%
import numpy as np
import torch
from scipy.fft import dctn, idctn
from torch import nn

from entroformer_lib.datasets import SAMPLES
from entroformer_lib.teaching import check, grey, hint
from entroformer_lib.views import course_figures as cf

# %% [markdown]
# ## A picture first
#
# A lossy codec rounds, and what it rounds decides everything. Below, the same photograph is rounded twice, for
# *chelsea* at about the same number of bits. In the middle the *pixels* were rounded to a coarse grid. On the right
# blocks of 8 x 8 pixels were first turned into a sum of waves, as JPEG does it, and then the *weights of the waves*
# were rounded.


# %%
photo = grey(picture, side).astype(np.float32) / 255
waves = dctn(photo.reshape(side // 8, 8, side // 8, 8), axes=(1, 3), norm="ortho")
rounded = idctn(0.12 * np.round(waves / 0.12), axes=(1, 3), norm="ortho").reshape(photo.shape)
panels = {"photograph": photo, "pixels rounded": 0.4 * np.round(photo / 0.4), "waves rounded": rounded}
cf.pictures({title: values.clip(0, 1) for title, values in panels.items()})

# %% [markdown]
# The plan of every codec in this course is this one. In lesson 1 we built the last part of the upper row.

# %%
boxes = {"x": ("picture x", 0, 0), "a": ("transform\n$g_a$", 1, 0), "q": ("round", 2, 0), "c": ("entropy\ncoder", 3, 0)}
boxes |= {"y": ("picture $\\hat{x}$", 0, 1), "s": ("transform\n$g_s$", 1, 1), "d": ("entropy\ndecoder", 3, 1)}
arrows = [("x", "a", ""), ("a", "q", "y"), ("q", "c", "$\\hat{y}$"), ("c", "d", "bits"), ("d", "s", "$\\hat{y}$")]
cf.diagram(boxes, [*arrows, ("s", "y", "")])

# %% [markdown]
# ## 1. Blocks
#
# **Exercise 2.1.** Write `to_blocks`. It cuts an image into blocks of 8 x 8 pixels and returns one block in each row,
# as 64 numbers. Blocks are ordered like words on a page: from left to right, then the next line of blocks.
# `from_blocks` must be able to put them together again.


# %% tags=["exercise"]
def to_blocks(image):
    """[H, W] -> [number of blocks, 64]; H and W are multiples of 8"""
    return ...


# %% tags=["solution"]
def to_blocks(image):
    """[H, W] -> [number of blocks, 64]; H and W are multiples of 8"""
    H, W = image.shape
    return image.reshape(H // 8, 8, W // 8, 8).swapaxes(1, 2).reshape(-1, 64)


# %%
def from_blocks(blocks, shape):
    """The inverse of `to_blocks`."""
    H, W = shape
    return blocks.reshape(H // 8, W // 8, 8, 8).swapaxes(1, 2).reshape(H, W)


# %% tags=["hint"]
hint("2.1")

# %% tags=["check"]
check("2.1", to_blocks)

# %% [markdown]
# ## 2. The best linear transform
#
# Neighbouring pixels are alike, so the 64 numbers of a block say much of the same thing 64 times. **Principal component
# analysis** (PCA) turns the axes so that nothing is said twice: the new numbers are not correlated, and the first of
# them carry nearly all of the variance. Three steps: take away the mean block, compute the covariance matrix (64 x 64),
# take its eigenvectors.
#
# **Exercise 2.2.** Write `pca`. It returns the mean block, [64], and the basis, [64, 64]: one eigenvector in each
# *row*, the one with the largest variance first.


# %% tags=["exercise"]
def pca(blocks):
    """[n, 64] -> mean [64], basis [64, 64] with one pattern in each row"""
    return ...


# %% tags=["solution"]
def pca(blocks):
    """[n, 64] -> mean [64], basis [64, 64] with one pattern in each row"""
    mean = blocks.mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov(blocks.T))  # in rising order, one vector in each column
    return mean, vectors[:, ::-1].T


# %% tags=["hint"]
hint("2.2")

# %% tags=["check"]
check("2.2", pca)

# %%
others = [grey(name).astype(np.float32) / 255 for name in SAMPLES if name != picture]
whole_blocks = [image[: image.shape[0] // 8 * 8, : image.shape[1] // 8 * 8] for image in others]
train_blocks = np.concatenate([np.asarray(to_blocks(image)).reshape(-1, 64) for image in whole_blocks])
mean, basis = map(np.squeeze, map(np.asarray, pca(train_blocks)))
cf.tiles(basis.reshape(64, 8, 8), 16, "the 64 patterns, largest variance first")

# %% [markdown]
# Nobody told PCA about waves. It found them in three photographs. Compare them with the waves of JPEG: they are nearly
# the same, and that is why JPEG works well with photographs.

# %%
blocks = np.asarray(to_blocks(photo)).reshape(-1, 64)
y = (blocks - mean) @ basis.T
share = np.cumsum(y.var(axis=0)) / y.var(axis=0).sum()
print(", ".join(f"{n} patterns: {share[n - 1]:.1%}" for n in (1, 4, 16, 64)), "of the variance of this picture")

# %% [markdown]
# ## 3. Rate and distortion
#
# Now we round each number to a multiple of a step, and ask what it costs. Each of the 64 numbers of a block has its own
# histogram: the first is wide, the last is nearly always 0. So each gets its own model and its own entropy.
#
# **Exercise 2.3.** Write `rate`: bits **per pixel** of the whole numbers `q`, when every column is coded with its own
# histogram. `entropy_of` is lesson 1.


# %%
def entropy_of(values):
    """Bits per value, from the histogram of these very values."""
    _, counts = np.unique(values, return_counts=True)
    probs = counts / counts.sum()
    return -(probs * np.log2(probs)).sum()


# %% tags=["exercise"]
def rate(q):
    """[number of blocks, 64] whole numbers -> bits per pixel"""
    return ...


# %% tags=["solution"]
def rate(q):
    """[number of blocks, 64] whole numbers -> bits per pixel"""
    return sum(entropy_of(q[:, i]) for i in range(q.shape[1])) / q.shape[1]


# %% tags=["hint"]
hint("2.3")

# %% tags=["check"]
check("2.3", rate)


# %%
def psnr(image, other):
    """Quality in dB: more is better, and 1 dB can be seen."""
    return -10 * np.log10(np.mean((image - other) ** 2))


grid = np.array([0.05, 0.08, 0.12, 0.18, 0.27, 0.4, 0.6])
pixels = [(entropy_of(np.round(photo / s)), psnr(photo, s * np.round(photo / s))) for s in 2 * grid[:4]]
turned = [(float(rate(np.round(y / s))), psnr(blocks, s * np.round(y / s) @ basis + mean)) for s in grid]
by_pixels, by_pca = np.array(pixels).T, np.array(turned).T
cf.curves({"pixels rounded": by_pixels, "PCA rounded": by_pca}, "bits per pixel", "PSNR, dB")

# %% [markdown]
# This is a **rate-distortion curve**. Up and to the left is better. At the same quality PCA needs a small part of the
# bits. The transform has lost nothing and saved nothing: it is a rotation. It only made the numbers easy to predict
# from *fixed* histograms. (The histograms themselves are not counted in this lesson. A codec has them in its program.)
#
# ## 4. A network in place of the matrix
#
# Can we do better than a matrix? Blocks do not overlap, so their borders become visible, and a matrix cannot bend. A
# network can do both. And it can *begin* as our PCA, so that training starts from what PCA reaches: a convolution whose
# kernels are the 64 patterns, with a stride of 8, computes exactly the 64 numbers of each block.
#
# We want kernels of 16 x 16 pixels, so that neighbouring blocks may overlap later. In the beginning a pattern stands in
# the middle, and the border is 0.
#
# **Exercise 2.4.** Write `kernels`.


# %% tags=["exercise"]
def kernels(basis):
    """[64, 64], a pattern in each row -> tensor [64, 1, 16, 16] with each pattern in the middle"""
    return ...


# %% tags=["solution"]
def kernels(basis):
    """[64, 64], a pattern in each row -> tensor [64, 1, 16, 16] with each pattern in the middle"""
    patterns = torch.tensor(basis.copy(), dtype=torch.float32).reshape(64, 1, 8, 8)
    return nn.functional.pad(patterns, (4, 4, 4, 4))


# %% tags=["hint"]
hint("2.4")

# %% tags=["check"]
check("2.4", kernels)

# %% [markdown]
# ## 5. Noise against rounding
#
# A network learns by following gradients. What is the gradient of rounding? The function is a staircase: flat nearly
# everywhere. Its gradient is 0, and nothing can be learned through it.

# %%
v = torch.linspace(-2, 2, 401, requires_grad=True)
torch.round(v).sum().backward()
print("all gradients of rounding:", v.grad.unique().tolist())
cf.curves({"v": (v.detach(), v.detach()), "round(v)": (v.detach(), v.detach().round())}, "v", "value", points=False)

# %% [markdown]
# The way out is from Ballé, Laparra and Simoncelli: in training, **add noise** that is uniform between -0.5 and 0.5.
# The error of rounding lies in the same range, and noise has a gradient: 1. When the codec is used, it rounds.
#
# **Exercise 2.5.** Write `quantise`.


# %% tags=["exercise"]
def quantise(y, training):
    """Tensor of any shape -> rounded or, in training, with noise."""
    return ...


# %% tags=["solution"]
def quantise(y, training):
    """Tensor of any shape -> rounded or, in training, with noise."""
    return y + torch.rand_like(y) - 0.5 if training else torch.round(y)


# %% tags=["hint"]
hint("2.5")

# %% tags=["check"]
check("2.5", quantise)

# %%
second = torch.tensor(y[:, 1] / 0.2)
shapes = {"y": second, "y with noise": quantise(second, True), "y rounded": quantise(second, False)}
fine, whole = np.arange(-5.5, 5.6, 0.2), np.arange(-5.5, 5.6, 1)
cf.histograms(shapes, "second number of each block", [fine, fine, whole], density=True)

# %% [markdown]
# Compare the last two. At every whole number the bar of *y with noise* is about as high as that of *y rounded*, apart
# from chance. So the bits that we estimate in training are about those that we pay later.
#
# ## 6. One number to make small
#
# Fewer bits or fewer errors? We must say what an error is worth. The **loss** adds both:
#
# $$L = R + \lambda \cdot 255^2 \cdot D$$
#
# $R$ is in bits per *pixel*, and $D$ is the mean squared error of pixels between 0 and 1. The $255^2$ makes it the
# error of bytes, as in the papers. A large lambda asks for quality, a small one for a small file.
#
# **Exercise 2.6.** Write `loss`.


# %% tags=["exercise"]
def loss(bits, x, x_hat, lmbda):
    """bits: of all latents, any shape; x, x_hat: pictures [B, 1, H, W] of values from 0 to 1 -> one number"""
    return ...


# %% tags=["solution"]
def loss(bits, x, x_hat, lmbda):
    """bits: of all latents, any shape; x, x_hat: pictures [B, 1, H, W] of values from 0 to 1 -> one number"""
    return bits.sum() / x.numel() + lmbda * 255**2 * ((x - x_hat) ** 2).mean()


# %% tags=["hint"]
hint("2.6")

# %% tags=["check"]
check("2.6", loss)


# %% [markdown]
# Here is the whole codec. Each channel has a scale of its own for its probabilities (a Laplace distribution, the shape
# that you saw in lesson 1). A small network `bend` in front of $g_s$ begins as 0. It may learn what a matrix cannot.


# %%
class Autoencoder(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.g_a, self.g_s = nn.Conv2d(1, 64, 16, 8, 4), nn.ConvTranspose2d(64, 1, 16, 8, 4)
        self.bend = nn.Sequential(nn.Conv2d(64, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 64, 3, padding=1))
        spread = np.abs((train_blocks - mean) @ basis.T).mean(axis=0) / step
        start = {self.g_a.weight: kernels(basis) / step, self.g_a.bias: -basis @ mean / step}
        start |= {self.g_s.weight: kernels(basis) * step, self.g_s.bias: np.zeros(1)}
        start |= {self.bend[2].weight: np.zeros((64, 48, 3, 3)), self.bend[2].bias: np.zeros(64)}
        for parameter, value in start.items():
            parameter.data = torch.as_tensor(value, dtype=torch.float32)
        self.middle = nn.Parameter(torch.as_tensor(basis @ mean / step, dtype=torch.float32).view(64, 1, 1))
        self.log_scale = nn.Parameter(torch.as_tensor(np.log(spread), dtype=torch.float32).view(64, 1, 1))

    def forward(self, x):
        y_hat = quantise(self.g_a(x), self.training)
        prior = torch.distributions.Laplace(0.0, self.log_scale.exp())
        size = y_hat.abs()  # from one side only: there the difference keeps its digits
        bits = -torch.log2((prior.cdf(0.5 - size) - prior.cdf(-0.5 - size)).clamp_min(1e-9))
        return self.g_s(y_hat + self.bend(y_hat) + self.middle), bits, y_hat


# %%
def crops(generator, count=8, size=128):
    """Squares from anywhere in the training pictures: [count, 1, size, size]"""
    rng, found = generator, []
    for image in (others[i] for i in rng.integers(len(others), size=count)):
        top, left = rng.integers(image.shape[0] - size), rng.integers(image.shape[1] - size)
        found.append(torch.tensor(image[top : top + size, left : left + size]))
    return torch.stack(found)[:, None]


# %%
def train(lmbda, step):
    """An autoencoder for one lambda. step: of the rounding, to begin with"""
    torch.manual_seed(0)
    generator, model = np.random.default_rng(0), Autoencoder(step)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for _ in range(steps):
        x = crops(generator)
        x_hat, bits, _ = model(x)
        optimizer.zero_grad()
        loss(bits, x, x_hat, lmbda).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# %%
@torch.no_grad()
def measure(model):
    """A model on the test picture: bits per pixel, PSNR, picture. The rate is measured as for PCA."""
    x_hat, _, y_hat = model(torch.tensor(photo)[None, None])
    x_hat = x_hat[0, 0].clamp(0, 1).numpy()
    return float(rate(y_hat[0].reshape(64, -1).T.numpy())), psnr(photo, x_hat), x_hat


before = measure(Autoencoder(0.22).eval())
by_hand = float(rate(np.round(y / 0.22))), psnr(blocks, 0.22 * np.round(y / 0.22) @ basis + mean)
print(
    f"untrained: {before[0]:.3f} bits per pixel and {before[1]:.2f} dB; PCA by hand: {by_hand[0]:.3f}, {by_hand[1]:.2f}"
)

# %% [markdown]
# The untrained network *is* your PCA. Now we train it three times, with three lambdas. (About 10 to 20 seconds each.)

# %%
lmbdas = {0.002: 0.45, 0.008: 0.22, 0.03: 0.11}  # lambda: the step to begin with
models = {lmbda: train(lmbda, step) for lmbda, step in lmbdas.items()}
trained = {lmbda: measure(model) for lmbda, model in models.items()}
for lmbda, (bpp, quality, _) in trained.items():
    more = quality - np.interp(bpp, by_pca[0][::-1], by_pca[1][::-1])
    print(f"lambda {lmbda}: {bpp:.3f} bits per pixel, {quality:.2f} dB; {more:+.2f} dB against PCA of the same rate")

# %%
points = np.array([result[:2] for result in trained.values()]).T
cf.curves({"PCA rounded": by_pca[:, 1:], "autoencoder, three lambdas": points}, "bits per pixel", "PSNR, dB", log="x")

# %%
step = grid[np.argmin(np.abs(by_pca[0] - trained[0.002][0]))]
blocky = from_blocks(step * np.round(y / step) @ basis + mean, photo.shape)
detail = np.s_[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4]
panels = {"PCA": blocky, "autoencoder": trained[0.002][2], "photograph": photo}
cf.pictures({f"{title}, a detail": image[detail].clip(0, 1) for title, image in panels.items()})

# %% [markdown]
# **Finding.** With a larger lambda the point moves to the right and up: more bits, better quality. On *chelsea* the
# network is between 0.3 and 1.5 dB better than PCA at the same rate, on a picture that it has never seen. It learned
# from three photographs, in 300 steps. Look at the borders of the blocks: the overlap and `bend` have made them softer.
# They are not gone, because this network is tiny.
#
# **A common mistake.** To measure *with noise*. A model must be in `eval()` mode before it is measured, so that it
# rounds. The quality hardly shows the mistake. The rate does: with noise no value occurs twice, and a histogram of such
# values says nothing.

# %%
for lmbda, model in models.items():
    noisy, rounded = measure(model.train())[:2], measure(model.eval())[:2]
    print(f"lambda {lmbda}: with noise {noisy[0]:.3f} bits per pixel, {noisy[1]:.2f} dB", end="; ")
    print(f"rounded {rounded[0]:.3f} bits per pixel, {rounded[1]:.2f} dB")

# %% [markdown]
# ## To argue about
#
# Of all rotations of a block, PCA is the one that makes the numbers uncorrelated and puts the most variance into the
# first of them. The network beats it. Which of these did the work: the overlap, the small network `bend`, the training
# for *rate* and not for variance, or that the step differs from channel to channel? Place your bet first. Then take one
# of them away in `Autoencoder` and measure.
#
# ## If there is time
#
# 1. Train with `torch.round` in place of the noise. What happens to the rate, and why? (Remember the gradient.)
# 2. Draw `model.g_a.weight` with `cf.tiles` after the training. What has changed, in which patterns?
# 3. Test on *rocket*, which is smooth, and on *astronaut*. Where does the network gain more?
#
# ## Further reading
#
# - V. K. Goyal, *Theoretical Foundations of Transform Coding*, IEEE Signal Processing Magazine, 2001.
# - J. Ballé, V. Laparra, E. P. Simoncelli, *End-to-end Optimized Image Compression*, ICLR 2017, arXiv:1611.01704: the
#   noise.
# - L. Theis, W. Shi, A. Cunningham, F. Huszár, *Lossy Image Compression with Compressive Autoencoders*, ICLR 2017,
#   arXiv:1703.00395: rounds in training, too, and passes the gradient on as if it had not.
# - J. Ballé and others, *Nonlinear Transform Coding*, IEEE Journal of Selected Topics in Signal Processing, 2021,
#   arXiv:2007.03034.
