"""The columns of every table of a platform, with their DuckDB types: what SQL users rely on.

Wide and typed: one column a feature, a score and an outcome. `ds`, the partition day, is not listed: it is the
Hive key of the path.
"""

import sql
from mtmd_assets.platform import Platform
from mtmd_assets.platform_names import IDS
from mtmd_assets.platform_parts import Feature

Columns = dict[str, str]

VIEWS = ("feature_drift", "feature_missingness", "slice_metrics", "improvements")
"""Views over the tables' own, `sql/<name>.sql`, in order."""

_EXTRA = {"double": "DOUBLE", "integer": "BIGINT", "text": "VARCHAR"}


def feature_type(feature: Feature) -> str:
    """DuckDB type of a feature column."""
    if feature.kind == "dense":
        return "FLOAT"
    return "BIGINT" if feature.type == "integer" else "VARCHAR"


def tables(platform: Platform) -> dict[str, Columns]:
    """Table name -> column name -> DuckDB type, in column order."""
    id_ = "BIGINT" if platform.id_type == "integer" else "VARCHAR"
    keys = {
        **dict.fromkeys(IDS, id_),
        "ts": "TIMESTAMP",
        "surface": "VARCHAR",
        "product": "VARCHAR",
    }
    logged = {f.name: feature_type(f) for f in platform.features if not f.history}
    features = {f.name: feature_type(f) for f in platform.features}
    outcomes = {f"outcome_{t}": "TINYINT" for t in platform.task_names}
    scores = {f"score_{t}": "DOUBLE" for t in platform.task_names}
    rejected = {"source": "VARCHAR", "impression_id": id_, "reason": "VARCHAR", "row": "VARCHAR"}
    version = {"model": "VARCHAR", "model_version": "VARCHAR", "seed": "INTEGER"}
    slice_ = {"surface": "VARCHAR", "product": "VARCHAR"}
    models = {
        **version,
        "window_start": "DATE",
        "window_end": "DATE",
        "rows": "BIGINT",
        "embedding_params": "BIGINT",
        "dense_params": "BIGINT",
        "data_hashes": "VARCHAR",
        "ranker_versions": "VARCHAR[]",
        "code_version": "VARCHAR",
        "config": "VARCHAR",
        "epochs": "INTEGER",
        "best_epoch": "INTEGER",
        "validation_loss": "DOUBLE",
        "validation_logmae": "DOUBLE",
        "promoted": "BOOLEAN",
    }
    predictions = {
        **version,
        "impression_id": id_,
        "user_id": id_,
        **slice_,
        "task": "VARCHAR",
        "score": "DOUBLE",
        "probability": "DOUBLE",
    }
    metrics = {
        **version,
        **slice_,
        "task": "VARCHAR",
        "bucket": "INTEGER",
        "rows": "BIGINT",
        "logmae": "DOUBLE",
        "mae": "DOUBLE",
        "kl": "DOUBLE",
        "bce": "DOUBLE",
        "calibration": "DOUBLE",
        "floored": "DOUBLE",
    }
    routing = {
        "model_version": "VARCHAR",
        "tower": "VARCHAR",
        "domain": "VARCHAR",
        "task": "VARCHAR",
        "expert": "VARCHAR",
        "rows": "BIGINT",
        "mean_gate": "DOUBLE",
        "max_gate_share": "DOUBLE",
        "entropy": "DOUBLE",
        "entropy_of_mean": "DOUBLE",
    }
    return {
        "impressions": {**keys, **logged, **outcomes, **{n: _EXTRA[t] for n, t in platform.extras.items()}},
        "heavyweight_scores": {"impression_id": id_, "scored_at": "TIMESTAMP", "ranker_version": "VARCHAR", **scores},
        "log_rejected_rows": rejected,
        # One row: the log's rows as received, so that `row_counts` does not add up by construction.
        "log_row_counts": {"received": "BIGINT"},
        "joined_examples": {**keys, **features, **scores, **outcomes, "ranker_version": "VARCHAR", "weight": "DOUBLE"},
        "rejected_rows": rejected,
        "row_counts": {"source": "VARCHAR", "received": "BIGINT", "accepted": "BIGINT", "rejected": "BIGINT"},
        # The view `feature_missingness` adds to it the rule `drift`, computed when read.
        "feature_contract": {
            **slice_,
            "feature": "VARCHAR",
            "rule": "VARCHAR",
            "rows": "BIGINT",
            "missing": "BIGINT",
            "missing_rate": "DOUBLE",
            "min_rate": "DOUBLE",
            "max_rate": "DOUBLE",
            "passed": "BOOLEAN",
        },
        "models": models,
        "predictions": predictions,
        # The view `slice_metrics` is both.
        "daily_slice_metrics": metrics,
        "experiment_slice_metrics": metrics,
        # `scored_data` is a hash of the rows of the evaluation day.
        "experiment_models": {**models, "scored_data": "VARCHAR"},
        "experiment_predictions": predictions,
        "experiment_routing_metrics": {"seed": "INTEGER", **routing},
        # The view `improvements` shows that of the latest evaluation days.
        "improvement_results": {
            "result_id": "VARCHAR",
            "eval_start": "DATE",
            "eval_end": "DATE",
            "contender": "VARCHAR",
            **slice_,
            "task": "VARCHAR",
            "bucket": "INTEGER",
            "rows": "BIGINT",
            "users": "BIGINT",
            "seeds": "INTEGER",
            "mtmd": "DOUBLE",
            "contender_logmae": "DOUBLE",
            "improvement": "DOUBLE",
            "low": "DOUBLE",
            "high": "DOUBLE",
            "joint_low": "DOUBLE",
            "joint_high": "DOUBLE",
            "by_rows": "DOUBLE",
            "by_rows_low": "DOUBLE",
            "by_rows_high": "DOUBLE",
        },
        "trials": {
            "model": "VARCHAR",
            "trial": "VARCHAR",
            "seed": "INTEGER",
            "training": "VARCHAR",
            "config": "VARCHAR",
            "window_start": "DATE",
            "window_end": "DATE",
            "cells": "INTEGER",
            "logmae": "DOUBLE",
            "validation_loss": "DOUBLE",
            "epochs": "INTEGER",
            "best_epoch": "INTEGER",
            "seconds": "DOUBLE",
        },
        "routing_metrics": routing,
        "item_embeddings": {
            "model_version": "VARCHAR",
            "item_id": id_,
            "product": "VARCHAR",
            "task": "VARCHAR",
            "embedding": "FLOAT[]",
        },
        "query_embeddings": {
            "model_version": "VARCHAR",
            "request_id": id_,
            "user_id": id_,
            "surface": "VARCHAR",
            "task": "VARCHAR",
            "embedding": "FLOAT[]",
        },
    }


def views(platform: Platform) -> str:
    """Statements that define the macros and the views over the tables' own; numbers of the platform file that these read
    are macros without arguments."""
    numbers = {"drift_days": platform.drift.days, "drift_tolerance": platform.drift.tolerance}
    macros = [f"CREATE OR REPLACE MACRO {name}() AS {value};" for name, value in numbers.items()]
    return "\n".join([sql.text("macros"), *macros, *map(sql.text, VIEWS)])
