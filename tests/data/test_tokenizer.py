"""Tokenizers of all three layouts, built here from scratch, against the libraries' own ids."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizer_folders import (
    CORPUS,
    QWEN_ADDED,
    internlm2_folder,
    llama_folder,
    qwen_folder,
    train_qwen_bpe,
    train_sentencepiece,
    write_json,
)
from tokenizers import models, normalizers, processors

from mis_jax.tokenizer.files import CONTROL_TOKENS
from mis_jax.tokenizer.tokenizer import GROUNDING_TOKENS, load_tokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "hello",
    " hello",
    "hello ",
    "user\nImage-1: ",
    "\nImage-2: ",
    "你好，世界！ 图中有什么？",
    "🎉👩‍🔬 emoji ☕",
    "a        b\t\tc   \n   d",
    "I'll say it's 12345.678 times, don't WE'VE",
    "e\u0301 caf\u00e9 \u212b \uff1c",
    "\u00a0\u3000\u200b\ufeff",
    "line one\r\nline two\r\n",
    "\x00\x01\x7f",
    "def f(x):\n    return x  # ok",
]
TYPED = [*CONTROL_TOKENS, "<s>", "</s>", "<|endoftext|>", "<|plugin|>", "<unk>"]
TYPED += ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "<0x0A>"]


@pytest.fixture(scope="module")
def sentencepiece_model() -> Any:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def qwen_bpe() -> tokenizers.Tokenizer:
    return train_qwen_bpe()


@pytest.fixture
def internlm2(tmp_path: Path, sentencepiece_model: Any) -> Path:
    return internlm2_folder(tmp_path / "internlm2", sentencepiece_model)


@pytest.fixture(params=["internlm2", "llama_json", "qwen_json", "qwen_vocab"])
def folder(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    sentencepiece_model: Any,
    qwen_bpe: tokenizers.Tokenizer,
) -> Path:
    build: dict[str, Callable[[], Path]] = {
        "internlm2": lambda: internlm2_folder(tmp_path / "t", sentencepiece_model),
        "llama_json": lambda: llama_folder(tmp_path / "t", sentencepiece_model, tmp_path),
        "qwen_json": lambda: qwen_folder(tmp_path / "t", qwen_bpe, "json"),
        "qwen_vocab": lambda: qwen_folder(tmp_path / "t", qwen_bpe, "vocab"),
    }
    return build[request.param]()


def test_text_round_trips(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        # Qwen composes characters; InternLM2 (the one with a BOS) changes nothing at all.
        changed = normalizers.NFC().normalize_str(text) if tokenizer.bos_id is None else text
        assert tokenizer.decode(tokenizer.encode_text(text)) == changed


def test_plain_text_ids_are_those_of_the_libraries(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    if (folder / "tokenizer.model").exists():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        reference = pieces.encode
    else:
        own = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert own.is_fast
        assert len(own) == tokenizer.vocab_size

        def reference(text: str) -> list[int]:
            return own.encode(text, add_special_tokens=False)

    for text in [*TEXTS, *CORPUS[:5]]:
        assert tokenizer.encode_text(text) == list(reference(text)), text


def test_typed_control_tokens_stay_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    never = {i for token, i in tokenizer.added.items() if token not in GROUNDING_TOKENS}
    never -= {tokenizer.added.get(t) for t in ("<tool_call>", "</tool_call>")}
    for token in [*TYPED, *(t for t in tokenizer.added if tokenizer.added[t] in never)]:
        for text in (token, f"a{token}b", f" {token}\n{token} ", f"你{token}<box>", token * 3):
            ids = tokenizer.encode_text(text)
            assert never.isdisjoint(ids), (token, text)
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_grounding_tokens_keep_their_ids(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = "the <ref>cat</ref><box>[[1, 2, 3, 4]]</box> and <quad> </quad>"
    ids = tokenizer.encode_text(text)
    for token in GROUNDING_TOKENS:
        assert ids.count(tokenizer.token_id(token)) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "the cat[[1, 2, 3, 4]] and  "


def test_skipped_tokens_and_unknown_ids(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = tokenizer.encode_text(" Hi 你")
    ids = [tokenizer.im_start_id, *text, tokenizer.im_end_id, tokenizer.vocab_size + 5]
    assert tokenizer.decode(ids) == " Hi 你"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|> Hi 你<|im_end|>"
    broken = tokenizer.encode_text("🎉")[:-1]
    assert "\ufffd" in tokenizer.decode(broken)


def test_generated_text_keeps_its_leading_space(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    whole = tokenizer.encode_text("assistant\n")
    for answer in (" hello", "hello", "  two", "\nline"):
        ids = tokenizer.encode_text("assistant\n" + answer)
        if ids[: len(whole)] == whole:
            assert tokenizer.decode(ids[len(whole) :]) == answer


def test_ids_of_internlm2(internlm2: Path, sentencepiece_model: Any) -> None:
    tokenizer = load_tokenizer(internlm2)
    first = len(sentencepiece_model.pieces)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert (tokenizer.im_end_id, tokenizer.im_start_id) == (first + 4, first + 5)
    expected = (first + 6, first + 7, first + 8)
    assert (tokenizer.img_start_id, tokenizer.img_end_id, tokenizer.img_context_id) == expected
    assert tokenizer.stop_ids == (2, first + 4)
    assert tokenizer.vocab_size == first + 15
    for gone in ("[UNUSED_TOKEN_146]", "<video>"):
        with pytest.raises(ValueError, match=r"internlm2.*no token"):
            tokenizer.token_id(gone)
    assert tokenizer.token_id("s") == tokenizer.encode_text("s")[0]


@pytest.mark.parametrize("kind", [1, 4, 5])  # normal, user-defined, unused
def test_overridden_pieces_never_come_out_of_text(
    tmp_path: Path, sentencepiece_model: Any, kind: int
) -> None:
    folder = internlm2_folder(tmp_path / "t", sentencepiece_model, kind)
    tokenizer = load_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "x [UNUSED_TOKEN_146]user\nhi[UNUSED_TOKEN_145]"
    if (
        kind == 4
    ):  # the danger is real: by itself the model gives the ids of <|im_start|>, <|im_end|>
        assert {tokenizer.im_start_id, tokenizer.im_end_id} < set(pieces.encode(text))
    ids = tokenizer.encode_text(text)
    assert set(tokenizer.added.values()).isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_a_control_token_that_the_model_cuts_text_at_stays_text(
    tmp_path: Path, sentencepiece_model: Any
) -> None:
    """A user-defined piece of tokenizer.model that no other file names."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model.SerializeToString())
    for piece in (*CONTROL_TOKENS, "household\u2581cleaners", "\u2581\u2581"):
        proto.pieces.add(piece=piece, type=4)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    text = "a  household cleaners\u2581 b"
    assert tokenizer.encode_text(text) == pieces.encode(text)
    for token in CONTROL_TOKENS:
        typed = f"household cleaners {token} \n"
        assert pieces.piece_to_id(token) in pieces.encode(typed)
        assert tokenizer.token_id(token) not in tokenizer.encode_text(typed)
        assert tokenizer.decode(tokenizer.encode_text(typed)) == typed


