"""Files of a run that may be missing, half-written or damaged: what reads, and one line that names what does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def json_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, empty where the file is missing or does not read; the second part names it."""
    return _object(path, json.loads)


def yaml_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A YAML mapping, empty where the file is missing or does not read; the second part names it."""
    import yaml

    def load(data: bytes) -> Any:
        try:
            return yaml.safe_load(data.decode("utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error

    return _object(path, load)


def json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every line that is a JSON object; lines that are not are counted, and a torn last one is named apart."""
    try:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path.name}: does not read ({error.strerror}); it is left out"]
    values, damaged = [], 0
    for line in whole.split(b"\n") if whole else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            values.append(value)
        else:
            damaged += 1
    warnings = [f"{path.name}: {damaged} lines are damaged and left out"] if damaged else []
    return values, [*warnings, f"{path.name} ends in a torn line, which is left out"] if torn else warnings


def _object(path: Path, load: Callable[[bytes], Any]) -> tuple[dict[str, Any], list[str]]:
    try:
        value = load(path.read_bytes())
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"{path.name}: does not read ({error.strerror}); it is left out"]
    except (ValueError, RecursionError):
        return {}, [f"{path.name}: damaged or half-written; it is left out"]
    if not isinstance(value, dict):
        return {}, [f"{path.name}: holds something else than expected; it is left out"]
    return value, []
