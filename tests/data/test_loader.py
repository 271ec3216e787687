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
from mis_jax.data.loader import BAD_SAMPLES, MIXTURE, SURVEY, StepData, TrainingData
from mis_jax.data.mixture import Annotation
from mis_jax.data.preprocess import PreprocessSample, TileCache

ROWS = 11


def data_of(config: RunConfig, processor) -> TrainingData:
    return TrainingData(config, processor)


def take(iterator, count: int) -> list[StepData]:
    return [next(iterator) for _ in range(count)]


def ids_of(steps: list[StepData]) -> list[tuple[str, ...]]:
    return [step.ids for step in steps]


def equal(a: StepData, b: StepData) -> bool:
    names = [field.name for field in dataclasses.fields(a.batch)]
    return (a.ids, a.rejected) == (b.ids, b.rejected) and all(
        np.array_equal(getattr(a.batch, name), getattr(b.batch, name)) for name in names
    )


@pytest.fixture
def config(tiny_checkpoint, tiny_data, tmp_path) -> RunConfig:
    return run_config(tiny_checkpoint, tiny_data, tmp_path / "run")


@pytest.fixture
def steps_of(tiny_processor):
    """The first steps of a run; its iterator is closed again."""

    def steps(config: RunConfig, count: int, start: int = 0, rows=None) -> list[StepData]:
        if config.train.steps is not None:  # a longer run begins like a shorter one
            config = changed(config, train__steps=max(config.train.steps, start + count))
        iterator = TrainingData(config, tiny_processor).iterator(start, rows)
        try:
            return take(iterator, count)
        finally:
            iterator.close()

    return steps


def changed(config: RunConfig, **changes) -> RunConfig:
    """`changes` are `section__field=value`, or `field=value` at the top."""
    sections: dict[str, dict] = {}
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        sections.setdefault(section, {})[field] = value
    top = sections.pop("", {})
    top |= {s: dataclasses.replace(getattr(config, s), **f) for s, f in sections.items()}
    return dataclasses.replace(config, **top)


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


def test_a_checkpoint_reads_no_annotation_again(config, tiny_processor, monkeypatch):
    """Each has the fingerprint; a million annotations take 22 s to decode."""
    data = data_of(config, tiny_processor)
    known = data.fingerprint
    monkeypatch.setattr("mis_jax.data.annotation_store._decoded", None)
    assert data.fingerprint == known


def test_the_order_does_not_depend_on_the_batch(config, steps_of):
    wide = [i for step in steps_of(changed(config, train__global_batch=8), 3) for i in step.ids]
    narrow = [i for step in steps_of(changed(config, train__global_batch=2), 12) for i in step.ids]
    assert wide == narrow


def test_steps_of_epochs(config, tiny_processor):
    """Epochs are trained on whole: the last step may have empty rows."""
    assert data_of(config, tiny_processor).steps == 6
    made = data_of(
        changed(config, train__steps=None, train__epochs=3, train__global_batch=4), tiny_processor
    )
    assert made.steps == 9  # 33 rows
    steps = list(iterator := made.iterator())
    iterator.close()
    counts = collections.Counter(i for step in steps for i in step.ids)
    assert counts == {f"s{i}": 3 for i in range(ROWS)}
    last = steps[-1].batch
    assert (np.asarray(last.segment_ids).max(axis=-1) > 0).tolist() == [[True, False, False, False]]
    masks, tiles = (np.asarray(f)[0].reshape(4, -1) for f in (last.tile_mask, last.tiles))
    assert not masks[1:].any() and not tiles[1:].any()
    assert not np.asarray(last.loss_weights)[0, 1:].any()


PACKED = dict(data__packing=True, data__max_length=400, train__global_batch=2)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_at_any_step(config, steps_of, stop, packing):
    settings = changed(config, train__steps=8, **(PACKED if packing else {}))
    whole = steps_of(settings, 8)
    assert all(map(equal, steps_of(settings, 8 - stop, start=stop), whole[stop:]))


