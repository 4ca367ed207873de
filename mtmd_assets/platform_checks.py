"""What must hold between the parts of a platform file. Every check raises `Fault`."""

from collections.abc import Iterator
from datetime import timedelta

from mtmd_assets.platform import Platform
from mtmd_assets.platform_names import IDS
from mtmd_assets.platform_parts import Fault, Feature, ParquetSource, Task, refuse_duplicates
from mtmd_assets.tables import tables

ENTITIES = {"query": ("user_id", "surface"), "item": ("item_id", "product")}
"""Side -> the columns of every log that belong to it."""


def check(platform: Platform) -> None:
    """All of them.

    Raises:
        Fault: for the first that fails.
    """
    _names(platform)
    _scopes(platform)
    _chain(platform)
    _tasks_everywhere(platform)
    _histories(platform)
    _towers(platform)
    _ranker(platform)
    _columns(platform)
    _dates(platform)
    _time_zone(platform)


def _names(platform: Platform) -> None:
    """No two columns have one name, counters of history included."""
    counts = ["impressions", *platform.task_names]
    counters = {f"{a}_{word}_{b}" for a in counts for b in counts for word in ("of", "for")}
    taken: dict[str, str] = {t.name: "is a task" for t in platform.tasks}
    taken |= {f"outcome_{t.name}": f"holds the outcomes of {t.name}" for t in platform.tasks}
    named = [(f"tasks.{i}.name", t.name) for i, t in enumerate(platform.tasks)]
    columns = [(f"features.{i}.name", f.name) for i, f in enumerate(platform.features)]
    columns += [(f"extras.{name}", name) for name in platform.extras]
    for key, name in columns:
        if name in taken:
            raise Fault(key, f"named twice: {name} {taken[name]}", name)
        taken[name] = "is a column"
    for key, name in named + columns:
        if name in counters:
            raise Fault(key, "that name is taken by a counter of history", name)


def _scopes(platform: Platform) -> None:
    """What tasks and features name as their surfaces or products is there, and nothing is both in and out of scope."""
    parts: tuple[tuple[str, tuple[Task | Feature, ...]], ...] = (
        ("tasks", platform.tasks),
        ("features", platform.features),
    )
    for axis in ("surfaces", "products"):
        known: tuple[str, ...] = getattr(platform, axis)
        for kind, part in parts:
            for i, spec in enumerate(part):
                chosen: tuple[str, ...] | None = getattr(spec, axis)
                if chosen is None:
                    continue
                if not chosen:
                    raise Fault(f"{kind}.{i}.{axis}", f"{spec.name} is nowhere; leave the key out for all", [])
                refuse_duplicates(chosen, f"{kind}.{i}.{axis}.{{}}")
                for value in chosen:
                    if value not in known:
                        raise Fault(f"{kind}.{i}.{axis}", f"not among {list(known)}", value)
        outside: tuple[str, ...] = getattr(platform.out_of_scope, axis)
        refuse_duplicates(outside, f"out_of_scope.{axis}.{{}}")
        for value in outside:
            if value in known:
                raise Fault(f"out_of_scope.{axis}", f"it is in scope, one of {axis}", value)


def _chain(platform: Platform) -> None:
    """Each task's `given` is listed before it and exists wherever it does."""
    by_name = {t.name: t for t in platform.tasks}
    seen: set[str] = set()
    for i, task in enumerate(platform.tasks):
        if task.given is not None:
            key = f"tasks.{i}.given"
            if task.given == task.name:
                raise Fault(key, "a task cannot be given itself", task.given)
            if task.given not in by_name:
                raise Fault(key, f"no such task; there are {list(by_name)}", task.given)
            ancestors = list(_ancestors(task, by_name))
            if task.name in ancestors:
                circle = " -> ".join([task.name, *ancestors[: ancestors.index(task.name) + 1]])
                raise Fault(key, f"tasks are given each other in a circle: {circle}", task.given)
            if task.given not in seen:
                raise Fault(key, f"list that task before {task.name}", task.given)
            outside = set(platform.slices_of(task)) - set(platform.slices_of(by_name[task.given]))
            if outside:
                raise Fault(key, f"{task.name} exists where {task.given} does not: {sorted(outside)}", task.given)
        seen.add(task.name)


def _tasks_everywhere(platform: Platform) -> None:
    """Each surface and product has a task."""
    slices = {slice_ for task in platform.tasks for slice_ in platform.slices_of(task)}
    for n, axis in enumerate(("surfaces", "products")):
        for domain in getattr(platform, axis):
            if not any(slice_[n] == domain for slice_ in slices):
                raise Fault(axis, f"{domain} has no task: let one exist there, or leave it out", domain)


def _ancestors(task: Task, by_name: dict[str, Task]) -> Iterator[str]:
    """The tasks it is given, nearest first, until one comes again."""
    met: set[str] = set()
    given = task.given
    while given in by_name and given not in met:
        yield given
        met.add(given)
        given = by_name[given].given


