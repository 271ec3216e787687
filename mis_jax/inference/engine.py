"""The engine: many answers at once, each in a slot of one cache.

A slot that ends is given to the next prompt at once, so that a long answer holds nobody up. Prompts
are read in chunks, and between two chunks the other slots may go on. What runs on the device is in
`model_runner.py`; here is who gets which slot, and when.

Slots are right-padded. A new token goes to the position after the slot's last one and looks at none
beyond it; so a slot's answer does not depend on the slots beside it.
"""

import itertools
import math
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mis_jax.inference import model_runner
from mis_jax.inference.detokenizer import Decode, Detokenizer
from mis_jax.inference.image_cache import FeaturePool
from mis_jax.inference.memory import OutOfMemory, is_alive, is_out_of_memory, largest
from mis_jax.inference.model_runner import DECODE_STEPS, cache_bucket, empty_cache, mesh_of
from mis_jax.inference.requests import FinishReason, Request, RequestOutput, Token
from mis_jax.inference.sequence import (
    ActiveSequence,
    filled,
    flags,
    ints,
    settings,
    token,
    want_logprobs,
)
from mis_jax.model.internvl import InternVL
from mis_jax.model.kv_cache import KVCache
from mis_jax.parallel.sharding import BATCH_AXES

CHUNKS = (128, 256, 384, 512, 704, 1024)  # tokens of a prompt that are read together: few shapes
POOL_TILES = 64


