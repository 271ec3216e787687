"""From annotation files to batches: checks, tiles, tokens, packing and the order of samples."""
