# %% [markdown]
# # Lesson 1: Bits and entropy
#
# **After this lesson you can**
#
# - say how many bits a symbol costs, and compute the entropy of a histogram;
# - write a real file with a range coder, and compare its size with the entropy;
# - build a model that learns while it codes, let the neighbours choose among several of them, and say why these may
#   beat the best fixed histogram;
# - name the price of a wrong model.
#
# You need an hour, NumPy, and no knowledge of compression. Cells that end with `check(...)` look at your answer and say
# in words what they find. Above each stands `hint(...)`: run it, and open one hint after the other.

# %% tags=["parameters"]
picture = "coffee"  # astronaut, chelsea, coffee or rocket
side = 256  # pixels; a smaller side is quicker

# %%
from pathlib import Path

import constriction
import numpy as np

from entroformer_lib.teaching import check, grey, hint
from entroformer_lib.views import course_figures as cf

# %% [markdown]
# ## A picture first
#
# On the left is a photograph. On the right is the same photograph as *differences*: from each pixel its left neighbour
# was taken away. Grey means no difference. Both contain the same information: from the differences you get the
# photograph back. But the right one looks nearly empty, and we will make a smaller file of it.

# %%
photo = grey(picture, side)
to_the_left = np.diff(photo.astype(int), axis=1)
cf.pictures({"photograph": photo, "differences": np.clip(128 + to_the_left, 0, 255).astype(np.uint8)}, columns=2)

# %% [markdown]
# ## 1. How many bits does a symbol cost?
#
# A good code spends few bits on what happens often. A symbol of probability $p$ deserves $-\log_2 p$ bits: one of
# probability 1/2 costs 1 bit, one of probability 1/256 costs 8 bits. The **entropy** is what a symbol costs on average:
#
# $$H = -\sum_i p_i \log_2 p_i .$$
#
# **Exercise 1.1.** Write `entropy`. Probabilities of 0 occur, and they must add nothing.


# %% tags=["exercise"]
def entropy(probs):
    """Bits per symbol. probs: probabilities that add up to 1"""
    return ...


# %% tags=["solution"]
def entropy(probs):
    """Bits per symbol. probs: probabilities that add up to 1"""
    probs = np.asarray(probs)
    probs = probs[probs > 0]
    return -(probs * np.log2(probs)).sum()


# %% tags=["hint"]
hint("1.1")

# %% tags=["check"]
check("1.1", entropy)

# %% [markdown]
# Now the photograph. Its pixels are numbers from 0 to 255, one byte each. How often does each value occur?

# %%
cf.histograms({"pixels": photo, "differences": to_the_left}, "value", np.arange(-255.5, 256, 4))


# %%
def histogram(symbols):
    """How often each of 0 … 255 occurs, as probabilities."""
    return np.bincount(np.ravel(symbols), minlength=256) / np.size(symbols)


print(f"{photo.size:,} pixels, {entropy(histogram(photo)):.2f} bits each instead of 8")
print(f"so {photo.size * entropy(histogram(photo)) / 8:,.0f} bytes instead of {photo.size:,}")

# %% [markdown]
# The histogram alone saves little: for *coffee*, 6% of the file.
#
# ## 2. From a number to a file
#
# The entropy is a promise. A **range coder** keeps it. It begins with the interval from 0 to 1. Each symbol narrows the
# interval to its own share. At the end, any number inside the last interval stands for the whole message, and a number
# in an interval of width $w$ needs about $-\log_2 w$ bits. Likely symbols hardly narrow the interval, so they cost
# little.

# %%
cf.intervals({"a": 0.6, "b": 0.3, "c": 0.1}, "abac")

# %% [markdown]
# The library `constriction` has a range coder for us. It wants the symbols as an array of `int32`, and a model that
# says how probable each symbol is:
#
# ```python
# model = constriction.stream.model.Categorical(probs, perfect=False)
# encoder = constriction.stream.queue.RangeEncoder()
# encoder.encode(symbols, model)
# words = encoder.get_compressed()  # an array of 32-bit words
# ```
#
# **Exercise 1.2.** Write `compress`. It returns the words.


# %% tags=["exercise"]
def compress(symbols, probs):
    """Codes symbols, an array of any shape. probs: of each symbol -> array of uint32"""
    return ...


