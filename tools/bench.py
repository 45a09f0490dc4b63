"""What the parts of this library take, each beside its plain twin or a peer in the same run. Prints Markdown.

    python tools/bench.py rank [--size market] [--dim 2048]        ranking: seconds, memory, against sorting
    python tools/bench.py step [--config configs/demo.yaml]        a training's steps: plain, and what the game adds
    python tools/bench.py input [--height 256 --width 128]         decoding and the stream: pictures a second
    python tools/bench.py shards [--people 2000]                   written, checked, and an index planned with
    python tools/bench.py kernels                                  each kernel beside its twin
    python tools/bench.py scaling [--processes 1 2 4]              the same on several processes; bytes between them
    python tools/bench.py network [--gpus 8 64 512]                many GPUs, reckoned by stated assumptions

``--json FILE`` writes the same. A ``ratio`` is the twin's seconds over ours, of medians in one run: on a busy machine
the seconds mean little and the ratio still something. Everything is measured in processes of its own, so that a peak of
memory is that of one part.
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench_input
import bench_kernels
import bench_network
import bench_rank
import bench_scaling
import bench_shards
import bench_step
import torch
from bench_process import cores

from ppreid_dist.errors import PPReIDError

PARTS = {
    "rank": bench_rank, "step": bench_step, "input": bench_input, "kernels": bench_kernels, "scaling": bench_scaling,
    "network": bench_network, "shards": bench_shards,
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown; a column for every key that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "| --- " * len(keys) + "|"]
    return lines + ["| " + " | ".join(_text(row.get(key)) for key in keys) + " |" for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parts = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        part.arguments(parts.add_parser(name, parents=[_common()]))
    options = parser.parse_args()
    try:
        rows = PARTS[options.part].measure(options)
    except PPReIDError as error:
        parser.exit(2, f"error: {error}\n")
    print("\n".join(table(rows)))
    if options.json:
        about = {
            "part": options.part,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": cores(),
                "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
                "torch": torch.__version__,
            },
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS)
    common.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    common.add_argument("--threads", type=int, default=cores(), help="of a CPU")
    return common


if __name__ == "__main__":
    main()
