"""Read prepared samples with torch's DataLoader, or as a webdataset pipeline."""

import argparse
from typing import Any

import torch
from torch.utils.data import DataLoader

import d2i


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the arrays of samples, and list what differs in length."""
    batch: dict[str, Any] = {"key": [s["key"] for s in samples]}
    batch["context"] = [s["context"] for s in samples]
    for name in ("moments", "text"):
        batch[name] = torch.stack([torch.from_numpy(s[name]) for s in samples])
    return batch


def main() -> None:
    """Print the first turn and the shapes of each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="the directory that d2i preprocess wrote")
    parser.add_argument("--split", default="train")
    parser.add_argument("--webdataset", action="store_true", help="read the tars as a stream")
    args = parser.parse_args()

    if args.webdataset:
        stream = d2i.webdataset(args.data, args.split).shuffle(1000)
        loader = DataLoader(stream.batched(2, collation_fn=collate), batch_size=None)
    else:
        dataset = d2i.Dataset(args.data, args.split)
        loader = DataLoader(dataset, 2, shuffle=True, num_workers=2, collate_fn=collate)
    for batch in loader:
        first = batch["context"][0][0]
        print(len(batch["key"]), tuple(batch["moments"].shape), tuple(batch["text"].shape), first)


if __name__ == "__main__":
    main()
