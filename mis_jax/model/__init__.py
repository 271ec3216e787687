"""The network: arrays in, arrays out; no files, no mesh, no tokenizer."""
