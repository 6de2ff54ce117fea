"""Divter's caption generator: fine-tune a causal language model to describe the image.

python eval/divter.py data/photochat describer --base microsoft/DialoGPT-medium

d2i eval --system divter:describer,diffusers:PATH then generates images from its captions. MMDialog
has no descriptions: prepare it with those of d2i corpus --describe.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from d2i.eval.systems.divter import DivterCaptionerConfig, read_pairs, train_divter_captioner
from d2i.recipes import read_stored_recipe


def main(
    data: Annotated[str, typer.Argument(help="Directory made by d2i preprocess.")],
    out: Annotated[Path, typer.Argument(help="Directory for the model.")],
    base: Annotated[str, typer.Option(help="A causal language model: a directory or a hub name.")],
    num_steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Dialogs a step.")] = 16,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of AdamW.")] = 5e-5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order and of dropout.")] = 0,
) -> None:
    """Train on the training split, and save the model with its tokenizer."""
    pairs = read_pairs(f"{data}/train", read_stored_recipe(data).text)
    config = DivterCaptionerConfig(num_steps, batch_size, lr, seed)
    train_divter_captioner(
        pairs, base, out, config, lambda step, loss: print(step, loss, file=sys.stderr)
    )
    print(f"trained on {len(pairs)} descriptions: {out}")


if __name__ == "__main__":
    typer.run(main)
