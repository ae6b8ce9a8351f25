"""REST: an HTTP/1.1 listener, and the way from its requests to the gRPC methods and from their answers to JSON."""

from mmcore.server.rest.listener import Listener
from mmcore.server.rest.request import Request

__all__ = ["Listener", "Request"]
