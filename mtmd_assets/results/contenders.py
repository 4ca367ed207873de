"""The section of MTMD against its contenders (paper, table 1), with all that is known of MTMD's own models."""

from datetime import date
from typing import TYPE_CHECKING, Any

from mtmd_assets.contenders import CONTENDERS
from mtmd_assets.home import Site
from mtmd_assets.improvement import MIN_ROWS
from mtmd_assets.markdown import markdown_table
from mtmd_assets.results.calibration import calibration_section
from mtmd_assets.results.result import cell_in_words, headline_of, interval, rows_where, span_of, whole_seeds
from mtmd_assets.results.routing import routing_section
from mtmd_assets.results.setting import setting_section
from mtmd_assets.results.trainings import parameters_section
from mtmd_model.metrics import FLOOR

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

HOW_TO_READ = f"""Improvement is (contender − mtmd) / contender of LogMAE; above zero MTMD is better. LogMAE of a cell (slice × task) is over
the pooled rows of the evaluation days, the mean of the seeds. The mean is unweighted over the cells with at least {MIN_ROWS}
evaluation rows. Intervals are 95 %, from a bootstrap over users and seeds; *better* and *worse* count cells by
simultaneous (max-t) intervals, with Student's t for what few seeds say (`mtmd_assets/intervals.py`), *few users* those
with too few users or rows for one; days are not resampled, so the intervals are of these days and these windows. Beside a
cell's LogMAE are those of two constants, the slice's own mean and median over the window. The intervals of cells with few
rows or users are pointwise."""


def contenders_section(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """MTMD against its contenders, with all that is known of MTMD's own models."""
    compared = span_of(con, CONTENDERS)
    if compared is None:
        return []
    first, last, count = compared
    seeds = whole_seeds(con, "mtmd", first, last)
    return [
        f"## {site.platform.name}",
        setting_section(con, site, CONTENDERS, first, last, count),
        "### Against the contenders",
        HOW_TO_READ,
        headline_of(con, CONTENDERS),
        *_tasks(con, site),
        "### Every cell",
        _cells(con, site, first, last, seeds),
        "### Parameters",
        parameters_section(con, site, first, last),
        "### Calibration",
        calibration_section(con, first, last),
        "### Who the routers use",
        routing_section(con, first, last, seeds),
    ]


def _tasks(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """The mean over each task's cells, where a small cell counts as much as a large one, and beside it over all rows."""
    means = {
        (r["contender"], r["task"]): r
        for r in rows_where(con, "surface IS NULL AND task IS NOT NULL AND bucket IS NULL AND improvement IS NOT NULL")
    }
    contenders = [c for c in CONTENDERS if any(contender == c for contender, _ in means)]
    if not contenders:
        return []
    rows = [
        [task, *(x for c in contenders for x in (interval(means[c, task]), interval(_by_rows(means[c, task]))))]
        for task in site.platform.task_names
        if all((c, task) in means for c in contenders)
    ]
    if not rows:
        return []
    words = """By task: the mean over its cells, and *by rows* the improvement of the LogMAE of all its rows together, in which large
slices count for more."""
    header = ["task", *(x for c in contenders for x in (f"over {c}", "by rows"))]
    return [words, markdown_table(header, rows)]


def _by_rows(mean: dict[str, Any]) -> dict[str, Any]:
    """A task's line, of all its rows together."""
    return {**mean, "improvement": mean["by_rows"], "low": mean["by_rows_low"], "high": mean["by_rows_high"]}


def _cells(con: "DuckDBPyConnection", site: Site, first: date, last: date, seeds: list[int]) -> str:
    """Every slice x task: LogMAE of mtmd and the constants, improvement over each contender with its interval."""
    rows: list[list[object]] = []
    pooled = con.execute(
        """SELECT (model, surface, product, task), sum(rows * logmae) / sum(rows), max(floored), sum(rows) / greatest(count(DISTINCT seed), 1)
        FROM experiment_slice_metrics
        WHERE ds BETWEEN ? AND ? AND bucket IS NULL
            AND (model IN ('constant', 'constant_median') OR model = 'mtmd' AND list_contains(?, seed))
        GROUP BY ALL""",
        [first, last, seeds],
    ).fetchall()
    logmae = {(key, rows_of): value for key, value, _, rows_of in pooled}
    floored = max(share for (model, *_), _, share, _ in pooled if model == "mtmd")
    contenders = [c for c in CONTENDERS if rows_where(con, "contender = $model AND surface IS NULL", model=c)]
    found = {
        (r["contender"], r["surface"], r["product"], r["task"]): r
        for r in rows_where(con, "surface IS NOT NULL AND bucket IS NULL")
    }
    for surface, product in site.platform.slices:
        for task in site.platform.task_names:
            cells = [found.get((c, surface, product, task)) for c in contenders]
            count = max((c["rows"] for c in cells if c is not None), default=None)
            if count is not None:
                keys = [(model, surface, product, task) for model in ("mtmd", "constant", "constant_median")]
                # a constant of fewer rows lacks a day whose window had not seen the slice
                errors = [f"{logmae[key, count]:.4f}" if (key, count) in logmae else "" for key in keys]
                rows.append(
                    [surface, product, task, count, *errors, *("" if c is None else cell_in_words(c) for c in cells)]
                )
    header = ["surface", "product", "task", "rows", "mtmd LogMAE", "mean", "median", *(f"over {c}" for c in contenders)]
    words = f"LogMAE's floor of {FLOOR:g} touches at most {floored:.2%} of mtmd's rows in a cell of a day."
    return f"{words}\n\n{markdown_table(header, rows)}"
