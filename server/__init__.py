"""HTTP for the engine: the only package that knows about sockets, status codes and metrics."""
