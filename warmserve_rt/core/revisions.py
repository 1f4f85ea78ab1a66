"""Models by name, and revisions of one that lie beside each other.

A full name is "chat@2", or "chat" for a revision without a name of its own. The bare name stands
for one of its revisions. Whoever is bound to it, an engine or an address in it, relies on one
layout: all revisions of a name have the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, ValuesView
from itertools import zip_longest

from warmserve_rt import _arguments as check
from warmserve_rt.checkpoint.layout import Layout

from .model import Model


def parse_name(full: str) -> tuple[str, str | None]:
    """Returns the bare name and the revision, None if it has none. Raises ValueError."""
    name, at, revision = full.partition("@")
    if (at and not (name and revision)) or "@" in revision:
        raise ValueError(f"a model's name must be 'name' or 'name@revision', got {full!r}")
    return name, revision or None


def difference(layout: Layout, other: Layout) -> tuple[str, str] | None:
    """The first thing in which they differ, as the one and as the other has it. Where the bytes
    come from is no difference."""
    pairs = zip_longest(_contents(layout), _contents(other), fillvalue="nothing more")
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


def _contents(layout: Layout) -> Iterator[str]:
    for layer in layout.layers:
        yield f"layer {layer.name!r}"
        for t in sorted(layer.tensors, key=lambda t: (t.offset, t.name)):
            yield f"tensor {t.name!r}, {t.dtype.name} {list(t.shape)} at byte {t.offset}"


class Revisions:
    """The registered models of one runtime. Finding one is lock-free; changes take turns."""

    def __init__(self) -> None:
        self._changes = threading.Lock()
        self._models: dict[str, Model] = {}  # by full name
        self._current: dict[str, Model] = {}  # what bare names stand for

    def values(self) -> ValuesView[Model]:
        return self._models.values()

    def clear(self) -> None:
        with self._changes:
            self._models.clear()
            self._current.clear()

    def find(self, model: Model | str) -> Model:
        """Returns the model of a bare name, of a full one, or itself. Raises ValueError unless it
        is registered, TypeError for what is neither a name nor a model."""
        if isinstance(model, str):
            found = (self._models if "@" in model else self._current).get(model)
        elif isinstance(model, Model):
            found = self._models.get(model.name)
            found = found if found is model else None
        else:
            bound = isinstance(getattr(model, "warmserve_model", None), Model)
            hint = "; a bound module's model is module.warmserve_model" if bound else ""
            raise TypeError(
                f"model must be a name or a registered model, got {check.shown(model)}{hint}"
            )
        if found is None:
            raise ValueError(self._unknown(model))
        return found

    def why_not_leased(self, model: Model) -> str:
        """Says why what is bound to the model cannot run now, and what to do."""
        full = model.name
        if self._models.get(full) is not model:
            return f"{self._unknown(model)}: load the module again"
        name, _ = parse_name(full)
        current = self._current.get(name)
        now = ""
        if current is not model:
            now = f"{name!r} now stands for {repr(current.name) if current else 'no revision'}"
        if full != name or current is model:
            also = f" ({now})" if now else ""
            return f"{full!r} is not leased: run it under `with runtime.lease({full!r})`{also}"
        return (
            f"{now}, and this module is bound to the revision registered as {full!r}: run it "
            "under `with runtime.lease(module.warmserve_model)`, or load the other revision"
        )

    def _unknown(self, model: Model | str) -> str:
        """Says of a model that cannot be found what is registered instead."""
        if isinstance(model, Model):
            full = model.name
            other = f"; {full!r} is another model now" if full in self._models else ""
            return f"no model {full!r} as given is registered: it was unregistered{other}"
        registered = list(self._models)
        if model in registered:
            return (
                f"{model!r} stands for no revision now, though one is registered as {model!r}: "
                f"choose it with runtime.promote({model!r})"
            )
        said = f"no model {model!r} is registered"
        if revisions := [each for each in registered if parse_name(each)[0] == model]:
            names = ", ".join(map(repr, revisions))
            return f"{said}: it stands for none of {names} until runtime.promote() chooses one"
        return said + check.did_you_mean(model, registered)

    def add(self, full: str, layout: Layout, make: Callable[[], Model]) -> Model:
        """Returns the model that `make` registers; the bare name stands for it if for no other.
        Raises what `make` does, for one a name that is taken; before, ValueError, which names the
        first difference, if another revision's layout is not this."""
        name, _ = parse_name(full)
        with self._changes:
            others = (other for other in self._models.values() if parse_name(other.name)[0] == name)
            other = next(others, None)  # all are alike
            if other and full not in self._models and (found := difference(layout, other.layout)):
                raise ValueError(
                    f"{full!r} is laid out unlike {other.name!r}: {found[0]}, where that has "
                    f"{found[1]}"
                )
            made = self._models[full] = make()
            self._current.setdefault(name, made)
            return made

    def remove(self, model: Model) -> None:
        """Forgets it; the bare name, if it stood for this model, stands for none."""
        name, _ = parse_name(model.name)
        with self._changes:
            if self._models.get(model.name) is model:  # or it has a successor of its name already
                del self._models[model.name]
            if self._current.get(name) is model:
                del self._current[name]

    def promote(self, model: Model | str) -> Model | None:
        """Makes the bare name stand for a revision, given by its full name or itself; returns what
        it stood for before. Raises ValueError unless it is registered."""
        with self._changes:
            found = self._models.get(model) if isinstance(model, str) else self.find(model)
            if found is None:
                near = check.did_you_mean(model, list(self._models))
                raise ValueError(f"no model has the full name {model!r}{near}")
            name, _ = parse_name(found.name)
            before = self._current.get(name)
            self._current[name] = found
            return before
