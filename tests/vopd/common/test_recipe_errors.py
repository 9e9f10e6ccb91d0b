"""A recipe's own mistakes: file and line of the recipe's code, whatever raises below it."""

import subprocess
import sys
from pathlib import Path

import pytest

from vopd.common import recipe_errors
from vopd.errors import UserError
from vopd.method import build, default_settings

HEAD = "from dataclasses import dataclass, field\nfrom vopd.method import Method\n\n@dataclass\nclass Settings:\n"


def made(folder: Path) -> None:
    default_settings("own.py", folder)
    build({"module": "own.py"}, folder)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(:\n", "own.py, line 1: SyntaxError"),
        ("import json\njson.loads('{')\n", "own.py, line 2: JSONDecodeError"),
        ("import torch\n\ntorch.ones(2) @ torch.ones(3)\n", "own.py, line 3: RuntimeError"),
        ("raise KeyboardInterrupt\n", None),
        (HEAD + "    alpha: object = object()\n", "own.py|method.alpha|Unexpected type"),
        (HEAD + "    alpha: float\n", "TypeError"),
        (HEAD + "    alpha: Methods = 1\n", "own.py, line 6: NameError"),
    ],
)
def test_what_an_import_raises_is_told_with_file_and_line(
    code: str, said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(code)
    if said is None:
        with pytest.raises(KeyboardInterrupt):
            default_settings("own.py", tmp_path)
        return
    with pytest.raises(UserError, match=said) as told:
        made(tmp_path)
    assert "\n" not in str(told.value)


def test_the_line_is_the_recipes_own_where_a_library_raises(tmp_path: Path) -> None:
    code = (
        HEAD + "    alpha: float = 0.5\n\ndef build(settings):\n    import json\n    return json.loads('{')\n"
    )
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(UserError, match=r"own\.py, line 10: JSONDecodeError: .* \(while making the method\)"):
        build({"module": "own.py"}, tmp_path)


def test_a_module_of_another_name_is_told_from_one_that_lacks_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking_module.py").write_text("\nimport not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"lacking_module\.py, line 2: ModuleNotFoundError"):
        build({"module": "lacking_module"})
    with pytest.raises(UserError, match="no such module"):
        build({"module": "lacking_modules"})


@pytest.mark.parametrize("name", ["", "..x", "a b", "a-b", "None.", "1"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.module"):
        build({"module": name})


def test_a_user_error_passes_and_a_message_is_one_short_line() -> None:
    with pytest.raises(UserError, match=r"^mine$"), recipe_errors.told("x"):
        raise UserError("mine")
    said = recipe_errors.sentence(ValueError("a\nb" + "c" * 1000))
    assert said.startswith("ValueError: a bccc") and len(said) < 400


def test_the_command_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("x = 1\ny = nothing\n")
    (tmp_path / "mine.yaml").write_text("method: {module: own.py}\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vopd", "run", str(tmp_path / "mine.yaml")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"vopd: {tmp_path}/own.py, line 2: NameError" in done.stderr and "Traceback" not in done.stderr
