"""The cluster files match their schemas, and the commands in them and in the README parse."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import kubernetes_validate
import moto
import pytest
import yaml

from tests.command_lines import parse_d2i
from tests.shared import SHARED, needs_shared

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
LAUNCHER = sorted((CLUSTER / "ray").glob("*.yaml"))
SLURM = sorted((CLUSTER / "slurm").glob("*"))
FILES = [CLUSTER / "Dockerfile", *LAUNCHER, *KUBERNETES, *SLURM]
SCRIPTS = sorted([*SLURM, *(ROOT / "train").glob("*.sh"), ROOT / ".ci" / "run"])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(*kinds: str) -> list[Any]:
    found = [(path, doc) for path in KUBERNETES for doc in documents(path)]
    return [pytest.param(d, id=f"{p.stem}-{d['kind']}") for p, d in found if d["kind"] in kinds]


def ray_clusters() -> list[Any]:
    """The spec of every Ray cluster, of its own or in a job."""
    found = [(p, d["spec"]) for p in KUBERNETES for d in documents(p) if d["kind"][:3] == "Ray"]
    return [pytest.param(s.get("rayClusterSpec", s), id=p.stem) for p, s in found]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def forbid_unknown_fields(schema: Any) -> Any:
    """Return the schema closed to unknown fields, which Kubernetes would drop silently."""
    if isinstance(schema, list):
        return [forbid_unknown_fields(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: forbid_unknown_fields(part) for key, part in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        closed["additionalProperties"] = False
    return closed


@cache
def schema_of(kind: str, api_version: str) -> dict[str, Any]:
    text = (SHARED / "schemas" / f"ray.io_{kind.lower()}s.yaml").read_text()
    # The pure Python loader takes ten seconds for these.
    definition = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]
    schemas = {
        f"{definition['group']}/{version['name']}": version["schema"]["openAPIV3Schema"]
        for version in definition["versions"]
    }
    closed: dict[str, Any] = forbid_unknown_fields(schemas[api_version])
    # The schema of metadata belongs to Kubernetes itself.
    closed["properties"]["metadata"] = {"type": "object"}
    return closed


def check_by_kuberay(document: dict[str, Any]) -> None:
    schema = schema_of(document["kind"], document["apiVersion"])
    jsonschema.Draft202012Validator(schema).validate(document)


@needs_shared
@pytest.mark.parametrize("document", of_kind("RayCluster", "RayJob"))
def test_ray_resource_matches_kuberay_schema(document: dict[str, Any]) -> None:
    check_by_kuberay(document)


@needs_shared
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("authOptions.mode", "tokn"),
        ("authOption", {}),
        ("headGroupSpec.template.spec.containers.0.imagee", "x"),
        ("workerGroupSpecs.0.replicas", "four"),
        ("workerGroupSpecs.0.template.spec.nodeSelectr", {}),
    ],
)
def test_kuberay_schema_rejects_misspelt_field(path: str, value: object) -> None:
    (document,) = documents(CLUSTER / "kubernetes" / "cluster.yaml")
    node: Any = document["spec"]
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check_by_kuberay(document)


KUBERNETES_KINDS = ("ServiceAccount", "NetworkPolicy", "PersistentVolumeClaim", "Service", "Job")


@pytest.mark.parametrize("document", of_kind(*KUBERNETES_KINDS))
def test_kubernetes_resource_matches_schema(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_every_kubernetes_document_has_a_schema_test() -> None:
    checked = of_kind("RayCluster", "RayJob", *KUBERNETES_KINDS)
    assert len(checked) == sum(len(documents(path)) for path in KUBERNETES) == 8


def all_pods() -> list[Any]:
    """The pods of every cluster, and of every job without one."""
    of_clusters = [pytest.param(pods(*cluster.values), id=cluster.id) for cluster in ray_clusters()]
    of_jobs = [pytest.param([*map(job_template, job.values)], id=job.id) for job in of_kind("Job")]
    return of_clusters + of_jobs


def job_template(job: dict[str, Any]) -> dict[str, Any]:
    template: dict[str, Any] = job["spec"]["template"]
    return template


@pytest.mark.parametrize("templates", all_pods())
def test_pods_are_valid_and_run_unprivileged(templates: list[dict[str, Any]]) -> None:
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = template["metadata"] | {"name": "pod"}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["serviceAccountName"] == "d2i"
        assert template["metadata"]["labels"] == {"app": "d2i"}, "selected by the network policy"
        containers = [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
        for container in containers:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            variables = {variable["name"] for variable in container.get("env", [])}
            assert not any("KEY" in v or "SECRET" in v or "TOKEN" in v for v in variables)


@pytest.mark.parametrize("cluster", ray_clusters())
def test_ray_object_store_fits_in_shared_memory(cluster: dict[str, Any]) -> None:
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION as SHARE

    for template in pods(cluster):
        (container,) = template["spec"]["containers"]
        (memory,) = (v["emptyDir"] for v in template["spec"]["volumes"] if v["name"] == "memory")
        assert {"name": "memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        object_store_gib = SHARE * gibibytes(container["resources"]["limits"]["memory"])
        # Otherwise Ray falls back to the disk, with only a warning in a log.
        assert object_store_gib <= gibibytes(memory["sizeLimit"])


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("cluster", ray_clusters())
def test_ray_cluster_uses_token_auth_and_pinned_version(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == pins()["ray"]


def test_only_ray_job_exposes_dashboard() -> None:
    dashboard_hosts = {
        document["kind"]: spec["headGroupSpec"]["rayStartParams"]["dashboard-host"]
        for path in KUBERNETES
        for document in documents(path)
        if document["kind"][:3] == "Ray"
        for spec in [document["spec"].get("rayClusterSpec", document["spec"])]
    }
    assert dashboard_hosts == {"RayCluster": "127.0.0.1", "RayJob": "0.0.0.0"}


@pytest.mark.parametrize("document", of_kind("RayJob"))
def test_ray_job_entrypoint_parses_and_is_retried(document: dict[str, Any]) -> None:
    parse_d2i(document["spec"]["entrypoint"])
    assert document["spec"]["backoffLimit"] > 0
    assert not set(document["spec"]["entrypoint"]) & set("|&;<>()$`\"'"), "KubeRay quotes nothing"


@pytest.mark.parametrize("document", of_kind("Job"))
def test_training_job_names_its_nodes_and_ranks_once(document: dict[str, Any]) -> None:
    job, pod = document["spec"], job_template(document)["spec"]
    (container,) = pod["containers"]
    words = shlex.split(container["args"][0].replace("\\\n", " "))
    given = {word: after for word, after in itertools.pairwise(words) if word.startswith("--")}
    assert int(given["--nnodes"]) == job["completions"] == job["parallelism"]
    assert given["--nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    (service,) = [doc for path in KUBERNETES for doc in documents(path) if doc["kind"] == "Service"]
    name = document["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert given["--master-addr"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    ((init,),) = [container["args"] for container in pod["initContainers"]]
    parse_d2i(init)
    # What only an evaluation computes with.
    assert init.endswith("--set metrics.extractor=clip --set metrics.clip_text=null")


@pytest.mark.parametrize("document", of_kind("Job"))
def test_training_job_does_not_count_stopped_pods_as_failed(document: dict[str, Any]) -> None:
    job, (container,) = document["spec"], job_template(document)["spec"]["containers"]
    script = container["args"][0]
    assert script.splitlines()[-1] == 'test ! -e "$RUN/stopped.json" || exit 75'
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] == "Ignore"
    stopped = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert stopped == {"containerName": container["name"], "operator": "In", "values": [75]}


@pytest.mark.parametrize("document", of_kind("Job"))
def test_training_job_waits_for_late_nodes(document: dict[str, Any]) -> None:
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import create_rdzv_handler
    from torch.distributed.run import config_from_args, parse_args

    (container,) = job_template(document)["spec"]["containers"]
    command = container["args"][0].replace("\\\n", " ").split(" &\n")[0]
    config, _, _ = config_from_args(
        parse_args(shlex.split(command.replace("$JOB_COMPLETION_INDEX", "0"))[1:])
    )
    parameters = RendezvousParameters(
        config.rdzv_backend, "127.0.0.1:29500", config.run_id, 2, 2, **config.rdzv_configs
    )
    handler: Any = create_rdzv_handler(parameters)
    assert handler.timeout.total_seconds() == 7200


@pytest.mark.parametrize("path", KUBERNETES, ids=name)
def test_caches_are_on_the_shared_volume(path: Path) -> None:
    caches = re.findall(r"\{name: (HF_HOME|TORCH_HOME), value: (\S+)/\w+\}", path.read_text())
    expected = [] if path.stem == "access" else ["HF_HOME", "TORCH_HOME"]
    assert caches == [(cache, "/srv/d2i") for cache in expected]


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_ray_launcher_accepts_cluster_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(path)
    prepared = prepare_config(config)
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared | {"max_worker": 3})
    assert config["file_mounts"] == {"/home/d2i/.ray/auth_token": "~/.ray/auth_token"}
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head


def test_ray_launcher_starts_head_and_gpu_nodes_on_emulated_aws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    # Ray writes an SSH key there.
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "emulated")
    monkeypatch.setenv("MOTO_ACCOUNT_ID", "111122223333")
    (config,) = documents(CLUSTER / "ray" / "aws.yaml")
    with moto.mock_aws():
        for profile in PROFILES.values():
            boto3.client("iam").create_instance_profile(InstanceProfileName=f"d2i-{profile}")
        ready = bootstrap_aws(prepare_config(config))
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for kind, node_type in ready["available_node_types"].items():
            tags = {"ray-user-node-type": kind}
            (instance,) = provider.create_node(node_type["node_config"], tags, 1).values()
            assert instance.metadata_options["HttpTokens"] == "required"
            assert instance.iam_instance_profile["Arn"].endswith(f"/d2i-{PROFILES[kind]}")
            assert (instance.instance_lifecycle == "spot") == (kind == "gpu")


PROFILES = {"head": "head", "gpu": "worker"}


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    run_linter("shellcheck", "--severity=style", str(path))


def test_dockerfile_passes_hadolint() -> None:
    run_linter("hadolint", "--failure-threshold=style", str(CLUSTER / "Dockerfile"))


def run_linter(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_docker_images_run_as_non_root_with_constraints() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    stages = [line.split()[-1] for line in lines if line.startswith("FROM")]
    assert stages == ["base", "cpu", "cuda"]
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"] * 2
    assert sum("--constraint constraints.txt" in line for line in lines) == 2
    python = next(line.split()[1] for line in lines if line.startswith("FROM"))
    assert re.fullmatch(r"python:3\.1[12]-[a-z]+-[a-z]+", python)
    for line in lines:
        for source in line.split()[1:-1] if line.startswith("COPY") else []:
            assert (ROOT / source).exists(), source


def test_slurm_scripts_requeue_on_signal() -> None:
    for path in SLURM:
        options = dict(sbatch_options(path))
        assert "requeue" in options
        assert "USR1@" in options["signal"]
        assert 'scontrol requeue "$SLURM_JOB_ID"' in path.read_text()


SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time"),
    *("exclusive", "requeue", "open-mode", "signal"),
}


def sbatch_options(path: Path) -> Iterator[tuple[str, str]]:
    """The options of a batch script, up to its first command, as sbatch reads them."""
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            return
        if line.startswith("#SBATCH"):
            option, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert option in SBATCH, line
            yield option, value


def header(path: Path) -> list[str]:
    """The commands at the top of a file: the indented lines of its first comment."""
    lines = path.read_text().splitlines()
    lines = lines[1:] if lines[0].startswith("#!") else lines
    comment = lines[: lines.index("#")]
    assert all(line.startswith("#") for line in comment), name(path)
    return [line.removeprefix("#   ") for line in comment if line.startswith("#   ")]


def readme_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_cluster_file_header_has_three_or_four_commands(path: Path) -> None:
    """To start, to read the results, and to stop."""
    assert 3 <= len(header(path)) <= 4


LINES = [*readme_lines(), *(line for path in FILES for line in header(path))]


@pytest.mark.parametrize("line", LINES)
def test_documented_commands_parse(line: str) -> None:
    words = shlex.split(line)
    PARSERS[words[0]](words)


def parse_docker(words: list[str]) -> None:
    if words[1] == "run":
        parse_d2i(line_of(words[words.index("d2i") :]))
        return
    assert words[1] == "build"
    options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert set(options) == {"--target", "--tag", "--file"}
    assert f" AS {options['--target']}\n" in (ROOT / options["--file"]).read_text()


def parse_ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    command: Any = cli
    rest = words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context("ray", list(rest))
    if given := context.params.get("cluster_config_file"):
        assert ROOT / given in LAUNCHER
    run = " ".join(context.params.get("entrypoint", ())) or context.params.get("cmd", "")
    for part in filter(None, run.split(" && ")):
        parse_d2i(part)


def parse_kubectl(words: list[str]) -> None:
    verb, _, given = words[1], *split_at(words, "--")
    assert verb in {"create", "apply", "delete", "exec", "wait", "port-forward"}
    named = [ROOT / words[i + 1] for i, word in enumerate(words) if word == "--filename"]
    assert (verb in {"apply", "delete"}) == bool(named)
    assert set(named) <= set(KUBERNETES)
    resources = [document for path in KUBERNETES for document in documents(path)]
    known = {f"{d['kind'].lower()}/{d['metadata']['name']}" for d in resources}
    # KubeRay makes a service for the head of each cluster.
    known |= {f"service/{n.partition('/')[2]}-head-svc" for n in known if n[:10] == "raycluster"}
    targets = [word for word in words if re.fullmatch(r"[a-z]+/[a-z0-9-]+", word)]
    assert set(targets) <= known
    assert verb not in {"exec", "wait", "port-forward"} or targets
    if given:
        parse_d2i(line_of(given))


def parse_sbatch(words: list[str]) -> None:
    script, arguments = ROOT / words[1], words[2:]
    assert script in SLURM
    if script.stem == "ray":
        parse_d2i(line_of(["d2i", *arguments, "--ray-address", "head:20001"]))
        return
    from typer.main import get_command

    from d2i.train.launch import app

    get_command(app).make_context("launch", ["--run", *arguments])


def parse_scancel(words: list[str]) -> None:
    jobs = {dict(sbatch_options(path))["job-name"] for path in SLURM}
    assert words[-2] == "--name"
    assert words[-1] in jobs


def parse_export(words: list[str]) -> None:
    assert words[1] == "RAY_AUTH_MODE=token"


def line_of(words: list[str]) -> str:
    return shlex.join(words)


def split_at(words: list[str], mark: str) -> tuple[list[str], list[str]]:
    at = words.index(mark) if mark in words else len(words)
    return words[:at], words[at + 1 :]


PARSERS: dict[str, Callable[[list[str]], None]] = {
    "d2i": lambda words: parse_d2i(line_of(words)),
    "docker": parse_docker,
    "export": parse_export,
    "kubectl": parse_kubectl,
    "ray": parse_ray,
    "sbatch": parse_sbatch,
    "scancel": parse_scancel,
}


def test_cluster_files_contain_no_secret_key() -> None:
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|aws_secret", text), path
