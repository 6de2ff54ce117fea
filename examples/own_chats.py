"""Answer every dialog of your own chats with an image."""

import argparse
from pathlib import Path

import d2i
from d2i.corpora import read_instances


def main() -> None:
    """Write one image for each shared image of the chats, named by the instance's key."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chats", help="a directory with chats as train.jsonl or test.jsonl")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=Path("answers"))
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler")
    args = parser.parse_args()

    model = d2i.load("uvit-s", weights="demo:backbone")
    args.out.mkdir(exist_ok=True)
    for instance in read_instances("jsonl", args.chats, args.split):
        image = model.generate(instance.context, key=instance.key, num_steps=args.steps)
        image.save(args.out / f"{instance.key}.png")
        print(instance.key, model.read(instance.context).text)


if __name__ == "__main__":
    main()
