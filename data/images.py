"""Images of a dataset: located, checked by their header, opened as RGB, fitted into a pixel budget.

An image reference is a small dict, so that a million of them stay small and nothing is opened before it is used:

    bytes, path              one of the two; a path is absolute, or a http(s) URL
    min_pixels, max_pixels   the budget, None for none
    width, height            upright, before the budget; None where nobody has looked yet

What can't be used raises BadImage, whose text says what is expected. Files are hostile until read: only the formats
below are tried, nothing but regular files is opened, and a header that promises too many pixels is refused unread.
"""

import atexit
import base64
import binascii
import hashlib
import math
import os
import re
import reprlib
import shutil
import stat
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps

from data.cli import write_atomically

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none of them runs another program
MAX_ASPECT = 200  # longer side over shorter one; what the Qwen-VL processors take
MAX_PIXELS = 89_478_485  # Pillow's own warning level: 256 MiB of RGB
REMOTE_BYTES = 32 << 20
REMOTE_SECONDS = 20.0  # for the whole transfer
CACHE_BYTES = 256 << 20  # decoded images kept: the G rollouts of a question ask for the same one
CACHE_IMAGES = 1024

_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")  # PNG JPEG GIF WEBP BMP TIFF TIFF
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")
_NO_RANGE = ("F", "LAB")
_ORIENTATION = 0x0112  # EXIF tag; values above 4 lie on their side
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # a PNG may say there that it is turned

Reference = dict[str, Any]


class BadImage(ValueError):
    """An image that can't be used; the text says why and what is expected."""


class NotFetched(BadImage):
    """No fault of the image: the next try, or another machine, may get it."""


# ---------------------------------------------------------------------------------------------------------------------
# From what a dataset holds to a reference


