"""The other processes of a run: signs of life, one verdict for all, a clock for what stands still, one disk.

Every process writes a sign of life into the key-value store of JAX's coordination service every second,
and reads those of the others. When one is silent, has failed or stands still, all of them end with a line
that names it and exit code 75 (sysexits' EX_TEMPFAIL: the same command line goes on from the last
checkpoint). A collective that waits for a missing process cannot be interrupted, hence `os._exit`.

One case is JAX's own: when process 0 is killed, the coordination service goes with it, and JAX's client
aborts the others at once (exit code 134, after a message and a stack trace).
"""

import contextlib
import math
import os
import socket
import sys
import threading
import time
from typing import NamedTuple, NoReturn

import jax

from ..core.errors import OUT_OF_MEMORY, UserError, is_out_of_memory
from ..core.storage import AnyPath, in_bucket

LOST_PEER = 75  # exit code of a process that ends because another one is gone, or nothing moves
# Exit codes that would come again: the others take them over.
USAGE, NOT_FINITE = 2, 3
BEAT = 1.0  # seconds between signs of life
GRACE = 5 * BEAT  # process 0 ends so much later: it holds the store in which the others read why
DAY = 24 * 3600 * 1000  # milliseconds


class Sign(NamedTuple):
    """A sign of life: when it was given, what its process does, and for how long that may go on.

    Attributes:
      turn: counts the phases of the start, and steps; equal in processes that are equally far.
      patience: seconds until the process is stuck, in words of `float`.
      doing: the phase, in words; "-" for a step.
    """

    time: str
    turn: str
    patience: str
    step: str
    host: str
    doing: str


