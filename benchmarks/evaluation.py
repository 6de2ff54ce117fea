"""Cost of the evaluation, compared with torch-fidelity and with bare sampling.

    python benchmarks/evaluation.py --photos photos --num 2000 --inception 256

Every figure is measured in a separate process with one thread:

- metrics: the same crops of photographs, as PNG files, through `torch_fidelity.calculate_metrics`
  and through d2i on 1 and on 2 Ray workers, with the same extractor: the demo's CLIP, and with
  `--inception NUM` that many images through Inception as well, with torch-fidelity's weights if
  they are cached, else random ones, which take the same time. Scores, and CPU seconds of the
  busiest worker from the first image to the scores; startup and loading are excluded.
- scheduling: 23,772 instances without work, over 2 Ray workers, each task written to disk;
  wall-clock seconds, including Ray's start.
- overhead: a whole evaluation of the demo's network, compared with bare sampling of the same
  images; CPU seconds, where the evaluation also loads the weights.

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE_PX = 64
NUM_SCHEDULED = 23_772
BATCH_SIZE = 32
TASK_SIZE = 50
"""Instances a task, as the recipes' compute batch."""
NUM_DIALOGS = 600
"""Of the corpus that overhead is measured on."""


def make_images(photos: Path, directory: Path, num: int) -> None:
    """Crop random squares of photographs, `num` reference and `num` generated images."""
    dice = np.random.default_rng(0)
    images = []
    for path in sorted(photos.rglob("*.jpg")):
        with Image.open(path) as photograph:
            images.append(photograph.convert("RGB"))
    for name in ("true", "drawn"):
        (directory / name).mkdir(parents=True)
        for number in range(num):
            image = images[int(dice.integers(len(images)))]
            side = int(dice.integers(SIDE_PX, min(image.size)))
            left, top = (int(dice.integers(0, size - side + 1)) for size in image.size)
            square = image.crop((left, top, left + side, top + side))
            square.resize((SIDE_PX, SIDE_PX)).save(directory / name / f"{number:06d}.png")


def published_inception() -> Path | None:
    """Return the path of torch-fidelity's own weights, if they are cached."""
    import torch

    name = "weights-inception-2015-12-05-6726825d.pth"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    return path if path.is_file() else None


