"""Values and limits of settings: from a parsed TOML table to a frozen dataclass."""

import dataclasses
import re
import types
import typing
from ipaddress import ip_address
from typing import TypeVar, get_args, get_origin

from kvtier.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

Size = typing.Annotated[int, "size"]  # bytes


def parse_size(text: str | int) -> int:
    """Bytes meant by 1073741824, "1GiB" or "1.5 GB".

    Raises:
        ValueError: Not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size such as 1073741824 or '1GiB'")
    return int(float(match[1]) * unit)


def limits(low: float, high: float) -> dict[str, tuple[float, float]]:
    """Field metadata: the value is refused outside low..high."""
    return {"limits": (low, high)}


def one_of(*values: str) -> dict[str, tuple[str, ...]]:
    """Field metadata: the value is refused unless it is one of these."""
    return {"values": values}


def parse_address(text: str, name: str) -> tuple[str, int]:
    """Host and port of "host:port"; port 0 means any free one.

    Raises:
        ConfigError: Not such a text; the message begins with `name`.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} is {text!r}, must be host:port with a port of 0 to 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


T = TypeVar("T")


def build(cls: type[T], table: dict[str, object], where: str) -> T:
    """One dataclass from one table, whose name is `where`.

    Raises:
        ConfigError: An unknown key, a bad value, or a setting without a default that is missing.
    """
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if key not in known:
            raise ConfigError(f"{name}: no such setting; known here: {', '.join(known)}")
        values[key] = _value(hints[key], value, name)
        _check_limits(known[key].metadata, values[key], name)
    missing = [
        f.name
        for f in known.values()
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} must be set")
    return cls(**values)


def _value(hint: object, value: object, name: str) -> object:
    if isinstance(hint, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a table")
        return build(hint, value, name)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name} must be a list")
        return tuple(_value(get_args(hint)[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    if hint == Size:
        try:
            return parse_size(typing.cast("str | int", value))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or type(value) is not hint:
        expected = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{name} is {value!r}, must be of type {expected}")
    return value


def _check_limits(metadata: typing.Mapping[str, object], value: object, name: str) -> None:
    if "limits" in metadata:
        low, high = typing.cast("tuple[float, float]", metadata["limits"])
        if not low <= typing.cast("float", value) <= high:
            raise ConfigError(f"{name} is {value}, must be {low} to {high}")
    if "values" in metadata:
        values = typing.cast("tuple[str, ...]", metadata["values"])
        if value not in values:
            raise ConfigError(f"{name} is {value!r}, must be one of {', '.join(values)}")
