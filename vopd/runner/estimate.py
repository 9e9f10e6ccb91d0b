"""What a run will take, from its settings and the model's config.json alone: memory, disk, seconds, with formulas.

The trainer and vLLM take turns on a GPU: weights, momenta and teachers stay, the rest comes and goes. Prompts and
responses are taken at their limits, so the figures are an upper end. Formulas follow `vopd/backbone/engine.py`,
`projection.py`, `shards.py` and `vopd/teacher.py`; bytes that a layer keeps for its backward were counted on
transformers' layers with the plain-torch delta rule (`tests/vopd/runner/test_estimate.py` counts them again). What is
assumed says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from omegaconf import DictConfig

from vopd.backbone.shards import OPTIMIZER, WEIGHTS
from vopd.common.model_shape import ModelShape
from vopd.method import Method
from vopd.teacher import components, stores

GIB = 2**30
FP32, BF16 = 4, 2
BUCKET = 2 * GIB  # verl's checkpoint_engine.update_weights_bucket_megabytes: 2,048, on the device
CONTEXT = 2 * GIB  # assumed: CUDA context, NCCL, cuBLAS workspaces, fragments of the allocator
ENGINE_WORK = 2 * GIB  # assumed: vLLM's activations, CUDA graphs and sampler
HOST_PROCESS = {
    "cpu": 0.6 * GIB,
    "cuda": 4 * GIB,
}  # assumed: torch and its libraries, pinned buffers; a rank, a server
HOST_BASE = {"cpu": 3 * GIB, "cuda": 8 * GIB}  # assumed: Ray, driver, rollout worker, TransferQueue
IMAGE_CACHE_GIB = {
    "cpu": 0.1,
    "cuda": 4,
}  # vLLM's cache of processed images; verl_cpu.yaml, else vLLM's own default
RULE_CHUNK = 40  # vopd/backbone/delta_rule.py


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet: memory in GiB, bf16 operations a second (dense), bytes a second."""

    name: str
    memory_gib: float
    operations: float
    bandwidth: float


CARDS = {
    card.name: card
    for card in (
        Card("L40S", 44, 362e12, 0.864e12),
        Card("A100-80GB", 79, 312e12, 2.0e12),
        Card("H100", 79, 989e12, 3.35e12),
        Card("H200", 139, 989e12, 4.8e12),
    )
}
USE_OF_OPERATIONS, USE_OF_BANDWIDTH = 0.35, 0.5
"""Shares of a card's data sheet that are assumed to be reached."""


@dataclass(frozen=True)
class Figure:
    """One line: what, how much (bytes, seconds or a count, as `unit` says: B, s or empty), and how that comes about."""

    name: str
    value: float
    unit: str
    formula: str


@dataclass(frozen=True)
class Estimate:
    """All figures. `resident` stays on a GPU throughout; `update` and `rollout` come in turns."""

    parameters: tuple[Figure, ...]
    resident: tuple[Figure, ...]
    update: tuple[Figure, ...]
    rollout: tuple[Figure, ...]
    host: tuple[Figure, ...]
    disk: tuple[Figure, ...]
    seconds: tuple[Figure, ...]
    least_rollout: Figure

    @property
    def resident_bytes(self) -> float:
        """What a rank holds at any time."""
        return total(self.resident)

    @property
    def update_bytes(self) -> float:
        """Peak of a rank while the student learns."""
        return total(self.resident) + total(self.update)

    @property
    def beside_rollout_bytes(self) -> float:
        """What a rank holds while vLLM is awake: what stays, and the bucket of the weight sync."""
        return self.resident_bytes + BUCKET

    @property
    def device_bytes(self) -> float:
        """Least memory of a GPU for this run: the larger of the two turns."""
        return max(self.update_bytes, self.beside_rollout_bytes + self.least_rollout.value)

    @property
    def host_bytes(self) -> float:
        """Main memory of a node."""
        return total(self.host)

    @property
    def disk_bytes(self) -> float:
        """Room in the run folder."""
        return total(self.disk)


