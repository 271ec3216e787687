"""What `data show` tells of a sample."""

import json

import numpy as np
import pytest
from tiny_world import SYSTEM, run_config, sample

from mis_jax.data.preview import Shown, show_sample, statistics

GREEN = "bold green"


@pytest.fixture
def config(tiny_checkpoint, tiny_data, tmp_path):
    # More rows a batch than there are samples: no reason not to look at one.
    return run_config(
        tiny_checkpoint, tiny_data, tmp_path / "run", data__max_tiles=4, train__steps=None,
        train__epochs=1, train__global_batch=128,
    )  # fmt: skip


def test_json(config, tiny_processor):
    shown = show_sample(config, tiny_processor, 3).as_json()
    assert shown.keys() == {"id", "text", "input_ids", "loss_mask", "tiles"}
    assert json.loads(json.dumps(shown)) == shown
    assert shown["id"] == "s3"
    # 60 x 86 and 110 x 86 pixels with a budget of two tiles each: two and a thumbnail, and one.
    assert shown["tiles"] == [3, 1]
    assert len(shown["input_ids"]) == len(shown["loss_mask"])
    tokenizer = tiny_processor.tokenizer
    learnt = [i for i, flag in zip(shown["input_ids"], shown["loss_mask"], strict=True) if flag]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "The lamp is useful.<|im_end|>"
    first, second = (f"<img>{'<IMG_CONTEXT>' * count}</img>" for count in (12, 4))
    assert shown["text"] == (
        f"<s><|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nImage-1: {first}\n"
        f"Image-2: {second}\nWhat is a lamp for?<|im_end|>\n<|im_start|>assistant\n"
        "The lamp is useful.<|im_end|>\n"
    )


def test_text_is_the_prompt_with_the_answer_in_green(config, tiny_processor):
    text = show_sample(config, tiny_processor, 1).as_text()
    assert "<img><IMG_CONTEXT> x 12</img>\nWhat" in text.plain
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == GREEN]
    assert green == ["The cup is useful. It is safe.<|im_end|>"]


def test_image_tokens_typed_as_text_are_shown_as_typed(tiny_processor):
    example = tiny_processor.example(
        [{"role": "user", "content": "Say <IMG_CONTEXT> and <IMG_CONTEXT>."}]
    )
    assert (
        "Say <IMG_CONTEXT> and <IMG_CONTEXT>." in Shown(example, tiny_processor.tokenizer).as_text()
    )


def test_contact_sheet_has_an_image_a_line(config, tiny_processor):
    shown = show_sample(config, tiny_processor, 0)
    tiles = shown.example.tiles
    counts = shown.example.tiles_per_image
    assert len(counts) == 2
    sheet = np.asarray(shown.contact_sheet())
    assert sheet.shape == (2 * 60 - 4, max(counts) * 60 - 4, 3)
    assert np.array_equal(sheet[:56, :56], tiles[0])
    assert np.array_equal(sheet[60:, :56], tiles[counts[0]])
    assert (sheet[56:60] == 255).all()


def test_a_sample_without_pictures_has_no_sheet(config, tiny_processor):
    shown = show_sample(config, tiny_processor, 2)
    assert shown.as_json()["tiles"] == []
    with pytest.raises(ValueError, match="sample s2 has no image"):
        shown.contact_sheet()


@pytest.mark.parametrize("index", [-1, 11])
def test_an_index_outside(config, tiny_processor, index):
    with pytest.raises(ValueError, match=f"--index {index}: the run has samples 0 to 10"):
        show_sample(config, tiny_processor, index)


def test_a_bad_sample_is_named(tiny_checkpoint, tiny_processor, tmp_path):
    row = sample(0, ["gone.png"])
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    config = run_config(tiny_checkpoint, tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=r"samples.jsonl, line 1: image .*gone.png does not exist"):
        show_sample(config, tiny_processor, 0)


@pytest.mark.parametrize("on_bad_sample", ["stop", "skip"])
def test_statistics_name_no_file_that_they_do_not_write(
    tiny_checkpoint, tiny_processor, tmp_path, caplog, on_bad_sample
):
    rows = [sample(0, ["gone.png"]), sample(1, []), sample(2, [])]
    rows[1]["conversations"][1]["value"] = " "
    (tmp_path / "samples.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    config = run_config(
        tiny_checkpoint, tmp_path, tmp_path / "run", data__on_bad_sample=on_bad_sample
    )
    found = statistics(config, tiny_processor)
    assert not caplog.records and [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
    gone, empty = found["bad_samples"]
    path = tmp_path / "samples.jsonl"
    assert gone.startswith(f"{path}, line 1: image {tmp_path}/") and "gone.png" in gone
    assert empty.startswith(f"{path}, line 3: conversations[1].value is an empty answer")
