import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_agrae.errors import DataError
from mm_agrae.tasks.images import encode_png, find_file, open_image, printable

ROW = "train.jsonl, line 7"


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(size=(64, 48), mode="RGB"):
    generator = random.Random(0)
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, generator.randbytes(size[0] * size[1] * bands))


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "image.png"
    noise().save(path)
    return path


# What is accepted, and what it becomes


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_path_bytes_and_image_give_the_same_pixels(tmp_path, form):
    options = {"lossless": True} if form == "WEBP" else {}
    path = tmp_path / f"x.{form.lower()}"
    noise().save(path, form, **options)
    want = noise().tobytes()
    for source in (str(path), path, path.as_uri(), path.read_bytes(), Image.open(path)):
        image = open_image(source)
        assert image.mode == "RGB"
        assert image.tobytes() == want


def test_jpeg_is_read():
    image = open_image(encoded(Image.new("RGB", (20, 20), (200, 30, 30)), "JPEG", quality=95))
    assert all(abs(a - b) < 6 for a, b in zip(image.getpixel((9, 9)), (200, 30, 30), strict=True))


@pytest.mark.parametrize(
    ("mode", "colour", "want"),
    [
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (40, 255), (40, 40, 40)),
        ("La", (0, 0), (255, 255, 255)),
        ("PA", (0, 0), (255, 255, 255)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("I;16", 200, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, colour, want):
    assert open_image(Image.new(mode, (12, 12), colour)).getpixel((5, 5)) == want


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_transparent_palette_entry_is_white(transparency):
    image = Image.new("P", (12, 12), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    source = encoded(image, transparency=transparency)
    assert Image.open(io.BytesIO(source)).mode == "P"
    result = open_image(source)
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((5, 5)) == (0, 0, 255)


def test_opaque_palette_keeps_its_colours():
    image = noise().quantize(16)
    assert open_image(encoded(image)).tobytes() == image.convert("RGB").tobytes()


def test_transparent_colour_of_an_rgb_png_is_white():
    image = Image.new("RGB", (12, 12), (9, 9, 9))
    image.putpixel((0, 0), (1, 2, 3))
    result = open_image(encoded(image, transparency=(1, 2, 3)))
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((5, 5)) == (9, 9, 9)


def test_16_bit_png_is_scaled_and_not_clipped():
    image = Image.new("I;16", (16, 9))
    for x in range(16):
        image.putpixel((x, 0), x * 4369)
    row = [open_image(encoded(image)).getpixel((x, 0))[0] for x in range(16)]
    assert row == pytest.approx([x * 17 for x in range(16)], abs=1)


def test_float_tiff_spans_its_own_range():
    image = Image.new("F", (12, 12), -2.0)
    image.putpixel((0, 0), 6.0)
    image.putpixel((1, 0), 2.0)
    result = open_image(encoded(image, "TIFF"))
    assert [result.getpixel((x, 0))[0] for x in range(3)] == pytest.approx([255, 127, 0], abs=1)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 40, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    result = open_image(encoded(image, "JPEG", exif=exif))
    assert result.size == (20, 40)
    assert result.getpixel((18, 20))[0] < 60
    assert result.getpixel((2, 20))[0] > 200


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    source = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(source).getpixel((10, 10)) == (255, 0, 0)


def test_result_is_independent_of_the_source_image():
    source = noise()
    open_image(source).paste("black", (0, 0, 64, 48))
    assert source.tobytes() == noise().tobytes()


# What is refused


def refused(source, *words, origin=ROW, **options):
    with pytest.raises(DataError) as caught:
        open_image(source, origin=origin, **options)
    message = str(caught.value)
    assert message.startswith(f"{origin}: ")
    for word in words:
        assert word in message
    return message


def test_missing_file(tmp_path):
    refused(str(tmp_path / "gone.png"), "gone.png", "no such file")


def test_folder_instead_of_a_file(tmp_path):
    refused(str(tmp_path), "is not a file")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_truncated_file(tmp_path, form, part):
    data = encoded(noise((200, 160)), form)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: int(len(data) * part)])
    refused(str(path), "cut.bin")


def test_corrupt_middle_of_a_png(tmp_path):
    data = bytearray(encoded(noise((200, 160))))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "corrupt.png"
    path.write_bytes(data)
    refused(str(path), "corrupt.png", "damaged")


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"<html>404</html>", b"%!PS-Adobe-3.0"])
def test_not_an_image(tmp_path, data):
    path = tmp_path / "page.png"
    path.write_bytes(data)
    refused(str(path), "page.png", "not an image")
    refused(data, f"embedded image of {len(data)} bytes", "not an image")


