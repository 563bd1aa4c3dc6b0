"""The other processes of a run: signs of life, one verdict for all, and a clock for steps that stand still.

Every process writes a sign of life into the key-value store of JAX's coordination service every second,
and reads those of the others. When one is silent, has failed or stands still, all of them end with a line
that names it and exit code 75 (sysexits' EX_TEMPFAIL: the same command line goes on from the last
checkpoint). A collective that waits for a missing process cannot be interrupted, hence `os._exit`.

One case is JAX's own: when process 0 is killed, the coordination service goes with it, and JAX's client
aborts the others at once (exit code 134, after a message and a stack trace).
"""

import contextlib
import os
import socket
import sys
import threading
import time

import jax

LOST_PEER = 75  # exit code of a process that ends because another one is gone, or nothing moves
USAGE, NOT_FINITE = 2, 3  # exit codes that would come again: the others take them over
BEAT = 1.0  # seconds between signs of life
GRACE = 5 * BEAT  # process 0 ends so much later: it holds the store in which the others read why


class Peers:
    """The other processes of a run, watched by a thread from `watch` until `finish` or `fail`.

    Args:
      client: JAX's client of the coordination service.
      index, count: the number of this process, and of all.
      silence: seconds without a sign of life after which a process is gone.
      stall: seconds without a step after which a run is stuck, counted from the first finished one.
    """

    def __init__(self, client, index: int, count: int, silence: float, stall: float):
        self._client, self.index, self.count = client, index, count
        self._silence, self._stall = silence, stall
        self._step, self._stepped = 0, None  # the last step, and its time; None: no other is due
        self._signs = dict.fromkeys(range(count), ("0 0 unknown", time.monotonic()))  # text, since
        self._over = threading.Event()

    def watch(self) -> None:
        """Starts the thread."""
        self._beat()
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def at_step(self, step: int) -> None:
        """Notes that a step has begun; the clock starts with the second, when the first is done."""
        self._step, self._stepped = step, time.monotonic() if self._step else None

    def meet(self, name: str) -> None:
        """Waits for all processes at a point that each passes once; the clock of steps rests."""
        self._stepped = None
        self._client.wait_at_barrier(f"sprint_jax/{name}", int(24 * 3600e3))

    def finish(self) -> None:
        """Ends the watch, once all processes have done their part."""
        self.meet("finished")
        self._over.set()

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with an error, and sees to it that it does."""
        if isinstance(error, jax.errors.JaxRuntimeError) or "gloo" in str(error).lower():
            # Most likely a broken connection: within this time the watch finds out to whom.
            self._over.wait(self._silence + 5 * BEAT)
        self._over.set()
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        others = code if code in (USAGE, NOT_FINITE) else LOST_PEER
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

    def look(self) -> str | None:
        """Reads the signs of life; returns ``"CODE LINE"`` with which all must end, None if all is well."""
        alive, failed = self._get("alive"), self._get("failed")
        now = time.monotonic()
        for index, text in alive.items():
            if text != self._signs[index][0]:
                self._signs[index] = text, now
        if failed:
            return failed[min(failed)]
        if silent := [i for i, (_, since) in self._signs.items() if now - since > self._silence]:
            gone = f"{self._names(*silent)}: no sign of life for {self._silence:g} s"
            return f"{LOST_PEER} {gone}; it was killed, is stopped, or its host is cut off"
        if self._stepped is None or now - self._stepped <= self._stall:
            return None
        steps = {index: int(text.split()[1]) for index, (text, _) in self._signs.items()}
        last = min(steps.values())
        behind = [index for index in steps if steps[index] == last]
        who = self._names(*behind) if len(behind) < self.count else "every process"
        verdict = f"{LOST_PEER} no step for {self._stall:g} s: {who} hangs at step {last}"
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
        hosts = {index: self._signs[index][0].split()[2] for index in indices}
        return ", ".join(f"process {i} of {self.count} on host {host}" for i, host in hosts.items())

    def _beat(self) -> None:
        self._put("alive", f"{time.monotonic()} {self._step} {socket.gethostname()}")

    def _put(self, folder: str, value: str) -> None:
        key = f"sprint_jax/{folder}/{self.index}"
        self._client.key_value_set(key, value, allow_overwrite=True)

    def _get(self, folder: str) -> dict[int, str]:
        entries = self._client.key_value_dir_get(f"sprint_jax/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in entries}
