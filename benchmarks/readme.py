"""Fills the marked blocks of README.md and of some pages in docs/ from saved results.

    python benchmarks/readme.py

A block begins with `<!-- NAME, by benchmarks/readme.py -->` and ends with `<!-- end -->`; a function of that name says
what stands in it. Links begin at docs/, but for the README's own block. A test checks that nothing would change.
"""

import math
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from entroformer_lib.files import write_bytes
from entroformer_lib.studies import bd, same_transforms, verdicts
from entroformer_lib.studies.results import LABELS, in_order, kodak, kodak_means, load, needed, published
from entroformer_lib.views.paper_tables import markdown
from entroformer_lib.views.window_figures import window_data

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("comparing", "reliability", "results", "scaling", "training")),
)


def filled(text: str) -> str:
    """The text with every block written anew."""

    def block(match: re.Match) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- (\w+), by benchmarks/readme.py -->)\n.*?<!-- end -->", block, text, flags=re.S)


def in_short() -> str:
    """The README's one paragraph of numbers."""
    jpeg, bpg = (_bd(verdicts.SHIPPED, anchor, "psnr_db").rate_percent for anchor in ("JPEG", "BPG 4:4:4"))
    searched = _bd(f"{verdicts.SHIPPED}-effort8", "BPG 4:4:4", "psnr_db").rate_percent
    claim = next(c for c in verdicts.claims() if "over the best CNN" in c.says)
    saved = claim.measured().value
    return _paragraph(
        f"On Kodak the shipped model needs {_fewer(jpeg)} than JPEG with standard tables and {_fewer(bpg)} than BPG at "
        f"equal PSNR (BD-rate), and {_fewer(searched)} than BPG where the encoder searches (`--effort 8`). It was "
        "trained for days on two CPU cores and a quarter of an hour on a GPU. "
        f"Behind the same transforms and at low rates a serial Entroformer needs {_fewer(-saved, 1)} than CNNs as in "
        f"Minnen et al. (2018); the paper says {claim.published:g}%, against the best CNN, which it does not name "
        "([results](docs/results.md))."
    )


def shipped() -> str:
    """The shipped model on Kodak, a row for each lambda, and JPEG of at least as many bytes."""
    rows = kodak().query(f"codec == '{verdicts.SHIPPED}'").groupby("setting")
    means = rows[["bpp", "psnr_db", "jpeg_psnr_db", "jpeg_optimised_psnr_db"]].mean().reset_index()
    headings = [
        "lambda",
        "bits per pixel",
        "PSNR, dB",
        "JPEG of at least as many bytes, standard tables",
        "optimised tables",
    ]
    forms = ("{:g}", "{:.3f}", "{:.2f}", "{:.2f}", "{:.2f}")
    return _table(means.set_axis(headings, axis=1), forms)


def shipped_bd() -> str:
    """BD-rates of the shipped model."""
    jpeg, bpg, vtm = (_bd(verdicts.SHIPPED, a, "psnr_db") for a in ("JPEG", "BPG 4:4:4", "VTM 9.1 (VVC)"))
    return _paragraph(
        f"That is {jpeg.rate_percent:+.1f}% against JPEG, {bpg.rate_percent:+.1f}% against BPG 4:4:4 and "
        f"{vtm.rate_percent:+.1f}% against VTM 9.1 in BD-rate ({bd.METHOD}, over {jpeg.low:.1f} to {jpeg.high:.1f}, "
        f"{bpg.low:.1f} to {bpg.high:.1f} and {vtm.low:.1f} to {vtm.high:.1f} dB, published anchors). "
        f"([card](../data/weights/{verdicts.SHIPPED}.md), "
        f"[numbers per picture](../data/results/{verdicts.SHIPPED}-kodak.json), "
        "[how it was trained](weights.md))"
    )


def shipped_models() -> str:
    """BD-rates of all models for PSNR with these transforms, the best first."""
    anchors = {"JPEG": "JPEG", "BPG 4:4:4": "BPG 4:4:4", "VTM 9.1 (VVC)": "VTM 9.1"}
    names = [name for name in kodak_means()["codec"].unique() if re.fullmatch(r"blocks-(?!.*msssim|.*effort).*", name)]
    rates = [[_bd(name, anchor, "psnr_db").rate_percent for anchor in anchors] for name in names]
    table = pd.DataFrame(rates, columns=list(anchors.values())).sort_values("BPG 4:4:4")
    links = [f"[{names[i]}](../data/weights/{names[i]}.md)" for i in table.index]
    table.insert(0, "BD-rate against", links)
    return _table(table, ("{}", *["{:+.1f}%"] * len(anchors)))


