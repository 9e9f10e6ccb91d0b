"""The published triplets in one command: `vopd data prepare vision_opd_6k [--source DIR] --out DIR`.

Stages: fetch (hub, or a folder in the published layout), compare with what the folder was begun with, extract, read and
check every row (-> work/rows.jsonl), split, write parquet, validate. Every stage that reads pictures keeps what it has
done and resumes there, as long as the files are what they were; to split and write takes seconds and begins anew.
Rows name their images by path, so nothing is stored twice. A row that fails is listed with its reason in
quarantined.jsonl, and the rest is converted; past a share of them (`--most-failed`) there is an error instead of a
data set, as soon as that is certain.

Rows are read in as many processes as there are processors, one row a process at a time: memory does not grow with rows,
and they are written in the order of train.jsonl. A picture is decoded once; the last validation takes over what was
found in it and looks at everything else anew.

The published set has training rows only. Validation and test rows are held out here: whole groups of rows that share
(nearly) one image, drawn by seed. There is no held-out family. Results on this test split are not the paper's.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data import crop_match, folders, near_duplicates, schema, validate, validation_stamp
from data.vision_opd_6k import boxes, rows, source
from data.vision_opd_6k.archive import extract, parts_of
from vopd.common import control_tokens, ownership, worker_pool
from vopd.common import images as pictures
from vopd.common.command import reports_errors
from vopd.common.provenance import hash_json
from vopd.common.terminal import visible
from vopd.errors import UserError

DEFAULTS = {"validation": 256, "test": 256, "seed": 0}
MOST_FAILED = 0.02
QUARANTINED = "quarantined.jsonl"
LINE_BYTES = 2**20
SPLITS = ("train", "validation", "test")
MAKER = folders.VISION_OPD_6K
WORKING = (
    "work/*",
    "published/*",
    *(f"{name}/*" for name in (*source.ARCHIVES, source.ORIGINALS[0])),
    source.RECORD,
    validation_stamp.NAME,
)


def prepare(
    out: Path,
    local: Path | None = None,
    revision: str | None = None,
    choices: dict[str, int | None] | None = None,
    most_failed: float | None = None,
) -> dict[str, Any]:
    """Makes sure that `out` holds the prepared, validated splits; returns meta.json's content.

    local: folder in the published layout; None: the hub. revision: of the hub, None: the one begun with, or the pinned.
    choices: most rows of `validation` and `test`, and the `seed` that draws them; None: as before, or `DEFAULTS`.
    most_failed: share of rows that may fail; None: as before, or `MOST_FAILED`.

    Raises:
        UserError: `out` holds something that this command did not write there, the published files are unavailable
            or have changed, or more rows than `most_failed` fail.
    """
    before = folders.meta_of(out)
    given = {key: value for key, value in (choices or {}).items() if value is not None}
    chosen = {key: given.get(key, before.get(key, default)) for key, default in DEFAULTS.items()}
    settings = {**chosen, "code": _code()}
    asked_for_more = local is not None or revision is not None
    if not asked_for_more and validation_stamp.current(out) and settings.items() <= before.items():
        return before
    share = before.get("most_failed", MOST_FAILED) if most_failed is None else most_failed
    with ownership.held(out, MAKER, WORKING, folders.EARLIER[MAKER]) as owned:
        return _prepare(owned, local, revision, settings, share)


def _prepare(
    owned: ownership.Owned,
    local: Path | None,
    revision: str | None,
    settings: dict[str, Any],
    most_failed: float,
) -> dict[str, Any]:
    out = owned.folder
    folder = local or source.fetch(out, revision)
    record = source.check_unchanged(out, folder)
    work = _Work(owned, source.revision_of(record), most_failed)
    work.extract(folder)
    work.read_rows(folder / source.ROWS_FILE)
    counts = work.write_splits({split: settings[split] for split in ("test", "validation")}, settings["seed"])
    report = work.validate()
    print(visible(report.text()))
    if report.blocking:
        raise UserError(
            f"{out}: converted, but some rows did not pass; `vopd data validate {out} --quarantine OTHER` "
            "makes a data set of the rest."
        )
    meta = settings | {
        "revision": work.revision,
        "bbox": boxes.MEANING,
        "rows": counts,
        "quarantined": work.failed,
        "most_failed": most_failed,
    }
    owned.write_text(folders.META, json.dumps(meta, indent=1) + "\n")
    return meta


_DECIDING = (schema, validate, control_tokens, pictures, near_duplicates, crop_match)


def _code() -> str:
    """Hash of the code that decides what a row becomes."""
    digest = hashlib.sha256()
    files = [
        *Path(__file__).parent.glob("*.py"),
        *(Path(m.__file__) for m in _DECIDING if m.__file__),
    ]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class _Work:
    """The stages after the files are there. Progress is kept in work/state.json and work/rows.jsonl."""

    def __init__(self, owned: ownership.Owned, revision: str, most_failed: float) -> None:
        self.owned, self.out, self.revision, self.most_failed = owned, owned.folder, revision, most_failed
        self.folder = self.out / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_file, self.state_file = self.folder / "rows.jsonl", self.folder / "state.json"
        self.state: dict[str, Any] = {"code": _code(), "extracted": {}}
        if self.state_file.is_file():
            found = json.loads(self.state_file.read_text())
            if (
                found["code"] != self.state["code"]
            ):  # other code may read rows otherwise; what was extracted stays
                self.rows_file.unlink(missing_ok=True)
            self.state["extracted"] = found["extracted"]
        self._save()
        self.failed = 0

    def _save(self) -> None:
        with ownership.atomic(self.state_file) as partial:
            partial.write_text(json.dumps(self.state, indent=1) + "\n")

    # ---- extract ----------------------------------------------------------------------------------------------------

    def extract(self, folder: Path) -> None:
        """The archives, next to the parquet files to be."""
        for name, archive in source.archives(folder).items():
            if name in self.state["extracted"]:
                continue
            files = extract(parts_of(folder / name, archive), self.out / name)
            self.state["extracted"][name] = sum(
                1 for _ in tqdm(files, desc=f"extracting {name}", unit="file")
            )
            self._save()

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read_rows(self, file: Path) -> None:
        """Appends what every line of train.jsonl becomes to work/rows.jsonl, in order.

        Raises:
            UserError: more rows fail than may.
        """
        total = sum(1 for _ in _lines(file))
        done = self._keep_rows()
        self._check_share(total)
        if done == total:
            return
        lines = islice(enumerate(_lines(file)), done, None)
        read = partial(rows.read, self.out, self.revision)
        with (
            worker_pool.workers([rows.__name__]) as pool,
            self.rows_file.open("a") as journal,
            tqdm(desc="reading rows", initial=done, total=total, unit="row") as progress,
        ):
            for result in worker_pool.in_order(pool, read, lines):
                journal.write(json.dumps(result) + "\n")
                journal.flush()  # a kill costs the rows under way
                progress.update()
                self.failed += "row" not in result
                self._check_share(total)

    def _keep_rows(self) -> int:
        """How many rows were read before, as long as their pictures are what they were; the journal ends behind them.

        Half a line at its end, from a kill, is cut off as well.
        """
        if not self.rows_file.is_file():
            return 0
        count = whole = 0
        with self.rows_file.open("r+b") as journal:
            for line in journal:
                result = _journaled(line)
                if result is None or not rows.holds(result, self.out):
                    break
                count, whole = count + 1, whole + len(line)
                self.failed += "row" not in result
            journal.truncate(whole)
        return count

    def _check_share(self, total: int) -> None:
        """`UserError` if more rows have failed than may; quarantined.jsonl then has the reasons so far."""
        if self.failed <= self.most_failed * total:
            return
        self._write_quarantined()
        first = next(result for result in self._results() if "row" not in result)
        raise UserError(
            f"{self.failed} rows of {total} failed so far, more than {self.most_failed:.2%} (the first, {first['id']}: "
            f"{first['reason'].rstrip('.')}); all reasons: {self.out / QUARANTINED}. To do without these rows, "
            "raise --most-failed and give the command again: it continues from here."
        )

    def _write_quarantined(self) -> None:
        with self.owned.writing(QUARANTINED) as partial, partial.open("w") as file:
            for result in self._results():
                if "row" not in result:
                    file.write(json.dumps(result) + "\n")

    # ---- splits -----------------------------------------------------------------------------------------------------

    def write_splits(self, held_out: dict[str, int], seed: int) -> dict[str, int]:
        """Writes the parquet files and quarantined.jsonl; returns rows by split."""
        self._write_quarantined()
        (self.out / "left_out.jsonl").unlink(missing_ok=True)  # its name in earlier versions
        hashes = [result["hash"] for result in self._results() if "row" in result]
        splits = assign(np.array(hashes, dtype=np.uint64), held_out, seed)
        validation_stamp.remove(self.out)
        for split in SPLITS:
            of_split = tqdm(
                self._rows_of(split, splits), desc=f"writing {split}", total=splits.count(split), unit="row"
            )
            path = self.out / f"{split}.parquet"
            schema.write(of_split, path, owned=self.owned, check=schema.check_texts)
        return dict(Counter(splits))

    def _results(self) -> Iterator[dict[str, Any]]:
        with self.rows_file.open() as file:
            yield from map(json.loads, file)

    def _rows_of(self, split: str, splits: list[str]) -> Iterator[dict[str, Any]]:
        kept = (result["row"] for result in self._results() if "row" in result)
        for row, belongs in zip(kept, splits, strict=True):
            if belongs == split:
                yield row | {"split": split}

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self) -> validate.Report:
        """The last validation. Pictures that were decoded for their row, and are unchanged since, are not again."""
        known = {
            result["row"]["id"]: (_shown(result["row"]), result["hash"])
            for result in self._results()
            if "row" in result and rows.holds(result, self.out)
        }

        def pictures(row: Mapping[str, Any], folder: Path) -> tuple[validate.Problems, int | None]:
            shown, hash_ = known.get(row["id"], (None, None))
            return ([], hash_) if shown == _shown(row) else validate.picture_problems(row, folder)

        return validate.stamped(self.out, pictures=pictures)


def _shown(row: Mapping[str, Any]) -> str:
    """Hash of what a row says of its pictures."""
    cells = [row[column] and (row[column]["bytes"], row[column]["path"]) for column in schema.ALL_IMAGES]
    return hash_json([cells, list(row["box"]), row["family"]])


def assign(hashes_N: np.ndarray, held_out: dict[str, int], seed: int) -> list[str]:
    """A split for every row: groups of rows with (nearly) one image stay together.

    Groups are drawn in random order; one goes to the first of test and validation that has room for it, so each gets
    at most its number of rows. `UserError` if that takes more than half of the rows.
    """
    room = dict(held_out)
    if sum(room.values()) > len(hashes_N) / 2:
        raise UserError(
            f"{sum(room.values())} rows cannot be held out of {len(hashes_N)}; lower --validation-rows and --test-rows."
        )
    group_N = near_duplicates.groups(hashes_N)
    names_G, sizes_G = np.unique(group_N, return_counts=True)
    split_of: dict[int, str] = {}
    for g in np.random.default_rng(seed).permutation(len(names_G)).tolist():
        size = int(sizes_G[g])
        split = next((s for s, left in room.items() if size <= left), None)
        if split:
            split_of[int(names_G[g])] = split
            room[split] -= size
    return [split_of.get(group, "train") for group in group_N.tolist()]


def _lines(file: Path) -> Iterator[str]:
    """Lines of a text file that are not empty; none may be longer than `LINE_BYTES`."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise UserError(f"{file}: line {number} has more than {LINE_BYTES} bytes.")
            if line.strip():
                yield line.decode("utf-8", errors="replace")