def total(figures: tuple[Figure, ...]) -> float:
    """Their sum."""
    return sum(figure.value for figure in figures)


def estimate(config: DictConfig, method: Method, shape: ModelShape, card: Card = CARDS["H100"]) -> Estimate:
    """The figures of a run.

    Args:
        config: its settings, resolved (`vopd.config.load`).
        method: what they name.
        shape: of the model.
        card: whose data sheet the seconds are taken from; of no effect on a CPU.
    """
    run = _Run(config, method, shape)
    return Estimate(
        parameters=tuple(_parameters(shape)),
        resident=tuple(run.resident()),
        update=tuple(run.update()),
        rollout=tuple(run.rollout()),
        host=tuple(run.host()),
        disk=tuple(run.disk()),
        seconds=tuple(run.seconds(card)) if run.cuda else (),
        least_rollout=run.least_rollout(),
    )


def _parameters(shape: ModelShape) -> Iterator[Figure]:
    sizes = {
        "embedding": f"{shape.vocabulary:,} x {shape.hidden:,}",
        "head": "tied to the embedding" if shape.tied else f"{shape.vocabulary:,} x {shape.hidden:,}",
        "attention layers": f"{shape.attention_layers} layers",
        "GatedDeltaNet layers": f"{shape.delta_layers} layers",
        "vision tower": f"{shape.vision.depth} blocks and both ends",
    }
    for name, count in shape.parts.items():
        yield Figure(name, count, "", sizes.get(name, f"{shape.layers} layers"))


