"""Files behind URLs, through fsspec: listing, reading by byte ranges, retries, errors that say what is wrong.

Stores fail in three ways, and each means something else for a run:

- *gone* (404, no such bucket): as for a local file; FileNotFoundError, which a reader turns into a reject;
- *refused* (401, 403, no credentials, a package that is not installed): the user's to mend; ConfigError;
- *unreachable* (refused connections, timeouts, 429, 5xx): tried again, then UnreachableError. It never becomes a
  reject: an outage is no property of the data, and a stream with holes could not be made again.

How to reach a store (endpoint, key, anonymous access) is fsspec's own configuration: the environment (`FSSPEC_S3_…`)
and the files in `~/.config/fsspec`.
"""

import errno
import glob
import io
from collections.abc import Callable
from typing import IO, Any, TypeVar, cast

import tenacity

from headrace.errors import ConfigError, UnreachableError

T = TypeVar("T")

TRIES = 4
WAIT_S = 0.5
"""Seconds before the second try, doubled before each further one (3.5 s in all); backends add retries of their own."""
BUFFER_BYTES = 256 << 10
"""Bytes of the smallest request: a parquet footer and its pages are many small reads."""
REQUEST_BYTES = 32 << 20
"""Bytes of the largest request, so that a dropped connection costs at most this much again."""
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface-hub", "http": "aiohttp",
    "https": "aiohttp",
}  # fmt: skip
WEB = ("http", "https")
VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "sha256", "blob_id", "mtime", "LastModified", "created")
"""What stores call the tag, checksum or time by which a changed file is known."""


def open_url(url: str) -> IO[bytes]:
    """Open a URL for reading, with seek. Raises FileNotFoundError, OSError, ConfigError or UnreachableError."""
    return cast("IO[bytes]", io.BufferedReader(RemoteFile(url), BUFFER_BYTES))


def list_url(pattern: str, is_known: Callable[[str], bool]) -> dict[str, int]:
    """{URL: bytes} of a file, of a glob, or of the files below a folder that `is_known`; empty when there is none.

    A web server has no folders: there, a URL that ends in a slash is a page of links. Raises ConfigError or
    UnreachableError.
    """
    system, path = attempt(pattern, lambda: _system(pattern))
    web = _protocol(pattern) in WEB
    try:
        # In a web address `?` begins the query.
        if "*" in path if web else glob.has_magic(path):
            infos = attempt(pattern, lambda: system.glob(path, detail=True))
            infos = {name: info for name, info in infos.items() if info["type"] == "file"}
        else:
            info = None if web and path.endswith("/") else attempt(pattern, lambda: system.info(path))
            if info is None or info["type"] == "directory":
                found = attempt(pattern, lambda: system.find(path, detail=True))
                infos = {name: info for name, info in found.items() if is_known(name)}
            else:
                infos = {path: info}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{pattern}: {error}") from None
    return {system.unstrip_protocol(name): _size(system, name, info) for name, info in infos.items()}


def url_stamp(url: str) -> str:
    """What a store says about the version of a file, empty when nothing. Raises as `open_url`."""
    system, path = attempt(url, lambda: _system(url))
    info = attempt(url, lambda: system.info(path))  # most stores' listings are kept by fsspec and answer this
    return next((f"{key} {info[key]}" for key in VERSIONS if info.get(key)), "")


class RemoteFile(io.RawIOBase):
    """A remote file as raw bytes: each read is a range request, tried again when the store cannot be reached."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self._system, self._path = attempt(url, lambda: _system(url))
        self._at = 0
        self._file: Any = None
        self.size: int = attempt(url, self._measured)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "seek before the beginning", self.url)
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), REQUEST_BYTES, max(0, self.size - self._at))
        data = attempt(self.url, lambda: self._fetch(self._at, length)) if length else b""
        if length and not data:
            raise OSError(f"ends at byte {self._at}, should have {self.size}")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        pieces = []
        while piece := self.read(REQUEST_BYTES):
            pieces.append(piece)
        return b"".join(pieces)

    def _opened(self) -> Any:
        if self._file is None:
            # No cache in between: this class asks for the ranges it needs, and s3fs would read 50 MB ahead.
            file = self._system.open(self._path, "rb", cache_type="none", block_size=BUFFER_BYTES)
            self._file = file if file.seekable() else io.BytesIO(file.read())
        return self._file

    def _measured(self) -> int:
        return int(self._opened().seek(0, io.SEEK_END))

    def _fetch(self, start: int, length: int) -> bytes:
        try:
            file = self._opened()
            file.seek(start)
            return bytes(file.read(length))
        except ValueError as error:
            if "range requests" not in str(error):
                raise
            # A web server that only gives whole files; fsspec notices at the first read past the beginning.
            self._file = io.BytesIO(self._system.cat_file(self._path))
            return self._fetch(start, length)
        except Exception:
            self._file = None  # opened anew at the next try
            raise


def attempt(url: str, call: Callable[[], T]) -> T:
    """What `call` returns, tried up to TRIES times; its exceptions are translated as the module says."""

    def once() -> T:
        try:
            return call()
        except Exception as error:
            raise _translated(error, url) from error

    trying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnreachableError),
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_exponential(multiplier=WAIT_S),
        reraise=True,
    )
    return cast(T, trying(once))


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, str(path)


def _protocol(url: str) -> str:
    return url.split("://", 1)[0]


def _size(system: Any, name: str, info: dict[str, Any]) -> int:
    """Bytes of a listed file; a page of links has none, so the server is asked."""
    size = info.get("size")
    if size is None:
        size = attempt(name, lambda: system.info(name)).get("size")
    if size is None:
        raise ConfigError(f"{name}: the server does not say how large the file is; copy it to a store that does")
    return int(size)


def _translated(error: Exception, url: str) -> Exception:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec's HTTP calls every failure "not found" and keeps the reason here
    status = _status(error)
    told = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConfigError | UnreachableError):
        return error
    if isinstance(error, ImportError):
        package = PACKAGES.get(_protocol(url))
        how = f"needs {package}: pip install 'headrace[cloud]'" if package else f"needs another package: {told}"
        return ConfigError(f"{url}: {how}")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return ConfigError(
            f"{url}: access denied ({told}); give fsspec the credentials, see docs/how-to/read-your-data.md"
        )
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "No such file", url)
    if isinstance(error, ValueError | TypeError | NotImplementedError | IsADirectoryError):
        return ConfigError(f"{url}: {told}")
    if (status is not None and 400 <= status < 500 and status not in (408, 429)) or "Expired" in type(error).__name__:
        return OSError(told)
    return UnreachableError(f"{url}: cannot be reached after {TRIES} tries: {told}")


def _status(error: Any) -> int | None:
    """The HTTP status an exception of aiohttp, httpx, requests or botocore carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None
