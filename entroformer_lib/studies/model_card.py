"""Makes a finished training run a shipped model: half-precision weights, measured on Kodak, with a card beside them.

python -m entroformer_lib.studies.model_card publish runs/tiny-rates tiny-rates --kodak pictures/kodak
python -m entroformer_lib.studies.model_card again tiny-rates --kodak pictures/kodak
"""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import tyro
from tyro.conf import Positional

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.studies.classical import jpeg_psnr_db
from entroformer_lib.studies.measuring import forget, measure, tasks_of
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.studies.results import provenance
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.weights.zoo import load_model, save_weights

CURVE_POINTS = 60


def publish(
    run: Positional[Path],
    name: Positional[str],
    kodak: Path,
    data: str = "",
    limits: str = "",
    before: str = "",
    lmbdas: tuple[float, ...] = (),
) -> None:
    """Writes data/weights/NAME.safetensors, NAME.md and data/results/NAME-kodak.json.

    Args:
        run: Folder of a finished training run.
        name: Name under which the model is shipped.
        kodak: Folder of the 24 Kodak pictures.
        data: What it was trained on, in words.
        limits: A sentence on what it is not good for.
        before: What had been trained before this run, where it began from other weights.
        lmbdas: Measure a model of variable rate at these alone; by default at all that it serves.
    """
    trained = load_model(run / "weights.safetensors", "cpu")
    card = {**trained.card, "trained_on": data, "limits": limits, "before": before}
    card["training"] = {**card["training"], "data": "DATA", "out": f"runs/{name}"}
    if card["training"].get("latents"):
        card["training"]["latents"] = "runs/latents"
    if (card["training"].get("init") or "").endswith(".safetensors"):
        card["training"]["init"] = f"runs/{name}-before/weights.safetensors"
    card["curve"] = training_curve(run / "log.jsonl")
    card["lmbdas"], card["measured_at"] = list(trained.config.lmbdas), list(lmbdas or trained.config.lmbdas)
    _measure_and_write(trained, card, name, kodak)


def again(name: Positional[str], kodak: Path) -> None:
    """Measures a shipped model again, after a change of the coder, and writes its files anew.

    Args:
        name: Name of the model.
        kodak: Folder of the 24 Kodak pictures.
    """
    model = load_model(name, "cpu")
    _measure_and_write(model, model.card, name, kodak)


def _measure_and_write(trained: Entroformer, card: dict, name: str, kodak: Path) -> None:
    weights = data_folder() / "weights" / f"{name}.safetensors"
    save_weights(trained, weights, card, half=True)
    model = load_model(weights)
    paths = {path.stem: path for path in pictures_to_test(kodak)}
    done = data_folder() / "results" / f"{name}-kodak.json.rows"
    tasks = tasks_of(str(weights), paths.values())
    if card.get("measured_at"):
        tasks = [task for task in tasks if task.setting in card["measured_at"]]
    rows = [_with_jpeg(row, paths) for row in measure(tasks, done, report=_tell)]
    points = {lmbda: _mean([row for row in rows if row["lmbda"] == lmbda]) for lmbda in {row["lmbda"] for row in rows}}
    record = provenance(model, seed=card["training"]["seed"])
    mean = points[None] if None in points else {f"{lmbda:g}": points[lmbda] for lmbda in sorted(points)}
    about = {"optimised_for": card["metric"], "variant": model.config.variant}
    about["transforms"] = card["training"].get("transforms")  # whose they are, where they were kept
    result = {"images": rows, "mean": mean, **about, "provenance": record}
    write_bytes(data_folder() / "results" / f"{name}-kodak.json", json.dumps(result, indent=1).encode())

    card["kodak"] = {**mean, "images": len(rows), "date": record["date"]}
    save_weights(trained, weights, card, half=True)
    write_bytes(weights.with_suffix(".md"), card_text(name, card, rows).encode())
    forget(done)


def _with_jpeg(row: dict, paths: dict[str, Path]) -> dict:
    """Adds what JPEG reaches with as many bytes, with standard and with optimised Huffman tables."""
    row = {"lmbda": row.pop("setting"), **{key: value for key, value in row.items() if key != "codec"}}
    row["jpeg_psnr_db"] = jpeg_psnr_db(paths[row["image"]], row["bytes"], optimize=False)
    row["jpeg_optimised_psnr_db"] = jpeg_psnr_db(paths[row["image"]], row["bytes"])
    return row


def _tell(row: dict) -> None:
    print(row["setting"] or "", row["image"], f"bpp {row['bpp']:.3f} PSNR {row['psnr_db']:.2f} dB", flush=True)


