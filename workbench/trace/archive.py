"""A trace as a zip file: made for a download, and opened with the care that a stranger's file needs.

Nothing of an upload is unpickled or run. Its files are written under names of our own into a temporary folder, which is gone
when the trace has been read; what does not look like a trace, or would not fit into memory, is one sentence.
"""

from __future__ import annotations

import io
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workbench.errors import UserError
from workbench.trace.schema import TABLES
from workbench.trace.soundness import checked
from workbench.trace.trace import Trace

_NAME = re.compile(rf"(?:([^/\\]+)/)?(meta\.json|recording\.safetensors|(?:{'|'.join(TABLES)})/part-\d{{6}}\.parquet)")
_FOLDER = re.compile(rf"(?:[^/\\]+/)?(?:(?:{'|'.join(TABLES)})/)?")
_CHUNK_BYTES = 2**20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that Python unpacks a bounded piece at a time; with bzip2 or LZMA one read of a megabyte may become gigabytes."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time every file in a zip is given, so that the same trace makes the same bytes."""


@dataclass(frozen=True)
class Limits:
    """The most an uploaded zip may hold."""

    zip_bytes: int = 200 * 2**20
    unzipped_bytes: int = 2**30
    files: int = 5000
    ratio: int = 100
    """Bytes unzipped over bytes zipped, in all. A trace's own files are compressed already, so its ratio is near 1."""
    values: int = 200_000_000
    """Values of all tables in memory: Parquet may say a billion equal ones in a few bytes."""
    text_bytes: int = 2**28


def zip_of(trace: Trace) -> bytes:
    """The trace's directory as a zip file."""
    out = io.BytesIO()
    with TemporaryDirectory() as temporary, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        directory = trace.save(Path(temporary) / "trace")
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(str(path.relative_to(directory)), _EPOCH), path.read_bytes())
    return out.getvalue()


def read_zip(data: bytes | IO[bytes], limits: Limits | None = None) -> Trace:
    """Opens the trace in a zip file that `zip_of` made, or that somebody made of a trace's folder.

    Raises UserError for what is no zip or no trace, is damaged, climbs out of its folder, holds links or other files, or is
    larger in any way than the limits.
    """
    limits = limits or Limits()
    with _extracted(io.BytesIO(data) if isinstance(data, bytes) else data, limits) as directory:
        _check_parts(directory, limits)
        return checked(Trace.load(directory))


@contextmanager
def _extracted(file: IO[bytes], limits: Limits) -> Iterator[Path]:
    """A temporary folder with the trace's files in it."""
    size = file.seek(0, io.SEEK_END)
    if size > limits.zip_bytes:
        raise UserError(f"The zip has {size:,} bytes and at most {limits.zip_bytes:,} are taken; open the folder by its path.")
    with TemporaryDirectory() as temporary:
        try:
            with zipfile.ZipFile(file) as archive:
                _extract(archive, Path(temporary), size, limits)
        except UserError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError, OSError):
            raise UserError("The file is no zip that can be read, or it is damaged or locked; zip the trace again.") from None
        yield Path(temporary)


def _extract(archive: zipfile.ZipFile, target: Path, size: int, limits: Limits) -> None:
    files = _files(archive, limits)
    left = min(limits.unzipped_bytes, limits.ratio * size)
    for name, info in files.items():
        if name == "recording.safetensors":
            continue  # tensors are no part of the trace
        path = target / name
        path.parent.mkdir(exist_ok=True)
        with archive.open(info) as source, path.open("wb") as sink:
            while chunk := source.read(_CHUNK_BYTES):  # what the zip says of sizes need not be true
                left -= len(chunk)
                if left < 0:
                    raise UserError(
                        f"The zip unpacks to more than {limits.unzipped_bytes:,} bytes or {limits.ratio} times its size, "
                        "as no trace does; zip the trace's folder itself."
                    )
                sink.write(chunk)


def _files(archive: zipfile.ZipFile, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    """What is in the zip, by the name in a trace's folder. Raises UserError for anything a trace does not have."""
    entries = archive.infolist()
    if len(entries) > limits.files:
        raise UserError(f"The zip holds {len(entries):,} files and a trace at most {limits.files:,}; zip one trace alone.")
    files: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for info in entries:
        if info.is_dir() and _FOLDER.fullmatch(info.filename) and not info.filename.startswith(".."):
            continue
        match = _NAME.fullmatch(info.filename)
        link = stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG)
        if match is None or match[1] in (".", "..") or match[2] in files or link:
            raise UserError(
                f"The zip holds {info.filename[:80]!r}, which no trace has; zip the trace's folder and nothing else."
            )
        if info.compress_type not in _METHODS:
            raise UserError(f"The zip packs {match[2]!r} in a way that is not taken; zip the trace's folder with deflate.")
        folders.add(match[1])
        files[match[2]] = info
    if "meta.json" not in files or len(folders) > 1:
        raise UserError("The zip holds no trace, or more than one: one meta.json is needed; zip one trace's folder.")
    return files


def _check_parts(directory: Path, limits: Limits) -> None:
    """Raises UserError if the tables would take more memory than the limits allow, before they are read."""
    values = text = 0
    for path in sorted(directory.glob("*/*.parquet")):
        try:
            about = pq.read_metadata(path)
            groups = [about.row_group(number) for number in range(about.num_row_groups)]
            values += sum(group.column(place).num_values for group in groups for place in range(group.num_columns))
            if values <= limits.values:
                text += _text_bytes(path)
        except (pa.ArrowException, OSError, KeyError):
            raise UserError(f"{path.parent.name}/{path.name} in the zip is damaged; zip the trace again.") from None
        if values > limits.values or text > limits.text_bytes:
            raise UserError(
                f"The tables in the zip hold more than {limits.values:,} values or {limits.text_bytes:,} bytes of text; "
                "open the folder by its path."
            )


def _text_bytes(path: Path) -> int:
    """Bytes of a part's text columns once read: read as dictionaries, so that a text that stands there often is held once."""
    wanted = [field.name for field in TABLES[path.parent.name] if pa.types.is_string(field.type)]
    names = [name for name in wanted if name in pq.read_schema(path).names]
    total = 0
    for column in pq.read_table(path, columns=names, read_dictionary=names).columns:
        for chunk in column.chunks:
            if pa.types.is_dictionary(chunk.type):
                lengths = pc.binary_length(chunk.dictionary)
                total += pc.sum(lengths.take(chunk.indices).cast(pa.int64())).as_py() or 0
    return total
