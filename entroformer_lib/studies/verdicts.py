"""What the paper claims, what stands here, and the verdict of one rule.

A claim is a saving (in percent of the bits, unless it says otherwise), positive in the paper's direction, with the
paper's number where it gives one. Ours comes from a saved result, with an interval that holds the true value with 95%
confidence. The rule looks at the interval alone:

- reproduced: all of it is above 0, and it reaches the paper's number or lies above;
- smaller: all of it is above 0 and below the paper's number;
- reversed: all of it is below 0;
- cannot tell: 0 lies in it. Where it ends is said, as it may rule out the paper's number.

Some claims are that something costs at most so much: a loss of one percent, no difference. Of those the limit stands
in 0's place: reproduced where all of the interval is within the limit, larger where all of it is beyond.

An interval comes from seeds where models were trained for the comparison: runs on the same terms are fitted together as
a row for each kind of model and one for each seed (the seed decides order, crops and noise for all kinds alike), and
what remains is the spread. It is Student's, with as many degrees of freedom as there are runs beyond that fit. Models
without positions, and with absolute ones, differ far more from seed to seed in whole pictures than all others. They are
left out of the comparisons of others, and their own are fitted from the two compared kinds alone. Between models whose
real files are compared the interval is over the pictures (the jackknife's). Where seeds of the same family say what
another training changes, that is added to it, as variances are. A number without an interval stands for itself.

Figure 5 is read over the range of rates of the authors' curve: at the lambdas where the model that is compared with
lies within it, and, where the paper speaks of low rates, at the lower half of these.

Rates are divided as in the figures and tables: means over the pictures first, then ratios, and of several lambdas the
mean of the ratios. The rank correlations of figure 3 are those of each picture.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import t as student

from entroformer_lib.errors import DataError
from entroformer_lib.studies import bd, same_transforms
from entroformer_lib.studies.results import (
    AUTHORS,
    NoResult,
    ablation,
    decoding_times,
    kinds,
    kodak_means,
    needed,
    published,
    reference,
    trainings,
)

CONFIDENCE = 0.95
APART = ("absolute", "none", "none-dense")  # kinds that differ from seed to seed far more than all others
SHIPPED, SERIAL, MS_SSIM = "blocks-parallel", "blocks-serial", "blocks-parallel-msssim"


@dataclass(frozen=True)
class Effect:
    """A measured saving, in the unit of its claim.

    half_width: of the interval around `value`. over: what the interval is over, in words.
    """

    value: float
    half_width: float
    over: str
    sources: tuple[str, ...]

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper.

    Args:
        item: where it stands: "figure 3", "table 1".
        says: the sentence, in our words.
        measured: what stands here; raises NoResult while there is none.
        published: the paper's number; None where it gives a direction only.
        limit: of a claim that something costs at most so much; its `published` is the cost.
        number: the paper's number in words, where a saving does not say it.
        doubt: why ours may differ, whatever it is.
    """

    item: str
    says: str
    measured: Callable[[], Effect]
    published: float | None = None
    limit: float | None = None
    unit: str = "%"
    number: str = ""
    doubt: str = ""


def verdict(claim: Claim, effect: Effect) -> str:
    """The rule above.  ->  reproduced, smaller, larger, reversed or cannot tell"""
    if not np.isfinite(effect.half_width):  # too few repetitions
        return "cannot tell"
    if claim.limit is not None:
        if effect.high <= claim.limit:
            return "reproduced"
        return "larger" if effect.low > claim.limit else "cannot tell"
    if effect.high < 0:
        return "reversed"
    if effect.low <= 0:
        return "cannot tell"
    return "smaller" if claim.published is not None and effect.high < claim.published else "reproduced"


