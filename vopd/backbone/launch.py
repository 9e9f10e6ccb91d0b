"""The training process: starts Ray, runs verl's task runner with our trainer, leaves a sentence if it fails.

`vopd run` starts it as `python -m vopd.backbone.launch RUN_DIR`; it reads RUN_DIR/config.yaml. verl would start its
task runner as one more Ray actor; it runs here instead, which saves a process and its imports.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vopd.backbone import stop_requests, weight_sockets
from vopd.backbone.cpu import fork_server
from vopd.backbone.progress import Progress
from vopd.common import heartbeat, library_environment, processes, temporary
from vopd.common.failures import ExplainedError, explain, hand_over
from vopd.common.redaction import redacted

LOG_BYTES = 1 << 22
STOPPED = 130


def train(run_dir: Path) -> None:
    """Run the training that RUN_DIR/config.yaml describes, to its end."""
    run = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(run, DictConfig)
    os.environ.update(library_environment.variables(run.hardware.device))
    # Where verl's trackers write; without these it would be the current folder.
    os.environ.update(TENSORBOARD_DIR=str(run_dir / "tensorboard"), WANDB_DIR=str(run_dir))
    progress = Progress(run_dir)
    progress.note("loading torch, vLLM and verl")
    # Ray's sockets must fit in 107 characters, so its folder cannot be the run's.
    place = Path(os.environ[temporary.VARIABLE])
    temporary.hold(place)
    executable = {}
    if run.hardware.device == "cpu":
        fork_server.start(place / "warm")
        executable["py_executable"] = fork_server.executable(place / "warm")
    heartbeat.start(processes.DRIVER)
    _train(run, run_dir, progress, {"_temp_dir": str(place)}, executable)


def _train(
    run: DictConfig, run_dir: Path, progress: Progress, init: dict[str, Any], runtime_env: dict[str, Any]
) -> None:
    """Start Ray with these arguments and run verl's task runner."""
    import ray
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
    from verl.utils.config import validate_config

    from vopd.backbone import plugin, trainer, verl_internals
    from vopd.backbone.verl_config import verl_config

    config = verl_config(run)
    OmegaConf.save(config, run_dir / "verl_config.yaml")
    plugin.assert_loaded()
    assert config.trainer.v1.trainer_mode == trainer.NAME  # imported above: verl now knows it by this name
    validate_config(config=config, use_reference_policy=False, use_critic=False)
    runtime_env |= get_ppo_ray_runtime_env(config)
    runtime_env["env_vars"] |= {"TRANSFER_QUEUE_ENABLE": "1", weight_sockets.VARIABLE: weight_sockets.token()}
    arguments = OmegaConf.to_container(config.ray_kwargs.ray_init)
    assert isinstance(arguments, dict)
    progress.note("starting Ray")
    ray.init(**{**arguments, **init, "runtime_env": runtime_env})
    verl_internals.before_queue_closes(progress.ending)
    stop_requests.install()
    try:
        verl_internals.TaskRunner().run(config)
        progress.done()
    except stop_requests.Stopped:
        raise
    except Exception as error:  # explained here, where the processes' own output still is
        failure = explain(error, _engine_log(Path(init["_temp_dir"])), heartbeat.ended(run_dir))
        hand_over(run_dir, failure)
        raise ExplainedError(failure) from error
    finally:
        ray.shutdown()


def _engine_log(ray_dir: Path) -> str:
    """What the processes that hold vLLM's engine have printed, the end of it."""
    files = (ray_dir / "session_latest" / "logs").glob("worker-*")
    texts = [file.read_bytes()[-LOG_BYTES:].decode(errors="replace") for file in sorted(files)]
    return "\n".join(text for text in texts if "EngineCore" in text or ": error: " in text)


def main() -> int:
    """Exit code 0, 2 for bad input, 130 if stopped, 1 for anything else; the sentence goes to RUN_DIR/failure.json."""
    run_dir = Path(sys.argv[1])
    processes.die_with_parent()
    try:
        train(run_dir)
    except stop_requests.Stopped:
        return STOPPED
    except Exception as error:  # the process boundary: the cause is handed to the terminal's process
        print(redacted(traceback.format_exc()), file=sys.stderr)
        failure = explain(error)
        hand_over(run_dir, failure)
        return failure.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
