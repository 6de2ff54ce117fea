"""Generate several answers to one conversation, and stop when time is up."""

import argparse
import time

from PIL import Image

import d2i

CHAT = ["what did you draw?", "a green tent and a yellow star"]


class OutOfTimeError(Exception):
    """The time for an image is up."""


def main() -> None:
    """Generate a row of images, one for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", default="answers.png", help="the row of images to write")
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler")
    parser.add_argument("--seconds", type=float, default=60.0, help="give up after this time")
    args = parser.parse_args()
    model = d2i.load("uvit-s", weights="demo:backbone")
    end = time.monotonic() + args.seconds

    def watch(step: int, latent: object) -> None:
        # `latent` holds the images that the network predicts at this step.
        del latent
        print(f"step {step} of {args.steps}")
        if time.monotonic() > end:
            raise OutOfTimeError

    try:
        images = model.generate(CHAT, seed=args.seeds, num_steps=args.steps, on_step=watch)
    except OutOfTimeError:
        raise SystemExit("out of time; the model could go on with another call") from None
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for column, image in enumerate(images):
        row.paste(image, (column * image.width, 0))
    row.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