def with_effort() -> str:
    """BD-rates of files whose latents were searched for, beside those of rounding, at the same lambdas."""
    anchors, points, rows = ("JPEG", "BPG 4:4:4", "VTM 9.1 (VVC)"), kodak_means(), []
    for searched in (name for name in points["codec"].unique() if re.search(r"-effort\d+$", name)):
        name, rounds = searched.rsplit("-effort", 1)
        both = points[points["setting"].isin(points["setting"][points["codec"] == searched])]
        plain, better = (bd.curve_of(both, codec) for codec in (name, searched))
        theirs = [bd.curve_of(published(), anchor) for anchor in anchors]
        for effort, curve, others in (("0", plain, theirs), (rounds, better, [*theirs, plain])):
            rates = [bd.compare(curve, other).rate_percent for other in others]
            rows.append([f"`{name}`", effort, f"{len(curve.bpp)}", *rates, *[None] * (4 - len(rates))])
    heads = ["model", "effort", "rates", *(f"against {name}" for name in anchors), "against effort 0"]
    return _table(pd.DataFrame(rows, columns=heads), ("{}", "{}", "{}", *["{:+.1f}%"] * 4))


def other_pictures() -> str:
    """The shipped model on other photographs than Kodak's, and on graphics."""
    saved = needed("other_pictures")
    rates = pd.DataFrame(saved["rates"])
    table = rates.pivot(index=["pictures", "count"], columns="anchor", values="rate_percent")
    table = table.loc[
        list(dict.fromkeys(zip(rates["pictures"], rates["count"], strict=True))), ["jpeg", "webp", "avif"]
    ]
    heads = ["photographs", "how many", "against JPEG", "against WebP", "against AVIF"]
    best = pd.DataFrame(saved["graphics"]).groupby("image").last()
    names = ("a chart drawn by matplotlib", "a page of coloured text")
    words = [
        f"{name} {row['psnr_db']:.1f} dB in {row['bytes']:,} bytes (JPEG of as many, colours not subsampled, "
        f"{row['jpeg_psnr_db']:.1f} dB; a lossless WebP has {row['webp_lossless_bytes']:,} bytes)"
        for name, row in zip(names, best.to_dict("records"), strict=True)
    ]
    return (
        _table(table.reset_index().set_axis(heads, axis=1), ("{}", "{}", *["{:+.1f}%"] * 3))
        + "\n\n"
        + _paragraph(f"Graphics at the highest rate: {', '.join(words)}. They belong in a lossless format.")
    )


def shipped_msssim() -> str:
    """BD-rates by MS-SSIM of the model that was trained for it."""
    jpeg, bpg, vtm = (
        _bd(f"{verdicts.SHIPPED}-msssim", a, "ms_ssim_db") for a in ("JPEG", "BPG 4:4:4", "VTM 9.1 (VVC)")
    )
    return _paragraph(
        f"`{verdicts.SHIPPED}-msssim` was finetuned for MS-SSIM from an earlier state of it, for less than a minute on "
        f"a GPU. Its BD-rate by MS-SSIM is {jpeg.rate_percent:.1f}% against JPEG, {bpg.rate_percent:.1f}% against "
        f"BPG 4:4:4 and {vtm.rate_percent:.1f}% against VTM 9.1 ({bd.METHOD}, over {vtm.low:.1f} to {vtm.high:.1f} dB, "
        "published anchors). These codecs do not aim at MS-SSIM. Most of the published models that were "
        "trained for it save more. ([card](../data/weights/blocks-parallel-msssim.md), "
        "[figure](../figures/figure12_ms_ssim_kodak.png))"
    )


def k_of_each_picture() -> str:
    """What a choice of k for each picture does to the bits of y, against the best k for all."""
    rows = pd.DataFrame(needed("picture_k")["choice"])[["model", "lmbda", "fixed", "percent", "others"]]
    heads = ["model", "lambda", "best k for all", "bits of y", "pictures that take another k"]
    return _table(rows.set_axis(heads, axis=1), ("`{}`", "{:g}", "{}", "{:+.3f}%", "{}"))


