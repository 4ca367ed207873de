"""Embedding tables: ids that the rows of a part lack are unknown to it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtmd_model.architectures import build
from mtmd_model.batch import Batch
from mtmd_model.config import MTMDConfig
from mtmd_model.contenders.mmoe_dcn import MMOEConfig
from mtmd_model.contenders.plain import PlainConfig
from mtmd_model.embeddings import FeatureEmbeddings
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.schema import Feature
from mtmd_model.train import TrainConfig, train
from mtmd_model.two_tower import count_parameters
from mtmd_model.vocabulary import MISSING, UNKNOWN
from tests.mtmd_model.sample import EVERYWHERE, examples, platform

PLAIN = PlainConfig(widths=(12, 8), width_divisor=8)
MTMD = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)
CONFIGS: dict[str, Any] = {
    "mtmd": MTMD,
    "pooled_towers": PLAIN,
    "mmoe_dcn": MMOEConfig(widths=(12, 8), width_divisor=8, experts=3, gate=(6,)),
    "slice_towers": PLAIN,
    "soft_slice_towers": PLAIN,
    "product_mtmd": MTMD,
}
USER = 2
"""The column of user_id among the query's categorical features."""


@pytest.fixture(scope="module")
def encoder(write) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


def two_features() -> FeatureEmbeddings:
    wide = Feature("wide", "query", "categorical", ("a", "b"), width=3, min_count=2)
    narrow = Feature("narrow", "query", "categorical", ("a",), width=2, buckets=3)
    return FeatureEmbeddings([narrow, wide], {"wide": 6, "narrow": 5}, ("a", "b"), std=1.0)


def test_a_value_that_was_counted_too_seldom_is_unknown():
    embeddings = two_features()
    with torch.no_grad():
        for table in embeddings.tables.values():
            table.normal_()
    ids, domain = torch.tensor([[3, 4], [4, 5], [MISSING, 4]]), torch.tensor([0, 0, 1])
    every = embeddings(ids, domain)
    unknown = embeddings(torch.tensor([[UNKNOWN, UNKNOWN]]), torch.tensor([0]))[0]
    # narrow's value 3 once, and wide's value 4 twice, in two blocks
    embeddings.count(torch.tensor([[3, 4], [MISSING, UNKNOWN]]), torch.tensor([0, 1]))
    # domain b has no narrow: its value 4 there trains nothing
    embeddings.count(torch.tensor([[4, 4], [UNKNOWN, 5]]), torch.tensor([1, 0]))
    torch.testing.assert_close(embeddings(ids, domain), every, msg="until all are counted")
    embeddings.keep_counted()
    for now in (embeddings.train(), embeddings.eval()):
        after = now(ids, domain)
        torch.testing.assert_close(after[0], every[0])
        # narrow's value 4 not at all, wide's value 5 once
        torch.testing.assert_close(after[1], unknown)
        # what is missing stays missing, and domains share what they know
        torch.testing.assert_close(after[2], every[2])


def test_parameters_in_use_are_counted():
    embeddings = two_features()
    # a missing vector a domain, the unknown, and four and three values
    assert embeddings.known_parameters() == 3 * (3 + 4) + 2 * (3 + 3)
    embeddings.count(torch.tensor([[2, 2], [3, 2], [MISSING, 3]]), torch.zeros(3, dtype=torch.long))
    embeddings.keep_counted()
    assert embeddings.known_parameters() == 3 * (3 + 1) + 2 * (3 + 2)


def test_a_tower_without_ids_has_no_parameters():
    embeddings = FeatureEmbeddings([], {}, ("a",))
    embeddings.count(torch.zeros(3, 0, dtype=torch.int32), torch.zeros(3, dtype=torch.long))
    embeddings.keep_counted()
    assert embeddings.known_parameters() == 0


def with_user(batch: Batch, user: int) -> Batch:
    ids = batch.query.ids.clone()
    ids[:, USER] = user
    return replace(batch, query=replace(batch.query, ids=ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_id_that_only_another_slice_has_is_unknown_to_models_that_share_nothing(encoder: Encoder, name: str):
    """Two slices of different surfaces and products, one user each."""
    torch.manual_seed(0)
    model = build(name, encoder, CONFIGS[name])
    batch = encoder.encode(examples(500))
    first, second = (
        batch.select(((batch.query.domain == n) & (batch.item.domain == n)).nonzero()[:, 0]) for n in (0, 1)
    )
    mine, other = 7, 9
    model.count_ids(with_user(first, mine))
    model.count_ids(with_user(second, other))
    model.keep_counted_ids()
    model.train()(first)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    unknown = model(with_user(first, UNKNOWN))
    assert not torch.equal(model(with_user(first, mine)), unknown)
    apart = name in ("slice_towers", "product_mtmd")
    assert torch.equal(model(with_user(first, other)), unknown) == apart
    assert torch.equal(model(with_user(first, 11)), unknown), "a user whom nobody has"


def test_a_trained_slice_knows_the_ids_of_its_own_rows(write, tmp_path: Path):
    table = examples(400)
    config = TrainConfig("slice_towers", PLAIN, batch_size=100, max_epochs=1, accelerator="cpu")
    result = train(platform(), [write(table)], [], config, tmp_path / "v")
    model, encoder = result.predictor.model, result.predictor.encoder
    for surface, product in EVERYWHERE:
        mine = [
            s == surface and p == product
            for s, p in zip(*(table[c].to_pylist() for c in ("surface", "product")), strict=True)
        ]
        items = Counter(i for i in table.filter(mine)["item_id"].to_pylist() if i is not None)
        expected = sum(count >= 2 for count in items.values())
        towers: Any = model.get_submodule(f"towers.={surface} x {product}")
        embeddings = towers["item"].input.embeddings
        # missing and unknown of category, brand and item_id; the categories that the slice has
        categories = len({c for c in table.filter(mine)["category"].to_pylist() if c is not None})
        brands = Counter(b for b in table.filter(mine)["brand"].to_pylist() if b is not None)
        known_brands = sum(count >= 3 for count in brands.values())
        assert embeddings.known.sum() == 6 + expected + categories + known_brands, (surface, product)
        assert 0 < expected < encoder.rows["item_id"] - 2 or surface == "home"
    assert result.manifest["params"] == count_parameters(model)
    assert 0 < count_parameters(model)["embedding"] < sum(p.numel() for p in model.embedding_tables())


def test_half_of_the_rows_know_half_of_the_ids(write, tmp_path: Path):
    """Of users with one row each, down-sampling knows those it kept."""
    table = examples(400)
    table = table.set_column(table.column_names.index("item_id"), "item_id", [list(range(200)) * 2])
    known = []
    for rate in (1.0, 0.5):
        config = TrainConfig("pooled_towers", PLAIN, batch_size=100, max_epochs=1, accelerator="cpu", sample_rate=rate)
        model: Any = train(platform(), [write(table)], [], config, tmp_path / "v").predictor.model
        known.append(int(model.item_tower.input.embeddings.known.sum()))
    assert known[0] > known[1] + 100


def test_a_model_stored_without_knowing_what_is_in_use_has_all(encoder: Encoder):
    model = build("mtmd", encoder, MTMD)
    for embeddings in model.feature_embeddings():
        embeddings.known.zero_()
    old = {name: value for name, value in model.state_dict().items() if not name.endswith(".known")}
    assert len(old) == len(model.state_dict()) - 2
    model.load_state_dict(old)
    assert all(e.known.all() for e in model.feature_embeddings())
