"""What the parts of a trained MTMD do to a day's rows: why taking one away costs little, or much.

python -m benchmarks.parts --model .mtmd/kuairand/models/<version> --rows ".mtmd/kuairand/lake/joined_examples/ds=2022-05-04/data.parquet"

An ablation says what a part is worth, not why. Of a model with a part that hardly does anything an ablation cannot find
that it helps.

- Excitation: how far squeeze-and-excitation's gates are from 1, where they start, and how much they differ from row to row.
- Norm: how much the lengths of the rows differ that the layer normalisation before the cross layers makes alike. They come
  from layer normalisations already, through the gates.
- Cross: how large what the cross layers add is, beside what they are given.
- Vectors: how many directions hold 99 % of the variance of the logits that queries and items make together, beside the
  columns of their vectors; what a query or an item is worth by itself (`mtmd_model.main_effects`) is not part of it.

Shapes: B rows of a domain, F fields, T tasks, M width of the mixed experts, N rows of the day, D columns of a vector.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor, nn

from mtmd_assets.markdown import markdown_table
from mtmd_model import checkpoint
from mtmd_model.domain_expert import DomainExpert
from mtmd_model.predict import Predictor
from mtmd_model.squeeze_excitation import SqueezeExcitation

SHARE = 0.99
"""Of the variance of the logits."""
Seen = dict[str, list[tuple[int, float]]]
"""What is measured -> (rows, their mean) of each domain and batch."""


def towers(model: Predictor, rows: pa.Table) -> list[list[str]]:
    """A row a tower: excitation, norm and cross, means over the rows of all its domains."""
    found = []
    for side in ("query", "item"):
        with _watched(model.model.get_submodule(f"{side}_tower")) as seen:
            model.predict(rows)
        means = {name: _mean(parts) for name, parts in seen.items()}
        found.append(
            [side, *(f"{means[name]:.3f}" if name in means else "" for name in ("from 1", "by row", "norm", "cross"))]
        )
    return found


def vectors(model: Predictor, rows: pa.Table) -> list[list[object]]:
    """A row a task: the columns of its vectors, and how many directions hold `SHARE` of the logits' variance."""
    query, item = model.embed_queries(rows), model.embed_items(rows)
    found: list[list[object]] = []
    for task, of_query in query.items():
        query_ND, item_ND = (e.vectors[e.exists] for e in (of_query, item[task]))
        found.append([task, query_ND.shape[1], directions(query_ND, item_ND)])
    return found


def directions(query_ND: NDArray[Any], item_ND: NDArray[Any], share: float = SHARE) -> int:
    """How many directions hold a share of the variance of q · i, over all pairs of a query and an item, each about its mean.

    Of centred vectors the variance over all pairs is the trace of the product of their covariances, whose eigenvalues are
    those of the directions.
    """
    of_query_DD, of_item_DD = (np.cov(x_ND.T.astype(np.float64), ddof=0) for x_ND in (query_ND, item_ND))
    value_D = np.sort(np.linalg.eigvals(of_query_DD @ of_item_DD).real.clip(0))[::-1]
    return int(np.searchsorted(value_D.cumsum(), share * value_D.sum()) + 1)


@contextmanager
def _watched(tower: nn.Module) -> Iterator[Seen]:
    """Measures what goes through a tower's parts while it is used."""
    seen: Seen = defaultdict(list)

    def excitation(module: SqueezeExcitation, given: tuple[Tensor], _: Tensor) -> None:
        gate_BF = module.gate(given[0])
        seen["from 1"].append((len(gate_BF), (gate_BF - 1).abs().mean().item()))
        seen["by row"].append((len(gate_BF), gate_BF.std(0, correction=0).mean().item()))

    def cross(_: nn.Module, given: tuple[Tensor], crossed_TBM: Tensor) -> None:
        added_TB = (crossed_TBM - given[0]).norm(dim=-1) / given[0].norm(dim=-1)
        seen["cross"].append((added_TB.shape[1], added_TB.mean().item()))

    def norm(_: nn.Module, given: tuple[Tensor], __: Tensor) -> None:
        length_TB = given[0].norm(dim=-1)
        apart_T = length_TB.std(1, correction=0) / length_TB.mean(1)
        seen["norm"].append((length_TB.shape[1], apart_T.mean().item()))

    def watch(module: nn.Module, measure: Callable[..., None]) -> None:
        hooks.append(module.register_forward_hook(measure))

    hooks: list[Any] = []
    for module in tower.modules():
        if isinstance(module, SqueezeExcitation):
            watch(module, excitation)
        if isinstance(module, DomainExpert):
            watch(module.cross, cross)
            if module.norm_place != "none":
                watch(module.norm, norm)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _mean(parts: list[tuple[int, float]]) -> float:
    """Over rows."""
    return sum(rows * mean for rows, mean in parts) / sum(rows for rows, _ in parts)


def report(model: Predictor, rows: pa.Table) -> str:
    """Both tables, in Markdown."""
    header = ["tower", "gates from 1", "gates by row", "lengths before the norm", "cross beside its input"]
    of_vectors = markdown_table(["task", "columns", f"directions with {SHARE:.0%}"], vectors(model, rows))
    return f"{markdown_table(header, towers(model, rows))}\n\n{of_vectors}"


def main() -> None:
    """Print the report of a stored model on a day."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of a trained MTMD")
    parser.add_argument("--rows", type=Path, required=True, help="a day's file of joined_examples")
    options = parser.parse_args()
    print(report(checkpoint.load(options.model), pq.read_table(options.rows, partitioning=None)))


if __name__ == "__main__":
    main()
