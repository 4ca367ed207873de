"""`mtmd results` and `mtmd tune`: the experiments of a platform from its logs to `docs/results.md`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from mtmd_assets.contenders import ABLATIONS, CONTENDERS, MODELS, takes_nothing
from mtmd_assets.faults import PlatformError, UsageError
from mtmd_assets.home import Site
from mtmd_assets.in_process import RunFailed

if TYPE_CHECKING:
    import polars as pl

Run = Callable[..., None]
"""As `in_process.Run`, for tests to stand in."""
Step = Callable[[str], AbstractContextManager[None]]


def evaluation_days(site: Site) -> list[date]:
    """The days that results are evaluated on: up to `experiments.last_day`, or else to the last of a log that has ended,
    or else the first that a model can score.

    Raises:
        PlatformError: fewer days than the platform file asks for, or a tuning day among them.
    """
    platform, count = site.platform, site.platform.experiments.days
    first = platform.first_evaluated
    last = platform.experiments.last_day or platform.end or first + timedelta(count - 1)
    days = [last - timedelta(n) for n in reversed(range(count))]
    if days[0] < first:
        raise PlatformError(
            f"{platform.name}: experiments.days is {count}, but a model can score {first} to {last} only"
        )
    late = [d for d in platform.experiments.tuning_days if d >= days[0]]
    if late:
        raise PlatformError(f"{platform.name}: experiments.tuning_days {late[0]} is not before the evaluation days")
    return days


def chosen(names: str) -> list[str]:
    """Models by name: a comma-separated list, in which `all`, `contenders` and `ablations` stand for many.

    Raises:
        UsageError: an unknown name.
    """
    groups = {"all": MODELS, "contenders": CONTENDERS, "ablations": tuple(ABLATIONS)}
    found = [m for name in names.split(",") for m in groups.get(name, (name,))]
    unknown = [m for m in found if m not in MODELS]
    if unknown:
        raise UsageError(f"--models: {unknown[0]!r} is none of {', '.join([*groups, *MODELS])}")
    return list(dict.fromkeys(found))


def build_lacking(site: Site, first: date, last: date, run: Run, step: Step) -> None:
    """`build` the examples of `first` to `last` if any are not there."""
    if _lacking(site, first, last):
        with step(f"build and check the days {site.platform.built_from(first)} to {last}"):
            build(site, first, last, run)


def build(site: Site, first: date, last: date, run: Run) -> None:
    """Build the examples of the days from `first` to `last` that can have some, in one run, with earlier days that they read.

    An earlier day that fails stops nothing if these days have all that they need.

    Raises:
        UsageError: the last of them has not ended.
        in_process.RunFailed: some of them are not there after it.
    """
    platform = site.platform
    if last >= datetime.now(ZoneInfo(platform.time_zone)).date():
        raise UsageError(f"{platform.name}: {last} is needed, and has not ended yet")
    try:
        run("data", platform.built_from(first), last)
    except RunFailed:
        if _lacking(site, first, last):
            raise
        print(f"    {first} to {last} are there all the same", flush=True)


def _lacking(site: Site, first: date, last: date) -> list[date]:
    return site.warehouse.missing("joined_examples", max(first, site.platform.scored_from), last)


def results(site: Site, models: Sequence[str], document: Path, run: Run, step: Step, seeds: int | None = None) -> int:
    """Train and score every model on its evaluation days, compare them, write the document, print the headline.

    Args:
        seeds: how many of each model, at least; what the platform file says if None.

    Raises:
        UsageError: no model beside mtmd, fewer than one seed, a document that is not of results, or as `build`.
        PlatformError: as `evaluation_days`.
    """
    from mtmd_assets.assets.experiments import op_name
    from mtmd_assets.assets.improvements import compared_days
    from mtmd_assets.results import comparison
    from mtmd_assets.results.document import require_results, write_sections
    from mtmd_assets.results.result import compared, headline

    days = evaluation_days(site)
    others = [m for m in models if m != "mtmd"]
    if not others:
        raise UsageError("--models: mtmd is compared with others, name one")
    if seeds is None:
        seeds = site.platform.experiments.seeds
    if seeds < 1:
        raise UsageError(f"--seeds must be 1 or more, got {seeds}")
    require_results(document)
    idle = [m for m in others if takes_nothing(site.platform, m)]
    if idle:
        print(f"{', '.join(idle)}: without what {site.platform.name} does not have, left out", flush=True)
    build_lacking(site, site.platform.window(days[0] - timedelta(1))[0], days[-1], run, step)
    # what is compared first is written down first, for the ablations take the longest
    for group in (CONTENDERS, ABLATIONS):
        of_group = [m for m in others if m in group and m not in idle]
        if not of_group:
            continue
        days_of_group = compared_days(site.platform, of_group[0], days[-1])  # of one group all the same
        first, last = days_of_group[0], days_of_group[-1]
        with step(f"train {1 + len(of_group)} models with {seeds} seeds, score {first} to {last}"):
            config = {"models": of_group, "seeds": seeds}
            run("experiments", first, last, config={"ops": {op_name(site): {"config": config}}})
        with step("compare"):
            run("improvements", days[-1])
        write_sections(document, comparison(site, last))
        print(f"\n{site.platform.name}, {first} to {last}: improvement of mtmd in LogMAE\n")
        print(headline(site, last, of_group))
        found = compared(site, last)
        without = [m for m in of_group if m not in found]
        if without:
            print(f"\nwithout a result, for the reasons above: {', '.join(without)}")
        print(f"\n{document}   every cell, with intervals")
    return 0


def tune(site: Site, models: Sequence[str], document: Path, run: Run, step: Step, tries: Sequence[str] = ()) -> int:
    """Run the search, publish it as `trials` of the last tuning day beside what is there of other models, write and print it;
    of a model that has no trials there yet each round is published when it ends.

    Args:
        tries: if any, only these changes, beside what is there of other trials too (`tuning.given`).

    Raises:
        UsageError: a model that is not searched, a document that is not of results, a platform file without tuning days, or
            as `tuning.given` or `build`.
        PlatformError: as `evaluation_days`.
    """
    from mtmd_assets import tuning
    from mtmd_assets.results.document import require_results, write_sections
    from mtmd_assets.results.search import search

    searched = ("mtmd", *CONTENDERS)
    unknown = [m for m in models if m not in searched]
    if unknown:
        raise UsageError(f"--models: {unknown[0]!r} is not searched, only {', '.join(searched)}")
    require_results(document)
    evaluation_days(site)
    days = sorted(site.platform.experiments.tuning_days)
    if not days:
        raise UsageError(f"{site.platform.name}: the platform file names no experiments.tuning_days, to search on")
    build_lacking(site, site.platform.window(days[0])[0], days[-1], run, step)
    with step(f"try {', '.join(models)}"):
        new = [m for m in models if m not in set(_published_trials(site)["model"])]
        for table in tuning.tune(site, models, 0, lambda line: print(f"    {line}", flush=True), tries):
            if new:
                of_new = table.filter(table["model"].is_in(new))
                write_sections(document, search(site, _publish_trials(site, days[-1], of_new, "model")))
        trials = _publish_trials(site, days[-1], table, "(model, trial)" if tries else "model")
        write_sections(document, search(site, trials))
    print(f"\n{tuning.ranking(trials)}")
    return 0


def _publish_trials(site: Site, day: date, tried: "pl.DataFrame", which: str) -> "pl.DataFrame":
    """Publish trials in place of those published that have the same `which`, a model or a trial of it; all of today's code."""
    published = _published_trials(site)
    with site.warehouse.stage() as stage, site.warehouse.connect() as con:
        con.register("tried", tried)
        con.register("published", published)
        others = f"FROM published WHERE {which} NOT IN (SELECT {which} FROM tried)"
        stage.write(con, "trials", day, f"FROM tried UNION ALL BY NAME {others}")
        stage.publish()
    return _published_trials(site)


def _published_trials(site: Site) -> "pl.DataFrame":
    """Trials of today's code and data that are published."""
    from mtmd_assets import tuning

    with site.warehouse.connect() as con:
        return tuning.current(site, tuning.published(con, site.platform))
