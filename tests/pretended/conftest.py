"""The pretended device is installed before a test module is imported; where it cannot be, all are skipped."""

import pytest

from tests.pretended.device import install, unavailable

if unavailable() is None:
    install()


class Skipped(pytest.Module):
    """A module that is not imported."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(unavailable(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if unavailable() else None


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a set that every rule can sample."""
    from tests.pretended.worlds import save_world  # after pytest has sorted out warnings of imports

    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def samplers(world):
    from tests.pretended.worlds import load_sampler

    return {device: load_sampler(world, device) for device in ("cpu", "cuda")}
