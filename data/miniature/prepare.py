"""Writes the miniature's parquet files: `python -m data.miniature.prepare --out .cache/miniature`.

train, validation, test and holdout (the letter family, which post-training never sees), meta.json, and the stamp of
`data.validate`. Files that are there already are kept when settings and generator code are the same.
"""

import argparse
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import schema, stamp
from data.miniature import world
from vopd.errors import UserError
from vopd.terminal import say

LICENCE = "Apache-2.0"
ROWS = {"train": 6241, "validation": 256, "test": 1024, "holdout": 512}


def rows(split: str, count: int, seed: int) -> Iterator[dict]:
    """Encoded triplets of one split."""
    families = (world.HOLDOUT_FAMILY,) if split == "holdout" else world.FAMILIES
    for index in range(count):
        s = world.scene(seed, split, index, families)
        yield {
            "id": s.id,
            "image": schema.encode(Image.fromarray(s.image)),
            "original": None,  # the generator makes it from the id: stored, it would double the files
            "crop": schema.encode(Image.fromarray(s.crop)),
            "box": list(s.box),
            "question": s.question,
            "hint": world.HINT,
            "options": list(s.options),
            "answer": s.answer,
            "answer_type": "letter",
            "family": s.family,
            "source": "miniature",
            "licence": LICENCE,
            "provenance": f"data/miniature/world.py, seed {seed}, {split} {index}",
            "split": split,
        }


def _settings(counts: dict[str, int], seed: int) -> dict:
    code = hashlib.sha256()
    for module in (world, schema):
        code.update(Path(module.__file__).read_bytes())
    code.update(Path(__file__).read_bytes())
    return {"rows": counts, "seed": seed, "code": code.hexdigest()[:16]}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(out: Path, train_rows: int = ROWS["train"], seed: int = 0) -> dict:
    """Makes sure that the four files exist and are validated; returns meta: settings and the SHA-256 of every file.

    The evaluation splits do not depend on `train_rows`. Where two runs start together the second one waits.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".preparing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _prepare(out, train_rows, seed)


def _prepare(out: Path, train_rows: int, seed: int) -> dict:
    settings = _settings(ROWS | {"train": train_rows}, seed)
    meta_file = out / "meta.json"
    if meta_file.is_file():
        meta = json.loads(meta_file.read_text())
        there = all((out / f"{split}.parquet").is_file() for split in ROWS)
        if there and {k: meta.get(k) for k in settings} == settings:
            if not (out / stamp.NAME).is_file():
                _validate(out)
            return meta
    stamp.remove(out)
    meta = settings | {"sha256": {}}
    for split, count in settings["rows"].items():
        path = out / f"{split}.parquet"
        schema.write(tqdm(rows(split, count, seed), desc=f"miniature {split}", total=count), path)
        meta["sha256"][split] = _digest(path)
    partial = meta_file.with_suffix(".partial")
    partial.write_text(json.dumps(meta, indent=1) + "\n")
    partial.replace(meta_file)
    _validate(out)
    return meta


def _validate(out: Path) -> None:
    from data import validate  # slow to import, and not needed where the files are there already

    report = validate.stamped(out)
    if report.blocking:
        raise UserError(f"{out}: the generated data did not pass its own checks.\n{report.text()}")


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 if what was made does not pass its checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/miniature"))
    parser.add_argument("--train-rows", type=int, default=ROWS["train"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        print(json.dumps(prepare(args.out, args.train_rows, args.seed)))
    except UserError as error:
        say(f"data.miniature: {error}")
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
