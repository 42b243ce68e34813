"""The command line, `entroformer …`. Nothing heavy is imported before a command runs, so `--help` answers at once."""

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from entroformer_lib import __version__
from entroformer_lib.errors import PassedOver, UserError
from entroformer_lib.studies.ablation_grids import GRIDS, Terms, grids_of
from entroformer_lib.training.config import TrainConfig

ABOUT = "Learned image compression you can look inside."
app = tyro.extras.SubcommandApp()
studies = tyro.extras.SubcommandApp()
app.command(studies, name="study", help="Run a study: entroformer study ablation --help shows one.")

Output = Annotated[Path | None, arg(aliases=["-o"], metavar="FILE")]
Model = Annotated[str, arg(help="A name from `entroformer models`, or a .safetensors file.")]
Device = Annotated[str, arg(help="cpu, cuda, or auto.")]
Force = Annotated[bool, arg(help="Replace an output that exists.")]
AsJson = Annotated[bool, arg(name="json", help="Print JSON.")]


@app.command
def compress(
    image: Positional[Path],
    output: Output = None,
    model: Model = "tiny-rates",
    bpp: float | None = None,
    force: Force = False,
    device: Device = "auto",
) -> None:
    """Compress a picture into an .ef file.

    Transparent pixels are laid over white, 16 bits become 8, grey stays grey, colour profiles are dropped.

    Example: entroformer compress photo.png -o photo.ef --bpp 0.5

    Args:
        image: The picture: PNG, JPEG, WebP, TIFF and what else Pillow reads.
        output: The .ef file; by default beside the picture.
        bpp: The most bits per pixel the file may have; takes a model of variable rate.
    """
    output = _output(output, image, ".ef", force)
    from entroformer_lib.codec import codec, pictures
    from entroformer_lib.files import write_bytes

    codec.check_bpp(bpp)
    loaded, picture = _load(model, device), pictures.open_picture(image)
    for sentence in pictures.losses(picture):
        print(sentence, file=sys.stderr)
    with _progress():
        data = codec.encode(loaded, picture, bpp)
    write_bytes(output, data)
    bpp = 8 * len(data) / (picture.width * picture.height)
    print(f"{output}: {len(data):,} bytes, {bpp:.3f} bits per pixel")


@app.command
def decompress(
    file: Positional[Path],
    output: Output = None,
    model: str | None = None,
    force: Force = False,
    device: Device = "auto",
) -> None:
    """Turn an .ef file back into a picture.

    Example: entroformer decompress photo.ef -o photo.png

    Args:
        file: The .ef file.
        output: The picture, its format told by the ending; by default a PNG beside the file.
        model: Weights to decode with, where the file names none or they lie elsewhere.
    """
    output = _output(output, file, ".png", force)
    data = _read(file)
    from entroformer_lib.codec import codec
    from entroformer_lib.codec.container import Container
    from entroformer_lib.codec.pictures import file_of
    from entroformer_lib.files import write_bytes
    from entroformer_lib.weights.zoo import device_of

    special = output.exists() and not output.is_file()  # a pipe or a device, whose name has no ending
    form = ".png" if special else output.suffix
    file_of("L" if Container.unpack(data).grey else "RGB", form)
    place = device_of(device)
    with _progress():
        picture = codec.decode(data, None if model is None else _load(model, device), place)
    write_bytes(output, file_of(picture, form))
    print(f"{output}: {picture.width} x {picture.height}")


