"""Answer a conversation with an image, by the small network that comes with d2i."""

import argparse

import d2i

CHAT = ["look what i saw", "where was that?", "on the beach at night: a big red ball"]


def main() -> None:
    """Generate one image, and say what the network read of the conversation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="answer.png", help="the image to write")
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler")
    args = parser.parse_args()

    # Of a run that you trained: d2i.load("runs/a").
    model = d2i.load("uvit-s", weights="demo:backbone")
    read = model.read(CHAT)
    print(f"{read.tokens} tokens: {read.text}")
    model.generate(CHAT, num_steps=args.steps).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
