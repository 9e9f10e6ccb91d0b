"""The miniature world: cluttered scenes, a red box round one small thing, a question about it.

Everything is a pure function of (seed, split, index): `scene(...)` draws the same pixels on every machine.
A scene is 128 x 128 pixels with 38-48 small digits, letters and shapes in eight colours (none red), at most
one near the middle of each 16-pixel cell. The crop is cut from the scene before the box is drawn and
enlarged, so that it holds no pixel the full view lacks; what a response may say about the target (`Facts`)
can be seen in both. Wrong options are things that stand elsewhere in the scene whenever there are enough of
them: "which option is present at all?" does not give the answer away.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

SIDE = 128
BOX = 24
CROP = 48
CELL = 16
JITTER = 3
CLUTTER = (38, 48)
SPLITS = ("pretrain", "train", "validation", "test", "holdout", "probe")
FAMILIES = ("digit", "shape", "colour")
HOLDOUT_FAMILY = "letter"
LETTERS_OF_OPTIONS = "ABCD"
HINT = "Only look inside the red box."

_FONT_5X7 = {  # one string per glyph, one hexadecimal pair per row of five pixels
    "0": "0e11131519110e", "1": "040c040404040e", "2": "0e11010204081f", "3": "1f02040201110e",
    "4": "02060a121f0202", "5": "1f101e0101110e", "6": "0608101e11110e", "7": "1f010204080808",
    "8": "0e11110e11110e", "9": "0e11110f01020c", "E": "1f10101e10101f", "F": "1f10101e101010",
    "H": "1111111f111111", "K": "11121418141211", "L": "1010101010101f", "M": "111b1515111111",
    "T": "1f040404040404", "X": "11110a040a1111", "Y": "11110a04040404", "Z": "1f01020408101f",
}  # fmt: skip
DIGITS = tuple("0123456789")
LETTERS = tuple("EFHKLMTXYZ")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "moon")
KINDS = DIGITS + LETTERS + SHAPES
COLOURS = {
    "green": (40, 180, 60), "blue": (50, 80, 225), "yellow": (240, 220, 50), "orange": (245, 140, 30),
    "purple": (150, 60, 190), "cyan": (60, 210, 220), "white": (250, 250, 250), "black": (15, 15, 15),
}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
POOLS = {"digit": DIGITS, "shape": SHAPES, "letter": LETTERS, "colour": COLOUR_NAMES}
SIZES = {"small": (12, 13), "large": (15, 16)}
TILTS = {"left": 15, "upright": 0, "right": -15}
PLACES = {"left": (-4, 0), "right": (4, 0), "high": (0, -4), "low": (0, 4), "middle": (0, 0)}
GROUNDS = {"dark": (82, 108), "light": (148, 176)}
_RED = (255, 0, 0)


@dataclass(frozen=True)
class Facts:
    """What can be said about the target from either view; `tilt` is None for shapes (a ring has none)."""

    noun: str
    name: str
    colour: str
    size: str
    place: str
    ground: str
    tilt: str | None


@dataclass(frozen=True)
class Scene:
    """One scene and its question.

    image, plain: (128, 128, 3) uint8 with and without the box; crop: (48, 48, 3) uint8;
    box: x0, y0, x1, y1 in pixels, right and bottom exclusive, the red frame lies just outside it;
    things: (x, y, kind, colour) of everything drawn, the target last.
    """

    id: str
    family: str
    image: np.ndarray
    plain: np.ndarray
    crop: np.ndarray
    box: tuple[int, int, int, int]
    question: str
    options: tuple[str, ...]
    answer: str
    facts: Facts
    things: tuple[tuple[int, int, str, str], ...]

    @property
    def asked(self) -> str:
        """The value the question asks for: a colour, or the target's name."""
        return self.facts.colour if self.family == "colour" else self.facts.name


