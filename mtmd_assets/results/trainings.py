"""What the models of a result were trained as: parameters, settings, losses that jumped."""

import json
from collections.abc import Collection, Mapping
from datetime import date
from typing import TYPE_CHECKING, Any

from checks.training import JUMP, high_passes
from mtmd_assets import training_record
from mtmd_assets.contenders import CONTENDERS
from mtmd_assets.home import Site
from mtmd_assets.markdown import markdown_table
from mtmd_assets.results.result import WHOLE

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def parameters_section(con: "DuckDBPyConnection", site: Site, first: date, last: date) -> str:
    """Parameters, passes, jumps and settings, a row a model."""
    found = con.execute(
        f"""SELECT model, max(embedding_params), max(dense_params), avg(best_epoch + 1), any_value(config), list(model_version)
        FROM experiment_models WHERE ds BETWEEN $first AND $last AND (model, seed) IN ({WHOLE}) GROUP BY model""",
        {"first": first, "last": last, "days": (last - first).days + 1},
    ).fetchall()
    rows = {model: row for model, *row in found}
    table = []
    for model in (m for m in ("mtmd", *CONTENDERS) if m in rows):
        embedding, dense, epoch, config, versions = rows[model]
        said = _settings(json.loads(config))
        table.append([model, f"{embedding:,}", f"{dense:,}", f"{epoch:.1f}", jumped(site, versions), said])
    counts = {model: (embedding, dense) for model, (embedding, dense, *_) in rows.items()}
    words = f"""Parameters (of embedding tables the rows that training has met), the mean number of passes whose weights were kept, and the trainings whose loss jumped: rose above {JUMP:g} times
that of an earlier pass (`checks/training.py`; slice towers have one loss for all).{_task_weights(site)}{_beside_slice_towers(counts)}"""
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


def _task_weights(site: Site) -> str:
    """A sentence: the weights that all models are trained with alike."""
    weights = ", ".join(f"{task.name} {task.weight:g}" for task in site.platform.tasks)
    return f" Weights of the tasks in everybody's loss: {weights}."


def jumped(site: Site, versions: Collection[str]) -> str:
    """How many trainings had a loss that jumped, of those whose records are there."""
    histories = [m["history"] for m in (manifest_of(site, version) for version in versions) if m is not None]
    return f"{sum(bool(high_passes(history)) for history in histories)} of {len(histories)}" if histories else ""


def manifest_of(site: Site, version: str) -> dict[str, Any] | None:
    """How a model was trained; None where neither its record nor its folder is there."""
    return training_record.manifest_of(site.experiments / version)


def _settings(config: dict[str, Any]) -> str:
    widths = config["model"].get("deep") or config["model"].get("widths")
    optimiser = config["optimiser"]
    return (
        f"widths {'/'.join(map(str, widths))}, {config['max_epochs']} passes, batch {config['batch_size']}, learning rate "
        f"{optimiser['learning_rate']:g}, warm-up {optimiser['warmup_share']:g}, gradient clip {config['gradient_clip']:g}, "
        f"embedding rate {optimiser['embedding_rate']:g}, weight decay {optimiser['weight_decay']:g}, dropout {config['model']['dropout']:g}, "
        f"slice balance {config['slice_balance']:g}, id dropout {config['id_dropout']:g}, "
        f"averaged passes {config['averaged_passes']:g}, "
        f"main effects {'on' if config['model']['main_effects'] else 'off'}"
    )
