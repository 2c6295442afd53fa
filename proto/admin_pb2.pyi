from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Member(_message.Message):
    __slots__ = ("worker", "incarnation", "role", "model", "endpoint", "pid", "state", "restarts", "role_weight")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    ROLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: str
    role: str
    model: str
    endpoint: str
    pid: int
    state: str
    restarts: int
    role_weight: float
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., endpoint: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., restarts: _Optional[int] = ..., role_weight: _Optional[float] = ...) -> None: ...

class ListMembersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListMembersResponse(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class AddMemberRequest(_message.Message):
    __slots__ = ("role", "model")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    role: str
    model: str
    def __init__(self, role: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class AddMemberResponse(_message.Message):
    __slots__ = ("member",)
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    member: Member
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ...) -> None: ...

class DrainMemberRequest(_message.Message):
    __slots__ = ("worker", "grace_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    grace_s: float
    def __init__(self, worker: _Optional[str] = ..., grace_s: _Optional[float] = ...) -> None: ...

class DrainMemberResponse(_message.Message):
    __slots__ = ("failed_requests",)
    FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    failed_requests: int
    def __init__(self, failed_requests: _Optional[int] = ...) -> None: ...

class RemoveMemberRequest(_message.Message):
    __slots__ = ("worker", "grace_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    grace_s: float
    def __init__(self, worker: _Optional[str] = ..., grace_s: _Optional[float] = ...) -> None: ...

class RemoveMemberResponse(_message.Message):
    __slots__ = ("failed_requests",)
    FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    failed_requests: int
    def __init__(self, failed_requests: _Optional[int] = ...) -> None: ...

class SetMemberRoleWeightRequest(_message.Message):
    __slots__ = ("worker", "role_weight")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role_weight: float
    def __init__(self, worker: _Optional[str] = ..., role_weight: _Optional[float] = ...) -> None: ...

class SetMemberRoleWeightResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
