"""The OpenAI-compatible API over HTTP (extra `http`), over the same front as the gRPC service."""
