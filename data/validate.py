"""Checks a data set before anyone trains on it: `vopd data validate PATH [--model DIR] [--quarantine OUT]`.

PATH is a folder of splits (or one parquet file). Every row is read once, its images decoded, and compared with what a
triplet promises; then the set as a whole. Findings are listed by kind with row ids. Kinds that block keep the folder
from its stamp (`data/validation_stamp.py`), without which training refuses it. `quarantine=OUT` writes the rows without
a blocking finding to OUT (a new folder, or one of an earlier quarantine), the others' ids and reasons to
OUT/quarantined.jsonl, and validates OUT.

Memory does not grow with rows, but for an id (some tens of bytes) and a 64-bit image hash a row.
"""

import argparse
import json
import os
import re
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from data import crop_match, near_duplicates, schema, transforms, validation_stamp
from vopd.common import control_tokens, ownership
from vopd.common.command import reports_errors
from vopd.common.terminal import visible
from vopd.errors import UserError
from vopd.evaluation.scoring import ANSWER_TYPES, is_correct
from vopd.evaluation.scoring.parsed import unparsed
from vopd.prompt_lengths import prompt_lengths

BLOCKING = {
    "schema": "a column is empty or holds what it may not: another type, text that is not UTF-8 or too long",
    "split": "the split column does not name the file's split",
    "unreadable": "an image does not decode to its end, is missing, or is not PNG, JPEG or WebP",
    "size": f"an image has more than {schema.MAX_PIXELS} pixels (a bomb) or too many bytes, or a side under 16",
    "box": "the box is not four whole numbers inside the image",
    "area": "the box covers a tenth of the image or more",
    "crop": "the crop does not show what the box encloses",
    "options": "fewer than two options, more than there are letters, an empty one, or two that read the same",
    "answer": "the answer is not of its type (a letter of an option, yes or no, a number), or is empty",
    "hint": "there is no hint sentence in the question",
    "duplicate": "the id was there before",
    "leak": "the image is (nearly) one of a more protected split",
    "prompt": "the model's chat template cannot render the prompt",
    "length": "the prompt is longer than the limit",
}
WARNING = {
    "marker": "a text holds a control token or an image marker, which the model is shown as plain text",
    "near-duplicate": "the image is (nearly) that of an earlier row of the split",
    "balance": "correct letters are not evenly spread (chi-squared test, p < 0.001)",
}
KINDS = BLOCKING | WARNING
MAX_AREA = 0.1
MIN_SIDE = 16
BALANCE_P = 1e-3
LISTED = 8
MAKER = "data.validate"
MOST_CHARACTERS = 1_000_000
MOST_OPTIONS = 26
SHOWN = 200
TEXTS = tuple(n for n, kind in schema.FEATURES.items() if kind == schema.FEATURES["question"])
MODEL_READS = ("question", "answer")  # and options; the hint is part of the question, or has another finding
KIND_OF = {"box": "box", "options": "options", **dict.fromkeys(schema.ALL_IMAGES, "unreadable")}
"""Kind of a finding where a value of a column could not be read; of other columns it is `schema`."""
UNREAD = {"schema", "answer", "options"}
"""Findings of rows whose letter does not count."""
PROTECTED = ("train", "validation", "holdout", "test")
"""From the first split that gives up a row which another one has too, to the last; unknown splits come first."""


class Finding(NamedTuple):
    """One thing that is wrong. number: of the row in its split, from 0; None and id "" for a split as a whole."""

    split: str
    number: int | None
    id: str
    kind: str
    reason: str


