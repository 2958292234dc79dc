"""The gRPC front: which worker, and the stream from it."""
