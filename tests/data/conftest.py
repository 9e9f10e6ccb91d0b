"""The builder of a folder in the published layout, for every test of the data side."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def layout() -> ModuleType:
    """published_layout.py as a module."""
    path = Path(__file__).with_name("published_layout.py")
    spec = importlib.util.spec_from_file_location("published_layout", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
