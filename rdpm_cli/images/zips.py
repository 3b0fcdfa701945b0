""".zip: of class folders, or EDM's with its `dataset.json`; read in place, never extracted."""

import bz2
import io
import itertools
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from rdpm_cli.errors import DataError
from rdpm_cli.images import decode
from rdpm_cli.images.arrange import HINT, arrange, check_member
from rdpm_cli.images.byteranges import LARGEST, ByteRanges
from rdpm_cli.images.interface import ImageSource

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
ENCRYPTED = 1


class ZipSource(ImageSource):
    """A .zip. Where each image lies is kept in arrays: zipfile's own objects take a gigabyte for ImageNet."""

    def __init__(self, path: Path) -> None:
        self.spec = str(path.resolve())
        try:
            with zipfile.ZipFile(path) as archive:
                self._list(archive)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error) as error:
            raise DataError(f"{path} cannot be read as a zip: {error}", HINT) from error
        self.file = ByteRanges([path])

    def _list(self, archive: zipfile.ZipFile) -> None:
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            check_member(member.filename, stat.S_ISLNK(member.external_attr >> 16), self.spec)
        listing = arrange([member.filename for member in members], self.spec, archive.read)
        self.names, self.labels, self.class_names = listing.names, listing.labels, listing.class_names
        if len(set(listing.names)) < len(listing.names):
            twice = next(name for name, after in itertools.pairwise(listing.names) if name == after)
            raise DataError(f"{self.spec} holds '{twice}' twice", "pack it again")
        chosen = [archive.getinfo(name) for name in listing.names]
        self.offsets = np.array([m.header_offset for m in chosen], dtype=np.int64)
        self.packed = np.array([m.compress_size for m in chosen], dtype=np.int64)
        self.sizes = np.array([m.file_size for m in chosen], dtype=np.int64)
        self.checksums = np.array([m.CRC for m in chosen], dtype=np.uint32)
        self.methods = np.array([m.compress_type for m in chosen], dtype=np.uint16)
        self.encrypted = np.array([m.flag_bits & ENCRYPTED for m in chosen], dtype=np.uint8)

    def open(self, index: int) -> Image.Image:
        return decode.open_image(io.BytesIO(self._read(index)))

    def _read(self, index: int) -> bytes:
        """The member's bytes. Raises OSError, or what its packing raises, where it is damaged."""
        if self.encrypted[index]:
            raise OSError("it is encrypted")
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        signature, name, extra = LOCAL_HEADER.unpack(self.file.read(0, offset, LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise OSError("it has no header in the zip")
        packed = self.file.read(0, offset + LOCAL_HEADER.size + name + extra, int(self.packed[index]))
        data = _unpack(packed, int(self.methods[index]), size)
        if len(data) != size or zlib.crc32(data) != self.checksums[index]:
            raise OSError("its checksum in the zip is another")
        return data


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Never more than `size` + 1 bytes, whatever the member claims."""
    if size > LARGEST:
        raise OSError(f"{size:,} bytes are more than an image may have")
    if method == zipfile.ZIP_STORED:
        return packed
    if method == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    if method == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    raise OSError(f"it is packed by method {method}; stored, deflated and bzip2 are read")
