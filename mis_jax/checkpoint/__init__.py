"""Checkpoints of three layouts, both ways; LoRA adapters; the state of a run."""
