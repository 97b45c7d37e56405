"""Pictures, rewards and prompts on the pretended device: their precision, their streams, and where they are kept."""

from tests.pretended.device import counted, install

install()

from types import SimpleNamespace  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from stepfuse.fuse.backbones.loading import load_pipeline  # noqa: E402
from stepfuse.fuse.backbones.registry import backbone_of  # noqa: E402
from stepfuse.rewards.scoring_queue import ScoringQueue  # noqa: E402
from stepfuse.train.conditioning import Embeddings  # noqa: E402
from stepfuse.train.loop import train_adapter  # noqa: E402
from stepfuse.train.scoring import Scorer, TrainingReward  # noqa: E402
from stepfuse.train.settings import DDPOSettings, DPOSettings  # noqa: E402
from tests.fixtures_tiny import LATENT, generators, save_stable_diffusion_xl  # noqa: E402
from tests.fixtures_training import COMMON, forget_accelerator, save_tiny_pipeline  # noqa: E402
from tests.pretended.streams import DEFAULT, current_stream  # noqa: E402

PROMPTS = ["a red apple on a blue background", "a fox on a green background"]
HALF = torch.autocast("cuda", dtype=torch.float16)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """An SDXL in float16 whose autoencoder overflows there, and the types that its layers compute in."""
    folder = save_stable_diffusion_xl(tmp_path_factory.mktemp("xl"), vae={"force_upcast": True})
    backbone = backbone_of(load_pipeline(str(folder), dtype=torch.float16).to("cuda"))
    seen = []
    pipeline = backbone.pipeline
    layers = (pipeline.vae.decoder.conv_in, pipeline.vae.encoder.conv_in)
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return SimpleNamespace(backbone=backbone, seen=seen)


@pytest.fixture
def reward():
    made = TrainingReward(DPOSettings(reward="colourfulness", async_scoring=False), "cuda")
    yield made
    made.close()


def test_candidates_are_decoded_in_the_precision_that_the_vae_needs(xl, reward):
    xl.seen.clear()
    scorer = Scorer(reward, xl.backbone, PROMPTS, 0)
    latents = torch.zeros(4, *LATENT, device="cuda")
    scorer.terms(latents[:2]).result()  # as DDPO does, after its rollout
    with HALF:  # as DPO does, within it
        scorer(latents).result()
    assert xl.seen == [torch.float32, torch.float32]


def test_pictures_and_prompts_are_encoded_outside_autocast(xl):
    xl.seen.clear()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder = xl.backbone.pipeline.text_encoder
    encoder.to(torch.float32)
    hooked = next(module for name, module in encoder.named_modules() if name.endswith("layers.0.mlp.fc1"))
    types = []
    handle = hooked.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with HALF:
        within = xl.backbone.encode_pixels(pixels, generators(0, 1))
        xl.backbone.encode(PROMPTS)
    handle.remove()
    encoder.to(torch.float16)
    assert xl.seen == [torch.float32]
    assert set(types) == {torch.float32}
    assert torch.equal(within, xl.backbone.encode_pixels(pixels, generators(0, 1)))


@pytest.mark.parametrize("ahead", [0, 2])
def test_rewards_are_computed_outside_autocast_and_inference_mode(ahead):
    queue = ScoringQueue(ahead, "cuda")
    a = torch.rand(3, 3, device="cuda")

    def gradient_norm():
        with torch.enable_grad():
            x = a.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((x @ a).square().sum(), x)
        return gradient.norm()

    with HALF, torch.inference_mode():
        found = queue.submit(gradient_norm, a).result()
    queue.close()
    assert found.dtype == torch.float32
    assert torch.equal(found, gradient_norm().detach())


def test_rewards_are_computed_on_a_stream_of_their_own():
    queue, used = ScoringQueue(2, "cuda"), []
    pixels = torch.rand(2, 3, 8, 8, device="cuda")

    def mean():
        used.append(current_stream())
        return pixels.mean((1, 2, 3))

    found = queue.submit(mean, pixels).result()
    queue.close()
    (stream,) = used
    assert stream is not DEFAULT
    assert [event.stream for event in stream.waited_for] == [DEFAULT]  # the pixels are there before they are read
    assert [values is pixels for values in stream.kept] == [True]  # and stay until they have been
    assert DEFAULT.kept[-1] is found
    assert current_stream() is DEFAULT
    assert torch.equal(found, pixels.mean((1, 2, 3)))


def test_embeddings_are_kept_in_pinned_memory_of_the_host_and_uploaded_without_a_wait(xl):
    embed = Embeddings(xl.backbone, torch.device("cuda"))
    first = embed(PROMPTS)
    kept = [value for row in embed._known.values() for part in (row.positive, row.negative) for value in part.values()]
    assert {(value.device.type, value.is_pinned()) for value in kept} == {("cpu", True)}
    with counted() as waits:
        again = embed(PROMPTS)
    assert waits.kinds == {}
    for found, known in ((again.positive, first.positive), (again.negative, first.negative)):
        for name, value in found.items():
            assert value.device.type == "cuda"
            assert torch.equal(value, known[name])


def test_the_host_waits_once_for_the_rewards_of_a_rollout(tmp_path):
    """Advantages, diversity and means are computed where the rewards are then, on the host."""
    save_tiny_pipeline(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    own = dict(
        pretrained_model_name_or_path=str(tmp_path / "pipeline"),
        prompts=str(tmp_path / "prompts.txt"),
        output_dir=str(tmp_path / "out"),
        reward="colourfulness",
        sample_num_steps=2,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        num_generations=2,
        num_validation_images=1,
        max_train_steps=2,
    )
    forget_accelerator()
    with counted() as waits:
        train_adapter(DDPOSettings(**COMMON | own))
    files = {"train/collect.py": 0, "train/health.py": 0, "train/advantages.py": 0}
    for (_, _, line), count in waits.lines.items():
        file = line.partition(":")[0]
        if file in files:
            files[file] += count
    assert files["train/collect.py"] == 2  # of two steps
    assert files["train/health.py"] == files["train/advantages.py"] == 0
