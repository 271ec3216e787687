"""A cut of every published model, written in the original layout, exported and opened."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_against_transformers import TOLERANCE, our_logits, their_logits
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mis_jax.checkpoint.convert import convert
from mis_jax.checkpoint.load import open_checkpoint, read_checkpoint
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.model.family import FAMILY
from mis_jax.tokenizer.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import make_random_checkpoint as tool

TEXT = "Describe the two pictures, 图中有什么？ 🙂"
CUT = dict(layers=2, vision_layers=2, shrink=16, vocabulary=1200, image_size=56)


#: Each kind of decoder with each kind of tower.
_EVERY_RUN = {
    "internvl2_5-1b", "internvl3-38b", "internvl2_5-8b", "internvl2_5-26b", "internvl3_5-1b",
    "internvl3_5-38b",
}  # fmt: skip
_NAMES = [
    pytest.param(name, marks=() if name in _EVERY_RUN else pytest.mark.slow) for name in FAMILY
]


@pytest.mark.parametrize("name", _NAMES)
def test_transformers_opens_every_model_of_the_family(name, rng, tmp_path):
    """Plain `from_pretrained`, nothing missing, the same ids and logits; and the way back."""
    config = tool.cut(FAMILY[name], **CUT)
    source, out, back = tmp_path / "source", tmp_path / "hf", tmp_path / "back"
    tool.write(config, source, "internvl", dtype="float32", seed=int(rng.integers(2**31)))
    convert(open_checkpoint(source), out, "hf")
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(out)
    ours = load_tokenizer(source)
    start = [] if ours.bos_id is None else [ours.bos_id]
    assert tokenizer.encode(TEXT) == start + ours.encode_text(TEXT)
    assert len(tokenizer) <= config.text.vocab_size

    batch = prompt(config, rng)
    expected = their_logits(model.eval(), batch)
    mine = np.asarray(our_logits(config, read_checkpoint(source).arrays, batch))
    assert np.abs(mine - expected).max() <= TOLERANCE
    assert np.abs(expected).max() > 0.1  # otherwise the figure above would mean nothing

    convert(open_checkpoint(out), back, "internvl")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.tobytes() == after[key].tobytes(), key


def prompt(config: InternVLConfig, rng: np.random.Generator) -> Batch:
    """One row of text around two tiles."""
    per_tile, length = config.tokens_per_tile, 40
    ids = rng.integers(3, 256, (1, length)).astype(np.int32)
    ids[0, 5 : 5 + 2 * per_tile] = config.image_token_id
    size = config.vision.image_size
    return Batch(
        input_ids=ids,
        positions=np.arange(length, dtype=np.int32)[None],
        segment_ids=np.ones_like(ids),
        loss_weights=np.zeros(ids.shape, np.float32),
        tiles=rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8),
        tile_mask=np.ones(2, bool),
    )
