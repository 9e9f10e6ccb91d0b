"""verl's buffer with a shorter time between two looks (`trainer.v1.sampler.custom_sampler`).

verl looks every two seconds, which on the miniature is as long as its own work: a difference of one constant would be
most of what is compared.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class Buffer(ReplayBuffer):
    """Looks every `sampler_kwargs.poll_seconds` seconds."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, poll_interval=arguments["sampler_kwargs"]["poll_seconds"])
