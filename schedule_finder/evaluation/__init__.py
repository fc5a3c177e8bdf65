"""Step 5: pruned models against the full one on held-out samples."""