def _journaled(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None if a kill cut it short."""
    try:
        return dict(json.loads(line)) if line.endswith(b"\n") else None
    except ValueError:
        return None


@reports_errors("data.vision_opd_6k", interrupted="give the command again, and it continues from here")
def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="vopd data prepare vision_opd_6k",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--source", default="hub", help="`hub` (default), or a folder in the published layout"
    )
    parser.add_argument(
        "--revision", help="commit of the hub's data set (default: the one begun with, or the pinned one)"
    )
    for split in ("validation", "test"):
        default = f"(default: as before, or {DEFAULTS[split]})"
        parser.add_argument(f"--{split}-rows", type=int, help=f"most rows to hold out for {split} {default}")
    parser.add_argument("--seed", type=int, help="of that choice (default: as before, or 0)")
    parser.add_argument(
        "--most-failed",
        type=_share,
        help=f"share of rows that may fail and be quarantined (default: as before, or {MOST_FAILED})",
    )
    args = parser.parse_args(arguments)
    local = None if args.source == "hub" else Path(args.source)
    choices = {"validation": args.validation_rows, "test": args.test_rows, "seed": args.seed}
    meta = prepare(args.out, local, args.revision, choices, args.most_failed)
    counts = ", ".join(f"{split} {meta['rows'].get(split, 0)}" for split in SPLITS)
    share = meta["quarantined"] / (meta["quarantined"] + sum(meta["rows"].values()))
    print(f"{meta['quarantined']} rows ({share:.2%}) quarantined: reasons in {args.out / QUARANTINED}")
    print(f"{counts} rows; bbox is {meta['bbox']}; revision {meta['revision']}")
    return 0


def _share(text: str) -> float:
    """A share for argparse, which says what is wrong about a `ValueError`."""
    if not 0 <= (share := float(text)) <= 1:
        raise ValueError(text)
    return share


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
