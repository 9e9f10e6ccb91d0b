"""The training engine: verl's FSDP2 engine, with `score` run inside the model's head.

verl's engine projects prompt and response onto the vocabulary and hands the logits to a loss. Here the head is
replaced before sharding (`vopd.backbone.head`), so that only response positions are projected, chunk by chunk, and
"logits" are already a method's per-token numbers. Teachers are weight stores that change places with the student's
weights (`vopd.teacher`); their hidden states are kept for the update, their logits exist per chunk only.

Shape suffixes: docs/glossary.md.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vopd.backbone import delta_rule, pixels, shards, verl_internals
from vopd.backbone import model_inputs as inputs
from vopd.backbone.head import GatherContext, active, install_head
from vopd.backbone.rendering import with_response
from vopd.backbone.rows import RenderedView
from vopd.backbone.scoring import Component, ScoringContext
from vopd.backbone.shared_prompts import SharedPrompts
from vopd.divergence import entropy, sampled_token_log_prob
from vopd.method import Method, ScoreChunk, UpdateBatch, calling
from vopd.method_checks import checked_loss, checked_scores
from vopd.teacher import TeacherWeights, components, settle, stores

# Always scored beside a method's own outputs: whether rollout and trainer agree, whether the policy collapses. A
# method that needs a gradient through one of them returns it itself under this name.
LOG_PROB, ENTROPY = "log_prob", "entropy"


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the learning rate at update `step` (from 0). Never 0: a first step at 0 trains nothing."""
    return min(1.0, (step + 1) / max(warmup_steps, 1))


