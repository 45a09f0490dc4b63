"""Built-in synthetic pedestrians: a small re-identification dataset that needs no download and shows nobody real.

People differ by clothes, hair, bags and build out of shared palettes; cameras by their scene, light, colour cast, blur
and noise; pictures by view, step, scale, place and what stands in front. So pictures of one person don't match as
pixels, their clothes do tell who it is, and a reconstruction can be judged on the person (masks) and on attributes.

    FOLDER/
        images/00001_c2_0.jpg      pid, camera, shot
        masks/00001_c2_0.png       255 where the person is visible
        index.csv                  path,pid,camid,split,mask and one column an attribute: the catalogue's csv kind
        synthetic.yaml             the settings it was rendered with
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ppreid_dist.data.pedestrian import STATURE, VIEWS, Colour, Pen, Person, Pose, draw_figure, draw_person, shade
from ppreid_dist.errors import ConfigError, DataError, TakenError
from ppreid_dist.files import atomic
from ppreid_dist.progress import progress_bar
from ppreid_dist.settings import Settings, load_settings, option, save_settings

_PERSON, _CAMERA, _PICTURE, _STRANGER = 11, 12, 13, 14  # tags of what is drawn from the seed
_SCENE = 3.0  # a camera's scene is so many pictures wide


@dataclass(kw_only=True)
class SyntheticConfig(Settings):
    """How many people of which split, seen by how many cameras, at which size."""

    train: int = option(160, "people to train on", at_least=2)
    unlabelled: int = option(1000, "strangers with one picture each", at_least=0)
    aux: int = option(160, "people of the attackers, whom the extractor never sees", at_least=0)
    test: int = option(60, "people of query and gallery", at_least=1)
    cameras: int = option(4, "cameras; each sees every person but the strangers", at_least=2)
    shots: int = option(3, "pictures of a person by a camera", at_least=2)
    queries: int = option(1, "of those of a tested person, the first so many are queries", at_least=1)
    height: int = option(64, "pixels", at_least=32, at_most=512)
    width: int = option(32, "pixels", at_least=16, at_most=512)
    seed: int = option(0, "everything is drawn from it", at_least=0)
    domain: int = option(0, "a world of its own people, cameras, colours and light; 0 is the usual one", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries >= self.shots:
            raise ConfigError(f"queries: {self.queries} of {self.shots} shots leave none for the gallery")


def _random(config: SyntheticConfig, *tags: int) -> np.random.Generator:
    """The stream of what the tags name, in this domain."""
    return np.random.default_rng([config.seed, *tags, *([config.domain] if config.domain else [])])


def _domain_colours(domain: int) -> np.ndarray | None:
    """(C, C): what a domain does to colours, None for 0. They turn about the grey axis, so that greys stay, by the
    golden angle, so that no two of many domains are alike; and all is dimmer."""
    if not domain:
        return None
    angle, axis_C = math.pi * (3 - math.sqrt(5)) * domain, np.full(3, 3**-0.5)
    cross_CC = np.cross(np.eye(3), axis_C)
    along_CC = np.outer(axis_C, axis_C)
    turn_CC = along_CC + math.cos(angle) * (np.eye(3) - along_CC) + math.sin(angle) * cross_CC
    return (0.75 * turn_CC).astype(np.float32)


def render(folder: Path, config: SyntheticConfig, *, progress: bool = True) -> None:
    """Render the dataset into ``folder``, whole or not at all; a folder with the same settings is left as it is.

    Raises DataError if ``folder`` exists with anything else in it, ConfigError if its synthetic.yaml is damaged.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if _rendered(folder, config):
            return
        raise DataError(f"{folder}: exists and was not rendered with these settings; name another folder")
    try:
        _render(folder, config, progress)
    except TakenError:  # by another process, which was sooner
        if not _rendered(folder, config):
            raise


def _rendered(folder: Path, config: SyntheticConfig) -> bool:
    saved = folder / "synthetic.yaml"
    return saved.is_file() and load_settings(SyntheticConfig, saved) == config


