"""The command line, `entroformer …`. Nothing heavy is imported before a command runs, so `--help` answers at once."""

import dataclasses
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from tyro.conf import Positional, arg

from entroformer_lib import __version__
from entroformer_lib.codec.container import MAX_PIXELS
from entroformer_lib.errors import PassedOver, UserError, in_words
from entroformer_lib.studies.ablation_grids import GRIDS, Terms, grids_of
from entroformer_lib.training.config import TrainConfig

ABOUT = "Learned image compression you can look inside."
app = tyro.extras.SubcommandApp()
studies, data = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
options = tyro.constructors.ConstructorRegistry()


@options.primitive_rule
def _left_out_is_none(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """`--limit INT` in the help, not `{None}|INT`: None is what an option has that is left out."""
    kinds = get_args(info.type)
    if len(kinds) != 2 or kinds[1] is not type(None):
        return None
    make = tyro.constructors.PrimitiveTypeInfo.make
    spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(make(kinds[0], info.markers))
    if not isinstance(spec, tyro.constructors.PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


app.command(studies, name="study", help="Run a study: entroformer study ablation --help shows one.")
app.command(data, name="data", help="Pictures to test and to train on: entroformer data kodak fetches a test set.")

Output = Annotated[Path | None, arg(aliases=["-o"], metavar="FILE")]
OutputOrFolder = Annotated[str | None, arg(aliases=["-o"], metavar="FILE")]
Inputs = Positional[Annotated[tuple[str, ...], arg(metavar="FILE ...", help_behavior_hint="")]]
Model = Annotated[str, arg(help="A name from `entroformer models`, or a .safetensors file.")]
Device = Annotated[str, arg(help="cpu, cuda, or auto.")]
Force = Annotated[bool, arg(help="Replace an output that exists.")]
AsJson = Annotated[bool, arg(name="json", help="Print JSON.")]


@dataclass(frozen=True)
class Files:
    """Options of the commands that go through files."""

    force: Force = False
    resume: bool = False
    """Keep outputs that exist. An interrupted command never leaves half a file."""
    jobs: int | None = None
    """With many files: how many at a time, each on one core; default: as many as cores, or one on a GPU."""
    scheduler: str | None = None
    """With many files: the address of a dask scheduler whose workers do it, such as tcp://host:8786."""
    as_json: AsJson = False


@app.command
def compress(
    images: Inputs = (),
    output: OutputOrFolder = None,
    model: Model = "blocks-parallel",
    bpp: float | None = None,
    window: int | None = None,
    k: tuple[int, ...] = (),
    effort: int = 0,
    device: Device = "auto",
    how: Annotated[Files, arg(name="")] = Files(),
) -> None:
    """Compress pictures into .ef files.

    Transparent pixels are laid over white, 16 bits become 8, grey stays grey, colour profiles are dropped.

    Example: entroformer compress photo.png -o photo.ef --bpp 0.5

    Many: entroformer compress photos/ -o small/ --resume

    On many machines: entroformer compress photos/ -o small/ --resume --scheduler tcp://host:8786

    From one program to another: cat photo.png | entroformer compress - -o - > photo.ef

    Args:
        images: A picture: PNG, JPEG, WebP, TIFF and what else Pillow reads. Several, a folder or a pattern go into the
            folder that -o names, in which they keep their places.
        output: The .ef file, by default beside the picture; of many their folder; - is the standard output.
        bpp: The most bits per pixel a file may have; takes a model of variable rate.
        window: For large pictures: each site looks for context at most so many sites (16 pixels) away, in each
            direction. By default as the model was made; those shipped look everywhere, which takes a time that grows
            with the square of the pixels.
        k: How many keys attention keeps in the context model (0: all), by default as it was trained. Of several numbers
            each picture gets the one with the fewest bits, which costs a pass through the context model for each.
        effort: Rounds of search for better latents than the nearest integers, each of which takes up to twice as long
            as coding without. 8 save about 7% of the bits. For models that were trained for a mean squared error.
    """
    from entroformer_lib.codec.many import Compress

    said = "{output}: {bytes:,} bytes, {bpp:.3f} bits per pixel"
    work = Compress(model, bpp, device, window, k, effort)
    _code(work, said, images, output, how)


@app.command
def decompress(
    files: Inputs = (),
    output: OutputOrFolder = None,
    model: str | None = None,
    max_pixels: int = MAX_PIXELS,
    device: Device = "auto",
    how: Annotated[Files, arg(name="")] = Files(),
) -> None:
    """Turn .ef files back into pictures.

    Example: entroformer decompress photo.ef -o photo.png

    Many: entroformer decompress small/ -o photos/ --resume

    Args:
        files: The .ef file. Several, a folder or a pattern go into the folder that -o names, in which they keep their
            places.
        output: The picture, its format told by the ending; by default a PNG beside the file; of many their folder, for
            PNGs; - is the standard output, for a PNG.
        model: Weights to decode with, where a file names none or they lie elsewhere.
        max_pixels: A file that claims more pixels than that is refused at once. The base Entroformers
            take 13 GB for so many.
    """
    from entroformer_lib.codec.many import Decompress

    said = "{output}: {width} x {height}"
    _code(Decompress(model, device, max_pixels), said, files, output, how)


@app.command
def info(file: Positional[Path], max_pixels: int | None = None, as_json: AsJson = False) -> None:
    """Say what is in an .ef file, without decoding it.

    Example: entroformer info photo.ef --json

    Args:
        file: The .ef file.
        max_pixels: Exit with code 1 for a file that claims more pixels than that, as decompress does.
    """
    from entroformer_lib.codec.container import VERSION, Container
    from entroformer_lib.codec.many import read

    data = read(file)

    c = Container.unpack(data)
    c.check_pixels(max_pixels)
    facts = {
        "file": str(file),
        "version": VERSION,
        "width": c.width,
        "height": c.height,
        "grey": c.grey,
        "model": c.model or None,
        "level": c.level,
        "window": c.window,
        "k": c.k,
        "weights": c.weights.hex(),
        "bytes": len(data),
        "bytes_y": len(c.y_string),
        "bytes_z": len(c.z_string),
        "bytes_container": len(data) - len(c.y_string) - len(c.z_string),
        "bpp": 8 * len(data) / (c.width * c.height),
    }
    print(json.dumps(facts, indent=1) if as_json else "\n".join(f"{k:16} {v}" for k, v in facts.items()))


@app.command
def models(as_json: AsJson = False) -> None:
    """List the models that can be loaded by name.

    Example: entroformer models --json
    """
    from entroformer_lib.weights.zoo import list_models

    rows = list_models()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    import pandas as pd

    columns = ["name", "variant", "lmbda", "MB", "kodak_bpp", "kodak_psnr_db", "sha256"]
    table = pd.DataFrame([{**row, "MB": row["bytes"] / 1e6, "sha256": row["sha256"][:12]} for row in rows])
    formats = {"lmbda": "{:g}", "MB": "{:.1f}", "kodak_bpp": "{:.3f}", "kodak_psnr_db": "{:.3f}"}
    print(
        table.to_string(columns=columns, index=False, na_rep="-", formatters={k: f.format for k, f in formats.items()})
    )


@app.command
def train(
    config: Annotated[TrainConfig, arg(name="")],
    as_json: Annotated[
        bool, arg(name="json", help="Print the path of the weights and the last line of the log as JSON.")
    ] = False,
) -> None:
    """Train a model, or go on with a run that was stopped.

    Example: entroformer train --data photos/ --out runs/first --model tiny-parallel --steps 2000

    On several GPUs: torchrun --nproc-per-node 4 -m entroformer_lib train --data photos/ --out runs/first

    Args:
        config: The run.
    """
    from entroformer_lib.training.loop import train as run

    path = run(config)
    if as_json:
        log = Path(config.out) / "log.jsonl"
        rows = log.read_text().splitlines() if log.exists() else []
        print(json.dumps({"weights": str(path), "last": json.loads(rows[-1]) if rows else None}))
    else:
        print(f"The weights are in {path}")


@app.command(name="eval")
def evaluate(
    model: Positional[Model],
    data: Path,
    limit: int | None = None,
    effort: int = 0,
    json_file: Annotated[Path | None, arg(name="json")] = None,
    device: Device = "auto",
    jobs: int | None = None,
    scheduler: str | None = None,
) -> None:
    """Measure a model on a folder of pictures, through real bytes. What cannot be read is named and left out.

    Per picture and mean: bits per pixel of the file and as estimated, PSNR, MS-SSIM, seconds to encode and decode.
    With --json FILE, the same command goes on where it was interrupted.

    Example: entroformer eval blocks-parallel --data pictures/kodak --limit 3 --json result.json

    On many machines: entroformer eval blocks-parallel --data pictures/kodak --json result.json --scheduler tcp://host:8786

    Args:
        data: Folder of pictures, with its subfolders.
        limit: Take only the first so many.
        effort: As of compress; there are no estimated bits then.
        json_file: Write rows, mean and provenance there; - prints them.
        jobs: Pictures at a time, each on one core; default: as many as there are cores, or one on a GPU.
        scheduler: Address of a dask scheduler to run on.
    """
    import pandas as pd
    from tqdm import tqdm

    from entroformer_lib.codec.search import check_effort
    from entroformer_lib.studies import results
    from entroformer_lib.studies.commands import at_least, check_place, check_weights
    from entroformer_lib.studies.measuring import Coding, finished_rows, measure
    from entroformer_lib.studies.rate_distortion import names_of, pictures_to_test

    at_least(1, limit=limit, jobs=jobs)
    _one_of_two(jobs, scheduler)
    out = None if str(json_file) == "-" else json_file
    if out is not None:
        check_place(out)
    paths = pictures_to_test(data, limit, lambda sentence: print(sentence, file=sys.stderr))
    loaded = _load(model, device)
    check_effort(loaded, effort)
    check_weights(out, loaded)
    place = str(next(loaded.g_s.parameters()).device)
    named = zip(paths, names_of(paths), strict=True)
    codings = [Coding(model, None, str(path), place, name, effort=effort) for path, name in named]
    columns = ["bpp", "bpp_estimated", "psnr_db", "ms_ssim", "encode_s", "decode_s"]
    with finished_rows(out) as done:
        with tqdm(total=len(codings), unit="picture", disable=None) as bar:
            rows = measure(codings, done, jobs, lambda row: bar.update(), scheduler)
        rows = [{name: value for name, value in row.items() if name not in ("codec", "setting")} for row in rows]
        table = pd.DataFrame(rows).set_index("image")[columns].astype(float)
        means = table.mean()
        result = {"images": rows, "mean": means.astype(object).where(means.notna(), None).to_dict()}
        if out is not None:
            results.save(out, result, loaded)
    if json_file is not None and out is None:
        print(results.as_json({**result, "provenance": results.provenance(loaded)}))
    else:
        table = pd.concat([table, means.to_frame("mean").T])
        print(table.to_string(float_format="{:.4f}".format, na_rep="-", index_names=False))


@studies.command(name="ablation")
def study_ablation(
    terms: Annotated[Terms, arg(name="")],
    grid: Annotated[tuple[str, ...], arg(help=f"Which grids: {', '.join(GRIDS)}.")] = (),
    fields: tuple[str, ...] = (),
    model: str = "context",
    out: Path = Path("runs/ablation"),
    seeds: tuple[int, ...] = (0, 1),
    scheduler: str | None = None,
    workers: int = 1,
    dry_run: bool = False,
    save_only: bool = False,
    keep: bool = False,
    results: Path | None = None,
) -> None:
    """Train entropy models that differ in one choice, on equal terms, and measure them: tables 1, 3, 4, figures 6, 7.

    The transforms are frozen, and their latents computed once. A finished run is never repeated; after a kill the same
    command goes on.

    Example: entroformer study ablation --grid table1 figure6 --dry-run

    A row of your own: entroformer study ablation --grid table1 --fields radius=2 top_k=8

    On many machines: entroformer study ablation --grid table1 --scheduler tcp://host:8786

    Args:
        terms: What all runs share.
        fields: One more row, of your own: fields of the architecture to change.
        model: Variant of that row: context, context-cnn, serial, parallel, cnn, minnen, hyperprior, hyperprior-cnn,
            groupedmixer, groupedmixer-fast, groupedmixer-large.
        out: Folder of the runs.
        seeds: A run of each row for each of them.
        scheduler: Address of a dask scheduler to run on.
        workers: Runs at a time on this machine, each on one core, or one GPU each.
        dry_run: Print what would run and the time it is estimated to take, and start nothing.
        save_only: Write the results of the runs that are finished, and start nothing.
        keep: Keep the runs that the saved results already hold on the same terms, and do not train them again.
        results: Folder for the results; by default results/ in the folder of the runs.
    """
    from entroformer_lib.studies import ablation

    study = ablation.prepare(grids_of(grid, fields, model), terms, out, seeds)
    if dry_run:
        print(ablation.plan_in_words(study))
        return
    folder = results or out / "results"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; results go into a folder.")
    kept_in = folder if keep else None
    outcomes = [] if save_only else study.go(scheduler, workers, lambda outcome: print(outcome, flush=True), kept_in)
    saved = ablation.save(study, folder, keep)
    for path in saved:
        print(path)
    if not saved:
        print("No run is finished, so there is no result.")
    failed = [outcome.name for outcome in outcomes if outcome.error]
    if failed:
        raise UserError(f"{len(failed)} of {len(study.runs)} runs failed: {', '.join(failed)}.")


@studies.command(name="paper")
def study_paper(
    model: Model,
    pictures: Path,
    out: Path = Path("runs/paper"),
    limit: int | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
) -> None:
    """Measure what the paper's figures 3, 5 and 8 to 12 need of one model, and draw them.

    Whole files of every picture at every rate, masked positions of the context, attention maps. Models read from the
    authors' checkpoints are measured like any other. After a kill the same command goes on.

    Example: entroformer study paper --model blocks-parallel --pictures pictures/kodak --dry-run

    Args:
        model: A name from `entroformer models`, or a .safetensors file.
        pictures: Folder of the test pictures, such as Kodak's.
        out: Folder for results/ and figures/.
        limit: Only the first pictures.
        jobs: Pictures at a time, each on one core; default: as many as there are cores.
        dry_run: Print what would be measured and about how long it takes, and start nothing.
    """
    from entroformer_lib.files import data_folder
    from entroformer_lib.studies.paper import Paper
    from entroformer_lib.studies.results import kept_in

    if out.resolve() == data_folder().parent:
        raise UserError(f"{out} has figures of its own; name another folder with --out.")
    study = Paper(model, pictures, out, limit, jobs)
    if dry_run:
        plan = study.plan()
        words = plan.assign(minutes=(plan["seconds"] / 60).round(1)).drop(columns="seconds")
        print(words.to_string(index=False))
        print(f"{plan['seconds'].sum() / 60:.0f} minutes of one core, measured on one picture")
        return
    study.measure(lambda sentence: print(sentence, flush=True))
    from entroformer_lib.views.paper import regenerate

    with kept_in(out / "results"):
        drawn = regenerate(out / "figures", page=False)
    print(f"{len(drawn)} figures in {out / 'figures'}")


@app.command
def explore(
    image: Positional[Path | None] = None,
    output: Output = None,
    model: Model = "blocks-parallel",
    layer: int | None = None,
    head: int | None = None,
    table: Annotated[Path | None, arg(metavar="FILE")] = None,
    side: int = 768,
    live: bool = False,
    serve: bool = False,
    force: Force = False,
    device: Device = "auto",
) -> None:
    """Write a page that shows what the entropy model looks at when it predicts each block of a picture.

    One HTML file, for lectures and supplements: click a block, choose layer, head and k. It needs no network and no
    Python; up to 25 MB. Of a GroupedMixer it shows the attention inside a group and among the groups.

    With --table it writes a table instead, of one picture or of all in a folder: a row for each latent, with its bits,
    what the context saved, and where each layer looked.

    With --live the page holds a parallel model itself, up to 60 MB, and takes any photograph that is dropped on it.

    Example: entroformer explore photo.png -o page.html

    A table: entroformer explore photos/ --table latents.csv

    Args:
        image: The picture; for a table also a folder, or a .txt list of pictures. A live page can do without.
        output: The page; by default beside the picture; a live page without a picture: live.html here.
        layer: Layer to begin with; by default the last that prefers some blocks to others.
        head: Head to begin with; by default the first.
        table: The table: .csv or .parquet; where it comes from stands in a .json beside it.
        side: The most pixels on the longer side; a larger picture is scaled down first.
        live: Put the model into the page.
        serve: Open the page in the browser at an address of this machine, until Ctrl+C; written only with -o.
    """
    if side < 1:
        raise UserError(f"--side is at least 1 pixel; it is {side}.")
    if image is None and not live:
        raise UserError("The page needs a picture: entroformer explore photo.png. Without one there is --live.")
    if (live or table is not None) and (layer is not None or head is not None):
        raise UserError("--layer and --head say where a page of stored answers begins; leave them out here.")
    if table is not None:
        if serve or live or output is not None:
            raise UserError("--table writes a table and no page; leave out -o, --live and --serve.")
        _output(table.with_name(f"{table.name}.json"), image, "", force)
        _table_of_latents(image, _output(table, image, "", force), model, side, device)
        return
    if output is not None or not serve:
        output = _output(output, image or Path("live"), ".html", force)
    if live:
        if device != "auto":
            raise UserError("A live page computes in the browser; --device is for pages of stored answers.")
        _explore_live(None if image is None else _fitting(image, side), output, model, serve)
        return
    from entroformer_lib.explorer.effort import effort
    from entroformer_lib.explorer.page import explorer_page, serve_page
    from entroformer_lib.files import in_text, write_bytes
    from entroformer_lib.inspection.group_server import server_of
    from entroformer_lib.weights.zoo import reference_of

    picture, loaded = _fitting(image, side), _load(model, device)
    rows = server_of(loaded, picture, reference_of(loaded))
    start = {name: value for name, value in (("layer", layer), ("head", head)) if value is not None}
    rows.check_layer(**{"layer": 0, **start})
    seconds, size = effort(rows)
    print(f"{rows.n:,} latents: about {seconds:.0f} seconds and {size:.1f} MB", file=sys.stderr)
    with _progress():
        page = explorer_page(rows, in_text(image.stem), **start)
    if output is not None:
        write_bytes(output, page.text.encode())
    print(f"{output or image}: {page.in_words()}")
    if serve:
        serve_page(page.text)


def _table_of_latents(source: Path, table: Path, model: str, side: int, device: str) -> None:
    from tqdm import tqdm

    from entroformer_lib.studies.latent_table import check_format, save_latents
    from entroformer_lib.studies.rate_distortion import names_of, pictures_to_test

    check_format(table)
    paths = pictures_to_test(source, tell=lambda sentence: warnings.warn(sentence, PassedOver, stacklevel=2))
    loaded = _load(model, device)
    named = zip(names_of(paths), tqdm(paths, unit="picture", disable=None, leave=False), strict=True)
    rows = save_latents(table, loaded, ((name, _fitting(path, side)) for name, path in named))
    print(f"{table}: {len(rows):,} rows of {len(paths)} pictures")


def _explore_live(picture, output: Path | None, model: str, serve: bool) -> None:
    from entroformer_lib.explorer.live import live_page
    from entroformer_lib.explorer.page import serve_page
    from entroformer_lib.files import write_bytes
    from entroformer_lib.weights.zoo import reference_of

    loaded = _load(model, "cpu")
    text = live_page(loaded, picture, reference_of(loaded))
    if output is not None:
        write_bytes(output, text.encode())
        print(f"{output}: {len(text) / 1e6:.1f} MB, with the model inside")
    if serve:
        serve_page(text)


TEST_PICTURES = {
    "samples": "Write scikit-image's photographs; it takes no network.",
    "kodak": "Fetch Kodak's 24 photographs, with checksums; a broken download is continued.",
    "clic2020": "Fetch CLIC 2020's professional photographs, with a checksum; a broken download is continued.",
}


def _fetching(name: str) -> Callable[..., None]:
    def command(to: Path | None = None) -> None:
        from entroformer_lib.datasets import fetch

        folder = to or Path("pictures") / name
        paths = fetch(name, folder)
        print(f"{len(paths)} pictures in {folder}")

    command.__doc__ = f"""{TEST_PICTURES[name]}

    Example: entroformer data {name} --to pictures/{name}

    Args:
        to: The folder; by default pictures/{name}.
    """
    return command


for _name in TEST_PICTURES:
    data.command(_fetching(_name), name=_name)


@data.command
def pack(
    folder: Positional[Path],
    out: Positional[Path],
    min_side: int = 64,
    per_shard: int = 500,
    table: Path | None = None,
    limit: int | None = None,
    jobs: int | None = None,
) -> None:
    """Pack a folder of pictures into tar shards to train from, with a manifest. The same command goes on after a stop.

    What is broken or too small is named and left out.

    Example: entroformer data pack photos/ shards/ --min-side 400

    Args:
        folder: The pictures, with subfolders. A LICENCE file there is noted in the manifest.
        out: The folder for the shards.
        min_side: Pixels that a picture must have on its shorter side.
        per_shard: Pictures in a shard.
        table: A CSV with a column name or ImageID, and perhaps License: only its pictures, in its order.
        limit: The most pictures.
        jobs: Shards at a time, each on one core; default: as many as there are cores.
    """
    from tqdm import tqdm

    from entroformer_lib.training.packing import pack as run

    with tqdm(unit="shard", disable=None) as bar:

        def tell(row: dict, shards: int) -> None:
            bar.total = shards
            bar.update()
            for left in row["left_out"]:
                bar.write(f"entroformer: left out {left['name']}: {left['reason']}", file=sys.stderr)

        manifest = run(folder, out, min_side, per_shard, table, limit, jobs, tell)
    words = f"{out}: {manifest['pictures']:,} pictures in {len(manifest['shards'])} shards"
    print(f"{words}, {manifest['bytes'] / 1e6:.1f} MB; {len(manifest['left_out'])} left out")


@data.command
def openimages(
    index: Positional[tuple[str, ...]],
    to: Path,
    count: int = 14_886,
    spare: float = 1.0,
    seed: int = 0,
    subset: Literal["train", "validation", "test", "all"] = "train",
) -> None:
    """Write which pictures of Open Images to train on, as many as the paper has, and a plan to download them.

    It fetches no picture. The folder gets list.csv, download.txt for aria2c, and README.txt with the commands.

    Example: entroformer data openimages image_ids_and_rotation.csv --to openimages/

    Args:
        index: Open Images' CSV of ImageID, License and so on: files or addresses.
        to: The folder for the plan.
        count: Pictures that are wanted.
        spare: Share of more to list, for pictures that are gone, or too small, which the index does not tell.
        seed: Decides which.
        subset: Which part of Open Images.
    """
    from entroformer_lib.training.openimages import plan_download

    print(f"{to}: {plan_download(index, to, count, spare, seed, subset):,} pictures listed")


@app.command(name="import-official")
def import_official(
    src: Positional[Path], dst: Positional[Path], force: Force = False, top_k: int | None = None
) -> None:
    """Turn a checkpoint of the authors' released code into weights of this library, without running what is in it.

    Example: entroformer import-official serial-0.02.pth released-serial-0.02.safetensors

    Args:
        src: The checkpoint (.pth), as the authors published it, or a dict of state dicts under the same names.
        dst: The weights (.safetensors).
        top_k: k of the attention; by default what the checkpoint says, or 32 where it does not (state dicts do not).
    """
    _output(dst, src, "", force)
    from entroformer_lib.weights.official import import_official as write

    write(src, dst, force, top_k)
    print(f"{dst}: {dst.stat().st_size / 1e6:.1f} MB")


@app.command(name="export-onnx")
def export_onnx(model: Positional[Model], folder: Positional[Path], force: Force = False) -> None:
    """Write a model as ONNX graphs: analysis, hyper synthesis, context and synthesis apart, for any height and width.

    Beside them model.json says what else a user of the graphs needs: the config, the medians of z, the lambdas. A model
    of variable rate takes its level as an input; model.json has that of NAME@LAMBDA.

    Example: entroformer export-onnx blocks-parallel@0.014 graphs/

    Args:
        folder: Where to write; made where it is not there.
    """
    from entroformer_lib.onnx_export import write

    for path in write(_load(model, "cpu"), folder, force):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


# ---- what the commands share ----


def _code(work, said: str, inputs: tuple[str, ...], output: str | None, how: Files) -> None:
    """Compresses or decompresses one file or many.

    work: of codec/many.py. said: what is told of one file, to be filled with its row.
    """
    from entroformer_lib.codec import many
    from entroformer_lib.files import write_bytes

    if not inputs:
        print(f"entroformer: Name a {work.what}, a folder, a pattern, or - for the standard input.", file=sys.stderr)
        sys.exit(2)
    if how.force and how.resume:
        raise UserError("--force replaces what exists, and --resume keeps it; choose one.")
    if how.jobs is not None and how.jobs < 1:
        raise UserError(f"--jobs must be at least 1; it is {how.jobs}.")
    if many.means_many(inputs, output):
        _code_many(work, inputs, output, how)
        return
    if how.scheduler is not None:
        raise UserError("--scheduler is for many files; name several, a folder or a pattern, and -o FOLDER.")
    name, to_stdout = inputs[0], output == "-"
    if name == "-" and output is None:
        raise UserError("What comes from the standard input needs the name of an output, or -: -o FILE.")
    place = Path("-") if to_stdout else _output(output and Path(output), name, work.ending, how.force or how.resume)
    if how.resume and place.is_file() and not to_stdout:
        row = {"file": name, "output": str(place), "kept": True}
        print(json.dumps(row) if how.as_json else f"{place} exists and is kept.")
        return
    if (name == "-" and sys.stdin is None) or (to_stdout and sys.stdout is None):
        raise UserError("The standard input or output is closed.")
    special = to_stdout or (place.exists() and not place.is_file())  # a pipe or a device, whose name has no ending
    work = work.prepared()
    with _progress():
        source = sys.stdin.buffer.read() if name == "-" else Path(name)
        data, facts = work(source, work.ending if special else place.suffix)
    for sentence in facts.pop("notes"):
        print(sentence, file=sys.stderr)
    if to_stdout:
        sys.stdout.buffer.write(data)
    else:
        write_bytes(place, data)
    row = {"file": name, "output": str(place), **facts}
    print(json.dumps(row) if how.as_json else said.format(**row), file=sys.stderr if to_stdout else sys.stdout)


def _code_many(work, inputs: tuple[str, ...], output: str | None, how: Files) -> None:
    """Many files into a folder. Each has a row, of which JSON is one line; the summary is for people."""
    from tqdm import tqdm

    from entroformer_lib.codec import many

    if output in (None, "-") or Path(output).is_file():
        raise UserError(f"Many files go into a folder; name it with -o FOLDER. So does the content of {inputs[0]}.")
    _one_of_two(how.jobs, how.scheduler)
    every = many.jobs_of(inputs, Path(output), work)
    left = many.left_to_do(every, how.force, how.resume)
    kept, failed, size, pixels = len(every) - len(left), 0, 0, 0
    if how.as_json:
        for source, place in every:
            if how.resume and place.is_file():
                print(json.dumps({"file": str(source), "output": str(place), "kept": True}))
    with tqdm(total=len(every), initial=kept, unit=f" {work.what}s", disable=None) as bar:
        for row in many.go_through(work, left, how.jobs, how.scheduler):
            bar.update()
            notes = [row["error"]] if "error" in row else row.pop("notes")
            for sentence in notes:
                bar.write(f"entroformer: {row['file']}: {sentence}", file=sys.stderr)
            failed += "error" in row
            size, pixels = size + row.get("bytes", 0), pixels + row.get("width", 0) * row.get("height", 0)
            if how.as_json:
                bar.write(json.dumps(row), file=sys.stdout)
    words = f"{output}: {len(left) - failed} of {len(every)} {work.what}s done, {kept} kept, {failed} failed"
    if size:
        words += f"; {size:,} bytes, {8 * size / pixels:.3f} bits per pixel"
    print(words, file=sys.stderr if how.as_json else sys.stdout)
    if failed:
        raise UserError(f"{failed} of {len(every)} files failed.")


def _one_of_two(jobs: int | None, scheduler: str | None) -> None:
    if jobs is not None and scheduler is not None:
        raise UserError("--jobs counts processes of this machine; with --scheduler, leave it out.")


def _fitting(image: Path, side: int):
    """The picture, scaled down where it is larger, which is said."""
    from entroformer_lib.codec.pictures import open_picture
    from entroformer_lib.inspection.scene import fitting

    original = open_picture(image)
    picture = fitting(original, side)
    if picture.size != original.size:
        sizes = "{} x {} pixels are scaled to {} x {}".format(*original.size, *picture.size)
        print(f"{image}: {sizes}; --side takes more.", file=sys.stderr)
    return picture


def _load(model: str, device: str):
    from entroformer_lib.memory import keep_freed_memory
    from entroformer_lib.weights.zoo import load_model

    keep_freed_memory()
    return load_model(model, device)


@contextmanager
def _progress() -> Iterator[None]:
    """Shows on a terminal how far the work inside has come, once it takes longer than a second."""
    from tqdm import tqdm

    from entroformer_lib.stages import listening

    with tqdm(delay=1, disable=None, leave=False) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.unit, bar.total = f" {what}", total
            bar.update(done - bar.n)

        with listening(show):
            yield


def _output(output: Path | None, source: str | Path, ending: str, force: bool) -> Path:
    """The output as given, or beside the source with another ending."""
    if str(output) == "-":
        raise UserError("This is not written to the standard output; name a file.")
    if output is None and not Path(source).name:
        raise UserError(f"'{source}' does not name a file.")
    output = Path(source).with_suffix(ending) if output is None else output
    if output.is_dir():
        raise UserError(f"{output} is a folder; the output must be a file.")
    if output.is_file() and os.path.isfile(source) and os.path.samefile(source, output):
        raise UserError(f"{output} is the input itself; name another output.")
    if output.is_file() and not force:
        raise UserError(f"{output} exists; --force replaces it.")
    if not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent}.")
    return output


def main() -> int:
    """Runs a command. Exit codes: 0 done, 1 a sentence says what is wrong, 2 the command line was not understood."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        if sys.argv[1:] == ["--version"]:
            print(f"entroformer {__version__}")
            return 0
        with _warnings_in_sentences(), options:
            app.cli(prog="entroformer", description=ABOUT, config=(tyro.conf.FlagCreatePairsOff,))
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
    except BrokenPipeError:  # who read the output has read enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # work may be left
    except KeyboardInterrupt:
        return _fail("Stopped.")
    except Exception as error:
        return _fail(in_words(error))
    return 0


@contextmanager
def _warnings_in_sentences() -> Iterator[None]:
    """What is passed over inside the block is told in a sentence; other warnings as ever."""

    def show(message, category, *where) -> None:
        if issubclass(category, PassedOver):
            print(f"entroformer: {message}", file=sys.stderr)
        else:
            otherwise(message, category, *where)

    with warnings.catch_warnings():
        otherwise, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("always", PassedOver)
        warnings.filterwarnings("ignore", "Image size")  # Pillow's, of a large picture that may be read
        yield


def _fail(sentence: str) -> int:
    print(f"entroformer: {sentence}", file=sys.stderr)
    return 1
