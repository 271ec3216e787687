"""Fine-tuning: loss, optimizer, the compiled step, and the trainer around it."""
