"""GRPO through our recipe and through verl's own `python -m verl.trainer.main_ppo`: seconds by phase, and their ratio.

    python -m benchmarks.against_verl [--steps 7] [--prompts 32] [--rollouts 4] [--rounds 2] [--out FOLDER]

Both train the miniature's model on the same prompts in the same order, a whole process tree each, in turns. verl is
given the very settings that our run hands to it (its `verl_config.yaml`) with the keys of `stock_settings` changed: its
own trainer, data set, agent loop and loss, and no evaluation.

verl 0.9.1 as it is does not run on a CPU. What it is lent is in `benchmarks/stock_verl`: our platform, vLLM worker,
delta rule and threads (`vopd/backbone/cpu`), and our 0.02 s between two looks at the queue, where verl has a constant
of two seconds. So the ratio leaves out what these gain. In it are, on our side: one copy of a prompt and of its picture
for all its rollouts, the head on response positions alone, no pass for old log-probs where a batch makes one update.
verl makes that pass by default (its `bypass_mode` takes the rollout's log-probs instead, another estimator). Start-up
is each side's own: ours checks the data, forks its workers from one process and answers six questions before it
trains; each of verl's processes imports for itself.

Losses and gradients are compared on equal responses: our runs record their rollouts, and the first update of each of
verl's runs is made on those of ours. From the second update on verl samples, without seeds, so that the samples differ;
the first two updates are left out of the seconds on both sides. Of the learning rate's warm-up verl begins with 0 and
we with the first step above it, which changes no figure here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from omegaconf import OmegaConf

from data import schema
from vopd.backbone import recorded_rollouts
from vopd.common import files, library_environment, loopback, provenance, temporary
from vopd.common.paths import ROOT

OURS, STOCK = "ours", "verl"
PHASES = {
    "rollout": ("seconds/gen", "timing_s/gen"),
    "old log-probs": (None, "timing_s/old_log_prob"),
    "rewards and advantages": ("seconds/prepare", "timing_s/adv"),
    "student's update": ("seconds/update_actor", "timing_s/update_actor"),
    "weight sync": ("seconds/update_weights", "timing_s/update_weights"),
    "step": ("seconds/step", "timing_s/step"),
}
"""Phase -> its name in our metrics.jsonl and in verl's metrics. verl computes rewards during the rollout."""
FACTS = {
    "prompt tokens": ("prompt_length", "prompt_length/mean"),
    "response tokens": ("response_length", "response_length/mean"),
    "accuracy": ("rollout_accuracy", "critic/score/mean"),
    "loss": ("loss", "actor/pg_loss"),
    "gradient norm": ("grad_norm", "actor/grad_norm"),
}
ONCE = (
    "evaluate.test_rows=2", "evaluate.holdout_rows=2", "evaluate.validation_rows=2", "evaluate.every=0",
    "train.save_every=0", "train.save_minutes=1000", "rollout.record=true",
)  # fmt: skip
POLL_SECONDS = 0.02  # as in vopd/backbone/trainer.py, which takes half a minute to import
LOOK_SECONDS = 0.05
WARM_UP = 2
"""Updates at a run's start that are left out of the seconds."""
AGENT = {"name": "recorded", "_target_": "benchmarks.stock_verl.recorded_agent.RecordedAgent"}


@dataclass
class Run:
    """What one process tree did.

    Attributes:
        start: seconds from its start to the end of the first update.
        loop: seconds from the end of an update to that of the next one, warm-up left out, and the last one, behind
            which we evaluate.
        updates: phase or fact -> value, one mapping an update.
    """

    side: str
    start: float
    loop: list[float]
    updates: list[dict[str, float]]


# ---- settings and data ----------------------------------------------------------------------------------------------


