"""From a prompt to an answer: sampling, the engine with its cache, and answers in batches."""
