"""Models, files and addresses from outside that would run code, reach out of their folder, or tell a secret."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.bad_inputs import Case

BASE = Path(__file__).resolve().parents[2] / "data" / "miniature" / "base"
NEEDS = ["hardware.memory_gib=0.01", "hardware.disk_gib=0.01"]
OBJECT = "!!python/object/apply:os.system ['touch was_run']"
BARE = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": "/nowhere/netrc"}
Change = Callable[[Path], object]


def _model(folder: Path, change: Change) -> Path:
    """A copy of the miniature model in which one thing was changed."""
    model = folder / "model"
    shutil.copytree(BASE, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "model.safetensors").symlink_to(BASE / "model.safetensors")
    change(model)
    return model


def _run(change: Change) -> Callable[[Path], list[str]]:
    """The arguments of a run on such a model."""
    return lambda folder: [
        "vision_opd",
        f"model.path={_model(folder, change)}",
        f"run_dir={folder / 'run'}",
        *NEEDS,
    ]


def _auto_map(name: str) -> Change:
    def change(model: Path) -> None:
        file = model / name
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}})
        )
        (model / "evil.py").write_text("raise SystemExit('this was run')")

    return change


def _index(name: str) -> Change:
    content = json.dumps({"weight_map": {"a": name}})
    return lambda model: (model / "model.safetensors.index.json").write_text(content)


def _pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def _hole(name: str) -> Change:
    def change(model: Path) -> None:
        with (model / name).open("r+b") as file:
            file.truncate(8 * 2**30)  # takes no room on disk

    return change


def _validate(template: str) -> Callable[[Path], list[str]]:
    """The arguments that check prompts with such a model's chat template."""

    def arguments(folder: Path) -> list[str]:
        model = _model(folder, lambda made: (made / "chat_template.jinja").write_text(template))
        return [str(folder), "--model", str(model)]

    return arguments


def _yaml(*arguments: str) -> Callable[[Path], list[str]]:
    """`arguments`, in which FILE is a YAML file that would make an object."""

    def made(folder: Path) -> list[str]:
        (folder / "made.yaml").write_text(f"method: {OBJECT}\nname: {OBJECT}\n")
        return [argument.replace("FILE", str(folder / "made.yaml")) for argument in arguments]

    return made


def _wandb(folder: Path) -> list[str]:
    return ["vision_opd", "logging.wandb=true", f"run_dir={folder / 'run'}", *NEEDS]


CASES = (
    Case(
        "model with code, config",
        "vopd.runner.run",
        _run(_auto_map("config.json")),
        "code from a model folder is never",
    ),
    Case(
        "model with code, tokenizer", "vopd.runner.run", _run(_auto_map("tokenizer_config.json")), "auto_map"
    ),
    Case(
        "model with code, processor", "vopd.runner.run", _run(_auto_map("processor_config.json")), "auto_map"
    ),
    Case("weights as a pickle", "vopd.runner.run", _run(_pickled), "pickled weights are not loaded"),
    Case(
        "weights' index leads out",
        "vopd.runner.run",
        _run(_index("../../x.safetensors")),
        "'../../x.safetensors'",
    ),
    Case(
        "weights' index names a pickle",
        "vopd.runner.run",
        _run(_index("pytorch_model.bin")),
        "only *.safetensors",
    ),
    Case(
        "tokenizer of 8 GiB", "vopd.runner.run", _run(_hole("tokenizer.json")), "tokenizer.json: longer than"
    ),
    Case(
        "chat template of 8 GiB",
        "vopd.runner.run",
        _run(_hole("chat_template.jinja")),
        "chat_template.jinja: longer",
    ),
    Case(
        "chat template reaches for Python",
        "data.validate",
        _validate("{{ ''.__class__.__mro__ }}"),
        "access to attribute '__class__'",
    ),
    Case("chat template fills the memory", "data.validate", _validate("{{ 'a' * 10**11 }}"), "MemoryError"),
    Case("chat template is not a template", "data.validate", _validate("{% for"), "TemplateSyntaxError"),
    Case("recipe that makes an object", "vopd.runner.run", _yaml("FILE"), "the tag !!python/object"),
    Case(
        "benchmark that makes an object",
        "vopd.evaluation.evaluate",
        _yaml("model=m", "benchmarks=[FILE]"),
        "made.yaml",
    ),
    Case(
        "synthesis settings that make an object", "data.synthesize", _yaml("FILE"), "the tag !!python/object"
    ),
    Case(
        "recipe's name with a control sequence",
        "vopd.runner.run",
        lambda _: ["x\x1b[2J"],
        "no recipe 'x␛[2J'",
    ),
    Case(
        "password in a server's address",
        "vopd.evaluation.evaluate",
        lambda _: ["model=m", "benchmarks=[pope]", "endpoint=http://me:secret@127.0.0.1/v1"],
        "endpoint: the address holds a user or password",
    ),
    Case(
        "password in the synthesis server's address",
        "data.synthesize",
        lambda folder: [
            f"images={folder}",
            "source=s",
            "licence=l",
            f"out={folder / 'out'}",
            "server.model=m",
            "server.base_url=http://me:secret@127.0.0.1/v1",
        ],
        "server.base_url: the address holds a user or password",
    ),
    Case("wandb without a key", "vopd.runner.run", _wandb, "there is no key for", environment=BARE),
    Case(
        "wandb without a network",
        "vopd.runner.run",
        _wandb,
        "WANDB_MODE=offline",
        environment=BARE | {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    ),
)