def shipped_times() -> str:
    """Seconds of the shipped models for one Kodak picture, over the lambdas that were measured."""
    saved = needed("shipped_times")
    rows = pd.DataFrame(saved["rows"])
    lines = []
    for (model, effort), part in rows.groupby(["model", "effort"], sort=False):
        ranges = [f"{part[f'{way}_s'].min():.2f} to {part[f'{way}_s'].max():.2f}" for way in ("encode", "decode")]
        lines.append((f"`{model}`" + (f", effort {effort}" if effort else ""), *ranges))
    width, height = saved["size"]
    what = (
        f"Seconds for one Kodak picture ({saved['picture'].split('.')[0]}, {width}x{height}) in "
        f"{saved['provenance']['threads']} threads, at the lowest, a middle and the highest lambda:"
    )
    return "\n\n".join((_paragraph(what), markdown(pd.DataFrame(lines, columns=["model", "encode", "decode"]))))


def speed() -> str:
    """Times at the paper's size, as ratios."""
    rows = pd.DataFrame(needed("latency")["rows"])
    seconds = rows.groupby(["direction", "model"])["seconds"].median()
    decode, growth = seconds["decode"], needed("latency_growth")
    parallel, serial = decode["base-parallel"], decode["base-serial"]
    memory = max(row["peak_mb"] for row in growth["large"])
    sides = pd.DataFrame(growth["rows"]).query("direction == 'decode'").set_index("width")["seconds"]
    (small, before), (large, after) = list(sides.items())[-2:]
    return _paragraph(
        "Decoding 768x512 pixels at the paper's size (`base`, random weights, two CPU cores, one run of `make bench`): "
        f"the parallel model takes {parallel / decode['bmshj2018-hyperprior']:.1f} times as long as CompressAI's "
        f"bmshj2018-hyperprior, or {parallel / decode['bmshj2018-hyperprior + memory']:.1f} times when both keep freed "
        f"memory; the serial model takes {serial / decode['mbt2018']:.2f} times as long as mbt2018, whose context is a "
        f"convolution, or {serial / decode['mbt2018 + memory']:.2f} times when both keep it (both at quality 8; "
        "[all numbers](../figures/table2_latency.md)), and encodes in "
        f"{seconds['encode', 'base-serial'] / serial:.0%} of the time that it decodes in. 3840x2160 pixels go through "
        f"the parallel model in {memory / 1000:.1f} GB. From 256x256 to 4096x4096 the time of `study-parallel` grows "
        f"with the pixels to the power of {growth['exponents']['seconds']:.1f}, and between the largest two to the "
        f"power of {math.log(after / before) / math.log(large / small) / 2:.1f}."
    )


def cost_sizes() -> str:
    """What the model of cost says of three sizes on one core, and what was measured."""
    rows = pd.DataFrame(needed("cost")["predictions"])
    rows["error"] *= 100
    rows[["kept_bytes", "peak_growth_bytes"]] /= 1e6
    columns = {
        "model": ("model", "{}"),
        "predicted_s": ("predicted, s", "{:.2f}"),
        "measured_s": ("measured, s", "{:.2f}"),
        "error": ("error", "{:+.0f}%"),
        "kept_bytes": ("kept for the way back, counted, MB", "{:.0f}"),
        "peak_growth_bytes": ("growth of the peak of memory, measured, MB", "{:.0f}"),
    }
    names = {name: words for name, (words, _) in columns.items()}
    return _table(rows[list(columns)].rename(columns=names), tuple(form for _, form in columns.values()))


def _on_gpus(rows: list[dict]) -> str:
    columns = {
        "gpus": ("H100", "{:d}"),
        "batch": ("crops a step", "{:d}"),
        "step_ms": ("ms a step", "{:.0f}"),
        "multiplying_ms": ("multiplying", "{:.0f}"),
        "moving_ms": ("moving bytes", "{:.0f}"),
        "starting_ms": ("starting operations", "{:.0f}"),
        "exchanging_ms": ("exchanging gradients", "{:.1f}"),
        "hours": ("hours", "{:.1f}"),
        "gpu_hours": ("GPU hours", "{:.0f}"),
    }
    table = pd.DataFrame(rows)[list(columns)]
    return _table(
        table.set_axis([name for name, _ in columns.values()], axis=1), [form for _, form in columns.values()]
    )


