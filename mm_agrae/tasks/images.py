"""Pictures from outside, made into plain RGB; what cannot be used is refused with its reason.

Every picture of a run passes through `open_image`, so that the vision processor only ever sees
an upright, opaque, fully decoded RGB picture of a sane size. Files come from strangers: the size
is read from the header before anything is decoded, only common raster formats are tried, and
paths and URLs are followed only where the caller allows it.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import ipaddress
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import cast

from PIL import Image, ImageOps

from mm_agrae.errors import DataError
from mm_agrae.types import ImageSource

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's other readers are rare in data sets, and one of them runs an external program."""
MAX_PIXELS = 64_000_000
"""8,000 × 8,000: far above what a vision tower is shown, about 0.3 GB while decoding."""
MIN_SIDE = 8
"""Below this there is nothing to see; such pictures are placeholders."""
MAX_ASPECT = 200
"""Qwen's image processors refuse anything longer."""
MAX_URL_BYTES = 64 * 2**20
URL_SECONDS = 30.0


def open_image(
    source: ImageSource | os.PathLike[str],
    *,
    origin: str = "",
    root: str | os.PathLike[str] | None = None,
    allow_urls: bool = False,
    allow_private_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    max_aspect: float = MAX_ASPECT,
) -> Image.Image:
    """Decode one picture to RGB: upright by its EXIF tag, transparency on white, first frame.

    `source` is a path, the encoded bytes, a Pillow picture, or, with `allow_urls`, an http(s)
    URL (addresses of private networks only with `allow_private_urls`). With `root`, a path must
    lie inside that folder. `max_pixels` (width × height), `min_side` (pixels) and `max_aspect`
    (longer side / shorter side) bound what is accepted.

    Raises DataError that names `origin` (the row) and the file.
    """
    name = _name(source)
    limits = (max_pixels, min_side, max_aspect)
    try:
        if isinstance(source, Image.Image):
            return _decode(source, name, *limits)
        if isinstance(source, bytes | bytearray | memoryview):
            file: Path | io.BytesIO = io.BytesIO(source)
        elif is_url(source):
            if not allow_urls:
                raise DataError(f"{name}: URLs are not fetched; download the picture first")
            file = io.BytesIO(_fetch(str(source), name, allow_private_urls))
        elif isinstance(source, str | os.PathLike):
            file = find_file(str(source), root)
        else:
            raise DataError(f"{name}: expected a path, bytes or a Pillow picture")
        with Image.open(file, formats=FORMATS) as image:
            return _decode(image, name, *limits)
    except DataError as error:
        problem = str(error)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow itself refuses at 179 million pixels, before it tells anyone the size.
        count = re.search(r"\d+", str(error))
        size = f"{int(count[0]):,} pixels" if count else "its size"
        problem = f"{name}: {size} is {_too_large(max_pixels)}"
    except Image.UnidentifiedImageError:
        problem = f"{name}: not a picture, or damaged at its start (read: {', '.join(FORMATS)})"
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data.
        problem = f"{name}: damaged or truncated picture ({error})"
    raise DataError(f"{origin}: {problem}" if origin else problem)


def find_file(path: str, root: str | os.PathLike[str] | None = None) -> Path:
    """The resolved path of an existing picture file.

    A relative path starts at `root`, and nothing outside `root` is accepted, be it by an
    absolute path, by `..` or by a link. A `file:` URL is a path with its %20 and the like undone.
    Raises DataError that names the path.
    """
    where = f"image {printable(path)}"
    try:
        found = Path(root or "", _without_scheme(path)).resolve()
        inside = root is None or found.is_relative_to(Path(root).resolve())
        if inside and found.is_file():
            return found
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a link loop
        raise DataError(f"{where}: not a usable path ({printable(str(error))})") from None
    if not inside:
        raise DataError(
            f"{where}: lies outside {root}; put the pictures there, or set image_root to the "
            "folder that holds them"
        )
    problem = "is not a file" if found.exists() else "no such file"
    raise DataError(f"{where}: {problem} (looked at {printable(str(found))})")


def _without_scheme(path: str) -> str:
    """file:///a%20b.png -> /a b.png; anything else as it is. Raises ValueError for another host."""
    if not path.startswith("file://"):
        return path
    host, slash, rest = path.removeprefix("file://").partition("/")
    if host not in ("", "localhost"):
        raise ValueError(f"file://{host} is on another machine; file:/// is followed by a path")
    return urllib.parse.unquote(slash + rest, errors="strict")


def is_url(source: object) -> bool:
    """Whether `source` is text that starts like a URL (file:// counts as a path)."""
    return (
        isinstance(source, str)
        and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None
        and not source.startswith("file://")
    )


def without_secrets(url: str) -> str:
    """A URL without what may be a secret: a password before the host, a signature after the ?."""
    scheme, _, rest = url.partition("://")
    place, mark, _ = rest.partition("?")
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" + ("?…" if mark else "")


def printable(text: str, limit: int = 200) -> str:
    """`text` for an error message: never too long, never more than a terminal can encode."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def encode_png(image: Image.Image) -> bytes:
    """The picture as PNG, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def content_hash(image: Image.Image) -> str:
    """32 hexadecimal digits that are equal for equal pixels, to store a picture once."""
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def _decode(
    image: Image.Image, name: str, max_pixels: int, min_side: int, max_aspect: float
) -> Image.Image:
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
    if is_url(source):
        return f"image {printable(without_secrets(str(source)))}"
    if isinstance(source, str | os.PathLike):
        return f"image {printable(str(source))}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"embedded image of {len(source):,} bytes"
    return f"image of type {type(source).__name__}"


_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses whose last 32 bits are an IPv4 address, which a NAT64 gateway connects to."""


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, also the IPv4 address inside an IPv6 one."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found in _TRANSLATED:
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        else:
            found = found.ipv4_mapped or found.sixtofour or found
    return found.is_global and not found.is_multicast


class _PublicConnection(http.client.HTTPConnection):
    """Looks at the address really connected to, so that no name or redirect can hide it."""

    def connect(self) -> None:
        super().connect()
        address = self.sock.getpeername()[0].partition("%")[0]
        if not is_public(address):
            self.close()
            raise ConnectionRefusedError(f"{self.host} is in a private network ({address})")


class _PublicTlsConnection(http.client.HTTPSConnection, _PublicConnection):
    """The check stands before the TLS handshake, in the connect of the base class."""


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicConnection, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicTlsConnection, req)


def _fetch(url: str, name: str, allow_private: bool) -> bytes:
    # Built by hand: the default opener also follows file:, ftp: and the proxy of the environment.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler() if allow_private else _HttpHandler(),
        urllib.request.HTTPSHandler() if allow_private else _HttpsHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    end = time.monotonic() + URL_SECONDS
    data = bytearray()
    try:
        if "@" in urllib.parse.urlsplit(url).netloc:
            raise DataError(f"{name}: a URL with a password in it is not fetched")
        with opener.open(url, timeout=10) as response:
            while chunk := response.read1(2**16):
                data += chunk
                if len(data) > MAX_URL_BYTES or time.monotonic() > end:
                    raise DataError(
                        f"{name}: more than {MAX_URL_BYTES:,} bytes or {URL_SECONDS:g} seconds"
                    )
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{name}: cannot be fetched ({error})") from None
    return bytes(data)