@app.command
def info(file: Positional[Path], as_json: AsJson = False) -> None:
    """Say what is in an .ef file, without decoding it.

    Example: entroformer info photo.ef --json

    Args:
        file: The .ef file.
    """
    data = _read(file)
    from entroformer_lib.codec.container import VERSION, Container

    c = Container.unpack(data)
    facts = {
        "file": str(file),
        "version": VERSION,
        "width": c.width,
        "height": c.height,
        "grey": c.grey,
        "model": c.model or None,
        "level": c.level,
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
def train(config: Annotated[TrainConfig, arg(name="")], as_json: AsJson = False) -> None:
    """Train a model, or go on with a run that was stopped.

    Example: entroformer train --data photos/ --out runs/first --model tiny-parallel --steps 2000

    On several GPUs: torchrun --nproc-per-node 4 -m entroformer_lib train …

    Args:
        config: The run.
        as_json: Print the path of the weights and the last line of the log as JSON.
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
    json_file: Annotated[Path | None, arg(name="json")] = None,
    device: Device = "auto",
    jobs: int | None = None,
) -> None:
    """Measure a model on a folder of pictures, through real bytes. What cannot be read is named and left out.

    Per picture and mean: bits per pixel of the file and as estimated, PSNR, MS-SSIM, seconds to encode and decode.
    With --json, the same command goes on where it was interrupted.

    Example: entroformer eval tiny-parallel --data kodak/ --limit 3 --json result.json

    Args:
        data: Folder of pictures, with its subfolders.
        limit: Take only the first so many.
        json_file: Write rows, mean and provenance there; - prints them.
        jobs: Pictures at a time, each on one core; default: as many as there are cores.
    """
    import pandas as pd
    from tqdm import tqdm

    from entroformer_lib.studies import results
    from entroformer_lib.studies.commands import at_least, check_place
    from entroformer_lib.studies.measuring import Coding, finished_rows, measure
    from entroformer_lib.studies.rate_distortion import names_of, pictures_to_test

    at_least(1, limit=limit, jobs=jobs)
    out = None if str(json_file) == "-" else json_file
    if out is not None:
        check_place(out)
    paths = pictures_to_test(data, limit, lambda sentence: print(sentence, file=sys.stderr))
    loaded = _load(model, device)
    place = next(loaded.g_s.parameters()).device.type
    named = zip(paths, names_of(paths), strict=True)
    codings = [Coding(model, None, str(path), place, name) for path, name in named]
    columns = ["bpp", "bpp_estimated", "psnr_db", "ms_ssim", "encode_s", "decode_s"]
    with finished_rows(out) as done:
        with tqdm(total=len(codings), unit="picture", disable=None) as bar:
            rows = measure(codings, done, jobs, lambda row: bar.update())
        rows = [{name: value for name, value in row.items() if name not in ("codec", "setting")} for row in rows]
        table = pd.DataFrame(rows).set_index("image")[columns].astype(float)
        means = table.mean()
        result = {"images": rows, "mean": means.astype(object).where(means.notna(), None).to_dict()}
        if out is not None:
            results.save(out, result, loaded)
    if json_file is not None and out is None:
        print(results.as_json({**result, "provenance": results.provenance(loaded)}))
    else:
        table.loc["mean"] = means
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
        model: Variant of that row: context, serial, parallel, cnn, minnen, hyperprior, groupedmixer.
        out: Folder of the runs.
        seeds: A run of each row for each of them.
        scheduler: Address of a dask scheduler to run on.
        workers: Runs at a time on this machine, each on one core, or one GPU each.
        dry_run: Print what would run and the time it is estimated to take, and start nothing.
        save_only: Write the results of the runs that are finished, and start nothing.
        results: Folder for the results; by default data/results.
    """
    from entroformer_lib.studies import ablation

    study = ablation.prepare(grids_of(grid, fields, model), terms, out, seeds)
    if dry_run:
        print(ablation.plan_in_words(study))
        return
    outcomes = [] if save_only else study.go(scheduler, workers, lambda outcome: print(outcome, flush=True))
    for path in ablation.save(study, results):
        print(path)
    failed = [outcome.name for outcome in outcomes if outcome.error]
    if failed:
        raise UserError(f"{len(failed)} of {len(study.runs)} runs failed: {', '.join(failed)}.")


@app.command
def explore(
    image: Positional[Path | None] = None,
    output: Output = None,
    model: Model = "tiny-parallel-rates",
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

    With --live the page holds a parallel model itself, and takes any photograph that is dropped on it.

    Example: entroformer explore photo.png -o page.html

    A table: entroformer explore photos/ --table latents.csv

    Args:
        image: The picture; for a table also a folder, or a .txt list of pictures. A live page can do without.
        output: The page; by default beside the picture.
        layer: Layer to begin with; by default the last.
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
    if table is not None:
        if serve or live or output is not None:
            raise UserError("--table writes a table and no page; leave out -o, --live and --serve.")
        _table_of_latents(image, _output(table, image, "", force), model, side, device)
        return
    if output is not None or not serve:
        output = _output(output, image or Path("live"), ".html", force)
    if live:
        _explore_live(image, output, model, serve)
        return
    from entroformer_lib.explorer.effort import effort
    from entroformer_lib.explorer.page import explorer_page, serve_page
    from entroformer_lib.files import write_bytes
    from entroformer_lib.inspection.group_server import server_of
    from entroformer_lib.weights.zoo import reference_of

    picture, loaded = _fitting(image, side), _load(model, device)
    rows = server_of(loaded, picture, reference_of(loaded))
    start = {name: value for name, value in (("layer", layer), ("head", head)) if value is not None}
    rows.check_layer(**{"layer": 0, **start})
    seconds, size = effort(rows)
    print(f"{rows.n:,} latents: about {seconds:.0f} seconds and {size:.1f} MB", file=sys.stderr)
    with _progress() as show:
        page = explorer_page(rows, image.stem, show, **start)
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


def _explore_live(image: Path | None, output: Path | None, model: str, serve: bool) -> None:
    from entroformer_lib.explorer.live import live_page
    from entroformer_lib.explorer.page import serve_page
    from entroformer_lib.files import write_bytes
    from entroformer_lib.weights.zoo import reference_of

    loaded = _load(model, "cpu")
    text = live_page(loaded, image, reference_of(loaded))
    if output is not None:
        write_bytes(output, text.encode())
        print(f"{output}: {len(text) / 1e6:.1f} MB, with the model inside")
    if serve:
        serve_page(text)


@app.command
def data(name: Positional[str], to: Path | None = None) -> None:
    """Fetch a set of test pictures, with checksums; a broken download is continued.

    Sets: samples (scikit-image's, no network needed), kodak, clic2020.

    Example: entroformer data kodak --to pictures/kodak

    Args:
        name: Which set.
        to: The folder; by default pictures/NAME.
    """
    from entroformer_lib.datasets import fetch

    folder = to or Path("pictures") / name
    paths = fetch(name, folder)
    print(f"{len(paths)} pictures in {folder}")


@app.command(name="import-official")
def import_official(
    src: Positional[Path], dst: Positional[Path], force: Force = False, top_k: int | None = None
) -> None:
    """Turn a checkpoint of the authors' released code into weights of this library, without running what is in it.

    Example: entroformer import-official serial-0.02.pth released-serial-0.02.safetensors

    Args:
        src: The checkpoint (.pth), as the authors published it, or a dict of state dicts under the same names.
        dst: The weights (.safetensors).
        top_k: k of the attention, where the checkpoint does not say (state dicts do not); 32 by default.
    """
    _output(dst, dst, "", force)
    from entroformer_lib.weights.official import import_official as write

    write(src, dst, force, top_k)
    print(f"{dst}: {dst.stat().st_size / 1e6:.1f} MB")


@app.command(name="export-onnx")
def export_onnx(model: Positional[Model], folder: Positional[Path], force: Force = False) -> None:
    """Write a model as ONNX graphs: analysis, hyper synthesis, context and synthesis apart, for any height and width.

    Beside them model.json says what else a user of the graphs needs: the config, the medians of z, the lambdas. A model
    of variable rate takes its level as an input; model.json has that of NAME@LAMBDA.

    Example: entroformer export-onnx tiny-rates@0.014 graphs/

    Args:
        folder: Where to write; made where it is not there.
    """
    from entroformer_lib.onnx_export import write

    for path in write(_load(model, "cpu"), folder, force):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


# ---- what the commands share ----


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
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows on a terminal how far the work inside has come, once it takes longer than a second."""
    from tqdm import tqdm

    from entroformer_lib.stages import listening

    with tqdm(delay=1, disable=None, leave=False) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.unit, bar.total = f" {what}", total
            bar.update(done - bar.n)

        with listening(show):
            yield show


def _output(output: Path | None, source: Path, ending: str, force: bool) -> Path:
    """The output as given, or beside the source with another ending."""
    if output is None and not source.name:
        raise UserError(f"'{source}' does not name a file.")
    output = source.with_suffix(ending) if output is None else output
    if output.is_dir():
        raise UserError(f"{output} is a folder; the output must be a file.")
    if output.is_file() and not force:
        raise UserError(f"{output} exists; --force replaces it.")
    if not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent}.")
    return output


def _read(file: Path) -> bytes:
    if file.is_dir():
        raise UserError(f"{file} is a folder, not an .ef file.")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.") from None


def main() -> int:
    """Runs a command. Exit codes: 0 done, 1 a sentence says what is wrong, 2 the command line was not understood."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        if sys.argv[1:] == ["--version"]:
            print(f"entroformer {__version__}")
            return 0
        with _warnings_in_sentences():
            app.cli(prog="entroformer", description=ABOUT, config=(tyro.conf.FlagCreatePairsOff,))
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # who read the output has read enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _fail(f"{error.filename or 'A file'}: {error.strerror or error}.")
    except MemoryError:
        return _fail("The memory of this machine does not suffice.")
    except KeyboardInterrupt:
        return _fail("Stopped.")
    except Exception as error:
        if "allocate" in str(error) and isinstance(error, RuntimeError):  # as torch says that memory is full
            return _fail("The memory of this machine or its GPU does not suffice.")
        if os.environ.get("ENTROFORMER_TRACEBACK"):
            raise
        return _fail(
            f"An error that nobody expected: {type(error).__name__}: {error}\n"
            "Please report it with the command, and with what it prints when ENTROFORMER_TRACEBACK=1 is set."
        )
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
        yield


def _fail(sentence: str) -> int:
    print(f"entroformer: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