class _Run:
    """The quantities that the formulas share."""

    def __init__(self, config: DictConfig, method: Method, shape: ModelShape) -> None:
        self.config, self.method, self.shape = config, method, shape
        train, rollout, hardware = config.train, config.rollout, config.hardware
        self.cuda = hardware.device == "cuda"
        self.device = "cuda" if self.cuda else "cpu"
        self.compute = (
            BF16 if self.cuda else FP32
        )  # verl_cuda.yaml, verl_cpu.yaml: mixed_precision.param_dtype
        self.ranks_of_node = hardware.devices_per_node
        self.ranks = hardware.nodes * self.ranks_of_node
        self.store_names = stores(method.scorers.values())
        self.kept_stores = [name for name in self.store_names if name != "current"]
        self.seen = {(s, scorer.view) for scorer in method.scorers.values() for s, _ in components(scorer)}
        self.rows = train.prompts * train.rollouts
        self.rank_rows = self.rows // (train.updates_per_batch * self.ranks)
        self.prompt = rollout.max_prompt_tokens
        self.response = max(1, int(rollout.train_share * rollout.max_response_tokens))
        self.micro = self._micro_batch(train)
        self.image_tokens = self.prompt  # an image's tokens are nearly all of a prompt's

    def _micro_batch(self, train: Any) -> int:
        """Tokens of the largest micro-batch of a rank. Padded rows share one copy of their prompt."""
        most = self.rank_rows * (self.prompt + self.response)
        limit = min(train.max_tokens_per_micro_batch, most)
        if train.packed:
            return int(limit)
        rows = max(1, limit // (self.prompt + self.response))
        return int(ceil(rows / train.rollouts) * self.prompt + rows * self.response)

    @property
    def micro_rows(self) -> int:
        """Rows of the largest micro-batch."""
        limit = self.config.train.max_tokens_per_micro_batch // (self.prompt + self.response)
        return int(max(1, min(limit, self.rank_rows)))

    # ---- a rank's memory ----------------------------------------------------------------------------------------

    def resident(self) -> Iterator[Figure]:
        p, r = self.shape.parameters, self.ranks
        yield Figure("weights, fp32", FP32 * p / r, "B", f"4 x {p:,} / {r} ranks")
        yield Figure("AdamW's two momenta", 2 * FP32 * p / r, "B", f"8 x {p:,} / {r} ranks")
        for name in self.kept_stores:
            yield Figure(f"teacher {name}, fp32", FP32 * p / r, "B", f"4 x {p:,} / {r} ranks")
        if self.cuda:
            yield Figure("CUDA context and libraries", CONTEXT, "B", "assumed")

    def update(self) -> Iterator[Figure]:
        p, r, c, shape = self.shape.parameters, self.ranks, self.compute, self.shape
        yield Figure("gradients, fp32", FP32 * p / r, "B", f"4 x {p:,} / {r} ranks")
        if self.store_names:
            hidden = len(self.seen) * self.rank_rows * self.response * shape.hidden * c
            yield Figure(
                "teachers' hidden states", hidden, "B",
                f"{len(self.seen)} (store, view) x {self.rank_rows} rows x {self.response:,} tokens x "
                f"{shape.hidden:,} x {c}",
            )  # fmt: skip
            yield Figure(
                "teachers' head weights", len(self.store_names) * shape.embedding * c, "B",
                f"{len(self.store_names)} stores x {shape.vocabulary:,} x {shape.hidden:,} x {c}",
            )  # fmt: skip
        yield from self._gathered()
        yield from self._activations()
        yield max(self._head(), self._layer_work(), key=lambda figure: figure.value)

    def _gathered(self) -> Iterator[Figure]:
        """The root stays whole from forward to backward; the layers are gathered one ahead of the one computing."""
        c, shape = self.compute, self.shape
        root = shape.hidden + shape.vision.ends + (shape.embedding if shape.tied else 0)
        yield Figure(
            "root unit, gathered, with its gradient", root * (2 * c + FP32), "B",
            f"{root:,} ({'table, ' if shape.tied else ''}last norm, ends of the tower) x ({c} + {c} + 4 to reduce)",
        )  # fmt: skip
        layer = shape.largest_layer
        yield Figure(
            "two layers gathered, one layer's gradient", layer * (3 * c + FP32), "B",
            f"{layer:,} x (2 x {c} + {c} + 4 to reduce)",
        )  # fmt: skip
        if not shape.tied:
            yield Figure(
                "embedding or head, gathered", shape.embedding * c, "B", f"{shape.embedding:,} x {c}"
            )

    def _activations(self) -> Iterator[Figure]:
        c, shape = self.compute, self.shape
        patches = self.micro_patches
        if self.config.train.gradient_checkpointing:
            kept: float = shape.layers * shape.hidden * c
            formula = f"{shape.layers} layers x {shape.hidden:,} x {c}"
            tower: float = shape.vision.depth * shape.vision.hidden * c
        else:
            kept = shape.attention_layers * attention_bytes(shape, c) + shape.delta_layers * delta_bytes(
                shape, c
            )
            formula = (
                f"({shape.attention_layers} x {attention_bytes(shape, c):,.0f} + "
                f"{shape.delta_layers} x {delta_bytes(shape, c):,.0f} bytes)"
            )
            tower = shape.vision.depth * vision_bytes(shape, c)
        yield Figure("activations", self.micro * kept, "B", f"{self.micro:,} tokens x {formula}")
        yield Figure("the tower's activations", patches * (tower + vision_ends_bytes(shape, c)), "B",
                     f"{patches:,} patches x {tower + vision_ends_bytes(shape, c):,.0f} bytes")  # fmt: skip

    @property
    def micro_patches(self) -> int:
        """Patches of a micro-batch's distinct images: the rollouts of a prompt share theirs."""
        images = ceil(self.micro_rows / self.config.train.rollouts)
        return int(images * self.image_tokens * self.shape.vision.merge**2)

    def _layer_work(self) -> Figure:
        """What the backward of one layer holds: its activations again under checkpointing, and their gradients."""
        c, shape = self.compute, self.shape
        largest = max(
            attention_bytes(shape, c) if shape.attention_layers else 0,
            delta_bytes(shape, c) if shape.delta_layers else 0,
        )
        share = 1.5 if self.config.train.gradient_checkpointing else 0.5
        return Figure(
            "one layer's backward", self.micro * largest * share, "B",
            f"{self.micro:,} tokens x {largest:,.0f} bytes x {share} (gradients of activations: half, assumed)",
        )  # fmt: skip

    def _head(self) -> Figure:
        """Logits of one chunk in a few copies, and the weight's gradient in fp32."""
        shape = self.shape
        chunk = min(self.config.train.chunk, self.micro_rows * self.response)
        copies = logit_copies(self.config, self.method)
        value = copies * chunk * shape.vocabulary * FP32 + shape.embedding * FP32
        return Figure(
            "head: logits of a chunk, gradient of its weight", value, "B",
            f"{copies} copies x {chunk:,} tokens x {shape.vocabulary:,} x 4 + {shape.embedding:,} x 4",
        )  # fmt: skip

    # ---- vLLM ---------------------------------------------------------------------------------------------------

    def rollout(self) -> Iterator[Figure]:
        """While vLLM is awake; it sleeps during the update (on a CPU it is a process of its own, always awake)."""
        shape, c, parallel = self.shape, self.compute, self.config.rollout.tensor_parallel
        yield Figure(
            "vLLM's weights", c * shape.parameters / parallel, "B",
            f"{c} x {shape.parameters:,} / rollout.tensor_parallel={parallel}",
        )  # fmt: skip
        if not self.cuda:
            cache = self.config.rollout.cache_gib * GIB
            yield Figure("vLLM's cache", cache, "B", f"rollout.cache_gib={self.config.rollout.cache_gib:g}")
            return
        token, state = (
            self.cache_of_token / parallel,
            shape.delta_layers * shape.delta.state * FP32 / parallel,
        )
        length, at_once = self.prompt + self.config.rollout.max_response_tokens, self.sequences_at_once
        yield Figure(
            "vLLM's cache for all sequences at once", at_once * (length * token + state), "B",
            f"{at_once} sequences x ({length:,} tokens x {token:,.0f} + a state of {state:,.0f}); else fewer at once",
        )  # fmt: skip
        yield Figure("vLLM's activations, CUDA graphs", ENGINE_WORK, "B", "assumed")

    def least_rollout(self) -> Figure:
        """What vLLM cannot do without: its weights, and the cache of one sequence at its longest."""
        figures = tuple(self.rollout())
        if not self.cuda:
            return Figure("vLLM", total(figures), "B", "weights and rollout.cache_gib")
        cache = figures[1].value / self.sequences_at_once
        value = figures[0].value + cache + ENGINE_WORK
        return Figure("vLLM at least", value, "B", "weights, one sequence's cache, activations")

    @property
    def cache_of_token(self) -> int:
        """Bytes of keys and values of one token in all attention layers, bf16."""
        attention = self.shape.attention
        return self.shape.attention_layers * 2 * attention.key_value_heads * attention.head_dim * BF16

    @property
    def sequences_at_once(self) -> int:
        """Sequences that one server answers at a time."""
        servers = self.ranks // self.config.rollout.tensor_parallel
        return int(min(self.config.rollout.max_batch, ceil(self.rows / servers)))

    # ---- host and disk ------------------------------------------------------------------------------------------

    def host(self) -> Iterator[Figure]:
        n = self.ranks_of_node
        servers = max(1, n // self.config.rollout.tensor_parallel)
        base, each = HOST_BASE[self.device], HOST_PROCESS[self.device]
        yield Figure("Ray, driver, rollout worker, queue", base, "B", "assumed")
        yield Figure(
            "ranks and servers, their libraries", (n + servers) * each, "B",
            f"({n} ranks + {servers} servers) x {each / GIB:g} GiB, assumed",
        )  # fmt: skip
        images = IMAGE_CACHE_GIB[self.device] * GIB * servers
        yield Figure(
            "vLLM's cache of images", images, "B", f"{servers} x {IMAGE_CACHE_GIB[self.device]:g} GiB"
        )
        views = self._views()
        if self.cuda:
            # One after the other: loading, a step, and writing a checkpoint.
            yield max((views, self._loading(), self._writing()), key=lambda figure: figure.value)
        else:
            yield views
            yield Figure("ranks' tensors", n * (total(tuple(self.resident())) + total(tuple(self.update()))), "B",
                         f"{n} ranks x (what stays + what an update adds)")  # fmt: skip
            yield Figure(
                "servers' tensors", servers * total(tuple(self.rollout())), "B", f"{servers} servers"
            )

    def _views(self) -> Figure:
        shape, views, prompts = self.shape, len(self.method.views), self.config.train.prompts
        patches = self.image_tokens * shape.vision.merge**2
        return Figure(
            "a step's views", 3 * prompts * views * patches * shape.vision.patch_bytes, "B",
            f"3 places (worker, queue, ranks) x {prompts} prompts x {views} views x {patches:,} patches x "
            f"{shape.vision.patch_bytes:,}",
        )  # fmt: skip

    def _loading(self) -> Figure:
        p, copies = self.shape.parameters, self.ranks_of_node if self.shape.tied else 1
        why = "a tied model is loaded by every rank" if self.shape.tied else "rank 0"
        return Figure("model while it is loaded", copies * FP32 * p, "B", f"{copies} x 4 x {p:,} ({why})")

    def _writing(self) -> Figure:
        """`vopd.backbone.shards` copies one kind of tensors at a time to the host; the optimiser's are the largest."""
        p, share = self.shape.parameters, self.ranks_of_node / self.ranks
        return Figure(
            "a checkpoint while it is written",
            2 * FP32 * p * share,
            "B",
            f"8 x {p:,} x {share:g} of the ranks",
        )

    def disk(self) -> Iterator[Figure]:
        p, keep = self.shape.parameters, self.config.train.keep
        kinds = [WEIGHTS, OPTIMIZER, *self.kept_stores]
        yield Figure(
            "checkpoints", (keep + 1) * p * FP32 * (len(kinds) + 1), "B",
            f"(train.keep={keep} + 1 while it is written) x {p:,} x 4 x ({len(kinds)} kinds, the optimiser twice)",
        )  # fmt: skip
        width = {"float32": 4, "": 0}.get(self.config.export, 2)
        yield Figure("exported model", width * p, "B", f"{width} x {p:,}")

    # ---- time ---------------------------------------------------------------------------------------------------

    def seconds(self, card: Card) -> Iterator[Figure]:
        shape, train = self.shape, self.config.train
        speed = card.operations * USE_OF_OPERATIONS * self.ranks
        said = f"{USE_OF_OPERATIONS:.0%} of {card.operations / 1e12:g} TFLOP/s ({card.name}) x {self.ranks}, assumed"
        tokens, answers = self.rows * (self.prompt + self.response), self.rows * self.response
        patches = self.config.train.prompts * self.image_tokens * shape.vision.merge**2
        attending = 2 * shape.attention_layers * shape.attention.width * (self.prompt + self.response)
        forward = 2 * shape.body * tokens + attending * tokens + 2 * shape.vision.parameters * patches
        times = 4 if train.gradient_checkpointing else 3
        head = 2 * shape.embedding * answers
        work = times * forward + 4 * head
        yield Figure(
            "student's update", work / speed, "s",
            f"{times} x [2 x {shape.body:,} x {tokens:,} tokens + attention + tower] + 8 x {shape.embedding:,} x "
            f"{answers:,} answered tokens = {work:.2e}; {said}",
        )  # fmt: skip
        if self.seen:
            passes = len(self.seen)
            yield Figure(
                "teachers", passes * (forward + head) / speed, "s",
                f"{passes} (store, view) x [2 x {shape.body:,} x {tokens:,} + attention + tower + head]; {said}",
            )  # fmt: skip
        if self.method.needs_old_log_probs and train.updates_per_batch > 1:
            yield Figure("old log-probs", (forward + head) / speed, "s", f"one forward; {said}")
        yield from self._generation(card, speed, tokens - answers, said)

    def _generation(self, card: Card, speed: float, prompt_tokens: int, said: str) -> Iterator[Figure]:
        shape, parallel = self.shape, self.config.rollout.tensor_parallel
        prefill = 2 * shape.body * prompt_tokens / speed
        yield Figure("prompts", prefill, "s", f"2 x {shape.body:,} x {prompt_tokens:,} tokens; {said}")
        at_once = self.sequences_at_once
        rounds = ceil(self.rows / (self.ranks // parallel) / at_once)
        context = self.prompt + self.response / 2
        states = shape.delta_layers * shape.delta.state * FP32
        read = BF16 * (shape.body + shape.embedding) + at_once * (context * self.cache_of_token + 2 * states)
        speed_of_memory = card.bandwidth * USE_OF_BANDWIDTH * parallel
        yield Figure(
            "responses", rounds * self.response * read / speed_of_memory, "s",
            f"{rounds} rounds x {self.response:,} tokens x {read / GIB:.1f} GiB (weights, cache, states of {at_once} "
            f"sequences); {USE_OF_BANDWIDTH:.0%} of {card.bandwidth / 1e12:g} TB/s ({card.name}) x {parallel}, assumed",
        )  # fmt: skip


def logit_copies(config: DictConfig, method: Method) -> int:
    """Tensors of chunk x vocabulary in fp32 at a time: the policies' logits and their gradient.

    A divergence over the whole vocabulary (`method.top_k=null`) keeps log-probs of each policy beside them.
    """
    policies = 1 + len(method.scorers)
    whole = "top_k" in config.method and config.method.top_k is None
    return (2 * policies if whole else policies) + 1


# ---- bytes that a layer keeps for its backward, per token ------------------------------------------------------------


def attention_bytes(shape: ModelShape, compute: int) -> float:
    """A decoder layer with softmax attention: mixing, MLP and two norms."""
    a, wide = shape.attention, compute == FP32
    key_value = a.key_value_heads * a.head_dim
    mixing = (32 if wide else 18) * a.width + (16 if wide else 12) * key_value + 8 * a.heads
    return mixing + _rest_of_layer(shape, compute)


def delta_bytes(shape: ModelShape, compute: int) -> float:
    """A decoder layer with GatedDeltaNet in plain torch, which computes in fp32; MLP and two norms."""
    d, wide = shape.delta, compute == FP32
    head: float = 837 + (40 if wide else 48) * d.key_dim + (48 if wide else 34) * d.value_dim
    head += FP32 * d.key_dim * d.value_dim / RULE_CHUNK
    return d.value_heads * head + (24 if wide else 8) * d.keys + _rest_of_layer(shape, compute)


def _rest_of_layer(shape: ModelShape, compute: int) -> float:
    """Two norms in fp32 (16 H), the inputs of mixing and MLP (2 H), and four tensors of the MLP's width."""
    return 16 * shape.hidden + 2 * compute * shape.hidden + 4 * compute * shape.feed_forward.active_width


def vision_bytes(shape: ModelShape, compute: int) -> float:
    """A block of the tower, per patch."""
    v, wide = shape.vision, compute == FP32
    return (44 if wide else 23) * v.hidden + 2 * compute * v.intermediate


def vision_ends_bytes(shape: ModelShape, compute: int) -> float:
    """Patch embedding and merger, per patch."""
    return compute * (shape.vision.patch_values + 4.75 * shape.vision.hidden)
