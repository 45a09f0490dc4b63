"""Every engine against one process: the whole game on tiny synthetic people, the extractor's weights compared.

    python tools/engine_table.py [--out DIR] [--processes 2 4] [--steps 20] [--accumulate 3]

prints docs/distributed.md's tables: how far the extractor is from one process's after so many steps, relative, by its
entry that is furthest from it and by the norm of all. Under zero3 every layer is in parts, small ones too. With
``--accumulate`` the backbone is a small ViT, through which only the one process's batch goes whole.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ppreid_dist.data.dataset import prepare_shards
from ppreid_dist.experiment import Config
from ppreid_dist.settings import load_settings
from ppreid_dist.training.launcher import KINDS, PRECISIONS

_ROWS = 16
_VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 32, "patch_size": 8}  # fmt: skip


def settings(out: Path, steps: int, backbone: str) -> list[str]:
    """GAN and ridge, snapshots, an average; every batch can be shared by up to eight processes."""
    return [
        f"data.root={out / 'pictures'}", f"data.shards={out / 'shards'}", "data.height=32", "data.width=16",
        "data.synthetic={train: 24, unlabelled: 32, aux: 24, test: 10, cameras: 2, shots: 2, height: 32, width: 16}",
        "data.identities_per_batch=8", "data.pictures_per_identity=2", "data.strangers_split=unlabelled",
        "data.augment.pad=2", "data.stream.backend=pillow", f"model.backbone={backbone}",
        "optimiser.lr=0.002", "privacy.adversaries=[{kind: gan}, {kind: ridge}]",
        "privacy.ridge={strangers: 16, target_size: [8, 4]}", "reversal.size=[16,8]", "reversal.batch=8",
        "reversal.warm_steps=6", "reversal.generator={width: 8, noise_dim: 4}", "reversal.critic.width=8",
        "reversal.lazy={period: 3, catch_up: 4, window: 2}", f"training.images={steps * _ROWS}", "training.warm=0.4",
        "training.ema=0.9", "probe.every=0",
    ]  # fmt: skip


def train(run: Path, processes: int, kind: str, chosen: list[str]) -> None:
    """Run train.py, quietly; its failure ends this program with what it said."""
    parts = run.with_suffix(".json")
    parts.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    said = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(parts)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         "train.py", *chosen, f"engine.kind={kind}", f"output={run}"],
        capture_output=True, text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, **(said if kind == "zero3" else {})},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def weights(run: Path) -> dict[str, Tensor]:
    """The extractor's, and its statistics, in the run's last checkpoint."""
    last = load_file(max(run.glob("checkpoints/step_*")) / "tensors.safetensors")
    return {n: t.double() for n, t in last.items() if n.startswith("/modules/extractor/") and t.is_floating_point()}


def difference(run: Path, reference: Path) -> str:
    """Of two extractors, relative: the largest of an entry to its tensor's largest; the norm of all of them."""
    ours, theirs = weights(run), weights(reference)
    largest = max(float((ours[n] - t).abs().max()) / max(float(t.abs().max()), 1e-6) for n, t in theirs.items())
    apart = math.hypot(*(float((ours[n] - t).norm()) for n, t in theirs.items()))
    return f"{largest:.1e}, {apart / math.hypot(*(float(t.norm()) for t in theirs.values())):.1e}"


def small_vit(folder: Path) -> str:
    """A backbone without batch norm."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_VIT))
    return str(folder)


def table(out: Path, processes: list[int], steps: int, pieces: int) -> Iterator[str]:
    columns = [(number, precision) for number in processes for precision in PRECISIONS]
    yield "| engine | " + " | ".join(f"{n} processes, {precision}" for n, precision in columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    backbone = small_vit(out / "vit") if pieces > 1 else "configs/backbones/resnet_tiny"
    chosen = settings(out, steps, backbone)
    prepare_shards(load_settings(Config, None, chosen).data, progress=False)
    bar = tqdm(total=len(PRECISIONS) + len(KINDS) * len(columns), unit="run")

    def run(name: str, number: int, kind: str, precision: str) -> Path:
        accumulate = 1 if number == 1 else pieces
        train(out / name, number, kind, [*chosen, f"engine.precision={precision}", f"engine.accumulate={accumulate}"])
        bar.update()
        return out / name

    references = {precision: run(f"one-{precision}", 1, "ddp", precision) for precision in PRECISIONS}
    for kind in KINDS:
        cells = [
            difference(run(f"{kind}-{number}-{precision}", number, kind, precision), references[precision])
            for number, precision in columns
        ]
        yield f"| {kind} | " + " | ".join(cells) + " |"
    bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the runs, which must be new (default: a temporary one)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, metavar="PIECES")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        lines = list(table(options.out or Path(temporary), options.processes, options.steps, options.accumulate))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