def stock_settings(steps: int, paths: Mapping[str, str]) -> dict[str, Any]:
    """What verl's own run has otherwise than ours, as a tree of overrides.

    Args:
        steps: updates.
        paths: `train`, `validation` (data in verl's format), `agents`, and `ray`, a folder for Ray's sockets.
    """
    package = "benchmarks.stock_verl"
    return {
        "trainer": {
            "total_training_steps": steps,
            "logger": ["file"],
            "val_before_train": False,
            "test_freq": -1,
            "v1": {
                "trainer_mode": "sync",
                "sampler": {
                    "custom_sampler": {"path": f"pkg://{package}.sampler", "name": "Buffer"},
                    "sampler_kwargs": {"poll_seconds": POLL_SECONDS},
                },
            },
        },
        "data": {
            "train_files": [paths["train"]],
            "val_files": [paths["validation"]],
            "custom_cls": {"path": None, "name": None},
        },
        "reward": {
            "num_workers": 1,
            "custom_reward_function": {"path": f"pkg://{package}.reward"},
        },
        "transfer_queue": {"enable": True},
        "ray_kwargs": {"ray_init": {"_temp_dir": paths["ray"]}},
        "actor_rollout_ref": {
            "model": {"external_lib": f"{package}.trainer_worker"},
            "actor": {"loss_agg_mode": "seq-mean-token-mean"},
            "rollout": {
                "agent": {
                    "agent_loop_manager_class": None,
                    "agent_loop_config_path": paths["agents"],
                    "default_agent_loop": AGENT["name"],
                },
                "engine_kwargs": {"vllm": {"worker_extension_cls": f"{package}.vllm_worker.Extension"}},
            },
        },
    }


def stock_row(row: Mapping[str, Any], index: int, folder: Path) -> dict[str, Any]:
    """A triplet's full view in the format of verl's `RLHFDataset`."""
    return {
        "data_source": row["source"],
        "prompt": [{"role": "user", "content": f"<image>{row['question']}"}],
        "images": [{"bytes": schema.image_bytes(row["image"], folder)}],
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {
            "index": index,
            "id": row["id"],
            "options": list(row["options"]),
            "answer_type": row["answer_type"],
        },
    }


def write_stock_data(split: Path, out: Path) -> None:
    """All rows of a split, in their order: verl shuffles as many rows by the same seed to the same order."""
    columns = ("id", "image", "question", "options", "answer", "answer_type", "source")
    rows = [stock_row(row, i, split.parent) for i, row in enumerate(schema.rows(split, columns))]
    pq.write_table(pa.Table.from_pylist(rows), out)


# ---- running --------------------------------------------------------------------------------------------------------


