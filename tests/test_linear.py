"""Every reader of text from outside takes twice the time for twice the text, whatever the text is.

Those of evaluations stand in `evals/test_eval_linear.py`, an adapter's patterns in
`checkpoint/test_peft_patterns.py`, the text of answers in `inference/test_detokenizer.py`.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from growth import slow_texts

from mis_jax.checkpoint.peft.mapping import plain_key
from mis_jax.checkpoint.safetensors_reader import _LAYER
from mis_jax.data.annotations import check_entry
from mis_jax.data.chat_template import from_sharegpt, insert_image_markers, render
from mis_jax.inference.guard import _categories
from mis_jax.parsing import parse_json, parse_yaml
from mis_jax.server import inputs, protocol
from mis_jax.server.access import _is_among
from mis_jax.tokenizer.files import _merged
from mis_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

sys.path.append(str(Path(__file__).parent / "data"))
sys.path.append(str(Path(__file__).parents[1] / "tools"))
import label_prompt
import label_rows
from tokenizer_folders import internlm2_folder, qwen_folder, train_qwen_bpe, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Callable[[str], Tokenizer]:
    @cache
    def made(kind: str) -> Tokenizer:
        folder = tmp_path_factory.mktemp("linear") / kind
        if kind == "sentencepiece":
            return load_tokenizer(internlm2_folder(folder, train_sentencepiece()))
        return load_tokenizer(qwen_folder(folder, train_qwen_bpe(), kind))

    return made


#: (begin, what is repeated, end)
TEXTS = {
    "letters": ("", "a", "!"),
    "spaces": ("x", " ", "x"),
    "new lines": ("x", "\n", "x"),
    "spaces and new lines": ("", " \r\n", "x"),
    "digits": ("", "1", "x"),
    "marks": ("", "!?", "x"),
    "apostrophes": ("", "'s", "x"),
    "control tokens": ("", "<|im_end|>", "x"),
    "half control tokens": ("", "<|im_", "x"),
    "boxes": ("", "<box>", "</box>"),
    "images": ("", "<image>\n", "x"),
    "unknown characters": ("", "\u0f40\U0001f642", "x"),
    "halves of pairs": ("", "\ud83d", "x"),
}


def conversation(text: str) -> object:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "b"}]
    messages = from_sharegpt({"id": "1", "conversations": turns})
    return insert_image_markers(messages, text.count("<image>"))


def entry(text: str) -> object:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    return check_entry({"id": text, "image": [text], "conversations": turns}, "x, row 0", 0)


@pytest.mark.parametrize("kind", ["sentencepiece", "json", "merges"])
def test_a_tokenizer_is_linear(tokenizers, kind):
    tokenizer = tokenizers(kind)
    assert slow_texts(lambda text: tokenizer.decode(tokenizer.encode_text(text)), TEXTS) == {}


def test_a_prompt_is_linear(tokenizers):
    tokenizer = tokenizers("sentencepiece")

    def prompt(text: str) -> object:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[:9]}]
        return render(messages, tokenizer, [1] * text.count("<image>"), 4)

    assert slow_texts(prompt, TEXTS) == {}


@pytest.mark.parametrize("reader", [conversation, entry])
def test_a_row_of_training_data_is_linear(reader):
    # Copies of a text this short fit the processor's caches, those of twice of it do not.
    assert slow_texts(reader, TEXTS, least=2e-3) == {}


DOCUMENTS = {
    "open lists": ("", "[", ""),
    "lists": ("[", "[],", "1]"),
    "open objects": ("", '{"a":', ""),
    "escapes": ('"', "\\u0041", '"'),
    "open text": ('"', "\\", ""),
    "digits": ("", "1", "."),
    "exponents": ("", "1e1", ""),
    "spaces": ("", " \n", "1"),
    "equal keys": ("{", '"a": 1, ', '"a": 2}'),
}


@pytest.mark.parametrize("reader", [parse_json, protocol.parse])
def test_json_is_linear(reader):
    assert slow_texts(lambda text: reader(text.encode()), DOCUMENTS) == {}


def test_yaml_is_linear():
    documents = {
        "lists": ("", "- 1\n", ""),
        "aliases": ("a: &a 1\n", "- *a\n", ""),
        "keys": ("{", "? 1 ", "}"),
        "quotes": ("'", "''", ""),
        "comments": ("", "# x\n", ""),
        "digits": ("", "1", ":"),
        "sixties": ("", "1:", "1"),
        "underscores": ("", "1_", "."),
    }
    # Not open lists: PyYAML takes half a second for a megabyte of them, and as much for all others.
    assert slow_texts(parse_yaml, documents) == {}


def test_a_request_is_linear():
    def counted(text: str) -> object:
        content = protocol.parse(text.encode())
        protocol.count_parts(content)
        return protocol.checked(content)

    turn = json.dumps({"role": "user", "content": "a"})
    requests = {
        "turns": ('{"model": "m", "messages": [', turn + ",", turn + "]}"),
        "parts": (
            '{"model": "m", "messages": [{"role": "user", "content": [',
            '{"type": "text", "text": "a"},',
            '{"type": "text", "text": "a"}]}]}',
        ),
        "wrong turns": ('{"model": "m", "messages": [', "1,", "1]}"),
        "unknown fields": ('{"model": "m", ', '"x": [[[1]]],', '"y": 1}'),
    }
    assert slow_texts(counted, requests) == {}


def test_the_address_of_an_image_is_linear(tmp_path):
    addresses = {
        "options": ("data:image/png;", "a;", "base64,AA=="),
        "commas": ("data:image/png;base64", ",", ""),
        "colons": ("", ":", ""),
        "base64": ("data:image/png;base64,", "AAAA", "="),
        "folders": ("", "./", "x"),
        "ups": ("file:///", "../", "x"),
        "percents": ("file:", "%2e%2e%2f", "x"),
        "brackets": ("file://", "[", "]"),
    }
    assert slow_texts(lambda text: inputs.sources_of([("x", text)], tmp_path), addresses) == {}


def test_the_name_of_a_host_is_linear():
    names = {"dots": ("", ".", "x"), "labels": ("", "a.", "x")}
    assert slow_texts(lambda name: _is_among(name, frozenset({"*.example.org"})), names) == {}


def test_the_name_of_a_tensor_is_linear():
    names = {
        "factors": ("", ".lora_A", ".weight"),
        "factors of names": ("a", ".lora_A.b", "x"),
        "wrappers": ("", "base_model.model.", "x"),
        "layers": ("", ".layers.1", "."),
        "digits": (".layers.", "1", "x"),
    }
    readers = plain_key, lambda name: _LAYER.sub("{i}", name, count=1)
    assert [slow_texts(reader, names) for reader in readers] == [{}, {}]


def test_added_tokens_are_linear(tmp_path):
    def merged(text: str) -> None:
        ids = {f"<{number}>": number % (len(text) // 2 + 1) for number in range(len(text))}
        _merged(tmp_path, [("x", {"content": t, "id": i, "special": True}) for t, i in ids.items()])

    assert slow_texts(merged, {"tokens": ("", "a", "")}) == {}


REPLIES = {
    "new lines": ("x", "\n", "x"),
    "spaces": ("x", " ", "x"),
    "marks": ("", '*_"', "x"),
    "harmless": ("", "harmless ", "x"),
    "pictures": ("", "left picture ", "x"),
    "tags": ("", "<a", ""),
    "digits": ("", "1", "x"),
    "categories": ("unsafe\n", "S1", "x"),
    "images": ("", " image-1: ", "x"),
    "marked images": ("", "<image> ", "x"),
}


def test_the_reply_of_a_guard_or_a_teacher_is_linear():
    readers = {
        "guard": lambda text: _categories(text, None),
        "guard's own": lambda text: _categories(text, {"S1": "a", "S10": "b"}),
        "harmless": label_prompt.is_harmless,
        "refusal": label_prompt.is_refusal,
        "flags": label_prompt.find_flags,
        "question": lambda text: label_rows.bare_question(text, "x"),
    }
    slow = {name: slow_texts(reader, REPLIES) for name, reader in readers.items()}
    assert {name: found for name, found in slow.items() if found} == {}
