"""Rebuild the embedded emoji base: the pipeline and the CLIP model in `data/emoji-base`.

    npm pack emoji-datasource-google@16.0.0
    python -m stepfuse.scripts.emoji.build_base --package emoji-datasource-google-16.0.0.tgz \
        --work outputs/emoji-base

Four stages: autoencoder, CLIP, UNet with its text encoder, export. Each writes checkpoints
into `--work`; run again, the command goes on where it stopped.
"""

import argparse
import io
import json
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.data.images import to_pixels
from stepfuse.data.text_files import write_text
from stepfuse.fuse.diffusion.noise_path import STABLE_DIFFUSION

MAX_TOKENS = 16
LATENT_CHANNELS = 4
RENDERS_PER_PROMPT = 14


@dataclass(frozen=True, kw_only=True)
class Stage:
    steps: int
    batch_size: int
    learning_rate: float


STAGES = {
    "vae": Stage(steps=1500, batch_size=24, learning_rate=2e-3),
    "clip": Stage(steps=700, batch_size=96, learning_rate=6e-4),
    "unet": Stage(steps=4000, batch_size=64, learning_rate=8e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the npm package, as .tgz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    for name, stage in STAGES.items():
        parser.add_argument(f"--{name}_steps", type=int, default=stage.steps)
    parser.add_argument("--stages", default="vae,clip,unet,export")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pictures = read_package(arguments.package)
    stages = arguments.stages.split(",")
    if "vae" in stages:
        train_vae(pictures, arguments.work, arguments.vae_steps, arguments.seed)
    if "clip" in stages:
        train_clip(pictures, arguments.work, arguments.clip_steps, arguments.seed)
    if "unet" in stages:
        train_unet(pictures, arguments.work, arguments.unet_steps, arguments.seed)
    if "export" in stages:
        export(arguments.work, arguments.package.name, arguments.seed)


def read_package(package: Path) -> dict[str, Image.Image]:
    """Concept phrase → RGBA picture, from the npm package."""
    with tarfile.open(package) as archive:
        index = json.loads(_read(archive, "package/emoji.json"))
        files = {entry["short_name"]: entry["image"] for entry in index}
        return {
            phrase: Image.open(io.BytesIO(_read(archive, f"package/img/google/64/{files[name]}"))).convert("RGBA")
            for phrase, name in emoji.concepts().items()
        }


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file in the package")
    return file.read()


# The loop all three stages share -----------------------------------------------------------


def fit(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss: Callable[[torch.Generator], Tensor],
    *,
    folder: Path,
    steps: int,
    seed: int,
    ema_decay: float = 0.998,
) -> dict[str, dict[str, Tensor]]:
    """AdamW with warm-up, constant rate, and a linear decay over the last quarter; keeps an average of the weights.

    Returns the averaged state dict of each module. A checkpoint is written every 200 steps.
    """
    learning_rate = STAGES[name].learning_rate
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {key: {k: v.clone() for k, v in m.state_dict().items()} for key, m in modules.items()}
    start, seconds = 0, 0.0
    file = folder / f"{name}.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
        optimizer.load_state_dict(saved["optimizer"])
        average, start, seconds = saved["average"], saved["step"], saved["seconds"]
    begun, running = time.monotonic() - seconds, 0.0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=20)
    for step in bar:
        # Each step has a generator of its own: a resumed run draws what an unbroken one draws.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rate = min(1.0, (step + 1) / 100, (steps - step) / (steps / 4))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        value = loss(generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema_decay, (step + 1) / (step + 10))
        for key, module in modules.items():
            for k, v in module.state_dict().items():
                if v.is_floating_point():
                    average[key][k].lerp_(v, 1 - decay)
        running = 0.98 * running + 0.02 * value.item()
        bar.set_postfix(loss=f"{running / (1 - 0.98 ** (step - start + 1)):.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = {key: module.state_dict() for key, module in modules.items()}
            seconds = time.monotonic() - begun
            torch.save(
                {"modules": state, "optimizer": optimizer.state_dict(), "average": average}
                | {"step": step + 1, "seconds": seconds},
                file.with_suffix(".tmp"),
            )
            file.with_suffix(".tmp").rename(file)
    return average


def averaged(folder: Path, name: str) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / f"{name}.pt", weights_only=True)["average"]


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


# Stage 1: the autoencoder ------------------------------------------------------------------


def new_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 3, 1),
        latent_channels=LATENT_CHANNELS,
    )