class Contest:
    """Both sides with the same budget, and the folder in which everything lies. Ours goes first."""

    def __init__(self, folder: Path, steps: int, prompts: int, rollouts: int, seed: int) -> None:
        self.folder, self.steps = folder, steps
        self.budget = (
            f"train.steps={steps}",
            f"train.prompts={prompts}",
            f"train.rollouts={rollouts}",
            f"seed={seed}",
        )
        self.lent = folder / "lent"
        self.paths = {split: str(self.lent / f"{split}.parquet") for split in ("train", "validation")}
        self.paths["agents"] = str(self.lent / "agents.yaml")

    def ours(self, name: str) -> Run:
        """One run of the recipe."""
        run_dir = self.folder / name
        command = [
            sys.executable,
            "-P",
            "-m",
            "vopd",
            "run",
            "grpo",
            f"run_dir={run_dir}",
            *self.budget,
            *ONCE,
        ]
        start, ends = self._watched(name, command, dict(os.environ), run_dir / "metrics.jsonl")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line["prompt_length"] = line["tokens_prompt"] / line["rollouts"]
        if not self.lent.exists():
            self._lend(run_dir)
        return run(OURS, start, ends, lines)

    def stock(self, name: str) -> Run:
        """One run of verl's own trainer, its first update on our first responses."""
        place = self.folder / name
        place.mkdir()
        metrics = place / "metrics.jsonl"
        with temporary.scratch() as scratch:
            OmegaConf.save(self._stock_tree(scratch), place / "verl_config.yaml")
            environment = {
                **os.environ,
                **library_environment.variables("cpu"),
                **temporary.environment(scratch),
                **loopback.start(scratch),
                "PYTHONPATH": str(ROOT),
                "HF_DATASETS_CACHE": str(scratch / "datasets"),
                "VERL_FILE_LOGGER_PATH": str(metrics),
                "VERL_ENGINE_DEVICE": "cuda",  # the engine that verl registers for it is plain PyTorch
                "VOPD_RECORDING": str(self.lent),
            }
            command = [
                sys.executable, "-P", "-m", "verl.trainer.main_ppo", f"--config-path={place}",
                "--config-name=verl_config", f"hydra.run.dir={place}/hydra",
            ]  # fmt: skip
            start, ends = self._watched(name, command, environment, metrics)
        lines = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
        return run(STOCK, start, ends, lines)

    def _lend(self, run_dir: Path) -> None:
        """What verl needs of our first run: its settings, its data in verl's format, the responses of one update."""
        self.lent.mkdir()
        shutil.copy(run_dir / "verl_config.yaml", self.lent)
        shutil.copy(recorded_rollouts.path(run_dir / "rollouts", 1), self.lent)
        Path(self.paths["agents"]).write_text(yaml.safe_dump([AGENT]))
        source = Path(OmegaConf.load(self.lent / "verl_config.yaml").vopd.data.folder)
        for split in ("train", "validation"):
            write_stock_data(source / f"{split}.parquet", Path(self.paths[split]))

    def _stock_tree(self, scratch: Path) -> Any:
        own: Any = OmegaConf.to_container(OmegaConf.load(self.lent / "verl_config.yaml"))
        del own["vopd"], own["actor_rollout_ref"]["vopd"]
        return OmegaConf.merge(own, stock_settings(self.steps, {**self.paths, "ray": str(scratch)}))

    def _watched(
        self, name: str, command: list[str], environment: dict[str, str], metrics: Path
    ) -> tuple[float, list[float]]:
        """Run a command; its start, and when each line of its metrics appeared."""
        log = self.folder / f"{name}.log"
        start, ends = time.monotonic(), []
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            try:
                while process.poll() is None:
                    time.sleep(LOOK_SECONDS)
                    found = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                    ends += [time.monotonic()] * (found - len(ends))
            finally:
                process.terminate()
                process.wait()
        if process.returncode or len(ends) != self.steps:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise SystemExit(f"{name}: exit code {process.returncode}, {len(ends)} updates; {log}:\n{last}")
        print(f"{name}: {ends[-1] - start:.0f} s, first update after {ends[0] - start:.0f} s", flush=True)
        return start, ends


def run(side: str, start: float, ends: list[float], lines: Sequence[Mapping[str, float]]) -> Run:
    """What is compared, from the lines of a side's metrics; a name that a line lacks is an error."""
    place = (OURS, STOCK).index(side)
    names = {what: both[place] for what, both in (PHASES | FACTS).items()}
    updates = [{what: float(line[key]) if key else 0.0 for what, key in names.items()} for line in lines]
    loop = [later - earlier for earlier, later in pairwise(ends[WARM_UP - 1 : -1])]
    return Run(side, ends[0] - start, loop, updates)


# ---- the comparison -------------------------------------------------------------------------------------------------


def values(runs: Sequence[Run], side: str, what: str) -> list[float]:
    """Of every update after the warm-up."""
    return [update[what] for one in runs if one.side == side for update in one.updates[WARM_UP:]]


def medians(runs: Sequence[Run], what: str) -> tuple[float, float]:
    """Ours and verl's."""
    return statistics.median(values(runs, OURS, what)), statistics.median(values(runs, STOCK, what))


