"""Extension of griffe: the tables of the API say types and defaults in full.

An alias such as `Weight` becomes what it stands for, a constant such as `NOISED` the object that it
is, and fields of a class show their defaults as arguments of a function do.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import griffe

PACKAGE = "cyclevae"


class InFull(griffe.Extension):
    """Once a package is read, look up every name that its tables would show."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Rewrite the sections of all docstrings."""
        if pkg.path != PACKAGE:
            return
        collection = loader.modules_collection
        for thing in _documented(pkg):
            for section in thing.docstring.parsed:
                if isinstance(section.value, list):
                    for entry in section.value:
                        _tell(entry, thing, collection)


def _documented(thing: griffe.Object) -> list[griffe.Object]:
    members = [member for member in thing.members.values() if not member.is_alias]
    found = [inner for member in members for inner in _documented(member)]
    return [thing, *found] if thing.docstring else found


def _tell(entry: Any, thing: griffe.Object, collection: Any) -> None:
    if isinstance(entry, griffe.DocstringAttribute):
        default = _default(entry.name, thing)
        if default is not None:
            entry.description += f" Default: `{in_full(default, collection)}`."
    elif isinstance(entry, griffe.DocstringParameter):
        entry.value = in_full(entry.value, collection)
    if isinstance(entry, griffe.DocstringNamedElement):
        entry.annotation = in_full(entry.annotation, collection)


def _default(name: str, thing: griffe.Object) -> Any:
    """That of a field, its own or one that it inherits."""
    if isinstance(thing, griffe.Class) and name in thing.parameters:
        return thing.parameters[name].default
    field = thing.members.get(name)
    plain = field is not None and field.is_attribute and "ClassVar" not in str(field.annotation)
    return field.value if plain else None


def in_full(expression: Any, collection: Any) -> Any:
    """An expression in which aliases and constants of the package are what they stand for."""
    if isinstance(expression, griffe.ExprName):
        try:
            meant = collection[expression.canonical_path]
        except KeyError:
            return expression
        if meant.is_attribute and meant.value is not None and meant.parent.is_module:
            return in_full(meant.value, collection)
        return expression
    if isinstance(expression, list):
        return [in_full(part, collection) for part in expression]
    if isinstance(expression, griffe.Expr) and is_dataclass(expression):
        parts = {f.name: in_full(getattr(expression, f.name), collection) for f in fields(expression)}
        return replace(expression, **parts)
    return expression
