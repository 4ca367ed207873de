"""The measured figures of docs/adworld.md, as Markdown tables.

.venv/bin/python benchmarks/adworld_facts.py --part rates       base rates, other seeds, missing features, small worlds
.venv/bin/python benchmarks/adworld_facts.py --part score       the heavyweight ranker's error and AUC
.venv/bin/python benchmarks/adworld_facts.py --part bilinear    what bilinear forms leave of the true logits
.venv/bin/python benchmarks/adworld_facts.py --part learnable   what LightGBM makes of the features

Without `--part` all of them. `--rows` is the size of the one day that the first three look at; `learnable`, and the
small worlds but for what they change, have the size of the shipped platform.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import shipped_platform
from mtmd_assets.ranker import auc
from mtmd_assets.sources.adworld import CHUNK, Adworld, draw_chunk
from mtmd_assets.sources.adworld_truth import (
    RAPPORT_ACT,
    RAPPORT_CTR,
    Day,
    Logits,
    Requests,
    Rows,
)
from mtmd_assets.sources.adworld_world import (
    CATEGORIES,
    COUNTRIES,
    DEVICES,
    FORMATS,
    LANDING_TYPES,
    LATENT,
)

Matrix = npt.NDArray[np.float64]

SHIPPED = shipped_platform("adworld")
FIRST = SHIPPED.start
SEEDS = range(1, 6)
SMALL_SEEDS = 30
TRAIN_DAYS = 7
TREES, LEAVES = 300, 63


def main() -> None:
    parts: dict[str, Callable[[int], None]] = {
        "rates": rates,
        "score": score,
        "bilinear": bilinear,
        "learnable": lambda _: learnable(),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part", choices=list(parts))
    options = parser.parse_args()
    for name, part in parts.items():
        if options.part in (None, name):
            part(options.rows)


def table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print(f"\n**{title}**\n")
    for cells in (header, ["---"] * len(header), *lines):
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


# -- what several parts read ------------------------------------------------------------------------------------------


def resized(**size: int) -> Platform:
    """The shipped platform with another seed or size."""
    return SHIPPED.model_copy(update={"source": SHIPPED.source.model_copy(update=size)})


def impressions(platform: Platform) -> pl.DataFrame:
    """The impressions of the first day."""
    return honest(Adworld(platform).read(FIRST).impressions)


def honest(log: pl.DataFrame) -> pl.DataFrame:
    """The impressions without the log's defects."""
    return log.unique("impression_id", maintain_order=True).filter(pl.col("surface").is_in(SHIPPED.surfaces))


def scored_impressions(platform: Platform, day: int = 0) -> tuple[pl.DataFrame, float]:
    """Impressions with the last valid score made in time, as the join takes it; and the share that has none."""
    logs = Adworld(platform).read(FIRST + timedelta(day))
    assert logs.scores is not None
    columns = [pl.col(f"score_{t}") for t in platform.task_names]
    valid = pl.all_horizontal((c.is_not_nan() & (c > 0) & (c < 1)).fill_null(True) for c in columns)
    rows = honest(logs.impressions)
    in_time = pl.col("scored_at") - pl.col("ts") <= pl.duration(hours=platform.join.lateness_hours)
    last = logs.scores.filter(valid).join(rows.select("impression_id", "ts"), on="impression_id").filter(in_time)
    last = last.sort("scored_at").unique("impression_id", keep="last").drop("ts")
    joined = rows.join(last, on="impression_id", maintain_order="left")
    return joined, 1 - len(joined) / len(rows)


def slices_of(rows: pl.DataFrame) -> Iterator[tuple[str, str, pl.DataFrame]]:
    for surface, product in SHIPPED.slices:
        yield surface, product, rows.filter(surface=surface, product=product)


