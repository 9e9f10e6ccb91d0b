"""`vopd run RECIPE [key=value ...]`: check, prepare, train, evaluate, print the result.

RECIPE is a name below recipes/ or the path of a YAML file. The rest are Hydra overrides; `profile=NAME` chooses
hardware, model and data size. Results land in runs/<profile>/<recipe>/seed<k>/. The same command resumes an interrupted
run from its last checkpoint (docs/resuming.md); a finished one is shown again. Either is refused if what it was made
from has changed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vopd import method as contract
from vopd.backbone import checkpoints
from vopd.common import (
    caches,
    environment_checks,
    files,
    fingerprint,
    library_environment,
    loopback,
    provenance,
    temporary,
)
from vopd.common.failures import Failure
from vopd.common.terminal import Terminal, say
from vopd.config import ROOT, defaults, load, recipes
from vopd.errors import UserError
from vopd.method import final_views, place
from vopd.runner import lock, result_checks, run_fingerprint, supervisor, trackers
from vopd.runner.run_folder import RunFolder, differences, that_matter

if TYPE_CHECKING:
    from vopd.runner.estimate import Estimate

COLUMNS = ("id", "image", "crop", "question", "options", "answer", "answer_type", "family", "split")
SPLITS = ("train", "validation", "test")
HOLD_OUT = "holdout"  # a family that training never sees; a data set need not have one
INTERRUPTED = 130


def _interrupt(*_: Any) -> None:
    """SIGTERM ends a run the way Ctrl-C does: the training process must not continue alone."""
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input, 130 after Ctrl-C, 1 otherwise."""
    console = Terminal()
    run: Run | None = None
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(help_text())
            return 0
        if (words := check_alone(arguments)) is not None:
            Run(words[0], words[1:], console).only_check()
            return 0
        if "--help" in arguments or "-h" in arguments:
            print(OmegaConf.to_yaml(load(arguments[0], [a for a in arguments[1:] if not a.startswith("-")])))
            return 0
        run = Run(arguments[0], arguments[1:], console)
        return run.go()
    except UserError as error:
        say(f"vopd: {error}")
        return UserError.exit_code
    except KeyboardInterrupt:
        say(f"vopd: interrupted; {run.left() if run else 'nothing was begun'}.")
        return INTERRUPTED


def check_alone(arguments: list[str]) -> list[str] | None:
    """The arguments without `check=true` where it is among them: the run is only checked. None for a run.

    Raises:
        UserError: another value than true.
    """
    given = [argument for argument in arguments if argument.startswith("check=")]
    if not given:
        return None
    if set(given) != {"check=true"}:
        raise UserError(f"{given[0]}: only check=true is known; leave it out for the run itself.")
    return [argument for argument in arguments if argument not in given]


def help_text() -> str:
    """Usage and every setting that all recipes share, with its default on the miniature."""
    return (
        "usage: vopd run RECIPE|FILE.yaml [key=value ...]   (the same: bash scripts/run_recipe.sh ...)\n"
        "       vopd run RECIPE --help                      settings of that recipe, the method's own among them\n"
        "       vopd run RECIPE [key=value ...] check=true  what it would take, and whether it could start here\n\n"
        "examples: vopd run vision_opd seed=1 train.steps=20 run_dir=runs/short\n"
        "          vopd run my_recipe.yaml profile=qwen3_5_4b_8gpu\n\n"
        f"recipes: {', '.join(recipes())}\n\n"
        "Settings and their defaults on the profile miniature; profile=NAME takes another profile, verl.KEY=VALUE\n"
        f"reaches verl's own settings:\n\n{OmegaConf.to_yaml(defaults())}"
    )