def _mean(rows: list[dict]) -> dict:
    columns = [key for key, value in rows[0].items() if isinstance(value, float) and key != "lmbda"]
    return {key: sum(row[key] for row in rows) / len(rows) for key in columns}


def training_curve(log: Path) -> list[dict]:
    """The log thinned to a few points, each the mean over its stretch of steps."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    size = max(1, len(rows) // CURVE_POINTS)
    curve = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        means = {
            k: round(sum(r[k] for r in part) / len(part), 4) for k in ("rd_loss", "bpp", "psnr_db") if k in part[0]
        }
        minutes = round(part[-1]["seconds"] / 60, 2)
        curve.append({"step": part[-1]["step"], "minutes": minutes, "lmbda": part[-1]["lmbda"], **means})
    return curve


def training_command(training: dict) -> str:
    """The command line of a run; fields at their defaults are left out."""
    words = ["entroformer", "train"]
    for field in dataclasses.fields(TrainConfig):
        value = training.get(field.name, field.default)
        if value not in (field.default, list(field.default) if isinstance(field.default, tuple) else None):
            name = field.name.replace("_", "-")
            if isinstance(value, bool):
                words += [f"--{name}" if value else f"--no-{name}"]
                continue
            words += [f"--{name}"]
            words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return shlex.join(words)


def card_text(name: str, card: dict, rows: list[dict]) -> str:
    """The card as Markdown."""
    training, kodak = card["training"], card["kodak"]
    frozen = training.get("transforms") is not None
    points = {row["lmbda"]: _mean([r for r in rows if r["lmbda"] == row["lmbda"]]) for row in rows}
    lines = [
        f"# {name}",
        "",
        "Kodak, mean of 24 pictures, whole files on disk; mean of per-picture PSNR. JPEG has at least as many bytes "
        "for each picture, with the standard Huffman tables (as in the published curves) and with optimised ones. "
        f"Measured {kodak['date'][:10]}.",
        "",
        "| lmbda | bpp | PSNR dB | MS-SSIM | JPEG dB | JPEG dB, optimised |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for lmbda, p in points.items():
        lines.append(
            f"| {lmbda or card['lmbda']:g} | **{p['bpp']:.3f}** | **{p['psnr_db']:.2f}** | {p['ms_ssim']:.4f} "
            f"| {p['jpeg_psnr_db']:.2f} | {p['jpeg_optimised_psnr_db']:.2f} |"
        )
    lines += [
        "",
        f"- Architecture: `{training['model']}`, preset `{training['preset']}`",
        f"- Trained on: {card['trained_on']}",
        *([f"- Transforms: those of {training['transforms']}, kept; trained on latents"] if frozen else []),
        f"- Goal: {'rate' if frozen else training['metric']}, lmbda "
        + (", ".join(f"{v:g}" for v in card.get("lmbdas") or points if v) or f"{card['lmbda']:g}"),
        f"- Command (DATA is the folder of the pictures): `{training_command(training)}`",
        *([f"- Before this run: {card['before']}"] if card.get("before") else []),
        f"- Device and time: {card['device']}, {card['train_seconds'] / 60:.0f} minutes",
        f"- Steps: {training['steps']} of {training['batch']} crops of {training['crop']} pixels "
        "(the paper: about 280,000 of 16 crops of 384)",
        f"- Limits: {card['limits']}",
        "- Weights: matrices and kernels in float16, the rest in float32; measured as shipped",
        "",
        "## Kodak, picture by picture",
        "",
        "| picture | lmbda | bpp | estimated bpp | PSNR dB | MS-SSIM | JPEG dB | JPEG dB, optimised |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['image']} | {r['lmbda'] or card['lmbda']:g} | {r['bpp']:.4f} | {r['bpp_estimated']:.4f} "
            f"| {r['psnr_db']:.2f} | {r['ms_ssim']:.4f} "
            f"| {r['jpeg_psnr_db']:.2f} | {r['jpeg_optimised_psnr_db']:.2f} |"
        )
    heading = "| up to step | minutes | loss | bpp | PSNR dB |"
    lines += ["", "## Training", "", heading, "| --- | --- | --- | --- | --- |"]
    for p in card["curve"]:
        psnr = f"{p['psnr_db']:.2f}" if "psnr_db" in p else "-"  # not measured for MS-SSIM, or on latents
        lines.append(
            f"| {p['step']} | {p.get('minutes', math.nan):.1f} | {p['rd_loss']:.3f} | {p['bpp']:.3f} | {psnr} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"publish": publish, "again": again})
