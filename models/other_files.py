"""The files of a model folder beside its weights: what goes along when these are rewritten."""

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

_OWN_WEIGHTS = (".safetensors", ".safetensors.index.json")
_OTHER_WEIGHTS = (
    *(".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp", ".npz", ".npy"),
    *(".gguf", ".ggml", ".msgpack", ".h5", ".ot", ".onnx", ".onnx_data", ".onnx.data"),
    *(".tflite", ".mlmodel", ".nemo", ".engine"),
)


class OtherFiles(NamedTuple):
    """Paths in a model folder, sorted.

    Attributes:
      along: of the files that go along.
      left: of the files and links that do not.
    """

    along: list[str]
    left: list[str]


def other_files(folder: Path, *, without: Collection[str] = ()) -> OtherFiles:
    """Returns what a model folder holds beside its weights.

    Every file goes along, those in folders too: configuration, tokenizer, chat templates, terms,
    code. Left are weights of other formats, links to folders, and links to files outside of the
    folder, but for those into the cache of the Hugging Face hub, whose folders are made of links.
    Hidden files and folders, `__pycache__` and safetensors are neither.

    Args:
      folder: the model folder.
      without: names directly in it that are neither.

    Raises:
      ValueError: `config.json` is a link that would be left.
    """
    found = OtherFiles([], [])
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        is_top = here == folder
        wanted = [n for n in folders if not n.startswith(".") and n != "__pycache__"]
        folders[:] = [name for name in wanted if not (is_top and name in without)]
        links = [name for name in folders if (here / name).is_symlink()]
        found.left.extend(str((here / name).relative_to(folder)) for name in links)
        for name in files:
            own = is_top and (name in without or name.endswith(_OWN_WEIGHTS))
            if own or name.startswith("."):
                continue
            weights = name.lower().endswith((*_OWN_WEIGHTS, *_OTHER_WEIGHTS))
            goes = not weights and _is_ours(here / name, folder)
            (found.along if goes else found.left).append(str((here / name).relative_to(folder)))
    if "config.json" in found.left:
        raise ValueError(
            f"{folder / 'config.json'} is a link to {os.path.realpath(folder / 'config.json')}, "
            "outside of the folder: put a copy in its place"
        )
    return OtherFiles(sorted(found.along), sorted(found.left))


def _is_ours(file: Path, folder: Path) -> bool:
    """Returns whether a file lies in the folder, or is the hub's cache's file for it."""
    target = file.resolve()
    in_hub_cache = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    return target.is_file() and (in_hub_cache or target.is_relative_to(folder.resolve()))


def copy_files(folder: Path, names: Iterable[str], out: Path) -> None:
    """Copies the files with the paths `names` in a folder to the same paths in another."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
