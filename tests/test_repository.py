"""Promises the tracked files make as a whole: what a user reads first exists, and nothing is tied to one machine."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(
    ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
).stdout.split("\0")
FILES = [ROOT / name for name in TRACKED if name and (ROOT / name).is_file()]
SCRIPTS = [file for file in FILES if file.suffix == ".sh" or file.parent.name == ".ci"]
LOCKS = [ROOT / "requirements" / f"{kind}.lock" for kind in ("cpu", "gpu")]
# Brackets keep the pattern from matching its own line.
FOREIGN = re.compile(
    r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|index-url[ =]|find-links[ =]"
    r"|(?<![\w.-])/(root|work|home)/"
)


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def text_of(file: Path) -> str:
    content = file.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8")


def test_no_index_address_and_no_machine_path():
    found = [
        f"{name_of(file)}:{number}: {line.strip()[:80]}"
        for file in FILES
        for number, line in enumerate(text_of(file).splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert found == []


def test_every_module_opens_with_a_docstring():
    modules = [file for file in FILES if file.suffix == ".py"]
    assert len(modules) > 10
    assert [name_of(f) for f in modules if not ast.get_docstring(ast.parse(text_of(f)))] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_shell_script_parses_and_stops_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in text_of(script)
    assert script.stat().st_mode & 0o111


def test_every_yaml_is_one_mapping():
    files = [file for file in FILES if file.suffix in (".yaml", ".yml")]
    assert files
    assert [name_of(file) for file in files if not isinstance(yaml.safe_load(text_of(file)), dict)] == []


def test_the_readme_commands_exist():
    blocks = re.findall(r"```bash\n(.*?)```", text_of(ROOT / "README.md"), re.DOTALL)
    commands = re.findall(r"^bash (scripts/\S+)(?: (\w+))?", "\n".join(blocks), re.MULTILINE)
    assert {script for script, _ in commands} >= {"scripts/run_recipe.sh", "scripts/test.sh"}
    assert [script for script, _ in commands if ROOT / script not in FILES] == []
    recipes = [name for script, name in commands if script == "scripts/run_recipe.sh"]
    assert "vision_opd" in recipes
    assert [name for name in recipes if ROOT / "recipes" / f"{name}.yaml" not in FILES] == []


def locked(file: Path) -> dict[str, tuple[str, list[str]]]:
    """Package -> (version, hashes)."""
    entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=\S+)*)$", text_of(file), re.MULTILINE)
    return {name: (version, re.findall(r"sha256:[0-9a-f]{64}", hashes)) for name, version, hashes in entries}


@pytest.mark.parametrize("lock", LOCKS, ids=name_of)
def test_the_lock_is_exact_hashed_and_holds_the_direct_pins(lock):
    packages = locked(lock)
    lines = [line for line in text_of(lock).splitlines() if re.match(r"[^ #]", line)]
    assert len(lines) == len(packages) > 200
    assert [name for name, (_, hashes) in packages.items() if not hashes] == []
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["dev"] + extras[lock.stem]:
        pin = Requirement(line)
        assert str(pin.specifier) == f"=={packages[canonicalize_name(pin.name)][0]}", line


def suffixes(source: str) -> set[str]:
    """Shape suffixes of a module's identifiers: `_BT` of `mask_BT`; constants in capitals have none."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg | ast.keyword) and node.arg}
    found = (re.fullmatch(r"[a-z_][a-z0-9_]*_([0-9]*[A-Z][A-Z0-9]*x?)", name) for name in names)
    return {match[1] for match in found if match}


def test_every_shape_suffix_is_in_the_glossary():
    glossary = text_of(ROOT / "docs" / "glossary.md")
    known = set(re.findall(r"^\| ([A-Z]) \|", glossary, re.MULTILINE))
    used = {
        (name_of(file), letter)
        for file in FILES
        if file.suffix == ".py" and name_of(file).startswith(("vopd/", "baselines/"))
        for suffix in suffixes(text_of(file))
        for letter in suffix.rstrip("x")
        if letter.isalpha()
    }
    assert len(used) > 30
    assert sorted(pair for pair in used if pair[1] not in known) == []
    assert sorted(known - {letter for _, letter in used}) == []


def test_a_suffix_is_read_from_names_arguments_and_attributes():
    assert suffixes("def f(mask_BT, *, LIMIT_N=0):\n    self.ids_1P = g(rest_GWx=mask_BT)\n") == {
        "BT",
        "1P",
        "GWx",
    }


# Phrases that readers of the field stumble over, and references to documents that they do not have.
FORBIDDEN = re.compile(
    r"told[ _]apart|(?<![a-z])mended|(?<![a-z])goes[ _]on(?![a-z])|thrown[ _-]away|whole[ _]story"
    r"|pitfall|\bDESIGN[.]md",
    re.IGNORECASE,
)
SENT_TO_A_MODEL = "data/synthesis/prompts.py"  # its texts are inputs of a result


def test_forbidden_phrases_do_not_come_back():
    found = [
        f"{name_of(file)}:{number}: {line.strip()[:80]}"
        for file in FILES
        if file.suffix in (".py", ".md")
        and not name_of(file).startswith("docs/results/")
        and name_of(file) not in (SENT_TO_A_MODEL, "tests/test_repository.py")
        for number, line in enumerate(text_of(file).splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []
