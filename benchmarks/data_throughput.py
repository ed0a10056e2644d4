"""Does the loader hold the trainer up? And how long do a million rows take to read, or 20,000 to check?

    python -m benchmarks.data_throughput [--rows 1000000] [--images 20000]

Writes benchmarks/results/data_throughput.json: one row a measurement, with command, commit and versions.

    read     JSON lines with images as paths: seconds until a row from the middle is there, the first 50,000 checked as
             training does, and the peak memory of the process
    check    python -m data.check on a JSON file with a 448 x 448 image for each row, without and with --model
    wait     seconds that SPARK's training loop waits for its next batch, over the whole step: on the demo, and with the
             demo's model on those images within the demo's pixel budget
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "data_throughput.json"


def make_files(folder: Path, rows: int, images: int) -> None:
    """many.jsonl (`rows` rows on 1,000 images) and images.json (`images` rows, one image each)."""
    import numpy as np
    from PIL import Image

    rng, noise = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(images):
        pixels = noise.integers(0, 255, (28, 28, 3), dtype=np.uint8)  # smooth at 448: a photograph's entropy, roughly
        picture = Image.fromarray(pixels).resize((448, 448), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i}.jpg", quality=90)
    data = [
        {"prompt": f"What is shown in picture {i}?", "solution": str(i), "image": f"images/{i}.jpg"}
        for i in range(images)
    ]
    (folder / "images.json").write_text(json.dumps(data))
    with open(folder / "many.jsonl", "w") as file:
        for i in range(rows):
            row = {"prompt": f"Question {i}: how much is {rng.random()} plus {rng.random()}?", "solution": str(i)}
            file.write(json.dumps({**row, "image": f"images/{i % min(1000, images)}.jpg"}) + "\n")


def measure_read(folder: Path) -> dict:
    """In a process of its own, for its peak memory."""
    code = (
        "import resource, sys, time; from data.read import read_dataset; import pyarrow, datasets, data.row_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = time.perf_counter()\n"
        "data = read_dataset(sys.argv[1], bad_rows=[]); row = data[len(data) // 2]\n"
        "seconds = time.perf_counter() - start\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(data), seconds, before, peak)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "many.jsonl")], capture_output=True, text=True, check=True
    )
    rows, seconds, before, peak = done.stdout.split()
    return {
        "what": "read",
        "rows": int(rows),
        "seconds": float(seconds),
        "peak_mib": int(peak) / 1024,
        "of_which_libraries_mib": int(before) / 1024,
    }


def measure_check(folder: Path, images: int, *flags: str) -> dict:
    start = time.perf_counter()
    command = [sys.executable, "-m", "data.check", str(folder / "images.json"), "--workers", "2", *flags]
    subprocess.run(command, capture_output=True, check=True)
    what = " ".join(["check", *flags[:1]])
    return {"what": what, "rows": images, "workers": 2, "seconds": time.perf_counter() - start}


def measure_wait(dataset: str, steps: int) -> dict:
    """Train `steps` steps of the demo's recipe on `dataset`, timing what the loop waits for."""
    from transformers import AutoProcessor
    from transformers.trainer_callback import TrainerCallback

    from data.arguments import DataSettings
    from data.lengths import image_factor
    from data.read import read_dataset
    from models.make_digits import OUTPUT
    from train_spark import SparkConfig, SparkTrainer

    processor = AutoProcessor.from_pretrained(OUTPUT, padding_side="left")
    data = read_dataset(
        dataset, DataSettings(max_pixels=28 * 28 * 8), image_factor=image_factor(processor)
    ).remove_columns("task")
    waited = []

    class Timed(SparkTrainer):
        def get_batch_samples(self, *args, **kwargs):
            start = time.perf_counter()
            samples = super().get_batch_samples(*args, **kwargs)
            waited.append(time.perf_counter() - start)
            return samples

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    ends: list[float] = []
    with tempfile.TemporaryDirectory() as output:
        args = SparkConfig(
            output, per_device_train_batch_size=128, num_generations=8, recycle_ratio=2.0, max_completion_length=48,
            max_steps=steps + 1, learning_rate=1e-4, gradient_checkpointing=False, bf16=False, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Timed(str(OUTPUT), args=args, train_dataset=data, processing_class=processor, callbacks=[Ends()])
        trainer.train()
    step = (ends[-1] - ends[0]) / steps  # the first one warms up
    wait = sum(waited[-steps:]) / steps
    return {
        "what": "wait",
        "dataset": Path(dataset).name,
        "steps": steps,
        "step_seconds": step,
        "wait_seconds": wait,
        "share": wait / step,
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, args.rows, args.images)
        for measure, arguments in (
            (measure_read, (folder,)),
            (measure_check, (folder, args.images)),
            (measure_check, (folder, args.images, "--model", "models/digits")),
            (measure_wait, ("digits", args.steps)),
            (measure_wait, (str(folder / "images.json"), args.steps)),
        ):
            load = os.getloadavg()[0]
            rows.append({**measure(*arguments), "load_before": load})
            print(rows[-1], flush=True)
    note = "load_before is the machine's load average before the measurement: other programs were running"
    record.write(RESULTS, (*record.PACKAGES, "datasets", "pyarrow", "pillow"), note=note, rows=rows)


if __name__ == "__main__":
    main()
