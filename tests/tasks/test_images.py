import http.server
import io
import random
import threading

import pytest
from helpers import VL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_agrae.config import parse
from mm_agrae.errors import ConfigError, DataError
from mm_agrae.tasks import images
from mm_agrae.tasks.images import (
    content_hash,
    encode_png,
    find_file,
    is_public,
    open_image,
    printable,
)
from mm_agrae.types import Example
from mm_agrae.view.sample import contact_sheet, sample_html, write_samples

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
def picture(tmp_path):
    path = tmp_path / "picture.png"
    noise().save(path)
    return path


# What is accepted, and what it becomes


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_path_bytes_and_picture_give_the_same_pixels(tmp_path, form):
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


def test_result_is_independent_of_the_source_picture():
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


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"<html>404</html>", b"%!PS-Adobe-3.0"]
)
def test_not_a_picture(tmp_path, data):
    path = tmp_path / "page.png"
    path.write_bytes(data)
    refused(str(path), "page.png", "not a picture")
    refused(data, f"embedded image of {len(data)} bytes", "not a picture")


def test_postscript_is_never_run(tmp_path):
    path = tmp_path / "x.eps"
    noise().save(path, "EPS")
    refused(str(path), "x.eps", "not a picture")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 9_000), (9_000, 8_000)])
def test_decompression_bomb_is_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    Image.new("1", size).save(path)
    assert path.stat().st_size < 100_000
    message = refused(str(path), "bomb.png", "64,000,000")
    assert f"{size[0]:,}×{size[1]:,}" in message or f"{size[0] * size[1]:,} pixels" in message


def test_pixel_limit_is_a_parameter(picture):
    assert open_image(picture, max_pixels=64 * 48).size == (64, 48)
    refused(picture, "64×48", "3,071", max_pixels=64 * 48 - 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (7, 50)])
def test_tiny_picture(size):
    refused(encoded(Image.new("RGB", size)), f"{size[0]}×{size[1]}", "too small")
    refused(Image.new("RGB", size), "too small")


def test_small_picture_is_accepted():
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


def test_paths_may_not_leave_the_root(tmp_path, picture):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    noise().save(root / "sub" / "in.png")
    (root / "link.png").symlink_to(picture)
    (root / "sub" / "loop.png").symlink_to(root / "sub" / "loop.png")
    assert open_image("sub/in.png", root=root).size == (64, 48)
    assert open_image("sub/../sub/in.png", root=root).size == (64, 48)
    assert open_image(str(root / "sub" / "in.png"), root=root).size == (64, 48)
    for path in (
        "../picture.png",
        str(picture),
        "link.png",
        "sub/../../picture.png",
        "/etc/passwd",
    ):
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


# URLs


@pytest.fixture
def server():
    png = encoded(noise())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "/x.png")
                self.end_headers()
            elif self.path == "/file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
            elif self.path == "/x.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(png)
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls(server):
    refused(f"{server}/x.png", "not fetched")
    refused(f"{server}/x.png", "private network (127.0.0.1)", allow_urls=True)
    port = server.rpartition(":")[2]
    refused(f"http://localhost:{port}/x.png", "private network", allow_urls=True)
    refused(f"https://localhost:{port}/x.png", "private network", allow_urls=True)
    options = {"allow_urls": True, "allow_private_urls": True}
    assert open_image(f"{server}/x.png", **options).tobytes() == noise().tobytes()
    assert open_image(f"{server}/redirect", **options).tobytes() == noise().tobytes()
    refused(f"{server}/file", "cannot be fetched", **options)
    refused(f"{server}/gone.png", "404", **options)
    refused("ftp://localhost/x.png", "cannot be fetched", **options)
    refused("http://[bad", "cannot be fetched", **options)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("2002:808:808::1", True),
        *((address, False) for address in (
            "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254",
            "100.64.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fd00::1",
            "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1", "2001:db8::1",
        )),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) == public


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]"])
def test_other_spellings_of_a_private_address(server, host):
    refused(f"http://{host}:{server.rpartition(':')[2]}/x.png", "fetched", allow_urls=True)


def test_every_hop_of_a_redirect_is_looked_at(server, monkeypatch):
    """The first address counts as public here; where it sends on to does not."""
    monkeypatch.setattr(images, "is_public", lambda address, answers=[True, False]: answers.pop(0))
    refused(f"{server}/redirect", "private network (127.0.0.1)", allow_urls=True)


