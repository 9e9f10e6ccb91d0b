"""The one decoder: what a picture file shows, as 8-bit RGB, for everything that looks at its pixels or its size.

Training, evaluation in this process and through a server, validation, synthesis and the report all decode here, so that
a picture has the same size and the same pixels everywhere: turned upright as its EXIF says, 16-bit grey brought to 8
bits, transparency on white, palettes and CMYK converted, the first frame of an animation. Colour profiles are not
applied.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from vopd.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 80_000_000
MAX_BYTES = 128 * 2**20
BACKGROUND = (255, 255, 255)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by EXIF orientation; from 5 on width and height change places."""
SIDEWAYS = (5, 6, 7, 8)
_SCALES = {"L;2": 85, "L;4": 17}  # of 2- and 4-bit grey levels, which Pillow applies to pixels alone
# What Pillow's plugins raise for broken files.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)

# MAX_PIXELS is below Pillow's own limit, which would add lines to the one sentence.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class PictureError(UserError):
    """A picture that cannot be shown. The message is what a sentence says of it: "is not a whole image ..."."""


class ImageTooLargeError(PictureError):
    """More pixels or bytes than are allowed: a decompression bomb, or a mistake."""


class Picture:
    """A picture file, its header read. `size` is width and height in pixels as shown; `plain`: any reader decodes the
    file itself to the same pixels (8-bit grey or RGB, opaque, upright, a single frame). A context manager."""

    def __init__(self, stream: BinaryIO, formats: tuple[str, ...]) -> None:
        self._stream = stream
        try:
            self._file = Image.open(stream, formats=formats)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageTooLargeError(f"has more than {MAX_PIXELS} pixels; shrink the image.") from error
        except _BROKEN as error:
            raise PictureError(f"is not a readable image ({', '.join(formats)}).") from error
        file = self._file
        if file.width * file.height > MAX_PIXELS:
            raise ImageTooLargeError(
                f"has {file.width} x {file.height} pixels, more than {MAX_PIXELS}; shrink the image."
            )
        self.format = str(file.format)
        self._raw = file.tile[0].args if file.tile else None
        simple = file.mode in ("RGB", "L") and not file.has_transparency_data
        simple = simple and self.format in FORMATS and getattr(file, "n_frames", 1) == 1
        simple = simple and (self.format != "PNG" or self._raw == file.mode)
        orientation, understood = self._orientation()
        self._turn = TURNS.get(orientation)
        self.plain = simple and understood and self._turn is None
        self.size = (file.height, file.width) if orientation in SIDEWAYS else file.size

    def __enter__(self) -> Picture:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._stream.close()

    def _orientation(self) -> tuple[Any, bool]:
        """EXIF (or XMP) orientation, 1 for none; and whether that data, if there is any, could be read."""
        if self.format == "PNG":
            if not _has_metadata(self._stream):
                return 1, True
            if (
                "exif" not in self._file.info
            ):  # `getexif` would load as well, and a second try of Pillow's hides errors
                self._load()
        try:
            return self._file.getexif().get(ExifTags.Base.Orientation, 1), True
        except _BROKEN:
            return 1, False

    def _load(self) -> None:
        try:
            self._file.load()
        except _BROKEN as error:
            raise _not_whole(error) from error

    def verify(self) -> None:
        """Check what can be checked without decoding pixels, such as checksums; the pixels cannot be had afterwards.

        Raises:
            PictureError: the file is broken.
        """
        try:
            if self._file.tile:  # else decoded already
                self._file.verify()
        except _BROKEN as error:
            raise _not_whole(error) from error

    def rgb(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The pixels, mode RGB, nothing but pixels attached.

        at_least: a width and height that suffice; a large JPEG is then decoded at a fraction of its size (faster).

        Raises:
            PictureError: the file is cut short or broken.
        """
        if at_least:
            self._file.draft(None, at_least)
        self._load()
        try:
            shown = _opaque(self._file, self._raw)
        except _BROKEN as error:  # a palette or a transparency of a wrong length
            raise _not_whole(error) from error
        if self._turn is not None:
            shown = shown.transpose(self._turn)
        shown.info = {}  # an orientation or transparency left here would be applied again
        return shown


def read(file: Path) -> bytes:
    """A picture file's content; PictureError if it is not readable, ImageTooLargeError beyond MAX_BYTES."""
    with _file(file) as stream:
        return stream.read(MAX_BYTES)


@dataclass(frozen=True)
class Portable:
    """A file that any reader decodes to the pixels of `shown`. media: its type, such as "image/png"."""

    media: str
    content: bytes
    shown: Image.Image


def open_picture(source: bytes | Path, formats: tuple[str, ...] = FORMATS) -> Picture:
    """Read the header of a picture file or of its content.

    Raises:
        PictureError: it cannot be read, or is not one of `formats` (names as Pillow has them).
        ImageTooLargeError: more than MAX_PIXELS pixels or MAX_BYTES bytes.
    """
    stream = _content(source) if isinstance(source, bytes) else _file(source)
    try:
        return Picture(stream, formats)
    except PictureError:
        stream.close()
        raise


def decode(source: bytes | Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The picture as shown, mode RGB; errors as `open_picture` and `Picture.rgb`."""
    with open_picture(source, formats) as picture:
        return picture.rgb()


def portable(content: bytes, formats: tuple[str, ...] = FORMATS) -> Portable:
    """The picture for readers that decode in their own way: the file if it is plain, else a PNG of what it shows.

    Errors as `decode`: a file that is not whole is found here, not by its reader.
    """
    with open_picture(content, formats) as picture:
        shown = picture.rgb()
        if picture.plain:
            return Portable(f"image/{picture.format.lower()}", content, shown)
        return Portable("image/png", png(shown), shown)


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _not_whole(error: Exception) -> PictureError:
    return PictureError(f"is not a whole image ({error}); replace it or leave the row out.")


def _content(content: bytes) -> BinaryIO:
    if len(content) > MAX_BYTES:
        raise ImageTooLargeError(f"has {len(content)} bytes, more than {MAX_BYTES}; shrink the image.")
    return io.BytesIO(content)


def _file(file: Path) -> BinaryIO:
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ImageTooLargeError(f"has {size} bytes, more than {MAX_BYTES}; shrink the image: {file}.")
        if not file.is_file():  # reading a pipe or device might never end
            raise PictureError(f"is not a file: {file}.")
        return file.open("rb")
    except OSError as error:
        raise PictureError(f"is not a readable file ({error.strerror}): {file}.") from error


def _has_metadata(stream: BinaryIO) -> bool:
    """Whether a PNG has a chunk in which Pillow looks for an orientation.

    It may follow the pixels, where Pillow comes across it by decoding them only; a size should not cost that.
    """
    before = stream.tell()
    stream.seek(8)
    try:
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            start = stream.read(min(length, 17)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if kind == b"eXIf" or start in (b"XML:com.adobe.xmp", b"Raw profile type "):
                return True
            stream.seek(length - len(start) + 4, io.SEEK_CUR)
        return False
    finally:
        stream.seek(before)


def _opaque(file: Image.Image, raw: Any) -> Image.Image:
    """A loaded file's pixels as RGB on BACKGROUND. raw: how they are stored, by Pillow's name."""
    clear = file.info.get("transparency")
    if file.mode.startswith("I;16"):  # Pillow would clip
        deep_HW = np.asarray(file)
        shown = Image.fromarray((deep_HW >> 8).astype(np.uint8)).convert("RGB")
        if clear is not None:
            shown.paste(BACKGROUND, mask=Image.fromarray(deep_HW == clear))
        return shown
    if clear is not None and raw == "RGB;16B":  # Pillow keeps 8 bits of the pixels and 16 of this
        raise PictureError("names a transparent colour of 16 bits a channel; save it with an alpha channel.")
    if clear is not None and raw in _SCALES:
        file.info["transparency"] = clear * _SCALES[raw]
    if not file.has_transparency_data:
        return file.convert("RGB")
    layer = file.convert("RGBA")
    shown = Image.new("RGB", layer.size, BACKGROUND)
    shown.paste(layer, mask=layer.getchannel("A"))
    return shown
