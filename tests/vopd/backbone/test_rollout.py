"""What one prompt becomes: rendered once, sampled n times with other seeds, stored with the ids that were sampled."""

from __future__ import annotations

import asyncio
import io
import os
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from vopd.backbone import pixels, stored_views
from vopd.backbone import rollout as module
from vopd.backbone.rollout import ViewRolloutWorker, decode
from vopd.errors import UserError

ROLLOUTS = 4
SETTINGS = {
    "vopd": {
        "seed": 0,
        "rollout": {
            "max_prompt_tokens": 4096,
            "max_response_tokens": 40,
            "train_share": 0.5,
            "chat_template": {},
        },
    },
    "actor_rollout_ref": {"rollout": {"n": ROLLOUTS, "val_kwargs": {"n": 1}}},
}


@pytest.fixture(scope="module")
def processor(engine_case: ModuleType) -> Any:
    from verl.utils.tokenizer import hf_processor

    return hf_processor(str(engine_case.BASE))


@pytest.fixture
def row(engine_case: ModuleType) -> dict[str, Any]:
    given = engine_case.make_rows()[1]
    for column in ("image", "crop"):
        buffer = io.BytesIO()
        given[column].save(buffer, "PNG")
        given[column] = {"bytes": buffer.getvalue(), "path": None}
    more = {
        "options": ["A. x", "B. y"],
        "answer": "A",
        "answer_type": "letter",
        "family": "f",
        "split": "train",
    }
    return given | more


