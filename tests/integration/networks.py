"""Small random networks in the real formats, made by the tests that need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def save_random_clip(folder: Path) -> None:
    """Write `clip_text` (the true vocabulary) and `clip_image`, by `save_pretrained`."""
    torch.manual_seed(0)
    text = CLIPTextConfig(num_hidden_layers=1, projection_dim=32, **_SIZES)
    image = CLIPVisionConfig(
        num_hidden_layers=1, projection_dim=32, image_size=32, patch_size=8, **_SIZES
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder / "clip_text")
    CLIPVisionModelWithProjection(image).save_pretrained(folder / "clip_image")


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{c}" for c in _LETTERS)]


def save_random_captioner(folder: Path, kind: Literal["blip", "vision-encoder-decoder"]) -> None:
    """Write a captioner that spells nonsense, with its image processor and its tokenizer."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(_WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    module, processor = (_random_blip if kind == "blip" else _random_encoder_decoder)()
    module.save_pretrained(folder)
    processor.save_pretrained(folder)


def _random_blip() -> tuple[Any, Any]:
    vision = _SIZES | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    text = _SIZES | {
        "num_hidden_layers": 1,
        "encoder_hidden_size": 32,
        "vocab_size": len(_WORDS),
        "max_position_embeddings": 64,
        "bos_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=32)
    size = {"height": 32, "width": 32}
    return BlipForConditionalGeneration(config), BlipImageProcessor(size=size)


def _random_encoder_decoder() -> tuple[Any, Any]:
    encoder = ViTModel(ViTConfig(num_hidden_layers=1, image_size=32, patch_size=8, **_SIZES))
    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=len(_WORDS),
            num_hidden_layers=1,
            max_position_embeddings=64,
            is_decoder=True,
            add_cross_attention=True,
            **_SIZES,
        )
    )
    module = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    ids = {"decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 3}
    module.generation_config = GenerationConfig(**ids)
    return module, ViTImageProcessor(size={"height": 32, "width": 32})


def save_tiny_pipeline(folder: Path) -> None:
    """Write a latent diffusion pipeline of random weights, as diffusers saves one."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    config, tokenizer = _text_and_tokenizer(folder)
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
    pipeline.save_pretrained(folder)


def save_tiny_unclip(folder: Path) -> None:
    """Write DALL-E 2's prior and decoders at random, as diffusers saves an unCLIP pipeline."""
    from diffusers import (
        PriorTransformer,
        UnCLIPPipeline,
        UnCLIPScheduler,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    torch.manual_seed(0)
    config, tokenizer = _text_and_tokenizer(folder)
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
    ).save_pretrained(folder)


_VAE_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}


def _text_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    """Make the sizes of a CLIP text tower, and a tokenizer of single letters."""
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{c}</w>" for c in _LETTERS)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        num_hidden_layers=1,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **_SIZES,
    )
    return config, tokenizer


def save_random_describer(folder: Path) -> None:
    """Write a small causal language model that reads and writes letters."""
    torch.manual_seed(0)
    vocabulary = {c: i for i, c in enumerate(["<end>", *_LETTERS, *"0123456789 #:\nD."])}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="."))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    letters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<end>", pad_token="<end>"
    )
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=384,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
