"""Evaluation through lm-eval's own API. `tiny` defines the embedded model's tasks, `harness` runs tasks on a model."""
