"""Conversations and images to a batch: what a user calls before the model."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny_world import SYSTEM

from mis_jax.data.processor import Processor

TOKENS_PER_TILE = 4


def question(text: str, answer: str | None = None) -> list[dict]:
    turns = [{"role": "user", "content": text}]
    return turns + ([{"role": "assistant", "content": answer}] if answer else [])


def image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_tokens(processor, batch) -> list[int]:
    is_image = np.asarray(batch.input_ids) == processor.tokenizer.img_context_id
    return is_image.sum(1).tolist()


def texts(processor, batch) -> list[str]:
    """Whole rows, special tokens shown."""
    return [
        processor.tokenizer.decode(ids[mask > 0], skip_special_tokens=False)
        for ids, mask in zip(batch.input_ids, batch.segment_ids, strict=True)
    ]


def test_a_batch_of_different_rows(tiny_processor):
    conversations = [question("What?"), question("<image>\nA longer question about it?")]
    made = tiny_processor(conversations, [[], [image(56, 56)]])
    rows, length = made.input_ids.shape
    assert rows == 2
    assert length % 16 == 0
    assert made.tiles.shape == (2, 56, 56, 3)
    assert made.tile_mask.tolist() == [False, True]
    assert image_tokens(tiny_processor, made) == [0, TOKENS_PER_TILE]
    assert not made.loss_weights.any()
    short, long = texts(tiny_processor, made)
    turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    assert short == f"<s>{turns}What?<|im_end|>\n<|im_start|>assistant\n"
    assert "<img>" + "<IMG_CONTEXT>" * TOKENS_PER_TILE + "</img>\nA longer" in long


def test_padding_to(tiny_processor):
    lengths = {n: tiny_processor([question("Hi")], pad_to=n).input_ids.shape[1] for n in (1, 8, 64)}
    assert lengths[8] % 8 == lengths[64] % 64 == 0
    assert lengths[1] <= lengths[8] < lengths[1] + 8
    assert lengths[64] == 64


def test_images_are_none_by_default_and_paths_are_opened(tiny_processor, tmp_path):
    path = tmp_path / "one.png"
    image(56, 56).save(path)
    assert tiny_processor([question("Hi")]).tiles.shape[0] == 0
    by_path, by_image = (
        tiny_processor([question("Hi")], [[given]]) for given in (str(path), image(56, 56))
    )
    assert np.array_equal(by_path.tiles, by_image.tiles)
    assert np.array_equal(by_path.input_ids, by_image.input_ids)


def test_the_tile_budget_is_divided_over_the_images(tiny_processor):
    wide = image(224, 56)  # four tiles, had it all of them
    one, two = question("<image>\n?"), question("<image>\n<image>\n?")

    def tiles(conversation, images, **options):
        example = tiny_processor.example(conversation, images, **options)
        assert len(example.tiles) == sum(example.tiles_per_image)
        return example.tiles_per_image

    assert tiles(one, [wide]) == (5,)  # the checkpoint's own budget of 4, and a thumbnail
    assert tiles(two, [wide, wide]) == (3, 3)
    assert tiles(two, [wide, wide], max_tiles=8) == (5, 5)
    assert tiles(two, [wide, wide], max_tiles=1) == (1, 1)
    assert tiles(two, [wide, wide], max_tiles=1, max_tiles_per_image=4) == (5, 5)
    fixed = dataclasses.replace(tiny_processor.config, dynamic_tiles=False)
    made = Processor(fixed, tiny_processor.tokenizer).example(two, [wide, wide], max_tiles=8)
    assert made.tiles_per_image == (1, 1)


@pytest.mark.parametrize("name", ["max_tiles", "max_tiles_per_image"])
def test_no_tiles_are_no_budget(tiny_processor, name):
    with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
        tiny_processor([question("<image>")], [[image(56, 56)]], **{name: 0})


def test_system_prompts(tiny_processor):
    def text(conversation, **options):
        return texts(tiny_processor, tiny_processor([conversation], **options))[0]

    assert SYSTEM in text(question("Hi"))
    assert "system" not in text(question("Hi"), system="none")
    assert "system\nOther.<|im_end|>" in text(question("Hi"), system="Other.")
    own = [{"role": "system", "content": "Mine."}, *question("Hi")]
    assert "system\nMine.<|im_end|>" in text(own, system="Other.")
    plain = dataclasses.replace(tiny_processor.config, system_message=None)
    other = Processor(plain, tiny_processor.tokenizer)
    assert "书生" in texts(other, other([question("Hi")]))[0]  # the template's own


def test_training_rows_have_weights_and_no_open_turn(tiny_processor):
    made = tiny_processor([question("Hi?", "Hello there."), question("No?", "No.")], train=True)
    weights = np.asarray(made.loss_weights)
    for row, answer in enumerate(("Hello there.", "No.")):
        learnt = made.input_ids[row][weights[row] > 0]
        decoded = tiny_processor.tokenizer.decode(learnt, skip_special_tokens=False)
        assert decoded == f"{answer}<|im_end|>"
    assert set(weights[weights > 0]) == {1}
    for text in texts(tiny_processor, made):
        assert text.endswith("<|im_end|>\n")
    by_sample = tiny_processor([question("Hi?", "Hello there.")], train=True, reduction="sample")
    assert np.asarray(by_sample.loss_weights).sum() == pytest.approx(1)


def test_without_a_generation_prompt(tiny_processor):
    made = tiny_processor([question("Hi")], add_generation_prompt=False)
    assert texts(tiny_processor, made)[0].endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize(
    ("conversations", "images", "message"),
    [
        ([], None, "no conversation given"),
        ([question("Hi")], [], "1 conversations but 0 lists of images"),
        ([question("<image><image>")], [[image(9, 9)]], r"1 image\(s\) given but 2 image marker"),
        ([question("Hi")], [["nowhere.png"]], "image nowhere.png does not exist"),
        ([[{"role": "robot", "content": "Hi"}]], None, r"messages\[0\].role is 'robot'"),
    ],
)
def test_bad_calls(tiny_processor, conversations, images, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny_processor(conversations, images)
    assert "\n" not in str(caught.value)


def test_decode_leaves_control_tokens_out(tiny_processor):
    ids = tiny_processor.tokenizer.encode_text(" A cup. ")
    assert tiny_processor.decode([*ids, tiny_processor.tokenizer.im_end_id]) == "A cup."


def test_checkpoints_that_do_not_fit(tiny_processor, tiny_checkpoint):
    config = tiny_processor.config
    with pytest.raises(ValueError, match="'template' is 'phi3-chat'; supported"):
        Processor(dataclasses.replace(config, template="phi3-chat"), tiny_processor.tokenizer)
    with pytest.raises(ValueError, match=r"<IMG_CONTEXT> is \d+ in the tokenizer and 3 in config"):
        Processor.from_folder(tiny_checkpoint, dataclasses.replace(config, image_token_id=3))
    last = config.text.vocab_size - 1  # of the added tokens
    fewer = dataclasses.replace(config.text, vocab_size=last)
    with pytest.raises(
        ValueError, match=rf"has ids beyond the {last} embeddings .*: {last} \(<.*>\)"
    ):
        Processor.from_folder(tiny_checkpoint, dataclasses.replace(config, text=fewer))
