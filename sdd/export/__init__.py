"""A student to take home: a stock checkpoint with a model card."""
