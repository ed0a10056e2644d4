"""Records of what `datasets` can load: a hub name, a folder of data files or images, or a folder it saved.

    python train_spark.py --config ... --dataset openai/gsm8k --dataset_config main
    photos/metadata.csv      file_name,question,answer           an image folder: its images are in the column image
    photos/a.png

Code that comes with a dataset is never run (datasets 5 has no `trust_remote_code` any more), and nothing is unpickled.
"""

import itertools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.options import may_have_options
from data.rows import BadInput, NotLoaded
from data.table import SUFFIXES, as_written, short_floats
from data.table import records as read


def records(source: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The records of one split, images as their bytes or paths. Raises BadInput, NotLoaded."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if _is_saved(source):
            loaded = load_from_disk(source)
        elif files := text_files(source, config, split):
            return (record for _, _, record in itertools.chain.from_iterable(map(read, files)))
        else:
            loaded = load_dataset(source, config)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, BadInput):
            raise
        kind = BadInput if Path(source).exists() else NotLoaded
        raise kind(
            f"{source}: expected a file (json, jsonl, csv, tsv, parquet), a folder or a hub name; "
            f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:300]}"
        ) from None
    if isinstance(loaded, DatasetDict):
        loaded = loaded[split_of(source, loaded, split)]
    return as_stored(loaded)


def text_files(source: str, config: str | None, split: str) -> list[str]:
    """The files of a folder's split, where all are CSV or JSON and its README has no settings for reading them:
    `datasets` guesses the types of what they hold, so that 0.50 would be 0.5 and NA nothing. Raises BadInput."""
    from datasets import load_dataset_builder

    readme = Path(source) / "README.md"
    if (
        not Path(source).is_dir()
        or _is_saved(source)
        or (readme.is_file() and "configs:" in readme.read_text("utf-8", "replace"))
    ):
        return []
    found = load_dataset_builder(source, config).config.data_files or {}
    files = {str(name): [str(path) for path in paths] for name, paths in found.items()}
    text = set(SUFFIXES) - {".parquet"}
    if not files or any(Path(path).suffix.lower() not in text for paths in files.values() for path in paths):
        return []
    return files[split_of(source, files, split)]


def _is_saved(source: str) -> bool:
    """Whether `datasets` has saved this folder."""
    return any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def split_of(source: str, splits: Mapping[str, Any], split: str) -> str:
    """The split that is meant. Raises BadInput."""
    if split not in splits and (len(splits) > 1 or split not in ("train", "test")):  # the commands' defaults
        raise BadInput(f"{source}: no split {split!r}; name one with --dataset_split: {', '.join(splits)}")
    return split if split in splits else next(iter(splits))


def as_stored(dataset: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The records of a datasets.Dataset, images left as they are stored and classes by their names; those of a list,
    without pandas' arrays."""
    from datasets import ClassLabel, Dataset, Image, IterableDataset, LargeList, List

    if not isinstance(dataset, (Dataset, IterableDataset)):
        return map(_without_arrays, dataset)

    def stored(feature):
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, (List, LargeList)):
            return type(feature)(stored(feature.feature))
        return feature

    plain, features = dataset.with_format(None), dataset.features or {}  # None: a stream that has not said yet
    for name, feature in features.items():
        if stored(feature) != feature:
            plain = plain.cast_column(name, stored(feature))
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    if may_have_options(features):  # where a class is the place of one
        classes = {}
    short = short_floats(features.arrow_schema) if features else {}

    def written(record: dict[str, Any]) -> dict[str, Any]:
        for name, names in classes.items():
            record[name] = _class(record[name], names)
        return record | {name: as_written(record[name], of) for name, of in short.items()}

    return map(written, plain) if classes or short else plain


def _class(value: int | None, names: list[str]) -> int | str | None:
    """The name of a class."""
    return names[value] if value is not None and 0 <= value < len(names) else value


def _without_arrays(value: Any) -> Any:
    """Lists and numbers of Python where `DataFrame.to_dict` gives numpy's."""
    import numpy as np
    import pyarrow as pa

    if isinstance(value, np.ndarray | np.generic) and value.ndim < 2 and value.dtype in ("float32", "float16"):
        short = pa.float32() if value.dtype == "float32" else pa.float16()
        return as_written(value.tolist(), short if value.ndim == 0 else pa.list_(short))
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 1):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _without_arrays(part) for name, part in value.items()}
    return [_without_arrays(part) for part in value] if isinstance(value, list) else value
