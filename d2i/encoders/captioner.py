"""A captioner: any transformers model that describes a picture without being asked a question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from d2i.encoders.load import load_pretrained
from d2i.errors import CheckpointError
from d2i.weights_resolve import resolve_weights

MAX_NEW_TOKENS = 40


class Captioner:
    """BLIP, GIT, a vision-encoder-decoder such as ViT-GPT2, or another of their kind.

    Args:
        name: A folder made by `save_pretrained`, or a hub repository.
        device: Where it runs.

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
                f"{str(err).strip().splitlines()[0][:200]}; expected them beside the model"
            ) from err

    @torch.inference_mode()
    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Describe RGB pictures, each in one line; the likeliest word each time, no sampling.

        Raises:
            CheckpointError: If the model wants a question beside the picture.
        """
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
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
                "describes a picture unasked, such as BLIP, GIT or ViT-GPT2"
            ) from err
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
