"""A captioner: any transformers model that captions an image without a question as prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from d2i.encoders.pretrained import load_pretrained
from d2i.errors import CheckpointError
from d2i.weights_resolve import resolve_weights

MAX_NEW_TOKENS = 40


class Captioner:
    """An image captioning model: BLIP, GIT, a vision-encoder-decoder such as ViT-GPT2, or similar.

    Args:
        name: A directory made by `save_pretrained`, or a hub repository.
        device: The device that it runs on.

    Raises:
        CheckpointError: If no such model, image processor or tokenizer can be loaded from there.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        self.name = name
        self._device = device
        self._module = load_pretrained(AutoModelForImageTextToText, name).to(device)
        where = resolve_weights(name)
        try:
            self._processor = AutoImageProcessor.from_pretrained(where)
            self._tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, KeyError) as err:
            raise CheckpointError(
                f"{name}: cannot load its image processor or tokenizer: "
                f"{str(err).strip().splitlines()[0][:200]}; expected both beside the model"
            ) from err

    @torch.inference_mode()
    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """Caption RGB images, each in one line, with greedy decoding.

        Raises:
            CheckpointError: If the model requires a question beside the image.
        """
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        try:
            ids = self._module.generate(
                pixel_values=pixels.to(self._device),
                max_new_tokens=MAX_NEW_TOKENS,
                num_beams=1,
                do_sample=False,
            )
        except (ValueError, TypeError) as err:
            raise CheckpointError(
                f"{self.name}: {str(err).strip().splitlines()[0][:200]}; expected a model that "
                "captions an image without a question, such as BLIP, GIT or ViT-GPT2"
            ) from err
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