def reference(
    value: Any,
    folder: str = ".",
    root: str | None = None,
    allow_remote: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Reference:
    """The reference of `value`: a path, `file://` or `data:` URI, URL, base64 text, bytes, PIL image, or a dict of
    `bytes` and `path` as datasets.Image stores it (or `image`, `url`). Of the image itself nothing is read.

    Args:
        folder: what relative paths are relative to.
        root: if given, a path outside it, also through `..` or a link, is refused.
        allow_remote: take http(s) URLs; they are fetched when used.
        min_pixels, max_pixels: the budget. A dict's own one counts too: the narrower of the two.

    Raises BadImage.
    """
    if isinstance(value, dict):
        min_pixels = narrower(max, pixels(value.get("min_pixels"), "min_pixels"), min_pixels)
        max_pixels = narrower(min, pixels(value.get("max_pixels"), "max_pixels"), max_pixels)
        value = next((value[name] for name in ("bytes", "path", "image", "url") if value.get(name)), None)
    if min_pixels and max_pixels and min_pixels > max_pixels:
        raise BadImage(f"expected min_pixels up to max_pixels, got {min_pixels} and {max_pixels}")
    content = path = None
    if isinstance(value, Image.Image):
        content = _as_png(value)
    elif isinstance(value, (bytes, bytearray)):
        content = bytes(value)
    elif isinstance(value, (str, os.PathLike)) and str(value).strip():
        content, path = _read_text(str(value).strip(), folder, root, allow_remote)
    else:
        raise BadImage(f"expected a path, bytes, base64 or an image, got {reprlib.repr(value)}")
    return {
        "bytes": content,
        "path": path,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "width": None,
        "height": None,
    }


def _as_png(image: Image.Image) -> bytes:
    """An image in memory as a file's content, upright. Raises BadImage."""
    try:
        image = ImageOps.exif_transpose(image)
        return _encoded(image if image.mode in _PNG_MODES else to_rgb(image))
    except (OSError, SyntaxError, ValueError) as error:  # opened before, and broken behind its header
        raise BadImage(f"an image of mode {image.mode} can't be used ({str(error)[:120]})") from None


def pixels(value: Any, name: str) -> int | None:
    """A pixel budget as a number, None for none. Raises BadImage."""
    if value is None:
        return None
    try:
        number = int(value)
    except (ValueError, TypeError, OverflowError):
        number = 0
    if not 1 <= number < 10**12:
        raise BadImage(f"expected {name} as a number of pixels, got {reprlib.repr(value)}")
    return number


def narrower(pick: Callable, first: int | None, second: int | None) -> int | None:
    """The bound that allows less, by `pick` (min or max); None is no bound."""
    return pick(first, second) if first and second else first or second


def _read_text(text: str, folder: str, root: str | None, allow_remote: bool) -> tuple[bytes | None, str | None]:
    """(bytes, path) of a string, one of them None."""
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        if not head.endswith(";base64"):
            raise BadImage(f"expected data:image/...;base64,..., got {text[:40]!r}")
        return _decode_base64(body), None
    if is_remote(text):
        if not allow_remote:
            raise BadImage(f"{text:.80} is remote; give --allow_remote_images to fetch it when it is used")
        return None, text
    if is_embedded(text) and not _exists(text, folder):
        return _decode_base64(text), None
    return None, locate(text, folder, root)


def is_embedded(text: str) -> bool:
    """Whether this is an image itself, as text, and not where it is."""
    return text.startswith("data:") or (len(text) > 60 and text.startswith(_BASE64_STARTS))


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadImage(f"expected base64, got {text[:40]!r}") from None


def is_remote(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _exists(text: str, folder: str) -> bool:
    return os.path.exists(os.path.join(folder, text))


_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def _under(path: str, root: str) -> str | None:
    """Where a path of another disk is under `root`: the longest end of it that is there."""
    parts = path.split("/")[1:]
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((os.path.join(root, end) for end in ends if _exists(end, root)), None)


def locate(text: str, folder: str, root: str | None = None) -> str:
    """The absolute path of a regular file. With `root`, one that is not on this disk may lie there, under an end of its
    path. Raises BadImage if it is no regular file, or outside `root`."""
    path = text
    if path.startswith("file://"):
        path = path.removeprefix("file://").removeprefix("localhost")
        if not _exists(path, folder):
            path = unquote(path)
    if root is not None and path.startswith("/") and not _exists(path, root):
        path = _under(path, root) or path
    if "\\" in path and not _exists(path, folder):  # Windows'
        return locate(re.sub("^[A-Za-z]:", "", path).replace("\\", "/"), folder, root)
    path = os.path.join(folder, path)
    if ".." in path or not path.startswith("/"):
        path = os.path.abspath(path)
    try:
        path.encode()  # a dataset keeps paths as text
        mode = os.lstat(path).st_mode
        link = stat.S_ISLNK(mode)
        if link:
            mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise BadImage(f"no such file {path:.200}") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"{path[:200]!r} can't be opened: {getattr(error, 'strerror', None) or error}") from None
    if root is not None:
        real = os.path.realpath(path) if link else _real_folder(os.path.dirname(path)) + os.sep
        if not real.startswith(os.path.join(_real_folder(root), "")):
            raise BadImage(f"{text[:200]!r} is outside the image root {root}")
    if not stat.S_ISREG(mode):
        raise BadImage(f"{path:.200} is not a regular file")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Opening


@contextmanager
def _opened(ref: Reference, allow_remote: bool = False) -> Iterator[Image.Image]:
    """The image with its header read. Whatever Pillow raises about the file, also later in the block, is a BadImage."""
    name = ref["path"] or f"image of {len(ref['bytes'])} bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; the one about bombs is checked below
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            content, path = ref["bytes"], ref["path"]
            if content is None and is_remote(path):
                content = fetch(path, allow_remote)
            with Image.open(path if content is None else BytesIO(content), formats=FORMATS) as image:
                _check_shape(image, name)
                if image.mode in _NO_RANGE:
                    raise BadImage(f"{name}: pixels of mode {image.mode} have no known range, expected 8 or 16 bits")
                yield image
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"{name}: expected at most {MAX_PIXELS:,} pixels (a decompression bomb?)") from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"{name} can't be read as an image; expected {', '.join(FORMATS)}") from None
    except FileNotFoundError:
        raise BadImage(f"no such file {name}") from None
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError) as error:
        raise BadImage(f"{name} can't be read as an image ({str(error)[:120]})") from None  # Pillow's plugins raise all


