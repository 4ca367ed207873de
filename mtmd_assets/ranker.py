"""The built-in heavyweight ranker, for logs that have no scores of one: gradient-boosted trees (LightGBM).

One binary model a task, on outcomes: P(task) for a root, P(task | given) for a child, on the rows where the parent
happened. The stored score is the product along the chain: P(task | impression). It reads every feature of the
platform, surface and product, and what no pair of towers can read: counters of pairs of columns (`ranker.cross`).
All counters are of strictly earlier days; it is trained on the outcomes of earlier days and scores only later ones.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mtmd_assets.faults import Withheld
from mtmd_assets.history import Counter, create_counters, create_history, require_days
from mtmd_assets.platform import History, Platform, Ranker
from mtmd_assets.warehouse import Warehouse

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FLOOR = 1e-6
"""Scores lie in [FLOOR, 1 - FLOOR]: the join refuses a score of exactly 0 or 1."""

DELAY = timedelta(minutes=1)
"""`scored_at` - `ts`: a constant, as the ranker runs when the day is built and not when the ad is shown."""


@dataclass(frozen=True)
class TaskInfo:
    """How one task's model came about."""

    rows: int
    """Rows trained on; for a child those where its parent happened."""
    positives: int
    trees: int
    """0: one outcome only was seen, and the score is a constant."""
    constant: float | None
    """The probability, where there are no trees."""
    holdout_auc: float | None
    """Of P(task | given) on the window's last day, before that day was trained on; None if it cannot be told."""
    importance: dict[str, float]
    """Share of the total gain of the 20 columns that have most."""


@dataclass(frozen=True)
class RankerInfo:
    """A trained ranker, as its manifest stores it."""

    version: str
    """A hash of data and parameters."""
    first_day: str
    last_day: str
    params: dict[str, Any]
    columns: tuple[str, ...]
    """Of the input, in order."""
    categories: dict[str, tuple[str, ...]]
    """Categorical columns and their values in the order of their codes."""
    tasks: dict[str, TaskInfo]

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "RankerInfo":
        """Inverse of `asdict`, also after a trip through JSON."""
        return cls(
            **{
                **d,
                "columns": tuple(d["columns"]),
                "categories": {c: tuple(v) for c, v in d["categories"].items()},
                "tasks": {t: TaskInfo(**i) for t, i in d["tasks"].items()},
            }
        )


