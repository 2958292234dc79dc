import pytest

from kvtier.engine.vllm.gateway import http_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", ":8000"),  # at the worker's own host
        ("http://localhost:8000/", ":8000"),
        ("http://10.0.0.3:8000", "10.0.0.3:8000"),
        ("http://[fd00::1]:8000", "[fd00::1]:8000"),
        ("http://vllm", "vllm:80"),
        ("https://vllm:8443", ""),  # an endpoint picker names addresses of plain HTTP
        ("nonsense", ""),
    ],
)
def test_what_a_gateway_is_told_of_an_engines_url(url: str, address: str) -> None:
    assert http_address(url) == address
