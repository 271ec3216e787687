"""Evaluation: benchmarks, judges, a resumable runner, statistics and reports.

The three stages are separate on purpose, so that each can be repeated without the one before:

1. `runner.generate_answers` asks the model and appends `RUN/<benchmark>/samples.jsonl`;
2. `runner.judge_run` labels the answers and appends `RUN/<benchmark>/verdicts.jsonl`;
3. `scoring.summarise` counts the labels into `RUN/results.json`.

`report.write_report` then compares the results of one or more runs.
"""
