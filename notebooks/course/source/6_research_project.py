# %% [markdown]
# # Lesson 6: A small research project
#
# **After this lesson you can**
#
# - write a hypothesis that can turn out wrong, with the size of effect that would convince you;
# - say how many runs you need before you begin;
# - run a sweep in which one thing changes, and read an effect beside its spread;
# - report it in three sentences that somebody else can build on.
#
# You need 90 minutes, and lessons 4 and 5. It works best in pairs, with a week between the hypothesis and the sweep.

# %% tags=["parameters"]
steps = 60  # of each training
seeds = 4  # runs of each of the two rows
test = "astronaut"  # of astronaut, chelsea, coffee, rocket; the other three are to learn from
folder = "build/lesson6"  # of the runs; a finished run is not repeated

# %%
import math
from pathlib import Path

import numpy as np
import pandas as pd

from entroformer_lib import load_model
from entroformer_lib.datasets import SAMPLES, sample_picture
from entroformer_lib.inspection.group_server import GroupServer
from entroformer_lib.studies import ablation
from entroformer_lib.studies.ablation_grids import Grid, Terms, own_entry
from entroformer_lib.studies.rate_distortion import middle
from entroformer_lib.teaching import check, hint
from entroformer_lib.views import ablation_figures, grouped_figures
from entroformer_lib.views import course_figures as cf

# %% [markdown]
# ## A picture first
#
# A change saves 1% of the bits, in truth. Another seed, with nothing changed, moves a rate by 1%, too (its standard
# deviation). A thousand students measure it. Each compares one run without the change to one run with it; then
# each compares the means of nine runs.


# %%
def students(runs, truth=1.0, spread=1.0, count=1000):
    """What so many students measure, in percent, each with so many runs of both kinds."""
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, spread, (2, count, runs))
    return truth + (before - after).mean(axis=1)


found = {"one run of each": students(1), "nine runs of each": students(9)}
cf.histograms(found, "saving that was measured, %", np.arange(-4, 6.5, 0.5))

# %%
for name, values in found.items():
    print(f"{name}: {(values < 0).mean():.0%} of the students find that it costs bits")
    print(f"{'':{len(name)}}  {(values > 2).mean():.0%} find more than twice the true effect")

# %% [markdown]
# With one run of each, a quarter of the students finds the wrong sign. Another quarter finds an effect more than twice
# as large as the true one. Nobody made a mistake. They did too few runs for so small an effect. In this lesson we do it
# better.
#
# ## 1. Effect and doubt
#
# Two rows of a table: `before` and `after`, one rate for each seed, in bits per pixel.
#
# **Exercise 6.1.** Write `savings`: how much `after` saves, in percent of `before`, for each seed.


# %% tags=["exercise"]
def savings(before, after):
    """Rates [seeds] each -> percent [seeds], positive where bits are saved"""
    return ...


# %% tags=["solution"]
def savings(before, after):
    """Rates [seeds] each -> percent [seeds], positive where bits are saved"""
    return 100 * (1 - np.asarray(after) / np.asarray(before))


# %% tags=["hint"]
hint("6.1")

# %% tags=["check"]
check("6.1", savings)

# %% [markdown]
# Two runs of the same seed see the same crops in the same order. So we compare seed by seed: what both have in common
# cancels out. The effect is the mean. How far may it be from the truth? The **standard error** says: the standard
# deviation of the savings, with $n - 1$ below the root, divided by $\sqrt{n}$.
#
# **Exercise 6.2.** Write `standard_error`.


# %% tags=["exercise"]
def standard_error(values):
    """Savings [seeds] -> the standard error of their mean"""
    return ...


# %% tags=["solution"]
def standard_error(values):
    """Savings [seeds] -> the standard error of their mean"""
    return np.std(values, ddof=1) / np.sqrt(len(values))


# %% tags=["hint"]
hint("6.2")

# %% tags=["check"]
check("6.2", standard_error)

# %% [markdown]
# **Exercise 6.3.** Before a study: how many seeds does it need? We want two standard errors to be at most as large as
# the effect that we look for. Write `seeds_needed`: from the standard deviation of the savings between seeds, and that
# effect, both in percent, a whole number. Fewer than 2 seeds have no spread at all.


# %% tags=["exercise"]
def seeds_needed(spread, effect):
    """-> the smallest number of seeds, at least 2"""
    return ...


# %% tags=["solution"]
def seeds_needed(spread, effect):
    """-> the smallest number of seeds, at least 2"""
    return max(2, math.ceil((2 * spread / effect) ** 2))


# %% tags=["hint"]
hint("6.3")

# %% tags=["check"]
check("6.3", seeds_needed)

# %%
for effect in (5, 2, 1, 0.5, 0.2):
    print(f"an effect of {effect}% with a spread of 1%: {int(seeds_needed(1, effect))} seeds")

