"""Teacher weights: exact exchange, float32 averages, and what a scorer mixes."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vopd.backbone.head import ScoringHead, active
from vopd.backbone.scoring import Component, ScoringContext
from vopd.method import ScoreChunk, Scorer
from vopd.teacher import TeacherWeights, components, stores


def student(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def step(module: nn.Module, size: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))


def test_scorers_name_the_weights_they_read() -> None:
    scorers = [
        Scorer("crop", "ema", 0.05),
        Scorer("crop", "trust_region", 0.3),
        Scorer("full", "current"),
        Scorer("crop", "ema", 0.05),
    ]
    assert stores(scorers) == ("current", "ema:0.05", "initial")
    assert components(scorers[1]) == (("initial", 0.7), ("current", 0.3))


def test_average_follows_the_formula_and_initial_stays() -> None:
    module = student()
    start = copy.deepcopy(dict(module.named_parameters()))
    teachers = TeacherWeights(module, ("ema:0.25", "initial", "current"))
    wanted = {k: p.detach().double() for k, p in start.items()}
    for _ in range(3):
        step(module, 0.1)
        teachers.update(module)
        wanted = {k: 0.75 * wanted[k] + 0.25 * p.detach().double() for k, p in module.named_parameters()}
    assert sorted(teachers.shards) == ["ema:0.25", "initial"]
    for key, value in wanted.items():
        torch.testing.assert_close(teachers.shards["ema:0.25"][key].double(), value, rtol=1e-6, atol=1e-7)
        assert torch.equal(teachers.shards["initial"][key], start[key])


def check_average_moves_as_far_as_it_should(dtype: torch.dtype) -> None:
    """100 steps of 2e-6, the size of a step at the paper's learning rate, on weights of a usual size."""
    module = nn.Linear(64, 64, bias=False)
    nn.init.normal_(module.weight, std=0.02)
    start = module.weight.detach().double().clone()
    teachers = TeacherWeights(module, ("ema:0.05",))
    shards = teachers.shards["ema:0.05"]
    shards["weight"] = shards["weight"].to(dtype)
    exact = start.clone()
    for _ in range(100):
        with torch.no_grad():
            module.weight.add_(2e-6 * torch.sign(start))
        teachers.update(module)
        exact += 0.05 * (module.weight.detach().double() - exact)
    moved = (shards["weight"].double() - start.to(dtype).double()).norm()
    assert moved == pytest.approx((exact - start).norm().item(), rel=0.01)


def test_small_steps_move_the_average() -> None:
    check_average_moves_as_far_as_it_should(torch.float32)


def test_teacher_twin_an_average_in_bfloat16_is_seen() -> None:
    with pytest.raises(AssertionError):
        check_average_moves_as_far_as_it_should(torch.bfloat16)


def test_half_precision_students_are_refused() -> None:
    module = student(torch.bfloat16)
    teachers = TeacherWeights(module, ("initial",))
    assert {v.dtype for v in teachers.shards["initial"].values()} == {torch.float32}
    with pytest.raises(TypeError, match="fp32"), teachers.in_place_of(module, "initial"):
        pass


