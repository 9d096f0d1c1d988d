"""The same corpus from a folder, memory, a web server and an S3 store gives the same tokens; failures have names."""

import gzip
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import zstandard
from s3_server import s3_server
from small_corpus import jsonl, make_documents
from token_files import write_ds, write_megatron

from data_scheduler import DataConfig, Scheduler, batch_sha256
from data_scheduler import remote as remote_module
from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Records, Unit
from data_scheduler.paths import expand
from data_scheduler.reading import UnitReader
from headrace.errors import ConfigError, ExitCode, UnreachableError

pytest.importorskip("moto")
FORMATS = {
    "jsonl": ".jsonl", "gzip": ".jsonl.gz", "zstd": ".jsonl.zst", "parquet": ".parquet", "arrow": ".arrow",
    "csv": ".csv", "text": ".txt", "npy": ".npy", "megatron": ".bin", "ds": ".ds",
}  # fmt: skip
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per format, two files in each (ten of text)."""
    root = tmp_path_factory.mktemp("formats")
    for name, suffix in FORMATS.items():
        (root / name).mkdir()
        for shard in range(10 if name == "text" else 2):
            texts = make_documents(name, 40, shard)
            write(root / name / f"part {shard}{suffix}", texts)
    return root


def write(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts})
    ids = [[1 + byte for byte in text.encode()] + [0] for text in texts]
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_bytes(jsonl(texts))
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(jsonl(texts), mtime=0))
        case ".jsonl.zst":
            path.write_bytes(zstandard.compress(jsonl(texts)))
        case ".parquet":
            pq.write_table(table, path, row_group_size=15)
        case ".arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=15)
        case ".csv":
            pa_csv.write_csv(table, path)
        case ".txt":
            path.write_text(" ".join(texts))
        case ".npy":
            np.save(path, np.concatenate([np.array(document, np.uint16) for document in ids]))
        case ".bin":
            write_megatron(path.with_suffix(""), ids)
        case ".ds":
            write_ds(path, ids)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server, which knows no ranges, with them. `ill` answers are given first."""

    protocol_version = "HTTP/1.1"
    ill: list[int]
    asked: int

    def do_GET(self) -> None:
        type(self).asked += 1
        if type(self).ill:
            self.send_error(type(self).ill.pop(0))
            return
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206 if part else 416)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """The standard library's own: ranges are ignored."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts web servers; gives their addresses."""
    servers = []

    def start(root: Path, handler: type[http.server.SimpleHTTPRequestHandler], ill: list[int] | None = None) -> str:
        kind = type("Handler", (handler,), {"ill": ill if ill is not None else [], "asked": 0})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(root)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A bucket of an S3 server that runs here."""
    with s3_server("corpus") as system:
        yield system


def stream(root: str, tokenizer: Path, only: str | None = None) -> list[str]:
    """The batches' hashes over the folders of `root`."""
    sources = [
        {"name": name, "paths": [f"{root}/{name}/*" if "*" in root else f"{root}/{name}/"]}
        for name in FORMATS
        if only in (None, name)
    ]
    config = DataConfig.model_validate(
        {"tokenizer": str(tokenizer / "tokenizer.json"), "sources": sources, "seq_len": 64, "global_batch_size": 40,
         "lanes": 8, "chunk_bytes": 2048, "prefetch": 0}
    )  # fmt: skip
    scheduler = Scheduler(config)
    batches = [next(scheduler) for _ in range(STEPS)]
    assert not [reject for batch in batches for reject in batch.rejects]
    return [batch_sha256(batch.digests) for batch in batches]


@pytest.fixture(scope="module")
def local(folder: Path, corpus: Path) -> list[str]:
    return stream(str(folder), corpus)


def test_memory_gives_the_same_stream(folder: Path, corpus: Path, local: list[str]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/remote-test/", recursive=True)
    try:
        assert stream("memory://remote-test", corpus) == local
    finally:
        memory.rm("/remote-test", recursive=True)


@pytest.mark.parametrize("handler", [Ranges, WholeFiles])
def test_a_web_server_gives_the_same_stream(
    folder: Path, corpus: Path, local: list[str], serve: Callable[..., str], handler: Any
) -> None:
    assert stream(serve(folder, handler), corpus) == local


def test_an_s3_store_gives_the_same_stream(folder: Path, corpus: Path, local: list[str], s3: Any) -> None:
    s3.put(str(folder) + "/", "corpus/run/", recursive=True)
    assert stream("s3://corpus/run", corpus) == local


def test_globs_and_single_files(folder: Path, serve: Callable[..., str], s3: Any) -> None:
    expected = [(f"part {shard}.jsonl", (folder / "jsonl" / f"part {shard}.jsonl").stat().st_size) for shard in (0, 1)]
    s3.put(str(folder / "jsonl") + "/", "corpus/globs/", recursive=True)
    for root in (serve(folder / "jsonl", Ranges), "s3://corpus/globs", str(folder / "jsonl")):
        for patterns in ([f"{root}/*.jsonl"], [f"{root}/part 1.jsonl", f"{root}/part 0.jsonl"]):
            found = expand(patterns, "x")
            assert [(path.rsplit("/", 1)[1].replace("%20", " "), size) for path, size in found] == expected
    with pytest.raises(ConfigError, match=r"^x: no file at s3://corpus/globs/\*\.csv$"):
        expand(["s3://corpus/globs/*.csv"], "x")


def read(url: str, size: int | None = None) -> Records:
    config = SourceConfig.model_validate({"name": "x", "paths": [url]})
    return UnitReader(config, sizes={} if size is None else {url: size}).read(Unit(url, 0, -1))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "WAIT_S", 0.01)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(tmp_path: Path, serve: Callable[..., str], quick: None, status: int) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(["one", "two"]))
    ill = [status] * (remote_module.TRIES - 1)
    assert read(serve(tmp_path, Ranges, ill) + "/x.jsonl").documents == ["one", "two"]
    assert not ill


