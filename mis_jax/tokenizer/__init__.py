"""Text to token ids: reading and writing of a checkpoint's tokenizer files."""