def save_inception(path: Path) -> None:
    """Save torch-fidelity's Inception with seeded random weights, in its own file format."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    class Unfilled(inception.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: object) -> None:
            """Keep the weights it was built with."""

    torch.manual_seed(0)
    inception.load_state_dict_from_url = lambda *_, **__: {}
    state = Unfilled("random", ["2048"]).state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
    torch.save(state, path)


def load_extractor(inception: str | None) -> Any:
    """Load d2i's extractor: Inception from a file, or the demo's CLIP with its classes."""
    from hashlib import sha256

    from d2i.config import MetricsConfig
    from d2i.encoders import load_encoders
    from d2i.eval.features.extractors import InceptionExtractor, build_extractor
    from d2i.eval.features.text_tower import TextTower
    from d2i.recipes import load_recipe

    if inception:
        digits = sha256(Path(inception).read_bytes()).hexdigest()
        config = MetricsConfig(extractor_weights=inception, extractor_sha256=digits)
        return InceptionExtractor(config, BATCH_SIZE, "cpu")
    recipe = load_recipe("demo")
    encoders = load_encoders(recipe.encoders, "cpu")
    return build_extractor(recipe, encoders, TextTower.load(recipe, encoders, "cpu"), "cpu")


def measure_torch_fidelity(directory: Path, inception: str | None) -> dict[str, Any]:
    """Time torch-fidelity's evaluation of the two directories."""
    import torch
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    torch.set_num_threads(1)
    extractor = None if inception else load_extractor(None)

    class DemoClip(FeatureExtractorBase):  # type: ignore[misc]
        """The demo's CLIP with the interface of a torch-fidelity extractor."""

        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)

        def forward(self, pixels: Any) -> tuple[Any, ...]:
            found = extractor.extract(pixels.permute(0, 2, 3, 1).numpy())  # type: ignore[union-attr]
            parts = {"features": found.features, "logits": found.logits}
            return tuple(torch.from_numpy(parts[name]) for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    torch_fidelity.register_feature_extractor("demo-clip", DemoClip)
    chosen = (
        {"feature_extractor_weights_path": inception}
        if inception
        else {"feature_extractor": "demo-clip"}
    )
    num = len(list((directory / "true").iterdir()))
    loading = _time_loading(inception) if inception else 0.0
    start = time.process_time()
    # The Inception Score is that of the first directory: the generated images.
    found = torch_fidelity.calculate_metrics(
        input1=str(directory / "drawn"),
        input2=str(directory / "true"),
        **chosen,
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=min(1000, num),
        batch_size=BATCH_SIZE,
        save_cpu_ram=True,
        cuda=False,
        cache=False,
        verbose=False,
    )
    scores = {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "is": found["inception_score_mean"],
    }
    return {"seconds": time.process_time() - start - loading, "scores": scores}


def _time_loading(inception: str) -> float:
    """Return the seconds that torch-fidelity takes to load Inception, which its time includes."""
    from torch_fidelity.utils import create_feature_extractor

    names = ["2048", "logits_unbiased"]
    chosen = {"feature_extractor_weights_path": inception, "cuda": False, "verbose": False}
    # A first call for what a process loads only once, such as modules.
    create_feature_extractor("inception-v3-compat", names, **chosen)
    start = time.process_time()
    create_feature_extractor("inception-v3-compat", names, **chosen)
    return time.process_time() - start


@dataclass(frozen=True)
class FeatureWorkerBuilder:
    """Builds a `FeatureWorker` in its process; picklable."""

    directory: Path
    inception: str | None

    def __call__(self) -> FeatureWorker:
        """Load the extractor."""
        import torch

        torch.set_num_threads(1)
        return FeatureWorker(self.directory, load_extractor(self.inception))


class FeatureWorker:
    """Reads the images of one task and computes their features."""

    def __init__(self, directory: Path, extractor: Any) -> None:
        self._directory, self._extractor = directory, extractor

    def run(self, task: tuple[str, int, int]) -> tuple[int, float, Any]:
        """Return the process id, the CPU seconds, and the features."""
        begun = time.process_time()
        name, start, stop = task
        pixels = [
            np.asarray(Image.open(self._directory / name / f"{number:06d}.png"))
            for number in range(start, stop)
        ]
        found = self._extractor.extract(np.stack(pixels))
        return os.getpid(), time.process_time() - begun, found


def measure_d2i(directory: Path, inception: str | None, num_workers: int) -> dict[str, Any]:
    """Time d2i's extraction on Ray workers, and its scores."""
    import torch

    from d2i.cluster import Session
    from d2i.eval.metrics.compute import compute_scores

    torch.set_num_threads(1)
    num = len(list((directory / "true").iterdir()))
    size = 2 * BATCH_SIZE
    tasks = [
        (name, start, min(start + size, num))
        for name in ("true", "drawn")
        for start in range(0, num, size)
    ]
    with Session(num_workers) as session:
        found = dict(session.map(FeatureWorkerBuilder(directory, inception), tasks))
    by_worker: Counter[int] = Counter()
    for process, seconds, _ in found.values():
        by_worker[process] += seconds
    start = time.process_time()
    true, drawn = (_joined(found[t][2] for t in tasks if t[0] == n) for n in ("true", "drawn"))
    pairs = np.ones((num, 2), np.float32)
    # Generated images first, as in torch-fidelity: KID draws the subsets of the first set first.
    scores = compute_scores(drawn[0], true[0], drawn[1], pairs, pairs)
    scoring = time.process_time() - start
    seconds = max(by_worker.values()) + scoring
    compared = {name: scores[name] for name in ("fid", "kid", "is")}
    return {"seconds": seconds, "scoring": scoring, "scores": compared}


def _joined(parts: Iterable[Any]) -> tuple[Any, Any]:
    found = list(parts)
    return (
        np.concatenate([part.features for part in found]),
        np.concatenate([part.logits for part in found]),
    )


@dataclass(frozen=True)
class NullWorker:
    """Generates nothing and writes its task as an evaluation does; it is its own builder."""

    out_url: str

    def __call__(self) -> NullWorker:
        """Return itself."""
        return self

    def run(self, task: Any) -> int:
        """Write a task without features."""
        from d2i.eval.tasks import write_task

        write_task(self.out_url, task, {"keys": np.arange(task.start, task.stop)})
        return len(task.indices)


def measure_scheduling(directory: Path) -> dict[str, Any]:
    """Time all tasks of a null sampler over 2 Ray workers, Ray's start included."""
    from d2i.cluster import Session
    from d2i.eval.tasks import finished_tasks, plan_tasks

    start = time.perf_counter()
    tasks = plan_tasks(NUM_SCHEDULED, TASK_SIZE)
    with Session(2) as session:
        done = sum(count for _, count in session.map(NullWorker(str(directory / "null")), tasks))
    if done != NUM_SCHEDULED or len(finished_tasks(str(directory / "null"))) != len(tasks):
        raise RuntimeError(f"{done} of {NUM_SCHEDULED} instances were done")
    return {"instances": done, "tasks": len(tasks), "seconds": time.perf_counter() - start}


def measure_overhead(directory: Path) -> dict[str, Any]:
    """Time a whole evaluation in this process, and the sampling alone, in CPU seconds."""
    import torch

    from d2i.cluster import Session
    from d2i.demo.corpus import write_corpus
    from d2i.encoders import load_encoders
    from d2i.eval.job import evaluate
    from d2i.eval.prompts import PromptReader
    from d2i.eval.request import EvalRequest
    from d2i.eval.system import SystemContext
    from d2i.eval.systems import build_system, parse_system
    from d2i.preprocess.job import PreprocessRequest, preprocess
    from d2i.recipes import load_recipe
    from d2i.shards import ShardReader, data_set_url

    torch.set_num_threads(1)
    write_corpus(directory / "corpus", NUM_DIALOGS, 1)
    recipe = load_recipe("demo")
    source, data = str(directory / "corpus"), str(directory / "data")
    request = PreprocessRequest("mmdialog", source, data, recipe)
    preprocess(request, Session(0), lambda _: None)
    spec = parse_system("uvit-s", "demo:backbone", recipe)
    reader = ShardReader(data_set_url(data, "test"))
    encoders = load_encoders(recipe.encoders, "cpu")
    system = build_system(SystemContext(spec, recipe, encoders, reader.keys, "cpu"))
    prompts = PromptReader(reader, recipe.text, "full")
    start = time.process_time()
    system.generate([prompts.read(index) for index in range(len(reader))])
    bare = time.process_time() - start
    start = time.process_time()
    evaluate(
        EvalRequest(recipe, spec, data_set_url(data, "test"), str(directory / "scores")),
        Session(0),
        lambda _: None,
    )
    whole = time.process_time() - start
    return {"pictures": len(reader), "bare_cpu_s": bare, "whole_cpu_s": whole}


def run_in_process(name: str, directory: Path, inception: Path | None) -> dict[str, Any]:
    """Measure one figure in a separate process."""
    command = [sys.executable, __file__, "--measure", name, "--folder", str(directory)]
    command += ["--weights", str(inception)] if inception else []
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    here = {"PYTHONPATH": str(Path(__file__).parent), "XDG_CACHE_HOME": str(directory / "cache")}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | one_thread | here
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found}", file=sys.stderr)
    return found


