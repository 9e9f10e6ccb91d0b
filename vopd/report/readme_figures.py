"""`python -m vopd.report.readme_figures [--out docs/figures]`: the two figures of the README, from the kept records.

`scene.png`: one question of the test split that the base model answers incorrectly on the full image and correctly on
the crop, and that the best method (seed 0) answers correctly on the full image. It is the first such question of the
split, not one chosen by its looks. `gap.svg`: accuracy on the full image and on the crop, and the gap between them,
before and after training, a row a method, mean over its seeds.

The numbers and texts that a figure shows are in it as JSON too (its description), so that a test can hold it to
the records. The same records give the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.miniature import world
from vopd.common.command import reports_errors
from vopd.common.terminal import say
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.evaluation.records import Record, read_records
from vopd.report.plots import BLUE, GREY, ORANGE, STYLE, figure

RECORDS = ROOT / "docs" / "results" / "miniature"
MAKER = "figures of the README of vopd"
WIDTH = 8.3
"""Inches: 797 CSS pixels, the width of a page on GitHub."""
DPI = 200
RED, GREEN = "#B22222", "#00704A"
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
PLAIN: dict[Any, Any] = STYLE | {
    "axes.grid": False,
    "svg.hashsalt": MAKER,
    "svg.fonttype": "path",
    "font.size": 10.5,
}


# ---- what the figures show ------------------------------------------------------------------------------------------


def answers(run: Path, when: str) -> dict[tuple[str, str], Record]:
    """(view, id) -> answer to a question of the test split; `when` is before or after."""
    records = read_records(run / "records" / f"{when}.jsonl").records
    return {(r.view, r.id): r for r in records if r.split == "test" and r.view in ("full", "crop")}


def example(run: Path) -> dict[str, Any]:
    """The first question that training fixed, with the three answers; and how many were fixed and broken.

    run: a kept run folder.

    Raises:
        UserError: the records hold no such question.
    """
    before, after = answers(run, "before"), answers(run, "after")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    names = [name for view, name in before if view == "full"]
    fixed = [n for n in names if not before["full", n].correct and after["full", n].correct]
    broken = [n for n in names if before["full", n].correct and not after["full", n].correct]
    shown = next((n for n in fixed if before["crop", n].correct), None)
    if shown is None:
        raise UserError(f"{run}: no test question was fixed by training; there is nothing to show.")
    return {
        "recipe": summary["run"]["recipe"],
        "id": shown,
        "prompt": before["full", shown].prompt,
        "gold": before["full", shown].gold,
        "base_full": before["full", shown].response,
        "base_crop": before["crop", shown].response,
        "trained_full": after["full", shown].response,
        "updates": summary["cost"]["updates"],
        "questions": len(names),
        "fixed": len(fixed),
        "broken": len(broken),
    }


def accuracies(folder: Path = RECORDS) -> dict[str, Any]:
    """Accuracy in % on the test split: `base`, and `methods` with the mean over seeds and each seed's own.

    The method with the smallest gap comes first. Ablations and controls, in folders of their own, are left out.

    Raises:
        UserError: no runs are kept in `folder`.
    """
    base: dict[str, float] = {}
    questions = 0
    rows: list[dict[str, Any]] = []
    for method in sorted({seed.parent for seed in folder.glob("*/seed*")}):
        seeds = sorted(method.glob("seed*"))
        if not base:
            before = answers(seeds[0], "before")
            base, questions = _rates(before), sum(view == "full" for view, _ in before)
        each = [_rates(answers(seed, "after")) for seed in seeds]
        mean = {view: float(np.mean([rates[view] for rates in each])) for view in each[0]}
        rows.append(
            {"method": method.name, **_rounded(mean), "seeds": [round(rates["full"], 4) for rates in each]}
        )
    if not rows:
        raise UserError(f"{folder} holds no runs; keep some there with `vopd report RUNS keep=docs/results`.")
    rows.sort(key=lambda row: row["gap"])
    return {"base": _rounded(base), "methods": rows, "questions": questions}


def _rates(found: Mapping[tuple[str, str], Record]) -> dict[str, float]:
    rates = {
        view: 100 * float(np.mean([record.correct for (seen, _), record in found.items() if seen == view]))
        for view in ("full", "crop")
    }
    return rates | {"gap": rates["crop"] - rates["full"]}


def _rounded(rates: Mapping[str, float]) -> dict[str, float]:
    """To what every machine's sum agrees on."""
    return {name: round(rate, 4) for name, rate in rates.items()}


def scene_of(question: str) -> world.Scene:
    """The generated scene of a question such as `test-0-000009` (split, seed, index)."""
    split, seed, index = question.split("-")
    return world.scene(int(seed), split, int(index))


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw_example(shown: Mapping[str, Any]) -> Figure:
    """The scene, its crop, the question and three answers."""
    height, top = 3.55, 3.3
    drawing = figure(WIDTH, height)
    drawing.set_layout_engine("none")
    scene = scene_of(shown["id"])
    _picture(drawing, scene.image, 5, (0.05, top - 3.2, 3.2), "Full image: the student's view")
    _picture(drawing, scene.crop, 6, (3.55, top - 1.44, 1.44), "Crop: the teacher's view")
    question, _, options = shown["prompt"].replace(world.HINT, "").strip().partition("? ")
    left = 5.15 / WIDTH
    drawing.text(left, top / height, f"{question}?", fontweight="bold", va="top")
    for letter in world.LETTERS_OF_OPTIONS:
        options = options.replace(f" {letter})", f"\n{letter})")
    drawing.text(left, (top - 0.29) / height, options, va="top", linespacing=1.35)
    lines = (
        ("Base model, shown the full image", shown["base_full"], False),
        ("Base model, shown the crop", shown["base_crop"], True),
        (
            f"After {shown['updates']} updates of {shown['recipe']}, shown the full image",
            shown["trained_full"],
            True,
        ),
    )
    top -= 1.6
    for who, response, correct in lines:
        top = _answer(drawing, top, who, response, correct)
    return drawing


