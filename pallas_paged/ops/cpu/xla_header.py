"""Whether XLA's foreign function interface is the one that `xla_call` reads word by word."""

import functools
import pathlib
import re

import jax

_FUNCTIONS = [
    *("Error_Create", "Error_GetDetails", "Error_Destroy", "Handler_Register", "Stream_Get"),
    *("Type_Register", "InvokeContext_Get", "State_Set", "State_Get", "DeviceMemory_Allocate"),
    *("DeviceMemory_Free", "ThreadPool_Schedule", "ThreadPool_NumThreads"),
]
_FIELDS = {
    "CallFrame": "struct_size extension_start api ctx stage args rets attrs",
    "Args": "struct_size extension_start size types args",
    "Rets": "struct_size extension_start size types rets",
    "Buffer": "struct_size extension_start dtype data rank dims",
    "Api_Version": "struct_size extension_start major_version minor_version",
    "Metadata": "struct_size api_version traits",
    "Metadata_Extension": "extension_base metadata",
    "InternalExtension": "struct_size type next",
    "ThreadPool_Schedule_Args": "struct_size extension_start ctx task data",
    "ThreadPool_NumThreads_Args": "struct_size extension_start ctx num_threads",
}


@functools.cache
def unknown_interface() -> str | None:
    """Returns why XLA's interface is not the one that is read here, or None if it is."""
    path = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        header = path.read_text()
    except OSError as error:
        return f"{path} cannot be read: {error}"
    for name, fields in _FIELDS.items():
        body = re.search(rf"struct XLA_FFI_{name} {{(.*?)\n}}", header, re.DOTALL)
        lines = re.sub(r"//.*", "", body[1]).split(";") if body else []
        found = [match[1] for line in lines if (match := re.search(r"(\w+)\s*$", line))]
        if found[: len(fields.split())] != fields.split():
            return f"XLA_FFI_{name} in {path} has the fields {found}, not {fields.split()}"
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", header)
    if functions[: len(_FUNCTIONS)] != _FUNCTIONS:
        return f"XLA_FFI_Api in {path} has the functions {functions}, not {_FUNCTIONS}"
    return None
