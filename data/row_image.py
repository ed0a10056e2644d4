"""The type of a dataset's images: stored as references (data/images.py), opened when a row is used."""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Image
from datasets.features.features import register_feature

from data.images import BadImage, open_image


@dataclass
class RowImage:
    """As datasets.Image, but through `open_image`: safe formats only, always RGB, within each image's pixel budget.

    Registered with `datasets`, so that it is still there when a dataset is written to a file and read again. PIL images
    put into such a column become bytes, which keep no budget: they are within it already.
    """

    factor: int | None = None
    allow_remote: bool = False
    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "PIL.Image.Image"
    pa_type: ClassVar[pa.DataType] = pa.struct(
        {
            "bytes": pa.binary(),
            "path": pa.string(),
            **dict.fromkeys(("min_pixels", "max_pixels", "width", "height"), pa.int64()),
        }
    )
    _type: str = field(default="RowImage", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> dict[str, Any]:
        return value if isinstance(value, dict) else Image().encode_example(value)

    def decode_example(self, value: dict[str, Any], token_per_repo_id=None):
        """The image, or what is wrong with it: only the row can say whose it is (data/read.py)."""
        try:
            return open_image(value, self.factor, self.allow_remote)
        except BadImage as error:
            return error

    def cast_storage(self, storage: pa.StructArray) -> pa.StructArray:
        """Fields that are not there are null."""
        return storage.cast(self.pa_type)


with warnings.catch_warnings():  # "experimental"; datasets is pinned
    warnings.simplefilter("ignore")
    register_feature(RowImage, "RowImage")
