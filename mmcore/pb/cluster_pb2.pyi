from mmcore.pb import model_mesh_pb2 as _model_mesh_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListRequest(_message.Message):
    __slots__ = ("prefix", "limit")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    limit: int
    def __init__(self, prefix: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "total")
    class Model(_message.Message):
        __slots__ = ("name", "version", "state", "reason", "registered", "info", "status", "references", "auto_delete", "last_used")
        NAME_FIELD_NUMBER: _ClassVar[int]
        VERSION_FIELD_NUMBER: _ClassVar[int]
        STATE_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        REGISTERED_FIELD_NUMBER: _ClassVar[int]
        INFO_FIELD_NUMBER: _ClassVar[int]
        STATUS_FIELD_NUMBER: _ClassVar[int]
        REFERENCES_FIELD_NUMBER: _ClassVar[int]
        AUTO_DELETE_FIELD_NUMBER: _ClassVar[int]
        LAST_USED_FIELD_NUMBER: _ClassVar[int]
        name: str
        version: str
        state: str
        reason: str
        registered: bool
        info: _model_mesh_pb2.ModelInfo
        status: _model_mesh_pb2.ModelStatusInfo
        references: int
        auto_delete: bool
        last_used: int
        def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., registered: bool = ..., info: _Optional[_Union[_model_mesh_pb2.ModelInfo, _Mapping[str, object]]] = ..., status: _Optional[_Union[_model_mesh_pb2.ModelStatusInfo, _Mapping[str, object]]] = ..., references: _Optional[int] = ..., auto_delete: bool = ..., last_used: _Optional[int] = ...) -> None: ...
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ListModelsResponse.Model]
    total: int
    def __init__(self, models: _Optional[_Iterable[_Union[ListModelsResponse.Model, _Mapping[str, object]]]] = ..., total: _Optional[int] = ...) -> None: ...

class ListVModelsResponse(_message.Message):
    __slots__ = ("vmodels", "total")
    class VModel(_message.Message):
        __slots__ = ("name", "status")
        NAME_FIELD_NUMBER: _ClassVar[int]
        STATUS_FIELD_NUMBER: _ClassVar[int]
        name: str
        status: _model_mesh_pb2.VModelStatusInfo
        def __init__(self, name: _Optional[str] = ..., status: _Optional[_Union[_model_mesh_pb2.VModelStatusInfo, _Mapping[str, object]]] = ...) -> None: ...
    VMODELS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    vmodels: _containers.RepeatedCompositeFieldContainer[ListVModelsResponse.VModel]
    total: int
    def __init__(self, vmodels: _Optional[_Iterable[_Union[ListVModelsResponse.VModel, _Mapping[str, object]]]] = ..., total: _Optional[int] = ...) -> None: ...

class ListInstancesResponse(_message.Message):
    __slots__ = ("instances", "total")
    class Instance(_message.Message):
        __slots__ = ("id", "address", "version", "location", "zone", "labels", "started", "capacity_bytes", "used_bytes", "models", "loading", "requests_per_minute", "in_flight", "draining", "leader", "asked")
        ID_FIELD_NUMBER: _ClassVar[int]
        ADDRESS_FIELD_NUMBER: _ClassVar[int]
        VERSION_FIELD_NUMBER: _ClassVar[int]
        LOCATION_FIELD_NUMBER: _ClassVar[int]
        ZONE_FIELD_NUMBER: _ClassVar[int]
        LABELS_FIELD_NUMBER: _ClassVar[int]
        STARTED_FIELD_NUMBER: _ClassVar[int]
        CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
        USED_BYTES_FIELD_NUMBER: _ClassVar[int]
        MODELS_FIELD_NUMBER: _ClassVar[int]
        LOADING_FIELD_NUMBER: _ClassVar[int]
        REQUESTS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
        IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
        DRAINING_FIELD_NUMBER: _ClassVar[int]
        LEADER_FIELD_NUMBER: _ClassVar[int]
        ASKED_FIELD_NUMBER: _ClassVar[int]
        id: str
        address: str
        version: str
        location: str
        zone: str
        labels: _containers.RepeatedScalarFieldContainer[str]
        started: int
        capacity_bytes: int
        used_bytes: int
        models: int
        loading: int
        requests_per_minute: int
        in_flight: int
        draining: bool
        leader: bool
        asked: bool
        def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., location: _Optional[str] = ..., zone: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., started: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., models: _Optional[int] = ..., loading: _Optional[int] = ..., requests_per_minute: _Optional[int] = ..., in_flight: _Optional[int] = ..., draining: bool = ..., leader: bool = ..., asked: bool = ...) -> None: ...
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[ListInstancesResponse.Instance]
    total: int
    def __init__(self, instances: _Optional[_Iterable[_Union[ListInstancesResponse.Instance, _Mapping[str, object]]]] = ..., total: _Optional[int] = ...) -> None: ...
