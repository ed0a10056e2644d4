"""What evaluate.py costs around the model: against a server of known speed, and against vLLM called directly.

    python -m benchmarks.eval_throughput [--questions 4000] [--vllm_questions 1000]

1. A local OpenAI-compatible stub that takes 250 ms (1 s) for a request and has room for 256. Seconds of evaluate.py
   with --engine server, and of the `openai` client sending the same requests and nothing else, over the ideal
   (questions x latency / 256); medians of --repeats runs.
2. The real vLLM engine on the shipped model: evaluate.py's engine and LLM.generate on the same prompts.
3. calculate_acc.py on a million rows: seconds, and peak memory with its processes.

Writes benchmarks/results/eval_throughput.json. Ten minutes on two cores; ratios are within this one run.
"""

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "eval_throughput.json"
ROOM = 256  # requests that the stub works on at once, and that are under way
ANSWER = {
    "choices": [{"message": {"role": "assistant", "content": "I count them. \\boxed{7}"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 90, "completion_tokens": 9},
}


# ---------------------------------------------------------------------------------------------------------------------
# The stub


def serve(port: int, latency: float) -> None:
    from aiohttp import web

    room = asyncio.Semaphore(ROOM)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "stub"}]})

    async def complete(request: web.Request) -> web.Response:
        await request.read()
        async with room:
            await asyncio.sleep(latency)
        return web.json_response(ANSWER)

    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", complete)])
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


def start_stub(latency: float, port: int = 0) -> tuple[multiprocessing.Process, int]:
    """A stub in a process of its own, on `port` or a free one."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, latency), daemon=True)
    process.start()
    for _ in range(400):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        time.sleep(0.05)
    raise RuntimeError("the stub did not start")


# ---------------------------------------------------------------------------------------------------------------------
# Its clients, each in a process of its own


def benchmark_rows(folder: Path, n: int) -> list[dict]:
    """Questions, each with an image file of its own: 10 kB, 64 different digits."""
    from data.digits import draw

    rng = random.Random(0)
    contents = []
    for i in range(64):
        with io.BytesIO() as buffer:
            draw((i % 10, i // 10), "test", rng).resize((224, 112)).save(buffer, format="PNG")
            contents.append(buffer.getvalue())
    for i in range(n):
        (folder / f"{i}.png").write_bytes(contents[i % 64])
    image = str(folder / "%d.png")
    return [{"dataset": "d", "problem": f"Count {i}.", "answer": "7", "image_path": image % i} for i in range(n)]


def evaluation(rows: list[dict], port: int, folder: Path) -> float:
    from data.rows import Source
    from evaluate import Settings, read_benchmark, run_to_file
    from evaluation.server import ServerEngine

    rows = read_benchmark(Source(rows), "answer")
    engine = ServerEngine([f"http://127.0.0.1:{port}"], "stub", concurrency=ROOM)
    settings = Settings("stub", "answer", (), "server")
    run_to_file(rows[:ROOM], engine, settings, folder / "warm.json")  # imports, connections
    start = time.perf_counter()
    results = run_to_file(rows, engine, settings, folder / "results.json")
    seconds = time.perf_counter() - start
    assert all(row["is_correct"] for row in results) and len(results) == len(rows)
    engine.close()
    return seconds


def openai_client(rows: list[dict], port: int, folder: Path) -> float:
    """AsyncOpenAI over aiohttp, the fastest of its transports."""
    import httpx2
    import openai

    from evaluation.server import data_url

    async def run() -> float:
        slots = asyncio.Semaphore(ROOM)
        limits = httpx2.Limits(max_connections=ROOM, max_keepalive_connections=ROOM)
        http = openai.DefaultAioHttpClient(limits=limits)
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=http
        ) as client:

            async def ask(row: dict) -> str:
                image = {"type": "image_url", "image_url": {"url": data_url(row["image_path"])}}
                content = [image, {"type": "text", "text": row["problem"]}]
                async with slots:
                    completion = await client.chat.completions.create(
                        model="stub", messages=[{"role": "user", "content": content}], max_tokens=2048, temperature=0.0
                    )
                return completion.choices[0].message.content

            await asyncio.gather(*map(ask, rows[:ROOM]))
            start = time.perf_counter()
            answers = await asyncio.gather(*map(ask, rows))
            assert all("7" in answer for answer in answers)
            return time.perf_counter() - start

    return asyncio.run(run())


CLIENTS = {"evaluate": evaluation, "openai": openai_client}


def one_run(client: str, latency: float, questions: int) -> float:
    """Seconds of one client in a new process, against a new stub."""
    stub, port = start_stub(latency)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "rows.json").write_text(json.dumps(benchmark_rows(Path(name), questions)), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.eval_throughput", "--worker", client, "--folder", name]
        done = subprocess.run([*command, "--port", str(port)], check=True, stdout=subprocess.PIPE, text=True)
    stub.kill()
    return float(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# vLLM, calculate_acc.py


def vllm_ratio(n: int) -> dict:
    """Questions a second through evaluate.py's engine, and through LLM.generate on the same prompts and images."""
    from vllm import SamplingParams

    from data.digits import digit_rows
    from engines import Request, Sampling, VLLMEngine, complete, prompt_text

    engine = VLLMEngine("models/digits", max_model_len=512, enforce_eager=True)
    rows = digit_rows("test", 2 * n, seed=5)
    requests = [Request(row["prompt"], tuple(row["images"] or ())) for row in rows]
    sampling = Sampling(max_tokens=48)

    def direct(requests: list[Request]) -> None:
        prompts = []
        for request in requests:
            ids = engine.tokenizer(prompt_text(engine.processor, request), add_special_tokens=False)["input_ids"]
            images = {"multi_modal_data": {"image": list(request.images)}} if request.images else {}
            prompts.append({"prompt_token_ids": ids, **images})
        engine.llm.generate(prompts, SamplingParams(max_tokens=48, temperature=0.0), use_tqdm=False)

    ways = {"engine": lambda requests: complete(engine, requests, sampling), "direct": direct}
    ways["engine"](requests[:8])
    seconds = {way: [] for way in ways}
    for turn in range(8):
        for way in ("engine", "direct") if turn % 2 else ("direct", "engine"):
            engine.llm.reset_prefix_cache()
            engine.llm.llm_engine.reset_mm_cache()
            start = time.perf_counter()
            ways[way](requests[turn % 2 * n :][:n])
            seconds[way].append(time.perf_counter() - start)
    ratio = statistics.median(seconds["direct"]) / statistics.median(seconds["engine"])
    return {"questions": n, "seconds": seconds, "throughput_ratio": ratio}


