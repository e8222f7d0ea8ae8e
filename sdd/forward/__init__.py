"""Passes of a model over rows: batches by length, blocks passed over, given answers, losses."""
