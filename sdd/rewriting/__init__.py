"""The unpruned model's own answers, and which of them become targets."""