def cost_paper() -> str:
    """The paper's training on GPUs, simulated."""
    return _on_gpus(needed("cost")["paper_on_gpus"])


def cost_fast() -> str:
    """That of the fast transforms."""
    return _on_gpus(needed("cost")["fast_on_gpus"])


def cost_bottleneck() -> str:
    """Where the bottleneck of the paper's training moves."""
    saved, coding = needed("cost"), pd.DataFrame(needed("latency")["rows"]).query("model == 'base-serial'")
    one, _, many = saved["paper_on_gpus"]
    here, per_core = saved["decoded_per_s_and_core"].values()
    crop = (one["multiplying_ms"] + one["moving_ms"]) / one["batch"]  # ms
    picture = crop / 3 * 768 * 512 / saved["paper"]["crop"] ** 2  # forward alone
    operations = one["starting_ms"] / 1e3 / saved["settings"]["h100"]["seconds_per_kernel"]
    encode, decode = 1e3 * coding.groupby("direction")["entropy_coding_s"].median()[["encode", "decode"]]
    need, exchange, starting = one["pictures_per_s_and_gpu"], many["exchanging_ms"], one["starting_ms"]
    paragraphs = (
        f"**Input.** One core decodes a JPEG of 1024x768 and crops it to 384 pixels {per_core:.0f} times a second "
        f"(measured in CPU time; {here:.0f} times for the 1,172 photographs here and 128 pixels). One H100 takes in "
        f"{need:.0f} crops a second (simulated). So 16 cores give {one['input_over_need']:.1f} times what it needs, "
        f"and input is the bottleneck where a GPU has fewer than {need / per_core:.1f} cores.",
        f"**Starting operations.** A step has about {operations:,.0f} of them, whatever its batch. With fewer than "
        f"{starting / crop:.1f} crops on a GPU it waits for the CPU that starts them. The paper's batch of 16 on 8 "
        "GPUs is below that.",
        f"**All-reduce.** Inside a machine it is small. Between machines, exchanging gradients takes {exchange:.0f} "
        f"ms. Starting the operations takes longer ({starting:.0f} ms). If CUDA graphs removed that, the exchange "
        f"would take longest below {exchange / crop:.1f} crops per GPU.",
        f"**Entropy coding** is no part of training. In evaluation one core codes the symbols of 768x512 pixels in "
        f"{encode:.0f} ms and decodes them in {decode:.0f} ms (measured, `base-serial`); the network's forward pass "
        f"would take {picture:.0f} ms on an H100 (simulated, without the coder's exact arithmetic). So with fewer than "
        f"{encode / picture:.0f} cores a GPU, coding is the bottleneck of encoding. The serial model decodes site by "
        "site, so the number of steps limits its decoding.",
    )
    return "\n\n".join(map(_paragraph, paragraphs))


def both_systems() -> str:
    """Entroformer, GroupedMixer and CNNs behind the same transforms: bits, seconds and weights."""
    table = same_transforms.side_by_side()
    spread = [f"{row.least:+.1f}% to {row.most:+.1f}%" for row in table.itertuples()]
    columns = {
        "entropy model": table["variant"].map(LABELS),
        "rate against parallel, equal PSNR": table["percent"].map("{:+.1f}%".format),
        "lowest to highest over the lambdas": spread,
        "seconds to decode": table["decode_s"],
        "of these in the context model": table["context_s"],
        "parameters, million": table["parameters"].astype(float) / 1e6,
        "source": "[" + table["model"] + "](../" + table["source"] + ")",
    }
    return _table(pd.DataFrame(columns), ("{}", "{}", "{}", "{:.2f}", "{:.2f}", "{:.2f}", "{}"))


def family() -> str:
    """What each kind of the family reached on the held-out photographs, with its learning rate and other seeds."""
    runs = pd.DataFrame(needed("family")["rows"]).query("width == 96")
    whole = runs[runs["steps"] == runs["steps"].max()]
    bases = whole[whole["kind"] == "serial"].set_index("seed")["score"]
    whole = in_order(whole.assign(variant=whole["kind"].replace("context", "context-serial")))
    whole["percent"] = 100 * np.expm1(whole["score"] - whole["seed"].map(bases))
    first = whole[whole["seed"] == 0]
    others = whole[whole["seed"] != 0].set_index("kind")["percent"].map("{:+.2f}%".format)
    columns = {
        "entropy model": first["variant"].map(LABELS),
        "learning rate": first["lr"],
        "parameters, million": first["parameters"] / 1e6,
        "held-out rate against the serial model": first["percent"],
        "with another seed of both": first["kind"].map(others.drop("serial", errors="ignore")),
    }
    return _table(pd.DataFrame(columns), ("{}", "{:g}", "{:.2f}", "{:+.2f}%", "{}"))


