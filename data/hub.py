"""Records of what `datasets` can load: a hub name, a folder of data files or images, or a folder it saved.

    python train_spark.py --config ... --dataset openai/gsm8k --dataset_config main
    photos/metadata.csv      file_name,question,answer           an image folder: its images are in the column image
    photos/a.png

Code that comes with a dataset is never run (datasets 5 has no `trust_remote_code` any more), and nothing is unpickled.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.rows import BadInput, NotLoaded


def records(source: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The records of one split, images as their bytes or paths. Raises BadInput, NotLoaded."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = load_from_disk(source)
        else:
            loaded = load_dataset(source, config)
    except (OSError, ValueError, DatasetsError) as error:
        kind = BadInput if Path(source).exists() else NotLoaded
        raise kind(
            f"{source}: expected a file (json, jsonl, csv, tsv, parquet), a folder or a hub name; "
            f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:300]}"
        ) from None
    if isinstance(loaded, DatasetDict):
        if split not in loaded and (len(loaded) > 1 or split not in ("train", "test")):  # the commands' defaults
            raise BadInput(f"{source}: no split {split!r}; name one with --dataset_split: {', '.join(loaded)}")
        loaded = loaded[split if split in loaded else next(iter(loaded))]
    return as_stored(loaded)


def as_stored(dataset: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The records of a datasets.Dataset, images left as they are stored; those of a list, without pandas' arrays."""
    from datasets import Dataset, Image, IterableDataset, LargeList, List

    if not isinstance(dataset, (Dataset, IterableDataset)):
        return map(_without_arrays, dataset)

    def stored(feature):
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, (List, LargeList)):
            return type(feature)(stored(feature.feature))
        return feature

    plain = dataset.with_format(None)
    for name, feature in (dataset.features or {}).items():  # None: a stream that has not said yet
        if stored(feature) != feature:
            plain = plain.cast_column(name, stored(feature))
    return plain


def _without_arrays(value: Any) -> Any:
    """Lists and numbers of Python where `DataFrame.to_dict` gives numpy's."""
    import numpy as np

    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 1):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _without_arrays(part) for name, part in value.items()}
    return [_without_arrays(part) for part in value] if isinstance(value, list) else value
