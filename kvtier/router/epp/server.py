"""The ext_proc protocol's side of the endpoint picker: one stream a request.

The answer to the request's headers waits for the end of its body, which decides; then the body is
given back as it came. Responses pass through piece by piece, so that streams stay streams.
"""

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Final

import grpc
from google.protobuf import struct_pb2

from kvtier.config import RouterConfig
from kvtier.errors import RequestError
from kvtier.router.epp.pick import Picked, Picker, check_endpoints
from kvtier.router.front import Front
from kvtier.router.http.openai import (
    SESSION_HEADER,
    TENANT_HEADER,
    BadRequest,
    error_body,
    retry_after,
    session_of,
    status_of,
    tenant_of,
)
from kvtier.wire.access import Access
from kvtier.wire.pb import ext_proc_pb2 as pb
from kvtier.wire.rpc import MAX_MESSAGE, Server

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION: Final = "x-gateway-destination-endpoint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
REASON: Final = "x-kvtier-dropped-reason"
MAX_BODY: Final = MAX_MESSAGE
CHUNK: Final = 62_000  # bytes; Envoy takes no more in one streamed response


class EndpointPicker:
    """Serves `Picker` at the address that the setting router.epp gives.

    Healthy as "" and "readiness" and by the service's name while a worker is ready; as
    "liveness" from the start.

    Raises:
        ConfigError: The address is taken or not this machine's.
    """

    name = "epp"

    def __init__(self, config: RouterConfig, front: Front, picker: Picker, access: Access) -> None:
        check_endpoints(config)
        self._front = front
        self._picker = picker
        self._server = Server(
            config.epp, "router.epp", ["readiness", SERVICE], ["liveness"], access=access
        )
        self.address = config.epp
        # Under Envoy's name, but with messages of our own, so not by the generated code.
        handler = grpc.stream_stream_rpc_method_handler(
            self._process, pb.ProcessingRequest.FromString, pb.ProcessingResponse.SerializeToString
        )
        handlers = grpc.method_handlers_generic_handler(SERVICE, {"Process": handler})
        self._server.grpc.add_generic_rpc_handlers((handlers,))

    async def start(self) -> None:
        """Bind and serve, not yet healthy."""
        await self._server.healthy(False)
        self.address = await self._server.start()

    async def healthy(self, yes: bool) -> None:
        """Whether a gateway should send its requests here."""
        await self._server.healthy(yes)

    async def stop(self, grace_s: float) -> None:
        """No new requests; those under way have `grace_s` to end."""
        await self._server.stop(grace_s)

    async def _process(
        self, requests: AsyncIterator[pb.ProcessingRequest], _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ProcessingResponse]:
        exchange = _Exchange(self._front, self._picker)
        try:
            async for request in requests:
                try:
                    answers = await exchange.take(request)
                except RequestError as error:
                    yield _immediate(error)
                    return
                for answer in answers:
                    yield answer
        finally:
            exchange.end()