# %% [markdown]
# Half the effect takes four times the runs. That is why you must say **before** the study which size you care for.
#
# ## 2. The hypothesis
#
# The object is a small transformer without a hyperprior, 2 layers deep: a context model as in lesson 5. You change
# **one** of its fields, and nothing else: transforms, photographs, crops, their order and the number of steps are equal
# for both rows. Ideas:
#
# | field | usual | you could ask |
# | --- | --- | --- |
# | `position` | `"diamond"` | what do `"none"` or `"absolute"` cost? |
# | `radius` | 3 | is a diamond of 1 enough? |
# | `top_k` | 16 | are 2 enough? Is `None`, dense, better? |
# | `context_layers` | 2 | what does a third one bring? |
# | `heads` | 3 | is one enough? (The number of heads must divide `dim`, which is 96.) |
#
# **Exercise 6.4.** Write your hypothesis **before you run anything**, as a dictionary: `change`, one field with its new
# value; `saves`, in percent, what you expect (negative if bits rise); `convincing`, the smallest size of an effect that
# you would care for, in percent, above 0; `because`, a reason in a sentence of at least six words.

# %% tags=["exercise"]
hypothesis = ...

# %% tags=["solution"]
hypothesis = {
    "change": {"position": "none"},
    "saves": -3,
    "convincing": 1,
    "because": "Without positions the model cannot tell the latent above from one far away that looks alike.",
}

# %% tags=["hint"]
hint("6.4")

# %% tags=["check"]
check("6.4", hypothesis)

# %% [markdown]
# ## 3. The sweep
#
# `ablation` trains each row with each seed, and measures both on a photograph that no run has seen. The latents of the
# training photographs are computed once. Rates are estimated, and count all bits of the whole picture. Runs that are
# finished stay: run the cell again, and it does only what is missing.

# %%
root = Path(folder)
for name in SAMPLES:
    place = root / ("test" if name == test else "train")
    place.mkdir(parents=True, exist_ok=True)
    sample_picture(name).save(place / f"{name}.png")

# %%
usual = {"context_layers": 2}
change = dict(hypothesis["change"])
rows = Grid("lesson", "two rows", (own_entry("usual", **usual), own_entry("changed", **usual | change)), ("kodak",))
data = {name: str(root / place) for name, place in (("latents", "latents"), ("train_on", "train"), ("kodak", "test"))}
terms = Terms(transforms="blocks-hyperprior@0.007", steps=steps, crop=128, accelerator="cpu", **data)

# %%
words = "_".join(f"{name}-{value}" for name, value in change.items())
runs = root / f"{words}-{steps}-steps-{test}"  # another hypothesis has another folder
study = ablation.prepare([rows], terms, runs, seeds=range(seeds))
outcomes = study.go(report=print)  # half a minute to three minutes in all
assert not any(outcome.error for outcome in outcomes), "see above which run failed, and why"

# %%
table = pd.DataFrame(ablation.rows_of(study)["lesson"])
rates = table.pivot_table(index="name", columns="seed", values="bpp").loc[["usual", "changed"]]
rates.round(4)

# %% [markdown]
# ## 4. Read the spread
#
# Each dot is a run, and the short line is the mean of its row. Mind the axis: it does not begin at 0.

# %%
dots = pd.DataFrame({"row": table["name"], "source": "one seed", "value": table["bpp"]})
ablation_figures.dots(dots, "bits per pixel")

# %%
saved = np.asarray(savings(rates.loc["usual"].to_numpy(), rates.loc["changed"].to_numpy()), dtype=float)
effect, doubt = float(saved.mean()), 2 * float(standard_error(saved))
print("saved, seed by seed:", ", ".join(f"{value:+.2f}%" for value in saved))
print(f"effect: {effect:+.2f}%, give or take {doubt:.2f}% (two standard errors)")
needed = int(seeds_needed(float(np.std(saved, ddof=1)), hypothesis["convincing"]))
print(f"to tell {hypothesis['convincing']}% from 0 you need {needed} seeds, and have {seeds}")

# %% [markdown]
# So many seeds tell an effect of this size from 0. The verdict below asks for more: the whole range must be at least
# `convincing`. So it needs a larger effect, or more seeds.
#
# **Exercise 6.5.** Write `verdict`. The truth lies, most likely, between `effect - doubt` and `effect + doubt`. (With
# four seeds this is so in 86 of 100 studies, with two seeds in 70. The suite's own verdicts widen the range for few
# seeds, up to 95 of 100.) Return `"saves"` if all of this range is at or above `convincing`, `"costs"` if all of it is
# at or below `-convincing`, `"no effect"` if all of it lies strictly between the two, and `"undecided"` otherwise.


# %% tags=["exercise"]
def verdict(effect, doubt, convincing):
    """Percent, all of them -> "saves", "costs", "no effect" or "undecided" """
    return ...


