"""A made-up run folder whose figures can be counted by hand."""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from vopd.evaluation import statistics
from vopd.evaluation.records import Record, write_records

Right = dict[tuple[str, str], int]  # (split, view) -> how many of the first questions are right


def _records(total: dict[str, int], right: Right, shift: int) -> Iterable[Record]:
    for (split, view), count in right.items():
        for i in range(total[split]):
            correct = (i + shift) % total[split] < count
            yield Record(
                id=f"{split}-{i}",
                family="letter" if split == "holdout" else ("digit", "shape")[i % 2],
                view=view,
                split=split,
                prompt="What?",
                response="I see it. Answer: A",
                response_tokens=12,
                truncated=i == 0,
                parsed=None if i == 1 and not correct else "A",
                gold="A" if correct else "B",
                correct=correct,
            )


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, before, after, shift, steps) -> run folder; 100 test and 50 held-out questions."""
    total = {"test": 100, "holdout": 50}
    base = {("test", "full"): 60, ("test", "crop"): 90, ("holdout", "full"): 30}

    def make(
        name: str = "seed0",
        before: Right = base,
        after: Right | None = None,
        shift: int = 0,
        steps: int = 4,
    ) -> Path:
        run = tmp_path / name
        trained = {("test", "full"): 75, ("test", "crop"): 90, ("holdout", "full"): 30, **(after or {})}
        write_records(run / "records" / "before.jsonl", _records(total, before, 0))
        write_records(run / "records" / "after.jsonl", _records(total, trained, shift))
        lines = [
            {
                "step": step,
                "loss": 1 / step,
                "divergence": 0.1 / step,
                "student_mass": 0.9,
                "response_length": 10 + step,
                "rollouts": 8,
                "tokens_generated": 100,
                "seconds/step": 2.0,
                "seconds/gen": 0.5,
            }
            for step in range(1, steps + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def _helper(name: str) -> ModuleType:
    """A module of this folder that is not a test; pytest's importlib mode puts no folder on the path."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The generator of made-up runs with a known effect."""
    return _helper("synthetic")


@pytest.fixture(scope="session")
def browser() -> ModuleType:
    """Chromium behind its driver."""
    return _helper("browser")


@pytest.fixture(scope="module", autouse=True)
def fewer_resamples() -> Iterator[None]:
    """A tenth of the bootstrap's resamples: these tests make some hundred made-up runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 999)
        yield
