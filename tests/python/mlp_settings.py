"""The settings of the MLP job that its tests start from."""

from __future__ import annotations

from mlp.options import Settings


def settings(**changes: object) -> Settings:
    values: dict[str, object] = {
        "placement": "before",
        "epochs": 2,
        "batch_size": 16,
        "optimizer": "adam",
        "lr": 1e-3,
        "seed": 0,
        "dtype": "float32",
        "threads": 1,
        "preprocess": "zscore",
        "validate": "short",
    }
    return Settings(**{**values, **changes})