@pytest.mark.parametrize("packing", [False, True])
def test_hosts_share_a_step_and_a_run_changes_their_number(
    config, steps_of, tiny_processor, packing
):
    """2 hosts, then 1, then 4: every sample of the epochs exactly once, in the same batches."""
    packed = dict(data__packing=True, data__max_length=200) if packing else {}
    settings = changed(config, train__steps=None, train__epochs=4, **packed)
    count = TrainingData(settings, tiny_processor).steps
    whole = steps_of(settings, count)
    parts = [(0, 1, 2), (1, 1, 1), (2, count - 2, 4)]  # first step, steps, hosts
    assert count > 2
    seen: list[str] = []
    for start, steps, hosts in parts:
        each = 4 // hosts
        mine = [
            steps_of(settings, steps, start, range(host * each, (host + 1) * each))
            for host in range(hosts)
        ]
        for step in range(steps):
            expected = whole[start + step]
            for field in dataclasses.fields(expected.batch):
                joined = np.concatenate(
                    [np.asarray(getattr(m[step].batch, field.name)) for m in mine], axis=1
                )
                assert np.array_equal(joined, getattr(expected.batch, field.name)), field.name
            assert all(m[step].ids == expected.ids for m in mine)
            seen += expected.ids
    assert collections.Counter(seen) == {f"s{i}": 4 for i in range(ROWS)}


def test_packed_rows_hold_whole_samples(config, steps_of, tiny_processor):
    """The samples of a row stand one after the other, as they would alone."""
    settings = changed(config, **PACKED, train__loss_reduction="square")
    data = TrainingData(settings, tiny_processor)
    render = data.render
    rows = {row.id: render(row) for row in data.annotations}
    for step in steps_of(settings, 4):
        found = iter(step.ids)
        fields = {
            f.name: np.asarray(getattr(step.batch, f.name))[0]
            for f in dataclasses.fields(step.batch)
        }
        tiles = fields["tiles"].reshape(2, -1, *fields["tiles"].shape[1:])
        for row in range(2):
            segments = fields["segment_ids"][row]
            assert segments.max() > 1
            start = tile = 0
            for number in range(1, segments.max() + 1):
                one = rows[next(found)]
                n = len(one.input_ids)
                here = slice(start, start + n)
                assert (segments[here] == number).all()
                assert fields["input_ids"][row, here].tolist() == one.input_ids.tolist()
                assert fields["positions"][row, here].tolist() == list(range(n))
                weight = one.loss_mask.sum() ** -0.5
                expected = one.loss_mask * np.float32(weight)
                np.testing.assert_allclose(fields["loss_weights"][row, here], expected, rtol=1e-6)
                assert np.array_equal(tiles[row, tile : tile + len(one.tiles)], one.tiles)
                start, tile = start + n, tile + len(one.tiles)
            assert not segments[start:].any()
        assert next(found, None) is None
    assert {s.batch.input_ids.shape for s in steps_of(settings, 4)} == {(1, 2, 400)}


def test_a_sample_with_more_tiles_than_a_row(config, tiny_processor):
    settings = changed(config, **PACKED, data__pack_tiles=1)
    with pytest.raises(ValueError, match=r"data\.pack_tiles is 1, but a sample has 2 tiles; raise"):
        TrainingData(settings, tiny_processor)


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


