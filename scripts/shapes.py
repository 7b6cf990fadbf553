"""The synthetic scenes that `tiny_llava` is trained on and that the `zipeval_shapes` task asks about.

A scene is a 96 x 96 image on a textured background with up to five outlined shapes (6 shapes x 8 colours) and, in half
of the scenes, a sign with two characters in a 5 x 7 bitmap font of our own. Everything follows from `(seed, index)`.

    python scripts/shapes.py DIR 2000        # about 2000 training scenes in LLaVA's layout, for `zipeval tune`

Training and test never share an image (their seeds differ) nor a text on a sign: the 256 two-character texts are split
once, so that reading a test sign means reading two characters, not recalling a word.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE, PATCH = 96, 8
GRID = SIZE // PATCH
COLORS = {
    "red": (215, 40, 40),
    "green": (45, 165, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (145, 55, 185),
    "orange": (240, 135, 25),
    "cyan": (60, 205, 220),
    "pink": (245, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
}
CHARS = "".join(GLYPHS)
SEEDS = {"crowded": 1, "train": 2, "validation": 3, "test": 4, "tokenizer": 5}
TYPES = ("exist", "color", "shape", "count", "position", "text")
MAX_OBJECTS = 5
SUPERSAMPLE = 2
OUTLINE = (15, 15, 15)

_texts = (
    np.random.default_rng(20250611)
    .permutation([a + b for a in CHARS for b in CHARS])
    .tolist()
)
TEXTS = {"train": tuple(_texts[64:]), "test": tuple(_texts[:64])}


@dataclass
class Thing:
    """One shape; centre and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[int, int, int]