@given(st.floats(-(2.0**99), 2.0**99, width=32), st.floats(-(2.0**-99), 2.0**-99, width=32))
def test_exchange_is_exact_to_the_bit(large: float, small: float) -> None:
    """Adding and subtracting a difference would lose the small one."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, small)
    teachers = TeacherWeights(module, ("initial",))
    nn.init.constant_(module.weight, large)
    before = module.weight.detach().clone()
    with teachers.in_place_of(module, "initial"):
        assert module.weight.item() == small
    assert torch.equal(module.weight, before)
    assert teachers.shards["initial"]["weight"].item() == small


def test_exchange_comes_back_after_an_exception() -> None:
    module = student()
    teachers = TeacherWeights(module, ("initial",))
    step(module, 1.0)
    before = copy.deepcopy(module.state_dict())

    def fail() -> None:
        with teachers.in_place_of(module, "initial"):
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def as_after_a_failed_forward(module: nn.Module) -> None:
    """FSDP2 leaves gathered parameters of the type of computation in place of the shards."""
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().bfloat16()))


def test_an_error_in_a_teachers_pass_surfaces_as_itself_and_the_shards_come_back() -> None:
    module = student()
    teachers = TeacherWeights(module, ("initial",))
    kept = copy.deepcopy(teachers.shards["initial"])
    step(module, 1.0)
    shards = dict(module.named_parameters())
    before = copy.deepcopy(shards)

    def run_out_of_memory() -> None:
        with teachers.in_place_of(module, "initial"):
            as_after_a_failed_forward(module)
            raise torch.OutOfMemoryError("on purpose")

    with pytest.raises(torch.OutOfMemoryError, match="on purpose"):
        run_out_of_memory()
    assert all(torch.equal(before[k], p) for k, p in shards.items())
    assert all(torch.equal(kept[k], p) for k, p in teachers.shards["initial"].items())


def test_where_the_way_back_fails_too_the_first_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = student()
    teachers = TeacherWeights(module, ("initial",))

    def refuse(*_: object) -> None:
        raise RuntimeError("the GPU is in error")

    def fail() -> None:
        with teachers.in_place_of(module, "initial"):
            monkeypatch.setattr("vopd.teacher._Buffer.exchange", refuse)
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose") as caught:
        fail()
    assert "the GPU is in error" in caught.value.__notes__[0]


def test_the_way_back_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = student()
    teachers = TeacherWeights(module, ("initial",))
    step(module, 1.0)
    before = copy.deepcopy(module.state_dict())

    def none_left(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    with teachers.in_place_of(module, "initial"):
        monkeypatch.setattr(torch, "empty", none_left)
        monkeypatch.setattr(torch.Tensor, "clone", none_left)
        monkeypatch.setattr(torch.Tensor, "new_empty", none_left)
    monkeypatch.undo()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_large_and_permuted_tensors_change_places_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vopd.teacher.PIECE", 5)
    module = student()
    module[0].weight = nn.Parameter(module[0].weight.detach().t())
    teachers = TeacherWeights(module, ("initial",))
    first = copy.deepcopy(module.state_dict())
    step(module, 1.0)
    second = copy.deepcopy(module.state_dict())
    with teachers.in_place_of(module, "initial"):
        assert all(torch.equal(first[k], v) for k, v in module.state_dict().items())
    assert all(torch.equal(second[k], v) for k, v in module.state_dict().items())
    assert all(torch.equal(first[k], v) for k, v in teachers.shards["initial"].items())


def test_current_is_the_student_itself() -> None:
    module = student()
    teachers = TeacherWeights(module, ("current",))
    assert teachers.shards == {}
    pointers = [p.data_ptr() for p in module.parameters()]
    with teachers.in_place_of(module, "current"):
        assert [p.data_ptr() for p in module.parameters()] == pointers


@given(st.floats(0.01, 1.0))
def test_trust_region_is_the_normalised_geometric_mixture(rate: float) -> None:
    """p proportional to p_initial^(1-a) * p_current^a, through `components` and the head."""
    torch.manual_seed(0)
    hidden = {name: torch.randn(5, 4, dtype=torch.float64) for name in ("initial", "current")}
    weight = {name: torch.randn(11, 4, dtype=torch.float64) for name in ("initial", "current")}
    mixed: list[torch.Tensor] = []

    def score(chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        mixed.append(chunk.scorer_logits["teacher"].softmax(-1))
        return {"zero": chunk.student_logits_CV[:, 0] * 0}

    parts = tuple(
        Component(hidden[name], weight[name], share)
        for name, share in components(Scorer("crop", "trust_region", rate))
    )
    head = ScoringHead(nn.Parameter(weight["current"]))
    context = ScoringContext(
        score, ("zero",), torch.zeros(5, dtype=torch.long), chunk=2, scorers={"teacher": parts}
    )
    with active(head, context):
        head(hidden["current"][None])
    p = {name: (hidden[name] @ weight[name].t()).softmax(-1) for name in hidden}
    wanted = p["initial"] ** (1 - rate) * p["current"] ** rate
    torch.testing.assert_close(torch.cat(mixed), wanted / wanted.sum(-1, keepdim=True))


# ---- student on a device, teachers on the host -----------------------------------------------------------------------


class Far(torch.Tensor):
    """A tensor with values on a device that is not the host: only copies may have operands on both."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Far":
        far = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="meta"
        )
        far.held = held
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        devices = {type(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 and name != "copy_":
            raise RuntimeError(f"{name} of tensors on two devices")
        given, named = tree_map_only(Far, lambda x: x.held, (args, kwargs))
        device = named.pop("device", None)
        found = func(*given, **named)
        if name.endswith("_"):
            return args[0]
        return found if str(device) == "cpu" else tree_map_only(torch.Tensor, Far, found)


class FarStudent(nn.Module):
    """Parameters on a device."""

    def __init__(self, near: nn.Module) -> None:
        super().__init__()
        for name, parameter in near.named_parameters():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(Far(parameter.detach().clone())))

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().held.clone() for name, p in self.named_parameters()}


@pytest.mark.parametrize("on_host", [False, True])
def test_values_travel_between_the_students_device_and_the_teachers(on_host: bool) -> None:
    module = FarStudent(student())
    start = module.values()
    teachers = TeacherWeights(module, ("ema:0.25", "initial"), on_host)
    shards = teachers.shards["ema:0.25"]
    assert {type(shard) for shard in shards.values()} == {torch.Tensor if on_host else Far}
    step(module, 1.0)
    moved = module.values()
    teachers.update(module)
    with teachers.in_place_of(module, "ema:0.25"):
        average = module.values()
        held = {k: shard if on_host else shard.held for k, shard in shards.items()}
        assert all(torch.equal(held[k], moved[k]) for k in moved)
    for key in start:
        wanted = 0.75 * start[key].double() + 0.25 * moved[key].double()
        torch.testing.assert_close(average[key].double(), wanted, rtol=1e-6, atol=1e-7)
    with teachers.in_place_of(module, "initial"):
        assert all(torch.equal(module.values()[k], start[k]) for k in start)
    assert all(torch.equal(module.values()[k], moved[k]) for k in moved)


def test_twin_an_average_across_devices_is_seen() -> None:
    module = FarStudent(student())
    shards = TeacherWeights(module, ("ema:0.25",), on_host=True).shards["ema:0.25"]
    key, parameter = next(module.named_parameters())
    with pytest.raises(RuntimeError, match="two devices"):
        shards[key].lerp_(parameter.detach(), 0.25)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teachers_of_a_student_on_a_gpu_are_pinned() -> None:
    shards = TeacherWeights(student().cuda(), ("initial",), on_host=True).shards["initial"]
    assert all(shard.is_pinned() for shard in shards.values())
