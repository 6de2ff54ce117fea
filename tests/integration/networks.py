"""Small random networks in the real file formats."""

from __future__ import annotations

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
    CLIPTextModelWithProjection,
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

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def save_random_clip(directory: Path) -> None:
    """Write `clip_text` (with the real vocabulary) and `clip_image`, by `save_pretrained`."""
    torch.manual_seed(0)
    text = CLIPTextConfig(num_hidden_layers=1, projection_dim=32, **SIZES)
    image = CLIPVisionConfig(
        num_hidden_layers=1, projection_dim=32, image_size=32, patch_size=8, **SIZES
    )
    CLIPTextModelWithProjection(text).save_pretrained(directory / "clip_text")
    CLIPVisionModelWithProjection(image).save_pretrained(directory / "clip_image")


LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]


def save_random_captioner(directory: Path, kind: Literal["blip", "vision-encoder-decoder"]) -> None:
    """Write a random captioner with its image processor and its tokenizer."""
    torch.manual_seed(0)
    directory.mkdir(parents=True)
    (directory / "vocab.txt").write_text("\n".join(_WORDS))
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    module, processor = (_random_blip if kind == "blip" else _random_encoder_decoder)()
    module.save_pretrained(directory)
    processor.save_pretrained(directory)


def _random_blip() -> tuple[Any, Any]:
    vision = SIZES | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    text = SIZES | {
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
    encoder = ViTModel(ViTConfig(num_hidden_layers=1, image_size=32, patch_size=8, **SIZES))
    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=len(_WORDS),
            num_hidden_layers=1,
            max_position_embeddings=64,
            is_decoder=True,
            add_cross_attention=True,
            **SIZES,
        )
    )
    module = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    ids = {"decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 3}
    module.generation_config = GenerationConfig(**ids)
    return module, ViTImageProcessor(size={"height": 32, "width": 32})


def save_random_describer(directory: Path) -> None:
    """Write a small causal language model that reads and writes letters."""
    torch.manual_seed(0)
    vocabulary = {c: i for i, c in enumerate(["<end>", *LETTERS, *"0123456789 #:\nD."])}
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
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