def family_seeds() -> str:
    """How far two seeds of the same kind are apart."""
    runs = pd.DataFrame(needed("family")["rows"]).query("width == 96")
    whole = runs[runs["steps"] == runs["steps"].max()]
    apart = {kind: 100 * np.expm1(np.ptp(part["score"])) for kind, part in whole.groupby("kind") if len(part) > 1}
    return _paragraph(
        "Two seeds of one kind end "
        + " and ".join(f"{percent:.2f}% ({LABELS[kind]})" for kind, percent in apart.items())
        + " apart."
    )


def family_widths() -> str:
    """The parallel model at several widths, trained for the same time."""
    runs = pd.DataFrame(needed("family")["rows"]).query("kind == 'parallel' and lr == 0.002")
    wide = runs[(runs["width"] != 96) | (runs["steps"] == 2000)].sort_values("width")
    base = wide.loc[wide["width"] == 96, "score"].iloc[0]
    columns = {
        "width": wide["width"],
        "steps": wide["steps"],
        "parameters, million": wide["parameters"] / 1e6,
        "held-out rate against width 96": 100 * np.expm1(wide["score"] - base),
    }
    return _table(pd.DataFrame(columns), ("{}", "{:,}", "{:.2f}", "{:+.1f}%"))


def claims() -> str:
    """Each claim of the paper, its number, ours, the verdict, and the results that it follows from."""
    found = verdicts.table()
    found["sources"] = [", ".join(f"[{s}](../data/results/{s}.json)" for s in names) for names in found["sources"]]
    names = {"item": "", "says": "the paper says", "published": "its number", "ours": "here", "verdict": "verdict"}
    return markdown(found[[*names, "sources"]].rename(columns={**names, "sources": "result"}))


def reliability() -> str:
    """What was tried, in two lines; of what has no result yet nothing is said."""
    parts = []
    if matrix := load("matrix"):
        rows = pd.DataFrame(matrix["rows"])
        wrong = _none(rows["wrong"].sum())
        parts.append(f"{wrong} of {rows['pairs'].sum():,} pairs of a picture and a configuration gave wrong latents.")
    if fuzz := load("fuzz"):
        parts.append(f"{_none(_outcomes(fuzz)['wrong'])} of {fuzz['count']:,} damaged files gave a wrong picture.")
    if kills := load("kills"):
        rows = pd.DataFrame(kills["rows"])
        parts.append(f"{_none(rows['half_written'].sum())} of {rows['kills'].sum():,} kills left a half-written file.")
    return _paragraph(f"{' '.join(parts)} [What was tried, and what that does not show](docs/reliability.md).")


def workers() -> str:
    """Seconds of one worker and of two."""
    result = needed("cluster")
    seconds = pd.DataFrame(result["rows"]).pivot(index="work", columns="workers", values="seconds")
    seconds = seconds.loc[list(dict.fromkeys(row["work"] for row in result["rows"]))]
    table = seconds.assign(times=seconds[1] / seconds[2]).reset_index()
    heads = ["what", "one worker, seconds", "two workers, seconds", "one over two"]
    return _table(table.set_axis(heads, axis=1), ("{}", "{:.1f}", "{:.1f}", "{:.2f}"))


