"""What config.json says of a model with fewer attention heads, in words that stock transformers takes.

With fewer heads `head_dim` no longer follows from the hidden size, so it is written out. Some families take no number
of heads that does not divide the hidden size. A llama is then written as a mistral without a sliding window, which
computes the same to the bit; the others are refused, with the numbers that would do.
"""

from collections.abc import Mapping

from huggingface_hub.errors import StrictDataclassError
from pydantic import JsonValue
from transformers import MistralConfig, PretrainedConfig

from pipeline.attention import HeadLayout, HeadUnit, layout_of
from pipeline.errors import ConfigError
from pipeline.human import human_part

_HERE_ON = "5.0.0"
"""From this version on transformers leaves the tokenizer of a mistral as it is; for older ones it warns of a mistake in
the first mistrals' own tokenizers, which a llama's does not have."""


def head_settings(
    config: PretrainedConfig, settings: Mapping[str, JsonValue], heads: HeadLayout
) -> dict[str, JsonValue]:
    """Return what config.json says with these heads: as `settings`, but for what they change.

    config: the dense model's, as loaded. Raises ConfigError where stock transformers would refuse it.
    """
    changed: dict[str, JsonValue] = {**settings, **heads.settings}
    refused = _refusal(type(config), changed)
    if refused is None:
        return changed
    if config.model_type == "llama" and not _has_biases({**config.to_dict(), **settings}):
        return _as_mistral(config, changed)
    raise ConfigError(
        f"{config.model_type} with {heads.num_heads} query heads would not load in stock transformers: {refused}"
    )


def require_loadable(
    config: PretrainedConfig, settings: Mapping[str, JsonValue], heads: HeadLayout, unit: HeadUnit
) -> None:
    """Raise ConfigError where no config.json says that these heads are left, with the parts of them that may go."""
    try:
        head_settings(config, settings, heads)
    except ConfigError as error:
        dense = layout_of(config)
        per_pool = dense.per_pool(unit)
        fitting = [n for n in range(1, per_pool) if _loads(config, settings, dense.without(n, unit))]
        parts = ", ".join(f"{human_part(n, per_pool)} ({dense.without(n, unit).num_heads} left)" for n in fitting)
        ways = f"with `head_unit: {unit}`, heads may be {parts}" if fitting else f"no `head_unit: {unit}` can go"
        raise ConfigError(f"{error.message}; {ways}. Or leave `heads` out and remove neurons alone") from None


def _loads(config: PretrainedConfig, settings: Mapping[str, JsonValue], heads: HeadLayout) -> bool:
    try:
        head_settings(config, settings, heads)
    except ConfigError:
        return False
    return True


def _refusal(kind: type[PretrainedConfig], settings: Mapping[str, JsonValue]) -> str | None:
    """Return why transformers refuses a config.json; None where it does not."""
    try:
        kind.from_dict(dict(settings))
    except (ValueError, StrictDataclassError) as error:
        return str(error).splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")
    return None


def _has_biases(known: Mapping[str, JsonValue]) -> bool:
    return bool(known.get("attention_bias") or known.get("mlp_bias"))


def _as_mistral(config: PretrainedConfig, settings: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a llama's config.json as that of a mistral which computes the same.

    What the llama's leaves to a default is written out where a mistral has another.
    """
    known, version = config.to_dict(), settings.get("transformers_version")
    theirs, ours = MistralConfig().to_dict(), type(config)().to_dict()
    implied = {name: known[name] for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    llama_alone = ours.keys() - theirs.keys()
    is_old = not isinstance(version, str) or int(version.partition(".")[0]) < int(_HERE_ON.partition(".")[0])
    return {
        **implied,
        **{name: value for name, value in settings.items() if name not in llama_alone},
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        **({"transformers_version": _HERE_ON} if is_old else {}),
    }
