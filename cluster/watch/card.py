"""The model card of a published release: where it comes from, how it was made, what it is worth, what it is not."""

from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from cluster.watch.lifecycle import Found

_TEMPLATE = """\
---
{{ metadata }}---

# {{ title }}

{{ name | e }} with {{ removed | e }}, by [secateur]({{ homepage }}).

| | |
|---|---|
| source | {{ source }} |
| revision | `{{ revision }}` |
| recipe | {{ recipe }} |
| mean relative error of a block's output | {{ "%.4f" | format(report.mean_error) }} |
{% if report.perplexity_before is not none and report.perplexity_after is not none %}
| perplexity, dense | {{ "%.2f" | format(report.perplexity_before) }} |
| perplexity, this model | {{ "%.2f" | format(report.perplexity_after) }} |
{% endif %}

## Checks

{% for check in checks %}
- {{ check.name | e }}: {{ check.value | e }}{{ (" (asked: " ~ check.limit ~ ")") | e if check.limit else "" }}
{% endfor %}

## Speed and size

{% for line in report.guidance %}
- {{ line }}
{% endfor %}

## Settings

```yaml
{{ settings }}```

Every tensor that was not pruned is the source's, byte for byte. Perplexity was measured on the text of whoever
published this, and says nothing of other uses: evaluate the model on yours. The source's licence and terms apply.
"""

_HOMEPAGE = "https://pypi.org/project/secateur"


def write_card(found: Found, recipe: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the card as Markdown with the hub's metadata; `results` are those of the gate."""
    on_hub = found.origin == "hub"
    metadata: dict[str, Any] = {
        **({"license": found.facts["licence"]} if found.facts.get("licence") else {}),
        **({"base_model": found.name, "base_model_relation": "finetune"} if on_hub else {}),
        "library_name": "secateur" if _loads_with_us_alone(results["report"]["smaller"]) else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse", "secateur"],
    }
    link = f"[{found.name}](https://huggingface.co/{found.name}/tree/{found.revision})"
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=f"{found.name.rpartition('/')[2]}, pruned",
        name=found.name,
        source=link if on_hub else found.name,
        revision=found.revision,
        removed=_removed(results["report"]),
        homepage=_HOMEPAGE,
        recipe=", then ".join(_step(step) for step in recipe["prune"]["recipe"]),
        settings=yaml.safe_dump(dict(recipe), sort_keys=False),
        report=results["report"],
        checks=results["checks"],
    )


def _loads_with_us_alone(smaller: Mapping[str, Any] | None) -> bool:
    """Tell whether a model has blocks of different widths, by its report."""
    return smaller is not None and isinstance(smaller["blocks"].get("width"), list)


def _removed(report: Mapping[str, Any]) -> str:
    """Say what is gone for good, and what is masked of the rest."""
    smaller, parts = report["smaller"], []
    if smaller is not None:
        blocks = smaller["blocks"]
        parts.append(
            f"{blocks['of'] - smaller['num_blocks']} of {blocks['of']} blocks removed ({smaller['parameters']:,} of "
            f"{blocks['parameters_before']:,} parameters are left)"
        )
    if report["prunable_weights"]:
        parts.append(
            f"{report['achieved_sparsity']:.2%} of the weights in its blocks removed ({report['pruned_weights']:,} of "
            f"{report['prunable_weights']:,}; asked: {report['sparsity']})"
        )
    return " and ".join(parts)


def _step(step: Any) -> str:
    return step if isinstance(step, str) else ", ".join(f"{name} {options}" for name, options in step.items())