class Run:
    """One run, from settings to the printed result."""

    def __init__(self, recipe: str, overrides: list[str], console: Console) -> None:
        self.config = _absolute(load(recipe, overrides))
        self.folder = Path(self.config.run_dir)
        self.files = RunFolder(self.folder)
        self.console = console
        self.method = contract.of(self.config)
        self.other_settings = False  # than those of what the folder holds

    def go(self) -> int:
        """Train and evaluate unless that is done already; print the result. The folder is this run's meanwhile."""
        self.files.settings()  # nothing is written into what is not a run's, not even a lock
        with lock.held(caches.results_folder(self.folder), self._say) as self.lock:
            return self._go()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _go(self) -> int:
        longer_than = self._claim_folder()
        if longer_than or not self.files.finished:
            self.check()
            self._begin()
            if longer_than:
                self.files.reopen(longer_than)
            self.files.write_settings(self.config)
            outcome = self._train()
            if outcome.code:
                return outcome.code  # its cause is told
            self._summarise(outcome)
        else:
            self._check_finished()
            self.console.print("finished before; remove the folder to run it again")
        troubles = result_checks.troubles(self.folder, place(self.method, "score"))
        for trouble in troubles:
            say(f"vopd: {trouble}")
        self.console.print(self.files.summary_text.read_text(), markup=False, soft_wrap=True)
        self.console.print(f"records, plots and the trained model: {self.folder}", soft_wrap=True)
        return 1 if troubles else 0

    # ---- before anything starts ---------------------------------------------------------------------------------

    def _claim_folder(self) -> int:
        """Refuse a folder that is not a run's, or that holds results of other settings.

        Returns the updates of a finished run that is to be trained further, 0 otherwise.
        """
        before = self.files.settings()
        caches.results_folder(self.folder)
        return self._check_same(before) if before is not None else 0

    def _check_same(self, before: dict[str, Any]) -> int:
        now = _plain(self.config)
        changed = that_matter(differences(now, before))
        if changed and self.files.has_results():
            then, value = (OmegaConf.select(OmegaConf.create(tree), changed[0]) for tree in (before, now))
            raise UserError(
                f"{self.folder} holds a run with another {changed[0]}: {then!r} then, {value!r} now; remove it or give "
                "another run_dir."
            )
        self.other_settings = bool(changed)
        steps, finished = before["train"]["steps"], self.files.finished
        self.files.check_steps(now["train"]["steps"], self.method.rollout.weights == "initial")
        return int(steps) if finished and now["train"]["steps"] != steps else 0

    def left(self) -> str:
        """What an interrupted run can do next, as a sentence."""
        found = checkpoints.found(self.files.checkpoints)
        if not found:
            return "there is no checkpoint yet: the same command starts it again"
        return f"the same command resumes it from update {found[0].step}"

    def _check_finished(self) -> None:
        """Refuse to show the result of other code, data or weights as the result of those of now."""
        file = self.files.summary
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))["run"]
            recorded = facts.get("fingerprint")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is not the summary of a run; remove the folder to run it again."
            ) from error
        if recorded:  # else there is nothing to compare with, and the data need not be made
            self.prepare_data()
        if why := fingerprint.why(recorded, run_fingerprint.of(self) if recorded else {}):
            raise UserError(
                f"{self.folder} holds the result of a run with other inputs than now: {why}; give another "
                "run_dir=... to keep it, or remove the folder to run it again."
            )
        if not self.files.summary_text.exists():  # killed between the two
            from vopd.report.run_summary import render, summarise

            files.write_text(self.files.summary_text, render(summarise(self.folder, facts)))

    def _begin(self) -> None:
        """Resume what is in the folder only if it was started with the inputs of now; write these down."""
        now = run_fingerprint.of(self)
        why = fingerprint.why(self.files.inputs(), now)
        if why or self.other_settings:
            if self.files.has_results():
                raise UserError(
                    f"{self.folder} holds an unfinished run with other inputs than now: {why}; give another "
                    "run_dir=... to keep it, or remove the folder to begin anew."
                )
            # No update was made yet: the base model's answers are asked anew, or taken from where they are kept.
            self.files.forget_evaluations()
            fingerprint.write(self.folder, now)
        self.origin = {  # as it is now: edits during the run have no part in it
            "code": provenance.code_version(ROOT),
            "code_hash": provenance.code_hash(ROOT),
            "scorer": provenance.scorer(ROOT),
            "fingerprint": now,
        }

    def check(self) -> None:
        """Raise UserError for what would stop this run before its first update, as far as it can be known."""
        from vopd.backbone import recorded_rollouts
        from vopd.common import (  # slow to import: not for --help and mistyped overrides
            model_config,
            model_folder,
        )
        from vopd.runner import preflight

        config = self.config
        from vopd.method_checks import checked_record  # pulls in torch

        checked_record(self.method)
        variables = library_environment.variables(config.hardware.device)
        here = environment_checks.machine(config.hardware.device)
        for note in environment_checks.prepare_run(config, os.environ, variables, caches.place(), here):
            self.console.print(note, markup=False, soft_wrap=True)
        environment_checks.check_disk(self.folder, config.hardware.disk_gib)
        environment_checks.check_memory(config.hardware.memory_gib, config.profile)
        trackers.check(config.logging)
        preflight.check_attention(config.train.packed, config.model.attention)
        # A name that is no folder is a hub id, except on a CPU machine, which works offline.
        model = Path(config.model.path)
        if config.hardware.device == "cpu" or model.is_absolute() or model.exists():
            model_folder.check(model)
        tokens = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        model_config.check(
            model_config.read(config.model.path),
            config.model.path,
            self.method.least_vocabulary,
            tokens,
            config.rollout.tensor_parallel,
        )
        self._check_size()
        if config.rollout.replay:
            recorded_rollouts.check(
                Path(config.rollout.replay), config.train.steps, config.train.prompts, config.train.rollouts
            )
        self.prepare_data()
        for split in self.splits():
            preflight.check_parquet(Path(config.data.folder) / f"{split}.parquet", COLUMNS)
        preflight.check_enough_rows(Path(config.data.folder) / "train.parquet", config.train.prompts)
        self.data_hash()
        self._check_prompts()

    def only_check(self) -> None:
        """Print what the run would take and what is here, then check as a run does before it starts.

        Raises:
            UserError: as `check`, or a `verl.` setting that verl refuses.
        """
        from vopd.runner import check_report  # pulls in torch

        self._say("\n".join(check_report.lines(self.config, self.method, self.estimate())))
        self.check()
        check_report.check_verl(self.config)
        self._say(f"{self.config.recipe}: settings, data, model and machine are as a run needs them")

    def estimate(self) -> Estimate | str:
        """What the run will take, or why that cannot be said."""
        from vopd.common import model_shape
        from vopd.runner.estimate import estimate

        try:
            shape = model_shape.read(self.config.model.path)
        except UserError as error:
            return str(error)
        return estimate(self.config, self.method, shape)

    def _check_size(self) -> None:
        """Refuse GPUs, memory or a disk that are too small for what the run is estimated to take."""
        from vopd.common import gpu_checks

        hardware, found = self.config.hardware, self.estimate()
        if hardware.device == "cuda" and hardware.nodes == 1:
            gpus = gpu_checks.gpus(gpu_checks.visible_devices())[: hardware.devices_per_node]
            gpu_checks.check_driver(gpus, gpu_checks.torch_cuda())
            gpu_checks.check_compiler(gpu_checks.compiler(os.environ), gpu_checks.python_header())
            if not isinstance(found, str):
                share = self.config.rollout.memory_share
                beside, least = found.beside_rollout_bytes, found.least_rollout.value
                gpu_checks.check_memory(gpus, beside, found.update_bytes, least, share)
        if isinstance(found, str):
            self.console.print(f"nothing is estimated: {found}", markup=False, soft_wrap=True)
            return
        environment_checks.check_disk(self.folder, round(found.disk_bytes / 1e9, 1))
        environment_checks.check_memory(round(found.host_bytes / 2**30, 1), self.config.profile)

    def prepare_data(self) -> None:
        """Run the module that makes the data, if the profile names one and the data is not someone else's."""
        from data import folders  # pulls in pyarrow

        prepare, place = self.config.data.prepare, Path(self.config.data.folder)
        if prepare is None or not folders.needs_preparing(place, prepare):
            return
        command = supervisor.python("-m", self.config.data.prepare, "--out", self.config.data.folder)
        # Its progress bars are for the user; the file is read for the error, which comes last.
        with tempfile.TemporaryFile() as file:
            errors = None if self.console.is_terminal else file
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
            file.seek(0)
            output = file.read().decode(errors="replace")
        if done.returncode:
            lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
            said = f" ({lines[-1].strip().rstrip('.')})" if lines else ""
            raise UserError(
                f"{self.config.data.prepare}: could not make the data in {self.config.data.folder}{said}."
            )

    def _check_prompts(self) -> None:
        """Every prompt of every split in every view fits; remembered by hash, because it takes seconds on 6K rows."""
        config = self.config
        views = sorted(final_views(self.method))
        template = _plain(config.rollout.chat_template)
        code = fingerprint.files(
            [ROOT / "vopd" / "prompt_lengths.py", *run_fingerprint.view_files(views, config)],
            config.recipe_folder,
        )
        limit = config.rollout.max_prompt_tokens
        key = provenance.hash_json(
            [self.data_hash(), self.model_hash(), limit, template, views, code, fingerprint.libraries()]
        )
        if caches.read("checked_prompts", key) is not None:
            return
        from data import schema
        from vopd import prompt_lengths
        from vopd.common import model_folder

        processor, folder = model_folder.load_processor(config.model.path), Path(config.data.folder)
        for split in self.splits():
            rows = schema.rows(
                folder / f"{split}.parquet", ("id", "image", "crop", "question", "answer", "options")
            )
            outlined = (schema.outline(row, folder) for row in rows)
            prompt_lengths.check_prompt_lengths(outlined, processor, limit, views, template)
        caches.store("checked_prompts", key)

    def splits(self) -> list[str]:
        """Names of the splits of this run: the held-out one too if the data has it."""
        from data import schema

        there = {path.stem for path in schema.splits(Path(self.config.data.folder))}
        return [*SPLITS, *({HOLD_OUT} & there)]

    def data_hash(self) -> str:
        """Hash of the splits; `UserError` if they are not as `data.validate` saw them."""
        if not hasattr(self, "_data_hash"):
            from data import validation_stamp

            hashes = validation_stamp.check(Path(self.config.data.folder), self.splits())
            self._data_hash = provenance.hash_json(hashes)
        return self._data_hash

    def model_hash(self) -> str:
        """Hash of the model folder's files; of name and revision for a model on the hub."""
        if not hasattr(self, "_model_hash"):
            self._model_hash = provenance.model_hash(self.config.model.path)
        return self._model_hash

    # ---- the run ------------------------------------------------------------------------------------------------

    def _train(self) -> supervisor.Outcome:
        self.files.failure.unlink(missing_ok=True)
        key = provenance.hash_json(run_fingerprint.answers(self, final_views(self.method)))
        kept = self.files.take_base_answers(key)
        self.console.print(
            f"{self.config.recipe} on {self.config.profile}, seed {self.config.seed}: {self.config.train.steps} "
            f"updates of {self.config.train.prompts} prompts x {self.config.train.rollouts}\n"
            f"{self._from_where()}"
            f"starting Ray, the trainer and vLLM (log: {self.files.log})"
        )
        with temporary.scratch() as place:
            env = {
                **os.environ,
                **library_environment.variables(self.config.hardware.device),
                **temporary.environment(place),
            }
            if self.config.hardware.nodes == 1:
                env |= loopback.start(place)
            command = supervisor.python("-m", "vopd.backbone.launch", str(self.folder))
            outcome = supervisor.run(command, self.folder, env, ROOT, self.console, self.lock, self._tell)
        if not kept:
            self.files.keep_base_answers(key)
        return outcome

    def _from_where(self) -> str:
        """Look at the checkpoints, so that the trainer finds the newest whole one, and say which that is."""
        newest, damaged = checkpoints.newest_whole(self.files.checkpoints)
        lines = [f"{sentence}; an older one is taken" for sentence in damaged]
        lines += [f"resuming from the checkpoint of update {newest.step}"] if newest else []
        return "".join(f"{line}\n" for line in lines)

    def _tell(self, failure: Failure) -> None:
        raised = f"raised in the {failure.process}; " if failure.process else ""
        say(f"vopd: {failure.line()}", f"vopd: {raised}full log: {self.files.log}")

    def _summarise(self, outcome: supervisor.Outcome) -> None:
        from vopd.report.plots import plot_run  # pulls in matplotlib and scipy
        from vopd.report.run_summary import render, summarise

        extra: dict[str, Any] = {
            "recipe": self.config.recipe,
            "profile": self.config.profile,
            "seed": self.config.seed,
            **self.origin,
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
        files.write_text(self.files.summary_text, text)


def _absolute(config: DictConfig) -> DictConfig:
    """Paths of the repository's own things hold from any current folder."""
    runs = Path(config.run_dir)
    config.run_dir = str(runs if runs.is_absolute() else ROOT / runs)
    config.data.folder = str(caches.inside(config.data.folder))
    if config.rollout.replay:
        config.rollout.replay = str(caches.inside(config.rollout.replay))
    if (model := caches.inside(config.model.path)).exists():
        config.model.path = str(model)
    return config


def _plain(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(sys.argv[1:]))
