"""What is measured of a student besides its scores: drafts, distribution shift, cost."""