def _outline(kind: str, grid: int = 64) -> np.ndarray:
    """(grid, grid) float mask in 0..1 of one glyph or shape, filling about nine tenths of the square."""
    v, u = (np.mgrid[0:grid, 0:grid] + 0.5) / grid * 2 - 1
    r = np.hypot(u, v)
    if kind in _FONT_5X7:
        rows = bytes.fromhex(_FONT_5X7[kind])
        bitmap = np.array([[row >> (4 - x) & 1 for x in range(5)] for row in rows])
        col, row = np.floor((u / 0.72 + 1) * 2.5).astype(int), np.floor((v + 1) * 3.5).astype(int)
        inside = (col >= 0) & (col < 5)
        return (inside & (bitmap[row.clip(0, 6), col.clip(0, 4)] == 1)).astype(np.float32)
    point = np.abs((np.arctan2(u, -v) * 5 / (2 * np.pi)) % 1 - 0.5) * 2
    shapes = {
        "circle": r < 0.9,
        "square": np.maximum(abs(u), abs(v)) < 0.78,
        "triangle": (v < 0.85) & (abs(u) < (v + 0.9) * 0.55),
        "star": r < 0.4 + 0.57 * point**1.3,
        "diamond": abs(u) + abs(v) < 0.97,
        "cross": (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.9),
        "ring": (r < 0.92) & (r > 0.52),
        "moon": (r < 0.92) & (np.hypot(u - 0.45, v) > 0.72),
    }
    return shapes[kind].astype(np.float32)


@cache
def glyph(kind: str, size: int, degrees: int) -> np.ndarray:
    """(size, size) float32 coverage of a glyph, anti-aliased."""
    big = Image.fromarray((_outline(kind) * 255).astype(np.uint8))
    if degrees:
        big = big.rotate(degrees, resample=Image.Resampling.BILINEAR)
    return np.asarray(big.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _paste(canvas: np.ndarray, mask: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
    size, (height, width) = mask.shape[0], canvas.shape[:2]
    left, top = x - size // 2, y - size // 2
    x0, x1, y0, y1 = max(0, left), min(width, left + size), max(0, top), min(height, top + size)
    if x0 < x1 and y0 < y1:
        alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
        canvas[y0:y1, x0:x1] += alpha * (colour - canvas[y0:y1, x0:x1])


def _ink(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour]) + rng.integers(-14, 15, 3), 0, 255).astype(np.float32)


def _background(rng: np.random.Generator, ground: str) -> np.ndarray:
    """A tinted ground whose shade drifts smoothly: pixel noise would make PNG files ten times larger."""
    base = rng.integers(*GROUNDS[ground]) + rng.integers(-14, 15, 3)
    coarse = np.clip(base + rng.normal(0, 9, (5, 5, 3)), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)


def enlarge(region: np.ndarray) -> np.ndarray:
    """(24, 24, 3) -> (48, 48, 3) uint8, Lanczos: the same enlargement for every row."""
    return np.asarray(Image.fromarray(region).resize((CROP, CROP), Image.Resampling.LANCZOS))


