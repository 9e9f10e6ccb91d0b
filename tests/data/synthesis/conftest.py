"""Photographs that come inside a package, a stand-in server, and the overrides for a small synthesis."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import skimage

SAMPLES = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = [SAMPLES / "coffee.png", SAMPLES / "chelsea.png", SAMPLES / "rocket.jpg"]


@pytest.fixture(scope="session")
def stub_server() -> Iterator[ModuleType]:
    """The module beside this file; pytest's importlib mode puts no folder on the path."""
    name = "vopd_tests_stub_server"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("stub_server.py"))
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs, one of them twice, and a file that only claims to be one."""
    folder = tmp_path_factory.mktemp("photographs")
    for photograph in PHOTOGRAPHS:
        shutil.copy(photograph, folder)
    (folder / "more").mkdir()
    shutil.copy(folder / "coffee.png", folder / "more" / "again.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    return folder


@pytest.fixture(scope="session")
def overrides_in(photographs: Path) -> Callable[..., list[str]]:
    """Overrides for a short synthesis into a folder; `more` take precedence."""

    def overrides(out: Path, url: str, *more: str) -> list[str]:
        usual = [
            f"images={photographs}",
            f"out={out}",
            "source=sample photographs",
            "licence=see the packages",
            f"server.base_url={url}",
            "server.model=stub",
            "server.first_wait_s=0.01",
            "server.timeout_s=20",
            "filter.min_width=300",
            "filter.min_height=300",
            "propose.per_image=1",
            "answer.samples=4",
        ]
        given = {override.split("=")[0] for override in more}
        return [*(override for override in usual if override.split("=")[0] not in given), *more]

    return overrides


@pytest.fixture
def overrides_for(overrides_in: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """The same, into `out` in the test's own folder."""
    return partial(overrides_in, tmp_path / "out")