def conditional(rows: pl.DataFrame, kind: str, task: str) -> npt.NDArray[np.float64]:
    """P(task | its parent) from unconditional probabilities: `true` or `score`."""
    given = next(t.given for t in SHIPPED.tasks if t.name == task)
    p = rows[f"{kind}_{task}"].to_numpy()
    return p / rows[f"{kind}_{given}"].to_numpy() if given else p


def span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


# -- rates ------------------------------------------------------------------------------------------------------------


def rates(rows: int) -> None:
    day = impressions(resized(rows_per_day=rows))
    base = base_rates(day)
    table(
        f"Base rates: means of the true probabilities, of a child given a click ({rows:,} rows, seed 0)",
        ["slice", "rows", *SHIPPED.task_names],
        (
            [f"{s}, {p}", f"{len(of):,}", *(f"{base[s, p, t]:.1%}" if (s, p, t) in base else "" for t in tasks())]
            for s, p, of in slices_of(day)
        ),
    )
    others = [base_rates(impressions(resized(rows_per_day=rows, seed=seed))) for seed in SEEDS]
    table(
        f"Base rates of seeds {SEEDS[0]} to {SEEDS[-1]}, as a multiple of those of seed 0, over the slices",
        tasks(),
        [[span([o[k] / base[k] for o in others for k in base if k[2] == t]) for t in tasks()]],
    )
    repeats = 1 - day.select("request_id", "item_id").n_unique() / len(day)
    table(
        "Candidates",
        ["shopping ads among all rows", "rows that repeat an ad within their request"],
        [[f"{len(day.filter(product='shopping')) / len(day):.1%}", f"{repeats:.2%}"]],
    )
    alike = pl.col("feature").str.replace(r"_\d$", "_*")
    missing = missing_rates(SHIPPED, day).filter(pl.col("rate") > 0).with_columns(alike)
    table(
        "Features missing where present: the slice that lacks most",
        ["feature", "missing", "max_missing", "limit / missing"],
        (
            [name, f"{rate:.1%}", f"{limit:.0%}", f"{limit / rate:.1f}"]
            for name, rate, limit in missing.group_by("feature", maintain_order=True)
            .agg(pl.col("rate", "limit").max())
            .sort("rate", descending=True)
            .iter_rows()
        ),
    )
    table(
        f"Worlds of {SMALL_SEEDS} (seeds, a day of each) where a slice that the contract judges breaks max_missing",
        ["users", "ads", "rows a day", "worlds"],
        (small_world(**size) for size in SMALL),
    )


SMALL: list[dict[str, int]] = [
    {},
    *({"users": n} for n in (1000, 500, 250)),
    *({"ads": n} for n in (500, 250, 125)),
    *({"rows_per_day": n} for n in (5000, 2500, 1250)),
]


def small_world(**size: int) -> list[str]:
    refused = 0
    for seed in range(SMALL_SEEDS):
        platform = resized(seed=seed, **size)
        found = missing_rates(platform, impressions(platform))
        judged = found.filter(pl.col("rows") >= platform.contract.judged_from)
        refused += judged.filter(pl.col("rate") > pl.col("limit")).height > 0
    s = platform.source
    assert s.kind == "adworld"
    return [f"{s.users:,}", f"{s.ads:,}", f"{s.rows_per_day:,}", str(refused)]


def tasks() -> tuple[str, ...]:
    return SHIPPED.task_names


def base_rates(day: pl.DataFrame) -> dict[tuple[str, str, str], float]:
    """(surface, product, task) -> rate, of the tasks that the slice has."""
    found = {}
    for surface, product, rows in slices_of(day):
        for task in SHIPPED.tasks:
            if (surface, product) in SHIPPED.task_slices[task.name]:
                whole = float(rows[f"true_{task.given}"].sum()) if task.given else len(rows)
                found[surface, product, task.name] = float(rows[f"true_{task.name}"].sum()) / whole
    return found