def ratios(rounds: Sequence[Sequence[Run]], what: str) -> list[float]:
    """Ours over verl's, a round each: what else runs on the machine changes between rounds."""
    return [ours / stock for ours, stock in (medians(runs, what) for runs in rounds)]


def table(rounds: Sequence[Sequence[Run]]) -> Iterator[str]:
    """The comparison as Markdown, line by line."""
    runs = [one for both in rounds for one in both]
    yield "| median of an update | ours | verl | ours / verl |"
    yield "|---|---|---|---|"
    for phase in PHASES:
        ours, stock = medians(runs, phase)
        share = f"{ours / stock:.2f}" if ours else "-"
        yield f"| {phase}, s | {ours:.3f} | {stock:.3f} | {share} |"
    loops = [
        statistics.median(s for one in runs if one.side == side for s in one.loop) for side in (OURS, STOCK)
    ]
    yield f"| from update to update, s | {loops[0]:.3f} | {loops[1]:.3f} | {loops[0] / loops[1]:.2f} |"
    starts = [statistics.median(one.start for one in runs if one.side == side) for side in (OURS, STOCK)]
    yield f"| start to first update, s | {starts[0]:.1f} | {starts[1]:.1f} | {starts[0] / starts[1]:.2f} |"
    for fact in ("prompt tokens", "response tokens", "accuracy"):
        ours, stock = (statistics.mean(values(runs, side, fact)) for side in (OURS, STOCK))
        yield f"| {fact} (mean) | {ours:.3f} | {stock:.3f} | {ours / stock:.2f} |"
    yield ""
    steps = ratios(rounds, "step")
    each = ", ".join(f"{ratio:.3f}" for ratio in steps)
    overall = math.exp(statistics.mean(map(math.log, steps)))
    yield f"Step, ours / verl: {overall:.3f} (rounds: {each}; goal: at most 1.02)"
    yield ""
    yield "| first update on equal responses | ours | verl | difference |"
    yield "|---|---|---|---|"
    first = {one.side: one.updates[0] for one in rounds[0]}
    for fact in FACTS:
        ours, stock = first[OURS][fact], first[STOCK][fact]
        yield f"| {fact} | {ours:.8g} | {stock:.8g} | {abs(ours - stock):.1e} |"


def played(contest: Contest, number: int) -> list[Run]:
    """A round: ours and verl's, in this order in odd rounds."""
    sides = [lambda: contest.ours(f"ours{number}"), lambda: contest.stock(f"verl{number}")]
    return [side() for side in (sides if number % 2 else sides[::-1])]


def result(rounds: Sequence[Sequence[Run]], settings: Mapping[str, int]) -> dict[str, Any]:
    """What result.json says."""
    return {
        "settings": dict(settings),
        "machine": provenance.machine("cpu"),
        "code": provenance.code_version(ROOT),
        "libraries": provenance.library_versions(),
        "step_ratios": ratios(rounds, "step"),
        "rounds": [[asdict(one) for one in both] for both in rounds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="an empty folder for logs, settings and result.json")
    args = parser.parse_args()
    if args.steps < WARM_UP + 2:
        parser.error(f"--steps must be at least {WARM_UP + 2}: {WARM_UP} updates are warm-up")
    folder = (args.out or Path(tempfile.mkdtemp(prefix="against-verl-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"--out {folder}: not empty")
    settings = {name: getattr(args, name) for name in ("steps", "prompts", "rollouts", "seed")}
    contest, rounds = Contest(folder, **settings), []
    for number in range(1, args.rounds + 1):
        rounds.append(played(contest, number))
        files.write_text(folder / "result.json", json.dumps(result(rounds, settings), indent=1) + "\n")
        print("\n".join(["", f"After {number} of {args.rounds} rounds:", "", *table(rounds), ""]), flush=True)
    print(f"result.json, logs and settings: {folder}")


if __name__ == "__main__":
    main()
