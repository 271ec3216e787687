"""Conversations in, answers out: order, batches, text and counts."""

import threading

import numpy as np
import pytest
from tiny_world import picture

from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.checkpoint.nnx_state import build
from mis_jax.inference import offline
from mis_jax.inference.engine import Engine
from mis_jax.inference.offline import answer
from mis_jax.inference.requests import RequestOutput, Token
from mis_jax.inference.sampling import Sampling

HOT = Sampling(temperature=2.0, seed=3)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint, tiny_processor):
    checkpoint = read_checkpoint(tiny_checkpoint)
    return build(checkpoint.config, checkpoint.arrays), tiny_processor


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Conversations of different lengths with none, one or two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    conversations, images = [], []
    for index in range(7):
        count = index % 3
        text = "<image>\n" * count + "What is this? " * (1 + 5 * index % 4)
        conversations.append([{"role": "user", "content": text}])
        images.append(
            [picture(folder / f"{index}{k}.png", 60 + 40 * k, 60, index + k) for k in range(count)]
        )
    return conversations, images


def test_answers_stand_in_the_order_of_the_questions(tiny, asked):
    """Whatever the batches, every answer is that of its question asked alone."""
    options = dict(max_new_tokens=6, max_tiles=2, sampling=HOT)
    whole = answer(*tiny, *asked, **options)
    assert len({completion.token_ids for completion in whole}) > 4
    assert answer(*tiny, *asked, **options, batch_size=2) == whole
    for index in (1, 5):
        alone = [part[index : index + 1] for part in asked]
        assert answer(*tiny, *alone, **options, row_ids=[index]) == [whole[index]]


def test_text_and_counts(tiny, asked, monkeypatch):
    processor = tiny[1]
    conversations, images = asked
    words = processor.tokenizer.encode_text(" The bottle")
    pieces = [
        RequestOutput(
            "The bottle", tuple(map(Token, words)), reason, len(words) + (reason == "stop")
        )
        for reason in ("stop", "length")
    ]

    class Scripted(Engine):
        def step(self):
            self._waiting.clear()
            return list(enumerate(pieces))

    real = offline.batch_engine

    def scripted(*how, **rows):
        engine = real(*how, **rows)
        assert processor.tokenizer.im_end_id in engine._stops
        engine.__class__ = Scripted
        return engine

    monkeypatch.setattr(offline, "batch_engine", scripted)
    prompt = len(processor.example(conversations[0], images[0]).input_ids)
    both = answer(*tiny, [conversations[0]] * 2, [images[0]] * 2)
    assert [c.text for c in both] == ["The bottle"] * 2
    assert [c.prompt_tokens for c in both] == [prompt] * 2
    assert [c.token_ids for c in both] == [tuple(words)] * 2
    assert [c.finish_reason for c in both] == ["stop", "length"]
    # the stop token was generated too
    assert [c.completion_tokens for c in both] == [len(words) + 1, len(words)]


def test_no_images_and_no_conversations(tiny):
    conversation = [{"role": "user", "content": "Hello"}]
    assert len(answer(*tiny, [conversation], max_new_tokens=2)[0].token_ids) <= 2
    assert answer(*tiny, []) == []


def test_settings_reach_the_prompt(tiny, asked):
    conversations, images = ([part[2]] for part in asked)

    def prompt_tokens(**settings):
        found = answer(*tiny, conversations, images, max_new_tokens=1, **settings)
        return found[0].prompt_tokens

    assert prompt_tokens(system="none") < prompt_tokens() < prompt_tokens(system="Be kind. " * 9)
    per_tile = tiny[0].config.tokens_per_tile
    assert prompt_tokens(max_tiles_per_image=1) == prompt_tokens(max_tiles=2)
    assert prompt_tokens(max_tiles_per_image=4) >= prompt_tokens(max_tiles=2) + per_tile


def test_progress_counts_answers(tiny, asked):
    seen = []
    answer(
        *tiny, *asked, max_new_tokens=1, batch_size=3,
        progress=lambda done, total, tokens: seen.append((done, total, tokens)),
    )  # fmt: skip
    assert seen == [(done, 7, done) for done in range(1, 8)]


def test_answers_are_told_in_order(tiny, asked):
    told = []
    how = dict(max_new_tokens=9, batch_size=2, sampling=HOT)
    whole = answer(*tiny, *asked, **how, each=lambda *found: told.append(found))
    assert told == list(enumerate(whole))


def test_an_answer_ends_before_a_stop_string(tiny, asked):
    conversations, images = ([part[3]] for part in asked)
    (free,) = answer(*tiny, conversations, images, max_new_tokens=20, sampling=HOT)
    stop = free.text[len(free.text) // 2 :][:4]
    assert len(stop) == 4
    (cut,) = answer(*tiny, conversations, images, max_new_tokens=20, sampling=HOT, stop=[stop])
    assert cut.text == free.text[: free.text.find(stop)].rstrip()
    assert cut.finish_reason == "stop" and cut.completion_tokens <= free.completion_tokens
    with pytest.raises(ValueError, match="a stop string is empty"):
        answer(*tiny, conversations, images, stop=["", stop])


def test_few_tiles_are_in_memory(monkeypatch):
    """At most two windows of examples are made ahead of the answers."""
    made = []
    windows = offline._windows(lambda index: made.append(index) or index, 20, 4)
    for number, window in enumerate(windows):
        assert list(window) == list(range(4 * number, 4 * number + 4))
        assert len(made) <= 4 * (number + 2)
    assert made == list(range(20))


def test_a_bad_picture_ends_the_call_and_its_thread(tiny, asked, tmp_path):
    conversations, images = asked
    threads = threading.active_count()
    wrong = [*images[:4], [tmp_path / "none.png"], *images[5:]]
    with pytest.raises((ValueError, OSError), match=r"none\.png"):
        answer(*tiny, conversations, wrong, max_new_tokens=1, batch_size=1)
    assert threading.active_count() == threads


def test_arguments_that_do_not_match_are_refused(tiny, asked):
    conversations, images = asked
    with pytest.raises(ValueError, match="7 conversations but 6 lists of images"):
        answer(*tiny, conversations, images[:6])
    with pytest.raises(ValueError, match="1 row_ids for 7"):
        answer(*tiny, conversations, images, row_ids=np.array([1]))
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer(*tiny, conversations, images, batch_size=0)
    with pytest.raises(ValueError, match=r"messages\[0\] must be an object"):
        answer(*tiny, [["hello"]], [[]])