def sentence(claim: Claim, effect: Effect) -> str:
    """What stands here, in words, with as many digits as the verdict needs to follow from them."""
    unit, digits = ("%", 1) if claim.unit == "%" else (f" {claim.unit}", 2)
    while True:
        value = round(effect.value, digits) + 0.0
        what = f"{value:+.{digits}f}"
        if not np.isfinite(effect.half_width):
            return f"{what}{unit} ({effect.over}: too few repetitions for an interval)"
        half_width = effect.half_width + abs(effect.value - value) * (effect.half_width > 0)  # around what is said
        half = np.ceil(round(half_width * 10**digits, 6)) / 10**digits  # rounded up, so that the sum below is true
        if digits == 4 or verdict(claim, replace(effect, value=value, half_width=half)) == verdict(claim, effect):
            break
        digits += 1
    if half:
        what += f" ± {half:.{digits}f}"
    what += f"{unit} ({effect.over})"
    if verdict(claim, effect) != "cannot tell":
        return what
    return f"{what}; the interval ends at {value + half:+.{digits}f}{unit}"


def table() -> pd.DataFrame:
    """A row for each claim that has a result: item, says, published, ours (both in words), verdict, doubt, sources; and
    as numbers unit, published_value (nan where the paper gives a direction), value, low, high."""
    rows = []
    for claim in claims():
        try:
            effect = claim.measured()
        except NoResult:
            continue
        published = "a direction" if claim.published is None else f"{claim.published:+.1f}{claim.unit}"
        published = claim.number or published
        about = dict(item=claim.item, says=claim.says, published=published, ours=sentence(claim, effect))
        about |= dict(verdict=verdict(claim, effect), doubt=claim.doubt, sources=effect.sources)
        numbers = dict(unit=claim.unit, published_value=claim.published, value=effect.value)
        rows.append(about | numbers | dict(low=effect.low, high=effect.high))
    words = ["item", "says", "published", "ours", "verdict", "doubt", "sources"]
    return pd.DataFrame(rows, columns=[*words, "unit", "published_value", "value", "low", "high"])


# ---- between trainings ----


def between_seeds(rows: pd.DataFrame, better: str, base: str, *grids: str) -> Effect:
    """What one kind of model saves over another, in percent.

    Args:
        rows: kind, seed, bpp: a row for each training. Other kinds than the two give spread, if none of the two is in
            APART, and they are not.
        grids: that the two come from.

    Raises:
        NoResult: one of the two is not there.
    """
    if missing := {better, base} - set(rows["kind"]):
        raise NoResult(f"No runs of {', '.join(sorted(missing))} are saved.")
    alone = {better, base} & set(APART)
    rows = rows[rows["kind"].isin({better, base}) if alone else ~rows["kind"].isin(APART)]
    of_kind, of_seed = pd.get_dummies(rows["kind"], dtype=float), pd.get_dummies(rows["seed"], dtype=float)
    design = np.hstack([of_kind, of_seed.iloc[:, 1:]])
    fitted, _, rank, _ = np.linalg.lstsq(design, np.log(rows["bpp"]), rcond=None)
    asked = np.zeros(design.shape[1])
    asked[of_kind.columns.get_loc(better)], asked[of_kind.columns.get_loc(base)] = 1, -1
    free = len(rows) - rank
    left = np.square(np.log(rows["bpp"]) - design @ fitted).sum()
    spread = np.sqrt(left / free * (asked @ np.linalg.pinv(design.T @ design) @ asked)) if free else np.inf
    ratio = float(np.exp(asked @ fitted))
    half = 100 * ratio * spread * (student.ppf((1 + CONFIDENCE) / 2, free) if free else 1)
    count = min((rows["kind"] == kind).sum() for kind in (better, base))
    repeats = f"; {free} {'degree' if free == 1 else 'degrees'} of freedom" if free else ""
    over = f"{count} {'seed' if count == 1 else 'seeds'}{repeats}"
    return Effect(100 * (1 - ratio), float(half), over, tuple(f"ablation-{grid}" for grid in grids))


def whole(better: str, base: str, grid: str) -> Effect:
    """`between_seeds` by the rate of whole pictures at the end of training."""
    return between_seeds(trainings(grid), better, base, grid)


