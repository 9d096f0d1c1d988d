"""Reads wandb's offline files, which wandb itself no longer can: LevelDB's log framing around protobuf records."""

import json
import struct
from pathlib import Path


def read_wandb_file(path: Path) -> tuple[dict, list[dict]]:
    """(run fields, history) of an offline file; a tail that was cut off is left out."""
    from wandb.proto import wandb_internal_pb2

    data, position, buffer = path.read_bytes(), 7, b""
    run, history = {}, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if left < 7 or (kind == 0 and size == 0):
            position += left
            continue
        if position + 7 + size > len(data):
            break
        part = data[position + 7 : position + 7 + size]
        position += 7 + size
        buffer = part if kind in (1, 2) else buffer + part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            if record.WhichOneof("record_type") == "run":
                run = {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                run["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return run, history