def test_messages_hold_no_passwords():
    url = "https://user:hunter2@example.invalid/a.png?signature=hunter2"
    assert "https://example.invalid/a.png?…" in refused(url, "not fetched")
    message = refused(url, "a URL with a password in it", allow_urls=True)
    assert "hunter2" not in message
    assert "hunter2" not in refused(url.replace("user:hunter2@", ""), allow_urls=True)


# Storing and showing


def test_png_and_hash():
    image = open_image(noise())
    again = open_image(encode_png(image))
    assert again.tobytes() == image.tobytes()
    assert content_hash(again) == content_hash(image)
    other = image.copy()
    other.putpixel((3, 3), (0, 0, 0))
    assert content_hash(other) != content_hash(image)
    flat = Image.new("RGB", (8, 16))
    assert content_hash(flat) != content_hash(flat.rotate(90, expand=True))


def test_metadata_is_not_stored(picture):
    image = noise()
    image.info["icc_profile"] = b"profile"
    assert b"iCCP" in encoded(image)
    assert b"iCCP" not in encode_png(open_image(encoded(image)))


def test_printable():
    assert printable("short") == "short"
    assert len(printable("x" * 1000)) == 201


def examples():
    red, blue = Image.new("RGB", (300, 200), "red"), Image.new("RGB", (10, 400), "blue")
    return [
        Example("1", "What colour?", "red", (red,)),
        Example("2", "Compare <image> and <image>. " + "word " * 2000, "x" * 9000, (red, blue)),
        Example("3", "<script>alert('∠')</script>\n\n" + "y" * 100_000, '<b>4</b> & "5"'),
    ]


def test_contact_sheet_shows_every_picture():
    sheet = contact_sheet(examples(), columns=2)
    assert sheet.mode == "RGB"
    colours = [
        {colour for _, colour in half.getcolors(maxcolors=10**6)}
        for half in (sheet.crop((0, 0, 320, 240)), sheet.crop((320, 0, 640, 240)))
    ]
    assert (255, 0, 0) in colours[0]
    assert (0, 0, 255) not in colours[0]
    assert {(255, 0, 0), (0, 0, 255)} <= colours[1]
    assert sheet.width == 640
    assert sheet.height < 1200  # long captions are cut
    one = contact_sheet(examples()[:1])
    assert one.width == 320
    caption = one.crop((0, 252, 320, one.height))
    assert min(value for _, value in caption.convert("L").getcolors()) < 60


def test_page_escapes_everything_and_holds_the_pictures():
    page = sample_html(examples())
    assert page.count("data:image/png;base64,") == 3
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;4&lt;/b&gt; &amp; &quot;5&quot;" in page


def test_sample_names_the_row_of_a_bad_picture():
    bad = Example("1", "?", "2", ("gone.png",), origin=ROW)
    for show in (lambda: contact_sheet([bad]), lambda: sample_html([bad])):
        with pytest.raises(DataError, match=r"line 7: image gone\.png"):
            show()


def sample_config(**sections):
    source = {"task": "synthetic", "split": "train"}
    values = {"run_dir": "unused", "model": {"path": VL}, "train": {"steps": 1}}
    return parse({**values, "data": {"train": [source]}, **sections})


def test_write_samples_as_page_and_sheet(tmp_path):
    options = {"split": "train", "count": 3, "completions": 0}
    out = write_samples(sample_config(), out=tmp_path / "x.html", **options)
    page = out.read_text(encoding="utf-8")
    assert page.count("<article") == page.count("data:image/png;base64,") == 3
    sheet = Image.open(write_samples(sample_config(), out=tmp_path / "x.png", **options))
    assert sheet.width == 3 * 320
    for name, change, words in (
        ("x.png", {"completions": 1}, "use .html"),
        ("x.html", {"split": "evaluate"}, "data.evaluate names no data"),
        ("gone/x.html", {}, "cannot write"),
    ):
        with pytest.raises(ConfigError, match=words):
            write_samples(sample_config(), out=tmp_path / name, **(options | change))


def test_write_samples_with_graded_completions(tmp_path):
    config = sample_config(evaluate={"max_new_tokens": 8})
    out = write_samples(config, split="train", count=2, completions=3, out=tmp_path / "x.html")
    page = out.read_text(encoding="utf-8")
    assert page.count("<article") == 2
    assert page.count('class="verdict') == page.count("<pre>") == 6
