"""Drawings of the small world's household objects: one object on a random background.

Every icon is drawn in the square [-1, 1] x [-1, 1] (x to the right, y down) by a function that
gets a `Pen`; the pen carries the random place, scale, rotation and colours. Colours never tell an
object: only its shape does.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

_OVERSAMPLE = 2  # drawn larger and averaged down: Pillow's polygons are not anti-aliased
_UNIT_CIRCLE = [complex(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 25)[:-1]]
_BLACK, _WHITE, _RED = (15, 15, 15), (245, 245, 245), (215, 25, 25)


def _colour_table(rows: int = 8192) -> list[tuple[Colour, Colour, Colour, Colour]]:
    """Draw `rows` colour sets (background, faint background, main, accent) that contrast.

    Made once, because trying random colours until they contrast is slow picture by picture.
    """
    rng = np.random.default_rng(20240607)
    sets = rng.integers(0, 256, (rows * 12, 4, 3))
    sets[:, 1] = np.clip(sets[:, 0] + rng.integers(-32, 33, (rows * 12, 3)), 0, 255)
    light = sets @ np.array([0.30, 0.59, 0.11])
    main_ok = np.abs(light[:, :2] - light[:, 2:3]).min(1) > 75
    accent_ok = (np.abs(light[:, :3] - light[:, 3:]) > 50).all(1)
    good = sets[main_ok & accent_ok][:rows]
    return [(tuple(a), tuple(b), tuple(c), tuple(d)) for a, b, c, d in good.tolist()]


_COLOURS = _colour_table()


class Pen:
    """Draws icon shapes given in [-1, 1] coordinates onto the picture.

    main, accent, back: the picture's colours for the body, its details and its holes.
    """

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        centre: complex,
        turn: complex,
        main: Colour,
        accent: Colour,
        back: Colour,
    ) -> None:
        """centre: pixel position of (0, 0); turn: pixels per unit times the rotation."""
        self._draw, self._centre, self._turn = draw, centre, turn
        self._scale = abs(turn)
        self.main, self.accent, self.back = main, accent, back

    def _place(self, points: Sequence[complex]) -> list[Point]:
        centre, turn = self._centre, self._turn
        return [(w.real, w.imag) for w in [centre + turn * z for z in points]]

    def poly(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill the polygon."""
        self._draw.polygon(self._place([complex(x, y) for x, y in points]), fill=colour)

    def rect(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill the (turned) rectangle."""
        self.poly(((left, top), (right, top), (right, bottom), (left, bottom)), colour)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Fill the ellipse with centre (x, y) and half axes rx, ry."""
        self._draw.polygon(
            self._place([complex(x + rx * u.real, y + ry * u.imag) for u in _UNIT_CIRCLE]),
            fill=colour,
        )

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw the line through the points; width in the same units as the points."""
        self._draw.line(
            self._place([complex(x, y) for x, y in points]),
            fill=colour,
            width=max(1, round(width * self._scale)),
            joint="curve",
        )

    def arc(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        width: float,
        colour: Colour,
    ) -> None:
        """Draw part of an ellipse's rim, from `start` to `end` degrees (0: right, 90: down)."""
        angles = np.radians(np.linspace(start, end, 12)).tolist()
        self.line(
            [(x + rx * np.cos(a).item(), y + ry * np.sin(a).item()) for a in angles], width, colour
        )


def _flame(pen: Pen, x: float, y: float, size: float) -> None:
    """Flame whose foot is at (x, y) and that is `size` high."""
    shape = (
        (0, 0),
        (-0.28, -0.12),
        (-0.36, -0.36),
        (-0.22, -0.6),
        (-0.08, -0.72),
        (0.0, -1.0),
        (0.16, -0.74),
        (0.34, -0.5),
        (0.36, -0.28),
        (0.24, -0.08),
    )
    pen.poly([(x + size * u, y + size * v) for u, v in shape], pen.accent)
    pen.disc(x, y - 0.25 * size, 0.13 * size, 0.2 * size, pen.main)


def _hazard_diamond(pen: Pen, x: float, y: float, size: float) -> None:
    """Red-rimmed diamond with a black flame, the sign for what burns."""
    for radius, colour in ((1.0, _RED), (0.76, _WHITE)):
        r = radius * size
        pen.poly(((x, y - r), (x + r, y), (x, y + r), (x - r, y)), colour)
    shape = ((-0.2, 0.36), (-0.3, 0.05), (-0.06, -0.5), (0.1, -0.12), (0.3, 0.05), (0.2, 0.36))
    pen.poly([(x + size * u, y + size * v) for u, v in shape], _BLACK)


def _skull(pen: Pen, x: float, y: float, size: float) -> None:
    """White skull over crossed bones on black."""
    pen.rect(x - 1.15 * size, y - 1.05 * size, x + 1.15 * size, y + 1.25 * size, _BLACK)
    for side in (-1, 1):
        pen.line(
            ((x - side * size, y + 0.45 * size), (x + side * size, y + 1.1 * size)),
            0.22 * size,
            _WHITE,
        )
    pen.disc(x, y - 0.2 * size, 0.75 * size, 0.68 * size, _WHITE)
    pen.rect(x - 0.36 * size, y + 0.2 * size, x + 0.36 * size, y + 0.75 * size, _WHITE)
    for side in (-1, 1):
        pen.disc(x + side * 0.32 * size, y - 0.12 * size, 0.21 * size, 0.23 * size, _BLACK)
    pen.rect(x - 0.07 * size, y + 0.15 * size, x + 0.07 * size, y + 0.35 * size, _BLACK)


def _bleach_jug(pen: Pen) -> None:
    pen.poly(
        ((-0.75, 1), (-0.75, -0.1), (-0.5, -0.6), (0.25, -0.6), (0.75, -0.3), (0.75, 1)), pen.main
    )
    pen.disc(0.3, -0.1, 0.24, 0.27, pen.back)
    pen.rect(-0.5, -1, -0.05, -0.6, pen.accent)
    pen.rect(-0.5, 0.35, 0.5, 0.8, pen.accent)


def _ammonia_spray(pen: Pen) -> None:
    pen.poly(((-0.3, 1), (-0.3, 0.3), (0.1, -0.3), (0.4, -0.3), (0.75, 0.3), (0.75, 1)), pen.main)
    pen.rect(0.12, -0.55, 0.38, -0.3, pen.main)
    pen.poly(((-0.45, -1), (0.35, -1), (0.75, -0.72), (0.75, -0.55), (-0.45, -0.62)), pen.accent)
    pen.line(((-0.15, -0.6), (-0.05, -0.35), (-0.2, -0.05)), 0.14, pen.accent)
    for y in (-1.0, -0.8, -0.6):
        pen.line(((-0.6, -0.8), (-1.0, 1.6 * y + 0.48)), 0.07, pen.main)


def _toilet_gel(pen: Pen) -> None:
    pen.poly(
        (
            (-0.25, 1),
            (-0.35, 0.1),
            (-0.15, -0.35),
            (0.0, -0.6),
            (-0.2, -0.72),
            (-0.75, -0.55),
            (-0.8, -0.8),
            (-0.25, -1.0),
            (0.2, -1.0),
            (0.45, -0.7),
            (0.5, -0.3),
            (0.65, 0.1),
            (0.6, 1),
        ),
        pen.main,
    )
    pen.poly(((-0.65, -0.9), (-0.6, -0.5), (-1.0, -0.38), (-1.05, -0.7)), pen.accent)
    pen.disc(0.15, 0.45, 0.28, 0.34, pen.accent)


def _drain_opener(pen: Pen) -> None:
    pen.rect(-0.8, -0.3, 0.8, 0.85, pen.main)
    pen.disc(0, 0.85, 0.8, 0.15, pen.main)
    pen.rect(-0.95, -0.75, 0.95, -0.35, pen.accent)
    for x in (-0.72, -0.36, 0.0, 0.36, 0.72):
        pen.line(((x, -0.72), (x, -0.38)), 0.08, pen.main)
    pen.line(
        ((-0.5, 0.0), (-0.1, 0.0), (-0.1, 0.55), (0.3, 0.55), (0.3, 0.2), (0.55, 0.2)),
        0.16,
        pen.accent,
    )


def _toaster(pen: Pen) -> None:
    for x in (-0.45, 0.3):
        pen.rect(x - 0.27, -0.75, x + 0.27, 0, pen.accent)
        pen.disc(x, -0.72, 0.32, 0.18, pen.accent)
    pen.poly(
        ((-0.95, 0.8), (-0.95, 0.0), (-0.75, -0.25), (0.65, -0.25), (0.85, 0.0), (0.85, 0.8)),
        pen.main,
    )
    pen.rect(0.85, 0.1, 1.08, 0.28, pen.accent)
    for x in (-0.65, 0.55):
        pen.rect(x - 0.15, 0.8, x + 0.15, 0.95, pen.accent)
    pen.line(((-0.6, 0.05), (0.5, 0.05)), 0.08, pen.accent)


def _hair_dryer(pen: Pen) -> None:
    pen.poly(((0.1, 0.0), (0.5, 0.0), (0.35, 0.85), (-0.05, 0.85)), pen.main)
    pen.disc(0.4, -0.35, 0.55, 0.52, pen.main)
    pen.poly(((0.4, -0.87), (0.4, 0.17), (-0.65, -0.02), (-0.65, -0.68)), pen.main)
    pen.rect(-0.98, -0.78, -0.65, 0.08, pen.accent)
    pen.disc(0.45, -0.35, 0.26, 0.26, pen.accent)
    pen.line(((0.15, 0.85), (0.25, 1.05), (0.6, 0.9), (0.95, 1.0)), 0.1, pen.accent)


def _lamp(pen: Pen) -> None:
    pen.poly(((-0.4, -1), (0.4, -1), (0.85, -0.1), (-0.85, -0.1)), pen.main)
    pen.rect(-0.09, -0.1, 0.09, 0.85, pen.accent)
    pen.disc(0, 0.9, 0.5, 0.14, pen.main)
    pen.line(((0.45, -0.1), (0.45, 0.25)), 0.06, pen.accent)


def _bathtub(pen: Pen) -> None:
    pen.poly(
        ((-0.95, -0.05), (0.95, -0.05), (0.8, 0.5), (0.55, 0.7), (-0.55, 0.7), (-0.8, 0.5)),
        pen.main,
    )
    pen.rect(-1.08, -0.18, 1.08, 0.04, pen.accent)
    for x in (-0.5, 0.5):
        pen.disc(x, 0.78, 0.14, 0.16, pen.accent)
    pen.line(((0.85, -0.15), (0.85, -0.85), (0.35, -0.85), (0.35, -0.7)), 0.11, pen.main)
    pen.rect(0.15, -0.72, 0.55, -0.6, pen.main)
    for x, r in ((-0.65, 0.2), (-0.35, 0.26), (-0.05, 0.17)):
        pen.disc(x, -0.3, r, r, pen.main)


def _bucket(pen: Pen) -> None:
    pen.arc(0, -0.25, 0.72, 0.75, 180, 360, 0.1, pen.accent)
    pen.poly(((-0.85, -0.25), (0.85, -0.25), (0.55, 1), (-0.55, 1)), pen.main)
    pen.disc(0, -0.25, 0.85, 0.2, pen.main)
    pen.disc(0, -0.25, 0.68, 0.12, pen.accent)
    pen.line(((-0.72, 0.3), (0.72, 0.3)), 0.08, pen.accent)


def _sink(pen: Pen) -> None:
    pen.poly(
        ((-0.95, -0.3), (0.95, -0.3), (0.75, 0.1), (0.35, 0.3), (-0.35, 0.3), (-0.75, 0.1)),
        pen.main,
    )
    pen.poly(((-0.22, 0.2), (0.22, 0.2), (0.4, 1), (-0.4, 1)), pen.accent)
    pen.line(((0.3, -0.3), (0.3, -0.9), (-0.15, -0.9), (-0.15, -0.55)), 0.15, pen.main)
    pen.line(((0.12, -0.98), (0.5, -0.98)), 0.12, pen.accent)


def _candle(pen: Pen) -> None:
    pen.arc(0.72, 0.62, 0.25, 0.25, 0, 360, 0.1, pen.accent)
    pen.poly(((-0.9, 0.65), (0.7, 0.65), (0.45, 0.95), (-0.65, 0.95)), pen.accent)
    pen.rect(-0.36, -0.25, 0.16, 0.68, pen.main)
    _flame(pen, -0.1, -0.28, 0.75)


def _match(pen: Pen) -> None:
    pen.line(((-0.95, 0.95), (0.35, -0.2)), 0.17, pen.main)
    _flame(pen, 0.5, -0.02, 1.0)
    pen.disc(0.38, -0.22, 0.2, 0.2, pen.main)


def _lighter(pen: Pen) -> None:
    pen.rect(-0.45, 0.1, 0.45, 1, pen.main)
    pen.rect(-0.45, -0.25, 0.1, 0.1, pen.accent)
    pen.disc(0.28, -0.05, 0.19, 0.19, pen.main)
    pen.poly(((-0.47, -0.95), (-0.85, -0.8), (-0.85, -0.15), (-0.47, 0.02)), pen.main)
    _flame(pen, -0.15, -0.28, 0.72)


def _petrol_can(pen: Pen) -> None:
    pen.poly(((-0.8, 1), (-0.8, -0.3), (-0.4, -0.65), (0.8, -0.65), (0.8, 1)), pen.main)
    pen.line(((-0.6, -0.5), (-0.95, -0.95)), 0.2, pen.accent)
    pen.line(((-0.1, -0.6), (-0.1, -0.92), (0.6, -0.92), (0.6, -0.6)), 0.14, pen.main)
    for side in (-1, 1):
        pen.line(((-0.65 * side, -0.4), (0.65 * side, 0.85)), 0.1, pen.accent)
    _hazard_diamond(pen, 0.0, 0.22, 0.55)


def _gas_bottle(pen: Pen) -> None:
    pen.disc(0, -0.2, 0.6, 0.35, pen.main)
    pen.rect(-0.6, -0.2, 0.6, 0.8, pen.main)
    pen.disc(0, 0.8, 0.6, 0.2, pen.main)
    pen.arc(0, -0.6, 0.42, 0.36, 150, 390, 0.12, pen.main)
    pen.rect(-0.1, -0.8, 0.1, -0.45, pen.accent)
    _hazard_diamond(pen, 0.0, 0.35, 0.5)


def _deodorant(pen: Pen) -> None:
    pen.rect(0.15, -0.35, 0.75, 1, pen.main)
    pen.disc(0.45, -0.38, 0.3, 0.22, pen.main)
    pen.rect(0.3, -0.85, 0.6, -0.55, pen.accent)
    pen.rect(0.15, 0.2, 0.75, 0.5, pen.accent)
    for x, y, r in (
        (0.02, -0.72, 0.09),
        (-0.3, -0.86, 0.13),
        (-0.3, -0.5, 0.13),
        (-0.72, -0.95, 0.17),
        (-0.72, -0.62, 0.17),
        (-0.72, -0.28, 0.17),
    ):
        pen.disc(x, y, r, r, pen.main)


def _rat_poison(pen: Pen) -> None:
    pen.poly(((-0.75, -0.6), (-0.5, -0.95), (0.95, -0.95), (0.7, -0.6)), pen.accent)
    pen.poly(((0.7, -0.6), (0.95, -0.95), (0.95, 0.65), (0.7, 1)), pen.accent)
    pen.rect(-0.75, -0.6, 0.7, 1, pen.main)
    _skull(pen, -0.02, 0.15, 0.52)


def _toadstool(pen: Pen) -> None:
    pen.poly(((-0.22, -0.1), (0.22, -0.1), (0.35, 1), (-0.35, 1)), pen.accent)
    pen.poly(
        (
            (-0.95, 0.1),
            (-0.85, -0.35),
            (-0.5, -0.75),
            (0, -0.92),
            (0.5, -0.75),
            (0.85, -0.35),
            (0.95, 0.1),
        ),
        pen.main,
    )
    for x, y, r in ((-0.5, -0.25, 0.17), (0.02, -0.6, 0.17), (0.5, -0.25, 0.17), (0, -0.1, 0.12)):
        pen.disc(x, y, r, r, pen.accent)


def _apple(pen: Pen) -> None:
    pen.disc(-0.32, 0.2, 0.58, 0.68, pen.main)
    pen.disc(0.32, 0.2, 0.58, 0.68, pen.main)
    pen.disc(0, 0.35, 0.5, 0.55, pen.main)
    pen.line(((0, -0.25), (0.06, -0.65), (0.18, -0.95)), 0.11, pen.accent)
    pen.poly(((0.12, -0.6), (0.35, -0.9), (0.8, -0.85), (0.55, -0.58)), pen.accent)


def _banana(pen: Pen) -> None:
    pen.poly(
        (
            (0.72, -0.95),
            (0.95, -0.9),
            (0.98, -0.3),
            (0.75, 0.3),
            (0.3, 0.7),
            (-0.3, 0.85),
            (-0.95, 0.7),
            (-0.98, 0.5),
            (-0.4, 0.45),
            (0.1, 0.2),
            (0.5, -0.2),
            (0.65, -0.6),
        ),
        pen.main,
    )
    pen.line(((-0.6, 0.63), (0.1, 0.48), (0.62, 0.05), (0.82, -0.5)), 0.07, pen.accent)
    pen.rect(0.7, -1.02, 0.97, -0.85, pen.accent)


def _ice_cream(pen: Pen) -> None:
    pen.poly(((-0.5, 0.0), (0.5, 0.0), (0, 1.05)), pen.accent)
    pen.line(((-0.3, 0.05), (0.15, 0.65)), 0.06, pen.main)
    pen.line(((0.3, 0.05), (-0.15, 0.65)), 0.06, pen.main)
    pen.disc(-0.32, -0.2, 0.38, 0.36, pen.main)
    pen.disc(0.32, -0.2, 0.38, 0.36, pen.main)
    pen.disc(0, -0.62, 0.4, 0.4, pen.main)


def _fork(pen: Pen) -> None:
    for x in (-0.42, -0.14, 0.14, 0.42):
        pen.rect(x - 0.075, -1, x + 0.075, -0.3, pen.main)
    pen.poly(
        ((-0.5, -0.4), (0.5, -0.4), (0.42, -0.1), (0.12, 0.1), (-0.12, 0.1), (-0.42, -0.1)),
        pen.main,
    )
    pen.poly(((-0.1, 0.05), (0.1, 0.05), (0.17, 1), (-0.17, 1)), pen.main)


def _key(pen: Pen) -> None:
    pen.disc(-0.55, 0, 0.45, 0.45, pen.main)
    pen.disc(-0.6, 0, 0.2, 0.2, pen.back)
    pen.rect(-0.2, -0.1, 1, 0.1, pen.main)
    pen.rect(0.5, 0.05, 0.65, 0.42, pen.main)
    pen.rect(0.82, 0.05, 1.0, 0.5, pen.main)


def _book(pen: Pen) -> None:
    pen.poly(((-1, -0.55), (0, -0.35), (1, -0.55), (1, 0.6), (0, 0.8), (-1, 0.6)), pen.main)
    pen.line(((0, -0.35), (0, 0.8)), 0.08, pen.accent)
    for y in (-0.28, -0.02, 0.24):
        pen.line(((-0.82, y), (-0.16, y + 0.13)), 0.08, pen.accent)
        pen.line(((0.82, y), (0.16, y + 0.13)), 0.08, pen.accent)


def _umbrella(pen: Pen) -> None:
    pen.line(((0, -1), (0, 0.75)), 0.1, pen.accent)
    pen.arc(-0.2, 0.75, 0.2, 0.22, 0, 180, 0.1, pen.accent)
    pen.poly(
        (
            (-1, 0.1),
            (-0.9, -0.35),
            (-0.5, -0.75),
            (0, -0.88),
            (0.5, -0.75),
            (0.9, -0.35),
            (1, 0.1),
            (0.67, -0.12),
            (0.33, 0.1),
            (0, -0.12),
            (-0.33, 0.1),
            (-0.67, -0.12),
        ),
        pen.main,
    )


def _chair(pen: Pen) -> None:
    pen.rect(-0.65, -1, -0.45, 1, pen.main)
    pen.rect(-0.65, 0.0, 0.65, 0.22, pen.main)
    pen.rect(0.45, 0.1, 0.65, 1, pen.main)
    pen.line(((-0.5, 0.62), (0.5, 0.62)), 0.1, pen.accent)
    pen.line(((-0.55, -0.95), (-0.55, -0.1)), 0.09, pen.accent)


_ICONS: dict[str, Callable[[Pen], None]] = {
    "bleach jug": _bleach_jug,
    "ammonia spray": _ammonia_spray,
    "toilet gel": _toilet_gel,
    "drain opener": _drain_opener,
    "toaster": _toaster,
    "hair dryer": _hair_dryer,
    "lamp": _lamp,
    "bathtub": _bathtub,
    "bucket": _bucket,
    "sink": _sink,
    "candle": _candle,
    "match": _match,
    "lighter": _lighter,
    "petrol can": _petrol_can,
    "gas bottle": _gas_bottle,
    "deodorant": _deodorant,
    "rat poison": _rat_poison,
    "toadstool": _toadstool,
    "apple": _apple,
    "banana": _banana,
    "ice cream": _ice_cream,
    "fork": _fork,
    "key": _key,
    "book": _book,
    "umbrella": _umbrella,
    "chair": _chair,
}
ICON_NAMES = tuple(_ICONS)


@lru_cache(maxsize=4)
def _ramps(size: int) -> tuple[Image.Image, ...]:
    """Gray ramps (L pictures, `size` pixels a side) in four directions for gradients."""
    ramp = Image.linear_gradient("L").resize((size, size))
    return tuple(ramp.rotate(angle) for angle in (0, 90, 180, 270))


def draw_scene(name: str, rng: np.random.Generator, size: int = 112) -> Image.Image:
    """Draw the named object once, with random colours, place, scale and tilt.

    Returns an RGB picture of size x size pixels; the object fills about 55 to 85 % of it.
    """
    pixels = size * _OVERSAMPLE
    dice = rng.random(8).tolist()
    back, faint, main, accent = _COLOURS[int(dice[0] * len(_COLOURS))]
    picture = Image.new("RGB", (pixels, pixels), back)
    draw = ImageDraw.Draw(picture)
    if dice[1] < 0.35:
        picture.paste(faint, mask=_ramps(pixels)[int(dice[2] * 4)])
    elif dice[1] < 0.6:
        step = pixels / (2 + int(dice[2] * 4))
        for stripe in np.arange(step * dice[3], pixels, step).tolist():
            ends = (
                ((stripe, 0), (stripe, pixels))
                if dice[7] < 0.5
                else ((0, stripe), (pixels, stripe))
            )
            draw.line(ends, fill=faint, width=pixels // 16)
    half = pixels * (0.55 + 0.30 * dice[4]) / 2
    room = pixels - 2 * half
    centre = complex(half + room * dice[5], half + room * dice[6])
    tilt = float(np.radians(rng.uniform(-12, 12)))
    turn = half * complex(np.cos(tilt), np.sin(tilt))
    _ICONS[name](Pen(draw, centre, turn, main, accent, back))
    return picture.reduce(_OVERSAMPLE)
