"""A router, a worker and a daemon that only trust each other: mTLS and a token on every way."""

import ssl
import urllib.request
from pathlib import Path

import openai
import pytest

from kvtier import config
from kvtier.wire.access import Access
from kvtier.wire.pb import router_pb2, router_pb2_grpc
from tests.access.conftest import OTHER, TOKEN, Keys
from tests.launching import DEADLINE_S, Process, fixed_ports, node_toml, wait_for


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def worker_toml(folder: Path, model: Path) -> str:
    return f"""
[worker]
model = "{model}"
socket = "{folder}/node.sock"
listen = "127.0.0.1:0"
device = "cpu"
block_tokens = 16
vram_bytes = "1MiB"
threads = 1
"""


def test_requests_go_all_the_way(tmp_path: Path, tiny_folder: Path, keys: Keys) -> None:
    mine = keys.tls("server", client_ca="ca") + keys.auth()
    (port,) = fixed_ports(1)
    with (
        Process("node", node_toml(tmp_path, more=mine), tmp_path) as node,
        Process("worker", worker_toml(tmp_path, tiny_folder) + mine, tmp_path) as worker,
    ):
        members = f'[{{ node = "n", worker = "{worker.address}", daemon = "{node.address}" }}]'
        toml = f'[router]\nlisten = "127.0.0.1:0"\nhttp = "127.0.0.1:{port}"\nmembers = {members}\n'
        with Process("router", toml + mine, tmp_path) as router:
            path = tmp_path / "client.toml"
            path.write_text(keys.tls("client") + keys.auth())
            client = Access(config.load(path), serving=False)
            with client.blocking_channel(router.address) as channel:
                stub = router_pb2_grpc.RouterStub(channel)
                request = router_pb2.WatchMembersRequest()
                for table in stub.Watch(request, timeout=DEADLINE_S):
                    if [each.state for each in table.members] == ["ready"]:
                        break
                prompt = router_pb2.Prompt(text="w3 w4 w5")
                ask = router_pb2.GenerateRequest(prompt=prompt, max_tokens=3, ignore_eos=True)
                ids = [i for part in stub.Generate(ask, timeout=60) for i in part.chunk.ids]
                assert len(ids) == 3
            trust = ssl.create_default_context(cafile=str(keys.path("ca.pem")))
            for token, taken in ((TOKEN, True), (OTHER, False)):
                with (
                    openai.DefaultHttpxClient(verify=trust) as http,
                    openai.OpenAI(
                        base_url=f"https://127.0.0.1:{port}/v1", api_key=token, http_client=http,
                        max_retries=0,
                    ) as api,
                ):  # fmt: skip
                    if taken:
                        answer = api.completions.create(model="tiny-llama", prompt="w3 w4 w5")
                        assert answer.usage is not None
                        assert answer.usage.prompt_tokens == 3
                    else:
                        with pytest.raises(openai.AuthenticationError, match="none that is acc"):
                            api.models.list()


def test_a_router_says_once_which_setting_keeps_it_from_a_worker(
    tmp_path: Path, keys: Keys
) -> None:
    with Process("node", node_toml(tmp_path, more=keys.tls() + keys.auth()), tmp_path) as node:
        (port,) = fixed_ports(1)
        toml = f"""
[router]
listen = "127.0.0.1:0"
metrics_host = "127.0.0.1"
metrics_port = {port}
members = [{{ node = "n", daemon = "{node.address}" }}]
"""

        url, trust = f"https://127.0.0.1:{port}/metrics", keys.path("ca.pem")
        context = ssl.create_default_context(cafile=trust)

        def tries() -> float:
            with urllib.request.urlopen(url, timeout=60, context=context) as page:
                lines = page.read().decode().splitlines()
            wanted = 'kvtier_member_failures_total{node="n"} '
            return sum(float(line.removeprefix(wanted)) for line in lines if wanted in line)

        for wrong, said in (
            (keys.tls(ca="stranger") + keys.auth(), f"tls.ca_file {tmp_path}/stranger.pem"),
            (keys.tls() + keys.auth("other"), f"(auth.token_file {tmp_path}/other)"),
        ):
            with Process("router", toml + wrong, tmp_path) as router:
                wait_for("several tries", lambda: tries() > 2)
                log = router.log.read_text().splitlines()
            (line,) = [each for each in log if "WARNING" in each]
            assert said in line
            assert node.address in line
