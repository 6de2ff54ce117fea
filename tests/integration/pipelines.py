"""Tiny pipelines of random weights in diffusers' own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from d2i.tokenize import _alphabet, _read_merges, _vocabulary_path
from tests.integration.networks import LETTERS, SIZES


def save_tiny_pipeline(directory: Path) -> None:
    """Write a latent diffusion pipeline of random weights, as diffusers saves one."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    config, tokenizer = _text_and_tokenizer(directory)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(block_out_channels=(32, 32, 32, 32), norm_num_groups=8, **_VAE_BLOCKS)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)


def save_tiny_vae(path: Path) -> Path:
    """Save a small KL autoencoder over latents of four channels, an eighth of the side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(16,) * 4, norm_num_groups=8, **_VAE_BLOCKS)
    vae.save_pretrained(path)
    return path


def save_tiny_autoencoder(path: Path, codec: str, **changed: Any) -> Path:
    """Save a small autoencoder over the latents of a codec; with `tiny-`, an AutoencoderTiny."""
    import diffusers

    torch.manual_seed(0)
    class_name, sizes = _AUTOENCODERS[codec]
    vae = getattr(diffusers, class_name)(**sizes | changed)
    if codec == "flux2":
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 1.5)
    vae.save_pretrained(path)
    return path


def save_tiny_sd15(directory: Path, seed: int = 0) -> None:
    """Write Stable Diffusion 1.5 with tiny networks and CLIP's own vocabulary, at 64 pixels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(16,) * 4, norm_num_groups=8, **_VAE_BLOCKS),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=_clip_tokenizer(directory),
        unet=UNet2DConditionModel(cross_attention_dim=32, attention_head_dim=8, **_UNET),
        scheduler=DDIMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)


def save_tiny_sdxl(directory: Path) -> None:
    """Write Stable Diffusion XL with tiny networks and CLIP's own vocabulary, at 64 pixels."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    tokenizer = _clip_tokenizer(directory)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(16,) * 4,
            norm_num_groups=8,
            scaling_factor=0.13025,
            **_VAE_BLOCKS,
        ),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            cross_attention_dim=64,
            attention_head_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            use_linear_projection=True,
            **_UNET,
        ),
        scheduler=EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading"),
    ).save_pretrained(directory)


_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def _clip_config() -> CLIPTextConfig:
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return CLIPTextConfig(num_hidden_layers=1, projection_dim=32, **ids, **SIZES)


def _clip_tokenizer(directory: Path) -> CLIPTokenizer:
    """Return CLIP's tokenizer, from the vocabulary that d2i reads."""
    merges = _read_merges(_vocabulary_path())
    alphabet = _alphabet()
    words = [*alphabet, *(f"{char}</w>" for char in alphabet), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True)
    vocabulary, merge_list = directory / "vocab.json", directory / "merges.txt"
    vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
    lines = [" ".join(pair) for pair in merges]
    merge_list.write_text("\n".join(["#version: 0.2", *lines, ""]))
    tokenizer = CLIPTokenizer(str(vocabulary), str(merge_list))
    tokenizer.model_max_length = 77
    vocabulary.unlink()
    merge_list.unlink()
    return tokenizer


def save_tiny_unclip(directory: Path) -> None:
    """Write Karlo's prior and decoders at random, as diffusers saves an unCLIP pipeline."""
    from diffusers import (
        PriorTransformer,
        UnCLIPPipeline,
        UnCLIPScheduler,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    torch.manual_seed(0)
    config, tokenizer = _text_and_tokenizer(directory)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=32
    )
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=32, time_embed_dim=128, cross_attention_dim=32
    )
    decoder = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=32,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    finer = {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        "in_channels": 6,
        "out_channels": 3,
    }
    fixed = {"clip_sample": True, "num_train_timesteps": 1000}
    UnCLIPPipeline(
        prior=prior,
        decoder=decoder,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_proj=projection,
        super_res_first=UNet2DModel(**finer),
        super_res_last=UNet2DModel(**finer),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            **fixed,
        ),
        decoder_scheduler=UnCLIPScheduler(
            variance_type="learned_range", prediction_type="epsilon", **fixed
        ),
        super_res_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="epsilon", **fixed
        ),
    ).save_pretrained(directory)


