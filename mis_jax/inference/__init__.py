"""From a prompt to an answer: sampling, the engine with its rows, and answers in batches."""
