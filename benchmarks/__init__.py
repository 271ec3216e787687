"""Ours against the peer and against the machine, measured in one run."""
