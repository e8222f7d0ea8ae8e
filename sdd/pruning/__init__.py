"""Checkpoints without blocks, with narrower MLPs, or repaired at a cut; streamed from file to file."""