def draw_batch(
    pictures: dict[str, Image.Image], size: int, generator: torch.Generator, *, held_out: bool = False
) -> tuple[list[str], Tensor]:
    """Captions and their pictures in [-1, 1], drawn from one split."""
    pool = [prompt for prompt in emoji.prompts() if prompt.held_out == held_out]
    chosen = [pool[i] for i in torch.randint(len(pool), (size,), generator=generator).tolist()]
    images = [emoji.render(pictures[p.concept], p.background, generator) for p in chosen]
    return [p.caption for p in chosen], torch.stack([to_pixels(i) for i in images]) * 2 - 1


def train_vae(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    """L1 on pixels and on their differences; noise on unit-variance latents keeps the decoder smooth."""
    vae = new_vae()

    def loss(generator: torch.Generator) -> Tensor:
        _, x = draw_batch(pictures, STAGES["vae"].batch_size, generator)
        with autocast():
            z = vae.encode(x).latents.float()
            y = vae.decode(z + 0.1 * torch.randn(z.shape, generator=generator)).sample.float()
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        return (y - x).abs().mean() + 0.5 * (y - x).square().mean() + edges + 0.05 * spread

    fit("vae", {"vae": vae}, loss, folder=folder, steps=steps, seed=seed)


def load_vae(folder: Path) -> AutoencoderTiny:
    vae = new_vae().eval()
    vae.load_state_dict(averaged(folder, "vae")["vae"])
    return vae.requires_grad_(False)


# Stage 2: the tokenizer and CLIP -----------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's format, learnt on every caption: each of their words is one token."""
    path = folder / "tokenizer"
    if not path.exists():
        start, end = "<|startoftext|>", "<|endoftext|>"
        learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=end))
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        words = [word for prompt in emoji.prompts() for word in prompt.caption.split()]
        trainer = trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=[start, end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        learner.train_from_iterator(words, trainer)
        model = json.loads(learner.to_str())["model"]
        vocabulary = dict(model["vocab"])
        for letter in pre_tokenizers.ByteLevel.alphabet():  # a lone byte may also end a word
            vocabulary.setdefault(letter + "</w>", len(vocabulary))
        merges = [tuple(merge) for merge in model["merges"]]
        CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS).save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def text_settings(tokenizer: CLIPTokenizer, layers: int) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=3,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = dict(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=emoji.RESOLUTION,
        patch_size=8,
    )
    return CLIPModel(CLIPConfig(text_config=text_settings(tokenizer, 2), vision_config=vision, projection_dim=128))


