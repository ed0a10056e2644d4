"""Text and images that a model, or a dataset, wrote: made harmless to look at."""

import base64
import io
import re

MAX_CHARS = 1500  # of one text on a card

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\uffff"
    r"\ud800-\udfff\U000e0000-\U000e0fff]"
)


def visible(text) -> str:
    """`text` with every control, direction and zero-width character written out as [U+XXXX]."""
    return _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(text))


def shorten(text: str) -> str:
    """The beginning and the end, for the verdict comes last."""
    left_out = len(text) - MAX_CHARS
    if left_out <= 0:
        return text
    return f"{text[: MAX_CHARS * 2 // 3]}\n[... {left_out:,} characters left out ...]\n{text[-MAX_CHARS // 3 :]}"


def image(data) -> dict[str, str]:
    """PNG bytes as the `source` of an image tag, encoded anew from their pixels; an `error` where they are no image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(bytes(data)), formats=["PNG"]) as opened:
            if max(opened.size) > 4096:
                raise ValueError(f"{opened.size} is too large for a thumbnail")
            pixels = opened.convert("RGB")
        pixels.thumbnail((320, 320))
        with io.BytesIO() as file:
            pixels.save(file, format="PNG", optimize=True)
            if file.tell() < 20_000:
                return {"source": data_uri(file.getvalue(), "png")}
        with io.BytesIO() as file:  # a photograph
            pixels.save(file, format="WEBP", quality=75)
            return {"source": data_uri(file.getvalue(), "webp")}
    except Exception as error:  # whatever a decoder may raise on bytes made to break it
        return {"error": type(error).__name__}


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
