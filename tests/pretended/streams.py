"""CUDA streams and events of the pretended device: which one a thread is on, and who waits for whom."""

import threading
from contextlib import contextmanager

import torch

from tests.pretended.tensors import CUDA
from tests.pretended.waits import wait

_thread = threading.local()


class Event:
    def __init__(self, stream=None, **_):
        self.stream = stream

    def record(self, stream=None):
        self.stream = stream or current_stream()

    def wait(self, stream=None):
        (stream or current_stream()).wait_event(self)

    def query(self):
        return True

    def synchronize(self):
        wait("synchronize", "Event.synchronize")

    def elapsed_time(self, _):
        return 0.0


class Stream:
    """A stream, with the events that it waited for and the tensors whose memory it keeps."""

    def __init__(self, device=None, **_):
        self.device, self.waited_for, self.kept = CUDA, [], []
        self.cuda_stream = id(self)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        self.waited_for.append(event)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        wait("synchronize", "Stream.synchronize")

    def query(self):
        return True


DEFAULT = Stream()


def current_stream(device=None):
    return getattr(_thread, "stream", DEFAULT)


@contextmanager
def use_stream(stream):
    before = current_stream()
    _thread.stream = stream or before
    try:
        yield
    finally:
        _thread.stream = before


def install_streams(tensor_class) -> None:
    """`torch.cuda.Stream` and what goes with it; tensors of the device are of this class."""
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = Stream, Event, use_stream
    torch.cuda.current_stream = current_stream
    torch.cuda.default_stream = lambda device=None: DEFAULT
    tensor_class.record_stream = lambda self, stream: stream.kept.append(self)
