"""The variance that `stepfuse set import` and `set create` are told, for a LoRA or a base that does not state it."""

import pytest

from stepfuse.fuse.diffusion.sde import SDESchedule
from stepfuse.fuse.diffusion.share import ShareSchedule
from stepfuse.fuse.diffusion.variance import EtaSchedule, TableSchedule
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.cli.main import main
from tests.fixtures_tiny import save_adapter


@pytest.fixture(scope="module")
def stranger(small_base, tmp_path_factory):
    """The file of a LoRA alone."""
    folder = tmp_path_factory.mktemp("stranger")
    save_adapter(folder, small_base, "style")
    return folder / WEIGHTS


def run(*arguments):
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("declared", "schedule"),
    [
        (("sde", "noise_level=0.7"), SDESchedule(noise_level=0.7)),
        (("share", "share=0.794"), ShareSchedule(share=0.794)),
        (("table", "etas=[0.9,0.5]"), TableSchedule(etas=(0.9, 0.5))),
    ],
)
def test_an_imported_lora_and_the_reference_of_a_set_may_have_any_variance(
    stranger, small_base, tmp_path, declared, schedule, capsys
):
    kind, option = declared
    own = ("--variance", kind, "--variance-options", option)
    run("set", "import", stranger, "--objective", "style", *own, "--set", tmp_path / "set", "--base", small_base)
    loaded = load_set(tmp_path / "set")
    assert (loaded.adapters[0].objective.variance, loaded.base_schedule) == (schedule, EtaSchedule(eta=1.0))
    reference = ("--reference_variance", kind, "--reference_variance_options", option)
    run("set", "create", tmp_path / "copy", "--adapter", tmp_path / "set" / "style", *reference)
    copied = load_set(tmp_path / "copy")
    assert copied.base_schedule == copied.adapters[0].objective.variance == schedule


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ((), "expected --eta, or --variance"),
        (("--eta", 1, "--variance", "sde"), "--eta 1 and --variance sde"),
        (("--variance_options", "share=0.5"), "share=0.5 without --variance"),
        (("--variance", "sde"), "noise_level"),
        (("--variance", "share", "--variance_options", "share=2"), "share is 2; expected a number in [0, 1]"),
        (("--variance", "share", "--variance_options", "share=much"), "'share=much'; expected NAME=NUMBER"),
    ],
)
def test_a_variance_that_is_not_declared_rightly_is_refused(stranger, small_base, tmp_path, words, culprit):
    place = ("--set", tmp_path / "set", "--base", small_base)
    with pytest.raises(SystemExit) as error:
        run("set", "import", stranger, "--objective", "style", *place, *words)
    assert culprit in str(error.value.code)
    assert "\n" not in str(error.value.code)
    assert not (tmp_path / "set").exists()