def _check_shape(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{name}: {width} x {height}, expected an aspect ratio of at most {MAX_ASPECT}")


def size_of(ref: Reference, allow_remote: bool = False) -> tuple[int, int]:
    """(width, height), upright, from the header. Raises BadImage."""
    with _opened(ref, allow_remote) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "PNG" and "exif" not in image.info:  # behind the pixels, if anywhere: not worth decoding them
        return image.size
    if image.format == "TIFF":  # Pillow has turned it
        return image.size
    return image.size[::-1] if image.getexif().get(_ORIENTATION, 1) > 4 else image.size


def check_image(ref: Reference, allow_remote: bool = False) -> tuple[int, int]:
    """`size_of`, and enough of the pixels to tell a broken file. Raises BadImage."""
    with _opened(ref, allow_remote) as image:
        size = _upright_size(image)
        _check_pixels(image)
        return size


def content_digest(ref: Reference) -> bytes:
    """The same for the same file, wherever it is stored; of a URL, that of its text."""
    if ref["bytes"] is not None:
        return hashlib.blake2b(ref["bytes"]).digest()
    if is_remote(ref["path"]):
        return hashlib.blake2b(ref["path"].encode()).digest()
    with open(ref["path"], "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _check_pixels(image: Image.Image) -> None:
    """The checksums of a PNG, a JPEG at an eighth of its resolution, the whole of others."""
    if image.format == "PNG":
        image.verify()
        return
    if image.format in ("JPEG", "MPO"):  # the second is a JPEG with more pictures behind it
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    if image.mode.startswith("I"):
        to_rgb(image)  # the range of its pixels


@lru_cache
def _fetched() -> Path:
    """Where what was fetched is kept, for as long as the process runs."""
    folder = tempfile.mkdtemp(prefix="spark-images-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def fetch(url: str, allow_remote: bool = False) -> bytes:
    """The content behind an http(s) URL, within REMOTE_BYTES and REMOTE_SECONDS; fetched once, then read from disk.

    Raises BadImage; NotFetched if another try may do.
    """
    import requests
    from urllib3 import Retry
    from urllib3.exceptions import HTTPError

    if not allow_remote or urlsplit(url).scheme not in ("http", "https"):
        raise BadImage(f"{url:.80} is remote; give --allow_remote_images to fetch it when it is used")
    kept = _fetched() / hashlib.blake2b(url.encode(), digest_size=16).hexdigest()
    if kept.exists():
        return kept.read_bytes()
    retry = Retry(3, backoff_factor=0.5, status_forcelist=(408, 429, 500, 502, 503, 504))
    content, deadline = bytearray(), time.monotonic() + REMOTE_SECONDS
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
            with session.get(url, stream=True, timeout=REMOTE_SECONDS / 4) as response:
                response.raise_for_status()
                while part := response.raw.read1(1 << 14, decode_content=True):  # what is there, be it a byte
                    content += part
                    if len(content) > REMOTE_BYTES:
                        raise BadImage(f"{url:.80}: expected at most {REMOTE_BYTES:,} bytes")
                    if time.monotonic() > deadline:
                        raise NotFetched(f"{url:.80}: not there after {REMOTE_SECONDS:g} s")
    except requests.HTTPError as error:  # what stays: no such image, no right to it
        raise BadImage(f"{url:.80} can't be fetched ({error.response.status_code})") from None
    except (requests.RequestException, HTTPError) as error:
        raise NotFetched(f"{url:.80} can't be fetched ({type(error).__name__})") from None
    write_atomically(kept, bytes(content))
    return bytes(content)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: alpha on white, 16 bits by their upper eight, palette, grey and CMYK by colour; of an animation the
    first frame. Raises BadImage for floating-point and other pixels without a known range."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in _NO_RANGE:
        raise BadImage(f"pixels of mode {image.mode} have no known range, expected 8 or 16 bits")
    if image.mode.startswith("I"):
        import numpy as np

        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadImage(f"pixels from {values.min()} to {values.max()}, expected 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def as_file(value: Any) -> tuple[bytes, str]:
    """(content, MIME type) of a file in which any program sees what `loaded` gives: the image's own where that is so,
    else a PNG. Raises BadImage."""
    ref = value if is_reference(value) else reference(value)
    if ref["bytes"] is None:
        with suppress(OSError):  # `_opened` says what is wrong
            content = fetch(ref["path"], True) if is_remote(ref["path"]) else Path(ref["path"]).read_bytes()
            ref = {**ref, "bytes": content}
    with _opened(ref) as image:
        size = _upright_size(image)
        plain = image.mode in ("L", "RGB") and not image.has_transparency_data
        plain &= fitted_size(*size, ref["min_pixels"], ref["max_pixels"]) == size
        if image.format == "PNG":
            plain &= not any(mark in ref["bytes"] for mark in _PNG_ORIENTATION)
        else:
            plain &= image.format in ("JPEG", "WEBP") and image.getexif().get(_ORIENTATION, 1) == 1
        if plain or image.format == "PNG":  # of the others, decoding tells
            _check_pixels(image)
        if plain:
            return ref["bytes"], f"image/{image.format.lower()}"
    return _encoded(open_image(ref)), "image/png"


def _encoded(image: Image.Image) -> bytes:
    with BytesIO() as buffer:
        image.save(buffer, format="PNG")
        return buffer.getvalue()


_cache: OrderedDict[tuple, Image.Image] = OrderedDict()


def open_image(ref: Reference, factor: int | None = None, allow_remote: bool = False) -> Image.Image:
    """The image, RGB and within its budget. It may be shared with other callers: don't change it in place.

    Args:
        factor: pixels a side of one visual token, for the Qwen-VL family (28 for Qwen2.5-VL); None for other models.

    Raises BadImage.
    """
    key = (ref["bytes"], ref["path"], ref["min_pixels"], ref["max_pixels"], factor)
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    with _opened(ref, allow_remote) as opened:
        image = fit(to_rgb(opened), ref["min_pixels"], ref["max_pixels"], factor)
    _cache[key] = image
    while len(_cache) > CACHE_IMAGES or (
        sum(3 * kept.width * kept.height for kept in _cache.values()) > CACHE_BYTES and len(_cache) > 1
    ):
        _cache.popitem(last=False)
    return image


def is_reference(value: Any) -> bool:
    """Whether `reference` made this; if it is a URL, fetching it was allowed then."""
    return isinstance(value, dict) and "width" in value


def loaded(value: Any, factor: int | None = None) -> Image.Image:
    """`open_image` of a reference, or of what `reference` takes; an image in memory does not go by way of a file.

    Raises BadImage.
    """
    if not isinstance(value, Image.Image):
        return open_image(value if is_reference(value) else reference(value), factor, allow_remote=True)
    _check_shape(value, "image in memory")
    try:
        return to_rgb(value)
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # opened before, and broken behind its header
        raise BadImage(f"an image of mode {value.mode} can't be used ({str(error)[:120]})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Pixel budget


def fitted_size(
    width: int, height: int, min_pixels: int | None, max_pixels: int | None, factor: int | None = None
) -> tuple[int, int]:
    """(width, height) within the budget. With `factor`, the grid that a Qwen-VL processor of that budget would give,
    by qwen-vl-utils; without, the same shape scaled, and the grid is left to the processor."""
    if min_pixels is None and max_pixels is None:
        return width, height
    if factor is not None and min(width, height) > factor // 2:
        # Thinner ones qwen-vl-utils rounds otherwise than the processors do; those are few pixels, and left to them.
        from qwen_vl_utils.vision_process import smart_resize

        fitted = smart_resize(height, width, factor, min_pixels or 1, max_pixels or 10**12)  # its defaults are tighter
        return max(fitted[1], factor), max(fitted[0], factor)
    if factor is None and max_pixels is not None and width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    if factor is None and min_pixels is not None and width * height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        return math.ceil(width * scale), math.ceil(height * scale)
    return width, height


def fit(image: Image.Image, min_pixels: int | None, max_pixels: int | None, factor: int | None = None) -> Image.Image:
    """`image`, resized if its budget asks for another size (see `fitted_size`)."""
    size = fitted_size(*image.size, min_pixels, max_pixels, factor)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