@pytest.mark.parametrize("reduction", ["token", "square"])
@pytest.mark.parametrize("packing", [False, True])
def test_groups_weigh_alike_whoever_holds_their_sequences(config, steps_of, packing, reduction):
    """`loss_average: micro` divides by the loss tokens of a group; a host may hold half of it."""
    settings = changed(config, train__loss_reduction=reduction)
    if packing:
        settings = changed(settings, data__packing=True, data__max_length=200)
    micro = changed(settings, train__loss_average="micro", train__loss_group=2)
    for here, plain in zip(steps_of(micro, 3), steps_of(settings, 3), strict=True):
        weights, ones = (np.asarray(step.batch.loss_weights)[0] for step in (here, plain))
        pairs = ones.reshape(2, 2, -1)
        expected = pairs / pairs.sum(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(weights, expected.reshape(ones.shape), rtol=1e-6)
    hosts = [steps_of(micro, 3, rows=rows) for rows in ([0, 3], [1, 2])]
    for number, whole in enumerate(steps_of(micro, 3)):
        whole = np.asarray(whole.batch.loss_weights)
        for rows, host in zip(([0, 3], [1, 2]), hosts, strict=True):
            assert np.array_equal(np.asarray(host[number].batch.loss_weights), whole[:, rows])


def _turns(*texts: str) -> list[dict[str, str]]:
    names = {"h": "human", "g": "gpt", "s": "system"}
    return [{"from": names[text[0]], "value": text[2:]} for text in texts]


#: By kind: fields and turns of a row, and the turns that the official code trains on (`@` is an
#: image).
UPSTREAM = {
    "an empty list or name of images": [
        ({"image": []}, ("h:Hi", "g:Yes"), "h:Hi g:Yes"),
        ({"image": ""}, ("h:Hi", "g:Yes"), "h:Hi g:Yes"),
        ({"images": []}, ("h:Hi", "g:Yes"), "h:Hi g:Yes"),
    ],
    "<image> without an image": [({}, ("h:<image>Hi", "g:Yes"), "h:<image>Hi g:Yes")],
    "more <image> than images": [
        ({"image": ["0.png"]}, ("h:<image>,<image>", "g:Yes"), "h:@,<image> g:Yes"),
        ({"image": "0.png"}, ("h:<image>", "g:A", "h:<image>", "g:B"), "h:@ g:A h:<image> g:B"),
    ],
    "an empty answer": [({}, ("h:Hi", "g:"), "h:Hi g:")],
    "no answer at the end": [({}, ("h:Hi", "g:Yes", "h:So"), "h:Hi g:Yes h:So")],
    "an answer first": [({}, ("g:Yes", "h:Hi", "g:No"), "g:Yes h:Hi g:No")],
    "two turns of a kind in a row": [
        ({}, ("h:Hi", "h:You", "g:Yes"), "h:Hi h:You g:Yes"),
        ({}, ("h:Hi", "g:Yes", "g:No"), "h:Hi g:Yes g:No"),
    ],
    "a single image whose <image> is not in the first turn": [
        (
            {"image": "0.png"},
            ("h:Hi", "g:Yes", "h:<image>", "g:No"),
            "h:@\nHi g:Yes h:<image> g:No",
        ),
        ({"image": "0.png"}, ("s:Be", "h:<image>", "g:Yes"), "s:<image>\nBe h:@ g:Yes"),
    ],
}  # fmt: skip
FAILS = [  # there, and a random other sample takes the place
    ({"image": ["0.png", "0.png"]}, ("h:<image>", "g:Yes")),
    ({"image": ["0.png"]}, ("h:Hi", "g:Yes")),
    ({"image": "0.png"}, ("g:Yes", "h:Hi")),
    ({}, ("h:Hi", "s:No", "g:Yes")),
]


def test_annotations_as_the_official_code_takes_them(config, tiny_processor, tmp_path):
    """By the lines of its `preprocess_internvl2_5`; strict refuses all but the last kind."""
    picture(tmp_path / "0.png", 60, 60, 0)
    cases = [(kind, *case) for kind, found in UPSTREAM.items() for case in found]
    rows = [fields | {"conversations": _turns(*turns)} for _, fields, turns, _ in cases]
    rows += [fields | {"conversations": _turns(*turns)} for fields, turns in FAILS]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"id": str(i)} | row) + "\n" for i, row in enumerate(rows)))
    source = dataclasses.replace(config.data.sources[0], root=tmp_path, path=path)
    settings = changed(config, data__sources=(source,), data__on_bad_sample="skip")
    data = TrainingData(changed(settings, data__rows="upstream"), tiny_processor)
    assert data.deviations == {kind: len(found) for kind, found in sorted(UPSTREAM.items())} | {
        "an answer first": 1
    }
    assert data.survey.good.tolist() == list(range(len(cases)))
    tokenizer = tiny_processor.tokenizer
    spoken = {"h": "user", "g": "assistant", "s": "system"}
    tokens = "<img>" + "<IMG_CONTEXT>" * tiny_processor.config.tokens_per_tile + "</img>"
    for number, (_, _, _, expected) in enumerate(cases):
        example = data.render(data.annotations[number])
        turns = expected.split(" ")
        text = "".join(
            f"<|im_start|>{spoken[turn[0]]}\n{turn[2:].replace('@', tokens)}<|im_end|>\n"
            for turn in turns
        )
        found = tokenizer.decode(example.input_ids, skip_special_tokens=False)
        assert found.endswith(f"<|im_end|>\n{text}") != expected.startswith("s:")
        assert found.endswith(text)
        learnt = tokenizer.decode(example.input_ids[example.loss_mask], skip_special_tokens=False)
        assert learnt == "".join(f"{turn[2:]}<|im_end|>" for turn in turns if turn[0] == "g")
    data.save(tmp_path)
    assert json.loads((tmp_path / MIXTURE).read_text())["deviations"] == data.deviations
    strict = TrainingData(settings, tiny_processor)
    moved = "a single image whose <image> is not in the first turn"
    assert [cases[i][0] for i in strict.survey.good if i < len(cases)] == [moved, moved]
    assert strict.survey.good[2:].tolist() == [len(cases) + 1]  # one image, no marker


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
    with pytest.raises(ValueError, match=rf"samples.jsonl, line 4: .*{BAD[spoil]}") as caught:
        next(TrainingData(config, tiny_processor).iterator())
    assert "\n" not in str(caught.value)


