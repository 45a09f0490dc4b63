import csv
import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ppreid_dist.data import pedestrian, synthetic
from ppreid_dist.data.catalog import read_catalog
from ppreid_dist.data.synthetic import SyntheticConfig, render
from ppreid_dist.errors import ConfigError, DataError

SMALL = dict(train=3, unlabelled=5, aux=2, test=2, cameras=3, shots=2)


def rows_of(folder):
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    render(folder, SyntheticConfig(**SMALL), progress=False)
    return folder


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """60 people seen by 4 cameras, as the raw-pixel and attribute matchers below need."""
    folder = tmp_path_factory.mktemp("synthetic") / "streets"
    render(folder, SyntheticConfig(train=2, unlabelled=0, aux=0, test=60, cameras=4, shots=2), progress=False)
    return folder


def test_the_folder_is_a_catalogue_with_the_people_asked_for(small):
    catalog = read_catalog("csv", small)
    counts = catalog.counts()
    assert counts["train"] == (3, 3 * 3 * 2, 3)
    assert counts["unlabelled"][:2] == (5, 5)
    assert counts["aux"] == (2, 2 * 3 * 2, 3)
    assert counts["query"] == (2, 2 * 3, 3)
    assert counts["gallery"] == (2, 2 * 3, 3)
    assert catalog.notes == ()  # every query has its person under another camera
    per_camera = Counter((r.pid, r.camid) for r in catalog.records if r.split == "query")
    assert set(per_camera.values()) == {1}


def test_pictures_and_masks_have_the_size_and_kind(small):
    for record in read_catalog("csv", small).records:
        with Image.open(record.path) as picture, Image.open(record.mask) as mask:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (32, 64))
            assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (32, 64))
            visible_HW = np.asarray(mask)
        assert set(np.unique(visible_HW)) == {0, 255}
        assert 0.03 < (visible_HW > 0).mean() < 0.6


def test_attributes_are_of_the_person_and_from_the_palettes(small):
    catalog = read_catalog("csv", small)
    names = [f.name for f in dataclasses.fields(pedestrian.Person)]
    assert {"upper_colour", "upper_pattern", "lower_colour", "lower_kind", "sleeve", "hair", "bag", "hat"} <= set(names)
    by_person = {}
    for record in catalog.records:
        assert [k for k, _ in record.attributes] == names
        assert by_person.setdefault(record.pid, record.attributes) == record.attributes
        worn = dict(record.attributes)
        assert worn["upper_colour"] in pedestrian.UPPER
        assert worn["lower_colour"] in pedestrian.LOWER
        assert (worn["upper_second"] == "none") == (worn["upper_pattern"] == "plain")
        assert (worn["bag_colour"] == "none") == (worn["bag"] == "none")
    assert len(set(by_person.values())) > 1


def test_people_share_palettes_and_differ_in_combination():
    people = [pedestrian.draw_person(np.random.default_rng([0, i])) for i in range(400)]
    assert len(set(people)) > 390
    for field in dataclasses.fields(pedestrian.Person):
        shares = np.array(list(Counter(getattr(p, field.name) for p in people).values())) / len(people)
        assert 2 <= len(shares) <= 15, field.name
        assert shares.min() > 0.005, field.name
        assert shares.max() < 0.75, field.name


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(small, tmp_path):
    render(tmp_path / "again", SyntheticConfig(**SMALL), progress=False)
    assert contents(tmp_path / "again") == contents(small)
    render(tmp_path / "other", SyntheticConfig(**SMALL, seed=1), progress=False)
    assert contents(tmp_path / "other")["images/00001_c1_0.jpg"] != contents(small)["images/00001_c1_0.jpg"]


def test_more_test_people_leave_the_pictures_of_the_others(small, tmp_path):
    render(tmp_path / "more", SyntheticConfig(**{**SMALL, "test": 3}), progress=False)
    before, after = contents(small), contents(tmp_path / "more")
    assert all(after[name] == before[name] for name in before if name.endswith((".jpg", ".png")))


@pytest.mark.parametrize(("height", "width"), [(128, 64), (32, 16), (40, 40), (256, 128)])
def test_other_sizes(tmp_path, height, width):
    config = SyntheticConfig(train=2, unlabelled=0, aux=0, test=1, cameras=2, height=height, width=width)
    render(tmp_path / "set", config, progress=False)
    for record in read_catalog("csv", tmp_path / "set").records:
        with Image.open(record.path) as picture, Image.open(record.mask) as mask:
            assert picture.size == mask.size == (width, height)
            assert np.asarray(mask).any()