# CLIP sees the same normalisation as OpenAI's models, so the reward needs no special case.
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def train_clip(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    """Symmetric contrastive loss on pictures, half of them passed through the autoencoder with noise.

    Both splits of the captions are seen: CLIP is the judge, and must know every caption.
    """
    tokenizer, vae = build_tokenizer(folder), load_vae(folder)
    clip = new_clip(tokenizer)
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
        ids = tokenize(tokenizer, captions)
        with autocast():
            output = clip(input_ids=ids, attention_mask=None, pixel_values=(x - CLIP_MEAN) / CLIP_STD)
        logits = output.logits_per_image.float()
        # Two pictures of one caption are both right for it.
        same = torch.tensor([[a == b for b in captions] for a in captions]).float()
        target = same / same.sum(1, keepdim=True)
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    fit("clip", {"clip": clip}, loss, folder=folder, steps=steps, seed=seed + 1)


def load_clip(folder: Path) -> CLIPModel:
    clip = new_clip(build_tokenizer(folder)).eval()
    clip.load_state_dict(averaged(folder, "clip")["clip"])
    return clip.requires_grad_(False)


# Stage 3: the UNet and its text encoder ----------------------------------------------------


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=emoji.RESOLUTION // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer, 2), projection_dim=128))


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule; v-prediction, because plain grounds are all low frequency."""
    return DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction")


def latent_bank(pictures: dict[str, Image.Image], folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Latents and caption indices of `RENDERS_PER_PROMPT` renders of every training prompt, unit variance."""
    file = folder / "latents.pt"
    if not file.exists():
        vae, generator = load_vae(folder), torch.Generator().manual_seed(seed + 2)
        pool = [prompt for prompt in emoji.prompts() if not prompt.held_out]
        latents, labels = [], []
        for index, prompt in enumerate(tqdm(pool, desc="latents", mininterval=20)):
            pixels = torch.stack(
                [
                    to_pixels(emoji.render(pictures[prompt.concept], prompt.background, generator))
                    for _ in range(RENDERS_PER_PROMPT)
                ]
            )
            with torch.no_grad(), autocast():
                latents.append(vae.encode(pixels * 2 - 1).latents.half())
            labels += [index] * RENDERS_PER_PROMPT
        torch.save({"latents": torch.cat(latents), "labels": torch.tensor(labels)}, file)
    saved = torch.load(file, weights_only=True)
    return saved["latents"], saved["labels"]


def train_unet(pictures: dict[str, Image.Image], folder: Path, steps: int, seed: int) -> None:
    """v-prediction with SD's schedule; a tenth of the captions are dropped for guidance.

    Times are drawn logit-normally (arXiv:2403.03206): shapes are decided in the middle of the path.
    """
    tokenizer, scheduler = build_tokenizer(folder), new_scheduler()
    latents, labels = latent_bank(pictures, folder, seed)
    scale = 1 / latents.float().std()
    ids = tokenize(tokenizer, [p.caption for p in emoji.prompts() if not p.held_out] + [""])
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    size = STAGES["unet"].batch_size

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        x_0 = latents[chosen].float() * scale
        label = labels[chosen].masked_fill(torch.rand(size, generator=generator) < 0.1, len(ids) - 1)
        noise = torch.randn(x_0.shape, generator=generator)
        t = (1000 * torch.sigmoid(0.3 + torch.randn(size, generator=generator))).long().clamp(max=999)
        x_t = scheduler.add_noise(x_0, noise, t)
        with autocast():
            states = text_encoder(ids[label]).last_hidden_state
            v = unet(x_t, t, states).sample.float()
        return functional.mse_loss(v, scheduler.get_velocity(x_0, noise, t))

    modules = {"unet": unet, "text_encoder": text_encoder}
    fit("unet", modules, loss, folder=folder, steps=steps, seed=seed + 3)


# Stage 4: the folders that the library loads -----------------------------------------------


def export(folder: Path, package: str, seed: int) -> None:
    """Write pipeline and CLIP in their published layout, float16, and the facts for their cards."""
    tokenizer = build_tokenizer(folder)
    vae, unet, text_encoder = load_vae(folder), new_unet(), new_text_encoder(tokenizer)
    weights = averaged(folder, "unet")
    unet.load_state_dict(weights["unet"])
    text_encoder.load_state_dict(weights["text_encoder"])
    latents = torch.load(folder / "latents.pt", weights_only=True)["latents"]
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 4))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(emoji.PIPELINE)
    prefix_text_encoder(emoji.PIPELINE / "text_encoder" / "model.safetensors")
    clip = load_clip(folder).half()
    clip.save_pretrained(emoji.CLIP)
    tokenizer.save_pretrained(emoji.CLIP)
    stages = {}
    for name, stage in STAGES.items():
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        parameters = sum(v.numel() for module in saved["average"].values() for v in module.values())
        stages[name] = asdict(stage) | {"steps": saved["step"], "seconds": saved["seconds"], "parameters": parameters}
    facts = {"package": package, "seed": seed, "torch": torch.__version__, "stages": stages}
    write_text(folder / "training.json", json.dumps(facts, indent=2) + "\n")


def prefix_text_encoder(file: Path) -> None:
    """Name the tensors of a CLIPTextModel `text_model.…`, as transformers 4 does.

    transformers 5 saves them without the prefix and reads both; transformers 4 reads these only, and gives a model of
    random weights for others, with a warning.
    """
    state = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