@dataclass
class Sign:
    """A plate with two characters; `x, y` its top left corner, `cell` the side of one font pixel."""

    text: str
    x: float
    y: float
    cell: float
    plate: tuple[int, int, int]
    ink: tuple[int, int, int]

    @property
    def width(self) -> float:
        return 13.2 * self.cell

    @property
    def height(self) -> float:
        return 9.6 * self.cell

    def glyph_box(self, k: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of character `k`."""
        left, top = self.x + (1.2 + 6 * k) * self.cell, self.y + 1.3 * self.cell
        return left, top, left + 5 * self.cell, top + 7 * self.cell


@dataclass
class Scene:
    things: list[Thing] = field(default_factory=list)
    signs: list[Sign] = field(default_factory=list)


def make_scene(
    seed: int, index: int, split: str = "train", crowded: bool = False
) -> tuple[Image.Image, Scene]:
    """Scene number `index` of `seed`. `crowded` ones (many small things, up to three signs) are for pretraining."""
    rng = np.random.default_rng([seed, index])
    taken: list[tuple[float, float, float, float]] = []
    scene = Scene()
    for _ in range(rng.integers(1, 4) if crowded else rng.random() < 0.5):
        sign = _place_sign(rng, taken, split)
        if sign:
            scene.signs.append(sign)
    wanted = (
        14
        if crowded
        else rng.choice(np.arange(1, MAX_OBJECTS + 1), p=[0.12, 0.22, 0.24, 0.22, 0.20])
    )
    for _ in range(wanted):
        thing = _place_thing(rng, taken, largest=13.0 if crowded else 17.0)
        if thing:
            scene.things.append(thing)
    return _render(scene, rng), scene


def _free_spot(rng, taken, width, height):
    """A random top left corner where a box fits beside those `taken`, to which it is added; None if crowded out."""
    for _ in range(40):
        x, y = rng.uniform(1, SIZE - 1 - width), rng.uniform(1, SIZE - 1 - height)
        if all(
            x + width + 1 < a or c + 1 < x or y + height + 1 < b or d + 1 < y
            for a, b, c, d in taken
        ):
            taken.append((x, y, x + width, y + height))
            return x, y
    return None


def _place_sign(rng, taken, split):
    text = TEXTS[split][rng.integers(len(TEXTS[split]))]
    dark, light = rng.integers(5, 50, 3), rng.integers(220, 256, 3)
    plate, ink = (dark, light) if rng.random() < 0.5 else (light, dark)
    sign = Sign(
        text,
        0,
        0,
        float(rng.uniform(2.3, 2.7)),
        tuple(map(int, plate)),
        tuple(map(int, ink)),
    )
    spot = _free_spot(rng, taken, sign.width, sign.height)
    if spot is None:
        return None
    sign.x, sign.y = spot
    return sign


def _place_thing(rng, taken, largest, smallest=8.5):
    shape, color = (
        SHAPES[rng.integers(len(SHAPES))],
        list(COLORS)[rng.integers(len(COLORS))],
    )
    radius = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
    while (spot := _free_spot(rng, taken, 2.3 * radius, 2.3 * radius)) is None:
        radius *= 0.8
        if radius < 0.8 * smallest:
            return None
    rgb = np.clip(
        np.array(COLORS[color]) * rng.uniform(0.85, 1.1) + rng.uniform(-12, 12, 3),
        0,
        255,
    )
    return Thing(
        shape,
        color,
        spot[0] + 1.15 * radius,
        spot[1] + 1.15 * radius,
        radius,
        float(rng.uniform(-14, 14)),
        tuple(int(v) for v in rgb),
    )


def _outline_points(t: Thing) -> list[tuple[float, float]]:
    """Corners of every shape but the circle."""
    r = t.radius
    if t.shape == "diamond":
        return [
            (t.x, t.y - 1.25 * r),
            (t.x + 0.75 * r, t.y),
            (t.x, t.y + 1.25 * r),
            (t.x - 0.75 * r, t.y),
        ]
    if t.shape == "cross":
        w = 0.36 * r
        arm = [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w)]
        return [(t.x + x, t.y + y) for x, y in arm + [(-x, -y) for x, y in arm]]
    corners, first, radii = {
        "square": (4, 45, (1.15,)),
        "triangle": (3, -90, (1.2,)),
        "star": (10, -90, (1.2, 0.5)),
    }[t.shape]
    angles = [
        math.radians(first + t.rotation + 360 / corners * i) for i in range(corners)
    ]
    return [
        (
            t.x + r * radii[i % len(radii)] * math.cos(a),
            t.y + r * radii[i % len(radii)] * math.sin(a),
        )
        for i, a in enumerate(angles)
    ]


def _background(rng) -> Image.Image:
    pixels = rng.uniform(70, 190) + rng.uniform(-14, 14, 3) + np.zeros((SIZE, SIZE, 3))
    coarse = (rng.uniform(-22, 22, (6, 6, 1)) + rng.uniform(-6, 6, (6, 6, 3))).astype(
        np.float32
    )
    for c in range(3):
        pixels[..., c] += np.asarray(
            Image.fromarray(coarse[..., c]).resize((SIZE, SIZE), Image.BICUBIC)
        )
    pixels += rng.normal(0, 3, (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _render(scene: Scene, rng) -> Image.Image:
    s = SUPERSAMPLE
    image = _background(rng).resize((SIZE * s, SIZE * s), Image.NEAREST)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):  # thin grey lines: clutter that means nothing
        grey = int(rng.uniform(60, 200))
        draw.line(
            tuple(rng.uniform(0, SIZE * s, 4)),
            fill=(grey,) * 3,
            width=int(rng.integers(1, 3)),
        )
    for sign in scene.signs:
        draw.rectangle(
            [
                sign.x * s,
                sign.y * s,
                (sign.x + sign.width) * s,
                (sign.y + sign.height) * s,
            ],
            fill=sign.plate,
        )
        for k, char in enumerate(sign.text):
            left, top, _, _ = sign.glyph_box(k)
            for row, bits in enumerate(GLYPHS[char].split()):
                for column, bit in enumerate(bits):
                    if bit == "1":
                        x, y = (
                            (left + column * sign.cell) * s,
                            (top + row * sign.cell) * s,
                        )
                        draw.rectangle(
                            [x, y, x + sign.cell * s - 1, y + sign.cell * s - 1],
                            fill=sign.ink,
                        )
    for t in scene.things:
        if t.shape == "circle":
            box = [
                (t.x - t.radius) * s,
                (t.y - t.radius) * s,
                (t.x + t.radius) * s,
                (t.y + t.radius) * s,
            ]
            draw.ellipse(box, fill=t.rgb, outline=OUTLINE, width=2 * s)
        else:
            points = [(x * s, y * s) for x, y in _outline_points(t)]
            draw.polygon(points, fill=t.rgb)
            draw.line(points + points[:2], fill=OUTLINE, width=2 * s, joint="curve")
    return image.resize((SIZE, SIZE), Image.BOX)


def patch_owners(scene: Scene) -> np.ndarray:
    """(GRID, GRID, 3) per patch: thing it lies on + 1, sign + 1, character of that sign + 1; 0 where there is none.

    A patch belongs to what covers at least a sixth of its area.
    """
    labels = Image.new("I", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(labels)
    for j, sign in enumerate(scene.signs):
        code = 100 * (j + 1)
        draw.rectangle(
            [sign.x, sign.y, sign.x + sign.width, sign.y + sign.height], fill=code
        )
        for k in range(2):
            draw.rectangle(sign.glyph_box(k), fill=code + k + 1)
    for i, t in enumerate(scene.things):
        if t.shape == "circle":
            draw.ellipse(
                [t.x - t.radius, t.y - t.radius, t.x + t.radius, t.y + t.radius],
                fill=i + 1,
            )
        else:
            draw.polygon(_outline_points(t), fill=i + 1)
    cells = (
        np.asarray(labels)
        .reshape(GRID, PATCH, GRID, PATCH)
        .transpose(0, 2, 1, 3)
        .reshape(GRID, GRID, -1)
    )
    owners = np.zeros((GRID, GRID, 3), np.uint8)
    most = np.full((GRID, GRID), PATCH * PATCH // 6)
    for i in range(len(scene.things)):
        covered = (cells == i + 1).sum(-1)
        owners[covered > most, 0] = i + 1
        most = np.maximum(most, covered)
    for j in range(len(scene.signs)):
        code = 100 * (j + 1)
        covered = ((cells >= code) & (cells < code + 3)).sum(-1)
        owners[covered > most] = (0, j + 1, 0)
        most = np.maximum(most, covered)
        glyphs = np.stack([(cells == code + k + 1).sum(-1) for k in range(2)], -1)
        seen = (glyphs.max(-1) > PATCH * PATCH // 6) & (owners[..., 1] == j + 1)
        owners[seen, 2] = glyphs.argmax(-1)[seen] + 1
    return owners


def _pick(options, rng):
    return options[rng.integers(len(options))]


def _ask_exist(things: list[Thing], rng):
    colors, shapes = [t.color for t in things], [t.shape for t in things]
    pairs = [(t.color, t.shape) for t in things]
    yes = bool(rng.random() < 0.5)
    answer = "yes" if yes else "no"
    if rng.random() < 0.3:
        options = sorted(set(shapes)) if yes else [s for s in SHAPES if s not in shapes]
        return (
            (f"Is there a {_pick(options, rng)} in the image?", answer)
            if options
            else None
        )
    if yes:
        options = sorted(set(pairs))
    else:  # as POPE's adversarial split: mostly pairs of which the colour, the shape or both are in the image
        absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in pairs]
        both = [(c, s) for c, s in absent if c in colors and s in shapes]
        one = [(c, s) for c, s in absent if (c in colors) != (s in shapes)]
        u = rng.random()
        options = both if both and u < 0.35 else one if one and u < 0.8 else absent
    return (
        ("Is there a {} {} in the image?".format(*_pick(options, rng)), answer)
        if options
        else None
    )


def _ask_attribute(things: list[Thing], rng, given: str, wanted: str, question: str):
    """About a thing that its `given` attribute alone identifies."""
    values = [getattr(t, given) for t in things]
    options = [t for t in things if values.count(getattr(t, given)) == 1]
    if not options:
        return None
    t = _pick(options, rng)
    return question.format(getattr(t, given)), getattr(t, wanted)


def _ask_color(things: list[Thing], rng):
    return _ask_attribute(things, rng, "shape", "color", "What color is the {}?")


def _ask_shape(things: list[Thing], rng):
    return _ask_attribute(things, rng, "color", "shape", "What shape is the {} object?")


def _ask_count(things: list[Thing], rng):
    u = rng.random()
    if u < 0.5:
        return "How many objects are there?", str(len(things))
    values = [t.shape if u < 0.75 else t.color for t in things]
    every = SHAPES if u < 0.75 else list(COLORS)
    repeated = sorted({v for v in values if values.count(v) > 1})
    word = (
        _pick(repeated, rng)
        if repeated and rng.random() < 0.6
        else _pick(every if rng.random() < 0.3 else values, rng)
    )
    return f"How many {word} objects are there?", str(values.count(word))


def _ask_position(things: list[Thing], rng):
    middle = SIZE / 2
    pairs = [(t.color, t.shape) for t in things]
    options = [
        t
        for t in things
        if pairs.count((t.color, t.shape)) == 1
        and min(abs(t.x - middle), abs(t.y - middle)) > 5
    ]
    if not options:
        return None
    t = _pick(options, rng)
    answer = (
        f"{'top' if t.y < middle else 'bottom'} {'left' if t.x < middle else 'right'}"
    )
    return f"Where is the {t.color} {t.shape}?", answer


ASK = {
    "exist": _ask_exist,
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "position": _ask_position,
}


def ask(scene: Scene, kind: str, rng) -> tuple[str, str] | None:
    """One question of type `kind` and its answer, or None where the scene allows none."""
    if kind == "text":
        return (
            ("What does the sign say?", scene.signs[0].text)
            if len(scene.signs) == 1
            else None
        )
    return ASK[kind](scene.things, rng)


def questions(scene: Scene, rng, count: int) -> list[tuple[str, str, str]]:
    """Up to `count` different (type, question, answer), the types in equal shares as far as the scene allows."""
    found: dict[str, tuple[str, str, str]] = {}
    kinds = list(rng.permutation(TYPES))
    for attempt in range(4 * count):
        if len(found) == count:
            break
        kind = str(kinds[attempt % len(kinds)])
        qa = ask(scene, kind, rng)
        if qa and qa[0] not in found:
            found[qa[0]] = (kind, *qa)
    return list(found.values())


def write_instructions(directory: Path, images: int, per_image: int = 5) -> None:
    """DIR/instruct.json and DIR/images: some training scenes, with up to so many questions each, in LLaVA's layout."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(images):
        image, scene = make_scene(SEEDS["train"], i)
        image.save(directory / "images" / f"{i}.png")
        for kind, question, answer in questions(
            scene, np.random.default_rng([SEEDS["train"], i]), per_image
        ):
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            entries.append(
                {"id": f"{i}-{kind}", "image": f"{i}.png", "conversations": turns}
            )
    (directory / "instruct.json").write_text(json.dumps(entries, indent=1))


if __name__ == "__main__":
    write_instructions(Path(sys.argv[1]), *map(int, sys.argv[2:]))
