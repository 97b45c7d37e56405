"""One thread, no hub, and the types and named shapes of signatures checked as the code runs."""

import gc
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

# Before torch is imported, and inherited by the processes that tests start: where cores are shared,
# two threads are many times slower than one on models as small as these.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype


def checked(function: Callable, *_: Any, **__: Any) -> Callable:
    """beartype, taking 1 for a float, and looking for the members of a protocol."""
    for name in list(vars(sys.modules[function.__module__]).values()):
        if isinstance(name, type) and getattr(name, "_is_protocol", False) and name is not Protocol:
            runtime_checkable(name)
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


# Only what is imported after this line is checked.
jaxtyping.install_import_hook("stepfuse.fuse", f"{__name__}.checked")
jaxtyping.config.update("jaxtyping_disable", True)
SHAPES_CHECKED = ("test_fuse_", "test_gate", "test_one_expert", "test_world", "test_sampler")


@pytest.fixture(scope="module", autouse=True)
def shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check types and named shapes at run time in the tests of the mathematics, and in all with JAXTYPING_DISABLE=0."""
    name = request.path.name
    is_checked = os.environ.get("JAXTYPING_DISABLE") == "0" or name.startswith(SHAPES_CHECKED)
    jaxtyping.config.update("jaxtyping_disable", not is_checked)
    yield
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests of what a function says to values that its annotations rule out."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def pytest_configure(config: pytest.Config) -> None:
    if not _network_selected(config):
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
    gc.disable()  # until tests begin: imports and collection make millions of objects, of which nearly all stay
    import torch

    torch.set_num_threads(1)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _import_libraries()


def _import_libraries() -> None:
    """Import large libraries before the import hook does, below which Python compiles them from source every time."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that torchvision is not installed
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401
    from peft import LoraConfig  # noqa: F401

    logging.set_verbosity(level)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the pretended device, which stays once it is there, unless it is asked for by its path."""
    folder = Path(__file__).parent / "pretended"
    asked = any(Path(argument.partition("::")[0]).absolute().is_relative_to(folder) for argument in config.args)
    return True if collection_path == folder and not asked else None


def pytest_collection_finish() -> None:
    gc.freeze()  # what is there stays, and is not gone through again at every collection of garbage
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files with slow tests first: with two workers one of them last would leave the other idle.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # within a file as they were
    reasons = {"gpu": _no_gpu, "network": lambda: _no_network(config), "originals": _no_originals}
    for mark, reason in reasons.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (why := reason()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=why))


def _network_selected(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr")
    return "network" in expression and "not network" not in expression


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device"


def _no_originals() -> str | None:
    wanted = os.environ.get("STEPFUSE_ORIGINALS") == "1"
    return None if wanted else "makes environments of several GB: set STEPFUSE_ORIGINALS=1"


def _no_network(config: pytest.Config) -> str | None:
    if not _network_selected(config):
        return "needs the hub: select it with -m network"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "needs the hub, and HF_HUB_OFFLINE is set"
    try:
        socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError as error:
        return f"needs the hub, which cannot be reached: {error}"
    return None


# Imported where they are used: conftest is read before the hub is switched off.


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of random weights in which a training step takes a fraction of a second."""
    from tests.fixtures_training import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("base") / "pipeline"
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it would be released: the one that scripts/test has built, or a new one."""
    from tests.fixtures_release import built_wheel

    return built_wheel(tmp_path_factory)


@pytest.fixture(scope="session")
def emoji_service() -> Any:
    """The bundled set, loaded to be served; not started."""
    from tests.fixtures_serve import load_service

    return load_service("emoji")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from tests.fixtures_page import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    from tests.fixtures_page import tab_of

    with tab_of(browser) as tab:
        yield tab


@pytest.fixture(scope="session")
def lora_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stable Diffusion and Stable Diffusion XL, for LoRAs of every kind."""
    from tests.fixtures_formats import load_bases

    return load_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def lora_adapters(lora_bases: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """An adapter and the UNet it comes from, by base and kind."""
    from tests.fixtures_formats import make_adapters

    return make_adapters(lora_bases, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def lora_factors(lora_adapters: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """Their factors by layer."""
    from tests.fixtures_formats import factors_of

    return factors_of(lora_adapters)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.fixtures_sets import save_bases

    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def originals(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fixtures_sets import save_adapters

    return save_adapters(tmp_path_factory.mktemp("adapters"), bases)


@pytest.fixture
def adapters(originals: Path, tmp_path: Path) -> Path:
    """A copy of the adapter folders, to be broken."""
    return shutil.copytree(originals, tmp_path / "adapters")


@pytest.fixture
def adapter_set(adapters: Path, tmp_path: Path) -> Path:
    """A set of `a` and `b`, to be broken."""
    from stepfuse.fuse.diffusion.variance import EtaSchedule
    from stepfuse.fuse.sets.create import create_set

    create_set(tmp_path / "set", [adapters / "a", adapters / "b"], base_schedule=EtaSchedule(eta=0.6))
    return tmp_path / "set"


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fixtures_tiny import save_stable_diffusion

    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def small_set(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two adapters, of one layer each."""
    from tests.fixtures_strangers import small_set

    return small_set(small_base, tmp_path_factory.mktemp("original"))


@pytest.fixture
def stranger(small_set: Path, tmp_path: Path) -> Path:
    """A copy of the small set, to be made evil."""
    return shutil.copytree(small_set, tmp_path / "set")


@pytest.fixture(scope="session")
def qwen_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen-Image and Z-Image of random weights."""
    from tests.fixtures_families import save_family

    folder = tmp_path_factory.mktemp("qwen")
    return {name: save_family(name, folder / name) for name in ("qwen_image", "z_image")}


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """An accelerator and chance of its own for what needs one outside a run of main()."""
    import torch

    from tests.fixtures_training import forget_accelerator

    forget_accelerator()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    forget_accelerator()


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A saved pipeline of random weights, of the flow-matching family in CONTRIBUTING."""
    from tests.fixtures_words import word_diffusion

    with word_diffusion(monkeypatch, tmp_path / "words") as folder:
        yield folder


@pytest.fixture
def run_training(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> Iterator[Callable]:
    """main() of train/, in a folder with prompts and the rewards that the module's REWARDS defines."""
    from tests.fixtures_training import run_main, training_desk

    with training_desk(monkeypatch, tmp_path, request.module.REWARDS):
        yield partial(run_main, monkeypatch, pretrained_model_name_or_path=tiny_base)
