"""`python -m vopd.run RECIPE [key=value ...]`: check, prepare, train, evaluate, print the result.

RECIPE is a name below recipes/ or the path of a YAML file. The words are Hydra overrides; `profile=NAME` chooses
hardware, model and data size. Results land in runs/<profile>/<recipe>/seed<k>/. An interrupted run goes on where its
last checkpoint is; a finished one is shown again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vopd import loopback, provenance, scratch, trackers, watch
from vopd.backbone.launch import FAILURE, environment
from vopd.config import ROOT, load
from vopd.errors import UserError
from vopd.method import build, final_views
from vopd.terminal import Terminal, say

COLUMNS = ("id", "image", "crop", "question", "options", "answer", "answer_type", "family", "split")
SPLITS = ("train", "validation", "test")
HOLD_OUT = "holdout"  # a family that training never sees; a data set need not have one
INTERRUPTED = 130


def _interrupt(*_: Any) -> None:
    """SIGTERM ends a run the way Ctrl-C does: the training process must not go on alone."""
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input, 130 after Ctrl-C, 1 otherwise."""
    console = Terminal()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(help_text())
            return 0
        if "--help" in arguments or "-h" in arguments:
            print(OmegaConf.to_yaml(load(arguments[0], [a for a in arguments[1:] if not a.startswith("-")])))
            return 0
        return Run(arguments[0], arguments[1:], console).go()
    except UserError as error:
        say(f"vopd: {error}")
        return UserError.exit_code
    except KeyboardInterrupt:
        print("vopd: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return INTERRUPTED


def help_text() -> str:
    """Usage and every setting with its default on the miniature."""
    settings = OmegaConf.to_yaml(load("vision_opd", []))
    return (
        "usage: bash scripts/run_recipe.sh RECIPE|FILE.yaml [key=value ...]\n"
        "       bash scripts/run_recipe.sh RECIPE --help      (settings of that recipe)\n\n"
        "Settings and their defaults (recipe vision_opd, profile miniature); profile=NAME takes another profile,\n"
        "verl.KEY=VALUE reaches verl's own settings:\n\n" + settings
    )


class Run:
    """One run, from settings to the printed result."""

    def __init__(self, recipe: str, words: list[str], console: Console) -> None:
        self.config = _absolute(load(recipe, words))
        self.folder = Path(self.config.run_dir)
        self.console = console
        self.method = build(_plain(self.config.method), Path(self.config.recipe_folder))

    def go(self) -> int:
        """Train and evaluate unless that is done already; print the result."""
        self._claim_folder()
        if not (self.folder / "summary.json").exists():
            self._check()
            outcome = self._train()
            if outcome.code:
                return self._fail(outcome.code)
            self._summarise(outcome)
        else:
            self.console.print("finished before; remove the folder to run it again")
        self.console.print((self.folder / "summary.txt").read_text(), markup=False, soft_wrap=True)
        self.console.print(f"records, plots and the trained model: {self.folder}", soft_wrap=True)
        return 0

    # ---- before anything starts ---------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        """Refuse a folder that holds results of other settings."""
        file = self.folder / "config.yaml"
        if file.exists():
            settings = OmegaConf.to_container(self.config, resolve=True)
            differs = sorted(differences(settings, OmegaConf.to_container(OmegaConf.load(file))))
            if differs and (self.folder / "metrics.jsonl").exists():
                raise UserError(
                    f"{self.folder} holds a run with another {differs[0]}; remove it or give another run_dir."
                )
            if differs:
                shutil.rmtree(self.folder / "records", ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, file)

    def _check(self) -> None:
        from vopd import preflight  # both pull in pyarrow: not for --help and mistyped words
        from vopd.backbone import recording

        config = self.config
        preflight.check_disk(self.folder, config.hardware.disk_gib)
        preflight.check_memory(config.hardware.memory_gib, config.profile)
        trackers.check(config.logging)
        preflight.check_attention(config.train.packed, config.model.attention)
        # A name that is no folder is a hub id, except on a CPU machine, which works offline.
        model = Path(config.model.path)
        if config.hardware.device == "cpu" or model.is_absolute() or model.exists():
            preflight.check_model_folder(model)
        if config.rollout.replay:
            recording.check(
                Path(config.rollout.replay), config.train.steps, config.train.prompts, config.train.rollouts
            )
        self.prepare_data()
        for split in self.splits():
            preflight.check_parquet(Path(config.data.folder) / f"{split}.parquet", COLUMNS)
        self.data_hash()
        self._check_prompts()

    def prepare_data(self) -> None:
        """Run the module that makes the data, if the profile names one; it keeps what is there already."""
        if self.config.data.prepare is None:
            return
        command = watch.python("-m", self.config.data.prepare, "--out", self.config.data.folder)
        # Its progress bars are for a person; the file is read for what went wrong, which stands last.
        log = self.folder / "prepare.txt"
        with log.open("wb") as file:
            errors = None if self.console.is_terminal else file
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        if done.returncode:
            lines = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
            said = f" ({lines[-1].strip().rstrip('.')})" if lines else ""
            raise UserError(
                f"{self.config.data.prepare}: could not make the data in {self.config.data.folder}{said}."
            )
        log.unlink()

    def _check_prompts(self) -> None:
        """Every prompt of every split in every view fits; remembered by hash, because it takes seconds on 6K rows."""
        config = self.config
        views = sorted(final_views(self.method))
        template = _plain(config.rollout.chat_template)
        key = provenance.hash_json(
            [self.data_hash(), self.model_hash(), config.rollout.max_prompt_tokens, template, views]
        )
        stamp = ROOT / ".cache" / "checked_prompts" / key
        if stamp.exists():
            return
        from data import schema
        from vopd import preflight

        processor, folder = preflight.load_processor(config.model.path), Path(config.data.folder)
        for split in self.splits():
            rows = schema.rows(
                folder / f"{split}.parquet", ("id", "image", "crop", "question", "answer", "options")
            )
            outlined = (schema.outline(row, folder) for row in rows)
            limit = config.rollout.max_prompt_tokens
            preflight.check_prompt_lengths(outlined, processor, limit, views, template)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()

    def splits(self) -> list[str]:
        """Names of the splits of this run: the hold-out is one of them if the data has it."""
        from data import schema

        there = {path.stem for path in schema.splits(Path(self.config.data.folder))}
        return [*SPLITS, *({HOLD_OUT} & there)]

    def data_hash(self) -> str:
        """Hash of the splits; `UserError` if they are not as `data.validate` saw them."""
        if not hasattr(self, "_data_hash"):
            from data import stamp

            hashes = stamp.check(Path(self.config.data.folder), self.splits())
            self._data_hash = provenance.hash_json(hashes)
        return self._data_hash

    def model_hash(self) -> str:
        """Hash of the model folder's files; of the name for a model on the hub."""
        folder = Path(self.config.model.path)
        if not folder.is_dir():
            return provenance.hash_json(str(folder))
        return provenance.hash_files(
            f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".jinja")
        )

    # ---- the run ------------------------------------------------------------------------------------------------

    def _train(self) -> watch.Outcome:
        (self.folder / FAILURE).unlink(missing_ok=True)
        cached, before = self._cached_evaluation(), self.folder / "records" / "before.jsonl"
        if cached.exists() and not before.exists():
            before.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached, before)
        self.console.print(
            f"{self.config.recipe} on {self.config.profile}, seed {self.config.seed}: {self.config.train.steps} "
            f"updates of {self.config.train.prompts} prompts x {self.config.train.rollouts}\n"
            f"starting Ray, the trainer and vLLM (log: {self.folder / 'log.txt'})"
        )
        with scratch.scratch() as place:
            env = {**os.environ, **environment(self.config), **scratch.environment(place)}
            if self.config.hardware.nodes == 1:
                env |= loopback.start(place)
            command = watch.python("-m", "vopd.backbone.launch", str(self.folder))
            outcome = watch.run(command, self.folder, env, ROOT, self.console)
        if before.exists() and not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(before, cached)
        return outcome

    def _cached_evaluation(self) -> Path:
        """Where the base model's answers are kept: the same weights, data and sampling give the same records."""
        config = self.config
        sampling = [config.rollout.max_prompt_tokens, config.rollout.max_response_tokens]
        rows = [config.evaluate.test_rows, config.evaluate.holdout_rows]
        template = _plain(config.rollout.chat_template)
        code = provenance.hash_files(
            [
                *(ROOT / "vopd/evaluation/scoring").glob("*.py"),
                ROOT / "vopd/views.py",
                ROOT / "vopd/backbone/rendering.py",
                ROOT / "vopd/vllm_delta_rule.py",
                *(ROOT / "vopd/backbone").glob("verl*.yaml"),
            ]
        )
        key = provenance.hash_json(
            [
                self.model_hash(),
                self.data_hash(),
                sampling,
                rows,
                final_views(self.method),
                template,
                code,
                provenance.library_versions(),
            ]
        )
        return ROOT / ".cache" / "evaluations" / f"{key}.jsonl"

    def _fail(self, code: int) -> int:
        file = self.folder / FAILURE
        if file.exists():
            failure = json.loads(file.read_text())
            sentence, code = failure["sentence"].splitlines()[0], failure["code"]
        else:
            sentence = f"the training process died with code {code} (out of memory?)"
        say(f"vopd: {sentence}", f"vopd: the whole story is in {self.folder / 'log.txt'}")
        return code if code in (1, UserError.exit_code) else 1

    def _summarise(self, outcome: watch.Outcome) -> None:
        from vopd.report.plots import plot_run  # pulls in matplotlib and scipy
        from vopd.report.summary import render, summarise

        extra: dict[str, Any] = {
            "recipe": self.config.recipe,
            "profile": self.config.profile,
            "seed": self.config.seed,
            "code": provenance.code_version(ROOT),
            "code_hash": provenance.code_hash(ROOT),
            "scorer": provenance.scorer(ROOT),
            "data_hash": self.data_hash(),
            "model_hash": self.model_hash(),
            "libraries": provenance.library_versions(),
            "machine": provenance.machine(self.config.hardware.device),
            "method": self.method.record(),
            "settings": OmegaConf.to_container(self.config, resolve=True),
            "wall_seconds": outcome.seconds,
            "start_up_seconds": outcome.start_up_seconds,
            "peak_memory_gib": outcome.peak_memory_gib,
        }
        summary = summarise(self.folder, extra)
        plot_run(
            self.folder, summary, f"{self.config.recipe}, {self.config.profile}, seed {self.config.seed}"
        )
        text = render(summary) + (
            f"\nwhole run {outcome.seconds:.0f} s, first step after {outcome.start_up_seconds:.0f} s, "
            f"peak memory {outcome.peak_memory_gib:.1f} GiB\n"
        )
        (self.folder / "summary.txt").write_text(text)


def _absolute(config: DictConfig) -> DictConfig:
    """Paths of the repository's own things hold from any current folder."""
    runs = Path(config.run_dir)
    config.run_dir = str(runs if runs.is_absolute() else ROOT / runs)
    config.data.folder = str(ROOT / config.data.folder)
    if config.rollout.replay:
        config.rollout.replay = str(ROOT / config.rollout.replay)
    if (ROOT / config.model.path).exists():
        config.model.path = str(ROOT / config.model.path)
    return config


def _plain(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def differences(first: Any, second: Any, prefix: str = "") -> set[str]:
    """Dotted keys whose values differ between two trees of settings."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = set(first) | set(second)
        return set().union(
            *(differences(first.get(k), second.get(k), f"{prefix}.{k}".lstrip(".")) for k in keys)
        )
    return set() if first == second else {prefix}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(sys.argv[1:]))