def test_a_rendered_folder_is_left_alone_and_another_configuration_refused(small, tmp_path):
    stamp = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    render(small, SyntheticConfig(**SMALL), progress=False)
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == stamp
    with pytest.raises(DataError, match="name another folder") as caught:
        render(small, SyntheticConfig(**SMALL, seed=1), progress=False)
    assert str(small) in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="name another folder"):
        render(tmp_path, SyntheticConfig(**SMALL), progress=False)
    with pytest.raises(DataError, match="name another folder"):
        render(tmp_path / "thesis.txt", SyntheticConfig(**SMALL), progress=False)


def test_an_empty_folder_may_be_given(tmp_path):
    (tmp_path / "set").mkdir()
    render(tmp_path / "set", SyntheticConfig(**SMALL), progress=False)
    assert (tmp_path / "set" / "index.csv").is_file()


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def stop(*arguments):
        drawn.append(arguments)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return pedestrian.draw_figure(*arguments)

    monkeypatch.setattr(synthetic, "draw_figure", stop)
    with pytest.raises(KeyboardInterrupt):
        render(tmp_path / "set", SyntheticConfig(**SMALL), progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [dict(train=1), dict(test=0), dict(cameras=1), dict(shots=1), dict(height=8), dict(seed=-1), dict(aux=-1)]
)
def test_bad_settings_name_their_key(bad):
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))}:"):
        SyntheticConfig(**bad)


# --- the figure


def figure(person, view, *, stride=0.5):
    """The picture and the mask of one person, drawn large on a colour nobody wears."""
    picture, mask = Image.new("RGB", (128, 256), (1, 255, 2)), Image.new("L", (128, 256))
    pen = pedestrian.Pen(picture, mask, top=(64.0, 16.0), height=224.0, mirrored=view == "left")
    pedestrian.draw_figure(pen, person, pedestrian.Pose(view=view, stride=stride, swing=0.3))
    return np.asarray(picture), np.asarray(mask)


def person(**changes):
    plain = dict(
        upper_colour="blue", upper_pattern="plain", upper_second="none", sleeve="long", lower_colour="black",
        lower_kind="trousers", shoes="white", skin="fair", hair="brown", hair_length="short", hat="none",
        hat_colour="none", bag="none", bag_colour="none", build="medium", stature="medium",
    )  # fmt: skip
    return pedestrian.Person(**{**plain, **changes})


def amount(picture_HWC, colour):
    return int((picture_HWC == pedestrian.CLOTH[colour]).all(axis=2).sum())


@pytest.mark.parametrize("view", pedestrian.VIEWS)
@pytest.mark.parametrize("seed", range(8))
def test_the_mask_is_exactly_what_was_drawn(view, seed):
    picture_HWC, mask_HW = figure(pedestrian.draw_person(np.random.default_rng(seed)), view)
    assert ((mask_HW == 255) == (picture_HWC != (1, 255, 2)).any(axis=2)).all()


def test_left_is_the_mirror_of_right():
    (right, _), (left, _) = figure(person(), "right"), figure(person(), "left")
    # Rasterising rounds on the other side: compare the column sums of the cloth, a pixel's shift apart.
    cloth = [(p == pedestrian.CLOTH["blue"]).all(axis=2).sum(axis=0) for p in (right, left)]
    assert abs(np.average(np.arange(128), weights=cloth[0]) + np.average(np.arange(128), weights=cloth[1]) - 128) < 2


def test_a_backpack_is_plain_from_the_back_and_only_straps_from_the_front():
    carrier = person(bag="backpack", bag_colour="red")
    back, side, front = (amount(figure(carrier, v)[0], "red") for v in ("back", "right", "front"))
    assert back > side > front == 0
    assert (figure(carrier, "front")[0] != figure(person(), "front")[0]).any()


@pytest.mark.parametrize("view", ["front", "back", "right"])
@pytest.mark.parametrize(
    "changes",
    [
        *(dict(upper_pattern=p, upper_second="yellow") for p in ("stripes", "check", "block")), dict(sleeve="short"),
        dict(lower_kind="shorts"), dict(lower_kind="skirt"), dict(shoes="red"), dict(skin="dark"), dict(hair="blond"),
        dict(hair_length="long"), dict(hair_length="bald"), dict(hat="cap", hat_colour="red"),
        dict(hat="beanie", hat_colour="red"), dict(bag="handbag", bag_colour="red"), dict(build="heavy"),
        dict(lower_colour="khaki"), dict(upper_colour="green"),
    ],
    ids=str,
)  # fmt: skip
def test_every_attribute_shows(view, changes):
    assert (figure(person(**changes), view)[0] != figure(person(), view)[0]).any(axis=2).sum() > 60


