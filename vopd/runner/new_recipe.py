"""`vopd recipe new NAME [--out DIR]`: a working recipe to start from, as three small files.

NAME.yaml (the settings), NAME.py (the method) and test_NAME.py (its maths against an independent computation). The
skeleton is forward KL to the base model that sees the crop; run it, then change it. Walked through in
docs/adding_a_recipe.md.
"""

from __future__ import annotations

import argparse
import keyword
import os
import sys
from pathlib import Path

from vopd.common.command import reports_errors
from vopd.errors import UserError

YAML = """# {name}: what the run sets beside the profile; the defaults of `method` are in {name}.py.
method:
  module: {name}.py
"""

MODULE = '''"""Forward KL to the base model that sees the crop, over the full vocabulary. Say here what the paper says.

    L = 1/|y| sum_n KL( p_initial(. | I', q, y_<n) || p_S(. | I, q, y_<n) )
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vopd.method import ScoreChunk
from vopd.method import Method, Scorer, UpdateBatch, sequence_mean


@dataclass
class Settings:
    """What `method:` in the YAML may set; the defaults are the vetted values."""

    view: str = "crop"


@dataclass(frozen=True)
class {klass}(Method):
    """The teacher sees another view than the student; the loss is the mean over each response."""

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        """Shapes: C tokens of the chunk, V vocabulary. Logits are float32, temperature 1, not normalised."""
        student_CV = chunk.student_logits_CV.log_softmax(-1)  # gradient
        teacher_CV = chunk.scorer_logits["teacher"].log_softmax(-1)  # no gradient
        return {{"divergence": (teacher_CV.exp() * (teacher_CV - student_CV)).sum(-1)}}

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        return sequence_mean(per_token["divergence"], mask_BT, batch)

    def record(self) -> dict[str, Any]:
        return {{
            "anchor": str(self.scorers["teacher"]),
            "objective": "forward KL, full vocabulary",
            "normalisation": "per-sequence mean",
            "clip": "none",
        }}


def build(settings: Settings) -> Method:
    """The method with these settings."""
    return {klass}(outputs=("divergence",), scorers={{"teacher": Scorer(settings.view, "initial")}})
'''

TEST = '''"""The method's numbers against torch's own KL divergence: `pytest test_{name}.py`."""

from pathlib import Path

import torch

from vopd.method import ScoreChunk
from vopd.method import UpdateBatch, build


def test_the_loss_is_the_forward_kl_per_response() -> None:
    method = build({{"module": "{name}.py"}}, Path(__file__).parent)
    torch.manual_seed(0)
    student_CV, teacher_CV = torch.randn(4, 9).requires_grad_(), torch.randn(4, 9)
    scored = method.score(ScoreChunk(student_CV, {{"teacher": teacher_CV}}, torch.zeros(4).long(), {{}}))
    assert tuple(scored) == method.outputs
    wanted_C = torch.nn.functional.kl_div(
        student_CV.log_softmax(-1), teacher_CV.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    mask_BT = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss = method.loss({{"divergence": scored["divergence"].view(2, 2)}}, mask_BT, UpdateBatch(2, 3, 1))
    torch.testing.assert_close(loss, (wanted_C[:2].mean() + wanted_C[2]) / 2)
    loss.backward()
    assert student_CV.grad is not None and student_CV.grad[:3].abs().max() > 0
'''


def new(name: str, folder: Path) -> list[Path]:
    """Write the skeleton's three files into `folder` and return their paths.

    Raises:
        UserError: a name that is not a Python identifier, a file that exists, or a folder that cannot be written to.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise UserError(
            f"'{name}' cannot be a recipe's name: lower-case letters, digits and underscores, please."
        )
    klass = "".join(word.capitalize() for word in name.split("_"))
    texts = {f"{name}.yaml": YAML, f"{name}.py": MODULE, f"test_{name}.py": TEST}
    files = [folder / file for file in texts]
    for file in files:
        if os.path.lexists(file):
            raise UserError(f"{file} exists; give another name or another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in zip(files, texts.values(), strict=True):
            with file.open("x", encoding="utf-8") as stream:
                stream.write(text.format(name=name, klass=klass))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); give another --out.") from error
    return files


@reports_errors()
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="vopd recipe new", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder (default: the current one)")
    given = parser.parse_args(arguments)
    recipe, module, test = new(given.name, given.out)
    print(f"wrote {recipe}, {module}, {test}\nrun it: bash scripts/run_recipe.sh {recipe}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
