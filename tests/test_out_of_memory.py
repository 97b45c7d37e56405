"""Memory that does not suffice: an error of a reward stays what it is, and programs name what reduces it."""

import pytest
import torch

from stepfuse.data.out_of_memory import first_sentence, is_out_of_memory
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.weighted import as_sum
from stepfuse.scripts.cli.main import main
from stepfuse.train.memory import oom_hints
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_tiny import refused

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB."
SHORT = "CUDA out of memory: Tried to allocate 20.00 MiB"
PIXELS = torch.zeros(2, 3, 8, 8)


def hungry(images, prompts):
    raise torch.OutOfMemoryError(FULL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FULL, SHORT),
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 400000000000000 bytes. Error code 12 (Cannot allocate memory)",
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000000000 bytes",
        ),
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`.", "CUDA error: out of memory Compile with "),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: CUBLAS_STATUS_A"),
    ],
)
def test_errors_of_allocation_are_known_and_say_what_was_asked_for(text, said):
    error = RuntimeError(text)
    assert is_out_of_memory(error)
    assert first_sentence(error).startswith(said)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), MemoryError("no room")])
def test_a_reward_that_runs_out_of_memory_says_so_as_it_is(error):
    def reward(images, prompts):
        raise error

    with pytest.raises(type(error)) as raised:
        score(as_sum(reward, "mine"), PIXELS, ["", ""])
    assert raised.value is error


@pytest.mark.parametrize(("aside", "knob"), [(True, "--no_async_scoring (now on"), (False, "--reward_dtype bfloat16")])
def test_training_names_settings_of_rewards_and_of_decoding(tmp_path, aside, knob):
    (tmp_path / "mine.py").write_text("def hungry(images, prompts): raise MemoryError('no room')\n")
    settings = DDPOSettings(reward=f"{tmp_path}/mine.py:hungry", async_scoring=aside, decode_batch_size=4)
    reward = TrainingReward(settings)
    with refused("out of memory (no room)", knob, "--decode_batch_size 1 (now 4)"), oom_hints(settings):
        reward.queue.submit(lambda: reward.unshaped(PIXELS, ["", ""])).result()
    reward.close()


def test_settings_that_would_not_help_are_not_named():
    settings = DPOSettings(async_scoring=False, decode_batch_size=1, reward_dtype="bfloat16")
    with pytest.raises(ValueError, match="out of memory") as raised, oom_hints(settings):
        hungry(PIXELS, [])
    assert str(raised.value).startswith(f"out of memory ({SHORT}); these settings")
    for knob in ("async_scoring", "decode_batch_size", "reward_dtype"):
        assert knob not in str(raised.value)


def test_a_worker_that_runs_out_of_memory_is_no_faulty_reward(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class OutOfMemoryError(RuntimeError): pass\n"
        "def hungry(images, prompts): raise OutOfMemoryError('CUDA out of memory')\n"
    )
    (tmp_path / "mine.yaml").write_text("worker: {function: mine.py:hungry}\n")
    reward = load_reward(str(tmp_path / "mine.yaml"))
    try:
        with pytest.raises(MemoryError, match=r"worker 'mine'.*CUDA out of memory"):
            score(reward, PIXELS, ["", ""])
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("command", "knobs"),
    [
        (
            "sample emoji --prompt x --batch_size 3 --output {0}/a.png",
            ["--batch_size, smaller (now 3)", "--rows_at_once", "--decode_batch_size 1", "--dtype bfloat16"],
        ),
        (
            "evaluate emoji --config eval/emoji --output_dir {0}/out",
            ["batch_size in --config", "--decode_batch_size 1", "--reward_dtype bfloat16"],
        ),
    ],
    ids=["sample", "evaluate"],
)
def test_a_command_names_its_options_that_reduce_memory(tmp_path, monkeypatch, command, knobs):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("stepfuse.fuse.sampling.sampler.load_backbone", full)
    with pytest.raises(SystemExit) as exited:
        main(command.format(tmp_path).split())
    line = exited.value.code
    assert line.startswith(f"error: out of memory ({SHORT})")
    assert "\n" not in line
    for knob in knobs:
        assert knob in line
    assert list(tmp_path.iterdir()) == []
