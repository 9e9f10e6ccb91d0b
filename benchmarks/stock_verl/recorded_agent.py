"""verl's single-turn agent that answers with the rollouts of a recording (`rollout.agent.agent_loop_config_path`).

So verl's own trainer makes its update on the very responses that ours was made on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.replica import TokenOutput

from vopd.backbone import recorded_rollouts

FOLDER = "VOPD_RECORDING"


class Answers:
    """Stands for the rollout servers."""

    def __init__(self, tokens: list[int], log_probs: list[float]) -> None:
        self.tokens, self.log_probs = tokens, log_probs

    async def generate(self, **_request: Any) -> TokenOutput:
        """The recorded response."""
        versions = {"min_global_steps": 0, "max_global_steps": 0}
        return TokenOutput(token_ids=self.tokens, log_probs=self.log_probs, extra_fields=versions)


class RecordedAgent(SingleTurnAgentLoop):
    """Takes responses from the folder that the environment names while it has the step, and samples from then on."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> Any:
        folder, step = Path(os.environ[FOLDER]), int(row["global_steps"])
        if recorded_rollouts.path(folder, step).exists():
            groups, _ = recorded_rollouts.read(folder, step)
            (group,) = [group for group in groups if group.row_id == row["extra_info"]["id"]]
            rollout = row["session_id"]
            self.server_manager = Answers(group.tokens[rollout], group.log_probs[rollout])
        return await super().run(sampling_params, **row)
