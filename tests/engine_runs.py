"""The engine asked by a `Batch`: every row is a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mis_jax.data.collate import Example
from mis_jax.inference.engine import Engine
from mis_jax.inference.requests import Request, RequestOutput
from mis_jax.inference.sampling import Sampling
from mis_jax.model.batch import Batch
from mis_jax.model.internvl import InternVL


@dataclass(frozen=True)
class Generated:
    """One entry a row; `tokens` are without the stop token."""

    tokens: list[list[int]]
    finish_reason: list[str | None]
    generated: list[int]


def letters(ids: Sequence[int]) -> str:
    """A text with a character for every token."""
    return "".join(chr(0x4E00 + token) for token in ids)


def requests_of(batch: Batch, tiles_per_image: list[list[int]] | None = None, **how) -> list:
    """A request for every row of a batch."""
    count = len(batch.input_ids)
    tiles = np.asarray(batch.tiles).reshape(count, -1, *batch.tiles.shape[1:])
    mask = np.asarray(batch.tile_mask).reshape(count, -1)
    made = []
    for row in range(count):
        ids = np.asarray(batch.input_ids)[
            row, : int((np.asarray(batch.segment_ids)[row] > 0).sum())
        ]
        own = tiles[row][mask[row]]
        per_image = tiles_per_image[row] if tiles_per_image else ([len(own)] if len(own) else [])
        example = Example(str(row), ids, np.zeros(len(ids), bool), own, tuple(per_image))
        made.append(Request(example, **({"stream": row} | how)))
    return made


def run_all(engine: Engine, requests: Sequence[Request]) -> list[list[RequestOutput]]:
    """All pieces of every request, in the order of the requests."""
    tickets = [engine.add(request) for request in requests]
    pieces: dict[int, list[RequestOutput]] = {ticket: [] for ticket in tickets}
    while not engine.idle:
        for ticket, piece in engine.step():
            pieces[ticket].append(piece)
    return [pieces[ticket] for ticket in tickets]


def generate_tokens(
    model: InternVL,
    batch: Batch,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    row_ids: Sequence[int] | None = None,
    max_num_seqs: int | None = None,
    groups: int = 1,
    between: int = 0,
) -> Generated:
    """Every sequence of the batch continued, in as many slots unless `max_num_seqs` says."""
    engine = Engine(
        model,
        stop_ids=stop_ids,
        decode=letters,
        max_num_seqs=max_num_seqs or len(batch.input_ids),
        groups=groups,
        between=between,
    )
    asked = requests_of(batch, max_new_tokens=max_new_tokens, sampling=sampling or Sampling())
    if row_ids is not None:
        asked = [
            Request(r.example, r.max_new_tokens, r.sampling, int(i))
            for r, i in zip(asked, row_ids, strict=True)
        ]
    made = run_all(engine, asked)
    tokens = [[token.id for piece in pieces for token in piece.tokens] for pieces in made]
    return Generated(tokens, [p[-1].finish_reason for p in made], [p[-1].generated for p in made])
