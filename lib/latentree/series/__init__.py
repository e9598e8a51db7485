"""Models along training: the checkpoints of a run of ours, or revisions on the hub."""