def missing_rates(platform: Platform, day: pl.DataFrame) -> pl.DataFrame:
    """A row a slice and feature that the slice should have."""
    found = [
        (f.name, len(rows), rows[f.name].null_count() / len(rows), f.max_missing)
        for surface, product, rows in slices_of(day)
        for f in platform.features
        if platform.has(f, surface, product) and len(rows)
    ]
    return pl.DataFrame(found, schema=["feature", "rows", "rate", "limit"], orient="row")


# -- score ------------------------------------------------------------------------------------------------------------


def score(rows: int) -> None:
    scored, without = scored_impressions(resized(rows_per_day=rows))
    title = f"{rows:,} rows, seed 0; {without:.1%} of the impressions have no valid score"

    def error(task: str) -> list[str]:
        known = scored.drop_nulls(f"true_{task}")
        log_error = np.abs(np.log(known[f"score_{task}"].to_numpy() / known[f"true_{task}"].to_numpy()))
        p, truth = conditional(known, "score", task), conditional(known, "true", task)
        logits = np.log(p / (1 - p)) - np.log(truth / (1 - truth))
        return [task, f"{logits.std():.2f}", f"{log_error.mean():.2f}"]

    header = ["task", "sd of the conditional logit's error", "mean abs(ln score - ln truth)"]
    table(f"The ranker's error ({title})", header, map(error, tasks()))

    def areas(task: str) -> list[str]:
        groups = [scored, *(of for _, _, of in slices_of(scored))]
        known = [g.drop_nulls(f"outcome_{task}") for g in groups]
        known = [g for g in known if len(g)]
        outcomes = [g[f"outcome_{task}"].to_numpy() for g in known]
        cells = [task, f"{min(int(y.sum()) for y in outcomes):,}"]
        for kind in ("true", "score"):
            found = [auc(g[f"{kind}_{task}"].to_numpy(), y) for g, y in zip(known, outcomes, strict=True)]
            overall, *within = [a for a in found if a is not None]
            cells += [f"{overall:.3f}", span(within)]
        return cells

    header = ["task", "fewest positives of a slice", "truth", "truth within slices", "score", "score within slices"]
    table(f"AUC against the outcomes, unconditional ({title})", header, map(areas, tasks()))


# -- bilinear ---------------------------------------------------------------------------------------------------------


