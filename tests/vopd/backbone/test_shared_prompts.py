"""Responses behind one copy of their prompt score, and pull, as each behind a copy of its own."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from vopd.backbone.delta_rule import gated_delta_rule
from vopd.backbone.model_inputs import shared
from vopd.backbone.shared_prompts import Layout, SharedPrompts

VOCABULARY = 50


def in_full(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any) -> Any:
    return gated_delta_rule(query, key, value, g.to(query.dtype), beta)[0], None


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        attn_implementation="sdpa",
    )
    model = Qwen3_5ForCausalLM(config)
    # As initialised the convolution and the recurrence hardly matter.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data *= 4 if "conv1d" in name or "linear_attn" in name else 2
    for layer in SharedPrompts(model).layers:
        # transformers' own one rounds to float32; that the two agree is tested in test_delta_rule.py.
        layer.chunk_gated_delta_rule = in_full
    return model.double()


@dataclass
class Case:
    """Prompts, and responses with the prompt of each."""

    prompts: list[Tensor]
    of_B: list[int]
    responses: list[Tensor]

    def rendered(self) -> list[dict[str, Any]]:
        return [
            {"key": "", "prompt_ids": p, "position_ids": torch.arange(len(p)).expand(4, -1).clone()}
            for p in (self.prompts[i] for i in self.of_B)
        ]


def case(prompts: list[int], responses: list[tuple[int, int]], seed: int = 0) -> Case:
    """Lengths of the prompts; per response its prompt (modulo their number) and its length."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(VOCABULARY, (length,), generator=generator)

    return Case(
        [ids(n) for n in prompts],
        [i % len(prompts) for i, _ in responses],
        [ids(n) for _, n in responses],
    )


Found = tuple[list[Tensor], dict[str, Tensor]]


def result(model: Any, logits: list[Tensor]) -> Found:
    """Logits at the response tokens, and the gradient of a number made of them all."""
    model.zero_grad()
    sum((x.log_softmax(-1)[:, 3] * torch.arange(1, len(x) + 1)).sum() for x in logits).backward()  # type: ignore[union-attr]
    return [x.detach() for x in logits], {n: p.grad.clone() for n, p in model.named_parameters()}


def alone(model: Any, c: Case) -> Found:
    """Each response behind its own copy of its prompt, through transformers' layers as they are."""
    SharedPrompts(model).use(None)
    logits = []
    for i, response in zip(c.of_B, c.responses, strict=True):
        whole = torch.cat([c.prompts[i], response])
        logits.append(model(whole[None], use_cache=False).logits[0, len(c.prompts[i]) - 1 : -1])
    return result(model, logits)


def together(model: Any, c: Case) -> Found:
    rows = shared(c.rendered(), c.responses)
    assert rows.layout is not None
    switch = SharedPrompts(model)
    switch.use(rows.layout)
    try:
        out = model(
            torch.stack(rows.ids),
            attention_mask=rows.layout.mask(),
            position_ids=torch.stack(rows.positions, 1),
            use_cache=False,
        ).logits
    finally:
        switch.use(None)
    return result(model, list(out.flatten(0, 1)[rows.predicted_at_N].split([len(r) for r in c.responses])))


def check_equal(first: Found, second: Found) -> None:
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for name in first[1]:
        scale = second[1][name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            first[1][name] / scale, second[1][name] / scale, rtol=0, atol=1e-5, msg=name
        )


FIXED = case([5, 40, 2], [(0, 4), (1, 35), (0, 1), (2, 7), (1, 3), (0, 9)])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(2, 36), min_size=1, max_size=3, unique=True),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 36)), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_scores_and_gradients_are_those_of_responses_alone(
    model: Any, prompts: list[int], responses: list[tuple[int, int]], seed: int
) -> None:
    c = case(prompts, responses, seed)
    check_equal(together(model, c), alone(model, c))


@contextmanager
def response_sees_its_neighbour() -> Iterator[None]:
    def causal(self: Layout) -> Tensor:
        return torch.ones(self.width, self.width, dtype=torch.bool).tril()[None, None]

    with mock.patch.object(Layout, "mask", causal):
        yield


@contextmanager
def padding_writes_to_the_state() -> Iterator[None]:
    def rule(self: Layout, *args: Any, **kwargs: Any) -> Any:
        full = Layout(torch.full_like(self.prompt_G, self.P), self.P, self.n, self.R)
        return exact(full, *args, **kwargs)

    exact = Layout.delta_rule
    with mock.patch.object(Layout, "delta_rule", rule):
        yield


@contextmanager
def convolution_starts_anew() -> Iterator[None]:
    exact = Layout.convolve

    def convolve(self: Layout, *args: Any, **kwargs: Any) -> Tensor:
        with mock.patch.object(Tensor, "repeat_interleave", lambda x, *_: torch.zeros_like(repeat(x, *_))):
            return exact(self, *args, **kwargs)

    repeat = Tensor.repeat_interleave
    with mock.patch.object(Layout, "convolve", convolve):
        yield


@contextmanager
def read_one_token_late() -> Iterator[None]:
    exact = Layout.positions
    with mock.patch.object(Layout, "positions", lambda *a: exact(*a) + 1):
        yield


@pytest.mark.parametrize(
    "defect",
    [
        None,
        response_sees_its_neighbour,
        padding_writes_to_the_state,
        convolution_starts_anew,
        read_one_token_late,
    ],
)
def test_each_part_is_needed(model: Any, defect: Any) -> None:
    expected = alone(model, FIXED)
    with defect() if defect else nullcontext():
        found = together(model, FIXED)
    if defect is None:
        check_equal(found, expected)
    else:
        with pytest.raises(AssertionError):
            check_equal(found, expected)


def test_an_empty_response_takes_no_position() -> None:
    c = case([5], [(0, 0), (0, 3)])
    rows = shared(c.rendered(), c.responses)
    assert len(rows.predicted_at_N) == 3
    assert len(shared(c.rendered()[:1], c.responses[:1]).predicted_at_N) == 0


def test_gradient_checkpoints_find_the_layout_again_in_the_backward(model: Any) -> None:
    expected = alone(model, FIXED)
    rows = shared(FIXED.rendered(), FIXED.responses)
    assert rows.layout is not None
    switch = SharedPrompts(model)
    model.train()
    model.gradient_checkpointing_enable()
    switch.use(rows.layout)
    try:
        mask, positions = rows.layout.mask(), torch.stack(rows.positions, 1)
        out = model(
            torch.stack(rows.ids), attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        logits = out.flatten(0, 1)[rows.predicted_at_N].split([len(r) for r in FIXED.responses])
        check_equal(result(model, list(logits)), expected)
    finally:
        switch.use(None)
        model.gradient_checkpointing_disable()
        model.eval()


def test_one_row_a_prompt() -> None:
    rows = shared(FIXED.rendered(), FIXED.responses)
    assert rows.layout is not None
    assert len(rows.ids) == 3
    assert (rows.layout.P, rows.layout.n, rows.layout.R) == (40, 3, 35)


def test_equal_images_with_other_questions_share_nothing() -> None:
    c = case([6, 6], [(0, 3), (1, 3)])
    assert len(shared(c.rendered(), c.responses).ids) == 2


def test_a_batch_of_another_shape_is_refused(model: Any) -> None:
    rows = shared(FIXED.rendered(), FIXED.responses)
    switch = SharedPrompts(model)
    switch.use(rows.layout)
    try:
        with pytest.raises(ValueError, match="do not fit the layout"):
            model(torch.stack(rows.ids)[:, :-1], use_cache=False)
    finally:
        switch.use(None)