class Played:
    """A worker whose server and queue are lists."""

    def __init__(self, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[dict[str, Any]] = []
        self.stored: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.statuses: list[str] = []
        self.rendered: list[str] = []
        render = module.render

        def counting(processor: Any, messages: Any, row_id: str, *rest: Any) -> Any:
            self.rendered.append(row_id)
            return render(processor, messages, row_id, *rest)

        async def put(key: str, partition_id: str, tag: dict[str, str]) -> None:
            self.statuses.append(tag["status"])

        async def batch_put(keys: Any, fields: Any, tags: Any, partition_id: str) -> None:
            rows = [{"key": k, "fields": fields[i], "tag": tags[i]} for i, k in enumerate(keys)]
            if partition_id == stored_views.PARTITION:
                self.views.extend(rows)
            else:
                self.stored.extend(row | {"partition": partition_id} for row in rows)

        async def generate(**request: Any) -> Any:
            self.requests.append(request)
            return SimpleNamespace(token_ids=[20, 21, 2], log_probs=[-1.0, -2.0, -3.0], extra_fields={})

        monkeypatch.setattr(module, "render", counting)
        monkeypatch.setattr(module.tq, "async_kv_put", put)
        monkeypatch.setattr(module.tq, "async_kv_batch_put", batch_put)
        self.worker = ViewRolloutWorker()
        self.worker.config = OmegaConf.create(SETTINGS)
        self.worker.processor = processor
        self.worker.tokenizer = processor.tokenizer
        self.worker.llm_client = SimpleNamespace(generate=generate)

    def run(self, row: dict[str, Any], validate: bool = False) -> None:
        prompt = {
            "row": row,
            "views": "full,crop",
            "uid": "7",
            "index": 0,
            "global_steps": 3,
            "agent_name": "x",
        }
        trajectory = {"step": 3, "validate": validate}
        asyncio.run(self.worker._run_prompt(prompt, {"temperature": 1.0}, trajectory))


@pytest.fixture
def played(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(processor, monkeypatch)


def check_each_view_rendered_once(played: Played, row: dict[str, Any]) -> None:
    played.run(row)
    assert len(played.requests) == ROLLOUTS
    assert played.rendered == [row["id"]] * 2  # full and crop


def test_each_view_is_rendered_once_for_all_rollouts(played: Played, row: dict[str, Any]) -> None:
    check_each_view_rendered_once(played, row)


def test_rendering_twin_rendering_per_rollout_is_seen(
    played: Played, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ViewRolloutWorker._respond

    async def wasteful(self: Any, sampling_params: Any, trajectory: Any, request: Any) -> Any:
        request["rendered"] = self._render(request["row"], request["views"])
        return await exact(self, sampling_params, trajectory, request)

    monkeypatch.setattr(ViewRolloutWorker, "_respond", wasteful)
    with pytest.raises(AssertionError):
        check_each_view_rendered_once(played, row)


def check_rollouts_have_seeds_of_their_own(played: Played, row: dict[str, Any]) -> None:
    played.run(row)
    assert len({request["sampling_params"]["seed"] for request in played.requests}) == ROLLOUTS


def test_every_rollout_of_a_prompt_has_a_seed_of_its_own(played: Played, row: dict[str, Any]) -> None:
    check_rollouts_have_seeds_of_their_own(played, row)


def test_one_seed_for_all_rollouts_is_seen(
    played: Played, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "request_seed", lambda run, step, row_id, rollout: run)
    with pytest.raises(AssertionError):
        check_rollouts_have_seeds_of_their_own(played, row)


def check_trainer_scores_what_was_sampled_from(played: Played, row: dict[str, Any]) -> None:
    played.run(row)
    (views,) = played.views
    assert (views["key"], len(played.stored)) == ("7", ROLLOUTS)
    for request, stored in zip(played.requests, played.stored, strict=True):
        fields = stored["fields"]
        prompt = request["prompt_ids"]
        assert (fields["uid"], views["fields"]["rendered"]["full"]["prompt_ids"].tolist()) == ("7", prompt)
        assert fields["input_ids"].tolist() == [*prompt, 20, 21, 2]
        assert fields["prompts"].tolist() == prompt
        assert request["image_data"][0].size == (96, 64)


def test_the_trainer_scores_the_ids_that_were_sampled_from(played: Played, row: dict[str, Any]) -> None:
    check_trainer_scores_what_was_sampled_from(played, row)


def test_pixels_twin_a_prompt_rendered_again_with_other_pixels_is_seen(
    played: Played, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = stored_views.put

    async def again(uid: str, views: Any) -> None:
        small = module.decode(row)["image"].resize((64, 64))
        other = module.render(
            played.worker.processor, module.VIEWS["full"](row | {"image": small}), "a", 4096, {}
        )
        await exact(uid, views | {"full": other.for_training()})

    monkeypatch.setattr(stored_views, "put", again)
    with pytest.raises(AssertionError):
        check_trainer_scores_what_was_sampled_from(played, row)


def test_what_is_stored_for_training(played: Played, row: dict[str, Any]) -> None:
    played.run(row)
    first = played.stored[0]
    fields = first["fields"]
    assert sorted(s["key"] for s in played.stored) == [f"7_{n}_0" for n in range(ROLLOUTS)]
    assert (first["partition"], first["tag"]["response_len"]) == ("train", 3)
    assert fields["rollout_log_probs"].tolist() == [-1.0, -2.0, -3.0]
    assert fields["response_mask"].tolist() == fields["loss_mask"].tolist() == [1, 1, 1]
    (views,) = played.views
    assert set(views["fields"]["rendered"]) == {"full", "crop"}
    assert played.statuses == ["finished"]


def test_evaluation_stores_the_record_alone(played: Played, row: dict[str, Any]) -> None:
    played.run(row, validate=True)
    (stored,) = played.stored
    assert stored["partition"] == "val"
    assert set(stored["fields"].keys()) == {"record"}
    assert played.views == []


def test_a_failing_prompt_is_reported_to_the_trainer_and_to_the_log(
    played: Played, row: dict[str, Any]
) -> None:
    row["image"] = {"bytes": b"not an image", "path": None}
    with pytest.raises(UserError, match=r"Row row1, column image: is not a readable image"):
        played.run(row)
    assert played.statuses[-1] == "failure"
    assert played.stored == []
    (failure,) = asyncio.run(played.worker.failures())
    assert failure.code == UserError.exit_code and failure.sentence.startswith(
        "Row row1, column image: is not a"
    )
    assert failure.process == f"rollout worker (pid {os.getpid()})"


def test_why_a_request_failed_is_kept_for_the_trainer(played: Played, row: dict[str, Any]) -> None:
    async def refuse(**_: Any) -> None:
        raise ValueError("too long for vLLM")

    played.worker.llm_client = SimpleNamespace(generate=refuse)
    with pytest.raises(ValueError, match="too long for vLLM"):
        played.run(row)
    assert (played.statuses, played.stored) == (["failure"], [])
    assert {f.sentence for f in asyncio.run(played.worker.failures())} == {"ValueError: too long for vLLM"}


def test_the_record_counts_a_missing_end_as_truncated(played: Played, row: dict[str, Any]) -> None:
    ends = [played.worker._record(ids, row, "full") for ids in ([20, 2], [20, 21], [])]
    assert [r["truncated"] for r in ends] == [False, True, True]
    assert ends[0] | {"response": "", "parsed": "", "correct": False} == {
        "id": "row1",
        "family": "f",
        "view": "full",
        "split": "train",
        "prompt": row["question"],
        "response": "",
        "response_tokens": 2,
        "truncated": False,
        "parsed": "",
        "gold": "A",
        "correct": False,
    }


def test_decode_gives_rgb_pictures_and_leaves_the_row(row: dict[str, Any]) -> None:
    decoded = decode(row)
    assert (decoded["image"].mode, decoded["image"].size) == ("RGB", (96, 64))
    assert isinstance(row["image"], dict)


def test_positions_and_pixels_of_both_views_travel(played: Played, row: dict[str, Any]) -> None:
    played.run(row)
    for values in played.views[0]["fields"]["rendered"].values():
        assert values["position_ids"].shape == (4, len(values["prompt_ids"]))
        inputs = pixels.unpacked(values["multi_modal_inputs"])
        assert len(inputs["pixel_values"]) == inputs["image_grid_thw"].prod()
        assert torch.isfinite(inputs["pixel_values"]).all()


def test_what_is_stored_is_counted_views_once(played: Played, row: dict[str, Any]) -> None:
    played.run(row)
    rendered = played.views[0]["fields"]["rendered"].values()
    views = sum(
        t.nbytes
        for v in rendered
        for t in [v["prompt_ids"], v["position_ids"], *v["multi_modal_inputs"].values()]
    )
    tensors = ("prompts", "responses", "input_ids", "response_mask", "loss_mask", "rollout_log_probs")
    rows = sum(stored["fields"][name].nbytes for stored in played.stored for name in tensors)
    assert sum(stored["tag"]["stored_bytes"] for stored in played.stored) == pytest.approx(views + rows)


def test_a_recorded_response_takes_the_place_of_the_request(played: Played, row: dict[str, Any]) -> None:
    recorded = {
        "tokens": [[30 + i, 2] for i in range(ROLLOUTS)],
        "log_probs": [[-0.5, -0.25 * i] for i in range(ROLLOUTS)],
    }
    prompt = {"row": row, "views": "full", "uid": "7", "index": 0, "global_steps": 3, "agent_name": "x"}
    prompt["recorded"] = recorded
    asyncio.run(played.worker._run_prompt(prompt, {}, {"step": 3, "validate": False}))
    assert played.requests == []
    for stored in played.stored:
        i, fields = int(stored["key"].split("_")[1]), stored["fields"]
        assert fields["responses"].tolist() == recorded["tokens"][i]
        assert fields["rollout_log_probs"].tolist() == recorded["log_probs"][i]
        verdict = fields["extra_fields"]["reward_extra_info"]["correct"]
        assert verdict == float(fields["record"]["correct"])


def test_vllm_is_asked_for_ids_alone_at_the_end(played: Played, row: dict[str, Any]) -> None:
    from vllm.sampling_params import RequestOutputKind

    played.run(row)
    for request in played.requests:
        given = request["sampling_params"]
        assert (given["detokenize"], given["output_kind"]) == (False, RequestOutputKind.FINAL_ONLY)


def test_a_group_is_told_of_when_all_its_rollouts_have_settled(played: Played, row: dict[str, Any]) -> None:
    settled = []

    async def slow_or_refused(**request: Any) -> Any:
        first = not settled
        settled.append(request)
        if first:
            raise ValueError("refused")
        await asyncio.sleep(0.01)
        assert played.statuses == []
        return SimpleNamespace(token_ids=[2], log_probs=[-1.0], extra_fields={})

    played.worker.llm_client = SimpleNamespace(generate=slow_or_refused)
    with pytest.raises(ValueError, match="refused"):
        played.run(row)
    assert (len(settled), played.statuses) == (ROLLOUTS, ["failure"])


def test_training_may_have_a_shorter_limit_than_evaluation(played: Played, row: dict[str, Any]) -> None:
    played.run(row)
    played.run(row, validate=True)
    limits = [request["sampling_params"].get("max_tokens") for request in played.requests]
    assert limits == [20] * ROLLOUTS + [None]
