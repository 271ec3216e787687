"""Order, resumption, shapes and bad samples of the training pipeline."""

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_world import picture, run_config, sample

from mis_jax.config import RunConfig
from mis_jax.data.pipeline import RenderRow, StepData, TrainingData
from mis_jax.data.sources import Row

ROWS = 11


def data_of(config: RunConfig, processor) -> TrainingData:
    return TrainingData(config, processor)


def take(iterator, count: int) -> list[StepData]:
    return [next(iterator) for _ in range(count)]


def ids_of(steps: list[StepData]) -> list[tuple[str, ...]]:
    return [step.ids for step in steps]


def equal(a: StepData, b: StepData) -> bool:
    names = [field.name for field in dataclasses.fields(a.batch)]
    return (a.ids, a.skipped) == (b.ids, b.skipped) and all(
        np.array_equal(getattr(a.batch, name), getattr(b.batch, name)) for name in names
    )


@pytest.fixture
def config(tiny_checkpoint, tiny_data, tmp_path) -> RunConfig:
    return run_config(tiny_checkpoint, tiny_data, tmp_path / "run")


@pytest.fixture
def steps_of(tiny_processor):
    """The first steps of a run; its iterator is closed again."""

    def steps(config: RunConfig, count: int) -> list[StepData]:
        iterator = TrainingData(config, tiny_processor).iterator()
        try:
            return take(iterator, count)
        finally:
            iterator.close()

    return steps


def changed(config: RunConfig, **changes) -> RunConfig:
    root = config.data.sources[0].root
    assert root is not None
    return run_config(config.model, root, config.output, **changes)


def test_every_sample_once_an_epoch_in_a_new_order(config, steps_of):
    ids = [
        i for step in steps_of(changed(config, train__global_batch=1), 3 * ROWS) for i in step.ids
    ]
    epochs = [ids[k * ROWS : (k + 1) * ROWS] for k in range(3)]
    everything = sorted(f"s{i}" for i in range(ROWS))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert epochs[0] != everything


def test_the_order_is_a_function_of_the_seed(config, steps_of):
    first = steps_of(config, 6)
    again = steps_of(config, 6)
    assert all(map(equal, first, again))
    assert ids_of(steps_of(changed(config, seed=8), 6)) != ids_of(first)


def test_the_order_does_not_depend_on_the_batch(config, steps_of):
    wide = [i for step in steps_of(changed(config, train__global_batch=8), 3) for i in step.ids]
    narrow = [i for step in steps_of(changed(config, train__global_batch=2), 12) for i in step.ids]
    assert wide == narrow


def test_steps_of_epochs(config, tiny_processor):
    epochs = changed(config, train__steps=None, train__epochs=3, train__global_batch=4)
    assert data_of(epochs, tiny_processor).steps == 8  # 33 rows; the last one is left over
    assert data_of(config, tiny_processor).steps == 6
    few = changed(config, train__steps=None, train__epochs=1, train__global_batch=12)
    with pytest.raises(
        ValueError, match=r"11 samples in 1 epoch.* train.global_batch 12; lower it"
    ):
        data_of(few, tiny_processor)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_in_the_middle_of_an_epoch(config, tiny_processor, stop):
    first = data_of(config, tiny_processor).iterator()
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))  # as a checkpoint stores it
    expected = take(first, 5)
    second = data_of(config, tiny_processor).iterator()
    second.set_state(state)
    assert all(map(equal, take(second, 5), expected))
    second.set_state(state)  # also back in time
    assert all(map(equal, take(second, 5), expected))
    first.close(), second.close()


def test_micro_batches_are_the_rows_of_the_step_in_order(config, steps_of):
    (whole,), (cut,) = steps_of(config, 1), steps_of(changed(config, train__micro_batch=2), 1)
    assert whole.batch.input_ids.shape[:2] == (1, 4)
    assert cut.batch.input_ids.shape[:2] == (2, 2)
    assert cut.ids == whole.ids
    for field in dataclasses.fields(whole.batch):
        a, b = (np.asarray(getattr(step.batch, field.name)) for step in (whole, cut))
        assert np.array_equal(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:])), field.name


