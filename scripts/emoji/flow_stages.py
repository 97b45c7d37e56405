"""The stages of training the bundled flow base: its autoencoder, and the transformer with its second text encoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.scripts.emoji import flow_models
from stepfuse.scripts.emoji.fit import STAGES, autocast, fit, load_average
from stepfuse.scripts.emoji.models import tokenize
from stepfuse.scripts.emoji.stages import fit_autoencoder, latent_bank


def train_flow_vae(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    vae = flow_models.new_flow_vae()
    fit_autoencoder("flow_vae", vae, pictures, noise=0.05, folder=folder, steps=steps, seed=seed + 10)


def load_flow_vae(folder: Path) -> AutoencoderTiny:
    return load_average("flow_vae", flow_models.new_flow_vae(), folder)


def flow_texts(
    encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor, max_sequence_length: int
) -> tuple[Tensor, Tensor]:
    """Prompt and pooled embeddings as `StableDiffusion3Pipeline.encode_prompt` gives them without T5."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    absent = states.new_zeros(len(ids), max_sequence_length, states.shape[-1])
    return torch.cat([states, absent], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


def train_flow(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    """Rectified flow: the velocity e - x_0 at x_t = (1 - t) x_0 + t e, logit-normal times (arXiv:2403.03206).

    A tenth of the captions are replaced by "", for guidance.
    """
    tokenizer = CLIPTokenizer.from_pretrained(emoji.CLIP)
    latents, labels = latent_bank(pictures, load_flow_vae(folder), folder / "flow_latents.pt", seed + 12)
    scale = 1 / latents.float().std()
    ids = tokenize(tokenizer, [p.caption for p in emoji.prompts() if not p.held_out] + [""])
    first = flow_models.first_text_encoder(CLIPModel.from_pretrained(emoji.CLIP, dtype=torch.float32))
    model = flow_models.new_flow(tokenizer)
    model["transformer"].compile()
    size = STAGES["flow"].batch_size

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        x_0 = latents[chosen].float() * scale
        label = labels[chosen].masked_fill(torch.rand(size, generator=generator) < 0.1, len(ids) - 1)
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(size, generator=generator))
        mix = t[:, None, None, None]
        with autocast():
            states, pooled = flow_texts((first, model["text_encoder"]), ids[label], flow_models.T5_TOKENS)
            velocity = model["transformer"](
                hidden_states=(1 - mix) * x_0 + mix * noise,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=1000 * t,
                return_dict=False,
            )[0].float()
        return functional.mse_loss(velocity, noise - x_0)

    fit("flow", model, loss, folder=folder, steps=steps, seed=seed + 13)