# %% tags=["solution"]
def compress(symbols, probs):
    """Codes symbols, an array of any shape. probs: of each symbol -> array of uint32"""
    model = constriction.stream.model.Categorical(probs, perfect=False)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(np.ravel(symbols).astype(np.int32), model)
    return encoder.get_compressed()


# %% tags=["hint"]
hint("1.2")

# %% tags=["check"]
check("1.2", compress)


# %% [markdown]
# The decoder needs the same probabilities. So the histogram must be part of the file: 256 numbers of two bytes.


# %%
def write_static(path, symbols):
    """Writes the histogram, then the coded symbols. -> bytes of the file"""
    counts = np.bincount(np.ravel(symbols), minlength=256).astype(np.uint16)
    words = compress(symbols, counts / counts.sum())
    data = words if isinstance(words, bytes) else np.uint32(words).tobytes()
    return Path(path).write_bytes(counts.tobytes() + data)


# %%
def read_static(path, shape):
    """The symbols of a file."""
    data = Path(path).read_bytes()
    counts, words = np.frombuffer(data[:512], np.uint16), np.frombuffer(data[512:], np.uint32)
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    return constriction.stream.queue.RangeDecoder(words).decode(model, int(np.prod(shape))).reshape(shape)


# %%
sizes = {"pixels as they are": photo.size}
sizes["pixels, histogram"] = write_static("lesson1.bin", photo)
same = np.array_equal(read_static("lesson1.bin", photo.shape), photo)
coded, promised = sizes["pixels, histogram"] - 512, photo.size * entropy(histogram(photo)) / 8
print(f"{sizes['pixels, histogram']:,} bytes on the disk; decoded without loss: {same}")
print(f"without the histogram {coded:,} bytes; the entropy promised {promised:,.1f}, a gap of {coded - promised:.1f}")

# %% [markdown]
# **Finding.** The gap to the entropy is a few bytes, whatever the length of the message: a range coder is as good as
# perfect. From now on nothing is to be gained by a better *coder*. All is to be gained by a better *model*. The 512
# bytes of the histogram belong to the model, and they do count.
#
# ## 3. The price of a wrong model
#
# What if we code with probabilities $q$ while the symbols really follow $p$? Each symbol costs $-\log_2 q_i$ bits, and
# it occurs with probability $p_i$. The average is the **cross entropy**. It is never below the entropy.
#
# **Exercise 1.3.** Write `cross_entropy(p, q)`. (No `q` is 0 here.)


# %% tags=["exercise"]
def cross_entropy(p, q):
    """Bits per symbol that occurs with probability p and is coded with probability q."""
    return ...


# %% tags=["solution"]
def cross_entropy(p, q):
    """Bits per symbol that occurs with probability p and is coded with probability q."""
    return -(np.asarray(p) * np.log2(q)).sum()


# %% tags=["hint"]
hint("1.3")

# %% tags=["check"]
check("1.3", cross_entropy)

# %%
values = np.arange(-128, 128)
occurs = np.exp(-np.abs(values) / 4.0) / np.exp(-np.abs(values) / 4.0).sum()  # sharp around 0, as differences are
widths = 2.0 ** np.arange(-1, 6.1, 0.5)
models = [np.exp(-np.abs(values) / width) + 1e-9 for width in widths]
price = [cross_entropy(occurs, model / model.sum()) for model in models]
cf.curves({"model of this width": (widths, price)}, "width of the model", "bits per symbol", log="x", best=True)

# %% [markdown]
# The true width is 4, and there the curve is lowest. Look at the two sides: a model that is too sharp (left) is
# punished hard, because it is surprised all the time. A model that is too wide (right) loses little. Remember this
# picture in lesson 3, where a network says for every single place how wide the model should be.
#
# ## 4. Predict, then code what is left
#
# A neighbour says much about a pixel. We code the difference to the left neighbour instead of the pixel. Differences go
# from -255 to 255, but modulo 256 one byte is enough, and nothing is lost.
#
# **Exercise 1.4.** Write `residual`: the difference to the left neighbour, modulo 256. The first column has no left
# neighbour and stays as it is. The function `restore` below must be able to undo it.


