"""Frozen dataclasses as plain dicts and back: what a YAML or JSON file can hold."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

from cyclevae._checks import nearest

T = TypeVar("T")


def dump(instance: Any) -> dict[str, Any]:
    """Every option of a dataclass by name, nested ones as dicts, tuples and tensors as lists.

    Raises:
        ValueError: a value that only code can express, such as a function.
    """
    return {f.name: _plain(f.name, getattr(instance, f.name)) for f in fields(instance) if f.init}


Part = type | Callable[[Mapping[str, Any]], type]


def load(cls: type[T], config: Mapping[str, Any], parts: Mapping[str, Part] | None = None) -> T:
    """A dataclass from its options.

    Args:
        cls: the dataclass.
        config: its options.
        parts: the dataclasses that a dict, or each dict of a list, stands for, by the name of the
            option, at any depth; or how to tell which.

    Raises:
        ValueError: a key that is no option, with the nearest name; or a missing one.
    """
    parts = parts or {}
    options = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    for key in config:
        if key not in options:
            raise ValueError(f"unknown key {key!r} for {cls.__name__}; {nearest(key, options)}")
    try:
        return cls(**{key: _loaded(key, value, parts) for key, value in config.items()})
    except TypeError as error:
        raise ValueError(f"incomplete configuration: {error}") from error


def _loaded(key: str, value: Any, parts: Mapping[str, Part]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_loaded(key, item, parts) for item in value)
    if not isinstance(value, Mapping) or key not in parts:
        return value
    part = parts[key]
    return load(part if isinstance(part, type) else part(value), value, parts)


def _plain(name: str, value: Any) -> Any:
    if is_dataclass(value):
        return dump(value)
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if callable(value):
        raise ValueError(
            f"`{name}` is {value!r}, a function that a plain configuration cannot hold; "
            "use a number, `ramp(...)` or a named schedule"
        )
    return value
