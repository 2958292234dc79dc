"""Bytes between processes: msgpack on a Unix socket, protobuf over gRPC."""
