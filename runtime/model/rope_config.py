"""The rotary embedding of each type of layer, read from a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.model.config_fields import Fields, refuse

ROPE_TYPES = ("default", "linear")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class RopeConfig:
    """A layer's rotary embedding.

    `theta` is the base, `rope_type` "default" or "linear"; angles are position * theta^(-2i/head_dim) / factor.

    Raises:
        CheckpointError: another type, or a theta or factor that is not a positive number.
    """

    theta: float
    rope_type: str = "default"
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            refuse("rope_type", " or ".join(map(repr, ROPE_TYPES)), self.rope_type)
        numbers = Fields({"rope_theta": self.theta, "rope factor": self.factor}, {})
        for name in numbers.given:
            numbers.number(name)


def read_ropes(family: str, fields: Fields) -> dict[str, RopeConfig]:
    """The rotary embedding of each type of layer.

    transformers 5 nests everything in `rope_parameters`; older layouts spread it over `rope_theta`,
    `rope_local_base_freq` and `rope_scaling`.

    Raises:
        CheckpointError: a rotary embedding that RopeConfig does not have; the field is named.

    Source: transformers' modeling_rope_utils.py (RotaryEmbeddingConfigMixin) and configuration_gemma3.py.
    """
    parameters, scaling = _mapping(fields, "rope_parameters"), _mapping(fields, "rope_scaling")
    if family != "gemma3":
        name = "rope_scaling" if scaling else "rope_parameters"
        return dict.fromkeys(LAYER_TYPES, _rope(name, scaling or parameters, fields, "rope_theta", 10_000.0))
    unknown = sorted(set(parameters) - set(LAYER_TYPES))
    if unknown:
        refuse("rope_parameters of a gemma3 config", f"nested in {' and '.join(LAYER_TYPES)}", unknown)
    nested = Fields(parameters, {layer_type: {"rope_type": "default"} for layer_type in LAYER_TYPES})
    full, sliding = (_mapping(nested, layer_type) for layer_type in LAYER_TYPES)
    name = "rope_scaling" if scaling else "rope_parameters"
    return {
        # A rope_type, even a default one, takes precedence over the old key "type".
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
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        refuse(f"{name}.rope_type", " or ".join(map(repr, ROPE_TYPES)), rope_type)
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial not in (1.0, None):
        refuse(f"{name}.partial_rotary_factor", "1", partial)
    nested = Fields({f"{name}.{key}": value for key, value in parameters.items()}, {})
    if "rope_theta" in parameters:
        theta = nested.number(f"{name}.rope_theta")
    else:
        theta = Fields(fields.given, {theta_name: theta}).number(theta_name)
    return RopeConfig(theta, rope_type, nested.number(f"{name}.factor") if rope_type == "linear" else 1.0)
