"""The models of the bundled flow base, before training: Stable Diffusion 3's architecture, small."""

from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.scripts.emoji.models import text_settings

LATENT_CHANNELS = 8
HEADS, HEAD_WIDTH, LAYERS = 3, 64, 8
PROJECTION = 128
T5_TOKENS = 1  # zeros in place of T5's tokens, `max_sequence_length` of the pipeline


def new_flow_vae() -> AutoencoderTiny:
    """Eight channels, where the UNet's base has four: its decoder, not its denoiser, made that base's images soft."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 3, 1),
        latent_channels=LATENT_CHANNELS,
    )


def first_text_encoder(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """The text encoder of the bundled CLIP with its projection, frozen."""
    config = clip.config.text_config.to_dict() | {"projection_dim": clip.config.projection_dim}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    state = {key: value for key, value in clip.state_dict().items() if key.startswith(("text_model.", "text_proj"))}
    encoder.load_state_dict(state)
    return encoder.float().eval().requires_grad_(False)


def new_flow(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The transformer and its second text encoder, which one stage trains together."""
    texts = text_settings(tokenizer) | {"num_hidden_layers": 3}
    transformer = SD3Transformer2DModel(
        sample_size=emoji.RESOLUTION // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * texts["hidden_size"],
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=2 * PROJECTION,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**texts, projection_dim=PROJECTION))
    return nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)