@pytest.mark.usefixtures("quick")
def test_an_outage_stops_the_run_instead_of_rejecting_data(tmp_path: Path, serve: Callable[..., str]) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(["one", "two"]))
    with pytest.raises(UnreachableError, match="cannot be reached after 4 tries: 503") as caught:
        read(serve(tmp_path, Ranges, [503] * 50) + "/x.jsonl")
    assert caught.value.exit_code == ExitCode.RECOVERABLE
    assert "\n" not in str(caught.value)
    nobody = "http://127.0.0.1:9/x.jsonl"
    for ask in (lambda: read(nobody), lambda: expand([nobody], "source 'x'")):
        with pytest.raises(UnreachableError, match=r"127.0.0.1:9/x.jsonl: cannot be reached after 4 tries") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_vanished_or_changed_remote_file_is_rejected_like_a_local_one(
    tmp_path: Path, serve: Callable[..., str], s3: Any
) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(["one", "two"]))
    s3.put(str(tmp_path / "x.jsonl"), "corpus/x.jsonl")
    for root in (str(tmp_path), serve(tmp_path, Ranges), "s3://corpus"):
        size = expand([f"{root}/x.jsonl"], "x")[0][1]
        assert read(f"{root}/x.jsonl", size).documents == ["one", "two"]
        gone = read(f"{root}/gone.jsonl", size).rejects
        assert [reject.reason for reject in gone] == [
            "cannot be read: No such file" + " or directory" * (root[0] == "/")
        ]
        changed = read(f"{root}/x.jsonl", size + 1).rejects
        assert [reject.reason for reject in changed] == [
            f"the file has {size} bytes, {size + 1} when it entered the run"
        ]


def test_each_mistake_has_one_line(tmp_path: Path, serve: Callable[..., str], s3: Any) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{}\n")
    web = serve(tmp_path, Ranges)
    cases = {
        "s3://no-such-bucket/x.jsonl": "no file at s3://no-such-bucket/x.jsonl",
        "s3://no-such-bucket/": "no file at s3://no-such-bucket/",
        "s3://corpus/nothing/*.jsonl": "no file at",
        f"{web}/gone.jsonl": "no file at http",
        "gopher://x/y.jsonl": "gopher",
        "memory://nothing-here/": "no file at",
    }
    for path, part in cases.items():
        with pytest.raises(ConfigError, match=part) as caught:
            expand([path], "source 'x'")
        assert str(caught.value).startswith("source 'x': ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_file_names_the_credentials(tmp_path: Path, serve: Callable[..., str], status: int) -> None:
    class Refusing(Ranges):
        def do_HEAD(self) -> None:
            self.send_error(status)

        do_GET = do_HEAD

    url = serve(tmp_path, Refusing) + "/x.jsonl"
    for ask in (lambda: read(url), lambda: expand([url], "source 'x'")):
        with pytest.raises(ConfigError, match=f"access denied.*{status}.*credentials"):
            ask()


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """In a Python of its own: what is imported cannot be taken back."""
    import subprocess
    import sys

    for protocol, package, blocked in (
        ("s3", "s3fs", "s3fs"),
        ("gs", "gcsfs", "gcsfs"),
        ("http", "aiohttp", "aiohttp"),
    ):
        code = (
            f"import sys; sys.modules[{blocked!r}] = None\n"
            "from data_scheduler.paths import expand\n"
            f"try: expand(['{protocol}://x/y.jsonl'], 'source x')\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == (
            f"ConfigError source x: {protocol}://x/y.jsonl: needs {package}: pip install 'headrace[cloud]'\n"
        )


def test_a_byte_range_of_a_remote_file_costs_about_its_bytes(tmp_path: Path, serve: Callable[..., str]) -> None:
    """s3fs and HTTP would read megabytes ahead by default; a 64 KB chunk of a large file must not."""
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    (tmp_path / "x.jsonl").write_bytes(line * 4000)
    sent: list[int] = []

    class Counting(Ranges):
        def send_header(self, keyword: str, value: str) -> None:
            if keyword == "Content-Length" and self.command == "GET":
                sent.append(int(value))
            super().send_header(keyword, value)

    url = serve(tmp_path, Counting) + "/x.jsonl"
    config = SourceConfig.model_validate({"name": "x", "paths": [url]})
    records = UnitReader(config).read(Unit(url, 1_000_000, 1_064_000))
    assert len(records.documents) in (63, 64)
    assert sum(sent) < 64_000 + 2 * remote_module.BUFFER_BYTES
