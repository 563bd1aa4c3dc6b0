"""Servers of the protocols of S3 and Google Cloud Storage on the loopback, each with an empty bucket."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BUCKET = "sprint-test"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[dict[str, str]]:
    """Runs a server of ``scheme`` in a process of its own.

    Yields the environment by which clients find it: what a user of another store than the provider's sets.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    if scheme == "s3":
        command = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        environment = {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        make = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
    else:
        command = [
            str(Path(__file__).with_name("gcs_server.py")),
            "start",
            "--in-memory",
            "--quiet",
        ]
        command += ["--host=127.0.0.1", f"--port={port}"]
        command += [f"--default-bucket={BUCKET}"]
        environment = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        # No search for a machine's own account, nor for kinds of buckets that the server does not have.
        environment |= {"GCE_METADATA_HOST": "127.0.0.1:1"}
        environment |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        make = urllib.request.Request(f"{address}/storage/v1/b/{BUCKET}")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *command], **quiet)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(make, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield environment
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def bucket(scheme: str) -> Iterator[str]:
    """The address of an empty bucket, which this process and those that it starts can reach."""
    with serve(scheme) as environment:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield f"{scheme}://{BUCKET}"
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            import fsspec
            from etils.epath import backend

            # Both would remember this server.
            fsspec.filesystem(scheme).clear_instance_cache()
            backend._FileSystemSpecBackend._get_filesystem.cache_clear()
