# %% [markdown]
# # Lesson 5: Attention as a context model
#
# **After this lesson you can**
#
# - write attention that keeps the best k, and get the same numbers as the library;
# - say what a relative position is, draw the diamond, and count its vectors;
# - hide a position from a model by your own hand, and find out why that is harder than it looks;
# - argue about "attention explains the bits" with measurements for both sides.
#
# You need 90 minutes, and lesson 4.

# %% tags=["parameters"]
picture = "astronaut"  # astronaut, chelsea, coffee or rocket
side = 256  # pixels of the square in its middle, a multiple of 64
latents = 24  # whose attended positions are hidden in turn, in section 6

# %%
import numpy as np
import torch
import torch.nn.functional as F

from entroformer_lib import capture, intervene, load_model
from entroformer_lib.datasets import sample_picture
from entroformer_lib.explorer.widget import Explorer
from entroformer_lib.inspection.missing_context import mask_positions
from entroformer_lib.inspection.panels import attention_panel, cost_panel, every_head
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.inspection.scene import Scene
from entroformer_lib.studies.attention import attention_against_cost
from entroformer_lib.studies.rate_distortion import middle
from entroformer_lib.teaching import check, hint
from entroformer_lib.views import attention_figures
from entroformer_lib.views import course_figures as cf

_ = torch.set_grad_enabled(False)  # nothing is trained today

# %% [markdown]
# ## A picture first
#
# In lesson 4 a convolution saw 12 neighbours. This model may look at **every** site that is decoded already, and
# decides by itself which of them matter. For one site, the orange frame:

# %%
model, reference = load_model("blocks-serial@0.007"), load_model("blocks-hyperprior@0.007")
photo = middle(sample_picture(picture), side)
server = RowServer(model, photo, reference)
row, column = server.height // 2, server.width // 2
site = row * server.width + column
attention_figures.attention_maps(server.picture, every_head(server, site, server.layers - 1), columns=2)

# %%
print(f"{server.layers} layers of {server.heads} heads, each looks at its best {server.default_k} latents")
bits = {name: values.sum() / side**2 for name, values in server.bits(server.default_k).items()}
print(f"{bits['alone']:.4f} bits per pixel of y by the hyperprior alone, {bits['context']:.4f} with this context")

# %% [markdown]
# The dark part is not decoded yet. Each head looks at a few places, the direct neighbours among them. A head's
# attention is 100% in all; "up to" is its largest share. (Why does the attention belong to the site *before* the
# orange one? That is exercise 5.4.) "The hyperprior alone" is another model, the one of lesson 4, with the same
# latents.
#
# ## 1. Attention in a few lines
#
# Each latent site becomes a **token**, a vector. Three linear layers make of it a *query* (what do I look for?), a
# *key* (what am I?) and a *value* (what do I tell?). The **score** of query $i$ and key $j$ says how well they fit:
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}}$$
#
# where $d$ is the length of the vectors. Token $i$ may look at the tokens before it, and at itself.
#
# **Exercise 5.1.** Write `scores`. Where token $i$ may not look, the score is minus infinity.


# %% tags=["exercise"]
def scores(q, k):
    """Queries and keys [n, d], in raster order -> [n, n]: a row for each query"""
    return ...


# %% tags=["solution"]
def scores(q, k):
    """Queries and keys [n, d], in raster order -> [n, n]: a row for each query"""
    n, d = q.shape
    later = torch.ones(n, n).triu(diagonal=1).bool()
    return (q @ k.T / d**0.5).masked_fill(later, -torch.inf)


# %% tags=["hint"]
hint("5.1")

# %% tags=["check"]
check("5.1", scores)

# %% [markdown]
# A *softmax* makes probabilities of a row of scores: $e^{s}$, divided by their sum. With thousands of keys, the many
# small ones add up to a haze. The Entroformer keeps the **k largest scores** of each row, and no others (top-k).
#
# **Exercise 5.2.** Write `attention`: probabilities for each row, 0 for all but the k largest scores. The first rows
# have fewer than k keys to look at, and k may even be larger than n.


