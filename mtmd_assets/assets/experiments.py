"""Experiments: MTMD, its contenders and its ablations trained on the same windows and seeds.

A partition is an evaluation day D: every model is trained on the window that ends on D-1, as the daily one is, and
scores D. Models that are trained already, by the same code on the same data, are not trained again, so that an
interrupted run goes on where it stopped; nor are those whose record is there (`training_record`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, timedelta

import dagster as dg
from pydantic import Field

from mtmd_assets import training_record
from mtmd_assets.assets.common import DayReport, Done, Result, asset_key, daily_partitions, printed_log
from mtmd_assets.assets.experiment_scoring import TABLES, Trained, jobs_of, score_day, scored_data_of
from mtmd_assets.contenders import CONTENDERS, MODELS
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.runs import sign
from mtmd_assets.training_pool import TrainJob, train_all
from mtmd_assets.windows import verify_window


class ExperimentConfig(dg.Config):
    """What to train."""

    models: list[str] = Field(default=list(CONTENDERS))
    """Names in `contenders.MODELS`, mtmd being trained beside them; what is published of others, and of further seeds, stays if they would
    be trained the same today, and scored on the same rows."""
    seeds: int = 0
    """How many; 0 is what the platform file says."""
    workers: int = 0
    """Models trained at a time, each on one thread; 0 is the number of cores."""


def experiment_assets(site: Site) -> dg.AssetsDefinition:
    """The multi-asset of the experiments' tables."""
    platform = site.platform
    before = dg.TimeWindowPartitionMapping(start_offset=-platform.training.window_days, end_offset=0)
    group = f"{platform.name}_experiments"

    @dg.multi_asset(
        name=op_name(site),
        specs=[
            dg.AssetSpec(
                asset_key(platform, table),
                deps=[dg.AssetDep(asset_key(platform, "joined_examples"), partition_mapping=before)],
                description=description,
                group_name=group,
                kinds={"pytorch", "parquet"},
                skippable=True,
            )
            for table, description in TABLES.items()
        ],
        partitions_def=daily_partitions(platform),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def experiments(context: dg.AssetExecutionContext, config: ExperimentConfig) -> Iterator[Result]:
        sign(context)
        report = DayReport(context, platform)
        run_experiments(context, site, config, report)
        yield from report.results()
        report.raise_failures()

    return experiments


def op_name(site: Site) -> str:
    """The step that takes an `ExperimentConfig`; a job's name would be taken."""
    return f"{site.platform.name}_train_and_score"


def run_experiments(context: dg.AssetExecutionContext, site: Site, config: ExperimentConfig, report: DayReport) -> None:
    """Train what is missing for all days of the run, so that no core waits at the end of each; then score day by day.

    A day of which a window's day, or the day itself, is not published fails by itself.

    Raises:
        dagster.Failure: an unknown model.
    """
    unknown = [m for m in config.models if m not in MODELS]
    if unknown:
        raise dg.Failure(f"models: {unknown} are none of {', '.join(MODELS)}", allow_retries=False)
    platform = site.platform
    windows: dict[date, list[date]] = {}
    for day in map(date.fromisoformat, context.partition_keys):
        if day < platform.first_evaluated:
            context.log.info(f"{day}: nothing to do, the first model can score {platform.first_evaluated}")
            continue
        window = platform.window(day - timedelta(1))
        try:
            verify_window(site, [*window, day])
            windows[day] = window
        except Withheld as e:
            report.fail(day, e)
    models = list(dict.fromkeys(["mtmd", *config.models]))
    seeds = range(config.seeds or platform.experiments.seeds)
    log = printed_log(context)
    trained = train_models(site, windows, models, seeds, config.workers, log)
    for day, window in windows.items():
        if not any(t.model == "mtmd" for t in trained[day]):
            report.fail(day, Withheld(f"every training of mtmd on the window to {window[-1]} diverged"))
            continue
        try:
            metadata = score_day(site, window, day, trained[day], context.run.run_id, log)
        except Withheld as e:
            report.fail(day, e)
            continue
        seen = {"models": ", ".join(models), "seeds": len(seeds)}
        report.add(day, [Done({table: {**seen, **of_table} for table, of_table in metadata.items()})])


def train_models(
    site: Site,
    windows: Mapping[date, Sequence[date]],
    models: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    log: Callable[[str], None],
) -> dict[date, list[Trained]]:
    """Every model with every seed on each day's window, the last day of which decides when to stop; by day, without
    those that diverged.
    """
    jobs = {
        day: jobs_of(site, window, [(m, seed) for seed in seeds for m in models]) for day, window in windows.items()
    }
    recorded = {name for day, of_day in jobs.items() for name in _recorded(site, day, list(of_day.values()))}
    # seed by seed, so that what an interrupted run leaves is whole tables of fewer seeds
    every = [jobs[day][model, seed] for seed in seeds for day in windows for model in models]
    todo = [job for job in every if not (job.finished or job.name in recorded)]
    log(f"{len(every) - len(todo)} of {len(every)} models are trained already")
    train_all(todo, workers, log)
    usable = recorded | {job.name for job in every if job.trained}
    for job in every:
        if job.name not in usable:
            log(f"{job.name} is left out: it diverged, {job.diverged.read_text().strip()}")
    return {
        day: [Trained(model, seed, job.name, job.folder) for (model, seed), job in of_day.items() if job.name in usable]
        for day, of_day in jobs.items()
    }


def _recorded(site: Site, day: date, jobs: Sequence[TrainJob]) -> list[str]:
    """Names of the trainings that have a record of the day's rows as they are now."""
    candidates = [job for job in jobs if training_record.path_of(job.folder).is_file()]
    scored = scored_data_of(site, day) if candidates else ""
    return [job.name for job in candidates if training_record.is_of(job.folder, scored)]
