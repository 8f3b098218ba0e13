"""Networks that can be saved, shared on the hub, and loaded if no weight is missing."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import nn

from qsteer.files import check_whole, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Module = TypeVar("Module", bound="HubModule")


class HubModule(nn.Module, PyTorchModelHubMixin, library_name="qsteer", pipeline_tag="robotics"):
    """A network with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Saved are ``model.safetensors``, ``config.json`` and a model card, ``README.md``. A subclass takes a
    dataclass ``config`` in its constructor and keeps it; it names its ``tags`` and its card's template, a
    Jinja text that may refer to ``config``, as class arguments.
    """

    config: Any

    @classmethod
    def from_pretrained(
        cls: type[Module], pretrained_model_name_or_path: str | Path, **options: Any
    ) -> Module:
        """Load a network from a folder, or from a repository of the hub.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's name.
            options: of the hub, such as ``revision``.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it lacks a file.
            ValueError: a file is broken, or not of such a network.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name)
        if folder.is_dir():
            check_whole(folder / CONFIG)
            check_whole(folder / WEIGHTS)
            with _explained(cls.__name__, folder / WEIGHTS), safe_open(folder / WEIGHTS, "pt"):
                pass  # its header says whether it is whole
            cls._check_config(folder / CONFIG)
        elif folder.exists() or not HUB_NAME.fullmatch(name):
            kind = "a file" if folder.exists() else "nothing there"
            raise FileNotFoundError(
                f"{name}: expected the folder of a {cls.__name__} with {CONFIG} and {WEIGHTS}, got {kind}; "
                "train one first, or correct the path"
            )
        explained = _explained(cls.__name__, folder / WEIGHTS if folder.is_dir() else folder)
        with explained, torch.random.fork_rng(devices=[]):  # what it is initialised with is replaced
            return super().from_pretrained(name, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Save the network with the configuration that it has now, see the class.

        Args:
            save_directory: the folder.
            options: of the hub, such as ``push_to_hub``.
        """
        return super().save_pretrained(save_directory, **{"config": self.config} | options)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **hub: Any) -> "HubModule":
        """Load with the hub's machinery, but refuse a checkpoint that lacks weights."""
        with contextlib.redirect_stdout(None):  # the hub says where it loads from
            return super()._from_pretrained(strict=strict, **hub)

    @classmethod
    def _check_config(cls, path: Path) -> None:
        """Check that a file configures this class, and say which other one it configures."""
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(
                f"{path}: expected the configuration of a {cls.__name__}, got {type(found).__name__}; save "
                "it again"
            )
        unknown, missing = cls._compare_config(found)
        if unknown or missing:
            others = [
                other.__name__ for other in _list_kinds(HubModule) if not any(other._compare_config(found))
            ]
            if others:
                got = f"that of a {' or '.join(others)}; give the folder of a {cls.__name__}"
            else:
                told = [f"the unknown {', '.join(unknown)}"] * bool(unknown)
                told += [f"no {', '.join(missing)}"] * bool(missing)
                got = f"{' and '.join(told)}; save it again with this version of qsteer"
            raise ValueError(f"{path}: expected the configuration of a {cls.__name__}, got {got}")
        try:
            config = _build_config(get_type_hints(cls.__init__)["config"], found)
            with torch.device("meta"):  # nothing is allocated
                size = sum(tensor.numel() for tensor in cls(config).state_dict().values())
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{path}: expected the configuration of a {cls.__name__}, got values that cannot be "
                f"({reason}); save it again"
            ) from None
        if size > (held := path.with_name(WEIGHTS).stat().st_size):
            raise ValueError(
                f"{path}: expected the configuration of the weights beside it, got one of {size} numbers for "
                f"a {WEIGHTS} of {held} bytes; copy or save both again"
            )

    @classmethod
    def _compare_config(cls, found: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Return the keys that this class's configuration does not have, and those that it lacks."""
        known = {f.name: f for f in fields(get_type_hints(cls.__init__)["config"])}
        needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        return sorted(found.keys() - known.keys()), [name for name in needed if name not in found]

    def generate_model_card(self, **card: Any) -> ModelCard:
        """Return the model card that ``save_pretrained`` and ``push_to_hub`` write as README.md."""
        return super().generate_model_card(config=self.config, **card)


def fetch(name: str, revision: str | None, *, kind: str, needed: str, whole: bool = True) -> Path:
    """Return a folder here, or that of a repository of the hub, which is downloaded.

    Args:
        name: the folder, or the repository's name.
        revision: of the repository.
        kind: what it is, for errors.
        needed: a file that it must have.
        whole: download all of the repository; else all but its weights.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it lacks the file.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not HUB_NAME.fullmatch(name):
            got = "a file" if folder.exists() else "nothing there"
            raise FileNotFoundError(f"{name}: expected the folder of a {kind}, got {got}; correct the path")
        with _explained(kind, folder):
            ignored = None if whole else ["model*.safetensors", "*.bin", "*.pt"]
            folder = Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    check_whole(folder / needed)
    return folder


def _build_config(kind: type, found: dict[str, Any]) -> Any:
    """Return a configuration read from JSON, after a check of its numbers' kinds.

    Raises:
        TypeError, ValueError: a value is of another kind, or out of range.
    """
    for name, hint in get_type_hints(kind).items():
        value: Any = found.get(name)
        many = hint in (Sequence[int], Sequence[str])
        if name not in found or hint not in (int, float, bool, str, Sequence[int], Sequence[str]):
            continue
        if many and not isinstance(value, list):
            raise TypeError(f"{name}: expected a list, got {value!r}")
        single = get_args(hint)[0] if many else hint
        for part in value if many else (value,):
            if not (type(part) is single or (single is float and type(part) is int)):
                raise TypeError(f"{name}: expected {single.__name__}, got {part!r}")
            if single is float and not math.isfinite(part):
                raise ValueError(f"{name}: expected a finite number, got {part}")
    return kind(**found)


def _list_kinds(kind: type[HubModule]) -> Iterator[type[HubModule]]:
    """Yield the classes of networks that have been imported."""
    for other in kind.__subclasses__():
        if "config" in get_type_hints(other.__init__):
            yield other
        yield from _list_kinds(other)


@contextlib.contextmanager
def _explained(kind: str, place: Path) -> Iterator[None]:
    """Say of what the loading of a network did not go, and where."""
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{place}: expected a folder here, or a repository of the hub that can be read, got neither "
            f"({reason}); correct the path, or log in"
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"{place}: expected whole weights of a {kind}, got a broken file ({error}); copy or save it again"
        ) from None
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"{place}: expected the weights of a {kind} as {CONFIG} describes it, got others ({error}); "
            "copy or save both again"
        ) from None
