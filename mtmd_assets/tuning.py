"""The search behind the settings of MTMD and its contenders: the same number of trainings for each.

It starts from what the platform file says of a model. Single changes first, each of one setting, on the last tuning day;
then the best of them joined. The start and the best two are trained for every tuning day with two seeds, and the best mean
is what to take. A trial trains on the days before a tuning day, stops on that day and is judged on it, as the last day of a
window decides when to stop; the tuning days lie before every evaluation day. What is chosen goes into the platform file by
hand, MTMD's into `training`, or into `experiments.mtmd` if the daily model is to be a cheaper one, a contender's into
`experiments.contenders`; the next search starts there, until one finds nothing better.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import ValidationError

from mtmd_assets import model_store, trial_record
from mtmd_assets.contenders import CONTENDERS, Change, change_of, own_settings
from mtmd_assets.faults import UsageError, Withheld
from mtmd_assets.home import Site
from mtmd_assets.markdown import markdown_table
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import in_words
from mtmd_assets.platform_parts import Preset
from mtmd_assets.training_pool import TrainJob, is_current, train_all, training_jobs
from mtmd_assets.windows import verify_window

if TYPE_CHECKING:
    import polars as pl
    from duckdb import DuckDBPyConnection

JUDGED_ROWS = 67
"""Cells with at least this many rows on a tuning day are judged: a third of `improvement.MIN_ROWS`, of three evaluation days."""

JOINED = 5
"""Single changes that are joined at most: the best two, the best three …"""
FINALISTS = 3
"""Trials of a model that go on to the other tuning days and to `SEEDS`: the start, and the best others."""
SEEDS = (0, 1)
START = "platform file"
"""The trial of the settings that a model has now."""

PRESETS: tuple[str, ...] = get_args(Preset)
TRIED: Mapping[str, tuple[float, ...]] = {
    "warmup_share": (0.05, 0.15),
    "gradient_clip": (0.2, 1.0),
    "slice_balance": (0.0, 0.2, 0.5),
    "id_dropout": (0.0, 0.3),
    "main_effects": (False, True),
}
"""Values of a setting: all but the start's are tried, and where the start has none of them all but the last, so that every
model has as many trials."""
FACTORS: Mapping[str, tuple[float, ...]] = {
    "learning_rate": (2 / 3, 3 / 2),
    "embedding_rate": (1 / 3, 3),
    "weight_decay": (1 / 3, 3),
}
"""What a setting of the start is multiplied by."""
NOT_ZERO = 0.03
"""Multiplied instead of zero."""
DROPOUTS = (0.1, 0.0)
"""Tried with plain towers: the first that they do not have."""


def start(platform: Platform, model: str) -> dict[str, Any]:
    """The settings that a model's search starts from: what the platform file has for it in experiments."""
    change = change_of(platform, model)
    return {**platform.training.model_dump(), **change.training, **change.model}


def singles(platform: Platform, model: str) -> dict[str, Mapping[str, Any]]:
    """The first round: what each trial changes of the start, by name; all models have equally many.

    Every model is tried with the other passes of `experiments.tuned_epochs`, and with three changes of size or of what
    only it has (`_own`).
    """
    now = start(platform, model)
    values: dict[str, list[Any]] = {
        name: [_round((now[name] or NOT_ZERO) * by) for by in factors] for name, factors in FACTORS.items()
    }
    for name, tried in TRIED.items():
        values[name] = [v for v in tried if v != now[name]][: len(tried) - 1]
    values["max_epochs"] = [n for n in platform.experiments.tuned_epochs if n != now["max_epochs"]]
    values |= _own(model, now)
    return {START: {}, **{f"{name} {v}": {name: v} for name, tried in values.items() for v in tried}}


