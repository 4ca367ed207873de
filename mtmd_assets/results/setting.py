"""What a section is of: days, windows, seeds, code, the ranker that is imitated."""

from collections.abc import Collection
from datetime import date
from typing import TYPE_CHECKING

from mtmd_assets.home import Site

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def setting_section(
    con: "DuckDBPyConnection", site: Site, models: Collection[str], first: date, last: date, seeds: int
) -> str:
    """Days, windows, seeds and code of what was compared of some models, and the AUC of a built-in ranker."""
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
        f"ends on the day before ({spans}; a window's last day decides when to stop); {seeds} {'seed' if seeds == 1 else 'seeds'}; hash of the code of mtmd {versions}.",
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
