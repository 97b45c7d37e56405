"""What counts as a wait, each kind by an example."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stepfuse.data.devices import to_device
from tests.pretended.waits import counted


def pinned():
    return torch.ones(3).pin_memory()


WAITS = {  # x is on the device, mask and index too
    "scalar": {
        "item": lambda x, mask, index: x.sum().item(),
        "float": lambda x, mask, index: float(x.sum()),
        "bool": lambda x, mask, index: bool(mask.all()),
        "in a condition": lambda x, mask, index: 1 if x.sum() > 0 else 0,
        "formatted": lambda x, mask, index: f"{x.sum():.1f}",
        "equal": lambda x, mask, index: torch.equal(x, x),
        "allclose": lambda x, mask, index: torch.allclose(x, x),
        "masked_fill by a tensor": lambda x, mask, index: x.masked_fill(mask, x.sum()),
    },
    "shape": {
        "nonzero": lambda x, mask, index: mask.nonzero(),
        "a mask as index": lambda x, mask, index: x[mask],
        "values through a mask": lambda x, mask, index: x.index_put_((mask,), x[:2] * 2),
        "masked_select": lambda x, mask, index: x.masked_select(mask),
        "unique": lambda x, mask, index: index.unique(),
        "bincount": lambda x, mask, index: index.bincount(),
        "repeat_interleave": lambda x, mask, index: x.repeat_interleave(index),
    },
    "D2H": {
        "cpu": lambda x, mask, index: x.cpu(),
        "to": lambda x, mask, index: x.to("cpu"),
        "tolist": lambda x, mask, index: x.tolist(),
        "copy_": lambda x, mask, index: torch.empty(3).copy_(x),
        "copy_ to pageable memory": lambda x, mask, index: torch.empty(3).copy_(x, non_blocking=True),
    },
    "H2D": {
        "to": lambda x, mask, index: torch.ones(3).to("cuda"),
        "cuda": lambda x, mask, index: torch.ones(3).cuda(),
        "tensor": lambda x, mask, index: torch.tensor([1.0, 2.0], device="cuda"),
        "copy_": lambda x, mask, index: x.copy_(torch.ones(3)),
        "blocking from pinned memory": lambda x, mask, index: pinned().to("cuda"),
        "non_blocking from pageable memory": lambda x, mask, index: torch.ones(3).to("cuda", non_blocking=True),
        "an index on the host": lambda x, mask, index: x[torch.tensor([0, 2])],
        "a list as index": lambda x, mask, index: x[[0, 2]],
    },
    "synchronize": {
        "device": lambda x, mask, index: torch.cuda.synchronize(),
        "stream": lambda x, mask, index: torch.cuda.current_stream().synchronize(),
        "event": lambda x, mask, index: torch.cuda.Event().synchronize(),
        "empty_cache": lambda x, mask, index: torch.cuda.empty_cache(),
    },
}
NONE = {
    "arithmetic": lambda x, mask, index: (x * 2 + 1).clamp(max=2).sort(),
    "an index on the device": lambda x, mask, index: x[index],
    "slices": lambda x, mask, index: x[1:].view(1, -1).expand(2, -1),
    "where": lambda x, mask, index: torch.where(mask, x, 0.0),
    "one value through a mask": lambda x, mask, index: x.__setitem__(mask, 2.0),
    "masked_fill by a number": lambda x, mask, index: x.masked_fill(mask, 2.0),
    "repeat_interleave of known size": lambda x, mask, index: x.repeat_interleave(index, output_size=3),
    "tensors of nothing": lambda x, mask, index: torch.full((2,), 3.0, device="cuda"),
    "non_blocking from pinned memory": lambda x, mask, index: pinned().to("cuda", non_blocking=True),
    "a view of pinned memory": lambda x, mask, index: pinned()[1:].to("cuda", non_blocking=True),
    "copy_ from pinned memory": lambda x, mask, index: x.copy_(pinned(), non_blocking=True),
    "to_device": lambda x, mask, index: to_device(torch.ones(3), "cuda", torch.float16),
    "non_blocking to the host": lambda x, mask, index: x.to("cpu", non_blocking=True),
    "copy_ to pinned memory": lambda x, mask, index: pinned().copy_(x, non_blocking=True),
    "a number of the host": lambda x, mask, index: (torch.ones(3).sum().item(), x + torch.tensor(2.0)),
    "a stream that waits": lambda x, mask, index: torch.cuda.current_stream().wait_event(torch.cuda.Event()),
}


def kinds_of(work):
    index = torch.tensor([1, 0, 2]).to("cuda")
    x, mask = torch.ones(3, device="cuda"), index > 0
    with counted() as waits:
        work(x, mask, index)
    return dict(waits.kinds)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, works in WAITS.items() for name in works])
def test_it_waits(kind, name):
    found = kinds_of(WAITS[kind][name])
    assert set(found) == {kind}
    assert found[kind] == 1


@pytest.mark.parametrize("name", NONE)
def test_it_does_not_wait(name):
    assert kinds_of(NONE[name]) == {}


def test_pinned_memory_that_was_freed_is_forgotten():
    address = pinned().untyped_storage().data_ptr()
    again = [torch.ones(3) for _ in range(10)]  # one of them lies there
    assert not any(each.is_pinned() for each in again), address


def test_waits_of_another_thread_are_counted_apart():
    x = torch.ones(3, device="cuda")
    with counted() as waits, ThreadPoolExecutor(1) as pool:
        pool.submit(x.cpu).result()
        x.sum().item()
    assert dict(waits.kinds) == {"scalar": 1}
    assert [kind for kind, _, _ in waits.elsewhere] == ["D2H"]


def test_waits_of_a_backward_pass_hold_up_the_thread_that_called_it():
    def read(x):
        number = x.detach().sum().item()
        return x * x * number

    x = torch.ones(3, device="cuda", requires_grad=True)
    with counted() as waits:
        checkpoint(read, x, use_reentrant=False).sum().backward()  # which is computed again in autograd's own thread
    assert dict(waits.kinds) == {"scalar": 2}
    assert not waits.elsewhere


def test_a_wait_is_known_by_the_line_of_the_project():
    with counted() as waits:
        to_device(torch.ones(3, device="cuda"), "cpu")
    ((kind, operator, line),) = waits.lines
    assert (kind, operator) == ("D2H", "aten._to_copy.default")
    assert line.startswith("data/devices.py:")


def test_within_another_count_both_count():
    x = torch.ones(3, device="cuda")
    with counted() as outer:
        x.cpu()
        with counted() as inner:
            x.cpu()
    assert (outer.total, inner.total) == (2, 1)
