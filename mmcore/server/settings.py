"""The logging and trace extensions: switches of the running instance, read and changed by clients.

Names, types and refusals follow the Triton documentation of both extensions. What a network client must not choose is
refused: a file to write to is a way to write anywhere the server may.
"""

from __future__ import annotations

from typing import Final

from mmcore import log
from mmcore.errors import InvalidRequest
from mmcore.pb import inference_pb2

_LOG_BOOLS: Final = {"log_info": "info", "log_warning": "warning", "log_error": "error", "log_requests": "requests"}


def update_log_settings(request: inference_pb2.LogSettingsRequest) -> inference_pb2.LogSettingsResponse:
    """Change the switches that the request names, all or none of them, and answer every one's value.

    Raises:
        InvalidRequest: an unknown setting, a value of the wrong kind, or one that may not be changed from here.
    """
    switches = log.switches
    wanted: dict[str, bool | int | str] = {}
    for key, setting in request.settings.items():
        kind = setting.WhichOneof("parameter_choice")
        if key in _LOG_BOOLS:
            wanted[_LOG_BOOLS[key]] = _expect(key, kind, "bool_param", setting.bool_param)
        elif key == "log_verbose_level":
            wanted["verbose"] = _expect(key, kind, "uint32_param", setting.uint32_param)
        elif key == "log_format":
            value = _expect(key, kind, "string_param", setting.string_param)
            if value not in log.FORMATS:
                raise InvalidRequest(f"log_format must be one of {', '.join(log.FORMATS)}, got '{value}'")
            wanted["format"] = value
        elif key == "log_file":
            raise InvalidRequest("log file location can not be updated through network protocol")
        else:
            raise InvalidRequest(f"unknown log setting '{key}'")
    for attribute, value in wanted.items():
        setattr(switches, attribute, value)
    if wanted:
        switches.apply()
    response = inference_pb2.LogSettingsResponse()
    for key, attribute in _LOG_BOOLS.items():
        response.settings[key].bool_param = getattr(switches, attribute)
    response.settings["log_verbose_level"].uint32_param = switches.verbose
    response.settings["log_format"].string_param = switches.format
    response.settings["log_file"].string_param = ""
    return response


def _expect(key: str, kind: str | None, wanted: str, value: bool | int | str) -> bool | int | str:
    if kind != wanted:
        raise InvalidRequest(f"log setting '{key}' takes a {wanted}, got {kind or 'nothing'}")
    return value
