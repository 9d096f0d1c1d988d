"""An S3 server on this machine; fsspec is told about it as a user would, through the environment."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fsspec
import pytest


@contextmanager
def s3_server(bucket: str) -> Iterator[Any]:
    """fsspec's file system of a server with an empty `bucket`; processes that are started meanwhile see it too."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("FSSPEC_S3_KEY", "key")
        patch.setenv("FSSPEC_S3_SECRET", "secret")
        patch.setattr(fsspec.config, "conf", {})
        fsspec.config.set_conf_env(fsspec.config.conf)
        patch.setattr("fsspec.spec.apply_config", partial(fsspec.config.apply_config, conf_dict=fsspec.config.conf))
        system = fsspec.filesystem("s3")
        system.mkdir(bucket)
        yield system
    server.stop()
