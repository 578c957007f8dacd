"""Decode images from untrusted files to RGB, or refuse them with the reason.

Every image of a run passes through `open_image`, so that the vision processor only ever sees an upright, opaque, fully
decoded RGB image of a sane size. The size is read from the header before anything is decoded, only common raster
formats are tried, and paths are followed only inside the folder the caller names. URLs are never fetched.
"""

import base64
import binascii
import io
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageOps

from mm_agrae.errors import DataError
from mm_agrae.types import ImageSource

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's other readers are rare in data sets, and one of them runs an external program."""
MAX_PIXELS = 64_000_000
"""8,000 × 8,000: far above what a vision tower gets to see, about 0.3 GB while decoding."""
MIN_SIDE = 8
"""Below this there is nothing to see; such images are placeholders."""
MAX_ASPECT = 200
"""Qwen's image processors refuse anything longer."""
SOURCES = ("bytes", "image", "image_url", "url", "path", "base64", "data")
"""Keys under which an image is found, in a part of a chat message or in a mapping that stands for an image."""
BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")
"""How PNG, JPEG, GIF, WebP, BMP and TIFF files begin in base64."""


def open_image(
    source: ImageSource | os.PathLike[str],
    *,
    origin: str = "",
    root: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    max_aspect: float = MAX_ASPECT,
) -> Image.Image:
    """Decode one image to RGB: upright by its EXIF tag, transparency on white, first frame.

    `source` is a path, the encoded bytes or a Pillow image. With `root`, a path must lie inside
    that folder. `max_pixels` (width × height), `min_side` (pixels) and `max_aspect` (longer side /
    shorter side) bound what is accepted.

    Raises DataError that names `origin` (the row) and the file.
    """
    name = _name(source)
    limits = (max_pixels, min_side, max_aspect)
    try:
        if isinstance(source, Image.Image):
            return _decode(source, name, *limits)
        if isinstance(source, bytes | bytearray | memoryview):
            file: Path | io.BytesIO = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            file = find_file(str(source), root)
        else:
            raise DataError(f"{name}: expected a path, bytes or a Pillow image")
        with Image.open(file, formats=FORMATS) as image:
            return _decode(image, name, *limits)
    except DataError as error:
        problem = str(error)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow itself refuses at 179 million pixels, without giving the size.
        count = re.search(r"\d+", str(error))
        size = f"{int(count[0]):,} pixels" if count else "its size"
        problem = f"{name}: {size} is {_too_large(max_pixels)}"
    except Image.UnidentifiedImageError:
        problem = f"{name}: not an image, or damaged at its start (formats: {', '.join(FORMATS)})"
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data.
        problem = f"{name}: damaged or truncated image ({error})"
    raise DataError(f"{origin}: {problem}" if origin else problem)


def decode_source(source: Any) -> str | bytes:
    """The encoded bytes or the path of an image that a row gives as either of these, as a data-URI, as base64, or as
    a mapping such as `{"bytes": …, "path": …}` or `{"url": …}`. Raises DataError for anything else."""
    given = source
    while isinstance(source, Mapping):
        source = next((source[key] for key in SOURCES if source.get(key)), None)
    if isinstance(source, bytes) and source:
        return source
    if not isinstance(source, str) or not source:
        raise DataError(f"image: expected a path or bytes, got {type(given).__name__} {printable(repr(given))}")
    head, _, data = source.partition(",")
    is_uri = re.fullmatch("data:.*;base64", head[:200], re.IGNORECASE) is not None
    if not is_uri and (len(source) <= 64 or not BASE64.fullmatch(source)):
        return source
    try:
        return base64.b64decode("".join((data if is_uri else source).split()), validate=True)
    except binascii.Error as error:
        raise DataError(f"image: damaged base64 of {len(source):,} characters ({error})") from None


def find_file(path: str, root: str | os.PathLike[str] | None = None) -> Path:
    """The resolved path of an existing image file.

    A relative path starts at `root`, and nothing outside `root` is accepted, whether by an
    absolute path, by `..` or by a link. A `file:` URL is a path once its %-escapes are undone.
    Raises DataError that names the path; for any other URL it says how to download the image.
    """
    where = _name(path)
    if re.match(r"(?!file://)[A-Za-z][A-Za-z0-9+.-]*://", path):
        # Without possible secrets: a password before the host, a signature after the ?.
        shown = re.sub(r"\?.*", "?…", re.sub(r"(?<=://)[^/?]*@", "", path, count=1), flags=re.S)
        raise DataError(
            f"{_name(shown)}: URLs are not fetched; download the image first, for instance with "
            f"`curl -fL --create-dirs -o images/NAME URL` in {root or Path.cwd()}, and put "
            "images/NAME in the URL's place"
        )
    try:
        found = Path(root or "", _without_scheme(path)).resolve()
        inside = root is None or found.is_relative_to(Path(root).resolve())
        if inside and found.is_file():
            return found
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a link loop
        raise DataError(f"{where}: not a usable path ({printable(str(error))})") from None
    if not inside:
        raise DataError(
            f"{where}: lies outside {root}; put the images there, or set image_root to the folder that holds them"
        )
    problem = "is not a file" if found.exists() else "no such file"
    raise DataError(f"{where}: {problem} (looked at {printable(str(found))})")


def _without_scheme(path: str) -> str:
    """file:///a%20b.png -> /a b.png; anything else as it is. Raises ValueError for another host."""
    if not path.startswith("file://"):
        return path
    host, slash, rest = path.removeprefix("file://").partition("/")
    if host not in ("", "localhost"):
        raise ValueError(f"file://{host} is on another machine; write file:/// and a path")
    return urllib.parse.unquote(slash + rest, errors="strict")


def printable(text: str, limit: int = 200) -> str:
    """`text` for an error message: shortened, and without what a terminal cannot encode."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def encode_png(image: Image.Image) -> bytes:
    """The image as PNG, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _decode(image: Image.Image, name: str, max_pixels: int, min_side: int, max_aspect: float) -> Image.Image:
    width, height = image.size
    size = f"{name}: {width:,}×{height:,} pixels"
    if width * height > max_pixels:
        raise DataError(f"{size} is {_too_large(max_pixels)}")
    if min(width, height) < min_side:
        raise DataError(f"{size} is too small; the shorter side must be {min_side} or more")
    if max(width, height) > max_aspect * min(width, height):
        raise DataError(f"{size} is too long and thin; at most {max_aspect:g} to 1")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip these at 255
        image = _to_8_bit(image)
    if image.has_transparency_data:
        layer = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
    rgb = image.convert("RGB")
    rgb.info = {}  # colour profiles and comments would be written into every stored copy
    return rgb


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Integer greys from 0..65535 (or their maximum, if higher), floats from their range."""
    low, high = cast("tuple[float, float]", image.getextrema())
    if image.mode != "F":
        image, low, high = image.convert("I"), 0, max(high, 65535)
    scale = 255 / (high - low) if high > low else 0.0
    grey = image.point(lambda value: value * scale - low * scale).convert("L")
    grey.info = {}  # a transparent 16-bit value means nothing in 8 bits
    return grey


def _too_large(max_pixels: int) -> str:
    return f"more than the {max_pixels:,} allowed (max_pixels); store a smaller version"


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return f"image {printable(str(source))}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"embedded image of {len(source):,} bytes"
    return f"image of type {type(source).__name__}"
