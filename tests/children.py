"""Processes of their own that start at once: forked off a server that has imported torch and the package.

A new interpreter spends five seconds of processor time on those imports. The server (one for each process of pytest,
begun with its first child) spends them once. What a test needs of a process of its own stays: its own memory and
signals, its own environment, its own standard streams. Tests of imports, of the interpreter's flags, or of the
installed command start an interpreter of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

COMMAND = "import sys; from tailcache.scripts.cli import main; sys.exit(main(sys.argv[1:]))"
"""The code of the command; its arguments are those of the shell."""

FORKED = multiprocessing.get_context("forkserver")
"""The way of starting processes, for ``multiprocessing`` and ``concurrent.futures``."""

FORKED.set_forkserver_preload(
    ["tailcache.pipeline.capture", "tailcache.trainers.run", "transformers.models.llama.modeling_llama"]
)


class Child:
    """A running piece of Python code.

    Args:
      code: runs as ``python -c`` would run it, with the names of no other module.
      arguments: what it finds in ``sys.argv[1:]``.
      more: variables of its environment beside those of this process.
    """

    def __init__(self, code: str, *arguments: object, more: dict[str, str] | None = None) -> None:
        self._streams = tempfile.mkdtemp(prefix="child-")
        weakref.finalize(self, shutil.rmtree, self._streams, ignore_errors=True)
        environment = {**os.environ, **(more or {})}
        work = (code, [str(each) for each in arguments], environment, os.getcwd(), self._streams)
        self._process = FORKED.Process(target=_run, args=work, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; none while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 240) -> int:
        """Wait for its end, and give its exit status; a process that does not end is killed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise TimeoutError(f"still running after {timeout} s: {self.errors()}")
        return self._process.exitcode

    def printed(self) -> str:
        """What it has printed so far."""
        return Path(self._streams, "1").read_text()

    def errors(self) -> str:
        """What it has printed to the standard error stream so far."""
        return Path(self._streams, "2").read_text()


def run_child(code: str, *arguments: object, timeout: float = 240, more: dict[str, str] | None = None) -> str:
    """Run to the end, which must be a good one, and give what was printed."""
    child = Child(code, *arguments, more=more)
    status = child.wait(timeout)
    assert status == 0, f"exit status {status}: {child.errors()[-3000:]}"
    assert "Traceback" not in child.errors()
    return child.printed()


def run_group(code: str, *arguments: object, size: int) -> list[str]:
    """Run as processes of one ``torch.distributed`` group on this machine, as a launcher would start them."""
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "CUDA_VISIBLE_DEVICES": ""}
    group = [
        Child(code, *arguments, more={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
    ]
    for child in group:
        status = child.wait()
        assert status == 0, f"exit status {status}: {child.errors()[-3000:]}"
    return [child.printed() for child in group]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _run(code: str, arguments: Sequence[str], environment: dict[str, str], folder: str, streams: str) -> None:
    import torch

    for number in (1, 2):
        descriptor = os.open(os.path.join(streams, str(number)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})
