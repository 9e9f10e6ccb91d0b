"""Where the published files come from: the hub at one revision, or a local folder; and that they stay the same.

The hub's revision is pinned. At the first use the revision (hub: the commit; always: size and sha256 of every file, as
read here) is written to `source.json`. Later uses compare. Of the published files, train.jsonl's hash is known (from
public code that read it); another one is said, and every row is checked either way.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from tqdm import tqdm

from data.vision_opd_6k.archive import parts_of
from vopd.common import ownership
from vopd.common.provenance import hash_contents
from vopd.common.terminal import say
from vopd.errors import UserError

HUB_ID = "yuanqianhao/Vision-OPD-6K"
REVISION = "eb5c1c2e7b9a7b6a619efe4161c7369c71bf8af4"
ROWS_FILE = "train.jsonl"
ROWS_SHA256 = "8ad2fb81da0f6fba1766545dc5f84cc2250e48704738757461b2d75aa31821df"
ARCHIVES = {"images": "images.tar.gz", "teacher_images": "teacher_images.tar.gz"}
ORIGINALS = ("original_images", "original_images.tar.gz")
"""Pictures without the box, 6.2 GB: taken from a folder that has them, and not fetched, for training needs none."""
RECORD = "source.json"


def archives(folder: Path) -> dict[str, str]:
    """Archives to extract, by their folder: the two that are needed, and the originals where they are there."""
    name, archive = ORIGINALS
    there = next((folder / name).glob(f"{archive}*"), None) is not None
    return ARCHIVES | ({name: archive} if there else {})


def published_files(folder: Path) -> list[Path]:
    """train.jsonl and every archive part, in order; `UserError` if one is missing."""
    if not (folder / ROWS_FILE).is_file():
        raise UserError(
            f"{folder / ROWS_FILE}: missing; give the folder that holds it and the two image folders."
        )
    files = [folder / ROWS_FILE]
    for name, archive in archives(folder).items():
        files += parts_of(folder / name, archive)
    return files


def fetch(out: Path, revision: str | None) -> Path:
    """The hub's files below `out`, at the recorded revision, else the pinned one; an interrupted download resumes.

    Raises:
        UserError: the hub is out of reach, or has (or is asked for) another revision than the recorded one.
    """
    record = _read(out)
    if record.get("source", HUB_ID) != HUB_ID:
        raise UserError(
            f"{out}: made from a local folder; give that folder as --source again, or another --out."
        )
    recorded = record.get("revision")
    try:
        found = HfApi().dataset_info(HUB_ID, revision=revision or recorded or REVISION).sha
        if recorded and found != recorded:
            raise UserError(
                f"{out}: begun with revision {recorded} of {HUB_ID}, but {revision} is {found}; "
                f"give --revision {recorded} to continue with it, or another --out."
            )
        _write(out, {"source": HUB_ID, "revision": found})
        patterns = [ROWS_FILE, *(f"{name}/{archive}*" for name, archive in ARCHIVES.items())]
        folder = snapshot_download(
            HUB_ID, repo_type="dataset", revision=found, allow_patterns=patterns, local_dir=out / "published"
        )
    except (OSError, httpx.HTTPError, HFValidationError) as error:
        raise UserError(
            f"{HUB_ID}: could not be fetched ({str(error).splitlines()[0]}); check the network, or give a folder "
            "with its files as --source."
        ) from error
    return Path(folder)


def check_unchanged(out: Path, folder: Path) -> dict[str, Any]:
    """Compares the files with the record, or records them; returns the record.

    Raises:
        UserError: a file is not the one that was used before; names it.
    """
    record = _read(out)
    published, files = published_files(folder), {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = tqdm(
            pool.map(lambda file: hash_contents([file]), published),
            desc="checking files",
            total=len(published),
            unit="file",
        )
        for file, digest in zip(published, digests, strict=True):
            files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": digest}
    known = record.get("files", files)
    for name in sorted({*known, *files}):
        if known.get(name) != files.get(name):
            raise UserError(
                f"{folder / name}: not the file that {out} was begun with (another revision?); take the files of "
                "that revision, or another --out."
            )
    if files[ROWS_FILE]["sha256"] != ROWS_SHA256:
        say(
            f"{folder / ROWS_FILE}: not the file of revision {REVISION[:8]}; taken as it is, and every row is checked."
        )
    if "files" not in record:
        record = {"source": "local folder", "revision": None, **record, "files": files}
        _write(out, record)
    return record


def revision_of(record: dict[str, Any]) -> str:
    """The commit, or for a local folder a hash over its files' hashes."""
    content = json.dumps(record["files"], sort_keys=True).encode()
    return str(record["revision"] or f"sha256:{hashlib.sha256(content).hexdigest()}")


def _read(out: Path) -> dict[str, Any]:
    file = out / RECORD
    try:
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not readable; remove it and its folder and start again.") from error


def _write(out: Path, record: dict[str, Any]) -> None:
    with ownership.atomic(out / RECORD) as partial:
        partial.write_text(json.dumps({**_read(out), **record}, indent=1) + "\n")
