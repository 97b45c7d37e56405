"""Z-Image: a single-stream transformer on lists of latents and prompts, and Qwen3 as text encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepfuse.data.devices import to_device
from stepfuse.fuse.backbones.conditioning import Inputs, host_copy
from stepfuse.fuse.backbones.flow import FlowTransformer
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.z_image_names import ZImageNames
from stepfuse.fuse.diffusion.configuration import Expected, check_configuration

PATCH = 2  # the side of a token in a latent
PADDED_TO = 32  # the network pads a prompt to a multiple of so many tokens
PROMPT = "{prompt}"  # in a chat template, to find where the prompt begins
EXPECTED = {"siglip_feat_dim": Expected((None,), "networks that are given images are not supported")}
HANDLED = frozenset(
    {
        *("all_f_patch_size", "all_patch_size", "axes_dims", "axes_lens", "cap_feat_dim", "dim", "in_channels"),
        *("n_heads", "n_kv_heads", "n_layers", "n_refiner_layers", "norm_eps", "qk_norm", "rope_theta", "t_scale"),
    }
)


class ZImage(FlowTransformer):
    """Z-Image and Z-Image-Turbo. Inputs: `prompt_embeds`, padded, and `prompt_embeds_mask`, which says how far.

    The network is given each prompt without padding, so an image does not depend on the other prompts of its batch.

    The guided prediction is e_u + g (e_c - e_u), as everywhere here. diffusers' pipeline has e_c + w (e_c - e_u), so
    its `guidance_scale` w is g - 1: its default of 5 is g = 6. Z-Image-Turbo, which is distilled, takes `guidance` off.

    The embedders in `unbatched` see the tokens of all images in one row, so a LoRA there needs forwards of its own.
    """

    blocks = ("ZImageTransformerBlock",)
    unbatched = ("all_x_embedder", "cap_embedder")
    network_class = "ZImageTransformer2DModel"
    layer_names = ZImageNames
    inputs = ("prompt_embeds", "prompt_embeds_mask")
    default_length = 512

    @property
    def native(self) -> int:
        """As diffusers' pipeline has it; nothing in its configuration says so."""
        return 1024

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        size = super().size(height, width)
        for name, pixels, tokens in zip(("height", "width"), size, self.network.config.axes_lens[1:], strict=True):
            if pixels > tokens * self.multiple:
                raise ValueError(
                    f"{name} is {pixels}; expected {tokens * self.multiple} at most, the network's axes_lens"
                )
        return size

    def check_network(self) -> None:
        config, channels = self.network.config, self.pipeline.vae.config.latent_channels
        check_configuration("transformer", self.network, handled=HANDLED, expected=EXPECTED)
        if (PATCH, 1) not in zip(config.all_patch_size, config.all_f_patch_size, strict=True):
            raise ValueError(
                f"transformer has all_patch_size {config.all_patch_size} and all_f_patch_size "
                f"{config.all_f_patch_size}; expected {PATCH} with 1 among them"
            )
        if config.in_channels != channels:
            raise ValueError(
                f"transformer has in_channels {config.in_channels}; expected {channels}, the autoencoder's"
            )
        positions = -(-self.max_sequence_length // PADDED_TO) * PADDED_TO + 2  # one before the prompt, one behind
        if positions > config.axes_lens[0]:
            raise ValueError(
                f"max_sequence_length is {self.max_sequence_length}; the network has axes_lens {config.axes_lens[0]} "
                f"and needs {positions} for it"
            )

    def check_can_encode(self) -> None:
        super().check_can_encode()
        if not self.pipeline.tokenizer.chat_template:
            raise ValueError("tokenizer has no chat_template, with which prompts are encoded; load the base's own")

    def token_limits(self) -> dict[str, int]:
        """The tokens of the prompt itself: those of the template before it count too."""
        tokenizer = self.pipeline.tokenizer
        if tokenizer is None:
            return {}
        message = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return {"tokenizer": self.max_sequence_length - len(tokenizer(text.partition(PROMPT)[0]).input_ids)}

    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, device, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        masks = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in embeds]
        return pad_sequence(embeds, batch_first=True), pad_sequence(masks, batch_first=True)

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        """The network is told 1 - sigma, and predicts x_0 - e."""
        x_t, given = self.in_network_type(x, inputs)
        mask = given["prompt_embeds_mask"].bool()
        prompts = [
            embeds[to_device(kept.nonzero().flatten(), embeds.device)]
            for embeds, kept in zip(given["prompt_embeds"], host_copy(mask), strict=True)
        ]
        output = (self.network if network is None else network)(
            list(x_t.unsqueeze(2)), (1000 - times) / 1000, prompts, return_dict=False
        )[0]
        return -torch.stack(output).squeeze(2).to(torch.promote_types(x.dtype, torch.float32))