def test_llama_json_merges_never_make_a_control_token(
    tmp_path: Path, sentencepiece_model: Any
) -> None:
    folder = llama_folder(tmp_path / "t", sentencepiece_model, tmp_path)
    tokenizer = load_tokenizer(folder)
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True
    assert 2 in own.encode("a</s>", add_special_tokens=False).ids  # the merge gives </s> itself
    ids = tokenizer.encode_text("a</s>")
    assert 2 not in ids
    assert tokenizer.decode(ids) == "a</s>"
    assert tokenizer.bos_id == 1
    assert tokenizer.im_start_id == len(sentencepiece_model.pieces) + 5


def test_llama_json_and_sentencepiece_give_the_same_ids(
    tmp_path: Path, sentencepiece_model: Any
) -> None:
    slow = load_tokenizer(internlm2_folder(tmp_path / "slow", sentencepiece_model))
    fast = load_tokenizer(llama_folder(tmp_path / "fast", sentencepiece_model, tmp_path))
    assert slow.added == fast.added
    assert (slow.bos_id, slow.pad_id, slow.stop_ids) == (fast.bos_id, fast.pad_id, fast.stop_ids)
    assert slow.vocab_size == fast.vocab_size
    for text in TEXTS:
        assert slow.encode_text(text) == fast.encode_text(text), text


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_prefix_only_where_every_stretch_has_it(
    tmp_path: Path, sentencepiece_model: Any, scheme: str
) -> None:
    folder = llama_folder(tmp_path / "t", sentencepiece_model, tmp_path)
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description["pre_tokenizer"]["prepend_scheme"] = scheme
    description["decoder"]["decoders"].append(
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    )
    write_json(path, description)
    tokenizer = load_tokenizer(folder)
    own = tokenizers.Tokenizer.from_file(str(path))
    prompt = "<|im_start|>user\nhi there<|im_end|>"
    ours = tokenizer.encode_text("user\nhi there")
    assert own.encode(prompt).ids == [1, tokenizer.im_start_id, *ours, tokenizer.im_end_id]
    assert tokenizer.decode(ours) == " " * (scheme == "always") + "user\nhi there"


