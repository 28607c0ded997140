#!/usr/bin/env python3
"""Print what the cost model predicts for attention on 2 to 512 GPUs, and how good it has been.

    python scripts/predict_ring.py                           # H200, Llama-3.1-8B attention
    python scripts/predict_ring.py --gpu h100 --kernel fa4 --worlds 8,64 --per-gpu 8192
    python scripts/predict_ring.py --calibration ring.json   # rates that bench_ring.py measured
    python scripts/predict_ring.py --measured ring.json ...  # the model beside recorded runs

First predictions: every strategy that fits, forward and forward + backward. Then the check:
published tables, and runs of other implementations on two H200, against the model with that
implementation's transport and memory traffic. There the kernel's rates are scaled so that one GPU
alone takes as long as the table says: what is checked is what happens between GPUs. Needs no GPU.

Efficiencies a few points above 1 are an artefact: in short runs rectangles are faster than squares,
in long ones, which one GPU needs more of, the power limit slows both alike.
"""

import argparse
import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from extend.ring.cost.hardware import AMPERE, HARDWARE, HOPPER, Hardware, Rate, find_hardware
from extend.ring.cost.passes import Implementation
from extend.ring.cost.predict import candidates, predict

# How the published implementations move data, read in their sources. A merge is block to fp32 (6
# bytes a value), out - block (12), times sigmoid (8), out minus that (12), in kernels of their own;
# torch concatenates the halves as well (8). Gradients of keys travel in fp32, but Burst's backward
# sends dO, Q and dQ instead of K, V, dK and dV: as much as K, V and bf16 gradients where there are
# as many KV heads as query heads.
RING_FLASH_ATTN = Implementation("nccl", merge_bytes=38, share_bytes=4, is_frugal=False)
BURST = Implementation("nccl", merge_bytes=38, share_bytes=2, is_frugal=False)
TORCH = Implementation("nccl", merge_bytes=46, share_bytes=4, is_frugal=False)
PLAIN_ULYSSES = Implementation("nccl", exchange_bytes=8, is_frugal=False, hides_exchange=False)


class Published(NamedTuple):
    """One line of somebody's table: one GPU's TFLOP/s alone, and efficiencies with all GPUs."""

    source: str
    strategy: str
    layout: str
    world: int
    seq_len: int  # of all ranks together
    baseline_len: int  # that the one GPU computed alone
    alone: tuple[float, float]  # forward, forward + backward
    efficiency: tuple[float, float]
    hardware: Hardware
    how: Implementation
    kv_heads: int = 8


def tables() -> list[Published]:
    """All that the model is checked against."""
    h800 = replace(HARDWARE["h800"], kernel=HOPPER["flash"])
    h200_flash = replace(HARDWARE["h200"], kernel=HOPPER["flash"])
    a100, h200 = HARDWARE["a100"], HARDWARE["h200"]
    readme = "ring-flash-attn README"
    rows = []
    for gpu, alone, lines in (
        (h800, (325.2, 297.7), ((0.521, 0.539), (0.852, 0.902), (0.744, 0.829))),
        (a100, (205.3, 182.2), ((0.514, 0.525), (0.817, 0.898), (0.696, 0.826))),
    ):
        for layout, efficiency in zip(("contiguous", "zigzag", "striped"), lines, strict=True):
            rows.append(Published(readme, "ring", layout, 8, 65536, 8192, alone, efficiency, gpu,
                                  RING_FLASH_ATTN))  # fmt: skip
    for seq_len, alone, measured in (
        (65536, (217, 199), (147, 170)),
        (131072, (215, 200), (191, 184)),
        (262144, (208, 196), (203, 191)),
        (524288, (201, 197), (212, 195)),
    ):
        efficiency = tuple(m / a for m, a in zip(measured, alone, strict=True))
        rows.append(Published("BurstAttention README", "ring", "zigzag", 8, seq_len, seq_len, alone,
                              efficiency, a100, BURST, kv_heads=32))  # fmt: skip
    rows += two_h200("ring-flash-attn, 2 x H200", "ring", "zigzag", h200_flash, RING_FLASH_ATTN,
                     ((0.902, 0.880), (0.937, 0.941), (0.944, 0.957), (1.017, 0.995)))
    rows += two_h200("ring-flash-attn, 2 x H200", "ring", "striped", h200_flash, RING_FLASH_ATTN,
                     ((0.849, 0.846), (0.908, 0.918), (0.938, 0.956), (1.018, 0.998)))
    rows += two_h200("ring-flash-attn, 2 x H200", "ring", "contiguous", h200_flash, RING_FLASH_ATTN,
                     ((0.637, 0.611), (0.644, 0.635), (0.644, 0.647), (0.693, 0.670)))
    rows += two_h200("plain Ulysses, 2 x H200", "ulysses", "contiguous", h200, PLAIN_ULYSSES,
                     ((0.744, 0.872), (0.877, 0.923), (0.922, 0.971), (0.973, 0.975)))
    rows += two_h200("torch alltoall, 2 x H200", "ring", "zigzag", h200, TORCH,
                     ((0.732, 0.789), (0.829, 0.872), (0.895, 0.938), (1.008, 0.992)))
    return rows


