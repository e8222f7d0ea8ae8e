"""What of a student is trained, and the training itself."""