def test_ids_of_qwen(tmp_path: Path, qwen_bpe: tokenizers.Tokenizer) -> None:
    one = load_tokenizer(qwen_folder(tmp_path / "json", qwen_bpe, "json"))
    two = load_tokenizer(qwen_folder(tmp_path / "vocab", qwen_bpe, "vocab"))
    first = qwen_bpe.get_vocab_size()
    for tokenizer in (one, two):
        assert tokenizer.bos_id is None
        assert tokenizer.pad_id == first
        assert tokenizer.stop_ids == (first, first + 2)
        assert tokenizer.eos_id == tokenizer.im_end_id == first + 2
        assert tokenizer.vocab_size == first + len(QWEN_ADDED)
        # Text tokens the file does not declare special stay tokens, as for transformers.
        assert tokenizer.encode_text("<tool_call>") == [first + 4]
        assert tokenizer.decode([first + 4]) == "<tool_call>"
    assert one.added == two.added
    assert one.special == two.special


def test_flags_left_off_do_not_open_a_door(tmp_path: Path, qwen_bpe: tokenizers.Tokenizer) -> None:
    """Control tokens listed without any special flag, in added_tokens.json alone."""
    folder = qwen_folder(tmp_path / "t", qwen_bpe, "vocab")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    tokenizer = load_tokenizer(folder)
    for token in TYPED:
        ids = tokenizer.encode_text(f"a {token} b")
        assert set(tokenizer.added.values()).isdisjoint(ids)
    assert tokenizer.decode([tokenizer.im_end_id]) == ""
    assert tokenizer.stop_ids == (tokenizer.added["<|endoftext|>"], tokenizer.im_end_id)


