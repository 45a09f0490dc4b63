"""How a synthetic pedestrian looks: the wardrobe that everybody shares, and the drawing of one person.

A figure is drawn in units of the person's height: y runs from 0 (crown) to 1 (soles), x from the body's axis,
positive to where the person faces in a side view. Everything goes through a :class:`Pen`, which draws the picture and
the mask of the person alike, so that the mask is exact.
"""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

# fmt: off
CLOTH: dict[str, Colour] = {
    "black": (30, 30, 34), "grey": (122, 124, 128), "white": (230, 230, 226), "navy": (34, 44, 92),
    "blue": (48, 98, 190), "sky": (128, 180, 220), "red": (190, 38, 44), "maroon": (104, 28, 44),
    "green": (44, 122, 70), "olive": (106, 108, 58), "yellow": (224, 190, 58), "orange": (224, 116, 40),
    "pink": (224, 142, 168), "purple": (106, 66, 146), "khaki": (176, 156, 116), "brown": (100, 72, 50),
    "denim": (76, 104, 148),
}
SKIN: dict[str, Colour] = {
    "pale": (240, 206, 182), "fair": (224, 180, 148), "tan": (190, 140, 104), "brown": (138, 94, 66),
    "dark": (86, 58, 44),
}
HAIR: dict[str, Colour] = {
    "black": (26, 24, 24), "brown": (82, 54, 34), "blond": (206, 170, 100), "grey": (164, 164, 164),
    "red": (146, 66, 30),
}
UPPER = ("black", "grey", "white", "navy", "blue", "sky", "red", "maroon", "green", "olive", "yellow", "orange", "pink",
         "purple")
LOWER = ("black", "grey", "navy", "denim", "khaki", "brown", "white", "olive", "maroon", "blue")
BAGS = ("black", "red", "blue", "brown", "green", "yellow", "grey")
# fmt: on
VIEWS = ("front", "back", "left", "right")
BUILD = {"slim": 0.88, "medium": 1.0, "heavy": 1.2}
STATURE = {"short": 0.8, "medium": 0.87, "tall": 0.94}  # of the picture's height


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """An identity: every field is a word from a small shared palette and an attribute in the index."""

    upper_colour: str
    upper_pattern: str
    upper_second: str
    sleeve: str
    lower_colour: str
    lower_kind: str
    shoes: str
    skin: str
    hair: str
    hair_length: str
    hat: str
    hat_colour: str
    bag: str
    bag_colour: str
    build: str
    stature: str


def draw_person(rng: np.random.Generator) -> Person:
    """A random identity. Dark and plain clothes are commoner, as in the street, so people resemble each other."""

    def pick(words: Sequence[str], *weights: float) -> str:
        # The weights of the first words, 1 for the others. Not rng.choice: it dressed people slower than they're drawn.
        heap = list(accumulate([*weights, *[1.0] * (len(words) - len(weights))]))
        return words[bisect(heap, rng.random() * heap[-1])]

    upper = pick(UPPER, 4, 2.5, 2.5, 2)
    pattern = pick(("plain", "stripes", "check", "block", "open"), 2.5)
    second = pick([c for c in UPPER if c != upper], 2, 2)
    hat = pick(("none", "cap", "beanie"), 5)
    bag = pick(("none", "backpack", "handbag"), 2, 1.5)
    hat_colour, bag_colour = pick(UPPER), pick(BAGS, 2.5)
    return Person(
        upper_colour=upper,
        upper_pattern=pattern,
        upper_second="none" if pattern == "plain" else second,
        sleeve=pick(("long", "short"), 1.3),
        lower_colour=pick(LOWER, 4, 1.5, 2, 2.5),
        lower_kind=pick(("trousers", "shorts", "skirt"), 3),
        shoes=pick(("black", "white", "brown", "red"), 2, 1.5),
        skin=pick(tuple(SKIN)),
        hair=pick(tuple(HAIR), 2, 2),
        hair_length=pick(("short", "long", "bald"), 5, 4),
        hat=hat,
        hat_colour="none" if hat == "none" else hat_colour,
        bag=bag,
        bag_colour="none" if bag == "none" else bag_colour,
        build=pick(tuple(BUILD), 1, 2),
        stature=pick(tuple(STATURE), 1, 2),
    )


