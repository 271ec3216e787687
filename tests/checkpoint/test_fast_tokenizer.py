"""tokenizer.json out of the published layouts, against sentencepiece and transformers."""

import functools
import io
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from published_tokenizers import (
    LAYOUTS,
    Published,
    added_entry,
    internlm2_folder,
    qwen_folder,
    write_json,
)
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

from mis_jax.tokenizer.files import CONTROL_TOKENS, read_tokenizer_files
from mis_jax.tokenizer.sentencepiece import read_sentencepiece
from mis_jax.tokenizer.tokenizer import load_tokenizer
from mis_jax.tokenizer.tokenizer_json import tokenizer_json

ALL = 10**9  # rows enough for every id

TEXTS = [
    "hello",
    " hello ",
    "   three before, and after   ",
    "a        b\t\tc   \n   d" + " " * 40,
    "\n",
    "\n\n\n\t",
    "你好，世界！ 图中有什么？",
    "🎉👩‍🔬 emoji ☕",
    "I'll say it's 12345.678 times, don't WE'VE",
    "caf\u00e9 \u212b \uff1c \u00a0\u3000\u200b\ufeff \u2581 \u0e01\u0e33",
    "line one\r\nline two\r\n",
    "\x00\x01\x7f",
    "def f(x):\n    return  x + 1  # </a> [UNUSED_TOKEN_1] <0x0A>",
]
BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
# Words of the training text, so that long pieces occur, and everything else Unicode has.
WORDS = st.sampled_from(
    ["image", " the", "shows ", "\n", " ", "  ", "\t", "多模态", "图", "。", "🎉", "<", "/", "x"]
)
ANY_TEXT = st.lists(
    WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=12
).map("".join)


@pytest.fixture(scope="module")
def published() -> Published:
    return Published()


def converted(folder: Path, rows: int = ALL) -> tokenizers.Tokenizer:
    files = read_tokenizer_files(folder)
    assert files is not None
    text = tokenizer_json(files, rows)
    return tokenizers.Tokenizer.from_str(text or (folder / "tokenizer.json").read_text("utf-8"))