def two_h200(source, strategy, layout, hardware, how, efficiencies) -> list[Published]:
    """Medians of 16K to 128K tokens on two H200, torch 2.11, against the same kernel alone."""
    flash = ((341, 318), (346, 325), (350, 327), (330, 326))
    cudnn = ((646, 541), (594, 549), (603, 547), (563, 539))
    alone = flash if hardware.kernel == HOPPER["flash"] else cudnn
    lengths = (16384, 32768, 65536, 131072)
    return [
        Published(source, strategy, layout, 2, length, length, rate, efficiency, hardware, how)
        for length, rate, efficiency in zip(lengths, alone, efficiencies, strict=True)
    ]


def check(line: Published) -> tuple[float, float]:
    """The model's efficiencies, forward and forward + backward, for a line of a table."""
    hardware = scale(line.hardware, line.alone, line.baseline_len)
    # What the one GPU did alone, times the work that each of `world` GPUs has with the others.
    share = (line.seq_len / line.baseline_len) ** 2 / line.world
    return tuple(
        share * alone_seconds(hardware, line, backward) / predict(
            line.strategy, heads=32, kv_heads=line.kv_heads, head_dim=128, seq_len=line.seq_len,
            world=line.world, layout=line.layout, backward=backward, hardware=hardware,
            implementation=line.how,
        ).seconds
        for backward in (False, True)
    )  # fmt: skip


def alone_seconds(hardware: Hardware, line: Published, backward: bool) -> float:
    return predict(
        "ring", heads=32, kv_heads=line.kv_heads, head_dim=128, seq_len=line.baseline_len, world=1,
        backward=backward, hardware=hardware,
    ).seconds  # fmt: skip


def scale(hardware: Hardware, alone: tuple[float, float], length: int) -> Hardware:
    """`hardware` with rates such that a causal square runs at `alone` TFLOP/s."""
    forward, both = alone
    backward = 2.5 / (3.5 / both - 1 / forward)
    kernel = hardware.kernel
    first = 1e12 * forward / at(kernel.square, length)
    second = 1e12 * backward / at(kernel.square_backward, length)
    return replace(hardware, kernel=replace(
        kernel, square=faster(kernel.square, first), rectangle=faster(kernel.rectangle, first),
        square_backward=faster(kernel.square_backward, second),
        rectangle_backward=faster(kernel.rectangle_backward, second),
    ))  # fmt: skip


def at(rate: Rate, length: int) -> float:
    return 1 / rate.seconds(1.0, length)


def faster(rate: Rate, factor: float) -> Rate:
    return replace(rate, peak=rate.peak * factor)


def print_predictions(hardware: Hardware, worlds: list[int], lengths: list[int]) -> None:
    """One line a strategy: efficiency, TFLOP/s a GPU and what the time is made of."""
    head = f"{'strategy':18}{'forward':>9}{'eff':>7}{'fwd+bwd':>10}{'eff':>7}{'TFLOP/s':>9}"
    for world in worlds:
        for length in lengths:
            hosts = -(-world // 8)
            print(f"\n{world} x {hardware.name} in {hosts} host{'s' * (hosts > 1)}, "
                  f"{length} tokens a GPU, {length * world} in all, ms")  # fmt: skip
            print(head + f"{'merging':>9}{'waiting':>9}{'MiB host':>10}{'MiB net':>9}{'GiB':>7}")
            names = [("ring", layout) for layout in ("contiguous", "striped")]
            names += [(name, "zigzag") for name in candidates(32, world)]
            for name, layout in names:
                print(prediction_line(name, layout, hardware, world, length))


def prediction_line(name: str, layout: str, hardware: Hardware, world: int, length: int) -> str:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "seq_len": length * world}
    forward, both = (
        predict(name, **shape, world=world, layout=layout, backward=backward, hardware=hardware)
        for backward in (False, True)
    )
    tera = 7e-12 * shape["seq_len"] ** 2 * 32 * 128 / world / both.seconds
    label = name if layout == "zigzag" else f"{name} {layout}"
    return (
        f"{label:18}{1e3 * forward.seconds:9.2f}{forward.efficiency:7.3f}"
        f"{1e3 * both.seconds:10.2f}{both.efficiency:7.3f}{tera:9.0f}"
        f"{1e3 * both.merge_seconds:9.2f}{1e3 * both.exposed_seconds:9.2f}"
        f"{both.bytes_intra / 2**20:10.0f}{both.bytes_inter / 2**20:9.0f}"
        f"{both.peak_bytes / 2**30:7.2f}"
    )


