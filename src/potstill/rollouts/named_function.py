"""A Python function that a recipe names: found, looked at, and ready to be called. Nothing else of a recipe is ever executed."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from potstill.errors import ConfigError


@dataclass(frozen=True)
class NamedFunction:
    """`spec` is what the recipe says, `fingerprint` a digest of the file that the function stands in (not of what that imports)."""

    spec: str
    function: Callable[..., Any]
    fingerprint: str

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def load_function(spec: str, *, key: str, arguments: tuple[str, ...]) -> NamedFunction:
    """FILE.py:NAME, a file that is executed once, or MODULE:NAME, a module that is installed; `arguments` names what it will be given.

    Raises ConfigError naming `key`: no such file, module or function, one that cannot be called so, or a module that fails as it loads.
    """
    place, _, name = spec.rpartition(":")
    is_file = place.endswith(".py") or "/" in place
    if not name or not (is_file or all(part.isidentifier() for part in place.split("."))):
        raise ConfigError(f"{key}: {spec!r} names no function; write FILE.py:NAME or MODULE:NAME")
    module = _from_file(place, spec, key) if is_file else _from_module(place, spec, key)
    function = getattr(module, name, None)
    if function is None:
        own = [(other, value) for other, value in vars(module).items() if inspect.isfunction(value) and not other.startswith("_")]
        known = sorted(other for other, value in own if value.__module__ == module.__name__)
        raise ConfigError(f"{key}: {spec}: there is no {name} in it; its functions are {', '.join(known) or 'none'}")
    if not callable(function):
        raise ConfigError(f"{key}: {spec} is {function!r:.40}, which is no function")
    _refuse_other_arguments(function, spec, key, arguments)
    source = Path(module.__file__ or "")
    content = source.read_bytes() if source.is_file() else b""
    return NamedFunction(spec, function, hashlib.blake2b(content, digest_size=16).hexdigest())


def _from_file(place: str, spec: str, key: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"{key}: {spec}: no such file: {path}")
    # Named by its content and place, so that two files of one name do not stand for each other.
    name = f"potstill_named_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    made = spec_from_file_location(name, path)
    if made is None or made.loader is None:
        raise ConfigError(f"{key}: {spec}: {path} is no Python file; its name must end in .py")
    module = module_from_spec(made)
    before, sys.modules[name] = sys.modules.get(name), module  # dataclasses and the like look their module up
    # No compiled twin is left beside a user's file.
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        made.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
        raise ConfigError(f"{key}: {spec}: {path} fails as it loads: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes
    return module


def _from_module(place: str, spec: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            hint = f"a file of yours is named by its path, {place}.py:NAME"
            raise ConfigError(f"{key}: {spec}: no module {place} is installed; {hint}") from error
        raise ConfigError(f"{key}: {spec}: the module needs {error.name}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: {spec}: the module fails as it loads: {type(error).__name__}: {error}") from error


def _refuse_other_arguments(function: Callable[..., Any], spec: str, key: str, arguments: tuple[str, ...]) -> None:
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{key}: {spec} is an async function; give a plain one")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C: what it takes is seen when it is called
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{key}: {spec}{signature} cannot be called with ({', '.join(arguments)}): {error}; these are given by their places"
        ) from error