def plain_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def with_tokens(tokenizer: Any, encode: Any, text: str) -> list[int]:
    """Ids of a text with added tokens typed in it: `encode` is asked for what is between."""
    names = sorted(tokenizer.added, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    ids = []
    for part in parts:
        ids += [tokenizer.added[part]] if part in tokenizer.added else encode(part) if part else []
    return ids


def as_decoded(tokenizer: Any, text: str) -> str:
    """All that is lost: Qwen composes characters; sentencepiece writes spaces as U+2581."""
    if tokenizer.bos_id is None:
        return normalizers.NFC().normalize_str(text)
    return text.replace("\u2581", " ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_our_own_reader(layout, published, tmp_path):
    folder = published(layout, tmp_path / "t")
    ours, fast = load_tokenizer(folder), converted(folder)
    assert fast.get_vocab_size() == ours.vocab_size
    for token, i in ours.added.items():
        assert fast.token_to_id(token) == i
    for text in TEXTS:
        assert plain_ids(fast, text) == ours.encode_text(text), text
        assert fast.decode(plain_ids(fast, text)) == as_decoded(ours, text)
    # every token between texts, twice in a row, and at both ends
    mixed = "".join(f"{t}{a} {t} {t}" for t, a in zip(sorted(ours.added), TEXTS * 9, strict=False))
    start = [] if ours.bos_id is None else [ours.bos_id]
    ids = with_tokens(ours, ours.encode_text, mixed)
    assert fast.encode(mixed).ids == start + ids
    assert fast.decode(ids, skip_special_tokens=False) == as_decoded(ours, mixed)


@functools.cache
def fixed(layout: str) -> tuple[Any, tokenizers.Tokenizer, Any]:
    """For hypothesis, which takes no fixtures of a test's own: our reader, ours, the library's."""
    with tempfile.TemporaryDirectory() as work:
        folder = Published()(layout, Path(work) / "t")
        if layout == "internlm2":
            model = str(folder / "tokenizer.model")
            theirs = sentencepiece.SentencePieceProcessor(model_file=model)
        else:
            theirs = transformers.Qwen2Tokenizer.from_pretrained(folder)
        return load_tokenizer(folder), converted(folder), theirs


@settings(max_examples=300, deadline=None, database=None)
@given(text=ANY_TEXT)
def test_ids_are_sentencepieces(text):
    ours, fast, pieces = fixed("internlm2")
    between = f"<|im_start|>user\n{text}<img><IMG_CONTEXT></img>{text}<|im_end|>"
    for each in (text, between):
        ids = fast.encode(each).ids
        assert ids == [1, *with_tokens(ours, pieces.encode, each)]
        assert fast.decode(ids[1:], skip_special_tokens=False) == as_decoded(ours, each)
    if not any(token in text for token in ours.added):
        assert plain_ids(fast, text) == ours.encode_text(text)


@settings(max_examples=200, deadline=None, database=None)
@given(text=ANY_TEXT)
def test_ids_are_qwens(text):
    ours, fast, theirs = fixed("qwen3 vocab")
    between = f"<|im_start|>user\n{text}<img><IMG_CONTEXT></img>{text}<|im_end|>"
    for each in (text, between):
        ids = fast.encode(each).ids
        assert ids == theirs.encode(each)
        assert fast.decode(ids, skip_special_tokens=False) == as_decoded(ours, each)
    if not any(token in text for token in ours.added):
        assert plain_ids(fast, text) == ours.encode_text(text)


def test_same_as_the_tokenizer_transformers_makes_of_the_model(published, tmp_path):
    """LlamaTokenizer converts a tokenizer.model by itself; InternLM2 is the same but for the
    prefix."""
    folder = published("internlm2", tmp_path / "t")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write_json(bare / "tokenizer_config.json", {"add_prefix_space": False, "legacy": False})
    theirs = transformers.LlamaTokenizer.from_pretrained(bare)
    fast = converted(folder)
    for text in TEXTS:
        assert plain_ids(fast, text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("generation", ["2.5", "3"])
def test_ids_of_the_qwen_generations(generation, published, tmp_path):
    folder = qwen_folder(tmp_path / "t", published.qwen, generation, "bare")
    base = published.qwen.get_vocab_size()  # 151643 in the published vocabulary
    first = {"2.5": 151665, "3": 151669}[generation] - 151643 + base
    fast = converted(folder)
    assert fast.token_to_id("<|endoftext|>") == base
    assert fast.token_to_id("<|im_end|>") == base + 2
    assert [fast.token_to_id(t) for t in CONTROL_TOKENS[2:]] == [first, first + 1, first + 2]
    assert fast.encode("<IMG_CONTEXT>").ids == [first + 2]
    assert fast.get_vocab_size() == first + 9


def test_ids_that_leave_a_gap(published, tmp_path):
    folder = qwen_folder(tmp_path / "t", published.qwen, "2.5", "bare")
    table = json.loads((folder / "added_tokens.json").read_text())
    table = {token: i + 100 * (token in CONTROL_TOKENS[2:]) for token, i in table.items()}
    write_json(folder / "added_tokens.json", table)
    fast = converted(folder)
    assert {token: fast.token_to_id(token) for token in table} == table
    assert fast.encode("<img>x").ids == [table["<img>"], *plain_ids(published.qwen, "x")]


def test_tokens_known_to_other_files_alone_are_added_to_a_tokenizer_json(published, tmp_path):
    folder = qwen_folder(tmp_path / "t", published.qwen, "2.5", "json")
    complete = converted(folder).to_str()
    assert tokenizer_json(read_tokenizer_files(folder), ALL) is None  # nothing to do
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["added_tokens"] = content["added_tokens"][:22]
    write_json(path, content)
    assert converted(folder).to_str() == complete
    # the same from added_tokens.json; and a BOS that only tokenizer_config.json knows of
    config = json.loads((folder / "tokenizer_config.json").read_text())
    table = {e["content"]: int(i) for i, e in config.pop("added_tokens_decoder").items()}
    config |= {"add_bos_token": True, "bos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "added_tokens.json", table)
    fast, ours = converted(folder), load_tokenizer(folder)
    assert ours.bos_id == table["<|endoftext|>"]
    expected = [ours.bos_id, table["<img>"], *ours.encode_text("x")]
    assert fast.encode("<img>x").ids == expected
    content = json.loads(fast.to_str()) | {"post_processor": {"type": "ByteLevel", **BYTE_LEVEL}}
    write_json(path, content)  # every token is there, the template is not
    again = converted(folder)
    assert again.encode("<img>x").ids == expected
    assert [
        step["type"] for step in json.loads(again.to_str())["post_processor"]["processors"]
    ] == [
        "ByteLevel",
        "TemplateProcessing",
    ]
    assert {token: fast.token_to_id(token) for token in table} == table


def test_bos_before_a_vocabulary_of_qwens(published, tmp_path):
    bos = {"add_bos_token": True, "bos_token": "<|endoftext|>"}
    folder = qwen_folder(tmp_path / "t", published.qwen, "2.5", "vocab", **bos)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text(converted(folder).to_str(), "utf-8")
    for each in (folder, tmp_path / "out"):
        assert load_tokenizer(each).bos_id == published.qwen.get_vocab_size()


def test_what_the_files_leave_unsaid(published, tmp_path):
    """A tokenizer.model alone has the defaults of InternLM2's class; names may be elsewhere."""
    folder = published("internlm2", tmp_path / "t")
    ours = load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "added_tokens.json", {t: i for t, i in ours.added.items() if i > 2})
    files = read_tokenizer_files(folder)
    assert [files.named(f"{name}_token") for name in ("bos", "eos", "unk")] == [
        "<s>",
        "</s>",
        "<unk>",
    ]
    assert converted(folder).encode("a").ids == [1, *ours.encode_text("a")]
    # `[UNUSED_TOKEN_145]` has lost its id to <|im_end|>, whatever calls it special; "x" is text
    names = {"additional_special_tokens": ["[UNUSED_TOKEN_145]", "<box>"], "pad_token": "x"}
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    files = read_tokenizer_files(folder)
    assert files.find("[UNUSED_TOKEN_145]") is None
    assert files.added.keys() == ours.added.keys()
    assert files.added["<box>"]["special"]
    assert not files.added["<ref>"]["special"]
    assert (files.named("eos_token"), files.named("pad_token")) == ("<|im_end|>", "x")
    assert [files.find("x")] == ours.encode_text("x")
    assert converted(folder).token_to_id("<|im_end|>") == ours.im_end_id


def test_unused_pieces_do_not_come_out(published, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(published.sentencepiece)
    words = {piece.piece for piece in proto.pieces}
    leaves = [p for p in proto.pieces if len(p.piece) > 3 and p.type == 1]
    leaves = [p for p in leaves if not any(p.piece in w for w in words - {p.piece})]
    for piece in leaves:
        piece.type = 5
    assert len(leaves) > 20
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    fast = converted(tmp_path)
    for piece in leaves:
        text = f"x{piece.piece}".replace("\u2581", " ")
        assert plain_ids(fast, text) == model.encode(text)
        assert fast.token_to_id(piece.piece) not in plain_ids(fast, text)


def test_tokens_beyond_the_embedding_are_left_out(published, tmp_path):
    folder = published("llama json", tmp_path / "t")
    rows = load_tokenizer(folder).vocab_size
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    assert tokenizer_json(read_tokenizer_files(folder), rows) is None
    content["added_tokens"].append(added_entry(rows, "<video>"))
    write_json(path, content)
    assert converted(folder).token_to_id("<video>") == rows
    fast = converted(folder, rows)
    assert fast.token_to_id("<video>") is None
    assert max(fast.encode("a <video> b").ids) < rows
    assert fast.encode("<IMG_CONTEXT> b").ids[1] == load_tokenizer(folder).img_context_id


def trained(**options: Any) -> Any:
    """A sentencepiece model with other settings than InternLM2's."""
    written = io.BytesIO()
    settings = dict(
        vocab_size=420, model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the image shows a  bottle\n", "你好 图中有什么"] * 30),
        model_writer=written,
        **(settings | options),
    )
    return sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"user_defined_symbols": ["\n\n", "bot", "\u2581\u2581", "<|im_start|>"]},
        {"byte_fallback": False},
    ],
    ids=["dummy prefix", "user-defined", "no bytes"],
)
def test_other_sentencepiece_models(options, tmp_path):
    folder = internlm2_folder(tmp_path / "t", trained(**options))
    if "user_defined_symbols" in options:  # the vocabulary has <|im_start|> itself
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        table = config["added_tokens_decoder"]
        own = next(i for i, entry in table.items() if entry["content"] == "<|im_start|>")
        del table[own]
        write_json(path, config)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast, ours = converted(folder), load_tokenizer(folder)
    assert fast.token_to_id("<|im_start|>") == ours.im_start_id
    for text in [*TEXTS, "robot\n\n\nbottle", "a bottle", "a  bottle", " a", "\u2581a"]:
        if "\u2581" in text and "user_defined_symbols" in options:
            continue  # a typed U+2581 is no space there
        assert plain_ids(fast, text) == pieces.encode(text), text
        if "byte_fallback" not in options:
            assert fast.decode(plain_ids(fast, text)) == text.replace("\u2581", " ")
        both = f"<|im_start|>{text}<img>{text}"
        assert plain_ids(fast, both) == with_tokens(ours, pieces.encode, both)


def test_random_vocabularies_merge_as_sentencepiece_does(tmp_path):
    """Vocabularies full of overlaps ("aba", "abab", "   ") in random orders of merging."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for alphabet in ("ab\u2581", "a\u2581", "abc", "a"):
        pieces, scores = list(alphabet), {}
        for _ in range(60):
            piece = rng.choice(pieces) + rng.choice(pieces)
            if piece not in pieces and len(piece) < 12:
                pieces.append(piece)
                scores[piece] = rng.random()
        proto = sentencepiece_model_pb2.ModelProto()
        proto.CopyFrom(trained())
        del proto.pieces[259:]  # control and byte pieces stay
        for piece in pieces:
            proto.pieces.add(piece=piece, score=scores.get(piece, -1.0), type=1)
        (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
        model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        fast = converted(tmp_path)
        for _ in range(200):
            letters = alphabet.replace("\u2581", " ")
            text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 40)))
            assert plain_ids(fast, text) == model.encode(text), (text, proto.pieces[259:])


def test_model_files_are_read_as_protobuf_reads_them(published, tmp_path):
    for number, proto in enumerate((published.sentencepiece, trained(add_dummy_prefix=True))):
        path = tmp_path / f"{number}.model"
        path.write_bytes(proto.SerializeToString())
        model = read_sentencepiece(path)
        assert model.add_dummy_prefix == proto.normalizer_spec.add_dummy_prefix
        expected = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
        assert [(piece.text, piece.score, piece.kind) for piece in model.pieces] == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "unigram"}, "model_type is 1"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"precompiled_charsmap is \d+"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is 1"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is 1"),
    ],
)
def test_models_of_another_kind_are_refused(options, named, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained(**options).SerializeToString())
    with pytest.raises(ValueError, match=rf"tokenizer\.model: .*{named}.*put the tokenizer\.json"):
        read_tokenizer_files(tmp_path)


def test_damaged_and_contradictory_files_are_named(published, tmp_path):
    folder = published("qwen2.5 vocab", tmp_path / "t")
    table = json.loads((folder / "added_tokens.json").read_text())
    write_json(folder / "added_tokens.json", table | {"<img>": 3})
    with pytest.raises(ValueError, match=r"added_tokens\.json: '<img>' has id 3, and \d+"):
        read_tokenizer_files(folder)
    write_json(folder / "added_tokens.json", table | {"<img>": "3"})
    with pytest.raises(ValueError, match=r"added_tokens\.json: an added token is .*'3'"):
        read_tokenizer_files(folder)
    write_json(folder / "added_tokens.json", table)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for decoder, found in (
        ([], r"field 'added_tokens_decoder' is \[\]"),
        ({"first": {"content": "<img>"}}, "an added token is .*'first'"),
        ({"9": {"special": True}}, "an added token is .*'special': True"),
    ):
        write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": decoder})
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {found}"):
            read_tokenizer_files(folder)
    write_json(folder / "tokenizer_config.json", config)
    (folder / "merges.txt").write_text("no such\n")
    with pytest.raises(ValueError, match=r"merges\.txt: does not go with vocab\.json"):
        converted(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(
        folder / "tokenizer_config.json", config | {"add_bos_token": True, "bos_token": "x!"}
    )
    with pytest.raises(ValueError, match="puts 'x!' in front of every prompt"):
        converted(folder)

    other = published("internlm2", tmp_path / "o")
    (other / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"tokenizer\.model is no readable sentencepiece model"):
        read_tokenizer_files(other)
    for text, found in (("{", "not valid JSON"), ("{}", r"model\.vocab")):
        (other / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{found}"):
            read_tokenizer_files(other)
    write_json(other / "tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": []})
    with pytest.raises(ValueError, match="make no tokenizer"):
        converted(other)
    assert read_tokenizer_files(tmp_path) is None


def test_a_vocabulary_of_the_real_size_takes_seconds(tmp_path):
    rng = random.Random(0)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(trained())
    del proto.pieces[259:]
    letters = [chr(c) for c in [*range(97, 123), 0x2581, *range(0x4E00, 0x4E00 + 5000)]]
    pieces = dict.fromkeys(letters)
    while len(pieces) < 92544 - 259:
        short = rng.choice(letters[:27]) + rng.choice(letters[:27])
        pieces.setdefault(short + "".join(rng.choices(letters[:27], k=rng.randrange(1, 6))))
        pieces.setdefault(short)
    for rank, piece in enumerate([*pieces][: 92544 - 259]):
        proto.pieces.add(piece=piece, score=-rank, type=1)
    folder = internlm2_folder(tmp_path / "t", proto)
    start = time.perf_counter()
    fast = converted(folder)
    assert time.perf_counter() - start < 20  # two on an idle machine
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "the quick brown fox  丁七 jumps " * 20
    assert plain_ids(fast, text) == pieces.encode(text)
