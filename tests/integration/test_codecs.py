"""One corpus, fetched once, encoded by an autoencoder of each kind."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from d2i.cli.inspect import inspect
from d2i.cluster import Session
from d2i.errors import ConfigError
from d2i.fetch.sources import NetworkPolicy
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.recipes import change_recipe, resolve_recipe
from d2i.shards import ShardReader, verify
from d2i.train.data.loader import check_arrays
from tests.integration.chats import ledger_facts, noise_image, sends, write_chats
from tests.integration.pipelines import save_tiny_autoencoder
from tests.servers import WebServer, running
from tests.shared import needs_shared

pytestmark = needs_shared
NUM = 4
ARRAYS = {
    "kl-f8c16": ("moments", (32, 8, 8)),
    "flux2": ("moments", (64, 8, 8)),
    "dc-ae-f32": ("latent", (32, 2, 2)),
}

KINDS = {"kl-f8c16": "kl", "flux2": "flux2", "dc-ae-f32": "dc-ae"}


def test_kept_source_bytes_are_encoded_for_every_codec(tmp_path: Path, settings: list[str]) -> None:
    answers = {f"/{n}": sends(noise_image(size=(64 + 9 * n, 64))) for n in range(NUM)}
    with running(WebServer("127.0.0.1", answers | {"/gone": sends(b"", 404)})) as web:
        host = f"127.0.0.1:{web.port}"
        urls = {f"c{path[1:]}": [f"http://{host}{path}"] for path in web.answers}
        recipe = resolve_recipe("demo", [*settings[1::2], "preprocess.keep_images=always"])
        source = write_chats(tmp_path / "chats", urls)
        vae = save_tiny_autoencoder(tmp_path / "vae", "kl-f8c4")
        change = [f"encoders.vae={vae}", "encoders.vae_kind=kl"]
        old = PreprocessRequest(
            "jsonl", str(source), str(tmp_path / "kl-f8c4"), change_recipe(recipe, change)
        )
        prepare = partial(run_job, network_policy=NetworkPolicy(frozenset({host})))
        (first,) = prepare(old, Session(0), lambda _: None)
        before = ShardReader(f"{old.out}/test")
        assert (first.num_written, before.manifest.format) == (NUM, 1)
        web.asked.clear()
        for name, (array, shape) in ARRAYS.items():
            vae = save_tiny_autoencoder(tmp_path / f"vae-{name}", name)
            changed = change_recipe(recipe, [f"encoders.vae={vae}"])
            out = str(tmp_path / name)
            request = replace(old, out=out, recipe=changed, reuse=old.out)
            (summary,) = prepare(request, Session(0), lambda _: None)
            assert (summary.num_written, summary.failures) == (NUM, first.failures)
            reader = ShardReader(f"{out}/test")
            made_by = reader.manifest.fingerprint["encoders"]["vae"]
            assert (reader.manifest.format, made_by["kind"]) == (2, KINDS[name])
            assert list(reader.keys) == list(before.keys)
            assert ledger_facts(out, "test") == ledger_facts(old.out, "test")
            stored = reader.read(range(NUM), members=(array,))[array]
            assert (stored.dtype, stored.shape) == (np.float16, (NUM, *shape))
            assert [reader.read_json(n) for n in range(NUM)] == [
                before.read_json(n) for n in range(NUM)
            ]
            with pytest.raises(ConfigError, match=f"latents of {name}, .* kl-f8c4, on which"):
                check_arrays(changed, reader)
            assert verify(f"{out}/test").ok
            page = tmp_path / f"{name}.html"
            inspect(f"{out}/test", html=str(page), as_json=True)
            assert page.read_text().count("data:image/png") >= 3
        odd = change_recipe(recipe, [f"encoders.vae={vae}", "image.resolution=72"])
        request = replace(old, out=str(tmp_path / "odd"), recipe=odd, reuse=old.out)
        with pytest.raises(ConfigError, match=r"image\.resolution=72: expected a multiple of 32"):
            prepare(request, Session(0), lambda _: None)
        assert not web.asked
