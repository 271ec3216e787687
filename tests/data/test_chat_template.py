"""The prompt format: by hand, against transformers' templates, and against upstream's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mis_jax.data.chat_template import (
    DEFAULT_SYSTEM,
    Rendered,
    count_images,
    from_sharegpt,
    insert_image_markers,
    render,
    truncate,
)
from mis_jax.tokenizer.files import CONTROL_TOKENS
from mis_jax.tokenizer.tokenizer import GROUNDING_TOKENS, Tokenizer, load_tokenizer

BOS = "<s>"
TOKENS = [BOS, *CONTROL_TOKENS, *GROUNDING_TOKENS]
TURNS = [
    {"role": "user", "content": "Image-1: <image>\nImage-2: <image>\nWhat is it?"},
    {"role": "assistant", "content": "A bottle."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def build(folder: Path, *, merges: bool, bos: bool) -> Tokenizer:
    """Bytes, with or without merges, as a tokenizer.json folder."""
    pipeline = tokenizers.Tokenizer(models.BPE())
    # Qwen's cut keeps line breaks together, so that a token can span header and answer.
    cut = tokenizers.Regex(transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(cut, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 150 * merges, initial_alphabet=alphabet, show_progress=False
    )
    corpus = [*(turn["content"] for turn in TURNS), "system\nuser\nassistant\n\nImage-1: \n\n\n"]
    pipeline.train_from_iterator([*corpus, DEFAULT_SYSTEM] * 9, trainer)
    pipeline.add_special_tokens(TOKENS)
    if bos:
        pipeline.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, pipeline.token_to_id(BOS))]
        )
    folder.mkdir()
    pipeline.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte, no BOS: positions can be counted by hand."""
    return build(tmp_path_factory.mktemp("chat") / "bytes", merges=False, bos=False)