def test_an_occluder_is_not_the_person(monkeypatch):
    for seed in range(12):
        picture, mask = Image.new("RGB", (128, 256)), Image.new("L", (128, 256), 255)
        synthetic._occlude(np.random.default_rng(seed), picture, mask)
        covered_HW = np.asarray(picture).any(axis=2)
        assert covered_HW.any()
        assert ((np.asarray(mask) == 0) == covered_HW).all()
        assert covered_HW.mean() < 0.4


# --- what makes it re-identification


def rank1(similarity_NN, rows):
    """Share of queries whose most similar gallery picture of another camera shows the same person (a plain loop)."""
    hits = []
    for i, query in enumerate(rows):
        if query["split"] == "query":
            others = [j for j, r in enumerate(rows) if r["split"] == "gallery" and r["camid"] != query["camid"]]
            best = max(others, key=lambda j: similarity_NN[i, j])
            hits.append(rows[best]["pid"] == query["pid"])
    return np.mean(hits)


def test_raw_pixels_do_not_match_across_cameras_but_clothes_do(streets):
    rows = rows_of(streets)
    x_ND = np.stack([np.asarray(Image.open(streets / r["path"]).resize((16, 32)), dtype=float).ravel() for r in rows])
    x_ND -= x_ND.mean(axis=1, keepdims=True)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    pixels = rank1(x_ND @ x_ND.T, rows)
    worn = np.array([[r[f.name] for f in dataclasses.fields(pedestrian.Person)] for r in rows])
    clothes = rank1((worn[:, None] == worn[None]).mean(axis=2), rows)
    assert pixels < 0.25
    assert clothes > 0.95


def test_the_clothes_colour_is_in_the_picture(streets):
    """On the mask, a camera's pictures of people in white are brighter than those of people in black."""
    brightness = {"white": [], "black": []}
    for row in rows_of(streets):
        if row["upper_colour"] in brightness and row["camid"] == "1" and row["upper_pattern"] == "plain":
            visible = np.asarray(Image.open(streets / row["mask"])) > 0
            brightness[row["upper_colour"]].append(np.asarray(Image.open(streets / row["path"]))[visible].mean())
    assert min(map(len, brightness.values())) >= 2
    assert np.mean(brightness["white"]) > np.mean(brightness["black"]) + 10


def test_cameras_differ_and_their_backgrounds_vary(streets):
    rows = rows_of(streets)
    corner_N3 = np.array([np.asarray(Image.open(streets / r["path"]))[:6, :4].mean(axis=(0, 1)) for r in rows])
    camera_N = np.array([r["camid"] for r in rows])
    means = np.array([corner_N3[camera_N == c].mean(axis=0) for c in np.unique(camera_N)])
    assert np.ptp(means, axis=0).max() > 25
    assert all(corner_N3[camera_N == c].std(axis=0).max() > 3 for c in np.unique(camera_N))


def test_another_domain_has_other_people_and_other_colours(tmp_path):
    people = dict(train=2, unlabelled=0, aux=0, test=2, cameras=2, shots=2, height=32, width=16)
    worn, bytes_of = [], []
    for domain in (0, 1, 2):
        folder = tmp_path / str(domain)
        render(folder, SyntheticConfig(**people, domain=domain), progress=False)
        worn.append([list(row.values())[5:] for row in rows_of(folder)])
        bytes_of.append(contents(folder)["images/00001_c1_0.jpg"])
    assert len(set(bytes_of)) == 3
    assert worn[0] != worn[1] != worn[2] != worn[0]
    assert synthetic._domain_colours(0) is None
    red, grey = np.array([1.0, 0, 0]), np.full(3, 0.5)
    turned = [red @ synthetic._domain_colours(domain) for domain in range(1, 6)]
    for domain, colour in enumerate(turned, 1):
        np.testing.assert_allclose(grey @ synthetic._domain_colours(domain), 0.75 * grey, atol=1e-6)
        others = [red, *turned[: domain - 1]]
        assert min(np.abs(colour - 0.75 * other).max() for other in others) > 0.2
