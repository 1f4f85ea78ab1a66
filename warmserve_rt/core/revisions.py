"""Models by name, and the revisions of a name.

A full name is "chat@2", or "chat" for a revision without a name of its own. The bare name stands
for one of its revisions. All revisions of a name have the same layout, because an engine, or an
address in it, that is bound to the name relies on one layout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, ValuesView
from itertools import zip_longest

from warmserve_rt import _arguments as check
from warmserve_rt.checkpoint.layout import Layout

from .model import Model


def parse_name(full: str) -> tuple[str, str | None]:
    """Return the bare name and the revision, or None. Raises ValueError for an invalid name."""
    name, at, revision = full.partition("@")
    if (at and not (name and revision)) or "@" in revision:
        raise ValueError(f"a model's name must be 'name' or 'name@revision', got {full!r}")
    return name, revision or None


def difference(layout: Layout, other: Layout) -> tuple[str, str] | None:
    """Return the first difference of two layouts as (of layout, of other), or None.

    The files that the bytes are read from are not compared.
    """
    pairs = zip_longest(_contents(layout), _contents(other), fillvalue="nothing more")
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


def _contents(layout: Layout) -> Iterator[str]:
    for layer in layout.layers:
        yield f"layer {layer.name!r}"
        for t in sorted(layer.tensors, key=lambda t: (t.offset, t.name)):
            yield f"tensor {t.name!r}, {t.dtype.name} {list(t.shape)} at byte {t.offset}"


class Revisions:
    """The registered models of one runtime. Lookups are lock-free; changes are serialised."""

    def __init__(self) -> None:
        self._changes = threading.Lock()
        self._models: dict[str, Model] = {}  # by full name
        self._current: dict[str, Model] = {}  # by bare name

    def values(self) -> ValuesView[Model]:
        return self._models.values()

    def clear(self) -> None:
        with self._changes:
            self._models.clear()
            self._current.clear()

    def find(self, model: Model | str) -> Model:
        """Return the registered model of a bare or full name, or the model itself.

        Raises ValueError if it is not registered, TypeError if ``model`` is neither a name nor a
        model.
        """
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
        """Return why a module bound to the model cannot run now, and what to do."""
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
        """Return the message for a model that is not found; it says what is registered."""
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
            return f"{said}: the name stands for no revision; promote() one of {names}"
        return said + check.did_you_mean(model, registered)

    def add(self, full: str, layout: Layout, make: Callable[[], Model]) -> Model:
        """Register the model that ``make`` returns, and return it.

        The bare name stands for it if it stands for no other model. Raises ValueError, which names
        the first difference, if another revision of the name has a different layout; and what
        ``make`` raises, for example if the name is registered already.
        """
        name, _ = parse_name(full)
        with self._changes:
            others = (other for other in self._models.values() if parse_name(other.name)[0] == name)
            other = next(others, None)  # all have the same layout
            if other and full not in self._models and (found := difference(layout, other.layout)):
                raise ValueError(
                    f"{full!r} must have the layout of {other.name!r}, got {found[0]} instead of "
                    f"{found[1]}"
                )
            made = self._models[full] = make()
            self._current.setdefault(name, made)
            return made

    def remove(self, model: Model) -> None:
        """Forget the model. If the bare name stood for it, that name stands for no model."""
        name, _ = parse_name(model.name)
        with self._changes:
            if self._models.get(model.name) is model:  # else a new model has its name
                del self._models[model.name]
            if self._current.get(name) is model:
                del self._current[name]

    def promote(self, model: Model | str) -> Model | None:
        """Let the bare name stand for a revision, given by its full name or itself.

        Returns the model that it stood for before. Raises ValueError if the revision is not
        registered.
        """
        with self._changes:
            found = self._models.get(model) if isinstance(model, str) else self.find(model)
            if found is None:
                near = check.did_you_mean(model, list(self._models))
                raise ValueError(f"no model with the full name {model!r} is registered{near}")
            name, _ = parse_name(found.name)
            before = self._current.get(name)
            self._current[name] = found
            return before