def test_postscript_is_never_run(tmp_path):
    path = tmp_path / "x.eps"
    noise().save(path, "EPS")
    refused(str(path), "x.eps", "not an image")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 9_000), (9_000, 8_000)])
def test_decompression_bomb_is_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    Image.new("1", size).save(path)
    assert path.stat().st_size < 100_000
    message = refused(str(path), "bomb.png", "64,000,000")
    assert f"{size[0]:,}×{size[1]:,}" in message or f"{size[0] * size[1]:,} pixels" in message


def test_pixel_limit_is_a_parameter(image_file):
    assert open_image(image_file, max_pixels=64 * 48).size == (64, 48)
    refused(image_file, "64×48", "3,071", max_pixels=64 * 48 - 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (7, 50)])
def test_tiny_image(size):
    refused(encoded(Image.new("RGB", size)), f"{size[0]}×{size[1]}", "too small")
    refused(Image.new("RGB", size), "too small")


def test_small_image_is_accepted():
    assert open_image(Image.new("RGB", (8, 8))).size == (8, 8)
    assert open_image(Image.new("RGB", (1, 1)), min_side=1).size == (1, 1)


def test_aspect_ratio_limit():
    assert open_image(Image.new("RGB", (1600, 8))).size == (1600, 8)
    refused(Image.new("RGB", (8, 1601)), "8×1,601", "200 to 1")


@pytest.mark.parametrize("source", [None, 3, ["x.png"], {"path": "x.png"}])
def test_unknown_kind_of_source(source):
    refused(source, "expected a path")


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000, "\udc80.png", ""])
def test_strange_paths_give_printable_messages(path):
    message = refused(path)
    assert len(message) < 1000
    message.encode()


def test_paths_may_not_leave_the_root(tmp_path, image_file):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    noise().save(root / "sub" / "in.png")
    (root / "link.png").symlink_to(image_file)
    (root / "sub" / "loop.png").symlink_to(root / "sub" / "loop.png")
    assert open_image("sub/in.png", root=root).size == (64, 48)
    assert open_image("sub/../sub/in.png", root=root).size == (64, 48)
    assert open_image(str(root / "sub" / "in.png"), root=root).size == (64, 48)
    for path in ("../image.png", str(image_file), "link.png", "sub/../../image.png", "/etc/passwd"):
        refused(path, "outside", root=root)
    refused("sub/loop.png", "loop.png", root=root)
    (tmp_path / "root2").symlink_to(root)
    assert find_file("sub/in.png", tmp_path / "root2") == root / "sub" / "in.png"


def test_file_urls(tmp_path):
    root = tmp_path / "with space"
    root.mkdir()
    noise().save(root / "a b%.png")
    (root / "out.png").symlink_to("/etc/passwd")
    url = (root / "a b%.png").as_uri()
    assert "%20" in url
    assert "%25" in url
    for form in (url, url.replace("file://", "file://localhost"), "a b%.png"):
        assert open_image(form, root=root).size == (64, 48)
    refused("a%20b%25.png", "no such file", root=root)  # a plain path is taken as it is
    up = f"{root.as_uri()}/%2e%2e/{tmp_path.name}"
    for form in (up, "file:///etc/passwd", "file:///%65tc/passwd", f"{root.as_uri()}/out.png"):
        refused(form, "outside", root=root)
    refused("file://elsewhere/a.png", "another machine", root=root)
    refused("file:///a%00.png", "not a usable path", root=root)
    refused("file:///a%ff.png", "not a usable path", root=root)
    refused("FILE:///etc/passwd", "not fetched", root=root)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_but_our_error(data):
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    damaged = bytearray(encoded(noise((16, 16)), form))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        image = open_image(damaged, origin=ROW, max_pixels=10_000)
    except DataError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize("url", ["http://example.org/x.png", "HTTPS://example.org/x.png", "ftp://example.org/x.png"])
def test_urls_are_not_fetched_and_the_message_says_what_to_do(tmp_path, url):
    words = ("x.png: URLs are not fetched; download the image first", f"in {tmp_path}, and put")
    refused(url, *words, root=tmp_path)


def test_messages_hold_no_passwords():
    url = "https://user:hunter2@example.invalid/a.png?signature=hunter2"
    assert "hunter2" not in refused(url, "https://example.invalid/a.png?…", "not fetched")


# Storing


def test_png_is_lossless():
    assert open_image(encode_png(noise())).tobytes() == noise().tobytes()


def test_metadata_is_not_stored(image_file):
    image = noise()
    image.info["icc_profile"] = b"profile"
    assert b"iCCP" in encoded(image)
    assert b"iCCP" not in encode_png(open_image(encoded(image)))


def test_printable():
    assert printable("short") == "short"
    assert len(printable("x" * 1000)) == 201
