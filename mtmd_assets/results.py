"""`docs/results.md`: what the experiments' tables say, in words and tables that a person can check with SQL.

No model is judged here: it reads `improvement_results`, `experiment_models`, `slice_metrics`, `trials`, the routing table and
the models' manifests of one platform, and rewrites that platform's sections of the document: the contenders, the
ablations, the search. A section of which this home has no tables stays as it was: each says what it is of.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from checks.routing import signatures
from checks.training import JUMP, high_passes
from mtmd_assets.calibration_table import calibration_table
from mtmd_assets.contenders import ABLATIONS, CONTENDERS
from mtmd_assets.domain_shift import domain_shifts
from mtmd_assets.faults import PlatformError
from mtmd_assets.home import Site
from mtmd_assets.improvement import verdict
from mtmd_assets.model_store import code_version
from mtmd_assets.pictures import markdown_table
from mtmd_assets.tuning import ranking
from mtmd_model.metrics import FLOOR

if TYPE_CHECKING:
    import polars as pl
    from duckdb import DuckDBPyConnection

CELLS = "contender = $model AND surface IS NOT NULL AND bucket IS NULL"
"""Of the result: the lines of a contender's slices x tasks."""
WHOLE = """SELECT (model, seed) FROM experiment_models WHERE ds BETWEEN $first AND $last
    GROUP BY model, seed HAVING count(DISTINCT ds) = $days"""
"""Models and seeds that were trained for every day."""
MIN_ROWS, LARGE_ROWS, CALIBRATED_ROWS = 200, 500, 1000
TITLE = "# Results"
HEAD = f"""{TITLE}

Three sections a platform: contenders and ablations, by `make results PLATFORM=…`, and the search, by `make tune`. Every
number was in the tables of the home that it was run in or in its models' manifests; a section that a run has nothing new for
is left as an earlier one wrote it.
"""


def require_results(path: Path) -> None:
    """Refuse to write results where something else is.

    Raises:
        PlatformError: the document is a folder, or holds what `write_sections` has not written.
    """
    if not path.exists():
        return
    try:
        first, *rest = path.read_text().strip().split("\n") if path.is_file() else ["a folder"]
    except UnicodeDecodeError:
        first, rest = "no text", []
    if first and (first != TITLE or (rest and not _sections("\n".join(rest)))):
        raise PlatformError(f"--document {path}: something else is there, which would be lost: {first[:60]!r}")


def write_sections(path: Path, found: Mapping[str, str]) -> None:
    """Put sections, by their names, in their places in the document."""
    kept = _sections(path.read_text() if path.exists() else HEAD)
    for name, text in found.items():
        kept[name] = f"<!-- {name} -->\n{text}\n<!-- end of {name} -->\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEAD, *(kept[n] for n in sorted(kept))]))


def _sections(text: str) -> dict[str, str]:
    """Name -> a document's section, with the marks around it."""
    marked = re.finditer(r"<!-- ([\w ]+) -->\n.*?<!-- end of \1 -->\n?", text, re.DOTALL)
    return {m[1]: m[0] for m in marked}


def comparison(site: Site, last: date) -> dict[str, str]:
    """Name -> Markdown of the sections of what was compared on the evaluation days up to `last`: contenders, ablations."""
    name = site.platform.name
    with _result(site, last) as con:
        found = {name: _contenders(con, site), f"{name} ablations": _ablations(con, site)}
    return {key: "\n\n".join(parts) for key, parts in found.items() if parts}


@contextmanager
def _result(site: Site, last: date) -> Iterator["DuckDBPyConnection"]:
    """A connection with the view `result`: what was compared on the evaluation days up to `last`."""
    with site.warehouse.connect() as con:
        con.execute(f"CREATE TEMP VIEW result AS SELECT * EXCLUDE ds FROM improvement_results WHERE ds = '{last}'")
        yield con


def compared(site: Site, last: date) -> set[str]:
    """The models that were compared on the evaluation days up to `last`."""
    with _result(site, last) as con:
        return {model for (model,) in con.execute("SELECT DISTINCT contender FROM result").fetchall()}


