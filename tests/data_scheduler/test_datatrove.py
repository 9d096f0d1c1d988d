"""datatrove's readers and its token files: what they give, and that nothing they leave out is lost silently."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from token_files import write_ds

from data_scheduler import DataConfig, Scheduler
from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Records, Unit
from data_scheduler.paths import expand
from data_scheduler.reading import UnitReader, column_layout, layout_units

for module in ("datatrove", "warcio", "cchardet", "magic"):
    pytest.importorskip(module, exc_type=ImportError)


def read(path: Path, **config: Any) -> Records:
    source = SourceConfig.model_validate({"name": "x", "paths": [str(path)], **config})
    return UnitReader(source).read(Unit(str(path), 0, -1))


def kinds(records: Records) -> tuple[list[Any], list[tuple[int, str]], int]:
    rejects = [(reject.record, reject.reason) for reject in records.rejects]
    assert len(records.documents) == sum(d is not None for d in records.documents) + len(rejects) + records.filtered
    return [document for document in records.documents if document is not None], rejects, records.filtered


PAGES = [
    ("https://a.example/1", b"<html><body>water wheel</body></html>", "text/html"),
    ("https://a.example/2", b"\x89PNG....", "image/png"),
    ("https://b.example/3", "<html><body>Mühle</body></html>".encode(), "text/html"),
]


def warc(pages: list[tuple[str, bytes, str]] = PAGES, gzip: bool = True) -> bytes:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=gzip)
    writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "test"}))
    for url, body, mime in pages:
        request = StatusAndHeaders("GET / HTTP/1.1", [("Host", "example")], is_http_request=True)
        writer.write_record(writer.create_warc_record(url, "request", http_headers=request))
        response = StatusAndHeaders("200 OK", [("Content-Type", mime)], protocol="HTTP/1.0")
        headers = {"WARC-Identified-Payload-Type": mime, "WARC-Date": "2024-05-01T00:00:00Z"}
        writer.write_record(
            writer.create_warc_record(
                url, "response", io.BytesIO(body), http_headers=response, warc_headers_dict=headers
            )
        )
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["x.warc.gz", "x.warc"])
def test_warc_pages_are_documents_with_their_metadata(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(warc(gzip=name.endswith(".gz")))
    documents, rejects, filtered = kinds(read(tmp_path / name))
    assert documents == [body.decode() for _, body, mime in PAGES if mime == "text/html"]
    assert (rejects, filtered) == ([], 5)  # warcinfo, three requests, a picture
    documents, _, _ = kinds(
        read(tmp_path / name, template="{url} {date}\n{text}", where="url != 'https://a.example/1'")
    )
    assert documents == ["https://b.example/3 2024-05-01T00:00:00Z\n<html><body>Mühle</body></html>"]


def test_wet_files_and_folders(tmp_path: Path) -> None:
    from warcio.warcwriter import WARCWriter

    with open(tmp_path / "x.warc.wet.gz", "wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number in range(3):
            headers = {"WARC-Identified-Payload-Type": "text/plain"}
            writer.write_record(
                writer.create_warc_record(
                    f"https://a.example/{number}",
                    "conversion",
                    io.BytesIO(b"text %d" % number),
                    warc_headers_dict=headers,
                    warc_content_type="text/plain",
                )
            )
    (tmp_path / "notes.md").write_text("x")
    assert [Path(path).name for path, _ in expand([str(tmp_path)], "x", "datatrove:warc")] == ["x.warc.wet.gz"]
    assert kinds(read(tmp_path / "x.warc.wet.gz")) == (["text 0", "text 1", "text 2"], [], 0)


def test_a_run_over_warc_files(tmp_path: Path, corpus: Path) -> None:
    for shard in range(2):
        body = (f"<html>page {shard} " + "water wheel " * 50 + "</html>").encode()
        pages = [(f"https://a.example/{shard}/{n}", body, "text/html") for n in range(20)]
        (tmp_path / f"{shard}.warc.gz").write_bytes(warc(pages))
    config = {
        "tokenizer": str(corpus / "tokenizer.json"), "seq_len": 64, "global_batch_size": 8, "lanes": 4, "prefetch": 0,
        "sources": [{"name": "crawl", "paths": [str(tmp_path)], "template": "{url} {text}"}],
    }  # fmt: skip
    scheduler = Scheduler(DataConfig.model_validate(config))
    batches = [next(scheduler) for _ in range(20)]
    assert not [reject for batch in batches for reject in batch.rejects]
    assert any("https://a.example/1/7 " in scheduler.encoder.decode(row) for batch in batches for row in batch.tokens)


def test_a_broken_warc_is_a_reject_after_its_good_pages(tmp_path: Path) -> None:
    for data, name in ((warc(), "x.warc.gz"), (warc(gzip=False), "x.warc")):
        for damaged in (data[:-100], data[:-1], data[:-300] + b"\xff" * 300):
            (tmp_path / name).write_bytes(damaged)
            documents, rejects, _ = kinds(read(tmp_path / name))
            # Where only the last byte is missing the last page is whole.
            assert documents == [PAGES[0][1].decode(), PAGES[2][1].decode()][: 1 + (damaged == data[:-1])]
            assert len(rejects) == 1
            assert "records up to" in rejects[0][1]
    (tmp_path / "y.warc.gz").write_bytes(b"no archive at all")
    assert len(kinds(read(tmp_path / "y.warc.gz"))[1]) == 1
    assert "No such file" in kinds(read(tmp_path / "gone.warc.gz"))[1][0][1]


ROWS = [{"text": "one", "metadata": {"lang": "de"}, "n": 1}, {"n": 2}, {"text": "three", "metadata": {"lang": "en"}}]


@pytest.mark.parametrize("reader", ["jsonl", "csv", "parquet", "ipc"])
def test_other_readers(tmp_path: Path, reader: str) -> None:
    path = tmp_path / f"x.{reader}"
    table = pa.Table.from_pylist(ROWS)
    if reader == "jsonl":
        path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    elif reader == "csv":
        path.write_text('text,metadata\none,"{""lang"": ""de""}"\n,\nthree,"{""lang"": ""en""}"\n')
    elif reader == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    documents, rejects, filtered = kinds(read(path, format=f"datatrove:{reader}"))
    if reader == "csv":  # an empty field is an empty text
        assert (documents, rejects, filtered) == (["one", "", "three"], [], 0)
    else:
        assert (documents, rejects, filtered) == (["one", "three"], [(1, "field 'text' is missing")], 0)
    assert kinds(read(path, format=f"datatrove:{reader}", where="lang == 'de'"))[0] == ["one"]


def test_what_a_datatrove_reader_skips_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n{broken\n{"text": "two"}\n{broken too')
    documents, rejects, _ = kinds(read(tmp_path / "x.jsonl", format="datatrove:jsonl"))
    assert documents == ["one", "two"]
    assert [record for record, _ in rejects] == [1, 3]
    assert all("Error when reading" in reason for _, reason in rejects)


def test_token_files(tmp_path: Path) -> None:
    """As datatrove's own writer writes them, and read stretch by stretch."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    documents = [[5, 6, 7, 0], [8, 0], [0], [9, 9, 0]]
    for width, metadata in ((2, True), (4, True), (2, False), (4, False)):
        name = f"{width}-{metadata}.ds"
        file = TokenizedFile(
            str(tmp_path), name, tokenizer_name_or_path="t", save_final_metadata=metadata, token_size=width
        )
        for document in documents:
            file.write(document, None)
        file.close()
        path = str(tmp_path / name)
        layout = column_layout(path)
        assert layout == [(4, 10 * width)]
        (unit,) = layout_units(path, "auto", layout)
        read = UnitReader(SourceConfig(name="x", paths=["x"]), eos_id=0, vocab_size=10).read(unit)
        assert [d.tolist() for d in read.documents if isinstance(d, np.ndarray)] == [[5, 6, 7], [8], [], [9, 9]]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({".index": b"123"}, "cut off"),
        ({".metadata": b"x|3"}, "does not say 2 or 4 bytes"),
        ({"": b"\1\0\2\0\3"}, "points past the end"),
        ({".index": np.array([5, 3], "<u8").tobytes()}, "negative length"),
    ],
)
def test_damaged_token_files(tmp_path: Path, change: dict[str, bytes], part: str) -> None:
    path = tmp_path / "x.ds"
    write_ds(path, [[1, 2], [3, 4, 5]])
    for suffix, data in change.items():
        Path(f"{path}{suffix}").write_bytes(data)
    rejects = UnitReader(SourceConfig(name="x", paths=["x"]), vocab_size=10).read(Unit(str(path), 0, -1)).rejects
    assert [part in reject.reason for reject in rejects] == [True]
