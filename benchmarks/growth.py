"""How time and memory grow: one plot from one command, the theoretical line beside what was measured.

    python -m benchmarks.growth OUT.png [--rounds 2] [--no-runs]

Head, one thread, top 100, chunk 128: seconds of forward and backward over tokens and over k, beside its four
products; peak memory over the vocabulary and over tokens, beside two copies of a chunk of logits. Step: whole runs of
Vision-OPD on the miniature, seconds of the quickest step over tokens trained, beside a line through the origin and the
largest. `--no-runs` leaves these out (they take a minute each). The numbers are printed as JSON as well.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from benchmarks import head
from data.miniature import prepare
from vopd.report.plots import BLUE, GREY, ORANGE, STYLE, figure

ROOT = Path(__file__).resolve().parents[1]
CHUNK, HIDDEN, VOCABULARY, TOKENS = 128, 256, 32_768, 512
OVER = {"tokens": (128, 256, 512, 1024, 2048), "k": (1, 10, 100, 1000, 10_000)}
MEMORY_OVER = {
    "vocabulary": (16_384, 32_768, 65_536, 131_072, 262_144),
    "tokens": (128, 256, 512, 1024, 2048),
}
BATCHES = ((4, 2), (8, 2), (8, 4), (16, 4), (32, 4))  # prompts, rollouts
SETTINGS = (
    "train.steps=3", "train.warmup_steps=1", "evaluate.test_rows=4", "evaluate.holdout_rows=4",
    "evaluate.validation_rows=4", "evaluate.every=0", "export=''", "data.prepare=null",
)  # fmt: skip

Points = list[dict[str, float]]


def head_seconds(name: str, rounds: int) -> Points:
    """Seconds of our head and of its products for each value of `name`, tokens or k."""
    points: Points = []
    for value in OVER[name]:
        given = head.inputs(value if name == "tokens" else TOKENS, HIDDEN, VOCABULARY, "cpu")
        way = head.ours(value if name == "k" else head.TOP_K, CHUNK)
        measured, floor = math.inf, math.inf
        for _ in range(rounds):
            measured = min(measured, head.seconds(way, given))
            floor = min(floor, head.seconds(head.floor, given))
        points.append({name: value, "measured": measured, "theory": floor})
    return points


def head_memory(name: str) -> Points:
    """Peak MiB of our head, in a process of its own, and two copies of a chunk of logits."""
    points: Points = []
    args = argparse.Namespace(device="cpu", chunks=[CHUNK])
    for value in MEMORY_OVER[name]:
        vocabulary, tokens = (value, TOKENS) if name == "vocabulary" else (VOCABULARY, value)
        peak = head.memory(f"ours, top {head.TOP_K}, chunk {CHUNK}", (tokens, 64, vocabulary), args)
        points.append({name: value, "measured": peak, "theory": 2 * CHUNK * vocabulary * 4 / head.MIB})
    return points


def step_seconds(folder: Path) -> Points:
    """Seconds of the quickest step after the first of a run for each batch size, and tokens trained in it."""
    data = folder / "data"
    prepare.prepare(data)
    points: Points = []
    for prompts, rollouts in BATCHES:
        run = folder / f"{prompts}x{rollouts}"
        size = (f"train.prompts={prompts}", f"train.rollouts={rollouts}")
        command = [
            sys.executable,
            "-P",
            "-m",
            "vopd",
            "run",
            "vision_opd",
            f"run_dir={run}",
            f"data.folder={data}",
        ]
        subprocess.run([*command, *size, *SETTINGS], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
        quickest = min(steps, key=lambda step: step["seconds/step"])
        points.append({"tokens": quickest["update_tokens"], "measured": quickest["seconds/step"]})
    last = points[-1]
    for point in points:
        point["theory"] = last["measured"] * point["tokens"] / last["tokens"]
    return points


def draw(axes: Axes, points: Points, name: str, unit: str, title: str) -> None:
    """Measured values over `name`, logarithmic, and the theoretical line."""
    x = [point[name] for point in points]
    axes.plot(x, [point["theory"] for point in points], color=GREY, linestyle="--", label="theory")
    colour = ORANGE if unit == "MiB" else BLUE
    axes.plot(x, [point["measured"] for point in points], color=colour, marker="o", label="measured")
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel=unit, title=title)
    axes.set_xticks(x, labels=[f"{value:,.0f}" for value in x])
    seen = [point[kind] for point in points for kind in ("theory", "measured")]
    least, most = min(seen), max(seen)
    axes.set_ylim(least / 1.6, most * 1.6)
    marks = [factor * 10.0**power for power in range(-3, 5) for factor in (1, 2, 5)]
    shown = [mark for mark in marks if least / 1.6 <= mark <= most * 1.6]
    axes.set_yticks(shown, labels=[f"{mark:,g}" for mark in shown])
    axes.minorticks_off()
    axes.legend(frameon=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-runs", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    panels: list[tuple[Points, str, str, str]] = []
    panels += [(head_seconds(name, args.rounds), name, "seconds", f"head over {name}") for name in OVER]
    panels += [(head_memory(name), name, "MiB", f"head's memory over {name}") for name in MEMORY_OVER]
    if not args.no_runs:
        with tempfile.TemporaryDirectory() as folder:
            panels.append((step_seconds(Path(folder)), "tokens", "seconds", "step over tokens trained"))
    save(args.out, panels)
    print(json.dumps({title: points for points, _, _, title in panels}, indent=1))


def save(out: Path, panels: Sequence[tuple[Points, str, str, str]]) -> None:
    """Draw all panels into one picture, three to a line."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        lines = math.ceil(len(panels) / 3)
        drawing = figure(13, 3.6 * lines)
        axes: Any = drawing.subplots(lines, 3, squeeze=False)
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        for place, panel in zip(axes.flat, panels, strict=False):
            draw(place, *panel)
        drawing.savefig(out, dpi=80)


if __name__ == "__main__":
    main()
