"""Picture files of every kind, each with the pixels it shows, worked out here with numpy and not by the decoder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

HEIGHT, WIDTH = 18, 24
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
DEEP[0, :6] = (0, 255, 256, 4660, 32768, 65535)
INDEX = RNG.integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)
PALETTE = np.array([[10, 20, 30], [200, 0, 100], [40, 250, 60], [0, 0, 0]], dtype=np.uint8)
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What is shown of stored pixels, by EXIF orientation (EXIF 2.32, 4.6.4)."""


def saved(picture: np.ndarray | Image.Image, format_: str, **more: Any) -> bytes:
    """A file, written by Pillow."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, format_, **more)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(colour: int, depth: int, rows: list[bytes], before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG WIDTH wide of packed rows; chunks before and after the pixels. colour: PNG's type."""
    header = struct.pack(">IIBBBBB", WIDTH, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def packed(values: np.ndarray, depth: int) -> list[bytes]:
    """Rows of (H, W[, C]) values in `depth` bits each, the first in the highest bits."""
    flat = values.reshape(len(values), -1)
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in flat]
    bits = (flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]


def grey(values: np.ndarray) -> np.ndarray:
    """(H, W) as (H, W, 3)."""
    return np.repeat(values[..., None], 3, axis=-1).astype(np.uint8)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) colours of an opacity (H, W) in 0..255 on white."""
    share = alpha[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def xmp(orientation: int) -> str:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'


def plain_pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def _turned() -> dict[str, tuple[bytes, np.ndarray]]:
    kinds = {}
    jpeg = saved(RGB, "JPEG", quality=95)
    for orientation, upright in UPRIGHT.items():
        data = exif(orientation)
        late = png(2, 8, packed(RGB, 8), after=chunk(b"eXIf", data.removeprefix(b"Exif\0\0")))
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp(orientation))
        kinds |= {
            f"JPEG, orientation {orientation}": (
                saved(RGB, "JPEG", quality=95, exif=data),
                upright(plain_pixels(jpeg)),
            ),
            f"PNG, orientation {orientation}": (saved(RGB, "PNG", exif=data), upright(RGB)),
            f"PNG, orientation {orientation} behind the pixels": (late, upright(RGB)),
            f"WebP, orientation {orientation}": (saved(RGB, "WEBP", lossless=True, exif=data), upright(RGB)),
            f"PNG, orientation {orientation} in XMP": (saved(RGB, "PNG", pnginfo=text), upright(RGB)),
        }
    sixteen = png(0, 16, packed(DEEP, 16), before=chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0")))
    kinds["16-bit grey, orientation 6"] = sixteen, UPRIGHT[6](grey(DEEP // 256))
    kinds["JPEG, orientation 9"] = saved(RGB, "JPEG", quality=95, exif=exif(9)), plain_pixels(jpeg)
    return kinds


def _grey() -> dict[str, tuple[bytes, np.ndarray]]:
    two, four, one = GREY // 64, GREY // 16, GREY // 128
    return {
        "8-bit grey": (saved(GREY, "PNG"), grey(GREY)),
        "grey JPEG": (saved(np.full_like(GREY, 77), "JPEG", quality=100), np.full_like(RGB, 77)),
        "grey with a clear level": (
            png(0, 8, packed(GREY, 8), trns(int(GREY[3, 3]))),
            on_white(grey(GREY), 255 * (GREY[3, 3] != GREY)),
        ),
        "16-bit grey": (png(0, 16, packed(DEEP, 16)), grey(DEEP // 256)),
        "16-bit grey with a clear level": (
            png(0, 16, packed(DEEP, 16), trns(4660)),
            on_white(grey(DEEP // 256), 255 * (DEEP != 4660)),
        ),
        "4-bit grey": (png(0, 4, packed(four, 4)), grey(four * 17)),
        "4-bit grey with a clear level": (
            png(0, 4, packed(four, 4), trns(3)),
            on_white(grey(four * 17), 255 * (four != 3)),
        ),
        "2-bit grey with a clear level": (
            png(0, 2, packed(two, 2), trns(1)),
            on_white(grey(two * 85), 255 * (two != 1)),
        ),
        "1-bit": (png(0, 1, packed(one, 1)), grey(one * 255)),
        "1-bit with a clear level": (png(0, 1, packed(one, 1), trns(0)), np.full_like(RGB, 255)),
        "grey and alpha": (
            png(4, 8, packed(np.stack([GREY, ALPHA], -1), 8)),
            on_white(grey(GREY), ALPHA),
        ),
        "16-bit grey and alpha": (
            png(4, 16, packed(np.stack([DEEP, DEEP[::-1]], -1), 16)),
            on_white(grey(DEEP // 256), DEEP[::-1] // 256),
        ),
    }


def _colour() -> dict[str, tuple[bytes, np.ndarray]]:
    rgba = np.dstack([RGB, ALPHA])
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)
    opacity = np.array([255, 0, 128, 255], dtype=np.uint8)
    plte = chunk(b"PLTE", PALETTE.tobytes())
    inks = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))  # red
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    clear = tuple(int(v) for v in RGB[2, 2])
    return {
        "RGB PNG": (saved(RGB, "PNG"), RGB),
        "RGB JPEG": (jpeg := saved(RGB, "JPEG", quality=95), plain_pixels(jpeg)),
        "RGB WebP": (saved(RGB, "WEBP", lossless=True), RGB),
        "interlaced RGB PNG with a profile": (saved(RGB, "PNG", icc_profile=profile), RGB),
        "RGB with a clear colour": (
            png(2, 8, packed(RGB, 8), trns(*clear)),
            on_white(RGB, 255 * (clear != RGB).any(-1)),
        ),
        "16-bit RGB": (png(2, 16, packed(deep, 16)), (deep // 256).astype(np.uint8)),
        "RGBA": (saved(rgba, "PNG"), on_white(RGB, ALPHA)),
        "RGBA WebP": (saved(rgba, "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA)),
        "16-bit RGBA": (
            png(6, 16, packed(np.dstack([deep, DEEP[::-1, ::-1]]), 16)),
            on_white(deep // 256, DEEP[::-1, ::-1] // 256),
        ),
        "palette": (png(3, 8, packed(INDEX, 8), plte), PALETTE[INDEX]),
        "2-bit palette with opacities": (
            png(3, 2, packed(INDEX, 2), plte + chunk(b"tRNS", opacity.tobytes())),
            on_white(PALETTE[INDEX], opacity[INDEX]),
        ),
        "palette with a clear colour": (
            png(3, 8, packed(INDEX, 8), plte + chunk(b"tRNS", b"\xff\x00")),
            on_white(PALETTE[INDEX], 255 * (INDEX != 1)),
        ),
        "CMYK JPEG": (saved(inks, "JPEG", quality=100), np.full_like(RGB, (255, 0, 0))),
        "animated WebP": (
            saved(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(RGB[::-1])]),
            RGB,
        ),
        "animated PNG": (saved(RGB, "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), RGB),
        "JPEG of two pictures (MPO)": (
            saved(RGB, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(RGB[::-1])]),
            plain_pixels(jpeg),
        ),
    }


def _published() -> dict[str, tuple[bytes, np.ndarray]]:
    indexed = Image.fromarray(INDEX).convert("L")
    indexed.putpalette(PALETTE.tobytes())
    turned = indexed.transpose(Image.Transpose.ROTATE_180)
    return {
        "BMP": (saved(RGB, "BMP"), RGB),
        "animated GIF": (saved(indexed, "GIF", save_all=True, append_images=[turned]), PALETTE[INDEX]),
        "GIF with a clear colour": (
            saved(indexed, "GIF", transparency=1),
            on_white(PALETTE[INDEX], 255 * (INDEX != 1)),
        ),
    }


KINDS = _turned() | _grey() | _colour()
"""What data and benchmarks may hold."""
PUBLISHED = _published()
"""What benchmarks alone may hold."""
SENT_AS_THEY_ARE = {
    "RGB PNG",
    "RGB JPEG",
    "RGB WebP",
    "interlaced RGB PNG with a profile",
    "8-bit grey",
    "grey JPEG",
    *(f"{kind}, orientation 1" for kind in ("JPEG", "PNG", "WebP")),
    "PNG, orientation 1 behind the pixels",
    "PNG, orientation 1 in XMP",
    "JPEG, orientation 9",
}


def bomb() -> bytes:
    """A PNG of a few bytes that promises 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def described() -> bytes:
    """A PNG with a text in which an orientation may stand: Pillow decodes it to find out."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp(6))
    return saved(RGB, "PNG", pnginfo=text)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


BROKEN = {
    "empty": (b"", "is not a readable image"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "is not a readable image"),
    "PNG cut short": (saved(RGB, "PNG")[:-300], "is not a whole image"),
    "JPEG cut short": (saved(RGB, "JPEG")[:-300], "is not a whole image"),
    "WebP cut short": (saved(RGB, "WEBP", lossless=True)[:-300], "is not"),
    "PNG with a changed byte": (flipped(saved(RGB, "PNG"), 700), "is not a whole image"),
    "PNG with a text, cut short": (described()[:-300], "is not a whole image"),
    "PNG with a text and a changed byte": (flipped(described(), 700), "is not a whole image"),
    "PNG without pixels": (png(2, 8, [], b"", b""), "is not"),
    "16-bit RGB with a clear colour": (
        png(2, 16, packed(np.repeat(DEEP[..., None], 3, -1), 16), trns(4660, 4660, 4660)),
        "save it with an alpha channel",
    ),
    "bomb": (bomb(), "more than 80000000 pixels"),
    "TIFF": (saved(RGB, "TIFF"), "is not a readable image"),
    "floats in a TIFF": (saved(RGB[..., 0].astype(np.float32), "TIFF"), "is not a readable image"),
}
