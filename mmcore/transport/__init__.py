"""gRPC server and client over the compiled HTTP/2 session; knows nothing of models."""

from mmcore._ext.h2client import ClientCall
from mmcore._ext.h2server import ServerCall
from mmcore.config import TransportSettings
from mmcore.transport.channel import Channel
from mmcore.transport.connection import Message, Metadata
from mmcore.transport.health import Health, add_health
from mmcore.transport.reflection import add_reflection
from mmcore.transport.server import Server, StreamHandler, UnaryHandler
from mmcore.transport.streams import ClientStream, StreamCall

__all__ = [
    "Channel",
    "ClientCall",
    "ClientStream",
    "Health",
    "Message",
    "Metadata",
    "Server",
    "ServerCall",
    "StreamCall",
    "StreamHandler",
    "TransportSettings",
    "UnaryHandler",
    "add_health",
    "add_reflection",
]
