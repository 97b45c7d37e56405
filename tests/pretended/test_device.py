"""The pretended device itself: what it refuses, what it holds, and where it is not to be had."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

from tests.pretended.device import CUDA, DeviceMix, Pretend, install
from tests.pretended.torch_layout import unavailable


def on_both():
    return torch.ones(3), torch.ones(3, device="cuda")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda host, device: host + device,
        lambda host, device: host + device.sum(),
        lambda host, device: host.add_(device.sum()),
        lambda host, device: torch.stack([host.sum(), device.sum()]),
        lambda host, device: torch.where(device > 0, host, device),
        lambda host, device: host[torch.tensor([0], device="cuda")],
        lambda host, device: device.index_put_((torch.tensor([0]),), host[:1]),
        lambda host, device: nn.Linear(3, 3)(device),
        lambda host, device: nn.functional.mse_loss(host, device),
        lambda host, device: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda host, device: torch.randn(3, generator=torch.Generator("cuda")),
        lambda host, device: device.normal_(generator=torch.Generator()),
        lambda host, device: device.pin_memory(),
    ],
)
def test_operands_of_two_devices_are_refused(wrong):
    with pytest.raises(RuntimeError):
        wrong(*on_both())


def test_numpy_has_no_tensor_of_the_device():
    with pytest.raises((RuntimeError, TypeError)):
        torch.ones(3, device="cuda").numpy()


def test_what_a_gpu_takes_from_the_host_is_taken():
    host, device = on_both()
    assert (device + host.sum()).tolist() == [4, 4, 4]
    assert torch.where(device > 0, device, host.sum()).tolist() == [1, 1, 1]
    assert device[torch.tensor([0, 1])].device == CUDA
    assert device.copy_(host).device == CUDA
    assert host.to("cuda").add_(1).cpu().tolist() == [2, 2, 2]


@pytest.mark.parametrize("make", [torch.zeros, torch.rand, torch.arange, torch.eye, torch.randperm, torch.empty])
def test_tensors_are_made_on_the_device(make):
    assert isinstance(make(3, device="cuda"), Pretend)
    assert type(make(3)) is torch.Tensor


def test_a_generator_of_the_device_draws_the_numbers_of_the_cpu():
    drawn = torch.randn(5, device="cuda", generator=torch.Generator("cuda").manual_seed(7))
    assert drawn.tolist() == torch.randn(5, generator=torch.Generator().manual_seed(7)).tolist()
    assert torch.Generator("cuda").device == CUDA
    assert torch.Generator().device == torch.device("cpu")


def test_gradients_are_on_the_device_and_autocast_is_that_of_cuda():
    weight = torch.ones(3, 3, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        product = torch.ones(2, 3, device="cuda") @ weight
        assert nn.functional.softmax(product, 1).dtype == torch.float32
    product.sum().backward()
    assert (product.dtype, weight.grad.device, weight.grad.dtype) == (torch.bfloat16, CUDA, torch.float32)
    assert weight.grad.tolist() == [[2, 2, 2]] * 3


def test_a_module_moves_there_and_back_and_is_copied():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.to("cuda")
    assert {value.device for value in module.state_dict().values()} == {CUDA}
    twin = copy.deepcopy(module)
    assert twin[0].weight is not module[0].weight
    assert isinstance(twin[0].weight, nn.Parameter)
    twin.cpu()
    assert module[0].weight.device == CUDA
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_a_pickled_tensor_is_read_on_the_cpu():
    read = pickle.loads(pickle.dumps(torch.ones(2, device="cuda")))
    assert (type(read), read.tolist()) == (torch.Tensor, [1, 1])


def test_every_thread_has_the_device():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.ones(1, device="cuda").device))
    thread.start()
    thread.join()
    assert seen == [CUDA]


def test_views_in_inference_mode_are_such_as_torch_makes():
    outside = torch.ones(4, device="cuda")
    with torch.inference_mode():
        assert not outside[1:].is_inference()
        assert (outside * 2).is_inference()
        assert torch.nn.functional.linear(outside, torch.ones(2, 4, device="cuda")).tolist() == [4, 4]


def test_a_refusal_names_operator_and_shapes():
    with pytest.raises(DeviceMix, match=r"aten\.add\.Tensor.*cpu\(3,\), cuda\(3,\)"):
        torch.ones(3) + torch.ones(3, device="cuda")


@pytest.mark.parametrize(
    ("place", "name", "value", "said"),
    [
        (sys, "platform", "darwin", "needs Linux, and this is darwin"),
        (torch.version, "cuda", "13.0", "needs a CPU build of torch"),
        (torch, "__version__", "2.99.1", "knows the layout of torch 2.13, and this is 2.99.1"),
        (torch, "__version__", torch.__version__, "would take the place of another"),  # that which is installed
    ],
)
def test_elsewhere_the_reason_is_said(monkeypatch, place, name, value, said):
    monkeypatch.setattr(place, name, value)
    unavailable.cache_clear()
    install.cache_clear()
    try:
        assert said in unavailable()
        with pytest.raises(RuntimeError, match=said):
            install()
    finally:
        monkeypatch.undo()
        unavailable.cache_clear()


def test_the_tests_are_skipped_with_the_reason(request, monkeypatch):
    conftest = request.config.pluginmanager.get_plugin(str(request.path.with_name("conftest.py")))
    monkeypatch.setattr(conftest, "unavailable", lambda: "no place for it")
    module = conftest.pytest_pycollect_makemodule(request.path, request.node.parent.parent)
    with pytest.raises(pytest.skip.Exception, match="no place for it"):
        module.collect()
