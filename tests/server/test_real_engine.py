"""The server over the real engine, with a random network: what it says is what `generate` says."""

import base64
import io
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image
from scripted_engine import CONTEXT
from serve_world import MODEL, World, body, data_uri, image, serving

import mis_jax
from mis_jax.server.run import engine_for

TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return mis_jax.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def world(loaded) -> Iterator[World]:
    model, processor = loaded
    engine = engine_for(model, processor, max_num_seqs=4, max_length=CONTEXT)
    with serving(engine, processor, rows=4) as world:
        yield world


def conversation(number: int) -> tuple[str, list[str]]:
    """A question and no, one or two pictures."""
    pictures = [data_uri(number + k, 60 + 30 * k, 60) for k in range(number % 3)]
    return f"What is thing {number} for?" + " Say more." * (number % 4), pictures


def asked(number: int, **fields) -> dict:
    text, pictures = conversation(number)
    parts = [*map(image, pictures), {"type": "text", "text": text}]
    return body(parts, max_tokens=TOKENS, **fields)


@pytest.fixture(scope="module")
def expected(loaded) -> list[str]:
    """Greedy answers of `mis_jax.generate` to twelve conversations."""
    model, processor = loaded
    asked = [conversation(number) for number in range(12)]
    images = [
        [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in pictures]
        for _, pictures in asked
    ]
    messages = [
        [{"role": "user", "content": [*[{"type": "image"}] * len(pictures),
                                      {"type": "text", "text": text}]}]
        for text, pictures in asked
    ]  # fmt: skip
    return mis_jax.generate(model, processor, messages, images, max_new_tokens=TOKENS)


def test_answers_of_many_clients_are_those_of_generate(world, expected):
    def ask(number: int) -> str:
        response = world.http.post("/v1/chat/completions", json=asked(number))
        return response.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert len(set(expected)) > 6
    assert answers == expected


def test_a_stream_says_the_same(world, expected):
    with world.openai() as client:
        for number in (2, 3):
            stream = client.chat.completions.create(**asked(number, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == expected[number]


def test_stop_strings_cut_an_answer(world, expected):
    text = expected[1]
    stop = text[len(text) // 2 :][:2]
    with world.openai() as client:
        made = client.chat.completions.create(**asked(1, stop=[stop]))
    assert made.choices[0].message.content == text[: text.find(stop)].rstrip()
    assert made.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_a_stopped_answer_does_not_depend_on_the_load(loaded):
    """200 prompts with five sets of stop strings each, from 16 clients and from one alone."""
    model, processor = loaded
    engine = engine_for(model, processor, max_num_seqs=16, max_length=CONTEXT)

    def answer(world: World, number: int, stop: list[str]) -> tuple:
        fields = body(f"Thing {number}?", max_tokens=24, temperature=1.5, seed=number, stop=stop)
        fields |= {"logprobs": True, "max_dynamic_patch": 1}
        made = world.http.post("/v1/chat/completions", json=fields).json()
        (choice,) = made["choices"]
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        said = choice["message"]["content"], choice["finish_reason"]
        return *said, made["usage"]["completion_tokens"], logprobs

    def stops(number: int, text: str) -> list[list[str]]:
        rng = random.Random(number)
        parts = [text[at : at + rng.randrange(1, 5)] for at in range(len(text))]
        inner = [part[1:2] for part in parts if len(part) > 2]  # complete within a longer one
        sets = [[" "], ["\n", "\n\n"], rng.sample(parts, min(2, len(parts)))]
        sets += [rng.sample(parts + inner, min(4, len(parts))) for _ in range(2)]
        return [[stop for stop in some if stop] for some in sets]

    with serving(engine, processor, rows=16) as world:
        free = [answer(world, number, []) for number in range(200)]
        asked = [(n, stop) for n in range(200) for stop in stops(n, free[n][0])]
        alone = [answer(world, *one) for one in asked]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda one: answer(world, *one), asked))
    cut = sum(a[2] < free[n][2] for (n, _), a in zip(asked, alone, strict=True))
    assert len(asked) == 1000 and cut > 400
    pairs = list(zip(alone, together, strict=True))
    both = zip(asked, pairs, strict=True)
    apart = [(one, a, b) for one, (a, b) in both if a[:3] != b[:3]]
    assert not apart, (len(apart), apart[:3])
    assert max(np.abs(np.subtract(a[3], b[3])).max(initial=0) for a, b in pairs) < 1e-4


def test_a_seed_fixes_a_sampled_answer(world):
    def answer(seed: int) -> str:
        with world.openai() as client:
            made = client.chat.completions.create(**asked(0, temperature=1.5, seed=seed))
        return made.choices[0].message.content

    with ThreadPoolExecutor(4) as pool:
        one, two, other, _ = pool.map(answer, (7, 7, 8, 9))
    assert one == two != other


def test_logprobs_are_those_of_the_answer(world, expected):
    with world.openai() as client:
        made = client.chat.completions.create(**asked(0, logprobs=True, top_logprobs=3))
    tokens = made.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).strip() == expected[0]
    for token in tokens:  # greedy: the best of all
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )


def test_the_command(tiny_checkpoint: Path):
    program = "from mis_jax.cli import main; main()"
    options = f"--port 0 --name {MODEL} --api-key-env K --max-concurrent 4".split()
    words = ["serve", str(tiny_checkpoint), *options]
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"K": "the-key"},
    ) as server:
        assert server.stdout is not None
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/v1", server.stdout.readline())[0]
            with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
                made = client.with_options(api_key="the-key").chat.completions.create(**asked(2))
                assert made.usage.completion_tokens <= TOKENS
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        finally:
            server.kill()  # or a failure would wait for it for ever
