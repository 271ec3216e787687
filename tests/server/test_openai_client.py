"""The real `openai` client against a running server."""

import asyncio
import math
import threading
from types import SimpleNamespace

import openai
import pytest
from serve_world import MODEL, World, body, data_uri, image

from mis_jax.server import chat_completions, inputs, protocol

SYSTEM = {"role": "system", "content": "Answer in one word."}
USER = {"role": "user", "content": "hello"}
OPEN = {"continue_final_message": True}


def chat(world: World, content="hello", **fields):
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    with world.openai() as client:
        return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def stream(world: World, content="hello", **fields):
    with world.openai() as client:
        messages = [{"role": "user", "content": content}]
        made = client.chat.completions.create(model=MODEL, messages=messages, stream=True, **fields)
        return list(made)


def prompt_tokens(world: World, content="hello", **fields) -> int:
    return chat(world, content, **fields).usage.prompt_tokens


def test_chat(world):
    made = chat(world, "What is it?")
    assert made.object == "chat.completion"
    assert made.id.startswith("chatcmpl-")
    assert made._request_id == made.id
    assert made.model == MODEL
    choice = made.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "0 tiles: What is it?")
    assert choice.finish_reason == "stop"
    tokens = len(world.engine.processor.tokenizer.encode_text("0 tiles: What is it?"))
    assert made.usage.completion_tokens == tokens + 1
    assert made.usage.total_tokens == made.usage.prompt_tokens + tokens + 1


def test_a_conversation_and_its_system_text(world):
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]
    made = chat(world, messages=[SYSTEM, *turns])
    assert made.choices[0].message.content == "0 tiles: second"
    processor = world.engine.processor
    expected = processor.example([SYSTEM, *turns])
    assert made.usage.prompt_tokens == len(expected.input_ids)
    as_developer = chat(world, messages=[{**SYSTEM, "role": "developer"}, *turns])
    assert as_developer.usage.prompt_tokens == made.usage.prompt_tokens


def test_system_prompt(world):
    def tokens(value):
        return prompt_tokens(world, extra_body={"system_prompt": value})

    def expected(system):
        conversation = [{"role": "user", "content": "hello"}]
        return len(world.engine.processor.example(conversation, system=system).input_ids)

    assert prompt_tokens(world) == tokens("default") == expected("default")
    assert tokens("none") == tokens("off") == expected("none")
    assert tokens("Be brief.") == expected("Be brief.")
    assert len({expected("default"), expected("none"), expected("Be brief.")}) == 3


def test_two_images(world):
    parts = [
        {"type": "text", "text": "Image-1: "},
        image(data_uri(1)),
        {"type": "text", "text": "Image-2: "},
        image(data_uri(2, width=120, height=60)),
        {"type": "text", "text": "What are they for?"},
    ]
    made = chat(world, parts)
    assert made.choices[0].message.content == ("4 tiles: Image-1: \nImage-2: \nWhat are they for?")
    processor = world.engine.processor
    per_tile = processor.config.tokens_per_tile
    words = "Image-1: \nImage-2: \nWhat are they for?"
    assert made.usage.prompt_tokens - prompt_tokens(world, words) >= 4 * per_tile


def test_max_dynamic_patch_is_tiles_for_each_image(world):
    wide = [image(data_uri(3, width=240, height=60)), image(data_uri(4, width=240, height=60))]

    def tiles(**fields):
        return chat(world, wide, **fields).choices[0].message.content.partition(" ")[0]

    assert tiles(extra_body={"max_dynamic_patch": 1}) == "2"
    assert tiles(extra_body={"max_dynamic_patch": 2}) == "6"  # each with its thumbnail
    assert tiles(extra_body={"max_dynamic_patch": 4}) == "10"


def test_streaming(world):
    chunks = stream(world, "a longer question", stream_options={"include_usage": True})
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    whole = chat(world, "a longer question")
    assert text == whole.choices[0].message.content
    assert sum(bool(c.choices[0].delta.content) for c in chunks[:-1]) > 5
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_usage_ends_with_its_reason(world):
    chunks = stream(world, max_tokens=3)
    assert chunks[-1].choices[0].finish_reason == "length"
    with world.http.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_a_stream_that_waits_is_kept_alive(world, monkeypatch):
    """With comments, which clients skip; their stream is the same."""
    monkeypatch.setattr(chat_completions, "KEEP_ALIVE_SECONDS", 0.02)
    expected = [chunk.choices for chunk in stream(world)]
    world.engine.gate.clear()
    asked = body(stream=True)
    with world.http.stream("POST", "/v1/chat/completions", json=asked) as response:
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: ")  # the role
        assert [next(lines) for _ in range(3)] == [": waiting"] * 3
        world.engine.gate.set()
        assert list(lines)[-1] == "data: [DONE]"
    threading.Timer(0.2, world.engine.gate.set).start()
    world.engine.gate.clear()
    assert [chunk.choices for chunk in stream(world)] == expected