def differences(grid: str, base: str) -> pd.DataFrame:
    """What each kind of model of a grid saves over one of them, and the smallest saving that could have been told.

    Args:
        base: a kind, as the runs are named without their seed.

    Returns:
        kind, seeds, bpp (whole pictures, mean of the seeds), saved (percent of the bits over base), smallest (percent:
        half of the interval; infinite where there are too few trainings for one), told (saves, costs, cannot tell).

    Raises:
        NoResult: the grid has no result, or not this kind.
    """
    rows, found = trainings(grid), []
    if base not in set(rows["kind"]):
        raise NoResult(f"No runs of {base} are saved.")
    for kind in kinds(pd.DataFrame(needed(f"ablation-{grid}")["rows"])["run"]).unique():
        bpp = rows[rows["kind"] == kind]["bpp"]
        row = {"kind": kind, "seeds": len(bpp), "bpp": bpp.mean()}
        if kind == base or bpp.empty:
            found.append({**row, "saved": 0.0 if kind == base else np.nan, "smallest": np.nan, "told": "–"})
            continue
        effect = between_seeds(rows, kind, base, grid)
        told = "cannot tell" if abs(effect.value) <= effect.half_width else "saves" if effect.value > 0 else "costs"
        found.append({**row, "saved": effect.value, "smallest": effect.half_width, "told": told})
    return pd.DataFrame(found)


def no_difference(better: str, base: str, grid: str) -> Effect:
    """The size of the difference, whatever its sign."""
    effect = whole(better, base, grid)
    return replace(effect, value=abs(effect.value))


def sooner(better: str, base: str) -> Effect:
    """`between_seeds` in figure 7, by the mean (of logarithms) over the first half of the steps."""
    rows = ablation("figure7")
    early = rows[rows["step"] <= 0.5 * rows["step"].max()]
    means = np.exp(np.log(early["bpp"]).groupby([early["run"], early["seed"]]).mean())
    means = means.rename_axis(["run", "seed"]).reset_index()
    return between_seeds(means.assign(kind=kinds(means["run"])), better, base, "figure7")


def at_size(size: int) -> Effect:
    """Relative positions over absolute ones, on squares of a size."""
    rows = ablation("table4")
    means = rows[rows["size"] == size].groupby(["run", "seed"])["bpp"].mean().reset_index()
    return between_seeds(means.assign(kind=kinds(means["run"])), "diamond", "absolute", "table4")


# ---- between models that were trained once, over pictures ----


def over_pictures(better: pd.DataFrame, base: pd.DataFrame, *sources: str) -> Effect:
    """What is saved, in percent: of the mean rate, and of that the mean over the lambdas.

    better, base: rates, a row for each picture and a column for each lambda. The interval is the jackknife's: from how
    the saving changes when one picture is left out.
    """
    pictures = len(base)

    def saved(one: pd.DataFrame, other: pd.DataFrame) -> np.ndarray:
        return 100 * (1 - (one / other)).mean(axis=1).to_numpy()

    value = saved(better.sum().to_frame().T, base.sum().to_frame().T)[0]
    without = saved(better.sum() - better, base.sum() - base)
    spread = np.sqrt((pictures - 1) / pictures * np.square(without - without.mean()).sum())
    half = spread * student.ppf((1 + CONFIDENCE) / 2, pictures - 1)
    return Effect(float(value), float(half), f"{pictures} pictures, one training", sources)


def between_trainings() -> float:
    """Half of the interval of a difference between two kinds of the family, of what another seed changes; in percent.

    From the kinds that were trained with several seeds: the spread within them, Student's, of one training each.

    Raises:
        NoResult: no kind of the family has two seeds.
    """
    rows = pd.DataFrame(needed("family")["rows"])
    rows = rows[rows["steps"] == rows["steps"].max()]
    best = rows.groupby(["kind", "seed"])["score"].min()  # of several learning rates
    within = best.groupby("kind").agg(["var", "count"]).query("count > 1")
    if within.empty:
        raise NoResult("No kind of the family was trained with two seeds.")
    free = (within["count"] - 1).sum()
    spread = np.sqrt((within["var"] * (within["count"] - 1)).sum() / free)
    return float(100 * np.sqrt(2) * spread * student.ppf((1 + CONFIDENCE) / 2, free))