# %% tags=["exercise"]
def residual(image):
    """image: [H, W] of 0 … 255 -> [H, W] of 0 … 255"""
    return ...


# %% tags=["solution"]
def residual(image):
    """image: [H, W] of 0 … 255 -> [H, W] of 0 … 255"""
    image = np.asarray(image).astype(int)
    return np.diff(image, axis=1, prepend=0) % 256


# %%
def restore(differences):
    """The inverse of `residual`."""
    return np.cumsum(differences, axis=1) % 256


# %% tags=["hint"]
hint("1.4")

# %% tags=["check"]
check("1.4", residual)

# %%
left = np.asarray(residual(photo)).astype(int)
sizes["differences, histogram"] = write_static("lesson1.bin", left)
assert np.array_equal(restore(read_static("lesson1.bin", left.shape)), photo)
print(f"entropy {entropy(histogram(photo)):.2f} -> {entropy(histogram(left)):.2f} bits per pixel")
print(f"the file: {sizes['pixels, histogram']:,} -> {sizes['differences, histogram']:,} bytes")

# %% [markdown]
# ## 5. A model that learns while it codes
#
# We sent 512 bytes of histogram before the first pixel. It is not necessary. Encoder and decoder can both **count**
# what they have seen so far, and both take these counts as probabilities for the next symbol. They always agree,
# because both have seen the same past. Such a model is called *adaptive*.
#
# **Exercise 1.5.** Write the class `Adaptive`. At the beginning all symbols are equally probable. Each symbol that was
# seen becomes more probable. No probability is ever 0, or the coder could not write that symbol.


# %% tags=["exercise"]
class Adaptive:
    def __init__(self, number_of_symbols=256):
        self.counts = ...

    def probs(self):
        """Probabilities of the next symbol."""
        return ...

    def update(self, symbol):
        """Learns from one symbol."""
        self.counts = ...


# %% tags=["solution"]
class Adaptive:
    def __init__(self, number_of_symbols=256):
        self.counts = np.full(number_of_symbols, 0.1)

    def probs(self):
        """Probabilities of the next symbol."""
        return self.counts / self.counts.sum()

    def update(self, symbol):
        """Learns from one symbol."""
        self.counts[symbol] += 1


# %% tags=["hint"]
hint("1.5")

# %% tags=["check"]
check("1.5", Adaptive)

# %% [markdown]
# The encoder below uses a *list* of models, and `contexts` says which of them codes each symbol. At first there is one.


# %%
def for_the_coder(model):
    """The probabilities of a model of ours, as the coder wants them."""
    return constriction.stream.model.Categorical(np.asarray(model.probs(), dtype=float), perfect=False)


def write_adaptive(path, symbols, models, contexts):
    """Codes each symbol with the model of its context, and then lets this model learn. -> bytes of the file"""
    encoder = constriction.stream.queue.RangeEncoder()
    for symbol, context in zip(np.ravel(symbols).tolist(), np.ravel(contexts).tolist(), strict=True):
        model = models[context]
        encoder.encode(symbol, for_the_coder(model))
        model.update(symbol)
    return Path(path).write_bytes(encoder.get_compressed().tobytes())


# %%
one_for_all = np.zeros(left.shape, int)
sizes["differences, adaptive"] = write_adaptive("lesson1.bin", left, [Adaptive()], one_for_all)
print(f"static {sizes['differences, histogram']:,} bytes, adaptive {sizes['differences, adaptive']:,} bytes")

# %% [markdown]
# The adaptive file is smaller because it needs no histogram. For the pixels alone it pays a little more, since learning
# costs something.
#
# **A common mistake.** Swap the last two lines of the loop: first `update`, then `encode`. The file becomes *smaller*!
# But nobody can ever decode it: the decoder would have to know a symbol before it has decoded it. A model may use
# everything that was decoded before, and nothing else. This mistake is so common in learned compression that lesson 4
# has a test for it.
#
# ## 6. Context: where are we?
#
# In a calm sky the differences are small; at an edge they are large. One histogram for both fits neither. So let us use
# several models, and let the *neighbours that are already decoded* choose.

