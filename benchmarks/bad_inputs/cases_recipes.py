"""Recipes, profiles and method modules that cannot be read, or do not make a method."""

from pathlib import Path

from benchmarks.bad_inputs import Case

GOOD = "method: {module: vopd.vision_opd}\n"
SETTINGS = "from dataclasses import dataclass\n\n\n@dataclass\nclass Settings:\n    alpha: float = 0.5\n"


def recipe(kind: str, content: str | bytes, says: str, name: str = "mine.yaml") -> Case:
    """A run of a recipe file with this content."""

    def arguments(folder: Path) -> list[str]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [str(folder / name), f"run_dir={folder / 'run'}"]

    return Case(kind, "vopd.runner.run", arguments, says)


def module(kind: str, code: str, says: str) -> Case:
    """A run of a recipe whose method module, own.py, holds this code."""

    def arguments(folder: Path) -> list[str]:
        (folder / "own.py").write_text(code)
        (folder / "mine.yaml").write_text("method: {module: own.py}\n")
        return [str(folder / "mine.yaml"), f"run_dir={folder / 'run'}"]

    return Case(kind, "vopd.runner.run", arguments, says)


def profile(kind: str, content: str, says: str) -> Case:
    """A run with a profile file of this content."""

    def arguments(folder: Path) -> list[str]:
        (folder / "own.yaml").write_text(content)
        return ["vision_opd", f"profile={folder / 'own.yaml'}", f"run_dir={folder / 'run'}"]

    return Case(kind, "vopd.runner.run", arguments, says)


def folder_in_place(folder: Path) -> list[str]:
    """A folder with a recipe's name."""
    (folder / "mine.yaml").mkdir()
    return [str(folder / "mine.yaml")]


def bomb(levels: int = 9) -> str:
    """The billion laughs: each level names the one before nine times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n" + GOOD


CASES = (
    recipe("method null", "method: null\n", "mine.yaml: method is a section"),
    recipe("method a string", "method: vopd.vision_opd\n", "mine.yaml: method is a section"),
    recipe("method a list", "method: [vopd.vision_opd]\n", "mine.yaml: method is a section"),
    recipe("method a number", "method: 3\n", "mine.yaml: method is a section"),
    recipe("no method", "train: {steps: 3}\n", "method.module is missing"),
    recipe("a recipe in UTF-16", GOOD.encode("utf-16"), "save it as UTF-8"),
    recipe("a recipe in Latin-1", "# für\n".encode("latin-1") + GOOD.encode(), "line 1: not UTF-8"),
    recipe("a binary file as a recipe", b"\x7fELF\0\0\1", "not UTF-8 text"),
    recipe("an empty recipe", "", "a mapping of keys is expected"),
    Case("a folder as a recipe", "vopd.runner.run", folder_in_place, "There is no recipe"),
    recipe("a list as a recipe", "- method\n", "a mapping of keys is expected"),
    recipe("a recipe of 100 KiB", GOOD + "#" * 100_000, "larger than 64 KiB"),
    recipe("an alias that contains itself", "a: &a [*a]\n" + GOOD, "line 1: an alias that contains itself"),
    recipe("an alias bomb", bomb(), "more than 10,000 values"),
    recipe("brackets a thousand deep", f"a: {'[' * 1000}{']' * 1000}\n", "nested more than 32 deep"),
    recipe("a doubled key in a recipe", GOOD + "seed: 1\nseed: 2\n", "line 3: the key 'seed' is given twice"),
    recipe("a tab in a recipe", "method:\n\tmodule: x\n", "line 2"),
    recipe("a Python object in a recipe", GOOD + "seed: !!python/object/apply:os.getpid []\n", "the tag !!python"),
    recipe("a path object in a recipe",
           GOOD + "run_dir: !!python/object/apply:pathlib.Path [x]\n", "the tag !!python"),
    recipe("a key that is a number", GOOD + "1: 2\n", "'1' is a key but not text"),
    recipe("two documents", GOOD + "---\n" + GOOD, "not readable as YAML"),
    recipe("a secret in a recipe", GOOD + "logging: {project: '${oc.env:HOME}'}\n", "stays out of a run's files"),
    recipe("a secret for the method", "method: {module: vopd.vision_opd, teacher: '${oc.env:HOME}'}\n",
           "stays out of a run's files"),
    recipe("a resolver that evaluates", GOOD + "seed: '${oc.decode:1}'\n", "stays out of a run's files"),
    recipe("a section that is a number", GOOD + "train: 5\n", "mine.yaml: train is a section"),
    recipe("a section that is null", GOOD + "train: null\n", "mine.yaml: train is a section"),
    recipe("an unknown key in a recipe", GOOD + "train: {setps: 3}\n", "is train.steps meant?"),
    recipe("a recipe that names a profile", GOOD + "profile: x\n", "profile cannot be set in a file"),
    recipe("a value out of bounds in a recipe", GOOD + "train: {lr: -1}\n", "train.lr=-1.0 is not allowed"),
    recipe("a module that is not a module name", "method: {module: '../x'}\n", "not a module name"),
    recipe("a module that is missing", "method: {module: gone.py}\n", "no such file"),
    profile("a profile whose method is a list", "method: [1]\n", "own.yaml: method is a section"),
    profile("a profile with a doubled key", "seed: 1\nseed: 2\n", "is given twice"),
    module("a syntax error in a method", "x = = 1\n", "own.py, line 1: SyntaxError"),
    module("an unknown name in a method", "x = 1\nfoo()\n", "own.py, line 2: NameError: name 'foo'"),
    module("a missing import in a method", "import not_there\n", "own.py, line 1: ModuleNotFoundError"),
    module("a method that ends the program", "raise SystemExit(3)\n", "own.py, line 1: SystemExit"),
    module("a method without Settings", "x = 1\n", "has no `Settings`"),
    module("Settings that are not a dataclass", "class Settings: pass\n", "Settings is not a dataclass"),
    module("a method without build", SETTINGS, "has no `build`"),
    module("a build that raises", SETTINGS + "\n\ndef build(settings):\n    return 1 / 0\n",
           "own.py, line 10: ZeroDivisionError"),
    module("a build that returns nothing", SETTINGS + "\n\ndef build(settings): pass\n",
           "build returned a NoneType"),
    module("a build that takes nothing", SETTINGS + "\n\ndef build(): pass\n", "TypeError: build() takes 0"),
)  # fmt: skip