def _picture(
    drawing: Figure, pixels: np.ndarray, times: int, place: tuple[float, float, float], title: str
) -> None:
    """Pixels enlarged by a whole number, so that no viewer blurs them; place: left, bottom and side in inches."""
    width, height = drawing.get_size_inches()
    left, bottom, side = place
    axis = drawing.add_axes((left / width, bottom / height, side / width, side / height))
    axis.imshow(pixels.repeat(times, 0).repeat(times, 1), interpolation="none")
    axis.set_axis_off()
    axis.set_title(title, fontsize=9.5, color=GREY, loc="left", pad=4)


def _answer(drawing: Figure, top: float, who: str, response: str, correct: bool) -> float:
    """Who answers, whether correctly, and the whole answer; top in inches, returns that of the next one."""
    width, height = drawing.get_size_inches()
    left, colour = 3.55 / width, GREEN if correct else RED
    verdict = "✓ correct" if correct else "✗ incorrect"
    drawing.text(left, top / height, who, fontsize=9.5, color=GREY, va="top")
    drawing.text(0.985, top / height, verdict, color=colour, fontweight="bold", va="top", ha="right")
    lines = textwrap.wrap(f"“{response}”", 58)
    drawing.text(left, (top - 0.2) / height, "\n".join(lines), color=colour, va="top", fontsize=11)
    return top - 0.34 - 0.18 * len(lines)


def draw_gap(shown: Mapping[str, Any]) -> Figure:
    """A row a method from its accuracy on the full image to that on the crop; the base model's is the first row."""
    rows = [{"method": "base (before training)", "seeds": [], **shown["base"]}, *shown["methods"]]
    drawing = figure(WIDTH, 3.9)
    axis = drawing.subplots()
    for place, row in enumerate(rows):
        _gap_row(axis, place, row, first=place == 0)
    axis.axvline(shown["base"]["full"], color=BLUE, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7, zorder=0)
    axis.axvline(shown["base"]["crop"], color=ORANGE, linewidth=1, linestyle=(0, (4, 3)), alpha=0.9, zorder=0)
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.6)
    axis.set_xlim(45, 101)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    questions = f"{shown['questions']:,} test questions"
    axis.set_xlabel(f"accuracy on {questions} (%); dashed: before training; small dots: single seeds")
    axis.legend(
        *axis.get_legend_handles_labels(),
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
        ncols=3,
        frameon=False,
    )
    return drawing


def _gap_row(axis: Axes, place: int, row: Mapping[str, Any], first: bool) -> None:
    full, crop = row["full"], row["crop"]
    colour = "#bbbbbb" if first else "#d9d9d9"
    names = ("gap", "full image", "crop") if first else (None, None, None)
    axis.barh(place, crop - full, left=full, height=0.34, color=colour, label=names[0], zorder=1)
    axis.plot(full, place, "o", color=BLUE, markersize=9, label=names[1], linestyle="none", zorder=3)
    axis.plot(crop, place, "s", color=ORANGE, markersize=8, label=names[2], linestyle="none", zorder=3)
    axis.plot(
        row["seeds"], [place + 0.29] * len(row["seeds"]), "o", color=BLUE, markersize=3, alpha=0.7, zorder=2
    )
    axis.text(
        min([full, *row["seeds"]]) - 1.1,
        place,
        f"{full:.1f}",
        ha="right",
        va="center",
        color=BLUE,
        bbox=WHITE,
    )
    axis.text(crop + 1.1, place, f"{crop:.1f}", ha="left", va="center", color="#9a6a00")
    axis.text((full + crop) / 2, place, f"gap {row['gap']:.1f}", ha="center", va="center")


# ---- files ----------------------------------------------------------------------------------------------------------


def file(drawing: Figure, kind: str, shown: Mapping[str, Any]) -> bytes:
    """The figure as png or svg on white, with what it shows as its description.

    Pixels are in a PNG: the site that shows the README may forbid an SVG to hold pictures.
    """
    buffer = BytesIO()
    makers: dict[str, dict[str, Any]] = {"png": {"Software": MAKER}, "svg": {"Creator": MAKER, "Date": None}}
    described = makers[kind] | {"Description": json.dumps(shown, sort_keys=True)}
    drawing.savefig(buffer, format=kind, dpi=DPI, facecolor="white", metadata=described)
    return buffer.getvalue()


def make() -> dict[str, bytes]:
    """File name -> content of both figures."""
    with matplotlib.rc_context(PLAIN):
        rates = accuracies()
        fixed = example(RECORDS / rates["methods"][0]["method"] / "seed0")
        return {
            "scene.png": file(draw_example(fixed), "png", fixed),
            "gap.svg": file(draw_gap(rates), "svg", rates),
        }


def write(out: Path) -> list[Path]:
    """Write both figures; UserError where a file of that name is not one of this command's."""
    files = {out / name: content for name, content in make().items()}
    for path in files:
        if path.exists() and MAKER.encode() not in path.read_bytes():
            raise UserError(f"{path}: was not made by this command; move it or give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)
    return list(files)


@reports_errors()
def main(arguments: Sequence[str]) -> int:
    """Exit code 0, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m vopd.report.readme_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder of the two files")
    for path in write(parser.parse_args(arguments).out):
        say(f"written: {path}", file=sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
