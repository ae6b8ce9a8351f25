# encode_infer_response without parameters, for compiled callers.

cdef object write_response(str model_name, str model_version, str request_id, object outputs, bint raw)
