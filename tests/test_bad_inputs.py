"""Every bad input ends in one sentence and its exit code, as `python -m benchmarks.bad_inputs` shows them."""

import importlib
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.bad_inputs import Case, cases

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind.replace(" ", "_"))
def test_a_bad_input_ends_in_a_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in case.variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    code = importlib.import_module(case.module).main(case.arguments(tmp_path))
    said = capsys.readouterr().err
    assert (code, case.says in said) == (case.code, True), said
    assert "Traceback" not in said


def test_no_kind_stands_there_twice() -> None:
    assert [kind for kind, count in Counter(case.kind for case in CASES).items() if count > 1] == []
