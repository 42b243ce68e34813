"""Makes a finished training run a shipped model: weights in fewer bits, measured on Kodak, with a card beside them.

python benchmarks/publish.py publish runs/blocks-parallel blocks-parallel --kodak pictures/kodak
python benchmarks/publish.py again blocks-parallel --kodak pictures/kodak
python benchmarks/publish.py effort blocks-parallel --kodak pictures/kodak
python benchmarks/publish.py card blocks-parallel --differs "..."
python benchmarks/publish.py masking runs/masking
"""

import dataclasses
import json
import shlex
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.studies.classical import jpeg_psnr_db
from entroformer_lib.studies.measuring import about, finished_rows, measure, tasks_of
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.studies.results import result_path, save
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.weights.forms import Form
from entroformer_lib.weights.zoo import load_model, save_card, save_weights

CURVE_POINTS = 60
MEASURED = """Kodak, mean of 24 pictures, whole files on disk; mean of per-picture PSNR. JPEG has at least as many \
bytes for each picture, with the standard Huffman tables (as in the published curves) and with optimised ones."""
QUALITIES = ("psnr_db", "ms_ssim", "jpeg_psnr_db", "jpeg_optimised_psnr_db")
HEADINGS = {
    "image": "picture", "bpp_estimated": "estimated bpp", "psnr_db": "PSNR dB", "ms_ssim": "MS-SSIM",
    "jpeg_psnr_db": "JPEG dB", "jpeg_optimised_psnr_db": "JPEG dB, optimised",
}  # fmt: skip
CELLS = {"lmbda": "{:g}", "bpp": "{:.4f}", "bpp_estimated": "{:.4f}", "ms_ssim": "{:.4f}"}
CELLS |= {column: "{:.2f}" for column in ("psnr_db", "jpeg_psnr_db", "jpeg_optimised_psnr_db")}
CURVE = {"minutes": "{:.1f}", "loss": "{:.3f}", "bpp": "{:.3f}"}  # of the training's table, rounded more