def print_check() -> None:
    """Tables against the model, and the deviation in points of efficiency."""
    print("\nThe model against tables (efficiency; difference in points)")
    print(f"{'source':28}{'':12}{'tokens':>8}{'forward':>9}{'model':>7}{'diff':>7}"
          f"{'fwd+bwd':>9}{'model':>7}{'diff':>7}")  # fmt: skip
    differences: dict[str, list[float]] = {}
    for line in tables():
        model = check(line)
        points = [100 * (m - e) for m, e in zip(model, line.efficiency, strict=True)]
        source = f"{line.source} ({line.hardware.name})" if "README" in line.source else line.source
        differences.setdefault(source, []).extend(points)
        label = line.layout if line.strategy == "ring" else line.strategy
        print(f"{line.source:28}{label:12}{line.seq_len:8}"
              f"{line.efficiency[0]:9.3f}{model[0]:7.3f}{points[0]:+7.1f}"
              f"{line.efficiency[1]:9.3f}{model[1]:7.3f}{points[1]:+7.1f}")  # fmt: skip
    print("\nMean absolute and worst difference, points")
    for source, points in differences.items():
        print(f"{source:34}{statistics.fmean(map(abs, points)):6.1f}{max(points, key=abs):+7.1f}")


def print_measured(path: Path) -> None:
    """Milliseconds of our strategies as a run of bench_ring.py recorded them, and as predicted."""
    run = json.loads(path.read_text())
    heads, kv_heads, head_dim = (int(x) for x in re.findall(r"\d+", run["shape"])[:3])
    print(f"\n{path}: {run['world']} x {run['gpu']}, commit {run['commit']}")
    ratios: dict[tuple[str, str], list[float]] = {}
    for group in run.get("time", []):
        for row in group["rows"]:
            strategy, _, layout = row["name"].partition(" ")[0].partition("/")
            if row["family"] != "ours" or row["kernel"] not in HOPPER or strategy == "auto":
                continue
            ms = 1e3 * predict(
                strategy, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                seq_len=group["seq_len"], world=run["world"], layout=layout or "zigzag",
                backward=row["kind"] != "fwd", hardware=find_hardware(run["gpu"], row["kernel"]),
            ).seconds
            ratios.setdefault((row["kernel"], row["kind"]), []).append(ms / row["ms"])
            print(f"{group['seq_len']:8} {row['name']:28} {row['kind']:8} {row['ms']:10.2f} ms, "
                  f"predicted {ms:10.2f} ({ms / row['ms'] - 1:+.1%})")
    for (kernel, kind), found in ratios.items():
        worst = max(found, key=lambda ratio: abs(ratio - 1))
        print(f"{kernel} {kind}: mean {statistics.mean(found) - 1:+.1%}, worst {worst - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200", choices=list(HARDWARE))
    parser.add_argument("--kernel", default="auto", choices=["auto", *(HOPPER | AMPERE)])
    parser.add_argument("--calibration", type=Path, help="ring.json of bench_ring.py, instead")
    parser.add_argument("--measured", type=Path, nargs="+", help="ring.json files to compare with")
    parser.add_argument("--worlds", default="2,4,8,32,512")
    parser.add_argument("--per-gpu", default="8192,32768,131072", help="tokens a GPU")
    options = parser.parse_args()
    if options.measured:
        for path in options.measured:
            print_measured(path)
        return
    if options.calibration:
        calibration = json.loads(options.calibration.read_text())["calibration"]
        fields = calibration["kernels"].get(options.kernel, calibration["hardware"])
        hardware = Hardware.from_fields(fields)
    else:
        hardware = find_hardware(options.gpu, options.kernel)
    worlds, lengths = ([int(x) for x in text.split(",")]
                       for text in (options.worlds, options.per_gpu))
    print_predictions(hardware, worlds, lengths)
    print_check()


if __name__ == "__main__":
    main()