def tried() -> str:
    """What was tried, how often, what happened, and the command that repeats it."""
    rows = []
    if matrix := load("matrix"):
        table = pd.DataFrame(matrix["rows"])
        counts = table[["right", "refused", "wrong", "error"]].sum()
        happened = ", ".join(f"{n:,} {what}" for what, n in counts.items())
        what = f"coded under one of {table['configuration'].nunique()} configurations, decoded under another"
        rows.append((what, f"{table['pairs'].sum():,} pairs", happened, "python benchmarks/matrix.py"))
    rows.append(("the same, a small part", "in every test run", "all right", "pytest tests/test_matrix.py"))
    vectors = len(list((ROOT / "tests" / "vectors").glob("*.ef")))
    rows.append(("test vectors of the format", f"{vectors} files", "the stored latents", "pytest tests/test_format.py"))
    if fuzz := load("fuzz"):
        counts = _outcomes(fuzz)
        kept = ("same", "claims", "refused", "accepted", "wrong", "traceback", "slow")
        happened = ", ".join(f"{counts[what]:,} {what}" for what in kept)
        how_often = f"{fuzz['count']:,} files in {fuzz['seconds'] / 60:.0f} minutes"
        rows.append(("damaged and hostile files", how_often, happened, _command(fuzz)))
    rows.append(("the same, the first of them", "in every test run", "none found", "pytest tests/test_fuzz.py"))
    if kills := load("kills"):
        table = pd.DataFrame(kills["rows"])
        disks = pd.DataFrame([row for row in table["full_disks"] if row])
        happened = (
            f"{table['half_written'].sum()} half-written, {table['resumes'].sum() - table['failed_resumes'].sum()} of "
            f"{table['resumes'].sum()} restarts went on, processes left: {table['left_processes'].sum()}, "
            f"temporary files left: {table['left_parts'].sum()}"
        )
        how_often = f"{table['kills'].sum():,} kills of {len(table)} commands"
        rows.append(("work that is killed", how_often, happened, _command(kills)))
        if len(disks):
            happened = (
                f"{disks['refused'].sum()} refused, {disks['without_sentence'].sum()} of them without a sentence, "
                f"{disks['half_written'].sum()} half-written"
            )
            rows.append(("disks that fill up", f"{disks['fills'].sum():,}", happened, _command(kills)))
    if many := load("many_files"):
        last = many["rows"][-1]
        happened = f"the peak of memory grew by {many['growth']:.1%} after the first {many['rows'][0]['files']}"
        rows.append(("many files, one process", f"{last['files']:,} there and back", happened, _command(many)))
    limits = "pytest tests/test_format.py -k 'hostile or limited or claim'"
    rows.append(("limits before memory is taken", "in every test run", "less than 16 MB for a refused file", limits))
    table = pd.DataFrame(rows, columns=["what", "how often", "what happened", "repeated by"])
    table["repeated by"] = "`" + table["repeated by"] + "`"
    return markdown(table)


def matrix() -> str:
    """A row for each configuration of the matrix."""
    result = needed("matrix")
    rows = pd.DataFrame(result["rows"])
    pairs = rows.pivot(index="configuration", columns="direction", values="pairs").astype("Int64")
    sums = rows.groupby("configuration")[["right", "refused", "wrong", "error"]].sum()
    first = rows.drop_duplicates("configuration").set_index("configuration")
    on = "Python " + first["python"] + ", torch " + first["torch"] + " (" + first["torch_vectors"] + "), numpy "
    on += first["numpy"] + ", " + first["machine"]
    table = pairs.join(sums).join(on.rename("ran on")).loc[first.index].reset_index()
    heads = {"decoded": "pairs decoded there", "encoded": "pairs encoded there"}
    return markdown(table.rename(columns=heads).astype(object).where(table.notna().to_numpy(), "–").astype(str))


def _outcomes(fuzz: dict) -> Counter:
    """The outcomes of damaged files of all kinds together."""
    return sum((Counter(counts) for counts in fuzz["outcomes"].values()), Counter())


def _none(number: int) -> str:
    return f"{number:,}" if number else "None"


def _command(result: dict) -> str:
    return "python " + result["provenance"]["command"]


def window_bits() -> str:
    """What a search window costs in bits."""
    saved = needed("window_bits")
    rows = window_data().dropna(subset="picture").query("window < inf")
    change, sizes = rows.groupby("window")["change_percent"].agg(["mean", "min", "max"]), rows["megapixels"]
    each = [
        f"{row.mean:+.2f}% ({row.min:+.2f}% to {row.max:+.2f}%) with a window of {w:g}"
        for w, row in zip(change.index, change.itertuples(index=False), strict=True)
    ]
    return _paragraph(
        f"Size of the files against no window, on average over {rows['picture'].nunique()} photographs of "
        f"{sizes.min():.1f} to {sizes.max():.1f} megapixels, least and most (`{saved['model']}`): {', '.join(each)} "
        "([figure](../figures/search_window.png), [numbers](../data/results/window_bits.json))."
    )


