"""The trials of benchmarks/endurance.py that are quick, with fixed seeds."""

import endurance
import pytest
from endurance import tried


@pytest.mark.parametrize("seed", range(4))
def test_a_random_network_keeps_its_budget_and_loads_to_the_bit(seed):
    assert tried("networks", seed) is None


@pytest.mark.parametrize("seed", range(6))
def test_a_mutated_file_is_refused_or_reads_like_the_whole(seed):
    assert tried("files", seed) is None


def test_what_breaks_is_told_with_its_row_and_seed_and_is_the_exit_code(monkeypatch, capsys):
    def fragile(seed, folder):
        endurance.require(seed != 3, "three")
        assert folder.is_dir()

    monkeypatch.setattr(endurance, "ROWS", {"fragile": fragile})
    for seed, code in ((3, 1), (4, 0)):
        monkeypatch.setattr(
            "sys.argv", ["endurance.py", "--minutes", "0", "--seed", str(seed), "--only", "fragile"]
        )
        assert endurance.main() == code
        out = capsys.readouterr().out
        assert ("BROKEN --only fragile --seed 3: three" in out) == bool(code)
        assert f"fragile: 1 tried, {code} broken" in out