def ranker_day(platform: Platform, day: date) -> date:
    """The last training day of the ranker that scores `day`: frozen, or the latest refresh before `day`.

    Raises:
        ValueError: if no ranker can score so early a day.
    """
    ranker = _ranker(platform)
    if day < platform.scored_from:
        raise ValueError(
            f"{platform.name}: no ranker scores {day}: the first is trained on the days before {platform.scored_from}"
        )
    first = platform.scored_from - timedelta(1)
    if ranker.refresh_days is None:
        return first
    return first + timedelta((day - platform.scored_from).days // ranker.refresh_days * ranker.refresh_days)


def training_days(platform: Platform, last_day: date) -> list[date]:
    """The days whose outcomes train the ranker of `last_day`, in order."""
    n = _ranker(platform).train_days
    return [last_day - timedelta(n - 1 - i) for i in range(n)]


def train_ranker(
    con: "DuckDBPyConnection", platform: Platform, warehouse: Warehouse, last_day: date, folder: Path
) -> RankerInfo:
    """Train on the outcomes of the `train_days` days that end with `last_day`, and store it in `folder`.

    The number of trees is decided on `last_day` by a model of the days before it; then all days are trained on.
    (A window of one day holds out a fifth of its users instead.) The same data and parameters give the same files.

    Args:
        con: sees the published tables.
        platform: names features, tasks and the ranker's parameters.
        warehouse: says which days are published.
        last_day: see `ranker_day`.
        folder: gets a folder of model texts named by version, and `manifest.json`; one that nobody reads meanwhile.

    Raises:
        Withheld: if a training day, or a day of their look-back, is not published, or no outcome is.
    """
    import lightgbm

    spec = _ranker(platform)
    days = training_days(platform, last_day)
    require_days(platform, warehouse, days[0], last_day, f"the ranker of {last_day}")
    frame = pl.concat([_frame(con, platform, warehouse, d) for d in days])
    columns = _columns(platform)
    categories = {
        c: tuple(
            frame[c].drop_nulls().cast(pl.String).value_counts(sort=False).sort("count", c, descending=[True, False])[c]
        )
        for c in _categorical(platform)
    }
    if len(days) > 1:
        held_out = (frame["ds"] == last_day).to_numpy()
    else:
        held_out = np.array([_fifth(u) for u in frame["user_id"]], dtype=bool)
    x = _matrix(frame, columns, categories)
    params = {
        "objective": "binary",
        "learning_rate": spec.learning_rate,
        "num_leaves": spec.leaves,
        "min_data_in_leaf": spec.min_leaf,
        "feature_fraction": 0.5,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        # Random thresholds: they overfit less to the days trained on, and what they predict is smoother.
        "extra_trees": True,
        "lambda_l2": 10.0,
        "cat_smooth": 20.0,
        "cat_l2": 20.0,
        "max_cat_threshold": 16,
        "min_data_per_group": 100,
        "seed": spec.seed,
        "deterministic": True,
        "force_row_wise": True,
        # Small data leave threads waiting for each other, and a waiting thread spins, which is dear on a busy machine.
        "num_threads": 1 if len(frame) < 300_000 else 2,
        "verbosity": -1,
    }
    digest = hashlib.sha256(json.dumps([platform.name, spec.trees, params, columns, categories]).encode())
    digest.update(np.ascontiguousarray(x).tobytes())
    texts: dict[str, str] = {}
    tasks: dict[str, TaskInfo] = {}
    for task in platform.tasks:
        outcome = frame[f"outcome_{task.name}"]
        use = outcome.is_not_null()
        if task.given:
            use &= (frame[f"outcome_{task.given}"] == 1).fill_null(False)
        chosen = use.to_numpy()
        y = outcome.fill_null(0).to_numpy().astype(np.float32)
        digest.update(np.where(chosen, y, -1).tobytes())
        rows, positives = int(chosen.sum()), int(y[chosen].sum())
        if rows == 0:
            raise Withheld(
                f"{platform.name}: no observed outcome of {task.name} in {days[0]} to {last_day}, "
                f"so that no ranker can be trained: publish impressions with outcomes"
            )
        if positives in (0, rows):
            # Laplace's rule: an outcome never seen is not impossible.
            tasks[task.name] = TaskInfo(rows, positives, 0, (positives + 1) / (rows + 2), None, {})
            continue

        def dataset(mask: np.ndarray, y: np.ndarray = y) -> Any:
            return lightgbm.Dataset(x[mask], y[mask], feature_name=columns, categorical_feature=list(categories))

        trees, held_auc = min(100, spec.trees), None
        early, late = chosen & ~held_out, chosen & held_out
        if 0 < y[early].sum() < early.sum() and 0 < y[late].sum() < late.sum():
            train = dataset(early)
            booster = lightgbm.train(
                params,
                train,
                spec.trees,
                valid_sets=[lightgbm.Dataset(x[late], y[late], reference=train)],
                callbacks=[lightgbm.early_stopping(50, verbose=False)],
            )
            trees = max(booster.best_iteration, 1)
            held_auc = auc(np.asarray(booster.predict(x[late], num_iteration=trees)), y[late])
        booster = lightgbm.train(params, dataset(chosen), trees)
        texts[task.name] = booster.model_to_string()
        gain = pl.DataFrame({"column": columns, "gain": booster.feature_importance("gain")}).sort(
            "gain", descending=True
        )
        importance = {c: round(g / max(gain["gain"].sum(), 1e-9), 4) for c, g in gain.head(20).iter_rows()}
        tasks[task.name] = TaskInfo(rows, positives, trees, None, held_auc, importance)
    version = digest.hexdigest()[:12]
    info = RankerInfo(version, days[0].isoformat(), last_day.isoformat(), params, tuple(columns), categories, tasks)
    _store(info, texts, folder)
    return info


def load_ranker(folder: Path) -> tuple[RankerInfo, dict[str, Any]]:
    """A stored ranker: its manifest and its LightGBM booster a task (none where the score is a constant).

    Raises:
        Withheld: if none is stored in `folder`.
    """
    import lightgbm

    try:
        info = RankerInfo.from_dict(json.loads((folder / "manifest.json").read_text()))
        files = {t: folder / info.version / f"{t}.txt" for t, i in info.tasks.items() if i.constant is None}
        return info, {t: lightgbm.Booster(model_str=f.read_text()) for t, f in files.items()}
    except FileNotFoundError as e:
        raise Withheld(f"no trained ranker in {folder}: build the ranker first") from e


def score_day(
    con: "DuckDBPyConnection", platform: Platform, warehouse: Warehouse, day: date, folder: Path
) -> pl.DataFrame:
    """The ranker's scores of every published impression of `day`: the columns of `heavyweight_scores`.

    `score_<task>` is P(task | impression), strictly inside (0, 1), never above its parent's, and null where the task
    does not exist. Nothing of `day`'s outcomes is read.

    Args:
        con: sees the published tables.
        platform: names features and tasks.
        warehouse: says which days are published.
        day: later than the ranker's last training day.
        folder: where `train_ranker` stored it.

    Raises:
        Withheld: if the day, a day of its look-back, or the ranker is missing.
        ValueError: if the ranker was trained on outcomes of `day` or later, or on other columns.
    """
    info, boosters = load_ranker(folder)
    if day <= date.fromisoformat(info.last_day):
        raise ValueError(
            f"{platform.name}: the ranker {info.version} knows outcomes up to {info.last_day}; it may not score {day}"
        )
    if list(info.columns) != _columns(platform):
        raise ValueError(
            f"{platform.name}: the ranker {info.version} was trained on other columns: build the ranker again"
        )
    require_days(platform, warehouse, day, day, f"scoring {day}")
    frame = _frame(con, platform, warehouse, day)
    x = _matrix(frame, list(info.columns), info.categories)
    scores: dict[str, np.ndarray] = {}
    for task in platform.tasks:
        constant = info.tasks[task.name].constant
        if constant is None:
            p = np.asarray(boosters[task.name].predict(x, num_threads=1)) if len(x) else np.zeros(0)
        else:
            p = np.full(len(x), constant)
        if task.given:
            p = p * scores[task.given]
        p = np.clip(p, FLOOR, 1 - FLOOR)
        scores[task.name] = np.minimum(p, scores[task.given]) if task.given else p
    out = frame.select(
        "impression_id",
        (pl.col("ts") + DELAY).alias("scored_at"),
        pl.lit(info.version).alias("ranker_version"),
        "surface",
        "product",
        *(pl.Series(f"score_{t}", p) for t, p in scores.items()),
    )
    exists = {
        t: pl.concat_str("surface", pl.lit("/"), "product").is_in([f"{s}/{p}" for s, p in slices])
        for t, slices in platform.task_slices.items()
    }
    masked = (pl.when(exists[t]).then(f"score_{t}").alias(f"score_{t}") for t in platform.task_names)
    return out.with_columns(*masked).drop("surface", "product")


def day_auc(con: "DuckDBPyConnection", platform: Platform, day: date, scores: pl.DataFrame) -> pl.DataFrame:
    """How well scores of `day` rank its outcomes: one row a task and slice, and a task overall (slice null).

    Columns: `surface, product, task, rows, positives, auc`; `auc` is null where one outcome only was seen. Both score
    and outcome are unconditional: P(task | impression) against "the task happened".
    """
    names = platform.task_names
    columns = ", ".join(["impression_id", "surface", "product", *(f"outcome_{t}" for t in names)])
    frame = (
        con.sql(f"SELECT {columns} FROM impressions WHERE ds = DATE '{day}'")
        .pl()
        .join(scores, on="impression_id", how="inner")
    )
    rows: list[tuple[str | None, str | None, str, int, int, float | None]] = []
    groups: list[tuple[tuple[Any, ...], pl.DataFrame]] = [((None, None), frame)]
    groups += sorted(frame.group_by("surface", "product"))
    for (surface, product), group in groups:
        for t in names:
            known = group.select(f"score_{t}", f"outcome_{t}").drop_nulls()
            y = known[f"outcome_{t}"].to_numpy()
            if len(y):
                rows.append((surface, product, t, len(y), int(y.sum()), auc(known[f"score_{t}"].to_numpy(), y)))
    texts, counts = (
        dict.fromkeys(("surface", "product", "task"), pl.String),
        dict.fromkeys(("rows", "positives"), pl.Int64),
    )
    return pl.DataFrame(rows, schema={**texts, **counts, "auc": pl.Float64}, orient="row")


def auc(scores: np.ndarray, outcomes: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative, ties counted half; None without both.

    By ranks (Mann-Whitney): (sum of the positives' ranks - n1 (n1 + 1) / 2) / (n1 n0), equal scores sharing their
    mean rank.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 1, 0, 1]))
    0.875
    """
    positive = np.asarray(outcomes) == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0:
        return None
    ranks = pl.Series(np.asarray(scores, dtype=np.float64)).rank("average").to_numpy()
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


# -- input ---------------------------------------------------------------------------------------------------------


def _ranker(platform: Platform) -> Ranker:
    if platform.ranker is None:
        raise ValueError(f"{platform.name}: the platform file has no ranker")
    return platform.ranker


def _categorical(platform: Platform) -> list[str]:
    """Columns LightGBM reads as categories; those with an open-ended vocabulary become counters."""
    return ["surface", "product", *(f.name for f in platform.features if f.vocabulary is not None)]


def _columns(platform: Platform) -> list[str]:
    """The input's columns, in order."""
    numbers = [f.name for f in platform.features if f.kind == "dense"]
    return _categorical(platform) + numbers + [c.name for c in _counters(platform)]


