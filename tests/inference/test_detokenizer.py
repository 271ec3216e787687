"""Text as its tokens come: what the whole answer decodes to, at a cost linear in its length."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from mis_jax.inference.detokenizer import Detokenizer
from mis_jax.tokenizer.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "data"))
from tokenizer_folders import (
    CORPUS,
    internlm2_folder,
    qwen_folder,
    train_qwen_bpe,
    train_sentencepiece,
)

TOKENS = [
    b"a", b" ", b"\n", b"ab", b" b", b"END", b"E", b"N", b"D ", b"", b"\xe4", b"\xbd", b"\xa0",
    b"\xe4\xbd", b"\xa0x", "🙂".encode(), b"\xf0\x9f", b"\x99\x82", b"  ", b"\xff", "é".encode(),
]  # fmt: skip
STOPS = ["END", "N", "\n", "ab", "b", " b", "D E", "\n\n", "\nEND", "  a"]


def joined(ids) -> str:
    return b"".join(TOKENS[i] for i in ids).decode("utf-8", errors="replace")


def spoken(words: Detokenizer, ids: list[int], cuts: list[int]) -> tuple[list[str], bool]:
    """The pieces of an answer whose tokens come in these groups."""
    pieces, begin = [], 0
    for end in cuts:
        piece, met = words.grow(ids[begin:end], last=end == len(ids))
        pieces.append(piece)
        begin = end
        if met:
            return pieces, True
    return pieces, False


def test_pieces_are_the_whole_text_up_to_the_stop_string_that_is_complete_first():
    """Against decoding everything at once, in groups of any size; shown tokens end at the cut."""
    for seed in range(3000):
        rng = random.Random(seed)
        count = rng.randrange(1, 25)
        ids = [rng.randrange(len(TOKENS)) for _ in range(count)]
        stop = rng.sample(STOPS, rng.randrange(5))
        cuts = sorted({rng.randrange(count + 1) for _ in range(rng.randrange(6))} | {count})
        words = Detokenizer(joined, stop)
        pieces, met = spoken(words, ids, cuts)
        whole = joined(ids)
        ends = [(at + len(s), at) for s in stop if (at := whole.find(s)) >= 0]
        if not met:
            assert not ends, seed
            assert "".join(pieces) == whole.strip(), seed
            assert words.tokens == count
            continue
        end, at = min(ends)
        assert "".join(pieces) == whole[:at].strip(), seed
        written = [len(joined(ids[: n + 1]).rstrip("\ufffd")) for n in range(words.given)]
        assert max(written[:-1], default=0) < end <= len(joined(ids[: words.given])), seed
        assert words.tokens == sum(len(joined(ids[: n + 1])) <= at for n in range(words.given))


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    if request.param == "sentencepiece":
        return load_tokenizer(internlm2_folder(folder, train_sentencepiece()))
    return load_tokenizer(qwen_folder(folder, train_qwen_bpe(), "json"))


def test_pieces_of_real_tokenizers_are_their_text(tokenizer):
    rng = np.random.default_rng(0)
    text = "".join(CORPUS[:5]) + "🙂👍🏽 é ﬁ\t\r\n  x"
    for ids in (tokenizer.encode_text(text), rng.integers(0, tokenizer.vocab_size, 400).tolist()):
        words, pieces = Detokenizer(tokenizer.decode), []
        for begin in range(0, len(ids), 3):
            pieces.append(words.grow(ids[begin : begin + 3], last=begin + 3 >= len(ids))[0])
        assert "".join(pieces) == tokenizer.decode(ids).strip()
        assert sum(map(bool, pieces)) > len(pieces) // 2  # and they do come one by one


@pytest.mark.parametrize(
    "pattern", [b"a", b"\xe4\xbd\xa0", b"\xff", b"\xe4", b"\n", b"EN", b"\xbd ", b""], ids=repr
)
def test_twice_the_tokens_decode_twice_as_many(pattern):
    """Letters, characters in parts, noise, space, what may become a stop string: all linear."""
    decoded = 0

    def counted(ids):
        nonlocal decoded
        decoded += len(ids)
        return bytes(ids).decode("utf-8", errors="replace")

    def cost(count: int) -> int:
        nonlocal decoded
        decoded = 0
        words, ids = Detokenizer(counted, ["END"]), list((pattern * count)[:count])
        for begin in range(0, count, 8):
            words.grow(ids[begin : begin + 8], last=begin + 8 >= count)
        return max(decoded, 1)

    assert cost(4096) <= 2.3 * cost(2048)