class Engine:
    """Continuous batching in up to `max_num_seqs` slots. Not for several threads, but for `check`.

    `decode` turns token ids into text. `groups` slots are read at once (a mesh needs as many as it
    divides slots into). While prompts wait to be read, slots make `between` tokens between two
    chunks: 0 fills all slots first, which gives the most tokens in all. A call of `step` makes
    up to `steps` tokens of every slot. The model's layers may be unrolled (`model.unrolled`); with
    `int8_cache` keys and values are rounded to 8 bits.
    """

    def __init__(
        self,
        model: InternVL,
        *,
        stop_ids: Sequence[int],
        decode: Decode,
        max_num_seqs: int,
        groups: int = 1,
        between: int = 0,
        steps: int = DECODE_STEPS,
        max_length: int | None = None,
        pool_tiles: int = POOL_TILES,
        int8_cache: bool = False,
    ):
        self._model = model
        self._parts = model_runner.split(model)
        self._mesh = mesh_of(model)
        shards = [self._mesh.shape[axis] for axis in BATCH_AXES] if self._mesh else []
        self._groups = max(groups, math.prod(shards))
        self._max_num_seqs = max_num_seqs
        self._slots: list[ActiveSequence | None] = [None] * (
            -(-max_num_seqs // self._groups) * self._groups
        )
        self._between, self._steps = between, min(steps, DECODE_STEPS)
        self._decode = decode
        self._stops = frozenset(int(token) for token in stop_ids)
        self._stop_ids = _padded(stop_ids)
        self._max_length = max_length
        self._waiting: deque[ActiveSequence] = deque()
        self._pieces: list[tuple[int, RequestOutput]] = []  # made, and not yet given out by `step`
        self._suspects: set[ActiveSequence] = (
            set()
        )  # what failed since the device was last waited for
        self._tickets = itertools.count()
        self._pool = FeaturePool(model, pool_tiles, model.compute_dtype)
        self._cache_dtype = jnp.dtype(jnp.int8) if int8_cache else model.compute_dtype
        self._cache = self._empty_cache(model_runner.MIN_CACHE_LENGTH)

    # -----------------------------------------------------------------------------------------
    # For whoever asks

    def check(self, request: Request) -> None:
        """ValueError for a request that can never be answered."""
        example, config = request.example, self._model.config
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; give at least 1")
        if not len(example.input_ids):
            raise ValueError("the prompt is empty; give at least one token")
        tokens = int((np.asarray(example.input_ids) == config.image_token_id).sum())
        if tokens != len(example.tiles) * config.tokens_per_tile:
            raise ValueError(
                f"the prompt has {tokens} image tokens and {len(example.tiles)} tiles of "
                f"{config.tokens_per_tile} tokens each; make it with the model's own processor"
            )
        limits = [] if self._max_length is None else [self._max_length]
        if config.text.rope_dynamic_factor is None:
            limits.append(config.text.max_position)
        if limits and len(example.input_ids) + request.max_new_tokens > min(limits):
            raise ValueError(
                f"{len(example.input_ids)} prompt tokens and {request.max_new_tokens} new tokens "
                f"exceed the context of {min(limits)} tokens; shorten the prompt, use fewer tiles "
                "(max_tiles) or lower max_new_tokens"
            )

    def add(self, request: Request) -> int:
        """Take a request; the number that its pieces will carry. Raises as `check` does."""
        self.check(request)
        ticket = next(self._tickets)
        detokenizer = Detokenizer(self._decode, request.stop, continued=request.continued)
        self._waiting.append(ActiveSequence(ticket, request, detokenizer))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Forget a request, whether it waits or runs; a finished one is no matter."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.ticket != ticket)
        self._pieces = [(owner, piece) for owner, piece in self._pieces if owner != ticket]
        for slot, running in enumerate(self._slots):
            if running is not None and running.ticket == ticket:
                self._leave(slot)

    @property
    def running(self) -> int:
        return sum(running is not None for running in self._slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting and not self._pieces

    def warm_up(self, longest: int) -> None:
        """Compile what prompts with answers of up to `longest` tokens in all can need.

        Nothing may be running. Of a prompt's pictures only the usual numbers of tiles at once are
        compiled, and a pool that has to grow compiles again.
        """
        assert self.idle, "warming up writes into the slots of the cache"
        self._pool.warm_up()
        nobody: list[ActiveSequence | None] = [None] * len(self._slots)
        sizes = model_runner.cache_buckets(longest + self._steps + 1)
        for cache_length in sizes:
            self._cache = self._empty_cache(cache_length)
            for length in (length for length in CHUNKS if length <= cache_length):
                self._prefill([None] * self._groups, nobody[: self._groups], length)
            self._decode_some(nobody, 1)
            for other in sizes:
                jax.tree.map(lambda x: model_runner.resized(x, other), self._cache)  # noqa: B023
        self._cache = self._empty_cache(model_runner.MIN_CACHE_LENGTH)

    def step(self) -> list[tuple[int, RequestOutput]]:
        """Some work on the device: admit, encode, read a chunk of prompts, make some tokens.

        Raises OutOfMemory for a request that does not fit; the others go on with the next call.
        """
        failure = None
        try:
            self._work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # whose frames hold arrays
        if failure is not None:
            raise OutOfMemory(self._make_room(failure)) from failure
        pieces, self._pieces = self._pieces, []
        return pieces

    def _work(self) -> None:
        self._admit()
        filling = self._read_some()
        steps = self._between if filling else self._steps
        if steps and any(running and not running.reading for running in self._slots):
            self._make_some(steps)

    def _make_room(self, failure: Exception) -> ActiveSequence:
        """End the largest of those that may have failed; the engine can work after that.

        Raises what was raised, or what is now, where a small prompt alone does not fit.
        """
        suspects = self._suspects or {r for r in self._slots if r is not None}
        if not suspects:
            raise failure
        ended, self._suspects = largest(suspects), set()
        small = ended.cache_length <= model_runner.MIN_CACHE_LENGTH and not len(
            ended.request.example.tiles
        )
        if small and self.running <= 1:
            raise failure
        self.cancel(ended.ticket)
        if not (is_alive(self._cache) and is_alive(self._pool.features)):
            self._begin_again()
        elif not self.running:
            self._cache = self._empty_cache(model_runner.MIN_CACHE_LENGTH)
        return ended

    def _begin_again(self) -> None:
        """With a new cache and pool; those that run are read once more, answers so far too."""
        active = [running for running in self._slots if running is not None]
        self._slots = [None] * len(self._slots)
        for running in sorted(active, key=lambda running: running.ticket, reverse=True):
            running.begin_again()
            self._waiting.appendleft(running)
        self._pool.clear()
        self._cache = self._empty_cache(model_runner.MIN_CACHE_LENGTH)
        jax.block_until_ready((self._cache, self._pool.features))

    # -----------------------------------------------------------------------------------------
    # Slots

    def _admit(self) -> None:
        """Give free slots to those who wait, in their order, group by group in turn."""
        free = [slot for slot, running in enumerate(self._slots) if running is None]
        each = len(self._slots) // self._groups
        free.sort(key=lambda slot: (slot % each, slot))
        while self._waiting and free and self.running < self._max_num_seqs:
            running = self._waiting[0]
            example = running.request.example
            bounds = np.cumsum(example.tiles_per_image)[:-1]
            images = np.split(example.tiles, bounds) if len(example.tiles) else []
            tiles, known = self._pool.size, running in self._suspects
            self._suspects.add(running)
            held = self._pool.take(images)
            if self._pool.size == tiles and not known:  # it has not grown for it
                self._suspects.remove(running)
            if held is None:
                return
            self._waiting.popleft()
            running.images, running.features = held, self._pool.places_of(held)
            self._slots[free.pop(0)] = running

    def _leave(self, slot: int) -> None:
        running = self._slots[slot]
        assert running is not None
        self._pool.release(running.images)
        self._slots[slot] = None

    def _fit(self, wanted: int) -> None:
        """At least so long, and not far longer than anybody needs."""
        length, present = cache_bucket(wanted), self._cache.length
        if present < length or present > 2 * length:
            self._cache = jax.tree.map(lambda x: model_runner.resized(x, length), self._cache)

    def _empty_cache(self, cache_length: int) -> KVCache:
        return empty_cache(self._model, len(self._slots), cache_length, self._cache_dtype)

    def _longest(self) -> int:
        return max(
            (running.cache_length for running in self._slots if running is not None), default=1
        )

    # -----------------------------------------------------------------------------------------
    # Prompts

    def _read_some(self) -> bool:
        """Encode some tiles or read one chunk in every group; False when nobody is reading."""
        each = len(self._slots) // self._groups
        chosen: list[int | None] = []
        for group in range(self._groups):
            slots = range(group * each, (group + 1) * each)
            reading = [slot for slot in slots if (r := self._slots[slot]) is not None and r.reading]
            chosen.append(min(reading, key=self._ticket_of, default=None))
        if not any(slot is not None for slot in chosen):
            return False
        pending = [self._slots[slot] for slot in chosen if slot is not None]
        self._suspects.update(running for running in pending if running)
        while not all(image.encoded for running in pending if running for image in running.images):
            encoded = self._pool.encode_some()
            assert encoded, "an image of a running slot is neither encoded nor waiting"
            if self._between:
                return True
        self._read(chosen)
        return True

    def _ticket_of(self, slot: int) -> int:
        running = self._slots[slot]
        assert running is not None
        return running.ticket

    def _read(self, chosen: list[int | None]) -> None:
        readers = [None if slot is None else self._slots[slot] for slot in chosen]
        longest = max(r.to_read - r.read for r in readers if r)
        length = next((size for size in CHUNKS if size >= longest), CHUNKS[-1])
        self._fit(max(self._longest(), length))
        sampled, ends = self._prefill(chosen, readers, length)
        for reader, end in zip(readers, ends, strict=True):
            if reader:
                reader.read = end
        ending = [reader for reader in readers if reader and not reader.reading]
        for reader in ending:
            self._pool.release(reader.images)
            reader.images = []
        if ending:
            sampled = jax.tree.map(np.asarray, sampled)
            self._suspects.clear()
            for group, reader in enumerate(readers):
                if reader in ending and not reader.tokens:  # one that is read again has its own
                    at = chosen[group]
                    assert at is not None
                    self._take(at, [token(reader.request, sampled, (group,))])

    def _prefill(
        self, chosen: Sequence[int | None], readers: Sequence[ActiveSequence | None], length: int
    ) -> tuple[model_runner.Chosen, list[int]]:
        """Reads the next `length` tokens of a prompt in every group that has one, and up to where.

        The readers themselves are not changed, as it may fail.
        """
        ends = [0] * self._groups
        shape, each = (self._groups, length), len(self._slots) // self._groups
        ids, features = filled(0, shape), filled(-1, shape)
        slot, start, prompt = (filled(value, self._groups) for value in (0, 0, 1))
        for group, reader in enumerate(readers):
            if reader is None:
                continue
            place = chosen[group]
            assert place is not None
            slot[group], prompt[group] = place % each, reader.to_read
            # The last chunk of a long prompt reads some tokens again rather than have a length of
            # its own.
            start[group] = first = max(min(reader.read, reader.to_read - length), 0)
            part, places = reader.stretch(first, length, self._model.config.image_token_id)
            ids[group, : len(part)], features[group, : len(part)] = part, places
            ends[group] = first + len(part)
        ending = [r for r, end in zip(readers, ends, strict=True) if r and end == r.to_read]
        how = settings(readers)
        chunk = model_runner.Chunk(ids, features, slot, start, flags(readers), prompt, how)
        sampled, self._cache = model_runner.prefill(
            *self._parts, self._cache, self._pool.features, chunk, want_logprobs(ending)
        )
        return sampled, ends

    # -----------------------------------------------------------------------------------------
    # Tokens

    def _make_some(self, steps: int) -> None:
        writers = [r if r is not None and not r.reading else None for r in self._slots]
        self._suspects.update(writer for writer in writers if writer)
        self._fit(max(self._longest(), max(r.length + 1 for r in writers if r) + steps))
        sampled = jax.tree.map(np.asarray, self._decode_some(writers, steps))
        self._suspects.clear()
        for slot, writer in enumerate(writers):
            if writer is not None:
                count = int((sampled.token[slot] >= 0).sum())
                tokens = [token(writer.request, sampled, (slot, step)) for step in range(count)]
                self._take(slot, tokens)

    def _decode_some(
        self, writers: Sequence[ActiveSequence | None], steps: int
    ) -> model_runner.Chosen:
        state = model_runner.DecodeState(
            last=ints(r.tokens[-1].id if r else 0 for r in writers),
            lengths=ints(r.length if r else 0 for r in writers),
            active=flags(writers),
            remaining=ints(r.request.max_new_tokens - len(r.tokens) if r else 0 for r in writers),
            settings=settings(writers),
        )
        sampled, self._cache = model_runner.decode(
            *self._parts,
            self._cache,
            state,
            self._stop_ids,
            np.int32(steps),
            np.bool_(len(self._waiting) > 0),
            want_logprobs(writers),
        )
        return sampled

    def _take(self, slot: int, tokens: list[Token]) -> None:
        """New tokens of a slot: to its answer, and a piece of what of them can be sent."""
        running = self._slots[slot]
        assert running is not None
        request, reason = running.request, None
        stopped = bool(tokens) and tokens[-1].id in self._stops
        running.tokens += tokens[:-1] if stopped else tokens
        generated = len(running.tokens) + stopped
        if stopped:
            reason: FinishReason | None = "stop"
        elif generated >= request.max_new_tokens:
            reason = "length"
        if reason is None and not request.streamed and not request.stop:
            return
        ids = [token.id for token in running.tokens[running.detokenizer.given :]]
        text, met = running.detokenizer.grow(ids, last=reason is not None)
        if met:
            reason, generated = "stop", running.detokenizer.given
        new = running.tokens[running.num_sent : running.detokenizer.tokens]
        running.num_sent = max(running.num_sent, running.detokenizer.tokens)
        if reason is not None or text or new:
            self._pieces.append(
                (running.ticket, RequestOutput(text, tuple(new), reason, generated))
            )
        if reason is not None:
            self._leave(slot)


def _padded(stop_ids: Sequence[int]) -> jax.Array:
    """A few shapes only; -1 is no token."""
    size = max(model_runner.power_of_two(max(len(stop_ids), 1)), 4)
    return jnp.asarray(np.array([*stop_ids, *[-1] * (size - len(stop_ids))], np.int32))
