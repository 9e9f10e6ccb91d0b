"""Settings that are read without their module are those of the module."""

from __future__ import annotations

import dataclasses

import pytest

from vopd import method_settings
from vopd.bounds import bounds
from vopd.config import RECIPES, find_recipe, load, recipes
from vopd.method import default_settings

MODULES = sorted({str(load(name, []).method.module) for name in recipes()})


@pytest.mark.parametrize("module", MODULES)
def test_they_are_those_of_the_module(module: str) -> None:
    kind = method_settings.alone(module)
    assert kind is not None
    assert {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)} == default_settings(module)
    own = __import__(module, fromlist=["Settings"]).Settings
    assert [(f.name, f.type) for f in dataclasses.fields(kind)] == [
        (f.name, f.type) for f in dataclasses.fields(own)
    ]
    assert bounds(kind) == bounds(own)


def test_every_recipe_is_among_them() -> None:
    assert len(MODULES) > 5 and RECIPES.is_dir() and find_recipe(recipes()[0]).is_file()


@pytest.mark.parametrize("module", ["mine.py", "numpy", "no.such.module", "vopd.errors"])
def test_others_are_left_to_their_import(module: str) -> None:
    assert method_settings.alone(module) is None
