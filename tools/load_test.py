"""Many clients at a running server, and every answer checked.

Each prompt carries a nonce, and is asked once alone beforehand. Under load each answer must be the
one of its own prompt: to the letter, with the same numbers of tokens, and under an id that no other
answer has. Half of the requests are streamed, a third carry a picture.

    python tools/load_test.py http://127.0.0.1:8000 --clients 64 --seconds 120
    python tools/load_test.py http://127.0.0.1:8000 --clients 160 --hostile 40 --seconds 120

`--hostile` are clients beside them that do harm: halves of headers and bodies, image bombs, fields
of 16 MB, 100,000 turns, brackets without end, and clients that leave after the first words.

Exit code 0 when no answer was lost, doubled or mixed up, `/health` and `/metrics` always answered,
and every hostile request was refused or ended, else 1.
"""

import asyncio
import base64
import io
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx2
import numpy as np
import tyro
from load_hostile import Hostile
from PIL import Image
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

console = Console()


@dataclass(frozen=True)
class Prompt:
    """A question that no other has, and how it is asked."""

    nonce: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What can be compared of an answer."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Tally:
    """What happened under load."""

    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # of streamed answers
    tokens: int = 0
    refused: int = 0  # 429; asked again
    ids: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB, sampled over the time
    health: Counter[str] = field(default_factory=Counter)  # what it said, sampled as well
    slowest_health: float = 0.0
    seconds: float = 0.0  # until the last honest answer

    def fail(self, kind: str, detail: str) -> None:
        self.wrong[kind] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {detail}")


class Server:
    """The HTTP side."""

    def __init__(self, client: httpx2.AsyncClient):
        self.client = client

    async def ask(self, prompt: Prompt, stream: bool) -> tuple[str, Answer, float | None]:
        """Id, answer and seconds to its first words; raises httpx2.HTTPError or ValueError."""
        began, first = time.perf_counter(), None
        if not stream:
            response = await self.client.post("/v1/chat/completions", json=prompt.body)
            response.raise_for_status()
            made = response.json()
            text, usage = made["choices"][0]["message"]["content"], made["usage"]
            return made["id"], _answer(text, usage), None
        options = {"stream": True, "stream_options": {"include_usage": True}}
        text, usage, ids, whole = "", None, set(), False
        async with self.client.stream(
            "POST", "/v1/chat/completions", json=prompt.body | options
        ) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                event = line.removeprefix("data: ")
                if event == "[DONE]":
                    whole = True
                elif event:
                    first = first or time.perf_counter() - began
                    chunk = json.loads(event)
                    if "error" in chunk:
                        raise ValueError(chunk["error"]["message"])
                    ids.add(chunk["id"])
                    usage = chunk["usage"] or usage
                    for choice in chunk["choices"]:
                        text += choice["delta"].get("content") or ""
        if not whole or usage is None or len(ids) != 1:
            raise ValueError(f"a stream broke off or held {len(ids)} ids")
        return ids.pop(), _answer(text, usage), first

    async def memory(self) -> float:
        """Resident memory of the server in MiB."""
        told = (await self.client.get("/metrics")).text
        for line in told.splitlines():
            if line.startswith("process_resident_memory_bytes "):
                return float(line.split()[1]) / 2**20
        raise ValueError("/metrics tells no process_resident_memory_bytes")


def _answer(text: str, usage: dict[str, int]) -> Answer:
    return Answer(text, usage["prompt_tokens"], usage["completion_tokens"])