def save_tiny_flux(directory: Path) -> None:
    """Write a FLUX pipeline: CLIP reads 77 tokens, T5 512, where a letter is a token."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer = _clip_tokenizer(directory)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{c}" for c in LETTERS), *LETTERS]
    vocabulary = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    tokenizer_2 = T5Tokenizer(vocab=vocabulary, model_max_length=512)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), norm_num_groups=8, shift_factor=0.1, **_VAE_BLOCKS
        ),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(tokenizer_2), **sizes)),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    ).save_pretrained(directory)


_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_z_image(directory: Path) -> None:
    """Write a Z-Image pipeline: Qwen3 reads a chat of 512 tokens, where a byte is a token."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer, text = _qwen(num_layers=2)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**_AUTOENCODERS["kl-f8c16"][1]),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 32, 32],
        ),
    ).save_pretrained(directory)


def save_tiny_flux2_klein(directory: Path, *, is_distilled: bool = False) -> None:
    """Write a FLUX.2 klein pipeline: three layers of Qwen3's states of a chat, side by side."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer, text = _qwen(num_layers=28)
    vae = AutoencoderKLFlux2(**_AUTOENCODERS["flux2"][1])
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2.0)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=128,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * SIZES["hidden_size"],
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=is_distilled,
    ).save_pretrained(directory)


def _qwen(num_layers: int) -> tuple[Qwen2Tokenizer, Qwen3Config]:
    """Return a tokenizer of bytes with Qwen's template, and the sizes of a tiny Qwen3."""
    tokenizer = tiny_chat_tokenizer(_CHAT)
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=num_layers,
        num_key_value_heads=1,
        head_dim=16,
        **SIZES,
    )
    return tokenizer, text


def tiny_chat_tokenizer(template: str | None, *others: str) -> Qwen2Tokenizer:
    """Return a tokenizer of bytes with a chat template, and tokens that are not special."""
    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(list(others))
    tokenizer.chat_template = template
    return tokenizer


def save_tiny_sana(directory: Path) -> None:
    """Write a Sana pipeline: Gemma reads 298 tokens of a prompt, where a letter is a token."""
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    words += [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        **SIZES,
    )
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text),
        vae=AutoencoderDC(**_AUTOENCODERS["dc-ae-f32"][1]),
        transformer=SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(directory)


def save_tiny_unconditional(directory: Path) -> None:
    """Write a DDPM pipeline, which reads no text."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(directory)


_VAE_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}


_KL: dict[str, Any] = _VAE_BLOCKS | {"block_out_channels": (8,) * 4, "norm_num_groups": 8}
_DC: dict[str, Any] = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (
        ("block_types", "ResBlock"),
        ("block_out_channels", (32,) * 6),
        ("layers_per_block", (1,) * 6),
        ("qkv_multiscales", ((),) * 6),
    )
}
_TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
}
_AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl-f8c4": ("AutoencoderKL", _KL),
    "kl-f8c16": (
        "AutoencoderKL",
        _KL | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    "flux2": ("AutoencoderKLFlux2", _KL | {"latent_channels": 32}),
    "dc-ae-f32": ("AutoencoderDC", _DC | {"latent_channels": 32, "scaling_factor": 0.41407}),
    "tiny-kl-f8c4": ("AutoencoderTiny", _TINY),
    "tiny-kl-f8c16": ("AutoencoderTiny", _TINY | {"latent_channels": 16}),
}


def _text_and_tokenizer(directory: Path) -> tuple[Any, Any]:
    """Return the sizes of a CLIP text tower, and a tokenizer of single letters."""
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        num_hidden_layers=1,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **SIZES,
    )
    return config, tokenizer
