"""The stages, in order, from a folder of images to a file of triplets.

scan -> (objects) -> propose -> filter -> crop -> ask -> validate -> answer -> consensus -> options -> box
-> (difficulty) -> row -> train.parquet, datasheet.md

Each stage keeps `stages/<name>.jsonl` in the output folder, one line an item, rejected ones with their reason; images
are files beside. What a file already holds is not done again, so the same command resumes.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import schema, transforms, validation_stamp
from data.synthesis import config as settings
from data.synthesis import datasheet, prompts, proposers
from data.synthesis.client import Client, RejectedError, Request, ask_all, read_json
from data.synthesis.datasheet import Stage
from data.synthesis.journal import Journal, Record
from vopd.common import fingerprint, ownership
from vopd.common import images as pictures
from vopd.common.provenance import hash_contents
from vopd.common.seeding import request_seed
from vopd.errors import UserError
from vopd.evaluation.scoring import Parsed, is_correct, parse_answer
from vopd.evaluation.scoring.clean import comparable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OBJECTS_SIDE = 1024  # pixels: names of things need no more
FAMILY = "synthesised"
MAKER = "data.synthesize"
IMAGE_FOLDERS = ("originals", "thumbnails", "crops", "images", "transformed")
WORKING = (
    "stages/*",
    *(f"{name}/*" for name in IMAGE_FOLDERS),
    "config.yaml",
    "lock",
    validation_stamp.NAME,
    fingerprint.FILE,
)
RED = (255, 0, 0)
# What later stages take from the accepted records of a stage.
FIELDS: dict[str, dict[str, type]] = {
    "scan": {"image": str, "original": str, "size": list},
    "objects": {"labels": list},
    "propose": {"regions": list},
    "filter": {"regions": list, "against": dict},
    "crop": {"crop": str},
    "ask": {"questions": list},
    "answer": {"answer": str},
    "consensus": {"right": str, "votes": int},
    "options": {"options": list, "answer": str},
    "box": {"boxed": str, "text": str},
    "difficulty": {"right": bool},
    "row": {"row": dict},
}
UNMOVING = (
    "vopd/common/caches.py",
    "vopd/errors.py",
    "vopd/common/provenance.py",
    "vopd/common/fingerprint.py",
    "vopd/views.py",
)
"""Code that the pipeline imports and that no row depends on."""


class Pipeline:
    """One output folder, held for the length of a `with`."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.stages: list[Stage] = []
        self._open = ExitStack()

    def __enter__(self) -> Pipeline:
        with ExitStack() as opened:
            self.owned = opened.enter_context(ownership.held(self.out, MAKER, WORKING, _made_before))
            _bind(self.out / "config.yaml", self.config)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # ---- running a stage --------------------------------------------------------------------------------------------

    def _journal(self, name: str) -> Journal:
        return self._open.enter_context(Journal(self.out / "stages" / f"{name}.jsonl", FIELDS.get(name, {})))

    def local(self, name: str, items: list[Record], work: Callable[[Record], Record]) -> list[Record]:
        """Do `work` for every item that the stage's journal lacks; the accepted items with their new fields."""
        journal = self._journal(name)
        waiting = [item for item in items if item["id"] not in journal.records]
        for item in tqdm(waiting, desc=f"synthesis: {name}", disable=not waiting):
            record: Record = {"id": item["id"], "reason": None}
            try:
                record |= work(item)
            except RejectedError as rejection:
                record |= {"reason": str(rejection), "detail": rejection.detail}
            journal.append(record)
        self.stages.append(Stage(name, len(items), journal))
        return _carried(items, journal)

    def remote(
        self,
        name: str,
        requests: Iterable[Request],
        read: Callable[[Request, str], Record],
        base_url: str = "",
        model: str = "",
    ) -> Journal:
        """Send every request that the stage's journal lacks."""
        journal, requests = self._journal(name), list(requests)
        if not requests:
            self.stages.append(Stage(name, 0, journal))
            return journal

        async def ask() -> list[str]:
            async with Client(self.config.server, self.config.seed, base_url, model) as client:
                return await ask_all(client, requests, read, journal, name)

        self.stages.append(Stage(name, len(requests), journal, asyncio.run(ask())))
        return journal

    def rng(self, stage: str, item: str) -> np.random.Generator:
        """Random numbers of one item at one stage."""
        return np.random.default_rng(request_seed(self.config.seed, 0, f"{stage}/{item}", 0))

    # ---- the stages -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """All stages; the number of rows written."""
        questions = self._validate(self._ask(self.crops()))
        agreed = self.local("consensus", self._answer(questions), self._consensus)
        boxed = self.local("box", self._options(agreed), self._box)
        rows = self.local("row", self._difficulty(boxed), self._row)
        return self._write(rows)

    def crops(self) -> list[Record]:
        """The stages before the first question: one item an enlarged region."""
        folder = Path(self.config.images)
        images = self.local("scan", _image_files(folder, self.out), self._scan)
        for item in images:  # found under its name by an earlier start: is it still the same?
            if hash_contents([folder / item["id"]])[:16] != item["image"]:
                raise UserError(
                    f"{folder / item['id']}: was changed since it was scanned; give the new image another name, or "
                    "another out=."
                )
        regions = self.local("filter", self._propose(images), self._filter)
        return self.local("crop", _each(regions, "regions"), self._crop)

    def _scan(self, item: Record) -> Record:
        """Copy an image that can be used; recode it only where a model's server may decode it otherwise than we do."""
        folder, limits = Path(self.config.images), self.config.filter
        try:
            content = schema.image_bytes({"path": item["id"]}, folder)
            with pictures.open_picture(content) as picture:
                if picture.size[0] < limits.min_width or picture.size[1] < limits.min_height:
                    raise RejectedError("image too small")
            file = pictures.portable(content)
        except UserError as error:
            raise RejectedError("not a usable image", str(error)) from error
        name = hashlib.sha256(content).hexdigest()[:16]
        target = self.out / "originals" / f"{name}.{file.media.removeprefix('image/')}"
        _save(target, file.content)
        return {"image": name, "original": self._relative(target), "size": list(file.shown.size)}

    def _propose(self, images: list[Record]) -> list[Record]:
        """One item an image, whatever the number of files that hold it; asks for object names where needed."""
        unique = {
            item["image"]: {**item, "file": item["id"], "id": item["image"]} for item in reversed(images)
        }
        items = [unique[key] for key in sorted(unique)]
        proposer = proposers.build(self.config.propose.proposer, self.config.propose.detector)
        if proposer.needs_labels:
            items = self._objects(items)

        def propose(item: Record) -> Record:
            picture = pictures.decode(self.out / item["original"])
            found = proposer.propose(picture, item.get("labels", []))
            if not found:
                raise RejectedError("no region found")
            return {"regions": [{"box": list(r.box), "score": r.score, "label": r.label} for r in found]}

        return self.local("propose", items, propose)

    def _objects(self, items: list[Record]) -> list[Record]:
        def small(item: Record) -> Path:
            target = self.out / "thumbnails" / f"{item['id']}.jpg"
            if not target.exists():
                picture = pictures.decode(self.out / item["original"])
                picture.thumbnail((OBJECTS_SIDE, OBJECTS_SIDE))
                _save(target, _jpeg(picture, self.config.crop.jpeg_quality))
            return target

        journal = self.remote(
            "objects",
            [Request(item["id"], small(item), prompts.objects(), temperature=0.0) for item in items],
            lambda _, text: {"labels": list(dict.fromkeys(read_json(text, prompts.Objects).objects))},
        )
        return _carried(items, journal)

    def _filter(self, item: Record) -> Record:
        """The best `per_image` regions that nothing speaks against, and counts of what spoke against the others."""
        labels = [r["label"] for r in item["regions"] if r["score"] >= self.config.filter.min_score]
        kept: list[Record] = []
        against: Counter[str] = Counter()
        for region in item["regions"]:
            reason = self._against(region, item["size"], labels)
            if reason is None and len(kept) == self.config.propose.per_image:
                reason = "more regions than per_image"
            if reason is None:
                kept.append(region)
            else:
                against[reason] += 1
        return {"regions": kept, "against": dict(against)}

    def _against(self, region: Record, size: list[int], labels: list[str]) -> str | None:
        x0, y0, x1, y1 = region["box"]
        limits = self.config.filter
        if region["score"] < limits.min_score:
            return "score too low"
        if (x1 - x0) * (y1 - y0) >= limits.max_area * size[0] * size[1]:
            return "region too large"
        if min(x1 - x0, y1 - y0) < limits.min_side:
            return "region too small"
        if region["label"] and labels.count(region["label"]) > 1:
            return "not the only one of its kind"
        return None

    def _crop(self, item: Record) -> Record:
        box = item["box"]
        factor = self.config.crop.enlarge
        part = pictures.decode(self.out / item["original"]).crop(box)
        part = part.resize((part.width * factor, part.height * factor), Image.Resampling.LANCZOS)
        target = self.out / "crops" / f"{item['id']}.jpg"
        _save(target, _jpeg(part, self.config.crop.jpeg_quality))
        return {"crop": self._relative(target)}

    def _ask(self, crops: list[Record]) -> list[Record]:
        """One item a question."""
        ask = self.config.ask

        def read(_: Request, text: str) -> Record:
            questions = {comparable(q): {"question": q} for q in read_json(text, prompts.Questions).questions}
            return {"questions": list(questions.values())[: ask.questions]}

        journal = self.remote(
            "ask",
            [
                Request(c["id"], self.out / c["crop"], prompts.ask(ask.questions), ask.temperature, ask.top_p)
                for c in crops
            ],
            read,
        )
        return _each(_carried(crops, journal), "questions")

    def _validate(self, questions: list[Record]) -> list[Record]:
        def read(_: Request, text: str) -> Record:
            verdict = read_json(text, prompts.Verdict)
            if not verdict.valid:
                raise RejectedError("question found wanting", verdict.why)
            return {}

        journal = self.remote(
            "validate",
            [
                Request(q["id"], self.out / q["crop"], prompts.validate(q["question"]), temperature=0.0)
                for q in questions
            ],
            read,
        )
        return _carried(questions, journal)

    def _answer(self, questions: list[Record]) -> list[Record]:
        """Questions of which every sample came back, with the parsed answers; None where one was unusable."""

        def read(_: Request, text: str) -> Record:
            parsed = parse_answer(text, "short")
            if parsed.value is None:
                raise RejectedError(f"answer not usable: {parsed.reason}", text)
            return {"answer": parsed.value}

        samples, temperature = self.config.answer.samples, self.config.answer.temperature
        journal = self.remote(
            "answer",
            [
                Request(f"{q['id']}-{n}", self.out / q["crop"], prompts.answer(q["question"]), temperature)
                for q in questions
                for n in range(samples)
            ],
            read,
        )
        return _sampled(questions, journal, samples, "answer", "answers")

    def _consensus(self, item: Record) -> Record:
        answer, votes = most_common(item["answers"])
        if answer is None or votes < self.config.answer.consensus * len(item["answers"]):
            raise RejectedError("no consensus")
        if len(answer) > prompts.LONGEST_ANSWER:
            raise RejectedError("answer too long")
        return {"right": answer, "votes": votes}

    def _options(self, items: list[Record]) -> list[Record]:
        by_id = {item["id"]: item for item in items}

        def read(request: Request, text: str) -> Record:
            item = by_id[request.id]
            wrong = read_json(text, prompts.Distractors).distractors
            if len(wrong) != 3 or len({comparable(o) for o in [*wrong, item["right"]]}) != 4:
                raise RejectedError("options not three or not distinct", text)
            if any(_same(o, item["right"]) for o in wrong):
                raise RejectedError("options not three or not distinct", text)
            slot = int(self.rng("options", item["id"]).integers(4))
            return {
                "options": [*wrong[:slot], item["right"], *wrong[slot:]],
                "answer": transforms.LETTERS[slot],
            }

        journal = self.remote(
            "options",
            [
                Request(i["id"], self.out / i["crop"], prompts.options(i["question"], i["right"]), 0.0)
                for i in items
            ],
            read,
        )
        return _carried(items, journal)

    def _box(self, item: Record) -> Record:
        """Draw the frame; questions of one region share the file. The text becomes the whole text shown."""
        target = self.out / "images" / f"{Path(item['crop']).stem}.jpg"
        if not target.exists():
            picture = pictures.decode(self.out / item["original"])
            boxed = draw_box(picture, item["box"], self.config.box.expand, self.config.box.width)
            # Chroma is not subsampled: the thin red frame would bleed.
            _save(target, _jpeg(boxed, self.config.crop.jpeg_quality))
        text = transforms.multiple_choice(item["question"], item["options"], self.config.box.hint)
        return {"boxed": self._relative(target), "text": text}

    def _difficulty(self, items: list[Record]) -> list[Record]:
        """Items that the small model does not answer correctly too often; all of them when there is no small model."""
        filter_ = self.config.difficulty
        if not filter_.model:
            return items
        by_request = {f"{item['id']}-{n}": item for item in items for n in range(filter_.samples)}

        def read(request: Request, text: str) -> Record:
            item = by_request[request.id]
            parsed = parse_answer(text, "letter", item["options"])
            return {"right": is_correct(parsed, item["answer"], "letter")}

        journal = self.remote(
            "difficulty",
            [
                Request(key, self.out / item["boxed"], item["text"], filter_.temperature)
                for key, item in by_request.items()
            ],
            read,
            filter_.base_url,
            filter_.model,
        )

        def judge(item: Record) -> Record:
            if sum(bool(right) for right in item["tries"]) >= filter_.drop_at:
                raise RejectedError("too easy")
            return {}

        return self.local("hard", _sampled(items, journal, filter_.samples, "right", "tries"), judge)

    def _row(self, item: Record) -> Record:
        """The finished row: image cells as relative paths, a transform applied where its share falls on it."""
        row = {
            "image": item["boxed"],
            "original": item["original"],
            "crop": item["crop"],
            "box": item["box"],
            "question": item["text"],
            "hint": self.config.box.hint,
            "options": item["options"],
            "answer": item["answer"],
            "family": FAMILY,
        }
        draw = float(self.rng("transform", item["id"]).random())
        shares = self.config.transforms
        if draw < shares.overlay and min(_sides(item["box"])) >= transforms.SMALLEST_WINDOW:
            row = self._transformed(row, item["id"], transforms.overlay_row)
        elif shares.overlay <= draw < shares.overlay + shares.rendered_text:
            row = self._transformed(row, item["id"], transforms.render_row)
        source = f"{item['file']}, region {Path(item['crop']).stem} ({item['score']:g}), {self.config.server.model}"
        return {"row": row | {"provenance": f"{source}, {item['votes']} of {len(item['answers'])} answers"}}

    def _transformed(self, row: Record, name: str, transform: Callable[..., Record]) -> Record:
        cells = {c: {"bytes": None, "path": row[c]} for c in schema.ALL_IMAGES}
        changed = transform({**row, **cells}, self.rng(transform.__name__, name), self.out)
        for column in schema.ALL_IMAGES:
            if changed[column] is cells[column]:
                changed[column] = row[column]
            else:
                target = self.out / "transformed" / f"{name}-{column}.png"
                _save(target, changed[column]["bytes"])
                changed[column] = self._relative(target)
        return changed

    def _write(self, items: list[Record]) -> int:
        common = {
            "answer_type": "letter",
            "source": self.config.source,
            "licence": self.config.licence,
            "split": "train",
        }
        rows = []
        for item in items:
            cells = {c: {"bytes": None, "path": item["row"][c]} for c in schema.ALL_IMAGES}
            rows.append({**item["row"], **cells, **common, "id": item["id"]})
        if rows:
            schema.write(rows, self.out / "train.parquet", owned=self.owned)
        datasheet.write(self.owned, self.config, self.stages, rows)
        return len(rows)

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.out).as_posix()