def test_stop(world):
    assert chat(world, "one two three", stop=" two").choices[0].message.content == "0 tiles: one"
    several = chat(world, "one two three", stop=["nowhere", "three", "ee", "four"])
    assert several.choices[0].message.content == "0 tiles: one two "
    assert several.choices[0].finish_reason == "stop"


def test_max_tokens(world):
    for name in ("max_tokens", "max_completion_tokens"):
        made = chat(world, "one two three", **{name: 2})
        assert made.choices[0].finish_reason == "length"
        assert made.usage.completion_tokens == 2
    both = chat(world, "one two three", max_tokens=50, max_completion_tokens=3)
    assert both.usage.completion_tokens == 3


def test_seed(world):
    def answer(**fields):
        return chat(world, temperature=1, **fields).choices[0].message.content

    assert answer(seed=1) == answer(seed=1)
    assert answer(seed=-(2**62)) == answer(seed=-(2**62))
    assert len({answer(seed=n) for n in range(5)}) == 5
    assert len({answer() for _ in range(5)}) == 5  # a seed of its own for each
    assert chat(world, temperature=0, seed=1).choices[0].message.content == "0 tiles: hello"


def test_logprobs(world):
    made = chat(world, logprobs=True, top_logprobs=2)
    tokens = made.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == made.choices[0].message.content
    assert bytes(byte for token in tokens for byte in token.bytes) == b"0 tiles: hello"
    assert all(token.logprob == -0.25 and len(token.top_logprobs) == 2 for token in tokens)
    assert tokens[0].top_logprobs[0].token == tokens[0].token
    assert math.isfinite(tokens[0].top_logprobs[1].logprob)  # JSON has no infinity
    without = chat(world, logprobs=True).choices[0].logprobs.content
    assert all(token.top_logprobs == [] for token in without)
    assert chat(world).choices[0].logprobs is None
    streamed = [
        token.token
        for chunk in stream(world, logprobs=True, top_logprobs=1)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == [token.token for token in tokens]


def test_a_token_that_is_part_of_a_character_has_no_bytes(world):
    made = chat(world, "\N{SNOWMAN}", logprobs=True)
    assert made.choices[0].message.content == "0 tiles: \N{SNOWMAN}"
    told = [token.bytes for token in made.choices[0].logprobs.content]
    assert None in told


def test_the_responses_api_is_refused_with_what_to_ask_instead(world):
    with world.openai() as client, pytest.raises(openai.NotFoundError, match=r"chat\.completions"):
        client.responses.create(model=MODEL, input="hello")


def test_an_overflow_is_told_in_words_that_clients_know(world):
    """litellm and LangChain look for them in the text, as openai's error shows no code there."""
    for fields in (dict(content="word " * 500), dict(max_tokens=10**6)):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(world, **fields)
        assert "this model's maximum context length is" in str(refused.value).lower()
        assert refused.value.code == "context_length_exceeded"
        assert ("prompt is too long" in refused.value.message) == ("content" in fields)


def test_models(world):
    with world.openai() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        (dict(model="gpt-4o"), openai.NotFoundError, "model", "model_not_found"),
        (dict(n=2), openai.BadRequestError, "n", None),
        (dict(max_tokens=0), openai.BadRequestError, "max_tokens", None),
        (dict(max_tokens=10**6), openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        (dict(stop=["1", "2", "3", "4", "5"]), openai.BadRequestError, "stop", None),
        (dict(top_logprobs=2), openai.BadRequestError, "top_logprobs", None),
        (
            dict(logprobs=True, top_logprobs=21), openai.BadRequestError, "top_logprobs", None,
        ),
        (dict(response_format={"type": "json_object"}), openai.BadRequestError,
         "response_format", None),
        (dict(tools=[{"type": "function", "function": {"name": "f"}}]), openai.BadRequestError,
         "tools", None),
        (dict(frequency_penalty=0.5), openai.BadRequestError, "frequency_penalty", None),
        (dict(extra_body={"repetition_penalty": 2}), openai.BadRequestError,
         "repetition_penalty", None),
        (dict(messages=[]), openai.BadRequestError, "messages", None),
        (dict(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]),
         openai.BadRequestError, "messages[0].role", None),
        (dict(messages=[{"role": "assistant", "content": "I"}]), openai.BadRequestError,
         "messages[0].role", None),
        (dict(messages=[USER], extra_body=OPEN), openai.BadRequestError, "messages[0].role", None),
        (dict(messages=[USER, {"role": "assistant", "content": None}], extra_body=OPEN),
         openai.BadRequestError, "messages", None),
        (dict(messages=[USER, {"role": "assistant", "content": "I"}],
              extra_body=OPEN | {"add_generation_prompt": True}),
         openai.BadRequestError, "add_generation_prompt", None),
        (dict(extra_body={"add_generation_prompt": False}), openai.BadRequestError,
         "add_generation_prompt", None),
        (dict(messages=[USER, SYSTEM, USER]), openai.BadRequestError, "messages[1].role", None),
    ],
)  # fmt: skip
def test_errors(world, fields, kind, param, code):
    asked = dict(model=MODEL, messages=[{"role": "user", "content": "hello"}]) | fields
    with world.openai() as client, pytest.raises(kind) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.param == param
    assert refused.value.code == code
    assert refused.value.type == "invalid_request_error"
    assert refused.value.body["message"]


