"""Runs of several processes on this machine, started one by one so that a test can hurt one of them."""

import concurrent.futures
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from helpers.runs import ROOT, Ended

HOST = socket.gethostname()
WORKER = [str(Path(__file__).parent / "pod_worker.py")]
TRAIN = ["-m", "sprint_jax.train"]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    """That of the tests, with another number of virtual devices; the last flag of a name counts."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


def start_one(words: list[str], devices: int, **more: str) -> subprocess.Popen:
    options = dict(cwd=ROOT, env=environment(devices, **more), text=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *words], **options, **pipes)


def start_pod(words: list[str], count: int = 2, devices: int = 4) -> list[subprocess.Popen]:
    """Starts ``python WORDS --distributed`` once per process."""
    where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    words = [*words, "--distributed"]
    return [start_one(words, devices, JAX_PROCESS_ID=str(i), **where) for i in range(count)]


def finish_pod(pod: list[subprocess.Popen], timeout: float = 300) -> list[Ended]:
    """Waits for all processes; whatever goes wrong, none is left behind."""
    with concurrent.futures.ThreadPoolExecutor(len(pod)) as threads:
        try:
            outputs = list(threads.map(lambda process: process.communicate(timeout=timeout), pod))
        finally:
            for process in pod:
                process.kill()
    codes = [process.returncode for process in pod]
    return [Ended(code, *output) for code, output in zip(codes, outputs, strict=True)]


def survivor_of(pod: list[subprocess.Popen], victim: int, number: int) -> tuple[Ended, float]:
    """Signals one of two processes; how the other one ended, and after how many seconds."""
    begun = time.monotonic()
    pod[victim].send_signal(number)
    try:
        (survivor,) = finish_pod([pod[1 - victim]], timeout=90)
        return survivor, time.monotonic() - begun
    finally:
        pod[victim].kill()
        pod[victim].communicate()


def errors(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("error: ")]
