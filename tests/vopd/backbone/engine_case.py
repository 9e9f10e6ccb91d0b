"""Cases that need the real FSDP2 engine: run by the tests in processes of their own, one per rank.

verl patches Hugging Face classes for good, and ranks are processes; so this file is a script. It builds verl's
engine (ours) on a tiny Qwen3.5, plays one case after another and saves plain numbers; the tests do the asserting.
Cases ending in `_defect` play the same with a defect put in on purpose.

    RANK=0 WORLD_SIZE=1 python engine_case.py FOLDER
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

BASE = Path(__file__).resolve().parents[3] / "data" / "miniature" / "base"
EOS = 2
# (full, crop) in pixels, 16 a token. Row 0: as many tokens in both views, in another grid.
SIZES = (((64, 64), (128, 32)), ((96, 64), (48, 48)), ((64, 96), (64, 32)), ((80, 80), (64, 64)))
RESPONSE_LENGTHS = (3, 7, 5, 1)
LONGEST, ALL = 80, 4096


def make_model(folder: Path, tied: bool) -> Path:
    """A random Qwen3.5 of one GatedDeltaNet and one attention layer, with the miniature's processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(BASE)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32, 48, 2
    text.layer_types = ["linear_attention", "full_attention"]
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.linear_num_key_heads, text.linear_num_value_heads = 2, 2
    text.linear_key_head_dim, text.linear_value_head_dim = 16, 16
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 32, 2
    vision.out_hidden_size = 32
    text.initializer_range = vision.initializer_range = 0.15
    config.tie_word_embeddings = text.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Confident predictions, and a GatedDeltaNet state that outlives a sequence, so that a leak would show.
        model.get_output_embeddings().weight.mul_(4)
        model.model.language_model.layers[0].linear_attn.A_log.fill_(math.log(0.02))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(BASE).save_pretrained(folder)
    return folder