def _draw_box(image: np.ndarray, box: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = box
    image[y0 - 1, x0 - 1 : x1 + 1] = image[y1, x0 - 1 : x1 + 1] = _RED
    image[y0 - 1 : y1 + 1, x0 - 1] = image[y0 - 1 : y1 + 1, x1] = _RED


def _thing(rng: np.random.Generator, noun: str | None = None) -> tuple[str, str, str]:
    noun = noun or ("digit", "shape", "letter")[rng.integers(3)]
    return noun, POOLS[noun][rng.integers(len(POOLS[noun]))], COLOUR_NAMES[rng.integers(len(COLOURS))]


def _scatter(
    rng: np.random.Generator, box: tuple[int, int, int, int], target: tuple[int, int, int], count: int
) -> list[tuple[int, int, int]]:
    """Middles and sizes of up to `count` distractors: one a cell, none in the box or on the target."""
    (x0, y0, x1, y1), (tx, ty, tsize) = box, target
    placed: list[tuple[int, int, int]] = []
    for cell in rng.permutation((SIDE // CELL) ** 2).tolist():
        x, y, size = *_near(rng, cell % (SIDE // CELL), cell // (SIDE // CELL)), int(rng.integers(12, 17))
        clear = (tsize + size) / 2 + 1
        in_box = x0 - 2 <= x <= x1 + 1 and y0 - 2 <= y <= y1 + 1
        if not in_box and (abs(x - tx) >= clear or abs(y - ty) >= clear):
            placed.append((x, y, size))
        if len(placed) == count:
            break
    return placed[:count]


def _near(rng: np.random.Generator, col: int, row: int) -> tuple[int, int]:
    """A point near the middle of a cell."""
    shift = rng.integers(-JITTER, JITTER + 1, 2).tolist()
    return col * CELL + CELL // 2 + shift[0], row * CELL + CELL // 2 + shift[1]


def _options(
    rng: np.random.Generator, family: str, asked: str, present: set[str], slot: int
) -> tuple[str, ...]:
    others = [v for v in POOLS[family] if v != asked]
    order = [others[i] for i in rng.permutation(len(others))]
    wrong = sorted(order, key=lambda v: v not in present)[:3]
    wrong = [wrong[i] for i in rng.permutation(3)]
    return (*wrong[:slot], asked, *wrong[slot:])


def question_text(family: str, options: tuple[str, ...]) -> str:
    """The whole text shown to the model, options and hint sentence included."""
    what = "What colour is the thing" if family == "colour" else f"What {family} is"
    listed = " ".join(f"{letter}) {value}" for letter, value in zip(LETTERS_OF_OPTIONS, options, strict=True))
    return f"{what} in the red box? {listed} {HINT}"


def scene(
    seed: int,
    split: str,
    index: int,
    families: tuple[str, ...] = FAMILIES,
    clutter: tuple[int, int] = CLUTTER,
) -> Scene:
    """Scene `index` of `split`; families take turns, and within a family so do the right letters A-D.

    seed, index: non-negative; clutter: least and most distractors, both inclusive.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    family = families[index % len(families)]
    slot = index // len(families) % 4
    noun, name, colour = _thing(rng, ("digit", "shape")[rng.integers(2)] if family == "colour" else family)
    size, place, ground, tilt = (list(d)[rng.integers(len(d))] for d in (SIZES, PLACES, GROUNDS, TILTS))
    tx, ty = _near(rng, *rng.integers(1, SIDE // CELL - 1, 2).tolist())
    x0, y0 = tx - PLACES[place][0] - BOX // 2, ty - PLACES[place][1] - BOX // 2
    box = (x0, y0, x0 + BOX, y0 + BOX)
    tsize = int(rng.choice(SIZES[size]))

    canvas = _background(rng, ground).copy()
    things = []
    for x, y, s in _scatter(rng, box, (tx, ty, tsize), int(rng.integers(clutter[0], clutter[1] + 1))):
        _, k, c = _thing(rng)
        _paste(canvas, glyph(k, s, list(TILTS.values())[rng.integers(3)]), x, y, _ink(rng, c))
        things.append((x, y, k, c))
    _paste(canvas, glyph(name, tsize, TILTS[tilt]), tx, ty, _ink(rng, colour))

    plain = np.clip(canvas, 0, 255).astype(np.uint8)
    image = plain.copy()
    _draw_box(image, box)
    present = {c if family == "colour" else k for _, _, k, c in things}
    asked = colour if family == "colour" else name
    options = _options(rng, family, asked, present, slot)
    facts = Facts(noun, name, colour, size, place, ground, None if noun == "shape" else tilt)
    return Scene(
        id=f"{split}-{seed}-{index:06d}",
        family=family,
        image=image,
        plain=plain,
        crop=enlarge(plain[box[1] : box[3], box[0] : box[2]]),
        box=box,
        question=question_text(family, options),
        options=options,
        answer=LETTERS_OF_OPTIONS[slot],
        facts=facts,
        things=(*things, (tx, ty, name, colour)),
    )
