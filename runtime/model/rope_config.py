"""The rotary embedding of each kind of layer, as a Hugging Face config gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.model.config_fields import Fields, refuse

ROPE_KINDS = ("default", "linear")
LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    `theta` is the base, `kind` one of "default", "linear"; angles are position * theta^(-2i/head_dim) / factor.

    Raises:
        CheckpointError: another kind, or a theta or factor that is not a positive number.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            refuse("rope_type", " or ".join(map(repr, ROPE_KINDS)), self.kind)
        numbers = Fields({"rope_theta": self.theta, "rope factor": self.factor}, {})
        for name in numbers.given:
            numbers.number(name)


def read_ropes(family: str, fields: Fields) -> dict[str, RopeConfig]:
    """The rotary embedding of each kind of layer.

    transformers 5 nests everything in `rope_parameters`; older layouts spread it over `rope_theta`,
    `rope_local_base_freq` and `rope_scaling`.

    Raises:
        CheckpointError: another rotary embedding than those of RopeConfig; the field is named.

    Source: transformers' modeling_rope_utils.py (RotaryEmbeddingConfigMixin) and configuration_gemma3.py.
    """
    parameters, scaling = _mapping(fields, "rope_parameters"), _mapping(fields, "rope_scaling")
    if family != "gemma3":
        name = "rope_scaling" if scaling else "rope_parameters"
        return dict.fromkeys(LAYER_KINDS, _rope(name, scaling or parameters, fields, "rope_theta", 10_000.0))
    unknown = sorted(set(parameters) - set(LAYER_KINDS))
    if unknown:
        refuse("rope_parameters of a gemma3 config", f"nested in {' and '.join(LAYER_KINDS)}", unknown)
    nested = Fields(parameters, {kind: {"rope_type": "default"} for kind in LAYER_KINDS})
    full, sliding = (_mapping(nested, kind) for kind in LAYER_KINDS)
    name = "rope_scaling" if scaling else "rope_parameters"
    return {
        # A rope_type that is there already, if only by default, stands before the old key "type".
        "full_attention": _rope(name, {**full, **scaling}, fields, "rope_theta", 1_000_000.0),
        "sliding_attention": _rope("rope_parameters", sliding, fields, "rope_local_base_freq", 10_000.0),
    }


def _mapping(fields: Fields, name: str) -> Mapping[str, Any]:
    value = fields[name]
    if value is None:
        return fields.defaults.get(name, {})
    return value if isinstance(value, Mapping) else refuse(name, "an object or null", value)


def _rope(name: str, parameters: Mapping[str, Any], fields: Fields, theta_name: str, theta: float) -> RopeConfig:
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            refuse(f"{name}.{key}", "a value, not nested for this family", value)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        refuse(f"{name}.rope_type", " or ".join(map(repr, ROPE_KINDS)), kind)
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial not in (1.0, None):
        refuse(f"{name}.partial_rotary_factor", "1", partial)
    found = Fields({f"{name}.{key}": value for key, value in parameters.items()}, {})
    if "rope_theta" in parameters:
        theta = found.number(f"{name}.rope_theta")
    else:
        theta = Fields(fields.given, {theta_name: theta}).number(theta_name)
    return RopeConfig(theta, kind, found.number(f"{name}.factor") if kind == "linear" else 1.0)