# %% tags=["solution"]
def verdict(effect, doubt, convincing):
    """Percent, all of them -> "saves", "costs", "no effect" or "undecided" """
    low, high = effect - doubt, effect + doubt
    if low >= convincing:
        return "saves"
    if high <= -convincing:
        return "costs"
    return "no effect" if -convincing < low and high < convincing else "undecided"


# %% tags=["hint"]
hint("6.5")

# %% tags=["check"]
check("6.5", verdict)

# %%
print(f"expected: {hypothesis['saves']:+g}%, because: {hypothesis['because']}")
print(f"found: {effect:+.2f}% with a doubt of {doubt:.2f}%: {verdict(effect, doubt, hypothesis['convincing'])}")

# %% [markdown]
# "Undecided" and "no effect" are different things! The first says that these runs cannot decide: they are too few, or
# the effect is close to the limit that you chose. The second is a result.
#
# **A common mistake.** To look first and to decide afterwards: which number is "the" result, which seed "was broken",
# how many more runs to do "until it is clear". Whoever stops as soon as the sign pleases will always find what he
# hoped for. That is what the hypothesis was written down for.
#
# ## 5. Three sentences
#
# **Exercise 6.6.** Write `report`, three sentences that can be read alone: the **question**, with what was compared;
# the **finding**, with its number and its doubt; and what **limits** it, or what would change your mind.

# %% tags=["exercise"]
report = ...

# %% tags=["solution"]
report = (
    "Does a context model of two layers need positions, compared with the diamond of radius 3 on equal terms? "
    f"On one photograph, after {steps} steps and with {seeds} seeds, leaving them out changes the bits by "
    f"{-effect:+.1f}%, give or take {doubt:.1f}%. "
    "After so few steps on three photographs this says little about trained models, and a second test picture with "
    "another sign would change our minds."
)

# %% tags=["hint"]
hint("6.6")

# %% tags=["check"]
check("6.6", report)

# %%
print(report)

# %% [markdown]
# How far would your teacher go with you? What you measured is true for *this* photograph, *these* few steps and *three*
# photographs to learn from. The seeds say how much chance there is in the training. They say nothing about other
# pictures. The suite's own ablations (notebook 05, on 24 pictures) find that positions matter much more: there the
# models learned for thousands of steps from a thousand photographs.
#
# ## 6. Outlook: between two steps and a thousand
#
# Lesson 4 had two orders: raster, in a thousand steps, and the checkerboard, in two. GroupedMixer (Li and others, 2024)
# goes between. It cuts channels into slices and sites into phases, and codes group after group. Three orders are drawn,
# with the number of its group in each cell; our model has learned the one on the left.

# %%
mixer = GroupServer(load_model("blocks-groupedmixer@0.007"), middle(sample_picture(test), 256))
grouped_figures.tiling(mixer.counts)

# %%
groups, order = mixer.bits_of_groups() / mixer.latents_of_a_group, mixer.order
first = {f"slice {s}": np.mean([groups[g] for g, of in enumerate(order) if of[0] == s]) for s in range(mixer.counts[0])}
print(f"{len(order)} groups, so {len(order)} runs of the network instead of {mixer.n}")
cf.bars(first, "bits per latent, mean over the phases of a slice")

# %% [markdown]
# Each group knows all groups before it. (That slice 0 is the most expensive proves little: it has other channels than
# slice 1.) Which order is best, how many slices, how many phases? These are ablations. You know now how to do one.
#
# ## To argue about
#
# Your neighbours tried eight fields, two seeds each. One of the eight saves 1.2%, "two standard errors from zero". They
# report this one. What is wrong with that, and how many of eight would look like this if *none* had any effect? What
# should they do with the same number of runs?
#
# ## If there is time
#
# 1. Give both rows the same architecture: `"change": {"radius": 3}` in the hypothesis. How many runs are trained, and
#    why is every saving exactly 0? To see chance, compare two seeds of the usual row with its two others. How large is
#    an effect of nothing?
# 2. Compare without pairs: the standard error of a difference of two means, from both rows' own spreads. How much
#    larger is it here?
# 3. Set `steps` to 200. Does the effect grow, shrink, or change its sign?
#
# ## Further reading
#
# - X. Bouthillier and others, *Accounting for Variance in Machine Learning Benchmarks*, MLSys 2021, arXiv:2103.03098.
# - Z. C. Lipton, J. Steinhardt, *Troubling Trends in Machine Learning Scholarship*, 2018, arXiv:1807.03341.
# - Y. Qian, M. Lin, X. Sun, Z. Tan, R. Jin, *Entroformer: A Transformer-based Entropy Model for Learned Image
#   Compression*, ICLR 2022, arXiv:2202.05492: its tables are ablations. Which of them give a spread?
