"""Settings: what wins over what, what is refused and with which sentence, and that every key is read somewhere."""

import ast
import re
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vopd import config as module
from vopd.common.overrides import Tree
from vopd.config import ROOT, Run, load
from vopd.errors import UserError

SOURCES = sorted((ROOT / "vopd").rglob("*.py"))
MAPPINGS = sorted((ROOT / "vopd" / "backbone").glob("*.yaml"))
FSDP = "verl.actor_rollout_ref.actor.fsdp_config"


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe outside the repository; `recipe(text)` gives its path."""

    def write(text: str, name: str = "mine") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return str(path)

    return write


def refusal(*args: object) -> str:
    """The sentence `load` refuses with, or an empty one."""
    try:
        load(*args)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return ""


# ---- what wins -----------------------------------------------------------------------------------------------------


def test_later_settings_win(recipe) -> None:
    path = recipe("method: {module: vopd.vision_opd, beta: 0.1}\ntrain: {lr: 1e-3}\n")
    config = load(path, ["train.steps=7", "method.teacher_rate=0.2"])
    assert config.method.beta == 0.1  # recipe over class default
    assert config.method.top_k == 20  # profile over class default
    assert config.method.teacher_rate == 0.2  # override over class default
    assert config.method.teacher == "ema"  # class default
    assert (config.train.lr, config.train.prompts, config.train.steps) == (1e-3, 32, 7)
    assert load(recipe("method: {module: vopd.vision_opd, top_k: 5}\n"), []).method.top_k == 5


@pytest.mark.parametrize("name", ["vision_opd_jsd", "vision_opd_teacher_ema"])
def test_another_name_of_a_recipe_is_that_recipe_with_its_folder(name: str) -> None:
    words = ["seed=3", "train.steps=2"]
    assert load(f"ablations/{name}", words) == load("vision_opd", words)


def test_no_two_recipes_repeat_each_other() -> None:
    found: dict[str, str] = {}
    for name in module.recipes():
        config = load(name, [])
        place = config.run_dir
        config.recipe = config.recipe_folder = config.run_dir = ""
        found[place] = OmegaConf.to_yaml(config)
    assert len(set(found.values())) == len(found) == len(module.recipes()) - 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("same_as: vision_opd\ntrain: {steps: 2}\n", "same_as names another recipe and stands alone"),
        ("same_as: [vision_opd]\n", "same_as names another recipe and stands alone"),
        ("same_as: ablations/vision_opd_jsd\n", "is itself the same as another recipe"),
        ("same_as: vision_opt\n", "There is no recipe 'vision_opt'"),
    ],
)
def test_another_name_of_a_recipe_is_refused(recipe, text: str, sentence: str) -> None:
    assert sentence in refusal(recipe(text), [])


def test_the_run_folder_names_profile_recipe_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOPD_RUNS", raising=False)
    assert load("vision_opd", ["seed=3"]).run_dir == "runs/miniature/vision_opd/seed3"
    monkeypatch.setenv("VOPD_RUNS", "/elsewhere")
    assert load("vision_opd", []).run_dir == "/elsewhere/miniature/vision_opd/seed0"


def test_a_recipe_outside_the_repository_brings_its_module(recipe, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Settings:\n    alpha: float = 0.5\n"
    )
    config = load(recipe("method: {module: own.py}\n"), ["method.alpha=0.25"])
    assert (config.method.alpha, config.recipe) == (0.25, "mine")
    assert Path(config.recipe_folder) == tmp_path


@pytest.mark.parametrize("profile", sorted(p.stem for p in (ROOT / "recipes" / "profiles").glob("*.yaml")))
@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_loads_with_every_profile(name: str, profile: str) -> None:
    config = load(name, [f"profile={profile}"])
    assert (config.recipe, config.profile) == (name, profile)
    assert not OmegaConf.missing_keys(config)


def test_offload_is_taken_on_gpus() -> None:
    given = ["train.teachers_on_host=true", f"{FSDP}.param_offload=true", f"{FSDP}.optimizer_offload=true"]
    config = load("vision_opd", ["hardware.device=cuda", *given])
    assert config.train.teachers_on_host
    assert config.verl.actor_rollout_ref.actor.fsdp_config.optimizer_offload


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("vision_odp", [], "no recipe 'vision_odp'; known are .*vision_opd"),
        ("missing/file.yaml", [], "no recipe 'missing/file.yaml'"),
        ("vision_opd", ["profile=mini"], "no profile 'mini'; known are miniature"),
        ("vision_opd", ["seed"], "'seed' is not a setting"),
        ("vision_opd", ["seed=one"], "seed.*'one'|'one'.*Integer"),
        ("vision_opd", ["train.lr=fast"], "'fast'"),
        ("vision_opd", ["train.steps=2.5"], "2.5"),
        ("vision_opd", ["train={"], "not understood"),
        ("vision_opd", ["train.teachers_on_host=true"], "needs hardware.device=cuda"),
        ("vision_opd", [f"{FSDP}.param_offload=true"], "param_offload=true needs hardware.device=cuda"),
        ("vision_opd", [f"{FSDP}.optimizer_offload=true"], "optimizer_offload=true needs hardware"),
        (
            "vision_opd",
            [f"{FSDP}.offload_policy=true"],
            "offload_policy=true is not supported.*param_offload",
        ),
        (
            "vision_opd",
            ["hardware.device=cuda", f"{FSDP}.offload_policy=true"],
            "offload_policy=true is not supported",
        ),
    ],
)
def test_bad_overrides_are_refused_with_a_sentence(name: str, overrides: list[str], sentence: str) -> None:
    assert re.search(sentence, refusal(name, overrides)), refusal(name, overrides)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("method: {beta: 0.5}\n", "method.module is missing"),
        ("method: {module: vopd.vision_opd}\ntrain: {lr: fast}\n", "fast"),
        ("method: [\n", "not readable as YAML"),
        ("- 1\n", "a mapping of keys is expected"),
        ("method: {module: gone.py}\n", "no such file"),
    ],
)
def test_bad_recipes_are_refused_with_a_sentence(recipe, text: str, sentence: str) -> None:
    assert sentence in refusal(recipe(text), [])


def unknown_keys(recipe) -> dict[str, str]:
    """Where an unknown key stands -> the sentence it is refused with."""
    module_line = "method: {module: vopd.vision_opd}\n"
    profile = Path(recipe("model: {path: x}\ndata: {folder: y}\ntrain: {setps: 3}\n", "profile"))
    return {
        "recipe": refusal(recipe(module_line + "train: {setps: 3}\n"), []),
        "recipe top level": refusal(recipe(module_line + "sede: 3\n"), []),
        "method": refusal(recipe("method: {module: vopd.vision_opd, setps: 0.1}\n"), []),
        "profile": refusal("vision_opd", [f"profile={profile}"]),
        "override": refusal("vision_opd", ["train.setps=3"]),
        "override for the method": refusal("vision_opd", ["method.setps=3"]),
        "override at top level": refusal("vision_opd", ["sede=3"]),
    }


def check_unknown_keys_refused(recipe) -> None:
    for place, sentence in unknown_keys(recipe).items():
        assert re.search("setps|sede", sentence), f"{place}: {sentence!r}"


def test_unknown_keys_are_errors_everywhere(recipe) -> None:
    check_unknown_keys_refused(recipe)


def test_settings_twin_an_untyped_tree_is_seen(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = OmegaConf.structured(Run)
    loose = OmegaConf.create(OmegaConf.to_container(typed, resolve=False))
    monkeypatch.setattr(OmegaConf, "structured", lambda _: loose.copy())
    monkeypatch.setattr(Tree, "_fault", lambda *_: None)
    with pytest.raises(AssertionError):
        check_unknown_keys_refused(recipe)


# ---- every key is read ---------------------------------------------------------------------------------------------


def chain(node: ast.AST) -> str | None:
    """`a.b.c` of an attribute chain."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = chain(node.value)
        return head and f"{head}.{node.attr}"
    return None