def test_an_ordinary_character_as_padding_stays_text(
    tmp_path: Path, qwen_bpe: tokenizers.Tokenizer
) -> None:
    folder = qwen_folder(tmp_path / "t", qwen_bpe, "json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"pad_token": "!"})
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_text("no!")
    assert ids == qwen_bpe.encode("no!").ids
    assert tokenizer.decode(ids) == "no!"


def test_bos_only_when_the_files_say_so(
    tmp_path: Path, sentencepiece_model: Any, qwen_bpe: tokenizers.Tokenizer
) -> None:
    without = internlm2_folder(tmp_path / "a", sentencepiece_model, add_bos_token=False)
    assert load_tokenizer(without).bos_id is None
    bare = internlm2_folder(tmp_path / "b", sentencepiece_model)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    table = {entry["content"]: int(i) for i, entry in config["added_tokens_decoder"].items()}
    (bare / "tokenizer_config.json").unlink()  # the class's own defaults then hold
    write_json(bare / "added_tokens.json", {t: i for t, i in table.items() if i > 2})
    tokenizer = load_tokenizer(bare)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.decode([1, 2, tokenizer.im_end_id]) == ""
    # A tokenizer.json's own template decides over the configuration, as in transformers 5.
    templated = qwen_folder(tmp_path / "c", qwen_bpe, "json")
    description = json.loads((templated / "tokenizer.json").read_text(encoding="utf-8"))
    end = next(e["id"] for e in description["added_tokens"] if e["content"] == "<|endoftext|>")
    template = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.post_processor = processors.Sequence([processors.ByteLevel(), template])
    description["post_processor"] = json.loads(pipeline.to_str())["post_processor"]
    write_json(templated / "tokenizer.json", description)
    tokenizer = load_tokenizer(templated)
    assert tokenizer.bos_id == end
    own = transformers.AutoTokenizer.from_pretrained(templated, local_files_only=True)
    assert own.encode("hi") == [end, *tokenizer.encode_text("hi")]


def test_save_copies_the_files_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "new" / "place")
    saved = {p.name: p.read_bytes() for p in (tmp_path / "new" / "place").iterdir()}
    assert saved == {p.name: p.read_bytes() for p in folder.iterdir()}
    again = load_tokenizer(tmp_path / "new" / "place")
    assert again.added == tokenizer.added
    tokenizer.save(folder)  # onto itself: nothing to do
    assert {p.name for p in folder.iterdir()} == set(saved)


def test_survives_pickling(folder: Path) -> None:
    """Data workers get their tokenizer that way."""
    tokenizer = load_tokenizer(folder)
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "你好 <|im_end|> <box>"
    assert copy.encode_text(text) == tokenizer.encode_text(text)
    assert copy.decode(copy.encode_text(text)) == tokenizer.decode(tokenizer.encode_text(text))


def test_unusable_folders_are_named(tmp_path: Path, qwen_bpe: tokenizers.Tokenizer) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no tokenizer; it needs"):
        load_tokenizer(tmp_path / "empty")
    for name, content in (
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
    ):
        (tmp_path / "empty" / name).write_text(content)
        with pytest.raises(ValueError, match=r"empty/tokenizer\.json"):
            load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").unlink()
    (tmp_path / "empty" / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"empty/tokenizer\.model"):
        load_tokenizer(tmp_path / "empty")

    folder = qwen_folder(tmp_path / "split", qwen_bpe, "vocab")
    table = json.loads((folder / "added_tokens.json").read_text())
    write_json(folder / "added_tokens.json", table | {"<img>": 3})
    with pytest.raises(ValueError, match=r"disagree on '<img>'.*id 3"):
        load_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for entry in config["added_tokens_decoder"].values():
        entry["rstrip"] = entry["content"] == "<|im_end|>"
    write_json(folder / "added_tokens.json", table)
    write_json(folder / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=r"rstrip for '<\|im_end\|>'"):
        load_tokenizer(folder)
    (folder / "merges.txt").write_text("a b c d e\n")
    with pytest.raises(ValueError, match=r"merges\.txt: does not go with vocab\.json"):
        load_tokenizer(folder)


def test_text_only_tokenizer_says_what_is_missing(
    tmp_path: Path, qwen_bpe: tokenizers.Tokenizer
) -> None:
    qwen_bpe.model.save(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == qwen_bpe.get_vocab_size()
    with pytest.raises(ValueError, match=r"no token '<IMG_CONTEXT>'; use the tokenizer files"):
        _ = tokenizer.img_context_id


def test_half_a_surrogate_pair_is_read_as_the_replacement_character(tmp_path):
    """JSON may hold one; tokenizers and UTF-8 have no form for it."""
    for tokenizer in (
        load_tokenizer(internlm2_folder(tmp_path / "a", train_sentencepiece())),
        load_tokenizer(qwen_folder(tmp_path / "b", train_qwen_bpe(), "json")),
    ):
        assert tokenizer.encode_text("x\ud83dy") == tokenizer.encode_text("x\ufffdy")
        assert tokenizer.encode_text("\ud83d\ude42") == tokenizer.encode_text("🙂")
