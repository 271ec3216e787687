"""From a prompt to an answer: sampling, the engine with its slots, and answers in batches."""
