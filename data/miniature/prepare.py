"""Writes the miniature's parquet files: `vopd data prepare miniature --out .cache/miniature`.

train, validation, test and holdout (the letter family, which post-training never sees), meta.json, and the stamp of
`data.validate`. Files that are there already are kept when settings and generator code are the same; a folder that
holds anything else is left alone (`vopd/common/ownership.py`).
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import folders, schema, validation_stamp
from data.miniature import world
from vopd.common import caches, ownership
from vopd.common.command import reports_errors
from vopd.errors import UserError

LICENCE = "Apache-2.0"
MAKER = folders.MINIATURE
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


def prepare(out: Path, train_rows: int = ROWS["train"], seed: int = 0) -> dict:
    """Makes sure that the four files exist and are validated; returns meta: settings and the SHA-256 of every file.

    The evaluation splits do not depend on `train_rows`. Where two runs start together the second one waits.

    Raises:
        UserError: the folder holds something that this command did not write there.
    """
    settings = _settings(ROWS | {"train": train_rows}, seed)
    if (meta := _kept(out, settings)) and validation_stamp.current(out):
        return meta
    with ownership.held(out, MAKER, (validation_stamp.NAME,), folders.EARLIER[MAKER], wait=True) as owned:
        meta = _kept(out, settings) or _make(owned, settings)
        if not validation_stamp.current(out):
            _validate(out)
        return meta


def _kept(out: Path, settings: dict) -> dict | None:
    """meta, if the four files are there and were made with these settings."""
    meta = folders.meta_of(out)
    there = all((out / f"{split}.parquet").is_file() for split in ROWS)
    return meta if there and {k: meta.get(k) for k in settings} == settings else None


def _make(owned: ownership.Owned, settings: dict) -> dict:
    out = owned.folder
    validation_stamp.remove(out)
    meta: dict = settings | {"sha256": {}}
    for split, count in settings["rows"].items():
        path = out / f"{split}.parquet"
        drawn = tqdm(rows(split, count, settings["seed"]), desc=f"miniature {split}", total=count)
        schema.write(drawn, path, owned=owned)
        meta["sha256"][split] = folders.digest(path)
    owned.write_text(folders.META, json.dumps(meta, indent=1) + "\n")
    return meta


def _validate(out: Path) -> None:
    from data import validate  # slow to import, and not needed where the files are there already

    report = validate.stamped(out)
    if report.blocking:
        raise UserError(f"{out}: the generated data did not pass its own checks.\n{report.text()}")


@reports_errors("data.miniature")
def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 if what was made does not pass its checks."""
    parser = argparse.ArgumentParser(
        prog="vopd data prepare miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=caches.inside(".cache/miniature"))
    parser.add_argument("--train-rows", type=int, default=ROWS["train"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    print(json.dumps(prepare(args.out, args.train_rows, args.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
