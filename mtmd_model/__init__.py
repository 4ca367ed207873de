"""MTMD: a two-tower lightweight ads ranker, in PyTorch and Lightning.

Needs torch, lightning, numpy and pyarrow only (safetensors to write and read a checkpoint); knows nothing of
Dagster, DuckDB or the platform file. Start at `mtmd.py` for the model and at `train.py` for a training run.

Nothing is imported here, so that `mtmd_model.schema` costs nothing to import.
"""
