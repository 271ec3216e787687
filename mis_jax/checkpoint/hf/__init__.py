"""Files in the format of Hugging Face: config.json, generation and tokenizer files."""
