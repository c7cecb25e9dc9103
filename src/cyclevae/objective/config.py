"""Objectives as plain dicts and back: what a YAML or JSON file can hold.

Every value is checked against the annotation of its field, and an error names the path to it.
"""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cyclevae._base.checks import nearest
from cyclevae.processes.latent_schedules import EDM, Flow

VERSION = 2
T = TypeVar("T")
BESIDE = "beside"  # marks a field whose entries stand beside the other options
_KIND = "kind"  # of a process or a second term, where the key does not tell its class
_FIELDS = ("text_process", "latent_process", "terms", "join_passes", "non_finite", "seed")


# To a plain dict


def dump_objective(objective: Any) -> dict[str, Any]:
    """The plain form of an objective."""
    plain = {name: getattr(objective, name) for name in _FIELDS}
    for name in ("text_process", "latent_process"):
        process = plain[name]
        kind = type(process).__name__
        shipped = kind == "".join(part.title() for part in name.split("_"))
        plain[name] = {**({} if shipped else {_KIND: kind}), **dump(process, name)}
        schedule = getattr(process, "schedule", None)
        if is_dataclass(schedule) and not isinstance(schedule, Flow | EDM):
            plain[name]["schedule"][_KIND] = type(schedule).__name__
    terms = {}
    for term in plain["terms"]:
        path, kind = f"terms.{term.name}", term.kind()
        written = dump(term, path)
        del written["name"]
        terms[term.name] = {**({} if kind == term.name else {_KIND: kind}), **written}
    return {"version": VERSION, **plain, "terms": terms}


def dump(instance: Any, path: str) -> dict[str, Any]:
    """Every option of a dataclass by name, nested ones as dicts, tuples and tensors as lists.

    Raises:
        ValueError: a value that only code can express, such as a function, by its path.
    """
    options: dict[str, Any] = {}
    for f in fields(instance):
        value = getattr(instance, f.name)
        if f.init:
            options |= value if f.metadata.get(BESIDE) else {f.name: value}
    try:
        hints = get_type_hints(type(instance))
    except NameError:  # a class of one's own, with names of a function; they only help an error
        hints = {}
    return {
        name: _plain(f"{path}.{name}", value, hints.get(name)) for name, value in options.items()
    }


def _plain(path: str, value: Any, hint: Any = None) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return dump(value, path)
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{path}.{key}", item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(f"{path}[{i}]", item) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    told = _told(list(_alternatives(hint))) if hint is not None else ""
    raise ValueError(
        f"`{path}` is {value!r}, which a plain configuration cannot hold; put it in by code, as in "
        f"dataclasses.replace(term, ...){f', or use {told}' if told else ''}"
    )


# From a plain dict


def load_objective(
    cls: Callable[..., T],
    config: Mapping[str, Any],
    terms: Mapping[str, Any],
    processes: Sequence[type],
) -> T:
    """The objective of a plain dict; `terms` and `processes` are the classes by which to read it.

    Raises:
        ValueError: what does not fit, by its path.
    """
    options = dict(_mapping("configuration", config))
    version = options.pop("version", VERSION)
    _refuse_version_1(options, version, terms)
    for key in options:
        if key not in _FIELDS:
            raise ValueError(f"unknown key {key!r} of the objective; {nearest(str(key), _FIELDS)}")
    for name, default in zip(("text_process", "latent_process"), processes, strict=False):
        if name not in options:
            raise ValueError(f"`{name}` is missing from the configuration")
        if isinstance(options[name], Mapping):
            by_name = {c.__name__: c for c in processes}
            told = dict(options[name])
            schedule = told.get("schedule")
            if isinstance(schedule, Mapping) and _KIND in schedule:  # a class of one's own
                told["schedule"] = _load_kind(f"{name}.schedule", schedule, by_name)
            options[name] = _load_kind(name, told, by_name | {None: default})
    terms = {kind.kind(): kind for kind in terms.values()} | dict(terms)  # as `dump` calls it too
    if options.get("terms") is not None:
        options["terms"] = [
            _load_term(str(name), told, terms)
            for name, told in _mapping("terms", options["terms"]).items()
        ]
    hints = {"join_passes": bool, "non_finite": str | None, "seed": int}
    for name, hint in hints.items():
        if name in options:
            options[name] = parse(name, options[name], hint)
    return cls(**options)