def million_rows(n: int) -> dict:
    """calculate_acc.py on `n` rows of a kilobyte: 40 % fractions and roots, and next to no pair twice."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "results.json"
        with open(path, "w", encoding="utf-8") as file:
            for i in range(n):
                golds = (
                    str(rng.randint(0, 999)),
                    f"\\frac{{{rng.randint(1, 20)}}}{{{rng.randint(2, 20)}}}",
                    f"{rng.randint(1, 9)}\\sqrt{{{rng.randint(2, 9)}}}",
                    rng.choice("ABCD"),
                    f"{100 * rng.random():.2f}",
                )
                gold = rng.choice(golds)
                answer = rng.choices((gold, str(rng.randint(0, 999)), None), (60, 36, 4))[0]
                row = {
                    "dataset": f"benchmark {i % 9}",
                    "problem": f"Question {i}: " + "what is it? " * 10,
                    "image_path": f"images/{i}.png",
                    "ground_truth": gold,
                    "vlm_output": "reasoning " * 60 + f"\\boxed{{{answer}}}",
                    "extracted_answer": answer,
                    "is_correct": answer == gold,
                    "error": None,
                    "prompt_tokens": 400,
                    "completion_tokens": 300,
                }
                file.write(("[\n" if i == 0 else ",\n") + json.dumps(row))
            file.write("\n]\n")
        command = [sys.executable, "calculate_acc.py", "--result_path", str(path), "--format", "json"]
        start = time.perf_counter()
        with PeakMemory() as memory:
            table = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        seconds = time.perf_counter() - start
        assert table["files"][0]["rows"] == n
        return {"rows": n, "megabytes": path.stat().st_size / 1e6, "seconds": seconds, "peak_mb": memory.peak / 1e6}


class PeakMemory:
    """The most memory that this process's children had at once, shared pages divided among them (PSS)."""

    def __enter__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._stop.wait(0.3):
            total = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--questions", type=int, default=4000)
    parser.add_argument("--latency", type=float, nargs="+", default=[0.25, 1.0], help="of the stub, seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm_questions", type=int, default=1000, help="0: without vLLM")
    parser.add_argument("--accuracy_rows", type=int, default=1_000_000, help="0: without calculate_acc.py")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=(*CLIENTS, "vllm"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "vllm":
        return print(json.dumps(vllm_ratio(args.vllm_questions)))
    if args.worker:
        rows = json.loads((args.folder / "rows.json").read_text(encoding="utf-8"))
        return print(CLIENTS[args.worker](rows, args.port, args.folder))

    results = {"server": [], "runs": []}
    for latency in args.latency:
        runs = [
            {"latency": latency, "client": client, "seconds": one_run(client, latency, args.questions)}
            for _ in range(args.repeats)
            for client in CLIENTS
        ]
        results["runs"] += runs
        ideal = args.questions * latency / ROOM
        medians = {c: statistics.median(run["seconds"] for run in runs if run["client"] == c) for c in CLIENTS}
        ratios = {f"{client}_of_ideal": seconds / ideal for client, seconds in medians.items()}
        results["server"].append({"latency": latency, "ideal_seconds": ideal, **ratios})
        print(results["server"][-1], flush=True)
    if args.vllm_questions:
        command = [sys.executable, "-m", "benchmarks.eval_throughput", "--worker", "vllm"]
        command += ["--vllm_questions", str(args.vllm_questions)]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        (printed,) = (line for line in done.stdout.splitlines() if line.startswith('{"questions"'))  # vLLM says more
        results["vllm"] = json.loads(printed)
        print(results["vllm"], flush=True)
    if args.accuracy_rows:
        results["calculate_acc"] = million_rows(args.accuracy_rows)
        print(results["calculate_acc"], flush=True)
    record.write(args.output, (*record.PACKAGES, "aiohttp", "openai"), **results)


if __name__ == "__main__":
    main()
