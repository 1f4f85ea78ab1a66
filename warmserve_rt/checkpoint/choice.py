"""Choose the files of a directory that are its model, by their names alone.

The order is that of transformers and vLLM: `model.safetensors`, else the shards of
`model.safetensors.index.json`, else every `*.safetensors`. diffusers' name,
`diffusion_pytorch_model`, is treated like `model`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_SUFFIX = ".safetensors"
_STEMS = ("model", "diffusion_pytorch_model")

# Files beside a model that are not part of it: adapters, and the state of a training run.
_ASIDE = re.compile(
    r"(adapters?|adapter_(model|weights)|lora|lora_weights|pytorch_lora_weights|learned_embeds"
    r"|optim|optimizer|optimizer_state|scheduler|scaler|rng_state|random_states"
    r"|train(er|ing)_(args|state))([._-]?\d+|[._-].*)?\.safetensors"
)
_CONSOLIDATED = re.compile(r"consolidated([._-].*)?\.safetensors")  # Mistral's own copy of a model
_SHARD = re.compile(r"(.*?)-(\d+)-of-(\d+)(\.\w+)?\.safetensors")
_VARIANT = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<a>[A-Za-z]\w*)|(?P<shard>-\d+-of-\d+)\.(?P<b>[A-Za-z]\w*)"
    r"|\.(?P<c>[A-Za-z]\w*)(?P<part>-\d+-of-\d+))\.safetensors"
)


def choose(names: Collection[str], variant: str | None) -> tuple[str | None, list[str]]:
    """Return the index of a directory with these names, or None and the names of the model's files.

    Raises ValueError if the names do not determine the model or a shard is missing,
    FileNotFoundError if no file is a model.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", variant):
        raise ValueError(f"variant must be a word such as 'fp16', got {variant!r}")
    present = sorted(names)
    files = [name for name in present if name.endswith(_SUFFIX)]
    for stem in (*_STEMS, *_other_stems(present, variant)):
        file, indexes = _names_of(stem, variant)
        if file in files:
            return None, [file]
        for index in indexes:
            if index in present:
                return index, []
    model = [name for name in files if not _ASIDE.fullmatch(name)]
    if variant is not None:
        model = [name for name in model if variant in _variant_of(name)]
        if not model:
            raise FileNotFoundError(f"no variant {variant!r} in this directory{_variants(files)}")
    elif files and not model:
        raise FileNotFoundError(
            f"no model in this directory: {_some(files)} is an adapter or the state of a training "
            "run (name the file itself to register it)"
        )
    model = [name for name in model if not _CONSOLIDATED.fullmatch(name)] or model
    if variant is None:
        model = [name for name in model if not _is_variant_beside(name, model)]
    _require_all_shards(model)
    return None, model


def _names_of(stem: str, variant: str | None) -> tuple[str, list[str]]:
    """Return the name of a model's single file, and the possible names of its index."""
    if variant is None:
        return stem + _SUFFIX, [f"{stem}{_SUFFIX}.index.json"]
    return (
        f"{stem}.{variant}{_SUFFIX}",
        [f"{stem}{_SUFFIX}.index.{variant}.json", f"{stem}.{variant}{_SUFFIX}.index.json"],
    )


def _other_stems(names: Iterable[str], variant: str | None) -> list[str]:
    """Return the stem of the only index with another name; no stem if a known index exists."""
    endings = _names_of("", variant)[1]
    indexes = {
        name: name[: -len(ending)] for name in names for ending in endings if name.endswith(ending)
    }
    stems = {n: stem for n, stem in indexes.items() if not _ASIDE.fullmatch(stem + _SUFFIX)}
    if any(stem in _STEMS for stem in stems.values()):
        return []
    plain = {n: stem for n, stem in stems.items() if not _CONSOLIDATED.fullmatch(stem + _SUFFIX)}
    stems = plain or stems
    if len(stems) > 1 and not any(_names_of(stem, variant)[0] in names for stem in _STEMS):
        raise ValueError(f"a directory must have one index, got {', '.join(sorted(stems))}")
    return list(stems.values())


def _variant_of(name: str) -> set[str]:
    found = _VARIANT.fullmatch(name)
    return {found[group] for group in "abc" if found[group]} if found else set()


def _is_variant_beside(name: str, names: Collection[str]) -> bool:
    """Return whether `name` is another variant of a file or of a set of shards among `names`."""
    found = _VARIANT.fullmatch(name)
    if not found:
        return False
    if found["a"]:
        return found["stem"] + _SUFFIX in names
    shards = (_SHARD.fullmatch(other) for other in names)
    return any(shard and shard[1] == found["stem"] and not shard[4] for shard in shards)


def _variants(files: Iterable[str]) -> str:
    found = sorted({variant for name in files for variant in _variant_of(name)})
    return f"; it has {', '.join(map(repr, found))}" if found else ""


def _require_all_shards(names: Iterable[str]) -> None:
    """Raise ValueError if a set of shards has fewer files than its names say."""
    sets: dict[tuple[str, ...], dict[int, str]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            sets.setdefault((shard[1], shard[3], shard[4] or ""), {})[int(shard[2])] = shard[2]
    for (stem, total, end), numbers in sets.items():
        if len(numbers) < int(total):
            first = 0 if 0 in numbers else 1
            missing = next(n for n in range(first, first + len(numbers) + 1) if n not in numbers)
            digits = len(next(iter(numbers.values())))
            shard_name = f"{stem}-{missing:0{digits}}-of-{total}{end}{_SUFFIX}"
            raise ValueError(f"{shard_name} is missing: the download is incomplete")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