def _load_term(name: str, told: Any, known: Mapping[str, Any]) -> Any:
    path = f"terms.{name}"
    options: Mapping[str, Any] = {} if told is None else _mapping(path, told)
    kind = str(options.get(_KIND, name))
    if kind not in known:
        raise ValueError(
            f"`{path}` is no term that is known; {nearest(str(kind), known)} (a second one of a "
            f"kind says `{_KIND}`, and one of your own is handed in by terms={{{kind!r}: Class}})"
        )
    return _load_kind(path, {"name": name, **options}, {kind: known[kind], None: known[kind]})


def _load_kind(path: str, options: Mapping[str, Any], known: Mapping[Any, Any]) -> Any:
    kind = None if _KIND not in options else str(options[_KIND])
    if kind not in known:
        names = [name for name in known if name is not None]
        raise ValueError(
            f"`{path}.{_KIND}` is {kind!r}, a class that was not handed in (processes=[...]); "
            f"{nearest(str(kind), names)}"
        )
    return load(path, {k: v for k, v in options.items() if k != _KIND}, known[kind])


def load(path: str, options: Mapping[str, Any], cls: Any) -> Any:
    """A dataclass from its options, each of the type that its field declares.

    Raises:
        ValueError: an unknown key, with the nearest name; a missing one; or a wrong value.
    """
    hints = _hints(path, cls, options)
    for key in options:
        if key not in hints:
            raise ValueError(f"unknown key `{path}.{key}`; {nearest(str(key), hints)}")
    needed = [f.name for f in fields(cls) if f.init and _required(f)]
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"`{path}.{missing[0]}` is missing, and has no default: give it")
    values = {str(k): parse(f"{path}.{k}", v, hints[k]) for k, v in options.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from error


def _required(option: Any) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _hints(path: str, cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The types of the options of a class, and of those that stand beside them."""
    declared = get_type_hints(cls)
    own = {f.name: declared[f.name] for f in fields(cls) if f.init and BESIDE not in f.metadata}
    if not any(f.metadata.get(BESIDE) for f in fields(cls)):
        return own
    try:
        return {**own, **cls.options_beside(options)}
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from error


def parse(path: str, value: Any, hint: Any) -> Any:
    """A value as its annotation wants it.

    A string is read as a number where only a number is wanted and it is one. Nothing else is
    guessed.

    Raises:
        ValueError: a value of another type, by its path.
    """
    choices = list(_alternatives(hint))
    if Any in choices:
        return value
    if isinstance(value, int) and abs(value) >= 2**63:  # of which no float and no seed is made
        raise ValueError(f"`{path}` must have 64 bits at most, got a larger integer")
    for choice in choices:  # what is right already
        if choice is None and value is None:
            return value
        if get_origin(choice) is Literal and value in get_args(choice):
            return value
        if _is_instance(value, choice):
            return value
    if isinstance(value, str):
        number = _number(value, choices)
        if number is not None:
            return parse(path, number, hint)
    elif isinstance(value, Mapping):
        return _parse_mapping(path, value, choices)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for choice in choices:
            if _is_tensor(choice):
                return _tensor(path, value)
            if get_origin(choice) in (tuple, Sequence, list):
                inner = get_args(choice)[0]
                return tuple([parse(f"{path}[{i}]", item, inner) for i, item in enumerate(value)])
    raise ValueError(f"`{path}` must be {_told(choices)}, got {value!r}")


def _parse_mapping(path: str, value: Mapping[str, Any], choices: Sequence[Any]) -> Any:
    classes = [c for c in choices if isinstance(c, type) and is_dataclass(c)]
    fitting = [c for c in classes if value.keys() <= {f.name for f in fields(c)}]
    if classes:
        # the one that all keys fit, or that most do, for an error that helps
        best = max(classes, key=lambda c: len(value.keys() & {f.name for f in fields(c)}))
        needed = [c for c in fitting if {f.name for f in fields(c) if _required(f)} <= value.keys()]
        if value or len(needed) < 2:  # of nothing said any may be meant
            return load(path, value, (needed or fitting or [best])[0])
    if any(get_origin(c) in (Mapping, dict) or c in (Mapping, dict) for c in choices):
        return {str(key): _as_plain(item) for key, item in value.items()}
    raise ValueError(f"`{path}` must be {_told(choices)}, got a mapping {dict(value)!r}")


def _as_plain(value: Any) -> Any:
    """A value of any library of configurations in the types of Python."""
    if isinstance(value, Mapping):
        return {str(key): _as_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_plain(item) for item in value]
    return value


def _alternatives(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for each in get_args(hint):
            yield from _alternatives(each)
    else:
        yield None if hint is type(None) else hint


def _is_instance(value: Any, choice: Any) -> bool:
    if isinstance(value, bool):  # which is an int to Python, and to nobody else
        return choice is bool
    if choice is float:
        return isinstance(value, int | float)
    if Callable in (choice, get_origin(choice)):
        return callable(value)
    if _is_tensor(choice):
        return isinstance(value, Tensor)
    return isinstance(choice, type) and isinstance(value, choice)


def _is_tensor(choice: Any) -> bool:
    return choice is Tensor or getattr(choice, "array_type", None) is Tensor


def _number(value: str, choices: Sequence[Any]) -> int | float | None:
    """The number that a string is, where one is wanted and no string is."""
    if str in choices:
        return None
    for kind in (int, float):
        if kind in choices:
            try:
                return kind(value)
            except ValueError:
                continue
    return None


def _tensor(path: str, value: Sequence[Any]) -> Tensor:
    try:
        return torch.tensor(_as_plain(value), dtype=torch.get_default_dtype(), device="cpu")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`{path}` must be numbers of one shape, got {value!r}") from error


def _told(choices: Sequence[Any]) -> str:
    """The alternatives in words."""
    words = []
    for choice in choices:
        if get_origin(choice) is Literal:
            words += [repr(name) for name in get_args(choice)]
        elif choice is None:
            words.append("None")
        elif choice in (int, float, bool, str):
            words.append(
                {int: "an integer", float: "a number", bool: "true or false"}.get(choice, "a name")
            )
        elif _is_tensor(choice):
            words.append("a list of numbers")
        elif isinstance(choice, type) and is_dataclass(choice):
            words.append(f"the options of a {choice.__name__}")
        elif get_origin(choice) in (tuple, Sequence, list):
            words.append("a list")
        elif get_origin(choice) in (Mapping, dict):
            words.append("a mapping")
    words = list(dict.fromkeys(words))
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1] if words else "")))


def _mapping(path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"`{path}` must be a mapping, got {value!r}")
    return value


def _refuse_version_1(options: Mapping[str, Any], version: Any, terms: Mapping[str, Any]) -> None:
    """Name the new place of every key of a configuration of version 1."""
    places: dict[str, list[str]] = {}
    for kind, term in terms.items():
        for old, new in getattr(term, "renamed", {}).items():
            places.setdefault(old, []).append(f"terms.{kind}.{new}")
        places.setdefault("caps", []).append(f"terms.{kind}.cap")
    old = [key for key in options if key in places]
    known = isinstance(version, int) and version in (1, VERSION)
    if known and version == VERSION and not old:
        return
    if not known:
        raise ValueError(f"`version` must be {VERSION}, got {version!r}")
    told = [f"`{key}` is now {' and '.join(f'`{p}`' for p in places[key])}" for key in old]
    raise ValueError(
        f"this is a configuration of version 1, and version {VERSION} says what each term does "
        f"under `terms`: {'; '.join(told) or 'write it anew'}. A term that weighs 0 is left out"
    )
