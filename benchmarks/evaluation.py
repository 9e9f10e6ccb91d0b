"""Questions per second through the evaluation harness against the same server asked with finished requests.

    python benchmarks/evaluation.py [--model data/miniature/base] [--rows 512] [--rounds 3]

Bare sends bodies that were written before. The harness reads each picture from its file, decodes and encodes it, parses
the answer and appends a record. Both sides take turns after a warm-up, so that other load on the machine
meets both; the ratio of the medians is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from vopd.common import caches, chat_client
from vopd.common.paths import ROOT
from vopd.evaluation import asking, benchmark, server
from vopd.evaluation.endpoint import Endpoint, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "data/miniature/base"))
    parser.add_argument("--benchmark", default="miniature_test")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()

    questions = benchmark.load(args.benchmark, caches.inside(".cache/benchmarks"))
    sampling = Sampling(thinking=False, temperature=0.0, top_p=1.0, max_tokens=args.max_tokens, seed=42)
    todo = [(q, "full") for q in questions.questions[: args.rows]]
    rates: dict[str, list[float]] = {"bare": [], "harness": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        server.started(args.model, args.concurrency, sampling.seed, {}, Path(folder) / "log.txt") as socket,
    ):

        def endpoint() -> Endpoint:
            return Endpoint(server.URL, args.model, sampling, 600.0, socket=socket)

        bodies = [endpoint().request(q.id, view, questions.picture(q, view), q.prompt)[0] for q, view in todo]

        async def bare() -> None:
            client, rest = chat_client.Server(server.URL, 600.0, socket=socket), iter(bodies)

            async def worker() -> None:
                for body in rest:
                    await client.complete(body)

            await asyncio.gather(*(worker() for _ in range(args.concurrency)))

        async def harness() -> None:
            records = Path(folder) / "records.jsonl"
            records.unlink(missing_ok=True)
            failures = await asking.ask(endpoint(), questions, todo, records, args.concurrency, lambda: None)
            assert not failures and records.read_bytes().count(b"\n") == len(todo)

        asyncio.run(bare())
        for _ in range(args.rounds):
            for name, side in (("bare", bare), ("harness", harness)):
                start = time.perf_counter()
                asyncio.run(side())
                rates[name].append(len(todo) / (time.perf_counter() - start))
    for name, values in rates.items():
        each = ", ".join(f"{v:.1f}" for v in values)
        print(f"{name}: {statistics.median(values):.1f} questions/s (rounds: {each})")
    ratio = statistics.median(rates["harness"]) / statistics.median(rates["bare"])
    print(f"harness / bare: {ratio:.3f} ({len(todo)} questions, {args.concurrency} at once)")


if __name__ == "__main__":
    main()