# %% tags=["exercise"]
def attention(scores, k):
    """[n, n] -> [n, n] probabilities, at most k of a row above 0"""
    return ...


# %% tags=["solution"]
def attention(scores, k):
    """[n, n] -> [n, n] probabilities, at most k of a row above 0"""
    k = min(k, scores.shape[-1])
    smallest = scores.topk(k, dim=-1).values[:, -1:]  # the k-th of each row
    return scores.masked_fill(scores < smallest, -torch.inf).softmax(dim=-1)


# %% tags=["hint"]
hint("5.2")

# %% tags=["check"]
check("5.2", attention)

# %%
ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= server.n]
rates = [server.total_bits(k) / side**2 for k in ks]
gains = [(bits["alone"] - rate) / (bits["alone"] - bits["context"]) for rate in rates]
print(f"of what the context saves: {gains[0]:.0%} with k = 1, {gains[-1]:.0%} with k = {ks[-1]}")
cf.curves({"this model": (ks, rates)}, "k", "bits per pixel of y", log="x", best=True)

# %% [markdown]
# The model was trained with k = 16, and here it is asked with others. (Mind the axis: it does not begin at 0.) One
# single key of each head, in each layer, gives most of the gain. More keys than the model was trained with do
# not help: they cost. The reason may be the haze of small probabilities. Or it may be that the model has never met
# so many keys. This curve cannot tell.
#
# ## 2. Where? The diamond
#
# So far nothing says *where* a key lies. Two tokens that look alike have the same key, one beside the query or at the
# other end of the picture. The Entroformer adds a learned vector to each key. It depends on the **offset** of the key
# from the query, (rows, columns):
#
# $$s_{ij} = \frac{q_i \cdot (k_j + p_{ij})}{\sqrt{d}}$$
#
# Inside a *diamond*, $|\text{rows}| + |\text{columns}| \le h$, each offset has a vector of its own. All offsets outside
# share one. (In raster order only half of them are ever used, those of earlier sites. The model of two passes uses
# all.)
#
# **Exercise 5.3.** Write `diamond`: all offsets inside, row by row from the top, each row from left to right.


# %% tags=["exercise"]
def diamond(h):
    """-> offsets [m, 2]: (rows, columns)"""
    return ...


# %% tags=["solution"]
def diamond(h):
    """-> offsets [m, 2]: (rows, columns)"""
    around = range(-h, h + 1)
    return [(dy, dx) for dy in around for dx in around if abs(dy) + abs(dx) <= h]


# %% tags=["hint"]
hint("5.3")

# %% tags=["check"]
check("5.3", diamond)

# %%
h = model.config.radius
offsets = np.asarray(diamond(h), dtype=int).reshape(-1, 2)
numbers = np.full((2 * h + 3, 2 * h + 3), len(offsets))  # the last number: outside
numbers[offsets[:, 0] + h + 1, offsets[:, 1] + h + 1] = np.arange(len(offsets))
print(f"h = {h}: {len(offsets)} offsets inside, {len(offsets) + 1} vectors instead of {server.n**2:,}")
cf.masks({f"h = {h}": numbers < len(offsets)})

# %% [markdown]
# The ring marks the query, and the other squares are keys. Now everything together: your scores, your top-k, your
# diamond, with the queries, keys and vectors of the first layer of the trained model. The first cell takes them out of
# the library's model. You need not know each of its names, but look at the shapes. `capture` reads what the library
# computes at the same place.

# %%
scene = Scene(model, photo, torch.float32)
stack = scene.model.context_model.stack
given = scene.y_hat * scene.rate.inverse  # one model for many rates: this brings the latents to one size
tokens = scene.model.context_model.embed(given.flatten(2).transpose(1, 2))
q, k, _ = (part[0] for part in stack.blocks[0].attention.project(stack.blocks[0].norm1(tokens)))  # [heads, n, d] each
places = np.stack(np.divmod(np.arange(server.n), server.width), axis=1)  # (row, column) of each token
which = np.clip(places[None] - places[:, None], -h - 1, h + 1) + h + 1
vector = torch.as_tensor(numbers[which[:, :, 0], which[:, :, 1]])  # the vector of each query and key: [n, n]

