"""Images of every awkward kind, the pixel budget, and what is refused."""

import base64
import contextlib
import http.server
import io
import os
import threading
import time
import zlib
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import images
from data.images import (
    BadImage,
    as_file,
    check_image,
    fit,
    fitted_size,
    loaded,
    locate,
    open_image,
    reference,
    size_of,
    to_rgb,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, format="PNG", **options) -> bytes:
    with io.BytesIO() as buffer:
        image.save(buffer, format=format, **options)
        return buffer.getvalue()


def first_pixel(content: bytes):
    image = open_image(reference(content))
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


# ---- what pixels become ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_and_known_from_the_header(format):
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is on the right: turn by 90 degrees clockwise
    content = encoded(picture, format, exif=exif, quality=95)
    assert size_of(reference(content)) == check_image(reference(content)) == (20, 40)
    for value in (content, Image.open(io.BytesIO(content))):  # an image object not loaded yet has it as well
        upright = open_image(reference(value))
        assert upright.size == (20, 40)
        red, _, blue = upright.getpixel((10, 2))
        assert red > 200 and blue < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_every_orientation_is_known_from_the_header(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert size_of(reference(content)) == open_image(reference(content)).size


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def test_a_png_on_its_side_is_sent_upright_wherever_it_says_so():
    picture, exif = Image.new("RGB", (40, 20), "blue"), Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf tiff:Orientation="6"/>'
    profile = b"Raw profile type exif\0\nexif\n%d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode()
    plain = encoded(picture)
    head, pixels, end = plain[:33], plain[33:-12], plain[-12:]
    for said in (chunk(b"eXIf", exif.tobytes()[6:]), chunk(b"iTXt", xmp), chunk(b"tEXt", profile)):
        for content in (head + said + pixels + end, head + pixels + said + end):
            sent, kind = as_file(reference(content))
            assert kind == "image/png"
            assert Image.open(io.BytesIO(sent)).size == open_image(reference(content)).size == (20, 40)
    exif[0x0112] = 1
    upright = head + pixels + chunk(b"eXIf", exif.tobytes()[6:]) + end
    assert Image.open(io.BytesIO(as_file(reference(upright))[0])).size == (40, 20)


def test_a_plain_image_is_sent_as_it_is_without_decoding_a_png(monkeypatch, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    tiny = encoded(noise.resize((7, 64)), "JPEG")
    assert as_file(reference(tiny)) == (tiny, "image/jpeg")
    for format in ("JPEG", "WEBP"):
        content = encoded(noise, format)
        assert as_file(reference(content)) == (content, f"image/{format.lower()}")
        with pytest.raises(BadImage, match="can't be read as an image"):
            as_file(reference(content[: len(content) // 2]))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("decoded"))
    content = encoded(noise)
    (tmp_path / "a.png").write_bytes(content)
    assert as_file(reference(tmp_path / "a.png")) == (content, "image/png")
    for broken in (content[: len(content) // 2], content.replace(content[-40:-20], bytes(20))):
        with pytest.raises(BadImage, match="can't be read as an image"):
            as_file(reference(broken))


def png_variants():
    """(PNG, whether it goes out as it is)"""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    plain = encoded(Image.fromarray(noise))
    head, rest = plain[:33], plain[33:]
    yield plain, True
    yield encoded(Image.fromarray(noise[..., 0])), True
    yield head + chunk(b"tEXt", b"Software\0none") + rest + b"behind the end", True
    yield head + chunk(b"tRNS", b"\0\1\0\2\0\3") + rest, False
    yield encoded(Image.fromarray(noise[..., 0] & 1).convert("P")), False
    yield encoded(Image.fromarray(noise[..., 0].astype(np.uint16))), False
    yield encoded(Image.fromarray(noise).convert("RGBA")), False


@pytest.mark.parametrize("variant", range(7))
def test_what_is_said_of_a_png_is_what_pillow_says_also_where_a_byte_is_wrong(variant):
    content, as_it_is = list(png_variants())[variant]
    assert (as_file(reference(content))[0] == content) is as_it_is
    broken = 0
    for place in range(len(content)):
        changed = content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :]
        for ref in (reference(changed), reference(content[:place])) if place else (reference(changed),):
            try:
                check_image(ref)
                expected = open_image(ref)
            except BadImage:
                broken += 1
                with pytest.raises(BadImage):
                    as_file(ref)
            else:
                assert np.array_equal(Image.open(io.BytesIO(as_file(ref)[0])).convert("RGB"), expected)
    assert broken > len(content)


@pytest.mark.parametrize(
    ("size", "data", "expected"),
    [
        ((8, 8), None, "can't be read as an image"),  # no pixels
        ((0, 0), b"", "can't be read as an image"),
        ((2, 1000), b"", "aspect ratio"),
        ((1 << 16, 1 << 16), b"", "expected at most"),
    ],
)
def test_a_whole_png_of_no_use_is_not_sent(size, data, expected):
    header = b"".join(side.to_bytes(4) for side in size) + b"\x08\0\0\0\0"  # 8 bits, grey
    pixels = b"" if data is None else chunk(b"IDAT", zlib.compress(data))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match=expected):
        as_file(reference(content))


def test_transparent_is_white_whatever_says_so():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([*RED, 0, 0, 0])
    assert first_pixel(encoded(clear)) == WHITE
    assert first_pixel(encoded(Image.new("LA", (8, 8), (0, 0)))) == WHITE
    assert first_pixel(encoded(palette)) == RED
    assert first_pixel(encoded(palette, transparency=0)) == WHITE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_image_in_memory_is_what_its_file_is(mode):
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    picture = (
        Image.fromarray(noise).convert(mode) if mode != "I;16" else Image.fromarray(noise[..., 0] * np.uint16(257))
    )
    exif = picture.getexif()
    exif[0x0112] = 6  # turned
    assert np.array_equal(loaded(picture), open_image(reference(picture)))
    assert loaded(picture).size == (6, 9)


@pytest.mark.parametrize(("mode", "size"), [("F", (8, 8)), ("RGB", (2, 1000))])
def test_an_image_in_memory_that_is_no_use(mode, size):
    with pytest.raises(BadImage, match="expected"):
        loaded(Image.new(mode, size))


def test_sixteen_bits_keep_their_upper_eight():
    ramp = np.array([[0, 128 << 8, 0xFFFF]], dtype=np.uint16).repeat(4, 0)
    pixels = np.asarray(open_image(reference(encoded(Image.fromarray(ramp)))))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_is_converted_and_an_animation_is_its_first_frame():
    red, _, blue = first_pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 200 and blue < 60
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    assert first_pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == RED


def test_pixels_without_a_range_are_refused():
    for image in (Image.new("F", (4, 4), 0.5), Image.fromarray(np.full((4, 4), 1 << 20, dtype=np.int32))):
        for look in (check_image, open_image):
            with pytest.raises(BadImage, match="expected 8 or 16 bits"):
                look(reference(encoded(image, "TIFF")))
        with pytest.raises(BadImage, match="expected 8 or 16 bits"):
            reference(image)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I", "HSV", "RGBX", "RGBa", "PA"],
)
def test_images_in_memory_keep_their_content(mode):
    """Any image object may be in a dataset: what comes back is what it looks like."""
    image = Image.new(mode, (5, 3))
    assert open_image(reference(image)).tobytes() == to_rgb(image).tobytes()


def test_a_broken_image_object_is_refused():
    content = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(BadImage, match="can't be used"):
        reference(Image.open(io.BytesIO(content[: len(content) // 2])))


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), st.integers(0, 400)
)
def test_broken_files_are_refused_and_nothing_else(noise, format, cut):
    content = encoded(Image.effect_noise((16, 16), 50).convert("RGB"), format)[:cut] + noise
    for look in (size_of, check_image, open_image):
        with contextlib.suppress(BadImage):
            look(reference(content or b"?"))


# ---- refused --------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, and whose pixels are not there."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])  # beyond our limit, Pillow's warning, Pillow's error
def test_decompression_bombs_are_refused_by_their_header(side):
    for look in (size_of, check_image, open_image):
        with pytest.raises(BadImage, match="pixels"):
            look(reference(png_of(side, side)))


def test_shapes_at_the_edge():
    assert size_of(reference(encoded(Image.new("RGB", (1, 1))))) == (1, 1)
    for format, size in (("PNG", (200, 1)), ("JPEG", (1, 1)), ("JPEG", (1, 200)), ("JPEG", (7, 9))):
        content = encoded(Image.new("RGB", size), format)
        assert size_of(reference(content)) == check_image(reference(content)) == size
        assert open_image(reference(content)).size == size
    with pytest.raises(BadImage, match="aspect ratio"):
        open_image(reference(encoded(Image.new("RGB", (201, 1)))))


def test_truncated_files_are_found_by_check(tmp_path):
    for format in ("PNG", "JPEG", "GIF"):
        content = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), format)
        assert check_image(reference(content)) == (64, 64)
        with pytest.raises(BadImage):
            check_image(reference(content[: len(content) // 2]))


def test_formats_that_run_programs_are_refused():
    with pytest.raises(BadImage, match="expected PNG"):
        open_image(reference(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"))


@pytest.fixture
def folders(tmp_path):
    """root/a.png, root/inside -> a.png, root/out.png -> ../secret.png, root/away -> .., secret.png"""
    root = tmp_path / "root"
    root.mkdir()
    for path in (root / "a.png", tmp_path / "secret.png"):
        path.write_bytes(encoded(Image.new("RGB", (2, 2))))
    (root / "inside.png").symlink_to("a.png")
    (root / "out.png").symlink_to("../secret.png")
    (root / "away").symlink_to("..")
    return root


@pytest.mark.parametrize(
    "path", ["../secret.png", "out.png", "away/secret.png", "file://{}/secret.png", "{}/root/../secret.png"]
)
def test_paths_outside_the_root_are_refused(folders, path):
    path = path.format(folders.parent)
    with pytest.raises(BadImage, match="outside the image root"):
        locate(path, str(folders), str(folders))
    assert os.path.samefile(locate(path, str(folders)), folders.parent / "secret.png")  # without a root it is yours


def test_paths_inside_the_root(folders):
    for path in ("a.png", "inside.png", f"file://{folders}/a.png", "away/root/a.png"):
        assert os.path.samefile(locate(path, str(folders), str(folders)), folders / "a.png")
    (folders / "with space%.png").write_bytes((folders / "a.png").read_bytes())
    assert locate(f"file://{folders}/with%20space%25.png", ".").endswith("with space%.png")
    assert locate(f"file://{folders}/with space%.png", ".").endswith("with space%.png")


def test_what_is_no_file_is_refused_unopened(folders):
    os.mkfifo(folders / "pipe.png")  # opening it would wait for ever
    for path, expected in (("pipe.png", "not a regular file"), (".", "not a regular file"), ("no.png", "no such file"),
                           ("a\0.png", "can't be opened"), ("x" * 300, "can't be opened")):  # fmt: skip
        with pytest.raises(BadImage, match=expected):
            locate(path, str(folders))


# ---- where images come from -----------------------------------------------------------------------------------------


def test_every_way_to_give_an_image(folders):
    content = (folders / "a.png").read_bytes()
    text = base64.b64encode(content).decode()
    given = ["a.png", folders / "a.png", content, text, f"data:image/png;base64,{text}", Image.new("RGB", (2, 2)),
             {"bytes": content, "path": None}, {"bytes": None, "path": "a.png"}]  # fmt: skip
    for value in given:
        assert open_image(reference(value, str(folders))).size == (2, 2)
    for value in (None, 7, "", {}, {"bytes": None, "path": None}):
        with pytest.raises(BadImage, match="expected a path, bytes, base64 or an image"):
            reference(value)
    with pytest.raises(BadImage, match="base64"):
        reference("data:image/png;base64,!!!")


@pytest.fixture
def server():
    """/image is one, /busy from the second time, /endless never stops, /slow sends a byte now and then, /redirect goes
    to a file:// URL."""

    class Address(str):
        asked: ClassVar[list] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            Address.asked.append(self.path)
            status = {"/redirect": 302, "/gone": 404}.get(self.path, 200)
            self.send_response(503 if Address.asked == ["/busy"] else status)
            if self.path == "/redirect":
                self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            if self.path == "/image" or Address.asked == ["/busy"] * 2:
                self.wfile.write(encoded(Image.new("RGB", (3, 3))))
            while self.path in ("/endless", "/slow"):
                try:
                    self.wfile.write(bytes(1 << 16 if self.path == "/endless" else 1))
                except OSError:
                    return
                time.sleep(0.02 if self.path == "/slow" else 0)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield Address(f"http://127.0.0.1:{running.server_port}")
        running.shutdown()


def test_remote_images_are_fetched_only_if_allowed_and_within_limits(server, monkeypatch):
    with pytest.raises(BadImage, match="--allow_remote_images"):
        reference(f"{server}/image")
    ref = reference(f"{server}/image", allow_remote=True)
    with pytest.raises(BadImage, match="--allow_remote_images"):
        open_image(ref)  # a reference that came from elsewhere
    assert open_image(ref, allow_remote=True).size == (3, 3)
    monkeypatch.setattr(images, "REMOTE_BYTES", 1 << 18)
    with pytest.raises(BadImage, match="expected at most 262,144 bytes"):
        open_image(reference(f"{server}/endless", allow_remote=True), allow_remote=True)
    monkeypatch.setattr(images, "REMOTE_BYTES", 1 << 40)
    monkeypatch.setattr(images, "REMOTE_SECONDS", 2)  # a read may take a quarter of it, on a busy machine too
    for path in ("endless", "slow"):
        start = time.monotonic()
        with pytest.raises(images.NotFetched, match="not there after"):
            open_image(reference(f"{server}/{path}", allow_remote=True), allow_remote=True)
        assert time.monotonic() - start < 5
    with pytest.raises(BadImage, match="can't be fetched"):
        open_image(reference(f"{server}/redirect", allow_remote=True), allow_remote=True)


def test_an_image_is_fetched_once_and_a_passing_failure_is_tried_again(server, monkeypatch):
    from data.images import NotFetched

    for _ in range(2):
        images._cache.clear()
        assert open_image(reference(f"{server}/busy", allow_remote=True), allow_remote=True).size == (3, 3)
    assert server.asked == ["/busy", "/busy"]  # refused, then there, then kept on the disk
    with pytest.raises(BadImage, match="404") as raised:
        open_image(reference(f"{server}/gone", allow_remote=True), allow_remote=True)
    assert not isinstance(raised.value, NotFetched)  # it stays so, on every machine
    with pytest.raises(NotFetched):
        open_image(reference("http://127.0.0.1:9/a.png", allow_remote=True), allow_remote=True)


def test_one_image_is_decoded_once_for_a_group(folders, monkeypatch):
    ref = reference("a.png", str(folders))
    assert open_image(ref) is open_image(dict(ref))
    monkeypatch.setattr(images, "CACHE_BYTES", 4)
    other = reference(encoded(Image.new("RGB", (9, 9))))
    open_image(other)
    assert len(images._cache) == 1  # the budget holds, and the newest stays


# ---- pixel budget ---------------------------------------------------------------------------------------------------


def test_the_narrower_budget_wins():
    ref = reference(
        {"path": None, "bytes": b"x", "max_pixels": 1000, "min_pixels": 100.0}, max_pixels=500, min_pixels=50
    )
    assert (ref["min_pixels"], ref["max_pixels"]) == (100, 500)
    with pytest.raises(BadImage, match="min_pixels up to max_pixels"):
        reference({"bytes": b"x", "min_pixels": 1000}, max_pixels=500)
    with pytest.raises(BadImage, match="max_pixels as a number"):
        reference({"bytes": b"x", "max_pixels": "many"})


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 10**6), st.integers(0, 10**6))
def test_elsewhere_the_shape_is_kept_within_the_budget(width, height, least, more):
    fitted = fitted_size(width, height, least, least + more)
    if width * height > least + more:
        assert fitted[0] * fitted[1] <= least + more or 1 in fitted
    elif width * height < least:
        assert fitted[0] * fitted[1] >= least
    else:
        assert fitted == (width, height)


@settings(max_examples=40, deadline=None)
@given(st.integers(15, 900), st.integers(15, 900), st.integers(4, 40), st.integers(0, 60))
def test_qwen_vl_utils_and_the_processor_give_the_same_grid(processor, width, height, least, more):
    """A budget applied by us before the processor, or set in the processor: the same patches."""
    if max(width, height) > 200 * min(width, height):
        return
    token = 28 * 28
    low, high = least * token, (least + more) * token
    image = Image.new("RGB", (width, height))
    theirs = processor.image_processor(image, size={"shortest_edge": low, "longest_edge": high})["image_grid_thw"]
    wide = {"shortest_edge": 1, "longest_edge": 10**9}
    ours = processor.image_processor(fit(image, low, high, factor=28), size=wide)["image_grid_thw"]
    assert ours.tolist() == theirs.tolist()
