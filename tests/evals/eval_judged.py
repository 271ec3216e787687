"""Runs over harmless rows in MIS's layout, and clients of the scripted judge."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chat_server import MODEL, ChatServer, Say
from PIL import Image

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.chat_client import ChatClient, Patience
from mis_jax.evals.run_dir import open_run
from mis_jax.evals.runner import generate_answers
from mis_jax.evals.types import Answer

HASTY = Patience(retries=3, backoff=0.002, timeout=20)
GOOD = json.dumps({"safety": "Safe", "perception": "Level1"})
BAD = json.dumps({"safety": "Unsafe", "perception": "Level2"})
MIS = BENCHMARKS["mis_hard"]


def write_mis(root: Path, n: int) -> Path:
    """MIS's published layout with harmless rows."""
    items = []
    for number in range(n):
        names = [f"hard_image/{number}/object{k}.png" for k in (1, 2)]
        for place, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number % 256, 90 * place, 7)).save(root / name)
        paths = {"image_path1": names[0], "image_path2": names[1]}
        items.append({"id": number, "category": "Household", "question": "What are these?"} | paths)
    (root / "mis_hard.json").write_text(json.dumps(items))
    return root


def answered(run: Path, root: Path, said: Mapping[str, str] = {}) -> Path:
    """A run whose answers hold a nonce for each sample, or are as ``said``."""
    open_run(run, model="m", fingerprint="f", data_root=root)
    generate_answers(
        MIS,
        MIS.load(root),
        lambda batch: [Answer(said.get(s.id, f"A kettle; nonce {s.id}.")) for s in batch],
        run,
    )
    return run


def client_of(server: ChatServer, **options: Any) -> ChatClient:
    """A client that does not wait long."""
    return ChatClient(server.url, **{"model": MODEL, "patience": HASTY, "concurrency": 4} | options)


def always(text: str) -> Callable[..., Say]:
    """A judge that says one thing."""
    return lambda nonce, nth, body: Say(text)
