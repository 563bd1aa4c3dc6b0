"""Watching the other processes of a run: one that is killed, stopped, cut off or stuck is named.

Every process writes a sign of life into the key-value store of JAX's coordination service every
second; process 0 reads them all and tells the others its verdict. All then end with one line and exit
code 75 (sysexits' EX_TEMPFAIL: the same command line goes on from the last checkpoint). A collective that
waits for the missing process cannot be interrupted, hence `os._exit`.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from .rendezvous import split_address

LOST_PEER = 75  # exit code of a process that ends because another one is gone
USAGE, NOT_FINITE = 2, 3  # exit codes that would come again: the others take them over
BEAT = 1.0  # seconds between signs of life
LEAVE_SECONDS = 30.0  # a failing process ends after this, even if its threads still wait for others
ROOT = "sprint_jax"  # of our keys in the store
DONE = "0 done"  # what a process writes that ended as it should


class Vitals(NamedTuple):
    """What is known of a process: its last sign of life, its step, and since when each stands."""

    beat: str
    step: int
    beat_at: float
    step_at: float


def follow(
    seen: Mapping[int, Vitals], beats: Mapping[int, str], now: float, count: int
) -> dict[int, Vitals]:
    """``seen`` brought up to date with the beats ``"number step"`` that the store holds now."""
    result = {}
    for index in range(count):
        old = seen.get(index, Vitals("", -1, now, now))
        beat = beats.get(index, "")
        step = int(beat.split()[1]) if beat else -1
        result[index] = Vitals(
            beat,
            step,
            old.beat_at if beat == old.beat else now,
            old.step_at if step == old.step else now,
        )
    return result


def judge(
    vitals: Mapping[int, Vitals], hosts: list[str], now: float, silence: float, stall: float
) -> str | None:
    """One line that names who is missing or behind; None while all is well.

    Args:
      vitals: of the processes that are still at work.
      hosts: of all processes.
      silence, stall: seconds without a sign of life, and without a step, that are too many.
    """
    count = len(hosts)

    def name(index: int) -> str:
        return f"process {index} of {count} on host {hosts[index]}"

    silent = [index for index, v in vitals.items() if now - v.beat_at > silence]
    if silent:
        who = ", ".join(map(name, silent))
        return f"{who}: no sign of life for {silence:g} s; it was killed, is stopped, or its host is cut off"
    if vitals and all(now - v.step_at > stall for v in vitals.values()):
        last = min(v.step for v in vitals.values())
        behind = [index for index, v in vitals.items() if v.step == last]
        if len(behind) == len(vitals):
            return f"no step for {stall:g} s: all processes hang in step {last + 1}"
        who = ", ".join(map(name, behind))
        return f"no step for {stall:g} s: {who} hangs in step {last + 1}, the others are ahead"
    return None


class Place(NamedTuple):
    """Where a process stands; all None: JAX finds out (SLURM, Open MPI, TPU, Kubernetes)."""

    address: str | None
    count: int | None
    index: int | None


class Peers:
    """The other processes of a run, watched by two threads until `finish` or `fail`.

    One thread talks to the store, and may hang when process 0 does; the other one sees that.

    Args:
      client: JAX's client of the coordination service.
      address: of process 0, ``host:port``.
      silence, stall: seconds, see `add_flags`.
    """

    def __init__(self, client, place: Place, hosts: list[str], silence: float, stall: float):
        self._client, self._address, self._hosts = client, place.address, hosts
        self.index, self.count = place.index, place.count
        self._silence, self._stall = silence, stall
        self._step, self._beats = 0, 0
        self._answered = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()
        for work in (self._talk, self._listen):
            threading.Thread(target=work, name="peers", daemon=True).start()

    def at_step(self, step: int) -> None:
        """Notes the step in progress; cheap enough for every step."""
        self._step = step

    def meet(self, name: str) -> None:
        """Waits for all processes at a point that each passes once; `_end` bounds the wait."""
        self._client.wait_at_barrier(f"{ROOT}/{name}", int(24 * 3600e3))

    def _talk(self) -> None:
        seen: dict[int, Vitals] = {}
        while not self._over.is_set():
            try:
                self._beats += 1
                self._put(f"alive/{self.index}", f"{self._beats} {self._step}")
                if self.index == 0:
                    verdict, seen = self._look(seen)
                else:
                    verdict = self._get("verdict").get("verdict")
            except jax.errors.JaxRuntimeError:
                time.sleep(BEAT)  # `_listen` counts the seconds since the last answer.
                continue
            self._answered = time.monotonic()
            if verdict:
                self._end(verdict)
            self._over.wait(BEAT)

    def _look(self, seen: dict[int, Vitals]) -> tuple[str | None, dict[int, Vitals]]:
        """Process 0's view: a verdict, written down for the others, and the vitals."""
        now = time.monotonic()
        beats = {int(index): beat for index, beat in self._get("alive").items()}
        seen = follow(seen, beats, now, self.count)
        ended = {int(index): text for index, text in self._get("ended").items()}
        failed = [(index, text) for index, text in sorted(ended.items()) if text != DONE]
        if failed:
            index, (code, _, message) = failed[0][0], failed[0][1].partition(" ")
            verdict = f"{code} process {index} of {self.count} on host {self._hosts[index]} ended: {message}"
        else:
            running = {index: v for index, v in seen.items() if index not in ended}
            line = judge(running, self._hosts, now, self._silence, self._stall)
            verdict = line and f"{LOST_PEER} {line}"
        if verdict:
            self._put("verdict/verdict", verdict)
        return verdict, seen

    def _listen(self) -> None:
        while not self._over.wait(BEAT):
            if self.index and time.monotonic() - self._answered > self._silence:
                self._end(
                    f"{LOST_PEER} {self._coordinator()} has not answered for {self._silence:g} s"
                )

    def _coordinator(self) -> str:
        return f"process 0 of {self.count} on host {self._hosts[0]} (coordinator {self._address})"

    def _put(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{ROOT}/{key}", value, allow_overwrite=True)

    def _get(self, folder: str) -> dict[str, str]:
        entries = self._client.key_value_dir_get(f"{ROOT}/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in entries}

    def _end(self, verdict: str) -> None:
        """Ends this process with the verdict's exit code and line; process 0 as the last."""
        with self._lock:
            if self._over.is_set():
                return
            code, _, message = verdict.partition(" ")
            print(f"error: {message}; this is process {self.index}", file=sys.stderr, flush=True)
            if self.index == 0:
                time.sleep(3 * BEAT)  # It holds the store in which the others look up the verdict.
            os._exit(int(code))

    def on_abort(self, number: int) -> None:
        """JAX's client aborts the process as soon as process 0 is gone: says so first."""
        if self._over.is_set() or not self.index or _answers(self._address):
            return  # Something else; the default action of SIGABRT follows.
        self._end(f"{LOST_PEER} {self._coordinator()} is gone")

    def finish(self) -> None:
        """This process has done its part; it may still wait for others at the exit."""
        self._over.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Process 0 has left already.
            self._put(f"ended/{self.index}", DONE)

    def fail(self, error: BaseException) -> None:
        """This process ends with an error: tells the others, and bounds the wait at the exit."""
        if isinstance(error, jax.errors.JaxRuntimeError) or "gloo" in str(error).lower():
            # Most likely a broken connection: within this time the watch finds out to whom.
            self._over.wait(self._silence + 5 * BEAT)
        self._over.set()
        code, line = exit_code(error), " ".join(str(error).split()) or type(error).__name__
        others = code if code in (USAGE, NOT_FINITE) else LOST_PEER
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self.index == 0:
                text = f"process 0 of {self.count} on host {self._hosts[0]} ended: {line[:500]}"
                self._put("verdict/verdict", f"{others} {text}")
                time.sleep(3 * BEAT)
            else:
                self._put(f"ended/{self.index}", f"{others} {line[:500]}")
        # Without this, JAX would wait for all others at the exit, and abort.
        atexit.register(_exit_now, code)
        timer = threading.Timer(LEAVE_SECONDS, _exit_now, [code])
        timer.daemon = True
        timer.start()


def exit_code(error: BaseException) -> int:
    """The exit code that `cli.run_command` or Python gives an exception."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_code", 1)


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answers(address: str) -> bool:
    try:
        socket.create_connection(split_address(address), timeout=2.0).close()
    except OSError:
        return False
    return True


_callbacks: list[object] = []  # C code may call them as long as the process lives


def catch_abort(handler: Callable[[int], None]) -> None:
    """Calls ``handler`` on SIGABRT, on the thread that called ``abort()``.

    Handlers of Python's signal module run later, on the main thread, and an abort does not wait.
    """
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), callback)
    _callbacks.append(callback)