# %%
head = 0
by_position = (q[head] @ stack.positions[0].vectors.T / q.shape[-1] ** 0.5).gather(1, vector)
together = torch.as_tensor(scores(q[head], k[head])) + by_position
mine = torch.as_tensor(np.asarray(attention(together, model.config.top_k)))
with capture(scene.model, "context.0.probs") as maps:
    scene.model.distributions(scene.y_hat, scene.hyper, rate=scene.rate)
theirs = maps["context.0.probs"][0, head]
print(f"largest difference between your {tuple(mine.shape)} probabilities and the library's:", end=" ")
print(f"{(mine - theirs).abs().max():.6f}")

# %% [markdown]
# A difference of some millionths is rounding. You have written the heart of the Entroformer's context model. (The
# library never makes the table `vector`; see `entroformer_lib/models/position.py` for how it does without.)
#
# ## 3. The shift
#
# Token $i$ *carries* the latents of site $i$, and it looks at itself. So what it computes must not predict site $i$. It
# predicts the next one. The first site has nobody before it, and a learned vector `start` speaks for it.
#
# **Exercise 5.4.** Write `shifted`: of what the tokens have computed, and `start`, the features that predict site 0,
# site 1, and so on.


# %% tags=["exercise"]
def shifted(computed, start):
    """[n, D] and [D] -> [n, D]"""
    return ...


# %% tags=["solution"]
def shifted(computed, start):
    """[n, D] and [D] -> [n, D]"""
    return torch.cat((start[None], computed[:-1]))


# %% tags=["hint"]
hint("5.4")

# %% tags=["check"]
check("5.4", shifted)