def assignments(tree: ast.AST) -> dict[str, str]:
    """Names that stand for an attribute chain, single or in a tuple."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
            known |= {t.id: c for t, v in pairs if isinstance(t, ast.Name) and (c := chain(v))}
    return known


@cache
def keys_read() -> set[str]:
    """Dotted tails of everything that code or verl's mapping reads: `train.steps`, `seed`, ..."""
    found = set()
    for path in SOURCES:
        if path.name == "config.py":
            continue
        tree = ast.parse(path.read_text())
        alias = assignments(tree)
        strings = {
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (dotted := chain(node)):
                head, _, tail = dotted.partition(".")
                found.add(f"{alias.get(head, head)}.{tail}")
            elif isinstance(node, ast.Subscript) and (dotted := chain(node.value)):
                found |= {f"{dotted}.{s}" for s in strings}
    for path in MAPPINGS:
        found |= set(re.findall(r"\$\{(?:\w+:)?(vopd[\w.]+)", path.read_text()))
        found |= set(re.findall(r"\$\{(vopd[\w.]+)\}", path.read_text()))
    tails = set()
    for dotted in found:
        overrides = dotted.split(".")
        tails |= {".".join(overrides[i:]) for i in range(1, len(overrides))}
    return tails


def check_every_key_is_read(run: type) -> None:
    read = keys_read()
    unread = []
    for section in fields(run):
        kind = getattr(module, str(section.type), section.type)
        names = [f"{section.name}.{f.name}" for f in fields(kind)] if is_dataclass(kind) else [section.name]
        unread += [name for name in names if name not in read]
    assert unread == []


def test_every_key_of_a_run_is_read_somewhere() -> None:
    check_every_key_is_read(Run)


def test_settings_twin_a_key_that_nothing_reads_is_seen() -> None:
    train = make_dataclass("Train", [("ema_updtae_rate", float, field(default=0.05))], bases=(module.Train,))
    run = make_dataclass("Run", [("train", train, field(default_factory=train))], bases=(Run,))
    with pytest.raises(AssertionError, match="ema_updtae_rate"):
        check_every_key_is_read(run)
    with pytest.raises(AssertionError, match="sede"):
        check_every_key_is_read(make_dataclass("Run", [("sede", int, field(default=0))], bases=(Run,)))


def test_a_row_must_fit_into_a_micro_batch() -> None:
    said = refusal("grpo", ["train.max_tokens_per_micro_batch=199"])
    assert "are 200 tokens, more than train.max_tokens_per_micro_batch=199" in said
    assert refusal("grpo", ["train.max_tokens_per_micro_batch=200"]) == ""