class ScoringEngine(verl_internals.FSDPEngineWithLMHead):
    """verl's engine plus `attach(method)`; without a method it behaves like verl's."""

    method: Method | None = None

    def _build_module(self) -> nn.Module:
        module = super()._build_module()
        self.head = install_head(module)
        self.vision = SharedVision(module)
        delta_rule.install(module)
        self.prompts = SharedPrompts(module)
        return module

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        config = self.optimizer_config
        if config.lr_scheduler_type != "constant":
            return super()._build_lr_scheduler(optimizer)
        return LambdaLR(optimizer, lambda step: warmup_factor(step, config.lr_warmup_steps))

    def attach(self, method: Method, chunk: int, teachers_on_host: bool = False) -> None:
        """Train with `method` from here on. Call after `initialize`, before the first update."""
        self.method = method
        self.names = tuple(dict.fromkeys((*method.outputs, LOG_PROB, ENTROPY)))
        self.chunk = chunk
        self.store_names = stores(method.scorers.values())
        self.teachers = TeacherWeights(self.module, self.store_names, teachers_on_host)
        self.update_in_batch = 0
        self._sums: dict[str, float] = defaultdict(float)

    # ---- one optimiser update -----------------------------------------------------------------------------------

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> dict[str, Any]:
        """Score with the teachers, update the student, then move the teachers; `data` is one mini-batch."""
        if self.method is None:
            return super().train_batch(data, loss_function)
        start = time.perf_counter()
        self.optimizer_zero_grad()
        self._number_rows(data)
        self._sums = defaultdict(float)
        kept = self._drop_rows(data)
        self._keep_together(data, data)
        self._scorer_hidden, self._scorer_head = self._score_with_teachers(data)
        scored = time.perf_counter()
        outputs = self.forward_backward_batch(data, loss_function, forward_only=False)
        self._scorer_hidden, self._scorer_head = (
            {},
            {},
        )  # gigabytes; the optimiser's step is where memory peaks
        # Without a kept row there is no gradient, but the optimiser's momentum and decay would move the weights.
        norm = self.optimizer_step() if kept else 0.0
        finite = bool(torch.isfinite(torch.tensor(norm)))
        if kept and finite:
            self._reshard()
            self.teachers.update(self.module)
        outputs["metrics"] = self._metrics(norm, finite)
        outputs["metrics"]["empty_updates"] = [0.0 if kept else 1.0]
        outputs["metrics"]["update_rows"] = [float(kept)]
        outputs["metrics"]["seconds/scorers"] = [scored - start]
        outputs["metrics"]["seconds/student"] = [time.perf_counter() - scored]
        self.update_in_batch += 1
        return outputs

    def _number_rows(self, data: TensorDict) -> None:
        self._rows: list[dict[str, RenderedView]] = list(data["rendered"])
        data["row_index"] = torch.arange(len(self._rows))

    def _keep_together(self, view_data: TensorDict, data: TensorDict) -> None:
        """Have `view_data`'s micro-batches hold rollouts of one prompt together: its image is encoded once for them."""
        if "uid" not in data.keys() or not data["use_dynamic_bsz"]:
            return
        lengths = [len(ids) for ids in _rows_of(view_data["input_ids"])]
        most = inputs.together(list(data["uid"]), lengths, int(data["max_token_len_per_gpu"]))
        agreed = torch.tensor(most, device=self._device())
        torch.distributed.all_reduce(
            agreed, op=torch.distributed.ReduceOp.MIN, group=self.get_data_parallel_group()
        )
        verl_internals.assign_non_tensor(view_data, force_group_size=int(agreed))

    def _drop_rows(self, data: TensorDict) -> int:
        """Rows of the update that count, on all ranks; the others lose their mask (`Method.prepare`)."""
        if "kept" not in data.keys():
            return int(data["global_batch_size"])
        kept_B = data["kept"]
        masks = zip(_rows_of(data["loss_mask"]), kept_B, strict=True)
        data["loss_mask"] = _nested([mask_R * kept for mask_R, kept in masks])
        count = kept_B.sum().to(self._device())
        torch.distributed.all_reduce(count, group=self.get_data_parallel_group())
        verl_internals.assign_non_tensor(data, global_batch_size=int(count))
        return int(count)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Forward of one micro-batch; with a method attached, its share of the loss."""
        if self.method is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        index_B = micro_batch["row_index"].tolist()
        responses = _rows_of(micro_batch["responses"])
        extras_N = {
            name: torch.cat(_rows_of(micro_batch[name])).to(self._device())
            for name in ("old_log_probs", "advantages")
            if name in micro_batch.keys()
        }
        context = ScoringContext(
            score=self._score,
            names=self.names,
            tokens_N=torch.cat(responses).to(self._device()),
            scorers={name: self._scorer(name, index_B) for name in self.method.scorers},
            chunk=self.chunk,
            extras=extras_N,
        )
        numbers_NM = self._forward(
            micro_batch, [self._rows[i][self.method.student_view] for i in index_B], context
        )
        lengths = [len(r) for r in responses]
        per_token = {name: _pad(numbers_NM[:, m], lengths) for m, name in enumerate(self.names)}
        mask_BT = _pad(torch.cat(_rows_of(micro_batch["loss_mask"])).to(numbers_NM), lengths)
        batch = UpdateBatch(
            rows=int(micro_batch["global_batch_size"]),
            tokens=int(micro_batch["batch_num_tokens"]),
            ranks=int(micro_batch["dp_size"]),
            advantages_BT=_pad(extras_N["advantages"], lengths) if "advantages" in extras_N else None,
            old_log_probs_BT=self._old_log_probs(per_token, extras_N, lengths),
            rollout_log_probs_BT=self._rollout_log_probs(micro_batch, mask_BT, lengths),
            weights_B=self._of_rows(micro_batch, "weights"),
            kept_B=self._of_rows(micro_batch, "kept"),
        )
        with calling(self.method, "loss"):
            loss = checked_loss(self.method.loss(per_token, mask_BT, batch))
        self._count(loss / batch.ranks, per_token, mask_BT, micro_batch, lengths)
        return loss, {"model_output": {}, "loss": loss.detach().item(), "metrics": {}}

    def _score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        assert self.method is not None
        with calling(self.method, "score"):
            numbers = checked_scores(self.method.score(chunk), self.method.outputs, chunk.tokens_C)
        with torch.no_grad():
            if LOG_PROB not in numbers:
                numbers |= _sampled_log_prob(chunk)
            if ENTROPY not in numbers:
                numbers[ENTROPY] = entropy(chunk.student_logits_CV)
        return numbers

    def _old_log_probs(
        self, per_token: dict[str, torch.Tensor], extras_N: dict[str, torch.Tensor], lengths: list[int]
    ) -> torch.Tensor | None:
        """The policy's before the first update of the batch: where there is one update, those of this very pass."""
        assert self.method is not None
        if not self.method.needs_old_log_probs:
            return None
        given_N = extras_N.get("old_log_probs")
        return per_token[LOG_PROB].detach() if given_N is None else _pad(given_N, lengths)

    @staticmethod
    def _rollout_log_probs(
        micro_batch: TensorDict, like_BT: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor | None:
        """What the rollout said of its own tokens, with type and device of `like_BT`; None where it said nothing."""
        if "rollout_log_probs" not in micro_batch.keys():
            return None
        return _pad(torch.cat(_rows_of(micro_batch["rollout_log_probs"])).to(like_BT), lengths)

    def _of_rows(self, micro_batch: TensorDict, name: str) -> torch.Tensor | None:
        return micro_batch[name].to(self._device()) if name in micro_batch.keys() else None

    # ---- the policy before the update -----------------------------------------------------------------------------

    @torch.no_grad()
    def log_probs(self, data: TensorDict) -> torch.Tensor:
        """Log-probs of each row's response under the student as it is now, jagged (B, R)."""
        assert self.method is not None
        self._number_rows(data)

        def scoring(responses: list[torch.Tensor]) -> ScoringContext:
            tokens_N = torch.cat(responses).to(self._device())
            return ScoringContext(_sampled_log_prob, (LOG_PROB,), tokens_N, self.chunk)

        numbers = self._by_row(data, self.method.student_view, scoring)
        return _nested([numbers_RM[:, 0].cpu() for numbers_RM in numbers])

    # ---- scorers ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score_with_teachers(
        self, data: TensorDict
    ) -> tuple[dict[tuple[str, str], list[torch.Tensor]], dict[str, torch.Tensor]]:
        """Hidden states per (store, view) and row at response positions, and each store's head weight."""
        assert self.method is not None
        wanted: dict[str, set[str]] = defaultdict(set)
        for scorer in self.method.scorers.values():
            for store, _ in components(scorer):
                wanted[store].add(scorer.view)
        hidden: dict[tuple[str, str], list[torch.Tensor]] = {}
        head: dict[str, torch.Tensor] = {}
        for store in self.store_names:
            self._reshard()
            with self.teachers.in_place_of(self.module, store):
                for view in sorted(wanted[store]):
                    hidden[store, view] = self._hidden(data, view)
                self._reshard()
                # A copy: on one rank the full tensor is the shard itself, which changes back with the student's.
                weight = self.head.weight.detach().to(self._autocast_dtype, copy=True)
                head[store] = verl_internals.full_tensor(weight)
        return hidden, head

    def _hidden(self, data: TensorDict, view: str) -> list[torch.Tensor]:
        """Last hidden states (R, H) of every row's response behind this view's prompt, in the order of rows."""
        prompts = sum(len(row[view]["prompt_ids"]) for row in self._rows)
        self._sums["scorer_tokens"] += prompts + sum(map(len, _rows_of(data["responses"])))
        return self._by_row(data, view, lambda _: GatherContext())

    def _by_row(
        self,
        data: TensorDict,
        view: str,
        context: Callable[[list[torch.Tensor]], ScoringContext | GatherContext],
    ) -> list[torch.Tensor]:
        """What the head returns (R, ...) for each row's response behind this view's prompt, in the order of rows."""
        responses = _rows_of(data["responses"])
        rendered = [row[view] for row in self._rows]
        ids = [with_response(v, r)[0] for v, r in zip(rendered, responses, strict=True)]
        view_data = TensorDict(
            {"input_ids": _nested(ids), "row_index": data["row_index"]}, batch_size=[len(ids)]
        )
        for key in ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu", "sp_size"):
            if key in data.keys():
                verl_internals.assign_non_tensor(view_data, **{key: data[key]})
        self._keep_together(view_data, data)
        micro_batches, _ = verl_internals.prepare_micro_batches(
            data=view_data, dp_group=self.get_data_parallel_group(), same_micro_num_in_dp=True
        )
        found: list[torch.Tensor | None] = [None] * len(ids)
        for micro_batch in micro_batches:
            index_B = micro_batch["row_index"].tolist()
            chosen = [responses[i] for i in index_B]
            batch = TensorDict({"responses": _nested(chosen)}, batch_size=[len(index_B)])
            verl_internals.assign_non_tensor(
                batch, temperature=1.0, use_remove_padding=data["use_remove_padding"]
            )
            values_N = self._forward(batch, [rendered[i] for i in index_B], context(chosen))
            for i, values_R in zip(index_B, values_N.split([len(r) for r in chosen]), strict=True):
                found[i] = values_R
        return found  # type: ignore[return-value]  # every row is in exactly one micro-batch

    def _scorer(self, name: str, index_B: list[int]) -> tuple[Component, ...]:
        assert self.method is not None
        scorer = self.method.scorers[name]
        return tuple(
            Component(
                torch.cat([self._scorer_hidden[store, scorer.view][i] for i in index_B]),
                self._scorer_head[store],
                coefficient,
            )
            for store, coefficient in components(scorer)
        )

    # ---- the model's forward ------------------------------------------------------------------------------------

    def _forward(
        self, micro_batch: TensorDict, rendered: list[RenderedView], context: ScoringContext | GatherContext
    ) -> torch.Tensor:
        """Run the model on prompt + response of these rows; the head sees response positions only."""
        packed = bool(micro_batch["use_remove_padding"])
        lay_out = inputs.packed if packed else inputs.shared
        rows = lay_out(rendered, _rows_of(micro_batch["responses"]))
        first, number_of_row = inputs.unique_rows([prompt["key"] for prompt in rows.prompts])
        images = [pixels.unpacked(rows.prompts[row]["multi_modal_inputs"]) for row in first]
        self._sums["images_encoded"] += len(images)
        batch = TensorDict({"input_ids": _nested(rows.ids)}, batch_size=[len(rows.ids)])
        batch["multi_modal_inputs"] = NonTensorStack(
            *images, *[{} for _ in range(len(rows.ids) - len(images))]
        )
        verl_internals.assign_non_tensor(batch, temperature=1.0, use_remove_padding=packed)
        batch = batch.to(self._device())
        batch["position_ids"] = verl_internals.nested_positions(
            [p.to(self._device()) for p in rows.positions]
        )
        model_inputs, _ = self.prepare_model_inputs(batch)
        layout = rows.layout and rows.layout.to(self._device())
        if layout:
            model_inputs["attention_mask"] = layout.mask()
        self.prompts.use(layout)
        context.positions_N = rows.predicted_at_N.to(self._device())
        with self._autocast(), self.vision.shared(number_of_row, images), active(self.head, context):
            return self.module(**model_inputs, use_cache=False).logits[0]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=verl_internals.get_device_name(), dtype=self._autocast_dtype)

    def _device(self) -> Any:
        return verl_internals.get_device_id()

    def _reshard(self) -> None:
        """Drop gathered parameters, so that the next forward gathers what the shards hold now."""
        for module in self.module.modules():
            if isinstance(module, verl_internals.FSDPModule):
                module.reshard()

    # ---- what is recorded ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(
        self,
        loss: torch.Tensor,
        per_token: dict[str, torch.Tensor],
        mask_BT: torch.Tensor,
        micro_batch: TensorDict,
        lengths: list[int],
    ) -> None:
        self._sums["loss"] += loss.item()
        self._sums["tokens"] += mask_BT.sum().item()
        for name, values_BT in per_token.items():
            self._sums[f"token/{name}"] += (values_BT * mask_BT).sum().item()
        assert self.method is not None
        rollout, view = self.method.rollout, self.method.student_view
        comparable = rollout.weights == "current" and rollout.view == view and self.update_in_batch == 0
        rollout_BT = self._rollout_log_probs(micro_batch, mask_BT, lengths)
        if rollout_BT is not None and comparable:
            difference_BT = (rollout_BT - per_token[LOG_PROB]) * mask_BT
            self._sums["rollout/k3"] += ((torch.expm1(difference_BT) - difference_BT) * mask_BT).sum().item()
            probs_BT = ((rollout_BT.exp() - per_token[LOG_PROB].exp()) * mask_BT).abs()
            self._sums["rollout/probs_diff"] += probs_BT.sum().item()
            self._sums["max/rollout/probs_diff"] = max(
                self._sums["max/rollout/probs_diff"], probs_BT.max().item()
            )

    def _metrics(self, norm: float, finite: bool) -> dict[str, Any]:
        """Means over the update's tokens on all ranks; a rank's maximum stays a maximum."""
        group = self.get_data_parallel_group()
        sums = {k: v for k, v in self._sums.items() if not k.startswith("max/")}
        sum_S = torch.tensor([sums[k] for k in sorted(sums)], dtype=torch.float64, device=self._device())
        torch.distributed.all_reduce(sum_S, group=group)
        total = dict(zip(sorted(sums), sum_S.tolist(), strict=True))
        tokens = max(total.pop("tokens"), 1.0)
        scorer_tokens, encoded = total.pop("scorer_tokens", 0.0), total.pop("images_encoded", 0.0)
        metrics: dict[str, Any] = {k: [v if k == "loss" else v / tokens] for k, v in total.items()}
        metrics["update_loss"] = metrics.pop("loss")
        metrics["update_tokens"] = [tokens]
        metrics["scorer_tokens"], metrics["images_encoded"] = [scorer_tokens], [encoded]
        metrics["skipped_updates"] = [0.0 if finite else 1.0]
        for key in (k for k in self._sums if k.startswith("max/")):
            value = torch.tensor(self._sums[key], device=self._device())
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=group)
            metrics[key.removeprefix("max/") + "_max"] = [value.item()]
        metrics["grad_norm"] = norm
        return metrics

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """This rank's shards of student, optimiser and every teacher (`vopd.backbone.shards`) into a folder.

        verl's own checkpoints are pickles and hold no teacher. Rank 0 adds configuration and processor, so that the
        folder can be exported without the run.
        """
        folder = Path(local_path)
        folder.mkdir(parents=True, exist_ok=True)
        shards.save(folder, self.rank, torch.distributed.get_world_size(), self._state())
        if self.rank == 0:
            self.module.config.save_pretrained(folder / "huggingface")
            self.model_config.processor.save_pretrained(folder / "huggingface")
            if self.module.can_generate():
                self.module.generation_config.save_pretrained(folder / "huggingface")
        torch.distributed.barrier()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Counterpart of `save_checkpoint`; a checkpoint without its teacher is an error, not a silent reset."""
        shards.load(Path(local_path), self.rank, torch.distributed.get_world_size(), self._state())
        self._reshard()
        torch.distributed.barrier()

    def _state(self) -> shards.State:
        settle()
        teachers = self.teachers.shards if self.method is not None else {}
        return shards.State(self.module, self.optimizer, self.lr_scheduler, teachers)

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter gathered, one after another; all ranks must iterate together."""
        self._reshard()
        parameters, _ = self.get_per_tensor_param()
        yield from parameters


