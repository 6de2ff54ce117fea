"""`--reuse`: other text for the same images, without fetching any of them again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from d2i.cluster import Session
from d2i.errors import ConfigError, ShardError
from d2i.fetch.sources import NetworkPolicy
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.recipes import change_recipe, resolve_recipe
from d2i.shards import ShardReader, verify
from tests.integration.chats import ledger_facts, noise_image, reasons, sends, write_chats
from tests.integration.pipelines import save_tiny_vae
from tests.servers import WebServer, running
from tests.shared import needs_shared

pytestmark = needs_shared
NUM = 8


def files(out: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(out, "test").iterdir() if p.is_file()}


def test_reuse_prepares_new_text_without_refetching_images(
    tmp_path: Path, settings: list[str]
) -> None:
    answers = {f"/{n}": sends(noise_image(size=(64 + n, 64))) for n in range(NUM)}
    failing = {"/gone": sends(b"", 404), "/late": sends(b"", 500), "/text": sends(b"hello")}
    with running(WebServer("127.0.0.1", answers | failing)) as web:
        host = f"127.0.0.1:{web.port}"
        urls = {f"c{path[1:]}": [f"http://{host}{path}"] for path in web.answers}
        recipe = resolve_recipe("demo", [*settings[1::2], "preprocess.num_samples_per_shard=3"])
        old = PreprocessRequest(
            "jsonl",
            str(write_chats(tmp_path / "chats", urls)),
            str(tmp_path / "old"),
            recipe,
        )
        spaced = change_recipe(recipe, ["text.strategy=space", "text.num_windows=2"])
        fresh = replace(old, out=str(tmp_path / "fresh"), recipe=spaced)
        new = replace(fresh, out=str(tmp_path / "new"), reuse=old.out)
        prepare = partial(run_job, network_policy=NetworkPolicy(frozenset({host})))
        prepare(old, Session(0), lambda _: None)
        prepare(fresh, Session(0), lambda _: None)
        web.asked.clear()
        (summary,) = prepare(new, Session(0), lambda _: None)
        assert not web.asked
        assert files(new.out) == files(fresh.out) != files(old.out)
        assert summary.failures == {"http_404": 1, "http_500": 1, "not_an_image": 1}
        assert reasons(tmp_path / "new") == reasons(tmp_path / "fresh")

        web.answers["/late"] = answers["/0"]
        (again,) = prepare(new, Session(0), lambda _: None, retry_failed=True)
        assert list(web.asked) == ["/late"]
        assert again.num_written == NUM + 1
        assert verify(f"{new.out}/test").ok

        few = replace(old, out=str(tmp_path / "few"), limit=4)
        prepare(few, Session(0), lambda _: None)
        web.asked.clear()
        rest = replace(fresh, out=str(tmp_path / "rest"), reuse=few.out)
        prepare(rest, Session(0), lambda _: None)
        assert len(web.asked) == len(urls) - 4, "what is not there is fetched"
        reader = ShardReader(f"{rest.out}/test")
        assert len(set(reader.keys)) == NUM + 1

        with pytest.raises(ConfigError, match="is the same directory as --out"):
            prepare(replace(old, reuse=old.out), Session(0), lambda _: None)

        for path in Path(old.out, "test").glob("*.tar"):
            content = bytearray(path.read_bytes())
            # The tar of a shard whose images all failed is empty.
            if len(content) > 2000:
                content[2000] ^= 1
                path.write_bytes(content)
        with pytest.raises(ShardError, match="does not match its checksum; run `d2i verify`"):
            prepare(replace(new, out=str(tmp_path / "lie")), Session(0), lambda _: None)


def test_reuse_fetches_source_bytes_that_were_not_kept(tmp_path: Path, settings: list[str]) -> None:
    """Training shards keep no source bytes by default."""
    source = tmp_path / "chats"
    source.mkdir()
    (source / "0.jpg").write_bytes(data := noise_image())
    line = '{"id": "a", "turns": [{"text": "look", "images": ["0.jpg"]}]}'
    (source / "train.jsonl").write_text(line)
    recipe = resolve_recipe("demo", settings[1::2])
    old = PreprocessRequest("jsonl", str(source), str(tmp_path / "old"), recipe)
    run_job(old, Session(0), lambda _: None)
    keeping = change_recipe(recipe, ["preprocess.keep_images=always"])
    new = replace(old, out=str(tmp_path / "new"), recipe=keeping, reuse=old.out)
    run_job(new, Session(0), lambda _: None)
    assert ShardReader(f"{new.out}/train").read_image(0) == data
    # Now the shard keeps them, and the file itself is no longer needed.
    (source / "0.jpg").unlink()
    spaced = change_recipe(keeping, ["text.strategy=space"])
    run_job(
        replace(new, out=str(tmp_path / "more"), recipe=spaced, reuse=new.out),
        Session(0),
        lambda _: None,
    )
    assert ShardReader(str(tmp_path / "more" / "train")).read_image(0) == data


def test_reuse_encodes_kept_source_bytes_with_other_encoders(
    tmp_path: Path, settings: list[str]
) -> None:
    """Three autoencoders and resolutions from images that were fetched once."""
    answers = {f"/{n}": sends(noise_image(size=(64 + 9 * n, 64))) for n in range(NUM)}
    failing = {"/gone": sends(b"", 404), "/late": sends(b"", 500), "/text": sends(b"hello")}
    with running(WebServer("127.0.0.1", answers | failing)) as web:
        host = f"127.0.0.1:{web.port}"
        urls = {f"c{path[1:]}": [f"http://{host}{path}"] for path in web.answers}
        keeping = ["preprocess.num_samples_per_shard=3", "preprocess.keep_images=always"]
        recipe = resolve_recipe("demo", [*settings[1::2], *keeping])
        source = write_chats(tmp_path / "chats", urls)
        (source / "train.jsonl").write_text((source / "test.jsonl").read_text())
        old = PreprocessRequest("jsonl", str(source), str(tmp_path / "old"), recipe)
        prepare = partial(run_job, network_policy=NetworkPolicy(frozenset({host})))
        prepare(old, Session(0), lambda _: None)
        first = {split: ledger_facts(old.out, split) for split in ("train", "test")}
        assert sum(reason == "ok" for reason, *_ in first["test"].values()) == NUM
        kl = str(save_tiny_vae(tmp_path / "kl"))
        changes = (
            ["image.resolution=96", "image.draft=false"],
            ["encoders.compute_batch_size=3"],
            [f"encoders.vae={kl}", "encoders.vae_kind=kl", "preprocess.format=2"],
        )
        for number, changed in enumerate(changes):
            request = replace(
                old,
                out=str(tmp_path / f"new{number}"),
                recipe=change_recipe(recipe, changed),
                reuse=old.out,
            )
            web.asked.clear()
            summaries = prepare(request, Session(0), lambda _: None)
            assert not web.asked
            assert [s.failures for s in summaries] == 2 * [
                {"http_404": 1, "http_500": 1, "not_an_image": 1}
            ]
            fresh = replace(request, out=str(tmp_path / f"fresh{number}"), reuse=None)
            prepare(fresh, Session(0), lambda _: None)
            assert files(request.out) == files(fresh.out) != files(old.out)
            for split, facts in first.items():
                assert ledger_facts(request.out, split) == facts
            assert verify(f"{request.out}/test").ok

        # Without kept bytes there is nothing to encode.
        bare = change_recipe(recipe, ["preprocess.keep_images=auto"])
        less = replace(old, out=str(tmp_path / "less"), recipe=bare)
        prepare(less, Session(0), lambda _: None)
        again = replace(
            less,
            out=str(tmp_path / "again"),
            recipe=change_recipe(bare, ["encoders.compute_batch_size=3"]),
            reuse=less.out,
        )
        message = r"compute_batch_size: 8.*; expected source bytes to encode again"
        with pytest.raises(ShardError, match=message):
            prepare(again, Session(0), lambda _: None)
        (summary,) = prepare(replace(again, split="test"), Session(0), lambda _: None)
        assert summary.num_written == NUM