def given(platform: Platform, model: str, tries: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """In place of the first round the start and what a person wants to try, each text a change: `setting=value`, several of
    them with spaces between.

    Raises:
        UsageError: what the platform file could not say of the model.
    """
    kind = type(own_settings(platform, model))
    changes: dict[str, Mapping[str, Any]] = {START: {}}
    for text in tries:
        pairs = [pair.partition("=") for pair in text.split()]
        what = f"--try {text!r} of {model}"
        if not pairs or not all(value for _, _, value in pairs):
            raise UsageError(f"{what}: a change is setting=value")
        try:
            settings = kind.model_validate({name: yaml.safe_load(value) for name, _, value in pairs})
        except yaml.YAMLError as e:
            raise UsageError(f"{what}: not YAML: {e}") from None
        except ValidationError as e:
            fault, [name, *_] = in_words(e.errors()[0]), e.errors()[0]["loc"]
            raise UsageError(f"{what}: {name}: {fault} (received {fault.received!r})") from None
        changes[text] = settings.given()
        if len(changes[text]) < len(pairs):
            raise UsageError(f"{what}: what is null, or comes twice, changes nothing")
    return changes


def _own(model: str, now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Sizes, and what only this model has to try."""
    sizes = [p for p in PRESETS if p != now["preset"]]
    if model in ("mtmd", "soft_slice_towers"):
        deviation = now["deviation"] or NOT_ZERO
        return {"preset": sizes[-1:], "deviation": [_round(deviation * by) for by in (1 / 3, 3)]}
    if model == "mmoe_dcn":
        from mtmd_model.contenders.mmoe_dcn import MMOEConfig

        least = vars(MMOEConfig())
        doubled = {"experts": [2 * now.get("experts", least["experts"])]}
        return {
            "preset": sizes[-1:],
            **doubled,
            "low_rank_layers": [now.get("low_rank_layers", least["low_rank_layers"]) + 1],
        }
    dropout = {"dropout": [v for v in DROPOUTS if v != now["dropout"]][:1]}
    if model == "slice_towers":
        # models that share nothing learn alike whatever their weights in the loss, up to the clip: AdamW divides by them;
        # but each has only its slice's rows of a batch
        return {
            "preset": sizes,
            **dropout,
            "slice_balance": [],
            "batch_size": [by * now["batch_size"] for by in (2, 4)],
        }
    return {"preset": sizes, **dropout}


def _round(value: float) -> float:
    """To two digits."""
    return float(f"{value:.2g}")


def joined(changes: Mapping[str, Mapping[str, Any]], ranked: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The second round: the best change joined with the next best, then with the next but one too, up to `JOINED`; no two
    are of one setting.

    Args:
        changes: the first round's.
        ranked: their names, best first.
    """
    best: list[str] = []
    for name in ranked:
        taken = {setting for other in best for setting in changes[other]}
        if len(best) < JOINED and changes[name] and taken.isdisjoint(changes[name]):
            best.append(name)
    groups = [best[:size] for size in range(2, len(best) + 1)]
    return {" + ".join(group): {k: v for name in group for k, v in changes[name].items()} for group in groups}


def tune(
    site: Site, models: Sequence[str], workers: int, log: Callable[[str], None], tries: Sequence[str] = ()
) -> "Iterator[pl.DataFrame]":
    """Run the search for some models; after each round all trials so far, one row a training, in the columns of `trials`.

    Args:
        tries: if any, only these changes (`given`) and the start are tried, each on every tuning day with every seed, for
            one training says little; nothing is joined.

    Raises:
        UsageError: as `given`.
        Withheld: a day of a window is not published (`verify_window`), or a tuning day has no cell that is large enough.
    """
    import polars as pl

    platform = site.platform
    days = platform.experiments.tuning_days
    for day in days:
        _require_cells(site, day)
    *others, last = sorted(days)
    changes = {model: given(platform, model, tries) if tries else singles(platform, model) for model in models}
    rows: list[dict[str, Any]] = []

    def run(todo: Sequence[_Trial]) -> None:
        jobs = [_job(site, trial) for trial in todo]
        # two trials may be the same training
        missing = {job.name: job for job in jobs if not (job.finished or trial_record.exists(job))}
        log(f"{len(jobs) - len(missing)} of {len(jobs)} trials are there already")
        train_all(list(missing.values()), workers, log)
        rows.extend(map(_row, todo, jobs))

    def ranked(model: str) -> list[str]:
        """Its trials so far, best first; all of them on the last tuning day with the first seed."""
        return [r["trial"] for r in sorted(rows, key=lambda r: r["logmae"]) if r["model"] == model]

    def trial(model: str, name: str, day: date, seed: int) -> _Trial:
        return _Trial(model, name, day, seed, Change(model).on({**start(platform, model), **changes[model][name]}))

    if tries:
        everywhere = [(day, seed) for day in (last, *others) for seed in SEEDS]
        run([trial(model, name, *when) for when in everywhere for model in models for name in changes[model]])
        yield pl.DataFrame(rows)
        return
    run([trial(model, name, last, SEEDS[0]) for model in models for name in changes[model]])
    yield pl.DataFrame(rows)
    second = {model: joined(changes[model], ranked(model)) for model in models}
    changes = {model: {**changes[model], **second[model]} for model in models}
    run([trial(model, name, last, SEEDS[0]) for model in models for name in second[model]])
    yield pl.DataFrame(rows)
    finalists = [(model, name) for model in models for name in _finalists(ranked(model))]
    again = [(day, seed) for day in (last, *others) for seed in SEEDS if (day, seed) != (last, SEEDS[0])]
    run([trial(model, name, day, seed) for day, seed in again for model, name in finalists])
    yield pl.DataFrame(rows)


def _require_cells(site: Site, day: date) -> None:
    """Withheld where no slice x task of a tuning day has enough rows with a score to judge a trial by."""
    scored = ", ".join(f"count(score_{task})" for task in site.platform.task_names)
    with site.warehouse.connect() as con:
        [(largest,)] = con.execute(
            f"SELECT max(rows) FROM (SELECT greatest({scored}) AS rows FROM joined_examples WHERE ds = ? GROUP BY surface, product)",
            [day],
        ).fetchall()
    if largest is not None and largest < JUDGED_ROWS:
        raise Withheld(
            f"{day}: no slice x task has the {JUDGED_ROWS} rows that trials are judged by, the largest {largest}"
        )


def _finalists(ranked: Sequence[str]) -> list[str]:
    return [START, *[name for name in ranked if name != START][: FINALISTS - 1]]


@dataclass(frozen=True)
class _Trial:
    """One training of the search."""

    model: str
    name: str
    day: date
    seed: int
    change: Change


def trial_window(platform: Platform, day: date) -> list[date]:
    """The days that a trial trains on and the tuning day, on which it stops; a first day's may be short."""
    return [d for d in platform.window(day) if d >= platform.scored_from]


def _job(site: Site, trial: _Trial) -> TrainJob:
    """A trial's training on the days before its tuning day.

    Raises:
        Withheld: as `verify_window`.
    """
    window = trial_window(site.platform, trial.day)
    verify_window(site, window)
    trainings = {f"trial-{trial.model}-{trial.seed}": (trial.change, trial.seed)}
    [job] = training_jobs(site, window, trainings).values()
    return job


def _row(trial: _Trial, job: TrainJob) -> dict[str, Any]:
    """A row of `trials`; the errors of a training that diverged are infinite."""
    about = {
        "model": trial.model,
        "trial": trial.name,
        "seed": trial.seed,
        "training": job.name,
        "config": json.dumps(job.config.to_dict()),
        "window_start": date.fromisoformat(job.manifest["window"][0]),
        "window_end": trial.day,
    }
    if job.diverged.is_file():
        nothing = {"cells": 0, "epochs": 0, "best_epoch": 0, "seconds": 0.0}
        return {**about, "logmae": math.inf, "validation_loss": math.inf, **nothing}
    record = trial_record.read_or_make(job)
    errors = record.of_cells(JUDGED_ROWS)
    return {
        **about,
        "cells": len(errors),
        "logmae": sum(errors) / len(errors),
        "validation_loss": record.validation_loss,
        "epochs": record.epochs,
        "best_epoch": record.best_epoch,
        "seconds": record.seconds,
    }


def published(con: "DuckDBPyConnection", platform: Platform) -> "pl.DataFrame":
    """The table `trials` of the platform's tuning days; those of others are not theirs to be compared with."""
    days = platform.experiments.tuning_days
    query = "SELECT * EXCLUDE ds FROM trials WHERE ds = $last AND list_contains($days, window_end)"
    return con.sql(query, params={"last": max(days), "days": list(days)}).pl()


def current(site: Site, trials: "pl.DataFrame") -> "pl.DataFrame":
    """Rows of `trials` that would be trained alike today: others are of older code, or of other data."""
    import polars as pl

    data = {
        day: model_store.data_hashes(site, trial_window(site.platform, day)) for day in trials["window_end"].unique()
    }
    alike = [
        is_current(r["training"], data[r["window_end"]], site.platform.model_schema, json.loads(r["config"]))
        for r in trials.iter_rows(named=True)
    ]
    return trials.filter(pl.Series(alike, dtype=pl.Boolean))


def ranking(table: "pl.DataFrame") -> str:
    """Every trial in Markdown, best first: the finalists by their mean LogMAE over the tuning days and seeds, the others
    after them by the one that they have."""
    import polars as pl

    days = table["window_end"].unique(maintain_order=True).to_list()
    order = {model: n for n, model in enumerate(("mtmd", *CONTENDERS))}
    of_day = [pl.col("logmae").filter(pl.col("window_end") == day).mean().alias(str(day)) for day in days]
    ranked = (
        table.group_by("model", "trial", maintain_order=True)
        .agg(pl.len().alias("trainings"), *of_day)
        .with_columns(
            pl.col("model").replace_strict(order, return_dtype=pl.Int64).alias("order"),
            pl.mean_horizontal(map(str, days)).alias("mean"),
        )
        .sort("order", "trainings", "mean", descending=[False, True, False])
    )
    rows = [
        [r["model"], r["trial"], str(r["trainings"])]
        + ["" if r[column] is None else f"{r[column]:.4f}" for column in ("mean", *map(str, days))]
        for r in ranked.iter_rows(named=True)
    ]
    return markdown_table(["model", "trial", "trainings", "mean LogMAE", *map(str, days)], rows)
