"""Which releases are wanted, one question at a time and all reasons at once."""

from typing import Any

import pytest

from cluster.watch.config import FilterConfig
from cluster.watch.filters import refusal, refused_name
from tests.cluster.watch.releases import found

NOW = 1_000_000.0


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"]},
        {"licences": ["apache-2.0"]},
        {"include": ["^acme/", "^other/"]},
        {"exclude": ["-GGUF$"]},
        {"min_size": 100, "max_size": 100},
        {"max_age": "1000s"},
    ],
)
def test_a_release_that_is_as_asked_is_wanted(filters: dict[str, Any]) -> None:
    assert refusal(found(), FilterConfig.model_validate(filters), None, NOW) == ""


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "its architecture is LlamaForCausalLM, not of filters.architectures"),
        ({"licences": ["mit"]}, "its licence is apache-2.0, not of filters.licences"),
        ({"include": ["^other/"]}, "its name matches none of filters.include (^other/)"),
        ({"exclude": ["tiny$"]}, "its name matches tiny$ of filters.exclude"),
        ({"min_size": 101}, "its weights are 100 B, less than filters.min_size"),
        ({"max_size": 99}, "its weights are 100 B, more than filters.max_size"),
        ({"max_age": "999s"}, "it was last changed on 1970-01-12, and filters.max_age is 16 min 39 s"),
    ],
)
def test_a_release_that_is_not_as_asked_is_refused_with_the_figures(filters: dict[str, Any], reason: str) -> None:
    assert refusal(found(), FilterConfig.model_validate(filters), None, NOW) == reason


def test_a_release_that_is_too_old_is_refused_in_the_same_words_however_old_it_gets() -> None:
    filters = FilterConfig.model_validate({"max_age": "999s"})
    assert refusal(found(), filters, None, NOW) == refusal(found(), filters, None, NOW + 86_400)


def test_what_is_not_stated_is_refused_where_it_matters() -> None:
    bare = found(facts={})
    filters = FilterConfig(licences=("mit",), architectures=("LlamaForCausalLM",), max_age=1.0)
    why = refusal(bare, filters, None, NOW)
    assert "its architecture is not stated" in why
    assert "; its licence is not stated" in why
    assert refusal(bare, FilterConfig(), None, NOW) == ""


def test_a_release_without_weights_or_larger_than_the_disk_allows_is_refused() -> None:
    assert refusal(found(num_bytes=0), FilterConfig(), None, NOW) == "it has no safetensors weights"
    assert refusal(found(), FilterConfig(), 199, NOW) == "it takes 200 B of disk and limits.disk is 199 B"
    assert refusal(found(), FilterConfig(), 200, NOW) == ""


def test_a_name_can_be_judged_by_itself() -> None:
    assert refused_name("acme/tiny-GGUF", FilterConfig(exclude=("GGUF",))) != ""
    assert refused_name("acme/tiny", FilterConfig(exclude=("GGUF",), include=("tiny",))) == ""