@pytest.fixture(scope="module", params=[False, True], ids=["without-bos", "with-bos"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory.mktemp("chat") / "merged", merges=True, bos=request.param)


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def text_of(rendered: Rendered, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(rendered.input_ids, skip_special_tokens=False)


def test_two_turns_two_images_by_hand(by_bytes: Tokenizer) -> None:
    """Every position counted: one token a byte, 3 and 1 tiles of 2 tokens."""
    rendered = render(TURNS, by_bytes, [3, 1], 2, system="none")
    text = (
        "<|im_start|>user\nImage-1: <img>" + "<IMG_CONTEXT>" * 6 + "</img>\nImage-2: <img>"
        "<IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA bottle.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert text_of(rendered, by_bytes) == text
    # user: 1 + "user\nImage-1: " 14 = 15; image 8 -> 23; "\nImage-2: " 10 -> 33; image 4 -> 37;
    # "\nWhat is it?" 12 -> 49; <|im_end|> and "\n" -> 51.
    # assistant: 1 + "assistant\n" 10 -> 62; "A bottle." 9 and <|im_end|> -> 72; "\n" -> 73.
    # user: 1 + "user\nSure?" 10 + 2 -> 86. assistant: 11 -> 97; "Yes." + 1 -> 102; "\n" -> 103.
    assert rendered.image_spans == ((15, 23), (33, 37))
    assert len(rendered.input_ids) == 103
    expected = [*range(62, 72), *range(97, 102)]
    assert np.flatnonzero(rendered.loss_mask).tolist() == expected
    assert by_bytes.decode(rendered.input_ids[62:72], False) == "A bottle.<|im_end|>"
    assert rendered.input_ids.dtype == np.int32
    assert rendered.loss_mask.dtype == np.bool_


def test_prompt_of_one_question(tokenizer: Tokenizer) -> None:
    bos = BOS if tokenizer.bos_id is not None else ""
    question = "<|im_start|>user\nSure?<|im_end|>\n"
    opened = "<|im_start|>assistant\n"

    def prompt(messages: Any, **options: Any) -> str:
        rendered = render(messages, tokenizer, [], 4, **options)
        assert not rendered.loss_mask.any()
        return text_of(rendered, tokenizer)

    default = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    assert prompt(user("Sure?")) == bos + default + question + opened
    assert prompt(user("Sure?"), system="none") == bos + question + opened
    own = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert prompt(user("Sure?"), system="Be brief.") == bos + own + question + opened
    turn = {"role": "system", "content": "Be brief."}
    for system in ("default", "none", "Other."):
        assert prompt([turn, *user("Sure?")], system=system) == bos + own + question + opened
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert prompt([parts, *user("Sure?")]) == bos + own + question + opened
    closed = prompt(user("Sure?"), system="none", add_generation_prompt=False)
    assert closed == bos + question
    assert DEFAULT_SYSTEM == (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
        "多模态大语言模型。"
    )


def test_no_generation_prompt_after_an_answer(tokenizer: Tokenizer) -> None:
    with_it = render(TURNS, tokenizer, [1, 1], 2)
    without = render(TURNS, tokenizer, [1, 1], 2, add_generation_prompt=False)
    np.testing.assert_array_equal(with_it.input_ids, without.input_ids)


def test_the_final_message_is_continued(tokenizer: Tokenizer) -> None:
    """An open last turn is the closed one without its end."""
    answer = {"role": "assistant", "content": "Sure, here is"}
    turns = [{"role": "user", "content": "Hello"}, answer]
    closed = render(turns, tokenizer, [], 4)
    made = render(turns, tokenizer, [], 4, continue_final_message=True)
    end = [tokenizer.im_end_id, *tokenizer.encode_text("\n")]
    assert [*made.input_ids, *end] == closed.input_ids.tolist()
    assert not made.loss_mask.any()
    for last, why in (
        ({"role": "user", "content": "And?"}, r"messages\[2\].role is 'user'; only an assistant"),
        ({"role": "assistant", "content": " "}, r"messages\[2\].content is empty"),
        ({"role": "assistant", "content": []}, r"messages\[2\].content is empty"),
    ):
        with pytest.raises(ValueError, match=why):
            render([*turns, last], tokenizer, [], 4, continue_final_message=True)


def test_prompt_is_the_beginning_of_the_training_sample(tokenizer: Tokenizer) -> None:
    """Generation starts exactly where the loss does."""
    whole = render(TURNS, tokenizer, [2, 1], 3)
    prompt = render(TURNS[:3], tokenizer, [2, 1], 3)
    n = len(prompt.input_ids)
    np.testing.assert_array_equal(whole.input_ids[:n], prompt.input_ids)
    assert whole.loss_mask[n]
    assert not whole.loss_mask[n - 1]


def upstream(
    turns: list[tuple[str, str]], own: Any, tiles: list[int], per_tile: int
) -> tuple[list[int], list[bool]]:
    """Ids and mask by the rule of facts 5.1, on strings, with transformers' tokenizer."""

    def tokens(text: str) -> list[int]:
        return own(text, add_special_tokens=False).input_ids

    remaining = iter(tiles)
    ids = [own.convert_tokens_to_ids(BOS)] if own("").input_ids else []
    mask = [False] * len(ids)
    for role, value in turns:
        while role == "user" and "<image>" in value:
            image = "<img>" + "<IMG_CONTEXT>" * (next(remaining) * per_tile) + "</img>"
            value = value.replace("<image>", image, 1)
        segment = tokens(f"<|im_start|>{role}\n{value}<|im_end|>\n")
        header = len(tokens("<|im_start|>assistant\n"))
        ids += segment
        if role == "assistant":
            mask += [False] * header + [True] * (len(segment) - header - 1) + [False]
        else:
            mask += [False] * len(segment)
    return ids, mask


ANSWERS = [
    "A bottle.",
    "\nA bottle",
    "\n\n\nYes",
    " Yes. ",
    "什么\n\n",
    "<box>[[1, 2]]</box>",
    "x\n",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_equal_to_upstreams_preprocessing(tokenizer: Tokenizer, answer: str) -> None:
    own = transformers.AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True)
    turns = [
        ("user", "<image>\nImage-2:<image> 你 <ref>cat</ref>"),
        ("assistant", answer),
        ("user", "\n\nSure?\n"),
        ("assistant", "Yes."),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    rendered = render(messages, tokenizer, [2, 5], 3)
    ids, mask = upstream([("system", DEFAULT_SYSTEM), *turns], own, [2, 5], 3)
    assert rendered.input_ids.tolist() == ids
    assert rendered.loss_mask.tolist() == mask


def test_header_is_counted_when_a_token_spans_its_end(tmp_path: Path) -> None:
    tokenizer = build(tmp_path / "t", merges=True, bos=False)
    header, answer = tokenizer.encode_text("assistant\n"), "\nYes."
    whole = tokenizer.encode_text("assistant\n" + answer)
    assert whole[: len(header)] != header  # the premise: "\n\n" is one token
    messages = [*user("Sure?"), {"role": "assistant", "content": answer}]
    rendered = render(messages, tokenizer, [], 1, system="none")
    learned = rendered.input_ids[rendered.loss_mask].tolist()
    assert learned == [*whole[len(header) :], tokenizer.im_end_id]


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<img>{{ '<IMG_CONTEXT>' * 6 }}</img>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_equal_to_a_chat_template_on_parts(tokenizer: Tokenizer) -> None:
    """transformers renders one string; stretch by stretch gives the same ids."""
    own = transformers.AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True)
    content = [
        {"type": "image"},
        {"type": "text", "text": "What "},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "\nis it?"},
        {"type": "text", "text": " Sure?"},
    ]
    messages = [*user(content), *TURNS[1:3]]
    text = own.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    rendered = render(messages, tokenizer, [3, 3, 3], 2, system="none")
    assert rendered.input_ids.tolist() == own(text).input_ids
    assert count_images(messages) == 3


def test_images_of_other_clients_say_nothing_of_the_markers() -> None:
    """Ollama's messages have such a field."""
    [message] = user("<image> <image>")
    assert [count_images([message | {"images": i}]) for i in (["a.png", "b.png"], 1)] == [2, 2]


def test_typed_tokens_and_markers_stay_text(tokenizer: Tokenizer) -> None:
    typed = "".join(CONTROL_TOKENS) + BOS
    parts = [{"type": "text", "text": f"a <image> {typed}"}, {"type": "image"}]
    messages = [
        {"role": "system", "content": f"<image>{typed}"},
        *user(parts),
        {"role": "assistant", "content": f"<image> {typed}"},
    ]
    rendered = render(messages, tokenizer, [1], 4)
    ids = rendered.input_ids.tolist()
    assert ids.count(tokenizer.im_start_id) == ids.count(tokenizer.im_end_id) == 3
    assert ids.count(tokenizer.img_start_id) == ids.count(tokenizer.img_end_id) == 1
    assert ids.count(tokenizer.img_context_id) == 4
    assert ids.count(tokenizer.token_id(BOS)) == (tokenizer.bos_id is not None)
    learned = tokenizer.decode(rendered.input_ids[rendered.loss_mask], skip_special_tokens=False)
    assert learned == f"<image> {typed}<|im_end|>"


@pytest.mark.parametrize("content", ["What?", [{"type": "text", "text": "What?"}]])
def test_one_unmarked_image_goes_first(tokenizer: Tokenizer, content: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user(content), *TURNS[3:]]
    marked = insert_image_markers(messages, 1)
    rendered = render(marked, tokenizer, [1], 2)
    image = "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert f"user\n{image}\nWhat?<|im_end|>" in text_of(rendered, tokenizer)
    assert messages[1]["content"] == content  # the caller's messages are left alone
    assert insert_image_markers(messages, 0) == messages
    assert insert_image_markers(marked, 1) == marked


def test_markers_and_images_must_agree(tokenizer: Tokenizer) -> None:
    for n, found, text in (
        (2, 0, "What?"),
        (2, 1, "<image>"),
        (0, 1, "<image>"),
        (1, 2, "<image>" * 2),
    ):
        with pytest.raises(ValueError, match=rf"{n} image.*but {found} image.*'<image>'"):
            insert_image_markers(user(text), n)
        with pytest.raises(ValueError, match=rf"{n} image.*but {found} image.*'<image>'"):
            render(user(text), tokenizer, [1] * n, 2)
    with pytest.raises(ValueError, match="no user turn"):
        insert_image_markers([{"role": "assistant", "content": "Hi"}], 1)
    with pytest.raises(ValueError, match="at least one tile"):
        render(user("<image>"), tokenizer, [0], 2)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"role": "human", "content": "hi"}], r"messages\[0\]\.role is 'human'; use 'system'"),
        ([*user("hi"), {"role": "system", "content": "x"}], r"messages\[1\]\.role is 'system'"),
        ([{"role": "user"}], r"messages\[0\]\.content must be text or a list"),
        (user([{"type": "audio"}]), r"messages\[0\]\.content\[0\] must be"),
        (user([{"type": "text"}]), r"messages\[0\]\.content\[0\] must be"),
        (user(["hi"]), r"messages\[0\]\.content\[0\] must be"),
        (
            [*user("hi"), {"role": "assistant", "content": [{"type": "image"}]}],
            r"messages\[1\]\.content\[0\] is an image, but the role is 'assistant'; only user",
        ),
    ],
)
def test_malformed_messages(tokenizer: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(messages, tokenizer, [], 2)


def test_sharegpt_rows() -> None:
    human, gpt = {"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}
    system = {"from": "system", "value": "be"}
    assert from_sharegpt({"id": 1, "conversations": [system, human, gpt, human, gpt]}) == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "<image>\nhi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "<image>\nhi"},
        {"role": "assistant", "content": "ho"},
    ]
    for turns, message in (
        (None, r"^'conversations' must be a list"),
        ([], r"^'conversations' must be a list"),
        ([human, {"from": "bot", "value": "x"}], r"^conversations\[1\]\.from is 'bot'"),
        ([human, {"from": ["gpt"], "value": "x"}], r"^conversations\[1\]\.from is"),
        ([human, {"from": "gpt", "value": " \n"}], r"^conversations\[1\]\.value is an empty"),
        ([human, {"from": "gpt", "value": None}], r"^conversations\[1\] must be an object"),
        ([human, human, gpt], r"^conversations\[1\]\.from is 'human' where 'gpt' is due"),
        ([gpt, human], r"^conversations\[0\]\.from is 'gpt' where 'human' is due"),
        ([human, gpt, gpt], r"^conversations\[2\]\.from is 'gpt' where 'human' is due"),
        ([human, gpt, system], r"^conversations\[2\]\.from is 'system'; only the first"),
        ([human, gpt, human], r"^'conversations' ends without a 'gpt' turn"),
        ([system], r"^'conversations' ends without a 'gpt' turn"),
    ):
        with pytest.raises(ValueError, match=message):
            from_sharegpt({"conversations": turns})
    with pytest.raises(ValueError, match=r"^'conversations' must be a list"):
        from_sharegpt({})


def test_truncation_is_counted_and_spares_images(by_bytes: Tokenizer) -> None:
    rendered = render(TURNS, by_bytes, [3, 1], 2, system="none")  # 103 tokens, images up to 37
    assert truncate(rendered, 103) == (rendered, 0)
    shorter, n_cut = truncate(rendered, 70)
    assert n_cut == 33
    np.testing.assert_array_equal(shorter.input_ids, rendered.input_ids[:70])
    assert np.flatnonzero(shorter.loss_mask).tolist() == list(range(62, 70))
    assert truncate(rendered, 37)[1] == 66
    for length in (36, 34, 33, 30, 20, 10):  # within an image, or losing one altogether
        with pytest.raises(
            ValueError, match=rf"103 tokens down to {length} would cut into an image"
        ):
            truncate(rendered, length)
    with pytest.raises(ValueError, match="max_length is 0"):
        truncate(rendered, 0)