def test_a_varied_stream_has_few_shapes(tiny_checkpoint, tiny_processor, tmp_path):
    """Texts of 1 to 200 words, no to three pictures of any form: buckets, not sizes."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(120):
        names = [f"{index}-{k}.png" for k in range(rng.integers(0, 4))]
        for name in names:
            picture(tmp_path / name, *(int(n) for n in rng.integers(20, 200, 2)), index)
        row = sample(index, names)
        row["conversations"][1]["value"] = "A cup is safe. " * int(rng.integers(1, 60))
        rows.append(row)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(
        tiny_checkpoint, tmp_path, tmp_path / "run", data__max_length=2048, data__max_tiles=6,
        train__steps=120, train__global_batch=1,
    )  # fmt: skip
    iterator = TrainingData(config, tiny_processor).iterator()
    steps = take(iterator, 120)
    iterator.close()
    sizes = {(s.batch.input_ids.shape[-1], s.batch.tiles.shape[1]) for s in steps}
    real = {(int(s.batch.segment_ids.sum()), int(s.batch.tile_mask.sum())) for s in steps}
    assert {length for length, _ in sizes} <= {2048, 1024, 512, 256, 128, 64, 32}
    assert {tiles for _, tiles in sizes} <= {0, 1, 2, 4, 8, 16}
    assert len(sizes) < 20 < len(real)


def test_reduction_reaches_the_weights(config, steps_of):
    for reduction, power in (("token", 0), ("sample", -1), ("square", -0.5)):
        (step,) = steps_of(changed(config, train__loss_reduction=reduction), 1)
        for row in np.asarray(step.batch.loss_weights)[0]:
            weights = row[row > 0]
            np.testing.assert_allclose(weights, len(weights) ** power, rtol=1e-6)


# Bad samples


def bad_folder(folder: Path, index: int, change) -> Path:
    """Eight good rows with a picture each; `change(row, picture's path)` spoils one."""
    rows = []
    for k in range(8):
        path = picture(folder / "images" / f"{k}.png", 60, 60, k)
        rows.append(sample(k, [f"images/{k}.png"]))
        if k == index:
            change(rows[-1], path)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def no_image(row, path):
    del row["image"]


def missing_file(row, path):
    path.unlink()


def truncated(row, path):
    path.write_bytes(path.read_bytes()[:150])


def no_picture_at_all(row, path):
    path.write_text("not a picture")


def a_folder(row, path):
    row["image"] = ["images"]


def too_many_markers(row, path):
    row["conversations"][0]["value"] += "<image>"


def too_few_markers(row, path):
    row["image"] = row["image"] * 2
    row["conversations"][0]["value"] = "<image>\nWhat?"


def empty_answer(row, path):
    row["conversations"][1]["value"] = " \n"


def no_answer(row, path):
    row["conversations"].pop()


def unknown_role(row, path):
    row["conversations"][1]["from"] = "assistant"


def wrong_turns(row, path):
    row["conversations"] = "Hello"


def too_long(row, path):
    row["conversations"][1]["value"] = "A cup is safe. " * 60


BAD = {
    no_image: r"field 'image' is missing but 'conversations' has 1 <image>; name",
    missing_file: r"image .*images/3.png does not exist; check the path",
    truncated: r"image .*images/3.png cannot be decoded .*cut short.*fetch",
    no_picture_at_all: r"image .*images/3.png cannot be decoded",
    a_folder: r"image .*images cannot be opened",
    too_many_markers: r"field 'image' names 1 image\(s\) but .* have 2 <image>; write one",
    too_few_markers: r"field 'image' names 2 image\(s\) but .* have 1 <image>; write one",
    empty_answer: r"conversations\[1\].value is an empty answer; fill it in or drop the row",
    no_answer: r"'conversations' ends without a 'gpt' turn; add the answer",
    unknown_role: r"conversations\[1\].from is 'assistant'; rename it to",
    wrong_turns: r"'conversations' must be a list",
    too_long: r"\d+ tokens, more than data.max_length 96; raise it, lower .*on_bad_sample: skip",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_a_bad_sample_is_one_line_with_file_row_and_field(
    tiny_checkpoint, tiny_processor, tmp_path, spoil
):
    data = bad_folder(tmp_path, 3, spoil)
    config = run_config(tiny_checkpoint, data, tmp_path / "run", train__global_batch=8)
    iterator = TrainingData(config, tiny_processor).iterator()
    with pytest.raises(ValueError, match=rf"samples.jsonl, row 3: .*{BAD[spoil]}") as caught:
        next(iterator)
    iterator.close()
    assert "\n" not in str(caught.value)


def test_one_image_needs_no_marker(tiny_processor, tiny_data):
    row = sample(0, ["images/0-0.png"])
    row["conversations"][0]["value"] = "What?"
    render = RenderRow(tiny_processor, max_tiles=1, max_length=96)
    made = render(Row("a", "here", (tiny_data / "images/0-0.png",), row))
    assert made.tiles_per_image == (1,)


def test_skipping_passes_over_bad_samples_and_counts_them(
    tiny_checkpoint, tiny_processor, tmp_path, caplog
):
    data = bad_folder(tmp_path, 3, truncated)
    config = run_config(
        tiny_checkpoint, data, tmp_path / "run", data__on_bad_sample="skip", train__steps=None,
        train__epochs=3, train__global_batch=4,
    )  # fmt: skip
    made = TrainingData(config, tiny_processor)
    iterator = made.iterator()
    take(iterator, 2)
    state = iterator.get_state()
    rest = take(iterator, made.steps - 2)
    fresh = made.iterator()
    everything = take(fresh, 2)
    fresh.set_state(state)
    assert all(map(equal, take(fresh, made.steps - 2), rest))  # the counts resume too
    iterator.close(), fresh.close()
    everything += rest
    ids = [i for step in everything for i in step.ids]
    assert len(ids) == 24  # the steps that were planned
    assert "s3" not in ids
    assert collections.Counter(ids[:21]) == {f"s{i}": 3 for i in range(8) if i != 3}
    assert sum(step.skipped for step in everything) in (3, 4)  # samples 22 to 24 are of epoch four
    warnings = {record.message for record in caplog.records}
    assert len(warnings) == 1
    assert "skipped: " in (warning := warnings.pop()) and "row 3" in warning


def test_nothing_but_bad_samples_is_no_endless_search(tiny_checkpoint, tiny_processor, tmp_path):
    data = bad_folder(tmp_path, 3, truncated)
    shutil.rmtree(data / "images")
    config = run_config(tiny_checkpoint, data, tmp_path / "run", data__on_bad_sample="skip")
    iterator = TrainingData(config, tiny_processor).iterator()
    with pytest.raises(ValueError, match=r"all 8 samples are bad; the last one: .*does not exist"):
        next(iterator)
    iterator.close()


@pytest.mark.slow
def test_worker_processes_change_nothing(
    config, steps_of, tiny_processor, tiny_checkpoint, tmp_path
):
    """The samples of every step, exact resumption, and the error of a bad sample."""
    expected = steps_of(config, 7)
    parallel = data_of(changed(config, data__workers=2), tiny_processor)
    iterator = parallel.iterator()
    assert all(map(equal, take(iterator, 3), expected))
    state = json.loads(json.dumps(iterator.get_state()))
    assert all(map(equal, take(iterator, 4), expected[3:]))
    iterator.close()
    iterator = parallel.iterator()
    iterator.set_state(state)
    assert all(map(equal, take(iterator, 4), expected[3:]))
    iterator.close()

    data = bad_folder(tmp_path, 3, truncated)
    bad = run_config(
        tiny_checkpoint, data, tmp_path / "run", train__global_batch=8, data__workers=2
    )
    iterator = data_of(bad, tiny_processor).iterator()
    with pytest.raises(ValueError, match=r"samples.jsonl, row 3: image .* cannot be decoded"):
        next(iterator)
    iterator.close()
