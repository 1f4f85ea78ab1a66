"""Stores an engine's processed weights on the disk: written once, found again, never half of them.

An entry is a folder with a manifest, which names its two files; they are found by it alone. All
files are written under new names and the manifest is renamed last, so a writer that is killed or
meets a full disk leaves the entry as it was. Writers take turns by a lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save

from warmserve_rt._cache_dir import locked
from warmserve_rt._errors import CorruptCheckpoint
from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.layout import LayerSpec, build_layout
from warmserve_rt.engines.torch.state import State
from warmserve_rt.kernels import granule_digest

from .entries import LOCK, MANIFEST, explained, open_for_use, prune, remove_unused

__all__ = ["Cache", "Entry", "Key", "discard", "open_for_use"]

FORMAT = 1  # to be raised when a manifest means something else
GRANULE = 2 << 20  # bytes that a digest is of
PAGE = 4096
_UNUSUAL = re.compile(r"[^\w.+-]")
_NAME_LENGTH = 50  # characters, of four bytes at most: a folder's name has 255
_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """Says what processed weights are of. ``place`` tells entries apart (model, dtype, shard);
    an entry is stale if ``content`` has changed."""

    name: str
    place: Mapping[str, Any]
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """Complete processed weights. ``state`` lacks the parameters, which are in the file
    ``weights``; ``digests``: by layer, of each granule as a runtime lays it out."""

    folder: Path
    weights: Path
    state: State = field(compare=False)
    digests: Mapping[str, list[int]]
    identity: str  # of the content


class Cache:
    """Entries under one folder. Raises OSError, naming folder and option, if it cannot be used.

    ``limit``: bytes of all entries, or None for no limit. Before a new one is written, those that
    no engine has are removed, the least recently used first, until it fits. An entry that is larger
    by itself is written all the same.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root, self.limit = root, limit

    def folder(self, key: Key) -> Path:
        place = hashlib.sha256(json.dumps(dict(key.place), sort_keys=True).encode()).hexdigest()
        return self.root / f"{re.sub(_UNUSUAL, '_', key.name)[:_NAME_LENGTH]}-{place[:12]}"

    def find(self, key: Key) -> Entry | None:
        """Returns the entry if it has just this content and is whole. The parameters' bytes are not
        read: they are compared with :attr:`Entry.digests` when they are."""
        folder = self.folder(key)
        try:
            with explained("read", self.root, missing=True):
                return _read(folder, key)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, CorruptCheckpoint) as error:
            log.warning("%s: the cached weights are not used: %s", folder, str(error))
            return None

    def write(self, key: Key, state: State) -> Entry:
        """Writes an entry, or finds the one that another process has written meanwhile.

        Raises OSError, saying how many bytes it needs, if they cannot be written; the entry that
        was there is then as it was.
        """
        folder = self.folder(key)
        needs = sum(each.nbytes for each in state.parameters.values())
        with explained("write", self.root, needs=needs), locked(folder / LOCK):
            os.utime(folder / LOCK)
            if found := self.find(key):
                return found
            remove_unused(folder, _named(folder))  # of earlier contents and of killed writers
            self._make_room(needs, folder)
            try:
                _write(folder, key, state)
            finally:
                remove_unused(folder, _named(folder))
            return _read(folder, key)

    def _make_room(self, needs: int, folder: Path) -> None:
        if self.limit is None:
            return
        pruned = prune(self.root, keep=max(0, self.limit - needs), spare=folder)
        for each in pruned.removed:
            log.info("%s: removed to make room in the cache", each.folder)
        if needs > self.limit:
            log.warning(
                "%s: the processed weights take %d bytes, more than the cache's limit of %d "
                '(option "cache_limit" of model_loader_extra_config)',
                folder,
                needs,
                self.limit,
            )


def discard(entry: Entry, reason: object) -> None:
    """Forgets an entry whose content is not what it should be, unless it was replaced meanwhile."""
    with explained("replace an entry of", entry.folder), locked(entry.folder / LOCK):
        if entry.weights.name in _named(entry.folder):
            log.warning("%s: the cached weights are to be made again: %s", entry.folder, reason)
            (entry.folder / MANIFEST).unlink()


def _read(folder: Path, key: Key) -> Entry:
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError("a manifest of another format")
    if manifest.pop("digest", None) != _digest_of(manifest):
        raise ValueError("the manifest was changed")
    wanted = json.loads(json.dumps({"place": dict(key.place), "content": dict(key.content)}))
    if manifest["key"] != wanted:
        changed = [
            name
            for part in wanted
            for name in wanted[part].keys() | manifest["key"][part].keys()
            if wanted[part].get(name) != manifest["key"][part].get(name)
        ]
        raise ValueError(f"they are of another {', '.join(sorted(changed))}")
    weights, private = folder / manifest["weights"], folder / manifest["private"]
    if weights.stat().st_size != manifest["weights_bytes"]:
        raise ValueError(f"{weights.name} has another size than it was written with")
    content = private.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["private_sha256"]:
        raise ValueError(f"{private.name} is not as it was written")
    state = State(
        private=load(content),
        aliases=manifest["aliases"],
        orders=manifest["orders"],
        attributes=set(manifest["attributes"]),
    )
    return Entry(folder, weights, state, manifest["layers"], _digest_of(manifest["layers"]))


def _write(folder: Path, key: Key, state: State) -> None:
    nonce = secrets.token_hex(4)
    weights, private = (folder / f"{what}-{nonce}.safetensors" for what in ("weights", "private"))
    write_safetensors(weights, state.parameters)
    content = save({name: each.clone() for name, each in state.private.items()})
    private.write_bytes(content)
    _sync(private)
    with closing(open_checkpoint(weights)) as opened:
        layers = build_layout(opened).layers
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "key": {"place": dict(key.place), "content": dict(key.content)},
        "weights": weights.name,
        "weights_bytes": weights.stat().st_size,
        "private": private.name,
        "private_sha256": hashlib.sha256(content).hexdigest(),
        "aliases": state.aliases,
        "orders": state.orders,
        "attributes": sorted(state.attributes),
        "layers": {layer.name: layer_digest(layer, state.parameters) for layer in layers},
    }
    manifest["digest"] = _digest_of(manifest)
    aside = folder / f"manifest-{nonce}.json"
    aside.write_text(json.dumps(manifest))
    _sync(aside)
    aside.rename(folder / MANIFEST)
    _sync(folder)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes row-major tensors one after the other, the first at the start of a page, so that they
    are aligned for readers that map the file. No second copy of them is made.

    Raises ValueError for a dtype that the format has no name for."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {tensor.dtype}, which safetensors cannot hold")
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor).data)
        file.flush()
        os.fsync(file.fileno())


def layer_digest(layer: LayerSpec, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Returns a digest of each granule of a layer as a runtime holds it, with zeros between its
    tensors."""
    whole = np.zeros(layer.nbytes, np.uint8)
    for spec in layer.tensors:
        whole[spec.offset : spec.offset + spec.nbytes] = _bytes_of(tensors[spec.name])
    return [int(each) for each in granule_digest(whole, GRANULE)]


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    raw: npt.NDArray[np.uint8] = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
    return raw


def _named(folder: Path) -> set[str]:
    """Returns the files of the folder that make its entry."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {MANIFEST, str(manifest["weights"]), str(manifest["private"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