def test_one_image_needs_no_marker(tiny_processor, tiny_data):
    row = sample(0, ["images/0-0.png"])
    row["conversations"][0]["value"] = "What?"
    render = PreprocessSample(tiny_processor, max_tiles=1, max_length=96)
    made = render(Annotation("a", "here", (tiny_data / "images/0-0.png",), row))
    assert made.tiles_per_image == (1,)


@pytest.mark.parametrize("spoil", [truncated, empty_answer])
def test_skipping_leaves_bad_samples_out_and_counts_them(
    tiny_checkpoint, tiny_processor, tmp_path, caplog, spoil
):
    """One that its picture's data gives away, and one that is known before training."""
    data = bad_folder(tmp_path, 3, spoil)
    config = run_config(
        tiny_checkpoint, data, tmp_path / "run", data__on_bad_sample="skip", train__steps=None,
        train__epochs=3, train__global_batch=4,
    )  # fmt: skip
    made = TrainingData(config, tiny_processor)
    steps = list(iterator := made.iterator())
    again = made.iterator(2)
    assert all(map(equal, list(again), steps[2:]))  # the counts resume too
    iterator.close(), again.close()
    ids = [i for step in steps for i in step.ids]
    assert collections.Counter(ids) == {f"s{i}": 3 for i in range(8) if i != 3}
    late = spoil is truncated
    assert sum(len(step.rejected) for step in steps) == (3 if late else 0)
    assert len(steps) == 6
    for step in steps:  # an empty row in its place, never a blank picture
        tiles, mask = np.asarray(step.batch.tiles), np.asarray(step.batch.tile_mask)
        assert mask.sum() == len(step.ids) and tiles[mask].any(axis=(1, 2, 3)).all()
    warnings = {record.message for record in caplog.records}
    assert any("line 4" in warning for warning in warnings) is late
    folder = tmp_path / "notes"
    folder.mkdir()
    made.save(folder)
    assert (folder / BAD_SAMPLES).exists() is not late
    if not late:
        assert f"1 of 8 samples are bad and left out, listed in {folder}/" in caplog.text
        (line,) = (folder / BAD_SAMPLES).read_text().splitlines()
        assert json.loads(line)["id"] == "s3" and "empty answer" in json.loads(line)["reason"]


def test_all_bad_samples_are_listed(tiny_checkpoint, tiny_processor, tmp_path):
    data = bad_folder(tmp_path, 3, empty_answer)
    (data / "images" / "5.png").unlink()
    config = run_config(tiny_checkpoint, data, tmp_path / "run")
    message = (
        r"line 4: .*empty answer.* \(the first of 2 bad samples, listed in .*/run\.bad_samples"
    )
    with pytest.raises(ValueError, match=message):
        TrainingData(config, tiny_processor)
    lines = (tmp_path / f"run.{BAD_SAMPLES}").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["s3", "s5"]
    assert not (tmp_path / "run").exists()


def test_nothing_but_bad_samples(tiny_checkpoint, tiny_processor, tmp_path):
    data = bad_folder(tmp_path, 3, truncated)
    shutil.rmtree(data / "images")
    config = run_config(tiny_checkpoint, data, tmp_path / "run", data__on_bad_sample="skip")
    with pytest.raises(ValueError, match=r"all 8 samples are bad; the first one: .*does not exist"):
        TrainingData(config, tiny_processor)


def test_a_picture_that_changes_during_a_run(tiny_checkpoint, tiny_processor, tmp_path):
    data = bad_folder(tmp_path, 3, lambda row, path: None)
    config = run_config(
        tiny_checkpoint, data, tmp_path / "run", data__max_length=400, data__max_tiles=6,
        train__global_batch=8,
    )  # fmt: skip
    made = TrainingData(config, tiny_processor)
    picture(data / "images" / "3.png", 600, 60, 3)
    iterator = made.iterator()
    with pytest.raises(ValueError, match="line 4: its images have changed since the run began"):
        next(iterator)
    iterator.close()


