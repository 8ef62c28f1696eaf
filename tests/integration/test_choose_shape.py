"""How the blocks that go are chosen: measured once, kept at once, held against what was asked, refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BudgetExceeded, ConfigChanged, ConfigError, RunDirectoryError, RunStopped
from pipeline.ledger import Ledger
from tests.integration.endings import check_killed, check_memory
from tests.integration.smaller import SHORTGPT, SLEB, THEN_WANDA, settings
from tests.integration.smaller import six_blocks as six_blocks
from tests.integration.support import (
    RecipeEntries,
    carry_out,
    committed,
    load,
    outcome,
)


@pytest.mark.parametrize("depth", ["one_shot", "rescored", "greedy"])
def test_each_way_of_choosing_measures_what_it_needs_and_no_more(depth: str, source: Path, tmp_path: Path) -> None:
    recipe = [{"shortgpt": {"depth": depth}}]
    carry_out(settings(source, tmp_path, recipe))
    found = json.loads((tmp_path / "shape.json").read_text())
    first, second = found["order"]
    measured = found["measured"]
    if depth == "one_shot":
        assert list(measured) == [""]
        assert [first, second] == sorted(range(1, 5), key=lambda block: measured[""][block])[:2]
    elif depth == "rescored":
        assert list(measured) == ["", str(first)]
        assert (len(measured[""]), len(measured[str(first)])) == (6, 5)
    else:
        assert len(measured) == 4 + 3
        assert first == min(range(1, 5), key=lambda block: measured[str(block)][0])
        tokens = load(source).config.vocab_size  # the perplexity of random text is about that of a uniform guess
        assert all(1 < perplexity < 3 * tokens for (perplexity,) in measured.values())


def test_greedy_removal_goes_by_the_perplexity_of_the_smaller_model(source: Path, tmp_path: Path) -> None:
    own = settings(source, tmp_path, SLEB, 0.2)
    carry_out(own | {"evaluate": {"text": own["calibration"]["source"]["text"], "sequence_length": 24, "windows": 6}})
    (gone,) = json.loads((tmp_path / "shape.json").read_text())["order"]
    found = json.loads((tmp_path / "shape.json").read_text())["measured"][str(gone)][0]
    after = Ledger.read(tmp_path).notes["perplexity.after"]
    assert isinstance(after, dict)
    assert after["perplexity"] == pytest.approx(found, rel=1e-12)  # on the very tokens it was chosen by


@pytest.mark.parametrize("recipe", [SLEB, THEN_WANDA], ids=str)
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    recipe: RecipeEntries, source: Path, tmp_path: Path
) -> None:
    check_killed(settings(source, tmp_path / "run", recipe, 0.4), deadly=(4, 11, 23, 40))


@pytest.mark.parametrize("recipe", [SLEB, THEN_WANDA], ids=str)
def test_how_memory_is_used_changes_no_byte(recipe: RecipeEntries, source: Path, tmp_path: Path) -> None:
    check_memory(settings(source, tmp_path / "run", recipe))


def test_a_choice_that_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded, match=r"needs .* \(host\), .* above memory\.host"):
        carry_out(settings(source, tmp_path, SLEB, memory={"host": "20MiB"}))
    assert not (tmp_path / "shape.json").exists()


def test_greedy_removal_holds_two_boundaries_in_the_spool_and_no_more(source: Path, tmp_path: Path) -> None:
    room = 2 * 6 * 4096  # sequences, each on a page of its own
    carry_out(settings(source, tmp_path / "enough", SLEB, memory={"activations": "disk", "spool_limit": room}))
    with pytest.raises(BudgetExceeded, match=r"choose needs 49\.2 kB \(spool\), 1 B above memory\.spool_limit"):
        carry_out(settings(source, tmp_path / "less", SLEB, memory={"activations": "disk", "spool_limit": room - 1}))


def test_a_search_that_was_stopped_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    own, asked = settings(source, tmp_path, SLEB), 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 9  # block 0, four blocks without block 1, block 1, three without block 2

    with pytest.raises(RunStopped, match=r"while the blocks that go were chosen; .*Go on with: secateur run .*"):
        carry_out(own, stop=stop)
    measured = json.loads((tmp_path / "shape.json").read_text())["measured"]
    assert list(measured) == ["1", "2"]
    carry_out(own)
    assert json.loads((tmp_path / "shape.json").read_text())["measured"].items() >= measured.items()


def test_a_record_of_another_run_is_refused(source: Path, tmp_path: Path) -> None:
    carry_out(settings(source, tmp_path / "other", SHORTGPT, 0.2))
    own = settings(source, tmp_path / "run", SHORTGPT)
    carry_out(own)
    found = (tmp_path / "run" / "shape.json").read_text()
    (tmp_path / "run" / "shape.json").write_text((tmp_path / "other" / "shape.json").read_text())
    with pytest.raises(
        ConfigChanged,
        match=r"shape\.json was found with other settings.*: part 0\.2, now 0\.4, blocks 1, now 2; go back",
    ):
        carry_out(own)
    changed = json.loads(found)
    (tmp_path / "run" / "shape.json").write_text(json.dumps({**changed, "kept": [0, 2, 3, 5], "order": [1, 4]}))
    with pytest.raises(RunDirectoryError, match=r"keeps the blocks \[0, 2, 3, 5\], and its own figures say \[.*\]: it"):
        carry_out(own)
    del changed["kept"], changed["order"], changed["width"]
    changed["measured"][""] = [0.0, 0.1, 0.8, 0.9, 0.2, 0.0]
    (tmp_path / "run" / "shape.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigChanged, match=r"shape\.kept: \[0,.*,5\] in the ledger, \[0,2,3,5\] asked for"):
        carry_out(own)
    (tmp_path / "run" / "shape.json").write_text(found)
    carry_out(own)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (0.1, r"shortgpt is to remove 10\.00% of 6 blocks, which is 0 of them; .*: 4 of 6 may go; ask for 0\.1667 to"),
        (0.9, r"90\.00% of 6 blocks, which is 5 of them; blocks go whole, and the first and the last stay: 4 of 6"),
    ],
)
def test_a_ratio_that_is_not_one_of_blocks_is_refused(
    sparsity: float, message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        carry_out(settings(source, tmp_path, SHORTGPT, sparsity))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"allocation": {"owl": {}}},
            "prune: allocation spreads what is masked over the blocks, and this recipe masks",
        ),
        ({"skip": ["mlp.down_proj"]}, "prune: skip names linears that are not masked, and this recipe masks nothing;"),
    ],
)
def test_settings_of_masks_are_refused_where_nothing_is_masked(
    setting: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    own = settings(source, tmp_path, SHORTGPT)
    own["prune"] |= setting
    with pytest.raises(ConfigError, match=message):
        carry_out(own)


def test_blocks_that_nothing_prunes_are_copied_and_a_stop_is_between_two(source: Path, tmp_path: Path) -> None:
    one, many = (settings(source, tmp_path / name, SHORTGPT) for name in ("one", "many"))
    report = carry_out(one)
    assert list(report.seconds) == ["commit", "propagate"]
    assert report.seconds["propagate"] == 0
    with pytest.raises(RunStopped, match="2 of 4 blocks are committed"):
        carry_out(many, stop=committed(tmp_path / "many", 2))
    shard = tmp_path / "many" / "model" / "model-00002-of-00005.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    with pytest.raises(RunDirectoryError, match=r"00002-of.* is not the shard that block 0 committed"):
        carry_out(many)
    shard.write_bytes(content)
    carry_out(many)
    assert outcome(tmp_path / "many") == outcome(tmp_path / "one")