# %%
signed = np.where(left > 127, left - 256, left)
from_left = np.pad(signed, ((0, 0), (1, 0)))[:, :-1]  # the difference that stands to the left
from_above = np.pad(signed, ((1, 0), (0, 0)))[:-1]  # the difference that stands above
busy = np.abs(from_left) + np.abs(from_above)
quiet_and_busy = {"neighbours are quiet": signed[busy < 4], "neighbours are busy": signed[busy > 24]}
cf.histograms(quiet_and_busy, "difference", np.arange(-40.5, 41), density=True)

# %% [markdown]
# **Exercise 1.6.** Write `context`: a whole number from 0 to 7 that says how busy the neighbours are. It gets the
# differences to the left and above, signed, one number each. Any rule is right that saves more than 3% on a test
# picture.


# %% tags=["exercise"]
def context(from_left, from_above):
    """Which of 8 models codes this pixel?"""
    return ...


# %% tags=["solution"]
def context(from_left, from_above):
    """Which of 8 models codes this pixel?"""
    return min(7, int(np.log2(1 + abs(from_left) + abs(from_above))))


# %% tags=["hint"]
hint("1.6")

# %% tags=["check"]
check("1.6", context)

# %%
contexts = np.vectorize(context, otypes=[int])(from_left, from_above)
eight = [Adaptive() for _ in range(8)]
sizes["differences, 8 contexts"] = write_adaptive("lesson1.bin", left, eight, contexts)
cf.pictures({"photograph": photo, "which model codes it": contexts}, bar="context", columns=2)


# %% [markdown]
# Is this a file, or only a number? We decode it. The decoder sees nothing but the file. It must compute every context
# from what it has decoded so far.


# %%
def read_adaptive(path, shape, models):
    """Decodes what `write_adaptive` wrote with `context`."""
    words = np.frombuffer(Path(path).read_bytes(), np.uint32)
    decoder, known = constriction.stream.queue.RangeDecoder(words), np.zeros(shape, int)
    for row, column in np.ndindex(shape):
        before = known[row, column - 1] if column else 0
        above = known[row - 1, column] if row else 0
        model = models[int(context(before, above))]
        symbol = decoder.decode(for_the_coder(model))
        model.update(symbol)
        known[row, column] = symbol if symbol < 128 else symbol - 256
    return known


# %%
decoded = read_adaptive("lesson1.bin", left.shape, [Adaptive() for _ in range(8)])
print("The photograph is back without loss:", np.array_equal(restore(decoded), photo))

# %%
from io import BytesIO

from PIL import Image

Image.fromarray(photo).save(png := BytesIO(), format="png", optimize=True)
sizes["PNG"] = len(png.getvalue())
entropy_of_differences = left.size * entropy(histogram(left)) / 8
cf.bars(sizes, "bytes", entropy_of_differences, "entropy of the differences")

# %% [markdown]
# **Finding.** For *coffee* your coder, with eight small histograms, writes a smaller file than PNG (for *chelsea* a
# slightly larger one). The dashed line is the entropy
# of the differences, and the file with contexts lies *below* it. The entropy is no property of the picture. It is a
# property of the picture **and of a model**, and a better model has a lower one. This is what the rest of the course is
# about: lesson 3 sends a description of the busy places, lesson 4 looks at neighbours with a network.
#
# ## To argue about
#
# Shannon proved that no code is shorter than the entropy on average. Your coder with eight contexts writes fewer bytes
# than the entropy of the histogram. Who is wrong? Find a partner, take one side each, and write down the sentence on
# which you agree.
#
# ## If there is time
#
# 1. Predict from the left *and* the upper neighbour. How small can you get *coffee*? (Below 32,000 bytes is good.)
# 2. Let the counts forget: multiply all of them with 0.999 in each `update`. When does it help?
# 3. Try `picture = "rocket"`. Why does the context help more there?
#
# ## Further reading
#
# - C. E. Shannon, *A Mathematical Theory of Communication*, Bell System Technical Journal, 1948. The first pages are
#   easy.
# - D. J. C. MacKay, *Information Theory, Inference, and Learning Algorithms*, Cambridge 2003, chapters 4 to 6. Free
#   online.
# - G. N. N. Martin, *Range encoding: an algorithm for removing redundancy from a digitised message*, 1979.
# - R. Bamler, *Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a Statistician's Perspective*, 2022,
#   arXiv:2201.01741. By the author of `constriction`.