def test_what_a_run_is_made_of_is_written_down(config, tiny_processor, tmp_path):
    sources = tuple(dataclasses.replace(s, count=5) for s in config.data.sources)
    made = TrainingData(changed(config, data__sources=sources), tiny_processor)
    made.save(tmp_path)
    found = json.loads((tmp_path / MIXTURE).read_text())
    assert found["samples"] == 5
    (source,) = found["sources"]
    assert (source["available"], source["used"]) == (11, 5)
    assert source["ids"] == [row.id for row in made.annotations]
    assert (tmp_path / SURVEY).exists()


def test_augmented_tiles_are_another_jpeg_each_epoch_and_the_same_again(config, steps_of):
    sources = tuple(dataclasses.replace(s, augment=True) for s in config.data.sources)
    settings = changed(config, data__sources=sources, train__global_batch=1)
    plain, once, again = steps_of(config, 1), steps_of(settings, 22), steps_of(settings, 22)
    assert all(map(equal, once, again))
    tiles = {}
    for step in once:
        mask = np.asarray(step.batch.tile_mask)
        tiles.setdefault(step.ids[0], []).append(np.asarray(step.batch.tiles)[mask])
    pictured = {name: both for name, both in tiles.items() if both[0].size}
    assert any(not np.array_equal(*both) for both in pictured.values())
    without = dict(zip(plain[0].ids, np.asarray(plain[0].batch.input_ids)[0], strict=True))
    name = next(name for name in without if name in pictured)
    row = plain[0].ids.index(name)
    original = np.asarray(plain[0].batch.tiles)[0].reshape(4, -1, *plain[0].batch.tiles.shape[2:])[
        row
    ]
    changed_tiles = pictured[name][0]
    difference = np.abs(changed_tiles.astype(int) - original[: len(changed_tiles)].astype(int))
    assert 0 < difference.mean() < 12


def test_cached_tiles_are_the_same(config, steps_of, tmp_path, monkeypatch):
    expected = steps_of(config, 6)
    cached = changed(config, data__tile_cache=tmp_path / "tiles")
    assert all(map(equal, steps_of(cached, 6), expected))
    files = sorted((tmp_path / "tiles").rglob("*.npy"))
    assert files
    files[0].write_bytes(files[0].read_bytes()[:100])  # cut short by a crash: made again
    assert all(map(equal, steps_of(cached, 6), expected))
    monkeypatch.setattr(
        "mis_jax.data.processor.open_image", lambda *_: pytest.fail("decoded again")
    )
    assert all(map(equal, steps_of(cached, 6), expected))


def test_cached_tiles_of_a_set_that_was_built_again_are_not_believed(tiny_processor, tmp_path):
    """The same name in the same record of the same folder, with other bytes."""

    class Stored:
        def __init__(self, content: bytes):
            self.content = content

        def encoded(self) -> bytes:
            return self.content

        def __str__(self) -> str:
            return "a.png (record 0 of 'train' in set)"

    cache = TileCache(tmp_path / "tiles")
    contents = [picture(tmp_path / f"{seed}.png", 80, 60, seed).read_bytes() for seed in (1, 2)]
    for content in (*contents, *contents):
        expected = tiny_processor.tiles(Stored(content), 1)
        assert np.array_equal(cache.tiles(Stored(content), 1, tiny_processor), expected)
    assert len(list((tmp_path / "tiles").rglob("*.npy"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(
    config, steps_of, tiny_processor, tiny_checkpoint, tmp_path, workers, packing
):
    """The samples of every step, resumption at any step, and the error of a bad sample."""
    settings = changed(config, train__steps=7, **(PACKED if packing else {}))
    parallel = changed(settings, data__workers=workers)
    expected = steps_of(settings, 7)
    assert all(map(equal, steps_of(parallel, 7), expected))
    assert all(map(equal, steps_of(parallel, 4, start=3), expected[3:]))
    data = bad_folder(tmp_path, 3, truncated)
    bad = run_config(
        tiny_checkpoint, data, tmp_path / "run", train__global_batch=8, data__workers=workers
    )
    iterator = data_of(bad, tiny_processor).iterator()
    with pytest.raises(ValueError, match=r"samples.jsonl, line 4: image .* cannot be decoded"):
        next(iterator)
    iterator.close()
