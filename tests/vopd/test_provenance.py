"""What a run says of the machine, and which code's change makes another code of it."""

import re
import shutil
from pathlib import Path

from vopd import provenance
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