def same_pictures(better: str, base: str, low: bool = True) -> Effect:
    """Between two variants behind the same transforms: real files, the mean over the lambdas at which the base lies
    within the rates of the authors' curve.

    low: only the lower half of these, as the paper speaks of low rates there.
    """
    rates, theirs = same_transforms.saved_rates(), published().query("codec == @AUTHORS")["bpp"]
    parts = {variant: part.pivot_table("bpp", "image", "lmbda") for variant, part in rates.groupby("variant")}
    if missing := {better, base} - set(parts):
        raise NoResult(f"No published model is of the kind {', '.join(sorted(missing))}.")
    within = parts[base].columns[parts[base].mean().between(theirs.min(), theirs.max())]
    within = within[: -(-len(within) // 2)] if low else within
    models = rates.drop_duplicates("variant").set_index("variant")["model"]
    sources = (f"{models[variant]}-kodak" for variant in (better, base))
    effect = over_pictures(parts[better][within], parts[base][within], *sources)
    try:
        half = float(np.hypot(effect.half_width, between_trainings()))
    except NoResult:
        return effect
    return replace(
        effect, half_width=half, over=f"{len(parts[base])} pictures and seeds", sources=(*effect.sources, "family")
    )


def cost_of_two_passes() -> Effect:
    """What the parallel model needs more than the serial one, in percent."""
    effect = same_pictures("parallel", "serial", low=False)
    return replace(effect, value=-effect.value)


def second_slice(better: str, base: str) -> Effect:
    """Between two contexts of the second slice in one model that was trained with all of them, over the seeds."""
    rows = ablation("table3_pictures").rename(columns={"context": "kind"})
    means = rows.groupby(["kind", "seed"], as_index=False)["bpp"].mean()
    return between_seeds(means, better, base, "table3")


# ---- figure 3 ----


def falls_with_distance() -> Effect:
    """Spearman's rank correlation, with its sign turned, of what a missing position costs and its L1 distance."""
    return _mean_over_pictures(-_rank_correlations()["L1"])


def diamond() -> Effect:
    """How much stronger that correlation is with L1 distance than with the better of the other two."""
    ranks = _rank_correlations()
    return _mean_over_pictures(ranks[["L2", "L-infinity"]].min(axis=1) - ranks["L1"])


def _rank_correlations() -> pd.DataFrame:
    """Of each picture (rows) and norm (columns), in the model without position encoding."""
    saved = needed("position_masking")
    places = pd.DataFrame(saved["over_pictures"])[["model", "dy", "dx", "L1", "L2", "L-infinity"]]
    rows = pd.DataFrame(saved["rows"]).query("model == 'none'").merge(places, on=["model", "dy", "dx"])
    if rows.empty:
        raise NoResult("No model without position encoding was measured.")
    norms = {norm: rows.groupby("image")[["ratio", norm]].corr("spearman") for norm in ("L1", "L2", "L-infinity")}
    return pd.DataFrame({norm: found["ratio"].xs(norm, level=1) for norm, found in norms.items()})


def _mean_over_pictures(values: pd.Series) -> Effect:
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Effect(float(values.mean()), float(half), f"{len(values)} pictures, one training", ("position_masking",))


# ---- against published curves, time, size: numbers without an interval ----


def against(model: str, anchor: str, low: bool = False, quality: str = "psnr_db") -> Effect:
    """BD-rate of a model against a published curve, as a saving.

    low: only the lower half of the model's rates. quality: psnr_db or ms_ssim_db.

    Raises:
        NoResult: they have too little in common for one.
    """
    try:
        points = kodak_means().query("codec == @model")
        if low:
            points = points[points["bpp"] <= points["bpp"].median()]
        ours, theirs = bd.curve_of(points, model, quality), bd.curve_of(published(), anchor, quality)
        value = -bd.compare(ours, theirs).rate_percent
    except DataError as error:
        raise NoResult(str(error)) from None
    return Effect(value, 0.0, f"BD-rate of {model}", (f"{model}-kodak",))


def authors_against(anchor: str, goal: str = "mse", quality: str = "psnr_db") -> float:
    """The same of the authors' own curve.  goal: what their model was trained for"""
    ours = bd.curve_of(published(optimised_for=[goal]), AUTHORS, quality)
    return -bd.compare(ours, bd.curve_of(published(), anchor, quality)).rate_percent


def time_saved() -> Effect:
    """By the parallel model in decoding one picture, against the serial one, in percent."""
    seconds = decoding_times().set_index("model")["seconds"]
    value = 100 * (1 - seconds["base-parallel"] / seconds["base-serial"])
    return Effect(float(value), 0.0, "on two CPU cores", ("latency",))


def size_of_base() -> Effect:
    """By how much the entropy model of the paper's size differs from the paper's number of megabytes, in percent."""
    ours = pd.DataFrame(needed("model_sizes")["rows"]).set_index("model")["megabytes"]["base-serial"]
    theirs = next(r["value"] for r in _paper("table6_entropy_model_weights_MB") if r["model"] == "Entroformer")
    return Effect(abs(100 * (ours / theirs - 1)), 0.0, f"difference of {ours:.1f} MiB, counted", ("model_sizes",))


def _paper(name: str) -> list[dict]:
    return reference("paper_tables")[name]["rows"]


# ---- the claims ----


def claims() -> list[Claim]:
    """In the paper's order."""
    t1 = {row["position"]: row["bpp"] for row in _paper("table1_position_encoding")}
    t3 = {row["context"]: row["bpp"] for row in _paper("table3_second_slice_bpp")}
    t4 = {row["size"]: row["saving_percent"] for row in _paper("table4_image_size")}
    ms = {row["model"]: row["ms"] for row in _paper("table2_latency_ms")}
    none, absolute, lines, plane, whole_rpe = list(t1)[1:]
    one, both = "hyperprior + unidirectional", "hyperprior + bidirectional"

    def saved(better: float, base: float) -> float:
        return 100 * (1 - better / base)

    shared = "Both use the same transforms, which learned with another entropy model; the paper trains them with each."
    crops = "On parts as large as the crops of training it is the other way round."
    others = (
        "Other transforms, which saw an eighth of the paper's pixels; a narrower entropy model, which saw a seventieth."
    )
    fails = "It is so large because absolute positions fail in pictures larger than the crops."
    return [
        Claim("figure 3", "The closer a position of the context, the more bits its absence costs.",
              falls_with_distance, unit="rank correlation",
              doubt="The paper shows a map and no number. Nearness explains a small part of what a position costs."),
        Claim("figure 3", "What it costs falls with L1 distance: the map has the shape of a diamond.",
              diamond, unit="rank correlation",
              doubt="By the missing position, in the model without positions, against the better of L2 and L-infinity "
              "distance. By one position alone L1 beats L-infinity but not L2 (notebook 02)."),
        Claim("figure 5", "At low rates Entroformer saves bits over the best CNN entropy model.",
              partial(same_pictures, "serial", "minnen"), 5.2,
              doubt="Ours is against CNNs as in Minnen et al. (2018); the paper does not name its model. In the figure "
              "the authors' curve is against that published by Minnen et al., which is another comparison."),
        Claim("figure 5", "There, a transformer hyperprior alone saves bits over a CNN hyperprior alone.",
              partial(same_pictures, "hyperprior", "hyperprior-cnn"), 12.4, doubt=shared),
        Claim("figure 5", "There, a transformer context alone saves bits over a CNN context alone.",
              partial(same_pictures, "context-serial", "context-cnn"), 11.3, doubt=shared),
        Claim("figure 5", "Two passes instead of one by one cost about 1%.", cost_of_two_passes, 1.0, limit=1.5,
              doubt="It is most at the lowest rates, and falls to 2% at the highest (notebook 04)."),
        Claim("figure 5", "At low rates Entroformer saves bits over BPG.",
              partial(against, SERIAL, "BPG 4:4:4", low=True), 20.5,
              doubt=others + " The lower half of our rates, drawn in figure 11."),
        Claim("figure 6", "A clipping distance of 3 is better than 1.", partial(whole, "diamond", "h-1", "figure6")),
        Claim("figure 6", "It is better than 5: with more, the saving falls again.",
              partial(whole, "diamond", "h-5", "figure6")),
        Claim("figure 6", "It is better than no limit.", partial(whole, "diamond", "h-all", "figure6"),
              doubt="Of whole pictures. On squares as large as the crops no limit is as good (notebook 05)."),
        Claim("figure 7", "The rate falls with k up to 64: 64 is better than 8.",
              partial(whole, "k-64", "k-8", "figure7")),
        Claim("figure 7", "At 64 there is no difference from dense attention.",
              partial(no_difference, "k-64", "k-dense", "figure7"), 0.0, limit=0.5),
        Claim("figure 7", "With top-k a model learns sooner than with dense attention.",
              partial(sooner, "k-32", "k-dense"), doubt="The mean over the first half of the steps, k = 32."),
        Claim("figure 11", "Entroformer saves bits over BPG 4:4:4 (its number: from its curve).",
              partial(against, SERIAL, "BPG 4:4:4"), authors_against("BPG 4:4:4"), doubt=others),
        Claim("figure 12", "Trained for MS-SSIM it saves bits over BPG 4:4:4 (its number: from its curve).",
              partial(against, MS_SSIM, "BPG 4:4:4", quality="ms_ssim_db"),
              authors_against("BPG 4:4:4", "ms-ssim", "ms_ssim_db"),
              doubt="A parallel model, finetuned for less than a minute from one for mean squared error."),
        Claim("table 1", "Without positions a transformer is better than a CNN.",
              partial(whole, "none", "cnn", "table1"),
              saved(t1[none], t1["-"])),
        Claim("table 1", "Absolute positions help.", partial(whole, "absolute", "none", "table1"),
              saved(t1[absolute], t1[none]), doubt=crops),
        Claim("table 1", "Relative positions, by row and by column, are better than absolute ones.",
              partial(whole, "relative_1d", "absolute", "table1"), saved(t1[lines], t1[absolute]),
              doubt=fails),
        Claim("table 1", "One encoding in the plane is better than two.",
              partial(whole, "relative_2d", "relative_1d", "table1"), saved(t1[plane], t1[lines])),
        Claim("table 1", "Clipping to a diamond is better than to a square.",
              partial(whole, "diamond", "relative_2d", "table1"), saved(t1[whole_rpe], t1[plane])),
        Claim("table 1", "With the diamond, a transformer saves bits over a CNN.",
              partial(whole, "diamond", "cnn", "table1"), saved(t1[whole_rpe], t1["-"])),
        Claim("table 2", "The parallel model decodes in less time than the serial one.", time_saved,
              number=f"{ms['Entroformer parallel']:g} instead of {ms['Entroformer serial']:,g} ms, on a V100",
              doubt="The serial decoder here keeps what it computed before, and the paper's does not. Times of two "
              "machines are not compared, only which model is the faster one."),
        Claim("table 3", "For the second slice, one-way context saves bits over none.",
              partial(second_slice, one, "hyperprior only"), saved(t3[one], t3["hyperprior only"]),
              doubt="One model for all contexts. One that was trained without any needs a little less."),
        Claim("table 3", "Two-way context saves bits over one-way context.", partial(second_slice, both, one),
              saved(t3[both], t3[one]), doubt="Between two models of one kind each it is twice as large."),
        *(Claim("table 4", f"Relative positions save bits over absolute ones in squares of {size} pixels.",
                partial(at_size, size), t4[size], doubt=fails * (size > 320)) for size in t4),
        Claim("table 6", "The entropy model has 142.7M of weights.", size_of_base, 0.0, limit=1.0, number="142.7M",
              doubt="The paper does not say what M is. MiB of float32 agree with its number, if the last linear layers "
              "have the hidden width of the released code, which is twice that of table 5."),
    ]  # fmt: skip