def compare(directory: Path, inception: Path | None) -> dict[str, Any]:
    """Measure torch-fidelity and d2i alternately, and compare the scores."""
    names = ("peer", "ours on 1", "ours on 2")
    found = {name: run_in_process(name, directory, inception) for name in names}
    peer = found["peer"]["scores"]
    differences: Mapping[str, Callable[[float, float], float]] = {
        "fid": lambda ours, theirs: abs(ours - theirs) / abs(theirs),
        "kid": lambda ours, theirs: abs(ours - theirs),
        "is": lambda ours, theirs: abs(ours - theirs) / theirs,
    }
    return {
        "seconds": {name: round(value["seconds"], 2) for name, value in found.items()},
        "differences": {
            name: max(distance(found[ours]["scores"][name], peer[name]) for ours in names[1:])
            for name, distance in differences.items()
        },
        "same_on_2_as_on_1": found["ours on 1"]["scores"] == found["ours on 2"]["scores"],
        "scores": peer,
    }


def machine() -> dict[str, object]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "cores": len(names)}


def measure(name: str, directory: Path, inception: str | None) -> dict[str, Any]:
    """Measure one figure in this process."""
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "peer": lambda: measure_torch_fidelity(directory, inception),
        "ours on 1": lambda: measure_d2i(directory, inception, 1),
        "ours on 2": lambda: measure_d2i(directory, inception, 2),
        "scheduling": lambda: measure_scheduling(directory),
        "overhead": lambda: measure_overhead(directory),
    }
    return work[name]()


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, required="--measure" not in sys.argv)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument(
        "--inception",
        type=int,
        default=0,
        metavar="NUM",
        help=f"images per set; a multiple of {BATCH_SIZE} fills d2i's batches (256: 4 minutes)",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.directory, options.weights)))
        return
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        make_images(options.photos, directory / "clip", options.num)
        found = {"metrics, demo's CLIP": compare(directory / "clip", None)}
        if options.inception:
            weights = published_inception() or directory / "inception.pth"
            if not weights.exists():
                save_inception(weights)
            make_images(options.photos, directory / "inception", options.inception)
            found["metrics, Inception"] = compare(directory / "inception", weights)
        for name in ("scheduling", "overhead"):
            (directory / name).mkdir()
            found[name] = run_in_process(name, directory / name, None)
    print(json.dumps({"machine": machine(), "python": platform.python_version(), **found}))


if __name__ == "__main__":
    main()