def publish(
    run: Positional[Path],
    name: Positional[str],
    kodak: Path,
    data: str = "",
    limits: str = "",
    before: str = "",
    lmbdas: tuple[float, ...] = (),
    form: Form = "float16",
    transforms: str | None = None,
    near: str | None = None,
    curve: Path | None = None,
    command: str = "",
    family: bool = True,
    kind: str = "",
    differs: str = "",
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
        form: How matrices and kernels are stored; transforms in a file of their own have a form of their own.
        transforms: Weights that hold g_a, g_s and gains, which are left out here: a file in data/weights/shared.
        near: Weights whose g_a and g_s are stored there, of which this file holds the differences.
        curve: The training's curve as JSON, where it is not in the run's log.
        command: How it was trained, where it was not by `entroformer train`.
        differs: How far model and training are from the paper's, in words.
        family: It was trained on equal terms with the others behind its transforms, and is compared with them.
        kind: What it is in this family, where its variant does not say it: groupedmixer-32.
    """
    trained = load_model(run / "weights.safetensors", "cpu")
    card = {**trained.card, "trained_on": data, "limits": limits, "before": before}
    card["training"] = {**card["training"], "data": "DATA", "out": f"runs/{name}"}
    if card["training"].get("latents"):
        card["training"]["latents"] = "runs/latents"
    if (card["training"].get("init") or "").endswith(".safetensors"):
        card["training"]["init"] = f"runs/{name}-before/weights.safetensors"
    card["curve"] = training_curve(run / "log.jsonl") if curve is None else json.loads(curve.read_text())
    card |= {"form": form, "shared": transforms, "near": near, "command": command, "family": family, "kind": kind}
    card |= {"differs": differs, **_counted_of(trained)}
    if transforms is not None:
        card["training"]["transforms"] = transforms
    card["lmbdas"], card["measured_at"] = list(trained.config.lmbdas), list(lmbdas or trained.config.lmbdas)
    save_weights(trained, _weights(name), card, form, transforms, near)
    _measure_and_write(card, name, kodak)


def again(name: Positional[str], kodak: Path) -> None:
    """Measures a shipped model again, after a change of the coder, and writes its files anew.

    Args:
        name: Name of the model.
        kodak: Folder of the 24 Kodak pictures.
    """
    _measure_and_write(load_model(_weights(name), "cpu").card, name, kodak)


def effort(name: Positional[str], kodak: Path, rounds: int = 8, lmbdas: tuple[float, ...] = ()) -> None:
    """Measures a shipped model with effort, and writes data/results/NAME-effortROUNDS-kodak.json.

    Args:
        name: Name of the model.
        kodak: Folder of the 24 Kodak pictures.
        rounds: Of search, see codec/search.py.
        lmbdas: Measure at these alone; by default at all that the model serves.
    """
    model, result = load_model(_weights(name)), result_path(f"{name}-effort{rounds}-kodak")
    with finished_rows(result) as done:
        tasks = tasks_of(name, pictures_to_test(kodak), effort=rounds)
        measured = measure([task for task in tasks if task.setting in (lmbdas or (task.setting,))], done, report=_tell)
        left = ("codec", "setting", "bpp_estimated")
        rows = [{"lmbda": row["setting"], **{k: v for k, v in row.items() if k not in left}} for row in measured]
        mean = {f"{point['lmbda']:g}": point for point in means(rows).to_dict("records")}
        save(result, {"images": rows, "mean": mean, **about({}, model.config.variant), "effort": rounds}, model)


def card(name: Positional[str], differs: str = "", before: str = "") -> None:
    """Writes a shipped model's card anew, without measuring.

    Args:
        name: Name of the model.
        differs: How far model and training are from the paper's, in words; by default what the card says now.
        before: What had been trained before the last run; the same.
    """
    model = load_model(_weights(name), "cpu")
    facts = model.card | _counted_of(model)
    facts |= {name: words for name, words in {"differs": differs, "before": before}.items() if words}
    rows = json.loads(result_path(f"{name}-kodak").read_text())["images"]
    save_card(_weights(name), facts)
    write_bytes(_weights(name).with_suffix(".md"), card_text(name, facts, rows).encode())


def masking(runs: Positional[Path], only: tuple[str, ...] = ("none", "diamond"), transforms: str | None = None) -> None:
    """Puts models of the position-masking study into data/weights/position_masking, in eight bits.

    Args:
        runs: Folder of the runs.
        only: Names of the models.
        transforms: Weights that hold g_a, g_s and gains, which are left out here: a file in data/weights/shared.
    """
    for name in only:
        model = load_model(runs / name / "weights.safetensors", "cpu")
        limits = "made for the study of context positions, with gaps in its context; other models compress better"
        training = {**model.card["training"], "out": f"runs/{name}", "latents": "runs/latents"}
        card = {**model.card, "training": training, "limits": limits}
        save_weights(model, _weights(f"position_masking/{name}"), card, "int8", transforms)


def _counted_of(model: Entroformer) -> dict:
    """What a card says of the network itself."""
    c = model.config
    sizes = {"variant": c.variant, "dim": c.dim, "layers": c.context_layers if c.context != "none" else 0}
    return {"kmac": kmac_per_pixel(model), "network": sizes}


def kmac_per_pixel(model: Entroformer) -> dict[str, float]:
    """Thousands of multiplications per pixel of 256x256 pixels, as one pass over all latents needs them."""
    side, counts = 256, {}
    x, likelihoods = torch.zeros(1, 3, side, side), model.likelihoods
    y = torch.zeros(1, model.config.M, side // 16, side // 16)
    for part, run in {"g_a": lambda: model.g_a(x), "g_s": lambda: model.g_s(y), "rest": lambda: likelihoods(y)}.items():
        with FlopCounterMode(display=False) as counter:
            run()
        counts[part] = round(counter.get_total_flops() / 2 / side**2 / 1e3, 1)
    return counts


def _weights(name: str) -> Path:
    return data_folder() / "weights" / f"{name}.safetensors"


def _measure_and_write(card: dict, name: str, kodak: Path) -> None:
    weights = _weights(name)
    model = load_model(weights)
    paths = {path.stem: path for path in pictures_to_test(kodak)}
    result = result_path(f"{name}-kodak")
    tasks = tasks_of(str(weights), paths.values())
    if card.get("measured_at"):
        tasks = [task for task in tasks if task.setting in card["measured_at"]]
    with finished_rows(result) as done:
        rows = [_with_jpeg(row, paths) for row in measure(tasks, done, report=_tell)]
        points = means(rows).drop(columns="lmbda").to_dict("records")
        lmbdas = sorted({row["lmbda"] for row in rows} - {None})
        mean = dict(zip((f"{lmbda:g}" for lmbda in lmbdas), points, strict=True)) if lmbdas else points[0]
        content = {"images": rows, "mean": mean, **about(card, model.config.variant)}
        record = save(result, content, model, seed=card["training"]["seed"])

        card["kodak"] = {**mean, "images": len(rows), "date": record["date"]}
        save_card(weights, card)
        write_bytes(weights.with_suffix(".md"), card_text(name, card, rows).encode())


def _with_jpeg(row: dict, paths: dict[str, Path]) -> dict:
    """Adds what JPEG reaches with as many bytes, with standard and with optimised Huffman tables."""
    row = {"lmbda": row.pop("setting"), **{key: value for key, value in row.items() if key != "codec"}}
    row["jpeg_psnr_db"] = jpeg_psnr_db(paths[row["image"]], row["bytes"], optimize=False)
    row["jpeg_optimised_psnr_db"] = jpeg_psnr_db(paths[row["image"]], row["bytes"])
    return row


def _tell(row: dict) -> None:
    print(row["setting"] or "", row["image"], f"bpp {row['bpp']:.3f} PSNR {row['psnr_db']:.2f} dB", flush=True)


def means(rows: list[dict]) -> pd.DataFrame:
    """Means over the pictures, a row for each lambda, from the lowest on."""
    table = pd.DataFrame(rows).astype({"lmbda": float})
    measured = table.select_dtypes("float").columns.drop("lmbda")
    return table.groupby("lmbda", dropna=False)[list(measured)].mean().reset_index()


def training_curve(log: Path) -> list[dict]:
    """The log thinned to a few points, each the mean over its stretch of steps."""
    rows = pd.read_json(log, lines=True)
    size = max(1, len(rows) // CURVE_POINTS)
    stretches = rows.groupby(rows.index // size)
    measured = [column for column in ("rd_loss", "bpp", "psnr_db") if column in rows]
    curve = stretches[["step", "lmbda"]].last().join(stretches[measured].mean().round(4))
    curve.insert(1, "minutes", (stretches["seconds"].last() / 60).round(2))
    return curve.astype(object).where(curve.notna(), None).to_dict("records")


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
    pictures = pd.DataFrame(rows).assign(lmbda=lambda table: table["lmbda"].fillna(card["lmbda"]))
    bold = {"bpp": "**{:.3f}**", "psnr_db": "**{:.2f}**"}
    curve = pd.DataFrame(card["curve"]).rename(columns={"step": "up to step", "rd_loss": "loss"})
    return "\n\n".join(
        [
            f"# {name}",
            f"{MEASURED} Measured {card['kodak']['date'][:10]}.",
            _table(means(pictures.to_dict("records")).drop(columns=["bpp_estimated", "encode_s", "decode_s"]), bold),
            _facts(card, pictures),
            "## Kodak, picture by picture",
            _table(pictures[["image", "lmbda", "bpp", "bpp_estimated", *QUALITIES]]),
            "## Training",
            _table(curve[[c for c in ("up to step", "minutes", "loss", "bpp", "psnr_db") if c in curve]], CURVE),
        ]
    ) + "\n"  # fmt: skip


def _architecture(network: dict | None) -> str | None:
    """The entropy model in words."""
    layers = network and network["layers"] and f", {network['layers']} layers of context"
    return network and f"`{network['variant']}`, {network['dim']} wide{layers or ''}"


def _counted(kmac: dict | None) -> str | None:
    """Multiplications in words."""
    return kmac and f"g_a {kmac['g_a']:g}, g_s {kmac['g_s']:g}, entropy model {kmac['rest']:g}, in 256x256 pixels"


def _stored(card: dict) -> str:
    """How the weights are stored, in words."""
    forms = {"float32": "everything in float32", "float16": "matrices and kernels in float16, the rest in float32"}
    forms["int8"] = "matrices and kernels in eight bits with a step for each row, the rest in float32"
    words = forms[card.get("form", "float16")]
    if card.get("shared"):
        words += f"; g_a, g_s and gains in shared/{card['shared']}, in float16"
    if card.get("near"):
        words += f"; g_a and g_s as differences from shared/{card['near']}"
    return f"{words}; measured as shipped"


def _table(data: pd.DataFrame, form: dict[str, str] | None = None) -> str:
    form = {**CELLS, **(form or {})}
    text = data.apply(lambda column: column.map(form.get(column.name, "{}").format, na_action="ignore"))
    return text.rename(columns=HEADINGS).to_markdown(index=False, disable_numparse=True)


def _facts(card: dict, pictures: pd.DataFrame) -> str:
    """What the model is and how it was trained, one line for each fact."""
    training, frozen = card["training"], card["training"].get("transforms")
    lmbdas = card.get("lmbdas") or pictures["lmbda"].unique()
    facts = {
        "Architecture": _architecture(card.get("network")) or f"`{training['model']}`, preset `{training['preset']}`",
        "Trained on": card["trained_on"],
        "Transforms": frozen and f"those of {frozen}, kept; trained on latents",
        "Goal": f"{'rate' if frozen else training['metric']}, lmbda " + ", ".join(f"{v:g}" for v in lmbdas),
        "Command (DATA is the folder of the pictures)": f"`{card.get('command') or training_command(training)}`",
        "Before this run": card.get("before"),
        "Device and time": f"{card['device']}, {card['train_seconds'] / 60:.0f} minutes",
        "Steps": f"{training['steps']} of {training['batch']} crops of {training['crop']} pixels "
        "(the paper: about 280,000 of 16 crops of 384)",
        "Thousands of multiplications per pixel": _counted(card.get("kmac")),
        "From the paper": card.get("differs"),
        "Limits": card["limits"],
        "Weights": _stored(card),
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact is not None and fact != "")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"publish": publish, "again": again, "effort": effort, "card": card, "masking": masking}
    )
