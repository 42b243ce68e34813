"""What the paper claims, by one rule, with intervals that a naive test agrees with."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from entroformer_lib.studies import verdicts
from entroformer_lib.studies.results import NoResult, trainings
from entroformer_lib.studies.verdicts import Claim, Effect, between_seeds, over_pictures, sentence, verdict
from entroformer_lib.views import paper_tables


@pytest.mark.parametrize(
    ("value", "half_width", "published", "limit", "word"),
    [
        (5, 1, 4, None, "reproduced"),
        (5, 1, 5.5, None, "reproduced"),
        (5, 1, 7, None, "smaller"),
        (5, 1, None, None, "reproduced"),
        (1, 2, 5, None, "cannot tell"),
        (-1, 2, 5, None, "cannot tell"),
        (-3, 2, 5, None, "reversed"),
        (2, 2, None, None, "cannot tell"),
        (1, 0.4, 1, 1.5, "reproduced"),
        (1, 0.6, 1, 1.5, "cannot tell"),
        (3, 0.4, 1, 1.5, "larger"),
        (3, np.inf, 1, None, "cannot tell"),
        (3, np.inf, 1, 1.5, "cannot tell"),
        (3, np.nan, 1, None, "cannot tell"),
        (3, np.nan, 1, 1.5, "cannot tell"),
    ],
)
def test_the_rule(value, half_width, published, limit, word):
    claim = Claim("table 1", "", lambda: None, published, limit)
    assert verdict(claim, Effect(value, half_width, "", ())) == word


def test_an_interval_over_seeds_is_that_of_the_paired_test():
    """Of two kinds of runs with the same seeds."""
    chance = np.random.default_rng(0)
    seeds = chance.normal(0, 0.1, 5)
    a, b = (level + seeds + chance.normal(0, 0.01, 5) for level in (-1.0, -0.9))
    rows = pd.DataFrame(
        [dict(kind=kind, seed=s, bpp=np.exp(y[s])) for kind, y in (("a", a), ("b", b)) for s in range(5)]
    )
    effect = between_seeds(rows, "a", "b", "table1")
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    ratio = np.exp((a - b).mean())
    assert effect.value == pytest.approx(100 * (1 - ratio))
    assert effect.half_width == pytest.approx(100 * ratio * (high - low) / 2)


def test_other_kinds_of_runs_narrow_the_interval_and_one_seed_gives_none():
    rows = pd.DataFrame([dict(kind=kind, seed=0, bpp=bpp) for kind, bpp in (("a", 0.5), ("b", 0.6))])
    effect = between_seeds(rows, "a", "b", "table1")
    assert effect.half_width == np.inf and "too few" in sentence(Claim("table 1", "", lambda: None), effect)
    chance = np.random.default_rng(1)
    others = [dict(kind=f"c{k}", seed=s, bpp=np.exp(chance.normal(0, 0.01))) for k in range(6) for s in (0, 1)]
    assert 1 < between_seeds(pd.concat([rows, pd.DataFrame(others)]), "a", "b", "table1").half_width < 10
    with pytest.raises(NoResult, match="nothing"):
        between_seeds(rows, "a", "nothing", "table1")


def test_spread_of_absolute_positions_is_not_that_of_others():
    chance, rows = np.random.default_rng(3), []
    for kind, spread in (("a", 0.001), ("b", 0.001), ("absolute", 0.1)):
        rows += [dict(kind=kind, seed=seed, bpp=np.exp(chance.normal(0, spread))) for seed in range(3)]
    rows = pd.DataFrame(rows)
    assert between_seeds(rows, "a", "b", "table1").half_width < 1
    effect = between_seeds(rows, "absolute", "b", "table1")
    low, high = stats.ttest_rel(
        *(np.log(rows[rows["kind"] == k]["bpp"]) for k in ("absolute", "b"))
    ).confidence_interval()
    assert effect.half_width == pytest.approx((100 - effect.value) * (high - low) / 2)  # the paired test: no other kind


def test_what_is_said_holds_the_whole_interval():
    """However a value and its interval are rounded."""
    claim = Claim("table 1", "", lambda: None)
    for value, half_width in ((0.449, 0.5), (-0.351, 0.4), (0.05, 0.1), (0.0, 0.2)):
        words = sentence(claim, Effect(value, half_width, "here", ()))
        said, half = float(words.split(" ± ")[0]), float(words.split(" ± ")[1].split("%")[0])
        assert said - half <= value - half_width + 1e-9 and value + half_width <= said + half + 1e-9
        assert float(words.rpartition("ends at ")[2].rstrip("%")) == pytest.approx(said + half)


def test_an_interval_over_pictures_is_students_where_all_count_the_same():
    rates = pd.DataFrame({0.01: [0.9, 0.95, 0.97, 0.92, 0.99]})
    effect, known = over_pictures(rates, 0 * rates + 1, "x"), stats.ttest_1samp(rates[0.01], 0).confidence_interval()
    assert (effect.low, effect.high) == pytest.approx((100 - 100 * known.high, 100 - 100 * known.low))


def test_a_saving_over_pictures_is_that_of_the_mean_rates():
    base = pd.DataFrame({0.01: [1.0, 3.0], 0.02: [2.0, 2.0]})
    effect = over_pictures(base * [0.9, 0.7], base, "x")
    assert effect.value == pytest.approx(20)  # the mean of 10 and 30
    assert effect.half_width == pytest.approx(0)  # both pictures save alike
    uneven = base.copy()
    uneven.iloc[1, 0] = 1.0  # of 4 bits 2 are left at the first lambda, at the second all
    assert over_pictures(uneven, base, "x").value == pytest.approx(25)


def test_what_another_seed_changes_is_added_to_what_another_picture_does(results_folder):
    """Two kinds with two seeds: their spread is pooled. With one seed each there is nothing to add."""
    scores = [("serial", 0, -0.93), ("serial", 1, -0.92), ("parallel", 0, -0.90), ("parallel", 1, -0.88)]
    rows = [dict(kind=kind, seed=seed, steps=8000, lr=0.002, score=score) for kind, seed, score in scores]
    rows += [dict(kind="cnn", seed=0, steps=8000, lr=0.002, score=-0.8)]
    rows += [dict(kind="cnn", seed=1, steps=1000, lr=0.002, score=-0.1)]  # a trial of a learning rate
    rows += [dict(kind="serial", seed=0, steps=8000, lr=0.004, score=-0.7)]  # not the best
    (results_folder / "family.json").write_text(json.dumps(dict(rows=rows)))
    pooled = np.sqrt((0.01**2 / 2 + 0.02**2 / 2) / 2)
    assert verdicts.between_trainings() == pytest.approx(100 * stats.t.ppf(0.975, 2) * pooled * np.sqrt(2))
    (results_folder / "family.json").write_text(json.dumps(dict(rows=rows[::2])))
    with pytest.raises(NoResult, match="two seeds"):
        verdicts.between_trainings()


def test_figure_5_is_read_over_the_rates_of_the_authors_curve(monkeypatch):
    """Below them the better model saves half, and that is left out."""
    rates = {0.001: 0.01, 0.002: 0.1, 0.004: 0.2, 0.008: 0.4, 0.016: 5.0}
    rows = [
        dict(variant=variant, model=variant, image=f"{i}", lmbda=lmbda, bpp=bpp * share)
        for i in range(3)
        for lmbda, bpp in rates.items()
        for variant, share in (("a", {0.01: 0.5, 5.0: 0.5}.get(bpp, 0.8 if bpp < 0.3 else 0.9)), ("b", 1))
    ]
    monkeypatch.setattr(verdicts.same_transforms, "saved_rates", lambda: pd.DataFrame(rows))
    assert verdicts.same_pictures("a", "b").value == pytest.approx(20)
    assert verdicts.same_pictures("a", "b", low=False).value == pytest.approx(100 * (0.2 + 0.2 + 0.1) / 3)


def test_trainings_on_other_terms_are_not_mixed_in(results_folder):
    def save(grid, steps, runs):
        rows = [dict(grid=grid, run=f"{kind}-seed0", seed=0, bpp=bpp, bpp_middle=1.0) for kind, bpp in runs]
        rows.append(dict(grid=f"{grid}_other", run="x-seed0", seed=0, bpp=9.0))
        (results_folder / f"ablation-{grid}.json").write_text(json.dumps(dict(settings=dict(steps=steps), rows=rows)))

    save("table1", 400, [("cnn", 0.7), ("diamond", 0.6)])
    save("figure6", 400, [("diamond", 0.6), ("h-1", 0.65)])
    save("figure7", 800, [("k-8", 0.5)])
    assert sorted(trainings("table1")["kind"]) == ["cnn", "diamond", "h-1"]
    with pytest.raises(NoResult):
        trainings("table3")


def test_a_difference_is_told_where_it_is_larger_than_what_seeds_change(results_folder):
    chance, rows = np.random.default_rng(2), []
    for kind, level in (("base", 0.5), ("same", 0.5), ("far", 0.6), ("near", 0.4)):
        for seed in range(3):
            bpp = level * np.exp(chance.normal(0, 0.01))
            rows.append(dict(grid="figure6", run=f"{kind}-seed{seed}", seed=seed, bpp=bpp, bpp_middle=1.0))
    saved = json.dumps(dict(settings={}, rows=rows))
    (results_folder / "ablation-figure6.json").write_text(saved)
    found = verdicts.differences("figure6", "base").set_index("kind")
    assert list(found["told"]) == ["–", "cannot tell", "costs", "saves"] and (found["seeds"] == 3).all()
    assert found["saved"].loc[["far", "near"]].tolist() == pytest.approx([-20, 20], abs=3)
    more = dict(grid="figure6_curve", run="curve-seed0", seed=0, bpp=1.0)  # without a rate of whole pictures
    (results_folder / "ablation-figure6.json").write_text(json.dumps(dict(settings={}, rows=[*rows, more])))
    assert verdicts.differences("figure6", "base").set_index("kind")["saved"].isna().to_dict()["curve"]
    (results_folder / "ablation-figure6.json").write_text(saved)
    for grid, base in (("figure6", "nothing"), ("groups", "base")):
        with pytest.raises(NoResult, match="nothing|groups"):
            verdicts.differences(grid, base)
    shown = paper_tables.differences("figure6", "base", {"far": "farther"}).to_html()
    assert "farther" in shown and "costs" in shown and "saves" not in shown
    (results_folder / "ablation-figure6.json").write_text(json.dumps(dict(settings={}, rows=rows[::3])))  # one seed
    assert list(verdicts.differences("figure6", "base")["told"]) == ["–", *3 * ["cannot tell"]]


def test_claims_are_shown_whole():
    shown = paper_tables.claims("table 1").to_html()
    assert "Relative positions, by row and by column, are better than absolute ones." in shown
    assert "table 4" not in shown and "squares of 300 pixels" not in shown


def test_claims_without_results_have_no_row(results_folder):
    for path in results_folder.iterdir():
        path.unlink()
    assert verdicts.table().empty