class SharedVision:
    """Encodes an image once for all rollouts of its prompt: repeats the tower's output, gradients add up."""

    def __init__(self, module: nn.Module) -> None:
        self.repeat: tuple[list[int], list[int]] | None = None
        tower = module.get_submodule("model.visual")
        vision_config: Any = module.config.vision_config  # type: ignore[union-attr]
        self.merge = int(vision_config.spatial_merge_size) ** 2
        tower.register_forward_hook(self._expand)

    @contextmanager
    def shared(self, unique_B: list[int], images: list[dict[str, torch.Tensor]]) -> Iterator[None]:
        """Within the block the tower gets the images of the distinct rows; unique_B names each row's."""
        sizes = [int(image["image_grid_thw"].prod(-1).sum().item()) // self.merge for image in images]
        self.repeat = (unique_B, sizes)
        try:
            yield
        finally:
            self.repeat = None

    def _expand(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self.repeat is not None:
            unique_B, sizes = self.repeat
            parts = output.pooler_output.split(sizes)
            output.pooler_output = torch.cat([parts[i] for i in unique_B])
        return output


def _sampled_log_prob(chunk: ScoreChunk) -> dict[str, torch.Tensor]:
    return {LOG_PROB: sampled_token_log_prob(chunk.student_logits_CV, chunk.tokens_C)}


def _rows_of(nested: torch.Tensor) -> list[torch.Tensor]:
    """The rows of a jagged or dense (B, R) tensor."""
    return list(nested.unbind())


def _nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _pad(values_N: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Per-token values as (B, T), right padded with zeros."""
    return nn.utils.rnn.pad_sequence(list(values_N.split(lengths)), batch_first=True)