class Peers:
    """The other processes of a run, watched by a thread from `watch` until `finish` or `fail`.

    Args:
      client: JAX's client of the coordination service.
      index, count: the number of this process, and of all.
      silence: seconds without a sign of life after which a process is gone.
      stall: seconds without a step after which a run is stuck, counted from the first finished one.
      start: the same for each phase of the start, and for long work between steps.
    """

    def __init__(self, client, index: int, count: int, silence: float, stall: float, start: float):
        self._client, self.index, self.count = client, index, count
        self._silence, self._stall, self._start = silence, stall, start
        self._step, self._turn, self._proofs = 0, 0, 0
        self._now = "-", math.inf  # what this process does, and the patience with it
        unknown = Sign("0", "0", "inf", "0", "unknown", "-")
        self._signs = dict.fromkeys(range(count), (unknown, time.monotonic()))  # and since when
        self._moved = dict.fromkeys(range(count), ("0", time.monotonic()))  # turn, and since when
        self._over = threading.Event()

    def watch(self) -> None:
        """Starts the thread."""
        self._beat()
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def at_step(self, step: int) -> None:
        """Notes that a step has begun; the first has the patience of the start until the second begins."""
        self._now = "-", self._stall if self._step else self._start
        self._step, self._turn = step, self._turn + 1

    def at_phase(self, name: str) -> None:
        """Notes that a phase of the start, or long work after a step, has begun."""
        self._now = name, self._start
        self._turn += not self._step  # between steps not all processes have the same work

    def meet(self, name: str) -> None:
        """Waits for all processes at a point that each passes once; the clock of this one rests."""
        before, self._now = self._now, ("waiting", math.inf)
        self._client.wait_at_barrier(f"sprint_jax/{name}", DAY)
        self._now, self._turn = before, self._turn + 1

    def see_same(self, path: AnyPath, mark: str = "") -> None:
        """Proves that all processes see the file that process 0 has written.

        Args:
          mark: the file's content, of process 0.

        Raises:
          UserError: on all processes, with exit code 2; it names the hosts that do not see it.
        """
        self._proofs += 1
        if self.index == 0:
            self._put(f"mark{self._proofs}", mark)
        mark = self._client.blocking_key_value_get(f"sprint_jax/mark{self._proofs}/0", DAY)
        deadline, seen = time.monotonic() + self._silence, False
        while not seen and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if not in_bucket(path):  # a disk of the network may remember that nothing was there
                    os.listdir(path.parent)
                seen = path.read_text() == mark
            time.sleep(0 if seen else 0.2)
        self._put(f"sees{self._proofs}", f"{socket.gethostname()} {seen}")
        self.meet(f"seen{self._proofs}")
        sees = {index: text.split() for index, text in self._get(f"sees{self._proofs}").items()}
        blind = [
            f"process {i} on host {host}" for i, (host, seen) in sees.items() if seen != "True"
        ]
        if blind:
            raise UserError(
                f"{', '.join(blind)} of {self.count} processes cannot see {path.parent} of process 0 (on host "
                f"{sees[0][0]}): --workdir must be one folder that all hosts see",
                exit_code=USAGE,
            )

    def finish(self) -> None:
        """Ends the watch, once all processes have done their part."""
        self.meet("finished")
        self._over.set()

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with an error, and sees to it that it does."""
        exhausted = is_out_of_memory(error)
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or "gloo" in str(error).lower()
        if of_jax and not exhausted:
            # Most likely a broken connection: within this time the watch finds out to whom.
            self._over.wait(self._silence + 5 * BEAT)
        self._over.set()
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        code = OUT_OF_MEMORY if exhausted else code
        others = code if code in (USAGE, NOT_FINITE, OUT_OF_MEMORY) else LOST_PEER
        line = " ".join(str(error).split())[:500] or type(error).__name__
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._put("failed", f"{others} {self._names(self.index)} ended: {line}")
        if self.index == 0:
            time.sleep(GRACE)
        # At the exit JAX would wait for the others, and abort. This leaves the time to print the error.
        sys.stdout.flush()
        timer = threading.Timer(3 * BEAT, os._exit, [code])
        timer.daemon = True
        timer.start()

    def end(self, code: int, why: str) -> NoReturn:
        """Ends all processes with one exit code, from any thread, whatever they wait for."""
        self._over.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._put("failed", f"{code} {self._names(self.index)} {why}")
        if self.index == 0:
            time.sleep(GRACE)
        os._exit(code)

    def look(self) -> str | None:
        """Reads the signs of life; returns ``"CODE LINE"`` with which all must end, None if all is well."""
        alive, failed = self._get("alive"), self._get("failed")
        now = time.monotonic()
        for index, text in alive.items():
            sign = Sign(*text.split(maxsplit=5))
            if sign != self._signs[index][0]:
                self._signs[index] = sign, now
            if sign.turn != self._moved[index][0]:
                self._moved[index] = sign.turn, now
        if failed:
            return failed[min(failed)]
        if silent := [i for i, (_, since) in self._signs.items() if now - since > self._silence]:
            gone = f"{self._names(*silent)}: no sign of life for {self._silence:g} s"
            return f"{LOST_PEER} {gone}; it was killed, is stopped, or its host is cut off"
        # Whoever is further waits for those that are behind; whoever waits at a meeting is not behind.
        working = {i: sign for i, (sign, _) in self._signs.items() if sign.patience != "inf"}
        last = min((int(sign.turn) for sign in working.values()), default=0)
        behind = {i: sign for i, sign in working.items() if int(sign.turn) == last}
        patience = max((float(sign.patience) for sign in behind.values()), default=math.inf)
        if any(now - self._moved[i][1] <= patience for i in behind) or not behind:
            return None
        who = self._names(*behind) if len(behind) < self.count else "every process"
        slow = max(behind.values(), key=lambda sign: float(sign.patience))
        what, where = ("step", f"at step {slow.step}")
        if slow.doing != "-":
            what, where = "progress", f"while {slow.doing}"
        verdict = f"{LOST_PEER} no {what} for {patience:g} s: {who} hangs {where}"
        self._put("failed", verdict)  # the clocks of the others may be a little behind
        return verdict

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                # The one question that has a time limit: it hangs when process 0 does.
                limit = int(self._silence * 1000)
                self._client.blocking_key_value_get("sprint_jax/alive/0", limit)
                self._beat()
                verdict = self.look()
            except jax.errors.JaxRuntimeError:
                lost = f"{self._names(0)}, the coordinator, does not answer"
                verdict = f"{LOST_PEER} {lost} ({self._silence:g} s)"
            if verdict and not self._over.is_set():
                code, _, line = verdict.partition(" ")
                me = f"this is process {self.index}, at step {self._step}"
                print(f"error: {line}; {me}", file=sys.stderr, flush=True)
                if self.index == 0:
                    time.sleep(GRACE)
                os._exit(int(code))
            self._over.wait(BEAT)

    def _names(self, *indices: int) -> str:
        hosts = {index: self._signs[index][0].host for index in indices}
        return ", ".join(f"process {i} of {self.count} on host {host}" for i, host in hosts.items())

    def _beat(self) -> None:
        doing, patience = self._now
        words = time.monotonic(), self._turn, patience, self._step, socket.gethostname(), doing
        self._put("alive", " ".join(map(str, words)))

    def _put(self, folder: str, value: str) -> None:
        key = f"sprint_jax/{folder}/{self.index}"
        self._client.key_value_set(key, value, allow_overwrite=True)

    def _get(self, folder: str) -> dict[int, str]:
        entries = self._client.key_value_dir_get(f"sprint_jax/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in entries}
