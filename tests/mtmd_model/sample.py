"""A small platform with absent features, tasks that exist in some slices only, and missing values."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtmd_model.batch import Batch
from mtmd_model.domain_norm import DomainNorm
from mtmd_model.embeddings import FeatureEmbeddings
from mtmd_model.schema import Feature, Schema, Task
from mtmd_model.two_tower import TwoTower

SURFACES, PRODUCTS = ("home", "search", "related"), ("standard", "shopping")
EVERYWHERE = tuple((s, p) for s in SURFACES for p in PRODUCTS)


def platform(query_dense: int = 3, item_dense: int = 3, task_widths: tuple[int, ...] = (128, 32, 32, 32)) -> Schema:
    """ctr; gctr given ctr everywhere; octr given ctr on standard; cvr given ctr on shopping."""
    standard = tuple(s for s in EVERYWHERE if s[1] == "standard")
    shopping = tuple(s for s in EVERYWHERE if s[1] == "shopping")
    q = [Feature(f"q{i}", "query", "dense", SURFACES, log1p=i == 0) for i in range(query_dense)]
    i = [Feature(f"i{i}", "item", "dense", PRODUCTS) for i in range(item_dense)]
    return Schema(
        platform="test",
        surfaces=SURFACES,
        products=PRODUCTS,
        tasks=(
            Task("ctr", None, 2.0, task_widths[0], EVERYWHERE),
            Task("gctr", "ctr", 1.0, task_widths[1], EVERYWHERE),
            Task("octr", "ctr", 1.0, task_widths[2], standard),
            Task("cvr", "ctr", 1.0, task_widths[3], shopping),
        ),
        features=(
            *q,
            Feature("query_match", "query", "dense", ("search",)),
            Feature("device", "query", "categorical", SURFACES, width=4, vocabulary=("ios", "web"), key=True),
            Feature("term", "query", "categorical", ("search",), width=4, buckets=50),
            Feature("user_id", "query", "categorical", SURFACES, buckets=100),
            *i,
            Feature("price", "item", "dense", ("shopping",), log1p=True),
            Feature("category", "item", "categorical", PRODUCTS, width=4, vocabulary=("a", "b", "c"), key=True),
            Feature("brand", "item", "categorical", ("shopping",), min_count=3, key=True),
            Feature("item_id", "item", "categorical", PRODUCTS, min_count=2),
        ),
    )


def examples(rows: int, seed: int = 0, schema: Schema | None = None) -> pa.Table:
    """Joined examples whose scores depend on the features, the surface and the product."""
    schema = schema or platform()
    rng = np.random.default_rng(seed)
    surface, product = rng.choice(3, rows, p=(0.6, 0.3, 0.1)), rng.choice(2, rows, p=(0.7, 0.3))
    columns: dict[str, object] = {
        "surface": np.array(SURFACES)[surface],
        "product": np.array(PRODUCTS)[product],
    }
    signal = {"query": np.zeros(rows), "item": np.zeros(rows)}
    for n, f in enumerate(schema.features):
        domain = surface if f.side == "query" else product
        has = np.isin(domain, [schema.domains(f.side).index(d) for d in f.domains])
        if f.kind == "dense":
            x = rng.normal(10.0 * n * (domain + 1), 1.0 + domain)
            signal[f.side] += np.where(has, np.sin((x - 10.0 * n * (domain + 1)) / (1 + domain) + n), 0)
            missing = ~has | (rng.random(rows) < 0.1)
            columns[f.name] = pa.array(x, mask=missing)
        else:
            values = f.vocabulary or tuple(str(v) for v in range(20))
            k = rng.integers(len(values), size=rows)
            signal[f.side] += np.where(has, np.cos(k + n), 0)
            column = np.array(values)[k] if f.vocabulary else k
            columns[f.name] = pa.array(column, mask=~has | (rng.random(rows) < 0.05))
    z = -2 + 0.3 * signal["query"] * signal["item"] + 0.5 * surface - 0.7 * product
    ctr = 1 / (1 + np.exp(-z))
    scores = {"ctr": ctr, "gctr": ctr * 0.5, "octr": ctr / (1 + np.exp(-signal["item"])), "cvr": ctr * 0.05}
    for task in schema.tasks:
        exists = np.isin(surface * 2 + product, [SURFACES.index(s) * 2 + PRODUCTS.index(p) for s, p in task.slices])
        columns[f"score_{task.name}"] = pa.array(scores[task.name], mask=~exists)
    columns["weight"] = np.where(rng.random(rows) < 0.1, 2.0, 1.0)
    return pa.table(columns)


def assert_gradients_are_slopes(model: TwoTower, batch: Batch) -> None:
    """Autograd's gradient of a random sum of all logits is its slope along random directions, in float64.

    One direction moves only what every other part reads, tables and norms: a path that autograd misses weighs most
    there. The others move every parameter.
    """
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    weight_BT = torch.randn(batch.labels.shape, generator=generator) * ~batch.labels.isnan()

    def total() -> torch.Tensor:
        return (model(batch) * weight_BT).sum()

    model.zero_grad()
    total().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = [m for m in model.modules() if isinstance(m, DomainNorm | FeatureEmbeddings)]
    first = {id(p) for m in inputs for p in m.parameters()}
    for moved in ([p for p in parameters if id(p) in first], parameters, parameters):
        ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in moved]
        expected = 0.0
        for p, way in zip(moved, ways, strict=True):
            assert p.grad is not None
            expected += (p.grad * way).sum().item()
        sums, eps = [], 1e-6
        with torch.no_grad():
            for step in (eps, -2 * eps, eps):  # the last one goes back
                for p, way in zip(moved, ways, strict=True):
                    p.add_(way, alpha=step)
                sums.append(total().item())
        assert (sums[0] - sums[1]) / (2 * eps) == pytest.approx(expected, rel=1e-5)