def _made_before(file: Path) -> bool:
    """Whether an earlier version wrote this file: it is in a synthesis folder, under one of its names."""
    if not ((file.parent / "config.yaml").is_file() and (file.parent / "stages").is_dir()):
        return False
    return file.name in ("config.yaml", "lock", "train.parquet", "datasheet.md", validation_stamp.NAME)


def _bind(file: Path, config: DictConfig) -> None:
    """Bind the folder to these settings; `UserError` when it holds results of others."""
    if file.exists():
        differing = settings.differences(OmegaConf.create(settings.read(file)), config)
        if differing:
            raise UserError(
                f"{file.parent}: holds a synthesis with another {differing[0]}; give the same one, or another out=."
            )
    code = fingerprint.files([Path(__file__)], but=UNMOVING)
    recorded = fingerprint.read(file.parent)
    if recorded and (why := fingerprint.why(recorded, code)):
        raise UserError(
            f"{file.parent}: holds a synthesis with {why}; give another out=, or remove {fingerprint.FILE} there to go "
            "on with the results of both."
        )
    fingerprint.write(file.parent, code)
    _save(file, OmegaConf.to_yaml(config).encode())


def _image_files(folder: Path, out: Path) -> list[Record]:
    """One item an image file; `out` may be inside the folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give images=FOLDER.")
    files = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    files = [p for p in files if not p.resolve().is_relative_to(out.resolve())]
    if not files:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} files.")
    return [{"id": p.relative_to(folder).as_posix()} for p in sorted(files)]


def _each(items: list[Record], field: str) -> list[Record]:
    """One item for every entry of a list field: the item's fields, the entry's, and a numbered id."""
    return [
        {**{k: v for k, v in item.items() if k != field}, **entry, "id": f"{item['id']}-{n}"}
        for item in items
        for n, entry in enumerate(item[field])
    ]


def _carried(items: list[Record], journal: Journal) -> list[Record]:
    """Items that the journal accepted, with its fields."""
    found = [(item, journal.records.get(item["id"])) for item in items]
    return [{**item, **record} for item, record in found if record and record["reason"] is None]


def _sampled(items: list[Record], journal: Journal, samples: int, field: str, into: str) -> list[Record]:
    """Items all of whose samples are there, with the list of `field`, None where a sample was rejected."""
    whole = []
    for item in items:
        records = [journal.records.get(f"{item['id']}-{n}") for n in range(samples)]
        if all(record is not None for record in records):
            whole.append({**item, into: [record.get(field) for record in records if record is not None]})
    return whole


def _same(first: str, second: str) -> bool:
    return is_correct(Parsed(first, "parsed", "an answer"), second, "short")


def most_common(answers: list[str | None]) -> tuple[str | None, int]:
    """The answer that most others equal, in its first wording, and how many do; unusable ones (None) equal none."""
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        group = next((g for g in groups if _same(answer, g[0])), None)
        if group is None:
            groups.append([answer])
        else:
            group.append(answer)
    best = max(groups, key=len, default=None)
    return (best[0], len(best)) if best else (None, 0)


def draw_box(picture: Image.Image, box: list[int], expand: float, width: int) -> Image.Image:
    """A copy with a red frame whose inner edge is the box grown by `expand`; cut off at the picture's border."""
    x0, y0, x1, y1 = box
    dx, dy = round((x1 - x0) * expand / 2) + width, round((y1 - y0) * expand / 2) + width
    corners = (
        max(0, x0 - dx),
        max(0, y0 - dy),
        min(picture.width, x1 + dx) - 1,
        min(picture.height, y1 + dy) - 1,
    )
    framed = picture.copy()
    ImageDraw.Draw(framed).rectangle(corners, outline=RED, width=width)
    return framed


def _sides(box: list[int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _save(file: Path, content: bytes) -> None:
    """A file that is whole or not there."""
    with ownership.atomic(file) as partial:
        partial.write_bytes(content)


def synthesize(config: DictConfig) -> dict[str, Any]:
    """Run or resume; returns rows written and requests left unanswered."""
    with Pipeline(config) as pipeline:
        rows = pipeline.run()
        unanswered = [sentence for stage in pipeline.stages for sentence in stage.unanswered]
    for sentence in unanswered[:3]:
        print(f"no answer: {sentence}", file=sys.stderr)
    return {"rows": rows, "unanswered": len(unanswered), "out": config.out}
