"""The built-in heavyweight ranker's two stages: train it on its days, score later ones."""

from datetime import date, timedelta
from pathlib import Path

import dagster as dg

from mtmd_assets import ranker
from mtmd_assets.assets.common import Done, asset_key, preview
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.markdown import markdown_table
from mtmd_assets.warehouse import Stage

MODEL = ("heavyweight_ranker",)


def specs(site: Site) -> list[dg.AssetSpec]:
    """The ranker, and the scores it makes."""
    platform = site.platform
    return [
        dg.AssetSpec(
            asset_key(platform, "heavyweight_ranker"),
            deps=[asset_key(platform, "impressions")],
            description="Gradient-boosted trees on the outcomes of earlier days; the partition is its last training day.",
            group_name=platform.name,
            kinds={"lightgbm"},
            skippable=True,
        ),
        dg.AssetSpec(
            asset_key(platform, "heavyweight_scores"),
            deps=[asset_key(platform, "impressions"), asset_key(platform, "heavyweight_ranker")],
            description="The ranker's scores, a row an impression; strictly later days than it was trained on.",
            group_name=platform.name,
            kinds={"duckdb", "parquet"},
            skippable=True,
        ),
    ]


def train(site: Site, day: date, stage: Stage) -> Done | None:
    """Train and stage the ranker whose last day is `day`; None where no ranker's window ends on it.

    Raises:
        Withheld: if a day it needs is not published.
    """
    platform = site.platform
    following = day + timedelta(1)
    if following < platform.scored_from or ranker.ranker_day(platform, following) != day:
        return None
    with stage.connect() as con:
        info = ranker.train_ranker(con, platform, stage, day, stage.draft / "ranker")
    stage.add(stage.draft / "ranker", _folder(site, day))
    tasks = [(t, i.rows, i.positives, i.trees, i.holdout_auc) for t, i in info.tasks.items()]
    importance = {t: sorted(i.importance.items(), key=lambda kv: -kv[1])[:10] for t, i in info.tasks.items()}
    top = [
        (n + 1, *(f"{names[n][0]} {names[n][1]:.1%}" if n < len(names) else "" for names in importance.values()))
        for n in range(10)
    ]
    return Done(
        {
            "heavyweight_ranker": {
                "version": info.version,
                "trained on": f"{info.first_day} to {info.last_day}",
                "tasks": dg.MetadataValue.md(
                    markdown_table(("task", "rows", "positives", "trees", f"AUC on {day}, held out"), tasks)
                ),
                "importance": dg.MetadataValue.md(markdown_table(("", *importance), top)),
            }
        }
    )


def score(site: Site, day: date, stage: Stage) -> Done | None:
    """Stage the ranker's scores of a day; None for days within its training window.

    Raises:
        Withheld: if the day's impressions or the ranker are missing.
    """
    platform = site.platform
    if day < platform.scored_from:
        return None
    last_day = ranker.ranker_day(platform, day)
    folder = _folder(site, last_day)
    if not (folder / "manifest.json").is_file():
        trained = ", ".join(map(str, ranker.training_days(platform, last_day)))
        raise Withheld(
            f"scores need the ranker of {trained}: run {platform.name}_data for these days first", [last_day]
        )
    with stage.connect() as con:
        scores = ranker.score_day(con, platform, stage, day, folder)
        con.register("scores", scores)
        stage.write(con, "heavyweight_scores", day, "FROM scores")
        auc = ranker.day_auc(con, platform, day, scores)
        overall = {row["task"]: row["auc"] for row in auc.filter(auc["surface"].is_null()).iter_rows(named=True)}
        return Done(
            {
                "heavyweight_scores": {
                    "dagster/row_count": len(scores),
                    "ranker trained through": str(last_day),
                    **{f"AUC {t}": a for t, a in overall.items() if a is not None},
                    "AUC against the day's outcomes": dg.MetadataValue.md(markdown_table(auc.columns, auc.rows())),
                    "preview": preview(con, f"SELECT * FROM heavyweight_scores WHERE ds = '{day}'"),
                }
            }
        )


def _folder(site: Site, last_day: date) -> Path:
    return site.models / "heavyweight_ranker" / last_day.isoformat()
