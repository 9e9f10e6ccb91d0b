"""`vopd export CHECKPOINT OUT [--dtype bfloat16]`: a checkpoint's student as a Hugging Face model folder.

CHECKPOINT is a folder such as runs/miniature/vision_opd/seed0/checkpoints/global_step_20 (`train.keep=N` keeps
several). OUT is a new or empty folder, which transformers, vLLM and `vopd evaluate model=OUT` load. It takes
no GPU, and the memory of one copy of the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from vopd.backbone import checkpoints, shards
from vopd.common.command import reports_errors
from vopd.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")


def export(checkpoint: Path, out: Path, dtype: str) -> None:
    """Write the student of a checkpoint to `out`, in this type.

    Raises:
        UserError: no checkpoint, a damaged one, or an `out` that holds something.
    """
    if not (checkpoint / checkpoints.SEAL).is_file():
        raise UserError(f"{checkpoint}: no checkpoint; give a folder such as RUN/checkpoints/global_step_20.")
    wrong = checkpoints.problem(checkpoints.Checkpoint(0, checkpoint))
    if wrong:
        raise UserError(f"{checkpoint}: damaged ({wrong}); take another checkpoint.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something already; give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    actor = checkpoint / "actor"
    target = getattr(torch, dtype)
    state = {name: tensor.to(target) for name, tensor in shards.whole(actor, shards.WEIGHTS)}
    shutil.copytree(actor / "huggingface", out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(state, str(out))


@reports_errors()
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="vopd export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    given = parser.parse_args(arguments)
    export(given.checkpoint, given.out, given.dtype)
    print(f"wrote {given.out}; evaluate it: vopd evaluate model={given.out} benchmarks=[miniature_test]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
