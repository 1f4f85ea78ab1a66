"""Operations that add models to a runtime or renew them: register, reload and promote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from warmserve_rt import _arguments as check
from warmserve_rt._log import log
from warmserve_rt._units import format_bytes
from warmserve_rt.checkpoint import Source
from warmserve_rt.checkpoint.dtypes import DTypeLike
from warmserve_rt.checkpoint.layout import Grouping

from .inspecting import Inspecting
from .model import Model
from .registration import Digests, Origin, Verify, anchored
from .revisions import difference, parse_name


class Registering(Inspecting):
    """The part of :class:`Runtime` that registers models."""

    def register(
        self,
        name: str,
        checkpoint: Source | None = None,
        *,
        dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
        layers: Grouping | None = None,
        writable: bool = False,
        allow_symlinks: bool = False,
        variant: str | None = None,
        revision: str | None = None,
        verify: Verify | None = None,
        digests: Digests | None = None,
    ) -> Model:
        """Register a model without loading it.

        Its files stay open until the model is unregistered.

        Parameters
        ----------
        name : str
            "chat", or "chat@2" for a revision. Revisions are separate models. The bare name stands
            for the revision registered first, until :meth:`promote`.
        checkpoint : path, sequence of paths, or str, optional
            A safetensors file, a list of them, a Hugging Face directory, or the id of a model in
            the Hugging Face cache ("org/name"). Default: the bare ``name`` with its revision, so
            that ``register("org/name")`` is enough.
        dtype : dtype or mapping from tensor names to dtypes, optional
            "bfloat16", "float16" or "float32", or a dtype of torch or numpy. Plain floating-point
            weights are cast to it while they are loaded; with a mapping, only the tensors that it
            names. Quantised tensors, and the floats that belong to them, keep their dtypes
            (:func:`dtypes.planned_casts`). Default: no casts.
        layers : grouping, optional
            How tensors form layers if their names do not tell; see :func:`layout.build_layout`.
            Layers that the caller forms are not merged (``max_padding`` of :class:`Runtime`).
        writable : bool
            Allow in-place writes to the weights, which eviction discards. Otherwise they fault.
        allow_symlinks : bool
            Follow symbolic links that leave the checkpoint's directory. Links of the Hugging Face
            cache into its own blobs are always followed.
        variant : str, optional
            "fp16" takes model.fp16.safetensors of a directory instead of model.safetensors.
        revision : str, optional
            Revision of a model in the Hugging Face cache. Default: "main".
        verify : "full" or "sampled", optional
            "full" reads the files now to compute a digest of every granule, and compares it after
            each load of a layer. "sampled" does so for some granules of each layer. After a
            mismatch the layer is not resident, and loading raises CorruptCheckpoint.
        digests : mapping, optional
            For each layer's name, its digests as :meth:`digest` returns them. Compare these instead
            of computing digests from the files.

        Raises
        ------
        CorruptCheckpoint
            A file is malformed, or files and index disagree.
        FileNotFoundError
            The checkpoint does not exist.
        ValueError
            The name is invalid or already registered, the cast is not supported, or the layout
            differs from that of the name's other revisions.

        Guarantee: strong (after an exception nothing has changed).
        """
        native = self.native
        bare, named_revision = parse_name(check.text("name", name))
        writable = check.flag("writable", writable)
        if checkpoint is None:
            checkpoint, revision = bare, revision or named_revision
        checkpoint = check.paths("checkpoint", checkpoint)
        origin = Origin(
            checkpoint,
            dtype,
            layers,
            allow_symlinks,
            variant,
            revision,
            verify,
            self._max_padding,
        )
        with origin.opened(self._granule_bytes, digests) as opened:

            def make() -> Model:
                made = native.register(
                    name,
                    opened.files(),
                    opened.layout.native,
                    writable=writable,
                    checks=opened.checks,
                )
                again = replace(origin, source=anchored(origin.source))
                unit, framework = self._granule_bytes, self._framework
                return Model(made, native, opened.layout, framework, again, granule_bytes=unit)

            model = self._models.add(str(name), opened.layout, make)
        log.info(
            "registered %r: %d layers, %s, from %s",
            model.name,
            len(model.layout),
            format_bytes(model.nbytes),
            checkpoint,
        )
        return model

    def reload(
        self,
        model: Model | str,
        *,
        digests: Digests | None = None,
        timeout: float | None = None,
    ) -> None:
        """Reopen a model's files after they were replaced, written or touched.

        Until then loads of the model raise CorruptCheckpoint. The files are those that the model
        was registered from, and their layout must be the same. Addresses, views, keep values and
        the name stay; resident layers are evicted.

        Parameters
        ----------
        model : Model or str
        digests : mapping, optional
            As for :meth:`register`. Default: computed from the new files if the model was
            registered with ``verify``.
        timeout : float, optional
            Seconds to wait for streams that use the model. Default: no limit.

        Raises
        ------
        Busy
            The model is leased.
        TimeoutError
            Streams use the model for longer than ``timeout``.
        ValueError
            The layout has changed.
        CorruptCheckpoint, FileNotFoundError
            As for :meth:`register`.

        Guarantee: strong, except for layers that were evicted.
        """
        found = self.model(model)
        timeout = check.timeout(timeout)
        with found.origin.opened(self._granule_bytes, digests) as opened:
            if differs := difference(opened.layout, found.layout):
                raise ValueError(
                    f"{found.name!r} has another layout now: {differs[0]} instead of {differs[1]}; "
                    "unregister it and register it again"
                )
            self.native.reload(
                found.native, opened.files(), opened.layout.native, opened.checks, timeout
            )
            found.layout = opened.layout
        log.info("reloaded %r", found.name)

    def promote(self, model: Model | str) -> Model | None:
        """Let the bare name stand for this revision from now on.

        Loads and evicts nothing. Leases on the other revision stay valid.

        Parameters
        ----------
        model : Model or str
            The revision, or its full name.

        Returns
        -------
        Model or None
            The revision that the bare name stood for before.

        Raises
        ------
        ValueError
            No such revision is registered.

        Guarantee: atomic.
        """
        before = self._models.promote(model)
        log.info("promoted %r; before: %r", self.model(model).name, before and before.name)
        return before