# %%
def feature_of(place, shift):
    """Which of 9 x 9 latents change the feature that predicts one place, with the model's first block: [9, 9]"""
    block = model.context_model.stack.blocks[0]
    grid = torch.stack(torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"), dim=-1).flatten(0, 1)
    with torch.enable_grad():
        x = torch.randn(1, 81, model.config.dim, requires_grad=True)
        computed = block(x, grid, visible=lambda i: torch.arange(81) <= i[:, None], top_k=81)[0]
        feature = torch.as_tensor(shift(computed, torch.zeros(model.config.dim)))[place]
        return (torch.autograd.grad(feature.sum(), x)[0][0].abs().sum(dim=1) > 0).view(9, 9)


seen = {
    "shifted": feature_of(40, shifted),
    "the mistake: not shifted": feature_of(40, lambda computed, start: computed),
}
cf.masks({title: mask.numpy() for title, mask in seen.items()})

# %% [markdown]
# **A common mistake.** To forget the shift. Every mask in the code is right, "nobody looks ahead", and still each
# latent is predicted from itself. It is lesson 4's mistake in another form, and lesson 4's test finds it: the square
# with the ring is filled.
#
# The shift has a price that is seldom noticed. The token that predicts a latent stands one place to the left of it. So
# the key right above the *predicted* latent lies at the offset (-1, +1) from the token, at distance 2 in the diamond.
#
# ## 4. Hide a position
#
# What is the left neighbour worth, what the one above? The paper's figure 3 hides one position and counts the bits. Do
# it by hand. `intervene` calls a function of yours with the scores of each layer, while the model runs.
#
# **Exercise 5.5.** Write `hide`. Row `i` of the scores belongs to token `queries[i]`, which predicts the site
# `queries[i] + 1`. (The last token predicts no site. Treat it like the others: nobody uses what it computes.) Take away
# from it the key that lies `dy` rows and `dx` columns from the site that is **predicted**: put minus infinity there.
# Three things need care: the position may lie outside of the picture; it may not be decoded yet, where the score is
# minus infinity anyhow; and token 0 has one single key, its own, which it must keep. Don't change `scores` itself.


# %% tags=["exercise"]
def hide(scores, queries, dy, dx, width):
    """scores [B, heads, q, n]; queries [q]: numbers of the tokens; width: of the grid -> scores [B, heads, q, n]"""
    return ...


# %% tags=["solution"]
def hide(scores, queries, dy, dx, width):
    """scores [B, heads, q, n]; queries [q]: numbers of the tokens; width: of the grid -> scores [B, heads, q, n]"""
    scores = scores.clone()
    for i, query in enumerate(queries.tolist()):
        row, column = divmod(query + 1, width)
        key = (row + dy) * width + column + dx
        if row + dy >= 0 and 0 <= column + dx < width and key <= query and query > 0:
            scores[:, :, i, key] = -torch.inf
    return scores


# %% tags=["hint"]
hint("5.5")

# %% tags=["check"]
check("5.5", hide)


# %%
def bits_with(changes):
    """Bits of all latents while `intervene` changes something."""
    with intervene(scene.model, changes):
        found = scene.model.distributions(scene.y_hat, scene.hyper, rate=scene.rate)
    return float(-scene.model.gaussian(scene.y_hat, *found).log2().sum())


usual = bits_with({})
around = [(0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-2, -1), (0, -3)]

# %%
by_hand = []
for dy, dx in around:

    def change(tile, heads, queries, dy=dy, dx=dx):
        return torch.as_tensor(hide(tile, queries, dy, dx, server.width))

    by_hand.append(100 * (bits_with({"context.*.scores": change}) / usual - 1))
missing = [100 * (found["ratio"] - 1) for found in mask_positions(scene, around)]

# %%
print("position (rows, columns): hidden by hand, missing for the whole model")
for place, mine, theirs in zip(around, by_hand, missing, strict=True):
    print(f"{place!s:>10}: {mine:+7.2f}%  {theirs:+7.2f}%")

# %% [markdown]
# The latent above costs several percent, both ways. But the one to the left, (0, -1), costs **next to nothing** when it
# is hidden by hand: less than one percent, although its key was hidden in every layer! Is it worthless? The second
# column says no. There the library lets a latent be missing for the whole model: its token is empty, and nobody sees it
# (`Gaps` in `entroformer_lib/models/context.py`).
#
# Think before you read on. Where is the left neighbour, when its key is hidden?
#
# **Finding.** The token that predicts *carries* the left neighbour: you have hidden a token's key from itself. Each
# layer adds what it finds to the token, so the token passes through all layers and needs no attention to know itself.
# For the other positions there is a second way around a hidden key: other tokens have seen the latent, in an earlier
# layer, and tell it. To hide something from a network you must know all ways in. (The second column is too high for
# the left neighbour: more than a fifth of the bits on *astronaut*. This model has never met an empty token in training.
# The paper's model had met some, because positions were taken out at random while it learned. So one column says too
# little, and the other too much.)
#
# ## 5. The explorer
#
# Click on a site (the explorer calls it a *block*), choose layer, head and k. The mode *Attention and cost*
# shows what the absence of each position costs. Find (1) a head that looks along an edge, and (2) a site where the
# context costs bits instead of saving some. Then say (3) around which of the two frames the dashed diamond lies, and
# why.

# %%
explorer = Explorer(server, row=row, column=column, layer=server.layers - 1)
explorer

# %% [markdown]
# ## 6. Does attention explain the bits? A dispute
#
# One of you is **for**: "The model looks where the information is. A map of attention explains where the bits were
# saved." The other is **against**: "It is a picture of numbers inside. It explains nothing." Three rounds, and each has
# a measurement. Before you run a cell, both say what they expect.
#
# **Round 1: one site.** Left what it looks at, in the middle what the absence of each position costs, right both
# against each other, a dot for each position. (In the middle orange means that the absence costs bits, and blue that
# it saves some; the scale below says how many. All scales show square roots, so that small numbers can be seen.)

# %%
last = attention_panel(server, site, server.layers - 1)
attention_figures.attention_and_cost(server.picture, [last, cost_panel(server, site)])

# %% [markdown]
# Point for *for*? The most expensive position is often among the most attended ones. Point for *against*? Most attended
# positions cost next to nothing, or their absence even saves bits.
#
# **Round 2: many sites.** For each of some sites, rank the attended positions by attention, and by what their
# absence costs. A rank correlation of 1 says: the same order, 0: no relation.

# %%
table = attention_against_cost(model, [photo], ks=(model.config.top_k,), queries=latents)
mean = table[table["layer"] == -1].iloc[0]  # attention as a mean over all layers and heads
print(f"attention and cost:             {mean['rho']:+.2f}")
print(f"nearness and cost:              {mean['rho_nearness']:+.2f}")
print("attention and change of bits,")
print(f"  more or less expensive:       {mean['rho_magnitude']:+.2f}")

# %% [markdown]
# Against: whether a position *helps* has little to do with how much attention it gets. For: attention does say
# where a *change* would matter, in one direction or the other.
#
# **Round 3: take the attention away.** If only the choice of the 16 keys matters, we may give them even weights. If
# attention were decoration, any 16 keys would do. If it were worthless, the token itself would be enough.


# %%
def even(probs, heads, queries):
    """The same keys, with even weights."""
    return (probs > 0) / (probs > 0).sum(dim=-1, keepdim=True)


def any_keys(scores, heads, queries):
    """Keys chosen at random, with random weights."""
    return torch.where(scores > -torch.inf, torch.randn(scores.shape), scores)


def itself(probs, heads, queries):
    """Each token looks at itself alone."""
    return F.one_hot(queries, probs.shape[-1]).to(probs).expand_as(probs)


# %%
torch.manual_seed(0)
rounds = {"the same keys, even weights": {"context.*.probs": even}, "random keys": {"context.*.scores": any_keys}}
rounds["only itself"] = {"context.*.probs": itself}
costs = {name: 100 * (bits_with(changes) / usual - 1) for name, changes in rounds.items()}
costs["a model without context"] = 100 * (bits["alone"] / bits["context"] - 1)
cf.bars(costs, "more bits of y, in percent")

# %% [markdown]
# For: with even weights or random keys the bits rise by more than the whole context had saved. They rise most when each
# token sees itself alone. The attention is needed, all of it together. Against: "it is needed" is a statement about the
# *model*, not about one position in one map. And the model was never trained for such changes, so their cost is an
# upper bound. (The right keys with even weights cost about as much as random keys, and more than no context at all. Who
# gains a point by that?)
#
# ## To argue about
#
# Now write down, each of you, **one sentence that the other can accept**, and that says what a map of attention may be
# used for. Then look at the map at the beginning of this lesson again. Which sentence about it would you sign?
#
# ## If there is time
#
# 1. Round 3 with a single layer, from `"context.0.probs"` to `"context.8.probs"`. Which layer can do without its
#    weights?
# 2. Change `content` or `position` instead: `{"context.*.content": lambda tile, heads, queries: 0 * tile}`. Does the
#    model need to know *what* a key is, or *where* it is?
# 3. `server.total_bits(16, without=(5, 0))` switches a head off. Which of all heads is the most expensive to lose?
#
# ## Further reading
#
# - A. Vaswani and others, *Attention Is All You Need*, NeurIPS 2017, arXiv:1706.03762.
# - Y. Qian, M. Lin, X. Sun, Z. Tan, R. Jin, *Entroformer: A Transformer-based Entropy Model for Learned Image
#   Compression*, ICLR 2022, arXiv:2202.05492: top-k, the diamond, and two passes.
# - P. Shaw, J. Uszkoreit, A. Vaswani, *Self-Attention with Relative Position Representations*, NAACL 2018,
#   arXiv:1803.02155.
# - S. Jain, B. C. Wallace, *Attention is not Explanation*, NAACL 2019, arXiv:1902.10186, and the answer of
#   S. Wiegreffe, Y. Pinter, *Attention is not not Explanation*, EMNLP 2019, arXiv:1908.04626: the dispute, for texts.
