"""`docs/results.md`: what the experiments' tables say, in words and tables that a person can check with SQL.

No model is judged here: it reads `improvement_results`, `experiment_models`, `slice_metrics`, `trials`, the routing table and
the trainings' records of one platform, and rewrites that platform's sections of the document: the contenders, the
ablations, the search. A section of which this home has no tables stays as it was: each says what it is of.
"""

from datetime import date

from mtmd_assets.home import Site
from mtmd_assets.results.ablations import ablations_section
from mtmd_assets.results.contenders import contenders_section
from mtmd_assets.results.result import result_of


def comparison(site: Site, last: date) -> dict[str, str]:
    """Name -> Markdown of the sections of what was compared on the evaluation days up to `last`: contenders, ablations."""
    name = site.platform.name
    with result_of(site, last) as con:
        found = {name: contenders_section(con, site), f"{name} ablations": ablations_section(con, site)}
    return {key: "\n\n".join(parts) for key, parts in found.items() if parts}
