"""The section of the search."""

from typing import TYPE_CHECKING

from mtmd_assets.home import Site
from mtmd_assets.model_store import code_version
from mtmd_assets.tuning import ranking

if TYPE_CHECKING:
    import polars as pl

SEARCH = """Mean LogMAE over the cells of a tuning day by trial (`mtmd_assets/tuning.py`): what the platform file said and the
best two others on every tuning day with two seeds, what was given by `--try` too, the rest once, on the last. What was
chosen after it, of the shipped platforms: [tuning.md](tuning.md)."""


def search(site: Site, trials: "pl.DataFrame") -> dict[str, str]:
    """Name -> Markdown of the section of the search: a table of trials."""
    name = site.platform.name
    trainings = ", ".join(f"{model} {n}" for model, n in sorted(trials["model"].value_counts().iter_rows()))
    codes = ", ".join(f"`{code_version(model)}` ({model})" for model in sorted(set(trials["model"])))
    parts = [f"## {name}: the search", f"{SEARCH} Trainings: {trainings}. Code: {codes}.", ranking(trials)]
    return {f"{name} search": "\n\n".join(parts)}