class _Exchange:
    """One request and its response, as Envoy tells of them."""

    def __init__(self, front: Front, picker: Picker) -> None:
        self._front = front
        self._picker = picker
        self._path = ""
        self._subset: frozenset[str] | None = None
        self._tenant = ""
        self._session = ""
        self._body = bytearray()
        self._picked: Picked | None = None

    async def take(self, request: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        """What one message is answered with, perhaps nothing yet.

        Raises:
            RequestError: The request gets no further.
        """
        match request.WhichOneof("request"):
            case "request_headers":
                self.end()  # a second one takes the place of the first
                headers = request.request_headers.headers
                self._path = next(iter(_header(headers, ":path")), "")
                self._tenant = tenant_of(_header(headers, TENANT_HEADER))
                self._session = session_of(_header(headers, SESSION_HEADER))
                self._subset = _subset(request.metadata_context)
                return await self._decide() if request.request_headers.end_of_stream else []
            case "request_body":
                return await self._take_body(request.request_body)
            case "request_trailers":
                answers = [] if self._picked else [*await self._decide(), *self._given_back(False)]
                return [*answers, pb.ProcessingResponse(request_trailers=pb.TrailersResponse())]
            case "response_headers":
                self.end()
                return [pb.ProcessingResponse(response_headers=pb.HeadersResponse())]
            case "response_body":
                body = request.response_body
                piece = _streamed(body.body, body.end_of_stream)
                return [pb.ProcessingResponse(response_body=piece)]
            case "response_trailers":
                return [pb.ProcessingResponse(response_trailers=pb.TrailersResponse())]
        return []

    def end(self) -> None:
        """Its answer has begun, or it is over."""
        if self._picked is not None:
            self._picked.sent.began()

    async def _take_body(self, body: pb.HttpBody) -> list[pb.ProcessingResponse]:
        if self._picked is not None:
            return []  # Envoy may tell the last piece twice: envoyproxy/envoy#46237
        self._body += body.body
        if len(self._body) > MAX_BODY:
            raise BadRequest(f"body: more than {MAX_BODY} bytes, which is the limit", status=413)
        if not body.end_of_stream:
            return []
        return [*await self._decide(), *self._given_back(True)]

    async def _decide(self) -> list[pb.ProcessingResponse]:
        async def work(_deadline: float) -> Picked:
            body = bytes(self._body)
            whose = self._tenant, self._session
            return await self._picker.pick(self._path, body, self._subset, *whose)

        self._picked = await self._front.within(None, work, wait=False)
        destination = ",".join(self._picked.endpoints)
        metadata = struct_pb2.Struct()
        metadata.update({"envoy.lb": {DESTINATION: destination}})
        common = pb.CommonResponse(
            header_mutation=_set({DESTINATION: destination}), clear_route_cache=True
        )
        headers = pb.HeadersResponse(response=common)
        return [pb.ProcessingResponse(request_headers=headers, dynamic_metadata=metadata)]

    def _given_back(self, last: bool) -> list[pb.ProcessingResponse]:
        """The request's body as it came; `last`: no trailers follow."""
        body, self._body = bytes(self._body), bytearray()
        starts = range(0, max(1, len(body)), CHUNK)
        return [
            pb.ProcessingResponse(
                request_body=_streamed(
                    body[start : start + CHUNK], last and start + CHUNK >= len(body)
                )
            )
            for start in starts
        ]


def _streamed(body: bytes, last: bool) -> pb.BodyResponse:
    piece = pb.StreamedBodyResponse(body=body, end_of_stream=last)
    mutation = pb.BodyMutation(streamed_response=piece)
    return pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation))


def _set(headers: Mapping[str, str]) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            pb.HeaderValueOption(
                header=pb.HeaderValue(key=key, raw_value=value.encode()),
                append_action=pb.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for key, value in headers.items()
        ]
    )


def _immediate(error: RequestError) -> pb.ProcessingResponse:
    """Ends the request with an error in OpenAI's shape."""
    headers = {
        "content-type": "application/json", REASON: error.grpc_status.lower(),
        **{key.lower(): value for key, value in retry_after(error).items()},
    }  # fmt: skip
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=status_of(error)), headers=_set(headers),
            body=json.dumps(error_body(error)).encode(), details=error.grpc_status.lower(),
        )
    )  # fmt: skip


def _header(headers: pb.HeaderMap, name: str) -> list[str]:
    """Every value of a header, names being in lower case here."""
    return [
        each.raw_value.decode(errors="replace") or each.value
        for each in headers.headers
        if each.key == name
    ]


def _subset(metadata: pb.Metadata) -> frozenset[str] | None:
    """The endpoints that the gateway allows: a list, or a text with commas; None: all."""
    hint = metadata.filter_metadata.get("envoy.lb.subset_hint")
    if hint is None or SUBSET not in hint.fields:
        return None
    value = hint.fields[SUBSET]
    texts: Iterable[str] = value.string_value.split(",")
    if value.WhichOneof("kind") == "list_value":
        texts = (each.string_value for each in value.list_value.values)
    return frozenset(stripped for text in texts if (stripped := text.strip()))
