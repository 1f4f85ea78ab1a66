"""Make the profile of a registered model, and find the registered model of a profile."""

from __future__ import annotations

from warmserve_rt.core.model import Model
from warmserve_rt.core.revisions import parse_name
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.policy.profile import ModelProfile


def profile_of(
    model: Model,
    *,
    prefill_s: float,
    prefill_token_s: float,
    decode_s: float,
    decode_request_s: float = 0.0,
    width: int = 1,
    batch: int = 1,
    kv_token_bytes: int = 0,
    ends: bool = True,
    granule: int | None = None,
) -> ModelProfile:
    """Return the profile of a registered model.

    Parameters
    ----------
    model
        The registered model, or one of its ``width`` shards.
    granule
        Bytes of a granule. The bytes of each layer are rounded up to whole granules. Default: the
        granules of the model's runtime.
    prefill_s, prefill_token_s, decode_s, decode_request_s, width, batch, kv_token_bytes, ends
        See :class:`ModelProfile`, which also tells the errors.
    """
    unit = model.granule_bytes if granule is None else granule
    return ModelProfile(
        name=model.name,
        width=width,
        layer_bytes=tuple(max(1, -(-layer.nbytes // unit)) * unit for layer in model.layers),
        kv_token_bytes=kv_token_bytes,
        prefill_s=prefill_s,
        prefill_token_s=prefill_token_s,
        decode_s=decode_s,
        decode_request_s=decode_request_s,
        batch=batch,
        ends=ends,
    )


def find_model(runtime: Runtime, device: int, profile: ModelProfile) -> Model:
    """Return the model that the profile's name stands for now on this device.

    Parameters
    ----------
    runtime
        The runtime to look in.
    device
        The index of its device, for messages.
    profile
        The profile whose name is looked up.

    Raises
    ------
    ValueError
        If no such model is registered, or if its number of layers differs from the profile's.
    """
    model = runtime.model(profile.name)
    if len(model.layout) != len(profile.layer_bytes):
        raise ValueError(
            f"{profile.name} has {len(model.layout)} layers on device {device}, and "
            f"{len(profile.layer_bytes)} in its profile: give the fleet a new profile with "
            "remove() and add()"
        )
    return model


def bare_name(model: str) -> str:
    """Return the name without its revision. Raise ValueError if it is not a valid model name."""
    if not isinstance(model, str):
        raise ValueError(f"a model's name must be a string, got {model!r}")
    return parse_name(model)[0]
