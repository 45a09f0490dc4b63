"""Augmentation against a loop over pixels, and its independence of the number of processes."""

import numpy as np
import pytest
import torch

from ppreid_dist.data.augment import AugmentConfig, augment
from ppreid_dist.errors import ConfigError

FILL = torch.tensor([0.485, 0.456, 0.406])
NOTHING = dict(flip=0.0, pad=0, erase=0.0)


def _images(count=8, height=12, width=6):
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, (count, 3, height, width), dtype=np.uint8))


def _augment(images, step=0, first=0, total=None, **options):
    config = AugmentConfig(**options)
    return augment(images, config=config, seed=3, step=step, first_row=first, total_rows=total or len(images))


def test_with_everything_off_pictures_are_only_scaled():
    images = _images()
    x, clean = _augment(images, **NOTHING)
    assert torch.equal(x, images.float() / 255)
    assert torch.equal(clean, x)
    assert x.dtype == torch.float32


def test_flip_is_a_mirror():
    images = _images()
    x, _ = _augment(images, **NOTHING | dict(flip=1.0))
    assert torch.equal(x, images.flip(3).float() / 255)
    half, _ = _augment(_images(400), **NOTHING | dict(flip=0.5))
    flipped = (half == _images(400).flip(3).float() / 255).flatten(1).all(1)
    assert 150 < flipped.sum() < 250


def test_each_picture_is_some_window_of_its_padded_self():
    images, pad = _images(60), 2
    x, _ = _augment(images, **NOTHING | dict(pad=pad, flip=0.5))
    shifts = set()
    for before, after in zip(images, x, strict=True):
        padded = torch.zeros(3, 12 + 2 * pad, 6 + 2 * pad)
        padded[:, pad:-pad, pad:-pad] = before.float() / 255
        windows = [
            (mirrored, dy, dx)
            for mirrored in (False, True)
            for dy in range(2 * pad + 1)
            for dx in range(2 * pad + 1)
            if torch.equal(after, (padded.flip(2) if mirrored else padded)[:, dy : dy + 12, dx : dx + 6])
        ]
        assert len(windows) == 1
        shifts.add(windows[0])
    assert {dy for _, dy, _ in shifts} == {dx for _, _, dx in shifts} == set(range(2 * pad + 1))


def test_erasing_fills_one_rectangle_of_the_allowed_area_with_the_mean():
    images = _images(300, 64, 32)
    x, clean = _augment(images, **NOTHING | dict(erase=0.5))
    assert torch.equal(clean, images.float() / 255)
    areas = []
    for before, after in zip(clean, x, strict=True):
        changed = (before != after).any(0)
        if changed.any():
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
            assert torch.equal(
                after[:, top:bottom, left:right], FILL.view(3, 1, 1).expand(3, bottom - top, right - left)
            )
            areas.append(float((bottom - top) * (right - left)) / (64 * 32))
            assert 0.28 < (bottom - top) / (right - left) < 3.6  # 0.3 to 3.33, rounded to pixels
    assert 110 < len(areas) < 190
    assert 0.015 < min(areas) < 0.06
    assert 0.3 < max(areas) < 0.42


def test_the_parts_of_several_processes_make_the_whole():
    images = _images(8)
    whole = _augment(images, step=5, pad=2)
    for world in (2, 4):
        share = 8 // world
        parts = [_augment(images[r * share : (r + 1) * share], 5, r * share, 8, pad=2) for r in range(world)]
        for k in (0, 1):
            assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])


def test_steps_differ_and_repeat():
    images = _images()
    assert torch.equal(_augment(images, step=1)[0], _augment(images, step=1)[0])
    assert not torch.equal(_augment(images, step=1)[0], _augment(images, step=2)[0])


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _augment(_images())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize(
    "bad", [dict(flip=1.5), dict(pad=-1), dict(erase_area_max=0.0), dict(erase_aspect=0.0), dict(erase_area_min=0.5)]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))}"):
        AugmentConfig(**bad)