def headline(site: Site, last: date, models: Collection[str]) -> str:
    """A row a model that was compared on the evaluation days up to `last`: mean improvement over it, and how its cells fall."""
    with _result(site, last) as con:
        return _headline(con, models)


def _contenders(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """MTMD against its contenders, with all that is known of MTMD's own models."""
    compared = _compared(con, CONTENDERS)
    if compared is None:
        return []
    first, last, count = compared
    seeds = _whole_seeds(con, "mtmd", first, last)
    return [
        f"## {site.platform.name}",
        _setting(con, site, CONTENDERS, first, last, count),
        "### Against the contenders",
        HOW_TO_READ,
        _headline(con, CONTENDERS),
        *_tasks(con, site),
        "### Every cell",
        _cells(con, site, first, last, seeds),
        "### Parameters",
        _parameters(con, site, first, last),
        "### Calibration",
        _calibration(con, first, last),
        "### Who the routers use",
        _routing(con, first, last, seeds),
    ]


def _compared(con: "DuckDBPyConnection", models: Collection[str]) -> tuple[date, date, int] | None:
    """First and last evaluation day of what was compared of some models, and how many seeds; None if nothing was."""
    [span] = con.execute(
        "SELECT min(eval_start), max(eval_end), max(seeds) FROM result WHERE list_contains($models, contender)",
        {"models": list(models)},
    ).fetchall()
    return None if span[0] is None else span


def _whole_seeds(con: "DuckDBPyConnection", model: str, first: date, last: date) -> list[int]:
    """The seeds that a model was trained with on every day."""
    whole = con.execute(WHOLE, {"first": first, "last": last, "days": (last - first).days + 1}).fetchall()
    return sorted(seed for ((name, seed),) in whole if name == model)


HOW_TO_READ = f"""Improvement is (contender − mtmd) / contender of LogMAE; above zero MTMD is better. LogMAE of a cell (slice × task) is over
the pooled rows of the evaluation days, the mean of the seeds. The mean is unweighted over the cells with at least {MIN_ROWS}
evaluation rows. Intervals are 95 %, from a bootstrap over users and seeds; *better* and *worse* count cells by
simultaneous (max-t) intervals, with Student's t for what few seeds say (`mtmd_assets/intervals.py`); days are not
resampled. Beside a cell's LogMAE are those of two constants, the slice's own mean and median over the window.
The intervals of cells with few rows or users are pointwise."""

ABLATED = f"""Improvement of mtmd over the model without it, by bucket of the heavyweight score (0 is the highest tenth); above zero it
helps. The mean is over the cells with at least {MIN_ROWS} rows on the last evaluation days, as many as *days* says, on which
both were trained with as many seeds; intervals of means and of cells with few rows or users are pointwise, *better* and *worse* count
the cells by simultaneous ones (of few seeds on one day these are too short: [experiments.md](experiments.md#tables)),
*jumped* the trainings without it whose loss did (`checks/training.py`). Widths are divided by what the preset divides all of
its widths by; half of the rows are half of the steps too."""

SEARCH = """Mean LogMAE over the cells of a tuning day by trial (`mtmd_assets/tuning.py`): what the platform file said and the
best two others on every tuning day with two seeds, what was given by `--try` too, the rest once, on the last. What was
chosen after it, of the shipped platforms: [tuning.md](tuning.md)."""


def _setting(
    con: "DuckDBPyConnection", site: Site, models: Collection[str], first: date, last: date, seeds: int
) -> str:
    of_these = {"models": list(models), "first": first, "last": last}
    windows = con.execute(
        """SELECT DISTINCT window_start, window_end FROM experiment_models
        WHERE ds BETWEEN $first AND $last AND list_contains($models, model) ORDER BY 1""",
        of_these,
    ).fetchall()
    codes = con.execute(
        """SELECT code_version, bool_or(model = 'mtmd') FROM experiment_models
        WHERE ds BETWEEN $first AND $last AND (model = 'mtmd' OR list_contains($models, model)) GROUP BY ALL ORDER BY ALL""",
        of_these,
    ).fetchall()
    [(result_id, rows)] = con.execute(
        """SELECT any_value(result_id), max(rows) FROM (
            SELECT any_value(result_id) AS result_id, sum(rows) AS rows
            FROM (
                SELECT contender, surface, product, any_value(result_id) AS result_id, max(rows) AS rows
                FROM result
                WHERE list_contains($models, contender) AND bucket IS NULL AND surface IS NOT NULL
                GROUP BY ALL
            )
            GROUP BY contender)""",
        {"models": list(models)},
    ).fetchall()
    spans = ", ".join(f"{start} to {end}" for start, end in windows)
    ours, theirs = (", ".join(f"`{code}`" for code, of_mtmd in codes if of_mtmd == which) for which in (True, False))
    versions = f"{ours}, of the others {theirs}" if theirs else ours
    lines = [
        f"Result `{result_id}`. Evaluated on {first} to {last} ({rows:,} impressions), each day by models of the window that",
        f"ends on the day before ({spans}; a window's last day decides when to stop); {seeds} {'seed' if seeds == 1 else 'seeds'}; code {versions}.",
    ]
    if not site.platform.logs_scores:
        from mtmd_assets.scoreboard import ranker_auc

        lines += [
            "",
            "AUC of the heavyweight ranker that is imitated, against the outcomes:",
            "",
            ranker_auc(con, site),
        ]
    return "\n".join(lines)


def _headline(con: "DuckDBPyConnection", models: Collection[str]) -> str:
    rows: list[list[object]] = []
    for model in models:
        found = _rows(con, "contender = $model AND bucket IS NULL", model=model)
        mean = next((r for r in found if r["surface"] is None and r["task"] is None), None)
        if mean is None:
            continue
        # without an error of the contender there is no improvement over it
        cells = [r for r in found if r["surface"] is not None and r["improvement"] is not None]
        family = [r for r in cells if r["rows"] >= MIN_ROWS]
        above = sum(r["improvement"] > 0 for r in family)
        large = [r for r in cells if r["rows"] >= LARGE_ROWS]
        worst = min(large, key=lambda r: r["improvement"]) if large else None
        smallest = (
            f"{worst['improvement']:+.1%} ({worst['surface']} {worst['product']} {worst['task']})" if worst else ""
        )
        rows.append(
            [model, mean["seeds"], _interval(mean), len(family), above, *_verdicts(family, mean["seeds"]), smallest]
        )
    header = ["model", "seeds", "mean improvement", "cells", "above zero", "better", "worse"]
    return markdown_table([*header, f"smallest of the cells with {LARGE_ROWS} rows"], rows)


def _verdicts(cells: Sequence[dict[str, Any]], seeds: int) -> list[object]:
    """How many are better and worse; nothing of one seed, which cannot say."""
    if seeds == 1:
        return ["", ""]
    verdicts = [verdict(r) for r in cells]
    return [verdicts.count("better"), verdicts.count("worse")]


def _tasks(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """The mean over each task's cells, where a small cell counts as much as a large one, and beside it over all rows."""
    means = {
        (r["contender"], r["task"]): r
        for r in _rows(con, "surface IS NULL AND task IS NOT NULL AND bucket IS NULL AND improvement IS NOT NULL")
    }
    of_rows = dict(
        con.execute(
            """SELECT (contender, task), 1 - sum(rows * mtmd) / sum(rows * contender_logmae)
            FROM result WHERE surface IS NOT NULL AND bucket IS NULL GROUP BY contender, task"""
        ).fetchall()
    )
    contenders = [c for c in CONTENDERS if any(contender == c for contender, _ in means)]
    if not contenders:
        return []
    rows = [
        [task, *(x for c in contenders for x in (_interval(means[c, task]), f"{of_rows[c, task]:+.1%}"))]
        for task in site.platform.task_names
        if all((c, task) in means for c in contenders)
    ]
    if not rows:
        return []
    words = """By task: the mean over its cells, and *by rows* the improvement of the LogMAE of all its rows together, in which large
slices count for more (without an interval)."""
    header = ["task", *(x for c in contenders for x in (f"over {c}", "by rows"))]
    return [words, markdown_table(header, rows)]


def _cells(con: "DuckDBPyConnection", site: Site, first: date, last: date, seeds: list[int]) -> str:
    """Every slice x task: LogMAE of mtmd and the constants, improvement over each contender with its interval."""
    rows: list[list[object]] = []
    pooled = con.execute(
        """SELECT (model, surface, product, task), sum(rows * logmae) / sum(rows), max(floored) FROM experiment_slice_metrics
        WHERE ds BETWEEN ? AND ? AND bucket IS NULL
            AND (model IN ('constant', 'constant_median') OR model = 'mtmd' AND list_contains(?, seed))
        GROUP BY ALL""",
        [first, last, seeds],
    ).fetchall()
    logmae = {key: value for key, value, _ in pooled}
    floored = max(share for (model, *_), _, share in pooled if model == "mtmd")
    contenders = [c for c in CONTENDERS if _rows(con, "contender = $model AND surface IS NULL", model=c)]
    found = {
        (r["contender"], r["surface"], r["product"], r["task"]): r
        for r in _rows(con, "surface IS NOT NULL AND bucket IS NULL")
    }
    for surface, product in site.platform.slices:
        for task in site.platform.task_names:
            cells = [found.get((c, surface, product, task)) for c in contenders]
            count = max((c["rows"] for c in cells if c is not None), default=None)
            if count is not None:
                keys = [(model, surface, product, task) for model in ("mtmd", "constant", "constant_median")]
                errors = [f"{logmae[key]:.4f}" if key in logmae else "" for key in keys]
                rows.append([surface, product, task, count, *errors, *("" if c is None else _cell(c) for c in cells)])
    header = ["surface", "product", "task", "rows", "mtmd LogMAE", "mean", "median", *(f"over {c}" for c in contenders)]
    words = f"LogMAE's floor of {FLOOR:g} touches at most {floored:.2%} of mtmd's rows in a cell of a day."
    return f"{words}\n\n{markdown_table(header, rows)}"


def _cell(row: dict[str, Any]) -> str:
    if row["improvement"] is None:
        return ""
    if row["seeds"] == 1:
        return f"{row['improvement']:+.1%} (one seed)"
    if row["joint_low"] is None:
        return f"{_interval(row)} (few rows or users)"
    mark = {"better": "", "worse": " **worse**", "no clear difference": " ~"}[verdict(row)]
    return f"{row['improvement']:+.1%} [{row['joint_low']:+.1%}, {row['joint_high']:+.1%}]{mark}"


def _parameters(con: "DuckDBPyConnection", site: Site, first: date, last: date) -> str:
    rows = con.execute(
        f"""SELECT model, max(embedding_params), max(dense_params), avg(best_epoch + 1), any_value(config), list(model_version)
        FROM experiment_models WHERE ds BETWEEN $first AND $last AND (model, seed) IN ({WHOLE}) GROUP BY model ORDER BY model""",
        {"first": first, "last": last, "days": (last - first).days + 1},
    ).fetchall()
    order = {m: n for n, m in enumerate(("mtmd", *CONTENDERS, *ABLATIONS))}
    table = [
        [model, f"{embedding:,}", f"{dense:,}", f"{epoch:.1f}", _jumped(site, versions), _settings(json.loads(config))]
        for model, embedding, dense, epoch, config, versions in sorted(rows, key=lambda r: order.get(r[0], 99))
        if model in ("mtmd", *CONTENDERS)
    ]
    weights = _task_weights(site, [version for row in rows for version in row[-1]])
    counts = {model: (embedding, dense) for model, embedding, dense, *_ in rows}
    words = f"""Parameters (of embedding tables the rows that training has met), the mean number of passes whose weights were kept, and the trainings whose loss jumped: rose above {JUMP:g} times
that of an earlier pass (`checks/training.py`; slice towers have one loss for all).{weights}{_beside_slice_towers(counts)}"""
    return f"{words}\n\n{markdown_table(['model', 'embedding', 'other', 'passes kept', 'jumped', 'settings'], table)}"


def _beside_slice_towers(counts: Mapping[str, tuple[int, int]]) -> str:
    """A sentence: mtmd's parameters as shares of those of the models that it replaces (paper, section 3.2); empty without
    these."""
    if not {"mtmd", "slice_towers"} <= counts.keys():
        return ""
    (tables, others), (their_tables, their_others) = counts["mtmd"], counts["slice_towers"]
    ratio = f"{others / their_others:.2g} times"
    # a platform without categorical features has no tables
    if their_tables:
        shares = f"{tables / their_tables:.2g} times the embedding parameters of all slice towers together, and {ratio} their others"
    else:
        shares = f"{ratio} the parameters of all slice towers together"
    return f"""
MTMD has {shares}; the
paper's has about as many embedding parameters as the models that it replaced, and fewer others."""


def _task_weights(site: Site, versions: Collection[str]) -> str:
    """A sentence: what they were trained with, all alike; nothing where none of their folders is there."""
    for manifest in (_manifest(site, version) for version in versions):
        if manifest is not None:
            weights = ", ".join(f"{task['name']} {task['weight']:g}" for task in manifest["schema"]["tasks"])
            return f" Weights of the tasks in everybody's loss: {weights}."
    return ""


def _jumped(site: Site, versions: Collection[str]) -> str:
    """How many trainings had a loss that jumped, of those whose folders are there."""
    histories = [m["history"] for m in (_manifest(site, version) for version in versions) if m is not None]
    return f"{sum(bool(high_passes(history)) for history in histories)} of {len(histories)}" if histories else ""


def _manifest(site: Site, version: str) -> dict[str, Any] | None:
    """A trained model's; None where its folder has gone."""
    file = site.folder / "experiments" / version / "manifest.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None


def _settings(config: dict[str, Any]) -> str:
    widths = config["model"].get("deep") or config["model"].get("widths")
    optimiser = config["optimiser"]
    embedding_rate = optimiser.get("embedding_rate", 1.0)  # models trained before there was one have none
    return (
        f"widths {'/'.join(map(str, widths))}, {config['max_epochs']} passes, batch {config['batch_size']}, learning rate "
        f"{optimiser['learning_rate']:g}, warm-up {optimiser['warmup_share']:g}, gradient clip {config['gradient_clip']:g}, "
        f"embedding rate {embedding_rate:g}, weight decay {optimiser['weight_decay']:g}, dropout {config['model']['dropout']:g}, "
        f"slice balance {config['slice_balance']:g}, id dropout {config['id_dropout']:g}, "
        f"averaged passes {config.get('averaged_passes', 0.0):g}, "
        f"main effects {'on' if config['model'].get('main_effects') else 'off'}"
    )


def _ablations(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """What is lost by taking one thing away, by bucket (paper, table 6): mean over the cells."""
    compared = _compared(con, ABLATIONS)
    if compared is None:
        return []
    rows: list[list[object]] = []
    for model in ABLATIONS:
        found = {
            r["bucket"]: r for r in _rows(con, "contender = $model AND surface IS NULL AND task IS NULL", model=model)
        }
        if found:
            buckets = [_interval(found[b]) if b in found else "" for b in range(5)]
            cells = [r for r in _rows(con, CELLS, model=model) if r["rows"] >= MIN_ROWS]
            mean = found[None]
            days = (mean["eval_end"] - mean["eval_start"]).days + 1
            counts = [len(cells), *_verdicts(cells, mean["seeds"]), days, mean["seeds"]]
            of_days = [model, mean["eval_start"], mean["eval_end"]]
            query = "SELECT list(model_version) FROM experiment_models WHERE model = ? AND ds BETWEEN ? AND ?"
            [(versions,)] = con.execute(query, of_days).fetchall()
            rows.append([model, *buckets, _interval(mean), *counts, _jumped(site, versions or [])])
    header = ["without", "0", "1", "2", "3", "4", "all", "cells", "better", "worse", "days", "seeds", "jumped"]
    setting = _setting(con, site, ABLATIONS, *compared)
    parts = [f"## {site.platform.name}: ablations", setting, ABLATED, markdown_table(header, rows)]
    by_slice = _by_slice(con, site, "no_domain_adaptation")
    if by_slice:
        parts += ["Domain adaptation, by slice:", by_slice, _shift(con, site, compared[1])]
    return [*parts, *_constrained(con, site)]


def _by_slice(con: "DuckDBPyConnection", site: Site, model: str) -> str:
    """Improvement over a model in every cell, a row a slice and a column a task; empty if it was not compared."""
    found = {(r["surface"], r["product"], r["task"]): r for r in _rows(con, CELLS, model=model)}
    rows = []
    for surface, product in site.platform.slices:
        cells = [found.get((surface, product, task)) for task in site.platform.task_names]
        of_slice = [c for c in cells if c is not None]
        if of_slice:
            count = max(c["rows"] for c in of_slice)
            rows.append([surface, product, f"{count:,}", *("" if c is None else _cell(c) for c in cells)])
    return markdown_table(["surface", "product", "rows", *site.platform.task_names], rows) if rows else ""


def _constrained(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """Constrained modelling beside independent tasks, by task and by slice (paper, table 5)."""
    where = "contender = $model AND surface IS NULL AND task IS NOT NULL AND bucket IS NULL"
    found = {r["task"]: r for r in _rows(con, where, model="unconstrained") if r["improvement"] is not None}
    if not found:
        return []
    rows = [[task, found[task]["rows"], _interval(found[task])] for task in site.platform.task_names if task in found]
    words = "Constrained modelling, by task and by slice: improvement over independent tasks of equal width (`unconstrained`)."
    return [words, markdown_table(["task", "rows", "improvement"], rows), _by_slice(con, site, "unconstrained")]


def _shift(con: "DuckDBPyConnection", site: Site, day: date) -> str:
    """How unlike the domains are, by the statistics that mtmd's first seed normalises by."""
    query = "SELECT model_version FROM experiment_models WHERE ds = ? AND model = 'mtmd' ORDER BY seed LIMIT 1"
    [(version,)] = con.execute(query, [day]).fetchall()
    manifest = _manifest(site, version)
    shifts = [] if manifest is None else domain_shifts(manifest["normalisation"])
    if not shifts:
        return ""
    between, spread = median(s.between for s in shifts), median(s.spread for s in shifts)
    words = f"""How unlike the domains are in the {len(shifts)} dense features that several domains of a tower have
(`mtmd_assets/domain_shift.py`): the share of the variance that lies between their means has a median of {between:.4f}, the
largest standard deviation over the smallest one of {spread:.2f}. The five most unlike in their means:"""
    rows = [[s.tower, s.feature, f"{s.between:.4f}", f"{s.spread:.2f}"] for s in shifts[:5]]
    header = ["tower", "feature", "variance between means", "largest over smallest deviation"]
    return f"{words}\n\n{markdown_table(header, rows)}"


def _calibration(con: "DuckDBPyConnection", first: date, last: date) -> str:
    """Sum of probabilities over sum of scores, a cell with enough rows: mtmd with intervals, its contenders beside it."""
    compared = [c for c in CONTENDERS if _rows(con, "contender = $model AND surface IS NULL", model=c)]
    found = {model: _calibrations(con, model, first, last) for model in ("mtmd", *compared)}
    cells = [cell for cell, r in found["mtmd"].items() if r["rows"] >= CALIBRATED_ROWS]
    inside = {m: sum(0.95 <= of[cell]["calibration"] <= 1.05 for cell in cells) for m, of in found.items()}
    counts = ", ".join(f"{n} of {model}" for model, n in inside.items())
    of_mtmd = [found["mtmd"][cell] for cell in cells]
    if not cells:
        return f"No slice has the {CALIBRATED_ROWS:,} rows with a score that Σp̂/Σt is judged from."
    words = f"Σp̂/Σt in the slices with at least {CALIBRATED_ROWS:,} rows. Of the {len(cells)} cells are within 0.95 to 1.05: {counts}."
    several = len(_whole_seeds(con, "mtmd", first, last)) > 1  # of one seed users alone say too little of a training
    if several:
        beyond = sum(r["low"] > 1.05 or r["high"] < 0.95 for r in of_mtmd)
        words += f""" Intervals
are 95 %, pointwise, from a bootstrap over users and seeds; of mtmd's, {beyond or "none"} lie wholly outside."""
    rows = []
    for cell in cells:
        mtmd, *others = (of[cell] for of in found.values())
        interval = f"{mtmd['calibration']:.3f}" + (f" [{mtmd['low']:.3f}, {mtmd['high']:.3f}]" if several else "")
        rows.append([*cell, mtmd["rows"], interval, *(f"{r['calibration']:.3f}" for r in others)])
    return f"{words}\n\n{markdown_table(['surface', 'product', 'task', 'rows', *found], rows)}"


def _calibrations(
    con: "DuckDBPyConnection", model: str, first: date, last: date
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Surface, product, task -> a model's line of `calibration_table`."""
    sums = con.sql(
        """SELECT ds AS day, seed, user_id, surface, product, task, count(*) AS rows, sum(probability) AS predicted, sum(score) AS scored
        FROM experiment_predictions WHERE model = $model AND ds BETWEEN $first AND $last AND list_contains($seeds, seed)
        GROUP BY ALL""",
        params={"model": model, "first": first, "last": last, "seeds": _whole_seeds(con, model, first, last)},
    ).pl()
    return {(r["surface"], r["product"], r["task"]): r for r in calibration_table(sums).iter_rows(named=True)}


def _routing(con: "DuckDBPyConnection", first: date, last: date, seeds: list[int]) -> str:
    cursor = con.execute(
        f"""PIVOT (SELECT tower, domain, task, expert, avg(mean_gate) AS gate, round(avg(entropy), 6) AS entropy, round(avg(entropy_of_mean), 6) AS of_mean
            FROM experiment_routing_metrics WHERE ds BETWEEN '{first}' AND '{last}' AND list_contains({seeds}, seed) GROUP BY ALL)
        ON expert USING first(gate) ORDER BY tower DESC, domain, task"""
    )
    header = [c[0] for c in cursor.description]
    rows = [[f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in cursor.fetchall()]
    words = f"""Mean gate by expert over the days and seeds; entropy of a row's gates and of the mean gates, in nats (ln 3 = 1.099 is
uniform). {_signatures(con, first, last, seeds)} A uniform router weighs its experts equally, as the ablation `no_routing` does for
good."""
    return f"{words}\n\n{markdown_table(header, rows)}"


def _signatures(con: "DuckDBPyConnection", first: date, last: date, seeds: list[int]) -> str:
    """How many routers of all days and seeds show a failure signature, by its name."""
    models = con.sql(
        "FROM experiment_routing_metrics WHERE ds BETWEEN $first AND $last AND list_contains($seeds, seed) ORDER BY tower, domain, task",
        params={"first": first, "last": last, "seeds": seeds},
    ).pl()
    routers = models.n_unique(["model_version", "tower", "domain", "task"])
    found: Counter[str] = Counter()
    for _, model in models.group_by("model_version"):
        found.update({(s.tower, s.domain, s.task): s.fault for s in signatures(model.to_dicts())}.values())
    faults = ", ".join(f"{n} {fault}" for fault, n in found.most_common()) or "none"
    return f"Failure signatures (`checks/routing.py`) in {routers} routers of all days and seeds: {faults}."


def search(site: Site, trials: "pl.DataFrame") -> dict[str, str]:
    """Name -> Markdown of the section of the search: a table of trials."""
    name = site.platform.name
    trainings = ", ".join(f"{model} {n}" for model, n in sorted(trials["model"].value_counts().iter_rows()))
    codes = ", ".join(f"`{code_version(model)}` ({model})" for model in sorted(set(trials["model"])))
    parts = [f"## {name}: the search", f"{SEARCH} Trainings: {trainings}. Code: {codes}.", ranking(trials)]
    return {f"{name} search": "\n\n".join(parts)}


def _interval(row: dict[str, Any]) -> str:
    if row["improvement"] is None:
        return "" if row["bucket"] is not None else f"no cell with {MIN_ROWS} rows"
    if row["seeds"] == 1:
        return f"{row['improvement']:+.1%} (one seed)"  # users alone say too little of a training
    return f"{row['improvement']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}]"


def _rows(con: "DuckDBPyConnection", where: str, **parameters: object) -> list[dict[str, Any]]:
    return list(con.sql(f"FROM result WHERE {where}", params=parameters).pl().iter_rows(named=True))
