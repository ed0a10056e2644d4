"""What does evaluate.py cost around the model? Against a server of known speed, and against vLLM called directly.

    python -m benchmarks.eval_throughput [--questions 4000] [--vllm_questions 400]

1. A local OpenAI-compatible stub that takes 50 ms (250 ms, 1 s) for a request and has room for 256. evaluate.py with
   --engine server beside the ideal (questions x latency / 256), and beside a plain synchronous pool of 256 processes
   that does the same work (read the image, encode it, call, verify the answer): wall time, CPU seconds, peak memory,
   medians of --repeats runs. The stub has a process of its own; its CPU seconds are given too.
2. The real vLLM engine on the shipped model: evaluate.py's engine beside LLM.generate on the same prompts.
3. calculate_acc.py on a million rows: seconds, and peak memory with its processes.

Writes benchmarks/results/eval_throughput.json. Ten minutes on two cores; ratios are within this one run.
"""

import argparse
import asyncio
import base64
import http.client
import io
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

RESULTS = Path("benchmarks/results/eval_throughput.json")
ROOM = 256
ANSWER = json.dumps(
    {
        "choices": [{"message": {"role": "assistant", "content": "I count them. \\boxed{7}"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 9},
    }
).encode()


# ---------------------------------------------------------------------------------------------------------------------
# The stub


class Stub(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as little of it as a client notices, and as little work as Python can do for it."""

    under_way = 0
    waiting: ClassVar[deque] = deque()  # those that came when there was no room

    def __init__(self, latency: float):
        self.latency, self.received, self.body_at, self.expected = latency, bytearray(), 0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.body_at:
            if (end := self.received.find(b"\r\n\r\n")) < 0:
                return
            self.body_at = end + 4
            length = re.search(rb"\r\ncontent-length: *(\d+)", self.received[:end].lower())
            self.expected = self.body_at + (int(length[1]) if length else 0)
        if len(self.received) >= self.expected:
            call = self.received.startswith(b"POST")
            self.received, self.body_at = bytearray(), 0
            if not call:
                self.reply(b'{"data": [{"id": "stub"}]}')
            elif Stub.under_way < ROOM:
                self.work()
            else:
                Stub.waiting.append(self)

    def work(self) -> None:
        Stub.under_way += 1
        asyncio.get_running_loop().call_later(self.latency, self.finish)

    def finish(self) -> None:
        Stub.under_way -= 1
        self.reply(ANSWER)
        if Stub.waiting:
            Stub.waiting.popleft().work()

    def reply(self, body: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )


async def _serve(port: int, latency: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Stub(latency), "127.0.0.1", port, backlog=ROOM)
    await server.serve_forever()


def start_stub(latency: float, port: int = 0) -> tuple[multiprocessing.Process, int]:
    """A stub in a process of its own, on `port` or a free one."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=_run_stub, args=(port, latency), daemon=True)
    process.start()
    for _ in range(200):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        time.sleep(0.05)
    raise RuntimeError("the stub did not start")


def _run_stub(port: int, latency: float) -> None:
    asyncio.run(_serve(port, latency))


# ---------------------------------------------------------------------------------------------------------------------
# Runs, each in a process of its own


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


def ours(rows: list[dict], port: int, folder: Path) -> None:
    from data.read import Source
    from engines import ServerEngine
    from evaluate import Settings, read_benchmark, run_to_file

    rows = read_benchmark(Source(rows), "answer")
    engine = ServerEngine([f"http://127.0.0.1:{port}"], "stub", concurrency=ROOM)
    run_to_file(rows[:32], engine, Settings("stub", "answer", (), "server"), folder / "warm.json")
    with Measured() as measured:
        found = run_to_file(rows, engine, Settings("stub", "answer", (), "server"), folder / "ours.json")
    assert all(row["is_correct"] for row in found) and len(found) == len(rows)
    engine.close()
    print(json.dumps(measured.found))


def one_synchronous(arguments: tuple[dict, int]) -> bool:
    row, port = arguments
    import verify

    image = base64.b64encode(Path(row["image_path"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": row["problem"]},
    ]
    body = {"model": "stub", "messages": [{"role": "user", "content": content}], "max_tokens": 2048, "temperature": 0.0}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body=json.dumps(body), headers=headers)
    answer = json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]
    return bool(verify.is_equal(verify.extract_boxed(answer), row["answer"]))


def pool(rows: list[dict], port: int, folder: Path) -> None:
    import verify

    verify.is_equal("7", "7")  # imported before the fork: the pool's memory is shared as far as it can be
    with Measured() as measured, multiprocessing.get_context("fork").Pool(ROOM) as processes:
        found = processes.map(one_synchronous, [(row, port) for row in rows], chunksize=1)
        (folder / "pool.json").write_text(json.dumps(found), encoding="utf-8")
        measured.sample()
        processes.close()
        processes.join()
    assert all(found) and len(found) == len(rows)
    print(json.dumps(measured.found))


class Measured:
    """Wall and CPU seconds, and peak memory (PSS: shared pages divided) of this process with its children.

    The CPU that looking at 257 processes takes is not theirs, and left out.
    """

    def __enter__(self):
        import psutil

        self.process, self.peak, self.looking, self.stop = psutil.Process(), 0, 0.0, threading.Event()
        self.cpu, self.wall = self._cpu(), time.perf_counter()
        self.sampler = threading.Thread(target=self._watch, daemon=True)
        self.sampler.start()
        return self

    def __exit__(self, *_):
        wall = time.perf_counter() - self.wall
        self.stop.set()
        self.sampler.join()
        self.found = {"seconds": wall, "cpu_seconds": self._cpu() - self.cpu - self.looking, "peak_mb": self.peak / 1e6}

    def sample(self) -> None:
        import contextlib

        import psutil

        total, start = 0, time.thread_time()
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        self.peak = max(self.peak, total)
        self.looking += time.thread_time() - start

    def _watch(self) -> None:
        while not self.stop.wait(0.5):
            self.sample()
        self.sample()

    @staticmethod
    def _cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)


def vllm_ratio(n: int) -> dict:
    """Questions a second through evaluate.py's engine, and through LLM.generate on the same prompts and images."""
    from vllm import SamplingParams

    from data.digits import digit_rows
    from engines import Request, Sampling, VLLMEngine, complete, prompt_text

    engine = VLLMEngine("data/tiny_qwen2_5_vl", max_model_len=512, enforce_eager=True)
    rows = digit_rows("test", 2 * n, seed=5)
    requests = [Request(row["prompt"], tuple(row["images"] or ())) for row in rows]
    sampling = Sampling(max_tokens=48)
    complete(engine, requests[:8], sampling)
    times = {"engine": [], "direct": []}
    for turn in range(8):
        part = requests[turn % 2 * n :][:n]
        for how in ("engine", "direct") if turn % 2 else ("direct", "engine"):
            engine.llm.reset_prefix_cache()
            engine.llm.llm_engine.reset_mm_cache()
            start = time.perf_counter()
            if how == "engine":
                complete(engine, part, sampling)
            else:
                prompts = [
                    {
                        "prompt_token_ids": engine.tokenizer(
                            prompt_text(engine.processor, r), add_special_tokens=False
                        )["input_ids"],
                        **({"multi_modal_data": {"image": list(r.images)}} if r.images else {}),
                    }
                    for r in part
                ]
                engine.llm.generate(prompts, SamplingParams(max_tokens=48, temperature=0.0), use_tqdm=False)
            times[how].append(time.perf_counter() - start)
    ratio = statistics.median(times["direct"]) / statistics.median(times["engine"])
    return {"questions": n, "seconds": times, "throughput_ratio": ratio}


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
        with Measured() as measured:
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        assert found["files"][0]["rows"] == n
        return {"rows": n, "megabytes": path.stat().st_size / 1e6, **measured.found}


MEASURES = ("seconds", "cpu_seconds", "peak_mb", "stub_cpu_seconds")


def one_run(command: list[str], worker: str, latency: float, args: argparse.Namespace) -> dict:
    """One worker in a new process, against a new stub."""
    import psutil

    stub, port = start_stub(latency)
    with tempfile.TemporaryDirectory() as name:
        rows = benchmark_rows(Path(name), args.questions)
        (Path(name) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        used = sum(psutil.Process(stub.pid).cpu_times()[:2])
        flags = ["--worker", worker, "--folder", name, "--port", str(port)]
        run = subprocess.run([*command, *flags], check=True, stdout=subprocess.PIPE, text=True)
        used = sum(psutil.Process(stub.pid).cpu_times()[:2]) - used
    stub.terminate()
    return {**json.loads(run.stdout.splitlines()[-1]), "stub_cpu_seconds": used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=4000)
    parser.add_argument("--latency", type=float, nargs="+", default=[0.05, 0.25, 1.0], help="of the stub, seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm_questions", type=int, default=1000, help="0: without vLLM")
    parser.add_argument("--accuracy_rows", type=int, default=1_000_000, help="0: without calculate_acc.py")
    parser.add_argument("--worker", choices=("ours", "pool", "vllm"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "vllm":
        return print(json.dumps(vllm_ratio(args.vllm_questions)))
    if args.worker:
        rows = json.loads((args.folder / "rows.json").read_text(encoding="utf-8"))
        return {"ours": ours, "pool": pool}[args.worker](rows, args.port, args.folder)

    command = [sys.executable, "-m", "benchmarks.eval_throughput", "--vllm_questions", str(args.vllm_questions)]
    found = {"stub": [], "runs": []}
    for latency in args.latency:
        case = {"latency": latency, "ideal_seconds": args.questions * latency / ROOM}
        runs = {"ours": [], "pool": []}
        for turn in range(args.repeats):
            for worker in ("ours", "pool") if turn % 2 else ("pool", "ours"):
                runs[worker].append({"latency": latency, "worker": worker, **one_run(command, worker, latency, args)})
        for worker, rows in runs.items():
            case[worker] = {name: statistics.median(row[name] for row in rows) for name in MEASURES}
            found["runs"] += rows
        case["times_ideal"] = case["ours"]["seconds"] / case["ideal_seconds"]
        for measure in MEASURES[:3]:
            case[f"{measure}_of_pool"] = case["ours"][measure] / case["pool"][measure]
        print(json.dumps(case, indent=1), flush=True)
        found["stub"].append(case)
    if args.vllm_questions:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        run = subprocess.run(
            [*command, "--worker", "vllm"], check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        (printed,) = (line for line in run.stdout.splitlines() if line.startswith('{"questions"'))  # vLLM says more
        found["vllm"] = json.loads(printed)
    if args.accuracy_rows:
        found["calculate_acc"] = million_rows(args.accuracy_rows)
        print(json.dumps(found["calculate_acc"], indent=1), flush=True)
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "httptools", "uvloop", "pybase64", "msgspec"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "command": f"python -m benchmarks.eval_throughput --questions {args.questions}",
        "commit": commit,
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **found,
    }
    RESULTS.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(json.dumps(found.get("vllm"), indent=1))


if __name__ == "__main__":
    main()