def make_rows() -> list[dict[str, Any]]:
    """Triplets with pictures of noise: full and crop differ in size and content."""
    rng = np.random.default_rng(0)

    def picture(size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

    return [
        {
            "id": f"row{i}",
            "image": picture(full),
            "crop": picture(crop),
            "question": f"Which letter is in the red box ?{' Look close .' * i}",
        }
        for i, (full, crop) in enumerate(SIZES)
    ]


def make_responses() -> list[torch.Tensor]:
    """Random text ids, each ending in the end-of-sequence token."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(10, 1024, (n,), generator=generator) for n in RESPONSE_LENGTHS]
    return [torch.cat([row[:-1], torch.tensor([EOS])]) for row in ids]


def make_fields(processor: Any) -> list[dict[str, Any]]:
    """One row of what the rollout stores for the update."""
    from vopd.backbone.rendering import render
    from vopd.views import VIEWS

    fields = []
    for row, response_R in zip(make_rows(), make_responses(), strict=True):
        rendered = {
            view: render(processor, VIEWS[view](row), row["id"], 4096, {}).for_training()
            for view in ("full", "crop")
        }
        fields.append(
            {
                "input_ids": torch.cat([rendered["full"]["prompt_ids"], response_R]),
                "responses": response_R,
                "response_mask": torch.ones_like(response_R),
                "loss_mask": torch.ones_like(response_R),
                "rollout_log_probs": torch.full((len(response_R),), -6.9),
                "rendered": rendered,
            }
        )
    return fields


def mini_batch(fields: list[dict[str, Any]], tokens: int = ALL, packed: bool = True) -> Any:
    """This rank's share of the rows as the trainer's TensorDict."""
    from vopd.backbone import verl_internals

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = verl_internals.list_of_dict_to_tensordict(fields[rank::ranks])
    verl_internals.assign_non_tensor(
        data,
        temperature=1.0,
        global_batch_size=len(fields),
        use_remove_padding=packed,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=tokens,
        micro_batch_size_per_gpu=1,
        use_fused_kernels=False,
    )
    return data


def build_engine(model: Path, lr: float, warmup: int = 0) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    from vopd.backbone.engine import ScoringEngine

    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = ScoringEngine(
        model_config=HFModelConfig(
            path=str(model),
            override_config={"attn_implementation": "sdpa"},
            enable_gradient_checkpointing=False,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, mixed_precision=precision, use_dynamic_bsz=True
        ),
        optimizer_config=FSDPOptimizerConfig(lr=lr, lr_warmup_steps=warmup, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def double_engine(model: Path, lr: float) -> Any:
    """The engine in float64: what is left between two ways to compute the same is then far below 1e-6."""
    from verl.utils.torch_dtypes import PrecisionType

    with mock.patch.object(PrecisionType, "to_dtype", staticmethod(lambda _precision: torch.float64)):
        return build_engine(model, lr)


# ---- methods -----------------------------------------------------------------------------------------------------


def make_methods() -> dict[str, Any]:
    """Test methods; a function because `vopd` may be imported only where the platform is chosen."""
    from vopd.divergence import top_k_tail_divergence
    from vopd.method import Method, Scorer, sequence_mean

    @dataclass(frozen=True)
    class Probe(Method):
        """JSD on the top 20, and the teacher's log-prob of the sampled token."""

        outputs: tuple[str, ...] = ("divergence", "teacher_log_prob")
        scorers: Any = field(default_factory=lambda: {"teacher": Scorer("crop", "ema", 0.05)})
        poison_rank: int = -1

        def score(self, chunk: Any) -> dict[str, torch.Tensor]:
            teacher_CV = chunk.scorer_logits["teacher"].log_softmax(-1)
            divergence_C, *_ = top_k_tail_divergence(
                chunk.student_logits_CV, chunk.scorer_logits["teacher"], 20, 0.5
            )
            teacher_C = teacher_CV.gather(-1, chunk.tokens_C[:, None])[:, 0]
            return {"divergence": divergence_C, "teacher_log_prob": teacher_C}

        def loss(self, per_token: Any, mask_BT: torch.Tensor, batch: Any) -> torch.Tensor:
            loss = sequence_mean(per_token["divergence"], mask_BT, batch)
            return loss * float("nan") if torch.distributed.get_rank() == self.poison_rank else loss

    @dataclass(frozen=True)
    class MicroBatchMean(Probe):
        """A defect: the mean over whatever rows the micro-batch happens to hold."""

        def loss(self, per_token: Any, mask_BT: torch.Tensor, batch: Any) -> torch.Tensor:
            return (per_token["divergence"] * mask_BT).sum() / mask_BT.sum()

    @dataclass(frozen=True)
    class Ratio(Method):
        """Importance ratio to the policy before the update; `own`, the policy itself, is the defect."""

        outputs: tuple[str, ...] = ("log_prob",)
        needs_old_log_probs: bool = True
        own: bool = False

        def score(self, chunk: Any) -> dict[str, torch.Tensor]:
            log_prob_CV = chunk.student_logits_CV.log_softmax(-1)
            return {"log_prob": log_prob_CV.gather(-1, chunk.tokens_C[:, None])[:, 0]}

        def loss(self, per_token: Any, mask_BT: torch.Tensor, batch: Any) -> torch.Tensor:
            old_BT = per_token["log_prob"].detach() if self.own else batch.old_log_probs_BT
            return sequence_mean(-(per_token["log_prob"] - old_BT).exp(), mask_BT, batch)

    def probe(view: str, weights: str, rate: float = 0.05, **kwargs: Any) -> Any:
        return Probe(scorers={"teacher": Scorer(view, weights, rate)}, **kwargs)

    return {"probe": probe, "micro_batch_mean": MicroBatchMean, "ratio": Ratio}


# ---- playing one update ------------------------------------------------------------------------------------------


def update(engine: Any, data: Any) -> dict[str, Any]:
    """One optimiser update: metrics, full gradients and per-token numbers by row (of this rank)."""
    from vopd.backbone import verl_internals

    grads: dict[str, torch.Tensor] = {}
    rows: dict[int, dict[str, torch.Tensor]] = {}
    step, count = engine.optimizer_step, engine._count

    def optimizer_step() -> float:
        for name, p in engine.module.named_parameters():
            if p.grad is not None:
                grads[name] = verl_internals.full_tensor(p.grad).clone()
        return step()

    def counted(loss: Any, per_token: Any, mask_BT: Any, micro_batch: Any, lengths: list[int]) -> None:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for b, i in enumerate(micro_batch["row_index"].tolist()):
            rows[rank + ranks * i] = {k: v[b, : lengths[b]].detach().clone() for k, v in per_token.items()}
        count(loss, per_token, mask_BT, micro_batch, lengths)

    with (
        mock.patch.object(engine, "optimizer_step", optimizer_step),
        mock.patch.object(engine, "_count", counted),
        engine.train_mode(),
    ):
        metrics = engine.train_batch(data, None)["metrics"]
    return {"metrics": metrics, "loss": metrics["update_loss"][0], "grads": grads, "rows": rows}


@contextmanager
def teacher_in_place(engine: Any, store: str) -> Iterator[None]:
    """The module holds a teacher's weights within the block."""
    engine._reshard()
    with engine.teachers.in_place_of(engine.module, store):
        yield
        engine._reshard()


def weights(engine: Any, store: str | None = None) -> dict[str, torch.Tensor]:
    """All parameters gathered, of the student or of a teacher."""
    from contextlib import nullcontext

    with teacher_in_place(engine, store) if store else nullcontext():
        return {name: tensor.detach().clone() for name, tensor in engine.full_state()}


def shards(engine: Any) -> dict[str, torch.Tensor]:
    from vopd.teacher import local

    return {name: local(p).clone() for name, p in engine.module.named_parameters()}


@contextmanager
def root_unit_forgotten(engine: Any) -> Iterator[None]:
    """A defect: the moving average walks the inner FSDP units only."""
    from vopd.backbone import verl_internals
    from vopd.teacher import TeacherWeights

    inner = [n for n, m in engine.module.named_modules() if n and isinstance(m, verl_internals.FSDPModule)]
    original = TeacherWeights.update

    def forgetful(self: Any, module: Any) -> None:
        before = {s: {k: v.clone() for k, v in d.items()} for s, d in self.shards.items()}
        original(self, module)
        for store, values in self.shards.items():
            for key in values:
                if not any(key.startswith(f"{unit}.") for unit in inner):
                    values[key].copy_(before[store][key])

    with mock.patch.object(TeacherWeights, "update", forgetful):
        yield


@contextmanager
def packed_boundaries_withheld() -> Iterator[None]:
    """A defect: GatedDeltaNet does not learn where a packed sequence ends."""
    from verl.models.transformers import qwen3_5

    original = qwen3_5._packed_chunk_gated_delta_rule

    def leaking(module: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, *_: Any) -> Any:
        return original(module, q, k, v, g, beta, None, None)

    with mock.patch.object(qwen3_5, "_packed_chunk_gated_delta_rule", leaking):
        yield


def inherit_positions(fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A defect: the teacher's prompt takes the student's rotary positions."""
    changed = []
    for row in fields:
        full, crop = row["rendered"]["full"], row["rendered"]["crop"]
        positions = full["position_ids"][:, : len(crop["prompt_ids"])]
        assert positions.shape == crop["position_ids"].shape
        crop = crop | {"position_ids": positions.clone()}
        changed.append(row | {"rendered": {"full": full, "crop": crop}})
    return changed


# ---- cases -------------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """What the cases share."""

    models: dict[str, Path]
    fields: list[dict[str, Any]]
    methods: dict[str, Any]
    folder: Path
    processor: Any
    still: Any = None

    def attach(self, method: Any, chunk: int = 3) -> Any:
        """The engine whose learning rate is 0, with this method."""
        self.still.attach(method, chunk)
        return self.still


def case_micro_batches(s: Setting) -> dict[str, Any]:
    """Loss and gradient of one update for several splits, packed and padded."""
    out = {}
    for name, method in (
        ("", s.methods["probe"]("crop", "ema")),
        ("_defect", s.methods["micro_batch_mean"]()),
    ):
        for packed in (True, False):
            for tokens in (LONGEST, 2 * LONGEST, ALL):
                played = update(s.attach(method), mini_batch(s.fields, tokens, packed))
                key = f"{'packed' if packed else 'padded'}/{tokens}{name}"
                out[key] = {"loss": played["loss"], "grads": played["grads"]}
    return out


def case_reduce_once(s: Setting) -> dict[str, Any]:
    """Loss, gradient and number of reductions of one update in several micro-batches, reduced each time and once."""
    engine, out = s.attach(s.methods["probe"]("crop", "ema")), {}
    reduce = torch.distributed.reduce_scatter_tensor
    for once in (False, True):
        # The settings refuse assignment.
        object.__setattr__(engine.engine_config, "use_no_sync_for_gradient_accumulation", once)
        with mock.patch.object(torch.distributed, "reduce_scatter_tensor", side_effect=reduce) as counted:
            played = update(engine, mini_batch(s.fields, LONGEST))
        out[str(once)] = {
            "loss": played["loss"],
            "grads": played["grads"],
            "reductions": counted.call_count,
        }
    return out


def case_packing(s: Setting) -> dict[str, Any]:
    """Per-token numbers with all rows in one sequence, row by row, and packed with a leaking state."""
    engine = s.attach(s.methods["probe"]("crop", "initial"))
    out = {
        "packed": update(engine, mini_batch(s.fields, ALL, True))["rows"],
        "padded": update(engine, mini_batch(s.fields, LONGEST, False))["rows"],
    }
    with packed_boundaries_withheld():
        out["packed_defect"] = update(engine, mini_batch(s.fields, ALL, True))["rows"]
    return out


def case_together(s: Setting) -> dict[str, Any]:
    """Two prompts with two rollouts each, in two micro-batches: with the prompts' numbers and without."""
    engine = s.attach(s.methods["probe"]("crop", "initial"))
    generator = torch.Generator().manual_seed(5)
    rows = []
    for prompt, length in ((0, 40), (1, 4)):  # balanced by length alone, a micro-batch takes one row of each
        for _ in range(2):
            response_R = torch.randint(10, 1024, (length,), generator=generator)
            given = s.fields[prompt]
            ones = torch.ones_like(response_R)
            rows.append(
                given
                | {
                    "input_ids": torch.cat([given["rendered"]["full"]["prompt_ids"], response_R]),
                    "responses": response_R,
                    "response_mask": ones,
                    "loss_mask": ones,
                    "rollout_log_probs": torch.full((length,), -6.9),
                    "uid": str(prompt),
                }
            )
    limit = sum(len(row["input_ids"]) for row in rows) - 1
    out = {}
    for name, fields in (
        ("with", rows),
        ("without", [{k: v for k, v in row.items() if k != "uid"} for row in rows]),
    ):
        data = mini_batch(fields, limit, packed=False)
        played = update(engine, data)
        out[name] = {"loss": played["loss"], "encoded": played["metrics"]["images_encoded"]}
    return out


def case_positions(s: Setting) -> dict[str, Any]:
    """The teacher with its own positions, with the student's, and everything read one token late."""
    from vopd.backbone import model_inputs as module

    engine = s.attach(s.methods["probe"]("crop", "initial"))
    out = {
        "own": update(engine, mini_batch(s.fields))["rows"],
        "inherited_defect": update(engine, mini_batch(inherit_positions(s.fields)))["rows"],
    }
    exact = module.response_positions
    with mock.patch.object(module, "response_positions", lambda *a: exact(*a) + 1):
        out["shifted_defect"] = update(engine, mini_batch(s.fields))["rows"]
    return out


def case_same_context(s: Setting) -> dict[str, Any]:
    """Teacher = student in weights and view: nothing to learn, unless the prompts differ in their template."""
    from vopd.backbone.rendering import render
    from vopd.views import VIEWS

    out = {"same_view": update(s.attach(s.methods["probe"]("full", "current")), mini_batch(s.fields))}
    same, bare = [], []
    for row, values in zip(make_rows(), s.fields, strict=True):
        messages = VIEWS["crop"](row | {"crop": row["image"]})
        full = values["rendered"]["full"]
        crop = render(s.processor, messages, row["id"], 4096, {}).for_training()
        same.append(values | {"rendered": {"full": full, "crop": crop}})
        text = "<|vision_start|><|image_pad|><|vision_end|>" + row["question"]
        with mock.patch.object(s.processor, "apply_chat_template", lambda *a, _text=text, **k: _text):
            crop = render(s.processor, messages, row["id"], 4096, {}).for_training()
        bare.append(values | {"rendered": {"full": full, "crop": crop}})
    engine = s.attach(s.methods["probe"]("crop", "current"))
    out["same_picture"] = update(engine, mini_batch(same))
    out["no_template_defect"] = update(engine, mini_batch(bare))
    return {k: {"loss": v["loss"], "grad_norm": v["metrics"]["grad_norm"]} for k, v in out.items()}


def case_old_log_probs(s: Setting) -> dict[str, Any]:
    """Loss of a method with a ratio, for old log-probs as they were and perturbed."""
    out = {}
    for name, own in (("", False), ("_defect", True)):
        for shift in (0.0, 0.3):
            fields = [
                f | {"old_log_probs": torch.full((len(f["responses"]),), -7.0 + shift)} for f in s.fields
            ]
            played = update(s.attach(s.methods["ratio"](own=own)), mini_batch(fields))
            out[f"{shift}{name}"] = {"loss": played["loss"], "grad_norm": played["metrics"]["grad_norm"]}
    return out


def case_exchange(s: Setting) -> dict[str, Any]:
    """The student's shards before and after a teacher stood in their place, also when the block fails."""
    engine = s.attach(s.methods["probe"]("crop", "initial"))
    for values in engine.teachers.shards.values():
        for shard in values.values():
            shard.mul_(1.5)
    before = shards(engine)
    teacher = {k: v.clone() for k, v in engine.teachers.shards["initial"].items()}
    with teacher_in_place(engine, "initial"):
        within = shards(engine)
    after = shards(engine)
    try:
        with teacher_in_place(engine, "initial"):
            raise KeyError("on purpose")
    except KeyError:
        pass
    return {
        "within_is_teacher": all(torch.equal(within[k], teacher[k]) for k in before),
        "back": all(torch.equal(before[k], after[k]) for k in before),
        "back_after_exception": all(torch.equal(before[k], v) for k, v in shards(engine).items()),
        "teacher_back": all(torch.equal(teacher[k], v) for k, v in engine.teachers.shards["initial"].items()),
    }


def case_ema_one(s: Setting) -> dict[str, Any]:
    """Rate 1: after each update the teacher is the student, in every tensor; then without the root unit."""
    out: dict[str, Any] = {}
    for name in ("tied", "untied"):
        engine = build_engine(s.models[name], lr=1e-2)
        engine.attach(s.methods["probe"]("crop", "ema", 1.0), chunk=64)
        start = weights(engine)
        for _ in range(2):
            update(engine, mini_batch(s.fields))
        student, teacher = weights(engine), weights(engine, "ema:1.0")
        out[name] = {
            "moved": {k: (student[k] - start[k]).abs().max().item() for k in start},
            "apart": {k: (student[k] - teacher[k]).abs().max().item() for k in start},
            "dtypes": sorted({str(v.dtype) for v in engine.teachers.shards["ema:1.0"].values()}),
            "stored": sorted(engine.teachers.shards["ema:1.0"]),
            "parameters": sorted(k for k, _ in engine.module.named_parameters()),
        }
        with root_unit_forgotten(engine):
            update(engine, mini_batch(s.fields))
        student, teacher = weights(engine), weights(engine, "ema:1.0")
        out[f"{name}_defect"] = out[name] | {
            "apart": {k: (student[k] - teacher[k]).abs().max().item() for k in start}
        }
    return out


def case_several_updates(s: Setting) -> dict[str, Any]:
    """Two updates of one rollout batch: student and teacher after each, and what the teacher said in the second."""
    engine = build_engine(s.models["tied"], lr=1e-2)
    engine.attach(s.methods["probe"]("crop", "ema", 0.3), chunk=64)
    out: dict[str, Any] = {"student": [weights(engine)], "teacher": [weights(engine, "ema:0.3")], "rows": []}
    for _ in range(2):
        out["rows"].append(update(engine, mini_batch(s.fields))["rows"])
        out["student"].append(weights(engine))
        out["teacher"].append(weights(engine, "ema:0.3"))
    return out


def case_non_finite(s: Setting) -> dict[str, Any]:
    """A NaN on rank 0 alone: no rank moves, no teacher moves, the update is counted; the next one is applied."""
    engine = build_engine(s.models["tied"], lr=1e-2)
    engine.attach(s.methods["probe"]("crop", "ema", 0.3, poison_rank=0), chunk=64)
    student, teacher = shards(engine), {k: v.clone() for k, v in engine.teachers.shards["ema:0.3"].items()}
    poisoned = update(engine, mini_batch(s.fields))["metrics"]
    out = {
        "skipped": poisoned["skipped_updates"],
        "student_moved": any(not torch.equal(student[k], v) for k, v in shards(engine).items()),
        "teacher_moved": any(
            not torch.equal(teacher[k], v) for k, v in engine.teachers.shards["ema:0.3"].items()
        ),
    }
    engine.attach(s.methods["probe"]("crop", "ema", 0.3), chunk=64)
    sound = update(engine, mini_batch(s.fields))["metrics"]
    out["skipped_then"] = sound["skipped_updates"]
    out["student_moved_then"] = any(not torch.equal(student[k], v) for k, v in shards(engine).items())
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, out)
    return {"ranks": gathered}


def one_rank_checkpoint(folder: Path) -> Path:
    """The same checkpoint as one rank would have written it."""
    from safetensors.torch import save_file

    from vopd.backbone import shards as files

    merged = folder.with_name(f"{folder.name}_of_one_rank")
    if torch.distributed.get_rank() == 0:
        merged.mkdir()
        for kind in (files.WEIGHTS, files.OPTIMIZER, files.teacher_kind("ema:0.3")):
            save_file(dict(files.whole(folder, kind)), files.file_of(merged, kind, 0))
        numbers = json.loads((folder / "rank_0.json").read_text())
        (merged / "rank_0.json").write_text(json.dumps(numbers | {"ranks": 1}))
    torch.distributed.barrier()
    return merged


def case_checkpoint(s: Setting) -> dict[str, Any]:
    """One update, save, one update; against a new engine that loads and makes the second update."""
    path = str(s.folder / f"checkpoint{torch.distributed.get_world_size()}")
    method = s.methods["probe"]("crop", "ema", 0.3)
    engine = build_engine(s.models["tied"], lr=1e-2)
    engine.attach(method, chunk=64)
    update(engine, mini_batch(s.fields))
    engine.save_checkpoint(path, global_step=1)
    update(engine, mini_batch(s.fields))
    out = {"through": (weights(engine), weights(engine, "ema:0.3"))}
    merged = one_rank_checkpoint(Path(path))
    for name in ("resumed", "resumed_defect", "resumed_from_one_rank"):
        engine = build_engine(s.models["tied"], lr=1e-2)
        engine.attach(method, chunk=64)
        fresh = {k: v.clone() for k, v in engine.teachers.shards["ema:0.3"].items()}
        engine.load_checkpoint(str(merged) if name.endswith("one_rank") else path, del_local_after_load=False)
        if name.endswith("_defect"):  # the teacher starts again
            for key, shard in engine.teachers.shards["ema:0.3"].items():
                shard.copy_(fresh[key])
        update(engine, mini_batch(s.fields))
        out[name] = (weights(engine), weights(engine, "ema:0.3"))
    return out


def case_first_learning_rate(s: Setting) -> dict[str, Any]:
    """Learning rate and movement of the first update in a warm-up of 5; then with verl's own schedule."""
    from vopd.backbone import verl_internals
    from vopd.backbone.engine import ScoringEngine

    def play() -> dict[str, Any]:
        engine = build_engine(s.models["tied"], lr=1e-2, warmup=5)
        engine.attach(s.methods["probe"]("crop", "initial"), chunk=64)
        before = shards(engine)
        rates = [engine.optimizer.param_groups[0]["lr"]]
        update(engine, mini_batch(s.fields))
        moved = max((v - before[k]).abs().max().item() for k, v in shards(engine).items())
        rates += [engine.lr_scheduler_step() for _ in range(6)]
        return {"rates": rates, "moved": moved}

    out = {"ours": play()}
    with mock.patch.object(
        ScoringEngine, "_build_lr_scheduler", verl_internals.FSDPEngineWithLMHead._build_lr_scheduler
    ):
        out["verl_defect"] = play()
    return out


def case_old_before_update(s: Setting) -> dict[str, Any]:
    """Old log-probs by the engine: those of the update that follows, and of the policy before a moved one."""
    engine = build_engine(s.models["tied"], lr=1e-2)
    engine.attach(s.methods["probe"]("crop", "initial"), chunk=3)
    with engine.eval_mode():
        old = [row.clone() for row in engine.log_probs(mini_batch(s.fields)).unbind()]
    first = update(engine, mini_batch(s.fields))["rows"]
    second = update(engine, mini_batch(s.fields))["rows"]
    return {
        "apart": max((old[i] - first[i]["log_prob"]).abs().max().item() for i in first),
        "apart_after_update": max((old[i] - second[i]["log_prob"]).abs().max().item() for i in second),
    }


def case_one_update_a_batch(s: Setting) -> dict[str, Any]:
    """A method with a ratio: old log-probs by a pass before the update, and none given (the update's own)."""
    engine = s.attach(s.methods["ratio"]())
    with engine.eval_mode():
        old = list(engine.log_probs(mini_batch(s.fields)).unbind())
    given = [f | {"old_log_probs": o} for f, o in zip(s.fields, old, strict=True)]
    return {
        "pass": update(engine, mini_batch(given)),
        "own": update(s.attach(s.methods["ratio"]()), mini_batch(s.fields)),
    }


def case_rollout_log_probs(s: Setting) -> dict[str, Any]:
    """Vision-OPD as its authors' script, the policy's log-probs by so much above the rollout's; and without these."""
    from vopd.errors import UserError
    from vopd.method import build

    settings = {
        "module": "vopd.vision_opd",
        "top_k": 20,
        "aggregation": "token_mean",
        "importance_limit": 2.0,
    }
    engine = build_engine(s.models["tied"], lr=0.0)
    engine.attach(build(settings), chunk=3)
    with engine.eval_mode():
        own = list(engine.log_probs(mini_batch(s.fields)).unbind())
    out: dict[str, Any] = {}
    for ratio in (1.0, 1.5, 4.0):
        fields = [f | {"rollout_log_probs": o - math.log(ratio)} for f, o in zip(s.fields, own, strict=True)]
        out[f"{ratio}"] = update(engine, mini_batch(fields))
        out[f"{ratio}_split"] = update(engine, mini_batch(fields, LONGEST, packed=False))
    without = [{k: v for k, v in f.items() if k != "rollout_log_probs"} for f in s.fields]
    try:
        update(engine, mini_batch(without))
    except UserError as error:
        out["without"] = str(error)
    return out


def case_prepared(s: Setting) -> dict[str, Any]:
    """An update with two of four rows kept, of these two alone, with weights, and with none kept (twice as defect)."""

    def fields(kept: list[bool], weights: list[float] | None = None) -> list[dict[str, Any]]:
        more = [{"kept": torch.tensor(k)} for k in kept]
        for i, weight in enumerate(weights or []):
            more[i]["weights"] = torch.tensor(weight)
        return [f | m for f, m in zip(s.fields, more, strict=True)]

    method = s.methods["probe"]("crop", "ema", 0.3)
    two = [True, False, True, False]
    played = {
        "all": update(s.attach(method), mini_batch(s.fields)),
        "two": update(s.attach(method), mini_batch(fields(two))),
        "two_split": update(s.attach(method), mini_batch(fields(two), LONGEST)),
        "weighted": update(s.attach(method), mini_batch(fields([True] * 4, [2.0, 0.0, 2.0, 0.0]))),
    }
    if torch.distributed.get_world_size() == 1:
        played["two_alone"] = update(s.attach(method), mini_batch([s.fields[0], s.fields[2]]))
    out = {k: {"loss": v["loss"], "grads": v["grads"]} for k, v in played.items()}
    engine = build_engine(s.models["tied"], lr=1e-2)
    engine.attach(method, chunk=64)
    update(engine, mini_batch(s.fields))  # momentum that would move the weights
    student, teacher = shards(engine), {k: v.clone() for k, v in engine.teachers.shards["ema:0.3"].items()}
    metrics = update(engine, mini_batch(fields([False] * 4)))["metrics"]
    out["none"] = {
        "empty": metrics["empty_updates"],
        "skipped": metrics["skipped_updates"],
        "student_moved": any(not torch.equal(student[k], v) for k, v in shards(engine).items()),
        "teacher_moved": any(
            not torch.equal(teacher[k], v) for k, v in engine.teachers.shards["ema:0.3"].items()
        ),
    }
    return out


def case_stock(s: Setting) -> dict[str, Any]:
    """Three updates on one recorded batch: our recipe, and verl's own head, advantages and actor loss."""
    from dataclasses import replace
    from functools import partial

    import numpy as np
    from verl.trainer.ppo import core_algos
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    from vopd.backbone import pixels, verl_internals
    from vopd.backbone.step_rows import row_fields, step_rollouts
    from vopd.method import build

    keys = ["0_0_0", "0_1_0", "1_0_0", "1_1_0"]
    lengths = list(RESPONSE_LENGTHS)
    records = [
        {"correct": c, "truncated": False, "response_tokens": n}
        for c, n in zip([True, False, False, True], lengths, strict=True)
    ]
    rollouts = step_rollouts(keys, records, 8)
    out: dict[str, Any] = {}
    for name, settings, mode, low, high in (
        ("grpo", {"module": "baselines.grpo"}, "seq-mean-token-mean", 0.2, 0.2),
        ("dapo", {"module": "baselines.dapo"}, "token-mean", 0.2, 0.28),
    ):
        method = build(settings)
        rollouts = replace(rollouts, rewards_B=method.rewards(rollouts))
        advantages = row_fields(method, rollouts)["advantages"].unbind()

        ours = double_engine(s.models["tied"], lr=1e-5)
        ours.attach(method, chunk=3)
        with ours.eval_mode():
            # Another policy's, differently so by row: with a ratio of 1 the losses of a group would cancel.
            old = [row + 0.05 * i for i, row in enumerate(ours.log_probs(mini_batch(s.fields)).unbind())]
        fields = [
            f | {"old_log_probs": o, "advantages": a}
            for f, o, a in zip(s.fields, old, advantages, strict=True)
        ]
        out[name] = {"ours": [], "stock": []}
        for _ in range(3):
            played = update(ours, mini_batch(fields, packed=False))
            out[name]["ours"].append((played["loss"], played["metrics"]["grad_norm"]))

        width = max(lengths)
        mask_BT = (torch.arange(width) < torch.tensor(lengths)[:, None]).float()
        scores_BT = torch.zeros_like(mask_BT)
        for i, n in enumerate(lengths):
            scores_BT[i, n - 1] = rollouts.rewards_B[i]
        verls_BT, _ = core_algos.compute_grpo_outcome_advantage(
            scores_BT, mask_BT, np.array(["a", "a", "b", "b"], dtype=object)
        )
        config = FSDPActorConfig(
            strategy="fsdp2",
            rollout_n=2,
            ppo_mini_batch_size=4,
            use_dynamic_bsz=True,
            loss_agg_mode=mode,
            clip_ratio=low,
            clip_ratio_low=low,
            clip_ratio_high=high,
        )
        stock = double_engine(s.models["tied"], lr=1e-5)  # without a method it is verl's engine
        rows = []
        for i, f in enumerate(s.fields):
            full = f["rendered"]["full"]
            rows.append(
                {
                    "input_ids": f["input_ids"],
                    "prompts": full["prompt_ids"],
                    "responses": f["responses"],
                    "response_mask": f["response_mask"],
                    "loss_mask": f["loss_mask"],
                    "old_log_probs": old[i],
                    "advantages": verls_BT[i, : lengths[i]],
                    "multi_modal_inputs": pixels.unpacked(full["multi_modal_inputs"]),
                }
            )
        from vopd.backbone.rendering import with_response

        positions = [with_response(f["rendered"]["full"], f["responses"])[1] for f in s.fields]
        for _ in range(3):
            data = mini_batch(rows, packed=False)
            data["position_ids"] = verl_internals.nested_positions(positions)
            with stock.train_mode():
                result = stock.train_batch(data, partial(ppo_loss, config))
            out[name]["stock"].append((sum(result["loss"]), float(result["metrics"]["grad_norm"])))
    return out


CASES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    name.removeprefix("case_"): function for name, function in list(globals().items()) if name[:5] == "case_"
}


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["VERL_PLATFORM"] = "cpu"
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{folder}/store{ranks}"
    torch.distributed.init_process_group("cpu:gloo", init_method=store, rank=rank, world_size=ranks)
    from vopd.backbone import verl_internals

    models = {name: folder / name for name in ("tied", "untied")}
    processor = verl_internals.hf_processor(str(models["tied"]))
    setting = Setting(models, make_fields(processor), make_methods(), folder, processor)
    setting.still = build_engine(models["tied"], lr=0.0)
    for name in sys.argv[2:] or CASES:
        result = CASES[name](setting)
        result_of_rank = folder / f"{name}.{ranks}.{rank}.pt"
        torch.save(result, result_of_rank)
        print(f"{name}: done", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(
        0
    )  # all is saved; gloo's threads, still alive while the interpreter ends, abort a rank now and then


if __name__ == "__main__":
    main()
