"""The stages of training the bundled emoji base: the autoencoder, CLIP, and the UNet with its text encoder."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from stepfuse.data import emoji
from stepfuse.data.images import to_pixels
from stepfuse.rewards.pixels import normalise
from stepfuse.scripts.emoji import models
from stepfuse.scripts.emoji.fit import STAGES, autocast, fit, load_average
from stepfuse.scripts.emoji.images import draw_batch, render

RENDERS_PER_PROMPT = 14


def train_vae(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    fit_autoencoder("vae", models.new_vae(), pictures, noise=0.1, folder=folder, steps=steps, seed=seed)


def fit_autoencoder(
    name: str,
    vae: AutoencoderTiny,
    pictures: dict[str, Image.Image],
    *,
    noise: float,
    folder: Path,
    steps: int,
    seed: int,
) -> None:
    """L1 on pixels and on differences of neighbours, with noise on the unit-variance latents for a smooth decoder."""

    def loss(generator: torch.Generator) -> Tensor:
        _, x = draw_batch(pictures, STAGES[name].batch_size, generator)
        with autocast():
            z = vae.encode(x).latents.float()
            y = vae.decode(z + noise * torch.randn(z.shape, generator=generator)).sample.float()
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        return (y - x).abs().mean() + 0.5 * (y - x).square().mean() + edges + 0.05 * spread

    fit(name, vae, loss, folder=folder, steps=steps, seed=seed)


def load_vae(folder: Path) -> AutoencoderTiny:
    return load_average("vae", models.new_vae(), folder)


def train_clip(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    """Symmetric contrastive loss on pictures, half of them passed through the autoencoder with noise.

    Captions of both splits are used: the reward must know all of them.
    """
    tokenizer, vae = models.build_tokenizer(folder), load_vae(folder)
    clip = models.new_clip(tokenizer)
    size = STAGES["clip"].batch_size
    split = ((size - size // 6, False), (size // 6, True))  # as many held-out captions as there are

    def loss(generator: torch.Generator) -> Tensor:
        batches = [draw_batch(pictures, n, generator, held_out=h) for n, h in split]
        captions = batches[0][0] + batches[1][0]
        x = torch.cat([batch[1] for batch in batches])
        with torch.no_grad(), autocast():
            z = vae.encode(x[::3]).latents.float()
            level = 0.5 * torch.rand(len(z), 1, 1, 1, generator=generator)
            x[::3] = vae.decode(z + level * torch.randn(z.shape, generator=generator)).sample.float()
        x = (x.clamp(-1, 1) + 1) / 2
        ids = models.tokenize(tokenizer, captions)
        with autocast():
            output = clip(input_ids=ids, attention_mask=None, pixel_values=normalise(x))
        logits = output.logits_per_image.float()
        # All images of a caption are targets.
        same = torch.tensor([[a == b for b in captions] for a in captions]).float()
        target = same / same.sum(1, keepdim=True)
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    fit("clip", clip, loss, folder=folder, steps=steps, seed=seed + 1)


def latent_bank(pictures: dict[str, Image.Image], vae: AutoencoderTiny, file: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Latents and caption indices of `RENDERS_PER_PROMPT` renders of every training prompt, kept in a file."""
    if not file.exists():
        generator = torch.Generator().manual_seed(seed)
        pool = [prompt for prompt in emoji.prompts() if not prompt.held_out]
        latents, labels = [], []
        for index, prompt in enumerate(tqdm(pool, desc="latents", mininterval=20)):
            picture = pictures[prompt.concept]
            renders = [to_pixels(render(picture, prompt.background, generator)) for _ in range(RENDERS_PER_PROMPT)]
            with torch.no_grad(), autocast():
                latents.append(vae.encode(torch.stack(renders) * 2 - 1).latents.half())
            labels += [index] * RENDERS_PER_PROMPT
        torch.save({"latents": torch.cat(latents), "labels": torch.tensor(labels)}, file)
    saved = torch.load(file, weights_only=True)
    return saved["latents"], saved["labels"]


def train_unet(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    """v-prediction with SD's schedule; a tenth of the captions are replaced by "" for guidance.

    Times are drawn logit-normally (arXiv:2403.03206): the middle of the path decides on shapes.
    """
    tokenizer, scheduler = models.build_tokenizer(folder), models.new_scheduler()
    latents, labels = latent_bank(pictures, load_vae(folder), folder / "latents.pt", seed + 2)
    scale = 1 / latents.float().std()
    ids = models.tokenize(tokenizer, [p.caption for p in emoji.prompts() if not p.held_out] + [""])
    model = models.new_denoiser(tokenizer)
    size = STAGES["unet"].batch_size

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        x_0 = latents[chosen].float() * scale
        label = labels[chosen].masked_fill(torch.rand(size, generator=generator) < 0.1, len(ids) - 1)
        noise = torch.randn(x_0.shape, generator=generator)
        t = (1000 * torch.sigmoid(0.3 + torch.randn(size, generator=generator))).long().clamp(max=999)
        x_t = scheduler.add_noise(x_0, noise, t)
        with autocast():
            states = model["text_encoder"](ids[label]).last_hidden_state
            v = model["unet"](x_t, t, states).sample.float()
        return functional.mse_loss(v, scheduler.get_velocity(x_0, noise, t))

    fit("unet", model, loss, folder=folder, steps=steps, seed=seed + 3)
