"""Questions per second through the evaluation harness against bare vLLM on the same prompts, within one process.

    python benchmarks/evaluation.py [--model data/miniature/base] [--rows 512] [--rounds 3]

Bare is `LLM.generate` on decoded pictures and finished prompts, all handed over at once. The harness reads each
picture from its file, decodes it, renders the prompt, parses the answer and appends a record. Both sides take turns
after a warm-up, so that other load on the machine meets both; the ratio of the medians is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from vopd.common import caches, images
from vopd.evaluation import asking, benchmark
from vopd.evaluation.engines import LocalEngine, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(benchmark.ROOT / "data/miniature/base"))
    parser.add_argument("--benchmark", default="miniature_test")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()

    questions = benchmark.load(args.benchmark, caches.inside(".cache/benchmarks"))
    sampling = Sampling(thinking=False, temperature=0.0, top_p=1.0, max_tokens=args.max_tokens, seed=42)
    engine = LocalEngine(args.model, sampling, args.concurrency, {})
    todo = [(q, "full") for q in questions.questions[: args.rows]]
    shown = {q.id: images.decode(questions.picture(q, view), benchmark.PICTURES) for q, view in todo}
    given = [engine.request(q.id, view, shown[q.id], q.prompt) for q, view in todo]

    def bare() -> None:
        prompts, params = zip(*given, strict=True)
        engine.llm.generate(list(prompts), list(params), use_tqdm=False)

    def harness() -> None:
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder) / "records.jsonl"
            failures = asyncio.run(
                asking.ask(engine, questions, todo, records, args.concurrency, lambda: None)
            )
            assert not failures and records.read_bytes().count(b"\n") == len(todo)

    rates: dict[str, list[float]] = {"bare": [], "harness": []}
    bare()
    for _ in range(args.rounds):
        for name, side in (("bare", bare), ("harness", harness)):
            start = time.perf_counter()
            side()
            rates[name].append(len(todo) / (time.perf_counter() - start))
    engine.close()
    for name, values in rates.items():
        each = ", ".join(f"{v:.1f}" for v in values)
        print(f"{name}: {statistics.median(values):.1f} questions/s (rounds: {each})")
    ratio = statistics.median(rates["harness"]) / statistics.median(rates["bare"])
    print(f"harness / bare: {ratio:.3f} ({len(todo)} questions, {args.concurrency} at once)")


if __name__ == "__main__":
    main()