def _histories(platform: Platform) -> None:
    """A feature from history counts what is logged, by columns of its own side."""
    counts = ("impressions", *platform.task_names)
    for i, f in enumerate(platform.features):
        if f.history is None:
            continue
        for key, value in (("of", f.history.of), ("per", f.history.per)):
            if value is not None and value not in counts:
                raise Fault(f"features.{i}.history.{key}", f"expected one of {list(counts)}", value)
        own = [*ENTITIES[f.side], *(g.name for g in platform.features if not g.history and g.side == f.side)]
        for n, column in enumerate(f.history.by):
            if column not in own:
                problem = f"{'an' if f.side == 'item' else 'a'} {f.side} feature's history is by any of {own}"
                raise Fault(f"features.{i}.history.by.{n}", problem, column)


def _towers(platform: Platform) -> None:
    """Each domain of a tower has a feature."""
    for side, domains in (("query", platform.surfaces), ("item", platform.products)):
        features = [f for f in platform.features if f.side == side]
        for domain in domains:
            if not any(domain in (f.surfaces or f.products or domains) for f in features):
                where = f"{'surface' if side == 'query' else 'product'} {domain}"
                names = [f.name for f in features]
                raise Fault("features", f"the {side} tower has none for {where}: add a feature of side {side}", names)


def _ranker(platform: Platform) -> None:
    """It is there where it is needed and only there, and crosses columns that name entities."""
    if platform.ranker is None:
        if not platform.logs_scores:
            raise Fault("ranker", "needed, for the source has no heavyweight scores; `ranker: {}` will do", None)
        return
    if platform.logs_scores:
        given = platform.ranker.model_dump(mode="json", exclude_unset=True)
        raise Fault("ranker", "it would be ignored, for the source has heavyweight scores", given)
    known = [*ENTITIES["query"], *ENTITIES["item"], *(f.name for f in platform.features if not f.history)]
    pairs = []
    for i, pair in enumerate(platform.ranker.cross):
        for n, column in enumerate(pair):
            if column not in known:
                raise Fault(f"ranker.cross.{i}.{n}", f"no such column; there are {known}", column)
        if pair[0] == pair[1]:
            raise Fault(f"ranker.cross.{i}", "a column is crossed with another one", list(pair))
        pairs.append(tuple(sorted(pair)))
    refuse_duplicates(pairs, "ranker.cross.{}")


def _columns(platform: Platform) -> None:
    """`source.columns` renames columns that are read, and no column of theirs is two of ours, copies of ids apart."""
    source = platform.source
    if not isinstance(source, ParquetSource):
        return
    read = {"impressions": [*tables(platform)["impressions"], "ds"]}
    if source.heavyweight_scores is not None:
        read["heavyweight_scores"] = list(tables(platform)["heavyweight_scores"])
    known = list(dict.fromkeys(c for columns in read.values() for c in columns))
    for ours, theirs in source.columns.items():
        if ours not in known:
            raise Fault(f"source.columns.{ours}", f"no column of ours that is read; those are {known}", theirs)
    features = {f.name for f in platform.features}
    for table, columns in read.items():
        for ours, theirs in source.columns.items():
            if ours not in columns:
                continue
            for other in columns:
                # `ds` is read only where it is mapped.
                if other == ours or (other == "ds" and other not in source.columns):
                    continue
                copy = (ours in features and other in IDS) or (other in features and ours in IDS)
                if source.columns.get(other, other) == theirs and not copy:
                    raise Fault(f"source.columns.{ours}", f"in {table} that is already our {other}", theirs)


def _dates(platform: Platform) -> None:
    """Days that are named are the log's, and one that has ended is long enough for one day to be evaluated."""
    first, end, last_day = platform.first_evaluated, platform.end, platform.experiments.last_day
    if end is not None and end < platform.start:
        raise Fault("end", f"before the start, {platform.start}", end)
    if end is not None and end < first:
        spent = f"training.window_days {platform.training.window_days}"
        if not platform.logs_scores and platform.ranker is not None:
            spent = f"ranker.train_days {platform.ranker.train_days} and {spent}"
        raise Fault("end", f"too early for a day to be evaluated: with {spent} it must be {first} or later", end)
    earliest = platform.scored_from + timedelta(1)
    for n, day in enumerate(platform.experiments.tuning_days):
        if day < earliest:
            problem = f"the first day with a day before it to train on is {earliest}"
            raise Fault(f"experiments.tuning_days.{n}", problem, day)
    if last_day is not None and last_day < first:
        raise Fault("experiments.last_day", f"the first day that a model can score is {first}", last_day)
    if last_day is not None and end is not None and last_day > end:
        raise Fault("experiments.last_day", f"after the end, {end}", last_day)


def _time_zone(platform: Platform) -> None:
    """Days of the simulator are UTC's."""
    if platform.source.kind == "adworld" and platform.time_zone != "UTC":
        raise Fault("time_zone", "the simulator's days are UTC's: leave the key out", platform.time_zone)