def _counters(platform: Platform) -> list[Counter]:
    """Impressions and outcome rates of earlier days, of ids, open-ended categorical features and pairs of columns."""
    spec = _ranker(platform)
    open_ended = [f.name for f in platform.features if f.kind == "categorical" and f.vocabulary is None]
    entities: list[tuple[str, ...]] = [("user_id",), ("item_id",), *((c,) for c in open_ended), *spec.cross]
    counters = []
    for by in dict.fromkeys(entities):
        # A pair has few rows, so that a strong prior would hide them.
        prior = 20.0 if len(by) == 1 else 3.0
        name = "past_" + "_x_".join(by)
        counters.append(Counter(name, History(by=by, of="impressions", days=spec.history_days)))
        for t in platform.tasks:
            h = History(by=by, of=t.name, per=t.given or "impressions", days=spec.history_days, prior=prior)
            counters.append(Counter(f"{name}_{t.name}", h))
    return counters


def _frame(con: "DuckDBPyConnection", platform: Platform, warehouse: Warehouse, day: date) -> pl.DataFrame:
    """A day's published impressions with their features, history and counters, in the order of `impression_id`."""
    create_history(con, platform, warehouse, day)
    create_counters(con, platform, warehouse, day, _counters(platform), table="ranker_counters")
    result = con.sql(
        f"""SELECT * FROM (SELECT * FROM impressions WHERE ds = DATE '{day}')
            JOIN history USING (impression_id) JOIN ranker_counters USING (impression_id)
            ORDER BY impression_id"""
    ).pl()
    con.execute("DROP TABLE history; DROP TABLE ranker_counters")
    return result


def _matrix(frame: pl.DataFrame, columns: list[str], categories: dict[str, tuple[str, ...]]) -> np.ndarray:
    """The input as float32, missing as NaN; a category that training never saw is missing."""

    def coded(column: str) -> pl.Expr:
        values = categories[column]
        text = pl.col(column).cast(pl.String)
        return text.replace_strict(list(values), list(range(len(values))), default=None, return_dtype=pl.Float32)

    chosen = (coded(c) if c in categories else pl.col(c).cast(pl.Float32) for c in columns)
    return frame.select(chosen).fill_null(float("nan")).to_numpy()


def _fifth(user: object) -> bool:
    return int(hashlib.sha256(str(user).encode()).hexdigest(), 16) % 5 == 0


def _store(info: RankerInfo, texts: dict[str, str], folder: Path) -> None:
    """Model texts first, under their version's name; then the manifest that points at them."""
    (folder / info.version).mkdir(parents=True, exist_ok=True)
    for task, text in texts.items():
        (folder / info.version / f"{task}.txt").write_text(text)
    (folder / "manifest.json").write_text(json.dumps(asdict(info), indent=1))
