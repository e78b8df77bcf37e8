"""Threads that work ahead of a consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch

__all__ = ["ahead", "on_device"]

Item = TypeVar("Item")


def on_device() -> Callable[[], None]:
    """What a new thread is to call so that it uses the GPU this one does: it would begin on the first."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def choose() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    return choose


def ahead(items: Generator[Item], depth: int) -> Generator[Item]:
    """The same items, made by a thread that is some items ahead; errors come where the item would have.

    Leaving early closes ``items`` and waits for the thread.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    left = threading.Event()
    choose_device = on_device()

    def offer(kind: str, value: Any) -> bool:
        while not left.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def produce() -> None:
        try:
            choose_device()
            try:
                for item in items:
                    if not offer("item", item):
                        break
            finally:
                items.close()
            offer("end", None)
        except BaseException as error:
            offer("error", error)

    thread = threading.Thread(target=produce, name="tailcache-batches", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        left.set()
        thread.join()
