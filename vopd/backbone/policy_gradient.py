"""verl's registered advantage estimators, policy losses and KL estimators, called with this project's names.

They take (B, T) tensors and verl's settings; the counts of an `UpdateBatch` are what verl calls global batch
information, so that the loss does not depend on how rows are split.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf

from vopd.method import UpdateBatch

SEQUENCE_MEAN, TOKEN_MEAN = "seq-mean-token-mean", "token-mean"


def advantages(
    name: str, rewards_B: torch.Tensor, group_B: torch.Tensor, mask_BT: torch.Tensor
) -> torch.Tensor:
    """Advantages (B, T) by the estimator registered in verl under `name`, zero outside the mask."""
    from verl.trainer.ppo import core_algos

    rewards_BT = torch.zeros_like(mask_BT, dtype=torch.float32)
    last_B = (mask_BT.sum(-1).long() - 1).clamp(min=0)
    rewards_BT.scatter_(1, last_B[:, None], rewards_B.to(torch.float32)[:, None])
    estimate = core_algos.get_adv_estimator_fn(name)
    advantages_BT, _ = estimate(
        token_level_rewards=rewards_BT, response_mask=mask_BT, index=group_B.numpy(), config=None
    )
    return advantages_BT


def policy_loss(
    log_prob_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    batch: UpdateBatch,
    aggregation: str,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """verl's clipped policy loss `vanilla` (PPO with dual clip 3), a micro-batch's share of the update's scalar.

    Args:
        log_prob_BT: with gradient; the batch holds advantages and old log-probs.
        aggregation: SEQUENCE_MEAN or TOKEN_MEAN.
        clip_low: ratio clipped below 1 - clip_low.
        clip_high: ratio clipped above 1 + clip_high.
    """
    from verl.trainer.ppo import core_algos

    assert batch.advantages_BT is not None and batch.old_log_probs_BT is not None
    config = OmegaConf.create(
        {
            "clip_ratio": clip_low,
            "clip_ratio_low": clip_low,
            "clip_ratio_high": clip_high,
            "global_batch_info": _information(batch),
        }
    )
    weights_B1 = None if batch.weights_B is None else batch.weights_B[:, None]
    loss, _ = core_algos.get_policy_loss_fn("vanilla")(
        old_log_prob=batch.old_log_probs_BT,
        log_prob=log_prob_BT,
        advantages=batch.advantages_BT,
        response_mask=mask_BT.bool(),
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights_B1,
    )
    return loss


def aggregate(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, batch: UpdateBatch, aggregation: str
) -> torch.Tensor:
    """verl's aggregation of per-token values, as `policy_loss` uses it."""
    from verl.trainer.ppo import core_algos

    return core_algos.agg_loss(values_BT, mask_BT.bool(), aggregation, **_information(batch))


def k3(log_prob: torch.Tensor, reference_log_prob: torch.Tensor) -> torch.Tensor:
    """verl's low-variance KL estimate of the sampled token, p_ref/p - log(p_ref/p) - 1."""
    from verl.trainer.ppo import core_algos

    return core_algos.kl_penalty(log_prob, reference_log_prob, "low_var_kl")


def _information(batch: UpdateBatch) -> dict[str, Any]:
    return {
        "dp_size": batch.ranks,
        "batch_num_tokens": max(batch.tokens, 1),
        "global_batch_size": max(batch.rows, 1),
        "loss_scale_factor": None,
    }
