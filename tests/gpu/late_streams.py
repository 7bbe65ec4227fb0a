"""A fake of CUDA's streams that works as late as possible: work that nobody waits for is not done."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fasttrain.data.loading import prefetch as feed_module

UNKNOWN = 238  # what a kernel reads from memory before its copy is done


class Stream:
    """A queue of work, done only when another stream or the host waits for it."""

    def __init__(self, device: Any = None) -> None:
        self.work: list[Callable[[], Any]] = []
        self.done, self.lock = 0, threading.Lock()

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.finish()


class Event:
    """A position in a stream's queue."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream, self.place = Stream(), 0

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, len(stream.work)

    def finish(self) -> None:
        with self.stream.lock:
            while self.stream.done < self.place:
                self.stream.work[self.stream.done]()
                self.stream.done += 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class _Cuda:
    """The part of torch.cuda that the feed uses."""

    def __init__(self) -> None:
        self.present, self.own = Stream(), threading.local()
        self.Stream, self.Event = Stream, Event

    def current_stream(self, device: Any = None) -> Stream:
        stream: Stream = getattr(self.own, "stream", None) or self.present
        return stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.own.stream = stream
        try:
            yield
        finally:
            self.own.stream = None

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()


class _Torch:
    """torch with another torch.cuda."""

    def __init__(self, cuda: _Cuda) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class LateStreams:
    """Makes the feed use host tensors as if on a GPU; records which tensors the current stream uses."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.device = torch.device("cuda")
        self.recorded: set[int] = set()
        cuda = _Cuda()
        real: Callable[..., Tensor] = Tensor.to

        def to(tensor: Tensor, *args: Any, non_blocking: bool = False, **options: Any) -> Tensor:
            if not (args and isinstance(args[0], torch.device) and args[0].type == "cuda"):
                return real(tensor, *args, non_blocking=non_blocking, **options)
            copy = torch.full_like(tensor, UNKNOWN if tensor.dtype == torch.uint8 else -1)
            if non_blocking:  # the source is read when the copy is done
                cuda.current_stream().work.append(lambda: copy.copy_(tensor))
            else:
                copy.copy_(tensor)
            return copy

        patch.setattr(Tensor, "to", to)
        if Tensor.pin_memory is _PIN_MEMORY:  # no defect is planted there
            patch.setattr(Tensor, "pin_memory", Tensor.clone)
        if Tensor.record_stream is _RECORD_STREAM:
            patch.setattr(Tensor, "record_stream", lambda tensor, stream: self.recorded.add(id(tensor)))
        patch.setattr(feed_module, "torch", _Torch(cuda))


_PIN_MEMORY, _RECORD_STREAM = Tensor.pin_memory, Tensor.record_stream
