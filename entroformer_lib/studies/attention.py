"""What the heads of the context model look at, and whether attention says what the attended latents are worth in bits.

    python -m entroformer_lib.studies.attention blocks-parallel --images pictures/kodak --limit 12

Two studies on the row server (`inspection.row_server`), which answers for one latent of one picture: `head_profile` and
`attention_against_cost`.

Attended is not the same as useful. The second study therefore hides every attended position in turn, measures what its
absence costs in bits, and asks whether attention has the same order.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from tyro.conf import Positional

from entroformer_lib.errors import StudyError
from entroformer_lib.inspection.picture_server import PictureServer
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.inspection.scene import fitting
from entroformer_lib.studies.commands import at_least, check_place, run
from entroformer_lib.studies.rate_distortion import names_of, pictures_to_test
from entroformer_lib.studies.results import load, provenance, records, result_path, save
from entroformer_lib.weights.zoo import load_model, weights_digest

FAR = 8  # sites; what is farther away counts as long-range: 128 pixels


# ---- what each head looks at ----


def head_profile(model, pictures: Sequence) -> pd.DataFrame:
    """Where each head looks, as a mean over all latents that have context.

    Args:
        pictures: paths or pictures; large ones are scaled down, see `fitting`.

    Returns:
        One row per image, layer and head. Distances are L1, in latent sites (16 pixels), from the token that predicts.
        distance_sites: mean under the attention. entropy_bits: of the row. share_own: attention on the token itself;
        share_diamond: within L1 distance `radius`, itself included; share_far: beyond FAR sites; the rest lies between.
        uniform_distance_sites, uniform_share_diamond, …: what looking at all visible sites alike would give.
        masked_bits and masked_percent: what zeroing the head's output adds to the bits of y.
    """
    rows = []
    for name, server in _servers(model, pictures):
        k, table = server.default_k, _profile_of_picture(server, server.default_k)
        usual = server.total_bits(k)
        for row in table:
            more = server.total_bits(k, (row["layer"], row["head"])) - usual
            row |= {"masked_bits": more, "masked_percent": 100 * more / usual}
        rows += [{"image": name, "k": k, **row} for row in table]
    return pd.DataFrame(rows)


def _profile_of_picture(server: RowServer, k: int | None) -> list[dict]:
    sums: dict[str, np.ndarray] = {}
    sites = server.predicted()
    for part, probs, _ in server.many(sites, k):
        visible = np.stack([server.visible(site) for site in part])[:, None, None]
        alike = summaries(server, part, visible / visible.sum(-1, keepdims=True))
        del alike["entropy_bits"]
        found = summaries(server, part, probs) | {f"uniform_{name}": values for name, values in alike.items()}
        for name, values in found.items():
            sums[name] = sums.get(name, 0) + values.sum(0)  # [layers or 1, heads or 1]
    means = {name: np.broadcast_to(v / len(sites), (server.layers, server.heads)) for name, v in sums.items()}
    return [
        {"layer": layer, "head": head, **{name: float(v[layer, head]) for name, v in means.items()}}
        for layer, head in np.ndindex(server.layers, server.heads)
    ]


def summaries(server: PictureServer, queries: Sequence[int], probs: np.ndarray) -> dict[str, np.ndarray]:
    """distance_sites, share_own, share_diamond, share_far and entropy_bits, see `head_profile`, of each row.

    probs: [q, layers, heads, n]  ->  [q, layers, heads] each
    """
    distance = distances(server, queries)
    measures = {
        "distance_sites": distance,
        "share_own": distance == 0,
        "share_diamond": distance <= server.radius,
        "share_far": distance > FAR,
    }
    found = {name: np.einsum("qlhn,qn->qlh", probs, measure) for name, measure in measures.items()}
    return found | {"entropy_bits": -(probs * np.log2(np.where(probs > 0, probs, 1))).sum(-1)}


def distances(server: PictureServer, queries: Sequence[int]) -> np.ndarray:
    """L1 distance from the token that predicts each query to all sites: [q, n]."""
    rows, columns = np.divmod(np.arange(server.n), server.width)
    origins = np.array([server.origin(query) for query in queries])
    return np.abs(rows - rows[origins, None]) + np.abs(columns - columns[origins, None])


def _servers(model, pictures: Sequence) -> Iterator[tuple[str, RowServer]]:
    paths = [Path(picture) for picture in pictures if isinstance(picture, str | Path)]
    names = names_of(paths) if len(paths) == len(pictures) > 0 else map(str, range(len(pictures)))
    for name, picture in zip(names, pictures, strict=True):
        yield name, RowServer(model, fitting(picture))


# ---- does attention explain the bits? ----


def attention_against_cost(
    model, pictures: Sequence, ks: Sequence[int | None] = (8, 16, 32, 64, None), queries: int = 32, seed: int = 0
) -> pd.DataFrame:
    """Rank correlation of the attention a position receives with the bits that its absence costs.

    For each sampled latent every attended position is hidden in turn, see `RowServer.costs`. Spearman's correlation
    is taken over the positions that some head attends to, for each latent, and then averaged over latents.

    Args:
        ks: None is dense, in the table not a number. The weights stay those trained with the model's own k.
        queries: latents per picture, drawn at random from those with context.

    Returns:
        One row per image, k, layer and head; layer and head -1 stand for the mean attention over all of them. rho: mean
        over latents; rho_std: its spread over latents; rho_magnitude: with the absolute change in bits; rho_nearness
        and rho_magnitude_nearness: the same two with nearness (minus the L1 distance) instead of attention, the same
        for all heads; latents: how many had both ranks; positions: hidden per latent, on average; cost_bits: mean
        cost of one position; saved_bits: bits with the context switched off minus bits with context, mean over the
        latents (no trained reference, see `PictureServer`).
    """
    rows = []
    for name, server in _servers(model, pictures):
        generator = np.random.default_rng(seed)
        sites = generator.choice(server.predicted(), min(queries, len(server.predicted())), replace=False)
        for k in ks:
            rows += [{"image": name, "k": k, **row} for row in _explained(server, np.sort(sites), k)]
    return pd.DataFrame(rows)


def _explained(server: RowServer, sites: np.ndarray, k: int | None) -> list[dict]:
    ranks, per_latent = [], []
    for site in sites.tolist():
        positions, bits = server.costs(site, k)
        probs, facts = server.row_and_facts(site, k)
        maps = [*probs.reshape(-1, server.n), probs.mean((0, 1)), -distances(server, [site])[0]]
        columns = pd.DataFrame([*np.stack(maps)[:, positions], bits, np.abs(bits)]).T
        ranks.append(columns.corr("spearman", min_periods=3).to_numpy()[:-2, -2:])
        saved = facts["alone"] - facts["bits"]
        per_latent.append({"positions": len(positions), "cost_bits": columns.iloc[:, -2].mean(), "saved_bits": saved})
    cost, magnitude = (pd.DataFrame(part) for part in np.moveaxis(np.stack(ranks), -1, 0))  # [latents, maps], each
    table = pd.DataFrame({"rho": cost.mean(), "rho_std": cost.std(ddof=0), "rho_magnitude": magnitude.mean()})
    *_, nearness = table.index
    table = table.assign(
        rho_nearness=table["rho"][nearness],
        rho_magnitude_nearness=table["rho_magnitude"][nearness],
        latents=cost.count(),
        **pd.DataFrame(per_latent).mean(),
    ).drop(index=nearness)
    where = [*np.ndindex(server.layers, server.heads), (-1, -1)]
    return [{"layer": i, "head": j, **row} for (i, j), row in zip(where, table.to_dict("records"), strict=True)]


# ---- saved, with where it comes from ----


def main(
    model: Positional[str],
    images: Path,
    limit: int = 6,
    queries: int = 32,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Saves both studies of a model: {"models": {NAME: {"heads", "explained", "images", "queries", "level",
    "provenance"}}}.

    A file that is there keeps what it holds of other models.

    Args:
        model: A name from `entroformer models`, or a .safetensors file.
        images: Folder of pictures.
        limit: Take only the first so many.
        queries: Latents per picture whose attended positions are hidden in turn.
        seed: Of the choice of latents.
        out: The file; by default data/results/attention.json.
    """
    out = out or result_path("attention")
    at_least(1, queries=queries)
    at_least(0, seed=seed)
    check_place(out)
    before = (load(out) or {"models": {}}).get("models")
    if not isinstance(before, dict) or not all("explained" in saved for saved in before.values()):
        raise StudyError(f"{out} is the result of another study; choose another name.")
    paths = pictures_to_test(images, limit)
    loaded = load_model(model)
    record = provenance(loaded, seed=seed)
    heads = head_profile(loaded, paths)
    print(heads.groupby(["layer", "head"]).mean(numeric_only=True).round(3).to_string(), flush=True)
    explained = attention_against_cost(loaded, paths, queries=queries, seed=seed)
    overall = explained[explained["layer"] == -1].groupby("k", dropna=False)
    print(
        overall[["rho", "rho_std", "rho_magnitude", "rho_nearness", "rho_magnitude_nearness", "cost_bits"]]
        .mean()
        .round(3)
        .to_string()
    )
    result = load(out) or {"models": {}}
    result["models"][loaded.name if loaded.level is None else f"{loaded.name} at level {loaded.level:g}"] = {
        "heads": records(heads),
        "explained": records(explained),
        "images": names_of(paths),
        "queries": queries,
        "level": loaded.level,
        "provenance": record,
    }
    save(out, result)


def read_results(result: str | Path = "attention") -> dict[str, dict]:
    """What `main` has written, by name or file, with tables: {model: {"heads": table, "explained": table,
    "provenance": ...}}; empty where there is nothing."""
    models = (load(result) or {"models": {}})["models"]
    return {
        name: {**m, "heads": pd.DataFrame(m["heads"]), "explained": pd.DataFrame(m["explained"])}
        for name, m in models.items()
    }


def saved_of(model, result: str | Path = "attention") -> dict | None:
    """What `main` has written of a model, found by its weights and level, whatever its name; None where there is
    nothing."""
    digest = weights_digest(model).hex()
    for saved in read_results(result).values():
        if saved["provenance"]["weights_sha256"] == digest and saved.get("level") == model.level:
            return saved
    return None


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