def shade(colour: Colour, factor: float) -> Colour:
    """The colour, lighter or darker."""
    return tuple(min(255, int(c * factor)) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws shapes, given in units of the person's height, into a picture and into the person's mask."""

    def __init__(self, picture: Image.Image, mask: Image.Image, *, top: Point, height: float, mirrored: bool):
        self.picture, self.mask = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
        self.x, self.y = top
        self.height = height
        self.side = -height if mirrored else height

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        place = [(self.x + x * self.side, self.y + y * self.height) for x, y in points]
        self.picture.polygon(place, fill=colour)
        self.mask.polygon(place, fill=255)

    def ellipse(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        x, y = self.x + centre[0] * self.side, self.y + centre[1] * self.height
        rx, ry = rx * self.height, ry * self.height
        box = (x - rx, y - ry, x + rx, y + ry)
        self.picture.ellipse(box, fill=colour)
        self.mask.ellipse(box, fill=255)

    def limb(self, points: Sequence[Point], widths: Sequence[float], colour: Colour) -> None:
        """A tapering limb through ``points``, as thick as ``widths`` there, with round ends."""
        for (a, b), (wa, wb) in zip(pairwise(points), pairwise(widths), strict=True):
            length = math.hypot(b[0] - a[0], b[1] - a[1])
            nx, ny = (a[1] - b[1]) / length / 2, (b[0] - a[0]) / length / 2
            self.polygon(
                [(a[0] + nx * wa, a[1] + ny * wa), (b[0] + nx * wb, b[1] + ny * wb),
                 (b[0] - nx * wb, b[1] - ny * wb), (a[0] - nx * wa, a[1] - ny * wa)], colour,
            )  # fmt: skip
        for point, width in zip(points, widths, strict=True):
            self.ellipse(point, width / 2, width / 2, colour)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """One picture's view of a person and their step: ``stride`` and ``swing`` (arms) in -1..1."""

    view: str
    stride: float
    swing: float


def draw_figure(pen: Pen, person: Person, pose: Pose) -> None:
    """Draw the whole person, from the far side to the near one."""
    side = pose.view in ("left", "right")
    bulk = BUILD[person.build]
    shoulder, hip = (0.068 * bulk, 0.066 * bulk) if side else (0.118 * bulk, 0.088 * bulk)
    skin = SKIN[person.skin]
    bag = CLOTH.get(person.bag_colour)
    if person.hair_length == "long" and pose.view == "front":
        pen.polygon([(-0.06, 0.06), (0.06, 0.06), (0.075, 0.22), (-0.075, 0.22)], shade(HAIR[person.hair], 0.85))
    if side:
        _arm(pen, person, pose, 0.0, -pose.swing, 0.72, bulk)
        if person.bag == "backpack" and bag:
            pen.ellipse((-shoulder - 0.035, 0.3), 0.07, 0.115, bag)
    _legs(pen, person, pose, hip, bulk, side)
    _torso(pen, person, pose, shoulder, hip)
    if person.bag == "backpack" and bag and pose.view == "front":
        for x in (-0.55, 0.55):
            pen.limb([(x * shoulder, 0.165), (x * shoulder * 1.1, 0.36)], (0.026, 0.026), shade(bag, 0.85))
    if side:
        _arm(pen, person, pose, 0.0, pose.swing, 0.9, bulk)
    else:
        for x in (-1.0, 1.0):
            _arm(pen, person, pose, x * (shoulder - 0.005), x * pose.swing, 0.9, bulk)
    if person.bag == "backpack" and bag and pose.view == "back":
        x = shoulder * 0.78
        pen.polygon([(-x, 0.2), (-x * 0.6, 0.17), (x * 0.6, 0.17), (x, 0.2), (x, 0.42), (-x, 0.42)], bag)
        pen.polygon([(-x * 0.7, 0.31), (x * 0.7, 0.31), (x * 0.7, 0.4), (-x * 0.7, 0.4)], shade(bag, 0.72))
    if person.bag == "handbag" and bag:
        # Always at the person's right hand: seen on the left of a front view, and hidden by them from their left.
        place = {"front": -hip - 0.05, "back": hip + 0.05, "right": 0.0}
        if (at := place.get(pose.view)) is not None:
            pen.limb([(at * 0.9, 0.18), (at, 0.44)], (0.014, 0.014), shade(bag, 0.7))
            pen.polygon([(at - 0.055, 0.43), (at + 0.055, 0.43), (at + 0.065, 0.55), (at - 0.065, 0.55)], bag)
    pen.limb([(0, 0.12), (0, 0.16)], (0.055, 0.06), shade(skin, 0.82))
    _head(pen, person, pose, side)


def _arm(pen: Pen, person: Person, pose: Pose, x: float, swing: float, light: float, bulk: float) -> None:
    cloth, skin = shade(CLOTH[person.upper_colour], light), shade(SKIN[person.skin], light + 0.06)
    if pose.view in ("left", "right"):
        elbow, hand = (0.1 * swing, 0.33), (0.17 * swing + 0.04, 0.46)
    else:
        out = math.copysign(0.022 + 0.012 * abs(swing), x)
        elbow, hand = (x + out, 0.335), (x + out * 0.9, 0.475 - 0.03 * max(swing, 0.0))
    widths = (0.062 * bulk, 0.052 * bulk, 0.042 * bulk)
    pen.ellipse(hand, 0.024, 0.026, skin)
    pen.limb([elbow, hand], widths[1:], cloth if person.sleeve == "long" else skin)
    pen.limb([(x * 0.9, 0.202), elbow], widths[:2], cloth)


def _legs(pen: Pen, person: Person, pose: Pose, hip: float, bulk: float, side: bool) -> None:
    cloth, skin, shoe = CLOTH[person.lower_colour], SKIN[person.skin], CLOTH[person.shoes]
    skirt = person.lower_kind == "skirt"
    for leg, light in ((-1.0, 0.78), (1.0, 1.0)):
        step = leg * pose.stride
        if side:
            start, knee = (0.0, 0.52), (0.1 * step + 0.015, 0.735)
            ankle = (0.17 * step - 0.035 * (step < 0), 0.955 - 0.04 * (step < 0) * abs(step))
        else:
            start = (leg * hip * 0.5, 0.52)
            lift = 0.045 * max(step, 0.0)
            knee, ankle = (leg * hip * 0.52, 0.735 - lift / 2), (leg * hip * 0.5, 0.955 - lift)
            light = 1.0 - 0.12 * (leg < 0)
        toe = 0.055 if side else 0.008 * leg
        widths = (0.088 * bulk, 0.068 * bulk, 0.05 * bulk)
        below = cloth if person.lower_kind == "trousers" else skin
        pen.limb([knee, ankle], widths[1:], shade(below, light))
        pen.limb([(ankle[0], ankle[1] + 0.012), (ankle[0] + toe, ankle[1] + 0.018)], (0.046, 0.036), shade(shoe, light))
        pen.limb([start, knee], widths[:2], shade(skin if skirt else cloth, light))
    pen.polygon([(-hip, 0.46), (hip, 0.46), (hip * 1.02, 0.56), (-hip * 1.02, 0.56)], cloth)
    if skirt:
        flare = hip * 1.45 + 0.04 * abs(pose.stride) * side
        pen.polygon([(-hip, 0.48), (hip, 0.48), (flare, 0.71), (-flare, 0.71)], cloth)
        pen.polygon(
            [(-hip * 0.1, 0.5), (hip * 0.1, 0.5), (flare * 0.3, 0.71), (-flare * 0.1, 0.71)], shade(cloth, 0.84)
        )


def _torso(pen: Pen, person: Person, pose: Pose, shoulder: float, hip: float) -> None:
    upper, top, bottom = CLOTH[person.upper_colour], 0.185, 0.52
    second = CLOTH.get(person.upper_second, upper)
    half = [(shoulder * 0.45, 0.148), (shoulder * 0.85, 0.166), (shoulder, top + 0.01), (hip, bottom)]
    pen.polygon([*half, *((-x, y) for x, y in reversed(half))], upper)

    def patch(left: float, right: float, start: float, end: float, colour: Colour) -> None:
        """A piece of the torso: left and right in -1..1 of its half width, start and end in 0..1 from top to bottom."""
        corners = [(left, start), (right, start), (right, end), (left, end)]
        pen.polygon([(x * (shoulder + (hip - shoulder) * t), top + (bottom - top) * t) for x, t in corners], colour)

    if person.upper_pattern == "stripes":
        for start in (0.06, 0.32, 0.58, 0.84):
            patch(-1, 1, start, start + 0.13, second)
    elif person.upper_pattern == "check":
        for row in range(5):
            for column in range(row % 2, 4, 2):
                patch(column / 2 - 1, column / 2 - 0.5, row / 5, (row + 1) / 5, second)
    elif person.upper_pattern == "block":
        patch(-1, 1, 0.5, 1, second)
    elif person.upper_pattern == "open" and pose.view != "back":
        # An open jacket shows the shirt under it from the front, and a little of it from the side.
        left, right = (-0.36, 0.36) if pose.view == "front" else (0.45, 1.0)
        patch(left, right, -0.08, 1, second)
    if pose.view != "front":
        # A seam along the spine, the shaded back from the side.
        left, right = (-0.06, 0.06) if pose.view == "back" else (-1.0, -0.5)
        patch(left, right, 0.05, 1, shade(upper, 0.84))


def _head(pen: Pen, person: Person, pose: Pose, side: bool) -> None:
    skin, hair = SKIN[person.skin], HAIR[person.hair]
    centre = (0.012, 0.073) if side else (0.0, 0.073)
    pen.ellipse(centre, 0.05, 0.066, skin)
    if person.hair_length != "bald":
        if pose.view == "back":
            pen.ellipse(centre, 0.053, 0.066, hair)
        elif side:
            pen.ellipse((centre[0] - 0.018, 0.06), 0.046, 0.058, hair)
        else:
            pen.ellipse((0, 0.036), 0.052, 0.034, hair)
        if person.hair_length == "long" and pose.view == "back":
            pen.polygon([(-0.054, 0.07), (0.054, 0.07), (0.066, 0.235), (-0.066, 0.235)], hair)
        elif person.hair_length == "long" and side:
            pen.polygon([(-0.052, 0.06), (0.0, 0.07), (-0.012, 0.2), (-0.075, 0.225)], hair)
        elif person.hair_length == "long":
            for x in (-1.0, 1.0):
                pen.polygon([(x * 0.054, 0.04), (x * 0.034, 0.05), (x * 0.038, 0.17), (x * 0.066, 0.2)], hair)
    if pose.view == "front":
        for x in (-0.019, 0.019):
            pen.ellipse((x, 0.075), 0.006, 0.005, (30, 26, 26))
    if person.hat != "none":
        colour = CLOTH[person.hat_colour]
        rim = 0.062 if person.hat == "beanie" else 0.05
        pen.polygon(
            [(-0.054, rim), (-0.05, 0.02), (-0.025, -0.004), (0.025, -0.004), (0.05, 0.02), (0.054, rim)], colour
        )
        if person.hat == "beanie":
            pen.polygon([(-0.056, 0.045), (0.056, 0.045), (0.056, 0.064), (-0.056, 0.064)], shade(colour, 0.75))
        elif pose.view != "back":
            reach = (0.03, 0.11) if side else (-0.056, 0.056)
            pen.polygon(
                [(reach[0], 0.046), (reach[1], 0.05), (reach[1], 0.062), (reach[0], 0.062)], shade(colour, 0.75)
            )
