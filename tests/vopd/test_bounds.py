"""Bounds: every number and choice of a run and of each method has one, and what is outside is refused by name."""

import importlib
import math
from dataclasses import dataclass, field, fields, make_dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vopd import bounds
from vopd.bounds import Each, OneOf, Range, above, bounded, check, one_of, within
from vopd.config import ROOT, Run, load
from vopd.errors import UserError
from vopd.evaluation import evaluate
from vopd.method import default_settings

METHODS = ["vopd.vision_opd", "vopd.vision_opd_sampled", "baselines.grpo", "baselines.dapo", "baselines.opsd",
           "baselines.sft_self_teacher"]  # fmt: skip
# Names that a run takes as they are.
FREE = {
    "run_dir", "recipe", "recipe_folder", "profile", "method", "verl", "model.path", "data.folder", "data.prepare",
    "rollout.replay", "rollout.chat_template", "logging.project",
}  # fmt: skip


def unbounded(kind: type) -> list[str]:
    """Settings without a bound that are neither free nor a truth value."""
    tree = OmegaConf.structured(kind)
    return [
        key
        for key, bound in bounds.bounds(kind).items()
        if bound is None and key not in FREE and not isinstance(OmegaConf.select(tree, key), bool)
    ]


def test_every_number_and_choice_of_a_run_has_a_bound() -> None:
    assert unbounded(Run) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_has_a_bound(name: str) -> None:
    assert unbounded(importlib.import_module(name).Settings) == []


def test_all_methods_are_looked_at() -> None:
    modules = {
        content.method.module
        for file in (ROOT / "recipes").rglob("*.yaml")
        if file.parent.name != "profiles" and "method" in (content := OmegaConf.load(file))
    }
    assert modules == set(METHODS)


def test_twin_a_number_without_a_bound_is_seen() -> None:
    kind = make_dataclass("Run", [("sede", int, field(default=0))], bases=(Run,))
    assert unbounded(kind) == ["sede"]


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_inside_their_bounds(name: str) -> None:
    kind = importlib.import_module(name).Settings
    check(kind, kind(), "method.")
    assert set(default_settings(name)) == {f.name for f in fields(kind)}


def test_defaults_of_an_evaluation_are_inside_their_bounds() -> None:
    check(evaluate.Settings, evaluate.Settings(model="m", benchmarks=["b"]))


@dataclass
class Inner:
    share: float = above(0.5, 0, 1)


@dataclass
class Outer:
    count: int = within(3, 1, 10)
    perhaps: int | None = within(None, 1, 10)
    kind: str = one_of("a", "a", "b")
    pair: list[float] = field(
        default_factory=lambda: [0.0, 0.5], metadata=bounded(Each(Range(0, 1, open_above=True), 2))
    )
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": 0}, "x.count=0 is not allowed; give from 1 to 10."),
        ({"count": 11}, "x.count=11"),
        ({"perhaps": 0}, "x.perhaps=0"),
        ({"kind": "c"}, "x.kind=c is not allowed; give one of a, b."),
        ({"pair": [0.1]}, "give 2 numbers, each from 0 to below 1"),
        ({"pair": [0.1, 1.0]}, "x.pair="),
        ({"inner": {"share": 0.0}}, "x.inner.share=0.0 is not allowed; give above 0 to 1."),
        ({"inner": {"share": math.nan}}, "x.inner.share=nan"),
    ],
)
def test_the_first_value_outside_is_named(change: dict[str, object], sentence: str) -> None:
    tree = OmegaConf.merge(OmegaConf.structured(Outer), change)
    with pytest.raises(UserError) as refused:
        check(Outer, tree, "x.")
    assert sentence in str(refused.value)


def test_what_is_inside_or_none_passes() -> None:
    check(Outer, Outer())
    check(Outer, OmegaConf.merge(OmegaConf.structured(Outer), {"count": 10, "inner": {"share": 1.0}}))


@given(
    ends=st.tuples(st.integers(-1000, 1000), st.integers(0, 1000)),
    value=st.one_of(st.integers(), st.floats(), st.booleans()),
    open_below=st.booleans(),
    open_above=st.booleans(),
)
def test_a_range_holds_what_lies_between_its_ends(
    ends: tuple[int, int], value: float, open_below: bool, open_above: bool
) -> None:
    least, most = ends[0], ends[0] + ends[1]
    wanted = (
        not isinstance(value, bool)
        and not math.isnan(value)
        and least <= value <= most
        and not (open_below and value == least)
        and not (open_above and value == most)
    )
    assert Range(least, most, open_below, open_above).holds(value) == wanted


NUMBERS = {key: b for key, b in bounds.bounds(Run).items() if isinstance(b, Range)}


@settings(max_examples=30, deadline=None)
@given(key=st.sampled_from(sorted(NUMBERS)), way=st.sampled_from([-1, 1]))
def test_a_run_refuses_every_number_beyond_its_ends(key: str, way: int) -> None:
    bound = NUMBERS[key]
    value = bound.least - 1 if way < 0 else bound.most + 1
    with pytest.raises(UserError, match=f"{key}=.* is not allowed"):
        load("grpo", [f"{key}={value}"])


def test_choices_name_the_empty_one() -> None:
    assert str(OneOf(("a", ""))) == "one of a, ''"
