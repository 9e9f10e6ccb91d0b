"""What an evaluation, a comparison, and a synthesis can be given that cannot be: settings, benchmarks, records."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bad_inputs import Case

EVALUATE, COMPARE, SYNTHESIZE = (
    "vopd.evaluation.evaluate",
    "vopd.evaluation.model_comparison",
    "data.synthesize",
)
NOWHERE = "http://127.0.0.1:9/v1"
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
ROW = {"id": "1", "question": "Is it red?", "answer": "yes", "image": PICTURE, "kind": "a"}
DESCRIPTION = {
    "title": "Mine",
    "files": "rows.jsonl",
    "rows": 1,
    "licence": "none",
    "columns": {"id": ["id"], "question": "question", "answer": "answer", "image": "image"},
    "prompt": "{question}",
    "answer_type": "yes/no",
    "official_rule": "none",
}
Made = bytes | list[dict[str, Any]]


def arguments(folder: Path, *more: str, **changes: str) -> list[str]:
    """Overrides for an evaluation of `mine.yaml` in the folder, by a server that is never asked."""
    given = {
        "model": "m", "benchmarks": f"[{folder / 'mine.yaml'}]", "endpoint": NOWHERE, "out": str(folder / "out"),
    } | changes  # fmt: skip
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def write(folder: Path, rows: Made, changes: Mapping[str, Any]) -> None:
    """`mine.yaml`, changed, and its file of rows: JSON lines or parquet, or the bytes as they are."""
    spec = DESCRIPTION | {"folder": str(folder)} | changes
    (folder / "mine.yaml").write_text(json.dumps(spec))
    file = folder / str(spec["files"])
    if isinstance(rows, bytes):
        content = rows
    elif file.suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        content = buffer.getvalue()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if file.resolve().is_relative_to(folder.resolve()):
        file.write_bytes(content)


def evaluated(folder: Path, *more: str, **changes: str) -> list[str]:
    """Overrides for an evaluation that is valid apart from `more` and `changes`."""
    write(folder, [ROW], {})
    return arguments(folder, *more, **changes)


def setting(kind: str, says: str, *more: str, **changes: str) -> Case:
    return Case(kind, EVALUATE, lambda folder: evaluated(folder, *more, **changes), says)


def benchmark(kind: str, says: str, rows: Made | None = None, **changes: Any) -> Case:
    """A description or its files."""

    def given(folder: Path) -> list[str]:
        write(folder, [ROW] if rows is None else rows, changes)
        return arguments(folder)

    return Case(kind, EVALUATE, given, says)


def described(kind: str, says: str, content: bytes) -> Case:
    """The whole YAML file."""

    def given(folder: Path) -> list[str]:
        (folder / "mine.yaml").write_bytes(content)
        return arguments(folder)

    return Case(kind, EVALUATE, given, says)


def found(kind: str, says: str, prepare: Callable[[Path], None], module: str = EVALUATE) -> Case:
    """What lies in the folder of records, <folder>/out/m/<benchmark>."""

    def given(folder: Path) -> list[str]:
        write(folder, [ROW], {})
        place = folder / "out" / "m" / ("mine" if module == EVALUATE else "pope")
        place.mkdir(parents=True)
        prepare(place)
        side = str(folder / "out" / "m")
        return arguments(folder) if module == EVALUATE else [side, side]

    return Case(kind, module, given, says)


def link_out(folder: Path) -> list[str]:
    inside = folder / "inside"
    inside.mkdir()
    write(folder, [ROW], {})
    write(inside, [ROW], {})
    (inside / "rows.jsonl").unlink()
    (inside / "rows.jsonl").symlink_to(folder / "rows.jsonl")
    return arguments(folder, benchmarks=f"[{inside / 'mine.yaml'}]")


def locked(folder: Path) -> list[str]:
    file_in("data/vstar/lock.json", b'{"revision": 3}')(folder)
    return arguments(folder, f"data={folder / 'data'}", benchmarks="[vstar]")


def out_in_a_file(folder: Path) -> list[str]:
    write(folder, [ROW], {})
    (folder / "out").write_text("mine")
    return arguments(folder)


def synthesis(
    kind: str, says: str, *more: str, prepare: Callable[[Path], object] = lambda folder: None
) -> Case:
    def given(folder: Path) -> list[str]:
        prepare(folder)
        usual = [f"images={folder}", f"out={folder / 'out'}", "source=s", "licence=l", "server.model=m"]
        keys = {argument.split("=")[0] for argument in more}
        return [*(argument for argument in usual if argument.split("=")[0] not in keys), *more]

    return Case(kind, SYNTHESIZE, given, says)


def file_in(place: str, content: bytes = b"mine") -> Callable[[Path], object]:
    def write_it(folder: Path) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)

    return write_it


def parquet(kind: str, says: str, **cells: Any) -> Case:
    """A parquet file with other cells than it should have."""
    return benchmark(kind, says, [ROW | cells], files="rows.parquet")


CSV_COLUMNS = {"id": ["id"], "question": "question", "answer": "answer", "image": "image"}
HEADER = b"id,question,answer,image\n"
BY_NAME = {"pictures": "{name}.png", "columns": {**DESCRIPTION["columns"], "image": None}}  # type: ignore[dict-item]

SETTINGS = (
    setting("evaluation: temperature is NaN", "temperature=nan is not allowed", temperature="nan"),
    setting("evaluation: temperature without end", "temperature=inf is not allowed", temperature="inf"),
    setting("evaluation: top_p=0", "top_p=0.0 is not allowed; give above 0", top_p="0"),
    setting("evaluation: no tokens", "max_tokens=0 is not allowed", max_tokens="0"),
    setting("evaluation: negative rows", "rows=-1 is not allowed", rows="-1"),
    setting("evaluation: negative seed", "seed=-1 is not allowed", seed="-1"),
    setting("evaluation: nobody asks", "concurrency=0 is not allowed", concurrency="0"),
    setting("evaluation: no time", "timeout=0.0 is not allowed", timeout="0"),
    setting("evaluation: a seed that is true", "seed", seed="true"),
    setting("evaluation: the same key twice", "rows is given twice", "rows=1", "rows=2"),
    setting("evaluation: a list without brackets", "commas need brackets or quotes", benchmarks="vstar,pope"),
    setting("evaluation: a list without quotes", "put such a value in quotes", "pope]", benchmarks="[vstar,"),
    setting("evaluation: no benchmark in the list", "benchmarks is empty", benchmarks="[]"),
    setting(
        "evaluation: a list in the list", "benchmarks holds something other than names", benchmarks="[[a]]"
    ),
    setting("evaluation: a model named ..", "model='..' names no model", model=".."),
    setting("evaluation: a model without a name", "model='/' names no model", model="/"),
    setting("evaluation: an empty model", "names no model", model="''"),
    setting(
        "evaluation: an endpoint without http", "is not the address of a server", endpoint="localhost:8000"
    ),
    setting(
        "evaluation: an endpoint by ftp", "is not the address of a server", endpoint="ftp://localhost/v1"
    ),
    setting("evaluation: an empty endpoint", "endpoint is empty", endpoint="''"),
    Case(
        "evaluation: a model that is not there",
        EVALUATE,
        lambda folder: evaluated(folder, endpoint="null", model="no/such"),
        "model=no/such: neither a folder here nor a model that could be fetched",
        environment={"HF_HUB_OFFLINE": "1"},
    ),
    Case(
        "evaluation: a folder that is not a model",
        EVALUATE,
        lambda folder: evaluated(folder, endpoint="null", model=str(folder)),
        "config.json: missing",
    ),
    Case(
        "evaluation: a SOCKS proxy without its package",
        EVALUATE,
        lambda folder: evaluated(folder, endpoint="http://far.invalid/v1"),
        "install socksio",
        environment={"ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""},
    ),
)

DESCRIPTIONS = (
    Case(
        "benchmark: a name that climbs",
        EVALUATE,
        lambda folder: arguments(folder, benchmarks="[../benchmarks/vstar]"),
        "There is no benchmark '../benchmarks/vstar'",
    ),
    described("benchmark: an empty description", "the key 'answer_type' is missing", b""),
    described("benchmark: a description that is a list", "mine.yaml: ", b"[1, 2]"),
    described("benchmark: a description that is a text", "mine.yaml: ", b"hello"),
    described("benchmark: a description in UTF-16", "mine.yaml: ", "title: x".encode("utf-16")),
    described("benchmark: a description that is cut off", "mine.yaml: ", b"columns: {id: ["),
    described("benchmark: aliases that unfold", "aliases (*name) are not allowed", b"a: &a [x]\nb: [*a, *a]\n"),
    described("benchmark: a thousand brackets", "mine.yaml: ", b"[" * 5000),
    described("benchmark: a huge description", "larger than", b"#" * (2**16 + 1)),
    benchmark("benchmark: a prompt that reads the environment", "interpolations", prompt="${oc.env:HOME} {question}"),
    benchmark("benchmark: an unknown key", "Key 'pictures_of'", pictures_of="x"),
    benchmark("benchmark: an unknown answer type", "answer_type 'essay' is unknown", answer_type="essay"),
    benchmark("benchmark: groups that are a list", "mine.yaml: ", groups=["kind"]),
    benchmark("benchmark: options that are a number", "options is neither a column nor", options=5),
    benchmark("benchmark: a cluster that is a name", "cluster is neither 'pair' nor", cluster="image"),
    benchmark("benchmark: metrics of no group", "metrics name the group 'colour'", metrics={"per": ["colour"]}),
    benchmark("benchmark: no pictures", "it names no pictures", columns=CSV_COLUMNS | {"image": None}),
    benchmark("benchmark: files that climb", "leads out of the benchmark's folder", files="../rows.jsonl"),
    benchmark("benchmark: files by an absolute path", "leads out of the benchmark's folder", files="/etc/*.csv"),
    benchmark("benchmark: files that are not a pattern", "is not a file pattern", b"", files="**.jsonl"),
    Case("benchmark: a file that is a link out of its folder", EVALUATE, link_out, "no file inside"),
    benchmark("benchmark: a file of another kind", "file is expected", b"x", files="rows.txt"),
    benchmark("benchmark: pictures that climb", "leads out of the benchmark's folder", pictures="../{id}.png"),
    benchmark("benchmark: pictures of an attribute", "no column 'id.__class__'", pictures="{id.__class__}"),
    benchmark("benchmark: pictures of a number", "no column '0'", pictures="{0}"),
    benchmark("benchmark: pictures with a lone brace", "braces that hold no column", pictures="{id"),
    benchmark("benchmark: a row whose picture climbs", "its picture '../../x.png' leads out",
              [ROW | {"name": "../../x"}], **BY_NAME),
    benchmark("benchmark: a row with an absolute picture", "its picture '/etc/x.png' leads out",
              [ROW | {"name": "/etc/x"}], **BY_NAME),
)  # fmt: skip

FILES = (
    benchmark("benchmark: no row", "not readable as json", b""),
    benchmark(
        "benchmark: a broken line",
        "rows.jsonl: not readable as json",
        json.dumps(ROW).encode() + b'\n{"id":\n',
    ),
    benchmark("benchmark: lines that are not objects", "rows.jsonl: not readable as json", b'"x"\n3\n'),
    benchmark(
        "benchmark: JSON with bad UTF-8",
        "row 0: holds text that is not UTF-8",
        json.dumps(ROW).encode().replace(b"red", b"\xff"),
    ),
    benchmark(
        "benchmark: a text called parquet",
        "rows.parquet: not readable as parquet",
        b"hello",
        files="rows.parquet",
    ),
    benchmark(
        "benchmark: an empty parquet", "rows.parquet: not readable as parquet", b"", files="rows.parquet"
    ),
    benchmark(
        "benchmark: a cut parquet",
        "rows.parquet: not readable as parquet",
        b"PAR1" + bytes(99),
        files="rows.parquet",
    ),
    parquet(
        "benchmark: a question of numbers",
        "column 'question' should hold text and holds Value('int64')",
        question=7,
    ),
    parquet(
        "benchmark: a question of lists", "column 'question' should hold text and holds List", question=["a"]
    ),
    parquet("benchmark: a question of nulls", "column 'question' should hold text", question=None),
    parquet("benchmark: an answer of lists", "column 'answer' should hold text or numbers", answer=["yes"]),
    parquet("benchmark: a picture of numbers", "column 'image' should hold pictures", image=3),
    parquet("benchmark: an id of bytes", "column 'id' should hold text or numbers", id=b"\xff"),
    benchmark(
        "benchmark: a row without a question",
        "row 1: question holds None",
        [ROW, ROW | {"id": "2", "question": None}],
    ),
    benchmark("benchmark: an empty id", "row 0: id holds ''", [ROW | {"id": ""}]),
    benchmark(
        "benchmark: an answer of another type", "question 1: Gold answer 'red'", [ROW | {"answer": "red"}]
    ),
    benchmark(
        "benchmark: more options than letters",
        "has 30 options",
        [ROW | {"options": ["x"] * 30}],
        options="options",
    ),
    benchmark(
        "benchmark: CSV with bad UTF-8",
        "rows.csv: not readable as csv",
        HEADER + b"1,\xff,yes,x\n",
        files="rows.csv",
    ),
    benchmark(
        "benchmark: CSV with an open quote",
        "rows.csv: not readable as csv",
        HEADER + b'1,"a,yes,x\n',
        files="rows.csv",
    ),
    benchmark(
        "benchmark: CSV with NULs", "question holds 'a\\x00b'", HEADER + b"1,a\0b,yes,x\n", files="rows.csv"
    ),
    benchmark("benchmark: CSV without rows", "rows.csv: not readable as csv", HEADER, files="rows.csv"),
    benchmark("benchmark: TSV without its columns", "found a, b", b"a\tb\n1\t2\n", files="rows.tsv"),
)

LOCK = Case("benchmark: an invalid lock", EVALUATE, locked, "lock.json: holds no revision")

RECORDS = (
    found("records: of nobody", "holds a records.jsonl that no evaluation wrote", file_in("records.jsonl")),
    found("records: a summary of nobody", "holds a summary.json that no evaluation wrote", file_in("summary.json")),
    found("records: invalid settings", "not the settings of an evaluation", file_in("settings.json")),
    found("records: settings of another thing", "not the settings of an", file_in("settings.json", b'{"a": 1}')),
    Case("records: a file where the folder should be", EVALUATE, out_in_a_file, "out"),
    Case("records: a place that cannot be written", EVALUATE,
         lambda folder: evaluated(folder, out="/proc/vopd"), "/proc/vopd"),
    found("comparison: a line that is not JSON", "Line 1 of", file_in("records.jsonl", b"{\n"), COMPARE),
    found("comparison: a line that is not a record", "has no key 'id'", file_in("records.jsonl", b"{}\n"), COMPARE),
    Case("scoring table: lines that are not objects", "vopd.evaluation.scoring.table",
         lambda folder: [str(file_in("rows.jsonl", b"3\n")(folder) or folder / "rows.jsonl")],
         "not a file of crafted responses"),
    Case("comparison: no folder", COMPARE, lambda folder: [str(folder / "a"), str(folder / "b")], "holds no records"),
)  # fmt: skip

SYNTHESES = (
    synthesis("synthesis: no time", "server.timeout_s=0.0 is not allowed", "server.timeout_s=0"),
    synthesis("synthesis: temperature is NaN", "ask.temperature=nan is not allowed", "ask.temperature=nan"),
    synthesis("synthesis: an enlargement without end", "crop.enlarge=100000 is not allowed", "crop.enlarge=100000"),
    synthesis("synthesis: the same key twice", "seed is given twice", "seed=1", "seed=2"),
    synthesis("synthesis: a set of somebody's", "train.parquet, which data.synthesize did not make",
              prepare=file_in("out/train.parquet")),
    synthesis("synthesis: settings of somebody's", "config.yaml, which data.synthesize did not make",
              prepare=file_in("out/config.yaml", b"a: [")),
    synthesis("synthesis: no pictures", "holds no .png"),
)  # fmt: skip

CASES = (*SETTINGS, *DESCRIPTIONS, *FILES, LOCK, *RECORDS, *SYNTHESES)
