"""Decoding: the backends agree, and a damaged picture is named."""

import importlib.util
import io
import threading

import numpy as np
import pytest
import torch
from make_shards import encode, smooth
from PIL import Image

from ppreid_dist.data import decode
from ppreid_dist.data.decode import Decoder, available_threads, choose_backend, decode_masks
from ppreid_dist.errors import ConfigError, DataError, MissingExtra

DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not DALI, reason="DALI is not installed")
backends = pytest.mark.parametrize("backend", ["pillow", pytest.param("dali-cpu", marks=needs_dali)])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def both():
    return {size: (Decoder("pillow", size, CPU), Decoder("dali-cpu", size, CPU)) for size in ((64, 32), (256, 128))}


@backends
def test_a_decoder_gives_the_pictures_pixels(backend):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 10, 3), dtype=np.uint8)
    data = [encode(pixels[0], "PNG"), encode(pixels[1], "BMP"), encode(pixels[2], "PNG")]
    x = Decoder(backend, (20, 10), CPU).decode(data, ["a", "b", "c"])
    assert x.dtype == torch.uint8
    assert x.is_contiguous()
    assert np.array_equal(x.permute(0, 2, 3, 1), pixels)


@backends
def test_of_a_jpeg_with_a_second_picture_behind_it_the_first_is_taken(backend):
    rng = np.random.default_rng(1)
    both = np.stack([smooth(rng, 20, 10), smooth(rng, 20, 10)])
    first = Decoder(backend, (20, 10), CPU).decode([encode(both[0], "JPEG")], "a")
    assert torch.equal(Decoder(backend, (20, 10), CPU).decode([encode(both, "MPO")], "a"), first)


@needs_dali
@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "progressive JPEG", "grey JPEG", "RGBA PNG", "palette PNG"])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("shape", [(128, 64), (173, 81)])
def test_the_backends_agree(both, form, noise, shape):
    """Measured: mean 0.25 smooth and 0.45 noise; more than one level only along the edges of a shrunk picture."""
    rng = np.random.default_rng(1)
    data = []
    for _ in range(4):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8) if noise else smooth(rng, *shape)
        mode = {"grey JPEG": "L", "RGBA PNG": "RGBA", "palette PNG": "P"}.get(form, "RGB")
        stream = io.BytesIO()
        options = dict(progressive=True) if "progressive" in form else {}
        Image.fromarray(pixels).convert(mode).save(stream, form.split()[-1], **options)
        data.append(stream.getvalue())
    for size, (pillow, dali) in both.items():
        difference = (pillow.decode(data, "abcd").int() - dali.decode(data, "abcd").int()).abs()
        assert difference.float().mean() < 0.6
        assert difference[:, :, 1:-1, 1:-1].max() <= 1
        assert difference.max() <= (24 if size < shape else 1)


@needs_dali
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_backends_turn_pictures_alike(both, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = [encode(smooth(np.random.default_rng(2), 90, 40), "JPEG", exif=exif.tobytes())]
    pillow, dali = both[256, 128]
    assert (pillow.decode(data, "a").int() - dali.decode(data, "a").int()).abs().max() <= 1


@backends
def test_a_damaged_picture_is_named(backend):
    good = encode(smooth(np.random.default_rng(0), 64, 32))
    decoder = Decoder(backend, (64, 32), CPU)
    for bad in (b"", b"not a picture", good[: len(good) // 2]):
        with pytest.raises(DataError, match=r"^000002_b: can't be decoded by") as caught:
            decoder.decode([good, good, bad, good], ["000000_a", "000001_x", "000002_b", "000003_c"])
        assert "\n" not in str(caught.value)
    assert decoder.decode([good], ["a"]).shape == (1, 3, 64, 32)  # and it goes on working


def test_a_device_that_fails_is_not_told_as_a_damaged_picture(monkeypatch):
    decoder = Decoder("pillow", (64, 32), CPU)

    def fails(data):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(decoder, "_decode", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        decoder.decode([encode(smooth(np.random.default_rng(0), 64, 32))], ["000000_a"])


@needs_dali
def test_dali_works_in_the_thread_that_asks():
    """In its own it would go back to the first GPU after every operator."""
    decoder, known = Decoder("dali-cpu", (64, 32), CPU), set(threading.enumerate())
    decoder.decode([encode(smooth(np.random.default_rng(0), 64, 32))], ["a"])
    assert set(threading.enumerate()) <= known


def test_threads_are_those_that_slurm_gives_a_task(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert available_threads() == 16
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert available_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert available_threads() == 2


def test_auto_is_decided_by_what_there_is_and_said(monkeypatch, caplog):
    caplog.set_level("INFO")
    find = importlib.util.find_spec
    for installed, device, choice in (
        (True, "cuda", "dali-mixed"),
        (True, "cpu", "dali-cpu"),
        (False, "cuda", "pillow"),
        (False, "cpu", "pillow"),
    ):
        there = object() if installed else None
        monkeypatch.setattr(
            decode.importlib.util, "find_spec", lambda n, there=there: there if "nvidia" in n else find(n)
        )
        caplog.clear()
        assert choose_backend("auto", torch.device(device)) == choice
        assert len(caplog.records) == 1
        assert choice in caplog.text
    with pytest.raises(MissingExtra, match="DALI decoding needs the extra 'gpu'"):
        choose_backend("dali-cpu", CPU)


@needs_dali
def test_decoding_on_a_gpu_that_isn_t_there_is_one_line():
    with pytest.raises(ConfigError, match=r"^data\.stream\.backend: dali-mixed decodes on a GPU, and this runs on cpu"):
        Decoder("dali-mixed", (8, 4), CPU)


def test_masks_are_the_person_where_half_of_a_pixel_is():
    person = np.zeros((8, 8), np.uint8)
    person[:, 4:] = 1  # any level but 0 is the person
    x = decode_masks([encode(person, "PNG"), encode(255 * person, "PNG")], ["a", "b"], (4, 4))
    assert x.dtype == torch.uint8
    assert x.shape == (2, 1, 4, 4)
    assert x.tolist() == [[[[0, 0, 1, 1]] * 4]] * 2
    with pytest.raises(DataError, match=r"^b: its mask can't be decoded"):
        decode_masks([encode(person, "PNG"), b"no"], ["a", "b"], (4, 4))