def bilinear(rows: int) -> None:
    """Least squares of the true logits on every product of a trait of user or request with a trait of the ad."""
    lines = []
    fits = [Fit() for _ in SHIPPED.slices]
    for world, requests, candidates, truth in chunks(rows):
        asks, asks_alone = ask_traits(world, requests)
        ads, ads_alone = ad_traits(world)
        targets = np.stack([truth.ctr, truth.gctr, truth.act], axis=1).astype(np.float64)
        same = world.ads.category[candidates.ad] == requests.category[candidates.request]
        same_by_length = same * np.minimum(requests.length, 5)[candidates.request]
        for cell, fit in enumerate(fits):
            mine = np.flatnonzero(candidates.cell == cell)
            for at in np.array_split(mine, len(mine) // 20_000 + 1):
                ask, ad = candidates.request[at], candidates.ad[at]
                products = (asks[ask][:, :, None] * ads[ad][:, None, :]).reshape(len(at), -1)
                alone = [asks_alone[ask], ads_alone[ad], same_by_length[at, None]]
                fit.add(np.concatenate([products, *alone], axis=1), targets[at])
    for (surface, product), fit in zip(SHIPPED.slices, fits, strict=True):
        left, variance, terms = fit.left()
        # Rapport has variance 1, and all of it is left: it is drawn for each user and advertiser.
        rapport = np.array([RAPPORT_CTR, 0, RAPPORT_ACT]) ** 2 / variance
        shares = [f"{share:.1%} ({part:.1%})" for share, part in zip(left, rapport, strict=True)]
        act = "octr" if product == "standard" else "cvr"
        sd = f"{variance[0] ** 0.5:.2f}"
        lines.append([f"{surface}, {product}", f"{fit.n:,}", f"{terms:,}", sd, *shares, act])
    table(
        "Share of the variance of the true conditional logits that bilinear forms leave, and in brackets what of it is "
        f"rapport ({rows:,} rows, seed 0)",
        ["slice", "rows", "terms", "sd of ctr", "ctr", "gctr", "act", "the act"],
        lines,
    )


class Fit:
    """Least squares from sums over blocks of rows: one matrix of terms, several targets."""

    def __init__(self) -> None:
        self.n = 0
        self.gram: Matrix | float = 0.0
        self.moments: Matrix | float = 0.0
        self.sums: Matrix | float = 0.0
        self.squares: Matrix | float = 0.0

    def add(self, x: Matrix, y: Matrix) -> None:
        self.n += len(x)
        self.gram = self.gram + x.T @ x
        self.moments = self.moments + x.T @ y
        self.sums = self.sums + y.sum(0)
        self.squares = self.squares + (y**2).sum(0)

    def left(self) -> tuple[Matrix, Matrix, int]:
        """Unexplained share of each target's variance, that variance, and how many independent terms there are.

        The residual sum of squares is divided by the degrees of freedom, so that many terms explain nothing by chance.
        """
        gram, moments = np.asarray(self.gram), np.asarray(self.moments)
        norm = np.sqrt(np.diag(gram))
        norm[norm == 0] = 1
        values, vectors = np.linalg.eigh(gram / norm / norm[:, None])
        independent = values > 1e-9 * values[-1]
        along = vectors[:, independent].T @ (moments / norm[:, None])
        residual = np.asarray(self.squares) - (along**2 / values[independent, None]).sum(0)
        variance = (np.asarray(self.squares) - np.asarray(self.sums) ** 2 / self.n) / (self.n - 1)
        terms = int(independent.sum())
        return residual / (self.n - terms) / variance, variance, terms


def chunks(rows: int) -> Iterator[tuple[Day, Requests, Rows, Logits]]:
    """The first day as Adworld.read makes it, before it is logged."""
    source = SHIPPED.source.model_copy(update={"rows_per_day": rows})
    world = Adworld(SHIPPED.model_copy(update={"source": source})).world_of(FIRST)
    for start in range(0, rows, CHUNK):
        _, requests, candidates, (truth, _, _) = draw_chunk(world, start)
        yield world, requests, candidates, truth


def one_hot(codes: npt.NDArray[np.int64], names: Sequence[object]) -> Matrix:
    return np.eye(len(names))[codes]


def ask_traits(world: Day, q: Requests) -> tuple[Matrix, Matrix]:
    """Of every request: what meets the traits of the ad (with a constant), and what is added alone."""
    users = world.users
    of_user = [*users.taste, users.propensity, users.patience, users.commercial, users.wallet]
    numbers = np.stack([*(trait[q.user] for trait in of_user), *q.topic, q.intent], axis=1)
    more = np.stack([q.length, np.log1p(q.depth), q.freshness, q.pin_popularity], axis=1)
    meets = [np.ones((len(numbers), 1)), numbers, one_hot(q.category, CATEGORIES), one_hot(q.device, DEVICES)]
    alone = [numbers**2, more, more**2, one_hot(users.country[q.user], COUNTRIES), one_hot(q.hour, range(24))]
    return np.concatenate(meets, axis=1).astype(np.float64), np.concatenate(alone, axis=1).astype(np.float64)


def ad_traits(world: Day) -> tuple[Matrix, Matrix]:
    """Of every ad: what meets the traits of the request (with a constant), and what is added alone."""
    a = world.ads
    of_ad = [a.quality, a.stickiness, a.usefulness, a.price, a.discount, a.rating, a.stock, a.speed, a.rank]
    numbers = np.stack([*a.content, *of_ad], axis=1)
    meets = [np.ones((len(numbers), 1)), numbers, one_hot(a.category, CATEGORIES), one_hot(a.format, FORMATS)]
    alone = [numbers**2, one_hot(a.landing, LANDING_TYPES)]
    return np.concatenate(meets, axis=1).astype(np.float64), np.concatenate(alone, axis=1).astype(np.float64)


# -- learnable --------------------------------------------------------------------------------------------------------


def learnable() -> None:
    """Trees on every logged feature but ids, and on products of the logged vectors, against ln score."""
    import lightgbm

    days = [scored_impressions(SHIPPED, day)[0] for day in range(TRAIN_DAYS + 1)]
    train, test = pl.concat(days[:-1]), days[-1]
    (x_train, names), (x_test, _) = inputs(train), inputs(test)
    categorical = ["surface", "product", *(f.name for f in SHIPPED.features if f.vocabulary)]
    params = {
        "objective": "regression",
        "learning_rate": 0.1,
        "num_leaves": LEAVES,
        "min_data_in_leaf": 50,
        "feature_fraction": 0.5,
        "seed": 0,
        "deterministic": True,
        "force_row_wise": True,
        # Threads that wait for each other spin: with other work on the machine, one is faster.
        "num_threads": 1 if os.getloadavg()[0] > 1 else min(2, os.cpu_count() or 1),
        "verbosity": -1,
    }
    lines = []
    for task in tasks():
        known, asked = train[f"score_{task}"].is_not_null().to_numpy(), test[f"score_{task}"].is_not_null().to_numpy()
        target = train[f"score_{task}"].log().to_numpy()
        data = lightgbm.Dataset(
            x_train[known], target[known], feature_name=names, categorical_feature=categorical, free_raw_data=True
        )
        booster = lightgbm.train(params, data, TREES)
        predicted = np.full(len(test), np.nan)
        predicted[asked] = booster.predict(x_test[asked], num_threads=params["num_threads"])
        result = test.with_columns(ln=pl.col(f"score_{task}").log(), predicted=predicted)
        explained, logmae, median = [], [], []
        for surface, product in SHIPPED.task_slices[task]:
            of = result.filter(surface=surface, product=product)
            y = of["ln"].to_numpy()
            constant = train.filter(surface=surface, product=product)[f"score_{task}"].log().median()
            assert isinstance(constant, float)
            residual = y - of["predicted"].to_numpy()
            explained.append(1 - (residual**2).mean() / y.var())
            logmae.append(np.abs(residual).mean())
            median.append(np.abs(y - constant).mean())
        lines.append([task, span(explained), span(logmae), span(median)])
    table(
        f"LightGBM, {TREES} trees of {LEAVES} leaves, on ln score: trained on {TRAIN_DAYS} days of {len(days[0]):,} "
        "rows, tested on the next; range over the slices",
        ["task", "share of the variance explained", "LogMAE", "LogMAE of the slice's median"],
        lines,
    )


def inputs(rows: pl.DataFrame) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Surface, product, every feature with a vocabulary or a number, and crosses; missing is NaN."""
    vocabularies = {f.name: list(f.vocabulary) for f in SHIPPED.features if f.vocabulary}
    vocabularies |= {"surface": list(SHIPPED.surfaces), "product": list(SHIPPED.products)}
    products = [pl.col(f"user_taste_{k}") * pl.col(f"ad_content_{k}") for k in range(LATENT)]
    chosen = [
        *(pl.col(c).cast(pl.String).cast(pl.Enum(v)).to_physical() for c, v in vocabularies.items()),
        *(pl.col(f.name) for f in SHIPPED.features if f.kind == "dense"),
        *(p.alias(f"taste_x_content_{k}") for k, p in enumerate(products)),
        pl.sum_horizontal(products, ignore_nulls=False).alias("taste_dot_content"),
        pl.max_horizontal(products).alias("taste_peak_content"),
        *((pl.col(c) == pl.col("ad_category")).alias(f"same_{c}") for c in ("query_category", "pin_category")),
    ]
    frame = rows.select(e.cast(pl.Float32) for e in chosen).fill_null(float("nan"))
    return frame.to_numpy(), frame.columns


if __name__ == "__main__":
    main()
