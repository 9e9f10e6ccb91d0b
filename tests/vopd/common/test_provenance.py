"""What a run says of the machine, and which code's change makes another code of it."""

import os
import re
import shutil
from pathlib import Path

import pytest

from vopd.common import caches, provenance
from vopd.config import ROOT


def test_the_machine_is_named_by_processor_and_cores() -> None:
    assert re.fullmatch(r"\S.*, [1-9]\d* cores", provenance.machine("cpu"))


def test_code_that_runs_counts_and_code_that_reads_results_does_not(tmp_path: Path) -> None:
    for folder in ("vopd", "baselines", "data"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("base", "__pycache__")
        )
    before = provenance.code_hash(tmp_path)
    with open(tmp_path / "vopd" / "report" / "tables.py", "a") as file:
        file.write("# read differently\n")
    assert provenance.code_hash(tmp_path) == before
    with open(tmp_path / "baselines" / "grpo.py", "a") as file:
        file.write("# trained differently\n")
    assert provenance.code_hash(tmp_path) != before


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read to be hashed; every size is remembered, and every file has settled."""
    read: list[Path] = []
    hashed = provenance._sha256

    def count(files: list[Path], names: bool) -> str:
        read.extend(files)
        return hashed(files, names)

    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(provenance, "_sha256", count)
    monkeypatch.setattr(provenance, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(provenance, "SETTLED_SECONDS", -1e6)
    return read


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, counted: list[Path]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = provenance.hash_files([file])
    assert provenance.hash_files([file]) == first and counted == [file]
    assert provenance.hash_contents([file]) != first  # names are not part of it
    file.rename(tmp_path / "other.safetensors")
    assert provenance.hash_files([tmp_path / "other.safetensors"]) != first


def test_an_edit_of_the_same_size_under_the_same_time_is_noticed(tmp_path: Path, counted: list[Path]) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(b"pixels")
    os.utime(file, (1e9, 1e9))
    before, inode = provenance.hash_contents([file]), file.stat().st_ino
    with file.open("rb+") as stream:
        stream.write(b"P")
    os.utime(file, (1e9, 1e9))
    assert (file.stat().st_mtime, file.stat().st_size, file.stat().st_ino) == (1e9, 6, inode)
    assert provenance.hash_contents([file]) != before


def test_a_damaged_memory_is_not_believed(tmp_path: Path, counted: list[Path]) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"content")
    right = provenance.hash_contents([file])
    for entry in (tmp_path / "cache" / "hashes").iterdir():
        entry.write_text("0" * 64)
    assert provenance.hash_contents([file]) == right and counted == [file, file]


def test_a_file_that_is_being_changed_is_not_remembered(
    tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within one tick of the clock look alike."""
    monkeypatch.setattr(provenance, "SETTLED_SECONDS", 60.0)
    file = tmp_path / "x"
    file.write_bytes(b"content")
    provenance.hash_contents([file]), provenance.hash_contents([file])
    assert counted == [file, file]


def test_a_model_is_all_that_is_loaded_of_it(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "merges.txt", "tokenizer.model", "README.md", "log.bin"):
        (tmp_path / name).write_text(name)
    files = {file.name for file in provenance.model_files(tmp_path)}
    assert files == {"config.json", "model.safetensors", "merges.txt", "tokenizer.model"}


def test_a_model_on_the_hub_is_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"commit": "aaa"}

    def download(name: str, file: str) -> str:
        if not found:
            raise OSError("no network")
        return f"/cache/models--{name}/snapshots/{found['commit']}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hashes = [provenance.model_hash("org/model")]
    found["commit"] = "bbb"
    hashes.append(provenance.model_hash("org/model"))
    found.clear()
    hashes.append(provenance.model_hash("org/model"))
    assert len(set(hashes)) == 3
