"""Published judge benchmarks into the judge format of evaluate.py.

    python -m data.judge_sets MMInstruction/VL-RewardBench --split test --output vl_rewardbench.json
    python -m data.judge_sets allenai/reward-bench-2 --split test --output rewardbench2.json
    python evaluate.py --model MODEL --benchmark vl_rewardbench.json --mode judge --output results.json

VL-RewardBench (1,250 pairs): id, query, response (two), image, human_ranking (0 is the better one), query_source, ...
Its images are written, as they are, to a folder beside OUTPUT.

RewardBench 2 (best of four): id, prompt, chosen, rejected, subset, ... Its subset Ties has several right responses to a
question, and a score of its own that pairs can't give: left out and counted, unless --ties asks for a row for each.
"""

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.arguments import DataSettings
from data.cli import Parser, refuse
from data.images import BadImage, check_image, reference
from data.read import raw_records
from data.rows import BadInput, RowError, Source
from data.table import list_text

VL_REWARDBENCH = {"query", "response", "human_ranking"}
REWARDBENCH_2 = {"prompt", "chosen", "rejected", "subset"}

Judged = dict[str, Any]  # dataset, problem, image_path, chosen, rejected


def vl_rewardbench(raw: dict[str, Any], folder: str, name: str, images: Path) -> Judged:
    """A pair; its image (a path is relative to `folder`) goes to `images`/`name` with the ending of its format.

    Raises RowError.
    """
    responses, ranking = raw.get("response"), raw.get("human_ranking")
    if not isinstance(responses, list) or len(responses) != 2 or not all(map(_is_text, responses)):
        raise RowError("response", "expected two responses as text")
    if ranking not in ([0, 1], [1, 0]):
        raise RowError("human_ranking", f"expected [0, 1] or [1, 0], got {ranking!r:.60}")
    if not _is_text(raw.get("query")):
        raise RowError("query", f"expected a question as text, got {raw.get('query')!r:.60}")
    return {
        "dataset": f"VL-RewardBench/{raw.get('query_source') or 'all'}",
        "problem": raw["query"],
        "image_path": None if raw.get("image") is None else _save(raw["image"], folder, name, images),
        "chosen": responses[ranking.index(0)],
        "rejected": responses[ranking.index(1)],
    }


def _save(image: Any, folder: str, name: str, images: Path) -> str:
    """Write an image into `images` and return its path relative to the parent of that. Raises RowError."""
    from io import BytesIO

    from PIL import Image

    try:
        ref = reference(image, folder)
        check_image(ref)
    except BadImage as error:
        raise RowError("image", str(error)) from None
    content = ref["bytes"] if ref["bytes"] is not None else Path(ref["path"]).read_bytes()
    with Image.open(BytesIO(content)) as opened:
        ending = opened.format.lower()
    images.mkdir(parents=True, exist_ok=True)
    (images / f"{name}.{ending}").write_bytes(content)
    return f"{images.name}/{name}.{ending}"


def rewardbench_2(raw: dict[str, Any], ties: bool) -> list[Judged]:
    """The rows of one question: one, or with `ties` one for each of several right responses; else none for those.

    Raises RowError.
    """
    chosen, rejected = ([raw[name]] if isinstance(raw[name], str) else raw[name] for name in ("chosen", "rejected"))
    for field, responses in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(responses, list) or not responses or not all(map(_is_text, responses)):
            raise RowError(field, f"expected a list of responses as text, got {responses!r:.60}")
    if not _is_text(raw.get("prompt")):
        raise RowError("prompt", f"expected a question as text, got {raw.get('prompt')!r:.60}")
    if len(chosen) > 1 and not ties:
        return []
    row = {"dataset": f"RewardBench-2/{raw['subset']}", "problem": raw["prompt"], "image_path": None}
    return [{**row, "chosen": right, "rejected": rejected} for right in chosen]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def convert(source: Source, images: Path, ties: bool = False) -> Iterator[tuple[list[Judged], str | None]]:
    """For each record its rows, and, where there is none, why. Raises BadInput for other columns, and a bad row."""
    for row, _, raw in raw_records(source):
        if not isinstance(raw, dict):
            raise BadInput(f"{source}: {raw}")
        try:
            if raw.keys() >= VL_REWARDBENCH:
                yield [vl_rewardbench(raw, source.folder, f"{row:05d}", images)], None
            elif raw.keys() >= REWARDBENCH_2:
                rows = rewardbench_2(raw, ties)
                yield rows, None if rows else "several right responses (--ties takes them)"
            else:
                raise BadInput(
                    f"{source}: row {row}: expected columns {', '.join(sorted(VL_REWARDBENCH))} (VL-RewardBench) "
                    f"or {', '.join(sorted(REWARDBENCH_2))} (RewardBench 2), got {', '.join(map(str, raw))}"
                )
        except RowError as error:
            raise BadInput(f"{source}: row {row}: field {error.field}: {error.reason}") from None


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__, prog="data.judge_sets")
    parser.add_argument("source", help="a file, a folder or a hub name")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ties", action="store_true", help="RewardBench 2: a row for each of several right responses")
    args = parser.parse_args(arguments)
    rows: list[Judged] = []
    left_out: Counter = Counter()
    images = args.output.with_name(f"{args.output.stem}_images")
    try:
        with tempfile.TemporaryDirectory() as folder:  # nothing is written before every row is known to be good
            saved = Path(folder) / images.name
            source = Source(args.source, DataSettings(dataset_split=args.split))
            for converted, why in convert(source, saved, args.ties):
                rows += converted
                left_out.update([why] if why else [])
            if not rows:
                raise BadInput(f"{args.source}: expected at least one row to convert, found none")
            args.output.parent.mkdir(parents=True, exist_ok=True)
            if saved.exists():
                shutil.copytree(saved, images, dirs_exist_ok=True)
        args.output.write_text(list_text(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    except (BadInput, OSError) as error:
        return refuse("data.judge_sets", error)
    for why, n in left_out.items():
        print(f"{n:,} rows left out: {why}")
    print(f"{len(rows):,} rows; python evaluate.py --mode judge --benchmark {args.output} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
