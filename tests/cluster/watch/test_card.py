"""The model card: metadata that the hub can read, the figures, and honest words."""

from typing import Any

import pytest
import yaml

from cluster.watch.card import write_card
from tests.cluster.watch.releases import found

RECIPE = {"prune": {"sparsity": 0.5, "recipe": ["wanda", {"dsnot": {"cycles": 9}}]}, "compute": {"dtype": "auto"}}


@pytest.fixture
def results() -> dict[str, Any]:
    report = {
        "sparsity": "0.5", "achieved_sparsity": 0.5, "pruned_weights": 53_084, "prunable_weights": 106_168,
        "perplexity_before": 27.43, "perplexity_after": 51.94, "mean_error": 0.0123, "seconds": {},
        "guidance": ["The files are as large as before."], "smaller": None,
    }  # fmt: skip
    checks = [
        {"name": "perplexity ratio", "value": "1.89", "limit": "at most 2", "ok": True},
        {"name": "verify", "value": "30 tensors <compared>", "limit": "", "ok": True},
    ]
    return {"report": report, "checks": checks}


def test_the_hub_reads_where_the_model_comes_from(results: dict[str, Any]) -> None:
    _, metadata, _ = write_card(found(), RECIPE, results).split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "license": "apache-2.0", "base_model": "acme/tiny", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pruned", "sparse", "secateur"],
    }  # fmt: skip


def test_people_read_the_source_the_recipe_the_figures_and_what_it_is_worth(results: dict[str, Any]) -> None:
    card = write_card(found(), RECIPE, results)
    assert f"[acme/tiny](https://huggingface.co/acme/tiny/tree/{'1' * 40})" in card
    assert "with 50.00% of the weights in its blocks removed" in card
    assert "53,084 of 106,168" in card
    assert "| recipe | wanda, then dsnot {'cycles': 9} |" in card
    assert "| perplexity, dense | 27.43 |\n| perplexity, this model | 51.94 |" in card
    assert "- perplexity ratio: 1.89 (asked: at most 2)\n- verify: 30 tensors &lt;compared&gt;\n" in card
    assert "- The files are as large as before.\n" in card
    assert "sparsity: 0.5" in card


def test_blocks_that_are_gone_are_counted_and_masks_only_where_there_are_some(results: dict[str, Any]) -> None:
    blocks = {"of": 30, "parameters_before": 1000}
    results["report"]["smaller"] = {"num_blocks": 24, "parameters": 800, "asked": 0.2, "blocks": blocks}
    gone = "acme/tiny with 6 of 30 blocks removed (800 of 1,000 parameters are left)"
    assert f"{gone} and 50.00% of the weights in its blocks removed" in write_card(found(), RECIPE, results)
    results["report"]["prunable_weights"] = 0
    assert f"{gone}, by [secateur]" in write_card(found(), RECIPE, results)


def test_a_model_that_transformers_does_not_load_is_not_said_to_be_for_it(results: dict[str, Any]) -> None:
    blocks = {"of": 30, "parameters_before": 1000, "neurons": 48}
    smaller = {"num_blocks": 24, "parameters": 800, "asked": 0.2}
    for width, library in ((30, "transformers"), ([30, 40], "secateur")):
        results["report"]["smaller"] = {**smaller, "blocks": {**blocks, "width": width}}
        _, metadata, _ = write_card(found(), RECIPE, results).split("---\n", 2)
        assert yaml.safe_load(metadata)["library_name"] == library


def test_what_is_not_known_is_left_out(results: dict[str, Any]) -> None:
    results["report"]["perplexity_after"] = None
    card = write_card(found(origin="/models/own", name="own", facts={"licence": None}), RECIPE, results)
    assert "perplexity, dense" not in card
    assert "license" not in card
    assert "base_model" not in card
    assert "/models" not in card
    assert "| source | own |" in card