def test_the_final_message_is_continued(world):
    """As vLLM spells it; the prompt ends with the words themselves."""
    begun = [USER, {"role": "assistant", "content": "Sure, here"}]
    processor = world.engine.processor
    expected = processor.example(begun, continue_final_message=True).input_ids
    for extra in (OPEN, OPEN | {"add_generation_prompt": False}):
        made = chat(world, messages=begun, extra_body=extra)
        assert made.usage.prompt_tokens == len(expected)


def test_an_answer_is_taken_back_as_it_was_given(world):
    """Also as litellm and others fill it up, and an empty one."""
    message = chat(world).choices[0].message.model_dump()
    more = {"tool_calls": [], "reasoning_content": "", "provider_specific_fields": {}}
    plain = chat(world, messages=[USER, {"role": "assistant", "content": "0 tiles: hello"}, USER])
    for history in (message, message | more, message | {"annotations": []}):
        made = chat(world, messages=[USER, history, USER])
        assert made.usage.prompt_tokens == plain.usage.prompt_tokens
    empty = [USER, {"role": "assistant", "content": ""}, USER]
    null = [USER, {"role": "assistant", "content": None, "refusal": None}, USER]
    assert chat(world, messages=null).usage == chat(world, messages=empty).usage


def test_system_messages_are_joined(world):
    def tokens(*texts: str) -> int:
        system = [{"role": "system", "content": text} for text in texts]
        return chat(world, messages=[*system, USER]).usage.prompt_tokens

    assert tokens("Be brief.", "Be kind.") == tokens("Be brief.\n\nBe kind.")
    many = [protocol.Message(role="system", content="a")] * 5
    (turn,), _, _ = inputs._conversation(many)
    assert len(turn["content"]) == 1  # the template's joining of parts is quadratic
    picture = {"role": "assistant", "content": [image(data_uri(0))]}
    for last, field in ((SYSTEM, "[3].role"), (picture, "[3].content[0]")):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(world, messages=[SYSTEM, SYSTEM, USER, last, USER])
        assert refused.value.param == f"messages{field}"
        assert f"messages{field} is" in refused.value.message


def test_a_deadline_that_comes_with_a_piece_is_kept():
    class Ticket:
        def start(self, request, each):
            self.give = each

        def cancel(self):
            pass

    async def cancelled_after(ticks: int) -> bool:
        ticket, gone = Ticket(), asyncio.create_task(asyncio.sleep(60))
        outputs = chat_completions._outputs(ticket, SimpleNamespace(request=None), gone)
        task = asyncio.create_task(anext(outputs))
        await asyncio.sleep(0.01)
        ticket.give(SimpleNamespace(finish_reason=None))
        for _ in range(ticks):
            await asyncio.sleep(0)
        wanted = task.cancel()
        await asyncio.wait([task])
        gone.cancel()
        return task.cancelled() == wanted

    assert all(asyncio.run(cancelled_after(ticks)) for ticks in range(6))


def test_max_dynamic_patch_of_one_image(world):
    """As VLMEvalKit's InternVL adapter sends it; it wins over that of the request."""

    def tiles(*limits: int | None, **extra) -> str:
        parts = [image(data_uri(n, width=240, height=60)) for n, _ in enumerate(limits)]
        for part, limit in zip(parts, limits, strict=True):
            part["image_url"] |= {"max_dynamic_patch": limit, "detail": "original"}
        return chat(world, parts, extra_body=extra).choices[0].message.content.partition(" ")[0]

    assert tiles(1, 1) == "2"
    assert tiles(1, 4) == "6"
    assert tiles(None, 2, max_dynamic_patch=4) == "8"


def test_top_p_0_is_greedy(world):
    made = chat(world, temperature=1, top_p=0)
    assert made.choices[0].message.content == "0 tiles: hello"


def test_base64_with_line_breaks_or_without_padding(world):
    head, _, data = data_uri().partition(",")
    for changed in (data.rstrip("="), f"{data[:76]}\r\n{data[76:]}\n", f" {data}"):
        made = chat(world, [image(f"{head},{changed}")])
        assert made.choices[0].message.content.startswith("1 tiles")


def test_fields_without_influence_are_accepted(world):
    made = chat(
        world, n=1, user="u", metadata={"a": "b"}, store=False, frequency_penalty=0,
        presence_penalty=0, logit_bias={}, response_format={"type": "text"}, tool_choice="none",
        parallel_tool_calls=False, service_tier="auto", temperature=None, seed=None, stop=None,
        verbosity=None, extra_body={
            "prompt_cache_retention": None, "min_p": 0, "repetition_penalty": 1.0, "top_a": None,
            "guided_json": None, "thinking": {}, "ignore_eos": False, "skip_special_tokens": True,
        },
    )  # fmt: skip
    assert made.choices[0].message.content == "0 tiles: hello"