def window_times() -> str:
    """What a search window saves in time, and where the time of the largest picture goes."""
    saved = needed("window_times")
    rows = pd.DataFrame(saved["rows"])
    rows["window"] = rows["window"].astype(float).fillna(np.inf)
    rows["size"], pixels = rows["width"].astype(str) + "x" + rows["height"].astype(str), rows["width"] * rows["height"]
    largest = rows[pixels == pixels.max()].set_index("window").sort_index()
    table = rows.pivot(index="window", columns="size", values="seconds")[rows["size"].unique()]
    table["encode the largest"] = largest["encode_s"]
    growth = np.log(table.iloc[:, -2] / table.iloc[:, 0]) / np.log(pixels.max() / pixels.min())
    table["grows with pixels to the power of"] = growth.map("{:.2f}".format, na_action="ignore")
    names = {w: f"{w:g}" if np.isfinite(w) else "none" for w in table.index}
    table.insert(0, "window", list(names.values()))
    shares = []
    for window, row in largest.iterrows():
        rest = row["hyper_s"] + row["context_s"] - row[["linear_s", "products_s", "ranking_s"]].sum()
        parts = {
            "transforms": row["transforms_s"], "linear layers": row["linear_s"],
            "products of queries and keys": row["products_s"], "ranking, softmax and weighted sum": row["ranking_s"],
            "the rest of the entropy model": rest, "entropy coding": row["entropy_coding_s"],
        }  # fmt: skip
        shares.append({"window": names[window], **{part: f"{s / row['seconds']:.0%}" for part, s in parts.items()}})
    what = (
        f"Seconds to decode with `{saved['model']}` (random weights, mosaics of Kodak's photographs) in "
        f"{saved['provenance']['threads']} threads, and to encode the largest:"
    )
    where = f"Where the time of decoding {largest['size'].iloc[0]} goes:"
    seconds = _table(table, ("{}", *["{:.1f}"] * (table.shape[1] - 2), "{}"))
    return "\n\n".join((_paragraph(what), seconds, where, markdown(pd.DataFrame(shares))))


def recipe_rows() -> str:
    """What ended below and above the base of the comparison at equal time, the best first."""
    rows = needed("recipe_equal_time")["rows"]
    bases = {row["minutes"]: row["points"] for row in rows if row["row"] in ("base", "short base")}
    lines = []
    for row in sorted(rows, key=lambda row: (-row["minutes"], row["percent"])):
        ends = [100 * (row["points"][i]["rd_loss"] / bases[row["minutes"]][i]["rd_loss"] - 1) for i in (0, -1)]
        name = re.sub("^short(,)? ", "", row["row"])
        lines.append([name, f"{row['minutes']:g}", row["steps"], row["percent"], *ends])
    heads = ["row", "minutes", "steps", "R + lambda D", "at the lowest lambda", "at the highest"]
    return _table(pd.DataFrame(lines, columns=heads), ("{}", "{}", "{:,}", *["{:+.1f}%"] * 3))


BLOCKS = {
    block.__name__: block
    for block in (
        *(
            in_short,
            shipped,
            shipped_bd,
            shipped_models,
            with_effort,
            other_pictures,
            shipped_msssim,
            k_of_each_picture,
            shipped_times,
            speed,
            both_systems,
            family,
            family_seeds,
            family_widths,
            claims,
        ),
        *(reliability, tried, matrix, workers, window_bits, window_times),
        *(cost_sizes, cost_paper, cost_fast, cost_bottleneck, recipe_rows),
    )
}


def _bd(model: str, anchor: str, quality: str) -> bd.Bjontegaard:
    return bd.compare(bd.curve_of(kodak_means(), model, quality), bd.curve_of(published(), anchor, quality))


def _fewer(percent: float, digits: int = 0) -> str:
    return f"{abs(percent):.{digits}f}% {'fewer' if percent < 0 else 'more'} bits"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(data: pd.DataFrame, forms: tuple[str, ...]) -> str:
    """A table with a format for each column; a dash for what is not known."""
    words = {name: data[name].map(form.format, na_action="ignore") for name, form in zip(data, forms, strict=True)}
    return markdown(pd.DataFrame(words).fillna("–"))


if __name__ == "__main__":
    for page in PAGES:
        write_bytes(page, filled(page.read_text()).encode())