def prompts(model: str, count: int, max_tokens: int, temperature: float) -> list[Prompt]:
    """Questions of different lengths, every third with a picture, each with a seed of its own."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        nonce = f"{rng.integers(36**6):06d}-{number}"
        text = f"Nonce {nonce}." + " What is it for?" * (1 + number % 7)
        content: Any = text
        if number % 3 == 2:
            pixels = rng.integers(0, 256, (64, 64 * (1 + number % 2), 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": text},
            ]
        body = {
            "model": model, "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens, "temperature": temperature, "seed": number,
        }  # fmt: skip
        made.append(Prompt(nonce, body))
    return made


async def load(
    server: Server,
    asked: list[Prompt],
    alone: list[Answer],
    clients: int,
    seconds: float,
    hostile: Hostile | None = None,
    harm: int = 0,
) -> Tally:
    """All clients until the time is over; those under way then are waited for."""
    began = time.perf_counter()
    tally, end = Tally(seconds=-began), began + seconds
    owner = {answer.text: number for number, answer in enumerate(alone)}

    async def one(client: int) -> None:
        pick = random.Random(client)
        while time.perf_counter() < end:
            number = pick.randrange(len(asked))
            began = time.perf_counter()
            try:
                name, answer, first = await server.ask(asked[number], stream=pick.random() < 0.5)
            except httpx2.HTTPStatusError as error:
                if error.response.status_code != 429:
                    tally.fail("lost", f"{asked[number].nonce}: {error}")
                    continue
                tally.refused += 1
                await asyncio.sleep(float(error.response.headers["retry-after"]))
                continue
            except (httpx2.HTTPError, ValueError) as error:
                tally.fail("lost", f"{asked[number].nonce}: {type(error).__name__} {error}")
                continue
            tally.latency.append(time.perf_counter() - began)
            if first is not None:
                tally.first.append(first)
            tally.tokens += answer.completion_tokens
            tally.ids[name] += 1
            if answer != alone[number]:
                other = owner.get(answer.text)
                kind = "mixed" if other is not None and other != number else "changed"
                tally.fail(kind, f"{asked[number].nonce}: {answer} in place of {alone[number]}")

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            try:
                tally.memory.append(await server.memory())
                told = await server.client.get("/health")
                tally.health[f"{told.status_code} {told.json()['status']}"] += 1
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                tally.fail("health", f"{type(error).__name__} {error}")
            tally.slowest_health = max(tally.slowest_health, time.perf_counter() - began)
            await asyncio.sleep(max(seconds / 40, 0.2))

    watching = asyncio.create_task(watch())
    harming = [
        asyncio.create_task(hostile.work(number, server.client, end))
        for number in range(harm if hostile else 0)
    ]
    await asyncio.gather(*(one(client) for client in range(clients)))
    tally.seconds += time.perf_counter()
    await asyncio.gather(*harming)  # what they left half is ended by the server
    watching.cancel()
    for name, times in tally.ids.items():
        if times > 1:
            tally.fail("doubled", f"id {name} came {times} times")
    return tally


def percentile(values: list[float], share: float) -> float:
    """NaN for no values."""
    return float(np.percentile(values, share)) if values else float("nan")


async def run(
    url: str,
    clients: int,
    seconds: float,
    key: str,
    count: int,
    max_tokens: int,
    temperature: float,
    harm: int,
) -> dict[str, Any]:
    """What is printed."""
    most = clients + harm + 2
    limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx2.AsyncClient(
        base_url=url, limits=limits, timeout=600, headers=headers
    ) as client:
        server = Server(client)
        models = await client.get("/v1/models")
        models.raise_for_status()
        model = models.json()["data"][0]["id"]
        asked = prompts(model, count, max_tokens, temperature)
        alone = [(await server.ask(prompt, stream=False))[1] for prompt in asked]
        warm = await load(server, asked, alone, clients, min(seconds / 10, 10))
        before = await server.memory()
        hostile = Hostile(url, model, headers)
        tally = await load(server, asked, alone, clients, seconds, hostile, harm)
        elapsed = tally.seconds
        after = await server.memory()
        health = (await client.get("/health")).json()
        for what, times in hostile.wrong.items():
            tally.fail("harm", f"{what}, {times} times")
    half = len(tally.memory) // 2
    return {
        "clients": clients,
        "seconds": elapsed,
        "prompts": len(asked),
        "distinct_answers": len({answer.text for answer in alone}),
        "answers": len(tally.latency),
        "answers_per_second": len(tally.latency) / elapsed,
        "tokens_per_second": tally.tokens / elapsed,
        "refused_429": tally.refused,
        "wrong": dict(warm.wrong + tally.wrong),
        "examples": warm.examples + tally.examples,
        "latency_p50": percentile(tally.latency, 50),
        "latency_p99": percentile(tally.latency, 99),
        "first_token_p50": percentile(tally.first, 50),
        "first_token_p99": percentile(tally.first, 99),
        "memory_mib_before": before,
        "memory_mib_after": after,
        "memory_mib_begin_middle_end": [tally.memory[i] for i in (0, half, -1)],
        "memory_mib_most": max(tally.memory),
        "memory_mib_median_halves": [
            percentile(tally.memory[:half], 50), percentile(tally.memory[half:], 50),
        ],
        "health": dict(tally.health),
        "health_and_metrics_slowest": tally.slowest_health,
        "hostile_clients": harm,
        "hostile": dict(sorted(hostile.ends.items())),
        "left_running_and_waiting": [health["running"], health["waiting"]],
    }  # fmt: skip


def main(
    url: Annotated[Positional[str], arg(metavar="URL")],
    *,
    clients: int = 64,
    hostile: int = 0,
    seconds: float = 120.0,
    prompts: int = 96,
    max_tokens: int = 32,
    temperature: float = 2.0,
    api_key_env: str | None = None,
    json: bool = False,
) -> None:
    """Ask a running server from many clients at once and check every answer.

    Args:
        url: Its address, such as http://127.0.0.1:8000.
        clients: How many ask at the same time.
        hostile: How many do harm beside them.
        seconds: For how long.
        prompts: Different prompts; each is first asked alone.
        max_tokens: Longest answer.
        temperature: With a seed for each prompt, so that answers differ and yet are known.
        api_key_env: Environment variable with the server's key.
        json: Print JSON.
    """
    key = os.environ.get(api_key_env, "") if api_key_env else ""
    try:
        found = asyncio.run(
            run(url, clients, seconds, key, prompts, max_tokens, temperature, hostile)
        )
    except (httpx2.HTTPError, ValueError, KeyError) as error:
        console.print(f"load_test: error: {type(error).__name__}: {error}", markup=False)
        sys.exit(2)
    if json:
        print(_as_json(found))
    else:
        table = Table(box=None, show_header=False)
        for name, value in found.items():
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        console.print(table)
    if found["wrong"] or found["left_running_and_waiting"] != [0, 0] or not found["answers"]:
        sys.exit(1)


def _as_json(found: dict[str, Any]) -> str:
    return json.dumps(found)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
