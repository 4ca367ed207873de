"""The sections of the search, one a model: a search of one leaves the others' as they are."""

from typing import TYPE_CHECKING

from mtmd_assets.home import Site
from mtmd_assets.model_store import code_version
from mtmd_assets.tuning import ranking

if TYPE_CHECKING:
    import polars as pl

SEARCH = """Mean LogMAE over the cells of a tuning day by trial (`mtmd_assets/tuning.py`): each once, on the last; on every
tuning day with two seeds what was given by `--try` and, of a search that has ended, what the platform file said and the
best two others. What was chosen after it, of the shipped platforms: [tuning.md](tuning.md)."""


def search(site: Site, trials: "pl.DataFrame") -> dict[str, str]:
    """Name -> Markdown of the section of each model that has trials."""
    platform = site.platform.name
    sections = {}
    for (model,), of_model in trials.group_by("model", maintain_order=True):
        setting = f"Trainings: {of_model['training'].n_unique()}. Code: `{code_version(str(model))}`."
        parts = [f"## {platform}: the search of {model}", f"{SEARCH} {setting}", ranking(of_model)]
        sections[f"{platform} search {model}"] = "\n\n".join(parts)
    return sections
