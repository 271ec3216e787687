"""Image features on the device, kept by content: a picture is encoded once for many prompts."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from mis_jax.inference import model_runner
from mis_jax.model.internvl import InternVL

TILES_AT_ONCE = 16  # through the vision tower
_TILE_COUNTS = (1, 2, 4, 8, TILES_AT_ONCE)  # so many are encoded together: few shapes


@dataclass
class CachedImage:
    """An image in the pool. While `users` is not 0 its places are not given away."""

    places: Int[np.ndarray, " tiles"]
    users: int = 0
    encoded: bool = False
    waiting: list[tuple[UInt8[np.ndarray, "size size 3"], int]] = field(default_factory=list)


class FeaturePool:
    """Places for the features of so many tiles; the image unused for longest goes first."""

    def __init__(self, model: InternVL, tiles: int, dtype: jnp.dtype):
        config = model.config
        self._model = model_runner.split(model)
        self._images: OrderedDict[bytes, CachedImage] = OrderedDict()
        self._tokens = config.tokens_per_tile
        self._image_size = config.vision.image_size
        self._shape = (tiles, self._tokens, config.text.hidden_size)
        self._dtype = dtype
        self.clear()

    def clear(self) -> None:
        """As at the beginning; holds on images mean nothing any more."""
        self._images.clear()
        self._free = list(range(self._shape[0]))[::-1]
        self.features = jnp.zeros(self._shape, self._dtype)

    @property
    def size(self) -> int:
        return self.features.shape[0]

    def take(
        self, images: list[UInt8[np.ndarray, "tiles size size 3"]]
    ) -> list[CachedImage] | None:
        """A hold on every image of a prompt, or None while others hold too much of the pool."""
        keys = [_content(image) for image in images]
        missing = {
            key: len(image)
            for key, image in zip(keys, images, strict=True)
            if key not in self._images
        }
        if not self._make_room(sum(missing.values()), set(keys)):
            return None
        taken = []
        for key, image in zip(keys, images, strict=True):
            held = self._images.get(key)
            if held is None:
                places = [self._free.pop() for _ in image]
                held = CachedImage(np.asarray(places, np.int32))
                held.waiting = list(zip(image, places, strict=True))
                self._images[key] = held
            self._images.move_to_end(key)
            held.users += 1
            taken.append(held)
        return taken

    def release(self, taken: list[CachedImage]) -> None:
        """The features have been read; they stay until their places are needed."""
        for held in taken:
            held.users -= 1

    def _make_room(self, tiles: int, wanted: set[bytes]) -> bool:
        idle = [k for k, held in self._images.items() if not held.users and k not in wanted]
        within_reach = len(self._free) + sum(len(self._images[key].places) for key in idle)
        if within_reach < tiles:
            busy = any(held.users for held in self._images.values())
            if busy:
                return False
            self._grow(self.size + tiles - within_reach)
        for key in idle:
            if len(self._free) >= tiles:
                break
            self._free += self._images.pop(key).places.tolist()
        return True

    def _grow(self, tiles: int) -> None:
        """For a prompt that has more tiles than the whole pool."""
        more = model_runner.power_of_two(tiles) - self.size
        size = self.size
        self.features = jnp.pad(self.features, ((0, more), (0, 0), (0, 0)))
        self._free += range(size, size + more)

    def encode_some(self) -> bool:
        """Up to TILES_AT_ONCE waiting tiles through the vision tower; False if none waits."""
        batch: list[tuple[np.ndarray, int]] = []
        parts: list[tuple[CachedImage, int]] = []
        for held in self._images.values():
            if held.waiting and held.users:
                part = held.waiting[: TILES_AT_ONCE - len(batch)]
                batch += part
                parts.append((held, len(part)))
        if not batch:
            return False
        count = next(size for size in _TILE_COUNTS if size >= len(batch))
        tiles = np.zeros((count, *batch[0][0].shape), np.uint8)
        places = np.full(count, self.size, np.int32)
        for index, (tile, place) in enumerate(batch):
            tiles[index], places[index] = tile, place
        self.features = model_runner.encode(*self._model, self.features, tiles, places)
        for held, encoded in parts:  # only now: it may have failed
            held.waiting = held.waiting[encoded:]
            held.encoded = not held.waiting
        return True

    def warm_up(self) -> None:
        """Compile for every number of tiles; no place is written."""
        size = self._image_size
        for count in _TILE_COUNTS:
            tiles = np.zeros((count, size, size, 3), np.uint8)
            places = np.full(count, self.size, np.int32)
            self.features = model_runner.encode(*self._model, self.features, tiles, places)

    def places_of(self, taken: list[CachedImage]) -> Int[np.ndarray, " tokens"]:
        """Place in the flat pool of every image token of a prompt, in order."""
        if not taken:
            return np.zeros(0, np.int32)
        tiles = np.concatenate([held.places for held in taken])
        return (tiles[:, None] * self._tokens + np.arange(self._tokens)).reshape(-1)


def _content(tiles: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tiles).data, digest_size=16).digest()