def _render(folder: Path, config: SyntheticConfig, progress: bool) -> None:
    shots = list(_shots(config))
    cameras = {camid: Camera(config, camid) for camid in range(1, config.cameras + 1)}
    people = {pid: draw_person(_random(config, _PERSON, pid)) for pid in {s.pid for s in shots}}
    with atomic(folder) as temporary:
        for kind in ("images", "masks"):
            (temporary / kind).mkdir(parents=True)
        with (temporary / "index.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "pid", "camid", "split", "mask", *(f.name for f in fields(Person))])
            for shot in progress_bar(shots, desc="synthetic pedestrians", unit="img", shown=progress):
                person = people[shot.pid]
                picture, mask = _photograph(person, cameras[shot.camid], shot, config)
                # At these sizes halved chroma would smear the clothes' colours over the background: 4:4:4.
                picture.save(temporary / shot.image, quality=92, subsampling=0)
                mask.save(temporary / shot.mask)
                writer.writerow([shot.image, shot.pid, shot.camid, shot.split, shot.mask, *asdict(person).values()])
        save_settings(config, temporary / "synthetic.yaml")


@dataclass(frozen=True, slots=True)
class _Shot:
    split: str
    pid: int
    camid: int
    number: int

    @property
    def image(self) -> str:
        return f"images/{self.pid:05d}_c{self.camid}_{self.number}.jpg"

    @property
    def mask(self) -> str:
        return f"masks/{self.pid:05d}_c{self.camid}_{self.number}.png"


def _shots(config: SyntheticConfig) -> Iterator[_Shot]:
    """Every picture of the dataset. Pids run from 1 through the splits, so that they are disjoint."""
    pid = 0
    for split in ("train", "unlabelled", "aux", "test"):
        for _ in range(getattr(config, split)):
            pid += 1
            if split == "unlabelled":
                rng = _random(config, _STRANGER, pid)
                yield _Shot(split, pid, int(rng.integers(1, config.cameras + 1)), 0)
                continue
            for camid, number in product(range(1, config.cameras + 1), range(config.shots)):
                tested = "query" if number < config.queries else "gallery"
                yield _Shot(tested if split == "test" else split, pid, camid, number)


class Camera:
    """A camera's place and optics: its scene, colour, light, sharpness, and the way people mostly walk there."""

    def __init__(self, config: SyntheticConfig, camid: int):
        rng = _random(config, _CAMERA, camid)
        self.supersampling = 4 if config.height <= 64 else 2
        self.size = config.width * self.supersampling, config.height * self.supersampling
        self.gain_C = rng.uniform(0.6, 1.25) * rng.uniform(0.75, 1.25, 3)
        self.gamma = float(rng.uniform(0.75, 1.4))
        self.haze = float(rng.uniform(0, 30))
        self.blur = float(rng.uniform(0.0, 0.009)) * config.height
        self.noise = float(rng.uniform(1, 7))
        self.view = str(rng.choice(VIEWS))
        self.scene = _scene(rng, *self.size)
        self.colours_CC = _domain_colours(config.domain)


def _scene(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A wall or street over a ground, several pictures wide; pictures are cut out of it at random places."""
    wide, tall = int(width * _SCENE), int(height * 1.15)
    horizon = int(tall * rng.uniform(0.5, 0.8))
    wall = 0.3 * rng.uniform(40, 225, 3) + 0.7 * rng.uniform(40, 225)  # streets are mostly grey
    ground = rng.uniform(50, 190) * rng.uniform(0.9, 1.1, 3)
    ramp_H1 = np.linspace(rng.uniform(0.65, 1.25), rng.uniform(0.75, 1.1), tall)[:, None]
    base_H3 = np.where(np.arange(tall)[:, None] < horizon, wall, ground) * ramp_H1
    picture = Image.fromarray(np.repeat(base_H3[:, None], wide, 1).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    def tone(colour: np.ndarray, spread: float) -> Colour:
        return shade(tuple(int(c) for c in colour), float(rng.uniform(1 - spread, 1 + spread)))  # type: ignore[arg-type]

    floor = picture.crop((0, horizon, wide, tall))
    style = str(rng.choice(["bricks", "windows", "panels", "trees"]))
    step = int(height * rng.uniform(0.12, 0.28))
    for row, y in enumerate(range(0, horizon, horizon if style == "panels" else step)):
        for x in range(-step, wide, step * 2):
            left = x + (row % 2) * step
            if style == "bricks":
                draw.rectangle((left, y, left + 2 * step - 3, y + step - 3), fill=tone(wall, 0.14))
            elif style == "windows":
                draw.rectangle((x, y + step // 4, x + step, y + step), fill=tone(wall, 0.5))
            elif style == "panels":
                draw.rectangle((x, 0, x + step, horizon), fill=tone(wall, 0.25))
            else:
                r = step * rng.uniform(0.5, 1.3)
                leaf = tone(np.array([60, 98, 52]), 0.4)
                draw.ellipse((left - r, y - r, left + r, y + r), fill=leaf)
    picture.paste(floor, (0, horizon))
    line = tone(ground, 0.3)
    for k in range(1, 8):  # joints of the pavement, denser towards the horizon
        joint = horizon + (tall - horizon) * (k / 7) ** 2
        draw.line((0, joint, wide, joint), fill=line, width=max(1, height // 100))
    for x in range(-wide, 2 * wide, step * 2):
        draw.line((x, tall, wide / 2 + (x - wide / 2) * 0.5, horizon), fill=line, width=max(1, height // 100))
    for _ in range(int(rng.integers(1, 5))):  # poles, doors, signs
        x, w = int(rng.uniform(0, wide)), int(width * rng.uniform(0.04, 0.25))
        top = int(horizon * rng.uniform(0, 0.7))
        draw.rectangle((x, top, x + w, int(horizon * rng.uniform(1, 1.15))), fill=tone(rng.uniform(20, 235, 3), 0.1))
    return picture


def _photograph(
    person: Person, camera: Camera, shot: _Shot, config: SyntheticConfig
) -> tuple[Image.Image, Image.Image]:
    """One picture of a person and the mask of what is visible of them, (width, height) of the config."""
    rng = _random(config, _PICTURE, shot.pid, shot.camid, shot.number)
    width, height = camera.size
    left, top = (
        int(rng.integers(0, total - part + 1)) for total, part in zip(camera.scene.size, camera.size, strict=True)
    )
    picture = camera.scene.crop((left, top, left + width, top + height))
    mask = Image.new("L", camera.size)
    tall = height * STATURE[person.stature] * rng.uniform(0.82, 1.05)
    place = width * (0.5 + rng.uniform(-0.14, 0.14)), (height - tall) * rng.uniform(0.1, 0.9)
    if rng.random() < 0.3:
        # Somebody else passes behind, at the edge of the picture; the mask leaves them out.
        x, small = width * (0.5 + rng.choice([-1, 1]) * rng.uniform(0.3, 0.5)), tall * rng.uniform(0.75, 0.95)
        _walk(rng, picture, mask, draw_person(rng), str(rng.choice(VIEWS)), (x, place[1]), small)
        mask.paste(0, (0, 0, width, height))
    view = camera.view if rng.random() < 0.5 else str(rng.choice(VIEWS))
    _walk(rng, picture, mask, person, view, place, tall)
    if rng.random() < 0.18:
        _occlude(rng, picture, mask)
    picture, mask = picture.reduce(camera.supersampling), mask.reduce(camera.supersampling)
    if camera.blur > 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(camera.blur))
    return _expose(rng, picture, camera), mask.point(lambda visible: 255 * (visible > 127))


def _walk(
    rng: np.random.Generator,
    picture: Image.Image,
    mask: Image.Image,
    person: Person,
    view: str,
    top: tuple[float, float],
    tall: float,
) -> None:
    """Draw a person with their shadow, the crown at ``top`` and ``tall`` pixels high, in a random step."""
    ground, reach = top[1] + 0.985 * tall, 0.2 * tall
    box = (top[0] - reach, ground - 0.02 * tall, top[0] + reach, ground + 0.025 * tall)
    ImageDraw.Draw(picture, "RGBA").ellipse(box, fill=(0, 0, 0, 100))
    pose = Pose(view=view, stride=float(rng.uniform(-1, 1)), swing=float(rng.uniform(-1, 1)))
    draw_figure(Pen(picture, mask, top=top, height=tall, mirrored=view == "left"), person, pose)


def _occlude(rng: np.random.Generator, picture: Image.Image, mask: Image.Image) -> None:
    """Put a post, a car or a bush before the person; at most about a third of them is lost."""
    (width, height), kind = picture.size, rng.integers(3)
    colour = shade((150, 150, 155), float(rng.uniform(0.25, 1.5)))
    x, y = width * rng.uniform(0.1, 0.9), height * rng.uniform(0.66, 0.85)
    for draw, fill in ((ImageDraw.Draw(picture), colour), (ImageDraw.Draw(mask), 0)):
        if kind == 0:
            draw.rectangle((x, 0, x + width * 0.09, height), fill=fill)
        elif kind == 1:
            draw.rounded_rectangle((-width * 0.2, y, x + width * 0.3, height * 1.2), width * 0.12, fill=fill)
        else:
            leaf = 0 if fill == 0 else (52, 92, 44)
            for dx in (-0.3, 0.0, 0.3):
                cx, r = x + dx * width, width * 0.24
                draw.ellipse((cx - r, y, cx + r, y + height * 0.5), fill=leaf)


def _expose(rng: np.random.Generator, picture: Image.Image, camera: Camera) -> Image.Image:
    """The camera's light, colour cast, haze and noise, and this picture's own exposure and side of the light."""
    x_HWC = np.asarray(picture, dtype=np.float32) / 255
    if camera.colours_CC is not None:
        x_HWC = (x_HWC @ camera.colours_CC).clip(0, 1)
    near, far = rng.uniform(0.82, 1.18, 2)
    light_W1 = np.linspace(near, far, x_HWC.shape[1], dtype=np.float32)[:, None]
    gain_C = (255 * camera.gain_C * rng.uniform(0.8, 1.2) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
    x_HWC = x_HWC**camera.gamma * (gain_C * light_W1) + camera.haze
    x_HWC += camera.noise * rng.standard_normal(x_HWC.shape, dtype=np.float32)
    return Image.fromarray(x_HWC.clip(0, 255).astype(np.uint8))
