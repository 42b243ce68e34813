"""A row for each latent of some pictures, for a researcher's own statistics: what `entroformer explore --table` writes.

Columns: picture; row, column (of the latent grid, 16 pixels each); slice (of channels, in a GroupedMixer); step (of the
coder, 0 has no context); bits; alone (of the reference, see `PictureServer`); saved (alone - bits); and for each layer,
as means over its heads, layerN_entropy_bits, layerN_distance_sites and layerN_share_diamond, see `attention.summaries`.
Where a latent has no context no attention predicts it, and these are missing.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from entroformer_lib.errors import StudyError
from entroformer_lib.files import write_bytes
from entroformer_lib.inspection.group_server import server_of
from entroformer_lib.inspection.picture_server import FACTS, PictureServer
from entroformer_lib.studies.attention import summaries
from entroformer_lib.studies.results import save
from entroformer_lib.weights.zoo import reference_of

OF_A_LAYER = ("entropy_bits", "distance_sites", "share_diamond")
SWITCHED_OFF = "this model with its context switched off"


def latent_table(server: PictureServer) -> pd.DataFrame:
    """The rows of one picture, without its name; attention with the model's own k."""
    parts = []
    for queries, probs, lines in server.many(range(server.n * server.slices), server.default_k):
        site, channel_slice = np.divmod(queries, server.slices)
        row, column = np.divmod(site, server.width)
        first = 0 if server.slices == 1 else 2 + len(FACTS) * channel_slice + FACTS.index("bits")
        number = np.arange(len(queries))
        bits, alone = lines[number, first], lines[number, first + 1]
        step = np.array([server.step(query) for query in queries])
        table = {"row": row, "column": column, "slice": channel_slice, "step": step}
        table |= {"bits": bits, "alone": alone, "saved": alone - bits}
        found = summaries(server, queries, np.where(step[:, None, None, None] > 0, probs, np.nan))
        for layer in range(server.layers):
            table |= {f"layer{layer}_{name}": found[name][:, layer].mean(1) for name in OF_A_LAYER}
        parts.append(pd.DataFrame(table))
    return pd.concat(parts, ignore_index=True)


def save_latents(path: Path, model, pictures: Iterable[tuple[str, Image.Image]]) -> pd.DataFrame:
    """Writes the rows of some pictures, and beside them FILE.json with what `alone` is and the provenance.

    Args:
        path: .csv or .parquet.
        pictures: name and picture (RGB).

    Raises:
        StudyError: another ending, or nothing here that writes Parquet.
        AttentionError: a model without attention.
    """
    check_format(path)
    reference, tables, alone = reference_of(model), [], None
    for name, picture in pictures:
        server = server_of(model, picture, reference)
        alone = server.reference_name or (SWITCHED_OFF if server.family == "rows" else None)
        table = latent_table(server)
        table.insert(0, "picture", name)
        tables.append(table)
    whole, file = pd.concat(tables, ignore_index=True), io.BytesIO()
    if path.suffix == ".csv":
        whole.to_csv(file, index=False, float_format="%.6g")
    else:
        whole.to_parquet(file, index=False)
    names = [table["picture"][0] for table in tables]
    write_bytes(path, file.getvalue())
    save(path.with_name(f"{path.name}.json"), {"alone": alone, "level": model.level, "images": names}, model)
    return whole


def check_format(path: Path) -> None:
    """Refuses a file that could not be written, before any work.

    Raises:
        StudyError: neither .csv nor .parquet, or nothing here that writes Parquet.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise StudyError(f"A table is a .csv or a .parquet file, and {path.name} is neither.")
    if path.suffix == ".parquet":
        try:
            pd.DataFrame({"bits": [0.0]}).to_parquet(io.BytesIO())
        except ImportError:
            raise StudyError(
                "Parquet files take pyarrow, which cannot be imported here; a .csv file takes nothing."
            ) from None
