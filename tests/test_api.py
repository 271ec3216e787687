"""The Python names of the contract, on the shipped tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mis_jax
from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.mini.icons import draw_scene
from mis_jax.quickstart import BASE_MODEL

QUESTION = "Image-1: <image>\nImage-2: <image>\nWhat is in the second image?"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [draw_scene("toaster", rng), draw_scene("banana", rng)]


@pytest.fixture(scope="module")
def loaded():
    return mis_jax.load(BASE_MODEL, dtype="float32")


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def test_batch_and_logits(loaded, pictures):
    model, processor = loaded
    batch = processor([user(QUESTION), user("Hello")], [pictures, []])
    rows, length = batch.input_ids.shape
    assert rows == 2 and batch.positions.shape == batch.segment_ids.shape == (2, length)
    assert batch.tiles.dtype == np.uint8 and batch.tiles.shape[1:] == (112, 112, 3)
    assert list(batch.tile_mask) == [True, True, False, False]
    real = batch.segment_ids[1].sum()
    assert (batch.segment_ids[1][:real] == 1).all() and (batch.segment_ids[1][real:] == 0).all()
    logits = model(batch)
    assert logits.shape == (2, length, model.config.text.vocab_size)
    assert logits.dtype == jnp.float32
    features = model.encode_images(batch.tiles)
    assert features.shape == (4, model.config.tokens_per_tile, model.config.text.hidden_size)


def test_a_row_does_not_see_its_neighbours(loaded, pictures):
    model, processor = loaded
    alone = processor([user(QUESTION)], [pictures])
    beside = processor([user("A much longer text. " * 8), user(QUESTION)], [[], pictures])
    real = int(alone.segment_ids[0].sum())
    np.testing.assert_allclose(
        np.asarray(model(alone))[0, :real], np.asarray(model(beside))[1, :real], atol=1e-4
    )


def test_generate_names_what_it_sees(loaded, pictures):
    [text] = mis_jax.generate(*loaded, [user(QUESTION)], [pictures], max_new_tokens=12)
    assert text == "a banana"


def test_an_assistants_last_message_is_continued(loaded, pictures):
    """A prefill: what comes after the first word of the model's own answer is the rest of it."""
    begun = [*user(QUESTION), {"role": "assistant", "content": "a"}]
    whole, rest = mis_jax.generate(
        *loaded, [user(QUESTION), begun], [pictures, pictures], max_new_tokens=12
    )
    assert (whole, rest) == ("a banana", " banana")
    empty = {"role": "assistant", "content": ""}
    with pytest.raises(ValueError, match="content is empty"):
        mis_jax.generate(*loaded, [[*user(QUESTION), empty]], [pictures])


def test_a_seed_fixes_what_is_sampled(loaded):
    def answer(seed: int) -> str:
        how = dict(max_new_tokens=8, temperature=3.0, seed=seed)
        [text] = mis_jax.generate(*loaded, [user("Hello")], **how)
        return text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) == 4


def test_image_parts_equal_markers(loaded, pictures):
    _, processor = loaded
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is food?"}]
    a = processor([user(parts)], [pictures])
    b = processor([user("<image>\n<image>\nWhich is food?")], [pictures])
    np.testing.assert_array_equal(a.input_ids, b.input_ids)


@pytest.mark.parametrize(
    "token", ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<s>", "</s>"]
)
def test_typed_control_tokens_are_text(loaded, token):
    _, processor = loaded
    plain, typed = (processor([user(text)]) for text in ("ab", f"a{token}b"))
    number = processor.tokenizer.token_id(token)
    counts = [(b.input_ids[b.segment_ids > 0] == number).sum() for b in (plain, typed)]
    assert counts[0] == counts[1]


def test_pixels_and_files_give_the_same(loaded, pictures, tmp_path):
    _, processor = loaded
    pictures[0].save(tmp_path / "a.png")
    a = processor([user("<image>\nWhat?")], [[tmp_path / "a.png"]])
    b = processor([user("<image>\nWhat?")], [[pictures[0]]])
    np.testing.assert_array_equal(a.tiles, b.tiles)


def test_train_batch_has_loss_on_the_answer(loaded):
    _, processor = loaded
    turns = [*user("Hello"), {"role": "assistant", "content": "a banana"}]
    batch = processor([turns], train=True)
    ids = batch.input_ids[0][batch.loss_weights[0] > 0]
    assert processor.tokenizer.decode(ids, skip_special_tokens=False) == "a banana<|im_end|>"
    assert not processor([turns]).loss_weights.any()


@pytest.mark.parametrize("layout", ["native", "hf", "internvl"])
def test_every_format_loads_the_same_model(loaded, pictures, layout, tmp_path):
    write_checkpoint(read_checkpoint(BASE_MODEL), tmp_path / layout, layout)
    model, processor = mis_jax.load(tmp_path / layout, dtype=jnp.float32)
    first, reference = loaded
    batch = processor([user(QUESTION)], [pictures])
    np.testing.assert_array_equal(
        batch.input_ids, reference([user(QUESTION)], [pictures]).input_ids
    )
    np.testing.assert_array_equal(np.asarray(model(batch)), np.asarray(first(batch)))


def test_load_onto_a_mesh(pictures):
    mesh = jax.make_mesh(
        (1, 1, 1, 1),
        ("data", "fsdp", "tensor", "context"),
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
    )
    model, processor = mis_jax.load(BASE_MODEL, dtype="float32", mesh=mesh)
    sharding = model.text.embedding.get_value().sharding
    assert sharding.mesh == mesh
    assert np.isfinite(np.asarray(model(processor([user(QUESTION)], [pictures])))).all()


def test_errors_say_what_to_do(loaded, pictures):
    _, processor = loaded
    with pytest.raises(ValueError, match=r"2 image\(s\) given but 1"):
        processor([user("<image>\nWhat?")], [pictures])
    with pytest.raises(ValueError, match="one list"):
        processor([user("a"), user("b")], [[]])
    with pytest.raises(ValueError, match="no such folder"):
        mis_jax.load("nowhere")
