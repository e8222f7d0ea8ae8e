"""Evaluation through lm-eval's own API. `tiny` defines the embedded model's tasks, `harness` runs tasks on a model,
`likelihoods` computes what they have in common once."""
