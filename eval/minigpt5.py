"""MiniGPT-5's test dialogs, in MMDialog's layout, which its own code reads.

python eval/minigpt5.py data/mmdialog minigpt5-in

Run MiniGPT-5 on it, save each image as KEY.png (KEY is the image's __MEDIA__), and score them:
d2i eval --system images:DIR --label MiniGPT-5 --data data/mmdialog --out scores/minigpt5
"""

from typing import Annotated

import typer

from d2i.eval.minigpt5_export import export_dialogs
from d2i.shards import data_set_url


def main(
    data: Annotated[str, typer.Argument(help="Directory made by d2i preprocess.")],
    out: Annotated[str, typer.Argument(help="Directory to write test/ into.")],
) -> None:
    """Write one dialog for each test instance, and the reference images under their names."""
    print(f"{export_dialogs(data_set_url(data, 'test'), out)} dialogs: {out}/test")


if __name__ == "__main__":
    typer.run(main)
