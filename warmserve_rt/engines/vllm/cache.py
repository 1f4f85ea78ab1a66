"""A cache on disk of an engine's processed weights. An entry is either complete or absent.

An entry is a folder with a manifest and two files. Readers find the files only through the
manifest. A writer gives all files new names and renames the manifest last, so a writer that is
killed or meets a full disk leaves the old entry intact. A lock file serialises writers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
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

from .cache_folder import explained
from .entries import LOCK, MANIFEST, open_for_use, prune, remove_unused

__all__ = ["Cache", "Entry", "Key", "discard", "open_for_use"]

FORMAT = 1  # raise when the meaning of the manifest changes
PIECE = 2 << 20  # bytes covered by one digest
PAGE = 4096
_UNUSUAL = re.compile(r"[^\w.+-]")
_NAME_LENGTH = 50  # characters of at most 4 bytes; the name of a folder may have 255 bytes
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
    """The identity of processed weights.

    ``place`` distinguishes entries (model, dtype, shard). An entry is stale if ``content`` has
    changed.
    """

    name: str
    place: Mapping[str, Any]
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """Complete processed weights.

    The parameters are in the file ``weights``; ``state`` has everything else. ``digests`` has, for
    each layer, a digest of each granule as a runtime lays it out.
    """

    folder: Path
    weights: Path
    state: State = field(compare=False)
    digests: Mapping[str, list[int]]


class Cache:
    """The entries under one folder.

    Methods raise OSError, which names the folder and the option, if the folder cannot be used.

    Parameters
    ----------
    root : Path
        The folder.
    limit : int, optional
        Bytes of all entries. Before a new entry is written, entries that no engine uses are
        removed, least recently used first, until the new one fits. An entry that is larger than the
        limit is written nevertheless. Default: no limit.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root, self.limit = root, limit

    def folder(self, key: Key) -> Path:
        place = hashlib.sha256(json.dumps(dict(key.place), sort_keys=True).encode()).hexdigest()
        return self.root / f"{re.sub(_UNUSUAL, '_', key.name)[:_NAME_LENGTH]}-{place[:12]}"

    def find(self, key: Key) -> Entry | None:
        """Return the entry if it is complete and has the content of ``key``, otherwise None.

        This does not read the parameters. Compare them with :attr:`Entry.digests` after loading.
        """
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
        """Write an entry, or return the entry that another process has written meanwhile.

        Blocks while another process writes the same entry. Raises OSError, which names the bytes
        needed, if the entry cannot be written.

        Guarantee: strong (after an exception the old entry is intact).
        """
        folder = self.folder(key)
        needs = sum(each.nbytes for each in state.parameters.values())
        with explained("write", self.root, needs=needs), locked(folder / LOCK):
            os.utime(folder / LOCK)
            if found := self.find(key):
                return found
            remove_unused(folder, _named(folder))  # left by earlier contents and killed writers
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
    """Discard an entry with wrong content, unless another process has replaced it meanwhile.

    Logs ``reason``. The next start writes the entry again.
    """
    with explained("replace an entry of", entry.folder), locked(entry.folder / LOCK):
        if entry.weights.name in _named(entry.folder):
            log.warning("%s: the cached weights will be rebuilt: %s", entry.folder, reason)
            (entry.folder / MANIFEST).unlink()


def _read(folder: Path, key: Key) -> Entry:
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError("the manifest has another format")
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
        raise ValueError(f"they were made for another {', '.join(sorted(changed))}")
    weights, private = folder / manifest["weights"], folder / manifest["private"]
    if weights.stat().st_size != manifest["weights_bytes"]:
        raise ValueError(f"{weights.name} does not have the size that was written")
    content = private.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["private_sha256"]:
        raise ValueError(f"{private.name} differs from what was written")
    state = State(
        private=load(content),
        aliases=manifest["aliases"],
        orders=manifest["orders"],
        attributes=set(manifest["attributes"]),
    )
    return Entry(folder, weights, state, manifest["layers"])


def _write(folder: Path, key: Key, state: State) -> None:
    nonce = secrets.token_hex(4)
    weights, private = (folder / f"{what}-{nonce}.safetensors" for what in ("weights", "private"))
    write_safetensors(weights, state.parameters)
    content = save({name: each.clone() for name, each in state.private.items()})
    private.write_bytes(content)
    _sync(private)
    layers = layers_of(weights)
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
    """Write row-major tensors to a safetensors file, without a second copy of them in memory.

    The first tensor starts at a page boundary, so that readers can map the file aligned. The file
    is synced. Raises ValueError for a dtype that the format cannot represent.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {tensor.dtype}, which safetensors cannot represent")
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


def layers_of(weights: Path) -> Sequence[LayerSpec]:
    """Return the layers of an entry's weights, which its digests are named after."""
    with closing(open_checkpoint(weights)) as opened:
        return build_layout(opened).layers


def layer_digest(layer: LayerSpec, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Return a digest of each piece of a layer as a runtime lays it out, with zeros between
    tensors."""
    whole = np.zeros(layer.nbytes, np.uint8)
    for spec in layer.tensors:
        whole[spec.offset : spec.offset + spec.nbytes] = _bytes_of(tensors[spec.name])
    return [int(each) for each in granule_digest(whole, PIECE)]


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    raw: npt.NDArray[np.uint8] = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
    return raw


def _named(folder: Path) -> set[str]:
    """Return the names of the files that belong to the folder's entry."""
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
