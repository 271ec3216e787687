"""What VLMEvalKit's benchmarks, prompts, matching and files are, so that numbers compare with its.

Everything here follows its commit ``e8e78f05``; docs and tests list where this package differs.
"""
