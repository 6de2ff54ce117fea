"""A URL in the files of a foreign data set, run or evaluation is never contacted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2i.cli.eval import evaluate
from d2i.cli.inspect import inspect
from d2i.cli.sample import sample
from d2i.cli.select import select
from d2i.errors import ConfigError, DataError
from d2i.eval.metric_card import describe_training
from d2i.io import storage
from d2i.preprocess.job_files import JobFiles
from d2i.recipes import change_recipe, load_recipe, read_stored_recipe
from d2i.report.data_split import read_conversations, read_splits
from d2i.report.evaluation import Evaluation
from d2i.report.training import training_section
from d2i.shards import Sample, json_bytes, npy_bytes, write_manifest, write_shard
from tests.samples import metadata
from tests.servers import WebServer, running


@pytest.fixture
def server() -> Iterator[WebServer]:
    with running(WebServer("127.0.0.1", {})) as web:
        yield web
    assert not web.asked


def foreign_recipe(location: str, section: str, name: str) -> dict[str, Any]:
    values = json.loads(load_recipe("demo").model_dump_json())
    values[section][name] = location
    return dict(values)


def write_data(directory: Path, recipe: dict[str, Any]) -> Path:
    import numpy as np

    moments = npy_bytes(np.zeros((8, 8, 8), np.float16))
    members = {"json": json_bytes(metadata("test-1")), "moments.npy": moments}
    (directory / "test").mkdir(parents=True)
    write_shard([Sample("test-1", members)], str(directory / "test"), 0, failures={})
    write_manifest(str(directory / "test"), {})
    (directory / "recipe.json").write_text(json.dumps(recipe))
    return directory


@pytest.mark.parametrize("form", ["{}/vae", "simplecache::{}/vae", "HTTP{}/vae"])
def test_commands_never_contact_url_in_foreign_file(
    tmp_path: Path, server: WebServer, form: str
) -> None:
    url = f"http://127.0.0.1:{server.port}"
    location = form.format(url.removeprefix("http") if form.startswith("HTTP") else url)
    recipe = foreign_recipe(location, "encoders", "vae")
    data, run = write_data(tmp_path / "data", recipe), tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"recipe": recipe, "data": url}))
    dialog = tmp_path / "dialog.txt"
    dialog.write_text("a red ball")
    message = r"encoders\.vae is .*, a URL in a file .*; if you trust that host, give --set"
    with pytest.raises(ConfigError, match=message):
        inspect(str(data / "test"), html=str(tmp_path / "page.html"))
    for system in (f"run:{run}", "uvit-s"):
        with pytest.raises(ConfigError, match=message):
            evaluate(system, str(data), str(tmp_path / "out"), weights="demo:backbone")
    with pytest.raises(ConfigError, match=message):
        sample(str(run), str(dialog))
    with pytest.raises(ConfigError, match=message):
        select(run=str(run))


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("corpus", "image_root"),
        ("fetch", "downloads"),
        ("encoders", "clip_image"),
        ("encoders", "clip_text"),
        ("encoders", "text_prefix"),
        ("metrics", "extractor_weights"),
        ("metrics", "clip_text"),
    ],
)
def test_url_in_command_line_setting_is_accepted(tmp_path: Path, section: str, name: str) -> None:
    data = write_data(tmp_path / "data", foreign_recipe("ftp://h/x", section, name))
    kept, own = read_stored_recipe(str(data)), f"{section}.{name}=https://mine/x"
    with pytest.raises(ConfigError, match=rf"--set {section}\.{name}=URL"):
        change_recipe(kept, ["sample.seed=1"])
    assert getattr(getattr(change_recipe(kept, [own]), section), name) == "https://mine/x"


@pytest.mark.parametrize("location", ["s3://bucket/vae", "memory://vae", "/a/vae", "file:///a/vae"])
def test_location_without_host_is_accepted_in_file(tmp_path: Path, location: str) -> None:
    data = write_data(tmp_path / "data", foreign_recipe(location, "encoders", "vae"))
    assert not storage.names_host(location)
    assert change_recipe(read_stored_recipe(str(data)), []).encoders.vae == location


def test_foreign_urls_of_data_images_and_run_are_never_contacted(
    tmp_path: Path, server: WebServer
) -> None:
    url = f"http://127.0.0.1:{server.port}/data"
    recipe = foreign_recipe("demo:vae", "encoders", "vae")
    (tmp_path / "config.json").write_text(json.dumps({"recipe": recipe, "data": url}))
    assert describe_training(str(tmp_path))["trained_corpus"] is None

    for read in (read_splits, lambda location: read_conversations(location, {"k"}, 1)):
        with pytest.raises(
            DataError, match="is a URL with a host, which a report does not contact"
        ):
            read(url)
    evaluation = Evaluation(url="e", card={"run": url}, scores={}, judged=None, image_urls={})
    assert "is a URL with a host, which a report does not contact" in str(
        training_section([evaluation])
    )

    split = write_data(tmp_path / "data", recipe) / "test"
    (split / "plan").mkdir()
    counts = dict.fromkeys(("num_instances", "num_images", "num_shards", "num_excluded"), 1)
    plan = counts | {"problems": {}, "decided_by": {"source": url, "recipe": {}}}
    (split / "plan" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=r"if you trust that host, give --set corpus\.image_root"):
        JobFiles(str(split)).source()
