"""What work takes, by formulas: seconds, memory, disk."""