@dataclass
class Report:
    """What validation found. rows, letters (correct answers) and hashes are by split."""

    findings: list[Finding] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    letters: dict[str, Counter[str]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def blocking(self) -> list[Finding]:
        return [f for f in self.findings if f.kind in BLOCKING]

    @property
    def warnings(self) -> dict[str, int]:
        return dict(Counter(f.kind for f in self.findings if f.kind in WARNING))

    def sentence(self) -> str:
        """The first blocking finding, and how many there are."""
        first, more = self.blocking[0], len(self.blocking) - 1
        others = f", and {more} more" if more else ""
        where = f"{_shown(first.split)} {_where(first)}"
        return f"not fit for training: {where}: {first.kind}: {_shown(first.reason).rstrip('.')}{others}."

    def text(self) -> str:
        """Findings by kind, the first few ids of each, and the correct letters of each split."""
        lines = []
        for kind, what in KINDS.items():
            found = [f for f in self.findings if f.kind == kind]
            if found:
                lines.append(f"{'warning' if kind in WARNING else 'BAD'}: {kind}: {len(found)} ({what})")
                lines += [f"    {_shown(f.split)} {_where(f)}: {_shown(f.reason)}" for f in found[:LISTED]]
                lines += [f"    ... and {len(found) - LISTED} more"] if len(found) > LISTED else []
        for split, count in self.rows.items():
            spread = " ".join(f"{k} {v}" for k, v in sorted(self.letters[split].items()))
            lines.append(f"{_shown(split)}: {count} rows; correct letters: {spread or 'none'}")
        bad = len({(f.split, f.number) for f in self.blocking})
        lines.append(f"{bad} bad rows of {sum(self.rows.values())}")
        return "\n".join(lines)


def _where(finding: Finding) -> str:
    if finding.number is None:
        return "(split)"
    return _shown(finding.id) if finding.id.strip() else f"row {finding.number}"


def _shown(text: str) -> str:
    """A text from the data on one line of a terminal: without control characters, and cut where it is long."""
    cut = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


@dataclass(frozen=True)
class Prompts:
    """How long a prompt may be, for which model. template: extra arguments of its chat template."""

    processor: Any
    limit: int
    template: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[str, ...] = ("full", "crop")


# ---- one row --------------------------------------------------------------------------------------------------------


Problems = list[tuple[str, str]]
"""(kind, reason) for everything wrong."""
Pictures = Callable[[Mapping[str, Any], Path], tuple[Problems, int | None]]
"""What is wrong with the pictures of a row in a folder, and its image's perceptual hash if it has one."""


def picture_problems(
    row: Mapping[str, Any],
    folder: Path,
    decode: Callable[[Mapping[str, Any], Path], Image.Image] = schema.decode_image,
) -> tuple[Problems, int | None]:
    """The `Pictures` that decodes them. decode: gives the picture of a cell, for a caller that has it decoded."""
    found: Problems = []
    pictures: dict[str, Image.Image] = {}
    for column in schema.ALL_IMAGES:
        if row[column] is None:
            continue
        if len(row[column]["bytes"] or b"") > schema.MAX_BYTES:
            found.append(("size", f"{column} has more than {schema.MAX_BYTES} bytes"))
            continue
        try:
            pictures[column] = decode(row[column], folder)
        except schema.ImageTooLargeError as error:
            found.append(("size", f"{column} {error}"))
            continue
        except UserError as error:
            found.append(("unreadable", f"{column} {error}"))
            continue
        if min(pictures[column].size) < MIN_SIDE:
            found.append(("size", f"{column} is {pictures[column].width} x {pictures[column].height}"))
    if "image" not in pictures:
        return found, None
    found += _place_problems(row, pictures)
    return found, near_duplicates.perceptual_hash(pictures["image"])


def row_problems(
    row: Mapping[str, Any],
    folder: Path,
    split: str,
    markers: re.Pattern[str],
    pictures: Pictures = picture_problems,
) -> tuple[Problems, int | None]:
    """Everything wrong with a row taken alone, and its image's perceptual hash if it has one.

    row: a `tables.Row`, which says what could not be read of it. markers: control tokens. pictures: for a caller
    that knows of the row's pictures already.
    """
    unread = getattr(row, "problems", ())
    if unread:
        return [(KIND_OF.get(column, "schema"), f"{column} {reason}") for column, reason in unread], None
    absent = [c for c in schema.COLUMNS if row.get(c) is None and c != "original"]
    if absent:
        return [("schema", f"column {absent[0]!r} is empty")], None
    if long := [c for c in TEXTS if len(row[c]) > MOST_CHARACTERS]:
        return [("schema", f"{long[0]} has more than {MOST_CHARACTERS} characters")], None
    found = [*_id_problems(row, split), *_text_problems(row), *_option_problems(row), *_answer_problems(row)]
    found += _markers(row, markers)
    in_pictures, hash_ = pictures(row, folder)
    return found + in_pictures, hash_


def _id_problems(row: Mapping[str, Any], split: str) -> Iterator[tuple[str, str]]:
    if not row["id"].strip():
        yield "schema", "id is empty"
    elif not row["id"].isprintable():
        yield "schema", f"id {row['id']!r} holds control characters"
    if row["split"] != split:
        yield "split", f"split is {row['split']!r} in a file of {split!r}"


def _text_problems(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    question, hint = row["question"], row["hint"]
    if not question.strip():
        yield "schema", "question is empty"
    if row["answer_type"] not in ANSWER_TYPES:
        yield "schema", f"answer_type {row['answer_type']!r} is not one of {', '.join(sorted(ANSWER_TYPES))}"
    if not hint.strip() or hint not in question:
        yield "hint", "hint is empty" if not hint.strip() else "hint is not part of the question"


def _option_problems(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    options = row["options"]
    read = [" ".join((option or "").split()) for option in options]  # they may differ in case alone
    if row["answer_type"] == "letter" and len(read) < 2:
        yield "options", f"{len(read)} options"
    if len(read) > MOST_OPTIONS:
        yield "options", f"{len(read)} options, and {MOST_OPTIONS} letters"
    elif "" in read:
        what = "empty" if options[read.index("")] is not None else "null"
        yield "options", f"{len(read)} options, number {read.index('') + 1} is {what}"
    elif row["answer_type"] == "letter" and len(set(read)) < len(read):
        twice = next(option for option, count in Counter(read).items() if count > 1)
        yield "options", f"{twice!r} is there twice"


def _answer_problems(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    answer, kind = row["answer"], row["answer_type"]
    if not answer.strip():
        yield "answer", "answer is empty"
    elif kind == "letter":
        if answer not in schema.letters(row["options"][:MOST_OPTIONS]):
            yield "answer", f"{answer!r} is not the letter of one of {len(row['options'])} options"
    elif kind in ANSWER_TYPES:
        try:
            is_correct(unparsed("no response"), answer, kind)
        except UserError:
            yield "answer", f"{answer!r} is not of type {kind!r}"


def _markers(row: Mapping[str, Any], markers: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    texts = [(column, row[column]) for column in MODEL_READS]
    for column, text in [*texts, *(("options", option) for option in row["options"])]:
        if text and (found := markers.search(text)):
            yield "marker", f"{column} holds {found.group()}"


def _place_problems(row: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> Iterator[tuple[str, str]]:
    image, box = pictures["image"], tuple(row["box"])
    if len(box) != 4 or None in box:
        yield "box", f"{list(box)} is not x0, y0, x1, y1"
        return
    if not (0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
        yield "box", f"{list(box)} in an image of {image.width} x {image.height}"
        return
    area = (box[2] - box[0]) * (box[3] - box[1]) / (image.width * image.height)
    if area >= MAX_AREA:
        yield "area", f"box covers {area:.3f} of the image"
    original = pictures.get("original")
    if original is not None and original.size != image.size:
        yield "size", f"original is {original.size}, image {image.size}"
    if "crop" in pictures and not row["family"].startswith(transforms.RENDERED):
        match = crop_match.match_box(image, pictures["crop"], box)  # type: ignore[arg-type]
        if not match.matches:
            where = (
                f"fits best {match.offset[0]:+.0f}, {match.offset[1]:+.0f} pixels away"
                if (match.best >= crop_match.SCORE)
                else f"fits nowhere near the box (correlation {match.best:.2f})"
            )
            yield "crop", where


# ---- the set --------------------------------------------------------------------------------------------------------


class _Seen:
    """What is kept of every row, for checks of the set as a whole."""

    def __init__(self) -> None:
        self.ids: dict[str, None] = {}
        self.splits: list[str] = []
        self.split_of, self.number_of, self.hash_of = array("H"), array("Q"), array("Q")
        self.hashed_ids: list[str] = []

    def image(self, split: str, number: int, id_: str, hash_: int) -> None:
        if split not in self.splits:
            self.splits.append(split)
        self.split_of.append(self.splits.index(split))
        self.number_of.append(number)
        self.hash_of.append(hash_)
        self.hashed_ids.append(id_)

    def findings(self) -> Iterator[Finding]:
        """Rows whose image a row of their split had before, or of a more protected split has."""
        group_N = near_duplicates.groups(np.frombuffer(self.hash_of, dtype=np.uint64))
        members: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(group_N.tolist()):
            if group != i:
                members[group].append(i)
        for first, others in members.items():
            yield from self._group([first, *others])

    def _group(self, group: list[int]) -> Iterator[Finding]:
        keeper = max(group, key=lambda i: (_protection(self.splits[self.split_of[i]]), -i))
        first_of: dict[int, int] = {}
        for i in group:
            split = self.splits[self.split_of[i]]
            first = first_of.setdefault(self.split_of[i], i)
            if self.split_of[i] != self.split_of[keeper]:
                other = f"{self.splits[self.split_of[keeper]]} {self.hashed_ids[keeper]}"
                yield Finding(split, self.number_of[i], self.hashed_ids[i], "leak", f"looks like {other}")
            if first != i:
                reason = f"looks like {self.hashed_ids[first]}"
                yield Finding(split, self.number_of[i], self.hashed_ids[i], "near-duplicate", reason)


def _protection(split: str) -> int:
    return PROTECTED.index(split) if split in PROTECTED else -1


def _balance(split: str, letters: Counter[str]) -> Iterator[Finding]:
    counts = np.array([letters[letter] for letter in sorted(letters)], dtype=float)
    if len(counts) < 2:
        return
    statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    from scipy.special import chdtrc  # slow to import

    if chdtrc(len(counts) - 1, statistic) < BALANCE_P:
        spread = ", ".join(f"{k} {letters[k] / counts.sum():.1%}" for k in sorted(letters))
        yield Finding(split, None, "", "balance", spread)


def validate(
    paths: Iterable[Path], prompts: Prompts | None = None, pictures: Pictures = picture_problems
) -> Report:
    """Everything wrong with these splits, read together; `UserError` if one cannot be read at all."""
    report, seen = Report(), _Seen()
    cv2.setNumThreads(1)  # rows are spread over threads already
    threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            _validate_split(path, prompts, report, seen, pool, pictures)
    report.findings += seen.findings()
    report.findings += [f for split, letters in report.letters.items() for f in _balance(split, letters)]
    return report


def _validate_split(
    path: Path,
    prompts: Prompts | None,
    report: Report,
    seen: _Seen,
    pool: ThreadPoolExecutor,
    pictures: Pictures,
) -> None:
    split, folder = path.stem, path.parent
    report.hashes[split] = schema.split_hash(path)
    report.letters[split] = letters = Counter()
    texts = control_tokens.pattern(prompts.processor.tokenizer if prompts else None)
    number, progress = (
        0,
        tqdm(desc=visible(f"validate {split}"), total=schema.count_rows(path), unit="row", disable=None),
    )
    for group in schema.batched_rows(schema.examined(path), 64):
        results = pool.map(lambda row: row_problems(row, folder, split, texts, pictures), group)
        for offset, (row, (found, hash_)) in enumerate(zip(group, results, strict=True)):
            id_ = row["id"] or ""
            if id_ in seen.ids:
                found.append(("duplicate", "this id was there before"))
            seen.ids[id_] = None
            report.findings += [Finding(split, number + offset, id_, *problem) for problem in found]
            if hash_ is not None:
                seen.image(split, number + offset, id_, hash_)
            if row["answer_type"] == "letter" and not {kind for kind, _ in found} & UNREAD:
                letters[row["answer"]] += 1
        if prompts:
            report.findings += _prompt_findings(group, prompts, split, number, folder)
        number += len(group)
        progress.update(len(group))
    progress.close()
    if number == 0:
        raise UserError(f"{path}: holds no rows; prepare the data set again.")
    report.rows[split] = number


def _prompt_findings(
    rows: list[dict[str, Any]], prompts: Prompts, split: str, number: int, folder: Path
) -> Iterator[Finding]:
    """Prompts that cannot be rendered, or are too long. Rows whose texts or images are bad have a finding already."""
    sized = []
    for i, row in enumerate(rows):
        if row["id"] is not None and row["question"] is not None and not getattr(row, "problems", ()):
            with suppress(UserError):
                sized.append((i, schema.outline(row, folder)))
    for view in prompts.views:
        for (i, row), length in zip(sized, _lengths([row for _, row in sized], prompts, view), strict=True):
            if isinstance(length, str):
                yield Finding(split, number + i, row["id"], "prompt", f"in the {view} view: {length}")
            elif length > prompts.limit:
                reason = f"{length} tokens in the {view} view, the limit is {prompts.limit}"
                yield Finding(split, number + i, row["id"], "length", reason)


def _lengths(rows: list[dict[str, Any]], prompts: Prompts, view: str) -> list[int | str]:
    """Tokens of every row's prompt, or why it cannot be rendered."""
    try:
        return [*prompt_lengths(rows, prompts.processor, view, prompts.template)]
    # The chat template is the model's own program, and may raise whatever it likes.
    except Exception as error:
        if len(rows) == 1:
            return [f"{type(error).__name__}: {error}"]
        return [length for row in rows for length in _lengths([row], prompts, view)]


# ---- files ----------------------------------------------------------------------------------------------------------


def splits_of(path: Path) -> list[Path]:
    """The splits to check: all of a folder, or the one that a parquet file is."""
    if path.is_dir():
        found = schema.splits(path)
        if not found:
            raise UserError(f"{path}: holds no parquet file; prepare the data set first.")
        return found
    schema.shards(path)
    return [path]


def stamped(folder: Path, prompts: Prompts | None = None, pictures: Pictures = picture_problems) -> Report:
    """Validates a folder and gives it a stamp, or takes the one it has away if a finding blocks."""
    report = validate(splits_of(folder), prompts, pictures)
    if report.blocking:
        validation_stamp.remove(folder)
    else:
        validation_stamp.write(folder, report.rows, report.hashes, report.warnings)
    return report


def check_quarantine(folder: Path, out: Path) -> None:
    """`UserError` unless a set without the bad rows of `folder` can be written to `out`."""
    places = folder.resolve(), out.resolve()
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise UserError(f"{out}: is the data set itself, or inside of it; give --quarantine another folder.")
    ownership.check(out, MAKER, working=(validation_stamp.NAME,))


def quarantine(paths: Iterable[Path], report: Report, out: Path) -> None:
    """Writes rows without a blocking finding to `out`, and out/quarantined.jsonl with the others and the reasons.

    Image files that rows name by path go along (as hard links where the file system allows). What an earlier quarantine
    wrote to `out` is replaced.

    Raises:
        UserError: `out` is (in) the set itself, or holds something that no quarantine wrote there.
    """
    bad: dict[tuple[str, int], list[Finding]] = defaultdict(list)
    for finding in report.blocking:
        bad[finding.split, finding.number or 0].append(finding)
    paths = list(paths)
    for path in paths:
        check_quarantine(path.parent, out)
    with ownership.held(out, MAKER, (validation_stamp.NAME,)) as owned:
        validation_stamp.remove(out)
        owned.clear()
        for path in paths:
            good = (row for i, row in enumerate(schema.examined(path)) if (path.stem, i) not in bad)
            moved = _with_files(good, path.parent, owned)
            size = len(schema.shards(path))
            target = out / path.name
            if size == 1:
                schema.write(moved, target, owned=owned)
            else:
                schema.write_shards(moved, target, -(-report.rows[path.stem] // size), owned=owned)
        with owned.writing("quarantined.jsonl") as partial, partial.open("w") as file:
            for (split, number), findings in sorted(bad.items()):
                line = {"split": split, "row": number, "id": findings[0].id}
                file.write(json.dumps(line | {"reasons": {f.kind: f.reason for f in findings}}) + "\n")


def _with_files(
    rows: Iterable[dict[str, Any]], folder: Path, owned: ownership.Owned
) -> Iterator[dict[str, Any]]:
    for row in rows:
        for column in schema.ALL_IMAGES:
            name = row[column] and row[column]["bytes"] is None and row[column]["path"]
            if name and not (owned.folder / name).exists():
                with owned.writing(name) as partial:
                    schema.link_or_copy(schema.image_file(name, folder), partial)
        yield row


def prompts_for(model: str, limit: int) -> Prompts:
    """The processor of a model folder or hub id."""
    from vopd.common import model_folder  # slow to import, and needed with --model only

    try:
        if Path(model).is_dir():
            model_folder.check(Path(model))
        return Prompts(model_folder.load_processor(model), limit)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no processor could be loaded ({str(error).splitlines()[0]}).") from error


@reports_errors("data.validate")
def main(arguments: list[str]) -> int:
    """Exit code 0 if nothing blocks (or what does was quarantined), else 2."""
    parser = argparse.ArgumentParser(
        prog="vopd data validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="folder of splits, or one parquet file (which gets no stamp)")
    parser.add_argument("--model", help="model folder or hub id: check prompt lengths for it")
    parser.add_argument("--max-prompt-tokens", type=int, default=8192)
    parser.add_argument("--quarantine", type=Path, metavar="OUT", help="write good rows and bad ones apart")
    args = parser.parse_args(arguments)
    prompts = prompts_for(args.model, args.max_prompt_tokens) if args.model else None
    paths = splits_of(args.path)
    if args.quarantine:
        check_quarantine(paths[0].parent, args.quarantine)
    report = stamped(args.path, prompts) if args.path.is_dir() else validate(paths, prompts)
    print(visible(report.text()))
    if args.quarantine and report.blocking:
        quarantine(paths, report, args.quarantine)
        rest = stamped(args.quarantine, prompts)
        print(visible(f"--- {args.quarantine}, without the bad rows:\n{rest.text()}"))
        report = rest
    if report.blocking:
        raise UserError(f"{args.quarantine or args.path}: {report.sentence()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
